"""The address pool against a model that keeps plain lists, and its cost."""

from __future__ import annotations

import functools
import ipaddress
import itertools
import random
import time
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from unittest import mock

import pytest
from fakes import build
from harness import LONG
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import wggw
from wggw import AddressPool

SUBNETS = [
    "10.0.1.0/30",
    "10.0.1.0/29",
    "10.0.1.0/24",
    "10.7.0.0/16",
    "fd42:4242:1::/64",
    "fd42::/112",
    "fd42::/126",
]


def take(pool: AddressPool) -> str | None:
    """Hold the next address and return it, or None when all are held."""
    address = pool.peek()
    if address is not None:
        pool.claim(address)
    return address


def pool_of(subnet: str) -> AddressPool:
    return AddressPool(ipaddress.ip_network(subnet))


def peers_of(subnet: str, limit: int = 2000) -> list[str]:
    """The first addresses that peers can have, by counting: not the way the pool does it."""
    network = ipaddress.ip_network(subnet)
    first = [str(a) for a in itertools.islice(network, 2, 2 + limit)]
    return first[:-1] if network.version == 4 and network.num_addresses <= limit + 2 else first


class Machine(RuleBasedStateMachine):
    """Histories of take, claim, release and restart. The model: who is held, who was released when.

    `spread` bounds how far from the start of the subnet claims are made, so that small subnets are
    exhausted and addresses meet each other in large ones.
    """

    @initialize(subnet=st.sampled_from(SUBNETS))
    def begin(self, subnet: str) -> None:
        self.subnet = subnet
        self.pool = pool_of(subnet)
        self.order = peers_of(subnet)
        self.held: set[str] = set()
        self.released: list[str] = []  # oldest first

    def expected(self) -> str | None:
        """Never used first, lowest first; then the one released longest ago."""
        for address in self.order:
            if address not in self.held and address not in self.released:
                return address
        return self.released[0] if self.released else None

    def hold(self, address: str) -> None:
        self.held.add(address)
        if address in self.released:
            self.released.remove(address)

    @rule()
    def take(self) -> None:
        expected = self.expected()
        assert self.pool.peek() == expected
        assert take(self.pool) == expected
        if expected is not None:
            self.hold(expected)

    @rule(data=st.data())
    def claim(self, data: st.DataObject) -> None:
        address = data.draw(st.sampled_from(self.order[:40]))
        free = address not in self.held
        assert self.pool.is_free(address) == free
        if free:
            self.pool.claim(address)
            self.hold(address)
        else:
            with pytest.raises(ValueError, match=address):
                self.pool.claim(address)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        address = data.draw(st.sampled_from(sorted(self.held)))
        self.pool.release(address)
        self.held.remove(address)
        self.released.append(address)

    @rule(data=st.data())
    def undo_claims(self, data: st.DataObject) -> None:
        free = [address for address in self.order[:40] if address not in self.held]
        chosen = data.draw(st.lists(st.sampled_from(free), unique=True)) if free else []
        claimed = [(address, self.pool.claim(address)) for address in chosen]
        for undone in data.draw(st.permutations(claimed)):
            self.pool.put_back(*undone)

    @rule(data=st.data())
    def release_of_a_free_address_is_refused(self, data: st.DataObject) -> None:
        address = data.draw(st.sampled_from(self.order[:40]))
        if address not in self.held:
            with pytest.raises(ValueError, match=address):
                self.pool.release(address)

    @rule(shuffle=st.randoms(use_true_random=False))
    def restart(self, shuffle: random.Random) -> None:
        held = sorted(self.held)
        shuffle.shuffle(held)
        self.pool = pool_of(self.subnet)
        self.pool.restore(held, self.released)

    @invariant()
    def counts_are_right(self) -> None:
        if hasattr(self, "pool"):
            assert self.pool.used == len(self.held)


Machine.TestCase.settings = settings(
    max_examples=120 if LONG else 40, stateful_step_count=40, deadline=None
)
TestPoolIsItsModel = Machine.TestCase


@pytest.mark.parametrize("subnet", SUBNETS)
def test_gateway_network_and_broadcast_are_never_given(subnet: str) -> None:
    pool, network = pool_of(subnet), ipaddress.ip_network(subnet)
    assert pool.gateway == network.network_address + 1
    outside = [network.network_address - 1, network.broadcast_address + 1]
    excluded = [network.network_address, pool.gateway, *outside]
    if network.version == 4:
        excluded.append(network.broadcast_address)
    for address in excluded:
        assert not pool.is_free(str(address))
        for refused in (pool.claim, pool.release):
            with pytest.raises(ValueError, match=str(address)):
                refused(str(address))
    assert pool.used == 0


@pytest.mark.parametrize(
    ("subnet", "total"),
    [
        ("10.0.1.0/30", 1),
        ("10.0.1.0/29", 5),
        ("10.0.1.0/24", 253),
        ("10.7.0.0/16", 65533),
        ("fd42::/126", 2),
        ("fd42::/112", 65534),
        ("fd42:4242:1::/64", 2**64 - 2),
    ],
)
def test_total_counts_what_peers_can_have(subnet: str, total: int) -> None:
    assert pool_of(subnet).total == total


def test_last_address_of_ipv6_is_a_peers() -> None:
    assert pool_of("fd42::/126").is_free("fd42::3")


@pytest.mark.parametrize("subnet", ["10.0.1.0/30", "10.0.1.0/29", "10.0.1.0/24", "fd42::/126"])
def test_every_address_is_given_once_and_then_none(subnet: str) -> None:
    pool = pool_of(subnet)
    given = [take(pool) for _ in range(pool.total)]
    assert given == peers_of(subnet)
    assert take(pool) is pool.peek() is None
    assert pool.used == pool.total


def test_whole_16_is_given_once_each() -> None:
    pool = pool_of("10.7.0.0/16")
    assert len({take(pool) for _ in range(pool.total)}) == pool.total == 65533
    assert take(pool) is None


def test_never_used_addresses_go_before_released_ones() -> None:
    pool = pool_of("10.0.1.0/29")
    for address in ("10.0.1.2", "10.0.1.3"):
        assert take(pool) == address
    pool.release("10.0.1.3")
    pool.release("10.0.1.2")
    given = [take(pool) for _ in range(5)]
    assert given == ["10.0.1.4", "10.0.1.5", "10.0.1.6", "10.0.1.3", "10.0.1.2"]


@pytest.mark.parametrize("held", ["10.0.1.1", "10.0.1.255", "10.0.2.2", "10.0.1.0", "10.0.1.9"])
def test_held_addresses_that_cannot_be_here_are_refused(held: str) -> None:
    pool = pool_of("10.0.1.0/24")
    pool.exclude(["10.0.1.9"])
    with pytest.raises(ValueError):
        pool.restore(["10.0.1.8", held], [])


@pytest.mark.parametrize("kept", ["10.0.1.2", "10.0.1.3"])
def test_an_excluded_address_below_the_fresh_ones_is_refused(kept: str) -> None:
    pool = pool_of("10.0.1.0/24")
    pool.exclude(["10.0.1.2", "10.0.1.3"])
    with pytest.raises(ValueError):
        pool.restore(["10.0.1.8", kept], [])


def test_a_pool_without_any_address_to_give_may_be_empty() -> None:
    pool = pool_of("10.0.1.0/30")
    pool.exclude(["10.0.1.2"])
    pool.restore([], [])
    assert (pool.total, pool.used, pool.peek()) == (0, 0, None)


def test_an_address_held_twice_is_refused() -> None:
    with pytest.raises(ValueError):
        pool_of("10.0.1.0/24").restore(["10.0.1.9", "10.0.1.8", "10.0.1.9"], [])


def test_released_addresses_outside_a_changed_subnet_are_forgotten() -> None:
    pool = pool_of("10.0.1.0/29")
    pool.restore(["10.0.1.2"], ["10.9.9.9", "10.0.1.1", "10.0.1.200", "10.0.1.3"])
    given = [take(pool) for _ in range(5)]
    assert given == ["10.0.1.4", "10.0.1.5", "10.0.1.6", "10.0.1.3", None]


def test_behind_the_fresh_span_released_addresses_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wggw.FRESH_SPAN", 4)
    pool = pool_of("fd42::/64")
    given = [take(pool) for _ in range(3)]
    assert given == ["fd42::2", "fd42::3", "fd42::4"]
    pool.release("fd42::3")
    assert take(pool) == "fd42::3"  # all fresh ones up to the span are used
    assert take(pool) == "fd42::5"  # nothing was released: on with fresh ones


def test_memory_for_released_addresses_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A /64 under churn remembers at most FRESH_SPAN addresses, not every one it ever gave."""
    monkeypatch.setattr("wggw.FRESH_SPAN", 50)
    pool = pool_of("fd42::/64")
    seen = set()
    for _ in range(1000):
        address = take(pool)
        assert address is not None
        seen.add(address)
        pool.release(address)
    assert len(seen) <= 50


def cost(pool: AddressPool, addresses: Iterable[str]) -> float:
    """Seconds of the processor that rounds of claim, release and take need, the least of seven."""
    rounds = list(addresses)
    times = []
    for _ in range(7):
        start = time.thread_time()
        for address in rounds:
            pool.release(address)
            pool.claim(address)
            taken = take(pool)
            assert taken is not None
            pool.release(taken)
        times.append(time.thread_time() - start)
    return min(times)


def test_what_is_kept_of_undone_claims_is_bounded() -> None:
    """One address that is asked for by name and refused, again and again, behind older ones."""
    pool = pool_of("10.7.0.0/16")
    for address in [take(pool) or "" for _ in range(10)]:
        pool.release(address)
    for undone in [(a, pool.claim(a)) for a in ("10.7.0.3", "10.7.0.4")]:
        pool.put_back(*undone)
    for _ in range(10_000):
        pool.put_back("10.7.0.9", pool.claim("10.7.0.9"))
    assert len(pool._queue) < 1000


def test_claims_that_are_undone_cost_the_same_however_many_addresses_were_released() -> None:
    times = {}
    for number in (200, 20_000):
        pool = pool_of("10.7.0.0/16")
        for address in [take(pool) or "" for _ in range(number)]:
            pool.release(address)
        claimed = [(a, pool.claim(a)) for a in peers_of("10.7.0.0/16", 100)]
        start = time.thread_time()
        for undone in claimed:
            pool.put_back(*undone)
        times[number] = time.thread_time() - start
    assert times[20_000] < 10 * times[200] + 0.01


@pytest.mark.parametrize("subnet", ["10.7.0.0/16", "fd42::/64"])
def test_cost_does_not_grow_with_addresses_held(subnet: str) -> None:
    """O(n) would be 100 times slower with 100 times the peers; the factor allows for noise."""
    times = {}
    for held in (200, 20_000):
        pool = pool_of(subnet)
        given = [take(pool) or "" for _ in range(held)]
        times[held] = cost(pool, given[50:150])
    assert times[20_000] < 10 * times[200]


def test_hole_in_front_of_claims_is_filled_first() -> None:
    pool = pool_of("10.7.0.0/16")
    for address in peers_of("10.7.0.0/16", 5_002)[1:5_000]:
        pool.claim(address)
    assert take(pool) == "10.7.0.2"
    assert take(pool) == "10.7.19.138"  # offset 5002


def left(pool: AddressPool) -> list[str]:
    """The addresses that the next peers get."""
    copy = deepcopy(pool)
    return list(iter(lambda: take(copy), None))


@pytest.mark.parametrize("full", [False, True], ids=["fresh ones left", "all used before"])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
def test_claims_that_are_undone_in_any_order_change_nothing_about_what_comes_next(
    full: bool, order: tuple[int, ...]
) -> None:
    pool = pool_of("10.0.0.0/28")
    for address in [take(pool) or "" for _ in range(pool.total if full else 6)][1:5]:
        pool.release(address)
    before, used = left(pool), pool.used
    chosen = [before[3], *before[:3]]
    claimed = [(address, pool.claim(address)) for address in chosen]
    other = None if full else take(pool)  # somebody else's stays
    for n in order:
        pool.put_back(*claimed[n])
        assert pool.is_free(chosen[n])
    assert left(pool) == [address for address in before if address != other]
    assert pool.used == used + (other is not None)
    with pytest.raises(ValueError, match=r"10\.0\.0\."):
        pool.put_back(before[0], 1)


@pytest.mark.parametrize("subnet", ["10.0.1.0/29", "fd42::/125"])
def test_an_excluded_address_goes_to_nobody_once_it_is_free(subnet: str) -> None:
    pool = pool_of(subnet)
    network = ipaddress.ip_network(subnet)
    held, released, fresh, *_, last = (str(network[n]) for n in range(2, pool.total + 2))
    total = pool.total
    pool.claim(held)
    pool.claim(released)
    pool.release(released)
    for _ in range(2):  # as once a second
        pool.exclude([held, released, fresh, "192.0.2.1", "2001:db8::1", str(network[1])])
    assert (pool.total, pool.used) == (total - 2, 1)
    pool.release(held)
    pool.exclude([held])
    assert (pool.total, pool.used) == (total - 3, 0)
    given = [*iter(functools.partial(take, pool), None)]
    assert len(given) == pool.total == pool.used
    assert not {held, released, fresh} & {*given}
    assert last in given


@pytest.mark.parametrize("bulk_first", [False, True])
def test_who_waits_for_an_address_waits_for_no_bulk_change_that_is_being_made(
    tmp_path: Path, bulk_first: bool
) -> None:
    world = build(tmp_path)
    ledger, bulk, small = world.gateway.ledger, wggw.Flight(), wggw.Flight()
    pool = world.gateway.tunnels["wg0"].pools["ipv4"]
    begin = [lambda: ledger.open(bulk), lambda: ledger.submit(small)]
    for number, flight in enumerate((bulk, small), 2):
        flight.freed["wg0", "ipv4", f"10.0.1.{number}"] = None
    with mock.patch.object(pool, "peek", return_value=None):
        ledger.gathers = True  # nothing lands
        for step in begin if bulk_first else reversed(begin):
            step()
        with pytest.raises(wggw.Busy) as caught:
            ledger.find_address("wg0", "ipv4")
        assert caught.value.flight is small
        for _ in ledger.release(small, refused=True):
            pass
        with pytest.raises(wggw.Busy) as caught:
            ledger.find_address("wg0", "ipv4")
        assert caught.value.flight is bulk
        for _ in ledger.release(bulk, refused=True):
            pass
        with pytest.raises(wggw.Unavailable, match="exhausted"):
            ledger.find_address("wg0", "ipv4")
    ledger._gathered.clear()
    world.close()
