"""SIGKILL and a full disk under load: what was acknowledged is there, the rest is whole or absent.

The gateway is killed 7 times, 60 times with WGGW_LONG=1. WGGW_KILL_SEED repeats the moments of a
run.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from harness import LONG, Answer, Client, GatewayProcess, a_key, running, some, wait_for
from sandbox import SmallDisk, small_disk

PEERS = "/api/v1/configurations/"
ROUNDS = 60 if LONG else 7
CLIENTS = 4
KEYS = 25  # of each client; all of them together nearly fill the subnet
SETTINGS = {
    "WG_IPV4_SUBNET": "10.7.0.0/25",
    "WG_IPV6_SUBNET": "fd00:7::/120",
    "SNAPSHOT_INTERVAL": "0.1",  # so that rotations fall into the moments of the kills
}
LIFE = 400  # changes that are acknowledged before a kill, at most: two snapshots' time


class Seen(NamedTuple):
    """A peer as a backend sees it."""

    status: str
    addresses: tuple[str | None, str | None]


def seen(row: dict[str, Any], status: str) -> Seen:
    return Seen(status, (row.get("assigned_ip"), row.get("assigned_ipv6")))


class Backend(threading.Thread):
    """Changes its own keys as fast as it can, and keeps what it was told.

    `known` is the last acknowledged state of each key. `open` is the change that had no answer
    yet: its key, and whether a state is what the change makes of the known one.
    """

    def __init__(self, number: int, gateway: GatewayProcess, seed: str) -> None:
        super().__init__(daemon=True)
        self.keys = [a_key((number, index)) for index in range(KEYS)]
        self.known: dict[str, Seen] = {}
        self.open: tuple[str, Callable[[Seen | None], bool]] | None = None
        self.acknowledged = 0
        self.failure: str | None = None
        self._gateway = gateway
        self._random = random.Random(f"{seed} {number}")

    def again(self) -> Backend:
        """The same backend for the gateway's next life."""
        other = Backend(0, self._gateway, "")
        other.keys, other.known, other._random = self.keys, self.known, self._random
        return other

    def run(self) -> None:
        client = self._gateway.client()
        with contextlib.suppress(OSError, http.client.HTTPException):
            while self.failure is None:
                self._step(client)
        client.close()

    def _step(self, client: Client) -> None:
        key = self._random.choice(self.keys)
        known = self.known.get(key)
        if known is None:
            self._create(client, key)
        elif self._random.random() < 0.3:
            self.open = key, lambda now: now is None
            self._take(client.delete(key), key, None)
        else:
            wanted = known._replace(status="active" if known.status != "active" else "suspended")
            self.open = key, lambda now: now == wanted
            self._take(client.status(key, wanted.status), key, wanted)

    def _create(self, client: Client, key: str) -> None:
        self.open = key, lambda now: now is not None and now.status == "active"
        answer = client.create(key, protocol=self._random.choice(("ipv4", "ipv6", "dual")))
        created = answer.status == 200 and answer.json.get("status") == "created"
        self._take(answer, key, seen(answer.json, "active") if created else None)

    def _take(self, answer: Answer, key: str, state: Seen | None) -> None:
        if answer.status != 200:
            self.failure = repr(answer)
            return
        self.open = None
        self.acknowledged += 1
        if state is None:
            self.known.pop(key, None)
        else:
            self.known[key] = state

    def check(self, found: dict[str, Seen]) -> None:
        """What was acknowledged is there; the open change is whole or absent, and known now."""
        assert self.failure is None, self.failure
        for key in self.keys:
            now, known = found.get(key), self.known.get(key)
            if now != known:
                assert self.open is not None, f"{key}: {known} was acknowledged, {now} is there"
                assert self.open[0] == key, f"{key}: {known} was acknowledged, {now} is there"
                assert self.open[1](now), f"{key}: neither {known} nor the change: {now}"
                if now is None:
                    del self.known[key]
                else:
                    self.known[key] = now


def all_peers(client: Client) -> dict[str, Seen]:
    rows = client.send("GET", f"{PEERS}?limit=1000").json["configurations"]
    return {row["public_key"]: seen(row, row["status"]) for row in rows}


def check_in_line(client: Client, found: dict[str, Seen]) -> None:
    """Interface, pools and store agree, and no address is held twice."""
    synced = client.send("POST", "/api/v1/sync-ips").json
    active = sum(peer.status == "active" for peer in found.values())
    assert [synced[k] for k in ("added", "updated", "removed", "unchanged")] == [0, 0, 0, active]
    usage = client.send("GET", "/api/v1/ip-usage").json
    for index, family in enumerate(("ipv4", "ipv6")):
        held = [peer.addresses[index] for peer in found.values() if peer.addresses[index]]
        assert len(set(held)) == len(held)
        assert usage[family]["used"] == len(held)


def kill_round(
    gateway: GatewayProcess, backends: list[Backend], moments: random.Random
) -> list[Backend]:
    """One life under load, its end, and what the next life shows."""
    started = [backend.again() for backend in backends]
    for backend in started:
        backend.start()
    until = moments.randrange(LIFE)
    wait_for(lambda: sum(backend.acknowledged for backend in started) >= until, 60, "the load")
    time.sleep(moments.uniform(0, 0.02))
    gateway.kill()
    for backend in started:
        backend.join(30)
        assert not backend.is_alive()
    gateway.start()
    client = gateway.client()
    found = all_peers(client)
    for backend in started:
        backend.check(found)
    assert found.keys() == {key for backend in started for key in backend.known}
    check_in_line(client, found)
    client.close()
    return started


@pytest.mark.timeout(300 + 5 * ROUNDS)
@pytest.mark.parametrize("sealed", some([True, False], 1), ids=str)
def test_a_kill_under_load_loses_nothing_acknowledged(tmp_path: Path, sealed: bool) -> None:
    seed = os.environ.get("WGGW_KILL_SEED") or str(random.randrange(10**6))
    print(f"WGGW_KILL_SEED={seed}")
    moments = random.Random(seed)
    settings = {**SETTINGS, **({"SNAPSHOT_KEY": "a key for what lies on disk"} if sealed else {})}
    begun, acknowledged, open_changes, rotated = time.monotonic(), 0, 0, set()
    with running(tmp_path, **settings) as gateway:
        backends = [Backend(number, gateway, seed) for number in range(CLIENTS)]
        for _ in range(ROUNDS):
            backends = kill_round(gateway, backends, moments)
            acknowledged += sum(backend.acknowledged for backend in backends)
            open_changes += sum(backend.open is not None for backend in backends)
            rotated.add((tmp_path / "wireguard.db").stat().st_mtime_ns)
    print(f"{ROUNDS} rounds in {time.monotonic() - begun:.1f} s: {acknowledged} acknowledged, ")
    print(f"{open_changes} open at a kill, {len(rotated)} snapshots seen")
    # The load was a load: changes were under way at the kills, and snapshots were written.
    assert acknowledged > 5 * ROUNDS
    assert open_changes > ROUNDS
    assert len(rotated) > 1


# --- a disk that is full --------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "small") as made:
        yield made


@contextlib.contextmanager
def on_small_disk(disk: SmallDisk, directory: Path, **more: str) -> Iterator[GatewayProcess]:
    """Without snapshots between the changes: each makes room for as many as a slow machine does."""
    more |= {"DB_PATH": str(disk.inside / "wireguard.db"), "SNAPSHOT_INTERVAL": "3600"}
    gateway = GatewayProcess(directory, disk.prefix, **{**SETTINGS, **more})
    try:
        yield gateway.start()
    finally:
        gateway.close()


def readiness(client: Client) -> Answer:
    return client.raw("GET", "/readyz", b"", {})


def create_until_refused(client: Client, known: dict[str, Seen], label: str) -> Answer:
    for number in range(5000):
        answer = client.create(a_key((label, len(known))))
        if answer.status != 200:
            return answer
        known[a_key((label, len(known)))] = seen(answer.json, "active")
        if number % 2:  # addresses are few
            gone = next(reversed(known))
            if client.delete(gone).status == 200:
                del known[gone]
    raise AssertionError("the disk never became full")


def check_full(client: Client, known: dict[str, Seen], refused: Answer) -> None:
    """Full: changes are refused and change nothing, reads and readiness tell."""
    assert refused.status == 503, refused
    assert client.create(a_key("refused")).status == 503
    for key in list(known)[:3]:
        assert client.status(key, "suspended").status == 503
        assert client.delete(key).status == 503
    status = client.send("GET", "/api/v1/server/status")
    assert (status.status, status.json["status"]) == (200, "degraded")
    assert status.json["reasons"]
    assert readiness(client).status == 503
    assert b"degraded" in readiness(client).body
    assert all_peers(client) == known
    check_in_line(client, known)


@pytest.mark.real
@pytest.mark.parametrize("sealed", [False, True], ids=["plain", "sealed"])
@pytest.mark.long
def test_a_full_disk_refuses_changes_and_heals_by_itself(
    disk: SmallDisk, tmp_path: Path, sealed: bool
) -> None:
    more = {"SNAPSHOT_KEY": "a key for what lies on disk"} if sealed else {}
    known: dict[str, Seen] = {}
    with on_small_disk(disk, tmp_path, **more) as gateway:
        for life in range(2):
            client = gateway.client()
            for number in range(10):
                answer = client.create(a_key((life, number)), protocol="dual")
                known[a_key((life, number))] = seen(answer.json, "active")
            disk.fill()
            check_full(client, known, create_until_refused(client, known, f"full {life}"))
            disk.free()
            wait_for(lambda c=client: readiness(c).status == 200, what="health by itself")
            assert client.send("GET", "/api/v1/server/status").json["status"] == "healthy"
            assert all_peers(client) == known
            answer = client.create(a_key(("after", life)))
            assert answer.status == 200
            known[a_key(("after", life))] = seen(answer.json, "active")
            client.close()
            gateway.kill()
            gateway.start()
            client = gateway.client()
            assert all_peers(client) == known
            check_in_line(client, known)
            client.close()


@pytest.mark.real
def test_a_kill_while_the_disk_is_full_loses_nothing_acknowledged(
    disk: SmallDisk, tmp_path: Path
) -> None:
    known: dict[str, Seen] = {}
    with on_small_disk(disk, tmp_path) as gateway:
        client = gateway.client()
        for number in range(10):
            known[a_key(number)] = seen(client.create(a_key(number)).json, "active")
        disk.fill()
        check_full(client, known, create_until_refused(client, known, "full"))
        client.close()
        gateway.kill()
        disk.free()
        gateway.start()
        client = gateway.client()
        assert all_peers(client) == known
        check_in_line(client, known)
        client.close()
