"""Every parser of outside bytes with kept inputs, mutated inputs, and coverage-guided ones.

Coverage-guided fuzzing here is a short, bounded run that shows the targets work;
tests/fuzz/run.py TARGET SECONDS runs one for as long as wanted.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness import LONG, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))

from targets import CORPUS, TARGETS, corpus

RUNS = 10_000  # inputs that atheris tries
EXAMPLES = 1000 if LONG else 50


def test_every_target_has_a_corpus_and_every_corpus_a_target() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)
    assert all(corpus(name) for name in TARGETS)
    assert sum(path.stat().st_size for path in CORPUS.rglob("*")) < 2**20  # it stays small


@pytest.mark.parametrize("name", TARGETS)
def test_kept_inputs_are_no_defects(name: str) -> None:
    for data in corpus(name):
        TARGETS[name](data)


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_inputs_are_no_defects(name: str) -> None:
    """Two kept inputs cut and joined, with bytes in between: what needs no coverage to be found."""
    kept = corpus(name)

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(
        first=st.sampled_from(kept),
        second=st.sampled_from(kept),
        cuts=st.tuples(st.integers(0, 400), st.integers(0, 400)),
        between=st.binary(max_size=12),
    )
    def check(first: bytes, second: bytes, cuts: tuple[int, int], between: bytes) -> None:
        TARGETS[name](first[: cuts[0]] + between + second[cuts[1] :])

    check()


@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="needs atheris, which has packages for Linux on x86-64",
)
@pytest.mark.long
def test_coverage_guided_inputs_are_no_defects(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/fuzz/run.py"), "all", "60", f"-runs={RUNS}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"Done (\d+) runs", done.stderr)
    assert found and int(found[1]) > 100, done.stderr
