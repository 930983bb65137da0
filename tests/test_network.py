"""The host's network: the ruleset's text, ufw's rules, what else blocks; and up, down and show."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import netns
import pytest
from harness import API_KEY, PROGRAM, run_wggw, some

import wggw


def config(**settings: str) -> wggw.Config:
    return wggw.load_config({"GATEWAY_API_KEY": API_KEY, **settings}, os.devnull)


def ruleset(**settings: str) -> str:
    chosen = config(**settings)
    return wggw.render_ruleset(chosen, wggw.interface_settings(chosen))


# --- text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "taken", "found"),
    [
        ("10.0.0.0/24", [], "10.0.0.0/24"),
        ("10.0.0.0/24", ["10.0.0.0/16"], "10.1.1.0/24"),
        ("10.0.0.0/24", ["10.0.0.0/8"], "172.17.1.0/24"),
        ("10.0.0.0/8", ["10.0.0.0/8"], "172.16.0.0/16"),
        ("10.0.0.0/16", ["10.0.0.0/8", "172.16.0.0/15"], "172.18.0.0/16"),
        ("fd42:4242:1::/64", ["fd42:4242:1::/64"], "fd42:4242:0:101::/64"),
    ],
)
def test_a_free_subnet_overlaps_none_of_the_hosts(
    wanted: str, taken: list[str], found: str
) -> None:
    networks = [(ipaddress.ip_network(text), "eth0") for text in taken]
    assert str(wggw.free_subnet(ipaddress.ip_network(wanted), networks)) == found


@pytest.mark.parametrize(
    ("subnet", "translated"),
    [
        ("10.0.1.0/24", True),
        ("172.31.0.0/16", True),
        ("172.32.0.0/16", False),
        ("192.168.7.0/24", True),
        ("100.64.0.0/10", True),
        ("198.51.100.0/24", False),
        ("8.0.0.0/6", False),  # holds 10.0.0.0/8 and more
        ("fd42:4242:1::/64", True),
        ("2001:db8::/64", False),
    ],
)
def test_only_private_and_ula_subnets_are_translated(subnet: str, translated: bool) -> None:
    family = "WG_IPV6_SUBNET" if ":" in subnet else "WG_IPV4_SUBNET"
    text = ruleset(**{"WG_IPV4_SUBNET": "10.9.0.0/24", "WG_IPV6_SUBNET": "", family: subnet})
    assert (f"saddr {subnet} " in text and "masquerade" in text) == translated


def test_clients_are_isolated_unless_told_otherwise() -> None:
    rule = 'iifname { "wg0" } oifname { "wg0" } drop'
    assert rule in ruleset()
    assert rule not in ruleset(WG_ISOLATE="false")


def test_api_is_for_backends_only_in_both_families() -> None:
    text = ruleset(ALLOWED_BACKENDS="192.0.2.0/24,192.0.2.7/32", API_PORT="8443")
    assert "meta nfproto ipv4 ip saddr != { 192.0.2.0/24 } tcp dport 8443 drop" in text
    assert 'iifname != "lo" meta nfproto ipv6  tcp dport 8443 drop' in text
    everyone = ruleset(ALLOWED_BACKENDS="0.0.0.0/0,2001:db8::/32", API_PORT="8443")
    assert "nfproto ipv4" not in everyone
    assert "ip6 saddr != { 2001:db8::/32 } tcp dport 8443 drop" in everyone


def test_ufw_speaks_the_same_words() -> None:
    chosen = config(ALLOWED_BACKENDS="192.0.2.0/24")
    assert wggw.ufw_rules(chosen, wggw.interface_settings(chosen)) == [
        "allow 51820/udp",
        "allow from 192.0.2.0/24 to any port 8000 proto tcp",
        "route allow in on wg0",
    ]
    chosen = config(ALLOWED_BACKENDS="192.0.2.7/32,2001:db8::7/128")
    assert wggw.ufw_rules(chosen, wggw.interface_settings(chosen))[1:3] == [
        "allow from 192.0.2.7 to any port 8000 proto tcp",
        "allow from 2001:db8::7 to any port 8000 proto tcp",
    ]
    chosen = config(ALLOWED_BACKENDS="192.0.2.7/32,0.0.0.0/0")
    assert wggw.ufw_rules(chosen, wggw.interface_settings(chosen))[1:2] == ["allow 8000/tcp"]
    shown = """Added user rules (see 'ufw status' for running firewall):
ufw allow 51820/udp comment 'wggw'
ufw allow 22/tcp
ufw allow 443/tcp comment 'web'
ufw route allow in on wg0 comment 'wggw'
"""
    wanted = ["allow 22/tcp", "allow 443/tcp", "allow 51820/udp"]
    assert wggw.compare_ufw(shown, wanted) == ([], ["route allow in on wg0"], [])


def test_a_rule_in_ufw_that_ours_would_replace_stays_theirs() -> None:
    """ufw replaces action, logging and comment of a rule that is otherwise the same (0.36.2)."""
    shown = """Added user rules (see 'ufw status' for running firewall):
ufw allow log 51820/udp comment 'my vpn'
ufw deny 8000/tcp
ufw deny out 8000/tcp
ufw route deny in on wg1
"""
    wanted = ["allow 51820/udp", "allow 8000/tcp", "route allow in on wg0"]
    assert wggw.compare_ufw(shown, wanted) == (wanted[2:], [], ["deny 8000/tcp"])
    assert wggw.compare_ufw("ufw route limit in on wg0 log\n", wanted)[2] == [
        "route limit in on wg0 log"
    ]


@pytest.mark.parametrize(
    ("theirs", "found"),
    [
        ("deny 8000/tcp", "WRONG: a rule of somebody else is against the gateway: deny 8000/tcp"),
        ("allow 8000/tcp comment 'web'", "ok: active, and has the gateway's rules"),
    ],
)
def test_net_show_names_a_rule_of_ufw_against_the_gateway(theirs: str, found: str) -> None:
    host = wggw.Host(config(), wggw.Store())
    ours = [f"ufw {rule} comment 'wggw'" for rule in wggw.ufw_rules(host.config, host.tunnels)]
    shown = [line for line in ours if "8000" not in line]
    host.__dict__["ufw"] = "\n".join([*shown, f"ufw {theirs}"])
    (only,) = wggw._look_at_ufw(host)
    assert f"{'WRONG' if only.failed else 'ok'}: {only.found}" == found


def test_ufw_is_never_without_the_rule_that_a_new_one_replaces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    shown = "ufw allow 8000/tcp comment 'wggw'\n"

    def ufw(*command: str) -> str:
        calls.append(" ".join(command))
        return shown if command[1] == "show" else ""

    monkeypatch.setattr(wggw, "run_tool", ufw)
    wanted = ["allow from 192.0.2.7 to any port 8000 proto tcp"]
    assert len(list(wggw.align_ufw(shown, wanted))) == 2
    assert calls == [f"ufw {wanted[0]} comment wggw", "ufw delete allow 8000/tcp"]
    calls.clear()
    monkeypatch.setattr(wggw, "tool", lambda name: name if name == "ufw" else None)
    assert len(list(wggw.net_down("wggw .env", (), wggw.recognise_none, True))) == 2
    assert calls == ["ufw show added", "ufw delete allow 8000/tcp"]  # also from an inactive one


def test_ufw_without_ipv6_keeps_no_other_rule_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def ufw(*command: str) -> str:
        if "2001:db8::/64" in command:  # in the words of ufw 0.36.2 with IPV6=no
            raise wggw.BackendError("ufw allow: status 1: ERROR: IPv6 support not enabled")
        return ""

    monkeypatch.setattr(wggw, "run_tool", ufw)
    wanted = ["allow from 2001:db8::/64 to any port 8000 proto tcp", "route allow in on wg0"]
    refused, added = wggw.align_ufw("", wanted)
    assert refused.startswith(f"ufw: {wanted[0]}: not added, because ufw drops all IPv6: set IPV6")
    assert added == f"ufw: {wanted[1]}"


# --- what else blocks -----------------------------------------------------------------------------


def chain(*rules: str, policy: str = "drop", kind: str = "filter", hook: str = "forward") -> str:
    """What nft shows of a chain at a hook."""
    head = f"type {kind} hook {hook} priority filter; policy {policy};"
    return "".join(f"\t\t{line}\n" for line in (head, *rules))


def table(text: str, name: str = "ip filter", more: str = "") -> str:
    """What nft shows of a table with one chain."""
    others = "\tset s {\n\t\tflags dynamic\n\t}\n\n\tchain other {\n\t\taccept\n\t}\n\n"
    return f"table {name} {{ # progname x\n{more}{others}\tchain FORWARD {{\n{text}\t}}\n}}\n"


FOREIGN = "table ip filter, chain FORWARD"


@pytest.mark.parametrize(
    ("shown", "found"),
    [
        ("", None),
        (table(chain()), (True, False)),
        (table(chain("accept")), (True, True)),
        (table('\t\tcomment "of a chain"\n' + chain()), (True, False)),
        (table(chain(policy="accept")), (False, False)),
        (table(chain("unheard of { 1 }", policy="accept")), (False, True)),
        (table(chain(hook="input")), None),
        (table("\t\taccept\n"), None),
        (table(chain(), "inet wggw"), None),
        (table(chain(), "inet wggw_classes"), None),
        (table(chain(), "bridge filter"), None),
        (table(chain("accept", kind="nat", policy="accept")), (False, False)),
        (table(chain(kind="nat")), (True, False)),
        (table(chain(), more="\tflags dormant\n"), None),
    ],
)
def test_foreign_chains_are_judged_by_their_policy_alone(
    shown: str, found: tuple[bool, bool] | None
) -> None:
    ruleset = table(chain(hook="output"), "ip before") + shown + table("", "ip after")
    chains = list(wggw.foreign_chains(ruleset, "forward"))
    assert [(c.drops, bool(c.rules)) for c in chains] == ([found] if found else [])
    assert {(c.name, c.shown_by) for c in chains} <= {(FOREIGN, "nft list chain ip filter FORWARD")}


@pytest.mark.parametrize(
    ("rules", "found"),
    [
        (["counter packets 0 bytes 0 jump ufw-before-forward", "jump ufw-reject-forward"], True),
        (["jump ufw-before-forward", "accept"], False),
        (["counter jump DOCKER-USER"], False),
        (['drop comment "jump ufw-"'], False),
        ([], False),
    ],
)
def test_chain_is_ufws_when_all_of_its_rules_lead_there(rules: list[str], found: bool) -> None:
    (only,) = wggw.foreign_chains(table(chain(*rules)), "forward")
    assert only.is_ufw == found


def test_old_tables_of_iptables_are_looked_at_or_not_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rules = {"filter": "-P INPUT DROP\n", "mangle": "-P INPUT ACCEPT\n-A INPUT -j DROP\n"}
    (tmp_path / "names").write_text("nat\nfilter\nmangle\n")
    monkeypatch.setattr(wggw, "LEGACY", ((str(tmp_path / "names"), "iptables-legacy"),))
    monkeypatch.setattr(wggw, "tool", lambda name: name)
    monkeypatch.setattr(wggw, "run_tool", lambda *command: rules[command[2]])
    found = [(c.drops, bool(c.rules), c.shown_by) for c in wggw.legacy_chains("INPUT")]
    assert found == [
        (False, True, "iptables-legacy -t mangle -S INPUT"),
        (True, False, "iptables-legacy -t filter -S INPUT"),
    ]
    assert [bool(c.rules) for c in wggw.legacy_chains("POSTROUTING")] == [True]
    monkeypatch.setattr(wggw, "tool", lambda name: None)
    unknown = list(wggw.legacy_chains("FORWARD"))
    assert [(c.drops, bool(c.rules)) for c in unknown] == [(False, True)] * 2
    assert "which is not installed" in unknown[0].name and "apt-get install" in unknown[0].shown_by


def test_a_tool_may_print_what_is_not_utf8() -> None:
    assert wggw.run_tool("printf", "caf\\351") == "caf\ufffd"


# --- on a host ------------------------------------------------------------------------------------


class Host:
    """A network namespace to run `wggw.py net` in, with settings in a file."""

    def __init__(self, directory: Path, space: netns.Namespace) -> None:
        self.space, self.name = space, space.name
        self.settings = directory / "env"

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        with self.space.inside():
            return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    def wggw(self, *words: str) -> subprocess.CompletedProcess[str]:
        with self.space.inside():
            return run_wggw(self.settings.parent, *words, "--env-file", str(self.settings))

    def net(self, action: str, **settings: str) -> tuple[int, str]:
        values = {"GATEWAY_API_KEY": API_KEY, "WG_BACKEND": "memory", **settings}
        self.settings.write_text("".join(f"{name}={value}\n" for name, value in values.items()))
        self.settings.chmod(0o600)
        done = self.wggw("net", action)
        return done.returncode, done.stdout + done.stderr

    def table(self) -> str:
        return self.run("nft", "-s", "list", "ruleset").stdout


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    netns.need("ip", "nft")
    with netns.Namespace() as space:
        made = Host(tmp_path, space)
        if made.run("nft", "list", "ruleset").returncode:
            pytest.skip("nft does not work here")
        yield made


@pytest.mark.real
def test_up_is_idempotent_and_down_leaves_only_what_was_there(host: Host) -> None:
    foreign = (
        "table ip mine { chain forward { type filter hook forward priority 0; policy drop; }; }"
    )
    assert host.run("nft", foreign).returncode == 0
    before = host.table()
    settings = {"WG_EXTRA_PORTS": "53,443", "ALLOWED_BACKENDS": "192.0.2.0/24,2001:db8::/64"}
    code, text = host.net("up", **settings)
    assert (code, "table inet wggw" in text) == (0, True), text
    for part in (
        "udp dport { 53, 443 } redirect to :51820",
        'iifname "wg0" oifname "wg0" drop',
        "ip saddr 10.0.1.0/24",
        "ip6 saddr fd42:4242:1::/64",
        "tcp option maxseg size set rt mtu",
        "ip6 saddr != 2001:db8::/64 tcp dport 8000 drop",
    ):
        assert part in host.table(), part
    for name in ("ipv4.ip_forward", "ipv6.conf.all.forwarding"):
        assert host.run("sysctl", "-n", f"net.{name}").stdout == "1\n"
    assert host.net("up", **settings) == (0, "")
    code, text = host.net("show", **settings)
    assert code == 1
    assert "WRONG  firewall: packets from wg0: dropped by table ip mine, chain forward" in text
    assert "ok     firewall: UDP 51820, TCP 8000: no other filter rule on this host" in text
    assert host.run("nft", "add rule ip mine forward accept").returncode == 0
    code, text = host.net("show", **settings)
    assert "WRONG  firewall" not in text
    maybe = "note   firewall: packets from wg0: may be dropped by table ip mine, chain forward"
    assert f"{maybe} (policy drop)\n" in text
    assert "let a client ping 1.1.1.1. To see the rules: nft list chain ip mine forward\n" in text
    assert host.run("nft", "flush chain ip mine forward").returncode == 0
    assert host.net("up", WG_EXTRA_PORTS="53")[0] == 0
    assert "443" not in host.table()
    code, text = host.net("down")
    assert (code, "removed" in text) == (0, True), text
    assert host.table() == before
    assert host.net("down")[0] == 0


@pytest.mark.real
def test_chains_before_routing_are_told_and_dormant_ones_are_not(host: Host) -> None:
    assert host.net("up")[0] == 0
    for table, flags, hook, rule in (
        ("ip before", "", "prerouting priority raw;", "udp dport 51820 drop;"),
        ("ip after", "", "postrouting priority 0;", "drop;"),
        ("inet sleeping", "flags dormant;", "forward priority 0; policy drop;", ""),
    ):
        made = f"table {table} {{ {flags} chain c {{ type filter hook {hook} {rule} }}; }}"
        assert host.run("nft", made).returncode == 0
    _, text = host.net("show")
    pre, post = "table ip before, chain c", "table ip after, chain c"
    assert f"note   firewall: packets from wg0: may be dropped by {pre}; {post}\n" in text
    assert f"note   firewall: UDP 51820, TCP 8000: may be dropped by {pre}\n" in text
    assert "sleeping" not in text and "no other filter rule" not in text


@pytest.mark.real
def test_extra_ports_are_redirected_wherever_packets_may_arrive(host: Host) -> None:
    """A default route through several links does not name them."""
    for name, net in (("e0", "192.0.2"), ("e1", "198.51.100")):
        host.run("ip", "link", "add", name, "type", "veth", "peer", "name", f"{name}p")
        host.run("ip", "address", "add", f"{net}.2/24", "dev", name)
        host.run("ip", "link", "set", name, "up")
    assert (
        host.run("ip", "route", "add", "default", "via", "192.0.2.1", "dev", "e0").returncode == 0
    )
    settings = {"WG_EXTRA_PORTS": "5353"}
    assert host.net("up", **settings)[0] == 0
    assert 'iifname "e0" fib daddr type local udp dport 5353 redirect' in host.table()
    hops = "nexthop via 192.0.2.1 dev e0 nexthop via 198.51.100.1 dev e1"
    assert host.run("ip", "route", "replace", "default", *hops.split()).returncode == 0
    host.run("ip", "-6", "address", "add", "2001:db8::2/64", "dev", "e0", "nodad")
    host.run("ip", "-6", "route", "add", "default", "via", "2001:db8::1", "dev", "e0")
    assert host.net("up", **settings)[0] == 0
    assert 'iifname != { "lo", "wg0" } fib daddr type local udp dport 5353' in host.table()


READ_ONLY = "mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && exec"


@pytest.mark.real
def test_read_only_proc_sys_is_no_failure_where_forwarding_is_on(host: Host) -> None:
    def up() -> tuple[int, str]:
        host.settings.write_text(f"GATEWAY_API_KEY={API_KEY}\nWG_BACKEND=memory\n")
        host.settings.chmod(0o600)
        command = [*PROGRAM, "net", "up", "--env-file", str(host.settings)]
        script = f'{READ_ONLY} "$@"'
        done = host.run("unshare", "--mount", "sh", "-c", script, "sh", *command)
        return done.returncode, done.stdout + done.stderr

    host.run("sysctl", "-qw", "net.ipv4.ip_forward=0", "net.ipv6.conf.all.forwarding=1")
    code, text = up()
    assert (code, "start the container with --sysctl net.ipv4.ip_forward=1" in text) == (1, True), (
        text
    )
    host.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    assert up() == (0, "")


WAYS = {  # interface of the host -> who is at its other end, the addresses of both
    "wg0": ("client", "10.0.1.1 10.0.1.2/24", "fd42:4242:1::1 fd42:4242:1::2/64"),
    "wg1": ("other", "10.0.2.1 10.0.2.2/24", "fd42:4242:2::1 fd42:4242:2::2/64"),
    "eth0": (
        "outside",
        "192.0.2.1 192.0.2.2/24",
        "2001:db8::1 2001:db8::2/64",
        "169.254.169.1 169.254.169.254/24",
        "fd00:ec2::1 fd00:ec2::254/64",
    ),
}


class Crossing(Host):
    """A host between WAYS, each a network namespace with its default route here."""

    ways: dict[str, netns.Namespace]

    def reaches(self, way: str, address: str, seconds: int = 30) -> bool:
        """Whether a TCP connection from there is refused at the address, and not lost before."""
        with self.ways[way].inside(), contextlib.suppress(OSError):
            try:
                socket.create_connection((address, PORT), seconds).close()
            except ConnectionRefusedError:
                return True
        return False


PORT = 9  # where nobody listens


@pytest.fixture
def crossing(host: Host) -> Iterator[Crossing]:
    made = Crossing(host.settings.parent, host.space)
    made.ways = {}
    with contextlib.ExitStack() as stack:
        for name, (way, *pairs) in WAYS.items():
            space = made.ways[way] = stack.enter_context(netns.Namespace())
            host.space.ip(
                f"link add {name} type veth peer name door netns {space.name}",
                f"link set {name} up",
            )
            space.ip("link set door up")
            for pair in pairs:
                here, there = pair.split()
                nodad = "nodad" if ":" in pair else ""
                host.space.ip(f"address add {here}/{there.split('/')[1]} dev {name} {nodad}")
                space.ip(f"address add {there} dev door {nodad}")
            space.ip(*(f"route add default via {pair.split()[0]}" for pair in pairs[:2]))
        yield made


@pytest.mark.real
@pytest.mark.parametrize("isolate", some(["true", "false"], 1))
def test_who_reaches_whom(crossing: Crossing, isolate: str) -> None:
    two = {"AWG_INTERFACE": "wg1", "AWG_IPV4_SUBNET": "10.0.2.0/24"}
    code, text = crossing.net("up", WG_ISOLATE=isolate, AWG_IPV6_SUBNET="fd42:4242:2::/64", **two)
    assert code == 0, text
    for address in ("192.0.2.2", "2001:db8::2"):
        assert crossing.reaches("client", address), address
    for address in ("169.254.169.254", "fd00:ec2::254"):
        assert not crossing.reaches("client", address, 1), address
    for address in ("10.0.1.2", "fd42:4242:1::2"):
        assert not crossing.reaches("outside", address, 1), address
        seconds = 30 if isolate == "false" else 1
        assert crossing.reaches("other", address, seconds) == (isolate == "false"), address


@pytest.mark.real
def test_an_address_gets_six_new_connections_in_thirty_seconds(crossing: Crossing) -> None:
    settings = {"LIMIT_SSH": str(PORT)}
    code, text = crossing.net("up", **settings)
    assert code == 0, text
    for address in ("192.0.2.1", "2001:db8::1"):
        assert [crossing.reaches("outside", address) for _ in range(6)] == [True] * 6
        assert not crossing.reaches("outside", address, 1)
    assert crossing.reaches("client", "10.0.1.1")  # others are not limited by it
    assert crossing.net("up", **settings) == (0, "")  # what the sets hold is no difference


@pytest.mark.real
@pytest.mark.parametrize(
    "broken", some(["SAMPLE_INTERVAL=never\n", "no settings at all\n", None], 1)
)
def test_down_goes_by_the_mark_and_needs_no_settings(host: Host, broken: str | None) -> None:
    assert host.net("up", WG_INTERFACE="wgx")[0] == 0
    aliases = {
        "wgold": f"wggw {host.settings}",  # of settings from before
        "wgx": "",
        "wgother": "wggw /elsewhere/.env",
        "tun0": "mine",
    }
    for name, alias in aliases.items():
        assert host.run("ip", "tuntap", "add", "dev", name, "mode", "tun").returncode == 0
        assert host.run("ip", "link", "set", "dev", name, "alias", alias).returncode == 0
    # Somebody else's mark is on what is no WireGuard interface.
    veth = ("link", "add", "veth0", "alias", aliases["wgold"], "type", "veth", "peer", "name", "w")
    assert host.run("ip", *veth).returncode == 0
    assert host.run("ip", "link", "set", "veth0", "alias", aliases["wgold"]).returncode == 0
    if broken is None:
        host.settings.unlink()
    else:
        host.settings.write_text(broken)
    done = host.wggw("net", "down")
    assert done.returncode == 0, done.stderr
    assert f"only interfaces with the mark '{aliases['wgold']}' are removed\n" in done.stderr
    assert "wgold: removed\n" in done.stdout
    for name in ("wgx", "wgother"):
        assert f"{name} stays: it does not carry this gateway's mark" in done.stdout
    assert "but 'wggw /elsewhere/.env'" in done.stdout
    assert host.table() == ""
    left = host.run("ip", "-o", "link").stdout
    names = (" wgold:", " wgx:", " wgother:", " tun0:", " veth0@")
    assert [name in left for name in names] == [False, True, True, True, True]


@pytest.mark.real
@pytest.mark.parametrize("has_mark", [True, False])
def test_table_of_another_gateway_stays(host: Host, has_mark: bool) -> None:
    """Its mark is on it; one of an older version has none, but its interfaces have."""
    classes = {"SERVICE_CLASSES": '{"slow":{"down":"1mbit"}}'}
    assert host.net("up", **classes)[0] == 0
    mark = f"wggw {host.settings}"
    if not has_mark:
        lines = [line for line in host.table().splitlines() if "comment" not in line]
        host.settings.write_text("\n".join(["flush ruleset", *lines, ""]))
        assert host.run("nft", "-f", str(host.settings)).returncode == 0
        assert host.run("ip", "tuntap", "add", "dev", "wg0", "mode", "tun").returncode == 0
        assert host.run("ip", "link", "set", "dev", "wg0", "alias", mark).returncode == 0
    table = host.table()
    assert ("comment" in table) == has_mark
    host.settings = host.settings.with_name("another")
    code, text = host.net("up", WG_INTERFACE="wg1")
    assert (code, f"with the mark {mark!r}" in text) == (1, True), text
    code, text = host.net("down", WG_INTERFACE="wg1")
    assert (code, "table inet wggw stays" in text) == (0, True), text
    assert host.table() == table


@pytest.mark.parametrize("path", ["/etc/wggw/wggw.env", "/" + 123 * "x", '/the "new" one'])
def test_a_mark_that_nft_cannot_take_is_a_hash(path: str) -> None:
    comment = wggw.table_comment(f"wggw {path}")
    assert (path in comment) == (path == "/etc/wggw/wggw.env")
    assert comment.count('"') == 2 and len(comment) <= len('comment ""') + 128
    table = f"table inet wggw {{\n\t{comment}\n}}\n"
    assert wggw.other_gateway(table, f"wggw {path}") == ""
    assert wggw.other_gateway(table, "wggw /elsewhere/.env") in comment


@pytest.mark.real
def test_classes_go_with_their_setting_and_with_the_gateway(host: Host) -> None:
    classes = {"SERVICE_CLASSES": '{"slow":{"down":"1mbit"}}'}
    code, text = host.net("up", **classes)
    assert (code, "nftables: table inet wggw_classes" in text) == (0, True), text
    assert host.net("up", **classes) == (0, "")
    code, text = host.net("show")
    former = "WRONG  service classes: there are none, but table inet wggw_classes has the rules"
    assert former in text
    assert host.net("up")[0] == 0
    assert "wggw_classes" not in host.table() and former not in host.net("show")[1]
    assert host.net("up", **classes)[0] == 0
    assert host.run("nft", "delete table inet wggw").returncode == 0
    code, text = host.net("down", **classes)
    assert (code, "table inet wggw_classes removed" in text) == (0, True), text
    assert host.table() == ""


@pytest.mark.real
@pytest.mark.parametrize(
    "change",
    [
        "add table {} {{ flags dormant; }}",
        "add chain {} forward {{ policy drop; }}",
        "delete set {} free.4",
        "flush chain {0} forward; add rule {0} forward accept",
    ],
)
def test_rules_of_classes_that_somebody_changed_are_made_anew(host: Host, change: str) -> None:
    """Also where there are as many rules as before."""
    classes = {"SERVICE_CLASSES": '{"slow":{"down":"1mbit","destinations":["::/0"]},"free":{}}'}
    code, text = host.net("up", **classes)
    assert code == 0, text
    rules = host.table().split()
    config = wggw.load_config({}, str(host.settings))
    tunnels = wggw.interface_settings(config)
    with host.space.inside():
        table = wggw.ClassTable(config.service_classes, tunnels)
        assert table.alive()
        wggw.run_tool("nft", "-f", "-", given=wggw.render_classes(config.service_classes, tunnels))
        assert table.alive()  # as after `wggw net up`, which changes only the handles
        host.run("nft", change.format(wggw.CLASS_TABLE))
        assert not table.alive()
        table.set_up()
        assert table.alive() and not table.failure
        table.close()
    assert sorted(host.table().split()) == sorted(rules)


@pytest.mark.real
def test_down_can_keep_the_interfaces(host: Host) -> None:
    assert host.net("up")[0] == 0
    assert host.run("ip", "tuntap", "add", "dev", "wg0", "mode", "tun").returncode == 0
    alias = f"wggw {host.settings}"
    assert host.run("ip", "link", "set", "dev", "wg0", "alias", alias).returncode == 0
    assert host.wggw("net", "down", "--keep-interfaces").returncode == 0
    assert host.table() == ""
    assert host.run("ip", "link", "show", "wg0").returncode == 0
    assert host.wggw("net", "down").returncode == 0
    assert host.run("ip", "link", "show", "wg0").returncode == 1


@pytest.mark.real
@pytest.mark.parametrize("runs", [True, False])
def test_down_says_that_a_gateway_which_runs_makes_its_interface_again(
    host: Host, runs: bool
) -> None:
    host.settings.write_text(f"GATEWAY_API_KEY={API_KEY}\n")
    host.settings.chmod(0o600)
    assert host.run("ip", "tuntap", "add", "dev", "wg0", "mode", "tun").returncode == 0
    alias = f"wggw {host.settings}"
    assert host.run("ip", "link", "set", "dev", "wg0", "alias", alias).returncode == 0
    with host.space.inside():
        lock = wggw.lock_interface("wg0" if runs else "wg1")
    with contextlib.closing(lock):
        done = host.wggw("net", "down")
    told = "wggw: wg0: removed\n" + runs * "wggw: note: a gateway runs and makes wg0 again: stop it"
    assert (done.returncode, told in done.stdout) == (0, True), done.stdout
    assert ("again" in done.stdout) == runs


@pytest.mark.real
def test_up_and_down_do_all_of_it_though_nobody_reads(host: Host) -> None:
    host.settings.write_text(f"GATEWAY_API_KEY={API_KEY}\nWG_BACKEND=memory\n")
    host.settings.chmod(0o600)

    def net(action: str) -> None:
        command = [*PROGRAM, "net", action, "--env-file", str(host.settings)]
        done = host.run("sh", "-c", '"$@" >/dev/full', "sh", *command)
        assert (done.returncode, done.stderr) == (1, "wggw: output: No space left on device\n")

    net("up")
    assert host.run("sysctl", "-n", "net.ipv6.conf.all.forwarding").stdout == "1\n"
    assert host.run("ip", "tuntap", "add", "dev", "wg0", "mode", "tun").returncode == 0
    alias = f"wggw {host.settings}"
    assert host.run("ip", "link", "set", "dev", "wg0", "alias", alias).returncode == 0
    net("down")
    assert host.table() == ""


@pytest.mark.real
def test_up_tells_each_change_of_an_interface(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A userspace interface, which a kernel's one is like here; the last time nothing is left."""
    assert host.run("ip", "tuntap", "add", "dev", "wg0", "mode", "tun").returncode == 0
    link = wggw.make_link(wggw.interface_settings(config())[0], b"")
    monkeypatch.setattr(wggw, "find_own_link", lambda route, link, *_: route.find(link.name))

    def told() -> list[str]:
        with host.space.inside():
            wggw.claim_links([link], wggw.recognise_none)
            return list(wggw.make_interface(link))

    addresses = ["wg0: 10.0.1.1/24", "wg0: fd42:4242:1::1/64"]
    assert told() == ["wg0: MTU 1420, up", *addresses]
    host.space.ip("address replace 10.9.9.1/24 dev wg0", "address del 10.0.1.1/24 dev wg0")
    assert told() == [addresses[0], "wg0: 10.9.9.1/24: removed"]
    host.space.ip("link set wg0 down")
    assert told() == ["wg0: MTU 1420, up", addresses[1]]  # IPv6 addresses go with a link's end
    assert told() == []
    assert caplog.messages == [f"wg0: is this gateway's, and gets its mark: {link.mark!r}"]


@pytest.mark.real
def test_router_advertisements_are_still_heard_by_a_host_that_forwards(host: Host) -> None:
    host.run("ip", "link", "add", "uplink", "type", "veth", "peer", "name", "router")
    accept = ("sysctl", "-n", "net.ipv6.conf.uplink.accept_ra")
    assert host.run(*accept).stdout == "1\n"
    assert host.net("up")[0] == 0
    assert host.run(*accept).stdout == "2\n"
    host.run("sysctl", "-w", "net.ipv6.conf.uplink.accept_ra=1")  # a router that will not listen
    assert host.net("up") == (0, "")
    assert host.run(*accept).stdout == "1\n"


@pytest.mark.real
def test_missing_tool_is_named(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.net("show")
    monkeypatch.setattr(wggw, "TOOL_PATH", "/nowhere")
    done = host.wggw("net", "up")
    assert (done.returncode, done.stderr) == (1, "wggw: nft: No such file or directory\n")
