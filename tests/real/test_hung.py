"""A wireguard-go that hangs (SIGSTOP): readers notice nothing, changes are refused in time.

In this process, with short timeouts; over the API: laws/test_readers_never_wait.py.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import netns
import pytest
from backend_contract import wg_dump
from fakes import do, submit
from harness import a_key, wait_for
from inside import Inside
from netns import Topology

import wggw

pytestmark = pytest.mark.real


@pytest.fixture
def settings(settings: dict[str, str]) -> dict[str, str]:
    netns.need("wireguard-go", tun=True)
    settings["WG_BACKEND"] = "uapi"
    return settings


def elapsed(since: float) -> float:
    return time.monotonic() - since


@pytest.fixture
def inside(
    topology: Topology, settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Inside]:
    monkeypatch.setattr(wggw, "BACKEND_TIMEOUT", 2.0)
    made = Inside(topology, tmp_path, WG_BACKEND="uapi")
    yield made
    made.close()


def everything(inside: Inside) -> Any:
    """Rows and pools."""
    gateway = inside.gateway
    return gateway.run(lambda: inside.store.peers_after(0, 100)), gateway.usage()


@pytest.mark.long
def test_a_tunnel_goes_on_behind_a_stop_and_what_was_refused_is_not_done(
    topology: Topology, inside: Inside
) -> None:
    """The refused changes wait in the program's socket: it does them when it goes on."""
    tunnel = inside.connect(0)
    before, on_interface = everything(inside), wg_dump(inside.name)
    pid = netns.daemon_pid(inside.name)
    assert pid is not None
    netns.freeze(pid)
    try:
        started = time.monotonic()
        deletion = submit(inside.gateway, "delete", public_key=tunnel.public_key)
        others = [submit(inside.gateway, "create", public_key=a_key(n)) for n in range(3)]
        assert everything(inside)[0] == before[0]
        assert elapsed(started) < 1.8
        for answer in (deletion, *others):
            with pytest.raises(wggw.Unavailable):
                answer()
        assert elapsed(started) < 25
        began = time.monotonic()
        with pytest.raises(wggw.Unavailable):  # that it is not usable is known by now
            do(inside.gateway, "create", public_key=a_key(9))
        assert elapsed(began) < 1.8
        with pytest.raises(wggw.BackendError):
            inside.gateway.projection.reconcile()
        assert elapsed(began) < 25
        assert inside.gateway.degraded()
    finally:
        os.kill(pid, signal.SIGCONT)

    def well() -> bool:
        inside.gateway.projection.supervise()
        if inside.gateway.degraded() and "counters" not in str(inside.gateway.degraded()):
            return False
        inside.gateway.projection.sample()
        return not inside.gateway.degraded() and wg_dump(inside.name) == on_interface

    wait_for(well, 30)
    assert everything(inside) == before
    assert netns.daemon_pid(inside.name) == pid
    target = Topology.GATEWAY[0]
    if tunnel.ping(target, count=1) != {target: 1}:  # the deletion was done, and is undone
        tunnel.reconnect()
        assert tunnel.ping(target, count=1) == {target: 1}
    do(inside.gateway, "delete", public_key=tunnel.public_key)
    assert not wg_dump(inside.name).peers


def test_one_that_was_started_here_and_never_goes_on_is_ended_and_set_up_anew(
    topology: Topology, inside: Inside
) -> None:
    """Also when nobody asks for a change: samples notice it."""
    tunnel = inside.connect(0)
    for number in range(20):
        do(inside.gateway, "create", public_key=a_key(number), preshared_key=a_key(("psk", number)))
    before, on_interface = everything(inside), wg_dump(inside.name)
    pid = netns.daemon_pid(inside.name)
    assert pid is not None
    netns.freeze(pid)
    for _ in range(wggw.HUNG_TIMEOUTS):
        with pytest.raises(wggw.BackendError):
            inside.gateway.projection.sample()
    inside.gateway.projection.supervise()
    assert netns.daemon_pid(inside.name) not in (None, pid)
    inside.gateway.projection.sample()
    assert not inside.gateway.degraded()
    assert (everything(inside), wg_dump(inside.name)) == (before, on_interface)
    tunnel.reconnect()
    target = Topology.GATEWAY[0]
    assert tunnel.ping(target, count=1) == {target: 1}


def test_looks_at_one_that_hangs_do_not_hold_up_the_lander(inside: Inside) -> None:
    """Other interfaces have the same lander."""
    do(inside.gateway, "create", public_key=a_key(1))
    pid = netns.daemon_pid(inside.name)
    assert pid is not None
    netns.freeze(pid)
    try:
        with pytest.raises(wggw.Unavailable):
            do(inside.gateway, "delete", public_key=a_key(1))
        inside.gateway.projection.supervise()
        assert inside.gateway.degraded()
        assert inside.gateway.lander.turn.acquire(blocking=False)
        inside.gateway.lander.turn.release()
        assert not inside.gateway.ledger.airborne
    finally:
        os.kill(pid, signal.SIGCONT)
