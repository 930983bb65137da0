#!/usr/bin/env python3
"""Measures a gateway from outside and prints one table: figure, unit, target, value, reference.

Times mean little on shared machines; beside them stands a reference from the same run that anyone
can repeat: `wg`, or a plain http.server that echoes over TLS. As root everything runs in a network
namespace of its own, so that wireguard-go can be measured too; --vm does the same in the guest of
tests/vm, with the kernel's WireGuard.

    python3 tests/bench/bench.py                      # everything: about 12 minutes
    python3 tests/bench/bench.py --vm                 # kernel WireGuard: about 15 minutes
    python3 tests/bench/bench.py --peers 2000 --seconds 1 --only create,full
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import inside
import load
from harness import ROOT, GatewayProcess
from load import COLLECTION, Connection, Echoes, Scratch, check, in_turns, ready, request, stop

BATCH = 1000  # operations
BESIDE = {  # of a gateway that runs at the same time as another one: no subnet in common
    "WG_IPV4_SUBNET": "100.64.0.0/10",
    "WG_IPV6_SUBNET": "fd42:4242:2::/64",
}


class Figure(NamedTuple):
    text: str
    unit: str
    target: str = ""


FIGURES = {
    "echo": Figure("http.server echo over TLS, 8 connections", "requests/s"),
    "first": Figure("first start to ready: keys, certificate", "ms"),
    "start": Figure("start to ready, empty", "ms", "≤ 250"),
    "memory empty": Figure("resident memory, empty", "MB", "≤ 35"),
    "latency": Figure("create, 1 connection, DURABILITY=none, median", "ms", "≤ 0.4"),
    "create": Figure("creates, 8 connections", "1/s", "≥ 70 % of the echo"),
    "cost": Figure("cost of a create", "ms", "≤ 1.15 × (memory backend + own set)"),
    "batch": Figure("batch creates, per peer", "µs", "≤ 1.2 × own cost + 40"),
    "none 1": Figure("creates, DURABILITY=none, 1 connection", "1/s"),
    "interval 1": Figure("creates, DURABILITY=interval, 1 connection", "1/s"),
    "commit 1": Figure("creates, DURABILITY=commit, 1 connection", "1/s"),
    "none 8": Figure("creates, DURABILITY=none, 8 connections", "1/s"),
    "interval 8": Figure("creates, DURABILITY=interval, 8 connections", "1/s"),
    "commit 8": Figure("creates, DURABILITY=commit, 8 connections", "1/s", "≥ 60 % of none"),
    "recovery snapshot": Figure("recovery of N peers from a snapshot", "s", "< 2"),
    "recovery journal": Figure("recovery from a journal of N records", "s", "< 2"),
    "start journal": Figure("start to ready, journal of N records", "s"),
    "start N/6": Figure("start to ready, N/6 peers to restore", "s", "≤ 1.3 × syncconf + 0.4"),
    "start N": Figure("start to ready, N peers to restore", "s", "≤ 1.3 × syncconf + 1.2"),
    "restart": Figure("restart, N peers on the interface, none touched", "s", "≤ 2"),
    "memory N/6": Figure("resident memory, N/6 peers", "MB", "≤ 60"),
    "memory N": Figure("resident memory, N peers", "MB", "≤ 130"),
    "idle": Figure("idle at N peers", "% of a core", "≤ 5"),
    "full": Figure("creates above N peers, 8 connections", "1/s", "≥ 95 % of empty"),
    "get": Figure("GET one at N peers, p99", "ms", "≤ 2"),
    "page": Figure("GET a page of 100 at N peers, p99", "ms", "≤ 2"),
    "get busy": Figure("GET one while sampling and snapshots, p99", "ms", "≤ 6"),
    "page busy": Figure("GET a page of 100 while sampling and snapshots, p99", "ms", "≤ 6"),
    "sampled": Figure("GET one while sampling, p99", "ms", "≤ 10"),
    "pause": Figure("longest create with a snapshot a second, at N peers", "ms", "< 20"),
    "hold": Figure("the lock's hold for a snapshot at N peers, longest", "ms", "< 20"),
    "sampling": Figure("processor time of a sample of N peers", "ms", "≤ 2 × wg show dump"),
    "sync": Figure("desired state, N peers onto an empty interface", "s", "≤ 1.3 × syncconf + 2"),
    "sync others": Figure("longest GET during that", "ms"),
    "unchanged": Figure("desired state, unchanged", "s", "≤ 1.5"),
}


class Found(NamedTuple):
    figure: str
    value: float
    reference: str = ""


class Bench:
    """One backend at one number of peers. Each section starts and ends its own gateways."""

    def __init__(self, directory: Path, backend: str, arguments: argparse.Namespace, echo: Echoes):
        self.directory, self.backend, self.echo = directory, backend, echo
        # wireguard-go takes 65,536 peers at most, and some are created above N.
        self.peers: int = min(arguments.peers, 40_000 if backend == "uapi" else arguments.peers)
        self.seconds: float = arguments.seconds
        self.real = backend != "memory"
        self._made = 0

    @contextlib.contextmanager
    def gateway(
        self, backend: str = "", place: Path | None = None, **settings: str
    ) -> Iterator[Any]:
        """Not started yet; its interface goes with it."""
        self._made += 1
        place = place or self.directory / f"gateway{self._made}"
        place.mkdir(parents=True, exist_ok=True)
        name = f"wgb{os.getpid() % 100000}n{self._made}"
        chosen = {
            "WG_BACKEND": backend or self.backend,
            "WG_INTERFACE": name,
            "WG_DEFAULT_PORT": str(51820 + self._made),
            "WG_IPV4_SUBNET": "10.0.0.0/8",
            "LOG_LEVEL": "warning",
            **settings,
        }
        gateway = GatewayProcess(place, **chosen)
        try:
            yield gateway
        finally:
            gateway.close()
            load.remove_interface(chosen["WG_INTERFACE"])

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Scratch]:
        self._made += 1
        scratch = Scratch(self.backend, f"wgb{os.getpid() % 100000}n{self._made}")
        try:
            yield scratch
        finally:
            scratch.close()

    def some_peers(self, count: int, interface: str) -> list[Any]:
        return [inside.a_peer(n, load.random_key(), interface) for n in range(10, count + 10)]

    # --- sections --------------------------------------------------------------------------------

    def start(self) -> Iterator[Found]:
        with self.gateway() as gateway:
            yield Found("first", ready(gateway) * 1000)
            gateway.stop()
            times = []
            for _ in range(5):
                times.append(ready(gateway) * 1000)
                memory = load.resident(gateway.process.pid)
                gateway.stop()
            yield Found("start", statistics.median(times))
            yield Found("memory empty", memory)

    def create(self) -> Iterator[Found]:
        part = self.seconds / 2
        if not self.real:
            with self.gateway(DURABILITY="none") as gateway:
                ready(gateway)
                one = load.latencies(gateway.port, self.seconds, load.a_create)
                yield Found("latency", statistics.median(one) * 1000)
        with self.gateway() as gateway, self.gateway("memory", **BESIDE) as memory:
            ready(gateway)
            jobs = {
                "create": lambda: load.rate(gateway.port, 8, part),
                "echo": lambda: load.rate(self.echo.port, 8, part),
            }
            if self.real:
                ready(memory)
                jobs["memory"] = lambda: load.rate(memory.port, 8, part)
            found = in_turns(jobs)
        yield Found("echo", found["echo"])
        share = found["create"] / found["echo"]
        yield Found("create", found["create"], f"echo {found['echo']:.0f}: {share:.0%}")
        if self.real:
            with self.scratch() as scratch:
                count = min(1000, self.peers)
                own = inside.measure("own_cost", self.backend, scratch.name, count)
                wg = scratch.sets(min(100, count)) * 1000
            cost, ideal = 1000 / found["create"], 1000 / found["memory"] + own["single"] * 1000
            yield Found(
                "cost",
                cost,
                f"memory {1000 / found['memory']:.2f} + set {own['single'] * 1000:.2f}: "
                f"{cost / ideal:.2f} ×; one `wg set` {wg:.1f}",
            )

    def batch(self) -> Iterator[Found]:
        size = min(BATCH, self.peers)
        own, reference = 0.0, "no interface"
        if self.real:
            with self.scratch() as scratch:
                own = inside.measure("own_cost", self.backend, scratch.name, size)["batch"] * 1e6
            reference = f"own cost {own:.0f}: {1.2 * own + 40:.0f} allowed"
        with self.gateway() as gateway:
            ready(gateway)
            connection, times = Connection(gateway.port), []
            for _ in range(5):
                operations = [
                    {"op": "create", "public_key": load.random_key(), "protocol": "dual"}
                    for _ in range(size)
                ]
                body = json.dumps({"operations": operations}).encode()
                data = request("POST", COLLECTION + "batch", body)
                started = time.perf_counter()
                connection.exchange(data)
                times.append((time.perf_counter() - started) / size * 1e6)
            connection.close()
        yield Found("batch", statistics.median(times), reference)

    def durability(self) -> Iterator[Found]:
        """In turns, because a machine's disk drifts as well; on the memory backend alone."""
        if self.real:
            return
        part = self.seconds / 2
        with (
            self.gateway(DURABILITY="none") as none,
            self.gateway(DURABILITY="interval") as interval,
            self.gateway(DURABILITY="commit") as commit,
        ):
            gateways = {"none": none, "interval": interval, "commit": commit}
            for gateway in gateways.values():
                ready(gateway)
            for connections in (1, 8):
                found = in_turns(
                    {
                        name: lambda g=g, c=connections: load.rate(g.port, c, part)  # type: ignore[misc]
                        for name, g in gateways.items()
                    }
                )
                for name, value in found.items():
                    share = f"{value / found['none']:.0%} of none"
                    yield Found(f"{name} {connections}", value, share)

    def recovery(self) -> Iterator[Found]:
        if self.real:
            return
        for name in ("snapshot", "journal"):
            with self.gateway(WG_INTERFACE="wg0") as gateway:
                path = gateway.directory / "wireguard.db"
                inside.write_peers(path, self.some_peers(self.peers, "wg0"), name == "snapshot")
                found = inside.measure("recovery", path)
                check(found["peers"], self.peers)
                reference = f"processor {found['processor']:.2f} s"
                yield Found(f"recovery {name}", found["seconds"], reference)
                if name == "journal":
                    yield Found("start journal", ready(gateway))

    def full(self) -> Iterator[Found]:
        for key, peers in (("N/6", self.peers // 6), ("N", self.peers)):
            place = self.directory / f"full{peers}"
            place.mkdir()
            name = f"wgb{os.getpid() % 100000}f{peers % 1000}"
            rows = self.some_peers(peers, name)
            inside.write_peers(place / "wireguard.db", rows, snapshot=True)
            reference = ""
            if self.real:
                with self.scratch() as scratch:
                    again = scratch.syncconf([row._asdict() for row in rows], self.directory)
                reference = f"syncconf {again:.2f} s"
            with self.gateway(place=place, WG_INTERFACE=name) as gateway:
                if self.real:  # the interface is there, and empty
                    with self.gateway(WG_INTERFACE=name) as first:
                        ready(first)
                        first.stop()
                        mark = f"wggw {place / 'wireguard.db'}"  # now it is the other's
                        command = ["ip", "link", "set", "dev", name, "alias", mark]
                        subprocess.run(command, check=True)
                        yield Found(f"start {key}", ready(gateway), reference)
                        check(load.peer_count(name), peers)
                        yield Found(f"memory {key}", load.resident(gateway.process.pid))
                        if key == "N":
                            yield from self._at_full(gateway, rows)
                        gateway.close()
                else:
                    yield Found(f"start {key}", ready(gateway), reference)
                    yield Found(f"memory {key}", load.resident(gateway.process.pid))
                    if key == "N":
                        yield from self._at_full(gateway, rows)

    def _at_full(self, gateway: GatewayProcess, rows: list[Any]) -> Iterator[Found]:
        """A gateway that runs with N peers, the calm measurements first."""
        path = gateway.directory / "wireguard.db"
        if self.real:
            stop(gateway)
            gateway.settings["LOG_LEVEL"] = "info"
            yield Found("restart", ready(gateway))
            results = re.findall(r"\d+ added, \d+ updated, \d+ removed", gateway.text())
            check(results[-1], "0 added, 0 updated, 0 removed")
            gateway.settings["LOG_LEVEL"] = "warning"
            stop(gateway)
            ready(gateway)
        assert gateway.process
        time.sleep(12)  # the first sample reads every peer, the next ones what has changed
        used, began = load.processor(gateway.process.pid), time.perf_counter()
        time.sleep(min(20.0, 5 * self.seconds))
        spent = load.processor(gateway.process.pid) - used
        yield Found("idle", 100 * spent / (time.perf_counter() - began))
        yield from self._reads(gateway, rows, ("get", "page"))
        with self.gateway(**BESIDE) as empty:
            ready(empty)
            part = self.seconds / 2
            found = in_turns(
                {
                    "full": lambda: load.rate(gateway.port, 8, part),
                    "empty": lambda: load.rate(empty.port, 8, part),
                }
            )
        share = found["full"] / found["empty"]
        yield Found("full", found["full"], f"empty {found['empty']:.0f}: {share:.0%}")
        stop(gateway)
        if self.real:
            found = inside.measure("sampling", self.backend, gateway.settings["WG_INTERFACE"], path)
            times = found["sample"] / found["dump"]
            reference = f"dump {found['dump'] * 1000:.0f} ms: {times:.1f} ×"
            yield Found("sampling", found["sample"] * 1000, reference)
        found = inside.measure("hold", path)
        yield Found("hold", found["longest"], f"median {found['median']:.1f} ms")
        # Sampling is O(peers) and has its interval for that: here it goes on all the time.
        gateway.settings |= {"SAMPLE_INTERVAL": "1"}
        ready(gateway)
        yield from self._reads(gateway, rows, ("sampled",))
        stop(gateway)
        gateway.settings |= {"SNAPSHOT_INTERVAL": "1", "DURABILITY": "interval"}
        ready(gateway)
        with load.trickle(gateway.port):  # or no snapshot would be due
            yield from self._reads(gateway, rows, ("get busy", "page busy"))
        stop(gateway)
        yield from self._pauses(gateway, rows)

    def _pauses(self, gateway: GatewayProcess, rows: list[Any]) -> Iterator[Found]:
        gateway.settings |= {"SAMPLE_INTERVAL": "3600"}
        only_rows = load.desired_lines(row._asdict() for row in rows)
        longest = []
        for interval in ("3600", "1"):
            gateway.settings |= {"SNAPSHOT_INTERVAL": interval}
            ready(gateway)
            connection = Connection(gateway.port)  # back to N peers: wireguard-go has a limit
            connection.exchange(
                request(
                    "PUT", COLLECTION + "?allow_mass_delete=true", only_rows, "application/x-ndjson"
                )
            )
            connection.close()
            times = load.latencies(gateway.port, max(5.0, self.seconds), load.a_create)
            longest.append(times[-1] * 1000)
            stop(gateway)
        yield Found("pause", longest[1], f"without snapshots {longest[0]:.1f} ms")

    def _reads(
        self, gateway: GatewayProcess, rows: list[Any], figures: tuple[str, ...]
    ) -> Iterator[Found]:
        def one() -> bytes:
            key = random.choice(rows).public_key.replace("/", "_").replace("+", "-")
            return request("GET", COLLECTION + key)

        pages = load.Pages(gateway.port)
        jobs = {"page": pages.next, "page busy": pages.next}
        for figure in figures:
            times = load.latencies(gateway.port, max(3.0, self.seconds), jobs.get(figure, one))
            median = (
                f"median {statistics.median(times) * 1000:.2f}, longest {times[-1] * 1000:.1f} ms"
            )
            yield Found(figure, load.percentile(times, 0.99) * 1000, median)

    def sync(self) -> Iterator[Found]:
        rows = [row._asdict() for row in self.some_peers(self.peers, "")]
        reference = "no interface"
        if self.real:
            with self.scratch() as scratch:
                reference = f"syncconf {scratch.syncconf(rows, self.directory):.2f} s"
        with self.gateway() as gateway:
            ready(gateway)
            connection = Connection(gateway.port)
            line = rows[0]["public_key"].replace("/", "_").replace("+", "-")
            data = request("PUT", COLLECTION, load.desired_lines(rows), "application/x-ndjson")
            others: list[float] = []
            done = threading.Event()

            def ask() -> None:
                mine = Connection(gateway.port)
                while not done.is_set():
                    started = time.perf_counter()
                    mine.exchange(request("GET", f"{COLLECTION}?limit=1"))
                    others.append(time.perf_counter() - started)
                    time.sleep(0.05)
                mine.close()

            asking = threading.Thread(target=ask)
            asking.start()
            started = time.perf_counter()
            answer = json.loads(connection.exchange(data))
            spent = time.perf_counter() - started
            done.set()
            asking.join()
            check(answer["created"], self.peers)
            if self.real:
                check(load.peer_count(gateway.settings["WG_INTERFACE"]), self.peers)
            yield Found("sync", spent, reference)
            yield Found("sync others", max(others) * 1000, f"of {len(others)}")
            data = request("PUT", COLLECTION, load.desired_lines(rows), "application/x-ndjson")
            started = time.perf_counter()
            answer = json.loads(connection.exchange(data))
            yield Found("unchanged", time.perf_counter() - started)
            check(answer["unchanged"], self.peers)
            connection.close()
            connection = Connection(gateway.port)
            connection.exchange(request("GET", COLLECTION + line))
            connection.close()
            stop(gateway)


SECTIONS: dict[str, Callable[[Bench], Iterator[Found]]] = {
    "start": Bench.start,
    "create": Bench.create,
    "batch": Bench.batch,
    "durability": Bench.durability,
    "recovery": Bench.recovery,
    "full": Bench.full,
    "sync": Bench.sync,
}


# --- the table ------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> None:
    sections = arguments.only.split(",") if arguments.only else list(SECTIONS)
    backends = [name for name in arguments.backend.split(",") if load.usable(name)]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="wggw-bench-") as name:
        print(load.machine(Path(name)))
        print(f"N = {arguments.peers} (40,000 at most on wireguard-go)")
        line("figure", "unit", "target", "value", "reference")
        echo = Echoes(Path(name) / "echo")
        try:
            for backend in backends:
                bench = Bench(Path(name) / backend, backend, arguments, echo)
                bench.directory.mkdir()
                for section in sections:
                    if time.monotonic() - began > arguments.minutes * 60:
                        print(
                            f"{backend}: {section} left out: {arguments.minutes} minutes are over"
                        )
                        continue
                    for found in SECTIONS[section](bench):
                        figure = FIGURES[found.figure]
                        text = f"{backend}: {figure.text}"
                        value = load.rounded(found.value)
                        line(text, figure.unit, figure.target, value, found.reference)
        finally:
            echo.close()


def line(figure: str, unit: str, target: str, value: str, reference: str) -> None:
    print(f"{figure:62} {unit:11} {target:36} {value:>8}  {reference}".rstrip(), flush=True)


def run_in_guest(arguments: argparse.Namespace) -> None:
    """The same in the guest, where the kernel has WireGuard."""
    sys.path.insert(0, str(ROOT / "tests" / "vm"))
    from vm import Guest, image, kernel

    words = ["--backend", "netlink", "--peers", str(arguments.peers)]
    words += ["--seconds", str(arguments.seconds), "--minutes", str(arguments.minutes)]
    if arguments.only:
        words += ["--only", arguments.only]
    with (
        tempfile.TemporaryDirectory(prefix="wggw-bench-") as name,
        Guest(Path(name), kernel(), image("bookworm")) as guest,
    ):
        # A copy, where Python can keep the bytecode that gateways start from: /tree is read-only.
        script = "mkdir /root/copy && cp -r /tree/wggw.py /tree/tests /root/copy\n"
        script += f"export {load.IN_NAMESPACE}=1\n"
        script += f"python3 /root/copy/tests/bench/bench.py {' '.join(words)}\n"
        result = guest.run(script, arguments.minutes * 60 + 300)
        print(result.output)
        if result.status != 0:
            raise SystemExit(f"the guest ended with status {result.status}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", type=int, default=60000, help="N (60000)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement (2)")
    parser.add_argument("--backend", default="memory,uapi", help="memory, uapi, netlink")
    parser.add_argument("--only", default="", help=f"some of {','.join(SECTIONS)}")
    parser.add_argument("--minutes", type=float, default=12, help="begin no section after (12)")
    parser.add_argument("--vm", action="store_true", help="in the guest of tests/vm")
    arguments = parser.parse_args()
    if arguments.vm:
        run_in_guest(arguments)
    else:
        load.enter_namespace()
        run(arguments)


if __name__ == "__main__":
    main()
