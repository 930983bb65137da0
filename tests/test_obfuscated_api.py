"""A gateway with an obfuscated interface, over its API; memory backend."""

from __future__ import annotations

import base64
import errno
import json
import re
import shlex
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import World, build, do
from harness import LONG, PROGRAM, ROOT, Client, GatewayProcess, a_key, ok, run_wggw, running

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
    text = api.raw("GET", "/metrics", b"", {}).body.decode()
    assert 'wggw_peers{interface="awg0",state="active",reason=""} 2' in text


def test_a_clients_own_values_are_kept_and_given_back(both: GatewayProcess, api: Client) -> None:
    own = {"jc": 7, "jmin": 20, "jmax": 30, "i1": "<b 0xc0ff><rc 8>"}
    created = ok(api.create(a_key(1), obfuscation={**ON, **own, **SHARED, "i2": "<t>"}))
    assert {n: created["obfuscation"][n] for n in own} == own
    assert created["obfuscation"]["i2"] == "<t>"
    both.kill()
    both.start()
    shown = ok(both.client().get(a_key(1)))["obfuscation"]
    assert {n: shown[n] for n in own} == own
    again = ok(both.client().create(a_key(1), obfuscation=shown))
    assert not again.keys() & {"ignored", "differs"}
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
        ({"jc": 65536}, 422, "obfuscation: Jc: must be"),
        ({"random_trailers": "on"}, 409, "RandomTrailers is True in the request, but False on"),
        ({"jmin": 71}, 422, "obfuscation: Jmin, Jmax: "),
        ({"i1": "<x>"}, 422, "obfuscation: I1: must be"),
        ({"i1": "<dz 5>"}, 422, "obfuscation: I1: each of <d>, <ds>, <dz> came with generation 3"),
        (
            {"content_padding_addition": "0-32"},
            422,
            "obfuscation: ContentPaddingAddition: it came with generation 3.0, not 2.0",
        ),
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
def test_without_an_obfuscated_interface_it_is_no_error_to_repeat(
    client: Client, asked: Any
) -> None:
    """Neither is a 503: backends repeat a request after that."""
    words = detail(client.create(a_key(1), obfuscation=asked), 422)
    assert words == "obfuscation: this gateway has no obfuscated interface: AWG_INTERFACE adds one"
    wish = [{"public_key": a_key(1), "obfuscation": asked}]
    assert detail(client.send("PUT", "/api/v1/configurations", wish), 422).endswith(words)
    assert detail(client.send("GET", "/api/v1/obfuscation"), 404) == words
    assert detail(client.send("POST", ROTATE, {}), 404) == words


def test_an_obfuscated_interface_alone_takes_who_asks_for_nothing(tmp_path: Path) -> None:
    with running(tmp_path, **BOTH, WG_INTERFACE="") as gateway:
        api = gateway.client()
        created = ok(api.create(a_key(1)))
        assert (created["interface"], created["obfuscation"]["s1"]) == ("awg0", 30)
        assert "no plain" in detail(api.create(a_key(2), obfuscation={"enabled": False}), 422)


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
    both.settings["AWG_PARAMS"] = json.dumps({**PARAMS, "jc": 9})  # would cut nobody off
    both.start()
    assert (spoken(both)["parameters"]["jc"], spoken(both)["parameters_version"]) == (4, 1)
    assert "AWG_PARAMS differs from the parameters of awg0 (Jc) and has no effect" in both.text()
    both.settings["AWG_PARAMS"] = json.dumps(OTHER)
    ok(both.client().delete(a_key(1)))
    both.stop()
    both.start()
    assert (spoken(both)["parameters"]["s1"], spoken(both)["parameters_version"]) == (30, 1)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ('{"jmin": 20, "jmax": 10}', "AWG_PARAMS: Jmin, Jmax: Jmin must not be above Jmax"),
        ('{"h1": 5, "h2": 5}', "AWG_PARAMS: H1, H2, H3, H4: "),
        ('{"x": 1}', "AWG_PARAMS: x: is not a parameter of AmneziaWG"),
        ("[1]", "AWG_PARAMS: it is not a JSON object"),
        ("{", "AWG_PARAMS: its value (not shown) is not JSON"),
        ("/nonexistent/params.json", "AWG_PARAMS: '/nonexistent/params.json' cannot be read"),
        ("[Interface]\nJc = 5\nJcc = 6", "AWG_PARAMS: line 3: Jcc: is not a parameter of"),
        ("[Interface]\nS1 = x", "AWG_PARAMS: S1: must be a number"),
        ("[Interface]\nRandomTrailers = yes", "AWG_PARAMS: RandomTrailers: must be on or off"),
        ("[Interface]\nJc", "AWG_PARAMS: line 2 is neither JSON nor a line of [Interface]"),
        ("[Peer]\nJc = 5", "AWG_PARAMS: it is neither JSON nor a file with [Interface]"),
    ],
)
def test_bad_parameters_are_refused_by_name(params: str, words: str) -> None:
    with pytest.raises(wggw.ConfigError, match=f"^{re.escape(words)}"):
        wggw.read_parameters(params)


def test_bad_parameters_stop_the_start(tmp_path: Path) -> None:
    gateway = GatewayProcess(tmp_path, **{**BOTH, "AWG_PARAMS": '{"s4": 200}'})
    assert gateway.spawn().wait(60) == 2
    assert "AWG_PARAMS: S4: WG_MTU 1420 minus S4" in gateway.text()
    assert "Traceback" not in gateway.text()


def test_a_rotation_of_own_values_is_not_undone_by_a_restart(both: GatewayProcess) -> None:
    api = both.client()
    ok(api.create(a_key(1), obfuscation=ON))
    done = ok(api.send("POST", ROTATE, {"parameters": {**PARAMS, "jc": 9}}))
    assert (done["cut_off_peers"], done["parameters_version"], done["warnings"]) == (0, 1, [])
    assert ok(api.get(a_key(1)))["obfuscation"]["jc"] == 9
    both.stop()
    both.start()
    assert spoken(both)["parameters"]["jc"] == 9
    assert "AWG_PARAMS differs from the parameters of awg0 (Jc)" in both.text()


def test_no_two_sets_of_parameters_have_the_same_version_after_an_import(
    both: GatewayProcess, api: Client
) -> None:
    def version_after(method: str, path: str, body: Any) -> int:
        ok(both.client().send(method, path, body))
        return int(spoken(both)["parameters_version"])

    def rotation(s1: int) -> dict[str, Any]:
        return {"parameters": {**PARAMS, "s1": s1}, "confirm": True}

    first = api.send("GET", "/api/v1/snapshot").body
    assert version_after("POST", ROTATE, rotation(31)) == 2
    assert version_after("PUT", "/api/v1/snapshot", first) == 1  # nobody has an earlier one
    ok(api.create(a_key(1), obfuscation=ON))
    first = api.send("GET", "/api/v1/snapshot").body
    assert version_after("POST", ROTATE, rotation(31)) == 2
    second = api.send("GET", "/api/v1/snapshot").body
    assert version_after("PUT", "/api/v1/snapshot", first) == 3
    assert version_after("PUT", "/api/v1/snapshot", first) == 3  # the same set again
    both.kill()
    both.start()
    assert spoken(both)["parameters_version"] == 3
    assert version_after("POST", ROTATE, rotation(32)) == 4
    assert version_after("PUT", "/api/v1/snapshot", second) == 5


def test_unwise_parameters_are_taken_with_a_warning(api: Client, both: GatewayProcess) -> None:
    wide = {**PARAMS, "h1": "100000000-1000000000", "h3": 50, "s1": 128 - 20}
    wide |= {"h2": 60, "h4": 70, "content_padding_addition": "1-9"}
    ok(api.create(a_key(1), obfuscation=ON))
    done = ok(api.send("POST", ROTATE, {"parameters": wide, "confirm": True}))
    (warning,) = done["warnings"]
    assert warning.startswith("H1, H2, H3: 21 % of all data packets of 256 bytes are taken for")
    assert spoken(both)["warnings"] == [warning]
    both.stop()
    both.start()
    assert f"awg0: {warning}" in both.text()
    done_by_hand = run(both, "awg", "rotate", "--params", json.dumps({**wide, "jc": 200}))
    assert f"warning: {warning}\n" in done_by_hand and "warning: Jc: " in done_by_hand


@pytest.mark.parametrize("generation", ["1.0", "2.0", "3.1"] if LONG else ["3.1"])
def test_parameters_from_a_file_as_awg_shows_it(tmp_path: Path, generation: str) -> None:
    path = tmp_path / "awg0.conf"
    path.write_bytes((ROOT / f"tests/data/awg0-{generation}.conf").read_bytes())
    path.chmod(0o600)
    with running(tmp_path, **{**BOTH, "AWG_PARAMS": str(path)}) as gateway:
        shown = spoken(gateway)
        assert shown["generation"] == generation
        assert shown["parameters"]["jc"] == {"1.0": 120, "2.0": 4, "3.1": 3}[generation]
        assert shown["parameters"].get("random_trailers", False) == (generation == "3.1")
        # and by hand: the same file is the same parameters, which cuts nobody off
        done = run(gateway, "awg", "rotate", "--params", f"@{path}")
        assert "; peers that need new configurations: 0" in done
        assert "2F4Rk1Vbq0m8yO2mYc3nSxuPzq4mB7w2kJ1lQe0s93E=" not in gateway.text() + done


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


def test_rotation_makes_parameters_of_a_generation_and_preset(api: Client) -> None:
    body = {"generation": "1.5", "preset": "dns", "confirm": True}
    done = ok(api.send("POST", ROTATE, body))
    assert done["generation"] == "1.5"
    assert done["parameters"]["i1"].startswith("<r 2><b 0x0100")
    assert "s3" not in done["parameters"]
    again = ok(api.send("POST", ROTATE, body))
    assert again["parameters"]["h1"] != done["parameters"]["h1"]
    assert again["parameters_version"] == done["parameters_version"] + 1


def test_a_generation_beside_parameters_is_theirs(api: Client) -> None:
    body = {"parameters": OTHER, "generation": "3.0", "confirm": True}
    done = ok(api.send("POST", ROTATE, body))
    assert done["generation"] == "3.0"
    assert done["parameters"] == OTHER


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"parameters": {"jmin": 20, "jmax": 10}}, 422, "parameters: Jmin, Jmax: "),
        ({"parameters": {"i1": "<rd 5>", "generation": "1.5"}}, 422, "parameters: I1: "),
        ({"parameters": OTHER, "generation": "1.5", "confirm": True}, 422, "parameters: S3: "),
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
    ok(api.create(a_key(2)))  # a plain peer
    image = api.send("GET", "/api/v1/snapshot").body
    assert ok(api.send("PUT", "/api/v1/snapshot?dry_run=true", image))["cut_off_peers"] == 0
    ok(api.send("POST", ROTATE, {"parameters": OTHER, "confirm": True}))
    assert ok(api.send("PUT", "/api/v1/snapshot?dry_run=true", image))["cut_off_peers"] == 1
    (tmp_path / "other").mkdir()
    with running(tmp_path / "other", **{**BOTH, "AWG_PARAMS": json.dumps(OTHER)}) as other:
        client = other.client()
        assert spoken(other)["parameters"]["s1"] == 31
        ok(client.send("PUT", "/api/v1/snapshot?replace_key=false", image))
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
        ok(other.client().send("PUT", "/api/v1/snapshot?replace_key=false", image))
        other.kill()
        other.start()
        assert spoken(other)["parameters"]["s1"] == 30


def test_an_import_with_bad_parameters_is_refused(
    api: Client, both: GatewayProcess, tmp_path: Path
) -> None:
    image = tmp_path / "image.db"
    image.write_bytes(api.send("GET", "/api/v1/snapshot").body)
    db = sqlite3.connect(image)
    db.execute("UPDATE meta SET value = '{\"s1\": 99999}' WHERE name = 'obfuscation'")
    db.execute("PRAGMA application_id = 0")
    db.commit()
    db.close()
    assert "S1: must be" in detail(api.send("PUT", "/api/v1/snapshot", image.read_bytes()), 400)
    assert spoken(both)["parameters"]["s1"] == 30


# --- the command line -----------------------------------------------------------------------------


def run(gateway: GatewayProcess, *arguments: str, code: int = 0) -> str:
    done = gateway.command(*arguments)
    assert done.returncode == code, done
    return done.stdout + done.stderr


def test_awg_generate_show_and_rotate(both: GatewayProcess) -> None:
    ok(both.client().create(a_key(1), obfuscation=ON))
    assert json.loads(run(both, "awg", "show"))["parameters"]["s1"] == 30
    made = run(both, "awg", "generate", "--generation", "1.0", "--preset", "light")
    assert json.loads(made)["generation"] == "1.0"
    (both.directory / "new.json").write_text(made)
    refused = run(both, "awg", "rotate", "--params", "@new.json", code=1)
    assert "status 409" in refused
    assert "1 peer will have no connection" in refused and "(for this command: --yes)" in refused
    done = run(both, "awg", "rotate", "--params", "@new.json", "--yes")
    assert re.fullmatch(
        r"awg0: parameters version 2, generation 1\.0; peers that need new configurations: 1\n",
        done,
    )
    assert spoken(both)["parameters"]["h1"] == json.loads(made)["h1"]
    assert "--params" in run(both, "awg", "rotate", "--params", "{", "--yes", code=1)
    run(both, "awg", "rotate", "--generation", "2.0", "--yes")
    assert spoken(both)["generation"] == "2.0"


def test_a_file_of_awg_brings_peers_where_its_parameters_are_spoken(tmp_path: Path) -> None:
    on, off = "ON", "OFF"  # other words: test_obfuscation.py
    text = (ROOT / "tests/data/awg0-3.1.conf").read_text()
    assert "RandomTrailers = on\n" in text
    text = text.replace("= on\n", f"= {on}\nDisableCookies = {off}\n")
    file = tmp_path / "awg0.conf"
    file.write_text(text)
    file.chmod(0o600)
    more = {"AWG_PARAMS": str(file), "AWG_IPV4_SUBNET": "10.8.1.0/24"}
    with running(tmp_path, **{**BOTH, **more}) as gateway:
        done = run(gateway, "import", str(file), "--dry-run")
        assert "would create 1 peer;" in done
        assert "done: 1 created, 0 existed, 0 refused" in run(gateway, "import", str(file))
        (peer,) = ok(gateway.client().send("GET", "/api/v1/configurations"))["configurations"]
        assert (peer["interface"], peer["assigned_ip"]) == ("awg0", "10.8.1.2")
        file.write_text(text.replace("S1 = ", "S1 = 1"))
        key = peer["public_key"]
        other = base64.b64encode(bytes(range(32))).decode()
        file.write_text(file.read_text().replace(key, other).replace("10.8.1.2/", "10.8.1.3/"))
        refused = run(gateway, "import", "--merge", str(file), code=1)
        assert "0 created, 0 existed, 1 refused" in refused
        assert "S1 is 1" in refused and "on the interface awg0: both sides must" in refused
        assert "--params @FILE" in refused
        file.write_text(text.replace(f"= {on}\n", "= maybe\n"))
        refused = run(gateway, "import", "--merge", str(file), code=1)
        assert "RandomTrailers: must be on or off" in refused


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
    line = ("awg", "generate", "--preset", "dns", "--generation", "1.0")
    done = run_wggw(tmp_path, *line)
    assert done.returncode == 1
    assert done.stderr == "wggw: preset: dns needs I1, which came with generation 1.5\n"


# --- in process: rotations and imports under faults -----------------------------------------------


def a_world(directory: Path) -> World:
    directory.mkdir(exist_ok=True)
    return build(directory, WG_INTERFACE="", AWG_INTERFACE="awg0", AWG_IPV4_SUBNET="10.0.2.0/24")


def in_line(world: World) -> wggw.ObfuscationState:
    """What the gateway says that the interface speaks; rows and interface say the same."""
    state = world.gateway.obfuscated().obfuscation
    assert state is not None and state == world.gateway.run(lambda: world.store.meta("obfuscation"))
    assert world.backend.device is not None
    assert world.backend.device.obfuscation == state.parameters
    return state


FAULTS: dict[str, Callable[[World], None]] = {
    "interface": lambda w: w.backend.fail("setup"),
    "interface, for good": lambda w: w.backend.fail("setup", forever=True),
    "interface hangs": lambda w: w.backend.fail("setup", what="hangs"),
    # No request makes it again, because that can mean to start a program.
    "interface gone": lambda w: setattr(w.backend, "is_up", False),
    "disk": lambda w: w.disk.fail("write"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_rotation_that_fails_leaves_interface_and_state_as_they_were(
    tmp_path: Path, fault: str
) -> None:
    world = a_world(tmp_path)
    do(world.gateway, "create", public_key=a_key(1))
    before = in_line(world)
    wanted = wggw.generate_obfuscation("1.0", "light")
    FAULTS[fault](world)
    with pytest.raises(wggw.Unavailable):
        world.gateway.change_obfuscation(wanted, confirmed=True)
    assert world.gateway.obfuscated().obfuscation == before and world.gateway.degraded()
    for faults in world.faults:
        faults.heal()
    world.gateway.lander.heal()
    world.gateway.projection.supervise()
    assert world.gateway.degraded() == []
    assert in_line(world) == before
    assert world.gateway.change_obfuscation(wanted, confirmed=True) == 1
    after = in_line(world)
    assert (after.parameters, after.version) == (wanted.parameters, before.version + 1)
    world.crash()
    world.open()
    assert in_line(world) == after
    world.close()


def test_parameters_that_the_interface_cannot_speak_are_refused_with_its_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = a_world(tmp_path)
    do(world.gateway, "create", public_key=a_key(1))
    before = in_line(world)
    world.backend.fail("setup", what="unspoken")
    wanted = wggw.generate_obfuscation("1.0", "light")
    with pytest.raises(wggw.Invalid, match="parameters: setup: the parameters are not known"):
        world.gateway.change_obfuscation(wanted, confirmed=True)
    assert world.gateway.obfuscated().obfuscation == before
    world.gateway.projection.supervise()
    assert world.gateway.degraded() == [] and in_line(world) == before
    caplog.clear()
    wide = {"h1": "100-900000000", "h2": 5, "h3": 6, "h4": 7, "s1": 40, "s2": 70, "s3": 99}
    lossy = wggw.parse_obfuscation({**wide, "random_trailers": True})
    world.gateway.change_obfuscation(lossy, confirmed=True)
    for warning in wggw.obfuscation_warnings(lossy):
        assert warning in caplog.text
    assert wggw.obfuscation_warnings(lossy)
    world.close()


def test_a_rotation_cut_off_by_a_kill_is_whole_or_not_there(tmp_path: Path) -> None:
    """The record is on disk before the interface speaks: the start brings the two together."""
    world = a_world(tmp_path)
    before = in_line(world)
    wanted = wggw.generate_obfuscation("1.0", "light")
    world.backend.crash("setup", where="before")
    with pytest.raises(Exception):  # noqa: B017  nobody hears an answer
        world.gateway.change_obfuscation(wanted, confirmed=True)
    world.crash()
    world.open()
    assert in_line(world).parameters == wanted.parameters != before.parameters
    world.close()


def test_parameters_that_others_set_are_put_back(tmp_path: Path) -> None:
    """Those of one side, too: "healthy" means that the interface has what it should have."""
    world = a_world(tmp_path)
    do(world.gateway, "create", public_key=a_key(1))
    before = in_line(world)
    changes: list[dict[str, Any]] = [
        {"s1": before.parameters.s1 + 1}, {"jc": 77}, {"jmin": 7}, {"i3": "<r 5>"},
        {"rekey_timeout": wggw.Span(7, 8)}, {"disable_cookies": True},
    ]  # fmt: skip
    for change in changes:
        for repair in (world.gateway.projection.sample, world.gateway.projection.reconcile):
            other = before.parameters._replace(**change)
            assert world.backend.device is not None
            world.backend.device = world.backend.device._replace(obfuscation=other)
            repair()
            assert in_line(world) == before and world.gateway.degraded() == []
    world.close()


def test_what_the_interface_goes_on_refusing_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = a_world(tmp_path)
    before = in_line(world)
    assert world.backend.device is not None
    world.backend.device = world.backend.device._replace(obfuscation=wggw.PLAIN)
    world.backend.fail("setup", forever=True, what="unspoken")
    with pytest.raises(wggw.BackendError):
        world.gateway.projection.sample()
    for _ in range(5):
        world.gateway.projection.supervise()
    assert "the parameters are not known, as told" in world.gateway.degraded()[0]
    assert caplog.text.count("the parameters are not known, as told") == 1
    world.backend.heal()
    world.gateway.projection.supervise()
    world.gateway.projection.sample()
    assert world.gateway.degraded() == [] and in_line(world) == before
    world.close()


@pytest.mark.parametrize("fault", FAULTS)
def test_an_import_whose_parameters_are_refused_changes_nothing(tmp_path: Path, fault: str) -> None:
    source = a_world(tmp_path / "source")
    do(source.gateway, "create", public_key=a_key("new"))
    image, theirs = source.gateway.export(), in_line(source)
    source.close()
    world = a_world(tmp_path / "target")
    do(world.gateway, "create", public_key=a_key("old"))
    before = in_line(world)
    FAULTS[fault](world)
    with pytest.raises(wggw.Unavailable):
        world.gateway.import_(image, replace_key=False)
    for faults in world.faults:
        faults.heal()
    world.gateway.lander.heal()
    world.gateway.projection.supervise()
    assert world.gateway.degraded() == []
    assert in_line(world) == before
    assert world.backend.peers.keys() == {a_key("old")}
    world.gateway.import_(image, replace_key=False)
    assert in_line(world) == theirs._replace(version=before.version + 1)
    assert world.backend.peers.keys() == {a_key("new")}
    world.close()


def test_parameters_of_a_start_on_a_full_disk_are_those_of_the_next_start(tmp_path: Path) -> None:
    build(tmp_path).close()
    world = World(tmp_path, AWG_INTERFACE="awg0", AWG_IPV4_SUBNET="10.0.2.0/24")
    world.disk.fail("write", error=errno.ENOSPC)
    world.open()
    world.gateway.lander.heal()
    do(world.gateway, "create", public_key=a_key(1), obfuscation=wggw.ObfuscationRequest(True, {}))
    made = world.gateway.obfuscated().obfuscation
    world.reopen()
    assert world.gateway.obfuscated().obfuscation == made
    world.close()
