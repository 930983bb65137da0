"""Inside the guest: peers over kernel netlink, compared with what `wg show dump` says of them.

WGGW_VM_PEERS is the number of peers of the first test (default 2,000). Each number printed after
"measured:" has its reference from wireguard-tools in the same guest beside it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import a_key

import wggw

PEERS = int(os.environ.get("WGGW_VM_PEERS", "2000"))
LINK = wggw.Link("wgdump", ("10.99.0.1/16", "fd99::1/64"), 1420, 51999, bytes([8] * 31 + [72]))


def wg(*arguments: str) -> str:
    return subprocess.run(["wg", *arguments], check=True, capture_output=True, text=True).stdout


def timed(what: str, job: Callable[[], Any]) -> Any:
    start = time.monotonic()
    value = job()
    print(f"measured: {what}: {time.monotonic() - start:.3f} s")
    return value


def a_peer(number: int) -> wggw.WirePeer:
    """Peers of every kind: either family or both, every third one with a preshared key."""
    high, low = divmod(number + 2, 256)
    families = (
        (wggw.pack_network(f"10.99.{high}.{low}"),),
        (wggw.pack_network(f"fd99::{number + 2:x}"),),
    )
    chosen = (families[0], families[1], families[0] + families[1])[number % 3]
    psk = wggw.decode_key(a_key(("psk", number))) if number % 3 == 0 else b""
    return wggw.WirePeer(wggw.decode_key(a_key(number)), psk, tuple(sorted(chosen)))


def dumped(text: str) -> tuple[list[str], dict[bytes, wggw.PeerState]]:
    """`wg show NAME dump` -> (the interface's line, its peers)."""
    first, *lines = text.splitlines()
    states = {}
    for line in lines:
        key, psk, endpoint, networks, handshake, rx, tx, _ = line.split("\t")
        raw = wggw.decode_key(key)
        allowed = [n for n in networks.split(",") if n != "(none)"]
        packed = (
            wggw.pack_network(n.split("/")[0])[:-1] + bytes([int(n.split("/")[1])]) for n in allowed
        )
        peer = wggw.WirePeer(
            raw, b"" if psk == "(none)" else wggw.decode_key(psk), tuple(sorted(packed))
        )
        located = endpoint != "(none)"
        states[raw] = wggw.PeerState(peer, int(handshake), int(rx), int(tx), located)
    return first.split("\t"), states


def by_key(states: list[wggw.PeerState]) -> dict[bytes, wggw.PeerState]:
    found = {state.peer.public_key: state for state in states}
    assert len(found) == len(states), "a peer was read twice"
    return found


def read(backend: wggw.NetlinkBackend) -> list[wggw.PeerState]:
    reading = backend.read(())
    assert (reading.peers, reading.unreadable) == (len(reading.changed), 0)
    return [state for _, state in reading.changed]


@pytest.fixture
def backend() -> Iterator[wggw.NetlinkBackend]:
    backend = wggw.NetlinkBackend(LINK)
    try:
        backend.setup()
        yield backend
        # Emptied first: the kernel takes a grace period for each peer of a deleted interface.
        backend.apply([wggw.Change(s.peer.public_key, None) for s in read(backend)])
    finally:
        backend.close()
        subprocess.run(["ip", "link", "del", LINK.name], check=True)


def reference_addconf(peers: list[wggw.WirePeer], path: Path) -> Callable[[], Any]:
    """What wireguard-tools does to add the same peers to an interface of its own."""
    lines = []
    for peer in peers:
        lines.append(f"[Peer]\nPublicKey = {wggw.encode_key(peer.public_key)}\n")
        if peer.preshared_key:
            lines.append(f"PresharedKey = {wggw.encode_key(peer.preshared_key)}\n")
        for network in peer.allowed_ips:
            family = socket.AF_INET if len(network) == 5 else socket.AF_INET6
            text = socket.inet_ntop(family, network[:-1])
            lines.append(f"AllowedIPs = {text}/{network[-1]}\n")
    path.write_text("".join(lines))
    return lambda: wg("addconf", "wgref", str(path))


def test_peers_are_as_wg_sees_them(backend: wggw.NetlinkBackend, tmp_path: Path) -> None:
    peers = [a_peer(number) for number in range(PEERS)]
    timed(
        f"{PEERS} peers added by netlink",
        lambda: backend.apply([wggw.Change(peer.public_key, peer) for peer in peers]),
    )
    mine = timed(f"{PEERS} peers read by netlink", lambda: read(backend))
    text = timed(f"{PEERS} peers read by wg show dump", lambda: wg("show", LINK.name, "dump"))
    interface, theirs = dumped(text)
    assert by_key(mine) == theirs
    assert {state.peer for state in mine} == set(peers)
    assert interface[0] == wggw.encode_key(LINK.private_key)
    assert interface[2] == str(LINK.listen_port)

    subprocess.run(["ip", "link", "add", "wgref", "type", "wireguard"], check=True)
    add = reference_addconf(peers, tmp_path / "peers.conf")
    subprocess.run(
        ["wg", "set", "wgref", "private-key", "/dev/stdin"],
        input=interface[0],
        text=True,
        check=True,
    )
    timed(f"{PEERS} peers added by wg addconf", add)
    wg("setconf", "wgref", "/dev/null")
    subprocess.run(["ip", "link", "del", "wgref"], check=True)

    half = [wggw.Change(peer.public_key, None) for peer in peers[::2]]
    timed(f"{len(half)} peers removed by netlink", lambda: backend.apply(half))
    left = dumped(wg("show", LINK.name, "dump"))[1]
    assert left.keys() == {peer.public_key for peer in peers[1::2]}
    assert by_key(read(backend)) == left


def test_changed_peer_is_replaced_and_not_merged(backend: wggw.NetlinkBackend) -> None:
    before, other = a_peer(0), a_peer(2)
    assert before.preshared_key and not other.preshared_key
    after = before._replace(preshared_key=b"", allowed_ips=other.allowed_ips)
    backend.apply([wggw.Change(before.public_key, before)])
    backend.apply([wggw.Change(after.public_key, after)])
    states = dumped(wg("show", LINK.name, "dump"))[1]
    assert [state.peer for state in states.values()] == [after]


def test_peer_that_spans_messages_is_read_whole(backend: wggw.NetlinkBackend) -> None:
    """A foreign tool gave one peer more networks than a message of the dump can hold."""
    networks = ",".join(f"10.{i >> 8}.{i & 255}.0/24" for i in range(2000))
    for key in (a_key("before"), a_key("after")):
        wg("set", LINK.name, "peer", key, "allowed-ips", "192.0.2.1/32")
    wg("set", LINK.name, "peer", a_key("wide"), "allowed-ips", networks)
    theirs = dumped(wg("show", LINK.name, "dump"))[1]
    assert len(theirs[wggw.decode_key(a_key("wide"))].peer.allowed_ips) == 2000
    assert by_key(read(backend)) == theirs


def test_address_moves_to_the_peer_that_was_set_last(backend: wggw.NetlinkBackend) -> None:
    first, second = a_peer(2), a_peer(5)._replace(allowed_ips=a_peer(2).allowed_ips)
    backend.apply([wggw.Change(peer.public_key, peer) for peer in (first, second)])
    states = by_key(read(backend))
    assert states == dumped(wg("show", LINK.name, "dump"))[1]
    assert states[second.public_key].peer.allowed_ips == first.allowed_ips
    assert states[first.public_key].peer.allowed_ips == ()
