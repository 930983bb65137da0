"""What is measured within wggw.py, each in a process of its own: prints JSON.

python3 tests/bench/inside.py WHAT ARGUMENT...
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import wggw


def measure(*arguments: object) -> Any:
    """Run this file and return what it printed."""
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def a_peer(number: int, public_key: str, interface: str) -> wggw.Peer:
    """Of numbers from 10 on: the gateway's own address and the network's are not given."""
    fields = {
        "id": number,
        "public_key": public_key,
        "interface": interface,
        "status": "active",
        "assigned_ip": f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}",
        "assigned_ipv6": f"fd42:4242:1::{number:x}",
        "tunnel_traffic": "ipv4,ipv6",
        "persistent_keepalive": 25,
        "created_at": 1765200000,
    }
    defaults = {**dict.fromkeys(wggw.Peer._fields), **wggw.Peer._field_defaults}
    return wggw.Peer(**{**defaults, **fields})  # type: ignore[arg-type]


def write_peers(path: Path, peers: Sequence[wggw.Peer], snapshot: bool) -> None:
    """Files with these peers: a snapshot, or an empty one and a journal record for each."""
    files = wggw.Files(str(path), "none" if snapshot else "commit", wggw.Disk())
    store = files.load()
    files.begin(store)
    for number, peer in enumerate(peers, 1):
        record = wggw.Record([peer])
        store.apply(record)
        if not snapshot:
            files.journal.write(number, [wggw.encode_record(record)], False)
    if snapshot:
        files.renew(0, files.image(store, 0))
    else:
        files.journal.flush()
    files.journal.close()


def recovery(path: str) -> dict[str, Any]:
    """Seconds and processor seconds of reading snapshot and journal."""
    files = wggw.Files(path, "commit", wggw.Disk())
    started, used = time.perf_counter(), time.process_time()
    with wggw.collector_off():
        store = files.load()
        files.begin(store)
    return {
        "seconds": time.perf_counter() - started,
        "processor": time.process_time() - used,
        "peers": store.counts.total(),
    }


def hold(path: str) -> dict[str, Any]:
    """How long a snapshot holds the owner of the rows, ms: the median and the longest of 20."""
    store = wggw.Files(path, "commit", wggw.Disk()).load()
    times = []
    for _ in range(20):
        started = time.perf_counter()
        store.image(store.number, False, True)
        times.append((time.perf_counter() - started) * 1000)
    times.sort()
    return {"median": times[10], "longest": times[-1]}


def a_link(name: str) -> wggw.Link:
    return wggw.Link(name, ("198.18.0.1/32",), 1420, 0, wggw.make_private_key())


def a_backend(kind: str, link: wggw.Link) -> wggw.Backend:
    return wggw.NetlinkBackend(link) if kind == "netlink" else wggw.UapiBackend(link, None)


def own_cost(kind: str, name: str, count: str) -> dict[str, Any]:
    """The interface's own seconds a peer: set one by one, and so many at once; encoded before."""
    link = a_link(name)
    backend: Any = a_backend(kind, link)
    backend.setup()
    changes = []
    for number in range(10, 2 * int(count) + 10):
        key = wggw.encode_key(wggw.make_private_key())
        peer = wggw.wire_peer(a_peer(number, key, name))
        changes.append(wggw.Change(peer.public_key, peer))

    def encode(chosen: list[wggw.Change]) -> list[bytes]:
        if kind == "netlink":
            return list(wggw.encode_wg_batches(name, chosen))
        return [wggw.encode_uapi_changes(chosen)]

    singles = [message for change in changes[: int(count)] for message in encode([change])]
    together = encode(changes[int(count) :])
    started = time.perf_counter()
    for message in singles:
        backend._set(message)
    between = time.perf_counter()
    for message in together:
        backend._set(message)
    ended = time.perf_counter()
    backend.close()
    return {"single": (between - started) / int(count), "batch": (ended - between) / int(count)}


def sampling(kind: str, name: str, path: str) -> dict[str, Any]:
    """Processor seconds of one sample, and of `wg show NAME dump`, of a running interface."""
    files = wggw.Files(path, "none", wggw.Disk())
    store = files.load()
    link = a_link(name)
    backend: Any = a_backend(kind, link)
    if kind == "netlink":
        backend._family = wggw.genl_family(backend._control, wggw.WG_GENL_NAME)
    environment = {
        "GATEWAY_API_KEY": "k" * 32,
        "WG_INTERFACE": name,
        "WG_IPV4_SUBNET": "10.0.0.0/8",
    }
    config = wggw.load_config(environment)
    lock = threading.RLock()

    def run(function: Callable[[], Any]) -> Any:
        with lock:
            return function()

    gateway = wggw.Gateway(config, store, files, time.time, run)
    settings = wggw.interface_settings(config)[0]
    tunnel = wggw.Tunnel(settings, link, backend, None)
    device = backend.read(()).device
    tunnel.link = link._replace(private_key=device.private_key, listen_port=device.listen_port)
    gateway.tunnels[name] = tunnel
    gateway.lander.start()
    samples, dumps = [], []
    for _ in range(5):
        used = time.process_time()
        gateway.projection.sample()
        samples.append(time.process_time() - used)
        used = _children()
        subprocess.run(["wg", "show", name, "dump"], stdout=subprocess.DEVNULL, check=True)
        dumps.append(_children() - used)
    return {"sample": sorted(samples)[2], "dump": sorted(dumps)[2]}


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    measures: dict[str, Callable[..., dict[str, Any]]] = {
        "recovery": recovery,
        "hold": hold,
        "own_cost": own_cost,
        "sampling": sampling,
    }
    print(json.dumps(measures[sys.argv[1]](*sys.argv[2:])))
