"""A request's cost does not depend on how many peers there are.

The work at 20,000 peers is compared with that at 200 in the same run, counted in steps of SQLite's
virtual machine and calls of the interpreter.
"""

from __future__ import annotations

import sys
import time
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


def shake_hands(gateway: wggw.Gateway, peers: list[wggw.Peer]) -> None:
    """Now, which is only for these peers."""
    states = [wggw.PeerState(wggw.wire_peer(peer), int(time.time()), 1, 1) for peer in peers]
    gateway.store.sample(states)


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[wggw.Gateway, ...]]:
    """By who is rare: few that are online, far from the beginning, or few that are not."""
    found = {}
    for rare in (True, False):
        gateways = []
        for peers in (FEW, MANY):
            gateway = fill(tmp_path_factory.mktemp("online") / "box", peers)
            every = gateway.store.peers_after(0, peers)
            shake_hands(gateway, every[-9:-5] if rare else [*every[:-9], *every[-5:]])
            gateways.append(gateway)
        found[rare] = tuple(gateways)
    return found


@pytest.mark.parametrize("rare", [True, False])
def test_a_page_of_who_is_online_or_not_does_not_look_at_the_others(
    online: dict[bool, tuple[wggw.Gateway, ...]], rare: bool
) -> None:
    costs = []
    for gateway in online[rare]:
        chosen = wggw.Filter(online=rare, online_since=gateway.online_since())
        gateway.page(0, 10, chosen)
        with Work(gateway.store) as work:
            assert len(gateway.page(0, 10, chosen)) == 4
        costs.append(work.steps)
    assert costs[1] <= 2 * costs[0], costs


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
