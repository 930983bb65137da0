"""The rows: what records do to them, live and replayed, and what is read of them."""

from __future__ import annotations

import itertools
import json
import platform
import random
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, a_key
from hypothesis import given, settings
from hypothesis import strategies as st

import wggw
from wggw import Filter, JournalFile, Landing, Peer, Record, Store, TrafficRow


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


def store_of(*peers: Peer) -> Store:
    store = Store()
    store.apply(Record(peers))
    return store


def everything(store: Store) -> list[Any]:
    """All rows; of the released addresses their order, not its numbers."""
    queries = (
        "SELECT * FROM peers ORDER BY id",
        "SELECT address FROM released ORDER BY sequence",
        "SELECT * FROM traffic ORDER BY id",
    )
    return [store._db.execute(query).fetchall() for query in queries] + [+store.counts.peers]


# --- records --------------------------------------------------------------------------------------


class History:
    """Random records that fit, and what the rows must be behind each."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.peers: dict[int, Peer] = {}
        self.totals: dict[int, TrafficRow] = {}
        self.released: list[str] = []
        self.next_id = 1
        self.fresh = 1

    def record(self) -> Record:
        rng, before = self.rng, dict(self.peers)
        gone = [i for i in self.peers if rng.random() < 0.15]
        for number in gone:
            del self.peers[number]
            self.totals.pop(number, None)
        put: dict[int, Peer] = {}
        for number, peer in self.peers.items():
            kind = rng.random()
            if kind < 0.2:
                put[number] = peer._replace(status=rng.choice(["active", "suspended"]))
            elif kind < 0.3:
                self.fresh += 1
                put[number] = peer._replace(public_key=a_key(("key", self.fresh)))
        self._trade(put)
        for _ in range(rng.randrange(5)):
            self.fresh += 1
            address = f"10.1.{self.fresh // 250}.{self.fresh % 250}"
            if self.released and rng.random() < 0.5:
                address = rng.choice(self.released)
            if address not in {p.assigned_ip for p in (*self.peers.values(), *put.values())}:
                name = a_key(("new", self.fresh))
                put[self.next_id] = a_peer(self.next_id, public_key=name, assigned_ip=address)
                self.next_id += 1
        self.peers |= put
        traffic = [
            TrafficRow(number, *(rng.randrange(99) for _ in range(5)))
            for number in self.peers
            if rng.random() < 0.2
        ]
        self._follow(before, gone, put, traffic)
        return Record(list(put.values()), gone, traffic)

    def _trade(self, put: dict[int, Peer]) -> None:
        """Some give each other their addresses, or their keys, all round."""
        some = [n for n in self.peers if self.rng.random() < 0.3]
        for field in ("assigned_ip", "assigned_ipv6", "public_key"):
            if self.rng.random() < 0.5:
                values = [getattr(put.get(n, self.peers[n]), field) for n in some]
                for number, value in zip(some, values[1:] + values[:1], strict=True):
                    given: dict[str, Any] = {field: value}
                    put[number] = put.get(number, self.peers[number])._replace(**given)

    def _follow(
        self,
        before: dict[int, Peer],
        gone: list[int],
        put: dict[int, Peer],
        traffic: list[TrafficRow],
    ) -> None:
        held = {a for p in self.peers.values() for a in (p.assigned_ip, p.assigned_ipv6)}
        for number in (*gone, *put):
            known = before.get(number)
            for address in (known.assigned_ip, known.assigned_ipv6) if known else ():
                if address and address not in held:
                    self.released.append(address)
            after = put.get(number)
            left = (
                known
                and after
                and (known.public_key, known.status)
                != (
                    after.public_key,
                    after.status,
                )
            )
            if left and number in self.totals:
                self.totals[number] = self.totals[number]._replace(rx_seen=0, tx_seen=0)
        self.released = [address for address in self.released if address not in held]
        self.totals |= {row.id: row for row in traffic}

    def check(self, store: Store) -> None:
        assert store.peers_after(0, 10_000) == [self.peers[n] for n in sorted(self.peers)]
        rows = store._db.execute(
            f"SELECT {', '.join(TrafficRow._fields)} FROM traffic ORDER BY id"
        ).fetchall()
        assert rows == [tuple(self.totals[n]) for n in sorted(self.totals)]
        assert store.released.addresses() == self.released
        kinds = Counter((p.interface, p.status) for p in self.peers.values())
        assert +store.counts.peers == kinds
        assert store.counts.next_id > max(self.peers, default=0)


@pytest.mark.parametrize("slices", [1, 3, 250])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_rows_are_right_after_any_history_and_replay_gives_the_very_same(
    slices: int, seed: int
) -> None:
    """Peers that come, go, and trade addresses and keys; applied at once or in slices."""
    history, live, landings = History(seed), Store(), []
    limit = wggw.APPLY_SLICE
    wggw.APPLY_SLICE = slices
    try:
        for number in range(1, 13):
            record = history.record()
            before = {peer.id: peer for peer in live.peers_after(0, 10_000)}
            after = {peer.id: peer for peer in record.put}
            for _ in live.apply_in_slices(record):
                check_between(live, before, after, set(record.delete))
            history.check(live)
            text = json.loads(wggw.encode_record(record))
            landings.append(Landing(number, [text]))
    finally:
        wggw.APPLY_SLICE = limit
    replayed = Store()
    replayed.replay(JournalFile(0, Peer._fields, landings, 0, 0, b""), "name")
    assert everything(replayed) == everything(live)
    assert replayed.number == 12


def check_between(
    store: Store, before: dict[int, Peer], after: dict[int, Peer], gone: set[int]
) -> None:
    """Amid a record each peer is as it was or as it will be; none that stays is missing."""
    now = {peer.id: peer for peer in store.peers_after(0, 10_000)}
    for number in before.keys() - gone:
        assert now[number] in (before[number], after.get(number))
    assert +store.counts.peers == Counter((p.interface, p.status) for p in now.values())


def replayed(records: list[Record], store: Store | None = None) -> Store:
    landings = [Landing(n, [json.loads(wggw.encode_record(r))]) for n, r in enumerate(records, 1)]
    store = store or Store()
    store.replay(JournalFile(0, Peer._fields, landings, 0, 0, b""), "name")
    return store


def test_void_records_never_count_whatever_follows_them() -> None:
    store = replayed(
        [
            Record([a_peer(1)]),
            Record(delete=[1]),
            Record([a_peer(2)]),
            Record(void=[2, 3]),
            Record([a_peer(1, dns="d2")]),
        ]
    )
    assert store.peers_after(0, 9) == [a_peer(1, dns="d2")]
    assert store.released.addresses() == []
    assert store.number == 5


@pytest.mark.parametrize("name", ["public_key", "assigned_ip", "assigned_ipv6"])
def test_what_another_peer_has_is_refused(name: str) -> None:
    store = store_of(a_peer(1))
    with pytest.raises(wggw.sqlite3.IntegrityError):
        store.apply(Record([a_peer(3, **{name: getattr(a_peer(1), name)})]))


def test_delete_of_a_peer_that_is_not_there_is_refused() -> None:
    with pytest.raises(wggw.sqlite3.IntegrityError):
        Store().apply(Record(delete=[1]))


def test_only_the_last_landing_leaves_counters_in_doubt() -> None:
    restart = Record(restart=[(1, 7, 8)])
    rows = Record([a_peer(1)], traffic=[TrafficRow(1, 9, 9, 7, 8, 0)])
    assert replayed([rows, restart]).restarted == {1: (7, 8)}
    assert replayed([rows, restart, Record([a_peer(2)])]).restarted == {}
    assert replayed([rows, restart]).traffic(1) == TrafficRow(1, 9, 9, 0, 0, 0)


def test_applying_totals_twice_changes_nothing() -> None:
    """A snapshot that holds a record already is not harmed by it."""
    record = Record(traffic=[TrafficRow(1, 5, 6, 7, 8, 9), TrafficRow(2, 1, 1, 1, 1, 1)])
    store = store_of(a_peer(1))
    for _ in range(2):
        store.apply(record)
        assert store.traffic(1) == TrafficRow(1, 5, 6, 7, 8, 9)
        assert store.traffic(2) == TrafficRow(2)  # of a peer that is not there


def test_counters_that_fell_began_at_0() -> None:
    row = TrafficRow(1, 0, 0, 0, 0, 0)
    for counted in ((100, 10, 5), (150, 10, 7), (150, 10, 7), (30, 2, 6), (40, 5, 0)):
        row = row.counted(*counted)
    assert row == TrafficRow(1, 150 + 40, 10 + 5, 40, 5, 6)
    # One direction that fell proves it of both; totals stay what SQLite can hold.
    assert TrafficRow(1, 100, 100, 100, 100, 0).counted(500, 20, 0)[1:3] == (600, 120)
    assert TrafficRow(1, wggw.MAX_TOTAL, 0, 0, 0, 0).counted(9, 9, 0).rx_bytes == wggw.MAX_TOTAL


# --- what is read ---------------------------------------------------------------------------------


def test_one_reading_for_an_interface_takes_no_more_rows_than_it_says() -> None:
    """Peers of another interface, too, or a slice would be a whole table without one's own."""
    store = store_of(
        *(a_peer(number, interface="wg1") for number in (1, 3, 5, 7)),
        a_peer(8),
        a_peer(9, status="suspended"),
    )
    assert store.queries.held_rows("wg0", "ipv6", 1, 2) == [(3, None), (5, None)]
    assert store.queries.held_rows("wg0", "ipv6", 5, 9) == [(7, None), (8, None), (9, "fd00::b")]
    assert [row[:2] for row in store.queries.wire_rows("wg0", 1, 2)] == [(3, None), (5, None)]
    assert [row[:2] for row in store.queries.wire_rows("wg0", 7, 9)] == [(8, a_key(8)), (9, None)]


def test_all_addresses_of_an_interface_are_found() -> None:
    peers = [
        a_peer(1, assigned_ipv6="fd00::1"),
        a_peer(2, assigned_ipv6="fd00::2", interface="wg1"),
        a_peer(3, assigned_ipv6=None),
    ]
    queries = store_of(*peers).queries
    assert queries.held("wg0", "ipv4") == [peers[0].assigned_ip, peers[2].assigned_ip]
    assert queries.held("wg0", "ipv6") == [peers[0].assigned_ipv6]
    assert queries.held("wg1", "ipv6") == [peers[1].assigned_ipv6]
    assert queries.held("wg2", "ipv6") == []


def test_counters_of_an_interface_are_seen_until_they_restart() -> None:
    store = store_of(*(a_peer(number) for number in (1, 2, 3, 4)))
    totals = [
        TrafficRow(1, 9, 9, 0, 7, 1),
        TrafficRow(2, 9, 9, 0, 0, 1),
        TrafficRow(3, 9, 9, 5, 0, 1),
    ]
    store.apply(Record(traffic=totals))
    keys = [a_key(number) for number in range(1, 9)]

    def seen(keys: list[str]) -> dict[str, wggw.Seen]:
        found: dict[str, wggw.Seen] = {}
        for row in store.queries.counted("wg0", keys).values():
            wggw.note_seen(found, row)
        return found

    assert seen(keys) == {a_key(1): (1, 0, 7), a_key(3): (3, 5, 0)}
    assert seen(keys[1:2]) == seen([]) == {}
    store.apply(Record(restart=[(1, 0, 0)]))
    assert seen(keys) == {a_key(3): (3, 5, 0)}


def test_a_query_about_a_few_peers_does_not_read_the_others() -> None:
    """Once SQLite read all active peers for each few: 120 times all in a sample of 60,000."""
    store = store_of(*(a_peer(number) for number in range(1, 3001)))
    for number in range(1, 3001):
        store.apply(Record(traffic=[TrafficRow(number, 1, 1, 1, 1, 1765200000)]))
    view = wggw.View(0, {"d1": ()}, ())
    queries, shown, feeds = store.queries, store.configurations, store.feeds
    few = [a_key(number) for number in range(10)]
    kinds = [Filter(), Filter("active"), Filter(interface="wg0"), Filter(label="none of them")]
    for ask in [
        lambda: queries.counted("wg0", few),
        lambda: queries.counted("wg0", []),
        lambda: queries.wire_rows("wg0", 1500, 9),
        lambda: queries.held_rows("wg0", "ipv4", 1500, 9),
        lambda: queries.totals_after(1500, 9),
        lambda: queries.expired(1765200000, (0, 0), 9),
        lambda: queries.quotas(0, 9),
        lambda: queries.periodic(["day"], 0, 9),
        lambda: queries.last_handshakes(9),
        lambda: store.get(a_key(7)),
        lambda: store.traffic(7),
        lambda: store.peers_after(1500, 9),
        lambda: shown.show(a_key(7), view),
        lambda: feeds.changes(1500, 9, view),
        lambda: feeds.usage(4500, 9),
        *(lambda kind=kind: shown.page(1500, 9, kind, view) for kind in kinds),
        lambda: store.apply(Record([a_peer(5, label="changed")])),
        lambda: store.apply(Record(delete=[6])),
    ]:
        assert steps_of(store, ask) < 2000


def steps_of(store: Store, ask: Callable[[], object]) -> int:
    """How many instructions of its virtual machine SQLite takes: at least one for each row."""
    steps = itertools.count()
    store._db.set_progress_handler(lambda: next(steps) < 0, 1)
    ask()
    store._db.set_progress_handler(None, 0)
    return next(steps)


@pytest.fixture
def many() -> Store:
    """23 peers, every third one suspended; every second one had a handshake, later and later."""
    store = store_of(
        *(
            a_peer(n, status="active" if n % 3 else "suspended", interface=f"wg{n % 2}")
            for n in range(1, 24)
        )
    )
    store.apply(Record(traffic=[TrafficRow(n, 1, 1, 1, 1, 1000 + n) for n in range(1, 24, 2)]))
    return store


def listed(store: Store, chosen: Filter) -> list[int]:
    found: list[int] = []
    after: int | None = 0
    while after is not None:
        view = wggw.View(1010, {"d1": ()}, ())
        rows, following = store.configurations.page(after, 5, chosen, view)
        assert len(rows) <= 5
        found += [number for number, _ in rows]
        assert following is None or following > after
        after = following
    return found


@pytest.mark.parametrize("scan", [3, 4000])
def test_pages_give_every_peer_once_in_order(
    many: Store, monkeypatch: pytest.MonkeyPatch, scan: int
) -> None:
    monkeypatch.setattr(wggw, "PAGE_SCAN", scan)
    online = [n for n in range(11, 24, 2) if n % 3]
    assert listed(many, Filter()) == [*range(1, 24)]
    assert listed(many, Filter(status="suspended")) == [*range(3, 24, 3)]
    assert listed(many, Filter(interface="wg1", status="active")) == [
        n for n in range(1, 24, 2) if n % 3
    ]
    assert listed(many, Filter(interface="wg9")) == []
    assert listed(many, Filter(online=True)) == online
    offline = [n for n in range(1, 24) if n not in online]
    assert listed(many, Filter(online=False)) == offline
    assert listed(many, Filter("active", "wg1", True)) == online
    assert many.queries.online(1010) == len(online)


def test_quota_and_expiry_find_peers_whose_status_is_to_change() -> None:
    store = store_of(
        *(
            a_peer(number, status=status, quota_bytes=50, expires_at=100 + number)
            for number, status in ((1, "active"), (2, "suspended"), (3, "active"))
        ),
        a_peer(4, status="suspended", status_reason="expired", expires_at=200),
        *(
            a_peer(n, status="suspended", status_reason="quota", quota_bytes=50, quota_base=base)
            for n, base in ((5, 0), (6, 50))
        ),
    )
    rows = [(1, 25, 25), (2, 100, 0), (3, 26, 25), (5, 51, 0), (6, 51, 0)]
    store.apply(Record(traffic=[TrafficRow(*row, 0, 0, 0) for row in rows]))
    assert store.queries.quotas(0, 10) == [(1, 0), (2, 0), (3, 1), (5, 0), (6, 1)]
    assert expired(store, 102) == [1, 4]  # the clock was set back for the last one
    assert expired(store, 200) == [1, 3]


def expired(store: Store, now: int, limit: int = 9) -> list[int]:
    rows = wggw.chunks(
        lambda function: function(), store.queries.expired, now, after=(0, 0), limit=limit
    )
    return [number for _, number in rows]


@pytest.mark.parametrize("limit", [1, 2, 3, 9])
def test_expired_peers_are_read_in_pieces_also_those_of_one_second(limit: int) -> None:
    store = store_of(
        *(a_peer(number, expires_at=100 + number // 4) for number in range(1, 9)),
        *(
            a_peer(n, status="suspended", status_reason="expired", expires_at=200)
            for n in range(9, 13)
        ),
    )
    assert expired(store, 101, limit) == [*range(1, 8), *range(9, 13)]


def test_every_part_of_a_record_is_applied_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wggw, "APPLY_SLICE", 2)
    store = store_of(*(a_peer(number) for number in range(1, 6)))
    store.apply(Record(traffic=[TrafficRow(n, 9, 9, 9, 9, 0) for n in range(1, 6)]))
    released = [f"10.9.9.{n}" for n in range(5)]
    for parts in ({"restart": [(n, 0, 0) for n in range(1, 6)]}, {"released": released}):
        assert len(list(store.apply_in_slices(Record(**parts)))) == 2  # before the last row
    assert store.released.addresses() == released
    assert [store.traffic(n)[1:5] for n in range(1, 6)] == [(9, 9, 0, 0)] * 5


def test_an_image_is_read_back_with_all_that_it_held(many: Store) -> None:
    many.private_keys = {"wg0": "a key"}
    for number, with_keys in ((7, True), (8, False)):
        other = Store(many.image(number, with_keys, journaled=True))
        assert everything(other) == everything(many)
        assert (other.number, other.counts.next_id, other.journaled) == (number, 24, True)
        assert other.private_keys == (many.private_keys if with_keys else {})


WARM = """
import resource, sys, threading
import wggw

def faults():
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt

def work():
    store = wggw.Store()
    bytes(wggw.LARGEST_BLOCK)
    for megabytes in (4, 6, 9):
        store._db.execute("INSERT OR REPLACE INTO meta VALUES ('x', ?)", ("x" * (megabytes << 20),))
        if sys.argv[1] == "warm":
            wggw.warm_up(store.image_size())
        before = faults()
        image = store.image(0, False, True)
        print((faults() - before) / (len(image) / 4096))
        del image

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def resident() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_memory_that_is_free_again_goes_back_to_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Below the end of the heap, where glibc alone keeps it."""
    blocks = [b"x" * 20_000 for _ in range(2000)]
    last = b"y" * 20_000
    held = resident()
    del blocks
    wggw.return_memory()
    assert resident() < held - 20_000_000
    del last
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())  # as with another C library
    wggw.return_memory()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_an_image_is_copied_into_memory_that_is_ready() -> None:
    """Page faults of the copy, for each of its pages: of a database that grows."""

    def measured(how: str) -> list[float]:
        command = [sys.executable, "-c", WARM, how]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
        return [float(line) for line in done.stdout.split()]

    assert max(measured("warm")) < 0.1
    assert max(measured("cold")) > 0.3
