"""Fixtures of the real level: a gateway with a real interface in namespaces of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import netns
import pytest
from harness import GatewayProcess


@pytest.fixture
def topology() -> Iterator[netns.Topology]:
    """See the drawing in netns.Topology. The test runs inside the gateway's namespace."""
    netns.need("ip", "wg", "ping")
    with netns.topology() as made, made.gateway.inside():
        yield made


@pytest.fixture
def settings(topology: netns.Topology) -> dict[str, str]:
    return {
        "WG_BACKEND": "auto",
        "WG_INTERFACE": topology.interface,
        "WG_ENDPOINT": topology.ENDPOINT,
        "WG_IPV4_SUBNET": topology.SUBNETS[0],
        "WG_IPV6_SUBNET": topology.SUBNETS[1],
        "SAMPLE_INTERVAL": "0.3",
    }


@pytest.fixture
def stopped(
    topology: netns.Topology, settings: dict[str, str], tmp_path: Path
) -> Iterator[GatewayProcess]:
    """A gateway that is set up for the topology and not started."""
    if not netns.kernel_has_wireguard():
        netns.need("wireguard-go", tun=True)
    process = GatewayProcess(tmp_path, None, **settings)
    yield process
    process.close()


@pytest.fixture
def gateway(stopped: GatewayProcess) -> GatewayProcess:
    """The running gateway; its loopback is the test's, so that `client` reaches it."""
    return stopped.start()
