"""The Unix socket: commands on the host reach their gateway whatever its settings are."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import PROGRAM, ROOT, GatewayProcess, a_key, run_wggw, running, wait_for
from test_tls import write_pair

STATUS, PEERS = "/api/v1/server/status", "/api/v1/configurations/"
NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be somebody else")


def ask(gateway: GatewayProcess, *line: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A command with the gateway's settings; it gets no key, because it needs none."""
    settings = {k: v for k, v in gateway.settings.items() if k != "GATEWAY_API_KEY"}
    return run_wggw(gateway.directory, *line, **settings, **more)


@contextlib.contextmanager
def connected(gateway: GatewayProcess) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as local:
        local.settimeout(60)
        local.connect(gateway.settings["DB_PATH"] + ".sock")
        yield local


def test_commands_need_nothing_but_the_kernel_s_word(tmp_path: Path) -> None:
    """Whatever the settings ask of others, and where the path is too long for a socket's name."""
    directory = tmp_path / ("d" * 120)
    directory.mkdir()
    gateway = GatewayProcess(
        tmp_path,
        TLS_CLIENT_CA=str(write_pair(tmp_path, "ca")[0]),
        API_HOST="127.0.0.2",
        ALLOWED_BACKENDS="192.0.2.0/24",
        AUTH_SCHEMES="rfc9421",
        METRICS_TOKEN="only those who have it",
        DB_PATH=str(directory / "wireguard.db"),
    )
    try:
        gateway.spawn()
        wait_for(lambda: "ready on" in gateway.text(), what="readiness")
        body = json.dumps({"public_key": a_key(1)})
        assert '"created"' in ask(gateway, "call", "POST", PEERS, "--data", body).stdout
        assert ask(gateway, "status").returncode == 0
        assert a_key(1) in ask(gateway, "peers").stdout
        assert "ok     API: answers: healthy, 1 peer" in ask(gateway, "doctor").stdout
        assert "wggw_peers" in ask(gateway, "call", "GET", "/metrics").stdout
        assert ask(gateway, "call", "GET", "/nowhere").stderr == "wggw: status 404\n"
    finally:
        gateway.close()


def test_long_bodies_and_long_answers_pass(gateway: GatewayProcess, tmp_path: Path) -> None:
    rows = [{"public_key": a_key(n), "label": "x" * 250} for n in range(2000)]
    gateway.stop()
    gateway.settings["WG_IPV4_SUBNET"] = "10.0.0.0/16"
    gateway.start()
    (tmp_path / "wanted").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = ask(gateway, "call", "PUT", PEERS, "--data", "@wanted")
    assert '"created":2000' in done.stdout, done
    assert len(json.loads(ask(gateway, "peers", "--json").stdout)) == 2000


def test_the_socket_is_there_while_the_gateway_is(tmp_path: Path) -> None:
    path = tmp_path / "wireguard.db.sock"
    with running(tmp_path) as gateway:
        gateway.kill()
        assert path.is_socket()  # left over, and in nobody's way
        assert "no gateway runs here" in ask(gateway, "status").stderr
        gateway.start()
        assert ask(gateway, "status").returncode == 0
        # A second gateway is refused before it touches the first one's socket.
        second = GatewayProcess(tmp_path)
        assert second.spawn().wait(60) == 1
        second.close()
        assert ask(gateway, "status").returncode == 0
        assert gateway.stop() == 0
        assert not path.exists()


def test_a_crowd_of_connections_keeps_no_command_out(tmp_path: Path) -> None:
    with running(tmp_path, MAX_CONNECTIONS="8") as gateway:
        clients = [gateway.client() for _ in range(8)]
        for client in clients:
            assert client.create(a_key(1)).status == 200
        assert ask(gateway, "status").returncode == 0
        with contextlib.ExitStack() as idle:
            for _ in range(12):  # nor do commands that hang
                idle.enter_context(connected(gateway))
            assert ask(gateway, "status").returncode == 0
            assert gateway.stop() == 0


def test_without_the_socket_the_api_is_there_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "wireguard.db.sock").mkdir()
    with running(tmp_path) as gateway:
        assert gateway.client().send("GET", STATUS).status == 200
        assert "commands on this host will not reach the gateway" in gateway.text()


@as_root
@pytest.mark.real  # on one Python: another user may not be able to read where the others are
def test_root_and_the_gateway_s_user_get_in_and_nobody_else() -> None:
    script = (
        "import os, socket, sys; os.setgroups([]); os.setgid(int(sys.argv[2])); "
        "os.setuid(int(sys.argv[2])); s = socket.socket(socket.AF_UNIX); s.settimeout(60); "
        f"s.connect(sys.argv[1]); s.sendall(b'GET {STATUS} HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n'); "
        "print(s.recv(15))"
    )

    def answer(place: Path, user: int) -> str:
        path = str(place / "wireguard.db.sock")
        command = [sys.executable, "-c", script, path, str(user)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout + done.stderr

    prefix = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    with tempfile.TemporaryDirectory() as directory:  # nobody cannot go into pytest's own
        place = Path(directory)
        os.chown(place, NOBODY, NOBODY)
        place.chmod(0o711)
        shutil.copy(ROOT / "wggw.py", place)
        gateway = GatewayProcess(place, prefix)
        gateway.program = [*PROGRAM[:-1], str(place)]
        try:
            gateway.start()
            assert "200 OK" in answer(place, 0) and "200 OK" in answer(place, NOBODY)
            assert "PermissionError" in answer(place, NOBODY - 1)  # as the socket's mode says
            (place / "wireguard.db.sock").chmod(0o777)
            assert "200" not in answer(place, NOBODY - 1)  # and without it, as the kernel says
            assert ask(gateway, "status").returncode == 0
        finally:
            gateway.close()
