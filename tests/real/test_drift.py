"""What others change on the interface by hand is put right by the next sample, and nothing else is
touched: tunnels of peers that are right lose no packet.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import Any

import netns
import pytest
from backend_contract import output, wg_dump
from harness import Client, GatewayProcess, a_key, wait_for
from netns import RunningPing, Topology, Tunnel

pytestmark = pytest.mark.real

OTHER, FOREIGN = a_key("other"), a_key("foreign")
PSK = a_key("psk")


def set_peer(name: str, key: str, *words: str) -> None:
    output("wg", "set", name, "peer", key, *words)


def set_psk(name: str, key: str) -> None:
    with_key = ("bash", "-c", f"wg set {name} peer {key} preshared-key <(echo {PSK})")
    output(*with_key)


# Of another peer; every kind of drift: laws/test_drift_is_repaired.py.
DRIFTS: tuple[Callable[[str], object], ...] = (
    lambda name: set_peer(name, OTHER, "allowed-ips", "0.0.0.0/0,::/0"),
    lambda name: set_psk(name, OTHER),
    lambda name: set_peer(name, OTHER, "remove"),
    lambda name: set_peer(name, FOREIGN, "allowed-ips", "10.9.9.9/32"),
)


def connect(topology: Topology, client: Client) -> tuple[Tunnel, dict[str, Any]]:
    tunnel = topology.tunnel(0)
    answer = client.create(tunnel.public_key, protocol="dual").json
    tunnel.connect(answer)
    assert tunnel.ping(Topology.GATEWAY[0], count=1) == {Topology.GATEWAY[0]: 1}
    return tunnel, answer


def is_well(client: Client) -> bool:
    return bool(client.send("GET", "/api/v1/server/status").json["status"] == "healthy")


def test_repair_of_one_peer_loses_no_packet_and_no_byte_of_another(
    topology: Topology, gateway: GatewayProcess, client: Client
) -> None:
    name = topology.interface
    tunnel, _ = connect(topology, client)
    client.create(OTHER, protocol="dual")
    right = wg_dump(name)
    with RunningPing(tunnel.namespace, Topology.HOST[0]) as ping:
        for drift in DRIFTS:
            drift(name)
            wait_for(lambda: wg_dump(name) == right, 30, "the repair")
            ping.go_on()
        assert ping.stop() == []

    def counted() -> bool:
        shown = client.get(tunnel.public_key).json
        return (shown["rx_bytes"], shown["tx_bytes"]) == tunnel.transfer()

    wait_for(counted, 30, "the same counts on both sides")


def test_an_interface_that_is_deleted_comes_back_with_all_peers(
    topology: Topology, gateway: GatewayProcess, client: Client
) -> None:
    name = topology.interface
    tunnel, _ = connect(topology, client)
    for number in range(240):
        assert client.create(a_key(number)).status == 200
    right = wg_dump(name)
    for _ in range(2):
        before = netns.daemon_pid(name)
        netns.output("ip", "link", "delete", name)
        if not netns.kernel_has_wireguard():
            wait_for(lambda pid=before: netns.daemon_pid(name) not in (None, pid), 30, "a new one")

        def back() -> bool:
            try:
                return wg_dump(name) == right
            except AssertionError:
                return False

        wait_for(back, 60, "all peers are back")
        wait_for(lambda: is_well(client), 30, "health")
        tunnel.reconnect()
        assert tunnel.ping(Topology.GATEWAY[0], count=1) == {Topology.GATEWAY[0]: 1}


def test_no_peer_gets_an_address_that_the_host_has_got(
    topology: Topology, gateway: GatewayProcess, client: Client
) -> None:
    first = client.create(a_key("first"), protocol="dual").json
    v4, v6 = (ipaddress.ip_address(first[n]) + 1 for n in ("assigned_ip", "assigned_ipv6"))
    usage = client.send("GET", "/api/v1/ip-usage").json
    for address in (v4, v6):
        output("ip", "address", "add", f"{address}/{address.max_prefixlen}", "dev", "lo")

    def excluded() -> bool:
        now = client.send("GET", "/api/v1/ip-usage").json
        return all(now[n]["total"] == usage[n]["total"] - 1 for n in ("ipv4", "ipv6"))

    wait_for(excluded, 30, "the address to be kept from peers")
    second = client.create(a_key("second"), protocol="dual").json
    assert second["assigned_ip"] == str(v4 + 1)
    assert second["assigned_ipv6"] == str(v6 + 1)
    asked = client.create(a_key("third"), assigned_ip=str(v4))
    assert asked.status in (409, 422), asked
