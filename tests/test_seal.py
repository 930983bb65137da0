"""Encryption at rest: nothing readable, nothing changed unnoticed, no nonce used twice."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from harness import GatewayProcess, a_key, running
from test_restart import ended, state

SECRET = "a key for what lies on disk"


# --- nothing can be read --------------------------------------------------------------------------


def files_of(directory: Path) -> dict[str, bytes]:
    """The database's files, whatever their names end in."""
    return {p.name: p.read_bytes() for p in directory.glob("wireguard.db*") if p.is_file()}


def give_away(peers: list[dict[str, Any]]) -> list[bytes]:
    """Texts and bytes that would show what peers there are."""
    told = [b"SQLite format", b"CREATE TABLE", b'{"put"', b'"public_key"', b"request-"]
    for peer in peers:
        told += [peer["public_key"].encode(), base64.b64decode(peer["public_key"])]
        told += [peer[name].encode() for name in ("assigned_ip", "assigned_ipv6") if peer[name]]
        told.append(base64.b64encode(peer["public_key"].encode())[4:-4])
    told += [a_key("psk").encode(), base64.b64decode(a_key("psk"))]
    return told


def check_unreadable(directory: Path, peers: list[dict[str, Any]]) -> None:
    files = files_of(directory)
    assert {"wireguard.db", "wireguard.db.journal"} <= files.keys()
    for name, content in files.items():
        for told in give_away(peers):
            assert told not in content, f"{told!r} can be read in {name}"


def create_some(gateway: GatewayProcess, first: int) -> list[dict[str, Any]]:
    client = gateway.client()
    made = []
    for number in range(first, first + 8):
        psk = {"preshared_key": a_key("psk")} if number % 2 else {}
        answer = client.create(
            a_key(number), protocol="dual", request_id=f"request-{number}", **psk
        )
        assert answer.status == 200
        made.append({"public_key": a_key(number), **answer.json})
    client.close()
    return made


def test_nothing_on_disk_can_be_read(tmp_path: Path) -> None:
    with running(tmp_path, SNAPSHOT_KEY=SECRET) as gateway:
        peers = create_some(gateway, 0)
        check_unreadable(tmp_path, peers)
        for number, end in enumerate((gateway.stop, gateway.kill, gateway.stop), 1):
            end()
            check_unreadable(tmp_path, peers)
            gateway.start()
            peers += create_some(gateway, 10 * number)
            check_unreadable(tmp_path, peers)
        assert SECRET not in gateway.text()
    # The same search does find what a gateway without the key writes.
    plain = tmp_path / "plain"
    plain.mkdir()
    with running(plain) as gateway, pytest.raises(AssertionError, match="can be read"):
        check_unreadable(plain, create_some(gateway, 0))


# --- the wrong key, no key, the first key ---------------------------------------------------------


@pytest.mark.parametrize("key", [None, "not the key that it was"], ids=["none", "wrong"])
def test_wrong_key_is_exit_2_that_names_the_setting(tmp_path: Path, key: str | None) -> None:
    with running(tmp_path, SNAPSHOT_KEY=SECRET) as gateway:
        create_some(gateway, 0)
        before = state(gateway)
        gateway.kill()
        files = files_of(tmp_path)
        del gateway.settings["SNAPSHOT_KEY"]
        if key:
            gateway.settings["SNAPSHOT_KEY"] = key
        code, text = ended(gateway)
        assert code == 2, text
        last = text.splitlines()[-1]
        assert "SNAPSHOT_KEY" in last
        assert str(tmp_path / "wireguard.db") in last
        assert SECRET not in text and (key is None or key not in text)
        assert files_of(tmp_path) == files
        gateway.settings["SNAPSHOT_KEY"] = SECRET
        gateway.start()
        assert state(gateway) == before
