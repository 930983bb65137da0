"""install.sh: what it refuses, what it makes, and that it never changes what is there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import LONG, ROOT, some
from sandbox import GUARD, Machine, machine

INSTALL = ROOT / "install.sh"
COMMAND = "./install.sh --foreground"
UNIT = "/etc/systemd/system/wggw.service"
DROP_INS = f"{UNIT}.d"
PRINTED = re.compile(r"^  (\(umask 077; .* peer add .*\))$", re.MULTILINE)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Machine]:
    with machine(tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """One for all tests of what is refused, or only shown, and leaves nothing behind."""
    with machine(tmp_path_factory.mktemp("untouched")) as made:
        yield made


def needs_userspace(host: Machine) -> None:
    if Path("/sys/module/wireguard").exists():
        pytest.skip("the kernel has WireGuard: nothing else is needed")


# --- options: no root needed ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--purge",), "--purge needs --uninstall"),
        (("--foreground", "--json"), "--json works only for installing the service"),
        (("--backend",), "--backend needs a value"),
        (("--key-file",), "--key-file: '' is not a file that can be read"),
        (("--key-file", "/no such"), "--key-file: '/no such' is not a file that can be read"),
        (("--key-file", "/"), "--key-file: '/' is not a file that can be read"),
        (("--backend", "10.0.0.0/8", "--backend", "a;b"), "--backend: 'a;b' has characters"),
        (("--foreground", "--nonsense"), "unknown option --nonsense"),
        (("--foreground", "extra"), "unknown option extra"),
        (("--foreground", "--port"), "--port needs a value"),
        (("--foreground", "--endpoint", "a b"), "--endpoint: 'a b' has characters"),
        (("--foreground", "--endpoint=$(id)"), "--endpoint: '$(id)' has characters"),
        (("--foreground", "--ipv4-subnet", "a\nB=c"), "--ipv4-subnet: 'a\nB=c' has characters"),
    ],
)
def test_wrong_option_is_refused_by_name(arguments: tuple[str, ...], message: str) -> None:
    done = subprocess.run([INSTALL, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_help_names_every_option() -> None:
    done = subprocess.run([INSTALL, "--help"], capture_output=True, text=True, check=True)
    options = set(re.findall(r"^ +(--[a-z0-9-]+)[^a-z0-9*=-]", INSTALL.read_text(), re.MULTILINE))
    assert len(options) >= 10
    assert {option for option in options if option not in done.stdout} == set()


@pytest.mark.parametrize(("net_up", "code"), [(0, 0), (1, 1), (2, 0), (3, 0), (126, 1)])
def test_what_does_not_mend_itself_is_left_to_the_service(net_up: int, code: int) -> None:
    """After ExecStartPre has failed, systemd tries again for ever."""
    unit = (ROOT / "wggw.service").read_text()
    (line,) = re.findall(r"^ExecStartPre=\+(.*)$", unit, re.MULTILINE)
    *shell, script = shlex.split(line.replace("$$", "$"))
    script, replaced = re.subn("/usr/local/sbin/wggw net up [^|]*", f"(exit {net_up}) ", script)
    assert replaced == 1
    assert subprocess.run([*shell, script], check=False).returncode == code
    assert "\nRestartPreventExitStatus=2 3\n" in unit


@pytest.mark.parametrize("token", ["", "another"])
def test_sandbox_runs_nothing_outside_itself(token: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{GUARD}echo reached"],
        env={"PATH": os.environ["PATH"], "TOKEN": token},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 99
    assert "reached" not in done.stdout


# --- on a machine ---------------------------------------------------------------------------------


@pytest.mark.real
def test_printed_command_creates_a_peer_and_only_root_reads_the_settings(host: Machine) -> None:
    """So it does where a Python of root's own comes first on PATH, and is too old besides."""
    (host.bin / "python3").write_text("#!/bin/sh\nexit 9\n")
    (host.bin / "python3").chmod(0o755)
    host.output("mkdir '../a tree' && cp install.sh wggw.py '../a tree'")
    command = COMMAND.replace("./", "'../a tree/'")
    install = host.start(f"{command} --endpoint vpn.example.org --port 5000 --api-port 8443")
    printed = PRINTED.search(install.wait_text(">laptop.conf"))
    assert printed, install.text()
    host.output(f"cd .. && {printed[1]}\n")
    file = host.output("cat ../laptop.conf; stat -c %a ../laptop.conf")
    assert "Address = 10.0.1.2/32" in file and file.endswith("\n600\n")
    assert "Endpoint = vpn.example.org:5000" in file
    private = re.search("^PrivateKey = (.*)$", file, re.MULTILINE)
    assert private
    public = host.output(f"wg pubkey <<<'{private[1]}'")
    assert host.output("wg show wg0 peers") == public
    for shown in (
        host.output("wg pubkey </etc/wggw/privatekey").strip(),
        "https://vpn.example.org:8443",
        host.output("openssl x509 -in /etc/wggw/cert.pem -outform DER | sha256sum")[:64],
    ):
        assert shown in install.text()
    assert host.apt_calls() == []

    files = host.output("stat -c '%a %U %n' /etc/wggw /etc/wggw/* /var/lib/wggw").splitlines()
    assert [line for line in files if not re.match("[67]00 root ", line)] == []
    assert "600 root /etc/wggw/wggw.env" in files
    key = re.search("^GATEWAY_API_KEY=([0-9a-f]{64})$", host.output("cat /etc/wggw/wggw.env"), re.M)
    assert key
    assert key[1] not in install.text()
    assert host.run(f"grep -l {key[1][:40]}[{key[1][40]}] /proc/[0-9]*/cmdline").returncode == 1


WRONG_SETTINGS = [
    ("--set WG_MTU=1", "install.sh: WG_MTU: '1' is not bytes"),
    ("--set WG_MUT=1400", "--set WG_MUT: there is no such setting"),
    ("--set SNAPSHOT_KEY=0123456789abcdef", "--set SNAPSHOT_KEY: this is a secret"),
]


@pytest.mark.real
def test_settings_that_exist_are_changed_by_their_options_alone(host: Machine) -> None:
    host.output(
        "install -d -m 700 /etc/wggw /var/lib/wggw\n"
        "printf '%s\\n' '# mine' 'GATEWAY_API_KEY=\"0123456789 abcdef\"' API_PORT=9000 "
        "WG_IPV6_SUBNET= TLS_CERT=/etc/wggw/cert.pem TLS_KEY=/etc/wggw/key.pem "
        "WG_PRIVATE_KEY_FILE=/etc/wggw/privatekey DB_PATH=/var/lib/wggw/w.db >/etc/wggw/wggw.env\n"
        "chmod 600 /etc/wggw/wggw.env"
    )
    look = "cd /etc/wggw && stat -c '%Y %a %i' wggw.env && sha256sum wggw.env; ls wggw.env*"
    before = host.output(look)
    for option, message in WRONG_SETTINGS:
        done = host.run(f"{COMMAND} {option}")
        assert (done.returncode, message in done.stdout) == (2, True), done.stdout
        assert host.output(look) == before
    install = host.start(f"{COMMAND} --api-port 9000 --ipv6-subnet ''")
    printed = PRINTED.search(install.wait_text(">laptop.conf"))
    assert printed
    assert "10.0.1.2" in host.output(f"cd .. && {printed[1]} && cat laptop.conf")
    assert host.output(look) == before
    keys = (
        "sha256sum /etc/wggw/*.pem /etc/wggw/privatekey; wg show wg0 peers; wg show wg0 public-key"
    )
    seen = host.output(keys)
    install.signal("TERM")
    assert install.wait() == 0
    dns = '{"d1": "9.9.9.9"}'
    given = f"--api-port 9001 --set 'DNS_SERVERS={dns}' --set=WG_MTU=1380"
    shown = host.output(f"{COMMAND} {given} --dry-run")
    assert "API_PORT=9001 (was: 9000)" in shown and host.output(look) == before
    install = host.start(f"{COMMAND} {given}")
    install.wait_text(">laptop.conf")
    for told in (
        "API_PORT=9001 (was: 9000)",
        f"DNS_SERVERS='{dns}' (was: ",
        ":9001",
    ):
        assert told in install.text()
    assert host.output(keys) == seen
    lines = host.output("cat /etc/wggw/wggw.env").splitlines()
    assert lines[:3] == ["# mine", 'GATEWAY_API_KEY="0123456789 abcdef"', "WG_IPV6_SUBNET="]
    assert sorted(lines[-3:]) == ["API_PORT=9001", f"DNS_SERVERS='{dns}'", "WG_MTU=1380"]
    assert host.output("ls /etc/wggw; stat -c %a /etc/wggw/wggw.env").split() == [
        "cert.pem", "key.pem", "privatekey", "wggw.env", "600",
    ]  # fmt: skip


@pytest.mark.real
def test_settings_file_that_cannot_be_parsed_is_refused_in_one_line(untouched: Machine) -> None:
    for line, words in ((r"# caf\xe9", ": cannot be read: 'utf-8'"), ("x", " line 1: expected")):
        untouched.output(f"mkdir -p /etc/wggw; printf '{line}' >/etc/wggw/wggw.env")
        done = untouched.run("./install.sh --dry-run")
        assert (done.returncode, "Traceback" in done.stdout) == (2, False), done.stdout
        assert done.stdout.splitlines()[-1].startswith(f"install.sh: /etc/wggw/wggw.env{words}")
    untouched.output("rm -r /etc/wggw")


@pytest.mark.real
def test_doctor_finds_nothing_wrong_and_a_key_file_may_have_any_line_end(host: Machine) -> None:
    """Nothing but ok, apart from the clock, which this machine may not synchronise."""
    (host.tree / "my key").write_bytes(b"0123456789 abcdef\r\n")
    options = "--limit-ssh 22 --backend 192.0.2.0/24 --endpoint vpn.example.org"
    install = host.start(f"{COMMAND} {options} --key-file 'my key'")
    install.wait_text(">laptop.conf")
    shown = host.output("python3 wggw.py doctor --env-file /etc/wggw/wggw.env").splitlines()
    others = [line for line in shown if not line.startswith("ok     ")]
    assert others == [] or (len(others) == 2 and others[0].startswith("note   clock: ")), shown
    assert "tcp dport 22 ct state new" in host.output("nft list table inet wggw")
    assert host.output("cat /proc/sys/net/ipv4/ip_forward") == "1\n"
    host.output("grep -x \"GATEWAY_API_KEY='0123456789 abcdef'\" /etc/wggw/wggw.env")
    again = host.output("./install.sh --dry-run --key-file 'my key'")
    assert "wggw.env exists and stays as it is" in again


@pytest.mark.real
def test_it_begins_however_it_is_called(untouched: Machine) -> None:
    """As root from `su`, whose PATH has no sbin; by another shell; and read from a pipe."""
    options, begun = "--foreground --dry-run", "wggw.py serve --env-file"
    for call, words in (
        (f"PATH={untouched.bin}:/usr/bin:/bin ./install.sh {options}", begun),
        (f"cd / && sh {untouched.tree}/install.sh {options}", begun),
        ("cat install.sh | bash -s -- --help", "Usage: sudo ./install.sh"),
    ):
        assert words in untouched.output(call), call
    for call, message in (
        (f"cat install.sh | sh -s -- {options}", "needs bash"),
        (f"cat install.sh | (cd / && bash -s -- {options})", "wggw.py is not in /"),
    ):
        done = untouched.run(call)
        assert done.returncode == 1 and message in done.stdout, done.stdout


@pytest.mark.real
@pytest.mark.parametrize("family", some(["only IPv6", "no IPv6"], 1))
def test_settings_fit_a_host_of_one_family(host: Machine, family: str) -> None:
    host.output("ip link add uplink type veth peer name far; ip link set far up")
    if family == "no IPv6":
        for name in ("all", "default"):
            host.output(f"sysctl -w net.ipv6.conf.{name}.disable_ipv6=1")
        address = "192.0.2.7"
        host.output(f"ip address add {address}/24 dev uplink; ip link set uplink up")
        host.output("ip route add default via 192.0.2.1")
    else:
        address = "2001:db8::7"
        host.output(f"ip link set uplink up; ip address add {address}/64 dev uplink nodad")
        host.output("ip route add default via 2001:db8::1")
    install = host.start(COMMAND)
    install.wait_text(">laptop.conf")
    settings = host.output("cat /etc/wggw/wggw.env").splitlines()
    assert ("API_HOST=::" in settings) == (family == "only IPv6")
    assert ("WG_IPV6_SUBNET=" in settings) == (family == "no IPv6")
    url = f"https://[{address}]:8000" if ":" in address else f"https://{address}:8000"
    host.output(f"curl -sSf --cacert /etc/wggw/cert.pem {url}/healthz")


@pytest.mark.real
def test_kill_leaves_no_temporary_file(host: Machine) -> None:
    (host.bin / "openssl").write_text("#!/bin/sh\necho reached >&2\nexec sleep 3600\n")
    (host.bin / "openssl").chmod(0o755)
    (host.bin / "tmp").mkdir()
    install = host.start(f"env TMPDIR={host.bin}/tmp {COMMAND}")
    install.wait_text("reached")
    install.signal("KILL")
    assert install.wait() == -9
    assert list((host.bin / "tmp").iterdir()) == []


@pytest.mark.real
def test_dry_run_shows_the_actions_and_changes_nothing(host: Machine) -> None:
    host.output("rm $(command -v wg)")
    shown = host.output(f"{COMMAND} --dry-run")
    for action in ("apt-get install", "wireguard-tools", "write /etc/wggw/wggw.env", "serve"):
        assert action in shown
    assert host.apt_calls() == []
    assert host.run("ls -d /etc/wggw /var/lib/wggw; ip link show wg0").returncode != 0


@pytest.mark.real
def test_what_is_missing_is_installed_and_apt_failing_ends_it(host: Machine) -> None:
    host.output("rm $(command -v wg)")
    done = host.run(COMMAND)
    assert done.returncode == 7
    assert "+ apt-get update" in done.stdout
    assert host.apt_calls() == ["update -q"]
    (host.bin / "apt-get").write_text('#!/bin/sh\necho "$@" >>"$(dirname "$0")/apt-get.calls"\n')
    host.run(f"{COMMAND} --port 99999")
    assert host.apt_calls()[2] == "install -q -y --no-install-recommends wireguard-tools"


@pytest.mark.real
def test_a_second_question_answered_no_says_what_was_not_done(host: Machine) -> None:
    needs_userspace(host)
    host.output("rm $(command -v wg wireguard-go)")
    (host.bin / "apt-get").write_text("#!/bin/sh\n")
    done = host.run(f"printf 'y\nn\n' | script -qec '{COMMAND}' /dev/null")
    assert "stopped: it did not install wireguard-go" in done.stdout
    assert "nothing was changed" not in done.stdout


@pytest.mark.real
def test_subnets_that_the_host_has_are_not_taken(host: Machine) -> None:
    """A host in 10.0.1.0/24 keeps its router; what an option names is refused, not changed."""
    host.output(
        "ip link add lan0 type veth peer name there; ip link set there up; ip link set lan0 up\n"
        "ip address add 10.0.1.7/24 dev lan0; ip route add 10.0.2.128/25 dev lan0"
    )
    refused = host.run(f"{COMMAND} --ipv4-subnet 10.0.0.0/16")
    assert refused.returncode == 2
    assert "WG_IPV4_SUBNET 10.0.0.0/16: overlaps 10.0.1.0/24 of lan0" in refused.stdout
    assert host.run("ls /etc/wggw").returncode != 0
    shown = host.output(f"{COMMAND} --dry-run --awg --ipv6-subnet fd00:9::/64")
    assert "10.0.1.0/24 overlaps a network of this host: WG_IPV4_SUBNET=10.1.1.0/24 is" in shown
    assert "10.0.2.0/24 overlaps a network of this host: AWG_IPV4_SUBNET=10.2.1.0/24 is" in shown
    assert "_IPV6_SUBNET" not in shown
    named = "--set AWG_IPV4_SUBNET=10.0.2.0/24 --awg"
    assert "AWG_IPV4_SUBNET=" not in host.output(f"{COMMAND} --dry-run {named}")
    host.output("echo 1 | tee /proc/sys/net/ipv6/conf/{all,default}/disable_ipv6")
    install = host.start(COMMAND)
    install.wait_text(">laptop.conf")
    assert "IPv6 is switched off on this host: WG_IPV6_SUBNET stays empty" in install.text()
    settings = host.output("cat /etc/wggw/wggw.env").splitlines()
    assert {"WG_IPV4_SUBNET=10.1.1.0/24", "WG_IPV6_SUBNET="} < set(settings)
    assert "10.0.1.0/24 dev lan0" in host.output("ip route get 10.0.1.1; ip route")


@pytest.mark.real
@pytest.mark.long
def test_awg_implies_only_what_neither_options_nor_settings_name(host: Machine) -> None:
    four, six = "AWG_IPV4_SUBNET", "AWG_IPV6_SUBNET=fd42:4242:2::/64"
    key = f"WG_BACKEND=memory GATEWAY_API_KEY={'a1' * 32}"
    for there, options, changes in (
        ("", "--awg", {"AWG_INTERFACE=awg0", f"{four}=10.0.2.0/24", six}),
        ("", f"--set {four}=10.9.0.0/24 --awg", {"AWG_INTERFACE=awg0", f"{four}=10.9.0.0/24", six}),
        ("", "--awg --set AWG_INTERFACE=a7", {"AWG_INTERFACE=a7", f"{four}=10.0.2.0/24", six}),
        (f"AWG_INTERFACE=a7 {four}=10.2.1.0/24", "--awg", set()),
        (f"AWG_INTERFACE= {four}=10.2.1.0/24 {six}", "--awg", {"AWG_INTERFACE=awg0"}),
    ):
        host.output(f"mkdir -p /etc/wggw; printf '%s\\n' {key} {there} >/etc/wggw/wggw.env")
        shown = host.output(f"./install.sh --dry-run {options}")
        assert set(re.findall(r": change \S+ (\S+)", shown)) == changes, shown


WITHOUT = {
    "the right": ("setpriv --bounding-set -net_admin --inh-caps -net_admin", "", "CAP_NET_ADMIN"),
    "the device": ("", "mount -t tmpfs none /dev/net", "/dev/net/tun: it does not exist"),
    "the right to open it": (
        "setpriv --reuid nobody --clear-groups --inh-caps +net_admin --ambient-caps +net_admin",
        "mount -t tmpfs none /dev/net; mknod -m 600 /dev/net/tun c 10 200",
        "cannot open it: Permission denied, mode 0600",
    ),
    "the program": (
        "",
        "mount --bind /dev/null $(command -v wireguard-go)",
        "the kernel has no wireguard, and wireguard-go is missing",
    ),
}


@pytest.mark.real
@pytest.mark.parametrize("what", some(list(WITHOUT), 1))
def test_what_an_interface_needs_is_named_before_anything_is_made(host: Machine, what: str) -> None:
    needs_userspace(host)
    prefix, before, words = WITHOUT[what]
    host.output(
        f"{before}\nmkdir /var/lib/state; cp wggw.py /var/lib/state; chmod -R 777 /var/lib/state"
    )
    variables = f"GATEWAY_API_KEY={'a1' * 32} WG_PRIVATE_KEY_FILE=key API_HOST=127.0.0.1"
    for command in ("serve", "net up", "doctor"):
        done = host.run(
            f"cd /var/lib/state; {prefix} env {variables} /usr/bin/python3 -I wggw.py {command}"
        )
        assert words in done.stdout, done.stdout
        assert done.returncode == 1
    assert "wg0: no such interface\n       -> start the gateway" in done.stdout  # no circle
    assert host.output("ip -br link").split() == host.output("ip -br link show lo").split()


@pytest.mark.real
def test_bad_value_is_named_and_leaves_no_settings_behind(untouched: Machine) -> None:
    for option, variable in (
        ("--port 99999", "WG_DEFAULT_PORT"),
        ("--ipv4-subnet 10.0.0.1/24", "WG_IPV4_SUBNET"),
        ("--ipv4-subnet= --ipv6-subnet=", "WG_IPV4_SUBNET"),
    ):
        done = untouched.run(f"{COMMAND} {option}")
        assert done.returncode == 2, done.stdout
        assert f"install.sh: {variable}" in done.stdout
        assert untouched.run("ls -d /etc/wggw /var/lib/wggw").returncode == 2


@pytest.mark.real
def test_exit_code_is_the_gateways(host: Machine) -> None:
    host.output("install -d /var/lib/wggw; echo damaged >/var/lib/wggw/wireguard.db")
    done = host.run(COMMAND)
    assert done.returncode == 3, done.stdout
    assert "wireguard.db" in done.stdout


@pytest.mark.real
def test_machine_that_is_not_fit_is_refused(untouched: Machine) -> None:
    untouched.output("echo ID=fedora >../os; mount --bind ../os /etc/os-release")
    done = untouched.run(f"{COMMAND}; code=$?; umount /etc/os-release; exit $code")
    assert done.returncode != 0
    assert re.search("only Debian .* and Ubuntu .* are supported", done.stdout), done.stdout
    assert untouched.run("ls /etc/wggw").returncode != 0


@pytest.mark.real
def test_what_is_made_of_debian_is_installed_on_like_it(untouched: Machine) -> None:
    (untouched.tree.parent / "os").write_text('NAME="Mint"\nID=mint\nID_LIKE="ubuntu debian"\n')
    script = "mount --bind ../os /etc/os-release; ./install.sh --dry-run; umount /etc/os-release"
    assert "systemctl enable" in untouched.output(script)
    assert untouched.apt_calls() == []


@pytest.mark.real
def test_amneziawg_that_is_nowhere_is_named_with_where_it_is_to_be_had(host: Machine) -> None:
    if Path("/sys/module/amneziawg").exists() or shutil.which("amneziawg-go"):
        pytest.skip("AmneziaWG is here")
    settings = f"install -d /etc/wggw; echo GATEWAY_API_KEY={'a1' * 32} >/etc/wggw/wggw.env"
    for before in ("true", settings):  # on an existing installation, too
        done = host.run(f"{before}; {COMMAND} --awg")
        assert done.returncode == 1, done.stdout
        for part in (
            "and neither is here",
            "amneziawg-linux-kernel-module",
            "/usr/local/bin/amneziawg-go",
        ):
            assert part in done.stdout
        assert host.run("ls -d /var/lib/wggw; grep AWG /etc/wggw/*").returncode != 0
        if before == "true":
            assert host.run("ls -d /etc/wggw").returncode == 2


@pytest.mark.real
def test_without_root_it_says_so(untouched: Machine) -> None:
    untouched.output("cp install.sh /run/; chmod 755 /run/install.sh")
    done = untouched.run(
        "cd / && setpriv --reuid 65534 --clear-groups /run/install.sh --foreground"
    )
    assert done.returncode == 1
    assert "must run as root" in done.stdout


@pytest.mark.real
def test_without_systemd_it_says_so_and_without_an_installation(untouched: Machine) -> None:
    done = untouched.run("./install.sh")
    assert (done.returncode, "use --foreground" in done.stdout) == (1, True), done.stdout
    done = untouched.run("./install.sh --upgrade --dry-run")
    assert (done.returncode, "wggw is not installed here" in done.stdout) == (1, True)
    assert untouched.run("ls -d /etc/wggw /var/lib/wggw").returncode != 0


@pytest.mark.real
def test_uninstall_needs_no_systemd_that_runs(untouched: Machine) -> None:
    wanted = "/etc/systemd/system/multi-user.target.wants/wggw.service"
    untouched.output(
        f"install -D wggw.service {UNIT}; install -d $(dirname {wanted}); ln -s {UNIT} {wanted}"
    )
    untouched.output("./install.sh --uninstall --yes")
    assert untouched.run(f"ls {UNIT} {wanted}").stdout.count("cannot access") == 2


@pytest.mark.real
def test_dry_run_of_the_service_shows_each_step(untouched: Machine) -> None:
    shown = untouched.output("./install.sh --dry-run --backend 192.0.2.0/24")
    for step in ("useradd", "wggw.env", "install -D -m 755", "wggw.service", "systemctl enable"):
        assert step in shown, shown
    assert "with a random GATEWAY_API_KEY)" in shown
    shown = untouched.output("./install.sh --dry-run --key-file install.sh")
    assert "with the GATEWAY_API_KEY of install.sh)" in shown and "random" not in shown, shown
    assert untouched.run("ls -d /etc/wggw /var/lib/wggw /usr/local/lib/wggw").returncode != 0
    shown = untouched.output("./install.sh --uninstall --dry-run")
    assert "+ take_down" in shown and "removed" not in shown, shown


@pytest.mark.real
def test_a_user_of_the_same_name_and_its_processes_are_left_alone(host: Machine) -> None:
    other = "useradd --no-create-home --home-dir /srv --shell /bin/bash wggw"
    sleep = "setsid setpriv --reuid wggw --clear-groups sleep 3600 >/dev/null 2>&1 & echo $!"
    pid = host.output(f"{other}; {sleep}").strip()
    refused = host.run("./install.sh --dry-run")
    assert refused.returncode == 1
    assert "a user wggw that belongs to something else" in refused.stdout
    assert "the user wggw stays" in host.output("./install.sh --uninstall --purge --yes")
    host.output(f"getent passwd wggw && kill {pid}")


@pytest.mark.real
def test_dry_run_of_a_host_without_python_shows_the_steps(host: Machine) -> None:
    host.output("touch ../none; mount --bind ../none $(realpath /usr/bin/python3)")
    shown = host.output("./install.sh --dry-run --awg --set WG_MTU=1380")
    for step in ("apt-get install", " python3 ", "write /etc/wggw/wggw.env", "systemctl enable"):
        assert step in shown, shown
    host.output("mkdir /etc/wggw; touch /etc/wggw/wggw.env")
    assert "50-port" not in host.output("./install.sh --dry-run --awg")


@pytest.mark.real
def test_without_tun_it_says_so(host: Machine) -> None:
    needs_userspace(host)
    host.output("mount -t tmpfs none /dev/net")
    done = host.run(COMMAND)
    assert done.returncode == 1
    assert "/dev/net/tun" in done.stdout


@pytest.mark.real
def test_without_the_right_to_make_interfaces_it_says_so(untouched: Machine) -> None:
    needs_userspace(host)
    done = untouched.run(f"setpriv --bounding-set -net_admin --inh-caps -net_admin {COMMAND}")
    assert done.returncode == 1
    assert "CAP_NET_ADMIN is missing" in done.stdout


# --- the service, with a systemctl that only writes down what it was told -------------------------

SYSTEMCTL = r"""#!/bin/bash
here=${0%/*}
echo "$*" >>"$here/systemctl.calls"
case $1 in
  is-active) cat "$here/state"; [[ $(cat "$here/state") == active ]] ;;
  show)
    case $3 in
      NeedDaemonReload)
        [[ ! $(find /etc/systemd/system/wggw.service* -newer "$here/loaded") ]] || echo yes ;;
      *) cat "$here/restarts" ;;
    esac ;;
  daemon-reload) . "$here/at-reload" ;;
  reset-failed) echo 0 >"$here/restarts" ;;  # and nothing else does, up to systemd 255
  restart) . "$here/at-restart" ;;
esac
"""
PROGRAM = "/usr/local/lib/wggw/wggw.py"
# In the place of a program that asks a gateway.
HEALTHY = """
if sys.argv[1:2] == ["call"]:
    sys.exit(print('{"status":"healthy"}'))
"""


@pytest.fixture(scope="module")
def machine_with_systemctl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with machine(tmp_path_factory.mktemp("service")) as made:
        made.output("mkdir -p /run/systemd/system")
        (made.bin / "systemctl").write_text(SYSTEMCTL)
        (made.bin / "systemctl").chmod(0o755)
        program = made.tree / "wggw.py"
        program.write_text(program.read_text().replace("import sys\n", f"import sys\n{HEALTHY}"))
        yield made


@pytest.fixture
def service(machine_with_systemctl: Machine) -> Machine:
    """A machine where the service can be installed, and is up once it was started."""
    host = machine_with_systemctl
    for name, text in (
        ("at-restart", "echo active >$here/state"),
        ("at-reload", "touch $here/loaded"),
        ("restarts", "0"),
        ("systemctl.calls", ""),
    ):
        (host.bin / name).write_text(text)
    return host


@pytest.fixture
def installed(service: Machine) -> Machine:
    """The same with the service installed and up, whatever the test before has left."""
    (service.bin / "state").write_text("active")
    service.output(f"test -e {PROGRAM} || ./install.sh --yes")
    (service.bin / "systemctl.calls").write_text("")
    return service


def later_version(host: Machine) -> str:
    with (host.tree / "wggw.py").open("a") as program:
        program.write("# a later version\n")
    return (host.tree / "wggw.py").read_text()


def calls(host: Machine) -> str:
    return (host.bin / "systemctl.calls").read_text()


@pytest.mark.real
@pytest.mark.parametrize(
    ("signal", "code"), [("INT", 130)] + LONG * [("TERM", 143), ("HUP", 129)], ids=str
)
def test_signal_takes_back_what_was_done(service: Machine, signal: str, code: int) -> None:
    (service.bin / "state").write_text("inactive")
    (service.bin / "at-restart").write_text("echo activating >$here/state")
    install = service.start("env --default-signal=INT ./install.sh --yes")
    install.wait_text("wait until the service is ready")
    install.signal(signal)
    ended = install.wait()
    # bash 5.2 sometimes cannot parse a trap that comes while it parses a substitution.
    assert ended == code or "interrupt trap" in install.text(), install.text()
    assert "undoing" in install.text()
    for path in (PROGRAM, "/usr/local/sbin/wggw", "/etc/wggw", "/etc/systemd/system/wggw.service"):
        assert service.run(f"test -e {path}").returncode == 1, path


@pytest.mark.real
@pytest.mark.long
def test_run_after_one_that_was_killed_finishes_its_work(installed: Machine) -> None:
    former = installed.output(f"cat {PROGRAM}")
    later = later_version(installed)
    (installed.bin / "at-restart").write_text("kill -KILL $PPID")
    assert installed.run("./install.sh --yes").returncode == -9
    assert installed.output(f"cat {PROGRAM}.before") == former

    (installed.bin / "at-restart").write_text("echo active >$here/state")
    (installed.bin / "systemctl.calls").write_text("")
    installed.output("./install.sh --yes")
    assert "restart --no-block wggw" in calls(installed)
    assert installed.output(f"cat {PROGRAM}") == later
    assert installed.output("find /usr/local /etc/systemd/system -name '*.before'") == ""


@pytest.mark.real
def test_run_after_one_that_was_killed_with_a_new_file_in_place_finishes_its_work(
    installed: Machine,
) -> None:
    settings = "/etc/wggw/wggw.env"
    installed.output(f"sed -i /^API_PORT=/d {settings} && echo API_PORT=443 >>{settings}")
    (installed.bin / "at-reload").write_text("kill -KILL $PPID")
    assert installed.run("./install.sh --yes").returncode == -9
    assert installed.run("test -e /etc/systemd/system/wggw.service.d/50-port.conf").returncode == 0

    (installed.bin / "at-reload").write_text("touch $here/loaded")
    (installed.bin / "systemctl.calls").write_text("")
    installed.output("./install.sh --yes")
    assert "daemon-reload" in calls(installed) and "restart --no-block wggw" in calls(installed)
    assert "up to date" in installed.output("./install.sh --yes")


@pytest.mark.real
def test_dry_run_of_an_upgrade_only_asks_systemctl(installed: Machine) -> None:
    later_version(installed)
    shown = installed.output("./install.sh --dry-run")
    assert "+ systemctl restart --no-block wggw" in shown
    asked = calls(installed).splitlines()
    assert {line.split()[0] for line in asked} <= {"is-active", "show"}, asked


@pytest.mark.real
def test_upgrade_mends_a_service_that_was_restarted_again_and_again(installed: Machine) -> None:
    (installed.bin / "restarts").write_text("7")
    (installed.bin / "state").write_text("activating")
    slowly = "(sleep 1; echo active >$here/state) >/dev/null 2>&1 &"
    (installed.bin / "at-restart").write_text(slowly)
    later_version(installed)
    installed.output("./install.sh --upgrade --yes")


@pytest.mark.real
def test_uninstall_removes_what_a_killed_run_kept_and_neither_settings_nor_data(
    installed: Machine,
) -> None:
    kept = "/etc/systemd/system/wggw.service.before /usr/local/sbin/wggw.before"
    installed.output(f"touch {kept}; rm -r /var/lib/wggw")
    shown = installed.output("./install.sh --uninstall --yes")
    assert "settings and data stay in /etc/wggw (" in shown
    assert installed.output("find /usr/local /etc/systemd/system -name '*wggw*'") == ""
    installed.output("mv /etc/wggw /var/lib/wggw")  # data without settings
    shown = installed.output("./install.sh --uninstall --yes")
    assert "settings and data stay in /var/lib/wggw (" in shown


@pytest.mark.real
def test_purge_leaves_what_is_not_install_shs_and_names_it(installed: Machine) -> None:
    places = "DB_PATH=/var/w/db API_PORT=443 WG_PRIVATE_KEY_FILE=/etc/wgk TLS_KEY=key.pem"
    installed.output(
        f"for line in {places}; do echo $line >>/etc/wggw/wggw.env; done\n"
        f"mkdir -p {DROP_INS} /var/w; touch /var/w/{{db,db.journal,dbx}} /etc/wgk\n"
        f"touch /var/lib/wggw/{{cert,key}}.pem {DROP_INS}/{{50-port,override}}.conf"
    )
    for options in ("", "--purge"):
        shown = installed.output(f"./install.sh --uninstall --yes {options}")
        assert f"{DROP_INS} stays: " in shown
        assert installed.output(f"ls {DROP_INS}") == "override.conf\n"
    files = "/var/w/db /var/w/db.journal /etc/wgk"
    assert f"these stay: {files}\n" in shown
    installed.output(f"ls {files}; rm -r {DROP_INS}")


@pytest.mark.real
@pytest.mark.long
def test_purge_with_settings_that_are_wrong_says_so(installed: Machine) -> None:
    installed.output("echo WG_MTU=x >>/etc/wggw/wggw.env")
    shown = installed.output("./install.sh --uninstall --purge --yes")
    assert "WG_MTU: 'x' is not bytes" in shown
    assert "these stay: what the settings, which are wrong, name" in shown
