"""Taking over a live interface: nobody's tunnel is interrupted, and what does not fit is told.

The interface is made by hand, as another manager would leave it, with a client whose ping and TCP
stream run through all of it: `wggw adopt`, then `wggw serve`, which must find everything right.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import awg_programs
import netns
import pytest
from awg_programs import uapi
from backend_contract import output
from harness import GatewayProcess, a_key, finish, program_with, wait_for
from netns import RunningPing, Topology, Tunnel

import wggw

pytestmark = pytest.mark.real

CASES = Path(__file__).parent.parent / "data" / "moving-in"
PORT = 51899
ADDRESSES = ("10.77.0.1/24", "fd77::1/64")


@pytest.fixture
def stopped(topology: Topology, tmp_path: Path) -> Iterator[GatewayProcess]:
    """A gateway whose settings say nothing of the interface but that it may be real."""
    process = GatewayProcess(tmp_path, None, WG_BACKEND="auto", SAMPLE_INTERVAL="1")
    process.settings |= {"WG_ENDPOINT": Topology.ENDPOINT, "PATH": os.environ["PATH"]}
    yield process
    process.close()


def live(topology: Topology, peers: str, *addresses: str) -> str:
    """An interface that somebody made by hand; returns its public key."""
    name, private = topology.interface, output("wg", "genkey").strip()
    netns.make_wireguard(topology.gateway, name)
    head = f"[Interface]\nPrivateKey = {private}\nListenPort = {PORT}\n"
    netns.output("wg", "setconf", name, "/dev/stdin", given=head + peers)
    topology.gateway.ip(
        *(f"address add {address} dev {name}" for address in addresses or ADDRESSES),
        f"link set {name} mtu 1400 up",
    )
    return netns.output("wg", "pubkey", given=private).strip()


def peer(key: str, *networks: str) -> str:
    allowed = f"AllowedIPs = {', '.join(networks)}\n" if networks else ""
    return f"[Peer]\nPublicKey = {key}\n{allowed}"


def adopt(
    gateway: GatewayProcess, name: str, *options: str, **constants: object
) -> subprocess.CompletedProcess[str]:
    program = program_with(**constants) if constants else gateway.program  # type: ignore[arg-type]
    command = [*program, "adopt", "--interface", name, *options]
    return finish(command, gateway.directory, **gateway.settings)


def sections(name: str) -> list[str]:
    """What `wg` says of an interface; the order of its peers is any."""
    return sorted(map(str.strip, output("wg", "showconf", name).split("\n\n")))


def seen(name: str) -> list[str]:
    """All that is to be seen of it, its alias among it."""
    return [output("ip", "link", "show", name), *sections(name)]


def settings_of(gateway: GatewayProcess) -> Mapping[str, str]:
    return wggw.read_env_file((gateway.directory / ".env").read_text(), ".env")


def wait_for_line(gateway: GatewayProcess, words: str) -> None:
    """The log gathers lines, so they may come after the answer that the gateway is ready."""
    wait_for(lambda: words in gateway.text(), what=words)


def connect(topology: Topology, public_key: str, psk: str) -> Tunnel:
    tunnel = topology.tunnels[0]
    answer = {
        "server_public_key": public_key,
        "endpoint": f"{Topology.ENDPOINT}:{PORT}",
        "allowed_ips": [*Topology.SUBNETS],
        "persistent_keepalive": 25,
        "assigned_ip": "10.77.0.250",
        "assigned_ipv6": "fd77::250",
        "mtu": 1400,
    }
    tunnel.connect(answer, psk)
    assert tunnel.ping(*Topology.GATEWAY) == dict.fromkeys(Topology.GATEWAY, 3)
    return tunnel


class Transfer:
    """A TCP connection from a client to the gateway's tunnel address that never stops sending."""

    def __init__(self, tunnel: Tunnel) -> None:
        self.received = 0
        self._listener = socket.create_server((Topology.GATEWAY[0], 0))
        with tunnel.namespace.inside():
            self._sender = socket.create_connection(self._listener.getsockname(), 30)
        self._receiver, _ = self._listener.accept()
        self._threads = [threading.Thread(target=t) for t in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        with contextlib.suppress(OSError):  # shut down at the end
            while True:
                self._sender.sendall(bytes(1000))
                threading.Event().wait(0.005)

    def _receive(self) -> None:
        while data := self._receiver.recv(65536):
            self.received += len(data)

    def goes_on(self) -> None:
        until = self.received + 20_000
        wait_for(lambda: self.received >= until, what="the TCP transfer to go on")

    def close(self) -> None:
        self._sender.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for each in (self._sender, self._receiver, self._listener):
            each.close()


@pytest.mark.long
def test_two_thousand_peers_are_taken_over_and_no_packet_is_lost(
    topology: Topology, stopped: GatewayProcess
) -> None:
    name, client = topology.interface, topology.tunnel(0)
    psk = output("wg", "genpsk").strip()
    others = "".join(
        peer(a_key(n), f"10.77.{n // 250}.{n % 250 + 2}/32", f"fd77::{n + 0x1000:x}/128")
        for n in range(1, 2001)
        if n != 248
    )
    mine = peer(client.public_key, "10.77.0.250/32", "fd77::250/128") + f"PresharedKey = {psk}\n"
    public_key = live(topology, others + mine, "10.77.0.1/20", "fd77::1/64")
    tunnel = connect(topology, public_key, psk)
    before = sections(name)
    with RunningPing(tunnel.namespace, Topology.GATEWAY[0]) as ping:
        transfer = Transfer(tunnel)
        ping.go_on()
        done = adopt(stopped, name, "--yes")
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("done: 2000 created, 0 updated, 0 unchanged\n")
        stopped.start()
        wait_for_line(stopped, "0 added, 0 updated, 0 removed, 2000 unchanged")
        transfer.goes_on()
        ping.go_on()
        transfer.close()
        assert ping.stop() == []
    assert sections(name) == before
    shown = stopped.client().get(client.public_key).json
    assert (shown["assigned_ip"], shown["assigned_ipv6"]) == ("10.77.0.250", "fd77::250")
    assert (shown["server_public_key"], shown["port"], shown["mtu"]) == (public_key, PORT, 1400)
    assert stopped.client().send("GET", "/api/v1/server/status").json["status"] == "healthy"
    again = adopt(stopped, name, "--yes")
    assert again.returncode == 1 and "is a gateway's already" in again.stderr


def test_what_does_not_fit_is_told_by_key_and_reason_and_nothing_is_changed(
    topology: Topology, stopped: GatewayProcess, tmp_path: Path
) -> None:
    name = topology.interface
    misfits = {
        "none": ((), "it has no address"),
        "two": (("10.77.0.3/32", "10.77.0.4/32"), "it has several IPv4 addresses"),
        "routed": (("10.77.0.5/32", "192.168.40.0/24"), "192.168.40.0/24 is routed to it"),
        "outside": (("10.79.0.6/32",), "its address is 10.79.0.6, outside of 10.77.0.0/24"),
        "the gateway's": (("10.77.0.1/32",), "10.77.0.1 is the gateway's"),
        "broadcast": (("10.77.0.255/32",), "10.77.0.255 is the gateway's, another peer's"),
    }
    fitting = peer(a_key("fits"), "10.77.0.2/32")
    live(topology, fitting + "".join(peer(a_key(k), *v[0]) for k, v in misfits.items()))
    files = {path.name for path in tmp_path.iterdir()}
    before = seen(name)
    for options in (["--yes"], ["--dry-run", "--skip"], ["--skip"]):
        done = adopt(stopped, name, *options)
        assert done.returncode == (options != ["--dry-run", "--skip"]), done.stderr
        for key, (_, reason) in misfits.items():
            assert re.search(rf"\({re.escape(a_key(key)[:8])}\S*\): {reason}", done.stderr)
        assert {path.name for path in tmp_path.iterdir()} == files
        assert seen(name) == before
    assert "left out: 6 peers. When the gateway starts, it removes them" in done.stdout
    done = adopt(stopped, name, "--skip", "--yes")
    assert done.returncode == 0, done.stderr
    assert sections(name) == before[1:]
    stopped.start()
    wait_for_line(stopped, "0 added, 0 updated, 6 removed, 1 unchanged")


def test_settings_that_say_otherwise_are_told_with_both_values(
    topology: Topology, stopped: GatewayProcess, tmp_path: Path
) -> None:
    live(topology, peer(a_key(1), "10.77.0.2/32"), "10.77.0.254/24")
    key_file = tmp_path / "privatekey"
    netns.output("sh", "-c", f"umask 077; wg genkey >{key_file}")
    stopped.settings |= {"WG_DEFAULT_PORT": "51820", "WG_INTERFACE": "wg7"}
    done = adopt(stopped, topology.interface, "--yes")
    assert done.returncode == 2
    for words in (
        f"WG_INTERFACE is 'wg7', but '{topology.interface}' of {topology.interface}",
        f"WG_DEFAULT_PORT is '51820', but '{PORT}' of",
    ):
        assert words in done.stderr
    del stopped.settings["WG_DEFAULT_PORT"], stopped.settings["WG_INTERFACE"]
    done = adopt(stopped, topology.interface, "--yes")
    assert done.returncode == 2
    assert f"{str(key_file)!r} holds another key than {topology.interface}" in done.stderr
    way_out = re.search(r"`ip (address add 10\.77\.0\.1/24 dev \S+)` gives", done.stderr)
    assert way_out, done.stderr
    topology.gateway.ip(way_out[1])
    del stopped.settings["WG_PRIVATE_KEY_FILE"]  # the default one may be there or not
    stopped.settings["WG_PRIVATE_KEY_FILE"] = str(tmp_path / "other")
    assert adopt(stopped, topology.interface, "--yes").returncode == 0
    stopped.start()
    wait_for_line(stopped, "0 removed, 1 unchanged")


def test_a_wg_quick_interface_is_adopted_with_the_names_of_its_file(
    topology: Topology, stopped: GatewayProcess, tmp_path: Path
) -> None:
    """The case's file is that of a server that has run for years."""
    text = (CASES / "wg0.conf").read_text()
    # Without what wg(8) itself does not take.
    stripped = re.sub(r"(?m)[ \t]*#.*$|^AllowedIPs =\s*$", "", text)
    peers = stripped[stripped.index("[Peer]") :]
    live(topology, peers, "10.8.0.1/24", "fd00:8::1/64")
    (tmp_path / f"{topology.interface}.conf").write_text(text)
    directories = {"wireguard": str(tmp_path), "amneziawg": str(tmp_path)}
    network = tmp_path / "20-vpn.network"
    network.write_text(f"[Match]\nName={topology.interface}\n")
    constants = {"OTHERS_FILES": directories, "NETWORKD_DIRECTORIES": (str(tmp_path),)}
    done = adopt(stopped, topology.interface, "--skip", "--yes", **constants)
    assert done.returncode == 0, done.stderr
    assert "192.168.40.0/24 is routed to it" in done.stderr and "no address" in done.stderr
    unit, file = f"wg-quick@{topology.interface}", tmp_path / f"{topology.interface}.conf"
    assert f"systemctl disable {unit}; mv {file} {file}.adopted\n" in done.stdout
    assert f"mv {network} {network}.adopted; systemctl restart systemd-networkd" in done.stdout
    # As after a crash before the mark: the same command again.
    topology.gateway.ip(f"link set dev {topology.interface} alias ''")
    again = adopt(stopped, topology.interface, "--skip", "--yes", **constants)
    assert again.stdout.endswith("done: 0 created, 0 updated, 2 unchanged\n"), again.stderr
    stopped.start()
    wait_for_line(stopped, "2 removed, 2 unchanged")
    page = stopped.client().send("GET", "/api/v1/configurations/").json
    assert {p["label"]: p["assigned_ipv6"] for p in page["configurations"]} == {
        "laptop of the office": "fd00:8::2",
        "phone": "fd00:8::3",
    }


@pytest.mark.parametrize("case", ["awg0-1.0.conf", "awg0-2.0.conf", "awg0-3.1.conf"])
def test_an_obfuscated_interface_keeps_what_it_speaks(
    case: str, topology: Topology, stopped: GatewayProcess, tmp_path: Path
) -> None:
    netns.need("wireguard-go", "wg", tun=True)
    program = awg_programs.install(awg_programs.newest(), tmp_path / "bin")
    name = topology.interface
    text = (CASES / case).read_text()
    found = wggw.read_wg_file(text)
    wanted = wggw.parse_obfuscation(wggw.parse_awg_file(text)).parameters
    [private], [port] = (
        re.findall(rf"(?m)^{n} = (.*)$", text) for n in ("PrivateKey", "ListenPort")
    )
    process = awg_programs.start(program, name)
    try:
        request = (
            f"set=1\nprivate_key={wggw.decode_key(private).hex()}\nlisten_port={port}\n"
            + wggw.encode_uapi_parameters(wanted, wggw.PLAIN)
            + f"public_key={wggw.decode_key(found.peers[0].fields['public_key']).hex()}\n"
            "allowed_ip=10.8.1.2/32\n\n"
        )
        assert uapi(name, request) == "errno=0\n\n"
        topology.gateway.ip(f"address add 10.8.1.1/24 dev {name}", f"link set {name} mtu 1380 up")
        before = uapi(name, "get=1\n\n")
        stopped.settings["PATH"] = awg_programs.path_with(program.parent)
        done = adopt(stopped, name, "--yes")
        assert done.returncode == 0, done.stderr
        assert private not in done.stdout + done.stderr
        written = settings_of(stopped)
        assert (written["WG_INTERFACE"], written["AWG_INTERFACE"]) == ("", name)
        stopped.start()
        wait_for_line(stopped, "0 added, 0 updated, 0 removed, 1 unchanged")
        assert awg_programs.parameters(name) == wanted
        assert uapi(name, "get=1\n\n") == before
    finally:
        stopped.close()
        awg_programs.end(process, name)
