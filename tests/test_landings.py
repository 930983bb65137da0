"""Landings that the real loop ends: other tests end them in the lander's own thread."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
from harness import a_key

import wggw

READING = 0.03  # seconds
T = TypeVar("T")


class Userspace(wggw.MemoryBackend):
    """An interface in memory that takes its time for a reading, like a userspace WireGuard."""

    kind = "uapi"

    def __init__(self) -> None:
        super().__init__()
        self.is_read = False
        self.readings = self.messages = self.messages_while_read = 0

    def read(self, known: Container[int]) -> wggw.Reading:
        self.is_read = True
        self.readings += 1
        time.sleep(READING)
        self.is_read = False
        return super().read(known)

    def apply(self, changes: Sequence[wggw.Change]) -> None:
        self.messages += 1
        self.messages_while_read += self.is_read
        super().apply(changes)


class World:
    """A gateway on one such interface, with a loop; `late` delays what the lander hands back."""

    def __init__(self, directory: Path) -> None:
        settings = {
            "GATEWAY_API_KEY": "k" * 64,
            "WG_BACKEND": "memory",
            "DB_PATH": str(directory / "wireguard.db"),
            "WG_IPV4_SUBNET": "10.0.0.0/16",
        }
        config = wggw.load_config(settings, os.devnull)
        self.late = 0.0
        self.loop, self.store, self.backend = wggw.Loop(), wggw.Store(), Userspace()
        self.files = wggw.Files(config.db_path, config.durability, wggw.Disk())
        self.store.take(self.files.load())
        self.files.begin(self.store)
        self.gateway = wggw.Gateway(
            config, self.store, self.files, time.time, self.loop.run, begin=self.begin
        )
        [row] = wggw.interface_settings(config)
        self.loop.start()
        self.gateway.start([(row, wggw.make_link(row, bytes(32)), self.backend)])
        self.gateway.ledger.gathers = True
        self.loop.after_round = self.gateway.ledger.dispatch

    def begin(self, steps: Iterator[None]) -> None:
        threading.Timer(self.late, self.loop.begin, (steps,)).start()

    def create(self, public_key: str) -> Any:
        done = threading.Event()
        outcome: list[Any] = []

        def reply(result: Any) -> None:
            outcome.append(result)
            done.set()

        fields = {"public_key": public_key}
        self.loop.post(lambda: self.gateway.change("create", fields, reply))
        assert done.wait(30)
        return outcome[0]

    def begin_create(self, public_key: str) -> threading.Thread:
        """A create that is under way."""
        thread = threading.Thread(target=self.create, args=(public_key,))
        thread.start()
        while not self.gateway.ledger.in_flight:
            time.sleep(0.001)
        return thread


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    if not world.gateway.ledger.stopping:  # otherwise its last sample would never land
        world.gateway.close()
    world.loop.stop()


def in_threads(*work: Callable[[], None]) -> None:
    threads = [threading.Thread(target=one) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_no_landing_reaches_a_userspace_interface_while_it_is_read(world: World) -> None:
    """A reading begins when the owner ends a landing: the next one must look after that."""
    until = time.monotonic() + 1.5

    def client(number: int) -> None:
        count = 0
        while time.monotonic() < until:
            count += 1
            assert isinstance(world.create(a_key((number, count))), wggw.Outcome)

    def sampler() -> None:
        while time.monotonic() < until:
            world.gateway.projection.sample()
            time.sleep(READING)

    in_threads(sampler, *(lambda n=n: client(n) for n in range(4)))  # type: ignore[misc]
    assert world.backend.readings > 5 and world.backend.messages > 20
    assert world.backend.messages_while_read == 0


def test_a_stop_waits_until_the_last_landing_is_in_the_rows(world: World) -> None:
    world.late = 0.2
    thread = world.begin_create(a_key(1))
    assert world.gateway.lander.stop(10)
    assert world.loop.run(lambda: world.store.get(a_key(1)))
    thread.join(30)


def test_a_stop_ends_in_time_when_the_owner_does_not_end_a_landing(world: World) -> None:
    world.late = 3
    thread = world.begin_create(a_key(1))
    started = time.monotonic()
    assert not world.gateway.lander.stop(0.3)
    assert time.monotonic() - started < 2
    thread.join(30)


def test_what_cannot_be_handed_back_leaves_the_journal_free(world: World) -> None:
    def begin(steps: Iterator[None]) -> None:
        raise MemoryError

    world.gateway.lander._begin = begin
    assert isinstance(world.create(a_key(1)), wggw.OutcomeUnknown)  # its record is on disk
    assert not world.gateway.lander.turn.locked()
    assert world.gateway.degraded()


def test_the_last_of_several_threads_switches_the_collector_on_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wggw, "_without_collector", 0)  # worlds of other tests may need it off
    with wggw.collector_off():
        second = wggw.collector_off()
        second.__enter__()
    assert not gc.isenabled()
    third = wggw.collector_off()
    third.__enter__()
    second.__exit__(None, None, None)
    third.__exit__(None, None, None)
    assert gc.isenabled()
