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


def measure_echo(directory: Path, seconds: float) -> tuple[float, float]:
    """The echo server's requests per second at 1 and 8 connections."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, __file__, "--echo", str(directory), "--port", str(port)]
    )
    try:
        wait_for(lambda: _listens(port), what="the echo server")
        return rate(port, 1, seconds)[0], rate(port, 8, seconds)[0]
    finally:
        process.kill()
        process.wait()


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


def measure(
    backend: str, directory: Path, peers: int, seconds: float, durability: str
) -> Iterator[Row]:
    """The rows of one backend."""
    gateway = GatewayProcess(
        directory,
        WG_BACKEND=backend,
        WG_INTERFACE=f"wgb{os.getpid() % 100000}",
        WG_IPV4_SUBNET="10.0.0.0/8",
        DURABILITY=durability,
        LOG_LEVEL="warning",
    )
    name = f"{backend}, {durability}"
    try:
        yield Row(f"{name}: start to ready, empty", f"{start_time(gateway) * 1000:.0f} ms")
        assert gateway.process
        yield Row(f"{name}: resident, empty", f"{resident(gateway.process.pid):.0f} MB")
        first, latency = rate(gateway.port, 1, seconds)
        yield Row(f"{name}: creates/s, 1 connection", f"{first:.0f} ({latency:.2f} ms median)")
        few, _ = rate(gateway.port, 8, seconds)
        target = "≥ 1500" if backend == "memory" else ""
        yield Row(f"{name}: creates/s, 8 connections", f"{few:.0f}", target)
        fill(gateway.port, peers)
        many, _ = rate(gateway.port, 8, seconds)
        few = max(few, rate_of_an_empty_one(gateway, directory, seconds))
        yield Row(
            f"{name}: creates/s, 8 connections, above {peers} peers",
            f"{many:.0f} ({many / few:.0%} of empty)",
            "≥ 90 %",
        )
        yield from measure_restart(name, gateway)
    finally:
        gateway.close()
        stop_interface(gateway.settings["WG_INTERFACE"])


def rate_of_an_empty_one(full: GatewayProcess, directory: Path, seconds: float) -> float:
    """The same again on an empty gateway right afterwards: the machine's speed drifts."""
    other = directory / "empty"
    other.mkdir()
    settings = {k: v for k, v in full.settings.items() if k in ("WG_BACKEND", "DURABILITY")}
    name = f"{full.settings['WG_INTERFACE']}e"
    gateway = GatewayProcess(
        other,
        WG_INTERFACE=name,
        WG_DEFAULT_PORT="51821",
        WG_IPV4_SUBNET="11.0.0.0/8",
        WG_IPV6_SUBNET="fd42:4242:2::/64",
        LOG_LEVEL="warning",
        **settings,
    )
    try:
        gateway.start()
        return rate(gateway.port, 8, seconds)[0]
    finally:
        gateway.close()
        stop_interface(name)


def measure_restart(name: str, gateway: GatewayProcess) -> Iterator[Row]:
    """Start to ready with the interface's peers there, then with none."""
    assert gateway.process
    client = gateway.client()
    total = client.send("GET", "/api/v1/server/status").json["total_peers"]
    client.close()
    memory = resident(gateway.process.pid)
    yield Row(f"{name}: resident, {total} peers", f"{memory:.0f} MB", "≤ 60 MB at 10,000")
    gateway.stop()
    yield Row(f"{name}: restart to ready, {total} peers there", f"{start_time(gateway):.2f} s")
    gateway.stop()
    stop_interface(gateway.settings["WG_INTERFACE"])
    yield Row(
        f"{name}: start to ready, {total} peers to restore",
        f"{start_time(gateway):.2f} s",
        "≤ 2.5 s at 10,000",
    )


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
    print(f"{'figure':58} {'measured':28} target")
    for row in rows():
        print(f"{row.figure:58} {row.value:28} {row.target}", flush=True)


def run(arguments: argparse.Namespace) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as name:
        for backend in arguments.backend.split(","):
            if backend == "uapi" and (os.geteuid() or not shutil.which("wireguard-go")):
                yield Row("uapi", "skipped: needs root and wireguard-go")
                continue
            for durability in arguments.durability.split(","):
                directory = Path(name) / f"{backend}-{durability}"
                directory.mkdir()
                yield from measure(
                    backend, directory, arguments.peers, arguments.seconds, durability
                )
        one, eight = measure_echo(directory, arguments.seconds)
        yield Row("http.server echo over TLS: requests/s, 1 connection", f"{one:.0f}")
        yield Row("http.server echo over TLS: requests/s, 8 connections", f"{eight:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peers", type=int, default=10000)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--backend", default="memory,uapi")
    parser.add_argument("--durability", default="commit,none")
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
