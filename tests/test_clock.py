"""Expiry and quota on a clock that jumps, and over restarts: the rules, without a process."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import NOON, World, build, do, peer_of, traffic_of
from harness import a_key

import wggw

START = int(NOON)
PEER = a_key("peer")
ACTIVE, EXPIRED, QUOTA = ("active", None), ("suspended", "expired"), ("suspended", "quota")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = build(tmp_path)
    do(made.gateway, "create", public_key=PEER, expires_at=START + 100)
    yield made
    made.close()


def at(world: World, seconds: float) -> None:
    world.now = START + seconds
    world.gateway.limits.expire()


def state(world: World, key: str = PEER) -> tuple[str, str | None]:
    peer = peer_of(world.gateway, key)
    assert (key in world.backend.peers) == (peer.status == "active")
    return peer.status, peer.status_reason


def sample(world: World, key: str, received: int) -> None:
    world.backend.move(key, received)
    world.gateway.projection.sample()


def test_expiry_is_at_its_second_and_not_before(world: World) -> None:
    for seconds, expected in ((0, ACTIVE), (99.9, ACTIVE), (100, EXPIRED), (101, EXPIRED)):
        at(world, seconds)
        assert state(world) == expected


def test_all_whose_second_has_come_are_one_record_and_one_message(world: World) -> None:
    """Ten thousand at once must not take a message each."""
    for number in range(50):
        do(world.gateway, "create", public_key=a_key(number), expires_at=START + 100)
    applies, number = world.backend.faults.calls["apply"], world.store.number
    at(world, 100)
    assert world.gateway.run(lambda: world.store.counts.peers["wg0", "suspended"]) == 51
    assert world.backend.faults.calls["apply"] == applies + 1
    assert world.store.number == number + 1


def test_expiry_and_what_is_not_on_disk_are_looked_at_every_second(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    every: dict[Callable[[], None], float] = {}

    def look(_name: str, jobs: wggw.Jobs, _stopping: threading.Event) -> None:
        every.update((job, interval) for interval, job in jobs)

    monkeypatch.setattr(wggw, "repeat", look)
    config = dataclasses.replace(world.config, durability="interval")
    gateway = world.gateway
    admission = SimpleNamespace(nonces=wggw.NonceGuard(60))
    app: Any = SimpleNamespace(gateway=gateway, admission=admission, copier=None)
    service = wggw.Service(lambda: config)
    service._app, service._host = app, wggw.HostMetrics(str(tmp_path))
    for thread in service._start_timers(config):
        thread.join()
    for job in (
        gateway.limits.expire,
        gateway.projection.supervise,
        gateway.lander.heal,
        gateway.lander.flush,
    ):
        assert every[job] <= 1


def test_a_clock_that_jumps_ahead_and_is_set_back_takes_nothing_away(world: World) -> None:
    at(world, 10**8)
    assert state(world) == EXPIRED
    at(world, 50)
    assert state(world) == ACTIVE
    at(world, 100)
    assert state(world) == EXPIRED


def test_a_clock_set_back_does_not_undo_what_the_backend_suspended(world: World) -> None:
    do(world.gateway, "set_status", public_key=PEER, status="suspended")
    at(world, 200)
    at(world, 50)
    assert state(world) == ("suspended", None)


def test_expiry_while_the_gateway_was_down_holds_before_it_is_ready(world: World) -> None:
    world.crash()
    world.now = START + 200
    world.open()
    assert state(world) == EXPIRED


def test_a_later_date_undoes_expiry_but_not_a_used_up_quota(world: World) -> None:
    do(world.gateway, "update", public_key=PEER, quota_bytes=10)
    sample(world, PEER, 11)
    assert state(world) == QUOTA
    at(world, 100)
    do(world.gateway, "update", public_key=PEER, quota_bytes=11)
    assert state(world) == EXPIRED
    do(world.gateway, "update", public_key=PEER, quota_bytes=10)
    do(world.gateway, "update", public_key=PEER, expires_at=START + 1000)
    assert state(world) == QUOTA
    do(world.gateway, "update", public_key=PEER, quota_bytes=11)
    assert state(world) == ACTIVE


def test_quota_is_found_by_the_sample_that_sees_it_and_by_a_smaller_one_at_once(
    world: World,
) -> None:
    paid = a_key("paid")
    do(world.gateway, "create", public_key=paid, quota_bytes=1000)
    sample(world, paid, 1000)
    assert state(world, paid) == ACTIVE
    sample(world, paid, 1)
    assert state(world, paid) == QUOTA
    do(world.gateway, "update", public_key=paid, quota_bytes=None)
    assert state(world, paid) == ACTIVE
    do(world.gateway, "update", public_key=paid, quota_bytes=1000)
    assert state(world, paid) == QUOTA


def test_quota_is_tried_again_when_the_disk_refuses(world: World) -> None:
    paid = a_key("paid")
    do(world.gateway, "create", public_key=paid, quota_bytes=1000)
    world.disk.fail("fsync", forever=True)
    sample(world, paid, 1001)
    assert state(world, paid) == ACTIVE
    assert world.gateway.degraded()
    world.disk.heal()
    world.gateway.lander.heal()
    world.gateway.projection.sample()
    assert state(world, paid) == QUOTA
    assert not world.gateway.degraded()


# --- quotas that begin anew -----------------------------------------------------------------------

NAMED = {  # a moment, and when its day, week and month began
    "2026-11-28T12:00:00Z": ("2026-11-28", "2026-11-23", "2026-11-01"),
    "2026-03-01T00:00:00Z": ("2026-03-01", "2026-02-23", "2026-03-01"),
    "2024-02-29T23:59:59Z": ("2024-02-29", "2024-02-26", "2024-02-01"),
    "2029-01-01T00:00:00Z": ("2029-01-01", "2029-01-01", "2029-01-01"),
    "1970-01-01T00:00:01Z": ("1970-01-01", "1969-12-29", "1970-01-01"),
}


@pytest.mark.parametrize("moment", NAMED)
def test_days_weeks_and_months_begin_in_utc(moment: str) -> None:
    now = datetime.fromisoformat(moment).timestamp()
    began = [datetime.fromisoformat(f"{day}T00:00:00+00:00") for day in NAMED[moment]]
    assert list(wggw.period_starts(now).values()) == [at.timestamp() for at in began]


def used(world: World, key: str) -> int:
    """As the API shows it."""
    return int(world.shown(key)["quota_used"])


# Seconds from a Friday's morning in January to the ends of these.
DAY = 16 * 3600
WEEK = DAY + 2 * 86400
MONTH = DAY + 16 * 86400


@pytest.mark.parametrize("how", ["runs", "was down", "crashed", "imported"])
def test_a_quota_begins_anew_with_its_period_also_over_restarts(world: World, how: str) -> None:
    """Each is suspended for its own period, and totals never go back."""
    lasting = {"day": DAY, "week": WEEK, "month": MONTH, None: 10**9}
    keys = {period: a_key(("quota", period)) for period in lasting}
    for period, key in keys.items():
        do(world.gateway, "create", public_key=key, quota_bytes=100, quota_period=period)
        sample(world, key, 101)
    idle = a_key("idle")
    do(world.gateway, "create", public_key=idle, quota_bytes=100, quota_period="day")
    for period, ends in lasting.items():
        if period is None:
            continue
        at(world, ends - 1)
        assert state(world, keys[period]) == QUOTA
        if how == "was down":
            world.close()
        elif how == "crashed":
            world.crash()
        elif how == "imported":
            exported = world.gateway.export()
        told = world.store.feeds.sequence
        if how in ("runs", "imported"):
            at(world, ends)
        if how == "imported":
            world.gateway.import_(exported)  # what was so before that moment
        if not world.is_open:
            world.now = START + ends
            world.open()
        assert state(world, keys[period]) == ACTIVE
        assert used(world, keys[period]) == 0
        found = world.store.feeds.changes(told, 100, world.gateway.view())
        changed = {json.loads(text)["public_key"] for _, text in found}
        assert keys[period] in changed and idle not in changed
        sample(world, keys[period], 100)
        assert (state(world, keys[period]), used(world, keys[period])) == (ACTIVE, 100)
    assert state(world, keys[None]) == QUOTA
    assert traffic_of(world.gateway, keys["month"]).total == 201
    sequence = world.store.feeds.sequence
    at(world, MONTH + 10)
    assert world.store.feeds.sequence == sequence


def test_reset_quota_ends_a_suspension_by_quota_and_no_other(world: World) -> None:
    do(world.gateway, "update", public_key=PEER, quota_bytes=10, expires_at=START + 10**6)
    sample(world, PEER, 11)
    assert (state(world), used(world, PEER)) == (QUOTA, 11)
    assert do(world.gateway, "reset_quota", public_key=PEER).peer.status == "active"
    assert (state(world), used(world, PEER)) == (ACTIVE, 0)
    assert not do(world.gateway, "reset_quota", public_key=PEER).changed
    sample(world, PEER, 10)
    do(world.gateway, "set_status", public_key=PEER, status="suspended")
    assert do(world.gateway, "reset_quota", public_key=PEER).changed
    world.reopen()
    assert (state(world), used(world, PEER)) == (("suspended", None), 0)
    assert traffic_of(world.gateway, PEER).total == 21


def test_quotas_begin_anew_when_the_disk_works_again(world: World) -> None:
    do(world.gateway, "update", public_key=PEER, quota_bytes=10, quota_period="day")
    do(world.gateway, "update", public_key=PEER, expires_at=None)
    sample(world, PEER, 11)
    world.disk.fail("fsync", forever=True)
    at(world, DAY)
    assert state(world) == QUOTA
    world.disk.heal()
    world.gateway.lander.heal()
    at(world, DAY + 1)
    assert (state(world), used(world, PEER)) == (ACTIVE, 0)


@pytest.mark.parametrize(
    ("seconds", "online"), [(-181, False), (-179, True), (179, True), (181, False), (86400, False)]
)
def test_a_handshake_from_before_the_clock_was_set_back_keeps_nobody_online(
    world: World, seconds: int, online: bool
) -> None:
    world.backend.move(PEER, 100, handshake=START + seconds)
    world.gateway.projection.sample()
    assert world.shown(PEER)["online"] is online
    assert world.gateway.figures().online == online


def test_without_a_handshake_nobody_is_online_while_the_clock_is_at_its_epoch(world: World) -> None:
    sample(world, PEER, 100)
    world.now = 100.0
    assert world.shown(PEER)["online"] is False
    assert world.gateway.figures().online == 0
