"""An interface, and a database, have one gateway at a time; with its process, its claim ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import a_key, wait_for
from rig import (
    Gateway,
    Interface,
    check_interface,
    is_healthy,
    listed,
    memory_gateway,
    real_gateway,
    wait_healthy,
)

REFUSED = (1, 2, 3)  # the exit codes of a start that is refused


def another(directory: Path, first: Gateway, **settings: str) -> Gateway:
    """A gateway with all settings of the first, and files of its own."""
    directory.mkdir()
    mine = {
        "TLS_CERT": str(directory / "cert.pem"),
        "TLS_KEY": str(directory / "key.pem"),
        "DB_PATH": str(directory / "wireguard.db"),
    }
    shared = {k: v for k, v in first.settings.items() if k != "API_PORT"}
    return Gateway(directory, **{**shared, **mine, **settings})


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[tuple[Gateway, Interface]]:
    with real_gateway(tmp_path, SAMPLE_INTERVAL="0.5") as (gateway, interface):
        client = gateway.client()
        for number in range(3):
            assert client.create(a_key(number)).status == 200
        wait_healthy(client)
        yield gateway, interface


def check_refused(second: Gateway, names: str) -> None:
    try:
        code, said = second.refused_start()
        assert code in REFUSED, said
        assert names in said.splitlines()[-1], said
        assert "Traceback" not in said
    finally:
        second.close()


@pytest.mark.real
@pytest.mark.parametrize("same_key", [True, False], ids=["same key", "other key"])
def test_a_second_gateway_on_the_interface_is_refused(
    owner: tuple[Gateway, Interface], tmp_path: Path, same_key: bool
) -> None:
    gateway, interface = owner
    parts = ("peers", "private-key", "listen-port")
    before = {what: sorted(interface.show(what).split()) for what in parts}
    there = tmp_path / "second"
    key = gateway.settings["WG_PRIVATE_KEY_FILE"] if same_key else str(there / "privatekey")
    check_refused(another(there, gateway, WG_PRIVATE_KEY_FILE=key), interface.name)
    client = gateway.client()
    assert {what: sorted(interface.show(what).split()) for what in parts} == before
    assert is_healthy(client)
    assert client.create(a_key("after")).status == 200
    check_interface(client)
    # Not the claim of one that is gone, however it ended, either.
    for end in (gateway.kill, gateway.stop):
        end()
        gateway.start()
        client = gateway.client()
        check_interface(client)
        assert interface.peers() == set(listed(client))


@pytest.mark.real
def test_of_two_that_start_at_once_one_is_refused(
    owner: tuple[Gateway, Interface], tmp_path: Path
) -> None:
    """The first one was killed: both find the interface as it left it."""
    gateway, interface = owner
    client = gateway.client()
    there = listed(client)
    gateway.kill()
    second = another(tmp_path / "second", gateway, DB_PATH=gateway.settings["DB_PATH"])
    try:
        processes = [gateway.spawn(), second.spawn()]
        wait_for(lambda: any(process.poll() is not None for process in processes), what="a refusal")
        ended = [process.poll() is not None for process in processes]
        assert ended.count(True) == 1, [process.poll() for process in processes]
        loser, winner = (gateway, second) if ended[0] else (second, gateway)
        assert loser.process is not None and loser.process.poll() in REFUSED
        wait_for(winner.is_ready, what="readiness of the other")
        check_interface(winner.client())
        assert interface.peers() == set(there)
    finally:
        second.close()


@pytest.mark.parametrize("link", ["directory", "file"])
def test_a_database_has_one_owner_by_whatever_name(tmp_path: Path, link: str) -> None:
    first = tmp_path / "first"
    first.mkdir()
    with memory_gateway(first) as gateway:
        client = gateway.client()
        assert client.create(a_key(1)).status == 200
        name = tmp_path / "link"
        if link == "directory":
            name.symlink_to(first)
            path = name / "wireguard.db"
        else:
            name.mkdir()
            path = name / "wireguard.db"
            for suffix in ("", ".journal"):
                source, target = f"{gateway.database}{suffix}", f"{path}{suffix}"
                os.symlink(source, target)
        second = another(tmp_path / "second", gateway, DB_PATH=str(path))
        check_refused(second, "wireguard.db")
        assert client.create(a_key(2)).status == 200
        gateway.kill()
        gateway.start()
        assert set(listed(gateway.client())) == {a_key(1), a_key(2)}


def test_a_database_behind_a_link_is_replaced_where_it_is(tmp_path: Path) -> None:
    """A snapshot by one name and the journal by the other would be two halves of nothing."""
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.mkdir()
    (link / "wireguard.db").symlink_to(real / "wireguard.db")
    first = {"DB_PATH": str(link / "wireguard.db"), "SNAPSHOT_INTERVAL": "0.1"}
    with memory_gateway(tmp_path, **first) as gateway:
        client = gateway.client()
        for number in range(3):
            assert client.create(a_key(number)).status == 200
        gateway.stop()
        assert (link / "wireguard.db").is_symlink()
        gateway.start()
        assert gateway.client().create(a_key(3)).status == 200
        gateway.kill()
        gateway.start()
        assert set(listed(gateway.client())) == {a_key(number) for number in range(4)}
        gateway.kill()
    with memory_gateway(tmp_path, DB_PATH=str(real / "wireguard.db")) as gateway:
        assert set(listed(gateway.client())) == {a_key(number) for number in range(4)}
