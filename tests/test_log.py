"""The log answers who did this, holds nobody up, and ends with the gateway."""

from __future__ import annotations

import os
import re
import select
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import World, build, do
from harness import (
    PROGRAM,
    Client,
    GatewayProcess,
    a_key,
    path_key,
    reserve_port,
    running,
    sign,
    wait_for,
)
from test_rfc9421 import STATUS, get, signed

import wggw

PEERS = "/api/v1/configurations/"
FORM = re.compile(
    r"(?P<time>\S+Z) (?P<level>[A-Z]+) (?P<method>\S+) (?P<route>\S+) (?P<status>\d+) [0-9.]+ ms "
    r"(?:peer=(?P<peer>\S{8}) )?key=(?P<key>\S+) id=(?P<id>[A-Za-z0-9._-]{1,64})(?:: (?P<note>.*))?"
)


def line_of(gateway: GatewayProcess, request_id: str) -> dict[str, str]:
    """What the log says of a request."""
    end = re.compile(rf".* id={re.escape(request_id)}(?:: .*)?$", re.MULTILINE)
    found = wait_for(lambda: end.search(gateway.text()), what=f"the line of {request_id}")
    match = FORM.fullmatch(found[0])
    assert match, found[0]
    return {name: text for name, text in match.groupdict().items() if text is not None}


SHARED_SETTINGS = {"GATEWAY_API_KEYS": '{"second": "another key of theirs"}'}


@pytest.fixture
def gateway(shared: GatewayProcess) -> GatewayProcess:
    return shared


def ask(client: Client, method: str, path: str, body: object, name: str) -> int:
    answer = client.send(method, path, body, **{"X-Request-Id": name})
    assert answer.headers["X-Request-Id"] == name
    return answer.status


def test_a_line_says_who_asked_for_what_about_whom(gateway: GatewayProcess) -> None:
    client, key = gateway.client(), a_key("a peer")
    short = key[:8]
    path = PEERS + path_key(key)
    assert ask(client, "POST", PEERS, {"public_key": key}, "made-1") == 200
    line = line_of(gateway, "made-1")
    assert (line["peer"], line["key"], line.get("note")) == (short, "default", None)
    other = gateway.client(key="another key of theirs")
    assert ask(other, "PUT", path + "/status", {"status": "suspended"}, "by.the_other") == 200
    line = line_of(gateway, "by.the_other")
    assert (line["peer"], line["key"], line["status"]) == (short, "second", "200")
    assert line["route"] == "/api/v1/configurations/{public_key}/status"
    assert ask(client, "PATCH", path, {"port": 1}, "refused") == 422
    line = line_of(gateway, "refused")
    assert (line["status"], line["note"].split(":")[0]) == ("422", "port")
    operations = [{"op": "delete", "public_key": k} for k in (key, a_key("nobody"))]
    assert ask(client, "POST", PEERS + "batch", {"operations": operations}, "many") == 200
    told = f"delete {short} deleted, delete {a_key('nobody')[:8]} 404"
    assert line_of(gateway, "many")["note"] == told
    assert ask(client, "PUT", PEERS, [{"public_key": a_key("wanted")}], "all") == 200
    assert "'created': 1" in line_of(gateway, "all")["note"]


def test_every_answer_has_an_id_of_its_own_or_the_callers(gateway: GatewayProcess) -> None:
    client = gateway.client()
    for wrong in ("", "a b", "é".encode().decode("latin-1"), "x" * 65, "a,b"):
        made = client.send("GET", "/api/v1/ip-usage", **{"X-Request-Id": wrong})
        again = client.send("GET", "/api/v1/ip-usage")
        ids = [answer.headers["X-Request-Id"] for answer in (made, again)]
        assert all(re.fullmatch("[A-Za-z0-9._-]{1,64}", name) for name in ids)
        assert len({*ids, wrong}) == 3
    for method, path, status in (
        ("GET", "/healthz", 200),
        ("GET", "/nowhere", 404),
        ("PATCH", "/healthz", 405),
        ("GET", "/api/v1/ip-usage", 401),
        ("GET", "/" + "x" * 20_000, 431),
    ):
        answer = client.raw(method, path, b"", {})
        assert answer.status == status and answer.headers["X-Request-Id"]
        client.close()


@pytest.mark.parametrize(
    ("method", "end", "status", "sign_it"),
    [
        ("GET", "", 401, dict),
        ("DELETE", "", 401, lambda: sign(at=1)),
        ("POST", "/status", 405, sign),
        ("PUT", "/status", 413, lambda: {**sign(bytes(70_000)), "Content-Length": "70000"}),
    ],
)
def test_a_refusal_from_the_head_has_a_whole_line(
    gateway: GatewayProcess, method: str, end: str, status: int, sign_it: Callable[[], Any]
) -> None:
    name = f"refused-{method}-{status}"
    path = PEERS + path_key(a_key("a peer")) + end
    given = sign_it()
    answer = gateway.client().raw(method, path, b"", {**given, "X-Request-Id": name})
    assert (answer.status, answer.headers["X-Request-Id"]) == (status, name)
    line = line_of(gateway, name)
    assert line["route"] == PEERS + "{public_key}" + end
    assert (line["peer"], line["status"]) == (a_key("a peer")[:8], str(status))
    assert line["key"] == ("default" if given else "-")


@pytest.mark.parametrize(
    ("fault", "change"),
    [("time", {"created": 1}), ("expiry", {"expires": 1}), ("replay", {"nonce": "used"})],
)
def test_a_right_signature_that_is_not_fresh_is_logged_with_its_key(
    gateway: GatewayProcess, fault: str, change: dict[str, object]
) -> None:
    client = gateway.client()
    how = {"key": "another key of theirs", "keyid": "second", **change}
    headers = {**signed(client, **how), "X-Request-Id": f"late-{fault}"}  # type: ignore[arg-type]
    assert get(client, headers).status == (200 if fault == "replay" else 401)
    headers["X-Request-Id"] += "-again"
    assert get(client, headers).status == 401
    line = line_of(gateway, f"late-{fault}-again")
    assert (line["key"], line["route"]) == ("second", STATUS)


def test_a_line_is_a_line_whatever_is_asked(gateway: GatewayProcess) -> None:
    path = "/api/v1/ip-usage?a%0A2026-11-29T00:00:00Z%20INFO%20forged=1"
    assert ask(gateway.client(), "GET", path, None, "forger") == 400
    assert line_of(gateway, "forger")["note"].startswith("a?2026-11-29T00:00:00Z INFO forged: ")


def test_what_is_asked_every_few_seconds_is_told_at_debug_only(
    gateway: GatewayProcess, tmp_path: Path
) -> None:
    with running(tmp_path, LOG_LEVEL="debug") as debug:
        for process in (gateway, debug):
            client = process.client()
            for path in ("/metrics", "/healthz"):
                assert client.raw("GET", path, b"", {}).status == 200
                assert client.raw("PATCH", path, b"", {}).status == 405
            assert ask(client, "GET", "/api/v1/ip-usage", None, "the-last") == 200
            line_of(process, "the-last")
            for path in ("/metrics", "/healthz"):
                assert (f"GET {path} 200" in process.text()) == (process is debug)
                assert f"PATCH {path} 405" in process.text()


def test_nobody_waits_for_who_does_not_read_the_log(tmp_path: Path) -> None:
    """A pipe that is full: the gateway answers, does what is logged in the loop, and ends."""
    port = reserve_port()
    process = GatewayProcess(tmp_path, API_PORT=str(port.getsockname()[1]))
    reader, writer = os.pipe()
    process.process = subprocess.Popen(
        [*PROGRAM, "serve"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], **process.settings},
        stdin=subprocess.DEVNULL,
        stderr=writer,
    )
    try:
        said = b""
        while b"ready on" not in said:
            assert select.select((reader,), (), (), 60)[0]
            said += os.read(reader, 2**16)
        while select.select((), (writer,), (), 0.3)[1]:
            os.write(writer, bytes(4096))
        client = process.client()
        for number in range(100):  # more than the rest of a page
            assert client.create(a_key(number)).status == 200
            assert client.delete(a_key(number)).status == 200
        begun = time.monotonic()
        assert process.stop() == 0
        assert time.monotonic() - begun < 5
        assert b"stopped" not in os.read(reader, 2**20)
    finally:
        process.close()
        port.close()
        os.close(reader)
        os.close(writer)


def test_lines_that_found_no_room_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wggw, "MAX_LOG_LINES", 3)
    ours, its_end = socket.socketpair()
    with ours, its_end:
        log = wggw.LogWriter()
        monkeypatch.setattr(log, "_handle", its_end.fileno())
        for number in range(5):
            log.add(f"line {number}")
        log.drain(30)
        lines = ours.recv(65536).decode().splitlines()
    told = [line.split(" ", 1)[1] for line in lines]
    lost = "WARNING 2 lines were lost: the log's reader is too slow"
    assert told == [lost, *(f"INFO line {number}" for number in (2, 3, 4))]


# --- changes that no backend asked for ------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path) -> object:
    made = build(tmp_path)
    for number in range(3):
        do(made.gateway, "create", public_key=a_key(number))
    yield made
    made.close()


def test_each_change_that_nobody_asked_for_has_its_line(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "wggw")
    one, two, three = (a_key(number)[:8] for number in range(3))
    ends = int(world.now) + 5
    do(world.gateway, "update", public_key=a_key(0), expires_at=ends)
    do(world.gateway, "update", public_key=a_key(1), quota_bytes=10, quota_period="day")
    world.backend.move(a_key(1), 11)
    world.gateway.projection.sample()
    assert caplog.messages[-1] == f"wg0: {two} has used up its quota and is suspended"
    world.now = ends
    world.gateway.limits.expire()
    assert caplog.messages[-1] == f"wg0: {one} has expired and is suspended"
    world.now += 86400
    world.gateway.limits.expire()
    assert caplog.messages[-2:] == [
        "a new day: reset the quota of 1 peer",
        f"wg0: {two} is active again",
    ]
    world.backend.drop(a_key(2))
    world.gateway.projection.reconcile()
    assert caplog.messages[-1] == f"wg0: repair: {three} added"
    world.gateway.import_(world.gateway.export())
    assert "imported 3 peers; cut off: 0 peers" in caplog.messages
