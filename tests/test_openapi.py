"""/openapi.json is the route table: every row, every field that validates, every refusal.

What is answered is compared with it in test_schemathesis.py, by random requests.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from harness import Client, a_key, path_key, running
from openapi_spec_validator import OpenAPIV31SpecValidator

import wggw

DOCUMENT = wggw.describe_api()


def test_it_is_served_without_a_signature_and_is_the_code_s(client: Client) -> None:
    answer = client.raw("GET", "/openapi.json", b"", {})
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    assert answer.body == wggw.openapi_document() == wggw.encode_json(DOCUMENT)


def test_an_independent_validator_accepts_it() -> None:
    OpenAPIV31SpecValidator(DOCUMENT).validate()


def test_every_row_is_described() -> None:
    described = {(m.upper(), path) for path, item in DOCUMENT["paths"].items() for m in item}
    assert described == {(route.method, route.template) for route in wggw.ROUTES}


def test_names_of_operations_are_unique() -> None:
    names = [op["operationId"] for item in DOCUMENT["paths"].values() for op in item.values()]
    assert len(set(names)) == len(names) == len(wggw.ROUTES)


@pytest.mark.parametrize("route", wggw.ROUTES, ids=lambda r: f"{r.method} {r.template}")
def test_what_validates_is_what_is_described(route: wggw.ApiRoute) -> None:
    operation = wggw.describe_route(route)
    named = {p["name"] for p in operation.get("parameters", ()) if p.get("in") == "query"}
    assert named == set(route.query)
    content = operation.get("requestBody", {}).get("content", {})
    schema = content.get("application/json", {}).get("schema", {})
    if schema.get("type") == "array":  # the desired state: its elements have a table
        assert set(schema["items"]["properties"]) == set(wggw.SYNC_FIELDS)
        return
    tables = [set(s["properties"]) for s in schema.get("anyOf", [schema] if schema else [])]
    assert tables == [set(table) for table in route.bodies]


@pytest.mark.parametrize("guard", ["signed", "metrics"])
def test_who_guesses_is_told_to_wait_wherever_there_is_something_to_guess(guard: str) -> None:
    for route in wggw.ROUTES:
        if route.guard == guard:
            assert "429" in wggw.describe_route(route)["responses"]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with running(tmp_path_factory.mktemp("gateway")) as process:
        yield process.client()


@pytest.mark.parametrize("route", wggw.ROUTES, ids=lambda r: f"{r.method} {r.template}")
def test_a_row_that_asks_for_a_signature_gets_one(api: Client, route: wggw.ApiRoute) -> None:
    operation = wggw.describe_route(route)
    path = route.template.replace("{public_key}", path_key(a_key("nobody")))
    forged = {"signature": "0" * 64, "timestamp": str(int(time.time()))}
    for headers in ({}, forged):
        answer = api.raw(route.method, path, b"", headers)
        if {} in operation["security"]:
            assert answer.status == 200
            continue
        assert answer.status == 401
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert "401" in operation["responses"]
