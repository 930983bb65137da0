"""Fixtures of all levels. Python looks for wggw.py and the shared modules beside the tests."""

from __future__ import annotations

import contextlib
import signal
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

# Tests interrupt programs. A run in the background of a shell ignores SIGINT, and programs that are
# started from it would, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The files that take longest, in the order in which they begin: begun last, one would have the
# others wait for it.
FIRST = (
    "test_ownership.py",
    "test_tunnel.py",
    "test_obfuscated.py",
    "test_service_classes.py",
    "test_remote_serve.py",
    "test_answers_only_when_disk_and_interface_have_it.py",
    "test_disk_faults.py",
    "test_hung.py",
    "test_readme.py",
    "test_cli.py",
    "test_connections.py",
    "test_remote.py",
    "test_drift.py",
    "test_install.py",
    "test_kill.py",
    "test_storm.py",
    "test_hostile.py",
)
RANK = {name: rank for rank, name in enumerate(FIRST)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: RANK.get(item.path.name, len(FIRST)))


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[GatewayProcess]:
    """A running gateway with the memory backend."""
    with running(tmp_path) as process:
        yield process


@pytest.fixture
def client(gateway: GatewayProcess) -> Iterator[Client]:
    with contextlib.closing(gateway.client()) as connection:
        yield connection


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """The same for all tests of a module that leave behind nothing which others would meet."""
    with running(tmp_path_factory.mktemp("shared")) as process:
        yield process


@pytest.fixture
def shared_client(shared: GatewayProcess) -> Iterator[Client]:
    with contextlib.closing(shared.client()) as connection:
        yield connection
