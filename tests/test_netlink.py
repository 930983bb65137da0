"""The netlink codec: golden bytes written down from the kernel's headers, and garbled messages.

The golden bytes are struct nlattr (length, type, payload, padding to 4 bytes) by hand, as
include/uapi/linux/netlink.h and include/uapi/linux/wireguard.h define them.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import wggw
from wggw import (
    Change,
    CodecError,
    Device,
    NetlinkMessage,
    PeerState,
    Reading,
    WirePeer,
    decode_wg_device,
    decode_wg_peer,
    encode_wg_batches,
    genl,
    nl_attribute,
    nl_message,
    parse_nl_attributes,
    parse_nl_error,
    parse_nl_messages,
    sample_wg_device,
)

pytestmark = pytest.mark.skipif(
    sys.byteorder != "little", reason="the golden bytes are little-endian"
)

KEY_A, KEY_B, PSK, PRIVATE = b"\xaa" * 32, b"\xbb" * 32, b"\xcc" * 32, b"\xdd" * 32
V4 = bytes([10, 0, 1, 2, 32])
V6 = bytes.fromhex("fd424242000100000000000000000002") + b"\x80"


def octets(text: str) -> bytes:
    """Hex with comments behind `;` -> bytes."""
    return bytes.fromhex("".join(line.partition(";")[0] for line in text.splitlines()))


SET_PEER = octets(f"""
    0800 0200 77673000      ; WGDEVICE_A_IFNAME "wg0\\0"
    a000 0880               ; WGDEVICE_A_PEERS, nested
      9c00 0080             ;   the first one
        2400 0100 {"aa" * 32} ;   WGPEER_A_PUBLIC_KEY
        0800 0300 02000000  ;     WGPEER_A_FLAGS: WGPEER_F_REPLACE_ALLOWEDIPS
        2400 0200 {"cc" * 32} ;   WGPEER_A_PRESHARED_KEY
        4800 0980           ;     WGPEER_A_ALLOWEDIPS, nested
          1c00 0080         ;       the first one
            0600 0100 0200 0000   ; WGALLOWEDIP_A_FAMILY: AF_INET, padding
            0800 0200 0a000102    ; WGALLOWEDIP_A_IPADDR
            0500 0300 20 000000   ; WGALLOWEDIP_A_CIDR_MASK: 32, padding
          2800 0080
            0600 0100 0a00 0000   ; AF_INET6
            1400 0200 fd424242000100000000000000000002
            0500 0300 80 000000   ; 128
""")

REMOVE_PEER = octets(f"""
    0800 0200 77673000
    3400 0880
      3000 0080
        2400 0100 {"bb" * 32}
        0800 0300 01000000  ; WGPEER_F_REMOVE_ME
""")

# One dump in two messages, as genl payloads: the second goes on with the first's peer.
DUMP_1 = octets(f"""
    00 01 0000              ; struct genlmsghdr: WG_CMD_GET_DEVICE, version 1
    0600 0600 6cca 0000     ; WGDEVICE_A_LISTEN_PORT 51820
    0800 0700 00000000      ; WGDEVICE_A_FWMARK
    0800 0100 05000000      ; WGDEVICE_A_IFINDEX
    0800 0200 77673000      ; WGDEVICE_A_IFNAME
    2400 0300 {"dd" * 32}   ; WGDEVICE_A_PRIVATE_KEY
    2400 0400 {"ee" * 32}   ; WGDEVICE_A_PUBLIC_KEY
    c000 0880               ; WGDEVICE_A_PEERS
      bc00 0080
        2400 0100 {"aa" * 32}
        2400 0200 {"cc" * 32}
        1400 0600 0026376900000000 0500000000000000 ; WGPEER_A_LAST_HANDSHAKE_TIME
        0600 0500 1900 0000 ; WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL 25
        0c00 0800 0002000000000000 ; WGPEER_A_TX_BYTES 512
        0c00 0700 0001000000000000 ; WGPEER_A_RX_BYTES 256
        0800 0a00 01000000  ; WGPEER_A_PROTOCOL_VERSION
        1400 0400 0200 ca6c c0000207 0000000000000000 ; WGPEER_A_ENDPOINT, sockaddr_in
        2000 0980
          1c00 0080
            0600 0100 0200 0000
            0800 0200 0a000102
            0500 0300 20 000000
""")

DUMP_2 = octets(f"""
    00 01 0000
    b800 0880
      5400 0080
        2400 0100 {"aa" * 32}
        2c00 0980
          2800 0080
            0600 0100 0a00 0000
            1400 0200 fd424242000100000000000000000002
            0500 0300 80 000000
      6000 0080
        2400 0100 {"bb" * 32}
        2400 0200 {"00" * 32} ; no preshared key
        1400 0600 0000000000000000 0000000000000000 ; no handshake yet
""")

PEER_A = WirePeer(KEY_A, PSK, (V4, V6))
PEER_B = WirePeer(KEY_B, b"", ())
STATES = [PeerState(PEER_A, 0x69372600, 256, 512, located=True), PeerState(PEER_B, 0, 0, 0)]


def test_set_peer_is_the_golden_bytes() -> None:
    assert [*encode_wg_batches("wg0", [Change(KEY_A, PEER_A)])] == [SET_PEER]


def test_peer_without_preshared_key_clears_the_one_it_had() -> None:
    bare = PEER_A._replace(preshared_key=b"")
    expected = SET_PEER.replace(b"\xcc" * 32, bytes(32))
    assert [*encode_wg_batches("wg0", [Change(KEY_A, bare)])] == [expected]


def test_remove_peer_is_the_golden_bytes() -> None:
    assert [*encode_wg_batches("wg0", [Change(KEY_B, None)])] == [REMOVE_PEER]


def test_nothing_to_do_is_no_message() -> None:
    assert [*encode_wg_batches("wg0", [])] == []


def test_message_is_the_golden_bytes() -> None:
    message = NetlinkMessage(0x1C, 0x5, 7, genl(1, 1, b"abcd"))
    golden = octets("18000000 1c00 0500 07000000 00000000 01 01 0000 61626364")
    assert nl_message(message) == golden
    assert [*parse_nl_messages(golden * 2)] == [message, message]


def test_dump_over_two_messages_merges_the_peer_that_they_share() -> None:
    assert decode_wg_device([DUMP_1, DUMP_2]) == (Device(PRIVATE, 51820), STATES)


def test_sample_decodes_only_what_changed() -> None:
    payloads = [DUMP_1, DUMP_2]
    first = sample_wg_device(payloads, set())
    cut = PEER_A._replace(allowed_ips=(V4,))  # more of them stand in the second message
    assert [state for _, state in first.changed] == [STATES[0]._replace(peer=cut), STATES[1]]
    marks = {mark for mark, _ in first.changed}
    assert sample_wg_device(payloads, marks) == Reading(2, [], marks)
    shaken = DUMP_2.replace(octets("0600" + "00" * 16), octets("0600 01" + "00" * 15))
    ((_, state),) = sample_wg_device([DUMP_1, shaken], marks).changed
    assert (state.peer.public_key, state.last_handshake) == (KEY_B, 1)


# STATES[0] as the kernel puts it, up to the endpoint.
FRONT = [
    nl_attribute(1, KEY_A),
    nl_attribute(2, PSK),
    nl_attribute(6, struct.pack("=qq", 0x69372600, 5)),
    nl_attribute(5, struct.pack("=H", 25)),
    nl_attribute(8, struct.pack("=Q", 512)),
    nl_attribute(7, struct.pack("=Q", 256)),
    nl_attribute(10, struct.pack("=I", 1)),
]


def test_usual_layout_and_any_other_order_say_the_same() -> None:
    """The kernel's own order is decoded at once, any other one attribute by attribute."""
    networks = []
    for network, family in ((V4, 2), (V6, 10)):
        parts = [
            nl_attribute(3, network[-1:]),
            nl_attribute(1, struct.pack("=H", family)),
            nl_attribute(2, network[:-1]),
        ]
        networks.append(parts)
    parts = [*FRONT, nl_attribute(4, bytes(16))]
    for order in (lambda items: items, lambda items: items[::-1]):
        allowed = b"".join(nl_attribute(0x8000, b"".join(order(entry))) for entry in networks)
        data = b"".join(order([*parts, nl_attribute(0x8009, allowed)]))
        assert decode_wg_peer(data) == STATES[0]


def kernel_peer(endpoint: int, networks: tuple[bytes, ...]) -> bytes:
    """A peer as the kernel of Linux 6.12 puts it, with an endpoint of so many bytes."""
    parts = [*FRONT]
    if endpoint:
        parts.append(nl_attribute(4, bytes(endpoint)))
    entries = [
        nl_attribute(3, network[-1:])
        + nl_attribute(1, struct.pack("=H", 2 if len(network) == 5 else 10))
        + nl_attribute(2, network[:-1])
        for network in networks
    ]
    allowed = b"".join(nl_attribute(0x8000, entry) for entry in entries)
    return b"".join([*parts, nl_attribute(0x8009, allowed)])


USUAL = [
    (endpoint, networks) for endpoint in (0, 16, 28) for networks in ((), (V4,), (V6,), (V4, V6))
]


@pytest.mark.parametrize(("endpoint", "networks"), USUAL)
def test_usual_peers_are_decoded_at_once(endpoint: int, networks: tuple[bytes, ...]) -> None:
    data = kernel_peer(endpoint, networks)
    state = PeerState(WirePeer(KEY_A, PSK, networks), 0x69372600, 256, 512, endpoint > 0)
    assert wggw._decode_usual_peer(data) == wggw._decode_any_peer(data) == state


@given(
    usual=st.sampled_from(USUAL),
    edits=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), max_size=3),
    end=st.integers(0, 300) | st.none(),
)
@example(usual=(0, (V4, V6)), edits=[], end=None)
def test_what_is_decoded_at_once_is_what_the_long_way_says(
    usual: tuple[int, tuple[bytes, ...]], edits: list[tuple[int, int]], end: int | None
) -> None:
    data = bytearray(kernel_peer(*usual))
    for position, value in edits:
        data[position % len(data)] = value
    block = bytes(data[:end])
    try:
        expected = wggw._decode_any_peer(block)
    except CodecError:
        try:
            assert wggw._decode_usual_peer(block) is None
        except CodecError:
            pass
    else:
        assert wggw._decode_usual_peer(block) in (None, expected)


def test_dump_without_a_private_key_has_none() -> None:
    device, states = decode_wg_device([DUMP_1.replace(PRIVATE, bytes(32))])
    assert device == Device(b"", 51820)
    assert states[0].peer.allowed_ips == (V4,)


def test_handshake_of_nanoseconds_alone_has_happened() -> None:
    early = DUMP_1.replace(octets("0026376900000000 05"), octets("0000000000000000 05"))
    assert decode_wg_device([early])[1][0].last_handshake == 1


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
)


@settings(deadline=None)
@given(peers=st.lists(PEERS, max_size=8, unique_by=lambda peer: peer.public_key))
def test_encoded_peers_are_decoded_as_they_were(peers: list[WirePeer]) -> None:
    payloads = encode_wg_batches("wg0", [Change(peer.public_key, peer) for peer in peers])
    _, states = decode_wg_device([genl(0, 1, payload) for payload in payloads])
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
    _, states = decode_wg_device([genl(0, 1, payload) for payload in payloads])
    assert [s.peer.public_key for s in states] == [p.public_key for p in peers]
    kept = [state.peer for n, state in enumerate(states) if n % 7]
    assert kept == [peer for n, peer in enumerate(peers) if n % 7]


# --- garbled --------------------------------------------------------------------------------------


def decode_datagram(data: bytes) -> object:
    return decode_wg_device([message.payload for message in parse_nl_messages(data)])


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
        survives(lambda data: decode_wg_device([data]), DUMP_1[:length])


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
    survives(lambda raw: decode_wg_device([raw]), data)
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
def test_peer_with_a_wrong_attribute_is_a_codec_error(what: str, wrong: bytes) -> None:
    message = bytes(4) + nl_attribute(8, nl_attribute(0, wrong))
    with pytest.raises(CodecError):
        decode_wg_device([message])
