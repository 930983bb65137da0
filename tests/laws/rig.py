"""What the laws share: a gateway whose disk and interface fail on command, and what is seen of it.

Nothing here or in a law knows how the gateway is made: HTTP, its files, `wg`, signals.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import faults
import netns
from harness import ROOT, Answer, Client, GatewayProcess, a_key, path_key, wait_for

PEERS = "/api/v1/configurations/"
SNAPSHOT = "/api/v1/snapshot"
BIG = 100  # peers: what is set at once for a desired state and never for a single change
SUBNET = {"WG_IPV4_SUBNET": "10.64.0.0/15", "WG_IPV6_SUBNET": ""}
SEALED = {"SNAPSHOT_KEY": "a key for what lies on disk"}

ENOSPC, EIO = 28, 5


class Faults:
    """The test's side of faults.Control; a connection a call, so that any thread may use it."""

    def __init__(self) -> None:
        # Not below tmp_path: the path of a socket has 107 characters at most.
        self.path = f"{tempfile.gettempdir()}/faults-{netns.unique()}"

    def ask(self, **what: Any) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(30)
            connection.connect(self.path)
            with connection.makefile("rwb") as lines:
                lines.write(json.dumps(what).encode() + b"\n")
                lines.flush()
                return dict(json.loads(lines.readline()))

    def rule(self, *calls: str, **how: Any) -> None:
        """This rule alone, see faults.py."""
        self.ask(rules=[{"calls": calls, **how}])

    def rules(self, *rules: dict[str, Any]) -> None:
        self.ask(rules=rules)

    def clear(self) -> None:
        self.ask(rules=[])

    def met(self) -> int:
        """How many calls have met the present rules."""
        return int(self.ask()["met"])

    def held(self) -> int:
        return int(self.ask()["held"])

    def calls(self, name: str) -> int:
        return int(self.ask()["calls"].get(name, 0))

    def wait_met(self, number: int = 1) -> None:
        wait_for(lambda: self.met() >= number, what=f"{number} calls that meet {self.ask()}")

    def wait_held(self) -> None:
        wait_for(self.held, what="a call that is held up")

    @contextlib.contextmanager
    def while_(self, *calls: str, **how: Any) -> Iterator[None]:
        self.rule(*calls, **how)
        try:
            yield
        finally:
            self.clear()

    def close(self) -> None:
        Path(self.path).unlink(missing_ok=True)


class Gateway(GatewayProcess):
    """A gateway under the fault launcher: `faults` are those of disk and memory backend."""

    def __init__(self, directory: Path, prefix: list[str] | None = None, **settings: str) -> None:
        super().__init__(directory, prefix, **{**SUBNET, **settings})
        self.faults = Faults()
        launcher = str(Path(faults.__file__).resolve())
        self.program = [sys.executable, "-P", launcher, "serve", self.faults.path, str(ROOT)]

    @property
    def journal(self) -> Path:
        return Path(self.settings["DB_PATH"] + ".journal")

    @property
    def database(self) -> Path:
        return Path(self.settings["DB_PATH"])

    def start_answering(self, seconds: float = 60.0) -> Gateway:
        """Start, and wait until it is alive; it may be far from well."""
        process = self.spawn()

        def alive() -> bool:
            assert process.poll() is None, f"ended with {process.returncode}: {self.text()}"
            client = self.client()
            try:
                head = client.raw("GET", "/healthz", b"", {})
                # A gateway that is starting is alive and cannot say yet what peers there are.
                return head.status == 200 and status(client).status == 200
            except OSError:
                return False
            finally:
                client.close()

        wait_for(alive, seconds, "an answer")
        return self

    def refused_start(self, seconds: float = 30.0) -> tuple[int, str]:
        """Start what shall not start: the exit code, and what it said this time."""
        before = len(self.text()) if self.log.exists() else 0
        process = self.spawn()

        def ended() -> bool:
            assert not self.is_ready(), f"it started: {self.text()[before:]}"
            return process.poll() is not None

        wait_for(ended, seconds, f"its end: {self.text()[before:]}")
        assert self.process is not None
        self.process = None
        return process.wait(), self.text()[before:]

    def close(self) -> None:
        super().close()
        self.faults.close()


@contextlib.contextmanager
def memory_gateway(directory: Path, **settings: str) -> Iterator[Gateway]:
    """A running gateway with the memory backend."""
    gateway = Gateway(directory, **settings)
    try:
        gateway.start()
        yield gateway
    finally:
        gateway.close()


class Interface:
    """A name for a real WireGuard behind the proxy of faults.py, which the gateway will start."""

    def __init__(self, directory: Path) -> None:
        self.name = netns.unique()
        self.faults = Faults()
        self._programs = directory / "bin"
        self._programs.mkdir()
        faults.write_wrapper(self._programs, self.faults.path)
        self.settings = {
            "WG_BACKEND": "uapi",
            "WG_INTERFACE": self.name,
            "PATH": f"{self._programs}:{os.environ['PATH']}",
        }

    def start(self) -> None:
        """Before the gateway does, so that it is not the gateway's child."""
        subprocess.Popen(
            [str(self._programs / "wireguard-go"), "-f", self.name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_for(lambda: netns.daemon_pid(self.name), what="the proxy's socket")

    def show(self, what: str) -> str:
        return netns.output("wg", "show", self.name, what)

    def peers(self) -> set[str]:
        return set(self.show("peers").split())

    def allowed_ips(self, public_key: str) -> set[str]:
        for line in self.show("allowed-ips").splitlines():
            key, *networks = line.split()
            if key == public_key:
                return set(networks) - {"(none)"}
        return set()

    def set(self, *words: str, given: str | None = None) -> None:
        """`wg set`, by hand."""
        netns.output("wg", "set", self.name, *words, given=given)

    def shows(self, counters: dict[str, dict[str, object]]) -> None:
        """What is read of these public keys from now on, see faults.py."""
        shown = {
            base64.b64decode(key).hex(): {name: str(value) for name, value in values.items()}
            for key, values in counters.items()
        }
        self.faults.ask(counters=shown)

    def close(self) -> None:
        self.faults.close()
        netns.forget_socket(self.name)


@contextlib.contextmanager
def real_gateway(
    directory: Path, started_before: bool = False, **settings: str
) -> Iterator[tuple[Gateway, Interface]]:
    """A running gateway with wireguard-go, both in a network namespace that the test is in, too."""
    netns.need("ip", "wg", "wireguard-go", tun=True)
    with contextlib.ExitStack() as stack:
        namespace = stack.enter_context(netns.Namespace())
        stack.enter_context(namespace.inside())
        interface = Interface(directory)
        stack.callback(interface.close)
        if started_before:
            interface.start()
        gateway = Gateway(directory, **{**interface.settings, **settings})
        stack.callback(gateway.close)
        gateway.start()
        yield gateway, interface


# --- what can be seen -----------------------------------------------------------------------------


def status(client: Client) -> Answer:
    return client.send("GET", "/api/v1/server/status")


def is_healthy(client: Client) -> bool:
    return bool(status(client).json["status"] == "healthy")


def wait_degraded(client: Client, seconds: float = 30.0) -> list[str]:
    """Its reasons."""
    wait_for(lambda: not is_healthy(client), seconds, "a status that is not healthy")
    return list(status(client).json["reasons"])


def wait_healthy(client: Client, seconds: float = 60.0) -> None:
    wait_for(lambda: is_healthy(client), seconds, "health")


def listed(client: Client, query: str = "") -> dict[str, dict[str, Any]]:
    """All peers by their keys."""
    found: dict[str, dict[str, Any]] = {}
    cursor = ""
    while True:
        page = client.send("GET", f"{PEERS}?limit=1000{query}{cursor}").json
        found.update((row["public_key"], row) for row in page["configurations"])
        if page["next_cursor"] is None:
            return found
        cursor = f"&cursor={page['next_cursor']}"


LIVE = ("online", "last_handshake", "rx_bytes", "tx_bytes", "quota_used", "sequence")


def lasting(row: dict[str, Any]) -> dict[str, Any]:
    """What of a configuration changes only when somebody wants it."""
    return {name: value for name, value in row.items() if name not in LIVE}


def state(client: Client) -> dict[str, dict[str, Any]]:
    """All peers by their keys, without what is counted."""
    return {key: lasting(row) for key, row in listed(client).items()}


def check_interface(client: Client) -> None:
    """The interface has the active peers and nothing else, and nothing is left to repair."""
    wait_healthy(client)
    active = sum(row["status"] == "active" for row in listed(client).values())
    synced = client.send("POST", "/api/v1/sync-ips").json
    found = [synced[name] for name in ("added", "updated", "removed", "unchanged")]
    assert found == [0, 0, 0, active], found


def check_pool(client: Client) -> None:
    held = [row["assigned_ip"] for row in listed(client).values() if row["assigned_ip"]]
    assert len(held) == len(set(held)), "an address is held twice"
    assert client.send("GET", "/api/v1/ip-usage").json["ipv4"]["used"] == len(held)


def restarted(gateway: Gateway) -> Client:
    """After a KILL."""
    gateway.kill()
    gateway.start()
    return gateway.client()


# --- what is asked for ----------------------------------------------------------------------------


def put(client: Client, elements: Sequence[Any]) -> Answer:
    return client.send("PUT", f"{PEERS}?allow_mass_delete=true", list(elements))


def fill(client: Client, keys: Iterable[str], **fields: Any) -> list[dict[str, Any]]:
    """Make these peers and no others; the elements of the desired state."""
    elements = [{"public_key": key, **fields} for key in keys]
    answer = put(client, elements)
    assert answer.status == 200, answer
    assert answer.json["created"] + answer.json["updated"] + answer.json["unchanged"] == len(
        elements
    )
    return elements


def patch(client: Client, public_key: str, **fields: Any) -> Answer:
    return client.send("PATCH", PEERS + path_key(public_key), fields)


def rotate(client: Client, public_key: str, new: str) -> Answer:
    return client.send("POST", f"{PEERS}{path_key(public_key)}/rotate", {"new_public_key": new})


def rfc3339(moment: float) -> str:
    return datetime.fromtimestamp(moment, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def whole_second(ahead: float) -> int:
    """The first whole second that is at least so far ahead."""
    return math.ceil(time.time() + ahead)


class Background(threading.Thread):
    """A request whose answer is not there yet; `failure` is what came in place of one."""

    def __init__(self, gateway: GatewayProcess, ask: Callable[[Client], Answer]) -> None:
        super().__init__(daemon=True)
        self._client = gateway.client()
        # The namespace that the test is in is its thread's and that of threads it starts.
        self._ask = ask
        self.answer: Answer | None = None
        self.failure: Exception | None = None
        self.took = 0.0
        self.start()

    def run(self) -> None:
        begun = time.monotonic()
        try:
            self.answer = self._ask(self._client)
        except Exception as error:
            self.failure = error
        self.took = time.monotonic() - begun
        self._client.close()

    def done(self) -> bool:
        return not self.is_alive()

    def wait(self, seconds: float = 60.0) -> Answer:
        self.join(seconds)
        assert not self.is_alive(), f"no answer within {seconds} s"
        assert self.answer is not None, repr(self.failure)
        return self.answer


class Reads(threading.Thread):
    """Asks for the same thing again and again on one connection; how long each answer took."""

    def __init__(self, gateway: GatewayProcess, ask: Callable[[Client], Answer]) -> None:
        super().__init__(daemon=True)
        self._client = gateway.client()
        self._ask = ask
        self._ended = threading.Event()
        self.times: list[float] = []
        self.wrong: list[object] = []
        self._begun = math.inf

    def __enter__(self) -> Reads:
        answer = self._ask(self._client)  # the handshake is not what is measured
        assert answer.status == 200, answer
        self.start()
        return self

    def run(self) -> None:
        while not self._ended.wait(0.01):
            self._begun = time.monotonic()
            try:
                answer = self._ask(self._client)
            except Exception as error:
                self.wrong.append(error)
                return
            self.times.append(time.monotonic() - self._begun)
            if answer.status != 200:
                self.wrong.append(answer)

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join(60)

    def check(self, seconds: float, longest: float, beside: Reads | None = None) -> None:
        """99 of 100 within `seconds`, but for a few, and none longer than `longest`.

        `beside` asked a gateway that had nothing to do at the same time: three times what it
        needed on a machine that does other things is no failure.
        """
        assert not self.wrong, self.wrong[:3]
        assert len(self.times) >= 10, f"only {len(self.times)} reads were answered"
        if beside is not None:
            quiet = sorted(beside.times)
            seconds = max(seconds, 3 * quiet[-1 - len(quiet) // 100])
            longest = max(longest, 3 * quiet[-1])
        late = sorted(took for took in self.times if took > seconds)
        allowed = 2 + len(self.times) // 100
        assert len(late) <= allowed and (not late or late[-1] <= longest), (
            f"{len(late)} of {len(self.times)} reads took more than {seconds:.3f} s: {late[-5:]}"
        )


def measured(measure: Callable[[], None], times: int = 3) -> None:
    """Measure until it is good. A machine that does other things may spoil it once, a defect does
    each time."""
    for left in reversed(range(times)):
        try:
            measure()
            return
        except AssertionError:
            if not left:
                raise


@contextlib.contextmanager
def quiet_reads(directory: Path, ask: Callable[[Client], Answer]) -> Iterator[Reads]:
    """The same reads of a gateway that has nothing else to do."""
    directory.mkdir()
    with memory_gateway(directory, WG_INTERFACE="quiet") as gateway:
        assert gateway.client().create(a_key("is there")).status == 200
        with Reads(gateway, ask) as reads:
            yield reads


# --- changes of one peer each, made while something big goes on -----------------------------------


class Single(NamedTuple):
    """A change of one peer: how to ask for it, and whether what is there is what it makes."""

    kind: str
    public_key: str  # by which to look for it afterwards
    there: str | None  # the peer that must be there before
    ask: Callable[[Client], Answer]
    made: Callable[[dict[str, dict[str, Any]]], bool]
    same: dict[str, Any] | None = None  # what in a desired state asks for the same
    # A peer that is gone is gone: who is told so may rely on it.
    acknowledges: tuple[int, ...] = (200,)


def suspend(key: str, _: str) -> Single:
    def made(found: dict[str, dict[str, Any]]) -> bool:
        return key in found and found[key]["status"] == "suspended"

    same = {"status": "suspended"}
    return Single("suspend", key, key, lambda client: client.status(key, "suspended"), made, same)


def delete(key: str, _: str) -> Single:
    def made(found: dict[str, dict[str, Any]]) -> bool:
        return key not in found

    return Single("delete", key, key, lambda client: client.delete(key), made, None, (200, 404))


def quota(key: str, _: str) -> Single:
    def made(found: dict[str, dict[str, Any]]) -> bool:
        return key in found and found[key]["quota_bytes"] == 10**9

    same = {"quota_bytes": 10**9}
    return Single(
        "quota", key, key, lambda client: patch(client, key, quota_bytes=10**9), made, same
    )


def rotation(key: str, new: str) -> Single:
    def made(found: dict[str, dict[str, Any]]) -> bool:
        return new in found and key not in found

    return Single("rotate", new, key, lambda client: rotate(client, key, new), made)


def creation(_: str, new: str) -> Single:
    return Single("create", new, None, lambda client: client.create(new), lambda f: new in f)


KINDS = (suspend, delete, quota, rotation, creation)


def singles(number: int, label: object) -> list[Single]:
    """Changes of peers of their own, of each kind in turn."""
    return [
        KINDS[index % len(KINDS)](a_key((label, index)), a_key((label, index, "new")))
        for index in range(number)
    ]


# --- files ----------------------------------------------------------------------------------------


def copy_files(source: Path, target: Path) -> None:
    target.mkdir()
    for path in source.iterdir():
        if path.is_file():
            shutil.copy2(path, target / path.name)


def line_variants(line: bytes) -> Iterator[tuple[str, bytes]]:
    """A journal line with something in it that nobody knows: each place once, checksums right.

    What it needs to know of the format: the content is JSON, and the line says its CRC-32 in 8
    hexadecimal digits. Where those stand, and what they are of, is found out.
    """
    match = re.search(rb"[\[{]", line)
    assert match, f"no JSON in {line[:200]!r}"
    content, length = json.JSONDecoder().raw_decode(line[match.start() :].decode())
    written = line[match.start() :].decode()[:length].encode()
    for place, changed in with_something_more(content):
        text = json.dumps(changed, separators=(",", ":")).encode()
        for crc in re.finditer(rb"(?<![0-9a-f])[0-9a-f]{8}(?![0-9a-f])", line):
            for cover in COVERS:
                before, after = line[: crc.start()], line[crc.end() :]
                if zlib.crc32(cover(before, after)) == int(crc[0], 16):
                    if crc.end() <= match.start():
                        after = after.replace(written, text)
                    else:
                        before = before.replace(written, text)
                    new = b"%08x" % zlib.crc32(cover(before, after))
                    yield place, before + new + after
                    break
            else:
                continue
            break
        else:
            raise AssertionError(f"what is the checksum of this line of? {line[:200]!r}")


# What a checksum may be of: parts of what stands before and behind it.
COVERS: tuple[Callable[[bytes, bytes], bytes], ...] = (
    lambda before, after: before.strip() + after.strip(),
    lambda before, after: before.strip() + b" " + after.strip(),
    lambda before, after: before + after,
    lambda before, after: after.strip(),
    lambda before, after: after,
    lambda before, after: before.strip(),
    lambda before, after: before,
)


def with_something_more(value: Any, place: str = "record") -> Iterator[tuple[str, Any]]:
    """The value with one member or element too much, at each of its places once."""
    if isinstance(value, dict):
        yield place, {**value, "unheard_of": 1}
        for name, member in value.items():
            for where, changed in with_something_more(member, f"{place}.{name}"):
                yield where, {**value, name: changed}
    elif isinstance(value, list):
        for index, element in enumerate(value):
            for where, changed in with_something_more(element, f"{place}[{index}]"):
                yield where, [*value[:index], changed, *value[index + 1 :]]
        # Of numbers alone it could be a list of things, of which there may be one more.
        if len({type(element) for element in value}) > 1:
            yield place, [*value, 1]
