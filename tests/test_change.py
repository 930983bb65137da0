"""PATCH, rotate and batch, over TLS with the memory backend."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from fakes import batch, build, do, exhaust, submit
from harness import LONG, Client, a_key, path_key, wait_for
from hypothesis import given, settings
from hypothesis import strategies as st

import wggw

PATH = "/api/v1/configurations"


def in_seconds(seconds: float) -> str:
    return (datetime.now(timezone.utc) + timedelta(seconds=seconds)).isoformat()


def patch(client: Client, public_key: str, **fields: Any) -> Any:
    return client.send("PATCH", f"{PATH}/{path_key(public_key)}", fields)


def rotate(client: Client, public_key: str, new: str) -> Any:
    body = {"new_public_key": new}
    return client.send("POST", f"{PATH}/{path_key(public_key)}/rotate", body)


CHANGES: list[tuple[str, Any, Any]] = [
    ("dns", "d2", "d2"),
    ("tunnel_traffic", ["ipv6"], ["ipv6"]),
    ("tunnel_traffic", None, ["ipv4", "ipv6"]),  # the default
    ("tunnel_traffic", ["ipv6"], ["ipv6"]),
    ("persistent_keepalive", 0, 0),
    ("quota_bytes", 10**12, 10**12),
    ("quota_bytes", None, None),
    ("expires_at", "2100-01-01T00:00:00+01:00", "2099-12-31T23:00:00Z"),
    ("expires_at", None, None),
]


def test_patch_changes_what_it_names_and_nothing_else(client: Client) -> None:
    client.create(a_key(1), protocol="dual")
    before = client.get(a_key(1)).json
    for name, value, shown in CHANGES:
        answer = patch(client, a_key(1), **{name: value})
        before[name] = shown
        before["dns_servers"] = answer.json["dns_servers"]
        before["allowed_ips"] = answer.json["allowed_ips"]
        assert answer.json["sequence"] > before["sequence"]
        before["sequence"] = answer.json["sequence"]
        assert (answer.status, answer.json) == (200, before)
    assert client.get(a_key(1)).json == before
    assert before["allowed_ips"] == ["::/0"]


REFUSED: list[tuple[str, Any]] = [
    ("dns", "nowhere"),
    ("dns", None),
    ("port", 1),
    ("tunnel_traffic", []),
    ("tunnel_traffic", ["ipv6"]),
    ("persistent_keepalive", -1),
    ("quota_bytes", -1),
    ("expires_at", "2001-01-01T00:00:00Z"),
    ("expires_at", "tomorrow"),
    ("preshared_key", "short"),
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_patch_refuses_bad_values_and_changes_nothing(
    shared_client: Client, name: str, value: Any
) -> None:
    client = shared_client
    client.create(a_key(1))
    before = client.get(a_key(1)).json
    answer = patch(client, a_key(1), **{"dns": "d3", name: value})
    assert answer.status == 422 and answer.json["detail"].startswith(name)
    assert client.get(a_key(1)).json == before


def test_preshared_key_shows_in_the_client_configuration(client: Client) -> None:
    client.create(a_key(1))
    patch(client, a_key(1), preshared_key=a_key("psk"))
    assert (
        f"PresharedKey = {a_key('psk')}" in client.get(a_key(1), "?format=wg-quick").body.decode()
    )
    patch(client, a_key(1), preshared_key=None)
    assert "PresharedKey" not in client.get(a_key(1), "?format=wg-quick").body.decode()


def test_expiry_suspends_and_a_later_date_activates(client: Client) -> None:
    expires = time.time() + 3
    assert client.create(a_key(1), expires_at=in_seconds(3)).status == 200
    expired = wait_for(
        lambda: (shown := client.get(a_key(1)).json)["status"] == "suspended" and shown
    )
    assert time.time() >= int(expires)
    assert expired["status_reason"] == "expired"
    refused = client.status(a_key(1), "active")
    assert (refused.status, refused.json["detail"].partition(":")[0]) == (409, "expires_at")
    again = patch(client, a_key(1), expires_at=in_seconds(3600)).json
    assert (again["status"], again["status_reason"]) == ("active", None)


def test_a_suspension_by_the_backend_is_not_undone_by_a_later_date(client: Client) -> None:
    client.create(a_key(1))
    client.status(a_key(1), "suspended")
    assert patch(client, a_key(1), expires_at=in_seconds(60)).json["status"] == "suspended"


def test_rotate_keeps_everything_but_the_key(client: Client) -> None:
    client.create(a_key(1), protocol="dual", request_id="r")
    before = client.get(a_key(1)).json
    answer = rotate(client, a_key(1), a_key(2))
    changed = {"public_key": a_key(2), "sequence": answer.json["sequence"]}
    assert (answer.status, answer.json) == (200, {**before, **changed})
    assert client.get(a_key(1)).status == 404
    assert client.get(a_key(2)).json == answer.json
    assert client.send("POST", "/api/v1/sync-ips").json["unchanged"] == 1


def test_rotate_to_a_key_in_use_is_a_conflict(client: Client) -> None:
    client.create(a_key(1))
    client.create(a_key(2))
    assert rotate(client, a_key(1), a_key(2)).status == 409
    own = client.get(a_key(1)).json["server_public_key"]
    assert rotate(client, a_key(1), own).status == 409
    assert rotate(client, a_key(1), a_key(1)).status == 200
    assert rotate(client, a_key(3), a_key(4)).status == 404


def test_batch_answers_each_operation_in_order(client: Client) -> None:
    operations: list[Any] = [
        {"op": "create", "public_key": a_key(1)},
        {"op": "create", "public_key": a_key(1)},
        {"op": "suspend", "public_key": a_key(1)},
        {"op": "activate", "public_key": a_key(1)},
        {"op": "delete", "public_key": a_key(9)},
        {"op": "create", "public_key": "short"},
        {"op": "explode", "public_key": a_key(1)},
        "nothing",
        {"op": "delete", "public_key": a_key(1)},
        {"op": "create", "public_key": a_key(2), "encrypted_payload": "AAAA"},
    ]
    answer = client.send("POST", f"{PATH}/batch", {"operations": operations})
    said = [result["status"] for result in answer.json["results"]]
    assert answer.status == 200
    assert said == ["created", "exists", "suspended", "updated", 404, 422, 422, 400, "deleted", 422]
    assert client.get(a_key(1)).status == 404


def test_batch_of_a_thousand_is_durable_and_one_more_is_refused(client: Client) -> None:
    operations = [
        {"op": "create", "public_key": a_key(i), "assigned_ip": None} for i in range(1001)
    ]
    assert client.send("POST", f"{PATH}/batch", {"operations": operations}).status == 422
    answer = client.send("POST", f"{PATH}/batch", {"operations": operations[:1000]})
    said = [result["status"] for result in answer.json["results"]]
    assert said == ["created"] * 253 + [503] * 747


CREATES = st.lists(
    st.tuples(st.integers(0, 20), st.one_of(st.none(), st.integers(1, 20))), min_size=1, max_size=20
)


@settings(max_examples=40 if LONG else 15, deadline=None)
@given(batches=st.lists(CREATES, min_size=1, max_size=3), gone=st.sets(st.integers(0, 20)))
def test_operations_of_a_batch_do_together_what_they_would_do_one_by_one(
    tmp_path_factory: pytest.TempPathFactory,
    batches: list[list[tuple[int, int | None]]],
    gone: set[int],
) -> None:
    """Keys that are there or come twice, addresses that are taken or run out: 13 in the subnet.

    Which free address a peer gets is nobody's promise: one that waits is served later.
    """
    worlds = [
        build(tmp_path_factory.mktemp(name), WG_IPV4_SUBNET="10.0.0.0/28")
        for name in ("together", "alone")
    ]
    together, alone = (world.gateway for world in worlds)
    for creates in batches:
        operations: list[wggw.BatchOperation] = [
            ("create", {"public_key": a_key(n), **({"assigned_ip": f"10.0.0.{at}"} if at else {})})
            for n, at in creates
        ]
        results = batch(together, operations)
        expected = [result for op in operations for result in batch(alone, [op])]
        if all(at is None for _, at in creates):
            assert [shown(result) for result in results] == [shown(result) for result in expected]
        for (name, fields), result in zip(operations, results, strict=True):
            named = fields.get("assigned_ip")
            if isinstance(result, wggw.Outcome) and result.changed and named:
                assert result.peer.assigned_ip == named, name
        for number in gone:
            for gateway in (together, alone):
                batch(gateway, [("delete", {"public_key": a_key(number)})])
        kept = [world.store.peers_after(0, 99) for world in worlds]
        assert len({p.assigned_ip for p in kept[0]}) == len(kept[0])
        if all(at is None for _, at in creates):
            assert {p.public_key for p in kept[0]} == {p.public_key for p in kept[1]}
        else:
            break  # from here on the two may have gone different ways
    for world in worlds:
        world.close()


def shown(result: wggw.Outcome | wggw.GatewayError) -> Any:
    if isinstance(result, wggw.GatewayError):
        return result.status, result.detail
    return result.changed, result.peer._replace(id=0)


def test_operations_of_a_batch_reach_disk_and_interface_together(tmp_path: Path) -> None:
    world = build(tmp_path)
    world.backend.faults.calls.clear()
    world.disk.faults.calls.clear()
    with world.lock:  # as the loop has it: the lander waits for all that a round decided
        operations: list[wggw.BatchOperation] = [
            ("create", {"public_key": a_key(n)}) for n in range(95)
        ]
        answered: list[Any] = []
        replies = (lambda _, result: result, answered.extend)
        exhaust(wggw.Batch(world.gateway, operations, *replies, exhaust).steps())
    wait_for(lambda: len(answered) == 95)
    assert all(isinstance(result, wggw.Outcome) and result.changed for result in answered)
    assert world.disk.faults.calls["fsync"] <= 2
    assert world.backend.faults.calls["apply"] <= 2
    world.close()


def test_any_number_of_operations_on_one_key_is_answered_a_slice_a_round(tmp_path: Path) -> None:
    """They nest in no stack, and no slice has more than one of them."""
    world = build(tmp_path)
    operations: list[wggw.BatchOperation] = [
        ("create", {"public_key": a_key(1), "ignored": []}),
        *[("activate", {"public_key": a_key(1)})] * 998,
        ("rotate", {"public_key": a_key(1), "new_public_key": a_key(2)}),
    ]
    answered: list[Any] = []
    work: list[Iterator[None]] = []
    shown_in_slice = [0]

    def show(_: wggw.BatchOperation, result: Any) -> Any:
        shown_in_slice[-1] += 1
        return result

    with world.lock:
        exhaust(wggw.Batch(world.gateway, operations, show, answered.extend, work.append).steps())
        exhaust(work.pop())
    wait_for(lambda: bool(work))  # the create has landed
    with world.lock:
        [steps] = work
        shown_in_slice.append(0)
        for _ in steps:
            shown_in_slice.append(0)
    wait_for(lambda: bool(answered))
    assert max(shown_in_slice) == 1
    assert [result.changed for result in answered] == [True, *[False] * 998, True]
    assert not world.gateway.ledger.in_flight
    world.close()


@pytest.mark.parametrize("waits", [False, True], ids=["decided at once", "behind another flight"])
def test_a_defect_in_a_decision_is_answered_and_leaves_nothing_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    world = build(tmp_path)
    complete = wggw.Flight.complete

    def fail_to_delete(flight: wggw.Flight) -> None:
        if flight.steps[0].after is None:
            raise MemoryError
        complete(flight)

    if not waits:
        do(world.gateway, "create", public_key=a_key(1), ignored=[])
    with world.lock:
        if waits:
            submit(world.gateway, "create", public_key=a_key(1), ignored=[])
        monkeypatch.setattr(wggw.Flight, "complete", fail_to_delete)
        deleted = submit(world.gateway, "delete", public_key=a_key(1))
    with pytest.raises(wggw.GatewayError, match="internal error"):
        deleted()
    monkeypatch.setattr(wggw.Flight, "complete", complete)
    assert do(world.gateway, "delete", public_key=a_key(1)).changed
    assert world.gateway.sync({}, False, True) == (0, 0, 0, 0)
    world.close()


def test_no_refusal_of_a_batch_rests_on_a_change_that_the_disk_lost(tmp_path: Path) -> None:
    world = build(tmp_path)
    for number in (1, 2):
        do(world.gateway, "create", public_key=a_key(number))
    before = world.store.peers_after(0, 99)
    world.disk.fail("write")
    malformed = wggw.Malformed("operations[2]: what?")
    results = batch(
        world.gateway,
        [
            ("delete", {"public_key": a_key(1)}),
            ("suspend", {"public_key": a_key(1)}),
            malformed,
            ("activate", {"public_key": a_key(2)}),  # it is: nothing to do, nothing to lose
        ],
    )
    refusals = [r.status if isinstance(r, wggw.GatewayError) else None for r in results]
    assert refusals == [503, 503, 400, None]
    world.gateway.lander.heal()
    assert world.store.peers_after(0, 99) == before
    world.close()


def test_operations_on_one_key_are_done_in_order_also_when_one_waits_for_an_address(
    tmp_path: Path,
) -> None:
    """The address is being freed by somebody whose change is on its way."""
    world = build(tmp_path, WG_IPV4_SUBNET="10.0.0.0/30")
    do(world.gateway, "create", public_key=a_key(1))
    deleted = submit(world.gateway, "delete", public_key=a_key(1))
    results = batch(
        world.gateway,
        [
            ("create", {"public_key": a_key(2)}),
            ("suspend", {"public_key": a_key(2)}),
            ("create", {"public_key": a_key(2), "assigned_ip": "10.0.0.2"}),
        ],
    )
    assert deleted().changed
    assert [r.changed for r in results if isinstance(r, wggw.Outcome)] == [True, True, False]
    world.close()


@pytest.mark.parametrize(
    ("rule", "fields"),
    [
        ("create", {"ignored": []}),
        ("set_status", {"status": "active"}),
        ("update", {"label": "x"}),
        ("rotate", {"new_public_key": a_key(1)}),
        ("reset_quota", {}),
    ],
)
def test_nothing_says_active_while_the_interface_is_known_to_differ(
    tmp_path: Path, rule: str, fields: dict[str, Any]
) -> None:
    """Not even a request that changes nothing."""
    world = build(tmp_path)
    do(world.gateway, "create", public_key=a_key(1), ignored=[], label="x")
    assert not do(world.gateway, rule, public_key=a_key(1), **fields).changed
    world.backend.drop(a_key(1))
    world.gateway.tunnels["wg0"].suspect("a change failed")
    with pytest.raises(wggw.Unavailable):
        do(world.gateway, rule, public_key=a_key(1), **fields)
    world.gateway.projection.reconcile()
    assert not do(world.gateway, rule, public_key=a_key(1), **fields).changed
    world.close()


def test_those_who_wait_for_an_address_are_decided_once_and_a_slice_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = build(tmp_path, WG_IPV4_SUBNET="10.0.0.0/26")
    total = world.gateway.tunnels["wg0"].pools["ipv4"].total
    operations: list[wggw.BatchOperation]
    operations = [("create", {"public_key": a_key(n), "ignored": []}) for n in range(total)]
    batch(world.gateway, operations)
    decided = [0]
    create, release = wggw.Rules.create, wggw.Ledger.release

    def count(rules: wggw.Rules, known: Any, fields: Any) -> Any:
        decided[-1] += 1
        return create(rules, known, fields)

    def begin_slice(ledger: wggw.Ledger, flight: wggw.Flight, refused: bool) -> Iterator[None]:
        for _ in release(ledger, flight, refused):
            decided.append(0)
            yield
        decided.append(0)

    monkeypatch.setattr(wggw.Rules, "create", count)
    monkeypatch.setattr(wggw.Ledger, "release", begin_slice)
    operations = [("delete", {"public_key": a_key(n)}) for n in range(total)]
    operations += [("create", {"public_key": a_key(("new", n))}) for n in range(total)]
    results = batch(world.gateway, operations)
    assert all(isinstance(result, wggw.Outcome) and result.changed for result in results)
    assert sum(decided) <= 3 * total
    assert max(decided[1:]) == 1  # the first are those of the batch itself
    world.close()


def out_of_memory(*_: Any) -> Any:
    raise MemoryError


@pytest.mark.parametrize("place", ["before the disk", "interface", "rows"])
def test_what_a_defect_in_a_landing_refuses_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    world = build(tmp_path)
    target, name = {
        "before the disk": (world.gateway.lander, "_write"),
        "interface": (world.backend, "apply"),
        "rows": (world.store, "apply_in_slices"),
    }[place]
    with monkeypatch.context() as patched:
        patched.setattr(target, name, out_of_memory)
        refused = place == "before the disk"
        with pytest.raises(wggw.Unavailable if refused else wggw.OutcomeUnknown):
            do(world.gateway, "create", public_key=a_key(1), ignored=[])
    with pytest.raises(wggw.Unavailable):  # it may be there, so no 404
        do(world.gateway, "delete", public_key=a_key(1))
    world.crash()
    world.reopen()
    assert (world.shown(a_key(1)) is None) == refused
    world.close()


def test_a_key_of_a_failed_landing_is_decided_when_the_interface_is_suspected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys are freed a slice at a time: the first ones before the last ones."""
    world = build(tmp_path)
    for number in range(3):
        do(world.gateway, "create", public_key=a_key(number), ignored=[])
    world.backend.fail("apply", what="half")
    release = wggw.Ledger.release
    answers: list[Any] = []

    def ask(ledger: wggw.Ledger, flight: wggw.Flight, refused: bool) -> Iterator[None]:
        for _ in release(ledger, flight, refused):
            for key in flight.keys:
                if key not in ledger.in_flight:
                    fields = {"public_key": key, "status": "active"}
                    world.gateway.change("set_status", fields, answers.append)
            yield

    monkeypatch.setattr(wggw, "APPLY_SLICE", 1)
    monkeypatch.setattr(wggw.Ledger, "release", ask)
    suspended = {
        a_key(n): wggw.Desired("", {"public_key": a_key(n), "status": "suspended"})
        for n in range(3)
    }
    with pytest.raises(wggw.Unavailable):
        world.gateway.sync(suspended, False, False)
    assert len(answers) > 3
    assert all(isinstance(answer, wggw.Unavailable) for answer in answers)
    world.close()


@pytest.mark.parametrize("fails", ["disk", "interface", "nothing"])
def test_a_refusal_never_rests_on_a_change_that_is_refused_itself(
    tmp_path: Path, fails: str
) -> None:
    """Who wants the same address, or the last one, waits for whoever has it on the way."""
    world = build(tmp_path, WG_IPV4_SUBNET="10.0.0.0/30")
    if fails == "disk":
        world.disk.fail("write")
    elif fails == "interface":
        world.backend.refusing = {a_key(1)}
    with world.lock:  # both are decided before the first one lands
        first = submit(world.gateway, "create", public_key=a_key(1))
        others = [
            submit(world.gateway, "create", public_key=a_key(2), assigned_ip="10.0.0.2"),
            submit(world.gateway, "create", public_key=a_key(3)),
        ]
    if fails == "nothing":
        assert first().changed
        for other, refusal in zip(others, (wggw.Conflict, wggw.Unavailable), strict=True):
            with pytest.raises(refusal):
                other()
        world.close()
        return
    with pytest.raises(wggw.Unavailable):
        first()
    for other in others:  # for the same reason, and not for an address that nobody got
        with pytest.raises(wggw.Unavailable) as caught:
            other()
        assert "exhausted" not in caught.value.detail
    world.gateway.lander.heal()
    world.gateway.projection.supervise()
    assert do(world.gateway, "create", public_key=a_key(4)).peer.assigned_ip == "10.0.0.2"
    world.close()
