"""The netlink codec: golden bytes written down from the kernel's headers, and garbled messages."""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Callable

import golden
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wggw
from wggw import (
    Change,
    CodecError,
    Device,
    NetlinkMessage,
    PeerState,
    WirePeer,
    decode_routes,
    decode_wg_peer,
    encode_wg_batches,
    genl,
    nl_attribute,
    nl_message,
    parse_nl_attributes,
    parse_nl_error,
    parse_nl_messages,
    read_wg_device,
)

pytestmark = pytest.mark.skipif(
    sys.byteorder != "little", reason="the golden bytes are little-endian"
)

KEY_A, KEY_B, PSK, PRIVATE = b"\xaa" * 32, b"\xbb" * 32, b"\xcc" * 32, b"\xdd" * 32
V4 = bytes([10, 0, 1, 2, 32])
V6 = bytes.fromhex("fd424242000100000000000000000002") + b"\x80"


GOLDEN = golden.sections("netlink")
DUMP_1, DUMP_2 = GOLDEN["dump 1"], GOLDEN["dump 2"]

PEER_A = WirePeer(KEY_A, PSK, (V4, V6))
PEER_B = WirePeer(KEY_B, b"", ())
STATES = [PeerState(PEER_A, 0x69372600, 256, 512, located=True), PeerState(PEER_B, 0, 0, 0)]


def test_set_peer_is_the_golden_bytes() -> None:
    assert [*encode_wg_batches("wg0", [Change(KEY_A, PEER_A)])] == [GOLDEN["set peer"]]


def test_peer_without_preshared_key_clears_the_one_it_had() -> None:
    bare = PEER_A._replace(preshared_key=b"")
    expected = GOLDEN["set peer"].replace(b"\xcc" * 32, bytes(32))
    assert [*encode_wg_batches("wg0", [Change(KEY_A, bare)])] == [expected]


def test_remove_peer_is_the_golden_bytes() -> None:
    assert [*encode_wg_batches("wg0", [Change(KEY_B, None)])] == [GOLDEN["remove peer"]]


def test_nothing_to_do_is_no_message() -> None:
    assert [*encode_wg_batches("wg0", [])] == []


def test_message_is_the_golden_bytes() -> None:
    message = NetlinkMessage(0x1C, 0x5, 7, genl(1, 1, b"abcd"))
    assert nl_message(message) == GOLDEN["message"]
    assert [*parse_nl_messages(GOLDEN["message"] * 2)] == [message, message]


def test_dump_over_two_messages_merges_the_peer_that_they_share() -> None:
    assert golden.netlink([DUMP_1, DUMP_2]) == (Device(PRIVATE, 51820), STATES)


def test_peers_with_keys_that_begin_alike_are_kept_apart() -> None:
    """AmneziaWG's module tells a peer's flags before its key."""
    keys = [bytes(31) + bytes([number]) for number in range(1, 4)]
    flags = nl_attribute(3, struct.pack("=I", 8))
    blocks = [nl_attribute(0x8000, flags + nl_attribute(1, key)) for key in keys]
    shared = nl_attribute(0x8000, flags + nl_attribute(1, keys[-1]))  # its other allowed IPs
    messages = [genl(0, 1, nl_attribute(0x8008, part)) for part in (b"".join(blocks), shared)]
    _, found = golden.netlink(messages)
    assert [state.peer.public_key for state in found] == keys


def test_known_peers_are_not_decoded() -> None:
    payloads = [DUMP_1, DUMP_2]
    first = read_wg_device(payloads)
    marks = {mark for mark, _ in first.changed}
    again = read_wg_device(payloads, known=marks)
    assert (again.peers, again.changed, again.same) == (2, [], marks)
    shaken = DUMP_2.replace(golden.octets("0600" + "00" * 16), golden.octets("0600 01" + "00" * 15))
    ((_, state),) = read_wg_device([DUMP_1, shaken], known=marks).changed
    assert (state.peer.public_key, state.last_handshake) == (KEY_B, 1)
    moved = DUMP_2.replace(V6[:-1], V6[:-2] + b"\3")  # in the second message
    ((_, state),) = read_wg_device([DUMP_1, moved], known=marks).changed
    assert state.peer.public_key == KEY_A


def test_a_peer_that_cannot_be_read_spoils_no_other() -> None:
    counted = DUMP_1.replace(struct.pack("=Q", 256), b"\xff" * 8)
    reading = read_wg_device([counted, DUMP_2])
    assert (reading.peers, reading.unreadable) == (2, 1)
    assert [state for _, state in reading.changed] == STATES[1:]


def test_attributes_may_come_in_any_order() -> None:
    networks = []
    for network, family in ((V4, 2), (V6, 10)):
        parts = [
            nl_attribute(3, network[-1:]),
            nl_attribute(1, struct.pack("=H", family)),
            nl_attribute(2, network[:-1]),
        ]
        networks.append(parts)
    parts = [  # STATES[0] as the kernel puts it
        nl_attribute(1, KEY_A),
        nl_attribute(2, PSK),
        nl_attribute(6, struct.pack("=qq", 0x69372600, 5)),
        nl_attribute(5, struct.pack("=H", 25)),
        nl_attribute(8, struct.pack("=Q", 512)),
        nl_attribute(7, struct.pack("=Q", 256)),
        nl_attribute(10, struct.pack("=I", 1)),
        nl_attribute(4, bytes(16)),
    ]
    for order in (lambda items: items, lambda items: items[::-1]):
        allowed = b"".join(nl_attribute(0x8000, b"".join(order(entry))) for entry in networks)
        data = b"".join(order([*parts, nl_attribute(0x8009, allowed)]))
        assert decode_wg_peer(data) == STATES[0]


def test_dump_without_a_private_key_has_none() -> None:
    device, states = golden.netlink([DUMP_1.replace(PRIVATE, bytes(32))])
    assert device == Device(b"", 51820)
    assert states[0].peer.allowed_ips == (V4,)


def test_handshake_of_nanoseconds_alone_has_happened() -> None:
    early = DUMP_1.replace(
        golden.octets("0026376900000000 05"), golden.octets("0000000000000000 05")
    )
    assert golden.netlink([early])[1][0].last_handshake == 1


CAPPED_TLVS = 0x300  # NLM_F_CAPPED | NLM_F_ACK_TLVS


def kernel_error(number: int) -> bytes:
    """struct nlmsgerr: the number, the header of the request, NLMSGERR_ATTR_MSG."""
    return struct.pack("=i", number) + bytes(16) + nl_attribute(1, b"no such thing\0")


def test_kernel_error_is_its_number_and_words() -> None:
    assert parse_nl_error(kernel_error(-2), CAPPED_TLVS) == (2, "no such thing")
    assert parse_nl_error(kernel_error(-95)[:20], CAPPED_TLVS) == (95, "")
    assert parse_nl_error(kernel_error(0), CAPPED_TLVS) == (0, "")


def test_kernel_error_without_the_flags_has_no_words() -> None:
    """What stands behind the number is then the request itself, not attributes."""
    assert parse_nl_error(struct.pack("=i", -22) + b"\xff" * 40, 0) == (22, "")


@pytest.mark.parametrize(
    "payload", [b"", b"\1\0\0", struct.pack("=i", 1), struct.pack("=i", -9999)]
)
def test_error_message_without_a_valid_errno_is_a_codec_error(payload: bytes) -> None:
    with pytest.raises(CodecError):
        parse_nl_error(payload, CAPPED_TLVS)


def test_attribute_that_does_not_fit_16_bits_is_a_codec_error() -> None:
    assert len(nl_attribute(1, bytes(0xFFFF - 4))) == 0x10000
    with pytest.raises(CodecError):
        nl_attribute(1, bytes(0xFFFF - 3))


# --- round trips ----------------------------------------------------------------------------------

KEYS = st.binary(min_size=32, max_size=32)
NETWORKS = st.one_of(
    st.tuples(st.binary(min_size=4, max_size=4), st.integers(0, 32)),
    st.tuples(st.binary(min_size=16, max_size=16), st.integers(0, 128)),
).map(lambda pair: pair[0] + bytes([pair[1]]))
PEERS = st.builds(
    WirePeer,
    KEYS,
    st.one_of(st.just(b""), KEYS.filter(any)),
    st.lists(NETWORKS, max_size=4).map(lambda found: tuple(sorted(found))),
    st.just(""),  # nftables has the class
)


@settings(deadline=None)
@given(peers=st.lists(PEERS, max_size=8, unique_by=lambda peer: peer.public_key))
def test_encoded_peers_are_decoded_as_they_were(peers: list[WirePeer]) -> None:
    payloads = encode_wg_batches("wg0", [Change(peer.public_key, peer) for peer in peers])
    _, states = golden.netlink([genl(0, 1, payload) for payload in payloads])
    assert [state.peer for state in states] == peers


@given(
    messages=st.lists(
        st.builds(
            NetlinkMessage,
            st.integers(0, 0xFFFF),
            st.integers(0, 0xFFFF),
            st.integers(0, 2**32 - 1),
            st.binary(max_size=64).map(lambda b: b + bytes(-len(b) % 4)),
        ),
        max_size=5,
    )
)
def test_messages_are_decoded_as_they_were(messages: list[NetlinkMessage]) -> None:
    assert [*parse_nl_messages(b"".join(map(nl_message, messages)))] == messages


@given(attributes=st.lists(st.tuples(st.integers(0, 0x3FFF), st.binary(max_size=50)), max_size=6))
def test_attributes_are_decoded_as_they_were(attributes: list[tuple[int, bytes]]) -> None:
    data = b"".join(nl_attribute(kind, payload) for kind, payload in attributes)
    assert [*parse_nl_attributes(data)] == attributes


@pytest.mark.parametrize("networks", [(V4,), (V4, V6), ()])
def test_batches_stay_below_64k_and_keep_every_peer_once_in_order(
    networks: tuple[bytes, ...],
) -> None:
    peers = [WirePeer(struct.pack(">I28x", n), PSK, networks) for n in range(5000)]
    changes = [Change(p.public_key, p if n % 7 else None) for n, p in enumerate(peers)]
    payloads = [*encode_wg_batches("wg0", changes)]
    assert max(map(len, payloads)) < 0xFFFF - 64
    assert len(payloads) < 5000 * 200 / (30 * 1024)
    _, states = golden.netlink([genl(0, 1, payload) for payload in payloads])
    assert [s.peer.public_key for s in states] == [p.public_key for p in peers]
    kept = [state.peer for n, state in enumerate(states) if n % 7]
    assert kept == [peer for n, peer in enumerate(peers) if n % 7]


# --- garbled --------------------------------------------------------------------------------------


def decode_payload(data: bytes) -> object:
    """CodecError when the device or any of its peers cannot be read."""
    reading = read_wg_device([data])
    if reading.unreadable:
        raise CodecError("a peer")
    return reading


def decode_datagram(data: bytes) -> object:
    reading = read_wg_device([message.payload for message in parse_nl_messages(data)])
    if reading.unreadable:
        raise CodecError("a peer")
    return reading.device, golden.states(reading)


def survives(decode: Callable[[bytes], object], data: bytes) -> bool:
    """Whether it decodes; a CodecError says no, anything else is the test's failure."""
    try:
        decode(data)
    except CodecError as error:
        assert str(error)
        return False
    return True


DATAGRAM = b"".join(nl_message(NetlinkMessage(28, 2, 1, p)) for p in (DUMP_1, DUMP_2))


def test_whole_datagram_decodes() -> None:
    assert decode_datagram(DATAGRAM) == (Device(PRIVATE, 51820), STATES)


def test_every_truncation_is_a_codec_error_or_a_value() -> None:
    refused = [n for n in range(len(DATAGRAM)) if not survives(decode_datagram, DATAGRAM[:n])]
    assert len(refused) > len(DATAGRAM) - 4  # all but none at all and the first message alone


def test_every_truncation_of_one_payload_is_a_codec_error_or_a_value() -> None:
    for length in range(len(DUMP_1)):
        survives(decode_payload, DUMP_1[:length])


def test_every_garbled_byte_is_a_codec_error_or_a_value() -> None:
    refused = 0
    for place in range(len(DATAGRAM)):
        for byte in {DATAGRAM[place] ^ 1 << bit for bit in range(8)} | {0, 1, 3, 4, 5, 0xFF}:
            garbled = DATAGRAM[:place] + bytes([byte]) + DATAGRAM[place + 1 :]
            refused += not survives(decode_datagram, garbled)
    assert refused > 500


@settings(max_examples=300)
@given(data=st.binary(max_size=120))
def test_any_bytes_are_a_codec_error_or_a_value(data: bytes) -> None:
    survives(decode_datagram, data)
    survives(decode_payload, data)
    survives(lambda raw: parse_nl_error(raw, CAPPED_TLVS), data)
    survives(lambda raw: [*parse_nl_attributes(raw)], data)
    survives(lambda raw: [*parse_nl_attributes(nl_attribute(8, raw))], data)


@pytest.mark.parametrize(
    ("what", "wrong"),
    [
        ("public key", nl_attribute(1, b"\xaa" * 31)),
        ("preshared key", nl_attribute(1, KEY_A) + nl_attribute(2, b"\xaa" * 33)),
        ("time", nl_attribute(1, KEY_A) + nl_attribute(6, bytes(12))),
        ("counter", nl_attribute(1, KEY_A) + nl_attribute(7, bytes(4))),
        ("no key", nl_attribute(2, PSK)),
        ("address", nl_attribute(1, KEY_A) + nl_attribute(9, nl_attribute(0, b""))),
    ],
)
def test_peer_with_a_wrong_attribute_is_unreadable(what: str, wrong: bytes) -> None:
    message = bytes(4) + nl_attribute(8, nl_attribute(0, wrong))
    reading = read_wg_device([message])
    assert (reading.peers, reading.unreadable, reading.changed) == (1, 1, []), what


def route(family: int, length: int, kind: int, *attributes: tuple[int, str]) -> bytes:
    """struct rtmsg (linux/rtnetlink.h) and attributes."""
    head = struct.pack("=BBBBBBBBI", family, length, 0, 0, 254, 2, 0, kind, 0)
    return head + b"".join(nl_attribute(n, bytes.fromhex(value)) for n, value in attributes)


def test_routes_are_those_that_lead_somewhere() -> None:
    payloads = [
        route(2, 0, 1, (5, "c0000201"), (4, "02000000")),  # default via 192.0.2.1
        route(2, 24, 1, (1, "0a000100"), (4, "03000000")),
        route(2, 32, 2, (1, "0a000107"), (4, "03000000")),  # local
        route(2, 32, 3, (1, "0a0001ff"), (4, "03000000")),  # broadcast
        route(2, 8, 6, (1, "0a000000")),  # blackhole
        route(10, 64, 1, (1, "fd42424200010000" + "00" * 8), (9, "00" * 8)),  # several ways
        route(28, 20, 1, (1, "00010000")),  # MPLS
    ]
    found = [(str(network), index) for network, index in decode_routes(payloads)]
    assert found == [
        ("0.0.0.0/0", 2),
        ("10.0.1.0/24", 3),
        ("10.0.1.7/32", 3),
        ("fd42:4242:1::/64", 0),
    ]


@given(st.binary(max_size=64))
def test_garbled_route_is_a_codec_error(payload: bytes) -> None:
    try:
        decode_routes([payload])
    except CodecError:
        pass


@pytest.mark.parametrize("prefix", ["", "wg0: "])
def test_silent_kernel_is_named(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wggw, "BACKEND_TIMEOUT", 0.01)
    netlink = wggw.NetlinkSocket(wggw.NETLINK_ROUTE, prefix)
    ours, kernel = socket.socketpair()
    with netlink._socket, ours, kernel:
        ours.settimeout(0.01)
        netlink._socket = ours
        with pytest.raises(wggw.NoAnswer, match=f"^{prefix}netlink: no answer within"):
            netlink.dump(wggw.RTM_GETLINK, bytes(16), whole=True)
