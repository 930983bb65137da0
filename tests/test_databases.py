"""Databases of every form that main ever wrote: checked, served, imported, brought up to date.

Each archive in data/databases was made by the commit in its name: NUMBER (`PRAGMA user_version`)
with a letter for the form, and the commit that wrote it, the last one with that form. It served six
peers with traffic, ended in order, started again, changed some, and was killed: a snapshot and
journals. shown.json is what that very commit said of these files at its next start.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Client, GatewayProcess, a_key, run_wggw, running, some

import wggw

ARCHIVES = sorted((Path(__file__).parent / "data/databases").glob("*.tar.gz"))
SEALED_WITH = "the key of the test databases"
SNAPSHOT = "/api/v1/snapshot"

# A database's number stands for one text: who changes SCHEMA gives it the next number, adds a line
# here, and puts a database of the number before into data/databases.
TEXTS = {3: "9b0d109d51882f8b73c5113033e5cf4e0fc46599a6c2ac2744c0a68b2e7056b8"}


def test_a_changed_schema_has_a_new_number() -> None:
    text = hashlib.sha256(wggw.SCHEMA.encode()).hexdigest()
    assert (wggw.SCHEMA_VERSION, text) == (max(TEXTS), TEXTS[max(TEXTS)])


def name_of(archive: Path) -> str:
    return archive.name.removesuffix(".tar.gz")


def unpacked(archive: Path, directory: Path) -> dict[str, Any]:
    """The files are put into the directory; returns what was to be seen of them."""
    with tarfile.open(archive) as tar:
        for member in tar:
            content = tar.extractfile(member)
            assert content is not None
            (directory / member.name).write_bytes(content.read())
    shown: dict[str, Any] = json.loads((directory / "shown.json").read_text())
    return shown


def settings(archive: Path, directory: Path) -> dict[str, str]:
    sealed = {"SNAPSHOT_KEY": SEALED_WITH} if "sealed" in archive.name else {}
    return {"DB_PATH": str(directory / "db"), **sealed}


def rows(configurations: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By key, without what belongs to the private key of the host."""
    return {
        row["public_key"]: {k: v for k, v in row.items() if k != "server_public_key"}
        for row in configurations
    }


def assert_same(gateway: GatewayProcess, shown: dict[str, Any]) -> None:
    client = gateway.client()
    found = rows(client.send("GET", "/api/v1/configurations/").json["configurations"])
    expected = rows(shown["configurations"])
    assert found.keys() == expected.keys()
    for key, row in expected.items():
        assert {name: found[key][name] for name in row} == row
    usage = client.send("GET", "/api/v1/ip-usage").json
    for family in ("ipv4", "ipv6"):
        for name in ("used", "gateway_ip"):
            assert usage[family][name] == shown["ip-usage"][family][name]
        assert set(usage[family]["assigned_ips"]) == set(shown["ip-usage"][family]["assigned_ips"])
    client.close()


def form(path: Path) -> tuple[int, frozenset[Any]]:
    with contextlib.closing(sqlite3.connect(path)) as db:
        schema = frozenset(db.execute("SELECT type, name, sql FROM sqlite_master"))
        return db.execute("PRAGMA user_version").fetchone()[0], schema


def released(path: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return [row[0] for row in db.execute("SELECT address FROM released ORDER BY sequence")]


@pytest.mark.parametrize("archive", some(ARCHIVES, 5), ids=name_of)
def test_it_is_checked_and_served_with_every_peer(archive: Path, tmp_path: Path) -> None:
    shown = unpacked(archive, tmp_path)
    given = settings(archive, tmp_path)
    done = run_wggw(tmp_path, "check", **given)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"good, {len(shown['configurations'])} peers" in done.stdout
    with running(tmp_path, **given) as gateway:
        assert_same(gateway, shown)
        assert gateway.stop() == 0
        if "sealed" not in archive.name:
            with contextlib.closing(wggw.empty_database()) as newest:
                query = "SELECT type, name, sql FROM sqlite_master"
                schema = frozenset(newest.execute(query))
            assert form(tmp_path / "db") == (wggw.SCHEMA_VERSION, schema)
            held = {row["assigned_ip"] for row in shown["configurations"]}
            assert released(tmp_path / "db")
            assert not held & set(released(tmp_path / "db"))
        gateway.start()
        assert_same(gateway, shown)
        client = gateway.client()
        added = client.create(a_key("added"), protocol="dual")
        assert added.status == 200, added
        for row in shown["configurations"]:
            assert client.delete(row["public_key"]).status == 200
        client.close()


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A connection to a gateway that has a state of its own."""
    with running(tmp_path_factory.mktemp("other")) as gateway:
        client = gateway.client()
        assert client.create(a_key("other")).status == 200
        yield client
        client.close()


@pytest.mark.parametrize(
    "archive", [path for path in ARCHIVES if "sealed" not in path.name], ids=name_of
)
def test_its_snapshot_can_be_imported(archive: Path, tmp_path: Path, other: Client) -> None:
    unpacked(archive, tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "db")) as db:
        keys = {row[0] for row in db.execute("SELECT public_key FROM peers")}
    answer = other.send("PUT", f"{SNAPSHOT}?replace_key=false", (tmp_path / "db").read_bytes())
    assert answer.status == 200, answer
    listed = other.send("GET", "/api/v1/configurations/").json["configurations"]
    assert {row["public_key"] for row in listed} == keys


def test_every_form_is_among_the_archives(tmp_path: Path) -> None:
    """So that none is lost when one is made anew: eight of number 1, one of number 2."""
    forms = set()
    for archive in ARCHIVES:
        if "sealed" not in archive.name:
            unpacked(archive, tmp_path)
            forms.add(form(tmp_path / "db"))
    assert sorted(number for number, _ in forms) == [1] * 8 + [2]


FOREIGN = {
    "a table": ("CREATE TABLE more (x)", "'more'"),
    "a column": ("ALTER TABLE peers ADD COLUMN more TEXT", "peers.more"),
    "a missing table": ("DROP TABLE traffic", "'traffic'"),
    "a missing column": ("ALTER TABLE peers DROP COLUMN tunnel_traffic", "peers.tunnel_traffic"),
    "a table of another name": ("ALTER TABLE released RENAME TO other", "'other'"),
    "number 0": ("PRAGMA user_version = 0", "version 0"),
    "a newer number": (f"PRAGMA user_version = {wggw.SCHEMA_VERSION + 1}", "newer"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_an_old_form_that_other_hands_changed_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    [archive] = [path for path in ARCHIVES if path.name.startswith("1f-")]
    statement, named = FOREIGN[kind]
    unpacked(archive, tmp_path)
    for name in ("db.journal", "db.journal.previous"):
        (tmp_path / name).unlink()
    with contextlib.closing(sqlite3.connect(tmp_path / "db", isolation_level=None)) as db:
        db.execute(statement)
        db.execute("PRAGMA application_id = 0")
    before = (tmp_path / "db").read_bytes()
    gateway = GatewayProcess(tmp_path, **settings(archive, tmp_path))
    assert gateway.spawn().wait(30) == 3
    gateway.close()
    assert named in gateway.text()
    assert (tmp_path / "db").read_bytes() == before
