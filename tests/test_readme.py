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
from pathlib import Path

import pytest
from harness import ROOT
from sandbox import machine

import wggw

README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(?:sh|bash)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
INSTALL, TESTS, *FIRST_PEER = BLOCKS
NO_LOSS = re.compile(r" 0% packet loss")


def table(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its head; backquotes are taken away."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip().strip("`") for cell in row.strip("|").split(" | ")] for row in rows]


def test_settings_table_is_the_codes() -> None:
    documented: dict[str, str] = {}
    for names, values, *_ in table("Settings"):  # several in a row: a default each, or one for all
        each = re.findall(r"[A-Z0-9_]+", names)
        given = values.split("`, `") if len(each) == values.count("`, `") + 1 else [values]
        documented |= dict(zip(each, given * (len(each) // len(given)), strict=True))
    defaults = {
        setting.name: "required" if setting.required else setting.default or "–"
        for setting in wggw.SETTINGS
    }
    assert documented == defaults


def test_api_table_is_the_route_table() -> None:
    documented = sorted((row[0], row[1]) for row in table("API"))
    assert documented == sorted((route.method, route.template) for route in wggw.ROUTES)


def test_shell_blocks_are_all_known() -> None:
    assert README.count("```") == 2 * len(BLOCKS)
    assert (INSTALL, TESTS) == ("sudo ./install.sh --foreground\n", "tests/run\n")


def test_test_command_is_there() -> None:
    done = subprocess.run(
        [ROOT / "tests/run", "--help"], capture_output=True, text=True, check=True
    )
    assert "Without an option: ruff, mypy, shellcheck" in done.stdout


def test_signer_is_the_one_that_the_installer_prints() -> None:
    signer = re.compile(r"^sign\(\) \{.*?^\}$", re.DOTALL | re.MULTILINE)
    [readme], [installer] = (
        signer.findall(README),
        signer.findall((ROOT / "install.sh").read_text()),
    )
    assert readme == installer


def test_it_is_short() -> None:
    assert len(README.splitlines()) < 200


def test_files_and_options_that_it_names_exist() -> None:
    for target in re.findall(r"\]\((?!https:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    known = subprocess.run(
        [ROOT / "install.sh", "--help"], capture_output=True, text=True, check=True
    )
    for option in ("--foreground", "--endpoint", "--backend"):
        assert option in README
        assert option in known.stdout


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCED = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
TYPED = re.compile(r"(?:.*&& (?:exec )?)?(?:wggw|python3 wggw\.py) ([^|>&#]+)", re.DOTALL)


def typed(text: str) -> list[list[str]]:
    """The program's arguments wherever a document has something to type: in a span or a block."""
    lines = [line for block in FENCED.findall(text) for line in block.splitlines()]
    lines += re.findall(r"`([^`]+)`", FENCED.sub("", text))
    return [shlex.split(match[1]) for line in lines if (match := TYPED.match(line))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_of_the_documents_are_the_programs(path: Path) -> None:
    for line in typed(path.read_text("utf-8")):
        try:
            wggw.make_parser().parse_args(line)
        except SystemExit as end:
            assert end.code == 0, line  # --version


def test_every_command_is_in_the_list() -> None:
    listed = {line[0] for line in typed((ROOT / "docs/COMMANDS.md").read_text("utf-8"))}
    [group] = [a for a in wggw.make_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    assert listed == set(group.choices)


@pytest.mark.real
def test_every_block_runs_as_written(tmp_path: Path) -> None:
    with machine(tmp_path) as host:
        install = host.start(INSTALL.strip())
        install.wait_text("\nEND\n")
        marked = [f"{block}\necho '@@@'" for block in FIRST_PEER]
        done = host.run("set -e\n" + "\n".join(marked), 120)
        assert done.returncode == 0, done.stdout + install.text()
        status, create, ping, suspend, _ = done.stdout.split("@@@\n")
        assert json.loads(status)["status"] == "healthy"
        created_line, config = create.split("\n", 1)
        created = json.loads(created_line)
        assert (created["status"], created["assigned_ip"]) == ("created", "10.0.1.2")
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
