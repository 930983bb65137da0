"""Every program in docs/HMAC_AUTHENTICATION.md runs as written, against a live gateway."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness import API_KEY, ROOT, GatewayProcess
from test_interop import MODULES, need_npm

import wggw

TEXT = (ROOT / "docs/HMAC_AUTHENTICATION.md").read_text("utf-8")
SECURITY = (ROOT / "docs/SECURITY.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def command(language: str, path: Path) -> list[str]:
    """How a block is run; skips where its tool is not installed."""
    if language == "javascript":
        need_npm()
    programs = {
        "sh": "curl",
        "go": "go",
        "javascript": "node",
        "php": "php",
        "python": sys.executable,
    }
    if shutil.which(programs[language]) is None:
        pytest.skip(f"needs {programs[language]}")
    return {
        "sh": ["sh", "-eu", str(path)],
        "go": ["go", "run", str(path)],
        "javascript": ["node", str(path)],
        "php": ["php", str(path)],
        "python": [sys.executable, str(path)],
    }[language]


@pytest.mark.parametrize(
    "number",
    [  # the compiler takes half a minute
        pytest.param(number, id=language, marks=[pytest.mark.long] if language == "go" else [])
        for number, (language, _) in enumerate(BLOCKS)
    ],
)
def test_block_runs_as_written(shared: GatewayProcess, tmp_path: Path, number: int) -> None:
    language, text = BLOCKS[number]
    path = tmp_path / f"example.{ {'javascript': 'js'}.get(language, language) }"
    path.write_text(text)
    key = tmp_path / "api.key"
    key.write_text(API_KEY + "\n")
    key.chmod(0o600)
    (tmp_path / "wggw.py").symlink_to(ROOT / "wggw.py")
    done = subprocess.run(
        command(language, path),
        env={
            "PATH": os.environ["PATH"],
            "HOME": os.environ.get("HOME", str(tmp_path)),
            "NODE_PATH": str(MODULES),
            "GATEWAY_URL": f"https://127.0.0.1:{shared.port}",
            "GATEWAY_KEY_FILE": str(key),
            "GATEWAY_CERT": str(shared.directory / "cert.pem"),
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    [shown] = re.findall(r"public_key\W+([A-Za-z0-9+/]{43}=)", text)
    assert shown in done.stdout
    assert re.search(r"""["']status["']: ?["']created["']""", done.stdout), done.stdout
    scheme = "legacy" if "body_length" in text else "rfc9421"
    metrics = shared.client().raw("GET", "/metrics", b"", {}).body.decode()
    assert f'wggw_signed_requests_total{{scheme="{scheme}",key_id="default"}}' in metrics


def test_both_schemes_and_every_language_are_there() -> None:
    assert [language for language, _ in BLOCKS] == [
        "sh",  # wggw call
        *("sh", "python", "javascript", "go", "php"),
        *("sh", "python"),
        "python",  # that tries again
    ]


def test_words_of_refusals_are_the_codes() -> None:
    source = (ROOT / "wggw.py").read_text()
    told = re.findall(r"^\| (?:401|503) `([^`…]+)", TEXT, re.MULTILINE)
    assert len(told) == 4
    assert [words for words in told if words.strip() not in source] == []


@pytest.mark.parametrize("text", [TEXT, SECURITY], ids=["HMAC_AUTHENTICATION", "SECURITY"])
def test_settings_metrics_and_files_that_it_names_exist(text: str) -> None:
    names = {setting.name for setting in wggw.SETTINGS}
    examples = {"GATEWAY_URL", "GATEWAY_KEY_FILE", "GATEWAY_CERT", "CAP_NET_ADMIN"}
    named = set(re.findall(r"`([A-Z]+_[A-Z_]+)[`=]", text)) - examples
    assert named and named <= names
    source = (ROOT / "wggw.py").read_text()
    for metric in re.findall(r"wggw_[a-z_]+", text):
        assert metric in source
    for target in re.findall(r"\]\((?!https:)([^)#]+)\)", text):
        assert (ROOT / "docs" / target).exists(), target


def test_json_of_the_key_setting_is_what_it_parses() -> None:
    [example] = re.findall(r"GATEWAY_API_KEYS=(\{.*?\})", TEXT)
    assert list(json.loads(example)) == ["2026-07"]
