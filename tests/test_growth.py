"""A request's cost does not depend on how many peers there are.

The work at 20,000 peers is compared with that at 200 in the same run, counted in steps of SQLite's
virtual machine and calls of the interpreter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import a_key
from test_sync import Box

import wggw

FEW, MANY = 200, 20_000
REPEATS = 20


class Work:
    """Counts calls of the interpreter and, in tens, steps of SQLite."""

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


def fill(directory: Path, peers: int) -> wggw.Gateway:
    directory.mkdir()
    box = Box(directory)
    box.sync([{"public_key": a_key(n)} for n in range(peers)])
    for n in range(5):  # the rare kind, far from the beginning
        box.gateway.set_status(a_key(peers - 1 - n), "suspended")
    return box.gateway


@pytest.fixture(scope="module")
def gateways(tmp_path_factory: pytest.TempPathFactory) -> tuple[wggw.Gateway, wggw.Gateway]:
    directory = tmp_path_factory.mktemp("growth")
    return fill(directory / "few", FEW), fill(directory / "many", MANY)


def suspended(gateway: wggw.Gateway) -> int:
    chosen = wggw.Filter(status="suspended")
    return len(gateway.page(0, 3, chosen))


OPERATIONS: dict[str, Callable[[wggw.Gateway, int], Any]] = {
    "create": lambda g, n: g.create({"public_key": a_key(("new", n))}),
    "create again": lambda g, n: g.create({"public_key": a_key(n)}),
    "get": lambda g, n: g.get(a_key(n)),
    "suspend": lambda g, n: g.set_status(a_key(n), "suspended"),
    "activate": lambda g, n: g.set_status(a_key(n), "active"),
    "patch": lambda g, n: g.update(a_key(n), {"dns": "d2"}),
    "delete": lambda g, n: g.delete(a_key(n)),
    "page": lambda g, n: g.page(n, 10, wggw.Filter()),
    "page of the rare status": lambda g, _: suspended(g),
    "page of an interface": lambda g, n: g.page(n, 10, wggw.Filter(interface="wg0")),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_work_does_not_grow_with_the_number_of_peers(
    gateways: tuple[wggw.Gateway, wggw.Gateway],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wggw, "SWEEP_PEERS", 0)  # reading all counters is for small ones only
    costs = []
    for gateway in gateways:
        with Work(gateway.store) as work:
            for number in range(REPEATS):
                OPERATIONS[name](gateway, 20 + number)
        costs.append(work.steps)
    assert costs[1] <= 2 * costs[0], costs
