"""Faults on command, in two programs that stand in for the real ones. No test here; see rig.py.

    python faults.py serve SOCKET ROOT [ARGUMENT...]
        the gateway of ROOT/wggw.py in this process, with the calls that reach the disk (below
        DB_PATH's directory only) and the memory backend going through rules
    python faults.py wireguard SOCKET PROGRAM -f NAME
        the real userspace WireGuard PROGRAM, with a proxy before its UAPI socket

A test says over SOCKET, a JSON object a line, what shall go wrong; each line is answered by one:

    {"rules": [{...}, ...]}  these rules from now on, and none of those before; who is held up by
                             one of those goes on
    {}                       nothing: the answer says how often what was called, how many calls
                             met a rule, and how many are held up now
    {"counters": {HEX: {"rx_bytes": "1000", ...}}}
                             (wireguard) what a `get` shows of these peers from now on in place of
                             the truth, until a `set` removes the peer
    {"send": TEXT}           (wireguard) sends TEXT to the real program, past the rules

A rule is met by a call whose name is in `calls`: fsync, write, rename, replace, link, unlink,
ftruncate, open (to make a file); apply, read, setup, alive (memory backend); get, set (wireguard).

    only     a text that the path, or the request, contains
    least    the size that it has at least: bytes of a write, changes of an apply, peers of a set
    after    so many calls of those are let through before (default 0)
    times    so many calls meet the rule (default: all)
    seconds  it takes so much longer
    block    it is held up until the rules change
    errno    it fails with this number; without it, what is asked for is done
    torn     before it fails, half of it is done
    done     before it fails, all of it is done
    cut      (wireguard) the connection is closed in place of an answer
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

UNTIL_RELEASED = 120.0  # seconds: nothing is held up for ever, whatever becomes of the test


class Verdict(NamedTuple):
    """What a call has met: None in `errno` is no failure."""

    errno: int | None = None
    torn: bool = False
    done: bool = False
    cut: bool = False


class Rules:
    """The rules of one program and what was called; one lock, held for moments only."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._rules: list[dict[str, Any]] = []
        self._calls: collections.Counter[str] = collections.Counter()
        self._met = 0
        self._held = 0

    def replace(self, rules: list[dict[str, Any]]) -> None:
        with self._changed:
            self._rules = [{**rule, "seen": 0} for rule in rules]
            self._met = 0
            self._changed.notify_all()

    def state(self) -> dict[str, Any]:
        with self._changed:
            return {"calls": self._calls, "met": self._met, "held": self._held}

    def meet(self, call: str, subject: str, size: int = 0) -> Verdict:
        """Wait as long as the rules want it, and return what is to become of the call."""
        with self._changed:
            self._calls[call] += 1
            rule = self._first(call, subject, size)
            if rule is None:
                return Verdict()
            self._met += 1
            if rule.get("block") or rule.get("seconds"):
                self._hold(rule)
            errno = rule.get("errno")
            return Verdict(errno, *(bool(rule.get(name)) for name in ("torn", "done", "cut")))

    def _first(self, call: str, subject: str, size: int) -> dict[str, Any] | None:
        for rule in self._rules:
            fits = call in rule["calls"] and rule.get("only", "") in subject
            if not fits or size < rule.get("least", 0):
                continue
            rule["seen"] += 1
            number = rule["seen"] - rule.get("after", 0)
            if 0 < number <= rule.get("times", number):
                return rule
        return None

    def _hold(self, rule: dict[str, Any]) -> None:
        rules = self._rules
        seconds = UNTIL_RELEASED if rule.get("block") else rule["seconds"]
        self._held += 1
        try:
            self._changed.wait_for(lambda: self._rules is not rules, seconds)
        finally:
            self._held -= 1


class Control(threading.Thread):
    """Answers the test's lines; `do` makes the answer of what is not about rules."""

    def __init__(self, path: str, rules: Rules, do: Callable[[dict[str, Any]], Any]) -> None:
        super().__init__(daemon=True)
        self._rules, self._do = rules, do
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()

    def run(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection, connection.makefile("rwb") as lines:
                for line in lines:
                    asked = json.loads(line)
                    if "rules" in asked:
                        self._rules.replace(asked["rules"])
                    answer = {**self._rules.state(), "answer": self._do(asked)}
                    lines.write(json.dumps(answer).encode() + b"\n")
                    lines.flush()


# --- the gateway, its disk and its memory backend -------------------------------------------------


class Disk:
    """The functions of `os` that change files, for what lies below one directory."""

    def __init__(self, rules: Rules, directory: str) -> None:
        self._rules = rules
        self._directory = os.path.realpath(directory) + "/"
        # ruff: noqa: B010  (setattr: to assign would be an error of types in every line)
        self._write, self._ftruncate, self._open = os.write, os.ftruncate, os.open
        for name in ("fsync", "fdatasync"):
            setattr(os, name, self._on_handle("fsync", getattr(os, name)))
        setattr(os, "write", self.write)
        setattr(os, "writev", lambda handle, parts: os.write(handle, b"".join(parts)))
        setattr(os, "pwrite", self._on_handle("write", os.pwrite))
        setattr(os, "ftruncate", self._on_handle("ftruncate", self._ftruncate))
        setattr(os, "open", self.open)
        for name in ("rename", "replace", "link", "unlink", "remove", "truncate"):
            call = {"remove": "unlink", "truncate": "ftruncate"}.get(name, name)
            setattr(os, name, self._on_path(call, getattr(os, name)))

    def _ours(self, path: str) -> bool:
        return path.startswith(self._directory)

    def _path(self, handle: int) -> str:
        try:
            return os.readlink(f"/proc/self/fd/{handle}")
        except OSError:
            return ""

    def _meet(self, call: str, path: str, size: int = 0) -> Verdict:
        """Raises OSError, unless something of it is to be done before."""
        if not self._ours(path):
            return Verdict()
        verdict = self._rules.meet(call, path, size)
        if verdict.errno is not None and not (verdict.torn or verdict.done):
            fail(verdict, path)
        return verdict

    def _on_handle(self, call: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(handle: Any, *rest: Any) -> Any:
            number = handle if isinstance(handle, int) else handle.fileno()
            path = self._path(number)
            verdict = self._meet(call, path)
            result = real(handle, *rest)
            fail(verdict, path)
            return result

        return wrapper

    def _on_path(self, call: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(path: Any, *rest: Any, **options: Any) -> Any:
            name = whole_path(path)
            verdict = self._meet(call, name)
            result = real(path, *rest, **options)
            fail(verdict, name)
            return result

        return wrapper

    def write(self, handle: int, data: Any) -> int:
        path = self._path(handle)
        verdict = self._meet("write", path, len(data))
        if verdict.torn:
            data = memoryview(data)[: len(data) // 2]
        written = self._write(handle, data)
        fail(verdict, path)
        return written

    def open(self, path: Any, flags: int, mode: int = 0o777, **options: Any) -> int:
        if flags & os.O_CREAT and not isinstance(path, int):
            name = whole_path(path)
            fail(self._meet("open", name), name)
        return self._open(path, flags, mode, **options)


def whole_path(path: Any) -> str:
    """The path of a name that may be a link itself, or not there; of a handle, nothing."""
    if isinstance(path, int):
        return ""
    directory, name = os.path.split(os.path.abspath(os.fspath(path)))
    return f"{os.path.realpath(directory)}/{os.fsdecode(name)}"


def fail(verdict: Verdict, path: str) -> None:
    if verdict.errno is not None:
        raise OSError(verdict.errno, os.strerror(verdict.errno), path)


def patch_memory_backend(backend: Any, failure: type[Exception], rules: Rules) -> None:
    """Whatever methods the class has: those of these names go through the rules."""

    def wrap(call: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: Any, first: Any = None, *rest: Any, **options: Any) -> Any:
            if call == "apply" and not hasattr(first, "__len__"):
                first = list(first)
            given = () if first is None else (first,)
            verdict = rules.meet(call, "interface", len(first) if call == "apply" else 0)
            if verdict.errno is None:
                return real(self, *given, *rest, **options)
            if verdict.torn and call == "apply":
                real(self, list(first)[: len(first) // 2], *rest, **options)
            elif verdict.done:
                real(self, *given, *rest, **options)
            raise failure("told to fail")

        return wrapper

    names = {"apply": "apply", "read": "read", "sample": "read", "setup": "setup", "alive": "alive"}
    for name, call in names.items():
        if hasattr(backend, name):
            setattr(backend, name, wrap(call, getattr(backend, name)))


def serve(path: str, root: str, arguments: list[str]) -> int:
    rules = Rules()
    Control(path, rules, lambda asked: None).start()
    Disk(rules, os.path.dirname(os.path.abspath(os.environ["DB_PATH"])))
    sys.path[:0] = [root]
    sys.argv = [f"{root}/wggw.py", *arguments]
    module = importlib.import_module("wggw")
    failure = getattr(module, "BackendError", OSError)
    patch_memory_backend(module.MemoryBackend, failure, rules)
    return int(module.main())


# --- a userspace WireGuard behind a proxy ---------------------------------------------------------


class Proxy:
    """Owns the UAPI socket of an interface; the real program listens on an abstract one.

    `get` and `set` wait for one another, as in wireguard-go.
    """

    def __init__(self, rules: Rules, name: str) -> None:
        self._rules = rules
        self._inner = f"\0faults {name} {os.getpid()}"
        self._busy = threading.Lock()
        self._counters: dict[str, dict[str, str]] = {}
        self._path = f"/var/run/wireguard/{name}.sock"
        os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        self._outer = socket.socket(socket.AF_UNIX)
        self._outer.bind(self._path)  # the real program watches that this path is there
        os.chmod(self._path, 0o700)

    def start(self, program: str, name: str) -> subprocess.Popen[bytes]:
        """The real program, on a socket that it is given; with this process, it ends."""
        with socket.socket(socket.AF_UNIX) as inner:
            inner.bind(self._inner)
            inner.listen(16)
            process = subprocess.Popen(
                [program, "-f", name],
                env={"PATH": os.defpath, "LOG_LEVEL": "error", "WG_UAPI_FD": str(inner.fileno())},
                pass_fds=(inner.fileno(),),
                stdin=subprocess.DEVNULL,
            )
        self._wait_until_it_answers(process)
        return process

    def _wait_until_it_answers(self, process: subprocess.Popen[bytes]) -> None:
        """Its socket accepts before it serves: what counts is an answer."""
        assert self.send("get=1\n\n"), f"it ended with {process.poll()}"

    def run(self) -> None:
        self._outer.listen(16)
        while True:
            connection, _ = self._outer.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def send(self, text: str) -> str:
        with self._connect() as connection:
            connection.sendall(text.encode())
            return receive(connection).decode()

    def do(self, asked: dict[str, Any]) -> Any:
        if "counters" in asked:
            self._counters = asked["counters"]
        return self.send(asked["send"]) if "send" in asked else None

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self._inner)
        return connection

    def _serve(self, outer: socket.socket) -> None:
        with outer, self._connect() as inner, contextlib.suppress(OSError):
            while request := receive(outer):
                call = "get" if request.startswith(b"get") else "set"
                answer = self._answer(inner, call, request)
                if not answer:
                    return
                outer.sendall(answer)

    def _answer(self, inner: socket.socket, call: str, request: bytes) -> bytes:
        """An empty answer closes the connection."""
        with self._busy:
            size = request.count(b"public_key=")
            text = request.decode() if call == "set" else ""
            verdict = self._rules.meet(call, text, size)
            failed = verdict.errno is not None or verdict.cut
            if failed and verdict.torn and call == "set":
                request = first_half(request)
            elif failed and not verdict.done:
                return b"" if verdict.cut else b"errno=-%d\n\n" % (verdict.errno or 0)
            if call == "set":
                self._forget(text)
            inner.sendall(request)
            answer = receive(inner)
            if verdict.cut:
                return b""
            if verdict.errno is not None:
                return b"errno=-%d\n\n" % verdict.errno
        return self._show(answer) if call == "get" else answer

    def _forget(self, text: str) -> None:
        for block in text.split("public_key=")[1:]:
            if "remove=true" in block:
                self._counters.pop(block[:64], None)

    def _show(self, answer: bytes) -> bytes:
        for key, shown in tuple(self._counters.items()):
            start = answer.find(b"public_key=" + key.encode())
            if start < 0:
                continue
            end = answer.find(b"\npublic_key=", start)
            end = end if end >= 0 else answer.rindex(b"errno=") - 1
            block = answer[start:end]
            for name, value in shown.items():
                line = f"{name}={value}".encode()
                block, there = re.subn(rb"(?m)^%b=.*$" % name.encode(), line, block)
                if not there:  # wireguard-go leaves out the endpoint that it does not have
                    head, _, tail = block.partition(b"\nlast_handshake_time_sec=")
                    block = head + b"\n" + line + b"\nlast_handshake_time_sec=" + tail
            answer = answer[:start] + block + answer[end:]
        return answer


def first_half(request: bytes) -> bytes:
    """A `set` with half of its peers."""
    head, *peers = request.rstrip(b"\n").split(b"\npublic_key=")
    return b"\npublic_key=".join([head, *peers[: len(peers) // 2]]) + b"\n\n"


def receive(connection: socket.socket) -> bytes:
    """One operation or one answer, with its empty line; nothing at the end."""
    parts: list[bytes] = []
    tail = b""
    while not tail.endswith(b"\n\n"):
        part = connection.recv(1 << 18)
        if not part:
            return b""
        parts.append(part)
        tail = (tail + part)[-2:]
    return b"".join(parts)


def wireguard(path: str, program: str, name: str) -> int:
    rules = Rules()
    proxy = Proxy(rules, name)
    process = proxy.start(program, name)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: process.terminate())
    Control(path, rules, proxy.do).start()
    threading.Thread(target=proxy.run, daemon=True).start()
    return process.wait()


def write_wrapper(directory: Path, path: str) -> None:
    """A program `wireguard-go` for PATH that is the real one behind a proxy with this socket."""
    real = shutil.which("wireguard-go")
    assert real is not None
    program = directory / "wireguard-go"
    command = [sys.executable, "-P", os.path.abspath(__file__), "wireguard", path, real]
    program.write_text(f'#!/bin/sh\nexec {" ".join(command)} "$@"\n')
    program.chmod(0o755)


if __name__ == "__main__":
    what, control, target, *others = sys.argv[1:]
    if what == "serve":
        sys.exit(serve(control, target, others))
    sys.exit(wireguard(control, target, others[-1]))
