"""What was acknowledged stays, whatever becomes of a bigger change that goes on meanwhile.

A desired state is under way, single changes are made and acknowledged beside it, and the desired
state fails: by the interface, by the disk, by KILL or TERM. Every fault comes at the first, second
and third call that is big enough to be the desired state's: where it has fewer, it succeeds.
"""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from harness import LONG, Answer, Client, a_key, some, wait_for
from rig import (
    BIG,
    EIO,
    ENOSPC,
    SEALED,
    Background,
    Faults,
    Gateway,
    Interface,
    Single,
    check_interface,
    check_pool,
    fill,
    listed,
    memory_gateway,
    patch,
    put,
    real_gateway,
    restarted,
    rfc3339,
    singles,
    wait_healthy,
    whole_second,
)

PEERS = 20_000 if LONG else 1_500
SINGLES = 400 if LONG else 120
THREADS = 4
SECRET = a_key("preshared")
BULK_BYTES = 30_000  # a write of so much is a desired state's and no single change's
RULES: dict[str, dict[str, Any]] = {
    "interface": {"calls": ["apply", "set"], "least": BIG, "errno": EIO},
    "interface half-way": {"calls": ["apply", "set"], "least": BIG, "errno": EIO, "torn": True},
    "disk": {
        "calls": ["write"],
        "only": "wireguard.db",
        "least": BULK_BYTES,
        "errno": ENOSPC,
        "torn": True,
    },
}


def desired(key: str) -> dict[str, Any]:
    """What both the rows and the interface have to learn."""
    return {"public_key": key, "persistent_keepalive": 21, "preshared_key": SECRET}


class Beside:
    """A desired state of many under way, and single changes of some of its peers beside it."""

    def __init__(self, gateway: Gateway, label: object) -> None:
        self.gateway = gateway
        client = gateway.client()
        self.singles = singles(SINGLES, label)
        self.acknowledged: list[Single] = []
        there = [single.there for single in self.singles if single.there]
        others = [a_key((label, "other", number)) for number in range(PEERS - len(there))]
        fill(client, [*there, *others])
        self.elements = [
            *filter(None, map(self._element, range(SINGLES))),
            *map(desired, others),
        ]
        client.close()

    def _element(self, index: int) -> dict[str, Any] | None:
        """Of every other peer the desired state wants what the single change wants, too.

        Who asks for what is there already, and is told so, has it acknowledged all the same.
        """
        single = self.singles[index]
        if single.there is None:
            return None
        if index % 2:
            return desired(single.there)
        if single.kind == "delete":
            return None
        return {**desired(single.there), **(single.same or {})}

    def run(self, faults: Faults) -> tuple[Background, list[threading.Thread]]:
        """Start both; returns the desired state's request and those who make the others."""
        self._faults = faults
        bulk = Background(self.gateway, lambda client: put(client, self.elements))
        workers = [
            threading.Thread(
                target=self._work, args=(self.singles[number::THREADS], bulk), daemon=True
            )
            for number in range(THREADS)
        ]
        for worker in workers:
            worker.start()
        return bulk, workers

    def _work(self, mine: Sequence[Single], bulk: Background) -> None:
        """Some while it is planned, the others when it has begun to change things."""
        client = self.gateway.client()
        with contextlib.suppress(OSError, http.client.HTTPException):
            for number, single in enumerate(mine):
                if number == len(mine) // 3:
                    wait_for(lambda: bulk.done() or self._faults.met(), what="its first step")
                if single.ask(client).status in single.acknowledges:
                    self.acknowledged.append(single)
                if not bulk.done():
                    time.sleep(0.02)
        client.close()

    def check(self, client: Client, answer: Answer | None) -> None:
        """What was acknowledged is there; where the desired state was done, it may have won."""
        found = listed(client)
        # What a desired state that was done, or may be, has made of a peer is right as well.
        wanted = {element["public_key"]: element for element in self.elements}
        done = answer is None or answer.status == 200
        lost = []
        for single in self.acknowledged:
            now = found.get(single.public_key)
            won = done and (
                now is None
                if single.public_key not in wanted
                else now is not None and now["persistent_keepalive"] == 21
            )
            if not single.made(found) and not won:
                lost.append((single.kind, now and now["status"]))
        assert not lost, f"{len(lost)} of {len(self.acknowledged)} taken back: {lost[:5]}"


SLOW = {"calls": ["apply", "set"], "least": BIG, "seconds": 0.15}


def check_beside(
    gateway: Gateway, rules: list[dict[str, Any]], interface: Interface | None = None
) -> None:
    faults = interface.faults if interface else gateway.faults
    beside = Beside(gateway, "beside")
    faults.rules(*rules)
    bulk, workers = beside.run(faults)
    answer = bulk.wait(120)
    for worker in workers:
        worker.join(60)
    # Later calls that are big enough there may not be: without a fault, it is done.
    assert answer.status in ((200, 503) if rules[0]["after"] else (503,)), answer
    faults.clear()
    client = gateway.client()
    for _ in range(2):
        wait_healthy(client)
        assert beside.acknowledged, "nothing was acknowledged beside it"
        beside.check(client, answer)
        check_interface(client)
        check_pool(client)
        client = restarted(gateway)


@pytest.mark.parametrize("sealed", [False, True] if LONG else [False])
@pytest.mark.parametrize("after", [0, 1, 3] if LONG else [2])
@pytest.mark.parametrize("fault", some(list(RULES), 2))
def test_by_a_desired_state_that_fails(
    tmp_path: Path, fault: str, after: int, sealed: bool
) -> None:
    with memory_gateway(tmp_path, **(SEALED if sealed else {})) as gateway:
        check_beside(gateway, [{**RULES[fault], "after": after}, SLOW])


@pytest.mark.real
@pytest.mark.parametrize("after", [0, 1, 3] if LONG else [1])
def test_by_a_desired_state_that_wireguard_refuses(tmp_path: Path, after: int) -> None:
    with real_gateway(tmp_path) as (gateway, interface):
        check_beside(gateway, [{**RULES["interface"], "after": after}, SLOW], interface)


@pytest.mark.parametrize(
    ("end", "after"),
    [
        (end, after)
        for after in (1, 3)
        for end in ("KILL", "TERM")
        if LONG or (end == "KILL") == (after == 3)
    ],
)
def test_by_the_end_of_the_process(tmp_path: Path, end: str, after: int) -> None:
    """The end comes while a desired state is at the interface for the first, or a later, time."""
    with memory_gateway(tmp_path) as gateway:
        beside = Beside(gateway, "beside")
        gateway.faults.rule("apply", least=BIG, seconds=0.3)
        bulk, workers = beside.run(gateway.faults)
        wait_for(lambda: bulk.done() or gateway.faults.met() >= after, 60, "the moment")
        gateway.kill() if end == "KILL" else gateway.stop()
        for worker in workers:
            worker.join(60)
        bulk.join(60)
        gateway.start()
        client = gateway.client()
        wait_healthy(client)
        beside.check(client, bulk.answer)
        check_interface(client)
        check_pool(client)


# --- and the desired state's answer is true -------------------------------------------------------


@contextlib.contextmanager
def slow_gateway(directory: Path) -> Iterator[Gateway]:
    with memory_gateway(directory, SAMPLE_INTERVAL="0.5") as gateway:
        gateway.faults.rules({**SLOW, "seconds": 0.06})
        yield gateway


def check_done(client: Client, answer: Answer, elements: list[dict[str, Any]]) -> None:
    """It says how many were updated, and that many are as they should be: all of them."""
    assert answer.status == 200, answer
    found = listed(client)
    assert found.keys() == {element["public_key"] for element in elements}
    wrong = [
        (name, found[element["public_key"]][name], value)
        for element in elements
        for name, value in element.items()
        if name != "preshared_key" and found[element["public_key"]][name] != value
    ]
    assert not wrong, f"{answer.json}, and {len(wrong)} are not as they should be: {wrong[:3]}"
    said = answer.json
    assert said["created"] + said["updated"] + said["unchanged"] == len(elements), said


def test_a_desired_state_wins_over_changes_while_it_was_planned(tmp_path: Path) -> None:
    """It came later: what is patched meanwhile gets its other values all the same."""
    with slow_gateway(tmp_path) as gateway:
        client = gateway.client()
        keys = [a_key(number) for number in range(PEERS)]
        fill(client, keys)
        elements = [desired(key) for key in keys]
        bulk = Background(gateway, lambda c: put(c, elements))
        patched = {}
        # From the end, so that it has not come to them.
        for key in reversed(keys[-SINGLES:]):
            if bulk.done():
                break
            answer = patch(client, key, quota_bytes=10**9)
            assert answer.status == 200, answer
            patched[key] = answer
        answer = bulk.wait(120)
        check_done(client, answer, elements)
        found = listed(client)
        assert patched and all(found[key]["quota_bytes"] == 10**9 for key in patched)
        gateway.faults.clear()
        check_interface(client)
        check_done(restarted(gateway), answer, elements)


def test_a_desired_state_renews_what_expires_meanwhile(tmp_path: Path) -> None:
    with slow_gateway(tmp_path) as gateway:
        client = gateway.client()
        keys = [a_key(number) for number in range(PEERS)]
        begun = time.monotonic()
        fill(client, keys)
        # Some in each of three seconds, from that in which it begins: it comes to them last.
        first = whole_second(0.5 + time.monotonic() - begun)
        ends = {key: first + index % 3 for index, key in enumerate(keys[-30:])}
        for key, end in ends.items():
            assert patch(client, key, expires_at=rfc3339(end)).status == 200
        renewed = rfc3339(first + 86400)
        elements = [{**desired(key), "expires_at": renewed, "status": "active"} for key in keys]
        wait_for(lambda: time.time() > first - 0.3, what="the moment before")
        answer = Background(gateway, lambda c: put(c, elements)).wait(120)
        check_done(client, answer, elements)
        wait_for(lambda: time.time() > first + 3, what="the last second")
        gateway.faults.clear()
        check_interface(client)
        check_done(client, answer, elements)


@pytest.mark.real
def test_a_desired_state_raises_quotas_that_are_overrun_meanwhile(tmp_path: Path) -> None:
    with real_gateway(tmp_path, SAMPLE_INTERVAL="0.2") as (gateway, interface):
        client = gateway.client()
        keys = [a_key(number) for number in range(PEERS // 4)]
        fill(client, keys)
        last = keys[-20:]
        for key in last:
            assert patch(client, key, quota_bytes=1000).status == 200
        elements = [{**desired(key), "quota_bytes": 10**9, "status": "active"} for key in keys]
        interface.faults.rule("set", least=BIG, seconds=0.3)
        bulk = Background(gateway, lambda c: put(c, elements))
        wait_for(lambda: bulk.done() or interface.faults.met(), what="its first step")
        interface.shows({key: {"rx_bytes": 2000} for key in last})
        answer = bulk.wait(120)
        check_done(client, answer, elements)
        interface.faults.clear()
        check_interface(client)
        wait_for(
            lambda: all(client.get(key).json["rx_bytes"] >= 2000 for key in last), what="a sample"
        )
        check_done(client, answer, elements)
