"""Several interfaces of one gateway: pools, failures and counters of each are its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from harness import API_KEY, a_key

import wggw

NAMES = ("wg0", "wg1")
SETTINGS = tuple(
    wggw.InterfaceSettings(
        prefix,
        name,
        {"ipv4": ip_network(f"10.{number}.0.0/29"), "ipv6": ip_network(f"fd00:{number}::/126")},
        (51820 + number, 5300 + number),
        1420 - number,
        "",
    )
    for number, (prefix, name) in enumerate(zip(("WG", "AWG"), NAMES, strict=True))
)


class BreakableBackend(wggw.MemoryBackend):
    """Fails in every call while `broken`."""

    broken = False

    def _check(self) -> None:
        if self.broken:
            raise wggw.BackendError("broken on purpose")

    def setup(self, link: wggw.Link | None = None) -> None:
        self._check()

    def alive(self) -> bool:
        return not self.broken

    def read(self) -> list[wggw.PeerState]:
        self._check()
        return [s._replace(rx_bytes=100, last_handshake=1000) for s in super().read()]

    def apply(self, changes: Sequence[wggw.Change]) -> None:
        self._check()
        super().apply(changes)


class Two(wggw.Gateway):
    """New peers go to the interface of their port."""

    def __init__(self, directory: Path, settings: Sequence[wggw.InterfaceSettings]) -> None:
        config = wggw.load_config(
            {"GATEWAY_API_KEY": API_KEY, "DB_PATH": str(directory / "db")}, "/dev/null"
        )
        store = wggw.Store(config.db_path, "none", wggw.Disk())
        store.recover()
        super().__init__(config, store, time.time)
        self.backends = {row.name: BreakableBackend() for row in settings}
        self.start(
            [
                (row, wggw.make_link(row, bytes([number + 1]) * 32), self.backends[row.name])
                for number, row in enumerate(settings)
            ]
        )

    def _interface_for(self, fields: Any) -> wggw.Interface:
        return self.interfaces[fields["interface"]]


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Two]:
    made = Two(tmp_path, SETTINGS)
    yield made
    made.store.close()


def create(gateway: Two, label: object, interface: str, **fields: Any) -> wggw.Peer:
    asked = {"public_key": a_key(label), "interface": interface, "protocol": "dual", **fields}
    return gateway.create(asked).peer


def held(gateway: Two, name: str) -> set[bytes]:
    return {state.peer.public_key for state in gateway.backends[name].read()}


def test_each_peer_is_on_its_own_interface_with_its_addresses_and_ports(gateway: Two) -> None:
    first, second = (create(gateway, name, name) for name in NAMES)
    assert (first.assigned_ip, first.assigned_ipv6) == ("10.0.0.2", "fd00::2")
    assert (second.assigned_ip, second.assigned_ipv6) == ("10.1.0.2", "fd00:1::2")
    assert (first.port, second.port) == (51820, 51821)
    for name in NAMES:
        assert held(gateway, name) == {wggw.decode_key(a_key(name))}
    assert create(gateway, "other port", "wg1", port=5301).port == 5301
    with pytest.raises(wggw.Invalid, match="^port: "):
        create(gateway, "port of the other", "wg1", port=5300)


def test_a_full_pool_leaves_the_other_interface_alone(gateway: Two) -> None:
    for number in range(2):
        create(gateway, number, "wg0")
    with pytest.raises(wggw.Unavailable, match="wg0 are exhausted"):
        create(gateway, "no room", "wg0")
    assert create(gateway, "room", "wg1").assigned_ip == "10.1.0.2"


def test_addresses_go_back_to_their_own_pool_and_stay_there_after_a_restart(
    gateway: Two, tmp_path: Path
) -> None:
    for name in NAMES:
        create(gateway, name, name)
        create(gateway, ("stays", name), name, protocol="ipv4")
    for name in NAMES:
        gateway.delete(a_key(name))
    gateway.snapshot()
    gateway.store.close()
    again = Two(tmp_path, SETTINGS)
    for number, name in enumerate(NAMES):
        pools = again.interfaces[name].pools
        assert (pools["ipv4"].used, pools["ipv6"].used) == (1, 0)
        assert pools["ipv4"].peek() == f"10.{number}.0.4"
        assert held(again, name) == {wggw.decode_key(a_key(("stays", name)))}
    again.store.close()


CHANGES: list[Callable[[Two, str], object]] = [
    lambda g, name: create(g, "new", name, protocol="ipv4"),
    lambda g, name: g.set_status(a_key(name), "suspended"),
    lambda g, name: g.update(a_key(name), {"preshared_key": a_key("psk")}),
    lambda g, name: g.rotate(a_key(name), a_key("new key")),
    lambda g, name: g.delete(a_key(name)),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("down", NAMES)
def test_an_interface_that_is_down_refuses_changes_and_blocks_none_on_the_other(
    gateway: Two, change: Callable[[Two, str], object], down: str
) -> None:
    (up,) = set(NAMES) - {down}
    for name in NAMES:
        create(gateway, name, name)
    gateway.backends[down].broken = True
    gateway.supervise()
    (reason,) = gateway.degraded()
    assert reason.startswith(f"interface {down}: ")
    before = gateway.page(0, 100, wggw.Filter(interface=down))
    with pytest.raises(wggw.Unavailable):
        change(gateway, down)
    assert gateway.page(0, 100, wggw.Filter(interface=down)) == before
    change(gateway, up)
    gateway.backends[down].broken = False
    gateway.supervise()
    assert gateway.degraded() == []
    change_again = create(gateway, "after", down, protocol="ipv4")
    assert change_again.interface == down


@pytest.mark.parametrize("down", NAMES)
def test_one_that_fails_does_not_keep_the_other_from_repair_and_sampling(
    gateway: Two, down: str
) -> None:
    (up,) = set(NAMES) - {down}
    for name in NAMES:
        create(gateway, name, name)
        key = wggw.decode_key(a_key(name))
        gateway.backends[name].apply([wggw.Change(key, None)])
    gateway.backends[down].broken = True
    with pytest.raises(wggw.BackendError, match="broken on purpose"):
        gateway.reconcile()
    assert held(gateway, up) == {wggw.decode_key(a_key(up))}
    assert gateway.reconcile(up).unchanged == 1
    with pytest.raises(wggw.BackendError, match="broken on purpose"):
        gateway.sample()
    assert gateway.get(a_key(up)).traffic.rx_bytes == 100
    assert gateway.get(a_key(down)).traffic.rx_bytes == 0


def test_usage_and_counts_are_of_one_interface_or_of_all(gateway: Two) -> None:
    for label, name in enumerate(("wg0", "wg1", "wg1")):
        create(gateway, label, name, protocol="ipv4")
    gateway.set_status(a_key(2), "suspended")
    whole = gateway.usage()["ipv4"]
    parts = [gateway.usage(name)["ipv4"] for name in NAMES]
    for figure in ("total", "used", "available"):
        assert whole[figure] == sum(part[figure] for part in parts)
    assert [part["used"] for part in parts] == [1, 2]
    assert whole["assigned_ips"] == ["10.0.0.2", "10.1.0.2", "10.1.0.3"]
    assert [part["gateway_ip"] for part in parts] == ["10.0.0.1", "10.1.0.1"]
    assert whole["gateway_ip"] == "10.0.0.1"
    assert gateway.peer_count() == 3
    assert gateway.peer_count("active", "wg1") == 1
    text = "".join(wggw.render_gateway(gateway))
    assert 'wggw_peers{interface="wg1",state="suspended"} 1' in text
    assert 'wggw_pool_used_addresses{interface="wg1",family="ipv4"} 2.0' in text


def test_peers_of_an_interface_that_is_not_set_up_stop_the_start(
    gateway: Two, tmp_path: Path
) -> None:
    create(gateway, "left behind", "wg1")
    gateway.snapshot()
    with pytest.raises(wggw.ConfigError, match=r"WG_INTERFACE 'wg0'.*'wg1'.*never move"):
        Two(tmp_path, SETTINGS[:1])


def test_a_start_that_is_refused_changes_nothing(gateway: Two) -> None:
    create(gateway, "left behind", "wg1", expires_at=int(time.time()) + 50)
    gateway.snapshot()
    gateway.store.close()
    store = wggw.Store(gateway.config.db_path, "none", wggw.Disk())
    store.recover()
    number = store.number
    later = wggw.Gateway(gateway.config, store, lambda: time.time() + 100)
    link = wggw.make_link(SETTINGS[0], b"k" * 32)
    with pytest.raises(wggw.ConfigError, match="never move"):
        later.start([(SETTINGS[0], link, BreakableBackend())])
    assert store.number == number
    store.close()


def test_a_subnet_that_does_not_hold_its_peers_is_refused_by_its_own_name(
    gateway: Two, tmp_path: Path
) -> None:
    create(gateway, "outside", "wg1")
    gateway.snapshot()
    moved = SETTINGS[1]._replace(subnets={"ipv4": ip_network("10.7.0.0/29")})
    with pytest.raises(wggw.ConfigError, match="^AWG_IPV4_SUBNET, AWG_IPV6_SUBNET: "):
        Two(tmp_path, (SETTINGS[0], moved))
