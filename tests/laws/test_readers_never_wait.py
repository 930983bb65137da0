"""Whoever only reads waits for no disk, no interface and no other request."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path

import netns
import pytest
from harness import LONG, Answer, Client, a_key, wait_for
from rig import (
    PEERS,
    Background,
    Reads,
    fill,
    is_healthy,
    measured,
    memory_gateway,
    put,
    quiet_reads,
    real_gateway,
    status,
    wait_healthy,
)

KEY = a_key("is there")
READS: dict[str, Callable[[Client], Answer]] = {
    "a peer": lambda c: c.get(KEY),
    "a page": lambda c: c.send("GET", f"{PEERS}?limit=100"),
    "the status": status,
    "the pools": lambda c: c.send("GET", "/api/v1/ip-usage"),
    "liveness": lambda c: c.raw("GET", "/healthz", b"", {}),
}
SOON, LONGEST = 0.1, 3.0  # seconds


def check_reads_go_on(readers: list[Reads], what: str) -> None:
    """Each of them gets answers, one after the other, as long as something is held up."""
    begun = [len(reads.times) for reads in readers]

    def enough() -> bool:
        return all(
            len(reads.times) >= before + 20 for reads, before in zip(readers, begun, strict=True)
        )

    with contextlib.suppress(AssertionError):
        wait_for(enough, 15)
    answered = {
        name: len(reads.times) - before
        for name, reads, before in zip(READS, readers, begun, strict=False)
    }
    assert enough(), f"answers while {what}: {answered}"


@pytest.mark.parametrize("call", ["fsync", "apply", "read"])
def test_while_disk_or_interface_is_slow(tmp_path: Path, call: str) -> None:
    """And somebody changes things, who has to wait."""
    with (
        memory_gateway(tmp_path, SAMPLE_INTERVAL="0.2") as gateway,
        contextlib.ExitStack() as stack,
    ):
        assert gateway.client().create(KEY).status == 200
        readers = [stack.enter_context(Reads(gateway, ask)) for ask in READS.values()]
        gateway.faults.rule(call, block=True)
        writers = [
            Background(gateway, lambda c, n=number: c.create(a_key(("new", n))))
            for number in range(3)
        ]
        gateway.faults.wait_held()
        try:
            check_reads_go_on(readers, f"{call} is held up")
            assert call == "read" or not any(writer.done() for writer in writers)
        finally:
            gateway.faults.clear()
        for writer in writers:
            assert writer.wait().status == 200


@pytest.mark.real
def test_while_wireguard_is_read(tmp_path: Path) -> None:
    """A reading goes on; who changes something waits for its end, and no reader does."""
    with real_gateway(tmp_path, SAMPLE_INTERVAL="0.3") as (gateway, interface):
        assert gateway.client().create(KEY).status == 200
        with Reads(gateway, READS["a peer"]) as reads:
            interface.faults.rule("get", block=True)
            interface.faults.wait_held()
            writer = Background(gateway, lambda c: c.create(a_key("new")))
            try:
                check_reads_go_on([reads], "the interface is read")
            finally:
                interface.faults.clear()
            assert writer.wait().status == 200


@pytest.mark.real
def test_while_many_peers_are_read(tmp_path: Path) -> None:
    """wireguard-go itself, read again and again, with a writer beside."""
    many = 40_000 if LONG else 2_000
    with real_gateway(tmp_path, SAMPLE_INTERVAL="1" if LONG else "0.5") as (gateway, interface):
        client = gateway.client()
        keys = [KEY, *(a_key(number) for number in range(many - 1))]
        fill(client, keys)
        numbers = itertools.count()

        def measure() -> None:
            until = interface.faults.calls("get") + 4
            with (
                quiet_reads(tmp_path / f"quiet{next(numbers)}", READS["a peer"]) as quiet,
                Reads(gateway, READS["a peer"]) as reads,
            ):
                while interface.faults.calls("get") < until or len(reads.times) < 50:
                    assert client.create(a_key(("new", next(numbers)))).status == 200
            reads.check(SOON, LONGEST, quiet)

        measured(measure)


def test_while_a_desired_state_is_under_way(tmp_path: Path) -> None:
    many = 20_000 if LONG else 2_000
    with memory_gateway(tmp_path) as gateway:
        assert gateway.client().create(KEY).status == 200
        elements = [{"public_key": key} for key in (KEY, *map(a_key, range(many)))]
        numbers = itertools.count(20)

        def measure() -> None:
            with (
                quiet_reads(tmp_path / f"quiet{next(numbers)}", READS["a peer"]) as quiet,
                Reads(gateway, READS["a peer"]) as reads,
            ):
                for _ in range(3):
                    changed = {"persistent_keepalive": next(numbers)}
                    wanted = [{**element, **changed} for element in elements]
                    writer = Background(gateway, lambda c, w=wanted: put(c, w))
                    assert writer.wait(120).status == 200
            reads.check(SOON if LONG else 0.3, LONGEST, quiet)

        measured(measure)


# --- an interface that hangs ----------------------------------------------------------------------

BOUNDED = 25.0  # seconds until a change is refused


@pytest.mark.real
@pytest.mark.long
def test_while_wireguard_hangs(tmp_path: Path) -> None:
    """Reads are answered, changes refused in bounded time; the status says so, and it heals."""
    with real_gateway(tmp_path, started_before=True, SAMPLE_INTERVAL="0.5") as (
        gateway,
        interface,
    ):
        client = gateway.client()
        assert client.create(KEY).status == 200
        real = real_pid(interface.name)
        netns.freeze(real)
        try:
            with (
                quiet_reads(tmp_path / "quiet", READS["a peer"]) as quiet,
                Reads(gateway, READS["a peer"]) as reads,
                Reads(gateway, status) as states,
            ):
                change = Background(gateway, lambda c: c.create(a_key("new")))
                answer = change.wait(BOUNDED)
                assert answer.status == 503, answer
                assert client.get(a_key("new")).status == 404
                wait_for(lambda: not is_healthy(client), what="a status that says so")
            reads.check(SOON, LONGEST, quiet)
            states.check(SOON, LONGEST, quiet)
        finally:
            thaw(real)
        wait_healthy(client)
        assert client.create(a_key("new")).status == 200
        assert interface.peers() == {KEY, a_key("new")}


def real_pid(name: str) -> int:
    """wireguard-go itself, behind the proxy."""
    proxy = netns.daemon_pid(name)
    children = Path(f"/proc/{proxy}/task/{proxy}/children").read_text().split()
    assert len(children) == 1, children
    return int(children[0])


def thaw(pid: int) -> None:
    os.kill(pid, signal.SIGCONT)
