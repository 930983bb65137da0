"""A gateway with an obfuscated interface, over its API; memory backend."""

from __future__ import annotations

import json
import re
import shlex
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import PROGRAM, ROOT, Client, GatewayProcess, a_key, running

import wggw

SHARED = {
    "s1": 30, "s2": 50, "s3": 20, "s4": 16,
    "h1": "100-200", "h2": "300-400", "h3": 500, "h4": "600-700",
}  # fmt: skip
PARAMS = {**SHARED, "jc": 4, "jmin": 40, "jmax": 70, "i1": "<r 30>"}
BOTH = {
    "AWG_INTERFACE": "awg0",
    "AWG_IPV4_SUBNET": "10.0.2.0/24",
    "AWG_IPV6_SUBNET": "fd42:4242:2::/64",
    "AWG_PARAMS": json.dumps(PARAMS),
    "WG_ENDPOINT": "vpn.example.org",
}
ON = {"enabled": True}
ROTATE = "/api/v1/obfuscation/rotate"
OTHER = {**PARAMS, "s1": 31, "h3": 501}


@pytest.fixture(scope="module", autouse=True)
def _certificate(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One pair for all gateways here: the first one makes it."""
    directory = tmp_path_factory.mktemp("tls")
    for name in ("cert", "key"):
        BOTH[f"TLS_{name.upper()}"] = str(directory / f"{name}.pem")


@pytest.fixture
def both(tmp_path: Path) -> Iterator[GatewayProcess]:
    with running(tmp_path, **BOTH) as process:
        yield process


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """For requests that change nothing."""
    with running(tmp_path_factory.mktemp("shared"), **BOTH) as process:
        yield process


@pytest.fixture
def api(both: GatewayProcess) -> Iterator[Client]:
    client = both.client()
    yield client
    client.close()


def ok(answer: Any) -> Any:
    assert answer.status == 200, answer
    return answer.json


def detail(answer: Any, status: int) -> str:
    assert answer.status == status, answer
    return str(answer.json["detail"])


def test_peers_go_to_the_interface_they_ask_for(api: Client) -> None:
    plain = ok(api.create(a_key("plain")))
    hidden = ok(api.create(a_key("hidden"), obfuscation=ON, protocol="dual"))
    assert (plain["interface"], plain["assigned_ip"], plain["port"]) == ("wg0", "10.0.1.2", 51820)
    assert plain["obfuscation"] is None
    assert (hidden["interface"], hidden["assigned_ip"]) == ("awg0", "10.0.2.2")
    assert hidden["assigned_ipv6"] == "fd42:4242:2::2"
    assert (hidden["port"], hidden["endpoint"]) == (51821, "vpn.example.org:51821")
    assert hidden["mtu"] == 1420 - 16
    assert hidden["server_public_key"] != plain["server_public_key"]
    shown = hidden["obfuscation"]
    assert {n: v for n, v in shown.items() if n in PARAMS} == PARAMS
    assert (shown["enabled"], shown["generation"], shown["parameters_version"]) == (True, "2.0", 1)
    # a peer that is there stays where it is, whatever is asked for
    again = ok(api.create(a_key("plain"), obfuscation=ON))
    assert (again["status"], again["interface"]) == ("exists", "wg0")
    assert ok(api.create(a_key("off"), obfuscation={"enabled": False}))["interface"] == "wg0"


def test_lists_usage_status_and_metrics_cover_both(api: Client, both: GatewayProcess) -> None:
    for number in range(3):
        ok(api.create(a_key(number), obfuscation={"enabled": number > 0}))
    listed = ok(api.send("GET", "/api/v1/configurations?interface=awg0"))["configurations"]
    assert [row["public_key"] for row in listed] == [a_key(1), a_key(2)]
    assert ok(api.send("GET", "/api/v1/ip-usage"))["ipv4"]["used"] == 3
    only = ok(api.send("GET", "/api/v1/ip-usage?interface=awg0"))["ipv4"]
    assert (only["used"], only["gateway_ip"]) == (2, "10.0.2.1")
    rows = ok(api.send("GET", "/api/v1/server/status"))["interfaces"]
    assert [(r["name"], r["total_peers"], r["parameters_version"]) for r in rows] == [
        ("wg0", 1, None),
        ("awg0", 2, 1),
    ]
    assert ok(api.send("POST", "/api/v1/sync-ips"))["unchanged"] == 3
    assert ok(api.send("POST", "/api/v1/sync-ips?interface=awg0"))["unchanged"] == 2
    assert (
        b'wggw_peers{interface="awg0",state="active"} 2' in api.raw("GET", "/metrics", b"", {}).body
    )


def test_a_clients_own_values_are_kept_and_given_back(both: GatewayProcess, api: Client) -> None:
    own = {"jc": 7, "jmin": 20, "jmax": 30, "i1": "<b 0xc0ff><rc 8>"}
    created = ok(api.create(a_key(1), obfuscation={**ON, **own, **SHARED, "i2": "<t>"}))
    assert {n: created["obfuscation"][n] for n in own} == own
    assert created["obfuscation"]["i2"] == "<t>"
    both.kill()
    both.start()
    shown = ok(both.client().get(a_key(1)))["obfuscation"]
    assert {n: shown[n] for n in own} == own
    text = both.client().get(a_key(1), "?format=wg-quick").body.decode()
    assert "\nJc = 7\nJmin = 20\nJmax = 30\nS1 = 30\n" in text
    assert "\nH1 = 100-200\n" in text
    assert "\nI1 = <b 0xc0ff><rc 8>\nI2 = <t>\n" in text
    assert text.index("Jc = ") < text.index("[Peer]")


def test_a_decoy_of_the_client_replaces_all_of_the_interfaces(api: Client) -> None:
    created = ok(api.create(a_key(1), obfuscation={**ON, "i2": "<t>"}))
    assert created["obfuscation"].get("i1", "") == ""


@pytest.mark.parametrize(
    ("values", "status", "words"),
    [
        ({"s1": 31}, 409, "S1 is 31 in the request, but 30 on the interface awg0"),
        ({"h1": "100-201"}, 409, "H1 is 100-201 in the request, but 100-200 on"),
        ({"h3": "501"}, 409, "H3 is 501 in the request, but 500 on"),
        ({"H4": 1}, 409, "H4 is 1 in the request, but 600-700 on"),
        ({"jc": 129}, 422, "obfuscation: Jc: must be"),
        ({"jmin": 71}, 422, "obfuscation: Jmin, Jmax: "),
        ({"i1": "<x>"}, 422, "obfuscation: I1: must be"),
        ({"i1": "<r 9>\nPostUp = true"}, 422, "obfuscation: I1: must be"),
    ],
)
def test_values_that_cannot_be_are_refused_and_create_nothing(
    shared: GatewayProcess, values: dict[str, Any], status: int, words: str
) -> None:
    api = shared.client()
    answer = api.create(a_key(1), obfuscation={**ON, **values})
    assert words in detail(answer, status)
    assert api.get(a_key(1)).status == 404


def test_a_different_key_is_a_409_that_shows_neither(tmp_path: Path) -> None:
    key, other = a_key("header protection"), a_key("another")
    params = {**PARAMS, "header_protection_key": key}
    with running(tmp_path, **{**BOTH, "AWG_PARAMS": json.dumps(params)}) as gateway:
        api = gateway.client()
        assert ok(api.create(a_key(1), obfuscation=ON))["obfuscation"]["generation"] == "3.0"
        answer = api.create(a_key(2), obfuscation={**ON, "header_protection_key": other})
        text = detail(answer, 409)
        assert "HeaderProtectionKey" in text
        assert key not in text + gateway.text()
        assert other not in text + gateway.text()


@pytest.mark.parametrize("asked", [ON, True])
def test_without_an_obfuscated_interface_it_is_a_503(client: Client, asked: Any) -> None:
    words = detail(client.create(a_key(1), obfuscation=asked), 503)
    assert words == "obfuscation: this gateway has no obfuscated interface"
    assert detail(client.send("GET", "/api/v1/obfuscation"), 503) == words
    assert detail(client.send("POST", ROTATE, {}), 503) == words


def test_an_obfuscated_interface_alone_takes_who_asks_for_nothing(tmp_path: Path) -> None:
    with running(tmp_path, **BOTH, WG_INTERFACE="") as gateway:
        api = gateway.client()
        created = ok(api.create(a_key(1)))
        assert (created["interface"], created["obfuscation"]["s1"]) == ("awg0", 30)
        assert "no plain" in detail(api.create(a_key(2), obfuscation={"enabled": False}), 503)


# --- parameters in the state ----------------------------------------------------------------------


def spoken(gateway: GatewayProcess) -> dict[str, Any]:
    shown: dict[str, Any] = ok(gateway.client().send("GET", "/api/v1/obfuscation"))
    return shown


def test_generated_parameters_survive_a_kill_and_differ_elsewhere(tmp_path: Path) -> None:
    settings = {name: value for name, value in BOTH.items() if name != "AWG_PARAMS"}
    seen = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        with running(tmp_path / name, **settings) as gateway:
            seen.append(spoken(gateway)["parameters"])
            gateway.kill()
            gateway.start()
            assert spoken(gateway)["parameters"] == seen[-1]
    assert seen[0]["h1"] != seen[1]["h1"]


def test_other_params_do_not_change_what_peers_speak(both: GatewayProcess) -> None:
    ok(both.client().create(a_key(1), obfuscation=ON))
    both.stop()
    both.settings["AWG_PARAMS"] = json.dumps(OTHER)
    both.start()
    assert spoken(both)["parameters"]["s1"] == 30
    assert "AWG_PARAMS differs" in both.text()
    both.stop()
    both.settings["AWG_PARAMS"] = json.dumps({**PARAMS, "jc": 9})  # cuts nobody off
    both.start()
    assert (spoken(both)["parameters"]["jc"], spoken(both)["parameters_version"]) == (9, 1)
    both.settings["AWG_PARAMS"] = json.dumps(OTHER)
    ok(both.client().delete(a_key(1)))
    both.stop()
    both.start()
    assert (spoken(both)["parameters"]["s1"], spoken(both)["parameters_version"]) == (31, 2)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ('{"s1": 20, "s2": 76}', "AWG_PARAMS: S1, S2: S1 + 148 must not be S2 + 92"),
        ('{"h1": 5, "h2": 5}', "AWG_PARAMS: H1, H2, H3, H4: "),
        ('{"x": 1}', "AWG_PARAMS: x: is not a parameter of AmneziaWG"),
        ("[1]", "AWG_PARAMS: it is not a JSON object"),
        ("{", "AWG_PARAMS: its value (not shown) is not JSON"),
        ("/nonexistent/params.json", "AWG_PARAMS: '/nonexistent/params.json' cannot be read"),
    ],
)
def test_bad_parameters_are_refused_by_name(params: str, words: str) -> None:
    with pytest.raises(wggw.ConfigError, match=f"^{re.escape(words)}"):
        wggw.read_parameters(params)


def test_bad_parameters_stop_the_start(tmp_path: Path) -> None:
    gateway = GatewayProcess(tmp_path, **{**BOTH, "AWG_PARAMS": '{"s4": 200}'})
    assert gateway.spawn().wait(60) == 2
    assert "AWG_PARAMS: S4: WG_MTU 1420 less S4" in gateway.text()
    assert "Traceback" not in gateway.text()


def test_parameters_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "params.json"
    path.write_text(json.dumps(PARAMS))
    path.chmod(0o644)
    gateway = GatewayProcess(tmp_path, **{**BOTH, "AWG_PARAMS": str(path)})
    assert gateway.spawn().wait(60) == 2
    assert "AWG_PARAMS" in gateway.text()
    path.chmod(0o600)
    try:
        assert spoken(gateway.start())["parameters"]["s1"] == 30
    finally:
        gateway.close()


# --- rotation -------------------------------------------------------------------------------------


def test_rotation_says_whom_it_cuts_off_and_wants_to_be_confirmed(
    api: Client, both: GatewayProcess
) -> None:
    for number in range(3):
        ok(api.create(a_key(number), obfuscation=ON))
    ok(api.create(a_key("plain")))
    ok(api.status(a_key(1), "suspended"))
    answer = api.send("POST", ROTATE, {"parameters": OTHER})
    assert "3 peers will have no connection" in detail(answer, 409)
    assert spoken(both)["parameters"]["s1"] == 30
    done = ok(api.send("POST", ROTATE, {"parameters": OTHER, "confirm": True}))
    assert (done["status"], done["cut_off_peers"], done["parameters_version"]) == ("rotated", 3, 2)
    shown = ok(api.get(a_key(0)))["obfuscation"]
    assert (shown["s1"], shown["h3"], shown["parameters_version"]) == (31, 501, 2)
    both.kill()
    both.start()
    assert (spoken(both)["parameters"]["s1"], spoken(both)["parameters_version"]) == (31, 2)
    record = both.directory / "wireguard.db.journal"
    assert b'"set":{"obfuscation":' in record.read_bytes()


def test_what_need_not_match_is_changed_without_cutting_anybody_off(api: Client) -> None:
    ok(api.create(a_key(1), obfuscation=ON))
    done = ok(api.send("POST", ROTATE, {"parameters": {**PARAMS, "jc": 9}}))
    assert (done["cut_off_peers"], done["parameters_version"]) == (0, 1)
    assert ok(api.get(a_key(1)))["obfuscation"]["jc"] == 9


def test_rotation_makes_parameters_of_a_generation_and_preset(api: Client) -> None:
    body = {"generation": "1.5", "preset": "dns", "confirm": True}
    done = ok(api.send("POST", ROTATE, body))
    assert done["generation"] == "1.5"
    assert done["parameters"]["i1"].startswith("<r 2><b 0x0100")
    assert "s3" not in done["parameters"]
    again = ok(api.send("POST", ROTATE, body))
    assert again["parameters"]["h1"] != done["parameters"]["h1"]
    assert again["parameters_version"] == done["parameters_version"] + 1


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"parameters": {"s1": 20, "s2": 76}}, 422, "parameters: S1, S2: "),
        ({"parameters": {"s4": 200}, "confirm": True}, 422, "parameters: S4: "),
        ({"parameters": []}, 422, "parameters"),
        ({"generation": "9"}, 422, "generation"),
        ({"preset": "dns", "generation": "1.0"}, 422, "preset: dns needs I1"),
        ({"confirm": "yes"}, 422, "confirm"),
    ],
)
def test_a_rotation_that_cannot_be_changes_nothing(
    shared: GatewayProcess, body: dict[str, Any], status: int, words: str
) -> None:
    before = spoken(shared)
    assert words in detail(shared.client().send("POST", ROTATE, body), status)
    assert spoken(shared) == before


def test_an_export_holds_the_parameters_and_an_import_brings_them(
    api: Client, both: GatewayProcess, tmp_path: Path
) -> None:
    ok(api.create(a_key(1), obfuscation={**ON, "jc": 9}))
    image = api.send("GET", "/api/v1/snapshot").body
    (tmp_path / "other").mkdir()
    with running(tmp_path / "other", **{**BOTH, "AWG_PARAMS": json.dumps(OTHER)}) as other:
        client = other.client()
        assert spoken(other)["parameters"]["s1"] == 31
        ok(client.send("PUT", "/api/v1/snapshot", image))
        for _ in range(2):
            assert spoken(other)["parameters"]["s1"] == 30
            assert ok(other.client().get(a_key(1)))["obfuscation"]["jc"] == 9
            other.kill()
            other.start()


def test_an_import_without_parameters_keeps_those_that_are_there(
    gateway: GatewayProcess, client: Client, tmp_path: Path
) -> None:
    ok(client.create(a_key(1)))
    image = client.send("GET", "/api/v1/snapshot").body
    (tmp_path / "other").mkdir()
    with running(tmp_path / "other", **BOTH) as other:
        ok(other.client().send("PUT", "/api/v1/snapshot", image))
        other.kill()
        other.start()
        assert spoken(other)["parameters"]["s1"] == 30


def test_an_import_with_bad_parameters_is_refused(
    api: Client, both: GatewayProcess, tmp_path: Path
) -> None:
    image = tmp_path / "image.db"
    image.write_bytes(api.send("GET", "/api/v1/snapshot").body)
    db = sqlite3.connect(image)
    db.execute("UPDATE meta SET value = '{\"s1\": 9999}' WHERE name = 'obfuscation'")
    db.execute("PRAGMA application_id = 0")
    db.commit()
    db.close()
    assert "S1: must be" in detail(api.send("PUT", "/api/v1/snapshot", image.read_bytes()), 400)
    assert spoken(both)["parameters"]["s1"] == 30


# --- the command line -----------------------------------------------------------------------------


def run(gateway: GatewayProcess, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [*PROGRAM, *arguments],
        cwd=gateway.directory,
        env={"PATH": "/usr/bin:/bin", **gateway.settings},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def test_awg_generate_show_and_rotate(both: GatewayProcess) -> None:
    ok(both.client().create(a_key(1), obfuscation=ON))
    assert json.loads(run(both, "awg", "show"))["parameters"]["s1"] == 30
    made = run(both, "awg", "generate", "--generation", "1.0", "--preset", "light")
    assert json.loads(made)["generation"] == "1.0"
    (both.directory / "new.json").write_text(made)
    refused = run(both, "awg", "rotate", "--params", "@new.json", code=1)
    assert "status 409" in refused
    assert "1 peers will have no connection" in refused and "(here: --yes)" in refused
    done = run(both, "awg", "rotate", "--params", "@new.json", "--yes")
    assert re.fullmatch(
        r"awg0: parameters version 2, generation 1\.0; 1 peers need new configurations\n", done
    )
    assert spoken(both)["parameters"]["h1"] == json.loads(made)["h1"]
    assert "--params" in run(both, "awg", "rotate", "--params", "{", "--yes", code=1)
    run(both, "awg", "rotate", "--generation", "2.0", "--yes")
    assert spoken(both)["generation"] == "2.0"


def test_commands_of_the_document_run_as_written(both: GatewayProcess) -> None:
    """With a peer, the one line that asks for no confirmation is refused, and no other."""
    ok(both.client().create(a_key(1), obfuscation=ON))
    text = (ROOT / "docs/AMNEZIAVPN.md").read_text("utf-8")
    lines = "".join(re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)).splitlines()
    assert [line.split()[2] for line in lines] == ["generate", "show", "rotate", "rotate"]
    wggw_command = f'wggw() {{ {shlex.join(PROGRAM)} "$@"; }}\n'
    codes = []
    for line in lines:
        done = subprocess.run(
            ["bash", "-c", wggw_command + line],
            cwd=both.directory,
            env={"PATH": "/usr/bin:/bin", **both.settings},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        codes.append(done.returncode)
    assert codes == [0, 0, 1, 0], done
    made = json.loads((both.directory / "awg.json").read_text())
    assert spoken(both)["parameters"]["h1"] == made["h1"]


def test_awg_generate_needs_no_settings(tmp_path: Path) -> None:
    done = subprocess.run(
        [*PROGRAM, "awg", "generate", "--preset", "dns", "--generation", "1.0"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr == "wggw: preset: dns needs I1, which came with generation 1.5\n"
