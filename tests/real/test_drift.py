"""What others change on the interface by hand is put right by the next sample, and nothing else is
touched: tunnels of peers that are right lose no packet.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from typing import Any

import netns
import pytest
from backend_contract import output, wg_dump
from harness import Client, GatewayProcess, a_key, path_key, wait_for
from netns import RunningPing, Topology, Tunnel

pytestmark = pytest.mark.real

OTHER, FOREIGN = a_key("other"), a_key("foreign")
PSK = a_key("psk")


def set_peer(name: str, key: str, *words: str) -> None:
    output("wg", "set", name, "peer", key, *words)


def set_psk(name: str, key: str) -> None:
    with_key = ("bash", "-c", f"wg set {name} peer {key} preshared-key <(echo {PSK})")
    output(*with_key)


DRIFTS: dict[str, Callable[[str, str], object]] = {
    "the address of another": lambda name, address: set_peer(
        name, OTHER, "allowed-ips", f"{address}/32"
    ),
    "everything": lambda name, _: set_peer(name, OTHER, "allowed-ips", "0.0.0.0/0,::/0"),
    "no address": lambda name, _: set_peer(name, OTHER, "allowed-ips", ""),
    "a preshared key": lambda name, _: set_psk(name, OTHER),
    "a peer is missing": lambda name, _: set_peer(name, OTHER, "remove"),
    "a foreign peer": lambda name, _: set_peer(name, FOREIGN, "allowed-ips", "10.9.9.9/32"),
    "one for another": lambda name, _: (
        set_peer(name, OTHER, "remove"),
        set_peer(name, FOREIGN, "allowed-ips", "10.9.9.9/32"),
    ),
    "the listen port": lambda name, _: output("wg", "set", name, "listen-port", "4"),
    "the private key": lambda name, _: output("wg", "set", name, "private-key", "/dev/null"),
    "all peers": lambda name, _: output("wg", "setconf", name, "/dev/null"),
}
UNTOUCHED = ("everything", "no address", "a preshared key", "a peer is missing", "a foreign peer")


def connect(topology: Topology, client: Client) -> tuple[Tunnel, dict[str, Any]]:
    tunnel = topology.tunnel(0)
    answer = client.create(tunnel.public_key, protocol="dual").json
    tunnel.connect(answer)
    assert tunnel.ping(Topology.GATEWAY[0], count=1) == {Topology.GATEWAY[0]: 1}
    return tunnel, answer


def is_well(client: Client) -> bool:
    return bool(client.send("GET", "/api/v1/server/status").json["status"] == "healthy")


def test_every_kind_of_drift_is_put_right_by_itself(
    topology: Topology, gateway: GatewayProcess, client: Client
) -> None:
    name = topology.interface
    tunnel, answer = connect(topology, client)
    client.create(OTHER, protocol="dual")
    right = wg_dump(name)
    for kind, drift in DRIFTS.items():
        drift(name, answer["assigned_ip"])
        assert wg_dump(name) != right, kind
        wait_for(lambda: wg_dump(name) == right, 30, f"repair: {kind}")
        wait_for(lambda: is_well(client), 30, f"health behind {kind}")
        assert client.create(OTHER).json["status"] == "exists"
    tunnel.reconnect()
    assert tunnel.ping(Topology.GATEWAY[0], count=3) == {Topology.GATEWAY[0]: 3}
    assert len(re.findall("it is being repaired", gateway.text())) >= len(DRIFTS) - 1


def test_repair_of_one_peer_loses_no_packet_and_no_byte_of_another(
    topology: Topology, gateway: GatewayProcess, client: Client
) -> None:
    name = topology.interface
    tunnel, answer = connect(topology, client)
    client.create(OTHER, protocol="dual")
    right = wg_dump(name)
    with RunningPing(tunnel.namespace, Topology.HOST[0]) as ping:
        for kind in UNTOUCHED:
            DRIFTS[kind](name, answer["assigned_ip"])
            wait_for(lambda: wg_dump(name) == right, 30, f"repair: {kind}")
            ping.go_on()
        assert ping.stop() == []

    def counted() -> bool:
        shown = client.get(tunnel.public_key).json
        return (shown["rx_bytes"], shown["tx_bytes"]) == tunnel.transfer()

    wait_for(counted, 30, "the same counts on both sides")


def test_sync_ips_puts_right_what_others_changed_and_says_what(
    topology: Topology, settings: dict[str, str], stopped: GatewayProcess
) -> None:
    stopped.settings["SAMPLE_INTERVAL"] = "3600"
    client = stopped.start().client()
    name = topology.interface
    _, answer = connect(topology, client)
    client.create(OTHER, protocol="dual")
    right = wg_dump(name)
    for kind, drift in DRIFTS.items():
        drift(name, answer["assigned_ip"])
        said = client.send("POST", "/api/v1/sync-ips")
        assert (said.status, wg_dump(name)) == (200, right), kind
        changed = said.json["added"] + said.json["updated"] + said.json["removed"]
        assert (changed > 0) == (kind not in ("the listen port", "the private key")), kind
    again = client.send("POST", "/api/v1/sync-ips").json
    assert (again["added"], again["updated"], again["removed"], again["unchanged"]) == (0, 0, 0, 2)


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


def test_what_left_a_large_interface_is_gone_from_it_at_the_answer(
    topology: Topology, gateway: GatewayProcess, client: Client
) -> None:
    name = topology.interface
    path = "/api/v1/configurations/"
    keys = [a_key(number) for number in range(200)]
    assert client.send("PUT", path, [{"public_key": key} for key in keys]).status == 200
    for number in range(30):
        there = {peer.public_key for peer in wg_dump(name).peers}
        assert client.status(keys[number], "suspended").status == 200
        assert client.delete(keys[100 + number]).status == 200
        gone = there - {peer.public_key for peer in wg_dump(name).peers}
        assert len(gone) == 2
    new = a_key("new")
    target = f"{path}{path_key(keys[50])}/rotate"
    assert client.send("POST", target, {"new_public_key": new}).status == 200
    kept = [{"public_key": key} for key in keys[60:100]]
    assert client.send("PUT", f"{path}?allow_mass_delete=true", kept).status == 200
    assert len(wg_dump(name).peers) == 40


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
