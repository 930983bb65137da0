"""HTTP Message Signatures: the RFC's vector, an off-the-shelf client, and what must be refused."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
from harness import (
    API_KEY,
    Answer,
    Client,
    a_key,
    encode,
    running,
    sign,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import wggw

PATH = "/api/v1/configurations/"
BODY = encode({"public_key": a_key("attack"), "request_id": "attack"})
STATUS = "/api/v1/server/status"


SECOND_KEY = "another secret of the backend"
SHARED_SETTINGS = {"GATEWAY_API_KEYS": f'{{"second": "{SECOND_KEY}"}}'}


@pytest.fixture
def client(shared_client: Client) -> Client:
    return shared_client


def test_signature_base_and_mac_are_those_of_the_rfc() -> None:
    """RFC 9421 appendix B.2.5."""
    secret = base64.b64decode(
        "uzvJfB4u3N0Jy4T7NZ75MDVcr8zSTInedJtkgcu46YW4XByzNJjxBdtjUkdJPBtbmHhIDi6pcl8jsasjlTMtDQ=="
    )
    message = wggw.SignedMessage(
        "POST",
        "example.com",
        "/foo?param=Value&Pet=dog",
        {b"date": b"Tue, 20 Apr 2021 02:07:55 GMT", b"content-type": b"application/json"},
        18,
    )
    given = wggw.MessageSignature(
        ("date", "@authority", "content-type"),
        '("date" "@authority" "content-type");created=1618884473;keyid="test-shared-secret"',
        1618884473,
        None,
        "",
        "test-shared-secret",
        b"",
    )
    mac = hmac.new(secret, wggw.signature_base(message, given), hashlib.sha256).digest()
    assert base64.b64encode(mac) == b"pxcQw6G3AjtMBQjwo8XzkZf/bws5LelbaMk5rGIGtE8="


def signed(
    client: Client,
    method: str = "GET",
    path: str = STATUS,
    body: bytes = b"",
    *,
    components: tuple[str, ...] = ("@method", "@target-uri"),
    key: str = API_KEY,
    **changed: Any,
) -> dict[str, str]:
    """Headers made from the RFC's text; `changed` replaces parameters, None leaves one out."""
    names = [*components, *(["content-digest"] if body else [])]
    parameters: dict[str, Any] = {
        "created": int(time.time()),
        "keyid": "default",
        "nonce": secrets.token_hex(8),
        **changed,
    }
    text = "(" + " ".join(f'"{name}"' for name in names) + ")"
    for name, value in parameters.items():
        if value is not None:
            text += f";{name}={value}" if isinstance(value, int | float) else f';{name}="{value}"'
    digest = f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:"
    bare, _, query = path.partition("?")
    values = {
        "@method": method,
        "@target-uri": f"https://127.0.0.1:{client.port}{path}",
        "@path": bare,
        "@query": f"?{query}",
        "@authority": f"127.0.0.1:{client.port}",
        "content-digest": digest,
    }
    base = "".join(f'"{name}": {values[name]}\n' for name in names)
    base += f'"@signature-params": {text}'
    mac = base64.b64encode(hmac.new(key.encode(), base.encode(), hashlib.sha256).digest())
    headers = {"Signature-Input": f"a={text}", "Signature": f"a=:{mac.decode()}:"}
    if body:
        headers |= {"Content-Digest": digest, "Content-Type": "application/json"}
    return headers


def get(client: Client, headers: dict[str, str], path: str = STATUS) -> Answer:
    return client.raw("GET", path, b"", headers)


GOOD: list[dict[str, Any]] = [
    {},
    {"components": ("@method", "@path")},
    {"components": ("@method", "@path", "@query"), "path": "/api/v1/ip-usage?interface=wg0"},
    {"components": ("@authority", "@target-uri", "@method")},
    {"alg": "hmac-sha256"},
    {"keyid": "second", "key": SECOND_KEY},
    {"expires": 4102444800},
]


@pytest.mark.parametrize("how", GOOD)
def test_every_allowed_form_is_accepted(client: Client, how: dict[str, Any]) -> None:
    answer = get(client, signed(client, **how), how.get("path", STATUS))
    assert answer.status == 200, answer


BAD: list[dict[str, Any]] = [
    {"components": ("@method",)},
    {"components": ("@target-uri",)},
    {"components": ("@method", "@path"), "path": "/api/v1/ip-usage?a=b"},  # without the query
    {"components": ("@method", "@target-uri", "@method")},
    {"created": None},
    {"nonce": None},
    {"keyid": None},
    {"keyid": "unknown"},
    {"keyid": "second"},  # signed with the first key
    {"key": "not the key of the backend"},
    {"alg": "ed25519"},
    {"created": 1000000000},
    {"created": 4102444800},
    {"expires": 1000000000},
]


@pytest.mark.parametrize("how", BAD)
def test_what_is_not_wholly_right_is_refused(client: Client, how: dict[str, Any]) -> None:
    answer = get(client, signed(client, **how), how.get("path", STATUS))
    assert answer.status == 401, answer


def test_known_and_unknown_key_ids_cost_the_same_macs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counted, because times mean little on a busy machine."""
    made: list[bytes] = []
    mac = wggw._mac

    def counted(key: hmac.HMAC, message: bytes) -> bytes:
        made.append(message)
        return mac(key, message)

    monkeypatch.setattr(wggw, "_mac", counted)
    authenticator = wggw.Authenticator({"default": API_KEY, "b": "b" * 16}, 60, lambda: 1000.0)
    found = {}
    for key_id in ("default", "b", "nobody", ""):
        message = wggw.SignedMessage("GET", "host", "/api/v1/ip-usage", {}, 0)
        given, signature = wggw.sign_rfc9421(key_id, "wrong", message, 1000, "n")
        headers = {b"signature-input": given.encode(), b"signature": signature.encode()}
        with pytest.raises(wggw.Unauthorized):
            authenticator.verify(message._replace(headers=headers))
        found[key_id] = len(made)
        made.clear()
    assert set(found.values()) == {1}


def test_nobody_can_sign_with_an_unknown_key_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even who finds the MAC under the key that stands for unknown ones."""
    authenticator = wggw.Authenticator({"default": API_KEY}, 60, lambda: 1000.0)
    message = wggw.SignedMessage("GET", "host", "/api/v1/ip-usage", {}, 0)
    given, _ = wggw.sign_rfc9421("nobody", "wrong", message, 1000, "n")
    monkeypatch.setattr(wggw, "_mac", lambda key, message: bytes(32))
    signature = f"sig1=:{base64.b64encode(bytes(32)).decode()}:"
    headers = {b"signature-input": given.encode(), b"signature": signature.encode()}
    with pytest.raises(wggw.Unauthorized):
        authenticator.verify(message._replace(headers=headers))


@pytest.mark.parametrize(
    "created", [lambda: int(time.time() * 1000), lambda: int(time.time()) + 0.5]
)
def test_milliseconds_and_fractions_are_told_the_servers_time(
    client: Client, created: Callable[[], float]
) -> None:
    answer = get(client, signed(client, created=created()))
    assert (answer.status, "the server's time is" in answer.json["detail"]) == (401, True)
    stranger = get(client, signed(client, created=created(), key="another key, long enough"))
    assert (stranger.status, stranger.json["detail"]) == (401, wggw.NOT_AUTHENTIC)


def test_only_a_right_signature_learns_the_servers_time(client: Client) -> None:
    late = get(client, signed(client, created=1000000000))
    wrong = get(client, signed(client, created=1000000000, key="x" * 32))
    assert "time" in late.json["detail"] and "time" not in wrong.json["detail"]


Headers = dict[str, str]
TARGET = PATH + "?a=b"


class Attack(NamedTuple):
    """What a thief sends who captured POST TARGET with BODY: one thing is changed."""

    method: str = "POST"
    target: str = TARGET
    body: bytes = BODY
    change: Callable[[Headers], Headers] = lambda headers: headers


def with_header(name: str, change: Callable[[str], str]) -> Attack:
    return Attack(change=lambda headers: {**headers, name: change(headers[name])})


MORE_LABELS = "".join(f", x{n}=()" for n in range(wggw.MAX_SIGNATURES))
ATTACKS: dict[str, Attack] = {
    "replay": Attack(),
    "method": Attack("PUT"),
    "path": Attack(target="/api/v1/configurations/batch?a=b"),
    "encoded path": Attack(target="/api/v1/%63onfigurations/?a=b"),
    "slash": Attack(target=PATH[:-1] + "?a=b"),
    "query": Attack(target=PATH + "?a=c"),
    "no query": Attack(target=PATH),
    "authority": Attack(change=lambda headers: {**headers, "Host": "other.example"}),
    "body": Attack(body=BODY.replace(b"attack", b"attacK")),
    "shorter body": Attack(body=BODY[:-1]),
    "no body": Attack(body=b""),
    "digest": with_header("Content-Digest", lambda text: text.replace("=:", "=:A", 1)),
    "a second digest": with_header("Content-Digest", lambda text: text + ", sha-512=:AAAA:"),
    "signature of another label": with_header("Signature", lambda text: "b" + text[1:]),
    "one bit of the signature": with_header(
        "Signature", lambda text: text.translate(str.maketrans("Aa1", "Bb2"))
    ),
    "the label twice": with_header("Signature-Input", lambda text: f"{text}, {text}"),
    "nine labels": with_header("Signature-Input", lambda text: text + MORE_LABELS),
    "no signature": Attack(change=lambda h: {n: v for n, v in h.items() if n != "Signature"}),
    "legacy headers beside it": Attack(
        change=lambda h: {**h, "Timestamp": str(int(time.time())), "Signature": "0" * 64}
    ),
}
for old, new in {
    "created=1": "created=2",
    'keyid="default"': 'keyid="second"',
    'nonce="': 'nonce="0',
    '"@method" "@target-uri"': '"@target-uri" "@method"',
    '"@method" ': "",
    ' "content-digest"': "",
    '("@method"': '("@method";req',
    '"@target-uri"': '"@target-uri";sf',
    "a=(": "b=(",
    ");": ");tag=1;",
    ";created": ";created=5;created",
}.items():
    ATTACKS[f"input: {old} becomes {new}"] = with_header(
        "Signature-Input",
        lambda text, old=old, new=new: text.replace(old, new),  # type: ignore[misc]
    )


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_captured_request_is_good_for_nothing_else(client: Client, attack: str) -> None:
    method, target, body, change = ATTACKS[attack]
    assert client.create(a_key("victim")).status == 200
    components = ("@method", "@target-uri", "@authority")
    headers = signed(client, "POST", TARGET, BODY, components=components, nonce=attack)
    if attack == "replay":  # authentic, so that it is told what is wrong with its query
        assert client.raw("POST", TARGET, BODY, headers).status == 400
    before = client.send("GET", PATH).json
    answer = client.raw(method, target, body, change(headers))
    assert answer.status == 401, answer
    if attack != "digest":
        assert "time" not in answer.json["detail"]
    assert client.send("GET", PATH).json == before


def test_one_good_signature_among_others_is_enough(client: Client) -> None:
    """Labels that say nothing to us, of a proxy perhaps, in front of and behind the good one."""
    good = signed(client)
    others = {"Signature-Input": 'x=("@method";req);created=1', "Signature": "x=:AAAA:"}
    for place in (0, 1):
        good = signed(client)
        order = [others]
        order.insert(place, good)
        headers = {name: ", ".join(each[name] for each in order) for name in good}
        assert get(client, headers).status == 200


@pytest.mark.parametrize(
    ("signatures", "components", "read"),
    [(1, wggw.MAX_HEADERS, 1), (wggw.MAX_SIGNATURES, 10, wggw.MAX_SIGNATURES), (8, 50, 0)],
)
def test_signatures_together_cover_a_bounded_number_of_components(
    signatures: int, components: int, read: int
) -> None:
    """A whole head by one, a few by each of many: not a whole head by many, before any is known."""
    names = " ".join(f'"h{n}"' for n in range(components))
    given = (f's{n}=({names});created=1;nonce="n";keyid="k"' for n in range(signatures))
    macs = (f"s{n}=::" for n in range(signatures))
    headers = {
        b"signature-input": ", ".join(given).encode(),
        b"signature": ", ".join(macs).encode(),
    }
    assert len(list(wggw.parse_signatures(headers))) == read


def test_field_names_are_case_insensitive(client: Client) -> None:
    headers = {name.swapcase(): value for name, value in signed(client).items()}
    assert get(client, headers).status == 200


def test_derived_components_are_as_the_rfc_says() -> None:
    message = wggw.SignedMessage("GET", "Example.com:443", "/a?b=c%20d+e&f&g=1&g=2", {}, 0)
    values = {
        "@query": b"?b=c%20d+e&f&g=1&g=2",
        "@authority": b"example.com",
        "@target-uri": b"https://example.com/a?b=c%20d+e&f&g=1&g=2",
        "@request-target": b"/a?b=c%20d+e&f&g=1&g=2",
        "@path": b"/a",
        "@scheme": b"https",
    }
    assert {name: wggw._component(message, name) for name in values} == values
    for unknown in ("@query-param", "@status", "@unknown"):
        with pytest.raises(KeyError):
            wggw._component(message, unknown)
    for target in ("/a", "/a?"):
        assert wggw._component(message._replace(target=target), "@query") == b"?"


@settings(max_examples=500)
@given(text=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20))
def test_strings_are_read_as_they_were_written(text: str) -> None:
    written = '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'
    item, parameters = wggw.parse_dictionary(f"a={written}, b")["a"]
    assert isinstance(item, str)
    assert (item, wggw._string_of(item), parameters) == (written, text, {})


@settings(max_examples=500)
@given(text=st.text('"\\a ', max_size=12))
def test_strings_have_two_escapes_and_no_others(text: str) -> None:
    right = re.fullmatch(r'([^"\\]|\\["\\])*', text)
    if right:
        [(item, _)] = wggw.parse_dictionary(f'a="{text}"').values()
        assert isinstance(item, str)
        assert wggw._string_of(item) == re.sub(r"\\(.)", r"\1", text)
    else:
        with pytest.raises(ValueError, match="structured field"):
            wggw.parse_dictionary(f'a="{text}"')


def test_a_signature_covers_parameters_in_the_form_that_the_rfc_gives_them() -> None:
    """RFC 9421 section 3.2: however they were sent, and parameters that are not known here, too."""
    text = (
        '("@method" "@target-uri");created=1000;nonce="n";keyid="default";tag=a/b;x=1.5;y;z=:AA==:'
    )
    base = f'"@method": GET\n"@target-uri": https://host/a\n"@signature-params": {text}'
    mac = base64.b64encode(hmac.digest(API_KEY.encode(), base.encode(), "sha256"))
    sent = text.replace(";", ";  ").replace(" ", "  ").replace("=1000", "=01000")
    sent = sent.replace("1.5", "01.500").replace(";  y", ";y=?1")
    headers = {b"signature-input": f"a={sent}".encode(), b"signature": b"a=:%b:" % mac}
    authenticator = wggw.Authenticator({"default": API_KEY}, 60, lambda: 1000.0)
    message = wggw.SignedMessage("GET", "host", "/a", headers, 0)
    assert authenticator.verify(message) == ("default", "rfc9421")


def test_metrics_count_by_scheme_key_and_reason(tmp_path: Path) -> None:
    with running(tmp_path, **SHARED_SETTINGS) as one:
        client = one.client()
        again = signed(client)
        body = encode({"public_key": a_key("digest")})
        for headers in (again, again, signed(client, key=SECOND_KEY, keyid="second"), {}):
            get(client, headers)
        get(client, signed(client, created=5))
        client.raw("POST", PATH, body + b" ", signed(client, "POST", PATH, body))
        client = one.client()
        assert client.send("GET", STATUS).status == 200
        found = dict(
            re.findall(
                r"(?:signed_requests|auth_failures)_total\{(.*)\} (\d+)",
                client.raw("GET", "/metrics", b"", {}).body.decode(),
            )
        )
    assert found == {
        'scheme="rfc9421",key_id="default"': "2",
        'scheme="rfc9421",key_id="second"': "1",
        'scheme="legacy",key_id="default"': "1",
        'reason="replay"': "1",
        'reason="signature"': "1",
        'reason="time"': "1",
        'reason="digest"': "1",
    }


# --- failures by address --------------------------------------------------------------------------


def test_failures_are_slowed_down_and_a_right_signature_never_is(tmp_path: Path) -> None:
    with running(tmp_path, MAX_AUTH_FAILURES="5") as gateway:
        client = gateway.client()
        answers = [client.raw("GET", STATUS, b"", {}) for _ in range(30)]
        statuses = [answer.status for answer in answers]
        assert statuses[:5] == [401] * 5
        assert statuses.count(429) >= 20
        assert int(answers[-1].headers["Retry-After"]) in range(1, 61)
        assert client.send("GET", STATUS).status == 200  # the same connection and address
        assert client.send("GET", STATUS, timestamp="1").status == 429
        late = client.raw("GET", STATUS, b"", sign(at=1000000000))
        assert (late.status, "server's time" in late.json["detail"]) == (401, True)


def test_throttle_forgets_with_time_counts_by_64_and_is_bounded() -> None:
    now = [0.0]
    throttle = wggw.Throttle(60, lambda: now[0])
    assert [throttle.fail("192.0.2.1") for _ in range(61)] == [0.0] * 60 + [1.0]
    assert throttle.fail("192.0.2.2") == 0.0
    now[0] += 2.5  # two failures are forgotten and half of a third
    assert [throttle.fail("192.0.2.1") for _ in range(3)] == [0.0, 0.0, 0.5]
    six = wggw.Throttle(2, lambda: now[0])
    found = [six.fail(f"2001:db8:0:1:{n}::1") for n in range(3)]
    assert (found, six.fail("2001:db8:0:2::1")) == ([0.0, 0.0, 30.0], 0.0)
    for number in range(3 * wggw.MAX_THROTTLED):
        throttle.fail(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
    assert len(throttle._failures) == wggw.MAX_THROTTLED


def test_100_000_nonces_cost_the_same_each_and_none_is_accepted_twice() -> None:
    """Steps of Python are counted, because times mean little on a busy machine."""
    guard = wggw.NonceGuard(60)

    def steps(number: int) -> int:
        count = 0

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal count
            # not what the collector calls, which may run at any time
            count += frame.f_code.co_filename == wggw.__file__
            return trace

        sys.settrace(trace)
        try:
            assert guard.first_use("k", str(number), 40 + number % 120, 100)
        finally:
            sys.settrace(None)
        return count

    first = [steps(number) for number in range(121)]  # also the first of each second
    for number in range(121, 99_990):
        assert guard.first_use("k", str(number), 40 + number % 120, 100)
    assert {steps(number) for number in range(99_990, 100_000)} <= set(first)
    assert not any(guard.first_use("k", str(number), 100, 100) for number in range(100_000))
    assert guard.first_use("k", "0", 501, 501)  # all of them are over and forgotten
    assert len(guard._live) == 1 and len(guard._by_created) == 1


def test_full_nonce_table_refuses_and_never_forgets_a_live_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wggw, "MAX_NONCES", 3)
    guard = wggw.NonceGuard(50)
    assert all(guard.first_use("k", str(i), 50, 50) for i in range(3))
    with pytest.raises(wggw.TooManyRequests):
        guard.first_use("k", "one too many", 50, 50)
    assert not guard.first_use("k", "0", 50, 100)
    assert guard.first_use("k", "0", 101, 101)


FIELDS = [
    ("a=1, b=2", {"a": ("1", {}), "b": ("2", {})}),
    ("a", {"a": ("?1", {})}),
    ('a=("x" "y";z);p=:AQI=:', {"a": ([('"x"', {}), ('"y"', {"z": "?1"})], {"p": ":AQI=:"})}),
    ('a="q\\"\\\\"', {"a": ('"q\\"\\\\"', {})}),
    ("a=01.50, b=-0.125;c=3.0", {"a": ("1.5", {}), "b": ("-0.125", {"c": "3.0"})}),
    ("a=()", {"a": ([], {})}),
]


@pytest.mark.parametrize(("text", "parsed"), FIELDS)
def test_structured_fields_are_read(text: str, parsed: dict[str, Any]) -> None:
    assert wggw.parse_dictionary(text) == parsed


REFUSED = [
    "a=",
    "a=1,",
    ",a=1",
    "A=1",
    "a=1 b=2",
    'a="x',
    "a=(",
    'a=("x""y")',
    "a=1, a=2",
    "a=1;b;b",
]


@pytest.mark.parametrize(
    "text",
    [*REFUSED, "a=:A:", "a=1.", "a=1.2345", "a=1234567890123.5", "a=1234567890123456", "a=\u00e9"],
)
def test_malformed_structured_fields_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        wggw.parse_dictionary(text)
