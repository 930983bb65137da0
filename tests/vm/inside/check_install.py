"""Inside the guest: install.sh under systemd, from a clean machine to a clean machine.

     backend 192.0.2.2 ---- 192.0.2.1 |         | 203.0.113.1 ---- 203.0.113.2      internet
    client1 198.18.1.2 ---- 198.18.1.1 | gateway | 2001:db8:3::1 -- 2001:db8:3::2    (no way back to
    client2 198.18.2.2 ---- 198.18.2.1 |         | lo: 198.18.0.1, WG_ENDPOINT        the tunnel)

Each name but the gateway's is a network namespace. The tests are one story: each goes on where the
one before ended. UFW=1: the same with ufw active from the beginning.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import path_key, wait_for

TREE = Path("/tree")
ENV = Path("/etc/wggw/wggw.env")
UNIT = Path("/etc/systemd/system/wggw.service")
PROGRAM = Path("/usr/local/lib/wggw/wggw.py")
LAUNCHER = Path("/usr/local/sbin/wggw")
UFW = bool(os.environ.get("UFW"))
OPTIONS = ["--backend", "192.0.2.0/24", "--endpoint", "198.18.0.1", "--extra-ports", "53,443"]
REMAINS = "find / -xdev ( -name *wggw* -o -name wg0* ) -not -path /sys/* -not -path /proc/*"


def run(*command: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)


def sh(*command: str, seconds: float = 120) -> str:
    done = run(*command, seconds=seconds)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout


def install(*options: str, tree: Path = TREE) -> subprocess.CompletedProcess[str]:
    return run(str(tree / "install.sh"), "--yes", *options, seconds=200)


def in_ns(name: str, *command: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    return run("ip", "netns", "exec", name, *command, seconds=seconds)


def pings(name: str, address: str, count: int = 1) -> bool:
    """Within a second: where an answer is expected, reaches() waits for it."""
    return in_ns(name, "ping", "-q", "-c", str(count), "-W", "1", address).returncode == 0


def reaches(name: str, address: str) -> bool:
    return bool(wait_for(lambda: pings(name, address), what=f"{name} to reach {address}"))


def remains() -> set[str]:
    """Every file that carries our names."""
    ours = (str(TREE), "/host", "/root", "/tmp")
    return {line for line in sh(*REMAINS.split()).splitlines() if not line.startswith(ours)}


def status_text() -> str:
    return sh("systemctl", "show", "-P", "StatusText", "wggw").strip()


def main_pid() -> int:
    return int(sh("systemctl", "show", "-P", "MainPID", "wggw"))


def is_active() -> bool:
    return run("systemctl", "is-active", "-q", "wggw").returncode == 0


# --- the world ------------------------------------------------------------------------------------


def connect(name: str, here: str, there: str) -> None:
    sh(*f"ip link add to-{name} type veth peer name uplink netns {name}".split())
    for address, device, space in ((here, f"to-{name}", ()), (there, "uplink", ("-n", name))):
        for one in address.split():
            nodad = ("nodad",) if ":" in one else ()
            sh("ip", *space, "address", "add", one, "dev", device, *nodad)
        sh("ip", *space, "link", "set", device, "up")


@pytest.fixture(scope="module", autouse=True)
def world() -> None:
    for name in ("backend", "client1", "client2", "internet"):
        sh("ip", "netns", "add", name)
        sh("ip", "-n", name, "link", "set", "lo", "up")
    sh("ip", "address", "add", "198.18.0.1/32", "dev", "lo")
    connect("backend", "192.0.2.1/24", "192.0.2.2/24")
    connect("internet", "203.0.113.1/24 2001:db8:3::1/64", "203.0.113.2/24 2001:db8:3::2/64")
    sh(*["ip", "-n", "backend", "route", "add", "198.18.0.1", "via", "192.0.2.1"])
    sh(*["ip", "-n", "internet", "route", "add", "198.18.0.1", "via", "203.0.113.1"])
    for number in (1, 2):
        connect(f"client{number}", f"198.18.{number}.1/24", f"198.18.{number}.2/24")
        sh(*f"ip -n client{number} route add 198.18.0.1 via 198.18.{number}.1".split())
    if UFW:
        sh("ufw", "allow", "22/tcp")
        sh("ufw", "--force", "enable")


class Story:
    """What the tests before have found out."""

    clean: set[str]
    result: dict[str, Any]
    peers: dict[str, Any] = {}


def api(method: str, path: str, body: Any = None, space: str = "backend") -> Any:
    """A signed request by curl; None when nothing comes back."""
    data = json.dumps(body) if body is not None else ""
    now = str(int(time.time()))
    message = f"timestamp={now}, body_length={len(data)}".encode()
    key = re.search(r"^GATEWAY_API_KEY=(.*)$", ENV.read_text(), re.MULTILINE)
    assert key
    mac = hmac.new(key[1].encode(), message, hashlib.sha256).hexdigest()
    command = ["curl", "-sk", "--max-time", "10", "-X", method, f"https://198.18.0.1:8000{path}"]
    command += ["-H", f"timestamp: {now}", "-H", f"signature: {mac}"]
    if data:
        command += ["-H", "Content-Type: application/json", "-d", data]
    done = in_ns(space, *command)
    return json.loads(done.stdout) if done.stdout else None


def join(client: str, port: int) -> None:
    """Make a peer over the API, and its tunnel in the client's namespace."""
    private = sh("wg", "genkey")
    public = subprocess.run(
        ["wg", "pubkey"], input=private, capture_output=True, text=True, check=True
    ).stdout.strip()
    answer = api(
        "POST",
        "/api/v1/configurations/",
        {"public_key": public, "protocol": "dual", "port": port},
    )
    assert answer["status"] == "created", answer
    assert answer["endpoint"] == f"198.18.0.1:{port}"
    Story.peers[client] = answer
    key = Path(f"/run/{client}.key")
    key.write_text(private)
    for line in (
        "link add wgc type wireguard",
        f"address add {answer['assigned_ip']}/32 dev wgc",
        f"address add {answer['assigned_ipv6']}/128 dev wgc nodad",
        "link set wgc mtu 1420 up",
        "route add default dev wgc",
        "route add default dev wgc metric 1",
    ):
        command = f"ip -n {client} {'-6 ' if line.endswith('metric 1') else ''}{line}"
        sh(*command.split())
    done = in_ns(
        client,
        *f"wg set wgc private-key {key} peer {answer['server_public_key']} "
        f"endpoint {answer['endpoint']} allowed-ips 0.0.0.0/0,::/0 persistent-keepalive 5".split(),
    )
    assert done.returncode == 0, done.stderr


# --- installing -----------------------------------------------------------------------------------


def test_failed_first_installation_leaves_nothing_behind() -> None:
    Story.clean = remains()
    before = sh("nft", "-s", "list", "ruleset")  # without counters: ufw's rules have some
    # Something else has the API's port.
    with subprocess.Popen(["nc", "-lk", "8000"]) as other:
        done = install(*OPTIONS)
        other.terminate()
    assert done.returncode == 1, done.stdout
    assert "cannot listen on 0.0.0.0 port 8000" in done.stderr, done.stderr
    assert "undoing what was done" in done.stdout
    assert remains() == Story.clean, done.stdout
    assert run("getent", "passwd", "wggw").returncode == 2
    assert sh("nft", "-s", "list", "ruleset") == before
    assert run("ip", "link", "show", "wg0").returncode != 0


def test_dry_run_changes_nothing() -> None:
    done = install(*OPTIONS, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "systemctl enable" in done.stdout
    assert remains() == Story.clean


def test_installation_ends_with_what_the_backend_needs() -> None:
    start = time.monotonic()
    done = install(*OPTIONS, "--json")
    assert done.returncode == 0, done.stderr
    print(f"measured: install.sh: {time.monotonic() - start:.1f} s")
    Story.result = result = json.loads(done.stdout)
    assert result["api_url"] == "https://198.18.0.1:8000"
    assert f"GATEWAY_API_KEY={result['api_key']}\n" in ENV.read_text()
    (interface,) = result["interfaces"]
    assert interface["ports"] == [51820, 53, 443]
    assert interface["public_key"] == sh("wg", "show", "wg0", "public-key").strip()
    assert result["api_key"] not in done.stderr
    shown = sh("systemctl", "status", "wggw")
    assert "serving: wg0 (netlink)" in shown


def test_unit_is_right_and_closed() -> None:
    done = run("systemd-analyze", "verify", str(UNIT))
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    text = sh("systemd-analyze", "security", "--no-pager", "wggw")
    rating = re.search(r"exposure level for wggw.service: ([0-9.]+)", text)
    assert rating, text
    print(f"measured: systemd-analyze security: {rating[1]}")
    assert float(rating[1]) <= 1.5, text
    assert re.match("Name:\twggw\n", process := Path(f"/proc/{main_pid()}/status").read_text())
    assert re.search(r"^CapEff:\s+0000000000001000$", process, re.MULTILINE)  # CAP_NET_ADMIN
    assert not re.search(r"^Uid:\s+0\b", process, re.MULTILINE)


def compiled() -> list[tuple[bool, str, bool]]:
    """Of each compiled file: is it this program's, its mode, may the service read it."""
    found = []
    for path in PROGRAM.parent.glob("__pycache__/*.pyc"):
        written = int.from_bytes(path.read_bytes()[8:12], "little")
        as_service = ("setpriv", "--reuid=wggw", "--regid=wggw", "--clear-groups")
        readable = run(*as_service, "test", "-r", str(path))
        found.append(
            (
                written == int(PROGRAM.stat().st_mtime),
                f"{path.stat().st_mode & 0o777:o}",
                readable.returncode == 0,
            )
        )
    return found


IS_CURRENT = (True, "644", True)


def test_program_is_compiled_once_whoever_finds_it_missing() -> None:
    assert compiled() == [IS_CURRENT]
    shutil.rmtree(PROGRAM.parent / "__pycache__")  # as it is after an upgrade of Python itself
    for what in ("compiling", "compiled"):
        start = time.monotonic()
        sh("systemctl", "restart", "wggw")
        print(f"measured: restart to ready, {what}: {time.monotonic() - start:.2f} s")
        assert compiled() == [IS_CURRENT]
    start = time.monotonic()
    sh("/usr/bin/python3", "-I", "-c", "pass")
    print(f"measured: a Python that does nothing: {time.monotonic() - start:.2f} s")


def test_second_run_changes_nothing() -> None:
    def state() -> list[Any]:
        files = sorted(path for path in remains() if os.path.isfile(path))
        kept = [f for f in files if not f.startswith(("/var/", "/run/"))]
        stamps = [(f, os.stat(f).st_mtime_ns, os.stat(f).st_uid) for f in kept]
        return [stamps, sh("nft", "-s", "list", "ruleset"), main_pid()]

    before = state()
    done = install(*OPTIONS)
    assert done.returncode == 0, done.stderr
    assert "up to date" in done.stdout
    assert Story.result["api_key"] not in done.stdout
    assert Story.result["certificate_sha256"] in done.stdout
    assert state() == before
    assert sh("wggw", "net", "up", "--env-file", str(ENV)) == ""


# --- traffic --------------------------------------------------------------------------------------


def test_clients_reach_the_internet_through_nat_and_extra_ports() -> None:
    join("client1", 51820)
    join("client2", 443)
    for client in ("client1", "client2"):
        for address in ("10.0.1.1", "fd42:4242:1::1", "203.0.113.2", "2001:db8:3::2"):
            assert reaches(client, address)
    web = (
        "import http.server as h\n"
        "h.test(h.SimpleHTTPRequestHandler, h.ThreadingHTTPServer, port=80, bind={!r})"
    )
    log = Path("/run/web.log")
    with log.open("wb") as out, contextlib.ExitStack() as stack:
        for address in ("203.0.113.2", "2001:db8:3::2"):
            command = [
                "ip",
                "netns",
                "exec",
                "internet",
                "python3",
                "-u",
                "-c",
                web.format(address),
            ]
            server = stack.enter_context(
                subprocess.Popen(command, cwd="/usr", stderr=out, stdout=out)
            )
            stack.callback(server.terminate)
        for url in ("http://203.0.113.2/", "http://[2001:db8:3::2]/"):
            fetch = ("curl", "-s", "--max-time", "20", "-o", "/dev/null", url)
            wait_for(lambda f=fetch: in_ns("client1", *f).returncode == 0, 60, url)
    text = log.read_text()
    assert "203.0.113.1 - -" in text and "2001:db8:3::1 - -" in text, text
    assert "10.0.1." not in text and "fd42" not in text


def test_mss_is_clamped() -> None:
    sh(*["ip", "-n", "client1", "link", "set", "wgc", "mtu", "1500"])  # a client that got it wrong
    watch = "timeout 60 tcpdump -nn -c 1 -i uplink tcp[tcpflags]&tcp-syn!=0"
    with subprocess.Popen(
        ["ip", "netns", "exec", "internet", *watch.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as dump:
        assert dump.stderr is not None
        while "listening on" not in dump.stderr.readline():
            pass
        in_ns("client1", "nc", "-z", "-w", "5", "203.0.113.2", "9")
        shown = dump.communicate()[0]
    sh(*["ip", "-n", "client1", "link", "set", "wgc", "mtu", "1420"])
    assert "mss 1380" in shown, shown


def test_clients_are_apart_and_the_api_is_for_backends() -> None:
    other = Story.peers["client2"]
    assert reaches("client1", "10.0.1.1")
    assert not pings("client1", other["assigned_ip"], 2)
    assert not pings("client1", other["assigned_ipv6"], 2)
    assert api("GET", "/api/v1/server/status")["status"] == "healthy"
    for address in ("10.0.1.1", "[fd42:4242:1::1]", "203.0.113.1", "198.18.1.1"):
        fetch = ("curl", "-sk", "--max-time", "2", f"https://{address}:8000/healthz")
        assert in_ns("client1", *fetch).returncode in (7, 28), address
    assert in_ns(
        "internet", "curl", "-sk", "--max-time", "2", "https://203.0.113.1:8000/healthz"
    ).returncode in (7, 28)


# --- nothing is lost ------------------------------------------------------------------------------

SEND = """
import os, socket, time
with socket.create_server(("203.0.113.2", 7000)) as door:
    connection, _ = door.accept()
    number = 0
    while not os.path.exists("/run/enough"):
        connection.sendall(b"".join((number + i).to_bytes(8, "big") for i in range(256)))
        number += 256
        time.sleep(0.01)
"""
TAKE = """
import socket
with socket.create_connection(("203.0.113.2", 7000), 30) as connection:
    data, number = b"", 0
    while part := connection.recv(65536):
        data += part
        while len(data) >= 8:
            assert int.from_bytes(data[:8], "big") == number, number
            data, number = data[8:], number + 1
    assert not data
print(number)
"""


@contextlib.contextmanager
def nothing_is_lost() -> Iterator[None]:
    """A ping and a TCP transfer run meanwhile, and neither misses anything."""
    space = ["ip", "netns", "exec"]
    ping = ["ping", "-q", "-i", "0.1", "203.0.113.2"]
    enough = Path("/run/enough")
    with contextlib.ExitStack() as stack:

        def start(name: str, *command: str) -> subprocess.Popen[str]:
            process = stack.enter_context(
                subprocess.Popen([*space, name, *command], stdout=subprocess.PIPE, text=True)
            )
            stack.callback(process.kill)
            return process

        sender = start("internet", "python3", "-c", SEND)
        wait_for(lambda: "203.0.113.2:7000" in in_ns("internet", "ss", "-ltn").stdout, 30)
        taker = start("client1", "python3", "-c", TAKE)
        pinger = start("client2", *ping)
        yield
        enough.touch()
        stack.callback(enough.unlink)
        pinger.send_signal(signal.SIGINT)
        shown = pinger.communicate(timeout=60)[0]
        counts = re.search(r"([0-9]+) packets transmitted, ([0-9]+) received", shown)
        assert counts, shown
        sent, received = int(counts[1]), int(counts[2])
        # One may be on its way when ping is stopped: that one is not lost.
        assert received > 50 and sent - received <= 1, shown
        taken = taker.communicate(timeout=120)[0]
        assert (sender.wait(60), taker.returncode) == (0, 0), taken
        assert int(taken) > 1000
        print(f"measured: {received} pings and {int(taken) * 8} bytes of TCP, none lost")


def later_version(directory: Path) -> Path:
    """A tree to install from, whose program differs in one line."""
    tree = directory / "new"
    tree.mkdir()
    for name in ("install.sh", "wggw.service", "wggw.py"):
        shutil.copy(TREE / name, tree / name)
    with (tree / "wggw.py").open("a") as program:
        program.write("# a later version\n")
    return tree


def test_restart_kill_and_upgrade_lose_nothing(tmp_path: Path) -> None:
    tree = later_version(tmp_path)
    with nothing_is_lost():
        first = main_pid()
        sh("systemctl", "restart", "wggw")
        second = main_pid()
        os.kill(second, signal.SIGKILL)
        wait_for(lambda: is_active() and main_pid() not in (0, second), 30, "it is up again")
        third = main_pid()
        done = install("--upgrade", tree=tree)
        assert done.returncode == 0, done.stderr
        assert len({first, second, third, main_pid()}) == 4
    assert PROGRAM.read_text().endswith("# a later version\n")


def broken(program: str, code: int) -> str:
    """The program, which ends with this exit code instead of serving."""
    service = "    def run(self) -> None:\n"
    assert program.count(service) == 1
    return program.replace(service, f"{service}        sys.exit({code})\n")


def test_failed_upgrade_brings_the_former_version_back(tmp_path: Path) -> None:
    before = PROGRAM.read_text()
    launcher = LAUNCHER.read_text()
    tree = tmp_path / "bad"
    tree.mkdir()
    for name in ("install.sh", "wggw.service", "wggw.py"):
        shutil.copy(TREE / name, tree / name)
    (tree / "wggw.py").write_text(broken(before, 2))
    done = install("--upgrade", tree=tree)
    assert done.returncode == 1, done.stdout
    assert "the service does not come up" in done.stderr
    assert (PROGRAM.read_text(), LAUNCHER.read_text()) == (before, launcher)
    wait_for(is_active, 30, "the former version runs")
    assert not [path for path in remains() if path.endswith(".before")]
    assert compiled() == [IS_CURRENT]
    assert reaches("client1", "203.0.113.2")


def test_upgrade_mends_a_service_that_was_restarted_again_and_again() -> None:
    PROGRAM.write_text(broken(PROGRAM.read_text(), 1))
    sh("systemctl", "restart", "--no-block", "wggw")
    restarts = ("systemctl", "show", "-P", "NRestarts", "wggw")
    wait_for(lambda: int(sh(*restarts)) >= 4, 60, "it was restarted four times")
    done = install("--upgrade")
    assert done.returncode == 0, done.stderr
    assert is_active() and PROGRAM.read_text() == (TREE / "wggw.py").read_text()


# --- the service ----------------------------------------------------------------------------------


def test_hung_service_is_restarted(tmp_path: Path) -> None:
    drop_in = Path(f"{UNIT}.d/test.conf")
    drop_in.parent.mkdir(exist_ok=True)
    drop_in.write_text("[Service]\nWatchdogSec=12\nTimeoutAbortSec=1\n")
    sh("systemctl", "daemon-reload")
    sh("systemctl", "restart", "wggw")
    hung = main_pid()
    time.sleep(15)
    assert main_pid() == hung, "it was restarted although it answers"
    os.kill(hung, signal.SIGSTOP)
    wait_for(lambda: is_active() and main_pid() not in (0, hung), 60, "a new process")
    drop_in.unlink()
    sh("systemctl", "daemon-reload")
    assert reaches("client1", "203.0.113.2")


def test_reload_brings_keys_and_packet_filter_in_line() -> None:
    text = ENV.read_text()
    ENV.write_text(text.replace("192.0.2.0/24", "203.0.113.0/24"))
    pid = main_pid()
    sh("systemctl", "reload", "wggw")
    wait_for(lambda: api("GET", "/api/v1/server/status", space="internet"))
    assert api("GET", "/api/v1/server/status") is None
    ENV.write_text(text)
    sh("systemctl", "reload", "wggw")
    assert api("GET", "/api/v1/server/status")["status"] == "healthy"
    assert main_pid() == pid


DATABASE = Path("/var/lib/wggw/wireguard.db")


@pytest.mark.parametrize(
    ("file", "bad", "wanted"),
    [
        (ENV, b"SAMPLE_INTERVAL=never\n", "SAMPLE_INTERVAL: 'never' is not seconds"),
        (DATABASE, b"damaged", str(DATABASE)),
    ],
    ids=["settings", "database"],
)
def test_failing_start_says_why_in_the_status_and_is_not_tried_again(
    file: Path, bad: bytes, wanted: str
) -> None:
    sh("systemctl", "stop", "wggw")
    good = file.read_bytes()
    file.write_bytes(bad + good)
    try:
        run("systemctl", "start", "wggw")
        wait_for(lambda: wanted in status_text(), 60, wanted)
        failed = ("systemctl", "is-failed", "wggw")
        wait_for(lambda: run(*failed).stdout == "failed\n", 60, "it is not tried again")
        assert reaches("client1", "203.0.113.2"), "the tunnel does not need the service"
    finally:
        file.write_bytes(good)
    sh("systemctl", "restart", "wggw")


def test_mutual_tls_and_one_address_are_in_no_command_s_way(tmp_path: Path) -> None:
    """Commands on this host, an upgrade included, need neither certificate nor address."""
    openssl = ("openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    authority, key, client = (tmp_path / name for name in ("ca.pem", "ca.key", "client.pem"))
    sh(*openssl, "-x509", *f"-keyout {key} -out {authority} -subj /CN=backends".split())
    signed = f"-keyout {client}.key -out {client} -subj /CN=backend -CA {authority} -CAkey {key}"
    sh(*openssl, "-x509", *signed.split())
    trusted = ENV.parent / "backends.pem"
    shutil.copy(authority, trusted)
    trusted.chmod(0o644)
    text = ENV.read_text()
    try:
        done = install("--set", f"TLS_CLIENT_CA={trusted}", "--set", "API_HOST=198.18.0.1")
        assert done.returncode == 0, done.stderr
        url = "https://198.18.0.1:8000/healthz"
        assert not in_ns("backend", "curl", "-sk", "--max-time", "5", url).stdout
        given = ("--cert", str(client), "--key", f"{client}.key")
        assert in_ns("backend", "curl", "-sk", *given, url).stdout == '{"status":"alive"}'
        for command in ("status", "peers", "doctor", "net show"):
            shown = run("wggw", *command.split(), "--env-file", str(ENV))
            assert shown.returncode == 0, f"{command}: {shown.stdout}{shown.stderr}"
        done = install("--upgrade", tree=later_version(tmp_path))
        assert done.returncode == 0, done.stderr
        assert PROGRAM.read_text().endswith("# a later version\n")
    finally:
        ENV.write_text(text)
        trusted.unlink()
    done = install("--upgrade")
    assert done.returncode == 0, done.stderr
    assert api("GET", "/api/v1/server/status")["status"] == "healthy"


def test_ufw_has_our_rules_and_keeps_the_others() -> None:
    if not UFW:
        assert "inactive" in sh("ufw", "status")
        return
    shown = sh("ufw", "show", "added")
    assert "ufw allow 51820/udp comment 'wggw'" in shown
    assert "ufw route allow in on wg0 comment 'wggw'" in shown
    assert "ufw allow 22/tcp\n" in shown


def test_blocked_forwarding_is_told() -> None:
    show = ("wggw", "net", "show", "--env-file", str(ENV))
    assert "WRONG" not in sh(*show)
    sh(
        "nft",
        "add table ip other; "
        "add chain ip other f { type filter hook forward priority 5; policy drop; }",
    )
    assert not pings("client1", "203.0.113.2", 2)
    done = run(*show)
    assert done.returncode == 1
    assert "packets from wg0: dropped by table ip other, chain f" in done.stdout
    sh("nft", "delete", "table", "ip", "other")
    assert pings("client1", "203.0.113.2")


def documented(heading: str, first: str) -> str:
    """The block of docs/DEPLOYMENT.md below a heading that begins with these words."""
    text = (TREE / "docs/DEPLOYMENT.md").read_text().split(f"\n## {heading}\n", 1)[1]
    return next(
        b for b in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S) if b.startswith(first)
    )


def test_firewalld_is_told_and_its_documented_commands_suffice() -> None:
    if UFW:
        return  # one of them is enough for a host
    show = ("wggw", "net", "show", "--env-file", str(ENV))
    sh("systemctl", "start", "firewalld")
    try:
        assert run("firewall-cmd", "--state").stdout == "running\n"
        assert not pings("client1", "203.0.113.2", 2)
        assert api("GET", "/api/v1/server/status") is None
        before = run(*show)
        for part in ("packets from wg0", "UDP 51820, TCP 8000"):
            told = f"{part}: may be dropped by table inet firewalld"
            assert told in before.stdout, before.stdout
        sh("bash", "-ec", documented("What the service may do", "firewall-cmd"))
        assert "WRONG" not in (after := run(*show)).stdout, after.stdout
        assert api("GET", "/api/v1/server/status")["status"] == "healthy"
        for address in ("203.0.113.2", "2001:db8:3::2"):
            assert reaches("client1", address)
        assert "WRONG" not in (doctor := run("wggw", "doctor", "--env-file", str(ENV))).stdout, (
            doctor
        )
        assert sh("wggw", "net", "up", "--env-file", str(ENV)) == ""
    finally:
        sh("systemctl", "stop", "firewalld")
    assert not pings("client1", Story.peers["client2"]["assigned_ip"], 2)


# --- the end --------------------------------------------------------------------------------------


def test_doctor_finds_nothing_wrong_and_then_what_is() -> None:
    doctor = ("wggw", "doctor", "--env-file", str(ENV))
    text = sh(*doctor)
    print(text)
    for part in (
        "wg0: up",
        "NAT: 10.0.1.0/24 is masqueraded",
        "database:",
        "API: answers: healthy",
    ):
        assert part in text, text
    sh("systemctl", "stop", "wggw")
    sh(*["nft", "delete", "table", "inet", "wggw"])
    Path("/proc/sys/net/ipv4/ip_forward").write_text("0")
    done = run(*doctor)
    sh("systemctl", "start", "wggw")
    assert done.returncode == 1
    for part in ("net.ipv4.ip_forward is off", "table inet wggw is missing", "WRONG  API:"):
        assert part in done.stdout, done.stdout
    assert run(*doctor).returncode == 0


def test_uninstall_leaves_settings_and_data_and_purge_not_even_those() -> None:
    settings = ENV.read_text()
    # No reason to leave anything behind, nor to touch what is somebody else's.
    ENV.write_text(settings + "WG_INTERFACE=wg7\nSAMPLE_INTERVAL=never\n")
    for line in ("link add wg7 type wireguard", "link set wg7 up"):
        sh("ip", *line.split())
    key = sh("wg", "genkey")
    subprocess.run(
        ["wg", "set", "wg7", "private-key", "/dev/stdin"], input=key, text=True, check=True
    )
    foreign = sh("ip", "-d", "link", "show", "wg7")
    done = install("--uninstall")
    ENV.write_text(settings)
    assert done.returncode == 0, done.stderr
    assert f"only interfaces with the mark 'wggw {ENV}' are removed" in done.stderr, done.stderr
    assert sh("ip", "-d", "link", "show", "wg7") == foreign
    assert sh("wg", "show", "wg7", "private-key") == key
    sh("ip", "link", "delete", "wg7")
    assert "table inet wggw" not in sh("nft", "list", "ruleset")
    assert "wggw" not in sh("ufw", "show", "added")
    assert run("getent", "passwd", "wggw").returncode == 2
    assert run("ip", "link", "show", "wg0").returncode == 1
    left = remains() - Story.clean
    assert left and all(path.startswith(("/etc/wggw", "/var/lib/wggw")) for path in left), left
    again = install("--json")
    assert again.returncode == 0, again.stderr
    result = json.loads(again.stdout)
    assert result["api_key"] is None
    assert {**result, "api_key": Story.result["api_key"]} == Story.result
    known = api("GET", f"/api/v1/configurations/{path_key(Story.peers['client1']['public_key'])}")
    assert known["assigned_ip"] == Story.peers["client1"]["assigned_ip"]
    done = install("--uninstall", "--purge")
    assert done.returncode == 0, done.stderr
    assert remains() == Story.clean
    if UFW:
        assert "ufw allow 22/tcp" in sh("ufw", "show", "added")
