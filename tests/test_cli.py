"""status, peers and top as an operator sees them: in a pseudo-terminal, in pipes, and refused."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import pty
import re
import select
import shlex
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import (
    PROGRAM,
    ROOT,
    GatewayProcess,
    a_key,
    begin,
    finish,
    run_wggw,
    running,
    some,
    wait_for,
)

import wggw


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with running(tmp_path_factory.mktemp("cli"), SAMPLE_INTERVAL="0.2") as gateway:
        client = gateway.client()
        for number in range(4):
            fields = {"quota_bytes": 5 * 10**9, "label": "a laptop"} if number == 1 else {}
            assert client.create(a_key(number), protocol="dual", **fields).status == 200
        client.status(a_key(2), "suspended")
        yield gateway


def command(served: GatewayProcess, *arguments: str) -> tuple[list[str], dict[str, str]]:
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", **served.settings}
    return [*PROGRAM, *arguments], environment


class Terminal:
    """A command in a pseudo-terminal of a given size."""

    def __init__(
        self, served: GatewayProcess, columns: int, *arguments: str, **variables: str
    ) -> None:
        line, environment = command(served, *arguments)
        if "ANSWERS" in variables:
            line = [*PROGRAM[:3], CANNED, str(ROOT), *arguments]
        self._handle, its_end = pty.openpty()
        fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.modes = termios.tcgetattr(its_end)
        environment |= {"TERM": "xterm", **variables}
        self.process = begin(line, served.directory, environment, its_end, its_end, its_end)
        self._its_end = its_end
        self._output = b""

    def text(self) -> str:
        while select.select([self._handle], [], [], 0.05)[0]:
            with contextlib.suppress(OSError):
                self._output += os.read(self._handle, 65536)
        return self._output.decode("utf-8", "ignore")

    def press(self, key: str) -> None:
        os.write(self._handle, key.encode())

    def end(self) -> int:
        wait_for(lambda: self.text() and self.process.poll() is not None, 60, "the command's end")
        return self.process.wait()

    def modes_now(self) -> list[Any]:
        return termios.tcgetattr(self._its_end)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._handle)
        os.close(self._its_end)


@contextlib.contextmanager
def terminal(
    served: GatewayProcess, columns: int, *arguments: str, **variables: str
) -> Iterator[Terminal]:
    opened = Terminal(served, columns, *arguments, **variables)
    try:
        yield opened
    finally:
        opened.close()


def visible(text: str) -> list[str]:
    """Lines without escape sequences."""
    return [line.rstrip("\r") for line in re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", text).split("\n")]


# --- screens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [40, 80, 140])
def test_status_is_one_screen(served: GatewayProcess, columns: int) -> None:
    with terminal(served, columns, "status") as screen:
        assert screen.end() == 0
        text = screen.text()
    lines = visible(text)
    assert len(lines) <= 24 and max(map(len, lines)) <= columns
    assert lines[0].startswith("healthy: wggw ")
    found = {line.split("  ")[0] for line in lines}
    assert {"peers", "traffic", "snapshot", "journal", "certificate", "host"} <= found
    assert "0 online, 4 in all" in text
    assert re.search(r"wg0 +ipv4 +4 +253 ", text) or columns == 40
    assert "\x1b[32m" in text


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colour_where_none_is_wanted(served: GatewayProcess, variables: dict[str, str]) -> None:
    with terminal(served, 80, "status", **variables) as screen:
        assert screen.end() == 0
        assert "\x1b" not in screen.text()


def test_a_terminal_that_has_no_ellipsis_gets_another_character(served: GatewayProcess) -> None:
    with terminal(served, 40, "peers", PYTHONIOENCODING="latin-1") as screen:
        assert screen.end() == 0
        assert "KEY" in screen.text() and "?" in screen.text()


@pytest.mark.parametrize("columns", [80, 140])
def test_peers_fit_the_terminal(served: GatewayProcess, columns: int) -> None:
    with terminal(served, columns, "peers") as screen:
        assert screen.end() == 0
        lines = visible(screen.text())
    assert max(map(len, lines)) <= columns
    assert lines[0].split()[:6] == ["KEY", "LABEL", "STATE", "QUOTA", "IPV4", "IPV6"]
    states = ["active", "active", "suspended", "active"]
    assert [re.findall("active|suspended", line)[0] for line in lines[1:5]] == states
    for told in ("a laptop", "0% of 5 GB", "10.0.1.3 ", "fd42:4242:1::3"):
        assert told in lines[2]
    assert ("INTERFACE" in lines[0]) == (columns == 140)


def test_top_leaves_the_terminal_as_it_was_when_it_is_ended(served: GatewayProcess) -> None:
    with terminal(served, 80, "top") as screen:
        wait_for(lambda: screen.text().count("\x1b[H"), 60, "the screen")
        screen.process.terminate()
        assert screen.end() == 128 + signal.SIGTERM
        assert screen.text().endswith("\x1b[?25h\x1b[?1049l")
        assert screen.modes_now() == screen.modes


@pytest.mark.parametrize("columns", [80, 140])
def test_top_refreshes_until_q_and_leaves_the_terminal_as_it_was(
    served: GatewayProcess, columns: int
) -> None:
    with terminal(served, columns, "top", "--interval", "0.3") as screen:
        wait_for(lambda: screen.text().count("\x1b[H") >= 3, 60, "three refreshes")
        last = visible(screen.text().split("\x1b[H")[-2])
        assert last[0].startswith("healthy: 0 online of 4") and "q quits" in last[0]
        assert re.match(r" in +(0 B/s ▁|–)", last[1]) and re.match(r"out +(0 B/s ▁|–)", last[2])
        assert max(map(len, last)) <= columns
        screen.press("x")
        screen.press("q")
        assert screen.end() == 0
        assert screen.text().endswith("\x1b[?25h\x1b[?1049l")
        assert screen.modes_now() == screen.modes


def test_top_says_what_is_wrong_and_q_works_while_a_request_hangs(
    served: GatewayProcess, tmp_path: Path
) -> None:
    path = tmp_path / "silent.db"
    with terminal(served, 80, "top", "--interval", "0.1", DB_PATH=str(path)) as screen:
        wait_for(lambda: "no gateway runs here" in screen.text(), 60, "the hint")
        with socket.socket(socket.AF_UNIX) as silent:
            silent.bind(f"{path}.sock")
            silent.listen()
            silent.settimeout(60)
            with silent.accept()[0] as connection:
                connection.recv(1)  # it has begun to talk, and waits
                screen.press("q")
                assert screen.end() == 0
        assert screen.text().endswith("\x1b[?25h\x1b[?1049l")


def test_top_refuses_to_run_without_a_terminal(served: GatewayProcess) -> None:
    done = served.command("top")
    assert done.returncode == 2 and "needs a terminal" in done.stderr


# --- one peer -------------------------------------------------------------------------------------


def public_key_of(file: str) -> str:
    """Of the client whose file it is."""
    private = re.search(r"(?m)^PrivateKey = (.{43}=)$", file)
    assert private
    return wggw.encode_key(wggw.x25519_public(wggw.decode_key(private[1])))


Inside = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def inside(
    served: GatewayProcess, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Inside:
    """Commands in this process, which start sooner."""
    monkeypatch.setattr(os, "environ", command(served)[1])
    monkeypatch.chdir(served.directory)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        code = wggw.main(arguments)
        return subprocess.CompletedProcess(arguments, code, *capfd.readouterr())

    return run


def test_a_peer_is_added_found_by_its_label_changed_and_deleted(
    served: GatewayProcess, inside: Inside
) -> None:
    client = served.client()
    made = inside("peer", "add", "Bob's phone", "--set", "quota_bytes=5", "--set", "dns=d2")
    assert (made.returncode, "GATEWAY" in made.stderr) == (0, True)
    key = public_key_of(made.stdout)
    row = client.get(key).json
    assert (row["label"], row["quota_bytes"], row["dns"]) == ("Bob's phone", 5, "d2")
    assert row["assigned_ip"] in made.stdout and row["assigned_ipv6"] in made.stdout
    again = inside("peer", "add", "Bob's phone")
    assert (again.returncode, "exists already" in again.stderr) == (1, True)
    for action, status in (("suspend", "suspended"), ("activate", "active")):
        done = inside("peer", action, "Bob's phone")
        assert (done.stdout, done.returncode) == (f"Bob's phone: {status}\n", 0)
        assert client.get(key).json["status"] == status
    assert inside("peer", "reset-quota", key).returncode == 0
    shown = inside("peer", "show", key.replace("/", "_"))
    assert re.search(r"(?m)^label +Bob's phone$", shown.stdout)
    turned = inside("peer", "rotate", "Bob's phone")
    new = public_key_of(turned.stdout)
    assert (client.get(key).status, client.get(new).json["label"]) == (404, "Bob's phone")
    client.create(a_key("twin"), label="Bob's phone")
    both = inside("peer", "delete", "Bob's phone")
    assert (both.returncode, "several peers" in both.stderr) == (1, True)
    for one in (new, a_key("twin")):
        assert inside("peer", "delete", one).returncode == 0
    gone = inside("peer", "show", "Bob's phone")
    assert (gone.returncode, "no peer has this label" in gone.stderr) == (1, True)


@pytest.mark.parametrize("wrong", ["colour=red", "label=x", "quota_bytes=-1", "dns"])
def test_a_peer_with_a_wrong_field_is_not_added(inside: Inside, wrong: str) -> None:
    done = inside("peer", "add", "wrong", "--set", wrong)
    assert (done.returncode, done.stdout) == (1, "")
    assert wrong.partition("=")[0] in done.stderr


@pytest.mark.parametrize("stdout", ["full", "reader gone", "closed"])
def test_a_peer_whose_file_could_not_be_written_is_deleted(
    served: GatewayProcess, stdout: str
) -> None:
    line, environment = command(served, "peer", "add", "lost")
    if stdout == "closed":
        line = ["sh", "-c", 'exec "$@" >&-', "sh", *line]
    reading, writing = os.pipe()
    os.close(reading)
    with open("/dev/full", "wb") as device:
        place = device if stdout == "full" else writing
        done = finish(line, served.directory, place, **environment)
    os.close(writing)
    assert done.returncode == 1 and "the peer is deleted" in done.stderr
    listed = served.client().send("GET", "/api/v1/configurations?label=lost").json
    assert listed["configurations"] == []


def test_a_peer_whose_gateway_ends_before_its_file_is_there_is_named() -> None:
    """The gateway ends after the create: neither the file nor the peer's deletion is possible."""

    class Ending(wggw.ApiClient):
        def call(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
            if method == "POST":
                self.created = json.loads(body)["public_key"]
                return 200, b"{}"
            raise wggw.StartError("no gateway runs here")

    client = Ending("wireguard.db")
    with pytest.raises(wggw.StartError) as raised:
        wggw.print_new_file(client, {"label": "laptop"})
    assert str(raised.value) == (
        "no gateway runs here. Without it nobody has the key: "
        f"run `wggw peer delete {client.created}`"
    )


@pytest.mark.parametrize("label", ["電話" * 30, "e\u0301" * 80, "plain"])
def test_wide_and_combining_characters_keep_tables_in_line(label: str) -> None:
    """The columns of a terminal are counted here as by wcwidth(3), for these characters."""

    def columns(text: str) -> int:
        return sum(0 if c == "\u0301" else 2 if c in "電話" else 1 for c in text)

    table: tuple[wggw.Column, ...] = (("A", "<", str), ("B", ">", str), ("C", "<", lambda _: "|"))
    lines = wggw.show_table(table, [label, "x"], wggw.Screen(0, 0, False))
    assert len({columns(line) for line in lines}) == 1, lines
    for width in (1, 2, 7, 40):
        cut = wggw.shorten(label, width)
        assert columns(cut) <= width and (cut == label) == (columns(label) <= width)
        assert columns(cut) >= min(columns(label), width - 1) // 2  # combining ones may go early


def test_peers_are_searched_and_limited(inside: Inside) -> None:
    def found(*arguments: str) -> list[str]:
        done = inside("peers", "--json", *arguments)
        return [peer["public_key"] for peer in json.loads(done.stdout)]

    assert found("--limit", "2") == [a_key(0), a_key(1)]
    assert found("LAPTOP") == found("10.0.1.3") == found(a_key(1)[4:20]) == [a_key(1)]
    assert found("--sort", "key", "--limit", "1") == [min(a_key(n) for n in range(4))]


# --- large figures --------------------------------------------------------------------------------

# A command whose gateway says what is in the file ANSWERS.
CANNED = """
import json, os, sys
sys.path[:0] = [sys.argv.pop(1)]
import wggw
answers = json.load(open(os.environ["ANSWERS"]))
now = answers.pop("now")
wggw.time.time = lambda: now  # ages do not change while the command starts
wggw.answer_of = lambda client, method, path: answers[path.split("?")[0].rsplit("/")[-1]]
sys.exit(wggw.main())
"""
STATES = ("online", "suspended", "expired", "active")
PEER_HEAD = [head for head, *_ in wggw.PEER_COLUMNS]
LONG = "wg-obfuscated-0"  # 15 characters: there are no longer names


def large_peers(names: tuple[str, str]) -> list[dict[str, Any]]:
    """Peers whose cells are as wide as on large gateways; on LONG one has IPv6 alone."""
    other = None if LONG in names else "10.64.100.101"

    def ago(seconds: float) -> str:
        return wggw.rfc3339(time.time() - seconds)

    def peer(number: int, state: str, address: str | None, **more: Any) -> dict[str, Any]:
        return {
            "public_key": a_key(number),
            "online": state == "online",
            "status": "active" if state in {"online", "active"} else "suspended",
            "status_reason": state if state in {"expired", "quota"} else None,
            "label": None if number else "a label of more\x1b[2J than sixteen characters",
            "request_id": None,
            "quota_bytes": 10**12 if number == 2 else None,
            "quota_period": "month",
            "quota_used": 999 * 10**9,
            "assigned_ip": address,
            "assigned_ipv6": "fd42:4242:40:ffff::fffe",
            "expires_at": "2031-12-31T23:59:59Z",
            "created_at": ago(10**8),
            "interface": names[number % 2],
            "rx_bytes": 123_456_789_012,
            "tx_bytes": 12_345_678_901_234,
            **more,
        }

    return [
        peer(0, STATES[0], "10.64.255.254", last_handshake=ago(170)),
        peer(1, STATES[1], "10.128.255.25", last_handshake=ago(59 * 60 + 30)),
        peer(2, STATES[2], other, last_handshake=ago(399 * 86400 + 23 * 3600 + 600), tx_bytes=0),
        peer(3, STATES[3], "10.64.100.100", last_handshake=None, expires_at=None),
    ]


def large_status(names: tuple[str, str]) -> dict[str, Any]:
    row = {
        **STATUS["interfaces"][0],
        "active_peers": 59_999,
        "total_peers": 60_000,
        "rx_bytes": 123_456_789_012_345,
        "tx_bytes": 12_345_678_901_234,
        "rx_bytes_per_second": 12_345_678.9,
        "tx_bytes_per_second": 123_456_789.0,
        "pools": {
            "ipv4": {"total": 1_048_573, "used": 60_000},
            "ipv6": {"total": 2**64 - 2, "used": 60_000},
        },
    }
    return {
        **STATUS,
        "status": "degraded",
        "reasons": ["disk: " + "No space left on device, " * 5 + "end of the reason"],
        "remote_copy": {
            "epoch": 12,
            "number": 123_456_789,
            "lag_records": 12_345,
            "lag_seconds": 12_345.678,
            "failure": "copies.example.org: the certificate is not valid for this name, at all",
        },
        "uptime_seconds": 399 * 86400 + 23 * 3600,
        "wireguard_peers": 59_000,
        "total_peers": 120_000,
        "journal": {"records": 1_234_567_890, "bytes": 123_456_789},
        "interfaces": [{**row, "name": name} for name in names],
    }


@pytest.fixture(params=[("wg0", "awg0"), ("wg0", LONG)], ids=["short", "long"])
def large(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[tuple[str, str], str]:
    """Names of the interfaces, and the file of what their gateway says."""
    page = {"configurations": large_peers(request.param), "next_cursor": None}
    path = tmp_path / "answers"
    status = large_status(request.param)
    path.write_text(json.dumps({"configurations": page, "status": status, "now": time.time()}))
    return request.param, str(path)


def shown(served: GatewayProcess, columns: int, name: str, answers: str) -> list[str]:
    with terminal(served, columns, name, ANSWERS=answers) as screen:
        screen.end()
        lines = visible(screen.text())
    assert max(map(len, lines)) <= columns
    return lines


@pytest.mark.parametrize("columns", [80, 100, 140])
def test_large_figures_of_peers_fit_and_columns_are_dropped_from_the_right(
    served: GatewayProcess, large: tuple[tuple[str, str], str], columns: int
) -> None:
    names, answers = large
    head, *lines = [line for line in shown(served, columns, "peers", answers) if line]
    columns_shown = head.split()
    assert columns_shown == PEER_HEAD[: len(columns_shown)]
    assert len(columns_shown) >= {80: 5, 100: 6, 140: 9}[columns]
    ages = ("2 min 5", "59 min 3", "399 d 23 h")
    for number, (peer, line) in enumerate(zip(large_peers(names), lines, strict=True)):
        key = peer["public_key"]
        assert line.startswith(key[:8] + "… ")
        assert line.count("…") == (1 if number else 2)
        told = {
            "LABEL": "" if number else "a label of more…",
            "STATE": STATES[number],
            "QUOTA": "99% of 1 TB/month" if number == 2 else "",
            "IPV4": peer["assigned_ip"] or "",
            "IPV6": peer["assigned_ipv6"],
            "HANDSHAKE": "never" if number == 3 else ages[number],
            "RECEIVED": "123 GB",
            "SENT": "0 B" if number == 2 else "12.3 TB",
            "EXPIRES": "" if number == 3 else "2031-12-31",
            "INTERFACE": peer["interface"],
        }
        assert [n for n, word in told.items() if n in columns_shown and word not in line] == [], (
            line
        )


@pytest.mark.parametrize("columns", [80, 100, 140])
def test_large_figures_of_a_status_fit_and_are_all_there(
    served: GatewayProcess, large: tuple[tuple[str, str], str], columns: int
) -> None:
    names, answers = large
    text = "\n".join(shown(served, columns, "status", answers))
    words = " ".join(text.split())
    for told in (
        "up 399 d 23 h",
        "device, end of the reason",
        "59000 online, 120000 in all",
        "24.7 MB/s in, 247 MB/s out",
        "123 MB, record 1234567890",
        "epoch 12, 12345 changes and 3 h 25 min behind: copies.example.org",
        "not valid for this name, at all",
    ):
        assert told in words
    for name in names:
        assert re.search(rf"{name} +netlink +51820 +59999[ /]", text)
        assert re.search(rf"{name} +ipv4 +60000 +1048573 .* 6 %", text)
        assert re.search(rf"{name} +ipv6 +60000 +unlimited .* 0 %", text)
    assert re.search(r"12.3 MB(/s)? +123 MB(/s)? +123 TB +12.3 TB", text)
    assert "…" not in text


def test_without_a_terminal_large_figures_are_in_the_full_form() -> None:
    no_terminal = wggw.Screen(0, 0, False)
    head, first, *_ = wggw.peer_lines(large_peers((LONG, LONG)), no_terminal)
    assert head.split() == PEER_HEAD
    label = "a label of more?[2J than sixteen characters"
    for told in (a_key(0), label, "2 min 5", "2031-12-31 23:59", LONG):
        assert told in first
    lines = wggw.status_lines(large_status((LONG, LONG)), no_terminal)
    assert max(map(len, lines)) > 80
    assert any(line.startswith("INTERFACE        BACKEND   PORT   ACTIVE/ALL") for line in lines)


def test_what_is_still_too_wide_when_one_column_is_left_is_cut_and_says_so() -> None:
    lines = wggw.peer_lines(large_peers((LONG, LONG)), wggw.Screen(8, 24, False))
    assert max(map(len, lines)) <= 8
    assert [line[-1] for line in lines[1:]] == ["…"] * 4


# --- for programs ---------------------------------------------------------------------------------


def test_json_is_what_the_api_says(served: GatewayProcess) -> None:
    status = json.loads(served.command("status", "--json").stdout)
    assert status["status"] == "healthy" and status["total_peers"] == 4
    peers = json.loads(served.command("peers", "--json").stdout)
    assert [peer["public_key"] for peer in peers] == [a_key(n) for n in range(4)]
    assert json.loads(served.command("peers", "--json", "--online").stdout) == []


def test_pipes_get_whole_lines_without_colour_or_progress(served: GatewayProcess) -> None:
    done = served.command("peers", "--sort", "key")
    assert (done.returncode, done.stderr) == (0, "")
    keys = [line.split()[0] for line in done.stdout.splitlines()[1:]]
    assert keys == sorted(a_key(n) for n in range(4))
    assert "\x1b" not in done.stdout


# Every command, in a form that its parser takes.
COMMANDS = [
    ["serve"],
    ["net", "show"],
    ["check"],
    ["copy", "show"],
    ["call", "GET", "/api/v1/server/status"],
    ["snapshot", "export", "exported.db"],
    ["import", "a-file"],
    ["adopt", "--interface", "wt-no-such"],
    ["awg", "generate"],
    ["awg", "show"],
    ["awg", "rotate"],
    ["status"],
    ["peers"],
    *(
        ["peer", action, "a name"]
        for action in ("add", "show", "suspend", "activate", "reset-quota", "rotate", "delete")
    ),
    ["top"],
    ["doctor"],
]


def test_every_command_is_among_them() -> None:
    parsers = [parser.prog.split()[1:] for parser in parsers_of(wggw.make_parser())]
    assert all(any(line[: len(words)] == words for line in COMMANDS) for words in parsers)


ENDS = [(KeyboardInterrupt, 130), (BrokenPipeError, 1)]


@pytest.mark.parametrize(
    ("line", "error", "code"), some([(line, *end) for line in COMMANDS for end in ENDS], 6)
)
def test_no_command_ends_with_a_traceback(
    served: GatewayProcess, line: list[str], error: type[BaseException], code: int
) -> None:
    program = (
        "import sys\nsys.path[:0] = [sys.argv.pop(1)]\nimport wggw\n"
        "def fail(*_):\n"
        f"    raise {error.__name__}\n"
        "wggw.COMMANDS = tuple(row._replace(run=fail) for row in wggw.COMMANDS)\n"
        "sys.exit(wggw.main())"
    )
    command = [*PROGRAM[:3], program, str(ROOT), *line]
    done = finish(command, served.directory)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


def interrupt(process: subprocess.Popen[bytes]) -> None:
    """And again, until it has ended: what comes just before a read is not noticed."""

    def ended() -> bool:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        return process.returncode is not None

    wait_for(ended, 60, "the command's end")


def test_an_interrupt_while_a_disk_does_not_answer(tmp_path: Path) -> None:
    """`check` reads a pipe into which nothing comes."""
    pipe = tmp_path / "wireguard.db"
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [*PROGRAM, "check"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"]},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )

    def opened() -> int:
        with contextlib.suppress(OSError):
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        return 0

    writing = wait_for(opened, what="the command to read")
    interrupt(process)
    out, error = process.communicate(timeout=60)
    os.close(writing)
    assert (process.returncode, out, error) == (130, b"", b"")


@pytest.mark.parametrize(
    "name", some(["call", "status", "peers", "snapshot", "awg show", "doctor"], 3)
)
def test_an_interrupt_while_a_gateway_does_not_answer(
    served: GatewayProcess, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "silent.db"
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(f"{path}.sock")
        silent.listen()
        [line] = [line for line in COMMANDS if " ".join(line).startswith(name)]
        program, environment = command(served, *line)
        process = subprocess.Popen(
            program,
            cwd=served.directory,
            env={**environment, "DB_PATH": str(path)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        silent.settimeout(60)
        with silent.accept()[0] as connection:
            connection.recv(1)  # it has begun to talk
            interrupt(process)
            _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, b"")


SPEAKING = [["peers"], ["awg", "generate"], ["check"], ["net", "show"], ["call", "GET", "/"]]
HELPS = [["--help"], ["--version"], ["peers", "--help"]]


@pytest.mark.parametrize(
    ("line", "way"),
    some([(line, w) for w in ("reader gone", "not there") for line in [*SPEAKING, *HELPS]], 5),
)
def test_a_closed_standard_output_is_exit_code_1(
    served: GatewayProcess, line: list[str], way: str
) -> None:
    program, environment = command(served, *line)
    reading, writing = os.pipe()
    os.close(reading)
    try:
        if way == "not there":
            program = ["sh", "-c", 'exec "$@" >&-', "sh", *program]
        done = finish(program, served.directory, writing, **environment)
    finally:
        os.close(writing)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


@pytest.mark.parametrize(
    ("line", "redirection", "code", "said"),
    [
        (["import", "-"], "<&-", 1, "wggw: cannot import standard input: it is empty\n"),
        (["top"], "<&-", 2, "wggw: `wggw top` needs a terminal"),
        (["peers"], "2>&-", 0, ""),
        (["peer", "show", "nobody"], "2>/dev/full", 1, ""),
        (["check", "--env-file", "nothing"], "2>/dev/full", 2, ""),
        (["peers"], ">/dev/full", 1, "wggw: output: No space left on device\n"),
        (["peers"], ">&-", 1, "wggw: output: Bad file descriptor\n"),
        (["status"], ">/dev/full", 1, "wggw: output: No space left on device\n"),
        (["peer", "add", "x", "--set", "dns=" + 3000 * "["], "", 1, "dns: must be"),
        *(
            ([*words, argument], "", 1, "characters that cannot be sent")
            for words in (["peer", "show"], ["call", "GET"], ["call", "POST", "/", "--data"])
            for argument in (b"/\xff",)
        ),
        (["call", "GET", "/a b"], "", 1, "a URL or path ASCII with %-escapes"),
        (["import", b"/\xff"], "", 1, "wggw: cannot read /?: No such file"),
        (["peer", "add", "x", "--set", 'dns="\\ud800"'], "", 1, "characters that cannot be sent"),
    ],
)
def test_streams_and_arguments_that_cannot_be_used_are_told_in_one_line(
    served: GatewayProcess, line: list[str | bytes], redirection: str, code: int, said: str
) -> None:
    program, environment = command(served)
    if redirection:
        program = ["sh", "-c", f'exec "$@" {redirection}', "sh", *program]
    done = finish([*program, *map(os.fsdecode, line)], served.directory, **environment)
    error = done.stderr
    assert (done.returncode, said in error, error.count("\n")) == (code, True, bool(said)), error


def test_a_client_gets_its_file_alone_where_standard_error_is_closed(
    served: GatewayProcess,
) -> None:
    program, environment = command(served, "peer", "add", "no stderr")
    shell = ["sh", "-c", 'exec "$@" 2>&-', "sh", *program]
    done = subprocess.run(
        shell, env=environment, cwd=served.directory, capture_output=True, check=True, timeout=60
    )
    assert done.stdout.startswith(b"[Interface]\n") and b"wggw:" not in done.stdout
    assert served.command("peer", "delete", "no stderr").returncode == 0


def test_exit_codes(served: GatewayProcess) -> None:
    nobody = GatewayProcess(served.directory, DB_PATH=str(served.directory / "nobody.db"))
    assert nobody.command("status").returncode == 1
    assert served.command("peers", "--sort", "nothing").returncode == 2
    assert "exit codes:" in served.command("--help").stdout
    for name in ("status", "peers", "top", "call", "snapshot", "check", "serve"):
        assert "example" in served.command(name, "--help").stdout


def parsers_of(
    parser: argparse.ArgumentParser,
) -> Iterator[argparse.ArgumentParser]:
    """Those of the commands, at any depth."""
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not groups:
        yield parser
    for group in groups:
        assert set(group.choices) == {choice.dest for choice in group._choices_actions}
        for below in group.choices.values():
            yield from parsers_of(below)


@pytest.mark.parametrize("parser", list(parsers_of(wggw.make_parser())), ids=lambda p: p.prog)
def test_every_argument_is_explained_and_every_command_has_an_example(
    parser: argparse.ArgumentParser,
) -> None:
    assert [action.dest for action in parser._actions if not action.help] == []
    examples = re.findall(r"(?m)^  (wggw .*)$", str(parser.epilog).split("example", 1)[1])
    assert examples
    for line in examples:
        assert line.startswith(parser.prog)
        words = shlex.split(re.split(r" [|>]", line)[0])
        assert wggw.make_parser().parse_args(words[1:]).run


def test_a_degraded_gateway_is_exit_code_1_and_says_why(tmp_path: Path) -> None:
    status = {**STATUS, "status": "degraded", "reasons": ["snapshot: No space left on device"]}
    lines = wggw.status_lines(status, wggw.Screen(0, 0, False))
    assert lines[0].startswith("degraded")
    assert lines[1] == "  snapshot: No space left on device"


def test_progress_is_shown_after_a_second_on_a_terminal_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with wggw.progress("working"):
        time.sleep(1.1)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with wggw.progress("working"):
        pass
    assert capsys.readouterr().err == ""
    with wggw.progress("working"):
        wait_for(lambda: re.search(r"working: \d s", capsys.readouterr().err), what="progress")
    assert capsys.readouterr().err.endswith("\r")


# --- whose settings -------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [("check",), ("net", "show")])
def test_what_signs_nothing_needs_no_key(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = run_wggw(tmp_path, *arguments, "--env-file", os.devnull)
    assert done.returncode < 2 and "GATEWAY_API_KEY" not in done.stderr, done
    assert done.stdout or "there is no database" in done.stderr


def test_a_host_without_settings_is_not_made_a_gateway(tmp_path: Path) -> None:
    done = run_wggw(tmp_path, "net", "up", "--env-file", os.devnull)
    assert done.returncode == 2 and "GATEWAY_API_KEY is not set" in done.stderr


@pytest.fixture
def installed(
    served: GatewayProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """The settings of an installed gateway, seen from an empty directory without any of them."""
    for setting in wggw.SETTINGS:
        monkeypatch.delenv(setting.name, raising=False)
    here = {"TLS_CERT": "cert.pem", "TLS_KEY": "key.pem", "DB_PATH": "wireguard.db"}
    values = {name: str(served.directory / served.settings.get(name, here[name])) for name in here}
    values = {**served.settings, **values, "WG_INTERFACE": "wg7"}
    path = tmp_path / "etc" / "wggw.env"
    path.parent.mkdir(mode=0o700)
    path.touch(0o600)
    path.write_text("".join(f"{name}='{value}'\n" for name, value in values.items()))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr(wggw, "INSTALLED_SETTINGS", str(path))
    yield path


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["status"], "4 in all"),
        (["peers"], a_key(1)),
        (["call", "GET", "/api/v1/server/status"], '"total_peers":4'),
        (["snapshot", "export", "state"], "exported "),
        (["check"], "4 peers"),
        (["doctor"], "API: answers: healthy, 4 peers"),
        (["net", "show"], "wg7"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_an_installed_gateway_is_found_from_anywhere(
    installed: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert wggw.main(arguments) < 2
    assert told in capsys.readouterr().out


def test_net_down_is_for_the_installed_gateway(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(wggw, "net_down", lambda *values: given.append(values) or ["done"])
    monkeypatch.setattr(wggw, "current_table", lambda: '    iifname { "wg6", "wg7" } accept\n')
    assert wggw.main(["net", "down"]) == 0
    ((mark, names, _, keep_interfaces),) = given
    assert (mark, names, keep_interfaces) == (f"wggw {installed}", {"wg6", "wg7"}, False)


def test_settings_here_are_before_the_installed_ones(
    installed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = installed.parent / "other.env"
    other.write_text("API_PORT=1\n")
    assert wggw.main(["status", "--env-file", str(other)]) == 1
    with monkeypatch.context() as inner:
        inner.setenv("DB_PATH", "elsewhere.db")
        assert wggw.main(["status"]) == 1
    Path(".env").write_text("API_PORT=1\n")
    assert wggw.main(["status"]) == 1
    assert capsys.readouterr().err.count("no gateway runs here") == 3
    Path(".env").unlink()
    monkeypatch.setenv("AWS_REGION", "eu-central-1")  # of other programs, too
    assert wggw.main(["status"]) == 0


def test_serve_takes_no_settings_that_it_was_not_given(
    installed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert wggw.main(["serve"]) == 2
    assert "GATEWAY_API_KEY is not set" in capsys.readouterr().err


def test_installed_settings_that_cannot_be_read_are_named(
    installed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if os.geteuid():
        pytest.skip("needs root, to be somebody else")
    os.seteuid(65534)
    try:
        assert wggw.main(["check"]) == 2
    finally:
        os.seteuid(0)
    assert f"{installed}: cannot be read: Permission denied" in capsys.readouterr().err


# --- figures --------------------------------------------------------------------------------------

POOL = {"total": 253, "used": 64, "available": 189, "gateway_ip": "10.0.1.1"}
STATUS: dict[str, Any] = {
    "status": "healthy",
    "version": "1",
    "python_version": "3.13.1",
    "uptime_seconds": 90061,
    "timestamp": "2026-01-02T00:00:00Z",
    "reasons": [],
    "wireguard_peers": 12,
    "total_peers": 64,
    "memory_usage": 21.5,
    "load_average": 0.1,
    "certificate_expires_at": "2026-01-01T00:00:00Z",
    "snapshot": {"at": None, "bytes": 0},
    "journal": {"records": 7, "bytes": 1234},
    "interfaces": [
        {
            "name": "wg0",
            "backend": "netlink",
            "listen_port": 51820,
            "active_peers": 60,
            "total_peers": 64,
            "pools": {"ipv4": POOL},
            "rx_bytes": 10**12,
            "tx_bytes": 999,
            "rx_bytes_per_second": 1234567,
            "tx_bytes_per_second": 0,
            "sample_age_seconds": 3.0,
        }
    ],
}


def test_status_shows_what_it_is_given() -> None:
    text = "\n".join(wggw.status_lines(STATUS, wggw.Screen(0, 0, False)))
    for part in ("up 1 d 1 h", "1.23 MB/s in", "none yet", "EXPIRED", "1.23 kB, record 7"):
        assert part in text
    assert "25 %  [#####...............]" in text


def test_a_rate_that_is_not_known_yet_is_no_zero() -> None:
    row = {**STATUS["interfaces"][0], "sample_age_seconds": 10**6}  # older than the gateway
    status = {**STATUS, "uptime_seconds": 3, "interfaces": [row]}
    text = "\n".join(wggw.status_lines(status, wggw.Screen(0, 0, False)))
    assert "traffic      – in, – out" in text and "1.23 MB/s" not in text
    top = wggw.Top()
    top.look(status, [], 100.0)
    assert top.lines(status, [], wggw.Screen(80, 24, False), "late")[1:4] == [
        " in          –", "out          –", "late",
    ]  # fmt: skip


def test_spans_are_told_as_one_says_them() -> None:
    day = 86400
    assert [wggw.show_age(n * day) for n in (1, 729, 3649)] == ["1 d", "729 d", "9 years"]


def test_bytes_and_ages_are_short() -> None:
    shown = [wggw.show_bytes(n) for n in (0, 999, 1000, 12345, 999_499, 999_500, 10**15, 10**21)]
    assert shown == ["0 B", "999 B", "1 kB", "12.3 kB", "999 kB", "1 MB", "1 PB", "1000 EB"]
    ages = [wggw.show_age(n) for n in (-1, 0, 59, 60, 3661, 90061)]
    assert ages == ["0 s", "0 s", "59 s", "1 min", "1 h 1 min", "1 d 1 h"]


def test_sparklines_are_as_high_as_the_highest() -> None:
    assert wggw.sparkline([0, 50, 100], 10) == "▁▅█"
    assert wggw.sparkline(range(100), 3, wggw.PLAIN_SPARKS) == "###"
    assert wggw.sparkline([], 10) == ""


def test_top_ranks_peers_by_what_passed_between_two_samples() -> None:
    top = wggw.Top()

    def peer(name: str, rx: int) -> dict[str, Any]:
        return {
            "public_key": a_key(name),
            "rx_bytes": rx,
            "tx_bytes": 0,
            "assigned_ip": "10.0.1.2",
            "assigned_ipv6": "fd42:4242:1::2",
            "label": "the laptop of " + name,
        }

    def status(age: float) -> dict[str, Any]:
        return {**STATUS, "interfaces": [{**STATUS["interfaces"][0], "sample_age_seconds": age}]}

    top.look(status(0), [peer("idle", 10**9), peer("busy", 0)], 100.0)
    top.look(status(5), [peer("idle", 10**9), peer("busy", 0)], 105.0)  # the same sample
    top.look(status(0), [peer("idle", 10**9), peer("busy", 50_000)], 110.0)
    lines = top.lines(
        STATUS, [peer("idle", 10**9), peer("busy", 50_000)], wggw.Screen(80, 24, False)
    )
    assert list(top.rates["rx"]) == [1234567, 1234567]
    assert lines[4].split()[:6] == ["KEY", "IN", "OUT", "RECEIVED", "ADDRESS", "SENT"]
    assert lines[5].startswith(a_key("busy")[:12]) and "5 kB/s" in lines[5]
    wide = top.lines(STATUS, [peer("new", 5), peer("busy", 50_000)], wggw.Screen(140, 24, False))
    assert wide[4].split()[-3:] == ["LABEL", "IPV6", "ADDRESS"]
    assert "the laptop of busy" in wide[5] and "fd42:4242:1::2" in wide[5]
    assert wide[6].split()[1:3] == ["–", "–"]  # it has been there for no two samples
    narrow = top.lines(STATUS, [peer("new", 5)], wggw.Screen(12, 24, False))
    assert max(map(len, narrow)) <= 12
