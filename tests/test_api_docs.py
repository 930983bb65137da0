"""docs/API.md is true: its shell blocks run in order as they stand, and answer what it shows.

Its tables are those of the code: routes, fields, parameters, members, statuses, limits.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from harness import API_KEY, ROOT, running

import wggw

TEXT = (ROOT / "docs/API.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
PARAMETERS = {
    "jc": 4, "jmin": 40, "jmax": 70, "s1": 51, "s2": 117, "s3": 107, "s4": 20,
    "h1": "1392043508-1398086253", "h2": "279376732-288068107",
    "h3": "1955609617-1957403020", "h4": "684636159-688150846", "i1": "<r 53>",
}  # fmt: skip
# Those of the gateway that the page starts, and parameters that it can show.
SETTINGS = dict(re.findall(r"(A?WG_\w+)=(\S+)", BLOCKS[0][1]))
SETTINGS["AWG_PARAMS"] = json.dumps(PARAMETERS)


def commands() -> list[tuple[str, str]]:
    """The shell blocks, each with what the page shows as its answer, or nothing."""
    following = [*BLOCKS[1:], ("", "")]
    return [
        (block, "" if after[0] == "bash" else after[1])
        for (language, block), after in zip(BLOCKS, following, strict=True)
        if language == "bash"
    ]


def run_blocks(directory: Path, port: int) -> list[str]:
    """What each shell block prints. Curl fails on an error that the block does not announce."""
    lines = ['curl() { command curl "${FAILING:---fail-with-body}" "$@"; }']
    for block, _ in commands():
        lines += [
            f"FAILING={'-s' if 'answers 422' in block else ''}",
            block,
            "printf '\\n\\036\\n'",
        ]
    (directory / "api.key").write_text(API_KEY + "\n")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(lines)],
        cwd=directory,
        env={
            "PATH": os.environ["PATH"],
            "GATEWAY_URL": f"https://127.0.0.1:{port}",
            "GATEWAY_KEY_FILE": "api.key",
            "GATEWAY_CERT": str(directory / "cert.pem"),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-600:] + done.stderr
    return done.stdout.split("\n\x1e\n")[:-1]


def assert_shows(shown: Any, answered: Any) -> None:
    """What the page shows is answered; it may leave out members, and its times are any times."""
    if isinstance(shown, dict):
        for name, value in shown.items():
            assert_shows(value, answered[name])
    elif isinstance(shown, list):
        assert len(shown) == len(answered), answered
        for one, other in zip(shown, answered, strict=True):
            assert_shows(one, other)
    elif isinstance(shown, str) and re.fullmatch(r"20\d\d-.*Z", shown):
        assert re.fullmatch(r"20\d\d-.*Z", answered)
    else:
        assert shown == answered


def test_blocks_run_and_answer_what_is_shown(tmp_path: Path) -> None:
    for number, name in enumerate(("privatekey", "awg-privatekey")):
        key = bytes(range(number, number + 32))
        (tmp_path / name).write_text(base64.b64encode(key).decode() + "\n")
        (tmp_path / name).chmod(0o600)
    with running(tmp_path, **SETTINGS) as process:
        answers = run_blocks(tmp_path, process.port)
        metrics = process.client().raw("GET", "/metrics", b"", {}).body.decode()
    told = [shown for _, shown in commands()]
    assert len(answers) == len(told)
    for answer, shown in zip(answers, told, strict=True):
        if shown.startswith("["):
            assert answer == shown
        elif shown:
            assert_shows(json.loads(shown), json.loads(answer))
    assert json.loads(answers[-1])["detail"].startswith("rate_limit: is not known here")
    assert 'status="500"' not in metrics


def test_every_block_has_a_curl_command() -> None:
    assert [block for block, _ in commands() if not re.search("^curl ", block, re.MULTILINE)] == []


def test_every_route_is_named() -> None:
    for route in wggw.ROUTES:
        short = route.template.replace("/api/v1/configurations/{public_key}/", "…/")
        named = [f"`{route.method} {path}`" for path in (route.template, short)]
        if route.guard != "signed":
            named = [f"`{route.template}`"]
        elif (route.method, route.template) == ("PUT", "/api/v1/snapshot"):
            named = ["`PUT` of the same replaces the whole state"]
        assert any(name in flat() for name in named), route


def flat() -> str:
    return " ".join(TEXT.split())


def table(head: str) -> list[list[str]]:
    """The cells of the rows of the tables whose head begins so."""
    found = re.findall(rf"^\| {re.escape(head)}.*\n\|[-|]+\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    assert found, head
    return [
        [cell.strip() for cell in row.strip("|").split(" | ")]
        for rows in found
        for row in rows.splitlines()
    ]


def kind(schema: wggw.Schema) -> str:
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return " or ".join(types)


def test_fields_of_bodies_are_the_tables() -> None:
    rows = table("field | type | create")
    columns = (wggw.CREATE_FIELDS, wggw.PATCH_FIELDS, wggw.SYNC_FIELDS)
    for number, fields in enumerate(columns, 2):
        documented = {row[0].strip("`"): row[number] for row in rows if row[number] != "–"}
        assert documented == {name: rule(row) for name, row in fields.items()}
    for name, type_name, *_ in rows:
        assert type_name == kind(wggw.SYNC_FIELDS[name.strip("`")].schema).split(" or ")[0]


def rule(row: wggw.Field) -> str:
    if row.required:
        return "required"
    return "null clears" if "null" in kind(row.schema) else "yes"


def test_members_are_the_configuration_s() -> None:
    rows = [(row[0].strip("`"), row[1]) for row in table("member | type")]
    assert rows == [(name, kind(schema)) for name, schema in wggw.CONFIGURATION.items()]


@pytest.mark.parametrize(
    ("heading", "fields"),
    [
        ("List", wggw.LIST_QUERY),
        ("Follow changes", wggw.CHANGES_QUERY),
        ("Bill", wggw.USAGE_QUERY),
        ("AmneziaWG", wggw.OBFUSCATION_FIELDS),
        ("Desired state", dict.fromkeys(("dry_run", "allow_mass_delete"))),
        ("Snapshots", dict.fromkeys(("dry_run", "replace_key"))),
    ],
)
def test_parameters_are_the_tables(heading: str, fields: dict[str, wggw.Field | None]) -> None:
    [section] = re.findall(rf"^### {heading}\n(.*?)^##", TEXT, re.DOTALL | re.MULTILINE)
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", section, re.MULTILINE)
    types = {name: kind(row.schema) if row else "boolean" for name, row in fields.items()}
    assert rows == list(types.items())


def test_operations_of_a_batch_are_the_code_s() -> None:
    named = [name for row in table("`op`") for name in re.findall(r"`([a-z-]+)`", row[0])]
    assert sorted(named) == sorted(wggw.OPERATIONS)


def test_statuses_are_the_code_s() -> None:
    assert [int(row[0]) for row in table("status | meaning")] == sorted({405, *wggw.ERROR_TEXTS})


def test_limits_are_the_code_s() -> None:
    assert [row[1] for row in table("what | at most")][:-1] == [
        f"{wggw.MAX_BODY // 1024} KiB",
        f"{wggw.MAX_BATCH * 1024 // 1024:,} KiB; {wggw.MAX_BATCH:,}",
        f"{wggw.MAX_LINES >> 20} MiB; {wggw.MAX_ARRAY >> 20} MiB",
        f"{wggw.MAX_SNAPSHOT >> 20} MiB",
        f"{wggw.MAX_HEAD // 1024} KiB; {wggw.MAX_HEADERS}",
        f"{wggw.MAX_TEXT} characters",
        f"{wggw.MAX_PAGE:,}; {wggw.MAX_USAGE:,}",
        f"{wggw.MAX_GONE:,}",
        f"{wggw.CHANGES_PATIENCE} s",
    ]


def test_links_lead_somewhere() -> None:
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", line.lower()).replace(" ", "-")
        for line in re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        path, _, anchor = target.partition("#")
        assert (ROOT / "docs" / path).exists() if path else anchor in anchors, target
