"""`wggw.py check`: verifies without writing; --repair saves what can be read into a new file."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fakes import World, build, do
from harness import API_KEY, LONG, WGGW, GatewayProcess, a_key, run_wggw, running, some
from test_restart import state, stopped

import wggw

SECRET = "a key for what lies on disk"


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def check(directory: Path, *arguments: str, **settings: str) -> Done:
    settings = {"GATEWAY_API_KEY": API_KEY, "DB_PATH": str(directory / "wireguard.db"), **settings}
    done = run_wggw(directory, "check", *arguments, **settings)
    assert SECRET not in done.stdout + done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


def files_of(directory: Path) -> dict[str, tuple[bytes, int]]:
    """Every file with its content and time of change."""
    return {
        str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in directory.rglob("*")
        if path.is_file()
    }


def changed(directory: Path, before: dict[str, tuple[bytes, int]]) -> set[str]:
    now = files_of(directory)
    return {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)}


# --- the files that are checked -------------------------------------------------------------------


class Kept(NamedTuple):
    """A directory with the files of a killed gateway, and the state that it had."""

    directory: Path
    settings: dict[str, str]
    state: Any


def fill(gateway: GatewayProcess) -> None:
    """Records on both sides of two snapshots; behind the last one of each kind."""
    for life in range(3):
        client = gateway.client()
        for number in range(5):
            made = client.create(a_key((life, number)), protocol="dual", request_id=f"r{number}")
            assert made.status == 200
        client.close()
        if life < 2:
            gateway.stop()
            gateway.start()
    client = gateway.client()
    assert client.status(a_key((0, 1)), "suspended").status == 200
    assert client.delete(a_key((1, 0))).status == 200
    client.close()


def keep(directory: Path, settings: dict[str, str]) -> Kept:
    timers = {"SAMPLE_INTERVAL": "3600", "SNAPSHOT_INTERVAL": "3600"}  # no records of theirs
    with running(directory, **timers, **settings) as gateway:
        fill(gateway)
        before = state(gateway)
        gateway.kill()
    gateway.log.unlink()
    return Kept(directory, settings, before)


FORMS = {"sealed": {"SNAPSHOT_KEY": SECRET}, **({"plain": {}} if LONG else {})}
each_form = pytest.mark.parametrize("settings", FORMS.values(), ids=FORMS.keys())


@pytest.fixture(scope="module", params=FORMS)
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    return keep(tmp_path_factory.mktemp(request.param), FORMS[request.param])


@pytest.fixture
def kept(original: Kept, tmp_path: Path) -> Iterator[Kept]:
    """A copy of them, which the test may damage."""
    copy = tmp_path / "copy"
    shutil.copytree(original.directory, copy, ignore=shutil.ignore_patterns("*.sock"))
    yield original._replace(directory=copy)


def path_of(kept: Kept, end: str) -> Path:
    return kept.directory / f"wireguard.db{end}"


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def record_start(path: Path, number: int) -> int:
    """The offset of a journal's record; 0 is the header."""
    return sum(len(line) for line in path.read_bytes().splitlines(keepends=True)[:number])


# --- check ----------------------------------------------------------------------------------------


def test_good_files_are_exit_0_and_nothing_is_written(kept: Kept) -> None:
    before = files_of(kept.directory)
    done = check(kept.directory, **kept.settings)
    assert done.code == 0, done
    assert f"{path_of(kept, '')}: good, 14 peers, record 18" in done.out
    assert "torn" not in done.out
    assert changed(kept.directory, before) == set()


def test_torn_tail_is_exit_0_and_its_size_is_told(kept: Kept) -> None:
    path = path_of(kept, ".journal")
    content = path.read_bytes()
    last = content.rfind(b"\n", 0, -1) + 1
    path.write_bytes(content[:-7])
    before = files_of(kept.directory)
    done = check(kept.directory, **kept.settings)
    assert done.code == 0, done
    assert "good, 15 peers, record 17" in done.out
    assert f"{path}: {len(content) - 7 - last} bytes of a torn record" in done.out
    assert changed(kept.directory, before) == set()


def damage_snapshot(kept: Kept) -> tuple[Path, int | None]:
    path = path_of(kept, "")
    flip(path, path.stat().st_size // 2)
    return path, None


def damage_header(kept: Kept) -> tuple[Path, int | None]:
    path = path_of(kept, ".journal")
    flip(path, 3)
    return path, 0


def damage_record(kept: Kept) -> tuple[Path, int | None]:
    path = path_of(kept, ".journal")
    start = record_start(path, 2)
    flip(path, start + 30)
    return path, start


def remove_record(kept: Kept) -> tuple[Path, int | None]:
    path = path_of(kept, ".journal")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3] + lines[4:]))
    return path, record_start(path, 3)


def remove_snapshot(kept: Kept) -> tuple[Path, int | None]:
    path_of(kept, "").unlink()
    return path_of(kept, ""), None


def empty_snapshot(kept: Kept) -> tuple[Path, int | None]:
    path_of(kept, "").write_bytes(b"")
    return path_of(kept, ""), 0


def older_snapshot(kept: Kept) -> tuple[Path, int | None]:
    """A snapshot that the journal does not follow."""
    path_of(kept, ".journal.previous").unlink(missing_ok=True)
    fresh = kept.directory / "fresh"
    fresh.mkdir()
    with running(fresh, **kept.settings) as gateway:
        gateway.client().create(a_key("other"))
        gateway.stop()
    shutil.copy(fresh / "wireguard.db", path_of(kept, ""))
    shutil.rmtree(fresh)
    return path_of(kept, ".journal"), 0


Damage = Callable[[Kept], tuple[Path, int | None]]
DAMAGES: tuple[Damage, ...] = (
    damage_snapshot,
    damage_header,
    damage_record,
    remove_record,
    remove_snapshot,
    empty_snapshot,
    older_snapshot,
)


@pytest.mark.parametrize("damage", some(DAMAGES, 4))
def test_damage_is_exit_3_that_names_file_and_offset(kept: Kept, damage: Damage) -> None:
    path, offset = damage(kept)
    before = files_of(kept.directory)
    done = check(kept.directory, **kept.settings)
    assert done.code == 3, done
    assert "good" not in done.out
    last = done.err.splitlines()[-1]
    assert str(path) in last
    assert offset is None or f"at byte {offset}:" in last
    assert "--repair" in last
    assert changed(kept.directory, before) == set()
    with stopped(kept.directory, **kept.settings) as gateway:  # a start says the same
        assert gateway.spawn().wait(60) == 3
        assert str(path) in gateway.text().splitlines()[-1]


@pytest.mark.parametrize("options", [(), ("--repair",)], ids=str)
def test_nothing_to_check_is_exit_1_and_nothing_is_written(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    done = check(tmp_path, *options)
    assert (done.code, done.out) == (1, "")
    assert "wireguard.db: there is no database" in done.err
    assert list(tmp_path.iterdir()) == []


def test_repair_from_any_one_file_is_tried(kept: Kept) -> None:
    for path in list(kept.directory.glob("wireguard.db*")):
        if not path.name.endswith(".journal"):
            path.unlink()
    assert "used: " in repair(kept).out


def test_wrong_key_is_exit_2_and_nothing_is_written(kept: Kept) -> None:
    if not kept.settings:
        pytest.skip("there is no key")
    before = files_of(kept.directory)
    for settings in ({}, {"SNAPSHOT_KEY": "not the key that it was"}):
        for repair in ((), ("--repair",)):
            done = check(kept.directory, *repair, **settings)
            assert done.code == 2, done
            assert "SNAPSHOT_KEY" in done.err
            assert changed(kept.directory, before) == set()


def test_check_beside_a_running_gateway_disturbs_nothing(kept: Kept) -> None:
    with running(kept.directory, **kept.settings) as gateway:
        assert gateway.client().create(a_key("new")).status == 200
        before = files_of(kept.directory)
        done = check(kept.directory, **kept.settings)
        assert done.code == 0, done
        assert "good, 15 peers" in done.out
        assert changed(kept.directory, before) <= {"log"}  # a line may come after its answer
        assert gateway.client().create(a_key("newer")).status == 200


# --- repair ---------------------------------------------------------------------------------------


def repair(kept: Kept) -> Done:
    """Repair; the old files are untouched and one new one is there."""
    before = files_of(kept.directory)
    done = check(kept.directory, "--repair", **kept.settings)
    assert done.code == 0, done
    assert changed(kept.directory, before) == {"wireguard.db.repaired"}
    assert path_of(kept, ".repaired").stat().st_mode & 0o077 == 0
    return done


def commands_of(done: Done) -> str:
    """What the operator is told to type: the indented lines."""
    return "\n".join(line.strip() for line in done.out.splitlines() if line.startswith("  "))


def shown_after(kept: Kept, done: Done) -> Any:
    """Do as told, start the gateway, and see what it shows."""
    script = commands_of(done)
    assert script
    subprocess.run(["sh", "-c", script], cwd=kept.directory, check=False, capture_output=True)
    with running(kept.directory, **kept.settings) as gateway:
        shown = state(gateway)
        saved = re.search(r"saved (\d+) peers", done.out)
        assert saved and int(saved[1]) == len(shown[0]["configurations"])
        client = gateway.client()
        synced = client.send("POST", "/api/v1/sync-ips").json
        assert (synced["added"], synced["updated"], synced["removed"]) == (0, 0, 0)
        assert client.create(a_key("a life after")).status == 200
        gateway.kill()
        gateway.start()
        assert gateway.client().get(a_key("a life after")).status == 200
    return shown


def peers_of(shown: Any) -> dict[str, Any]:
    return {row["public_key"]: row for row in shown[0]["configurations"]}


def test_repair_of_good_files_saves_everything(kept: Kept) -> None:
    assert shown_after(kept, repair(kept)) == kept.state


@pytest.mark.parametrize("how", ["flipped", "emptied", "removed", "header"])
def test_damaged_snapshot_falls_back_to_the_one_before_with_nothing_lost(
    kept: Kept, how: str
) -> None:
    path = path_of(kept, "")
    if how == "removed":
        path.unlink()
    elif how == "emptied":
        path.write_bytes(b"")
    else:
        flip(path, 20 if how == "header" else path.stat().st_size // 2)
    done = repair(kept)
    assert f"used: {path}.previous" in done.out
    assert shown_after(kept, done) == kept.state


def test_both_journals_are_saved_behind_the_snapshot_before(tmp_path: Path) -> None:
    """The rotation of a running gateway, not only those of its starts."""
    with running(tmp_path, SNAPSHOT_INTERVAL="0.2") as gateway:
        client = gateway.client()
        snapshot = tmp_path / "wireguard.db"
        for number in range(4):
            written = snapshot.stat().st_mtime_ns
            assert client.create(a_key(number)).status == 200
            while snapshot.stat().st_mtime_ns == written:
                assert client.create(a_key((number, "more"))).status == 200
        assert client.delete(a_key(1)).status == 200
        before = state(gateway)
        gateway.kill()
    kept = Kept(tmp_path, {}, before)
    flip(path_of(kept, ""), 5000)
    done = repair(kept)
    assert "missing" not in done.out
    assert shown_after(kept, done) == before


def create_and_kill(gateway: GatewayProcess, label: str) -> None:
    client = gateway.client()
    for number in range(3):
        assert client.create(a_key((label, number))).status == 200
    client.close()
    gateway.kill()


@each_form
def test_snapshot_before_is_whole_after_kills(tmp_path: Path, settings: dict[str, str]) -> None:
    """What a start leaves behind holds everything twice, as what a rotation leaves does."""
    with running(tmp_path, **settings) as gateway:
        for life in ("first", "second", "third"):
            create_and_kill(gateway, life)
            gateway.start()
        before = state(gateway)
        create_and_kill(gateway, "last")
    flip(tmp_path / "wireguard.db", (tmp_path / "wireguard.db").stat().st_size // 2)
    kept = Kept(tmp_path, settings, before)
    saved = peers_of(shown_after(kept, repair(kept)))
    assert saved.keys() == peers_of(before).keys() | {a_key(("last", n)) for n in range(3)}


@each_form
def test_snapshot_before_is_whole_after_an_import(tmp_path: Path, settings: dict[str, str]) -> None:
    """The state of before the import must not come back under records of after it."""
    with running(tmp_path, **settings) as gateway:
        client = gateway.client()
        assert client.create(a_key("exported")).status == 200
        exported = client.send("GET", "/api/v1/snapshot").body
        assert client.create(a_key("replaced")).status == 200
        assert client.send("PUT", "/api/v1/snapshot", exported).status == 200
        client.close()
        before = state(gateway)
        create_and_kill(gateway, "last")
    flip(tmp_path / "wireguard.db", (tmp_path / "wireguard.db").stat().st_size // 2)
    kept = Kept(tmp_path, settings, before)
    saved = peers_of(shown_after(kept, repair(kept)))
    assert saved.keys() == {a_key("exported"), *(a_key(("last", n)) for n in range(3))}


def test_damaged_record_loses_itself_only(kept: Kept) -> None:
    path = path_of(kept, ".journal")
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 8  # the header, five creates, a suspension, a deletion
    flip(path, record_start(path, 3) + 40)
    done = repair(kept)
    assert "no record between 13 and 15" in done.out
    assert str(path) in done.out
    saved = peers_of(shown_after(kept, done))
    expected = peers_of(kept.state)
    for row in (*saved.values(), *expected.values()):
        del row["sequence"]  # what followed the lost record has other ones now
    lost = expected.keys() - saved.keys()
    assert lost == {a_key((2, 2))}
    assert saved == {key: row for key, row in expected.items() if key not in lost}


def test_torn_tail_is_saved_up_to_it(kept: Kept) -> None:
    path = path_of(kept, ".journal")
    path.write_bytes(path.read_bytes()[:-9])
    saved = peers_of(shown_after(kept, repair(kept)))
    assert saved.keys() - peers_of(kept.state).keys() == {a_key((1, 0))}  # its deletion was torn


def test_nothing_readable_is_an_empty_file_and_says_so(kept: Kept) -> None:
    for path in kept.directory.glob("wireguard.db*"):
        path.write_bytes(random.Random(path.name).randbytes(path.stat().st_size))
    done = repair(kept)
    assert "saved 0 peers" in done.out
    for end in ("", ".previous"):
        assert f"not used: {path_of(kept, end)}:" in done.out


def test_repair_says_what_it_used_and_what_it_did_not(kept: Kept) -> None:
    flip(path_of(kept, ""), path_of(kept, "").stat().st_size // 2)
    lines = repair(kept).out.splitlines()
    assert lines[0].startswith(f"not used: {path_of(kept, '')}: at byte")
    assert lines[1].startswith(f"used: {path_of(kept, '.previous')}, record")
    assert any(line.startswith(f"used: {path_of(kept, '.journal')}: ") for line in lines)


def test_repair_twice_gives_the_same(kept: Kept) -> None:
    flip(path_of(kept, ".journal"), record_start(path_of(kept, ".journal"), 2) + 40)
    first = repair(kept)
    second = check(kept.directory, "--repair", **kept.settings)
    assert (second.code, second.out) == (0, first.out)


def test_printed_commands_work_where_names_have_blanks(tmp_path: Path) -> None:
    directory = tmp_path / "a b; 'c' $d"
    directory.mkdir()
    with running(directory) as gateway:
        client = gateway.client()
        for number in range(3):
            client.create(a_key(number))
        before = state(gateway)
        gateway.kill()
    flip(directory / "wireguard.db.journal", 2)
    kept = Kept(directory, {}, before)
    done = repair(kept)
    saved = shown_after(kept, done)  # the header alone is damaged: every record is readable
    assert peers_of(saved) == peers_of(before)
    assert (directory / "damaged" / "wireguard.db.journal").exists()


def test_sealed_repair_stays_sealed(kept: Kept) -> None:
    if not kept.settings:
        pytest.skip("there is no key")
    repair(kept)
    content = path_of(kept, ".repaired").read_bytes()
    assert content.startswith(b"wggw-snapshot 1 ")
    assert a_key((0, 0)).encode() not in content


def test_repair_that_cannot_be_written_is_exit_1(kept: Kept) -> None:
    path_of(kept, ".repaired.tmp").mkdir()  # where it is written first
    done = check(kept.directory, "--repair", **kept.settings)
    assert done.code == 1
    assert str(path_of(kept, ".repaired")) in done.err


@pytest.mark.parametrize("end", ["", ".journal", ".journal.previous"])
def test_what_cannot_be_read_is_not_used_and_the_rest_is(kept: Kept, end: str) -> None:
    path_of(kept, end).unlink()
    path_of(kept, end).mkdir()
    done = check(kept.directory, "--repair", **kept.settings)
    assert (done.code, done.err) == (0, "")
    assert f"not used: {path_of(kept, end)}: at byte 0: cannot be read: Is a directory" in done.out


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: to become another user")
@pytest.mark.parametrize("end", ["", ".journal", "directory"])
@pytest.mark.parametrize("arguments", [[], ["--repair"]])
def test_files_of_another_user_are_not_damaged(end: str, arguments: list[str]) -> None:
    directory = Path(tempfile.mkdtemp())  # where another user may look
    try:
        world = build(directory)
        do(world.gateway, "create", public_key=a_key(1))
        world.close()
        for file in (directory, *directory.iterdir()):
            file.chmod(0o777 if file == directory else 0o666)
        closed = directory if end == "directory" else directory / f"wireguard.db{end}"
        closed.chmod(0o600)
        program = "import os, sys, wggw\nos.setuid(65534)\nsys.exit(wggw.main())"
        done = subprocess.run(
            [sys.executable, "-c", program, "check", *arguments],
            cwd="/",
            env={"DB_PATH": str(directory / "wireguard.db"), "PYTHONPATH": str(WGGW.parent)},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        shutil.rmtree(directory)
    assert (done.returncode, "run this as root" in done.stderr) == (1, True), done
    assert "mv" not in done.stdout


# --- beside a running gateway, and as root --------------------------------------------------------


def rotate_meanwhile(world: World, monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    """Two snapshots between somebody's reading of the `first` file and the other, once."""
    read_journal, numbers = wggw.read_journal, [2, 3]

    def rotating(*arguments: Any) -> Any:
        found = read_journal(*arguments) if first == "journal" else None
        while numbers:
            do(world.gateway, "create", public_key=a_key(numbers.pop()))
            world.gateway.lander.snapshot()
        return found or read_journal(*arguments)

    monkeypatch.setattr(wggw, "read_journal", rotating)


@pytest.mark.parametrize("first", ["journal", "snapshot"])
def test_files_that_are_replaced_meanwhile_are_read_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    first: str,
) -> None:
    world = build(tmp_path)
    do(world.gateway, "create", public_key=a_key(1))
    rotate_meanwhile(world, monkeypatch, first)
    monkeypatch.setenv("GATEWAY_API_KEY", API_KEY)
    monkeypatch.setenv("DB_PATH", str(tmp_path / "wireguard.db"))
    monkeypatch.chdir(tmp_path)
    assert wggw.main(["check"]) == 0
    assert "good, 3 peers" in capsys.readouterr().out
    world.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: files of another user")
def test_what_root_repairs_belongs_to_the_gateway(tmp_path: Path) -> None:
    world = build(tmp_path)
    do(world.gateway, "create", public_key=a_key(1))
    world.crash()
    for file in tmp_path.glob("wireguard.db*"):
        os.chown(file, 12345, 12346)
    assert check(tmp_path, "--repair").code == 0
    made = (tmp_path / "wireguard.db.repaired").stat()
    assert (made.st_uid, made.st_gid) == (12345, 12346)


def test_a_deleted_peer_of_a_lost_record_costs_no_other_change(tmp_path: Path) -> None:
    world = build(tmp_path)
    do(world.gateway, "create", public_key=a_key(1))
    begin = world.files.journal.size
    do(world.gateway, "create", public_key=a_key(2))
    wanted = {a_key(number) for number in (1, 3, 4)}
    desired = {key: wggw.Desired(key, {"public_key": key}) for key in wanted}
    world.gateway.sync(desired, dry_run=False, allow_mass_delete=True)
    world.crash()
    with (tmp_path / "wireguard.db.journal").open("r+b") as file:
        file.seek(begin + 30)
        file.write(b"?")
    assert check(tmp_path).code == 3
    assert check(tmp_path, "--repair").code == 0
    saved = wggw.load_snapshot(str(tmp_path / "wireguard.db.repaired"), None)
    assert {peer.public_key for peer in saved.peers_after(0, 9)} == wanted


def test_a_database_from_an_image_without_times_is_there(tmp_path: Path) -> None:
    """Some image builders and backups set each file's time to 0."""
    world = build(tmp_path)
    do(world.gateway, "create", public_key=a_key(1))
    world.close()
    os.utime(tmp_path / "wireguard.db", (0, 0))
    assert "1 peer" in check(tmp_path).out
