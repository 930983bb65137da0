"""HTTP Message Signatures: the RFC's vector, an off-the-shelf client, and what must be refused."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import time
import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import requests
from harness import API_KEY, Answer, Client, GatewayProcess, a_key, encode, running, wait_for
from http_message_signatures import (
    HTTPMessageSigner,
    HTTPSignatureKeyResolver,
    algorithms,
)

import wggw

PATH = "/api/v1/configurations/"
STATUS = "/api/v1/server/status"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with running(
        tmp_path_factory.mktemp("rfc9421"),
        GATEWAY_API_KEYS='{"second": "another secret of the backend"}',
    ) as process:
        started = int(time.time())
        # signatures from the second of the start are refused
        wait_for(lambda: int(time.time()) > started, what="the next second")
        yield process


@pytest.fixture
def client(gateway: GatewayProcess) -> Iterator[Client]:
    connection = gateway.client()
    yield connection
    connection.close()


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
    base = wggw.signature_base(message, given)
    assert base is not None
    mac = hmac.new(secret, base, hashlib.sha256).digest()
    assert base64.b64encode(mac) == b"pxcQw6G3AjtMBQjwo8XzkZf/bws5LelbaMk5rGIGtE8="


class Keys(HTTPSignatureKeyResolver):  # type: ignore[misc]
    def resolve_private_key(self, key_id: str) -> bytes:
        return API_KEY.encode()

    def resolve_public_key(self, key_id: str) -> bytes:
        return API_KEY.encode()


def test_requests_with_http_message_signatures_is_accepted(gateway: GatewayProcess) -> None:
    body = encode({"public_key": a_key("off-the-shelf")})
    digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
    request = requests.Request(
        "POST",
        f"https://127.0.0.1:{gateway.port}{PATH}",
        data=body,
        headers={"Content-Type": "application/json", "Content-Digest": f"sha-256=:{digest}:"},
    ).prepare()
    signer = HTTPMessageSigner(signature_algorithm=algorithms.HMAC_SHA256, key_resolver=Keys())
    signer.sign(
        request,
        key_id="default",
        created=datetime.now(),
        nonce=secrets.token_hex(8),
        covered_component_ids=("@method", "@target-uri", "content-digest"),
        body=body,
        use_existing_digest=True,
    )
    with requests.Session() as session, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answer = session.send(request, verify=False)
    assert (answer.status_code, answer.json().get("status")) == (200, "created")


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
            text += f";{name}={value}" if isinstance(value, int) else f';{name}="{value}"'
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
    {"components": ("@method", "@path", "@query"), "path": STATUS + "?a=b"},
    {"components": ("@authority", "@target-uri", "@method")},
    {"alg": "hmac-sha256"},
    {"keyid": "second", "key": "another secret of the backend"},
    {"expires": 4102444800},
]


@pytest.mark.parametrize("how", GOOD)
def test_every_allowed_form_is_accepted(client: Client, how: dict[str, Any]) -> None:
    answer = get(client, signed(client, **how), how.get("path", STATUS))
    assert answer.status == 200, answer


BAD: list[dict[str, Any]] = [
    {"components": ("@method",)},
    {"components": ("@target-uri",)},
    {"components": ("@method", "@path"), "path": STATUS + "?a=b"},  # the query is not covered
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


def test_only_a_right_signature_learns_the_servers_time(client: Client) -> None:
    late = get(client, signed(client, created=1000000000))
    wrong = get(client, signed(client, created=1000000000, key="x" * 32))
    assert "time" in late.json["detail"] and "time" not in wrong.json["detail"]


def test_a_replayed_request_is_refused(client: Client) -> None:
    headers = signed(client)
    assert [get(client, headers).status for _ in range(3)] == [200, 401, 401]


def test_a_signature_is_good_for_its_method_path_and_body_alone(client: Client) -> None:
    body = encode({"public_key": a_key("covered")})
    other = encode({"public_key": a_key("coverXd")})
    assert client.raw("GET", "/api/v1/ip-usage", b"", signed(client)).status == 401
    assert client.raw("DELETE", STATUS, b"", signed(client)).status == 401
    headers = signed(client, "POST", PATH, body)
    assert client.raw("POST", PATH, other, headers).status == 401
    assert client.get(a_key("coverXd")).status == 404


def test_signatures_from_before_the_start_are_refused(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        client = gateway.client()
        headers = signed(client, created=int(time.time()) - 2)
        gateway.stop()
        gateway.start()
        answer = get(gateway.client(), headers)
        assert answer.status == 401
        assert int(answer.headers["Retry-After"]) >= 1


def test_schemes_can_be_switched_off(tmp_path: Path) -> None:
    with running(tmp_path, AUTH_SCHEMES="rfc9421") as gateway:
        assert gateway.client().send("GET", STATUS).status == 401


def test_full_nonce_table_refuses_and_never_forgets_a_live_one() -> None:
    guard = wggw.NonceGuard(limit=3)
    assert all(guard.first_use("k", str(i), 100, 50) for i in range(3))
    with pytest.raises(wggw.TooManyRequests):
        guard.first_use("k", "one too many", 100, 50)
    assert not guard.first_use("k", "0", 100, 100)
    assert guard.first_use("k", "0", 200, 101)


FIELDS = [
    ("a=1, b=2", {"a": (1, {}), "b": (2, {})}),
    ("a", {"a": (True, {})}),
    ('a=("x" "y";z);p=:AQI=:', {"a": ((("x", {}), ("y", {"z": True})), {"p": b"\1\2"})}),
    ('a="q\\"\\\\"', {"a": ('q"\\', {})}),
    ("a=()", {"a": ((), {})}),
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


@pytest.mark.parametrize("text", [*REFUSED, "a=:A:", "a=1.5", "a=1234567890123456", "a=\u00e9"])
def test_malformed_structured_fields_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        wggw.parse_dictionary(text)
