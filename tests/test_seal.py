"""Encryption at rest: nothing readable, nothing changed unnoticed, no nonce used twice."""

from __future__ import annotations

import base64
import os
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import GatewayProcess, a_key, running, some
from test_restart import change_all_sorts, ended, state
from test_store import (
    Crash,
    CrashingDisk,
    FailingDisk,
    State,
    TrackingDisk,
    a_peer,
    closing,
    commit,
    contents,
    number_of_calls,
    opened,
    play_history,
    put,
    recovered,
    save,
    state_of,
)

import wggw
from wggw import (
    ConfigError,
    DamagedError,
    Step,
    Vault,
    decode_snapshot,
    encode_snapshot,
    journal_header,
    journal_line,
    parse_journal,
)

SECRET = "a key for what lies on disk"
VAULT = Vault(SECRET)
OTHER = Vault("another key than that one")


# --- nothing can be read --------------------------------------------------------------------------


def files_of(directory: Path) -> dict[str, bytes]:
    """The database's files, whatever their names end in."""
    return {path.name: path.read_bytes() for path in directory.glob("wireguard.db*")}


def give_away(peers: list[dict[str, Any]]) -> list[bytes]:
    """Texts and bytes that would show what peers there are."""
    told = [b"SQLite format", b"CREATE TABLE", b'{"put"', b'"public_key"', b"request-"]
    for peer in peers:
        told += [peer["public_key"].encode(), base64.b64decode(peer["public_key"])]
        told += [peer[name].encode() for name in ("assigned_ip", "assigned_ipv6") if peer[name]]
        told.append(base64.b64encode(peer["public_key"].encode())[4:-4])
    told += [a_key("psk").encode(), base64.b64decode(a_key("psk"))]
    return told


def check_unreadable(directory: Path, peers: list[dict[str, Any]]) -> None:
    files = files_of(directory)
    assert {"wireguard.db", "wireguard.db.journal"} <= files.keys()
    for name, content in files.items():
        for told in give_away(peers):
            assert told not in content, f"{told!r} can be read in {name}"


def create_some(gateway: GatewayProcess, first: int) -> list[dict[str, Any]]:
    client = gateway.client()
    made = []
    for number in range(first, first + 8):
        psk = {"preshared_key": a_key("psk")} if number % 2 else {}
        answer = client.create(
            a_key(number), protocol="dual", request_id=f"request-{number}", **psk
        )
        assert answer.status == 200
        made.append({"public_key": a_key(number), **answer.json})
    client.close()
    return made


def test_nothing_on_disk_can_be_read(tmp_path: Path) -> None:
    with running(tmp_path, SNAPSHOT_KEY=SECRET) as gateway:
        peers = create_some(gateway, 0)
        check_unreadable(tmp_path, peers)
        for number, end in enumerate((gateway.stop, gateway.kill, gateway.stop), 1):
            end()
            check_unreadable(tmp_path, peers)
            gateway.start()
            peers += create_some(gateway, 10 * number)
            check_unreadable(tmp_path, peers)
        assert SECRET not in gateway.text()
    # The same search does find what a gateway without the key writes.
    plain = tmp_path / "plain"
    plain.mkdir()
    with running(plain) as gateway, pytest.raises(AssertionError, match="can be read"):
        check_unreadable(plain, create_some(gateway, 0))


@pytest.mark.parametrize("end", [GatewayProcess.stop, GatewayProcess.kill], ids=["TERM", "KILL"])
def test_sealed_state_comes_back(tmp_path: Path, end: Callable[[GatewayProcess], int]) -> None:
    with running(tmp_path, SNAPSHOT_KEY=SECRET) as gateway:
        change_all_sorts(gateway)
        before = state(gateway)
        for _ in range(2):
            end(gateway)
            gateway.start()
            assert state(gateway) == before


# --- the wrong key, no key, the first key ---------------------------------------------------------


@pytest.mark.parametrize("key", [None, "not the key that it was"], ids=["none", "wrong"])
def test_wrong_key_is_exit_2_that_names_the_setting(tmp_path: Path, key: str | None) -> None:
    with running(tmp_path, SNAPSHOT_KEY=SECRET) as gateway:
        create_some(gateway, 0)
        before = state(gateway)
        gateway.kill()
        files = files_of(tmp_path)
        del gateway.settings["SNAPSHOT_KEY"]
        if key:
            gateway.settings["SNAPSHOT_KEY"] = key
        code, text = ended(gateway)
        assert code == 2, text
        last = text.splitlines()[-1]
        assert "SNAPSHOT_KEY" in last
        assert str(tmp_path / "wireguard.db") in last
        assert SECRET not in text and (key is None or key not in text)
        assert files_of(tmp_path) == files
        gateway.settings["SNAPSHOT_KEY"] = SECRET
        gateway.start()
        assert state(gateway) == before


def test_key_that_fits_the_snapshot_but_not_the_journal_is_refused_by_name(tmp_path: Path) -> None:
    for name, vault in (("a", VAULT), ("b", OTHER)):
        (tmp_path / name).mkdir()
        with closing(opened(tmp_path / name, vault=vault)) as store:
            put(store, a_peer(1))
    shutil.copy(tmp_path / "b" / "db.journal", tmp_path / "a" / "db.journal")
    with pytest.raises(ConfigError, match=r"SNAPSHOT_KEY.*db\.journal"):
        opened(tmp_path / "a", vault=VAULT)


def test_turning_the_key_on_leaves_nothing_plain(tmp_path: Path) -> None:
    with running(tmp_path, SNAPSHOT_INTERVAL="0.2") as gateway:
        peers = create_some(gateway, 0)
        gateway.stop()
        gateway.start()
        peers += create_some(gateway, 10)
        before = state(gateway)
        gateway.kill()
        assert (tmp_path / "wireguard.db.previous").exists()
        gateway.settings["SNAPSHOT_KEY"] = SECRET
        gateway.start()
        assert state(gateway) == before
        check_unreadable(tmp_path, peers)
        gateway.kill()
        check_unreadable(tmp_path, peers)
        gateway.start()
        assert state(gateway) == before


def readable(path: Path) -> set[str]:
    """The files in which a peer's key can be read."""
    keys = [a_key(number).encode() for number in range(1, 8)]
    return {n for n, text in contents(path).items() if any(key in text for key in keys)}


@pytest.mark.parametrize("where", ["before", "middle", "after"])
def test_nothing_plain_is_left_when_turning_the_key_on_was_interrupted(
    tmp_path: Path, where: str
) -> None:
    """The machine stops at every call of the first start with the key; the next start ends it."""
    for nth in range(1, 100):
        disk = CrashingDisk(make(tmp_path / str(nth)), nth, where)
        with closing(opened(disk.path)) as store:
            for number in range(1, 4):
                put(store, a_peer(number))
                save(store)
            put(store, a_peer(4))
            before = state_of(store)
        assert readable(disk.path) >= {"db", "db.previous", "db.journal", "db.journal.previous"}
        crashed = False
        try:
            opened(disk.path, disk, vault=VAULT).close()
        except Crash:
            crashed = True
        assert recovered(disk.path, VAULT) == before
        assert readable(disk.path) == set(), f"stopped at call {nth}"
        if not crashed:
            assert nth > 5
            return
    raise AssertionError("the start does not end")


def make(path: Path) -> Path:
    path.mkdir()
    return path


def test_turning_the_key_off_is_refused_by_name(tmp_path: Path) -> None:
    with closing(opened(tmp_path, vault=VAULT)) as store:
        put(store, a_peer(1))
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"SNAPSHOT_KEY is not set.*db is encrypted") as caught:
        opened(tmp_path)
    assert caught.value.code == 2
    assert contents(tmp_path) == before


# --- changed, removed, repeated, exchanged --------------------------------------------------------


def history(path: Path) -> list[State]:
    """Sealed files with a journal of seven records; every state that was acknowledged."""
    path.mkdir(exist_ok=True)
    states: list[State] = []
    with closing(opened(path, vault=VAULT)) as store:
        states.append(state_of(store))
        for number in range(1, 6):
            put(store, a_peer(number))
            states.append(state_of(store))
        put(store, a_peer(2, status="suspended"))
        states.append(state_of(store))
        store.wait(commit(store, [Step(a_peer(3), None)]))
        states.append(state_of(store))
    return states


class Files:
    """Damaged copies of one directory, read one after the other."""

    def __init__(self, path: Path) -> None:
        self.states = history(path / "good")
        self.good = path / "good"
        self._copy = path / "copy"

    def read(self, name: str, content: bytes) -> State | None:
        """The state with that content in that file; None when it was refused as damaged."""
        shutil.rmtree(self._copy, ignore_errors=True)
        shutil.copytree(self.good, self._copy)
        (self._copy / name).write_bytes(content)
        try:
            with closing(opened(self._copy, vault=VAULT)) as store:
                return state_of(store)
        except DamagedError as error:
            assert name in str(error) and error.code == 3
            assert (self._copy / name).read_bytes() == content
            return None


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("sealed"))


@pytest.fixture
def journal(files: Files) -> bytes:
    return (files.good / "db.journal").read_bytes()


@pytest.fixture
def snapshot(files: Files) -> bytes:
    return (files.good / "db").read_bytes()


def flipped(content: bytes, position: int, bits: int) -> bytes:
    return content[:position] + bytes([content[position] ^ bits]) + content[position + 1 :]


def read_records(data: bytes) -> int | None:
    """How many records a sealed journal gives, None when it is damaged."""
    try:
        return len(parse_journal(data, "name", VAULT).records)
    except DamagedError:
        return None


def test_every_flipped_bit_of_a_journal_is_noticed(files: Files, journal: bytes) -> None:
    """Damage, or a torn tail: the last record; the last two when their line end is hit."""
    whole = read_records(journal)
    assert whole == len(files.states) - 1
    last = journal.rfind(b"\n", 0, len(journal) - 1)
    for position in range(len(journal)):
        for bit in range(8):
            found = read_records(flipped(journal, position, 1 << bit))
            if found is None:
                continue
            assert position >= last, f"byte {position}, bit {bit}"
            assert found == whole - (2 if position == last else 1)


def test_flipped_byte_of_a_journal_gives_an_acknowledged_state(
    files: Files, journal: bytes
) -> None:
    """The same through a whole start, for a byte of each kind."""
    lengths = [len(line) + 1 for line in journal.split(b"\n")[:-1]]
    ends = [sum(lengths[: n + 1]) for n in range(len(lengths))]
    places = {end - back for end in ends for back in (1, 2, 40, 80)} | set(range(0, ends[0], 9))
    for position in sorted(places):
        found = files.read("db.journal", flipped(journal, position, 0x04))
        assert found is None or found in files.states[-3:], position


def resealed(line: bytes, number: int, durable: int) -> bytes:
    """A record's line under another number, its checksum made right: only the seal can tell."""
    content = line.split(b" ", 3)[3].rstrip(b"\n")
    return journal_line(number, durable, content)


def lines_of(journal: bytes) -> list[bytes]:
    return journal.splitlines(keepends=True)


@pytest.mark.parametrize("renumbered", [False, True], ids=["as-it-is", "renumbered"])
@pytest.mark.parametrize("what", ["removed", "repeated", "exchanged"])
def test_every_moved_record_is_noticed(
    files: Files, journal: bytes, what: str, renumbered: bool
) -> None:
    header, *records = lines_of(journal)
    refused = 0
    for index in range(len(records)):
        moved = list(records)
        if what == "removed":
            del moved[index]
        elif what == "repeated":
            moved.insert(index, records[index])
        elif index + 1 < len(records):
            moved[index : index + 2] = moved[index + 1], moved[index]
        else:
            continue
        if renumbered:
            moved = [resealed(line, number, 0) for number, line in enumerate(moved, 1)]
        data = b"".join([header, *moved])
        found = read_records(data)
        refused += found is None
        state = files.read("db.journal", data)
        if renumbered and not (what == "removed" and index == len(records) - 1):
            assert found is None, index  # the seal is bound to the number
        if found is not None:
            # Nothing in the middle is missing, and what is there is in order.
            assert state == files.states[found]
            assert found >= len(records) - 2
    assert refused >= len(records) - 2


def test_record_of_another_journal_is_noticed(tmp_path: Path, files: Files, journal: bytes) -> None:
    """The same number under the same secret: each file has a key of its own."""
    history(tmp_path / "other")
    foreign = lines_of((tmp_path / "other" / "db.journal").read_bytes())
    for index in range(1, len(foreign)):
        lines = lines_of(journal)
        lines[index] = resealed(foreign[index], index, 0)
        assert files.read("db.journal", b"".join(lines)) is None


def test_plain_record_in_a_sealed_journal_is_noticed(files: Files, journal: bytes) -> None:
    lines = lines_of(journal)
    lines[-1] = journal_line(len(lines) - 1, 0, b'{"put":[],"del":[1]}')
    assert files.read("db.journal", b"".join(lines)) is None


def test_every_prefix_of_a_journal_is_an_acknowledged_state(files: Files, journal: bytes) -> None:
    header = len(lines_of(journal)[0])
    for length in range(len(journal)):
        data = journal[:length]
        found = read_records(data)
        assert (found is None) == (length < header)
        if found is not None:
            assert found == data.count(b"\n") - 1
    for line in range(1, 8):
        data = b"".join(lines_of(journal)[:line]) + b"torn"
        assert files.read("db.journal", data) == files.states[line - 1]


def test_flipped_bytes_of_a_snapshot_are_refused(files: Files, snapshot: bytes) -> None:
    header = snapshot.index(b"\n") + 1
    places = [*range(header + 32), *range(header + 32, len(snapshot), 997), len(snapshot) - 1]
    for position in places:
        for bits in (0x01, 0x20):
            garbled = flipped(snapshot, position, bits)
            assert files.read("db", garbled) is None, position


LARGE = b"SQLite format 3\0" + bytes(range(256)) * 1000  # four chunks, the last one short


def chunks(data: bytes) -> tuple[bytes, list[bytes]]:
    start, size = data.index(b"\n") + 1, wggw.SNAPSHOT_CHUNK + 16
    return data[:start], [data[n : n + size] for n in range(start, len(data), size)]


@pytest.mark.parametrize("length", [wggw.SNAPSHOT_CHUNK, 2 * wggw.SNAPSHOT_CHUNK, len(LARGE)])
def test_every_moved_chunk_is_noticed(length: int) -> None:
    data = encode_snapshot(LARGE[:length], VAULT)
    head, parts = chunks(data)
    assert b"".join([head, *parts]) == data
    assert decode_snapshot(data, VAULT, "name")[100:] == LARGE[100:length]
    moved = [parts[:n] for n in range(len(parts))]  # the end is missing
    moved += [parts[:n] + parts[n + 1 :] for n in range(len(parts))]
    moved += [[*parts[:n], parts[n], *parts[n:]] for n in range(len(parts))]
    for n in range(len(parts) - 1):
        moved.append([*parts[:n], parts[n + 1], parts[n], *parts[n + 2 :]])
    moved += [[*parts, bytes(16)], [*parts, parts[0]]]
    for changed in moved:
        # The seal itself notices, not only the checksum of what it holds.
        with pytest.raises(DamagedError, match="does not decrypt" if changed else "snapshot"):
            decode_snapshot(b"".join([head, *changed]), VAULT, "name")


def test_cipher_is_given_bytes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cryptography package of Debian 12 (38.0.4) takes nothing else."""
    given: list[Any] = []

    def seal(self: wggw.Seal, number: int, bound: bytes, plaintext: bytes) -> bytes:
        given.append(plaintext)
        return genuine(self, number, bound, plaintext)

    genuine = wggw.Seal.seal
    monkeypatch.setattr(wggw.Seal, "seal", seal)
    encode_snapshot(LARGE, VAULT)
    assert len(given) == 4
    assert {type(plaintext) for plaintext in given} == {bytes}


def test_every_truncated_chunk_is_noticed() -> None:
    data = encode_snapshot(LARGE, VAULT)
    head, parts = chunks(data)
    ends = [len(head) + sum(map(len, parts[:n])) for n in range(len(parts) + 1)]
    places = {end + by for end in ends for by in (-17, -16, -1, 0, 1, 15, 16, 17)}
    for length in sorted(place for place in places | {0, 1, 20} if 0 <= place < len(data)):
        with pytest.raises(DamagedError):
            decode_snapshot(data[:length], VAULT, "name")


def test_chunk_of_another_snapshot_is_noticed() -> None:
    head, parts = chunks(encode_snapshot(LARGE, VAULT))
    _, others = chunks(encode_snapshot(LARGE, VAULT))
    for index in range(len(parts)):
        mixed = [*parts[:index], others[index], *parts[index + 1 :]]
        with pytest.raises(DamagedError, match=f"chunk {index}"):
            decode_snapshot(b"".join([head, *mixed]), VAULT, "name")


def test_journals_key_does_not_open_a_snapshot() -> None:
    """Each purpose has a key of its own, even under one salt."""
    salt = bytes(16)
    sealed = wggw.Seal(VAULT, b"journal", salt).seal(1, b"", b"text")
    assert wggw.Seal(VAULT, b"journal", salt).open(1, b"", sealed) == b"text"
    for number, bound, purpose in (
        (2, b"", b"journal"),
        (1, b"x", b"journal"),
        (1, b"", b"snapshot"),
    ):
        with pytest.raises(ValueError):
            wggw.Seal(VAULT, purpose, salt).open(number, bound, sealed)


# --- nonces ---------------------------------------------------------------------------------------


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[tuple[bytes, int]]]:
    """How often each (salt, number) was sealed in this process, with its text's checksum."""
    counted: Counter[tuple[bytes, int]] = Counter()
    seal = wggw.Seal.seal

    def counting(self: wggw.Seal, number: int, bound: bytes, plaintext: bytes) -> bytes:
        counted[self.header, number] += 1
        return seal(self, number, bound, plaintext)

    monkeypatch.setattr(wggw.Seal, "seal", counting)
    yield counted


def check_unique(used: Counter[tuple[bytes, int]], at_least: int) -> None:
    assert used.total() >= at_least
    assert [key for key, times in used.items() if times > 1] == []


def test_no_nonce_is_used_twice_over_restarts_and_torn_tails(
    tmp_path: Path, used: Counter[tuple[bytes, int]]
) -> None:
    """A dropped record's number is given again: by then it must be under another key."""
    for life in range(6):
        with closing(opened(tmp_path, vault=VAULT)) as store:
            for number in range(3):
                put(store, a_peer(10 * life + number))
            if life % 2:
                save(store)
                put(store, a_peer(10 * life + 5))
        path = tmp_path / "db.journal"
        path.write_bytes(path.read_bytes()[:-3])
    salts = {salt for salt, _ in used}
    assert len(salts) > 12
    check_unique(used, 30)


@pytest.mark.parametrize("fault", ["once", "forever", "crash"])
def test_no_nonce_is_used_twice_over_faults(
    tmp_path: Path, used: Counter[tuple[bytes, int]], fault: str
) -> None:
    """The fault is at every call in turn; after it the same files go on."""
    calls = number_of_calls(tmp_path, VAULT)
    assert calls > 40
    for nth in some(range(1, calls + 1), 15):
        used.clear()
        disk = fault_at(make(tmp_path / str(nth)), nth, fault)
        play_history(disk, VAULT)
        recovered(disk.path, VAULT)
        with closing(opened(disk.path, vault=VAULT)) as store:
            put(store, a_peer(99))
        check_unique(used, 4)
        shutil.rmtree(tmp_path / str(nth))


def fault_at(path: Path, nth: int, fault: str) -> TrackingDisk:
    if fault == "crash":
        return CrashingDisk(path, nth, "middle")
    return FailingDisk(path, nth, fault == "forever")


def test_no_nonce_is_used_twice_on_disk_over_kills(tmp_path: Path) -> None:
    """The same, of a real process: one salt and number never has two ciphertexts."""
    sealed: dict[tuple[bytes, bytes], set[bytes]] = {}
    with running(tmp_path, SNAPSHOT_KEY=SECRET, SNAPSHOT_INTERVAL="0.2") as gateway:
        for life in range(4):
            create_some(gateway, 10 * life)
            gateway.kill()
            for path in tmp_path.glob("wireguard.db.journal*"):
                collect_lines(path.read_bytes(), sealed)
            journal = tmp_path / "wireguard.db.journal"
            if journal.exists():  # it is not for a moment of a rotation
                journal.write_bytes(journal.read_bytes()[: -life or None])
            gateway.start()
    assert len(sealed) > 12
    assert all(len(texts) == 1 for texts in sealed.values())


def collect_lines(data: bytes, sealed: dict[tuple[bytes, bytes], set[bytes]]) -> None:
    header, *lines = data.splitlines()
    found = re.fullmatch(rb"wggw-journal 1 \d+ ([0-9a-f]{32}) [0-9a-f]{16} [0-9a-f]{8}", header)
    assert found, header
    assert b"%08x" % zlib.crc32(header[:-9]) == header[-8:]
    for line in lines:
        number, _, _, text = line.split(b" ")
        sealed.setdefault((found[1], number), set()).add(text)


def test_every_file_has_a_salt_of_its_own(tmp_path: Path) -> None:
    seen: set[bytes] = set()
    with closing(opened(tmp_path, vault=VAULT)) as store:
        for number in range(1, 20):
            put(store, a_peer(number))
            save(store)
            heads = [(tmp_path / name).read_bytes()[:60] for name in ("db", "db.journal")]
            salts = [re.findall(rb"[0-9a-f]{32}", head)[0] for head in heads]
            assert len(set(salts)) == 2 and not seen & set(salts)
            seen |= set(salts)
    assert bytes(16).hex().encode() not in seen


def test_empty_sealed_journal_is_read_with_its_key_only() -> None:
    seal = wggw.Seal.new(VAULT, b"journal")
    header = journal_header(7, seal)
    assert parse_journal(header, "name", VAULT).after == 7
    for vault in (None, OTHER):
        with pytest.raises(ConfigError, match="SNAPSHOT_KEY"):
            parse_journal(header, "name", vault)


def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        with closing(opened(tmp_path, vault=VAULT)) as store:
            put(store, a_peer(1))
            save(store)
            put(store, a_peer(2))
            save(store)
    finally:
        os.umask(old)
    for path in tmp_path.iterdir():
        assert path.stat().st_mode & 0o077 == 0, path
