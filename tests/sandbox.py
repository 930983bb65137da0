"""A machine to install on that is this machine, seen through private namespaces.

Network, processes and mounts are its own: /etc, /usr and /var are those of this machine with every
change in memory, /run is empty. What is done inside is gone when it ends, daemons included.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import ROOT, WGGW, wait_for

NAMESPACES = ("--mount", "--net", "--pid")
# The token is written below each overlay: where it can be read, changes stay in memory.
SETUP = r"""
set -e
mount -t tmpfs changes /mnt
for directory in /etc /usr /var; do
  mkdir -p /mnt$directory/upper /mnt$directory/work
  echo "$TOKEN" >/mnt$directory/upper/.sandbox
  mount -t overlay overlay $directory \
    -o lowerdir=$directory,upperdir=/mnt$directory/upper,workdir=/mnt$directory/work
done
eval "$GUARD"
rm -rf /etc/wggw /var/lib/wggw
mount -t tmpfs run /run
ip link set lo up
echo ready
while :; do sleep 3600; done  # as the first process, a shell reaps the others
"""
# Runs before every script, because scripts here remove programs: never outside the overlays.
GUARD = r"""
for directory in /etc /usr /var; do
  if ! read -r token 2>/dev/null <$directory/.sandbox || [[ -z $TOKEN || $token != "$TOKEN" ]]; then
    echo "sandbox: not inside it, nothing is run"
    exit 99
  fi
done
"""
# sudo and apt-get as they are found first: nothing asks for a password, nothing is fetched.
SUDO = '#!/bin/sh\nexec "$@"\n'
APT_GET = '#!/bin/sh\necho "$@" >>"$(dirname "$0")/apt-get.calls"\nexit 7\n'


class SmallDisk:
    """A directory on a file system of its own, in a mount namespace that one process holds."""

    def __init__(self, directory: Path, holder: int) -> None:
        self.inside = directory  # as processes in the namespace see it
        self.outside = Path(f"/proc/{holder}/root{directory}")
        self.prefix = [
            *("nsenter", "--target", str(holder), "--mount"),
            *("--root", f"--wd={directory.parent}"),
        ]

    def fill(self) -> None:
        """Leave no byte free."""
        with (
            (self.outside / "filler").open("ab", buffering=0) as file,
            contextlib.suppress(OSError),
        ):
            while True:
                file.write(bytes(4096))

    def free(self) -> None:
        (self.outside / "filler").unlink(missing_ok=True)


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[SmallDisk]:
    """A small file system of its own, at this path for those that are started with its prefix."""
    if os.geteuid() != 0 or not shutil.which("unshare") or not shutil.which("nsenter"):
        pytest.skip("needs root, unshare and nsenter: it mounts a file system")
    directory.mkdir()
    script = 'mount -t tmpfs -o size=512k small "$1" && echo ready && exec sleep infinity'
    holder = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", script, "sh", str(directory)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        assert holder.stdout is not None
        line = holder.stdout.readline()
        if line != b"ready\n":
            pytest.skip(f"needs the right to mount: {line.decode(errors='replace').strip()}")
        yield SmallDisk(directory, holder.pid)
    finally:
        holder.kill()
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()


# In the program's place: the same from bytecode, which all machines share. install.sh and its tests
# start it again and again, and to compile it takes 0.4 s each time.
FROM_BYTECODE = """#!/usr/bin/env python3
import sys
sys.path[:0] = [{!r}]
import whole
sys.path.pop(0)
globals().update((name, value) for name, value in vars(whole).items() if name[:2] != "__")
if __name__ == "__main__":
    sys.exit(whole.main())
"""


@functools.cache
def from_bytecode() -> str:
    directory = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, directory)
    directory.chmod(0o755)  # the service's user reads it, too
    shutil.copy(WGGW, directory / "whole.py")
    compile_it = ["/usr/bin/python3", "-m", "py_compile", directory / "whole.py"]
    subprocess.run(compile_it, check=True)
    return FROM_BYTECODE.format(str(directory))


class Machine:
    """`tree` is a clean copy of the project; `bin` comes first in PATH.

    The tree's program comes from bytecode unless it is to be `whole`.
    """

    def __init__(self, directory: Path, pid: int, token: str, whole: bool) -> None:
        self.tree = directory / "wggw"
        self.bin = directory / "bin"
        # --root: without it a chroot's machine would be entered at the root outside the chroot.
        self._enter = ["nsenter", "--target", str(pid), *NAMESPACES, "--root", f"--wd={self.tree}"]
        self._environment = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(directory),
            "TERM": "dumb",
            "TOKEN": token,
        }
        names = (".*", "__pycache__", "*.db*", "*.pem", "tests")
        shutil.copytree(ROOT, self.tree, ignore=shutil.ignore_patterns(*names))
        if not whole:
            (self.tree / "wggw.py").write_text(from_bytecode())
        self.bin.mkdir()
        for name, text in (("sudo", SUDO), ("apt-get", APT_GET)):
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)

    def run(self, script: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a bash script in the tree; both streams are its stdout."""
        return subprocess.run(
            [*self._enter, "bash", "-c", GUARD + script],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )

    def output(self, script: str) -> str:
        done = self.run(script)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def apt_calls(self) -> list[str]:
        calls = self.bin / "apt-get.calls"
        return calls.read_text().splitlines() if calls.exists() else []

    def start(self, command: str) -> Background:
        return Background(self, command)

    def spawn(self, script: str, log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as out:
            return subprocess.Popen(
                [*self._enter, "bash", "-c", GUARD + script],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )


class Background:
    """A command that runs in the machine; `signal` reaches the very process that it names."""

    def __init__(self, machine: Machine, command: str) -> None:
        self._machine = machine
        self._log = machine.tree.parent / "background.log"
        self._process = machine.spawn(f"echo $$ >../background.pid; exec {command}", self._log)

    def text(self) -> str:
        return self._log.read_text()

    def wait_text(self, text: str, seconds: float = 120) -> str:
        def there() -> bool:
            assert text in self.text() or self._process.poll() is None, self.text()
            return text in self.text()

        wait_for(there, seconds, f"{text!r} in the output")
        return self.text()

    def signal(self, name: str) -> None:
        self._machine.output(f"kill -{name} $(cat ../background.pid)")

    def wait(self, seconds: float = 60) -> int:
        return self._process.wait(seconds)


def _first_child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


@contextlib.contextmanager
def machine(directory: Path, whole: bool = False) -> Iterator[Machine]:
    if os.geteuid() != 0:
        pytest.skip("needs root: it makes namespaces with private mounts")
    if not shutil.which("apt-get"):
        pytest.skip("needs Debian or Ubuntu")
    token = secrets.token_hex(16)
    holder = subprocess.Popen(
        ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "bash", "-c", SETUP],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "TOKEN": token, "GUARD": GUARD},
        text=True,
    )
    try:
        assert holder.stdout is not None
        line = holder.stdout.readline()
        if line != "ready\n":
            pytest.skip(f"needs the right to make namespaces and overlays: {line.strip()}")
        yield Machine(directory, _first_child(holder.pid), token, whole)
    finally:
        holder.kill()
        holder.wait()
