"""docs/MIGRATION.md is true: its blocks run as written, on machines that are as it says.

Each section has a machine of private namespaces (see sandbox.py) with the wireguard-go interface or
the container that it begins with. wireguard-go runs as the service's user, because the kernel's
interfaces, which it stands for, answer to that user, too. The service is that of test_ownership.py.
"""

from __future__ import annotations

import json
import re
import shlex
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import netns
import pytest
from harness import ROOT
from sandbox import machine
from test_ownership import Host, Thing

import wggw

pytestmark = pytest.mark.real

TEXT = (ROOT / "docs/MIGRATION.md").read_text()
CASES = Path(__file__).parent.parent / "data" / "moving-in"
KEYS = [f"Q2x1YjAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMD{end}=" for end in ("E", "I")]
PRIVATE = "2F4Rk1Vbq0m8yO2mYc3nSxuPzq4mB7w2kJ1lQe0s93E="
PUBLIC = wggw.encode_key(wggw.x25519_public(wggw.decode_key(PRIVATE)))
SECTIONS = dict(part.split("\n", 1) for part in TEXT.split("\n## ")[1:])
BLOCKS = {
    name: re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    for name, text in SECTIONS.items()
}
ENDS = "The gateway is ready"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    netns.need("ip", "wg", "nft", "wireguard-go", "setpriv", "curl", tun=True)
    if netns.kernel_has_wireguard():
        pytest.skip("the kernel has WireGuard: the guests show this")
    with machine(tmp_path) as made:
        host = Host(made, Thing("wg0", "", ()))
        yield host
        host.clean()


def interface(peers: str, port: int, *addresses: str) -> str:
    """A script that makes wg0 as another manager leaves it."""
    text = f"[Interface]\nPrivateKey = {PRIVATE}\nListenPort = {port}\n{peers}"
    return (
        "useradd --system --user-group --no-create-home --home-dir /var/lib/wggw "
        "-s /usr/sbin/nologin wggw\n"
        "install -d -o wggw -g wggw -m 700 /run/wireguard\n"
        "setsid setpriv --reuid wggw --regid wggw --clear-groups --inh-caps +net_admin "
        "--ambient-caps +net_admin wireguard-go -f wg0 >/dev/null 2>&1 </dev/null &\n"
        "until [[ -S /run/wireguard/wg0.sock ]]; do sleep 0.01; done\n"
        f"wg setconf wg0 /dev/stdin <<<{shlex.quote(text)}\n"
        + "".join(f"ip address add {address} dev wg0\n" for address in addresses)
        + "ip link set wg0 mtu 1380 up\n"
    )


def peer(key: str, networks: str) -> str:
    return f"[Peer]\nPublicKey = {key}\nAllowedIPs = {networks}\n"


def run(host: Host, *blocks: str) -> str:
    return host.machine.output("set -e\n" + "\n".join(blocks))


def peers(host: Host) -> dict[str, dict[str, Any]]:
    page = json.loads(host.machine.output("wggw call GET /api/v1/configurations"))
    return {each["public_key"]: each for each in page["configurations"]}


def found_right(host: Host, count: int) -> None:
    """The service that was started changed no peer."""
    log = host.machine.output("cat /run/service.log")
    assert f"0 added, 0 updated, 0 removed, {count} unchanged" in log, log
    assert host.machine.output("wg show wg0 public-key").strip() == PUBLIC


def test_from_wg_quick_and_back(host: Host) -> None:
    look, move = BLOCKS["From wg-quick"]
    text = (CASES / "wg0.conf").read_text().split("[peer]")[0]  # what fits
    networks = ("10.8.0.2/32, fd00:8::2/128", "10.8.0.3/32, fd00:8::3/128")
    both = "".join(peer(*pair) for pair in zip(KEYS, networks, strict=True))
    run(
        host,
        f"mkdir -p /etc/wireguard; cat >/etc/wireguard/wg0.conf <<'END'\n{text}END",
        interface(both, 51899, "10.8.0.1/24", "fd00:8::1/64"),
    )
    index = host.machine.output("ip -o link show wg0 | cut -d: -f1")
    shown = run(host, look)
    assert "would take over wg0 with 2 peers" in shown
    assert "systemctl disable wg-quick@wg0; mv /etc/wireguard/wg0.conf" in shown
    assert host.machine.run("ls -d /etc/wggw").returncode == 2
    assert ENDS in run(host, move)
    found_right(host, 2)
    assert {p["label"] for p in peers(host).values()} == {"laptop of the office", "phone"}
    before = host.look()

    run(host, *BLOCKS["The way back"])
    assert host.machine.run("nft list table inet wggw").returncode == 1
    run(host, "wg-quick strip wg0 | wg syncconf wg0 /dev/stdin")
    assert host.look()[1] == before[1]
    assert "Address = 10.8.0.1/24,fd00:8::1/64" in run(host, "cat /etc/wireguard/wg0.conf")
    assert host.machine.output("ip -o link show wg0 | cut -d: -f1") == index
    assert "alias" not in host.machine.output("ip link show wg0")


@pytest.mark.long
def test_from_wg_easy(host: Host) -> None:
    [block] = BLOCKS["From wg-easy"]
    case = shlex.quote((CASES / "wg-easy.json").read_text())
    host.tool("docker", f"#!/bin/sh\n[ $1 != cp ] || printf %s {case} >$3\n")
    shown = run(host, block)
    assert "would create 2 peers" in shown and "done: 2 created" in shown
    assert host.machine.output("wg show wg0 public-key").strip() == PUBLIC
    assert host.machine.output("wg show wg0 allowed-ips").split() == [KEYS[0], "10.8.0.2/32"]
    found = peers(host)
    assert found[KEYS[0]]["label"] == 'laptop "A" ü' and found[KEYS[1]]["status"] == "suspended"


@pytest.mark.long
def test_from_the_gateway_before_this_one(host: Host, tmp_path: Path) -> None:
    [block] = BLOCKS["From the gateway before wggw"]
    with sqlite3.connect(tmp_path / "old.db") as db:
        db.executescript((CASES / "ancestor.sql").read_text())
    db.close()
    active = peer(KEYS[0], "10.0.1.2/32, fd42:4242:1::2/128")
    run(
        host,
        f"install -D {tmp_path}/old.db /opt/gateway/wireguard.db",
        interface(active, 51820, "10.0.1.1/24", "fd42:4242:1::1/64"),
    )
    assert "done: 1 created, " in run(host, block)
    found_right(host, 1)
    found = peers(host)
    assert {key: (p["status"], p["assigned_ip"], p["dns"]) for key, p in found.items()} == {
        KEYS[0]: ("active", "10.0.1.2", found[KEYS[0]]["dns"]),
        KEYS[1]: ("suspended", "10.0.1.3", found[KEYS[1]]["dns"]),
    }
    assert host.machine.output("wg show wg0 peers").split() == [KEYS[0]]


def test_every_block_is_run() -> None:
    assert TEXT.count("```sh\n") == sum(map(len, BLOCKS.values())) == TEXT.count("```") / 2
    assert [len(blocks) for blocks in BLOCKS.values()] == [2, 1, 1, 2]
