"""AmneziaWG's parameters: rules, generation, spelling. The rules here are written from the facts
about the protocol, not from wggw.py, so that the two can disagree."""

from __future__ import annotations

import base64
import collections
import functools
import itertools
import json
import random
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from harness import LONG
from hypothesis import given
from hypothesis import strategies as st

import wggw
from wggw import GENERATIONS, PRESETS, generate_obfuscation, parse_obfuscation, show_state

DATA = Path(__file__).with_name("data")
SETS = 10_000 if LONG else 1_000  # generated ones

KEY = base64.b64encode(bytes(range(32))).decode()
GOOD: dict[str, Any] = {
    "jc": 4, "jmin": 40, "jmax": 70, "s1": 30, "s2": 50, "s3": 20, "s4": 12,
    "h1": "100-200", "h2": "300-400", "h3": 500, "h4": "600",
    "i1": "<b 0xc0ff><r 10><t>", "i2": "<rd 3><rc 4>",
    "header_protection_key": KEY, "content_padding_addition": "0-32", "rekey_after_time": "90-120",
    "random_trailers": True, "disable_cookies": False,
}  # fmt: skip

# --- an independent check -------------------------------------------------------------------------

SINCE = {
    **dict.fromkeys(("jc", "jmin", "jmax", "s1", "s2", "h1", "h2", "h3", "h4"), "1.0"),
    **dict.fromkeys(("i1", "i2", "i3", "i4", "i5"), "1.5"),
    **dict.fromkeys(("s3", "s4"), "2.0"),
    **dict.fromkeys(
        (
            "header_protection_key", "content_padding_addition", "rekey_after_time",
            "rekey_timeout", "reject_after_time", "keepalive_timeout", "max_handshake_attempts",
        ),
        "3.0",
    ),
    **dict.fromkeys(("random_trailers", "disable_cookies"), "3.1"),
}  # fmt: skip


def ends(value: Any) -> tuple[int, int]:
    parts = [int(part) for part in str(value).split("-")]
    return parts[0], parts[-1]


def decoy_size(text: str) -> int:
    """Bytes of an I packet, by taking it apart with its own grammar."""
    total = 0
    for tag in re.findall(r"<([^>]*)>", text):
        name, _, argument = tag.partition(" ")
        if name == "b":
            assert argument.startswith("0x")
            total += len(bytes.fromhex(argument[2:]))
        elif name in ("t", "c"):
            assert argument == ""
            total += 4
        elif name in ("d", "ds"):
            assert argument == ""
        elif name == "wt":
            assert argument.isdecimal()
        else:
            assert name in ("r", "rd", "rc", "dz")
            total += int(argument)
    assert re.sub(r"<[^>]*>", "", text).strip(" ") == ""
    return total


# Tags that amneziawg-go knows: v0.2.13's tag_parser.go, v0.2.15's, v3.0's obf.go.
TAGS = {"1.0": (), "1.5": ("b", "r", "t", "c", "wt"), "2.0": ("b", "r", "t", "rd", "rc")}
TAGS |= dict.fromkeys(("3.0", "3.1"), (*TAGS["2.0"], "d", "ds", "dz"))


def violations(shown: dict[str, Any], generation: str) -> list[str]:
    """Every rule of the facts that a set of parameters breaks."""
    broken = []
    zero = {n: shown.get(n, 0) for n in ("jc", "jmin", "jmax", "s1", "s2", "s3", "s4")}
    if not zero["jmin"] <= zero["jmax"] <= 1280:
        broken.append("junk sizes")
    if zero["s1"] + 148 == zero["s2"] + 92:
        broken.append("one padded size")
    if max(zero["s1"] + 148, zero["s2"] + 92, zero["s3"] + 64) > 1280:
        broken.append("a padded packet above the path MTU")
    headers = [ends(shown[n]) for n in ("h1", "h2", "h3", "h4")]
    if any(not 5 <= low <= high < 2**32 for low, high in headers):
        broken.append("a header below 5 or no range")
    for index, (low, high) in enumerate(headers):
        if any(low <= b and a <= high for a, b in headers[index + 1 :]):
            broken.append("headers overlap")
    if generation < "2.0" and any(low != high for low, high in headers):
        broken.append("a range before 2.0")
    texts = [shown.get(f"i{number}", "") for number in range(1, 6)]
    if any(tag not in TAGS[generation] for tag in re.findall(r"<([a-z]+)", "".join(texts))):
        broken.append("a tag that the generation does not know")
    if any(later and not text for text, later in itertools.pairwise(texts)):
        broken.append("a gap")
    if any(int(count) > 1000 for text in texts for count in re.findall(r"<r[cd]? ([0-9]+)", text)):
        broken.append("more random bytes than programs up to 0.2.15 take")
    padded = [zero["s1"] + 148, zero["s2"] + 92, zero["s3"] + 64, zero["s4"] + 32]
    if len(set(padded)) != 4:
        broken.append("sizes that programs up to 0.2.15 refuse")
    if any(SINCE[name] > generation for name in shown if shown[name] not in (0, "", False)):
        broken.append("a parameter of a later generation")
    if shown.get("header_protection_key"):
        if len(base64.b64decode(shown["header_protection_key"], validate=True)) != 32:
            broken.append("no key of 32 bytes")
        if min(zero["s1"], zero["s2"], zero["s3"], zero["s4"]) < 12:
            broken.append("no room for the nonce of header protection")
    for number in range(1, 6):
        if not 0 <= decoy_size(shown.get(f"i{number}", "")) <= 1280:
            broken.append("a decoy above the path MTU")
    for name, since in SINCE.items():
        if since == "3.0" and name != "header_protection_key" and name in shown:
            low, high = ends(shown[name])
            if not low <= high <= 65535:
                broken.append(f"{name} is no range")
    return broken


def test_generated_sets_are_valid_and_differ() -> None:
    pairs = [(g, p) for g in GENERATIONS for p in PRESETS if (g, p) != ("1.0", "dns")]
    seen = set()
    for number in range(SETS):
        generation, preset = pairs[number % len(pairs)]
        state = generate_obfuscation(generation, preset)
        shown = show_state(state)
        assert (shown.pop("generation"), shown.pop("parameters_version")) == (generation, 1)
        assert violations(shown, generation) == []
        seen.add(tuple(shown[name] for name in ("h1", "h2", "h3", "h4")))
        assert parse_obfuscation(json.loads(json.dumps(show_state(state)))) == state
    assert len(seen) == SETS


# --- data packets that are taken for handshakes ---------------------------------------------------

SIZES = (148, 92, 64)  # of initiation, response and cookie reply


def data_sizes(shown: dict[str, Any]) -> range | set[int]:
    """Bytes on the wire of data packets: 32 and the content, which is padded to 16 or the MTU."""
    s4 = shown.get("s4", 0)
    if shown.get("random_trailers") or shown.get("content_padding_addition", 0) != 0:
        return range(s4 + 32, 2000)
    return {
        s4 + 32 + min((inner + 15) // 16 * 16, mtu)
        for mtu in (1280, 1330, 1380, 1420 - s4, 1420, 1500)
        for inner in range(mtu + 1)
    }


def window_probability(shown: dict[str, Any], offset: int, low: int, high: int) -> float:
    """How probably the four bytes at an offset of a data message are in [low, high].

    Where at most two of them are random, all of their values are tried; with more, the count of
    favourable values is bounded by the width of the range.
    """
    known: dict[int, int] = {}
    if not shown.get("header_protection_key"):
        first, last = ends(shown["h4"])
        if first == last:
            known = dict(enumerate(struct.pack("<I", first)))
        known |= dict.fromkeys(range(11, 16), 0)  # a counter below 2^24
    places = [known.get(offset + index) for index in range(4)]
    free = [index for index, byte in enumerate(places) if byte is None]
    if len(free) > 2:
        return min(1.0, float((high - low + 1) / 256 ** len(free)))
    hits = 0
    for values in itertools.product(range(256), repeat=len(free)):
        window = [byte or 0 for byte in places]
        for index, value in zip(free, values, strict=True):
            window[index] = value
        hits += low <= int(struct.unpack("<I", bytes(window))[0]) <= high
    return float(hits / 256 ** len(free))


def loss(shown: dict[str, Any], generation: str) -> float:
    """Of the data packets of the size that is worst off.

    Before 3.0 it is all of them where a client is amneziawg-go 0.2.15, which drops a packet that
    has the size of another kind and no header in its place (ProcessAWGPacket()).
    """
    sizes, s4 = data_sizes(shown), shown.get("s4", 0)
    worst: collections.Counter[int] = collections.Counter()
    for number, size in enumerate(SIZES, 1):
        padding = shown.get(f"s{number}", 0)
        if padding == s4 or not (shown.get("random_trailers") or size + padding in sizes):
            continue
        chance = window_probability(shown, padding - s4, *ends(shown[f"h{number}"]))
        chance = 1.0 if generation < "3.0" else chance
        worst[0 if shown.get("random_trailers") else size + padding] += chance  # type: ignore[assignment]
    return max(worst.values(), default=0)


def test_generated_sets_lose_no_data_packets() -> None:
    pairs = [(g, p) for g in GENERATIONS for p in PRESETS if (g, p) != ("1.0", "dns")]
    for number in range(SETS):
        state = generate_obfuscation(*pairs[number % len(pairs)])
        assert loss(show_state(state), state.generation) < 1e-7, state.parameters._asdict()


def taken_for_a_handshake(shown: dict[str, Any], packet: bytes) -> bool:
    """DeterminePacketTypeAndPadding() of amneziawg-go v3.1, for sets without header protection."""
    for number, size in enumerate(SIZES, 1):
        padding = shown.get(f"s{number}", 0)
        longer = shown.get("random_trailers") and len(packet) > padding + size
        if len(packet) == padding + size or longer:
            low, high = ends(shown[f"h{number}"])
            if low <= struct.unpack_from("<I", packet, padding)[0] <= high:
                return True
    return False


WIDE = {"h1": "100000000-900000000", "h2": "1000000000-1100000000", "h3": "1200000000-1300000000"}
LOSSES: list[tuple[dict[str, Any], int, float]] = [  # a set, its worst size, its loss
    ({**WIDE, "h4": 5, "s1": 40, "s2": 70, "s3": 99, "random_trailers": True}, 0, 1e9 / 2**32),
    ({**WIDE, "h4": 5, "s1": 44}, 148 + 44, 8e8 / 2**32),
    ({**WIDE, "h4": 5, "s1": 45}, 0, 0),  # 193 bytes are no data packet
    ({**WIDE, "h4": 5, "s1": 45, "content_padding_addition": "1-9"}, 148 + 45, 8e8 / 2**32),
    ({**WIDE, "h4": 5, "s1": 30, "s4": 30, "random_trailers": True}, 0, 2e8 / 2**32),
    # at S1 there is the packet's counter, whose upper byte is 0: small numbers are likelier
    ({"h1": "5-65540", "h2": 70000, "h3": 70001, "h4": 70002, "s1": 28, "s4": 20,
      "content_padding_addition": "1-9"}, 176, 1 / 256),
    # at S1 are one byte of the padding and three of H4
    ({"h1": "67438080-67438207", "h2": 7, "h3": 8, "h4": 0x03040506, "s1": 11, "s4": 12,
      "random_trailers": True}, 0, 0.5),
    ({"h1": "67438336-67448336", "h2": 7, "h3": 8, "h4": 0x03040506, "s1": 11, "s4": 12,
      "random_trailers": True}, 0, 0),
]  # fmt: skip


@pytest.mark.parametrize(("given_values", "size", "expected"), LOSSES)
def test_the_loss_of_a_set_is_what_a_receiver_does_with_packets(
    given_values: dict[str, Any], size: int, expected: float
) -> None:
    state = parse_obfuscation(given_values)
    probability, hit = wggw.data_loss(state.parameters)
    assert hit == size or probability == 0
    assert probability == pytest.approx(expected, rel=0.01, abs=1e-6)
    # and by trying: packets as a sender makes them
    shown, chance = show_state(state), random.Random(1)
    s4, tries = shown.get("s4", 0), 4000
    wire = size or 1200
    hits = 0
    for counter in range(tries):
        head = struct.pack("<IIQ", ends(shown["h4"])[0], chance.getrandbits(32), counter * 4099)
        body = chance.randbytes(wire - s4 - 16)
        hits += taken_for_a_handshake(shown, chance.randbytes(s4) + head + body)
    assert abs(hits / tries - probability) < 0.02


def test_given_parameters_that_lose_packets_get_a_warning_with_the_figure() -> None:
    lossy = {**WIDE, "h4": 5, "s1": 40, "s2": 70, "s3": 99, "random_trailers": "on"}
    (warning,) = wggw.obfuscation_warnings(parse_obfuscation(lossy))
    assert warning.startswith(
        "H1, H2, H3: 23 % of all data packets are taken for handshake packets"
    )
    exact = {**WIDE, "h4": 5, "s1": 44}
    warning, other = wggw.obfuscation_warnings(parse_obfuscation(exact))
    assert "19 % of all data packets of 192 bytes" in warning
    assert other.startswith("S1, S2, S3: data packets can have the size of a padded handshake")
    single = {"h1": 100, "h2": 101, "h3": 102, "h4": 103, "s1": 44}
    assert wggw.obfuscation_warnings(parse_obfuscation(single)) == [other]
    # 0.9e-4 is no warning: a span of 386,000 numbers in all
    narrow = {"h1": "100000-386000", "h2": 400000, "h3": 400001, "h4": 400002}
    few = {**narrow, "s1": 20, "s2": 70, "s3": 99, "random_trailers": True}
    assert wggw.obfuscation_warnings(parse_obfuscation(few)) == []


def test_a_clients_own_padding_that_loses_packets_is_shown_with_a_warning() -> None:
    wide = {"h1": "10000000-29999999", "h2": 5, "h3": 6, "h4": 7, "s1": 20, "s2": 70, "s3": 99}
    state = parse_obfuscation({**wide, "generation": "3.0"})
    assert wggw.obfuscation_warnings(state) == []
    text = wggw.encode_state(state)
    padded = '{"content_padding_addition": "0-64"}'
    for own in (None, "{}", '{"jc": 5}', '{"content_padding_addition": 0}'):
        assert "warnings" not in json.loads(wggw.shown_obfuscation(text, own))
    (warning,) = json.loads(wggw.shown_obfuscation(text, padded))["warnings"]
    assert warning.startswith("H1, H2, H3: 0.47 % of all data packets of 168 bytes are taken")


@pytest.mark.parametrize(
    ("interface", "own", "loses"),
    [
        ({}, {"rekey_after_time": 180}, False),
        ({}, {"rekey_after_time": 300}, False),  # the client itself ends the session after 180
        ({}, {"rekey_after_time": 300, "reject_after_time": 400}, True),
        ({}, {"rekey_after_time": 90, "reject_after_time": 400}, False),
        ({"reject_after_time": 60}, {}, False),  # the client gets the interface's value
        ({"reject_after_time": 60}, {"reject_after_time": 180}, True),
        ({"reject_after_time": 60}, {"reject_after_time": 180, "rekey_after_time": 50}, False),
        ({"reject_after_time": 60}, {"reject_after_time": 60, "rekey_after_time": 50}, False),
    ],
)
def test_a_clients_own_times_that_lose_packets_are_shown_with_a_warning(
    interface: dict[str, Any], own: dict[str, Any], loses: bool
) -> None:
    text = wggw.encode_state(parse_obfuscation({**interface, "generation": "3.0"}))
    shown = json.loads(wggw.shown_obfuscation(text, json.dumps(own)))
    assert [each[:32] for each in shown.get("warnings", ())] == (
        ["RekeyAfterTime, RejectAfterTime:"] if loses else []
    )


@pytest.mark.parametrize(
    ("generation", "own", "left"),
    [
        ("1.0", {"jc": 9, "i1": "<r 5>", "rekey_timeout": 5}, {"jc": 9}),
        ("1.5", {"i1": "<r 5>", "i2": "<r 6>"}, {"i1": "<r 5>", "i2": "<r 6>"}),
        ("1.5", {"i1": "<r 5>", "i2": "<rd 6>"}, {"i1": "<t>"}),  # the interface's packets
        ("1.5", {"i1": "", "i2": "<r 6>"}, {"i1": "<t>"}),  # refused by all of 1.5
        ("2.0", {"i1": "<wt 5><r 5>", "jc": 9}, {"i1": "<t>", "jc": 9}),
        ("3.0", {"disable_cookies": True, "keepalive_timeout": 9}, {"keepalive_timeout": 9}),
    ],
)
def test_own_values_that_a_generation_does_not_know_are_not_shown_after_a_rotation(
    generation: str, own: dict[str, Any], left: dict[str, Any]
) -> None:
    packets = {"i1": "<t>"} if generation > "1.0" else {}
    state = parse_obfuscation({"generation": generation, "jc": 3, "s1": 20, **packets})
    shown = json.loads(wggw.shown_obfuscation(wggw.encode_state(state), json.dumps(own)))
    del shown["enabled"]
    assert shown == {**show_state(state), **left}
    assert parse_obfuscation(shown).generation == generation


UNWISE: list[tuple[dict[str, Any], str]] = [
    ({"jc": 129}, "Jc: with more than 127 junk packets and I packets together"),
    ({"jc": 126, "i1": "<r 5>", "i2": "<r 5>"}, "Jc: with more than 127 junk packets"),
    ({"jmax": 1400}, "Jmax: "),
    ({"jmax": 65507}, "Jmax: "),
    ({"s1": 1133}, "S1, S2, S3: "),
    ({"i1": "<r 1281>"}, "I1, I2, I3, I4, I5: packets of more than 1280 bytes"),
    ({"reject_after_time": "60-119"}, "RejectAfterTime: below 120 seconds"),
    ({"rekey_timeout": "5-180"}, "RekeyTimeout, RejectAfterTime: a client"),
    (
        {"rekey_timeout": 130, "reject_after_time": 130},
        "RekeyTimeout, RejectAfterTime: a client",
    ),
    ({"i1": "<c><r 5>"}, "I1, I2, I3, I4, I5: <c>"),
    ({"i1": "<r 5><dz 2>"}, "I1, I2, I3, I4, I5: no kernel module knows other tags"),
    (
        {"i1": "<b 0x" + "ab" * 1100 + ">", "i2": "<b 0x" + "ab" * 1100 + ">"},
        "I1, I2, I3, I4, I5: with more than 3000 characters",
    ),
]


@pytest.mark.parametrize(("change", "warning"), UNWISE, ids=lambda x: str(x)[:40])
def test_what_programs_take_is_taken_with_a_warning_where_it_is_unwise(
    change: dict[str, Any], warning: str
) -> None:
    assert wggw.obfuscation_warnings(parse_obfuscation(GOOD)) == []
    (found,) = wggw.obfuscation_warnings(parse_obfuscation({**GOOD, **change}))
    assert found.startswith(warning)


UNWISE_FOR_A_CLIENT: list[tuple[dict[str, Any], list[str]]] = [
    ({"jc": 5, "i1": "<r 5>", "disable_cookies": True}, []),
    ({"jc": 127}, ["Jc: with more than 127 junk packets"]),
    ({"i1": "<c>"}, ["I1, I2, I3, I4, I5: <c> is known to kernel modules"]),
    ({"i1": "<r 1281>"}, ["I1, I2, I3, I4, I5: packets of more than 1280 bytes"]),
    ({"rekey_timeout": 300}, ["RekeyTimeout, RejectAfterTime: a client that begins no new"]),
    ({"reject_after_time": 60}, ["RejectAfterTime: below RekeyAfterTime (120 seconds"]),
    ({"reject_after_time": 60, "rekey_after_time": 30}, []),
]


@pytest.mark.parametrize(("own", "expected"), UNWISE_FOR_A_CLIENT, ids=lambda x: str(x)[:40])
def test_what_is_unwise_in_a_clients_own_values_is_shown_as_a_warning(
    own: dict[str, Any], expected: list[str]
) -> None:
    state = wggw.encode_state(parse_obfuscation(GOOD))
    warnings = json.loads(wggw.shown_obfuscation(state, json.dumps(own))).get("warnings", [])
    assert len(warnings) == len(expected)
    assert all(text.startswith(words) for text, words in zip(warnings, expected, strict=True))
    # what the interface's parameters bring about is told with the interface
    unwise = wggw.encode_state(parse_obfuscation({**GOOD, "jmax": 1400, "i3": "<c>"}))
    assert "warnings" not in json.loads(wggw.shown_obfuscation(unwise, '{"jc": 5}'))


UP_TO_0_2_15: list[tuple[dict[str, Any], str]] = [
    ({"s2": 86}, "S1, S2, S3, S4: "),  # S1 + 56 = S2
    ({"s1": 40}, "S1, S2, S3: data packets can have the size of a padded handshake packet"),
    ({"i1": "<r 5>", "i2": "", "i3": "<r 5>"}, "I1, I2, I3, I4, I5: a gap"),
    ({"i2": "<t><r 5><t>"}, "I1, I2, I3, I4, I5: <t> or <c> twice in one of them is refused"),
    ({"i1": "<r 1001>"}, "I1, I2, I3, I4, I5: <r N>, <rd N> and <rc N> with an N above 1000"),
    ({"i1": "<rd 1001>"}, "I1, I2, I3, I4, I5: <r N>, <rd N> and <rc N> with an N above 1000"),
]


@pytest.mark.parametrize(("change", "warning"), UP_TO_0_2_15, ids=lambda x: str(x)[:40])
def test_what_programs_of_2_0_differ_in_is_a_warning_up_to_2_0(
    change: dict[str, Any], warning: str
) -> None:
    of_2_0 = {name: value for name, value in GOOD.items() if SINCE[name] <= "2.0"}
    of_2_0 |= {"h1": 100, "h2": 101, "generation": "2.0"}
    assert wggw.obfuscation_warnings(parse_obfuscation(of_2_0)) == []
    (found,) = wggw.obfuscation_warnings(parse_obfuscation({**of_2_0, **change}))
    assert found.startswith(warning)
    newer = {**of_2_0, **change, "generation": "3.0"}
    assert wggw.obfuscation_warnings(parse_obfuscation(newer)) == []


def test_spaces_between_tags_are_kept_as_programs_keep_them() -> None:
    parameters = parse_obfuscation({**GOOD, "i1": " <b 0xc0ff> <r 64>  <t> "}).parameters
    assert parameters.i1 == "<b 0xc0ff> <r 64>  <t>"
    assert wggw.packet_size(parameters.i1) == 2 + 64 + 4


@pytest.mark.parametrize("value", ["on", "ON", "On", "true", "1", 1, True])
def test_booleans_are_taken_as_awg_and_json_write_them(value: Any) -> None:
    opposite = {"on": "off", "ON": "OFF", "On": "Off", "true": "false", "1": "0"}
    off = opposite[value] if isinstance(value, str) else type(value)(0)
    state = parse_obfuscation({**GOOD, "random_trailers": value, "disable_cookies": off})
    assert state.parameters.random_trailers is True
    assert state.parameters.disable_cookies is False


def test_random_trailers_are_shared_and_stored_own_ones_are_dropped() -> None:
    assert "random_trailers" in wggw.AWG_SHARED
    one = parse_obfuscation(GOOD).parameters
    assert not wggw.same_language(one, one._replace(random_trailers=False))
    assert wggw.same_language(one, one._replace(disable_cookies=True, jc=9))
    # what a client of an earlier version had of its own
    stored = '{"jc": 7, "random_trailers": true}'
    assert wggw.decode_own_values(stored) == {"jc": 7}


# --- generations ----------------------------------------------------------------------------------

LATE: list[tuple[str, dict[str, Any], str]] = [
    ("1.0", {"i1": "<r 5>"}, "I1: it came with generation 1.5, not 1.0"),
    ("1.5", {"i1": "<rd 5>"}, "I1: each of <rd>, <rc> came with generation 2.0, not 1.5"),
    ("1.5", {"i2": "<rc 5>", "i1": "<t>"}, "I2: each of <rd>, <rc> came with generation 2.0"),
    ("1.5", {"s3": 5}, "S3: it came with generation 2.0, not 1.5"),
    ("1.5", {"i1": "<r 5>", "i3": "<r 5>"}, "I1, I2, I3, I4, I5: a gap between them is refused"),
    ("1.5", {"i1": "<t><t>"}, "I1, I2, I3, I4, I5: <t> or <c> twice in one of them is refused"),
    ("1.5", {"i1": "<r 1001>"}, "I1, I2, I3, I4, I5: <r N>, <rd N> and <rc N> with an N above"),
    ("2.0", {"i1": "<wt 5><r 5>"}, "I1: <wt> is known to generation 1.5 only, not 2.0"),
    ("2.0", {"i1": "<dz 2>"}, "I1: each of <d>, <ds>, <dz> came with generation 3.0, not 2.0"),
    ("3.0", {"random_trailers": "on"}, "RandomTrailers: it came with generation 3.1, not 3.0"),
]


@pytest.mark.parametrize(("generation", "values", "words"), LATE)
def test_what_a_generation_cannot_do_is_refused_by_name(
    generation: str, values: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
        parse_obfuscation({"generation": generation, "s1": 20, **values})


def test_what_an_earlier_version_generated_for_1_5_still_starts_with_a_warning() -> None:
    stored = '{"generation": "1.5", "parameters_version": 3, "s1": 20, "i1": "<r 2><rc 10>"}'
    state = wggw.decode_state(stored)
    assert (state.version, state.generation, state.parameters.i1) == (3, "1.5", "<r 2><rc 10>")
    (warning,) = wggw.obfuscation_warnings(state)
    assert warning == "I1: each of <rd>, <rc> came with generation 2.0, not 1.5"
    assert wggw.decode_state(wggw.encode_state(state)) == state
    for broken in ('{"generation": "1.7"}', '{"h1": 6, "h2": 6}', "[]", "{", '{"x": 1}'):
        with pytest.raises(ValueError):
            wggw.decode_state(broken)


@pytest.mark.parametrize(
    ("text", "generation"),
    [
        ("<b 0xff><r 5><t>", "1.5"), ("<c><r 5>", "1.5"), ("<wt 100><r 5>", "1.5"),
        ("<rd 5>", "2.0"), ("<rc 5>", "2.0"), ("<r 5><dz 2>", "3.0"),
    ],
)  # fmt: skip
def test_tags_decide_the_generation(text: str, generation: str) -> None:
    assert parse_obfuscation({"i1": text}).generation == generation


@pytest.mark.parametrize(
    "values", [{"i1": "<r 1001>"}, {"i1": "<t><t>"}, {"i1": "<r 5>", "i3": "<r 5>"}]
)
def test_packets_that_1_5_refuses_are_of_2_0_where_no_generation_is_given(
    values: dict[str, Any],
) -> None:
    assert parse_obfuscation({"s1": 20, **values}).generation == "2.0"


def test_without_a_choice_parameters_are_of_the_oldest_generation() -> None:
    for preset, row in PRESETS.items():
        assert generate_obfuscation(None, preset).generation == row.since
    assert generate_obfuscation(None, wggw.DEFAULT_PRESET).generation == "1.0"


# --- which parameters an interface starts with ----------------------------------------------------


def test_the_state_wins_over_the_setting_with_and_without_peers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = wggw.Store()
    kept = parse_obfuscation({"s1": 20, "jc": 4, "parameters_version": 7})
    initial = functools.partial(wggw.initial_obfuscation, store=store, interface="awg0")
    made, is_new = initial(None)
    assert is_new and made.generation == "1.0"
    assert initial('{"s1": 20, "jc": 4}') == (kept._replace(version=1), True)
    store.apply(wggw.Record(settings={"obfuscation": wggw.encode_state(kept)}))
    for same in (None, '{"s1": 20, "jc": 4}'):
        assert initial(same) == (kept, False)
    assert "AWG_PARAMS" not in caplog.text
    for other, differs in (('{"s1": 20, "jc": 9}', "Jc"), ('{"s1": 21, "jc": 4}', "S1")):
        caplog.clear()
        assert initial(other) == (kept, False)
        assert f"AWG_PARAMS differs from the parameters of awg0 ({differs})" in caplog.text


def test_generated_sets_use_what_their_generation_brings() -> None:
    assert {len(generate_obfuscation("1.0", "default").parameters.i1) for _ in range(9)} == {0}
    assert generate_obfuscation("1.5", "default").parameters.i1
    assert generate_obfuscation("2.0", "default").parameters.s3
    assert generate_obfuscation("3.0", "light").parameters.header_protection_key
    assert generate_obfuscation("3.1", "light").parameters.random_trailers
    for generation in GENERATIONS:  # a range loses data packets where content has any size
        spans = generate_obfuscation(generation, "default").parameters[7:11]
        assert all((low != high) == (generation == "2.0") for low, high in spans)


def test_the_dns_preset_begins_with_a_dns_query() -> None:
    first = generate_obfuscation("1.5", "dns").parameters.i1
    assert decoy_size(first) == 12 + 1 + 10 + 5 + 4  # header, label, .com and its end, A and IN
    with pytest.raises(ValueError, match=r"1\.5"):
        generate_obfuscation("1.0", "dns")


@pytest.mark.parametrize(("generation", "preset"), [("4.0", "default"), ("2.0", "wild"), ("", "")])
def test_unknown_generations_and_presets_are_refused(generation: str, preset: str) -> None:
    with pytest.raises(wggw.Invalid, match="must be one of"):
        wggw.parse_fields({"generation": generation, "preset": preset}, wggw.OBFUSCATION_FIELDS)


# --- the parser -----------------------------------------------------------------------------------


def test_a_whole_set_is_parsed_and_shown_again() -> None:
    state = parse_obfuscation(GOOD)
    assert state.generation == "3.1"
    assert state.parameters.h1 == wggw.Span(100, 200)
    assert state.parameters.h4 == wggw.Span(600, 600)
    shown = show_state(state)
    assert shown["h1"] == "100-200"
    assert shown["h4"] == 600
    assert shown["header_protection_key"] == KEY
    assert parse_obfuscation(shown) == state


def test_amneziawgs_spelling_is_accepted() -> None:
    spelled = {wggw.AWG_PARAMETERS[name].spelling: value for name, value in GOOD.items()}
    assert parse_obfuscation(spelled) == parse_obfuscation(GOOD)


BROKEN: list[tuple[dict[str, Any], str | None]] = [
    ({"jc": 65536}, "Jc: "),
    ({"jc": -1}, "Jc: "),
    ({"jc": 1.5}, "Jc: "),
    ({"jc": True}, "Jc: "),
    ({"jc": "4x"}, "Jc: "),
    ({"jmin": 71}, "Jmin, Jmax: "),
    ({"jmax": 65508}, "Jmax: "),
    ({"s1": 65507 - 147}, "S1: "),
    ({"s2": 65507 - 91}, "S2: "),
    ({"s3": 65507 - 63}, "S3: "),
    ({"h1": 4}, "H1, H2, H3, H4: each"),
    ({"h1": 1, "h2": 2, "h3": 3, "h4": 5}, "H1, H2, H3, H4: each"),
    ({"h1": 2**32}, "H1: "),
    ({"h1": "200-100"}, "H1: "),
    ({"h1": "1-2-3"}, "H1: "),
    ({"h1": "-5"}, "H1: "),
    ({"h1": "100-300"}, "H1, H2, H3, H4: must not overlap"),
    ({"h3": 600}, "H1, H2, H3, H4: must not overlap"),
    ({"i1": "<B 0xff>"}, "I1: "),
    ({"i1": "<b 0xf>"}, "I1: "),
    ({"i1": "<b ff>"}, "I1: "),
    ({"i1": "<r 0>"}, "I1: "),
    ({"i1": "<r 65508>"}, "I1: "),
    ({"i1": "<r 40000><r 40000>"}, "I1: "),
    ({"i1": "<r 100000>"}, "I1: "),
    ({"i1": "<b  0xff>"}, "I1: "),
    ({"i1": "<b 0x>"}, "I1: "),
    ({"i1": "<t>\t<t>"}, "I1: "),
    ({"i1": "<c 5>"}, "I1: "),
    ({"i1": "<rr 5>"}, "I1: "),
    ({"i1": "<x 5>"}, "I1: "),
    ({"i1": "<t 5>"}, "I1: "),
    ({"i1": "hello"}, "I1: "),
    ({"i1": "<r 5>\nPostUp = reboot"}, "I1: "),
    ({"i1": "<b 0x" + "ab" * 32500 + ">"}, "I1: "),
    ({"s1": 11}, "HeaderProtectionKey, S1, S2, S3, S4: "),
    ({"s4": 0}, "HeaderProtectionKey, S1, S2, S3, S4: "),
    ({"header_protection_key": "AAAA"}, "HeaderProtectionKey: "),
    ({"header_protection_key": base64.b64encode(bytes(32)).decode()}, "HeaderProtectionKey: "),
    ({"header_protection_key": 5}, "HeaderProtectionKey: "),
    ({"content_padding_addition": "5-65536"}, "ContentPaddingAddition: "),
    ({"rekey_after_time": "9-8"}, "RekeyAfterTime: "),
    ({"random_trailers": "yes"}, "RandomTrailers: "),
    ({"generation": "1.0"}, "S3: "),
    ({"generation": "3.0"}, "RandomTrailers: "),
    ({"generation": "1.7"}, "generation: "),
    ({"generation": []}, None),
    ({"parameters_version": 0}, "parameters_version: "),
    ({"S1": 30}, "S1: is given twice"),
    ({"s5": 1}, "s5: "),
    ({"JC": 1}, "JC: "),
]


@pytest.mark.parametrize(("change", "name"), BROKEN, ids=str)
def test_each_violation_is_refused_by_name_and_rule(
    change: dict[str, Any], name: str | None
) -> None:
    if name is None:  # an empty generation is as good as none
        assert parse_obfuscation({**GOOD, **change}).generation == "3.1"
        return
    with pytest.raises(ValueError, match=f"^{re.escape(name)}"):
        parse_obfuscation({**GOOD, **change})


def test_ranges_of_headers_need_generation_2() -> None:
    plain = {"s1": 20, "s2": 30, "h1": 10, "h2": 20, "h3": 30, "h4": 40}
    assert parse_obfuscation(plain).generation == "1.0"
    assert parse_obfuscation({**plain, "h4": "40-50"}).generation == "2.0"
    with pytest.raises(ValueError, match=r"H4: a range came with generation 2\.0"):
        parse_obfuscation({**plain, "h4": "40-50", "generation": "1.5"})


def test_without_parameters_the_wire_is_plain_wireguard() -> None:
    assert parse_obfuscation({}).parameters == wggw.PLAIN
    assert [str(span) for span in wggw.PLAIN[7:11]] == ["1", "2", "3", "4"]


def test_the_key_does_not_show_in_repr() -> None:
    state = parse_obfuscation(GOOD)
    for text in (repr(state), repr(state.parameters), f"{state}"):
        assert KEY not in text
        assert "\\x01" not in text


SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=20) | st.floats()


@given(
    st.dictionaries(
        st.sampled_from([*wggw.AWG_PARAMETERS, "generation", "S1", "parameters_version", "x"]),
        SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(st.text(), SCALARS, max_size=2),
    )
)
def test_whatever_is_given_is_parsed_or_refused(given_values: dict[str, Any]) -> None:
    try:
        state = parse_obfuscation(given_values)
    except ValueError as error:
        assert str(error)  # never without words
        return
    assert parse_obfuscation(show_state(state)) == state


@given(st.text(alphabet="<>brcdtsz 0x1af9", max_size=40))
def test_decoys_are_measured_as_the_independent_grammar_does(text: str) -> None:
    try:
        size = wggw.packet_size(text)
    except ValueError:
        return
    assert size == decoy_size(text)


# --- files that `awg setconf` took, and what `awg showconf` then wrote ----------------------------


@pytest.mark.parametrize("name", [*GENERATIONS, "odd"])
def test_files_that_awg_took_are_read_as_awg_read_them(name: str) -> None:
    """Oldest programs and tools of each generation; "odd" is written as people write files."""
    taken = (DATA / f"awg-taken-{name}.conf").read_text("utf-8")
    shown = (DATA / f"awg-shown-{name}.conf").read_text("utf-8")
    state = parse_obfuscation(wggw.parse_awg_file(taken))
    assert state == parse_obfuscation(wggw.parse_awg_file(shown))
    assert state.generation == ("3.1" if name == "odd" else name)
    if name != "odd":  # and our own lines are still those that it took
        assert [*wggw.awg_quick(show_state(state))] == taken.splitlines()[2:]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it is neither JSON nor a file with [Interface]"),
        ("[Peer]\nPublicKey = x", "it is neither JSON nor a file with [Interface]"),
        ("Jc = 5\n[Interface]", "line 1 is neither JSON nor a line of [Interface]"),
        ("[Interface]\nJc 5", "line 2 is neither JSON nor a line of [Interface]"),
        ("[Interface]\n\nS5 = 5", "line 3: S5: is not a parameter of AmneziaWG"),
        ("[1]", "it is not a JSON object"),
        ('{"Jc": 5, "Jc": 6}', "a key is given twice"),
    ],
)
def test_what_is_no_file_of_parameters_is_refused_by_line(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        wggw.parse_awg_file(text)


@given(st.text(alphabet="[]Interfaceinterface=#\n S1H-<>b", max_size=80))
def test_any_text_is_a_file_of_parameters_or_refused(text: str) -> None:
    try:
        wggw.parse_awg_file(text)
    except ValueError as error:
        assert str(error)


# --- the client's file ----------------------------------------------------------------------------


def test_every_parameter_that_is_set_is_in_the_file_in_amneziawgs_spelling() -> None:
    shown = show_state(parse_obfuscation(GOOD))
    lines = dict(line.split(" = ", 1) for line in wggw.awg_quick(shown))
    assert lines["Jc"] == "4"
    assert lines["H1"] == "100-200"
    assert lines["I1"] == GOOD["i1"]
    assert lines["HeaderProtectionKey"] == KEY
    assert lines["RandomTrailers"] == "on"
    assert "DisableCookies" not in lines
    assert "generation" not in lines
    assert {wggw._AWG_NAMES[spelling] for spelling in lines} == set(GOOD) - {"disable_cookies"}
    assert list(wggw.awg_quick({})) == []
    # amneziawg-go 0.2.16 to 0.2.19 refuses a Jc of 0, and without the line it is 0, too
    plain = dict(line.split(" = ", 1) for line in wggw.awg_quick(show_state(parse_obfuscation({}))))
    assert plain == {"S1": "0", "S2": "0", "H1": "1", "H2": "2", "H3": "3", "H4": "4"}
