"""The gateway on a real kernel under a real systemd, in a guest that is a process of this machine.

What runs inside the guest is in inside/; README.md says how kernel and disk are made. The guest
has one processor and slow system calls: times measured in it compare only with each other.

WGGW_VM_SUITE     the guest's Debian, default bookworm
WGGW_VM_PEERS     peers of the dump test, default 60000
WGGW_VM_ROUNDS    power cuts, default 10
"""

from __future__ import annotations

import ipaddress
import json
import os
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import wait_for
from vm import Guest, NotBuilt, image, kernel, run_inside

# The time is for a build of kernel and disk; each boot has a deadline of its own.
pytestmark = [pytest.mark.vm, pytest.mark.timeout(2400)]

SUITE = os.environ.get("WGGW_VM_SUITE", "bookworm")
PEERS = int(os.environ.get("WGGW_VM_PEERS", "60000"))
ROUNDS = int(os.environ.get("WGGW_VM_ROUNDS", "10"))


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    try:
        machine = Guest(tmp_path / "guest", kernel(), image(SUITE))
    except NotBuilt as reason:
        pytest.skip(str(reason))
    with machine:
        yield machine


def test_backend_contract_holds_on_the_kernel(guest: Guest) -> None:
    run_inside(guest, "real/test_backend_netlink.py::TestNetlinkBackend", 900)


def test_kernel_dump_agrees_with_wg(guest: Guest) -> None:
    run_inside(guest, "vm/inside/check_dump.py", 300 + PEERS / 50, WGGW_VM_PEERS=str(PEERS))


def test_gateway_on_kernel_wireguard(guest: Guest) -> None:
    run_inside(guest, "vm/inside/check_gateway.py", 900)


def test_an_interface_is_adopted_on_kernel_wireguard(guest: Guest) -> None:
    name = "test_two_thousand_peers_are_taken_over_and_no_packet_is_lost"
    run_inside(guest, f"real/test_adopt.py::{name}", 900)


# --- power cuts -----------------------------------------------------------------------------------

State = Any  # [status, IPv4, IPv6], or None where there is no such peer


class History:
    """What the gateway acknowledged of each peer, and what it may have done besides."""

    def __init__(self) -> None:
        self.acknowledged: dict[str, State] = {}
        self.under_way: dict[str, str] = {}

    def read(self, console: str) -> int:
        """Take in "try" and "ack" lines, a torn last one left out; returns the number of acks."""
        acks = 0
        for line in console.splitlines():
            word, _, text = line.partition(" ")
            if word not in ("try", "ack") or not text.endswith("]"):
                continue
            key, what = json.loads(text)
            if word == "try":
                self.under_way[key] = what
            else:
                acks += 1
                del self.under_way[key]
                self.acknowledged[key] = self._after(key, what)
        return acks

    def _after(self, key: str, what: Any) -> State:
        if isinstance(what, list):
            return what
        return None if what == "delete" else [what, *self.acknowledged[key][1:]]

    def check(self, peers: dict[str, State]) -> None:
        """Every acknowledged change is there; one under way happened wholly or not at all."""
        for key in peers.keys() | self.acknowledged.keys():
            found, promised = peers.get(key), self.acknowledged.get(key)
            what = self.under_way.get(key)
            if what == "create":
                assert found is None or found[0] == "active", (key, found)
            elif what is None:
                assert found == promised, f"{key}: acknowledged {promised}, found {found}"
            else:
                assert found in (promised, self._after(key, what)), (key, promised, what, found)
        self.acknowledged, self.under_way = dict(peers), {}


def check_projection(state: Any) -> None:
    """The interface holds the active peers and no other; no address is held twice."""
    holders: dict[str, list[str]] = defaultdict(list)
    expected = {}
    for key, (status, *addresses) in state["peers"].items():
        held = [address for address in addresses if address]
        for address in held:
            holders[address].append(key)
        if status == "active":
            expected[key] = sorted(str(ipaddress.ip_network(address)) for address in held)
    assert {a: keys for a, keys in holders.items() if len(keys) > 1} == {}
    assert {key: sorted(networks) for key, networks in state["interface"].items()} == expected


def boot(guest: Guest, command: str, seed: int) -> Any:
    """Boot into power.py; returns the state that the gateway came up with."""
    guest.start(
        "sysctl -qw vm.dirty_expire_centisecs=360000\n"  # nothing reaches the disk by itself
        f"exec python3 /tree/tests/vm/inside/power.py {command} {seed}\n"
    )

    def state() -> Any:
        found = re.search(r"^state (.*)\n", guest.output() + "\n", re.MULTILINE)
        if found is None:
            assert guest.running(), f"the gateway did not come up:\n{guest.output()}"
            assert "failed " not in guest.output(), guest.output()
        return found and found[1].endswith("}") and json.loads(found[1])

    return wait_for(state, 240, "the gateway's state after a boot")


def wait_until_acknowledged(guest: Guest, enough: int) -> None:
    def are_there() -> bool:
        output = guest.output()
        assert "failed " not in output, output
        return output.count("ack [") >= enough

    wait_for(are_there, 240, f"{enough} acknowledged changes")


def test_power_cut_loses_nothing_that_was_acknowledged(guest: Guest) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    history = History()
    server_key = None
    for number in range(ROUNDS):
        state = boot(guest, "load", seed + number)
        history.check(state["peers"])
        check_projection(state)
        assert server_key in (None, state["server_public_key"]), "the gateway's key changed"
        assert not state["unsynced"], "a cut lost nothing: it proves nothing"
        server_key = state["server_public_key"]
        # The first cut comes as early as it can: keys and certificate have just been made.
        enough = 1 if number == 0 else chance.randrange(100, 400)
        wait_until_acknowledged(guest, enough)
        guest.power_cut()
        acks = history.read(guest.output())
        print(f"measured: round {number}: cut after {acks} acknowledged changes")
    state = boot(guest, "report", seed)
    history.check(state["peers"])
    check_projection(state)
    assert server_key in (None, state["server_public_key"])
    assert not state["unsynced"]
    assert guest.wait(180).status == 0
