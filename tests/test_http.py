"""The pure functions of HTTP: heads, queries, JSON, keys in paths, cursors, and answers."""

from __future__ import annotations

import configparser
import hashlib
import json
import random
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

import pytest
from harness import a_key
from hypothesis import given, settings
from hypothesis import strategies as st

import wggw
from wggw import (
    MAX_HEADERS,
    MAX_JSON_DEPTH,
    GatewayError,
    Invalid,
    Malformed,
    Response,
    decode_json,
    json_extent,
    key_from_path,
    parse_head,
    parse_query,
    render_response,
    wg_quick,
)

HOST = b"Host: gateway"


def head(*lines: bytes, first: bytes = b"POST /api HTTP/1.1") -> bytes:
    return b"\r\n".join((first, *lines))


def status_of(data: bytes) -> int:
    """200, or the status of the refusal."""
    try:
        parse_head(data)
    except GatewayError as error:
        assert error.detail
        return error.status
    return 200


# --- heads ----------------------------------------------------------------------------------------

HEADS: list[tuple[str, bytes, int]] = [
    ("plain", head(HOST), 200),
    ("length", head(HOST, b"Content-Length: 5"), 200),
    ("length twice", head(HOST, b"Content-Length: 5", b"Content-Length: 6"), 400),
    ("length twice, the same", head(HOST, b"Content-Length: 5", b"content-length: 5"), 400),
    ("list of lengths", head(HOST, b"Content-Length: 5, 5"), 400),
    ("length and chunked", head(HOST, b"Content-Length: 5", b"Transfer-Encoding: chunked"), 400),
    ("chunked and length", head(HOST, b"Transfer-Encoding: chunked", b"Content-Length: 5"), 400),
    ("chunked", head(HOST, b"Transfer-Encoding: chunked"), 411),
    ("chunked, hidden", head(HOST, b"Transfer-Encoding:\tchunked "), 411),
    ("chunked, unknown coding", head(HOST, b"Transfer-Encoding: xchunked"), 411),
    ("chunked twice", head(HOST, b"Transfer-Encoding: identity", b"Transfer-Encoding: x"), 411),
    ("length with sign", head(HOST, b"Content-Length: +5"), 400),
    ("length negative", head(HOST, b"Content-Length: -5"), 400),
    ("length in hex", head(HOST, b"Content-Length: 0x5"), 400),
    ("length with underscore", head(HOST, b"Content-Length: 1_0"), 400),
    ("length empty", head(HOST, b"Content-Length:"), 400),
    ("length in other digits", head(HOST, "Content-Length: ٥".encode()), 400),
    ("length of 5000 digits", head(HOST, b"Content-Length: " + b"9" * 5000), 400),
    ("folded header", head(HOST, b"X-A: a", b" b"), 400),
    ("folded with a tab", head(HOST, b"X-A: a", b"\tContent-Length: 5"), 400),
    ("folded first line", head(b" X: y", HOST), 400),
    ("bare LF", head(HOST, b"X-A: a\nContent-Length: 5"), 400),
    ("bare CR", head(HOST, b"X-A: a\rContent-Length: 5"), 400),
    ("LF only", b"POST / HTTP/1.1\nHost: gateway", 400),
    ("CR before CRLF", head(HOST + b"\r"), 400),
    ("NUL in a value", head(HOST, b"X-A: a\0b"), 400),
    ("space before colon", head(HOST, b"Content-Length : 5"), 400),
    ("tab before colon", head(HOST, b"Content-Length\t: 5"), 400),
    ("space in a name", head(HOST, b"Content Length: 5"), 400),
    ("no name", head(HOST, b": 5"), 400),
    ("no colon", head(HOST, b"Content-Length"), 400),
    ("name not ASCII", head(HOST, "Contänt: 5".encode()), 400),
    ("empty line", head(HOST, b"", b"X: y"), 400),
    ("no host", head(), 400),
    ("two hosts", head(HOST, b"Host: other"), 400),
    ("two signatures", head(HOST, b"Signature: a", b"signature: b"), 200),  # a list, RFC 9421
    ("two timestamps", head(HOST, b"Timestamp: 1", b"timestamp: 2"), 400),
    ("two authorizations", head(HOST, b"Authorization: a", b"Authorization: b"), 400),
    ("HTTP/1.0", head(first=b"GET / HTTP/1.0"), 200),
    ("HTTP/2.0", head(HOST, first=b"GET / HTTP/2.0"), 505),
    ("HTTP/1.2", head(HOST, first=b"GET / HTTP/1.2"), 505),
    ("HTTP/0.9", b"GET /", 400),
    ("HTTP/2 preface", b"PRI * HTTP/2.0", 505),
    ("lower-case http", head(HOST, first=b"GET / http/1.1"), 400),
    ("HTTP/11", head(HOST, first=b"GET / HTTP/11"), 400),
    ("two spaces", head(HOST, first=b"GET  / HTTP/1.1"), 400),
    ("space at the end", head(HOST, first=b"GET / HTTP/1.1 "), 400),
    ("tab for a space", head(HOST, first=b"GET\t/ HTTP/1.1"), 400),
    ("space in the target", head(HOST, first=b"GET /a b HTTP/1.1"), 400),
    ("target not ASCII", head(HOST, first="GET /ü HTTP/1.1".encode()), 400),
    ("control in the target", head(HOST, first=b"GET /\x7f HTTP/1.1"), 400),
    ("empty line first", b"\r\nGET / HTTP/1.1\r\nHost: a", 400),
    ("method of 33 letters", head(HOST, first=b"G" * 33 + b" / HTTP/1.1"), 400),
    ("TLS by mistake", bytes.fromhex("160301020001000001fc0303"), 400),
    ("nothing", b"", 400),
    ("enough headers", head(HOST, *[b"X-%d: y" % n for n in range(MAX_HEADERS - 1)]), 200),
    ("too many headers", head(HOST, *[b"X-%d: y" % n for n in range(MAX_HEADERS)]), 431),
    ("huge target", head(HOST, first=b"GET /" + b"a" * 10_000 + b" HTTP/1.1"), 200),  # as is this
    ("huge value", head(HOST, b"X-A: " + b"a" * 1_000_000), 200),  # bounded by who reads it
    ("bytes in a value", head(HOST, b"X-A: \xff\xfe"), 200),
]


@pytest.mark.parametrize(("data", "status"), [row[1:] for row in HEADS], ids=[r[0] for r in HEADS])
def test_head_is_taken_or_refused(data: bytes, status: int) -> None:
    assert status_of(data) == status


def test_head_is_decoded_once_into_values() -> None:
    lines = (HOST, b"X-List: a", b"x-list:  b\t", b"Content-Length: 007", b"Expect: 100-Continue")
    found = parse_head(head(*lines, first=b"PUT /a%20b?c=d?e HTTP/1.1"))
    assert (found.method, found.path, found.query) == ("PUT", "/a%20b", "c=d?e")
    assert found.headers[b"x-list"] == b"a, b"
    assert (found.length, found.keep_alive, found.expects_continue) == (7, True, True)


TARGETS = [
    (b"/", "/", ""),
    (b"/a?b", "/a", "b"),
    (b"?b", "?b", ""),
    (b"*", "*", ""),
    (b"http://gateway:8000/a?b", "/a", "b"),
    (b"HTTPS://gateway/a", "/a", ""),
    (b"https://gateway", "/", ""),
    (b"https://gateway?b", "/", "b"),
    (b"https://user@gateway/a", "https://user@gateway/a", ""),
    (b"//other/a", "//other/a", ""),
]


@pytest.mark.parametrize(("target", "path", "query"), [t for t in TARGETS if t[0] != b"?b"])
def test_target_in_every_form(target: bytes, path: str, query: str) -> None:
    found = parse_head(head(HOST, first=b"GET %b HTTP/1.1" % target))
    assert (found.path, found.query) == (path, query)


def test_authority_of_an_absolute_target_replaces_the_host_header() -> None:
    """RFC 9112 section 3.2.2: so that nothing in between can see another host than we do."""
    found = parse_head(head(HOST, first=b"GET https://other:8443?b HTTP/1.1"))
    assert (found.headers[b"host"], found.target) == (b"other:8443", "/?b")


@pytest.mark.parametrize(
    ("version", "connection", "kept"),
    [
        (b"1.1", b"", True),
        (b"1.1", b"keep-alive", True),
        (b"1.1", b"close", False),
        (b"1.1", b"Upgrade, Close", False),
        (b"1.0", b"", False),
        (b"1.0", b"Keep-Alive", False),  # without that header in the answer it waits for the end
        (b"1.0", b"close", False),
    ],
)
def test_connection_is_kept_as_version_and_header_say(
    version: bytes, connection: bytes, kept: bool
) -> None:
    lines = [b"Connection: " + connection] if connection else []
    found = parse_head(head(HOST, *lines, first=b"GET / HTTP/" + version))
    assert found.keep_alive == kept


def test_no_two_lines_of_a_head_are_read_as_one() -> None:
    """What is between CRLFs is one header; nothing in a value can begin another."""
    for byte in range(256):
        value = b"a" + bytes([byte]) + b"Content-Length: 9"
        try:
            found = parse_head(head(HOST, b"X-A: " + value))
        except Malformed:
            continue
        assert found.length == 0
        assert set(found.headers) == {b"host", b"x-a"}


# --- queries --------------------------------------------------------------------------------------


def test_query_is_decoded() -> None:
    assert parse_query("") == {}
    assert parse_query("a=1&b=%C3%BC+x&c=&d") == {"a": "1", "b": "ü x", "c": "", "d": ""}


@pytest.mark.parametrize("query", ["a=1&a=1", "a=%ff", "%ff=a", "a&a", "&".join("abcdefgh" * 5)])
def test_ambiguous_query_is_malformed(query: str) -> None:
    with pytest.raises(Malformed):
        parse_query(query)


# --- JSON -----------------------------------------------------------------------------------------


def nested(depth: int) -> bytes:
    """An object with this many levels, objects and arrays in turn."""
    text = "0"
    for level in range(depth, 0, -1):
        text = f'{{"a":{text}}}' if level % 2 else f"[{text}]"
    return text.encode()


BAD_JSON: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"public_key=1",
    "list": b"[]",
    "string": b'"a"',
    "null": b"null",
    "duplicate": b'{"a":1,"a":2}',
    "duplicate, escaped": b'{"a":1,"\\u0061":2}',
    "duplicate inside": b'{"x":[{"a":1,"a":1}]}',
    "NaN": b'{"a":NaN}',
    "Infinity": b'{"a":Infinity}',
    "-Infinity": b'{"a":-Infinity}',
    "trailing": b'{"a":1}x',
    "two values": b"{}{}",
    "trailing comma": b'{"a":1,}',
    "comment": b'{"a":1/**/}',
    "single quotes": b"{'a':1}",
    "cut": b'{"a":"b',
    "control in a string": b'{"a":"\n"}',
    "BOM": b"\xef\xbb\xbf{}",
    "UTF-16": '{"a":1}'.encode("utf-16"),
    "Latin-1": b'{"a":"\xfc"}',
    "surrogates in UTF-8": b'{"a":"\xed\xa0\x80"}',
    "lone surrogate in a name": b'{"\\ud800":1}',
    "lone surrogate in a name, inside": b'{"a":[{"b\\udfff":1}]}',
    "overlong": b'{"a":"\xc0\xaf"}',
    "integer of 5000 digits": b'{"a":%b}' % (b"9" * 5000),
    "too deep": nested(MAX_JSON_DEPTH + 1),
    "far too deep": nested(10_000),
    "deep and cut": b'{"a":' * 10_000,
    "deep arrays": b'{"a":' + b"[" * 60_000,
}


@pytest.mark.parametrize("body", BAD_JSON.values(), ids=BAD_JSON.keys())
def test_bad_json_is_malformed(body: bytes) -> None:
    start = time.thread_time()
    with pytest.raises(Malformed):
        decode_json(body)
    assert time.thread_time() - start < 2


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b"{}", {}),
        (
            b' {"a" : [1, -2.5e3, true, null, {"a": ""}]}\r\n',
            {"a": [1, -2500.0, True, None, {"a": ""}]},
        ),
        ('{"a":"ü😀"}'.encode(), {"a": "ü😀"}),
        (b'{"a":"\\ud83d\\ude00"}', {"a": "😀"}),
        (b'{"a":"\\ud800"}', {"a": "\ud800"}),  # the fields' parsers refuse it by name
        (b'{"a":"%b"}' % (b"[" * 1000), {"a": "[" * 1000}),
        (b'{"a":[%b]}' % b",".join([b"[]"] * 1000), {"a": [[]] * 1000}),
    ],
    ids=lambda v: repr(v)[:30],
)
def test_good_json_is_decoded(body: bytes, value: Any) -> None:
    assert decode_json(body) == value


def test_json_at_the_limit_of_depth_is_decoded() -> None:
    assert decode_json(nested(MAX_JSON_DEPTH))


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text('a"\\[]{}', max_size=6)),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=15,
)


def depth_of(value: Any) -> int:
    if not isinstance(value, dict | list):
        return 0
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max(map(depth_of, inner), default=0)


@given(value=VALUES)
def test_depth_is_that_of_the_value_and_not_of_its_strings(value: Any) -> None:
    for data in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1)):
        assert json_extent(data.encode())[0] == depth_of(value)


@given(
    value=VALUES.filter(lambda value: isinstance(value, dict | list)),
    front=st.text("a ", max_size=3),
)
def test_a_value_ends_at_its_last_bracket_and_is_looked_for_no_further_than_the_limit(
    value: Any, front: str
) -> None:
    text, start = json.dumps(value).encode(), len(front)
    data = front.encode() + text + b', "]}'
    assert json_extent(data, start)[1] == start + len(text)
    assert json_extent(data, start, start + len(text))[1] == start + len(text)
    assert json_extent(data, start, start + len(text) - 1)[1] is None


def extent_byte_by_byte(data: bytes, start: int) -> tuple[int, int | None]:
    depth = deepest = 0
    quoted = escaped = False
    for position, byte in enumerate(data[start:], start + 1):
        if quoted:
            quoted = escaped or byte != ord('"')
            escaped = not escaped and byte == ord("\\")
        elif byte == ord('"'):
            quoted = True
        elif byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
            if depth > MAX_JSON_DEPTH:
                break
        elif byte in b"]}":
            depth -= 1
            if depth <= 0:
                return deepest, position
    return deepest, None


@settings(max_examples=1000)
@given(data=st.text('"\\[]{}a ,\n', max_size=20).map(str.encode), limit=st.integers(0, 20))
def test_any_bytes_have_the_extent_that_reading_byte_by_byte_finds(data: bytes, limit: int) -> None:
    for start in range(min(len(data), limit)):
        assert json_extent(data, start, limit) == extent_byte_by_byte(data[:limit], start)


DEEP = "[" * 20_000


def an_object_of_the_copy(content: bytes) -> bytes:
    digest = hashlib.sha256(content).hexdigest().encode("ascii")
    return b"wggw-copy 2 %b %b" % (digest, content)


def a_journal(content: bytes) -> bytes:
    return wggw.journal_header(0) + wggw.journal_line(1, 0, content)


@pytest.mark.parametrize(
    "parse",
    [
        wggw.load_json,
        wggw.decode_own_values,
        lambda text: list(wggw.decode_array([f"[{text}".encode()])),
        lambda text: list(wggw.decode_array([b'[{"a": %b' % text.encode()])),
        lambda text: list(wggw.decode_lines([text.encode()])),
        lambda text: wggw.parse_journal(a_journal(b'[{"put": %b' % text.encode()), "journal"),
        lambda text: wggw.decode_record({"set": {"obfuscation": text}}, wggw.Peer._fields),
        lambda text: wggw.unpack("x", an_object_of_the_copy(b'{"seal": %b}' % text.encode()), None),
    ],
)
def test_depth_is_refused_before_it_is_parsed(parse: Callable[[str], Any]) -> None:
    """Parsing it would end the process on Python 3.13, where C calls have no limit of their own."""
    refusals = (ValueError, wggw.Malformed, wggw.DamagedError, wggw.CopyDamaged)
    with pytest.raises(refusals):
        parse(DEEP)


# --- keys in paths --------------------------------------------------------------------------------

SLASHED = next(k for k in map(a_key, range(10_000)) if "/" in k and "+" in k)


def forms(key: str) -> list[str]:
    """Every form of the contract, with and without the final =."""
    path = key.replace("/", "_").replace("+", "-")
    quoted = urllib.parse.quote(key, safe="")
    shapes = [path, quoted, quoted.lower() if key == key.lower() else quoted, key]
    mixed = key.replace("/", "%2f").replace("+", "-")
    shapes += [mixed, key.replace("/", "_").replace("+", "%2b")]
    bare = [shape.removesuffix("=").removesuffix("%3D") for shape in shapes]
    return [*shapes, *bare]


@pytest.mark.parametrize("key", [SLASHED, *map(a_key, range(20))])
def test_key_in_every_form_is_the_key(key: str) -> None:
    assert {key_from_path(form) for form in forms(key)} == {key}


@pytest.mark.parametrize(
    "segment",
    [
        "",
        "=",
        "batch",
        SLASHED + "=",
        SLASHED[:-2],
        SLASHED[:-1] + "A",
        SLASHED[:-2] + "B=",  # bits behind the 32nd byte: not canonical
        "%FF" * 44,
        "%" + SLASHED,
        " " + SLASHED,
        SLASHED + "%0A",
        SLASHED + "%00",
        "ü" * 43,
        "\ud800",
        SLASHED * 2,
        "A" * 44,
        "%252F" + SLASHED[1:],
    ],
    ids=lambda s: ascii(s)[:20],
)
def test_what_is_no_key_is_none(segment: str) -> None:
    assert key_from_path(segment) is None


# --- cursors --------------------------------------------------------------------------------------


def decode_cursor(text: str) -> int:
    parsed = wggw.parse_fields({"cursor": text}, wggw.LIST_QUERY)
    return int(parsed["cursor"])


@given(peer_id=st.integers(0, 10**18 - 1))
def test_cursor_comes_back_as_it_was(peer_id: int) -> None:
    cursor = wggw._encode_cursor(peer_id)
    assert decode_cursor(cursor) == peer_id
    assert urllib.parse.quote(cursor, safe="") == cursor


@pytest.mark.parametrize("text", ["", "1", "ü", "\ud800", "Mjox", "MTotMQ", "MTo", "*" * 8])
def test_bad_cursor_is_invalid_by_name(text: str) -> None:
    with pytest.raises(Invalid, match=r"^cursor: "):
        decode_cursor(text)


# --- what is written back -------------------------------------------------------------------------

SHOWN: dict[str, Any] = {
    "assigned_ip": "10.0.1.2",
    "assigned_ipv6": "fd42::2",
    "dns_servers": ["1.1.1.1", "2620:fe::fe"],
    "mtu": 1420,
    "server_public_key": a_key("server"),
    "allowed_ips": ["0.0.0.0/0", "::/0"],
    "endpoint": "vpn.example.org:51820",
    "port": 51820,
    "persistent_keepalive": 25,
}


def sections(shown: dict[str, Any], preshared_key: str | None = None) -> dict[str, dict[str, str]]:
    """wg_quick()'s text as another program reads it."""
    parser = configparser.ConfigParser(delimiters="=", interpolation=None)
    parser.optionxform = str  # type: ignore[method-assign,assignment]
    parser.read_string(wg_quick(shown, preshared_key))
    return {name: dict(parser[name]) for name in parser.sections()}


def test_wg_quick_text_leaves_out_what_is_not_there() -> None:
    found = sections({**SHOWN, "assigned_ip": None, "endpoint": None})
    assert found["Interface"]["Address"] == "fd42::2/128"
    assert "PresharedKey" not in found["Peer"]
    assert found["Peer"]["Endpoint"] == "GATEWAY:51820"


def test_wg_quick_text_without_dns_servers_has_no_dns_line() -> None:
    """A choice that was taken out of DNS_SERVERS: clients refuse an empty value."""
    assert "DNS" not in sections({**SHOWN, "dns_servers": []})["Interface"]


DATE = "Mon, 08 Dec 2025 13:20:00 GMT"


@pytest.mark.parametrize(
    "body", [b"", b"{}", "ü".encode() * 1000, random.Random(1).randbytes(5000)]
)
@pytest.mark.parametrize("keep_alive", [True, False])
def test_answer_has_the_length_of_its_body(body: bytes, keep_alive: bool) -> None:
    response = Response(200, body, "text/plain", (("Retry-After", "5"),))
    data = render_response(response, keep_alive, False, DATE, "an-id")
    top, separator, rest = data.partition(b"\r\n\r\n")
    assert separator
    assert rest == body
    first, *lines = top.decode("ascii").split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    assert first == "HTTP/1.1 200 OK"
    assert headers["Content-Length"] == str(len(body))
    assert headers["Content-Type"] == "text/plain"
    assert headers["Retry-After"] == "5"
    assert headers["Date"] == DATE
    assert headers.get("Connection") == (None if keep_alive else "close")
    assert len(headers) == len(lines)


def test_answer_to_head_has_the_length_and_no_body() -> None:
    full = render_response(Response(404, b"{}"), True, False, DATE, "x")
    assert render_response(Response(404, b"{}"), True, True, DATE, "x") == full[:-2]
    assert full.startswith(b"HTTP/1.1 404 Not Found\r\n")
