"""A guest: a real kernel and a real systemd that run as processes of this machine.

    with Guest(directory, kernel(), image("bookworm")) as guest:
        result = guest.run("wg --version", seconds=60)

The guest runs the script as root; `directory/host` is its /host, the project its /tree (read
only). The disk is the image with the guest's own changes beside it: they stay from one run to the
next, and power_cut() loses what the guest had not yet written to it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
TREE = HERE.parent.parent
TERMINAL = re.compile(r"[\r\a]|\x1b[\[\]][0-9;?!]*[A-Za-z]?|\x1b.")  # systemd sets up its console
NOISE = re.compile(r"job-exit |reboot: |Powering off|systemd\[1\]: |epollctl")

PRELUDE = f"""\
mkdir -p /tree
mount -t hostfs -o ro,{shlex.quote(str(TREE))} none /tree || exit 120
export PYTHONDONTWRITEBYTECODE=1
ip link set lo up
"""


class NotBuilt(Exception):
    """The kernel or the image is missing; the message says how to make it."""


def _made_by(script: str, *arguments: str) -> Path:
    """The path of what a build script makes."""
    command = [str(HERE / script), "--path", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    path = Path(done.stdout.strip())
    if not path.exists():
        raise NotBuilt(f"{path} is not there: tests/vm/{' '.join([script, *arguments])} makes it")
    return path


def kernel() -> Path:
    """The kernel's path. Raises NotBuilt."""
    return _made_by("kernel.sh")


def image(suite: str) -> Path:
    """The disk image of a Debian suite. Raises NotBuilt."""
    return _made_by("root.sh", suite)


class Result(NamedTuple):
    """What a job ended with (None: it did not end by itself) and what it printed."""

    status: int | None
    output: str


class Guest:
    """One machine; start(), run() and boot() boot it anew each time, from the disk as it was left.

    Without an image it has no disk: see boot().
    """

    def __init__(
        self, directory: Path, kernel: Path, image: Path | None = None, memory: str = "1536M"
    ) -> None:
        self.host = directory / "host"
        self.host.mkdir(parents=True)
        self._directory, self._kernel, self._image = directory, kernel, image
        self._memory = memory
        self._console = directory / "console"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Guest:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.power_cut()

    def start(self, script: str) -> None:
        """Boot and run the script; its output is in output() as it comes."""
        (self.host / "job").write_text(PRELUDE + script)
        self.boot(
            f"ubd0={self._directory / 'disk.cow'},{self._image}",
            f"job={self.host}",
            *["root=/dev/ubda", "rw", "systemd.show_status=false"],
        )

    def boot(self, *words: str) -> None:
        """Boot with these words on the kernel's command line."""
        command = [
            str(self._kernel),
            f"mem={self._memory}",
            f"uml_dir={self._directory}",
            *["umid=guest", "con=null", "con0=fd:0,fd:1", "quiet"],
            *words,
        ]
        with self._console.open("wb") as console:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )

    def run(self, script: str, seconds: float) -> Result:
        """Boot, run the script, wait for its end; after `seconds` the power is cut."""
        self.start(script)
        return self.wait(seconds)

    def wait(self, seconds: float) -> Result:
        assert self._process is not None, "the guest is not running"
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        self.power_cut()
        found = re.search(r"^job-exit (\d+)", self._text(), re.MULTILINE)
        return Result(int(found[1]) if found else None, self.output())

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def power_cut(self) -> None:
        """End the machine at once: nothing is flushed, nothing is told."""
        if self._process is None:
            return
        if self._process.poll() is None:
            # The session holds the kernel, its disk's thread and the guest's processes.
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._wait_for_the_group(self._process.pid)
        self._process = None

    @staticmethod
    def _wait_for_the_group(group: int) -> None:
        """The kernel's other processes end a little later, and hold the disk's lock until then."""
        with contextlib.suppress(ProcessLookupError):
            for _ in range(3000):
                os.killpg(group, 0)
                time.sleep(0.01)

    def output(self) -> str:
        """What the job printed so far."""
        lines = self._text().splitlines()
        return "\n".join(line for line in lines if not NOISE.match(line))

    def _text(self) -> str:
        return TERMINAL.sub("", self._console.read_bytes().decode("utf-8", "replace"))


def pytest_inside(path: str) -> str:
    """The command that runs a pytest file in the guest, which as a whole has a timeout."""
    options = "-c /tree/tests/pytest.ini -p no:cacheprovider --color=no -o timeout=0 -q -s"
    return f"python3 -m pytest {options} /tree/tests/{path}\n"


def run_inside(guest: Guest, path: str, seconds: float, **environment: str) -> None:
    """Run a pytest file in the guest: green, and nothing left out."""
    settings = "".join(f"export {name}={value}\n" for name, value in environment.items())
    result = guest.run(settings + pytest_inside(path), seconds)
    for line in re.findall(r"measured: .*", result.output):
        print(line)
    assert result.status == 0, f"status {result.status} in the guest:\n{result.output}"
    assert " passed" in result.output
    assert " skipped" not in result.output, result.output
