"""Clients that generators make of /openapi.json compile, and make every call.

In .ci/run only (WGGW_LONG=1); `tests/run --full` installs the generators. Without one, skipped.
The programs are in tests/clients/, each with a signing hook; the gateway's own counters tell which
routes answered 200.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import API_KEY, LONG, ROOT, GatewayProcess, running

import wggw

pytestmark = pytest.mark.skipif(not LONG, reason="generated clients: with WGGW_LONG=1 only")

TOOLS = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wggw-tests/clients"
PIP, NPM, GO = TOOLS / "pip/bin", TOOLS / "npm/node_modules", TOOLS / "go"
GUZZLE = Path("/usr/share/php/GuzzleHttp/autoload.php")

# What must be there; what makes the client of api.json, compiles it and makes the calls.
CLIENTS: dict[str, tuple[list[Path | str], str]] = {
    "go": (
        ["go", GO / "oapi-codegen"],
        f"""{GO}/oapi-codegen -config go.yaml -o wggw/wggw.go api.json
        go mod init calls
        go mod tidy
        go run calls.go""",
    ),
    "py": (
        [PIP / "openapi-python-client"],
        f"""{PIP}/openapi-python-client generate --path api.json --config py.yaml --meta none
            --output-path wggw_client
        {PIP}/python calls.py""",
    ),
    "ts": (
        ["node", NPM / "openapi-typescript"],
        f"""ln -s {NPM} node_modules
        {NPM}/.bin/openapi-typescript api.json -o wggw.d.ts
        {NPM}/.bin/tsc -p ts.json
        node calls.js""",
    ),
    "php": (
        ["java", "php", GUZZLE, PIP / "openapi-generator-cli"],
        f"""{PIP}/openapi-generator-cli generate -g php -i api.json -o wggw
        php calls.php""",
    ),
}
FILES = {
    "go.yaml": "package: wggw\ngenerate: {models: true, client: true}\n"
    "output-options: {nullable-type: true}\n",
    "py.yaml": "literal_enums: true\n",
    "ts.json": '{"compilerOptions": {"strict": true, "target": "es2022", "module": "nodenext"},'
    ' "files": ["calls.ts"]}',
    "package.json": '{"type": "module"}',
}


def run(command: str, directory: Path, **environment: str) -> str:
    """Its output, when it went well."""
    done = subprocess.run(
        command.split(),
        cwd=directory,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[GatewayProcess]:
    with running(tmp_path, AWG_INTERFACE="awg0", AWG_IPV4_SUBNET="10.0.2.0/24") as process:
        yield process


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("language", CLIENTS)
def test_a_generated_client_makes_every_call(gateway: GatewayProcess, language: str) -> None:
    needed, commands = CLIENTS[language]
    missing = [str(n) for n in needed if not shutil.which(n) and not Path(n).exists()]
    if missing:
        pytest.skip(f"no client is made for {language}: {', '.join(missing)} is not there")
    directory = gateway.directory / "client"
    directory.mkdir()
    (directory / "wggw").mkdir()
    (directory / "api.json").write_bytes(wggw.openapi_document())
    (directory / "api.key").write_text(API_KEY)
    shutil.copy(ROOT / f"tests/clients/calls.{language}", directory)
    for name, text in FILES.items():
        (directory / name).write_text(text)
    cert = str(gateway.directory / "cert.pem")
    for command in re.split(r"\n {8}(?! )", commands):
        run(
            command,
            directory,
            GATEWAY_URL=f"https://127.0.0.1:{gateway.port}",
            GATEWAY_KEY_FILE=str(directory / "api.key"),
            GATEWAY_CERT=cert,
            NODE_EXTRA_CA_CERTS=cert,
        )
    metrics = gateway.client().raw("GET", "/metrics", b"", {}).body.decode()
    row = r'wggw_http_requests_total\{method="(\w+)",route="([^"]+)",status="200"\}'
    assert set(re.findall(row, metrics)) == {(r.method, r.template) for r in wggw.ROUTES}


@pytest.mark.parametrize("linter", ["redocly", "spectral"])
def test_linters_have_no_warning(tmp_path: Path, linter: str) -> None:
    program = NPM / ".bin" / linter
    if not program.exists():
        pytest.skip(f"{linter} is not there")
    (tmp_path / "api.json").write_bytes(wggw.openapi_document())
    (tmp_path / "rules.yaml").write_text("extends: spectral:oas\n")
    options = {"redocly": "", "spectral": "--fail-severity hint -r rules.yaml"}[linter]
    told = run(f"{program} lint {options} api.json", tmp_path)
    assert "warnings" not in told, told  # redocly ends well with some
