#!/usr/bin/env python3
"""Measures this program beside another version of it and prints one table of ratios.

    git show 34f8060:wggw.py >/tmp/first.py                # the first design
    python3 tests/bench/against.py /tmp/first.py           # everything: about 8 minutes
    python3 tests/bench/against.py /tmp/first.py --only create,full --seconds 0.5

Both are measured in turns, ours first, because a machine's speed drifts. A ratio is ours divided by
the other's of the same turn; the table shows the median of the ratios, their range, and the median
of each program's own values. Where the target is one for our own value, the values are the worst of
all turns. While one gateway is measured the other is stopped with SIGSTOP, so that it costs
nothing, and neither samples unless the row says so.

As root everything runs in a network namespace of its own. Without root, and without wireguard-go,
the rows that need an interface are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import py_compile
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import load
from harness import MODULE, WGGW, GatewayProcess, path_key
from load import COLLECTION, Connection, check, latencies, ready, request, stop

# A disk whose fsync takes 5 ms more.
SLOW = """import time; fsync = wggw.Disk.fsync
def slow(self, handle):
    time.sleep(0.005)
    fsync(self, handle)
wggw.Disk.fsync = slow
"""
LEAVING = 1500  # peers that are suspended or deleted for each second of --seconds


class Row(NamedTuple):
    """`least`: the bound is the least that is good enough. `own`: it is for our own value."""

    text: str
    unit: str
    bound: float
    least: bool = False
    own: bool = False

    @property
    def target(self) -> str:
        return f"{'≥' if self.least else '≤'} {self.bound:g}{f' {self.unit}' if self.own else ''}"

    def met(self, value: float) -> bool:
        return value >= self.bound if self.least else value <= self.bound


ROWS = {
    "create 1": Row("creates, memory backend, 1 connection", "1/s", 0.95, least=True),
    "create 8": Row("creates, memory backend, 8 connections", "1/s", 1.7, least=True),
    "create 32": Row("creates, memory backend, 32 connections", "1/s", 2.5, least=True),
    "interface 1": Row("creates, wireguard-go, 1 connection", "1/s", 1.0, least=True),
    "interface 8": Row("creates, wireguard-go, 8 connections", "1/s", 1.6, least=True),
    "suspend": Row("suspends, wireguard-go, 8 connections", "1/s", 1.8, least=True),
    "delete": Row("deletes, wireguard-go, 8 connections", "1/s", 1.8, least=True),
    "get": Row("GET of one of 60,000 peers, median", "ms", 0.6),
    "page": Row("a page of 100, p99", "ms", 1.0),
    "list": Row("a list of 1,000, four fields ÷ the other's whole one, median", "ms", 0.4),
    "unchanged": Row("desired state, 60,000 unchanged, memory backend", "s", 1.0),
    "memory": Row("resident memory, 60,000 peers, memory backend", "MB", 1.0),
    "page busy": Row("a page of 100, sample and snapshot each second, p99", "ms", 1.0),
    "memory empty": Row("resident memory, empty, memory backend", "MB", 1.0),
    "restore": Row("start, 40,000 peers to restore, memory backend", "s", 1.0),
    "sampled": Row("longest GET, 40,000 sampled each second, 50 creates/s", "ms", 30, own=True),
    "restart": Row("restart, 40,000 peers present, wireguard-go", "s", 0.8),
    "desired": Row("desired state, 20,000 new peers, wireguard-go", "s", 0.75),
    "slow": Row("longest GET, fsync of 5 ms, beside a writer ÷ without one", "ms", 1.2),
}


class Contender(GatewayProcess):
    """A gateway of one of the two programs, with addresses that the other's does not have."""

    def __init__(self, directory: Path, tree: Path, net: int, lines: str, **settings: str) -> None:
        networks = {"WG_IPV4_SUBNET": f"{net}.64.0.0/10", "WG_IPV6_SUBNET": f"fd42:{net}::/64"}
        super().__init__(directory, **networks, **settings)
        self.program = [sys.executable, "-P", "-c", MODULE.format(lines), str(tree)]
        self.net = net
        self.keys: list[str] = []
        self.body = b""  # of the desired state that it has

    def fill(self, count: int) -> float:
        """Seconds of a desired state of so many new peers and no others."""
        self.keys = [load.random_key() for _ in range(count)]
        peers = [
            {
                "public_key": key,
                "assigned_ip": f"{self.net}.{64 + (n >> 16)}.{n >> 8 & 255}.{n & 255}",
                "assigned_ipv6": f"fd42:{self.net}::{n:x}",
            }
            for n, key in enumerate(self.keys, 10)
        ]
        self.body = load.desired_lines(peers)
        spent = self.put("created")
        if self.settings["WG_BACKEND"] == "uapi":
            check(load.peer_count(self.settings["WG_INTERFACE"]), count)
        return spent

    def put(self, expected: str) -> float:
        """Seconds of that desired state, which counts all peers as `expected`."""
        connection = Connection(self.port)
        path = f"{COLLECTION}?allow_mass_delete=true"
        data = request("PUT", path, self.body, "application/x-ndjson")
        started = time.perf_counter()
        answer = json.loads(connection.exchange(data))
        spent = time.perf_counter() - started
        connection.close()
        check(answer[expected], len(self.keys))
        return spent

    def any_get(self) -> bytes:
        return request("GET", COLLECTION + path_key(random.choice(self.keys)))

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """It runs within this, if it has been started, and is held up after it."""
        if self.process:
            self.process.send_signal(signal.SIGCONT)
            time.sleep(0.1)  # what was due meanwhile is done first
        yield
        if self.process:
            self.hold()

    def hold(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)


Pair = tuple[Contender, Contender]
Turns = list[tuple[float, float]]  # our value and the other's
Found = Iterator[tuple[str, Turns]]  # by the row's name


class Contest:
    """The two programs. Each section starts and ends its own gateways."""

    def __init__(self, directory: Path, trees: list[Path], turns: int, seconds: float) -> None:
        self.directory, self.trees, self.turns, self.seconds = directory, trees, turns, seconds
        self._made = 0

    @contextlib.contextmanager
    def gateway(
        self, which: int, backend: str, lines: str = "", **settings: str
    ) -> Iterator[Contender]:
        """Of ours (0) or the other (1); not started yet. Its interface goes with it."""
        self._made += 1
        place, name = self.directory / f"gateway{self._made}", f"wga{os.getpid()}n{self._made}"
        place.mkdir()
        chosen = {
            "WG_BACKEND": backend,
            "WG_INTERFACE": name,
            "WG_DEFAULT_PORT": str(51820 + self._made),
            "SAMPLE_INTERVAL": "3600",
            "LOG_LEVEL": "warning",
            **settings,
        }
        gateway = Contender(place, self.trees[which], (10, 100)[which], lines, **chosen)
        try:
            yield gateway
        finally:
            gateway.close()
            load.remove_interface(name)

    @contextlib.contextmanager
    def pair(self, backend: str, peers: int = 0, **settings: str) -> Iterator[Pair]:
        """One gateway of each, with so many peers, both held up."""
        with (
            self.gateway(0, backend, **settings) as ours,
            self.gateway(1, backend, **settings) as other,
        ):
            for gateway in (ours, other):
                ready(gateway)
                if peers:
                    gateway.fill(peers)
                gateway.hold()
            yield ours, other

    def in_turns(self, ours: Callable[[], float], other: Callable[[], float]) -> Turns:
        return [(ours(), other()) for _ in range(self.turns)]

    def compare(self, pair: Pair, job: Callable[[Contender], float]) -> Turns:
        def run(gateway: Contender) -> float:
            with gateway.awake():
                return job(gateway)

        return self.in_turns(lambda: run(pair[0]), lambda: run(pair[1]))

    def times(self, gateway: Contender, make: Callable[[], bytes]) -> list[float]:
        """Milliseconds, sorted."""
        return [1000 * seconds for seconds in latencies(gateway.port, self.seconds, make)]

    # --- sections --------------------------------------------------------------------------------

    def create(self) -> Found:
        with self.pair("memory") as pair:
            yield from self._creates(pair, "create", 1, 8, 32)

    def interface(self) -> Found:
        with self.pair("uapi") as pair:
            yield from self._creates(pair, "interface", 1, 8)

    def _creates(self, pair: Pair, row: str, *connections: int) -> Found:
        for number in connections:

            def creates(gateway: Contender, number: int = number) -> float:
                return load.rate(gateway.port, number, self.seconds)

            yield f"{row} {number}", self.compare(pair, creates)

    def leave(self) -> Found:
        def leaving(gateway: Contender, method: str, rest: str = "", body: bytes = b"") -> float:
            gateway.fill(int(LEAVING * self.seconds))
            paths = [COLLECTION + path_key(key) + rest for key in gateway.keys]
            return load.drain(gateway.port, [request(method, path, body) for path in paths])

        words = ("PUT", "/status", b'{"status":"suspended"}')
        with self.pair("uapi") as pair:
            yield "suspend", self.compare(pair, lambda gateway: leaving(gateway, *words))
            yield "delete", self.compare(pair, lambda gateway: leaving(gateway, "DELETE"))

    def full(self) -> Found:
        def one(gateway: Contender) -> float:
            return statistics.median(self.times(gateway, gateway.any_get))

        def page(gateway: Contender) -> float:
            return load.percentile(self.times(gateway, load.Pages(gateway.port).next), 0.99)

        def thousand(gateway: Contender) -> float:
            fields = "&fields=public_key,status,rx_bytes,tx_bytes" * (gateway is pair[0])
            path = f"{COLLECTION}?limit=1000{fields}"
            return statistics.median(self.times(gateway, lambda: request("GET", path)))

        def page_busy(gateway: Contender) -> float:
            with load.trickle(gateway.port):  # or no snapshot would be due
                return page(gateway)

        with self.pair("memory", 60_000) as pair:
            yield "get", self.compare(pair, one)
            yield "page", self.compare(pair, page)
            yield "list", self.compare(pair, thousand)
            yield "unchanged", self.compare(pair, lambda gateway: gateway.put("unchanged"))
            yield "memory", self._starts(pair, resident)
            for gateway in pair:
                gateway.settings |= {"SAMPLE_INTERVAL": "1", "SNAPSHOT_INTERVAL": "1"}
                ready(gateway)
                gateway.hold()
            yield "page busy", self.compare(pair, page_busy)

    def empty(self) -> Found:
        with self.pair("memory") as pair:
            yield "memory empty", self._starts(pair, resident)

    def restore(self) -> Found:
        with self.pair("memory", 40_000) as pair:
            yield "restore", self._starts(pair)

    def present(self) -> Found:
        def longest(gateway: Contender) -> float:
            with load.trickle(gateway.port, 50):
                return self.times(gateway, gateway.any_get)[-1]

        with self.pair("uapi", 40_000, SAMPLE_INTERVAL="1") as pair:
            yield "sampled", self.compare(pair, longest)
            for gateway in pair:
                gateway.settings["SAMPLE_INTERVAL"] = "3600"
            yield "restart", self._starts(pair)

    def _starts(self, pair: Pair, measure: Callable[[Contender], float] | None = None) -> Turns:
        """Both are stopped, and started in turns with their files: seconds, or what is measured."""

        def start(gateway: Contender) -> float:
            seconds = ready(gateway)
            value = measure(gateway) if measure else seconds
            stop(gateway)
            return value

        for gateway in pair:
            with gateway.awake():
                stop(gateway)
        return self.compare(pair, start)

    def desired(self) -> Found:
        def onto_an_empty_one(which: int) -> float:
            with self.gateway(which, "uapi") as gateway:
                ready(gateway)
                return gateway.fill(20_000)

        yield "desired", self.in_turns(lambda: onto_an_empty_one(0), lambda: onto_an_empty_one(1))

    def slow(self) -> Found:
        """Of ours alone."""
        with self.gateway(0, "memory", SLOW) as gateway:

            def longest() -> float:
                return self.times(gateway, gateway.any_get)[-1]

            def beside_a_writer() -> float:
                with load.trickle(gateway.port, math.inf):
                    return longest()

            ready(gateway)
            gateway.fill(1000)
            yield "slow", self.in_turns(beside_a_writer, longest)


def resident(gateway: Any) -> float:
    return load.resident(gateway.process.pid)


WITH_INTERFACE = ("interface", "leave", "present", "desired")
SECTIONS = "create,interface,leave,full,empty,restore,present,desired,slow"


def show(row: Row, turns: Turns) -> None:
    ratios = sorted(ours / other for ours, other in turns)
    ours, other = map(max if row.own else statistics.median, zip(*turns, strict=True))
    ratio = statistics.median(ratios)
    line(
        row.text,
        row.target,
        f"{ratio:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
        f"{load.rounded(ours)}, {load.rounded(other)} {row.unit}",
        "met" if row.met(ours if row.own else ratio) else "MISSED",
    )


def line(figure: str, target: str, ratio: str, values: str, verdict: str) -> None:
    print(f"{figure:60}  {target:8}  {ratio:20}  {values:18}  {verdict}", flush=True)


def run(arguments: argparse.Namespace) -> None:
    sections = arguments.only.split(",")
    if not load.usable("uapi"):
        sections = [name for name in sections if name not in WITH_INTERFACE]
    gc.freeze()  # collections here would lengthen the longest answers
    with tempfile.TemporaryDirectory(prefix="wggw-against-") as name:
        trees = [Path(name) / "ours", Path(name) / "other"]
        for tree, program in zip(trees, (WGGW, arguments.other), strict=True):
            tree.mkdir()
            py_compile.compile(str(shutil.copy(program, tree / "wggw.py")), doraise=True)
        print(load.machine(Path(name)))
        line("figure", "target", "ratio", "ours, the other's", "")
        contest = Contest(Path(name), trees, arguments.turns, arguments.seconds)
        for section in sections:
            for row, turns in getattr(contest, section)():
                show(ROWS[row], turns)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path, help="another version's wggw.py")
    parser.add_argument("--only", default=SECTIONS, help=f"some of {SECTIONS}")
    parser.add_argument("--turns", type=int, default=4, help="of each row (4)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=2.0,
        help="of each measurement (2); below 1 some hold no sample",
    )
    arguments = parser.parse_args()
    load.enter_namespace()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # and clean up
    run(arguments)


if __name__ == "__main__":
    main()
