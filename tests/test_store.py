"""The store: what comes back after a restart, a disk fault at every call, a crash at every call.

The history that is replayed under faults commits, waits, takes snapshots and restarts. A fault is
injected at the Nth call of the disk for every N that there is (some of them without WGGW_LONG=1).
What must hold each time: the state that comes back holds every acknowledged change, and it is one
that existed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, a_key, some
from hypothesis import given, settings
from hypothesis import strategies as st

from wggw import (
    DamagedError,
    Disk,
    DiskError,
    Filter,
    Parked,
    Peer,
    PeerState,
    StartError,
    Step,
    Store,
    Traffic,
    TrafficRow,
    Vault,
    WirePeer,
    decode_key,
    encode_journal,
    journal_line,
    parse_journal,
)

State = frozenset[Peer]


def a_peer(number: int, **fields: Any) -> Peer:
    peer = Peer(
        id=number,
        public_key=a_key(number),
        interface="wg0",
        status="active",
        status_reason=None,
        assigned_ip=f"10.0.{number // 250}.{number % 250 + 2}",
        assigned_ipv6=f"fd00::{number + 2:x}" if number % 2 else None,
        tunnel_traffic="ipv4",
        dns="d1",
        port=51820,
        preshared_key=None,
        persistent_keepalive=25,
        expires_at=None,
        quota_bytes=None,
        created_at=1765200000 + number,
        request_id=None,
        obfuscation=None,
    )
    return peer._replace(**fields)


def opened(
    path: Path,
    disk: Disk | None = None,
    durability: str = "commit",
    vault: Vault | None = None,
) -> Store:
    store = Store(str(path / "db"), durability, disk or FastDisk(), vault)
    store.recover()
    return store


@contextlib.contextmanager
def closing(store: Store) -> Iterator[Store]:
    try:
        yield store
    finally:
        store.close()


def state_of(store: Store) -> State:
    return frozenset(store.peers_after(0, 10_000))


def recovered(path: Path, vault: Vault | None = None) -> State:
    """What a fresh start on these files gives, twice: the second must change nothing."""
    with closing(opened(path, vault=vault)) as store:
        first = state_of(store)
    with closing(opened(path, vault=vault)) as store:
        assert state_of(store) == first
    return first


def commit(store: Store, steps: list[Step]) -> int:
    """What the gateway does when the interface takes the steps."""
    store.apply(steps)
    return store.commit(steps)


def put(store: Store, *peers: Peer, wait: bool = True) -> int:
    steps = [Step(store.get(peer.public_key), peer) for peer in peers]
    number = commit(store, steps)
    if wait:
        store.wait(number)
    return number


def nothing() -> None:
    pass


def save(store: Store, undo: Callable[[], None] = nothing) -> bool:
    return store.snapshot(contextlib.nullcontext(), undo)


class FastDisk(Disk):
    """Without the fsyncs: no test here cuts the machine's power."""

    def fsync(self, handle: int) -> None:
        pass


class BreakableDisk(FastDisk):
    broken = False

    def fsync(self, handle: int) -> None:
        if self.broken:
            raise OSError(errno.EIO, "Input/output error")


# --- changes --------------------------------------------------------------------------------------


def test_what_was_committed_is_there_after_a_restart(tmp_path: Path) -> None:
    peer = a_peer(
        1,
        preshared_key=a_key("psk"),
        expires_at=1765300000,
        quota_bytes=2**63 - 1,
        request_id='r "\\ ü \u2028 😀',
        tunnel_traffic="ipv4,ipv6",
    )
    other = a_peer(2, status="suspended", status_reason="quota")
    with closing(opened(tmp_path)) as store:
        assert put(store, peer) == 1
        assert put(store, other) == 2
    with closing(opened(tmp_path)) as store:
        assert store.get(peer.public_key) == peer
        assert store.get(other.public_key) == other
        assert store.number == 2
        assert store.new_id() == 3


def test_change_and_delete_are_there_after_a_restart(tmp_path: Path) -> None:
    with closing(opened(tmp_path)) as store:
        put(store, a_peer(1))
        put(store, a_peer(2))
        put(store, a_peer(2, status="suspended"))
        store.wait(commit(store, [Step(a_peer(1), None)]))
    assert recovered(tmp_path) == {a_peer(2, status="suspended")}


def test_undo_takes_back_every_kind_of_step(tmp_path: Path) -> None:
    with closing(opened(tmp_path)) as store:
        put(store, a_peer(1), a_peer(2))
        before, counts = state_of(store), +store.counts
        steps = [
            Step(a_peer(1), None),
            Step(a_peer(2), a_peer(2, status="suspended")),
            Step(None, a_peer(3)),
        ]
        commit(store, steps)
        assert state_of(store) == {a_peer(2, status="suspended"), a_peer(3)}
        store.undo(steps)
        assert state_of(store) == before
        assert +store.counts == counts


def test_undone_delete_keeps_the_traffic_that_was_counted(tmp_path: Path) -> None:
    with closing(opened(tmp_path)) as store:
        put(store, a_peer(1))
        store.sample([seen(1, 10, 20, 30)])
        steps = [Step(a_peer(1), None)]
        commit(store, steps)
        store.undo(steps)
        assert store.traffic(1) == Traffic(10, 20, 30)


@pytest.mark.parametrize("field", ["public_key", "assigned_ip", "assigned_ipv6"])
@pytest.mark.parametrize("alone", [True, False])
def test_what_another_peer_has_is_refused_and_changes_nothing(
    tmp_path: Path, field: str, alone: bool
) -> None:
    with closing(opened(tmp_path)) as store:
        put(store, a_peer(1))
        before, counts, number = state_of(store), +store.counts, store.number
        double = a_peer(3, **{field: getattr(a_peer(1), field)})
        steps = [Step(None, double)] if alone else [Step(None, a_peer(5)), Step(None, double)]
        with pytest.raises(sqlite3.IntegrityError):
            commit(store, steps)
        assert state_of(store) == before
        assert +store.counts == counts
        assert store.number == number
        put(store, a_peer(7))
    assert recovered(tmp_path) == before | {a_peer(7)}


def test_delete_of_a_peer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with closing(opened(tmp_path)) as store, pytest.raises(sqlite3.IntegrityError):
        commit(store, [Step(a_peer(1), None)])


def test_released_addresses_keep_their_order_over_restarts_and_snapshots(tmp_path: Path) -> None:
    order = [3, 1, 4, 2]
    with closing(opened(tmp_path)) as store:
        put(store, *(a_peer(number) for number in range(1, 6)))
        for number in order:
            store.wait(commit(store, [Step(a_peer(number), None)]))
            if number == 1:
                save(store)
    with closing(opened(tmp_path)) as store:
        assert list(store.released("ipv4")) == [f"10.0.0.{n + 2}" for n in order]
        assert list(store.released("ipv6")) == ["fd00::5", "fd00::3"]
        put(store, a_peer(9, assigned_ip="10.0.0.5"))  # the oldest is taken, given back again
        store.wait(commit(store, [Step(a_peer(9, assigned_ip="10.0.0.5"), None)]))
        assert list(store.released("ipv4")) == ["10.0.0.3", "10.0.0.6", "10.0.0.4", "10.0.0.5"]


HISTORY = st.lists(
    st.tuples(
        st.sampled_from(["put", "suspend", "move", "delete", "undo", "pair", "restart"]),
        st.integers(1, 6),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(history=HISTORY)
def test_counts_and_rows_are_right_after_any_history(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[str, int]]
) -> None:
    path = tmp_path_factory.mktemp("history")
    model: dict[int, Peer] = {}
    disk = BreakableDisk()
    store = opened(path, disk)
    for what, number in history:
        old = model.get(number)
        if what == "restart":
            store.close()
            store = opened(path, disk)
        elif what == "pair":
            new = {n: a_peer(n, status="suspended") for n in (number, number + 1)}
            put(store, *new.values())
            model |= new
        elif what == "delete" and old:
            store.wait(commit(store, [Step(old, None)]))
            del model[number]
        elif what == "undo":
            steps = [Step(old, None if old else a_peer(number))]
            disk.broken = True
            with pytest.raises(DiskError):
                store.wait(commit(store, steps))
            disk.broken = False
            store.discard()
            store.undo(steps)
            assert save(store)
        else:
            status = "suspended" if what == "suspend" else "active"
            interface = "wg1" if what == "move" else "wg0"
            model[number] = a_peer(number, status=status, interface=interface)
            put(store, model[number])
        assert state_of(store) == set(model.values())
        assert +store.counts == Counter((p.interface, p.status) for p in model.values())
        assert set(store.released("ipv4")).isdisjoint(p.assigned_ip for p in model.values())
    store.close()
    assert recovered(path) == set(model.values())


def everything(store: Store) -> list[Any]:
    """All rows; of the released addresses their order, not its numbers."""
    queries = (
        "SELECT * FROM peers ORDER BY id",
        "SELECT address FROM released ORDER BY sequence",
        "SELECT * FROM traffic ORDER BY id",
    )
    return [store._db.execute(query).fetchall() for query in queries]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["put", "del", "key", "status", "move", "sample"]), st.integers(0, 5)
        ),
        max_size=40,
    )
)
def test_replay_gives_the_very_rows_that_the_live_changes_gave(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[str, int]]
) -> None:
    """Whatever recovery applies at once of what came one after the other."""
    path = tmp_path_factory.mktemp("replay")
    spare = 100
    with closing(opened(path)) as store:
        for what, number in history:
            spare += 1
            known = store.by_id(number + 1)
            fresh = {
                "key": {"public_key": a_key(spare)},
                "status": {"status": "suspended"},
                "move": {"assigned_ip": f"10.9.0.{spare % 250}"},
            }
            if what == "put" and known is None:
                commit(store, [Step(None, a_peer(number + 1))])
            elif known and what in fresh:
                commit(store, [Step(known, known._replace(**fresh[what]))])
            elif known and what == "del":
                commit(store, [Step(known, None)])
            elif known and what == "sample":
                peer = WirePeer(decode_key(known.public_key), b"", ())
                store.sample([PeerState(peer, spare, 10 * spare, spare)])
        store.flush()
        expected = everything(store), +store.counts
    with closing(opened(path)) as store:
        assert (everything(store), +store.counts) == expected


def test_one_reading_for_an_interface_takes_no_more_rows_than_it_says(tmp_path: Path) -> None:
    """Peers of another interface, too, or the lock would be held for a table without one's own."""
    with closing(opened(tmp_path)) as store:
        for number in (1, 3, 5, 7):
            put(store, a_peer(number, interface="wg1"))
        put(store, a_peer(8), a_peer(9, status="suspended"))
        assert store.held_rows("wg0", "ipv6", 1, 2) == [(3, None), (5, None)]
        assert store.held_rows("wg0", "ipv6", 5, 9) == [(7, None), (8, None), (9, "fd00::b")]
        assert [row[:2] for row in store.wire_rows("wg0", 1, 2)] == [(3, None), (5, None)]
        assert [row[:2] for row in store.wire_rows("wg0", 7, 9)] == [(8, a_key(8)), (9, None)]


def test_pages_give_every_peer_once_in_order(tmp_path: Path) -> None:
    with closing(opened(tmp_path)) as store:
        for number in range(1, 24):
            put(store, a_peer(number, status="suspended" if number % 3 == 0 else "active"))
        store.sample([seen(number, 1, 1, 1000 + number) for number in range(1, 24, 2)])

        def listed(chosen: Filter) -> list[int]:
            found: list[int] = []
            while rows := store.page(found[-1] if found else 0, 5, chosen):
                found += [peer.id for peer, _ in rows]
            return found

        assert listed(Filter()) == [*range(1, 24)]
        assert listed(Filter(status="suspended")) == [*range(3, 24, 3)]
        assert listed(Filter(interface="wg9")) == []
        assert listed(Filter(online=True, online_since=1010)) == [*range(11, 24, 2)]
        offline = [n for n in range(1, 24) if n % 2 == 0 or n < 11]
        assert listed(Filter(online=False, online_since=1010)) == offline


# --- traffic --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sweeps", [(), (1000,), (1010, 1005, 1020), (2000, 1000)])
def test_who_is_online_is_right_whenever_it_was_swept(
    tmp_path: Path, sweeps: tuple[int, ...]
) -> None:
    with closing(opened(tmp_path)) as store:
        put(store, *(a_peer(number) for number in range(1, 41)))
        store.sample([seen(number, 1, 1, 1000 + number) for number in range(1, 30)])
        for since in sweeps:
            store.sweep_online(since)
        store.sample([seen(number, 2, 2, 1030) for number in (3, 30)])
        since = max(1010, *sweeps[-1:], 0)

        def listed(online: bool) -> list[int]:
            pages, after = [], 0
            while page := store.page(after, 7, Filter(online=online, online_since=since)):
                pages += [peer.id for peer, _ in page]
                after = pages[-1]
            return pages

        last = {n: 1000 + n for n in range(1, 30)} | {3: 1030, 30: 1030}
        assert listed(True) == [n for n in range(1, 41) if last.get(n, 0) > since]
        assert listed(False) == [n for n in range(1, 41) if last.get(n, 0) <= since]


def seen(number: int, rx: int, tx: int, handshake: int = 0) -> PeerState:
    return PeerState(WirePeer(decode_key(a_key(number)), b"", ()), handshake, rx, tx)


def test_traffic_is_accumulated_over_counters_that_start_again(tmp_path: Path) -> None:
    samples = [(100, 10, 5), (150, 10, 7), (150, 10, 7), (30, 2, 6), (40, 5, 0)]
    with closing(opened(tmp_path)) as store:
        put(store, a_peer(1))
        for sample in samples:
            store.sample([seen(1, *sample)])
        # The last handshake is the last one that was seen: a clock may be set back.
        assert store.traffic(1) == Traffic(150 + 40, 10 + 5, 6)
        assert save(store)
    with closing(opened(tmp_path)) as store:
        assert store.traffic(1) == Traffic(190, 15, 6)
        store.sample([seen(1, 45, 5)])  # the interface outlived the restart
        assert store.traffic(1) == Traffic(195, 15, 6)


def test_peer_made_anew_in_the_interface_counts_from_zero(tmp_path: Path) -> None:
    """Also where the new counter is already above the old one at the next sample."""
    with closing(opened(tmp_path)) as store:
        put(store, a_peer(1), a_peer(2))
        store.sample([seen(1, 100, 0), seen(2, 100, 0)])
        store.restart_counters([decode_key(a_key(1))])
        store.sample([seen(1, 120, 0), seen(2, 120, 0)])
        assert store.traffic(1).rx_bytes == 220
        assert store.traffic(2).rx_bytes == 120


def test_rekeyed_peer_counts_from_zero(tmp_path: Path) -> None:
    with closing(opened(tmp_path)) as store:
        put(store, a_peer(1))
        store.sample([seen(1, 100, 100)])
        after = a_peer(1, public_key=a_key("new"))
        commit(store, [Step(a_peer(1), after)])
        commit(store, [Step(after, a_peer(1))])
        store.sample([seen(1, 120, 130)])
        assert store.traffic(1) == Traffic(220, 230, 0)


def test_suspended_peer_is_counted_on_until_the_interface_has_dropped_it(tmp_path: Path) -> None:
    with closing(opened(tmp_path)) as store:
        put(store, a_peer(1))
        store.sample([seen(1, 100, 100)])
        commit(store, [Step(a_peer(1), a_peer(1, status="suspended"))])
        parked = Parked(1, 100, 100, 0)
        store.sample_parked([(decode_key(a_key(1)), parked, seen(1, 120, 130, 9))])
        assert store.traffic(1) == Traffic(120, 130, 9)
        commit(store, [Step(a_peer(1, status="suspended"), a_peer(1))])
        store.sample([seen(1, 110, 110)])
        assert store.traffic(1) == Traffic(230, 240, 9)


def test_samples_survive_a_kill_by_the_journal(tmp_path: Path) -> None:
    """Absolute totals: a snapshot that holds a record already is not harmed by it."""
    store = opened(tmp_path)
    put(store, a_peer(1), a_peer(2))
    store.sample([seen(1, 100, 10, 5), seen(2, 7, 7)])
    store.restart_counters([decode_key(a_key(2))])
    assert save(store)
    store.sample([seen(1, 150, 10, 5), seen(2, 9, 9)])
    store.flush()
    for _ in range(2):
        with closing(opened(tmp_path)) as again:
            assert again.traffic(1) == Traffic(150, 10, 5)
            assert again.traffic(2) == Traffic(16, 16, 0)
            assert again.traffic_row(2) == TrafficRow(2, 16, 16, 9, 9, 0)
    store.close()


def test_traffic_of_unknown_and_of_new_peers_is_zero(tmp_path: Path) -> None:
    with closing(opened(tmp_path)) as store:
        store.sample([seen(1, 100, 100, 5)])
        put(store, a_peer(1))
        assert store.traffic(1) == Traffic()
        store.sample([seen(1, 100, 100, 5)])
        commit(store, [Step(a_peer(1), None)])
        put(store, a_peer(1))
        assert store.traffic(1) == Traffic()
        assert store.online(0) == 0


def test_quota_and_expiry_find_active_peers_only(tmp_path: Path) -> None:
    with closing(opened(tmp_path)) as store:
        for number, status in ((1, "active"), (2, "suspended"), (3, "active")):
            put(store, a_peer(number, status=status, quota_bytes=50, expires_at=100 + number))
        store.sample([seen(1, 25, 25), seen(2, 100, 0), seen(3, 26, 25)])
        assert [peer.id for peer in store.over_quota(0, 10)] == [3]
        assert [peer.id for peer in store.expired(102, 10)] == [1]
        assert [peer.id for peer in store.expired(103, 10)] == [1, 3]


# --- faults ---------------------------------------------------------------------------------------


class Crash(BaseException):
    """The machine stops here: no handler for errors may run on."""


class TrackingDisk(Disk):
    """Counts calls, and remembers what a power failure would leave.

    `synced`: inode -> bytes known to be on disk. `mirror`: the directory's names as of its last
    sync, as hard links. before() and after() surround each call, and may raise.
    """

    def __init__(self, path: Path) -> None:
        self.path = path / "files"
        self.mirror = path / "mirror"
        self.path.mkdir()
        self.mirror.mkdir()
        self.synced: dict[int, int] = {}
        self.calls = 0

    def before(self, call: str, handle: int, data: bytes) -> None:
        self.calls += 1

    def after(self) -> None:
        pass

    def write(self, handle: int, data: bytes) -> None:
        self.before("write", handle, data)
        super().write(handle, data)
        self.after()

    def fsync(self, handle: int) -> None:
        self.before("fsync", handle, b"")
        found = os.fstat(handle)
        if stat.S_ISDIR(found.st_mode):
            shutil.rmtree(self.mirror)
            shutil.copytree(self.path, self.mirror, copy_function=os.link)
        else:
            self.synced[found.st_ino] = found.st_size
        self.after()

    def rename(self, old: str, new: str) -> None:
        self.before("rename", -1, b"")
        super().rename(old, new)
        self.after()

    def unlink(self, path: str) -> None:
        self.before("unlink", -1, b"")
        super().unlink(path)
        self.after()

    def remains(self, path: Path) -> list[Path]:
        """What may be found after the crash, each as a directory of its own.

        The process was killed: all as it is. The power went: only what was synced, with the names
        as they are or as they were when the directory was synced.
        """
        choices = [(self.path, False), (self.path, True), (self.mirror, True)]
        made = []
        for number, (source, cut) in enumerate(choices):
            target = path / f"remains{number}"
            target.mkdir()
            for file in source.iterdir():
                content = file.read_bytes()
                end = self.synced.get(file.stat().st_ino, 0) if cut else len(content)
                (target / file.name).write_bytes(content[:end])
            made.append(target)
        return made


class FailingDisk(TrackingDisk):
    """The Nth call fails with an OSError, once or from then on; a failing write is cut short."""

    def __init__(self, path: Path, nth: int, forever: bool) -> None:
        super().__init__(path)
        self.nth, self.forever = nth, forever

    def before(self, call: str, handle: int, data: bytes) -> None:
        super().before(call, handle, data)
        if self.calls == self.nth or (self.forever and self.calls > self.nth):
            os.write(handle, data[: len(data) // 2]) if call == "write" else None
            raise OSError(errno.EIO, "Input/output error")


class CrashingDisk(TrackingDisk):
    """The machine stops at the Nth call: before it, in the middle of a write, or behind it."""

    def __init__(self, path: Path, nth: int, where: str) -> None:
        super().__init__(path)
        self.nth, self.where = nth, where

    def before(self, call: str, handle: int, data: bytes) -> None:
        super().before(call, handle, data)
        if self.calls >= self.nth and self.where != "after":
            if self.where == "middle" and call == "write":
                os.write(handle, data[: len(data) // 2])
            raise Crash

    def after(self) -> None:
        if self.calls >= self.nth:
            raise Crash


class FailingThenCrashingDisk(CrashingDisk):
    """A call fails once, and some calls later the machine stops."""

    def __init__(self, path: Path, nth: int, later: int) -> None:
        super().__init__(path, nth + later, "before")
        self.failing = nth

    def before(self, call: str, handle: int, data: bytes) -> None:
        super().before(call, handle, data)
        if self.calls == self.failing:
            raise OSError(errno.EIO, "Input/output error")


class Run:
    """Plays the history as a gateway would, and keeps what may come back.

    `states` are all states since the last acknowledged one, that one first.
    """

    def __init__(self, disk: TrackingDisk, vault: Vault | None) -> None:
        self.disk = disk
        self.vault = vault
        self.states: list[State] = [frozenset()]
        self.finished = False
        self.pending: list[tuple[int, list[Step]]] = []
        self.store = self.begin()

    def begin(self) -> Store:
        return Store(str(self.disk.path / "db"), "commit", self.disk, self.vault)

    def commit(self, *steps: Step) -> None:
        if self.store.failure:
            return
        self.pending.append((commit(self.store, steps), list(steps)))
        self.states.append(state_of(self.store))

    def wait(self) -> None:
        """Acknowledged, or undone and mended by a snapshot if the disk lets us."""
        try:
            if self.pending:
                self.store.wait(self.pending[-1][0])
            self.states = self.states[-1:]
        except DiskError:
            self.undo_pending()
            self.snapshot()
        self.pending = []

    def undo_pending(self) -> None:
        """Take back what did not reach the disk, newest first."""
        self.store.discard()
        while self.pending and self.pending[-1][0] > self.store.durable:
            self.store.undo(self.pending.pop()[1])
        self.states.append(state_of(self.store))

    def snapshot(self) -> None:
        for _ in range(2):
            with contextlib.suppress(OSError, DiskError):
                self.store.snapshot(threading.Lock(), self.undo_pending)
                self.states = self.states[-1:]
                return

    def restart(self) -> None:
        self.store.close()
        self.store = self.begin()
        self.store.recover()
        assert state_of(self.store) in self.states

    def play(self) -> None:
        self.store.recover()
        self.commit(Step(None, a_peer(1)))
        self.wait()
        self.commit(Step(None, a_peer(2)))
        self.commit(Step(None, a_peer(3)))
        self.wait()
        self.snapshot()
        self.commit(Step(a_peer(1), a_peer(1, status="suspended")))
        self.wait()
        self.restart()
        self.commit(Step(a_peer(2), None)) if self.store.get(a_key(2)) else None
        self.wait()
        self.snapshot()
        self.commit(Step(None, a_peer(4)), Step(None, a_peer(5)))
        self.wait()
        self.snapshot()
        self.commit(Step(None, a_peer(6)))
        self.wait()
        self.restart()
        self.commit(Step(None, a_peer(7)))
        self.wait()
        self.finished = True


def play_history(disk: TrackingDisk, vault: Vault | None = None) -> Run:
    """One history under a disk's faults; a start that was refused ends it."""
    run = Run(disk, vault)
    try:
        run.play()
    except (StartError, Crash):
        pass
    finally:
        with contextlib.suppress(Crash):
            run.store.close()
    return run


def check_faults(
    make: Callable[[Path, int], TrackingDisk],
    tmp_path: Path,
    few: int,
    vault: Vault | None = None,
) -> None:
    """Play the history with a fault at each of its calls, or at `few` of them.

    Up to its fault every run is the one without faults, so that one tells how many calls there are.
    """
    calls = number_of_calls(tmp_path, vault)
    assert calls > 40
    for nth in some(range(1, calls + 1), few):
        path = tmp_path / str(nth)
        path.mkdir()
        run = play_history(make(path, nth), vault)
        assert run.disk.calls >= nth
        for remains in run.disk.remains(path):
            found = recovered(remains, vault)
            assert found in run.states, f"call {nth}, {remains.name}: {sorted(found)}"
        shutil.rmtree(path)


def number_of_calls(tmp_path: Path, vault: Vault | None = None) -> int:
    """The disk's calls in a history without faults."""
    path = tmp_path / "without faults"
    path.mkdir()
    run = play_history(TrackingDisk(path), vault)
    assert run.finished
    return run.disk.calls


def test_history_without_faults_is_acknowledged_to_its_end(tmp_path: Path) -> None:
    run = play_history(TrackingDisk(tmp_path))
    ids = {1, 3, 4, 5, 6, 7}
    assert run.finished
    assert len(run.states) == 1
    assert {peer.id for peer in run.states[0]} == ids
    for remains in run.disk.remains(tmp_path):
        assert {peer.id for peer in recovered(remains)} == ids


@pytest.mark.parametrize("forever", [False, True], ids=["once", "from-then-on"])
def test_failing_call_loses_nothing_acknowledged(tmp_path: Path, forever: bool) -> None:
    check_faults(lambda path, nth: FailingDisk(path, nth, forever), tmp_path, 20)


@pytest.mark.parametrize("where", ["before", "middle", "after"])
def test_crash_at_every_call_loses_nothing_acknowledged(tmp_path: Path, where: str) -> None:
    check_faults(lambda path, nth: CrashingDisk(path, nth, where), tmp_path, 20)


@pytest.mark.parametrize("where", ["before", "middle"])
def test_crash_with_sealed_files_loses_nothing_acknowledged(tmp_path: Path, where: str) -> None:
    vault = Vault("a secret for the snapshots")
    check_faults(lambda path, nth: CrashingDisk(path, nth, where), tmp_path, 10, vault)


@pytest.mark.parametrize("later", range(1, 14))
def test_crash_while_a_fault_is_mended_loses_nothing_acknowledged(
    tmp_path: Path, later: int
) -> None:
    check_faults(lambda path, nth: FailingThenCrashingDisk(path, nth, later), tmp_path, 7)


@pytest.mark.parametrize(("call", "ahead"), [("write", 1), ("fsync", 2)])
def test_refused_change_does_not_come_back(tmp_path: Path, call: str, ahead: int) -> None:
    """The disk refused it and the caller was told so: a restart must not bring it back."""
    disk = FailingDisk(tmp_path, 10**9, True)
    with closing(opened(disk.path, disk)) as store:
        put(store, a_peer(1))
        disk.nth = disk.calls + ahead
        steps = [Step(None, a_peer(2))]
        with pytest.raises(DiskError):
            store.wait(commit(store, steps))
        store.discard()
        store.undo(steps)
    assert recovered(disk.path) == {a_peer(1)}, call


def test_snapshot_that_mends_a_fault_undoes_what_was_refused_first(tmp_path: Path) -> None:
    disk = BreakableDisk()
    with closing(opened(tmp_path, disk)) as store:
        put(store, a_peer(1))
        steps = [Step(None, a_peer(2))]
        number = commit(store, steps)
        disk.broken = True
        with pytest.raises(DiskError):
            store.flush()
        disk.broken = False

        def undo() -> None:
            store.discard()
            store.undo(steps)

        assert save(store, undo)
        with pytest.raises(DiskError):  # a waiter that comes only now
            store.wait(number)
        put(store, a_peer(3))
    assert recovered(tmp_path) == {a_peer(1), a_peer(3)}


# --- damaged and missing files --------------------------------------------------------------------


def furnished(path: Path) -> State:
    """Files of two generations, the journal with records behind the snapshot."""
    path.mkdir(exist_ok=True)
    with closing(opened(path)) as store:
        put(store, a_peer(1))
        save(store)
        put(store, a_peer(2))
        save(store)
        put(store, a_peer(3))
        return state_of(store)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def refused(path: Path) -> str:
    """The start is refused, with exit code 3, and nothing on disk was changed."""
    before = contents(path)
    with pytest.raises(DamagedError) as caught:
        opened(path)
    assert caught.value.code == 3
    assert contents(path) == before
    return str(caught.value)


def test_snapshot_and_journal_of_two_generations_come_back(tmp_path: Path) -> None:
    expected = furnished(tmp_path)
    assert set(contents(tmp_path)) == {"db", "db.previous", "db.journal", "db.journal.previous"}
    assert recovered(tmp_path) == expected


def test_generation_before_can_be_restored_with_both_journals(tmp_path: Path) -> None:
    expected = furnished(tmp_path)
    (tmp_path / "db.previous").rename(tmp_path / "db")
    assert recovered(tmp_path) == expected


def test_missing_journal_behind_a_rotation_is_begun_anew(tmp_path: Path) -> None:
    furnished(tmp_path)
    (tmp_path / "db.journal").unlink()
    assert recovered(tmp_path) == {a_peer(1), a_peer(2)}


def test_missing_snapshot_beside_other_files_is_refused(tmp_path: Path) -> None:
    for kept in ("db.journal", "db.journal.previous", "db.previous"):
        path = tmp_path / f"only-{kept}"
        furnished(path)
        for name in contents(path):
            if name != kept:
                (path / name).unlink()
        message = refused(path)
        assert str(path / "db") in message
        assert kept in message


def test_journal_that_does_not_follow_the_snapshot_is_refused(tmp_path: Path) -> None:
    furnished(tmp_path)
    (tmp_path / "db.journal.previous").unlink()
    (tmp_path / "db.previous").rename(tmp_path / "db")
    assert "db.journal" in refused(tmp_path)


def test_empty_or_foreign_snapshot_is_refused(tmp_path: Path) -> None:
    expected = furnished(tmp_path)
    good = (tmp_path / "db").read_bytes()
    for content in (b"", b"x", bytes(4096), good[:1000], good[:-4096], b"SQLite format 3\0"):
        (tmp_path / "db").write_bytes(content)
        assert str(tmp_path / "db") in refused(tmp_path)
    (tmp_path / "db").write_bytes(good)
    assert recovered(tmp_path) == expected


def test_snapshot_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    furnished(tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "db")) as db:
        db.execute("PRAGMA application_id = 0")  # by other hands: without a checksum
        db.execute("PRAGMA user_version = 99")
    assert "99" in refused(tmp_path)


def damage(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:3] + b"\xff" + content[4:])


def test_damaged_journal_is_refused(tmp_path: Path) -> None:
    furnished(tmp_path)
    damage(tmp_path / "db.journal")
    assert str(tmp_path / "db.journal") in refused(tmp_path)


def test_damaged_journal_before_is_refused_only_when_it_is_needed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = furnished(tmp_path)
    damage(tmp_path / "db.journal.previous")
    assert recovered(tmp_path) == expected
    assert "db.journal.previous: at byte 0" in caplog.text
    with closing(opened(tmp_path)) as store:  # and the next snapshot takes its place
        put(store, a_peer(4))
        save(store)
    os.replace(tmp_path / "db.previous", tmp_path / "db")
    assert recovered(tmp_path) == {*expected, a_peer(4)}
    damage(tmp_path / "db.journal.previous")
    assert "db.journal.previous" in refused(tmp_path)


def test_flipped_bits_of_a_snapshot_are_refused(tmp_path: Path) -> None:
    """SQLite's own check does not see a changed address or key: the checksum does."""
    furnished(tmp_path)
    good = (tmp_path / "db").read_bytes()
    places = random.Random(1)  # the same ones each time, so that a failure can be looked at
    used = [place for place in range(len(good)) if good[place]]
    for place in [*range(100), *places.sample(used, 200), *places.sample(range(len(good)), 50)]:
        garbled = bytearray(good)
        garbled[place] ^= 1 << places.randrange(8)
        (tmp_path / "db").write_bytes(garbled)
        assert str(tmp_path / "db") in refused(tmp_path)


def test_snapshot_changed_by_other_hands_on_purpose_is_read(tmp_path: Path) -> None:
    furnished(tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "db")) as db:
        db.execute("UPDATE peers SET dns = 'd2' WHERE id = 1")
        db.commit()
    refused(tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "db")) as db:
        db.execute("PRAGMA application_id = 0")
    assert recovered(tmp_path) == {a_peer(1, dns="d2"), a_peer(2), a_peer(3)}


def test_desired_state_that_cannot_be_undone_is_refused(tmp_path: Path) -> None:
    """The gateway keeps what its undoing needs; a journal by other hands may not."""
    with closing(opened(tmp_path)) as store:
        put(store, a_peer(1))
        steps = [Step(a_peer(1), None)]
        store.apply(steps)
        store.wait(store.commit(steps, part=True))
        put(store, a_peer(2, assigned_ip=a_peer(1).assigned_ip))
    assert "desired state cannot be undone" in refused(tmp_path)
    with closing(Store(str(tmp_path / "db"), "commit", Disk())) as store:
        assert "kept: 1 changes of an unfinished desired state" in list(store.salvage())


def test_record_that_does_not_apply_is_left_out_of_a_salvage_as_a_whole(tmp_path: Path) -> None:
    with closing(opened(tmp_path)) as store:
        put(store, a_peer(1))
        expected = everything(store)
    content = b'{"put":[],"del":[1,%d]}' % 10**20  # no integer of SQLite's
    with open(tmp_path / "db.journal", "ab") as journal:
        journal.write(journal_line(2, journal.tell(), content))
    assert "record 2 does not apply" in refused(tmp_path)
    with closing(Store(str(tmp_path / "db"), "commit", Disk())) as store:
        assert any("1 records, 0 missing, 1 not applicable" in line for line in store.salvage())
        assert everything(store) == expected


WARM = """
import resource, sys, threading
import wggw

def faults():
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt

def work():
    store = wggw.Store(sys.argv[1], "none", wggw.Disk())
    store.recover()
    bytes(wggw.LARGEST_BLOCK)
    for megabytes in (4, 6, 9):
        store._db.execute("INSERT OR REPLACE INTO meta VALUES ('x', ?)", ("x" * (megabytes << 20),))
        if sys.argv[2] == "warm":
            wggw.warm_up(store._image_size())
        before = faults()
        image = store.image()
        print((faults() - before) / (len(image) / 4096))
        del image

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_an_image_is_copied_into_memory_that_is_ready(tmp_path: Path) -> None:
    """Page faults of the copy, for each of its pages: of a database that grows."""

    def measured(how: str) -> list[float]:
        command = [sys.executable, "-c", WARM, str(tmp_path / how), how]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
        return [float(line) for line in done.stdout.split()]

    assert max(measured("warm")) < 0.1
    assert max(measured("cold")) > 0.3


def by_other_hands(path: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(path / "db")) as db:
        for statement in (*statements, "PRAGMA application_id = 0"):
            db.execute(statement)


def test_snapshot_without_the_tables_of_its_version_is_refused(tmp_path: Path) -> None:
    furnished(tmp_path)
    by_other_hands(tmp_path, "DROP TABLE released")
    assert "no such table: released" in refused(tmp_path)


def test_snapshot_is_an_ordinary_database(tmp_path: Path) -> None:
    furnished(tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "db")) as db:
        assert db.execute("SELECT public_key FROM peers ORDER BY id").fetchall() == [
            (a_key(1),),
            (a_key(2),),
        ]
    assert (tmp_path / "db").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "db.journal").stat().st_mode & 0o777 == 0o600


def test_snapshot_is_written_only_when_something_changed(tmp_path: Path) -> None:
    with closing(opened(tmp_path)) as store:
        save(store)
        before = contents(tmp_path)
        assert save(store) is False
        assert contents(tmp_path) == before
        put(store, a_peer(1))
        assert save(store) is True


@pytest.mark.parametrize("nth", [1, 2, 3], ids=["write", "fsync", "rename"])
def test_file_that_could_not_be_replaced_takes_no_room(tmp_path: Path, nth: int) -> None:
    disk = FailingDisk(tmp_path, nth, False)
    (disk.path / "db").write_bytes(b"before")
    with pytest.raises(OSError, match="Input/output"):
        disk.replace(str(disk.path / "db"), [b"behind"])
    assert contents(disk.path) == {"db": b"before"}


def test_file_whose_next_part_could_not_be_made_takes_no_room(tmp_path: Path) -> None:
    def parts() -> Iterator[bytes]:
        yield b"behind"
        raise MemoryError

    (tmp_path / "db").write_bytes(b"before")
    with pytest.raises(MemoryError):
        Disk().replace(str(tmp_path / "db"), parts())
    assert contents(tmp_path) == {"db": b"before"}


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_record_with_an_id_that_is_no_number_is_refused(tmp_path: Path, number: str) -> None:
    """With a checksum that fits, by other hands: SQLite would take NaN for no id and choose one."""
    with closing(opened(tmp_path)) as store:
        put(store, a_peer(1))
    path = tmp_path / "db.journal"
    record = parse_journal(path.read_bytes(), "name").records[0]
    content = record.content.replace(b'"id":1,', b'"id":%b,' % number.encode())
    assert content != record.content
    path.write_bytes(encode_journal(0, [record._replace(content=content)], None))
    assert "record 1 does not apply" in refused(tmp_path)


@pytest.mark.parametrize("durability", ["commit", "interval", "none"])
def test_every_durability_keeps_what_a_snapshot_holds(tmp_path: Path, durability: str) -> None:
    with closing(opened(tmp_path, durability=durability)) as store:
        put(store, a_peer(1))
        save(store)
        put(store, a_peer(2))
        store.flush()
    expected = {a_peer(1)} if durability == "none" else {a_peer(1), a_peer(2)}
    assert recovered(tmp_path) == expected


def test_durability_may_change_between_starts(tmp_path: Path) -> None:
    expected: set[Peer] = set()
    for number, durability in enumerate(["commit", "none", "interval", "none", "commit"], 1):
        with closing(opened(tmp_path, durability=durability)) as store:
            assert state_of(store) == expected
            put(store, a_peer(number))
            store.flush()
            save(store)
        expected.add(a_peer(number))
    assert recovered(tmp_path) == expected


def test_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="DB_PATH"):
        opened(tmp_path / "absent")


# --- imports that the disk refuses ----------------------------------------------------------------


class NoDirectoryDisk(FastDisk):
    """Refuses to fsync directories: a file is in its place, and the call fails all the same."""

    broken = False

    def sync_directory(self, path: str) -> None:
        if self.broken:
            raise OSError(errno.EIO, "Input/output error")


def test_a_crash_after_a_refused_import_does_not_start_from_it(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with closing(opened(tmp_path / "other")) as other:
        put(other, a_peer(9))
        image = other.seal(other.image())
    disk = NoDirectoryDisk()
    with closing(opened(tmp_path, disk)) as store:
        put(store, a_peer(1))
        disk.broken = True
        with pytest.raises(OSError, match="Input/output"):
            store.adopt(store.read_image(image))
        assert state_of(store) == {a_peer(1)}
        assert recovered(tmp_path) == {a_peer(1)}  # the files as a crash would leave them
