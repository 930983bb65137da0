"""Totals against the clients' own counters, to the byte; expiry is in test_tunnel.py, quota here.

What a peer moved since the last sample before it leaves the interface is not counted, so tests wait
for a sample before they let it leave. From there on nothing is lost.

What the gateway's interface receives is what the client's sent, as long as nothing is lost on the
way: on a veth pair with a few packets nothing is. Nothing but the tests' pings is sent by itself:
no keepalive before 10 s without an answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import netns
import pytest
from backend_contract import output
from harness import Answer, GatewayProcess, path_key, wait_for
from netns import Topology

pytestmark = pytest.mark.real

PEERS = "/api/v1/configurations"
GATEWAY = Topology.GATEWAY[0]


class Account:
    """What a client sent and received, over all of its sessions, and what the gateway says."""

    def __init__(self, gateway: GatewayProcess, topology: Topology) -> None:
        self.gateway, self.topology = gateway, topology
        self.client = gateway.client()
        self.tunnel = topology.tunnel(0)
        self.key = self.tunnel.public_key
        self.ended = (0, 0)  # of sessions before this one
        self.base = (0, 0)  # what the gateway's interface had counted when this one began
        answer = self.client.create(self.key, protocol="dual", persistent_keepalive=0)
        self.answer: dict[str, Any] = answer.json
        self.tunnel.connect(self.answer)
        self.move()

    def move(self) -> None:
        """Some packets of 1,000 bytes; then nothing more is under way."""
        with self.tunnel.namespace.inside():
            # All at once, as netns.Tunnel.ping does.
            times = ("-l", "20", "-c", "20", "-i", "10", "-W", "10")
            done = output("ping", "-n", "-q", "-s", "1000", *times, GATEWAY)
        assert " 20 received" in done, done

        def settled() -> bool:
            """wireguard-go counts a packet after it was sent: its answer may be there before."""
            here, base = self.counted(), self.base
            return self.tunnel.transfer() == (here[0] - base[0], here[1] - base[1])

        wait_for(settled, what="the same counts on both sides")

    def counted(self) -> tuple[int, int]:
        """(received, sent) by the gateway's interface from and to this peer."""
        for line in output("wg", "show", self.topology.interface, "transfer").splitlines():
            key, received, sent = line.split()
            if key == self.key:
                return int(received), int(sent)
        return 0, 0

    def said(self) -> tuple[int, int]:
        shown = self.client.get(self.key).json
        return shown["rx_bytes"], shown["tx_bytes"]

    def truth(self) -> tuple[int, int]:
        sent, received = self.tunnel.transfer()
        return self.ended[0] + sent, self.ended[1] + received

    def becomes_true(self) -> None:
        wait_for(lambda: self.said() == self.truth(), what=f"{self.truth()}, not {self.said()}")

    def cut_off(self, change: Callable[[], Answer]) -> None:
        """A change that ends the session, behind a sample of all that was counted until then."""
        self.becomes_true()
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
        self.base = self.counted()
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
    wait_for(lambda: netns.daemon_pid(topology.interface) not in (None, first), what="a new one")
    wait_for(account.gateway.is_ready, what="readiness")
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
    account.reconnect()
