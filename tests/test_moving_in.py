"""What other programs kept, read into the fields of the API: real-life files, and garbled ones."""

from __future__ import annotations

import json
import math
import sqlite3
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from harness import GatewayProcess, a_key, run_wggw
from hypothesis import given
from hypothesis import strategies as st

import wggw

FILES = Path(__file__).parent / "data" / "moving-in"
PEERS = "/api/v1/configurations/"
KEYS = [f"Q2x1YjAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMD{end}=" for end in ("E", "I", "M", "Q")]


def read(name: str) -> wggw.FoundState:
    return wggw.read_foreign((FILES / name).read_bytes())


def ancestor(script: str | None = None) -> bytes:
    db = sqlite3.connect(":memory:")
    db.executescript(script or (FILES / "ancestor.sql").read_text())
    return db.serialize()


def by_key(state: wggw.FoundState) -> dict[str, wggw.FoundPeer]:
    return {peer.fields["public_key"]: peer for peer in state.peers}


def test_wg_quick_file_keeps_names_addresses_and_preshared_keys() -> None:
    state = read("wg0.conf")
    office, phone = (by_key(state)[key] for key in KEYS[:2])
    assert office.fields == {
        "public_key": KEYS[0],
        "preshared_key": "cHNrMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDE=",
        "assigned_ip": "10.8.0.2",
        "assigned_ipv6": "fd00:8::2",
        "label": "laptop of the office",
    }
    assert phone.fields["label"] == "phone"
    assert (phone.fields["assigned_ip"], phone.fields["assigned_ipv6"]) == ("10.8.0.3", "fd00:8::3")
    assert not phone.reason


def test_what_does_not_fit_is_told_by_line_and_reason() -> None:
    state = read("wg0.conf")
    branch, bare = by_key(state)[KEYS[2]], by_key(state)[KEYS[3]]
    assert branch.place == "line 25" and branch.fields["label"] == "branch"
    assert branch.reason == "192.168.40.0/24 is routed to it: a peer has addresses only"
    assert bare.reason == "it has no address"
    assert state.notes == [
        "line 7: the gateway does not use PostUp",
        "line 8: the gateway does not use PostDown",
    ]


@pytest.mark.parametrize("name", ["awg0-1.0.conf", "awg0-2.0.conf", "awg0-3.1.conf"])
def test_obfuscated_server_keeps_its_parameters(name: str) -> None:
    state = read(name)
    [peer] = state.peers
    asked = wggw.awg_values(peer.fields.pop("obfuscation"))
    assert peer.fields == {"public_key": KEYS[0], "assigned_ip": "10.8.1.2"}
    parameters = wggw.parse_awg_file((FILES / name).read_text())
    spoken = wggw.parse_obfuscation(parameters).parameters
    assert asked == {name: getattr(spoken, name) for name in wggw.AWG_SHARED}


def test_wg_easy_names_become_labels_and_disabled_suspended() -> None:
    first, second = read("wg-easy.json").peers
    assert first.fields["label"] == 'laptop "A" ü' and first.fields["status"] == "active"
    assert first.fields["preshared_key"].startswith("cHNr")
    assert second.fields == {
        "public_key": KEYS[1],
        "assigned_ip": "10.8.0.3",
        "status": "suspended",
    }


def test_previous_gateways_database() -> None:
    first, second = wggw.read_foreign(ancestor()).peers
    assert first.fields == {
        "public_key": KEYS[0],
        "assigned_ip": "10.0.1.2",
        "assigned_ipv6": "fd42:4242:1::2",
        "port": 51820,
        "tunnel_traffic": ["ipv4", "ipv6"],
        "dns": "d1",
        "status": "active",
    }
    assert second.fields["status"] == "suspended" and "assigned_ipv6" not in second.fields


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"# nothing\n", "neither"),
        (b"GATEWAY_API_KEY=secret-of-somebody\n", "line 1"),
        (b"[Interface]\n[Route]\n", "line 2"),
        (b"[Peer]\nnonsense\n", "line 2"),
        (b"[1, 2]", "neither"),
        (b'{"public_key": 1}\n3\n', "line 2"),
        (b'[{"public_key": 1}, 2]', "peer 2"),
        (b'{"a": 1}\n{"b": 2}\n{"c":\n', "line 3 column 6"),
        (
            b'{\n"clients": {"a": {"publicKey": "x",}\n}}\n',
            "line 2 column 3[56]",
        ),  # Python 3.13 names the comma
        (b'{"clients": {"a": 1}}', "client 1"),
        (b"\xff\xfe", "utf-8"),
        (b"SQLite format 3\0" + bytes(84), "SQLite"),
        (ancestor("CREATE TABLE t (a)"), "not the previous gateway's"),
        (ancestor("CREATE VIEW wg_configs AS SELECT 1 AS public_key"), "not the previous"),
        (ancestor("CREATE TABLE wg_configs (public_key)"), "damaged"),
        (ancestor("CREATE TABLE wg_configs (public_key, a AS (1))"), "not the previous"),
        (b"SQLite format 3\0\x10\0\2\2" + bytes(492), "WAL mode.*journal_mode=DELETE"),
    ],
)
def test_what_is_something_else_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as raised:
        wggw.read_foreign(data)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("AllowedIPs = 10.8.0.2/32", "it has no public key"),
        ("PublicKey = a\nPublicKey = b", "it has several public keys"),
        ("PublicKey = a\nAllowedIPs = 10.8.0.2, 10.8.0.3", "it has several IPv4 addresses"),
        ("PublicKey = a\nAllowedIPs = 0.0.0.0/0", "0.0.0.0/0 is routed to it"),
        ("PublicKey = a\nAllowedIPs = fd00::/64", "fd00::/64 is routed to it"),
        ("PublicKey = a\nAllowedIPs = here", "here is not an IP address or network"),
        ("PublicKey = a\nColour = red", "colour is not a known line"),
    ],
)
def test_peer_that_cannot_be_taken_has_the_reason(text: str, reason: str) -> None:
    [peer] = wggw.read_foreign(f"[Peer]\n{text}\n".encode()).peers
    assert peer.reason.startswith(reason)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("# laptop\n[Peer]", "laptop"),
        ("### begin laptop ###\n[Peer]", "laptop"),
        ("# Name = laptop\n[Peer]", "laptop"),
        ("# first\n\n# laptop\n[Peer]", "laptop"),
        ("[Peer]\n# friendly_name=laptop", "laptop"),
        ("[Peer] # laptop", "laptop"),
        ("# S1\n[Peer]", "S1"),
        ("# Table\n[Peer]", "Table"),
        ("# one\n[Peer]\n# friendly_name: laptop", "laptop"),
        ("### end other ###\n[Peer]", None),
        ("#\n[Peer]", None),
        ("# PrivateKey = secret\n[Peer]", None),
        ("#presharedkey=secret\n# jc = 4\n# PostUp = run\n# DNS=1.1.1.1\n[Peer]", None),
        ("# laptop\n# PrivateKey = secret\n[Peer]", "laptop"),
        ("# [Peer]\n# AllowedIPs = 10.8.0.9\n[Peer]", None),
        ("[Peer] # PrivateKey = secret", None),
        (f"# its key is {KEYS[0]}\n[Peer]", None),
    ],
)
def test_comment_is_a_peers_name(text: str, label: str | None) -> None:
    [peer] = wggw.read_foreign(f"{text}\nPublicKey = k\nAllowedIPs = 10.8.0.2\n".encode()).peers
    assert peer.fields.get("label") == label


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("public_key = x'fffe'", "its public_key has a value of another type"),
        ("tunnel_traffic = x'00'", "its tunnel_traffic has a value of another type"),
        ("tunnel_traffic = '[['", "its tunnel_traffic is not JSON"),
        ("assigned_port = 'high'", "its assigned_port has a value of another type"),
        ("assigned_ip = x'0a'", "its assigned_ip has a value of another type"),
        ("assigned_ip = NULL, assigned_ipv6 = ''", "it has no address"),
    ],
)
def test_row_of_the_previous_gateway_that_cannot_be_taken_has_the_reason(
    change: str, reason: str
) -> None:
    text = (FILES / "ancestor.sql").read_text()
    state = wggw.read_foreign(ancestor(f"{text}UPDATE wg_configs SET {change} WHERE rowid = 1"))
    assert [peer.reason for peer in state.peers] == [reason, ""]


def test_key_that_is_no_text_is_a_reason() -> None:
    [peer] = wggw.read_foreign(b'[{"public_key": ["x"]}]').peers
    assert peer.reason == "its public_key is not a text"


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("# one\n[Peer]\n{a}[Peer]\n{b}", ["one", None]),
        ("[Peer]\n# one\n{a}\n[Peer]\n# two\n{b}", ["one", "two"]),  # linuxserver's image
        ("[Peer]\n{a}\n[Peer]\n# two\n{b}", [None, "two"]),
        ("# Name: one\n[Peer]\n{a}\n# Name: two\n[Peer]\n{b}", ["one", "two"]),
        ("# Name: one\n[Peer]\n{a}# Name: two\n[Peer]\n{b}", ["one", "two"]),
        ("[Peer]\n{a}\n# Name: two\n[Peer]\n{b}", [None, "two"]),
        ("[Peer]\n{a}# Name: one\n\n[Peer]\n{b}# Name: two\n", ["one", "two"]),
        (
            "# ID: 1\n# Name: one\n# Update at: noon\n[Peer]\n{a}\n"  # wireguard-ui
            "# ID: 2\n# Name: two\n# Update at: noon\n[Peer]\n{b}",
            ["one", "two"],
        ),
        ("[Interface]\n# of the office\nMTU = 1400\n[Peer]\n{a}[Peer]\n{b}", [None, None]),
    ],
)
def test_name_belongs_to_one_peer(text: str, labels: list[str | None]) -> None:
    lines = {name: f"PublicKey = {name}\nAllowedIPs = 10.8.0.2\n" for name in "ab"}
    peers = wggw.read_foreign(text.format(**lines).encode()).peers
    assert [peer.fields.get("label") for peer in peers] == labels


def test_list_that_the_api_gave_is_taken_back() -> None:
    peer = {"public_key": KEYS[0], "assigned_ip": "10.8.0.2", "online": True, "dns_servers": []}
    wanted = {"public_key": KEYS[0], "assigned_ip": "10.8.0.2"}
    for text in (
        json.dumps({"configurations": [peer], "next_cursor": None}),
        json.dumps([peer]),
        json.dumps(peer) + "\n\n" + json.dumps(peer) + "\n",
        json.dumps(peer),
    ):
        assert all(p.fields == wanted for p in wggw.read_foreign(text.encode()).peers)


@given(st.one_of(st.binary(max_size=300), st.text(max_size=300).map(str.encode)))
def test_garbled_files_are_refused_or_read(data: bytes) -> None:
    try:
        state = wggw.read_foreign(data)
    except ValueError:
        return
    assert all(isinstance(peer.fields, dict) for peer in state.peers)


@given(st.data())
def test_a_file_that_was_changed_is_refused_or_read(data: st.DataObject) -> None:
    names = ["wg0.conf", "wg-easy.json", "awg0-3.1.conf"]
    text = bytearray((FILES / data.draw(st.sampled_from(names))).read_bytes())
    text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    try:
        wggw.read_foreign(bytes(text))
    except ValueError:
        pass


@pytest.mark.parametrize(
    "piece",
    ["# ", "[Peer]\n", "a=", "AllowedIPs=1,", "{", "[", '{"a":', "[{},", "\\", "name=", "\n", "=#"],
)
def test_cost_grows_with_the_file_and_no_faster(piece: str) -> None:
    def cost(size: int) -> float:
        data = (piece * (size // len(piece))).encode()
        started = time.thread_time()
        try:
            wggw.read_foreign(data)
        except ValueError:
            pass
        return time.thread_time() - started

    low, high = math.inf, math.inf
    for _ in range(40):  # the least of many: others on the machine are left out
        low, high = min(low, cost(40_000)), min(high, cost(160_000))
        if high < 5 * low + 0.002:
            return
    raise AssertionError((low, high))


def test_secrets_are_not_shown() -> None:
    state = read("wg0.conf")
    assert "cHNr" not in repr(state)


@pytest.mark.parametrize(
    ("name", "text", "advice"),
    [
        ("50-wg.network", "Name=wg0", "mv {path} {path}.adopted; systemctl restart"),
        ("50-wg.netdev", "Name = wg0", "mv {path} {path}.adopted; systemctl restart"),
        ("50-all.network", "Name=eth* wg*", "Unmanaged=yes\\n' >{own}; systemctl restart"),
        ("50-all.network", "Name=!eth*", "Unmanaged=yes\\n' >{own}; systemctl restart"),
        ("50-all.network", "Name=!wg*", None),
        ("50-other.network", "Name=wg01 eth*", None),
        ("50-other.network", "Type=ether", None),
        ("10-netplan-wg0.network", "Name=wg0", "remove wg0 from the files in /etc/netplan"),
    ],
)
def test_who_manages_an_interface_is_told_with_what_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, advice: str | None
) -> None:
    monkeypatch.setattr(wggw, "NETWORKD_DIRECTORIES", (str(tmp_path),))
    monkeypatch.setattr(wggw, "OTHERS_FILES", {wggw.WG_GENL_NAME: str(tmp_path)})
    (tmp_path / name).write_text(f"[Match]\n{text}\n")
    link = wggw.FoundLink(7, "wg0", "wireguard", "", 1420)
    live = wggw.LiveInterface(wggw.WG_GENL_NAME, link, [], wggw.Device(b"", 51820), [])
    told = list(wggw.other_managers(live))
    assert len(told) == (advice is not None)
    if advice:
        assert advice.format(path=tmp_path / name, own=tmp_path / "00-wg0.network") in told[0]


# --- the command ----------------------------------------------------------------------------------

SHARED_SETTINGS = {"WG_IPV4_SUBNET": "10.8.0.0/24", "WG_IPV6_SUBNET": "fd00:8::/64"}


@pytest.fixture
def gateway(shared: GatewayProcess) -> GatewayProcess:
    """Without peers."""
    assert shared.client().send("PUT", f"{PEERS}?allow_mass_delete=true", []).status == 200
    return shared


def command(
    gateway: GatewayProcess, *arguments: str, given: bytes = b""
) -> subprocess.CompletedProcess[str]:
    return run_wggw(gateway.directory, "import", *arguments, given=given, **gateway.settings)


def peers_of(gateway: GatewayProcess) -> dict[str, dict[str, Any]]:
    page = gateway.client().send("GET", f"{PEERS}?limit=1000").json
    return {peer["public_key"]: peer for peer in page["configurations"]}


def test_nothing_is_changed_unless_all_fits_or_skip_says_so(gateway: GatewayProcess) -> None:
    file = str(FILES / "wg0.conf")
    refused = command(gateway, file)
    assert refused.returncode == 1 and peers_of(gateway) == {}
    assert "line 25 (Q2x1YjAw): 192.168.40.0/24 is routed to it" in refused.stderr
    assert "2 of 4 peers did not fit, and nothing was changed" in refused.stderr
    done = command(gateway, file, "--skip")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (
        0,
        "done: 2 created, 0 existed, 0 refused",
    )
    found = peers_of(gateway)
    assert {key: (p["label"], p["assigned_ip"]) for key, p in found.items()} == {
        KEYS[0]: ("laptop of the office", "10.8.0.2"),
        KEYS[1]: ("phone", "10.8.0.3"),
    }


@pytest.mark.parametrize(
    "outside", [{"assigned_ip": "10.9.0.1"}, {"assigned_ipv6": "fd00:9::2"}], ids=str
)
def test_peers_outside_of_the_subnets_do_not_fit(
    gateway: GatewayProcess, outside: dict[str, str]
) -> None:
    peers = [{"public_key": KEYS[0], "assigned_ip": "10.8.0.50"}, {"public_key": KEYS[1]} | outside]
    given, address = json.dumps(peers).encode(), next(iter(outside.values()))
    for more in ([], ["--dry-run"], ["--replace"]):
        refused = command(gateway, "-", *more, given=given)
        assert refused.returncode == 1 and peers_of(gateway) == {}
        assert f"its address is {address}, outside of 10.8.0.0/24" in refused.stderr
        assert "1 of 2 peers did not fit, and nothing was changed" in refused.stderr
    assert command(gateway, "-", "--skip", given=given).returncode == 0
    assert peers_of(gateway).keys() == {KEYS[0]}


def test_a_merge_names_a_status_that_is_not_the_files(gateway: GatewayProcess) -> None:
    """Such as after a merge that ended between the creation of peers and their suspension."""
    for key in KEYS[:2]:
        assert gateway.client().create(key).status == 200
    peers = [{"public_key": KEYS[0], "status": "suspended"}, {"public_key": KEYS[1]}]
    peers.append({"public_key": a_key("new"), "status": "suspended"})
    merged = command(gateway, "-", "--merge", given=json.dumps(peers).encode())
    assert merged.stdout.endswith("done: 1 created, 2 existed, 0 refused\n")
    short = wggw.short_key(KEYS[0])
    assert merged.stderr == f"{short} exists with another status, and stays as it is\n"


def test_peers_that_are_there_stay_with_merge_and_go_with_replace(gateway: GatewayProcess) -> None:
    file = str(FILES / "wg-easy.json")
    client = gateway.client()
    assert client.create(a_key("own"), assigned_ip="10.8.0.9").status == 200
    assert client.create(KEYS[0], label="mine").status == 200
    asked = command(gateway, file)
    assert asked.returncode == 1 and "the gateway has 2 peers" in asked.stderr
    assert asked.stderr.endswith("names; --dry-run shows what happens\n")
    assert "shows what happens" not in command(gateway, file, "--dry-run").stderr
    dry = command(gateway, file, "--merge", "--dry-run")
    assert dry.stdout.endswith("would create 1 peer; already there, not changed: 1\n")
    assert len(peers_of(gateway)) == 2
    merged = command(gateway, file, "--merge")
    assert merged.stdout.endswith("done: 1 created, 1 existed, 0 refused\n")
    assert "exists with another" in merged.stderr and "label" in merged.stderr
    found = peers_of(gateway)
    assert found[KEYS[0]]["label"] == "mine" and found[KEYS[1]]["status"] == "suspended"
    assert a_key("own") in found
    dry = command(gateway, file, "--replace", "--dry-run")
    assert "would be: 0 created, 1 updated, 1 deleted, 1 unchanged" in dry.stdout
    done = command(gateway, "-", "--replace", given=(FILES / "wg-easy.json").read_bytes())
    assert done.returncode == 0 and "done: 0 created, 1 updated" in done.stdout
    found = peers_of(gateway)
    assert sorted(found) == sorted(KEYS[:2]) and found[KEYS[0]]["label"] == 'laptop "A" ü'
    line = b'{"public_key": "%b"}\n' % KEYS[0].encode()
    done = command(gateway, "-", "--replace", given=line)
    assert done.returncode == 0 and sorted(peers_of(gateway)) == [KEYS[0]], done.stderr


def test_refused_peers_are_told_and_the_exit_code_says_so(gateway: GatewayProcess) -> None:
    assert gateway.client().create(KEYS[1], assigned_ip="10.8.0.2").status == 200
    lines = b'{"public_key": "%b", "assigned_ip": "10.8.0.2"}\n' % KEYS[0].encode()
    done = command(gateway, "-", "--merge", given=lines)
    assert done.returncode == 1
    assert "refused: assigned_ip: " in done.stderr
    assert done.stdout.endswith("done: 0 created, 0 existed, 1 refused\n")


def test_a_disabled_client_that_is_active_here_is_told(gateway: GatewayProcess) -> None:
    """An import that was interrupted may have created it, and not suspended it yet."""
    disabled = next(p.fields for p in read("wg-easy.json").peers if p.fields["status"] != "active")
    key = disabled["public_key"]
    assert gateway.client().create(key, assigned_ip=disabled["assigned_ip"]).status == 200
    for status, told in (("active", True), ("suspended", False)):
        done = command(gateway, str(FILES / "wg-easy.json"), "--merge")
        assert peers_of(gateway)[key]["status"] == status and done.returncode == 0
        assert (f"{key[:8]} exists with another status, and stays" in done.stderr) == told
        operations = [{"op": "suspend", "public_key": key}]
        gateway.client().send("POST", f"{PEERS}batch", {"operations": operations})


def test_dry_run_promises_nothing_that_is_then_refused(gateway: GatewayProcess) -> None:
    assert gateway.client().create(KEYS[0], assigned_ip="10.8.0.2").status == 200
    good = {"public_key": KEYS[1], "status": "suspended", "nonsense": 1}
    peers = [good, good, {"public_key": KEYS[0]}]
    bad = [
        {"public_key": "nonsense"},
        {"public_key": KEYS[2], "expires_at": "2020-01-01T00:00:00Z"},
    ]
    dry = command(gateway, "-", "--merge", "--dry-run", given=json.dumps([*peers, *bad]).encode())
    assert (dry.returncode, dry.stdout.splitlines()[-1]) == (
        1,
        "would create 1 peer; already there, not changed: 2; would be refused: 2",
    )
    assert "nonsense would be refused: public_key: must be" in dry.stderr
    assert f"{KEYS[2][:8]} would be refused: expires_at: is in the past" in dry.stderr
    taken = [{"public_key": KEYS[0]}, {"public_key": KEYS[2], "assigned_ip": "10.8.0.2"}]
    given = json.dumps([*taken, {"public_key": KEYS[1]}]).encode()  # the second: another peer's
    dry = command(gateway, "-", "--merge", "--dry-run", given=given)
    assert f"{KEYS[2][:8]} would be refused: assigned_ip: " in dry.stderr
    words = "would create 1 peer; already there, not changed: 1; would be refused: 1"
    assert (dry.returncode, dry.stdout.splitlines()[-1]) == (1, words)
    done = command(gateway, "-", "--merge", given=json.dumps([*peers, *bad]).encode())
    assert done.stdout.splitlines()[-1] == "done: 1 created, 2 existed, 2 refused"


def test_what_replace_deletes_because_it_was_left_out_is_told(gateway: GatewayProcess) -> None:
    assert gateway.client().create(KEYS[2], assigned_ip="10.8.0.4").status == 200
    for more in (["--dry-run"], []):
        done = command(gateway, str(FILES / "wg0.conf"), "--replace", "--skip", *more)
        assert "1 peer of the gateway, left out here, will be deleted\n" in done.stdout
    assert KEYS[2] not in peers_of(gateway)


@pytest.mark.parametrize(
    "line", [b"\x1b]0;x\7 = 1", b"[Peer]\nPublicKey=\x1bkey\nAllowedIPs=\x1b[2J"]
)
def test_a_file_does_not_control_the_terminal(gateway: GatewayProcess, line: bytes) -> None:
    done = command(gateway, "-", "--skip", given=b"[Interface]\n" + line + b"\n")
    assert "?" in done.stderr and "\x1b" not in done.stdout + done.stderr


def test_a_dry_run_names_the_refusal_of_a_peer_that_the_file_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = wggw.ApiClient("wireguard.db")
    refusal = json.dumps({"detail": "line 2: exhausted"}).encode()
    monkeypatch.setattr(client, "call", lambda *_: (409, refusal))
    with pytest.raises(wggw.StartError, match="line 2: exhausted"):
        wggw.would_add(client, [{"public_key": KEYS[0]}], {KEYS[1]})


def test_call_sends_lines_as_lines(gateway: GatewayProcess) -> None:
    lines = "".join(json.dumps({"public_key": key}) + "\n" for key in KEYS[:2])
    done = gateway.command("call", "PUT", PEERS, "--data", lines)
    assert json.loads(done.stdout)["created"] == 2
    state = "/api/v1/configurations/?dry_run=true"
    assert wggw.content_type("PUT", state, b"[1]") == "application/json"
    assert wggw.content_type("POST", "/api/v1/configurations", b"{}") == "application/json"
    for body in (b'{"a": 1}\n{"a": 2}\n', b'{"a": 1}'):
        assert wggw.content_type("PUT", state, body) == "application/x-ndjson"


def test_a_start_on_the_previous_gateways_database_says_what_it_is(tmp_path: Path) -> None:
    data = ancestor()
    (tmp_path / "wireguard.db").write_bytes(data)
    process = GatewayProcess(tmp_path)
    try:
        assert process.spawn().wait(60) == 2
        said = process.text()
        assert "is the database of the gateway before wggw, which wggw does not change" in said
        assert "wggw import" in said and "damaged" not in said and "Traceback" not in said
        assert (tmp_path / "wireguard.db").read_bytes() == data
        assert not (tmp_path / "wireguard.db.journal").exists()
        process.settings["DB_PATH"] = str(tmp_path / "new.db")
        process.start()
        done = command(process, str(tmp_path / "wireguard.db"))
        assert done.returncode == 0, done.stderr
        assert {key: p["status"] for key, p in peers_of(process).items()} == {
            KEYS[0]: "active",
            KEYS[1]: "suspended",
        }
    finally:
        process.close()
