"""What is suspended, deleted or re-keyed is off the interface when the answer says so.

However many peers the interface has, and however long ago its counters were read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import LONG, a_key, wait_for
from rig import (
    PEERS,
    Gateway,
    Interface,
    check_interface,
    check_pool,
    fill,
    listed,
    patch,
    put,
    real_gateway,
    rfc3339,
    rotate,
    whole_second,
)

pytestmark = pytest.mark.real

MANY = 3_000 if LONG else 700  # more than 512


@pytest.fixture
def crowd(tmp_path: Path) -> Iterator[tuple[Gateway, Interface, list[str]]]:
    """Counters are read once an hour, so that nothing else takes anybody off."""
    with real_gateway(tmp_path, SAMPLE_INTERVAL="3600") as (gateway, interface):
        keys = [a_key(number) for number in range(MANY)]
        fill(gateway.client(), keys)
        assert interface.peers() == set(keys)
        yield gateway, interface, keys


def test_single_changes(crowd: tuple[Gateway, Interface, list[str]]) -> None:
    gateway, interface, keys = crowd
    client = gateway.client()
    for number in range(3):
        suspended, deleted, old, secret = keys[4 * number : 4 * number + 4]
        new = a_key(("new", number))
        assert client.status(suspended, "suspended").json == {"status": "suspended"}
        assert suspended not in interface.peers()
        assert client.delete(deleted).json == {"status": "deleted"}
        assert deleted not in interface.peers()
        assert rotate(client, old, new).status == 200
        peers = interface.peers()
        assert old not in peers and new in peers
        assert patch(client, secret, preshared_key=a_key("secret")).status == 200
        assert f"{secret}\t{a_key('secret')}" in interface.show("preshared-keys")
        # Who comes back, or comes anew with the address, is there, too.
        assert client.status(suspended, "active").status == 200
        address = client.create(deleted).json["assigned_ip"]
        assert interface.allowed_ips(deleted) == {f"{address}/32"}
        assert suspended in interface.peers()
    check_interface(client)
    check_pool(client)


def test_an_address_is_given_again_only_when_the_interface_has_dropped_its_peer(
    crowd: tuple[Gateway, Interface, list[str]],
) -> None:
    gateway, interface, keys = crowd
    client = gateway.client()
    for number, key in enumerate(keys[:5]):
        address = client.get(key).json["assigned_ip"]
        assert client.delete(key).status == 200
        heir = a_key(("heir", number))
        assert client.create(heir, assigned_ip=address).status == 200
        holders = [
            line.split()[0]
            for line in interface.show("allowed-ips").splitlines()
            if f"{address}/32" in line.split()
        ]
        assert holders == [heir]
        assert key not in interface.peers()


def test_many_at_once(crowd: tuple[Gateway, Interface, list[str]]) -> None:
    gateway, interface, keys = crowd
    client = gateway.client()
    operations = [
        *({"op": "suspend", "public_key": key} for key in keys[:100]),
        *({"op": "delete", "public_key": key} for key in keys[100:200]),
    ]
    answer = client.send("POST", f"{PEERS}batch", {"operations": operations})
    assert answer.status == 200, answer
    assert interface.peers() == set(keys[200:])
    # A desired state: some are left out, some are suspended, the others stay.
    elements = [
        *({"public_key": key, "status": "suspended"} for key in keys[200:300]),
        *({"public_key": key} for key in keys[400:]),
    ]
    assert put(client, elements).status == 200
    assert interface.peers() == set(keys[400:])
    check_interface(client)


def test_expiry_and_import(crowd: tuple[Gateway, Interface, list[str]]) -> None:
    gateway, interface, keys = crowd
    client = gateway.client()
    end = whole_second(0.5)
    assert patch(client, keys[0], expires_at=rfc3339(end)).status == 200
    image = client.send("GET", "/api/v1/snapshot").body
    others = [a_key(("other", number)) for number in range(600)]
    wait_for(lambda: client.get(keys[0]).json["status"] == "suspended", what="expiry")
    assert keys[0] not in interface.peers()
    fill(client, others)
    assert interface.peers() == set(others)
    answer = client.send("PUT", "/api/v1/snapshot", image)
    assert answer.status == 200, answer
    wait_for(lambda: client.get(keys[0]).json["status"] == "suspended", what="expiry")
    assert interface.peers() == set(keys[1:])
    assert set(listed(client)) == set(keys)
