"""What somebody else does to an interface is found and put right within two samples.

Most of it keeps the number of peers. As long as it is not right, nobody is told that all is well.
"""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Callable, Iterator

import netns
import pytest
from harness import LONG, a_key, some, wait_for
from rig import (
    EIO,
    Gateway,
    Interface,
    is_healthy,
    real_gateway,
    wait_degraded,
    wait_healthy,
)

pytestmark = pytest.mark.real

SAMPLE = 0.5  # seconds
# Two samples, and what a busy machine needs for the second one.
SOON = 2 * SAMPLE + 15
ONE, TWO, THREE = (a_key(name) for name in ("one", "two", "three"))
SECRET = a_key("of another")


FOREIGN_KEY = base64.b64encode(bytes([8, *range(30), 64])).decode()


class Seen:
    """A gateway with three peers, and what its interface was like when all was well."""

    def __init__(self, gateway: Gateway, interface: Interface) -> None:
        self.gateway, self.interface = gateway, interface
        self.client = gateway.client()
        self.addresses = {
            key: self.client.create(key, **fields).json["assigned_ip"]
            for key, fields in ((ONE, {}), (TWO, {"preshared_key": a_key("own")}), (THREE, {}))
        }
        wait_healthy(self.client)
        self.good = self.now()

    def now(self) -> dict[str, object]:
        found: dict[str, object] = {
            what: sorted(self.interface.show(what).splitlines())
            for what in ("peers", "allowed-ips", "preshared-keys", "private-key", "listen-port")
        }
        link = netns.output("ip", "-o", "address", "show", "dev", self.interface.name)
        found["link"] = sorted(
            " ".join(line.split()[2:4]) for line in link.splitlines() if "fe80" not in line
        )
        return found

    def is_good(self) -> bool:
        return self.now() == self.good

    # --- what somebody may do to it ---------------------------------------------------------------

    def moves_an_address(self) -> None:
        self.interface.set("peer", TWO, "allowed-ips", f"{self.addresses[ONE]}/32")

    def swaps_two_addresses(self) -> None:
        one, two = self.addresses[ONE], self.addresses[TWO]
        self.interface.set("peer", ONE, "allowed-ips", f"{two}/32")
        self.interface.set("peer", TWO, "allowed-ips", f"{one}/32")

    def gives_a_peer_the_default_route(self) -> None:
        self.interface.set("peer", ONE, "allowed-ips", "0.0.0.0/0")

    def takes_a_peers_address(self) -> None:
        self.interface.set("peer", ONE, "allowed-ips", "")

    def removes_everything(self) -> None:
        netns.output("wg", "setconf", self.interface.name, "/dev/null")

    def adds_an_address(self) -> None:
        mine = self.addresses[ONE]
        self.interface.set("peer", ONE, "allowed-ips", f"{mine}/32,203.0.113.7/32")

    def sets_a_preshared_key(self) -> None:
        self.interface.set("peer", ONE, "preshared-key", "/dev/stdin", given=SECRET)

    def changes_a_preshared_key(self) -> None:
        self.interface.set("peer", TWO, "preshared-key", "/dev/stdin", given=SECRET)

    def puts_one_peer_in_place_of_another(self) -> None:
        address = self.addresses[ONE]
        self.interface.set("peer", ONE, "remove")
        self.interface.set("peer", a_key("foreign"), "allowed-ips", f"{address}/32")

    def removes_a_peer(self) -> None:
        self.interface.set("peer", THREE, "remove")

    def adds_a_peer(self) -> None:
        self.interface.set("peer", a_key("foreign"), "allowed-ips", "203.0.113.7/32")

    def changes_the_private_key(self) -> None:
        self.interface.set("private-key", "/dev/stdin", given=FOREIGN_KEY)

    def changes_the_listen_port(self) -> None:
        self.interface.set("listen-port", "40404")

    def removes_the_address_of_the_link(self) -> None:
        netns.output("ip", "address", "flush", "dev", self.interface.name)


PEERS: list[Callable[[Seen], None]] = [
    Seen.moves_an_address,
    Seen.swaps_two_addresses,
    Seen.gives_a_peer_the_default_route,
    Seen.takes_a_peers_address,
    Seen.removes_everything,
    Seen.adds_an_address,
    Seen.sets_a_preshared_key,
    Seen.changes_a_preshared_key,
    Seen.puts_one_peer_in_place_of_another,
    Seen.removes_a_peer,
    Seen.adds_a_peer,
]
DEVICE: list[Callable[[Seen], None]] = [Seen.changes_the_private_key, Seen.changes_the_listen_port]
LINK: list[Callable[[Seen], None]] = [Seen.removes_the_address_of_the_link]


def name(drift: Callable[[Seen], None]) -> str:
    return drift.__name__


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """One for all: each test leaves it as it was, or the next one makes it so."""
    directory = tmp_path_factory.mktemp("drift")
    with real_gateway(directory, SAMPLE_INTERVAL=str(SAMPLE)) as (gateway, interface):
        yield Seen(gateway, interface)


@pytest.fixture
def right(seen: Seen) -> Iterator[Seen]:
    yield seen
    seen.interface.faults.clear()
    if not seen.is_good():  # what the gateway does not repair by itself, a restart does
        seen.gateway.kill()
        seen.gateway.start()
        seen.client = seen.gateway.client()
        wait_for(seen.is_good, what="a start that puts everything right")
    wait_healthy(seen.client)


@pytest.mark.parametrize("drift", some([*PEERS, *DEVICE, *LINK], 8), ids=name)
def test_within_two_samples(right: Seen, drift: Callable[[Seen], None]) -> None:
    logged = len(right.gateway.text())
    drift(right)
    if right.is_good():  # so soon
        assert re.search("is being repaired|setting it up", right.gateway.text()[logged:])
    wait_for(right.is_good, SOON, f"the repair: {right.now()} is not {right.good}")
    wait_healthy(right.client, SOON)
    assert right.is_good()


STUCK = [Seen.moves_an_address, *DEVICE, Seen.sets_a_preshared_key]


@pytest.mark.parametrize("drift", STUCK if LONG else STUCK[:2], ids=name)
def test_no_status_is_healthy_while_it_cannot_be_repaired(
    right: Seen, drift: Callable[[Seen], None]
) -> None:
    """The interface refuses to be set, so that what was seen stays: degraded until it is right."""
    drift_past_the_rules(right, drift)
    assert wait_degraded(right.client, SOON)
    until = time.monotonic() + 3 * SAMPLE
    while time.monotonic() < until:
        assert not is_healthy(right.client), "healthy, and the interface is still not right"
        time.sleep(0.05)
    right.interface.faults.clear()
    wait_for(right.is_good, SOON, "the repair")
    wait_healthy(right.client, SOON)


def drift_past_the_rules(seen: Seen, drift: Callable[[Seen], None]) -> None:
    """As if by hand, while every other `set` fails: `wg` itself goes through the proxy, too."""
    faults = seen.interface.faults
    hexadecimal = {key: base64.b64decode(key).hex() for key in (ONE, TWO, SECRET, FOREIGN_KEY)}
    text = {
        Seen.moves_an_address: f"public_key={hexadecimal[TWO]}\nreplace_allowed_ips=true\n"
        f"allowed_ip={seen.addresses[ONE]}/32",
        Seen.sets_a_preshared_key: f"public_key={hexadecimal[ONE]}\n"
        f"preshared_key={hexadecimal[SECRET]}",
        Seen.changes_the_private_key: f"private_key={hexadecimal[FOREIGN_KEY]}",
        Seen.changes_the_listen_port: "listen_port=40404",
    }[drift]
    faults.rule("set", errno=EIO)
    answer = faults.ask(send=f"set=1\n{text}\n\n")["answer"]
    assert answer == "errno=0\n\n", answer


def test_a_start_repairs_all_of_it(right: Seen) -> None:
    """And does not touch a peer that is right."""
    right.gateway.kill()
    for drift in (Seen.swaps_two_addresses, *DEVICE, *LINK):
        drift(right)
    begun = right.interface.faults.calls("set")
    right.gateway.start()
    assert right.is_good()
    assert right.interface.faults.calls("set") > begun
    right.client = right.gateway.client()
    wait_healthy(right.client)


def test_what_is_asked_for_again_is_right_again(right: Seen) -> None:
    """`exists` and `updated` speak of the interface: soon after, the peer passes."""
    right.moves_an_address()
    assert right.client.create(ONE).json["status"] == "exists"
    assert right.client.status(ONE, "active").status == 200
    wait_for(right.is_good, SOON, "the repair")


# --- when somebody asks for it --------------------------------------------------------------------


@pytest.fixture(scope="module")
def unsampled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """The gateway reads nothing by itself. From here on, the tests are in its namespace."""
    directory = tmp_path_factory.mktemp("unsampled")
    with real_gateway(directory, SAMPLE_INTERVAL="3600") as (gateway, interface):
        yield Seen(gateway, interface)


@pytest.mark.parametrize("drift", [*PEERS, *DEVICE], ids=name)
def test_sync_ips_repairs_all_of_it(unsampled: Seen, drift: Callable[[Seen], None]) -> None:
    drift(unsampled)
    assert not unsampled.is_good()
    answer = unsampled.client.send("POST", "/api/v1/sync-ips")
    assert (answer.status, answer.json["status"]) == (200, "synced"), answer
    assert unsampled.is_good(), f"{answer.json}, and {unsampled.now()} is not {unsampled.good}"
    if drift in PEERS:
        assert sum(answer.json[what] for what in ("added", "updated", "removed")) > 0, answer.json
