"""Every call of the client that openapi-python-client makes of /openapi.json: see run."""

from __future__ import annotations

import base64
import hashlib
import hmac
import importlib
import os
import secrets
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from wggw_client import AuthenticatedClient
from wggw_client import models as m
from wggw_client.types import File

KEY = Path(os.environ["GATEWAY_KEY_FILE"]).read_bytes().strip()


class Signed(httpx.Auth):
    """The signing hook: RFC 9421, over the body as it is sent."""

    requires_request_body = True

    def auth_flow(self, request: httpx.Request) -> Iterator[httpx.Request]:
        lines = [f'"@method": {request.method}', f'"@target-uri": {request.url}']
        covered = '"@method" "@target-uri"'
        if request.content:
            digest = base64.b64encode(hashlib.sha256(request.content).digest()).decode()
            request.headers["Content-Digest"] = f"sha-256=:{digest}:"
            lines.append(f'"content-digest": sha-256=:{digest}:')
            covered += ' "content-digest"'
        nonce = secrets.token_hex(16)
        parameters = f'({covered});created={int(time.time())};nonce="{nonce}";keyid="default"'
        base = "\n".join([*lines, f'"@signature-params": {parameters}'])
        signature = base64.b64encode(hmac.digest(KEY, base.encode(), "sha256")).decode()
        request.headers["Signature-Input"] = f"sig1={parameters}"
        request.headers["Signature"] = f"sig1=:{signature}:"
        yield request


def a_key() -> str:
    return base64.b64encode(secrets.token_bytes(32)).decode()


def main() -> None:
    client = AuthenticatedClient(
        os.environ["GATEWAY_URL"],
        token="that of the metrics",
        verify_ssl=ssl.create_default_context(cafile=os.environ["GATEWAY_CERT"]),
        httpx_args={"auth": Signed()},
    )

    def call(operation: str, *arguments: Any, **named: Any) -> Any:
        module = importlib.import_module(f"wggw_client.api.{operation}")
        return module.sync(*arguments, client=client, **named)

    alice, bob, carol = a_key(), a_key(), a_key()
    body = m.CreatePeerBody(alice, protocol="dual", quota_bytes=3 * 10**9, label="Alice")
    created = call("peers.create_peer", body=body)
    assert (created.status, created.quota_bytes, created.label) == ("created", 3 * 10**9, "Alice")
    listed = call("peers.list_peers", status="active", limit=1)
    assert listed.configurations[0].public_key == alice
    got = call("peers.get_peer", alice)
    assert (got.assigned_ipv6, got.online) == (created.assigned_ipv6, False)
    # The text is no configuration that it could decode.
    kwargs = {"method": "get", "url": f"/api/v1/configurations/{alice.replace('/', '_')}"}
    text = client.get_httpx_client().request(**kwargs, params={"format": "wg-quick"}).text
    assert text.startswith("[Interface]")
    changed = call("peers.update_peer", alice, body=m.UpdatePeerBody(label=None))
    assert (changed.label, changed.quota_bytes) == (None, 3 * 10**9)
    rotated = call("peers.rotate_peer", alice, body=m.RotatePeerBody(bob))
    assert rotated.public_key == bob
    assert call("peers.reset_quota", bob).quota_used == 0
    for asked, said in (("suspended", "suspended"), ("active", "updated")):
        status = call("peers.set_peer_status", bob, body=m.SetPeerStatusBody(asked))
        assert status.status == said
    operations = [
        m.BatchOperation("create", carol),
        m.BatchOperation("update", bob, quota_bytes=None),
        m.BatchOperation("delete", carol),
        m.BatchOperation("delete", carol),
    ]
    results = call("peers.run_batch", body=m.RunBatchBody(operations)).results
    assert [result.status for result in results] == ["created", "updated", "deleted", 404]
    synced = call("peers.sync_peers", body=[m.DesiredPeer(bob)], dry_run=True)
    assert (synced.status, synced.unchanged) == ("dry_run", 1)
    [change] = call("peers.list_changes", after=0, wait=1).changes
    assert (change.deleted, change.configuration.public_key) == (False, bob)
    assert call("peers.list_usage").usage == []
    assert call("gateway.get_ip_usage").ipv6.total == 2**64 - 2
    assert call("gateway.sync_ips").status == "synced"
    health = call("gateway.get_status")
    assert (health.status, health.remote_copy) == ("healthy", None)
    assert call("gateway.get_server_metrics").wireguard.total_peers == 1
    assert call("gateway.get_obfuscation").parameters_version == 1
    spoken = call("gateway.rotate_obfuscation", body=m.RotateObfuscationBody(confirm=True))
    assert spoken.parameters_version == 2
    snapshot = call("gateway.export_snapshot").payload
    assert snapshot.read(15) == b"SQLite format 3"
    snapshot.seek(0)
    assert call("gateway.import_snapshot", body=File(snapshot)).total_peers == 1
    assert call("peers.delete_peer", bob).status == "deleted"
    problem = call("peers.delete_peer", bob)
    assert isinstance(problem, m.Problem) and problem.status == 404
    assert "wggw_peers" in call("monitoring.get_metrics")
    assert call("monitoring.get_health").status == "alive"
    assert call("monitoring.get_readiness").status == "ready"
    assert call("monitoring.get_openapi").additional_properties["openapi"] == "3.1.0"


main()
