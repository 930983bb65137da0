"""PRIVACY_SCRUB on a real interface: endpoints go, tunnels come back, totals stay right.

The gateway's parts run inside the test, because the clock is passed to them: hours go by at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import netns
import pytest
from fakes import do, traffic_of
from harness import wait_for
from inside import Inside
from netns import Topology, Tunnel, output

import wggw

pytestmark = pytest.mark.real
HOUR = 3600


class Parts(Inside):
    """What the tests look at."""

    def endpoint(self, tunnel: Tunnel) -> str:
        return self.shown("endpoints", tunnel)[0]

    def counted(self, tunnel: Tunnel) -> int:
        """Bytes that the interface counts for this peer now."""
        return sum(map(int, self.shown("transfer", tunnel)))

    def settle(self, tunnel: Tunnel) -> None:
        """Wait until nothing is under way: each side has counted what the other one has.

        wireguard-go counts a packet after it was sent; its answer may be there before that.
        """

        def agreed() -> bool:
            sent, received = tunnel.transfer()
            return self.shown("transfer", tunnel) == [str(sent), str(received)]

        wait_for(agreed, 30, "the same counts on both sides")

    def sample(self, tunnel: Tunnel) -> int:
        """Take a sample between two equal readings of the interface; returns what they were."""

        def steady() -> tuple[int] | None:
            before = self.counted(tunnel)
            self.gateway.projection.sample()
            return (before,) if before == self.counted(tunnel) else None

        return int(wait_for(steady, 30, "a sample without a packet in between")[0])

    def shown(self, what: str, tunnel: Tunnel) -> list[str]:
        rows = [line.split("\t") for line in output("wg", "show", self.name, what).splitlines()]
        [row] = [row for row in rows if row[0] == tunnel.public_key]
        return row[1:]

    def total(self, tunnel: Tunnel) -> int:
        traffic = traffic_of(self.gateway, tunnel.public_key)
        return traffic.rx_bytes + traffic.tx_bytes


@pytest.fixture
def parts(topology: Topology, tmp_path: Path) -> Iterator[Parts]:
    if not netns.kernel_has_wireguard():
        netns.need("wireguard-go", tun=True)
    made = Parts(topology, tmp_path, PRIVACY_SCRUB=str(HOUR))
    yield made
    made.close()


def test_a_silent_peers_endpoint_is_forgotten_its_total_is_not_and_it_comes_back(
    parts: Parts, topology: Topology
) -> None:
    silent, lively = parts.connect(0), parts.connect(1)
    parts.gateway.projection.sample()
    assert parts.endpoint(silent).startswith("192.0.2.2:")
    parts.settle(silent)
    silent.namespace.ip(f"link set {silent.name} down")
    before = parts.counted(silent)
    assert before > 0

    parts.ahead = HOUR + 5  # so is the lively one's handshake: it is scrubbed as well
    parts.gateway.projection.sample()
    assert parts.endpoint(silent) == parts.endpoint(lively) == "(none)"
    assert parts.counted(silent) == 0
    assert parts.total(silent) == before
    handshake = traffic_of(parts.gateway, silent.public_key).last_handshake
    assert abs(handshake - time.time()) < 60
    parts.gateway.projection.sample()
    assert parts.total(silent) == before

    # The peer is still one: the client's next handshake brings everything back.
    parts.ahead = 0
    netns.output("ip", "-n", silent.namespace.name, "link", "set", silent.name, "up")
    for target in ("10.77.0.0/24", "fd77::/64"):
        netns.output(
            "ip", "-n", silent.namespace.name, "route", "replace", target, "dev", silent.name
        )
    silent.reconnect()
    assert silent.ping(Topology.GATEWAY[0], count=2) == {Topology.GATEWAY[0]: 2}
    again = parts.sample(silent)
    assert parts.endpoint(silent).startswith("192.0.2.2:")
    assert again > 0
    assert parts.total(silent) == before + again


def test_peers_with_a_younger_handshake_keep_their_session(
    parts: Parts, topology: Topology
) -> None:
    tunnel = parts.connect(0)
    before = parts.shown("latest-handshakes", tunnel), parts.endpoint(tunnel)
    for ahead in (0, HOUR - 60):
        parts.ahead = ahead
        parts.gateway.projection.sample()
    assert (parts.shown("latest-handshakes", tunnel), parts.endpoint(tunnel)) == before
    assert tunnel.ping(Topology.GATEWAY[0], count=2) == {Topology.GATEWAY[0]: 2}


def test_an_endpoint_without_a_handshake_is_forgotten_at_the_second_look(
    parts: Parts, topology: Topology
) -> None:
    """Such as one that somebody set: in the first look it might be a handshake under way."""
    tunnel = topology.tunnel(0)
    do(parts.gateway, "create", public_key=tunnel.public_key)
    output("wg", "set", parts.name, "peer", tunnel.public_key, "endpoint", "192.0.2.9:5")
    parts.gateway.projection.sample()
    assert parts.endpoint(tunnel) == "192.0.2.9:5"
    parts.gateway.projection.sample()
    assert parts.endpoint(tunnel) == "(none)"


def test_a_failing_interface_is_repaired_after_a_scrub(
    parts: Parts, topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worst moment: the peer is removed and not yet back."""
    tunnel = parts.connect(0)
    parts.ahead = HOUR + 5
    apply = parts.backend.apply

    def half(changes: list[wggw.Change]) -> None:
        apply(changes[:1])
        raise wggw.BackendError("it broke")

    with monkeypatch.context() as patched:
        patched.setattr(parts.backend, "apply", half)
        with pytest.raises(wggw.BackendError):
            parts.gateway.projection.sample()
    assert parts.gateway.degraded()
    parts.gateway.projection.supervise()
    parts.gateway.projection.sample()
    assert not parts.gateway.degraded()
    parts.ahead = 0
    tunnel.reconnect()
    assert tunnel.ping(Topology.GATEWAY[0], count=1) == {Topology.GATEWAY[0]: 1}
