"""NetlinkBackend keeps the backends' contract with the kernel's WireGuard."""

from __future__ import annotations

from collections.abc import Iterator

import interfaces
import netns
import pytest
from backend_contract import InterfaceContract, held, hosts, peer, put, wg_dump
from harness import a_key

import wggw

pytestmark = pytest.mark.real


def delete(name: str) -> None:
    netns.output("ip", "link", "delete", name)


@pytest.fixture
def interface() -> Iterator[interfaces.Opened]:
    netns.need("ip", "wg")
    if not netns.kernel_has_wireguard():
        pytest.skip("the running kernel has no WireGuard")
    with interfaces.interface(wggw.NetlinkBackend, delete) as opened:
        yield opened


class TestNetlinkBackend(InterfaceContract):
    def test_an_interface_made_by_others_is_taken_over(self, interface: interfaces.Opened) -> None:
        name = interface.link.name
        netns.output("ip", "link", "add", name, "type", "wireguard")
        backend = interface.open(interface.link)
        backend.setup()
        put(backend, peer("a", *hosts(1)))
        assert wg_dump(name).peers == {peer("a", *hosts(1))}

    def test_an_interface_of_another_kind_is_not_touched(
        self, interface: interfaces.Opened
    ) -> None:
        name = interface.link.name
        netns.output("ip", "link", "add", name, "type", "veth", "peer", "name", "other")
        before = netns.output("ip", "-d", "link", "show", "dev", name)
        with pytest.raises(wggw.ForeignError, match="a veth interface, not WireGuard's"):
            interface.open(interface.link).setup()
        assert netns.output("ip", "-d", "link", "show", "dev", name) == before

    def test_an_interface_with_peers_or_a_key_of_others_is_not_touched(
        self, interface: interfaces.Opened
    ) -> None:
        name = interface.link.name
        netns.output("ip", "link", "add", name, "type", "wireguard")
        key = netns.output("wg", "genkey")
        netns.output("wg", "set", name, "private-key", "/dev/stdin", given=key)
        backend = interface.open(interface.link)
        for peers in (0, 1):
            before = wg_dump(name), netns.output("ip", "-d", "link", "show", "dev", name)
            with pytest.raises(wggw.ForeignError, match=f"with {peers} peers?, public key "):
                backend.setup()
            with pytest.raises(wggw.BackendError):
                put(backend, peer("b", *hosts(2)))
            after = wg_dump(name), netns.output("ip", "-d", "link", "show", "dev", name)
            assert after == before
            stranger = ("peer", a_key("stranger"), "allowed-ips", "10.99.0.9/32")
            netns.output("wg", "set", name, *stranger)
        known = []

        def recognise(reading: wggw.Reading) -> bool:
            assert reading.device is not None
            known.append((wggw.encode_key(reading.device.private_key) + "\n", reading.peers))
            return True

        wggw.claim_links([interface.link], recognise)
        assert known == [(key, 1)]
        backend.setup()  # it has the mark by now
        assert f"alias {interface.link.mark}" in netns.output("ip", "link", "show", name)

    def test_what_was_made_is_found_by_its_mark_and_removed(
        self, backend: wggw.Backend, interface: interfaces.Opened
    ) -> None:
        put(backend, *(peer(n, *hosts(n)) for n in range(1, 50)))
        netns.output("ip", "link", "add", "wgother", "type", "wireguard")
        ours, others = wggw.links_to_remove(interface.link.mark, (), wggw.recognise_none)
        assert ([link.name for link in ours], others) == ([interface.link.name], [])
        assert ours[0].kind == "wireguard"
        assert wggw.remove_interface(ours[0]) == f"{interface.link.name}: removed"
        shown = netns.output("ip", "-o", "link")
        assert (interface.link.name in shown, "wgother" in shown) == (False, True)

    def test_a_change_does_not_reach_what_took_the_place_of_ours(
        self, backend: wggw.Backend, interface: interfaces.Opened
    ) -> None:
        interface.destroy()
        netns.output("ip", "link", "add", interface.link.name, "type", "wireguard")
        with pytest.raises(wggw.BackendError, match="is gone"):
            put(backend, peer("a", *hosts(1)))
        assert wg_dump(interface.link.name).peers == set()

    def test_an_interface_made_anew_by_others_is_not_the_one_that_was_set_up(
        self, backend: wggw.Backend, interface: interfaces.Opened
    ) -> None:
        interface.destroy()
        netns.output("ip", "link", "add", interface.link.name, "type", "wireguard")
        assert not backend.alive()

    def test_peers_in_many_messages_read_back_exactly(
        self, backend: wggw.Backend, interface: interfaces.Opened
    ) -> None:
        many = [
            peer(n, *(hosts(100 * n + i)[i % 2] for i in range(100)), psk=n) for n in range(100)
        ]
        put(backend, *many)
        shown = wg_dump(interface.link.name).peers
        assert shown == set(many)
        assert held(backend) == shown

    def test_a_link_that_is_made_anew_keeps_its_peers(
        self, interface: interfaces.Opened, caplog: pytest.LogCaptureFixture
    ) -> None:
        name = interface.link.name
        backend = interface.open(interface.link)
        backend.setup()
        peers = [peer(f"p{number}", *hosts(number)) for number in range(1, 600)]
        put(backend, *peers)
        before, index = wg_dump(name), wggw.Route.index(name)
        backend._replace_link()
        assert wg_dump(name) == before and wggw.Route.index(name) != index
        assert backend.alive()
        assert f"{name}: made anew with its 599 peers" in caplog.text
        assert f"alias {interface.link.mark}" in netns.output("ip", "link", "show", name)


def test_a_kernel_without_wireguard_is_a_backend_error() -> None:
    netns.need("ip")
    if netns.kernel_has_wireguard():
        pytest.skip("the running kernel has WireGuard")
    with netns.Namespace() as namespace, namespace.inside():
        backend = wggw.NetlinkBackend(interfaces.LINK._replace(name="wg0", private_key=bytes(32)))
        try:
            with pytest.raises(wggw.BackendError, match="the kernel has no WireGuard"):
                backend.setup()
        finally:
            backend.close()
