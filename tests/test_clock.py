"""Expiry and quota on a clock that jumps, and over restarts: the rules, without a process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import API_KEY, a_key
from test_accounting import PRIVATE_KEY, CountingBackend, FaultyDisk

import wggw

START = 1_800_000_000


class Looks:
    """Stands for the timers: what is done, and how often."""

    every: dict[Callable[[], None], float]

    def __init__(self, name: str, jobs: list[tuple[float, Callable[[], None]]]) -> None:
        self.every.update((job, interval) for interval, job in jobs)

    def start(self) -> None:
        pass


class Rig:
    """A gateway whose clock the test sets."""

    def __init__(self, directory: Path) -> None:
        self.now = float(START)
        self.config = wggw.load_config(
            {"GATEWAY_API_KEY": API_KEY, "DB_PATH": str(directory / "db")}
        )
        self.backend = CountingBackend()
        self.disk = FaultyDisk()
        self.open()

    def open(self) -> None:
        self.store = wggw.Store(self.config.db_path, "commit", self.disk)
        self.store.recover()
        self.gateway = wggw.Gateway(self.config, self.store, lambda: self.now)
        (given,) = wggw.interface_settings(self.config)
        self.gateway.start([(given, wggw.make_link(given, PRIVATE_KEY), self.backend)])

    def close(self) -> None:
        self.store.close()

    def at(self, seconds: float) -> None:
        self.now = START + seconds
        self.gateway.expire()

    def state(self, name: str = "peer") -> tuple[str, str | None]:
        peer = self.gateway.get(a_key(name)).peer
        on = {wggw.encode_key(state.peer.public_key) for state in self.backend.read()}
        assert (a_key(name) in on) == (peer.status == "active")
        return peer.status, peer.status_reason

    def count(self, name: str, size: int) -> None:
        self.backend.counters[wggw.decode_key(a_key(name))][0] += size


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    made.gateway.create({"public_key": a_key("peer"), "expires_at": START + 100})
    yield made
    made.close()


ACTIVE, EXPIRED, QUOTA = ("active", None), ("suspended", "expired"), ("suspended", "quota")


def test_expiry_is_at_its_second_and_not_before(rig: Rig) -> None:
    for seconds, state in ((0, ACTIVE), (99.9, ACTIVE), (100, EXPIRED), (101, EXPIRED)):
        rig.at(seconds)
        assert rig.state() == state


def test_expiry_and_what_is_not_on_disk_are_looked_at_every_second(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Looks, "every", {}, raising=False)
    monkeypatch.setattr(wggw, "Timer", Looks)
    config = dataclasses.replace(rig.config, durability="interval")
    wggw.Service._start_timers(config, rig.gateway, wggw.HostMetrics(str(tmp_path)))
    for job in (rig.gateway.expire, rig.gateway.supervise, rig.gateway.heal, rig.gateway.flush):
        assert Looks.every[job] <= 1


def test_a_clock_that_jumps_ahead_and_is_set_back_takes_nothing_away(rig: Rig) -> None:
    rig.at(10**8)
    assert rig.state() == EXPIRED
    rig.at(50)
    assert rig.state() == ACTIVE
    rig.at(100)
    assert rig.state() == EXPIRED


def test_a_clock_set_back_does_not_undo_what_the_backend_suspended(rig: Rig) -> None:
    rig.gateway.set_status(a_key("peer"), "suspended")
    rig.at(200)
    rig.at(50)
    assert rig.state() == ("suspended", None)


def test_expiry_while_the_gateway_was_down_holds_before_it_is_ready(rig: Rig) -> None:
    rig.close()
    rig.now = START + 200
    rig.open()
    assert rig.state() == EXPIRED


def test_a_later_date_undoes_expiry_but_not_a_used_up_quota(rig: Rig) -> None:
    rig.gateway.update(a_key("peer"), {"quota_bytes": 10})
    rig.count("peer", 11)
    rig.at(100)
    assert rig.state() == EXPIRED
    rig.gateway.update(a_key("peer"), {"expires_at": START + 1000})
    assert rig.state() == QUOTA
    rig.gateway.update(a_key("peer"), {"quota_bytes": 11})
    assert rig.state() == ACTIVE


def test_quota_is_found_by_the_sample_that_sees_it_and_by_a_smaller_one_at_once(rig: Rig) -> None:
    rig.gateway.create({"public_key": a_key("paid"), "quota_bytes": 1000})
    rig.count("paid", 1000)
    rig.gateway.sample()
    assert rig.state("paid") == ACTIVE
    rig.count("paid", 1)
    rig.gateway.sample()
    assert rig.state("paid") == QUOTA
    rig.gateway.update(a_key("paid"), {"quota_bytes": None})
    assert rig.state("paid") == ACTIVE
    rig.gateway.update(a_key("paid"), {"quota_bytes": 1000})
    assert rig.state("paid") == QUOTA


def test_quota_is_tried_again_when_the_disk_refuses(rig: Rig) -> None:
    rig.gateway.create({"public_key": a_key("paid"), "quota_bytes": 1000})
    rig.count("paid", 1001)
    rig.disk.broken = True
    rig.gateway.sample()
    assert rig.state("paid") == ACTIVE
    rig.disk.broken = False
    rig.gateway.heal()
    rig.gateway.sample()
    assert rig.state("paid") == QUOTA
