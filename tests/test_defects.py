"""Documented defects of earlier products of this kind, and that they are not here.

These are the ones that no other module tests. Deletes without a signature, addresses of suspended
peers, keys with a slash in paths and garbled payloads are in test_api.py and test_restart.py; what
a failing disk or interface leaves behind is in laws/.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from fakes import NOON, World, a_request, build, do, traffic_of
from harness import Client, GatewayProcess, a_key, wait_for

import wggw

PEERS = "/api/v1/configurations/"
SHARED_SETTINGS = {"WG_IPV4_SUBNET": "10.7.0.8/29"}


@pytest.fixture
def api(shared: GatewayProcess) -> Iterator[Client]:
    """A client of a gateway without peers: those of the test before are deleted."""
    client = shared.client()
    for row in client.send("GET", PEERS).json["configurations"]:
        assert client.delete(row["public_key"]).status == 200
    yield client
    client.close()


def test_deleted_peers_addresses_come_back(api: Client) -> None:
    """Twenty times the subnet's size: none may be lost on the way, in either family."""
    for turn in range(20):
        for number in range(5):
            answer = api.create(a_key((turn, number)), protocol="dual")
            assert answer.status == 200, answer
        if turn % 2:
            api.status(a_key((turn, 2)), "suspended")
        for number in range(5):
            assert api.delete(a_key((turn, number))).status == 200
    usage = api.send("GET", "/api/v1/ip-usage").json
    assert (usage["ipv4"]["used"], usage["ipv6"]["used"]) == (0, 0)


# --- server/metrics ------------------------------------------------------------------------------


def meminfo(name: str) -> int:
    """Bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) * 1024


def test_every_field_of_server_metrics_is_filled_with_true_values(
    shared: GatewayProcess, api: Client
) -> None:
    for number in range(3):
        api.create(a_key(number), protocol="dual")
    api.status(a_key(0), "suspended")
    started = time.time()
    answer = api.send("GET", "/api/v1/server/metrics").json
    memory, disk = answer["system"]["memory"], answer["system"]["disk"]
    assert memory["total"] == meminfo("MemTotal")
    assert abs(memory["available"] - meminfo("MemAvailable")) < meminfo("MemTotal") / 4
    assert memory["percent"] == pytest.approx(100 * memory["used"] / memory["total"], abs=0.1)
    found = os.statvfs(shared.directory)
    assert disk["total"] == found.f_blocks * found.f_frsize
    assert disk["percent"] == pytest.approx(100 * disk["used"] / disk["total"], abs=0.1)
    wireguard = answer["wireguard"]
    assert (wireguard["active_peers"], wireguard["total_peers"]) == (2, 3)
    for family, total in (("ipv4", 5), ("ipv6", 2**64 - 2)):
        row = wireguard["ip_usage"][family]
        assert (row["total"], row["used"], row["available"]) == (total, 3, total - 3)
    said = datetime.fromisoformat(answer["timestamp"]).timestamp()
    assert int(started) <= said <= time.time()

    def load_is_true() -> bool:
        """Between two equal readings: the kernel counts anew every five seconds."""
        before = list(os.getloadavg())
        load = api.send("GET", "/api/v1/server/metrics").json["system"]["load_average"]
        if before != list(os.getloadavg()):
            return False
        assert load == pytest.approx(before, abs=0.01)
        return True

    wait_for(load_is_true)


def test_cpu_percent_follows_the_load(shared: GatewayProcess) -> None:
    client = shared.client()

    def percent() -> Any:
        return client.send("GET", "/api/v1/server/metrics").json["system"]["cpu_percent"]

    def busy() -> bool:
        until = time.monotonic() + 0.3
        while time.monotonic() < until:
            pass
        return 5 < percent() <= 100

    wait_for(busy, what="cpu_percent to show this test's own work")


# --- drift ---------------------------------------------------------------------------------------


def drifted(world: World, kind: str) -> None:
    """Somebody else changes the interface; its number of peers stays in all but two cases."""
    backend, key = world.backend, a_key(1)
    held = backend.peers[key].allowed_ips
    [address] = [f"10.0.1.{network[3]}" for network in held if len(network) == 5]
    if kind == "address of another":
        backend.put(a_key(2), address)
    elif kind == "everything":
        peer = backend.peers[key]
        whole = peer._replace(allowed_ips=(bytes(5), *peer.allowed_ips))
        backend.apply([wggw.Change(peer.public_key, whole)])
    elif kind == "preshared key":
        backend.put(key, address, psk=b"x" * 32)
    elif kind == "foreign peer":
        backend.put(a_key("foreign"), "10.9.9.9")
    elif kind == "one for another":
        backend.drop(key)
        backend.put(a_key("foreign"), address)
    elif kind == "missing peer":
        backend.drop(key)
    elif kind == "interface made anew":
        backend.restart()
    assert backend.device is not None and backend.link is not None
    if kind == "private key":
        backend.device = backend.device._replace(private_key=b"x" * 32)
    elif kind == "no private key":
        backend.device = backend.device._replace(private_key=b"")
    elif kind == "listen port":
        backend.device = backend.device._replace(listen_port=7)


DRIFTS = (
    "address of another",
    "everything",
    "preshared key",
    "foreign peer",
    "one for another",
    "missing peer",
    "interface made anew",
    "private key",
    "no private key",
    "listen port",
)


@pytest.mark.parametrize("kind", DRIFTS)
@pytest.mark.parametrize("by", ["a sample", "sync-ips"])
def test_what_others_changed_is_put_right(tmp_path: Path, kind: str, by: str) -> None:
    world = build(tmp_path)
    for number in range(4):
        do(world.gateway, "create", public_key=a_key(number))
    world.gateway.projection.sample()  # what is known from then on is not decoded
    right, device = world.backend.peers, world.backend.device
    for _ in range(2):
        drifted(world, kind)
        if by == "a sample":
            world.gateway.projection.sample()
        else:
            result = world.gateway.projection.reconcile()
            peers = kind not in ("private key", "no private key", "listen port")
            assert (sum(result[:3]) > 0) == peers
        assert (world.backend.peers, world.backend.device) == (right, device)
        assert not world.gateway.degraded()
    world.close()


@pytest.mark.parametrize("kind", DRIFTS)
def test_what_others_changed_is_said_until_it_is_put_right(tmp_path: Path, kind: str) -> None:
    world = build(tmp_path)
    for number in range(4):
        do(world.gateway, "create", public_key=a_key(number))
    world.gateway.projection.sample()
    right, device = world.backend.peers, world.backend.device
    drifted(world, kind)
    world.backend.fail("apply", "setup", forever=True)
    with pytest.raises(wggw.BackendError):
        world.gateway.projection.sample()
    assert any(reason.startswith("interface wg0: ") for reason in world.gateway.degraded())
    with pytest.raises(wggw.Unavailable):  # no answer speaks of an interface that is wrong
        do(world.gateway, "create", public_key=a_key(1))
    world.backend.heal()
    world.gateway.projection.supervise()
    world.gateway.projection.sample()
    assert (world.backend.peers, world.backend.device) == (right, device)
    assert not world.gateway.degraded()
    world.close()


@pytest.mark.parametrize("kind", ["missing peer", "foreign peer", "one for another"])
def test_drift_is_found_also_under_steady_traffic(tmp_path: Path, kind: str) -> None:
    """A peer is created while each sample reads."""
    world = build(tmp_path)
    numbers = itertools.count(100)
    for number in range(5):
        do(world.gateway, "create", public_key=a_key(number))
    world.gateway.projection.sample()
    drifted(world, kind)
    read = world.backend.read

    made = {a_key(number) for number in range(5)}

    def create() -> None:
        with contextlib.suppress(wggw.Unavailable):  # while it is being repaired
            made.add(do(world.gateway, "create", public_key=a_key(next(numbers))).peer.public_key)

    def busy(known: Any) -> wggw.Reading:
        before = threading.Thread(target=create, daemon=True)
        before.start()
        reading = read(known)
        before.join()
        create()
        return reading

    world.backend.read = busy  # type: ignore[method-assign]
    for _ in range(2):
        world.gateway.projection.sample()
    assert world.backend.peers.keys() == made and len(made) > 7
    world.close()


def test_a_missing_peer_is_found_though_known_ones_change_in_each_sample(tmp_path: Path) -> None:
    """A known peer is not decoded, so that nobody sees which of the counted ones changed."""
    world = build(tmp_path)
    for number in range(5):
        do(world.gateway, "create", public_key=a_key(number))
    world.gateway.projection.sample()
    right = world.backend.peers
    drifted(world, "missing peer")
    assert world.backend.peers != right
    read, labels = world.backend.read, itertools.count()

    def busy(known: Any) -> wggw.Reading:
        missing = right.keys() - world.backend.peers.keys()
        with contextlib.suppress(wggw.Unavailable):  # while it is being repaired
            key = min(right.keys() - missing)
            do(world.gateway, "update", public_key=key, label=str(next(labels)))
        return read(known)

    world.backend.read = busy  # type: ignore[method-assign]
    for _ in range(wggw.UNSURE_SAMPLES + 1):
        world.gateway.projection.sample()
    assert world.backend.peers == right
    assert not world.gateway.degraded()
    world.close()


# --- counters that cannot be read -----------------------------------------------------------------


def test_a_failed_sample_is_repeated_soon_whatever_its_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway is not ready until it is repeated, which may be an hour later."""
    world = build(tmp_path, SAMPLE_INTERVAL="3600")
    do(world.gateway, "create", public_key=a_key(1))
    world.backend.move(a_key(1), 100)
    world.backend.fail("read")
    with pytest.raises(wggw.BackendError):
        world.gateway.projection.sample()
    world.gateway.projection.supervise()
    assert world.gateway.degraded() == ["counters: read failed, as told"]
    later = time.monotonic() + wggw.SAMPLE_RETRY
    with monkeypatch.context() as patched:
        patched.setattr(wggw.time, "monotonic", lambda: later)
        world.gateway.projection.supervise()
    assert world.gateway.degraded() == []
    assert traffic_of(world.gateway, a_key(1)).rx_bytes == 100
    world.close()


def test_one_unreadable_peer_is_said_and_keeps_no_other_from_being_counted(tmp_path: Path) -> None:
    world = build(tmp_path)
    for number in range(3):
        do(world.gateway, "create", public_key=a_key(number))
        world.backend.move(a_key(number), 100)
    world.backend.unreadable = {a_key(1)}
    for _ in range(2):
        with pytest.raises(wggw.BackendError, match="1 peer cannot be read"):
            world.gateway.projection.sample()
        assert [traffic_of(world.gateway, a_key(n)).rx_bytes for n in range(3)] == [100, 0, 100]
        assert [reason.partition(":")[0] for reason in world.gateway.degraded()] == ["counters"]
    world.gateway.projection.reconcile()  # it is made anew, and counted from 0
    world.backend.unreadable = set()
    world.backend.move(a_key(1), 7)
    world.gateway.projection.sample()
    assert traffic_of(world.gateway, a_key(1)).rx_bytes == 7
    assert not world.gateway.degraded()
    world.close()


def test_what_a_failing_disk_kept_from_being_counted_is_counted_behind_it(tmp_path: Path) -> None:
    """Also of a peer that moves nothing any more: its counters do not change again."""
    world = build(tmp_path)
    do(world.gateway, "create", public_key=a_key(1))
    world.backend.move(a_key(1), 100)
    for _ in range(2):  # the disk fails with the sample's own record, then is known to
        world.disk.fail("write", forever=True)
        world.gateway.projection.sample()
        assert traffic_of(world.gateway, a_key(1)).rx_bytes == 0
    world.disk.heal()
    world.gateway.lander.heal()
    world.gateway.projection.sample()
    assert traffic_of(world.gateway, a_key(1)).rx_bytes == 100
    assert world.gateway.tunnels["wg0"].rx_bytes == 100
    world.close()


# --- answers -------------------------------------------------------------------------------------


def app_of(world: World, directory: Path) -> wggw.App:
    host = wggw.HostMetrics(str(directory))
    return wggw.App(world.gateway, host, lambda steps: [*steps] and None)


def test_a_defect_in_a_sealed_create_is_answered_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "a shared secret of two sides"
    world = build(tmp_path, GATEWAY_PUBLIC_KEY=secret)

    def defect(*_: object) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(world.gateway.rules, "create", defect)
    box = wggw.PayloadBox(secret)
    sealed = box.seal(wggw.encode_json({"public_key": a_key(1)}))
    body = wggw.encode_json({"encrypted_payload": sealed})
    answers: list[wggw.Response] = []
    app_of(world, tmp_path).peers.create_peer(a_request(body=body)).then(answers.append)
    [answer] = answers
    content = json.loads(answer.body)
    assert answer.status == 500 and content.keys() == {"encrypted_response"}
    assert json.loads(box.open(content["encrypted_response"]))["status"] == 500
    world.close()


def test_a_reload_during_a_sealed_create_changes_nothing_about_its_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "a shared secret of two sides"
    world = build(tmp_path, GATEWAY_PUBLIC_KEY=secret)
    app, box = app_of(world, tmp_path), wggw.PayloadBox(secret)
    reloaded = mock.PropertyMock(side_effect=[box, None, None])
    monkeypatch.setattr(wggw.PeerHandlers, "box", reloaded, raising=False)
    sealed = box.seal(wggw.encode_json({"public_key": a_key(1)}))
    body = wggw.encode_json({"encrypted_payload": sealed})
    answers: list[wggw.Response] = []
    world.gateway.run(lambda: app.peers.create_peer(a_request(body=body)).then(answers.append))
    wait_for(lambda: answers, what="an answer")
    assert json.loads(box.open(json.loads(answers[0].body)["encrypted_response"]))["public_key"]
    world.close()


@pytest.mark.parametrize("handler", ["create_peer", "run_batch", "list_peers"])
def test_a_defect_in_showing_what_was_done_is_an_answer_and_breaks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handler: str
) -> None:
    world = build(tmp_path)
    app = app_of(world, tmp_path)
    do(world.gateway, "create", public_key=a_key("there"))

    def defect(*_: object) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(wggw.Configurations, "prepare", defect)
    create = {"public_key": a_key(1)}
    bodies = {
        "create_peer": create,
        "run_batch": {"operations": [{"op": "create", **create}]},
        "list_peers": {},
    }
    rows = [row for row in wggw.ROUTES if row.handler is getattr(wggw.PeerHandlers, handler)]
    asked = a_request(rows[0], body=wggw.encode_json(bodies[handler]))
    answers: list[wggw.Response] = []
    later = getattr(app.peers, handler)(asked)
    world.gateway.run(lambda: later.then(answers.append))
    wait_for(lambda: answers, what="an answer")
    content = json.loads(answers[0].body)
    [shown] = content["results"] if handler == "run_batch" else [content]
    assert shown["status"] == 500
    assert not world.gateway.degraded()
    assert (world.store.get(a_key(1)) is not None) == (handler != "list_peers")
    do(world.gateway, "delete", public_key=a_key("there"))
    world.close()


def test_a_failing_interface_makes_sync_a_503(tmp_path: Path) -> None:
    world = build(tmp_path)
    app = app_of(world, tmp_path)
    do(world.gateway, "create", public_key=a_key(1))
    right = world.backend.peers
    world.backend.drop(a_key(1))
    world.backend.fail("apply")
    [route] = [route for route in wggw.ROUTES if route.template.endswith("/sync-ips")]
    asked = a_request(route)
    with pytest.raises(wggw.Unavailable):
        app.handlers["gateway"].sync_ips(asked)
    assert app.handlers["gateway"].sync_ips(asked)["status"] == "synced"
    assert world.backend.peers == right
    world.close()


def test_last_handshakes_and_online_peers_are_those_of_the_interface(tmp_path: Path) -> None:
    world = build(tmp_path)
    app, now = app_of(world, tmp_path), int(NOON)
    for name in ("online", "offline", "never"):
        do(world.gateway, "create", public_key=a_key(name))
    world.backend.move(a_key("online"), 1000, 2000, now - 179)
    world.backend.move(a_key("offline"), 1000, 2000, now - 181)
    world.gateway.projection.sample()
    wireguard = app.handlers["gateway"].get_server_metrics(a_request())["wireguard"]
    assert {
        key: datetime.fromisoformat(when).timestamp()
        for key, when in wireguard["last_handshakes"].items()
    } == {a_key("online"): now - 179, a_key("offline"): now - 181}
    assert app.handlers["gateway"].get_status(a_request())["wireguard_peers"] == 1
    shown = json.loads(app.peers.get_peer(a_request(key=a_key("online"))).body)
    assert (shown["online"], shown["rx_bytes"], shown["tx_bytes"]) == (True, 1000, 2000)
    assert not json.loads(app.peers.get_peer(a_request(key=a_key("offline"))).body)["online"]
    world.close()


def test_a_repair_that_disk_and_interface_refuse_leaves_no_doubt(tmp_path: Path) -> None:
    """Its record was never written, so that there is nothing to make void."""
    world = build(tmp_path)
    do(world.gateway, "create", public_key=a_key(1))
    world.backend.move(a_key(1), 5, 5, int(world.now))
    world.gateway.projection.sample()
    world.backend.drop(a_key(1))
    world.disk.fail("write", forever=True)
    world.backend.fail("apply")
    with pytest.raises(wggw.BackendError):
        world.gateway.projection.reconcile()
    assert not world.gateway.ledger.uncertain
    world.disk.heal()
    world.gateway.lander.heal()
    world.gateway.projection.supervise()
    assert world.gateway.degraded() == [] and a_key(1) in world.backend.peers
    world.close()
