"""Reading outside input takes time and memory in proportion to it, whatever it is made of.

Each parser reads inputs of two sizes, the one four times the other, made of what its expressions
and loops could stumble over: the larger one may cost five times as much, never sixteen.
"""

from __future__ import annotations

import base64
import contextlib
import gc
import hashlib
import hmac
import itertools
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from harness import some

import wggw

RATIO = 5  # of the costs of two inputs, the one four times as long as the other
HARMLESS = 20e-9  # seconds for each byte of the larger one: below, its ratio is noise
RUINOUS = 25e-6  # seconds for each byte of the smaller one: the larger one is then not tried
ROUNDS = 40  # measurements, each of both, until the ratio is found to be right
MEMORY = 64  # bytes for each byte of input if the row says nothing else, and
MEMORY_FREE = 128 * 1024  # bytes whatever the input

Parse = Callable[[bytes], object]
Make = Callable[[int], bytes]  # an input of about so many bytes


def seconds(parse: Parse, data: bytes) -> float:
    """What this thread's processor time says of one call, others on the machine left out."""
    started = time.thread_time()
    parse(data)
    return time.thread_time() - started


def fault_in_time(parse: Parse, make: Make, size: int) -> str:
    """What is wrong with the growth from a quarter of `size` to `size`, nothing if it is right."""
    small, large = make(size // 4), make(size)
    parse(make(1024))  # what a first call costs once
    low = seconds(parse, small)
    if low > RUINOUS * len(small):
        return f"{len(small)} bytes take {low:.3f} s"
    high = seconds(parse, large)
    for _ in range(ROUNDS):
        if high <= max(RATIO * low, HARMLESS * len(large)):
            return ""
        low, high = min(low, seconds(parse, small)), min(high, seconds(parse, large))
    return f"{len(small)} bytes take {low * 1e3:.3f} ms, {len(large)} take {high * 1e3:.3f}"


def peak_memory(parse: Parse, data: bytes) -> int:
    """Bytes that Python had at most while it parsed, the input aside."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        parse(data)
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


# --- what inputs are made of ----------------------------------------------------------------------

FILLINGS: dict[str, bytes] = {
    "blanks": b" ",
    "tabs": b"\t",
    "blanks and tabs": b" \t",
    "commas": b",",
    "commas and blanks": b", ",
    "quotes": b'"',
    "single quotes": b"'",
    "empty strings": b'"" ',
    "strings": b'"a",',
    "backslashes": b"\\",
    "escaped quotes": b'\\"',
    "escapes": b"\\u00e9",
    "percent signs": b"%",
    "percent encodings": b"%41",
    "plus signs": b"+",
    "colons": b":",
    "pairs of colons": b":: ",
    "semicolons": b";",
    "semicolons and blanks": b"; ",
    "digits": b"9",
    "numbers": b"9,",
    "long numbers": b"9" * 4000 + b",",
    "letters": b"a",
    "words": b"a ",
    "open brackets": b"[",
    "open braces": b"{",
    "nesting": b'{"a":',
    "brackets": b"[]",
    "objects": b"{},",
    "open parentheses": b"(",
    "parentheses": b"() ",
    "dashes": b"-",
    "dots": b".",
    "equals signs": b"=",
    "slashes": b"/",
    "segments": b"/a",
    "ampersands": b"&",
    "fields": b"a=1,",
    "parameters": b";a=1",
    "query": b"a=1&",
    "lines": b"a=1\n",
    "newlines": b"\n",
    "empty lines": b"\r\n",
    "headers": b"a: b\r\n",
    "carriage returns": b"\r",
    "comments": b" #",
    "hashes": b"#",
    "letters of two bytes": "é".encode(),
    "what is not UTF-8": b"\xff",
    "zeros": b"\0",
    "tags": b"<t>",
    "open tags": b"<",
    "packets": b"<b 0x00>",
    "base64": b"AAAA",
    "ends of an answer": b"errno=0\n",
    "peers": b"\npublic_key=" + b"0" * 64,
    "allowed IPs": b"allowed_ip=10.0.0.1/32\n",
    "certificates' beginnings": b"-----BEGIN CERTIFICATE-----\n",
    "rules": b"\tiifname accept accept\n",
    "codes": b"<Code>",
    "empty DER": b"\x05\x00",
    "DER": b"\x30\x02\x05\x00",
    "attributes": struct.pack("=HH", 4, 8),
}


def filled(front: bytes, filling: bytes, behind: bytes) -> Make:
    def make(size: int) -> bytes:
        count = max(1, (size - len(front) - len(behind)) // len(filling))
        return front + filling * count + behind

    return make


def counted(front: bytes, template: str, behind: bytes, end: bytes = b"") -> Make:
    """Fields that all differ: the template with a number in it, `end` taken off the last one."""

    def make(size: int) -> bytes:
        texts: list[bytes] = []
        left = size - len(front) - len(behind)
        for number in itertools.count():
            texts.append(template.format(number).encode())
            left -= len(texts[-1])
            if left <= 0:
                break
        return front + b"".join(texts).removesuffix(end) + behind

    return make


# --- the parsers ----------------------------------------------------------------------------------

SECRET = "k" * 32
NOW = 1_000_000_000
HEAD = b"GET /api/v1/configurations HTTP/1.1\r\nHost: a\r\n"
GOOD = b';created=1000000000;nonce="n";keyid="default"'
MAC = b"Signature: a=:" + base64.b64encode(bytes(32)) + b":\r\n"
NAMED = (wggw.GatewayError, wggw.BackendError, wggw.StartError, wggw.DamagedError, ValueError)


def allow(parse: Parse, *errors: type[Exception]) -> Parse:
    """The parser when a refusal is as good as an answer; iterators are read to their end."""

    def tried(data: bytes) -> None:
        with contextlib.suppress(*NAMED, *errors):
            found = parse(data)
            if isinstance(found, Iterator):
                for _ in found:
                    pass

    return tried


def text_of(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def strangers_head(data: bytes) -> None:
    """All that a request without a right signature goes through."""
    head = wggw.parse_head(data)
    authenticator = wggw.Authenticator({"default": SECRET, "b": SECRET}, 60, lambda: NOW)
    host = head.headers.get(b"host", b"").decode("latin-1")
    message = wggw.SignedMessage(head.method, host, head.target, head.headers, head.length)
    with pytest.raises(wggw.Unauthorized):
        authenticator.verify(message)


class SlowHead(wggw.Connection):
    """A connection whose head comes byte by byte, and that does nothing with it."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._scanned = 0
        self.ended = False

    def _wait(self, phase: wggw.Phase, seconds: float) -> None:
        pass

    def _begin_request(self) -> None:
        pass

    def _try(self, data: bytes) -> None:
        self.ended = True

    def _refuse(self, error: wggw.GatewayError) -> None:
        self.ended = True


def slow_head(data: bytes) -> None:
    connection = SlowHead()
    for byte in data:
        connection._buffer.append(byte)
        connection._take_head()
        if connection.ended:
            return


def pieces(data: bytes, size: int = 100) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


def settings(data: bytes) -> None:
    """The text as the value of each setting."""
    text = text_of(data)
    for setting in wggw.SETTINGS:
        with contextlib.suppress(wggw.ConfigError):
            wggw._parse_setting(setting, {setting.name: text}, True)


def awg(data: bytes) -> None:
    """The text as the value of each of AmneziaWG's parameters, and as a whole set of them."""
    text = text_of(data)
    for name in wggw.AWG_PARAMETERS:
        with contextlib.suppress(ValueError):
            wggw.awg_values({name: text})
    with contextlib.suppress(ValueError):
        wggw.packet_size(text)
    wggw.decode_own_values(text)


def fields(data: bytes) -> None:
    """The text as the value of each field of a request and of its query."""
    text = text_of(data)
    for table in (wggw.SYNC_FIELDS, wggw.OBFUSCATION_FIELDS, wggw.LIST_QUERY):
        for row in table.values():
            with contextlib.suppress(wggw.Invalid, ValueError, TypeError):
                row.parse(text)


def body(data: bytes) -> None:
    """A body and the fields in it."""
    parsed = wggw.decode_json(data)
    wggw._decode_operation(parsed)
    wggw.parse_fields(parsed, wggw.SYNC_FIELDS)


def journal(data: bytes) -> None:
    with contextlib.suppress(wggw.DamagedError):
        wggw.parse_journal(data, "journal")
    file = wggw.parse_journal(data, "journal", salvage=True)
    for record in (record for landing in file.landings for record in landing.records):
        with contextlib.suppress(*wggw._BAD_RECORD):
            wggw.decode_record(record, file.columns)


def an_object_of_the_copy(content: bytes) -> object:
    """The content with its checksum right, and the bytes as they are."""
    with contextlib.suppress(wggw.CopyDamaged):
        wggw.unpack("x", content, None)
    digest = hashlib.sha256(content).hexdigest().encode("ascii")
    return wggw.unpack("x", b"wggw-copy 2 %b %b" % (digest, content), None)


def chains(data: bytes) -> object:
    return list(wggw.foreign_chains(text_of(data), "forward"))


def in_file(parse: Callable[[str], object]) -> Callable[[Path], Parse]:
    """A parser that reads a file."""

    def bind(directory: Path) -> Parse:
        path = directory / "file"

        def through_file(data: bytes) -> object:
            path.write_bytes(data)
            path.chmod(0o600)
            return parse(str(path))

        return through_file

    return bind


KEY_FILE = wggw.InterfaceSettings("WG", "wg0", {}, (51820,), 1420, "")


def uapi(data: bytes) -> None:
    """A userspace WireGuard's answer, which comes in parts."""
    wggw.read_uapi_device(pieces(data))


def netlink(data: bytes) -> None:
    """The payload of one message of a dump, and the same bytes as a datagram."""
    family = wggw.GenericFamily(1, 2, True)
    with contextlib.suppress(wggw.CodecError):
        wggw.parse_nl_error(data, wggw.NLM_F_ACK_TLVS | wggw.NLM_F_CAPPED)
    with contextlib.suppress(wggw.CodecError):
        list(wggw.parse_nl_messages(data))
    wggw.read_wg_device([bytes(4) + data], family)


def netlink_peers(data: bytes) -> None:
    """The bytes as nested attributes of peers, over as many messages as they take."""
    attributes = wggw.nl_attribute(wggw.WGDEVICE_A_PEERS, b"")[2:4]
    messages = []
    for piece in pieces(data, PEER_BYTES * 100):
        head = struct.pack("=H", 4 + len(piece)) + attributes
        messages.append(bytes(4) + head + piece)
    wggw.read_wg_device(messages)


def a_wire_peer(number: int) -> bytes:
    """A peer with an allowed IP, as an attribute; the key goes by the number."""
    address = wggw.nl_attribute(wggw.WGALLOWEDIP_A_IPADDR, struct.pack(">I", 1))
    mask = wggw.nl_attribute(wggw.WGALLOWEDIP_A_CIDR_MASK, b"\x20")
    networks = wggw.nl_attribute(0, address + mask)
    key = wggw.nl_attribute(wggw.WGPEER_A_PUBLIC_KEY, number.to_bytes(32, "big"))
    return wggw.nl_attribute(0, key + wggw.nl_attribute(wggw.WGPEER_A_ALLOWEDIPS, networks))


PEER_BYTES = len(a_wire_peer(1))


def wire_peers(numbers: Callable[[], Iterable[int]]) -> Make:
    """As many peers as fit, their keys by the numbers."""
    return lambda size: b"".join(map(a_wire_peer, itertools.islice(numbers(), size // PEER_BYTES)))


def attributes(kind: int, filling: bytes) -> Make:
    """An attribute that is filled with something."""
    return lambda size: wggw.nl_attribute(kind, filling * (size // len(filling)))


def nested_der(size: int) -> bytes:
    """As many values as fit, in the two containers that a certificate has."""
    content = b"\x05\x00" * (size // 2)
    for _ in range(2):
        content = b"\x30\x84" + len(content).to_bytes(4, "big") + content
    return content


def torn_journal(size: int) -> bytes:
    """One bad record in front of many that are good, none of which knew it to be on disk."""
    lines = [wggw.journal_header(0), b"x\n"]
    left = size
    for number in itertools.count(2):
        lines.append(wggw.journal_line(number, 0, b'[{"put":[],"del":[]}]'))
        left -= len(lines[-1])
        if left <= 0:
            return b"".join(lines)


def rules(size: int) -> bytes:
    """As many chains at the hook as rules, all in one table."""
    chain = (
        "\tchain c%d {\n\t\ttype filter hook forward priority 0; policy accept;\n\t\tdrop\n\t}\n"
    )
    return ("table ip filter {\n" + "".join(chain % n for n in range(size // 80))).encode()


BOX = wggw.PayloadBox(SECRET)


class Row(NamedTuple):
    """A parser, what stands around the fillings, further inputs, the larger input's size.

    `bind` makes the parser with a directory of its own; `memory` is as MEMORY.
    """

    parse: Parse
    frames: tuple[tuple[bytes, bytes], ...] = ()
    more: tuple[Make, ...] = ()
    size: int = 16 * 1024
    bind: Callable[[Path], Parse] | None = None
    memory: int = MEMORY


PARSERS: dict[str, Row] = {
    "head": Row(
        allow(strangers_head),
        (
            (b"", b""),
            (b"GET /", b" HTTP/1.1\r\nHost: a"),
            (b"GET /api?", b" HTTP/1.1\r\nHost: a"),
            (b"GET http://", b" HTTP/1.1\r\nHost: a"),
            (b"GET http://a", b"# HTTP/1.1\r\nHost: a"),
            (b"GET / HTTP/1.1", b""),
            (b"GET / HTTP/1.1\r\nHost: ", b""),
            (HEAD + b"X: ", b"a"),
            (HEAD + b"X: ", b"\x01"),
            (HEAD + b"X", b": a"),
            (HEAD + b"X", b""),
            (HEAD + b"Connection: ", b""),
            (HEAD + b"Content-Length: ", b""),
            (HEAD + b"Signature: ", b""),
            (HEAD + b"Signature: 00\r\nTimestamp: ", b""),
        ),
        (
            counted(HEAD, "x{}: a\r\n", b"", b"\r\n"),
            lambda size: HEAD + b"X: " + b"a" * (size - 500) + b"\r\nx: a" * 60,
        ),
    ),
    "signatures": Row(
        allow(strangers_head),
        tuple(
            (HEAD + MAC + b"Signature-Input: " + front, behind)
            for front, behind in (
                (b"", b""),
                (b"a", b"=()" + GOOD),
                (b"a=", GOOD),
                (b"a=(", b")" + GOOD),
                (b'a=("', b'")' + GOOD),
                (b'a=("@method" "@path"', b")" + GOOD),
                (b'a=("@method";name="', b'")' + GOOD),
                (b'a=("@method" "@path")' + GOOD, b""),
                (b'a=("@method" "@path")' + GOOD + b";b=", b""),
                (b'a=("@method" "@path")' + GOOD + b';b="', b'"'),
                (b'a=("@method" "@path")' + GOOD + b', b=("', b'")'),
            )
        )
        + tuple(
            (HEAD + b'Signature-Input: a=("@method" "@path")' + GOOD + b"\r\n" + front, behind)
            for front, behind in (
                (b"Signature: ", b""),
                (b"Signature: a=:", b":"),
                (b"Signature: a=:", b""),
                (b"Signature: b=1, ", b""),
            )
        ),
        (
            counted(HEAD + MAC + b"Signature-Input: a=(", '"a{}" ', b")" + GOOD),
            counted(HEAD + MAC + b'Signature-Input: a=("@method" "@path")' + GOOD, ";a{}", b""),
            counted(HEAD + MAC + b"Signature-Input: ", "a{},", b"", b","),
            counted(HEAD + MAC + b"Signature-Input: ", 'a{}=("@path")' + GOOD.decode() + ",", b""),
            counted(HEAD + MAC + b"Signature-Input: a=(", '"@query-param";name="{}" ', b")" + GOOD),
            lambda size: (
                b"GET /%b HTTP/1.1\r\nHost: a\r\nSignature: %b\r\nSignature-Input: %b"
                % (
                    b"a" * (size // 2 - 1000),
                    b",".join(b"a%d=:%b:" % (n, base64.b64encode(bytes(32))) for n in range(8)),
                    b",".join(
                        b'a%d=("@method" "@target-uri" "@path" "@request-target")%b' % (n, GOOD)
                        for n in range(8)
                    ),
                )
            ),
        ),
    ),
    "slow head": Row(
        allow(slow_head),
        (),
        (
            *(filled(b"a", part, b"") for part in (b"a", b"\r", b"\r\n\r", b"\n", b"\0")),
            filled(b"", b"\r\n", b""),
            filled(HEAD + b"X: ", b"a", b"\r\n\r\n"),
        ),
    ),
    "digest": Row(
        allow(lambda data: wggw.digested(data, ())),
        ((b"", b""), (b"sha-256=:", b":"), (b"sha-256=", b"")),
    ),
    "query": Row(
        allow(lambda data: wggw.parse_query(data.decode("latin-1"))),
        ((b"", b""), (b"a=", b""), (b"a", b"=1")),
        (counted(b"", "a{}=1&", b""),),
        memory=256,  # of urllib's unquote(), for percent signs alone; a target has 8 KB
    ),
    "key in a path": Row(
        allow(lambda data: wggw.key_from_path(data.decode("latin-1"))), ((b"", b""), (b"", b"="))
    ),
    "fields": Row(
        allow(fields),
        ((b"", b""), (b"2026-01-01T00:00:00.", b"Z"), (b"10.0.0.", b""), (b"fd42:", b"")),
    ),
    "body": Row(
        allow(body),
        (
            (b"", b""),
            (b"{", b"}"),
            (b'{"a":', b"}"),
            (b'{"a":"', b'"}'),
            (b'{"a":"', b""),
            (b'{"a":[', b"0]}"),
            (b'{"a":1', b"}"),
            (b'{"a":1.', b"}"),
            (b'{"public_key":"', b'"}'),
            (b'{"obfuscation":{"enabled":true,"I1":"<b 0x', b'>"}}'),
        ),
        (counted(b"{", '"a{}":1,', b'"b":1}'), counted(b"{", '"{}":' + "[" * 40, b"")),
        wggw.MAX_BODY,
    ),
    "array": Row(
        allow(lambda data: wggw.decode_array(pieces(data))),
        (
            (b"", b""),
            (b"", b"[]"),
            (b"[", b"]"),
            (b"[{}", b"]"),
            (b"[{},", b"]"),
            (b"[{}]", b""),
            (b'["', b'"]'),
            (b'["', b""),
            (b'[{"a":"', b'"}]'),
            (b'[{"a":"', b""),
            (b'[{"a":[', b"]}]"),
        ),
        (
            counted(b"[", '{{"a{}":[1]}},', b"{}]"),
            filled(b"[", b'{"a":"' + b"a" * 60_000 + b'"},', b"{}]"),
        ),
        128 * 1024,
    ),
    "lines": Row(
        allow(lambda data: wggw.decode_lines(pieces(data))),
        ((b"", b""), (b'{"a":"', b'"}\n'), (b"{}\n", b"\n{}\n")),
        (
            counted(b"", '{{"a{}":[1]}}\n', b""),
            filled(b"", b'{"a":"' + b"a" * 60_000 + b'"}\n', b""),
        ),
        128 * 1024,
    ),
    "sealed payload": Row(allow(lambda data: BOX.open(data.decode("latin-1"))), ((b"", b""),)),
    "env file": Row(
        allow(lambda data: wggw.read_env_file(text_of(data), ".env")),
        (
            (b"", b""),
            (b"A=", b""),
            (b"A=x", b"x"),
            (b"A=x ", b"# x"),
            (b'A="', b'"'),
            (b'A="', b""),
            (b"A='", b"' # x"),
            (b"A='x'", b"x"),
            (b"A=\t", b"'x"),
            (b"A", b"=b"),
            (b"A", b"x"),
            (b"export", b"A=b"),
            (b"export A", b"=b"),
        ),
        (counted(b"", "A{}=b # c\n", b""),),
    ),
    "settings": Row(
        allow(settings),
        (
            (b"", b""),
            (b'{"a":"', b'"}'),
            (b'{"a":', b"}"),
            (b"https://", b"!"),
            (b"https://a", b"!"),
            (b"https://a/", b"!"),
            (b"https://[", b"]"),
            (b"s3://", b"!"),
            (b"10.0.0.0/", b""),
            (b"fd42::", b"/64"),
        ),
        (counted(b"{", '"a{}":"' + SECRET + '",', b"}", b","), filled(b"", b"10.0.0.0/8,", b"")),
    ),
    "AmneziaWG's parameters": Row(
        allow(awg),
        (
            (b"", b""),
            (b"<b 0x", b">"),
            (b"<b 0x", b"!"),
            (b"<r ", b">"),
            (b'{"I1":"', b'"}'),
            (b"1-", b""),
            (b"", b"-1"),
        ),
        (filled(b"<b 0x", b"00", b">"), filled(b"<b 0x", b"00", b"!"), filled(b"", b"<r 1>", b"!")),
    ),
    "key file": Row(
        allow(print),
        ((b"", b""), (b"A" * 43, b"="), (b"", b"A" * 43 + b"=")),
        bind=in_file(lambda path: wggw.load_private_key(KEY_FILE._replace(private_key_file=path))),
    ),
    "certificate file": Row(
        allow(print),
        ((b"", b""), (b"-----BEGIN CERTIFICATE-----", b""), (b"", b"-----END CERTIFICATE-----")),
        bind=in_file(lambda path: wggw.certificate_expiry(wggw.read_certificate(path))),
    ),
    "certificate": Row(
        allow(wggw.certificate_expiry),
        ((b"", b""), (b"\x30\x84\x00\x00\x3f\x00", b"")),
        (nested_der,),
    ),
    "nonces": Row(
        allow(print),
        ((b"", b""),),
        (filled(b"", b"9999999999 " + b"a" * 32 + b"\n", b""),),
        bind=in_file(lambda path: wggw.NonceGuard(60).keep(path)),
    ),
    "journal": Row(
        allow(journal),
        (
            (b"", b""),
            (wggw.journal_header(0), b""),
            (wggw.journal_header(0) + b"1 0 00000000 ", b"\n"),
            (wggw.journal_header(0) + wggw.journal_line(1, 0, b'[{"put":[],"del":[]}]'), b""),
            (wggw.JOURNAL_MAGIC + b" ", b"\n"),
        ),
        (torn_journal, lambda size: torn_journal(size).replace(b"x\n", b"", 1)),
        128 * 1024,
    ),
    "snapshot": Row(
        allow(lambda data: wggw.decode_snapshot(data, None, "snapshot")),
        ((b"", b""), (wggw.SNAPSHOT_MAGIC, b""), (wggw.SQLITE_MAGIC, b"")),
    ),
    "object of the copy": Row(
        allow(an_object_of_the_copy, wggw.CopyDamaged),
        (
            (b"", b""),
            (b"wggw-copy 2 ", b""),
            (b"{", b"}\n"),
            (b'{"seal":"', b'"}\n'),
        ),
    ),
    "object store's error": Row(
        allow(wggw.ObjectStore._error_code), ((b"", b""), (b"<Code>", b"</Code>"))
    ),
    "UAPI": Row(
        allow(uapi),
        (
            (b"", b"errno=0\n"),
            (b"", b""),
            (b"i1=", b"\nerrno=0\n"),
            (b"h1=", b"\nerrno=0\n"),
            (b"public_key=" + b"0" * 64 + b"\n", b"errno=0\n"),
            (b"public_key=" + b"0" * 64 + b"\nendpoint=", b"\nerrno=0\n"),
            (b"public_key=" + b"0" * 64 + b"\nallowed_ip=", b"/32\nerrno=0\n"),
            (b"public_key=" + b"0" * 64 + b"\nallowed_ip=::/", b"\nerrno=0\n"),
            (b"public_key=", b"\nerrno=0\n"),
        ),
        (counted(b"", "public_key={:064x}\nallowed_ip=10.0.0.1/32\n", b"errno=0\n"),),
        64 * 1024,
    ),
    "netlink": Row(
        allow(netlink),
        ((b"", b""),),
        tuple(
            attributes(kind, filling)
            for kind in (wggw.WGDEVICE_A_PEERS, *wggw.AWG_BY_ATTRIBUTE)
            for filling in FILLINGS.values()
        ),
    ),
    "netlink's peers": Row(
        allow(netlink_peers),
        ((b"", b""),),
        (wire_peers(lambda: itertools.repeat(1)), wire_peers(itertools.count)),
        128 * 1024,
    ),
    "nftables' table": Row(
        allow(lambda data: wggw.names_of_table(text_of(data))),
        ((b"", b""), (b'\tiifname "', b'" accept\n'), (b"\tiifname ", b" accept\n")),
    ),
    "nftables' rules": Row(
        allow(chains),
        ((b"", b""), (b"table ip x {\n\tchain c {\n\t\ttype filter hook forward ", b"\n\t}\n}\n")),
        (rules,),
    ),
}


def inputs(row: Row) -> Sequence[tuple[str, Make]]:
    """The row's own inputs, and of what fills its frames a sample."""
    own = [(f"input {number}", make) for number, make in enumerate(row.more)]
    return [*own, *some(list(framed(row)), 100)]


def framed(row: Row) -> Iterator[tuple[str, Make]]:
    for front, behind in row.frames:
        for name, filling in FILLINGS.items():
            yield (
                f"{name} between {front[-40:]!r} and {behind[:40]!r}",
                filled(front, filling, behind),
            )


@pytest.fixture(autouse=True)
def without_collections() -> Iterator[None]:
    """Python's collector looks at all objects of the process now and then: that is not ours."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def bound(row: Row, directory: Path) -> Parse:
    return allow(row.bind(directory)) if row.bind else row.parse


@pytest.mark.parametrize("name", PARSERS)
def test_four_times_the_input_costs_at_most_five_times_as_much(name: str, tmp_path: Path) -> None:
    row = PARSERS[name]
    parse = bound(row, tmp_path)
    chosen = some(list(inputs(row)), 10)
    found = {what: fault_in_time(parse, make, row.size) for what, make in chosen}
    faults = {what: fault for what, fault in found.items() if fault}
    assert not faults


@pytest.mark.parametrize("name", PARSERS)
def test_memory_is_in_proportion_to_the_input(name: str, tmp_path: Path) -> None:
    row = PARSERS[name]
    parse = bound(row, tmp_path)
    faults = {}
    for what, make in some(list(inputs(row)), 10):
        if seconds(parse, make(1024)) > RUINOUS * 1024:
            faults[what] = "not measured: it takes too long"
            continue
        data = make(row.size // 4)
        peak = peak_memory(parse, data)
        if peak > row.memory * len(data) + MEMORY_FREE:
            faults[what] = f"{peak} bytes for {len(data)}"
    assert not faults


# --- by name: what stopped the service, or took its memory ----------------------------------------


def test_a_header_of_blanks_costs_what_a_header_of_letters_does() -> None:
    """Two parts of one expression could both take the blanks: 16 KB took 2 to 4 s."""

    def header(filling: bytes) -> bytes:
        return HEAD + b"X: " + filling * (wggw.MAX_HEAD - 100) + b"\x01"

    parse = allow(wggw.parse_head)
    letters, blanks = (
        min(seconds(parse, header(filling)) for _ in range(ROUNDS)) for filling in (b"a", b" ")
    )
    assert blanks < max(RATIO * letters, HARMLESS * wggw.MAX_HEAD), (letters, blanks)


def test_naming_query_parameters_in_a_signature_costs_nothing_and_is_refused() -> None:
    """The query was parsed once for each: 214 of them took 0.12 s, whoever asked."""
    names, others = (
        [f'"{name}";name="a{number}"' for number in range(214)]
        for name in ("@query-param", "x-query-param")
    )
    target = f"/api?{'&'.join(f'a{number}=1' for number in range(30))}&b={'%41' * 2000}"

    def head(named: list[str]) -> bytes:
        line = f"GET {target} HTTP/1.1\r\nHost: a\r\n".encode()
        return line + MAC + f"Signature-Input: a=({' '.join(named)})".encode() + GOOD

    plain, costly = (
        min(seconds(strangers_head, head(named)) for _ in range(ROUNDS))
        for named in (others, names)
    )
    assert costly < max(2 * plain, HARMLESS * wggw.MAX_HEAD), (plain, costly)


def signed(components: str, lines: str) -> wggw.SignedMessage:
    """A message whose MAC over these lines of a signature base is right."""
    base = f'{lines}"@signature-params": {components}{GOOD.decode()}'
    mac = base64.b64encode(hmac.digest(SECRET.encode(), base.encode(), hashlib.sha256)).decode()
    headers = {
        b"signature-input": f"a={components}".encode() + GOOD,
        b"signature": f"a=:{mac}:".encode(),
    }
    return wggw.SignedMessage("GET", "a", "/p?b=c", headers, 0)


def test_a_right_signature_over_a_query_parameter_is_refused() -> None:
    authenticator = wggw.Authenticator({"default": SECRET}, 60, lambda: NOW - 1)
    authenticator._clock = lambda: NOW
    lines = '"@method": GET\n"@target-uri": https://a/p?b=c\n'
    components = '"@method" "@target-uri"'
    assert authenticator.verify(signed(f"({components})", lines)).key_id == "default"
    with pytest.raises(wggw.Unauthorized):
        authenticator.verify(
            signed(
                f'({components} "@query-param";name="b")', lines + '"@query-param";name="b": c\n'
            )
        )


LONG = 15 * 10**6  # bytes of the strings


@pytest.mark.parametrize("filling", some(["a", '\\"', "é", "\U0001f600"], 2))
@pytest.mark.parametrize("frame", ['["{}"]', '[{{"request_id":"{}"}}]', '["{}', '[{{"a":"{}'])
def test_an_array_of_one_long_string_takes_less_than_four_times_its_size(
    frame: str, filling: str
) -> None:
    """The expression kept a state for each character: 15 MB took 1.84 GB."""
    text = filling * (LONG // len(filling.encode()))
    data = frame.format(text).encode()
    assert len(data) < wggw.MAX_ARRAY
    with pytest.raises((wggw.Malformed, wggw.TooLarge)):
        list(wggw.decode_array(pieces(data, 16384)))
    peak = peak_memory(allow(lambda given: wggw.decode_array(pieces(given, 16384))), data)
    assert peak < 4 * len(data), peak


@pytest.mark.parametrize("room", [0, 1])
def test_an_element_may_be_as_long_as_a_line(room: int) -> None:
    element = b'{"a":"' + b"x" * (wggw.MAX_BODY - 8 + room) + b'"}'
    for end in (b"]", b"", b" ,"):
        decoded = wggw.decode_array([b"[{}, " + element + end])
        assert next(decoded) == ("element 1", {})
        if room:
            with pytest.raises(wggw.TooLarge) as caught:
                next(decoded)
            assert caught.value.detail == "element 2: it has more than 65536 bytes"
        else:
            assert next(decoded)[0] == "element 2"
