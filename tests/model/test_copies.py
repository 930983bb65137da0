"""A model of gateways and the store of their remote copy: random schedules of both.

Two or three gateways with wggw's own Copier, on a store that delays uploads, loses answers and
cuts gateways off; gateways are killed, and come back with their disk or with an empty one. Each
call to the store is a point where any other gateway may go on, or an upload from before arrives.

WGGW_SCHEDULES says how many schedules (default 60, with WGGW_LONG=1 600), WGGW_SEED with which
one to begin.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from harness import LONG

import wggw
from wggw import Copier, CopyError, Epochs, Written, load_config

SCHEDULES = int(os.environ.get("WGGW_SCHEDULES") or (600 if LONG else 60))
SEED = int(os.environ.get("WGGW_SEED", "1"))
CONFIG = dataclasses.replace(
    load_config({"GATEWAY_API_KEY": "0123456789abcdef", "SNAPSHOT_URL": "https://store.example"}),
    snapshot_copy_interval=0.0,
    snapshot_interval=0.0,
)


class Killed(BaseException):
    """The gateway's process ends here."""


class Refused(BaseException):
    """So it does here, because the settings do not fit the state that it would serve."""


class World:
    """The store, and who does the next step.

    `kind`: "fences" checks and has conditions, "looks" has conditions for claims alone (a small
    https server that has them), "plain" has none.
    """

    def __init__(self, chance: random.Random, kind: str) -> None:
        self.chance, self.kind = chance, kind
        self.objects: dict[str, bytes] = {}
        self.late: list[Callable[[], object]] = []  # uploads on their way
        self.gateways: list[Gateway] = []
        self.faults = True
        self.keys = 0
        self.added: set[int] = set()  # changes that somebody was told are copied
        self.deleted: set[int] = set()
        self.ever_deleted: set[int] = set()  # by anybody, copied or not
        self.claimed_twice = False
        self.history: list[str] = []

    def put(self, name: str, content: bytes, create: bool) -> bool:
        there = self.objects.get(name)
        if create and self.kind != "plain" and there is not None:
            return False
        if name.startswith("claim") and there not in (None, content):
            self.claimed_twice = True
        self.objects[name] = content
        return True

    def check_boot(self, state: set[int], added: set[int], deleted: set[int]) -> None:
        """What was copied before a boot began must be in what it found."""
        lost = added - self.ever_deleted - state
        risen = deleted & state
        if not self.claimed_twice:
            assert not lost, f"copied and lost: {lost}"
            assert not risen, f"deleted and back: {risen}"


class Remote:
    """The store as one gateway sees it."""

    requests = bytes_sent = bytes_received = 0

    def __init__(self, world: World, gateway: Gateway) -> None:
        self.world, self.gateway = world, gateway
        self.checks = world.kind == "fences"

    def _turn(self) -> None:
        self.gateway.pause()
        world = self.world
        while world.late and world.chance.random() < 0.2:
            world.late.pop(world.chance.randrange(len(world.late)))()
        if self.gateway.cut_off and world.faults:
            raise CopyError("cut off")

    def get(self, name: str, limit: int) -> bytes | None:
        self._turn()
        return self.world.objects.get(name)

    def get_all(self, names: Sequence[str], limit: int) -> list[bytes | None]:
        """One object after the other, in any order, with others' steps in between."""
        self._turn()
        found: dict[str, bytes | None] = {}
        for name in self.world.chance.sample(names, len(names)):
            if self.world.chance.random() < 0.05:
                self._turn()
            found[name] = self.world.objects.get(name)
        return [found[name] for name in names]

    def put(self, name: str, content: bytes, create: bool = False) -> bool:
        self._turn()
        world = self.world
        fate = world.chance.random() if world.faults else 1.0
        if fate < 0.08:  # it arrives some time later, if at all
            if fate < 0.06:
                world.late.append(lambda: world.put(name, content, create))
            raise CopyError("no answer")
        done = world.put(name, content, create)
        if fate < 0.16:
            raise CopyError("the answer is lost")
        self._turn()
        return done

    def delete(self, name: str) -> None:
        self._turn()
        self.world.objects.pop(name, None)


class Disk:
    """What a gateway has on its disk: every change that was acknowledged."""

    def __init__(self) -> None:
        self.lineage = ""
        self.number = 0
        self.peers: set[int] = set()
        self.writers: dict[str, int] = {}


class Rows:
    """In the place of wggw.Store."""

    def __init__(self, number: int, peers: set[int], lineage: str) -> None:
        self.number, self.peers, self.lineage = number, peers, lineage

    def take(self, other: Rows) -> None:
        self.number, self.peers = other.number, other.peers


class ModelFiles:
    """In the place of wggw.Files: snapshots are always fresh, records are {"add"|"del": peer}."""

    vault, path, snapshot_time = None, "model", 0.0

    def __init__(self, disk: Disk, rows: Rows) -> None:
        self.disk, self.rows = disk, rows
        self.superseded = False

    def write_copy(self, state: Rows, path: str) -> None:
        assert path == "model.superseded"
        self.superseded = True

    def read_snapshot(self) -> tuple[float, int, bytes]:
        image = json.dumps([self.rows.number, sorted(self.rows.peers)]).encode()
        return self.snapshot_time, self.rows.number, image

    def read_writers(self) -> dict[str, int]:
        return dict(self.disk.writers)

    def keep_writers(self, writers: Mapping[str, int]) -> None:
        self.disk.writers = dict(writers)


def open_state(data: bytes, segments: Any, name: str) -> Rows:
    """In the place of wggw.open_state()."""
    number, given = json.loads(data)
    peers = set(given)
    for segment in segments:
        last, (journal, _) = segment.number, wggw.decode_segment(segment.payload)
        file = wggw.parse_journal(journal, "a segment")
        assert file.last == last and file.after <= number
        for landing in file.landings:
            for at, record in enumerate(landing.records, landing.first):
                if at > number:
                    apply(peers, record)
        number = max(number, last)
    return Rows(number, peers, "")


@pytest.fixture(autouse=True)
def _of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wggw, "open_state", open_state)
    monkeypatch.setattr(wggw, "totals_since", lambda files, since: (files.snapshot_time, 0, []))
    for name in ("COPY_FIRST_SWEEP", "COPY_SWEEP_SECONDS"):  # old epochs go at once
        monkeypatch.setattr(wggw, name, 0.0)


def apply(peers: set[int], record: dict[str, int]) -> None:
    peers |= {record["add"]} if "add" in record else set()
    peers -= {record["del"]} if "del" in record else set()


class Gateway:
    """One process after the other on one machine, each a thread that runs when it is told to."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.disk = Disk()
        self.cut_off = False
        self.killed = False
        self.copier: Copier | None = None
        self.rows = Rows(0, set(), "")
        self.copied = 0
        self.error: BaseException | None = None
        self.refusal: CopyError | None = None  # of the last boot
        self.done = True
        self.go, self.stopped = threading.Semaphore(0), threading.Semaphore(0)

    def pause(self) -> None:
        """Let the schedule decide who goes on."""
        self.stopped.release()
        self.go.acquire()
        if self.killed:
            raise Killed

    def start(self) -> None:
        self.killed = self.done = False
        self.copier = None
        threading.Thread(target=self._thread, daemon=True).start()
        self.stopped.acquire()

    def step(self) -> None:
        self.go.release()
        self.stopped.acquire()

    def kill(self) -> None:
        if not self.done:
            self.killed = True
            while not self.done:
                self.step()
        self.copier = None

    def _thread(self) -> None:
        try:
            self.pause()
            self._live()
        except (Killed, Refused):
            pass
        except wggw.ConfigError as error:  # two first starts in the same moment, and no conditions
            self.error = None if self.world.claimed_twice else error
        except BaseException as error:
            self.error = error
        self.done = True
        self.stopped.release()

    def _boot(self) -> Copier:
        world, disk = self.world, self.disk
        self.rows = Rows(disk.number, set(disk.peers), disk.lineage)
        files = ModelFiles(disk, self.rows)
        writer = f"{world.chance.getrandbits(64):016x}"
        clock = world.chance.choice([0.0, 1e9, 1e9 + 3600])  # clocks differ, and nobody cares
        epochs = Epochs(Remote(world, self), None, self.name, lambda: clock)
        epochs.writer = writer
        copier = Copier(
            epochs,
            self.rows,  # type: ignore[arg-type]
            files,  # type: ignore[arg-type]
            lambda: None,
            CONFIG,
        )
        copier.on_taken = lambda text: None
        added, deleted = set(world.added), set(world.deleted)
        checked: list[tuple[int, set[int]]] = []
        refuses = world.faults and world.chance.random() < 0.2

        def check(state: Any) -> None:
            self.pause()
            checked.append((state.number, set(state.peers)))
            if refuses:
                raise Refused

        while True:
            try:
                copier.boot(check)
                break
            except Refused:
                ours = [name for name in world.objects if writer in name]
                claims = [
                    wggw.unpack(n, o, None)[0] for n, o in world.objects.items() if "claim" in n
                ]
                held = [claim for claim in claims if claim["claim"]["writer"] == writer]
                # A claim of an attempt before this one may be there, or arrive late: it had passed.
                assert len(checked) > 1 or not (ours or held), "a refused start has left something"
                raise
            except CopyError as error:
                self.refusal = error
                self.pause()
        assert checked[-1][1] == self.rows.peers, "what is served is not what was checked last"
        world.check_boot(self.rows.peers, added, deleted)
        self.pause()
        disk.lineage, disk.number, disk.peers = (
            self.rows.lineage,
            self.rows.number,
            set(self.rows.peers),
        )
        self.pause()
        self._on_written = copier.begin()
        return copier

    def _live(self) -> None:
        self.copier = self._boot()
        self.copied = self.rows.number
        self.log: list[tuple[int, str, int]] = []  # number, what, peer: not copied yet
        while True:
            self.pause()
            if self.world.chance.random() < 0.5:
                self.change()
            else:
                self.tick()

    def change(self) -> None:
        world, number = self.world, self.rows.number + 1
        if self.rows.peers and world.chance.random() < 0.3:
            peer, what = world.chance.choice(sorted(self.rows.peers)), "del"
            world.ever_deleted.add(peer)
        else:
            world.keys += 1
            peer, what = world.keys, "add"
        record = {what: peer}
        self._on_written([Written(number, json.dumps(record).encode())])
        self.log.append((number, what, peer))
        for peers in (self.rows.peers, self.disk.peers):
            apply(peers, record)
        self.rows.number = self.disk.number = number

    def tick(self) -> None:
        copier = self.copier
        assert copier is not None
        copier._next_try = 0.0
        copier.tick()
        if copier._taken is None:
            told = [row for row in self.log if row[0] <= copier._number]
            self.log = self.log[len(told) :]
            self.world.added |= {peer for _, what, peer in told if what == "add"}
            self.world.deleted |= {peer for _, what, peer in told if what == "del"}


def run_schedule(seed: int, kind: str) -> World:
    chance = random.Random(seed)
    world = World(chance, kind)
    world.gateways = [Gateway(world, name) for name in "abc"[: chance.choice([2, 2, 3])]]
    try:
        for _ in range(chance.randrange(50, 300)):
            gateway = chance.choice(world.gateways)
            fate = chance.random()
            if gateway.done:
                if fate < 0.1:
                    if chance.random() < 0.5:  # memory was its disk
                        gateway.disk = Disk()
                    gateway.start()
            elif fate < 0.02:
                gateway.kill()
            elif fate < 0.05:
                gateway.cut_off = not gateway.cut_off
            else:
                gateway.step()
            check(world)
        settle(world)
    finally:
        for gateway in world.gateways:
            gateway.kill()
    return world


def check(world: World) -> None:
    for gateway in world.gateways:
        if gateway.error is not None:
            raise gateway.error


def settle(world: World) -> None:
    """Everything works again: all but one know that they were replaced, and nothing is missing."""
    world.faults = False
    while world.late:
        world.late.pop(0)()
    for _ in range(3):
        for gateway in world.gateways:
            for _ in range(150):
                if gateway.done:
                    break
                gateway.step()
                check(world)
    holders = [g for g in world.gateways if g.copier and g.copier._taken is None and not g.done]
    assert len(holders) <= 1, f"{[g.name for g in holders]} all believe to be the copy"
    last = Gateway(world, "last")
    world.gateways.append(last)
    last.start()
    for _ in range(2000):
        if last.copier is not None or last.done:
            break
        last.step()
        check(world)
    assert last.copier is not None or last.done, last.refusal


@pytest.mark.parametrize("kind", ["fences", "looks", "plain"])
def test_no_schedule_splits_the_copy_or_loses_from_it(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wggw, "COPY_SEGMENTS", 3)
    logging.getLogger("wggw").setLevel(logging.CRITICAL)
    twice = copied = 0
    try:
        for seed in range(SEED, SEED + SCHEDULES // 3):
            try:
                world = run_schedule(seed, kind)
            except BaseException:
                print(f"WGGW_SEED={seed} kind={kind}")
                raise
            twice += world.claimed_twice
            copied += len(world.added)
    finally:
        logging.getLogger("wggw").setLevel(logging.NOTSET)
    print(f"{kind}: seeds from {SEED}, {copied} changes copied, {twice} claimed twice")
    assert copied > SCHEDULES  # or nothing was tried
    assert kind == "plain" or not twice
