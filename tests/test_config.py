"""Settings: every row of the table, the .env file, and that a bad value is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wggw import (
    SETTINGS,
    Config,
    ConfigError,
    Setting,
    interface_settings,
    load_config,
    read_env_file,
)

SECRET = "a-secret-of-the-tests-0123456789"
BY_NAME = {setting.name: setting for setting in SETTINGS}
NOT_UTF8 = "\udcff" * 20  # how Python shows bytes in the environment that are not UTF-8


def key_table(key_id: str, secret: str = SECRET) -> str:
    return json.dumps({key_id: secret})


# name: ([(accepted text, parsed value)], [refused texts])
CASES: dict[str, tuple[list[tuple[str, Any]], list[str]]] = {
    "GATEWAY_API_KEY": (
        [("k" * 16, "k" * 16), ("schlüssel-é-123456", "schlüssel-é-123456")],
        ["", "k" * 15, NOT_UTF8],
    ),
    "GATEWAY_API_KEYS": (
        [("", {}), ("{}", {}), (key_table("b.1", "s" * 16), {"b.1": "s" * 16})],
        [
            "no-json-at-all",
            "[]",
            key_table("default"),
            '{"a": "short"}',
            '{"a": 1}',
            key_table(""),
            key_table("a b"),
            key_table("a", NOT_UTF8),
            '{"a": "0123456789abcdef", "a": "fedcba9876543210"}',
            "[" * 100_000,
        ],
    ),
    "GATEWAY_PUBLIC_KEY": ([("p" * 16, "p" * 16), ("", None)], ["p" * 15, NOT_UTF8]),
    "TLS_NAMES": (
        [
            ("", ()),
            ("a.example, 192.0.2.1,[2001:db8::1]", ("a.example", "192.0.2.1", "2001:db8::1")),
            ("*.example.org", ("*.example.org",)),
        ],
        ["a_b", "a..b", ".a", "é.org", "a/b", "a" * 300, "-", "fe80::1%eth0"],
    ),
    "LIMIT_SSH": ([("22", 22), ("65535", 65535), ("", None)], ["0", "65536", "ssh", "22,23"]),
    "METRICS_ALLOWED": ([("", ())], ["192.0.2.1/24", "x", ","]),
    "MAX_TIMESTAMP_DIFF": (
        [("1", 1), ("3600", 3600)],
        ["", "0", "3601", "-1", "1.5", " 60", "60s", "٦٠", "9" * 5000],
    ),
    "AUTH_SCHEMES": (
        [
            ("legacy", ("legacy",)),
            ("rfc9421", ("rfc9421",)),
            ("legacy,rfc9421", ("legacy", "rfc9421")),
        ],
        ["", ",", "basic", "legacy;rfc9421", "LEGACY", "legacy,none"],
    ),
    "ALLOWED_BACKENDS": (
        [
            ("", ()),
            ("10.0.0.0/8, ::1/128", (ip_network("10.0.0.0/8"), ip_network("::1/128"))),
            ("192.0.2.7", (ip_network("192.0.2.7/32"),)),
        ],
        ["10.0.0.1/8", "10.0.0.0/33", "example.org", "10.0.0.0/8;::1", ",", " ", "fe80::1%x"],
    ),
    "API_HOST": (
        [("::", "::"), ("127.0.0.1", "127.0.0.1")],
        ["", "localhost", "1.2.3", "[::]", "1.2.3.4:80", "fe80::1%eth0\n", "fe80::1%eth0"],
    ),
    "API_PORT": ([("1", 1), ("65535", 65535)], ["", "0", "65536", "http", "1e3"]),
    "TLS_CERT": ([("/etc/cert.pem", "/etc/cert.pem")], [""]),
    "TLS_KEY": ([("/etc/key.pem", "/etc/key.pem")], [""]),
    "TLS_CLIENT_CA": ([("", None), ("ca.pem", "ca.pem")], []),
    "WG_INTERFACE": (
        [("wg0", "wg0"), ("abcdefghijklmno", "abcdefghijklmno")],
        [".", "..", "a/b", "a b", "abcdefghijklmnop", "wg0\n", "ü", "a:b", "all"],
    ),
    "WG_IPV4_SUBNET": (
        [("10.0.0.0/30", ip_network("10.0.0.0/30")), ("", None)],
        [
            *("10.0.0.1/24", "10.0.0.0/31", "10.0.0.0", "0.0.0.0/0", "fd00::/64", "x"),
            *("10.0.0.0/-1", "0.0.0.0/1", "0.0.0.0/24", "127.0.1.0/24", "239.0.0.0/24"),
        ],
    ),
    "WG_IPV6_SUBNET": (
        [("fd00::/126", ip_network("fd00::/126")), ("", None)],
        [
            *("fd00::1/64", "fd00::/127", "fd00::", "::/0", "10.0.0.0/24", "x", "fd00::%eth0/64"),
            *("::/64", "8000::/1", "ff05::/64", "::ffff:10.0.0.0/112"),
            *("fe80::/64", "::1:0/112"),
        ],
    ),
    "WG_DEFAULT_PORT": ([("1", 1), ("65535", 65535)], ["", "0", "65536", "+1"]),
    "WG_EXTRA_PORTS": (
        [("", ()), ("53, 443", (53, 443))],
        ["0", "53;443", "65536", "dns", "53,-1"],
    ),
    "WG_ENDPOINT": (
        [
            ("", None),
            ("vpn.example.org", ("vpn.example.org", None)),
            ("vpn_1.example.:443", ("vpn_1.example.", 443)),
            ("192.0.2.1", ("192.0.2.1", None)),
            ("192.0.2.1:65535", ("192.0.2.1", 65535)),
            ("2001:db8:0::1", ("2001:db8::1", None)),
            ("[2001:db8::1]", ("2001:db8::1", None)),
            ("[2001:db8::1]:1", ("2001:db8::1", 1)),
        ],
        [
            "a b",
            "vpn\nPostUp",
            *("0.0.0.0", "0.0.0.0:51820", "::", "[::]:51820"),
            "x" * 254,
            "ü.example",
            "https://vpn.example.org/",
            "vpn.example.org:",
            "vpn.example.org:0",
            "vpn.example.org:65536",
            "a..b",
            "-a.example",
            "192.0.2.256",
            "192.0.2",
            "[192.0.2.1]",
            "[vpn.example.org]:1",
            "fe80::1%eth0",
            "fe80::1%\n",
            "2001:db8::1]:1",
            ":443",
        ],
    ),
    "WG_PRIVATE_KEY_FILE": ([("key", "key")], [""]),
    "WG_BACKEND": (
        [(word, word) for word in ("auto", "netlink", "uapi", "memory")],
        ["", "kernel", "AUTO"],
    ),
    "WG_ISOLATE": ([("true", True), ("false", False)], ["", "True", "1", "yes"]),
    "WG_MTU": ([("1280", 1280), ("65535", 65535)], ["", "1279", "65536", "1420.0"]),
    "AWG_INTERFACE": ([("", None), ("awg0", "awg0")], [".", "a/b", "abcdefghijklmnop", "a b"]),
    "AWG_IPV4_SUBNET": (
        [("10.0.2.0/30", ip_network("10.0.2.0/30")), ("", None)],
        ["10.0.2.1/24", "10.0.2.0/31", "0.0.0.0/0", "fd00::/64", "x", "127.0.0.0/8"],
    ),
    "AWG_IPV6_SUBNET": (
        [("fd00:2::/126", ip_network("fd00:2::/126")), ("", None)],
        ["fd00:2::1/64", "fd00:2::/127", "::/0", "10.0.2.0/24", "fd00::%eth0/64", "ff00::/8"],
    ),
    "AWG_PORT": ([("1", 1), ("65535", 65535)], ["", "0", "65536", "+1"]),
    "AWG_EXTRA_PORTS": ([("", ()), ("53, 443", (53, 443))], ["0", "53;443", "65536", "dns"]),
    "AWG_PRIVATE_KEY_FILE": ([("", None), ("key", "key")], []),
    "AWG_PARAMS": ([("", None), ("/etc/awg.json", "/etc/awg.json"), ("{}", "{}")], []),
    "SERVICE_CLASSES": (
        [
            ("", {}),
            ('{"a": {"down": "8kbit"}}', {"a": (1000, None, None)}),
            (
                '{"a": {"destinations": ["10.0.0.0/8", "fd00::1"]}}',
                {"a": (None, None, (ip_network("10.0.0.0/8"), ip_network("fd00::1")))},
            ),
        ],
        [
            *("[]", '{"a": {"down": "7kbit"}}', '{"a": {"rate": "1mbit"}}'),
            *('{"a": {"destinations": [10]}}', '{"a": {"destinations": [true]}}'),
            *('{"a": {"up": "8kbit", "up": "9kbit"}}', '{"a": {}, "a": {}}'),
            *('{"a": {"destinations": ["fe80::%x/128"]}}', '{"a": {"destinations": []}}'),
        ],
    ),
    "DNS_SERVERS": (
        [
            ('{"a":"9.9.9.9,2620:fe::fe"}', {"a": ("9.9.9.9", "2620:fe::fe"), "none": ()}),
            (
                '{"a":["9.9.9.9"],"b":"vpn.example, 1.1.1.1,corp.example"}',
                {"a": ("9.9.9.9",), "b": ("1.1.1.1", "vpn.example", "corp.example"), "none": ()},
            ),
        ],
        [
            "",
            "{}",
            "[]",
            "null",
            '{"":"1.1.1.1"}',
            '{"a":"dns.example"}',
            '{"a":[]}',
            '{"a":[1]}',
            '{"a":null}',
            '{"a":""}',
            '{"none":"1.1.1.1"}',
            '{"a":"1.1.1.1","a":"9.9.9.9"}',
            '{"a":"1.1.1.1,"}',
            '{"a":"1.1.1.1,1.1.1"}',
            '{"a":"1.1.1.1,corp.example\\nPostUp = x"}',
            '{"a":"fe80::1%eth0"}',
            '{"a":"fe80::1\\u0025e\\nPostUp = x"}',
            '{"a":' * 5000,
            '{"a":' + "9" * 5000 + "}",
        ],
    ),
    "MOVE_PEERS": ([("true", True), ("false", False)], ["", "yes", "1", "True"]),
    "DB_PATH": ([("/var/lib/x.db", "/var/lib/x.db")], [""]),
    "DURABILITY": ([(w, w) for w in ("commit", "interval", "none")], ["", "always", "Commit"]),
    "SNAPSHOT_INTERVAL": (
        [("0.1", 0.1), ("86400", 86400.0)],
        ["", "0", "0.05", "86401", "nan", "inf", "1e2", "-1"],
    ),
    "SNAPSHOT_KEY": ([("", None), ("s" * 16, "s" * 16)], ["s" * 15, NOT_UTF8]),
    "SAMPLE_INTERVAL": (
        [("0.1", 0.1), ("3600", 3600.0)],
        ["", "0", "3601", "nan", "inf", "10s"],
    ),
    "LOG_LEVEL": (
        [(w, w) for w in ("debug", "info", "warning", "error")],
        ["", "INFO", "trace"],
    ),
    "SNAPSHOT_URL": (
        [("", None), ("https://h.example/a", "https://h.example/a")],
        [
            *("http://h.example", "https://", "https://u:p@h/", "https://h/?a", "https://h/a b"),
            *("https://h:99999/", "https://h:0/", "s3://B/", "s3:///a", "file:///a"),
        ],
    ),
    "SNAPSHOT_TOKEN": (
        [("", None), ("t", "t")],
        ["a secret with spaces", "ünlike", "secret-line\n"],
    ),
    "SNAPSHOT_COPY_INTERVAL": ([("10", 10.0), ("0.5", 0.5)], ["", "0", "-1", "ten"]),
    "SNAPSHOT_FENCE": ([("true", True), ("false", False)], ["", "1", "no"]),
    "SNAPSHOT_LINEAGE": ([("ab" * 16, "ab" * 16), ("", "")], ["ab", "AB" * 16, "none"]),
    "SNAPSHOT_REQUIRED": ([("true", True), ("false", False)], ["", "1", "no", "TRUE"]),
    "AWS_ACCESS_KEY_ID": ([("", None), ("AKIA", "AKIA")], ["a b", "a\n"]),
    "AWS_SECRET_ACCESS_KEY": ([("", None), ("a/+=", "a/+=")], ["a secret with spaces", "ünlike"]),
    "AWS_SESSION_TOKEN": ([("", None), ("a/+=", "a/+=")], ["a secret with spaces", "s" * 4097]),
    "AWS_REGION": ([("", None), ("eu-1", "eu-1")], ["EU", "eu/1", "eu 1"]),
    "AWS_DEFAULT_REGION": ([("", None), ("eu-1", "eu-1")], ["EU", "eu\n"]),
    "AWS_ENDPOINT_URL": (
        [("", None), ("https://h:9000", "https://h:9000"), ("http://[::1]:1", "http://[::1]:1")],
        [
            "http://h",
            "https://h?",
            "https://h:99999",
            "https://h:0",
            "ftp://h",
            "http://localhost.h",
        ],
    ),
    "AWS_ENDPOINT_URL_S3": (
        [("", None), ("http://127.0.0.1:1", "http://127.0.0.1:1")],
        ["http://127.0.0.1.h", "h", "https://u@h"],
    ),
    "METRICS_TOKEN": ([("", None), ("t" * 16, "t" * 16)], ["t" * 15, NOT_UTF8]),
    "MAX_CONNECTIONS": ([("8", 8), ("65536", 65536)], ["", "7", "65537", "many"]),
    "MAX_CONNECTIONS_PER_ADDRESS": ([("1", 1), ("65536", 65536)], ["", "0", "65537", "all"]),
    "PRIVACY_SCRUB": ([("0", 0), ("180", 180)], ["", "1", "179", "-180", "31536001", "never"]),
    "PER_PEER_METRICS": ([("true", True), ("false", False)], ["", "yes", "1", "True"]),
    "MAX_AUTH_FAILURES": ([("1", 1), ("1000000", 10**6)], ["", "0", "1000001", "1.5"]),
}

# The contract's table of settings, as far as it has defaults that a program can compare.
CONTRACT_DEFAULTS: dict[str, Any] = {
    "gateway_api_keys": {},
    "gateway_public_key": None,
    "max_timestamp_diff": 60,
    "auth_schemes": ("legacy", "rfc9421"),
    "allowed_backends": (),
    "api_host": "0.0.0.0",
    "api_port": 8000,
    "tls_cert": "cert.pem",
    "tls_key": "key.pem",
    "tls_client_ca": None,
    "wg_interface": "wg0",
    "wg_ipv4_subnet": ip_network("10.0.1.0/24"),
    "wg_ipv6_subnet": ip_network("fd42:4242:1::/64"),
    "wg_default_port": 51820,
    "wg_extra_ports": (),
    "wg_endpoint": None,
    "wg_private_key_file": "/etc/wireguard/privatekey",
    "wg_backend": "auto",
    "wg_mtu": 1420,
    "dns_servers": {"d1": ("1.1.1.1",), "d2": ("8.8.8.8",), "d3": ("9.9.9.9",), "none": ()},
    "db_path": "./wireguard.db",
    "durability": "commit",
    "snapshot_interval": 300,
    "snapshot_key": None,
    "sample_interval": 10,
    "log_level": "info",
    "metrics_token": None,
}

# The rest of the contract's table.
CONTRACT_OTHERS = (
    "AUTH_SCHEMES",
    "AWG_INTERFACE",
    "AWG_PORT",
    "AWG_IPV4_SUBNET",
    "AWG_IPV6_SUBNET",
    "AWG_PARAMS",
    "SNAPSHOT_KEY",
    "SNAPSHOT_URL",
)

ACCEPTED = [(name, *pair) for name, (good, _) in CASES.items() for pair in good]
REFUSED = [(name, text) for name, (_, bad) in CASES.items() for text in bad]


@pytest.fixture(autouse=True)
def _empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No .env, no certificate where the settings are read."""
    monkeypatch.chdir(tmp_path)


def load(settings: Mapping[str, str] | None = None, env_file: str | None = None) -> Config:
    return load_config({"GATEWAY_API_KEY": SECRET, **(settings or {})}, env_file)


def refusal(settings: Mapping[str, str], env_file: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(settings, env_file)
    assert caught.value.code == 2
    return str(caught.value)


def test_every_setting_has_cases_here() -> None:
    assert set(CASES) == set(BY_NAME)


@pytest.mark.parametrize(("name", "text", "value"), ACCEPTED)
def test_good_value_is_parsed(name: str, text: str, value: Any) -> None:
    settings = {"AWG_IPV4_SUBNET": "10.0.2.0/24", name: text}
    assert getattr(load(settings), name.lower()) == value


@pytest.mark.parametrize(("name", "text"), REFUSED, ids=lambda v: ascii(v)[:24])
def test_bad_value_is_refused_by_name_in_one_line(name: str, text: str) -> None:
    message = refusal({name: text})
    assert message.startswith(name)
    assert BY_NAME[name].accepts in message
    assert "\n" not in message
    assert len(message) < 700


@pytest.mark.parametrize(("name", "text"), REFUSED, ids=lambda v: ascii(v)[:24])
def test_refusal_shows_the_value_unless_it_is_secret(name: str, text: str) -> None:
    message = refusal({name: text})
    if not BY_NAME[name].secret:
        assert repr(text[:200]) in message
    elif text:
        assert text not in message
        assert SECRET not in message


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s.secret], ids=lambda s: s.name)
def test_secrets_do_not_show_in_repr(setting: Setting) -> None:
    marker = "marker-0123456789abcdef"
    text = key_table("other", marker) if setting.name == "GATEWAY_API_KEYS" else marker
    config = load({setting.name: text})
    assert marker in str(getattr(config, setting.name.lower()))
    assert marker not in repr(config)


BOTH = {"AWG_INTERFACE": "awg0", "AWG_IPV4_SUBNET": "10.0.2.0/24", "AWG_IPV6_SUBNET": "fd00:2::/64"}


def test_each_interface_has_its_own_settings() -> None:
    plain, obfuscated = interface_settings(load({**BOTH, "AWG_EXTRA_PORTS": "53"}))
    assert (plain.name, plain.ports) == ("wg0", (51820,))
    assert (obfuscated.name, obfuscated.ports) == ("awg0", (51821, 53))
    assert obfuscated.subnets["ipv4"] == ip_network("10.0.2.0/24")
    assert obfuscated.private_key_file == "/etc/wireguard/awg-privatekey"
    (alone,) = interface_settings(load({**BOTH, "WG_INTERFACE": ""}))
    assert alone.name == "awg0"
    (four,) = interface_settings(load({**BOTH, "WG_INTERFACE": "", "AWG_IPV6_SUBNET": ""}))
    assert set(four.subnets) == {"ipv4"}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"WG_INTERFACE": "", "AWG_INTERFACE": ""}, "WG_INTERFACE, AWG_INTERFACE"),
        ({"AWG_INTERFACE": "wg0"}, "AWG_INTERFACE"),
        ({"AWG_IPV4_SUBNET": "", "AWG_IPV6_SUBNET": ""}, "AWG_IPV4_SUBNET and AWG_IPV6_SUBNET"),
        ({"AWG_IPV4_SUBNET": "10.0.0.0/22"}, "AWG_IPV4_SUBNET"),
        ({"AWG_IPV6_SUBNET": "fd42::/16"}, "AWG_IPV6_SUBNET"),
        ({"AWG_PORT": "51820"}, "AWG_PORT, AWG_EXTRA_PORTS"),
        ({"WG_EXTRA_PORTS": "443,53", "AWG_EXTRA_PORTS": "53"}, "AWG_PORT, AWG_EXTRA_PORTS"),
        ({"AWG_PRIVATE_KEY_FILE": "/etc/wireguard/privatekey"}, "AWG_PRIVATE_KEY_FILE"),
        ({"WG_ENDPOINT": "vpn.example:51821"}, "WG_ENDPOINT"),
        ({"WG_ENDPOINT": "[2001:db8::1]:53", "AWG_EXTRA_PORTS": "53"}, "WG_ENDPOINT"),
        ({"AWG_PRIVATE_KEY_FILE": "k", "WG_PRIVATE_KEY_FILE": "./k"}, "AWG_PRIVATE_KEY_FILE"),
    ],
)
def test_what_two_interfaces_must_not_share_is_refused_by_name(
    settings: dict[str, str], name: str
) -> None:
    assert refusal({**BOTH, **settings}).startswith(f"{name}: ")


def test_defaults_are_the_contracts() -> None:
    config = load()
    assert {name: getattr(config, name) for name in CONTRACT_DEFAULTS} == CONTRACT_DEFAULTS


@pytest.mark.parametrize("name", CONTRACT_OTHERS)
def test_setting_of_the_contract_is_served(name: str) -> None:
    assert name in BY_NAME


def test_api_key_is_required() -> None:
    with pytest.raises(ConfigError, match=r"^GATEWAY_API_KEY is not set"):
        load_config({})


def test_one_of_the_subnets_is_required() -> None:
    message = refusal({"WG_IPV4_SUBNET": "", "WG_IPV6_SUBNET": ""})
    assert "WG_IPV4_SUBNET" in message
    assert "WG_IPV6_SUBNET" in message


@pytest.mark.parametrize("present", ["cert.pem", "key.pem"])
def test_half_a_certificate_pair_is_refused(present: str) -> None:
    Path(present).write_text("x")
    message = refusal({})
    assert "TLS_CERT" in message
    assert "TLS_KEY" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GATEWAY_API_KEYS", '{"a": "0123456789abcdef", "a": "fedcba9876543210"}'),
        ("DNS_SERVERS", '{"a": "1.1.1.1", "a": "9.9.9.9"}'),
        ("SERVICE_CLASSES", '{"a": {}, "a": {}}'),
    ],
)
def test_a_name_that_is_given_twice_is_told(name: str, value: str) -> None:
    """The rest is right, and a secret value is not shown."""
    assert "JSON with unique names" in refusal({name: value})


def test_one_file_for_certificate_and_key_must_exist() -> None:
    """Otherwise the certificate that the gateway makes would replace the key that it made."""
    settings = {"TLS_CERT": "both.pem", "TLS_KEY": "./both.pem"}
    assert refusal(settings).startswith("TLS_CERT, TLS_KEY: both are 'both.pem'")
    Path("both.pem").write_text("x")
    assert load(settings).tls_cert == "both.pem"


# --- .env -----------------------------------------------------------------------------------------

ENV_LINES: list[tuple[str, dict[str, str]]] = [
    ("A=b", {"A": "b"}),
    ("  A = b  ", {"A": "b"}),
    ("export A=b", {"A": "b"}),
    ("exportA=b", {"exportA": "b"}),
    ("A=", {"A": ""}),
    ("A= # nothing", {"A": ""}),
    ('A="b c"', {"A": "b c"}),
    ("A='b \"c\"'", {"A": 'b "c"'}),
    ('A="b # c" # comment', {"A": "b # c"}),
    ("A=b c # comment", {"A": "b c"}),
    ("A=b=c", {"A": "b=c"}),
    ('A={"d1":"1.1.1.1"}', {"A": '{"d1":"1.1.1.1"}'}),
    ("# A=b", {}),
    ("", {}),
    ("A=1\r\nB=2\r\n", {"A": "1", "B": "2"}),
    ("A=1\nA=2", {"A": "2"}),
    ("\ufeffA=1", {"A": "1"}),  # as editors on Windows save UTF-8
]


@pytest.mark.parametrize(("text", "values"), ENV_LINES)
def test_env_file_line_forms(text: str, values: dict[str, str]) -> None:
    assert read_env_file(text, ".env") == values


@pytest.mark.parametrize(
    "line",
    [
        "just text",
        "1A=b",
        'A="b',
        'A= "b',
        "A='b' c",
        "A= 'b'c",
        "A=#b",
        "=b",
        "A-B=c",
        "export A B=c",
    ],
)
def test_bad_env_line_is_named_by_number_without_its_content(line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_env_file(f"A=1\n\n# x\n{line}\n", "/some/.env")
    assert str(caught.value) == "/some/.env line 4: expected KEY=VALUE"


def test_environment_wins_over_file_and_file_over_defaults(tmp_path: Path) -> None:
    (tmp_path / "my.env").write_text("WG_MTU=1300\nAPI_PORT=9000\n")
    config = load({"API_PORT": "9001"}, str(tmp_path / "my.env"))
    assert (config.wg_mtu, config.api_port, config.api_host) == (1300, 9001, "0.0.0.0")


def test_env_file_in_the_working_directory_is_read_unasked(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("WG_MTU=1301\n")
    assert load().wg_mtu == 1301


def test_env_file_that_was_asked_for_must_be_readable(tmp_path: Path) -> None:
    assert "--env-file" in refusal({}, str(tmp_path / "absent"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert "--env-file" in refusal({}, str(tmp_path / "binary"))


# --- any text -------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [
        '{"a":',
        '"',
        "}",
        "[",
        "]",
        ",",
        "1.1.1.1",
        "::",
        "/",
        "64",
        "%",
        "-",
        ".",
        " ",
        "\n",
        "9" * 30,
    ]
)
ANY_TEXT = st.one_of(
    st.text(max_size=60),
    st.text(st.characters(codec=None), max_size=30),  # lone surrogates too
    st.lists(PIECES, max_size=12).map("".join),
)


@given(setting=st.sampled_from(SETTINGS), text=ANY_TEXT)
def test_any_text_is_parsed_or_refused_by_name(setting: Setting, text: str) -> None:
    try:
        config = load({setting.name: text})
    except ConfigError as error:
        assert setting.name in str(error) or "TLS_CERT" in str(error)
    else:
        assert isinstance(config, Config)


# --- names that are none --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("ALOWED_BACKENDS", "ALLOWED_BACKENDS"),
        ("WG_IPV4_SUBNETT", "WG_IPV4_SUBNET"),
        ("wg_mtu", "WG_MTU"),
        ("DNS_SERVER", "DNS_SERVERS"),
        ("api_prot", "API_PORT"),
        ("WG_PORT", "AWG_PORT"),
        ("GATEWAY_API_KEI", "GATEWAY_API_KEY"),
        ("AWG_PRIVATE_KEY", "AWG_PRIVATE_KEY_FILE"),
    ],
)
def test_misspelt_setting_is_refused_with_the_nearest_name(
    name: str, meant: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "my.env"
    file.write_text(f"{name}=its-secret-value\n")
    assert refusal({}, str(file)) == f"{file}: {name} is unknown: did you mean {meant}?"
    load({name: "its-secret-value"})  # the environment has names of anybody
    assert f"{name} in the environment is ignored: did you mean {meant}?" in caplog.text
    assert "its-secret-value" not in caplog.text


def test_other_names_are_a_warning_in_the_file_and_nothing_in_the_environment(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "my.env"
    file.write_text("COMPOSE_PROJECT_NAME=vpn\n")
    load({"TERM": "vt100", "PATH": "/bin", "X" * 100_000: ""}, str(file))
    [record] = caplog.records
    assert "COMPOSE_PROJECT_NAME is not a setting of wggw, and is ignored" in record.getMessage()


def test_settings_of_an_interface_that_is_not_set_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    given = {"AWG_PARAMS": '{"jc": 3}', "AWG_PORT": "443", "AWG_IPV6_SUBNET": ""}
    load(given)
    assert caplog.messages == [
        "AWG_PORT, AWG_PARAMS: without effect, because AWG_INTERFACE is not set"
    ]
    caplog.clear()
    load({**BOTH, **given})
    assert caplog.messages == []


def test_every_misspelt_name_of_a_file_is_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "my.env"
    file.write_text("WG_MTUU=1280\nDNS_SERVER={}\n")
    assert "WG_MTUU is" in refusal({}, str(file))
    assert "DNS_SERVER is" in refusal({}, str(file))


@pytest.mark.parametrize(
    ("given", "listening", "chosen", "obfuscated"),
    [
        ("vpn.example", "vpn.example:51820", "vpn.example:53", "vpn.example:51821"),
        ("vpn.example:443", "vpn.example:443", "vpn.example:53", "vpn.example:51821"),
        ("[2001:db8::1]:443", "[2001:db8::1]:443", "[2001:db8::1]:53", "[2001:db8::1]:51821"),
        ("", None, None, None),
    ],
)
def test_public_port_takes_the_place_of_the_listen_port_alone(
    given: str, listening: str | None, chosen: str | None, obfuscated: str | None
) -> None:
    plain, other = interface_settings(load({**BOTH, "WG_ENDPOINT": given, "WG_EXTRA_PORTS": "53"}))
    shown = plain.endpoint(51820), plain.endpoint(53), other.endpoint(51821)
    assert shown == (listening, chosen, obfuscated)
