"""Obfuscated tunnels through real packets: what the API answers is all that a client needs.

amneziawg-go is used where it is on PATH, in all versions that are there (see awg_programs.py;
tests/run builds the newest where Go can fetch it), with every generation and preset. Elsewhere
amneziawg_stand_in.py takes its place, for some of them, or for all with WGGW_LONG=1; what only the
real program can show is then skipped.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import awg_programs
import netns
import pytest
from awg_programs import SOCKETS, uapi
from backend_contract import output
from harness import LONG, Client, GatewayProcess, a_key, some, wait_for
from netns import Topology

import wggw

pytestmark = pytest.mark.real

AWG_GATEWAY = ("10.78.0.1", "fd78::1")
PORT = 51999
PROGRAM = bool(awg_programs.REAL)
SETS = [(g, p) for g in wggw.GENERATIONS for p in wggw.PRESETS if (g, p) != ("1.0", "dns")]


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """The newest amneziawg-go, or the stand-in under its name."""
    netns.need("wireguard-go", "wg", tun=True)
    return awg_programs.install(awg_programs.newest(), tmp_path / "bin")


@pytest.fixture
def gateway(
    program: Path, topology: Topology, settings: dict[str, str], tmp_path: Path
) -> Iterator[GatewayProcess]:
    """A plain and an obfuscated interface, not started yet."""
    name = netns.unique()
    more = {
        "WG_BACKEND": "uapi",
        "PATH": awg_programs.path_with(program.parent),
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
        if name in ("random_trailers", "disable_cookies"):  # parse_bool() of awg's config.c
            value = {"on": "1", "off": "0"}[value]
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

    def __init__(self, topology: Topology, program: Path, number: int = 0) -> None:
        self.program = program
        self.namespace = topology.clients[number]
        self.name = netns.unique()
        self.process: subprocess.Popen[bytes] | None = None
        self.private_key = output("wg", "genkey").strip()
        self.public_key = subprocess.run(
            ["wg", "pubkey"], input=self.private_key, capture_output=True, text=True, check=True
        ).stdout.strip()

    def connect(self, text: str, **changes: str) -> None:
        """`changes` are device keys that differ from the file."""
        with self.namespace.inside():
            self.process = awg_programs.start(self.program, self.name)
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
        if self.process is not None:
            awg_programs.end(self.process, self.name)


@pytest.fixture
def hidden(topology: Topology, program: Path) -> Iterator[HiddenClient]:
    client = HiddenClient(topology, program)
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
        self._thread = threading.Thread(target=self._read, daemon=True)

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


@pytest.mark.parametrize("name", some(["s1", "h1", "h4", "header_protection_key"], 1))
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


@pytest.mark.long
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


@pytest.mark.long
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


# --- generations, presets and versions of programs ------------------------------------------------

FEW = [("1.0", "strong"), ("1.5", "dns"), ("1.5", "strong"), ("2.0", "strong"), ("3.1", "default")]
NO_REAL = pytest.mark.skipif(not PROGRAM, reason="needs amneziawg-go on PATH")
NO_TOOLS = pytest.mark.skipif(
    not (PROGRAM and awg_programs.TOOLS), reason="needs amneziawg-go and awg on PATH"
)


def speaks(label: str, generation: str) -> bool:
    return awg_programs.generation(label) >= generation


@pytest.mark.parametrize(("generation", "preset"), SETS if PROGRAM or LONG else some(FEW, 2))
def test_clients_of_every_version_that_knows_the_generation_connect(
    topology: Topology, gateway: GatewayProcess, tmp_path: Path, generation: str, preset: str
) -> None:
    speak(gateway, generation, preset)
    api = gateway.start().client()
    connected = {}
    for label in filter(lambda label: speaks(label, generation), awg_programs.LABELS):
        client = HiddenClient(topology, awg_programs.install(label, tmp_path / label))
        try:
            client.connect(create(api, client))
            connected[label] = client.reaches()
        except AssertionError as error:
            connected[label] = str(error)
        finally:
            client.end()
    assert connected and set(connected.values()) == {True}, connected


def of_each_version() -> list[tuple[str, str, str]]:
    if PROGRAM or LONG:
        return [(label, *pair) for label in awg_programs.LABELS for pair in SETS]
    return [("stand-in 0.2.12", "1.0", "default"), ("stand-in 0.2.13", "1.5", "strong")]


@pytest.mark.parametrize("case", of_each_version(), ids=" ".join)
def test_a_gateway_with_a_program_of_every_version_speaks_what_it_knows(
    topology: Topology, gateway: GatewayProcess, tmp_path: Path, case: tuple[str, str, str]
) -> None:
    label, generation, preset = case
    if not speaks(label, generation):
        pytest.skip(f"{label} is older than generation {generation}")
    path = awg_programs.install(label, tmp_path / label)
    gateway.settings["PATH"] = awg_programs.path_with(path.parent)
    shown = speak(gateway, generation, preset)
    api = gateway.start().client()
    wanted = wggw.parse_obfuscation(shown).parameters
    assert awg_programs.parameters(gateway.settings["AWG_INTERFACE"]) == wanted
    client = HiddenClient(topology, path)
    try:
        client.connect(create(api, client))
        assert client.reaches()
        # Only one value changes, and nobody is cut off: programs up to 0.2.15 forget the others
        # when a set does not hold them, obfuscation ends, and plain clients pass.
        changed = {**shown, "jc": shown["jc"] + 1}
        del changed["parameters_version"]
        answer = api.send("POST", "/api/v1/obfuscation/rotate", {"parameters": changed})
        assert (answer.status, answer.json["cut_off_peers"]) == (200, 0), answer
        assert client.reaches()
        name = gateway.settings["AWG_INTERFACE"]
        assert awg_programs.parameters(name) == wanted._replace(jc=wanted.jc + 1)
    finally:
        client.end()


@contextlib.contextmanager
def backend_of(label: str, directory: Path, spoken: wggw.Obfuscation) -> Iterator[wggw.UapiBackend]:
    """A program's interface in a namespace of its own, set up to speak."""
    path, name = awg_programs.install(label, directory), netns.unique()
    link = wggw.Link(
        name, ("10.79.0.1/24",), 1340, PORT, bytes(range(40, 72)), spoken, kind="amneziawg"
    )
    with netns.Namespace() as namespace, namespace.inside():
        backend = wggw.UapiBackend(link, str(path))
        try:
            backend.setup()
            yield backend
        finally:
            backend.close()
            end_program(name)
            netns.forget_socket(name)


def set_by_hand(name: str, **values: Any) -> None:
    told = awg_programs.parameters(name)
    lines = wggw.encode_uapi_parameters(told._replace(**values), told)
    assert uapi(name, f"set=1\n{lines}\n") == "errno=0\n\n"


SOME = awg_programs.LABELS if PROGRAM or LONG else ["stand-in 0.2.13", "stand-in 3.1"]
BY_HAND: dict[str, Any] = {
    "jc": 2, "jmin": 31, "jmax": 1000, "h4": wggw.Span(77, 77), "i1": "<r 7>",
    "i2": "<t><r 9>", "h1": wggw.Span(70, 75), "rekey_timeout": wggw.Span(7, 9),
    "content_padding_addition": wggw.Span(3, 3), "header_protection_key": bytes(range(32)),
    "random_trailers": False, "disable_cookies": True,
}  # fmt: skip


def other_padding(spoken: wggw.Obfuscation, name: str) -> int:
    """Another S1 to S4 that is accepted: programs refuse two kinds of packets of one size."""
    sizes = {getattr(spoken, other) + size for other, size in wggw.PADDED_SIZES.items()}
    return next(n for n in range(13, 64) if n + wggw.PADDED_SIZES[name] not in sizes)


@pytest.mark.parametrize("label", SOME)
def test_each_parameter_that_others_change_is_seen_and_put_back(
    label: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest = awg_programs.generation(label)
    spoken = wggw.generate_obfuscation(newest, "strong").parameters
    with backend_of(label, tmp_path, spoken) as backend:
        link = backend._link
        paddings = {name: other_padding(spoken, name) for name in ("s1", "s4")}
        for name, value in {**BY_HAND, **paddings}.items():
            known = wggw.generation_of(wggw.PLAIN._replace(**{name: value})) <= newest
            if not known or value == getattr(spoken, name):
                continue
            set_by_hand(link.name, **{name: value})
            assert backend.read(()).device_differs(link), name
            backend.setup()
            assert not backend.read(()).device_differs(link), name
            assert awg_programs.parameters(link.name) == spoken
    assert caplog.text == ""


@pytest.mark.parametrize("label", SOME)
def test_what_a_program_cannot_do_is_said_once_and_not_set_again_and_again(
    label: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Programs up to 0.2.15 keep packets that were emptied and tell a larger Jmax, for example."""
    spoken = wggw.generate_obfuscation(awg_programs.generation(label), "strong").parameters
    plain = wggw.PLAIN._replace(jc=3, jmin=40, jmax=50)
    no_packets = dict.fromkeys(("i1", "i2", "i3"), "")
    before: list[str] = []
    with backend_of(label, tmp_path, spoken) as backend:
        for wanted in (spoken._replace(jmin=50, jmax=50), spoken._replace(**no_packets), plain):
            caplog.clear()
            link = backend._link._replace(obfuscation=wanted)
            for _ in range(3):
                backend.setup(link)
                assert not backend.read(()).device_differs(link)
            told = awg_programs.parameters(link.name)
            odd = wggw.unlike(told, wanted, wggw.Obfuscation._fields)
            warned = [record.getMessage() for record in caplog.records]
            assert len(warned) == (bool(odd) and odd != before), (odd, warned)
            before = odd
            assert all(f"reports other values of {', '.join(odd)} than" in text for text in warned)
            set_by_hand(link.name, jc=11)
            assert backend.read(()).device_differs(link)


@pytest.mark.parametrize("label", [x for x in awg_programs.LABELS if re.search(r"0\.2\.1[6-9]", x)])
def test_junk_that_cannot_be_set_to_0_again_is_refused_by_name_and_stays_when_others_set_it(
    label: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quiet = wggw.generate_obfuscation("2.0", "light").parameters._replace(jc=0, jmin=0, jmax=0)
    with backend_of(label, tmp_path, quiet) as backend:
        link = backend._link
        set_by_hand(link.name, jc=5, s1=quiet.s1 + 1)
        backend.setup()
        assert not backend.read(()).device_differs(link)
        assert awg_programs.parameters(link.name) == quiet._replace(jc=5)
        backend.setup()
        assert caplog.text.count("reports other values of Jc than were set") == 1
        backend.setup(link._replace(obfuscation=quiet._replace(jc=3)))
        words = "; Jc: amneziawg-go 0.2.16 to 0.2.19, of generation 2.0, cannot set it to 0 again"
        with pytest.raises(wggw.ParametersRefused, match=words):
            backend.setup(link)


@pytest.mark.parametrize(
    ("like", "values", "words"),
    [
        ("0.2.12", {"i1": "<r 20>"}, "I1: it came with generation 1.5: kernel module v1.0.2025"),
        (
            "0.2.13",
            {"h1": "50-60", "h2": 70, "h3": 80, "h4": 90},
            "H1: a range came with generation 2.0",
        ),
        ("0.2.13", {"i1": "<rd 20>"}, "I1: each of <rd>, <rc> came with generation 2.0"),
        ("3.0", {"random_trailers": "on"}, "RandomTrailers: it came with generation 3.1"),
        ("3.1", {"i1": "<c>"}, "refused; I1, I2, I3, I4, I5: <c> is known to kernel modules, and"),
    ],
)
def test_a_program_that_is_too_old_ends_the_start_with_what_it_does_not_know(
    gateway: GatewayProcess, tmp_path: Path, like: str, values: dict[str, Any], words: str
) -> None:
    path = awg_programs.install(f"stand-in {like}", tmp_path / like)
    gateway.settings["PATH"] = awg_programs.path_with(path.parent)
    gateway.settings["AWG_PARAMS"] = json.dumps({"s1": 20, "s2": 30, **values})
    assert gateway.spawn().wait(60) != 0
    assert words in gateway.text()
    assert "Traceback" not in gateway.text()


@pytest.mark.long
def test_a_client_without_the_trailers_of_the_interface_gets_nothing(
    topology: Topology, gateway: GatewayProcess, hidden: HiddenClient
) -> None:
    speak(gateway, "3.1", "light")
    text = create(gateway.start().client(), hidden)
    assert "\nRandomTrailers = on\n" in text
    hidden.connect(text, random_trailers="0")
    assert hidden.ping(AWG_GATEWAY[0], count=2, wait=4) == 0


@NO_REAL
def test_real_programs_accept_generated_parameters_and_print_what_was_set(
    topology: Topology,
) -> None:
    for label, path in awg_programs.REAL.items():
        pairs = [pair for pair in SETS if speaks(label, pair[0])]
        with awg_programs.running(path) as name:
            actual = awg_programs.parameters(name)
            assert actual == wggw.PLAIN
            for number in range(20 * len(pairs)):
                generation, preset = pairs[number % len(pairs)]
                wanted = wggw.generate_obfuscation(generation, preset).parameters
                lines = wggw.encode_uapi_parameters(wanted, actual)
                assert uapi(name, f"set=1\n{lines}\n") == "errno=0\n\n", (label, lines)
                actual = awg_programs.parameters(name)
                assert wggw.same_language(wanted, actual), label


@NO_TOOLS
def test_awg_of_every_version_takes_the_files_of_its_generation(tmp_path: Path) -> None:
    key = base64.b64encode(bytes(range(32))).decode()
    with awg_programs.running(awg_programs.REAL[awg_programs.newest()]) as name:
        for label in awg_programs.TOOLS:
            for generation, preset in SETS:
                if awg_programs.tools_generation(label) < generation:
                    continue
                state = wggw.generate_obfuscation(generation, preset)
                lines = "\n".join(wggw.awg_quick(wggw.show_state(state)))
                text = f"[Interface]\nPrivateKey = {key}\n{lines}\n"
                assert awg_programs.awg(label, name, text) == "", (label, text)
                spoken = awg_programs.parameters(name)
                assert spoken == state.parameters, (label, text)
                shown = awg_programs.showconf(label, name)
                assert wggw.parse_obfuscation(wggw.parse_awg_file(shown)).parameters == spoken
                assert wggw.read_foreign(shown.encode()).peers == []
                lines = wggw.encode_uapi_parameters(wggw.PLAIN, spoken)
                assert uapi(name, f"set=1\n{lines}\n") == "errno=0\n\n"
                assert awg_programs.parameters(name) == wggw.PLAIN


# --- loss -----------------------------------------------------------------------------------------

PING_SIZES = (8, 16, 24, 56, 64, 100, 128, 200, 256, 500, 1000, 1300)


def received(client: HiddenClient, size: int, count: int) -> int:
    command = ["ping", "-n", "-q", "-f", "-c", str(count), "-s", str(size), AWG_GATEWAY[0]]
    with client.namespace.inside():
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    match = re.search(r"(\d+) received", done.stdout)
    assert match, done.stdout + done.stderr
    return int(match[1])


@NO_REAL
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not LONG, reason="needs WGGW_LONG=1: it takes a quarter of an hour")
@pytest.mark.parametrize("generation", wggw.GENERATIONS)
def test_no_ping_is_lost_to_parameters(
    topology: Topology, gateway: GatewayProcess, tmp_path: Path, generation: str
) -> None:
    """Ten sets, the clients of all versions that speak the generation in turn."""
    labels = [label for label in awg_programs.LABELS if speaks(label, generation)]
    presets = [preset for preset, row in wggw.PRESETS.items() if row.since <= generation]
    lost = {}
    api = None
    for number in range(10):
        label = labels[number % len(labels)]
        client = HiddenClient(topology, awg_programs.install(label, tmp_path / str(number)))
        state = wggw.generate_obfuscation(generation, presets[number % len(presets)])
        shown = wggw.show_state(state)
        del shown["parameters_version"]
        if api is None:
            gateway.settings["AWG_PARAMS"] = json.dumps(shown)
            api = gateway.start().client()
        else:
            body = {"parameters": shown, "confirm": True}
            assert api.send("POST", "/api/v1/obfuscation/rotate", body).status == 200
        client.connect(create(api, client))
        assert client.reaches()
        for size in PING_SIZES:
            missing = 4000 - received(client, size, 4000)
            if missing:
                lost[label, size] = missing
        client.end()
    assert lost == {}
