"""What is fuzzed: every parser of bytes from outside. A target returns, or has found a defect.

Each takes bytes and lets through only the exceptions that the parser's contract names; whatever it
accepts must then keep what the code behind it relies on.
"""

from __future__ import annotations

import contextlib
import hashlib
import zlib
from collections.abc import Callable
from pathlib import Path

import wggw

CORPUS = Path(__file__).parent / "corpus"


def head(data: bytes) -> None:
    """A request's head, as Connection cuts it out: up to the first empty line."""
    data = data[: wggw.MAX_HEAD].split(b"\r\n\r\n")[0]
    try:
        found = wggw.parse_head(data)
    except wggw.GatewayError as error:
        assert 400 <= error.status < 500 or error.status == 505
        return
    assert found.length >= 0 and found.path and found.target.isascii()
    assert b"transfer-encoding" not in found.headers
    for name, value in found.headers.items():
        assert name == name.lower() and b"\n" not in name + value and b"\r" not in name + value
    with contextlib.suppress(wggw.Malformed):
        wggw.parse_query(found.query)


def fields(data: bytes) -> None:
    """Signature-Input and Signature, a line each, then the digest header; and what they lead to."""
    inputs, _, rest = data[: wggw.MAX_HEAD].partition(b"\n")
    macs, _, digest = rest.partition(b"\n")
    headers = {b"signature-input": inputs, b"signature": macs, b"content-digest": digest}
    message = wggw.SignedMessage("GET", "gateway", "/a?b=c", headers, 1)
    for given in wggw.parse_signatures(headers):
        assert given.nonce and isinstance(given.created, int)
        with contextlib.suppress(KeyError):
            wggw.signature_base(message, given)
        [[_, (inner, parameters)]] = wggw.parse_dictionary(f"a={given.parameters}").items()
        assert isinstance(inner, list) and len(inner) == len(given.components)
        assert wggw._string_of(parameters.get("keyid")) == given.key_id
    with contextlib.suppress(wggw.Unauthorized):
        list(wggw.digested(digest, ()))
    authenticator = wggw.Authenticator({"default": "k" * 32}, 60, lambda: 1e9)
    with contextlib.suppress(wggw.Unauthorized):
        authenticator.verify(message)
        raise AssertionError("an unsigned message was accepted")


def body(data: bytes) -> None:
    """JSON and the fields of every request."""
    try:
        parsed = wggw.decode_json(data)
    except wggw.Malformed:
        return
    for table in (
        wggw.CREATE_FIELDS,
        wggw.PATCH_FIELDS,
        wggw.ROTATE_FIELDS,
        wggw.STATUS_FIELDS,
        wggw.BATCH_FIELDS,
    ):
        with contextlib.suppress(wggw.Invalid):
            for value in wggw.parse_fields(parsed, table).values():
                wggw.encode_json(value if isinstance(value, str | int | None) else repr(value))
    operation = wggw._decode_operation(parsed)
    assert isinstance(operation, tuple | wggw.GatewayError)
    if isinstance(operation, wggw.GatewayError):
        wggw.problem(operation)


def uapi(data: bytes) -> None:
    """A userspace WireGuard's answer."""
    with contextlib.suppress(wggw.BackendError):
        check_states(wggw.read_uapi_device([data]))


def netlink(data: bytes) -> None:
    """A datagram of the kernel: messages, errors, and the dump of an interface."""
    with contextlib.suppress(wggw.CodecError):
        messages = list(wggw.parse_nl_messages(data))
        for message in messages:
            if message.type == wggw.NLMSG_ERROR:
                number, words = wggw.parse_nl_error(message.payload, message.flags)
                assert 0 <= number < 4096 and words.isprintable() is not None
        for family in (wggw.WIREGUARD_FAMILY, wggw.GenericFamily(1, 3, True)):
            check_states(wggw.read_wg_device([m.payload for m in messages], family))


def check_states(reading: wggw.Reading) -> None:
    assert reading.peers == len(reading.changed) + reading.unreadable
    for _, state in reading.changed:
        assert len(state.peer.public_key) == wggw.KEY_BYTES
        assert len(state.peer.preshared_key) in (0, wggw.KEY_BYTES)
        assert list(state.peer.allowed_ips) == sorted(state.peer.allowed_ips)
        assert 0 <= state.last_handshake <= wggw.MAX_TIME
        assert 0 <= state.rx_bytes <= wggw.MAX_INTEGER and 0 <= state.tx_bytes <= wggw.MAX_INTEGER


def key(data: bytes) -> None:
    """A public key in a path."""
    found = wggw.key_from_path(data.decode("latin-1"))
    if found is not None:
        assert wggw.encode_key(wggw.decode_key(found)) == found
        assert wggw.key_from_path(found.replace("/", "_").replace("+", "-")) == found


def query(data: bytes) -> None:
    """A query, and the cursor of a list."""
    text = data.decode("latin-1")
    with contextlib.suppress(wggw.Malformed):
        for pair in wggw.parse_query(text).items():
            "".join(pair).encode("utf-8")
    with contextlib.suppress(ValueError):
        assert wggw._query_cursor(text) >= 0


def env(data: bytes) -> None:
    """A .env file, and the settings in it."""
    try:
        text = data.decode("utf-8")
        values = wggw.read_env_file(text, "fuzz")
    except (UnicodeDecodeError, wggw.ConfigError):
        return
    for setting in wggw.SETTINGS:
        try:
            wggw._parse_setting(setting, values, key_needed=True)
        except wggw.ConfigError as error:
            value = values.get(setting.name, "")
            if setting.secret and len(value) > 3:
                assert value not in str(error).removeprefix(setting.name)


def journal(data: bytes) -> None:
    """A journal's file, and what its records do to rows; both a start's way and a salvage's."""
    with contextlib.suppress(wggw.DamagedError, wggw.ConfigError):
        file = wggw.parse_journal(data, "name")
        assert file.size + file.torn == len(data)
        wggw.Store().replay(file, "name")
    with contextlib.suppress(wggw.ConfigError):
        file = wggw.parse_journal(data, "name", salvage=True)
        wggw.Store().replay(file, "name", skipped=str)


def record(data: bytes) -> None:
    """A record behind a good checksum: it applies as a whole, or the start is refused."""
    version = 1 if data[:1] == b"1" else 2
    columns = b",".join(name.encode() for name in wggw.Peer._fields)
    text = b"wggw-journal 1 0" if version == 1 else b"wggw-journal 2 0 " + columns
    content = data if version == 2 else data[1:]
    lines = b"".join(content.splitlines())
    journal(b"%b %08x\n" % (text, zlib.crc32(text)) + wggw.journal_line(1, 0, lines))


def certificate(data: bytes) -> None:
    """A certificate in DER."""
    with contextlib.suppress(ValueError):
        assert isinstance(wggw.certificate_expiry(data), int)


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        head,
        fields,
        body,
        uapi,
        netlink,
        key,
        query,
        env,
        journal,
        record,
        certificate,
    )
}


def corpus(name: str) -> list[bytes]:
    """The kept inputs of a target."""
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


def keep(name: str, data: bytes) -> Path:
    """Put an input into the corpus, named by its content."""
    path = CORPUS / name / hashlib.sha256(data).hexdigest()[:16]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
