"""The laws that every backend keeps, as classes of tests to inherit from.

BackendContract needs a fixture `backend`: set up, without peers. InterfaceContract adds the laws of
a real interface and needs `interface` instead: see its docstring. Both run in whatever network
namespace the fixture has put the thread into.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import json
import socket
import subprocess
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pytest

import wggw


def network(text: str) -> bytes:
    """ "10.0.0.1/32" as WirePeer holds it."""
    parsed = ipaddress.ip_network(text)
    return parsed.network_address.packed + bytes([parsed.prefixlen])


def key(seed: object) -> bytes:
    return hashlib.sha256(repr(seed).encode()).digest()


def peer(seed: object, *networks: str, psk: object = None) -> wggw.WirePeer:
    preshared_key = b"" if psk is None else key(("psk", psk))
    return wggw.WirePeer(key(seed), preshared_key, tuple(sorted(map(network, networks))))


def hosts(number: int) -> tuple[str, str]:
    """Two addresses that belong to this number alone."""
    return f"10.99.{number >> 8}.{number & 255}/32", f"fd00:99::{number:x}/128"


def put(backend: wggw.Backend, *peers: wggw.WirePeer) -> None:
    backend.apply([wggw.Change(p.public_key, p) for p in peers])


def remove(backend: wggw.Backend, *peers: wggw.WirePeer) -> None:
    backend.apply([wggw.Change(p.public_key, None) for p in peers])


def states(backend: wggw.Backend) -> list[wggw.PeerState]:
    """All that read() says of peers, every one of which can be read."""
    reading = backend.read(())
    assert (reading.peers, reading.unreadable, reading.same) == (len(reading.changed), 0, set())
    return [state for _, state in reading.changed]


def held(backend: wggw.Backend) -> set[wggw.WirePeer]:
    """What read() says, counters left out. No peer may appear twice."""
    peers = [state.peer for state in states(backend)]
    assert len({p.public_key for p in peers}) == len(peers)
    return set(peers)


PEERS = {
    "IPv4": peer("a", "10.99.0.1/32"),
    "IPv6": peer("a", "fd00:99::1/128"),
    "both, with a preshared key": peer("a", "10.99.0.1/32", "fd00:99::1/128", psk=1),
    "no allowed IPs": peer("a"),
    "networks": peer("a", "10.99.0.0/16", "0.0.0.0/0", "fd00::/8", "::/0", "10.98.1.128/25"),
    # The kernel's answer about this one does not fit into one netlink message.
    "1,000 allowed IPs": peer("a", *(hosts(n)[n % 2] for n in range(1000))),
}


class BackendContract:
    """What holds for every backend, with or without an interface."""

    def test_starts_without_peers(self, backend: wggw.Backend) -> None:
        assert states(backend) == []

    @pytest.mark.parametrize("wanted", PEERS.values(), ids=PEERS.keys())
    def test_a_peer_reads_back_exactly(self, backend: wggw.Backend, wanted: wggw.WirePeer) -> None:
        put(backend, wanted)
        assert states(backend) == [wggw.PeerState(wanted, 0, 0, 0)]

    @pytest.mark.parametrize("second", PEERS.values(), ids=PEERS.keys())
    def test_setting_a_peer_replaces_all_of_it(
        self, backend: wggw.Backend, second: wggw.WirePeer
    ) -> None:
        put(backend, peer("a", "10.99.9.9/32", "fd00:99::9/128", psk="first"))
        put(backend, second)
        assert held(backend) == {second}

    def test_setting_a_peer_twice_is_fine(self, backend: wggw.Backend) -> None:
        wanted = peer("a", *hosts(1), psk=1)
        put(backend, wanted)
        put(backend, wanted, wanted)
        assert held(backend) == {wanted}

    def test_a_reading_tells_what_changed_from_what_is_known(self, backend: wggw.Backend) -> None:
        put(backend, *(peer(n, *hosts(n)) for n in range(5)))
        first = backend.read(())
        marks = {mark for mark, _ in first.changed}
        assert first.peers == len(marks) == 5 and not first.same
        # The text of the last one differs by a line end from the same peer's in another place.
        second = backend.read(marks)
        assert second.peers == 5 and len(second.same) >= 3 and second.same <= marks
        assert len(second.changed) == 5 - len(second.same)
        changed = peer(2, *hosts(7), psk="new")
        put(backend, changed)
        remove(backend, peer(3))
        third = backend.read(marks)
        assert third.peers == 4 and changed in [state.peer for _, state in third.changed]

    def test_removing_takes_that_peer_and_no_other(self, backend: wggw.Backend) -> None:
        first, second, third = (peer(n, *hosts(n)) for n in range(3))
        put(backend, first, second, third)
        remove(backend, second)
        assert held(backend) == {first, third}

    def test_removing_an_unknown_key_is_fine(self, backend: wggw.Backend) -> None:
        kept = peer("kept", *hosts(1))
        put(backend, kept)
        remove(backend, peer("never there"))
        assert held(backend) == {kept}

    def test_no_changes_change_nothing(self, backend: wggw.Backend) -> None:
        kept = peer("kept", *hosts(1))
        put(backend, kept)
        backend.apply([])
        assert held(backend) == {kept}

    def test_changes_are_done_in_their_order(self, backend: wggw.Backend) -> None:
        gone, kept = peer("gone", *hosts(1)), peer("kept", *hosts(2))
        backend.apply(
            [
                wggw.Change(gone.public_key, gone),
                wggw.Change(kept.public_key, None),
                wggw.Change(gone.public_key, None),
                wggw.Change(kept.public_key, kept),
            ]
        )
        assert held(backend) == {kept}

    def test_two_peers_swap_their_allowed_ips_in_one_apply(self, backend: wggw.Backend) -> None:
        put(backend, peer("a", *hosts(1)), peer("b", *hosts(2)))
        put(backend, peer("a", *hosts(2)), peer("b", *hosts(1)))
        assert held(backend) == {peer("a", *hosts(2)), peer("b", *hosts(1))}

    def test_an_allowed_ip_of_a_removed_peer_goes_to_the_next(self, backend: wggw.Backend) -> None:
        before, after = peer("before", *hosts(1)), peer("after", *hosts(1))
        put(backend, before)
        backend.apply([wggw.Change(before.public_key, None), wggw.Change(after.public_key, after)])
        assert held(backend) == {after}

    def test_1000_peers_in_one_apply_and_out_again(self, backend: wggw.Backend) -> None:
        peers = {peer(n, *hosts(n), psk=n if n % 2 else None) for n in range(1000)}
        put(backend, *peers)
        assert held(backend) == peers
        remove(backend, *peers)
        assert states(backend) == []

    def test_one_thread_reads_while_another_applies(self, backend: wggw.Backend) -> None:
        peers = [peer(n, *hosts(n)) for n in range(300)]

        def each() -> None:
            for one in peers:
                put(backend, one)

        writer = threading.Thread(target=each, daemon=True)
        writer.start()
        while writer.is_alive():
            assert held(backend) <= set(peers)
        writer.join()
        assert held(backend) == set(peers)

    def test_setup_again_leaves_peers_alone(self, backend: wggw.Backend) -> None:
        peers = {peer(n, *hosts(n), psk=n) for n in range(3)}
        put(backend, *peers)
        backend.setup()
        backend.setup()
        assert held(backend) == peers

    def test_is_alive_after_setup(self, backend: wggw.Backend) -> None:
        assert backend.alive()


class WireGuardContract(BackendContract):
    """What also holds for whatever behaves as WireGuard does.

    In memory an allowed IP need not move: the gateway gives no address to two peers.
    """

    def test_an_allowed_ip_moves_to_the_peer_that_is_set_last(self, backend: wggw.Backend) -> None:
        first, second = hosts(1)
        put(backend, peer("a", first, second))
        put(backend, peer("b", first))
        assert held(backend) == {peer("a", second), peer("b", first)}


class RealInterface(Protocol):
    """What a subclass of InterfaceContract gives: backends for one interface, and its end."""

    link: wggw.Link

    def open(self, link: wggw.Link) -> wggw.Backend:
        """Another backend for this or a similar link, not yet set up; closed by the fixture."""

    def destroy(self) -> None:
        """Take the interface away behind the backend's back, and wait until it is gone."""


def output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
    return done.stdout


class Dump(NamedTuple):
    """`wg show NAME dump`, in our words."""

    private_key: bytes
    listen_port: int
    peers: set[wggw.WirePeer]


def wg_dump(name: str) -> Dump:
    first, *rest = (line.split("\t") for line in output("wg", "show", name, "dump").splitlines())
    peers = set()
    for public_key, psk, _, allowed_ips, *_ in rest:
        networks = [] if allowed_ips == "(none)" else allowed_ips.split(",")
        peers.add(
            wggw.WirePeer(
                base64.b64decode(public_key),
                b"" if psk == "(none)" else base64.b64decode(psk),
                tuple(sorted(map(network, networks))),
            )
        )
    private_key = b"" if first[0] == "(none)" else base64.b64decode(first[0])
    return Dump(private_key, int(first[2]), peers)


def ip_link(name: str) -> Any:
    return json.loads(output("ip", "-json", "address", "show", "dev", name))[0]


def addresses(name: str) -> set[str]:
    """The interface's addresses, without the link-local ones that kernels make."""
    return {
        f"{entry['local']}/{entry['prefixlen']}"
        for entry in ip_link(name)["addr_info"]
        if entry["scope"] == "global"
    }


def assert_is_set_up(link: wggw.Link) -> None:
    shown = ip_link(link.name)
    dump = wg_dump(link.name)
    assert (dump.private_key, dump.listen_port) == (link.private_key, link.listen_port)
    assert "UP" in shown["flags"]
    assert shown["mtu"] == link.mtu
    assert addresses(link.name) >= set(link.addresses)


def all_fail(calls: Iterable[Any]) -> None:
    for call in calls:
        with pytest.raises(wggw.BackendError):
            call()


class InterfaceContract(WireGuardContract):
    """What holds for every backend with a real interface, seen with `wg` and `ip` from outside.

    A subclass gives the fixture `interface`, a RealInterface whose interface does not exist yet.
    """

    @pytest.fixture
    def backend(self, interface: RealInterface) -> wggw.Backend:
        backend = interface.open(interface.link)
        backend.setup()
        return backend

    def test_setup_makes_what_the_link_says(
        self, backend: wggw.Backend, interface: RealInterface
    ) -> None:
        assert_is_set_up(interface.link)
        assert addresses(interface.link.name) == set(interface.link.addresses)

    def test_a_reading_shows_that_key_or_port_are_others(
        self, backend: wggw.Backend, interface: RealInterface
    ) -> None:
        assert not backend.read(()).device_differs(interface.link)
        name = interface.link.name
        for wrong in (("listen-port", "0"), ("private-key", "/dev/null")):
            output("wg", "set", name, *wrong)
            assert backend.read(()).device_differs(interface.link)
            backend.setup()
            assert not backend.read(()).device_differs(interface.link)

    def test_setup_puts_right_what_others_changed(
        self, backend: wggw.Backend, interface: RealInterface
    ) -> None:
        kept = peer("kept", *hosts(1), psk=1)
        put(backend, kept)
        name = interface.link.name
        output("ip", "address", "flush", "dev", name)
        output("ip", "link", "set", name, "mtu", "1300", "down")
        output("wg", "set", name, "listen-port", "0", "private-key", "/dev/null")
        backend.setup()
        assert_is_set_up(interface.link)
        assert wg_dump(name).peers == {kept}

    def test_setup_leaves_its_address_where_it_came_behind_another_one_of_its_subnet(
        self, backend: wggw.Backend, interface: RealInterface
    ) -> None:
        name = interface.link.name
        Path(f"/proc/sys/net/ipv4/conf/{name}/promote_secondaries").write_text("0\n")
        own = next(address for address in interface.link.addresses if ":" not in address)
        output("ip", "address", "delete", own, "dev", name)
        output("ip", "address", "add", "10.99.7.7/16", "dev", name)
        backend.setup()
        assert addresses(name) == set(interface.link.addresses)
        assert backend.alive()

    @pytest.mark.parametrize(
        "words",
        [
            "10.99.0.1 peer 10.99.0.2/32",
            "10.7.7.1 peer 10.8.8.2/24",
            "10.7.7.1 peer 0.0.0.0/24",
            "fd07::1 peer fd08::2",
        ],
    )
    def test_setup_takes_away_an_address_with_another_end(
        self, backend: wggw.Backend, interface: RealInterface, words: str
    ) -> None:
        name = interface.link.name
        output("ip", "address", "add", *words.split(), "dev", name)
        assert not backend.alive()
        backend.setup()
        assert backend.alive()
        assert_is_set_up(interface.link)

    def test_an_endpoint_is_forgotten_when_its_peer_is_removed_and_added_in_one_message(
        self, backend: wggw.Backend, interface: RealInterface
    ) -> None:
        """What PRIVACY_SCRUB relies on."""
        wanted = peer("a", *hosts(1), psk=1)
        put(backend, wanted)
        name = interface.link.name
        endpoint = ("peer", wggw.encode_key(wanted.public_key), "endpoint", "192.0.2.1:5")
        output("wg", "set", name, *endpoint)
        assert [state.located for state in states(backend)] == [True]
        backend.apply(
            [wggw.Change(wanted.public_key, None), wggw.Change(wanted.public_key, wanted)]
        )
        assert states(backend) == [wggw.PeerState(wanted, 0, 0, 0, located=False)]
        assert output("wg", "show", name, "endpoints").split()[1] == "(none)"

    @pytest.mark.parametrize("wanted", PEERS.values(), ids=PEERS.keys())
    def test_wg_shows_the_same_peer(
        self, backend: wggw.Backend, interface: RealInterface, wanted: wggw.WirePeer
    ) -> None:
        put(backend, wanted)
        assert wg_dump(interface.link.name).peers == {wanted}

    def test_read_agrees_with_wg_over_many_peers(
        self, backend: wggw.Backend, interface: RealInterface
    ) -> None:
        put(backend, *(peer(n, *hosts(n), psk=n if n % 3 else None) for n in range(200)))
        remove(backend, *(peer(n) for n in range(0, 200, 7)))
        shown = wg_dump(interface.link.name).peers
        assert len(shown) == 171
        assert held(backend) == shown

    def test_read_shows_what_wg_set(self, backend: wggw.Backend, interface: RealInterface) -> None:
        name = base64.b64encode(key("foreign")).decode()
        settings = ("endpoint", "127.0.0.1:9", "persistent-keepalive", "60")
        output("wg", "set", interface.link.name, "peer", name, *settings)
        output("wg", "set", interface.link.name, "peer", name, "allowed-ips", "10.99.7.0/24,::/0")
        assert held(backend) == {peer("foreign", "10.99.7.0/24", "::/0")}

    def test_another_backend_finds_the_peers_as_they_are(
        self, backend: wggw.Backend, interface: RealInterface
    ) -> None:
        peers = {peer(n, *hosts(n), psk=n) for n in range(3)}
        put(backend, *peers)
        index = ip_link(interface.link.name)["ifindex"]
        backend.close()
        second = interface.open(interface.link)
        second.setup()
        assert held(second) == peers
        assert ip_link(interface.link.name)["ifindex"] == index

    def test_close_leaves_interface_and_peers(
        self, backend: wggw.Backend, interface: RealInterface
    ) -> None:
        peers = {peer(n, *hosts(n)) for n in range(3)}
        put(backend, *peers)
        backend.close()
        assert wg_dump(interface.link.name).peers == peers
        assert_is_set_up(interface.link)

    def test_is_not_alive_once_the_interface_is_gone(
        self, backend: wggw.Backend, interface: RealInterface
    ) -> None:
        interface.destroy()
        assert not backend.alive()

    def test_is_not_alive_without_each_of_its_addresses(
        self, backend: wggw.Backend, interface: RealInterface
    ) -> None:
        name = interface.link.name
        for address in interface.link.addresses:
            subprocess.run(["ip", "address", "delete", address, "dev", name], check=True)
            assert not backend.alive(), address
            backend.setup()
            assert backend.alive()
            assert_is_set_up(interface.link)

    def test_setup_after_the_interface_is_gone_makes_it_anew(
        self, backend: wggw.Backend, interface: RealInterface
    ) -> None:
        put(backend, peer("before", *hosts(1)))
        for round_ in range(2):
            interface.destroy()
            assert not backend.alive()
            backend.setup()
            assert backend.alive()
            assert_is_set_up(interface.link)
            assert states(backend) == []
            put(backend, peer(round_, *hosts(1), psk=1))
            assert wg_dump(interface.link.name).peers == {peer(round_, *hosts(1), psk=1)}

    def test_without_an_interface_every_call_is_a_backend_error(
        self, backend: wggw.Backend, interface: RealInterface
    ) -> None:
        interface.destroy()
        some = peer("a", *hosts(1))
        for _ in range(2):  # the second time without a connection to lose
            all_fail(
                (
                    lambda: backend.read(()),
                    lambda: put(backend, some),
                    lambda: remove(backend, some),
                )
            )

    @pytest.mark.parametrize(
        "wrong",
        [
            pytest.param({"name": "a" * 16}, id="name too long"),
            pytest.param({"name": "a b/c"}, id="name not allowed"),
            pytest.param({"mtu": 1}, id="MTU too small for IPv6"),
        ],
    )
    def test_a_link_that_cannot_be_is_a_backend_error(
        self, interface: RealInterface, wrong: dict[str, Any]
    ) -> None:
        all_fail([interface.open(interface.link._replace(**wrong)).setup])

    def test_a_listen_port_in_use_is_a_backend_error(self, interface: RealInterface) -> None:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as taken:
            taken.bind(("::", interface.link.listen_port))
            backend = interface.open(interface.link)
            all_fail([backend.setup])
        backend.setup()
        assert_is_set_up(interface.link)
