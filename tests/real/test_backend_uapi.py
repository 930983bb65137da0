"""UapiBackend keeps the backends' contract with wireguard-go; its program's life and death."""

from __future__ import annotations

import functools
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import interfaces
import netns
import pytest
from backend_contract import InterfaceContract, held, peer, put, wg_dump
from harness import wait_for

import wggw

pytestmark = pytest.mark.real


@pytest.fixture
def interface() -> Iterator[interfaces.Opened]:
    netns.need("ip", "wg", "wireguard-go", tun=True)
    make = functools.partial(wggw.UapiBackend, program=shutil.which("wireguard-go"))
    with interfaces.interface(make, netns.end_daemon) as opened:
        yield opened


class TestUapiBackend(InterfaceContract):
    def test_the_program_outlives_the_backend(
        self, backend: wggw.Backend, interface: interfaces.Opened
    ) -> None:
        put(backend, peer("a", "10.99.0.2/32"))
        pid = netns.daemon_pid(interface.link.name)
        backend.close()
        second = interface.open(interface.link)
        second.setup()
        assert netns.daemon_pid(interface.link.name) == pid
        assert held(second) == {peer("a", "10.99.0.2/32")}

    def test_a_start_asks_the_program_once_for_all_peers(
        self,
        backend: wggw.Backend,
        interface: interfaces.Opened,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        put(backend, peer("a", "10.99.0.2/32"))
        asked: list[bytes] = []
        exchange = wggw.UapiConnection.exchange

        def count(connection: wggw.UapiConnection, request: bytes, *more: Any) -> list[bytes]:
            asked.append(request)
            return exchange(connection, request, *more)

        monkeypatch.setattr(wggw.UapiConnection, "exchange", count)
        second = interface.open(interface.link)
        second.setup()
        assert held(second) == {peer("a", "10.99.0.2/32")}
        assert asked == [b"get=1\n\n"]
        put(backend, peer("b", "10.99.0.3/32"))
        both = {peer("a", "10.99.0.2/32"), peer("b", "10.99.0.3/32")}
        assert held(second) == both  # only the first reading does without a question
        third = interface.open(interface.link)
        third.setup()
        put(third, peer("c", "10.99.0.4/32"))
        assert held(third) == both | {peer("c", "10.99.0.4/32")}  # none after a change

    def test_the_listener_on_a_socket_is_the_program(
        self, backend: wggw.Backend, interface: interfaces.Opened
    ) -> None:
        path = wggw.uapi_path(interface.link.kind, interface.link.name)
        assert wggw.uapi_listener(path) == netns.daemon_pid(interface.link.name)
        assert wggw.uapi_port(path) == interface.link.listen_port
        interface.destroy()
        assert (wggw.uapi_listener(path), wggw.uapi_port(path)) == (None, 0)

    def test_a_backend_that_did_not_start_the_program_sees_its_death(
        self, backend: wggw.Backend, interface: interfaces.Opened
    ) -> None:
        second = interface.open(interface.link)
        second.setup()
        assert second.alive()
        interface.destroy()
        assert not second.alive()
        second.setup()
        assert second.alive()

    def test_a_program_that_hangs_is_started_anew_by_who_started_it(
        self,
        backend: wggw.Backend,
        interface: interfaces.Opened,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        second = interface.open(interface.link)
        second.setup()
        pid = netns.daemon_pid(interface.link.name)
        assert pid is not None
        netns.freeze(pid)
        monkeypatch.setattr(wggw, "BACKEND_TIMEOUT", 0.2)
        for each in (backend, second):
            each._control.close()  # a connection keeps the timeout that it began with
            for _ in range(wggw.HUNG_TIMEOUTS):
                assert each.alive()
                with pytest.raises(wggw.BackendError, match="no answer within"):
                    each.setup()
        monkeypatch.undo()
        assert second.alive()  # another one's
        assert not backend.alive()
        backend.setup()
        assert backend.alive()
        assert netns.daemon_pid(interface.link.name) != pid
        put(backend, peer("a", "10.99.0.2/32"))
        assert held(second) == {peer("a", "10.99.0.2/32")}

    def test_deleting_the_link_is_the_end_of_the_interface(
        self, backend: wggw.Backend, interface: interfaces.Opened
    ) -> None:
        name = interface.link.name
        netns.output("ip", "link", "delete", name)
        wait_for(lambda: netns.daemon_pid(name) is None, what="the end of wireguard-go")
        assert not backend.alive()
        backend.setup()
        put(backend, peer("a", "10.99.0.2/32"))
        assert wg_dump(name).peers == {peer("a", "10.99.0.2/32")}

    def test_a_renamed_interface_is_told_and_is_well_when_it_has_its_name_again(
        self, backend: wggw.Backend, interface: interfaces.Opened
    ) -> None:
        put(backend, peer("a", "10.99.0.2/32"))
        name, other = interface.link.name, netns.unique()
        netns.output("ip", "link", "set", name, "down", "name", other)
        assert not backend.alive()
        with pytest.raises(wggw.ForeignError, match="renamed"):
            backend.setup()
        netns.output("ip", "link", "set", other, "name", name)
        backend.setup()
        assert backend.alive()
        assert held(backend) == {peer("a", "10.99.0.2/32")}

    def test_no_request_for_another_setup_starts_the_program(
        self, backend: wggw.Backend, interface: interfaces.Opened
    ) -> None:
        other = interface.link._replace(listen_port=interface.link.listen_port + 1)
        interface.destroy()
        assert netns.daemon_pid(interface.link.name) is None
        with pytest.raises(wggw.BackendError, match="sets it up again|starts it again"):
            backend.setup(other, make=False)
        assert netns.daemon_pid(interface.link.name) is None
        backend.setup()
        assert wg_dump(interface.link.name).listen_port == interface.link.listen_port
        backend.setup(other, make=False)
        assert wg_dump(interface.link.name).listen_port == other.listen_port

    def test_a_running_program_is_used_without_one_to_start(
        self, backend: wggw.Backend, interface: interfaces.Opened
    ) -> None:
        put(backend, peer("a", "10.99.0.2/32"))
        second = wggw.UapiBackend(interface.link, None)
        interface.backends.append(second)
        second.setup()
        assert held(second) == {peer("a", "10.99.0.2/32")}


def test_without_program_and_socket_the_error_names_the_socket(
    interface: interfaces.Opened,
) -> None:
    backend = wggw.UapiBackend(interface.link, None)
    interface.backends.append(backend)
    with pytest.raises(wggw.BackendError, match=f"{interface.link.name}.sock"):
        backend.setup()


@pytest.mark.parametrize(
    ("script", "words"),
    [
        pytest.param("exit 3", "status 3", id="ends at once"),
        pytest.param("exec sleep 60", "did not open", id="never opens its socket"),
        pytest.param(None, "No such file", id="is not there"),
    ],
)
def test_a_program_that_does_not_serve_is_a_backend_error_and_not_left_running(
    interface: interfaces.Opened,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: str | None,
    words: str,
) -> None:
    # How long is waited for the one that would never come: the others are done before that.
    monkeypatch.setattr(wggw, "DAEMON_START_SECONDS", 0.3 if "sleep" in str(script) else 30.0)
    program = tmp_path / "program"
    if script is not None:
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    backend = wggw.UapiBackend(interface.link, str(program))
    interface.backends.append(backend)
    with pytest.raises(wggw.BackendError, match=words):
        backend.setup()
    assert not processes_of(program, "sleep 60")


def processes_of(*words: object) -> list[str]:
    """Command lines with one of these words, of processes in this thread's namespace."""
    here = Path("/proc/thread-self/ns/net").readlink()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "ns/net").readlink() == here:
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue  # it ended meanwhile
    return [line for line in found if any(str(word) in line for word in words)]


def test_a_program_that_hangs_is_a_backend_error_in_time(
    interface: interfaces.Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wggw, "BACKEND_TIMEOUT", 0.3)
    monkeypatch.setitem(wggw.UAPI_DIRECTORIES, interface.link.kind, str(tmp_path))
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / f"{interface.link.name}.sock"))
        silent.listen()
        backend = wggw.UapiBackend(interface.link, None)
        interface.backends.append(backend)
        for call in (backend.setup, lambda: backend.read(()), lambda: put(backend, peer("a"))):
            with pytest.raises(wggw.BackendError):
                call()
