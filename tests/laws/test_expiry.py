"""What has expired is off the interface within a second, however many end in the same one."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from harness import LONG, Client, a_key, wait_for
from rig import (
    PEERS,
    Reads,
    check_interface,
    check_pool,
    fill,
    listed,
    memory_gateway,
    quiet_reads,
    real_gateway,
    restarted,
    rfc3339,
    whole_second,
)

MANY = 10_000 if LONG else 2_000
WITHIN = 1.0  # seconds
BUSY = 4.0  # seconds that the machine may do other things meanwhile: one message a peer took 6


def until_expiry(client: Client, many: int) -> tuple[int, list[str]]:
    """Peers of which most end in one second, and some do not; both as they will be."""
    stay = [a_key(("stays", number)) for number in range(20)]
    go = [a_key(("goes", number)) for number in range(many)]
    fill(client, [*stay, *go])
    # To make them is what takes long, and is done. The second is one that they do not miss.
    for ahead in (1, 2, 4, 8, 16):
        end = whole_second(ahead)
        ends = {"expires_at": rfc3339(end), "status": "active"}
        elements = [{"public_key": key, **ends} for key in go]
        answer = client.send("PUT", PEERS, [*({"public_key": key} for key in stay), *elements])
        assert answer.status == 200, answer
        if time.time() < end - 0.5:  # there is time to see it come
            break
    return end, stay


def active(client: Client) -> int:
    page = client.send("GET", f"{PEERS}?status=active&limit=100").json
    return len(page["configurations"])


def check_expired(client: Client, end: int, stay: list[str]) -> None:
    found = listed(client)
    assert {key for key, row in found.items() if row["status"] == "active"} == set(stay)
    gone = [row for key, row in found.items() if key not in stay]
    assert {(row["status"], row["status_reason"]) for row in gone} == {("suspended", "expired")}


@pytest.mark.long
def test_many_at_once_in_memory(tmp_path: Path) -> None:
    with memory_gateway(tmp_path) as gateway:
        client = gateway.client()
        end, stay = until_expiry(client, MANY)
        wait_for(lambda: active(client) == len(stay), 60, "the end of the others")
        took = time.time() - end
        assert took < WITHIN + BUSY, f"{MANY} peers were suspended after {took:.2f} s"
        check_expired(client, end, stay)
        client = restarted(gateway)
        check_expired(client, end, stay)
        check_interface(client)
        check_pool(client)


@pytest.mark.real
def test_many_at_once_on_wireguard(tmp_path: Path) -> None:
    with real_gateway(tmp_path) as (gateway, interface):
        client = gateway.client()
        with quiet_reads(tmp_path / "quiet", lambda c: c.get(a_key("is there"))) as quiet:
            end, stay = until_expiry(client, MANY)
            with Reads(gateway, lambda c: c.get(stay[0])) as reads:
                assert time.time() > end - 0.1 or len(interface.peers()) == MANY + len(stay)
                wait_for(lambda: active(client) == len(stay), 60, "the end of the others")
                took = time.time() - end
        assert interface.peers() == set(stay), "suspended, and still on the interface"
        assert took < WITHIN + BUSY, f"{MANY} peers were off the interface after {took:.2f} s"
        reads.check(0.2, 3.0, quiet)  # nobody waits for all of them
        check_expired(client, end, stay)
        check_interface(client)
