"""Network namespaces and WireGuard clients for the tests of the real level.

Names are unique, addresses are those set aside for documentation, and everything that a test made
is gone when its `with` ends, however it ended: every process in its namespaces is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import pty
import re
import secrets
import select
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import wait_for

SOCKETS = Path("/var/run/wireguard")
CLONE_NEWNET = 0x40000000


def need(*programs: str, tun: bool = False) -> None:
    """Skip the test where something that it cannot do without is missing."""
    if os.geteuid() != 0:
        pytest.skip("needs root: it makes network namespaces and interfaces")
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"needs the program {program}")
    if tun and not os.path.exists("/dev/net/tun"):
        pytest.skip("needs /dev/net/tun")
    if not namespaces_can_be_made():
        pytest.skip("needs the right to make network namespaces")


@functools.cache
def namespaces_can_be_made() -> bool:
    return subprocess.run(["unshare", "--net", "true"], check=False).returncode == 0


def unique() -> str:
    """A name that fits into an interface's 15 characters and is nobody else's."""
    return f"wt{secrets.token_hex(5)}"


def output(*command: str, given: str | None = None) -> str:
    done = subprocess.run(
        command, input=given, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
    return done.stdout


def setns(path: str) -> None:
    """Put this thread, and what it starts from now on, into a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(descriptor, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns", path)
    finally:
        os.close(descriptor)


class Namespace:
    """A network namespace with its loopback up; a context manager that removes it."""

    def __init__(self) -> None:
        self.name = unique()

    def __enter__(self) -> Namespace:
        output("ip", "netns", "add", self.name)
        self.ip("link set lo up")
        return self

    def __exit__(self, *_: object) -> None:
        wait_for(self._empty, what=f"no process left in {self.name}")
        output("ip", "netns", "delete", self.name)

    def _empty(self) -> bool:
        pids = [int(pid) for pid in output("ip", "netns", "pids", self.name).split()]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not pids

    def ip(self, *commands: str) -> None:
        """Run lines of ip(8) in here."""
        output("ip", "-n", self.name, "-batch", "-", given="\n".join(commands) + "\n")

    def run(self, *command: str) -> str:
        return output("ip", "netns", "exec", self.name, *command)

    def start(self, *command: str, **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["ip", "netns", "exec", self.name, *command], **options)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """This thread in here: its sockets, its threads and the processes that it starts."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        setns(f"/run/netns/{self.name}")
        try:
            yield
        finally:
            setns(f"/proc/self/fd/{home}")
            os.close(home)

    def socket(self, family: int) -> socket.socket:
        """A UDP socket that stays in here, whoever uses it."""
        with self.inside():
            return socket.socket(family, socket.SOCK_DGRAM)


# --- WireGuard without the gateway ----------------------------------------------------------------


@functools.cache
def kernel_has_wireguard() -> bool:
    with Namespace() as probe:
        made = subprocess.run(
            ["ip", "-n", probe.name, "link", "add", "wg0", "type", "wireguard"],
            capture_output=True,
            check=False,
        )
        return made.returncode == 0


def daemon_pid(name: str) -> int | None:
    """The process that listens on a userspace WireGuard's socket, None when there is none."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(str(SOCKETS / f"{name}.sock"))
        except OSError:
            return None
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int(struct.unpack("3i", credentials)[0])


def end_daemon(name: str) -> None:
    """KILL an interface's userspace WireGuard; wait until process and interface are gone."""
    pid = daemon_pid(name)
    assert pid is not None, f"{name} has no userspace WireGuard"
    process = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(process, signal.SIGKILL)
        # Readable when all threads have ended: until then the interface may still be there.
        assert select.select([process], [], [], 30)[0], f"{pid} does not end"
    finally:
        os.close(process)


def freeze(pid: int) -> None:
    """STOP a process; wait until each of its threads has stopped."""
    os.kill(pid, signal.SIGSTOP)

    def stopped() -> bool:
        states = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
        return all(state.rpartition(")")[2].split()[0] == "T" for state in states)

    wait_for(stopped, what=f"{pid} to stop")


def forget_socket(name: str) -> None:
    """Remove the socket that a killed wireguard-go left."""
    (SOCKETS / f"{name}.sock").unlink(missing_ok=True)


def make_wireguard(namespace: Namespace, name: str) -> None:
    """A WireGuard interface, by the kernel where it can, else by wireguard-go."""
    if kernel_has_wireguard():
        namespace.ip(f"link add {name} type wireguard")
        return
    need("wireguard-go", tun=True)
    start_daemon(namespace, name)


def start_daemon(namespace: Namespace, name: str) -> None:
    with namespace.inside():
        subprocess.Popen(
            ["wireguard-go", "-f", name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    wait_for(lambda: daemon_pid(name), what=f"wireguard-go for {name}")


class Tunnel:
    """A client's WireGuard interface, set up from the gateway's answer with `wg` and `ip`."""

    def __init__(self, namespace: Namespace, routes: tuple[str, ...]) -> None:
        self.namespace = namespace
        self.name = unique()
        self.private_key = output("wg", "genkey").strip()
        self.public_key = output("wg", "pubkey", given=self.private_key).strip()
        self._routes = routes
        self._text = ""

    def connect(self, answer: dict[str, Any], preshared_key: str | None = None) -> None:
        """Make the interface that the answer to create describes."""
        psk = f"PresharedKey = {preshared_key}\n" if preshared_key else ""
        self._text = (
            f"[Interface]\nPrivateKey = {self.private_key}\n"
            f"[Peer]\nPublicKey = {answer['server_public_key']}\n{psk}"
            f"Endpoint = {answer['endpoint']}\n"
            f"AllowedIPs = {', '.join(answer['allowed_ips'])}\n"
            f"PersistentKeepalive = {answer['persistent_keepalive']}\n"
        )
        addresses = [answer.get("assigned_ip"), answer.get("assigned_ipv6")]
        self._make([address for address in addresses if address], answer["mtu"])

    def connect_by_file(self, wg_quick: str) -> None:
        """Make the interface that a wg-quick(8) file describes."""
        lines = wg_quick.replace("REPLACE_WITH_THE_CLIENT_PRIVATE_KEY", self.private_key)
        settings = dict(re.findall(r"^(Address|MTU|DNS) = (.+)$", lines, re.MULTILINE))
        self._text = re.sub(r"^(Address|MTU|DNS) = .+\n", "", lines, flags=re.MULTILINE)
        self._make(settings["Address"].split(", "), int(settings["MTU"]))

    def _make(self, addresses: list[str], mtu: int) -> None:
        make_wireguard(self.namespace, self.name)
        self.reconnect()
        self.namespace.ip(
            *(f"address add {address} dev {self.name}" for address in addresses),
            f"link set {self.name} mtu {mtu} up",
            *(f"route add {route} dev {self.name}" for route in self._routes),
        )

    def reconnect(self) -> None:
        """Forget the session, as a client does that is switched off and on again."""
        with self.namespace.inside():
            output("wg", "setconf", self.name, "/dev/stdin", given=self._text)

    def transfer(self) -> tuple[int, int]:
        """Bytes that this interface counts as (sent, received)."""
        with self.namespace.inside():
            _, received, sent = output("wg", "show", self.name, "transfer").split()
        return int(sent), int(received)

    def ping(self, *targets: str, count: int = 3, wait: int = 10) -> dict[str, int]:
        """How many of `count` pings, sent at once, each target answered within `wait` seconds."""
        return {target: self._ping(target, count, wait) for target in targets}

    def _ping(self, target: str, count: int, wait: int) -> int:
        # ping(8) waits `-W` for a first answer, and after that an interval for the others.
        times = ["-l", str(count), "-c", str(count), "-W", str(wait), "-i", str(wait)]
        with self.namespace.inside():
            done = subprocess.run(
                ["ping", "-n", "-q", *times, target],
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
            )
        match = re.search(r"(\d+) received", done.stdout)
        assert match, done.stdout + done.stderr
        return int(match[1])


# --- traffic to watch -----------------------------------------------------------------------------


class Stream:
    """UDP datagrams, each with the time it was sent; counted where they arrive.

    The clock is the machine's, so that "sent after the answer was there" has one meaning on both
    sides and no datagram under way can blur it.
    """

    def __init__(
        self,
        source: Namespace,
        target: Namespace,
        address: str,
        sender: str | None = None,
        interval: float = 0.002,
    ) -> None:
        """From any address of `source`, or from `sender`, to an address of `target`.

        `interval`: seconds between two datagrams.
        """
        self._interval = interval
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.description = f"to {address}"
        self.sent = 0
        self.arrived: list[float] = []  # time.monotonic() of sending
        self._receiver = target.socket(family)
        self._receiver.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", 0))
        self._sender = source.socket(family)
        if sender is not None:
            self._sender.bind((sender, 0))
        self._to = (address, self._receiver.getsockname()[1])
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=t, daemon=True) for t in (self._send, self._receive)
        ]

    def __enter__(self) -> Stream:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        self._sender.close()
        self._receiver.close()

    def _send(self) -> None:
        while not self._ended.wait(self._interval):
            # Refused, unreachable, no key: a datagram that does not arrive is what is counted.
            with contextlib.suppress(OSError):
                self._sender.sendto(struct.pack("d", time.monotonic()), self._to)
            self.sent += 1

    def _receive(self) -> None:
        self._receiver.settimeout(0.05)
        while not self._ended.is_set():
            with contextlib.suppress(OSError):
                self.arrived.append(struct.unpack("d", self._receiver.recv(64))[0])

    def sent_and_arrived_after(self, moment: float) -> int:
        return sum(sent > moment for sent in tuple(self.arrived))

    def flows(self, seconds: float = 30.0) -> None:
        """Wait until datagrams that are sent from now on arrive."""
        now = time.monotonic()
        wait_for(lambda: self.sent_and_arrived_after(now) > 10, seconds, f"traffic {self}")

    def send_more(self, count: int = 150) -> None:
        """Wait until this many more were sent."""
        until = self.sent + count
        wait_for(lambda: self.sent >= until, what=f"{count} datagrams sent {self}")

    def __repr__(self) -> str:
        return self.description


class RunningPing:
    """ping(8) every 20 ms until stop(), which says whether one was lost in between.

    It writes to a terminal, because only there it writes line by line.
    """

    def __init__(self, namespace: Namespace, target: str) -> None:
        self._terminal, its_end = pty.openpty()
        with namespace.inside():
            self._process = subprocess.Popen(
                ["ping", "-n", "-i", "0.02", target], stdin=its_end, stdout=its_end, stderr=its_end
            )
        os.close(its_end)
        self._output = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> RunningPing:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        os.close(self._terminal)

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # EIO: its end of the terminal is closed
            while data := os.read(self._terminal, 65536):
                self._output += data

    def answered(self) -> list[int]:
        return [int(number) for number in re.findall(rb"icmp_seq=(\d+) ttl", self._output)]

    def go_on(self, count: int = 20) -> None:
        """Wait for this many more answers."""
        until = len(self.answered()) + count
        wait_for(lambda: len(self.answered()) >= until, what=f"{count} more answers to ping")

    def stop(self) -> list[int]:
        """The numbers of the lost pings, after 20 more answers."""
        self.go_on()
        self._process.send_signal(signal.SIGINT)
        self._process.wait(30)
        self._reader.join()
        answered = self.answered()
        assert len(set(answered)) == len(answered)
        # One more may be on its way when ping is stopped: that one is not lost.
        return sorted(set(range(1, answered[-1] + 1)) - set(answered))


# --- the topology ---------------------------------------------------------------------------------


class Topology:
    """Two clients, the gateway, and a host that is reached only through the gateway.

         client 1                       gateway                         host
        192.0.2.2/30 ---- 192.0.2.1/30 |       |
      2001:db8:1::2/64  2001:db8:1::1  |       |
                                       |       | 203.0.113.1/24 ---- 203.0.113.2/24
         client 2                      |       | 2001:db8:3::1/64    2001:db8:3::2/64
        192.0.2.6/30 ---- 192.0.2.5/30 |       |
      2001:db8:2::2/64  2001:db8:2::1  |       |
                                       lo: 198.51.100.1, the address in WG_ENDPOINT
                                       wg: 10.77.0.1/24, fd77::1/64, made by the gateway

    Each line is a veth pair. Clients have a route to 198.51.100.1 and none to the host: that, and
    the tunnel's own subnets, they reach through WireGuard only. The host's default route is the
    gateway, which forwards.
    """

    ENDPOINT = "198.51.100.1"
    SUBNETS = ("10.77.0.0/24", "fd77::/64")
    GATEWAY = ("10.77.0.1", "fd77::1")
    HOST = ("203.0.113.2", "2001:db8:3::2")
    ROUTES = (*SUBNETS, "203.0.113.0/24", "2001:db8:3::/64")

    def __init__(self, clients: list[Namespace], gateway: Namespace, host: Namespace) -> None:
        self.clients, self.gateway, self.host = clients, gateway, host
        self.interface = unique()
        self.tunnels: list[Tunnel] = []
        self._build()

    def _build(self) -> None:
        """The gateway's ends first: links come in pairs."""
        here, there = [f"address add {self.ENDPOINT}/32 dev lo"], {}
        for number, client in enumerate(self.clients, 1):
            near, far = f"192.0.2.{4 * number - 3}", f"192.0.2.{4 * number - 2}"
            v6 = f"2001:db8:{number}::"
            here += self._pair(client, f"client{number}", f"{near}/30", f"{v6}1/64")
            there[client] = self._addresses("uplink", f"{far}/30", f"{v6}2/64")
            there[client].append(f"route add {self.ENDPOINT} via {near}")
        here += self._pair(self.host, "host", "203.0.113.1/24", "2001:db8:3::1/64")
        there[self.host] = [
            *self._addresses("uplink", "203.0.113.2/24", "2001:db8:3::2/64"),
            "route add default via 203.0.113.1",
            "route add default via 2001:db8:3::1",
        ]
        self.gateway.ip(*here)
        for space, commands in there.items():
            space.ip(*commands)
        with self.gateway.inside():
            Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
            Path("/proc/sys/net/ipv6/conf/all/forwarding").write_text("1")

    def _pair(self, other: Namespace, here: str, v4: str, v6: str) -> list[str]:
        """A veth pair from the gateway's `here`, which gets addresses, to the other's uplink."""
        link = f"link add {here} type veth peer name uplink netns {other.name}"
        return [link, *self._addresses(here, v4, v6)]

    def _addresses(self, device: str, v4: str, v6: str) -> list[str]:
        return [
            f"address add {v4} dev {device}",
            f"address add {v6} dev {device} nodad",
            f"link set {device} up",
        ]

    def tunnel(self, client: int) -> Tunnel:
        """A WireGuard client, not yet connected, in the namespace of client 0 or 1."""
        tunnel = Tunnel(self.clients[client], self.ROUTES)
        self.tunnels.append(tunnel)
        return tunnel

    @contextlib.contextmanager
    def streams(
        self, tunnel: Tunnel, answer: dict[str, Any], interval: float = 0.002
    ) -> Iterator[list[Stream]]:
        """Traffic between client and host: both directions, both families."""
        pairs = [
            *((tunnel.namespace, self.host, address) for address in self.HOST),
            *(
                (self.host, tunnel.namespace, answer[field])
                for field in ("assigned_ip", "assigned_ipv6")
            ),
        ]
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(Stream(*pair, interval=interval)) for pair in pairs]

    def forget(self) -> None:
        for name in (self.interface, *(tunnel.name for tunnel in self.tunnels)):
            forget_socket(name)


@contextlib.contextmanager
def topology() -> Iterator[Topology]:
    with contextlib.ExitStack() as stack:
        first, second, gateway, host = (stack.enter_context(Namespace()) for _ in range(4))
        made = Topology([first, second], gateway, host)
        try:
            yield made
        finally:
            stack.close()
            made.forget()
