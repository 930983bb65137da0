"""What `wggw doctor` says on broken hosts: a table of one fault each.

Each fault must be the first line, what that line advises must mend it, and a host that is set up as
the README says must give nothing but `ok`. The host is a network namespace with a gateway that
reads its settings from a file; the next row uses it again unless a row failed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import netns
import pytest
from harness import GatewayProcess, a_key, finish, free_port, ok, program_with, some, wait_for
from objects import TOKEN, TlsStore, make_certificate

import wggw

pytestmark = pytest.mark.real

# The clock of a machine for tests is often not synchronised: rows say what the kernel says of it.
CLOCK = {"UNKNOWN_CLOCK_ERROR": 1e9}
# A gateway that looks after its interface and its files once an hour: faults stay to be seen.
SLOW = {**CLOCK, "SUPERVISE_SECONDS": 3600.0}
CLASSES = '{"gold": {"down": "10mbit"}}'


class Host(GatewayProcess):
    """A gateway in this thread's network namespace, and the words that an operator can say."""

    def __init__(self, directory: Path) -> None:
        self.interface = netns.unique()
        super().__init__(
            directory,
            API_HOST="0.0.0.0",
            WG_BACKEND="auto",
            WG_INTERFACE=self.interface,
            WG_IPV4_SUBNET="10.77.0.0/24",
            WG_IPV6_SUBNET="fd77::/64",
            WG_EXTRA_PORTS="53",
            WG_ENDPOINT="vpn.example.org",
            ALLOWED_BACKENDS="198.51.100.0/24",
            SERVICE_CLASSES=CLASSES,
            SAMPLE_INTERVAL="3600",  # a sample finds what differs and repairs it
            DB_PATH=str(directory / "state" / "wireguard.db"),
        )
        (directory / "state").mkdir()
        self.database = directory / "state" / "wireguard.db"
        self.values, self.settings = self.settings, {}
        self.program = program_with(**SLOW)
        self.doctor_runs_as: list[str] = []  # a prefix
        self.after = contextlib.ExitStack()  # what ends with the row
        self.set()
        assert self.wggw("net", "up").returncode == 0
        self.start()

    def set(self, **changes: str | None) -> None:
        """Write the settings with these changes; None removes one."""
        given = {**self.values, **changes}
        self.values = {name: value for name, value in given.items() if value is not None}
        file = self.directory / ".env"
        file.write_text("".join(f"{name}={value!r}\n" for name, value in self.values.items()))
        file.chmod(0o600)

    def set_for_now(self, **changes: str) -> None:
        """Until the end of the row, the gateway's restart included."""
        before = {name: self.values.get(name) for name in changes}
        self.after.callback(self.systemctl, "restart")
        self.after.callback(self.set, **before)
        self.set(**changes)

    def wggw(self, *words: str, program: list[str] | None = None) -> Any:
        command = [*self.doctor_runs_as, *(program or self.program), *words]
        return finish(command, self.directory, **self.settings)

    def doctor(self) -> tuple[int, list[str]]:
        done = self.wggw("doctor")
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, (done.stderr + done.stdout).splitlines()

    def shell(self, command: str) -> str:
        """A command as the advice writes it, in the directory of the settings."""
        wggw = f'wggw() {{ {shlex.join(self.program)} "$@"; }}\n'
        done = subprocess.run(
            ["bash", "-ec", wggw + command],
            cwd=self.directory,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def systemctl(self, verb: str) -> None:
        """What the unit does: ExecStartPre and ExecReload are `wggw net up`."""
        if verb == "restart" and self.process:
            self.stop()
        assert self.wggw("net", "up").returncode == 0
        if verb == "reload":
            count = self.text().count("reloaded keys")
            assert self.process is not None
            self.shell(f"kill -HUP {self.process.pid}")
            wait_for(lambda: self.text().count("reloaded keys") > count, what="the reload")
        else:
            self.start()

    def ip(self, words: str) -> None:
        netns.output("ip", *words.split())

    def nft(self, words: str) -> None:
        netns.output("nft", words)

    def remove_interface(self) -> None:
        """And wait until its program has ended, which frees its port."""
        self.ip(f"link delete {self.interface}")
        wait_for(lambda: netns.daemon_pid(self.interface) is None, what="the program's end")

    def close(self) -> None:
        super().close()
        netns.forget_socket(self.interface)


def follow(host: Host, advice: str) -> None:
    """Carry out the command that the advice names."""
    for pattern in ("`(.+?)`", r"systemctl (\w+) wggw", "^(?:.*: )?(.+)$"):
        if found := re.search(pattern, advice):
            break
    assert found
    if "systemctl" in pattern:
        host.systemctl(found[1])
    else:
        host.shell(found[1])


class Fault(NamedTuple):
    """`first`: the first line holds it; `advice`: the second line does.

    `mend` carries out advice that is no single command.
    """

    breaks: Callable[[Host], Any]
    first: str
    advice: str
    mend: Callable[[Host, str], Any] = follow


def then(*steps: Callable[[Host], Any]) -> Callable[..., None]:
    def all_of_them(host: Host, _: str = "") -> None:
        for step in steps:
            step(host)

    return all_of_them


def setting(**changes: str) -> Callable[[Host], None]:
    return lambda host: host.set_for_now(**changes)


def systemctl(verb: str) -> Callable[[Host], None]:
    return lambda host: host.systemctl(verb)


def stop(host: Host) -> None:
    assert host.stop() == 0


def close_all(host: Host) -> None:
    """End what the row has opened."""
    host.after.close()


def ip(words: str) -> Callable[[Host], None]:
    return lambda host: host.ip(words.format(wg=host.interface))


def nft(words: str) -> Callable[[Host], None]:
    return lambda host: host.nft(words)


def sysctl(name: str, value: str) -> Callable[[Host], None]:
    return lambda host: wggw.write_sysctl(name, value)


def remove_rule(words: str) -> Callable[[Host], None]:
    """Remove the first rule of our table that has these words."""

    def remove(host: Host) -> None:
        chain = ""
        for line in netns.output("nft", "-a", "list", "table", "inet", "wggw").splitlines():
            chain = line.split()[1] if line.startswith("\tchain ") else chain
            if words in line:
                host.nft(f"delete rule inet wggw {chain} handle {line.split()[-1]}")
                return
        raise AssertionError(f"no rule with {words}")

    return remove


def chmod(name: str, mode: int) -> Callable[[Host], None]:
    return lambda host: (host.directory / name).chmod(mode)


def create(**fields: Any) -> Callable[[Host], None]:
    def make(host: Host) -> None:
        ok(host.client().create(a_key("stored"), **fields))
        host.after.callback(lambda: ok(host.client().delete(a_key("stored"))))

    return make


# --- what is broken -------------------------------------------------------------------------------


def tear_the_journal(host: Host) -> None:
    host.kill()
    with Path(f"{host.database}.journal").open("ab") as file:
        file.write(b"7 torn")


def remove_state(host: Host) -> None:
    for path in host.database.parent.glob("wireguard.db*"):
        path.unlink()


def hang(host: Host) -> None:
    assert host.process is not None
    netns.freeze(host.process.pid)
    host.program = program_with(**SLOW, CLIENT_TIMEOUT=1.0)
    host.after.callback(setattr, host, "program", program_with(**SLOW))


def damage_database(host: Host) -> None:
    host.database.write_bytes(b"damaged")


def repair(host: Host, advice: str) -> None:
    told = host.shell("wggw check --repair")
    host.shell(told.splitlines()[-1])
    host.systemctl("start")
    host.shell("rm -r damaged")


def move_away(host: Host, advice: str) -> None:
    follow(host, advice)
    wait_for(host.database.exists, what="a new snapshot")
    host.shell("rm -r damaged")


def run_fast(host: Host) -> None:
    """As the gateway runs really: it looks after its files every second."""
    host.program = program_with(**CLOCK)
    host.systemctl("restart")
    host.after.callback(host.systemctl, "restart")
    host.after.callback(setattr, host, "program", program_with(**SLOW))


def hold_port(kind: int, name: str) -> Callable[[Host], None]:
    def hold(host: Host) -> None:
        port = int(host.values.get(name, "51820"))
        held = socket.socket(socket.AF_INET, kind)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("0.0.0.0", port))
        if kind == socket.SOCK_STREAM:
            held.listen()
        host.after.callback(held.close)

    return hold


def no_interface(host: Host) -> None:
    """For faults of what makes it, where the kernel does not."""
    if netns.kernel_has_wireguard():
        pytest.skip("the kernel has WireGuard: nothing else is needed")
    stop(host)
    host.remove_interface()


def seen_with(*mounts: str) -> Callable[[Host], None]:
    """The doctor sees the host with these mounts."""

    def mount(host: Host) -> None:
        script = " && ".join((*(f"mount {words}" for words in mounts), 'exec "$@"'))
        host.doctor_runs_as = ["unshare", "--mount", "sh", "-c", script, "sh"]

    return mount


def as_it_was(host: Host) -> None:
    host.doctor_runs_as = []


def stub_program(host: Host) -> None:
    program = host.directory / "wireguard-go"
    program.write_text("#!/bin/sh\necho no such instruction >&2\nexit 1\n")
    program.chmod(0o755)
    seen_with(f"--bind {program} $(command -v wireguard-go)")(host)


def certificate_for(seconds: int) -> Callable[[Host], None]:
    """A self-made certificate that expires in so many seconds."""

    def make(host: Host) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(wggw, "CERTIFICATE_SECONDS", seconds)
            names = ["vpn.example.org"]
            wggw.make_certificate(host.values["TLS_CERT"], host.values["TLS_KEY"], names)

    return make


def new_certificate(host: Host) -> None:
    for name in ("TLS_CERT", "TLS_KEY"):
        Path(host.values[name]).unlink(missing_ok=True)
    host.systemctl("restart")


def other_subnet(host: Host, advice: str) -> None:
    found = re.search(r"subnet in (\w+), such as (\S+)", advice)
    assert found, advice
    host.set_for_now(**{found[1]: found[2]})
    host.after.pop_all()  # and so it stays
    host.systemctl("restart")


def store_at(host: Host, port: int) -> TlsStore:
    store = TlsStore(
        host.directory / "store.pem", host.directory / "store.key", ("127.0.0.1", port)
    )
    host.after.callback(store.server_close)
    host.after.callback(store.shutdown)
    threading.Thread(target=store.serve_forever, args=(0.05,), daemon=True).start()
    return store


def copy_to(port: int, host: Host) -> None:
    """Settings of a remote copy."""
    host.settings = {"SSL_CERT_FILE": str(host.directory / "store.pem")}
    host.set_for_now(
        SNAPSHOT_URL=f"https://127.0.0.1:{port}/copy",
        SNAPSHOT_TOKEN=TOKEN,
        SNAPSHOT_COPY_INTERVAL="0.1",
    )


class Copy:
    """Where the copy of the present row is."""

    port = 0
    store: TlsStore


def start_without_copy(host: Host) -> None:
    make_certificate(host.directory)
    Copy.port = free_port()
    copy_to(Copy.port, host)
    stop(host)
    host.spawn()
    wait_for(lambda: "remote copy: " in host.text().splitlines()[-1], what="a refused start")


def copy_is_back(host: Host, _: str) -> None:
    store_at(host, Copy.port)
    wait_for(host.is_ready, what="readiness")


def with_copy(host: Host) -> None:
    make_certificate(host.directory)
    Copy.store = store_at(host, 0)
    copy_to(Copy.store.server_port, host)
    host.systemctl("restart")
    wait_for(lambda: copy_of(host)["number"] is not None, what="the first copy")


def copy_of(host: Host) -> Any:
    return ok(host.client().send("GET", "/api/v1/server/status"))["remote_copy"]


def refuse_copies(host: Host) -> None:
    Copy.store.fault = lambda method, name: "refuse"
    create()(host)
    wait_for(lambda: copy_of(host)["failure"], what="a failure")


def accept_copies(host: Host, _: str) -> None:
    Copy.store.fault = lambda method, name: ""
    wait_for(lambda: not copy_of(host)["failure"], what="a good copy")


def another_takes_it_over(host: Host) -> None:
    directory = host.directory / "other"
    directory.mkdir(exist_ok=True)
    names = ("SNAPSHOT_URL", "SNAPSHOT_TOKEN", "WG_INTERFACE", "WG_IPV4_SUBNET", "WG_IPV6_SUBNET")
    given = {name: host.values[name] for name in (*names, "SERVICE_CLASSES")}
    other = GatewayProcess(directory, **given, **host.settings)
    try:
        other.start()
        create()(host)
        wait_for(lambda: "taken it over" in (copy_of(host)["failure"] or ""), what="the notice")
    finally:
        other.close()


def close_api(host: Host, advice: str) -> None:
    host.set(ALLOWED_BACKENDS="192.0.2.0/24")
    follow(host, advice)


def switch_on_ipv6(host: Host, advice: str) -> None:
    host.shell(advice.split(", or ", maxsplit=1)[0])
    host.systemctl("restart")


def then_start(host: Host, advice: str) -> None:
    follow(host, advice)
    host.systemctl("start")


UFW = """#!/bin/sh
case $* in
  status) echo "Status: active" ;;
  "show added") cat "$0.rules" ;;
  *) echo "ufw ${*% comment wggw} comment 'wggw'" >>"$0.rules" ;;
esac
"""


def active_ufw(host: Host) -> None:
    """A stand-in for ufw which has no rules yet."""
    directory = host.directory / "bin"
    directory.mkdir()
    (directory / "ufw").write_text(UFW)
    (directory / "ufw").chmod(0o755)
    (directory / "ufw.rules").touch()
    host.program = program_with(**SLOW, TOOL_PATH=f"{directory}:{wggw.TOOL_PATH}")
    host.after.callback(setattr, host, "program", program_with(**SLOW))


START, RESTART, UP = "systemctl start wggw", "systemctl restart wggw", "run `wggw net up`"
DROPS = "add chain ip mine {0} {{ type filter hook {0} priority 0; policy {1}; }}"
MAY = "start with MOVE_PEERS=true to move them to the present settings"
MOVE = then(setting(MOVE_PEERS="true"), systemctl("restart"))


def chain(hook: str, policy: str, rule: str = "") -> Callable[[Host], None]:
    def make(host: Host) -> None:
        host.nft("add table ip mine")
        host.nft(DROPS.format(hook, policy))
        if rule:
            host.nft(f"add rule ip mine {hook} {rule}")
        host.after.callback(host.nft, "delete table ip mine")

    return make


# fmt: off
FAULTS = {
    # the gateway and its files
    "not running": Fault(stop, "WRONG  API: no gateway runs here", START),
    "killed, its journal torn": Fault(tear_the_journal, "WRONG  API: no gateway runs", START),
    "hangs": Fault(
        hang, "WRONG  API: no answer from ", RESTART,
        then(lambda host: host.kill(), systemctl("start"))),  # as systemd after TimeoutStopSec
    "no database": Fault(then(stop, remove_state), "wireguard.db does not exist", START),
    "snapshot missing": Fault(
        then(stop, lambda host: host.database.unlink()),
        "WRONG  database: {db}: the snapshot is missing", "`wggw check --repair`", repair),
    "journal missing": Fault(
        then(stop, lambda host: Path(f"{host.database}.journal").unlink()),
        "WRONG  database: {db}.journal: the journal is missing", "`wggw check --repair`", repair),
    "database damaged": Fault(
        then(stop, damage_database), "WRONG  database: {db}", "`wggw check --repair`", repair),
    "database damaged under a running gateway": Fault(
        then(run_fast, damage_database), "WRONG  database: {db}",
        "has the whole state, and writes these files anew: mkdir damaged && mv ", move_away),
    "database of a mode that nobody can read": Fault(
        then(stop, chmod("state/wireguard.db", 0)), "who owns {state}, cannot use {db}",
        " && chmod 600 {db}", then_start),
    "database of another user": Fault(
        then(stop, lambda host: os.chown(host.database, 1, 1)),
        "who owns {state}, cannot use {db}", "chown --reference={state} {db}", then_start),
    # secrets and certificate
    "private key readable by others": Fault(
        chmod("privatekey", 0o644), "WRONG  WG_PRIVATE_KEY_FILE: ", "chmod 600 "),
    "private key missing": Fault(
        then(create(), lambda host: (host.directory / "privatekey").unlink()),
        "a restart would make another key", "wg show {wg} private-key >"),
    "key of TLS readable by others": Fault(
        chmod("key.pem", 0o644), "WRONG  TLS_KEY: ", "chmod 600 "),
    "key of TLS missing": Fault(
        lambda host: (host.directory / "key.pem").unlink(),
        "wggw: TLS_CERT, TLS_KEY: ", "remove both, and the gateway makes", then(new_certificate)),
    "settings that others can change": Fault(
        chmod(".env", 0o666), "others can", "chmod 600 "),
    "certificate expired": Fault(
        certificate_for(-3600), "WRONG  certificate: {cert} expired", "systemctl reload wggw"),
    "certificate that expires soon": Fault(
        certificate_for(5 * 86400), "note   certificate: {cert} is good until",
        "systemctl reload wggw"),
    "certificate without a name": Fault(
        setting(TLS_NAMES="gw1.example.org"), "but not for gw1.example.org",
        "systemctl reload wggw"),
    "certificate damaged": Fault(
        lambda host: (host.directory / "cert.pem").write_text("damaged"),
        "WRONG  certificate: {cert}: not a certificate", "remove both",
        then(new_certificate)),
    # the interface
    "no interface": Fault(Host.remove_interface, "WRONG  {wg}: no such interface", RESTART),
    "interface down": Fault(ip("link set {wg} down"), "WRONG  {wg}: it is down, or ", RESTART),
    "another MTU": Fault(
        ip("link set {wg} mtu 1300"), "WRONG  {wg}: it is down, or its MTU is not 1420", RESTART),
    "interface without the mark": Fault(
        lambda host: netns.output("ip", "link", "set", "dev", host.interface, "alias", ""),
        "WRONG  {wg}: this interface does not carry the gateway's mark", UP),
    "interface on another port": Fault(
        lambda host: netns.output("wg", "set", host.interface, "listen-port", "51999"),
        "WRONG  {wg}: it does not listen on UDP 51820", RESTART),
    "program that does not run": Fault(
        then(no_interface, stub_program), "WRONG  wireguard-go: it does not run: ",
        "install it again", then(as_it_was, systemctl("start"))),
    "no program": Fault(
        then(no_interface, seen_with("--bind /dev/null $(command -v wireguard-go)")),
        "the kernel has no wireguard, and wireguard-go is missing", "or install wireguard-go",
        then(as_it_was, systemctl("start"))),
    "no /dev/net/tun": Fault(
        then(no_interface, seen_with("-t tmpfs none /dev/net")),
        "wireguard-go needs /dev/net/tun: it does not exist", "--device /dev/net/tun",
        then(as_it_was, systemctl("start"))),
    # the host's network
    "IPv4 is not forwarded": Fault(
        sysctl("net/ipv4/ip_forward", "0"), "net.ipv4.ip_forward is off", UP),
    "IPv6 is not forwarded": Fault(
        sysctl("net/ipv6/conf/all/forwarding", "0"), "net.ipv6.conf.all.forwarding is off", UP),
    "IPv6 is switched off": Fault(
        then(sysctl("net/ipv6/conf/all/disable_ipv6", "1"),
             sysctl("net/ipv6/conf/default/disable_ipv6", "1")),
        "IPv6 is switched off on this host", "sysctl -w net.ipv6.conf",
        switch_on_ipv6),
    "no table": Fault(nft("delete table inet wggw"), "WRONG  NAT: table inet wggw is missing", UP),
    "one masquerade rule missing": Fault(
        remove_rule("ip6 saddr fd77::/64"), "WRONG  NAT: fd77::/64 is not masqueraded", UP),
    "one rule of the packet filter missing": Fault(
        remove_rule("198.51.100.0/24"), "WRONG  packet filter: table inet wggw has ", UP),
    "rules of the service classes missing": Fault(
        nft("delete table inet wggw_classes"), "WRONG  service classes: the rules are missing",
        UP),
    "rules of ufw missing": Fault(
        active_ufw, "WRONG  ufw: these rules are missing: allow 51820/udp; allow from ", UP),
    "a chain that drops what is forwarded": Fault(
        chain("forward", "drop"), "packets from {wg}: dropped by table ip mine, chain forward",
        "accept them there", then(close_all)),
    "a chain that drops what comes in": Fault(
        chain("input", "drop"), "UDP 51820, TCP {port}: dropped by table ip mine, chain input",
        "accept them there", then(close_all)),
    "a chain with rules": Fault(
        chain("forward", "drop", "counter accept"),
        "note   firewall: packets from {wg}: may be dropped by table ip mine, chain forward",
        "let a client ping 1.1.1.1", then(close_all)),
    "another program has the UDP port": Fault(
        then(stop, Host.remove_interface, hold_port(socket.SOCK_DGRAM, "WG_DEFAULT_PORT")),
        "WRONG  WG_DEFAULT_PORT 51820: UDP port 51820 is held by ", "stop that program",
        then(close_all, systemctl("start"))),
    "another program has the API's port": Fault(
        then(stop, hold_port(socket.SOCK_STREAM, "API_PORT")),
        "WRONG  API_HOST 0.0.0.0, API_PORT {port}: cannot listen", "stop that program",
        then(close_all, systemctl("start"))),
    "a route into the subnet": Fault(
        ip("route add 10.77.0.128/25 dev lo"),
        "WRONG  WG_IPV4_SUBNET 10.77.0.0/24: overlaps 10.77.0.128/25 of lo",
        "choose another subnet in WG_IPV4_SUBNET, such as ", other_subnet),
    # settings
    "a misspelt setting": Fault(
        lambda host: host.set(WG_MUT="1400"), "WG_MUT", "did you mean WG_MTU?",
        lambda host, _: host.set(WG_MUT=None)),
    "open to every address": Fault(
        then(setting(ALLOWED_BACKENDS="", AUTH_SCHEMES="rfc9421"), systemctl("reload")),
        "note   ALLOWED_BACKENDS: not set: the API's port is open to every address",
        "set it to the networks of your backends, then systemctl reload wggw", close_api),
    "legacy signatures from every address": Fault(
        then(setting(ALLOWED_BACKENDS=""), systemctl("reload")),
        "and legacy signatures do not cover method, path and body",
        "set it to the networks of your backends, then systemctl reload wggw", close_api),
    "no endpoint": Fault(
        setting(WG_ENDPOINT=""), "note   WG_ENDPOINT: not set", "set it to the public name",
        then(close_all)),
    "a stored DNS choice is gone": Fault(
        then(create(dns="d3"), setting(DNS_SERVERS='{"d1":"1.1.1.1"}')),
        "WRONG  DNS_SERVERS: the choice 'd3' is used by 1 peer", MAY, MOVE),
    "a stored port is gone": Fault(
        then(create(port=53), setting(WG_EXTRA_PORTS="")),
        "WRONG  WG_EXTRA_PORTS: the port 53 of {wg} is used by 1 peer", MAY, MOVE),
    "a stored class is gone": Fault(
        then(create(service_class="gold"), setting(SERVICE_CLASSES="{}")),
        "WRONG  SERVICE_CLASSES: the class 'gold' is used by 1 peer", "restore the setting",
        lambda host, _: host.set(SERVICE_CLASSES=CLASSES)),
    # what is far away
    "the clock is not synchronised": Fault(
        lambda host: setattr(host, "program", program_with(UNKNOWN_CLOCK_ERROR=0.0)),
        "note   clock: ", "run an NTP client",
        lambda host, _: setattr(host, "program", program_with(**SLOW))),
    "the copy cannot be reached at the start": Fault(
        start_without_copy, "WRONG  remote copy: waiting for the remote copy: ",
        "see that the store of SNAPSHOT_URL is reachable", copy_is_back),
    "the copy is refused": Fault(
        then(with_copy, refuse_copies), "WRONG  remote copy: ", "accepts its credentials",
        accept_copies),
    "another gateway has taken the copy over": Fault(
        then(with_copy, another_takes_it_over), "has taken it over", RESTART),
}
# fmt: on


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Host]]:
    """The present host, or a new one when a row has left it broken."""
    netns.need("ip", "wg", "nft", "unshare")
    if not netns.kernel_has_wireguard():
        netns.need("wireguard-go", tun=True)
    present: list[Host] = []
    with contextlib.ExitStack() as stack:

        def get() -> Host:
            if not present or broken:
                stack.close()
                stack.enter_context(stack_of_host := netns.Namespace())
                stack.enter_context(stack_of_host.inside())
                present[:] = [Host(tmp_path_factory.mktemp("host"))]
                stack.callback(present[0].close)
            broken[:] = [True]
            return present[0]

        yield get


broken: list[bool] = []  # a row has not come to its end


@pytest.fixture
def host(hosts: Callable[[], Host]) -> Iterator[Host]:
    made = hosts()
    try:
        yield made
    finally:
        made.after.close()


def only_ok(host: Host) -> None:
    code, lines = host.doctor()
    assert (code, [line for line in lines if not line.startswith("ok     ")]) == (0, [])


def test_healthy_host_says_nothing_but_ok(host: Host) -> None:
    only_ok(host)
    broken.clear()


@pytest.mark.parametrize("name", some(list(FAULTS), 8))
def test_fault_is_the_first_line_and_its_advice_mends_it(host: Host, name: str) -> None:
    fault = FAULTS[name]
    fault.breaks(host)
    known = {
        "db": host.database,
        "state": host.database.parent,
        "wg": host.interface,
        "port": host.port,
        "cert": host.values["TLS_CERT"],
    }
    code, lines = host.doctor()
    shown = "\n".join(lines)
    first, advice = fault.first.format(**known), fault.advice.format(**known)
    assert first in lines[0], shown
    told = lines[0] if lines[0].startswith("wggw: ") else lines[1]  # which settings are refused
    assert advice in told, shown
    refused = lines[0].startswith("wggw: ")
    assert code == (2 if refused else 1 if lines[0].startswith("WRONG") else 0), shown
    fault.mend(host, told.removeprefix("       -> "))
    code, lines = host.doctor()
    assert (code, [line for line in lines if not line.startswith("ok     ")]) == (0, [])
    host.after.close()
    broken.clear()
