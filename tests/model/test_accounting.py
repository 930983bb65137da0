"""Totals for billing: every byte is counted once, whatever happens to interface and process.

Three peers send and receive. What a peer moved since the last sample may be lost when it leaves the
interface or the interface is made anew, and nothing else is; nothing is ever counted twice.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import shutil
import tempfile
from pathlib import Path

import pytest
from fakes import Crash, World, build, do, peer_of, traffic_of
from harness import LONG, a_key
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

import wggw

KEYS = [a_key(("accounting", number)) for number in range(8)]
PEERS = st.integers(0, 2)
LEAVING = ["delete", "suspend", "rotate"]


class Histories(RuleBasedStateMachine):
    """Three peers; peer n is known by the key that it has now."""

    @initialize()
    def begin(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="wggw-accounting-"))
        self.keys = {n: KEYS[n] for n in range(3)}
        self.truth: collections.Counter[int] = collections.Counter()
        self.unsampled: collections.Counter[int] = collections.Counter()
        self.lost: collections.Counter[int] = collections.Counter()
        self.world = build(self.directory, PRIVACY_SCRUB="180")
        for number in self.keys:
            self.create(number)

    @property
    def gateway(self) -> wggw.Gateway:
        return self.world.gateway

    def create(self, number: int) -> None:
        do(self.gateway, "create", public_key=self.keys[number])

    def is_active(self, number: int) -> bool:
        return peer_of(self.gateway, self.keys[number]).status == "active"

    def leaves(self, *numbers: int) -> None:
        for number in numbers:
            self.lost[number] += self.unsampled.pop(number, 0)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.sample()
            for number in self.keys:
                self.check(number)
            self.world.close()
            shutil.rmtree(self.directory)

    def check(self, number: int) -> None:
        total = traffic_of(self.gateway, self.keys[number])
        truth = self.truth[number]
        assert total.tx_bytes == 2 * total.rx_bytes
        assert total.rx_bytes <= truth, "counted twice"
        assert truth - self.lost[number] - self.unsampled[number] <= total.rx_bytes, "lost"

    # --- what happens ----------------------------------------------------------------------------

    @rule(number=PEERS, size=st.integers(1, 1000), ago=st.integers(0, 400))
    def traffic(self, number: int, size: int, ago: int) -> None:
        if self.is_active(number):
            handshake = int(self.world.now) - ago
            self.world.backend.move(self.keys[number], size, 2 * size, handshake)
            self.truth[number] += size
            self.unsampled[number] += size

    @rule()
    def sample(self) -> None:
        """And a scrub of those that had no handshake for a while."""
        self.gateway.projection.sample()
        self.unsampled.clear()

    @rule(number=PEERS, status=st.sampled_from(["active", "suspended"]))
    def set_status(self, number: int, status: str) -> None:
        if status == "suspended":
            self.leaves(number)
        do(self.gateway, "set_status", public_key=self.keys[number], status=status)

    @rule(number=PEERS, to=st.sampled_from(KEYS))
    def rotate(self, number: int, to: str) -> None:
        if to not in self.keys.values():
            self.leaves(number)
            do(self.gateway, "rotate", public_key=self.keys[number], new_public_key=to)
            self.keys[number] = to

    @rule(number=PEERS, psk=st.sampled_from([None, a_key("psk1"), a_key("psk2")]))
    def preshared_key(self, number: int, psk: str | None) -> None:
        do(self.gateway, "update", public_key=self.keys[number], preshared_key=psk)

    @rule(number=PEERS)
    def delete_and_create_again(self, number: int) -> None:
        do(self.gateway, "delete", public_key=self.keys[number])
        self.create(number)
        for counter in (self.truth, self.unsampled, self.lost):
            counter[number] = 0

    def refused(self, number: int, what: str) -> None:
        key = self.keys[number]
        before = peer_of(self.gateway, key)
        more = {"suspend": {"status": "suspended"}, "rotate": {"new_public_key": a_key("no")}}
        rule = {"suspend": "set_status"}.get(what, what)
        with contextlib.suppress(wggw.Unavailable):
            outcome = do(self.gateway, rule, public_key=key, **more.get(what, {}))
            assert not outcome.changed
        self.gateway.lander.heal()
        self.gateway.projection.supervise()
        assert self.gateway.degraded() == []
        assert peer_of(self.gateway, key) == before

    @rule(number=PEERS, what=st.sampled_from(LEAVING), call=st.sampled_from(["write", "fsync"]))
    def refused_by_the_disk(self, number: int, what: str, call: str) -> None:
        """The interface is not even asked, and counts on."""
        self.world.disk.fail(call)
        self.refused(number, what)
        self.world.disk.heal()

    @rule(
        number=PEERS,
        what=st.sampled_from(LEAVING),
        how=st.sampled_from(["refused", "half", "lost", "hangs"]),
    )
    def refused_by_the_interface(self, number: int, what: str, how: str) -> None:
        if self.is_active(number):  # else it is not asked
            if how in ("half", "lost"):
                self.leaves(number)
            self.world.backend.fail("apply", what=how)
            self.refused(number, what)

    @rule()
    def repair(self) -> None:
        self.gateway.projection.reconcile()

    @rule(number=PEERS)
    def dropped_by_somebody(self, number: int) -> None:
        self.leaves(number)
        self.world.backend.drop(self.keys[number])
        self.gateway.projection.reconcile()

    @rule()
    def snapshot(self) -> None:
        self.gateway.lander.snapshot()

    @rule()
    def orderly_restart(self) -> None:
        self.world.reopen()

    @rule()
    def kill(self) -> None:
        """The interface lives on, and so do its counters."""
        self.world.crash()
        self.world.open()

    @rule()
    def power_cut(self) -> None:
        self.world.crash()
        self.leaves(*self.keys)
        self.world.backend.restart()
        self.world.open()

    @rule()
    def interface_made_anew(self) -> None:
        self.leaves(*self.keys)
        self.world.backend.restart()
        self.gateway.projection.reconcile()

    @rule(anew=st.booleans(), where=st.sampled_from(["before", "after"]))
    def killed_while_counters_begin_anew(self, anew: bool, where: str) -> None:
        """Between the record that says so and the interface, or behind it; in a scrub, too."""
        if anew:
            self.leaves(*self.keys)
            self.world.backend.restart()
        self.world.backend.crash("apply", where=where)
        with contextlib.suppress(Crash, wggw.Unavailable, wggw.BackendError):
            if anew:
                self.gateway.projection.reconcile()
            else:
                self.gateway.projection.sample()
        self.world.crash()
        self.world.backend.heal()
        self.world.open()

    @invariant()
    def totals_are_the_truth(self) -> None:
        if hasattr(self, "world"):
            for number in self.keys:
                self.check(number)


@pytest.fixture(autouse=True)
def quiet() -> object:
    wggw.LOG.setLevel(logging.CRITICAL)
    yield
    wggw.LOG.setLevel(logging.NOTSET)


@pytest.mark.timeout(1200 if LONG else 300)
def test_totals_are_the_truth() -> None:
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=200 if LONG else 10,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = build(tmp_path)
    do(made.gateway, "create", public_key=a_key(1))
    return made


def total(world: World) -> tuple[int, int]:
    found = traffic_of(world.gateway, a_key(1))
    return found.rx_bytes, found.tx_bytes


def test_a_crash_right_after_the_interface_was_made_anew_loses_no_bytes(world: World) -> None:
    world.backend.move(a_key(1), 7)
    world.gateway.projection.sample()
    world.crash()
    world.backend.restart()
    world.open()
    world.crash()
    world.backend.move(a_key(1), 7)  # as many as before: the counter stands where it stood
    world.open()
    assert total(world) == (14, 0)
    world.close()


@pytest.mark.parametrize("again", [(7, 100), (100, 7)])
def test_one_direction_that_fell_proves_that_both_began_anew(
    world: World, again: tuple[int, int]
) -> None:
    """The interface was made anew by somebody, unseen, with the peer in it."""
    world.backend.move(a_key(1), 50, 50)
    world.gateway.projection.sample()
    address = peer_of(world.gateway, a_key(1)).assigned_ip
    world.backend.restart()
    world.backend.put(a_key(1), str(address))
    world.backend.move(a_key(1), *again)
    world.gateway.projection.sample()
    assert total(world) == (50 + again[0], 50 + again[1])
    world.close()


def test_a_quota_ends_with_the_sample_that_finds_it_used_up_also_over_a_rotation(
    world: World,
) -> None:
    do(world.gateway, "update", public_key=a_key(1), quota_bytes=100)
    world.backend.move(a_key(1), 60)
    world.gateway.projection.sample()
    do(world.gateway, "rotate", public_key=a_key(1), new_public_key=a_key(2))
    world.backend.move(a_key(2), 60)
    world.gateway.projection.sample()
    peer = peer_of(world.gateway, a_key(2))
    assert (peer.status, peer.status_reason) == ("suspended", "quota")
    assert world.backend.peers == {}
    world.close()


def test_a_sample_that_fails_is_said(world: World) -> None:
    world.backend.fail("read")
    with pytest.raises(wggw.BackendError):
        world.gateway.projection.sample()
    assert any("counters" in reason for reason in world.gateway.degraded())
    world.gateway.projection.sample()
    assert world.gateway.degraded() == []
    world.close()
