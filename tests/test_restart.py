"""Stop, kill, start again, reload: nothing acknowledged is lost, nothing damaged is believed."""

from __future__ import annotations

import contextlib
import http.client
import shutil
import signal
import socket
import sqlite3
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import (
    API_KEY,
    LONG,
    PROGRAM,
    WGGW,
    GatewayProcess,
    a_key,
    encode,
    free_port,
    running,
    sign,
    some,
    wait_for,
)
from objects import make_certificate

import wggw

PEERS = "/api/v1/configurations/"


@contextlib.contextmanager
def stopped(directory: Path, prefix: list[str] | None = None, **more: str) -> Iterator[Any]:
    """A gateway that is not started yet, and is ended whatever happens."""
    gateway = GatewayProcess(directory, prefix, **more)
    try:
        yield gateway
    finally:
        gateway.close()


def state(gateway: GatewayProcess) -> Any:
    """All that a backend can see of the peers and pools."""
    client = gateway.client()
    try:
        peers = client.send("GET", f"{PEERS}?limit=1000").json
        return peers, client.send("GET", "/api/v1/ip-usage").json
    finally:
        client.close()


def change_all_sorts(gateway: GatewayProcess) -> None:
    """Creates of every kind, suspensions, deletions; the last one is a deletion."""
    client = gateway.client()
    for number in range(12):
        protocol = ("ipv4", "ipv6", "dual")[number % 3]
        answer = client.create(
            a_key(number), protocol=protocol, request_id=f"é{number}", quota_bytes=2**62
        )
        assert answer.status == 200
    assert client.create(a_key("psk"), preshared_key=a_key("p"), dns="d2").status == 200
    assert client.create(a_key("asked"), assigned_ip="10.0.1.77").status == 200
    for number in (0, 2, 5):
        assert client.status(a_key(number), "suspended").status == 200
    assert client.status(a_key(2), "active").status == 200
    for number in (3, 1, 8):
        assert client.delete(a_key(number)).status == 200
    client.close()


# --- TERM and KILL -------------------------------------------------------------------------------


ENDS = (GatewayProcess.stop, GatewayProcess.kill)


@pytest.mark.parametrize(
    ("end", "key"), some([(e, k) for e in ENDS for k in ("", "a key for what lies on disk")], 2)
)
def test_no_acknowledged_change_is_lost(
    tmp_path: Path, end: Callable[[GatewayProcess], int], key: str
) -> None:
    with running(tmp_path, SNAPSHOT_KEY=key) as gateway:
        change_all_sorts(gateway)
        before = state(gateway)
        for _ in range(2):  # what a start leaves behind must hold, too
            end(gateway)
            gateway.start()
            assert state(gateway) == before
        synced = gateway.client().send("POST", "/api/v1/sync-ips").json
        assert (synced["added"], synced["updated"], synced["removed"]) == (0, 0, 0)


@pytest.mark.parametrize("end", some(ENDS, 1))
def test_a_suspended_peers_address_is_never_given_away_after_a_restart(
    tmp_path: Path, end: Callable[[GatewayProcess], int]
) -> None:
    with running(tmp_path, WG_IPV4_SUBNET="10.7.0.8/29") as gateway:
        client = gateway.client()
        held = [client.create(a_key(n)).json["assigned_ip"] for n in range(3)]
        client.status(a_key(1), "suspended")
        client.delete(a_key(0))
        end(gateway)
        gateway.start()
        client = gateway.client()
        given = [client.create(a_key(("new", n))).json["assigned_ip"] for n in range(3)]
        # Never-used ones first, then the one that was released; the suspended peer's is not there.
        assert given == ["10.7.0.13", "10.7.0.14", held[0]]
        assert client.create(a_key("one too many")).status == 503
        assert client.create(a_key(9), assigned_ip=held[1]).status == 409
        assert client.status(a_key(1), "active").status == 200
        assert client.get(a_key(1)).json["assigned_ip"] == held[1]


def test_a_fresh_machine_without_a_database_starts(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        assert state(gateway)[0]["configurations"] == []
        for name in ("privatekey", "key.pem"):
            assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
        own = gateway.client().create(a_key(1)).json["server_public_key"]
        gateway.stop()
        # The snapshot is an ordinary SQLite database.
        with contextlib.closing(sqlite3.connect(tmp_path / "wireguard.db")) as database:
            assert database.execute("SELECT public_key FROM peers").fetchall() == [(a_key(1),)]
        gateway.start()
        assert gateway.client().create(a_key(1)).json["server_public_key"] == own


# --- how it ends ---------------------------------------------------------------------------------


@pytest.fixture
def patient(tmp_path: Path) -> Iterator[GatewayProcess]:
    """A gateway whose stop waits longer for requests than any test is held up by others."""
    change = "import wggw; wggw.DRAIN_SECONDS = 100.0; "
    with stopped(tmp_path) as gateway:
        gateway.program = [part.replace("import wggw; ", change) for part in PROGRAM]
        yield gateway.start()


def test_sigterm_finishes_what_is_in_flight_and_ends_idle_connections(
    patient: GatewayProcess,
) -> None:
    gateway = patient
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    address = ("127.0.0.1", gateway.port)
    idle = [context.wrap_socket(socket.create_connection(address, 30)) for _ in range(10)]
    silent = [socket.create_connection(address, 30) for _ in range(5)]
    body = encode({"public_key": a_key("in flight")})
    upload = http.client.HTTPSConnection(*address, timeout=30, context=context)
    upload.putrequest("POST", PEERS)
    for name, value in {
        **sign(body),
        "Content-Length": str(len(body)),
        "Expect": "100-continue",
    }.items():
        upload.putheader(name, value)
    upload.endheaders()
    # The request must be in flight when the signal comes: that its body is asked for tells.
    assert upload.sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
    upload.send(body[:10])
    assert gateway.process is not None
    gateway.process.send_signal(signal.SIGTERM)

    def refused() -> bool:
        try:
            socket.create_connection(address, 1).close()
        except (ConnectionRefusedError, ConnectionResetError):
            return True
        return False

    wait_for(refused, what="accepting to stop")
    upload.send(body[10:])
    answer = upload.getresponse()
    assert answer.status == 200 and b'"created"' in answer.read()
    assert gateway.process.wait(60) == 0  # and without waiting for anybody else
    for connection in idle:
        with contextlib.suppress(OSError):
            assert connection.recv(1) == b""
        connection.close()
    for raw in silent:
        raw.close()
    upload.close()
    gateway.start()
    assert gateway.client().get(a_key("in flight")).status == 200


def test_all_that_a_stop_waits_for_is_over_within_5_seconds() -> None:
    """Requests, timers, an interface or a lock that hangs, the remote copy: each to its limit."""
    hangs = max(wggw.LAST_SAMPLE_SECONDS, 2 * wggw.STOP_SECONDS)
    assert wggw.DRAIN_SECONDS + wggw.STOP_SECONDS + hangs + wggw.STOP_SECONDS < 5


def test_sigterm_under_load_exits_0_in_time_and_loses_nothing(gateway: GatewayProcess) -> None:
    acknowledged: list[str] = []

    def work(number: int) -> None:
        client = gateway.client()
        with contextlib.suppress(OSError, http.client.HTTPException):  # that is the end
            for turn in range(10_000):
                key = a_key((number, turn))
                if client.create(key, protocol="ipv6").status == 200:
                    acknowledged.append(key)

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(acknowledged) > 50)
    started = time.monotonic()
    assert gateway.stop() == 0
    assert time.monotonic() - started < 20  # 5 on a machine with time for it
    for thread in threads:
        thread.join()
    gateway.start()
    with contextlib.closing(sqlite3.connect(gateway.directory / "wireguard.db")) as database:
        stored = {row[0] for row in database.execute("SELECT public_key FROM peers")}
    assert set(acknowledged) <= stored


def ended(gateway: GatewayProcess) -> tuple[int, str]:
    """Start a gateway that must not come up: its exit code and all that it said."""
    process = gateway.spawn()
    code = process.wait(60)
    return code, gateway.text()


BAD_SETTINGS = [
    # name, value, whether the value may be shown
    ("GATEWAY_API_KEY", "short-secret", False),
    ("GATEWAY_API_KEYS", '{"a": "too-short"}', False),
    ("API_PORT", "65536", True),
    ("WG_IPV4_SUBNET", "10.0.1.5/24", True),
    ("DURABILITY", "sometimes", True),
    ("WG_BACKEND", "magic", True),
    ("AWG_PARAMS", "{", False),
]
OBFUSCATED = {"AWG_INTERFACE": "awg0", "AWG_IPV4_SUBNET": "10.0.3.0/24"}


@pytest.mark.parametrize(("name", "value", "shown"), BAD_SETTINGS)
def test_a_bad_setting_is_exit_2_and_one_line_that_names_it(
    tmp_path: Path, name: str, value: str, shown: bool
) -> None:
    more = OBFUSCATED if name == "AWG_PARAMS" else {}
    with stopped(tmp_path, None, **more, **{name: value}) as gateway:
        if name == "API_PORT":
            gateway.settings["API_PORT"] = value
        code, text = ended(gateway)
    assert code == 2
    (line,) = text.splitlines()
    assert name in line and (value in line) == shown
    assert not [*tmp_path.glob("wireguard.db*"), *tmp_path.glob("*.pem")]


def test_a_missing_key_is_exit_2(tmp_path: Path) -> None:
    with stopped(tmp_path) as gateway:
        del gateway.settings["GATEWAY_API_KEY"]
        code, text = ended(gateway)
    assert code == 2 and "GATEWAY_API_KEY" in text


def test_a_port_in_use_is_exit_1_and_harms_nobody(gateway: GatewayProcess) -> None:
    gateway.client().create(a_key(1))
    other = gateway.directory / "other"
    other.mkdir()
    with stopped(other, API_PORT=str(gateway.port)) as second:
        code, text = ended(second)
    assert code == 1
    assert "API_PORT" in text and str(gateway.port) in text.splitlines()[-1]
    assert not list(other.glob("*.pem"))
    assert gateway.client().get(a_key(1)).status == 200


# --- damage --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a gateway that was killed: a snapshot, and a journal with ten records."""
    directory = tmp_path_factory.mktemp("killed")
    with running(directory) as gateway:
        client = gateway.client()
        for number in range(40):
            client.create(a_key(number), protocol="dual")
        gateway.stop()
        gateway.start()
        client = gateway.client()
        for number in range(40, 50):
            client.create(a_key(number))
        client.close()
        gateway.kill()
    gateway.log.unlink()
    return directory


@pytest.fixture
def left(killed: Path, tmp_path: Path) -> Iterator[GatewayProcess]:
    """A gateway that is to start from a copy of those files."""
    directory = tmp_path / "copy"
    shutil.copytree(killed, directory, ignore=shutil.ignore_patterns("*.sock"))
    with stopped(directory) as gateway:
        yield gateway


@pytest.mark.parametrize("lost", [1, 30])
def test_a_torn_last_record_is_dropped_and_every_earlier_one_kept(
    left: GatewayProcess, lost: int
) -> None:
    path = left.directory / "wireguard.db.journal"
    path.write_bytes(path.read_bytes()[:-lost])
    left.start()
    client = left.client()
    found = [client.get(a_key(number)).status for number in range(50)]
    assert found == [200] * 49 + [404]
    assert "torn" in left.text()
    assert client.create(a_key(49)).json["status"] == "created"
    left.kill()
    left.start()
    assert left.client().get(a_key(49)).status == 200


# --- DURABILITY ----------------------------------------------------------------------------------


def test_durability_none_keeps_what_a_snapshot_holds(tmp_path: Path) -> None:
    with running(tmp_path, DURABILITY="none", SNAPSHOT_INTERVAL="3600") as gateway:
        gateway.client().create(a_key(1))
        assert gateway.stop() == 0  # TERM writes a snapshot
        gateway.start()
        gateway.client().create(a_key(2))
        assert not (tmp_path / "wireguard.db.journal").exists()
        gateway.kill()
        gateway.start()
        client = gateway.client()
        # What was not in a snapshot is lost, as was asked for; the address is free again.
        assert [client.get(a_key(n)).status for n in (1, 2)] == [200, 404]
        assert client.create(a_key(3)).json["assigned_ip"] == "10.0.1.3"


def test_snapshots_are_written_at_the_interval_when_something_changed(tmp_path: Path) -> None:
    with running(
        tmp_path, DURABILITY="none", SNAPSHOT_INTERVAL="0.2", SAMPLE_INTERVAL="0.1"
    ) as gateway:
        path = tmp_path / "wireguard.db"
        written = path.stat().st_mtime_ns
        gateway.client().create(a_key(1))
        wait_for(lambda: path.stat().st_mtime_ns != written, what="a snapshot")
        gateway.kill()
        gateway.start()
        assert gateway.client().get(a_key(1)).status == 200
        started = path.stat().st_mtime_ns  # this start skips sequences, which is a change
        wait_for(lambda: path.stat().st_mtime_ns != started, what="the start's snapshot")
        written = path.stat().st_mtime_ns
        time.sleep(1.2)  # six intervals in which nothing changes
        assert path.stat().st_mtime_ns == written


def test_durability_interval_loses_at_most_a_second(tmp_path: Path) -> None:
    with running(tmp_path, DURABILITY="interval") as gateway:
        journal = tmp_path / "wireguard.db.journal"
        size = journal.stat().st_size
        gateway.client().create(a_key(1))
        wait_for(lambda: journal.stat().st_size > size, what="the journal to be written")
        gateway.kill()
        gateway.start()
        assert gateway.client().get(a_key(1)).status == 200
        gateway.client().create(a_key(2))
        assert gateway.stop() == 0
        gateway.start()
        assert gateway.client().get(a_key(2)).status == 200


# --- SIGHUP --------------------------------------------------------------------------------------


@pytest.fixture
def filed(tmp_path: Path) -> Iterator[GatewayProcess]:
    """A gateway with its keys in .env, where a reload can find others."""
    with stopped(tmp_path) as gateway:
        del gateway.settings["GATEWAY_API_KEY"]
        write_env(gateway, API_KEY)
        yield gateway.start()


def write_env(gateway: GatewayProcess, key: str, **more: str) -> None:
    lines = [f"GATEWAY_API_KEY={key}", *(f"{name}='{value}'" for name, value in more.items())]
    path = gateway.directory / ".env"
    path.touch(0o600)
    path.write_text("\n".join(lines) + "\n")


def reload(gateway: GatewayProcess, message: str) -> None:
    """Send SIGHUP and wait until the log says `message` once more than before."""
    before = gateway.text().count(message)
    assert gateway.process is not None
    gateway.process.send_signal(signal.SIGHUP)
    wait_for(lambda: gateway.text().count(message) > before, what=f"{message!r} in the log")


def test_sighup_reloads_keys_without_dropping_a_connection(filed: GatewayProcess) -> None:
    old = filed.client()
    assert old.create(a_key(1)).status == 200
    descriptor = old._connection.sock.fileno()
    new_key = "another-key-of-32-characters-0000"
    write_env(filed, new_key, GATEWAY_API_KEYS=f'{{"before": "{API_KEY}"}}')
    reload(filed, "reloaded")
    # Both keys are good while both are set; the old connection is the very same one.
    assert old.create(a_key(1)).json["status"] == "exists"
    assert old._connection.sock.fileno() == descriptor
    assert filed.client(new_key).get(a_key(1)).status == 200
    write_env(filed, new_key)
    reload(filed, "reloaded")
    assert old.get(a_key(1)).status == 401
    assert old._connection.sock.fileno() == descriptor
    assert filed.client(new_key).get(a_key(1)).status == 200


def test_sighup_switches_the_legacy_scheme_off_and_on(filed: GatewayProcess) -> None:
    client = filed.client()
    for schemes, status in (("rfc9421", 401), ("legacy", 200)):
        write_env(filed, API_KEY, AUTH_SCHEMES=schemes)
        reload(filed, "reloaded")
        assert client.send("GET", "/api/v1/server/status").status == status


def served_certificate(gateway: GatewayProcess) -> bytes:
    return ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate(("127.0.0.1", gateway.port)))


def test_sighup_reloads_the_certificate_without_dropping_a_connection(
    filed: GatewayProcess, tmp_path: Path
) -> None:
    client = filed.client()
    assert client.create(a_key(1)).status == 200
    descriptor = client._connection.sock.fileno()
    before = served_certificate(filed)
    cert, key = make_certificate(tmp_path)
    cert.replace(tmp_path / "cert.pem")
    key.replace(tmp_path / "key.pem")
    reload(filed, "reloaded")
    after = served_certificate(filed)
    assert after != before
    assert after == ssl.PEM_cert_to_DER_cert((tmp_path / "cert.pem").read_text())
    assert client.get(a_key(1)).status == 200
    assert client._connection.sock.fileno() == descriptor


@pytest.mark.parametrize("missing", [("cert.pem",), ("key.pem",), ("cert.pem", "key.pem")])
def test_a_reload_without_certificate_or_key_leaves_the_old_pair_in_use(
    filed: GatewayProcess, tmp_path: Path, missing: tuple[str, ...]
) -> None:
    """A new pair would be one that no client knows."""
    before = served_certificate(filed)
    for name in missing:
        (tmp_path / name).rename(tmp_path / f"{name}.away")
    reload(filed, "reload refused, the old settings and certificate stay: TLS_")
    assert served_certificate(filed) == before
    assert filed.client().create(a_key(1)).status == 200
    for name in missing:
        assert not (tmp_path / name).exists()
        (tmp_path / f"{name}.away").rename(tmp_path / name)
    reload(filed, "reloaded")
    assert served_certificate(filed) == before


def test_a_reload_that_is_refused_leaves_everything_as_it_was(
    filed: GatewayProcess, tmp_path: Path
) -> None:
    before = served_certificate(filed)
    write_env(filed, "short")
    reload(filed, "GATEWAY_API_KEY")
    write_env(filed, "another-key-of-32-characters-0000")
    good = (tmp_path / "cert.pem").read_text()
    (tmp_path / "cert.pem").write_text("no certificate")
    reload(filed, "TLS_CERT")
    # Neither the certificate nor the key of the refused reload is taken.
    assert filed.client().create(a_key(1)).status == 200
    assert filed.client("another-key-of-32-characters-0000").get(a_key(1)).status == 401
    assert served_certificate(filed) == before
    (tmp_path / "cert.pem").write_text(good)
    reload(filed, "reloaded")
    assert filed.client("another-key-of-32-characters-0000").get(a_key(1)).status == 200


def test_a_signal_is_obeyed_at_once_while_connections_come_and_go(filed: GatewayProcess) -> None:
    """The kernel hands a signal to any thread; the one that waits for it must wake all the same."""
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", filed.port), 5).close()

    threads = [threading.Thread(target=churn, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(60 if LONG else 20):
            reload(filed, "reloaded")
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_a_signal_while_starting_is_obeyed(tmp_path: Path) -> None:
    with stopped(tmp_path, API_PORT=str(free_port())) as gateway:
        process = gateway.spawn()
        wait_for((tmp_path / "privatekey").exists, what="the start to be under way")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert gateway.start().is_ready()


@pytest.mark.parametrize("mode", some([0o700, 0o770], 1), ids=oct)
def test_bytecode_is_in_the_state_directory_where_it_may_not_be_beside_the_program(
    tmp_path: Path, mode: int
) -> None:
    """And never in one that others can write to: they would decide what is run."""
    program, state = tmp_path / "program", tmp_path / "state"
    program.mkdir()
    state.mkdir(mode)
    state.chmod(mode)
    shutil.copy(WGGW, program)
    gateway = GatewayProcess(
        tmp_path, None, PYTHONDONTWRITEBYTECODE="1", DB_PATH=str(state / "wireguard.db")
    )
    gateway.program = [sys.executable, str(program / "wggw.py")]
    try:
        gateway.start()
        assert len(list(state.rglob("wggw.*.pyc"))) == (mode == 0o700)
        assert gateway.stop() == 0
    finally:
        gateway.close()
    assert not (program / "__pycache__").exists()
