"""Totals and quotas: nothing that was read is lost, and nothing stands still in silence.

What an interface counts is told by the proxy before it, so that every byte of it is known.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Client, a_key, some, wait_for
from rig import (
    EIO,
    Gateway,
    Interface,
    check_interface,
    is_healthy,
    memory_gateway,
    patch,
    real_gateway,
    rotate,
    wait_degraded,
    wait_healthy,
)

SAMPLE = 0.3  # seconds
ONE, TWO, NEW = (a_key(name) for name in ("one", "two", "new"))


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Gateway, Interface]]:
    """A gateway with two peers, and its interface."""
    with real_gateway(tmp_path, SAMPLE_INTERVAL=str(SAMPLE)) as (gateway, interface):
        client = gateway.client()
        for key in (ONE, TWO):
            assert client.create(key).status == 200
        wait_healthy(client)
        yield gateway, interface


def totals(client: Client, key: str) -> tuple[int, int]:
    row = client.get(key).json
    return row["rx_bytes"], row["tx_bytes"]


def become(client: Client, key: str, rx: int, tx: int) -> None:
    wait_for(
        lambda: totals(client, key) == (rx, tx),
        6,
        f"{(rx, tx)}, and not {totals(client, key)}",
    )


def counted(rx: object, tx: object, **more: object) -> dict[str, object]:
    return {"rx_bytes": rx, "tx_bytes": tx, **more}


def samples(interface: Interface, number: int) -> None:
    """Wait until it has been read so many times from now on, and what was read is taken in."""
    until = interface.faults.calls("get") + number
    wait_for(lambda: interface.faults.calls("get") > until, what="more readings")


# --- readings that fail ---------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize("how", some([{"errno": EIO}, {"cut": True}], 1), ids=str)
def test_failing_readings_are_no_health(
    pair: tuple[Gateway, Interface], how: dict[str, Any]
) -> None:
    gateway, interface = pair
    client = gateway.client()
    interface.faults.rule("get", **how)
    assert wait_degraded(client, 3 * SAMPLE + 30)
    until = time.monotonic() + 3 * SAMPLE
    while time.monotonic() < until:
        assert not is_healthy(client), "healthy while nothing can be read"
        time.sleep(0.05)
    interface.shows({ONE: counted(1000, 2000)})
    interface.faults.clear()
    become(client, ONE, 1000, 2000)
    wait_healthy(client)


def test_failing_readings_of_the_memory_backend_are_no_health(tmp_path: Path) -> None:
    with memory_gateway(tmp_path, SAMPLE_INTERVAL=str(SAMPLE)) as gateway:
        client = gateway.client()
        client.create(ONE)
        gateway.faults.rule("read", errno=EIO)
        assert wait_degraded(client, 3 * SAMPLE + 30)
        gateway.faults.clear()
        wait_healthy(client)


UNREADABLE = [2**64 - 1, 2**63, 10**30, "many", "-1"]


@pytest.mark.real
@pytest.mark.parametrize("name", some(["rx_bytes", "last_handshake_time_sec"], 1))
def test_one_counter_that_nobody_can_read_is_that_peers_alone(
    pair: tuple[Gateway, Interface], name: str
) -> None:
    gateway, interface = pair
    client = gateway.client()
    become(client, ONE, 0, 0)
    for number, value in enumerate(UNREADABLE, 1):
        interface.shows({ONE: {name: value}, TWO: counted(1000 * number, 2000 * number)})
        become(client, TWO, 1000 * number, 2000 * number)
    assert patch(client, TWO, quota_bytes=20_000).status == 200
    interface.shows({ONE: {name: UNREADABLE[0]}, TWO: counted(9000, 12_000)})
    wait_for(lambda: client.get(TWO).json["status_reason"] == "quota", 10, "the quota")
    # And what is on the interface is still compared with what should be there.
    interface.set("peer", ONE, "remove")
    wait_for(lambda: ONE in interface.peers(), 10, "the repair")
    interface.shows({ONE: counted(10, 20)})
    wait_for(lambda: totals(client, ONE)[1] >= 20, 10, "its own counters, once they can be read")
    wait_healthy(client)


# --- quotas ---------------------------------------------------------------------------------------


@pytest.mark.real
def test_a_quota_is_noticed_when_it_is_overrun_across_a_rotation(
    pair: tuple[Gateway, Interface],
) -> None:
    """What the old key moved counts: neither of the two overruns it alone."""
    gateway, interface = pair
    client = gateway.client()
    assert patch(client, ONE, quota_bytes=10_000).status == 200
    interface.shows({ONE: counted(2000, 4000)})
    become(client, ONE, 2000, 4000)
    assert rotate(client, ONE, NEW).status == 200
    assert totals(client, NEW) == (2000, 4000)
    interface.shows({NEW: counted(2000, 2100)})
    wait_for(lambda: client.get(NEW).json["status_reason"] == "quota", 10, "the quota")
    assert NEW not in interface.peers()


@pytest.mark.real
@pytest.mark.long
def test_a_quota_is_noticed_when_the_rotation_itself_overruns_it(
    pair: tuple[Gateway, Interface],
) -> None:
    """Whether the last bytes of the old key are counted or not: over is over."""
    gateway, interface = pair
    client = gateway.client()
    interface.shows({ONE: counted(2000, 4000)})
    become(client, ONE, 2000, 4000)
    assert patch(client, ONE, quota_bytes=10_000).status == 200
    for old, new in ((ONE, NEW), (NEW, ONE), (ONE, NEW)):
        interface.shows({old: counted(4000, 8000)})
        assert rotate(client, old, new).status == 200
        samples(interface, 3)
        row = client.get(new).json
        over = row["rx_bytes"] + row["tx_bytes"] > 10_000
        assert (row["status"], row["status_reason"]) == (
            ("suspended", "quota") if over else ("active", None)
        ), row
        if over:
            break


@pytest.mark.real
def test_a_quota_below_what_was_used_ends_the_peer(pair: tuple[Gateway, Interface]) -> None:
    gateway, interface = pair
    client = gateway.client()
    interface.shows({ONE: counted(2000, 4000)})
    become(client, ONE, 2000, 4000)
    assert patch(client, ONE, quota_bytes=5000).status == 200
    wait_for(lambda: client.get(ONE).json["status_reason"] == "quota", 10, "the quota")
    assert ONE not in interface.peers()


# --- counters that start again --------------------------------------------------------------------


FALLEN = [((500, 9000), (1500, 11_000)), ((9000, 500), (10_000, 2500)), ((1, 2), (1001, 2002))]


@pytest.mark.real
@pytest.mark.parametrize(
    ("second", "total", "killed"),
    some([(*fallen, killed) for fallen in FALLEN for killed in (False, True)], 2),
)
def test_one_direction_that_fell_proves_that_both_restarted(
    pair: tuple[Gateway, Interface],
    second: tuple[int, int],
    total: tuple[int, int],
    killed: bool,
) -> None:
    gateway, interface = pair
    client = gateway.client()
    interface.shows({ONE: counted(1000, 2000)})
    become(client, ONE, 1000, 2000)
    if killed:
        gateway.kill()
    interface.shows({ONE: counted(*second)})
    if killed:
        gateway.start()
        client = gateway.client()
    become(client, ONE, *total)
    interface.shows({ONE: counted(second[0] + 1, second[1] + 1)})
    become(client, ONE, total[0] + 1, total[1] + 1)


@pytest.mark.real
@pytest.mark.parametrize("done", some([False, True], 1))
def test_a_kill_within_a_scrub_loses_no_totals(tmp_path: Path, done: bool) -> None:
    """A peer is made anew so that its endpoint is forgotten; its counters start again by that.

    What they had counted is neither lost nor counted twice, whether the interface has done it when
    the KILL comes or not.
    """
    with real_gateway(tmp_path, SAMPLE_INTERVAL="0.5", PRIVACY_SCRUB="180") as (gateway, interface):
        client = gateway.client()
        assert client.create(ONE).status == 200
        held = base64.b64decode(ONE).hex()
        interface.faults.rule("set", only=held, cut=True, done=done, block=True)
        long_ago = {
            "endpoint": "192.0.2.1:5000",
            "last_handshake_time_sec": int(time.time()) - 3600,
        }
        interface.shows({ONE: counted(70_000, 90_000, **long_ago)})
        interface.faults.wait_held()
        gateway.kill()
        interface.faults.clear()  # what was held up is done now, or is not
        wait_for(lambda: interface.faults.held() == 0, what="the end of it")
        gateway.settings["PRIVACY_SCRUB"] = "0"
        gateway.start()
        client = gateway.client()
        become(client, ONE, 70_000, 90_000)
        # From here on it counts from where it was, or from 0.
        interface.shows({ONE: counted(5, 6) if done else counted(70_005, 90_006)})
        become(client, ONE, 70_005, 90_006)
        wait_healthy(client)
        check_interface(client)
