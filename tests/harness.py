"""What the tests share: a gateway as a real process, and a client that signs as backends do.

The client is written from the contract with the standard library alone; it uses nothing of
wggw.py, so that the two can disagree.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import http.client
import io
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar
from unittest import mock

from forked import Parent

T = TypeVar("T")

# WGGW_LONG=1, as .ci/run sets it, asks for whole sweeps and many rounds; without it tests take a
# sample of the same, by some() or by a number of their own.
LONG = os.environ.get("WGGW_LONG") == "1"
ROOT = Path(__file__).resolve().parent.parent
WGGW = ROOT / "wggw.py"
SCRIPT = [sys.executable, str(WGGW)]  # as users start it
# The same from its cached bytecode, as `serve` goes on by itself: compiling takes 0.25 s a start.
MODULE = "import sys; sys.path[:0] = [sys.argv.pop(1)]; import wggw; {}sys.exit(wggw.main())"
PROGRAM = [sys.executable, "-P", "-c", MODULE.format(""), str(ROOT)]
PARENT: list[Parent] = []  # the one of all that PROGRAM starts, in a run of pytest
API_KEY = "8f29c82c5d1f4b6e9a7730d2c4e1f0a98f29c82c5d1f4b6e9a7730d2c4e1f0a9"


def some(cases: Sequence[T], number: int) -> Sequence[T]:
    """That many of the cases, evenly spread, the first and the last among them; all when LONG."""
    if LONG or number >= len(cases):
        return cases
    return [cases[n * (len(cases) - 1) // max(number - 1, 1)] for n in range(number)]


def program_with(**constants: float | str) -> list[str]:
    """The program with other values of its constants, such as a deadline that is soon over."""
    lines = "".join(f"wggw.{name} = {value!r}; " for name, value in constants.items())
    return [sys.executable, "-P", "-c", MODULE.format(lines), str(ROOT)]


def reserve_port() -> socket.socket:
    """A port that is nobody else's until the socket is closed.

    It is bound and does not listen: the kernel gives its port to nobody who asks for any port, and
    one who asks for this port gets it with SO_REUSEADDR. It is bound to all addresses: a gateway on
    all of them fails if somebody has the port on one.
    """
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    reserved = socket.socket(family)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        reserved.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    reserved.bind(("", 0))
    return reserved


_reserved: list[socket.socket] = []


def run_wggw(
    directory: Path, *arguments: str, given: bytes = b"", **settings: str
) -> subprocess.CompletedProcess[str]:
    """A command in that directory with these settings and no others; it shows no traceback.

    It runs in this process, where the program is there already: a start takes 0.1 s of processor
    time. What belongs to a process (signals, closed streams) is tested with PROGRAM.
    """
    import wggw

    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    with (
        mock.patch.dict(os.environ, {"PATH": os.environ["PATH"], **settings}, clear=True),
        contextlib.chdir(directory),
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), "utf-8")),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            code: Any = wggw.main(arguments)
        except SystemExit as ended:  # argparse's way, for what it refuses and for --help
            code = ended.code
    told, error = (stream.buffer.getvalue().decode() for stream in (out, err))  # type: ignore[attr-defined]
    return subprocess.CompletedProcess(arguments, code, told, error)


def ok(answer: Answer) -> Any:
    """What it says; anything but 200 is a failure."""
    assert answer.status == 200, answer
    return answer.json


def free_port() -> int:
    """A port that is nobody else's as long as this process lives."""
    _reserved.append(reserve_port())
    return int(_reserved[-1].getsockname()[1])


def wait_for(condition: Callable[[], Any], seconds: float = 30.0, what: str = "") -> Any:
    """Return the condition's first true value; AssertionError when it does not come in time.

    The time is for a machine that is busy with other things: what comes late is no failure. The
    longer it takes, the less often it is asked for: that costs a tenth of the time at most.
    """
    begun = time.monotonic()
    while True:
        waited = time.monotonic() - begun
        if value := condition():
            return value
        if waited >= seconds:
            raise AssertionError(f"did not happen within {seconds} s: {what or condition}")
        time.sleep(min(max(waited / 10, 0.01), 0.1))


def a_key(seed: object) -> str:
    """A public key that is always the same for the same seed."""
    return base64.b64encode(hashlib.sha256(repr(seed).encode()).digest()).decode()


def path_key(public_key: str) -> str:
    return public_key.replace("/", "_").replace("+", "-")


def sign(body: bytes = b"", key: str = API_KEY, at: int | None = None) -> dict[str, str]:
    """The legacy scheme's headers."""
    timestamp = str(int(time.time()) if at is None else at)
    message = f"timestamp={timestamp}, body_length={len(body)}".encode()
    signature = hmac.new(key.encode(), message, hashlib.sha256).hexdigest()
    return {"signature": signature, "timestamp": timestamp}


class Answer:
    """An HTTP answer with its body read."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self.body = response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def __repr__(self) -> str:
        return f"<{self.status} {self.body[:300]!r}>"


def any_peer() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


# Whatever the certificate. Shared by all connections, and without the system's certificates: to
# read those takes 35 ms, more than a handshake.
ANY_PEER = any_peer()


class Client:
    """One kept-alive TLS connection; reconnects when the gateway closed it."""

    def __init__(self, port: int, host: str = "127.0.0.1", key: str = API_KEY) -> None:
        self.port, self.host, self.key = port, host, key
        self._connection = http.client.HTTPSConnection(host, port, timeout=60, context=ANY_PEER)

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """Sign and send; `body` is bytes, or a value that becomes JSON."""
        data = body if isinstance(body, bytes) else b"" if body is None else encode(body)
        given = {**sign(data, self.key), **headers}
        if data:
            given.setdefault("Content-Type", "application/json")
        return self.raw(method, path, data, given)

    def raw(self, method: str, path: str, data: bytes, headers: Mapping[str, str]) -> Answer:
        """Send as it is, unsigned unless `headers` say otherwise."""
        try:
            self._connection.request(method, path, data or None, dict(headers))
            return Answer(self._connection.getresponse())
        except (http.client.RemoteDisconnected, ConnectionError, ssl.SSLError):
            self._connection.close()
            raise

    def close(self) -> None:
        self._connection.close()

    # the calls that backends make

    def create(self, public_key: str, **fields: Any) -> Answer:
        return self.send("POST", "/api/v1/configurations/", {"public_key": public_key, **fields})

    def get(self, public_key: str, query: str = "") -> Answer:
        return self.send("GET", f"/api/v1/configurations/{path_key(public_key)}{query}")

    def status(self, public_key: str, status: str) -> Answer:
        path = f"/api/v1/configurations/{path_key(public_key)}/status"
        return self.send("PUT", path, {"status": status})

    def delete(self, public_key: str) -> Answer:
        return self.send("DELETE", f"/api/v1/configurations/{path_key(public_key)}")


def encode(value: Any) -> bytes:
    return json.dumps(value).encode()


def begin(
    command: Sequence[str], directory: Path, environment: dict[str, str], *streams: int | IO[bytes]
) -> subprocess.Popen[bytes]:
    """Start a command with these three streams, as a fork of PARENT where it is the program."""
    known = list(command[:2]) == PROGRAM[:2] and str(ROOT) in command
    # What is named PYTHON... is for an interpreter that starts.
    if not PARENT or not known or any(name[:6] == "PYTHON" for name in environment):
        stdin, stdout, stderr = streams
        return subprocess.Popen(
            command, cwd=directory, env=environment, stdin=stdin, stdout=stdout, stderr=stderr
        )
    with open(os.devnull, "rb") as nothing:
        numbers = [
            nothing.fileno()
            if stream == subprocess.DEVNULL
            else stream
            if isinstance(stream, int)
            else stream.fileno()
            for stream in streams
        ]
        return PARENT[0].start(list(command[2:]), directory, environment, *numbers)


def finish(
    command: Sequence[str], directory: Path, stdout: IO[bytes] | int | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end in a process of its own, with PATH and these variables."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
        environment = {"PATH": os.environ["PATH"], **variables}
        streams = (subprocess.DEVNULL, out if stdout is None else stdout, error)
        code = begin(command, directory, environment, *streams).wait(60)
        texts = (os.pread(file.fileno(), 1 << 24, 0).decode() for file in (out, error))
        return subprocess.CompletedProcess(command, code, *texts)


class GatewayProcess:
    """`python3 wggw.py serve` with its files in `directory`; memory backend unless told.

    start(), stop() (TERM) and kill() (KILL) may be called in turn: the files stay.
    """

    program = PROGRAM

    def __init__(self, directory: Path, prefix: list[str] | None = None, **settings: str) -> None:
        self.directory = directory
        self._reserved = None if settings.get("API_PORT") else reserve_port()
        self.port = self._reserved.getsockname()[1] if self._reserved else int(settings["API_PORT"])
        self.host = settings.pop("CLIENT_HOST", "127.0.0.1")
        self.prefix = prefix or []  # such as ["ip", "netns", "exec", NAME]
        self.settings = {
            "GATEWAY_API_KEY": API_KEY,
            "API_HOST": "127.0.0.1",
            "API_PORT": str(self.port),
            "WG_BACKEND": "memory",
            "WG_PRIVATE_KEY_FILE": str(directory / "privatekey"),
            "TLS_CERT": str(directory / "cert.pem"),
            "TLS_KEY": str(directory / "key.pem"),
            "DB_PATH": str(directory / "wireguard.db"),
            **settings,
        }
        self.log = directory / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def spawn(self) -> subprocess.Popen[bytes]:
        """Start the process without waiting for anything."""
        environment = {"PATH": os.environ["PATH"], **self.settings}
        start, *arguments = [*self.prefix, *self.program, "serve"]
        with self.log.open("ab") as log:
            self.process = begin(
                [start, *arguments], self.directory, environment, subprocess.DEVNULL, log, log
            )
        return self.process

    def start(self, seconds: float = 60.0) -> GatewayProcess:
        """Start and wait for readiness."""
        process = self.spawn()

        def ready() -> bool:
            assert process.poll() is None, f"ended with {process.returncode}: {self.text()}"
            return self.is_ready()

        wait_for(ready, seconds, "readiness")
        return self

    def is_ready(self) -> bool:
        client = self.client()
        try:
            return client.raw("GET", "/readyz", b"", {}).status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            client.close()

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command with this gateway's settings."""
        return run_wggw(self.directory, *arguments, **self.settings)

    def client(self, key: str = API_KEY) -> Client:
        return Client(self.port, self.host, key)

    def text(self) -> str:
        """What it logged so far, of all its starts."""
        return self.log.read_text()

    def _end(self, number: int) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(60)
        self.process = None
        return code

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        return self._end(signal.SIGTERM)

    def kill(self) -> int:
        return self._end(signal.SIGKILL)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self._reserved is not None:
            self._reserved.close()


@contextlib.contextmanager
def running(directory: Path, **settings: str) -> Iterator[GatewayProcess]:
    gateway = GatewayProcess(directory, **settings)
    try:
        yield gateway.start()
    finally:
        gateway.close()
