"""Inside the guest: the gateway as a process, on kernel WireGuard that WG_BACKEND=auto made.

    namespace of the guest                  namespace "client"
    wg0 10.0.1.1 fd42:4242:1::1             wgc 10.0.1.2 fd42:4242:1::2 (as assigned)
    host0 192.0.2.1 ----------------------- client0 192.0.2.2

Requests are signed by openssl and sent by curl, as README.md shows it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import API_KEY, GatewayProcess, a_key, path_key, wait_for

IN_CLIENT = ["ip", "netns", "exec", "client"]
SIGNED = """
timestamp=$(date +%s)
message="timestamp=$timestamp, body_length=$(printf %s "$BODY" | wc -c)"
signature=$(printf %s "$message" | openssl dgst -sha256 -hmac "$KEY" | sed 's/.* //')
curl -sSk --max-time 60 -X "$METHOD" "$URL" -H "signature: $signature" -H "timestamp: $timestamp" \\
  ${BODY:+-H "Content-Type: application/json" --data-binary "$BODY"}
"""


def sh(*command: str) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def call(gateway: GatewayProcess, method: str, path: str, body: Any = None) -> Any:
    environment = {
        "PATH": os.environ["PATH"],
        "KEY": API_KEY,
        "METHOD": method,
        "URL": f"https://127.0.0.1:{gateway.port}/api/v1/configurations/{path}",
        "BODY": "" if body is None else json.dumps(body),
    }
    done = subprocess.run(
        ["sh", "-c", SIGNED], env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def status(gateway: GatewayProcess, key: str, value: str) -> Any:
    return call(gateway, "PUT", f"{path_key(key)}/status", {"status": value})


def pings(address: str, prefix: list[str] = IN_CLIENT) -> bool:
    """Within a second: where an answer is expected, this is waited for."""
    command = [*prefix, "ping", "-q", "-c", "1", "-W", "1", address]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def allowed_ips() -> dict[str, str]:
    lines = sh("wg", "show", "wg0", "allowed-ips").splitlines()
    return dict(line.split("\t", 1) for line in lines)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    gateway = GatewayProcess(
        tmp_path_factory.mktemp("gateway"), WG_BACKEND="auto", WG_ENDPOINT="192.0.2.1"
    )
    try:
        start = time.monotonic()
        gateway.start(60)
        print(f"measured: start to ready: {time.monotonic() - start:.2f} s")
        yield gateway
    finally:
        gateway.close()


@pytest.fixture(scope="module")
def peer(gateway: GatewayProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A peer made by curl, and its namespace with a kernel tunnel from the answer's fields."""
    secret = tmp_path_factory.mktemp("client") / "key"
    secret.write_text(sh("wg", "genkey"))
    key = subprocess.run(
        ["wg", "pubkey"],
        input=secret.read_text(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    created = call(gateway, "POST", "", {"public_key": key, "protocol": "dual"})
    assert created["status"] == "created", created
    sh("ip", "netns", "add", "client")
    try:
        wire_client(created, secret)
        yield created
    finally:
        sh("ip", "netns", "del", "client")


def wire_client(created: Any, secret: Path) -> None:
    for line in (
        "ip link add host0 type veth peer name client0 netns client",
        "ip address add 192.0.2.1/24 dev host0",
        "ip link set host0 up",
        "ip -n client link set lo up",
        "ip -n client address add 192.0.2.2/24 dev client0",
        "ip -n client link set client0 up",
        "ip -n client link add wgc type wireguard",
        f"ip -n client address add {created['assigned_ip']}/32 dev wgc",
        f"ip -n client address add {created['assigned_ipv6']}/128 dev wgc nodad",
        f"ip netns exec client wg set wgc private-key {secret} peer "
        f"{created['server_public_key']} endpoint {created['endpoint']} allowed-ips 0.0.0.0/0,::/0",
        "ip -n client link set wgc up",
        "ip -n client route add 10.0.1.0/24 dev wgc",
        "ip -n client route add fd42:4242:1::/64 dev wgc",
    ):
        sh(*line.split())


def both_ping() -> bool:
    return pings("10.0.1.1") and pings("fd42:4242:1::1")


def test_created_peer_pings_over_both_families(gateway: GatewayProcess, peer: Any) -> None:
    assert "netlink" in gateway.text(), "auto did not choose the kernel"
    start = time.monotonic()
    wait_for(both_ping, 60, "ping over IPv4 and IPv6")
    print(f"measured: first handshake and ping: {time.monotonic() - start:.2f} s")
    assert allowed_ips()[peer["public_key"]].split() == [
        f"{peer['assigned_ip']}/32",
        f"{peer['assigned_ipv6']}/128",
    ]
    live = call(gateway, "GET", path_key(peer["public_key"]))
    assert live["status"] == "active"
    wait_for(
        lambda: call(gateway, "GET", path_key(peer["public_key"]))["online"], 60, "peer online"
    )


def test_suspend_stops_both_directions_and_activate_resumes(
    gateway: GatewayProcess, peer: Any
) -> None:
    key = peer["public_key"]
    wait_for(both_ping, 60, "ping before suspend")
    assert status(gateway, key, "suspended") == {"status": "suspended"}
    for target, prefix in (
        ("10.0.1.1", IN_CLIENT),
        ("fd42:4242:1::1", IN_CLIENT),
        (peer["assigned_ip"], []),
        (peer["assigned_ipv6"], []),
    ):
        assert not pings(target, prefix), f"{target} answers while suspended"
    assert key not in allowed_ips()
    assert status(gateway, key, "active") == {"status": "updated"}
    assert allowed_ips()[key].split()[0] == f"{peer['assigned_ip']}/32"
    again = call(gateway, "POST", "", {"public_key": key})
    assert again["status"] == "exists"
    assert again["assigned_ip"] == peer["assigned_ip"]
    assert again["assigned_ipv6"] == peer["assigned_ipv6"]
    wait_for(both_ping, 60, "ping after activate")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("target", ["10.0.1.1", "fd42:4242:1::1"])
def test_restart_under_a_running_ping_loses_nothing(
    gateway: GatewayProcess, peer: Any, target: str, number: signal.Signals
) -> None:
    wait_for(lambda: pings(target), 60, "ping before the restart")
    command = [*IN_CLIENT, "ping", "-q", "-i", "0.05", target]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        time.sleep(0.5)  # some echoes before the restart, too
        start = time.monotonic()
        gateway.stop() if number == signal.SIGTERM else gateway.kill()
        gateway.start(60)
        print(f"measured: {number.name} to ready again: {time.monotonic() - start:.2f} s")
        time.sleep(1)
        running.send_signal(signal.SIGINT)
        output = running.communicate(timeout=60)[0]
    finally:
        running.kill()
        running.wait()
    found = re.search(r"(\d+) packets transmitted, (\d+) received", output)
    assert found, output
    sent, received = int(found[1]), int(found[2])
    # One may be on its way when ping is stopped: that one is not lost.
    assert received >= 15 and sent - received <= 1, output


def test_deleted_interface_comes_back_with_all_its_peers(
    gateway: GatewayProcess, peer: Any
) -> None:
    for number in range(20):
        answer = call(gateway, "POST", "", {"public_key": a_key(number), "protocol": "dual"})
        assert answer["status"] == "created", answer
    assert status(gateway, a_key(0), "suspended") == {"status": "suspended"}
    before = allowed_ips()
    assert len(before) == 20
    index = sh("cat", "/sys/class/net/wg0/ifindex")
    sh("ip", "link", "del", "wg0")
    start = time.monotonic()

    def is_back() -> bool:
        done = subprocess.run(
            ["wg", "show", "wg0", "allowed-ips"], check=False, capture_output=True, text=True
        )
        found = dict(line.split("\t", 1) for line in done.stdout.splitlines())
        return found == before

    wait_for(is_back, 30, "the interface with all its peers")
    print(f"measured: interface and 20 peers back after: {time.monotonic() - start:.2f} s")
    assert sh("cat", "/sys/class/net/wg0/ifindex") != index
    addresses = sh("ip", "-o", "address", "show", "dev", "wg0")
    assert "10.0.1.1/24" in addresses and "fd42:4242:1::1/64" in addresses
    assert call(gateway, "POST", "", {"public_key": a_key(100)})["status"] == "created"
    assert a_key(100) in allowed_ips()
    # The client still holds the old session: it makes a new one when nothing comes back.
    wait_for(both_ping, 60, "ping after the interface came back")


def test_deleted_peer_is_gone_and_its_ping_stops(gateway: GatewayProcess, peer: Any) -> None:
    key = peer["public_key"]
    wait_for(both_ping, 60, "ping before delete")
    assert call(gateway, "DELETE", path_key(key)) == {"status": "deleted"}
    assert not pings("10.0.1.1")
    assert not pings("fd42:4242:1::1")
    assert key not in allowed_ips()
    assert call(gateway, "GET", path_key(key))["status"] == 404


def test_log_names_no_client_address(gateway: GatewayProcess, peer: Any) -> None:
    text = gateway.text()
    assert text
    assert not re.search(r"192\.0\.2\.2|10\.0\.1\.[2-9]|fd42:4242:1::[2-9a-f]", text)
