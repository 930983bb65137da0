"""The remote copy: at every moment it is a state that was acknowledged, whatever the store does."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from objects import TOKEN, TlsStore, tls_store
from test_store import BreakableDisk, State, a_peer, closing, commit, opened, put, save, state_of

import wggw
from wggw import (
    Backlog,
    ConfigError,
    Copier,
    CopyDamaged,
    CopyError,
    Disk,
    Manifest,
    ObjectStore,
    Part,
    Record,
    Step,
    Store,
    Vault,
    encode_manifest,
    load_config,
    open_object_store,
    parse_manifest,
    read_copy,
    read_manifests,
    sign_v4,
)

VAULT = Vault("a key for what lies on disk")


class MemoryObjects:
    """An object store that fails at call number `fail_at`, in a `way`."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.calls = 0
        self.fail_at = -1
        self.until = -1  # and at all calls before this one
        self.way = "refuse"
        self.puts: list[str] = []

    def _failing(self) -> bool:
        self.calls += 1
        return self.fail_at <= self.calls <= max(self.fail_at, self.until)

    def get(self, name: str, limit: int) -> bytes | None:
        if self._failing():
            raise CopyError("a fault that was asked for")
        return self.objects.get(name)

    def put(self, name: str, content: bytes) -> None:
        failing = self._failing()
        if not failing or self.way == "lose the answer":
            self.objects[name] = content
        elif self.way == "keep half":
            self.objects[name] = content[: len(content) // 2]
        if failing:
            raise CopyError("a fault that was asked for")
        self.puts.append(name)

    def number(self) -> int:
        found = read_manifests(self)  # type: ignore[arg-type]
        return found[0].number if found else 0


def copier_of(store: Store, objects: Any, boot: bool = True) -> Copier:
    copier = Copier(objects, store, time.time, lambda: save(store) and None)
    if boot:
        copier.boot()
    copier.begin()
    return copier


def booted(path: Path, objects: Any, vault: Vault | None = None) -> Store:
    """A start on these files and that copy, as serve does it."""
    path.mkdir(exist_ok=True)
    store = Store(str(path / "db"), "commit", Disk(), vault)
    current = store.load()
    Copier(objects, store, time.time, lambda: None).boot()
    store.begin(current)
    return store


def copied(objects: Any, path: Path, vault: Vault | None = None) -> State:
    """What a node with an empty disk would boot from; nothing is written."""
    with closing(Store(str(path / "nowhere"), "commit", Disk(), vault)) as store:
        wggw.migrate(store._db)
        with closing(read_copy(objects, read_manifests(objects)[0], store)) as copy:
            return state_of(copy)


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wggw, "COPY_INTERVAL", 0.0)
    monkeypatch.setattr(wggw, "COPY_MAX_PAUSE", 0.0)


# --- what the copy holds --------------------------------------------------------------------------


def history(store: Store, copier: Copier, seen: dict[int, State]) -> None:
    """Changes, snapshots and ticks in turn; `seen` gets the state of every record number."""
    live: list[int] = []
    chance = random.Random(7)
    for step in range(16):
        if live and chance.random() < 0.3:
            gone = a_peer(live.pop(chance.randrange(len(live))))
            store.wait(commit(store, [Step(gone, None)]))
        else:
            live.append(step + 1)
            put(store, a_peer(step + 1))
        seen[store.number] = state_of(store)
        if step % 8 == 5:
            save(store)
        if step % 3 == 2:
            copier.tick()


def test_a_copy_follows_the_store_and_keeps_two_generations(tmp_path: Path) -> None:
    objects = MemoryObjects()
    with closing(opened(tmp_path)) as store:
        copier = copier_of(store, objects)
        history(store, copier, {})
        copier.tick()
        assert copier.state().lag_records == 0 and copier.state().failure is None
        assert copied(objects, tmp_path) == state_of(store)
        newest, older = read_manifests(objects)[0].snapshots  # type: ignore[arg-type]
        assert newest.number > older.number
        objects.objects[f"part-{newest.slot:03d}"] = b"rotten"
        assert copied(objects, tmp_path) == state_of(store)
        objects.objects[f"part-{older.slot:03d}"] = b"rotten"
        with pytest.raises(CopyDamaged):
            copied(objects, tmp_path)


@pytest.mark.parametrize("way", ["refuse", "keep half", "lose the answer"])
@pytest.mark.parametrize("length", [1, 5])
def test_a_fault_at_any_call_leaves_a_state_that_existed(
    tmp_path: Path, way: str, length: int
) -> None:
    for number in itertools.count(3):  # the first two are the boot's
        objects = MemoryObjects()
        objects.way, objects.fail_at, objects.until = way, number, number + length - 1
        directory = tmp_path / str(number)
        directory.mkdir()
        with closing(opened(directory)) as store:
            copier = copier_of(store, objects)
            seen = {0: state_of(store)}
            checked = Watch(copier, objects, seen, directory)
            history(store, checked, seen)  # type: ignore[arg-type]
            for _ in range(length + 2):
                checked.tick()
            calls, objects.fail_at, objects.until = objects.calls, -1, -1
            assert objects.number() == store.number
            assert copied(objects, directory) == state_of(store)
        if calls < number:
            break
    assert number > 15


class Watch:
    """A copier whose copy is read after each tick."""

    def __init__(
        self, copier: Copier, objects: MemoryObjects, seen: dict[int, State], path: Path
    ) -> None:
        self.copier, self.objects, self.seen, self.path = copier, objects, seen, path

    def tick(self) -> None:
        self.copier.tick()
        failing, self.objects.fail_at = self.objects.fail_at, -1
        until, self.objects.until = self.objects.until, -1
        calls = self.objects.calls
        # Nothing but torn first manifests: then there never was a copy.
        with contextlib.suppress(CopyDamaged, IndexError):
            number = read_manifests(self.objects)[0].number  # type: ignore[arg-type]
            assert copied(self.objects, self.path) == self.seen[number]
        self.objects.fail_at, self.objects.until, self.objects.calls = failing, until, calls


def test_a_gateway_that_never_rests_is_not_taken_for_one_far_behind(tmp_path: Path) -> None:
    """A change during each upload: the copy lacks one record all the time, and never for long."""
    objects, now = MemoryObjects(), [1000.0]
    with closing(opened(tmp_path)) as store:
        copier = Copier(objects, store, lambda: now[0], lambda: None)  # type: ignore[arg-type]
        copier.boot()
        copier.begin()
        numbers = itertools.count(1)
        keep = objects.put

        def put_while_a_peer_comes(name: str, content: bytes) -> None:
            keep(name, content)
            put(store, a_peer(next(numbers)))

        objects.put = put_while_a_peer_comes  # type: ignore[method-assign]
        put(store, a_peer(next(numbers)))
        for _ in range(100):
            now[0] += 2
            copier.tick()
            state = copier.state()
            assert state.lag_records > 0 and state.lag_seconds <= 4, state
        objects.fail_at, objects.until = objects.calls, objects.calls + 100
        for _ in range(3):
            now[0] += 100
            copier._next_try = 0.0
            copier.tick()
        assert copier.state().lag_seconds >= 300


def test_slots_are_used_again(tmp_path: Path) -> None:
    objects = MemoryObjects()
    with closing(opened(tmp_path)) as store:
        copier = copier_of(store, objects)
        for number in range(1, 121):
            put(store, a_peer(number))
            copier.tick()
            if number % 10 == 0:
                save(store)
        assert copier.state().lag_records == 0
    assert len(objects.objects) < 40
    assert len(objects.puts) > 200


def test_many_segments_make_a_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wggw, "COPY_SEGMENTS", 10)
    objects = MemoryObjects()
    with closing(opened(tmp_path)) as store:
        copier = copier_of(store, objects)
        for number in range(1, 60):
            put(store, a_peer(number))
            copier.tick()
            assert len(read_manifests(objects)[0].segments) <= 22  # type: ignore[arg-type]
        assert copied(objects, tmp_path) == state_of(store)


def test_what_is_too_much_for_the_backlog_is_copied_by_a_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wggw, "COPY_BACKLOG", 2000)
    objects = MemoryObjects()
    with closing(opened(tmp_path)) as store:
        copier = copier_of(store, objects)
        copier.tick()
        for number in range(1, 41):
            put(store, a_peer(number))
        copier.tick()
        assert copier.state().lag_records == 0
        put(store, a_peer(50))
        copier.tick()
        assert copied(objects, tmp_path) == state_of(store)


def test_the_backlog_is_bounded() -> None:
    backlog = Backlog(1000)
    for number in range(1, 1000):
        backlog.add([Record(number, b"x" * 100)])
        assert len(backlog.above(0)) <= 10
    assert [record.number for record in backlog.above(996)] == [997, 998, 999]


def test_a_healed_disk_fault_and_an_import_reach_the_copy(tmp_path: Path) -> None:
    objects, disk = MemoryObjects(), BreakableDisk()
    with closing(opened(tmp_path, disk)) as store:
        copier = copier_of(store, objects)
        put(store, a_peer(1))
        copier.tick()
        disk.broken = True
        number = commit(store, [Step(None, a_peer(2))])
        with pytest.raises(wggw.DiskError):
            store.wait(number)
        copier.tick()
        disk.broken = False

        def undo() -> None:
            store.discard()
            store.undo([Step(None, a_peer(2))])

        assert save(store, undo)
        put(store, a_peer(3))
        copier.tick()
        assert copied(objects, tmp_path) == state_of(store) == {a_peer(1), a_peer(3)}
        with closing(opened(Path(tmp_path_of(tmp_path, "other")))) as other:
            put(other, a_peer(9))
            image = other.seal(other.image())
        store.adopt(store.read_image(image))
        put(store, a_peer(10))
        copier.tick()
        assert copied(objects, tmp_path) == state_of(store) == {a_peer(9), a_peer(10)}


def tmp_path_of(path: Path, name: str) -> Path:
    (path / name).mkdir(exist_ok=True)
    return path / name


def test_without_a_journal_snapshots_are_copied(tmp_path: Path) -> None:
    objects = MemoryObjects()
    with closing(opened(tmp_path, durability="none")) as store:
        copier = copier_of(store, objects)
        put(store, a_peer(1))
        save(store)
        copier.tick()
        put(store, a_peer(2))
        save(store)
        copier.tick()
        assert copied(objects, tmp_path) == state_of(store)


def test_an_encrypted_copy_shows_nothing_and_needs_its_key(tmp_path: Path) -> None:
    objects = MemoryObjects()
    with closing(opened(tmp_path, vault=VAULT)) as store:
        store.private_keys["wg0"] = "cHJpdmF0ZQ=="
        copier = copier_of(store, objects)
        put(store, a_peer(1))
        copier.tick()
        put(store, a_peer(2))
        copier.tick()
        expected = state_of(store)
    for content in objects.objects.values():
        assert a_peer(1).public_key.encode() not in content
        assert b"cHJpdmF0ZQ==" not in content
    with closing(booted(tmp_path / "new", objects, VAULT)) as store:
        assert state_of(store) == expected
        assert store.private_keys == {"wg0": "cHJpdmF0ZQ=="}
    for vault in (None, Vault("some other key of it")):
        with pytest.raises(ConfigError, match="SNAPSHOT_KEY"):
            booted(tmp_path / "wrong", objects, vault)


def test_a_private_key_is_never_in_a_clear_snapshot(tmp_path: Path) -> None:
    with closing(opened(tmp_path)) as store:
        store.private_keys["wg0"] = "cHJpdmF0ZQ=="
        put(store, a_peer(1))
        save(store)
    assert b"cHJpdmF0ZQ==" not in (tmp_path / "db").read_bytes()


# --- which one a start takes ----------------------------------------------------------------------


def test_the_higher_number_wins(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    objects = MemoryObjects()
    with closing(opened(tmp_path)) as store:
        copier = copier_of(store, objects)
        put(store, a_peer(1), a_peer(2))
        put(store, a_peer(3))
        copier.tick()
        first = state_of(store)
    behind = tmp_path_of(tmp_path, "behind")
    with closing(opened(behind)) as store:
        put(store, a_peer(7))
    caplog.set_level("INFO", "wggw")
    with closing(booted(behind, objects)) as store:
        assert state_of(store) == first
    assert "it ends at record 2, the files here at 1: the copy is used" in caplog.text
    with closing(Store(str(behind / "db.superseded"), "commit", Disk())) as store:
        store.load()
        assert state_of(store) == {a_peer(7)}
    with closing(booted(behind, objects)) as store:  # and it is on the disk here now
        put(store, a_peer(4))
        ahead = state_of(store)
    caplog.clear()
    with closing(booted(behind, objects)) as store:
        assert state_of(store) == ahead
    assert "it ends at record 2, the files here at 3: the files are used" in caplog.text


def test_a_node_goes_on_where_the_copy_ended(tmp_path: Path) -> None:
    objects = MemoryObjects()
    expected: State = frozenset()
    for life in range(5):
        directory = tmp_path_of(tmp_path, str(life))
        store = Store(str(directory / "db"), "commit", Disk())
        with closing(store):
            current = store.load()
            copier = Copier(objects, store, time.time, lambda s=store: save(s))  # type: ignore
            copier.boot()
            store.begin(current)
            copier.begin()
            assert state_of(store) == expected
            put(store, a_peer(life + 1))
            put(store, a_peer(life + 100))
            copier.tick()
            copier.tick()
            expected = state_of(store)


def test_equal_numbers_do_not_make_the_same_state(tmp_path: Path) -> None:
    """A machine comes back with a record that its successor's copy has another one for."""
    objects = MemoryObjects()
    with closing(opened(tmp_path_of(tmp_path, "a"))) as store:
        copier = copier_of(store, objects)
        put(store, a_peer(1))
        copier.tick()
        put(store, a_peer(2))  # is not in the copy when the machine fails
    with closing(booted(tmp_path_of(tmp_path, "b"), objects)) as store:
        copier = copier_of(store, objects)
        put(store, a_peer(50))
        copier.tick()
    with closing(opened(tmp_path / "a")) as store:
        copier = copier_of(store, objects)
        put(store, a_peer(3))
        copier.finish(10)
        assert copied(objects, tmp_path) == {a_peer(1), a_peer(50)}
        copier.tick()
        assert copied(objects, tmp_path) == state_of(store) == {a_peer(1), a_peer(2), a_peer(3)}


def test_a_machine_that_comes_back_keeps_what_its_successor_did(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    objects = MemoryObjects()
    path = tmp_path_of(tmp_path, "a")
    for number in (1, 2):  # of its own restarts nothing is said
        with closing(booted(path, objects)) as store:
            copier = copier_of(store, objects)
            put(store, a_peer(number))
            copier.tick()
    with closing(booted(tmp_path_of(tmp_path, "b"), objects)) as store:
        copier = copier_of(store, objects)
        put(store, a_peer(50))
        copier.tick()
        successor = state_of(store)
    with closing(opened(path)) as store:
        for number in (3, 4):  # were not in the copy when the machine failed
            put(store, a_peer(number))
    assert "another gateway" not in caplog.text
    with closing(booted(path, objects)) as store:
        assert "went on to record 3, which the files here, with record 4, do not" in caplog.text
        assert state_of(store) == {a_peer(1), a_peer(2), a_peer(3), a_peer(4)}
    with closing(Store(str(path / "db.superseded"), "commit", Disk())) as store:
        store.load()
        assert state_of(store) == successor
    caplog.clear()
    with closing(booted(path, objects)) as store:
        copier_of(store, objects).tick()
    assert "another gateway" not in caplog.text


def test_what_a_successor_writes_after_that_is_kept_too(tmp_path: Path) -> None:
    """Both run: the one that came back is refused by the copy, restarts and is ahead again."""
    objects = MemoryObjects()
    path = tmp_path_of(tmp_path, "a")
    with closing(booted(path, objects)) as store:
        copier = copier_of(store, objects)
        put(store, a_peer(1))
        copier.tick()
    with closing(booted(tmp_path_of(tmp_path, "b"), objects)) as two:
        second = copier_of(two, objects)
        put(two, a_peer(50))
        second.tick()
        with closing(opened(path)) as store:
            for number in range(2, 9):
                put(store, a_peer(number))
        with closing(booted(path, objects)):
            put(two, a_peer(51))
            second.tick()
            assert second.state().failure is None
        successor = state_of(two)
    with closing(booted(path, objects)) as store:
        assert state_of(store) == {a_peer(number) for number in range(1, 9)}
    with closing(Store(str(path / "db.superseded"), "commit", Disk())) as store:
        store.load()
        assert state_of(store) == successor


def test_a_restart_puts_its_snapshot_once(tmp_path: Path) -> None:
    objects = MemoryObjects()
    for life in range(3):
        store = Store(str(tmp_path / "db"), "commit", Disk())
        with closing(store):
            current = store.load()
            copier = Copier(objects, store, time.time, lambda s=store: save(s))  # type: ignore
            copier.boot()
            store.begin(current)
            copier.begin()
            objects.puts.clear()
            copier.tick()
            if life:
                assert sorted(name[:4] for name in objects.puts) == ["mani", "part"]
            put(store, a_peer(life + 1))
            copier.tick()
            assert copied(objects, tmp_path) == state_of(store)
            newest = read_manifests(objects)[0].snapshots[0]  # type: ignore[arg-type]
            content = objects.objects.pop(f"part-{newest.slot:03d}")
            assert copied(objects, tmp_path) == state_of(store)  # by the one before
            objects.objects[f"part-{newest.slot:03d}"] = content


def test_the_later_of_two_gateways_goes_on(tmp_path: Path) -> None:
    objects = MemoryObjects()
    with closing(opened(tmp_path_of(tmp_path, "a"))) as one:
        first = copier_of(one, objects)
        put(one, a_peer(1))
        first.tick()
        with closing(booted(tmp_path_of(tmp_path, "b"), objects)) as two:
            second = copier_of(two, objects)
            put(two, a_peer(2))
            second.tick()
            put(one, a_peer(3))
            for _ in range(3):
                first.tick()
                assert "another gateway" in (first.state().failure or "")
            assert first.state().lag_records == 1
            put(two, a_peer(4))
            second.tick()
            assert second.state().failure is None
            assert copied(objects, tmp_path) == state_of(two)


def test_an_upload_that_ends_after_another_took_over_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = MemoryObjects()
    with (
        closing(opened(tmp_path_of(tmp_path, "a"))) as one,
        contextlib.ExitStack() as stack,
    ):
        first = copier_of(one, objects)
        put(one, a_peer(1))
        first.tick()
        put(one, a_peer(2))
        check = first._check_alone
        late: list[tuple[Store, Copier]] = []

        def check_and_rest() -> None:
            """The other one starts and writes when the first has found itself alone."""
            check()
            if not late:
                two = stack.enter_context(closing(booted(tmp_path_of(tmp_path, "b"), objects)))
                late.append((two, copier_of(two, objects)))
                put(two, a_peer(50))
                late[0][1].tick()

        monkeypatch.setattr(first, "_check_alone", check_and_rest)
        first.tick()
        two, second = late[0]
        put(two, a_peer(51))
        second.tick()
        assert "another gateway" in (second.state().failure or "")


def test_a_start_without_the_copy_puts_nothing_over_it(tmp_path: Path) -> None:
    objects = MemoryObjects()
    with closing(opened(tmp_path_of(tmp_path, "a"))) as store:
        copier = copier_of(store, objects)
        for number in range(1, 4):
            put(store, a_peer(number))
        copier.tick()
        kept = state_of(store)
    with closing(opened(tmp_path_of(tmp_path, "b"))) as store:
        copier = copier_of(store, objects, boot=False)
        for number in range(10, 20):
            put(store, a_peer(number))
            copier.tick()
        assert "nothing is put over it" in (copier.state().failure or "")
        assert copied(objects, tmp_path) == kept


def test_a_late_store_gets_its_copy(tmp_path: Path) -> None:
    objects = MemoryObjects()
    with closing(opened(tmp_path)) as store:
        objects.fail_at, objects.until = 1, 3
        copier = copier_of(store, objects, boot=False)
        put(store, a_peer(1))
        for _ in range(5):
            copier.tick()
        assert copied(objects, tmp_path) == state_of(store)


@pytest.mark.parametrize("damage", ["both", "missing part", "one number less"])
def test_a_damaged_copy_is_never_taken_for_an_empty_one(tmp_path: Path, damage: str) -> None:
    objects = MemoryObjects()
    with closing(opened(tmp_path)) as store:
        copier = copier_of(store, objects)
        put(store, a_peer(1))
        copier.tick()
        put(store, a_peer(2))
        copier.tick()
    newest = read_manifests(objects)[0]  # type: ignore[arg-type]
    if damage == "both":
        for name in ("manifest-0", "manifest-1"):
            objects.objects[name] = objects.objects[name][:-9]
    elif damage == "missing part":
        del objects.objects[f"part-{newest.segments[-1].slot:03d}"]
    else:  # a manifest that promises what its parts do not hold
        part = newest.segments[-1]
        wrong = newest._replace(segments=(part._replace(number=part.number + 1),))
        objects.objects[f"manifest-{newest.sequence % 2}"] = encode_manifest(wrong)
    with pytest.raises(CopyDamaged):
        booted(tmp_path / "new", objects)


# --- the manifest ---------------------------------------------------------------------------------

MANIFEST = Manifest(
    7,
    "0123456789abcdef",
    (Part(3, 0, 40, 1000, "ab" * 32), Part(0, 0, 30, 900, "cd" * 32)),
    (Part(1, 30, 40, 200, "ef" * 32), Part(2, 40, 43, 100, "01" * 32)),
)


def test_a_manifest_is_read_as_written_and_nothing_else() -> None:
    data = encode_manifest(MANIFEST)
    assert parse_manifest(data) == MANIFEST
    assert MANIFEST.number == 43
    wrong = [data[:end] for end in range(len(data))]
    for position in range(len(data)):
        wrong.append(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
    foreign = (MANIFEST._replace(writer=name) for name in ("", "é" * 16, "two words", "A" * 16))
    wrong += map(encode_manifest, (*foreign, MANIFEST._replace(sequence=0)))
    for text in wrong:
        with pytest.raises((ValueError, KeyError, TypeError)):
            parse_manifest(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)


@settings(max_examples=60, deadline=None)
@given(st.fixed_dictionaries(dict.fromkeys(Manifest._fields, json_values)), json_values)
def test_no_manifest_is_more_than_an_error(content: dict[str, Any], other: Any) -> None:
    for given_content in (content, other, {**MANIFEST._asdict(), "segments": other}):
        text = wggw.json.dumps(given_content).encode()
        data = b"wggw-copy 1 %08x %b\n" % (wggw.zlib.crc32(text), text)
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            assert isinstance(parse_manifest(data), Manifest)


# --- settings and signatures ----------------------------------------------------------------------

BASE = {"GATEWAY_API_KEY": "0123456789abcdef"}
S3_KEYS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}


@pytest.mark.parametrize(
    ("settings", "host", "path"),
    [
        ({"SNAPSHOT_URL": "https://h.example/a/b/"}, "h.example", "/a/b/"),
        ({"SNAPSHOT_URL": "https://[fd00::1]:8443"}, "fd00::1", "/"),
        ({"SNAPSHOT_URL": "s3://bucket/p/q"}, "bucket.s3.us-east-1.amazonaws.com", "/p/q/"),
        (
            {"SNAPSHOT_URL": "s3://bucket", "AWS_REGION": "eu-west-1"},
            "bucket.s3.eu-west-1.amazonaws.com",
            "/",
        ),
        (
            {"SNAPSHOT_URL": "s3://a.bucket/p", "AWS_DEFAULT_REGION": "eu-west-1"},
            "s3.eu-west-1.amazonaws.com",
            "/a.bucket/p/",
        ),
        (
            {"SNAPSHOT_URL": "s3://bucket/p", "AWS_ENDPOINT_URL": "https://s3.example:9000"},
            "s3.example",
            "/bucket/p/",
        ),
        (
            {
                "SNAPSHOT_URL": "s3://bucket",
                "AWS_ENDPOINT_URL": "https://other.example",
                "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9000",
            },
            "127.0.0.1",
            "/bucket/",
        ),
    ],
)
def test_where_a_url_leads(settings: dict[str, str], host: str, path: str) -> None:
    config = load_config({**BASE, **S3_KEYS, **settings})
    store = open_object_store(config, time.time)
    assert store is not None
    assert (store._host, store._path) == (host, path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SNAPSHOT_URL", "http://h.example/a"),
        ("SNAPSHOT_URL", "https://user:secret@h.example/a"),
        ("SNAPSHOT_URL", "https://h.example/a?b"),
        ("SNAPSHOT_URL", "https://h.example/a b"),
        ("SNAPSHOT_URL", "https://h.example:99999/"),
        ("SNAPSHOT_URL", "s3://Bucket/"),
        ("SNAPSHOT_URL", "s3:///a"),
        ("SNAPSHOT_URL", "file:///a"),
        ("SNAPSHOT_TOKEN", "a b"),
        ("SNAPSHOT_REQUIRED", "no"),
        ("AWS_ENDPOINT_URL", "http://s3.example"),
        ("AWS_REGION", "eu/west"),
    ],
)
def test_bad_settings_are_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name):
        load_config({**BASE, **S3_KEYS, name: value})


def test_s3_needs_its_keys() -> None:
    with pytest.raises(ConfigError, match="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        load_config({**BASE, "SNAPSHOT_URL": "s3://bucket/a"})


def test_secrets_do_not_show() -> None:
    secret = "what-nobody-may-see"
    names = ("SNAPSHOT_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    config = load_config({**BASE, **dict.fromkeys(names, secret)})
    assert secret not in repr(config)
    assert secret not in repr(wggw.AwsKeys("a", secret, secret, "r"))


EMPTY = hashlib.sha256(b"").hexdigest()
EXAMPLE = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
KEYS = wggw.AwsKeys("AKIAIOSFODNN7EXAMPLE", EXAMPLE, None, "us-east-1")


@pytest.mark.parametrize(
    ("method", "path", "headers", "signature"),
    [  # Amazon S3 API Reference, "Signature Calculations: Transferring Payload in a Single Chunk"
        (
            "GET",
            "/test.txt",
            {"range": "bytes=0-9", "x-amz-content-sha256": EMPTY},
            "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41",
        ),
        (
            "PUT",
            "/test%24file.text",
            {
                "date": "Fri, 24 May 2013 00:00:00 GMT",
                "x-amz-content-sha256": hashlib.sha256(b"Welcome to Amazon S3.").hexdigest(),
                "x-amz-storage-class": "REDUCED_REDUNDANCY",
            },
            "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd",
        ),
    ],
)
def test_signatures_are_those_that_aws_published(
    method: str, path: str, headers: dict[str, str], signature: str
) -> None:
    host = {"host": "examplebucket.s3.amazonaws.com", "x-amz-date": "20130524T000000Z"}
    given_header = sign_v4(KEYS, method, path, {**host, **headers})
    assert given_header.endswith(f"Signature={signature}")


# --- over TLS -------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TlsStore]:
    directory = tmp_path_of(tmp_path, "tls")
    with tls_store(directory) as server:
        monkeypatch.setenv("SSL_CERT_FILE", str(directory / "store.pem"))
        yield server


def connect(server: TlsStore, token: str = TOKEN) -> ObjectStore:
    config = load_config({**BASE, "SNAPSHOT_URL": server.url, "SNAPSHOT_TOKEN": token})
    return open_object_store(config, time.time)  # type: ignore[return-value]


def test_objects_are_put_and_got(server: TlsStore) -> None:
    objects = connect(server)
    assert objects.get("a", 100) is None
    content = random.Random(1).randbytes(300_000)
    objects.put("a", content)
    assert objects.get("a", len(content)) == content
    with pytest.raises(CopyError):
        objects.get("a", len(content) - 1)


def test_a_wrong_token_and_an_unknown_certificate_are_errors(
    server: TlsStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CopyError, match="401"):
        connect(server, "wrong").get("a", 100)
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(CopyError):
        connect(server).get("a", 100)
    assert server.requests[-1][2] == 401


@pytest.mark.parametrize(
    ("method", "fault"),
    [
        *(("GET", f) for f in ("refuse", "stall", "hang up", "truncate", "announce more")),
        ("GET", "garbage"),
        *(("PUT", f) for f in ("refuse", "stall", "hang up", "keep half", "lose the answer")),
        ("PUT", "garbage"),
    ],
)
def test_whatever_the_store_does_is_an_error_in_time(
    server: TlsStore, monkeypatch: pytest.MonkeyPatch, method: str, fault: str
) -> None:
    monkeypatch.setattr(wggw, "COPY_TIMEOUT", 1.0)
    objects = connect(server)
    objects.put("a", b"x" * 1000)
    server.fault = lambda given_method, name: fault if given_method == method else ""
    started = time.monotonic()
    with pytest.raises(CopyError) as caught:
        if method == "GET":
            objects.get("a", 1000)
        else:
            objects.put("a", b"y" * 1000)
    assert TOKEN not in str(caught.value)
    assert time.monotonic() - started < 40  # the store's own time is 60


def test_an_answer_that_announces_less_than_it_has_is_noticed(server: TlsStore) -> None:
    objects = connect(server)
    objects.put("part-000", b"x" * 1000)
    part = Part(0, 0, 1, 1000, hashlib.sha256(b"x" * 1000).hexdigest())
    assert wggw._read_part(objects, part) == b"x" * 1000
    server.fault = lambda method, name: "announce less" if method == "GET" else ""
    with pytest.raises(CopyDamaged):
        wggw._read_part(objects, part)
    with pytest.raises(CopyError, match="not what was put"):
        objects.put("part-000", b"y" * 1000)


def test_a_drip_of_bytes_does_not_get_around_the_deadline(
    server: TlsStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wggw, "COPY_DEADLINE", 1.0)
    objects = connect(server)
    objects.put("a", b"x" * 1000)
    server.RequestHandlerClass = type("Drip", (server.RequestHandlerClass,), {"do_GET": _drip})
    started = time.monotonic()
    with pytest.raises(CopyError):
        objects.get("a", 1000)
    assert time.monotonic() - started < 60  # all of it takes 100


def _drip(handler: Any) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(1000):
        handler.wfile.write(b"x")
        time.sleep(0.1)


def test_a_copy_over_tls_survives_all_of_it(tmp_path: Path, server: TlsStore) -> None:
    """Random faults while the store changes; at the end, and whenever asked, the copy is right."""
    chance = random.Random(3)
    faults = ["refuse", "hang up", "truncate", "keep half", "lose the answer", "announce less"]
    objects = connect(server)
    with closing(opened(tmp_path)) as store:
        copier = copier_of(store, objects)
        seen = {0: state_of(store)}
        for number in range(1, 40):
            put(store, a_peer(number))
            seen[number] = state_of(store)
            server.fault = lambda method, name: chance.choice(["", "", "", *faults])
            copier.tick()
            server.fault = lambda method, name: ""
            with contextlib.suppress(CopyDamaged, IndexError):
                assert copied(objects, tmp_path) == seen[read_manifests(objects)[0].number]
            if number % 10 == 0:
                save(store)
        for _ in range(3):
            copier.tick()
        assert copied(objects, tmp_path) == state_of(store)
        assert copier.state() == wggw.CopyState(39, 0, 0.0, None)
