"""The codec of nftables' sets: golden bytes, and garbled messages."""

from __future__ import annotations

import os
import sys

import golden
import pytest
from hypothesis import given
from hypothesis import strategies as st

import wggw
from wggw import CodecError, Member, decode_counters, decode_members, encode_members

pytestmark = pytest.mark.skipif(
    sys.byteorder != "little", reason="the golden bytes are little-endian"
)

GOLDEN = golden.sections("nftables")
TWO = [Member("slow", bytes([10, 0, 1, 2])), Member("slow", bytes([10, 0, 1, 3]))]

addresses = st.one_of(st.binary(min_size=4, max_size=4), st.binary(min_size=16, max_size=16))
members = st.builds(Member, st.sampled_from(["slow", "fast", "web-only"]), addresses)


def test_members_are_the_golden_bytes() -> None:
    assert [*encode_members(TWO)] == [GOLDEN["two members"]]


@pytest.mark.parametrize("name", ["two members", "two members of nft"])
def test_members_are_read(name: str) -> None:
    assert [*decode_members([GOLDEN[name]], "slow")] == TWO


def test_counter_is_read() -> None:
    assert [*decode_counters([GOLDEN["one counter"]])] == [("slow.down", 0x1234)]


@given(st.lists(members, max_size=50))
def test_what_is_encoded_is_read(given: list[Member]) -> None:
    found = []
    for payload in encode_members(given):
        attributes = dict(wggw.parse_nl_attributes(payload[4:]))
        name = attributes[wggw.NFTA_SET_ELEM_LIST_SET].rstrip(b"\0").decode()
        found += [*decode_members([payload], name.rpartition(".")[0])]
    assert sorted(found) == sorted(given)


def test_many_members_are_cut_into_messages_that_fit() -> None:
    many = [Member("slow", number.to_bytes(4, "big")) for number in range(20000)]
    payloads = [*encode_members(many)]
    assert all(len(payload) < 2**16 for payload in payloads)
    assert [m for payload in payloads for m in decode_members([payload], "slow")] == many


@given(st.binary(max_size=200))
def test_garbled_answers_are_refused(data: bytes) -> None:
    for decode in (lambda: [*decode_members([data], "slow")], lambda: [*decode_counters([data])]):
        try:
            decode()
        except CodecError:
            pass


@given(st.data())
def test_an_answer_that_was_changed_is_refused_or_read(data: st.DataObject) -> None:
    broken = bytearray(GOLDEN["two members"])
    broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = [*decode_members([bytes(broken)], "slow")]
    except CodecError:
        return
    assert all(len(member.address) in (4, 16) for member in found)


def test_member_shows_no_address() -> None:
    assert "10" not in repr(TWO[0]) and "\\n" not in repr(TWO[0])


CLASSES = (
    '{"slow": {"down": "10mbit", "up": "1.5mbit"}, "web": {"destinations": ["192.0.2.0/24"]}, '
    '"open": {"destinations": ["0.0.0.0/0", "::/0", "10.0.0.0/8"]}, "plain": {}}'
)


def classes(text: str) -> wggw.Config:
    given = {"GATEWAY_API_KEY": "a secret of some length", "SERVICE_CLASSES": text}
    return wggw.load_config(given, os.devnull)


def test_classes_are_parsed() -> None:
    found = classes(CLASSES).service_classes
    assert found["slow"] == wggw.ServiceClass(1_250_000, 187_500, None)
    assert found["plain"] == wggw.ServiceClass(None, None, None)
    assert len(found["open"].destinations or ()) == 3


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"slow": 1}',
        '{"slow": {"down": 10}}',
        '{"slow": {"down": "10"}}',
        '{"slow": {"down": "10mbps"}}',
        '{"slow": {"down": "0mbit"}}',
        '{"slow": {"down": "7kbit"}}',
        '{"slow": {"down": "-1mbit"}}',
        '{"slow": {"rate": "1mbit"}}',
        '{"slow": {"destinations": []}}',
        '{"slow": {"destinations": "10.0.0.0/8"}}',
        '{"slow": {"destinations": ["10.0.0.1/8"]}}',
        '{"slow.x": {}}',
        '{"1": {}}',
        '{"": {}}',
        "{%s}" % ", ".join(f'"c{n}": {{}}' for n in range(65)),
    ],
)
def test_bad_classes_are_refused_by_name(text: str) -> None:
    with pytest.raises(wggw.ConfigError, match="SERVICE_CLASSES"):
        classes(text)


@pytest.mark.parametrize(
    ("text", "rate"),
    [("8kbit", 1000), ("8000bit", 1000), ("0.5gbit", 62_500_000), ("100MBIT", 12_500_000)],
)
def test_rates_have_the_suffixes_of_tc(text: str, rate: int) -> None:
    assert wggw.parse_bit_rate(text) == rate


def test_ruleset_names_each_class_and_drops_by_family() -> None:
    config = classes(CLASSES)
    text = wggw.render_classes(config.service_classes, wggw.interface_settings(config))
    rules = [line for line in text.splitlines() if line.startswith("    ")]
    assert len([rule for rule in rules if "@slow." in rule]) == 4
    web = [rule for rule in rules if "@web." in rule]
    assert "ip daddr != { 192.0.2.0/24 }" in web[0] and web[1].endswith("web.refused drop")
    assert "daddr !=" not in web[1]  # it names no IPv6: all of it is refused
    assert not [rule for rule in rules if "@open." in rule or "@plain." in rule]
