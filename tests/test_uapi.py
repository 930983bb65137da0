"""The codec of the cross-platform text protocol: golden text, and answers that are garbled.

The golden answer follows the example of the protocol's page (wireguard.com/xplatform).
"""

from __future__ import annotations

import itertools
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wggw
from wggw import (
    BackendError,
    Change,
    CodecError,
    Device,
    PeerState,
    Reading,
    WirePeer,
    decode_uapi_device,
    encode_uapi_changes,
    sample_uapi_device,
)

PRIVATE = "e84b5a6d2717c1003a13b431570353dbaca9146cf150c5f8575680feba52027a"
FIRST = "b85996fecc9c7f1fc6d2572a76eda11d59bcd20be8e543b15ce4bd85a8e75a33"
SECOND = "58402e695ba1772b1cc9309755f043251ea77fdcf10fbe63989ceb7e19321376"
PSK = "188515093e952f5f22e865cef3012e72f8b5f0b598ac0309d5dacce3b70fcf52"

ANSWER = f"""\
private_key={PRIVATE}
listen_port=12912
fwmark=0
public_key={FIRST}
preshared_key={PSK}
protocol_version=1
endpoint=[abcd:23::33%2]:51820
last_handshake_time_sec=1765200000
last_handshake_time_nsec=123456789
allowed_ip=fd42::2/128
allowed_ip=192.168.4.4/32
public_key={SECOND}
preshared_key={"0" * 64}
last_handshake_time_sec=0
last_handshake_time_nsec=0
tx_bytes=38333
rx_bytes=2224
persistent_keepalive_interval=111
endpoint=182.122.22.19:3233
allowed_ip=192.168.4.0/24
errno=0
""".encode()


def network(address: str, length: int) -> bytes:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.inet_pton(family, address) + bytes([length])


PEER = WirePeer(
    bytes.fromhex(FIRST),
    bytes.fromhex(PSK),
    (network("192.168.4.4", 32), network("fd42::2", 128)),
)
OTHER = WirePeer(bytes.fromhex(SECOND), b"", (network("192.168.4.0", 24),))


def test_golden_answer_is_decoded() -> None:
    device, states = decode_uapi_device([ANSWER])
    assert device == Device(bytes.fromhex(PRIVATE), 12912)
    assert states == [
        PeerState(PEER, 1765200000, 0, 0, located=True),
        PeerState(OTHER, 0, 2224, 38333, located=True),
    ]


def test_fresh_interface_has_no_key_and_no_peers() -> None:
    assert decode_uapi_device([b"errno=0\n"]) == (Device(b"", 0), [])
    zeros = f"private_key={'0' * 64}\nlisten_port=7\nerrno=0\n".encode()
    assert decode_uapi_device([zeros]) == (Device(b"", 7), [])


def test_handshake_of_nanoseconds_alone_has_happened() -> None:
    answer = f"public_key={FIRST}\nlast_handshake_time_nsec=5\nerrno=0\n".encode()
    assert decode_uapi_device([answer])[1][0].last_handshake == 1


def test_changes_are_the_golden_text() -> None:
    changes = [
        Change(PEER.public_key, PEER),
        Change(OTHER.public_key, None),
        Change(OTHER.public_key, OTHER._replace(allowed_ips=())),
    ]
    assert encode_uapi_changes(changes).decode() == (
        f"public_key={FIRST}\npreshared_key={PSK}\nreplace_allowed_ips=true\n"
        "allowed_ip=192.168.4.4/32\nallowed_ip=fd42::2/128\n"
        f"public_key={SECOND}\nremove=true\n"
        f"public_key={SECOND}\npreshared_key={'0' * 64}\nreplace_allowed_ips=true\n"
    )


def test_nothing_to_do_is_no_text() -> None:
    assert encode_uapi_changes([]) == b""


NETWORKS = st.one_of(
    st.binary(min_size=4, max_size=4).map(lambda raw: raw + b"\x20"),
    st.binary(min_size=16, max_size=16).map(lambda raw: raw + b"\x80"),
)
KEYS = st.binary(min_size=32, max_size=32)
PEERS = st.builds(
    WirePeer,
    KEYS,
    st.one_of(st.just(b""), KEYS.filter(any)),
    st.lists(NETWORKS, max_size=4).map(lambda found: tuple(sorted(found))),
)


@settings(deadline=None)
@given(peers=st.lists(PEERS, max_size=6, unique_by=lambda peer: peer.public_key))
def test_encoded_peers_are_decoded_as_they_were(peers: list[WirePeer]) -> None:
    text = encode_uapi_changes(Change(peer.public_key, peer) for peer in peers)
    _, states = decode_uapi_device([text + b"errno=0\n"])
    assert [state.peer for state in states] == peers


# --- garbled --------------------------------------------------------------------------------------


def survives(data: bytes) -> bool:
    """Whether it decodes; a BackendError says no, anything else is the test's failure."""
    try:
        decode_uapi_device([data])
    except BackendError as error:
        assert str(error)
        assert PRIVATE not in str(error)
        assert PSK not in str(error)
        return False
    return True


@given(cuts=st.lists(st.integers(0, len(ANSWER)), max_size=6))
def test_an_answer_may_come_in_any_parts(cuts: list[int]) -> None:
    places = sorted([0, *cuts, len(ANSWER)])
    parts = [ANSWER[start:end] for start, end in itertools.pairwise(places)]
    assert decode_uapi_device(parts) == decode_uapi_device([ANSWER])


def test_every_truncation_is_an_error() -> None:
    """Also one at the end of a line: the answer is whole only with its errno."""
    assert not any(survives(ANSWER[:n]) for n in range(len(ANSWER)))


def test_every_garbled_byte_is_an_error_or_a_value() -> None:
    refused = 0
    for place in range(len(ANSWER)):
        for byte in {ANSWER[place] ^ 1 << bit for bit in range(8)} | set(b"\0\n\r=-_ :/9\xff"):
            refused += not survives(ANSWER[:place] + bytes([byte]) + ANSWER[place + 1 :])
    assert refused > 1000


def usual_block(endpoint: str, networks: tuple[str, ...]) -> bytes:
    """A peer as wireguard-go writes it, behind "public_key="."""
    lines = [FIRST, f"preshared_key={PSK}", "protocol_version=1"]
    lines += [f"endpoint={endpoint}"] if endpoint else []
    lines += ["last_handshake_time_sec=1765200000", "last_handshake_time_nsec=5"]
    lines += ["tx_bytes=512", "rx_bytes=256", "persistent_keepalive_interval=0"]
    return "\n".join(lines + [f"allowed_ip={network}" for network in networks]).encode()


V4, V6 = "10.0.0.7/32", "fd42::7/128"
USUAL = [
    (endpoint, networks)
    for endpoint in ("", "192.0.2.1:5", "[2001:db8::1]:5")
    for networks in ((), (V4,), (V6,), (V4, V6))
]


@pytest.mark.parametrize(("endpoint", "networks"), USUAL)
@pytest.mark.parametrize("end", [b"", b"\n"], ids=["within", "last"])
def test_usual_peers_are_decoded_at_once(
    endpoint: str, networks: tuple[str, ...], end: bytes
) -> None:
    block = usual_block(endpoint, networks) + end
    state = wggw._decode_usual_uapi_peer(block)
    assert state == wggw._decode_any_uapi_peer(block)
    assert state == PeerState(
        WirePeer(
            bytes.fromhex(FIRST),
            bytes.fromhex(PSK),
            tuple({V4: network("10.0.0.7", 32), V6: network("fd42::7", 128)}[n] for n in networks),
        ),
        1765200000,
        256,
        512,
        bool(endpoint),
    )


@settings(max_examples=300)
@given(
    usual=st.sampled_from(USUAL),
    edits=st.lists(
        st.tuples(st.integers(0, 500), st.sampled_from(b"\n0123456789abcf.:/=g ")), max_size=3
    ),
    end=st.integers(0, 500) | st.none(),
)
def test_what_is_decoded_at_once_is_what_the_long_way_says(
    usual: tuple[str, tuple[str, ...]], edits: list[tuple[int, int]], end: int | None
) -> None:
    data = bytearray(usual_block(*usual))
    for position, value in edits:
        data[position % len(data)] = value
    block = bytes(data[:end])
    try:
        expected = wggw._decode_any_uapi_peer(block)
    except CodecError:
        try:
            assert wggw._decode_usual_uapi_peer(block) is None
        except CodecError:
            pass
    else:
        assert wggw._decode_usual_uapi_peer(block) in (None, expected)


@settings(max_examples=300)
@given(data=st.one_of(st.binary(max_size=100), st.text(max_size=60).map(str.encode)))
def test_any_bytes_are_an_error_or_a_value(data: bytes) -> None:
    survives(data)
    survives(data + b"\nerrno=0\n")
    survives(ANSWER[:-8] + data + b"\nerrno=0\n")


@pytest.mark.parametrize(
    "line",
    [
        "public_key=",
        f"public_key={FIRST[:-2]}",
        f"public_key={FIRST}00",
        f"public_key={FIRST[:-1]}g",
        f"public_key={' '.join([FIRST[:32], FIRST[32:]])}",
        f"preshared_key={PSK[:-1]}",
        "allowed_ip=192.168.4.4/33",
        "allowed_ip=192.168.4.999/32",
        "allowed_ip=",
        "allowed_ip=fd42::2/129",
        "allowed_ip=192.168.4.4/24",
        "rx_bytes=many",
        "rx_bytes=",
        "rx_bytes=-1",
        "rx_bytes=1_000",
        "rx_bytes= 1",
        "rx_bytes=18446744073709551616",
        "rx_bytes=" + "9" * 5000,
        "tx_bytes=1.5",
        "last_handshake_time_sec=-5",
        "last_handshake_time_sec=" + "9" * 30,
        "errno=zero",
        "errno=",
        "no separator",
    ],
    ids=lambda line: line[:36],
)
def test_bad_value_is_a_codec_error(line: str) -> None:
    with pytest.raises(CodecError):
        decode_uapi_device([f"public_key={FIRST}\n{line}\nerrno=0\n".encode()])


def test_refusal_is_an_error_with_the_systems_words() -> None:
    with pytest.raises(BackendError, match="Invalid argument"):
        decode_uapi_device([b"errno=22\n"])
    with pytest.raises(BackendError, match="Invalid argument"):
        decode_uapi_device([b"errno=-22\n"])


def test_answer_without_errno_is_a_codec_error() -> None:
    with pytest.raises(CodecError):
        decode_uapi_device([b""])


def test_sample_decodes_only_what_changed() -> None:
    first = sample_uapi_device([ANSWER], set())
    assert first.peers == len(first.changed) > 1 and not first.same
    assert [state for _, state in first.changed] == decode_uapi_device([ANSWER])[1]
    marks = {mark for mark, _ in first.changed}
    assert sample_uapi_device([ANSWER], marks) == Reading(first.peers, [], marks)
    counted = ANSWER.replace(b"rx_bytes=2224", b"rx_bytes=2225")
    again = sample_uapi_device([counted], marks)
    assert [state.rx_bytes for _, state in again.changed] == [2225]
    assert again.peers == first.peers and len(again.same) == first.peers - 1


def test_sample_of_a_failed_or_cut_answer_is_an_error() -> None:
    with pytest.raises(BackendError):
        sample_uapi_device([b"errno=1\n"], set())
    with pytest.raises(CodecError):
        sample_uapi_device([ANSWER[:-10]], set())
