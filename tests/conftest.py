"""Fixtures of all levels. Python looks for wggw.py and the shared modules beside the tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from harness import Client, GatewayProcess, running  # noqa: E402


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[GatewayProcess]:
    """A running gateway with the memory backend."""
    with running(tmp_path) as process:
        yield process


@pytest.fixture
def client(gateway: GatewayProcess) -> Iterator[Client]:
    connection = gateway.client()
    yield connection
    connection.close()
