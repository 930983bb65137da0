"""Inside the guest, in a namespace of its own: all that a node without a disk finds on the wire.

rest of the guest: the node             namespace "world"
eth0 192.0.2.1 ------------------------ far 192.0.2.9: settings (http), the store (https), a backend

What the store holds is kept on the host from one boot to the next. Prints one line for each step.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pickle
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

sys.path.insert(0, "/tree/tests")

from harness import Client, a_key, wait_for
from objects import TlsStore

HOST, OBJECTS, PEERS = Path("/host"), Path("/host/objects"), 20
US = "192.0.2.9"


def serve(server: Any) -> None:
    threading.Thread(target=server.serve_forever, daemon=True).start()


def used_memory() -> tuple[float, float]:
    """Of the node and of all that there is, in MB; this process does not count."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    own = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024
    used = kilobytes["MemTotal"] - kilobytes["MemAvailable"] - own
    return used / 1024, kilobytes["MemTotal"] / 1024


def is_ready(api: Client) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        return api.raw("GET", "/readyz", b"", {}).status == 200
    return False


def main() -> None:
    os.chdir(HOST)
    serve(ThreadingHTTPServer((US, 8080), SimpleHTTPRequestHandler))
    store = TlsStore(HOST / "store.pem", HOST / "store.key", (US, 8443))
    if OBJECTS.exists():
        store.objects.update(pickle.loads(OBJECTS.read_bytes()))
    serve(store)
    api = Client(8000, "192.0.2.1")
    wait_for(lambda: is_ready(api), 300, "the node")
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    print(f"ready {uptime:.1f} s {used_memory()[0]:.0f} of {used_memory()[1]:.0f} MB", flush=True)
    rows = api.send("GET", "/api/v1/configurations/?limit=100").json["configurations"]
    state = {row["public_key"]: row["assigned_ip"] for row in rows}
    shown = api.send("GET", "/api/v1/server/status").json
    key = shown["interfaces"][0]["public_key"]
    print("state " + json.dumps({"peers": state, "key": key}), flush=True)
    for number in range(len(state), PEERS):
        assert api.create(a_key(number)).status == 200

    def is_even() -> bool:
        copy = api.send("GET", "/api/v1/server/status").json["remote_copy"]
        return copy["number"] >= PEERS and copy["lag_records"] == 0

    wait_for(is_even, 120, "the copy")
    OBJECTS.write_bytes(pickle.dumps(store.objects))
    print("copied", flush=True)
    threading.Event().wait()


main()
