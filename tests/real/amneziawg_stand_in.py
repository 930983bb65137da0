#!/usr/bin/env python3
"""A stand-in for amneziawg-go where that cannot be had: wireguard-go behind an obfuscating relay.

    amneziawg_stand_in.py [--like VERSION] -f NAME      # 3.1 by default
    amneziawg_stand_in.py --version

It takes AmneziaWG's keys over UAPI as the real program of that version does, with what it refuses
and what it forgets, and puts packets on the wire with their paddings, headers, trailers and decoys,
written from the facts about the protocol. Header protection is not the real algorithm: it only
makes sure that both sides need the same key; and data packets have no trailers. It shows that
interfaces and clients are set up alike; that the real program understands them only that shows.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from typing import NamedTuple

INNER, OUTER = "/var/run/wireguard", "/var/run/amneziawg"
SIZES = {1: 148, 2: 92, 3: 64, 4: 32}  # initiation, response, cookie; transport at least
NUMBERS = ("jc", "jmin", "jmax", "s1", "s2", "s3", "s4")
HEADERS = ("h1", "h2", "h3", "h4")
DECOYS = ("i1", "i2", "i3", "i4", "i5")
RANGES = (
    "content_padding_addition", "rekey_after_time", "rekey_timeout", "reject_after_time",
    "keepalive_timeout", "max_handshake_attempts",
)  # fmt: skip
FLAGS = ("random_trailers", "disable_cookies")
KEYS = (*NUMBERS, *HEADERS, *DECOYS, "header_protection_key", *RANGES, *FLAGS)
EMPTY = ("", "0", "false", "00" * 32)
FLAG_VALUES = {"1": True, "t": True, "true": True, "0": False, "f": False, "false": False}
TRAILER_WINDOW = 500


class Version(NamedTuple):
    """How a version of amneziawg-go differs from others."""

    keys: tuple[str, ...]  # that a set may hold
    tags: tuple[str, ...]  # of I1 to I5
    forgets: bool  # a set with one of its keys resets those that it does not hold
    checks: bool  # that sizes differ and that Jmin is not above Jmax
    wide: bool = True  # headers may be ranges
    no_zero: bool = False  # Jc, Jmin and Jmax cannot be set to 0
    drops: bool = False  # what has the size of another kind of packet and no header in its place
    tells_old: bool = False  # headers from before, after it went back to WireGuard's


AT_1_0 = ("jc", "jmin", "jmax", "s1", "s2", *HEADERS)
AT_2_0 = (*NUMBERS, *HEADERS, *DECOYS)
AT_3_0 = (*AT_2_0, "header_protection_key", *RANGES)
NEW_TAGS = ("b", "t", "r", "rc", "rd", "d", "ds", "dz")
VERSIONS = {
    "0.2.12": Version(AT_1_0, (), True, True, wide=False, tells_old=True),
    "0.2.13": Version(AT_2_0, ("b", "c", "t", "r", "wt"), True, True, wide=False, tells_old=True),
    "0.2.15": Version(AT_2_0, ("b", "c", "t", "r", "rc", "rd"), True, True, drops=True),
    "0.2.16": Version(AT_2_0, NEW_TAGS, False, False, no_zero=True),
    "3.0": Version(AT_3_0, NEW_TAGS, False, False),
    "3.1": Version((*AT_3_0, *FLAGS), NEW_TAGS, False, False),
}


def ends(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    found = int(low), int(high or low)
    if not 0 <= found[0] <= found[1] < 2**32:
        raise ValueError
    return found


class Shape:
    """What packets look like, from the device keys. Raises ValueError as the program refuses."""

    def __init__(self, given: dict[str, str], version: Version) -> None:
        self.given = given
        self.drops = version.drops
        self.numbers = {name: int(given.get(name, "0")) for name in NUMBERS}
        self.headers = [ends(given.get(h, str(i))) for i, h in enumerate(HEADERS, 1)]
        for i, (low, high) in enumerate(self.headers):
            if any(low <= b and a <= high for a, b in self.headers[i + 1 :]):
                raise ValueError
            if low != high and not version.wide:
                raise ValueError
        self.key = bytes.fromhex(given.get("header_protection_key", ""))
        if any(self.key) and min(self.numbers[f"s{i}"] for i in SIZES) < 12:
            raise ValueError
        for name in RANGES:
            ends(given.get(name, "0"))
        if version.checks:
            sizes = [self.numbers[f"s{kind}"] + size for kind, size in SIZES.items()]
            if len(set(sizes)) < 4 or self.numbers["jmin"] > self.numbers["jmax"]:
                raise ValueError
        self.decoys_given = [tags_of(given[name]) for name in DECOYS if given.get(name)]
        for tags in self.decoys_given:
            check_tags(tags, version)
        names = [name for name in DECOYS if given.get(name)]
        if version.checks and names != list(DECOYS[: len(names)]):
            raise ValueError
        self.trailers = FLAG_VALUES[given.get("random_trailers", "0")]

    def mask(self, packet: bytes) -> int:
        if not any(self.key):
            return 0
        return int.from_bytes(hashlib.blake2s(packet[:12], key=self.key).digest()[:4], "little")

    def hide(self, message: bytes) -> bytes:
        kind = message[0]
        low, high = self.headers[kind - 1]
        padding = secrets.token_bytes(self.numbers[f"s{kind}"])
        header = (low + secrets.randbelow(high - low + 1)) ^ self.mask(padding)
        packet = padding + struct.pack("<I", header) + message[4:]
        if self.trailers and kind != 4 and len(packet) < TRAILER_WINDOW:
            packet += secrets.token_bytes(secrets.randbelow(TRAILER_WINDOW - len(packet)))
        return packet

    def show(self, packet: bytes) -> bytes | None:
        for kind, size in SIZES.items():
            start = self.numbers[f"s{kind}"]
            longer = len(packet) > start + size and (kind == 4 or self.trailers)
            if len(packet) != start + size and not longer:
                continue
            low, high = self.headers[kind - 1]
            header = struct.unpack_from("<I", packet, start)[0] ^ self.mask(packet)
            if self.drops and not any(a <= header <= b for a, b in self.headers):
                return None
            if low <= header <= high:
                end = len(packet) if kind == 4 else start + size
                return struct.pack("<I", kind) + packet[start + 4 : end]
        return None

    def decoys(self) -> list[bytes]:
        made = [decoy(tags) for tags in self.decoys_given]
        low, high = self.numbers["jmin"], self.numbers["jmax"]
        sizes = [low + secrets.randbelow(high - low + 1) for _ in range(self.numbers["jc"])]
        return made + [secrets.token_bytes(size) for size in sizes]


def tags_of(text: str) -> list[tuple[str, str]]:
    """What stands between < and >; what stands outside is not looked at."""
    found = [part.partition(">")[0].split() for part in text.split("<")[1:]]
    return [(words[0], "".join(words[1:2])) for words in found]


def check_tags(tags: list[tuple[str, str]], version: Version) -> None:
    names = [name for name, _ in tags]
    if any(name not in version.tags for name in names):
        raise ValueError
    if version.checks and max(names.count("t"), names.count("c")) > 1:
        raise ValueError
    for name, argument in tags:
        if name in ("r", "rc", "rd") and not int(argument) <= (1000 if version.checks else 65535):
            raise ValueError
        if name == "b" and not bytes.fromhex(argument.removeprefix("0x")):
            raise ValueError


def decoy(tags: list[tuple[str, str]]) -> bytes:
    letters = {"r": bytes(range(256)), "rd": b"0123456789", "rc": b"abcdefghijk", "dz": b"\0"}
    made = b""
    for name, argument in tags:
        if name == "b":
            made += bytes.fromhex(argument.removeprefix("0x"))
        elif name in ("t", "c"):
            made += struct.pack(">I", int(time.time()))
        elif name in letters:
            made += bytes(secrets.choice(letters[name]) for _ in range(int(argument)))
    return made


class Relay:
    """Between the wire and wireguard-go's port on loopback: a local socket for each far address."""

    def __init__(self, inner_port: int) -> None:
        self.shape = Shape({}, VERSIONS["3.1"])
        self.inner = ("127.0.0.1", inner_port)
        self.lock = threading.Lock()
        self.locals: dict[tuple[str, int], socket.socket] = {}
        self.outer = self.bind(0)

    def bind(self, port: int) -> socket.socket:
        outer = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        outer.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        outer.bind(("::", port))
        threading.Thread(target=self.read_outer, args=(outer,), daemon=True).start()
        return outer

    def listen(self, port: int) -> None:
        if port != self.port():
            old, self.outer = self.outer, self.bind(port)
            with contextlib.suppress(OSError):
                old.shutdown(socket.SHUT_RDWR)  # wakes its reader
            old.close()

    def port(self) -> int:
        return int(self.outer.getsockname()[1])

    def local(self, address: tuple[str, int]) -> socket.socket:
        with self.lock:
            found = self.locals.get(address)
            if found is None:
                found = self.locals[address] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                found.bind(("127.0.0.1", 0))
                arguments = (found, address)
                threading.Thread(target=self.read_local, args=arguments, daemon=True).start()
            return found

    def read_outer(self, outer: socket.socket) -> None:
        while True:
            try:
                packet, address = outer.recvfrom(65535)
            except OSError:
                return
            message = self.shape.show(packet)
            if message is not None:
                self.local((address[0], address[1])).sendto(message, self.inner)

    def read_local(self, local: socket.socket, address: tuple[str, int]) -> None:
        while True:
            with contextlib.suppress(OSError):
                message = local.recv(65535)
                first = self.shape.decoys() if message[0] == 1 else []
                for packet in (*first, self.shape.hide(message)):
                    self.outer.sendto(packet, address)


def split_endpoint(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    host = host.strip("[]")
    return (host if ":" in host else f"::ffff:{host}"), int(port)


class Control:
    """UAPI: AmneziaWG's keys are kept here, the rest goes to wireguard-go."""

    def __init__(self, name: str, version: Version) -> None:
        self.version = version
        self.inner_path = f"{INNER}/{name}.sock"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind(("127.0.0.1", 0))
            inner_port = probe.getsockname()[1]
        self.relay = Relay(inner_port)
        self.lock = threading.Lock()
        self.given: dict[str, str] = {}
        self.headers_told: dict[str, str] = {}
        self.ask(f"set=1\nlisten_port={inner_port}\n\n")

    def ask(self, request: str) -> str:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self.inner_path)
            connection.sendall(request.encode())
            answer = b""
            while not answer.endswith(b"\n\n"):
                answer += connection.recv(65536)
        return answer.decode()

    def set(self, lines: list[str]) -> str:
        passed: list[str] = []
        device = [line for line in lines if line.partition("=")[0] in KEYS]
        given = dict(self.given)
        if device and self.version.forgets:  # but not packets, unless there are others
            new = [line for line in device if line[:2] in DECOYS and not line.endswith("=")]
            given = {} if new else {name: given[name] for name in DECOYS if name in given}
        in_peer, port = False, None
        for line in lines:
            key, _, value = line.partition("=")
            in_peer |= key == "public_key"
            if not in_peer and key in KEYS:
                if not self.is_taken(key, value):
                    return "errno=-22\n\n"
                if value not in EMPTY:
                    given[key] = value
                elif not (key in DECOYS and self.version.forgets):
                    given.pop(key, None)
            elif not in_peer and key == "listen_port":
                port = int(value)
            elif key == "endpoint":
                local = self.relay.local(split_endpoint(value))
                passed.append(f"endpoint=127.0.0.1:{local.getsockname()[1]}")
            else:
                passed.append(line)
        numbers = {name: int(given.get(name, "0")) for name in ("jc", "jmin", "jmax")}
        if self.version.checks and numbers["jc"] and numbers["jmin"] == numbers["jmax"]:
            given["jmax"] = str(numbers["jmax"] + 1)
        try:
            shape = Shape(given, self.version)
        except (ValueError, KeyError, IndexError):
            return "errno=-22\n\n"
        try:
            if port is not None:
                self.relay.listen(port)
        except OSError:
            return "errno=-98\n\n"
        self.given, self.relay.shape = given, shape
        if self.version.tells_old:
            self.headers_told |= {h: given[h] for h in HEADERS if int(given.get(h, "0")) > 4}
        return self.ask("\n".join(["set=1", *passed, "", ""]))

    def is_taken(self, key: str, value: str) -> bool:
        if key in FLAGS and value not in FLAG_VALUES:
            return False
        if self.version.no_zero and key in ("jc", "jmin", "jmax") and value == "0":
            return False
        return key in self.version.keys

    def get(self) -> str:
        ports = {local.getsockname()[1]: far for far, local in self.relay.locals.items()}
        shown = []
        for line in self.ask("get=1\n\n").splitlines():
            key, _, value = line.partition("=")
            if key == "listen_port":
                shown.append(f"listen_port={self.relay.port()}")
                told = {**self.given, **self.headers_told}
                shown += [f"{name}={told[name]}" for name in KEYS if name in told]
                absent = [f for f in FLAGS if f in self.version.keys and f not in self.given]
                shown += [f"{name}=0" for name in absent]
            elif key == "endpoint":
                far = ports.get(int(value.rpartition(":")[2]))
                shown += [f"endpoint=[{far[0]}]:{far[1]}"] if far else []
            else:
                shown.append(line)
        return "\n".join(shown) + "\n"

    def serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("r") as reader:
            for operation in reader:
                lines = []
                for line in reader:
                    if line == "\n":
                        break
                    lines.append(line.rstrip("\n"))
                with self.lock:
                    answer = self.get() if operation == "get=1\n" else self.set(lines)
                connection.sendall(answer.encode())


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main() -> None:
    like = sys.argv[sys.argv.index("--like") + 1] if "--like" in sys.argv else "3.1"
    version, name = VERSIONS[like], sys.argv[-1]
    if name == "--version":
        print(f"amneziawg-go {like}")
        return
    daemon = subprocess.Popen(["wireguard-go", "-f", name], preexec_fn=die_with_parent)  # noqa: PLW1509
    # The interface's end is wireguard-go's, and so the program's.
    threading.Thread(target=lambda: os._exit(daemon.wait() and 1), daemon=True).start()
    while not os.path.exists(f"{INNER}/{name}.sock"):
        time.sleep(0.01)
    control = None
    while control is None:
        with contextlib.suppress(ConnectionError):
            control = Control(name, version)
    os.makedirs(OUTER, mode=0o700, exist_ok=True)
    path = f"{OUTER}/{name}.sock"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=control.serve, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    main()
