"""Whether settings fit the host and what is stored: one table for serve, net up and doctor.

Each host is a network namespace of its own. What refuses names the setting, both values and the way
out, and nothing was made or changed.
"""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import netns
import pytest
from backend_contract import output
from harness import GatewayProcess, a_key, finish, some, wait_for
from netns import RunningPing, Topology

pytestmark = pytest.mark.real


def command(gateway: GatewayProcess, *words: str, **settings: str) -> tuple[int, str]:
    """Exit code and all that a command says; the test's thread is inside of the host."""
    variables = {**gateway.settings, **settings}
    done = finish([*gateway.program, *words], gateway.directory, **variables)
    return done.returncode, done.stdout + done.stderr


def look() -> tuple[str, str]:
    """Links, their addresses but for those that the kernel adds later on, and the packet filter."""
    links = sorted(name for _, name in socket.if_nameindex())
    return f"{links} {output('ip', '-4', '-o', 'address')}", output("nft", "list", "ruleset")


def refusals(gateway: GatewayProcess, expected: int = 2, **settings: str) -> str:
    """What serve says, which net up and doctor must say as well; the host stays as it is."""
    before = look()
    code, text = command(gateway, "serve", **settings)
    line = text.strip().splitlines()[-1].removeprefix("wggw: ")
    assert code == expected, text
    code, said = command(gateway, "net", "up", **settings)
    assert (code, said.strip().removeprefix("wggw: ")) == (expected, line)
    assert look() == before
    code, said = command(gateway, "doctor", **settings)
    assert code == 1
    for fault in line.split("; "):
        found, _, todo = fault.rpartition(": ")
        assert f"WRONG  {found}\n       -> {todo}\n" in said, said
    return line


@pytest.mark.parametrize(
    ("there", "subnets", "words"),
    some(
        [
            (
                "address add 10.0.1.7/24 dev host",
                {"WG_IPV4_SUBNET": "10.0.1.0/24"},
                "WG_IPV4_SUBNET 10.0.1.0/24: overlaps 10.0.1.0/24 of host: choose another subnet "
                "in WG_IPV4_SUBNET, such as 10.1.1.0/24",
            ),
            (
                "route add 10.0.0.0/8 via 203.0.113.2",
                {"WG_IPV4_SUBNET": "10.0.1.0/24"},
                "WG_IPV4_SUBNET 10.0.1.0/24: overlaps 10.0.0.0/8 of host: choose another subnet in "
                "WG_IPV4_SUBNET, such as 172.17.1.0/24",
            ),
            (
                "address add 10.0.1.7/32 dev lo",
                {"WG_IPV4_SUBNET": "10.0.0.0/16"},
                "WG_IPV4_SUBNET 10.0.0.0/16: overlaps 10.0.1.7/32 of lo: choose",
            ),
            (
                "route add fd42:4242:1:0:8000::/65 via 2001:db8:3::2",
                {"WG_IPV6_SUBNET": "fd42:4242:1::/64"},
                "WG_IPV6_SUBNET fd42:4242:1::/64: overlaps fd42:4242:1:0:8000::/65 of host: choose",
            ),
        ],
        2,
    ),
)
def test_subnet_that_overlaps_the_hosts_is_refused(
    topology: Topology, stopped: GatewayProcess, there: str, subnets: dict[str, str], words: str
) -> None:
    topology.gateway.ip(there, "route add default via 203.0.113.2")
    assert refusals(stopped, **subnets).startswith(words)
    topology.gateway.ip(there.replace(" add ", " delete ", 1))
    code, text = command(stopped, "net", "up", **subnets)  # a default route is no obstacle
    assert code == 0, text


def test_port_that_something_else_holds_is_refused_with_its_holder(
    topology: Topology, stopped: GatewayProcess
) -> None:
    with topology.gateway.socket(socket.AF_INET) as other:
        other.bind(("198.51.100.1", 51820))
        line = refusals(stopped, 1)  # which may pass: systemd tries it again
        name = Path("/proc/self/comm").read_text().strip()
        assert line == (
            f"WG_DEFAULT_PORT 51820: UDP port 51820 is held by {name} (process {os.getpid()}): "
            "stop that program, or change WG_DEFAULT_PORT"
        )
    with socket.create_server(("127.0.0.1", 8001)):
        code, text = command(stopped, "net", "up", API_PORT="8001")
        assert code == 1
        assert "API_HOST 127.0.0.1, API_PORT 8001: cannot listen on 127.0.0.1 port 8001" in text
        assert f"(process {os.getpid()}): stop that program, or change API_PORT" in text
        code, again = command(stopped, "serve", API_PORT="8001")
        assert (code, again.splitlines()[-1]) == (1, text.strip())


def test_running_gateway_holds_its_ports_itself(stopped: GatewayProcess) -> None:
    """What it restarts over is its own, and doctor sees who has what."""
    stopped.start()
    _, text = command(stopped, "doctor")
    assert "ok     WG_DEFAULT_PORT 51820: " in text, text
    assert f"has it, for {stopped.settings['WG_INTERFACE']}" in text
    assert "API_PORT" not in text
    assert stopped.stop() == 0
    stopped.start()  # with the interface that stayed up, and its port


def test_choices_that_are_gone_are_refused_or_moved(
    stopped: GatewayProcess,
) -> None:
    every = {
        "WG_EXTRA_PORTS": "53,443",
        "DNS_SERVERS": '{"d1":"1.1.1.1","d9":"9.9.9.9"}',
    }
    stopped.settings |= every
    stopped.start()
    client = stopped.client()
    for name, fields in {
        "follows": {},
        "chose": {"port": 443, "dns": "d9"},
        "chose too": {"port": 443},
        "chose what stays": {"port": 53, "dns": "none"},
    }.items():
        assert client.create(a_key(name), **fields).status == 200
    assert stopped.stop() == 0
    fewer = {"WG_DEFAULT_PORT": "51999", "WG_EXTRA_PORTS": "53", "DNS_SERVERS": '{"d2":"8.8.8.8"}'}
    line = refusals(stopped, **fewer)
    name = stopped.settings["WG_INTERFACE"]
    port, dns = line.split("; ")
    way = (
        ": restore the setting, or change or delete these peers first, or start with "
        "MOVE_PEERS=true to move them to the present settings"
    )
    ports = f"the port 443 of {name} is used by 2 peers, but is none of 51999, 53"
    assert port == f"WG_EXTRA_PORTS: {ports}{way}"
    choices = "the choice 'd9' is used by 1 peer, but is none of d2, none"
    assert dns == f"DNS_SERVERS: {choices}{way}"
    stopped.settings |= {**fewer, "MOVE_PEERS": "true"}
    stopped.start()
    client = stopped.client()
    shown = {
        name: [client.get(a_key(name)).json[field] for field in ("port", "dns", "dns_servers")]
        for name in ("follows", "chose", "chose too", "chose what stays")
    }
    assert shown == {
        "follows": [51999, "d2", ["8.8.8.8"]],
        "chose": [51999, "d2", ["8.8.8.8"]],
        "chose too": [51999, "d2", ["8.8.8.8"]],
        "chose what stays": [53, "none", []],
    }
    assert "moved 3 peers" not in stopped.text()
    assert "MOVE_PEERS: moved 2 peers to the present settings" in stopped.text()


def test_gateway_keeps_its_address_when_the_subnet_grows_and_has_no_others(
    topology: Topology, stopped: GatewayProcess
) -> None:
    small, large = "10.77.8.0/24", "10.77.0.0/16"
    stopped.settings |= {"WG_IPV4_SUBNET": small, "WG_IPV6_SUBNET": "fd77:0:0:8::/64"}
    stopped.start()
    tunnel = topology.tunnel(0)
    answer = stopped.client().create(tunnel.public_key, protocol="dual")
    tunnel.connect(answer.json)
    known = ("10.77.8.1", "fd77:0:0:8::1")
    tunnel.namespace.ip(*(f"route add {to} dev {tunnel.name}" for to in (large, "fd77::/48")))
    assert tunnel.ping(*known, count=1) == dict.fromkeys(known, 1)
    with RunningPing(tunnel.namespace, "10.77.8.1") as pings:
        pings.go_on()
        assert stopped.stop() == 0
        stopped.settings |= {"WG_IPV4_SUBNET": large, "WG_IPV6_SUBNET": "fd77::/48"}
        code, text = command(stopped, "net", "up")
        assert code == 0, text
        stopped.start()
        assert pings.stop() == []
    assert tunnel.ping(*known, "10.77.0.1", count=1) == dict.fromkeys((*known, "10.77.0.1"), 1)
    assert addresses(topology) == [
        "10.77.0.1/16",
        "10.77.8.1/32",
        "fd77:0:0:8::1/128",
        "fd77::1/48",
    ]
    asked = stopped.client().create(a_key(1), assigned_ip="10.77.8.1")
    assert asked.status == 409
    assert stopped.stop() == 0
    stopped.settings["MOVE_PEERS"] = "true"
    stopped.start()
    assert addresses(topology) == ["10.77.0.1/16", "fd77::1/48"]
    topology.gateway.ip(f"address add 10.77.9.9/16 dev {topology.interface}")
    wait_for(lambda: addresses(topology) == ["10.77.0.1/16", "fd77::1/48"], what="no other address")
    assert stopped.stop() == 0
    stopped.settings |= {"WG_IPV4_SUBNET": small, "WG_IPV6_SUBNET": "fd78::/64"}
    assert f"the ipv6 address on {topology.interface} is used by 1 peer" in refusals(stopped)


def addresses(topology: Topology) -> list[str]:
    """Those of the interface, but for the ones that the kernel gives it."""
    lines = output("ip", "-br", "address", "show", topology.interface).split()[2:]
    return sorted(address for address in lines if not address.startswith("fe80:"))


def test_ipv4_goes_on_where_ipv6_is_switched_off(
    topology: Topology, stopped: GatewayProcess
) -> None:
    switches = [Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6") for name in ("all", "default")]
    for switch in switches:
        switch.write_text("1")
    code, text = command(stopped, "net", "up")
    assert code == 0, text
    stopped.start()
    tunnel = topology.tunnel(0)
    client = stopped.client()
    answer = client.create(tunnel.public_key, protocol="dual").json
    status = client.send("GET", "/api/v1/server/status").json
    words = f"IPv6 is switched off on this host, so {topology.interface} has only IPv4"
    assert status["reasons"] == [f"interface {topology.interface}: {words}"]
    _, text = command(stopped, "doctor")
    assert f"WRONG  WG_IPV6_SUBNET fd77::/64: {words}\n       -> sysctl -w net.ipv6.conf" in text
    tunnel.connect(answer)
    assert tunnel.ping(Topology.GATEWAY[0], count=1) == {Topology.GATEWAY[0]: 1}
    for switch in switches:
        switch.write_text("0")
    wait_for(lambda: "fd77::1/64" in addresses(topology), what="IPv6 to be back")
    assert tunnel.ping(Topology.GATEWAY[1], count=1) == {Topology.GATEWAY[1]: 1}
    wait_for(
        lambda: client.send("GET", "/api/v1/server/status").json["reasons"] == [], what="health"
    )
    assert client.get(tunnel.public_key).json["assigned_ipv6"] == answer["assigned_ipv6"]


def test_extra_port_is_taken_from_what_arrives_from_outside_alone(
    topology: Topology, stopped: GatewayProcess
) -> None:
    """The default route leads to client 1; the backend host asks the gateway's resolver."""
    topology.gateway.ip("route add default via 192.0.2.2")
    stopped.settings |= {"WG_EXTRA_PORTS": "53"}
    with topology.gateway.socket(socket.AF_INET) as resolver:
        resolver.bind(("0.0.0.0", 53))
        thread = threading.Thread(target=answer_questions, args=(resolver,))
        thread.start()
        try:
            assert answered(topology.host, "203.0.113.1") == b"answer"
            code, text = command(stopped, "net", "up")
            assert code == 0, text
            name = Path("/proc/self/comm").read_text().strip()
            assert (
                f"note: WG_EXTRA_PORTS 53: {name} (process {os.getpid()}) listens on 0.0.0.0 port "
                f"53, but packets to it that arrive on client1 go to {topology.interface}: let it"
            ) in text
            stopped.start()
            tunnel = topology.tunnel(0)
            tunnel.connect(stopped.client().create(tunnel.public_key, port=53).json)
            assert tunnel.ping(Topology.GATEWAY[0], count=1) == {Topology.GATEWAY[0]: 1}
            assert answered(topology.host, "203.0.113.1") == b"answer"
        finally:
            with topology.gateway.socket(socket.AF_INET) as last:
                last.sendto(b"end", ("127.0.0.1", 53))
            thread.join()


def answer_questions(resolver: socket.socket) -> None:
    while True:
        question, source = resolver.recvfrom(64)
        if question == b"end":
            return
        resolver.sendto(b"answer", source)


def answered(space: netns.Namespace, address: str) -> bytes:
    with space.socket(socket.AF_INET) as asking:
        asking.settimeout(30)
        asking.sendto(b"question", (address, 53))
        return asking.recv(64)
