"""The journal: what reading damaged bytes gives, one fsync for all that wait, and disk faults."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wggw import (
    DamagedError,
    Disk,
    DiskError,
    Journal,
    Record,
    journal_header,
    journal_line,
    parse_journal,
    read_journal,
)

AFTER = 41
GROUPS = [[b'{"put":[1]}'], [b'{"put":[2]}', b'{"del":[3]}'], [b"{}"], [b'{"put":[4]}', b"[]"]]


def small_journal() -> tuple[bytes, list[Record], list[int], list[int]]:
    """Bytes, records, where each record begins, and each one's group (one fsync each)."""
    data, number = journal_header(AFTER), AFTER
    records, starts, groups = [], [], []
    for group, contents in enumerate(GROUPS):
        durable = len(data)
        for content in contents:
            number += 1
            records.append(Record(number, content))
            starts.append(len(data))
            groups.append(group)
            data += journal_line(number, durable, content)
    return data, records, starts, groups


DATA, RECORDS, STARTS, GROUP_OF = small_journal()
HEADER = len(journal_header(AFTER))


def test_whole_journal_is_read_back() -> None:
    file = parse_journal(DATA, "name")
    assert file == (AFTER, RECORDS, len(DATA), 0)


def test_journal_without_records_is_read_back() -> None:
    assert parse_journal(journal_header(7), "name") == (7, [], len(journal_header(7)), 0)


def test_every_prefix_keeps_every_whole_record() -> None:
    ends = [*STARTS[1:], len(DATA)]
    for length in range(HEADER, len(DATA)):
        file = parse_journal(DATA[:length], "name")
        whole = [r for r, end in zip(RECORDS, ends, strict=True) if end <= length]
        assert file.records == whole
        assert file.size + file.torn == length
        assert file.size == (ends[len(whole) - 1] if whole else HEADER)


def test_torn_header_is_damage() -> None:
    """A journal is put in its place whole, so a short header is no torn write."""
    for length in range(HEADER):
        with pytest.raises(DamagedError):
            parse_journal(DATA[:length], "name")


def read_garbled(data: bytes) -> list[Record] | None:
    """The records, None for DamagedError; any other exception is the test's failure."""
    try:
        file = parse_journal(data, "name")
    except DamagedError as error:
        assert "name" in str(error)
        assert error.code == 3
        return None
    assert file.records == RECORDS[: len(file.records)]
    return file.records


def test_every_changed_byte_gives_a_prefix_or_damage() -> None:
    for place in range(len(DATA)):
        for byte in {DATA[place] ^ 1 << bit for bit in range(8)} | set(b"\n\r 0:9\0\xff"):
            if byte != DATA[place]:
                read_garbled(DATA[:place] + bytes([byte]) + DATA[place + 1 :])


def test_changed_byte_in_the_header_is_damage() -> None:
    for place in range(HEADER):
        garbled = DATA[:place] + bytes([DATA[place] ^ 4]) + DATA[place + 1 :]
        assert read_garbled(garbled) is None


def known_durable(index: int) -> bool:
    """Whether a later record was written when this one was known to be on disk.

    The next line is left out: when a record's line end is hit, the two become one.
    """
    return any(group > GROUP_OF[index] for group in GROUP_OF[index + 2 :])


def test_changed_byte_in_a_record_that_a_later_one_knew_durable_is_damage() -> None:
    ends = [*STARTS[1:], len(DATA)]
    checked = 0
    for index, (start, end) in enumerate(zip(STARTS, ends, strict=True)):
        for place in range(start, end) if known_durable(index) else ():
            for bit in range(8):
                flipped = bytes([DATA[place] ^ 1 << bit])
                assert read_garbled(DATA[:place] + flipped + DATA[place + 1 :]) is None
                checked += 1
    assert checked > 500


def test_every_removed_and_every_inserted_byte_gives_a_prefix_or_damage() -> None:
    for place in range(len(DATA)):
        read_garbled(DATA[:place] + DATA[place + 1 :])
        for byte in (b"\n", b" ", b"0"):
            read_garbled(DATA[:place] + byte + DATA[place:])


def test_torn_group_keeps_what_came_before_it() -> None:
    """A group is one write: any part of it may have reached the disk, in any order."""
    start = STARTS[4]  # the last group's two records
    torn = DATA[:start] + bytes(STARTS[5] - start) + DATA[STARTS[5] :]
    assert read_garbled(torn) == RECORDS[:4]


def test_missing_record_in_the_middle_is_damage() -> None:
    assert read_garbled(DATA[: STARTS[1]] + DATA[STARTS[2] :]) is None


def test_repeated_record_is_damage_or_dropped_never_read_twice() -> None:
    read_garbled(DATA[: STARTS[2]] + DATA[STARTS[1] :])


def test_zeros_behind_the_end_are_dropped() -> None:
    """What a file system may leave of a write that was cut by a power failure."""
    assert read_garbled(DATA + bytes(4096)) == RECORDS


@given(junk=st.binary(max_size=200))
def test_any_bytes_are_read_or_damage(junk: bytes) -> None:
    try:
        assert parse_journal(junk, "name").records == []
    except DamagedError:
        pass
    assert read_garbled(DATA + junk) is not None


def test_absent_journal_is_none_and_unreadable_is_damage(tmp_path: Path) -> None:
    assert read_journal(str(tmp_path / "absent")) is None
    with pytest.raises(DamagedError):
        read_journal(str(tmp_path))


# --- the open journal -----------------------------------------------------------------------------


class CountingDisk(Disk):
    """Counts fsyncs, makes each take a while, and fails when told."""

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay
        self.fsyncs = 0
        self.fail: str | None = None
        self.partial = 0  # bytes that a failing write still writes

    def write(self, handle: int, data: bytes) -> None:
        if self.fail == "write":
            super().write(handle, data[: self.partial])
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write(handle, data)

    def fsync(self, handle: int) -> None:
        self.fsyncs += 1
        time.sleep(self.delay)
        if self.fail == "fsync":
            raise OSError(errno.EIO, "Input/output error")

    def rename(self, old: str, new: str) -> None:
        if self.fail == "rename":
            raise OSError(errno.EROFS, "Read-only file system")
        super().rename(old, new)


def started(path: Path, disk: Disk, after: int = 0) -> Journal:
    journal = Journal(str(path), disk)
    journal.start(after)
    return journal


def numbers(path: Path) -> list[int]:
    file = read_journal(str(path))
    assert file is not None
    return [record.number for record in file.records]


def test_waiting_puts_the_record_on_disk(tmp_path: Path) -> None:
    journal = started(tmp_path / "j", Disk(), 5)
    journal.append(6, lambda: b"{}")
    assert numbers(tmp_path / "j") == []
    journal.wait(6)
    assert numbers(tmp_path / "j") == [6]
    assert journal.durable == 6
    journal.close()


def test_journal_goes_on_behind_a_torn_tail(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_bytes(DATA + b"47 1 torn")
    file = read_journal(str(path))
    assert file is not None
    journal = Journal(str(path), Disk())
    journal.resume(file.size, file.records[-1].number)
    journal.append(AFTER + 7, lambda: b"{}")
    journal.wait(AFTER + 7)
    journal.close()
    assert numbers(path) == [*range(AFTER + 1, AFTER + 8)]


def test_many_waiters_share_fsyncs(tmp_path: Path) -> None:
    """16 threads with 20 records each and a slow disk: far fewer fsyncs than waits."""
    disk = CountingDisk(delay=0.01)
    journal = started(tmp_path / "j", disk)
    before, lock, last = disk.fsyncs, threading.Lock(), 0
    errors: list[str] = []

    def work() -> None:
        nonlocal last
        for _ in range(20):
            with lock:
                last += 1
                number = last
                journal.append(number, lambda: b'{"put":[]}')
            journal.wait(number)
            if journal.durable < number:
                errors.append(f"{number} was acknowledged at {journal.durable}")

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not errors
    assert numbers(tmp_path / "j") == [*range(1, 321)]
    assert disk.fsyncs - before < 160
    journal.close()


@pytest.mark.parametrize("call", ["write", "fsync"])
@pytest.mark.parametrize("partial", [0, 10])
def test_after_a_fault_nothing_is_acknowledged_until_a_new_file(
    tmp_path: Path, call: str, partial: int
) -> None:
    disk = CountingDisk()
    disk.partial = partial
    journal = started(tmp_path / "j", disk)
    journal.append(1, lambda: b"{}")
    journal.wait(1)
    disk.fail = call
    journal.append(2, lambda: b"{}")
    with pytest.raises(DiskError):
        journal.wait(2)
    disk.fail = None  # the disk works again, but an fsync is never simply retried
    fsyncs = disk.fsyncs
    for attempt in (journal.flush, lambda: journal.wait(2), lambda: journal.rotate(1)):
        with pytest.raises(DiskError):
            attempt()
    assert disk.fsyncs == fsyncs
    assert journal.durable == 1
    assert journal.failure
    journal.wait(1)  # what was on disk stays so
    assert numbers(tmp_path / "j") == [1]  # the failed record does not come back
    journal.discard()
    journal.start(2)
    assert journal.failure is None
    journal.append(3, lambda: b"{}")
    journal.wait(3)
    assert numbers(tmp_path / "j") == [3]
    journal.close()


def test_every_waiter_of_a_failed_group_learns_it(tmp_path: Path) -> None:
    disk = CountingDisk(delay=0.01)
    journal = started(tmp_path / "j", disk)
    disk.fail = "fsync"
    outcomes: list[str] = []
    for number in range(1, 9):
        journal.append(number, lambda: b"{}")

    def wait(number: int) -> None:
        try:
            journal.wait(number)
            outcomes.append("acknowledged")
        except DiskError:
            outcomes.append("refused")

    threads = [threading.Thread(target=wait, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert outcomes == ["refused"] * 8
    journal.close()


def test_lost_record_is_never_acknowledged_not_after_a_new_file_either(tmp_path: Path) -> None:
    """A waiter that comes late must not take the new file's start for its own record's fsync."""
    disk = CountingDisk()
    journal = started(tmp_path / "j", disk)
    disk.fail = "fsync"
    journal.append(1, lambda: b"{}")
    journal.append(2, lambda: b"{}")
    with pytest.raises(DiskError):
        journal.wait(1)
    journal.append(3, lambda: b"{}")  # came between the fault and the discovery of it
    disk.fail = None
    journal.discard()
    journal.start(3)
    for number in (2, 3):
        with pytest.raises(DiskError):
            journal.wait(number)
    journal.append(4, lambda: b"{}")
    journal.wait(4)
    journal.close()


def test_record_that_cannot_be_made_is_lost_like_one_that_cannot_be_written(
    tmp_path: Path,
) -> None:
    journal = started(tmp_path / "j", Disk())
    journal.append(1, lambda: b"{}")
    journal.wait(1)

    def no_memory() -> bytes:
        raise MemoryError

    journal.append(2, no_memory)
    with pytest.raises(DiskError, match="MemoryError"):
        journal.wait(2)
    journal.append(3, lambda: b"{}")
    with pytest.raises(DiskError):  # it would follow a gap
        journal.wait(3)
    journal.discard()
    assert numbers(tmp_path / "j") == [1]
    journal.close()


def test_rotate_splits_at_the_number(tmp_path: Path) -> None:
    journal = started(tmp_path / "j", Disk())
    for number in range(1, 6):
        journal.append(number, lambda: b"{}")
    journal.rotate(3)
    assert numbers(tmp_path / "j.previous") == [1, 2, 3]
    assert numbers(tmp_path / "j") == []
    journal.wait(5)
    current = read_journal(str(tmp_path / "j"))
    assert current is not None
    assert current.after == 3
    assert [record.number for record in current.records] == [4, 5]
    journal.close()


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_failed_rotate_loses_nothing_and_refuses_changes(tmp_path: Path, call: str) -> None:
    disk = CountingDisk()
    journal = started(tmp_path / "j", disk)
    journal.append(1, lambda: b"{}")
    journal.wait(1)
    disk.fail = call
    with pytest.raises(DiskError):
        journal.rotate(1)
    disk.fail = None
    journal.append(2, lambda: b"{}")
    with pytest.raises(DiskError):
        journal.wait(2)
    kept = [p for p in ("j", "j.previous") if (tmp_path / p).exists()]
    assert [n for p in kept for n in numbers(tmp_path / p)] == [1]
    journal.close()


def test_replaced_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    disk, path = CountingDisk(), tmp_path / "file"
    disk.replace(str(path), [b"old"])
    for call in ("write", "fsync", "rename"):
        disk.fail = call
        with pytest.raises(OSError, match=r"space|Input|Read-only"):
            disk.replace(str(path), [b"n", b"ew"])
        assert path.read_bytes() == b"old"
    disk.fail = None
    disk.replace(str(path), [memoryview(b"n"), b"ew"])
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
