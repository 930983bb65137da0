"""Records in the journal: what is read is what was written, also where long lists are cut."""

from __future__ import annotations

import json

import pytest

import wggw
from wggw import Peer, Record, TrafficRow, decode_record, encode_record


@pytest.mark.parametrize(
    "count", [0, 1, wggw.READ_CHUNK - 1, wggw.READ_CHUNK, wggw.READ_CHUNK + 1, 3 * wggw.READ_CHUNK]
)
def test_a_record_is_read_as_it_was_written(count: int) -> None:
    numbers = range(1, count + 1)
    record = Record(
        put=[Peer(n, *['é"\\'] * (len(Peer._fields) - 1)) for n in numbers],
        delete=list(numbers),
        traffic=[TrafficRow(n, 1, 2, 3, 4, 5) for n in numbers],
        restart=[(n, 1, 2) for n in numbers],
        settings={},
        released=[str(n) for n in numbers],
        void=list(numbers),
    )
    assert decode_record(json.loads(encode_record(record)), Peer._fields) == record


def test_empty_parts_are_left_out_but_an_empty_list_of_released_addresses() -> None:
    assert encode_record(Record()) == b"{}"
    assert encode_record(Record(released=[])) == b'{"released":[]}'
    assert encode_record(Record(void=[7])) == b'{"void":[7]}'
