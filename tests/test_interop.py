"""HTTP Message Signatures with off-the-shelf libraries, in both directions, on live servers.

PyPI `http-message-signatures` with `requests`, and npm `http-message-signatures`, which tests/run
installs outside of the tree where node and npm are.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import secrets
import shutil
import ssl
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests
from harness import API_KEY, PROGRAM, GatewayProcess, a_key, encode, finish, running, some
from http_message_signatures import (
    HTTPMessageSigner,
    HTTPMessageVerifier,
    HTTPSignatureKeyResolver,
    algorithms,
)

import wggw

PATH = "/api/v1/configurations/"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "wggw-tests"
MODULES = CACHE / "npm/node_modules"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with running(tmp_path_factory.mktemp("interop"), AUTH_SCHEMES="rfc9421") as process:
        yield process


class Call(NamedTuple):
    """A request that a library signs; `query` is put behind the path as it is."""

    method: str = "GET"
    query: str = ""
    body: bytes = b""
    components: tuple[str, ...] = ("@method", "@target-uri")
    headers: dict[str, str] = {}


def digest(body: bytes, name: str) -> str:
    value = base64.b64encode(hashlib.new(name.replace("-", ""), body).digest()).decode()
    return f"{name}=:{value}:"


BODY = encode({"public_key": a_key("interop")})
TWO = f"{digest(BODY, 'sha-512')}, {digest(BODY, 'sha-256')}"
CALLS = {
    "target URI": Call(),
    "path": Call(components=("@method", "@path")),
    "the library's default": Call(components=("@method", "@authority", "@target-uri")),
    "empty query": Call(query="?", components=("@method", "@path", "@query")),
    "no query, covered": Call(components=("@method", "@path", "@query")),
    "query": Call(query="?limit=5&status=active", components=("@method", "@path", "@query")),
    "query in the URI": Call(query="?limit=5"),
    "everything": Call(
        query="?limit=7",
        components=("@method", "@path", "@query", "@authority", "@scheme", "@request-target"),
    ),
    "a header in mixed case": Call(
        components=("@method", "@target-uri", "x-request-id"), headers={"X-ReQuest-ID": "a  b"}
    ),
    "body": Call(
        "POST",
        "",
        BODY,
        ("@method", "@target-uri", "content-digest"),
        {"Content-Digest": digest(BODY, "sha-256"), "Content-Type": "application/json"},
    ),
    "two digests": Call(
        "POST",
        "",
        BODY,
        ("@method", "@path", "content-type", "content-digest"),
        {"Content-Digest": TWO, "Content-Type": "application/json"},
    ),
    "the other digest": Call(
        "POST",
        "",
        BODY,
        ("content-digest", "@path", "@method"),
        {"content-digest": digest(BODY, "sha-512"), "content-type": "application/json"},
    ),
}


# --- theirs signs, ours verifies ------------------------------------------------------------------


class Keys(HTTPSignatureKeyResolver):  # type: ignore[misc]
    def resolve_private_key(self, key_id: str) -> bytes:
        return API_KEY.encode()

    def resolve_public_key(self, key_id: str) -> bytes:
        return API_KEY.encode()


def by_requests(gateway: GatewayProcess, call: Call) -> tuple[int, Any]:
    url = f"https://127.0.0.1:{gateway.port}{PATH}{call.query}"
    request = requests.Request(call.method, url, data=call.body, headers=call.headers).prepare()
    request.url = url  # requests drops an empty query's question mark
    signer = HTTPMessageSigner(signature_algorithm=algorithms.HMAC_SHA256, key_resolver=Keys())
    signer.sign(
        request,
        key_id="default",
        created=datetime.now(),
        nonce=secrets.token_hex(8),
        covered_component_ids=call.components,
        body=call.body or None,
        use_existing_digest=bool(call.body),
    )
    with requests.Session() as session, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answer = session.send(request, verify=False)
    return answer.status_code, answer.json()


SIGN = """
const { createHmac, randomUUID } = require('node:crypto');
const https = require('node:https');
const { httpbis, createSigner } = require('http-message-signatures');
const call = JSON.parse(process.argv[1]);
(async () => {
  const key = createSigner(call.key, 'hmac-sha256', 'default');
  const request = { method: call.method, url: call.url, headers: call.headers };
  const signed = await httpbis.signMessage({
    key,
    fields: call.components,
    params: ['created', 'expires', 'nonce', 'keyid', 'alg'],
    paramValues: { nonce: randomUUID() },
  }, request);
  const options = { method: call.method, headers: signed.headers, rejectUnauthorized: false };
  const sent = https.request(call.url, options, (answer) => {
    let text = '';
    answer.on('data', (part) => { text += part; });
    answer.on('end', () => console.log(JSON.stringify([answer.statusCode, JSON.parse(text)])));
  });
  sent.end(call.body);
})();
"""


def need_npm() -> None:
    if shutil.which("node") is None:
        pytest.skip("needs node")
    if not (MODULES / "http-message-signatures").is_dir():
        pytest.skip("needs npm's http-message-signatures, which tests/run installs")


def node(script: str, argument: Any) -> Any:
    done = subprocess.run(
        ["node", "-e", script, json.dumps(argument)],
        env={"PATH": os.environ["PATH"], "NODE_PATH": str(MODULES)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def by_node(gateway: GatewayProcess, call: Call) -> tuple[int, Any]:
    need_npm()
    headers = dict(call.headers)
    if call.body:
        headers["Content-Length"] = str(len(call.body))
    argument = {
        "key": API_KEY,
        "method": call.method,
        "url": f"https://127.0.0.1:{gateway.port}{PATH}{call.query}",
        "components": [name.replace('"', "", 2) for name in call.components],
        "headers": headers,
        "body": call.body.decode(),
    }
    status, content = node(SIGN, argument)
    return status, content


@pytest.mark.parametrize("send", [by_requests, by_node])
@pytest.mark.parametrize("name", some(list(CALLS), 4))
def test_what_a_library_signs_is_accepted(
    gateway: GatewayProcess, name: str, send: Callable[[GatewayProcess, Call], tuple[int, Any]]
) -> None:
    status, content = send(gateway, CALLS[name])
    assert status == 200, content
    if CALLS[name].body:
        assert content["status"] in ("created", "exists")


# --- ours signs, theirs verifies ------------------------------------------------------------------


class Received(NamedTuple):
    method: str
    url: str
    headers: dict[str, str]
    body: bytes


@contextlib.contextmanager
def recorder(directory: Path) -> Iterator[tuple[int, list[Received]]]:
    """A TLS server on 127.0.0.1 that keeps what it is asked: its port, and the requests."""
    found: list[Received] = []

    class Handler(BaseHTTPRequestHandler):
        def record(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            url = f"https://{self.headers['Host']}{self.path}"
            found.append(Received(self.command, url, dict(self.headers), body))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = record

        def log_message(self, *_: Any) -> None:
            pass

    cert, key = str(directory / "other.pem"), str(directory / "other.key")
    wggw.make_certificate(cert, key, ["127.0.0.1"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.server_port, found
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


OURS = [
    ("GET", PATH, ""),
    ("GET", PATH + "?limit=5&status=active", ""),
    ("DELETE", PATH + "abc", ""),
    ("POST", PATH, '{"public_key":"ü"}'),
]


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> list[Received]:
    """What `wggw.py call` sends for each row of OURS."""
    directory = tmp_path_factory.mktemp("ours")
    with recorder(directory) as (port, found):
        key = directory / "api.key"
        key.touch(0o600)
        key.write_text(API_KEY)
        given = ["--url", f"https://127.0.0.1:{port}", "--key-file", str(key)]
        certificate = wggw.read_certificate(str(directory / "other.pem"))
        given += ["--fingerprint", hashlib.sha256(certificate).hexdigest()]
        for method, path, body in OURS:
            command = [*PROGRAM, "call", method, path, "--scheme", "rfc9421", *given]
            command += ["--data", body] if body else []
            finish(command, directory).check_returncode()
    return found


@pytest.mark.parametrize("row", range(len(OURS)))
def test_what_call_signs_verifies_with_the_python_library(sent: list[Received], row: int) -> None:
    got = sent[row]
    assert (got.method, got.body.decode()) == (OURS[row][0], OURS[row][2])
    verifier = HTTPMessageVerifier(signature_algorithm=algorithms.HMAC_SHA256, key_resolver=Keys())
    request = requests.Request(got.method, got.url, data=got.body, headers=got.headers).prepare()
    [result] = verifier.verify(request, max_age=None)
    assert result.parameters["keyid"] == "default" and result.parameters["nonce"]
    assert {'"@method"', '"@target-uri"'} <= set(result.covered_components)
    if got.body:
        assert got.headers["Content-Digest"] == digest(got.body, "sha-256")
        assert '"content-digest"' in result.covered_components


VERIFY = """
const { httpbis, createVerifier } = require('http-message-signatures');
const got = JSON.parse(process.argv[1]);
(async () => {
  const verify = createVerifier(got.key, 'hmac-sha256');
  const key = { id: 'default', algs: ['hmac-sha256'], verify };
  const config = {
    keyLookup: async (parameters) => (parameters.keyid === 'default' ? key : null),
    requiredFields: ['@method', '@target-uri'],
    requiredParams: ['created', 'nonce', 'keyid'],
    tolerance: 600,  // the other tests of this file come before
  };
  console.log(JSON.stringify(await httpbis.verifyMessage(config, got)));
})();
"""


@pytest.mark.parametrize("row", range(len(OURS)))
def test_what_call_signs_verifies_with_the_javascript_library(
    sent: list[Received], row: int
) -> None:
    need_npm()
    got = sent[row]._asdict() | {"body": "", "key": API_KEY}
    assert node(VERIFY, got) is True
    other = got | {"method": "PATCH"}
    assert node(VERIFY, other) is False  # the check above can fail
