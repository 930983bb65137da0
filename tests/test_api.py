"""The API of the contract, over TLS, against a gateway with the memory backend.

One gateway serves the whole module, so every test makes peers with keys of its own. Small subnets
have gateways of their own.
"""

from __future__ import annotations

import base64
import configparser
import itertools
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from harness import (
    API_KEY,
    Answer,
    Client,
    GatewayProcess,
    a_key,
    encode,
    path_key,
    running,
    sign,
    wait_for,
)

PEERS = "/api/v1/configurations/"
SHARED_SECRET = "tqgwn3SOq4m1mS0xk1Vf3u0Zb5mY8i0h3nq7m1T2d0A="
METRICS_TOKEN = "a-token-for-the-metrics"
SHARED_SETTINGS = {
    "WG_IPV4_SUBNET": "10.9.0.0/16",  # with room for every test's peers
    "WG_EXTRA_PORTS": "53,443",
    "WG_ENDPOINT": "vpn.example.com",
    "GATEWAY_PUBLIC_KEY": SHARED_SECRET,
    "METRICS_TOKEN": METRICS_TOKEN,
}
NUMBERS = itertools.count()

# The contract's field list, sorted apart from what only an answer to create has.
CONFIGURATION = {
    "public_key", "status", "assigned_ip", "assigned_ipv6", "tunnel_traffic", "allowed_ips", "dns",
    "port", "interface", "server_public_key", "endpoint", "mtu", "persistent_keepalive",
    "expires_at", "quota_bytes", "created_at", "request_id", "obfuscation", "online",
    "last_handshake", "rx_bytes", "tx_bytes",
}  # fmt: skip


def fresh() -> str:
    """A key that no other test uses."""
    return a_key(("api", next(NUMBERS)))


@pytest.fixture(scope="module")
def api(shared: GatewayProcess) -> Iterator[Client]:
    connection = shared.client()
    yield connection
    connection.close()


def check_problem(answer: Answer, status: int) -> str:
    """The answer is an RFC 9457 problem of this status; returns its detail."""
    assert answer.status == status, answer
    assert answer.headers["Content-Type"] == "application/problem+json"
    problem = answer.json
    assert set(problem) == {"type", "title", "status", "detail"}
    assert problem["status"] == status
    for name in ("type", "title", "detail"):
        assert isinstance(problem[name], str) and problem[name]
    detail: str = problem["detail"]
    return detail


def known_keys(client: Client, **query: str) -> list[str]:
    """The keys of the whole list, page by page."""
    keys: list[str] = []
    cursor: str | None = None
    while True:
        extra = "".join(f"&{name}={value}" for name, value in query.items())
        page = client.send("GET", f"{PEERS}?limit=7{extra}{f'&cursor={cursor}' if cursor else ''}")
        assert page.status == 200, page
        keys += [entry["public_key"] for entry in page.json["configurations"]]
        cursor = page.json["next_cursor"]
        if cursor is None:
            return keys


# --- create --------------------------------------------------------------------------------------


def test_second_create_returns_the_same_addresses(client: Client) -> None:
    first = client.create(a_key(1), protocol="dual").json
    second = client.create(a_key(1), protocol="ipv4").json
    assert (first["status"], second["status"]) == ("created", "exists")
    assert first["assigned_ip"] == second["assigned_ip"] == "10.0.1.2"
    assert first["assigned_ipv6"] == second["assigned_ipv6"] == "fd42:4242:1::2"


def test_create_answers_with_the_whole_configuration(api: Client) -> None:
    key, started = fresh(), int(time.time())
    answer = api.create(key, protocol="dual", request_id="r-1")
    assert answer.status == 200 and answer.headers["Content-Type"] == "application/json"
    made = answer.json
    assert set(made) >= CONFIGURATION | {"peer_status"}
    assert (made["status"], made["peer_status"]) == ("created", "active")
    assert made["public_key"] == key and made["request_id"] == "r-1"
    assert made["allowed_ips"] == ["0.0.0.0/0", "::/0"]
    assert (made["dns"], made["port"], made["interface"]) == ("d1", 51820, "wg0")
    assert made["endpoint"] == "vpn.example.com:51820"
    assert (made["mtu"], made["persistent_keepalive"]) == (1420, 25)
    assert len(base64.b64decode(made["server_public_key"], validate=True)) == 32
    assert (made["expires_at"], made["quota_bytes"], made["obfuscation"]) == (None, None, None)
    assert (made["online"], made["last_handshake"]) == (False, None)
    assert (made["rx_bytes"], made["tx_bytes"]) == (0, 0)
    created = datetime.fromisoformat(made["created_at"]).timestamp()
    assert started <= created <= time.time()


def test_the_configuration_is_the_same_when_read_as_when_created(api: Client) -> None:
    key = fresh()
    made = api.create(key, protocol="dual", quota_bytes=5, expires_at="2999-01-02T03:04:05Z").json
    read = api.get(key).json
    made["status"] = made.pop("peer_status")
    assert read == made
    assert set(read) >= CONFIGURATION and "peer_status" not in read


def test_a_suspended_peer_is_told_as_such_by_create(api: Client) -> None:
    key = fresh()
    api.create(key)
    api.status(key, "suspended")
    again = api.create(key).json
    assert (again["status"], again["peer_status"]) == ("exists", "suspended")


@pytest.mark.parametrize("path", [PEERS, PEERS.rstrip("/")])
def test_create_with_and_without_trailing_slash(api: Client, path: str) -> None:
    assert api.send("POST", path, {"public_key": fresh()}).json["status"] == "created"


PROTOCOLS: list[tuple[Any, Any, list[str], list[str]]] = [
    # protocol, tunnel_traffic -> families with an address, tunnel_traffic in the answer
    (None, None, ["ipv4"], ["ipv4"]),
    (None, [], ["ipv4"], ["ipv4"]),
    (None, ["ipv4"], ["ipv4"], ["ipv4"]),
    (None, ["ipv6"], ["ipv6"], ["ipv6"]),
    (None, ["ipv6", "ipv4"], ["ipv4", "ipv6"], ["ipv4", "ipv6"]),
    ("ipv4", None, ["ipv4"], ["ipv4"]),
    ("ipv4", ["ipv4"], ["ipv4"], ["ipv4"]),
    ("ipv4", ["ipv6"], ["ipv4", "ipv6"], ["ipv6"]),
    ("ipv4", ["ipv4", "ipv6"], ["ipv4", "ipv6"], ["ipv4", "ipv6"]),
    ("ipv6", None, ["ipv6"], ["ipv6"]),
    ("ipv6", ["ipv4"], ["ipv4", "ipv6"], ["ipv4"]),
    ("ipv6", ["ipv6"], ["ipv6"], ["ipv6"]),
    ("ipv6", ["ipv4", "ipv6"], ["ipv4", "ipv6"], ["ipv4", "ipv6"]),
    ("dual", None, ["ipv4", "ipv6"], ["ipv4", "ipv6"]),
    ("dual", ["ipv4"], ["ipv4", "ipv6"], ["ipv4"]),
    ("dual", ["ipv6"], ["ipv4", "ipv6"], ["ipv6"]),
    ("dual", ["ipv4", "ipv6"], ["ipv4", "ipv6"], ["ipv4", "ipv6"]),
]
EVERYWHERE = {"ipv4": "0.0.0.0/0", "ipv6": "::/0"}


@pytest.mark.parametrize(("protocol", "traffic", "families", "answered"), PROTOCOLS)
def test_every_named_family_gets_an_address(
    api: Client, protocol: Any, traffic: Any, families: list[str], answered: list[str]
) -> None:
    key = fresh()
    made = api.create(key, protocol=protocol, tunnel_traffic=traffic).json
    assert made["status"] == "created", made
    assert made["tunnel_traffic"] == answered
    assert made["allowed_ips"] == [EVERYWHERE[family] for family in answered]
    assert (made["assigned_ip"] is not None) == ("ipv4" in families)
    # Existing backends expect the IPv6 address to be left out here, and null everywhere else.
    assert ("assigned_ipv6" in made) == ("ipv6" in families)
    assert (api.get(key).json["assigned_ipv6"] is not None) == ("ipv6" in families)


# field -> values with what the configuration then shows (None: the same value)
GOOD: list[tuple[str, Any, Any]] = [
    ("request_id", "", None),
    ("request_id", "café ✓", None),
    ("request_id", "x" * 256, None),
    ("port", 53, None),
    ("port", 443, None),
    ("port", 51820, None),
    ("dns", "d2", None),
    ("persistent_keepalive", 0, None),
    ("persistent_keepalive", 65535, None),
    ("quota_bytes", 0, None),
    ("quota_bytes", 2**63 - 1, None),
    ("expires_at", "2999-12-31T23:59:59Z", None),
    ("expires_at", "2999-12-31t23:59:59.75+02:00", "2999-12-31T21:59:59Z"),
    ("assigned_ip", "10.9.200.1", None),
    ("obfuscation", {"enabled": False}, "null"),
    ("obfuscation", False, "null"),
    ("not_a_field", {"of": ["ours"]}, "absent"),
]


@pytest.mark.parametrize(("name", "value", "shown"), GOOD)
def test_a_good_value_is_taken(api: Client, name: str, value: Any, shown: Any) -> None:
    key = fresh()
    answer = api.create(key, **{name: value})
    assert answer.status == 200 and answer.json["status"] == "created", answer
    read = api.get(key).json
    if shown == "absent":
        assert name not in read
    elif shown == "null":
        assert read[name] is None
    else:
        assert read[name] == (value if shown is None else shown)


def test_a_requested_ipv6_address_is_honoured_in_any_spelling(api: Client) -> None:
    key = fresh()
    asked = "FD42:4242:0001:0:0:0:00aa:0001"
    made = api.create(key, protocol="ipv6", assigned_ipv6=asked).json
    assert made["assigned_ipv6"] == "fd42:4242:1::aa:1"


def test_a_preshared_key_reaches_the_clients_file_and_no_json(api: Client) -> None:
    key, psk = fresh(), a_key("psk")
    made = api.create(key, preshared_key=psk)
    assert made.status == 200
    assert psk not in made.body.decode() and psk not in api.get(key).body.decode()
    assert f"PresharedKey = {psk}\n" in api.get(key, "?format=wg-quick").body.decode()


OPTIONAL = [
    "request_id", "protocol", "tunnel_traffic", "port", "dns", "preshared_key",
    "persistent_keepalive", "expires_at", "quota_bytes", "assigned_ip", "assigned_ipv6",
    "obfuscation", "encrypted_payload",
]  # fmt: skip


@pytest.mark.parametrize("name", OPTIONAL)
def test_null_is_as_good_as_absent(api: Client, name: str) -> None:
    made = api.create(fresh(), **{name: None}).json
    plain = api.create(fresh()).json
    differ = {n for n in CONFIGURATION - {"assigned_ipv6"} if made[n] != plain[n]}
    assert differ <= {"public_key", "assigned_ip", "created_at"}


BAD: list[tuple[str, Any]] = [
    ("public_key", None),
    ("public_key", 1),
    ("public_key", ""),
    ("public_key", "A" * 43),  # without the final =
    ("public_key", "A" * 43 + "="),  # the zero key, which no peer has
    ("public_key", "AA==" * 11),
    ("public_key", base64.b64encode(bytes(range(33))).decode()),
    ("public_key", base64.b64encode(bytes(range(31))).decode() + "    "),
    ("public_key", "_" * 43 + "="),  # the path's alphabet is not the body's
    ("public_key", a_key(1)[:-2] + "B="),  # bits behind the last byte: not canonical
    ("public_key", a_key(1) + "\n"),
    ("public_key", "é" * 44),
    ("request_id", 5),
    ("request_id", "x" * 257),
    ("request_id", "\ud800"),
    ("protocol", "IPv4"),
    ("protocol", "ipv5"),
    ("protocol", ""),
    ("protocol", ["ipv4"]),
    ("tunnel_traffic", "ipv4"),
    ("tunnel_traffic", ["ipv4", "ipv5"]),
    ("tunnel_traffic", [["ipv4"]]),
    ("tunnel_traffic", {"ipv4": True}),
    ("port", 0),
    ("port", 65536),
    ("port", 51821),
    ("port", "51820"),
    ("port", 51820.0),
    ("port", True),
    ("dns", "d9"),
    ("dns", 1),
    ("dns", ""),
    ("preshared_key", "x"),
    ("preshared_key", 7),
    ("persistent_keepalive", -1),
    ("persistent_keepalive", 65536),
    ("persistent_keepalive", "25"),
    ("persistent_keepalive", False),
    ("expires_at", "2999-01-01"),
    ("expires_at", "2999-01-01T00:00:00"),
    ("expires_at", "2999-02-30T00:00:00Z"),
    ("expires_at", "2999-01-01T25:00:00Z"),
    ("expires_at", "2999-01-01T00:00:00+99:99"),
    ("expires_at", "0000-01-01T00:00:00Z"),
    ("expires_at", "9999-12-31T23:59:59-12:00"),
    ("expires_at", "2001-01-01T00:00:00Z"),  # in the past
    ("expires_at", 4102444800),
    ("quota_bytes", -1),
    ("quota_bytes", 2**63),
    ("quota_bytes", 10**400),
    ("quota_bytes", 1.5),
    ("quota_bytes", "1"),
    ("assigned_ip", "10.9.0.300"),
    ("assigned_ip", "010.9.0.5"),
    ("assigned_ip", "10.9.0.5/32"),
    ("assigned_ip", "fd42::1"),
    ("assigned_ip", 168361989),
    ("assigned_ipv6", "10.9.0.5"),
    ("assigned_ipv6", "fd42:4242:1::5%eth0"),
    ("assigned_ipv6", "fd42:::5"),
    ("obfuscation", "yes"),
    ("obfuscation", {"enabled": 1}),
    ("obfuscation", []),
    ("encrypted_payload", 5),
    ("encrypted_payload", {}),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_a_422_that_names_the_field(api: Client, name: str, value: Any) -> None:
    key = fresh()
    fields = {"public_key": key, name: value}
    detail = check_problem(api.send("POST", PEERS, fields), 422)
    assert re.match(rf"{name}\b", detail), detail
    assert api.get(key).status == 404


TAKEN_ADDRESSES = [
    ("assigned_ip", "10.9.0.0", "the network's own"),
    ("assigned_ip", "10.9.0.1", "the gateway's own"),
    ("assigned_ip", "10.9.255.255", "for broadcast"),
    ("assigned_ip", "10.10.0.2", "outside of"),
    ("assigned_ip", "0.0.0.0", "outside of"),
    ("assigned_ipv6", "fd42:4242:1::", "the network's own"),
    ("assigned_ipv6", "fd42:4242:1::1", "the gateway's own"),
    ("assigned_ipv6", "fd42:4242:2::5", "outside of"),
    ("assigned_ipv6", "::ffff:10.9.0.9", "outside of"),
]


@pytest.mark.parametrize(("name", "address", "why"), TAKEN_ADDRESSES)
def test_an_address_that_no_peer_may_have_is_a_409_that_says_why(
    api: Client, name: str, address: str, why: str
) -> None:
    key = fresh()
    detail = check_problem(api.create(key, protocol="dual", **{name: address}), 409)
    subnet = {
        "assigned_ip": "WG_IPV4_SUBNET 10.9.0.0/16",
        "assigned_ipv6": "WG_IPV6_SUBNET fd42:4242:1::/64",
    }[name]
    assert detail.startswith(f"{name}: the address is ") and why in detail and subnet in detail
    assert address not in detail.replace(subnet, "")
    assert api.get(key).status == 404


def test_a_requested_address_in_use_is_a_409_and_takes_no_other(api: Client) -> None:
    api.create(fresh(), assigned_ip="10.9.201.1")
    before = usage(api)
    key = fresh()
    answer = api.create(key, protocol="dual", assigned_ip="10.9.201.1")
    assert "assigned_ip" in check_problem(answer, 409)
    assert usage(api) == before and api.get(key).status == 404


def test_a_suspended_peers_address_cannot_be_requested(api: Client) -> None:
    holder = fresh()
    api.create(holder, assigned_ip="10.9.201.2")
    api.status(holder, "suspended")
    check_problem(api.create(fresh(), assigned_ip="10.9.201.2"), 409)
    api.delete(holder)
    assert api.create(fresh(), assigned_ip="10.9.201.2").status == 200


def test_the_gateways_own_key_is_a_conflict(api: Client) -> None:
    own = api.create(fresh()).json["server_public_key"]
    assert "public_key" in check_problem(api.create(own), 409)


# --- small subnets -------------------------------------------------------------------------------


def usage(client: Client) -> Any:
    answer = client.send("GET", "/api/v1/ip-usage")
    assert answer.status == 200
    return answer.json


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Client]:
    """Five IPv4 addresses for peers, and 65,534 IPv6 ones."""
    subnets = {"WG_IPV4_SUBNET": "10.7.0.8/29", "WG_IPV6_SUBNET": "fd00:7::/112"}
    with running(tmp_path, **subnets) as process:
        yield process.client()


def test_exhaustion_is_a_503_that_changes_nothing(small: Client) -> None:
    for number, expected in enumerate(range(10, 15)):
        assert small.create(a_key(number)).json["assigned_ip"] == f"10.7.0.{expected}"
    before = usage(small)
    assert before["ipv4"] == {
        "total": 5,
        "used": 5,
        "available": 0,
        "gateway_ip": "10.7.0.9",
        "assigned_ips": [f"10.7.0.{n}" for n in range(10, 15)],
    }
    assert "ipv4" in check_problem(small.create(a_key(5)), 503)
    # Only one of two families is exhausted: the other one keeps its address, too.
    check_problem(small.create(a_key(5), protocol="dual"), 503)
    assert usage(small) == before
    assert small.get(a_key(5)).status == 404
    # A family that has room still serves, with the address that the refused peer did not get.
    assert small.create(a_key(6), protocol="ipv6").json["assigned_ipv6"] == "fd00:7::2"
    # An existing peer is still found.
    assert small.create(a_key(0)).json["status"] == "exists"


def test_released_addresses_come_back_oldest_first(small: Client) -> None:
    for number in range(5):
        small.create(a_key(number))
    for number in (3, 0, 4):
        assert small.delete(a_key(number)).json == {"status": "deleted"}
    given = [small.create(a_key(number)).json["assigned_ip"] for number in (10, 11, 12)]
    assert given == ["10.7.0.13", "10.7.0.10", "10.7.0.14"]


def test_a_suspended_peer_keeps_its_address_when_all_others_are_gone(small: Client) -> None:
    for number in range(5):
        small.create(a_key(number))
    assert small.status(a_key(2), "suspended").json == {"status": "suspended"}
    check_problem(small.create(a_key(9)), 503)
    assert small.status(a_key(2), "active").json == {"status": "updated"}
    assert small.get(a_key(2)).json["assigned_ip"] == "10.7.0.12"


ONE_FAMILY: list[tuple[dict[str, Any], str]] = [
    ({"protocol": "ipv6"}, "protocol"),
    ({"protocol": "dual"}, "protocol"),
    ({"tunnel_traffic": ["ipv6"]}, "tunnel_traffic"),
    ({"tunnel_traffic": ["ipv4", "ipv6"]}, "tunnel_traffic"),
    ({"protocol": "ipv4", "tunnel_traffic": ["ipv6"]}, "tunnel_traffic"),
    ({"assigned_ipv6": "fd00::2"}, "assigned_ipv6"),
]


def test_a_family_that_the_interface_has_not_is_a_422(tmp_path: Path) -> None:
    with running(tmp_path, WG_IPV6_SUBNET="") as process:
        client = process.client()
        for fields, name in ONE_FAMILY:
            detail = check_problem(client.create(a_key(1), **fields), 422)
            assert detail.startswith(name), (fields, detail)
        assert client.create(a_key(1)).json["assigned_ip"] == "10.0.1.2"
        assert usage(client)["ipv6"] == {
            "total": 0,
            "used": 0,
            "available": 0,
            "gateway_ip": None,
            "assigned_ips": [],
        }


# --- keys in paths -------------------------------------------------------------------------------

# A key with both characters that need care: its base64 begins with "+/+/".
AWKWARD = base64.b64encode(b"\xfb\xff\xbf" * 10 + b"\xfb\xff").decode()

# Two of the forms; all of them, without a gateway: test_http.py.
FORMS: dict[str, Callable[[str], str]] = {
    "url-safe without the final =": lambda key: path_key(key).rstrip("="),
    "percent": lambda k: k.replace("/", "%2F").replace("+", "%2B").replace("=", "%3D"),
}


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_a_key_in_a_path_works_in_every_form(
    api: Client, form: Callable[[str], str], slash: str
) -> None:
    assert "/" in AWKWARD and "+" in AWKWARD
    assert api.create(AWKWARD).status == 200
    one = f"{PEERS}{form(AWKWARD)}"
    assert api.send("GET", one + slash).json["public_key"] == AWKWARD
    suspended = api.send("PUT", f"{one}/status{slash}", {"status": "suspended"})
    assert suspended.json == {"status": "suspended"}
    assert api.send("DELETE", one + slash).json == {"status": "deleted"}
    assert api.get(AWKWARD).status == 404


@pytest.mark.parametrize(
    "segment",
    ["x", "=", "%", "%zz", "A" * 42, "A" * 45, "%00" * 44, "%C3%A9" * 44, "..", "null", "a" * 4000],
)
def test_a_path_without_a_key_is_a_404(api: Client, segment: str) -> None:
    for method, path in (("GET", segment), ("DELETE", segment), ("PUT", segment + "/status")):
        body = {"status": "active"} if method == "PUT" else None
        check_problem(api.send(method, PEERS + path, body), 404)


@pytest.mark.parametrize("method", ["GET", "DELETE", "PUT"])
def test_an_unknown_key_is_a_404(api: Client, method: str) -> None:
    path = PEERS + path_key(fresh()) + ("/status" if method == "PUT" else "")
    check_problem(api.send(method, path, {"status": "active"} if method == "PUT" else None), 404)


# --- read and list -------------------------------------------------------------------------------


def test_the_list_shows_every_peer_once_in_pages(api: Client) -> None:
    mine = [fresh() for _ in range(25)]
    for key in mine:
        assert api.create(key).status == 200
    listed = known_keys(api)
    assert len(set(listed)) == len(listed)
    assert [key for key in listed if key in set(mine)] == mine


def test_the_list_is_stable_while_peers_are_created_and_deleted(api: Client) -> None:
    """Whoever is there from the first page to the last is listed exactly once."""
    stay = [fresh() for _ in range(12)]
    go = [fresh() for _ in range(12)]
    for pair in zip(stay, go, strict=True):
        for key in pair:
            api.create(key)
    seen: list[str] = []
    cursor, doomed = "", iter(go)
    while cursor is not None:
        page = api.send("GET", f"{PEERS}?limit=3{f'&cursor={cursor}' if cursor else ''}").json
        seen += [entry["public_key"] for entry in page["configurations"]]
        assert len(page["configurations"]) <= 3
        cursor = page["next_cursor"]
        if (victim := next(doomed, None)) is not None:
            api.delete(victim)
        api.create(fresh())
        assert len(seen) < 2000, "the list does not come to its end"
    assert [key for key in seen if key in set(stay)] == stay
    assert len(set(seen)) == len(seen)


def test_a_listed_peer_looks_like_a_read_one(api: Client) -> None:
    key = fresh()
    api.create(key, protocol="ipv4")
    page = api.send("GET", f"{PEERS}?limit=1000").json
    assert set(page) == {"configurations", "next_cursor"} and page["next_cursor"] is None
    (entry,) = [row for row in page["configurations"] if row["public_key"] == key]
    assert entry == api.get(key).json
    assert entry["assigned_ipv6"] is None


def test_the_list_filters(api: Client) -> None:
    asleep, awake = fresh(), fresh()
    api.create(asleep)
    api.create(awake)
    api.status(asleep, "suspended")
    assert asleep in known_keys(api, status="suspended")
    assert awake not in known_keys(api, status="suspended")
    assert awake in known_keys(api, status="active") and asleep not in known_keys(
        api, status="active"
    )
    assert known_keys(api, online="true") == []  # without an interface nobody shakes hands
    assert {asleep, awake} <= set(known_keys(api, online="false"))
    assert known_keys(api, interface="wg0") == known_keys(api)


BAD_QUERIES = [
    ("limit=0", "limit"), ("limit=1001", "limit"), ("limit=-1", "limit"), ("limit=x", "limit"),
    ("limit=", "limit"), ("limit=1e2", "limit"), ("limit=%D9%A1", "limit"),
    ("status=gone", "status"), ("online=yes", "online"), ("interface=wg9", "interface"),
    ("cursor=x", "cursor"), ("cursor=%00", "cursor"), ("cursor=", "cursor"),
    ("cursor=%C3%A9", "cursor"),
]  # fmt: skip


@pytest.mark.parametrize(("query", "name"), BAD_QUERIES)
def test_a_bad_query_value_is_a_422_that_names_it(api: Client, query: str, name: str) -> None:
    assert check_problem(api.send("GET", f"{PEERS}?{query}"), 422).startswith(name)


def parse_wg_quick(text: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(delimiters=("=",), strict=True, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text)
    return parser


def test_wg_quick_text_is_a_complete_client_configuration(api: Client, tmp_path: Path) -> None:
    key, psk = fresh(), a_key("psk")
    made = api.create(
        key, protocol="dual", preshared_key=psk, persistent_keepalive=21, port=443, dns="d3"
    ).json
    answer = api.get(key, "?format=wg-quick")
    assert answer.status == 200 and answer.headers["Content-Type"].startswith("text/plain")
    parsed = parse_wg_quick(answer.body.decode())
    assert parsed.sections() == ["Interface", "Peer"]
    interface = dict(parsed["Interface"])
    # A private key's place, and not a key: the client's never leaves the client.
    with pytest.raises(ValueError):
        base64.b64decode(interface.pop("PrivateKey"), validate=True)
    assert interface == {
        "Address": f"{made['assigned_ip']}/32, {made['assigned_ipv6']}/128",
        "DNS": "9.9.9.9",
        "MTU": "1420",
    }
    assert dict(parsed["Peer"]) == {
        "PublicKey": made["server_public_key"],
        "PresharedKey": psk,
        "AllowedIPs": "0.0.0.0/0, ::/0",
        "Endpoint": "vpn.example.com:443",
        "PersistentKeepalive": "21",
    }


@pytest.mark.skipif(
    shutil.which("wg-quick") is None or os.geteuid() != 0, reason="needs wg-quick and root"
)
def test_wg_quick_itself_accepts_the_text(api: Client, tmp_path: Path) -> None:
    key = fresh()
    api.create(key, protocol="dual", preshared_key=a_key("psk"))
    file = tmp_path / "client.conf"
    file.write_bytes(api.get(key, "?format=wg-quick").body)
    file.chmod(0o600)
    stripped = subprocess.run(
        ["wg-quick", "strip", str(file)], capture_output=True, text=True, check=True, timeout=60
    )
    left = parse_wg_quick(stripped.stdout)
    assert set(left["Interface"]) == {"PrivateKey"}  # all the rest is wg-quick's own and known
    assert set(left["Peer"]) == {
        "PublicKey", "PresharedKey", "AllowedIPs", "Endpoint", "PersistentKeepalive",
    }  # fmt: skip


def test_an_unknown_format_is_a_422(api: Client) -> None:
    key = fresh()
    api.create(key)
    assert check_problem(api.get(key, "?format=toml"), 422).startswith("format")


# --- status, delete ------------------------------------------------------------------------------


def test_suspend_and_activate_keep_the_addresses(api: Client) -> None:
    key = fresh()
    made = api.create(key, protocol="dual").json
    for status, said in (("suspended", "suspended"), ("active", "updated")) * 2:
        for _ in range(2):  # what is so already is as good as done
            answer = api.status(key, status)
            assert (answer.status, answer.json) == (200, {"status": said})
        read = api.get(key).json
        assert read["status"] == status
        assert read["assigned_ip"] == made["assigned_ip"]
        assert read["assigned_ipv6"] == made["assigned_ipv6"]


@pytest.mark.parametrize("value", [None, "deleted", "Active", "", 1, True, ["active"], {}])
def test_a_bad_status_is_a_422_and_changes_nothing(api: Client, value: Any) -> None:
    key = fresh()
    api.create(key)
    detail = check_problem(
        api.send("PUT", f"{PEERS}{path_key(key)}/status", {"status": value}), 422
    )
    assert detail.startswith("status")
    assert api.get(key).json["status"] == "active"


def test_delete_frees_the_key_and_a_second_one_is_a_404(api: Client) -> None:
    key = fresh()
    api.create(key)
    assert api.delete(key).json == {"status": "deleted"}
    check_problem(api.delete(key), 404)
    assert api.create(key).json["status"] == "created"


# --- the server's own ----------------------------------------------------------------------------


def test_ip_usage_counts_what_is_held(api: Client) -> None:
    before = usage(api)
    made = api.create(fresh(), protocol="dual").json
    after = usage(api)
    for family, total, gateway, address in (
        ("ipv4", 2**16 - 3, "10.9.0.1", made["assigned_ip"]),
        ("ipv6", 2**64 - 2, "fd42:4242:1::1", made["assigned_ipv6"]),
    ):
        row = after[family]
        assert set(row) == {"total", "used", "available", "gateway_ip", "assigned_ips"}
        assert (row["total"], row["gateway_ip"]) == (total, gateway)
        assert row["used"] == before[family]["used"] + 1 == len(row["assigned_ips"])
        assert row["available"] == row["total"] - row["used"]
        assert set(row["assigned_ips"]) - set(before[family]["assigned_ips"]) == {address}


def test_sync_finds_nothing_to_repair(api: Client) -> None:
    api.create(fresh())
    answer = api.send("POST", "/api/v1/sync-ips")
    assert answer.status == 200 and answer.json["status"] == "synced"
    assert [answer.json[n] for n in ("added", "updated", "removed")] == [0, 0, 0]
    assert answer.json["unchanged"] == len(known_keys(api, status="active"))


def test_server_status(api: Client) -> None:
    started = int(time.time())
    answer = api.send("GET", "/api/v1/server/status").json
    assert answer["status"] == "healthy"
    assert answer["wireguard_peers"] == 0  # online: none without an interface
    assert answer["total_peers"] == len(known_keys(api))
    assert 0 < answer["memory_usage"] < 100
    assert isinstance(answer["load_average"], (int, float))
    assert started <= datetime.fromisoformat(answer["timestamp"]).timestamp() <= time.time()


def test_server_metrics(api: Client) -> None:
    answer = api.send("GET", "/api/v1/server/metrics").json
    assert set(answer) == {"system", "wireguard", "timestamp"}
    assert set(answer["system"]) == {"cpu_percent", "memory", "disk", "load_average"}
    assert {"active_peers", "total_peers", "ip_usage", "last_handshakes"} <= set(
        answer["wireguard"]
    )
    assert answer["wireguard"]["total_peers"] == len(known_keys(api))
    assert answer["wireguard"]["active_peers"] == len(known_keys(api, status="active"))
    assert set(answer["wireguard"]["ip_usage"]) == {"ipv4", "ipv6"}


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_health_needs_no_signature(api: Client, path: str) -> None:
    for form in (path, path + "/"):
        answer = api.raw("GET", form, b"", {})
        assert answer.status == 200 and isinstance(answer.json["status"], str)


def test_prometheus_text_needs_its_token(api: Client) -> None:
    check_problem(api.raw("GET", "/metrics", b"", {}), 401)
    check_problem(api.raw("GET", "/metrics", b"", {"Authorization": "Bearer wrong"}), 401)
    check_problem(api.send("GET", "/metrics"), 401)  # a signature is no token
    other = {"Authorization": f"Bearer {METRICS_TOKEN.upper()}"}
    check_problem(api.raw("GET", "/metrics", b"", other), 401)
    for scheme in ("bearer", "BEARER", "Bearer"):
        answer = api.raw("GET", "/metrics", b"", {"Authorization": f"{scheme} {METRICS_TOKEN}"})
        assert answer.status == 200
    assert answer.headers["Content-Type"].startswith("text/plain")
    sample = re.compile(r'[a-z_:]+(\{([a-z_]+="[^"\n]*",?)*\})? [-+0-9.e]+(Inf)?')
    for line in answer.body.decode().splitlines():
        assert line.startswith("# ") or sample.fullmatch(line), line
    assert 'wggw_peers{interface="wg0",state="active",reason=""} ' in answer.body.decode()


def test_without_a_token_loopback_may_read_the_metrics(client: Client) -> None:
    assert client.raw("GET", "/metrics", b"", {}).status == 200


# --- methods, paths, bodies ----------------------------------------------------------------------

METHODS = [  # path, what is allowed there
    (PEERS, {"GET", "HEAD", "POST"}),
    (PEERS + path_key(AWKWARD), {"GET", "HEAD", "DELETE"}),
    (PEERS + path_key(AWKWARD) + "/status", {"PUT"}),
    ("/api/v1/ip-usage", {"GET", "HEAD"}),
    ("/api/v1/sync-ips", {"POST"}),
    ("/api/v1/server/status", {"GET", "HEAD"}),
    ("/api/v1/server/metrics", {"GET", "HEAD"}),
    ("/healthz", {"GET", "HEAD"}),
    ("/readyz", {"GET", "HEAD"}),
    ("/metrics", {"GET", "HEAD"}),
]


@pytest.mark.parametrize(("path", "allowed"), METHODS)
def test_another_method_is_a_405_that_says_which(api: Client, path: str, allowed: set[str]) -> None:
    for method in {"POST", "DELETE", "OPTIONS", "TRACE", "BREW"} - allowed:
        answer = api.send(method, path)
        check_problem(answer, 405)
        assert allowed <= {word.strip() for word in answer.headers["Allow"].split(",")}


@pytest.mark.parametrize("path", ["/api/v1/ip-usage", PEERS, "/healthz", "/api/v1/none"])
def test_head_answers_as_get_does_without_the_body(api: Client, path: str) -> None:
    get, head = api.send("GET", path), api.send("HEAD", path)
    assert head.status == get.status and head.body == b""
    assert head.headers["Content-Type"] == get.headers["Content-Type"]
    assert head.headers["Content-Length"] == get.headers["Content-Length"]


@pytest.mark.parametrize(
    "kind", ["application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"]
)
def test_json_by_any_of_its_names_is_taken(api: Client, kind: str) -> None:
    answer = api.send("POST", PEERS, {"public_key": fresh()}, **{"Content-Type": kind})
    assert answer.status == 200


def test_a_body_without_a_media_type_is_taken_for_json(api: Client) -> None:
    body = encode({"public_key": fresh()})
    assert api.raw("POST", PEERS, body, sign(body)).status == 200


def test_a_large_body_is_a_413(shared: GatewayProcess) -> None:
    client = shared.client()
    check_problem(client.send("POST", PEERS, b" " * (64 * 1024 + 1)), 413)
    client = shared.client()
    key = fresh()
    just = encode({"public_key": key})
    assert client.send("POST", PEERS, just + b" " * (64 * 1024 - len(just))).status == 200


# --- signatures ----------------------------------------------------------------------------------


def test_every_api_row_refuses_without_a_signature(api: Client) -> None:
    for path, allowed in METHODS[:7]:
        for method in allowed - {"HEAD"}:
            check_problem(api.raw(method, path, b"", {}), 401)
    check_problem(api.raw("GET", "/api/v1/no-such-thing", b"", {}), 401)


WRONG: list[tuple[str, dict[str, str]]] = [
    ("nothing", {}),
    ("no timestamp", {"signature": sign()["signature"]}),
    ("no signature", {"timestamp": sign()["timestamp"]}),
    ("empty", {"signature": "", "timestamp": ""}),
    ("another key", sign(key="another key of another gateway")),
    ("another length", sign(b"x")),
    ("a prefix", {**sign(), "signature": sign()["signature"][:-1]}),
    ("no number", {**sign(), "timestamp": "now"}),
    ("signed, but no number", {"signature": "0" * 64, "timestamp": "1e9"}),
    ("bytes", {**sign(), "signature": "é" * 64}),
    ("long", {**sign(), "signature": "0" * 8000}),
]


def test_wrong_signatures_get_one_and_the_same_401(api: Client) -> None:
    details = {
        check_problem(api.raw("GET", "/api/v1/ip-usage", b"", headers), 401) for _, headers in WRONG
    }
    assert len(details) == 1


# Here with room for a busy machine; to the second: test_crypto.py.
@pytest.mark.parametrize("offset", [-3600, -62, 90, 3600])
def test_only_a_right_signature_learns_the_servers_time(api: Client, offset: int) -> None:
    started = int(time.time())
    late = sign(at=started + offset)
    detail = check_problem(api.raw("GET", "/api/v1/ip-usage", b"", late), 401)
    told = [int(word) for word in re.findall(r"\b\d{10}\b", detail)]
    assert told and started <= told[0] <= time.time()
    forged = {**late, "signature": "0" * 64}
    assert str(told[0])[:6] not in check_problem(
        api.raw("GET", "/api/v1/ip-usage", b"", forged), 401
    )


# --- payload encryption --------------------------------------------------------------------------


def payload_key(secret: str = SHARED_SECRET) -> AESGCM:
    derive = HKDF(algorithm=hashes.SHA256(), length=32, salt=b"", info=b"handshake data")
    return AESGCM(derive.derive(secret.encode()))


def seal(plaintext: bytes, secret: str = SHARED_SECRET) -> str:
    iv = os.urandom(12)
    return base64.b64encode(iv + payload_key(secret).encrypt(iv, plaintext, None)).decode()


def unseal(answer: Answer, ivs: set[bytes]) -> Any:
    """The content of an encrypted answer; its IV must not be one of `ivs`."""
    assert answer.headers["Content-Type"] == "application/json"
    assert set(answer.json) == {"encrypted_response"}, answer
    sealed = base64.b64decode(answer.json["encrypted_response"], validate=True)
    assert sealed[:12] not in ivs
    ivs.add(sealed[:12])
    return json.loads(payload_key().decrypt(sealed[:12], sealed[12:], None))


def test_the_tests_own_sealing_agrees_with_the_published_vectors() -> None:
    vectors = json.loads((Path(__file__).parent / "wire-vectors.json").read_text())["payload"]
    for case in vectors["cases"]:
        sealed = base64.b64decode(case.get("encrypted_payload") or case["encrypted_response"])
        plain = payload_key(vectors["GATEWAY_PUBLIC_KEY"]).decrypt(sealed[:12], sealed[12:], None)
        assert plain.decode() == case["plaintext"]


def test_every_answer_to_an_encrypted_create_is_encrypted(api: Client) -> None:
    key, ivs = fresh(), set[bytes]()
    inside = {"protocol": "dual", "dns": "d2", "request_id": "inside", "public_key": key}
    sealed = seal(encode(inside))
    # The fields inside win over the clear ones.
    first = api.create(fresh(), request_id="outside", port=53, encrypted_payload=sealed)
    assert first.status == 200
    made = unseal(first, ivs)
    assert (made["status"], made["public_key"]) == ("created", key)
    assert (made["dns"], made["request_id"], made["port"]) == ("d2", "inside", 53)
    again = api.create(key, encrypted_payload=sealed)
    assert again.status == 200
    found = unseal(again, ivs)
    assert found["status"] == "exists"
    assert found["assigned_ip"] == made["assigned_ip"]
    assert found["assigned_ipv6"] == made["assigned_ipv6"]


ENCRYPTED_ERRORS: list[tuple[bytes, int]] = [
    (b'{"port": 1}', 422),
    (b'{"protocol": "ipv9"}', 422),
    (b'{"assigned_ip": "10.9.0.1"}', 409),
    (b'{"public_key": "x"}', 422),
    (b"not json", 400),
    (b"[]", 400),
    (b'{"dns": "d1", "dns": "d2"}', 400),
    (b"", 400),
]


@pytest.mark.parametrize(("plaintext", "status"), ENCRYPTED_ERRORS)
def test_errors_after_decryption_are_encrypted_and_keep_their_status(
    api: Client, plaintext: bytes, status: int
) -> None:
    key, ivs = fresh(), set[bytes]()
    answer = api.create(key, encrypted_payload=seal(plaintext))
    assert answer.status == status
    problem = unseal(answer, ivs)
    assert problem["status"] == status and problem["detail"]
    assert api.get(key).status == 404


# What is not sealed, sealed by others, or cut; every changed byte: test_crypto.py.
GARBLED = ["", "not base64!", "\ud800", seal(b"{}", "another secret of others"), seal(b"{}")[:-4]]


@pytest.mark.parametrize("text", GARBLED, ids=range(len(GARBLED)))
def test_a_garbled_payload_is_a_400_and_creates_nothing(api: Client, text: str) -> None:
    key = fresh()
    before = usage(api)
    check_problem(api.create(key, encrypted_payload=text), 400)
    assert usage(api) == before and api.get(key).status == 404


def test_without_a_shared_secret_an_encrypted_payload_is_refused(client: Client) -> None:
    check_problem(client.create(a_key(1), encrypted_payload=seal(b"{}")), 400)
    assert client.get(a_key(1)).status == 404


# --- the log -------------------------------------------------------------------------------------


def test_the_log_holds_no_secret_signature_key_or_address(shared: GatewayProcess) -> None:
    client = shared.client()
    key, psk = fresh(), a_key("a psk that must not be logged")
    made = client.create(key, protocol="dual", preshared_key=psk, request_id="do-not-log-me").json
    headers = sign()
    assert client.raw("GET", PEERS + path_key(key), b"", headers).status == 200
    line = "GET /api/v1/configurations/{public_key} 200"
    log = wait_for(lambda: line in (text := shared.text()) and text, what=line)
    for secret in (
        API_KEY, SHARED_SECRET, METRICS_TOKEN, headers["signature"], psk, "do-not-log-me",
        made["assigned_ip"] + " ", made["assigned_ipv6"] + " ", key,
    ):  # fmt: skip
        assert secret not in log
