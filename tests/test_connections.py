"""Connections: who is slow, silent, greedy or ambiguous harms nobody else and smuggles nothing.

The deadlines are real, 10 s and more, so that one test waits for all of them side by side.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import ssl
import statistics
import subprocess
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import (
    ANY_PEER,
    API_KEY,
    Client,
    GatewayProcess,
    a_key,
    encode,
    free_port,
    path_key,
    running,
    sign,
    wait_for,
)
from test_rfc9421 import STATUS
from test_rfc9421 import signed as signed_rfc9421

import wggw

PEERS = "/api/v1/configurations/"
SHARED_SETTINGS = {"WG_IPV4_SUBNET": "10.9.0.0/16"}
# Seconds that a request may take beside slow clients, where it takes about 1 ms on an idle machine:
# this, or ten times what it took before them. Who is held up waits for their deadlines, 10 s.
MEDIAN_LIMIT = 0.05
ANSWER = re.compile(rb"HTTP/1\.1 (\d{3}) [^\r]*\r\n((?:[^\r]+\r\n)*)\r\n")


class Wire:
    """A TLS connection that sends what it is told to."""

    def __init__(self, port: int) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        raw = socket.create_connection(("127.0.0.1", port), timeout=30)
        try:
            self.socket = context.wrap_socket(raw)
        except BaseException:
            raw.close()
            raise
        self._rest = b""

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self) -> tuple[int, bytes]:
        """The next answer's status and body; a 100 Continue is an answer of its own."""
        while (match := ANSWER.match(self._rest)) is None:
            data = self.socket.recv(65536)
            assert data, f"closed in front of an answer's end: {self._rest!r}"
            self._rest += data
        status, rest = int(match[1]), self._rest[match.end() :]
        length = re.search(rb"(?i)content-length: (\d+)", match[2])
        size = int(length[1]) if length else 0
        while len(rest) < size:
            data = self.socket.recv(65536)
            assert data, "closed in the middle of a body"
            rest += data
        self._rest = rest[size:]
        return status, rest[:size]

    def is_closed(self) -> bool:
        """Wait until the gateway ends the connection; anything else that comes is False."""
        try:
            return not self._rest and self.socket.recv(1) == b""
        except TimeoutError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        self.socket.close()


class HalfClosed:
    """A TLS connection that says that it sends nothing more, and goes on reading."""

    def __init__(self, port: int) -> None:
        self._raw = socket.create_connection(("127.0.0.1", port), timeout=30)
        self._received, self._sent = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = ANY_PEER.wrap_bio(self._received, self._sent)
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._push()
                self._received.write(self._raw.recv(65536))

    def _push(self) -> None:
        self._raw.sendall(self._sent.read())

    def send_all(self, data: bytes) -> None:
        """The last that it sends."""
        self._tls.write(data)
        with contextlib.suppress(ssl.SSLWantReadError):
            self._tls.unwrap()
        self._push()

    def read_all(self) -> bytes:
        """Everything until the gateway ends the connection."""
        found = b""
        while data := self._raw.recv(65536):
            self._received.write(data)
            with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLZeroReturnError):
                while True:
                    found += self._tls.read()
        self._raw.close()
        return found


def head(method: str, path: str, headers: dict[str, str], body: bytes = b"") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: gateway"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def signed(method: str, path: str, body: bytes = b"", **more: str) -> bytes:
    return head(method, path, {**sign(body), **more}, body)


@pytest.fixture
def wire(shared: GatewayProcess) -> Iterator[Wire]:
    connection = Wire(shared.port)
    yield connection
    connection.close()


def median(client: Client, requests: int = 40) -> float:
    """Seconds that a request takes."""
    taken = []
    for _ in range(requests):
        started = time.perf_counter()
        assert client.get(a_key("nobody")).status == 404
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def check_quick(gateway: GatewayProcess, client: Client, before: float) -> None:
    """A connection that is already there and a new one are both served at once.

    `before`: the median without those who could be in the way. What slows requests down does so
    all the time; another process that has the processor does not.
    """
    limit, new = max(MEDIAN_LIMIT, 10 * before), gateway.client()
    started = time.monotonic()
    try:
        assert new.raw("GET", "/readyz", b"", {}).status == 200
        for each in (client, new):
            wait_for(lambda c=each: median(c) < limit, 4, f"a median below {limit:.3f} s")
        assert time.monotonic() - started < 9
    finally:
        new.close()


# --- slow, silent, many --------------------------------------------------------------------------


@pytest.mark.long
def test_slow_clients_delay_nobody_and_are_ended_by_their_deadlines(
    shared: GatewayProcess,
) -> None:
    """Silent in the handshake, a byte at a time in the handshake, a byte at a time in the head."""
    client = shared.client()
    before = median(client)
    silent = socket.create_connection(("127.0.0.1", shared.port), timeout=30)
    dribbler = socket.create_connection(("127.0.0.1", shared.port), timeout=30)
    slow, promising = Wire(shared.port), Wire(shared.port)
    stop = threading.Event()

    def dribble() -> None:
        """Bytes of a TLS record and of a head, each too slow to come to its end."""
        record = iter(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc" + bytes(500))
        request = iter(signed("GET", "/api/v1/ip-usage"))
        while not stop.wait(0.5):
            with contextlib.suppress(OSError):
                dribbler.sendall(bytes([next(record)]))
            with contextlib.suppress(OSError):
                slow.send(bytes([next(request)]))

    body = encode({"public_key": a_key("promised")})
    promising.send(signed("POST", PEERS, body)[: -len(body)])
    thread = threading.Thread(target=dribble, daemon=True)
    started = time.monotonic()
    thread.start()
    try:
        check_quick(shared, client, before)
        for what, peer in (("silent", silent), ("dribbler", dribbler)):
            with contextlib.suppress(ConnectionError):
                assert peer.recv(1) == b"", what
            assert 9 < time.monotonic() - started < 25, what
        assert slow.answer()[0] == 408
        assert slow.is_closed()
        assert time.monotonic() - started < 25
        # The one who announced a body has a longer deadline; when it comes, it is served.
        promising.send(body)
        assert promising.answer()[0] == 200
    finally:
        stop.set()
        thread.join()
        for connection in (silent, dribbler, slow, promising, client):
            connection.close()


def open_files(gateway: GatewayProcess) -> int:
    assert gateway.process is not None
    try:
        return len(list(Path(f"/proc/{gateway.process.pid}/fd").iterdir()))
    except PermissionError:
        pytest.skip("needs root: the gateway's memory and files are hidden from its own user")


def test_closed_connections_leave_nothing_open(shared: GatewayProcess) -> None:
    client = shared.client()
    median(client, 1)
    before = open_files(shared)
    for _ in range(20):
        Wire(shared.port).close()
        socket.create_connection(("127.0.0.1", shared.port)).close()
    wait_for(lambda: open_files(shared) <= before, what="files to be closed")


# --- the cap -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def capped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with running(tmp_path_factory.mktemp("capped"), MAX_CONNECTIONS="16") as gateway:
        yield gateway


def test_beyond_the_cap_the_newest_is_served_and_the_idlest_is_closed(
    capped: GatewayProcess,
) -> None:
    with contextlib.ExitStack() as stack:
        wires = []
        for _ in range(16):
            wires.append(Wire(capped.port))
            stack.callback(wires[-1].close)
            wires[-1].send(head("GET", "/healthz", {}))
            assert wires[-1].answer()[0] == 200
        # The first two come back to life: the third has now been idle for longest.
        for wire in wires[:2]:
            wire.send(head("GET", "/healthz", {}))
            assert wire.answer()[0] == 200
        newest = Wire(capped.port)
        stack.callback(newest.close)
        newest.send(head("GET", "/healthz", {}))
        assert newest.answer()[0] == 200
        assert wires[2].is_closed()
        for wire in (*wires[:2], *wires[3:]):
            wire.send(head("GET", "/healthz", {}))
            assert wire.answer()[0] == 200


def test_a_burst_beyond_the_cap_never_exceeds_it(capped: GatewayProcess) -> None:
    """Also clients that never say a word do not keep others out."""
    base = open_files(capped)
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            raw = socket.create_connection(("127.0.0.1", capped.port), timeout=30)
            stack.callback(raw.close)
        client = capped.client()
        stack.callback(client.close)
        assert client.raw("GET", "/readyz", b"", {}).status == 200
        wait_for(lambda: open_files(capped) <= base + 16, what="the cap to hold")
        assert client.raw("GET", "/readyz", b"", {}).status == 200


def test_connections_up_to_the_cap_need_no_more_files_than_there_are(tmp_path: Path) -> None:
    """A usual soft limit of open files is raised, or the cap is what the limit allows."""
    limited = ["sh", "-c", 'ulimit -Sn 128; exec "$@"', "sh"]
    gateway = GatewayProcess(tmp_path, limited, MAX_CONNECTIONS="300")
    try:
        gateway.start()
        with contextlib.ExitStack() as stack:
            for _ in range(200):
                raw = socket.create_connection(("127.0.0.1", gateway.port), timeout=30)
                stack.callback(raw.close)
            client = gateway.client()
            stack.callback(client.close)
            started = time.monotonic()
            assert client.create(a_key(1)).status == 200
            assert time.monotonic() - started < 9  # without waiting for a deadline
    finally:
        gateway.close()


# --- keep-alive, pipelining ----------------------------------------------------------------------


def test_a_connection_is_kept_alive(wire: Wire) -> None:
    for number in range(5):
        body = encode({"public_key": a_key(("kept", number))})
        wire.send(signed("POST", PEERS, body))
        assert wire.answer()[0] == 200


def test_an_error_with_its_body_read_keeps_the_connection(wire: Wire) -> None:
    for request, status in (
        (signed("POST", PEERS, b"{"), 400),
        (signed("POST", PEERS, encode({"public_key": "x"})), 422),
        (signed("GET", PEERS + path_key(a_key("nobody"))), 404),
        (signed("DELETE", "/api/v1/ip-usage"), 405),
        (head("GET", "/api/v1/ip-usage", {}), 401),
        (signed("GET", "/api/v1/ip-usage"), 200),
    ):
        wire.send(request)
        assert wire.answer()[0] == status


def test_connection_close_and_http_1_0_are_obeyed(shared: GatewayProcess) -> None:
    for request in (
        head("GET", "/healthz", {"Connection": "close"}),
        b"GET /healthz HTTP/1.0\r\n\r\n",
        b"GET /healthz HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n",  # as `ab -k` does
    ):
        wire = Wire(shared.port)
        wire.send(request)
        assert wire.answer()[0] == 200
        assert wire.is_closed()
        wire.close()


@pytest.mark.parametrize(
    "request_",
    [
        head("GET", "/healthz", {"Connection": "close"}),
        head("POST", PEERS, {}, b"x" * 60000),
        b"GET /healthz HTTP/1.1\r\n",  # 408
        b"",  # idle
    ],
    ids=["closed", "refused", "stalled", "idle"],
)
def test_an_end_of_tls_is_told(server: wggw.Server, request_: bytes) -> None:
    """Otherwise clients report an attack that cuts answers off: "unexpected EOF"."""
    raw = socket.create_connection(("127.0.0.1", port_of(server)), timeout=30)
    with ANY_PEER.wrap_socket(raw, suppress_ragged_eofs=False) as client:
        client.sendall(request_)
        found = b"".join(iter(lambda: client.recv(65536), b""))
    assert found.startswith(b"HTTP/1.1 " if request_ else b"")


def test_pipelined_requests_are_answered_in_their_order(wire: Wire) -> None:
    key = a_key("pipelined")
    path = PEERS + path_key(key)
    wire.send(
        signed("POST", PEERS, encode({"public_key": key}))
        + signed("GET", path)
        + signed("PUT", path + "/status", encode({"status": "suspended"}))
        + b"\r\n"  # RFC 9112 section 2.2: an empty line in front of a request is ignored
        + signed("DELETE", path)
        + signed("GET", path)
    )
    assert [wire.answer()[0] for _ in range(5)] == [200, 200, 200, 200, 404]


@pytest.mark.parametrize(("size", "status"), [(15_000, 404), (20_000, 431)])
def test_only_the_size_of_the_whole_head_is_limited(wire: Wire, size: int, status: int) -> None:
    wire.send(head("GET", "/" + "a" * size, {}))
    assert wire.answer()[0] == status


def test_a_request_in_single_bytes_is_understood(wire: Wire) -> None:
    for byte in signed("POST", PEERS, encode({"public_key": a_key("bytes")})):
        wire.send(bytes([byte]))
    assert wire.answer()[0] == 200


# --- bodies that nobody reads --------------------------------------------------------------------


def test_a_refused_body_closes_the_connection_and_the_answer_arrives(wire: Wire) -> None:
    """Also when there is far more of it than fits into any buffer."""
    body = b"x" * 60000
    wire.send(head("POST", PEERS, {}, body))
    assert wire.answer()[0] == 401
    assert wire.is_closed()


def test_a_body_too_large_is_refused_before_it_is_sent(wire: Wire) -> None:
    body = b"x" * 2_000_000
    wire.send(signed("POST", PEERS, body)[: -len(body)])
    assert wire.answer()[0] == 413
    assert wire.is_closed()


def victims(shared: GatewayProcess) -> tuple[str, bytes]:
    """A peer, and a signed request that deletes it."""
    key = a_key("victim")
    client = shared.client()
    assert client.create(key).status == 200
    client.close()
    return key, signed("DELETE", PEERS + path_key(key))


def smuggled(inner: bytes) -> list[tuple[str, bytes, int]]:
    """Requests that are refused, each with a good request where its body would be.

    One for each place that refuses; all the heads that parse_head() refuses: test_http.py.
    """
    line = b"POST " + PEERS.encode() + b" HTTP/1.1\r\nHost: gateway\r\n"
    size = str(len(inner)).encode()
    auth = "".join(f"{n}: {v}\r\n" for n, v in sign(inner).items()).encode()
    return [
        ("unsigned", head("POST", PEERS, {}, inner), 401),
        ("unknown path", signed("POST", "/api/v1/none", inner), 404),
        ("method not allowed", signed("PATCH", "/api/v1/ip-usage", inner), 405),
        ("no key in the path", signed("PUT", PEERS + "x/status", inner), 404),
        ("open, with a body", head("POST", "/healthz", {}, inner), 405),
        ("open, with a body on a GET", head("GET", "/healthz", {}, inner), 413),
        ("chunked", line + auth + b"Transfer-Encoding: chunked\r\n\r\n" + inner, 411),
        (
            "two lengths",
            line + auth + b"Content-Length: 0\r\nContent-Length: " + size + b"\r\n\r\n" + inner,
            400,
        ),
        ("a bare line feed", line + auth + b"X: a\nContent-Length: 0\r\n\r\n" + inner, 400),
        ("another version", b"GET / HTTP/2.0\r\nHost: a\r\n\r\n" + inner, 505),
        ("too many headers", line + b"X: y\r\n" * 100 + b"\r\n" + inner, 431),
        ("a head too large", line + b"X: " + b"y" * 17000 + b"\r\n\r\n" + inner, 431),
    ]


@pytest.mark.parametrize("case", range(len(smuggled(b""))), ids=[c[0] for c in smuggled(b"")])
def test_a_refused_requests_body_never_becomes_the_next_request(
    shared: GatewayProcess, case: int
) -> None:
    key, inner = victims(shared)
    _, request, status = smuggled(inner)[case]
    wire = Wire(shared.port)
    try:
        wire.send(request)
        assert wire.answer()[0] == status
        assert wire.is_closed()
    finally:
        wire.close()
    client = shared.client()
    assert client.get(key).status == 200
    client.close()


def until_the_end(shared: GatewayProcess, request: bytes, local: bool) -> bytes:
    """What a client gets that says with its request that it sends nothing more."""
    if not local:
        connection = HalfClosed(shared.port)
        connection.send_all(request)
        return connection.read_all()
    with socket.socket(socket.AF_UNIX) as connected:
        connected.settimeout(30)
        connected.connect(shared.settings["DB_PATH"] + ".sock")
        connected.sendall(request)
        connected.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connected.recv(65536), b""))


@pytest.mark.parametrize("method", ["POST", "PUT"])  # a thread reads PUT's body
@pytest.mark.parametrize("local", [False, True], ids=["TLS", "Unix socket"])
def test_a_body_that_ends_early_never_becomes_the_next_request(
    shared: GatewayProcess, local: bool, method: str
) -> None:
    """Its end is that of what the client sends: it goes on reading."""
    key, inner = victims(shared)
    announced = {"Content-Type": "application/json", "Content-Length": "4000"}
    request = head(method, PEERS, sign(b"x" * 4000) | announced)
    request += head("GET", "/healthz", {}) + inner
    found = until_the_end(shared, request, local)
    assert found.startswith(b"HTTP/1.1 400 ") and found.count(b"HTTP/1.1 ") == 1
    assert b"\r\nConnection: close\r\n" in found and b"the body ended early" in found
    with contextlib.closing(shared.client()) as client:
        assert client.get(key).status == 200


@pytest.mark.parametrize("local", [False, True], ids=["TLS", "Unix socket"])
def test_requests_before_the_end_are_answered(shared: GatewayProcess, local: bool) -> None:
    """Whether at once, by a worker, when a change has landed, or one after the other."""
    create = signed("POST", PEERS, encode({"public_key": a_key(f"half-closed {local}")}))
    for request, number in (
        (create, 1),
        (head("GET", "/metrics", {}), 1),
        (head("GET", "/healthz", {}) * 30, 30),
        (head("GET", "/metrics", {}) * 3 + create + head("GET", "/healthz", {}) * 9, 13),
        (head("GET", "/healthz", {}) * 9 + b"GET /healthz HT", 9),
    ):
        found = until_the_end(shared, request, local)
        assert re.findall(rb"HTTP/1\.1 (\d+)", found) == [b"200"] * number


def test_a_body_on_a_get_is_read_and_is_no_request(shared: GatewayProcess, wire: Wire) -> None:
    key, inner = victims(shared)
    wire.send(signed("GET", PEERS + path_key(key), inner) + signed("GET", "/api/v1/ip-usage"))
    status, body = wire.answer()
    assert status == 200 and key.encode() in body
    status, body = wire.answer()
    assert status == 200 and b"gateway_ip" in body


# --- Expect: 100-continue ------------------------------------------------------------------------


def test_a_refused_request_is_not_asked_for_its_body(wire: Wire) -> None:
    body = encode({"public_key": a_key("unexpected")})
    wire.send(head("POST", PEERS, {"Expect": "100-continue"}, body)[: -len(body)])
    assert wire.answer()[0] == 401
    assert wire.is_closed()


def test_http_1_0_gets_no_100_continue(wire: Wire) -> None:
    """RFC 9110 section 10.1.1: its client would take it for the answer."""
    body = encode({"public_key": a_key("old")})
    request = signed("POST", PEERS, body, Expect="100-continue", Connection="keep-alive")
    wire.send(request[: -len(body)].replace(b"HTTP/1.1", b"HTTP/1.0"))
    wire.socket.settimeout(0.3)
    with pytest.raises(TimeoutError):
        wire.answer()
    wire.socket.settimeout(30)
    wire.send(body)
    assert wire.answer()[0] == 200


@pytest.mark.parametrize("body", [b"", b"x"])
@pytest.mark.parametrize("method", ["POST", "PUT"])  # PUT's body is read in pieces
def test_nobody_is_asked_for_a_body_that_is_there(wire: Wire, method: str, body: bytes) -> None:
    more = {} if body else {"Content-Length": "0"}
    kind = {"Expect": "100-continue", "Content-Type": "application/x-ndjson"}
    wire.send(signed(method, PEERS, body, **kind, **more))
    assert wire.answer()[0] >= 200


@pytest.mark.parametrize("method", ["POST", "PUT"])  # PUT's body is read by a thread
def test_who_reads_no_answers_is_not_asked_for_a_body(server: wggw.Server, method: str) -> None:
    """A part of 100 Continue would otherwise be lost among the answers, or a part of those."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    filled = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            filled += ours.send(b"an earlier answer" * 1000)
    request = {"Expect": "100-continue", "Content-Type": "application/json", "Content-Length": "9"}
    theirs.sendall(head(method, PEERS, request))
    server.loop.run(lambda: server._begin(wggw.Channel(ours), wggw.THIS_HOST))
    wait_for(lambda: not server._connections, what="its end")
    with theirs:
        theirs.settimeout(30)
        assert len(b"".join(iter(lambda: theirs.recv(65536), b""))) == filled


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_waits_for_100_continue_and_is_served(shared: GatewayProcess) -> None:
    body = encode({"public_key": a_key("curl"), "request_id": "x" * 200})
    headers = {**sign(body), "Expect": "100-continue", "Content-Type": "application/json"}
    command = ["curl", "--silent", "--show-error", "--insecure", "--include", "--max-time", "60"]
    for name, value in headers.items():
        command += ["--header", f"{name}: {value}"]
    command += ["--http1.1", "--expect100-timeout", "45", "--data-binary", "@-"]
    command.append(f"https://127.0.0.1:{shared.port}{PEERS}")
    started = time.monotonic()
    done = subprocess.run(command, input=body, capture_output=True, check=True, timeout=90)
    assert time.monotonic() - started < 30
    assert done.stdout.startswith(b"HTTP/1.1 100 Continue")
    assert b'"status":"created"' in done.stdout


# --- in process: deadlines that are shorter, a stop at a given moment ----------------------------


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[wggw.Server]:
    monkeypatch.setattr(wggw, "IDLE_DEADLINE", 1.0)
    monkeypatch.setattr(wggw, "HEAD_DEADLINE", 0.5)
    names = {"DB_PATH": "wireguard.db", "TLS_CERT": "cert.pem", "TLS_KEY": "key.pem"}
    settings = {name: str(tmp_path / file) for name, file in names.items()}
    settings |= {"GATEWAY_API_KEY": API_KEY, "API_HOST": "127.0.0.1", "API_PORT": str(free_port())}
    config = wggw.load_config(settings, "/dev/null")
    loop = wggw.Loop()
    files = wggw.Files(config.db_path, "none", wggw.Disk())
    gateway = wggw.Gateway(config, wggw.Store(), files, time.time, loop.run)
    app = wggw.App(gateway, wggw.HostMetrics(str(tmp_path)), loop.work)
    server = wggw.Server(config, app, loop, wggw.LogWriter())
    server.begin(wggw.make_tls(config)[0])
    gateway.ready = True
    loop.start()
    yield server
    server.drain()
    loop.stop()


def port_of(server: wggw.Server) -> int:
    return server.app.gateway.config.api_port


def test_newcomers_whose_threads_have_not_begun_go_before_the_backend(
    server: wggw.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine many of them are accepted before the first of their threads runs."""
    monkeypatch.setattr(wggw, "IDLE_DEADLINE", 60.0)
    server._limit = 4
    backend = Wire(port_of(server))

    def is_served() -> bool:
        backend.send(head("GET", "/metrics", {}))
        return backend.answer()[0] == 200

    assert is_served()
    handshake, begin, accepted = wggw.Server._handshake, threading.Event(), threading.Semaphore(0)

    def late(server: wggw.Server, *arguments: Any) -> None:
        accepted.release()
        assert begin.wait(30)
        handshake(server, *arguments)

    monkeypatch.setattr(wggw.Server, "_handshake", late)
    with contextlib.ExitStack() as stack:
        stack.callback(begin.set)
        address = ("127.0.0.1", port_of(server))
        for _ in range(10):
            stack.callback(socket.create_connection(address, timeout=30).close)
        assert all(accepted.acquire(timeout=30) for _ in range(10))
        assert len(server._connections) == 4
        assert is_served()
        begin.set()
        assert is_served()
        assert len(server._connections) <= 4
    backend.close()


def test_a_request_that_no_thread_can_be_had_for_is_refused(
    server: wggw.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        if thread.name == "worker":
            raise RuntimeError("can't start new thread")
        start(thread)

    wire = Wire(port_of(server))
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", limited)
        wire.send(head("GET", "/metrics", {}))
        assert wire.answer()[0] == 503
    wire.send(head("GET", "/metrics", {}))
    assert wire.answer()[0] == 200
    wire.close()


def test_a_defect_in_a_worker_is_an_answer(
    server: wggw.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def defect(*_: object) -> None:
        raise KeyError("a defect")

    wire = Wire(port_of(server))
    with monkeypatch.context() as patched:
        patched.setattr(server.app, "answer", defect)
        wire.send(head("GET", "/metrics", {}))
        assert wire.answer()[0] == 500
    wire.send(head("GET", "/metrics", {}))
    assert wire.answer()[0] == 200
    wire.close()


def test_a_pipelining_client_gets_a_few_turns_a_round_and_a_bounded_buffer(
    server: wggw.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = wggw.Connection.advance
    turns: list[int] = [0]  # in each round
    buffered: set[int] = set()

    def counted(connection: wggw.Connection) -> None:
        turns[-1] += 1
        buffered.add(len(connection._buffer))
        advance(connection)

    monkeypatch.setattr(wggw.Connection, "advance", counted)
    server.loop.after_round = lambda: turns.append(0)
    number = 5000
    wire = Wire(port_of(server))
    requests = head("GET", "/healthz", {}) * number
    sender = threading.Thread(target=wire.send, args=(requests,), daemon=True)
    sender.start()
    assert {wire.answer()[0] for _ in range(number)} == {200}
    sender.join()
    assert max(turns) <= 2  # one for what it has sent before, one for what has just come
    assert max(buffered) <= wggw.MAX_HEAD + wggw.RECEIVE_BYTES + wggw.TLS_RECORD
    wire.close()


@pytest.mark.parametrize("what", ["kept", "kept, a long body", "not kept", "closed meanwhile"])
def test_a_signature_ahead_of_the_clock_waits_for_its_ceiling(
    server: wggw.Server, what: str
) -> None:
    nonces, asked, goes_on = server.app.admission.nonces, threading.Event(), threading.Event()
    raised: list[int] = []

    def raise_ceiling(wanted: int) -> None:
        asked.set()
        assert goes_on.wait(60)
        if what == "not kept":
            raise OSError(28, "No space left on device")
        nonces._ceiling = wanted
        raised.append(wanted)

    nonces._path, nonces.raise_ceiling = "somewhere", raise_ceiling  # type: ignore[method-assign]
    client = Client(port_of(server))
    target, body = ("GET", STATUS), b""
    if what == "kept, a long body":  # longer than what is read of it meanwhile
        target, body = ("POST", PEERS + "batch"), b'{"operations":[]}' + b" " * 200_000
    request = signed_rfc9421(client, *target, body, created=int(time.time()) + 20)
    wire = Wire(port_of(server))
    host = f"Host: 127.0.0.1:{port_of(server)}".encode()
    wire.send(head(*target, request, body).replace(b"Host: gateway", host))
    assert asked.wait(60)
    if body:
        wait_for(lambda: [c._events for c in server._connections] == [0], what="a full buffer")
    if what == "closed meanwhile":
        wire.close()
        wait_for(lambda: not server._connections, what="its end")
        goes_on.set()
        wait_for(lambda: raised, what="the ceiling")
        other = Wire(port_of(server))  # and nothing of it is left in the loop
        other.send(head("GET", "/healthz", {}))
        assert other.answer()[0] == 200
        assert len(server._connections) == 1
        assert not nonces._live
        other.close()
        return
    goes_on.set()
    assert wire.answer()[0] == (503 if what == "not kept" else 200)
    wire.close()


@pytest.mark.parametrize("path", [PEERS, "/api/v1/changes?limit=9", "/api/v1/changes?wait=60"])
def test_a_client_that_is_gone_holds_no_place_while_its_answer_waits(
    server: wggw.Server, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """The end of one direction wakes the loop once, and only a long poll ends with it."""
    rounds: list[int] = []
    if "wait" not in path:  # the answer takes many slices
        monkeypatch.setattr(server.app, "answer", lambda *_: wggw.Later())
    ours, theirs = socket.socketpair()
    with theirs:
        server.loop.post(lambda: server._begin(wggw.Channel(ours), wggw.THIS_HOST))
        theirs.sendall(head("GET", path, {}))
        theirs.shutdown(socket.SHUT_WR)
        if "wait" not in path:
            wait_for(lambda: [c._events for c in server._connections] == [0], what="its end")
            server.loop.after_round = lambda: rounds.append(0)
            time.sleep(0.5)
            assert len(rounds) < 5 and len(server._connections) == 1
        else:
            assert theirs.recv(1) == b""
    wait_for(lambda: not server._connections, what="the end of its place")


def test_empty_lines_are_no_sign_of_life(server: wggw.Server) -> None:
    wire = Wire(port_of(server))
    wire.socket.settimeout(0.1)
    started = time.monotonic()
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while time.monotonic() < started + 30:
            wire.send(b"\r\n")
            with contextlib.suppress(TimeoutError):
                if wire.socket.recv(1) == b"":
                    break
    assert time.monotonic() - started < 20
    wire.close()


def test_a_stalled_head_on_a_kept_connection_is_refused_once(server: wggw.Server) -> None:
    """The refusal belongs to the request that does not come, not to the one before it."""
    wire = Wire(port_of(server))
    wire.send(head("GET", "/healthz", {"X-Request-Id": "first"}))
    assert wire.answer()[0] == 200
    wire.send(b"GET /healthz HTTP/1.1\r\n")
    answer = wire.socket.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"\r\nConnection: close\r\n" in answer and b"first" not in answer
    assert wire.is_closed()
    wire.close()


@pytest.mark.parametrize("path", ["/healthz", "/nothing"])
def test_an_answer_while_it_stops_says_that_it_is_the_last_one(
    server: wggw.Server, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    admit = server.app.admission.admit

    def stopping(*arguments: Any) -> wggw.Request:
        server.closing = True
        return admit(*arguments)

    monkeypatch.setattr(server.app.admission, "admit", stopping)
    wire = Wire(port_of(server))
    wire.send(head("GET", path, {}))
    assert b"\r\nConnection: close\r\n" in wire.socket.recv(65536)
    wire.close()


def test_a_defect_while_a_head_is_verified_is_a_500(
    server: wggw.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the client would wait for its answer until the connection's deadline."""

    def defect(*_: Any) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(server.app.admission, "admit", defect)
    wire = Wire(port_of(server))
    wire.send(head("GET", "/healthz", {}))
    assert wire.socket.recv(65536).startswith(b"HTTP/1.1 500 ")
    wire.close()


def test_an_idle_connection_keeps_neither_request_nor_answer(
    server: wggw.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bodies hold preshared keys, and a thousand idle clients may have had long answers."""
    monkeypatch.setattr(wggw, "IDLE_DEADLINE", 60.0)
    admit, answered = server.app.admission.admit, b"x" * 1_000_000
    requests: list[weakref.ref[wggw.Request]] = []

    def admitted(*arguments: Any) -> wggw.Request:
        request = admit(*arguments)
        requests.append(weakref.ref(request))
        return request

    monkeypatch.setattr(server.app.admission, "admit", admitted)
    monkeypatch.setattr(wggw, "openapi_document", lambda: bytes(answered))
    wire = Wire(port_of(server))
    body = encode({"operations": []})
    wire.send(signed("POST", PEERS + "batch", body) + head("GET", "/openapi.json", {}))
    assert (wire.answer()[0], wire.answer()) == (200, (200, answered))
    wait_for(lambda: not any(request() for request in requests), 10, "the end of the requests")
    (connection,) = server._connections
    assert isinstance(connection, wggw.Connection)
    assert not connection._answered.body and not connection._out.obj
    wire.close()


def test_a_handshake_that_gives_way_ends_at_once(server: wggw.Server) -> None:
    """It would otherwise hold its thread and its file until its deadline, 10 s later."""
    server._limit = 2
    address = ("127.0.0.1", port_of(server))
    with contextlib.ExitStack() as stack:
        first, *_ = (
            stack.enter_context(socket.create_connection(address, timeout=60)) for _ in range(3)
        )
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):
            assert first.recv(1) == b""
        assert time.monotonic() - started < wggw.HANDSHAKE_DEADLINE / 2
        wait_for(lambda: len(server._connections) == 2, what="two that remain")


def test_idle_connections_wake_nobody(server: wggw.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has deadlines of its own, and the loop looks at all of them once a second."""
    monkeypatch.setattr(wggw, "IDLE_DEADLINE", 60.0)
    rounds: list[float] = []
    wires = []
    for _ in range(30):
        wires.append(Wire(port_of(server)))
        wires[-1].send(head("GET", "/healthz", {}))
        assert wires[-1].answer()[0] == 200
        wires[-1].send(b"GET")  # so that the head's deadline comes within this test
    server.loop.after_round = lambda: rounds.append(time.monotonic())
    time.sleep(3)
    assert len(rounds) <= 20  # one for each connection and deadline would be 200
    for wire in wires:
        assert wire.answer()[0] == 408
        wire.close()
