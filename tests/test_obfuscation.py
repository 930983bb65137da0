"""AmneziaWG's parameters: rules, generation, spelling. The rules here are written from the facts
about the protocol, not from wggw.py, so that the two can disagree."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import wggw
from wggw import GENERATIONS, PRESETS, generate_obfuscation, parse_obfuscation, show_state

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
        elif name == "t":
            assert argument == ""
            total += 4
        else:
            assert name in ("r", "rd", "rc")
            total += int(argument)
    assert re.sub(r"<[^>]*>", "", text) == ""
    return total


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


def test_ten_thousand_generated_sets_are_valid_and_differ() -> None:
    pairs = [(g, p) for g in GENERATIONS for p in PRESETS if (g, p) != ("1.0", "dns")]
    seen = set()
    for number in range(10_000):
        generation, preset = pairs[number % len(pairs)]
        state = generate_obfuscation(generation, preset)
        shown = show_state(state)
        assert (shown.pop("generation"), shown.pop("parameters_version")) == (generation, 1)
        assert violations(shown, generation) == []
        seen.add(tuple(shown[name] for name in ("h1", "h2", "h3", "h4")))
        assert parse_obfuscation(json.loads(json.dumps(show_state(state)))) == state
    assert len(seen) == 10_000


def test_generated_sets_use_what_their_generation_brings() -> None:
    assert {len(generate_obfuscation("1.0", "default").parameters.i1) for _ in range(9)} == {0}
    assert generate_obfuscation("1.5", "default").parameters.i1
    assert generate_obfuscation("2.0", "default").parameters.s3
    assert generate_obfuscation("3.0", "light").parameters.header_protection_key
    assert generate_obfuscation("3.1", "light").parameters.random_trailers


def test_the_dns_preset_begins_with_a_dns_query() -> None:
    first = generate_obfuscation("1.5", "dns").parameters.i1
    assert decoy_size(first) == 12 + 1 + 10 + 5 + 4  # header, label, .com and its end, A and IN
    with pytest.raises(ValueError, match=r"1\.5"):
        generate_obfuscation("1.0", "dns")


@pytest.mark.parametrize(("generation", "preset"), [("4.0", "default"), ("2.0", "wild"), ("", "")])
def test_unknown_generations_and_presets_are_refused(generation: str, preset: str) -> None:
    with pytest.raises(ValueError, match="must be one of"):
        generate_obfuscation(generation, preset)


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
    ({"jc": 129}, "Jc: "),
    ({"jc": -1}, "Jc: "),
    ({"jc": 1.5}, "Jc: "),
    ({"jc": True}, "Jc: "),
    ({"jc": "4x"}, "Jc: "),
    ({"jmin": 71}, "Jmin, Jmax: "),
    ({"jmax": 1281}, "Jmax: "),
    ({"s1": 1133}, "S1: "),
    ({"s2": 1189}, "S2: "),
    ({"s3": 1217}, "S3: "),
    ({"s2": 86}, "S1, S2: "),
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
    ({"i1": "<r 1281>"}, "I1: "),
    ({"i1": "<r 700><r 700>"}, "I1: "),
    ({"i1": "<x 5>"}, "I1: "),
    ({"i1": "<t 5>"}, "I1: "),
    ({"i1": "hello"}, "I1: "),
    ({"i1": "<r 5>\nPostUp = reboot"}, "I1: "),
    ({"i1": "<b 0x" + "ab" * 1200 + ">", "i2": "<b 0x" + "ab" * 1200 + ">"}, "I1, I2, I3, I4, I5"),
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


@given(st.text(alphabet="<>brcdt 0x1af9", max_size=40))
def test_decoys_are_measured_as_the_independent_grammar_does(text: str) -> None:
    try:
        size = wggw.packet_size(text)
    except ValueError:
        return
    assert size == decoy_size(text)


# --- the client's file ----------------------------------------------------------------------------


def test_every_parameter_that_is_set_is_in_the_file_in_amneziawgs_spelling() -> None:
    shown = show_state(parse_obfuscation(GOOD))
    lines = dict(line.split(" = ", 1) for line in wggw.awg_quick(shown))
    assert lines["Jc"] == "4"
    assert lines["H1"] == "100-200"
    assert lines["I1"] == GOOD["i1"]
    assert lines["HeaderProtectionKey"] == KEY
    assert lines["RandomTrailers"] == "true"
    assert "DisableCookies" not in lines
    assert "generation" not in lines
    assert {wggw._AWG_NAMES[spelling] for spelling in lines} == set(GOOD) - {"disable_cookies"}
    assert list(wggw.awg_quick({})) == []
