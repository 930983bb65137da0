"""The load generator, the echo server that is the platform's ceiling, and interfaces to compare.

Nothing here is taken from wggw.py.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import platform
import random
import re
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from harness import ANY_PEER, GatewayProcess, free_port, sign, wait_for

COLLECTION = "/api/v1/configurations/"
TURNS = 5  # of measurements that are compared
START_SECONDS = 300  # a guest is slow
IN_NAMESPACE = "WGGW_BENCH_NAMESPACE"


def random_key() -> str:
    return base64.b64encode(os.urandom(32)).decode()


class Connection:
    """A kept-alive TLS connection that writes whole requests and reads whole answers."""

    def __init__(self, port: int) -> None:
        plain = socket.create_connection(("127.0.0.1", port), timeout=300)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = ANY_PEER.wrap_socket(plain)

    def exchange(self, request: bytes) -> bytes:
        self._socket.sendall(request)
        data = self._socket.recv(65536)
        while b"\r\n\r\n" not in data:
            data += self._socket.recv(65536)
        head, _, body = data.partition(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        pieces, missing = [body], length - len(body)
        while missing > 0:
            pieces.append(self._socket.recv(65536))
            missing -= len(pieces[-1])
        if not head.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"unexpected answer: {head.decode()} {b''.join(pieces).decode()}")
        return b"".join(pieces)

    def close(self) -> None:
        self._socket.close()


def request(method: str, path: str, body: bytes = b"", kind: str = "application/json") -> bytes:
    """A signed request."""
    headers = "".join(f"{name}: {value}\r\n" for name, value in sign(body).items())
    if body:
        headers += f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
    return f"{method} {path} HTTP/1.1\r\nHost: gateway\r\n{headers}\r\n".encode() + body


def a_create() -> bytes:
    """A signed create of a random key."""
    return request(
        "POST", COLLECTION, b'{"public_key":"%b","protocol":"dual"}' % random_key().encode()
    )


def latencies(
    port: int, seconds: float, make: Callable[[], bytes], connections: int = 1
) -> list[float]:
    """Of requests one after the other on so many connections, in seconds, sorted."""
    found: list[list[float]] = [[] for _ in range(connections)]
    together = threading.Barrier(connections, timeout=60)

    def work(mine: list[float]) -> None:
        connection = Connection(port)
        connection.exchange(make())
        together.wait()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            data = make()
            started = time.perf_counter()
            connection.exchange(data)
            mine.append(time.perf_counter() - started)
        connection.close()

    in_threads([lambda mine=mine: work(mine) for mine in found])  # type: ignore[misc]
    return sorted(latency for mine in found for latency in mine)


def rate(port: int, connections: int, seconds: float) -> float:
    """Creates per second."""
    return len(latencies(port, seconds, a_create, connections)) / seconds


def drain(port: int, requests: list[bytes], connections: int = 8) -> float:
    """Requests per second until all of these have been answered."""
    began: list[float] = []
    together = threading.Barrier(connections, lambda: began.append(time.perf_counter()), 60)
    shared = iter(requests)

    def work() -> None:
        connection = Connection(port)
        together.wait()
        for data in shared:
            connection.exchange(data)
        connection.close()

    in_threads([work] * connections)
    return len(requests) / (time.perf_counter() - began[0])


@contextlib.contextmanager
def trickle(port: int, a_second: float = 5) -> Iterator[None]:
    """So many creates a second beside what is measured; math.inf is one after the other."""
    ended = threading.Event()

    def work() -> None:
        connection, due = Connection(port), time.monotonic()
        while not ended.wait(max(0.0, due - time.monotonic())):
            connection.exchange(a_create())
            due += 1 / a_second
        connection.close()

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        try:
            yield
        finally:
            ended.set()
        working.result()  # raises what it raised


class Pages:
    """Requests for pages of 100, one after the other and from the beginning again."""

    def __init__(self, port: int) -> None:
        connection = Connection(port)
        self._cursors = [""]
        for _ in range(50):  # further ones cost the same: the growth test holds that
            path = f"{COLLECTION}?limit=100{self._cursors[-1]}"
            cursor = json.loads(connection.exchange(request("GET", path)))["next_cursor"]
            if cursor is None:
                break
            self._cursors.append(f"&cursor={cursor}")
        connection.close()

    def next(self) -> bytes:
        return request("GET", f"{COLLECTION}?limit=100{random.choice(self._cursors)}")


def in_threads(jobs: Iterable[Callable[[], Any]]) -> None:
    chosen = list(jobs)
    with ThreadPoolExecutor(len(chosen)) as pool:
        for done in [pool.submit(job) for job in chosen]:
            done.result()  # raises what the job raised


def in_turns(jobs: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """The median of each, measured in short turns: a machine's speed drifts."""
    turns = [{name: job() for name, job in jobs.items()} for _ in range(TURNS)]
    return {name: statistics.median(turn[name] for turn in turns) for name in jobs}


def percentile(sorted_values: list[float], share: float) -> float:
    return sorted_values[min(len(sorted_values) - 1, int(len(sorted_values) * share))]


def resident(pid: int) -> float:
    """Resident memory in MB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) / 1024


def processor(pid: int) -> float:
    """Seconds of the processor that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rounded(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


# --- gateways and what they run on ----------------------------------------------------------------


def check(found: object, expected: object) -> None:
    if found != expected:
        raise SystemExit(f"measured something else: {found}, not {expected}")


def ready(gateway: GatewayProcess) -> float:
    """Seconds from the start of the process to readiness: it says so, as to systemd (sd_notify(3)).

    Asking it would take as much of a guest's one processor as the start itself.
    """
    name = f"wggw-bench-{gateway.port}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(f"\0{name}")
        told.settimeout(1)
        gateway.settings["NOTIFY_SOCKET"] = f"@{name}"
        started = time.perf_counter()
        process = gateway.spawn()
        while time.perf_counter() - started < START_SECONDS and process.poll() is None:
            with contextlib.suppress(TimeoutError):
                if b"READY=1" in told.recv(4096):
                    return time.perf_counter() - started
    raise SystemExit(f"the gateway did not become ready: {gateway.text()[-1000:]}")


def stop(gateway: GatewayProcess) -> None:
    """As stop(), with the patience that a guest needs."""
    assert gateway.process is not None
    gateway.process.terminate()
    gateway.process.wait(60)
    gateway.process = None


def enter_namespace() -> None:
    """As root, start this program again in a network namespace of its own."""
    if os.geteuid() or IN_NAMESPACE in os.environ:
        return
    os.environ[IN_NAMESPACE] = "1"
    command = 'mount -t sysfs none /sys && ip link set lo up && exec "$0" "$@"'
    unshared = ["unshare", "--net", "--mount", "sh", "-c", command, sys.executable, *sys.argv]
    os.execvp("unshare", unshared)


def usable(backend: str) -> bool:
    if backend == "memory":
        return True
    needed = ["wg", "ip", *(["wireguard-go"] if backend == "uapi" else [])]
    missing = [name for name in needed if not shutil.which(name)]
    if os.geteuid() or missing:
        print(f"{backend}: left out: needs root, {', '.join(needed)}")
        return False
    return True


def machine(directory: Path) -> str:
    """What it was measured on."""
    models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    with (directory / "fsync").open("wb") as file:
        times = []
        for _ in range(50):
            file.write(b"x" * 300)
            file.flush()
            started = time.perf_counter()
            os.fsync(file.fileno())
            times.append(time.perf_counter() - started)
    return (
        f"{os.cpu_count()} × {models[0] if models else platform.machine()}, Linux "
        f"{platform.release()}, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}, "
        f"fsync {statistics.median(times) * 1000:.2f} ms (median)"
    )


# --- the ceiling of the platform ------------------------------------------------------------------


class Echo(BaseHTTPRequestHandler):
    """http.server as it is, TLS, a body read and sent back."""

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
    """The echo server as a process of its own, with a gateway's certificate."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        gateway = GatewayProcess(directory)
        gateway.start(60)
        gateway.stop()
        self.port = free_port()
        command = [sys.executable, __file__, str(directory), str(self.port)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
        self._process = subprocess.Popen(command, env=environment)
        wait_for(lambda: _listens(self.port), 60, "the echo server")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


# --- interfaces, seen with wireguard-tools --------------------------------------------------------


class Scratch:
    """An interface of the bench's own, with a key: what `wg` alone costs on it."""

    def __init__(self, kind: str, name: str) -> None:
        self.name = name
        self._process: subprocess.Popen[bytes] | None = None
        if kind == "netlink":
            subprocess.run(["ip", "link", "add", name, "type", "wireguard"], check=True)
        else:
            self._process = subprocess.Popen(
                ["wireguard-go", "-f", name], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            wait_for(lambda: Path(f"/var/run/wireguard/{name}.sock").exists(), what=name)
        # A backend is set up on it, too, which takes none without the gateway's mark.
        subprocess.run(["ip", "link", "set", "dev", name, "alias", "wggw"], check=True)
        self._key = random_key()
        self.empty()

    def syncconf(self, peers: Iterable[Mapping[str, Any]], directory: Path) -> float:
        """Seconds that `wg syncconf` takes for these peers on the empty interface."""
        path = directory / f"{self.name}.conf"
        with path.open("w") as file:
            file.write(f"[Interface]\nPrivateKey = {self._key}\n")
            for peer in peers:
                addresses = ", ".join(f"{peer[n]}" for n in ("assigned_ip", "assigned_ipv6"))
                file.write(f"[Peer]\nPublicKey = {peer['public_key']}\nAllowedIPs = {addresses}\n")
        self.empty()
        started = time.perf_counter()
        subprocess.run(["wg", "syncconf", self.name, str(path)], check=True)
        return time.perf_counter() - started

    def sets(self, count: int) -> float:
        """Seconds a peer with one process of `wg set` for each."""
        started = time.perf_counter()
        for number in range(count):
            address = f"10.200.{number >> 8}.{number & 255}/32"
            command = ["wg", "set", self.name, "peer", random_key(), "allowed-ips", address]
            subprocess.run(command, check=True)
        return (time.perf_counter() - started) / count

    def empty(self) -> None:
        """And with a key: without one a peer costs less."""
        set_interface(self.name, f"[Interface]\nPrivateKey = {self._key}\n")

    def close(self) -> None:
        self.empty()
        if self._process is None:
            subprocess.run(["ip", "link", "del", self.name], check=True)
        else:
            self._process.terminate()
            self._process.wait()


def set_interface(name: str, configuration: str) -> None:
    """`wg setconf`, which takes all peers off at once: one by one a kernel needs a grace period."""
    command = ["wg", "setconf", name, "/dev/stdin"]
    subprocess.run(command, input=configuration, text=True, check=True)


def peer_count(name: str) -> int:
    done = subprocess.run(["wg", "show", name, "peers"], capture_output=True, check=True)
    return len(done.stdout.splitlines())


def remove_interface(name: str) -> None:
    """What a gateway made: a kernel's interface, or a userspace program that it left running."""
    if not Path(f"/sys/class/net/{name}").exists():
        return
    set_interface(name, "[Interface]\n")
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
            return
    subprocess.run(["ip", "link", "del", name], check=True)


def desired_lines(peers: Iterable[Mapping[str, Any]]) -> bytes:
    """A desired state's body."""
    names = ("public_key", "assigned_ip", "assigned_ipv6")
    return b"".join(json.dumps({n: peer[n] for n in names}).encode() + b"\n" for peer in peers)


if __name__ == "__main__":
    serve_echo(sys.argv[1], int(sys.argv[2]))
