"""TERM ends the process in 5 seconds, whatever disk and interface do, and says what is missing.

What was acknowledged is on disk; what was under way is whole or absent.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from harness import LONG, a_key
from rig import (
    Background,
    Gateway,
    check_interface,
    check_pool,
    fill,
    listed,
    memory_gateway,
    patch,
)

WITHIN = 5.0  # seconds
BUSY = 5.0  # seconds that the machine may do other things meanwhile
NOT_WRITTEN = re.compile(r"\bnot\b.*\b(written|disk|saved|snapshot|finished|answered|synced)")


def stop(gateway: Gateway) -> tuple[int, float, str]:
    """TERM: the exit code, the seconds it took, and what was said meanwhile."""
    said = len(gateway.text())
    begun = time.monotonic()
    code = gateway.stop()
    return code, time.monotonic() - begun, gateway.text()[said:]


def loud(said: str) -> list[str]:
    return [line for line in said.splitlines() if " WARNING " in line or " ERROR " in line]


@pytest.mark.parametrize("seconds", [3, 60] if LONG else [3])
def test_a_disk_that_is_slow_does_not_hold_up_the_stop(tmp_path: Path, seconds: int) -> None:
    with memory_gateway(tmp_path) as gateway:
        kept = [a_key(("kept", number)) for number in range(5)]
        client = gateway.client()
        for key in kept:
            assert client.create(key).status == 200
        gateway.faults.rule("fsync", seconds=seconds)
        keys = [a_key(("late", number)) for number in range(4)]
        requests = [Background(gateway, lambda c, k=key: c.create(k)) for key in keys]
        gateway.faults.wait_held()
        _, took, said = stop(gateway)
        assert took < WITHIN + BUSY, f"it took {took:.1f} s"
        assert NOT_WRITTEN.search("\n".join(loud(said))), f"nothing is said of it: {said}"
        for request in requests:
            request.join(30)
            assert request.done()
        done = {
            key
            for key, request in zip(keys, requests, strict=True)
            if request.answer and request.answer.status == 200
        }
        gateway.start()
        client = gateway.client()
        there = set(listed(client))
        assert {*kept, *done} <= there <= {*kept, *keys}
        check_interface(client)
        check_pool(client)


@pytest.mark.long
def test_with_nothing_under_way_a_slow_disk_does_not_either(tmp_path: Path) -> None:
    """A last snapshot needs several fsyncs of 3 s: what there is already, is enough."""
    with memory_gateway(tmp_path) as gateway:
        client = gateway.client()
        keys = [a_key(number) for number in range(5)]
        for key in keys:
            assert client.create(key).status == 200
        gateway.faults.rule("fsync", seconds=3)
        _, took, said = stop(gateway)
        assert took < WITHIN + BUSY, f"it took {took:.1f} s: {said}"
        gateway.start()
        assert set(listed(gateway.client())) == set(keys)


def test_an_interface_that_hangs_does_not_hold_up_the_stop(tmp_path: Path) -> None:
    with memory_gateway(tmp_path) as gateway:
        client = gateway.client()
        assert client.create(a_key("kept")).status == 200
        gateway.faults.rule("apply", block=True)
        request = Background(gateway, lambda c: c.create(a_key("late")))
        gateway.faults.wait_held()
        _, took, said = stop(gateway)
        assert took < WITHIN + BUSY, f"it took {took:.1f} s"
        assert loud(said), f"nothing is said of it: {said}"
        request.join(30)
        assert request.answer is None or request.answer.status == 503, request.answer
        gateway.start()
        client = gateway.client()
        assert a_key("kept") in listed(client)
        check_interface(client)


def test_when_all_is_well_everything_is_finished_and_nothing_is_loud(tmp_path: Path) -> None:
    with memory_gateway(tmp_path) as gateway:
        client = gateway.client()
        keys = [a_key(number) for number in range(500)]
        fill(client, keys)
        gateway.faults.rule("fsync", seconds=0.3)
        requests = [
            Background(gateway, lambda c, k=key: patch(c, k, quota_bytes=10**9)) for key in keys[:8]
        ]
        gateway.faults.wait_held()
        code, took, said = stop(gateway)
        assert (code, loud(said)) == (0, [])
        assert took < WITHIN + BUSY
        for request in requests:
            request.join(30)
        done = [r.answer for r in requests if r.answer is not None]
        assert {answer.status for answer in done} == {200}
        gateway.start()
        found = listed(gateway.client())
        assert set(found) == set(keys)
        changed = sum(row["quota_bytes"] == 10**9 for row in found.values())
        assert len(done) <= changed <= len(requests)
