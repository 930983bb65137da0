"""AmneziaWG's parameters on their way to an interface and back: netlink's three versions, UAPI.

Its rotation is in test_obfuscated_api.py.
"""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import golden
import pytest
from hypothesis import given
from hypothesis import strategies as st

import wggw
from wggw import (
    PLAIN,
    CodecError,
    GenericFamily,
    Obfuscation,
    Span,
    decode_awg_attribute,
    decode_genl_family,
    encode_awg_attributes,
    encode_uapi_parameters,
)

KEY = bytes(range(1, 33))
FULL = Obfuscation(
    jc=4, jmin=40, jmax=70, s1=30, s2=50, s3=20, s4=16,
    h1=Span(0x11223344, 0x11223399), h2=Span(300, 400), h3=Span(500, 500), h4=Span(600, 2**32 - 1),
    i1="<b 0xc0ff>", i2="<r 10><t>", i3="", i4="", i5="<rc 7>",
    header_protection_key=KEY,
    content_padding_addition=Span(10, 100), rekey_after_time=Span(90, 120),
    rekey_timeout=Span(5, 5), reject_after_time=Span(170, 180), keepalive_timeout=Span(8, 12),
    max_handshake_attempts=Span(14, 20), random_trailers=True, disable_cookies=True,
)  # fmt: skip
OLD = Obfuscation(
    jc=4, jmin=40, jmax=70, s1=30, s2=50,
    h1=Span(10, 10), h2=Span(20, 20), h3=Span(30, 30), h4=Span(2**32 - 1, 2**32 - 1),
)  # fmt: skip


MIDDLE = FULL._replace(**{n: getattr(PLAIN, n) for n in Obfuscation._fields[16:]})
BYTES = golden.sections("amneziawg")
GOLDEN = [(n, p, BYTES[f"version {n}"]) for n, p in enumerate((OLD, MIDDLE, FULL), 1)]


@pytest.mark.parametrize(("version", "parameters", "data"), GOLDEN)
def test_netlink_sends_the_golden_bytes_of_each_version(
    version: int, parameters: Obfuscation, data: bytes
) -> None:
    assert encode_awg_attributes(parameters, PLAIN, version) == data


@pytest.mark.parametrize(("version", "parameters", "data"), GOLDEN)
def test_netlink_reads_the_golden_bytes_of_each_version(
    version: int, parameters: Obfuscation, data: bytes
) -> None:
    # an answer of the kernel: genl header, a port, a list of peers with a keepalive of version 3
    peer = golden.octets("2400 0100") + KEY + golden.octets("0800 0500 1900 1900")
    nested = struct.pack("=HH", 4 + len(peer), 0x8000) + peer
    peers = struct.pack("=HH", 4 + len(nested), 0x8008) + nested
    payload = bytes(4) + golden.octets("0600 0600 6cca 0000") + data + peers
    device, states = golden.netlink([payload], GenericFamily(30, version, True))
    assert device == wggw.Device(b"", 51820, parameters)
    assert [state.peer.public_key for state in states] == [KEY]


def test_only_what_differs_is_sent() -> None:
    changed = FULL._replace(jc=5, i1="", header_protection_key=b"")
    expected = golden.octets("0600 0900 0500 0000  0500 1500 00 000000  2400 1a00") + bytes(32)
    assert encode_awg_attributes(changed, FULL, 3) == expected
    assert encode_awg_attributes(FULL, FULL, 3) == b""
    assert encode_uapi_parameters(FULL, FULL) == ""


def test_what_a_module_does_not_know_is_named_with_its_generation_and_who_has_it() -> None:
    old = wggw.kernel_refusals(FULL._replace(i1="<t>", i2="", i5=""), 1)
    named = [text.split(":")[0] for text in old]
    assert named[:7] == ["S3", "S4", "H1", "H2", "H4", "I1", "HeaderProtectionKey"]
    assert "H1: a range came with generation 2.0: kernel module v1.0.20251004, " in old[2]
    assert "amneziawg-go 0.2.15" in old[2]
    assert "I1: it came with generation 1.5" in old[5]
    newer = wggw.kernel_refusals(FULL, 2)
    assert newer[0].startswith("HeaderProtectionKey: it came with generation 3.0: kernel module v3")
    assert ["generation 3.0" in text for text in newer] == [True] * 7 + [False] * 2
    assert newer[7].startswith("RandomTrailers: it came with generation 3.1")
    # RandomTrailers is tried on modules of version 3, some of which may have it
    assert wggw.kernel_refusals(FULL, 3) == []
    assert wggw.kernel_refusals(OLD, 1) == []


def test_tags_and_lengths_that_no_module_takes_are_named() -> None:
    (tags,) = wggw.kernel_refusals(PLAIN._replace(i1="<wt 5><r 5><c>"), 3)
    assert tags == "I1, I2, I3, I4, I5: no kernel module knows other tags than b, c, t, r, rc, rd"
    assert wggw.kernel_refusals(PLAIN._replace(i1="<c><r 5>"), 3) == []
    long = "<b 0x" + "ab" * 800 + ">"
    assert wggw.kernel_refusals(PLAIN._replace(i1=long), 3) == []
    (both,) = wggw.kernel_refusals(PLAIN._replace(i1=long, i2=long), 3)
    assert both.startswith("I1, I2, I3, I4, I5: with more than 3000 characters together no kernel")


def test_parameters_that_may_be_the_reason_of_a_refusal_are_named() -> None:
    assert wggw.newest_parameters(FULL) == [
        "RandomTrailers: it came with generation 3.1: kernel module later than v3.0.20260805, "
        "amneziawg-go v3.1.20260812",
        "DisableCookies: it came with generation 3.1: kernel module later than v3.0.20260805, "
        "amneziawg-go v3.1.20260812",
    ]
    (tag,) = wggw.newest_parameters(OLD._replace(i1="<r 5>", i2="<rd 5>"))
    assert tag.startswith("I2: each of <rd>, <rc> came with generation 2.0: ")
    came, gap = wggw.newest_parameters(OLD._replace(i2="<r 5>"))
    assert came.startswith("I2: it came with generation 1.5: ")
    assert gap == "I1, I2, I3, I4, I5: a gap between them is refused by amneziawg-go up to 0.2.15"
    assert wggw.newest_parameters(OLD) == []


def test_a_link_that_cannot_be_made_anew_gets_its_peers_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was emptied before its removal failed, and without peers it would be of no use."""
    link = wggw.Link("awg0", (), 1420, 1, KEY, FULL, kind="amneziawg")
    with contextlib.closing(wggw.NetlinkBackend(link)) as backend:
        peer = wggw.WirePeer(KEY, b"", ())
        state = wggw.PeerState(peer, 0, 0, 0, False)
        put: list[wggw.Change] = []

        def refuse(found: wggw.FoundLink) -> str:
            raise wggw.BackendError(f"{found.name}: cannot be removed: as told")

        found = wggw.FoundLink(7, "awg0", "amneziawg", wggw.MARK)
        monkeypatch.setattr(backend, "read", lambda _: wggw.Reading(None, 1, [(1, state)], set()))
        monkeypatch.setattr(backend, "apply", put.extend)
        monkeypatch.setattr(backend._route, "find", lambda _: found)
        monkeypatch.setattr(wggw, "remove_interface", refuse)
        with pytest.raises(wggw.BackendError, match="awg0: cannot be removed: as told"):
            backend._replace_link()
        assert put == [wggw.Change(KEY, peer)]


def test_a_header_protection_key_that_must_go_needs_a_new_link() -> None:
    without = FULL._replace(header_protection_key=b"")
    assert wggw.needs_new_link(without, FULL)
    other = FULL._replace(header_protection_key=KEY[::-1])
    for wanted, actual in ((FULL, without), (other, FULL), (FULL, FULL), (OLD, PLAIN)):
        assert not wggw.needs_new_link(wanted, actual)


def test_shared_parameters_that_an_interface_did_not_take_are_named() -> None:
    dialect = wggw.Dialect("awg0")
    lost = FULL._replace(s1=0, h4=Span(4, 4), header_protection_key=b"", random_trailers=False)
    words = "awg0: did not take S1, H4, HeaderProtectionKey, RandomTrailers, so"
    with pytest.raises(wggw.BackendError, match=words):
        dialect.learn(FULL, lost)
    with pytest.raises(wggw.BackendError, match="awg0: did not take S1, so"):
        dialect.learn(PLAIN, PLAIN._replace(s1=9))


def test_what_is_told_right_after_a_set_stands_for_what_was_set() -> None:
    dialect = wggw.Dialect("awg0")

    def meant(told: Obfuscation) -> Obfuscation:
        return dialect.understand(wggw.Device(KEY, 1, told)).obfuscation

    told = PLAIN._replace(h1=Span(9, 9), i1="<t>", jmax=51)
    wanted = PLAIN._replace(jmax=50)
    assert meant(told) == told
    dialect.learn(wanted, told)
    assert meant(told) == wanted
    # others change what is told: the interface is not what was set
    assert meant(told._replace(i1="<r 5>")) == wanted._replace(i1="<r 5>")
    assert meant(told._replace(s1=9)) == wanted._replace(s1=9)
    assert meant(wanted) == wanted
    dialect.learn(PLAIN, PLAIN)
    assert meant(told) == told


def test_auto_does_not_take_amneziawg_go_in_the_kernels_place_in_silence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Refusing(wggw.UapiBackend):
        def __init__(self, link: wggw.Link, program: str | None = None) -> None:
            pass

        def setup(self, link: wggw.Link | None = None) -> None:
            raise wggw.ParametersRefused("awg0: H1: a range came with generation 2.0")

        def close(self) -> None:
            pass

    class RefusingKernel(Refusing):
        pass

    def never(*_: Any) -> Any:
        raise AssertionError("the next kind of interface was tried")

    link = wggw.Link("awg0", (), 1400, 51821, KEY, FULL, kind="amneziawg")
    monkeypatch.setattr(wggw, "NetlinkBackend", RefusingKernel)
    monkeypatch.setattr(wggw, "UapiBackend", type("Never", (), {"__init__": never}))
    with pytest.raises(wggw.ParametersRefused, match=r"H1: a range .* WG_BACKEND=uapi"):
        wggw.open_backend("auto", link)
    with pytest.raises(wggw.ParametersRefused) as kernel:
        wggw.open_backend("netlink", link)
    assert "WG_BACKEND" not in str(kernel.value)


def uapi_keys(lines: str) -> list[str]:
    return [line.partition("=")[0] for line in lines.splitlines()]


AT_1_0 = ["jc", "jmin", "jmax", "s1", "s2", "h1", "h2", "h3", "h4"]


def test_a_set_that_changes_anything_holds_all_that_its_generation_knows() -> None:
    # amneziawg-go up to 0.2.15 resets what a set does not hold, and refuses what it does not know
    lines = encode_uapi_parameters(OLD._replace(jc=5), OLD)
    assert uapi_keys(lines) == AT_1_0
    assert lines.startswith("jc=5\njmin=40\njmax=70\ns1=30\ns2=50\nh1=10\n")
    # values of later generations are taken away where there are any
    lines = encode_uapi_parameters(OLD, OLD._replace(s3=9, header_protection_key=KEY))
    assert uapi_keys(lines) == [*AT_1_0[:5], "s3", *AT_1_0[5:], "header_protection_key"]
    assert "\ns3=0\n" in lines and lines.endswith(f"header_protection_key={'00' * 32}\n")
    # 0.2.16 refuses a Jc of 0 and makes an empty I1 an empty packet: not set where there is none
    quiet = OLD._replace(jc=0, jmin=0, jmax=0, s3=9)
    assert uapi_keys(encode_uapi_parameters(quiet, PLAIN)) == [
        "s1", "s2", "s3", "s4", "h1", "h2", "h3", "h4",
    ]  # fmt: skip
    assert encode_uapi_parameters(quiet, OLD).startswith("jc=0\njmin=0\njmax=0\n")
    assert "\ni1=\n" in encode_uapi_parameters(OLD, OLD._replace(i1="<t>"))


def test_the_plain_family_reads_no_parameters() -> None:
    device, _ = golden.netlink([bytes(4) + BYTES["version 3"]])
    assert device.obfuscation == PLAIN


def test_the_familys_version_decides() -> None:
    name = golden.octets("0e00 0200 616d6e657a696177670000 00")
    head, family_id, version = (
        bytes(4),
        golden.octets("0600 0100 1d00 0000"),
        golden.octets("0800 0300 03000000"),
    )
    answer = head + name + family_id + version
    assert decode_genl_family([answer], "amneziawg") == GenericFamily(29, 3, True)
    assert decode_genl_family([answer], "wireguard") == GenericFamily(29, 3, False)
    for incomplete in (head + name + family_id, head + name + version, b""):
        with pytest.raises(CodecError):
            decode_genl_family([incomplete], "amneziawg")


@pytest.mark.parametrize("version", [1, 2, 3])
@given(name=st.sampled_from([*wggw.AWG_PARAMETERS]), data=st.binary(max_size=40))
def test_any_bytes_are_a_value_or_a_named_error(version: int, name: str, data: bytes) -> None:
    try:
        value = decode_awg_attribute(name, data, version)
    except CodecError as error:
        assert wggw.AWG_PARAMETERS[name].spelling in str(error)
    else:
        assert type(value) is type(getattr(PLAIN, name))


# --- UAPI -----------------------------------------------------------------------------------------

# What amneziawg-go prints: what is zero or empty is left out, keepalives may be ranges.
PRINTED = golden.answer("amneziawg-go")


def test_uapi_reads_all_that_amneziawg_go_prints() -> None:
    device, (state,) = golden.uapi([PRINTED])
    assert device == wggw.Device(b"\x07" * 32, 51821, FULL)
    assert (state.last_handshake, state.tx_bytes, state.rx_bytes) == (5, 7, 8)


def test_uapi_writes_what_it_reads() -> None:
    lines = encode_uapi_parameters(FULL, PLAIN)
    printed = PRINTED[PRINTED.index(b"jc=") : PRINTED.index(b"public_key=")].decode()
    assert lines == printed
    assert golden.uapi([f"{lines}errno=0\n".encode()])[0].obfuscation == FULL


@pytest.mark.parametrize(
    "line",
    ["jc=x", "s1=-1", "h1=", "h1=5-4", "h1=4294967296", "random_trailers=maybe",
     "header_protection_key=00", "rekey_timeout=1-2-3"],
)  # fmt: skip
def test_a_bad_line_is_a_named_error(line: str) -> None:
    with pytest.raises(CodecError, match=line.split("=", maxsplit=1)[0]):
        golden.uapi([f"{line}\nerrno=0\n".encode()])


@pytest.mark.parametrize("generation", wggw.GENERATIONS)
def test_generated_parameters_survive_both_codecs(generation: str) -> None:
    for _ in range(20):
        wanted = wggw.generate_obfuscation(generation, "strong").parameters
        lines = encode_uapi_parameters(wanted, PLAIN)
        assert golden.uapi([f"{lines}errno=0\n".encode()])[0].obfuscation == wanted
        attributes = encode_awg_attributes(wanted, PLAIN, 3)
        family = GenericFamily(1, 3, True)
        assert golden.netlink([bytes(4) + attributes], family)[0].obfuscation == wanted
