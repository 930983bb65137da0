#!/usr/bin/env python3
"""Writes docs/API.md from the API's own description, with examples sent to a real gateway.

    python3 tests/make_api_docs.py

Run it after a change to the route table or to a field; test_api_docs.py fails until then. Each row
needs an example in EXAMPLES. What differs from run to run (times, load) is replaced by constants.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from harness import ROOT, Answer, Client, a_key, path_key, running  # noqa: E402

import wggw  # noqa: E402

TARGET = ROOT / "docs/API.md"
ALICE, BOB, CAROL, DAVE = (a_key(name) for name in ("alice", "bob", "carol", "dave"))
TIME = "2026-01-01T00:00:00Z"
# Values that no two runs have in common, by their names in JSON.
CONSTANTS = {
    "memory_usage": 21.5,
    "load_average": 0.08,
    "uptime_seconds": 86400,
    "python_version": "3.13.5",
    "snapshot": {"at": TIME, "bytes": 57344},
    "journal": {"records": 11, "bytes": 2613},
    "sample_age_seconds": 2.5,
    "cpu_percent": 1.5,
    "memory": {"total": 2**31, "available": 2**30, "used": 2**30, "percent": 50.0},
    "disk": {"total": 2**34, "used": 2**33, "free": 2**33, "percent": 50.0},
}


PARAMETERS = {
    "jc": 4, "jmin": 40, "jmax": 70, "s1": 51, "s2": 117, "s3": 107, "s4": 20,
    "h1": "1392043508-1398086253", "h2": "279376732-288068107",
    "h3": "1955609617-1957403020", "h4": "684636159-688150846", "i1": "<r 53>",
}  # fmt: skip

Row = tuple[str, str]  # method, path


class Example(NamedTuple):
    """A request: the key in its path, its query with "?", its JSON body, or bytes of it."""

    key: str = ""
    query: str = ""
    body: Any = None


# In this order: later ones see what earlier ones have done.
EXAMPLES: dict[Row, tuple[Example, ...]] = {
    ("POST", "/api/v1/configurations"): (
        Example(body={"public_key": ALICE, "protocol": "dual", "request_id": "order-4711"}),
        Example(body={"public_key": BOB, "dns": "d2", "expires_at": "2999-12-31T23:59:59Z"}),
        Example(body={"public_key": DAVE, "obfuscation": {"enabled": True, "jc": 7}}),
    ),
    ("GET", "/api/v1/configurations"): (Example(query="?limit=1&status=active"),),
    ("PUT", "/api/v1/configurations"): (
        Example(
            query="?dry_run=true",
            body=[{"public_key": ALICE}, {"public_key": BOB, "status": "suspended"}],
        ),
    ),
    ("POST", "/api/v1/configurations/batch"): (
        Example(
            body={
                "operations": [
                    {"op": "suspend", "public_key": BOB},
                    {"op": "activate", "public_key": BOB},
                    {"op": "delete", "public_key": CAROL},
                ]
            }
        ),
    ),
    ("GET", "/api/v1/configurations/{public_key}"): (
        Example(ALICE),
        Example(ALICE, "?format=wg-quick"),
    ),
    ("PATCH", "/api/v1/configurations/{public_key}"): (
        Example(BOB, body={"quota_bytes": 50 * 10**9, "expires_at": None}),
    ),
    ("PUT", "/api/v1/configurations/{public_key}/status"): (
        Example(ALICE, body={"status": "suspended"}),
        Example(ALICE, body={"status": "active"}),
    ),
    ("POST", "/api/v1/configurations/{public_key}/rotate"): (
        Example(BOB, body={"new_public_key": CAROL}),
    ),
    ("GET", "/api/v1/ip-usage"): (Example(),),
    ("DELETE", "/api/v1/configurations/{public_key}"): (Example(CAROL),),
    ("POST", "/api/v1/sync-ips"): (Example(),),
    ("GET", "/api/v1/server/status"): (Example(),),
    ("GET", "/api/v1/server/metrics"): (Example(),),
    ("GET", "/api/v1/obfuscation"): (Example(),),
    ("POST", "/api/v1/obfuscation/rotate"): (
        Example(body={"parameters": {**PARAMETERS, "s1": 52}, "confirm": True}),
    ),
    ("GET", "/api/v1/snapshot"): (Example(),),
    ("PUT", "/api/v1/snapshot"): (Example(body=b""),),  # the snapshot that was exported before
    ("GET", "/metrics"): (Example(),),
    ("GET", "/healthz"): (Example(),),
    ("GET", "/readyz"): (Example(),),
    ("GET", "/openapi.json"): (Example(),),
}


# --- examples -------------------------------------------------------------------------------------


def send_examples(client: Client) -> dict[Row, list[str]]:
    """Each row's requests and answers as Markdown. AssertionError when one is no 200."""
    shown: dict[Row, list[str]] = {}
    snapshot = b""
    for (method, template), examples in EXAMPLES.items():
        blocks = shown[method, template] = []
        for example in examples:
            path = template.replace("{public_key}", path_key(example.key)) + example.query
            body = snapshot if isinstance(example.body, bytes) else example.body
            answer = client.send(method, path, body)
            assert answer.status == 200, (method, path, answer)
            if template.endswith("/snapshot") and method == "GET":
                snapshot = answer.body
            blocks += [show_request(method, path, example.body), show_answer(answer)]
    return shown


def show_request(method: str, path: str, body: Any) -> str:
    lines = [f"{method} {path}"]
    if isinstance(body, bytes):
        lines += ["", "(the bytes of a snapshot)"]
    elif body is not None:
        lines += ["Content-Type: application/json", "", show_json(body)]
    return fenced("http", "\n".join(lines))


def show_answer(answer: Answer) -> str:
    kind = answer.headers["Content-Type"]
    if kind == "application/json":
        return fenced("json", show_json(steady(answer.json)))
    if kind == "application/octet-stream":
        return fenced("", "(a file: an SQLite database)")
    text = answer.body.decode()
    if "version=0.0.4" in kind:
        lines = [line for line in text.splitlines() if re.search(r"\bwggw_peers\b", line)]
        text = "\n".join([*lines, "…"])
    return fenced("", text.strip())


def steady(value: Any) -> Any:
    """A JSON value without what differs from run to run."""
    if isinstance(value, list):
        return [steady(entry) for entry in value]
    if isinstance(value, dict):
        if "openapi" in value:
            return {"openapi": value["openapi"], "info": {"title": value["info"]["title"]}}
        return {k: constant(k, v) if k in CONSTANTS else steady(v) for k, v in value.items()}
    if isinstance(value, str) and re.fullmatch(r"20\d\d-.*Z", value):
        return TIME
    return value


def constant(name: str, value: Any) -> Any:
    return [CONSTANTS[name]] * len(value) if isinstance(value, list) else CONSTANTS[name]


def show_json(value: Any) -> str:
    """Indented, with lists of texts on one line."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return (
        re.sub(r"\[[^\[\]{}]*\]", lambda match: re.sub(r"\n\s*", " ", match[0]), text)
        .replace("[ ", "[")
        .replace(" ]", "]")
    )


def fenced(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


# --- the description as Markdown ------------------------------------------------------------------


def kind_of(schema: Mapping[str, Any]) -> str:
    """A schema in a few words."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/")[-1]
        return f"[{name}](#{name.lower()})"
    for word in ("anyOf", "oneOf"):
        if word in schema:
            return " or ".join(dict.fromkeys(kind_of(one) for one in schema[word]))
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(word)}`" for word in schema["enum"])
    if "array" in kinds:
        return f"list of {kind_of(schema['items'])}"
    named = [schema["format"] if "format" in schema and k == "string" else k for k in kinds]
    return " or ".join(named)


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def table(*head: str) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]


def properties(schema: Mapping[str, Any], mark: Sequence[str] = ()) -> Iterator[str]:
    """An object's properties; those in `mark` are shown as required."""
    yield from table("name", "type", "")
    for name, row in schema["properties"].items():
        text = ("**required**; " if name in mark else "") + row.get("description", "")
        yield f"| `{name}` | {cell(kind_of(row))} | {cell(text.rstrip('; '))} |"
    yield ""


def render_query(operation: Mapping[str, Any]) -> Iterator[str]:
    rows = [p for p in operation.get("parameters", ()) if p.get("in") == "query"]
    if not rows:
        return
    yield "Query:\n"
    yield from table("name", "type", "")
    for row in rows:
        default = row["schema"].get("default")
        text = row["description"] + ("" if default is None else f"; default {default}")
        yield f"| `{row['name']}` | {cell(kind_of(row['schema']))} | {cell(text)} |"
    yield ""


def render_body(operation: Mapping[str, Any]) -> Iterator[str]:
    body = operation.get("requestBody", {})
    for media, content in body.get("content", {}).items():
        yield f"Body: `{media}`. {body['description']}\n"
        schemas = content["schema"].get("anyOf", [content["schema"]])
        for i, schema in enumerate(schemas):
            if "properties" in schema:
                yield from ["or\n"] if i else []
                yield from properties(schema, schema.get("required", ()))


def render_operation(operation: Mapping[str, Any], row: Row, blocks: list[str]) -> Iterator[str]:
    yield f"### {' '.join(row)}\n"
    yield operation["summary"] + "\n"
    yield from render_query(operation)
    yield from render_body(operation)
    for media, content in operation["responses"]["200"]["content"].items():
        schema = content["schema"]
        if "$ref" in schema or "anyOf" in schema:
            yield f"Answer, `{media}`: {kind_of(schema)}.\n"
    yield from (block + "\n" for block in blocks)
    statuses = [status for status in operation["responses"] if status != "200"]
    yield f"Errors: {', '.join(statuses)}.\n"


def render_values(schemas: Mapping[str, Any]) -> Iterator[str]:
    yield "## Values\n"
    for name, schema in schemas.items():
        yield f"### {name}\n"
        yield from properties(schema) if "properties" in schema else [kind_of(schema) + "\n"]


def render_signatures(schemes: Mapping[str, Any]) -> Iterator[str]:
    yield "## Signatures\n"
    yield SIGNATURES
    yield from table("header", "content")
    for row in schemes.values():
        name = row.get("name", "Authorization: Bearer")
        yield f"| `{name}` | {cell(row['description'])} |"
    yield ""


def render_errors(client: Client) -> Iterator[str]:
    answer = client.get(a_key("nobody"))
    yield "## Errors\n"
    yield ERRORS
    yield fenced("json", show_json(answer.json)) + "\n"
    yield from table("status", "meaning")
    yield from (f"| {status} | {cell(text)} |" for status, text in wggw.ERROR_TEXTS.items())
    yield ""


def render(client: Client) -> str:
    """The whole of docs/API.md, from a gateway without peers."""
    document = json.loads(client.raw("GET", "/openapi.json", b"", {}).body)
    examples = send_examples(client)
    lines = [HEAD, *render_signatures(document["components"]["securitySchemes"])]
    lines += [*render_errors(client), "## Requests\n"]
    for path, item in document["paths"].items():
        for method, operation in item.items():
            row = (method.upper(), path)
            if row not in examples:
                raise SystemExit(f"tests/make_api_docs.py: EXAMPLES has no row {row}")
            lines += render_operation(operation, row, examples[row])
    lines += render_values(document["components"]["schemas"])
    return "\n".join(lines).rstrip("\n") + "\n"


HEAD = """# The API

Made by `python3 tests/make_api_docs.py` from `/openapi.json`, which a gateway serves without a
signature, and from requests that were really sent. Do not edit it.

JSON in UTF-8 over HTTPS. A trailing slash makes no difference; HEAD is GET without the body;
unknown fields and query parameters are ignored; in a create request null is as good as absent.
Answers may get more fields in later versions. A key in a path is base64 with `/` written `_` and
`+` written `-`, or percent-encoded; its final `=` may be missing.

When an answer says created, active, suspended or deleted, the interface already is so and, with
`DURABILITY=commit`, the change is on disk. A request that failed has changed nothing.
"""

SIGNATURES = """Every request below `/api/` is signed, in one of two ways: by the headers
`signature` and `timestamp`, or by HTTP Message Signatures (RFC 9421). The examples of requests
leave the signature out.
"""

ERRORS = """Errors are `application/problem+json` (RFC 9457). After a request whose
`encrypted_payload` was decrypted they are `{"encrypted_response": …}`, as all answers to it.
"""


SETTINGS = {
    "WG_ENDPOINT": "vpn.example.org",
    "AWG_INTERFACE": "awg0",
    "AWG_IPV4_SUBNET": "10.0.2.0/24",
    "AWG_PARAMS": json.dumps(PARAMETERS),
}


@contextlib.contextmanager
def documented_gateway(directory: Path) -> Iterator[Client]:
    """A gateway of which all that the examples show is always the same."""
    for number, name in enumerate(("privatekey", "awg-privatekey")):
        key = bytes(range(number, number + 32))
        (directory / name).write_text(base64.b64encode(key).decode() + "\n")
        (directory / name).chmod(0o600)
    with running(directory, **SETTINGS) as process:
        client = process.client()
        yield client
        client.close()


def main() -> None:
    with tempfile.TemporaryDirectory() as name, documented_gateway(Path(name)) as client:
        text = render(client)
    TARGET.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
