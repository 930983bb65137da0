"""A state whose peers know another key than the node's: told before, applied when asked, shown."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import GatewayProcess, a_key, path_key, wait_for
from objects import tls_store

import wggw

SNAPSHOT = "/api/v1/snapshot"
SEAL = {"SNAPSHOT_KEY": "the key that seals all of it"}


class Pair:
    """Two gateways with keys of their own: `old` with three peers, `new` with one."""

    def __init__(self, directory: Path, **settings: str) -> None:
        self.old, self.new = (
            GatewayProcess(Path(directory / name), **settings) for name in ("old", "new")
        )
        for gateway in (self.old, self.new):
            gateway.directory.mkdir()
            gateway.start()
        for seed in (1, 2, 3):
            assert self.old.client().create(a_key(seed)).status == 200
        assert self.new.client().create(a_key("its own")).status == 200
        self.image = self.old.client().send("GET", SNAPSHOT).body
        self.keys = [public_key(gateway) for gateway in (self.old, self.new)]

    def put(self, query: str) -> Any:
        headers = {"Content-Type": "application/octet-stream"}
        return self.new.client().send("PUT", SNAPSHOT + query, self.image, **headers)

    def close(self) -> None:
        self.old.close()
        self.new.close()


@pytest.fixture
def clear(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path)
    yield pair
    pair.close()


@pytest.fixture
def sealed(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path, **SEAL)
    yield pair
    pair.close()


def status(gateway: GatewayProcess) -> Any:
    return gateway.client().send("GET", "/api/v1/server/status").json


def public_key(gateway: GatewayProcess) -> str:
    key: str = status(gateway)["interfaces"][0]["public_key"]
    return key


def key_of_file(gateway: GatewayProcess) -> str:
    text = Path(gateway.settings["WG_PRIVATE_KEY_FILE"]).read_text().strip()
    return wggw.encode_key(wggw.x25519_public(wggw.decode_key(text)))


def test_import_onto_another_key_is_refused_unless_it_says_what_becomes_of_it(clear: Pair) -> None:
    theirs, mine = clear.keys
    for query in ("", "?dry_run=true"):
        refused = clear.put(query)
        assert refused.status == 409
        for words in (theirs, mine, "3 peers", "replace_key=true", "replace_key=false"):
            assert words in refused.json["detail"]
    unsealed = clear.put("?replace_key=true")
    assert unsealed.status == 409
    assert "does not hold the private key of wg0" in unsealed.json["detail"]
    assert status(clear.new)["total_peers"] == 1 and status(clear.new)["reasons"] == []
    dry = clear.put("?replace_key=false&dry_run=true")
    assert dry.json == {"status": "dry_run", "total_peers": 3, "cut_off_peers": 4}
    assert status(clear.new)["total_peers"] == 1

    done = clear.put("?replace_key=false")
    assert done.json == {"status": "imported", "total_peers": 3, "cut_off_peers": 4}
    for _ in range(2):  # as long as they differ: at the next start, too
        found = status(clear.new)
        [reason] = found["reasons"]
        assert found["status"] == "degraded" and public_key(clear.new) == mine
        assert f"its public key is {mine}, but" in reason and f"3 peers name {theirs}" in reason
        assert f"name {theirs}" in clear.new.command("doctor").stdout
        assert clear.new.is_ready()  # it does what it is asked to
        clear.new.stop()
        clear.new.start()
    assert clear.put("").status == 409  # the key is still another one
    accepted = clear.new.client().send("POST", "/api/v1/sync-ips?accept_key=true")
    assert accepted.status == 200 and status(clear.new)["reasons"] == []
    clear.new.kill()
    clear.new.start()
    assert status(clear.new)["status"] == "healthy"


def test_a_state_of_the_same_key_is_imported_as_ever(clear: Pair) -> None:
    client = clear.old.client()
    headers = {"Content-Type": "application/octet-stream"}
    assert client.delete(a_key(1)).status == 200
    answer = client.send("PUT", SNAPSHOT, clear.image, **headers)
    assert answer.json == {"status": "imported", "total_peers": 3, "cut_off_peers": 0}


def test_another_gateways_state_replaces_peers_only_when_asked_for(
    clear: Pair, tmp_path: Path
) -> None:
    """Whether it has no peers, or the same key: without being asked for, it would delete ours."""
    old, new = clear.old, clear.new
    new.stop()
    shutil.copy2(old.settings["WG_PRIVATE_KEY_FILE"], new.settings["WG_PRIVATE_KEY_FILE"])
    new.start()
    assert new.client().send("POST", "/api/v1/sync-ips?accept_key=true").status == 200
    assert public_key(new) == public_key(old)
    theirs = clear.image
    for seed in (1, 2, 3):
        assert old.client().delete(a_key(seed)).status == 200
    empty = old.client().send("GET", SNAPSHOT).body
    for clear.image, total in ((theirs, 3), (empty, 0)):
        for query in ("", "?dry_run=true"):
            refused = clear.put(query)
            assert refused.status == 409, refused
            for image in (clear.image, new.client().send("GET", SNAPSHOT).body):
                assert wggw.open_state(image).lineage in refused.json["detail"]
            assert "the 1 peer here" in refused.json["detail"]
        for key in ("true", "false"):
            dry = clear.put(f"?replace_key={key}&dry_run=true")
            assert dry.json == {"status": "dry_run", "total_peers": total, "cut_off_peers": 1}
    assert new.client().get(a_key("its own")).status == 200
    file = tmp_path / "state"
    file.write_bytes(empty)
    assert "another gateway's" in new.command("snapshot", "import", str(file)).stderr
    done = new.command("snapshot", "import", "--keep-key", str(file))
    assert done.stdout.startswith("imported: 0 peers\ncut off: 1 peer, until"), done.stderr
    wait_for(lambda: "imported 0 peers; cut off: 1 peer" in new.text())
    clear.image = theirs
    answer = clear.put("")  # onto a gateway without peers
    assert answer.json == {"status": "imported", "total_peers": 3, "cut_off_peers": 0}


def test_peers_whose_configurations_no_longer_fit_are_counted_as_cut_off(clear: Pair) -> None:
    client = clear.old.client()
    fitting, moved, secret, gone = map(a_key, (1, 2, 3, 4))
    address = client.get(moved).json["assigned_ip"]
    assert client.delete(moved).status == 200
    assert client.create(gone, assigned_ip=address).status == 200
    assert client.create(moved).status == 200
    for key, field in ((secret, "preshared_key"), (fitting, "label")):
        path = f"/api/v1/configurations/{path_key(key)}"
        assert client.send("PATCH", path, {field: a_key("another")}).status == 200
    answer = client.send("PUT", SNAPSHOT, clear.image)
    assert answer.json == {"status": "imported", "total_peers": 3, "cut_off_peers": 3}


def test_the_sealed_key_is_applied_when_asked(sealed: Pair, tmp_path: Path) -> None:
    theirs, mine = sealed.keys
    (tmp_path / "state").write_bytes(sealed.image)
    words = ("snapshot", "import", str(tmp_path / "state"))
    refused = sealed.new.command(*words, "--dry-run")
    assert refused.returncode == 1 and theirs in refused.stderr
    dry = sealed.new.command(*words, "--dry-run", "--replace-key")
    assert dry.stdout.startswith("would import: 3 peers\ncut off: 1 peer,")
    assert (public_key(sealed.new), key_of_file(sealed.new)) == (mine, mine)

    # A file that cannot be written: nothing is changed.
    blocked = Path(f"{sealed.new.settings['WG_PRIVATE_KEY_FILE']}.tmp")
    blocked.mkdir()
    answer = sealed.put("?replace_key=true")
    assert answer.status == 409 and "cannot be put into" in answer.json["detail"]
    assert "name it in WG_PRIVATE_KEY_FILE, and restart" in answer.json["detail"]
    assert (public_key(sealed.new), key_of_file(sealed.new)) == (mine, mine)
    assert status(sealed.new)["total_peers"] == 1
    blocked.rmdir()

    done = sealed.new.command(*words, "--replace-key")
    assert done.stdout.startswith("imported: 3 peers\ncut off: 1 peer,"), done.stderr
    for _ in range(2):
        assert (public_key(sealed.new), key_of_file(sealed.new)) == (theirs, theirs)
        shown = sealed.new.client().get(a_key(1)).json
        assert shown["server_public_key"] == theirs
        assert status(sealed.new)["status"] == "healthy"
        sealed.new.kill()
        sealed.new.start()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it mounts a directory read-only")
def test_a_key_where_the_service_may_not_write_is_moved_before_it_is_replaced(
    sealed: Pair, tmp_path: Path
) -> None:
    """/etc/wggw is read-only for a service with ProtectSystem=strict: as docs/COMMANDS.md says."""
    new, mine = sealed.new, sealed.keys[1]
    own, closed = Path(new.settings["WG_PRIVATE_KEY_FILE"]), tmp_path / "etc" / "privatekey"
    (tmp_path / "state").write_bytes(sealed.image)
    words = ("snapshot", "import", str(tmp_path / "state"), "--replace-key")
    new.stop()
    closed.parent.mkdir()
    own.rename(closed)
    mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    new.prefix = ["unshare", "--mount", "sh", "-c", mount, str(closed.parent)]
    new.settings["WG_PRIVATE_KEY_FILE"] = str(closed)
    new.start()
    refused = new.command(*words)
    assert refused.returncode == 1 and public_key(new) == mine
    for part in ("Read-only file system", "name it in WG_PRIVATE_KEY_FILE, and restart"):
        assert part in refused.stderr
    new.stop()
    shutil.copy2(closed, own)
    new.settings["WG_PRIVATE_KEY_FILE"] = str(own)
    new.start()
    assert public_key(new) == mine
    assert new.command(*words).returncode == 0
    assert public_key(new) == key_of_file(new) == sealed.keys[0]


def test_a_restored_state_says_that_the_key_is_another_until_the_sealed_one_is_back(
    sealed: Pair,
) -> None:
    old, file = sealed.old, Path(sealed.old.settings["WG_PRIVATE_KEY_FILE"])
    old.stop()
    file.write_text(wggw.encode_key(wggw.make_private_key()))
    old.start()
    assert public_key(old) != sealed.keys[0]
    assert f"name {sealed.keys[0]}" in status(old)["reasons"][0]
    old.stop()  # it writes a snapshot: the sealed key must not be lost in it
    file.rename(file.with_name("other"))
    old.start()
    assert public_key(old) == sealed.keys[0] == key_of_file(old)
    assert status(old)["status"] == "healthy"


def test_a_copy_is_not_booted_onto_another_key_unless_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "tls").mkdir()
    with tls_store(tmp_path / "tls") as server:
        settings = {
            "SNAPSHOT_URL": server.url,
            "SNAPSHOT_COPY_INTERVAL": "0.2",
            "SNAPSHOT_TOKEN": "a-token-for-the-copy",
            "SSL_CERT_FILE": str(tmp_path / "tls" / "store.pem"),
        }
        nodes = []
        for name in ("old", "new"):
            (tmp_path / name).mkdir()
            nodes.append(GatewayProcess(tmp_path / name, **settings))
        old, new = nodes
        try:
            old.start()
            assert old.client().create(a_key(1)).status == 200
            known = public_key(old)

            def copied() -> bool:
                copy = status(old)["remote_copy"]
                return bool(copy["number"]) and copy["lag_records"] == 0

            wait_for(copied, 60, "the copy")
            assert old.stop() == 0
            file = Path(new.settings["WG_PRIVATE_KEY_FILE"])
            file.write_text(wggw.encode_key(wggw.make_private_key()))
            file.chmod(0o600)
            assert new.spawn().wait(120) == 2, new.text()
            assert known in new.text() and "SNAPSHOT_LINEAGE=" in new.text()
            assert not (tmp_path / "new" / "wireguard.db").exists()
            new.settings["SNAPSHOT_LINEAGE"] = (
                new.text().rpartition("SNAPSHOT_LINEAGE=")[2].split()[0]
            )
            new.start()
            assert known in json.dumps(status(new)["reasons"])
        finally:
            old.close()
            new.close()
