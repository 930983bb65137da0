"""A backend that asks for /changes and /usage, and for nothing else, knows what the gateway knows.

Requests are bytes of HTTP, signed, and answered by the program's own App; only sockets are left
out. Around them random histories: peers come, change and go, alone, in batches and as desired
states; they move bytes, use up quotas and have them reset; days and months pass; answers are lost;
the gateway ends, crashes and is set back by an import. Whenever the backend has caught up, its
peers, totals and used quotas are those of the list.
"""

from __future__ import annotations

import json
import logging
import queue
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import World, build
from harness import a_key, path_key, sign

import wggw

PEERS = "/api/v1/configurations"
KEYS = [a_key(("followed", number)) for number in range(12)]
COUNTED = ("rx_bytes", "tx_bytes", "last_handshake")
STEPS = 60


class Http:
    """The gateway's API, of whatever process is running just now."""

    def __init__(self, world: World) -> None:
        self.world = world
        host = wggw.HostMetrics(str(world.directory))
        work = world.gateway.run
        self.app = wggw.App(
            world.gateway, host, lambda steps: work(lambda: [None for _ in steps] and None)
        )

    def ask(self, method: str, target: str, body: Any = None) -> queue.SimpleQueue[wggw.Response]:
        """Send a request; what is answered comes out of the queue, now or later."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode() if body else b""
        headers = {"Host": "x", "Content-Length": str(len(data)), "Content-Type": ""}
        headers["Content-Type"] = "application/json" if data[:1] in b"{[" else "application/x"
        headers |= sign(data, at=int(self.world.now))
        lines = [f"{method} {target} HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items())]
        head = wggw.parse_head("\r\n".join(lines).encode())
        admitted = self.app.admission.admit(head, "127.0.0.1", wggw.LogEntry("an-id"))
        answers: queue.SimpleQueue[wggw.Response] = queue.SimpleQueue()
        if admitted.route.place == "loop":
            run = self.world.gateway.run
            run(lambda: self.app.answer_later(admitted, data, answers.put))
        elif admitted.route.place == "reader":
            answers.put(self.app.answer(admitted, iter([data])))
        else:
            answers.put(self.app.answer(admitted, data))
        return answers

    def call(self, method: str, target: str, body: Any = None) -> tuple[int, Any]:
        response = self.ask(method, target, body).get(timeout=60)
        is_json = "json" in response.content_type
        return response.status, json.loads(response.body) if is_json else response.body


class Backend:
    """What somebody knows who reads the two feeds, and how often they had to begin again."""

    def __init__(self) -> None:
        self.after = {"changes": 0, "usage": 0}
        self.peers: dict[str, dict[str, Any]] = {}
        self.begun = 0

    def catch_up(self, http: Http, chance: random.Random) -> None:
        for feed in chance.sample(["changes", "usage"], 2):
            while not self._read(http, feed, chance):
                pass

    def _read(self, http: Http, feed: str, chance: random.Random) -> bool:
        """One page; whether that is all."""
        limit = chance.choice([1, 2, 5, 1000])
        status, answer = http.call("GET", f"/api/v1/{feed}?after={self.after[feed]}&limit={limit}")
        if status == 410:
            self.begun += 1
            self.after[feed] = 0
            if feed == "changes":
                self.peers.clear()
            return False
        assert status == 200, answer
        if chance.random() < 0.1:
            return False  # the answer was lost on its way
        self.take(feed, answer)
        return len(answer[feed]) < limit

    def take(self, feed: str, answer: Any) -> None:
        for entry in answer[feed]:
            key = entry["public_key"]
            if feed == "usage":
                if key in self.peers:  # or its configuration comes, with totals that are newer
                    used = self.peers[key]["quota_used"] - self._total(self.peers[key])
                    self.peers[key] |= {name: entry[name] for name in COUNTED}
                    self.peers[key]["quota_used"] = used + self._total(entry)
            elif entry["deleted"]:
                self.peers.pop(key, None)
            else:
                self.peers[key] = entry["configuration"]
        self.after[feed] = answer["next"]

    @staticmethod
    def _total(row: dict[str, Any]) -> int:
        return int(row["rx_bytes"] + row["tx_bytes"])

    def check(self, http: Http) -> None:
        listed, cursor = [], ""
        while cursor is not None:
            page = http.call("GET", f"{PEERS}?limit=5{cursor and f'&cursor={cursor}'}")[1]
            listed += page["configurations"]
            cursor = page["next_cursor"]
        known = {key: row | {"online": None} for key, row in self.peers.items()}
        assert known == {row["public_key"]: row | {"online": None} for row in listed}


class History:
    def __init__(self, directory: Path, seed: int, durability: str) -> None:
        self.chance = random.Random(seed)
        self.world = build(directory, WG_IPV4_SUBNET="10.7.0.0/27", DURABILITY=durability)
        self.http = Http(self.world)
        self.exported = self.world.gateway.export()
        self.backend = Backend()
        self.waiting: queue.SimpleQueue[wggw.Response] | None = None

    def step(self) -> None:
        chance, gateway = self.chance, self.world.gateway
        what = chance.choices(
            ["change", "traffic", "time", "sync", "export", "import", "restart", "ask"],
            [40, 25, 12, 3, 3, 3, 4, 10],
        )[0]
        if what == "change":
            self.change()
        elif what == "traffic":
            for key in list(self.world.backend.peers):
                if chance.random() < 0.5:
                    rx, tx = chance.randrange(100), chance.randrange(100)
                    self.world.backend.move(key, rx, tx, int(self.world.now))
            gateway.projection.sample()
        elif what == "time":
            self.world.now += chance.choice([1, 3600, 86400, 40 * 86400])
            gateway.limits.expire()
        elif what == "sync":
            body = [{"public_key": key, **self.fields()} for key in chance.sample(KEYS, 6)]
            self.http.call("PUT", PEERS + "?allow_mass_delete=true", body)
        elif what == "export":
            self.exported = self.http.call("GET", "/api/v1/snapshot")[1]
            gateway.lander.snapshot()
        elif what == "import":
            assert self.http.call("PUT", "/api/v1/snapshot", self.exported)[0] == 200
        elif what == "ask" and self.waiting is None:
            after = self.backend.after["changes"]
            self.waiting = self.http.ask("GET", f"/api/v1/changes?after={after}&wait=60")
        elif what == "restart":
            self.world.now += 5
            self.world.crash() if chance.random() < 0.5 else self.world.close()
            self.world.open()
            self.http, self.waiting = Http(self.world), None

    def fields(self) -> dict[str, Any]:
        chance = self.chance
        return {
            "quota_bytes": chance.choice([None, 0, 150, 10**6]),
            "quota_period": chance.choice([None, *wggw.PERIODS]),
            "label": chance.choice([None, "a", "b"]),
        }

    def change(self) -> None:
        chance = self.chance
        key, other = chance.sample(KEYS, 2)
        path = f"{PEERS}/{path_key(key)}"
        requests: list[tuple[str, str, Any]] = [
            ("POST", PEERS, {"public_key": key, **self.fields()}),
            ("POST", PEERS, {"public_key": key, **self.fields()}),
            ("PATCH", path, self.fields()),
            ("POST", path + "/reset-quota", None),
            ("POST", path + "/rotate", {"new_public_key": other}),
            ("PUT", path + "/status", {"status": chance.choice(wggw.STATUSES)}),
            ("DELETE", path, None),
        ]
        about = [{"public_key": k} for k in (key, other)]
        operations = [{"op": "reset-quota", **about[0]}, {"op": "delete", **about[1]}]
        requests.append(("POST", PEERS + "/batch", {"operations": operations}))
        assert self.http.call(*chance.choice(requests))[0] in (200, 404, 409, 503)

    def catch_up(self) -> None:
        if self.waiting is not None:
            after = self.backend.after["changes"]
            status, answer = self.http.call("GET", f"/api/v1/changes?after={after}&limit=1")
            if status == 200 and not answer["changes"]:
                assert self.waiting.empty()  # nothing has changed, so it goes on waiting
            else:
                response = self.waiting.get(timeout=20)
                if response.status == 200:
                    self.backend.take("changes", json.loads(response.body))
                assert response.status == 200 or status == 410
                self.waiting = None
        self.backend.catch_up(self.http, self.chance)
        self.backend.check(self.http)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    wggw.LOG.setLevel(logging.CRITICAL)
    yield
    wggw.LOG.setLevel(logging.NOTSET)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("durability", ["commit", "none"])
def test_who_follows_the_feeds_knows_what_the_gateway_knows(
    tmp_path: Path, seed: int, durability: str
) -> None:
    history = History(tmp_path, seed, durability)
    for _ in range(STEPS):
        history.step()
        if history.chance.random() < 0.3:
            history.catch_up()
    late = Backend()
    late.catch_up(history.http, history.chance)
    late.check(history.http)
    history.catch_up()
    assert durability != "commit" or history.backend.begun == 0
    history.world.close()
