"""/openapi.json is the route table: every row, every field that validates, every refusal.

What is answered is compared with it in test_schemathesis.py, by random requests.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from harness import Client, a_key, path_key
from openapi_spec_validator import OpenAPIV31SpecValidator

import wggw

DOCUMENT = wggw.describe_api()


def described(route: wggw.ApiRoute) -> dict[str, Any]:
    return dict(DOCUMENT["paths"][route.template][route.method.lower()])


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
    operation = described(route)
    named = {p["name"] for p in operation.get("parameters", ()) if p.get("in") == "query"}
    assert named == set(route.query)
    content = operation.get("requestBody", {}).get("content", {})
    if "application/json" not in content:
        assert not route.fields
        return
    body = resolved(content["application/json"]["schema"])
    if body["type"] == "array":  # the desired state: its elements have a table
        assert set(resolved(body["items"])["properties"]) == set(wggw.SYNC_FIELDS)
    else:
        assert set(body["properties"]) == set(route.fields)


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema that a reference names."""
    name = schema["$ref"].removeprefix("#/components/schemas/")
    return dict(DOCUMENT["components"]["schemas"][name])


def schemas_in(value: Any) -> Iterator[dict[str, Any]]:
    """Every object within a JSON value."""
    if isinstance(value, dict):
        yield value
    for entry in value.values() if isinstance(value, dict) else value:
        if isinstance(entry, dict | list | tuple):
            yield from schemas_in(entry)


def test_names_are_no_language_s_and_no_generator_s() -> None:
    """Two words are no keyword; the endings are those of types that oapi-codegen and
    typescript-fetch make themselves."""
    operations = [o["operationId"] for item in DOCUMENT["paths"].values() for o in item.values()]
    assert [name for name in operations if not re.fullmatch(r"[a-z]+(_[a-z]+)+", name)] == []
    for name in DOCUMENT["components"]["schemas"].keys() - {"Problem", "EncryptedResponse"}:
        assert re.fullmatch(r"([A-Z][a-z]+){2,4}", name), name
        assert not name.endswith(("Response", "Request", "Params")), name


def test_types_are_such_as_every_generator_knows() -> None:
    for schema in schemas_in(DOCUMENT["paths"] | DOCUMENT["components"]):
        assert not schema.keys() & {"anyOf", "oneOf", "allOf", "not"}
        kinds = schema.get("type")
        assert not isinstance(kinds, list) or (len(kinds) == 2 and kinds[1] == "null")
        if kinds == "integer" or (isinstance(kinds, list) and kinds[0] == "integer"):
            assert schema.get("maximum", 2**63) < 2**31 or schema["format"] == "int64", schema


def test_each_body_and_answer_of_json_has_a_name() -> None:
    for item in DOCUMENT["paths"].values():
        for name, operation in item.items():
            answer = operation["responses"]["200"]["content"]
            contents = [operation.get("requestBody", {}).get("content", {}), answer]
            for content in contents:
                if "application/json" in content and operation["operationId"] != "get_openapi":
                    assert "$ref" in content["application/json"]["schema"], name


def test_nothing_in_it_is_unused() -> None:
    text = wggw.openapi_document().decode()
    for kind in ("schemas", "responses", "parameters"):
        for name in DOCUMENT["components"][kind]:
            assert f'"#/components/{kind}/{name}"' in text


def test_every_operation_has_a_tag_a_summary_and_a_description() -> None:
    tags = {tag["name"] for tag in DOCUMENT["tags"]}
    operations = [operation for item in DOCUMENT["paths"].values() for operation in item.values()]
    assert {tag for operation in operations for tag in operation["tags"]} == tags
    assert all(o["summary"] and o["description"] for o in operations)
    assert DOCUMENT["info"]["license"]


@pytest.mark.parametrize("guard", ["signed", "metrics"])
def test_who_guesses_is_told_to_wait_wherever_there_is_something_to_guess(guard: str) -> None:
    for route in wggw.ROUTES:
        if route.guard == guard:
            assert "429" in described(route)["responses"]


def test_every_path_may_refuse_an_address() -> None:
    """One of METRICS_ALLOWED gets 403 everywhere but at /metrics, which has reasons of its own."""
    for route in wggw.ROUTES:
        assert "403" in wggw.describe_route(route, {})["responses"], route.template


def test_the_paths_that_need_a_signature_are_those_below_api() -> None:
    """Admission.admit() goes by the path, before it looks for the route."""
    for route in wggw.ROUTES:
        assert (route.guard == "signed") == route.template.startswith("/api/")


def headers_of(response: dict[str, Any]) -> dict[str, Any]:
    """The headers of a response, or of the shared one that it names."""
    name = response.get("$ref", "").removeprefix("#/components/responses/")
    return dict((DOCUMENT["components"]["responses"][name] if name else response)["headers"])


@pytest.mark.parametrize("route", wggw.ROUTES, ids=lambda r: f"{r.method} {r.template}")
def test_every_answer_has_a_request_id(shared_client: Client, route: wggw.ApiRoute) -> None:
    for response in described(route)["responses"].values():
        assert headers_of(response)["X-Request-Id"]["$ref"].endswith("/headers/X-Request-Id")
    form = DOCUMENT["components"]["headers"]["X-Request-Id"]["schema"]["pattern"]
    path = route.template.replace("{public_key}", path_key(a_key("nobody")))
    for signed in (
        shared_client.send(route.method, path),
        shared_client.raw(route.method, path, b"", {}),
    ):
        assert re.fullmatch(form, signed.headers["X-Request-Id"])


@pytest.mark.parametrize("route", wggw.ROUTES, ids=lambda r: f"{r.method} {r.template}")
def test_a_row_that_asks_for_a_signature_gets_one(
    shared_client: Client, route: wggw.ApiRoute
) -> None:
    operation = described(route)
    path = route.template.replace("{public_key}", path_key(a_key("nobody")))
    forged = {"signature": "0" * 64, "timestamp": str(int(time.time()))}
    for headers in ({}, forged):
        answer = shared_client.raw(route.method, path, b"", headers)
        if {} in operation["security"]:
            assert answer.status == 200
            continue
        assert answer.status == 401
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert "401" in operation["responses"]
