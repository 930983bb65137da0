"""`wggw.py call` and `wggw.py snapshot`: signed requests from the command line, secrets kept."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from harness import (
    API_KEY,
    PROGRAM,
    GatewayProcess,
    a_key,
    encode,
    free_port,
    path_key,
    run_wggw,
    running,
    wait_for,
)

import wggw

PEERS = "/api/v1/configurations/"
OTHER_KEY = "another secret of a backend 0123"
SHARED_SETTINGS = {"GATEWAY_API_KEYS": json.dumps({"billing": OTHER_KEY})}


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def call(
    gateway: GatewayProcess, *arguments: str, given: bytes = b"", command: str = "call", **more: str
) -> Done:
    """Run it as an operator of that gateway would; no secret may show."""
    done = run_wggw(
        gateway.directory, command, *arguments, given=given, **{**gateway.settings, **more}
    )
    for secret in (API_KEY, OTHER_KEY):
        assert secret not in done.stdout + done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


def fingerprint(gateway: GatewayProcess) -> str:
    pem = (gateway.directory / "cert.pem").read_text()
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()


def elsewhere(gateway: GatewayProcess) -> list[str]:
    """The options that ask a gateway by its address, as from another machine."""
    key = gateway.directory / "api.key"
    key.touch(0o600)
    key.write_text(API_KEY)
    url = ["--url", f"https://127.0.0.1:{gateway.port}", "--key-file", str(key)]
    return [*url, "--fingerprint", fingerprint(gateway)]


# --- what is sent ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["legacy", "rfc9421"])
def test_every_method_works_in_both_schemes(shared: GatewayProcess, scheme: str) -> None:
    path = PEERS + path_key(a_key(scheme))
    body = encode({"public_key": a_key(scheme)}).decode()
    steps = [
        (("POST", PEERS, "--data", body), '"created"'),
        (("GET", path), '"active"'),
        (("PUT", path + "/status", "--data", '{"status":"suspended"}'), '"suspended"'),
        (("PATCH", path, "--data", '{"quota_bytes":5}'), '"quota_bytes":5'),
        (("GET", PEERS + "?status=suspended&limit=5"), a_key(scheme)),
        (("DELETE", path), '"deleted"'),
    ]
    for arguments, told in steps:
        done = call(shared, *arguments, *elsewhere(shared), "--scheme", scheme)
        assert (done.code, done.err) == (0, ""), done
        assert told in done.out.replace('": ', '":'), done
        assert done.out.endswith("\n")


@pytest.mark.parametrize("scheme", ["legacy", "rfc9421"])
def test_scheme_is_the_one_that_was_asked_for(tmp_path: Path, scheme: str) -> None:
    with running(tmp_path, AUTH_SCHEMES=scheme) as gateway:
        other = {"legacy": "rfc9421", "rfc9421": "legacy"}[scheme]
        given = elsewhere(gateway)
        assert call(gateway, "GET", PEERS, *given, "--scheme", other).code == 1
        assert call(gateway, "GET", PEERS, *given, "--scheme", scheme).code == 0


@pytest.mark.parametrize("source", ["text", "@file", "@-"])
def test_body_comes_from_text_file_or_standard_input(
    shared: GatewayProcess, tmp_path: Path, source: str
) -> None:
    body = encode({"public_key": a_key(source), "request_id": "é \\ '\""})
    file = tmp_path / "body"
    file.write_bytes(body)
    data = {"text": body.decode(), "@file": f"@{file}", "@-": "@-"}[source]
    done = call(shared, "POST", PEERS, "--data", data, given=body if source == "@-" else b"")
    assert done.code == 0, done
    shown = json.loads(call(shared, "GET", PEERS + path_key(a_key(source))).out)
    assert shown["request_id"] == "é \\ '\""


def test_key_file_and_key_id_are_used(shared: GatewayProcess, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.touch(0o600)
    file.write_text(OTHER_KEY + "\n")
    arguments = ("GET", PEERS, *elsewhere(shared), "--key-file", str(file))
    assert call(shared, *arguments, "--scheme", "rfc9421", "--key-id", "billing").code == 0
    refused = call(shared, *arguments, "--scheme", "rfc9421")  # not the default id's secret
    assert refused.code == 1 and "401" in refused.err
    file.write_text(API_KEY)
    assert call(shared, *arguments).code == 0


def test_another_gateway_is_reached_by_url_and_fingerprint(
    shared: GatewayProcess, tmp_path: Path
) -> None:
    """Not this host's settings: port, key and certificate are those that the arguments name."""
    (tmp_path / "key").touch(0o600)
    (tmp_path / "key").write_text(API_KEY)
    here = GatewayProcess(tmp_path, GATEWAY_API_KEY="a secret of this host only")
    text = fingerprint(shared).upper()
    with_colons = ":".join(text[n : n + 2] for n in range(0, 64, 2))
    for shape in (text, text.lower(), with_colons):
        done = call(
            here,
            *("GET", PEERS, "--url", f"https://127.0.0.1:{shared.port}"),
            *("--fingerprint", shape, "--key-file", str(tmp_path / "key")),
        )
        assert done.code == 0, done


@pytest.mark.parametrize("command", ["call", "status", "peers", "snapshot"])
def test_a_host_without_any_setting_asks_a_gateway_elsewhere(
    shared: GatewayProcess, tmp_path: Path, command: str
) -> None:
    (tmp_path / "key").touch(0o600)
    (tmp_path / "key").write_text(API_KEY)
    given = {"call": ["GET", PEERS], "snapshot": ["export", "state"]}.get(command, [])
    line = [command, *given, "--url", f"https://127.0.0.1:{shared.port}"]
    line += ["--fingerprint", fingerprint(shared)]
    done = run_wggw(tmp_path, *line, "--key-file", "key")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout
    done = run_wggw(tmp_path, *line)
    assert (done.returncode, done.stderr) == (2, "wggw: --url needs --key-file and --fingerprint\n")


# --- how it ends ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("GET", PEERS + path_key(a_key("nobody"))), 404),
        (("POST", PEERS, "--data", "{"), 400),
        (("POST", PEERS, "--data", '{"public_key":"x"}'), 422),
        (("GET", "/nowhere"), 404),
        (("DELETE", PEERS), 405),
    ],
)
def test_refused_request_is_exit_1_with_the_answer(
    shared: GatewayProcess, arguments: tuple[str, ...], status: int
) -> None:
    done = call(shared, *arguments)
    assert done.code == 1
    assert json.loads(done.out)["detail"]
    assert done.err == f"wggw: status {status}\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("GET", PEERS, "--url", "http://127.0.0.1:1"), "http://127.0.0.1:1"),
        (("GET", PEERS, "--url", "https://127.0.0.1:99999"), "99999"),
        (("GET", PEERS, "--url", "https://[::1"), "[::1"),
        (("GET", PEERS, "--url", "https://"), "https://"),
        (("GET", PEERS, "--url", "https://a host:1"), "URL"),
        (("GET", PEERS, "--key-file", "missing"), "--key-file"),
        (("POST", PEERS, "--data", "@missing"), "missing"),
        (("GET", "/a b"), ""),
        (("GET", "/é"), ""),
        (("G\nET", PEERS), ""),
    ],
)
def test_impossible_request_is_exit_1_and_one_line(
    shared: GatewayProcess, arguments: tuple[str, ...], named: str
) -> None:
    given = elsewhere(shared)
    done = call(shared, *arguments[:2], *given, *arguments[2:])  # the last --url counts
    assert done.code == 1, done
    assert done.out == ""
    assert done.err.startswith("wggw: ") and named in done.err
    assert done.err.count("\n") == 1


def test_nobody_there_is_exit_1_that_names_the_place(shared: GatewayProcess) -> None:
    port = free_port()
    done = call(shared, "GET", PEERS, *elsewhere(shared), "--url", f"https://127.0.0.1:{port}")
    assert (done.code, str(port) in done.err) == (1, True)
    done = call(shared, "GET", PEERS, DB_PATH=str(shared.directory / "other.db"))
    assert done.code == 1
    assert done.err.startswith("wggw: no gateway runs here") and "other.db.sock" in done.err


@pytest.mark.parametrize(
    "arguments",
    [("--key-file", "x"), ("--scheme", "legacy"), ("--url", "https://x"), ("--fingerprint", "x")],
)
def test_options_of_a_gateway_elsewhere_go_together(
    shared: GatewayProcess, arguments: tuple[str, ...]
) -> None:
    done = call(shared, "GET", PEERS, *arguments)
    assert (done.code, "--url" in done.err) == (2, True)


# --- who it talks to ------------------------------------------------------------------------------


class Recorder(threading.Thread):
    """A TLS server with a certificate of its own that keeps all that it is sent."""

    def __init__(self, directory: Path, answer: bytes = b"") -> None:
        super().__init__(daemon=True)
        self.cert, key = str(directory / "cert.pem"), str(directory / "key.pem")
        wggw.make_certificate(self.cert, key, ["127.0.0.1"])
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(self.cert, key)
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(30)
        self.port = self._listener.getsockname()[1]
        self.handshakes = 0
        self.received = b""

    def run(self) -> None:
        raw, _ = self._listener.accept()
        raw.settimeout(30)
        with contextlib.suppress(OSError), self._context.wrap_socket(raw, server_side=True) as peer:
            self.handshakes += 1
            while data := peer.recv(65536):
                self.received += data
                if self._answer and b"\r\n\r\n" in self.received:
                    peer.sendall(self._answer)
                    self._answer = b""
                    peer.shutdown(socket.SHUT_WR)  # and read on, or the answer is reset away

    def close(self) -> None:
        self._listener.close()
        self.join(30)


@contextlib.contextmanager
def recording(directory: Path, answer: bytes = b"") -> Iterator[Recorder]:
    directory.mkdir()
    recorder = Recorder(directory, answer)
    recorder.start()
    try:
        yield recorder
    finally:
        recorder.close()


@pytest.mark.parametrize("scheme", ["legacy", "rfc9421"])
def test_wrong_fingerprint_is_refused_before_anything_is_sent(
    shared: GatewayProcess, tmp_path: Path, scheme: str
) -> None:
    body = encode({"public_key": a_key(1), "preshared_key": a_key(2)}).decode()
    with recording(tmp_path / "other") as recorder:
        given = [*elsewhere(shared), "--url", f"https://127.0.0.1:{recorder.port}"]
        done = call(shared, "POST", PEERS, "--data", body, *given, "--scheme", scheme)
        assert done.code == 1
        assert "fingerprint" in done.err
    assert recorder.handshakes == 1  # they did speak
    assert recorder.received == b""


@pytest.mark.parametrize("scheme", ["legacy", "rfc9421"])
def test_the_key_itself_is_never_sent(shared: GatewayProcess, tmp_path: Path, scheme: str) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
    with recording(tmp_path / "other", answer) as recorder:
        certificate = ssl.PEM_cert_to_DER_cert(Path(recorder.cert).read_text())
        done = call(
            shared,
            *("GET", PEERS, *elsewhere(shared), "--scheme", scheme),
            *("--url", f"https://127.0.0.1:{recorder.port}"),
            *("--fingerprint", hashlib.sha256(certificate).hexdigest()),
        )
        assert (done.code, done.out) == (0, "{}\n")
    assert recorder.received.startswith(b"GET " + PEERS.encode())
    assert API_KEY.encode() not in recorder.received


@pytest.mark.parametrize(
    "answer",
    [
        b"not HTTP at all\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}",
        b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 6\r\n\r\n<html>",
        b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>",
    ],
    ids=["garbage", "cut", "502", "200"],
)
@pytest.mark.parametrize("command", ["call", "snapshot"])
def test_strange_answers_are_told_without_a_traceback(
    shared: GatewayProcess, tmp_path: Path, answer: bytes, command: str
) -> None:
    state = tmp_path / "state"
    state.write_bytes(b"x")
    request = {"call": ("GET", PEERS), "snapshot": ("import", str(state))}[command]
    with recording(tmp_path / "other", answer) as recorder:
        certificate = ssl.PEM_cert_to_DER_cert(Path(recorder.cert).read_text())
        done = call(
            shared,
            *(*request, *elsewhere(shared), "--url", f"https://127.0.0.1:{recorder.port}"),
            *("--fingerprint", hashlib.sha256(certificate).hexdigest()),
            command=command,
        )
    if command == "call" and b"200 OK\r\nContent-Length: 6\r" in answer:
        assert (done.code, done.out) == (0, "<html>\n")
    else:
        assert done.code == 1, done
        assert done.err.startswith("wggw: ")


def test_the_key_is_in_no_argument_of_a_process(shared: GatewayProcess, tmp_path: Path) -> None:
    """Arguments can be read by every user: there is no option that takes the key itself."""
    arguments = [*PROGRAM, "call", "POST", PEERS, "--data", "@-"]
    process = subprocess.Popen(
        arguments,
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], **shared.settings},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        cmdline = Path(f"/proc/{process.pid}/cmdline")
        shown = wait_for(lambda: b"@-" in (text := cmdline.read_bytes()) and text)
        out, _ = process.communicate(encode({"public_key": a_key("argv")}), timeout=30)
    finally:
        process.kill()
        process.wait()
    assert API_KEY.encode() not in shown
    assert b'"created"' in out
    assert API_KEY.encode() not in out
    for command in ("call", "snapshot"):
        text = call(shared, "--help", command=command).out
        options = {word.strip("[],") for word in text.split() if "--" in word}
        assert options & {"--key", "--secret", "--api-key"} == set()
        assert "--key-file" in options
