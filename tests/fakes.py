"""A disk and an interface that fail on command, and a whole gateway in this process around them.

    world = build(tmp_path)                       # an empty gateway of one interface
    peer = do(world.gateway, "create", public_key=a_key(1)).peer
    world.disk.fail("fsync")                      # the next one, once
    world.backend.fail("apply", forever=True)
    world.reopen()                                # an orderly stop and a start
    world.crash(); world.reopen()                 # a KILL and a start

Everything goes through the same code as in the real program: the owner of the rows is who holds
one lock, `do` waits for the landing as a connection does.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import stat
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from harness import API_KEY

import wggw

T = TypeVar("T")
NOON = 1_800_000_000.0  # where a world's clock begins, Unix seconds
DISK_CALLS = ("write", "fsync", "truncate", "rename", "unlink", "link")
BACKEND_CALLS = ("apply", "read", "setup", "alive")


class Crash(BaseException):
    """The process ends here: no handler for errors may run on."""


class Lost(wggw.Unavailable):
    """What a caller hears whose gateway crashed: nothing, so both is possible."""


class Faults:
    """When a call fails. `calls` counts them by kind, `total` all of them.

    `chance` is the probability that a call of a kind fails, by kind, drawn from `rng`.
    """

    def __init__(self, kinds: Sequence[str]) -> None:
        self.kinds = kinds
        self.calls: Counter[str] = Counter()
        self.hits = 0
        self.crashed = threading.Event()
        self.rng = random.Random(0)
        self.chance: dict[str, float] = {}
        self.before: Callable[[str], None] = lambda kind: None  # may block, or raise
        self.on_crash: Callable[[], None] = lambda: None
        self._plans: list[list[Any]] = []  # kinds, calls left before it, forever, what
        self._lock = threading.Lock()

    @property
    def total(self) -> int:
        return sum(self.calls.values())

    def plan(self, kinds: Sequence[str], nth: int, forever: bool, what: Any) -> None:
        self._plans.append([kinds or self.kinds, nth - 1, forever, what])

    def heal(self) -> None:
        """Nothing that was planned fails any more."""
        with self._lock:
            self._plans.clear()
            self.chance.clear()

    def crash(self) -> NoReturn:
        self.crashed.set()
        self.on_crash()
        raise Crash

    def next(self, kind: str, default: Any) -> Any:
        """What is to happen instead of this call, None: nothing."""
        self.before(kind)
        with self._lock:
            if self.crashed.is_set():
                raise Crash
            self.calls[kind] += 1
            for plan in list(self._plans):
                kinds, left, forever, what = plan
                if kind not in kinds:
                    continue
                plan[1] -= 1
                if left > 0:
                    continue
                if not forever:
                    self._plans.remove(plan)
                self.hits += 1
                return what
            if self.rng.random() < self.chance.get(kind, 0.0):
                self.hits += 1
                return default
        return None


class FakeDisk(wggw.Disk):
    """Real files. Calls fail as told; a write that fails has written half of it when `torn`.

    Nothing waits for the platters unless `real`. With `mirror`, a directory beside the files,
    remains() says what a power failure would leave behind.
    """

    def __init__(self, mirror: Path | None = None, real: bool = False) -> None:
        self.faults = Faults(DISK_CALLS)
        self.torn = True
        self.error = errno.EIO
        self._real = real
        self._mirror = mirror
        self._synced: dict[int, int] = {}  # inode -> bytes that are known to be on disk
        self._dropped: dict[int, bytes] = {}  # inode -> what a truncation took, not yet synced

    @property
    def calls(self) -> int:
        return self.faults.total

    def fail(
        self, *kinds: str, nth: int = 1, forever: bool = False, error: int | None = None
    ) -> None:
        """The nth call of these kinds (none named: of any) from now on fails, or all from then."""
        self.faults.plan(kinds, nth, forever, self.error if error is None else error)

    def crash(self, *kinds: str, nth: int = 1, where: str = "before") -> None:
        """The process ends `before`, in the `middle` of, or `after` that call."""
        self.faults.plan(kinds, nth, False, where)

    def heal(self) -> None:
        self.faults.heal()

    @contextlib.contextmanager
    def _call(self, kind: str, handle: int = -1, data: bytes | memoryview = b"") -> Iterator[None]:
        what = self.faults.next(kind, self.error)
        if what is not None and what != "after":
            if kind == "write" and (what == "middle" or (isinstance(what, int) and self.torn)):
                os.write(handle, bytes(data[: len(data) // 2]))
            if isinstance(what, str):
                self.faults.crash()
            raise OSError(what, os.strerror(what))
        try:
            yield
        finally:
            if what == "after":
                self.faults.crash()

    def write(self, handle: int, data: bytes | memoryview) -> None:
        with self._call("write", handle, data):
            super().write(handle, data)

    def fsync(self, handle: int) -> None:
        with self._call("fsync"):
            if self._real:
                super().fsync(handle)
            if self._mirror is None:
                return
            found = os.fstat(handle)
            if stat.S_ISDIR(found.st_mode):
                shutil.rmtree(self._mirror, ignore_errors=True)
                source = os.readlink(f"/proc/self/fd/{handle}")
                shutil.copytree(source, self._mirror, copy_function=os.link)
            else:
                self._synced[found.st_ino] = found.st_size
                self._dropped.pop(found.st_ino, None)

    def truncate(self, handle: int, size: int) -> None:
        with self._call("truncate"):
            found = os.fstat(handle)
            if self._mirror is not None:
                self._dropped[found.st_ino] = os.pread(handle, found.st_size, size)
            super().truncate(handle, size)

    def rename(self, old: str, new: str) -> None:
        with self._call("rename"):
            super().rename(old, new)

    def unlink(self, path: str) -> None:
        with self._call("unlink"):
            super().unlink(path)

    def link(self, old: str, new: str) -> None:
        with self._call("link"):
            super().link(old, new)

    def adopt(self, files: Path) -> None:
        """What is there before the first call is on disk."""
        if not self.calls and files.exists():
            self._synced = {file.stat().st_ino: file.stat().st_size for file in files.iterdir()}

    def remains(self, files: Path, target: Path) -> list[Path]:
        """What may be found after a crash, each as a directory of its own below `target`.

        The process was killed: all as it is. The power went: what was synced, with the names as
        they are or as they were when the directory was synced; what was written and not synced is
        gone, or is there, and a truncation that was not synced did not happen.
        """
        assert self._mirror is not None
        made = []
        for name, source, kept in (
            ("killed", files, "all"),
            ("synced", files, "synced"),
            ("old names", self._mirror, "synced"),
            ("untruncated", files, "untruncated"),
        ):
            directory = target / name
            directory.mkdir(parents=True)
            for file in (source if source.exists() else files).iterdir():
                content, inode = file.read_bytes(), file.stat().st_ino
                if kept == "synced":
                    content = (content + self._dropped.get(inode, b""))[
                        : self._synced.get(inode, 0)
                    ]
                elif kept == "untruncated":
                    content += self._dropped.get(inode, b"")
                (directory / file.name).write_bytes(content)
            made.append(directory)
        return made


class FakeBackend(wggw.MemoryBackend):
    """An interface as WireGuard is one: with its own key and port, counters and handshakes.

    `refusing` are keys whose changes are refused. `unreadable` are keys that a reading cannot
    decode. `changes` counts what apply() was given, `peers` is what is there.
    """

    def __init__(self) -> None:
        super().__init__()
        self._owners: dict[bytes, bytes] = {}  # allowed IP -> public key
        self.faults = Faults(BACKEND_CALLS)
        self.changes = 0
        self.setups = 0
        self.link: wggw.Link | None = None
        self.device: wggw.Device | None = None
        self.is_up = True
        self.refusing: set[str] = set()
        self.unreadable: set[str] = set()
        self.counters: dict[bytes, tuple[int, int, int, bool]] = {}  # as PeerState has them
        self._guard = threading.RLock()

    # --- what tests do to it ---------------------------------------------------------------------

    def fail(
        self,
        *kinds: str,
        nth: int = 1,
        forever: bool = False,
        what: str = "refused",
    ) -> None:
        """The nth call of these kinds (none named: of any) from now on fails, or all from then.

        `what`: "refused", nothing was done; "half", half of the changes were; "lost", everything
        was done and the answer is lost; "hangs", nothing is known (NoAnswer); "unspoken", it does
        not know the parameters (ParametersRefused).
        """
        self.faults.plan(kinds, nth, forever, what)

    def crash(self, *kinds: str, nth: int = 1, where: str = "before") -> None:
        """The process ends `before` or `after` that call; the interface stays as it is."""
        self.faults.plan(kinds, nth, False, where)

    def heal(self) -> None:
        self.faults.heal()

    def move(self, key: str, rx: int, tx: int = 0, handshake: int = 0) -> None:
        """The peer sends and receives, and may have a handshake at that time (Unix seconds)."""
        with self._guard:
            before = self.counters[wggw.decode_key(key)]
            after = (handshake or before[0], before[1] + rx, before[2] + tx, True)
            self.counters[wggw.decode_key(key)] = after

    def put(self, key: str, *addresses: str, psk: bytes = b"") -> None:
        """Somebody else sets a peer on the interface."""
        raw = wggw.decode_key(key)
        networks = tuple(sorted(map(wggw.pack_network, addresses)))
        with self._guard:
            self._do([wggw.Change(raw, wggw.WirePeer(raw, psk, networks))])

    def drop(self, key: str) -> None:
        with self._guard:
            self._do([wggw.Change(wggw.decode_key(key), None)])

    def restart(self) -> None:
        """The interface is made anew: without peers, its counters at 0."""
        with self._guard:
            self._peers.clear()
            self._owners.clear()
            self.counters.clear()

    def device_is_foreign(self) -> bool:
        """Whether key, port or parameters are not those of the last setup()."""
        return self.link is not None and wggw.Reading(self.device, 0, [], set()).device_differs(
            self.link
        )

    @property
    def peers(self) -> dict[str, wggw.WirePeer]:
        with self._guard:
            return {wggw.encode_key(key): peer for key, peer in self._peers.items()}

    # --- as a backend ----------------------------------------------------------------------------

    def _check(self, kind: str) -> str | None:
        what: str | None = self.faults.next(kind, self.faults.rng.choice(KINDS_OF_FAULT))
        if what in ("before", "middle"):
            self.faults.crash()
        if what == "hangs":
            raise wggw.NoAnswer(f"{kind}: no answer, as told")
        if what == "unspoken":
            raise wggw.ParametersRefused(f"{kind}: the parameters are not known, as told")
        if what in ("refused", "half", "lost") and kind != "apply":
            raise wggw.BackendError(f"{kind} failed, as told")
        return what

    def _end(self, what: str | None) -> None:
        if what == "after":
            self.faults.crash()
        if what is not None:
            raise wggw.BackendError("apply failed, as told")

    def setup(self, link: wggw.Link | None = None, make: bool = True) -> None:
        what = self._check("setup")
        if not make and not self.is_up:
            raise wggw.BackendError("the interface is gone")
        self.link = link or self.link
        if self.link is not None:
            self.device = self.link.device
        self.is_up = True
        self.setups += 1
        self._end(what)

    def alive(self) -> bool:
        self._end(self._check("alive"))
        return self.is_up

    def apply(self, changes: Sequence[wggw.Change]) -> None:
        what = self._check("apply")
        with self._guard:
            refused = {wggw.decode_key(key) for key in self.refusing}
            if what == "refused" or any(change.public_key in refused for change in changes):
                raise wggw.BackendError("the change was refused, as told")
            done = changes[: len(changes) // 2] if what == "half" else changes
            self.changes += len(done)
            self._do(done)
        self._end(what)

    def _do(self, changes: Sequence[wggw.Change]) -> None:
        for key, peer in changes:
            if key in self._peers:
                for network in self._peers[key].allowed_ips:
                    del self._owners[network]
            super().apply([wggw.Change(key, peer)])
            if peer is None:
                self.counters.pop(key, None)
            else:
                self._take_allowed_ips(peer)
                self.counters.setdefault(key, (0, 0, 0, False))

    def _take_allowed_ips(self, peer: wggw.WirePeer) -> None:
        """As in WireGuard, an allowed IP moves to the peer that was set last."""
        for network in peer.allowed_ips:
            loser = self._peers.get(self._owners.get(network, b""))
            if loser is not None:
                kept = tuple(other for other in loser.allowed_ips if other != network)
                self._peers[loser.public_key] = loser._replace(allowed_ips=kept)
            self._owners[network] = peer.public_key

    def read(self, known: Container[int]) -> wggw.Reading:
        self._end(self._check("read"))
        with self._guard:
            hidden = {wggw.decode_key(key) for key in self.unreadable}
            states = [
                wggw.PeerState(peer, *self.counters[key])
                for key, peer in self._peers.items()
                if key not in hidden
            ]
            total = len(self._peers)
        marked = [(hash(state), state) for state in states]
        changed = [(mark, state) for mark, state in marked if mark not in known]
        same = {mark for mark, _ in marked if mark in known}
        return wggw.Reading(self.device, total, changed, same, total - len(states))


KINDS_OF_FAULT = ("refused", "half", "lost", "hangs")


class World:
    """A gateway with its files in `directory`, its disk, interfaces and clock.

    The interfaces outlive crash() and reopen(), as the files do.
    """

    def __init__(
        self,
        directory: Path,
        disk: FakeDisk | None = None,
        backends: Mapping[str, FakeBackend] | None = None,
        **settings: str,
    ) -> None:
        self.directory = directory
        self.disk = disk or FakeDisk()
        self.now = NOON
        self.config = wggw.load_config(
            {
                "GATEWAY_API_KEY": API_KEY,
                "WG_BACKEND": "memory",
                "DB_PATH": str(directory / "wireguard.db"),
                **settings,
            },
            os.devnull,
        )
        rows = wggw.interface_settings(self.config)
        self.backends = {row.name: FakeBackend() for row in rows} | dict(backends or {})
        self.lock = threading.RLock()
        self.is_open = False

    @property
    def backend(self) -> FakeBackend:
        """The first interface."""
        return next(iter(self.backends.values()))

    @property
    def faults(self) -> list[Faults]:
        return [self.disk.faults, *(backend.faults for backend in self.backends.values())]

    @property
    def crashed(self) -> bool:
        return any(faults.crashed.is_set() for faults in self.faults)

    def open(self) -> World:
        """Start, as the program does. Raises StartError."""
        self.lock = lock = threading.RLock()
        self.disk.adopt(self.directory)
        for faults in self.faults:
            faults.crashed.clear()
            faults.on_crash = self._ring
        vault = wggw.Vault(self.config.snapshot_key) if self.config.snapshot_key else None
        self.files = wggw.Files(self.config.db_path, self.config.durability, self.disk, vault)
        self.store = store = wggw.Store()

        def run(function: Callable[[], T], /) -> T:
            with lock:
                if self.crashed or lock is not self.lock:
                    raise Crash
                return function()

        def begin(work: Iterator[None]) -> None:
            try:
                wggw.run_in_slices(run, work)
            except Crash:  # amid a landing: some who wait have heard of it, and so do the others
                with lock:
                    exhaust(work)
                raise

        self.gateway = gateway = wggw.Gateway(
            self.config, store, self.files, self.clock, run, begin=begin
        )
        gateway.lander._thread = threading.Thread(target=self._lander, name="lander", daemon=True)
        self.is_open = True
        store.take(self.files.load())
        obfuscation, is_new = None, False
        if self.config.awg_interface is not None:
            obfuscation, is_new = wggw.initial_obfuscation(
                self.config.awg_params, store, self.config.awg_interface
            )
        rows = wggw.interface_settings(self.config)
        for number, row in enumerate(rows, 1):
            store.private_keys[row.name] = wggw.encode_key(wggw.clamp(bytes([number]) * 32))
        wggw.refuse_misfits(wggw.look_at_stored(wggw.Host(self.config, store)))
        self.files.begin(store)
        opened: list[tuple[wggw.InterfaceSettings, wggw.Link, wggw.Backend]] = []
        for row in rows:
            spoken = obfuscation.parameters if obfuscation and row.prefix == "AWG" else wggw.PLAIN
            key = wggw.decode_key(store.private_keys[row.name])
            link, backend = wggw.make_link(row, key, spoken), self.backends[row.name]
            if backend.device is None:
                backend.setup(link)
            opened.append((row, link, backend))
        gateway.start(opened, obfuscation, is_new, may_lack=self.config.durability != "commit")
        return self

    def clock(self) -> float:
        return self.now

    def rows(self) -> list[tuple[wggw.Peer, wggw.TrafficRow]]:
        """All peers with their totals."""
        store = self.store
        return self.gateway.run(
            lambda: [(peer, store.traffic(peer.id)) for peer in store.peers_after(0, 10_000)]
        )

    def shown(self, public_key: str) -> Any:
        """A peer's configuration as the API shows it."""
        gateway = self.gateway
        text = gateway.run(lambda: self.store.configurations.show(public_key, gateway.view()))
        return json.loads(text or "null")

    def close(self) -> None:
        """An orderly stop."""
        self.gateway.close()
        self.files.journal.close()
        self.is_open = False

    def crash(self) -> None:
        """A KILL: the files and the interfaces stay as they are.

        Who waits for an answer hears Lost. Workers of this gateway meet Crash at their next step;
        the test ends them before it calls reopen().
        """
        self.disk.faults.crashed.set()
        self._ring()
        lander = self.gateway.lander._thread
        if lander.ident is not None:
            lander.join(30.0)
            assert not lander.is_alive()
        self.files.journal.close()
        self.is_open = False

    def reopen(self) -> World:
        """Start again, after an orderly stop unless it has crashed."""
        if self.is_open:
            if self.crashed:
                self.crash()
            else:
                self.close()
        return self.open()

    def _ring(self) -> None:
        """Let the lander see that it has crashed, also when no flight waits for it.

        What is decided from now on was never answered: a "stopping" that it meets is no refusal.
        """
        _LOST.add(self.gateway)
        self.gateway.ledger.stopping = True
        self.gateway.ledger.waiting.put([])

    def _lander(self) -> None:
        with contextlib.suppress(Crash):
            wggw.Lander._take_flights(self.gateway.lander)
        if self.crashed:
            self._lose_all()

    def _lose_all(self) -> None:
        ledger = self.gateway.ledger
        with self.lock:
            ledger.stopping = True
            ledger.exclusive = None
            while ledger.airborne:
                ledger.in_flight.clear()
                flight, _ = ledger.airborne.popitem()
                if not flight.done:
                    flight.give(Lost("the gateway crashed"))


def build(
    directory: Path,
    disk: FakeDisk | None = None,
    backends: Mapping[str, FakeBackend] | None = None,
    **settings: str,
) -> World:
    """A gateway that has started, with its files in `directory`."""
    return World(directory, disk, backends, **settings).open()


_LOST = weakref.WeakSet[wggw.Gateway]()  # they crashed: nobody hears of them any more


def peer_of(gateway: wggw.Gateway, public_key: str) -> wggw.Peer:
    peer = gateway.store.get(public_key)
    if peer is None:
        raise wggw.NotFound(wggw.NO_PEER)
    return peer


def traffic_of(gateway: wggw.Gateway, public_key: str) -> wggw.TrafficRow:
    return gateway.store.traffic(peer_of(gateway, public_key).id)


def submit(gateway: wggw.Gateway, rule: str, **fields: Any) -> Callable[[], wggw.Outcome]:
    """Ask for a change; the result waits for the answer and returns or raises it."""
    answered = threading.Event()
    answers: list[wggw.Outcome | wggw.GatewayError] = []

    def reply(answer: wggw.Outcome | wggw.GatewayError) -> None:
        answers.append(Lost("the gateway crashed") if gateway in _LOST else answer)
        answered.set()

    gateway.run(lambda: gateway.change(rule, fields, reply))

    def result() -> wggw.Outcome:
        if not answered.wait(60.0):
            raise AssertionError(f"{rule}: no answer")
        if isinstance(answers[0], wggw.GatewayError):
            raise answers[0]
        return answers[0]

    return result


def batch(
    gateway: wggw.Gateway, operations: Sequence[wggw.BatchOperation]
) -> list[wggw.Outcome | wggw.GatewayError]:
    """Do a batch in one round of the loop and wait for its results.

    As in the program, the lander gets all flights of the round at once.
    """
    answered = threading.Event()
    answers: list[Any] = []

    def reply(results: list[Any]) -> None:
        lost = gateway in _LOST
        answers.extend(Lost("the gateway crashed") if lost else result for result in results)
        answered.set()

    def one_round() -> None:
        gateway.ledger.gathers = True
        exhaust(wggw.Batch(gateway, operations, lambda _, result: result, reply, exhaust).steps())
        gateway.ledger.gathers = False
        gateway.ledger.dispatch()

    gateway.run(one_round)
    if not answered.wait(60.0):
        raise AssertionError("no answer to a batch")
    return answers


def exhaust(steps: Iterator[Any]) -> None:
    for _ in steps:
        pass


def do(gateway: wggw.Gateway, rule: str, **fields: Any) -> wggw.Outcome:
    """Do what a rule decides and wait until it has landed. Raises what it is refused for."""
    return submit(gateway, rule, **fields)()


def a_request(route: wggw.ApiRoute = wggw.ROUTES[0], **given: Any) -> wggw.Request:
    """A request for a handler that is called directly, with these attributes."""
    head = wggw.parse_head(b"POST / HTTP/1.1\r\nHost: x")
    request = wggw.Request(head, route, "", wggw.LogEntry("an-id"))
    for name, value in given.items():
        setattr(request, name, value)
    return request
