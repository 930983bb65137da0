"""/api/v1/changes and /usage. Who follows them through histories: model/test_followers.py."""

from __future__ import annotations

import errno
import itertools
import json
import os
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from fakes import a_request, build, do
from harness import Client, a_key, ok, path_key, running, wait_for
from test_store import a_peer

import wggw

PEERS = "/api/v1/configurations/"
VIEW = wggw.View(0, {"d1": ("1.1.1.1",)}, ())


def listed(store: wggw.Store) -> dict[str, Any]:
    keys = [peer.public_key for peer in store.peers_after(0, 10_000)]
    return {key: json.loads(store.configurations.show(key, VIEW) or "null") for key in keys}


def test_changes_that_a_crash_took_make_followers_begin_again(tmp_path: Path) -> None:
    world = build(tmp_path, DURABILITY="none")
    do(world.gateway, "create", public_key=a_key(1))
    world.gateway.lander.snapshot()
    kept = world.store.feeds.sequence
    do(world.gateway, "create", public_key=a_key(2))
    seen = world.store.feeds.sequence
    world.crash()
    world.open()
    assert list(listed(world.store)) == [a_key(1)]
    world.store.feeds.check(kept)
    for after in (seen, seen + 5):
        with pytest.raises(wggw.Gone):
            world.store.feeds.check(after)
    do(world.gateway, "create", public_key=a_key(3))
    assert world.store.feeds.sequence > seen
    with pytest.raises(wggw.Gone):
        world.store.feeds.check(seen)
    [(_, change)] = world.store.feeds.changes(kept, 9, VIEW)
    assert json.loads(change)["public_key"] == a_key(3)
    world.close()


def test_a_disk_that_is_full_at_the_start_after_a_crash_lets_no_follower_miss_a_change(
    tmp_path: Path,
) -> None:
    world = build(tmp_path, DURABILITY="interval")
    world.gateway.lander.flush()
    size = world.files.journal.size
    do(world.gateway, "create", public_key=a_key("lost"))
    seen = world.store.feeds.sequence
    world.crash()
    os.truncate(world.files.journal.path, size)
    world.disk.fail("write", error=errno.ENOSPC, forever=True)
    world.open()
    world.disk.heal()
    for _ in range(2):
        world.gateway.lander.heal()
        do(world.gateway, "create", public_key=a_key(world.store.number))
        with pytest.raises(wggw.Gone):
            world.store.feeds.check(seen)
        world.reopen()
    world.close()


def test_a_first_list_that_a_crash_interrupts_begins_again(tmp_path: Path) -> None:
    """Its last page ended with a change that the crash took."""
    world = build(tmp_path, DURABILITY="interval")
    for number in range(3):
        do(world.gateway, "create", public_key=a_key(number))
    world.gateway.lander.flush()
    size, kept = world.files.journal.size, world.store.feeds.sequence
    do(world.gateway, "create", public_key=a_key("lost"))
    lost = world.store.feeds.sequence
    world.crash()
    os.truncate(world.files.journal.path, size)
    world.open()
    world.store.feeds.check(-kept)
    with pytest.raises(wggw.Gone):
        world.store.feeds.check(-lost)
    world.close()


@pytest.mark.parametrize("table", ["peers", "gone", "traffic"])
def test_rows_within_a_gap_move_behind_it(table: str) -> None:
    """As after the boot from a copy, which has changes that came after the two had diverged.

    Another state may have had others with the same sequences, also for whoever began a list there.
    """
    store = wggw.Store()
    store.apply(wggw.Record(put=[a_peer(1), a_peer(2)]))
    store.feeds.diverged = store.feeds.sequence
    more = {
        "peers": wggw.Record(put=[a_peer(3)]),
        "gone": wggw.Record(delete=[2]),
        "traffic": wggw.Record(traffic=[wggw.TrafficRow(1, 9, 9, 9, 9, 0)]),
    }
    store.apply(more[table])
    within = store.feeds.sequence
    store.apply(wggw.Record(settings={"feed": store.feeds.with_gap(0.0)}))
    for after in (within, -within):
        with pytest.raises(wggw.Gone):
            store.feeds.check(after)
    queries = f"SELECT sequence FROM {table}"
    sequences = [row[0] for row in store._db.execute(queries)]
    newest = max(sequences)
    assert newest > store.feeds._gaps.gaps[-1][1] and newest <= store.feeds.sequence
    assert not any(begin < n < end for n in sequences for begin, end in store.feeds._gaps.gaps)
    if table != "traffic":
        assert store.feeds.last_change == newest
    again = wggw.Store(store.image(store.number, False, False))
    assert again.feeds.sequence == store.feeds.sequence
    assert again.feeds.last_change == store.feeds.last_change


@pytest.mark.parametrize("together", [1, 3], ids=["one by one", "together"])
def test_forgotten_deletions_are_counted_exactly(
    monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    """Deleted, made again and deleted again, as replay does it, too."""
    monkeypatch.setattr(wggw, "MAX_GONE", 3)
    store, statements = wggw.Store(), list[str]()
    store._db.set_trace_callback(statements.append)
    for _ in range(4):
        for first in range(1, 7, together):
            store.apply(wggw.Record(put=[a_peer(n) for n in range(first, first + together)]))
        for first in range(1, 7, together):
            store.apply(wggw.Record(delete=list(range(first, first + together))))
        rows = store._db.execute("SELECT public_key FROM gone ORDER BY sequence").fetchall()
        assert rows == [(a_peer(n).public_key,) for n in (4, 5, 6)]
        assert store.feeds._gone == 3
    assert not any("count(" in statement for statement in statements)  # that would read them all


def test_deletions_beyond_memory_make_followers_begin_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(wggw, "MAX_GONE", 3)
    world = build(tmp_path)
    for number in range(6):
        do(world.gateway, "create", public_key=a_key(number))
    before = world.store.feeds.sequence
    for number in range(4):
        do(world.gateway, "delete", public_key=a_key(number))
    with pytest.raises(wggw.Gone):
        world.store.feeds.check(before)
    world.store.feeds.check(before + 1)
    for reopened in range(2):
        found = [json.loads(text) for _, text in world.store.feeds.changes(0, 99, VIEW)]
        there = {c["public_key"]: c["configuration"] for c in found if not c["deleted"]}
        assert there == listed(world.store), reopened
        world.reopen()
    world.close()


def test_old_gaps_become_a_floor() -> None:
    feed = wggw.Gaps()
    for start in range(70):
        begin = max([0, *(end for _, end in feed.gaps)]) + 5
        feed = feed.skipped(begin, float(start))
    assert len(feed.gaps) == 64 and 0 < feed.floor < feed.gaps[0][0]
    assert wggw.Gaps.parse(feed.encode()) == feed
    for bad in ("{}", '{"gaps": [[2, 1]], "floor": 0}', '{"gaps": [[1]], "floor": 0}', "[]"):
        with pytest.raises((ValueError, TypeError, KeyError)):
            wggw.Gaps.parse(bad)


@pytest.mark.parametrize("feed", ["changes", "usage"])
def test_what_changes_while_an_answer_is_collected_comes_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, feed: str
) -> None:
    monkeypatch.setattr(wggw, "APPLY_SLICE", 2)
    world = build(tmp_path)

    moved = itertools.count(1)

    def touch(*numbers: int) -> None:
        """Change peers' labels and totals."""
        for number in numbers:
            count = next(moved)
            do(world.gateway, "update", public_key=a_key(number), label=str(count))
            world.backend.move(a_key(number), count, count, int(world.now))
            world.gateway.projection.sample()

    for number in range(6):
        do(world.gateway, "create", public_key=a_key(number))
        touch(number)
    work: list[Iterator[None]] = []
    peers = wggw.PeerHandlers(world.gateway, work.append, lambda when, function: None)
    route = next(row for row in wggw.ROUTES if row.template == f"/api/v1/{feed}")

    def collect(after: int, *touched: int) -> Any:
        """An answer, and what it shows; behind its first slice other peers change."""
        request = a_request(route, query={"after": after})
        answers: list[wggw.Response] = []
        cast(wggw.Later[wggw.Response], route.handler(peers, request)).then(answers.append)
        steps = work.pop()
        next(steps, None)
        touch(*touched)
        assert bool(list(steps)) == bool(touched)
        content = json.loads(answers[0].body)
        return content["next"], [row["public_key"] for row in content[feed]]

    after, shown = collect(0, 0, 5)  # one that was read already, and one that was not
    assert shown == [a_key(n) for n in range(5)]
    after, shown = collect(after)
    assert shown == [a_key(0), a_key(5)]
    assert collect(after) == (after, [])
    world.close()


def test_an_answered_long_poll_keeps_nothing_until_the_end_of_its_time(tmp_path: Path) -> None:
    """With an answer for each change, a follower would fill memory with a minute of them."""
    world = build(tmp_path)
    calls: list[Any] = []
    peers = wggw.PeerHandlers(world.gateway, list, lambda when, function: calls.append(function))
    route = next(row for row in wggw.ROUTES if row.template == "/api/v1/changes")
    request = a_request(route, query={"after": world.store.feeds.sequence, "wait": 60})
    answers: list[wggw.Response] = []
    later = cast(wggw.Later[wggw.Response], route.handler(peers, request))
    later.then(answers.append)
    kept = weakref.ref(later)
    del later
    do(world.gateway, "create", public_key=a_key(1))
    wait_for(lambda: answers, what="the answer")
    assert a_key(1).encode() in answers[0].body
    assert len(calls) == 1
    wait_for(lambda: kept() is None, 10, what="its end")
    calls[0]()
    assert len(answers) == 1
    world.close()


# --- over HTTP ------------------------------------------------------------------------------------


def test_changes_over_http(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        api = gateway.client()
        made = ok(api.create(a_key(1), label="one"))
        ok(api.create(a_key(2)))
        ok(api.delete(a_key(2)))
        first = ok(api.send("GET", "/api/v1/changes"))
        [change] = first["changes"]
        assert change["configuration"] == ok(api.get(a_key(1)))
        assert change["sequence"] == change["configuration"]["sequence"] == made["sequence"]
        assert (change["deleted"], change["public_key"]) == (False, a_key(1))
        assert change["time"] == made["created_at"] or change["time"] > made["created_at"]
        again = ok(api.send("GET", f"/api/v1/changes?after={first['next']}"))
        assert again == {"changes": [], "next": first["next"]}
        since = ok(api.send("GET", f"/api/v1/changes?after={change['sequence']}"))["changes"]
        assert [(c["public_key"], c["deleted"], c["configuration"]) for c in since] == [
            (a_key(2), True, None)
        ]
        body = {"new_public_key": a_key(3)}
        ok(api.send("POST", f"{PEERS}{path_key(a_key(1))}/rotate", body))
        since = ok(api.send("GET", f"/api/v1/changes?after={first['next']}"))["changes"]
        assert {c["public_key"]: c["deleted"] for c in since} == {a_key(1): True, a_key(3): False}
        page = ok(api.send("GET", f"/api/v1/changes?after={first['next']}&limit=1"))
        rest = ok(api.send("GET", f"/api/v1/changes?after={page['next']}&limit=5"))
        assert page["changes"] + rest["changes"] == since
        assert api.send("GET", f"/api/v1/changes?after={10**18}").status == 410
        for wrong in ("after=x", "limit=0", "limit=1001", "wait=61", "wait=-1"):
            assert api.send("GET", f"/api/v1/changes?{wrong}").status == 422
        assert api.send("GET", "/api/v1/changes?since=1").status == 400


def waiting(client: Client, path: str) -> tuple[threading.Thread, list[tuple[float, Any]]]:
    answers: list[tuple[float, Any]] = []

    def ask() -> None:
        answer = client.send("GET", path)
        answers.append((time.monotonic(), answer.json))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    return thread, answers


def test_a_request_waits_for_the_first_change(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        api = gateway.client()
        ok(api.create(a_key(1)))
        after = ok(api.send("GET", "/api/v1/changes"))["next"]
        path = f"/api/v1/changes?after={after}&wait=30"
        asked = [waiting(gateway.client(), path) for _ in range(20)]
        time.sleep(0.5)
        assert not any(answers for _, answers in asked)
        began = time.monotonic()
        ok(api.create(a_key(2)))
        for thread, answers in asked:
            thread.join(20)
            [(when, answer)] = answers
            assert when - began < 25
            assert [c["public_key"] for c in answer["changes"]] == [a_key(2)]
        after = answer["next"]
        began = time.monotonic()
        nothing = ok(api.send("GET", f"/api/v1/changes?after={after}&wait=1"))
        assert nothing == {"changes": [], "next": after}
        assert 0.9 < time.monotonic() - began < 10


def test_who_waits_is_answered_when_the_gateway_stops(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        ok(gateway.client().create(a_key(1)))
        after = ok(gateway.client().send("GET", "/api/v1/changes"))["next"]
        thread, answers = waiting(gateway.client(), f"/api/v1/changes?after={after}&wait=60")
        time.sleep(0.5)
        began = time.monotonic()
        assert gateway.stop() == 0
        assert time.monotonic() - began < 25
        thread.join(30)
        assert answers[0][1] == {"changes": [], "next": after}


def test_usage_has_those_whose_totals_changed(tmp_path: Path) -> None:
    world = build(tmp_path)
    for number in range(5):
        do(world.gateway, "create", public_key=a_key(number))
    for number in range(3):
        world.backend.move(a_key(number), 100 + number, 7, int(world.now))
    world.gateway.projection.sample()
    store = world.store

    def keys(after: int, limit: int) -> list[str]:
        return [json.loads(text)["public_key"] for _, text in store.feeds.usage(after, limit)]

    assert keys(0, 2) == [a_key(0), a_key(1)]
    after = store.feeds.next_after(0, store.feeds.usage(0, 2)[-1][0], store.feeds.sequence, True)
    [(_, text)] = store.feeds.usage(after, 2)
    assert json.loads(text) == {
        "public_key": a_key(2),
        "rx_bytes": 102,
        "tx_bytes": 7,
        "last_handshake": wggw.rfc3339(world.now),
    }
    after = store.feeds.sequence
    world.gateway.projection.sample()
    assert keys(after, 9) == []
    world.backend.move(a_key(4), 1)
    world.gateway.projection.sample()
    assert keys(after, 9) == [a_key(4)]
    assert store.feeds.changes(after, 9, VIEW) == []  # traffic is no change
    before = store.feeds.usage(0, 9)
    world.crash()
    world.open()
    assert world.store.feeds.usage(0, 9) == before
    world.close()


def test_usage_over_http(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        api = gateway.client()
        ok(api.create(a_key(1)))
        first = ok(api.send("GET", "/api/v1/usage"))
        assert first["usage"] == [] and first["next"] > 0
        assert ok(api.send("GET", f"/api/v1/usage?after={first['next']}")) == first
        assert api.send("GET", f"/api/v1/usage?after={10**18}").status == 410
        assert api.send("GET", "/api/v1/usage?limit=10001").status == 422
        wait_for(lambda: True)
