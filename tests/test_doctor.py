"""wggw.py doctor: what it finds, what it says to do, and its exit code."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from harness import PROGRAM, GatewayProcess
from test_check import rotate_meanwhile
from test_store import a_peer, closing, opened, put

import wggw


def doctor(gateway: GatewayProcess) -> tuple[int, str]:
    done = subprocess.run(
        [*PROGRAM, "doctor", "--env-file", os.devnull],
        env={"PATH": os.environ["PATH"], **gateway.settings},
        cwd=gateway.directory,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done.returncode, done.stdout + done.stderr


def test_running_gateway_is_well_and_a_stopped_one_is_not(tmp_path: Path) -> None:
    gateway = GatewayProcess(tmp_path)
    try:
        gateway.start()
        gateway.client().create("A" * 42 + "8=")
        code, text = doctor(gateway)
        assert code == 0, text
        for line in (
            "note   WG_BACKEND: memory: no interface, no packet passes",
            f"ok     certificate: {tmp_path}/cert.pem is good until ",
            f"ok     database: {tmp_path}/wireguard.db: good, 1 peers",
            "ok     API: answers: healthy, 1 peers",
        ):
            assert line in text, text
        assert gateway.stop() == 0
        code, text = doctor(gateway)
        assert code == 1
        assert "WRONG  API: " in text
        assert "-> start the gateway: systemctl status wggw" in text
        (tmp_path / "wireguard.db").write_bytes(b"damaged")
        code, text = doctor(gateway)
        assert code == 1
        assert f"WRONG  database: {tmp_path}/wireguard.db" in text
    finally:
        gateway.close()


@pytest.mark.parametrize(
    ("now", "failed", "todo", "word"),
    [
        (0, False, "", "is good until"),
        (-86400, False, "renew it", "is good until"),
        (1, True, "renew it", "expired at"),
    ],
)
def test_certificate_is_judged_by_its_end(
    tmp_path: Path, now: int, failed: bool, todo: str, word: str
) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    wggw.make_certificate(str(cert), str(key), ["localhost"])
    config = wggw.load_config(
        {"GATEWAY_API_KEY": "k" * 16, "TLS_CERT": str(cert), "TLS_KEY": str(key)}, os.devnull
    )
    expires = wggw.certificate_expiry(wggw.read_certificate(str(cert)))
    moment = expires - 10 * wggw.EXPIRY_WARNING if now == 0 else expires + now
    found = wggw.look_at_certificate(config, moment)
    assert (found.failed, found.todo, word in found.found) == (failed, todo, True)
    cert.write_text("nothing")
    assert wggw.look_at_certificate(config, 0).failed


@pytest.mark.parametrize(
    ("status", "body", "failed", "words"),
    [
        (200, {"status": "healthy", "total_peers": 3, "reasons": []}, False, "healthy, 3 peers"),
        (
            200,
            {"status": "degraded", "total_peers": 3, "reasons": ["disk: full"]},
            True,
            "disk: full",
        ),
        (401, {"detail": "the clock is off"}, True, "status 401: the clock is off"),
        (200, [], True, ""),
    ],
)
def test_answer_says_how_the_gateway_is(
    status: int, body: object, failed: bool, words: str
) -> None:
    (found,) = wggw.look_at_answer(lambda: (status, json.dumps(body).encode()))
    assert found.failed == failed
    assert words in found.found


@pytest.mark.parametrize("failure", [None, "connection refused"])
def test_remote_copy_says_how_far_it_is_behind(failure: str | None) -> None:
    copy = {"number": 7, "lag_records": 2, "lag_seconds": 1.5, "failure": failure}
    body = {"status": "healthy", "total_peers": 3, "reasons": [], "remote_copy": copy}
    _, found = wggw.look_at_answer(lambda: (200, json.dumps(body).encode()))
    assert found.subject == "remote copy"
    assert found.found.startswith("2 records and 1.5 s behind")
    assert (found.failed, bool(found.todo)) == (bool(failure), bool(failure))


def test_database_whose_files_are_replaced_meanwhile_is_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = wggw.load_config({"GATEWAY_API_KEY": "a" * 64, "DB_PATH": f"{tmp_path}/db"}, None)
    assert wggw._look_at_database(config).todo == "start the gateway"
    with closing(opened(tmp_path)) as store:
        put(store, a_peer(1))
        rotate_meanwhile(store, monkeypatch)
        finding = wggw._look_at_database(config)
        assert (finding.failed, finding.found) == (False, f"{tmp_path}/db: good, 3 peers, record 3")


def test_port_is_looked_at_without_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.socket

    def without_ipv6(family: int = socket.AF_INET, *arguments: Any) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return real(family, *arguments)

    with real(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("0.0.0.0", 0))
        settings = {"GATEWAY_API_KEY": "a" * 64, "WG_DEFAULT_PORT": str(taken.getsockname()[1])}
        tunnel = wggw.interface_settings(wggw.load_config(settings, None))[0]
        monkeypatch.setattr(socket, "socket", without_ipv6)
        assert "is in use" in wggw._look_at_port(tunnel).found
        monkeypatch.undo()
    monkeypatch.setattr(socket, "socket", without_ipv6)
    assert "nothing listens" in wggw._look_at_port(tunnel).found
