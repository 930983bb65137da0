"""The desired state: PUT of all peers at once, whole or not at all."""

from __future__ import annotations

import copy
import gc
import itertools
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from fakes import NOON, World, build, do, peer_of, submit
from harness import LONG, Client, GatewayProcess, a_key, encode, running, sign, wait_for

import wggw

PATH = "/api/v1/configurations/"


def lines(elements: Sequence[Any]) -> bytes:
    return b"".join(encode(element) + b"\n" for element in elements)


def put(client: Client, elements: Sequence[Any], query: str = "") -> Any:
    kind = "application/x-ndjson"
    return client.send("PUT", PATH + query, lines(elements), **{"Content-Type": kind})


def listed(client: Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    cursor = ""
    while True:
        page = client.send("GET", f"{PATH}?limit=1000{cursor}").json
        found += page["configurations"]
        if page["next_cursor"] is None:
            return found
        cursor = f"&cursor={page['next_cursor']}"


def counts(created: int, updated: int, deleted: int, unchanged: int) -> dict[str, Any]:
    return {
        "status": "synced",
        "created": created,
        "updated": updated,
        "deleted": deleted,
        "unchanged": unchanged,
    }


def test_what_is_given_is_honoured_what_is_missing_assigned_and_what_is_known_kept(
    client: Client,
) -> None:
    known = client.create(a_key(1), protocol="dual", dns="d2").json
    client.create(a_key(2))
    answer = put(
        client,
        [
            {"public_key": a_key(1)},
            {"public_key": a_key(3), "assigned_ip": "10.0.1.77", "status": "suspended"},
            {"public_key": a_key(4), "protocol": "dual"},
        ],
    )
    assert (answer.status, answer.json) == (200, counts(2, 0, 1, 1))
    assert client.get(a_key(2)).status == 404
    now = client.get(a_key(1)).json
    assert (now["assigned_ip"], now["assigned_ipv6"], now["dns"]) == (
        known["assigned_ip"],
        known["assigned_ipv6"],
        "d2",
    )
    three, four = client.get(a_key(3)).json, client.get(a_key(4)).json
    assert (three["assigned_ip"], three["status"]) == ("10.0.1.77", "suspended")
    assert four["assigned_ip"] and four["assigned_ipv6"] and four["status"] == "active"


def test_pushing_back_what_was_listed_changes_nothing(client: Client) -> None:
    client.create(a_key(1), protocol="dual", preshared_key=a_key("psk"), quota_bytes=10**9)
    client.create(a_key(2), expires_at="2100-01-01T00:00:00Z", request_id="r")
    client.create(a_key(3))
    client.status(a_key(3), "suspended")
    before = listed(client)
    assert put(client, before).json == counts(0, 0, 0, 3)
    answer = client.send("PUT", PATH, before)
    assert (answer.status, answer.json) == (200, counts(0, 0, 0, 3))
    assert listed(client) == before
    assert a_key("psk") in client.get(a_key(1), "?format=wg-quick").body.decode()


def test_a_listing_restores_an_empty_gateway(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with running(tmp_path / "a") as first, running(tmp_path / "b") as second:
        source, target = first.client(), second.client()
        for number in range(20):
            source.create(a_key(number), protocol="dual", quota_bytes=number + 1, dns="d3")
        source.status(a_key(3), "suspended")
        source.delete(a_key(5))
        before = listed(source)
        assert put(target, before).json == counts(19, 0, 0, 0)
        drop = ("created_at", "server_public_key", "sequence")
        assert [{k: v for k, v in c.items() if k not in drop} for c in listed(target)] == [
            {k: v for k, v in c.items() if k not in drop} for c in before
        ]


def test_peers_can_swap_addresses(client: Client) -> None:
    keys = [a_key(number) for number in range(6)]
    addresses = [client.create(key).json["assigned_ip"] for key in keys]
    turned = [*addresses[1:], addresses[0]]
    elements = [
        {"public_key": key, "assigned_ip": address}
        for key, address in zip(keys, turned, strict=True)
    ]
    assert put(client, elements).json == counts(0, 6, 0, 0)
    assert [client.get(key).json["assigned_ip"] for key in keys] == turned
    assert client.send("GET", "/api/v1/ip-usage").json["ipv4"]["used"] == 6
    # a new peer may have the address of one that goes
    elements = [*elements[1:], {"public_key": a_key(9), "assigned_ip": turned[0]}]
    assert put(client, elements).json == counts(1, 0, 1, 5)
    assert client.get(a_key(9)).json["assigned_ip"] == turned[0]


def test_a_full_pool_is_reused(tmp_path: Path) -> None:
    with running(tmp_path, WG_IPV4_SUBNET="10.9.0.0/29", WG_IPV6_SUBNET="") as gateway:
        client = gateway.client()
        for number in range(5):
            assert client.create(a_key(number)).status == 200
        elements = [{"public_key": a_key(number)} for number in range(10, 15)]
        assert put(client, elements, "?allow_mass_delete=true").json == counts(5, 0, 5, 0)
        answer = put(client, [*elements, {"public_key": a_key(20)}])
        assert answer.status == 503 and answer.json["detail"].startswith("line 6: ")
        assert {c["public_key"] for c in listed(client)} == {e["public_key"] for e in elements}
        assert client.send("GET", "/api/v1/ip-usage").json["ipv4"]["used"] == 5


def test_dry_run_tells_and_changes_nothing(client: Client) -> None:
    for number in range(3):
        client.create(a_key(number))
    before = listed(client)
    wanted = [{"public_key": a_key(0), "dns": "d2"}, {"public_key": a_key(7)}]
    answer = put(client, wanted, "?dry_run=true")
    assert answer.json == {**counts(1, 1, 2, 0), "status": "dry_run"}
    assert listed(client) == before
    assert client.send("GET", "/api/v1/ip-usage").json["ipv4"]["used"] == 3


def test_deleting_more_than_half_must_be_allowed(client: Client) -> None:
    for number in range(4):
        client.create(a_key(number))
    half = [{"public_key": a_key(0)}, {"public_key": a_key(1)}]
    answer = put(client, half[:1])
    assert answer.status == 409 and "allow_mass_delete" in answer.json["detail"]
    assert len(listed(client)) == 4
    assert put(client, half).json == counts(0, 0, 2, 2)
    assert put(client, [], "?allow_mass_delete=true").json == counts(0, 0, 2, 0)


def test_expired_peers_can_be_pushed_back(client: Client) -> None:
    client.create(a_key(1))
    answer = put(
        client,
        [
            {"public_key": a_key(1), "expires_at": "2001-01-01T00:00:00Z"},
            {"public_key": a_key(2), "expires_at": "2001-01-01T00:00:00Z", "status": "active"},
        ],
    )
    assert answer.json == counts(1, 1, 0, 0)
    for key in (a_key(1), a_key(2)):
        shown = client.get(key).json
        assert (shown["status"], shown["status_reason"]) == ("suspended", "expired")
    assert put(client, listed(client)).json == counts(0, 0, 0, 2)


BAD: list[tuple[int, str, str, bytes]] = [
    (422, "line 2: public_key", "the same key twice", lines([{"public_key": a_key(1)}] * 2)),
    (422, "line 1: public_key", "a bad key", b'{"public_key":"x"}\n'),
    (422, "line 1: public_key", "no key", b"{}\n"),
    (400, "line 2: ", "not JSON", lines([{"public_key": a_key(1)}]) + b"{\n"),
    (400, "line 1: ", "not an object", b"[]\n"),
    (422, "line 1: dns", "an unknown choice", lines([{"public_key": a_key(1), "dns": "x"}])),
    (422, "line 1: status", "an unknown one", lines([{"public_key": a_key(1), "status": "x"}])),
    (422, "line 1: port", "a port", lines([{"public_key": a_key(8), "port": 1}])),
    (
        409,
        "line 1: assigned_ip",
        "an address outside",
        lines([{"public_key": a_key(1), "assigned_ip": "10.9.9.9"}]),
    ),
    (
        422,
        "line 2: assigned_ip",
        "an address twice",
        lines([{"public_key": a_key(n), "assigned_ip": "10.0.1.9"} for n in (1, 2)]),
    ),
    (413, "line 1: ", "a long line", b'{"request_id":"' + b"x" * 70000),
]


@pytest.mark.parametrize(
    ("status", "detail", "body"), [pytest.param(s, d, b, id=i) for s, d, i, b in BAD]
)
def test_what_is_wrong_is_named_by_its_line_and_changes_nothing(
    shared_client: Client, status: int, detail: str, body: bytes
) -> None:
    client = shared_client
    client.create(a_key(8))
    before = listed(client)
    kind = {"Content-Type": "application/x-ndjson"}
    answer = client.send("PUT", PATH + "?allow_mass_delete=true", body, **kind)
    assert (answer.status, answer.json["detail"][: len(detail)]) == (status, detail)
    assert listed(client) == before
    assert client.send("GET", "/api/v1/ip-usage").json["ipv4"]["used"] == 1


@pytest.mark.parametrize(
    "body", [b"[", b"[{}", b"{}", b"[{},]", b"[1]", b"[] x", b'[{"a":1,"a":2}]', b"\xff", b"[[]]"]
)
def test_arrays_are_read_strictly(shared_client: Client, body: bytes) -> None:
    answer = shared_client.send("PUT", PATH, body)
    assert answer.status in (400, 422), answer


def test_other_media_types_are_refused_and_empty_bodies_are_an_empty_state(client: Client) -> None:
    assert client.send("PUT", PATH, b"x", **{"Content-Type": "text/csv"}).status == 415
    assert client.send("PUT", PATH, b" [ ] ").json == counts(0, 0, 0, 0)
    kind = {"Content-Type": "application/x-ndjson; charset=utf-8"}
    last = lines([{"public_key": a_key(1)}]).rstrip()  # without its end
    assert client.send("PUT", PATH, b"\r\n\n" + last, **kind).json == counts(1, 0, 0, 0)


def test_a_body_that_ends_early_changes_nothing(gateway: GatewayProcess) -> None:
    body = lines([{"public_key": a_key(number)} for number in range(1000)])
    headers = {**sign(body), "Content-Type": "application/x-ndjson"}
    text = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"PUT {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{text}\r\n"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with context.wrap_socket(socket.create_connection(("127.0.0.1", gateway.port), 10)) as raw:
        raw.sendall(head.encode() + body[:-100])
    client = gateway.client()
    assert client.create(a_key("other")).status == 200
    assert len(listed(client)) == 1
    assert "internal error" not in gateway.text()


# --- in process: faults, and others at the same time ----------------------------------------------

Elements = list[dict[str, Any]]


def a_world(directory: Path, subnet: str = "10.0.0.0/8") -> World:
    return build(directory, WG_IPV4_SUBNET=subnet)


def sync(world: World, elements: Elements, dry_run: bool = False) -> wggw.DesiredResult:
    desired = {e["public_key"]: wggw.Desired("line", e) for e in elements}
    return world.gateway.sync(desired, dry_run, True)


def peers(world: World) -> list[wggw.Peer]:
    return world.gateway.run(lambda: world.store.peers_after(0, 10**6))


def state(world: World) -> tuple[list[wggw.Peer], list[str]]:
    """Rows, and the addresses that come next; checked against interface, pools and disk."""
    rows, pool = peers(world), world.gateway.tunnels["wg0"].pools["ipv4"]
    active = {p.public_key: wggw.wire_peer(p) for p in rows if p.status == "active"}
    assert world.backend.peers == active
    held = [p.assigned_ip for p in rows if p.assigned_ip]
    assert pool.used == len(held)
    assert not any(pool.is_free(address) for address in held)
    assert not world.gateway.ledger.in_flight and not world.gateway.ledger.airborne
    return rows, upcoming(pool)


def upcoming(pool: wggw.AddressPool) -> list[str]:
    """The next addresses that peers would get."""
    copied, found = copy.deepcopy(pool), list[str]()
    while len(found) < 20 and (address := copied.peek()) is not None:
        copied.claim(address)
        found.append(address)
    return found


def before_and_after() -> tuple[Elements, Elements]:
    """Two states that differ in every way: new, gone, changed and swapped peers."""
    first: Elements = [
        {"public_key": a_key(n), "assigned_ip": f"10.1.0.{n + 2}"} for n in range(200)
    ]
    second: Elements = [
        {
            "public_key": a_key(n),
            "assigned_ip": f"10.1.0.{2 + (n - 100) % 150 if n >= 100 else 210}",
        }
        for n in range(100, 240)
    ]
    for n, element in enumerate(second):
        element["status"] = "suspended" if n % 7 == 0 else "active"
    return first, second


def test_an_address_that_a_peer_left_for_another_is_a_released_one_after_a_restart_too(
    tmp_path: Path,
) -> None:
    world = a_world(tmp_path, "10.0.0.0/28")
    do(world.gateway, "create", public_key=a_key(1))
    sync(world, [{"public_key": a_key(1), "assigned_ip": "10.0.0.9"}])
    assert state(world)[1][0] == "10.0.0.3" and state(world)[1][-1] == "10.0.0.2"
    upcoming = state(world)[1]
    world.crash()
    world.open()
    assert state(world)[1] == upcoming
    world.close()


def attempt(world: World, elements: Elements) -> bool:
    """Whether a desired state was taken. Faults end then, and a new snapshot makes it certain."""
    taken = True
    try:
        sync(world, elements)
    except (wggw.Unavailable, wggw.OutcomeUnknown):
        taken = False
        assert world.gateway.degraded()
    for faults in world.faults:
        faults.heal()
    world.gateway.projection.supervise()
    world.gateway.lander.heal()
    assert not world.gateway.degraded()
    return taken


FAULTS: dict[str, Callable[[World, int], None]] = {
    "disk": lambda w, n: w.disk.fail("write", "fsync", nth=n),
    "disk, for good": lambda w, n: w.disk.fail("write", "fsync", nth=n, forever=True),
    "interface refuses": lambda w, n: w.backend.fail("apply", nth=n),
    "interface refuses, for good": lambda w, n: w.backend.fail("apply", nth=n, forever=True),
    "interface does half": lambda w, n: w.backend.fail("apply", nth=n, what="half"),
    "interface's answer is lost": lambda w, n: w.backend.fail("apply", nth=n, what="lost"),
    "interface hangs": lambda w, n: w.backend.fail("apply", nth=n, what="hangs"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_refused_desired_state_never_changed_anything(tmp_path: Path, fault: str) -> None:
    world = a_world(tmp_path)
    first, second = before_and_after()
    sync(world, first)
    before = state(world)
    for nth in itertools.count(1):
        FAULTS[fault](world, nth)
        if attempt(world, second):
            break
        assert state(world) == before
        world.crash()
        world.open()
        assert state(world) == before
    assert nth > 1
    assert len(state(world)[0]) == len(second)
    world.close()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_single_change_that_was_acknowledged_meanwhile_outlives_a_failing_desired_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    world = a_world(tmp_path)
    first, second = before_and_after()
    sync(world, first)

    def single() -> None:
        do(world.gateway, "set_status", public_key=a_key(1), status="suspended")
        do(world.gateway, "delete", public_key=a_key(2))
        do(world.gateway, "update", public_key=a_key(101), quota_bytes=7)
        do(world.gateway, "create", public_key=a_key("new"))
        FAULTS[fault](world, 1)

    behind_comparing(monkeypatch, single)
    assert not attempt(world, second)
    for _ in range(2):
        rows = {peer.public_key: peer for peer in state(world)[0]}
        assert rows[a_key(1)].status == "suspended"
        assert a_key(2) not in rows and a_key("new") in rows
        assert rows[a_key(101)].quota_bytes == 7
        world.crash()
        world.open()
    world.close()


# --- others at the same time ----------------------------------------------------------------------


def behind_comparing(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> None:
    """Have work() done when a desired state knows what differs, and has marked nothing yet."""
    compare = wggw.DesiredState._compare

    def compared(desired: wggw.DesiredState) -> None:
        compare(desired)
        work()

    monkeypatch.setattr(wggw.DesiredState, "_compare", compared)


def before_landing(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> None:
    """Have work() done when a desired state has marked everything, and submitted nothing yet."""
    land = wggw.Bulk.land

    def landed(bulk: wggw.Bulk) -> None:
        if not started:
            started.append(threading.Thread(target=work, daemon=True))
            started[0].start()
        land(bulk)

    started: list[threading.Thread] = []
    monkeypatch.setattr(wggw.Bulk, "land", landed)


SINGLE: dict[str, tuple[str, dict[str, Any]]] = {
    "patch": ("update", {"dns": "d2"}),
    "suspend": ("set_status", {"status": "suspended"}),
    "delete": ("delete", {}),
    "rotate": ("rotate", {"new_public_key": a_key("new")}),
}


@pytest.mark.parametrize("single", SINGLE)
def test_a_desired_state_came_later_than_what_changed_while_it_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, single: str
) -> None:
    """It wins over the peers that it names, by whatever key, and counts what it did."""
    world = a_world(tmp_path)
    sync(world, [{"public_key": a_key(n), "quota_bytes": 5} for n in range(4)])
    rule, fields = SINGLE[single]
    behind_comparing(monkeypatch, lambda: do(world.gateway, rule, public_key=a_key(0), **fields))
    result = sync(world, [{"public_key": a_key(n), "quota_bytes": 6} for n in range(4)])
    rows = {peer.public_key: peer for peer in state(world)[0]}
    assert {rows[a_key(n)].quota_bytes for n in range(4)} == {6}
    counts = {"delete": (1, 3, 0, 0), "rotate": (1, 3, 1, 0)}
    assert result == counts.get(single, (0, 4, 0, 0))
    if single == "patch":
        assert rows[a_key(0)].dns == "d2"
    if single == "suspend":
        assert rows[a_key(0)].status == "suspended"
    assert a_key("new") not in rows  # the peer that the rotation made is the one that it was
    world.close()


@pytest.mark.parametrize("rule", ["create", "rotate"])
def test_a_key_that_came_while_it_compared_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    """After the comparison, only keys that were in flight since it began are looked up again."""
    world = a_world(tmp_path)
    sync(world, [{"public_key": a_key(n)} for n in range(3)])
    fields = {
        "create": {"public_key": a_key("came"), "label": "kept"},
        "rotate": {"public_key": a_key(0), "new_public_key": a_key("came")},
    }[rule]
    behind_comparing(monkeypatch, lambda: do(world.gateway, rule, **fields))
    names = [1, 2, "came", "new"]
    result = sync(world, [{"public_key": a_key(name), "quota_bytes": 6} for name in names])
    rows = {peer.public_key: peer for peer in state(world)[0]}
    assert rows.keys() == {a_key(name) for name in names}
    assert {peer.quota_bytes for peer in rows.values()} == {6}
    assert rows[a_key("came")].label == ("kept" if rule == "create" else None)
    assert result == (1, 3, int(rule == "create"), 0)
    world.close()


def test_who_watches_keys_in_flight_sees_them_until_its_own_end(tmp_path: Path) -> None:
    """Two that have seen the same are two: the end of one must not be that of the other."""
    world = a_world(tmp_path)
    ledger = world.gateway.ledger
    with ledger.watch() as first:
        with ledger.watch() as second:
            pass
        do(world.gateway, "create", public_key=a_key(1))
    do(world.gateway, "create", public_key=a_key(2))
    assert (first, second) == ({a_key(1)}, set())
    world.close()


def test_what_expiry_changed_while_it_compared_is_renewed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway's own timers are nobody else: an element that renews a peer is not dropped."""
    world = a_world(tmp_path)
    soon, later = int(NOON) + 100, int(NOON) + 10_000
    sync(world, [{"public_key": a_key(n), "expires_at": soon} for n in range(50)])

    def expire() -> None:
        world.now = NOON + 200
        world.gateway.limits.expire()
        assert world.gateway.run(lambda: world.store.counts.peers["wg0", "suspended"]) == 50

    behind_comparing(monkeypatch, expire)
    result = sync(world, [{"public_key": a_key(n), "expires_at": later} for n in range(50)])
    assert result == (0, 50, 0, 0)
    assert {(p.status, p.expires_at) for p in state(world)[0]} == {("active", later)}
    world.close()


@pytest.mark.parametrize("single", [*SINGLE, "create"])
def test_a_change_of_the_same_peer_waits_and_is_decided_behind_a_desired_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, single: str
) -> None:
    world = a_world(tmp_path)
    sync(world, [{"public_key": a_key(n)} for n in range(4)])
    rule, fields = {**SINGLE, "create": ("create", {})}[single]
    answers: list[wggw.Outcome] = []

    def change() -> None:
        answers.append(do(world.gateway, rule, public_key=a_key(0), **fields))

    before_landing(monkeypatch, change)
    kept = [] if single == "create" else [{"public_key": a_key(0), "quota_bytes": 6}]
    sync(world, [*kept, *({"public_key": a_key(n)} for n in range(1, 4))])
    wait_for(lambda: answers)
    [answer] = answers
    assert answer.peer.quota_bytes == (None if single == "create" else 6)
    rows = {peer.public_key: peer for peer in state(world)[0]}
    assert (a_key(0) in rows) == (single not in ("delete", "rotate"))
    world.close()


def test_changes_of_other_peers_just_happen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = a_world(tmp_path)
    sync(world, [{"public_key": a_key(n)} for n in range(4)])
    compared, go_on = threading.Event(), threading.Event()
    fill = wggw.Bulk.land

    def land(bulk: wggw.Bulk) -> None:
        monkeypatch.undo()
        compared.set()
        assert go_on.wait(30)
        fill(bulk)

    monkeypatch.setattr(wggw.Bulk, "land", land)
    elements = [{"public_key": a_key(n), **({"dns": "d2"} if n < 2 else {})} for n in range(4)]
    worker = threading.Thread(target=sync, args=(world, elements), daemon=True)
    worker.start()
    assert compared.wait(30)
    waiting = submit(world.gateway, "delete", public_key=a_key(0))
    do(world.gateway, "set_status", public_key=a_key(2), status="suspended")
    do(world.gateway, "delete", public_key=a_key(3))
    do(world.gateway, "create", public_key=a_key("new"))
    go_on.set()
    worker.join(30)
    assert waiting().peer.dns == "d2"
    rows = {peer.public_key: peer for peer in state(world)[0]}
    assert rows.keys() == {a_key(1), a_key(2), a_key("new")}
    assert (rows[a_key(1)].dns, rows[a_key(2)].status) == ("d2", "suspended")
    world.close()


def test_an_export_amid_a_desired_state_is_the_state_before_or_behind_it(tmp_path: Path) -> None:
    world = a_world(tmp_path)
    first, second = before_and_after()
    sync(world, first)
    before = peers(world)
    entered, go_on = threading.Event(), threading.Event()

    def hold(kind: str) -> None:
        if kind == "apply":
            entered.set()
            assert go_on.wait(30)

    world.backend.faults.before = hold
    worker = threading.Thread(target=sync, args=(world, second), daemon=True)
    worker.start()
    assert entered.wait(30)
    assert wggw.open_state(world.gateway.export()).peers_after(0, 10**6) == before
    go_on.set()
    worker.join(30)
    exported = wggw.open_state(world.gateway.export()).peers_after(0, 10**6)
    assert exported == peers(world) != before
    world.close()


@pytest.mark.long
def test_readers_see_every_peer_while_thousands_change(tmp_path: Path) -> None:
    world = a_world(tmp_path)
    base = [{"public_key": a_key(n)} for n in range(3000)]
    sync(world, base)
    ended, missed = threading.Event(), []

    def read() -> None:
        dice = random.Random(3)
        while not ended.is_set():
            key = a_key(dice.randrange(3000))
            try:
                world.gateway.run(lambda k=key: peer_of(world.gateway, k))
            except wggw.NotFound:
                missed.append(key)
            total = world.gateway.run(world.store.counts.total)
            if total != 3000:
                missed.append(str(total))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    for turn in range(4):
        sync(world, [{**e, "dns": f"d{turn % 3 + 1}"} for e in base])
    ended.set()
    reader.join(30)
    assert missed == []
    world.close()


@pytest.mark.parametrize("full", [False, True], ids=["fresh ones left", "all used before"])
def test_a_dry_run_and_a_refusal_do_not_change_which_addresses_come_next(
    tmp_path: Path, full: bool
) -> None:
    world = a_world(tmp_path, "10.0.0.0/29")
    for number in range(5 if full else 2):
        do(world.gateway, "create", public_key=a_key(number))
    for number in (0, 1, 2) if full else (0, 1):
        do(world.gateway, "delete", public_key=a_key(number))
    before = state(world)
    elements = [{"public_key": peer.public_key} for peer in before[0]]
    elements += [{"public_key": a_key(n)} for n in (7, 8)]
    sync(world, elements, dry_run=True)
    assert state(world) == before
    with pytest.raises(wggw.Unavailable, match="exhausted"):
        sync(world, [*elements, *({"public_key": a_key(n)} for n in range(20, 25))])
    assert state(world) == before
    world.close()


def test_a_family_that_is_not_there_is_blamed_on_the_field_that_names_it(tmp_path: Path) -> None:
    world = build(tmp_path, WG_IPV6_SUBNET="")
    do(world.gateway, "create", public_key=a_key(1))
    named: list[tuple[str, dict[str, Any]]] = [
        ("protocol", {"protocol": "dual"}),
        ("tunnel_traffic", {"tunnel_traffic": ["ipv6"]}),
        ("assigned_ipv6", {"assigned_ipv6": "fd42::7"}),
    ]
    for field, fields in named:
        for key in (a_key(1), a_key("new")):
            with pytest.raises(wggw.Invalid) as caught:
                sync(world, [{"public_key": key, **fields}])
            assert caught.value.detail.startswith(f"line: {field}: wg0 has no ipv6")
    world.close()


@pytest.mark.parametrize(
    ("made", "element", "traffic"),
    [
        ({}, {"protocol": "dual"}, "ipv4,ipv6"),
        ({}, {"assigned_ipv6": "fd42:4242:1::7"}, "ipv4,ipv6"),
        ({}, {"protocol": "dual", "tunnel_traffic": ["ipv4"]}, "ipv4"),
        ({"protocol": "dual", "tunnel_traffic": ["ipv4"]}, {"protocol": "dual"}, "ipv4"),
    ],
)
@pytest.mark.parametrize("how", ["desired state", "update"])
def test_a_family_that_a_known_peer_gets_is_in_the_tunnel_if_all_former_ones_were(
    tmp_path: Path, made: dict[str, Any], element: dict[str, Any], traffic: str, how: str
) -> None:
    """As with an update; a second time nothing changes."""
    world = build(tmp_path)
    do(world.gateway, "create", public_key=a_key(1), **made)
    if how == "update":
        do(world.gateway, "update", public_key=a_key(1), **element)
    else:
        sync(world, [{"public_key": a_key(1), **element}])
    assert sync(world, [{"public_key": a_key(1), **element}]).unchanged == 1
    peer = peer_of(world.gateway, a_key(1))
    assert peer.assigned_ipv6 and peer.tunnel_traffic == traffic
    world.close()


def test_a_known_peer_of_the_other_kind_of_interface_is_refused_by_name(tmp_path: Path) -> None:
    """What a list shows is accepted."""
    awg = {"AWG_INTERFACE": "awg0", "AWG_PORT": "51821", "AWG_IPV4_SUBNET": "10.9.0.0/24"}
    world = build(tmp_path, **awg)
    asked = {n: wggw.ObfuscationRequest(bool(n), {}) for n in range(2)}
    for number in range(2):
        do(world.gateway, "create", public_key=a_key(number), obfuscation=asked[number])
    shown = [world.shown(a_key(number)) for number in range(2)]
    parsed = [wggw.parse_fields(one, wggw.SYNC_FIELDS, wggw.CONFIGURATION_SQL) for one in shown]
    assert sync(world, parsed).unchanged == 2
    for number in range(2):
        other = {**parsed[number], "obfuscation": asked[1 - number]}
        with pytest.raises(wggw.Conflict, match="obfuscation: the peer is on"):
            sync(world, [other, parsed[1 - number]])
    world.close()


def test_a_defect_leaves_nothing_marked_or_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = a_world(tmp_path)
    first, second = before_and_after()
    sync(world, first)
    before = state(world)

    def defect(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(wggw.Bulk, "land", defect)
        with pytest.raises(MemoryError):
            sync(world, second)
    assert state(world) == before
    assert sync(world, second).created == 40
    world.close()


PEERS = 60000 if LONG else 5000


@pytest.mark.timeout(600)
@pytest.mark.long
def test_the_rows_are_never_held_long(tmp_path: Path) -> None:
    """Peers made, left, turned and deleted; 60,000 with WGGW_LONG=1.

    The holds are measured in the thread's own time: others take the processor meanwhile.
    """
    gc.collect()
    gc.freeze()  # what other tests left in this process is no gateway's
    world = a_world(tmp_path)
    holds: list[float] = []
    gateway, run = world.gateway, world.gateway.run

    def timed(function: Callable[[], Any], /) -> Any:
        def work() -> Any:
            began = time.thread_time()
            result = function()
            holds.append(time.thread_time() - began)
            return result

        return run(work)

    gateway.run = gateway.ledger.run = gateway.lander._run = timed
    base: Elements = [
        {"public_key": a_key(n), "assigned_ip": f"10.1.{n // 250}.{n % 250 + 2}"}
        for n in range(PEERS)
    ]
    turned = [
        {**e, "assigned_ip": base[(n + 1) % len(base)]["assigned_ip"]} for n, e in enumerate(base)
    ]
    other = [{**e, "dns": "d2"} for e in turned]
    states: list[tuple[str, Elements, float]] = [
        ("new", base, 0.05),
        ("same", base, 0.05),
        ("all trade addresses", turned, 9.0),  # then they change at once: see Store._trade()
        ("changed", other, 0.05),
        ("none", [], 0.05),
    ]
    for name, elements, limit in states:
        holds.clear()
        started, used = time.monotonic(), time.process_time()
        print(name, sync(world, elements), f"{time.monotonic() - started:.2f} s", end=" ")
        print(f"CPU {time.process_time() - used:.2f} s, longest hold {max(holds) * 1000:.1f} ms")
        assert max(holds) < limit, name
    world.close()
