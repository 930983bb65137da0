"""Everything at once on a real interface: single changes, desired states, samples, repairs, other
hands, an interface that dies. In the end rows and interface are the same.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import netns
import pytest
from backend_contract import output, wg_dump
from fakes import do
from harness import LONG, a_key, some, wait_for
from inside import Inside
from netns import Topology

import wggw

pytestmark = pytest.mark.real
SECONDS = 20.0 if LONG else 3.0
KEYS = [a_key(number) for number in range(60)]


@pytest.fixture
def inside(topology: Topology, tmp_path: Path) -> Iterator[Inside]:
    netns.need("wireguard-go", tun=True)
    made = Inside(topology, tmp_path, WG_BACKEND="uapi", DURABILITY="interval")
    yield made
    made.close()


def agree(inside: Inside) -> bool:
    rows = inside.gateway.run(lambda: inside.store.peers_after(0, 10_000))
    return wg_dump(inside.name).peers == {wggw.wire_peer(p) for p in rows if p.status == "active"}


RULES = [
    ("create", {"protocol": "dual"}),
    ("create", {"preshared_key": a_key("psk")}),
    ("set_status", {"status": "suspended"}),
    ("set_status", {"status": "active"}),
    ("update", {"preshared_key": a_key("other psk")}),
    ("update", {"preshared_key": None}),
    ("rotate", {}),
    ("delete", {}),
]


class Storm:
    """What happens at the same time; `by` says who else is at the interface."""

    def __init__(self, inside: Inside, by: str) -> None:
        self.gateway, self.name, self.by = inside.gateway, inside.name, by
        self.seed = random.randrange(10**6)
        self.until = time.monotonic() + SECONDS
        self.errors: list[BaseException] = []
        print(f"seed {self.seed}")

    def rage(self) -> None:
        jobs = [*(["client"] * 4), "desired", "timers", "others"]
        threads = [
            threading.Thread(target=self.run, args=pair, daemon=True) for pair in enumerate(jobs)
        ]
        for thread in threads:  # they are in the namespace of this one
            thread.start()
        for thread in threads:
            thread.join(SECONDS + 60)
            assert not thread.is_alive(), f"{thread} hangs"
        assert self.errors == []

    def run(self, number: int, job: str) -> None:
        dice = random.Random(self.seed + number)
        try:
            while time.monotonic() < self.until:
                getattr(self, job)(dice)
        except BaseException as error:
            self.errors.append(error)

    def client(self, dice: random.Random) -> None:
        rule, fields = dice.choice(RULES)
        more = {"new_public_key": dice.choice(KEYS)} if rule == "rotate" else {}
        with contextlib.suppress(wggw.NotFound, wggw.Conflict, wggw.Unavailable):
            do(self.gateway, rule, public_key=dice.choice(KEYS), **fields, **more)

    def desired(self, dice: random.Random) -> None:
        keys = dice.sample(KEYS, dice.randrange(len(KEYS)))
        wanted = {k: wggw.Desired("line", {"public_key": k, "protocol": "dual"}) for k in keys}
        with contextlib.suppress(wggw.Unavailable):
            self.gateway.sync(wanted, False, True)
        time.sleep(0.05)

    def timers(self, dice: random.Random) -> None:
        self.gateway.projection.supervise()
        for job in (self.gateway.projection.sample, self.gateway.projection.reconcile):
            try:
                job()
            except wggw.BackendError:
                assert self.by == "death"
        self.gateway.lander.snapshot()
        self.gateway.lander.flush()

    def others(self, dice: random.Random) -> None:
        time.sleep({"nobody": 1, "others": 0.2, "death": 1.5}[self.by])
        if self.by == "death" and netns.daemon_pid(self.name):
            netns.end_daemon(self.name)
        if self.by == "others":
            words = dice.choice(["remove", "allowed-ips 0.0.0.0/0", "allowed-ips 10.77.0.9/32"])
            peer = ("peer", dice.choice([*KEYS, a_key("foreign")]))
            output("wg", "set", self.name, *peer, *words.split())


@pytest.mark.parametrize("by", some(["death", "nobody", "others"], 1))
def test_rows_and_interface_are_the_same_in_the_end(inside: Inside, by: str) -> None:
    Storm(inside, by).rage()
    if by == "nobody":
        assert agree(inside)
        assert inside.gateway.projection.reconcile()[:3] == (0, 0, 0)

    def well() -> bool:
        inside.gateway.projection.supervise()
        inside.gateway.projection.sample()
        return not inside.gateway.degraded()

    wait_for(well, 30)
    assert agree(inside)
    pools = inside.gateway.tunnels[inside.name].pools
    rows = inside.gateway.run(lambda: inside.store.peers_after(0, 10_000))
    assert pools["ipv4"].used == sum(peer.assigned_ip is not None for peer in rows)
    assert pools["ipv6"].used == sum(peer.assigned_ipv6 is not None for peer in rows)
    assert not inside.gateway.ledger.in_flight and not inside.gateway.ledger.airborne
