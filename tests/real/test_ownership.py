"""What is not ours is not touched: every kind of interface under everything that could touch it.

One table: what is there under the name that the settings have, and what is then done. Whatever is
somebody else's must be byte for byte the same afterwards, every refusal names what was found, and
what is ours is up or gone. Each machine is a sandbox with a network of its own. The whole table is
done with WGGW_LONG=1; without it, a part of each row.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import awg_programs
import netns
import pytest
from harness import LONG, a_key, wait_for
from sandbox import Machine, machine

pytestmark = pytest.mark.real

ENV_FILE = "/etc/wggw/wggw.env"
MARK = f"wggw {ENV_FILE}"
# What of systemd the installation needs: the service runs as its own user, with the one capability.
SYSTEMCTL = r"""#!/bin/bash
state=/run/service
url=https://127.0.0.1:8000/readyz
case $1 in
  restart)
    . "${0%/*}/before-start"
    if /usr/local/sbin/wggw net up --env-file /etc/wggw/wggw.env; then
      sed -En 's/\$\$/$/g; s/%%/%/g; s/^ExecStartPre=\+-?//p' \
        /etc/systemd/system/wggw.service.d/50-userspace.conf |
        unshare --mount sh -c 'mount -t sysfs sysfs /sys; exec sh'  # /sys of this network namespace
      chown -R wggw: /var/lib/wggw
      setsid setpriv --reuid wggw --regid wggw --clear-groups --inh-caps +net_admin \
        --ambient-caps +net_admin bash -c \
        'cd /var/lib/wggw; exec /usr/local/sbin/wggw serve --env-file /etc/wggw/wggw.env' \
        >$state.log 2>&1 </dev/null 3>&- &
      echo $! >$state.pid
      echo starting >$state
    else
      echo failed >$state
    fi ;;
  is-active)
    [[ $(cat $state) != starting ]] || ! curl -skf -o /dev/null $url ||
      echo ${RESULT:-active} >$state
    cat $state; [[ $(cat $state) == active ]] ;;
  disable)
    pid=$(cat $state.pid 2>/dev/null) && kill "$pid" && tail --pid="$pid" -s 0.05 -f /dev/null
    rm -f $state.pid ;;
  show) [[ $3 == NRestarts ]] && echo 0 ;;
esac
true
"""


class Thing(NamedTuple):
    """What is there under `name`; `make` is a script, `words` are what a refusal says of it."""

    name: str
    make: str
    words: tuple[str, ...]
    settings: str = ""
    option: str = ""


def userspace(name: str, program: str = "wireguard-go", product: str = "wireguard") -> str:
    return (
        f"setsid {program} -f {name} >/dev/null 2>&1 </dev/null &\n"
        f"until [[ -S /run/{product}/{name}.sock ]]; do sleep 0.01; done\n"
    )


def wireguard(name: str, key: str, peers: int) -> str:
    """A WireGuard interface as wg-quick leaves it."""
    lines = "".join(
        f"[Peer]\nPublicKey={a_key(n)}\nAllowedIPs=10.77.0.{n}/32\n" for n in range(peers)
    )
    return (
        f"{userspace(name)}wg set {name} listen-port 7777 private-key {key}\n"
        f"wg addconf {name} /dev/stdin <<<{shlex.quote(lines)}\n"
        f"ip address add 192.0.2.1/24 dev {name}\nip link set {name} mtu 1400 up\n"
    )


OTHER_KEY, OUR_KEY = "/etc/wireguard/otherkey", "/etc/wireguard/privatekey"
KEYS = f"mkdir -p /etc/wireguard; umask 077; wg genkey >{OTHER_KEY}; wg genkey >{OUR_KEY}\n"
AWG = "AWG_INTERFACE=awg0\nAWG_IPV4_SUBNET=10.0.2.0/24\nAWG_IPV6_SUBNET=fd42:4242:2::/64\n"
AWG_UAPI = r"""
ask() { python3 -c 'import socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect("/run/amneziawg/awg0.sock")
connection.sendall(sys.argv[1].encode() + b"\n\n")
answer = b""
while not answer.endswith(b"\n\n"):
    answer += connection.recv(65536)
print(answer.decode())' "$1"; }
"""
FOREIGN = {
    "wg0 with peers": Thing(
        "wg0",
        KEYS + wireguard("wg0", OTHER_KEY, 200),
        ("WireGuard's", "200 peers", "listen port 7777", "public key ", "adopt --interface wg0"),
    ),
    "wg0 with peers and the key of our own settings": Thing(
        "wg0", KEYS + wireguard("wg0", OUR_KEY, 3), ("WireGuard's", "3 peers", "listen port 7777")
    ),
    "awg0 with peers": Thing(
        "awg0",
        KEYS
        + userspace("awg0", "amneziawg-go", "amneziawg")
        + AWG_UAPI
        + f"ask $'set=1\\nprivate_key={'11' * 31}51\\nlisten_port=7778\\njc=3\\njmin=10\\njmax=20"
        f"\\npublic_key={'22' * 32}\\nallowed_ip=10.77.0.9/32'\n"
        "ip link set awg0 up\n",
        ("AmneziaWG's", "1 peer,", "listen port 7778"),
        AWG,
        "--awg",
    ),
    "a bridge": Thing(
        "br0", KEYS + "ip link add br0 type bridge; ip link set br0 up\n", ("a bridge interface",)
    ),
    "a dummy, or another kind where the kernel has none": Thing(
        "dummy7",
        KEYS + "ip link add dummy7 type dummy || ip link add dummy7 type veth peer name other\n",
        ("it is a ", " interface, not WireGuard's"),
    ),
    "a tun of another program": Thing(
        "tun0", KEYS + "ip tuntap add dev tun0 mode tun\n", ("a tun device",)
    ),
}


class Host:
    """A machine with settings for the interface that is spoken of, and how it is seen."""

    def __init__(self, made: Machine, thing: Thing) -> None:
        self.machine, self.thing = made, thing
        made.output(
            "mkdir -p /run/systemd/system /run/wireguard /run/amneziawg\n"
            "mount -t tmpfs tun /dev/net && mknod -m 666 /dev/net/tun c 10 200  # as udev makes it"
        )
        self.tool("systemctl", SYSTEMCTL)
        self.tool("before-start", "")
        awg_programs.install(awg_programs.newest(), made.bin)
        self.wggw = f"python3 -I {made.tree}/wggw.py"

    def tool(self, name: str, text: str) -> None:
        (self.machine.bin / name).write_text(text)
        (self.machine.bin / name).chmod(0o755)

    def settings(self, interface: str | None = None) -> str:
        """A script that writes them."""
        thing = self.thing
        lines = (
            f"GATEWAY_API_KEY={'a1' * 32}\nDB_PATH=/var/lib/wggw/wireguard.db\n"
            f"WG_PRIVATE_KEY_FILE={OUR_KEY}\n"
            "TLS_CERT=/etc/wggw/cert.pem\nTLS_KEY=/etc/wggw/key.pem\n"
        )
        if interface is None and thing.settings:
            lines += thing.settings
        else:
            lines += f"WG_INTERFACE={interface or thing.name}\n"
        return (
            "install -d -m 700 /etc/wggw /var/lib/wggw\n"
            f"(umask 077; cat >{ENV_FILE} <<'END'\n{lines}END\n)\n"
        )

    def install(self, *options: str) -> str:
        return shlex.join(["./install.sh", "--yes", *options])

    def first_options(self) -> list[str]:
        return [self.thing.option or f"--interface={self.thing.name}"]

    def look(self) -> tuple[str, list[str]]:
        """All that is to be seen of the interface; what only time changes, and order, aside."""
        name = self.thing.name
        link = self.machine.output(
            f"ip -d link show dev {name}; ip address show dev {name}\n"
            f"pgrep -f -- '-f {name}$' || true\n"
            f"{AWG_UAPI}[[ ! -S /run/amneziawg/{name}.sock ]] || ask get=1"
        )
        peers = self.machine.output(f"wg showconf {name} 2>&1 || true")
        return re.sub(r"_timer +[0-9.]+| tentative", "", link), sorted(peers.strip().split("\n\n"))

    def clean(self) -> None:
        """Take everything of ours away, by hand."""
        self.machine.run(
            "systemctl disable >/dev/null\n"
            "rm -rf /etc/wggw /var/lib/wggw /usr/local/lib/wggw /usr/local/sbin/wggw "
            "/etc/systemd/system/wggw*\n"
            "for link in $(ip -o link | sed -n 's/^[0-9]*: \\([^:@]*\\).*alias wggw .*/\\1/p'); do "
            "ip link delete $link; done\n"
            "nft delete table inet wggw 2>/dev/null; userdel wggw 2>/dev/null"
        )


def hosts(directory: Path, thing: Thing) -> Iterator[Host]:
    netns.need("ip", "wg", "nft", "wireguard-go", "setpriv", "curl", tun=True)
    if netns.kernel_has_wireguard():
        pytest.skip("the kernel has WireGuard: the guests show this")
    with machine(directory) as made:
        host = Host(made, thing)
        made.output(thing.make)
        yield host


# --- what is somebody else's ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def foreign(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Host]:
    yield from hosts(tmp_path_factory.mktemp("foreign"), FOREIGN[request.param])


def refused(host: Host, script: str) -> None:
    done = host.machine.run(script)
    assert done.returncode == 2, done.stdout
    for words in (
        f"INTERFACE '{host.thing.name}': ",
        "left as it is",
        "Choose another name",
        *host.thing.words,
    ):
        assert words in done.stdout, done.stdout
    assert "Traceback" not in done.stdout
    assert host.machine.run("nft list table inet wggw").returncode == 1
    links = host.machine.output("ip -o link")
    assert "alias wggw" not in links  # neither this one nor another interface of ours was made


def serve(host: Host) -> None:
    refused(host, f"{host.settings()}cd /var/lib/wggw; {host.wggw} serve --env-file {ENV_FILE}")
    # Nothing that a later start could take for a state of its own.
    assert host.machine.run("test -e /var/lib/wggw/wireguard.db").returncode == 1


def net_up(host: Host) -> None:
    refused(host, f"{host.settings()}{host.wggw} net up --env-file {ENV_FILE}")


def net_down(host: Host) -> None:
    done = host.machine.run(f"{host.settings()}{host.wggw} net down --env-file {ENV_FILE}")
    assert done.returncode == 0, done.stdout
    if host.thing.name.endswith("g0"):
        assert f"{host.thing.name} stays: " in done.stdout


def first_run_in_the_foreground(host: Host) -> None:
    refused(host, host.install("--foreground", *host.first_options()))
    assert host.machine.run("ls -d /etc/wggw /var/lib/wggw").returncode == 2


def first_run(host: Host) -> None:
    refused(host, host.install(*host.first_options()))
    left = "/etc/wggw /var/lib/wggw /usr/local/lib/wggw /etc/systemd/system/wggw.service"
    assert host.machine.run(f"ls -d {left}").stdout.count("cannot access") == 4
    assert host.machine.run("getent passwd wggw").returncode == 2


def foreground_with_kept_settings(host: Host) -> None:
    refused(host, host.settings() + host.install("--foreground"))
    assert host.machine.run(f"test -s {ENV_FILE}").returncode == 0


def run_with_kept_settings(host: Host) -> None:
    refused(host, host.settings() + host.install())
    assert host.machine.run(f"test -s {ENV_FILE}").returncode == 0


def failing_installation(host: Host) -> None:
    """Its roll-back meets settings that name the interface by then."""
    host.tool("before-start", host.settings())
    done = host.machine.run(host.install("--interface=wgx"))
    host.tool("before-start", "")
    assert done.returncode == 1, done.stdout
    assert "undoing what was done" in done.stdout
    assert all(words in done.stdout for words in host.thing.words), done.stdout
    assert "alias wggw" not in host.machine.output("ip -o link")


def uninstall_after_edits(host: Host) -> None:
    """Ours is wgx, as the settings said; by now they name somebody else's."""
    host.machine.output(
        f"{host.settings('wgx')}{userspace('wgx')}ip link set dev wgx alias '{MARK}'\n"
        f"{host.wggw} net up --env-file {ENV_FILE}\n{host.settings()}"
    )
    assert host.machine.run("nft list table inet wggw").returncode == 0
    shown = host.machine.output(host.install("--uninstall"))
    assert "wgx: removed" in shown
    assert host.machine.run("nft list table inet wggw").returncode == 1
    assert host.machine.run("ip link show wgx").returncode == 1


def uninstall(host: Host) -> None:
    host.machine.output(host.settings() + host.install("--uninstall", "--purge"))


FOREIGN_ACTIONS: tuple[Callable[[Host], None], ...] = (
    serve,
    net_up,
    net_down,
    first_run_in_the_foreground,
    first_run,
    foreground_with_kept_settings,
    run_with_kept_settings,
    failing_installation,
    uninstall_after_edits,
    uninstall,
)


# What is done in every run: each thing, and each kind of action.
FOREIGN_IN_SHORT: dict[str, tuple[Callable[[Host], None], ...]] = {
    "wg0 with peers": (first_run, uninstall_after_edits),
    "wg0 with peers and the key of our own settings": (net_up,),
    "awg0 with peers": (net_down,),
    "a bridge": (net_up,),
    "a dummy, or another kind where the kernel has none": (run_with_kept_settings,),
    "a tun of another program": (serve,),
}


@pytest.mark.parametrize(
    ("foreign", "action"),
    [
        pytest.param(name, action, id=f"{name}-{action.__name__}")
        for name in FOREIGN
        for action in FOREIGN_ACTIONS
        if LONG or action in FOREIGN_IN_SHORT[name]
    ],
    indirect=["foreign"],
)
def test_what_is_foreign_is_byte_for_byte_the_same(
    foreign: Host, action: Callable[[Host], None]
) -> None:
    before = foreign.look()
    assert f": {foreign.thing.name}" in before[0]
    try:
        action(foreign)
        assert foreign.look() == before
    finally:
        foreign.clean()


# --- what is ours ---------------------------------------------------------------------------------

PEER = a_key("client")
OURS = Thing("wg0", KEYS, ())
SERVE = f"""
begin() {{
  setsid $wggw serve --env-file {ENV_FILE} >/tmp/serve.log 2>&1 </dev/null &
  serve=$!
  until curl -skf -o /dev/null https://127.0.0.1:8000/readyz; do
    kill -0 $serve 2>/dev/null || {{ cat /tmp/serve.log; wait $serve; exit; }}
    sleep 0.02
  done
}}
end() {{ kill $serve; wait $serve; }}
create() {{
  $wggw call POST /api/v1/configurations/ --data '{{"public_key": "{PEER}"}}' --env-file {ENV_FILE}
}}
cd /var/lib/wggw
"""
# Before each action: a script that comes behind the settings, and the peers that are then there.
STATES = {
    "no interface": ("", ()),
    "own interface": (f"{SERVE}begin; create; end\n", (PEER,)),
    "own interface with lost state": (
        f"{SERVE}begin; create; end; rm /var/lib/wggw/*\n",
        (),
    ),
    "own interface from before the marks": (
        f"{SERVE}begin; create; end; ip link set dev wg0 alias ''\n",
        (PEER,),
    ),
}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    yield from hosts(tmp_path_factory.mktemp("own"), OURS)


@pytest.fixture
def clean(own: Host) -> Iterator[Host]:
    yield own
    own.clean()


def is_up(host: Host, *peers: str) -> None:
    shown = host.machine.output("ip link show wg0")
    assert f"alias {MARK}\n" in shown and ",UP" in shown
    assert sorted(host.machine.output("wg show wg0 peers").split()) == sorted(peers)


def is_gone(host: Host) -> None:
    for there in ("ip link show wg0", "pgrep -x wireguard-go", "nft list table inet wggw"):
        assert host.machine.run(there).returncode == 1, there


def own_serve(host: Host, prepared: str, peers: tuple[str, ...]) -> None:
    host.machine.output(f"{prepared}{SERVE}begin; end")
    is_up(host, *peers)


def own_net_up(host: Host, prepared: str, peers: tuple[str, ...]) -> None:
    host.machine.output(f"{prepared}$wggw net up --env-file {ENV_FILE}")
    host.machine.output("nft list table inet wggw")
    if "begin" in prepared:
        is_up(host, PEER)  # peers are the business of `serve`


def own_net_down(host: Host, prepared: str, peers: tuple[str, ...]) -> None:
    shown = host.machine.output(f"{prepared}$wggw net down --env-file {ENV_FILE}")
    assert ("wg0: removed" in shown) == ("begin" in prepared)
    is_gone(host)


def in_the_foreground(host: Host, script: str, peers: tuple[str, ...]) -> None:
    script += f"cd {host.machine.tree}; exec {host.install('--foreground')}"
    install = host.machine.start(f"bash -c {shlex.quote(script)}")
    install.wait_text("The gateway is ready")
    install.signal("TERM")
    assert install.wait() == 0
    is_up(host, *peers)


def own_first_run(host: Host, prepared: str, peers: tuple[str, ...]) -> None:
    """In the foreground, of an installation whose settings are gone."""
    in_the_foreground(host, f"{prepared}rm -r /etc/wggw; ", peers)


def own_run_with_kept_settings(host: Host, prepared: str, peers: tuple[str, ...]) -> None:
    in_the_foreground(host, prepared, peers)


def own_uninstall(host: Host, prepared: str, peers: tuple[str, ...]) -> None:
    host.machine.output(f"{prepared}cd {host.machine.tree}; {host.install('--uninstall')}")
    is_gone(host)


def own_uninstall_after_edits(host: Host, prepared: str, peers: tuple[str, ...]) -> None:
    edit = f"$wggw net up --env-file {ENV_FILE}; sed -i s/=wg0/=wg7/ {ENV_FILE}"
    host.machine.output(f"{prepared}{edit}; cd {host.machine.tree}; {host.install('--uninstall')}")
    is_gone(host)


OWN_ACTIONS = (
    own_serve,
    own_net_up,
    own_net_down,
    own_first_run,
    own_run_with_kept_settings,
    own_uninstall,
    own_uninstall_after_edits,
)


OWN_IN_SHORT = {
    "no interface": (own_uninstall_after_edits,),
    "own interface": (own_net_down,),
    "own interface with lost state": (own_serve,),
    "own interface from before the marks": (own_net_up, own_uninstall),
}


@pytest.mark.parametrize(
    ("state", "action"),
    [
        pytest.param(state, action, id=f"{state}-{action.__name__}")
        for state in STATES
        for action in OWN_ACTIONS
        if LONG or action in OWN_IN_SHORT[state]
    ],
)
def test_what_is_ours_is_up_or_gone(
    clean: Host, state: str, action: Callable[[Host, str, tuple[str, ...]], None]
) -> None:
    prepared, peers = STATES[state]
    if action is own_first_run and state == "own interface from before the marks":
        pytest.skip("without its settings nothing shows whose it is")
    action(clean, f"wggw={shlex.quote(clean.wggw)}\n{clean.settings()}{prepared}", peers)


def test_an_interface_from_before_the_marks_with_a_peer_that_is_not_ours_is_refused(
    clean: Host,
) -> None:
    """The key alone proves nothing; nor do some of the peers."""
    host = clean
    prepared, _ = STATES["own interface from before the marks"]
    stranger = f"wg set wg0 peer {a_key('stranger')} allowed-ips 10.0.1.77/32\n"
    host.machine.output(f"wggw={shlex.quote(host.wggw)}\n{host.settings()}{prepared}{stranger}")
    before = host.look()
    for command in ("serve", "net up"):
        done = host.machine.run(f"{host.wggw} {command} --env-file {ENV_FILE}")
        assert (done.returncode, "2 peers" in done.stdout) == (2, True), done.stdout
    assert "wg0 stays" in host.machine.output(f"{host.wggw} net down --env-file {ENV_FILE}")
    assert host.look() == before
    own = re.search(r"ip link set dev wg0 alias '.*?'", done.stdout)
    assert own  # the way out that it names
    host.machine.output(f"{own[0]}\nwggw={shlex.quote(host.wggw)}{SERVE}begin; end")
    is_up(host, PEER)


def test_an_interface_that_took_the_place_of_ours_is_not_touched(clean: Host) -> None:
    host = clean
    host.machine.output(
        f"wggw={shlex.quote(host.wggw)}\n{host.settings()}{SERVE}begin; create\n"
        "kill -STOP $serve  # it would put it back at once\n"
        "ip link delete wg0; while pgrep -r R,S,D -x wireguard-go; do sleep 0.01; done\n"
        f"{wireguard('wg0', OTHER_KEY, 3)}"
        "echo $serve >/tmp/serve.pid"
    )
    try:
        before = host.look()
        host.machine.output("kill -CONT $(cat /tmp/serve.pid)")
        call = f"{host.wggw} call --env-file {ENV_FILE}"
        refused = host.machine.run(
            f"""{call} POST /api/v1/configurations/ --data '{{"public_key": "{a_key(1)}"}}'"""
        )
        assert "503" in refused.stdout + str(refused.returncode), refused.stdout
        wait_for(lambda: "3 peers" in host.machine.output("cat /tmp/serve.log"))
        status = json.loads(host.machine.run(f"{call} GET /api/v1/server/status").stdout)
        assert status["status"] == "degraded"
        host.machine.run(f"{call} POST /api/v1/sync-ips")
        assert host.look() == before
    finally:
        host.machine.output("kill $(cat /tmp/serve.pid); ip link delete wg0")


# --- the service ----------------------------------------------------------------------------------


@pytest.mark.long
def test_a_service_takes_its_interface_over_from_the_foreground_and_no_other_socket(
    clean: Host,
) -> None:
    """A wireguard-go ends if the owner of its socket is changed, even to the same one."""
    host = clean
    host.machine.output(userspace("wg9"))
    in_the_foreground(host, "", ())
    host.machine.output(host.install())
    is_up(host)
    look = "ip -o link | cut -d: -f1,2; cd /run/wireguard; stat -c '%n %U %a' . wg*.sock"
    before = host.machine.output(look)
    assert before.endswith(". root 1775\nwg0.sock wggw 700\nwg9.sock root 700\n"), before
    assert ": wg9\n" in before
    host.machine.output(
        "systemctl disable; systemctl restart; until systemctl is-active; do :; done"
    )
    assert host.machine.output(look) == before
    host.machine.output(f"{host.install('--uninstall')}; ip link delete wg9")


@pytest.mark.long
def test_a_failing_installation_takes_back_what_it_made_and_no_more(clean: Host) -> None:
    host = clean
    done = host.machine.run(f"RESULT=failed {host.install()}")
    assert done.returncode == 1, done.stdout
    assert "wg0: removed" in done.stdout
    is_gone(host)
    left = "/etc/wggw /var/lib/wggw /usr/local/lib/wggw /etc/systemd/system/wggw.service"
    assert host.machine.run(f"ls -d {left}").stdout.count("cannot access") == 4
    assert host.machine.run("getent passwd wggw").returncode == 2

    host.machine.output(host.install())
    wggw = f"wggw={shlex.quote(host.wggw)}"
    host.machine.output(f"{wggw}{SERVE}create")
    is_up(host, PEER)
    host.machine.output("systemctl disable; rm /etc/systemd/system/wggw.service")
    done = host.machine.run(f"RESULT=failed {host.install()}")
    assert (done.returncode, "take_down --keep-interfaces" in done.stdout) == (1, True), done.stdout
    is_up(host, PEER)  # it was up before
    assert host.machine.run("nft list table inet wggw").returncode == 1


@pytest.mark.long
def test_uninstall_ends_what_a_former_version_left_running(clean: Host) -> None:
    """An interface without a mark, and settings that do not say any more which it was."""
    host = clean
    host.machine.output(host.install())
    host.machine.output(
        f"ip link set dev wg0 alias ''; sed -i s/=wg0/=wg7/ {ENV_FILE}; rm {ENV_FILE}"
    )
    shown = host.machine.output(host.install("--uninstall"))
    assert "wg0 stays" in shown
    is_gone(host)  # the user wggw is the gateway's alone, and so is what ran as it
    assert host.machine.run("getent passwd wggw").returncode == 2
