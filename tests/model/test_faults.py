"""Every kind of operation with a fault at each of its calls of the disk.

SQLite's way: the first call fails, then the second, and so on up to the last one; once, and
from there on; and at each call the process ends, and what a KILL or a power failure leaves behind
is started from. What was acknowledged is there then, what was refused is not, everything else is
there as a whole or not at all, and the laws of laws.py hold.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fakes import Crash, FakeDisk, Lost, World, batch, do
from harness import LONG, a_key, some
from laws import check_at_rest, rows

import wggw

Act = Callable[[World], Any]


def nothing(world: World) -> None:
    pass


def change(rule: str, **fields: Any) -> Act:
    return lambda world: do(world.gateway, rule, **fields)


def desired(world: World) -> None:
    """One goes, one is new, two give each other their addresses, one stays."""
    fields = [
        {"public_key": a_key(2), "assigned_ip": "10.7.0.4"},
        {"public_key": a_key(3), "assigned_ip": "10.7.0.3"},
        {"public_key": a_key("new"), "status": "suspended"},
        {"public_key": a_key("suspended")},
    ]
    named = {given["public_key"]: wggw.Desired(str(n), given) for n, given in enumerate(fields)}
    world.gateway.sync(named, False, True)


def export(world: World) -> None:
    """A state to come back to, and changes since."""
    world.directory.with_name("exported").write_bytes(world.gateway.export())
    do(world.gateway, "delete", public_key=a_key(1))
    do(world.gateway, "create", public_key=a_key(7))
    do(world.gateway, "set_status", public_key=a_key(2), status="suspended")


def import_(world: World) -> None:
    world.gateway.import_(world.directory.with_name("exported").read_bytes())


def move(world: World) -> None:
    for number in (1, 2, 3):
        world.backend.move(a_key(number), 1000 * number, number, int(world.now) - 900)


def sample(world: World) -> None:
    with contextlib.suppress(wggw.BackendError):
        world.gateway.projection.sample()


def made_anew(world: World) -> None:
    """Counted, and then the interface was made anew."""
    move(world)
    sample(world)
    world.backend.restart()


def reconcile(world: World) -> None:
    world.gateway.projection.reconcile()


def expire(world: World) -> None:
    world.now += 100
    world.gateway.limits.expire()


def several(world: World) -> None:
    operations: list[wggw.BatchOperation] = [
        ("create", {"public_key": a_key(8)}),
        ("suspend", {"public_key": a_key(8)}),
        ("delete", {"public_key": a_key(1)}),
    ]
    for result in batch(world.gateway, operations):
        if isinstance(result, wggw.GatewayError):
            raise result


def new_parameters(world: World) -> None:
    state = world.gateway.obfuscated().obfuscation
    assert state is not None
    world.gateway.change_obfuscation(state._replace(parameters=OTHER), True)


class Operation(NamedTuple):
    """`whole`: it is refused or done as a whole. `settings` of the gateway that it needs."""

    act: Act
    prepare: Act = nothing
    whole: bool = True
    settings: dict[str, str] = {}


AWG = {
    "AWG_INTERFACE": "awg0",
    "AWG_IPV4_SUBNET": "10.8.0.0/24",
    "AWG_PORT": "51821",
}
OTHER = wggw.parse_obfuscation({"Jc": 5, "Jmin": 40, "Jmax": 70, "S1": 30, "S2": 50}).parameters
SCRUB = {"PRIVACY_SCRUB": "180"}
OPERATIONS = {
    "create": Operation(change("create", public_key=a_key("new"), preshared_key=a_key("psk"))),
    "create at": Operation(change("create", public_key=a_key("new"), assigned_ip="10.7.0.20")),
    "suspend": Operation(change("set_status", public_key=a_key(1), status="suspended")),
    "activate": Operation(change("set_status", public_key=a_key("suspended"), status="active")),
    "update": Operation(change("update", public_key=a_key(2), preshared_key=a_key("psk"))),
    "rotate": Operation(change("rotate", public_key=a_key(2), new_public_key=a_key("new"))),
    "delete": Operation(change("delete", public_key=a_key(2))),
    "batch": Operation(several, whole=False),
    "desired state": Operation(desired),
    "import": Operation(import_, export),
    "parameters": Operation(new_parameters, settings=AWG),
    "expiry": Operation(expire),
    "sample": Operation(sample, move),
    "quota": Operation(sample, lambda world: (change_quota(world), move(world)), whole=False),
    "scrub": Operation(sample, move, settings=SCRUB),
    "repair": Operation(reconcile, made_anew),
    "snapshot": Operation(lambda world: world.gateway.lander.snapshot()),
    "stop": Operation(World.close),
    "start": Operation(World.open, World.close),
    "start after a kill": Operation(World.open, World.crash),
}


def change_quota(world: World) -> None:
    do(world.gateway, "update", public_key=a_key(1), quota_bytes=500)


def state(store: wggw.Store) -> dict[str, Any]:
    """What an operation may change, by keys: ids of refused peers are not used again.

    That counters begin anew is no change of a total.
    """
    held = rows(store)
    keys = {peer.id: peer.public_key for peer in held["peers"]}
    return {
        "peers": {peer.public_key: tuple(peer[1:]) for peer in held["peers"]},
        "traffic": {keys[row[0]]: row[1:3] for row in held["traffic"] if row[1] or row[2]},
        "released": held["released"],
        "settings": held["settings"],
    }


class Stage:
    """Worlds that all begin with the same files and interfaces."""

    def __init__(self, directory: Path, operation: Operation, **settings: str) -> None:
        self.directory, self.operation = directory, operation
        self.settings = {
            "WG_IPV4_SUBNET": "10.7.0.0/27",
            "WG_IPV6_SUBNET": "fd07::/64",
            **operation.settings,
            **settings,
        }
        self.number = 0
        world = World(self._files("first"), **self.settings)
        world.open()
        for number in (1, 2, 3):
            do(world.gateway, "create", public_key=a_key(number), protocol="dual")
        world.gateway.lander.snapshot()
        soon = int(world.now) + 50
        do(world.gateway, "create", public_key=a_key("suspended"), expires_at=soon)
        do(world.gateway, "set_status", public_key=a_key("suspended"), status="suspended")
        do(world.gateway, "create", public_key=a_key("gone"))
        do(world.gateway, "delete", public_key=a_key("gone"))
        do(world.gateway, "create", public_key=a_key("soon"), expires_at=soon)
        world.crash()
        self.first = world.directory
        plain = self.begin()
        if plain.is_open:
            self.before = state(plain.store)
        calls = plain.disk.calls
        operation.act(plain)
        self.calls = plain.disk.calls - calls
        assert self.calls
        self.after = state(plain.store)
        if operation.act is World.open or not hasattr(self, "before"):
            self.before = self.after
        plain.disk.heal()
        if plain.is_open:
            plain.crash()

    def _files(self, name: object) -> Path:
        directory = self.directory / str(name)
        directory.mkdir()
        return directory

    def begin(self) -> World:
        """A world in which the operation is about to be done."""
        self.number += 1
        files = self.directory / str(self.number) / "files"
        shutil.copytree(self.first, files)
        world = World(files, FakeDisk(mirror=files.with_name("mirror")), **self.settings)
        world.open()
        self.operation.prepare(world)
        return world

    def act(self, world: World, ends: bool = False) -> str:
        """Do it, as long as it takes; "done", "refused", or "open" when the process ended.

        `ends`: it ends when there is no answer for a while; else the disk works again.
        """
        told: list[str] = []

        def run() -> None:
            try:
                self.operation.act(world)
                told.append("done")
            except (Lost, Crash, wggw.OutcomeUnknown):
                told.append("open")
            except (wggw.GatewayError, wggw.BackendError, wggw.StartError):
                told.append("refused")

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(0.3)
        if thread.is_alive() and not world.crashed:  # it waits for the disk to work again
            if ends:
                world.crash()
            else:
                world.disk.heal()
                world.gateway.lander.heal()
        thread.join(30)
        assert not thread.is_alive()
        return told[0]

    def check(self, world: World, told: str) -> None:
        found = state(world.store)
        check_at_rest(world)
        if not self.operation.whole:
            return
        if told == "done":
            allowed = [self.after]
            if self.operation.act in (sample, expire):  # nobody is told of these
                allowed.append(self.before)
        else:
            allowed = [self.before] if told == "refused" else [self.before, self.after]
        assert found in allowed, (told, found, allowed)

    def rest(self, world: World) -> None:
        """What the timers do when the disk works again."""
        world.disk.heal()
        if not world.is_open:
            world.open()
        world.gateway.lander.heal()
        world.gateway.projection.supervise()
        sample(world)

    def again(self, world: World) -> None:
        """What was refused can be done afterwards."""
        self.operation.act(world)
        self.rest(world)
        assert state(world.store) == self.after
        check_at_rest(world)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    wggw.LOG.setLevel(logging.CRITICAL)
    yield
    wggw.LOG.setLevel(logging.NOTSET)


SEALED = {"SNAPSHOT_KEY": "a secret of some length"}
FORMS = {"clear": {}, "sealed": SEALED, "interval": {"DURABILITY": "interval"}}
CASES = [(name, form) for name in OPERATIONS for form in FORMS]
CHOSEN = CASES if LONG else some([(n, f) for n, f in CASES if f == "clear"], 7)


@pytest.mark.parametrize("fault", ["once", "full", "forever"])
@pytest.mark.parametrize(("name", "form"), CHOSEN)
def test_a_disk_fault_at_each_call(tmp_path: Path, name: str, form: str, fault: str) -> None:
    stage = Stage(tmp_path, OPERATIONS[name], **FORMS[form])
    for nth in some(range(1, stage.calls + 1), 3):
        world = stage.begin()
        error = errno.ENOSPC if fault == "full" else errno.EIO
        world.disk.fail(nth=nth, forever=fault == "forever", error=error)
        told = stage.act(world)
        assert world.disk.faults.hits
        stage.rest(world)
        stage.check(world, told)
        if told == "refused" and stage.operation.whole and stage.operation.act != World.open:
            stage.again(world)
        world.crash()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(("name", "form"), CHOSEN)
def test_a_crash_at_each_call(tmp_path: Path, name: str, form: str) -> None:
    """Before it, in the middle of it, behind it; and after a fault that was answered."""
    stage = Stage(tmp_path, OPERATIONS[name], **FORMS[form])
    for where in ("before", "middle", "after", "fault"):
        for nth in some(range(1, stage.calls + 1), 2):
            world = stage.begin()
            if where == "fault":
                world.disk.fail(nth=nth)
            else:
                world.disk.crash(nth=nth, where=where)
            told = stage.act(world)
            if not world.disk.faults.hits:  # the last sample of a stop did not come in time
                assert nth == stage.calls
            world.crash()
            world.disk.heal()
            target = tmp_path / f"{where}{nth}"
            remains = world.disk.remains(world.directory, target)
            if form == "interval":  # a power failure may take the last second
                remains = remains[:1]
            for kind in some(remains, 2):
                found = World(kind, backends=world.backends, **stage.settings)
                found.now = world.now
                found.open()
                stage.check(found, told)
                found.crash()
            shutil.rmtree(target)


DEAD = [("write", "truncate"), ("fsync",), ("fsync", "truncate")]


@pytest.mark.parametrize("kinds", DEAD, ids="-".join)
@pytest.mark.parametrize(
    "name", some(["create", "suspend", "delete", "rotate", "desired state"], 2)
)
def test_what_a_disk_refused_that_could_not_take_it_back_is_not_answered(
    tmp_path: Path, name: str, kinds: tuple[str, ...]
) -> None:
    """Its line may still be there when the process or the machine ends."""
    stage = Stage(tmp_path, OPERATIONS[name])
    world = stage.begin()
    world.disk.fail(*kinds, forever=True)
    world.disk.torn = False
    told = stage.act(world, ends=True)
    if world.is_open:
        world.crash()
    for kind in world.disk.remains(world.directory, tmp_path / "remains"):
        found = World(kind, backends=world.backends, **stage.settings)
        found.open()
        stage.check(found, told)
        found.crash()
