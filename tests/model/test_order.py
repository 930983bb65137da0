"""Random histories of a gateway, compared with a model that is too simple to be wrong.

One client, no faults: create in every form, suspend, activate, delete, and restarts, orderly ones
and crashes. The subnets are so small that they are exhausted often. After every step addresses,
statuses, pool totals, the next address and the interface's content must be those of the model.
"""

from __future__ import annotations

import ipaddress
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fakes import build, do
from harness import LONG, a_key
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import wggw

KEYS = [a_key(("model", number)) for number in range(12)]
SUBNETS = {
    "tight": {"WG_IPV4_SUBNET": "10.7.0.8/29", "WG_IPV6_SUBNET": "fd00:7::8/125"},
    "wide": {"WG_IPV4_SUBNET": "10.7.0.8/29", "WG_IPV6_SUBNET": "fd00:7::/112"},
    "ipv4": {"WG_IPV4_SUBNET": "10.7.0.8/30", "WG_IPV6_SUBNET": ""},
}


@dataclass
class FamilyModel:
    """A family's addresses as plain lists."""

    fresh: list[str]  # never used, in order
    released: list[str] = field(default_factory=list)  # oldest first
    held: set[str] = field(default_factory=set)

    @property
    def next(self) -> str | None:
        return next(iter(self.fresh or self.released), None)

    def hold(self, address: str) -> None:
        (self.fresh if address in self.fresh else self.released).remove(address)
        self.held.add(address)

    def release(self, address: str) -> None:
        self.held.remove(address)
        self.released.append(address)


@dataclass
class ModelPeer:
    addresses: dict[str, str]
    active: bool = True


def family_model(subnet: str) -> FamilyModel:
    """The first 300 addresses are enough: no history is that long."""
    network = ipaddress.ip_network(subnet)
    last = network.num_addresses - (1 if network.version == 4 else 0)
    return FamilyModel([str(network[i]) for i in range(2, min(last, 302))])


def families_of(protocol: str | None, traffic: tuple[str, ...] | None) -> list[str]:
    """The contract's sentence on which families get an address."""
    named = set(traffic or ())
    if protocol is not None:
        named |= {"ipv4", "ipv6"} if protocol == "dual" else {protocol}
    return sorted(named or {"ipv4"})


class Histories(RuleBasedStateMachine):
    subnets: str  # set by the test

    @initialize()
    def begin(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="wggw-model-"))
        self.world = build(self.directory, **SUBNETS[self.subnets])
        self.families = {
            family: family_model(subnet)
            for family, subnet in zip(("ipv4", "ipv6"), SUBNETS[self.subnets].values(), strict=True)
            if subnet
        }
        self.peers: dict[str, ModelPeer] = {}

    def do(self, rule: str, **fields: Any) -> wggw.Outcome:
        return do(self.world.gateway, rule, **fields)

    # --- what can happen -------------------------------------------------------------------------

    @rule(
        key=st.sampled_from(KEYS),
        protocol=st.sampled_from([None, "ipv4", "ipv6", "dual"]),
        traffic=st.sampled_from([None, ("ipv4",), ("ipv6",), ("ipv4", "ipv6")]),
    )
    def create(self, key: str, protocol: str | None, traffic: tuple[str, ...] | None) -> None:
        families = families_of(protocol, traffic)
        fields = {"public_key": key, "protocol": protocol, "tunnel_traffic": traffic}
        self._create(key, {n: v for n, v in fields.items() if v is not None}, families, {})

    @rule(key=st.sampled_from(KEYS), offsets=st.tuples(st.integers(0, 9), st.integers(0, 9)))
    def create_with_addresses(self, key: str, offsets: tuple[int, int]) -> None:
        wanted = {
            family: str(network[min(offset, network.num_addresses - 1)])
            for family, network, offset in zip(
                ("ipv4", "ipv6"),
                (self.world.config.wg_ipv4_subnet, self.world.config.wg_ipv6_subnet),
                offsets,
                strict=True,
            )
            if network is not None
        }
        fields = {
            "public_key": key,
            "protocol": "dual" if len(wanted) == 2 else "ipv4",
            **{wggw.ADDRESS_FIELD[family]: address for family, address in wanted.items()},
        }
        self._create(key, fields, sorted(wanted), wanted)

    def _create(
        self, key: str, fields: dict[str, Any], families: list[str], wanted: dict[str, str]
    ) -> None:
        expected = self._expected_error(key, families, wanted)
        if expected is not None:
            with pytest.raises(expected):
                self.do("create", **fields)
            return
        outcome = self.do("create", **fields)
        assert outcome.changed == (key not in self.peers)
        if outcome.changed:
            given = {f: wanted.get(f) or self.families[f].next or "" for f in families}
            for family, address in given.items():
                self.families[family].hold(address)
            self.peers[key] = ModelPeer(given)
        assert self._addresses(outcome.peer) == self.peers[key].addresses

    def _expected_error(
        self, key: str, families: list[str], wanted: dict[str, str]
    ) -> type[wggw.GatewayError] | None:
        if key in self.peers:
            return None
        if any(family not in self.families for family in families):
            return wggw.Invalid
        for family in families:
            model = self.families[family]
            if family in wanted:
                if wanted[family] not in model.fresh + model.released:
                    return wggw.Conflict
            elif model.next is None:
                return wggw.Unavailable
        return None

    @rule(key=st.sampled_from(KEYS), status=st.sampled_from(["active", "suspended"]))
    def set_status(self, key: str, status: str) -> None:
        if key not in self.peers:
            with pytest.raises(wggw.NotFound):
                self.do("set_status", public_key=key, status=status)
            return
        self.do("set_status", public_key=key, status=status)
        self.peers[key].active = status == "active"

    @rule(key=st.sampled_from(KEYS))
    def delete(self, key: str) -> None:
        if key not in self.peers:
            with pytest.raises(wggw.NotFound):
                self.do("delete", public_key=key)
            return
        self.do("delete", public_key=key)
        for family, address in self.peers.pop(key).addresses.items():
            self.families[family].release(address)

    @precondition(lambda self: len(self.peers) > 1)
    @rule()
    def delete_all(self) -> None:
        for key in list(self.peers):
            self.delete(key)

    @rule()
    def snapshot(self) -> None:
        self.world.gateway.lander.snapshot()

    @rule(seconds=st.integers(1, 100_000))
    def time_passes(self, seconds: int) -> None:
        self.world.now += seconds

    @rule()
    def orderly_restart(self) -> None:
        before = self.world.backend.changes
        self.world.reopen()
        assert self.world.backend.changes == before  # peers that are right are not touched

    @rule(rebooted=st.booleans())
    def crash(self, rebooted: bool) -> None:
        """The files are what they are; the interface is as it was, or gone with the machine."""
        self.world.crash()
        if rebooted:
            self.world.backend.restart()
        before = self.world.backend.changes
        self.world.open()
        active = sum(peer.active for peer in self.peers.values())
        assert self.world.backend.changes - before == (active if rebooted else 0)

    @rule(key=st.sampled_from(KEYS))
    def a_stranger_changes_the_interface(self, key: str) -> None:
        """Whatever is wrong there, repair brings it back."""
        self.world.backend.put(key, "192.0.2.1")
        result = self.world.gateway.projection.reconcile()
        held = key in self.peers and self.peers[key].active
        assert result[:3] == ((0, 1, 0) if held else (0, 0, 1))

    # --- what must then be so --------------------------------------------------------------------

    @staticmethod
    def _addresses(peer: wggw.Peer) -> dict[str, str]:
        pairs = (("ipv4", peer.assigned_ip), ("ipv6", peer.assigned_ipv6))
        return {family: address for family, address in pairs if address is not None}

    @invariant()
    def peers_are_those_of_the_model(self) -> None:
        peers = [peer for peer, _ in self.world.rows()]
        shown = {p.public_key: (self._addresses(p), p.status == "active") for p in peers}
        assert shown == {key: (p.addresses, p.active) for key, p in self.peers.items()}
        active = self.world.store.counts.peers["wg0", "active"]
        assert active == sum(p.active for p in self.peers.values())
        assert self.world.store.counts.total() == len(self.peers)

    @invariant()
    def pools_are_those_of_the_model(self) -> None:
        (interface,) = self.world.gateway.tunnels.values()
        usage = self.world.gateway.usage(interface.name)
        for family, model in self.families.items():
            pool = interface.pools[family]
            network = pool.network
            usable = network.num_addresses - (3 if network.version == 4 else 2)
            assert (pool.total, pool.used) == (usable, len(model.held))
            assert pool.peek() == model.next
            assert set(usage[family]["assigned_ips"]) == model.held
            assert usage[family]["available"] == usable - len(model.held)

    @invariant()
    def the_interface_holds_the_active_peers_and_nothing_else(self) -> None:
        expected = {
            wggw.decode_key(key): set(map(ipaddress.ip_address, peer.addresses.values()))
            for key, peer in self.peers.items()
            if peer.active
        }
        found = {}
        for key, peer in self.world.backend.peers.items():
            assert all(n[-1] == 8 * (len(n) - 1) for n in peer.allowed_ips)  # a /32 or a /128
            addresses = {ipaddress.ip_address(network[:-1]) for network in peer.allowed_ips}
            found[wggw.decode_key(key)] = addresses
        assert found == expected

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.close()
            shutil.rmtree(self.directory)


@pytest.mark.timeout(1200 if LONG else 300)
@pytest.mark.parametrize("subnets", SUBNETS)
def test_every_history_agrees_with_the_model(subnets: str) -> None:
    machine = type("Histories", (Histories,), {"subnets": subnets})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=150 if LONG else 4,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_a_snapshot_alone_remembers_the_order_of_release(tmp_path: Path) -> None:
    """Released addresses are the snapshot's business as well: the journal is not needed for it."""
    machine = type("Histories", (Histories,), {"subnets": "tight"})()
    machine.begin()
    try:
        for key in KEYS[:5]:
            machine.create(key, "dual", None)
        for number in (4, 0, 2):
            machine.delete(KEYS[number])
        machine.orderly_restart()
        (journal,) = machine.directory.glob("*.journal")
        assert len(journal.read_bytes().splitlines()) == 1  # a header, and no record
        for key in KEYS[5:8]:
            machine.create(key, None, None)
            machine.pools_are_those_of_the_model()
    finally:
        machine.teardown()
