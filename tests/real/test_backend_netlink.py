"""NetlinkBackend keeps the backends' contract with the kernel's WireGuard."""

from __future__ import annotations

from collections.abc import Iterator

import interfaces
import netns
import pytest
from backend_contract import InterfaceContract, hosts, peer, put, wg_dump

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

    def test_an_interface_of_another_kind_is_a_backend_error(
        self, interface: interfaces.Opened
    ) -> None:
        netns.output("ip", "link", "add", interface.link.name, "type", "dummy")
        with pytest.raises(wggw.BackendError):
            interface.open(interface.link).setup()

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
        assert {state.peer for state in backend.read()} == shown


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
