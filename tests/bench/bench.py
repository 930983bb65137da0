#!/usr/bin/env python3
"""Measures a gateway from outside and prints one table: figure, unit, measured, target.

Times mean little on shared machines; beside them stands a reference from the same run: a plain
http.server that echoes over TLS. As root everything runs in a network namespace of its own, so
that wireguard-go can be measured too.

    python3 tests/bench/bench.py [--peers 10000] [--seconds 4] [--backend memory,uapi]
"""

from __future__ import annotations

import argparse
import base64
import os
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness import GatewayProcess, free_port, sign, wait_for

IN_NAMESPACE = "WGGW_BENCH_NAMESPACE"
TURNS = 5  # of two measurements that are compared


class Row(NamedTuple):
    figure: str
    value: str
    target: str = ""


class Connection:
    """A kept-alive TLS connection that writes whole requests and reads whole answers."""

    def __init__(self, port: int) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        plain = socket.create_connection(("127.0.0.1", port), timeout=30)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = context.wrap_socket(plain)

    def exchange(self, request: bytes) -> bytes:
        self._socket.sendall(request)
        data = self._socket.recv(65536)
        while b"\r\n\r\n" not in data:
            data += self._socket.recv(65536)
        head, _, body = data.partition(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        while len(body) < length:
            body += self._socket.recv(65536)
        if not head.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"unexpected answer: {head.decode()} {body.decode()}")
        return body

    def close(self) -> None:
        self._socket.close()


def create_request(path: str = "/api/v1/configurations/") -> bytes:
    """A signed create of a random key."""
    key = base64.b64encode(os.urandom(32)).decode()
    body = b'{"public_key":"%b","protocol":"dual"}' % key.encode()
    headers = "".join(f"{name}: {value}\r\n" for name, value in sign(body).items())
    head = (
        f"POST {path} HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n{headers}\r\n"
    )
    return head.encode() + body


def rate(port: int, connections: int, seconds: float) -> tuple[float, float]:
    """Creates per second over so many connections, and the median latency in ms."""
    latencies: list[list[float]] = [[] for _ in range(connections)]
    end = time.perf_counter() + seconds

    def work(mine: list[float]) -> None:
        connection = Connection(port)
        while (started := time.perf_counter()) < end:
            connection.exchange(create_request())
            mine.append(time.perf_counter() - started)
        connection.close()

    threads = [threading.Thread(target=work, args=(mine,)) for mine in latencies]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    everything = [latency for mine in latencies for latency in mine]
    elapsed = time.perf_counter() - started
    return len(everything) / elapsed, statistics.median(everything) * 1000


def fill(port: int, peers: int) -> None:
    """Create so many peers over four connections."""

    def work(count: int) -> None:
        connection = Connection(port)
        for _ in range(count):
            connection.exchange(create_request())
        connection.close()

    threads = [threading.Thread(target=work, args=(peers // 4,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def resident(pid: int) -> float:
    """Resident memory in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


class Echo(BaseHTTPRequestHandler):
    """The ceiling of the platform: http.server as it is, TLS, a body read and sent back."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


def serve_echo(directory: str, port: int) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(f"{directory}/cert.pem", f"{directory}/key.pem")
    server = ThreadingHTTPServer(("127.0.0.1", port), Echo)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.serve_forever()


class Echoes:
    """The echo server as a process of its own."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        gateway = GatewayProcess(directory)  # for its certificate
        gateway.start()
        gateway.stop()
        self._port = free_port()
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--echo", str(directory), "--port", str(self._port)]
        )
        wait_for(lambda: _listens(self._port), what="the echo server")

    def rate(self, connections: int, seconds: float) -> float:
        return rate(self._port, connections, seconds)[0]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def start_time(gateway: GatewayProcess) -> float:
    """Seconds from the start of the process to readiness."""
    started = time.perf_counter()
    gateway.start(120)
    return time.perf_counter() - started


class Bench:
    """One backend and durability: a gateway measured empty, full, and full beside an empty one."""

    def __init__(self, directory: Path, backend: str, durability: str, peers: int) -> None:
        self.name = f"{backend}, {durability}"
        self.peers = peers
        self.full = self._gateway(directory / "full", backend, durability, "10.0.0.0/8", 0)
        self.empty = self._gateway(directory / "empty", backend, durability, "11.0.0.0/8", 1)

    @staticmethod
    def _gateway(
        directory: Path, backend: str, durability: str, subnet: str, number: int
    ) -> GatewayProcess:
        directory.mkdir(parents=True)
        return GatewayProcess(
            directory,
            WG_BACKEND=backend,
            WG_INTERFACE=f"wgb{os.getpid() % 100000}n{number}",
            WG_DEFAULT_PORT=str(51820 + number),
            WG_IPV4_SUBNET=subnet,
            WG_IPV6_SUBNET=f"fd42:4242:{number}::/64",
            DURABILITY=durability,
            LOG_LEVEL="warning",
        )

    def close(self) -> None:
        for gateway in (self.full, self.empty):
            gateway.close()
            stop_interface(gateway.settings["WG_INTERFACE"])

    def rows(self, seconds: float, echo: Echoes) -> Iterator[Row]:
        full = self.full
        first = start_time(full)  # it makes keys and a certificate
        full.stop()
        yield Row(f"{self.name}: first start to ready", f"{first * 1000:.0f} ms")
        yield Row(
            f"{self.name}: start to ready, empty", f"{start_time(full) * 1000:.0f} ms", "≤ 250"
        )
        yield Row(f"{self.name}: resident, empty", f"{self._resident():.0f} MB", "≤ 35")
        one, latency = rate(full.port, 1, seconds)
        yield Row(f"{self.name}: creates/s, 1 connection", f"{one:.0f} ({latency:.2f} ms median)")
        many, ceiling = in_turn(
            lambda part: rate(full.port, 8, part)[0], lambda part: echo.rate(8, part), seconds
        )
        share = f"{many:.0f} ({many / ceiling:.0%} of the echo's {ceiling:.0f})"
        yield Row(f"{self.name}: creates/s, 8 connections", share, "≥ 1500, ≥ 70 %")
        yield from self._full_rows(seconds)
        yield from self._restart_rows()

    def _full_rows(self, seconds: float) -> Iterator[Row]:
        full = self.full
        fill(full.port, self.peers - total_peers(full))
        yield Row(
            f"{self.name}: resident, {total_peers(full)} peers",
            f"{self._resident():.0f} MB",
            "≤ 60 at 10,000",
        )
        self.empty.start()
        many, few = in_turn(
            lambda part: rate(full.port, 8, part)[0],
            lambda part: rate(self.empty.port, 8, part)[0],
            seconds,
        )
        yield Row(
            f"{self.name}: creates/s, 8 connections, above {self.peers} peers",
            f"{many:.0f} ({many / few:.0%} of {few:.0f} when empty)",
            "≥ 95 %",
        )

    def _restart_rows(self) -> Iterator[Row]:
        full = self.full
        total = total_peers(full)
        full.stop()
        yield Row(f"{self.name}: restart, {total} peers there", f"{start_time(full):.2f} s")
        full.stop()
        stop_interface(full.settings["WG_INTERFACE"])
        yield Row(
            f"{self.name}: start, {total} peers to restore",
            f"{start_time(full):.2f} s",
            "≤ 2.5 at 10,000",
        )

    def _resident(self) -> float:
        assert self.full.process
        return resident(self.full.process.pid)


def total_peers(gateway: GatewayProcess) -> int:
    client = gateway.client()
    try:
        return int(client.send("GET", "/api/v1/server/status").json["total_peers"])
    finally:
        client.close()


def in_turn(
    first: Callable[[float], float], second: Callable[[float], float], seconds: float
) -> tuple[float, float]:
    """The medians of two rates, measured in short turns: the machine's speed drifts."""
    turns = [(first(seconds / 2), second(seconds / 2)) for _ in range(TURNS)]
    return statistics.median(a for a, _ in turns), statistics.median(b for _, b in turns)


def stop_interface(name: str) -> None:
    """Stop the userspace WireGuard that a gateway started for this interface."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if len(words) > 2 and words[0].endswith(b"wireguard-go") and words[2] == name.encode():
            os.kill(int(entry.name), signal.SIGTERM)
            wait_for(lambda: not Path(f"/sys/class/net/{name}").exists(), what=f"{name} to go")


def table(rows: Callable[[], Iterator[Row]]) -> None:
    print(f"{'figure':58} {'measured':36} target")
    for row in rows():
        print(f"{row.figure:58} {row.value:36} {row.target}", flush=True)


def run(arguments: argparse.Namespace) -> Iterator[Row]:
    from durability import measure_durability  # which builds on this module

    with tempfile.TemporaryDirectory() as name:
        echo = Echoes(Path(name) / "echo")
        try:
            one = echo.rate(1, arguments.seconds)
            yield Row("http.server echo over TLS: requests/s, 1 connection", f"{one:.0f}")
            for backend in arguments.backend.split(","):
                if backend == "uapi" and (os.geteuid() or not shutil.which("wireguard-go")):
                    yield Row("uapi", "skipped: needs root and wireguard-go")
                    continue
                for durability in arguments.durability.split(","):
                    directory = Path(name) / f"{backend}-{durability}"
                    bench = Bench(directory, backend, durability, arguments.peers)
                    try:
                        yield from bench.rows(arguments.seconds, echo)
                    finally:
                        bench.close()
        finally:
            echo.close()
        if arguments.disk_peers:
            yield from measure_durability(Path(name), arguments.disk_peers, arguments.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peers", type=int, default=10000)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--backend", default="memory,uapi")
    parser.add_argument("--durability", default="commit,none")
    parser.add_argument(
        "--disk-peers",
        type=int,
        default=60000,
        help="of the rows on snapshots and recovery; 0: none",
    )
    parser.add_argument("--echo", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.echo:
        serve_echo(arguments.echo, arguments.port)
    elif os.geteuid() == 0 and IN_NAMESPACE not in os.environ:
        os.environ[IN_NAMESPACE] = "1"
        command = 'ip link set lo up && exec "$0" "$@"'
        unshared = ["unshare", "--net", "sh", "-c", command, sys.executable, *sys.argv]
        os.execvp("unshare", unshared)
    else:
        table(lambda: run(arguments))


if __name__ == "__main__":
    main()
