"""A request's cost does not depend on how many peers there are.

The work at 20,000 peers is compared with that at 200 in the same run, counted in steps of SQLite's
virtual machine and calls of the interpreter. What the lander does comes on top, in its own thread.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import World, build, do
from harness import a_key

import wggw

FEW, MANY = 200, 20_000
REPEATS = 20


class Work:
    """Counts calls of the interpreter in this thread and, in tens, steps of SQLite."""

    def __init__(self, store: wggw.Store) -> None:
        self._db = store._db
        self.steps = 0

    def _count(self, *_: Any) -> None:
        self.steps += 1

    def __enter__(self) -> Work:
        self._db.set_progress_handler(self._count, 10)
        sys.setprofile(self._count)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.setprofile(None)
        self._db.set_progress_handler(None, 10)


def fill(directory: Path, peers: int) -> World:
    """The rare kind is far from the beginning."""
    world = build(directory, WG_IPV4_SUBNET="10.64.0.0/16")
    fields = [{"public_key": a_key(n)} for n in range(peers)]
    named = {given["public_key"]: wggw.Desired("", given) for given in fields}
    world.gateway.sync(named, False, True)
    for n in range(5):
        do(world.gateway, "set_status", public_key=a_key(peers - 1 - n), status="suspended")
    return world


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, World]:
    few, many = (tmp_path_factory.mktemp("growth") for _ in range(2))
    return fill(few, FEW), fill(many, MANY)


def page(world: World, after: int, **chosen: Any) -> int:
    view = world.gateway.view()
    return len(world.store.configurations.page(after, 10, wggw.Filter(**chosen), view)[0])


def decide(rule: str, **fields: Any) -> Callable[[World, int], Any]:
    """What the owner does for a request until it submits the flight, and for its refusal."""

    def operation(world: World, number: int) -> None:
        given = {
            name: value(number) if callable(value) else value for name, value in fields.items()
        }
        before = world.store.get(given["public_key"])
        after = getattr(world.gateway.rules, rule)(before, given)
        if after != before:
            flight = wggw.Flight()
            world.gateway.ledger.add(flight, wggw.Step(before, after))
            flight.complete()
            for _ in world.gateway.ledger.release(flight, refused=True):
                pass

    return operation


OPERATIONS: dict[str, Callable[[World, int], Any]] = {
    "create": decide("create", public_key=lambda n: a_key(("new", n))),
    "create again": decide("create", public_key=a_key),
    "get": lambda world, n: world.store.configurations.show(a_key(n), world.gateway.view()),
    "suspend": decide("set_status", public_key=a_key, status="suspended"),
    "patch": decide("update", public_key=a_key, dns="d2"),
    "rotate": decide("rotate", public_key=a_key, new_public_key=lambda n: a_key(("new", n))),
    "delete": decide("delete", public_key=a_key),
    "page": page,
    "page of the rare status": lambda world, _: page(world, 0, status="suspended"),
    "page of an interface": lambda world, n: page(world, n, interface="wg0"),
    "figures": lambda world, _: world.gateway.figures(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_work_does_not_grow_with_the_number_of_peers(
    worlds: tuple[World, World], name: str
) -> None:
    costs = []
    for world in worlds:
        with world.lock, Work(world.store) as work:
            for number in range(REPEATS):
                OPERATIONS[name](world, 20 + number)
        costs.append(work.steps)
    assert costs[1] <= 2 * costs[0], costs


def applied(world: World, record: wggw.Record) -> int:
    with world.lock, Work(world.store) as work:
        world.store.apply(record)
    return work.steps


def test_what_a_landing_does_with_the_rows_does_not_grow(worlds: tuple[World, World]) -> None:
    costs = []
    for world in worlds:
        peer = world.store.get(a_key(30))
        assert peer is not None
        records = [
            wggw.Record([peer._replace(dns="d2")]),
            wggw.Record(traffic=[wggw.TrafficRow(peer.id, 1, 2, 3, 4, 5)]),
            wggw.Record(delete=[peer.id]),
            wggw.Record([peer]),
        ]
        costs.append([applied(world, record) for record in records])
    for few, many in zip(*costs, strict=True):
        assert many <= 2 * few, costs


def test_a_page_of_who_is_online_looks_at_so_many_peers_and_no_more(
    worlds: tuple[World, World],
) -> None:
    world = worlds[1]
    chosen, view = wggw.Filter(online=True), world.gateway.view()
    with world.lock, Work(world.store) as work:
        rows, after = world.store.configurations.page(0, 10, chosen, view)
    assert rows == [] and after is not None
    assert work.steps < 12 * wggw.PAGE_SCAN
    pages = 1
    while after is not None:
        _, after = world.store.configurations.page(after, 10, chosen, view)
        pages += 1
    assert pages == MANY // wggw.PAGE_SCAN
