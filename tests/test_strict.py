"""HTTP and JSON at the edge, on a live server: a 4xx, never a 5xx, never a changed state."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from harness import Client, GatewayProcess, a_key, encode, path_key, running, sign
from test_connections import Wire, head, signed

import wggw

PEERS = "/api/v1/configurations/"
KEY = a_key("kept")
PEER = PEERS + path_key(KEY)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    settings = {"MAX_AUTH_FAILURES": "100000", "GATEWAY_PUBLIC_KEY": "a shared secret of both"}
    with running(tmp_path_factory.mktemp("strict"), **settings) as gateway:
        assert gateway.client().create(KEY, protocol="dual").status == 200
        yield gateway


@pytest.fixture
def api(shared: GatewayProcess) -> Iterator[Client]:
    client = shared.client()
    before = state(client)
    yield client
    client.close()
    client = shared.client()
    assert state(client) == before
    client.close()


def state(client: Client) -> list[dict[str, Any]]:
    """Everything that may not change, as the list and the journal's number show it."""
    rows: list[dict[str, Any]] = client.send("GET", PEERS + "?limit=1000").json["configurations"]
    metrics = client.raw("GET", "/metrics", b"", {}).body.decode()
    return [*rows, {"records": re.findall(r"^wggw_journal_record\w* \d+$", metrics, re.MULTILINE)}]


# --- methods and targets --------------------------------------------------------------------------

METHODS = [
    ("HEAD", "/healthz", 200),
    ("HEAD", PEER, 200),
    ("HEAD", PEERS, 200),
    ("HEAD", PEERS + "batch", 405),
    ("HEAD", "/nowhere", 404),
    ("OPTIONS", PEERS, 405),
    ("OPTIONS", "/healthz", 405),
    ("OPTIONS", "*", 404),
    ("TRACE", PEERS, 405),
    ("CONNECT", "gateway:443", 404),
    ("PROPFIND", PEERS, 405),
    ("BREW", "/healthz", 405),
    ("get", PEERS, 405),
    ("POST", "/healthz", 405),
    ("DELETE", PEERS, 405),
    ("POST", PEER, 405),
]


@pytest.mark.parametrize(("method", "path", "status"), METHODS)
def test_methods_are_answered_right(
    api: Client, shared: GatewayProcess, method: str, path: str, status: int
) -> None:
    """The connection goes on behind each of them: nothing of an answer was misjudged."""
    wire = Wire(shared.port)
    try:
        wire.send(signed(method, path))
        if method == "HEAD":
            data = wire.socket.recv(65536)
            assert data.startswith(f"HTTP/1.1 {status} ".encode()) and data.endswith(b"\r\n\r\n")
            assert re.search(rb"Content-Length: [1-9]", data)
        else:
            assert wire.answer()[0] == status
        wire.send(head("GET", "/healthz", {}))
        assert wire.answer()[0] == 200
    finally:
        wire.close()


TARGETS = [
    ("/", 404),
    ("/api", 404),
    ("/api/v2/ip-usage", 404),
    ("/api/v1/ip-usage//", 404),
    ("/healthz/x", 404),
    ("/.env", 404),
    ("/api/v1/configurations/x/y/z", 404),
    ("/api/v1/%63onfigurations/", 404),
    ("/%61pi/v1/configurations/", 404),
    ("/api%2Fv1%2Fconfigurations", 404),
    ("//api/v1/configurations/", 404),
    ("/api//v1/configurations/", 404),
    ("/api/v1/configurations//", 404),
    ("/api/v1/../v1/configurations/", 404),
    ("/api/v1/./configurations/", 404),
    ("/api/v1/configurations/%2e%2e/ip-usage", 404),
    ("/API/v1/configurations/", 404),
    ("/api/v1/configurations;a=b", 404),
    ("/api/v1/configurations/#fragment", 404),
    ("/api/v1/configurations/%00", 404),
    ("/api/v1/configurations/%ff%fe", 404),
    ("/api/v1/configurations/" + "a" * 4000, 404),
    ("/api/v1/configurations/{public_key}", 404),
    ("/api/v1/configurations?limit=0", 422),
    ("/api/v1/configurations?limit=1&limit=2", 400),
    ("/api/v1/configurations?limit=%ff", 400),
    ("/api/v1/configurations?limit=" + "9" * 5000, 422),
    ("/api/v1/configurations?cursor=%00", 422),
    ("/api/v1/configurations?" + "&".join(f"a{n}=b" for n in range(100)), 400),
    ("https://gateway/api/v1/configurations/", 200),
    ("http://gateway:8000/api/v1/configurations?limit=1", 200),
    ("https://user@gateway/api/v1/configurations/", 404),
    ("ftp://gateway/api/v1/configurations/", 404),
    ("api/v1/configurations/", 404),
    ("https://gateway", 404),
]


@pytest.mark.parametrize(("target", "status"), TARGETS, ids=[t[:40] for t, _ in TARGETS])
def test_targets_mean_one_thing(
    api: Client, shared: GatewayProcess, target: str, status: int
) -> None:
    wire = Wire(shared.port)
    try:
        wire.send(signed("GET", target))
        assert wire.answer()[0] == status
    finally:
        wire.close()


@pytest.mark.parametrize(("target", "status"), TARGETS, ids=[t[:40] for t, _ in TARGETS])
def test_no_form_of_a_path_gets_around_the_signature(
    api: Client, shared: GatewayProcess, target: str, status: int
) -> None:
    for method in ("GET", "DELETE"):
        wire = Wire(shared.port)
        wire.send(head(method, target, {}))
        assert wire.answer()[0] in (401, 404)
        wire.close()


def test_every_signed_route_is_below_api() -> None:
    """What admit() goes by when it asks for a signature."""
    for route in wggw.ROUTES:
        assert (route.guard == "signed") == route.template.startswith("/api/"), route.template


EXPECTS = [("100-continue", 100), ("100-Continue", 100), ("200-ok", 0), ("", 0)]


@pytest.mark.parametrize(("value", "first"), EXPECTS)
def test_expect(api: Client, shared: GatewayProcess, value: str, first: int) -> None:
    """Only 100-continue is asked back for; a client that waits for another is not left waiting."""
    body = encode({"public_key": KEY})
    wire = Wire(shared.port)
    try:
        wire.send(signed("POST", PEERS, body, Expect=value)[: -len(body)])
        if first:
            assert wire.answer()[0] == first
        wire.send(body)
        assert wire.answer()[0] == 200
    finally:
        wire.close()


# --- bodies ---------------------------------------------------------------------------------------

DIGITS = b"9" * 5000
BODIES: dict[str, bytes] = {
    "no JSON": b"hello",
    "a number": b"1",
    "a list": b"[]",
    "null": b"null",
    "duplicate keys": b'{"public_key":"a","public_key":"b"}',
    "duplicate keys, escaped": b'{"op":1,"\\u006fp":2}',
    "lone surrogate in a name": b'{"\\ud800":1}',
    "deep arrays": b'{"a":' + b"[" * 30000 + b"]" * 30000 + b"}",
    "deep objects": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "huge integer": b'{"quota_bytes":' + DIGITS + b"}",
    "huge negative integer": b'{"quota_bytes":-' + DIGITS + b"}",
    "NaN": b'{"quota_bytes":NaN}',
    "Infinity": b'{"quota_bytes":Infinity}',
    "non-UTF-8": b'{"request_id":"\xff"}',
    "UTF-16": '{"request_id":"a"}'.encode("utf-16"),
    "surrogates in UTF-8": b'{"request_id":"\xed\xa0\x80"}',
    "NUL behind": b"{}\0",
    "BOM": b"\xef\xbb\xbf{}",
}
# Values of a field that no field takes; {} stands for the field's name.
WRONG: dict[str, bytes] = {
    "object": b'{"a":1}',
    "list of lists": b"[[[[]]]]",
    "list of objects": b"[{}]",
    "true": b"true",
    "float": b"1.5",
    "1e400": b"1e400",
    "-1e400": b"-1e400",
    "a large float": b"1e308",
    "4,000 digits": b"9" * 4000,
    "2**63": b"9223372036854775808",
    "-1": b"-1",
    "lone surrogate": b'"\\ud800"',
    "text of 60,000": b'"' + b"a" * 60000 + b'"',
    "NUL": b'"\\u0000"',
    "empty": b'""',
    "other digits": '"١٢٣"'.encode(),
}
TEXTS = ("NUL", "empty", "other digits")
# Which of them are right for a field after all.
TAKEN = {
    *((field, name) for field in ("request_id", "label") for name in TEXTS),
    ("obfuscation", "true"),
    ("obfuscation", "object"),
}
PLACES = [
    ("POST", PEERS),
    ("POST", PEERS + "batch"),
    ("PATCH", PEER),
    ("POST", PEER + "/rotate"),
    ("PUT", PEER + "/status"),
]


@pytest.mark.parametrize(("method", "path"), PLACES)
def test_bodies_that_are_not_one_json_object_are_400(api: Client, method: str, path: str) -> None:
    found = {name: api.send(method, path, body).status for name, body in BODIES.items()}
    assert found == dict.fromkeys(BODIES, 400)
    assert api.send(method, path, b"").status == 400
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "json",
        "application/jsonx",
        "\xff",
    ):
        assert api.send(method, path, b"{}", **{"Content-Type": kind}).status == 415


def fields(table: Any, known: dict[str, Any]) -> list[tuple[str, bytes]]:
    """A body for each field and wrong value: (name, JSON)."""
    found = []
    for field in table:
        others = encode({k: v for k, v in known.items() if k != field})[1:]
        for name, value in WRONG.items():
            if (field, name) not in TAKEN:
                found.append((f"{field}: {name}", b'{"%b":%b, ' % (field.encode(), value) + others))
    return found


NEW = {"public_key": a_key("new"), "request_id": "x"}
TABLES = {
    "create": ("POST", PEERS, wggw.CREATE_FIELDS, NEW),
    "update": ("PATCH", PEER, wggw.PATCH_FIELDS, {"x": 1}),
    "rotate": ("POST", PEER + "/rotate", wggw.ROTATE_FIELDS, {"x": 1}),
    "status": ("PUT", PEER + "/status", wggw.STATUS_FIELDS, {"x": 1}),
}


@pytest.mark.parametrize("table", TABLES)
def test_wrong_values_are_refused_by_name(api: Client, table: str) -> None:
    method, path, known, rest = TABLES[table]
    wrong = {}
    for name, body in fields(known, rest):
        answer = api.send(method, path, body)
        field = name.split(":")[0]
        if answer.status != 422 or field not in answer.json["detail"]:
            wrong[name] = answer
    assert wrong == {}


def test_a_sealed_payload_is_as_strict(api: Client) -> None:
    """Also behind decryption; the answer to those is sealed, too."""
    box = wggw.PayloadBox("a shared secret of both")
    for name, body in BODIES.items():
        if len(body) > wggw.MAX_BODY // 2:
            continue  # a 413 in this form
        sealed = encode({"encrypted_payload": box.seal(body)})
        assert api.send("POST", PEERS, sealed).status == 400, name
    for name, body in fields(wggw.CREATE_FIELDS, NEW)[::7]:
        if len(body) > wggw.MAX_BODY // 2:
            continue
        answer = api.send("POST", PEERS, encode({"encrypted_payload": box.seal(body)}))
        assert answer.status == 422, name
        problem = json.loads(box.open(answer.json["encrypted_response"]))
        assert name.split(":")[0] in problem["detail"]


def test_wrong_operations_of_a_batch_are_errors_in_their_place(api: Client) -> None:
    operations = [body for _, body in fields(wggw.CREATE_FIELDS, NEW)]
    operations = [b'{"op":"create",' + body[1:] for body in operations if len(body) < 3000]
    operations += [b"1", b"null", b"[]", b'{"op":1}', b'{"op":"drop"}', b'{"op":["create"]}']
    answer = api.send("POST", PEERS + "batch", b'{"operations":[%b]}' % b",".join(operations))
    assert answer.status == 200
    statuses = [result["status"] for result in answer.json["results"]]
    assert len(statuses) == len(operations) and set(statuses) <= {400, 422}


def test_signature_and_time_in_every_wrong_shape_are_401(api: Client) -> None:
    good = sign()
    shapes = ["", " ", "0", "-1", "+5", "1e9", "NaN", "9" * 30, "9" * 5000, "\xff" * 64, "é", "0x5"]
    for shape in shapes:
        for name in good:
            sent = shape.encode("utf-8").decode("latin-1")
            answer = api.raw("GET", PEERS, b"", {**good, name: sent})
            assert answer.status == 401, (name, shape)
    for scheme in ({"Signature-Input": shape} for shape in (*shapes, "a=()", "a=(", "(((", ",")):
        assert api.raw("GET", PEERS, b"", {**good, **scheme}).status == 401
