"""Coverage-guided fuzzing: python tests/fuzz/run.py TARGET|all SECONDS [libFuzzer options]

A defect ends it with a traceback and writes the input to crash-… in the working directory: mend
the code, then put that file into tests/fuzz/corpus/TARGET. New inputs that reach new code are
written to a temporary directory and merged into nothing: the corpus in the tree stays small.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent.parent)]

with atheris.instrument_imports(include=["wggw"]):
    import wggw  # noqa: F401

import targets  # noqa: E402

ALL = list(targets.TARGETS)


def everything(data: bytes) -> None:
    """The first byte chooses the target."""
    if data:
        targets.TARGETS[ALL[data[0] % len(ALL)]](data[1:])


def main() -> None:
    name, seconds, *options = sys.argv[1:]
    with tempfile.TemporaryDirectory() as found:
        for number, target in enumerate(ALL if name == "all" else []):
            for kept, data in enumerate(targets.corpus(target)):
                Path(found, f"{target}{kept}").write_bytes(bytes([number]) + data)
        arguments = [sys.argv[0], f"-max_total_time={seconds}", "-timeout=20", "-rss_limit_mb=1024"]
        arguments += ["-max_len=20000", *options, found]
        arguments += [] if name == "all" else [str(targets.CORPUS / name)]
        atheris.Setup(arguments, everything if name == "all" else targets.TARGETS[name])
        atheris.Fuzz()


if __name__ == "__main__":
    main()
