"""The codec of the cross-platform text protocol: golden text, and answers that are garbled.

The golden answer follows the example of the protocol's page (wireguard.com/xplatform).
"""

from __future__ import annotations

import itertools
import socket

import golden
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wggw import (
    BackendError,
    Change,
    CodecError,
    Device,
    PeerState,
    WirePeer,
    encode_uapi_changes,
    read_uapi_device,
)

PRIVATE = "e84b5a6d2717c1003a13b431570353dbaca9146cf150c5f8575680feba52027a"
FIRST = "b85996fecc9c7f1fc6d2572a76eda11d59bcd20be8e543b15ce4bd85a8e75a33"
SECOND = "58402e695ba1772b1cc9309755f043251ea77fdcf10fbe63989ceb7e19321376"
PSK = "188515093e952f5f22e865cef3012e72f8b5f0b598ac0309d5dacce3b70fcf52"

ANSWER = golden.answer("wireguard-go")


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
    device, states = golden.uapi([ANSWER])
    assert device == Device(bytes.fromhex(PRIVATE), 12912)
    assert states == [
        PeerState(PEER, 1765200000, 0, 0, located=True),
        PeerState(OTHER, 0, 2224, 38333, located=True),
    ]


def test_fresh_interface_has_no_key_and_no_peers() -> None:
    assert golden.uapi([b"errno=0\n"]) == (Device(b"", 0), [])
    zeros = f"private_key={'0' * 64}\nlisten_port=7\nerrno=0\n".encode()
    assert golden.uapi([zeros]) == (Device(b"", 7), [])


def test_handshake_of_nanoseconds_alone_has_happened() -> None:
    answer = f"public_key={FIRST}\nlast_handshake_time_nsec=5\nerrno=0\n".encode()
    assert golden.uapi([answer])[1][0].last_handshake == 1


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
    st.just(""),  # nftables has the class
)


@settings(deadline=None)
@given(peers=st.lists(PEERS, max_size=6, unique_by=lambda peer: peer.public_key))
def test_encoded_peers_are_decoded_as_they_were(peers: list[WirePeer]) -> None:
    text = encode_uapi_changes(Change(peer.public_key, peer) for peer in peers)
    _, states = golden.uapi([text + b"errno=0\n"])
    assert [state.peer for state in states] == peers


# --- garbled --------------------------------------------------------------------------------------


def survives(data: bytes) -> bool:
    """Whether it decodes: a BackendError or an unreadable peer says no, nothing else may."""
    try:
        reading = read_uapi_device([data])
    except BackendError as error:
        assert str(error)
        assert PRIVATE not in str(error)
        assert PSK not in str(error)
        return False
    return not reading.unreadable


@given(cuts=st.lists(st.integers(0, len(ANSWER)), max_size=6))
def test_an_answer_may_come_in_any_parts(cuts: list[int]) -> None:
    places = sorted([0, *cuts, len(ANSWER)])
    parts = [ANSWER[start:end] for start, end in itertools.pairwise(places)]
    assert golden.uapi(parts) == golden.uapi([ANSWER])


def test_every_truncation_is_an_error() -> None:
    """Also one at the end of a line: the answer is whole only with its errno."""
    assert not any(survives(ANSWER[:n]) for n in range(len(ANSWER)))


def test_every_garbled_byte_is_an_error_or_a_value() -> None:
    refused = 0
    for place in range(len(ANSWER)):
        for byte in {ANSWER[place] ^ 1 << bit for bit in range(8)} | set(b"\0\n\r=-_ :/9\xff"):
            refused += not survives(ANSWER[:place] + bytes([byte]) + ANSWER[place + 1 :])
    assert refused > 1000


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
def test_bad_value_makes_its_peer_unreadable_and_no_other(line: str) -> None:
    answer = f"public_key={FIRST}\n{line}\npublic_key={SECOND}\nerrno=0\n"
    if line.startswith("public_key="):
        answer = f"{line}\npublic_key={SECOND}\nerrno=0\n"
    reading = read_uapi_device([answer.encode()])
    assert (reading.peers, reading.unreadable) == (2, 1)
    assert [state.peer.public_key.hex() for _, state in reading.changed] == [SECOND]


def test_refusal_is_an_error_with_the_systems_words() -> None:
    with pytest.raises(BackendError, match="Invalid argument"):
        golden.uapi([b"errno=22\n"])
    with pytest.raises(BackendError, match="Invalid argument"):
        golden.uapi([b"errno=-22\n"])


def test_answer_without_errno_is_a_codec_error() -> None:
    with pytest.raises(CodecError):
        golden.uapi([b""])


def test_known_peers_are_not_decoded() -> None:
    first = read_uapi_device([ANSWER])
    assert first.peers == len(first.changed) > 1 and not first.same
    marks = {mark for mark, _ in first.changed}
    second = read_uapi_device([ANSWER], marks)
    assert (second.peers, second.changed, second.same) == (first.peers, [], marks)
    counted = ANSWER.replace(b"rx_bytes=2224", b"rx_bytes=2225")
    again = read_uapi_device([counted], marks)
    assert [state.rx_bytes for _, state in again.changed] == [2225]
    assert again.peers == first.peers and len(again.same) == first.peers - 1
