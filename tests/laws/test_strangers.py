"""Law 5: what runs before a signature is verified is linear in its input, and cheap.

So nobody who cannot sign slows those who can. This file run as a program is such a stranger.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from harness import LONG, Client, a_key, any_peer, running

SECONDS = 10.0 if LONG else 1.0
# The 99th percentile of an authentic client's requests, seconds; on a machine that others load, ten
# times what it is there without strangers.
LIMIT = 0.1
TRIES = 3  # what slows requests down does so each time; another process on the machine does not
LEAST = 20  # heads that each stranger must have got rid of, or nothing was shown

FRONT = b"GET /api/v1/configurations HTTP/1.1\r\nHost: a\r\n"
GOOD = b';created=1000000000;nonce="n";keyid="default"'
MAC = base64.b64encode(bytes(32))
ROOM = 15_800  # bytes of a head that is full


def full(front: bytes, filling: bytes, behind: bytes = b"") -> bytes:
    count = (ROOM - len(front) - len(behind)) // len(filling)
    return front + filling * count + behind + b"\r\n\r\n"


def signed_by_nobody(covered: bytes, behind: bytes = b")") -> bytes:
    """A head whose Signature-Input is full of this."""
    front = FRONT + b"Signature: a=:" + MAC + b":\r\nSignature-Input: a=("
    return full(front, covered, behind + GOOD)


def naming_parameters() -> bytes:
    """Query parameters of a long query, each named once."""
    query = b"&".join(b"a%d=1" % number for number in range(30)) + b"&b=" + b"%41" * 2000
    names = b" ".join(b'"@query-param";name="a%d"' % number for number in range(214))
    line = b"GET /api?%b HTTP/1.1\r\nHost: a\r\nSignature: a=:%b:\r\n" % (query, MAC)
    return line + b"Signature-Input: a=(" + names + b")" + GOOD + b"\r\n\r\n"


def eight_signatures() -> bytes:
    """Each over a long target, four times."""
    covered = b'("@method" "@target-uri" "@path" "@query" "@request-target")' + GOOD
    return b"GET /api?%b HTTP/1.1\r\nHost: a\r\nSignature: %b\r\nSignature-Input: %b\r\n\r\n" % (
        b"a" * 8000,
        b", ".join(b"a%d=:%b:" % (number, MAC) for number in range(8)),
        b", ".join(b"a%d=%b" % (number, covered) for number in range(8)),
    )


WORST = (
    full(FRONT + b"X: ", b" ", b"\x01"),
    full(FRONT + b"X: ", b"\t ", b"\x7f"),
    naming_parameters(),
    eight_signatures(),
    signed_by_nobody(b"1 "),
    signed_by_nobody(b'"" '),
    signed_by_nobody(b":: "),
    signed_by_nobody(b" "),
    signed_by_nobody(b'a";x="', b'")'),
    full(FRONT + b"Signature: a=:" + MAC + b':\r\nSignature-Input: a=();nonce="', b'\\"', b'"'),
    full(FRONT + b"Signature-Input: a=()\r\nSignature: ", b"a,"),
    full(FRONT + b"Signature: 00\r\nTimestamp: ", b"1"),
    full(FRONT + b"X: a\r\n" * 50 + b"X: ", b"a"),
    full(b"", b"\r\n", FRONT + b"X: a"),
)


def stranger(port: int, address: str, seconds: float) -> Counter[int]:
    """Send the worst heads, one after the other as fast as they are answered; count statuses."""
    statuses: Counter[int] = Counter()
    context = any_peer()
    until = time.monotonic() + seconds
    number = 0
    while time.monotonic() < until:
        raw = socket.create_connection(("127.0.0.1", port), 30, (address, 0))
        with contextlib.suppress(OSError), context.wrap_socket(raw) as wire:
            while time.monotonic() < until:
                number += 1
                wire.sendall(WORST[number % len(WORST)])
                answer = b""
                while b"\r\n\r\n" not in answer:
                    answer += wire.recv(65536)
                    if not answer:
                        raise OSError("it was closed")
                statuses[int(answer.split()[1])] += 1
                if b"connection: close" in answer.lower():
                    break
    return statuses


@contextlib.contextmanager
def strangers(port: int, seconds: float) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two of them, in processes of their own: what they do takes nothing of this one's time."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    started: list[subprocess.Popen[bytes]] = []
    try:
        for address in ("127.0.0.2", "127.0.0.3"):
            command = [sys.executable, __file__, str(port), address, str(seconds)]
            started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE))
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def p99(client: Client, seconds: float) -> float:
    """Seconds that all but 1 % of an authentic client's requests stay below."""
    taken: list[float] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until or (len(taken) < 100 and time.monotonic() < until + 20):
        started = time.perf_counter()
        if len(taken) % 10:
            assert client.get(a_key("nobody")).status == 404
        else:
            assert client.create(a_key(len(taken))).status == 200
        taken.append(time.perf_counter() - started)
    return sorted(taken)[int(len(taken) * 0.99)]


def test_two_strangers_with_the_worst_heads_do_not_slow_an_authentic_client(
    tmp_path: Path,
) -> None:
    settings = {
        "LOG_LEVEL": "warning",
        "WG_IPV4_SUBNET": "10.0.0.0/8",
        "MAX_AUTH_FAILURES": "1000000",
    }
    with running(tmp_path, **settings) as gateway:
        client = gateway.client()
        for _ in range(TRIES):
            alone = p99(client, SECONDS)
            with strangers(gateway.port, SECONDS + 1) as processes:
                time.sleep(0.5)  # until they have begun
                beside = p99(client, SECONDS)
                counts = [json.loads(process.communicate(timeout=60)[0]) for process in processes]
            print(f"measured: p99 {alone * 1e3:.1f} ms alone, {beside * 1e3:.1f} ms beside", counts)
            if beside < max(LIMIT, 10 * alone):
                break
        else:
            raise AssertionError(f"too slow each of {TRIES} times, see what was measured")
        assert all(sum(count.values()) >= LEAST for count in counts), counts
        assert all(set(count) <= {"400", "401", "429"} for count in counts), counts
        client.close()


if __name__ == "__main__":
    print(json.dumps(stranger(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))))
