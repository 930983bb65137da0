"""Obfuscated tunnels through real packets: what the API answers is all that a client needs.

amneziawg-go is used where it is on PATH (tests/run builds it where Go can fetch it), with every
generation and preset. Elsewhere amneziawg_stand_in.py takes its place, for two of them, or for all
with WGGW_LONG=1; what only the real program can show is then skipped.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import netns
import pytest
from backend_contract import output
from harness import LONG, Client, GatewayProcess, a_key, wait_for
from netns import Topology

import wggw

pytestmark = pytest.mark.real

SOCKETS = Path("/var/run/amneziawg")
PROGRAM = shutil.which("amneziawg-go")
AWG_GATEWAY = ("10.78.0.1", "fd78::1")
PORT = 51999
SETS = [(g, p) for g in wggw.GENERATIONS for p in wggw.PRESETS if (g, p) != ("1.0", "dns")]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """amneziawg-go, or the stand-in under its name, first on PATH."""
    netns.need("wireguard-go", "wg", tun=True)
    if PROGRAM is not None:
        return PROGRAM
    directory = tmp_path / "bin"
    directory.mkdir()
    stand_in = Path(__file__).with_name("amneziawg_stand_in.py")
    path = directory / "amneziawg-go"
    command = shlex.join([sys.executable, str(stand_in)])
    path.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return str(path)


@pytest.fixture
def gateway(
    program: str, topology: Topology, settings: dict[str, str], tmp_path: Path
) -> Iterator[GatewayProcess]:
    """A plain and an obfuscated interface, not started yet."""
    name = netns.unique()
    more = {
        "WG_BACKEND": "uapi",
        "AWG_INTERFACE": name,
        "AWG_IPV4_SUBNET": "10.78.0.0/24",
        "AWG_IPV6_SUBNET": "fd78::/64",
        "AWG_PORT": str(PORT),
    }
    process = GatewayProcess(tmp_path, None, **{**settings, **more})
    yield process
    process.close()
    (SOCKETS / f"{name}.sock").unlink(missing_ok=True)
    netns.forget_socket(name)


def uapi(name: str, request: str, directory: Path = SOCKETS) -> str:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(str(directory / f"{name}.sock"))
        connection.sendall(request.encode())
        answer = b""
        while not answer.endswith(b"\n\n"):
            answer += connection.recv(65536)
    return answer.decode()


def uapi_lines(text: str, private_key: str, changes: dict[str, str]) -> list[str]:
    """A configuration file of AmneziaWG as lines of UAPI, as its own tools would send them."""
    names = {
        "PrivateKey": "private_key", "PublicKey": "public_key", "PresharedKey": "preshared_key",
        "HeaderProtectionKey": "header_protection_key", "Endpoint": "endpoint",
        "PersistentKeepalive": "persistent_keepalive_interval", "AllowedIPs": "allowed_ip",
    }  # fmt: skip
    lines = []
    for line in text.splitlines():
        key, separator, value = line.partition(" = ")
        if not separator or key in ("Address", "DNS", "MTU"):
            continue
        name = names.get(key) or re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower()
        value = private_key if name == "private_key" else value
        if name in ("private_key", "public_key", "preshared_key", "header_protection_key"):
            value = base64.b64decode(value).hex()
        for part in value.split(", ") if name == "allowed_ip" else [changes.get(name, value)]:
            lines.append(f"{name}={part}")
    missing = [name for name in changes if f"{name}={changes[name]}" not in lines]
    at = next(i for i, line in enumerate(lines) if line.startswith("public_key="))
    lines[at:at] = [f"{name}={changes[name]}" for name in missing]
    return lines


class HiddenClient:
    """An AmneziaWG client in a client's namespace, set up from our file and nothing else."""

    def __init__(self, topology: Topology, number: int = 0) -> None:
        self.namespace = topology.clients[number]
        self.name = netns.unique()
        self.private_key = output("wg", "genkey").strip()
        self.public_key = subprocess.run(
            ["wg", "pubkey"], input=self.private_key, capture_output=True, text=True, check=True
        ).stdout.strip()

    def connect(self, text: str, **changes: str) -> None:
        """`changes` are device keys that differ from the file."""
        with self.namespace.inside():
            subprocess.Popen(
                ["amneziawg-go", "-f", self.name],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        path = SOCKETS / f"{self.name}.sock"
        wait_for(path.exists, what="amneziawg-go of the client")
        wait_for(self._listens, what="its socket")
        found = dict(re.findall(r"^(Address|MTU) = (.+)$", text, re.MULTILINE))
        lines = uapi_lines(text, self.private_key, changes)
        answer = uapi(self.name, "\n".join(["set=1", *lines, "", ""]))
        assert answer == "errno=0\n\n", (answer, lines)
        self.namespace.ip(
            *(f"address add {a} dev {self.name}" for a in found["Address"].split(", ")),
            f"link set {self.name} mtu {found['MTU']} up",
            f"route add 10.78.0.0/24 dev {self.name}",
            f"route add fd78::/64 dev {self.name}",
        )

    def _listens(self) -> bool:
        with contextlib.suppress(OSError):
            return uapi(self.name, "get=1\n\n").endswith("errno=0\n\n")
        return False

    def ping(self, target: str, count: int = 3, wait: int = 60) -> int:
        """How many of `count` pings are answered within `wait` seconds."""
        command = ["ping", "-n", "-q", "-c", str(count), "-i", "0.1", "-w", str(wait), target]
        with self.namespace.inside():
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        match = re.search(r"(\d+) received", done.stdout)
        assert match, done.stdout + done.stderr
        return int(match[1])

    def reaches(self) -> bool:
        return all(self.ping(target) == 3 for target in AWG_GATEWAY)

    def end(self) -> None:
        """The program is killed with its namespace; its sockets are files."""
        (SOCKETS / f"{self.name}.sock").unlink(missing_ok=True)
        netns.forget_socket(self.name)


@pytest.fixture
def hidden(topology: Topology, program: str) -> Iterator[HiddenClient]:
    client = HiddenClient(topology)
    yield client
    client.end()


def create(client: Client, hidden: HiddenClient, **own: Any) -> str:
    """Create the client's peer; returns its configuration file."""
    answer = client.create(hidden.public_key, protocol="dual", obfuscation={"enabled": True, **own})
    assert answer.status == 200, answer
    assert answer.json["interface"] != "wg0"
    text = client.get(hidden.public_key, "?format=wg-quick").body.decode()
    return text.replace("REPLACE_WITH_THE_CLIENT_PRIVATE_KEY", hidden.private_key)


def speak(gateway: GatewayProcess, generation: str, preset: str) -> dict[str, Any]:
    shown = wggw.show_state(wggw.generate_obfuscation(generation, preset))
    gateway.settings["AWG_PARAMS"] = json.dumps(
        {name: value for name, value in shown.items() if name != "parameters_version"}
    )
    return shown


class Capture:
    """The UDP payloads to and from the obfuscated port at a client's uplink."""

    def __init__(self, namespace: netns.Namespace) -> None:
        with namespace.inside():
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
        self._socket.bind(("uplink", 3))
        self._socket.settimeout(0.05)
        self.sent: list[bytes] = []
        self.received: list[bytes] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> Capture:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._socket.close()

    def _read(self) -> None:
        while True:
            ended = self._ended.is_set()
            try:
                packet = self._socket.recv(65535)
            except TimeoutError:
                if ended:  # and nothing of what came before is left
                    return
                continue
            if packet[0] >> 4 == 4 and packet[9] == socket.IPPROTO_UDP:
                start = (packet[0] & 15) * 4
                source, target = struct.unpack_from(">HH", packet, start)
                if target == PORT:
                    self.sent.append(packet[start + 8 :])
                elif source == PORT:
                    self.received.append(packet[start + 8 :])


def headers(payload: bytes, padding: int) -> int:
    return int(struct.unpack_from("<I", payload, padding)[0])


def check_wire(sent: list[bytes], received: list[bytes], shown: dict[str, Any]) -> None:
    """Sizes and headers are those of the parameters, and nothing looks like WireGuard."""
    for payload in (*sent, *received):
        looks = (len(payload), payload[:4])
        assert looks not in ((148, b"\x01\0\0\0"), (92, b"\x02\0\0\0"), (64, b"\x03\0\0\0"))
        assert payload[:4] != b"\x04\0\0\0"
    spans = {name: [int(x) for x in str(shown[name]).split("-")] for name in ("h1", "h2")}
    first = [p for p in sent if len(p) == 148 + shown["s1"]]
    second = [p for p in received if len(p) == 92 + shown["s2"]]
    assert first
    assert second
    if "header_protection_key" not in shown:
        for payloads, padding, name in ((first, "s1", "h1"), (second, "s2", "h2")):
            low, high = spans[name][0], spans[name][-1]
            assert any(low <= headers(p, shown[padding]) <= high for p in payloads)
    decoys = [name for name in ("i1", "i2", "i3", "i4", "i5") if shown.get(name)]
    before = sent[: len(decoys) + shown["jc"]]
    assert len(sent[len(before)]) == 148 + shown["s1"]
    for payload, name in zip(before, decoys, strict=False):
        assert len(payload) == wggw.packet_size(shown[name])
    assert all(shown["jmin"] <= len(p) <= shown["jmax"] for p in before[len(decoys) :])


@pytest.mark.parametrize(
    ("generation", "preset"),
    SETS if PROGRAM or LONG else [("1.5", "dns"), ("3.0", "strong")],
)
def test_a_client_with_our_answer_and_nothing_else_connects(
    topology: Topology, gateway: GatewayProcess, hidden: HiddenClient, generation: str, preset: str
) -> None:
    shown = speak(gateway, generation, preset)
    client = gateway.start().client()
    text = create(client, hidden)
    with Capture(hidden.namespace) as capture:
        hidden.connect(text)
        assert hidden.reaches()
    if generation < "3.1":  # random trailers change sizes
        check_wire(capture.sent, capture.received, shown)


def test_a_plain_client_gets_nothing_at_the_obfuscated_port(
    topology: Topology, gateway: GatewayProcess
) -> None:
    speak(gateway, "1.0", "default")
    client = gateway.start().client()
    tunnel = topology.tunnel(0)
    answer = client.create(tunnel.public_key, obfuscation={"enabled": True})
    with Capture(tunnel.namespace) as capture:
        tunnel.connect(answer.json)
        tunnel.namespace.ip(f"route add 10.78.0.0/24 dev {tunnel.name}")
        assert tunnel.ping(AWG_GATEWAY[0], count=2, wait=2) == {AWG_GATEWAY[0]: 0}
    assert capture.sent
    assert capture.received == []


@pytest.mark.parametrize("name", ["s1", "h1", "h4", "header_protection_key"])
def test_one_wrong_shared_value_gets_nothing(
    topology: Topology, gateway: GatewayProcess, hidden: HiddenClient, name: str
) -> None:
    shown = speak(gateway, "3.0", "default")
    client = gateway.start().client()
    text = create(client, hidden)
    wrong = {
        "s1": str(shown["s1"] + 1),
        "h1": "5-6",
        "h4": "5-6",
        "header_protection_key": "11" * 32,
    }
    hidden.connect(text, **{name: wrong[name]})
    assert hidden.ping(AWG_GATEWAY[0], count=2, wait=2) == 0


def test_other_values_of_the_client_connect(
    topology: Topology, gateway: GatewayProcess, hidden: HiddenClient
) -> None:
    speak(gateway, "2.0", "default")
    client = gateway.start().client()
    own = {"jc": 7, "jmin": 100, "jmax": 120, "i1": "<b 0xc0ff><rd 20>", "i3": "<t><rc 9>"}
    text = create(client, hidden, **own)
    with Capture(hidden.namespace) as capture:
        hidden.connect(text)
        assert hidden.reaches()
    sizes = [len(payload) for payload in capture.sent[:9]]
    assert sizes[:2] == [22, 13]
    assert all(100 <= size <= 120 for size in sizes[2:])
    assert capture.sent[0].startswith(b"\xc0\xff")


def test_plain_and_obfuscated_at_once_through_suspend_and_restart(
    topology: Topology, gateway: GatewayProcess, hidden: HiddenClient
) -> None:
    speak(gateway, "2.0", "light")
    client = gateway.start().client()
    hidden.connect(create(client, hidden))
    tunnel = topology.tunnel(1)
    tunnel.connect(client.create(tunnel.public_key, protocol="dual").json)

    def both() -> tuple[bool, bool]:
        plain = tunnel.ping(*Topology.GATEWAY)
        return hidden.reaches(), plain == dict.fromkeys(Topology.GATEWAY, 3)

    assert both() == (True, True)
    with (
        netns.RunningPing(hidden.namespace, AWG_GATEWAY[0]) as one,
        netns.RunningPing(tunnel.namespace, Topology.GATEWAY[0]) as other,
    ):
        one.go_on()
        gateway.kill()
        gateway.start()
        one.go_on(40)
        assert (one.stop(), other.stop()) == ([], [])
    client = gateway.client()
    assert client.status(hidden.public_key, "suspended").status == 200
    assert hidden.ping(AWG_GATEWAY[0], count=2, wait=2) == 0
    assert tunnel.ping(Topology.GATEWAY[0], count=2) == {Topology.GATEWAY[0]: 2}
    gateway.stop()
    client = gateway.start().client()
    assert hidden.ping(AWG_GATEWAY[0], count=2, wait=2) == 0
    assert client.status(hidden.public_key, "active").status == 200
    assert client.status(tunnel.public_key, "suspended").status == 200
    assert hidden.ping(AWG_GATEWAY[0]) == 3
    assert tunnel.ping(Topology.GATEWAY[0], count=2, wait=2) == {Topology.GATEWAY[0]: 0}
    wait_for(lambda: client.get(hidden.public_key).json["online"], what="a sample")
    assert client.get(hidden.public_key).json["rx_bytes"] > 0


def test_a_killed_amneziawg_go_comes_back_and_a_rotation_cuts_old_clients_off(
    topology: Topology, gateway: GatewayProcess, hidden: HiddenClient
) -> None:
    speak(gateway, "2.0", "light")
    client = gateway.start().client()
    for number in range(5):
        client.create(a_key(number), obfuscation={"enabled": True})
    hidden.connect(create(client, hidden))
    assert hidden.reaches()
    name = gateway.settings["AWG_INTERFACE"]
    before = sorted(re.findall(r"^(?:h\d|s\d|public_key)=.*$", uapi(name, "get=1\n\n"), re.M))
    end_program(name)

    def is_back() -> bool:
        with contextlib.suppress(OSError):
            found = re.findall(r"^(?:h\d|s\d|public_key)=.*$", uapi(name, "get=1\n\n"), re.M)
            return sorted(found) == before
        return False

    wait_for(is_back, what="amneziawg-go with all its peers and parameters")
    assert hidden.ping(AWG_GATEWAY[0]) == 3
    body = {"generation": "2.0", "preset": "light", "confirm": True}
    answer = client.send("POST", "/api/v1/obfuscation/rotate", body)
    assert (answer.status, answer.json["cut_off_peers"]) == (200, 6), answer
    assert hidden.ping(AWG_GATEWAY[0], count=2, wait=2) == 0
    text = client.get(hidden.public_key, "?format=wg-quick").body.decode()
    lines = uapi_lines(text, hidden.private_key, {})
    device = lines[: next(i for i, x in enumerate(lines) if x.startswith("public_key="))]
    assert uapi(hidden.name, "\n".join(["set=1", *device, "", ""])) == "errno=0\n\n"
    assert hidden.ping(AWG_GATEWAY[0]) == 3


def end_program(name: str) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(SOCKETS / f"{name}.sock"))
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    os.kill(struct.unpack("3i", credentials)[0], 9)


@pytest.mark.skipif(PROGRAM is None, reason="needs amneziawg-go (tests/run builds it with Go)")
def test_real_amneziawg_go_accepts_generated_parameters_and_prints_what_was_set(
    topology: Topology, hidden: HiddenClient
) -> None:
    with topology.clients[0].inside():
        subprocess.Popen(["amneziawg-go", "-f", hidden.name], start_new_session=True)
    wait_for(hidden._listens, what="amneziawg-go")
    actual = wggw.PLAIN
    for number in range(50 * len(SETS)):
        wanted = wggw.generate_obfuscation(*SETS[number % len(SETS)]).parameters
        lines = wggw.encode_uapi_parameters(wanted, actual)
        assert uapi(hidden.name, f"set=1\n{lines}\n") == "errno=0\n\n", lines
        printed = uapi(hidden.name, "get=1\n\n")[:-1].encode()
        actual = wggw.decode_uapi_device([printed])[0].obfuscation
        assert actual == wanted
