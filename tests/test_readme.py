"""The README is true: its shell blocks run as written, its tables are the code's.

All blocks but one run, in order, on a machine of private namespaces (see sandbox.py) with a clean
copy of the tree: the installation in the background, then "A first peer" in one shell, as somebody
would paste it into a second terminal. `sudo` is there a shim that only runs its arguments.
The block `tests/run` is not executed: the run that contains this test is that very command, and it
would run itself again. Instead the file must be executable and say what it does.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT, GatewayProcess, a_key
from sandbox import machine

import wggw

README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(?:sh|bash)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
INSTALL, *FIRST_PEER, TESTS = BLOCKS
NO_LOSS = re.compile(r" 0% packet loss")


def cells(text: str) -> list[list[str]]:
    """The cells of a text's tables that begin with code; backquotes are taken away."""
    rows = [line for line in text.splitlines() if re.match(r"\| [A-Z`]", line)]
    return [[cell.strip().strip("`") for cell in row.strip("|").split(" | ")] for row in rows]


def test_settings_are_documented_as_the_code_has_them() -> None:
    documented = [row[:3] for row in cells((ROOT / "docs/SETTINGS.md").read_text("utf-8"))]
    table = [
        [row.name, "required" if row.required else row.default or "–", row.accepts]
        for row in wggw.SETTINGS
    ]
    assert sorted(documented) == sorted(table)


def test_api_table_is_the_route_table() -> None:
    documented = sorted((row[0], row[1]) for row in cells(README) if row[1].startswith("/"))
    assert documented == sorted((route.method, route.template) for route in wggw.ROUTES)


def test_who_writes_a_client_needs_a_key_and_nothing_else(tmp_path: Path) -> None:
    line = re.search(r"`(GATEWAY_API_KEY=\S+ WG_BACKEND=memory) python3 (wggw.py serve)`", README)
    assert line
    (tmp_path / "wggw.py").symlink_to(ROOT / "wggw.py")
    gateway = GatewayProcess(tmp_path)
    gateway.settings = {"API_PORT": str(gateway.port)}
    gateway.program = ["sh", "-c", f"exec env {line[1]} {sys.executable} {line[2]}"]
    key_file = Path(wggw.DEFAULT_KEY_FILE)
    before = key_file.exists() and key_file.stat()
    try:
        client = gateway.start().client("0123456789abcdef")
        assert client.create(a_key(1)).status == 200
        assert gateway.stop() == 0
    finally:
        gateway.close()
    assert "wg0: the private key is temporary" in gateway.text()
    assert (key_file.exists() and key_file.stat()) == before


def test_shell_blocks_are_all_known() -> None:
    assert README.count("```") == 2 * len(BLOCKS)
    assert (INSTALL, TESTS) == ("sudo ./install.sh --foreground\n", "tests/run\n")


def test_test_command_is_there() -> None:
    done = subprocess.run(
        [ROOT / "tests/run", "--help"], capture_output=True, text=True, check=True
    )
    assert "Without an option: ruff, mypy, shellcheck" in done.stdout


def test_it_is_short() -> None:
    assert len(README.splitlines()) < 200


def test_files_and_options_that_it_names_exist() -> None:
    for target in re.findall(r"\]\((?!https:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    known = subprocess.run(
        [ROOT / "install.sh", "--help"], capture_output=True, text=True, check=True
    )
    assert "docs/SETTINGS.md" in README
    for option in ("--foreground", "--endpoint", "--backend"):
        assert option in README
        assert option in known.stdout


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCED = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
TYPED = re.compile(r"(?:.*&& (?:exec )?)?(?:wggw|python3 wggw\.py) ([^|>&#]+)", re.DOTALL)


def typed(text: str) -> list[list[str]]:
    """The program's arguments wherever a document has something to type: in a span or a block."""
    blocks = [block.replace("\\\n", " ") for block in FENCED.findall(text)]
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`([^`]+)`", FENCED.sub("", text))
    return [shlex.split(match[1]) for line in lines if (match := TYPED.match(line))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_of_the_documents_are_the_programs(path: Path) -> None:
    for line in typed(path.read_text("utf-8")):
        try:
            wggw.make_parser().parse_args(line)
        except SystemExit as end:
            assert end.code == 0, line  # --version


HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """What links may name in a document, as GitHub makes it from the headings."""
    text = FENCED.sub("", path.read_text("utf-8"))
    return {re.sub(r"[^\w\- ]", "", h).replace(" ", "-").lower() for h in HEADING.findall(text)}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_headings_that_links_name_exist(path: Path) -> None:
    for target, heading in re.findall(r"\]\((?!https:)([^)#]*)#([^)]+)\)", path.read_text("utf-8")):
        assert heading in anchors((path.parent / target) if target else path), (target, heading)


def test_every_command_is_in_the_list() -> None:
    listed = {line[0] for line in typed((ROOT / "docs/COMMANDS.md").read_text("utf-8"))}
    [group] = [a for a in wggw.make_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    assert listed == set(group.choices)


@pytest.mark.real
def test_every_block_runs_as_written(tmp_path: Path) -> None:
    with machine(tmp_path, whole=True) as host:
        install = host.start(INSTALL.strip())
        install.wait_text(">laptop.conf")
        marked = [f"{block}\necho '@@@'" for block in FIRST_PEER]
        done = host.run("set -e\n" + "\n".join(marked), 120)
        assert done.returncode == 0, done.stdout + install.text()
        added, deleted, status, create, ping, suspend, _ = done.stdout.split("@@@\n")
        assert "laptop" in added and "10.0.1.2" in added
        assert "laptop" in deleted
        assert json.loads(status)["status"] == "healthy"
        created_line, config = create.split("\n", 1)
        created = json.loads(created_line)
        assert (created["status"], created["assigned_ip"]) == ("created", "10.0.1.3")
        assert f"PublicKey = {created['server_public_key']}\n" in config
        assert len(NO_LOSS.findall(ping)) == 2, ping
        assert " 100% packet loss" in suspend
        assert "suspended: no answer, as it should be\n" in suspend
        assert suspend.count(" 3 received,") == 1, suspend
        assert json.loads(suspend.splitlines()[-1]) == {"status": "deleted"}
        assert host.output("wg show wg0 peers; ip netns list; ls | grep client || true") == ""
        assert host.output("cd / && python3 ~/wggw/wggw.py status").startswith("healthy: wggw ")
        install.signal("INT")
        assert install.wait() == 0
