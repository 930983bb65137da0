"""Rows on what is kept on disk: the price of each DURABILITY, the pause of a snapshot, recovery.

Peers are put into files by the store itself, so that 60,000 of them need no 60,000 requests.
"""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bench import Connection, Row, create_request, rate, start_time
from harness import ROOT, GatewayProcess

sys.path.insert(0, str(ROOT))

import wggw

RECOVER = """
import sys, time
sys.path.insert(0, sys.argv[1])
import wggw
store = wggw.Store(sys.argv[2], "commit", wggw.Disk())
started = time.perf_counter()
store.recover()
print(time.perf_counter() - started, sum(store.counts.values()))
"""


def a_peer(number: int) -> wggw.Peer:
    fields = {
        "id": number,
        "public_key": base64.b64encode(os.urandom(32)).decode(),
        "interface": "wg0",
        "status": "active",
        "assigned_ip": f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}",
        "assigned_ipv6": f"fd42:4242:1::{number:x}",
        "tunnel_traffic": "ipv4,ipv6",
        "dns": "d1",
        "port": 51820,
        "persistent_keepalive": 25,
        "created_at": 1765200000,
    }
    return wggw.Peer(**{**dict.fromkeys(wggw.Peer._fields), **fields})  # type: ignore[arg-type]


def write_peers(path: Path, peers: int, snapshot: bool) -> None:
    """Files with so many peers: a snapshot, or an empty one and a journal record for each."""
    store = wggw.Store(str(path), "commit", wggw.Disk())
    store.recover()
    number = 0
    for row in range(10, peers + 10):  # the gateway's own address and the network's are not given
        step = [wggw.Step(None, a_peer(row))]
        store.apply(step)
        number = store.commit(step)
    store.wait(number)
    if snapshot:
        store.write_copy(str(path))
        Path(f"{path}.journal").unlink()
    store.close()


def price_rows(directory: Path, seconds: float) -> Iterator[Row]:
    """Creates per second for each DURABILITY, with its share of what `none` does."""
    figures: dict[tuple[str, int], float] = {}
    for durability in ("none", "interval", "commit"):
        place = directory / f"price-{durability}"
        place.mkdir()
        gateway = GatewayProcess(
            place, WG_IPV4_SUBNET="10.0.0.0/8", DURABILITY=durability, LOG_LEVEL="warning"
        )
        try:
            gateway.start()
            for connections in (1, 8):
                found, latency = rate(gateway.port, connections, seconds)
                figures[durability, connections] = found
                share = found / figures["none", connections]
                target = "≥ 60 % of none" if (durability, connections) == ("commit", 8) else ""
                yield Row(
                    f"DURABILITY={durability}: creates/s, {connections} connections",
                    f"{found:.0f} ({latency:.2f} ms, {share:.0%} of none)",
                    target,
                )
        finally:
            gateway.close()


def longest(port: int, seconds: float) -> float:
    """The longest of a connection's requests, ms."""
    connection = Connection(port)
    worst, end = 0.0, time.perf_counter() + seconds
    while (started := time.perf_counter()) < end:
        connection.exchange(create_request())
        worst = max(worst, time.perf_counter() - started)
    connection.close()
    return worst * 1000


def pause_rows(directory: Path, peers: int, seconds: float) -> Iterator[Row]:
    """The longest request with a snapshot each second, and without one beside it."""
    for name, interval, target in (("no snapshot", "86400", ""), ("snapshots", "1", "< 20 ms")):
        place = directory / f"pause-{interval}"
        place.mkdir()
        write_peers(place / "wireguard.db", peers, snapshot=True)
        gateway = GatewayProcess(
            place,
            WG_IPV4_SUBNET="10.0.0.0/8",
            SNAPSHOT_INTERVAL=interval,
            DURABILITY="interval",  # the disk's own pauses are not what is asked here
            LOG_LEVEL="warning",
        )
        try:
            gateway.start(120)
            found = longest(gateway.port, seconds)
            yield Row(f"longest request at {peers} peers, {name}", f"{found:.1f} ms", target)
        finally:
            gateway.close()
    yield from image_rows(directory / "pause-1" / "wireguard.db")


def image_rows(path: Path) -> Iterator[Row]:
    """How long the lock is held: the image alone, the longest of 20."""
    store = wggw.Store(str(path), "commit", wggw.Disk())
    store.load()
    times = []
    for _ in range(20):
        started = time.perf_counter()
        store.image()
        times.append((time.perf_counter() - started) * 1000)
    store.close()
    times.sort()
    yield Row(
        "hold of the lock for a snapshot", f"{times[10]:.1f} ms, longest {times[-1]:.1f}", "< 20 ms"
    )


def recovery_rows(directory: Path, peers: int) -> Iterator[Row]:
    """Recovery in a process of its own, and from its start to readiness."""
    for name in ("snapshot", "journal"):
        place = directory / f"recovery-{name}"
        place.mkdir()
        write_peers(place / "wireguard.db", peers, snapshot=name == "snapshot")
        gateway = GatewayProcess(place, WG_IPV4_SUBNET="10.0.0.0/8", LOG_LEVEL="warning")
        command = [sys.executable, "-c", RECOVER, str(ROOT), str(place / "wireguard.db")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds, count = done.stdout.split()
        if int(count) != peers:
            raise SystemExit(f"{count} peers came back")
        yield Row(f"recovery of {peers} peers from a {name}", f"{float(seconds):.2f} s", "< 2 s")
        try:
            ready = start_time(gateway)
            yield Row(f"start to ready, {peers} peers from a {name}", f"{ready:.2f} s")
        finally:
            gateway.close()


def measure_durability(directory: Path, peers: int, seconds: float) -> Iterator[Row]:
    yield from price_rows(directory, seconds)
    yield from pause_rows(directory, peers, max(5.0, seconds))
    yield from recovery_rows(directory, peers)
