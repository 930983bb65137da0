"""Fixtures of all levels. Python looks for wggw.py and the shared modules beside the tests."""

from __future__ import annotations

import contextlib
import gc
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# What is imported and collected stays: no collection looks at it, neither now nor amid the tests.
gc.disable()

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS.parent), str(TESTS / "real")]

from forked import Parent  # noqa: E402
from harness import LONG, PARENT, ROOT, Client, GatewayProcess, running  # noqa: E402

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
    "test_install.py",
    "test_remote_serve.py",
    "test_readme.py",
    "test_ownership.py",
    "test_obfuscated.py",
    "test_tunnel.py",
    "test_clients.py",
    "test_growth_of_parsers.py",
    "test_doctor_hosts.py",
    "test_service_classes.py",
    "test_network.py",
    "test_order.py",
    "test_histories.py",
    "test_storm.py",
    "test_kill.py",
    "test_restart.py",
    "test_cli.py",
    "test_fit.py",
    "test_journal.py",
    "test_check.py",
    "test_remote.py",
    "test_import.py",
    "test_answers_only_when_disk_and_interface_have_it.py",
    "test_acknowledged_is_never_taken_back.py",
    "test_disk_faults.py",
    "test_fuzz.py",
    "test_schemathesis.py",
)
# What shows nothing of the Python that runs it: of several, only the first does.
ONCE = (
    "test_api_docs.py",
    "test_clients.py",
    "test_deployment_docs.py",
    "test_docs_auth.py",
    "test_install.py",
    "test_interop.py",
    "test_readme.py",
    "test_schemathesis.py",
)
RANK = {name: rank for rank, name in enumerate(FIRST)}
LEFT_OUT = pytest.StashKey[int]()  # the number of long tests


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In the order of FIRST; without long tests, unless LONG or the command line names the file."""
    named = {Path(argument.partition("::")[0]).resolve() for argument in config.args}
    left_out = [
        item
        for item in items
        if item.get_closest_marker("long") and not LONG and item.path not in named
    ]
    for item in items:
        if item.path.name in ONCE:
            item.add_marker(pytest.mark.once)
    config.stash[LEFT_OUT] = len(left_out)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    items.sort(key=lambda item: RANK.get(item.path.name, len(FIRST)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """The parent of all gateways is made here: made in a test, it could end with its namespace."""
    gc.freeze()
    gc.enable()
    if session.items and not session.config.option.collectonly:
        PARENT.append(Parent(str(ROOT)))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Of xdist, only the workers collect: each tells the run how many it left out."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if number := config.stash.get(LEFT_OUT, 0):
        terminalreporter.line(f"{number} long tests were left out; WGGW_LONG=1 runs them, too")


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
def shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayProcess]:
    """One gateway for all tests of a module that leave behind nothing which others would meet.

    The module says with SHARED_SETTINGS what differs from the defaults.
    """
    settings = getattr(request.module, "SHARED_SETTINGS", {})
    with running(tmp_path_factory.mktemp("shared"), **settings) as process:
        yield process


@pytest.fixture
def shared_client(shared: GatewayProcess) -> Iterator[Client]:
    with contextlib.closing(shared.client()) as connection:
        yield connection
