"""Totals against truth: random histories of traffic and changes on an interface that counts.

The interface counts as WireGuard does: a peer's counters begin at 0 when it is made and are gone
with it, and nothing passes without an allowed IP. The model adds up what passed. After an orderly
history the totals are the truth to the byte; after a crash at most what passed since the last
sample is missing, and nothing is ever there twice.
"""

from __future__ import annotations

import collections
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from harness import API_KEY, LONG, a_key
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

PRIVATE_KEY = bytes(range(1, 33))
KEYS = [a_key(("accounting", number)) for number in range(8)]
PEERS = st.integers(0, 2)


class CountingBackend(wggw.MemoryBackend):
    """An interface with counters; `fails` calls of apply() are to fail, after half of the work."""

    def __init__(self) -> None:
        super().__init__()
        self.counters: dict[bytes, list[int]] = {}
        self.fails = 0

    def apply(self, changes: Any) -> None:
        if self.fails:
            self.fails -= 1
            changes = changes[: len(changes) // 2]
            self._apply(changes)
            raise wggw.BackendError("told to fail")
        self._apply(changes)

    def _apply(self, changes: Any) -> None:
        super().apply(changes)
        for key, peer in changes:
            if peer is None:
                self.counters.pop(key, None)
            else:
                self.counters.setdefault(key, [0, 0])

    def passes(self, key: bytes, psk: bytes) -> bool:
        peer = self._peers.get(key)
        return peer is not None and bool(peer.allowed_ips) and peer.preshared_key == psk

    def read(self) -> list[wggw.PeerState]:
        return [
            wggw.PeerState(peer, 0, *self.counters[key]) for key, peer in tuple(self._peers.items())
        ]

    def wipe(self) -> None:
        """The interface is made anew by somebody."""
        self._peers.clear()
        self._owners.clear()
        self.counters.clear()


class FaultyDisk(wggw.Disk):
    """Files without waiting for the platters; `broken` refuses every write."""

    broken = False

    def write(self, handle: int, data: bytes) -> None:
        if self.broken:
            raise OSError(28, "No space left on device")
        super().write(handle, data)

    def fsync(self, handle: int) -> None:
        pass


class Histories(RuleBasedStateMachine):
    """Three peers; peer n is known by the key that it has now."""

    @initialize()
    def begin(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="wggw-accounting-"))
        self.config = wggw.load_config(
            {"GATEWAY_API_KEY": API_KEY, "DB_PATH": str(self.directory / "db")}
        )
        self.backend = CountingBackend()
        self.disk = FaultyDisk()
        self.keys = {n: KEYS[n] for n in range(3)}
        self.truth: collections.Counter[int] = collections.Counter()
        self.unsampled: collections.Counter[int] = collections.Counter()
        self.lost: collections.Counter[int] = collections.Counter()
        self.open()
        for number in self.keys:
            self.create(number)

    def open(self) -> None:
        self.store = wggw.Store(self.config.db_path, "commit", self.disk)
        self.store.recover()
        self.gateway = wggw.Gateway(self.config, self.store, lambda: 1_800_000_000.0)
        (given,) = wggw.interface_settings(self.config)
        link = wggw.make_link(given, PRIVATE_KEY)
        self.gateway.start([(given, link, self.backend)])

    def create(self, number: int) -> None:
        self.gateway.create({"public_key": self.keys[number]})

    def teardown(self) -> None:
        self.finish()
        self.store.close()
        shutil.rmtree(self.directory)

    def finish(self) -> None:
        self.sample()
        for number, key in self.keys.items():
            self.check(number, key, exact=True)

    def check(self, number: int, key: str, exact: bool) -> None:
        traffic = self.gateway.get(key).traffic
        truth = self.truth[number]
        assert traffic.tx_bytes == 2 * traffic.rx_bytes
        assert truth - self.lost[number] <= traffic.rx_bytes + (
            0 if exact else self.unsampled[number]
        )
        assert traffic.rx_bytes <= truth, "counted twice"

    # --- what happens -----------------------------------------------------------------------------

    @rule(number=PEERS, size=st.integers(1, 1000))
    def traffic(self, number: int, size: int) -> None:
        key = wggw.decode_key(self.keys[number])
        active = self.gateway.get(self.keys[number]).peer.status == "active"
        psk = wggw.wire_peer(self.gateway.get(self.keys[number]).peer).preshared_key
        assert self.backend.passes(key, psk) == active
        if active:
            self.backend.counters[key][0] += size
            self.backend.counters[key][1] += 2 * size
            self.truth[number] += size
            self.unsampled[number] += size

    @rule()
    def sample(self) -> None:
        self.gateway.sample()
        self.unsampled.clear()
        assert {wggw.encode_key(state.peer.public_key) for state in self.backend.read()} == {
            key for key in self.keys.values() if self.gateway.get(key).peer.status == "active"
        }

    @rule(number=PEERS)
    def suspend(self, number: int) -> None:
        self.gateway.set_status(self.keys[number], "suspended")

    @rule(number=PEERS)
    def activate(self, number: int) -> None:
        self.gateway.set_status(self.keys[number], "active")

    @rule(number=PEERS, to=st.integers(0, len(KEYS) - 1))
    def rotate(self, number: int, to: int) -> None:
        """To a new key, and often back to one that was left a moment ago."""
        if KEYS[to] not in self.keys.values():
            if any(KEYS[to] in self.left(other) for other in self.keys if other != number):
                self.sample()  # another peer's last counters: not what a rotation waits for
            self.gateway.rotate(self.keys[number], KEYS[to])
            self.keys[number] = KEYS[to]

    def left(self, number: int) -> set[str]:
        peer_id = self.gateway.get(self.keys[number]).peer.id
        parked = self.gateway._parked["wg0"]
        return {wggw.encode_key(key) for key, entry in parked.items() if entry.peer_id == peer_id}

    @rule(number=PEERS, psk=st.sampled_from([None, a_key("psk1"), a_key("psk2")]))
    def preshared_key(self, number: int, psk: str | None) -> None:
        self.gateway.update(self.keys[number], {"preshared_key": psk})

    @rule(number=PEERS)
    def delete_and_create_again(self, number: int) -> None:
        self.gateway.delete(self.keys[number])
        self.create(number)
        for counter in (self.truth, self.unsampled, self.lost):
            counter[number] = 0

    @rule(number=PEERS, change=st.sampled_from(["delete", "suspend", "activate", "rotate"]))
    def refused_by_the_disk(self, number: int, change: str) -> None:
        """The change is undone, and the interface counts on."""
        key = self.keys[number]
        before = self.gateway.get(key).peer
        self.gateway.flush()
        self.disk.broken = True
        try:
            if change == "delete":
                self.gateway.delete(key)
            elif change == "rotate":
                self.gateway.rotate(key, a_key(("refused", key)))
            else:
                self.gateway.set_status(key, "suspended" if change == "suspend" else "active")
        except wggw.Unavailable:
            pass
        self.disk.broken = False
        self.gateway.heal()
        assert self.gateway.degraded() == []
        assert self.gateway.get(key).peer == before

    @rule(number=PEERS, change=st.sampled_from(["delete", "suspend", "rotate"]))
    def refused_by_the_interface(self, number: int, change: str) -> None:
        key = self.keys[number]
        before = self.gateway.get(key).peer
        if before.status == "suspended":  # then it is not asked
            return
        self.backend.fails = 1
        try:
            if change == "delete":
                self.gateway.delete(key)
            elif change == "rotate":
                self.gateway.rotate(key, a_key(("refused", key)))
            else:
                self.gateway.set_status(key, "suspended")
        except wggw.Unavailable:
            pass
        self.backend.fails = 0
        assert self.gateway.get(key).peer == before

    @rule()
    def sync(self) -> None:
        self.gateway.reconcile()

    @rule()
    def snapshot(self) -> None:
        self.gateway.snapshot()

    @rule()
    def orderly_restart(self) -> None:
        self.gateway.close()
        self.store.close()
        self.open()

    @rule()
    def kill(self) -> None:
        """The interface lives on, and so do its counters: only a key that was left is lost.

        Until its last counters are on disk: no suspension waits for that.
        """
        in_memory = self.store.durable < self.store.number
        for number in self.keys:
            if in_memory or self.left(number):
                self.lost[number] += self.unsampled[number]
        self.store.close()
        self.open()

    @rule()
    def power_cut(self) -> None:
        """Interface and process at once."""
        self.lost.update(self.unsampled)
        self.unsampled.clear()
        self.backend.wipe()
        self.store.close()
        self.open()

    @rule()
    def interface_made_anew(self) -> None:
        self.lost.update(self.unsampled)
        self.unsampled.clear()
        self.backend.wipe()
        self.gateway.reconcile()

    @invariant()
    def totals_are_the_truth(self) -> None:
        if hasattr(self, "gateway"):
            for number, key in self.keys.items():
                self.check(number, key, exact=False)


@pytest.mark.timeout(1200 if LONG else 300)
@pytest.mark.parametrize("sweep", [0, 512], ids=["large interface", "small interface"])
def test_totals_are_the_truth(sweep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wggw, "SWEEP_PEERS", sweep)
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=300 if LONG else 25,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_a_peer_that_left_two_keys_since_the_last_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wggw, "SWEEP_PEERS", 0)  # so that both are read in the same sample
    history = Histories()
    history.begin()
    for to in (3, 4):
        history.traffic(0, 7)
        history.rotate(0, to)
    assert len(history.left(0)) == 2
    history.finish()
    assert history.truth[0] == 14
    history.teardown()


def test_a_crash_right_after_the_interface_was_made_anew_loses_no_bytes() -> None:
    history = Histories()
    history.begin()
    history.traffic(0, 7)
    history.sample()
    history.power_cut()
    history.kill()
    history.traffic(0, 7)  # as many as before: the counter stands where it stood
    history.finish()
    assert history.truth[0] == 14
    history.teardown()
