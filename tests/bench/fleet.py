#!/usr/bin/env python3
"""A fleet on one machine: gateways, one store for their copies, one backend; prints one table.

    20 gateways (memory backend) ---- proxy, 20 ms ---- versitygw, a real S3
         ^                                              (tests/run --full builds it)
         +--- the backend: one create a second at each

Each gateway is a process of its own on loopback, with default settings but for addresses and
SNAPSHOT_URL. The proxy holds back what the gateways send for 20 ms and counts the requests.

    python3 tests/bench/fleet.py                      # everything: about 12 minutes
    python3 tests/bench/fleet.py --nodes 4 --seconds 20 --peers 500 --big 2000
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import load
from harness import ROOT, GatewayProcess, a_key, wait_for
from load import ready
from objects import S3, real_s3

DELAY = 0.02  # seconds, of what is sent to the store
METHODS = (b"GET /", b"PUT /", b"DELETE /")
# A peer of this one is active: it moves something before each sample.
ACTIVE = """\
import sys; sys.path[:0] = [sys.argv.pop(1)]
import time, random, wggw
chance = random.Random(1)
def read(self, known):
    now = int(time.time())
    self.seen = getattr(self, "seen", {})
    states = []
    for key, peer in list(self._peers.items()):
        rx, tx = self.seen.get(key, (0, 0))
        self.seen[key] = rx + chance.randrange(10**6), tx + chance.randrange(10**7)
        states.append(wggw.PeerState(peer, now - chance.randrange(120), *self.seen[key]))
    return wggw.Reading(None, len(states), [(hash(s), s) for s in states], set())
wggw.MemoryBackend.read = read
sys.exit(wggw.main())
"""


class Proxy:
    """In front of the store: delays, counts requests by second, and can be as if it were down."""

    def __init__(self, store: S3) -> None:
        self.store_port = int(store.endpoint.rpartition(":")[2])
        self.seconds: collections.Counter[int] = collections.Counter()  # monotonic
        self.requests: collections.Counter[str] = collections.Counter()
        self.down = False
        self._open: set[asyncio.StreamWriter] = set()
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        listening = asyncio.start_server(self._serve, "127.0.0.1", 0, limit=2**20)
        server = asyncio.run_coroutine_threadsafe(listening, self.loop).result(30)
        self.port = server.sockets[0].getsockname()[1]

    def stop(self) -> None:
        """New connections are closed at once, those that are there now, too."""
        self.down = True
        self.loop.call_soon_threadsafe(lambda: [writer.close() for writer in self._open])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.down:
            writer.close()
            return
        self._open.add(writer)
        try:
            back, there = await asyncio.open_connection("127.0.0.1", self.store_port)
        except OSError:
            writer.close()
            return
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        tasks = [
            asyncio.ensure_future(task)
            for task in (self._read(reader, queue), self._send(queue, there), _pipe(back, writer))
        ]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        self._open.discard(writer)
        writer.close()
        there.close()

    async def _read(
        self, reader: asyncio.StreamReader, queue: asyncio.Queue[tuple[float, bytes]]
    ) -> None:
        while data := await reader.read(2**18):
            if data.startswith(METHODS):  # a head comes in a piece of its own
                self.seconds[int(time.monotonic())] += 1
                self.requests[data.split(b" ", 1)[0].decode()] += 1
            queue.put_nowait((time.monotonic() + DELAY, data))

    @staticmethod
    async def _send(queue: asyncio.Queue[tuple[float, bytes]], there: asyncio.StreamWriter) -> None:
        while True:
            due, data = await queue.get()
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            there.write(data)
            await there.drain()


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(2**18):
        writer.write(data)
        await writer.drain()


class Node:
    """A gateway, and what it acknowledged to the backend."""

    def __init__(self, directory: Path, name: str, store: S3, port: int, **more: str) -> None:
        directory = directory / name
        directory.mkdir()
        settings = {
            **store.settings,
            "SNAPSHOT_URL": f"s3://{store.bucket}/{name}",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "SNAPSHOT_KEY": "a key for the bench of a fleet",
            "WG_IPV4_SUBNET": "10.0.0.0/8",
            "LOG_LEVEL": "warning",
            **more,
        }
        self.gateway = GatewayProcess(directory, **settings)
        self.name = name
        self.acknowledged: list[str] = []

    def start(self) -> float:
        return ready(self.gateway)

    def lose_everything(self) -> None:
        self.gateway.kill()
        shutil.rmtree(self.gateway.directory)
        self.gateway.directory.mkdir()

    def create(self) -> None:
        client = self.gateway.client()
        key = a_key((self.name, len(self.acknowledged)))
        if client.create(key).status == 200:
            self.acknowledged.append(key)
        client.close()

    def push(self, keys: Sequence[str]) -> Any:
        """The whole desired state."""
        body = b"".join(json.dumps({"public_key": key}).encode() + b"\n" for key in keys)
        connection = load.Connection(self.gateway.port)
        sent = load.request("PUT", load.COLLECTION, body, "application/x-ndjson")
        answer = json.loads(connection.exchange(sent))
        connection.close()
        self.acknowledged = list(keys)
        return answer

    def copy(self) -> Any:
        client = self.gateway.client()
        try:
            return client.send("GET", "/api/v1/server/status").json["remote_copy"]
        finally:
            client.close()

    def is_even(self) -> bool:
        copy = self.copy()
        return copy["lag_records"] == 0 and copy["number"] > 0

    def peers(self) -> set[str]:
        client, found, cursor = self.gateway.client(), set(), ""
        while True:
            page = client.send("GET", f"{load.COLLECTION}?limit=100{cursor}").json
            found |= {row["public_key"] for row in page["configurations"]}
            if page["next_cursor"] is None:
                client.close()
                return found
            cursor = f"&cursor={page['next_cursor']}"


def in_all(nodes: Sequence[Node], job: Callable[[Node], Any]) -> list[Any]:
    found: list[Any] = [None] * len(nodes)

    def work(index: int) -> None:
        found[index] = job(nodes[index])

    load.in_threads([lambda index=index: work(index) for index in range(len(nodes))])  # type: ignore[misc]
    return found


class Backend:
    """Creates a peer at each node once a second."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._nodes = nodes
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        beat = time.monotonic()
        while not self._ended.wait(max(0.0, beat - time.monotonic())):
            beat += 1
            for node in self._nodes:
                node.create()


def totals(nodes: Sequence[Node]) -> tuple[int, int, int]:
    """Requests, bytes sent, bytes received, so far."""
    copies = in_all(nodes, lambda node: node.copy())
    return tuple(  # type: ignore[return-value]
        sum(copy[name] for copy in copies) for name in ("requests", "bytes_sent", "bytes_received")
    )


def say(text: str, value: str) -> None:
    print(f"| {text} | {value} |", flush=True)


def wait_until_even(nodes: Sequence[Node], seconds: float) -> list[float]:
    """Seconds that each one took."""
    started = time.monotonic()

    def even(node: Node) -> float:
        wait_for(node.is_even, seconds, f"{node.name} to be even")
        return time.monotonic() - started

    return in_all(nodes, even)


def run_fleet(directory: Path, store: S3, arguments: argparse.Namespace) -> None:
    proxy, count, seconds = Proxy(store), arguments.nodes, arguments.seconds
    nodes = [Node(directory, f"node-{n}", store, proxy.port) for n in range(1, count + 1)]
    try:
        in_all(nodes, lambda node: node.start())
        in_all(
            nodes, lambda node: node.push([a_key((node.name, n)) for n in range(arguments.peers)])
        )
        wait_until_even(nodes, 300)
        before, started = totals(nodes), time.monotonic()
        with Backend(nodes):
            time.sleep(seconds)
        spent, after = time.monotonic() - started, totals(nodes)
        say(f"requests a second of {count} nodes", f"{(after[0] - before[0]) / spent:.2f}")
        say("bytes a second of a node", f"{(after[1] - before[1]) / spent / count:.0f}")
        _outage(proxy, nodes, seconds)
        _kill(proxy, nodes)
        _push(nodes)
        _without(directory, store, nodes)
        say("requests in all", ", ".join(f"{n} {m}" for m, n in sorted(proxy.requests.items())))
    finally:
        for node in nodes:
            node.gateway.close()


def _outage(proxy: Proxy, nodes: Sequence[Node], seconds: float) -> None:
    """The store is down while changes go on."""
    with Backend(nodes):
        proxy.stop()
        time.sleep(seconds)
        proxy.down, back = False, int(time.monotonic())
        proxy.seconds.clear()
    times = wait_until_even(nodes, 300)
    window = [proxy.seconds[back + n] for n in range(int(max(times)) + 1)]
    average = sum(window) / len(window)
    say("until all had caught up after the outage", f"{max(times):.1f} s (first {min(times):.1f})")
    say("requests then: longest second, average", f"{max(window)}, {average:.2f}")


def _kill(proxy: Proxy, nodes: Sequence[Node]) -> None:
    """Half of them lose everything at once while changes go on, and boot at once."""
    half = nodes[: len(nodes) // 2]
    with Backend(nodes):
        time.sleep(25)
    uncopied = in_all(half, lambda node: node.copy()["lag_records"])
    for node in half:
        node.lose_everything()
    proxy.requests.clear()
    times = in_all(half, lambda node: node.start())
    say(
        f"{len(half)} nodes at once, from start to ready", f"{min(times):.2f} to {max(times):.2f} s"
    )
    say("requests of a boot", f"{sum(proxy.requests.values()) / len(half):.0f}")
    lost = [len(set(node.acknowledged) - node.peers()) for node in half]
    known = sum(len(node.acknowledged) for node in half)
    say("acknowledged changes that were lost", f"{sum(lost)} of {known}")
    older = sum(max(0, gone - lag) for gone, lag in zip(lost, uncopied, strict=True))
    say("of them were copied before", str(older))


def _push(nodes: Sequence[Node]) -> None:
    """The backend pushes to all at once what it knows, and so brings back what was lost."""
    started = time.monotonic()
    created = in_all(nodes, lambda node: node.push(node.acknowledged)["created"])
    say("all pushed at once, until all had answered", f"{time.monotonic() - started:.2f} s")
    missing = sum(len(set(node.acknowledged) - node.peers()) for node in nodes)
    say("brought back by that; still missing", f"{sum(created)}; {missing}")
    say("until their copies had it", f"{max(wait_until_even(nodes, 300)):.1f} s")


def _without(directory: Path, store: S3, nodes: Sequence[Node]) -> None:
    """For comparison: as many that have no copy, on their second start."""
    others = [Node(directory, f"without-{n}", store, 0) for n in range(len(nodes) // 2)]
    for node in others:
        del node.gateway.settings["SNAPSHOT_URL"]
    try:
        in_all(others, lambda node: node.start())
        for node in others:
            node.gateway.kill()
        times = in_all(others, lambda node: node.start())
        say("as many without a copy, empty", f"{min(times):.2f} to {max(times):.2f} s")
    finally:
        for node in others:
            node.gateway.close()


def run_big(directory: Path, store: S3, arguments: argparse.Namespace) -> None:
    """One node, all of whose peers are active, with a change a second."""
    proxy = Proxy(store)
    node = Node(directory, "big", store, proxy.port)
    node.gateway.program = [sys.executable, "-P", "-c", ACTIVE, str(ROOT)]
    try:
        node.start()
        node.push([a_key(("big", n)) for n in range(arguments.big)])
        wait_until_even([node], 300)
        before, started = totals([node]), time.monotonic()
        with Backend([node]):
            time.sleep(arguments.big_seconds)
        spent, after = time.monotonic() - started, totals([node])
        say(
            f"{arguments.big} active peers: bytes a second, requests a second",
            f"{(after[1] - before[1]) / spent:.0f}, {(after[0] - before[0]) / spent:.2f}",
        )
        wait_until_even([node], 300)
        times = []
        for _ in range(3):
            node.lose_everything()
            times.append(node.start())
            wait_until_even([node], 300)
        peers = len(node.peers())
        say(f"boot with {peers} peers", ", ".join(f"{seconds:.2f}" for seconds in times) + " s")
        say("processor time of that", f"{load.processor(node.gateway.process.pid):.2f} s")
        node.gateway.stop()
        say("restart with its files", f"{node.start():.2f} s")
    finally:
        node.gateway.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nodes", type=int, default=20, help="0: none")
    parser.add_argument("--peers", type=int, default=1000, help="of each at the beginning")
    parser.add_argument("--seconds", type=float, default=60, help="of changes, and of the outage")
    parser.add_argument("--big", type=int, default=60_000, help="peers of the large node; 0: none")
    parser.add_argument("--big-seconds", type=float, default=330)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, real_s3(Path(name)) as store:
        if arguments.nodes:
            run_fleet(Path(name), store, arguments)
        if arguments.big:
            run_big(Path(name), store, arguments)


if __name__ == "__main__":
    main()
