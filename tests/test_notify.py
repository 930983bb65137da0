"""What systemd hears of the service, from READY=1 to the reason why a start fails."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import build
from harness import GatewayProcess, wait_for

import wggw


class Ear:
    """A socket that stands where systemd's would, and what was said to it."""

    def __init__(self, path: str) -> None:
        self.messages: list[list[str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + path[1:] if path.startswith("@") else path)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        self._own_address = self._socket.getsockname()

    def _listen(self) -> None:
        while (data := self._socket.recv(4096)) != b"end":
            self.messages.append(data.decode().split("\n"))

    def lines(self) -> list[str]:
        return [line for message in tuple(self.messages) for line in message]

    def hears(self, line: str, times: int = 1) -> None:
        wait_for(lambda: self.lines().count(line) >= times, 60, f"{line} ({times} times)")

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.sendto(b"end", self._own_address)
        self._thread.join()
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def ear(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Ear, str]]:
    name = f"@wggw-test-{os.getpid()}" if request.param == "abstract" else str(tmp_path / "notify")
    made = Ear(name)
    yield made, name
    made.close()


def test_life_of_a_service_is_told_in_order(ear: tuple[Ear, str], tmp_path: Path) -> None:
    heard, name = ear
    gateway = GatewayProcess(tmp_path, NOTIFY_SOCKET=name, WATCHDOG_USEC="400000")
    try:
        process = gateway.start().process
        assert process is not None
        heard.hears("READY=1")
        assert "STATUS=serving: wg0 (memory)" in heard.lines()
        heard.hears("WATCHDOG=1", 3)
        process.send_signal(signal.SIGHUP)
        heard.hears("READY=1", 2)
        reloading = next(m for m in heard.messages if m[0] == "RELOADING=1")
        assert reloading[1].startswith("MONOTONIC_USEC=")
        assert gateway.stop() == 0
        heard.hears("STOPPING=1")
        words = [m[0] for m in heard.messages if m[0] != "WATCHDOG=1"]
        assert words == ["READY=1", "RELOADING=1", "READY=1", "STOPPING=1"]
    finally:
        gateway.close()


def test_reason_of_a_failing_start_is_told(ear: tuple[Ear, str], tmp_path: Path) -> None:
    heard, name = ear
    gateway = GatewayProcess(tmp_path, NOTIFY_SOCKET=name, WG_MTU="1")
    assert gateway.spawn().wait(60) == 2
    heard.hears("STATUS=WG_MTU: '1' is not bytes, 1280 to 65535")
    assert "READY=1" not in heard.lines()


def test_refused_reload_is_told_and_the_service_goes_on(tmp_path: Path) -> None:
    heard = Ear(str(tmp_path / "notify"))
    gateway = GatewayProcess(
        tmp_path,
        NOTIFY_SOCKET=str(tmp_path / "notify"),
        WATCHDOG_USEC="400000",
        MAX_CONNECTIONS="8",
    )
    try:
        gateway.start()
        heard.hears("WATCHDOG=1", 2)
        # The certificate is gone while its key is there.
        (tmp_path / "cert.pem").rename(tmp_path / "elsewhere.pem")
        assert gateway.process is not None
        gateway.process.send_signal(signal.SIGHUP)
        wait_for(
            lambda: any(line.startswith("STATUS=reload refused") for line in heard.lines()),
            what="the refusal of the reload",
        )
        before = heard.lines().count("WATCHDOG=1")
        heard.hears("WATCHDOG=1", before + 2)
    finally:
        gateway.close()
        heard.close()


def test_a_loop_that_hangs_tells_nothing_until_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Ear(str(tmp_path / "notify"))
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "80000")
    world, loop = build(tmp_path), wggw.Loop()
    hangs, goes_on = threading.Event(), threading.Event()

    def hang() -> None:
        hangs.set()
        assert goes_on.wait(60)

    try:
        service = wggw.Service(lambda: world.config)
        service._gateway = world.gateway
        loop.after_round = service._end_round
        loop.start()
        heard.hears("WATCHDOG=1", 2)
        loop.post(hang)
        assert hangs.wait(60)
        time.sleep(0.1)  # for what was said before to be heard
        before = heard.lines().count("WATCHDOG=1")
        time.sleep(2.5)  # it says so once a second at least
        assert heard.lines().count("WATCHDOG=1") == before
        goes_on.set()
        heard.hears("WATCHDOG=1", before + 2)
    finally:
        goes_on.set()
        world.close()
        loop.stop()
        heard.close()


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_watchdog_is_for_the_process_that_it_names(
    environ: dict[str, str], seconds: float | None
) -> None:
    assert wggw.Manager(environ).watchdog == seconds


def test_status_with_line_breaks_stays_one_assignment(tmp_path: Path) -> None:
    heard = Ear(str(tmp_path / "notify"))
    wggw.Manager({"NOTIFY_SOCKET": str(tmp_path / "notify")}).tell("STATUS=a\nREADY=1", "X=1")
    wait_for(lambda: heard.messages)
    heard.close()
    assert heard.messages == [["STATUS=a READY=1", "X=1"]]
