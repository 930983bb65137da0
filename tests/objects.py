"""Object stores for the tests of the remote copy: in memory, behind TLS, and a real S3.

The first two can be told to fail. The S3 is versitygw (Go, from its module proxy), which checks
every signature; tests/run builds it when Go is there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from harness import free_port, wait_for

TOKEN = "a-token-for-the-copy"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "wggw-tests"
ACCESS_KEY, SECRET_KEY = "the-access-key", "the-secret-key-of-s3"


def make_certificate(directory: Path, address: str = "127.0.0.1") -> tuple[Path, Path]:
    """A certificate for an address and its key, by OpenSSL's command line."""
    cert, key = directory / "store.pem", directory / "store.key"
    command = "openssl req -x509 -nodes -days 2 -subj /CN=store -newkey ec"
    curve = f"-pkeyopt ec_paramgen_curve:prime256v1 -addext subjectAltName=IP:{address}"
    subprocess.run(
        [*command.split(), *curve.split(), "-keyout", str(key), "-out", str(cert)],
        check=True,
        capture_output=True,
    )
    return cert, key


class TlsStore(ThreadingHTTPServer):
    """GET and PUT below /copy/ with a bearer token; `fault` names what goes wrong now, if anything.

    refuse: 503; stall: no answer; hang up: no answer and the end of the connection; truncate: half
    of what was announced; announce less: half of the length, all of the content; announce more:
    more than there is, and then nothing; announce nothing: half of it without a length; keep half:
    200 for an upload of which half is kept; lose the answer: an upload is kept, the connection
    ends; garbage: no HTTP.
    """

    daemon_threads = True

    def __init__(self, cert: Path, key: Path, address: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        super().__init__(address, _Objects)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
        self.socket = context.wrap_socket(
            self.socket, server_side=True, do_handshake_on_connect=False
        )
        self.objects: dict[str, bytes] = {}
        self.fault: Callable[[str, str], str] = lambda method, name: ""
        self.requests: list[tuple[str, str, int]] = []  # method, name, status
        self.ended = threading.Event()
        self.url = f"https://{address[0]}:{self.server_port}/copy"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # connections that faults cut


class _Objects(BaseHTTPRequestHandler):
    server: TlsStore
    protocol_version = "HTTP/1.1"  # connections are kept
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        name, fault = self._begin()
        content = self.server.objects.get(name)
        if not self._allowed() or fault == "refuse":
            self._answer(503 if fault else 401, b"no")
        elif content is None:
            self._answer(404, b"nothing here")
        elif fault == "truncate":
            self._answer(200, content[: len(content) // 2], len(content))
        elif fault == "announce less":
            self._answer(200, content, len(content) // 2)
        elif fault == "announce more":
            self._answer(200, content, len(content) + 100)
            self.server.ended.wait(60)
        elif fault == "announce nothing":
            self._answer(200, content[: len(content) // 2], -1)
        else:
            self._answer(200, content)

    def do_PUT(self) -> None:
        name, fault = self._begin()
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if not self._allowed() or fault == "refuse":
            self._answer(503 if fault else 401, b"no")
            return
        kept = content[: len(content) // 2] if fault == "keep half" else content
        self.server.objects[name] = kept
        if fault == "lose the answer":
            self.close_connection = True
        else:
            self._answer(200, b"")

    def _begin(self) -> tuple[str, str]:
        name = self.path.removeprefix("/copy/")
        fault = self.server.fault(self.command, name)
        if fault == "stall":
            self.server.ended.wait(60)
        if fault == "garbage":
            self.wfile.write(b"this is no HTTP\r\n\r\n")
        if fault in ("stall", "hang up", "garbage"):
            raise ConnectionError("a fault that was asked for")
        return name, fault

    def _allowed(self) -> bool:
        return self.headers["Authorization"] == f"Bearer {TOKEN}"

    def _answer(self, status: int, content: bytes, announced: int | None = None) -> None:
        self.server.requests.append((self.command, self.path, status))
        self.send_response(status)
        if announced != -1:
            length = len(content) if announced is None else announced
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = announced not in (None, len(content))

    def log_message(self, *arguments: Any) -> None:
        pass


@contextlib.contextmanager
def tls_store(directory: Path) -> Iterator[TlsStore]:
    server = TlsStore(*make_certificate(directory))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()


class S3:
    """A versitygw with one bucket."""

    def __init__(self, directory: Path, port: int) -> None:
        self.root = directory / "s3"
        self.bucket = "copies"
        self.endpoint = f"http://127.0.0.1:{port}"
        self.settings = {
            "SNAPSHOT_URL": f"s3://{self.bucket}/gateway-1",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "eu-test-1",
            "AWS_ENDPOINT_URL": self.endpoint,
        }

    def names(self) -> set[str]:
        return {path.name for path in (self.root / self.bucket / "gateway-1").iterdir()}


@contextlib.contextmanager
def real_s3(directory: Path) -> Iterator[S3]:
    import pytest

    program = CACHE / "go" / "bin" / "versitygw"
    if not program.exists():
        pytest.skip("needs versitygw: tests/run --full builds it when Go is there")
    port = free_port()
    store = S3(directory, port)
    (store.root / store.bucket).mkdir(parents=True)
    sidecar = directory / "metadata"  # file systems without extended attributes do, too
    sidecar.mkdir()
    arguments = ["--port", f"127.0.0.1:{port}", "--region", "eu-test-1", "--quiet", "--keep-alive"]
    environment = {"ROOT_ACCESS_KEY": ACCESS_KEY, "ROOT_SECRET_KEY": SECRET_KEY}
    with (directory / "s3.log").open("wb") as log:
        process = subprocess.Popen(
            [str(program), *arguments, "posix", "--sidecar", str(sidecar), str(store.root)],
            env={"PATH": os.environ["PATH"], "HOME": str(directory), **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:

        def listens() -> bool:
            assert process.poll() is None, (directory / "s3.log").read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return True
            return False

        wait_for(listens, 60, "versitygw")
        yield store
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(store.root, ignore_errors=True)
