"""Service classes without a kernel: the sets follow the interface's peers, whatever fails."""

from __future__ import annotations

import functools
import ipaddress
import os
import random
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest
from fakes import FakeBackend, World, do, submit
from harness import a_key, wait_for

import wggw
from wggw import BackendError, Change, ClassedBackend, Member, WirePeer

SUBNETS = [ipaddress.ip_network("10.7.0.0/24"), ipaddress.ip_network("fd07::/64")]
NAMES = ("slow", "fast")
CLASSES = {name: wggw.ServiceClass(1000, None, None) for name in NAMES}

TUNNELS = wggw.interface_settings(wggw.load_config({}, os.devnull, key_needed=False))


class FakeTable(wggw.ClassTable):
    """The kernel's sets as a set."""

    def __init__(self) -> None:
        super().__init__(CLASSES, TUNNELS)
        self.members: set[Member] = set()
        self.there = True
        self.adds_until_failure = sys.maxsize  # so many members are still added

    def set_up(self) -> None:
        self.there = True

    def alive(self) -> bool:
        return self.there

    def add(self, members: Iterable[Member]) -> None:
        for member in members:
            if not self.adds_until_failure:
                raise BackendError("nftables: No such file or directory")
            self.adds_until_failure -= 1
            self.members.add(member)

    def remove(self, members: Sequence[Member]) -> None:
        self.members.difference_update(members)

    def read(self) -> set[Member]:
        return set(self.members)


def peer(number: int, name: str = "", address: int = 0) -> WirePeer:
    host = address or number
    networks = (bytes([10, 7, 0, host, 32]), bytes.fromhex("fd07") + bytes(13) + bytes([host, 128]))
    return WirePeer(bytes([number]) * 32, b"", networks, name)


def put(backend: wggw.Backend, *peers: WirePeer) -> None:
    backend.apply([Change(p.public_key, p) for p in peers])


def drop(backend: wggw.Backend, *numbers: int) -> None:
    backend.apply([Change(bytes([number]) * 32, None) for number in numbers])


def wanted(*peers: WirePeer) -> set[Member]:
    return {member for p in peers for member in wggw.members_of(p)}


def held(backend: wggw.Backend) -> set[WirePeer]:
    return {state.peer for _, state in backend.read(()).changed}


@pytest.fixture
def table() -> FakeTable:
    return FakeTable()


@pytest.fixture
def inner() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def backend(inner: FakeBackend, table: FakeTable) -> ClassedBackend:
    return ClassedBackend(inner, table, SUBNETS)


def test_members_come_move_and_go_with_their_peers(
    backend: ClassedBackend, table: FakeTable
) -> None:
    put(backend, peer(2, "slow"), peer(3))
    assert table.members == wanted(peer(2, "slow"))
    put(backend, peer(2, "fast"))
    assert table.members == wanted(peer(2, "fast"))
    assert held(backend) == {peer(2, "fast"), peer(3)}
    put(backend, peer(2))
    assert table.members == set()
    put(backend, peer(2, "slow"), peer(3, "slow"))
    drop(backend, 2)
    assert table.members == wanted(peer(3, "slow"))


def test_an_address_that_moves_to_another_peer_has_that_peers_class(
    backend: ClassedBackend, table: FakeTable
) -> None:
    put(backend, peer(2, "slow"))
    backend.apply(
        [Change(bytes([2]) * 32, None), Change(bytes([3]) * 32, peer(3, "slow", address=2))]
    )
    assert table.members == wanted(peer(3, "slow", address=2))
    backend.apply(
        [Change(bytes([3]) * 32, None), Change(bytes([4]) * 32, peer(4, "fast", address=2))]
    )
    assert table.members == wanted(peer(4, "fast", address=2))


def test_a_change_that_the_interface_refuses_leaves_no_member_behind(
    backend: ClassedBackend, inner: FakeBackend, table: FakeTable
) -> None:
    put(backend, peer(2, "slow"))
    for change in (peer(2, "fast"), peer(3, "slow")):
        inner.fail("apply")
        with pytest.raises(BackendError):
            put(backend, change)
        assert table.members == wanted(peer(2, "slow"))


@pytest.mark.parametrize("added", [0, 1])
def test_a_class_that_was_not_set_is_set_by_the_next_try(
    backend: ClassedBackend, inner: FakeBackend, table: FakeTable, added: int
) -> None:
    """Whatever part of the members was added before the failure."""
    put(backend, peer(2, "slow"), peer(4, "fast"))
    for change in (
        [Change(bytes([2]) * 32, None), Change(bytes([3]) * 32, peer(3, "slow"))],
        [Change(bytes([5]) * 32, peer(5, "fast"))],
    ):
        table.adds_until_failure = added
        with pytest.raises(BackendError):
            backend.apply(change)
        table.adds_until_failure = sys.maxsize
        drop(backend, 9)  # another peer's change removes what nobody has, and no more
        assert table.members == wanted(*inner.peers.values())
        backend.apply(change)
        assert table.members == wanted(*inner.peers.values())
    assert held(backend) == {peer(3, "slow"), peer(4, "fast"), peer(5, "fast")}


def test_a_peer_is_not_put_where_its_limit_cannot_be(
    inner: FakeBackend,
) -> None:
    table = wggw.ClassTable(CLASSES, TUNNELS)
    table.failure = "nft is missing"
    backend = ClassedBackend(inner, table, SUBNETS)
    with pytest.raises(BackendError, match="service classes are not in force: nft is missing"):
        put(backend, peer(2, "slow"))
    assert inner.peers == {}
    put(backend, peer(3))
    assert held(backend) == {peer(3)}


def test_rules_that_failed_are_tried_again_also_without_a_peer_that_needs_them(
    inner: FakeBackend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "wggw")
    fails, rules = [True], [False]

    def replace(*_: object) -> bool:
        if fails[0]:
            raise BackendError("nft is missing")
        rules[0] = True
        return True

    monkeypatch.setattr(wggw, "replace_table", replace)
    monkeypatch.setattr(wggw.ClassTable, "alive", lambda _: rules[0])
    table = wggw.ClassTable(CLASSES, TUNNELS)
    backend = ClassedBackend(inner, table, SUBNETS)
    inner.setup()
    table.set_up()
    for _ in range(2):
        table._next_try = 0.0
        assert backend.alive() and table.failure == "nft is missing"
    fails[0] = False
    assert backend.alive() and table.failure  # not at every look
    table._next_try = 0.0
    assert backend.alive() and not table.failure
    assert [record.getMessage() for record in caplog.records] == [
        "service classes are not in force, peers with a class are refused: nft is missing",
        "service classes are in force",
    ]


def test_peers_whose_limits_are_gone_leave_the_interface_and_the_others_stay(
    backend: ClassedBackend, inner: FakeBackend, table: FakeTable
) -> None:
    put(backend, peer(2, "slow"), peer(3))
    table.members.clear()
    table.failure, table.adds_until_failure = "nft is missing", 0
    for _ in range(2):
        with pytest.raises(BackendError):
            put(backend, peer(2, "slow"), peer(4))
        assert set(inner.peers.values()) == {peer(3), peer(4)}
    table.failure, table.adds_until_failure = "", sys.maxsize
    put(backend, peer(2, "slow"))
    assert held(backend) == {peer(2, "slow"), peer(3), peer(4)}
    assert table.members == wanted(peer(2, "slow"))


def test_what_others_changed_is_told(backend: ClassedBackend, table: FakeTable) -> None:
    put(backend, peer(2, "slow"), peer(3))
    known = {mark for mark, _ in backend.read(()).changed}
    assert backend.read(known).changed == []
    table.members.clear()
    table.members |= wanted(peer(3, "fast"))
    found = {state.peer for _, state in backend.read(known).changed}
    assert found == {peer(2), peer(3, "fast")}
    put(backend, peer(2, "slow"), peer(3))
    assert table.members == wanted(peer(2, "slow"))


def test_half_a_class_is_no_class(backend: ClassedBackend, table: FakeTable) -> None:
    put(backend, peer(2, "slow"))
    table.members.remove(Member("slow", bytes([10, 7, 0, 2])))
    assert {p.service_class for p in held(backend)} == {"?"}
    put(backend, peer(2, "slow"))
    assert table.members == wanted(peer(2, "slow"))


def test_strays_go_and_other_interfaces_members_stay(
    backend: ClassedBackend, table: FakeTable
) -> None:
    other = Member("slow", bytes([10, 8, 0, 2]))
    table.members |= {other, Member("slow", bytes([10, 7, 0, 99]))}
    backend.read(())
    put(backend, peer(2))
    assert table.members == {other}


def test_a_new_process_takes_the_members_over(
    backend: ClassedBackend, inner: FakeBackend, table: FakeTable
) -> None:
    put(backend, peer(2, "slow"), peer(3, "fast"))
    again = ClassedBackend(inner, table, SUBNETS)
    assert held(again) == {peer(2, "slow"), peer(3, "fast")}
    drop(again, 2)
    assert table.members == wanted(peer(3, "fast"))


@pytest.mark.parametrize("seed", range(30))
def test_random_changes_under_faults_end_as_they_should(seed: int) -> None:
    chance = random.Random(seed)
    inner, table = FakeBackend(), FakeTable()
    inner.faults.rng = random.Random(seed)
    backend = ClassedBackend(inner, table, SUBNETS)
    desired: dict[bytes, WirePeer] = {}
    for _ in range(60):
        if chance.random() < 0.1:
            backend = ClassedBackend(inner, table, SUBNETS)
        if chance.random() < 0.1 and table.members:
            table.members.discard(chance.choice(sorted(table.members)))
        if chance.random() < 0.1:
            table.members |= wanted(peer(chance.randrange(2, 9), chance.choice(NAMES)))
        inner.faults.chance = {"apply": 0.2}
        after = dict(desired)
        for number in chance.sample(range(2, 9), 3):
            key = bytes([number]) * 32
            if chance.random() < 0.3:
                after.pop(key, None)
            else:
                after[key] = peer(number, chance.choice(["", *NAMES]))
        keys = {key for key in desired.keys() | after.keys() if desired.get(key) != after.get(key)}
        try:
            backend.apply([Change(key, after.get(key)) for key in keys])
        except BackendError:
            pass
        else:
            desired = after
        inner.faults.chance = {}
        for _ in range(2):  # one finds strays, the next removes them
            actual = {state.peer.public_key: state.peer for _, state in backend.read(()).changed}
            keys = {
                key for key in desired.keys() | actual.keys() if desired.get(key) != actual.get(key)
            }
            backend.apply([Change(key, desired.get(key)) for key in keys])
        assert table.members == wanted(*desired.values())
        assert held(backend) == set(desired.values())


# --- in a gateway ---------------------------------------------------------------------------------

SETTINGS = {
    "WG_IPV4_SUBNET": "10.7.0.0/24",
    "WG_IPV6_SUBNET": "",
    "SERVICE_CLASSES": '{"slow": {"down": "1mbit"}, "fast": {}}',
}


def test_a_class_that_cannot_be_enforced_is_a_503_that_says_why(tmp_path: Path) -> None:
    world = World(tmp_path, **SETTINGS).open()
    table = FakeTable()
    world.gateway.class_table = table
    table.failure = why = "nft: No such file or directory"
    with pytest.raises(wggw.Unavailable, match=f"cannot be enforced: {why}"):
        do(world.gateway, "create", public_key=a_key(1), service_class="slow")
    do(world.gateway, "create", public_key=a_key(1))
    with pytest.raises(wggw.Unavailable, match="cannot be enforced"):
        do(world.gateway, "update", public_key=a_key(1), service_class="slow")
    assert not world.gateway.degraded()
    (reason,) = world.gateway.figures().degraded
    assert reason == f"service classes are not in force, peers with a class are refused: {why}"
    world.close()


def test_a_gateway_starts_without_the_peers_that_nothing_would_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is degraded until it can limit them; the peers without a class are there."""
    table, inner, outer = FakeTable(), FakeBackend(), FakeBackend()
    backend = ClassedBackend(inner, table, SUBNETS)
    monkeypatch.setattr(outer, "apply", backend.apply)
    monkeypatch.setattr(outer, "read", lambda known: backend.read(known)._replace(device=None))
    monkeypatch.setattr(wggw.Reading, "device_differs", lambda *_: False)
    start = functools.partialmethod(wggw.Gateway.start, class_table=table)
    monkeypatch.setattr(wggw.Gateway, "start", start)
    world = World(tmp_path, backends={"wg0": outer}, **SETTINGS).open()
    do(world.gateway, "create", public_key=a_key(1), service_class="slow")
    do(world.gateway, "create", public_key=a_key(2))
    world.close()
    table.failure, table.adds_until_failure = "nft is missing", 0
    table.members.clear()
    world.open()
    assert list(inner.peers) == [a_key(2)]
    assert "as told" not in str(world.gateway.degraded()) and world.gateway.degraded()
    table.failure, table.adds_until_failure = "", sys.maxsize
    world.gateway.projection.supervise()
    assert set(inner.peers) == {a_key(1), a_key(2)} and not world.gateway.degraded()
    world.close()


def test_classes_that_peers_have_cannot_go(tmp_path: Path) -> None:
    world = World(tmp_path, **SETTINGS).open()
    do(world.gateway, "create", public_key=a_key(1), service_class="slow")
    assert (world.store.counts.classes["slow"], world.store.counts.class_addresses["slow"]) == (
        1,
        1,
    )
    do(world.gateway, "set_status", public_key=a_key(1), status="suspended")
    assert (world.store.counts.classes["slow"], world.store.counts.class_addresses["slow"]) == (
        1,
        0,
    )
    do(world.gateway, "set_status", public_key=a_key(1), status="active")
    world.reopen()
    assert (world.store.counts.classes["slow"], world.store.counts.class_addresses["slow"]) == (
        1,
        1,
    )
    with pytest.raises(
        wggw.ConfigError, match="SERVICE_CLASSES: the class 'slow' is used by 1 peer"
    ):
        world.gateway.change_classes({"fast": CLASSES["fast"]})
    data = world.gateway.export()
    world.gateway.change_classes({"slow": CLASSES["slow"], "gold": CLASSES["fast"]})
    do(world.gateway, "update", public_key=a_key(1), service_class="gold")
    assert (world.store.counts.classes["slow"], world.store.counts.classes["gold"]) == (0, 1)
    world.gateway.change_classes({"gold": CLASSES["fast"]})
    with pytest.raises(wggw.Conflict, match="the class 'slow' is used by 1 peer"):
        world.gateway.import_(data)
    do(world.gateway, "update", public_key=a_key(1), service_class=None)
    world.gateway.change_classes({})
    world.close()
    (tmp_path / "other").mkdir()
    second = World(tmp_path / "other", **SETTINGS).open()
    do(second.gateway, "create", public_key=a_key(1), service_class="slow")
    second.close()
    third = World(tmp_path / "other", **{**SETTINGS, "SERVICE_CLASSES": ""})
    with pytest.raises(
        wggw.ConfigError, match="the class 'slow' is used by 1 peer, but is not there"
    ):
        third.open()


def test_no_peer_gets_a_class_that_goes(tmp_path: Path) -> None:
    """Not by a change that was decided before, nor by one that is decided while nft runs."""
    world = World(tmp_path, **SETTINGS).open()
    gateway = world.gateway
    errors: list[str] = []

    class Table(FakeTable):
        def change(self, classes: Mapping[str, wggw.ServiceClass]) -> None:
            with pytest.raises(wggw.Invalid, match="service_class"):
                do(gateway, "create", public_key=a_key(2), service_class="fast")
            if len(classes) == 1:
                raise BackendError("nft: as told")

    def change(*kept: str) -> None:
        try:
            gateway.change_classes({name: gateway.classes[name] for name in kept})
        except wggw.ConfigError as error:
            errors.append(str(error))

    gateway.class_table = Table()
    changing = threading.Thread(target=change, daemon=True)
    with gateway.lander.turn:  # as during a landing
        given = submit(gateway, "create", public_key=a_key(1), service_class="slow")
        changing.start()
        wait_for(lambda: not gateway.classes)
    assert given().peer.service_class == "slow"
    changing.join(30)
    assert "the class 'slow' is used by 1 peer" in errors.pop()
    assert sorted(gateway.classes) == ["fast", "slow"]
    change("slow")
    assert errors.pop() == "SERVICE_CLASSES: nft: as told"
    assert sorted(gateway.classes) == ["fast", "slow"]
    do(gateway, "delete", public_key=a_key(1))
    change()
    assert not gateway.classes and not errors
    world.close()
    World(tmp_path, **{**SETTINGS, "SERVICE_CLASSES": ""}).open().close()


def test_status_shows_classes_on_a_screen() -> None:
    dropped = {"down": 1_000_000, "up": 0, "refused": 2000}
    row = {"name": "slow", "peers": 3, "addresses": 4, "expected_addresses": 6}
    rows = [{**row, "dropped_bytes": dropped}]
    lines = wggw.show_table(wggw.CLASS_COLUMNS, rows, wggw.Screen(80, 24, False))
    assert lines[0].split()[:3] == ["CLASS", "PEERS", "ADDRESSES"]
    assert lines[1].split()[:5] == ["slow", "3", "4", "of", "6"] and "kB" in lines[1]
