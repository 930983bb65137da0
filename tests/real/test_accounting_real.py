"""Totals against the clients' own counters, to the byte; expiry is in test_tunnel.py, quota here.

What the gateway's interface receives is what the client's sent, as long as nothing is lost on the
way: on a veth pair with a few packets nothing is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import netns
import pytest
from backend_contract import output
from harness import Answer, GatewayProcess, path_key, wait_for
from netns import Topology, Tunnel

pytestmark = pytest.mark.real

PEERS = "/api/v1/configurations"


def counters(tunnel: Tunnel) -> tuple[int, int]:
    """(sent, received) by the client's interface."""
    with tunnel.namespace.inside():
        fields = output("wg", "show", tunnel.name, "transfer").split()
    return int(fields[2]), int(fields[1])


def ping(tunnel: Tunnel, count: int = 20) -> None:
    """Some packets of 1,000 bytes; then nothing more is under way. ping(8) misses late answers."""
    with tunnel.namespace.inside():
        target = Topology.GATEWAY[0]
        done = output("ping", "-n", "-q", "-s", "1000", "-i", "0.01", "-c", str(count), target)
    assert " 0 received" not in done

    def quiet() -> bool:
        before = counters(tunnel)
        time.sleep(0.3)
        return counters(tunnel) == before

    wait_for(quiet, 20, "an end of the answers")


class Account:
    """What a client sent and received, over all of its sessions, and what the gateway says."""

    def __init__(self, gateway: GatewayProcess, topology: Topology) -> None:
        self.gateway = gateway
        self.client = gateway.client()
        self.tunnel = topology.tunnel(0)
        self.key = self.tunnel.public_key
        self.ended = (0, 0)  # of sessions before this one
        answer = self.client.create(self.key, protocol="dual", persistent_keepalive=0)
        self.answer: dict[str, Any] = answer.json
        self.tunnel.connect(self.answer)
        self.move()

    def move(self) -> None:
        ping(self.tunnel)

    def said(self) -> tuple[int, int]:
        shown = self.client.get(self.key).json
        return shown["rx_bytes"], shown["tx_bytes"]

    def truth(self) -> tuple[int, int]:
        sent, received = counters(self.tunnel)
        return self.ended[0] + sent, self.ended[1] + received

    def becomes_true(self) -> None:
        wait_for(lambda: self.said() == self.truth(), 20, f"{self.truth()}, not {self.said()}")

    def cut_off(self, change: Callable[[], Answer]) -> None:
        """A change that ends the session: what was counted until then is in the totals at once."""
        before = self.truth()
        answer = change()
        after = self.truth()
        assert answer.status == 200, answer
        assert before == after, "a packet came in between: nothing can be said"
        self.ended = before

    def reconnect(self, preshared_key: str | None = None) -> None:
        """A new session, whose counters begin at 0."""
        text = self.tunnel._text
        lines = [line for line in text.splitlines() if not line.startswith("PresharedKey")]
        lines = [
            f"PrivateKey = {self.tunnel.private_key}" if line.startswith("PrivateKey") else line
            for line in lines
        ]
        if preshared_key:
            lines.append(f"PresharedKey = {preshared_key}")
        self.tunnel._text = "\n".join(lines) + "\n"
        self.tunnel.reconnect()
        self.move()

    def new_keys(self) -> str:
        self.tunnel.private_key = netns.output("wg", "genkey").strip()
        return netns.output("wg", "pubkey", given=self.tunnel.private_key).strip()


@pytest.fixture
def account(gateway: GatewayProcess, topology: Topology) -> Account:
    return Account(gateway, topology)


def test_suspension_loses_not_a_byte(account: Account) -> None:
    account.cut_off(lambda: account.client.status(account.key, "suspended"))
    assert account.said() == account.ended
    assert account.key not in output("wg", "show", account.answer["interface"], "peers")
    for _ in range(2):
        assert account.client.status(account.key, "active").status == 200
        account.reconnect()
        account.becomes_true()
        account.move()
        account.cut_off(lambda: account.client.status(account.key, "suspended"))
        assert account.said() == account.ended


def test_a_new_key_loses_not_a_byte(account: Account) -> None:
    new = account.new_keys()
    path = f"{PEERS}/{path_key(account.key)}/rotate"
    account.cut_off(lambda: account.client.send("POST", path, {"new_public_key": new}))
    account.key = new
    assert account.said() == account.ended
    account.reconnect()
    account.becomes_true()


def test_a_new_preshared_key_loses_not_a_byte(account: Account) -> None:
    psk = output("wg", "genpsk").strip()
    path = f"{PEERS}/{path_key(account.key)}"
    account.cut_off(lambda: account.client.send("PATCH", path, {"preshared_key": psk}))
    account.reconnect(psk)
    account.becomes_true()


@pytest.mark.parametrize("end", [GatewayProcess.stop, GatewayProcess.kill], ids=["TERM", "KILL"])
def test_a_restart_loses_not_a_byte(account: Account, end: Callable[[GatewayProcess], int]) -> None:
    """The interface counts on, and the gateway reads it where it left off."""
    for _ in range(2):
        account.move()
        end(account.gateway)
        account.move()
        account.gateway.start()
        account.client = account.gateway.client()
        account.becomes_true()


def test_an_interface_made_anew_is_counted_from_zero(
    settings: dict[str, str], stopped: GatewayProcess, topology: Topology
) -> None:
    netns.need("wireguard-go", tun=True)
    stopped.settings["WG_BACKEND"] = "uapi"
    account = Account(stopped.start(), topology)
    account.becomes_true()
    account.ended = account.truth()
    first = netns.daemon_pid(topology.interface)
    netns.end_daemon(topology.interface)
    wait_for(lambda: netns.daemon_pid(topology.interface) not in (None, first), 20, "a new one")
    wait_for(account.gateway.is_ready, 20, "readiness")
    assert account.said() == account.ended
    account.reconnect()
    account.becomes_true()


def test_quota_lets_pass_what_is_paid_for_and_then_nothing(
    gateway: GatewayProcess, topology: Topology
) -> None:
    account = Account(gateway, topology)
    account.becomes_true()
    quota = sum(account.truth()) + 200_000
    path = f"{PEERS}/{path_key(account.key)}"
    assert account.client.send("PATCH", path, {"quota_bytes": quota}).json["status"] == "active"
    account.move()
    shown = account.client.get(account.key).json
    assert shown["status"] == "active"
    with topology.streams(account.tunnel, shown) as streams:
        for stream in streams:
            stream.flows()
        wait_for(
            lambda: account.client.get(account.key).json["status_reason"] == "quota", 60, "quota"
        )
        moment = time.monotonic()
        for stream in streams:
            stream.send_more()
            assert stream.sent_and_arrived_after(moment) == 0
    assert sum(account.said()) > quota
    assert account.client.status(account.key, "active").status == 409
    more = account.client.send("PATCH", path, {"quota_bytes": 10**9}).json
    assert (more["status"], more["status_reason"]) == ("active", None)
    account.tunnel.reconnect()
    account.move()
