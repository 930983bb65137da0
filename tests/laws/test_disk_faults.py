"""What the disk refused never comes back, what it lost is noticed, and nothing odd is accepted."""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from harness import LONG, Answer, Client, a_key, some, wait_for
from rig import (
    EIO,
    ENOSPC,
    SEALED,
    Background,
    Gateway,
    check_interface,
    check_pool,
    line_variants,
    listed,
    memory_gateway,
    patch,
    restarted,
    rotate,
    state,
    status,
    wait_degraded,
    wait_healthy,
)
from sandbox import small_disk

DAMAGED = 3  # the exit code of a start that finds files which it must not use
KEPT = [a_key(("kept", number)) for number in range(5)]
NEW = a_key("new")
NOTICED = 2.5  # seconds until it is noticed that files are gone, on a machine with time for it


def settings(sealed: bool) -> dict[str, str]:
    return SEALED if sealed else {}


def prepare(gateway: Gateway) -> dict[str, dict[str, Any]]:
    client = gateway.client()
    for key in KEPT:
        assert client.create(key).status == 200
    return state(client)


# --- what was refused -----------------------------------------------------------------------------


def status_of(gateway: Gateway, change: Callable[[Client], Answer]) -> int | None:
    """None: there is no answer, because nobody can say what a failing disk has kept."""
    request = Background(gateway, change)
    request.join(60)
    assert request.done()
    return request.answer.status if request.answer else None


# What cannot be taken off the disk again where it stands.
FAULTS: dict[str, list[dict[str, Any]]] = {
    "fsync and ftruncate": [{"calls": ["fsync", "ftruncate"], "errno": EIO}],
    "fsync, but for the first, and ftruncate": [
        {"calls": ["fsync"], "errno": EIO, "after": 1},
        {"calls": ["ftruncate"], "errno": EIO},
    ],
    "fsync, done all the same, and ftruncate": [
        {"calls": ["fsync"], "errno": EIO, "done": True},
        {"calls": ["ftruncate"], "errno": EIO},
    ],
    "the end of a write and ftruncate": [
        {"calls": ["write"], "errno": ENOSPC, "torn": True},
        {"calls": ["ftruncate"], "errno": EIO},
    ],
    "fsync, ftruncate and a new file": [
        {"calls": ["fsync", "ftruncate", "open", "rename", "replace", "link"], "errno": EIO}
    ],
}


@pytest.mark.parametrize(
    ("fault", "sealed"),
    some([(fault, sealed) for sealed in (False, True) for fault in FAULTS], 3),
)
def test_what_was_refused_never_comes_back(tmp_path: Path, fault: str, sealed: bool) -> None:
    with memory_gateway(tmp_path, **settings(sealed)) as gateway:
        before = prepare(gateway)
        gateway.faults.rules(*FAULTS[fault])
        changes: list[Callable[[Client], Answer]] = [
            lambda client: client.create(NEW),
            lambda client: client.delete(KEPT[0]),
            lambda client: client.status(KEPT[1], "suspended"),
            lambda client: patch(client, KEPT[2], quota_bytes=10**9),
            lambda client: rotate(client, KEPT[3], a_key("rotated")),
        ]
        answers = [status_of(gateway, change) for change in changes]
        assert answers[-1] == 503, answers
        assert set(answers) <= {200, 503, None} and answers.count(None) <= 1
        client = gateway.client()
        shown = state(client)
        check_refused(before, shown, [answer or 503 for answer in answers])  # nobody sees it, too
        client = restarted(gateway)
        found = state(client)
        check_refused(before, found, answers)
        if None not in answers:
            assert found == shown
        client = restarted(gateway)
        assert state(client) == found
        check_interface(client)
        check_pool(client)


def check_refused(
    before: dict[str, Any], now: dict[str, Any], answers: Sequence[int | None]
) -> None:
    done = [
        NEW in now,
        KEPT[0] not in now,
        KEPT[1] in now and now[KEPT[1]]["status"] == "suspended",
        KEPT[2] in now and now[KEPT[2]]["quota_bytes"] == 10**9,
        KEPT[3] not in now,
    ]
    for was, answer in zip(done, answers, strict=True):
        assert answer is None or was == (answer == 200), (done, answers)
    assert now[KEPT[4]] == before[KEPT[4]]


# Each kind of call alone, so that there is always a way out.
KINDS = {
    "write": ["write"],
    "fsync": ["fsync"],
    "a new name": ["rename", "replace", "link"],
    "a new file": ["open"],
}


@pytest.mark.parametrize(
    ("kind", "after"),
    some([(kind, after) for after in range(8) for kind in KINDS], 3),
)
def test_every_call_of_a_kind_from_one_on_fails(tmp_path: Path, kind: str, after: int) -> None:
    """Whatever was answered is what there is after a KILL."""
    with memory_gateway(tmp_path, SNAPSHOT_INTERVAL="0.2") as gateway:
        prepare(gateway)
        # Every other time half of a write is done, or all of what is no write.
        gateway.faults.rule(*KINDS[kind], after=after, errno=ENOSPC, torn=bool(after % 2))
        answers: dict[str, int | None] = {}
        for key in (a_key(("swept", number)) for number in range(after + 3)):
            answers[key] = status_of(gateway, lambda client, k=key: client.create(k))  # type: ignore[misc]
        assert list(answers.values()).count(None) <= 1
        if kind in ("write", "fsync"):
            assert answers[a_key(("swept", after + 2))] == 503
        client = restarted(gateway)
        there = listed(client)
        for key, code in answers.items():
            assert code is None or (code == 200) == (key in there), (code, answers)
        assert set(KEPT) <= there.keys()
        check_interface(client)


# --- what is missing, or does not belong together -------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "end", "sealed"),
    some([(m, e, s) for m in ("", ".journal") for e in ("KILL", "TERM") for s in (False, True)], 2),
)
def test_a_start_without_one_of_the_two_is_refused(
    tmp_path: Path, missing: str, end: str, sealed: bool
) -> None:
    with memory_gateway(tmp_path, **settings(sealed)) as gateway:
        prepare(gateway)
        gateway.kill() if end == "KILL" else gateway.stop()
        path = Path(f"{gateway.database}{missing}")
        kept = path.read_bytes()
        path.unlink()
        code, said = gateway.refused_start()
        assert code == DAMAGED, (code, said)
        assert path.name in said and "Traceback" not in said
        assert not path.exists(), "it has made a new one"
        path.write_bytes(kept)
        gateway.start()
        assert set(listed(gateway.client())) == set(KEPT)


@pytest.fixture
def journalled(tmp_path: Path) -> Iterator[tuple[Gateway, bytes]]:
    """A gateway that was killed, and its journal, whose last line is of a create and a patch."""
    with memory_gateway(tmp_path) as gateway:
        prepare(gateway)
        assert patch(gateway.client(), KEPT[0], quota_bytes=10**9).status == 200
        gateway.kill()
        yield gateway, gateway.journal.read_bytes()


def test_records_with_unknown_parts_are_refused(journalled: tuple[Gateway, bytes]) -> None:
    gateway, journal = journalled
    *lines, last = journal.rstrip(b"\n").split(b"\n")
    variants = list(line_variants(last))
    assert variants
    for place, changed in some(variants, 6):
        gateway.journal.write_bytes(b"\n".join([*lines, changed]) + b"\n")
        code, said = gateway.refused_start()
        assert code == DAMAGED, f"{place}: {code} {said}"
        assert "Traceback" not in said and "journal" in said, f"{place}: {said}"
    gateway.journal.write_bytes(journal)
    gateway.start()
    assert set(listed(gateway.client())) == set(KEPT)


# --- files that go away while it runs -------------------------------------------------------------


GONE = ["moved", "removed", "an empty one in its place", "only the journal removed"]


def take_away(gateway: Gateway, how: str, spare: Path) -> None:
    directory = gateway.database.parent
    if how == "removed":
        shutil.rmtree(directory)
    elif how == "only the journal removed":
        gateway.journal.unlink()
    else:
        directory.rename(spare)
        if how != "moved":
            directory.mkdir()


@pytest.mark.parametrize("how", some(GONE[:2], 1))
def test_a_directory_that_goes_away_is_noticed(tmp_path: Path, how: str) -> None:
    """Changes are refused and the status says so; when there is a directory again, all is well."""
    there, spare = tmp_path / "there", tmp_path / "spare"
    there.mkdir()
    with memory_gateway(tmp_path, DB_PATH=str(there / "wireguard.db")) as gateway:
        prepare(gateway)
        client = gateway.client()
        take_away(gateway, how, spare)
        tries = (client.create(a_key(("away", number))).status for number in itertools.count())
        wait_for(lambda: next(tries) == 503, 4 * NOTICED, "a refusal")
        assert wait_degraded(client)
        assert client.create(NEW).status == 503
        assert client.get(KEPT[0]).status == 200
        if how == "moved":
            spare.rename(there)
        else:
            there.mkdir()
        check_well_again(gateway)


@pytest.mark.parametrize("how", some(GONE[2:], 1))
def test_files_that_go_away_are_noticed(tmp_path: Path, how: str) -> None:
    """There is room for new ones: what is acknowledged a little later is in them."""
    there = tmp_path / "there"
    there.mkdir()
    with memory_gateway(tmp_path, DB_PATH=str(there / "wireguard.db")) as gateway:
        prepare(gateway)
        take_away(gateway, how, tmp_path / "spare")
        with contextlib.suppress(AssertionError):  # or it is noticed at the next change
            wait_degraded(gateway.client(), NOTICED)
        check_well_again(gateway)


def check_well_again(gateway: Gateway) -> None:
    client = gateway.client()

    def is_done() -> bool:
        return client.create(a_key("after")).status == 200

    wait_for(is_done, 30, "a change that is done")
    wait_healthy(client, 30)
    shown = set(listed(client))
    assert {*KEPT, a_key("after")} <= shown
    assert set(listed(restarted(gateway))) == shown


# --- a disk that is full --------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize("sealed", some([True, False], 1), ids=str)
@pytest.mark.parametrize("end", ["KILL", "TERM"] if LONG else ["KILL"])
def test_a_start_on_a_full_disk_serves_what_there_is(
    tmp_path: Path, end: str, sealed: bool
) -> None:
    """It reads, refuses changes and says why; as soon as there is room, all is well by itself."""
    with small_disk(tmp_path / "small") as disk:
        gateway = Gateway(
            tmp_path,
            disk.prefix,
            DB_PATH=str(disk.inside / "wireguard.db"),
            **settings(sealed),
        )
        try:
            gateway.start()
            before = prepare(gateway)
            gateway.kill() if end == "KILL" else gateway.stop()
            disk.fill()
            gateway.start_answering()
            client = gateway.client()
            assert state(client) == before
            refused = [client.create(a_key(("full", number))).status for number in range(50)]
            assert refused[-1] == 503
            assert wait_degraded(client)
            assert re.search("disk|space", " ".join(status(client).json["reasons"]))
            done = {a_key(("full", n)) for n, code in enumerate(refused) if code == 200}
            assert set(listed(client)) == {*KEPT, *done}
            disk.free()
            wait_healthy(client)
            assert client.create(NEW).status == 200
            client = restarted(gateway)
            assert set(listed(client)) == {*KEPT, NEW, *done}
            check_interface(client)
        finally:
            gateway.close()


def test_a_fault_is_told_in_the_log_and_readiness(tmp_path: Path) -> None:
    with memory_gateway(tmp_path) as gateway:
        client = gateway.client()
        gateway.faults.rule("write", "fsync", errno=ENOSPC)
        assert status_of(gateway, lambda client: client.create(NEW)) is None
        wait_degraded(client)
        assert client.create(a_key("another")).status == 503
        assert client.raw("GET", "/readyz", b"", {}).status == 503
        gateway.faults.clear()
        wait_for(lambda: client.raw("GET", "/readyz", b"", {}).status == 200, what="readiness")
        assert "No space left" in gateway.text()
