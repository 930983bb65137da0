"""Every documented defect of earlier products of this kind, and that it is not here.

A test for each, even where another module tests the same law in more depth: this is the list.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from harness import API_KEY, Client, GatewayProcess, a_key, path_key, running, sign, wait_for

import wggw

PEERS = "/api/v1/configurations/"
PRIVATE_KEY = bytes(range(1, 33))  # WireGuard clamps it


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with running(
        tmp_path_factory.mktemp("defects"),
        WG_IPV4_SUBNET="10.7.0.8/29",
        GATEWAY_PUBLIC_KEY="a shared secret of two sides",
    ) as gateway:
        yield gateway


@pytest.fixture
def api(shared: GatewayProcess) -> Iterator[Client]:
    """A client of a gateway without peers: those of the test before are deleted."""
    client = shared.client()
    for row in client.send("GET", PEERS).json["configurations"]:
        assert client.delete(row["public_key"]).status == 200
    yield client
    client.close()


def test_a_delete_without_a_signature_is_refused(api: Client) -> None:
    key = a_key(1)
    api.create(key)
    for headers in ({}, {"signature": "", "timestamp": ""}, {**sign(b"x")}):
        assert api.raw("DELETE", PEERS + path_key(key), b"", headers).status == 401
    assert api.get(key).json["status"] == "active"


def test_a_second_create_returns_the_same_addresses(api: Client) -> None:
    first = api.create(a_key(1), protocol="dual").json
    for again in ({}, {"protocol": "ipv6"}, {"assigned_ip": "10.7.0.14"}):
        second = api.create(a_key(1), **again).json
        assert second["status"] == "exists"
        for name in ("assigned_ip", "assigned_ipv6"):
            assert second[name] == first[name]


def test_a_suspended_peers_address_is_never_given_to_another(api: Client) -> None:
    given = [api.create(a_key(n)).json["assigned_ip"] for n in range(5)]
    assert len(set(given)) == 5
    api.status(a_key(3), "suspended")
    assert api.create(a_key(9)).status == 503
    assert api.create(a_key(9), assigned_ip=given[3]).status == 409
    api.delete(a_key(0))
    assert api.create(a_key(9)).json["assigned_ip"] == given[0]


def test_a_suspended_peers_address_is_not_given_away_after_a_restart(
    shared: GatewayProcess, api: Client
) -> None:
    given = [api.create(a_key(n)).json["assigned_ip"] for n in range(5)]
    api.status(a_key(3), "suspended")
    api.delete(a_key(1))
    shared.kill()
    shared.start()
    client = shared.client()
    assert client.create(a_key(9)).json["assigned_ip"] == given[1]
    assert client.create(a_key(10)).status == 503
    assert client.status(a_key(3), "active").status == 200
    assert client.get(a_key(3)).json["assigned_ip"] == given[3]
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


@pytest.mark.parametrize("name", ["signature", "timestamp"])
@pytest.mark.parametrize("value", ["é" * 64, "\xff\xfe", "ÿ", "\x80" * 500])
def test_a_non_ascii_signature_header_is_a_401(api: Client, name: str, value: str) -> None:
    answer = api.raw("GET", "/api/v1/ip-usage", b"", {**sign(), name: value})
    assert answer.status == 401
    assert api.send("GET", "/api/v1/ip-usage").status == 200  # on the same connection


def test_keys_with_slash_and_plus_work_in_paths(api: Client) -> None:
    key = base64.b64encode(b"\xff\xef\xbe" * 10 + b"\xff\xef").decode()
    assert "/" in key and "+" in key
    assert api.create(key).json["status"] == "created"
    assert api.get(key).json["public_key"] == key
    assert api.status(key, "suspended").json == {"status": "suspended"}
    assert api.status(key, "active").json == {"status": "updated"}
    assert api.delete(key).json == {"status": "deleted"}


def test_a_fresh_machine_without_a_database_starts(tmp_path: Path) -> None:
    directory = tmp_path / "empty"
    directory.mkdir()
    with running(directory) as gateway:
        assert gateway.client().create(a_key(1)).status == 200


def garbled() -> list[str]:
    return ["", "AAAA", "%%%", base64.b64encode(os.urandom(60)).decode(), "é", "=" * 40]


@pytest.mark.parametrize("text", garbled(), ids=range(len(garbled())))
def test_a_garbled_encrypted_payload_creates_nothing(api: Client, text: str) -> None:
    answer = api.create(a_key(1), protocol="ipv4", encrypted_payload=text)
    assert answer.status == 400
    assert api.send("GET", PEERS).json["configurations"] == []
    assert api.send("GET", "/api/v1/ip-usage").json["ipv4"]["used"] == 0


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


# --- a failing interface -------------------------------------------------------------------------


class FailingBackend(wggw.MemoryBackend):
    """Does what it is told until `fails` calls of apply() are to fail: before or after the work."""

    def __init__(self, after: bool) -> None:
        super().__init__()
        self.after = after
        self.fails = 0
        self.handshakes: dict[bytes, int] = {}

    def apply(self, changes: Any) -> None:
        if self.fails and not self.after:
            self.fails -= 1
            raise wggw.BackendError("the interface refuses")
        super().apply(changes)
        if self.fails:
            self.fails -= 1
            raise wggw.BackendError("the interface's answer was lost")

    def read(self, *arguments: Any, **options: Any) -> list[wggw.PeerState]:
        return [
            state._replace(
                last_handshake=self.handshakes.get(state.peer.public_key, 0),
                rx_bytes=1000,
                tx_bytes=2000,
            )
            for state in super().read(*arguments, **options)
        ]


class Rig:
    """A Gateway without its server: store on files, a backend of ours, a clock that stands."""

    now = 1_800_000_000

    def __init__(self, directory: Path, backend: wggw.Backend, **more: str) -> None:
        empty = directory / "empty.env"
        empty.touch()
        settings = {"GATEWAY_API_KEY": API_KEY, "DB_PATH": str(directory / "wireguard.db")}
        self.config = wggw.load_config({**settings, **more}, str(empty))
        self.store = wggw.Store(self.config.db_path, "commit", wggw.Disk())
        self.gateway = wggw.Gateway(self.config, self.store, lambda: self.now)
        self.store.recover()
        self.backend = backend
        (settings,) = wggw.interface_settings(self.config)
        link = wggw.make_link(settings, PRIVATE_KEY)
        self.gateway.start([(settings, link, backend)])
        host = wggw.HostMetrics(str(directory))
        self.app = wggw.App(self.config, self.gateway, lambda: self.now, host)

    def seen(self) -> Any:
        """All that can be seen of store, pools and interface."""
        (interface,) = self.gateway.interfaces.values()
        return (
            self.gateway.page(0, 1000, wggw.Filter()),
            self.gateway.usage(interface.name),
            {family: pool.peek() for family, pool in interface.pools.items()},
            {state.peer for state in self.backend.read()},
        )


ACTIONS: list[tuple[str, Callable[[wggw.Gateway], object]]] = [
    ("create", lambda g: g.create({"public_key": a_key("new"), "protocol": "dual"})),
    ("suspend", lambda g: g.set_status(a_key("awake"), "suspended")),
    ("activate", lambda g: g.set_status(a_key("asleep"), "active")),
    ("delete", lambda g: g.delete(a_key("awake"))),
]


@pytest.mark.parametrize("after", [False, True], ids=["refused", "answer lost"])
@pytest.mark.parametrize("action", [a for _, a in ACTIONS], ids=[name for name, _ in ACTIONS])
def test_a_failing_interface_never_yields_success_and_changes_nothing(
    tmp_path: Path, action: Callable[[wggw.Gateway], object], after: bool
) -> None:
    backend = FailingBackend(after)
    rig = Rig(tmp_path, backend)
    rig.gateway.create({"public_key": a_key("awake"), "protocol": "dual"})
    rig.gateway.create({"public_key": a_key("asleep")})
    rig.gateway.set_status(a_key("asleep"), "suspended")
    before = rig.seen()
    for _ in range(2):
        backend.fails = 1
        with pytest.raises(wggw.Unavailable) as caught:
            action(rig.gateway)
        assert caught.value.status == 503
        assert rig.seen() == before
    # What is put back fails as well: the next look at the interface repairs it.
    backend.fails = 2
    with pytest.raises(wggw.Unavailable):
        action(rig.gateway)
    assert rig.seen()[:3] == before[:3]
    assert rig.gateway.degraded()
    rig.gateway.supervise()
    assert rig.seen() == before
    assert not rig.gateway.degraded()
    action(rig.gateway)
    assert rig.seen() != before
    rig.gateway.close()
    rig.store.close()


def request(key: str = "") -> wggw.Request:
    route = wggw.ROUTES[0]
    return wggw.Request(route=route, query={}, body=b"", content_type=b"", key=key)


def test_a_defect_in_a_sealed_create_is_answered_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "a shared secret of two sides"
    rig = Rig(tmp_path, wggw.MemoryBackend(), GATEWAY_PUBLIC_KEY=secret)

    def defect(fields: object) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(rig.gateway, "create", defect)
    box = wggw.PayloadBox(secret)
    sealed = box.seal(wggw.encode_json({"public_key": a_key(1)}))
    body = wggw.encode_json({"encrypted_payload": sealed})
    answer = rig.app.create(request()._replace(body=body))
    content = json.loads(answer.body)
    assert answer.status == 500 and content.keys() == {"encrypted_response"}
    assert json.loads(box.open(content["encrypted_response"]))["status"] == 500
    rig.gateway.close()
    rig.store.close()


def test_an_interface_that_hangs_does_not_hold_up_the_stop(tmp_path: Path) -> None:
    backend = FailingBackend(after=False)
    rig = Rig(tmp_path, backend)
    hangs, ends = threading.Event(), threading.Event()

    def apply(changes: object) -> None:
        hangs.set()
        ends.wait(60)

    backend.apply = apply  # type: ignore[method-assign]
    thread = threading.Thread(target=rig.gateway.create, args=({"public_key": a_key(1)},))
    thread.start()
    assert hangs.wait(30)
    started = time.monotonic()
    rig.gateway.close()
    assert time.monotonic() - started < 30
    ends.set()
    thread.join(10)
    rig.store.close()


def test_addresses_shown_as_held_are_so_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path, wggw.MemoryBackend())
    order: list[str] = []
    writing, written = threading.Event(), threading.Event()
    fsync = wggw.Disk.fsync

    def slow(disk: wggw.Disk, handle: int) -> None:
        writing.set()
        written.wait(0.3)  # time enough to answer before it, which would be wrong
        order.append("on disk")
        fsync(disk, handle)

    monkeypatch.setattr(wggw.Disk, "fsync", slow)
    thread = threading.Thread(target=rig.gateway.create, args=({"public_key": a_key(1)},))
    thread.start()
    assert writing.wait(30)
    assert rig.gateway.usage()["ipv4"]["used"] == 1
    order.append("shown")
    thread.join(10)
    assert order[:2] == ["on disk", "shown"]
    rig.gateway.close()
    rig.store.close()


def test_a_peer_that_is_missing_is_put_back_also_under_steady_traffic(tmp_path: Path) -> None:
    backend = FailingBackend(after=False)
    rig = Rig(tmp_path, backend)
    numbers = itertools.count()
    for _ in range(5):
        rig.gateway.create({"public_key": a_key(next(numbers))})
    rig.gateway.sample()
    lost = wggw.decode_key(a_key(1))
    backend.apply([wggw.Change(lost, None)])  # somebody else removed it
    sample = backend.sample

    def busy(known: Any) -> wggw.Reading:
        reading = sample(known)
        rig.gateway.create({"public_key": a_key(next(numbers))})
        return reading

    backend.sample = busy  # type: ignore[method-assign]
    present: list[bool] = []
    for _ in range(2 * wggw.MAX_DOUBTS):
        rig.gateway.sample()
        present.append(lost in {state.peer.public_key for state in backend.read()})
    assert not any(present[: wggw.MAX_DOUBTS - 1]) and all(present[wggw.MAX_DOUBTS :])
    rig.gateway.close()
    rig.store.close()


def test_a_failing_interface_makes_sync_a_503(tmp_path: Path) -> None:
    backend = FailingBackend(after=False)
    rig = Rig(tmp_path, backend)
    rig.gateway.create({"public_key": a_key(1)})
    (state,) = backend.read()
    backend.apply([wggw.Change(state.peer.public_key, None)])  # somebody else removed it
    backend.fails = 1
    with pytest.raises(wggw.Unavailable):
        rig.app.sync_ips(request())
    assert rig.app.sync_ips(request()).status == 200
    assert [s.peer for s in backend.read()] == [state.peer]
    rig.gateway.close()
    rig.store.close()


def test_last_handshakes_and_online_peers_are_those_of_the_interface(tmp_path: Path) -> None:
    backend = FailingBackend(after=False)
    rig = Rig(tmp_path, backend)
    for name in ("online", "offline", "never"):
        rig.gateway.create({"public_key": a_key(name)})
    backend.handshakes = {
        wggw.decode_key(a_key("online")): rig.now - 179,
        wggw.decode_key(a_key("offline")): rig.now - 181,
    }
    rig.gateway.sample()
    wireguard = json.loads(rig.app.server_metrics(request()).body)["wireguard"]
    assert {
        key: datetime.fromisoformat(when).timestamp()
        for key, when in wireguard["last_handshakes"].items()
    } == {a_key("online"): rig.now - 179, a_key("offline"): rig.now - 181}
    assert json.loads(rig.app.status(request()).body)["wireguard_peers"] == 1
    shown = json.loads(rig.app.get(request(a_key("online"))).body)
    assert (shown["online"], shown["rx_bytes"], shown["tx_bytes"]) == (True, 1000, 2000)
    assert not json.loads(rig.app.get(request(a_key("offline"))).body)["online"]
    rig.gateway.close()
    rig.store.close()
