"""Random histories under faults of disk and interface and under crashes, against a simple model.

Four clients change peers of their own, each of which it models exactly; addresses are everybody's.
Beside them run what the timers of a real gateway run (healing, snapshots, samples, scrubs, repair)
and, in some rounds, desired states or an import. In a round calls of disk and interface fail at
random, and it may end with a crash: a KILL, or a power failure that takes what was not synced.

After each round what was acknowledged is there, what was refused is not, what was never answered is
there as a whole or not at all; and the laws of laws.py hold.

    WGGW_SEED=17 python -m pytest tests/model/test_histories.py     # one history again
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fakes import DISK_CALLS, Crash, FakeDisk, Lost, World, batch, submit
from harness import LONG, a_key
from laws import check_at_rest, check_restart_changes_nothing

import wggw

CLIENTS, KEYS, OPERATIONS, ROUNDS = 4, 4, 25, 5
BASE = [a_key(("base", n)) for n in range(6)]  # of everybody, in rounds with a desired state
EXTRA = [a_key(("extra", n)) for n in range(12)]  # of the desired states
SECONDS = float(os.environ.get("WGGW_SECONDS") or (60 if LONG else 3))


class Peer(NamedTuple):
    """What a client knows of a peer of its own."""

    status: str
    keepalive: int
    preshared_key: str | None
    assigned_ip: str | None

    @classmethod
    def of(cls, peer: wggw.Peer) -> Peer:
        return cls(peer.status, peer.persistent_keepalive, peer.preshared_key, peer.assigned_ip)


State = dict[str, Peer]  # by key
Rule = tuple[str, dict[str, Any]]


class Refused(Exception):
    """The model says that this must be refused, with this class."""

    def __init__(self, kind: type[wggw.GatewayError]) -> None:
        self.kind = kind


def follow(state: State, rule: Rule, outcome: wggw.Peer | None) -> State:
    """The state after a rule was done. Raises Refused when it cannot have been done.

    `outcome` is the answer, which tells the address that a new peer got.
    """
    name, fields = rule
    after, key = dict(state), fields["public_key"]
    if name == "create":
        if key not in state:
            address = fields.get("assigned_ip") or (outcome.assigned_ip if outcome else "any")
            after[key] = Peer("active", 25, fields.get("preshared_key"), address)
        return after
    if key not in state:
        raise Refused(wggw.NotFound)
    if name == "delete":
        del after[key]
    elif name == "rotate":
        new = fields["new_public_key"]
        if new != key and new in state:
            raise Refused(wggw.Conflict)
        after[new] = after.pop(key)
    elif name == "set_status":
        after[key] = state[key]._replace(status=fields["status"])
    else:
        values = {"persistent_keepalive": "keepalive", "preshared_key": "preshared_key"}
        given = {field: fields[name] for name, field in values.items() if name in fields}
        after[key] = state[key]._replace(**given)
    return after


def told(result: wggw.Outcome | wggw.GatewayError) -> wggw.Outcome:
    if isinstance(result, wggw.GatewayError):
        raise result
    return result


class Client:
    """Changes its own peers, and knows in which states they may be. `may_fail`: faults are on."""

    def __init__(self, name: object, keys: list[str], rng: random.Random, stats: Any) -> None:
        self.name, self.keys, self.rng, self.stats = name, keys, rng, stats
        self.states: list[State] = [{}]
        self.may_fail = False

    def _rule(self, kind: str, key: str) -> Rule:
        rng = self.rng
        about = {"public_key": key}
        if kind == "c":
            more = {"assigned_ip": f"10.7.0.{rng.randrange(2, 31)}"} if rng.random() < 0.4 else {}
            return "create", {**about, **more}
        if kind == "d":
            return "delete", about
        if kind == "r":
            return "rotate", {**about, "new_public_key": rng.choice(self.keys)}
        if kind == "p":
            return "update", {**about, "persistent_keepalive": rng.randrange(100)}
        if kind == "k":
            psk = rng.choice([None, a_key(("psk", rng.randrange(9)))])
            return "update", {**about, "preshared_key": psk}
        return "set_status", {**about, "status": {"s": "suspended", "a": "active"}[kind]}

    def play(self, world: World, kinds: str) -> None:
        with contextlib.suppress(Crash):
            for _ in range(OPERATIONS):
                if self.rng.random() < 0.1:
                    self._play_batch(world)
                else:
                    rule = self._rule(self.rng.choice(kinds), self.rng.choice(self.keys))
                    self.ask(world, rule)

    def ask(self, world: World, rule: Rule) -> None:
        self.settle(rule, submit(world.gateway, rule[0], **rule[1]))

    def _play_batch(self, world: World) -> None:
        rules = [self._rule(self.rng.choice("sa"), self.rng.choice(self.keys)) for _ in range(4)]
        names = {"suspended": "suspend", "active": "activate"}
        given = [
            (names[fields["status"]], {"public_key": fields["public_key"]}) for _, fields in rules
        ]
        for rule, result in zip(rules, batch(world.gateway, given), strict=True):
            self.settle(rule, functools.partial(told, result))

    def settle(self, rule: Rule, result: Callable[[], wggw.Outcome]) -> None:
        """Note what an answer says."""
        try:
            outcome = result()
        except (Lost, wggw.OutcomeUnknown):
            self.stats["open"] += 1
            for state in list(self.states):
                with contextlib.suppress(Refused):
                    self.states.append(follow(state, rule, None))
            return
        except wggw.GatewayError as error:
            self.stats["refused"] += 1
            self._check_refusal(rule, error)
            return
        self.stats["done"] += 1
        gone = rule[0] == "delete"
        key = rule[1].get("new_public_key", rule[1]["public_key"])
        before, self.states = self.states, []
        for state in before:  # after an open change there are some, and not all fit the answer
            with contextlib.suppress(Refused):
                after = follow(state, rule, outcome.peer)
                if gone or after[key] == Peer.of(outcome.peer):
                    self.states.append(after)
        assert self.states, (self.name, rule, before, outcome.peer)

    def _check_refusal(self, rule: Rule, error: wggw.GatewayError) -> None:
        """A refusal is one that the model knows, or rests on an address, or on a fault."""
        fitting = []
        for state in self.states:
            try:
                follow(state, rule, None)
            except Refused as refused:
                fits = isinstance(error, (refused.kind, wggw.Unavailable))
            else:
                # 16 peers of the clients, 6 of everybody and 11 of a desired state are more than
                # the 29 addresses that there are.
                none_left = isinstance(error, wggw.Unavailable) and "exhausted" in error.detail
                is_conflict = isinstance(error, wggw.Conflict)
                contested = rule[0] == "create" and (is_conflict or none_left)
                fits = contested or (isinstance(error, wggw.Unavailable) and self.may_fail)
            if fits:
                fitting.append(state)
        assert fitting, (self.name, rule, error.detail)
        self.states = fitting

    def compare(self, peers: dict[str, wggw.Peer]) -> None:
        """The rows of its keys are one of the states that it may have; from now on that one."""
        there = {key: Peer.of(peers[key]) for key in self.keys if key in peers}
        blurred = {key: peer._replace(assigned_ip="any") for key, peer in there.items()}
        for state in self.states:
            known = {
                key: (blurred if peer.assigned_ip == "any" else there).get(key)
                for key, peer in state.items()
            }
            if known == state and there.keys() == state.keys():
                self.states = [there]
                return
        raise AssertionError((self.name, "has", there, "instead of one of", self.states))


class History:
    def __init__(self, seed: int, directory: Path) -> None:
        self.rng = random.Random(seed)
        self.seed, self.directory = seed, directory
        self.stats: Counter[str] = Counter()
        self.settings = {"WG_IPV4_SUBNET": "10.7.0.0/27", "WG_IPV6_SUBNET": "fd07::/64"}
        if seed % 2:
            self.settings["SNAPSHOT_KEY"] = "a secret of some length"
        if seed % 3 == 0:
            self.settings["DURABILITY"] = "interval"
        if seed % 4 == 0:
            self.settings["PRIVACY_SCRUB"] = "180"
        self.clients = [
            Client(
                n, [a_key((n, k)) for k in range(KEYS)], random.Random(seed * 97 + n), self.stats
            )
            for n in range(CLIENTS)
        ]
        self.base = Client("base", BASE, random.Random(seed * 97 + 50), self.stats)
        self.extra: list[dict[str, int]] = [{}]  # what the desired states may have left
        self.keepalive = [25]  # and what they may have said of everybody's peers
        self.moved: Counter[int] = Counter()  # bytes by a peer's id
        self.ended = threading.Event()  # the clients have
        self.failures: list[BaseException] = []
        self.world = self._new_world(directory / "0")

    def _new_world(self, files: Path) -> World:
        files.mkdir(exist_ok=True)
        disk = FakeDisk(mirror=files.with_name(files.name + ".mirror"))
        return World(files, disk, **self.settings).open()

    # --- one round -------------------------------------------------------------------------------

    def play(self) -> Counter[str]:
        for number in range(ROUNDS):
            self.round(number)
        self.world.close()
        return self.stats

    def round(self, number: int) -> None:
        world, rng = self.world, self.rng
        bulk = rng.choice(["", "", "desired", "desired", "import"])
        if bulk:
            self._settle_base()
        faults = rng.choice(["none", "disk", "interface", "both"])
        crash = rng.choice(["no", "no", "disk", "interface", "end"])
        self._set_faults(faults, crash)
        self.drifts = rng.random() < 0.5
        self.may_fail = faults != "none" or self.drifts
        for client in (*self.clients, self.base):
            client.may_fail = self.may_fail
        self.ended.clear()
        work: list[Callable[[], None]] = [self._disk_timer, self._interface_timer, self._traffic]
        if bulk == "desired":
            clients = [self.base]
            work.append(self._desired_states)
        elif bulk == "import":
            clients = []
            work.append(self._import)
        else:
            clients = self.clients
        helpers = [self._thread(job) for job in work]
        players = [
            self._thread(lambda c=client: c.play(world, "sapk" if bulk else "ccdrpksa"))
            for client in clients
        ]
        for thread in players:
            thread.join(60)
        for job, thread in zip(work[3:], helpers[3:], strict=True):
            thread.join(60)
            assert not thread.is_alive(), job
        if not world.crashed:
            self._calm()
        self.ended.set()
        for thread in (*players, *helpers):
            thread.join(60)
            assert not thread.is_alive(), (self.seed, number, thread)
        if self.failures:
            raise self.failures[0]
        self.stats[f"faults: {faults}"] += 1
        if world.crashed or crash == "end":
            self.stats["crashes"] += 1
            self._start_again()
        else:
            self._rest()
        self._check(number)

    def _thread(self, job: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                job()
            except Crash:
                pass
            except BaseException as error:
                self.failures.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def _set_faults(self, faults: str, crash: str) -> None:
        disk, backend, rng = self.world.disk, self.world.backend, self.rng
        disk.faults.rng = random.Random(rng.random())
        backend.faults.rng = random.Random(rng.random())
        if faults in ("disk", "both"):
            chance = rng.choice([0.01, 0.05, 0.3])
            kinds = rng.choice([DISK_CALLS, ("fsync", "truncate"), ("write", "truncate")])
            disk.faults.chance = dict.fromkeys(kinds, chance)
        if faults in ("interface", "both"):
            backend.faults.chance = {"apply": 0.05, "read": 0.05, "setup": 0.1, "alive": 0.02}
        if crash == "disk":
            disk.crash(nth=rng.randrange(1, 300), where=rng.choice(["before", "middle", "after"]))
        elif crash == "interface":
            backend.crash(nth=rng.randrange(1, 120), where=rng.choice(["before", "after"]))

    def _calm(self) -> None:
        self.world.disk.heal()
        self.world.backend.heal()

    def _rest(self) -> None:
        """What the timers do within a second when nothing fails any more."""
        gateway = self.world.gateway
        gateway.lander.heal()
        gateway.projection.supervise()
        gateway.projection.sample()
        gateway.limits.expire()

    def _start_again(self) -> None:
        world = self.world
        world.crash()
        self._calm()
        target = self.directory / f"remains{self.stats['crashes']}"
        kinds = world.disk.remains(world.directory, target)
        chosen = kinds[0] if world.config.durability != "commit" else self.rng.choice(kinds)
        self.stats[f"start from {chosen.name}"] += 1
        backends = world.backends
        if chosen.name != "killed":  # the machine was off
            for backend in backends.values():
                backend.restart()
        disk = FakeDisk(mirror=target / "mirror")
        self.world = World(chosen, disk, backends, **self.settings)
        self.world.now = world.now
        self.world.open()
        self.world.gateway.projection.sample()

    # --- what runs beside the clients ------------------------------------------------------------

    def _disk_timer(self) -> None:
        rng, gateway = random.Random(self.rng.random()), self.world.gateway
        while not self.ended.is_set():
            gateway.lander.heal()
            if rng.random() < 0.3:
                gateway.lander.snapshot()
            if rng.random() < 0.3:
                gateway.lander.flush()
            time.sleep(rng.random() * 0.01)

    def _interface_timer(self) -> None:
        rng, gateway = random.Random(self.rng.random()), self.world.gateway
        while not self.ended.is_set():
            job = rng.choice(["supervise", "supervise", "sample", "reconcile", "drift", "expire"])
            with contextlib.suppress(wggw.BackendError):
                if job == "drift":
                    if self.drifts:
                        self._drift(rng)
                elif job == "expire":
                    gateway.limits.expire()
                else:
                    getattr(gateway.projection, job)()
            time.sleep(rng.random() * 0.01)

    def _drift(self, rng: random.Random) -> None:
        """Somebody else works on the interface."""
        backend = self.world.backend
        there = list(backend.peers)
        what = rng.choice(["drop", "foreign", "restart", "port", "address"])
        if what == "drop" and there:
            backend.drop(rng.choice(there))
        elif what == "foreign":
            backend.put(a_key("foreign"), "192.0.2.1")
        elif what == "restart" and rng.random() < 0.3:
            backend.restart()
        elif what == "port" and backend.device:
            backend.device = backend.device._replace(listen_port=9)
        elif what == "address" and there:
            backend.put(rng.choice(there), f"10.7.0.{rng.randrange(2, 31)}")

    def _traffic(self) -> None:
        rng, world = random.Random(self.rng.random()), self.world
        while not self.ended.is_set():
            there = list(world.backend.peers)
            if there:
                world.gateway.run(functools.partial(self._move, rng, rng.choice(there)))
            time.sleep(0.002)

    def _move(self, rng: random.Random, key: str) -> None:
        """Some traffic of a peer that is on the interface and not just being changed there."""
        peer = self.world.store.get(key)
        if peer is None or key in self.world.gateway.ledger.in_flight:
            return
        rx, tx = rng.randrange(1000), rng.randrange(1000)
        with contextlib.suppress(KeyError):
            self.world.backend.move(key, rx, tx, int(self.world.now) - rng.randrange(400))
            self.moved[peer.id] += rx + tx

    # --- whole states ----------------------------------------------------------------------------

    def _settle_base(self) -> None:
        """Everybody's peers are there, and the clients' are not, so that lists may name all."""
        gateway = self.world.gateway
        for client in self.clients:
            for key in list(client.states[0]):
                client.settle(("delete", f := {"public_key": key}), submit(gateway, "delete", **f))
        for key in BASE:
            fields = {"public_key": key}
            self.base.settle(("create", fields), submit(gateway, "create", **fields))
        self.keepalive = [25]
        self._desire(self.extra[0], 25)

    def _desire(self, extra: dict[str, int], keepalive: int) -> None:
        """A desired state: everybody's peers, and of the others those of `extra`."""
        named = {
            key: wggw.Desired(key, {"public_key": key, "dns": f"d{keepalive % 3 + 1}"})
            for key in BASE
        }
        for key, value in extra.items():
            fields: dict[str, Any] = {"public_key": key, "persistent_keepalive": value}
            if value % 3 == 0:
                fields["assigned_ip"] = f"10.7.0.{2 + value % 29}"
            named[key] = wggw.Desired(key, fields)
        before, said = list(self.extra), list(self.keepalive)
        try:
            self.world.gateway.sync(named, False, True)
        except (Lost, wggw.OutcomeUnknown):
            self.extra, self.keepalive = [*before, extra], [*said, keepalive]
            raise Crash from None
        except Crash:
            self.extra, self.keepalive = [*before, extra], [*said, keepalive]
            raise
        except wggw.GatewayError as error:
            self.stats["desired refused"] += 1
            taken = isinstance(error, (wggw.Conflict, wggw.Invalid))
            assert taken or (isinstance(error, wggw.Unavailable) and self.may_fail), error.detail
            return
        self.stats["desired done"] += 1
        self.extra, self.keepalive = [extra], [keepalive]

    def _desired_states(self) -> None:
        rng = random.Random(self.rng.random())
        for _ in range(4):
            chosen = rng.sample(EXTRA, rng.randrange(len(EXTRA)))
            numbers = rng.sample(range(100), len(chosen))
            self._desire(dict(zip(chosen, numbers, strict=True)), rng.randrange(1000))

    def _import(self) -> None:
        """Export, change, import: what is there afterwards is what was exported, or the change."""
        gateway = self.world.gateway
        data = gateway.export()
        exported = dict(self.base.states[0])
        client = self.base
        client.play(self.world, "sapk")
        try:
            gateway.import_(data)
        except (Lost, wggw.OutcomeUnknown):
            client.states = [*client.states, exported]
            raise Crash from None
        except Crash:
            client.states = [*client.states, exported]
            raise
        except wggw.GatewayError as error:
            self.stats["import refused"] += 1
            assert isinstance(error, wggw.Unavailable) and self.may_fail, error.detail
            return
        self.stats["imported"] += 1
        client.states = [exported]

    # --- afterwards ------------------------------------------------------------------------------

    def _check(self, number: int) -> None:
        place = f"seed {self.seed}, round {number}"
        try:
            peers = {peer.public_key: peer for peer in check_at_rest(self.world)}
            for client in (*self.clients, self.base):
                client.compare(peers)
            extra = {k: peers[k].persistent_keepalive for k in EXTRA if k in peers}
            assert extra in self.extra, (extra, self.extra)
            self.extra = [extra]
            known = {*BASE, *EXTRA, *(key for client in self.clients for key in client.keys)}
            assert peers.keys() <= known
            for peer in peers.values():
                total = self.world.store.traffic(peer.id)
                assert total.rx_bytes + total.tx_bytes <= self.moved[peer.id], "counted twice"
            if self.rng.random() < 0.3:
                check_restart_changes_nothing(self.world)
        except AssertionError as error:
            raise AssertionError(f"{place}: {error}") from error


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Thousands of faults are logged as errors, as they should be."""
    wggw.LOG.setLevel(logging.CRITICAL)
    yield
    wggw.LOG.setLevel(logging.NOTSET)


def play(seed: int, directory: Path) -> Counter[str]:
    directory.mkdir()
    try:
        return History(seed, directory).play()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.timeout(3600)
def test_what_was_answered_is_so_after_every_history(tmp_path: Path) -> None:
    given = os.environ.get("WGGW_SEED")
    new = 1 if os.environ.get("CI") else int(time.time())  # people's runs take new ones
    first = int(given) if given else new
    until = time.monotonic() + (0 if given else SECONDS)
    total: Counter[str] = Counter()
    seed = first
    while True:
        print("seed", seed)
        total += play(seed, tmp_path / str(seed))
        seed += 1
        if time.monotonic() >= until:
            break
    print(f"{seed - first} histories from seed {first}:", dict(total))
    assert given or total["done"] > 100


def test_the_model_knows_that_addresses_may_be_exhausted(tmp_path: Path) -> None:
    """A client that has met no fault is refused with "unavailable", and does not have the peer."""
    keys = [a_key("first"), a_key("second")]
    client = Client("any", keys, random.Random(0), Counter())
    world = World(tmp_path, WG_IPV4_SUBNET="10.7.0.0/30", WG_IPV6_SUBNET="").open()
    for key in keys:
        client.ask(world, ("create", {"public_key": key}))
    assert client.stats == {"done": 1, "refused": 1}
    client.compare({peer.public_key: peer for peer in check_at_rest(world)})
    world.close()
