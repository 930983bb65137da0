"""64 clients at once: no address twice, store and interface agree, nothing fails but exhaustion."""

from __future__ import annotations

import collections
import ipaddress
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from harness import Answer, Client, a_key, running

CLIENTS = 64


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Client]]:
    """64 kept-alive connections to a gateway with room for 61 IPv4 peers: fewer than clients."""
    subnets = {"WG_IPV4_SUBNET": "10.8.0.0/26", "WG_IPV6_SUBNET": "fd00:8::/112"}
    with running(tmp_path_factory.mktemp("crowd"), **subnets) as gateway:
        clients = [gateway.client() for _ in range(CLIENTS)]
        yield clients
        for client in clients:
            client.close()


def at_once(clients: list[Client], work: Callable[[Client, int], Any]) -> list[Any]:
    """Run `work` in every client's thread, all released at the same moment."""
    barrier = threading.Barrier(len(clients))

    def run(number: int) -> Any:
        barrier.wait(60)
        return work(clients[number], number)

    with ThreadPoolExecutor(len(clients)) as pool:
        return list(pool.map(run, range(len(clients))))


def peers(client: Client) -> list[dict[str, Any]]:
    answer = client.send("GET", "/api/v1/configurations/?limit=1000")
    assert answer.status == 200
    found: list[dict[str, Any]] = answer.json["configurations"]
    return found


def check_agreement(client: Client) -> None:
    """No address twice, the pools count what the peers hold, the interface has nothing to mend."""
    rows = peers(client)
    usage = client.send("GET", "/api/v1/ip-usage").json
    for name, family in (("assigned_ip", "ipv4"), ("assigned_ipv6", "ipv6")):
        held = [row[name] for row in rows if row[name] is not None]
        assert len(set(held)) == len(held)
        assert usage[family]["used"] == len(held)
        assert sorted(usage[family]["assigned_ips"]) == sorted(held)
    synced = client.send("POST", "/api/v1/sync-ips").json
    assert [synced[name] for name in ("added", "updated", "removed")] == [0, 0, 0]
    assert synced["unchanged"] == sum(row["status"] == "active" for row in rows)


def clean(client: Client) -> None:
    for row in peers(client):
        assert client.delete(row["public_key"]).status == 200


def test_different_keys_get_different_addresses_until_none_is_left(crowd: list[Client]) -> None:
    def work(client: Client, number: int) -> Answer:
        return client.create(a_key(("different", number)), protocol="dual")

    answers = at_once(crowd, work)
    assert collections.Counter(a.status for a in answers) == {200: 61, 503: CLIENTS - 61}
    given = [ipaddress.ip_address(a.json["assigned_ip"]) for a in answers if a.status == 200]
    assert sorted(given) == [ipaddress.ip_address(f"10.8.0.{n}") for n in range(2, 63)]
    check_agreement(crowd[0])
    clean(crowd[0])


def test_one_key_from_all_sides_is_created_once(crowd: list[Client]) -> None:
    key = a_key("one")
    answers = at_once(crowd, lambda client, _: client.create(key, protocol="dual"))
    assert {a.status for a in answers} == {200}
    said = collections.Counter(a.json["status"] for a in answers)
    assert said == {"created": 1, "exists": CLIENTS - 1}
    assert len({(a.json["assigned_ip"], a.json["assigned_ipv6"]) for a in answers}) == 1
    check_agreement(crowd[0])
    clean(crowd[0])


def test_one_key_deleted_from_all_sides_is_deleted_once(crowd: list[Client]) -> None:
    key = a_key("doomed")
    crowd[0].create(key)
    answers = at_once(crowd, lambda client, _: client.delete(key))
    assert collections.Counter(a.status for a in answers) == {200: 1, 404: CLIENTS - 1}
    check_agreement(crowd[0])


def test_one_address_requested_from_all_sides_is_given_once(crowd: list[Client]) -> None:
    def work(client: Client, number: int) -> Answer:
        return client.create(a_key(("wants", number)), assigned_ip="10.8.0.40")

    answers = at_once(crowd, work)
    assert collections.Counter(a.status for a in answers) == {200: 1, 409: CLIENTS - 1}
    check_agreement(crowd[0])
    clean(crowd[0])


def life(client: Client, key: str, rounds: int) -> list[Answer]:
    """A peer's life, over and over; others may live it at the same time."""
    answers = []
    for turn in range(rounds):
        protocol = ("ipv4", "ipv6", "dual")[turn % 3]
        answers += [
            client.create(key, protocol=protocol),
            client.status(key, "suspended"),
            client.create(key),
            client.status(key, "active"),
            client.delete(key),
        ]
    return answers


def test_own_keys_lived_side_by_side_never_fail(crowd: list[Client]) -> None:
    """Each client alone with its key: every answer is foreseeable but for an exhausted pool."""
    some = crowd[:48]  # fewer than there are addresses
    answers = at_once(some, lambda client, n: life(client, a_key(("own", n)), 3))
    for mine in answers:
        assert [a.status for a in mine] == [200] * len(mine)
        said = [a.json["status"] for a in mine]
        assert said == ["created", "suspended", "exists", "updated", "deleted"] * 3
        for first, third in zip(mine[::5], mine[2::5], strict=True):
            assert first.json["assigned_ip"] == third.json["assigned_ip"]
    check_agreement(crowd[0])
    assert peers(crowd[0]) == []


def test_shared_keys_fought_over_leave_store_and_interface_in_agreement(
    crowd: list[Client],
) -> None:
    def work(client: Client, number: int) -> list[Answer]:
        return life(client, a_key(("shared", number % 5)), 3)

    answers = [answer for mine in at_once(crowd, work) for answer in mine]
    assert {a.status for a in answers} <= {200, 404}  # five keys exhaust nothing
    check_agreement(crowd[0])
    clean(crowd[0])
    check_agreement(crowd[0])


def test_sync_during_changes_touches_no_peer_that_is_right(crowd: list[Client]) -> None:
    """A dump that is older than a change must not undo it."""
    stop = threading.Event()
    results: list[dict[str, Any]] = []

    def work(client: Client, number: int) -> None:
        if number < 4:
            while not stop.is_set():
                results.append(client.send("POST", "/api/v1/sync-ips").json)
        else:
            life(client, a_key(("sync", number)), 4)
            finished.append(number)
            if len(finished) == 28:
                stop.set()

    finished: list[int] = []
    try:
        at_once(crowd[:32], work)
    finally:
        stop.set()
    assert results
    assert all(r["added"] == r["updated"] == r["removed"] == 0 for r in results), results
    check_agreement(crowd[0])
