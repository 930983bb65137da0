"""A gateway inside the test's process, with a real interface in the test's namespace.

For tests that move its clock, shorten its timeouts, or look between two of its steps.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fakes import do
from harness import API_KEY
from netns import Topology, Tunnel

import wggw


class Inside:
    """A gateway with a wireguard-go (or kernel) interface and a clock that can be moved on."""

    def __init__(self, topology: Topology, directory: Path, **settings: str) -> None:
        self.ahead = 0.0
        self.topology = topology
        environment = {
            "GATEWAY_API_KEY": API_KEY,
            "WG_INTERFACE": topology.interface,
            "WG_IPV4_SUBNET": topology.SUBNETS[0],
            "WG_IPV6_SUBNET": topology.SUBNETS[1],
            "WG_ENDPOINT": topology.ENDPOINT,
            "WG_PRIVATE_KEY_FILE": str(directory / "privatekey"),
            "DB_PATH": str(directory / "wireguard.db"),
            **settings,
        }
        self.config = wggw.load_config(environment)
        self.files, self.store, lock = wggw.open_files(self.config), wggw.Store(), threading.RLock()

        def run(function: Callable[[], Any], /) -> Any:
            with lock:
                return function()

        self.gateway = wggw.Gateway(self.config, self.store, self.files, self.clock, run)
        self.store.take(self.files.load())
        [row] = wggw.interface_settings(self.config)
        private_key = wggw.load_private_key(row)
        self.store.private_keys[row.name] = wggw.encode_key(private_key)
        self.files.begin(self.store)
        link = wggw.make_link(row, private_key)
        self.backend = wggw.open_backend(self.config.wg_backend, link)
        self.gateway.start([(row, link, self.backend)])
        self.name = link.name

    def clock(self) -> float:
        return time.time() + self.ahead

    def close(self) -> None:
        self.gateway.close()
        self.backend.close()
        self.files.journal.close()

    def connect(self, number: int) -> Tunnel:
        """A new peer whose tunnel carries traffic."""
        tunnel = self.topology.tunnel(number)
        do(self.gateway, "create", public_key=tunnel.public_key, protocol="dual")
        view = self.gateway.view()
        shown = self.gateway.run(lambda: self.store.configurations.show(tunnel.public_key, view))
        tunnel.connect(json.loads(shown or "null"))
        assert tunnel.ping(Topology.GATEWAY[0], count=1) == {Topology.GATEWAY[0]: 1}
        return tunnel
