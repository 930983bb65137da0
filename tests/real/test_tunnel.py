"""Packets through a real tunnel: what the API says is what passes.

Topology: see netns.Topology. The gateway runs as a process in its namespace with WG_BACKEND=auto,
clients are WireGuard interfaces set up with `wg` from the gateway's own answers, and traffic is
counted where it arrives.
"""

from __future__ import annotations

import base64
import http.client
import json
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import netns
import pytest
from backend_contract import Dump, output, wg_dump
from harness import API_KEY, LONG, Client, GatewayProcess, a_key, path_key, some, wait_for
from netns import RunningPing, Stream, Topology, Tunnel

pytestmark = pytest.mark.real

EVERYWHERE = (*Topology.GATEWAY, *Topology.HOST)


def connect(topology: Topology, client: Client, number: int = 0, **fields: Any) -> Tunnel:
    """A client that was created through the API and whose tunnel carries traffic."""
    tunnel = topology.tunnel(number)
    answer = client.create(tunnel.public_key, protocol="dual", **fields)
    assert answer.status == 200, answer
    tunnel.connect(answer.json, fields.get("preshared_key"))
    assert tunnel.ping(Topology.GATEWAY[0], count=1) == {Topology.GATEWAY[0]: 1}
    return tunnel


def shown(client: Client, tunnel: Tunnel) -> dict[str, Any]:
    configuration: dict[str, Any] = client.get(tunnel.public_key).json
    return configuration


def assert_nothing_passes_after(streams: list[Stream], moment: float, count: int = 150) -> None:
    """Of as many datagrams more in each stream, which send them at the same time."""
    until = [stream.sent + count for stream in streams]
    for stream, number in zip(streams, until, strict=True):
        stream.send_more(number - stream.sent)
    assert {stream: stream.sent_and_arrived_after(moment) for stream in streams} == dict.fromkeys(
        streams, 0
    )


def peers_of(topology: Topology) -> set[str]:
    peers = wg_dump(topology.interface).peers
    return {base64.b64encode(peer.public_key).decode() for peer in peers}


def sessions(topology: Topology) -> list[list[str]]:
    """Key, endpoint and last handshake of each peer: all that a client's session shows."""
    lines = output("wg", "show", topology.interface, "dump").splitlines()[1:]
    return sorted([line.split("\t")[field] for field in (0, 2, 4)] for line in lines)


@pytest.fixture
def userspace(settings: dict[str, str]) -> dict[str, str]:
    """Settings with the userspace WireGuard, for tests of its process."""
    netns.need("wireguard-go", tun=True)
    settings["WG_BACKEND"] = "uapi"
    return settings


# --- a peer's life --------------------------------------------------------------------------------


def test_a_client_created_by_signed_curl_reaches_gateway_and_host_behind_it(
    topology: Topology, gateway: GatewayProcess
) -> None:
    netns.need("curl", "openssl")
    tunnel = topology.tunnel(0)
    body = json.dumps({"public_key": tunnel.public_key, "protocol": "dual"})
    timestamp = str(int(time.time()))
    message = f"timestamp={timestamp}, body_length={len(body)}"
    digest = netns.output("openssl", "dgst", "-sha256", "-hmac", API_KEY, "-r", given=message)
    answer = output(
        *("curl", "--silent", "--show-error", "--insecure", "--data", body),
        *("--header", f"timestamp: {timestamp}", "--header", f"signature: {digest.split()[0]}"),
        *("--header", "content-type: application/json"),
        f"https://127.0.0.1:{gateway.port}/api/v1/configurations/",
    )
    tunnel.connect(json.loads(answer))
    assert tunnel.ping(*EVERYWHERE) == dict.fromkeys(EVERYWHERE, 3)


def test_nothing_passes_from_an_address_that_is_not_the_clients(
    topology: Topology, client: Client
) -> None:
    tunnel = connect(topology, client)
    own, foreign = shown(client, tunnel)["assigned_ip"], "10.77.0.200"
    tunnel.namespace.ip(f"address add {foreign} dev {tunnel.name}")
    ends = (tunnel.namespace, topology.host, Topology.HOST[0])
    with Stream(*ends, sender=own) as allowed, Stream(*ends, sender=foreign) as forged:
        allowed.flows()
        forged.send_more()
        assert forged.arrived == []


def test_the_wg_quick_file_connects_with_a_preshared_key(
    topology: Topology, client: Client
) -> None:
    tunnel = topology.tunnel(0)
    psk = output("wg", "genpsk").strip()
    client.create(tunnel.public_key, protocol="dual", preshared_key=psk)
    tunnel.connect_by_file(client.get(tunnel.public_key, "?format=wg-quick").body.decode())
    assert tunnel.ping(*EVERYWHERE) == dict.fromkeys(EVERYWHERE, 3)


def test_suspend_stops_every_packet_and_activate_lets_them_pass_again(
    topology: Topology, client: Client
) -> None:
    """The client is left alone: it finds its way back by itself, in about 15 s (LONG)."""
    tunnel = connect(topology, client)
    before = shown(client, tunnel)
    with topology.streams(tunnel, before) as streams:
        for stream in streams:
            stream.flows()
        assert client.status(tunnel.public_key, "suspended").json == {"status": "suspended"}
        assert_nothing_passes_after(streams, time.monotonic())
        assert client.status(tunnel.public_key, "active").json == {"status": "updated"}
        if not LONG:
            tunnel.reconnect()
        for stream in streams:
            stream.flows(60)
    after = shown(client, tunnel)
    for field in ("status", "assigned_ip", "assigned_ipv6"):
        assert after[field] == before[field]


def test_a_suspended_client_that_reconnects_gets_nothing_until_it_is_active(
    topology: Topology, client: Client
) -> None:
    tunnel = connect(topology, client)
    client.status(tunnel.public_key, "suspended")
    tunnel.reconnect()
    assert tunnel.ping(Topology.HOST[0], count=1, wait=2) == {Topology.HOST[0]: 0}
    client.status(tunnel.public_key, "active")
    tunnel.reconnect()
    assert tunnel.ping(*EVERYWHERE) == dict.fromkeys(EVERYWHERE, 3)


@pytest.mark.long
def test_delete_stops_every_packet_of_that_client_and_none_of_the_other(
    topology: Topology, client: Client
) -> None:
    deleted, other = connect(topology, client, 0), connect(topology, client, 1)
    with (
        RunningPing(other.namespace, Topology.HOST[0]) as ping,
        # So few that no queue is full where a program gets no processor for a second or two.
        topology.streams(deleted, shown(client, deleted), 0.05) as streams,
    ):
        for stream in streams:
            stream.flows()
        ping.go_on()
        assert client.delete(deleted.public_key).json == {"status": "deleted"}
        assert_nothing_passes_after(streams, time.monotonic(), 60)
        assert ping.stop() == []
    assert peers_of(topology) == {other.public_key}


def test_two_clients_reach_each_other_and_only_with_their_own_preshared_keys(
    topology: Topology, client: Client
) -> None:
    psks = [output("wg", "genpsk").strip() for _ in range(2)]
    tunnels = [connect(topology, client, n, preshared_key=psks[n]) for n in range(2)]
    there = shown(client, tunnels[1])
    addresses = (there["assigned_ip"], there["assigned_ipv6"])
    assert tunnels[0].ping(*addresses) == dict.fromkeys(addresses, 3)

    wrong = topology.tunnel(0)
    answer = client.create(wrong.public_key, protocol="dual", preshared_key=psks[0])
    wrong.namespace.ip(f"link set {tunnels[0].name} down")
    wrong.connect(answer.json, psks[1])
    assert wrong.ping(Topology.GATEWAY[0], count=1, wait=2) == {Topology.GATEWAY[0]: 0}


@pytest.mark.long
def test_expires_at_suspends_when_its_time_has_come_and_not_before(
    topology: Topology, client: Client
) -> None:
    """That it is within about a second only an idle machine shows: test_clock.py has the rule."""
    tunnel = connect(topology, client)
    with topology.streams(tunnel, shown(client, tunnel)) as streams:
        for stream in streams:
            stream.flows()
        expires_at = int(time.time()) + 5
        text = datetime.fromtimestamp(expires_at, timezone.utc).isoformat()
        path = f"/api/v1/configurations/{path_key(tunnel.public_key)}"
        assert client.send("PATCH", path, {"expires_at": text}).json["status"] == "active"
        for stream in streams:
            stream.flows()

        def expired() -> bool:
            if shown(client, tunnel)["status"] == "active":
                return False
            assert time.time() >= expires_at, "too early"
            return True

        wait_for(expired, what="the end of the peer")
        assert_nothing_passes_after(streams, time.monotonic())
    assert shown(client, tunnel)["status_reason"] == "expired"
    assert peers_of(topology) == set()


def test_live_state_becomes_true(topology: Topology, client: Client) -> None:
    tunnel = topology.tunnel(0)
    answer = client.create(tunnel.public_key, protocol="dual").json
    live = ("online", "last_handshake", "rx_bytes", "tx_bytes")
    assert [answer[field] for field in live] == [False, None, 0, 0]
    started = int(time.time())
    tunnel.connect(answer)
    tunnel.ping(*EVERYWHERE, count=5)
    seen = wait_for(lambda: (s := shown(client, tunnel))["rx_bytes"] > 2000 and s)
    assert seen["online"] is True
    handshake = datetime.fromisoformat(seen["last_handshake"].replace("Z", "+00:00"))
    assert started <= handshake.timestamp() <= time.time()

    def agrees_with_wg() -> bool:
        transfer = output("wg", "show", topology.interface, "transfer").split()
        now = shown(client, tunnel)
        return transfer == [tunnel.public_key, str(now["rx_bytes"]), str(now["tx_bytes"])]

    wait_for(agrees_with_wg, what="the counters of wg")


# --- restarts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", some([GatewayProcess.kill, GatewayProcess.stop], 1))
def test_a_restart_loses_no_packet(
    topology: Topology,
    gateway: GatewayProcess,
    end: Callable[[GatewayProcess], int],
) -> None:
    client = gateway.client()
    tunnel = connect(topology, client)
    suspended = a_key("suspended")
    client.create(suspended)
    client.status(suspended, "suspended")
    before, daemon = sessions(topology), netns.daemon_pid(topology.interface)
    v4, v6 = Topology.HOST
    with RunningPing(tunnel.namespace, v4) as ping4, RunningPing(tunnel.namespace, v6) as ping6:
        ping4.go_on()
        end(gateway)
        ping4.go_on()
        gateway.start()
        ping4.go_on(60)
        assert (ping4.stop(), ping6.stop()) == ([], [])
    assert sessions(topology) == before
    assert netns.daemon_pid(topology.interface) == daemon
    assert peers_of(topology) == {tunnel.public_key}


def test_an_interface_of_ours_whose_state_was_lost_is_brought_in_line(
    topology: Topology, stopped: GatewayProcess
) -> None:
    name = topology.interface
    netns.make_wireguard(topology.gateway, name)
    output("ip", "link", "set", "dev", name, "alias", f"wggw {stopped.directory}/wireguard.db")
    output("wg", "set", name, "listen-port", "4", "private-key", "/dev/null")
    output("wg", "set", name, "peer", a_key("foreign"), "allowed-ips", "10.77.0.2/32,::/0")
    daemon = netns.daemon_pid(name)
    client = stopped.start().client()
    private_key = base64.b64decode((stopped.directory / "privatekey").read_text())
    assert wg_dump(name) == Dump(private_key, 51820, set())
    assert netns.daemon_pid(name) == daemon
    tunnel = connect(topology, client)
    assert tunnel.ping(*EVERYWHERE) == dict.fromkeys(EVERYWHERE, 3)


def test_auto_takes_what_the_machine_has(topology: Topology, gateway: GatewayProcess) -> None:
    assert (netns.daemon_pid(topology.interface) is None) == netns.kernel_has_wireguard()


# --- the userspace WireGuard's process ------------------------------------------------------------


@pytest.mark.parametrize("found", [False, True] if LONG else [True], ids=str)
def test_a_killed_wireguard_go_comes_back_with_all_peers(
    userspace: dict[str, str], topology: Topology, gateway: GatewayProcess, found: bool
) -> None:
    """Whether this run of the gateway started it or found it running."""
    if found:
        gateway.stop()
        gateway.start()
    client = gateway.client()
    tunnel = connect(topology, client)
    for number in range(20):
        client.create(a_key(number), preshared_key=a_key(("psk", number)))
    client.status(a_key(0), "suspended")
    before = wg_dump(topology.interface)
    assert len(before.peers) == 20
    netns.end_daemon(topology.interface)
    wait_for(lambda: netns.daemon_pid(topology.interface), what="wireguard-go is back")
    wait_for(lambda: wg_dump(topology.interface) == before, what="all peers are back")
    tunnel.reconnect()
    assert tunnel.ping(*EVERYWHERE) == dict.fromkeys(EVERYWHERE, 3)
    seen = shown(client, tunnel)
    wait_for(  # a sample may have failed meanwhile, and the next one says that all is well
        lambda: client.send("GET", "/api/v1/server/status").json["status"] == "healthy",
        what="a healthy status",
    )
    wait_for(lambda: shown(client, tunnel)["rx_bytes"] > seen["rx_bytes"], what="counters go on")


def test_a_start_after_gateway_and_wireguard_go_were_killed_puts_all_back(
    userspace: dict[str, str], topology: Topology, gateway: GatewayProcess
) -> None:
    client = gateway.client()
    tunnel = connect(topology, client)
    client.create(a_key("suspended"))
    client.status(a_key("suspended"), "suspended")
    before = wg_dump(topology.interface)
    gateway.kill()
    netns.end_daemon(topology.interface)
    gateway.start()
    assert wg_dump(topology.interface) == before
    tunnel.reconnect()
    assert tunnel.ping(*EVERYWHERE) == dict.fromkeys(EVERYWHERE, 3)


def status(client: Client) -> Any:
    return client.send("GET", "/api/v1/server/status").json["status"]


def test_every_200_is_on_the_interface_while_wireguard_go_dies_again_and_again(
    userspace: dict[str, str], topology: Topology, gateway: GatewayProcess
) -> None:
    """Creates go on through three deaths; after a repair nothing is missing and nothing extra."""
    client = gateway.client()
    answered: set[str] = set()
    for death in range(3):
        for number in range(30):
            if number == 15:
                netns.end_daemon(topology.interface)
            public_key = a_key((death, number))
            answer = client.create(public_key)
            assert answer.status == 200 or (answer.status == 503 and number >= 15), answer
            if answer.status == 200:
                answered.add(public_key)
        wait_for(lambda: netns.daemon_pid(topology.interface), what="wireguard-go is back")
        wait_for(lambda: status(client) == "healthy", what="the gateway says so")
        assert peers_of(topology) == answered


def test_without_any_wireguard_the_start_fails_and_says_why(
    topology: Topology, stopped: GatewayProcess, tmp_path: Path
) -> None:
    if netns.kernel_has_wireguard():
        pytest.skip("the kernel's WireGuard cannot be taken away")
    stopped.settings["PATH"] = str(tmp_path)
    process = stopped.spawn()
    assert process.wait(60) == 1
    assert "no WireGuard" in stopped.text()
    with pytest.raises((OSError, http.client.HTTPException)):
        stopped.client().get(a_key(1))
    assert subprocess.run(["ip", "link", "show", topology.interface], check=False).returncode
