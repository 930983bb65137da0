"""wggw.py doctor: what it finds, what it says to do, and its exit code."""

from __future__ import annotations

import errno
import functools
import json
import os
import socket
import time
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from types import SimpleNamespace

import pytest
from fakes import World, do
from harness import GatewayProcess, a_key
from test_check import rotate_meanwhile

import wggw


def doctor(gateway: GatewayProcess) -> tuple[int, str]:
    done = gateway.command("doctor", "--env-file", os.devnull)
    return done.returncode, done.stdout + done.stderr


def config_in(directory: Path, **settings: str) -> wggw.Config:
    given = {"GATEWAY_API_KEY": "k" * 16, "DB_PATH": str(directory / "wireguard.db")}
    return wggw.load_config({**given, **settings}, os.devnull)


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
            f"ok     database: {tmp_path}/wireguard.db: good, 1 peer",
            "ok     API: answers: healthy, 1 peer",
        ):
            assert line in text, text
        assert gateway.stop() == 0
        code, text = doctor(gateway)
        assert code == 1
        assert "WRONG  API: " in text
        assert text.splitlines()[0].startswith("WRONG  API: no gateway runs here")
        assert "-> start the gateway: systemctl start wggw" in text
        (tmp_path / "wireguard.db").write_bytes(b"damaged")
        code, text = doctor(gateway)
        assert code == 1
        assert f"WRONG  database: {tmp_path}/wireguard.db" in text
    finally:
        gateway.close()


def test_a_user_without_the_right_to_ask_is_not_told_to_restart_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: socket.socket, place: str) -> None:
        raise PermissionError

    monkeypatch.setattr(socket.socket, "connect", refuse)
    ask = functools.partial(wggw.ApiClient(str(tmp_path / "db")).call, "GET", wggw.STATUS_PATH)
    (found,) = wggw.look_at_answer(ask, "restart it")
    assert (found.failed, found.todo) == (True, "") and found.found.endswith("run this with sudo")


RENEWS = "systemctl reload wggw renews it, with the same key"


@pytest.mark.parametrize(
    ("now", "failed", "todo", "word"),
    [
        (0, False, "", "is good until"),
        (-86400, False, RENEWS, "is good until"),
        (1, True, RENEWS, "expired at"),
    ],
)
def test_certificate_is_judged_by_its_end_and_its_names(
    tmp_path: Path, now: int, failed: bool, todo: str, word: str
) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    given = {"GATEWAY_API_KEY": "k" * 16, "TLS_CERT": str(cert), "TLS_KEY": str(key)}
    config = wggw.load_config({**given, "WG_ENDPOINT": "VPN.example.org"}, os.devnull)
    wggw.make_certificate(str(cert), str(key), wggw.certificate_names(config))
    expires = wggw.certificate_expiry(wggw.read_certificate(str(cert)))
    moment = expires - 10 * wggw.EXPIRY_WARNING if now == 0 else expires + now
    found = wggw.look_at_certificate(config, moment)
    assert (found.failed, found.todo, word in found.found) == (failed, todo, True)
    if not todo:
        other = wggw.load_config({**given, "TLS_NAMES": "203.0.113.9"}, os.devnull)
        found = wggw.look_at_certificate(other, moment)
        assert found.found.endswith("but not for 203.0.113.9") and found.todo == RENEWS
    cert.write_text("nothing")
    assert wggw.look_at_certificate(config, 0).failed


def test_addresses_of_the_host_count_where_the_settings_name_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backends use the names of the settings: another address of the host is then nothing."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    given = {"GATEWAY_API_KEY": "k" * 16, "TLS_CERT": str(cert), "TLS_KEY": str(key)}
    wggw.make_certificate(str(cert), str(key), ["vpn.test"])
    monkeypatch.setattr(wggw, "host_addresses", lambda: iter(["203.0.113.7"]))
    for settings, todo in (
        ({}, "set TLS_NAMES=203.0.113.7, then systemctl reload wggw"),
        ({"WG_ENDPOINT": "vpn.test"}, ""),
    ):
        config = wggw.load_config({**given, **settings}, os.devnull)
        assert wggw.look_at_certificate(config, time.time()).todo == todo


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
    (found,) = wggw.look_at_answer(lambda: (status, json.dumps(body).encode()), "start it")
    assert found.failed == failed
    assert words in found.found


STORE = "see that the store of SNAPSHOT_URL is reachable and accepts its credentials"


@pytest.mark.parametrize(
    ("failure", "todo"),
    [
        (None, ""),
        ("PUT claim-00000001: connection refused", STORE),
        ("waiting for the remote copy: GET claim-00000001: status 403", STORE),
        ("No space left on device", "see the gateway's log: journalctl -u wggw"),
    ],
)
def test_remote_copy_says_how_far_it_is_behind(failure: str | None, todo: str) -> None:
    copy = {"number": 7, "lag_records": 2, "lag_seconds": 1.5, "failure": failure}
    body = {"status": "healthy", "total_peers": 3, "reasons": [], "remote_copy": copy}
    _, found = wggw.look_at_answer(lambda: (200, json.dumps(body).encode()), "start it")
    assert found.subject == "remote copy"
    assert found.found.startswith("2 records and 1.5 s behind")
    assert (found.failed, found.todo) == (bool(failure), todo)


def test_database_whose_files_are_replaced_meanwhile_is_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path)
    path = world.config.db_path
    assert wggw._look_at_database(wggw.Host(world.config, wggw.Store()))[0].todo.startswith(
        "start the gateway"
    )
    world.open()
    do(world.gateway, "create", public_key=a_key(1))
    rotate_meanwhile(world, monkeypatch, "journal")
    finding, _ = wggw._look_at_database(wggw.Host(world.config, wggw.Store()))
    assert (finding.failed, finding.found) == (
        False,
        f"{path}: good, 3 peers, record {world.store.number}",
    )
    world.close()


def test_a_damaged_file_of_a_running_gateway_is_told_without_what_a_start_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wggw.Host, "is_served", True)
    path = tmp_path / "wireguard.db"
    path.write_bytes(b"damaged")
    config = wggw.load_config({"GATEWAY_API_KEY": "k" * 16, "DB_PATH": str(path)}, os.devnull)
    finding, _ = wggw._look_at_database(wggw.Host(config, wggw.Store()))
    assert finding.found == f"{path}: at byte 0: this is not a snapshot"
    assert finding.todo.startswith("the running gateway has the whole state")


@pytest.mark.parametrize(
    ("error", "todo", "words"),
    [
        (0.0123, "", "synchronised to 12 ms"),
        (16.0, "run an NTP client", "not synchronised"),
        (OSError(errno.EPERM, "not permitted"), "", "does not say whether it is right"),
    ],
    ids=["right", "unknown", "refused"],
)
def test_the_clock_is_judged_by_what_the_kernel_says(
    error: float | OSError, todo: str, words: str
) -> None:
    def told() -> float:
        if isinstance(error, OSError):
            raise error
        return error

    found = wggw.look_at_clock(told)
    assert (found.todo.startswith(todo), words in found.found) == (True, True), found
    assert bool(found.todo) == bool(todo) and not found.failed


def test_the_kernel_says_how_wrong_the_clock_may_be() -> None:
    assert 0 <= wggw.clock_error() <= wggw.UNKNOWN_CLOCK_ERROR


CLOSED = {"ALLOWED_BACKENDS": "192.0.2.0/24", "AUTH_SCHEMES": "rfc9421", "WG_ENDPOINT": "vpn.test"}


@pytest.mark.parametrize(
    ("settings", "noted"),
    [
        (CLOSED, []),
        ({**CLOSED, "ALLOWED_BACKENDS": ""}, ["ALLOWED_BACKENDS"]),
        ({**CLOSED, "ALLOWED_BACKENDS": "", "API_HOST": "127.0.0.1"}, []),
        ({**CLOSED, "AUTH_SCHEMES": "legacy,rfc9421"}, []),  # the default, for backends alone
        ({**CLOSED, "WG_ENDPOINT": ""}, ["WG_ENDPOINT"]),
    ],
)
def test_what_the_settings_leave_open_is_told(settings: dict[str, str], noted: list[str]) -> None:
    config = wggw.load_config({"GATEWAY_API_KEY": "k" * 16, **settings}, os.devnull)
    found = list(wggw.look_at_openness(config))
    assert [finding.subject for finding in found] == noted
    assert all(finding.todo and not finding.failed for finding in found)


def test_a_program_that_is_there_but_does_not_run_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if wggw.genl_family(wggw.NetlinkSocket(wggw.NETLINK_GENERIC), "wireguard") is not None:
        pytest.skip("the kernel has WireGuard: no program is needed")
    program = tmp_path / "wireguard-go"
    monkeypatch.setenv("PATH", str(tmp_path))  # where the gateway looks for it, too
    host = wggw.Host(wggw.load_config({"GATEWAY_API_KEY": "k" * 16}, os.devnull), wggw.Store())
    for text, failed in (("#!/bin/sh\n", False), ("#!/nowhere\n", True), ("not ELF", True)):
        program.write_text(text)
        program.chmod(0o755)
        found = list(wggw.look_at_programs(host))
        assert any(finding.subject == "wireguard-go" for finding in found) == failed, (text, found)
    was_run = tmp_path / "was-run"
    program.write_text(f"#!/bin/sh\n: >{was_run}\n")
    [*wggw._look_at_rights(host)]
    assert not was_run.exists()  # a start that waited for a program that hangs would hang


@pytest.mark.parametrize("name", ["wireguard.db.lock", "wireguard.db.nonces"])
def test_file_that_a_start_as_another_user_left_is_named(tmp_path: Path, name: str) -> None:
    config = config_in(tmp_path)
    (tmp_path / name).touch(0o400)
    finding, _ = wggw._look_at_database(wggw.Host(config, wggw.Store()))
    assert finding.failed and finding.found.endswith(f"cannot use {tmp_path}/{name}")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it gives files to another user")
def test_file_that_the_gateways_user_cannot_read_is_named(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("settings.env", "privatekey", "key.pem")]
    for file in files:
        file.touch(0o600)
        os.chown(file, 12345, 12345)
    os.chown(tmp_path, 12345, 12345)
    paths = {"WG_PRIVATE_KEY_FILE": str(files[1]), "TLS_KEY": str(files[2])}
    paths["TLS_CERT"] = str(files[2])
    config = replace(config_in(tmp_path, **paths), env_file=str(files[0]))
    host = wggw.Host(config, wggw.Store())
    assert not [*wggw.look_at_secrets(host)]
    for file in files:
        os.chown(file, 0, 0)
        (found,) = wggw.look_at_secrets(host)
        assert (found.subject, found.failed) == (str(file), True)
        assert found.todo == f"chown --reference={tmp_path} {file}"
        file.chmod(0o640)  # for a group that the user may be in
        assert file == files[1] or not [*wggw.look_at_secrets(host)]
        os.chown(file, 12345, 12345)
        file.chmod(0o600)


def test_certificate_of_another_key_is_wrong(tmp_path: Path) -> None:
    config = config_in(tmp_path, TLS_CERT=f"{tmp_path}/cert", TLS_KEY=f"{tmp_path}/key")
    for name in ("other", "key"):
        wggw.make_certificate(config.tls_cert, str(tmp_path / name), ["localhost"])
    assert not wggw.look_at_certificate(config, time.time()).failed
    (tmp_path / "other").rename(tmp_path / "key")
    found = wggw.look_at_certificate(config, time.time())
    assert found.failed and "no usable pair" in found.found


def link_named(name: str, config: wggw.Config) -> wggw.FoundLink:
    mark = wggw.interface_settings(config)[0].mark
    return wggw.FoundLink(7, name, "tun", mark)


def test_renamed_interface_is_the_cause_of_a_held_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = [wggw.HeldPort(ip_address("0.0.0.0"), "0")]
    monkeypatch.setattr(wggw, "held_ports", lambda protocol, port: held)
    monkeypatch.setattr(wggw.Host, "is_served", True)
    host = wggw.Host(config_in(tmp_path), wggw.Store())
    host.links = [link_named("wg7", host.config)]
    (found,) = wggw._look_at_ports(host)
    assert found.failed and "wg7 has this gateway's mark" in found.found
    assert "ip link set wg7 down && ip link set wg7 name wg0" in found.todo
    host.links = []
    (found,) = wggw._look_at_ports(host)
    assert found.todo == "stop that program, or change WG_DEFAULT_PORT"


def test_missing_database_is_no_fault_while_the_copy_is_awaited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wggw.Host, "is_served", True)
    config = config_in(tmp_path, SNAPSHOT_URL="https://192.0.2.1/copy")
    finding, _ = wggw._look_at_database(wggw.Host(config, wggw.Store()))
    assert (finding.failed, "does not exist" in finding.found) == (False, True)


def test_peers_that_a_start_without_a_database_would_remove_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wggw.Host, "is_served", False)
    monkeypatch.setattr(wggw, "read_link", lambda kind, found: SimpleNamespace(peers=2))
    host = wggw.Host(config_in(tmp_path), wggw.Store())
    host.links = [link_named("wg0", host.config)]
    finding, _ = wggw._look_at_database(host)
    assert finding.failed and finding.found.endswith("a start removes the 2 peers of wg0")
    assert "wggw adopt --interface wg0" in finding.todo


def test_start_without_a_database_warns_of_the_peers_that_it_removes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(tmp_path).open()
    do(world.gateway, "create", public_key=a_key(1))
    world.close()
    for file in tmp_path.iterdir():
        file.unlink()
    world = World(tmp_path, backends=world.backends).open()
    assert not world.backend.peers
    assert "0 added, 0 updated, 1 removed" in caplog.text
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    world.close()


def test_disk_that_is_full_or_read_only_is_told_with_what_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fault in ("No space left on device", "Read-only file system"):
        reasons = [f"snapshot: {fault}"]
        body = {"status": "degraded", "total_peers": 3, "reasons": reasons}
        answer = json.dumps(body).encode()
        (found,) = wggw.look_at_answer(lambda answer=answer: (200, answer), "start it")
        assert found.failed and found.todo.startswith("make space on the disk of DB_PATH")
    host = wggw.Host(config_in(tmp_path), wggw.Store())
    monkeypatch.setattr(wggw.Host, "is_served", False)
    read_only = SimpleNamespace(f_flag=os.ST_RDONLY)
    monkeypatch.setattr(os, "statvfs", lambda path: read_only)
    found, _ = wggw._look_at_database(host)
    assert found.failed and found.found.endswith("mounted read-only")
