"""An answer is given when disk and interface have the change; one that fails leaves both alone.

Until then nobody is shown what may still fail, and nobody who only reads waits for it.
"""

from __future__ import annotations

import http.client
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import LONG, Answer, Client, a_key, some
from rig import (
    EIO,
    ENOSPC,
    PEERS,
    SEALED,
    Background,
    Gateway,
    check_interface,
    check_pool,
    listed,
    memory_gateway,
    patch,
    put,
    real_gateway,
    restarted,
    rotate,
    state,
)

OTHER, NEW = a_key("other"), a_key("new")
# Each kind of change, of a peer that is active (or suspended, for what ends that).
CHANGES: dict[str, Callable[[Client], Answer]] = {
    "create": lambda c: c.create(NEW),
    "suspend": lambda c: c.status(a_key("suspend"), "suspended"),
    "activate": lambda c: c.status(a_key("activate"), "active"),
    "delete": lambda c: c.delete(a_key("delete")),
    "quota": lambda c: patch(c, a_key("quota"), quota_bytes=10**9),
    "preshared key": lambda c: patch(c, a_key("preshared key"), preshared_key=a_key("secret")),
    "rotate": lambda c: rotate(c, a_key("rotate"), NEW),
    "desired state": lambda c: put(c, [{"public_key": k} for k in (OTHER, NEW)]),
}
# What never reaches the interface cannot fail there.
INTERFACE = [name for name in CHANGES if name != "quota"]
FAULTS: dict[str, list[dict[str, object]]] = {
    "fsync": [{"calls": ["fsync"], "only": "wireguard.db", "errno": EIO}],
    "torn write": [{"calls": ["write"], "only": "wireguard.db", "errno": ENOSPC, "torn": True}],
    "interface": [{"calls": ["apply"], "errno": EIO}],
    "interface half-way": [{"calls": ["apply"], "errno": EIO, "torn": True}],
    "interface, done all the same": [{"calls": ["apply"], "errno": EIO, "done": True}],
}


def prepare(client: Client) -> None:
    client.create(OTHER)
    for name in CHANGES:
        assert name in ("create", "desired state") or client.create(a_key(name)).status == 200
    assert client.status(a_key("activate"), "suspended").status == 200


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    with memory_gateway(tmp_path, SAMPLE_INTERVAL="0.2") as process:
        prepare(process.client())
        yield process


HELD = {
    "disk": {"calls": ["fsync"], "only": ".journal", "block": True},
    "interface": {"calls": ["apply"], "block": True},
}


@pytest.mark.parametrize("where", HELD)
def test_nothing_is_answered_or_shown_before_and_no_reader_waits(
    gateway: Gateway, where: str
) -> None:
    """Each change alone is held up: it has no answer, and all that can be read is as it was."""
    client = gateway.client()
    for name in ("create", "suspend", "rotate", "delete"):
        before = state(client)
        used = client.send("GET", "/api/v1/ip-usage").json["ipv4"]["used"]
        gateway.faults.rules(HELD[where])
        change = Background(gateway, CHANGES[name])
        gateway.faults.wait_held()
        reader = Background(gateway, lambda c: c.get(OTHER))
        assert reader.wait(5).status == 200
        everything = Background(gateway, lambda c: c.send("GET", f"{PEERS}?limit=1000"))
        shown = {row["public_key"]: row for row in everything.wait(5).json["configurations"]}
        assert shown.keys() == before.keys(), name
        assert {k: row["status"] for k, row in shown.items()} == {
            k: row["status"] for k, row in before.items()
        }, name
        key = NEW if name == "create" else a_key(name)
        one = Background(gateway, lambda c, k=key: c.get(k))
        assert one.wait(5).status == (404 if name == "create" else 200), name
        usage = Background(gateway, lambda c: c.send("GET", "/api/v1/ip-usage"))
        assert usage.wait(5).json["ipv4"]["used"] == used
        assert not change.done(), f"{name} was answered: {change.answer}"
        gateway.faults.clear()
        assert change.wait().status == 200
        after = state(client)
        assert after != before, name
        if NEW in after:
            assert client.delete(NEW).status == 200
        check_interface(client)


@pytest.mark.parametrize("where", HELD)
def test_a_kill_before_the_answer_leaves_all_of_the_change_or_nothing(
    gateway: Gateway, where: str
) -> None:
    client = gateway.client()
    before = state(client)
    gateway.faults.rules(HELD[where])
    changes = [Background(gateway, CHANGES[name]) for name in ("create", "suspend", "delete")]
    gateway.faults.wait_held()
    client = restarted(gateway)
    for change in changes:
        change.join(30)
        assert change.answer is None, change.answer
    now = state(client)
    assert now.keys() - {NEW, a_key("delete")} == before.keys() - {a_key("delete")}
    check_interface(client)
    check_pool(client)


def check_fault(gateway: Gateway, fault: str, names: list[str]) -> None:
    """Each change meets the fault and is refused: nothing has changed, then and after a KILL."""
    client = gateway.client()
    before = state(client)
    for name in names:
        gateway.faults.rules(*FAULTS[fault])
        request = Background(gateway, CHANGES[name])
        request.join(30)
        if fault == "fsync":  # nobody can say what a disk that fails so has kept: no answer
            assert request.done() and request.answer is None, f"{name}: {request.answer}"
        else:
            assert request.wait().status == 503, f"{name}: {request.answer}"
        assert state(client) == before, name
        gateway.faults.clear()
        check_interface(client)
        assert state(client) == before, name
    check_pool(client)
    client = restarted(gateway)
    assert state(client) == before
    check_interface(client)
    check_pool(client)
    for name in names:  # and nothing keeps them from being made now
        if name != "desired state" and not (name == "rotate" and "create" in names):
            assert CHANGES[name](client).status == 200, name
    check_interface(client)


@pytest.mark.parametrize(
    ("fault", "sealed"),
    [
        (fault, sealed)
        for fault in FAULTS
        for sealed in (False, True)
        if LONG or sealed == (fault == "fsync")
    ],
)
def test_a_change_that_fails_changes_nothing(tmp_path: Path, fault: str, sealed: bool) -> None:
    names = INTERFACE if fault.startswith("interface") else list(CHANGES)
    if not LONG:  # each of them with some faults: every healing takes its time
        names = names[(list(FAULTS).index(fault) + sealed) % 3 :: 3]
    with memory_gateway(tmp_path, **(SEALED if sealed else {}), SAMPLE_INTERVAL="0.2") as gateway:
        prepare(gateway.client())
        check_fault(gateway, fault, names)


@pytest.mark.real
@pytest.mark.parametrize(
    "how", some([{"torn": True}, {"done": True}, {"cut": True, "done": True}], 2)
)
def test_a_change_that_wireguard_refuses_changes_nothing(
    tmp_path: Path, how: dict[str, bool]
) -> None:
    with real_gateway(tmp_path, SAMPLE_INTERVAL="0.2") as (gateway, interface):
        client = gateway.client()
        prepare(client)
        before, peers = state(client), interface.peers()
        for name in INTERFACE if LONG else INTERFACE[len(how) :: 3]:
            interface.faults.rule("set", errno=EIO, **how)
            assert CHANGES[name](client).status == 503, name
            assert state(client) == before, name
            interface.faults.clear()
            check_interface(client)
            assert interface.peers() == peers, name
            assert state(client) == before, name
        client = restarted(gateway)
        assert state(client) == before
        assert interface.peers() == peers


def test_what_fails_beside_others_fails_alone(gateway: Gateway) -> None:
    """An interface that refuses one of many changes: those that were acknowledged are there."""
    client = gateway.client()
    gateway.faults.rule("apply", errno=EIO, times=3, after=2)
    keys = [a_key(("beside", number)) for number in range(12)]
    requests = [Background(gateway, lambda c, k=key: c.create(k)) for key in keys]
    answers = dict(zip(keys, (request.wait() for request in requests), strict=True))
    assert {answer.status for answer in answers.values()} <= {200, 503}
    gateway.faults.clear()
    check_interface(client)
    for _ in range(2):
        there = listed(client)
        assert {key for key in keys if key in there} == {
            key for key, answer in answers.items() if answer.status == 200
        }
        client = restarted(gateway)
    check_interface(client)
    check_pool(client)


@pytest.mark.long
def test_a_failing_import_changes_nothing_or_says_that_it_did(tmp_path: Path) -> None:
    """Its interface's step fails at the first, second, third call: the answer tells the truth."""
    with memory_gateway(tmp_path, SAMPLE_INTERVAL="0.2") as gateway:
        client = gateway.client()
        for number in range(5):
            client.create(a_key(("exported", number)))
        image = client.send("GET", "/api/v1/snapshot").body
        for after in range(4):
            for key in listed(client):
                assert client.delete(key).status == 200
            client.create(a_key(("present", after)))
            before = set(listed(client))
            gateway.faults.rule("apply", "read", "setup", after=after, errno=EIO)
            answer = import_(client, image)
            now = set(listed(client))
            refused = answer.status != 200
            assert refused == (now == before), f"{answer} after {after} calls, and {len(now)} peers"
            assert answer.status in (200, 503), answer
            gateway.faults.clear()
            check_interface(client)
            assert set(listed(client)) == now
            client = restarted(gateway)
            assert set(listed(client)) == now
            check_interface(client)


def import_(client: Client, image: bytes) -> Answer:
    try:
        return client.send("PUT", "/api/v1/snapshot", image)
    except (OSError, http.client.HTTPException):
        client.close()
        return client.send("PUT", "/api/v1/snapshot", image)
