#!/usr/bin/env python3
"""A stand-in for amneziawg-go where that cannot be had: wireguard-go behind an obfuscating relay.

    amneziawg_stand_in.py -f NAME

It takes AmneziaWG's keys over UAPI as the real program does, and puts packets on the wire with
their paddings, headers and decoys, written from the facts about the protocol. Header protection
is not the real algorithm: it only makes sure that both sides need the same key. It shows that
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


def ends(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    found = int(low), int(high or low)
    if not 0 <= found[0] <= found[1] < 2**32:
        raise ValueError
    return found


class Shape:
    """What packets look like, from the device keys. Raises ValueError as the program refuses."""

    def __init__(self, given: dict[str, str]) -> None:
        self.given = given
        self.numbers = {name: int(given.get(name, "0")) for name in NUMBERS}
        self.headers = [ends(given.get(h, str(i))) for i, h in enumerate(HEADERS, 1)]
        for i, (low, high) in enumerate(self.headers):
            if any(low <= b and a <= high for a, b in self.headers[i + 1 :]):
                raise ValueError
        self.key = bytes.fromhex(given.get("header_protection_key", ""))
        if any(self.key) and min(self.numbers[f"s{i}"] for i in SIZES) < 12:
            raise ValueError
        for name in RANGES:
            ends(given.get(name, "0"))

    def mask(self, packet: bytes) -> int:
        if not any(self.key):
            return 0
        return int.from_bytes(hashlib.blake2s(packet[:12], key=self.key).digest()[:4], "little")

    def hide(self, message: bytes) -> bytes:
        kind = message[0]
        low, high = self.headers[kind - 1]
        padding = secrets.token_bytes(self.numbers[f"s{kind}"])
        header = (low + secrets.randbelow(high - low + 1)) ^ self.mask(padding)
        return padding + struct.pack("<I", header) + message[4:]

    def show(self, packet: bytes) -> bytes | None:
        for kind, size in SIZES.items():
            start = self.numbers[f"s{kind}"]
            fits = len(packet) >= start + size if kind == 4 else len(packet) == start + size
            if not fits:
                continue
            low, high = self.headers[kind - 1]
            header = struct.unpack_from("<I", packet, start)[0] ^ self.mask(packet)
            if low <= header <= high:
                return struct.pack("<I", kind) + packet[start + 4 :]
        return None

    def decoys(self) -> list[bytes]:
        made = [decoy(self.given[name]) for name in DECOYS if self.given.get(name)]
        low, high = self.numbers["jmin"], self.numbers["jmax"]
        sizes = [low + secrets.randbelow(high - low + 1) for _ in range(self.numbers["jc"])]
        return made + [secrets.token_bytes(size) for size in sizes]


def decoy(text: str) -> bytes:
    made = b""
    for tag in text.strip("<>").split("><"):
        name, _, argument = tag.partition(" ")
        if name == "b":
            made += bytes.fromhex(argument.removeprefix("0x"))
        elif name == "t":
            made += struct.pack(">I", int(time.time()))
        else:
            letters = {"r": bytes(range(256)), "rd": b"0123456789", "rc": b"abcdefghijk"}[name]
            made += bytes(secrets.choice(letters) for _ in range(int(argument)))
    return made


class Relay:
    """Between the wire and wireguard-go's port on loopback: a local socket for each far address."""

    def __init__(self, inner_port: int) -> None:
        self.shape = Shape({})
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

    def __init__(self, name: str) -> None:
        self.inner_path = f"{INNER}/{name}.sock"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind(("127.0.0.1", 0))
            inner_port = probe.getsockname()[1]
        self.relay = Relay(inner_port)
        self.lock = threading.Lock()
        self.given: dict[str, str] = {}
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
        given, passed, in_peer, port = dict(self.given), [], False, None
        for line in lines:
            key, _, value = line.partition("=")
            in_peer |= key == "public_key"
            if not in_peer and key in KEYS:
                given.pop(key, None)
                if value not in EMPTY:
                    given[key] = value
            elif not in_peer and key == "listen_port":
                port = int(value)
            elif key == "endpoint":
                local = self.relay.local(split_endpoint(value))
                passed.append(f"endpoint=127.0.0.1:{local.getsockname()[1]}")
            else:
                passed.append(line)
        try:
            shape = Shape(given)
        except ValueError:
            return "errno=-22\n\n"
        try:
            if port is not None:
                self.relay.listen(port)
        except OSError:
            return "errno=-98\n\n"
        self.given, self.relay.shape = given, shape
        return self.ask("\n".join(["set=1", *passed, "", ""]))

    def get(self) -> str:
        ports = {local.getsockname()[1]: far for far, local in self.relay.locals.items()}
        shown = []
        for line in self.ask("get=1\n\n").splitlines():
            key, _, value = line.partition("=")
            if key == "listen_port":
                shown.append(f"listen_port={self.relay.port()}")
                shown += [f"{name}={self.given[name]}" for name in KEYS if name in self.given]
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
    name = sys.argv[-1]
    daemon = subprocess.Popen(["wireguard-go", "-f", name], preexec_fn=die_with_parent)  # noqa: PLW1509
    # The interface's end is wireguard-go's, and so the program's.
    threading.Thread(target=lambda: os._exit(daemon.wait() and 1), daemon=True).start()
    while not os.path.exists(f"{INNER}/{name}.sock"):
        time.sleep(0.01)
    control = None
    while control is None:
        with contextlib.suppress(ConnectionError):
            control = Control(name)
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
