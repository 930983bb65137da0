"""Several interfaces of one gateway: pools, failures and counters of each are its own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import NOON, World, build, do, submit, traffic_of
from harness import a_key

import wggw

NAMES = ("wg0", "awg0")
SETTINGS = {
    "WG_IPV4_SUBNET": "10.0.0.0/29",
    "WG_IPV6_SUBNET": "fd00::/126",
    "WG_EXTRA_PORTS": "5300",
    "AWG_INTERFACE": "awg0",
    "AWG_PORT": "51821",
    "AWG_IPV4_SUBNET": "10.1.0.0/29",
    "AWG_IPV6_SUBNET": "fd00:1::/126",
}
KIND = {name: wggw.ObfuscationRequest(name == "awg0", {}) for name in NAMES}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = build(tmp_path, **SETTINGS)
    yield made
    if made.is_open:
        made.close()


def create(world: World, label: object, interface: str, **fields: Any) -> wggw.Peer:
    asked = {
        "public_key": a_key(label),
        "obfuscation": KIND[interface],
        "protocol": "dual",
        **fields,
    }
    return do(world.gateway, "create", **asked).peer


def held(world: World, name: str) -> set[str]:
    return set(world.backends[name].peers)


def rows(world: World, name: str) -> list[tuple[wggw.Peer, wggw.TrafficRow]]:
    return [row for row in world.rows() if row[0].interface == name]


def test_each_peer_is_on_its_own_interface_with_its_addresses_and_ports(world: World) -> None:
    first, second = (create(world, name, name) for name in NAMES)
    assert (first.assigned_ip, first.assigned_ipv6) == ("10.0.0.2", "fd00::2")
    assert (second.assigned_ip, second.assigned_ipv6) == ("10.1.0.2", "fd00:1::2")
    assert (first.port, second.port) == (None, None)  # of each interface, the listen port
    ports = [t.with_defaults(first, world.config).port for t in world.gateway.tunnels.values()]
    assert ports == [51820, 51821]
    for name in NAMES:
        assert held(world, name) == {a_key(name)}
    assert create(world, "other port", "wg0", port=5300).port == 5300
    with pytest.raises(wggw.Invalid, match="^port: "):
        create(world, "port of the other", "awg0", port=5300)


def test_a_full_pool_leaves_the_other_interface_alone(world: World) -> None:
    for number in range(2):
        create(world, number, "wg0")
    with pytest.raises(wggw.Unavailable, match="wg0 are exhausted"):
        create(world, "no room", "wg0")
    assert create(world, "room", "awg0").assigned_ip == "10.1.0.2"


def test_addresses_go_back_to_their_own_pool_and_stay_there_after_a_restart(world: World) -> None:
    for name in NAMES:
        create(world, name, name)
        create(world, ("stays", name), name, protocol="ipv4")
    for name in NAMES:
        do(world.gateway, "delete", public_key=a_key(name))
    world.reopen()
    for number, name in enumerate(NAMES):
        pools = world.gateway.tunnels[name].pools
        assert (pools["ipv4"].used, pools["ipv6"].used) == (1, 0)
        assert pools["ipv4"].peek() == f"10.{number}.0.4"
        assert held(world, name) == {a_key(("stays", name))}


CHANGES: list[Callable[[World, str], object]] = [
    lambda w, name: create(w, "new", name, protocol="ipv4"),
    lambda w, name: do(w.gateway, "set_status", public_key=a_key(name), status="suspended"),
    lambda w, name: do(w.gateway, "update", public_key=a_key(name), preshared_key=a_key("psk")),
    lambda w, name: do(
        w.gateway, "rotate", public_key=a_key(name), new_public_key=a_key("new key")
    ),
    lambda w, name: do(w.gateway, "delete", public_key=a_key(name)),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("down", NAMES)
@pytest.mark.parametrize("noticed", [True, False], ids=["noticed", "not yet noticed"])
def test_an_interface_that_is_down_refuses_changes_and_blocks_none_on_the_other(
    world: World, change: Callable[[World, str], object], down: str, noticed: bool
) -> None:
    (up,) = set(NAMES) - {down}
    for name in NAMES:
        create(world, name, name)
    world.backends[down].fail(forever=True)
    if noticed:
        world.gateway.projection.supervise()
        (reason,) = world.gateway.degraded()
        assert reason.startswith(f"interface {down}: ")
    before = rows(world, down)
    with pytest.raises(wggw.Unavailable):
        change(world, down)
    assert rows(world, down) == before
    change(world, up)
    world.backends[down].heal()
    world.gateway.projection.supervise()
    assert world.gateway.degraded() == []
    assert create(world, "after", down, protocol="ipv4").interface == down


@pytest.mark.parametrize("down", NAMES)
def test_one_that_fails_does_not_keep_the_other_from_repair_and_sampling(
    world: World, down: str
) -> None:
    (up,) = set(NAMES) - {down}
    for name in NAMES:
        create(world, name, name)
        world.backends[name].drop(a_key(name))
    world.backends[down].fail(forever=True)
    with pytest.raises(wggw.BackendError, match="as told"):
        world.gateway.projection.reconcile()
    assert held(world, up) == {a_key(up)}
    assert world.gateway.projection.reconcile(up).unchanged == 1
    world.backends[up].move(a_key(up), 100, handshake=int(NOON))
    with pytest.raises(wggw.BackendError, match="as told"):
        world.gateway.projection.sample()
    assert traffic_of(world.gateway, a_key(up)).rx_bytes == 100
    assert traffic_of(world.gateway, a_key(down)).rx_bytes == 0
    assert any(reason.startswith("counters: ") for reason in world.gateway.degraded())


def hold_reading(world: World, name: str) -> threading.Event:
    """Begin a reading of an interface that, like wireguard-go, answers nothing else meanwhile.

    It goes on when the event is set.
    """
    begun, go_on = threading.Event(), threading.Event()

    def before(kind: str) -> None:
        if kind == "read":
            begun.set()
            assert go_on.wait(60.0)

    def read() -> None:
        with contextlib.suppress(wggw.BackendError):
            world.gateway.projection.reconcile(name)

    world.backends[name].kind = "uapi"
    world.backends[name].faults.before = before
    threading.Thread(target=read, daemon=True).start()
    assert begun.wait(60.0)
    return go_on


@pytest.mark.parametrize("read", NAMES)
def test_a_reading_holds_back_landings_on_its_own_interface_only(world: World, read: str) -> None:
    (other,) = set(NAMES) - {read}
    go_on = hold_reading(world, read)
    waiting = submit(world.gateway, "create", public_key=a_key(1), obfuscation=KIND[read])
    assert create(world, 2, other).interface == other
    assert (held(world, read), held(world, other)) == (set(), {a_key(2)})
    assert a_key(1) in world.gateway.ledger.in_flight
    go_on.set()
    assert waiting().peer.interface == read
    assert held(world, read) == {a_key(1)}


def test_a_stop_waits_for_no_reading(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wggw, "LAST_SAMPLE_SECONDS", 0.1)
    monkeypatch.setattr(wggw, "STOP_SECONDS", 60.0)
    go_on = hold_reading(world, "wg0")
    waiting = submit(world.gateway, "create", public_key=a_key(1), obfuscation=KIND["wg0"])
    world.gateway.close()
    assert waiting().changed
    assert held(world, "wg0") == {a_key(1)}
    go_on.set()


@pytest.mark.parametrize("then", ["well again", "gone"])
def test_what_waited_for_a_reading_without_an_answer_is_refused_at_once(
    world: World, then: str
) -> None:
    """It would otherwise wait for a second timeout; supervision repairs it."""
    go_on = hold_reading(world, "wg0")
    waiting = submit(world.gateway, "create", public_key=a_key(1), obfuscation=KIND["wg0"])
    world.backends["wg0"].fail("read", what="hangs")
    go_on.set()
    with pytest.raises(wggw.Unavailable):
        waiting()
    assert world.backends["wg0"].faults.calls["apply"] == 0
    world.backends["wg0"].is_up = then != "gone"
    world.gateway.projection.supervise()
    assert world.gateway.degraded() == []
    assert create(world, 1, "wg0").status == "active"


def test_a_change_of_both_that_one_of_them_refuses_is_on_neither(world: World) -> None:
    for name in NAMES:
        create(world, name, name)
    before = {name: (rows(world, name), world.backends[name].peers) for name in NAMES}
    for down in NAMES:
        world.backends[down].fail("apply", what="half")
        with pytest.raises(wggw.Unavailable):
            world.gateway.sync({}, False, True)
        world.gateway.projection.supervise()
        assert world.gateway.degraded() == []
        assert before == {n: (rows(world, n), world.backends[n].peers) for n in NAMES}


def test_usage_and_counts_are_of_one_interface_or_of_all(world: World) -> None:
    for label, name in enumerate(("wg0", "awg0", "awg0")):
        create(world, label, name, protocol="ipv4")
    do(world.gateway, "set_status", public_key=a_key(2), status="suspended")
    whole = world.gateway.usage()["ipv4"]
    parts = [world.gateway.usage(name)["ipv4"] for name in NAMES]
    for figure in ("total", "used", "available"):
        assert whole[figure] == sum(part[figure] for part in parts)
    assert [part["used"] for part in parts] == [1, 2]
    assert whole["assigned_ips"] == ["10.0.0.2", "10.1.0.2", "10.1.0.3"]
    assert [part["gateway_ip"] for part in parts] == ["10.0.0.1", "10.1.0.1"]
    assert whole["gateway_ip"] == "10.0.0.1"
    assert world.store.counts.total() == 3
    figures = world.gateway.run(world.gateway.figures)
    assert figures.peers("active", "awg0") == 1 and figures.peers("suspended", "awg0") == 1
    assert figures.pools["awg0", "ipv4"]["used"] == 2


def without(prefix: str, **changed: str) -> dict[str, str]:
    kept = {name: value for name, value in SETTINGS.items() if not name.startswith(prefix)}
    return {**kept, **changed}


def test_peers_of_an_interface_that_is_not_set_up_stop_the_start_and_change_nothing(
    world: World, tmp_path: Path
) -> None:
    create(world, "left behind", "awg0", expires_at=int(NOON) + 50)
    world.close()
    later = World(tmp_path, backends=world.backends, **without("AWG"))
    later.now += 100
    number = world.store.number
    with pytest.raises(wggw.ConfigError, match=r"WG_INTERFACE 'wg0'.*'awg0'.*restore the setting"):
        later.open()
    assert later.store.number == number
    assert held(world, "awg0") == {a_key("left behind")}


def test_a_subnet_that_does_not_hold_its_peers_is_refused_by_its_own_name(
    world: World, tmp_path: Path
) -> None:
    create(world, "outside", "awg0")
    world.close()
    moved = {**SETTINGS, "AWG_IPV4_SUBNET": "10.7.0.0/29", "AWG_IPV6_SUBNET": ""}
    with pytest.raises(
        wggw.ConfigError, match="^AWG_IPV4_SUBNET 10.7.0.0/29: the ipv4 address on awg0"
    ):
        build(tmp_path, **moved)


@pytest.mark.parametrize("calls", [("write",), ("write", "truncate")], ids=["refused", "unknown"])
def test_parameters_of_a_start_without_a_disk_outlive_it(
    tmp_path: Path, calls: tuple[str, ...]
) -> None:
    """AWG_INTERFACE was added while the disk was full: clients made later know them."""
    build(tmp_path, WG_IPV4_SUBNET="10.0.0.0/29", WG_IPV6_SUBNET="").close()
    world = World(tmp_path, **SETTINGS)
    world.disk.fail(*calls, forever=True)
    world.open()
    assert world.gateway.degraded()
    world.disk.heal()
    world.gateway.lander.heal()
    assert world.gateway.degraded() == []
    create(world, 1, "awg0")
    before = world.gateway.tunnels["awg0"].obfuscation
    world.reopen()
    assert world.gateway.tunnels["awg0"].obfuscation == before
    world.close()


@pytest.mark.parametrize("name", NAMES)
def test_a_peer_that_an_import_moves_is_gone_from_its_former_interface(
    world: World, name: str
) -> None:
    """After a restart the newest peer's id is given again when that peer was deleted."""
    create(world, 1, name)
    data = world.gateway.export()
    do(world.gateway, "delete", public_key=a_key(1))
    world.reopen()
    other = next(other for other in NAMES if other != name)
    create(world, 1, other)
    world.gateway.import_(data)
    assert (held(world, name), held(world, other)) == ({a_key(1)}, set())
