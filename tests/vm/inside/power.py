"""Inside the guest: the gateway on the guest's disk, under load until the host cuts the power.

    power.py report     print the state that the gateway came up with, as one line of JSON
    power.py load       then change peers from four connections, for ever

Every step is told on the console: "try" before the request is sent, "ack" with the answer when
it is there. The host holds the one against the other after the next boot.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from harness import Client, GatewayProcess, a_key

STATE = Path("/root/state")
UNSYNCED = Path("/root/unsynced")
CONNECTIONS = 4


def tell(word: str, value: Any) -> None:
    """One write for one line: lines of several threads must not mix."""
    sys.stdout.write(f"{word} {json.dumps(value)}\n")
    sys.stdout.flush()


def configurations(client: Client) -> list[Any]:
    found: list[Any] = []
    cursor = ""
    while True:
        answer = client.send("GET", f"/api/v1/configurations/?limit=100{cursor}")
        assert answer.status == 200, answer
        found += answer.json["configurations"]
        if not answer.json.get("next_cursor"):
            return found
        cursor = f"&cursor={answer.json['next_cursor']}"


def report(gateway: GatewayProcess) -> None:
    client = gateway.client()
    dump = subprocess.run(
        ["wg", "show", "wg0", "allowed-ips"], check=True, capture_output=True, text=True
    ).stdout
    tell(
        "state",
        {
            "peers": {
                row["public_key"]: [row["status"], row["assigned_ip"], row["assigned_ipv6"]]
                for row in configurations(client)
            },
            "interface": {
                line.split("\t")[0]: line.split("\t")[1].split() for line in dump.splitlines()
            },
            "server_public_key": subprocess.run(
                ["wg", "show", "wg0", "public-key"], check=True, capture_output=True, text=True
            ).stdout.strip(),
            "unsynced": UNSYNCED.exists() and UNSYNCED.stat().st_size,
        },
    )


def step(client: Client, chance: random.Random, mine: dict[str, str], new_key: str) -> None:
    """One change by its owner: every key belongs to one connection, so its history is a line."""
    known = sorted(mine)
    operation = chance.choice(["create", "create", "suspended", "active", "delete"])
    if operation == "create" or not known:
        tell("try", [new_key, "create"])
        answer = client.create(new_key, protocol=chance.choice(["ipv4", "ipv6", "dual"]))
        assert answer.status == 200, answer
        body = answer.json
        mine[new_key] = "active"
        tell("ack", [new_key, ["active", body["assigned_ip"], body.get("assigned_ipv6")]])
        return
    key = chance.choice(known)
    tell("try", [key, operation])
    if operation == "delete":
        answer = client.delete(key)
        del mine[key]
    else:
        answer = client.status(key, operation)
        mine[key] = operation
    assert answer.status == 200, answer
    tell("ack", [key, operation])


def change_for_ever(gateway: GatewayProcess, seed: str) -> None:
    client, chance = gateway.client(), random.Random(seed)
    mine: dict[str, str] = {}
    number = 0
    try:
        while True:
            number += 1
            step(client, chance, mine, a_key((seed, number)))
    except Exception as error:
        tell("failed", f"{error!r} {gateway.text()[-2000:]}")


def main(command: str, seed: str) -> None:
    STATE.mkdir(exist_ok=True)
    gateway = GatewayProcess(
        STATE,
        WG_BACKEND="auto",
        DB_PATH=str(STATE / "wireguard.db"),
        WG_IPV4_SUBNET="10.0.0.0/16",
        SNAPSHOT_INTERVAL="0.5",
    )
    try:
        gateway.start(60)
        report(gateway)
        if command == "load":
            # Never synced: a cut that does not lose this would prove nothing.
            # A new file, because ext4 does sync one that is truncated and written again.
            UNSYNCED.unlink(missing_ok=True)
            UNSYNCED.write_text("lost when the power is cut")
            threads = [
                threading.Thread(target=change_for_ever, args=(gateway, f"{seed}-{index}"))
                for index in range(CONNECTIONS)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        else:
            assert gateway.stop() == 0
    except AssertionError as error:
        tell("failed", f"{error} {gateway.text()[-2000:]}")
    finally:
        gateway.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
