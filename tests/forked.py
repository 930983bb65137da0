"""Gateways as forks of one process that has imported wggw.py: importing it takes 0.2 s each time.

The forks are processes of their own and children of the tests'. What a test names as the program,
its directory, environment, log and network namespace are theirs as if they had been started.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
from pathlib import Path

CLONE_NEWNET = 0x40000000
PR_SET_CHILD_SUBREAPER = 36
# What a gateway imports when it needs it.
WANTED = (
    "_strptime",
    "cryptography.x509",
    "cryptography.hazmat.primitives.asymmetric.ec",
    "cryptography.hazmat.primitives.ciphers.aead",
    "cryptography.hazmat.primitives.serialization",
)
LIBC = ctypes.CDLL(None, use_errno=True)


class Forked(subprocess.Popen[bytes]):
    """A child that is there already."""

    def __init__(self, arguments: list[str], pid: int) -> None:
        self.args, self.pid, self.returncode = arguments, pid, None  # type: ignore[assignment]
        self.stdin = self.stdout = self.stderr = None
        self._child_created, self._waitpid_lock = True, threading.Lock()


class Parent:
    """The process that has imported the program; it lives as long as the tests' process."""

    def __init__(self, root: str) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, root, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={"PATH": os.environ["PATH"]},
                stdin=subprocess.DEVNULL,
            )
        atexit.register(self._end)

    def start(
        self, arguments: list[str], directory: Path, environment: dict[str, str], *streams: int
    ) -> Forked:
        """`arguments` are Python's own, behind its path and -P; `streams` are its first three."""
        request = json.dumps([arguments, str(directory), environment]).encode()
        network = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            with self._lock:
                # A process whose parent ends becomes the child of the ancestor that said this.
                LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
                socket.send_fds(self._control, [request], [*streams, network])
                pid = int(self._control.recv(100))
                LIBC.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        finally:
            os.close(network)
        return Forked([sys.executable, "-P", *arguments], pid)

    def _end(self) -> None:
        self._control.close()
        self._process.wait()


def fork_for_each(control: socket.socket) -> list[str]:
    """Returns the arguments of a request in its fork, which is made ready for them."""
    while True:
        request, descriptors, _, _ = socket.recv_fds(control, 1 << 20, 4)
        if not request:
            sys.exit()
        told, tell = os.pipe()
        between = os.fork()
        if not between:
            if pid := os.fork():
                os.write(tell, str(pid).encode())
                os._exit(0)
            os.close(told)
            os.close(tell)
            return ready(json.loads(request), *descriptors)
        os.waitpid(between, 0)
        control.send(os.read(told, 100))
        for descriptor in (told, tell, *descriptors):
            os.close(descriptor)


def ready(request: tuple[list[str], str, dict[str, str]], *descriptors: int) -> list[str]:
    arguments, directory, environment = request
    *streams, network = descriptors
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    # As they are for a program that starts: by lines to a terminal, and with no place to seek.
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        errors = getattr(sys, name).errors
        new = open(number, mode, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, new)
    if os.stat(network).st_ino != os.stat("/proc/self/ns/net").st_ino:
        assert LIBC.setns(network, CLONE_NEWNET) == 0
    for descriptor in descriptors:
        os.close(descriptor)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    return arguments


def main(root: str, control: str) -> None:
    sys.path[:0] = [root]
    __import__("wggw").make_parser()  # for the expressions that this compiles
    sys.path.remove(root)
    for module in WANTED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a fork that looks through what is there would copy all of it
    with socket.socket(fileno=int(control)) as connection:
        kind, *rest = fork_for_each(connection)
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    else:
        sys.argv = [kind, *rest]
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
