"""Export and import: the whole state moves, all of it or nothing, and the interface follows."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import World, build, do, peer_of, submit, traffic_of
from harness import API_KEY, LONG, Answer, GatewayProcess, a_key, running, some, wait_for
from test_restart import change_all_sorts, state

import wggw

SNAPSHOT = "/api/v1/snapshot"
PEERS = "/api/v1/configurations/"
SECRET = "a key for what lies on disk"


@contextlib.contextmanager
def two(tmp_path: Path, **settings: str) -> Iterator[tuple[GatewayProcess, GatewayProcess]]:
    """Two gateways with the same settings and files of their own."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with running(tmp_path / "one", **settings) as one, running(tmp_path / "two", **settings) as two:
        yield one, two


def export(gateway: GatewayProcess) -> bytes:
    answer = gateway.client().send("GET", SNAPSHOT)
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/octet-stream"
    return answer.body


def import_(gateway: GatewayProcess, data: bytes) -> Answer:
    """Keeping the gateway's own key, which is not the one of the gateway that wrote the data."""
    headers = {"Content-Type": "application/octet-stream"}
    return gateway.client().send("PUT", f"{SNAPSHOT}?replace_key=false", data, **headers)


def check_in_line(gateway: GatewayProcess) -> None:
    synced = gateway.client().send("POST", "/api/v1/sync-ips").json
    assert (synced["added"], synced["updated"], synced["removed"]) == (0, 0, 0)
    active = gateway.client().send("GET", f"{PEERS}?limit=1000&status=active").json
    assert synced["unchanged"] == len(active["configurations"])


def without_own_key(shown: Any) -> Any:
    """Peers and pools without what belongs to the gateway itself."""
    peers, usage = shown
    own = ("server_public_key", "sequence")
    rows = [
        {name: value for name, value in row.items() if name not in own}
        for row in peers["configurations"]
    ]
    return rows, usage


# --- the whole state ------------------------------------------------------------------------------


FORMS = [{}, {"SNAPSHOT_KEY": SECRET}] if LONG else [{"SNAPSHOT_KEY": SECRET}]


@pytest.mark.parametrize("settings", FORMS)
def test_whole_state_moves_and_the_interface_follows(
    tmp_path: Path, settings: dict[str, str]
) -> None:
    with two(tmp_path, **settings) as (one, other):
        change_all_sorts(one)
        client = other.client()
        for number in (0, 1, "own"):  # peers that are there go, or change
            assert client.create(a_key(number), dns="d3").status == 200
        data = export(one)
        answer = import_(other, data)  # other keys, and 1 and "own" are deleted
        total = len(state(one)[0]["configurations"])
        said = {"status": "imported", "total_peers": total, "cut_off_peers": total + 2}
        assert (answer.status, answer.json) == (200, said)
        assert without_own_key(state(other)) == without_own_key(state(one))
        assert client.get(a_key("own")).status == 404
        check_in_line(other)
        other.kill()  # right behind the answer
        other.start()
        assert without_own_key(state(other)) == without_own_key(state(one))
        check_in_line(other)
        secret = other.client().create(a_key("psk")).json
        assert secret["status"] == "exists" and secret["dns"] == "d2"


def test_order_of_released_addresses_moves(tmp_path: Path) -> None:
    with two(tmp_path, WG_IPV4_SUBNET="10.7.0.8/29") as (one, other):
        client = one.client()
        for number in range(5):
            client.create(a_key(number))
        for number in (4, 0, 2):
            client.delete(a_key(number))
        assert import_(other, export(one)).status == 200
        for gateway in (one, other):
            made = [gateway.client().create(a_key(("new", n))).json for n in range(3)]
            assert [m["assigned_ip"] for m in made] == ["10.7.0.14", "10.7.0.10", "10.7.0.12"]


def test_import_of_the_own_export_is_the_state_of_then(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        change_all_sorts(gateway)
        before, data = state(gateway), export(gateway)
        client = gateway.client()
        client.create(a_key("later"))
        client.delete(a_key(4))
        client.status(a_key(0), "active")
        for _ in range(3):
            assert import_(gateway, data).status == 200
            assert without_own_key(state(gateway)) == without_own_key(before)
            check_in_line(gateway)
        gateway.stop()
        gateway.start()
        assert without_own_key(state(gateway)) == without_own_key(before)


def test_changes_go_on_behind_an_import(tmp_path: Path) -> None:
    """Numbers, ids and addresses fit together behind it, over a kill and a stop."""
    with two(tmp_path) as (one, other):
        change_all_sorts(one)
        for number in range(40):
            assert other.client().create(a_key(("old", number))).status == 200
        assert import_(other, export(one)).status == 200
        for end in (other.kill, other.stop):
            client = other.client()
            for number in range(5):
                assert client.create(a_key((end.__name__, number)), protocol="dual").status == 200
            assert client.delete(a_key((end.__name__, 0))).status == 200
            client.close()
            before = state(other)
            end()
            other.start()
            assert state(other) == before
            check_in_line(other)


def test_export_of_an_empty_gateway_empties_another(tmp_path: Path) -> None:
    with two(tmp_path) as (one, other):
        change_all_sorts(other)
        assert import_(other, export(one)).json["total_peers"] == 0
        assert state(other)[0]["configurations"] == []
        assert [u["used"] for u in state(other)[1].values() if isinstance(u, dict)] == [0, 0]
        check_in_line(other)


def test_exported_file_starts_a_gateway(tmp_path: Path) -> None:
    """An export is a snapshot: in place of DB_PATH it is the state as well."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with running(tmp_path / "one") as one:
        change_all_sorts(one)
        (tmp_path / "two" / "wireguard.db").write_bytes(export(one))
        with running(tmp_path / "two") as other:
            assert without_own_key(state(other)) == without_own_key(state(one))
            check_in_line(other)


# --- what is refused ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with running(tmp_path_factory.mktemp("victim")) as gateway:
        change_all_sorts(gateway)
        yield gateway


@pytest.fixture(scope="module")
def good(victim: GatewayProcess) -> bytes:
    return export(victim)


def check_refused(gateway: GatewayProcess, data: bytes, label: object = "") -> Answer:
    before = state(gateway)
    answer = import_(gateway, data)
    assert 400 <= answer.status < 500, (label, answer)
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert without_own_key(state(gateway)) == without_own_key(before)
    check_in_line(gateway)
    return answer


def test_what_is_no_snapshot_is_refused(victim: GatewayProcess, good: bytes) -> None:
    for data in (b"", b"x", b"{}", os.urandom(5000), good[:16], b"wggw-snapshot 1 ", good[::-1]):
        check_refused(victim, data)


def test_truncated_and_extended_snapshots_are_refused(victim: GatewayProcess, good: bytes) -> None:
    for length in (100, 511, 512, 4096, len(good) // 2, len(good) - 4096, len(good) - 1):
        check_refused(victim, good[:length], length)
    check_refused(victim, good + b"\0")
    check_refused(victim, good + good)


def test_flipped_bits_are_refused(victim: GatewayProcess, good: bytes) -> None:
    places = [*range(0, 100, 7), *range(100, len(good), len(good) // 40)]
    for position in some(places, 12):  # each byte of a file: test_journal.py
        data = good[:position] + bytes([good[position] ^ 0x10]) + good[position + 1 :]
        check_refused(victim, data, position)


def test_sealed_snapshot_needs_the_same_key(
    tmp_path: Path, victim: GatewayProcess, good: bytes
) -> None:
    sealed = b"".join(wggw.snapshot_parts(good, wggw.Vault("another key than that one")))
    assert "SNAPSHOT_KEY" in check_refused(victim, sealed).json["detail"]
    with running(tmp_path, SNAPSHOT_KEY=SECRET) as gateway:
        assert "SNAPSHOT_KEY" in check_refused(gateway, sealed).json["detail"]


def test_key_on_disk_can_be_changed(tmp_path: Path) -> None:
    """As docs/SECURITY.md says: from an unencrypted export, which the next start encrypts anew."""
    with running(tmp_path, SNAPSHOT_KEY=SECRET) as gateway:
        change_all_sorts(gateway)
        before = without_own_key(state(gateway))
        done = gateway.command("snapshot", "export", "--decrypt", "state.db")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "state.db").read_bytes().startswith(wggw.SQLITE_MAGIC)
        gateway.stop()
        (tmp_path / "old").mkdir()
        for path in tmp_path.glob("wireguard.db*"):
            path.rename(tmp_path / "old" / path.name)
        (tmp_path / "state.db").rename(tmp_path / "wireguard.db")
        gateway.settings["SNAPSHOT_KEY"] = "another key for what lies on disk"
        gateway.start()
        assert without_own_key(state(gateway)) == before
        for path in tmp_path.glob("wireguard.db*"):
            assert path.is_socket() or not path.read_bytes().startswith(wggw.SQLITE_MAGIC), path


def edited(image: bytes, tmp_path: Path, *statements: str) -> bytes:
    """The database changed by other hands, its checksum right all the same."""
    path = tmp_path / "edited.db"
    path.write_bytes(image)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = OFF")
        database.execute("PRAGMA ignore_check_constraints = ON")
        for statement in statements:
            database.execute(statement)
    return b"".join(wggw.snapshot_parts(path.read_bytes(), None))


ONE = "WHERE id = (SELECT min(id) FROM peers WHERE status = 'active')"
BAD = {
    "foreign schema": ("CREATE TABLE more (x)",),
    "missing table": ("DROP TABLE traffic",),
    "newer version": ("PRAGMA user_version = 9999",),
    "no version": ("PRAGMA user_version = 0",),
    "no number": ("DELETE FROM meta",),
    "number is no number": ("UPDATE meta SET value = 'x'",),
    "number below 0": ("UPDATE meta SET value = '-1'",),
    "number too large": (f"UPDATE meta SET value = '{2**63 - 1}'",),
    "short key": (f"UPDATE peers SET public_key = 'abc' {ONE}",),
    "key that is no text": (f"UPDATE peers SET public_key = x'00ff' {ONE}",),
    "key in another form": (f"UPDATE peers SET public_key = '{'A' * 42}B=' {ONE}",),
    "bad psk": (f"UPDATE peers SET preshared_key = 'x' {ONE}",),
    "address outside": (f"UPDATE peers SET assigned_ip = '192.0.2.1' {ONE}",),
    "the gateway's address": (f"UPDATE peers SET assigned_ip = '10.0.1.1' {ONE}",),
    "the network's address": (f"UPDATE peers SET assigned_ip = '10.0.1.0' {ONE}",),
    "the broadcast address": (f"UPDATE peers SET assigned_ip = '10.0.1.255' {ONE}",),
    "address that is none": (f"UPDATE peers SET assigned_ip = '10.0.1.x' {ONE}",),
    "address in another form": (f"UPDATE peers SET assigned_ipv6 = 'FD42:4242:1:0::9' {ONE}",),
    "address of the other family": (f"UPDATE peers SET assigned_ip = 'fd42:4242:1::99' {ONE}",),
    "IPv6 outside": (f"UPDATE peers SET assigned_ipv6 = 'fd00:9::9' {ONE}",),
    "IPv6 with a zone": (f"UPDATE peers SET assigned_ipv6 = 'fd42:4242:1::99%x' {ONE}",),
    "obfuscation too deep": (f"UPDATE peers SET obfuscation = '{'[' * 100_000}' {ONE}",),
    "other interface": (f"UPDATE peers SET interface = 'wg7' {ONE}",),
    "interface that is no text": (f"UPDATE peers SET interface = x'776730' {ONE}",),
    "unknown status": (f"UPDATE peers SET status = 'gone' {ONE}",),
    "traffic of no family": (f"UPDATE peers SET tunnel_traffic = '' {ONE}",),
    "unknown family": (f"UPDATE peers SET tunnel_traffic = 'ipv5' {ONE}",),
    "port that is no number": (f"UPDATE peers SET port = 'x' {ONE}",),
    "port too large": (f"UPDATE peers SET port = 70000 {ONE}",),
    "keepalive too large": (f"UPDATE peers SET persistent_keepalive = 70000 {ONE}",),
    "quota below 0": (f"UPDATE peers SET quota_bytes = -1 {ONE}",),
    "time that has no date": (f"UPDATE peers SET created_at = {2**62} {ONE}",),
    "expiry that has no date": (f"UPDATE peers SET expires_at = {2**62} {ONE}",),
    "dns that is no text": (f"UPDATE peers SET dns = x'ff' {ONE}",),
    "request_id that is no text": (f"UPDATE peers SET request_id = x'ff' {ONE}",),
    "status_reason that is no text": (f"UPDATE peers SET status_reason = x'ff' {ONE}",),
    "id below 1": (f"UPDATE peers SET id = -5 {ONE}",),
    "id at the end": (f"UPDATE peers SET id = {2**63 - 1} {ONE}",),
    "the same family twice": (f"UPDATE peers SET tunnel_traffic = 'ipv4,ipv4' {ONE}",),
    "families in another order": (f"UPDATE peers SET tunnel_traffic = 'ipv6,ipv4' {ONE}",),
    "released address that is none": ("INSERT INTO released (address) VALUES ('x')",),
    "released address in another form": ("INSERT INTO released (address) VALUES ('FD42::1')",),
    "released address with a zone": ("INSERT INTO released (address) VALUES ('fe80::1%x')",),
    "released address that is no text": ("INSERT INTO released (address) VALUES (167772161)",),
    "traffic that is no number": ("REPLACE INTO traffic SELECT id, 'x', 0, 0, 0, 0, 0 FROM peers",),
    "traffic below 0": ("REPLACE INTO traffic SELECT id, -5, 0, 0, 0, 0, 0 FROM peers",),
    "handshake that has no date": (
        f"REPLACE INTO traffic SELECT id, 0, 0, 0, 0, {2**62}, 0 FROM peers",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_rows_are_refused_and_change_nothing(
    victim: GatewayProcess, good: bytes, tmp_path: Path, kind: str
) -> None:
    check_refused(victim, edited(good, tmp_path, *BAD[kind]), kind)


def test_edited_snapshot_with_good_rows_is_taken(tmp_path: Path) -> None:
    """The way in which the bad ones are made is not what refuses them; traffic moves, too."""
    with running(tmp_path) as gateway:
        client = gateway.client()
        for number in range(3):
            client.create(a_key(number))
        data = edited(
            export(gateway),
            tmp_path,
            "REPLACE INTO traffic SELECT id, id * 100, id * 1000, 0, 0, 1765200000, 0 FROM peers",
            f"UPDATE peers SET assigned_ip = '10.0.1.200', dns = 'd2' {ONE}",
        )
        assert import_(gateway, data).status == 200
        shown = client.get(a_key(0)).json
        assert (shown["assigned_ip"], shown["dns"]) == ("10.0.1.200", "d2")
        for _ in range(2):
            rows = [gateway.client().get(a_key(number)).json for number in range(3)]
            assert [(r["rx_bytes"], r["tx_bytes"]) for r in rows] == [
                (100 * n, 1000 * n) for n in (1, 2, 3)
            ]
            assert rows[0]["last_handshake"] == "2025-12-08T13:20:00Z"
            gateway.kill()
            gateway.start()


def test_own_key_of_the_gateway_as_a_peer_is_refused(tmp_path: Path) -> None:
    """WireGuard ignores such a peer: it could never be in line."""
    with running(tmp_path) as gateway:
        own = gateway.client().create(a_key(1)).json["server_public_key"]
        data = edited(export(gateway), tmp_path, f"UPDATE peers SET public_key = '{own}' {ONE}")
        check_refused(gateway, data)


def test_import_without_a_signature_is_refused(victim: GatewayProcess, good: bytes) -> None:
    before = state(victim)
    assert victim.client().raw("PUT", SNAPSHOT, good, {}).status == 401
    assert victim.client().raw("GET", SNAPSHOT, b"", {}).status == 401
    assert state(victim) == before


# --- a disk that fails ----------------------------------------------------------------------------


def rows(world: World) -> list[Any]:
    """What is to be seen of peers and traffic, whoever counted on."""
    return [(peer, traffic._replace(rx_seen=0, tx_seen=0)) for peer, traffic in world.rows()]


def imported(world: World, data: bytes) -> bool:
    try:
        world.gateway.import_(data, replace_key=False)
    except (wggw.Unavailable, wggw.OutcomeUnknown):
        return False
    return True


def source(tmp_path: Path, **settings: str) -> tuple[bytes, list[Any]]:
    """An export, and the rows in it."""
    (tmp_path / "source").mkdir()
    world = build(tmp_path / "source", **settings)
    for number in range(3):
        do(world.gateway, "create", public_key=a_key(("new", number)))
    do(world.gateway, "set_status", public_key=a_key(("new", 1)), status="suspended")
    data, seen = world.gateway.export(), rows(world)
    world.close()
    return data, seen


# Of the disk alone: model/test_faults.py.
FAULTS: dict[str, Callable[[World, int], None]] = {
    "interface refuses": lambda w, n: w.backend.fail("apply", "setup", nth=n),
    "interface does half": lambda w, n: w.backend.fail("apply", "setup", nth=n, what="half"),
    "interface's answer is lost": lambda w, n: w.backend.fail("apply", nth=n, what="lost"),
    "both": lambda w, n: (w.backend.fail(nth=1), w.disk.fail(nth=n))[0],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_any_call_of_an_import_leaves_the_old_state(tmp_path: Path, fault: str) -> None:
    """Each time the gateway is healthy again by itself, and after a restart the state is that."""
    data, new = source(tmp_path)
    refused = 0
    for nth in range(1, 100):
        path = tmp_path / str(nth)
        path.mkdir()
        world = build(path)
        for number in range(5):
            do(world.gateway, "create", public_key=a_key(number))
        old = rows(world)
        hits = sum(faults.hits for faults in world.faults)
        FAULTS[fault](world, nth)
        done = imported(world, data)
        hit = sum(faults.hits for faults in world.faults) > hits
        for faults in world.faults:
            faults.heal()
        refused += not done
        assert rows(world) == (new if done else old), nth
        world.gateway.projection.supervise()
        world.gateway.lander.heal()
        assert world.gateway.degraded() == [], nth
        active = {peer.public_key for peer, _ in rows(world) if peer.status == "active"}
        assert world.backend.peers.keys() == active
        assert world.gateway.projection.reconcile()[:3] == (0, 0, 0)
        do(world.gateway, "create", public_key=a_key("after"))
        expected = rows(world)
        world.crash()
        world.open()
        assert rows(world) == expected, nth
        world.close()
        if not hit or (fault == "both" and nth > 5):
            assert done or fault == "both"
            assert refused
            return
    raise AssertionError("an import has no end")


def test_import_is_refused_while_the_disk_refuses_writes(tmp_path: Path) -> None:
    world = build(tmp_path)
    do(world.gateway, "create", public_key=a_key(1))
    data, before = world.gateway.export(), rows(world)
    world.disk.fail("write")
    with pytest.raises(wggw.Unavailable):
        do(world.gateway, "create", public_key=a_key(2))
    assert world.gateway.degraded() != []
    assert not imported(world, data)
    assert rows(world) == before
    world.gateway.lander.heal()
    assert world.gateway.degraded() == []
    assert imported(world, data)
    assert rows(world) == before
    world.close()


# --- counters and what is in flight ---------------------------------------------------------------


def test_counters_of_peers_that_stay_on_the_interface_go_on(tmp_path: Path) -> None:
    """Totals are those of the import; from there each byte counts once."""
    world = build(tmp_path)
    stays, returns = a_key("stays"), a_key("returns")
    for key in (stays, returns):
        do(world.gateway, "create", public_key=key)
        world.backend.move(key, 100, 10)
    world.gateway.projection.sample()
    data = world.gateway.export()
    for key in (stays, returns):
        world.backend.move(key, 1000)
    world.gateway.projection.sample()
    do(world.gateway, "set_status", public_key=returns, status="suspended")
    world.gateway.import_(data)

    def total(key: str) -> tuple[int, int]:
        traffic = traffic_of(world.gateway, key)
        return traffic.rx_bytes, traffic.tx_bytes

    world.gateway.projection.sample()
    assert total(stays) == total(returns) == (100, 10)
    for key in (stays, returns):
        world.backend.move(key, 5, 1)
    for _ in range(2):
        world.gateway.projection.sample()
        assert total(stays) == total(returns) == (105, 11)
    world.crash()
    world.open()
    world.gateway.projection.sample()
    assert total(stays) == total(returns) == (105, 11)
    world.close()


def test_a_change_on_its_way_lands_before_an_import_and_a_later_one_behind_it(
    tmp_path: Path,
) -> None:
    data, new = source(tmp_path)
    (tmp_path / "target").mkdir()
    world = build(tmp_path / "target")
    do(world.gateway, "create", public_key=a_key("old"))
    entered, go_on = threading.Event(), threading.Event()

    def hold(kind: str) -> None:
        if kind == "fsync":
            entered.set()
            assert go_on.wait(30)

    world.disk.faults.before = hold
    first = submit(world.gateway, "update", public_key=a_key("old"), dns="d2")
    assert entered.wait(30)
    worker = threading.Thread(target=world.gateway.import_, args=(data, False), daemon=True)
    worker.start()
    wait_for(lambda: world.gateway.ledger.exclusive is not None)
    second = submit(world.gateway, "create", public_key=a_key("later"))
    go_on.set()
    assert first().peer.dns == "d2"
    worker.join(30)
    made = second().peer
    assert [peer for peer, _ in rows(world)] == [*(peer for peer, _ in new), made]
    assert world.gateway.projection.reconcile()[:3] == (0, 0, 0)
    world.close()


def test_an_import_and_a_new_quota_period_do_not_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The import begins when the quotas' flight is open and has decided nothing yet."""
    world = build(tmp_path)
    fields = {"quota_bytes": 100, "quota_period": "day"}
    do(world.gateway, "create", public_key=a_key(1), **fields)
    world.backend.move(a_key(1), 10)
    world.gateway.projection.sample()
    ledger, data = world.gateway.ledger, world.gateway.export()
    enter = wggw.Bulk.__enter__
    imports: list[threading.Thread] = []

    def entered(bulk: wggw.Bulk) -> wggw.Bulk:
        enter(bulk)
        if not imports:
            imports.append(
                threading.Thread(target=world.gateway.import_, args=(data,), daemon=True)
            )
            imports[0].start()
            wait_for(lambda: ledger.exclusive is not None)
        return bulk

    monkeypatch.setattr(wggw.Bulk, "__enter__", entered)
    world.now += 86400
    expiry = threading.Thread(target=world.gateway.limits.expire, daemon=True)
    expiry.start()
    wait_for(lambda: imports and not expiry.is_alive() and not imports[0].is_alive())
    peer, traffic = peer_of(world.gateway, a_key(1)), traffic_of(world.gateway, a_key(1))
    assert traffic.total == peer.quota_base == 10
    world.close()


@contextlib.contextmanager
def importing(world: World, data: bytes, replace_key: bool | None = None) -> Iterator[None]:
    """An import whose record is being written until the block ends."""
    entered, go_on = threading.Event(), threading.Event()

    def hold(kind: str) -> None:
        if kind == "fsync":
            entered.set()
            assert go_on.wait(30)

    world.disk.faults.before = hold
    worker = threading.Thread(target=world.gateway.import_, args=(data, replace_key), daemon=True)
    worker.start()
    assert entered.wait(30)
    yield
    go_on.set()
    worker.join(30)
    assert not worker.is_alive()


def test_a_new_quota_period_waits_for_an_import_on_its_way(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    source = build(tmp_path / "source")
    do(source.gateway, "create", public_key=a_key(1), quota_bytes=100, quota_period="day")
    source.backend.move(a_key(1), 500)
    source.gateway.projection.sample()
    assert source.shown(a_key(1))["status"] == "suspended"
    data = source.gateway.export()
    source.close()
    (tmp_path / "target").mkdir()
    world = build(tmp_path / "target")
    world.now += 86400
    with importing(world, data):
        expiry = threading.Thread(target=world.gateway.limits.expire, daemon=True)
        expiry.start()
        expiry.join(10)
        assert not expiry.is_alive()
    assert world.shown(a_key(1))["status"] == "active"
    assert world.shown(a_key(1))["quota_used"] == 0
    world.close()


def test_keys_that_are_accepted_during_an_import_are_those_behind_it(tmp_path: Path) -> None:
    """Configurations name the key that the interface has, whichever comes first."""
    (tmp_path / "source").mkdir()
    source = build(tmp_path / "source", SNAPSHOT_KEY=SECRET)
    do(source.gateway, "create", public_key=a_key(1), ignored=[])
    private = wggw.clamp(bytes([9]) * 32)
    public = wggw.encode_key(wggw.x25519_public(private))
    source.store.private_keys["wg0"] = wggw.encode_key(private)
    source.store.remember("public_keys", json.dumps({"wg0": public}))
    data = source.gateway.export()
    source.close()
    (tmp_path / "target").mkdir()
    file = tmp_path / "privatekey"
    file.write_bytes(wggw.encode_key(wggw.clamp(bytes([1]) * 32)).encode() + b"\n")
    file.chmod(0o600)
    world = build(tmp_path / "target", SNAPSHOT_KEY=SECRET, WG_PRIVATE_KEY_FILE=str(file))
    with importing(world, data, replace_key=True):
        accepting = threading.Thread(target=world.gateway.accept_keys, daemon=True)
        accepting.start()
        accepting.join(0.2)
    accepting.join(30)
    tunnel = world.gateway.tunnels["wg0"]
    assert tunnel.public_key == tunnel.clients_key == public
    assert world.store.private_keys["wg0"] == wggw.encode_key(private)
    world.close()


# --- from the command line ------------------------------------------------------------------------


def test_command_line_moves_the_state(tmp_path: Path) -> None:
    file = tmp_path / "a state"
    with two(tmp_path) as (one, other):
        change_all_sorts(one)
        done = one.command("snapshot", "export", str(file))
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"exported {file.stat().st_size} bytes to {file}\n"
        assert file.stat().st_mode & 0o777 == 0o600
        done = other.command("snapshot", "import", "--keep-key", str(file))
        total = len(state(one)[0]["configurations"])
        said = f"imported: {total} peers\ncut off: {total} peers, until the clients get new files"
        assert done.returncode == 0 and done.stdout.startswith(said)
        assert without_own_key(state(other)) == without_own_key(state(one))


def test_command_line_tells_what_was_refused(tmp_path: Path) -> None:
    (tmp_path / "garbage").write_bytes(b"garbage")
    directory = tmp_path / "gateway"
    directory.mkdir()
    with running(directory) as gateway:
        gateway.client().create(a_key(1))
        before = state(gateway)
        cases: list[tuple[str, Callable[[], Path], str]] = [
            ("import", lambda: tmp_path / "garbage", "400"),
            ("import", lambda: tmp_path / "missing", "missing"),
            ("export", lambda: tmp_path / "missing" / "file", "missing"),
        ]
        for action, file, told in cases:
            done = gateway.command("snapshot", action, str(file()))
            assert done.returncode == 1, done
            assert done.stderr.startswith("wggw: ") and told in done.stderr
            assert API_KEY not in done.stderr
        assert without_own_key(state(gateway)) == without_own_key(before)
        gateway.stop()
        assert gateway.command("snapshot", "export", str(tmp_path / "file")).returncode == 1
        assert not (tmp_path / "file").exists()


def test_an_export_goes_by_what_the_kernel_says_of_a_link(
    gateway: GatewayProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """protected_symlinks: whoever can write into /tmp does not choose what root replaces."""
    link, file = gateway.directory / "link", gateway.directory / "file"
    file.write_text("root's")
    link.symlink_to(file)
    real = os.stat

    def protected(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if path == str(link):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", protected)
    done = gateway.command("snapshot", "export", str(link))
    text = f"wggw: cannot write {link}: Permission denied\n"
    assert (done.returncode, done.stderr, file.read_text()) == (1, text, "root's")


def test_an_export_replaces_files_only_and_no_link(gateway: GatewayProcess) -> None:
    """Written by root, a file in the place of /dev/stdout or /dev/null would be the host's."""
    pipe, link, file = (gateway.directory / name for name in ("pipe", "link", "file"))
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for name in (pipe, link):
        done = gateway.command("snapshot", "export", str(name))
        text = f"wggw: cannot write {name}: it is not a file, and export would replace it\n"
        assert (done.returncode, done.stderr) == (1, text)
    assert pipe.is_fifo() and link.is_symlink()
    link.unlink()
    link.symlink_to(file)
    for _ in range(2):  # a link to nothing, too
        assert gateway.command("snapshot", "export", str(link)).returncode == 0
        assert link.is_symlink() and wggw.load_snapshot(str(file), None).lineage
