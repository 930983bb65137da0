"""A configuration is the JSON that SQLite makes of a row: what it must be is written out here."""

from __future__ import annotations

import dataclasses
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from fakes import World, build, do
from harness import a_key
from hypothesis import example, given, settings
from hypothesis import strategies as st

import wggw

KEYS = {"wg0": a_key("the gateway's"), "awg0": a_key("its other")}
CHOICES = {
    "d1": ("1.1.1.1", "2606:4700::1111"),
    'a "b" \\': ("10.0.0.1", "corp.example"),
    "none": (),
}
STATE = wggw.ObfuscationState(3, "2.0", wggw.Obfuscation(jc=4, jmin=40, jmax=70))
ROWS = wggw.interface_settings(
    wggw.load_config(
        {
            "GATEWAY_API_KEY": "k" * 32,
            "WG_ENDPOINT": "vpn.example.org",
            "WG_EXTRA_PORTS": "53,443",
            "AWG_INTERFACE": "awg0",
            "AWG_IPV4_SUBNET": "10.9.0.0/24",
        }
    )
)
VIEW = wggw.View(
    1_000_000,
    CHOICES,
    (
        wggw.Served(ROWS[0], KEYS["wg0"], 1420, None),
        wggw.Served(ROWS[1], KEYS["awg0"], 1380, STATE),
    ),
)
OWN = ['{"jc": 7}', '{"jmin": 5, "jmax": 9}', "{}"]
OWN_SHOWN: dict[str | None, dict[str, Any]] = {
    None: {"jc": 4, "jmin": 40, "jmax": 70},
    OWN[0]: {"jc": 7, "jmin": 40, "jmax": 70},
    OWN[1]: {"jc": 4, "jmin": 5, "jmax": 9},
    OWN[2]: {"jc": 4, "jmin": 40, "jmax": 70},
}
TEXTS = st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
TIMES = st.integers(0, wggw.MAX_TIME)
COUNTS = st.integers(0, wggw.MAX_TOTAL)
PEERS = st.builds(
    wggw.Peer,
    id=st.integers(1, 2**53),
    public_key=st.just(a_key("a peer")),
    interface=st.sampled_from(["wg0", "awg0"]),
    status=st.sampled_from(["active", "suspended"]),
    status_reason=st.none() | st.sampled_from(["expired", "quota"]),
    assigned_ip=st.none() | st.just("10.0.1.2"),
    assigned_ipv6=st.none() | st.just("fd42:4242:1::2"),
    tunnel_traffic=st.sampled_from(["ipv4", "ipv6", "ipv4,ipv6"]),
    dns=st.none() | st.sampled_from(list(CHOICES)),
    port=st.none() | st.sampled_from([53, 443]),
    preshared_key=st.none() | st.just(a_key("shared")),
    persistent_keepalive=st.integers(0, 65535),
    expires_at=st.none() | TIMES,
    quota_bytes=st.none() | st.integers(0, wggw.MAX_INTEGER),
    created_at=TIMES,
    request_id=TEXTS,
    obfuscation=st.none() | st.sampled_from(OWN),
    label=TEXTS,
    service_class=TEXTS,
    quota_period=st.none() | st.sampled_from(["day", "week", "month"]),
    quota_base=COUNTS,
)
# No row of `traffic` at all, or one.
TOTALS = st.none() | st.tuples(COUNTS, COUNTS, st.just(0) | TIMES)
ODD = 'a "quote", a \\, a tab\t, \x00\x01\x1f\x7f\x80\u2028\u2029\ufeff\uffff and 🐧'


def when(seconds: int) -> str:
    moment = datetime.fromtimestamp(seconds, timezone.utc).replace(tzinfo=None)
    return moment.isoformat() + "Z"


def expected(peer: wggw.Peer, totals: tuple[int, int, int] | None, sequence: int) -> dict[str, Any]:
    rx, tx, handshake = totals or (0, 0, 0)
    plain = peer.interface == "wg0"
    choice = "d1" if peer.dns is None else peer.dns
    port = peer.port or (51820 if plain else ROWS[1].ports[0])
    families = peer.tunnel_traffic.split(",")
    networks = {"ipv4": "0.0.0.0/0", "ipv6": "::/0"}
    return {
        "public_key": peer.public_key,
        "status": peer.status,
        "status_reason": peer.status_reason,
        "assigned_ip": peer.assigned_ip,
        "assigned_ipv6": peer.assigned_ipv6,
        "tunnel_traffic": families,
        "allowed_ips": [networks[family] for family in families],
        "dns": choice,
        "dns_servers": list(CHOICES[choice]),
        "port": port,
        "interface": peer.interface,
        "server_public_key": KEYS[peer.interface],
        "endpoint": f"vpn.example.org:{port}" if port in ROWS[not plain].ports else None,
        "mtu": 1420 if plain else 1380,
        "persistent_keepalive": peer.persistent_keepalive,
        "expires_at": None if peer.expires_at is None else when(peer.expires_at),
        "quota_bytes": peer.quota_bytes,
        "quota_period": peer.quota_period,
        "quota_used": max(0, rx + tx - peer.quota_base),
        "created_at": when(peer.created_at),
        "request_id": peer.request_id,
        "label": peer.label,
        "service_class": peer.service_class,
        "obfuscation": None
        if plain
        else {
            "enabled": True,
            "generation": "2.0",
            "parameters_version": 3,
            **wggw.show_parameters(STATE.parameters),
            **OWN_SHOWN[peer.obfuscation],
        },
        "online": peer.status == "active" and 1_000_000 < handshake < 1_000_360,
        "last_handshake": when(handshake) if handshake else None,
        "rx_bytes": rx,
        "tx_bytes": tx,
        "sequence": sequence,
    }


def a_row(**fields: Any) -> wggw.Peer:
    known = {
        "id": 1,
        "public_key": a_key("a peer"),
        "interface": "wg0",
        "status": "active",
        "tunnel_traffic": "ipv4",
        "persistent_keepalive": 25,
        "created_at": 0,
    }
    return wggw.Peer(**{**dict.fromkeys(wggw.Peer._fields), "quota_base": 0, **known, **fields})


@settings(max_examples=200, deadline=None)
@given(PEERS, TOTALS)
@example(a_row(label=ODD, request_id=ODD, service_class=ODD), None)
@example(a_row(expires_at=wggw.MAX_TIME), (wggw.MAX_TOTAL, wggw.MAX_TOTAL, wggw.MAX_TIME))
@example(a_row(quota_bytes=2**53 + 1), (2**53 + 1, 0, 1_000_000))
@example(a_row(), (0, 0, 1_000_001))
def test_sqlite_writes_what_the_row_says(
    peer: wggw.Peer, totals: tuple[int, int, int] | None
) -> None:
    store = wggw.Store()
    store.apply(wggw.Record([peer], at=5))
    sequence = store.feeds.sequence
    if totals is not None:
        store.apply(wggw.Record(traffic=[wggw.TrafficRow(peer.id, *totals[:2], 0, 0, totals[2])]))
    right = expected(peer, totals, sequence)
    text = store.configurations.show(peer.public_key, VIEW) or ""
    shown = json.loads(text)
    assert shown == right and list(shown) == list(right) == list(wggw.CONFIGURATION)
    # The same bytes as Python's: no escapes but those that JSON demands.
    encoded = json.dumps(shown, ensure_ascii=False, separators=(",", ":"))
    assert text == encoded
    assert store.configurations.page(0, 9, wggw.Filter(), VIEW)[0] == [(peer.id, text)]
    [(_, change)] = store.feeds.changes(0, 9, VIEW)
    assert json.loads(change) == {
        "sequence": sequence,
        "time": "1970-01-01T00:00:05Z",
        "deleted": False,
        "public_key": peer.public_key,
        "configuration": right,
    }
    names = ("sequence", "label", "online")
    [(_, some)] = store.configurations.page(0, 9, wggw.Filter(), VIEW, names)[0]
    assert list(json.loads(some).items()) == [(name, right[name]) for name in names]


def test_every_member_has_a_value_and_a_schema() -> None:
    assert list(wggw.CONFIGURATION_SQL) == list(wggw.CONFIGURATION)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return build(tmp_path, WG_ENDPOINT="vpn.example.org")


def test_what_interfaces_and_settings_become_is_shown_at_once(world: World) -> None:
    """Also after an import, which replaces the database."""
    do(world.gateway, "create", public_key=a_key(1))
    [tunnel] = world.gateway.tunnels.values()

    def same() -> None:
        shown, first = world.shown(a_key(1)), next(iter(world.gateway.config.dns_servers))
        assert shown["server_public_key"] == tunnel.public_key
        assert (shown["mtu"], shown["dns"]) == (tunnel.link.mtu, first)

    same()
    link = tunnel.link
    tunnel.note_link(link._replace(mtu=1300, private_key=wggw.clamp(b"7" * 32)), None)
    same()
    tunnel.note_link(link, None)
    servers = {"x": ("192.0.2.1",)}
    world.gateway.config = dataclasses.replace(world.config, dns_servers=servers)
    same()
    assert world.shown(a_key(1))["dns_servers"] == ["192.0.2.1"]
    world.gateway.config = world.config
    world.gateway.import_(world.gateway.export())
    same()
    world.close()
