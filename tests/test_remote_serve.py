"""Gateways with a remote copy, as real processes: over TLS, and on a real S3."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import PROGRAM, GatewayProcess, a_key, finish, free_port, running, some, wait_for
from objects import S3, SECRET_KEY, TOKEN, TlsStore, real_s3, tls_store
from test_obfuscated_api import BOTH
from test_remote import BASE

import wggw

SECRET = "a key for what lies on disk"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[TlsStore]:
    (tmp_path / "tls").mkdir()
    with tls_store(tmp_path / "tls") as server:
        yield server


def settings_of(server: TlsStore, tmp_path: Path, **more: str) -> dict[str, str]:
    return {
        "SNAPSHOT_URL": server.url,
        "SNAPSHOT_TOKEN": TOKEN,
        "SSL_CERT_FILE": str(tmp_path / "tls" / "store.pem"),
        "SNAPSHOT_COPY_INTERVAL": "0.2",
        **more,
    }


def node(tmp_path: Path, name: str, settings: dict[str, str]) -> GatewayProcess:
    """Each has the key that the peers know: a sealed copy holds it, else it is given."""
    (tmp_path / name).mkdir()
    if "SNAPSHOT_KEY" not in settings:
        settings = {"WG_PRIVATE_KEY_FILE": str(tmp_path / "privatekey"), **settings}
    return GatewayProcess(tmp_path / name, **settings)


def status(gateway: GatewayProcess) -> Any:
    client = gateway.client()
    try:
        return client.send("GET", "/api/v1/server/status").json
    finally:
        client.close()


def wait_for_copy(gateway: GatewayProcess) -> Any:
    def even() -> Any:
        copy = status(gateway)["remote_copy"]
        return copy if copy["lag_records"] == 0 and copy["number"] else None

    return wait_for(even, 60, "the copy to be even")


def create(gateway: GatewayProcess, *seeds: object) -> dict[str, str]:
    """Public key -> address."""
    client = gateway.client()
    try:
        answers = [client.create(a_key(seed)) for seed in seeds]
        assert [answer.status for answer in answers] == [200] * len(seeds)
        return {answer.json["public_key"]: answer.json["assigned_ip"] for answer in answers}
    finally:
        client.close()


def peers(gateway: GatewayProcess) -> dict[str, str]:
    client = gateway.client()
    try:
        rows = client.send("GET", "/api/v1/configurations/").json["configurations"]
        return {row["public_key"]: row["assigned_ip"] for row in rows}
    finally:
        client.close()


def lose_everything(gateway: GatewayProcess) -> None:
    """The node's memory is gone: its files with it."""
    gateway.kill()
    shutil.rmtree(gateway.directory)
    gateway.directory.mkdir()


def test_a_node_without_a_disk_boots_from_the_copy(tmp_path: Path, server: TlsStore) -> None:
    gateway = node(tmp_path, "a", settings_of(server, tmp_path, SNAPSHOT_KEY=SECRET))
    try:
        gateway.start()
        expected = create(gateway, 1, 2, 3)
        public_key = status(gateway)["interfaces"][0]["public_key"]
        wait_for_copy(gateway)
        lose_everything(gateway)
        gateway.start()
        assert peers(gateway) == expected
        assert status(gateway)["interfaces"][0]["public_key"] == public_key
        expected |= create(gateway, 4)
        copy = wait_for_copy(gateway)
        assert copy == {
            "epoch": 2,
            "holder": socket.gethostname(),
            "number": copy["number"],
            "lag_records": 0,
            "lag_seconds": 0,
            "requests": copy["requests"],
            "bytes_sent": copy["bytes_sent"],
            "bytes_received": copy["bytes_received"],
            "failure": None,
        }
        assert copy["requests"] > 0 and copy["bytes_sent"] > 0 and copy["bytes_received"] > 0
        lose_everything(gateway)
        gateway.start()
        assert peers(gateway) == expected
        assert gateway.stop() == 0
    finally:
        gateway.close()
    assert TOKEN not in gateway.text() and SECRET not in gateway.text()


def test_the_first_snapshot_has_the_private_key(tmp_path: Path, server: TlsStore) -> None:
    settings = settings_of(server, tmp_path, SNAPSHOT_KEY=SECRET, SNAPSHOT_INTERVAL="3600")
    gateway = node(tmp_path, "a", settings)
    try:
        gateway.start()
        public_key = status(gateway)["interfaces"][0]["public_key"]
        wait_for(lambda: any("manifest-1" in name for name in server.objects), 60, "the first copy")
        expected = create(gateway, 1)  # comes as a segment, no later snapshot
        wait_for_copy(gateway)
        lose_everything(gateway)
        gateway.start()
        assert peers(gateway) == expected
        assert status(gateway)["interfaces"][0]["public_key"] == public_key
    finally:
        gateway.close()


def test_what_was_acknowledged_before_an_orderly_stop_is_in_the_copy(
    tmp_path: Path, server: TlsStore
) -> None:
    own_key = {"WG_PRIVATE_KEY_FILE": str(tmp_path / "a" / "privatekey")}
    gateway = node(tmp_path, "a", settings_of(server, tmp_path, **own_key))
    try:
        gateway.start()
        expected = create(gateway, 1)
        wait_for_copy(gateway)
        expected |= create(gateway, 2)
        assert gateway.stop() == 0
        shutil.rmtree(gateway.directory)
        gateway.directory.mkdir()
        gateway.start()
        assert peers(gateway) == expected
        assert "its private key is missing" in gateway.text()  # the private key is not in clear
    finally:
        gateway.close()


def test_a_store_that_does_not_answer_at_the_start_is_waited_for(
    tmp_path: Path, server: TlsStore
) -> None:
    gateway = node(tmp_path, "a", settings_of(server, tmp_path))
    try:
        gateway.start()
        expected = create(gateway, 1, 2)
        wait_for_copy(gateway)
        lose_everything(gateway)
        server.fault = lambda method, name: "refuse"
        gateway.spawn()
        client = gateway.client()

        def waiting() -> bool:
            with contextlib.suppress(OSError):
                answer = client.raw("GET", "/readyz", b"", {})
                return answer.status == 503 and "waiting for the remote" in answer.json["detail"]
            return False

        wait_for(waiting, 60, "readiness to say what it waits for")
        assert client.send("GET", "/api/v1/configurations/").status == 503
        client.close()
        assert list(gateway.directory.glob("wireguard.db")) == []  # nothing was begun
        server.fault = lambda method, name: ""
        wait_for(gateway.is_ready, 60, "readiness")
        assert peers(gateway) == expected
    finally:
        gateway.close()


def test_a_look_at_the_copy_that_ends_in_a_defect_ends_the_start() -> None:
    def look() -> None:
        raise RuntimeError("can't start new thread")

    service = wggw.Service(lambda: wggw.load_config({"GATEWAY_API_KEY": "a" * 64}, None))
    with pytest.raises(RuntimeError, match="can't start"):
        service._wait_for(look)


@pytest.mark.parametrize("fault", ["refuse", "stall"])
def test_sigterm_ends_the_wait(tmp_path: Path, server: TlsStore, fault: str) -> None:
    server.fault = lambda method, name: fault
    gateway = node(tmp_path, "a", settings_of(server, tmp_path))
    try:
        process = gateway.spawn()
        wait_for(lambda: "fingerprint" in gateway.text(), 60, "the start")
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert process.wait(60) == 0
        assert time.monotonic() - started < 30  # the store stalls for 60
    finally:
        gateway.close()


def test_not_required_starts_without_and_puts_nothing_over_the_copy(
    tmp_path: Path, server: TlsStore
) -> None:
    gateway = node(tmp_path, "a", settings_of(server, tmp_path, SNAPSHOT_REQUIRED="false"))
    try:
        gateway.start()
        expected = create(gateway, 1, 2)
        wait_for_copy(gateway)
        lose_everything(gateway)
        kept = dict(server.objects)
        server.fault = lambda method, name: "refuse"
        gateway.start()
        assert peers(gateway) == {}
        create(gateway, 7)
        server.fault = lambda method, name: ""
        wait_for(
            lambda: "does not overwrite it" in (status(gateway)["remote_copy"]["failure"] or ""),
            60,
            "the refusal",
        )
        assert server.objects == kept
        gateway.kill()
        gateway.start()  # it answers again
        assert peers(gateway) == expected
    finally:
        gateway.close()


def test_a_stalling_store_is_in_nobodys_way(tmp_path: Path, server: TlsStore) -> None:
    with running(tmp_path, **settings_of(server, tmp_path)) as gateway:
        create(gateway, 0)
        wait_for_copy(gateway)
        server.fault = lambda method, name: "stall"
        started = time.monotonic()
        for seed in range(1, 100):
            create(gateway, seed)
            if time.monotonic() - started > 2:
                break
        else:
            time.sleep(max(0.0, 2 - (time.monotonic() - started)))
        shown = status(gateway)
        assert shown["status"] == "healthy"
        assert shown["remote_copy"]["lag_records"] > 0
        assert shown["remote_copy"]["lag_seconds"] > 0
        text = gateway.client().raw("GET", "/metrics", b"", {}).body.decode()
        lag = [line for line in text.splitlines() if line.startswith("wggw_remote_copy_lag")]
        assert len(lag) == 2 and all(float(line.split()[1]) > 0 for line in lag)
        started = time.monotonic()
        assert gateway.stop() == 0
        assert time.monotonic() - started < 30


def test_without_a_copy_nothing_is_said_of_one(gateway: GatewayProcess) -> None:
    assert status(gateway)["remote_copy"] is None
    text = gateway.client().raw("GET", "/metrics", b"", {}).body
    assert b"wggw_remote_copy" not in text


# --- a real S3 ------------------------------------------------------------------------------------


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[S3]:
    (tmp_path / "store").mkdir()
    with real_s3(tmp_path / "store") as store:
        yield store


def connect(s3: S3, **settings: str) -> wggw.ObjectStore:
    config = wggw.load_config({**BASE, **s3.settings, **settings})
    return wggw.open_object_store(config, time.time)  # type: ignore[return-value]


def test_s3_takes_right_signatures_and_no_others(s3: S3) -> None:
    objects = connect(s3)
    assert objects.get("part-000", 100) is None
    objects.put("part-000", b"content" * 10_000)
    assert objects.get("part-000", 100_000) == b"content" * 10_000
    for settings, code in (
        ({"AWS_SECRET_ACCESS_KEY": SECRET_KEY + "x"}, "SignatureDoesNotMatch"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, "InvalidAccessKeyId|XAdminUserNotFound"),
        ({"AWS_REGION": "eu-test-2"}, "AuthorizationHeaderMalformed"),
    ):
        other = connect(s3, **settings)
        with pytest.raises(wggw.CopyError, match=code):
            other.get("part-000", 100_000)
        with pytest.raises(wggw.CopyError, match=code):
            other.put("part-000", b"other")
    late = wggw.open_object_store(wggw.load_config({**BASE, **s3.settings}), lambda: 1e9)
    assert late is not None
    with pytest.raises(wggw.CopyError, match="RequestTimeTooSkewed"):
        late.get("part-000", 100)
    assert objects.get("part-000", 100_000) == b"content" * 10_000


def test_connections_are_kept_and_s3_knows_conditions(s3: S3) -> None:
    objects = connect(s3)
    objects.put("a", b"first")
    [kept] = objects._idle
    port = kept.sock.getsockname()[1]
    for _ in range(5):
        assert objects.get("a", 100) == b"first"
        assert objects.get("missing", 100) is None
    assert [c.sock.getsockname()[1] for c in objects._idle] == [port]
    assert objects.put("a", b"second", create=True) is False
    assert objects.put("b", b"second", create=True) is True
    assert objects.get_all(["a", "b", "c"], 100) == [b"first", b"second", None]
    assert len(objects._idle) <= wggw.COPY_CONNECTIONS
    objects._idle[-1].sock.shutdown(socket.SHUT_RDWR)  # as when the store has closed it
    assert objects.get("a", 100) == b"first"
    objects.delete("a")
    assert objects.get("a", 100) is None
    assert objects.requests == 19


def test_s3_refuses_content_that_is_not_the_signed_one(
    s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = connect(s3)
    authorize = objects._authorize
    monkeypatch.setattr(objects, "_authorize", lambda m, p, c: authorize(m, p, b"another"))
    with pytest.raises(wggw.CopyError, match="XAmzContentSHA256Mismatch"):
        objects.put("part-000", b"content")
    monkeypatch.setattr(objects, "_authorize", authorize)
    assert objects.get("part-000", 100) is None


def test_a_bucket_that_is_not_there_is_no_empty_copy(s3: S3) -> None:
    with pytest.raises(wggw.CopyError, match="NoSuchBucket"):
        connect(s3, SNAPSHOT_URL="s3://missing/gateway-1").get("manifest-0", 100)


def test_a_node_boots_from_s3(tmp_path: Path, s3: S3) -> None:
    settings = {**s3.settings, "SNAPSHOT_KEY": SECRET, "SNAPSHOT_INTERVAL": "1"}
    gateway = node(tmp_path, "a", settings)
    try:
        gateway.start()
        expected: dict[str, str] = {}
        for life in range(3):
            expected |= create(gateway, (life, 1), (life, 2))
            wait_for_copy(gateway)
            lose_everything(gateway)
            gateway.start()
            assert peers(gateway) == expected
        wait_for_copy(gateway)
    finally:
        gateway.close()
    assert {name for name in s3.names() if name.startswith("claim")} == {
        f"claim-{epoch:08d}" for epoch in range(1, 5)
    }
    assert SECRET_KEY not in gateway.text()


def test_the_port_of_nobody_is_named(tmp_path: Path) -> None:
    store = S3(tmp_path, free_port())
    gateway = node(tmp_path, "a", store.settings)
    try:
        gateway.spawn()
        wait_for(lambda: "Connection refused" in gateway.text(), 60, "the reason in the log")
        assert os.listdir(gateway.directory)
    finally:
        gateway.close()


# --- fail-over ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fence"), some([(k, f) for k in ("https", "s3") for f in ("true", "false")], 2)
)
def test_an_old_node_that_was_replaced_says_so(
    tmp_path: Path, server: TlsStore, kind: str, fence: str, request: pytest.FixtureRequest
) -> None:
    """A replacement starts while the old node runs on: the old one's copy stands still, loudly."""
    settings = settings_of(server, tmp_path, SNAPSHOT_FENCE=fence)
    if kind == "s3":
        settings = {
            **request.getfixturevalue("s3").settings,
            "SNAPSHOT_FENCE": fence,
            "SNAPSHOT_COPY_INTERVAL": "0.2",
        }
    old, new = node(tmp_path, "old", settings), node(tmp_path, "new", settings)
    try:
        old.start()
        expected = create(old, 1, 2)
        wait_for_copy(old)
        new.start()
        assert peers(new) == expected
        expected |= create(new, 3)
        wait_for_copy(new)
        create(old, 4)
        wait_for(lambda: status(old)["status"] == "degraded", 60, "the old node to know")
        assert "taken it over" in status(old)["remote_copy"]["failure"]
        client = old.client()
        assert client.create(a_key(5)).status == (503 if fence == "true" else 200)
        client.close()
        assert status(new)["status"] == "healthy"
        shown = new.command("copy", "show")
        assert shown.returncode == 0 and "epoch 2" in shown.stdout, shown
        verified = new.command("copy", "verify")
        assert "good: epoch 2, record" in verified.stdout and "3 peers" in verified.stdout
        old.kill()
        old.start()  # its own changes are kept aside, those of the newest epoch hold
        assert peers(old) == expected
        assert (old.directory / "wireguard.db.superseded").exists()
    finally:
        old.close()
        new.close()


def test_claim_makes_the_files_here_the_newest_state(tmp_path: Path, server: TlsStore) -> None:
    settings = settings_of(server, tmp_path)
    old, new = node(tmp_path, "old", settings), node(tmp_path, "new", settings)
    try:
        old.start()
        expected = create(old, 1)
        wait_for_copy(old)
        new.start()
        create(new, 2)
        wait_for_copy(new)
        assert new.stop() == 0
        expected |= create(old, 3)
        assert old.stop() == 0
        # In a process: until its end, the files are its own.
        claimed = finish([*PROGRAM, "copy", "claim"], old.directory, **old.settings)
        assert claimed.returncode == 0 and "epoch 3 holds" in claimed.stdout, claimed
        for gateway in (old, new):
            gateway.start()
            assert peers(gateway) == expected
            assert gateway.stop() == 0
    finally:
        old.close()
        new.close()


def test_a_node_without_a_disk_keeps_its_certificate(tmp_path: Path, server: TlsStore) -> None:
    settings = settings_of(server, tmp_path, SNAPSHOT_KEY=SECRET)
    gateway = node(tmp_path, "a", settings)
    try:
        gateway.start()
        before = (gateway.directory / "cert.pem").read_bytes()
        wait_for(lambda: any("manifest" in name for name in server.objects), 60, "the first copy")
        for life in range(2):
            lose_everything(gateway)
            gateway.start()
            assert (gateway.directory / "cert.pem").read_bytes() == before
            assert len(peers(gateway)) == life  # over TLS, whose certificate the client checks
            create(gateway, life)
            wait_for_copy(gateway)
    finally:
        gateway.close()
    for content in server.objects.values():
        assert b"PRIVATE KEY" not in content


def test_a_foreign_copy_ends_the_start(tmp_path: Path, server: TlsStore) -> None:
    settings = settings_of(server, tmp_path)
    foreign, own = node(tmp_path, "foreign", settings), node(tmp_path, "own", {})
    try:
        foreign.start()
        create(foreign, 1)
        wait_for_copy(foreign)
        assert foreign.stop() == 0
        own.start()
        create(own, 2)
        assert own.stop() == 0
        kept = dict(server.objects)
        own.settings.update(settings)
        process = own.spawn()
        assert process.wait(60) == 2
        assert "another gateway's" in own.text() and "SNAPSHOT_LINEAGE=" in own.text()
        assert server.objects == kept
    finally:
        foreign.close()
        own.close()


REFUSED = {
    "key file": ({}, "WG_PRIVATE_KEY_FILE: the public key .* of the copy's 2 peers"),
    "subnet": ({"WG_IPV4_SUBNET": "10.77.0.0/24"}, "WG_IPV4_SUBNET.*is used by 2 peers"),
    "S4": ({"WG_MTU": "1290"}, "AWG_PARAMS: S4: WG_MTU 1290 minus S4"),
    "damage": ({}, "00000001-[0-9a-f]{16}-00000001 is not what was put there"),
    "SNAPSHOT_KEY": ({"SNAPSHOT_KEY": "some other key of it"}, "SNAPSHOT_KEY"),
    "lineage": ({"SNAPSHOT_LINEAGE": "ab" * 16}, "SNAPSHOT_LINEAGE: .* is neither"),
}


def says_in(gateway: GatewayProcess, words: str) -> Callable[[], Any]:
    return lambda: re.search(words, gateway.text())


def test_a_start_that_is_refused_leaves_the_copy_to_the_gateway_that_runs(
    tmp_path: Path, server: TlsStore
) -> None:
    settings = settings_of(server, tmp_path, SNAPSHOT_KEY=SECRET, **BOTH)
    running_one, replacement = node(tmp_path, "a", settings), node(tmp_path, "c", settings)
    try:
        running_one.start()
        expected = create(running_one, 1)
        wait_for_copy(running_one)
        expected |= create(running_one, 2)
        wait_for_copy(running_one)
        before = dict(server.objects)
        for case, (more, says) in REFUSED.items():
            refused = node(tmp_path, case, settings | more)
            if case == "damage":
                kind = ".*-[0-9a-f]{16}-00000001"
                [snapshot] = [name for name in before if re.fullmatch(kind, name)]
                server.objects[snapshot] = before[snapshot][:-9]
            elif case == "key file":
                (refused.directory / "privatekey").write_text(a_key("another"))
                (refused.directory / "privatekey").chmod(0o600)
            process = refused.spawn()
            try:
                if case == "damage":  # it waits until the copy is good
                    wait_for(says_in(refused, says), 60, "the reason in the log")
                else:
                    assert process.wait(60) == 2, refused.text()
                assert re.search(says, refused.text()), refused.text()
            finally:
                refused.close()
            server.objects.update(before)
            claims = [name for name in server.objects if name.startswith("claim")]
            assert claims == ["claim-00000001"], case
        expected |= create(running_one, 3)
        wait_for_copy(running_one)
        shown = status(running_one)
        assert shown["status"] == "healthy" and shown["remote_copy"]["failure"] is None
        replacement.start()
        assert peers(replacement) == expected
    finally:
        running_one.close()
        replacement.close()
