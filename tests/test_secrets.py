"""Secrets stay where they are: not in open files, not in repr, logs, errors or core dumps."""

from __future__ import annotations

import base64
import inspect
import os
import re
import subprocess
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import API_KEY, SCRIPT, GatewayProcess, a_key, encode, running, wait_for

import wggw

PEERS = "/api/v1/configurations/"
MARK = "secret-marker-of-this-test-0123456789"


# --- files ----------------------------------------------------------------------------------------


def by_env_file(directory: Path, mode: int) -> Any:
    path = directory / "gateway.env"
    path.write_text(f"GATEWAY_API_KEY={MARK}\n")
    path.chmod(mode)
    return wggw.load_config({}, str(path))


def by_tls_key(directory: Path, mode: int) -> Any:
    cert, key = str(directory / "cert.pem"), directory / "key.pem"
    wggw.make_certificate(cert, str(key), ["localhost"])
    key.chmod(mode)
    config = {"GATEWAY_API_KEY": MARK, "TLS_CERT": cert, "TLS_KEY": str(key)}
    return wggw.make_tls(wggw.load_config(config))


def by_private_key(directory: Path, mode: int) -> Any:
    path = directory / "private"
    settings = wggw.InterfaceSettings("WG", "wg0", {}, (1,), 1420, str(path))
    wggw.load_private_key(settings)
    path.chmod(mode)
    return wggw.load_private_key(settings)


def by_key_file(directory: Path, mode: int) -> Any:
    path = directory / "api.key"
    path.write_text(MARK)
    path.chmod(mode)
    line = ["call", "GET", "/", "--url", "https://127.0.0.1", "--fingerprint", "00"]
    return wggw.client_of(wggw.make_parser().parse_args([*line, "--key-file", str(path)]))


READERS: dict[str, Callable[[Path, int], Any]] = {
    "--env-file": by_env_file,
    "TLS_KEY": by_tls_key,
    "WG_PRIVATE_KEY_FILE": by_private_key,
    "--key-file": by_key_file,
}


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, mode) for name in READERS for mode in (0o602, 0o620, 0o777)),
        *((name, mode) for name in READERS if name != "--env-file" for mode in (0o604, 0o644)),
        ("WG_PRIVATE_KEY_FILE", 0o640),
    ],
)
def test_a_file_of_secrets_that_is_too_open_is_refused_by_name(
    tmp_path: Path, name: str, mode: int
) -> None:
    with pytest.raises(wggw.ConfigError) as caught:
        READERS[name](tmp_path, mode)
    assert str(caught.value).startswith(f"{name}: ")
    assert f"{mode:04o}" in str(caught.value) and "chmod 600" in str(caught.value)
    assert MARK not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, mode) for name in READERS for mode in (0o400, 0o600)),
        *((name, 0o640) for name in READERS if name != "WG_PRIVATE_KEY_FILE"),
    ],
)
def test_a_file_of_secrets_for_its_owner_or_group_is_taken(
    tmp_path: Path, name: str, mode: int
) -> None:
    assert READERS[name](tmp_path, mode)


def test_an_open_env_file_without_secrets_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "open.env"
    path.write_text("WG_MTU=1300\nMETRICS_TOKEN=\n")
    path.chmod(0o666)
    assert wggw.load_config({"GATEWAY_API_KEY": MARK}, str(path)).wg_mtu == 1300


def test_an_env_file_that_everybody_can_read_is_taken_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert by_env_file(tmp_path, 0o644)
    assert "gateway.env" in caplog.text and "chmod 600" in caplog.text
    assert MARK not in caplog.text
    caplog.clear()
    assert by_env_file(tmp_path, 0o640) and not caplog.text


def test_a_pipe_is_no_file_that_others_can_open(tmp_path: Path) -> None:
    wggw.check_private("--key-file", "/dev/null")


def test_a_too_open_file_ends_the_start_with_exit_2(tmp_path: Path) -> None:
    path = tmp_path / "gateway.env"
    path.write_text(f"GATEWAY_API_KEY={MARK}\n")
    path.chmod(0o622)
    done = subprocess.run(
        [*SCRIPT, "serve", "--env-file", str(path)],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "--env-file" in done.stderr
    assert MARK not in done.stderr


# --- repr -----------------------------------------------------------------------------------------

# What must not show, by value; and what fields of such names may show, because it is no secret.
SECRETS: dict[str, dict[str, Any]] = {
    "Config": {setting.name.lower(): MARK for setting in wggw.SETTINGS if setting.secret},
    "Peer": {"preshared_key": MARK, "public_key": a_key(1)},
    "WirePeer": {"preshared_key": MARK.encode(), "public_key": bytes(32)},
    "Link": {"private_key": MARK.encode()},
    "Entry": {"payload": MARK.encode()},
    "Device": {"private_key": MARK.encode()},
    "SignedMessage": {"headers": {MARK: MARK}},
    "MessageSignature": {"signature": MARK.encode(), "nonce": MARK, "parameters": MARK},
    "Record": {"put": [MARK], "settings": {MARK: MARK}},
    "Written": {"content": MARK.encode()},
    "Landing": {"first": 1, "records": [MARK]},
    "NetlinkMessage": {"payload": MARK.encode()},
    "Head": {"headers": {MARK: MARK}, "query": MARK, "target": MARK},
    "Obfuscation": {"header_protection_key": MARK.encode()},
    "Response": {"body": MARK.encode(), "headers": ((MARK, MARK),)},
}
HARMLESS = {
    *("Caller.key_id", "MessageSignature.key_id", "Change.public_key", "Interface.public_key"),
    "ChangeRow.public_key",
    *(
        "Config.tls_key",
        "Config.aws_access_key_id",
        "InterfaceSettings.private_key_file",
        "Config.wg_private_key_file",
        "Config.awg_private_key_file",
        "Obfuscation.rekey_after_time",
        "Obfuscation.rekey_timeout",
    ),
    *("Setting.secret", "Peer.public_key", "WirePeer.public_key", "Served.public_key"),
}
VALUES = {
    name: member
    for name, member in inspect.getmembers(wggw, inspect.isclass)
    if (member.__module__ == "wggw" and hasattr(member, "_fields")) or name == "Config"
}


@pytest.mark.parametrize("name", SECRETS)
def test_repr_shows_no_secret(name: str) -> None:
    fields = typing.get_type_hints(VALUES[name])
    text = repr(VALUES[name](**{**dict.fromkeys(fields, ""), **SECRETS[name]}))
    assert name in text
    for form in (MARK, MARK.encode().hex(), base64.b64encode(MARK.encode()).decode()):
        assert form not in text


def test_every_field_that_sounds_secret_is_in_the_table() -> None:
    sounds = re.compile(r"key|secret|token|psk|body|payload|headers|content\b|signature|nonce")
    named = {
        f"{name}.{field}"
        for name, value in VALUES.items()
        for field in typing.get_type_hints(value)
        if sounds.search(field) and field != "content_type"
    }
    known = {f"{name}.{field}" for name, fields in SECRETS.items() for field in fields}
    assert named - known - HARMLESS == set()


# --- the running process --------------------------------------------------------------------------


# Root without the rights that reach into any process: then a user like every other.
PLAIN = ["setpriv", "--bounding-set=-sys_ptrace,-perfmon,-sys_admin"] if os.geteuid() == 0 else []


def readable(pid: int) -> bool:
    """Whether a process of the same user can read this one's memory."""
    command = [*PLAIN, "cat", f"/proc/{pid}/environ"]
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0


def test_memory_of_the_gateway_is_hidden_from_its_own_user(tmp_path: Path) -> None:
    """What stops this stops core dumps and debuggers, too: PR_SET_DUMPABLE is one switch."""
    gateway = GatewayProcess(tmp_path, PLAIN)
    other = subprocess.Popen([*PLAIN, "sleep", "60"])
    try:
        gateway.start()
        assert gateway.process is not None
        wait_for(lambda: readable(other.pid), what="the check itself")
        assert not readable(gateway.process.pid)
    finally:
        gateway.close()
        other.kill()
        other.wait()


def test_a_crash_leaves_no_core_file(tmp_path: Path) -> None:
    """With the limit lifted; where the kernel pipes cores elsewhere, the switch is what counts."""
    unlimited = ["sh", "-c", 'ulimit -c unlimited; exec "$@"', "sh"]
    gateway = GatewayProcess(tmp_path, unlimited)
    try:
        gateway.start()
        assert gateway.process is not None
        gateway.process.send_signal(6)
        assert gateway.process.wait(60) == -6
        assert not list(tmp_path.glob("core*"))
    finally:
        gateway.close()


def test_no_secret_in_the_log_of_a_gateway_in_trouble(tmp_path: Path) -> None:
    """Good and bad requests, encrypted ones, at the most talkative level."""
    psk, shared, token = a_key("psk"), "a shared secret of both sides 1", "a token for metrics 1"
    other = "another key of the backend 123456"
    settings = {
        "LOG_LEVEL": "debug",
        "GATEWAY_PUBLIC_KEY": shared,
        "METRICS_TOKEN": token,
        "SNAPSHOT_KEY": "a key of the snapshots 1234567",
        "GATEWAY_API_KEYS": encode({"second": other}).decode(),
    }
    with running(tmp_path, **settings) as gateway:
        client = gateway.client()
        assert client.create(a_key(1), preshared_key=psk).status == 200
        box = wggw.PayloadBox(shared)
        sealed = box.seal(encode({"request_id": MARK, "preshared_key": psk}))
        assert client.create(a_key(2), encrypted_payload=sealed).status == 200
        assert client.create(a_key(3), encrypted_payload=sealed[:-4] + "AAA=").status == 400
        assert client.create(a_key(4), preshared_key=psk + "x").status == 422
        client.raw("GET", "/metrics", b"", {"Authorization": f"Bearer {token}"})
        client.raw("GET", f"{PEERS}?note={MARK}", b"", {"signature": MARK, "timestamp": MARK})
        client.raw("GET", f"/{MARK}", b"", {})
        address = client.get(a_key(1)).json["assigned_ip"]
        signature = client.raw("GET", "/healthz", b"", {}).headers.get("signature")
        assert signature is None
        gateway.stop()
        text = gateway.text()
    private = (tmp_path / "privatekey").read_text().strip()
    secrets = [API_KEY, other, shared, token, settings["SNAPSHOT_KEY"], psk, sealed, MARK, private]
    assert [secret for secret in (*secrets, address) if secret in text] == []
    assert "POST /api/v1/configurations 200" in text  # the log is there


def test_no_file_that_the_gateway_makes_can_be_read_by_others(tmp_path: Path) -> None:
    loose = ["sh", "-c", 'umask 000; exec "$@"', "sh"]
    gateway = GatewayProcess(tmp_path, loose, SNAPSHOT_INTERVAL="0.1")
    try:
        client = gateway.start().client()
        assert client.create(a_key(1)).status == 200
        wait_for((tmp_path / "wireguard.db.previous").exists, what="a second snapshot")
        assert gateway.stop() == 0
    finally:
        gateway.close()
    open_files = {
        path.name: oct(path.stat().st_mode & 0o777)
        for path in tmp_path.iterdir()
        if path.stat().st_mode & 0o077 and path.name not in ("log", "cert.pem")
    }
    assert open_files == {}
