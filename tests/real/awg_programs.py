"""amneziawg-go and awg in the versions that are to be had: on PATH, or amneziawg_stand_in.py.

A program counts when its name on PATH is `amneziawg-go` or `awg`, or that with a version behind it
(`amneziawg-go-0.2.12`, `awg-3.1`). What generation it speaks is found out by asking it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import netns
from harness import wait_for

import wggw

SOCKETS = Path("/var/run/amneziawg")
STAND_INS = {
    "0.2.12": "1.0",
    "0.2.13": "1.5",
    "0.2.15": "2.0",
    "0.2.16": "2.0",
    "3.0": "3.0",
    "3.1": "3.1",
}
# By the generation that a program must speak to take them: a device key, and a line of a file.
KEYS = {
    "1.0": "jc=1\njmin=1\njmax=2",
    "1.5": "i1=<r 1>",
    "2.0": "i1=<rd 1>",
    "3.0": "rekey_timeout=5",
    "3.1": "random_trailers=0",
}
LINES = {
    "1.0": "Jc = 1",
    "1.5": "I1 = <r 1>",
    "2.0": "H1 = 5-6",
    "3.0": "RekeyTimeout = 5",
    "3.1": "RandomTrailers = off",
}


def on_path(name: str) -> dict[str, Path]:
    """All programs of a name, by the name that they have on PATH."""
    found: dict[str, Path] = {}
    for directory in map(Path, os.environ["PATH"].split(":")):
        for path in (*directory.glob(name), *directory.glob(f"{name}-*")):
            version = path.name.removeprefix(name)
            if os.access(path, os.X_OK) and version[1:2].isdigit() | (not version):
                found.setdefault(path.name, path.resolve())
    return dict(sorted(found.items()))


REAL = on_path("amneziawg-go")
TOOLS = on_path("awg")
LABELS = [*REAL] or [f"stand-in {version}" for version in STAND_INS]


def install(label: str, directory: Path) -> Path:
    """Put a program under the name amneziawg-go into a directory; returns its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "amneziawg-go"
    if label in REAL:
        path.symlink_to(REAL[label])
        return path
    stand_in = Path(__file__).with_name("amneziawg_stand_in.py")
    command = [sys.executable, str(stand_in), "--like", label.removeprefix("stand-in ")]
    path.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    path.chmod(0o755)
    return path


def newest() -> str:
    return max(LABELS, key=lambda label: (generation(label), label))


@functools.cache
def generation(label: str) -> str:
    """The newest generation that a program speaks."""
    if label not in REAL:
        return STAND_INS[label.removeprefix("stand-in ")]
    with running(REAL[label]) as name:
        asked = {known: uapi(name, f"set=1\n{line}\n\n") for known, line in KEYS.items()}
    return max(known for known, answer in asked.items() if answer == "errno=0\n\n")


@functools.cache
def tools_generation(label: str) -> str:
    """The newest generation whose files `awg` of a version takes."""
    with running(REAL[newest()]) as name:
        taken = [g for g, line in LINES.items() if not awg(label, name, f"[Interface]\n{line}\n")]
    return max(taken)


def awg(label: str, name: str, text: str) -> str:
    """`awg setconf` with a file's text; returns what it complains of."""
    done = subprocess.run(
        [str(TOOLS[label]), "setconf", name, "/dev/stdin"],
        input=text, capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    return done.stderr if done.returncode else ""


def showconf(label: str, name: str) -> str:
    command = [str(TOOLS[label]), "showconf", name]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout


@contextlib.contextmanager
def running(path: Path) -> Iterator[str]:
    """The program with an interface in a namespace of its own; yields the interface's name."""
    name = netns.unique()
    with netns.Namespace() as namespace, namespace.inside():
        process = start(path, name)
        try:
            yield name
        finally:
            end(process, name)


def start(path: Path, name: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [str(path), "-f", name],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def listens() -> bool:
        with contextlib.suppress(OSError):
            return uapi(name, "get=1\n\n").endswith("errno=0\n\n")
        return False

    wait_for(listens, what=f"{path} for {name}")
    return process


def end(process: subprocess.Popen[bytes], name: str) -> None:
    process.kill()
    process.wait()
    (SOCKETS / f"{name}.sock").unlink(missing_ok=True)
    netns.forget_socket(name)


def uapi(name: str, request: str, directory: Path = SOCKETS) -> str:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(str(directory / f"{name}.sock"))
        connection.sendall(request.encode())
        answer = b""
        while not answer.endswith(b"\n\n"):
            answer += connection.recv(65536)
    return answer.decode()


def parameters(name: str) -> wggw.Obfuscation:
    """What an interface says that it speaks."""
    printed = uapi(name, "get=1\n\n")[:-1].encode()
    device = wggw.read_uapi_device([printed]).device
    assert device is not None
    return device.obfuscation


def path_with(directory: Path) -> str:
    """PATH for a gateway that is to find the program of a directory first."""
    return f"{directory}:{os.environ['PATH']}"
