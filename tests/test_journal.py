"""The files of a state: what damaged bytes give, clear and sealed; files of the version before."""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import os
import random
import shutil
import sqlite3
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fakes import Crash, FakeDisk, Lost, World, build, do, submit, traffic_of
from harness import a_key, some, wait_for
from hypothesis import given
from hypothesis import strategies as st

import wggw
from wggw import DamagedError, Journal, JournalFile, Seal, Vault, encode_landing, journal_header

SECRET = "a key for what lies on disk"
VAULT = Vault(SECRET)
DATA = Path(__file__).parent / "data" / "journal-1"

# --- bytes ----------------------------------------------------------------------------------------

AFTER = 41
LANDINGS = [[b'{"put":[1]}'], [b'{"put":[2]}', b'{"del":[3]}'], [b"{}"], [b'{"put":[4]}', b"{}"]]
RECORDS = [[json.loads(record) for record in landing] for landing in LANDINGS]


class Sample:
    """A journal's bytes, and where each line begins and ends."""

    def __init__(self, vault: Vault | None) -> None:
        self.vault = vault
        seal = Seal(vault, b"journal") if vault else None
        self.data = journal_header(AFTER, seal)
        self.header = len(self.data)
        self.ends = [self.header]
        number = AFTER
        for contents in LANDINGS:
            self.data += encode_landing(number + 1, number, contents, seal)
            self.ends.append(len(self.data))
            number += len(contents)

    def read(self, data: bytes) -> int | None:
        """How many lines there are, None for damage; any other answer is the test's failure."""
        try:
            file = wggw.parse_journal(data, "name", self.vault)
        except DamagedError as error:
            assert "name" in str(error) and error.code == 3
            return None
        records = [landing.records for landing in file.landings]
        assert records == RECORDS[: len(records)]
        assert file.size + file.torn == len(data)
        return len(records)


@pytest.fixture(params=[None, VAULT], ids=["clear", "sealed"])
def sample(request: pytest.FixtureRequest) -> Sample:
    return Sample(request.param)


def test_every_prefix_keeps_every_whole_line(sample: Sample) -> None:
    for length in range(len(sample.data) + 1):
        whole = sum(end <= length for end in sample.ends) - 1
        assert sample.read(sample.data[:length]) == (None if whole < 0 else whole)


def test_every_changed_byte_is_damage_or_a_torn_end(sample: Sample) -> None:
    """A line that a later one knew to be on disk is damage. One whose end is hit joins the next."""
    for place in range(len(sample.data)):
        line = sum(end <= place for end in sample.ends)  # 0: the header
        joins = place + 1 in sample.ends
        for bit in range(8):
            changed = bytes([sample.data[place] ^ 1 << bit])
            found = sample.read(sample.data[:place] + changed + sample.data[place + 1 :])
            if line < len(LANDINGS) - joins:
                assert found is None, (place, bit)
            else:
                assert found in (None, line - 1)


def test_every_removed_and_every_inserted_byte_gives_a_prefix_or_damage(sample: Sample) -> None:
    for place in range(len(sample.data)):
        sample.read(sample.data[:place] + sample.data[place + 1 :])
        for byte in (b"\n", b" ", b"0"):
            sample.read(sample.data[:place] + byte + sample.data[place:])


def test_missing_repeated_and_exchanged_lines_are_damage(sample: Sample) -> None:
    lines = sample.data.splitlines(keepends=True)
    for n in range(1, len(lines) - 1):
        assert sample.read(b"".join(lines[:n] + lines[n + 1 :])) is None, "missing"
        swapped = [*lines[:n], lines[n + 1], lines[n], *lines[n + 2 :]]
        assert sample.read(b"".join(swapped)) is None, "exchanged"
        found = sample.read(b"".join([*lines[: n + 1], *lines[n:]]))
        assert found is None or found == len(LANDINGS), "repeated"


def test_a_line_that_lost_the_one_in_front_of_it_is_damage_also_at_the_end(sample: Sample) -> None:
    lines = sample.data.splitlines(keepends=True)
    assert sample.read(b"".join([*lines[:-2], lines[-1]])) is None


def test_a_line_behind_one_that_was_never_synced_is_torn_with_it() -> None:
    """DURABILITY=interval: the later line reached the disk and the earlier one did not."""
    first, second, third = (encode_landing(n, AFTER, [b"{}"], None) for n in (42, 43, 44))
    file = wggw.parse_journal(journal_header(AFTER) + first + bytes(len(second)) + third, "name")
    assert [landing.first for landing in file.landings] == [42]


def test_zeros_behind_the_end_are_dropped(sample: Sample) -> None:
    """What a file system may leave of a write that was cut by a power failure."""
    assert sample.read(sample.data + bytes(4096)) == len(LANDINGS)


@given(junk=st.binary(max_size=200))
def test_any_bytes_are_read_or_damage(junk: bytes) -> None:
    with contextlib.suppress(DamagedError):
        assert wggw.parse_journal(junk, "name").landings == []
    assert Sample(None).read(Sample(None).data + junk) is not None


def resealed(line: bytes, first: int) -> bytes:
    """A line under another number, its checksum made right: only the seal can tell."""
    return wggw.journal_line(first, 0, line.rstrip(b"\n").split(b" ", 3)[3])


def test_a_sealed_line_opens_in_its_place_and_its_file_alone() -> None:
    sample, other = Sample(VAULT), Sample(VAULT)
    header, *lines = sample.data.splitlines(keepends=True)
    foreign = other.data.splitlines(keepends=True)[1]
    plain = wggw.journal_line(AFTER + 1, AFTER, b'[{"put":[1]}]')
    for line in (resealed(lines[1], AFTER + 1), foreign, plain):
        assert sample.read(header + line) is None
    assert sample.read(header + resealed(lines[0], AFTER + 1)) == 1


@pytest.mark.parametrize("vault", [None, Vault("another key than that one")])
def test_a_sealed_journal_without_records_is_read_with_its_key_only(vault: Vault | None) -> None:
    header = journal_header(7, Seal(VAULT, b"journal"))
    assert wggw.parse_journal(header, "name", VAULT).after == 7
    with pytest.raises(wggw.ConfigError, match="SNAPSHOT_KEY"):
        wggw.parse_journal(header, "name", vault)


def test_absent_journal_is_none_and_unreadable_is_damage(tmp_path: Path) -> None:
    assert wggw.read_journal(str(tmp_path / "absent")) is None
    with pytest.raises(DamagedError):
        wggw.read_journal(str(tmp_path))


# --- the open journal -----------------------------------------------------------------------------


def started(path: Path, disk: FakeDisk, after: int = 0) -> Journal:
    journal = Journal(str(path), disk)
    journal.start(after)
    return journal


def numbers(path: Path) -> list[int]:
    file = wggw.read_journal(str(path))
    assert file is not None
    return [landing.first for landing in file.landings]


def test_a_journal_goes_on_behind_a_torn_tail(tmp_path: Path) -> None:
    sample = Sample(None)
    path = tmp_path / "j"
    path.write_bytes(sample.data + b"48 1 torn")
    file = wggw.read_journal(str(path))
    assert file is not None and file.torn == 9
    journal = Journal(str(path), FakeDisk())
    journal.resume(file)
    journal.write(AFTER + 7, [b"{}"], True)
    journal.close()
    assert numbers(path) == [42, 43, 45, 46, 48]


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_after_a_fault_nothing_is_written_and_the_line_can_be_taken_away(
    tmp_path: Path, call: str
) -> None:
    disk, path = FakeDisk(), tmp_path / "j"
    journal = started(path, disk)
    journal.write(1, [b"{}"], True)
    disk.fail(call)
    with pytest.raises(wggw.DiskError):
        journal.write(2, [b"{}"], True)
    assert journal.withdraw()
    assert numbers(path) == [1]
    calls = disk.faults.calls.copy()
    for attempt in (lambda: journal.write(3, [b"{}"], True), lambda: journal.cut(1)):
        with pytest.raises(wggw.DiskError):
            attempt()
    journal.flush()
    assert disk.faults.calls == calls
    journal.close()


@pytest.mark.parametrize("call", ["truncate", "fsync"])
def test_a_line_that_may_still_be_there_is_said_to_be_so(tmp_path: Path, call: str) -> None:
    disk = FakeDisk()
    journal = started(tmp_path / "j", disk)
    disk.fail("write")
    with pytest.raises(wggw.DiskError):
        journal.write(1, [b"{}"], True)
    disk.fail(call)
    assert not journal.withdraw()
    journal.close()


def test_a_record_that_there_is_no_memory_for_is_a_disk_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = started(tmp_path / "j", FakeDisk())

    def no_memory(*_: Any) -> bytes:
        raise MemoryError

    monkeypatch.setattr(wggw, "encode_landing", no_memory)
    with pytest.raises(wggw.DiskError, match="MemoryError"):
        journal.write(1, [b"{}"], True)
    journal.close()


def test_cut_drops_what_the_snapshot_holds_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = started(path, FakeDisk())
    for number in range(1, 6):
        journal.write(number, [b"{}"], True)
    journal.cut(3)
    assert numbers(path.with_suffix(".previous")) == [1, 2, 3, 4, 5]
    assert numbers(path) == [4, 5]
    journal.write(6, [b"{}"], True)
    journal.cut(6)
    assert numbers(path) == []
    journal.write(7, [b"{}"], True)
    assert numbers(path) == [7]
    journal.close()


@pytest.mark.parametrize("away", ["moved", "removed", "replaced", "directory"])
def test_a_journal_that_was_taken_away_acknowledges_nothing(tmp_path: Path, away: str) -> None:
    (tmp_path / "d").mkdir()
    path = tmp_path / "d" / "j"
    journal = started(path, FakeDisk())
    if away == "directory":
        path.parent.rename(tmp_path / "elsewhere")
    elif away == "moved":
        path.rename(tmp_path / "d" / "k")
    else:
        path.unlink()
    if away == "replaced":
        path.write_bytes(journal_header(0))
    with pytest.raises(wggw.DiskError):
        journal.look()
    with pytest.raises(wggw.DiskError):
        journal.write(1, [b"{}"], True)
    journal.close()


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_a_replaced_file_is_the_old_or_the_new_one_and_leaves_nothing_beside_it(
    tmp_path: Path, call: str
) -> None:
    disk, path = FakeDisk(), tmp_path / "file"
    disk.replace(str(path), [b"old"])
    disk.fail(call)
    with pytest.raises(OSError, match="Input"):
        disk.replace(str(path), [b"n", b"ew"])
    assert path.read_bytes() == b"old"

    def parts() -> Iterator[bytes]:
        yield b"new"
        raise MemoryError

    with pytest.raises(MemoryError):
        disk.replace(str(path), parts())
    assert os.listdir(tmp_path) == ["file"]
    disk.replace(str(path), [memoryview(b"n"), b"ew"])
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600


# --- snapshots ------------------------------------------------------------------------------------

LARGE = b"SQLite format 3\0" + bytes(range(256)) * 1000  # four chunks, the last one short


def chunks(data: bytes) -> tuple[bytes, list[bytes]]:
    start, size = data.index(b"\n") + 1, wggw.SNAPSHOT_CHUNK + 16
    return data[:start], [data[n : n + size] for n in range(start, len(data), size)]


@pytest.mark.parametrize("length", [wggw.SNAPSHOT_CHUNK, 2 * wggw.SNAPSHOT_CHUNK, len(LARGE)])
def test_every_moved_cut_or_foreign_chunk_is_noticed(length: int) -> None:
    data = b"".join(wggw.snapshot_parts(LARGE[:length], VAULT))
    head, parts = chunks(data)
    other = chunks(b"".join(wggw.snapshot_parts(LARGE[:length], VAULT)))[1]
    assert wggw.decode_snapshot(data, VAULT, "name")[100:] == LARGE[100:length]
    moved = [parts[:n] for n in range(len(parts))]
    moved += [parts[:n] + parts[n + 1 :] for n in range(len(parts))]
    moved += [[*parts[:n], parts[n], *parts[n:]] for n in range(len(parts))]
    moved += [[*parts[:n], other[n], *parts[n + 1 :]] for n in range(len(parts))]
    moved += [[*parts[:n], parts[n][:-1], *parts[n + 1 :]] for n in range(len(parts))]
    moved += [[*parts, bytes(16)], [*parts, parts[0]], parts[::-1] if len(parts) > 1 else []]
    for changed in moved:
        # The seal itself notices, not only the checksum of what it holds.
        with pytest.raises(DamagedError, match="does not decrypt" if changed else "snapshot"):
            wggw.decode_snapshot(b"".join([head, *changed]), VAULT, "name")


def test_the_cipher_is_given_bytes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cryptography package of Debian 12 (38.0.4) takes nothing else."""
    given: list[type] = []
    genuine = Seal.seal

    def seal(self: Seal, number: int, bound: bytes, plaintext: bytes) -> bytes:
        given.append(type(plaintext))
        return genuine(self, number, bound, plaintext)

    monkeypatch.setattr(Seal, "seal", seal)
    list(wggw.snapshot_parts(LARGE, VAULT))
    assert given == [bytes] * 4


def test_each_purpose_has_a_key_of_its_own() -> None:
    salt = bytes(16)
    sealed = Seal(VAULT, b"journal", salt).seal(1, b"", b"text")
    assert Seal(VAULT, b"journal", salt).open(1, b"", sealed) == b"text"
    for number, bound, purpose in (
        (2, b"", b"journal"),
        (1, b"x", b"journal"),
        (1, b"", b"snapshot"),
    ):
        with pytest.raises(ValueError, match="decrypt"):
            Seal(VAULT, purpose, salt).open(number, bound, sealed)


# --- a state's files together ---------------------------------------------------------------------


def furnished(path: Path, **settings: str) -> World:
    """Files of two generations, the journal with records behind the snapshot; killed."""
    path.mkdir(exist_ok=True)
    world = build(path, FakeDisk(), **settings)
    for number in range(1, 4):
        do(world.gateway, "create", public_key=a_key(number), protocol="dual")
        if number < 3:
            world.gateway.lander.snapshot()
    world.crash()
    return world


def peers_of(world: World) -> set[str]:
    return {peer.public_key for peer in world.store.peers_after(0, 1000)}


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def refused(world: World) -> str:
    """The start is refused with exit code 3, and nothing on disk was changed."""
    before = contents(world.directory)
    with pytest.raises(DamagedError) as caught:
        world.open()
    assert caught.value.code == 3
    assert contents(world.directory) == before
    return str(caught.value)


@pytest.fixture(params=[{}, {"SNAPSHOT_KEY": SECRET}], ids=["clear", "sealed"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    return furnished(tmp_path / "files", **request.param)


def test_a_missing_file_is_refused(world: World) -> None:
    path, kept = world.directory, contents(world.directory)
    names = {"wireguard.db", "wireguard.db.previous", "wireguard.db.journal"}
    assert names | {"wireguard.db.journal.previous"} == kept.keys()
    for gone in ({"wireguard.db"}, {"wireguard.db.journal"}, names - {"wireguard.db.journal"}):
        for name in gone:
            (path / name).unlink()
        assert str(path / "wireguard.db") in refused(world)
        for name in gone:
            (path / name).write_bytes(kept[name])
    world.open().close()


def test_a_journal_that_does_not_follow_the_snapshot_is_refused(world: World) -> None:
    os.replace(world.directory / "wireguard.db.previous", world.directory / "wireguard.db")
    assert "wireguard.db.journal" in refused(world)


def test_an_empty_foreign_or_cut_snapshot_is_refused(world: World) -> None:
    path = world.directory / "wireguard.db"
    good = path.read_bytes()
    for content in (b"", b"x", bytes(4096), good[:1000], good[:-4096], b"SQLite format 3\0"):
        path.write_bytes(content)
        assert str(path) in refused(world)


def test_flipped_bits_of_the_files_are_refused_or_a_torn_end(world: World) -> None:
    """SQLite's own check does not see a changed address or key: the checksum does."""
    places = random.Random(1)
    for name in ("wireguard.db", "wireguard.db.journal"):
        path = world.directory / name
        good = path.read_bytes()
        last = good.rfind(b"\n", 0, len(good) - 1) if name.endswith("journal") else len(good)
        for place in [*range(min(60, last)), *places.sample(range(last), min(60, last))]:
            garbled = bytearray(good)
            garbled[place] ^= 1 << places.randrange(8)
            path.write_bytes(garbled)
            assert str(path) in refused(world)
        path.write_bytes(good)


def by_other_hands(path: Path, *statements: str) -> None:
    """An application id of 0 says that it was changed on purpose: see decode_snapshot()."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        for statement in (*statements, "PRAGMA application_id = 0"):
            db.execute(statement)


def test_a_snapshot_changed_by_other_hands_is_read_when_it_says_so(tmp_path: Path) -> None:
    world = furnished(tmp_path / "files")
    path = world.directory / "wireguard.db"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("UPDATE peers SET dns = 'd2' WHERE id = 1")
    refused(world)
    by_other_hands(path)
    world.open()
    found = world.store.get(a_key(1))
    assert found is not None and found.dns == "d2"
    world.close()


def test_a_database_of_a_newer_version_is_no_damage_to_repair(tmp_path: Path) -> None:
    """`wggw check --repair` would put the snapshot before it in its place."""
    world = furnished(tmp_path / "files")
    by_other_hands(world.directory / "wireguard.db", "PRAGMA user_version = 99")
    with pytest.raises(wggw.NewerError, match="install the newer one again") as caught:
        world.open()
    assert caught.value.code == 3 and "--repair" not in str(caught.value)
    with pytest.raises(wggw.NewerError):
        wggw.repair(world.files)
    assert not (world.directory / "wireguard.db.repaired").exists()


@pytest.mark.parametrize(
    "statement",
    [
        "ANALYZE",
        "CREATE INDEX more ON peers (label)",
        "DROP INDEX peers_expired",
        "CREATE VIEW more AS SELECT * FROM peers",
        "CREATE TRIGGER more AFTER UPDATE ON peers BEGIN DELETE FROM traffic; END",
    ],
)
def test_other_hands_leave_no_trace_in_the_schema(tmp_path: Path, statement: str) -> None:
    """Or no other gateway takes the snapshot, and none boots from the remote copy."""
    world = furnished(tmp_path / "files")
    path = world.directory / "wireguard.db"
    by_other_hands(path, statement)
    wggw.open_state(path.read_bytes())
    world.open()
    peers = peers_of(world)
    world.gateway.limits.expire()
    exported = world.gateway.export()
    assert {peer.public_key for peer in wggw.open_state(exported).peers_after(0, 9)} == peers
    world.close()


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        ("PRAGMA user_version = 0", "version 0"),
        ("DROP TABLE released", "released"),
        ("DELETE FROM meta", "number"),
    ],
)
def test_a_snapshot_of_another_make_is_refused(tmp_path: Path, statement: str, told: str) -> None:
    world = furnished(tmp_path / "files")
    by_other_hands(world.directory / "wireguard.db", statement)
    assert told in refused(world)


BAD_RECORDS = [
    b'{"put":[],"new":1}',
    b'{"del":[NaN]}',
    b'{"del":[1e999]}',
    b'{"del":[99]}',
    b'{"put":[[1,2]]}',
    b'{"put":{"a":1}}',
    b'{"set":{"number":"7"}}',
    b'{"set":{"obfuscation":"7"}}',
    b'{"traffic":[[1,2]]}',
    b"[]",
    b"7",
    b"[" * 2000 + b"]" * 2000,
]


@pytest.mark.parametrize("content", BAD_RECORDS, ids=range(len(BAD_RECORDS)))
def test_a_record_that_is_not_understood_is_refused(world: World, content: bytes) -> None:
    """With a checksum and a seal that fit: a later version, or other hands."""
    path = world.directory / "wireguard.db.journal"
    vault = VAULT if world.config.snapshot_key else None
    file = wggw.read_journal(str(path), vault)
    assert file is not None
    records = [*(json.dumps(r).encode() for lan in file.landings for r in lan.records), content]
    seal = Seal(vault, b"journal") if vault else None
    line = encode_landing(file.after + 1, file.after, records, seal)
    path.write_bytes(journal_header(file.after, seal) + line)
    assert "wireguard.db.journal" in refused(world)


def test_columns_of_a_later_version_are_refused_and_of_an_earlier_one_read(tmp_path: Path) -> None:
    world = furnished(tmp_path / "files")
    path = world.directory / "wireguard.db.journal"
    file = wggw.read_journal(str(path))
    assert file is not None
    [[row]] = [landing.records[0]["put"] for landing in file.landings]
    for columns, values, good in (
        ([*wggw.Peer._fields, "colour"], [*row, "red"], False),
        (wggw.Peer._fields[:-1], row[:-1], True),
    ):
        text = b"%b %d %b" % (wggw.JOURNAL_MAGIC, file.after, ",".join(columns).encode())
        header = b"%b %08x\n" % (text, zlib.crc32(text))
        content = json.dumps({"put": [values]}).encode()
        path.write_bytes(header + encode_landing(file.after + 1, file.after, [content], None))
        if not good:
            assert "colour" in refused(world)
    world.open()
    assert peers_of(world) == {a_key(1), a_key(2), a_key(3)}
    world.close()


def test_what_the_interface_refused_is_void_in_every_replay(world: World) -> None:
    world.open()
    world.backend.refusing = {a_key(7)}
    with pytest.raises(wggw.Unavailable):
        do(world.gateway, "create", public_key=a_key(7))
    world.crash()
    world.backend.refusing = set()
    world.open()
    assert a_key(7) not in peers_of(world)
    world.close()


@pytest.mark.parametrize("durability", ["commit", "interval", "none"])
def test_every_durability_keeps_what_a_snapshot_holds(tmp_path: Path, durability: str) -> None:
    world = furnished(tmp_path / "files", DURABILITY=durability)
    world.open()
    kept = {a_key(1), a_key(2)} | ({a_key(3)} if durability != "none" else set())
    assert peers_of(world) == kept
    world.close()


def test_durability_and_key_may_change_between_starts(tmp_path: Path) -> None:
    expected: set[str] = set()
    for number, durability in enumerate(["commit", "none", "interval", "none", "commit"]):
        key = {"SNAPSHOT_KEY": SECRET} if number > 2 else {}
        world = build(tmp_path, DURABILITY=durability, **key)
        assert peers_of(world) == expected
        do(world.gateway, "create", public_key=a_key(number))
        expected.add(a_key(number))
        if number % 2:
            world.close()
        else:
            world.gateway.lander.snapshot()
            world.crash()


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(wggw.StartError, match="DB_PATH"):
        build(tmp_path / "absent")


def test_a_snapshot_is_an_ordinary_database_for_its_owner_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        world = furnished(tmp_path / "files")
    finally:
        os.umask(old)
    with contextlib.closing(sqlite3.connect(world.directory / "wireguard.db")) as db:
        rows = db.execute("SELECT public_key FROM peers ORDER BY id").fetchall()
    assert rows == [(a_key(1),), (a_key(2),)]
    for file in world.directory.iterdir():
        assert file.stat().st_mode & 0o077 == 0, file


def test_a_snapshot_is_written_only_when_something_changed(world: World) -> None:
    world.open()
    world.gateway.lander.snapshot()
    before = contents(world.directory)
    world.gateway.lander.snapshot()
    assert contents(world.directory) == before
    world.close()


@pytest.mark.parametrize("place", ["image", "write_snapshot"])
def test_a_snapshot_for_which_there_was_no_memory_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Without a journal it is the only thing that has the changes."""

    def fail(*_: Any) -> Any:
        raise MemoryError

    world = build(tmp_path, DURABILITY="none")
    do(world.gateway, "create", public_key=a_key(1))
    with monkeypatch.context() as patched:
        patched.setattr(world.files, place, fail)
        world.gateway.lander.snapshot()
        assert world.gateway.degraded() == ["snapshot: MemoryError"]
    world.gateway.lander.heal()
    assert world.gateway.degraded() == []
    world.crash()
    assert peers_of(world.open()) == {a_key(1)}
    world.close()


def test_the_log_names_each_reason_for_no_snapshot_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = build(tmp_path)
    for error in (errno.ENOSPC, errno.EIO):
        world.disk.fail("write", forever=True, error=error)
        with pytest.raises(wggw.Unavailable):
            do(world.gateway, "create", public_key=a_key(1))
        for _ in range(3):
            world.gateway.lander.heal()
        world.disk.heal()
    said = [m for m in caplog.messages if m.startswith("cannot write a snapshot")]
    assert [m.rpartition(": ")[2] for m in said] == [
        os.strerror(errno.ENOSPC),
        os.strerror(errno.EIO),
    ]
    world.gateway.lander.heal()
    world.close()


# --- a disk that fails at the start ---------------------------------------------------------------


@pytest.mark.parametrize("torn", [False, True], ids=["whole", "torn"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_start_on_a_disk_that_fails_serves_reads_and_heals(
    world: World, error: int, torn: bool
) -> None:
    """The interface was made anew meanwhile, so that there is something to note, too."""
    world.open()
    world.backend.move(a_key(1), 500)
    world.gateway.projection.sample()
    world.crash()
    if torn:
        path = world.directory / "wireguard.db.journal"
        path.write_bytes(path.read_bytes() + b"9 9")
    world.backend.restart()
    world.disk.fail(forever=True, error=error)
    world.open()
    assert world.gateway.ready
    assert peers_of(world) == {a_key(1), a_key(2), a_key(3)} == world.backend.peers.keys()
    assert traffic_of(world.gateway, a_key(1)).rx_bytes == 500
    with pytest.raises(wggw.Unavailable):
        do(world.gateway, "create", public_key=a_key(4))
    world.gateway.lander.heal()
    assert world.gateway.degraded()
    world.disk.heal()
    world.gateway.lander.heal()
    assert world.gateway.degraded() == []
    do(world.gateway, "create", public_key=a_key(4))
    world.backend.move(a_key(1), 600)  # more than was seen before it began anew
    world.gateway.projection.sample()
    assert traffic_of(world.gateway, a_key(1)).rx_bytes == 1100
    world.crash()
    world.open()
    assert peers_of(world) == {a_key(1), a_key(2), a_key(3), a_key(4)}
    world.close()


def test_a_journal_that_is_removed_while_running_is_never_taken_for_an_empty_one(
    world: World,
) -> None:
    """Between its loss and the fresh snapshot a start is refused: a change is gone."""
    world.open()
    path = world.directory / "wireguard.db.journal"
    path.unlink()
    with pytest.raises(wggw.Unavailable):
        do(world.gateway, "create", public_key=a_key(4))
    world.disk.fail("write", "rename", nth=3, forever=True)
    world.gateway.lander.heal()
    assert world.gateway.ledger.failure
    world.crash()
    world.disk.heal()
    refused(world)


def test_after_a_removed_journal_a_fresh_snapshot_mends_all(world: World) -> None:
    world.open()
    (world.directory / "wireguard.db.journal").unlink()
    world.gateway.lander.heal()
    do(world.gateway, "create", public_key=a_key(4))
    world.crash()
    world.open()
    assert peers_of(world) == {a_key(1), a_key(2), a_key(3), a_key(4)}
    world.close()


# --- nonces and salts -----------------------------------------------------------------------------


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[tuple[bytes, int]]]:
    """How often each (salt, nonce) was used in this process."""
    counted: Counter[tuple[bytes, int]] = Counter()
    seal = Seal.seal

    def counting(self: Seal, number: int, bound: bytes, plaintext: bytes) -> bytes:
        counted[self.header, number] += 1
        return seal(self, number, bound, plaintext)

    monkeypatch.setattr(Seal, "seal", counting)
    yield counted


@pytest.mark.parametrize("fault", ["none", "once", "forever", "crash"])
def test_no_nonce_is_used_twice(
    tmp_path: Path, used: Counter[tuple[bytes, int]], fault: str
) -> None:
    """Over restarts, torn tails, and a fault at any call; the same files go on."""
    world = World(tmp_path, SNAPSHOT_KEY=SECRET)
    for life in range(12):
        if life and fault in ("once", "forever"):
            world.disk.fail(nth=life + 2, forever=fault == "forever")
        elif life and fault == "crash":
            world.disk.crash(nth=life + 9, where="middle")
        with contextlib.suppress(Crash):
            world.open()
            for number in range(4):  # some of them wait for the disk to work again
                submit(world.gateway, "create", public_key=a_key((life, number)))
                wait_for(lambda: world.gateway.ledger.waiting.empty() or world.crashed)
                if number == 2:
                    world.gateway.lander.snapshot()
            world.disk.heal()
            world.gateway.lander.heal()
            with contextlib.suppress(Lost):
                do(world.gateway, "create", public_key=a_key((life, 4)))
        world.disk.heal()
        world.crash()
        path = tmp_path / "wireguard.db.journal"
        if path.exists():
            path.write_bytes(path.read_bytes()[:-3] if life % 2 else path.read_bytes())
    assert used.total() > 24
    assert [key for key, times in used.items() if times > 1] == []
    assert len({salt for salt, _ in used}) > 6


def test_nothing_plain_is_left_when_turning_the_key_on_was_interrupted(tmp_path: Path) -> None:
    """The process ends at every call of the first start with the key; the next start ends it."""
    first = furnished(tmp_path / "first")

    def readable(path: Path) -> set[str]:
        keys = [a_key(number).encode() for number in range(1, 4)]
        return {n for n, text in contents(path).items() if any(key in text for key in keys)}

    assert len(readable(first.directory)) == 4
    for nth in range(1, 60):
        for where in ("before", "after"):
            path = tmp_path / f"{nth}{where}"
            shutil.copytree(first.directory, path)
            world = World(path, SNAPSHOT_KEY=SECRET)
            world.disk.crash(nth=nth, where=where)
            with contextlib.suppress(Crash):
                world.open()
            crashed = world.crashed
            world.disk.heal()
            world.crash()
            world.open()
            assert peers_of(world) == {a_key(1), a_key(2), a_key(3)}
            assert readable(path) == set(), (nth, where)
            world.crash()
        if not crashed:
            assert nth > 5
            return
    raise AssertionError("the start does not end")


# --- version 1 ------------------------------------------------------------------------------------

SEALED_CASES = {"sealed", "open-sealed"}
CASES = sorted(path.name for path in DATA.iterdir())


def laid_out(case: str, target: Path) -> tuple[World, dict[str, Any]]:
    """A golden directory of version 1, and the state that that version itself read from it."""
    shutil.copytree(DATA / case, target)
    for name in ("db", "db.journal", "db.journal.previous"):
        source, path = target / name, target / f"wireguard.{name}"
        if name == "db":
            path.write_bytes(gzip.decompress((target / "db.gz").read_bytes()))
        elif source.exists():
            source.rename(path)
    (target / "db.gz").unlink()
    expected = json.loads((target / "state.json").read_text())
    newer = {**dict.fromkeys(("label", "service_class", "quota_period")), "quota_base": 0}
    expected["peers"] = [row | newer for row in expected["peers"]]
    (target / "state.json").unlink()
    sealed = {"SNAPSHOT_KEY": "a secret of some length"} if case in SEALED_CASES else {}
    subnets = {"WG_IPV4_SUBNET": "10.0.0.0/24", "WG_IPV6_SUBNET": "fd00::/64"}
    return World(target, **subnets, **sealed), expected


def told(store: wggw.Store) -> dict[str, Any]:
    """What a state.json says, of a store."""
    settings = store._db.execute("SELECT name, value FROM meta WHERE name = 'obfuscation'")
    return {
        "peers": [peer._asdict() for peer in store.peers_after(0, 1000)],
        "traffic": [
            list(row[:6]) for row in store._db.execute("SELECT * FROM traffic ORDER BY id")
        ],
        "released": store.released.addresses(),
        "settings": dict(settings.fetchall()),
    }


def only_read(world: World) -> wggw.Store:
    vault = Vault(world.config.snapshot_key) if world.config.snapshot_key else None
    return wggw.Files(world.config.db_path, "commit", wggw.Disk(), vault).load()


@pytest.mark.parametrize("case", CASES)
def test_files_of_version_1_are_read_as_it_read_them_and_are_then_of_this_one(
    tmp_path: Path, case: str
) -> None:
    world, expected = laid_out(case, tmp_path / case)
    store = only_read(world)
    assert 0 < store.number <= expected.pop("number")
    found = told(store)
    for state in (found, expected):  # here counters begin at 0 with the suspension, there later
        gone = [row["id"] for row in state["peers"] if row["status"] == "suspended"]
        state["traffic"] = [r[:3] + r[5:] if r[0] in gone else r for r in state["traffic"]]
    assert found == expected
    world.open()
    do(world.gateway, "create", public_key=a_key("new"))
    world.crash()
    journal = (world.directory / "wireguard.db.journal").read_bytes()
    assert journal.startswith(wggw.JOURNAL_MAGIC)
    found = told(only_read(world))
    assert [row["public_key"] for row in found["peers"]] == [
        *(row["public_key"] for row in expected["peers"]),
        a_key("new"),
    ]


@pytest.mark.parametrize("case", CASES)
def test_a_crash_at_each_call_of_the_upgrade_loses_nothing(tmp_path: Path, case: str) -> None:
    for nth in some(range(1, 40), 8):
        world, expected = laid_out(case, tmp_path / str(nth))
        world.disk.crash(nth=nth, where="after" if nth % 2 else "middle")
        with contextlib.suppress(Crash):
            world.open()
        crashed = world.crashed
        world.disk.heal()
        world.crash()
        assert told(only_read(world))["peers"] == expected["peers"]
        if not crashed:
            break


def lines_of(path: Path, vault: Vault | None = None) -> Sequence[bytes]:
    return path.read_bytes().splitlines(keepends=True)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "a line is missing": lambda data: b"".join(
        line for n, line in enumerate(data.splitlines(keepends=True)) if n != 2
    ),
    "a byte is changed": lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:],
    "the header is changed": lambda data: data[:15] + b"7" + data[16:],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("case", ["plain", "sealed"])
def test_damaged_files_of_version_1_are_refused(tmp_path: Path, case: str, damage: str) -> None:
    world, _ = laid_out(case, tmp_path / case)
    path = world.directory / "wireguard.db.journal"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert str(path) in refused(world)


def test_a_record_of_version_1_with_unknown_parts_is_refused(tmp_path: Path) -> None:
    world, _ = laid_out("plain", tmp_path / "plain")
    path = world.directory / "wireguard.db.journal"
    head, *lines = lines_of(path)
    number = 4 + len(lines) + 1
    content = b'{"put":[],"del":[],"later":1}'
    path.write_bytes(head + b"".join(lines) + wggw.journal_line(number, 0, content))
    assert "later" in refused(world)


def test_two_journals_of_version_1_need_both(tmp_path: Path) -> None:
    world, _ = laid_out("two-journals", tmp_path / "two")
    (world.directory / "wireguard.db.journal.previous").unlink()
    assert "wireguard.db.journal" in refused(world)


def test_an_empty_file_says_what_it_is_of() -> None:
    file = JournalFile(0, (), [], 0, 0, b"")
    store = wggw.Store()
    store.replay(file, "name")
    assert store.number == 0
