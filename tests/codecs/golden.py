"""Golden bytes, as data in the files beside this one.

A .hex file has sections: a line `[name]`, then octets in hex with comments behind `;`. They were
put together by hand from the kernel's headers, not by wggw.py. A .uapi file is a program's answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import wggw

HERE = Path(__file__).parent


def octets(text: str) -> bytes:
    return bytes.fromhex("".join(line.partition(";")[0] for line in text.splitlines()))


def sections(name: str) -> dict[str, bytes]:
    """The sections of NAME.hex; comments before the first one are left out."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in (HERE / f"{name}.hex").read_text().splitlines():
        if line.startswith("["):
            current = found.setdefault(line.strip("[]"), [])
        else:
            current.append(line)
    return {title: octets("\n".join(lines)) for title, lines in found.items()}


def answer(name: str) -> bytes:
    return (HERE / f"{name}.uapi").read_bytes()


def states(reading: wggw.Reading) -> list[wggw.PeerState]:
    """Every peer of a reading, none of which may be unreadable."""
    assert reading.unreadable == 0
    assert reading.peers == len(reading.changed) + len(reading.same)
    return [state for _, state in reading.changed]


def netlink(
    payloads: Iterable[bytes], family: wggw.GenericFamily = wggw.WIREGUARD_FAMILY
) -> tuple[wggw.Device | None, list[wggw.PeerState]]:
    """All that the kernel's answer says."""
    reading = wggw.read_wg_device(payloads, family)
    return reading.device, states(reading)


def uapi(parts: Iterable[bytes]) -> tuple[wggw.Device | None, list[wggw.PeerState]]:
    """All that a userspace WireGuard's answer says."""
    reading = wggw.read_uapi_device(parts)
    return reading.device, states(reading)
