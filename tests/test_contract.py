"""The contract as somebody sees it who knows nothing of the code: raw requests, exit codes.

Signatures are computed by OpenSSL's command line.
"""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import API_KEY, SCRIPT, GatewayProcess


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """Started as the contract says it."""
    process = GatewayProcess(tmp_path_factory.mktemp("gateway"))
    process.program = SCRIPT
    try:
        yield process.start()
    finally:
        process.close()


def signed(length: int = 0) -> bytes:
    """The two headers of the legacy scheme."""
    now = str(int(time.time()))
    done = subprocess.run(
        ["openssl", "dgst", "-sha256", "-hmac", API_KEY],
        input=f"timestamp={now}, body_length={length}".encode(),
        capture_output=True,
        check=True,
    )
    return f"timestamp: {now}\r\nsignature: {done.stdout.split()[-1].decode()}\r\n".encode()


def exchange(gateway: GatewayProcess, request: bytes) -> tuple[int, bytes, bytes]:
    """(status, head, body) of the answer to raw bytes; the connection is closed then."""
    context = ssl.create_default_context(cafile=gateway.settings["TLS_CERT"])
    context.check_hostname = False
    with context.wrap_socket(socket.create_connection(("127.0.0.1", gateway.port), 10)) as tls:
        tls.sendall(request)
        data = b""
        while b"\r\n\r\n" not in data:
            data += tls.recv(65536) or pytest.fail(f"closed after {data!r}")
        head, _, body = data.partition(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split()[0])
        while len(body) < length:
            body += tls.recv(65536) or pytest.fail(f"closed after {data!r}")
    return int(head.split()[1]), head, body


def request(method: str, path: str, headers: bytes = b"", body: bytes = b"") -> bytes:
    line = f"{method} {path} HTTP/1.1\r\nHost: gateway\r\n".encode()
    return line + signed(len(body)) + headers + b"\r\n" + body


WITH_BODY = (
    ("POST", "/api/v1/configurations"),
    ("POST", "/api/v1/configurations/batch"),
    ("PATCH", "/api/v1/configurations/" + "A" * 43),
    ("POST", "/api/v1/configurations/" + "A" * 43 + "/rotate"),
    ("PUT", "/api/v1/configurations/" + "A" * 43 + "/status"),
    ("PUT", "/api/v1/snapshot"),
)


@pytest.mark.parametrize(("method", "path"), WITH_BODY)
def test_a_request_with_a_body_says_how_long_it_is(
    gateway: GatewayProcess, method: str, path: str
) -> None:
    status, head, body = exchange(gateway, request(method, path))
    assert (status, json.loads(body)["status"]) == (411, 411)
    assert b"Content-Type: application/problem+json" in head


def test_a_request_without_a_body_need_not_say_so(gateway: GatewayProcess) -> None:
    status, _, body = exchange(gateway, request("POST", "/api/v1/sync-ips/"))
    assert (status, json.loads(body)["status"]) == (200, "synced")


def test_an_import_is_told_what_is_wrong_and_nothing_of_a_start(gateway: GatewayProcess) -> None:
    given = request("PUT", "/api/v1/snapshot", b"Content-Length: 4\r\n", b"junk")
    status, _, body = exchange(gateway, given)
    assert status == 400
    assert json.loads(body)["detail"] == (
        "the snapshot was refused: at byte 0: this is not a snapshot"
    )


def test_a_bad_client_ca_is_named_alone(tmp_path: Path) -> None:
    process = GatewayProcess(tmp_path, TLS_CLIENT_CA=str(tmp_path / "ca.pem"))
    try:
        assert process.spawn().wait(60) == 2
    finally:
        process.close()
    last = process.text().splitlines()[-1]
    assert last.startswith(f"wggw: TLS_CLIENT_CA '{tmp_path}/ca.pem': "), last
    assert "TLS_CERT" not in last and not (tmp_path / "cert.pem").exists()
