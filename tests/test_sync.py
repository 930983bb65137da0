"""The desired state: PUT of all peers at once, whole or not at all."""

from __future__ import annotations

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
from harness import API_KEY, LONG, Client, GatewayProcess, a_key, encode, running, sign

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
        drop = ("created_at", "server_public_key")
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
    client: Client, status: int, detail: str, body: bytes
) -> None:
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
def test_arrays_are_read_strictly(client: Client, body: bytes) -> None:
    answer = client.send("PUT", PATH, body)
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


class Faulty(wggw.MemoryBackend):
    """Fails the Nth apply() from now on, once or for good."""

    def __init__(self) -> None:
        super().__init__()
        self.countdown, self.for_good = -1, False

    def apply(self, changes: Sequence[wggw.Change]) -> None:
        if self.countdown == 0:
            self.countdown = 0 if self.for_good else -1
            raise wggw.BackendError("the interface is broken")
        self.countdown -= self.countdown > 0
        super().apply(changes)


class FaultyDisk(wggw.Disk):
    """Fails the Nth fsync from now on, and every one after it until mended."""

    def __init__(self) -> None:
        self.countdown = -1

    def fsync(self, handle: int) -> None:
        if self.countdown == 0:
            raise OSError(5, "Input/output error")
        self.countdown -= self.countdown > 0
        super().fsync(handle)


class Box:
    """A gateway in this process: memory backend, real files, no server."""

    def __init__(self, directory: Path, subnet: str = "10.0.0.0/8") -> None:
        self.backend, self.disk = Faulty(), FaultyDisk()
        environment = {
            "GATEWAY_API_KEY": API_KEY,
            "WG_IPV4_SUBNET": subnet,
            "DB_PATH": str(directory / "wireguard.db"),
            "WG_BACKEND": "memory",
        }
        self.config = wggw.load_config(environment)
        self.store = wggw.Store(self.config.db_path, "commit", self.disk)
        self.store.recover()
        self.gateway = wggw.Gateway(self.config, self.store, time.time)
        settings = wggw.interface_settings(self.config)[0]
        self.gateway.start([(settings, wggw.make_link(settings, b"k" * 32), self.backend)])

    def sync(self, elements: Sequence[dict[str, Any]]) -> wggw.DesiredResult:
        desired = {e["public_key"]: wggw.Desired("line", e) for e in elements}
        return self.gateway.sync(desired, False, True)

    def state(self) -> tuple[list[wggw.Peer], set[wggw.WirePeer], int]:
        """Rows, the interface, addresses used; checked against each other."""
        rows = self.store.peers_after(0, 10**6)
        wire = {s.peer for s in self.backend.read()}
        self.gateway.sample()  # takes parked keys away
        wire = {s.peer for s in self.backend.read()}
        assert wire == {wggw.wire_peer(p) for p in rows if p.status == "active"}
        pool = self.gateway.interfaces["wg0"].pools["ipv4"]
        held = [p.assigned_ip for p in rows if p.assigned_ip]
        assert pool.used == len(held)
        assert not any(pool.is_free(address) for address in held)
        return rows, wire, pool.used


def test_an_address_that_a_peer_left_for_another_is_a_released_one_after_a_restart_too(
    tmp_path: Path,
) -> None:
    upcoming: list[str | None] = []
    for place in range(2):
        box = Box(tmp_path, "10.0.0.0/28")
        if place == 0:
            box.gateway.create({"public_key": a_key(1)})
            box.sync([{"public_key": a_key(1), "assigned_ip": "10.0.0.9"}])
        upcoming.append(box.gateway.interfaces["wg0"].pools["ipv4"].peek())
        box.store.close()
    assert upcoming == ["10.0.0.3", "10.0.0.3"]


def before_and_after() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Two states that differ in every way: new, gone, changed and swapped peers."""
    first = [{"public_key": a_key(n), "assigned_ip": f"10.1.0.{n + 2}"} for n in range(200)]
    second = [
        {
            "public_key": a_key(n),
            "assigned_ip": f"10.1.0.{2 + (n - 100) % 150 if n >= 100 else 210}",
        }
        for n in range(100, 240)
    ]
    for n, element in enumerate(second):
        element["status"] = "suspended" if n % 7 == 0 else "active"
    return first, second


def test_a_failing_interface_undoes_everything(tmp_path: Path) -> None:
    box = Box(tmp_path)
    first, second = before_and_after()
    box.sync(first)
    before = box.state()
    failures = 0
    for step in range(40):
        box.backend.countdown = step
        try:
            box.sync(second)
            break
        except wggw.Unavailable:
            failures += 1
            box.gateway.supervise()
            assert box.state() == before, step
    assert failures > 3
    box.backend.countdown = -1
    assert len(box.state()[0]) == len(second)
    box.gateway.close()


def test_an_interface_that_stays_broken_is_repaired_to_the_state_before(tmp_path: Path) -> None:
    box = Box(tmp_path)
    first, second = before_and_after()
    box.sync(first)
    before = box.state()
    box.backend.countdown, box.backend.for_good = 2, True
    with pytest.raises(wggw.Unavailable):
        box.sync(second)
    assert box.gateway.degraded()
    box.backend.countdown = -1
    box.gateway.supervise()
    assert box.state() == before and not box.gateway.degraded()
    box.gateway.close()


def test_a_failing_disk_undoes_everything(tmp_path: Path) -> None:
    box = Box(tmp_path)
    first, second = before_and_after()
    box.sync(first)
    before = box.state()
    for step in range(10):
        box.disk.countdown = step
        try:
            box.sync(second)
        except wggw.Unavailable:
            assert box.store.peers_after(0, 10**6) == before[0]
            box.disk.countdown = -1
            box.gateway.heal()
            assert box.state() == before and not box.gateway.degraded()
        else:
            break
    assert step >= 1
    box.disk.countdown = -1
    rows = box.store.peers_after(0, 10**6)
    again = wggw.Store(box.config.db_path, "commit", wggw.Disk())
    again.load()
    assert again.peers_after(0, 10**6) == rows


def test_every_prefix_of_the_journal_has_all_of_it_or_nothing(tmp_path: Path) -> None:
    box = Box(tmp_path)
    first, second = before_and_after()
    box.sync(first)
    before = box.state()[0]
    box.sync(second)
    after = box.state()[0]
    journal = Path(box.config.db_path + ".journal")
    data = journal.read_bytes()
    ends = [n + 1 for n in range(len(data)) if data[n : n + 1] == b"\n"]
    seen: list[int] = []
    for end in ends[1:]:
        journal.write_bytes(data[:end])
        store = wggw.Store(box.config.db_path, "commit", wggw.Disk())
        store.load()
        rows = store.peers_after(0, 10**6)
        assert rows in ([], before, after), end
        seen.append(len(rows))
    assert sorted(set(seen)) == sorted({0, len(before), len(after)})


def test_a_snapshot_after_an_undone_start_is_whole(tmp_path: Path) -> None:
    box = Box(tmp_path)
    first, second = before_and_after()
    box.sync(first)
    before = box.state()[0]
    box.sync(second)
    journal = Path(box.config.db_path + ".journal")
    ends = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(ends[:-1]))  # all of it but the end
    for _ in range(2):
        store = wggw.Store(box.config.db_path, "commit", wggw.Disk())
        store.recover()
        assert store.peers_after(0, 10**6) == before
        store.close()


def between_parts(
    box: Box, monkeypatch: pytest.MonkeyPatch, after: int, work: Callable[[], object]
) -> list[object]:
    """Calls work() once, when the first `after` parts are done; a list with what it returned."""
    parts, results = [0], list[object]()
    do_part, sleep = box.gateway._do_part, time.sleep

    def counted(steps: Sequence[wggw.Step]) -> list[wggw.Undo]:
        parts[0] += 1
        return do_part(steps)

    def breath(seconds: float) -> None:
        if parts[0] == after and not results:
            results.append(None)  # work() may sleep, too
            results[0] = work()
        sleep(seconds)

    monkeypatch.setattr(box.gateway, "_do_part", counted)
    monkeypatch.setattr(time, "sleep", breath)
    return results


@pytest.mark.parametrize("change", ["patch", "suspend", "rotate"])
def test_a_peer_that_swaps_addresses_and_is_changed_meanwhile_gets_its_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    box = Box(tmp_path)
    first = [{"public_key": a_key(n), "assigned_ip": f"10.1.0.{n + 2}"} for n in range(2)]
    box.sync(first)
    changes: dict[str, Callable[[], object]] = {
        "patch": lambda: box.gateway.update(a_key(0), {"dns": "d2"}),
        "suspend": lambda: box.gateway.set_status(a_key(0), "suspended"),
        "rotate": lambda: box.gateway.rotate(a_key(0), a_key("new")),
    }
    assert between_parts(box, monkeypatch, 1, changes[change]) == []
    box.sync([{**e, "assigned_ip": f"10.1.0.{3 - n}"} for n, e in enumerate(first)])
    peers = box.state()[0]
    assert [peer.assigned_ip for peer in peers] == ["10.1.0.3", "10.1.0.2"]
    zero = peers[0]
    assert (zero.dns, zero.status, zero.public_key) in {
        "patch": [("d2", "active", a_key(0))],
        "suspend": [("d1", "suspended", a_key(0))],
        "rotate": [("d1", "active", a_key("new"))],
    }[change]
    box.gateway.close()


def test_an_export_shows_a_desired_state_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Box(tmp_path)
    first, second = before_and_after()
    box.sync(first)
    exports: list[bytes] = []

    def export() -> threading.Thread:
        thread = threading.Thread(target=lambda: exports.append(box.gateway.export()))
        thread.start()
        thread.join(0.3)
        return thread

    started = between_parts(box, monkeypatch, 2, export)
    box.sync(second)
    (thread,) = started
    assert isinstance(thread, threading.Thread)
    thread.join(30)
    rows = box.store.read_image(exports[0]).peers_after(0, 10**6)
    assert rows == box.store.peers_after(0, 10**6)
    box.gateway.close()


@pytest.mark.parametrize("full", [False, True], ids=["fresh ones left", "all used before"])
def test_a_dry_run_and_a_refusal_do_not_change_which_addresses_come_next(
    tmp_path: Path, full: bool
) -> None:
    box = Box(tmp_path, "10.0.0.0/29")
    for number in range(5 if full else 2):
        box.gateway.create({"public_key": a_key(number)})
    for number in (0, 1, 2) if full else (0, 1):
        box.gateway.delete(a_key(number))
    pool = box.gateway.interfaces["wg0"].pools["ipv4"]
    before = list(pool.upcoming())
    kept = [{"public_key": peer.public_key} for peer in box.store.peers_after(0, 9)]
    elements = [*kept, *({"public_key": a_key(n)} for n in (7, 8))]
    box.gateway.sync({e["public_key"]: wggw.Desired("line", e) for e in elements}, True, True)
    assert list(pool.upcoming()) == before
    with pytest.raises(wggw.Unavailable, match="exhausted"):
        box.sync([*elements, *({"public_key": a_key(n)} for n in range(20, 25))])
    assert list(pool.upcoming()) == before
    box.gateway.close()


def test_a_disk_fault_gives_an_address_back_that_a_desired_state_reserved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A DELETE waits for the disk, a desired state reserves what it freed, the disk fails."""
    box = Box(tmp_path, "10.0.0.0/29")
    for number in range(5):
        box.gateway.create({"public_key": a_key(number)})
    before = box.state()[0]
    entered, broken, planned = threading.Event(), threading.Event(), threading.Event()

    def fsync(handle: int) -> None:
        entered.set()
        broken.wait(30)
        raise OSError(5, "Input/output error")

    plan = box.gateway._plan

    def planning(desired: dict[str, wggw.Desired]) -> wggw.Plan:
        made = plan(desired)
        planned.set()
        return made

    monkeypatch.setattr(box.disk, "fsync", fsync)
    monkeypatch.setattr(box.gateway, "_plan", planning)
    refused: list[str] = []

    def refusal(work: Callable[[], object]) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except wggw.Unavailable as error:
                refused.append(error.detail)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    threads = [refusal(lambda: box.gateway.delete(a_key(0)))]
    assert entered.wait(30)
    elements = [{"public_key": a_key(number)} for number in (1, 2, 3, 4, 9)]
    threads.append(refusal(lambda: box.sync(elements)))
    assert planned.wait(30)
    broken.set()
    for thread in threads:
        thread.join(30)
    assert len(refused) == 2
    monkeypatch.undo()
    box.gateway.heal()
    assert box.state()[0] == before and not box.gateway.degraded()
    with pytest.raises(wggw.Unavailable, match="exhausted"):
        box.gateway.create({"public_key": a_key(50)})
    box.gateway.delete(a_key(1))
    assert box.gateway.create({"public_key": a_key(51)}).peer.assigned_ip == before[1].assigned_ip
    box.gateway.close()


def test_what_peers_of_a_failed_desired_state_need_back_goes_to_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of those that swap is deleted when it has another's address."""
    box = Box(tmp_path)
    first = [{"public_key": a_key(n), "assigned_ip": f"10.1.0.{n + 2}"} for n in range(60)]
    box.sync(first)
    turned = [{**e, "assigned_ip": f"10.1.0.{(n + 1) % 60 + 2}"} for n, e in enumerate(first)]

    def work() -> None:
        assert box.gateway.delete(a_key(0)).peer.assigned_ip == "10.1.0.3"
        with pytest.raises(wggw.Conflict, match="not free"):
            box.gateway.create({"public_key": a_key("other"), "assigned_ip": "10.1.0.3"})
        box.backend.countdown = 0

    # Parts begin with 50 peers: two in which addresses are let go of, and two that give new ones.
    started = between_parts(box, monkeypatch, 3, work)
    with pytest.raises(wggw.Unavailable):
        box.sync(turned)
    assert started
    peers = box.state()[0]
    assert [p.assigned_ip for p in peers] == [e["assigned_ip"] for e in first[1:]]
    box.gateway.close()


def test_no_change_is_promised_to_a_peer_that_may_be_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Box(tmp_path)
    key = a_key(0)
    changes: list[Callable[[], object]] = [
        lambda: box.gateway.set_status(key, "suspended"),
        lambda: box.gateway.update(key, {"dns": "d2"}),
        lambda: box.gateway.rotate(key, a_key("new")),
        lambda: box.gateway.delete(key),
        lambda: box.gateway.create({"public_key": key}),
    ]

    def work() -> None:
        assert box.gateway.get(key).peer.public_key == key  # readers see parts
        for change in changes:
            with pytest.raises(wggw.Unavailable, match="not done yet"):
                change()

    started = between_parts(box, monkeypatch, 1, work)
    box.sync([{"public_key": a_key(n)} for n in range(100)])
    assert started
    assert changes[0]()
    box.gateway.close()


def test_a_family_that_is_not_there_is_blamed_on_the_field_that_names_it(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.gateway.create({"public_key": a_key(1)})
    box.gateway.interfaces["wg0"].pools.pop("ipv6")  # type: ignore[attr-defined]
    named: list[tuple[str, dict[str, Any]]] = [
        ("protocol", {"protocol": "dual"}),
        ("tunnel_traffic", {"tunnel_traffic": ["ipv6"]}),
        ("assigned_ipv6", {"assigned_ipv6": "fd42::7"}),
    ]
    for field, fields in named:
        for key in (a_key(1), a_key("new")):
            with pytest.raises(wggw.Invalid, match=f"^{field}: wg0 has no ipv6"):
                box.sync([{"public_key": key, **fields}])
    box.gateway.close()


def test_a_disk_fault_undoes_parts_and_others_changes_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A DELETE between parts frees an address, a part gives it away, the disk has neither."""
    box = Box(tmp_path)
    first = [{"public_key": a_key(n), "assigned_ip": f"10.1.0.{n + 2}"} for n in range(60)]
    box.sync(first)
    before = box.state()
    turned = [{**e, "assigned_ip": f"10.1.0.{(n + 1) % 60 + 2}"} for n, e in enumerate(first)]
    entered, broken = threading.Event(), threading.Event()
    refused: list[str] = []

    def fsync(handle: int) -> None:
        entered.set()
        broken.wait(30)
        raise OSError(5, "Input/output error")

    def delete() -> None:
        try:
            box.gateway.delete(a_key(55))  # in the second part of those that let go
        except wggw.Unavailable as error:
            refused.append(error.detail)

    def work() -> threading.Thread:
        monkeypatch.setattr(box.disk, "fsync", fsync)
        thread = threading.Thread(target=delete)
        thread.start()
        assert entered.wait(30)
        return thread

    end_sync = box.store.end_sync

    def end() -> int:
        broken.set()
        return end_sync()

    monkeypatch.setattr(box.store, "end_sync", end)
    started = between_parts(box, monkeypatch, 1, work)
    with pytest.raises(wggw.Unavailable):
        box.sync(turned)
    (thread,) = started
    assert isinstance(thread, threading.Thread)
    thread.join(30)
    monkeypatch.undo()
    assert len(refused) == 1
    box.gateway.heal()
    assert box.state() == before and not box.gateway.degraded()
    box.gateway.close()


def test_a_defect_takes_a_desired_state_back_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Box(tmp_path)
    elements = [{"public_key": a_key(n)} for n in range(300)]
    box.sync(elements)
    before = box.state()

    def defect() -> None:
        raise MemoryError

    started = between_parts(box, monkeypatch, 1, defect)
    with pytest.raises(MemoryError):
        box.sync([{**e, "dns": "d3"} for e in elements])
    assert started
    monkeypatch.undo()
    assert box.state() == before
    box.gateway.close()


def in_turn(work: Callable[[int], None], enough: threading.Event) -> threading.Thread:
    """Calls work(0), work(1), ... in a thread of its own until it is enough."""

    def run() -> None:
        number = 0
        while not enough.is_set():
            work(number)
            number += 1

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_rows_interface_and_pools_agree_whatever_others_change_meanwhile(tmp_path: Path) -> None:
    box = Box(tmp_path)
    base = [{"public_key": a_key(n)} for n in range(1500)]
    box.sync(base)
    done: set[str] = set()
    dice = random.Random(1)

    def work(number: int) -> None:
        key = a_key(dice.randrange(1500))
        try:
            choice = dice.randrange(3)
            if choice == 0:
                box.gateway.set_status(key, "suspended")
                done.add(key)
            elif choice == 1:
                box.gateway.delete(key)
                done.add(key)
            else:
                box.gateway.create({"public_key": a_key(("new", number))})
                done.add(a_key(("new", number)))
        except wggw.NotFound:
            pass

    enough = threading.Event()
    other = in_turn(work, enough)
    try:
        for turn in itertools.count():
            box.sync([{**e, "dns": f"d{1 + turn % 3}"} for e in base[: 1500 - turn]])
            if turn >= 3 and len(done) > 20:
                break
    finally:
        enough.set()
        other.join()
    rows = {p.public_key: p for p in box.state()[0]}
    assert rows.keys() <= done | {e["public_key"] for e in base}
    box.gateway.close()


def test_the_last_single_change_during_one_sync_wins(tmp_path: Path) -> None:
    """Deterministic: a change comes in between two parts."""
    box = Box(tmp_path)
    base = [{"public_key": a_key(n)} for n in range(300)]
    box.sync(base)
    late = a_key(299)
    real = box.gateway._do_part
    state = {"done": False}

    def part(steps: Sequence[wggw.Step]) -> list[wggw.Undo]:
        entries = real(steps)
        if not state["done"]:
            state["done"] = True
            threads = [
                threading.Thread(target=box.gateway.set_status, args=(late, "suspended")),
                threading.Thread(target=box.gateway.create, args=({"public_key": a_key("x")},)),
                threading.Thread(target=box.gateway.delete, args=(a_key(298),)),
            ]
            for thread in threads:
                thread.start()
            state["threads"] = threads
        return entries

    box.gateway._do_part = part  # type: ignore[method-assign]
    box.sync([{**e, "dns": "d2"} for e in base])
    for thread in state["threads"]:  # type: ignore[attr-defined]
        thread.join()
    rows = {p.public_key: p for p in box.state()[0]}
    assert (rows[late].status, a_key(298) in rows, a_key("x") in rows) == ("suspended", False, True)
    assert rows[a_key(0)].dns == "d2"
    box.gateway.close()


def test_a_killed_gateway_has_all_of_it_or_nothing(tmp_path: Path) -> None:
    gateway = GatewayProcess(tmp_path, WG_IPV4_SUBNET="10.0.0.0/8")
    body = lines([{"public_key": a_key(("k", n))} for n in range(4000)])
    try:
        for delay in (0.1, 0.2, 0.35):
            gateway.start()
            client = gateway.client()
            client.create(a_key("old"))
            kind = {"Content-Type": "application/x-ndjson"}
            sender = threading.Thread(target=_ignoring, args=(gateway.client(), body, kind))
            sender.start()
            time.sleep(delay)
            gateway.kill()
            sender.join()
            gateway.start()
            total = gateway.client().send("GET", "/api/v1/server/status").json["total_peers"]
            assert total in (1, 4000), total
            gateway.stop()
    finally:
        gateway.close()


def _ignoring(client: Client, body: bytes, kind: dict[str, str]) -> None:
    try:
        client.send("PUT", PATH + "?allow_mass_delete=true", body, **kind)
    except Exception:
        pass


PEERS = 60000 if LONG else 5000


@pytest.mark.timeout(600)
def test_the_lock_is_never_held_long(tmp_path: Path) -> None:
    """Peers made, left, turned and deleted; 60,000 with WGGW_LONG=1.

    The holds are measured in the thread's own time: others take the processor meanwhile.
    """
    gc.collect()
    gc.freeze()  # what other tests left in this process is no gateway's
    box = Box(tmp_path)
    lock = Timed()
    box.gateway.lock = lock  # type: ignore[assignment]
    base = [
        {"public_key": a_key(n), "assigned_ip": f"10.1.{n // 250}.{n % 250 + 2}"}
        for n in range(PEERS)
    ]
    turned = [
        {**e, "assigned_ip": base[(n + 1) % len(base)]["assigned_ip"]} for n, e in enumerate(base)
    ]
    for name, elements in (("new", base), ("same", base), ("turned", turned), ("none", [])):
        started, used = time.monotonic(), time.process_time()
        print(name, box.sync(elements), f"{time.monotonic() - started:.2f} s", end=" ")
        print(f"CPU {time.process_time() - used:.2f} s, longest hold {lock.longest * 1000:.1f} ms")
    gc.unfreeze()
    assert lock.longest < 0.05


class Timed:
    """A lock that knows how long it was held at most."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.longest = 0.0

    def __enter__(self) -> None:
        self._lock.acquire()
        self._began = time.thread_time()

    def __exit__(self, *_: Any) -> None:
        self.longest = max(self.longest, time.thread_time() - self._began)
        self._lock.release()


def test_what_a_desired_state_took_away_is_gone_from_a_large_interface_at_its_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wggw, "SWEEP_PEERS", 0)
    box = Box(tmp_path)
    box.sync([{"public_key": a_key(n)} for n in range(20)])
    box.sync([{"public_key": a_key(n)} for n in range(5)])
    assert {wggw.encode_key(s.peer.public_key) for s in box.backend.read()} == {
        a_key(n) for n in range(5)
    }


def test_what_an_interface_kept_when_its_disk_failed_too_is_taken_away(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.disk.countdown, box.backend.countdown = 0, 1
    with pytest.raises(wggw.Unavailable):
        box.gateway.create({"public_key": a_key(1)})
    box.disk.countdown = box.backend.countdown = -1
    box.gateway.supervise()
    box.gateway.heal()
    assert box.state() == ([], set(), 0)
    assert not box.gateway.degraded()


def test_parts_that_an_interface_kept_are_taken_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wggw, "MAX_PART", 50)
    box = Box(tmp_path)
    box.backend.countdown, box.backend.for_good = 2, True
    with pytest.raises(wggw.Unavailable):
        box.sync([{"public_key": a_key(number)} for number in range(200)])
    assert box.backend.read()
    box.backend.countdown, box.backend.for_good = -1, False
    box.gateway.supervise()
    assert box.state() == ([], set(), 0)
