"""The remote copy: at every moment it is a state that was acknowledged, whatever the store does."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from fakes import FakeDisk, build, do
from harness import LONG, a_key
from objects import TOKEN, TlsStore, tls_store
from test_store import a_peer

import wggw
from wggw import (
    Backlog,
    Config,
    ConfigError,
    Copier,
    CopyContested,
    CopyDamaged,
    CopyError,
    Epochs,
    Files,
    ObjectStore,
    Peer,
    Record,
    Store,
    TrafficRow,
    Vault,
    Written,
    decode_segment,
    encode_segment,
    load_config,
    open_object_store,
    read_state,
    sign_v4,
)

VAULT = Vault("a key for what lies on disk")


class MemoryObjects:
    """An object store that fails at call number `fail_at`, in a `way`; `checks`: as S3 does."""

    def __init__(self, checks: bool = True) -> None:
        self.objects: dict[str, bytes] = {}
        self.checks = checks
        self.calls = self.requests = self.bytes_sent = self.bytes_received = 0
        self.fail_at = -1
        self.until = -1  # and at all calls before this one
        self.way = "refuse"
        self.asked: list[tuple[str, str]] = []

    def _failing(self, method: str, name: str) -> bool:
        self.calls += 1
        self.requests += 1
        self.asked.append((method, name))
        return self.fail_at <= self.calls <= max(self.fail_at, self.until)

    def get(self, name: str, limit: int) -> bytes | None:
        if self._failing("GET", name):
            raise CopyError("a fault that was asked for")
        return self.objects.get(name)

    def get_all(self, names: list[str], limit: int) -> list[bytes | None]:
        return [self.get(name, limit) for name in names]

    def put(self, name: str, content: bytes, create: bool = False) -> bool:
        failing = self._failing("PUT", name)
        self.bytes_sent += len(content)
        if create and name in self.objects and not (failing and self.way == "refuse"):
            return False
        if not failing or self.way == "lose the answer":
            self.objects[name] = content
        elif self.way == "keep half":
            self.objects[name] = content[: len(content) // 2]
        if failing:
            raise CopyError("a fault that was asked for")
        return True

    def delete(self, name: str) -> None:
        if self._failing("DELETE", name):
            raise CopyError("a fault that was asked for")
        self.objects.pop(name, None)

    def entries(self) -> list[str]:
        return sorted(name for name in self.objects if name[:5] != "claim" and "mani" not in name)


State = frozenset[Peer]


def state_of(store: Store) -> State:
    return frozenset(store.peers_after(0, 10_000))


BASE = {"GATEWAY_API_KEY": "0123456789abcdef"}
CONFIG = dataclasses.replace(
    load_config({**BASE, "SNAPSHOT_URL": "https://store.example"}),
    snapshot_copy_interval=0.0,
    snapshot_interval=0.0,
)


class Node:
    """A store with its files, started as serve does it, and its copier; no interface.

    Without `objects` it has no copy; without `boot` the copy did not answer at the start.
    """

    def __init__(
        self,
        path: Path,
        objects: Any = None,
        vault: Vault | None = None,
        *,
        durability: str = "commit",
        boot: bool = True,
        private_key: str = "",
        now: float = 0.0,
        config: Config = CONFIG,
        check: Callable[[Store], None] = lambda state: None,
    ) -> None:
        path.mkdir(exist_ok=True)
        self.now = now  # 0.0: as it is
        self.files = Files(str(path / "db"), durability, FakeDisk(), vault)
        self.store = Store()
        self.store.take(self.files.load())
        epochs = Epochs(objects, vault, path.name, self.clock)
        self.copier = Copier(epochs, self.store, self.files, self.save, config)
        self.copier.on_taken = lambda text: None
        if objects is not None and boot:
            self.copier.boot(check)
        elif objects is not None:
            self.copier.go_without()
        if private_key:
            self.store.private_keys["wg0"] = private_key
        self.files.begin(self.store)
        self._on_written = self.copier.begin()

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        self.files.journal.close()

    def clock(self) -> float:
        return self.now or time.time()

    def do(self, record: Record) -> None:
        """What the lander does, without an interface."""
        number = self.store.number + 1
        written = record.written(number)
        if self.files.journaled:
            self.files.journal.write(number, [written.content], sync=True)
        self._on_written([written])
        self.store.apply(record)
        self.store.number = number

    def put(self, *peers: Peer) -> None:
        self.do(Record(put=peers))

    def save(self) -> None:
        self.files.write_snapshot(
            self.store.number, self.files.image(self.store, self.store.number)
        )
        if self.files.journaled:
            self.files.journal.cut(self.store.number)

    def tick(self) -> None:
        self.copier.tick()

    @property
    def state(self) -> State:
        return state_of(self.store)


def superseded(path: Path) -> State:
    files = Files(str(path / "db.superseded"), "commit", FakeDisk())
    return state_of(files.load())


def copied(objects: Any, path: Path, vault: Vault | None = None) -> State:
    """What a node with an empty disk would boot from; nothing is written."""
    epochs = Epochs(objects, vault, "nobody", time.time)
    _, newest = epochs.find()
    entries = epochs.read(newest.prefix, newest.lineage)[1] if newest else []
    return state_of(read_state(entries)) if entries else frozenset()


# --- what the copy holds --------------------------------------------------------------------------


def history(node: Node, tick: Callable[[], None], seen: dict[int, State]) -> None:
    """Changes, snapshots and ticks in turn; `seen` gets the state of every record number."""
    live: list[int] = []
    chance = random.Random(7)
    for step in range(16):
        if live and chance.random() < 0.3:
            node.do(Record(delete=[live.pop(chance.randrange(len(live)))]))
        else:
            live.append(step + 1)
            node.put(a_peer(step + 1))
        seen[node.store.number] = node.state
        if step % 8 == 5:
            node.save()
        if step % 3 == 2:
            tick()


@pytest.mark.parametrize("vault", [None, VAULT])
def test_a_copy_follows_the_store(tmp_path: Path, checks: bool, vault: Vault | None) -> None:
    objects = MemoryObjects(checks)
    with Node(tmp_path, objects, vault) as node:
        history(node, node.tick, {})
        node.tick()
        assert node.copier.state().lag_records == 0 and node.copier.state().failure is None
        assert copied(objects, tmp_path, vault) == node.state


@pytest.mark.parametrize(
    ("way", "checks"),
    [
        *itertools.product(("refuse", "lose the answer"), (True, False)),
        ("keep half", False),  # a store that checks keeps nothing torn
    ],
)
@pytest.mark.parametrize("length", [1, 5])
def test_a_fault_at_any_call_leaves_a_state_that_existed(
    tmp_path: Path, way: str, length: int, checks: bool
) -> None:
    objects = MemoryObjects(checks)
    with Node(tmp_path / "0", objects):
        begins = objects.calls + 1  # faults at the boot are the model's business
    for number in itertools.count(begins, 1 if LONG else 12):
        objects = MemoryObjects(checks)
        objects.way, objects.fail_at, objects.until = way, number, number + length - 1
        directory = tmp_path / str(number)
        with Node(directory, objects) as node:
            seen = {0: node.state}
            checked = Watch(node, objects, seen, directory)
            history(node, checked.tick, seen)
            for _ in range(length + 2):
                checked.tick()
            calls, objects.fail_at, objects.until = objects.calls, -1, -1
            assert node.copier.state().failure is None
            assert copied(objects, directory) == node.state
        if calls < number:
            break
    assert number > begins + 5


class Watch:
    """A copier whose copy is read after each tick."""

    def __init__(
        self, node: Node, objects: MemoryObjects, seen: dict[int, State], path: Path
    ) -> None:
        self.node, self.objects, self.seen, self.path = node, objects, seen, path
        self.told = 0

    def tick(self) -> None:
        self.node.tick()
        failing, self.objects.fail_at = self.objects.fail_at, -1
        until, self.objects.until = self.objects.until, -1
        calls = self.objects.calls
        found = copied(self.objects, self.path)
        self.told = max(self.told, self.node.copier.state().number)
        later = [state for number, state in self.seen.items() if number >= self.told]
        assert found in later, "not a state that was there, or older than what was copied"
        self.objects.fail_at, self.objects.until, self.objects.calls = failing, until, calls


def test_a_gateway_that_never_rests_is_not_taken_for_one_far_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change during each upload: the copy lacks one record all the time, and never for long."""
    objects, now = MemoryObjects(), 1000.0
    monkeypatch.setattr(wggw.time, "monotonic", lambda: now)
    with Node(tmp_path, objects) as node:
        numbers = itertools.count(1)
        keep = objects.put

        def put_while_a_peer_comes(name: str, content: bytes, create: bool = False) -> bool:
            node.put(a_peer(next(numbers)))
            return keep(name, content, create)

        objects.put = put_while_a_peer_comes  # type: ignore[method-assign]
        node.put(a_peer(next(numbers)))
        for _ in range(100):
            now += 2
            node.tick()
            state = node.copier.state()
            assert state.lag_records > 0 and state.lag_seconds <= 4, state
        objects.fail_at, objects.until = objects.calls, objects.calls + 100
        for _ in range(3):
            now += 100
            node.tick()
        assert node.copier.state().lag_seconds >= 300


@pytest.mark.parametrize("step", [-3600.0, 3600.0])
def test_a_clock_that_is_set_changes_nothing_in_how_far_the_copy_is_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: float
) -> None:
    now = 1000.0
    monkeypatch.setattr(wggw.time, "monotonic", lambda: now)
    with Node(tmp_path, MemoryObjects(), now=1e9) as node:
        node.tick()
        node.put(a_peer(1))
        now += 30
        node.now += 30 + step
        assert node.copier.state().lag_seconds == 30


def test_few_objects_lie_in_the_store_and_a_boot_reads_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wggw, "COPY_SEGMENTS", 10)
    objects = MemoryObjects()
    with Node(tmp_path, objects) as node:
        for number in range(1, 121):
            node.put(a_peer(number))
            node.tick()
            assert len(objects.entries()) <= 2 * 11 + 1
        assert copied(objects, tmp_path) == node.state
        _, newest = node.copier.epochs.find()
        assert newest
        assert len(node.copier.epochs.read(newest.prefix, newest.lineage)[1]) <= 11


def test_an_upload_is_one_put_and_nothing_is_asked(tmp_path: Path) -> None:
    objects = MemoryObjects()
    with Node(tmp_path, objects) as node:
        node.tick()
        objects.asked.clear()
        for number in range(1, 11):
            node.put(a_peer(number))
            node.tick()
            node.tick()
        assert [method for method, _ in objects.asked] == ["PUT"] * 10


def test_traffic_totals_alone_are_no_reason_to_upload(tmp_path: Path) -> None:
    objects = MemoryObjects()
    with Node(tmp_path, objects) as node:
        node.put(a_peer(1))
        node.tick()
        objects.asked.clear()
        for count in range(1, 6):
            row = TrafficRow(1, count, count, 0, 0, int(time.time()))
            node.do(Record(traffic=[row], at=count % 2 * 1765200000))
            node.tick()
        assert objects.asked == []
        assert node.copier.state().lag_records == 0
        node.save()
        node.tick()
        assert [method for method, _ in objects.asked] == ["PUT"]
        _, newest = node.copier.epochs.find()
        assert newest
        copy = read_state(node.copier.epochs.read(newest.prefix, newest.lineage)[1])
        assert copy.traffic(1) == node.store.traffic(1)
        assert copy.number == node.store.number


def test_totals_wait_for_their_interval_however_often_local_snapshots_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A journal that 60,000 active peers make long is folded into a snapshot every minute."""
    now, objects = 1000.0, MemoryObjects()
    monkeypatch.setattr(wggw.time, "monotonic", lambda: now)
    config = dataclasses.replace(CONFIG, snapshot_interval=300.0)
    with Node(tmp_path, objects, config=config) as node:
        node.put(a_peer(1))
        node.tick()
        objects.asked.clear()
        for minute in range(1, 16):
            now += 60
            row = TrafficRow(1, minute, minute, minute, minute, int(time.time()))
            node.do(Record(traffic=[row]))
            node.save()
            node.tick()
        assert [method for method, _ in objects.asked] == ["PUT"] * 3
        _, newest = node.copier.epochs.find()
        assert newest
        copy = read_state(node.copier.epochs.read(newest.prefix, newest.lineage)[1])
        assert copy.traffic(1) == node.store.traffic(1)


def puts_an_hour(u: float, t: float) -> float:
    """docs/RAM_BASED.md: u uploads of changes, t of totals."""
    return u + t + 2 * (u + t) / 33


def bytes_an_hour(u: float, t: float, c: float, p: float, a: float) -> float:
    """docs/RAM_BASED.md: and c changes, p peers, a of them active."""
    return 500 * (u + t) + 60 * c + 12 * a * t + 140 * p * (u + t) / 33


@pytest.mark.parametrize("changes", [True, False])
def test_an_hour_costs_what_the_docs_say(tmp_path: Path, changes: bool) -> None:
    """Counted for 1,000 active peers: every 30th upload has totals, or there are no others."""
    objects, peers, chance = MemoryObjects(), 1000, random.Random(1)
    uploads = 360 if changes else 33
    with Node(tmp_path, objects) as node:
        rows = [TrafficRow(i, 0, 0, 0, 0, 0) for i in range(1, peers + 1)]
        for start in range(1, peers, 500):
            node.put(*(a_peer(number) for number in range(start, start + 500)))
        node.tick()
        objects.asked.clear()
        objects.bytes_sent = totals = 0
        for upload in range(uploads):
            if changes:
                node.put(a_peer(peers + 1 + upload))
            if not changes or upload % 30 == 29:
                totals += 1
                rows = [_moved(row, chance) for row in rows]
                node.do(Record(traffic=rows))
                node.save()
            node.tick()
    puts = sum(method == "PUT" for method, _ in objects.asked)
    u, t = (uploads - totals, totals) if changes else (0, totals)  # totals go with changes
    c, p = (uploads, peers + uploads / 2) if changes else (0, peers)
    print(puts / puts_an_hour(u, t), objects.bytes_sent / bytes_an_hour(u, t, c, p, peers))
    assert puts == pytest.approx(puts_an_hour(u, t), rel=0.05)
    assert objects.bytes_sent == pytest.approx(bytes_an_hour(u, t, c, p, peers), rel=0.1)


def _moved(row: TrafficRow, chance: random.Random) -> TrafficRow:
    rx, tx = chance.randrange(10**7), chance.randrange(10**7)
    return TrafficRow(
        row.id,
        row.rx_bytes + rx,
        row.tx_bytes + tx,
        row.rx_seen + rx,
        row.tx_seen + tx,
        int(time.time()) - chance.randrange(120),
    )


def test_a_boot_costs_what_the_docs_say(tmp_path: Path, checks: bool) -> None:
    text = (Path(__file__).parent.parent / "docs" / "RAM_BASED.md").read_text()
    [requests] = re.findall(r"A boot needs ([0-9]+) requests when a dozen", text)
    objects = MemoryObjects(checks)
    with Node(tmp_path_of(tmp_path, "a"), objects) as node:
        for number in range(1, 14):
            node.put(a_peer(number))
            node.tick()
    snapshot, *behind = objects.entries()
    assert len(behind) == 12
    for directory, reads in (("a", 0), ("b", 1)):
        objects.asked.clear()
        with Node(tmp_path_of(tmp_path, directory), objects) as node:
            assert len(node.state) == 13
        asked = [name for method, name in objects.asked if method == "GET"]
        assert len(objects.asked) <= int(requests)
        assert asked.count(snapshot) == reads
        assert {asked.count(name) for name in behind} == {2}
        objects.objects = {n: o for n, o in objects.objects.items() if n != "claim-00000002"}


UNITS = {"million": 1e6, "GB": 1e9, "TB": 1e12}


def test_the_docs_examples_are_what_the_formula_says() -> None:
    """For 1, 100 and 1,000 nodes of 60,000 peers; at S3 1,000 PUTs cost $0.005."""
    text = (Path(__file__).parent.parent / "docs" / "RAM_BASED.md").read_text()
    assert "500 × (u + t) + 60 × c + 12 × a × t + 140 × p × (u + t) / 33" in text
    assert "u + t + 2 × (u + t) / 33" in text
    for nodes in (1, 100, 1000):
        [row] = [line for line in text.splitlines() if line.startswith(f"| {nodes:,} |")]
        expected: list[float] = []
        for u in (360, 0):
            puts = puts_an_hour(u, 12) * 730 * nodes
            expected += [puts, puts * 0.005 / 1000]
        for u, c in ((360, 360), (0, 0)):
            expected.append(bytes_an_hour(u, 12, c, 60_000, 60_000) * 730 * nodes)
        shown = [
            float(number.replace(",", "")) * UNITS.get(unit, 1)
            for number, unit in re.findall(r"([0-9][0-9.,]*)(?:,| (\w+))?", row.split("|", 2)[2])
        ]
        assert shown == pytest.approx(expected, rel=0.03), row
    [(puts, megabytes)] = re.findall(r"puts ([0-9]+) objects and ([0-9]+) MB an hour", text)
    assert float(puts) == pytest.approx(puts_an_hour(360, 12), rel=0.01)
    expected_bytes = bytes_an_hour(360, 12, 360, 60_000, 60_000)
    assert float(megabytes) * 1e6 == pytest.approx(expected_bytes, rel=0.03)


@pytest.mark.parametrize(
    "more",
    [
        {"put": [a_peer(1)]},
        {"delete": [1]},
        {"restart": [(1, 0, 0)]},
        {"settings": {"obfuscation": "x"}},
        {"released": []},
        {"void": [3]},
    ],
)
def test_totals_with_anything_else_are_a_change(more: dict[str, Any]) -> None:
    for at in (0, 1765200000):
        backlog = Backlog(10**6)
        totals = Record(traffic=[TrafficRow(1, 2, 3, 4, 5, 6)], at=at)
        backlog.add([totals.written(1)], 1.0)
        assert backlog.lacking_since(0) is None
        backlog.add([totals._replace(**more).written(2)], 2.0)
        assert backlog.lacking_since(0) == 2.0
        assert [record.number for record in backlog.above(0)] == [1, 2]


def test_totals_cost_at_most_12_bytes_a_peer() -> None:
    chance = random.Random(5)
    rows = []
    number = 0
    for _ in range(60_000):
        number += chance.choice([1, 1, 1, 2])
        seen = [int(chance.lognormvariate(18, 2)) for _ in "rt"]
        more = [0, 0] if chance.random() < 0.95 else [chance.randrange(10**10) for _ in "rt"]
        totals = [a + b for a, b in zip(seen, more, strict=True)]
        rows.append(TrafficRow(number, *totals, *seen, 1765200000 + chance.randrange(180)))
    payload = encode_segment(7, [], rows)
    journal, found = decode_segment(payload)
    assert found == rows
    assert wggw.parse_journal(journal, "a segment").last == 7
    assert len(wggw.pack({}, payload, None)) <= 12 * len(rows)


def test_what_is_too_much_for_the_backlog_is_copied_by_a_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wggw, "COPY_BACKLOG", 2000)
    objects = MemoryObjects()
    with Node(tmp_path, objects) as node:
        node.tick()
        for number in range(1, 41):
            node.put(a_peer(number))
        node.tick()
        assert node.copier.state().lag_records == 0
        node.put(a_peer(50))
        node.tick()
        assert copied(objects, tmp_path) == node.state


def test_a_snapshot_that_the_local_disk_refuses_is_not_copied_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wggw, "COPY_BACKLOG", 2000)
    objects = MemoryObjects()
    with Node(tmp_path, objects) as node:
        node.tick()
        node.put(*map(a_peer, range(1, 41)))
        sent, node.copier._snapshot = objects.bytes_sent, lambda: None
        for _ in range(3):
            node.tick()
        assert objects.bytes_sent == sent and node.copier.state().lag_records == 1
        node.copier._snapshot = node.save
        node.tick()
        assert copied(objects, tmp_path) == node.state


def test_the_backlog_is_bounded_and_without_gaps() -> None:
    backlog, number = Backlog(1000), 0
    backlog.above(0)
    while backlog.begin == 0:
        number += 1
        backlog.add([Written(number, b"x" * 100)], float(number))
    assert number == 11 == backlog.begin and backlog.above(0) == []
    assert backlog.lacking_since(0) == 1.0 and backlog.lacking_since(number) is None
    backlog.add([Written(12, b""), Written(14, b"")], 12.0)  # 13 was refused
    assert [record.number for record in backlog.above(11)] == [14] and backlog.begin == 13
    assert backlog.lacking_since(11) == 1.0  # a copy up to 11 was not there when the gap came
    backlog.above(13)
    assert backlog.lacking_since(13) == 12.0 and backlog.lacking_since(14) is None


def test_what_a_gateway_refused_healed_or_imported_is_in_the_copy_as_it_is_there(
    tmp_path: Path,
) -> None:
    """Voids, numbers that were never used, a snapshot behind a disk fault, an import."""
    (tmp_path / "other").mkdir()
    other = build(tmp_path / "other")
    do(other.gateway, "create", public_key=a_key(9))
    image = other.gateway.export()
    other.close()
    world, objects = build(tmp_path, backends={"wg0": other.backend}), MemoryObjects()
    snapshot = world.gateway.lander.snapshot
    epochs = Epochs(objects, None, "node", time.time)
    copier = Copier(epochs, world.store, world.files, snapshot, CONFIG)
    copier.boot(lambda state: None)
    world.gateway.lander.on_written = copier.begin()

    def check(*keys: object) -> None:
        copier.tick()
        assert copier.state().lag_records == 0
        rows = world.gateway.run(lambda: state_of(world.store))
        assert copied(objects, tmp_path) == rows
        assert {peer.public_key for peer in rows} == set(map(a_key, keys))

    do(world.gateway, "create", public_key=a_key(1))
    check(1)
    world.backend.fail("apply")
    with pytest.raises(wggw.Unavailable):
        do(world.gateway, "create", public_key=a_key(2))
    check(1)
    world.gateway.projection.supervise()
    do(world.gateway, "create", public_key=a_key(3))
    check(1, 3)
    world.disk.fail("fsync")
    with pytest.raises(wggw.Unavailable):
        do(world.gateway, "create", public_key=a_key(4))
    world.gateway.lander.heal()
    do(world.gateway, "create", public_key=a_key(5))
    check(1, 3, 5)
    world.gateway.import_(image, replace_key=False)
    check(9)
    do(world.gateway, "delete", public_key=a_key(9))
    do(world.gateway, "create", public_key=a_key(10))
    check(10)
    world.close()


def test_a_large_change_that_an_interface_refused_leaves_the_copy_not_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wggw, "COPY_BACKLOG", 100)
    world = build(tmp_path)
    epochs = Epochs(MemoryObjects(), None, "node", time.time)
    snapshot = world.gateway.lander.snapshot
    copier = Copier(epochs, world.store, world.files, snapshot, CONFIG)
    copier.boot(lambda state: None)
    world.gateway.lander.on_written = copier.begin()
    copier.tick()
    world.backend.fail("apply")
    with pytest.raises(wggw.Unavailable):
        do(world.gateway, "create", public_key=a_key(1), label="x" * 200)
    copier.tick()
    assert copier.state().lag_records == 0
    world.close()


@pytest.fixture(params=[True, False], ids=["fences", "looks"])
def checks(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def tmp_path_of(path: Path, name: str) -> Path:
    (path / name).mkdir(exist_ok=True)
    return path / name


def test_without_a_journal_snapshots_are_copied(tmp_path: Path) -> None:
    objects = MemoryObjects()
    with Node(tmp_path, objects, durability="none") as node:
        node.put(a_peer(1))
        node.save()
        node.tick()
        node.put(a_peer(2))
        node.save()
        node.tick()
        assert copied(objects, tmp_path) == node.state


def test_an_encrypted_copy_shows_nothing_and_needs_its_key(tmp_path: Path) -> None:
    objects = MemoryObjects()
    with Node(tmp_path, objects, VAULT, private_key="cHJpdmF0ZQ==") as node:
        node.put(a_peer(1))
        node.tick()
        node.put(a_peer(2))
        node.tick()
        expected = node.state
    for content in objects.objects.values():
        assert a_peer(1).public_key.encode() not in content
        assert b"cHJpdmF0ZQ==" not in content
    with Node(tmp_path / "new", objects, VAULT) as node:
        assert node.state == expected
        assert node.store.private_keys == {"wg0": "cHJpdmF0ZQ=="}
    for vault in (None, Vault("some other key of it")):
        with pytest.raises(ConfigError, match="SNAPSHOT_KEY"):
            Node(tmp_path / "wrong", objects, vault)


def test_a_private_key_is_never_in_a_clear_snapshot(tmp_path: Path) -> None:
    with Node(tmp_path, private_key="cHJpdmF0ZQ==") as node:
        node.put(a_peer(1))
        node.save()
    assert b"cHJpdmF0ZQ==" not in (tmp_path / "db").read_bytes()


# --- which one a start takes ----------------------------------------------------------------------


def test_a_node_goes_on_where_the_copy_ended(tmp_path: Path) -> None:
    objects = MemoryObjects()
    expected: State = frozenset()
    for life in range(5):
        directory = tmp_path_of(tmp_path, str(life))
        with Node(directory, objects) as node:
            assert node.state == expected
            assert node.copier.state().epoch == life + 1
            node.put(a_peer(life + 1))
            node.put(a_peer(life + 100))
            node.tick()
            node.tick()
            expected = node.state


@pytest.mark.parametrize("vault", [None, VAULT])
def test_a_normal_boot_warns_of_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, vault: Vault | None
) -> None:
    objects = MemoryObjects()
    for life in range(2):
        with Node(tmp_path_of(tmp_path, str(life)), objects, vault) as node:
            node.put(a_peer(life + 1))
            node.tick()
    with Node(tmp_path / "1", objects, vault):  # a restart with its files
        pass
    assert [record for record in caplog.records if record.levelname != "INFO"] == []


def test_own_files_win_over_the_own_copy(tmp_path: Path) -> None:
    """Records that were not copied before a restart, several times, also when a start failed."""
    objects = MemoryObjects()
    for life in range(4):
        with Node(tmp_path, objects) as node:
            assert len(node.state) == 2 * life
            node.put(a_peer(2 * life + 1))
            if life % 2:
                node.tick()
            node.put(a_peer(2 * life + 2))


def test_the_own_copy_wins_over_files_that_lost_something(tmp_path: Path) -> None:
    """A power cut with DURABILITY=interval: the copy has what the disk has not."""
    objects = MemoryObjects()
    with Node(tmp_path, objects) as node:
        node.put(a_peer(1))
        node.tick()
        kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
        node.put(a_peer(2))
        node.tick()
        expected = node.state
    for path, content in kept.items():
        path.write_bytes(content)
    with Node(tmp_path, objects) as node:
        assert node.state == expected
    assert superseded(tmp_path) == {a_peer(1)}


def test_the_newest_epoch_wins_over_higher_numbers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A machine comes back after its replacement took over: nothing that was copied is lost."""
    objects = MemoryObjects()
    path = tmp_path_of(tmp_path, "a")
    with Node(path, objects) as node:
        node.put(a_peer(1))
        node.tick()
    with Node(tmp_path_of(tmp_path, "b"), objects) as node:
        node.put(a_peer(50))
        node.tick()
        successor = node.state
    with Node(path) as node:
        for number in range(2, 9):  # were not in the copy when the machine failed
            node.put(a_peer(number))
        before = node.store.number
    with Node(path, objects) as node:
        assert node.state == successor
        assert node.store.number >= before  # numbers never go back
        node.put(a_peer(60))
    assert superseded(path) == {a_peer(number) for number in range(1, 9)}
    assert "another gateway has continued it" in caplog.text
    with Node(path, objects) as node:
        assert node.state == {*successor, a_peer(60)}


def test_the_later_of_two_gateways_goes_on(tmp_path: Path, checks: bool) -> None:
    objects = MemoryObjects(checks)
    with Node(tmp_path_of(tmp_path, "a"), objects) as one:
        one.put(a_peer(1))
        one.tick()
        with Node(tmp_path_of(tmp_path, "b"), objects) as two:
            two.put(a_peer(2))
            two.tick()
            one.put(a_peer(3))
            for _ in range(3):
                one.tick()
                assert "b (epoch 2) has taken it over" in (one.copier.state().failure or "")
            assert one.copier.state().lag_records == 1
            assert one.copier.state().holder == "b (epoch 2)"
            two.put(a_peer(4))
            two.tick()
            assert two.copier.state().failure is None
            assert copied(objects, tmp_path) == two.state


def test_of_two_starts_in_the_same_moment_both_are_told_which_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No conditional PUTs: both find the same newest epoch, then both claim the next one."""
    objects = MemoryObjects(checks=False)
    with Node(tmp_path_of(tmp_path, "zero"), objects) as node:
        node.put(a_peer(1))
        node.tick()
    keep = objects.put
    first: list[Node] = []

    def put(name: str, content: bytes, create: bool = False) -> bool:
        if name == "claim-00000002" and not first:
            objects.put = lambda name, content, create=False: keep(name, content)  # type: ignore[method-assign]
            first.append(Node(tmp_path_of(tmp_path, "first"), objects))
        return keep(name, content)

    objects.put = put  # type: ignore[method-assign]
    with Node(tmp_path_of(tmp_path, "later"), objects) as later, first[0] as other:
        assert later.state == other.state == {a_peer(1)}
        other.put(a_peer(2))
        other.tick()
        assert "later (epoch 2) has taken it over" in (other.copier.state().failure or "")
        later.put(a_peer(3))
        later.tick()
        assert later.copier.state().failure is None
        assert "first (epoch 2) began at the same moment" in caplog.text
        assert copied(objects, tmp_path) == later.state


def test_what_is_uploaded_between_look_and_claim_is_read_and_checked(tmp_path: Path) -> None:
    objects = MemoryObjects()
    with Node(tmp_path_of(tmp_path, "a"), objects) as one:
        one.put(a_peer(1))
        one.tick()
        checked: list[State] = []

        def check(state: Store) -> None:
            checked.append(state_of(state))
            if len(checked) == 1:
                one.put(a_peer(2))
                one.tick()
                assert one.copier.state().lag_records == 0

        with Node(tmp_path_of(tmp_path, "b"), objects, check=check) as two:
            assert checked == [{a_peer(1)}, {a_peer(1), a_peer(2)}]
            assert two.state == one.state == checked[-1]


def test_a_start_that_looked_for_long_takes_no_epoch_from_a_faster_one(
    tmp_path: Path, checks: bool
) -> None:
    objects = MemoryObjects(checks)
    others: list[Node] = []

    def check(_: Store) -> None:
        others.append(Node(tmp_path_of(tmp_path, "faster"), objects))
        others[0].put(a_peer(1))
        others[0].tick()

    keep = objects.put
    if not checks:  # not even for claims
        objects.put = lambda name, content, create=False: keep(name, content)  # type: ignore[method-assign]
    with pytest.raises(CopyError, match="starts at the same time"):
        Node(tmp_path_of(tmp_path, "slower"), objects, check=check)
    with others[0] as faster:
        faster.put(a_peer(2))
        faster.tick()
        assert faster.copier.state().failure is None
        with Node(tmp_path / "slower", objects) as slower:
            assert slower.state == {a_peer(1), a_peer(2)}


def test_files_that_cannot_be_kept_aside_end_the_start_before_the_claim(tmp_path: Path) -> None:
    objects = MemoryObjects()
    for directory, number in (("old", 1), ("new", 2)):
        with Node(tmp_path_of(tmp_path, directory), objects) as node:
            node.put(a_peer(number))
            node.tick()
    before = dict(objects.objects)
    (tmp_path / "old" / "db.superseded" / "a file").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        Node(tmp_path / "old", objects)
    assert objects.objects == before


def test_a_start_without_the_copy_puts_nothing_over_it(tmp_path: Path) -> None:
    objects = MemoryObjects()
    with Node(tmp_path_of(tmp_path, "a"), objects) as node:
        for number in range(1, 4):
            node.put(a_peer(number))
        node.tick()
        kept, before = node.state, dict(objects.objects)
    with Node(tmp_path_of(tmp_path, "b"), objects, boot=False) as node:
        for number in range(10, 20):
            node.put(a_peer(number))
            node.tick()
        assert node.copier.state().failure
        assert copied(objects, tmp_path) == kept
        assert objects.objects == before
    with Node(tmp_path / "b", objects) as node:
        assert node.state == kept
    assert len(superseded(tmp_path / "b")) == 10


def test_a_late_store_gets_its_copy(tmp_path: Path) -> None:
    objects = MemoryObjects()
    objects.fail_at, objects.until = 1, 3
    with Node(tmp_path, objects, boot=False) as node:
        node.put(a_peer(1))
        for _ in range(5):
            node.tick()
        assert copied(objects, tmp_path) == node.state
    with Node(tmp_path, objects, boot=False) as node:  # and goes on with its own
        node.put(a_peer(2))
        node.tick()
        assert copied(objects, tmp_path) == node.state


# --- lineage --------------------------------------------------------------------------------------


def two_lineages(tmp_path: Path) -> tuple[MemoryObjects, str, str]:
    """A foreign copy, and files of our own in `a`; their lineages."""
    objects = MemoryObjects()
    with Node(tmp_path_of(tmp_path, "foreign"), objects) as node:
        node.put(a_peer(1))
        node.tick()
        there = node.store.lineage
    with Node(tmp_path_of(tmp_path, "a"), MemoryObjects()) as node:
        node.put(a_peer(2))
        return objects, node.store.lineage, there


def test_another_lineage_is_refused_unless_it_is_asked_for_by_name(tmp_path: Path) -> None:
    objects, _, there = two_lineages(tmp_path)
    before = dict(objects.objects)
    with pytest.raises(ConfigError, match=f"SNAPSHOT_LINEAGE={there}"):
        Node(tmp_path / "a", objects)
    wanted = dataclasses.replace(CONFIG, snapshot_lineage="ab" * 16)
    with pytest.raises(ConfigError, match="neither"):
        Node(tmp_path / "a", objects, config=wanted)
    with pytest.raises(ConfigError, match="neither"):
        Node(tmp_path / "new", objects, config=wanted)
    assert objects.objects == before
    wanted = dataclasses.replace(CONFIG, snapshot_lineage=there)
    with Node(tmp_path / "a", objects, config=wanted) as node:
        assert node.state == {a_peer(1)}
        assert node.store.lineage == there
    assert superseded(tmp_path / "a") == {a_peer(2)}
    with Node(tmp_path / "a", objects) as node:
        assert node.store.lineage == there


def test_the_own_lineage_is_put_over_another_when_asked_for_by_name(tmp_path: Path) -> None:
    objects, here, _ = two_lineages(tmp_path)
    wanted = dataclasses.replace(CONFIG, snapshot_lineage=here)
    with Node(tmp_path / "a", objects, config=wanted) as node:
        assert node.state == {a_peer(2)}
        node.tick()
        assert copied(objects, tmp_path) == node.state


def test_files_of_an_older_version_have_no_lineage_to_choose(tmp_path: Path) -> None:
    objects, _, there = two_lineages(tmp_path)
    with Node(tmp_path / "old") as node:
        node.put(a_peer(3))
        node.store.lineage = ""
        node.save()
    with pytest.raises(ConfigError, match="start once without SNAPSHOT_URL") as told:
        Node(tmp_path / "old", objects)
    for lineage in re.findall("SNAPSHOT_LINEAGE=(.*?) to", str(told.value)):
        assert lineage == there
        load_config({**BASE, "SNAPSHOT_LINEAGE": lineage})
        wanted = dataclasses.replace(CONFIG, snapshot_lineage=lineage)
        with Node(tmp_path / "old", objects, config=wanted) as node:
            assert node.state == {a_peer(1)}
    assert superseded(tmp_path / "old") == {a_peer(3)}


def test_a_lineage_stays_for_life(tmp_path: Path) -> None:
    objects = MemoryObjects()
    lineages = set()
    for directory in ("a", "a", "b", "b"):
        with Node(tmp_path_of(tmp_path, directory), objects) as node:
            lineages.add(node.store.lineage)
            node.put(a_peer(node.store.number + 1))
            node.tick()
    assert len(lineages) == 1 and len(lineages.pop()) == 32


# --- what is old, and what is damaged -------------------------------------------------------------


DAY = 86_401.0


def left_of(objects: MemoryObjects, epoch: int) -> list[str]:
    """What an epoch has in the store, besides its claim and a fence."""
    ours = [n for n in objects.objects if n.startswith(f"{epoch:08d}-")]
    return [n for n in ours if b'"kind":"fence"' not in objects.objects[n]]


def sweep(node: Node) -> None:
    """A tick removes one epoch at a time."""
    node.copier._next_sweep = 0.0
    while node.copier._next_sweep == 0.0:
        node.tick()


def test_old_epochs_are_removed_a_day_after_they_were_replaced(tmp_path: Path) -> None:
    objects, now = MemoryObjects(), 1e9
    for life in range(3):
        with Node(tmp_path, objects, now=now) as node:
            node.put(a_peer(life + 1))
            node.tick()
            node.tick()
            now += DAY / 2
    with Node(tmp_path, objects, now=now) as node:
        sweep(node)  # before it has a snapshot
        assert [bool(left_of(objects, n)) for n in (1, 2, 3, 4)] == [False, True, True, True]
        for _ in range(2):
            node.now += DAY / 2
            sweep(node)
        assert [bool(left_of(objects, n)) for n in (1, 2, 3, 4)] == [False, False, False, True]
        assert copied(objects, tmp_path) == node.state


@pytest.mark.parametrize("ahead", [10.0, 1e9])
def test_another_nodes_clock_that_is_ahead_neither_hastens_nor_prevents_a_removal(
    tmp_path: Path, ahead: float
) -> None:
    objects = MemoryObjects()
    for name, now in (("a", 1e9), ("ahead", 1e9 + ahead), ("b", 1e9)):
        with Node(tmp_path / name, objects, now=now) as node:
            node.put(a_peer(1))
            node.tick()
    for passed in (0.0, DAY / 2):
        node.now = 1e9 + passed
        sweep(node)
        assert left_of(objects, 1) and left_of(objects, 2)
    node.now = 1e9 + DAY + 10
    sweep(node)
    assert not left_of(objects, 1) and not left_of(objects, 2) and left_of(objects, 3)


def test_an_own_clock_that_was_behind_hastens_no_removal_of_what_others_replaced(
    tmp_path: Path,
) -> None:
    objects = MemoryObjects()
    for name, now in (("a", 1e9), ("b", 1e9), ("behind", 1e9 - 2 * DAY)):
        with Node(tmp_path / name, objects, now=now) as node:
            node.put(a_peer(1))
            node.tick()
    node.now = 1e9 + DAY / 2
    sweep(node)
    assert left_of(objects, 1)
    node.now = 1e9 + DAY
    sweep(node)
    assert not left_of(objects, 1)


def test_a_start_finds_the_copy_although_the_clock_of_its_rival_was_set_back(
    tmp_path: Path,
) -> None:
    """Its claim arrives when the rival has a snapshot; it still needs the epoch before theirs."""
    objects = MemoryObjects(checks=False)
    with Node(tmp_path / "old", objects, now=1e9) as node:
        node.put(a_peer(1))
        node.tick()
        expected = node.state
    put, rivals = objects.put, list[Node]()

    def put_late(name: str, content: bytes, create: bool = False) -> bool:
        objects.put = put  # type: ignore[method-assign]
        rivals.append(Node(tmp_path / "rival", objects, now=1e9 + 60))
        rivals[0].tick()
        rivals[0].now = 1e9
        sweep(rivals[0])
        return put(name, content)

    objects.put = put_late  # type: ignore[method-assign]
    with Node(tmp_path / "new", objects, now=1e9) as node, rivals[0]:
        assert node.state == rivals[0].state == expected


def test_many_starts_leave_nothing_that_a_later_one_does_not_remove(tmp_path: Path) -> None:
    """However short the runs are: each one goes on where the one before it ended."""
    objects, now = MemoryObjects(), 1e9
    for life in range(40):
        with Node(tmp_path, objects, now=now) as node:
            node.put(a_peer(life + 1))
            node.tick()
    for life in range(10):
        now += DAY
        with Node(tmp_path, objects, now=now) as node:
            node.put(a_peer(100 + life))
            node.tick()
            for _ in range(5):
                sweep(node)
            node.copier._number = -1  # its next snapshot has a manifest that tells how far it came
            node.put(a_peer(200 + life))
            node.save()
            node.tick()
            asked = len(objects.asked)
    assert [n for n in range(1, 46) if left_of(objects, n)] == []
    assert [n for n in range(46, 51) if not left_of(objects, n)] != [46, 47, 48, 49, 50]
    assert len(objects.asked) == asked


def test_a_replaced_gateway_learns_it_after_its_epoch_was_removed(
    tmp_path: Path, checks: bool
) -> None:
    """It was cut off for a day, or nothing changed in all that time."""
    objects = MemoryObjects(checks)
    with Node(tmp_path / "a", objects, now=1e9) as old:
        old.put(a_peer(1))
        old.tick()
        with Node(tmp_path / "b", objects, now=1e9) as new:
            new.tick()
            new.now += DAY
            sweep(new)
            assert left_of(objects, 1) == []
            old.put(a_peer(2))
            old.tick()
            assert "has taken it over" in str(old.copier.state().failure)
            assert copied(objects, tmp_path) == new.state


@pytest.mark.parametrize("crash", [False, True])
def test_a_gateway_of_another_lineage_that_was_replaced_learns_it(
    tmp_path: Path, checks: bool, crash: bool
) -> None:
    """With `crash` the first one to replace it ends between its claim and the end of the old."""
    objects = MemoryObjects(checks)
    with Node(tmp_path / "b") as node:
        node.put(a_peer(5))
        node.save()
        ours = dataclasses.replace(CONFIG, snapshot_lineage=node.store.lineage)
    with Node(tmp_path / "a", objects) as old:
        old.put(a_peer(1))
        old.tick()
        if crash:
            ending = mock.patch.object(Epochs, "take", side_effect=take_and_end, autospec=True)
            with ending, pytest.raises(Ended):
                Node(tmp_path / "b", objects, config=ours)
        with Node(tmp_path / "b", objects, config=ours) as new:
            new.tick()
            old.put(a_peer(2))
            old.tick()
            assert "has taken it over" in str(old.copier.state().failure)
            assert copied(objects, tmp_path) == new.state


class Ended(BaseException):
    pass


_take = Epochs.take


def take_and_end(epochs: Epochs, claim: wggw.Claim) -> None:
    _take(epochs, claim)
    raise Ended


@pytest.mark.parametrize("late", [False, True])
def test_a_stop_without_a_snapshot_of_its_own_removes_nothing(tmp_path: Path, late: bool) -> None:
    objects = MemoryObjects()
    with Node(tmp_path / "a", objects, now=1e9) as node:
        node.put(a_peer(1), a_peer(2))
        node.tick()
        expected = node.state
    with Node(tmp_path / "a", objects, now=1e9 + DAY, boot=not late) as node:
        node.copier._snapshot = mock.Mock(side_effect=OSError(28, "No space left on device"))
        node.tick()
        node.now += 2 * DAY
        node.copier._next_sweep = 0.0
        assert not node.copier.finish(10.0)
        assert copied(objects, tmp_path) == expected


def test_numbers_that_were_given_again_are_not_taken_for_what_is_in_the_files(
    tmp_path: Path,
) -> None:
    """The disk lost records that were copied, and a start without the copy used their numbers."""
    objects = MemoryObjects()
    with Node(tmp_path / "a", objects, durability="interval") as node:
        node.put(a_peer(1))
        node.save()
        node.tick()
        kept = {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}
        node.put(a_peer(2), a_peer(3))
        node.put(a_peer(4))
        node.tick()
        expected = node.state
    for path, content in kept.items():
        path.write_bytes(content)
    with Node(tmp_path / "a", objects, boot=False) as node:
        for number in range(10, 20):
            node.put(a_peer(number))
        node.tick()
        assert "is not in the files here" in str(node.copier.state().failure)
        own = node.state
    with Node(tmp_path / "a", objects) as node:
        assert node.state == expected
        assert superseded(tmp_path / "a") == own


def test_a_claim_has_the_time_of_its_put_however_long_the_start_waited_for_the_copy(
    tmp_path: Path,
) -> None:
    """Else the epoch before, which ended at that moment, would be a day old at once."""
    objects, now = MemoryObjects(), 1e9
    with Node(tmp_path / "a", objects, now=now) as node:
        node.put(a_peer(1))
        node.tick()
    name = "00000001-" + node.copier.epochs.writer + "-00000001"
    entry = objects.objects.pop(name)
    files = Files(str(tmp_path / "db"), "commit", FakeDisk())
    epochs = Epochs(objects, None, "b", lambda: now)
    copier = Copier(epochs, Store(), files, lambda: None, CONFIG)
    with pytest.raises(CopyDamaged):
        copier.boot(lambda state: None)
    now += 2 * DAY
    objects.objects[name] = entry
    copier.boot(lambda state: None)
    assert epochs.read_claim(2).time == now


def test_a_claim_that_arrives_late_is_no_other_gateways(tmp_path: Path) -> None:
    """Its upload had no answer, so it was repeated; time went on in between."""
    objects, late = MemoryObjects(checks=False), list[bytes]()
    put, now = objects.put, itertools.count(10**9)

    def lose_the_first(name: str, content: bytes, create: bool = False) -> bool:
        if name.startswith("claim") and not late:
            late.append(content)
            raise CopyError("no answer")
        return put(name, content, create)

    objects.put = lose_the_first  # type: ignore[method-assign]
    files, store = Files(str(tmp_path / "db"), "commit", FakeDisk(), VAULT), Store()
    epochs = Epochs(objects, VAULT, "a", lambda: next(now))  # type: ignore[arg-type]
    copier = Copier(epochs, store, files, lambda: None, CONFIG)
    with pytest.raises(CopyError):
        copier.boot(lambda state: None)
    copier.boot(lambda state: None)
    objects.objects["claim-00000001"] = late[0]
    files.begin(store)
    copier.begin()
    copier.tick()
    assert copier.state().failure is None
    files.journal.close()


def test_a_claim_that_was_torn_is_nobodys_and_one_above_it_counts(tmp_path: Path) -> None:
    objects = MemoryObjects(checks=False)
    with Node(tmp_path / "a", objects) as old:
        objects.objects["claim-00000002"] = objects.objects["claim-00000001"][:-5]
        old.put(a_peer(1))
        old.tick()
        assert old.copier.state().failure is None
        with Node(tmp_path / "b", objects) as new:
            assert new.copier.state().epoch == 3
            assert new.state == old.state
            old.put(a_peer(2))
            old.tick()
            assert "b (epoch 3) has taken it over" in str(old.copier.state().failure)


def test_a_store_that_deletes_nothing_is_good_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wggw, "COPY_SEGMENTS", 2)
    objects = MemoryObjects()

    def refuse(name: str) -> None:
        raise CopyError("DELETE: status 405", 405)

    objects.delete = mock.Mock(side_effect=refuse)  # type: ignore[method-assign]
    with Node(tmp_path, objects) as node:
        for number in range(1, 20):
            node.put(a_peer(number))
            node.tick()
        assert node.copier.state().failure is None
        assert copied(objects, tmp_path) == node.state
    assert objects.delete.call_count == 1


def test_what_a_store_did_not_delete_is_deleted_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wggw, "COPY_SEGMENTS", 2)
    objects = MemoryObjects()
    counts = list[int]()
    with Node(tmp_path, objects) as node:
        for number in range(1, 60):
            node.put(a_peer(number))
            if number == 20:
                delete, objects.delete = objects.delete, mock.Mock(side_effect=CopyError("slow"))  # type: ignore[method-assign]
            if number == 40:
                objects.delete = delete  # type: ignore[method-assign]
            node.tick()
            counts.append(len(objects.entries()))
        assert node.copier.state().failure is None
    assert max(counts[-10:]) <= max(counts[:19]) < max(counts[19:40])


def test_what_a_crash_left_undeleted_is_removed_with_the_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wggw, "COPY_SEGMENTS", 4)
    objects = MemoryObjects()
    delete = objects.delete
    with Node(tmp_path, objects, now=1e9) as node, pytest.raises(Ended):
        for number in range(1, 100):
            if number == 25:
                objects.delete = mock.Mock(side_effect=Ended)  # type: ignore[method-assign]
            node.put(a_peer(number))
            node.tick()
    objects.delete = delete  # type: ignore[method-assign]
    with Node(tmp_path, objects, now=1e9) as node:
        node.tick()
        node.now += DAY
        sweep(node)
        assert left_of(objects, 1) == []


def test_a_stop_copies_the_last_records_however_many_segments_there_are(tmp_path: Path) -> None:
    objects = MemoryObjects()
    with Node(tmp_path / "a", objects) as node:
        node.tick()
        for number in range(1, wggw.COPY_SEGMENTS + 1):
            node.put(a_peer(number))
            node.tick()
        node.put(a_peer(100))
        assert node.copier.finish(10.0)
        assert copied(objects, tmp_path) == node.state
        node.put(a_peer(101))
        objects.fail_at, objects.until = objects.calls + 1, objects.calls + 100
        assert not node.copier.finish(10.0)


def test_a_writer_without_fences_says_whom_it_replaces(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The copy has moved to a store without conditional PUTs, or a proxy refuses them."""
    objects = MemoryObjects()
    with Node(tmp_path / "a", objects) as old:
        old.put(a_peer(1))
        old.tick()
        expected = old.state
    moved = MemoryObjects(checks=False)
    moved.objects = objects.objects
    with Node(tmp_path / "b", moved) as new:
        assert new.state == expected
    assert (
        "remote copy: a relied on conditional PUTs, which this store does not have" in caplog.text
    )


@pytest.mark.parametrize("kind", ["snapshot", "segment", "manifest leads nowhere"])
def test_a_damaged_copy_of_another_lineage_can_be_replaced(
    tmp_path: Path, checks: bool, kind: str
) -> None:
    """Nobody needs its content; its writer is told if it still runs."""
    with Node(tmp_path / "b") as node:
        node.put(a_peer(5))
        node.save()
        ours = dataclasses.replace(CONFIG, snapshot_lineage=node.store.lineage)
    objects = MemoryObjects(checks)
    with Node(tmp_path / "a", objects) as old:
        for number in (1, 2, 3):
            old.put(a_peer(number))
            old.tick()
        name = objects.entries()[1 if kind == "segment" else 0]
        if kind == "manifest leads nowhere":
            del objects.objects[name]
        else:
            objects.objects[name] = b"rotten" + objects.objects[name]
        with Node(tmp_path / "b", objects, config=ours) as new:
            new.tick()
            assert copied(objects, tmp_path) == new.state
            old.put(a_peer(4))
            old.tick()
            told = "has taken it over" in str(old.copier.state().failure)
            assert told == (kind != "manifest leads nowhere" or not checks)


@pytest.mark.parametrize("failure", [CopyContested("a race"), CopyDamaged("rotten")])
def test_a_copy_that_is_there_is_never_done_without(tmp_path: Path, failure: CopyError) -> None:
    """With SNAPSHOT_REQUIRED=false, too: that is for stores that do not answer."""
    files = Files(str(tmp_path / "db"), "commit", FakeDisk())
    optional = {"SNAPSHOT_URL": "https://x.example", "SNAPSHOT_REQUIRED": "false"}
    config = load_config({**BASE, "WG_BACKEND": "memory", **optional})
    gateway = mock.Mock(files=files, store=Store(), starting="")
    start = wggw.Start(config, mock.Mock(gateway=gateway), mock.Mock())
    copier = mock.Mock()
    copier.boot.side_effect = [failure, None]
    with mock.patch("time.sleep"):
        start._read_copy(copier)
    assert copier.boot.call_count == 2 and not copier.go_without.called


@pytest.mark.parametrize("step", ["boot", "begin"])
def test_a_disk_that_the_copy_cannot_write_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    files = Files(str(tmp_path / "db"), "commit", FakeDisk())
    config = load_config({**BASE, "WG_BACKEND": "memory", "SNAPSHOT_URL": "https://x.example"})
    full = mock.Mock(**{f"{step}.side_effect": OSError(28, "No space left on device")})
    monkeypatch.setattr(wggw, "Copier", mock.Mock(return_value=full))
    gateway = mock.Mock(files=files, store=Store(), tunnels={})
    start = wggw.Start(config, mock.Mock(gateway=gateway), mock.Mock())
    with pytest.raises(wggw.StartError, match="DB_PATH .*No space left"):
        start.read(lambda work: work() is None)
        start.begin()


def test_a_snapshot_that_was_damaged_while_running_is_told_until_the_next_one(
    tmp_path: Path,
) -> None:
    objects = MemoryObjects()
    with Node(tmp_path, objects) as node:
        node.put(a_peer(1))
        node.tick()
        node.put(a_peer(2))
        node.save()
        whole = (tmp_path / "db").read_bytes()
        (tmp_path / "db").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        node.tick()
        state = node.copier.state()
        assert state.lag_records == 1
        assert f"{tmp_path}/db: at byte" in str(state.failure)
        assert "The gateway does not start" not in str(state.failure)
        node.save()
        node.tick()
        assert node.copier.state().failure is None
        assert copied(objects, tmp_path) == node.state


def test_a_stop_waits_for_what_the_timer_does_with_the_copy(tmp_path: Path) -> None:
    objects = MemoryObjects()
    with Node(tmp_path, objects) as node:
        node.tick()
        node.put(a_peer(1))
        node.copier._turn.acquire()
        threading.Timer(0.1, node.copier._turn.release).start()
        assert node.copier.finish(30.0)
        assert copied(objects, tmp_path) == node.state


def test_totals_never_go_back_behind_a_record(tmp_path: Path) -> None:
    """The local snapshot, whose totals a segment gets, is older than the segment's records."""
    objects, now = MemoryObjects(), int(time.time())
    with Node(tmp_path / "a", objects) as node:
        node.put(a_peer(1))
        node.tick()
        node.do(Record(traffic=[TrafficRow(1, 100, 100, 100, 100, now)]))
        node.save()
        node.do(Record(put=[a_peer(1)], traffic=[TrafficRow(1, 900, 900, 900, 900, now)]))
        node.tick()
        _, newest = node.copier.epochs.find()
        assert newest is not None
        copy = read_state(node.copier.epochs.read(newest.prefix, newest.lineage)[1])
        assert copy.traffic(1) == node.store.traffic(1)


def test_what_no_boot_would_read_is_not_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = MemoryObjects()
    with Node(tmp_path, objects) as node:
        node.tick()
        before = copied(objects, tmp_path)
        monkeypatch.setattr(wggw, "MAX_SNAPSHOT", 100_000)
        node.put(*map(a_peer, range(1, 2000)))
        node.tick()
        state = node.copier.state()
        assert state.lag_records == 1 and "which no boot reads" in str(state.failure)
        assert copied(objects, tmp_path) == before


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": "2"}, {"epoch": 1}, {"epoch": 2.5}, {"time": None}, {"time": 1 << 60},
        {"writer": None}, {"lineage": 3}, {"node": []}, {"previous": 7},
        {"previous": "00000002-ffff"}, {"previous": "x"}, {"more": 1},
    ],
)  # fmt: skip
def test_a_claim_that_no_gateway_puts_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    objects = MemoryObjects()
    with Node(tmp_path / "a", objects) as node:
        node.put(a_peer(1))
        node.tick()
        claim = {**node.copier.epochs.claim._asdict(), "epoch": 2}  # type: ignore[union-attr]
    objects.objects["claim-00000002"] = wggw.pack({"claim": claim | change}, b"", None)
    with pytest.raises(CopyDamaged, match="claim-00000002"):
        Node(tmp_path / "b", objects)


@pytest.mark.parametrize("position", ["1", 1.0, -3, 0, None])
def test_a_manifest_that_no_gateway_puts_is_refused(tmp_path: Path, position: Any) -> None:
    objects = MemoryObjects()
    with Node(tmp_path / "a", objects) as node:
        for number in range(3):
            node.put(a_peer(number + 1))
            node.copier._number = -1
            node.save()
            node.tick()
    for name in objects.objects:
        if "manifest" in name:
            objects.objects[name] = wggw.pack({"position": position, "number": 1}, b"", None)
    with pytest.raises(CopyDamaged, match="manifest"):
        Node(tmp_path / "b", objects)


@pytest.mark.parametrize("is_torn", [False, True])
def test_of_the_newest_entry_only_the_beginning_may_be_missing_in_silence(
    tmp_path: Path, is_torn: bool
) -> None:
    """A store without checksums may tear an upload, which then was not counted as copied."""
    objects = MemoryObjects(checks=False)
    with Node(tmp_path / "a", objects) as node:
        for number in (1, 2, 3):
            node.put(a_peer(number))
            node.tick()
    last = objects.entries()[-1]
    data = objects.objects[last]
    changed = data[:-9] if is_torn else data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
    objects.objects[last] = changed
    if is_torn:
        with Node(tmp_path / "b", objects) as node:
            assert {peer.id for peer in node.state} == {1, 2}
    else:
        with pytest.raises(CopyDamaged, match=last):
            Node(tmp_path / "b", objects)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "torn": lambda data: data[:-9],
    "other content": lambda data: wggw.pack(wggw.unpack("x", data, None)[0], b"rotten", None),
    "other words": lambda data: wggw.pack({"kind": "segment"}, b"", None),
}


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        *itertools.product(("snapshot", "segment"), DAMAGES),
        *itertools.product(("claim", "manifest"), ("torn", "other words")),  # they have no content
    ],
)
def test_a_damaged_copy_is_never_taken_for_an_empty_one(
    tmp_path: Path, kind: str, way: str
) -> None:
    """The error names the object, and nobody claims what cannot be read."""
    objects = MemoryObjects()
    with Node(tmp_path, objects) as node:
        node.put(a_peer(1))
        node.tick()
        for number in (2, 3):
            node.put(a_peer(number))
            node.tick()
        for _ in range(2 if kind == "manifest" else 0):  # until the first snapshot is deleted
            node.copier._number = -1
            node.save()
            node.tick()
    first, second, *_ = objects.entries()
    assert first.endswith("-00000001") or kind == "manifest"
    names = {
        "snapshot": [first],
        "segment": [second],
        "claim": ["claim-00000001"],
        "manifest": [name for name in objects.objects if "manifest" in name],
    }[kind]
    assert len(names) == (2 if kind == "manifest" else 1)
    for name in names:
        objects.objects[name] = DAMAGES[way](objects.objects[name])
    before = dict(objects.objects)
    with pytest.raises(CopyDamaged, match=".*".join(sorted(names))):
        Node(tmp_path / "new", objects)
    assert objects.objects == before


def test_the_first_snapshot_is_found_without_a_readable_manifest(tmp_path: Path) -> None:
    objects = MemoryObjects(checks=False)
    with Node(tmp_path, objects) as node:
        node.put(a_peer(1))
        node.tick()
        expected = node.state
    [name] = [name for name in objects.objects if "manifest" in name]
    objects.objects[name] = objects.objects[name][:-9]
    with Node(tmp_path / "new", objects) as node:
        assert node.state == expected


@pytest.mark.parametrize("damage", ["missing", "swapped"])
def test_entries_are_where_they_were_put(tmp_path: Path, damage: str) -> None:
    objects = MemoryObjects()
    with Node(tmp_path, objects) as node:
        for number in (1, 2, 3):
            node.put(a_peer(number))
            node.tick()
    snapshot, first, second = objects.entries()
    if damage == "missing":
        del objects.objects[snapshot]
    else:
        objects.objects[first] = objects.objects[second]
    with pytest.raises(CopyDamaged, match=snapshot[:25] if damage == "missing" else first):
        Node(tmp_path / "new", objects)


def test_no_object_of_a_copy_is_more_than_an_error(tmp_path: Path) -> None:
    data = wggw.pack({"kind": "segment"}, b"payload", None)
    assert wggw.unpack("x", data, None) == ({"kind": "segment"}, b"payload")
    wrong = [data[:end] for end in range(len(data))]
    wrong += [wggw.pack({"seal": seal}, b"", None) for seal in (5, None, [], "\ud800")]
    wrong += [data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :] for i in range(len(data))]
    for text in wrong:
        with pytest.raises(CopyDamaged):
            wggw.unpack("x", text, None)
    about = {"kind": "segment", "at": "x", "number": math.inf}
    with pytest.raises(CopyDamaged):
        Epochs(MemoryObjects(), None, "", time.time)._decode("x", wggw.pack(about, b"", None))


def test_with_a_key_nothing_unsealed_is_believed(tmp_path: Path) -> None:
    """Whoever can write to the store can't make a state of their own."""
    objects = MemoryObjects()
    with Node(tmp_path, objects) as node:
        node.put(a_peer(1))
        node.tick()
    with pytest.raises(ConfigError, match="not encrypted"):
        Node(tmp_path / "new", objects, VAULT)
    data = wggw.pack({"at": "here"}, b"payload", VAULT)
    digest, content = data[12:76], data[77:].replace(b"here", b"else")
    forged = b"wggw-copy 2 %b %b" % (hashlib.sha256(content).hexdigest().encode(), content)
    assert digest not in forged
    with pytest.raises(CopyDamaged):
        wggw.unpack("x", forged, VAULT)


# --- settings and signatures ----------------------------------------------------------------------

S3_KEYS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}


@pytest.mark.parametrize(
    ("settings", "host", "path"),
    [
        ({"SNAPSHOT_URL": "https://h.example/a/b/"}, "h.example", "/a/b/"),
        ({"SNAPSHOT_URL": "https://[fd00::1]:8443"}, "fd00::1", "/"),
        ({"SNAPSHOT_URL": "https://[fd00::1]/a"}, "fd00::1", "/a/"),
        ({"SNAPSHOT_URL": "s3://bucket/p/q"}, "bucket.s3.us-east-1.amazonaws.com", "/p/q/"),
        (
            {"SNAPSHOT_URL": "s3://bucket", "AWS_REGION": "eu-west-1"},
            "bucket.s3.eu-west-1.amazonaws.com",
            "/",
        ),
        (
            {"SNAPSHOT_URL": "s3://a.bucket/p", "AWS_DEFAULT_REGION": "eu-west-1"},
            "s3.eu-west-1.amazonaws.com",
            "/a.bucket/p/",
        ),
        (
            {"SNAPSHOT_URL": "s3://bucket/p", "AWS_ENDPOINT_URL": "https://s3.example:9000"},
            "s3.example",
            "/bucket/p/",
        ),
        (
            {
                "SNAPSHOT_URL": "s3://bucket",
                "AWS_ENDPOINT_URL": "https://other.example",
                "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9000",
            },
            "127.0.0.1",
            "/bucket/",
        ),
    ],
)
def test_where_a_url_leads(settings: dict[str, str], host: str, path: str) -> None:
    config = load_config({**BASE, **S3_KEYS, **settings})
    store = open_object_store(config, time.time)
    assert store is not None
    connection = store._connect(store._host, store._port)
    assert (connection.host, store._path) == (host, path)


def test_s3_needs_its_keys() -> None:
    with pytest.raises(ConfigError, match="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        load_config({**BASE, "SNAPSHOT_URL": "s3://bucket/a"})


EMPTY = hashlib.sha256(b"").hexdigest()
EXAMPLE = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
KEYS = ("AKIAIOSFODNN7EXAMPLE", EXAMPLE)


@pytest.mark.parametrize(
    ("method", "path", "headers", "signature"),
    [  # Amazon S3 API Reference, "Signature Calculations: Transferring Payload in a Single Chunk"
        (
            "GET",
            "/test.txt",
            {"range": "bytes=0-9", "x-amz-content-sha256": EMPTY},
            "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41",
        ),
        (
            "PUT",
            "/test%24file.text",
            {
                "date": "Fri, 24 May 2013 00:00:00 GMT",
                "x-amz-content-sha256": hashlib.sha256(b"Welcome to Amazon S3.").hexdigest(),
                "x-amz-storage-class": "REDUCED_REDUNDANCY",
            },
            "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd",
        ),
    ],
)
def test_signatures_are_those_that_aws_published(
    method: str, path: str, headers: dict[str, str], signature: str
) -> None:
    host = {"host": "examplebucket.s3.amazonaws.com", "x-amz-date": "20130524T000000Z"}
    given_header = sign_v4(KEYS, "us-east-1", method, path, {**host, **headers})
    assert given_header.endswith(f"Signature={signature}")


# --- over TLS -------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TlsStore]:
    directory = tmp_path_of(tmp_path, "tls")
    with tls_store(directory) as server:
        monkeypatch.setenv("SSL_CERT_FILE", str(directory / "store.pem"))
        yield server


def connect(server: TlsStore, token: str = TOKEN) -> ObjectStore:
    config = load_config({**BASE, "SNAPSHOT_URL": server.url, "SNAPSHOT_TOKEN": token})
    return open_object_store(config, time.time)  # type: ignore[return-value]


def test_objects_are_put_and_got(server: TlsStore) -> None:
    objects = connect(server)
    assert objects.get("a", 100) is None
    content = random.Random(1).randbytes(300_000)
    objects.put("a", content)
    assert objects.get("a", len(content)) == content
    with pytest.raises(CopyError):
        objects.get("a", len(content) - 1)


def test_a_wrong_token_and_an_unknown_certificate_are_errors(
    server: TlsStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CopyError, match="401"):
        connect(server, "wrong").get("a", 100)
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(CopyError):
        connect(server).get("a", 100)
    assert server.requests[-1][2] == 401


@pytest.mark.parametrize(
    ("method", "fault"),
    [
        *(("GET", f) for f in ("refuse", "stall", "hang up", "truncate", "announce more")),
        *(("GET", f) for f in ("garbage", "announce nothing")),
        *(("PUT", f) for f in ("refuse", "stall", "hang up", "lose the answer")),
        ("PUT", "garbage"),
    ],
)
def test_whatever_the_store_does_is_an_error_in_time(
    server: TlsStore, monkeypatch: pytest.MonkeyPatch, method: str, fault: str
) -> None:
    monkeypatch.setattr(wggw, "COPY_TIMEOUT", 1.0)
    objects = connect(server)
    objects.put("a", b"x" * 1000)
    server.fault = lambda given_method, name: fault if given_method == method else ""
    started = time.monotonic()
    with pytest.raises(CopyError) as caught:
        if method == "GET":
            objects.get("a", 1000)
        else:
            objects.put("a", b"y" * 1000)
    assert TOKEN not in str(caught.value)
    assert time.monotonic() - started < 40  # the store's own time is 60


def test_an_answer_that_announces_less_than_it_has_is_noticed(server: TlsStore) -> None:
    objects = connect(server)
    objects.put("a", wggw.pack({}, b"x" * 1000, None))
    assert wggw.unpack("a", objects.get("a", 1000), None) == ({}, b"x" * 1000)
    server.fault = lambda method, name: "announce less" if method == "GET" else ""
    with pytest.raises(CopyDamaged):
        wggw.unpack("a", objects.get("a", 1000), None)


def test_connections_that_a_firewall_forgot_cost_one_timeout(
    server: TlsStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = connect(server)
    objects.get_all([str(number) for number in range(8)], 1000)
    kept = list(objects._idle)
    monkeypatch.setattr(wggw, "COPY_TIMEOUT", 0.5)
    for connection in kept:
        connection.sock.settimeout(0.5)
    forgotten = ["stall"]
    server.fault = lambda method, name: forgotten.pop() if forgotten else ""
    assert objects.put("a", b"x") and not forgotten
    assert not set(objects._idle) & set(kept)


def test_what_no_store_says_is_not_taken_for_an_absent_object() -> None:
    """S3 names the reason: a proxy's page is another thing."""
    for checks, code, absent in (
        (True, b"<Code>NoSuchKey</Code>", True), (True, b"", False),
        (True, b"<Code>NoSuchBucket</Code>", False), (False, b"", True),
    ):  # fmt: skip
        objects = ObjectStore("https://s3.example.org", lambda *_: {}, checks)
        answer = mock.Mock(return_value=(404, code))
        with mock.patch.object(objects, "_exchange", answer):
            if absent:
                assert objects.get("a", 100) is None
            else:
                with pytest.raises(CopyError, match="404"):
                    objects.get("a", 100)


def test_a_drip_of_bytes_does_not_get_around_the_deadline(
    server: TlsStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wggw, "COPY_DEADLINE", 1.0)
    objects = connect(server)
    objects.put("a", b"x" * 1000)
    server.RequestHandlerClass = type("Drip", (server.RequestHandlerClass,), {"do_GET": _drip})
    objects = connect(server)  # the kept connection has the handler from before
    started = time.monotonic()
    with pytest.raises(CopyError):
        objects.get("a", 1000)
    assert time.monotonic() - started < 60  # all of it takes 100


def _drip(handler: Any) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(1000):
        handler.wfile.write(b"x")
        time.sleep(0.1)


def test_a_copy_over_tls_survives_all_of_it(tmp_path: Path, server: TlsStore) -> None:
    """Random faults while the store changes; at the end, and whenever asked, the copy is right."""
    chance = random.Random(3)
    faults = ["refuse", "hang up", "truncate", "keep half", "lose the answer", "announce less"]
    objects = connect(server)
    with Node(tmp_path, objects) as node:
        seen = {0: node.state}
        for number in range(1, 40 if LONG else 15):
            node.put(a_peer(number))
            seen[number] = node.state
            server.fault = lambda method, name: chance.choice(["", "", "", *faults])
            node.tick()
            server.fault = lambda method, name: ""
            found = copied(objects, tmp_path)
            told = node.copier.state().number
            assert found in [state for n, state in seen.items() if n >= told]
            if number % 5 == 0:
                node.save()
        for _ in range(3):
            node.tick()
        assert copied(objects, tmp_path) == node.state
        state = node.copier.state()
        assert (state.number, state.lag_records, state.failure) == (number, 0, None)
