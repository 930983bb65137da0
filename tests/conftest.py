"""Fixtures of all levels. Python looks for wggw.py and the shared modules beside the tests."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from harness import Client, GatewayProcess, running  # noqa: E402

with contextlib.suppress(ImportError):  # guests do without
    from hypothesis import HealthCheck, settings

    # An example that takes long says that the machine is busy, and nothing of the program.
    settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("busy")

# The files that wait longest. They begin first: begun last, one would have the others wait for it.
FIRST = (
    "test_obfuscated.py",
    "test_tunnel.py",
    "test_install.py",
    "test_hostile.py",
    "test_readme.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in FIRST)


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
