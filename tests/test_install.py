"""install.sh: what it refuses, what it makes, and that it never changes what is there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import ROOT
from sandbox import GUARD, Machine, machine

INSTALL = ROOT / "install.sh"
COMMAND = "./install.sh --foreground"
PRINTED = re.compile(r"^(?:sudo )?bash <<'END'\n.*?^END$", re.DOTALL | re.MULTILINE)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Machine]:
    with machine(tmp_path) as made:
        yield made


def needs_userspace(host: Machine) -> None:
    if Path("/sys/module/wireguard").exists():
        pytest.skip("the kernel has WireGuard: nothing else is needed")


# --- options: no root needed ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--purge",), "--purge goes with --uninstall"),
        (("--foreground", "--json"), "--json is for installing the service"),
        (("--backend",), "--backend needs a value"),
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
@pytest.mark.parametrize("signal", ["INT", "TERM"])
def test_printed_command_creates_a_peer_and_a_signal_ends_it_with_0(
    host: Machine, signal: str
) -> None:
    install = host.start(f"{COMMAND} --endpoint vpn.example.org --port 5000 --api-port 8443")
    printed = PRINTED.search(install.wait_text("\nEND\n"))
    assert printed, install.text()
    answer = json.loads(host.output(f"cd .. && {printed[0]}\n"))
    assert (answer["status"], answer["assigned_ip"]) == ("created", "10.0.1.2")
    assert (answer["endpoint"], answer["port"]) == ("vpn.example.org:5000", 5000)
    assert answer["public_key"] == host.output("wg pubkey <../client.key").strip()
    assert host.output("wg show wg0 peers").strip() == answer["public_key"]
    for shown in (
        answer["server_public_key"],
        "https://127.0.0.1:8443",
        host.output("openssl x509 -in /etc/wggw/cert.pem -outform DER | sha256sum")[:64],
    ):
        assert shown in install.text()
    install.signal(signal)
    assert install.wait() == 0
    assert host.apt_calls() == []


@pytest.mark.real
def test_settings_are_readable_by_root_alone_and_the_key_is_nowhere_else(host: Machine) -> None:
    install = host.start(COMMAND)
    install.wait_text("\nEND\n")
    files = host.output("stat -c '%a %U %n' /etc/wggw /etc/wggw/* /var/lib/wggw").splitlines()
    assert [line for line in files if not re.match("[67]00 root ", line)] == []
    assert "600 root /etc/wggw/wggw.env" in files
    key = re.search("^GATEWAY_API_KEY=([0-9a-f]{64})$", host.output("cat /etc/wggw/wggw.env"), re.M)
    assert key
    assert key[1] not in install.text()
    assert host.run(f"grep -l {key[1][:40]}[{key[1][40]}] /proc/[0-9]*/cmdline").returncode == 1


@pytest.mark.real
def test_settings_that_exist_are_never_changed(host: Machine) -> None:
    host.output(
        "install -d -m 700 /etc/wggw /var/lib/wggw\n"
        "printf '%s\\n' '# mine' 'GATEWAY_API_KEY=\"0123456789 abcdef\"' API_PORT=9000 "
        "WG_IPV6_SUBNET= TLS_CERT=/etc/wggw/cert.pem TLS_KEY=/etc/wggw/key.pem "
        "WG_PRIVATE_KEY_FILE=/etc/wggw/privatekey >/etc/wggw/wggw.env\n"
        "chmod 600 /etc/wggw/wggw.env"
    )
    look = "cd /etc/wggw && stat -c '%Y %a %i' wggw.env && sha256sum wggw.env"
    before = host.output(look)
    refused = host.run(f"{COMMAND} --api-port 9001")
    assert refused.returncode == 2
    assert "has API_PORT=9000 and is never changed" in refused.stdout
    install = host.start(f"{COMMAND} --api-port 9000 --ipv6-subnet ''")
    printed = PRINTED.search(install.wait_text("\nEND\n"))
    assert printed
    answer = json.loads(host.output(f"cd .. && {printed[0]}\n"))
    assert answer["status"] == "created"
    assert host.output(look) == before


@pytest.mark.real
def test_second_start_keeps_peers_keys_and_settings(host: Machine) -> None:
    look = "sha256sum /etc/wggw/*; wg show wg0 peers; wg show wg0 public-key"
    seen = []
    for _ in range(2):
        install = host.start(COMMAND)
        printed = PRINTED.search(install.wait_text("\nEND\n"))
        assert printed
        if not seen:
            host.output(printed[0])
        seen.append(host.output(look))
        install.signal("TERM")
        assert install.wait() == 0
    assert seen[0] == seen[1]


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
def test_bad_value_is_named_and_leaves_no_settings_behind(host: Machine) -> None:
    for option, variable in (
        ("--port 99999", "WG_DEFAULT_PORT"),
        ("--ipv4-subnet 10.0.0.1/24", "WG_IPV4_SUBNET"),
        ("--ipv4-subnet= --ipv6-subnet=", "WG_IPV4_SUBNET"),
    ):
        done = host.run(f"{COMMAND} {option}")
        assert done.returncode == 2, done.stdout
        assert f"install.sh: {variable}" in done.stdout
        assert host.run("ls -d /etc/wggw /var/lib/wggw").returncode == 2


@pytest.mark.real
def test_exit_code_is_the_gateways(host: Machine) -> None:
    host.output("install -d /var/lib/wggw; echo damaged >/var/lib/wggw/wireguard.db")
    done = host.run(COMMAND)
    assert done.returncode == 3, done.stdout
    assert "wireguard.db" in done.stdout


@pytest.mark.real
@pytest.mark.parametrize(
    ("before", "message"),
    [
        (
            "echo ID=fedora >../os; mount --bind ../os /etc/os-release",
            "only Debian .* and Ubuntu .* are supported",
        ),
        ("ip link add wg0 type veth peer name other", "interface wg0 exists already"),
    ],
)
def test_machine_that_is_not_fit_is_refused(host: Machine, before: str, message: str) -> None:
    host.output(before)
    done = host.run(COMMAND)
    assert done.returncode != 0
    assert re.search(message, done.stdout), done.stdout
    assert host.run("ls /etc/wggw").returncode != 0


@pytest.mark.real
@pytest.mark.parametrize("names", ["ID=ubuntu\nID_LIKE=debian", 'ID=mint\nID_LIKE="ubuntu debian"'])
def test_ubuntu_and_what_is_made_of_it_are_installed_on_like_debian(
    host: Machine, names: str
) -> None:
    (host.tree.parent / "os").write_text(f'NAME="Ubuntu"\nVERSION_ID="24.04"\n{names}\n')
    host.output("mount --bind ../os /etc/os-release")
    shown = host.output("./install.sh --dry-run")
    assert "systemctl enable" in shown
    assert host.apt_calls() == []
    install = host.start(COMMAND)
    install.wait_text("\nEND\n")
    install.signal("TERM")
    assert install.wait() == 0


@pytest.mark.real
def test_python_of_the_path_is_not_asked_for_packages(host: Machine) -> None:
    """A Python of root's own comes first on PATH, and is too old besides."""
    (host.bin / "python3").write_text("#!/bin/sh\nexit 9\n")
    (host.bin / "python3").chmod(0o755)
    install = host.start(COMMAND)
    install.wait_text("The gateway is ready")
    install.signal("TERM")
    assert install.wait() == 0
    assert host.apt_calls() == []


@pytest.mark.real
def test_amneziawg_that_is_nowhere_is_named_with_where_it_is_to_be_had(host: Machine) -> None:
    if Path("/sys/module/amneziawg").exists() or shutil.which("amneziawg-go"):
        pytest.skip("AmneziaWG is here")
    done = host.run(f"{COMMAND} --awg")
    assert done.returncode == 1, done.stdout
    for part in (
        "and neither is here",
        "amneziawg-linux-kernel-module",
        "/usr/local/bin/amneziawg-go",
    ):
        assert part in done.stdout
    assert host.run("ls -d /etc/wggw /var/lib/wggw").returncode == 2


@pytest.mark.real
def test_without_root_it_says_so(host: Machine) -> None:
    host.output("cp install.sh /run/; chmod 755 /run/install.sh")
    done = host.run("cd / && setpriv --reuid 65534 --clear-groups /run/install.sh --foreground")
    assert done.returncode == 1
    assert "must run as root" in done.stdout


@pytest.mark.real
def test_without_systemd_it_says_so_and_without_an_installation(host: Machine) -> None:
    done = host.run("./install.sh")
    assert (done.returncode, "use --foreground" in done.stdout) == (1, True), done.stdout
    done = host.run("./install.sh --upgrade --dry-run")
    assert (done.returncode, "wggw is not installed here" in done.stdout) == (1, True)
    assert host.run("ls -d /etc/wggw /var/lib/wggw").returncode != 0


@pytest.mark.real
def test_dry_run_of_the_service_shows_each_step(host: Machine) -> None:
    shown = host.output("./install.sh --dry-run --backend 192.0.2.0/24")
    for step in ("useradd", "wggw.env", "install -D -m 755", "wggw.service", "systemctl enable"):
        assert step in shown, shown
    assert host.run("ls -d /etc/wggw /var/lib/wggw /usr/local/lib/wggw").returncode != 0


@pytest.mark.real
def test_without_tun_it_says_so(host: Machine) -> None:
    needs_userspace(host)
    host.output("mount -t tmpfs none /dev/net")
    done = host.run(COMMAND)
    assert done.returncode == 1
    assert "/dev/net/tun" in done.stdout


@pytest.mark.real
def test_without_the_right_to_make_interfaces_it_says_so(host: Machine) -> None:
    needs_userspace(host)
    done = host.run(f"setpriv --bounding-set -net_admin --inh-caps -net_admin {COMMAND}")
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


@pytest.fixture
def service(host: Machine) -> Machine:
    """A machine where the service can be installed, and is up once it was started."""
    host.output("mkdir -p /run/systemd/system")
    (host.bin / "systemctl").write_text(SYSTEMCTL)
    (host.bin / "systemctl").chmod(0o755)
    (host.bin / "at-restart").write_text("echo active >$here/state")
    (host.bin / "at-reload").write_text("touch $here/loaded")
    (host.bin / "state").write_text("inactive")
    (host.bin / "restarts").write_text("0")
    program = host.tree / "wggw.py"
    program.write_text(
        program.read_text().replace("\nimport argparse\n", HEALTHY + "import argparse\n")
    )
    return host


@pytest.mark.real
@pytest.mark.parametrize(("signal", "code"), [("HUP", 129), ("INT", 130), ("TERM", 143)])
def test_signal_takes_back_what_was_done(service: Machine, signal: str, code: int) -> None:
    (service.bin / "at-restart").write_text("echo activating >$here/state")
    install = service.start("env --default-signal=INT ./install.sh --yes")
    install.wait_text("wait until the service is ready")
    install.signal(signal)
    assert install.wait() == code, install.text()
    assert "taking back" in install.text()
    for path in (PROGRAM, "/usr/local/sbin/wggw", "/etc/wggw", "/etc/systemd/system/wggw.service"):
        assert service.run(f"test -e {path}").returncode == 1, path


@pytest.mark.real
def test_run_after_one_that_was_killed_finishes_its_work(service: Machine) -> None:
    service.output("./install.sh --yes")
    former = service.output(f"cat {PROGRAM}")
    with (service.tree / "wggw.py").open("a") as program:
        program.write("# a later version\n")
    (service.bin / "at-restart").write_text("kill -KILL $PPID")
    assert service.run("./install.sh --yes").returncode == -9
    assert service.output(f"cat {PROGRAM}.before") == former

    (service.bin / "at-restart").write_text("echo active >$here/state")
    (service.bin / "systemctl.calls").unlink()
    service.output("./install.sh --yes")
    assert "restart --no-block wggw" in (service.bin / "systemctl.calls").read_text()
    assert service.output(f"cat {PROGRAM}").endswith("# a later version\n")
    assert service.output("find /usr/local /etc/systemd/system -name '*.before'") == ""
    assert "up to date" in service.output("./install.sh --yes")


@pytest.mark.real
def test_run_after_one_that_was_killed_with_a_new_file_in_place_finishes_its_work(
    service: Machine,
) -> None:
    service.output("./install.sh --yes")
    assert "up to date" in service.output("./install.sh --yes")
    settings = "/etc/wggw/wggw.env"
    service.output(f"sed -i /^API_PORT=/d {settings} && echo API_PORT=443 >>{settings}")
    (service.bin / "at-reload").write_text("kill -KILL $PPID")
    assert service.run("./install.sh --yes").returncode == -9
    assert service.run("test -e /etc/systemd/system/wggw.service.d/50-port.conf").returncode == 0

    (service.bin / "at-reload").write_text("touch $here/loaded")
    (service.bin / "systemctl.calls").unlink()
    service.output("./install.sh --yes")
    calls = (service.bin / "systemctl.calls").read_text()
    assert "daemon-reload" in calls and "restart --no-block wggw" in calls
    assert "up to date" in service.output("./install.sh --yes")


@pytest.mark.real
def test_dry_run_of_an_upgrade_only_asks_systemctl(service: Machine) -> None:
    service.output("./install.sh --yes")
    with (service.tree / "wggw.py").open("a") as program:
        program.write("# a later version\n")
    (service.bin / "systemctl.calls").unlink(missing_ok=True)
    shown = service.output("./install.sh --dry-run")
    assert "+ systemctl restart --no-block wggw" in shown
    calls = service.bin / "systemctl.calls"
    asked = calls.read_text().splitlines() if calls.exists() else []
    assert {line.split()[0] for line in asked} <= {"is-active", "show"}, asked


@pytest.mark.real
def test_uninstall_removes_what_a_killed_run_kept(service: Machine) -> None:
    service.output("./install.sh --yes")
    kept = "/etc/systemd/system/wggw.service.before /usr/local/sbin/wggw.before"
    service.output(f"touch {kept}")
    service.output("./install.sh --uninstall --yes")
    assert service.output("find /usr/local /etc/systemd/system -name '*wggw*'") == ""


@pytest.mark.real
def test_upgrade_mends_a_service_that_was_restarted_again_and_again(service: Machine) -> None:
    service.output("./install.sh --yes")
    (service.bin / "restarts").write_text("7")
    (service.bin / "state").write_text("activating")
    slowly = "(sleep 1; echo active >$here/state) >/dev/null 2>&1 &"
    (service.bin / "at-restart").write_text(slowly)
    with (service.tree / "wggw.py").open("a") as program:
        program.write("# a later version\n")
    service.output("./install.sh --upgrade --yes")


@pytest.mark.real
@pytest.mark.parametrize("gone", ["/etc/wggw", "/var/lib/wggw"])
def test_uninstall_without_settings_or_without_data(service: Machine, gone: str) -> None:
    service.output(f"./install.sh --yes && rm -r {gone}")
    shown = service.output("./install.sh --uninstall --yes")
    kept = {"/etc/wggw", "/var/lib/wggw"} - {gone}
    assert f"settings and data stay in {kept.pop()} (" in shown
