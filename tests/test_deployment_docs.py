"""docs/DEPLOYMENT.md and RAM_BASED.md: what needs no guest; the commands by hand run in one."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml  # a dependency of schemathesis
from harness import API_KEY, ROOT
from sandbox import machine

import wggw

TEXT = (ROOT / "docs/DEPLOYMENT.md").read_text()
IN_MEMORY = (ROOT / "docs/RAM_BASED.md").read_text()
INSTALL = (ROOT / "install.sh").read_text()
PACKAGES = set(re.findall(r"^  \[.*\]=([a-z0-9-]+)$", INSTALL, re.MULTILINE))


def block(heading: str, text: str = TEXT) -> str:
    found = re.search(r"^```\w+\n(.*?)^```", text.split(f"\n## {heading}\n", 1)[1], re.M | re.S)
    assert found
    return found[1]


def options_of(command: str) -> list[str]:
    words = shlex.split(command[command.index("install.sh") :], comments=True)
    return [word for word in words if word.startswith("--")]


def known_options() -> set[str]:
    shown = subprocess.run(
        [ROOT / "install.sh", "--help"], capture_output=True, text=True, check=True
    )
    return set(re.findall(r"--[a-z0-9-]+", shown.stdout))


@pytest.fixture(scope="module")
def tasks() -> Any:
    (play,) = yaml.safe_load(block("Ansible"))
    assert play["become"] is True
    return play["tasks"]


def test_installing_commands_have_options_that_exist(tasks: Any) -> None:
    commands = [line for line in TEXT.splitlines() if line.startswith("sudo ./install.sh")]
    commands += [
        re.sub(r"{{.*?}}", "x", task["ansible.builtin.command"]["cmd"])
        for task in tasks
        if "ansible.builtin.command" in task
    ]
    commands += [
        line for line in yaml.safe_load(block("cloud-init"))["runcmd"] if "install.sh" in line
    ]
    assert len(commands) == 6
    for command in commands:
        assert set(options_of(command)) <= known_options(), command


def test_what_holds_the_key_is_hidden(tasks: Any) -> None:
    (key,) = [task for task in tasks if "vault_wggw_api_key" in str(task)]
    assert key["no_log"]
    (run,) = [t for t in tasks if "install.sh" in str(t.get("ansible.builtin.command"))]
    assert "--key-file" in run["ansible.builtin.command"]["cmd"]  # so that nothing tells it
    (install,) = [c for c in yaml.safe_load(block("cloud-init"))["runcmd"] if "install.sh" in c]
    assert install.startswith("umask 077; ")
    assert install.endswith(" >/root/wggw.json")


def test_packages_are_those_of_install_sh() -> None:
    assert set(yaml.safe_load(block("cloud-init"))["packages"]) == PACKAGES
    first = block("By hand").splitlines()[0]
    assert set(first.split("--no-install-recommends ")[1].split()) <= PACKAGES


def test_launcher_by_hand_is_that_of_install_sh() -> None:
    launcher = re.search(r"<<END \|\| true\n(#!.*?)^END$", INSTALL, re.M | re.S)
    assert launcher
    text = launcher[1].replace("$PYTHON", "/usr/bin/python3").replace("$LIB", "/usr/local/lib/wggw")
    assert f"<<'END'\n{text}END\n" in block("By hand")


def test_settings_by_hand_are_good() -> None:
    text = block("By hand").split("<<END\n", 1)[1].split("END\n", 1)[0]
    values = wggw.read_env_file(text.replace("$(openssl rand -hex 32)", "a" * 64), "by hand")
    config = wggw.load_config(values, os.devnull)
    assert config.db_path == "/var/lib/wggw/wireguard.db"


def test_what_the_table_closes_whatever_the_settings_is_said() -> None:
    config = wggw.load_config({"GATEWAY_API_KEY": API_KEY, "WG_ISOLATE": "false"}, os.devnull)
    table = wggw.render_ruleset(config, wggw.interface_settings(config))
    assert "ct state new drop" in table
    said = " ".join(TEXT.split("\n## What the service may do\n")[1].split("\n## ")[0].split())
    assert "A port that the host forwards to a client" in said
    assert "routed global subnet cannot be reached from outside" in said


def test_a_node_in_memory_is_explained_once() -> None:
    assert "(RAM_BASED.md)" in TEXT
    assert "wggw.py serve" not in TEXT
    assert IN_MEMORY.count("wggw.py serve") == 1


@pytest.mark.real
def test_a_node_in_memory_starts_as_written(tmp_path: Path) -> None:
    with machine(tmp_path, whole=True) as host:
        (host.bin / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (host.bin / "python3").chmod(0o755)
        host.output("mkdir /mnt/state")
        (tmp_path / "node").write_text(block("Start it", IN_MEMORY).replace("…", API_KEY))
        node = host.start("bash ../node")
        node.wait_text("ready on 0.0.0.0 port 8000")
        kept = host.output("ls /mnt/state").split()
        assert {"privatekey", "wireguard.db", "wireguard.db.journal"} <= set(kept)
        assert "masquerade" in host.output("nft list table inet wggw")
        host.output("kill -INT $(pgrep -f '[i]mport wggw')")  # the loop around it ends with it
        assert node.wait() == 0
