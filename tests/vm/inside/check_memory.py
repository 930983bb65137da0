"""Inside the guest: a node in memory that has Python, one file, its environment and a remote copy.

namespace of the guest                  namespace "client"
wg0 10.0.1.1 fd42:4242:1::1             wgc (as assigned)
host0 192.0.2.1 ----------------------- client0 192.0.2.2
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from check_gateway import allowed_ips, both_ping, sh, wire_client
from harness import API_KEY, WGGW, Client, a_key, wait_for
from objects import TOKEN, TlsStore, tls_store

MEMORY = Path("/run/memory")
PEERS = 20


def environment_of(store: TlsStore, certificate: Path) -> dict[str, str]:
    return {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "GATEWAY_API_KEY": API_KEY,
        "WG_ENDPOINT": "192.0.2.1",
        "WG_PRIVATE_KEY_FILE": "privatekey",
        "SNAPSHOT_URL": store.url,
        "SNAPSHOT_TOKEN": TOKEN,
        "SNAPSHOT_KEY": "what the copy is encrypted with",
        "SSL_CERT_FILE": str(certificate),
    }


@contextlib.contextmanager
def booted(environment: dict[str, str]) -> Iterator[tuple[Client, Path]]:
    """A node from its boot to the power cut, after which nothing of it is left."""
    MEMORY.mkdir()
    shutil.copy(WGGW, MEMORY)
    log = MEMORY / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["bash", "-c", "python3 wggw.py net up && exec python3 wggw.py serve"],
            cwd=MEMORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
    try:

        def ready() -> bool:
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(OSError):
                return Client(8000).raw("GET", "/readyz", b"", {}).status == 200
            return False

        wait_for(ready, 60, "readiness")
        yield Client(8000), log
    finally:
        process.kill()
        process.wait()
        sh("ip", "link", "delete", "wg0")
        sh("nft", "delete", "table", "inet", "wggw")
        for name in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
            sh("sysctl", "-qw", f"{name}=0")
        shutil.rmtree(MEMORY)


def copy_is_even(client: Client) -> Any:
    copy = client.send("GET", "/api/v1/server/status").json["remote_copy"]
    return copy["lag_records"] == 0 and copy["number"] >= PEERS


def test_nothing_but_a_remote_copy_brings_every_peer_back(tmp_path: Path) -> None:
    assert sh("stat", "-f", "-c", "%T", "/run").strip() == "tmpfs"
    secret = tmp_path / "client.key"
    secret.write_text(sh("wg", "genkey"))
    key = subprocess.run(
        ["wg", "pubkey"], input=secret.read_text(), capture_output=True, text=True, check=True
    ).stdout.strip()
    with tls_store(tmp_path) as store:
        environment = environment_of(store, tmp_path / "store.pem")
        with booted(environment) as (api, _):
            created = api.create(key, protocol="dual").json
            for number in range(1, PEERS):
                assert api.create(a_key(number), protocol="dual").status == 200
            assert api.status(a_key(1), "suspended").status == 200
            sh("ip", "netns", "add", "client")
            wire_client(created, secret)
            wait_for(both_ping, 60, "ping before the power cut")
            wait_for(lambda: copy_is_even(api), 60, "the copy")
            before = allowed_ips()
        assert len(before) == PEERS - 1
        assert not both_ping()
        with booted(environment) as (api, log):
            assert allowed_ips() == before
            assert sh("wg", "show", "wg0", "public-key").strip() == created["server_public_key"]
            assert re.search(
                r"remote copy: epoch [0-9]+ begins, with record [0-9]+", log.read_text()
            )
            assert "masquerade" in sh("nft", "list", "table", "inet", "wggw")
            wait_for(both_ping, 60, "ping after the boot, the client unchanged")
            known = api.get(a_key(1)).json
            assert (known["status"], bool(known["assigned_ip"])) == ("suspended", True)
    sh("ip", "netns", "delete", "client")
