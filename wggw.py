#!/usr/bin/env python3
# Copyright (c) the wggw authors. Proprietary, all rights reserved: see LICENSE.
"""wggw: a WireGuard gateway in one file.

A VPN provider's backend tells it over HTTPS which peers may connect; it hands out addresses, keeps
the WireGuard interface in line, reports usage, and puts all of it back after a restart.

A request's path
    server.Connection reads a head -> http.App checks the signature from the head alone, finds the
    route -> the body is read and decoded once into frozen values -> gateway.Gateway decides under
    its one lock: interface first, then store and journal -> outside the lock the request waits
    until the journal is on disk (one fsync for all that wait) -> the answer.

Sections, each using only those above it (search for "# name:")
    constants, errors, config, values, crypto, addresses, journal, store, remote, backends,
    host network, gateway, metrics, http, server, doctor, command line

Laws
    1. The store is the truth; an interface is a projection of it, brought in line by one diff().
    2. An answer is given only when interface and disk both have the change. A request that fails
       leaves both as they were.
    3. An address is free again only after the interface has dropped the peer. Never-used
       addresses go first, then the one that was released longest ago.
    4. Live change and replay run through the same Store.apply().
    5. A request's cost does not depend on how many peers there are.
    6. No process is started in a request's path; no outside input ever reaches a shell.

The files on disk
    DB_PATH            the snapshot: an ordinary SQLite database, replaced atomically. Table `meta`
                       holds `number`, the last journal record that the snapshot contains.
    DB_PATH.previous   the snapshot before it.
    DB_PATH.journal    what came after the snapshot. Lines of text:
                         wggw-journal 1 AFTER CRC
                         NUMBER DURABLE CRC JSON
                       AFTER: the number before the first record. NUMBER: counts up by one, or skips
                       ahead in a new file after a disk fault. DURABLE: how many bytes of this file
                       were known to be on disk when the record was written. CRC: CRC-32 (hex) of
                       the rest of the line without it. JSON: {"put": [peer...], "del": [id...]},
                       and in a sample's records "traffic": rows of that table, in its columns'
                       order. Rows hold totals, so that reading one twice changes nothing.
                       "set": {name: text}, where there is one, sets a row of `meta`.
                       A desired state is records with "sync": ["part"] and one with ["end"], others
                       in between; recovery takes back parts whose end is missing.
    DB_PATH.journal.previous   the journal before the last snapshot; with DB_PATH.previous and
                       DB_PATH.journal it still holds everything.
    DB_PATH.nonces     of signatures whose time was ahead of this clock: see NonceGuard.keep.
    DB_PATH.writers    who wrote the remote copy that these files go on from, and up to which
                       manifest (NAME:SEQUENCE), and the name of who writes it now.
    DB_PATH.superseded a snapshot of what was not used at a start: of the files or of the copy.
    With SNAPSHOT_KEY set (AES-256-GCM, a key for each file by HKDF from a random salt):
                       the journal's first line has SALT and KEY-CHECK (hex) behind AFTER, and JSON
                       is base64, sealed with the record's number as nonce; the snapshot is a line
                       "wggw-snapshot 1 SALT KEY-CHECK CRC" and sealed chunks of 64 KiB, numbered,
                       the last one marked.
    At SNAPSHOT_URL    manifest-0 and manifest-1, in turn: a line "wggw-copy 1 CRC JSON" that lists
                       its parts with number, size and SHA-256; part-NNN: snapshots and journals
                       in the formats above.
    The snapshot's checksum is its SQLite application id (see encode_snapshot).
    Recovery reads the snapshot, then every record with a higher number. A bad record is a torn
    write, and dropped, when nothing readable behind it was written after it was known to be on
    disk; otherwise acknowledged changes are damaged and the start is refused (exit 3).
"""

from __future__ import annotations

import os
import sys

# A script is compiled at each start, and Python keeps its syntax tree (20 MB) as long as it runs; a
# module comes from its cached bytecode. So what runs for long starts again as a module: same
# process, same arguments.
if __name__ == "__main__" and sys.argv[1:2] == ["serve"] and __file__.endswith("wggw.py"):
    as_module = "import sys; sys.path[:0] = [sys.argv.pop(1)]; import wggw; sys.exit(wggw.main())"
    flags = [*sys.orig_argv[1 : -len(sys.argv)], "-P", "-c", as_module]
    directory = os.path.dirname(os.path.realpath(__file__))
    command = [sys.orig_argv[0], *flags, directory, *sys.argv[1:]]
    os.execv(sys.executable, command)  # noqa: S606 (no shell is what we want)

import argparse
import base64
import binascii
import bisect
import collections
import contextlib
import email.utils
import errno
import fcntl
import functools
import gc
import hashlib
import hmac
import http.client
import importlib.util
import io
import ipaddress
import itertools
import json
import logging
import math
import re
import resource
import secrets
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import struct
import subprocess
import termios
import textwrap
import threading
import time
import tty
import urllib.parse
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, ParamSpec, Protocol, TypeGuard, TypeVar, cast

__version__ = "0.1.0"
PYTHON_VERSION = ".".join(map(str, sys.version_info[:3]))

# ==================================================================================================
# constants: limits with their unit and reason; kernel numbers under the kernel's names
# Never here: reads of the environment.
# ==================================================================================================

BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)  # seconds

KEY_BYTES = 32  # curve25519 keys and preshared keys
ONLINE_SECONDS = 180  # a handshake younger than this: online (WireGuard's REJECT_AFTER_TIME)

MAX_HEAD = 16 * 1024  # bytes of request line and headers
MAX_HEADERS = 64
MAX_BODY = 64 * 1024  # bytes of an ordinary request's body
MAX_JSON_DEPTH = 32
MAX_TEXT = 256  # characters of a free text such as request_id
MAX_PAGE = 1000  # peers in one answer to a list
DEFAULT_PAGE = 100
MAX_BATCH = 1000  # operations
MAX_LINES = 64 * 2**20  # bytes of a desired state in lines, read one by one
MAX_ARRAY = 16 * 2**20  # bytes of one that is a JSON array
MAX_SNAPSHOT = 256 * 2**20  # bytes of an imported snapshot: 60,000 peers need about 20 MB
MAX_INTEGER = 2**63 - 1  # SQLite's INTEGER
MAX_TOTAL = MAX_INTEGER // 4  # bytes of a peer's traffic: two of them can still be added up
MAX_TIME = 253402300799  # Unix seconds: the year 10000 has no RFC 3339 form
MAX_DECOY = 1280  # bytes of AmneziaWG's junk and padded handshake packets: IPv6's least path MTU
MAX_DECOY_TEXT = 3000  # characters of I1-I5: a kernel tells all of an interface in 4096 bytes
MAX_JUNK_PACKETS = 128  # before each handshake
MAX_NONCES = 2**18  # live ones: 2,000 signed requests a second for two minutes, about 40 MB
MAX_THROTTLED = 4096  # addresses whose failures are remembered
MAX_SIGNATURES = 8  # of one message

NO_MODULE = 255  # exit code of a child whose job lacks a Python package
RESERVED_FILES = 128  # open files for everything but connections
HANDSHAKE_DEADLINE = 10.0  # seconds for TLS
HEAD_DEADLINE = 10.0  # seconds from the first byte of a request to the end of its head
BODY_DEADLINE = 30.0  # seconds for the body
WRITE_DEADLINE = 30.0  # seconds for the answer
IDLE_DEADLINE = 75.0  # seconds between two requests of a connection
SEND_BYTES = 64 * 1024  # what must be sent within one WRITE_DEADLINE
RECEIVE_BYTES = 16 * 1024  # one TLS record; larger buffers cost page faults in every request
LINGER_SECONDS = 1.0  # how long unread input is drained so that the last answer is not reset away
PROBE_SECONDS = 5.0  # how long the service may take to answer its own health check
MANAGER_SECONDS = 1.0  # for systemd to take a message
STOP_SECONDS = 0.5  # how long it waits for the timers' jobs, and for a lock
LAST_SAMPLE_SECONDS = 1.0  # and for the last reading of the counters
DRAIN_GRACE = 0.2  # seconds for threads to take up requests that have arrived before SIGTERM
EXPIRY_WARNING = 14 * 86400  # seconds before the certificate's end
MAX_CLIENT_WAIT = 5  # seconds that `wggw call` waits when the gateway says Retry-After
DRAIN_SECONDS = 2.0  # how long SIGTERM waits for requests in flight (it must end within 5)

FRESH_SPAN = 2**18  # a pool's never-used addresses go first up to here; then released ones: a /64
# under churn would otherwise remember every address that it ever gave
SWEEP_PEERS = 512  # up to here a suspension reads all counters at once, above the next sample does
JOURNAL_LIMIT = 16 * 2**20  # bytes: five samples of 60,000 peers; then a snapshot before its time
PARKED_CHUNK = 8  # removals per hold of the lock: each costs a kernel an RCU grace period
REPLAY_CHUNK = 5000  # records applied at once at the start
LARGEST_BLOCK = 32 * 2**20 - 8192  # bytes: what glibc can be made to keep (mallopt(3))
READ_CHUNK = 500  # rows handled per hold of the domain lock by work that is O(peers): about 5 ms
HOLD_SECONDS = 0.01  # what a part of a desired state should hold the domain lock: it may take 0.05
MAX_MERGED = 50  # creates of a batch that are one change: about 5 ms
MIN_PART, MAX_PART = 50, 400  # peers in a part
BREATH_SECONDS = 0.0002  # between two holds: without it, nobody else gets the lock
BODY_RATE = 250_000  # bytes a second below which a streamed body is cut off
BACKEND_TIMEOUT = 10.0  # seconds for one exchange with an interface
CHECK_TRIES = 20  # readings of files that a running gateway replaces meanwhile
HUNG_TIMEOUTS = 3  # that many in a row, and a userspace WireGuard of our own is started anew
DAEMON_START_SECONDS = 5.0  # how long a userspace WireGuard may take to open its socket
MAX_DOUBTS = 6  # samples amid changes with another number of peers than there should be
SUPERVISE_SECONDS = 1.0  # between two looks at the interface and the clock of expiry
DURABILITY_INTERVAL = 1.0  # seconds: DURABILITY=interval loses at most this
DUMP_TRIES = 50  # a change interrupts a kernel's dump; requests go on during reconcile()
PR_SET_DUMPABLE = 4  # include/uapi/linux/prctl.h
UAPI_DIRECTORY, AWG_UAPI_DIRECTORY = "/var/run/wireguard", "/var/run/amneziawg"
TOOL_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # of nft and ufw

# include/uapi/linux/netlink.h
NETLINK_ROUTE, NETLINK_GENERIC = 0, 16
NLM_F_REQUEST, NLM_F_MULTI, NLM_F_ACK, NLM_F_DUMP_INTR = 0x1, 0x2, 0x4, 0x10
NLM_F_DUMP, NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x300, 0x100, 0x200, 0x400
NLMSG_NOOP, NLMSG_ERROR, NLMSG_DONE, NLMSG_OVERRUN = 1, 2, 3, 4
NLM_F_CAPPED, NLM_F_ACK_TLVS, NLMSGERR_ATTR_MSG = 0x100, 0x200, 1
NLA_F_NESTED, NLA_TYPE_MASK = 0x8000, 0x3FFF
# include/uapi/linux/genetlink.h
GENL_ID_CTRL, CTRL_CMD_GETFAMILY, CTRL_ATTR_FAMILY_ID, CTRL_ATTR_FAMILY_NAME = 16, 3, 1, 2
CTRL_ATTR_VERSION = 3
# include/uapi/linux/rtnetlink.h, if_link.h, if_addr.h
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_NEWADDR, RTM_GETADDR = 16, 17, 18, 20, 22
IFLA_IFNAME, IFLA_MTU, IFLA_LINKINFO, IFLA_INFO_KIND = 3, 4, 18, 1
IFA_ADDRESS, IFA_LOCAL = 1, 2
IFF_UP = 1
# include/uapi/linux/wireguard.h
WG_GENL_NAME = "wireguard"
WG_CMD_GET_DEVICE, WG_CMD_SET_DEVICE = 0, 1
WGDEVICE_A_IFINDEX, WGDEVICE_A_IFNAME, WGDEVICE_A_PRIVATE_KEY, WGDEVICE_A_PUBLIC_KEY = 1, 2, 3, 4
WGDEVICE_A_FLAGS, WGDEVICE_A_LISTEN_PORT, WGDEVICE_A_FWMARK, WGDEVICE_A_PEERS = 5, 6, 7, 8
WGPEER_A_PUBLIC_KEY, WGPEER_A_PRESHARED_KEY, WGPEER_A_FLAGS, WGPEER_A_ENDPOINT = 1, 2, 3, 4
WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL, WGPEER_A_LAST_HANDSHAKE_TIME = 5, 6
WGPEER_A_RX_BYTES, WGPEER_A_TX_BYTES, WGPEER_A_ALLOWEDIPS = 7, 8, 9
WGPEER_A_PROTOCOL_VERSION = 10
WGDEVICE_F_REPLACE_PEERS = 1
WGPEER_F_REMOVE_ME, WGPEER_F_REPLACE_ALLOWEDIPS = 1, 2
WGALLOWEDIP_A_FAMILY, WGALLOWEDIP_A_IPADDR, WGALLOWEDIP_A_CIDR_MASK = 1, 2, 3
# AmneziaWG's module: WireGuard's numbers, and those of AWG_PARAMETERS
AWG_GENL_NAME = "amneziawg"
NETLINK_BATCH = 48 * 1024  # bytes of peers in one message: attribute lengths are 16 bits

SWITCH_INTERVAL = 0.0005  # seconds: with Python's 0.005, a request's every step waits for a sample
COLLECT_AFTER = 20_000  # new objects: with Python's 700, half of a dump's decoding is collection
LOG_DELAY = 0.1  # seconds that requests' lines of the log are gathered
MAX_LOG_LINES = 100_000  # of requests that wait for a slow reader of the log

COPY_INTERVAL = 2.0  # seconds between two journal segments of the remote copy
COPY_SEGMENTS = 100  # of them above a snapshot, then the next one: bounds manifest and recovery
COPY_BACKLOG = 16 * 2**20  # bytes of records that wait for the copy, then it takes a snapshot
COPY_TIMEOUT = 10.0  # seconds of silence
COPY_DEADLINE = 30.0  # seconds for one object,
COPY_SLOWEST = 200_000  # and for its bytes at this rate in bytes a second
COPY_MAX_PAUSE = 60.0  # seconds between two tries
MAX_MANIFEST = 2**18  # bytes: 200 parts are 30 KB

LOG = logging.getLogger("wggw")

# ==================================================================================================
# errors: one class for what a caller is told, and its few kinds
# Never here: logging.
# ==================================================================================================


class GatewayError(Exception):
    """A request cannot be done: an HTTP `status` and a `detail` that is safe to tell the caller."""

    status = 500

    def __init__(self, detail: str, *, headers: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(detail)
        self.detail = detail
        self.headers = tuple(headers)


class Malformed(GatewayError):
    status = 400


class Unauthorized(GatewayError):
    """A request is not accepted; `reason` is the metrics' word for why."""

    status = 401

    def __init__(
        self, detail: str, reason: str = "signature", headers: Sequence[tuple[str, str]] = ()
    ) -> None:
        super().__init__(detail, headers=headers)
        self.reason = reason


class Forbidden(GatewayError):
    status = 403


class NotFound(GatewayError):
    status = 404


class MethodNotAllowed(GatewayError):
    status = 405


class Timeout(GatewayError):
    status = 408


class Conflict(GatewayError):
    status = 409


class LengthRequired(GatewayError):
    status = 411


class TooLarge(GatewayError):
    status = 413


class UnsupportedMediaType(GatewayError):
    status = 415


class Invalid(GatewayError):
    """A field's value is wrong; the detail begins with the field's name."""

    status = 422

    def __init__(self, name: str, accepted: str) -> None:
        super().__init__(f"{name}: {accepted}")


class TooManyRequests(GatewayError):
    status = 429


class HeadTooLarge(GatewayError):
    status = 431


class VersionNotSupported(GatewayError):
    status = 505


class Unavailable(GatewayError):
    status = 503


class BackendError(Exception):
    """The interface did not do what was asked; the text names the interface and the reason."""


class CodecError(BackendError):
    """Bytes from a kernel or a userspace WireGuard that do not follow their format."""


class StartError(Exception):
    """The gateway cannot start; `code` is the process's exit code."""

    code = 1


class ConfigError(StartError):
    """A setting is wrong: names the variable, its value unless secret, and what is accepted."""

    code = 2


class DamagedError(StartError):
    """Snapshot or journal is damaged: names the file, the offset, what was found, what to do.

    `found` is that alone, for the caller who sent the file.
    """

    code = 3

    def __init__(self, text: str, found: str = "") -> None:
        super().__init__(text)
        self.found = found or text


class DiskError(Exception):
    """The disk refused a write; nothing that waited for it may be acknowledged."""


# ==================================================================================================
# config: the settings, every default in one table, every bad value refused by name
# Never here: defaults elsewhere, and files other than .env.
# ==================================================================================================

PLAIN_PREFIX, AWG_PREFIX = "WG", "AWG"  # of the variables of the two kinds of interface
IPv4or6Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Setting(NamedTuple):
    """A row of the settings table. `default` None: not set; `accepts` ends an error message."""

    name: str
    default: str | None
    parse: Callable[[str], Any]
    accepts: str
    secret: bool = False
    required: bool = False


@dataclass(frozen=True)
class Config:
    """The settings after parsing; fields are the lower-case names of the variables."""

    gateway_api_key: str = field(repr=False)
    gateway_api_keys: Mapping[str, str] = field(repr=False)
    gateway_public_key: str | None = field(repr=False)
    max_timestamp_diff: int
    auth_schemes: tuple[str, ...]
    allowed_backends: tuple[IPv4or6Network, ...]
    api_host: str
    api_port: int
    tls_cert: str
    tls_key: str
    tls_client_ca: str | None
    wg_interface: str | None
    wg_ipv4_subnet: ipaddress.IPv4Network | None
    wg_ipv6_subnet: ipaddress.IPv6Network | None
    wg_default_port: int
    wg_extra_ports: tuple[int, ...]
    wg_endpoint: str | None
    wg_private_key_file: str
    wg_backend: str
    wg_mtu: int
    wg_isolate: bool
    awg_interface: str | None
    awg_ipv4_subnet: ipaddress.IPv4Network | None
    awg_ipv6_subnet: ipaddress.IPv6Network | None
    awg_port: int
    awg_extra_ports: tuple[int, ...]
    awg_private_key_file: str | None
    awg_params: str | None = field(repr=False)
    dns_servers: Mapping[str, tuple[str, ...]]
    db_path: str
    durability: str
    snapshot_interval: float
    snapshot_key: str | None = field(repr=False)
    sample_interval: float
    log_level: str
    snapshot_url: str | None
    snapshot_token: str | None = field(repr=False)
    snapshot_required: bool
    aws_access_key_id: str | None
    aws_secret_access_key: str | None = field(repr=False)
    aws_session_token: str | None = field(repr=False)
    aws_region: str | None
    aws_default_region: str | None
    aws_endpoint_url: str | None
    aws_endpoint_url_s3: str | None
    metrics_token: str | None = field(repr=False)
    max_connections: int
    max_connections_per_address: int
    max_auth_failures: int
    privacy_scrub: int
    per_peer_metrics: bool


def _text(raw: str) -> str:
    if not raw:
        raise ValueError
    return raw


def _secret(raw: str) -> str:
    if len(raw) < 16:
        raise ValueError
    raw.encode("utf-8")  # a lone surrogate is a UnicodeEncodeError, a ValueError
    return raw


_JSON_MARK = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[{]|[\]}]', re.DOTALL)


def json_depth(text: str, position: int = 0) -> int:
    """The nesting of the JSON value at `position`, strings left out; it stops above the limit."""
    depth = deepest = 0
    for match in _JSON_MARK.finditer(text, position):
        if match[0] in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif match[0] in "]}":
            depth -= 1
        if depth <= 0 or depth > MAX_JSON_DEPTH:
            break
    return deepest


def check_depth(text: str) -> None:
    """Raises ValueError for nesting that could be the end of a thread's stack, and of Python."""
    if text.count("[") + text.count("{") > MAX_JSON_DEPTH and json_depth(text) > MAX_JSON_DEPTH:
        raise ValueError("nested too deep")


def load_json(text: str) -> Any:
    """json.loads() for what comes from outside. Raises ValueError."""
    check_depth(text)
    return json.loads(text)


def _keys(raw: str) -> dict[str, str]:
    parsed = load_json(raw) if raw else {}
    if not isinstance(parsed, dict) or "default" in parsed:
        raise ValueError
    for key_id, secret in parsed.items():
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", key_id) or not isinstance(secret, str):
            raise ValueError
        _secret(secret)
    return parsed


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(raw: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", raw) or not low <= int(raw) <= high:
            raise ValueError
        return int(raw)

    return parse


def _seconds(low: float, high: float) -> Callable[[str], float]:
    def parse(raw: str) -> float:
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,6})?", raw) or not low <= float(raw) <= high:
            raise ValueError
        return float(raw)

    return parse


def _scrub_seconds(raw: str) -> int:
    """Not below ONLINE_SECONDS: a younger session still carries packets."""
    return 0 if raw == "0" else _integer(ONLINE_SECONDS, 365 * 86400)(raw)


def _one_of(*words: str) -> Callable[[str], str]:
    def parse(raw: str) -> str:
        if raw not in words:
            raise ValueError
        return raw

    return parse


def _boolean(raw: str) -> bool:
    return _one_of("true", "false")(raw) == "true"


def _schemes(raw: str) -> tuple[str, ...]:
    words = tuple(word.strip() for word in raw.split(","))
    if any(word not in ("legacy", "rfc9421") for word in words):
        raise ValueError
    return words


def _networks(raw: str) -> tuple[IPv4or6Network, ...]:
    if "%" in raw:  # a scope id: any text may follow it
        raise ValueError
    return tuple(ipaddress.ip_network(part.strip()) for part in raw.split(",") if part.strip())


def _subnet(version: int, longest: int) -> Callable[[str], IPv4or6Network | None]:
    def parse(raw: str) -> IPv4or6Network | None:
        if not raw:
            return None
        network = ipaddress.ip_network(raw)
        if "%" in raw or network.version != version or not 1 <= network.prefixlen <= longest:
            raise ValueError
        return network

    return parse


def _ports(raw: str) -> tuple[int, ...]:
    port = _integer(1, 65535)
    return tuple(port(part.strip()) for part in raw.split(",") if part.strip())


def _interface_name(raw: str) -> str | None:
    if not raw:
        return None
    if not re.fullmatch(r"[A-Za-z0-9_=+-][A-Za-z0-9_=+.-]{0,14}", raw):
        raise ValueError
    return raw


def _endpoint(raw: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9.:_\[\]-]{1,253}", raw):
        raise ValueError
    return raw


def _visible(raw: str) -> str:
    """What may stand in a header as it is."""
    if not re.fullmatch(r"[!-~]{1,4096}", raw):
        raise ValueError
    return raw


def _region(raw: str) -> str:
    if not re.fullmatch(r"[a-z0-9-]{1,64}", raw):
        raise ValueError
    return raw


_AUTHORITY = r"(?:[A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
_URL_PATH = r"(?:/[A-Za-z0-9._~-]+)*/?"  # without what would need an encoding


def _url(pattern: str, raw: str) -> str:
    if not re.fullmatch(pattern, raw):
        raise ValueError
    _ = urllib.parse.urlsplit(raw).port  # a ValueError when it is too large
    return raw


def _snapshot_url(raw: str) -> str:
    bucket = r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"
    return _url(rf"https://{_AUTHORITY}{_URL_PATH}|s3://{bucket}{_URL_PATH}", raw)


def _aws_endpoint(raw: str) -> str:
    """Plain http only to this host: what comes back is not authenticated."""
    loopback = r"http://(?:localhost|127\.[0-9.]+|\[::1\])(?::[0-9]{1,5})?"
    return _url(rf"(?:https://{_AUTHORITY}|{loopback}){_URL_PATH}", raw)


def _dns_servers(raw: str) -> dict[str, tuple[str, ...]]:
    parsed = load_json(raw)
    if not isinstance(parsed, dict) or not parsed or "%" in raw:
        raise ValueError
    choices: dict[str, tuple[str, ...]] = {}
    for choice, value in parsed.items():
        addresses = value.split(",") if isinstance(value, str) else value
        if not choice or not isinstance(addresses, list) or not addresses:
            raise ValueError
        choices[choice] = tuple(str(ipaddress.ip_address(a.strip())) for a in addresses)
    return choices


SETTINGS: tuple[Setting, ...] = (
    Setting(
        "GATEWAY_API_KEY", None, _secret, "a text of 16 characters or more", True, required=True
    ),
    Setting(
        "GATEWAY_API_KEYS",
        "",
        _keys,
        'JSON {"key-id": "secret", ...}: ids of A-Z a-z 0-9 . _ - (not "default"), '
        "secrets of 16 characters or more",
        True,
    ),
    Setting("GATEWAY_PUBLIC_KEY", None, _secret, "a text of 16 characters or more", True),
    Setting("MAX_TIMESTAMP_DIFF", "60", _integer(1, 3600), "seconds, 1 to 3600"),
    Setting("AUTH_SCHEMES", "legacy,rfc9421", _schemes, "legacy, rfc9421 or both"),
    Setting("ALLOWED_BACKENDS", "", _networks, "comma-separated CIDRs without host bits"),
    Setting(
        "API_HOST",
        "0.0.0.0",  # noqa: S104  backends are elsewhere; signatures and ALLOWED_BACKENDS guard it
        lambda raw: str(ipaddress.ip_address(raw)),
        "an IP address",
    ),
    Setting("API_PORT", "8000", _integer(1, 65535), "a port, 1 to 65535"),
    Setting("TLS_CERT", "cert.pem", _text, "the path of a PEM file"),
    Setting("TLS_KEY", "key.pem", _text, "the path of a PEM file"),
    Setting("TLS_CLIENT_CA", None, _text, "the path of a PEM file"),
    Setting(
        "WG_INTERFACE",
        "wg0",
        _interface_name,
        "an interface name, at most 15 characters, or nothing",
    ),
    Setting(
        "WG_IPV4_SUBNET",
        "10.0.1.0/24",
        _subnet(4, 30),
        "an IPv4 subnet without host bits, /1 to /30, or nothing",
    ),
    Setting(
        "WG_IPV6_SUBNET",
        "fd42:4242:1::/64",
        _subnet(6, 126),
        "an IPv6 subnet without host bits, /1 to /126, or nothing",
    ),
    Setting("WG_DEFAULT_PORT", "51820", _integer(1, 65535), "a port, 1 to 65535"),
    Setting("WG_EXTRA_PORTS", "", _ports, "comma-separated ports"),
    Setting("WG_ENDPOINT", None, _endpoint, "a host name or address"),
    Setting("WG_PRIVATE_KEY_FILE", "/etc/wireguard/privatekey", _text, "a path"),
    Setting(
        "WG_BACKEND",
        "auto",
        _one_of("auto", "netlink", "uapi", "memory"),
        "auto, netlink, uapi or memory",
    ),
    Setting("WG_ISOLATE", "true", _boolean, "true or false"),
    Setting("WG_MTU", "1420", _integer(1280, 65535), "bytes, 1280 to 65535"),
    Setting("AWG_INTERFACE", None, _interface_name, "an interface name, at most 15 characters"),
    Setting(
        "AWG_IPV4_SUBNET",
        None,
        _subnet(4, 30),
        "an IPv4 subnet without host bits, /1 to /30, or nothing",
    ),
    Setting(
        "AWG_IPV6_SUBNET",
        None,
        _subnet(6, 126),
        "an IPv6 subnet without host bits, /1 to /126, or nothing",
    ),
    Setting("AWG_PORT", "51821", _integer(1, 65535), "a port, 1 to 65535"),
    Setting("AWG_EXTRA_PORTS", "", _ports, "comma-separated ports"),
    Setting("AWG_PRIVATE_KEY_FILE", None, _text, "a path"),
    Setting("AWG_PARAMS", None, _text, "JSON of AmneziaWG's parameters, or a file's path", True),
    Setting(
        "DNS_SERVERS",
        '{"d1":"1.1.1.1","d2":"8.8.8.8","d3":"9.9.9.9"}',
        _dns_servers,
        'JSON {"choice": "address[,address]", ...}',
    ),
    Setting("DB_PATH", "./wireguard.db", _text, "a path"),
    Setting(
        "DURABILITY",
        "commit",
        _one_of("commit", "interval", "none"),
        "commit, interval or none",
    ),
    Setting("SNAPSHOT_INTERVAL", "300", _seconds(0.1, 86400), "seconds, 0.1 to 86400"),
    Setting("SNAPSHOT_KEY", None, _secret, "a text of 16 characters or more", True),
    Setting(
        "SNAPSHOT_URL",
        None,
        _snapshot_url,
        "https://host[:port]/path or s3://bucket[/prefix], of A-Z a-z 0-9 . _ ~ -",
    ),
    Setting("SNAPSHOT_TOKEN", None, _visible, "a bearer token without spaces", True),
    Setting("SNAPSHOT_REQUIRED", "true", _boolean, "true or false"),
    Setting("AWS_ACCESS_KEY_ID", None, _visible, "an access key"),
    Setting("AWS_SECRET_ACCESS_KEY", None, _visible, "a secret key", True),
    Setting("AWS_SESSION_TOKEN", None, _visible, "a session token", True),
    Setting("AWS_REGION", None, _region, "a region such as eu-central-1"),
    Setting("AWS_DEFAULT_REGION", None, _region, "a region such as eu-central-1"),
    Setting("AWS_ENDPOINT_URL", None, _aws_endpoint, "https://host[:port], or http:// on loopback"),
    Setting(
        "AWS_ENDPOINT_URL_S3", None, _aws_endpoint, "https://host[:port], or http:// on loopback"
    ),
    Setting("SAMPLE_INTERVAL", "10", _seconds(0.1, 3600), "seconds, 0.1 to 3600"),
    Setting(
        "LOG_LEVEL",
        "info",
        _one_of("debug", "info", "warning", "error"),
        "debug, info, warning or error",
    ),
    Setting("METRICS_TOKEN", None, _secret, "a text of 16 characters or more", True),
    Setting("MAX_CONNECTIONS", "1024", _integer(8, 65536), "connections, 8 to 65536"),
    Setting("MAX_CONNECTIONS_PER_ADDRESS", "256", _integer(1, 65536), "connections, 1 to 65536"),
    Setting("MAX_AUTH_FAILURES", "100", _integer(1, 10**6), "failures a minute, 1 to 1000000"),
    Setting("PRIVACY_SCRUB", "0", _scrub_seconds, "seconds, 180 to 31536000, or 0 for never"),
    Setting("PER_PEER_METRICS", "false", _boolean, "true or false"),
)


def check_private(name: str, path: str, forbidden: int = 0o027) -> None:
    """Refuse a file of secrets that is too open: `forbidden` are bits of its mode.

    A group may read it unless told otherwise, as Debian does with the keys of its group ssl-cert.
    Pipes and the like are not files. Raises ConfigError, OSError.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISREG(mode) and mode & forbidden:
        raise ConfigError(
            f"{name}: {path!r} can be read or changed by others (mode {mode & 0o777:04o}): "
            f"a file of secrets must be 0600: chmod 600 {shlex.quote(path)}"
        )


def read_env_file(text: str, name: str) -> dict[str, str]:
    """Parse a .env file: KEY=VALUE lines, `export`, #-comments, single or double quotes.

    Raises ConfigError with the file's name and the line's number, never its content.
    """
    values: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(
            r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*"
            r"""(?:"([^"]*)"|'([^']*)'|(?!["'#])(.*?))(?:\s+\#.*)?""",
            line,
        )
        if not match:
            raise ConfigError(f"{name} line {number}: expected KEY=VALUE")
        values[match[1]] = next(g for g in match.groups()[1:] if g is not None)
    return values


def load_config(
    environ: Mapping[str, str], env_file: str | None = None, key_needed: bool = True
) -> Config:
    """Read the settings: environment over file over defaults. Raises ConfigError.

    Without `key_needed` a required setting that is not set is "": for what signs with another key,
    or not at all.
    """
    path = Path(env_file or ".env")
    values: dict[str, str] = {}
    if env_file or path.exists():
        try:
            values = read_env_file(path.read_text("utf-8"), str(path))
            if any(values.get(setting.name) for setting in SETTINGS if setting.secret):
                check_private("--env-file", str(path), 0o022)
                if path.stat().st_mode & 0o004:  # a common slip: better heard of than a node down
                    LOG.warning("%s holds secrets and can be read by everybody: chmod 600", path)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--env-file {path}: cannot be read: {_reason(error)}") from None
    values.update(environ)
    parsed = {s.name.lower(): _parse_setting(s, values, key_needed) for s in SETTINGS}
    config = Config(**parsed)
    _check_together(config)
    return config


def _parse_setting(setting: Setting, values: Mapping[str, str], key_needed: bool) -> Any:
    raw = values.get(setting.name, setting.default)
    if raw is None or (raw == "" and setting.default is None):
        if setting.required and key_needed:
            raise ConfigError(f"{setting.name} is not set: it needs {setting.accepts}")
        return "" if setting.required else None
    try:
        return setting.parse(raw)
    except (ValueError, TypeError, AttributeError):
        shown = "its value (not shown)" if setting.secret else repr(raw[:200])
        raise ConfigError(f"{setting.name}: {shown} is not {setting.accepts}") from None


def _check_together(config: Config) -> None:
    """Rules that need more than one setting."""
    rows = interface_settings(config)
    if not rows:
        raise ConfigError("WG_INTERFACE, AWG_INTERFACE: '' is not accepted for both: set one")
    for row in rows:
        if not row.subnets:
            raise ConfigError(
                f"{row.prefix}_IPV4_SUBNET and {row.prefix}_IPV6_SUBNET: '' is not accepted for "
                f"both ({row.prefix}_INTERFACE is {row.name!r}): set one of them"
            )
    for first, second in itertools.combinations(rows, 2):
        _check_apart(first, second)
    if (config.snapshot_url or "").startswith("s3:") and not (
        config.aws_access_key_id and config.aws_secret_access_key
    ):
        raise ConfigError(
            f"SNAPSHOT_URL: {config.snapshot_url!r} needs AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY"
        )
    for cert, key in ((config.tls_cert, config.tls_key), (config.tls_key, config.tls_cert)):
        if os.path.exists(cert) and not os.path.exists(key):
            raise ConfigError(
                f"TLS_CERT, TLS_KEY: {cert!r} exists but {key!r} does not: "
                "give both, or neither to have a pair made"
            )


def _check_apart(first: InterfaceSettings, second: InterfaceSettings) -> None:
    """Two interfaces must not have a name, a port, an address or a key in common."""
    if first.name == second.name:
        raise ConfigError(
            f"{second.prefix}_INTERFACE: {second.name!r} is {first.prefix}_INTERFACE's, too"
        )
    common = sorted(set(first.ports) & set(second.ports))
    if common:
        raise ConfigError(
            f"{second.prefix}_PORT, {second.prefix}_EXTRA_PORTS: {common[0]} is a port of "
            f"{first.name}, too"
        )
    for family, subnet in second.subnets.items():
        other = first.subnets.get(family)
        if other is not None and subnet.overlaps(cast(Any, other)):
            raise ConfigError(
                f"{second.prefix}_{family.upper()}_SUBNET: {subnet} overlaps "
                f"{other} of {first.name}"
            )
    if first.private_key_file == second.private_key_file:
        raise ConfigError(
            f"{second.prefix}_PRIVATE_KEY_FILE: {second.private_key_file!r} is the key of "
            f"{first.name}, too"
        )


class InterfaceSettings(NamedTuple):
    """What the settings say of one interface; `prefix` begins the names of its variables.

    `ports` are those that a peer may be told: the listen port first.
    """

    prefix: str
    name: str
    subnets: Mapping[str, IPv4or6Network]
    ports: tuple[int, ...]
    mtu: int
    private_key_file: str


def interface_settings(config: Config) -> tuple[InterfaceSettings, ...]:
    """The interfaces that peers can live on: the plain one, the obfuscated one, or both."""
    directory, file_name = os.path.split(config.wg_private_key_file)
    beside = os.path.join(directory, f"awg-{file_name}")
    return tuple(
        InterfaceSettings(prefix, name, _present(four, six), ports, config.wg_mtu, key_file)
        for prefix, name, four, six, ports, key_file in (
            (
                PLAIN_PREFIX,
                config.wg_interface,
                config.wg_ipv4_subnet,
                config.wg_ipv6_subnet,
                (config.wg_default_port, *config.wg_extra_ports),
                config.wg_private_key_file,
            ),
            (
                AWG_PREFIX,
                config.awg_interface,
                config.awg_ipv4_subnet,
                config.awg_ipv6_subnet,
                (config.awg_port, *config.awg_extra_ports),
                config.awg_private_key_file or beside,
            ),
        )
        if name is not None
    )


def _present(
    four: ipaddress.IPv4Network | None, six: ipaddress.IPv6Network | None
) -> dict[str, IPv4or6Network]:
    pairs: tuple[tuple[str, IPv4or6Network | None], ...] = (("ipv4", four), ("ipv6", six))
    return {family: subnet for family, subnet in pairs if subnet is not None}


def _reason(error: BaseException) -> str:
    """What went wrong in the system's words, without paths or values that an error may carry."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return type(error).__name__


# ==================================================================================================
# values: frozen values and their strict parsers; secrets do not show in repr
# Never here: input or output.
# ==================================================================================================

FAMILIES = ("ipv4", "ipv6")
STATUSES = ("active", "suspended")
ADDRESS_FIELD = {"ipv4": "assigned_ip", "ipv6": "assigned_ipv6"}


class Peer(NamedTuple):
    """A peer as it is meant to be: a row of the store, in its column order.

    Addresses are canonical text; times are Unix seconds; tunnel_traffic is "ipv4", "ipv6" or
    "ipv4,ipv6"; obfuscation is JSON text. `id` orders the list and never changes.
    """

    id: int
    public_key: str
    interface: str
    status: str
    status_reason: str | None
    assigned_ip: str | None
    assigned_ipv6: str | None
    tunnel_traffic: str
    dns: str
    port: int
    preshared_key: str | None
    persistent_keepalive: int
    expires_at: int | None
    quota_bytes: int | None
    created_at: int
    request_id: str | None
    obfuscation: str | None

    def __repr__(self) -> str:
        return f"Peer({short_key(self.public_key)}, {self.interface}, {self.status})"


class Traffic(NamedTuple):
    """What was seen of a peer: accumulated bytes, Unix seconds of the last handshake or 0."""

    rx_bytes: int = 0
    tx_bytes: int = 0
    last_handshake: int = 0


class WirePeer(NamedTuple):
    """A peer as an interface holds it: raw keys; allowed IPs as packed address + prefix byte.

    preshared_key is empty when there is none; allowed_ips are sorted, so that equality is enough.
    """

    public_key: bytes
    preshared_key: bytes
    allowed_ips: tuple[bytes, ...]

    def __repr__(self) -> str:
        return f"WirePeer({short_key(encode_key(self.public_key))})"


class PeerState(NamedTuple):
    """A peer as an interface reports it. last_handshake in Unix seconds, 0 for never.

    `located`: the interface knows an endpoint, the client's address. Where it is, nobody asks.
    """

    peer: WirePeer
    last_handshake: int
    rx_bytes: int
    tx_bytes: int
    located: bool = False


class Reading(NamedTuple):
    """What an interface counted since another reading.

    A mark is a hash of all that it says of a peer: the same mark, the same counters.
    """

    peers: int  # on the interface
    changed: list[tuple[int, PeerState]]  # with their marks
    same: set[int]  # the marks of the others


class Change(NamedTuple):
    """A step of an interface: set `public_key` to `peer`, or remove it when `peer` is None."""

    public_key: bytes
    peer: WirePeer | None


def short_key(public_key: str) -> str:
    """Enough of a public key to find a peer by, for logs."""
    return public_key[:8]


def encode_key(raw: bytes) -> str:
    return binascii.b2a_base64(raw, newline=False).decode("ascii")


# The last of 43 digits carries four bits: its two others are zero.
_KEY = re.compile(r"[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=")
NO_KEY = "A" * 43 + "="  # WireGuard takes 32 zero bytes for none


def decode_key(text: str) -> bytes:
    """44 characters of canonical base64 -> 32 bytes. Raises ValueError."""
    if not _KEY.fullmatch(text):
        raise ValueError("not a key")
    return binascii.a2b_base64(text)


def key_from_path(segment: str) -> str | None:
    """A path's key in any of its forms (percent-encoding, _ and -, no final =), or None."""
    text = urllib.parse.unquote(segment).replace("_", "/").replace("-", "+")
    try:
        return encode_key(decode_key(text if text.endswith("=") else text + "="))
    except ValueError:
        return None


def pack_network(address: str) -> bytes:
    """An address's text as an allowed IP of one host: packed address + prefix length byte."""
    if ":" in address:
        return socket.inet_pton(socket.AF_INET6, address) + b"\x80"
    return socket.inet_pton(socket.AF_INET, address) + b"\x20"


def wire_peer(peer: Peer) -> WirePeer:
    """What the interface must hold for this peer while it is active."""
    return encode_wire(peer.public_key, peer.preshared_key, peer.assigned_ip, peer.assigned_ipv6)


def encode_wire(public_key: str, preshared_key: str | None, *addresses: str | None) -> WirePeer:
    return WirePeer(
        binascii.a2b_base64(public_key),
        binascii.a2b_base64(preshared_key) if preshared_key else b"",
        tuple(sorted([pack_network(address) for address in addresses if address])),
    )


_ROW_TEXTS = ("public_key", "interface", "tunnel_traffic", "dns")
_ROW_TEXTS_OR_NONE = ("status_reason", "preshared_key", "request_id", "obfuscation")
_ROW_RANGES = {
    "id": (1, MAX_INTEGER // 2),
    "port": (1, 65535),
    "persistent_keepalive": (0, 65535),
    "created_at": (0, MAX_TIME),
    "expires_at": (0, MAX_TIME),
    "quota_bytes": (0, MAX_INTEGER),
}


def verify_peer(peer: Peer) -> None:
    """Check a row from outside as a request's fields are checked. Raises ValueError, TypeError."""
    row = peer._asdict()
    texts = [row[name] for name in _ROW_TEXTS]
    texts += [row[name] for name in _ROW_TEXTS_OR_NONE if row[name] is not None]
    if any(type(text) is not str for text in texts):
        raise ValueError("a text is no text")
    for name, (low, high) in _ROW_RANGES.items():
        number = row[name]
        if number is None and name in ("expires_at", "quota_bytes"):
            continue
        if type(number) is not int or not low <= number <= high:
            raise ValueError(f"{name} is out of range")
    if peer.status not in STATUSES:
        raise ValueError("status")
    decode_key(peer.public_key)
    if peer.preshared_key is not None:
        decode_key(peer.preshared_key)
    for address, version in ((peer.assigned_ip, 4), (peer.assigned_ipv6, 6)):
        if address is not None and verify_address(address) != version:
            raise ValueError("an address is not of its family")
    if peer.tunnel_traffic not in (*FAMILIES, ",".join(FAMILIES)):
        raise ValueError("tunnel_traffic")
    if peer.obfuscation is not None:
        decode_own_values(peer.obfuscation)


def verify_address(text: str) -> int:
    """Check an address's text from outside; returns 4 or 6. Raises ValueError."""
    address = ipaddress.ip_address(text)
    if "%" in text or str(address) != text:  # %: a zone
        raise ValueError("an address is not in its canonical form")
    return address.version


def rfc3339(seconds: int | float) -> str:
    return _rfc3339(int(seconds))


@functools.lru_cache(maxsize=1024)
def _rfc3339(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_rfc3339(text: str) -> int:
    """RFC 3339 section 5.6 -> Unix seconds, fractions dropped. Raises ValueError."""
    match = re.fullmatch(
        r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)", text, re.ASCII
    )
    if not match:
        raise ValueError("not RFC 3339")
    zone = "+00:00" if match[3] in "Zz" else match[3]
    try:
        seconds = int(datetime.fromisoformat(f"{match[1]}T{match[2]}{zone}").timestamp())
    except OverflowError:
        raise ValueError("out of range") from None
    if not 0 <= seconds <= MAX_TIME:
        raise ValueError("out of range")
    return seconds


def diff(
    desired: Iterable[WirePeer], actual: dict[bytes, WirePeer]
) -> Iterator[tuple[str, Change]]:
    """What turns `actual` into `desired`: ("added" | "updated" | "removed", change).

    Consumes `actual`. Removals come last out of here but must be applied first where addresses
    moved: callers order them. Peers that are right do not appear.
    """
    for peer in desired:
        present = actual.pop(peer.public_key, None)
        if present is None:
            yield "added", Change(peer.public_key, peer)
        elif present != peer:
            yield "updated", Change(peer.public_key, peer)
    for public_key in actual:
        yield "removed", Change(public_key, None)


# --- AmneziaWG: what an obfuscated interface and its clients agree on (docs/AMNEZIAVPN.md) --------

GENERATIONS = ("1.0", "1.5", "2.0", "3.0", "3.1")
DEFAULT_GENERATION, DEFAULT_PRESET = "2.0", "default"


class Span(NamedTuple):
    """A range of numbers, ends included; written "a-b", or "a" when it is one number."""

    low: int
    high: int

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


class Obfuscation(NamedTuple):
    """An AmneziaWG interface's parameters, under their UAPI names.

    The defaults are those of a new interface: what goes over the wire is then plain WireGuard.
    """

    jc: int = 0
    jmin: int = 0
    jmax: int = 0
    s1: int = 0
    s2: int = 0
    s3: int = 0
    s4: int = 0
    h1: Span = Span(1, 1)
    h2: Span = Span(2, 2)
    h3: Span = Span(3, 3)
    h4: Span = Span(4, 4)
    i1: str = ""
    i2: str = ""
    i3: str = ""
    i4: str = ""
    i5: str = ""
    header_protection_key: bytes = b""
    content_padding_addition: Span = Span(0, 0)
    rekey_after_time: Span = Span(0, 0)
    rekey_timeout: Span = Span(0, 0)
    reject_after_time: Span = Span(0, 0)
    keepalive_timeout: Span = Span(0, 0)
    max_handshake_attempts: Span = Span(0, 0)
    random_trailers: bool = False
    disable_cookies: bool = False

    def __repr__(self) -> str:  # the header protection key is a secret
        return f"Obfuscation(jc={self.jc}, s1={self.s1}, s2={self.s2})"


class ObfuscationState(NamedTuple):
    """What an interface speaks: `version` counts the changes that cut clients off."""

    version: int
    generation: str
    parameters: Obfuscation


class ObfuscationRequest(NamedTuple):
    """What a create asks for: an obfuscated interface or not, and values by their UAPI names."""

    enabled: bool
    values: Mapping[str, Any]


def _awg_number(high: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,10}", value):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= high:
            raise ValueError
        return value

    return parse


def _awg_span(high: int) -> Callable[[Any], Span]:
    number = _awg_number(high)

    def parse(value: Any) -> Span:
        low, dash, top = value.partition("-") if isinstance(value, str) else (value, "", "")
        span = Span(number(low), number(top if dash else low))
        if span.low > span.high:
            raise ValueError
        return span

    return parse


parse_span = _awg_span(2**32 - 1)

_PACKET_TAG = re.compile(r"<(?:b 0x((?:[0-9a-fA-F]{2})+)|(r|rd|rc) ([0-9]{1,4})|(t))>")


def packet_size(text: str) -> int:
    """Bytes of the packet that a sequence of tags describes. Raises ValueError."""
    size = position = 0
    while position < len(text):
        tag = _PACKET_TAG.match(text, position)
        if tag is None:
            raise ValueError("not a sequence of tags")
        size += 4 if tag[4] else int(tag[3]) if tag[2] else len(tag[1]) // 2
        position = tag.end()
    return size


def _awg_packet(value: Any) -> str:
    if not isinstance(value, str) or (value and not 1 <= packet_size(value) <= MAX_DECOY):
        raise ValueError
    return value


def _awg_key(value: Any) -> bytes:
    if value == "":
        return b""
    raw = decode_key(value)
    if not any(raw):
        raise ValueError
    return raw


def _awg_flag(value: Any) -> bool:
    return {True: True, False: False, "true": True, "false": False}[value]


class AwgParameter(NamedTuple):
    """A row of the parameters' table. `shared`: both sides must have the same value.

    `kind` selects the encoding for an interface, `attribute` is netlink's number.
    """

    spelling: str
    attribute: int
    kind: str
    shared: bool
    since: str
    parse: Callable[[Any], Any]
    accepts: str


def _size(spelling: str, attribute: int, high: int, since: str = "1.0") -> AwgParameter:
    shared = spelling.startswith("S")
    accepts = f"a number, 0 to {high}"
    return AwgParameter(spelling, attribute, "size", shared, since, _awg_number(high), accepts)


def _header(spelling: str, attribute: int) -> AwgParameter:
    accepts = 'a number of 32 bits or a range "a-b" of them'
    return AwgParameter(spelling, attribute, "header", True, "1.0", parse_span, accepts)


def _packet(spelling: str, attribute: int) -> AwgParameter:
    accepts = (
        f"a sequence of <b 0xHEX>, <r N>, <rd N>, <rc N>, <t> for 1 to {MAX_DECOY} bytes, or empty"
    )
    return AwgParameter(spelling, attribute, "packet", False, "1.5", _awg_packet, accepts)


def _range(spelling: str, attribute: int) -> AwgParameter:
    accepts = 'a number, 0 to 65535, or a range "a-b" of them'
    return AwgParameter(spelling, attribute, "range", False, "3.0", _awg_span(65535), accepts)


def _flag(spelling: str, attribute: int) -> AwgParameter:
    return AwgParameter(spelling, attribute, "flag", False, "3.1", _awg_flag, "true or false")


# Padded handshake packets stay below the smallest path MTU: 148, 92 and 64 bytes before padding.
AWG_PARAMETERS: dict[str, AwgParameter] = {
    "jc": _size("Jc", 9, MAX_JUNK_PACKETS),
    "jmin": _size("Jmin", 10, MAX_DECOY),
    "jmax": _size("Jmax", 11, MAX_DECOY),
    "s1": _size("S1", 12, MAX_DECOY - 148),
    "s2": _size("S2", 13, MAX_DECOY - 92),
    "s3": _size("S3", 19, MAX_DECOY - 64, "2.0"),
    "s4": _size("S4", 20, MAX_DECOY - 32, "2.0"),
    "h1": _header("H1", 14),
    "h2": _header("H2", 15),
    "h3": _header("H3", 16),
    "h4": _header("H4", 17),
    "i1": _packet("I1", 21),
    "i2": _packet("I2", 22),
    "i3": _packet("I3", 23),
    "i4": _packet("I4", 24),
    "i5": _packet("I5", 25),
    "header_protection_key": AwgParameter(
        "HeaderProtectionKey", 26, "key", True, "3.0", _awg_key, "44 characters of base64, not zero"
    ),
    "content_padding_addition": _range("ContentPaddingAddition", 27),
    "rekey_after_time": _range("RekeyAfterTime", 28),
    "rekey_timeout": _range("RekeyTimeout", 29),
    "reject_after_time": _range("RejectAfterTime", 30),
    "keepalive_timeout": _range("KeepaliveTimeout", 31),
    "max_handshake_attempts": _range("MaxHandshakeAttempts", 32),
    "random_trailers": _flag("RandomTrailers", 33),
    "disable_cookies": _flag("DisableCookies", 34),
}

PLAIN = Obfuscation()
AWG_SHARED = tuple(name for name, row in AWG_PARAMETERS.items() if row.shared)
AWG_OWN = tuple(name for name, row in AWG_PARAMETERS.items() if not row.shared)
_AWG_NAMES = {
    **{name: name for name in AWG_PARAMETERS},
    **{row.spelling: name for name, row in AWG_PARAMETERS.items()},
}
_HEADERS = ("h1", "h2", "h3", "h4")
_PACKETS = ("i1", "i2", "i3", "i4", "i5")


def _headers(given: Obfuscation) -> list[Span]:
    return [getattr(given, name) for name in _HEADERS]


def _headers_apart(given: Obfuscation) -> bool:
    spans = sorted(_headers(given))
    return all(left.high < right.low for left, right in itertools.pairwise(spans))


class AwgRule(NamedTuple):
    """What must hold between parameters, in the words of an error."""

    text: str
    holds: Callable[[Obfuscation], bool]


AWG_RULES: tuple[AwgRule, ...] = (
    AwgRule("Jmin, Jmax: Jmin must not be above Jmax", lambda p: p.jmin <= p.jmax),
    AwgRule(
        "S1, S2: S1 + 148 must not be S2 + 92: both handshake packets would have one size",
        lambda p: p.s1 + 148 != p.s2 + 92,
    ),
    AwgRule(
        "H1, H2, H3, H4: each must be 5 or more (or all of them WireGuard's own 1, 2, 3, 4)",
        lambda p: _headers(p) == _headers(PLAIN) or min(_headers(p)).low >= 5,
    ),
    AwgRule("H1, H2, H3, H4: must not overlap", _headers_apart),
    AwgRule(
        "HeaderProtectionKey, S1, S2, S3, S4: with a key each of the four must be 12 or more",
        lambda p: not p.header_protection_key or min(p.s1, p.s2, p.s3, p.s4) >= 12,
    ),
    AwgRule(
        f"I1, I2, I3, I4, I5: must have {MAX_DECOY_TEXT} characters or fewer together",
        lambda p: sum(len(getattr(p, name)) for name in _PACKETS) <= MAX_DECOY_TEXT,
    ),
)


def check_obfuscation(given: Obfuscation) -> None:
    """Raise ValueError with the names and the rule that a set of parameters breaks."""
    for rule in AWG_RULES:
        if not rule.holds(given):
            raise ValueError(rule.text)


def parse_awg_value(name: str, value: Any) -> Any:
    """One parameter's value as JSON has it. Raises ValueError with its spelling and the rule."""
    row = AWG_PARAMETERS[name]
    try:
        return row.parse(value)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{row.spelling}: must be {row.accepts}") from None


def awg_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters among a JSON object's members, in either spelling. Raises ValueError."""
    values: dict[str, Any] = {}
    for key, value in given.items():
        name = _AWG_NAMES.get(key)
        if name is None or value is None:
            continue
        if name in values:
            raise ValueError(f"{AWG_PARAMETERS[name].spelling}: is given twice")
        values[name] = parse_awg_value(name, value)
    return values


def parse_obfuscation(given: Mapping[str, Any]) -> ObfuscationState:
    """A whole set of parameters, with "generation" or the first one that has all of them.

    Raises ValueError: names that are not known are refused, too.
    """
    for key in given:
        if key not in _AWG_NAMES and key not in ("generation", "parameters_version"):
            raise ValueError(f"{str(key)[:40]}: is not a parameter of AmneziaWG")
    parameters = Obfuscation(**awg_values(given))
    check_obfuscation(parameters)
    generation = given.get("generation") or generation_of(parameters)
    check_generation(parameters, generation)
    version = given.get("parameters_version", 1)
    if type(version) is not int or not 1 <= version <= MAX_INTEGER // 2:
        raise ValueError("parameters_version: must be a number, 1 or more")
    return ObfuscationState(version, generation, parameters)


def _since(name: str, value: Any) -> str:
    """The first generation that can express this value."""
    if name in _HEADERS and value.low != value.high:
        return "2.0"
    return AWG_PARAMETERS[name].since


def generation_of(given: Obfuscation) -> str:
    """The first generation that knows every parameter that is set."""
    return max((_since(name, value) for name, value in _set_values(given)), default="1.0")


def check_generation(given: Obfuscation, generation: str) -> None:
    """Raise ValueError when a parameter is not known to clients of a generation."""
    if generation not in GENERATIONS:
        raise ValueError(f"generation: must be one of {', '.join(GENERATIONS)}")
    for name, value in _set_values(given):
        if _since(name, value) > generation:
            what = f"{AWG_PARAMETERS[name].spelling}: {'a range' if name in _HEADERS else 'it'}"
            raise ValueError(f"{what} came with generation {_since(name, value)}, not {generation}")


def _set_values(given: Obfuscation) -> Iterator[tuple[str, Any]]:
    """The parameters that are not as a new interface has them."""
    for name, value, default in zip(Obfuscation._fields, given, PLAIN, strict=True):
        if value != default:
            yield name, value


def show_awg_value(value: Any) -> Any:
    """A parameter as JSON: numbers, texts "a-b", base64, booleans."""
    if isinstance(value, Span):
        return value.low if value.low == value.high else str(value)
    return encode_key(value) if isinstance(value, bytes) else value


def show_parameters(given: Obfuscation) -> dict[str, Any]:
    """The parameters that are set, and those that every generation has."""
    always = ("jc", "jmin", "jmax", "s1", "s2", *_HEADERS)
    chosen = {*always, *(name for name, _ in _set_values(given))}
    return {n: show_awg_value(getattr(given, n)) for n in Obfuscation._fields if n in chosen}


def show_state(state: ObfuscationState) -> dict[str, Any]:
    """What parse_obfuscation() takes."""
    return {
        "generation": state.generation,
        "parameters_version": state.version,
        **show_parameters(state.parameters),
    }


def encode_own_values(values: Mapping[str, Any]) -> str:
    """A client's own values as Peer.obfuscation holds them."""
    return json.dumps({name: show_awg_value(value) for name, value in values.items()})


def decode_own_values(text: str) -> dict[str, Any]:
    """What encode_own_values() was given. Raises ValueError, TypeError."""
    given = load_json(text)
    if not isinstance(given, dict) or not given.keys() <= set(AWG_OWN):
        raise ValueError("obfuscation")
    return awg_values(given)


def encode_state(state: ObfuscationState) -> str:
    return json.dumps(show_state(state))


def same_language(left: Obfuscation, right: Obfuscation) -> bool:
    """Whether a client of the one can talk to an interface of the other."""
    return all(getattr(left, name) == getattr(right, name) for name in AWG_SHARED)


class AwgPreset(NamedTuple):
    """What generated parameters are drawn from; `packets` are templates for I1, I2, ..."""

    text: str
    junk_count: Span
    junk_low: Span
    junk_high: Span
    padding: Span  # of S1 to S3
    transport: Span  # S4, bytes that each packet costs
    packets: tuple[str, ...]


# A DNS query's head (RFC 1035 section 4.1) for A of a name of ten random letters under .com
_DNS_QUERY = "<r 2><b 0x010000010000000000000a><rc 10><b 0x03636f6d0000010001>"
PRESETS: dict[str, AwgPreset] = {
    "default": AwgPreset(
        "values that have worked in practice",
        Span(3, 5), Span(40, 40), Span(70, 70), Span(15, 150), Span(12, 20), ("<r {size}>",),
    ),
    "light": AwgPreset(
        "fewest bytes: mobile clients, small MTUs",
        Span(2, 3), Span(24, 32), Span(48, 64), Span(15, 40), Span(12, 12), (),
    ),
    "strong": AwgPreset(
        "more junk and padding, where light obfuscation is recognised",
        Span(6, 9), Span(50, 120), Span(400, 900), Span(60, 300), Span(20, 36),
        ("<r {size}>", "<rd {size}>", "<b 0x{hex}><r {size}>"),
    ),
    "dns": AwgPreset(
        "begins like a DNS query",
        Span(3, 5), Span(40, 40), Span(70, 70), Span(15, 150), Span(12, 20), (_DNS_QUERY,),
    ),
}  # fmt: skip


def generate_obfuscation(generation: str, preset: str) -> ObfuscationState:
    """Random parameters that stay inside a generation. Raises ValueError."""
    if generation not in GENERATIONS:
        raise ValueError(f"generation: must be one of {', '.join(GENERATIONS)}")
    if preset not in PRESETS:
        raise ValueError(f"preset: must be one of {', '.join(PRESETS)}")
    drawn = PRESETS[preset]
    if preset == "dns" and generation < "1.5":
        raise ValueError("preset: dns needs I1, which came with generation 1.5")
    values: dict[str, Any] = {
        "jc": _draw(drawn.junk_count),
        "jmin": _draw(drawn.junk_low),
        "jmax": _draw(drawn.junk_high),
        **_draw_paddings(drawn, generation),
        **_draw_headers(generation),
    }
    if generation >= "1.5":
        values |= {f"i{n}": _draw_packet(text) for n, text in enumerate(drawn.packets, 1)}
    if generation >= "3.0":
        values["header_protection_key"] = secrets.token_bytes(KEY_BYTES)
        values["content_padding_addition"] = Span(_draw(Span(1, 16)), _draw(Span(32, 96)))
        values["rekey_after_time"] = Span(_draw(Span(90, 105)), _draw(Span(110, 120)))
    if generation >= "3.1":
        values["random_trailers"] = True
    parameters = Obfuscation(**values)
    check_obfuscation(parameters)
    check_generation(parameters, generation)
    return ObfuscationState(1, generation, parameters)


def _draw(span: Span) -> int:
    return span.low + secrets.randbelow(span.high - span.low + 1)


def _draw_paddings(drawn: AwgPreset, generation: str) -> dict[str, int]:
    """S1 to S4 so that no two padded packets, nor a plain one, have one size."""
    names = ("s1", "s2", "s3", "s4") if generation >= "2.0" else ("s1", "s2")
    sizes = {"s1": 148, "s2": 92, "s3": 64, "s4": 32}  # s4: a keepalive
    while True:
        values = {n: _draw(drawn.transport if n == "s4" else drawn.padding) for n in names}
        padded = {sizes[name] + value for name, value in values.items()}
        if len(padded) == len(names) and not padded & set(sizes.values()):
            return values


def _draw_headers(generation: str) -> dict[str, Span]:
    """Four in random order, one out of each quarter of the positive 31-bit numbers."""
    quarter = 2**29
    quarters = [Span(max(n * quarter, 5), (n + 1) * quarter - 1) for n in range(4)]
    spans: list[Span] = []
    for whole in quarters:
        width = secrets.randbelow(2**24) + 2**16 if generation >= "2.0" else 0
        low = _draw(Span(whole.low, whole.high - width))
        spans.append(Span(low, low + width))
    secrets.SystemRandom().shuffle(spans)
    return dict(zip(_HEADERS, spans, strict=True))


def _draw_packet(template: str) -> str:
    return template.format(size=_draw(Span(24, 160)), hex=secrets.token_hex(_draw(Span(4, 12))))


# --- fields of a request: each parser takes a JSON value (or a query's text), raises ValueError ---

Schema = Mapping[str, Any]  # JSON Schema 2020-12


def _field_text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise ValueError
    value.encode("utf-8")  # a lone surrogate is a UnicodeEncodeError, a ValueError
    return value


def _field_long_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _field_key(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    decode_key(value)
    return value


def _field_public_key(value: Any) -> str:
    text = _field_key(value)
    if text == NO_KEY:  # no peer has it, and interfaces drop it silently
        raise ValueError
    return text


def _field_families(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or any(entry not in FAMILIES for entry in value):
        raise ValueError
    return tuple(family for family in FAMILIES if family in value)


def _field_ipv4(value: Any) -> str:
    return _address_text(socket.AF_INET, _field_text(value))


def _field_ipv6(value: Any) -> str:
    return _address_text(socket.AF_INET6, _field_text(value))


def _address_text(family: int, text: str) -> str:
    """An address as AddressPool writes it, in a fifth of the time that ipaddress takes."""
    try:
        return socket.inet_ntop(family, socket.inet_pton(family, text))
    except OSError:
        raise ValueError from None


def _field_flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _field_time(value: Any) -> int:
    return parse_rfc3339(_field_text(value))


def _field_obfuscation(value: Any) -> ObfuscationRequest:
    if isinstance(value, bool):
        return ObfuscationRequest(value, {})
    enabled = value.get("enabled", False) if isinstance(value, dict) else None
    if not isinstance(enabled, bool):
        raise ValueError
    try:
        return ObfuscationRequest(enabled, awg_values(value) if enabled else {})
    except ValueError as error:
        raise Invalid("obfuscation", str(error)) from None


def _field_parameters(value: Any) -> ObfuscationState:
    if not isinstance(value, dict):
        raise ValueError
    try:
        return parse_obfuscation(value)
    except ValueError as error:
        raise Invalid("parameters", str(error)) from None


class Field(NamedTuple):
    """A field of a body or a query: its parser, what it accepts in an error's words, its schema.

    `note` says what it is for, in the description. Where it is not required, null is as good as
    absent, unless `null` says that it is a value.
    """

    parse: Callable[[Any], Any]
    accepts: str
    schema: Schema
    note: str = ""
    required: bool = False
    null: bool = False

    @property
    def description(self) -> str:
        return f"{self.accepts}; {self.note}" if self.note else self.accepts


def integer_field(low: int, high: int, accepts: str, note: str = "") -> Field:
    def parse(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError
        return value

    return Field(parse, accepts, {"type": "integer", "minimum": low, "maximum": high}, note)


def choice_field(words: Sequence[str], accepts: str = "", note: str = "") -> Field:
    def parse(value: Any) -> str:
        if not isinstance(value, str) or value not in words:
            raise ValueError
        return value

    accepts = accepts or f"one of {', '.join(words)}"
    return Field(parse, accepts, {"type": "string", "enum": list(words)}, note)


def nullable(row: Field) -> Field:
    """The field when null is a value of its own."""

    def parse(value: Any) -> Any:
        return None if value is None else row.parse(value)

    accepts = f"{row.accepts}, or null"
    return row._replace(parse=parse, accepts=accepts, schema=or_null(row.schema), null=True)


def or_null(schema: Schema) -> Schema:
    """The schema of a value that may be null, too."""
    if "$ref" in schema:
        return {"anyOf": [schema, {"type": "null"}]}
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    enum = {"enum": [*schema["enum"], None]} if "enum" in schema else {}
    return {**schema, **enum, "type": [*kinds, "null"]}


# base64 of 32 bytes: the last character before "=" carries 4 bits
KEY_SCHEMA: Schema = {"type": "string", "pattern": "^[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=$"}
TIME_SCHEMA: Schema = {"type": "string", "format": "date-time"}
FAMILIES_SCHEMA: Schema = {"type": "array", "items": {"type": "string", "enum": list(FAMILIES)}}
TEXT_SCHEMA: Schema = {"type": "string", "maxLength": MAX_TEXT}

PUBLIC_KEY_FIELD = Field(
    _field_public_key, "44 characters of base64, a 32-byte public key", KEY_SCHEMA, required=True
)

CREATE_FIELDS: dict[str, Field] = {
    "public_key": PUBLIC_KEY_FIELD,
    "request_id": Field(
        _field_text, f"a text of at most {MAX_TEXT} characters", TEXT_SCHEMA, "kept and shown"
    ),
    "protocol": choice_field(
        (*FAMILIES, "dual"),
        'null, "ipv4", "ipv6" or "dual"',
        "an address is assigned in each, and in those of tunnel_traffic; in IPv4 without either",
    ),
    "tunnel_traffic": Field(
        _field_families,
        'a list of "ipv4", "ipv6"',
        FAMILIES_SCHEMA,
        "what the client sends through the tunnel, default the families of its addresses",
    ),
    "port": integer_field(
        1, 65535, "a port that the gateway listens on", "UDP, default WG_DEFAULT_PORT"
    ),
    "dns": Field(_field_text, "a key of DNS_SERVERS", TEXT_SCHEMA, "default the first"),
    "preshared_key": Field(
        _field_key,
        "44 characters of base64, 32 bytes",
        KEY_SCHEMA,
        "shown in ?format=wg-quick only",
    ),
    "persistent_keepalive": integer_field(
        0, 65535, "seconds, 0 to 65535", "for the client's configuration, default 25"
    ),
    "expires_at": Field(
        _field_time, "an RFC 3339 time with a zone", TIME_SCHEMA, "when the peer is suspended"
    ),
    "quota_bytes": integer_field(
        0,
        MAX_INTEGER,
        "a number of bytes, 0 or more",
        "received and sent together: when it has used more, the peer is suspended",
    ),
    "assigned_ip": Field(
        _field_ipv4, "an IPv4 address", {"type": "string", "format": "ipv4"}, "ask for this one"
    ),
    "assigned_ipv6": Field(
        _field_ipv6, "an IPv6 address", {"type": "string", "format": "ipv6"}, "ask for this one"
    ),
    "obfuscation": Field(
        _field_obfuscation,
        'an object with "enabled": true or false, and AmneziaWG\'s parameters',
        {"type": ["object", "boolean"], "properties": {"enabled": {"type": "boolean"}}},
        "whether the peer lives on the AmneziaWG interface, and the client's own values",
    ),
}

SEALED_FIELDS: dict[str, Field] = {
    "encrypted_payload": Field(
        _field_long_text,
        "base64 text",
        {"type": "string"},
        "the other fields, encrypted: they win over those in clear",
        required=True,
    ),
}

# What a PATCH may change; null takes away what may be missing, and is refused elsewhere.
PATCH_FIELDS: dict[str, Field] = {
    **{
        n: CREATE_FIELDS[n]._replace(null=True)
        for n in ("dns", "tunnel_traffic", "port", "persistent_keepalive")
    },
    **{n: nullable(CREATE_FIELDS[n]) for n in ("expires_at", "quota_bytes", "preshared_key")},
}

ROTATE_FIELDS: dict[str, Field] = {"new_public_key": PUBLIC_KEY_FIELD}

OBFUSCATION_FIELDS: dict[str, Field] = {
    "parameters": Field(
        _field_parameters,
        "an object with all of AmneziaWG's parameters",
        {"type": "object"},
        "default random ones",
    ),
    "generation": choice_field(GENERATIONS, "", f"of random ones, default {DEFAULT_GENERATION}"),
    "preset": choice_field(tuple(PRESETS), "", f"of random ones, default {DEFAULT_PRESET}"),
    "confirm": Field(
        _field_flag, "true or false", {"type": "boolean"}, "that peers may be cut off"
    ),
}

STATUS_FIELDS: dict[str, Field] = {
    "status": choice_field(STATUSES, '"active" or "suspended"')._replace(required=True),
}


# An element of a desired state: what create takes or a list shows. What is not given stays.
SYNC_FIELDS: dict[str, Field] = {
    **CREATE_FIELDS,
    **{n: nullable(CREATE_FIELDS[n]) for n in ("expires_at", "quota_bytes", "preshared_key")},
    "status": choice_field(STATUSES),
    "interface": Field(_field_text, "the name of an interface", TEXT_SCHEMA),
}


def parse_fields(given: Mapping[str, Any], table: Mapping[str, Field]) -> dict[str, Any]:
    """Decode the fields of a table; what it does not know is ignored. Raises Invalid."""
    parsed: dict[str, Any] = {}
    for name, value in given.items():
        row = table.get(name)
        if row is None or (value is None and not row.null):
            continue
        try:
            parsed[name] = row.parse(value)
        except (ValueError, TypeError):
            raise Invalid(name, f"must be {row.accepts}") from None
    for name, row in table.items():
        if row.required and name not in parsed:
            raise Invalid(name, f"is required: {row.accepts}")
    return parsed


def fields_schema(table: Mapping[str, Field]) -> Schema:
    """What parse_fields() accepts, as the schema of an object."""
    required = [name for name, row in table.items() if row.required]
    return {
        "type": "object",
        "properties": {
            name: {
                **(row.schema if row.required or row.null else or_null(row.schema)),
                "description": row.description,
            }
            for name, row in table.items()
        },
        **({"required": required} if required else {}),
    }


# ==================================================================================================
# crypto: who signed a request, sealed payloads, keys and certificates; the clock is passed in
# Never here: HTTP objects.
# ==================================================================================================


class Caller(NamedTuple):
    """Who signed a request: the key's id and the scheme."""

    key_id: str
    scheme: str


class SignedMessage(NamedTuple):
    """What signatures can cover of a request. `target` is path and query as sent."""

    method: str
    authority: str
    target: str
    headers: Mapping[bytes, bytes]
    length: int

    def __repr__(self) -> str:  # signatures are among the headers
        return f"SignedMessage({self.method})"


class Authenticator:
    """Verifies signatures of both schemes. `clock` gives Unix seconds.

    A signature of RFC 9421 is accepted once: nonces are remembered for as long as their `created`
    could be accepted. Over a restart only those of clients whose clock is ahead of this one are
    kept, in a file (see NonceGuard.keep); what was created before the start is refused.
    """

    def __init__(
        self,
        keys: Mapping[str, str],
        window: int,
        clock: Callable[[], float],
        schemes: Sequence[str] = ("legacy", "rfc9421"),
    ) -> None:
        self._keys: dict[str, hmac.HMAC] = {}
        self._window = window
        self._clock = clock
        self._started = int(clock())
        self.nonces = NonceGuard()
        self.reload(keys, schemes)

    def reload(self, keys: Mapping[str, str], schemes: Sequence[str]) -> None:
        """Take over new keys; the window stays, because nonces are remembered for that long."""
        self._keys = {
            key_id: hmac.new(secret.encode("utf-8"), digestmod="sha256")
            for key_id, secret in keys.items()
        }
        self._schemes = schemes

    def verify(self, message: SignedMessage) -> Caller:
        """Check a request's head by the scheme it uses. Raises Unauthorized, TooManyRequests."""
        if b"signature-input" in message.headers:
            if "rfc9421" in self._schemes:
                return self._verify_rfc9421(message)
        elif "legacy" in self._schemes:
            return self.verify_legacy(
                message.headers.get(b"signature", b""),
                message.headers.get(b"timestamp", b""),
                message.length,
            )
        raise Unauthorized(NOT_AUTHENTIC)

    def verify_legacy(self, signature: bytes, timestamp: bytes, body_length: int) -> Caller:
        """Check `signature` over timestamp and length, then the time. Raises Unauthorized."""
        signed = legacy_message(timestamp, body_length)
        given = signature.lower()
        caller = None
        for key_id, key in self._keys.items():  # all of them: the time taken tells nothing
            expected = _mac(key, signed).hex().encode("ascii")
            if hmac.compare_digest(expected, given):
                caller = Caller(key_id, "legacy")
        if caller is None or not re.fullmatch(rb"[0-9]{1,12}", timestamp):
            raise Unauthorized(NOT_AUTHENTIC)
        self._check_time(int(timestamp))
        return caller

    def _verify_rfc9421(self, message: SignedMessage) -> Caller:
        """RFC 9421 section 3.2; one good signature of several is enough."""
        for given in parse_signatures(message.headers):
            key = self._keys.get(given.key_id)
            base = signature_base(message, given)
            if key is None or base is None or not _covers_enough(message, given):
                continue
            if hmac.compare_digest(_mac(key, base), given.signature):
                self._check_fresh(given)
                return Caller(given.key_id, "rfc9421")
        raise Unauthorized(NOT_AUTHENTIC)

    def _check_time(self, created: int) -> int:
        now = self._clock()
        if abs(now - created) > self._window:
            raise Unauthorized(
                f"the timestamp is outside the window of {self._window} s; "
                f"the server's time is {int(now)} ({rfc3339(now)})",
                "time",
            )
        return int(now)

    def _check_fresh(self, given: MessageSignature) -> None:
        now = self._check_time(given.created)
        if given.expires is not None and given.expires < now:
            raise Unauthorized(f"the signature has expired; the server's time is {now}", "time")
        if given.created <= self._started:
            wait = str(max(1, self._started + 1 - now))
            raise Unauthorized(
                "signatures from before the gateway's start are not accepted: sign again",
                "start",
                [("Retry-After", wait)],
            )
        until = given.created + self._window
        if not self.nonces.first_use(given.key_id, given.nonce, until, now, given.created > now):
            raise Unauthorized("the nonce was used before", "replay")


NOT_AUTHENTIC = "the request is not authentic"


def _mac(key: hmac.HMAC, message: bytes) -> bytes:
    """HMAC by a copy of a keyed object: half of hmac.digest()'s time, and the GIL is kept."""
    mac = key.copy()
    mac.update(message)
    return mac.digest()


class NonceGuard:
    """Remembers nonces until their time is over; never forgets a live one to make room.

    It is over when it is over by the clock and by `steady` (seconds since anything): a clock that
    jumps ahead and comes back makes no signature new again.
    """

    def __init__(
        self, limit: int = MAX_NONCES, steady: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit = limit
        self._steady = steady
        self._lock = threading.Lock()
        self._live: set[bytes] = set()
        # by their last seconds, on the clock and on the steady one
        self._by_end: dict[tuple[int, int], list[bytes]] = {}
        self._swept = 0
        self._path = ""
        self._file: io.FileIO | None = None
        self._written = 0  # lines in the file

    def keep(self, path: str, now: int) -> None:
        """Keep the nonces of `early` signatures over a restart. Raises OSError.

        What was created before the start is refused, so that only a `created` ahead of the clock
        could be replayed behind it: with clocks in step nothing is written. The file has lines of
        UNTIL (Unix seconds) and NONCE (a hash, hex); torn ones were never acknowledged.
        """
        with self._lock:
            with contextlib.suppress(FileNotFoundError):
                text = Path(path).read_text("ascii", "replace")
                for until, entry in re.findall(r"(?m)^([0-9]{1,12}) ([0-9a-f]{32})$", text):
                    if int(until) >= now:
                        self._add(bytes.fromhex(entry), int(until), now)
            self._path = path
            self._rewrite()

    def first_use(self, key_id: str, nonce: str, until: int, now: int, early: bool = False) -> bool:
        """Whether this nonce is new; it is remembered up to the second `until`.

        Raises TooManyRequests when there is no room, Unavailable when it cannot be kept.
        """
        entry = hashlib.blake2b(f"{key_id} {nonce}".encode(), digest_size=16).digest()
        with self._lock:
            if now != self._swept:
                self._sweep(now)
            if entry in self._live:
                return False
            if len(self._live) >= self._limit:
                raise TooManyRequests("too many requests", headers=[("Retry-After", "1")])
            self._add(entry, until, now)
            file = self._append(until, entry) if early else None
        if file is not None:
            try:
                os.fsync(file.fileno())  # outside of the lock: others need not wait
            except OSError as error:
                raise Unavailable(f"the nonce cannot be kept: {_reason(error)}") from None
        return True

    def _add(self, entry: bytes, until: int, now: int) -> None:
        self._live.add(entry)
        end = (until, math.ceil(self._steady()) + until - now)
        self._by_end.setdefault(end, []).append(entry)

    def _sweep(self, now: int) -> None:
        self._swept = now
        steady = self._steady()
        over = [end for end in self._by_end if end[0] < now and end[1] < steady]
        for end in over:
            self._live.difference_update(self._by_end.pop(end))

    def _append(self, until: int, entry: bytes) -> io.FileIO | None:
        try:
            if self._written >= 2 * self._limit:
                self._rewrite()
            if self._file is not None:
                line = _nonce_line(until, entry)
                if self._file.write(line) != len(line):  # a full disk takes a part first
                    self._written = 2 * self._limit  # a torn line would spoil the next one, too
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._written += 1
        except OSError as error:
            raise Unavailable(f"the nonce cannot be kept: {_reason(error)}") from None
        return self._file

    def _rewrite(self) -> None:
        """Begin the file anew with all live nonces in it."""
        rows = [(until, entry) for (until, _), row in self._by_end.items() for entry in row]
        write_secret(self._path, b"".join(_nonce_line(*row) for row in rows))
        # Not closed here: another thread may be in its fsync.
        self._file = io.FileIO(self._path, "a")
        self._written = len(rows)


def _nonce_line(until: int, entry: bytes) -> bytes:
    return b"%d %b\n" % (until, entry.hex().encode("ascii"))


class Throttle:
    """Failed authentications by address: `limit` in a minute, for as many addresses as fit.

    IPv6 addresses count by /64, which is what one customer has. Only failures are looked up here.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._clock = clock
        self._lock = threading.Lock()
        # address -> (failures not forgotten yet, at what time); least recent first
        self._failures: collections.OrderedDict[str, tuple[float, float]] = (
            collections.OrderedDict()
        )

    def fail(self, source: str) -> float:
        """Count a failure; returns the seconds to wait when there are too many, or 0."""
        address, now = address_group(source), self._clock()
        with self._lock:
            failures, since = self._failures.pop(address, (0.0, now))
            failures = max(0.0, failures - (now - since) * self._limit / 60) + 1
            over = failures - self._limit
            self._failures[address] = (min(failures, float(self._limit)), now)
            if len(self._failures) > MAX_THROTTLED:
                self._failures.popitem(last=False)
        return over * 60 / self._limit if over > 0 else 0.0


def address_group(source: str) -> str:
    """What limits per address count: an IPv4 address, or the /64 of an IPv6 address."""
    if ":" not in source:
        return source
    return str(ipaddress.IPv6Network((source, 64), strict=False).network_address)


class MessageSignature(NamedTuple):
    """One signature of a message: covered components, its parameters, the MAC.

    A query parameter's component is "@query-param", a space, and the parameter's name.
    """

    components: tuple[str, ...]
    parameters: str  # as in the signature base: ("@method" ...);created=...
    created: int
    expires: int | None
    nonce: str
    key_id: str
    signature: bytes

    def __repr__(self) -> str:  # good for a replay elsewhere
        return f"MessageSignature({self.key_id})"


def parse_signatures(headers: Mapping[bytes, bytes]) -> Iterator[MessageSignature]:
    """The signatures of a message that have all that we require; others are passed over."""
    try:
        inputs = parse_dictionary(headers[b"signature-input"].decode("ascii"))
        macs = parse_dictionary(headers.get(b"signature", b"").decode("ascii"))
    except ValueError:
        return
    if len(inputs) > MAX_SIGNATURES:
        return
    for label, (components, parameters) in inputs.items():
        mac = macs.get(label, (None, {}))[0]
        if not isinstance(components, tuple) or not isinstance(mac, bytes):
            continue
        names = tuple(itertools.starmap(_component_name, components))
        if "" in names:
            continue
        created, expires = parameters.get("created"), parameters.get("expires")
        nonce, key_id = parameters.get("nonce"), parameters.get("keyid")
        if len(set(names)) != len(names) or type(created) is not int:
            continue
        if not isinstance(nonce, str) or not nonce or not isinstance(key_id, str):
            continue
        if not (expires is None or type(expires) is int):
            continue
        if parameters.get("alg", "hmac-sha256") != "hmac-sha256":
            continue
        text = serialize_inner_list(names, parameters)
        yield MessageSignature(names, text, created, expires, nonce, key_id, mac)


def _component_name(name: Bare, parameters: Parameters) -> str:
    """A covered component as in MessageSignature, "" for what we do not know.

    No other component parameters: none is needed for what must be covered.
    """
    if not isinstance(name, str) or " " in name:
        return ""
    if not parameters:
        return name
    parameter = parameters.get("name")
    if name != "@query-param" or len(parameters) != 1 or not isinstance(parameter, str):
        return ""
    return f"{name} {parameter}"


def _covers_enough(message: SignedMessage, given: MessageSignature) -> bool:
    """Method, target and, where there is one, the body's digest."""
    covered = set(given.components)
    whole = "@target-uri" in covered
    parts = "@path" in covered and ("?" not in message.target or "@query" in covered)
    body = message.length == 0 or "content-digest" in covered
    return "@method" in covered and (whole or parts) and body


def signature_base(message: SignedMessage, given: MessageSignature) -> bytes | None:
    """RFC 9421 section 2.5, or None when a component is not known or not there."""
    lines: list[bytes] = []
    for name in given.components:
        value = _component(message, name)
        if value is None:
            return None
        lines.append(b"%b: %b\n" % (_component_identifier(name).encode("ascii"), value))
    lines.append(b'"@signature-params": ' + given.parameters.encode("ascii"))
    return b"".join(lines)


def _component(message: SignedMessage, name: str) -> bytes | None:
    """The value of a component (RFC 9421 sections 2.1 and 2.2)."""
    if not name.startswith("@"):
        return message.headers.get(name.encode("ascii")) if name == name.lower() else None
    if name.startswith("@query-param "):
        return _query_parameter(message.target.partition("?")[2], name.partition(" ")[2])
    derive = DERIVED.get(name)
    return None if derive is None else derive(message).encode("latin-1", "replace")


def _authority(message: SignedMessage) -> str:
    return message.authority.lower().removesuffix(":443")


DERIVED: dict[str, Callable[[SignedMessage], str]] = {
    "@method": lambda message: message.method,
    "@target-uri": lambda message: f"https://{_authority(message)}{message.target}",
    "@authority": _authority,
    "@scheme": lambda message: "https",
    "@request-target": lambda message: message.target,
    "@path": lambda message: message.target.partition("?")[0],
    "@query": lambda message: "?" + message.target.partition("?")[2],
}


def _query_parameter(query: str, name: str) -> bytes | None:
    """RFC 9421 section 2.2.8, None where the parameter is not there exactly once."""
    try:
        pairs = urllib.parse.parse_qsl(query, keep_blank_values=True, max_num_fields=32)
    except ValueError:
        return None
    wanted = urllib.parse.unquote(name)
    values = [value for key, value in pairs if key == wanted]
    if len(values) != 1:
        return None
    return urllib.parse.quote(values[0], safe="*").replace("~", "%7E").encode("ascii")


class BodyDigest:
    """What Content-Digest (RFC 9530) says of a body, which may come in pieces."""

    def __init__(self, header: bytes) -> None:
        try:
            given = parse_dictionary(header.decode("ascii"))
        except ValueError:
            given = {}
        self._known = [(DIGESTS[name](), given[name][0]) for name in DIGESTS if name in given]

    def update(self, piece: bytes) -> None:
        for digest, _ in self._known:
            digest.update(piece)

    def matches(self) -> bool:
        """Whether there is a digest that we know, and each such is the body's."""
        return bool(self._known) and all(
            isinstance(mac, bytes) and hmac.compare_digest(digest.digest(), mac)
            for digest, mac in self._known
        )


def digest_matches(header: bytes, body: bytes) -> bool:
    digest = BodyDigest(header)
    digest.update(body)
    return digest.matches()


DIGESTS = {"sha-256": hashlib.sha256, "sha-512": hashlib.sha512}


def sign_rfc9421(
    key_id: str, secret: str, message: SignedMessage, created: int, nonce: str
) -> tuple[str, str]:
    """The values of Signature-Input and Signature for a request."""
    names = ["@method", "@target-uri", *(["content-digest"] if message.length else [])]
    parameters: Parameters = {
        "created": created,
        "nonce": nonce,
        "keyid": key_id,
        "alg": "hmac-sha256",
    }
    text = serialize_inner_list(names, parameters)
    given = MessageSignature(tuple(names), text, created, None, nonce, key_id, b"")
    base = signature_base(message, given)
    if base is None:
        raise ValueError("a covered component is missing")
    mac = hmac.digest(secret.encode("utf-8"), base, "sha256")
    return f"sig1={text}", f"sig1=:{base64.b64encode(mac).decode('ascii')}:"


# --- structured fields (RFC 8941), the part that signatures and digests need ----------------------

Bare = str | int | bytes | bool
Parameters = dict[str, Bare]
InnerList = tuple[tuple[Bare, Parameters], ...]

_SF_KEY = re.compile(r"[a-z*][a-z0-9_.*-]*")
_SF_INTEGER = re.compile(r"-?[0-9]{1,15}(?![0-9.])")
_SF_STRING = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\])*)"')
_SF_BOOLEAN = re.compile(r"\?[01]")
_SF_PARAMETER = re.compile(r"; *([a-z*][a-z0-9_.*-]*)(=?)")
_SF_BYTES = re.compile(r":([A-Za-z0-9+/]*={0,2}):")
_SF_TOKEN = re.compile(r"[A-Za-z*][!#$%&'*+.^_`|~0-9A-Za-z:/-]*")


class _Scanner:
    """Reads a structured field from left to right. Raises ValueError at what does not belong."""

    def __init__(self, text: str) -> None:
        if len(text) > MAX_HEAD:
            raise ValueError("too long")
        self.text = text
        self.position = 0

    def match(self, pattern: re.Pattern[str]) -> re.Match[str]:
        found = pattern.match(self.text, self.position)
        if found is None:
            raise ValueError(f"structured field: unexpected text at {self.position}")
        self.position = found.end()
        return found

    def skip(self, characters: str) -> None:
        while self.position < len(self.text) and self.text[self.position] in characters:
            self.position += 1

    def take(self, character: str) -> bool:
        found = self.text.startswith(character, self.position)
        self.position += len(character) if found else 0
        return found

    def ended(self) -> bool:
        return self.position == len(self.text)

    def bare(self) -> Bare:
        first = self.text[self.position : self.position + 1]
        if first == '"':
            text = self.match(_SF_STRING)[1]
            return re.sub(r"\\(.)", r"\1", text) if "\\" in text else text
        if first == ":":
            return binascii.a2b_base64(self.match(_SF_BYTES)[1], strict_mode=True)
        if first == "?":
            return self.match(_SF_BOOLEAN)[0] == "?1"
        if first in "-0123456789" and first:
            return int(self.match(_SF_INTEGER)[0])
        return self.match(_SF_TOKEN)[0]

    def parameters(self) -> Parameters:
        parameters: Parameters = {}
        while found := _SF_PARAMETER.match(self.text, self.position):
            self.position = found.end()
            key = found[1]
            if key in parameters:  # RFC 8941 takes the last one; two readings are one too many
                raise ValueError("structured field: a parameter is repeated")
            parameters[key] = self.bare() if found[2] else True
        return parameters

    def inner_list(self) -> InnerList:
        items: list[tuple[Bare, Parameters]] = []
        while True:
            self.skip(" ")
            if self.take(")"):
                return tuple(items)
            if items and self.text[self.position - 1] != " ":
                raise ValueError("structured field: items without a space between them")
            items.append((self.bare(), self.parameters()))


def parse_dictionary(text: str) -> dict[str, tuple[Bare | InnerList, Parameters]]:
    """RFC 8941 section 4.2.2; a repeated key is refused. Raises ValueError."""
    scanner = _Scanner(text)
    members: dict[str, tuple[Bare | InnerList, Parameters]] = {}
    scanner.skip(" ")
    while not scanner.ended():
        key = scanner.match(_SF_KEY)[0]
        if key in members:
            raise ValueError("structured field: a key is repeated")
        value: Bare | InnerList = True
        if scanner.take("="):
            value = scanner.inner_list() if scanner.take("(") else scanner.bare()
        members[key] = (value, scanner.parameters())
        scanner.skip(" \t")
        if scanner.ended():
            break
        if not scanner.take(","):
            raise ValueError("structured field: a comma is missing")
        scanner.skip(" \t")
        if scanner.ended():
            raise ValueError("structured field: a trailing comma")
    return members


def serialize_inner_list(names: Sequence[str], parameters: Mapping[str, Bare]) -> str:
    """RFC 8941 section 4.1.1.1, for a list of component names as in MessageSignature."""
    listed = " ".join(_component_identifier(name) for name in names)
    tail = "".join(
        f";{key}" if value is True else f";{key}={_serialize_bare(value)}"
        for key, value in parameters.items()
    )
    return f"({listed}){tail}"


def _component_identifier(component: str) -> str:
    name, space, parameter = component.partition(" ")
    tail = f";name={_serialize_bare(parameter)}" if space else ""
    return _serialize_bare(name) + tail


def _serialize_bare(value: Bare) -> str:
    if isinstance(value, bool):
        return f"?{int(value)}"
    if isinstance(value, bytes):
        return f":{base64.b64encode(value).decode('ascii')}:"
    if isinstance(value, int):
        return str(value)
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def legacy_message(timestamp: bytes, body_length: int) -> bytes:
    return b"timestamp=%b, body_length=%d" % (timestamp, body_length)


def sign_legacy(secret: str, timestamp: int, body_length: int) -> str:
    message = legacy_message(b"%d" % timestamp, body_length)
    return hmac.digest(secret.encode("utf-8"), message, "sha256").hex()


class PayloadBox:
    """Seals and opens encrypted payloads: base64(iv[12] || AES-256-GCM ciphertext || tag[16])."""

    def __init__(self, shared_secret: str) -> None:
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        derive = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=b"handshake data")
        self._aead = AESGCM(derive.derive(shared_secret.encode("utf-8")))

    def seal(self, plaintext: bytes) -> str:
        iv = secrets.token_bytes(12)
        return base64.b64encode(iv + self._aead.encrypt(iv, plaintext, None)).decode("ascii")

    def open(self, text: str) -> bytes:
        """Decrypt. Raises Malformed, always with the same words."""
        from cryptography.exceptions import InvalidTag

        try:
            sealed = binascii.a2b_base64(text.encode("ascii"), strict_mode=True)
            if len(sealed) < 28:
                raise ValueError
            return self._aead.decrypt(sealed[:12], sealed[12:], None)
        except (ValueError, InvalidTag):
            raise Malformed("encrypted_payload does not decrypt") from None


class Vault:
    """Encryption at rest: AES-256-GCM, a key of its own for each file, by HKDF from one secret."""

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode("utf-8")

    def derive(self, purpose: bytes, salt: bytes, length: int) -> bytes:
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        hkdf = HKDF(algorithm=hashes.SHA256(), length=length, salt=salt, info=b"wggw " + purpose)
        return hkdf.derive(self._secret)


class Seal:
    """A file's own key. `header` (salt and key check, hex) stands in the file's first line.

    Nonces are unique by construction: each is a number that the file uses once, and each file
    has a random salt and so a key of its own.
    """

    def __init__(self, vault: Vault, purpose: bytes, salt: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self.header = b"%b %b" % (
            salt.hex().encode("ascii"),
            vault.derive(b"check", salt, 8).hex().encode("ascii"),
        )
        self._aead = AESGCM(vault.derive(purpose, salt, 32))

    @classmethod
    def new(cls, vault: Vault, purpose: bytes) -> Seal:
        return cls(vault, purpose, secrets.token_bytes(16))

    @classmethod
    def read(cls, vault: Vault | None, purpose: bytes, header: bytes, name: str) -> Seal:
        """The key of an existing file. Raises ConfigError when SNAPSHOT_KEY is not its key."""
        if vault is None:
            raise ConfigError(f"SNAPSHOT_KEY is not set, but {name} is encrypted")
        seal = cls(vault, purpose, bytes.fromhex(header.split(b" ")[0].decode("ascii")))
        if seal.header != header:
            raise ConfigError(f"SNAPSHOT_KEY: its value (not shown) is not the key of {name}")
        return seal

    def seal(self, number: int, bound: bytes, plaintext: bytes) -> bytes:
        """Encrypt; opens only with the same number and the same `bound` bytes."""
        return self._aead.encrypt(number.to_bytes(12, "big"), plaintext, bound)

    def open(self, number: int, bound: bytes, sealed: bytes) -> bytes:
        """Decrypt. Raises ValueError."""
        from cryptography.exceptions import InvalidTag

        try:
            return self._aead.decrypt(number.to_bytes(12, "big"), sealed, bound)
        except InvalidTag:
            raise ValueError("does not decrypt") from None


def x25519_public(private: bytes) -> bytes:
    """The public key of a private key (RFC 7748 section 5). Used once at start, not constant-time:

    with a certificate given the gateway runs without the cryptography package.
    """
    prime = 2**255 - 19
    scalar = int.from_bytes(private, "little") & ((1 << 255) - 8) | (1 << 254)
    x2, z2, x3, z3, swap = 1, 0, 9, 1, 0
    for t in reversed(range(255)):
        bit = scalar >> t & 1
        if swap ^ bit:
            x2, z2, x3, z3 = x3, z3, x2, z2
        swap = bit
        a, b = x2 + z2, x2 - z2
        aa, bb = a * a, b * b
        da, cb = (x3 - z3) * a, (x3 + z3) * b
        x3, z3 = (da + cb) ** 2 % prime, 9 * (da - cb) ** 2 % prime
        x2, z2 = aa * bb % prime, (aa - bb) * (aa + 121665 * (aa - bb)) % prime
    if swap:
        x2, z2 = x3, z3
    return (x2 * pow(z2, prime - 2, prime) % prime).to_bytes(32, "little")


def clamp(private: bytes) -> bytes:
    """RFC 7748 section 5. Interfaces give a key back like this, however it was set."""
    return bytes([private[0] & 248, *private[1:31], private[31] & 127 | 64])


def make_private_key() -> bytes:
    return clamp(secrets.token_bytes(KEY_BYTES))


def load_private_key(settings: InterfaceSettings, kept: str | None = None) -> bytes:
    """Read the interface's private key; make the file (0600) if absent. Raises ConfigError.

    A file that is made holds the key that a snapshot has `kept`, or a new one.
    """
    path = settings.private_key_file
    variable = f"{settings.prefix}_PRIVATE_KEY_FILE"
    try:
        check_private(variable, path, 0o077)
        return clamp(decode_key(Path(path).read_text("ascii").strip()))
    except FileNotFoundError:
        key = clamp(decode_key(kept)) if kept else make_private_key()
        try:
            os.makedirs(os.path.dirname(path) or ".", mode=0o700, exist_ok=True)
            write_secret(path, encode_key(key).encode("ascii") + b"\n")
        except OSError as error:
            raise ConfigError(f"{variable}: {path!r} cannot be made: {_reason(error)}") from None
        LOG.info("%s: %s", path, "the snapshot's private key" if kept else "a new private key")
        return key
    except OSError as error:
        raise ConfigError(f"{variable}: {path!r} cannot be read: {_reason(error)}") from None
    except ValueError:
        raise ConfigError(
            f"{variable}: {path!r} does not hold a base64 private key (wg genkey)"
        ) from None


def write_secret(path: str, content: bytes) -> None:
    """Create a file that only its owner can read, wholly written or not there at all."""
    temporary = f"{path}.{os.getpid()}.tmp"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def make_certificate(cert_path: str, key_path: str, names: Sequence[str]) -> None:
    """Write a self-signed P-256 pair, valid for ten years, for `names` (hosts or addresses)."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "wggw")])
    now = int(time.time())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.fromtimestamp(now - 86400, timezone.utc))
        .not_valid_after(datetime.fromtimestamp(now + 3650 * 86400, timezone.utc))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectAlternativeName([_alternative_name(n) for n in names]), False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_secret(key_path, private)
    write_secret(cert_path, certificate.public_bytes(pem))


def _alternative_name(name: str) -> Any:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def read_certificate(path: str) -> bytes:
    """The first certificate of a PEM file, in DER. Raises OSError, ValueError."""
    text = Path(path).read_text("ascii")
    match = re.search(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", text, re.DOTALL)
    if not match:
        raise ValueError("no certificate in the file")
    return ssl.PEM_cert_to_DER_cert(match[0])


def certificate_fingerprint(path: str) -> str:
    """SHA-256 of the first certificate in a PEM file, in hex. Raises OSError, ValueError."""
    return hashlib.sha256(read_certificate(path)).hexdigest()


def certificate_expiry(certificate: bytes) -> int:
    """notAfter of a certificate in DER (RFC 5280 section 4.1), Unix seconds. Raises ValueError.

    The standard library tells it of nobody's certificate but a verified peer's.
    """
    [(_, signed)] = itertools.islice(_der_values(certificate), 1)
    [(_, fields)] = itertools.islice(_der_values(signed), 1)
    # [0] version (not in version 1), serial number, algorithm, issuer, validity
    values = [value for tag, value in _der_values(fields) if tag != 0xA0]
    if len(values) < 4:
        raise ValueError("not a certificate")
    _, (tag, when) = _der_values(values[3])
    text = when.decode("ascii")
    if tag == 0x17:  # UTCTime: two digits of a year from 1950 to 2049
        text = ("20" if text < "5" else "19") + text
    return int(datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=timezone.utc).timestamp())


def _der_values(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(tag, content) of each value in DER, one after the other. Raises ValueError."""
    position = 0
    while position < len(data):
        if len(data) < position + 2:
            raise ValueError("DER: a value without a length")
        tag, length = data[position], data[position + 1]
        position += 2
        if length == 0x80:
            raise ValueError("DER: a length is missing")
        if length > 0x80:
            size = length & 0x7F
            length = int.from_bytes(data[position : position + size], "big")
            position += size
        if position + length > len(data):
            raise ValueError("DER: a value ends behind its container")
        yield tag, data[position : position + length]
        position += length


# ==================================================================================================
# addresses: which address the next peer gets, in constant time
# Never here: SQL and locks. The pool is an index over the store's rows, rebuilt at boot.
# ==================================================================================================


class AddressPool:
    """The addresses of one subnet: the gateway has the first host address, peers the others.

    An address is never used, held, or released. Excluded: the network address, the gateway and,
    in IPv4, the broadcast address. Memory grows with addresses held out of order and released
    ones, at most FRESH_SPAN of the latter.
    """

    def __init__(self, network: IPv4or6Network) -> None:
        self.network = network
        self.gateway = network.network_address + 1
        self._family = socket.AF_INET if network.version == 4 else socket.AF_INET6
        self._base = int(network.network_address)
        self._last = network.num_addresses - (2 if network.version == 4 else 1)
        self._fresh = 2  # lowest offset that was never used, but for those ahead
        self._ahead: set[int] = set()  # used offsets above _fresh
        self._released = collections.OrderedDict[int, None]()  # oldest first
        self.used = 0

    @property
    def total(self) -> int:
        """How many peers can have an address."""
        return self._last - 1

    def restore(self, held: Iterable[str], released: Iterable[str]) -> None:
        """Take over what a store knows: addresses held, and released ones, oldest first.

        Raises ValueError with the address when one that is held cannot be a peer's here.
        """
        for address in held:
            self.claim(address)
        for address in released:  # those outside a changed subnet are of no interest any more
            if self.is_free(address):
                self.claim(address)
                self.release(address)
        self._ahead = set(self._ahead)  # a set that was large stays large

    def peek(self) -> str | None:
        """The address that take() would give, or None when all are held."""
        offset = self._fresh
        if self._released and (offset > self._last or offset > FRESH_SPAN):
            offset = next(iter(self._released))
        if offset > self._last:
            return None
        return self._text(offset)

    def upcoming(self) -> Iterator[str]:
        """The addresses that take() would give, one after the other, while nothing changes."""
        low = range(self._fresh, min(self._last, FRESH_SPAN) + 1)
        high = range(max(self._fresh, FRESH_SPAN + 1), self._last + 1)
        fresh = ((o for o in part if o not in self._ahead) for part in (low, high))
        return map(self._text, itertools.chain(next(fresh), self._released, next(fresh)))

    def take(self) -> str | None:
        """Hold the next address and return it, or None when all are held."""
        address = self.peek()
        if address is not None:
            self.claim(address)
        return address

    def is_free(self, address: str) -> bool:
        """Whether a peer may be given this address: in the subnet, not excluded, not held."""
        offset = self._offset(address)
        if offset is None:
            return False
        return offset in self._released or (offset >= self._fresh and offset not in self._ahead)

    def claim(self, address: str) -> bool:
        """Hold this very address; returns whether it was never used. ValueError: it is not free."""
        offset = self._offset(address)
        never_used = offset not in self._released
        if offset == self._fresh:
            self._fresh += 1
            self._close_gap()
        elif offset is not None and not never_used:
            del self._released[offset]
        elif offset is None or offset < self._fresh or offset in self._ahead:
            raise ValueError(address)
        else:
            self._ahead.add(offset)
        self.used += 1
        return never_used

    def put_back(self, address: str, never_used: bool) -> None:
        """Undo a claim(), of which this is the result: the address is the next one again."""
        offset = self._offset(address)
        if offset is None or self.is_free(address):
            raise ValueError(address)
        if not never_used:
            self._released[offset] = None
            self._released.move_to_end(offset, last=False)
        elif offset > self._fresh:
            self._ahead.remove(offset)
        else:
            self._ahead.update(range(offset + 1, self._fresh))
            self._fresh = offset
        self.used -= 1

    def release(self, address: str) -> None:
        """Give a held address back, behind those that were released before."""
        offset = self._offset(address)
        if offset is None or self.is_free(address):
            raise ValueError(address)
        self._released[offset] = None
        self.used -= 1

    def _text(self, offset: int) -> str:
        packed = (self._base + offset).to_bytes(self.network.max_prefixlen // 8, "big")
        return socket.inet_ntop(self._family, packed)

    def _offset(self, address: str) -> int | None:
        offset = int.from_bytes(socket.inet_pton(self._family, address), "big") - self._base
        return offset if 2 <= offset <= self._last else None

    def _close_gap(self) -> None:
        while self._fresh in self._ahead:
            self._ahead.remove(self._fresh)
            self._fresh += 1


# ==================================================================================================
# journal: numbered records on disk, one fsync for all that wait, atomic file replacement
# Never here: what a record means.
# ==================================================================================================

JOURNAL_MAGIC = b"wggw-journal 1"


class Disk:
    """The few calls that make a change durable, in one place so that tests can make them fail."""

    def write(self, handle: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(handle, view) :]

    def fsync(self, handle: int) -> None:
        os.fsync(handle)

    def rename(self, old: str, new: str) -> None:
        os.rename(old, new)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def link(self, old: str, new: str) -> None:
        """A second name; a copy where the file system has none."""
        try:
            os.link(old, new)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            self.replace(new, [Path(old).read_bytes()])

    def sync_directory(self, path: str) -> None:
        handle = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.fsync(handle)
        finally:
            os.close(handle)

    def replace(self, path: str, parts: Iterable[bytes | memoryview]) -> None:
        """Put the joined parts at `path`: the old file or the new one, never a piece of it."""
        temporary = path + ".tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        handle = os.open(temporary, flags, 0o600)
        try:
            try:
                for part in parts:
                    self.write(handle, part)
                self.fsync(handle)
            finally:
                os.close(handle)
            self.rename(temporary, path)
        except Exception:  # on a full disk it would take the room that the journal needs
            with contextlib.suppress(OSError):
                self.unlink(temporary)
            raise
        self.sync_directory(path)


class Record(NamedTuple):
    """A journal record: its number and its content as JSON text."""

    number: int
    content: bytes

    def __repr__(self) -> str:  # the content holds preshared keys
        return f"Record({self.number})"


class JournalFile(NamedTuple):
    """What reading a journal gave: `size` counts the good bytes, `torn` the dropped ones."""

    after: int
    records: list[Record]
    size: int
    torn: int


def journal_header(after: int, seal: Seal | None = None) -> bytes:
    text = b"%b %d" % (JOURNAL_MAGIC, after)
    if seal:
        text += b" " + seal.header
    return b"%b %08x\n" % (text, zlib.crc32(text))


def journal_line(number: int, durable: int, content: bytes) -> bytes:
    head = b"%d %d" % (number, durable)
    return b"%b %08x %b\n" % (head, zlib.crc32(content, zlib.crc32(head)), content)


def encode_journal(after: int, records: Sequence[Record], vault: Vault | None) -> bytes:
    """A whole journal file, for parse_journal()."""
    seal = Seal.new(vault, b"journal") if vault else None
    lines = [journal_line(n, 0, content) for n, content in (seal_record(seal, r) for r in records)]
    return b"".join([journal_header(after, seal), *lines])


_JOURNAL_LINE = re.compile(rb"(([0-9]{1,19}) ([0-9]{1,19})) ([0-9a-f]{8}) (.*)")


def parse_journal_line(data: bytes, start: int = 0) -> tuple[int, int, bytes] | None:
    """The line at `start` -> (number, durable, content), or None when it is not a record."""
    match = _JOURNAL_LINE.match(data, start)
    if match is None:
        return None
    head, number, durable, crc, content = match.groups()
    if zlib.crc32(content, zlib.crc32(head)) != int(crc, 16):
        return None
    return int(number), int(durable), content


def seal_record(seal: Seal | None, record: Record) -> Record:
    """A record as it is written: as it is, or encrypted and in base64."""
    if seal is None:
        return record
    sealed = seal.seal(record.number, JOURNAL_MAGIC, record.content)
    return Record(record.number, binascii.b2a_base64(sealed, newline=False))


def open_record(seal: Seal | None, record: Record) -> Record:
    """What seal_record() was given. Raises ValueError."""
    if seal is None:
        return record
    sealed = binascii.a2b_base64(record.content, strict_mode=True)
    return Record(record.number, seal.open(record.number, JOURNAL_MAGIC, sealed))


def parse_journal(data: bytes, name: str, vault: Vault | None = None) -> JournalFile:
    """Read a journal's bytes. Raises DamagedError for anything but a torn tail."""
    end = data.find(b"\n") + 1
    header = _parse_header(data[:end])
    if header is None:  # a journal is put in its place whole, so this is no torn write
        raise _damaged(name, 0, "the header is damaged")
    after, sealed = header
    seal = Seal.read(vault, b"journal", sealed, name) if sealed else None
    records: list[Record] = []
    number, position = after, end
    while position < len(data):
        line_end = data.find(b"\n", position)
        parsed = parse_journal_line(data, position) if line_end >= 0 else None
        if parsed is None or parsed[1] > position or parsed[0] != number + 1:
            _check_torn(data, position, name)
            break
        number = parsed[0]
        try:
            records.append(open_record(seal, Record(number, parsed[2])))
        except ValueError:
            raise _damaged(name, position, f"record {number} does not decrypt") from None
        position = line_end + 1
    return JournalFile(after, records, position, len(data) - position)


_JOURNAL_HEADER = re.compile(
    re.escape(JOURNAL_MAGIC) + rb" ([0-9]{1,19})(?: ([0-9a-f]{32} [0-9a-f]{16}))? ([0-9a-f]{8})\n"
)


def _parse_header(line: bytes) -> tuple[int, bytes] | None:
    """(after, the seal's header or nothing), or None when it is no header."""
    match = _JOURNAL_HEADER.fullmatch(line)
    if match is None or b"%08x" % zlib.crc32(line[:-10]) != match[3]:
        return None
    return int(match[1]), match[2] or b""


def salvage_journal(data: bytes, name: str, vault: Vault | None) -> Iterator[Record]:
    """Every record that can still be read, whatever stands around it."""
    lines = data.split(b"\n")
    header = _parse_header(lines[0] + b"\n")
    seal = Seal.read(vault, b"journal", header[1], name) if header and header[1] else None
    for line in lines[1:]:
        parsed = parse_journal_line(line)
        if parsed is not None:
            with contextlib.suppress(ValueError):
                yield open_record(seal, Record(parsed[0], parsed[2]))


def _check_torn(data: bytes, position: int, name: str) -> None:
    """A bad record at `position`: torn, unless a later one knew it to be on disk."""
    start = position
    while (start := data.find(b"\n", start) + 1) > 0:
        parsed = parse_journal_line(data, start)
        if parsed is not None and parsed[1] > position:
            raise _damaged(name, position, f"a bad record in front of the good record {parsed[0]}")


def read_journal(path: str, vault: Vault | None = None) -> JournalFile | None:
    """Read a journal's file, None when it does not exist. Raises DamagedError."""
    try:
        return parse_journal(Path(path).read_bytes(), path, vault)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _damaged(path, 0, f"cannot be read: {_reason(error)}") from None


def _damaged(name: str, offset: int, found: str) -> DamagedError:
    return DamagedError(
        f"{name}: at byte {offset}: {found}. The start is refused and nothing was changed, so that "
        "no acknowledged change is lost unnoticed. `wggw check` inspects the files, "
        "`wggw check --repair` saves what can be saved into new ones",
        f"at byte {offset}: {found}",
    )


SNAPSHOT_MAGIC = b"wggw-snapshot 1 "
SNAPSHOT_CHUNK = 64 * 1024  # bytes of plaintext in each sealed chunk
SQLITE_MAGIC = b"SQLite format 3\0"
APPLICATION_ID = slice(68, 72)  # of the SQLite header (sqlite.org/fileformat.html section 1.3)


def snapshot_parts(image: bytes, vault: Vault | None) -> Iterator[bytes | memoryview]:
    """A database image as the parts of a snapshot file: with its checksum, sealed with a vault.

    The checksum (CRC-32 of the file with these four bytes zero) is SQLite's application id, so
    that the file stays an ordinary database. No part is a copy of the whole image: that would stop
    all threads for 10 ms at 60,000 peers.
    """
    view = memoryview(image)
    first = b"".join((view[:68], _image_checksum(image), view[72:SNAPSHOT_CHUNK]))
    if vault is None:
        yield first
        yield view[SNAPSHOT_CHUNK:]
        return
    seal = Seal.new(vault, b"snapshot")
    head = SNAPSHOT_MAGIC + seal.header
    yield b"%b %08x\n" % (head, zlib.crc32(head))
    for index, start in enumerate(range(0, len(view), SNAPSHOT_CHUNK)):
        chunk = bytes(view[start : start + SNAPSHOT_CHUNK]) if start else first
        last = start + SNAPSHOT_CHUNK >= len(view)
        yield seal.seal(index, b"last" if last else b"more", chunk)


def encode_snapshot(image: bytes, vault: Vault | None) -> bytes:
    """A snapshot file, for decode_snapshot()."""
    return b"".join(snapshot_parts(image, vault))


def _image_checksum(image: bytes) -> bytes:
    view = memoryview(image)
    crc = zlib.crc32(view[72:], zlib.crc32(bytes(4), zlib.crc32(view[:68])))
    return (crc or 1).to_bytes(4, "big")


def decode_snapshot(data: bytes, vault: Vault | None, name: str) -> bytes:
    """The database image of a snapshot file. Raises DamagedError, ConfigError.

    An application id of 0 stands for no checksum: a database written by other hands.
    """
    if data.startswith(SNAPSHOT_MAGIC):
        data = _open_snapshot(data, vault, name)
    elif vault is not None:
        LOG.warning("%s is not encrypted: the next snapshot will be", name)
    if not data.startswith(SQLITE_MAGIC) or len(data) < 512:
        raise _damaged(name, 0, "this is not a snapshot")
    given = data[APPLICATION_ID]
    if given not in (bytes(4), _image_checksum(data)):
        raise _damaged(
            name,
            68,
            "the checksum does not match (by other hands on purpose? "
            "Then PRAGMA application_id = 0 says so)",
        )
    return data


def _open_snapshot(data: bytes, vault: Vault | None, name: str) -> bytes:
    header, _, body = data.partition(b"\n")
    match = re.fullmatch(
        rb"([0-9a-f]{32} [0-9a-f]{16}) ([0-9a-f]{8})", header[len(SNAPSHOT_MAGIC) :]
    )
    if match is None or b"%08x" % zlib.crc32(header[:-9]) != match[2]:
        raise _damaged(name, 0, "the header is damaged")
    seal = Seal.read(vault, b"snapshot", match[1], name)
    size = SNAPSHOT_CHUNK + 16
    parts: list[bytes] = []
    for index, start in enumerate(range(0, len(body), size)):
        last = start + size >= len(body)
        try:
            chunk = body[start : start + size]
            parts.append(seal.open(index, b"last" if last else b"more", chunk))
        except ValueError:
            offset = len(header) + 1 + start
            raise _damaged(name, offset, f"chunk {index} does not decrypt") from None
    return b"".join(parts)


class Waiter:
    """Somebody who waits for a record to be on disk; `writes`: woken to write the next ones."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.writes = False
        self.wake = threading.Lock()
        self.wake.acquire()


class Histogram:
    """How often something took how long (seconds); observe() is called by one thread at a time."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BUCKETS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect.bisect_left(BUCKETS, seconds)] += 1
        self._sum += seconds

    def render(self, name: str, labels: str = "") -> Iterator[str]:
        """Lines of a Prometheus histogram; `labels` are a="b" pairs with commas between them."""
        counts, total = list(self._counts), self._sum
        running = 0
        for edge, within in zip((*BUCKETS, "+Inf"), counts, strict=True):
            running += within
            yield f'{name}_bucket{{{labels}{"," if labels else ""}le="{edge}"}} {running}\n'
        closed = f"{{{labels}}}" if labels else ""
        yield f"{name}_sum{closed} {total:.6f}\n{name}_count{closed} {running}\n"


class Journal:
    """The open journal: append() in order under the caller's lock, wait() from any thread.

    After a failed write or fsync nothing is acknowledged until start() has begun a new file; an
    fsync is never simply retried. `durable` is the highest number known to be on disk.
    """

    def __init__(self, path: str, disk: Disk, vault: Vault | None = None) -> None:
        self.path = path
        self.previous = path + ".previous"
        self._disk = disk
        self._vault = vault
        self._seal: Seal | None = None
        self._handle = -1
        self._size = 0  # bytes of the file known to be on disk
        self._buffer: list[tuple[int, Callable[[], bytes]]] = []
        self._buffer_lock = threading.Lock()
        self._flush_lock = threading.Lock()
        self._turn = threading.Lock()  # guards the next two
        self._writing = False  # whether somebody in wait() writes for all
        self._waiters: list[Waiter] = []  # the others, in the order of their coming
        self._lost: set[int] = set()  # records that will never be on disk, of every fault so far
        self.durable = 0
        self.failure: str | None = None
        self.syncs = Histogram()  # a write and its fsync
        self.on_durable: Callable[[Sequence[Record]], None] | None = None  # told what is on disk

    def resume(self, size: int, number: int) -> None:
        """Go on behind the first `size` bytes of the existing file. Raises OSError."""
        self._open(size, number)
        os.ftruncate(self._handle, size)
        self._disk.fsync(self._handle)

    def start(self, after: int) -> None:
        """Begin a new file in place of the old one, for numbers above `after`. Raises OSError."""
        with self._flush_lock:
            self._begin(after)
            self.failure = None

    def _begin(self, after: int) -> None:
        self._seal = Seal.new(self._vault, b"journal") if self._vault else None
        header = journal_header(after, self._seal)
        self._disk.replace(self.path, [header])
        self._open(len(header), after)

    def _open(self, size: int, number: int) -> None:
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = handle
        self._size, self.durable = size, number

    def append(self, number: int, content: Callable[[], bytes]) -> None:
        """Put a record into the buffer; it is on disk when wait(number) returns.

        Its content is made by whoever writes it: callers hold a lock that others wait for.
        """
        with self._buffer_lock:
            self._buffer.append((number, content))

    def wait(self, number: int) -> None:
        """Return when the record is on disk; whoever comes first writes for all. DiskError."""
        if self.durable < number and self._must_write(number):
            try:
                self.flush()
            finally:
                self._pass_on()
        if self.is_lost(number) or self.durable < number:  # a new file's start may be past it
            raise DiskError("the record was lost in a disk fault")

    def is_lost(self, number: int) -> bool:
        return number in self._lost

    def _must_write(self, number: int) -> bool:
        """Wait while another one writes; whether the record is then still to be written, by us.

        Each waits on a lock of its own, so that nobody is woken in vain.
        """
        with self._turn:
            if self.durable >= number:
                return False
            if not self._writing:
                self._writing = True
                return True
            waiter = Waiter(number)
            self._waiters.append(waiter)
        waiter.wake.acquire()
        return waiter.writes

    def _pass_on(self) -> None:
        """Wake everyone whose record is on disk, or lost, and one of the others to write next."""
        with self._turn:
            durable = MAX_INTEGER if self.failure else self.durable
            done = [waiter for waiter in self._waiters if waiter.number <= durable]
            self._waiters = [waiter for waiter in self._waiters if waiter.number > durable]
            self._writing = bool(self._waiters)
            if self._writing:
                done.append(self._waiters.pop(0))
                done[-1].writes = True
        for waiter in done:
            waiter.wake.release()

    def flush(self) -> None:
        with self._flush_lock:
            self._flush(MAX_INTEGER)

    def _flush(self, last: int) -> None:
        """Write and fsync the buffered records up to `last`."""
        if self.failure:
            raise DiskError(self.failure)
        with self._buffer_lock:
            records = [entry for entry in self._buffer if entry[0] <= last]
            self._buffer = [entry for entry in self._buffer if entry[0] > last]
        if not records:
            return
        try:
            plain = [Record(number, content()) for number, content in records]
            lines = [seal_record(self._seal, record) for record in plain]
            data = b"".join([journal_line(n, self._size, content) for n, content in lines])
            started = time.perf_counter()
            self._disk.write(self._handle, data)
            self._disk.fsync(self._handle)
        except Exception as error:  # no memory for a record, too: its number must not be passed by
            self._lost.update(number for number, _ in records)
            self._fail(error)
        self.syncs.observe(time.perf_counter() - started)
        self._size += len(data)
        self.durable = records[-1][0]
        if self.on_durable:
            self.on_durable(plain)

    @property
    def size(self) -> int:
        """Bytes of the file that are known to be on disk."""
        return self._size

    def fail(self, error: Exception) -> None:
        """Acknowledge nothing until start() has begun a new file."""
        self.failure = f"{self.path}: {_reason(error)}"

    def _fail(self, error: Exception) -> NoReturn:
        self.fail(error)
        with contextlib.suppress(OSError):  # best effort: these records must not come back
            os.ftruncate(self._handle, self._size)
        raise DiskError(self.failure) from None

    def rotate(self, number: int) -> int:
        """Keep what is on disk, `number` and before at least, as .previous; begin a new file.

        Returns the last record in .previous: others may have written later ones meanwhile. Raises
        DiskError. A crash after the rename leaves no journal beside .previous: recovery reads that
        and goes on with a new one.
        """
        with self._flush_lock:
            self._flush(number)
            last = max(number, self.durable)
            try:
                self._disk.rename(self.path, self.previous)
                self._begin(last)
            except OSError as error:
                self._fail(error)
            return last

    def discard(self) -> None:
        """Forget what waits in the buffer: it was undone."""
        with self._buffer_lock:
            self._lost.update(number for number, _ in self._buffer)
            self._buffer = []

    def close(self) -> None:
        with self._flush_lock:
            if self._handle >= 0:
                os.close(self._handle)
                self._handle = -1


# ==================================================================================================
# store: the truth. Schema and migrations, apply, recovery, snapshots
# Never here: interfaces and HTTP. Callers hold the gateway's lock around every method but the
# ones that say otherwise.
# ==================================================================================================

MIGRATIONS: tuple[str, ...] = (
    # 1: index `user_version` counts these; a migration is never changed once released
    """
    CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE peers (
        id INTEGER PRIMARY KEY,
        public_key TEXT NOT NULL UNIQUE,
        interface TEXT NOT NULL,
        status TEXT NOT NULL CHECK (status IN ('active', 'suspended')),
        status_reason TEXT,
        assigned_ip TEXT UNIQUE,
        assigned_ipv6 TEXT UNIQUE,
        tunnel_traffic TEXT NOT NULL,
        dns TEXT NOT NULL,
        port INTEGER NOT NULL,
        preshared_key TEXT,
        persistent_keepalive INTEGER NOT NULL,
        expires_at INTEGER,
        quota_bytes INTEGER,
        created_at INTEGER NOT NULL,
        request_id TEXT,
        obfuscation TEXT,
        online INTEGER NOT NULL DEFAULT 0 CHECK (online IN (0, 1)) -- see Store.sweep_online()
    );
    CREATE INDEX peers_kind ON peers (interface, status, online);
    CREATE INDEX peers_expiry ON peers (expires_at)
        WHERE expires_at IS NOT NULL AND status = 'active';
    CREATE INDEX peers_expired ON peers (expires_at) WHERE status_reason = 'expired';
    CREATE TABLE released (
        sequence INTEGER PRIMARY KEY,
        address TEXT NOT NULL UNIQUE
    );
    CREATE TABLE traffic (
        id INTEGER PRIMARY KEY,
        rx_bytes INTEGER NOT NULL,
        tx_bytes INTEGER NOT NULL,
        rx_seen INTEGER NOT NULL,
        tx_seen INTEGER NOT NULL,
        last_handshake INTEGER NOT NULL
    );
    CREATE INDEX peers_quota ON peers (id) WHERE quota_bytes IS NOT NULL AND status = 'active';
    CREATE INDEX traffic_handshake ON traffic (last_handshake) WHERE last_handshake > 0;
    CREATE TRIGGER address_released AFTER DELETE ON peers BEGIN
        DELETE FROM traffic WHERE id = OLD.id;
        INSERT OR REPLACE INTO released (address)
            SELECT OLD.assigned_ip WHERE OLD.assigned_ip IS NOT NULL;
        INSERT OR REPLACE INTO released (address)
            SELECT OLD.assigned_ipv6 WHERE OLD.assigned_ipv6 IS NOT NULL;
    END;
    CREATE TRIGGER handshake_first AFTER INSERT ON traffic WHEN NEW.last_handshake > 0 BEGIN
        UPDATE peers SET online = 1 WHERE id = NEW.id AND online = 0;
    END;
    CREATE TRIGGER handshake_next AFTER UPDATE OF last_handshake ON traffic
    WHEN NEW.last_handshake > OLD.last_handshake
    BEGIN
        UPDATE peers SET online = 1 WHERE id = NEW.id AND online = 0;
    END;
    -- the interface counts a new key from 0; a suspended peer's last counters are still to come
    CREATE TRIGGER counters_restarted AFTER UPDATE OF public_key ON peers
    WHEN NEW.public_key <> OLD.public_key
    BEGIN
        UPDATE traffic SET rx_seen = 0, tx_seen = 0 WHERE id = NEW.id;
    END;
    """,
)

_COLUMNS = ", ".join(Peer._fields)
_SELECT = f"SELECT {_COLUMNS} FROM peers"  # noqa: S608  names of this file
_INSERT = f"INSERT INTO peers ({_COLUMNS}) VALUES ({', '.join('?' * len(Peer._fields))})"  # noqa: S608  names of this file
_PUT = f"{_INSERT} ON CONFLICT (id) DO UPDATE SET " + ", ".join(
    f"{name} = excluded.{name}" for name in Peer._fields[1:]
)
_SELECT_KEPT = "SELECT interface, status, assigned_ip, assigned_ipv6 FROM peers WHERE id = ?"
_PAGE = (
    f"SELECT {', '.join(f'p.{name}' for name in Peer._fields)}, coalesce(t.rx_bytes, 0), "  # noqa: S608  names of this file
    "coalesce(t.tx_bytes, 0), coalesce(t.last_handshake, 0) "
    "FROM peers p LEFT JOIN traffic t ON t.id = p.id "
)
_PUT_TRAFFIC = """
    INSERT INTO traffic (id, rx_bytes, tx_bytes, rx_seen, tx_seen, last_handshake)
    SELECT * FROM (VALUES (?, ?, ?, ?, ?, ?)) WHERE column1 IN (SELECT id FROM peers)
    ON CONFLICT (id) DO UPDATE SET rx_bytes = excluded.rx_bytes, tx_bytes = excluded.tx_bytes,
        rx_seen = excluded.rx_seen, tx_seen = excluded.tx_seen,
        last_handshake = excluded.last_handshake
"""
_COUNTED = """
    SELECT p.public_key, p.status, p.quota_bytes, p.id, coalesce(t.rx_bytes, 0),
        coalesce(t.tx_bytes, 0), coalesce(t.rx_seen, 0), coalesce(t.tx_seen, 0),
        coalesce(t.last_handshake, 0)
    FROM peers p LEFT JOIN traffic t ON t.id = p.id WHERE
"""


_BAD_TRAFFIC = "SELECT 1 FROM traffic WHERE " + " OR ".join(  # noqa: S608  names of this file
    f"typeof({name}) <> 'integer' OR {name} NOT BETWEEN 0 AND {limit}"
    for name, limit in (
        ("rx_bytes", MAX_TOTAL),
        ("tx_bytes", MAX_TOTAL),
        ("rx_seen", MAX_INTEGER),
        ("tx_seen", MAX_INTEGER),
        ("last_handshake", MAX_TIME),
    )
)


# Rows of `meta` that a journal record may set, and what reads them.
META_PARSERS: Mapping[str, Callable[[str], Any]] = {
    "obfuscation": lambda text: parse_obfuscation(load_json(text)),
}


class Step(NamedTuple):
    """One change of the truth: the peer before (None: it is new) and after (None: it goes)."""

    before: Peer | None
    after: Peer | None


class Undo(NamedTuple):
    """A step of a desired state that may have to be taken back, and what its peer had counted."""

    step: Step
    traffic: TrafficRow | None


class TrafficRow(NamedTuple):
    """A row of the table `traffic`: totals, and what the interface counted when last looked at."""

    id: int
    rx_bytes: int
    tx_bytes: int
    rx_seen: int
    tx_seen: int
    last_handshake: int

    def counted(self, rx: int, tx: int, handshake: int) -> TrafficRow:
        """After the interface's counters were read: they start again when it is made anew."""
        return TrafficRow(
            self.id,
            min(self.rx_bytes + rx - (self.rx_seen if rx >= self.rx_seen else 0), MAX_TOTAL),
            min(self.tx_bytes + tx - (self.tx_seen if tx >= self.tx_seen else 0), MAX_TOTAL),
            rx,
            tx,
            handshake or self.last_handshake,
        )


class Parked(NamedTuple):
    """A key that left its peer, but not yet the interface: its last counters are to be read.

    `number` is the change's record: once that is on disk the key may go.
    """

    peer_id: int
    rx_seen: int
    tx_seen: int
    number: int


class Sampled(NamedTuple):
    """What a sample found: bytes that were new, and active peers that are over their quota."""

    rx_bytes: int = 0
    tx_bytes: int = 0
    over_quota: tuple[str, ...] = ()


class Filter(NamedTuple):
    """Which peers a list shows; `online_since` in Unix seconds with `online` True or False."""

    status: str | None = None
    interface: str | None = None
    online: bool | None = None
    online_since: int = 0


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    """While there are 60,000 peers as objects, which hold no cycles.

    Looking through them takes the collector 0.2 s at a time, in whatever lock it comes up.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _file_identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def open_memory() -> sqlite3.Connection:
    """An empty database in one block of memory, which serialize() copies in one go.

    An ordinary `:memory:` database is copied page by page: at 60,000 peers that takes 6 to 50 ms
    under the lock instead of 2 to 10.
    """
    db = sqlite3.connect(
        "file:wggw?vfs=memdb", uri=True, check_same_thread=False, isolation_level=None
    )
    configure_memory(db)
    return db


def warm_up(size: int) -> None:
    """Make ready the memory that the next block of so many bytes gets in this thread.

    The page faults of an image's copy are four fifths of its time, and hold up all threads; here
    the others run on. It helps with glibc, which keeps blocks as large as the largest one that was
    freed before (mallopt(3), M_MMAP_THRESHOLD): serve() frees one of LARGEST_BLOCK.
    """
    block = bytearray(size)
    with contextlib.suppress(OSError), open("/dev/zero", "rb", buffering=0) as zeros:
        zeros.readinto(block)


def configure_memory(db: sqlite3.Connection) -> None:
    """Nobody else can open this database, and it has no disk: no locks, no syncs."""
    db.execute("PRAGMA locking_mode = EXCLUSIVE")
    db.execute("PRAGMA synchronous = OFF")


def migrate(db: sqlite3.Connection) -> None:
    """Bring a database to the newest schema; its version is `PRAGMA user_version`."""
    version = db.execute("PRAGMA user_version").fetchone()[0]
    for number, script in enumerate(MIGRATIONS[version:], version + 1):
        db.executescript(f"BEGIN; {script} PRAGMA user_version = {number}; COMMIT;")


_DEFAULTS = dict.fromkeys(Peer._fields)


def _content(steps: Sequence[Step]) -> dict[str, Any]:
    """What a record of these steps holds."""
    return {
        "put": [after for _, after in steps if after],
        "del": [before.id for before, after in steps if before and not after],
    }


_RECORD_DECODER = json.JSONDecoder(parse_constant=int)  # NaN and Infinity: a ValueError
_RECORD_ENCODER = json.JSONEncoder(separators=(",", ":"))


def _encode_record(content: Mapping[str, Any]) -> bytes:
    put = [
        {name: value for name, value in zip(Peer._fields, peer, strict=True) if value is not None}
        for peer in content["put"]
    ]
    record = {"put": put, "del": content["del"]}
    for name in ("traffic", "sync", "set"):
        if content.get(name):
            record[name] = content[name]
    return _RECORD_ENCODER.encode(record).encode("ascii")


def _decode_record(content: bytes) -> dict[str, Any]:
    """What _encode_record() was given. Raises one of _BAD_RECORD."""
    text = str(content, "ascii")
    check_depth(text)
    record, end = _RECORD_DECODER.raw_decode(text)
    if end != len(text):
        raise ValueError("more than one value")
    settings = record.get("set", {})
    for name, value in settings.items():
        META_PARSERS[name](value)
    return {
        "del": record["del"],
        "put": [Peer._make((_DEFAULTS | row).values()) for row in record["put"]],
        "traffic": [TrafficRow(*map(int, row)) for row in record.get("traffic", ())],
        "set": settings,
        "sync": record.get("sync", ()),
    }


_BAD_RECORD = (
    sqlite3.Error,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    OverflowError,
)

# What a record may do, in the order in which Store._apply_rows() does it.
_STAGES = ("del", "put", "traffic", "set")

Numbered = tuple[int, dict[str, Any]]  # a decoded record and its number


def _runs(records: Iterable[Numbered]) -> Iterator[list[Numbered]]:
    """Cut records so that each list can be applied as one, which _merged() makes of it.

    A record may join those before it while it does nothing that comes earlier in _STAGES than
    what they do. Parts of a desired state stay alone.
    """
    run: list[Numbered] = []
    reached = 0
    for number, content in records:
        stages = [stage for stage, name in enumerate(_STAGES) if content[name]] or [0]
        if run and (stages[0] < reached or len(run) == REPLAY_CHUNK or content["sync"]):
            yield run
            run = []
        run.append((number, content))
        reached = len(_STAGES) if content["sync"] else stages[-1]
    if run:
        yield run


def _merged(run: Sequence[Numbered]) -> dict[str, Any]:
    contents = [content for _, content in run]
    if len(contents) == 1:
        return contents[0]
    lists = {name: [x for c in contents for x in c[name]] for name in ("del", "put", "traffic")}
    settings = {name: text for c in contents for name, text in c["set"].items()}
    return {**lists, "set": settings}


def _bad_record(path: str, number: str, error: BaseException) -> DamagedError:
    return _damaged(path, 0, f"record {number} does not apply: {error}")


class Store:
    """Peers in an in-memory SQLite database, with a journal and snapshots on disk.

    `number` is the last change's; it never goes back, and a change that had to be undone burns
    its number. `counts` holds the number of peers by (interface, status).
    """

    def __init__(self, path: str, durability: str, disk: Disk, vault: Vault | None = None) -> None:
        self.path = path
        self.durability = durability
        self.number = 0
        self.counts: collections.Counter[tuple[str, str]] = collections.Counter()
        self.snapshot_time = 0.0  # Unix seconds of the last snapshot, 0 for none
        self.snapshot_bytes = 0
        self.private_keys: dict[str, str] = {}  # by interface; in snapshots that are encrypted
        self._disk = disk
        self._vault = vault
        self._dirty = False
        self._swept = 0  # see sweep_online()
        self._next_id = 1
        self._any_released = False  # or there is no need to look for rows of `released`
        self._snapshot_number = 0  # the last record that the snapshot on disk holds
        self._previous_end = 0  # the last record of the journal before the current one
        self._saved: collections.Counter[tuple[str, str]] | None = None  # counts before apply()
        self._gone: dict[int, TrafficRow] = {}  # of deleted peers, until that is on disk
        self._open_sync: list[Undo] = []  # replayed parts of a desired state without its end
        self.snapshot_lock = threading.Lock()
        self._journal = Journal(path + ".journal", disk, vault)
        self._db = open_memory()

    # --- start -----------------------------------------------------------------------------------

    def recover(self) -> None:
        """Load what is on disk and be ready to write. Raises DamagedError, StartError."""
        self.begin(self.load())

    def load(self) -> JournalFile | None:
        """Read snapshot and journals, writing nothing; returns the current journal.

        Both may be missing (a new installation), but not the snapshot alone. DamagedError.
        """
        others = (self._journal.path, self._journal.previous, self.path + ".previous")
        found = [path for path in others if os.path.exists(path)]
        if os.path.exists(self.path):
            self._load_snapshot(self.path)
        elif found:
            raise DamagedError(
                f"{self.path}: the snapshot is missing, but {', '.join(found)} exists, so this is "
                "no new installation: restore the snapshot, or let `wggw check --repair` make "
                "one, or move the other files away to begin empty"
            )
        try:
            migrate(self._db)
            self._load_counts()
        except sqlite3.Error as error:  # by other hands: its tables are not those of its version
            raise _damaged(self.path, 0, f"not a good snapshot: {error}") from None
        current = self._replay()
        if self._open_sync:
            self._take_back_open_sync()
        return current

    def _load_snapshot(self, path: str) -> None:
        try:
            self._take_over(decode_snapshot(Path(path).read_bytes(), self._vault, path))
        except (sqlite3.Error, ValueError, TypeError) as error:
            raise _damaged(path, 0, f"not a good snapshot: {error}") from None
        except OSError as error:
            raise _damaged(path, 0, f"cannot be read: {_reason(error)}") from None
        self._snapshot_number = self.number
        found = os.stat(path)
        self.snapshot_time, self.snapshot_bytes = found.st_mtime, found.st_size

    def _take_over(self, image: bytes) -> None:
        """Replace the rows by those of a database image. Raises sqlite3.Error, ValueError."""
        db = open_memory()
        try:
            db.deserialize(image)
            configure_memory(db)
            if image[APPLICATION_ID] == bytes(4):
                found = db.execute("PRAGMA integrity_check(1)").fetchone()[0]
                if found != "ok":
                    raise ValueError(found)
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if not 1 <= version <= len(MIGRATIONS):
                raise ValueError(f"schema version {version} is not known")
            row = db.execute("SELECT value FROM meta WHERE name = 'number'").fetchone()
            self.number = int(row[0])
            self.private_keys = {
                name.partition(" ")[2]: key
                for name, key in db.execute(
                    "SELECT name, value FROM meta WHERE name LIKE 'private_key %'"
                )
            }
            self._db, db = db, self._db
        finally:
            db.close()

    def _load_counts(self) -> None:
        self.counts.clear()
        for row in self._db.execute(
            "SELECT interface, status, count(*) FROM peers GROUP BY interface, status"
        ):
            self.counts[row[0], row[1]] = row[2]
        self._next_id = (self._db.execute("SELECT max(id) FROM peers").fetchone()[0] or 0) + 1
        self._any_released = bool(self._db.execute("SELECT 1 FROM released").fetchone())

    def _replay(self) -> JournalFile | None:
        """Apply every record above the snapshot's number; return the current journal's file."""
        current = read_journal(self._journal.path, self._vault)
        previous = self._read_previous(current)
        if previous:  # what a disk fault left behind the start of the next file is void
            limit = current.after if current else MAX_INTEGER
            self._replay_file(self._journal.previous, previous, limit)
            self._previous_end = previous.records[-1].number if previous.records else 0
        if current:
            self._replay_file(self._journal.path, current, MAX_INTEGER)
        return current

    def _read_previous(self, current: JournalFile | None) -> JournalFile | None:
        """The journal before the current one. A damaged one that nothing needs is none at all."""
        try:
            return read_journal(self._journal.previous, self._vault)
        except DamagedError as error:
            if current is None or current.after > self.number:
                raise
            path = self._journal.previous
            LOG.warning("%s: %s. The snapshot holds all of it: not used", path, error.found)
            return None

    def _replay_file(self, path: str, file: JournalFile, limit: int) -> None:
        if file.after > self.number:
            raise _damaged(
                path, 0, f"it follows record {file.after}, what is before it ends at {self.number}"
            )
        if file.torn:
            LOG.warning("%s: dropped a torn record of %d bytes", path, file.torn)
        records = [r for r in file.records if self.number < r.number <= limit]
        with self._without_rollback():
            for run in _runs(self._decoded(path, records)):
                self._replay_run(path, run)

    @staticmethod
    def _decoded(path: str, records: Iterable[Record]) -> Iterator[Numbered]:
        for number, content in records:
            try:
                yield number, _decode_record(content)
            except _BAD_RECORD as error:
                raise _bad_record(path, str(number), error) from None

    def _replay_run(self, path: str, run: Sequence[Numbered]) -> None:
        content = _merged(run)
        number = run[-1][0]
        try:
            self._open_sync += self._undo_of_part(content)
            self._apply(content)
        except _BAD_RECORD as error:
            first = run[0][0]
            which = str(number) if first == number else f"{first} or one up to {number}"
            raise _bad_record(path, which, error) from None
        self.number = number
        self._dirty = True

    def _undo_of_part(self, content: Mapping[str, Any]) -> list[Undo]:
        """What undoes a part of a desired state that is about to be applied; its end voids all."""
        sync = content.get("sync") or ()
        if "part" in sync:
            return self.undo_entries(self._steps_of(content))
        if sync:
            self._open_sync.clear()
        return []

    def _steps_of(self, content: Mapping[str, Any]) -> list[Step]:
        """The steps of a record that is about to be applied."""
        return [
            *(Step(self.by_id(peer_id), None) for peer_id in content["del"]),
            *(Step(self._before(peer), peer) for peer in content["put"]),
        ]

    def _before(self, peer: Peer) -> Peer | None:
        """The peer that this one is put in the place of; ids only grow."""
        return self.by_id(peer.id) if peer.id < self._next_id else None

    def _take_back_open_sync(self) -> None:
        """The gateway ended within a desired state, which nobody was told to be done.

        Raises DamagedError.
        """
        LOG.warning("an unfinished desired state of %d changes is undone", len(self._open_sync))
        try:
            with self._transaction():
                for entry in reversed(self._open_sync):
                    back = self.taken_back(entry.step)
                    if back is not None:
                        self._apply(_content([back]))
                        if entry.traffic and back.before is None:
                            self._db.execute(
                                _PUT_TRAFFIC, entry.traffic._replace(rx_seen=0, tx_seen=0)
                            )
        except _BAD_RECORD as error:
            found = f"its unfinished desired state cannot be undone: {error}"
            raise _damaged(self._journal.path, 0, found) from None
        self._open_sync.clear()
        self.number += 1  # no record has it: a fresh snapshot is written

    def begin(self, current: JournalFile | None) -> None:
        """Go on with the journal that load() read, or begin one behind a fresh snapshot.

        Raises StartError.
        """
        last = current.records[-1].number if current and current.records else 0
        last = max(last, current.after) if current else -1
        try:
            # A sealed journal is never resumed: a dropped record's number would be a nonce twice.
            if self.durability == "none" or last != self.number or self._vault:
                number, image = self._image()
                self._write_snapshot(number, image)
                self._begin_anew(number, image)
            elif current:
                self._journal.resume(current.size, self.number)
        except OSError as error:
            raise StartError(f"DB_PATH {self.path!r} cannot be written: {_reason(error)}") from None

    # --- reading ---------------------------------------------------------------------------------

    def get(self, public_key: str) -> Peer | None:
        row = self._db.execute(f"{_SELECT} WHERE public_key = ?", (public_key,)).fetchone()
        return Peer._make(row) if row else None

    def by_id(self, peer_id: int) -> Peer | None:
        row = self._db.execute(f"{_SELECT} WHERE id = ?", (peer_id,)).fetchone()
        return Peer._make(row) if row else None

    def traffic(self, peer_id: int) -> Traffic:
        row = self._db.execute(
            "SELECT rx_bytes, tx_bytes, last_handshake FROM traffic WHERE id = ?", (peer_id,)
        ).fetchone()
        return Traffic._make(row) if row else Traffic()

    def page(self, after: int, limit: int, chosen: Filter) -> list[tuple[Peer, Traffic]]:
        """Up to `limit` peers with an id above `after`, in order of creation."""
        query = _PAGE + "WHERE p.id > ? {} ORDER BY p.id LIMIT ?"
        if chosen == Filter(online_since=chosen.online_since):
            rows = self._db.execute(query.format(""), (after, limit)).fetchall()
        else:  # each kind has its peers in the index by id: as many from each, then the first ones
            rows = [
                row
                for kind in self._kinds(chosen)
                for condition, values in self._conditions(chosen)
                for row in self._db.execute(
                    query.format(condition),
                    (after, *kind, *values, limit),
                )
            ]
            rows.sort(key=lambda row: int(row[0]))
        width = len(Peer._fields)
        return [(Peer._make(row[:width]), Traffic._make(row[width:])) for row in rows[:limit]]

    def _kinds(self, chosen: Filter) -> list[tuple[str, str]]:
        return [
            kind
            for kind in self.counts
            if chosen.interface in (None, kind[0]) and chosen.status in (None, kind[1])
        ]

    def _conditions(self, chosen: Filter) -> list[tuple[str, tuple[int, ...]]]:
        """Who is online, or not, at chosen.online_since: few rows are looked at in vain.

        Those that the last sweep left online may be so no more; they are found by the time of
        their handshake.
        """
        kind = "AND p.interface = ? AND p.status = ? AND p.online = "
        online = (kind + "1 AND t.last_handshake > ?", (chosen.online_since,))
        became = (  # with + no index of peers serves: the one of handshakes is to be used
            "AND +p.interface = ? AND +p.status = ? AND +p.online = 1 AND p.id IN "
            "(SELECT id FROM traffic WHERE last_handshake > 0 "
            "AND last_handshake > ? AND last_handshake <= ?)",
            (self._swept, chosen.online_since),
        )
        if chosen.online is None:
            return [(kind + "0", ()), (kind + "1", ())]
        return [online] if chosen.online else [(kind + "0", ()), became]

    def peers_after(self, after: int, limit: int) -> list[Peer]:
        rows = self._db.execute(f"{_SELECT} WHERE id > ? ORDER BY id LIMIT ?", (after, limit))
        return [Peer._make(row) for row in rows]

    def wire_rows(self, interface: str, after: int, limit: int) -> list[Sequence[Any]]:
        """An id above `after` and what encode_wire() takes, of an interface's active peers.

        Others have no key there: who looked for the next of a few would read the whole table.
        """
        return self._db.execute(
            "SELECT id, CASE WHEN interface = ? AND status = 'active' THEN public_key END, "
            "preshared_key, assigned_ip, assigned_ipv6 FROM peers "
            "WHERE id > ? ORDER BY id LIMIT ?",
            (interface, after, limit),
        ).fetchall()

    def held_rows(
        self, interface: str, family: str, after: int, limit: int
    ) -> list[tuple[int, str | None]]:
        """(id, address) of an interface's peers; others above `after` have none there."""
        column = ADDRESS_FIELD[family]
        return self._db.execute(
            f"SELECT id, CASE WHEN interface = ? THEN {column} END FROM peers "  # noqa: S608  names of this file
            "WHERE id > ? ORDER BY id LIMIT ?",
            (interface, after, limit),
        ).fetchall()

    def released(self, family: str) -> Iterator[str]:
        """Addresses that were given back, oldest first."""
        rows = self._db.execute(
            "SELECT address FROM released WHERE (address LIKE '%:%') = ? ORDER BY sequence",
            (family == "ipv6",),
        )
        return (row[0] for row in rows)

    def meta(self, name: str) -> Any:
        """What a row of META_PARSERS says, None when it is not there. Raises ValueError."""
        row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return META_PARSERS[name](row[0]) if row else None

    def interfaces(self) -> list[str]:
        return [row[0] for row in self._db.execute("SELECT DISTINCT interface FROM peers")]

    def expired(self, now: int, limit: int) -> list[Peer]:
        """Active peers whose time has come."""
        rows = self._db.execute(
            f"{_SELECT} WHERE status = 'active' AND expires_at <= ? ORDER BY expires_at LIMIT ?",
            (now, limit),
        )
        return [Peer._make(row) for row in rows]

    def not_expired(self, now: int, limit: int) -> list[Peer]:
        """Peers that were suspended for a time that has not come: the clock was set back."""
        rows = self._db.execute(
            f"{_SELECT} WHERE status_reason = 'expired' AND expires_at > ? LIMIT ?", (now, limit)
        )
        return [Peer._make(row) for row in rows]

    def online(self, since: int) -> int:
        """How many peers had a handshake after `since` (Unix seconds)."""
        row = self._db.execute(  # the literal term lets the partial index serve
            "SELECT count(*) FROM traffic WHERE last_handshake > 0 AND last_handshake > ?", (since,)
        )
        return int(row.fetchone()[0])

    def last_handshakes(self, limit: int) -> dict[str, int]:
        """The newest handshakes: public key -> Unix seconds."""
        rows = self._db.execute(
            "SELECT p.public_key, t.last_handshake FROM traffic t JOIN peers p ON p.id = t.id "
            "WHERE t.last_handshake > 0 ORDER BY t.last_handshake DESC LIMIT ?",
            (limit,),
        )
        return dict(rows.fetchall())

    def new_id(self) -> int:
        """The id of the next new peer; ids only grow while the process lives."""
        return self._next_id

    # --- changing --------------------------------------------------------------------------------

    def apply(self, steps: Sequence[Step]) -> None:
        """Make the steps true in the rows; commit() or revert() must follow under the same lock.

        All of them or none: raises sqlite3.IntegrityError when a key or an address is taken.
        """
        content = _content(steps)
        if self.durable >= self.number:  # nothing can be undone any more
            self._gone.clear()
        gone = {peer_id: self.traffic_row(peer_id) for peer_id in content["del"]}
        if any(before for before, _ in steps):  # new peers alone are taken back by deleting them
            self._saved = self.counts.copy()
            self._db.execute("SAVEPOINT steps")
        try:
            self._apply(content)
        except sqlite3.Error:
            self._roll_back()
            raise
        self._gone.update(gone)

    def revert(self, steps: Sequence[Step]) -> None:
        """Take back apply() in the place of commit(): what traffic was seen, too."""
        if self._saved is None:
            self._apply(_content([Step(after, before) for before, after in steps]))
        self._roll_back()

    def _roll_back(self) -> None:
        if self._saved is not None:
            self._db.execute("ROLLBACK TO steps")
            self._db.execute("RELEASE steps")
            self.counts, self._saved = self._saved, None

    def undo_entries(self, steps: Sequence[Step]) -> list[Undo]:
        """What taken_back() needs of steps that are about to be applied."""
        return [
            Undo(step, self.traffic_row(step.before.id) if step.before and not step.after else None)
            for step in steps
        ]

    def taken_back(self, step: Step) -> Step | None:
        """What undoes a step after others may have changed its peer: their changes stay.

        A peer that the step made goes; one that it took away comes back unless its key is there
        again; of one that it changed, what is still as the step left it becomes as it was.
        """
        before, after = step
        now = self.by_id((before or cast(Peer, after)).id)
        if before is None:
            return Step(now, None) if now else None
        if after is None:
            taken = now or self.get(before.public_key)
            return None if taken else Step(None, before)
        if now is None:
            return None
        kept: dict[str, Any] = {
            n: v for n, v, left in zip(Peer._fields, now, after, strict=True) if v != left
        }
        back = before._replace(**kept)
        return Step(now, back) if back != now else None

    def end_sync(self) -> int:
        """Everything of a desired state, or of its undoing, is there; returns the record."""
        return self._put_record({"put": [], "del": [], "sync": ["end"]})

    def _put_record(self, content: Mapping[str, Any]) -> int:
        self.number += 1
        self._dirty = True
        if self.durability != "none":
            self._journal.append(self.number, functools.partial(_encode_record, content))
        return self.number

    def commit(self, steps: Sequence[Step], part: bool = False) -> int:
        """Put applied steps into the journal; returns the number to wait() for.

        `part`: recovery takes them back unless end_sync() follows.
        """
        if self._saved is not None:
            self._db.execute("RELEASE steps")
            self._saved = None
        content = _content(steps)
        return self._put_record({**content, "sync": ["part"]} if part else content)

    def undo(self, steps: Sequence[Step]) -> None:
        """Take back what commit() put into the journal; the number stays used."""
        self._apply(_content([Step(step.after, step.before) for step in reversed(steps)]))
        for step in steps:
            traffic = self._gone.get(step.before.id) if step.before else None
            if step.before and not step.after and traffic:
                self._db.execute(_PUT_TRAFFIC, traffic)

    def set_meta(self, name: str, text: str | None) -> None:
        """Set a row of META_PARSERS, None to take it away; commit_meta() must follow."""
        self._apply({"put": [], "del": [], "set": {name: text}})

    def commit_meta(self, name: str, text: str) -> int:
        """Put what set_meta() did into the journal; returns the number to wait() for."""
        return self._put_record({"put": [], "del": [], "set": {name: text}})

    def _apply(self, content: Mapping[str, Any]) -> None:
        """The one way in which a change reaches the rows: live, replayed and undone."""
        if sum(map(len, content.values())) == 1:  # only its first statement can be refused
            self._apply_rows(content)
            return
        before = self.counts.copy()
        self._db.execute("SAVEPOINT change")
        try:
            self._apply_rows(content)
        except Exception:  # also one of _BAD_RECORD: salvage() goes on behind it
            self._db.execute("ROLLBACK TO change")
            self._db.execute("RELEASE change")
            self.counts = before
            raise
        self._db.execute("RELEASE change")

    def _apply_rows(self, content: Mapping[str, Any]) -> None:
        for peer_id in content["del"]:
            self._delete(peer_id)
        self._put(content["put"])
        if "traffic" in content:
            self._db.executemany(_PUT_TRAFFIC, content["traffic"])
        for name, text in content.get("set", {}).items():
            if text is None:
                self._db.execute("DELETE FROM meta WHERE name = ?", (name,))
            else:
                self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, text))

    def _put(self, peers: Sequence[Peer]) -> None:
        known: dict[int, tuple[Any, ...]] = {}
        for peer in peers:
            if peer.id < self._next_id:  # it may be there already
                row = self._db.execute(_SELECT_KEPT, (peer.id,)).fetchone()
                if row is not None:
                    known[peer.id] = row
        newest = self._next_id

        def statement_for(peer: Peer) -> str:
            nonlocal newest
            if peer.id < newest:
                return _PUT
            newest = peer.id + 1
            return _INSERT

        for statement, rows in itertools.groupby(peers, statement_for):
            self._db.executemany(statement, rows)
        self._next_id = newest
        held: dict[str, bool] = {}  # in the end, in the order in which it came to be so
        for peer in peers:
            now = (peer.interface, peer.status, peer.assigned_ip, peer.assigned_ipv6)
            before = known.get(peer.id)
            if before is not None:
                self.counts[before[:2]] -= 1
                for address in before[2:]:
                    if address and address not in now[2:]:
                        held.pop(address, None)
                        held[address] = False
            if self._any_released or held:  # or there is nothing that this could change
                held.update((address, True) for address in now[2:] if address)
            known[peer.id] = now
            self.counts[now[:2]] += 1
        self._note_released(held)

    def _note_released(self, held: Mapping[str, bool]) -> None:
        """Keep the table of released addresses, oldest first, in line with what changed."""
        left = [(address,) for address, is_held in held.items() if not is_held]
        if left:
            self._db.executemany("INSERT OR REPLACE INTO released (address) VALUES (?)", left)
            self._any_released = True
        if self._any_released:
            taken = [(address,) for address, is_held in held.items() if is_held]
            self._db.executemany("DELETE FROM released WHERE address = ?", taken)

    def _delete(self, peer_id: int) -> None:
        old = self._db.execute(
            "DELETE FROM peers WHERE id = ? RETURNING interface, status", (peer_id,)
        ).fetchall()
        if not old:
            raise sqlite3.IntegrityError(f"no peer with id {peer_id}")
        self.counts[old[0]] -= 1
        self._any_released = True

    def traffic_row(self, peer_id: int) -> TrafficRow:
        row = self._db.execute("SELECT * FROM traffic WHERE id = ?", (peer_id,)).fetchone()
        return TrafficRow._make(row) if row else TrafficRow(peer_id, 0, 0, 0, 0, 0)

    def sample(self, states: Sequence[PeerState]) -> Sampled:
        """Add what the interface counted since the last sample to the peers' totals."""
        counted = {
            encode_key(state.peer.public_key): state
            for state in states
            if state.last_handshake or state.rx_bytes or state.tx_bytes
        }
        rows = self._db.execute(
            f"{_COUNTED} p.public_key IN ({', '.join('?' * len(counted))})", tuple(counted)
        )
        changed: list[TrafficRow] = []
        rx = tx = 0
        over: list[str] = []
        for key, status, quota, *numbers in rows:
            before = TrafficRow._make(numbers)
            state = counted[key]
            after = before.counted(state.rx_bytes, state.tx_bytes, state.last_handshake)
            if after == before:
                continue
            changed.append(after)
            rx += after.rx_bytes - before.rx_bytes
            tx += after.tx_bytes - before.tx_bytes
            if quota is not None and status == "active" and after.rx_bytes + after.tx_bytes > quota:
                over.append(key)
        self.write_traffic(changed)
        return Sampled(rx, tx, tuple(over))

    def sample_parked(self, entries: Sequence[tuple[bytes, Parked, PeerState | None]]) -> Sampled:
        """Add the last counters of keys that the interface has dropped; None: they are lost."""
        rx = tx = 0
        changed: dict[int, TrafficRow] = {}  # a peer may have left two keys
        for key, parked, state in entries:
            row = self._db.execute(f"{_COUNTED} p.id = ?", (parked.peer_id,)).fetchone()
            if row is None:
                continue
            before = changed.get(parked.peer_id) or TrafficRow._make(row[3:])
            after = before._replace(rx_seen=parked.rx_seen, tx_seen=parked.tx_seen)
            if state is not None:
                handshake = max(state.last_handshake, before.last_handshake)
                after = after.counted(state.rx_bytes, state.tx_bytes, handshake)
            own = row[0] == encode_key(key)  # or the peer has another key, which is counted on
            after = after._replace(
                rx_seen=0 if own else before.rx_seen, tx_seen=0 if own else before.tx_seen
            )
            if after != before:
                changed[parked.peer_id] = after
            rx += after.rx_bytes - before.rx_bytes
            tx += after.tx_bytes - before.tx_bytes
        self.write_traffic(list(changed.values()))
        return Sampled(rx, tx)

    def write_traffic(self, rows: Sequence[TrafficRow]) -> None:
        """Put rows into the table and, while the disk works, into the journal."""
        if not rows:
            return
        content = {"put": [], "del": [], "traffic": rows}
        self._apply(content)
        self._dirty = True
        if self.durability != "none" and not self.failure:  # the snapshot that mends it has them
            self.number += 1
            self._journal.append(self.number, functools.partial(_encode_record, content))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    @contextlib.contextmanager
    def _without_rollback(self) -> Iterator[None]:
        """A transaction for replay: what fails there is not used any more, so that the copies
        need not be made (a third of the time) which SQLite would go back to."""
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("BEGIN")
        try:
            yield
        except BaseException:
            self._db.close()
            self._db = open_memory()
            raise
        self._db.execute("COMMIT")
        self._db.execute("PRAGMA journal_mode = MEMORY")

    def restart_counters(self, public_keys: Sequence[bytes]) -> None:
        """The interface got these peers anew: it counts them from 0 again."""
        rows = [
            TrafficRow._make(row)
            for key in public_keys
            for row in self._db.execute(
                "SELECT * FROM traffic WHERE rx_seen + tx_seen > 0 "
                "AND id = (SELECT id FROM peers WHERE public_key = ?)",
                (encode_key(key),),
            )
        ]
        self.write_traffic([row._replace(rx_seen=0, tx_seen=0) for row in rows])

    def restart_suspended(self) -> None:
        """No interface has a suspended peer: when one comes back, it is counted from 0."""
        rows = self._db.execute(
            "SELECT t.* FROM peers p JOIN traffic t ON t.id = p.id "
            "WHERE p.status = 'suspended' AND p.status <> 'active' AND t.rx_seen + t.tx_seen > 0"
        ).fetchall()
        for start in range(0, len(rows), READ_CHUNK):
            chunk = [TrafficRow._make(row) for row in rows[start : start + READ_CHUNK]]
            self.write_traffic([row._replace(rx_seen=0, tx_seen=0) for row in chunk])

    def sweep_online(self, since: int) -> None:
        """After a sample: peers without a handshake after `since` are offline, for page().

        A handshake sets the column `online`; this takes it back, at the cost of those whose last
        one was since the last sweep's `since`. A clock that was set back is followed, too.
        """
        low, high = sorted((self._swept, since))
        online = int(since < self._swept)
        self._db.execute(
            "UPDATE peers SET online = ? WHERE online <> ? AND id IN (SELECT id FROM traffic "
            "WHERE last_handshake > 0 AND last_handshake > ? AND last_handshake <= ?)",
            (online, online, low, high),
        )
        self._swept = since

    def set_seen(self, entries: Sequence[Parked]) -> None:
        """After an undone change: the interface counts on from here."""
        self._db.executemany(
            "UPDATE traffic SET rx_seen = ?, tx_seen = ? WHERE id = ?",
            [(entry.rx_seen, entry.tx_seen, entry.peer_id) for entry in entries],
        )

    def over_quota(self, after: int, limit: int) -> list[Peer]:
        """Active peers that used up their quota, with an id above `after`."""
        columns = ", ".join(f"p.{name}" for name in Peer._fields)
        rows = self._db.execute(
            f"SELECT {columns} FROM peers p JOIN traffic t ON t.id = p.id WHERE p.id > ? "  # noqa: S608  names of this file
            "AND p.quota_bytes IS NOT NULL AND p.status = 'active' "
            "AND t.rx_bytes + t.tx_bytes > p.quota_bytes "
            "ORDER BY p.id LIMIT ?",
            (after, limit),
        )
        return [Peer._make(row) for row in rows]

    # --- the disk: these need no lock ------------------------------------------------------------

    @property
    def failure(self) -> str | None:
        """Why changes are refused, or None."""
        return self._journal.failure

    @property
    def durable(self) -> int:
        return self._journal.durable if self.durability == "commit" else self.number

    @property
    def journal_bytes(self) -> int:
        return self._journal.size if self.durability != "none" else 0

    @property
    def journal_syncs(self) -> Histogram:
        return self._journal.syncs

    def wait(self, number: int) -> None:
        """Return when the change is as safe as DURABILITY promises. Raises DiskError."""
        if self.durability == "commit":
            self._journal.wait(number)

    def is_lost(self, number: int) -> bool:
        """Whether this change was undone because the disk refused it."""
        return self._journal.is_lost(number)

    def flush(self) -> None:
        if self.durability != "none":
            self._journal.flush()

    def discard(self) -> None:
        self._journal.discard()

    def snapshot(
        self, lock: contextlib.AbstractContextManager[Any], undo: Callable[[], None]
    ) -> bool:
        """Write a snapshot if something changed; `lock` is held only while the image is made.

        After a disk fault undo() first takes back what did not reach the disk, and the snapshot is
        what makes changes possible again. Raises OSError or DiskError; snapshot and journal on disk
        then still hold everything.
        """
        with self.snapshot_lock:
            with lock:
                if not self._dirty and self.failure is None:
                    return False
                size = self._image_size()
            warm_up(size)
            with lock:
                failed = self.failure is not None
                if failed:
                    undo()
                number, image = self._image()
                self._dirty = False
            try:
                if not failed and self.durability != "none":
                    self._rotate(number)
                self._write_snapshot(number, image)
                if failed:
                    self._begin_anew(number, image)
                elif self.durability == "none":
                    self._restart_journal(number)
            except (OSError, DiskError):
                self._dirty = True
                raise
            return True

    def _image(self) -> tuple[int, bytes]:
        rows = {"number": str(self.number)}
        if self._vault:  # in clear text they stay in their own files
            rows |= {f"private_key {name}": key for name, key in self.private_keys.items()}
        self._db.execute("DELETE FROM meta WHERE name LIKE 'private_key %'")
        self._db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", rows.items())
        return self.number, self._db.serialize()

    def _image_size(self) -> int:
        query = "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"
        size: int = self._db.execute(query).fetchone()[0]
        return size

    def _rotate(self, number: int) -> None:
        """Begin a new journal, unless the snapshot on disk still needs both of them."""
        if self._previous_end <= self._snapshot_number:
            self._previous_end = self._journal.rotate(number)
        else:
            self._journal.flush()  # the image may hold changes that are not on disk yet

    def _begin_anew(self, number: int, image: bytes) -> None:
        """Behind a snapshot of `image` just written: a second copy as .previous, an empty journal.

        The journals from before are then needed by neither generation, and nothing of them stays.
        """
        self._write_snapshot(number, image)
        self._restart_journal(number)
        with contextlib.suppress(FileNotFoundError):
            self._disk.unlink(self._journal.previous)
        self._previous_end = 0

    def _write_snapshot(self, number: int, image: bytes, restore: bool = False) -> None:
        """Replace the snapshot; the one before stays as DB_PATH.previous.

        With `restore` a failure puts that one back: when the new one is in place but its directory
        was refused, a crash now must not start from what was never accepted.
        """
        if os.path.exists(self.path):
            self._link_over(self.path, self.path + ".previous")
        try:
            self._disk.replace(self.path, snapshot_parts(image, self._vault))
        except OSError:
            if restore:
                with contextlib.suppress(OSError):
                    self._link_over(self.path + ".previous", self.path)
            raise
        self._snapshot_number = number
        self.snapshot_time, self.snapshot_bytes = time.time(), os.stat(self.path).st_size

    def _link_over(self, path: str, name: str) -> None:
        """Let `name` be the same file as `path`, at no moment missing."""
        temporary = name + ".tmp"
        with contextlib.suppress(FileNotFoundError):
            self._disk.unlink(temporary)
        self._disk.link(path, temporary)
        self._disk.rename(temporary, name)

    def image(self) -> bytes:
        """The database as bytes, for seal()."""
        return self._image()[1]

    def seal(self, image: bytes) -> bytes:
        """An image as a snapshot file; needs no lock."""
        return encode_snapshot(image, self._vault)

    def read_image(self, data: bytes, segments: Iterable[tuple[int, bytes]] = ()) -> Store:
        """A store of its own, without files, that holds a snapshot file's state.

        `segments` are (last number, journal file) to be replayed on it. Raises DamagedError or
        ConfigError when the data does not verify.
        """
        other = Store("the snapshot", "none", self._disk, self._vault)
        try:
            other._take_over(decode_snapshot(data, self._vault, "the snapshot"))
            migrate(other._db)
            other._load_counts()
            for number, segment in segments:
                other._replay_segment(number, segment)
            other._verify_rows(self._db)
            other._db.execute(
                "UPDATE peers SET online = 1 "
                "WHERE online = 0 AND id IN (SELECT id FROM traffic WHERE last_handshake > 0)"
            )
        except (sqlite3.Error, ValueError, TypeError, OverflowError) as error:
            raise _damaged("the snapshot", 0, str(error)) from None
        return other

    def _replay_segment(self, number: int, data: bytes) -> None:
        name = "a journal segment"
        file = parse_journal(data, name, self._vault)
        if file.torn or not file.records or file.records[-1].number != number:
            raise _damaged(name, file.size, f"it does not end with record {number}")
        self._replay_file(name, file, MAX_INTEGER)

    def _verify_rows(self, model: sqlite3.Connection) -> None:
        """Believe nothing of a database from outside. Raises ValueError, sqlite3.Error."""
        schema = "SELECT type, name, sql FROM sqlite_master ORDER BY type, name"
        if self._db.execute(schema).fetchall() != model.execute(schema).fetchall():
            raise ValueError("its tables are not those of this version")
        if not 0 <= self.number < MAX_INTEGER // 2:
            raise ValueError("its record number is out of range")
        for (address,) in self._db.execute("SELECT address FROM released"):
            verify_address(address)
        if self._db.execute(_BAD_TRAFFIC).fetchone():
            raise ValueError("traffic is out of range")
        if self._db.execute("SELECT 1 FROM peers WHERE id < 1").fetchone():
            raise ValueError("an id is out of range")
        for name in META_PARSERS:
            self.meta(name)
        after = 0
        while peers := self.peers_after(after, READ_CHUNK):
            for peer in peers:
                verify_peer(peer)
            after = peers[-1].id

    def adopt(self, other: Store) -> None:
        """Become `other`, on disk first. Raises OSError, DiskError with nothing changed here.

        Under snapshot_lock and then the gateway's lock. The number goes up, so that no old record
        is replayed over the new state.
        """
        self.flush()
        other.number = max(self.number, other.number) + 1
        other.private_keys = self.private_keys
        number, image = other._image()
        try:
            self._write_snapshot(number, image, restore=True)
        except OSError as error:  # which of the two is there now? Nothing counts until a fresh one
            self.number = number
            self._dirty = True
            self._journal.fail(error)
            raise
        self.number, self._db = number, other._db
        self.counts, self._next_id = other.counts, max(self._next_id, other._next_id)
        self._any_released = other._any_released
        self._swept = 0
        self._dirty = False
        try:
            self._begin_anew(number, image)
        except OSError as error:
            self._journal.fail(error)

    def generation(self) -> list[tuple[int, int] | None]:
        """Which files are in place: changes when a snapshot or a rotation replaces one."""
        paths = (self.path, self._journal.previous, self._journal.path)
        return [_file_identity(path) for path in paths]

    def salvage(self) -> Iterator[str]:
        """Read whatever can be read into this store; yields what was found, line by line."""
        for path in (self.path, self.path + ".previous"):
            try:
                self._load_snapshot(path)
            except DamagedError as error:
                yield f"not used: {str(error).split('. ')[0]}"
            else:
                yield f"used: {path}, record {self.number}"
                break
        migrate(self._db)
        self._load_counts()
        for path in (self._journal.previous, self._journal.path):
            if os.path.exists(path):
                yield self._salvage_journal(path)
        if self._open_sync:
            try:
                changes = len(self._open_sync)
                self._take_back_open_sync()
                yield f"undone: {changes} changes of an unfinished desired state"
            except DamagedError:
                yield f"kept: {changes} changes of an unfinished desired state"

    def _salvage_journal(self, path: str) -> str:
        """Apply what can be. A desired state whose end may be what is missing counts as done."""
        applied = refused = missing = 0
        for record in salvage_journal(Path(path).read_bytes(), path, self._vault):
            if record.number <= self.number:
                continue
            gap = record.number - self.number - 1
            missing += gap
            if gap:
                self._open_sync.clear()
            try:
                content = _decode_record(record.content)
                undo = self._undo_of_part(content)
                self._apply(content)
                applied += 1
            except _BAD_RECORD:
                refused += 1
                self._open_sync.clear()
            else:
                self._open_sync += undo
            self.number = record.number
        return f"used: {path}: {applied} records, {missing} missing, {refused} not applicable"

    # --- for the remote copy ---------------------------------------------------------------------

    def on_durable(self, tell: Callable[[Sequence[Record]], None]) -> None:
        """Have `tell` called with records once they are on disk, in order."""
        self._journal.on_durable = tell

    def segment(self, after: int, records: Sequence[Record]) -> bytes:
        """Records as a journal file of their own."""
        return encode_journal(after, records, self._vault)

    def snapshot_file(self) -> tuple[float, int, bytes]:
        """The snapshot on disk: when it was written, its number, its bytes. Raises OSError."""
        with self.snapshot_lock:
            return self.snapshot_time, self._snapshot_number, Path(self.path).read_bytes()

    def take_copy(self, other: Store) -> None:
        """Become `other`, between load() and begin(); what was here stays as DB_PATH.superseded.

        Raises OSError.
        """
        if self.number:
            self.keep_superseded(self)
        if other._open_sync:
            other._take_back_open_sync()
        self.number, self._db = other.number, other._db
        self.counts, self._next_id = other.counts, other._next_id
        self._any_released = other._any_released
        self.private_keys = other.private_keys

    def keep_superseded(self, state: Store) -> None:
        """Write a state that is not used to DB_PATH.superseded. Raises OSError."""
        state.write_copy(self.path + ".superseded")

    def writers(self) -> dict[str, int | None]:
        """What remember_writers() was told, by this process or one before; {} for never."""
        try:
            words = Path(self.path + ".writers").read_text("ascii").split()
            pairs = [word.partition(":") for word in words]
            return {name: int(sequence) if colon else None for name, colon, sequence in pairs}
        except (OSError, ValueError):
            return {}

    def remember_writers(self, writers: Mapping[str, int | None]) -> None:
        """Keep who wrote the states of the copy that the files here contain.

        With the last manifest that they contain; None: all, for these files wrote them. Raises
        OSError.
        """
        words = [name if last is None else f"{name}:{last}" for name, last in writers.items()]
        self._disk.replace(self.path + ".writers", [" ".join(words).encode("ascii") + b"\n"])

    def write_copy(self, path: str) -> None:
        """Write the state as a snapshot file of its own. Raises OSError."""
        self._disk.replace(path, snapshot_parts(self.image(), self._vault))

    def _restart_journal(self, number: int) -> None:
        if self.durability != "none":
            self._journal.start(number)
            return
        for path in (self._journal.previous, self._journal.path):
            with contextlib.suppress(FileNotFoundError):
                self._disk.unlink(path)

    def close(self) -> None:
        self._journal.close()
        self._db.close()


# ==================================================================================================
# remote: a copy of snapshot and journal in an object store, for nodes without a disk of their own
# Never here: what a record means, and anything that a request waits for.
# ==================================================================================================

MANIFEST_MAGIC = b"wggw-copy 1"


class CopyError(Exception):
    """The object store did not do what was asked; the text is safe to show."""


class CopyDamaged(CopyError):
    """What the store gave is not what was put there, as long as it keeps giving that."""


class CopyRefused(CopyError):
    """Going on would destroy what another gateway put there: only an operator can decide."""


class ObjectStore:
    """Objects below one https URL, by GET and PUT; every call has a deadline. Raises CopyError.

    `authorize(method, path, content)` gives the headers. Without signatures nobody checks what
    arrives there, so each object is then read back.
    """

    def __init__(
        self, url: str, authorize: Callable[[str, str, bytes], dict[str, str]], read_back: bool
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        self._host, self._port = cast(str, parts.hostname), parts.port
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._path = parts.path.rstrip("/") + "/"
        self._authorize = authorize
        self._read_back = read_back

    def get(self, name: str, limit: int) -> bytes | None:
        """An object of at most `limit` bytes, None when there is none of this name."""
        status, content = self._exchange("GET", name, b"", limit)
        if status == HTTPStatus.NOT_FOUND and self._error_code(content) in ("", "NoSuchKey"):
            return None
        if status != HTTPStatus.OK:
            raise CopyError(f"GET {name}: status {status} {self._error_code(content)}".rstrip())
        return content

    def put(self, name: str, content: bytes) -> None:
        """Return when the store has the object."""
        status, answer = self._exchange("PUT", name, content, MAX_HEAD)
        if status not in (HTTPStatus.OK, HTTPStatus.CREATED, HTTPStatus.NO_CONTENT):
            raise CopyError(f"PUT {name}: status {status} {self._error_code(answer)}".rstrip())
        if self._read_back and self.get(name, len(content)) != content:
            raise CopyError(f"PUT {name}: what can be read there is not what was put there")

    @staticmethod
    def _error_code(answer: bytes) -> str:
        """What S3 calls an error; nothing elsewhere."""
        match = re.search(rb"<Code>([A-Za-z0-9]{1,64})</Code>", answer)
        return match[1].decode("ascii") if match else ""

    def _exchange(self, method: str, name: str, content: bytes, limit: int) -> tuple[int, bytes]:
        if self._tls:
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                self._host, self._port, timeout=COPY_TIMEOUT, context=self._tls
            )
        else:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=COPY_TIMEOUT)
        deadline = COPY_DEADLINE + max(limit, len(content)) / COPY_SLOWEST
        path = self._path + name
        watchdog: threading.Timer | None = None
        try:
            connection.connect()
            watchdog = threading.Timer(deadline, _cut, (connection.sock,))
            watchdog.daemon = True
            watchdog.start()
            headers = self._authorize(method, path, content)
            connection.request(method, path, content or None, headers)
            response = connection.getresponse()
            body = response.read(limit if response.status == HTTPStatus.OK else MAX_HEAD)
            if response.status == HTTPStatus.OK and method == "GET" and response.length:
                raise CopyError(f"GET {name}: the answer is truncated, or larger than it may be")
            return response.status, body
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise CopyError(f"{method} {name}: {_reason(error)}") from None
        finally:
            if watchdog:
                watchdog.cancel()
            connection.close()


def _cut(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it may be closed already
        connected.shutdown(socket.SHUT_RDWR)


class AwsKeys(NamedTuple):
    """Who signs requests to S3, and for which region."""

    access_key: str
    secret_key: str
    session_token: str | None
    region: str

    def __repr__(self) -> str:
        return f"AwsKeys({self.access_key})"


def sign_v4(keys: AwsKeys, method: str, path: str, headers: Mapping[str, str]) -> str:
    """The Authorization header of AWS Signature Version 4 for service s3 and an empty query.

    `path` is encoded already. All of `headers` are signed: names in lower case, `host`,
    `x-amz-date` and `x-amz-content-sha256` among them. (AWS General Reference, "Create a signed
    AWS API request".)
    """
    names = ";".join(sorted(headers))
    lines = [method, path, "", *(f"{name}:{headers[name]}" for name in sorted(headers))]
    canonical = "\n".join([*lines, "", names, headers["x-amz-content-sha256"]])
    stamp = headers["x-amz-date"]
    scope = f"{stamp[:8]}/{keys.region}/s3/aws4_request"
    digest = hashlib.sha256(canonical.encode("utf-8")).hexdigest()
    key = b"AWS4" + keys.secret_key.encode("utf-8")
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode("utf-8"), "sha256")
    text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{digest}"
    mac = hmac.digest(key, text.encode("utf-8"), "sha256").hex()
    credential = f"{keys.access_key}/{scope}"
    return f"AWS4-HMAC-SHA256 Credential={credential},SignedHeaders={names},Signature={mac}"


def _s3_headers(
    keys: AwsKeys, host: str, clock: Callable[[], float]
) -> Callable[[str, str, bytes], dict[str, str]]:
    def authorize(method: str, path: str, content: bytes) -> dict[str, str]:
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(clock()))
        payload = hashlib.sha256(content).hexdigest()
        headers = {"host": host, "x-amz-content-sha256": payload, "x-amz-date": stamp}
        if keys.session_token:
            headers["x-amz-security-token"] = keys.session_token
        return {**headers, "Authorization": sign_v4(keys, method, path, headers)}

    return authorize


def open_object_store(config: Config, clock: Callable[[], float]) -> ObjectStore | None:
    """What SNAPSHOT_URL names, None when it is not set."""
    if config.snapshot_url is None:
        return None
    parts = urllib.parse.urlsplit(config.snapshot_url)
    if parts.scheme == "https":
        token = config.snapshot_token
        bearer = {"Authorization": f"Bearer {token}"} if token else {}
        return ObjectStore(config.snapshot_url, lambda *_: dict(bearer), read_back=True)
    region = config.aws_region or config.aws_default_region or "us-east-1"
    endpoint = config.aws_endpoint_url_s3 or config.aws_endpoint_url
    bucket = parts.netloc
    if endpoint:
        url = f"{endpoint.rstrip('/')}/{bucket}"
    elif "." in bucket:  # a wildcard certificate covers no dots
        url = f"https://s3.{region}.amazonaws.com/{bucket}"
    else:
        url = f"https://{bucket}.s3.{region}.amazonaws.com"
    keys = AwsKeys(
        cast(str, config.aws_access_key_id),
        cast(str, config.aws_secret_access_key),
        config.aws_session_token,
        region,
    )
    host = urllib.parse.urlsplit(url).netloc
    return ObjectStore(url + parts.path, _s3_headers(keys, host, clock), read_back=False)


class Part(NamedTuple):
    """An object of the copy: what it holds lies above `after` and goes up to `number`.

    `slot` is its name: part-000 and so on. A snapshot has `after` = 0.
    """

    slot: int
    after: int
    number: int
    size: int
    sha256: str


class Manifest(NamedTuple):
    """What the copy consists of: one or two snapshots, the newest first, and journal segments.

    Manifests alternate between two objects, so that a torn upload leaves the one before.
    """

    sequence: int
    writer: str
    snapshots: tuple[Part, ...]
    segments: tuple[Part, ...]

    @property
    def parts(self) -> tuple[Part, ...]:
        return (*self.snapshots, *self.segments)

    @property
    def number(self) -> int:
        """The last record that the copy holds."""
        return max(part.number for part in self.parts)

    @property
    def chain(self) -> int:
        """The record that the next segment follows."""
        return (self.segments or self.snapshots)[-1].number


def encode_manifest(manifest: Manifest) -> bytes:
    text = json.dumps(manifest._asdict(), separators=(",", ":")).encode("ascii")
    return b"%b %08x %b\n" % (MANIFEST_MAGIC, zlib.crc32(text), text)


def parse_manifest(data: bytes) -> Manifest:
    """Raises ValueError for anything that encode_manifest() did not make."""
    match = re.fullmatch(re.escape(MANIFEST_MAGIC) + rb" ([0-9a-f]{8}) (\{.*\})\n", data)
    if match is None or b"%08x" % zlib.crc32(match[2]) != match[1]:
        raise ValueError("damaged")
    given = load_json(str(match[2], "utf-8"))
    sequence, writer = given["sequence"], given["writer"]
    snapshots = tuple(_parse_part(row) for row in given["snapshots"])
    segments = tuple(_parse_part(row) for row in given["segments"])
    if type(sequence) is not int or not 1 <= sequence <= MAX_INTEGER:
        raise ValueError("damaged")
    if not re.fullmatch("[0-9a-f]{16}", writer) or not 1 <= len(snapshots) <= 2:
        raise ValueError("damaged")
    return Manifest(sequence, writer, snapshots, segments)


def _parse_part(row: Any) -> Part:
    part = Part(*row)
    if any(type(n) is not int or not 0 <= n <= MAX_INTEGER for n in part[:4]):
        raise ValueError("damaged")
    if not re.fullmatch("[0-9a-f]{64}", part.sha256) or part.size > MAX_SNAPSHOT:
        raise ValueError("damaged")
    return part


def read_manifests(remote: ObjectStore) -> list[Manifest]:
    """Those that are there, the newest first. Raises CopyError."""
    found = [remote.get(f"manifest-{i}", MAX_MANIFEST) for i in (0, 1)]
    good: list[Manifest] = []
    for name, data in enumerate(found):
        try:
            if data is not None:
                good.append(parse_manifest(data))
        except (ValueError, KeyError, TypeError):
            LOG.error("remote copy: manifest-%d is damaged", name)
    if not good and any(data is not None for data in found):
        raise CopyDamaged("its manifest is damaged")
    return sorted(good, reverse=True)


def read_copy(remote: ObjectStore, manifest: Manifest, store: Store) -> Store:
    """The state that a manifest describes, as a store of its own, verified like an import.

    Raises CopyError; ConfigError when SNAPSHOT_KEY is not its key.
    """
    for snapshot in manifest.snapshots:
        try:
            needed = [part for part in manifest.segments if part.number > snapshot.number]
            segments = ((part.number, _read_part(remote, part)) for part in needed)
            copy = store.read_image(_read_part(remote, snapshot), segments)
            if copy.number == manifest.number:
                return copy
            LOG.error("remote copy: record %d is missing", copy.number + 1)
        except (CopyDamaged, DamagedError) as error:
            LOG.error("remote copy: from snapshot part-%03d: %s", snapshot.slot, error)
    raise CopyDamaged(f"record {manifest.number} cannot be reached from any of its snapshots")


def _read_part(remote: ObjectStore, part: Part) -> bytes:
    name = f"part-{part.slot:03d}"
    content = remote.get(name, part.size)
    if content is None or hashlib.sha256(content).hexdigest() != part.sha256:
        raise CopyDamaged(f"{name} is missing or not what was put there")
    return content


class Backlog:
    """Records that are on disk here and not in the copy yet; bounded.

    When there are too many they are dropped: a gap up to record `dropped`, which a snapshot closes.
    """

    def __init__(self, limit: int) -> None:
        self.dropped = -1
        self._limit = limit
        self._records: list[Record] = []
        self._bytes = 0
        self._lock = threading.Lock()

    def add(self, records: Sequence[Record]) -> None:
        with self._lock:
            self._records += records
            self._bytes += sum(len(record.content) for record in records)
            if self._bytes > self._limit:
                self.dropped = self._records[-1].number
                self._records, self._bytes = [], 0

    def above(self, number: int) -> list[Record]:
        """Forget the records up to `number`; returns the others, which stay."""
        with self._lock:
            self._records = [record for record in self._records if record.number > number]
            self._bytes = sum(len(record.content) for record in self._records)
            return list(self._records)


class CopyState(NamedTuple):
    """How far the copy is: its last record, what it lacks, and why (None: nothing is wrong)."""

    number: int
    lag_records: int
    lag_seconds: float
    failure: str | None


class Copier:
    """Keeps the copy close behind the store; tick() is its timer's job.

    A part is put before the manifest that names it, and never over one that the newest manifest
    or the one before it names: at every moment both describe a whole state. Old parts are
    overwritten, so nothing needs to be listed or deleted there.
    """

    def __init__(
        self,
        remote: ObjectStore,
        store: Store,
        clock: Callable[[], float],
        snapshot: Callable[[], None],
    ) -> None:
        self._remote = remote
        self._store = store
        self._clock = clock
        self._snapshot = snapshot  # writes one here, if something changed
        self._writer = secrets.token_hex(8)
        self._backlog = Backlog(COPY_BACKLOG)
        self._manifest: Manifest | None = None
        self._previous: Manifest | None = None
        self._attached = False
        self._chain = -1  # the record that the next segment follows; -1: a snapshot is due
        self._snapshot_time = 0.0  # of the last local snapshot that was put there
        self._boot_number = 0
        self._even = clock()  # the copy holds everything that was there at this time
        self._mark: tuple[float, int] | None = None  # time and record: when it has that, is even
        self._pause = 0.0  # seconds after a failure, growing
        self._next_try = 0.0  # monotonic
        self._failure: str | None = None
        self._turn = threading.Lock()

    def state(self) -> CopyState:
        number = self._manifest.number if self._manifest else 0
        lag = max(0, self._store.number - number)
        seconds = max(0.0, self._clock() - self._even) if lag else 0.0
        return CopyState(number, lag, round(seconds, 3), self._failure)

    # --- at the start ----------------------------------------------------------------------------

    def boot(self) -> None:
        """Let the store, loaded and not yet writing, take over the copy when that is further on.

        Raises CopyError, StartError.
        """
        manifests = read_manifests(self._remote)
        try:
            self._choose(manifests)
            self._attach(manifests)
        except OSError as error:
            path = self._store.path
            raise StartError(f"DB_PATH {path!r} cannot be written: {_reason(error)}") from None

    def _choose(self, manifests: Sequence[Manifest]) -> None:
        """Take the copy or the files here. Raises CopyError, StartError, OSError."""
        if not manifests:
            LOG.warning("remote copy: there is none yet, a new one is begun")
        elif manifests[0].number > self._store.number:
            LOG.warning(
                "remote copy: it ends at record %d, the files here at %d: the copy is used",
                manifests[0].number,
                self._store.number,
            )
            self._store.take_copy(read_copy(self._remote, manifests[0], self._store))
            if manifests[0].number == self._store.number:  # it is that state: segments may follow
                self._chain = manifests[0].chain
        else:
            LOG.info(
                "remote copy: it ends at record %d, the files here at %d: the files are used",
                manifests[0].number,
                self._store.number,
            )
            if self._is_of_another(manifests[0]):
                self._keep(manifests[0])
            elif manifests[0].number == self._store.number and self._is_own(manifests[0]):
                self._chain = manifests[0].chain

    def _is_of_another(self, manifest: Manifest) -> bool:
        """Whether somebody wrote to the copy whose changes the files here do not have."""
        known = self._store.writers()
        last = known.get(manifest.writer, 0)
        return bool(known) and last is not None and manifest.sequence > last

    def _is_own(self, manifest: Manifest) -> bool:
        """Whether the process before, on these very files, wrote it."""
        return self._store.writers().get(manifest.writer, 0) is None

    def _keep(self, manifest: Manifest) -> None:
        """What the copy holds will be overwritten: keep it. Raises CopyError, OSError."""
        LOG.warning(
            "remote copy: another gateway took it over and went on to record %d, which the files "
            "here, with record %d, do not know: its state is put into %s.superseded",
            manifest.number,
            self._store.number,
            self._store.path,
        )
        try:
            self._store.keep_superseded(read_copy(self._remote, manifest, self._store))
        except CopyDamaged as error:
            LOG.error("remote copy: it is not kept: %s", error)

    def _attach(self, manifests: Sequence[Manifest]) -> None:
        # Its name alone would not do: it may still be running, and go on.
        before = {manifests[0].writer: manifests[0].sequence} if manifests else {}
        self._store.remember_writers({**before, self._writer: None})
        if manifests:
            self._manifest = manifests[0]
            self._previous = manifests[1] if len(manifests) > 1 else None
        self._attached = True

    def begin(self) -> None:
        """The store is recovered and has not changed yet: from now on its records are kept."""
        self._boot_number = self._store.number
        self._store.on_durable(self._backlog.add)

    # --- while running ---------------------------------------------------------------------------

    def tick(self) -> None:
        """Bring the copy up to the disk here; after a failure, not before its pause is over."""
        if time.monotonic() < self._next_try:
            return
        with self._turn:
            self._try(snapshots=True)

    def finish(self, seconds: float) -> None:
        """A last try for the records, at the stop; a snapshot would take too long."""
        last = threading.Thread(target=self._finish, daemon=True)
        last.start()
        last.join(seconds)

    def _finish(self) -> None:
        if self._turn.acquire(blocking=False):
            try:
                self._try(snapshots=False)
            finally:
                self._turn.release()

    def _try(self, snapshots: bool) -> None:
        # Not the last record of all: where there always is a newer one, the copy never has that.
        self._mark = self._mark or (self._clock(), self._store.number)
        try:
            self._step(snapshots)
        except (CopyError, OSError) as error:
            text = str(error) if isinstance(error, CopyError) else _reason(error)
            if text != self._failure:
                LOG.error("remote copy: %s", text)
            self._failure = text
            self._pause = min(COPY_MAX_PAUSE, max(COPY_INTERVAL, 2 * self._pause))
            self._next_try = time.monotonic() + self._pause
            return
        if self._failure:
            LOG.info("remote copy: it works again")
        self._failure, self._pause = None, 0.0
        if self._manifest and self._manifest.number >= self._mark[1]:
            self._even, self._mark = self._mark[0], None

    def _step(self, snapshots: bool) -> None:
        if not self._attached:
            self._attach_late()
        records = self._backlog.above(max(self._chain, 0))
        follows = records[0].number if records else self._chain + 1
        gap = follows != self._chain + 1 or self._chain < max(0, self._backlog.dropped)
        fresh = self._snapshot_time != self._store.snapshot_time
        long = self._manifest is not None and self._segments_since() >= COPY_SEGMENTS
        if not (records or gap or fresh or long):
            return
        known = self._manifest
        self._check_alone()
        if self._manifest is not known:
            return  # with the next tick
        if records and not gap:
            self._put_records(records)
        if snapshots and (gap or fresh or long):
            self._put_snapshot(gap, long)

    def _attach_late(self) -> None:
        """The store did not answer at the start, and SNAPSHOT_REQUIRED=false."""
        manifests = read_manifests(self._remote)
        if manifests and (
            manifests[0].number > self._boot_number or self._is_of_another(manifests[0])
        ):
            raise CopyRefused(
                f"it ends at record {manifests[0].number} and this gateway began at "
                f"{self._boot_number} without it: nothing is put over it. Restart, and the higher "
                "number wins, or delete its two manifests to begin a new one"
            )
        self._attach(manifests)

    def _check_alone(self) -> None:
        """Two gateways must not write to one copy: the one that started later goes on.

        An own manifest that nobody knew of is there when an upload's answer was lost.
        """
        sequence = self._manifest.sequence + 1 if self._manifest else 1
        current = self._look(sequence - 1)
        found = self._look(sequence)
        if (current and current[:2] != (self._manifest or ())[:2]) or (
            found and found.sequence >= sequence and found.writer != self._writer
        ):  # [:2]: its sequence and its writer
            raise CopyRefused("another gateway writes to it: nothing is put over that")
        if found and found.sequence == sequence:
            self._manifest, self._previous = found, self._manifest
            self._chain = found.chain

    def _look(self, sequence: int) -> Manifest | None:
        """What is at a manifest's place; None for nothing and for a torn upload."""
        data = self._remote.get(f"manifest-{sequence % 2}", MAX_MANIFEST)
        try:
            return parse_manifest(data or b"")
        except (ValueError, KeyError, TypeError):
            return None

    def _segments_since(self) -> int:
        """How many segments lie above the newest snapshot."""
        if self._manifest is None:
            return 0
        newest = self._manifest.snapshots[0].number
        return sum(part.number > newest for part in self._manifest.segments)

    def _put_records(self, records: Sequence[Record]) -> None:
        """The next segment of the journal: its records up to the first gap."""
        manifest = cast(Manifest, self._manifest)
        count = next(
            (i for i, r in enumerate(records) if r.number != self._chain + 1 + i), len(records)
        )
        content = self._store.segment(self._chain, records[:count])
        part = self._put_part(content, self._chain, records[count - 1].number, [])
        self._publish(manifest.snapshots, (*manifest.segments, part))
        self._chain = part.number

    def _put_snapshot(self, gap: bool, long: bool) -> None:
        """The newest snapshot, and the segments that the one before it still needs.

        Behind a gap the one before leads nowhere: then there are two of the new one.
        """
        if gap or long:
            self._snapshot()
        written, number, content = self._store.snapshot_file()
        first = self._put_part(content, 0, number, [])
        if gap or self._manifest is None:
            second = self._put_part(content, 0, number, [first])
            self._publish((first, second), ())
            self._chain = number
        else:
            second = self._manifest.snapshots[0]
            needed = tuple(p for p in self._manifest.segments if p.number > second.number)
            self._publish((first, second), needed)
        self._snapshot_time = written

    def _put_part(self, content: bytes, after: int, number: int, more: Sequence[Part]) -> Part:
        """Put an object into a slot that nothing needs."""
        kept = [manifest for manifest in (self._manifest, self._previous) if manifest]
        used = {part.slot for part in (*more, *(p for m in kept for p in m.parts))}
        slot = next(slot for slot in itertools.count() if slot not in used)
        self._remote.put(f"part-{slot:03d}", content)
        return Part(slot, after, number, len(content), hashlib.sha256(content).hexdigest())

    def _publish(self, snapshots: Sequence[Part], segments: Sequence[Part]) -> None:
        sequence = self._manifest.sequence + 1 if self._manifest else 1
        new = Manifest(sequence, self._writer, tuple(snapshots), tuple(segments))
        self._remote.put(f"manifest-{sequence % 2}", encode_manifest(new))
        self._manifest, self._previous = new, self._manifest


# ==================================================================================================
# backends: the interface. Pure netlink and UAPI codecs, their sockets, and one small class for
# each kind of interface: setup, alive, read, apply, close
# Never here: policy. Which peers there should be is the gateway's business.
# ==================================================================================================


class Link(NamedTuple):
    """How an interface must be set up; addresses are "10.0.1.1/24".

    With `obfuscation` it is AmneziaWG's, without it WireGuard's.
    """

    name: str
    addresses: tuple[str, ...]
    mtu: int
    listen_port: int
    private_key: bytes
    obfuscation: Obfuscation | None = None

    def __repr__(self) -> str:
        return f"Link({self.name})"


class Device(NamedTuple):
    """What an interface says of itself. private_key is empty when there is none."""

    private_key: bytes
    listen_port: int
    obfuscation: Obfuscation = PLAIN

    def __repr__(self) -> str:
        return f"Device(listen_port={self.listen_port})"


class Backend(Protocol):
    """One interface. One thread at a time calls apply() and setup(), one read() and sample()."""

    kind: str

    def setup(self, link: Link | None = None) -> None:
        """Make and configure what is missing; leave alone what is right. Raises BackendError.

        With `link` that is from now on how it must be; name and kind stay.
        """

    def alive(self) -> bool:
        """Whether it is still the interface that setup() left behind."""

    def read(self) -> list[PeerState]:
        """Every peer with its counters: O(peers). Raises BackendError."""

    def sample(self, known: Container[int]) -> Reading:
        """What changed: peers whose marks are `known` are not even decoded. Raises BackendError.

        Peers that are set or removed meanwhile may be missing.
        """

    def apply(self, changes: Sequence[Change]) -> None:
        """Do all changes in their order. Raises BackendError; some may then have been done."""

    def close(self) -> None:
        """Let go of the interface; it stays as it is."""


# --- netlink codec: bytes <-> values (Documentation/userspace-api/netlink/intro.rst) --------------


class GenericFamily(NamedTuple):
    """A generic netlink family; AmneziaWG's encoding depends on `version` (CTRL_ATTR_VERSION)."""

    id: int
    version: int
    obfuscated: bool


WIREGUARD_FAMILY = GenericFamily(0, 1, False)


class NetlinkMessage(NamedTuple):
    type: int
    flags: int
    sequence: int
    payload: bytes

    def __repr__(self) -> str:  # the payload may hold keys
        return f"NetlinkMessage({self.type}, {self.sequence})"


def nl_attribute(kind: int, payload: bytes) -> bytes:
    """struct nlattr, padded to 4 bytes. The length has 16 bits: raises CodecError above that."""
    length = 4 + len(payload)
    if length > 0xFFFF:
        raise CodecError(f"netlink: attribute {kind} of {length} bytes does not fit into 16 bits")
    return struct.pack("=HH", length, kind) + payload + bytes(-length & 3)


def nl_message(message: NetlinkMessage) -> bytes:
    """struct nlmsghdr and payload; the port id 0 is filled in by the kernel."""
    kind, flags, sequence, payload = message
    return struct.pack("=IHHII", 16 + len(payload), kind, flags, sequence, 0) + payload


def parse_nl_messages(data: bytes) -> Iterator[NetlinkMessage]:
    """The messages of one datagram. Raises CodecError when a length does not fit."""
    position = 0
    while position < len(data):
        if len(data) - position < 16:
            raise CodecError(f"netlink: {len(data) - position} bytes where a header needs 16")
        length, kind, flags, sequence, _ = struct.unpack_from("=IHHII", data, position)
        if length < 16 or position + length > len(data):
            raise CodecError(f"netlink: a message of {length} bytes in {len(data) - position}")
        yield NetlinkMessage(kind, flags, sequence, data[position + 16 : position + length])
        position += (length + 3) & ~3


def parse_nl_attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, payload) of each attribute. Raises CodecError when a length does not fit."""
    position, end = 0, len(data)
    while position < end:
        if end - position < 4:
            raise CodecError(f"netlink: {end - position} bytes where an attribute needs 4")
        length, kind = struct.unpack_from("=HH", data, position)
        if length < 4 or position + length > end:
            raise CodecError(f"netlink: an attribute of {length} bytes in {end - position}")
        yield kind & NLA_TYPE_MASK, data[position + 4 : position + length]
        position += (length + 3) & ~3


def parse_nl_error(payload: bytes, flags: int) -> tuple[int, str]:
    """struct nlmsgerr -> (errno or 0, the kernel's own words if it sent any).

    Words stand behind the header of the request that is echoed, the rest of which is CAPPED.
    """
    if len(payload) < 4:
        raise CodecError("netlink: an error message without an error number")
    number = -struct.unpack_from("=i", payload)[0]
    if not 0 <= number < 4096:
        raise CodecError(f"netlink: error number {-number}")
    told = number and flags & NLM_F_ACK_TLVS and flags & NLM_F_CAPPED
    for kind, value in parse_nl_attributes(payload[20:]) if told else ():
        if kind == NLMSGERR_ATTR_MSG:
            return number, value.rstrip(b"\0").decode("ascii", "replace")
    return number, ""


def genl(command: int, version: int, payload: bytes) -> bytes:
    return struct.pack("=BBH", command, version, 0) + payload


def encode_wg_peer(change: Change) -> bytes:
    """The attributes of one peer in WG_CMD_SET_DEVICE (include/uapi/linux/wireguard.h).

    No endpoint and no keepalive: those are the client's.
    """
    if change.peer is None:
        return _KEY_HEAD + change.public_key + _REMOVE
    networks = b"".join(map(_encode_allowed_ip, change.peer.allowed_ips))
    return b"".join(
        (
            _KEY_HEAD,
            change.public_key,
            _REPLACE_NETWORKS,
            _PSK_HEAD,
            change.peer.preshared_key or bytes(KEY_BYTES),
            nl_attribute(NLA_F_NESTED | WGPEER_A_ALLOWEDIPS, networks),
        )
    )


def _nl_head(kind: int, length: int) -> bytes:
    """What stands before a payload of so many bytes."""
    return struct.pack("=HH", 4 + length, kind)


_KEY_HEAD = _nl_head(WGPEER_A_PUBLIC_KEY, KEY_BYTES)
_PSK_HEAD = _nl_head(WGPEER_A_PRESHARED_KEY, KEY_BYTES)
_REMOVE = nl_attribute(WGPEER_A_FLAGS, struct.pack("=I", WGPEER_F_REMOVE_ME))
_REPLACE_NETWORKS = nl_attribute(WGPEER_A_FLAGS, struct.pack("=I", WGPEER_F_REPLACE_ALLOWEDIPS))
_MASK_HEAD = _nl_head(WGALLOWEDIP_A_CIDR_MASK, 1)


def _allowed_ip_head(family: int, size: int) -> bytes:
    """All of an allowed IP before its address of `size` bytes."""
    head = nl_attribute(WGALLOWEDIP_A_FAMILY, struct.pack("=H", family))
    head += _nl_head(WGALLOWEDIP_A_IPADDR, size)
    return _nl_head(NLA_F_NESTED, len(head) + size + len(_MASK_HEAD) + 4) + head


_ALLOWED_IP_HEADS = {  # by the length of a packed network
    5: _allowed_ip_head(socket.AF_INET, 4),
    17: _allowed_ip_head(socket.AF_INET6, 16),
}


def _encode_allowed_ip(network: bytes) -> bytes:
    head = _ALLOWED_IP_HEADS[len(network)]
    return head + network[:-1] + _MASK_HEAD + network[-1:] + bytes(3)


AWG_BY_ATTRIBUTE = {row.attribute: name for name, row in AWG_PARAMETERS.items()}
_AWG_PACKING = {"size": "=H", "flag": "=B"}


def encode_awg_attributes(wanted: Obfuscation, actual: Obfuscation, version: int) -> bytes:
    """The attributes of what differs: older modules refuse those they do not know."""
    return b"".join(
        nl_attribute(row.attribute, _encode_awg_value(row, getattr(wanted, name), version))
        for name, row in AWG_PARAMETERS.items()
        if getattr(wanted, name) != getattr(actual, name)
    )


def _encode_awg_value(row: AwgParameter, value: Any, version: int) -> bytes:
    """AmneziaWG's uapi/wireguard.h; ranges have their upper end in the upper half."""
    if row.kind == "packet":
        return bytes(value.encode("ascii") + b"\0")
    if row.kind == "key":
        return bytes(value or bytes(KEY_BYTES))
    if row.kind == "range":
        return struct.pack("=I", value.high << 16 | value.low)
    if row.kind != "header":
        return struct.pack(_AWG_PACKING[row.kind], value)
    if version >= 3:
        return struct.pack("=Q", value.high << 32 | value.low)
    if version == 2:
        return str(value).encode("ascii") + b"\0"
    if value.low != value.high:
        raise BackendError(f"{row.spelling}: the kernel's AmneziaWG is too old for a range")
    return struct.pack("=I", value.low)


def decode_awg_attribute(name: str, value: bytes, version: int) -> Any:
    """One parameter out of WG_CMD_GET_DEVICE, whether we would set it or not. CodecError."""
    row = AWG_PARAMETERS[name]
    try:
        if row.kind == "packet":
            return value.rstrip(b"\0").decode("ascii")
        if row.kind == "key":
            return value if any(_exactly(value, KEY_BYTES, row.spelling)) else b""
        if row.kind == "header" and version == 2:
            return parse_span(value.rstrip(b"\0").decode("ascii"))
        if row.kind == "size":
            return struct.unpack("=H", value)[0]
        if row.kind == "flag":
            return struct.unpack("=B", value)[0] != 0
        half = 32 if row.kind == "header" and version >= 3 else 16
        if row.kind == "header" and version == 1:
            return Span(*struct.unpack("=I", value) * 2)
        number = struct.unpack("=Q" if half == 32 else "=I", value)[0]
        low, high = number & ((1 << half) - 1), number >> half
        return Span(low, max(low, high))
    except (ValueError, struct.error):
        raise CodecError(f"amneziawg: a bad value of {row.spelling}") from None


def encode_wg_batches(name: str, changes: Iterable[Change]) -> Iterator[bytes]:
    """WG_CMD_SET_DEVICE payloads for all changes, cut by bytes."""
    head = nl_attribute(WGDEVICE_A_IFNAME, name.encode("ascii") + b"\0")
    batch: list[bytes] = []
    size = 0
    for change in changes:
        peer = nl_attribute(NLA_F_NESTED, encode_wg_peer(change))
        if size + len(peer) > NETLINK_BATCH and batch:
            yield head + nl_attribute(NLA_F_NESTED | WGDEVICE_A_PEERS, b"".join(batch))
            batch, size = [], 0
        batch.append(peer)
        size += len(peer)
    if batch:
        yield head + nl_attribute(NLA_F_NESTED | WGDEVICE_A_PEERS, b"".join(batch))


def decode_wg_device(
    payloads: Iterable[bytes], family: GenericFamily = WIREGUARD_FAMILY
) -> tuple[Device, list[PeerState]]:
    """WG_CMD_GET_DEVICE's answer: genl payloads. Several messages may hold one peer."""
    private_key, port = b"", 0
    parameters: dict[str, Any] = {}
    states: list[PeerState] = []
    for payload in payloads:
        for kind, value in parse_nl_attributes(payload[4:]):
            if kind == WGDEVICE_A_PRIVATE_KEY:
                private_key = _exactly(value, KEY_BYTES, "private key")
            elif kind == WGDEVICE_A_LISTEN_PORT:
                port = struct.unpack("=H", _exactly(value, 2, "listen port"))[0]
            elif kind == WGDEVICE_A_PEERS:
                for _, peer in parse_nl_attributes(value):
                    _merge_peer(states, decode_wg_peer(peer))
            elif family.obfuscated and kind in AWG_BY_ATTRIBUTE:
                name = AWG_BY_ATTRIBUTE[kind]
                parameters[name] = decode_awg_attribute(name, value, family.version)
    if not any(private_key):
        private_key = b""
    return Device(private_key, port, Obfuscation(**parameters)), states


def _merge_peer(states: list[PeerState], state: PeerState) -> None:
    """A peer whose allowed IPs did not fit into one message goes on in the next."""
    if states and states[-1].peer.public_key == state.peer.public_key:
        first = states[-1]
        networks = tuple(sorted(first.peer.allowed_ips + state.peer.allowed_ips))
        states[-1] = first._replace(peer=first.peer._replace(allowed_ips=networks))
    else:
        states.append(state)


def sample_wg_device(payloads: Iterable[bytes], known: Container[int]) -> Reading:
    """Backend.sample() of WG_CMD_GET_DEVICE's answer. Raises CodecError."""
    changed: list[tuple[int, PeerState]] = []
    same: set[int] = set()
    peers, key = 0, b""
    for payload in payloads:
        for kind, value in parse_nl_attributes(payload[4:]):
            if kind != WGDEVICE_A_PEERS:
                continue
            for _, block in parse_nl_attributes(value):
                if block[: 4 + KEY_BYTES] == key:
                    continue  # more allowed IPs of the last peer: its counters stood there
                peers, key = peers + 1, block[: 4 + KEY_BYTES]
                mark = hash(block)
                if mark in known:
                    same.add(mark)
                else:
                    changed.append((mark, decode_wg_peer(block)))
    return Reading(peers, changed, same)


# What the kernel puts for a peer (drivers/net/wireguard/netlink.c, get_peer), each with a header:
# keys, handshake, keepalive interval, sent, received, version; its endpoint, if there is one; its
# allowed IPs, each with mask, family and address. Decoded at once where it is so.
_USUAL_FRONT = struct.Struct("=4s32s4s32s4sqq4s4x4sQ4sQ4s4x")
_USUAL_HEADS = tuple(
    struct.pack("=HH", 4 + size, kind)
    for kind, size in (
        (WGPEER_A_PUBLIC_KEY, KEY_BYTES),
        (WGPEER_A_PRESHARED_KEY, KEY_BYTES),
        (WGPEER_A_LAST_HANDSHAKE_TIME, 16),
        (WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL, 2),
        (WGPEER_A_TX_BYTES, 8),
        (WGPEER_A_RX_BYTES, 8),
        (WGPEER_A_PROTOCOL_VERSION, 4),
    )
)
# The header of an endpoint, a sockaddr_in or sockaddr_in6 -> the attribute's length.
_USUAL_ENDPOINTS = {struct.pack("=HH", 4 + size, WGPEER_A_ENDPOINT): 4 + size for size in (16, 28)}
# An allowed IP of one host before its address: mask, family, the address's header. By its size.
_HOST_HEADS = {
    size: struct.pack("=HHHHB3x", 24 + size, NLA_F_NESTED, 5, WGALLOWEDIP_A_CIDR_MASK, 8 * size)
    + struct.pack("=HHH2xHH", 6, WGALLOWEDIP_A_FAMILY, family, 4 + size, WGALLOWEDIP_A_IPADDR)
    for family, size in ((socket.AF_INET, 4), (socket.AF_INET6, 16))
}


class _UsualNetworks(NamedTuple):
    """Allowed IPs behind their header: one host of some families."""

    layout: struct.Struct  # head and address of each
    heads: tuple[bytes, ...]
    masks: tuple[bytes, ...]


_USUAL_NETWORKS = {
    struct.pack("=HH", 4 + sum(24 + n for n in sizes), NLA_F_NESTED | WGPEER_A_ALLOWEDIPS): (
        _UsualNetworks(
            struct.Struct("=" + "".join(f"24s{size}s" for size in sizes)),
            tuple(_HOST_HEADS[size] for size in sizes),
            tuple(bytes([8 * size]) for size in sizes),
        )
    )
    for sizes in ((), (4,), (16,), (4, 16))
}


_NO_KEY = bytes(KEY_BYTES)


def decode_wg_peer(data: bytes) -> PeerState:
    return _decode_usual_peer(data) or _decode_any_peer(data)


def _decode_usual_peer(data: bytes) -> PeerState | None:
    """A quarter of the time of _decode_any_peer(), for what nearly all peers look like."""
    at = _USUAL_FRONT.size
    if len(data) < at:
        return None
    front = _USUAL_FRONT.unpack_from(data)
    if (*front[0:5:2], front[7], *front[8:13:2]) != _USUAL_HEADS:
        return None
    _, key, _, psk, _, seconds, nanoseconds, _, _, sent, _, received, _ = front
    endpoint = _USUAL_ENDPOINTS.get(data[at : at + 4], 0)
    at += endpoint
    usual = _USUAL_NETWORKS.get(data[at : at + 4])
    if usual is None or at + 4 + usual.layout.size != len(data):
        return None
    found = usual.layout.unpack_from(data, at + 4)
    if found[::2] != usual.heads:
        return None
    networks = sorted([a + mask for a, mask in zip(found[1::2], usual.masks, strict=True)])
    peer = WirePeer(key, b"" if psk == _NO_KEY else psk, tuple(networks))
    return PeerState(
        peer,
        _in_range(seconds or int(nanoseconds != 0), MAX_TIME),
        _in_range(received, MAX_INTEGER),
        _in_range(sent, MAX_INTEGER),
        endpoint > 0,
    )


def _decode_any_peer(data: bytes) -> PeerState:
    key, psk, networks = b"", b"", b""
    handshake = rx = tx = 0
    located = False
    for kind, value in parse_nl_attributes(data):
        if kind == WGPEER_A_PUBLIC_KEY:
            key = _exactly(value, KEY_BYTES, "public key")
        elif kind == WGPEER_A_PRESHARED_KEY:
            psk = _exactly(value, KEY_BYTES, "preshared key")
        elif kind == WGPEER_A_LAST_HANDSHAKE_TIME:
            seconds, nanoseconds = struct.unpack("=qq", _exactly(value, 16, "timespec"))
            handshake = _in_range(seconds or int(nanoseconds != 0), MAX_TIME)
        elif kind == WGPEER_A_RX_BYTES:
            rx = _in_range(struct.unpack("=Q", _exactly(value, 8, "counter"))[0], MAX_INTEGER)
        elif kind == WGPEER_A_TX_BYTES:
            tx = _in_range(struct.unpack("=Q", _exactly(value, 8, "counter"))[0], MAX_INTEGER)
        elif kind == WGPEER_A_ALLOWEDIPS:
            networks = value
        elif kind == WGPEER_A_ENDPOINT:
            located = True
    if not key:
        raise CodecError("wireguard: a peer without a public key")
    allowed = sorted([_decode_allowed_ip(entry) for _, entry in parse_nl_attributes(networks)])
    peer = WirePeer(key, b"" if psk == _NO_KEY else psk, tuple(allowed))
    return PeerState(peer, handshake, rx, tx, located)


def _decode_allowed_ip(data: bytes) -> bytes:
    entry = dict(parse_nl_attributes(data))
    address = entry.get(WGALLOWEDIP_A_IPADDR, b"")
    mask = entry.get(WGALLOWEDIP_A_CIDR_MASK, b"")
    if len(address) not in (4, 16) or len(mask) != 1 or mask[0] > len(address) * 8:
        raise CodecError("wireguard: an allowed IP without a valid address and mask")
    return address + mask


def _in_range(value: int, high: int) -> int:
    if not 0 <= value <= high:
        raise CodecError("wireguard: a counter or a time out of range")
    return value


def _exactly(value: bytes, length: int, what: str) -> bytes:
    if len(value) != length:
        raise CodecError(f"wireguard: a {what} of {len(value)} bytes instead of {length}")
    return value


# --- netlink transport ----------------------------------------------------------------------------


class NetlinkError(BackendError):
    """The kernel's answer was an errno."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message or os.strerror(number))
        self.errno = number


class NetlinkSocket:
    """Requests and their answers over one netlink socket; safe to use from several threads."""

    def __init__(self, protocol: int) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol
        )
        self._socket.settimeout(BACKEND_TIMEOUT)
        self._socket.bind((0, 0))
        for option in (10, 11):  # SOL_NETLINK: NETLINK_CAP_ACK, NETLINK_EXT_ACK
            self._socket.setsockopt(270, option, 1)
        self._sequence = itertools.count(1)
        self._lock = threading.Lock()

    def request(
        self,
        kind: int,
        flags: int,
        payload: bytes,
        whole: bool = True,
        take: Callable[[Iterator[bytes]], list[bytes]] = list,
    ) -> list[bytes]:
        """Send one request and return the payloads of its answer. Raises NetlinkError.

        With `whole`, a dump that a change came into is an EINTR. `take` may leave the rest of an
        answer, on a socket that is then closed.
        """
        with self._lock:
            sequence = next(self._sequence) & 0xFFFFFFFF
            flags |= NLM_F_REQUEST | NLM_F_ACK
            try:
                self._socket.send(nl_message(NetlinkMessage(kind, flags, sequence, payload)))
                return take(self._answer(sequence, whole))
            except TimeoutError:
                raise BackendError(f"netlink: no answer within {BACKEND_TIMEOUT:.0f} s") from None
            except OSError as error:
                raise NetlinkError(error.errno or errno.EIO, "") from None

    def _answer(self, sequence: int, whole: bool) -> Iterator[bytes]:
        interrupted = False
        while True:
            for message in parse_nl_messages(self._socket.recv(1 << 17)):
                if message.sequence != sequence:
                    continue  # the late answer to a request that timed out
                interrupted |= bool(message.flags & NLM_F_DUMP_INTR)
                if message.type in (NLMSG_ERROR, NLMSG_DONE):
                    if len(message.payload) >= 4:
                        flags = message.flags if message.type == NLMSG_ERROR else 0
                        number, words = parse_nl_error(message.payload, flags)
                        if number:
                            raise NetlinkError(number, words)
                    if interrupted and whole:
                        raise NetlinkError(errno.EINTR, "the dump was interrupted by a change")
                    return
                if message.type != NLMSG_NOOP:
                    yield message.payload

    def dump(self, kind: int, payload: bytes, whole: bool) -> list[bytes]:
        """A dump, begun again when a change came in between and it must be whole."""
        for _ in range(DUMP_TRIES):
            try:
                return self.request(kind, NLM_F_DUMP, payload, whole)
            except NetlinkError as error:
                if error.errno != errno.EINTR:
                    raise
        raise BackendError(f"netlink: the dump was interrupted {DUMP_TRIES} times")

    def close(self) -> None:
        self._socket.close()


def genl_family(netlink: NetlinkSocket, name: str) -> GenericFamily | None:
    """A generic netlink family of a WireGuard kind, None when the kernel does not have it."""
    attribute = nl_attribute(CTRL_ATTR_FAMILY_NAME, name.encode("ascii") + b"\0")
    try:
        answer = netlink.request(GENL_ID_CTRL, 0, genl(CTRL_CMD_GETFAMILY, 1, attribute))
    except NetlinkError as error:
        if error.errno in (errno.ENOENT, errno.EOPNOTSUPP):
            return None
        raise
    return decode_genl_family(answer, name)


def decode_genl_family(payloads: Iterable[bytes], name: str) -> GenericFamily:
    """CTRL_CMD_GETFAMILY's answer. Raises CodecError."""
    found = {k: value for payload in payloads for k, value in parse_nl_attributes(payload[4:])}
    if CTRL_ATTR_FAMILY_ID not in found or CTRL_ATTR_VERSION not in found:
        raise CodecError(f"netlink: no id or version in the answer about family {name}")
    return GenericFamily(
        struct.unpack("=H", _exactly(found[CTRL_ATTR_FAMILY_ID], 2, "family id"))[0],
        struct.unpack("=I", _exactly(found[CTRL_ATTR_VERSION], 4, "family version"))[0],
        name == AWG_GENL_NAME,
    )


class Route:
    """rtnetlink: links and addresses."""

    def __init__(self) -> None:
        self._netlink = NetlinkSocket(NETLINK_ROUTE)

    @staticmethod
    def index(name: str) -> int:
        """The interface's index, 0 when there is none of that name."""
        try:
            return socket.if_nametoindex(name)
        except OSError:
            return 0

    def create(self, name: str, kind: str) -> None:
        info = nl_attribute(IFLA_INFO_KIND, kind.encode("ascii"))
        attributes = nl_attribute(IFLA_IFNAME, name.encode("ascii") + b"\0") + nl_attribute(
            NLA_F_NESTED | IFLA_LINKINFO, info
        )
        header = struct.pack("=BxHiII", 0, 0, 0, 0, 0)
        self._netlink.request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, header + attributes)

    def set_up(self, index: int, mtu: int) -> None:
        """Set the MTU and bring the link up."""
        header = struct.pack("=BxHiII", 0, 0, index, IFF_UP, IFF_UP)
        self._netlink.request(
            RTM_NEWLINK, 0, header + nl_attribute(IFLA_MTU, struct.pack("=I", mtu))
        )

    def is_up(self, index: int, mtu: int | None) -> bool:
        """Whether the link is up, with this MTU if one is given."""
        flags, found = self._look(index)
        return bool(flags & IFF_UP) and (
            mtu is None or found.get(IFLA_MTU) == struct.pack("=I", mtu)
        )

    def kind(self, index: int) -> str:
        """What makes the link: "wireguard", "tun" and so on; empty for a device of hardware."""
        info = self._look(index)[1].get(IFLA_LINKINFO, b"")
        kind = dict(parse_nl_attributes(info)).get(IFLA_INFO_KIND, b"")
        return kind.rstrip(b"\0").decode("ascii", "replace")

    def _look(self, index: int) -> tuple[int, dict[int, bytes]]:
        """A link's flags and attributes, nothing when there is none."""
        answer = self._netlink.request(RTM_GETLINK, 0, struct.pack("=BxHiII", 0, 0, index, 0, 0))
        for payload in answer:
            if len(payload) < 16:
                raise CodecError("netlink: a short link message")
            return struct.unpack_from("=I", payload, 8)[0], dict(parse_nl_attributes(payload[16:]))
        return 0, {}

    def is_right(self, link: Link, index: int) -> bool:
        """Whether this is still the link that configure() returned, up and with its addresses.

        Raises BackendError.
        """
        try:
            return (
                self.index(link.name) == index != 0
                and self.is_up(index, link.mtu)
                and self.addresses(index).issuperset(map(ipaddress.ip_interface, link.addresses))
            )
        except NetlinkError as error:
            if error.errno == errno.ENODEV:
                return False
            raise

    def addresses(self, index: int) -> set[ipaddress.IPv4Interface | ipaddress.IPv6Interface]:
        """A link's addresses with their prefix lengths. Raises BackendError."""
        found = set()
        for payload in self._netlink.dump(RTM_GETADDR, bytes(8), whole=True):
            if len(payload) < 8:
                raise CodecError("netlink: a short address message")
            _, length, _, _, where = struct.unpack_from("=BBBBI", payload)
            attributes = dict(parse_nl_attributes(payload[8:]))
            packed = attributes.get(IFA_LOCAL) or attributes.get(IFA_ADDRESS, b"")
            if where == index and len(packed) in (4, 16):
                found.add(ipaddress.ip_interface((packed, length)))
        return found

    def add_address(self, index: int, address: str) -> None:
        """Add "10.0.1.1/24" to a link, unless it has it. IPv6 without duplicate detection."""
        interface = ipaddress.ip_interface(address)
        family = socket.AF_INET if interface.version == 4 else socket.AF_INET6
        flags = 0 if interface.version == 4 else 0x02  # IFA_F_NODAD
        header = struct.pack("=BBBBI", family, interface.network.prefixlen, flags, 0, index)
        packed = interface.ip.packed
        attributes = nl_attribute(IFA_LOCAL, packed) + nl_attribute(IFA_ADDRESS, packed)
        try:
            self._netlink.request(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, header + attributes)
        except NetlinkError as error:
            if error.errno != errno.EEXIST:
                raise

    def delete(self, name: str) -> None:
        """Remove a link, which must be there. Raises NetlinkError."""
        header = struct.pack("=BxHiII", 0, 0, self.index(name), 0, 0)
        self._netlink.request(RTM_DELLINK, 0, header)

    def configure(self, link: Link) -> int:
        """Addresses, MTU and up; returns the interface's index. Raises BackendError."""
        index = self.index(link.name)
        step = "find it"
        try:
            if not self.is_up(index, link.mtu):  # the MTU first: a small one drops IPv6 addresses
                step = f"set MTU {link.mtu} and bring it up"
                self.set_up(index, link.mtu)
            for address in link.addresses:
                step = f"add {address}"
                self.add_address(index, address)
        except BackendError as error:
            raise BackendError(f"{link.name}: cannot {step}: {error}") from None
        return index

    def close(self) -> None:
        self._netlink.close()


class NetlinkBackend:
    """Kernel WireGuard or AmneziaWG over generic netlink."""

    kind = "netlink"

    def __init__(self, link: Link) -> None:
        self._link = link
        self._name = WG_GENL_NAME if link.obfuscation is None else AWG_GENL_NAME
        self._control = NetlinkSocket(NETLINK_GENERIC)
        self._reader = NetlinkSocket(NETLINK_GENERIC)
        self._route = Route()
        self._family = WIREGUARD_FAMILY
        self._index = 0

    def setup(self, link: Link | None = None) -> None:
        self._link = link or self._link
        name = self._link.name
        product = "WireGuard" if self._name == WG_GENL_NAME else "AmneziaWG"
        if not self._route.index(name):
            try:
                self._route.create(name, self._name)
            except NetlinkError as error:
                if error.errno == errno.EOPNOTSUPP:
                    raise BackendError(f"{name}: the kernel has no {product}") from None
                raise BackendError(f"{name}: cannot be made: {error}") from None
        family = genl_family(self._control, self._name)
        if family is None:
            raise BackendError(f"{name}: the kernel has no {product}")
        self._family = family
        device = self._device()
        attributes = b""
        if device.private_key != self._link.private_key:
            attributes += nl_attribute(WGDEVICE_A_PRIVATE_KEY, self._link.private_key)
        if device.listen_port != self._link.listen_port:
            attributes += nl_attribute(
                WGDEVICE_A_LISTEN_PORT, struct.pack("=H", self._link.listen_port)
            )
        if self._link.obfuscation is not None:
            attributes += encode_awg_attributes(
                self._link.obfuscation, device.obfuscation, family.version
            )
        if attributes:
            head = nl_attribute(WGDEVICE_A_IFNAME, name.encode("ascii") + b"\0")
            self._set(head + attributes)
        self._index = self._route.configure(self._link)

    def alive(self) -> bool:
        return self._route.is_right(self._link, self._index)

    def read(self) -> list[PeerState]:
        return decode_wg_device(self._dump(whole=True), self._family)[1]

    def sample(self, known: Container[int]) -> Reading:
        return sample_wg_device(self._dump(whole=False), known)

    def apply(self, changes: Sequence[Change]) -> None:
        for payload in encode_wg_batches(self._link.name, changes):
            self._set(payload)

    def close(self) -> None:
        for part in (self._control, self._reader, self._route):
            part.close()

    def _set(self, payload: bytes) -> None:
        try:
            command = genl(WG_CMD_SET_DEVICE, self._family.version, payload)
            self._control.request(self._family.id, 0, command)
        except NetlinkError as error:
            raise BackendError(f"{self._link.name}: {error}") from None

    def _device(self) -> Device:
        """The interface without its peers: it comes first, and the rest ends with the socket."""
        try:
            netlink = NetlinkSocket(NETLINK_GENERIC)
        except OSError as error:
            raise BackendError(f"{self._link.name}: {_reason(error)}") from None
        with contextlib.closing(netlink):
            first = self._ask(
                lambda command: netlink.request(
                    self._family.id,
                    NLM_F_DUMP,
                    command,
                    take=lambda parts: list(itertools.islice(parts, 1)),
                )
            )
        return decode_wg_device(first, self._family)[0]

    def _dump(self, whole: bool) -> list[bytes]:
        return self._ask(lambda command: self._reader.dump(self._family.id, command, whole))

    def _ask(self, send: Callable[[bytes], list[bytes]]) -> list[bytes]:
        head = nl_attribute(WGDEVICE_A_IFNAME, self._link.name.encode("ascii") + b"\0")
        try:
            return send(genl(WG_CMD_GET_DEVICE, self._family.version, head))
        except NetlinkError as error:
            raise BackendError(f"{self._link.name}: {error}") from None


# --- UAPI: the cross-platform text protocol (wireguard.com/xplatform) -----------------------------


def encode_uapi_changes(changes: Iterable[Change]) -> bytes:
    """The lines of a set operation for these changes, without `set=1` and the empty line."""
    lines: list[str] = []
    for public_key, peer in changes:
        lines.append(f"public_key={public_key.hex()}\n")
        if peer is None:
            lines.append("remove=true\n")
            continue
        psk = peer.preshared_key or bytes(KEY_BYTES)
        lines.append(f"preshared_key={psk.hex()}\nreplace_allowed_ips=true\n")
        for network in peer.allowed_ips:
            family = socket.AF_INET if len(network) == 5 else socket.AF_INET6
            address = socket.inet_ntop(family, network[:-1])
            lines.append(f"allowed_ip={address}/{network[-1]}\n")
    return "".join(lines).encode("ascii")


def decode_uapi_device(parts: Iterable[bytes]) -> tuple[Device, list[PeerState]]:
    """The answer to `get=1`, up to and with `errno=0`. Raises CodecError, BackendError."""
    head, blocks = split_uapi_device(parts)
    return decode_uapi_head(head), [decode_uapi_peer(block) for block in blocks]


def sample_uapi_device(parts: Iterable[bytes], known: Container[int]) -> Reading:
    """Backend.sample() of the answer to `get=1`. Raises CodecError, BackendError."""
    _, blocks = split_uapi_device(parts)
    marks = [hash(block) for block in blocks]
    changed = [
        (mark, decode_uapi_peer(block))
        for mark, block in zip(marks, blocks, strict=True)
        if mark not in known
    ]
    return Reading(len(blocks), changed, {mark for mark in marks if mark in known})


def split_uapi_device(parts: Iterable[bytes]) -> tuple[bytes, list[bytes]]:
    """The interface's lines, and of each peer what follows "public_key=".

    Raises CodecError, BackendError. Part by part: each copy of the whole would stop all threads
    for 10 ms at 60,000 peers.
    """
    blocks: list[bytes] = []
    rest = b"\n"
    for part in parts:
        *whole, rest = (rest + part).split(b"\npublic_key=")
        blocks += whole
    body, found, status = rest.rpartition(b"errno=")
    number = re.fullmatch(rb"(-?[0-9]{1,6})\n", status) if found else None
    check_uapi_status(int(number[1]) if number and body.endswith(b"\n") else None)
    blocks.append(body)
    head = blocks.pop(0)
    return head[1:], blocks


def _uapi_lines(text: bytes) -> Iterator[tuple[str, str]]:
    for line in text.decode("ascii", "replace").splitlines():
        name, separator, value = line.partition("=")
        if not separator:
            raise CodecError("UAPI: a line without =")
        if name == "errno":
            raise CodecError("UAPI: a second errno")
        yield name, value


def decode_uapi_head(text: bytes) -> Device:
    """The interface's own lines. Raises CodecError."""
    private_key, port = b"", 0
    parameters: dict[str, Any] = {}
    for name, value in _uapi_lines(text):
        try:
            if name == "private_key":
                private_key = _uapi_key(value)
            elif name == "listen_port":
                port = _uapi_integer(value)
            elif name in AWG_PARAMETERS:
                parameters[name] = decode_uapi_parameter(AWG_PARAMETERS[name].kind, value)
        except ValueError:
            raise CodecError(f"UAPI: a bad value of {name[:40]}") from None
    return Device(private_key if any(private_key) else b"", port, Obfuscation(**parameters))


def decode_uapi_parameter(kind: str, value: str) -> Any:
    """A device key of AmneziaWG, whether we would set it or not. Raises ValueError."""
    if kind == "packet":
        return value
    if kind == "key":
        key = _uapi_key(value)
        return key if any(key) else b""
    if kind == "size":
        return _uapi_integer(value)
    if kind == "flag":
        if value not in ("true", "false", "1", "0"):
            raise ValueError
        return value in ("true", "1")
    return parse_span(value)


def encode_uapi_parameters(wanted: Obfuscation, actual: Obfuscation) -> str:
    """The lines for what differs: older programs refuse keys that they do not know."""
    return "".join(
        f"{name}={_encode_uapi_parameter(value)}\n"
        for name, value, present in zip(Obfuscation._fields, wanted, actual, strict=True)
        if value != present
    )


def _encode_uapi_parameter(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return (value or bytes(KEY_BYTES)).hex() if isinstance(value, bytes) else str(value)


def check_uapi_status(status: int | None) -> None:
    if status is None:
        raise CodecError("UAPI: the answer has no errno")
    if status:
        raise BackendError(f"UAPI: {os.strerror(abs(status) % 4096)}")


def _uapi_key(value: str) -> bytes:
    raw = bytes.fromhex(value)
    if len(raw) != KEY_BYTES or len(value) != 2 * KEY_BYTES:
        raise ValueError
    return raw


def _uapi_integer(value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,19}", value) or int(value) > MAX_INTEGER:
        raise ValueError
    return int(value)


# What wireguard-go writes of nearly all peers, behind "public_key=" (device/uapi.go).
_USUAL_UAPI_PEER = re.compile(
    rb"([0-9a-f]{64})\npreshared_key=([0-9a-f]{64})\nprotocol_version=1\n(endpoint=[^\n]*\n)?"
    rb"last_handshake_time_sec=([0-9]{1,12})\nlast_handshake_time_nsec=([0-9]{1,9})\n"
    rb"tx_bytes=([0-9]{1,18})\nrx_bytes=([0-9]{1,18})\npersistent_keepalive_interval=[0-9]{1,5}"
    rb"(?:\nallowed_ip=([0-9.]{7,15})/32)?(?:\nallowed_ip=([0-9a-f:]{2,39})/128)?\n?"
)


def decode_uapi_peer(block: bytes) -> PeerState:
    """A peer's lines behind "public_key=". Raises CodecError."""
    return _decode_usual_uapi_peer(block) or _decode_any_uapi_peer(block)


def _decode_usual_uapi_peer(block: bytes) -> PeerState | None:
    """Less than half the time of _decode_any_uapi_peer()."""
    match = _USUAL_UAPI_PEER.fullmatch(block)
    if match is None:
        return None
    key, psk, endpoint, seconds, nanoseconds, tx, rx, *addresses = match.groups()
    try:
        networks = sorted([pack_network(a.decode("ascii")) for a in addresses if a])
    except OSError:
        return None
    psk = binascii.unhexlify(psk)
    return PeerState(
        WirePeer(binascii.unhexlify(key), b"" if psk == _NO_KEY else psk, tuple(networks)),
        _in_range(int(seconds) or int(int(nanoseconds) != 0), MAX_TIME),
        int(rx),
        int(tx),
        endpoint is not None,
    )


def _decode_any_uapi_peer(block: bytes) -> PeerState:
    key = psk = b""
    networks: list[bytes] = []
    numbers = dict.fromkeys(_UAPI_NUMBERS, 0)
    located = False
    for name, value in _uapi_lines(b"public_key=" + block):
        try:
            if name == "public_key":
                key = _uapi_key(value)
            elif name == "preshared_key":
                psk = _uapi_key(value)
            elif name == "allowed_ip":
                networks.append(_uapi_network(value))
            elif name in numbers:
                numbers[name] = _uapi_integer(value)
            elif name == "endpoint":
                located = True
        except (ValueError, OSError):
            raise CodecError(f"UAPI: a bad value of {name[:40]}") from None
    seconds, nanoseconds, rx, tx = numbers.values()
    return PeerState(
        WirePeer(key, psk if any(psk) else b"", tuple(sorted(networks))),
        _in_range(seconds or int(nanoseconds != 0), MAX_TIME),
        rx,
        tx,
        located,
    )


_UAPI_NUMBERS = ("last_handshake_time_sec", "last_handshake_time_nsec", "rx_bytes", "tx_bytes")


def _uapi_network(value: str) -> bytes:
    """ "10.0.0.1/32" as packed address and prefix byte. Raises ValueError, OSError."""
    address, _, prefix = value.partition("/")
    packed = socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
    length = _uapi_integer(prefix)
    host_bits = 8 * len(packed) - length
    if host_bits < 0 or int.from_bytes(packed, "big") & ((1 << host_bits) - 1):
        raise ValueError
    return packed + bytes([length])


class UapiConnection:
    """A connection to a userspace WireGuard's socket, made anew when the program was."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self.timeouts = 0  # one after the other

    def exchange(self, request: bytes) -> list[bytes]:
        """Send one operation, return its answer without the empty line, in parts as they came.

        Raises BackendError.
        """
        with self._lock:
            try:
                try:
                    answer = self._exchange(request)
                except (BrokenPipeError, ConnectionResetError, EOFError):
                    self.close()  # the program was restarted since; operations are idempotent
                    answer = self._exchange(request)
                self.timeouts = 0
                return answer
            except TimeoutError:
                self.close()
                self.timeouts += 1
                text = f"{self._path}: no answer within {BACKEND_TIMEOUT:.0f} s"
                raise BackendError(text) from None
            except (OSError, EOFError) as error:
                self.close()
                raise BackendError(f"{self._path}: {_reason(error)}") from None

    def _exchange(self, request: bytes) -> list[bytes]:
        if self._socket is None:
            self._socket = connect_uapi(self._path)
        deadline = time.monotonic() + BACKEND_TIMEOUT
        self._socket.settimeout(BACKEND_TIMEOUT)
        self._socket.sendall(request)
        parts: list[bytes] = []
        tail = b""
        while not tail.endswith(b"\n\n"):
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            part = self._socket.recv(1 << 18)
            if not part:
                raise EOFError
            parts.append(part)
            tail = (tail + part)[-2:]
        parts[-1] = parts[-1][:-1]
        return parts

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def connect_uapi(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connection.settimeout(BACKEND_TIMEOUT)
        connection.connect(path)
    except OSError:
        connection.close()
        raise
    return connection


def uapi_answers(path: str) -> bool:
    """Whether a program listens on this socket."""
    try:
        connect_uapi(path).close()
    except OSError:
        return False
    return True


class UapiBackend:
    """A userspace WireGuard over its socket; started when it is not there and `program` is given.

    The program runs in its own session and outlives the gateway: its tunnels go on.
    """

    kind = "uapi"

    def __init__(self, link: Link, program: str | None, directory: str = "") -> None:
        self._link = link
        self._program = program
        if not directory:
            directory = UAPI_DIRECTORY if link.obfuscation is None else AWG_UAPI_DIRECTORY
        self._path = f"{directory}/{link.name}.sock"
        self._control = UapiConnection(self._path)
        self._reader = UapiConnection(self._path)
        self._route = Route()
        self._process: subprocess.Popen[bytes] | None = None
        self._index = 0

    def setup(self, link: Link | None = None) -> None:
        self._link = link or self._link
        if not uapi_answers(self._path):
            self._start()
        head, _ = split_uapi_device(self._control.exchange(b"get=1\n\n"))
        device = decode_uapi_head(head)
        lines = ""
        if device.private_key != self._link.private_key:
            lines += f"private_key={self._link.private_key.hex()}\n"
        if device.listen_port != self._link.listen_port:
            lines += f"listen_port={self._link.listen_port}\n"
        if self._link.obfuscation is not None:
            lines += encode_uapi_parameters(self._link.obfuscation, device.obfuscation)
        if lines:
            self._set(lines.encode("ascii"))
        self._index = self._route.configure(self._link)

    def _start(self) -> None:
        name = self._link.name
        if self._program is None:
            raise BackendError(f"{name}: no userspace WireGuard listens on {self._path}")
        LOG.info("%s: starting %s", name, os.path.basename(self._program))
        environment = {"PATH": os.environ.get("PATH", os.defpath), "LOG_LEVEL": "error"}
        try:
            self._process = subprocess.Popen(  # noqa: S603  no shell; a name that was checked
                [self._program, "-f", name],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise BackendError(f"{name}: {self._program}: {_reason(error)}") from None
        deadline = time.monotonic() + DAEMON_START_SECONDS
        while not uapi_answers(self._path):
            status = self._process.poll()
            if status is not None:
                raise BackendError(f"{name}: {self._program} ended with status {status}")
            if time.monotonic() > deadline:
                self._process.kill()
                self._process.wait()
                raise BackendError(f"{name}: {self._program} did not open {self._path}")
            time.sleep(0.01)

    def alive(self) -> bool:
        """As Backend.alive(). A program that hangs is ended when this process has started it."""
        if self._process is not None and self._process.poll() is not None:
            self._process = None
            return False
        if self._process is not None and self._control.timeouts >= HUNG_TIMEOUTS:
            LOG.error("%s: %s hangs: it is ended", self._link.name, self._program)
            self._process.kill()
            self._process.wait()
            self._process, self._control.timeouts = None, 0
            return False
        return self._route.is_right(self._link, self._index) and uapi_answers(self._path)

    def read(self) -> list[PeerState]:
        return decode_uapi_device(self._reader.exchange(b"get=1\n\n"))[1]

    def sample(self, known: Container[int]) -> Reading:
        return sample_uapi_device(self._reader.exchange(b"get=1\n\n"), known)

    def apply(self, changes: Sequence[Change]) -> None:
        for start in range(0, len(changes), READ_CHUNK):
            self._set(encode_uapi_changes(changes[start : start + READ_CHUNK]))

    def _set(self, lines: bytes) -> None:
        answer = b"".join(self._control.exchange(b"set=1\n" + lines + b"\n"))
        match = re.fullmatch(rb"errno=(-?[0-9]{1,6})\n", answer)
        check_uapi_status(int(match[1]) if match else None)

    def close(self) -> None:
        for part in (self._control, self._reader, self._route):
            part.close()


class MemoryBackend:
    """No interface at all: for writing API clients."""

    kind = "memory"

    def __init__(self) -> None:
        self._peers: dict[bytes, WirePeer] = {}
        self._owners: dict[bytes, bytes] = {}  # allowed IP -> public key

    def setup(self, link: Link | None = None) -> None:
        pass

    def alive(self) -> bool:
        return True

    def read(self) -> list[PeerState]:
        return [PeerState(peer, 0, 0, 0) for peer in tuple(self._peers.values())]

    def sample(self, known: Container[int]) -> Reading:
        marked = [(hash(state), state) for state in self.read()]
        changed = [(mark, state) for mark, state in marked if mark not in known]
        return Reading(len(marked), changed, {mark for mark, _ in marked if mark in known})

    def apply(self, changes: Sequence[Change]) -> None:
        for public_key, peer in changes:
            before = self._peers.pop(public_key, None)
            for network in before.allowed_ips if before else ():
                del self._owners[network]
            if peer is not None:
                self._set(peer)

    def _set(self, peer: WirePeer) -> None:
        """As WireGuard does: an allowed IP belongs to the peer that was set last."""
        for network in peer.allowed_ips:
            loser = self._peers.get(self._owners.get(network, b""))
            if loser is not None:
                kept = tuple(other for other in loser.allowed_ips if other != network)
                self._peers[loser.public_key] = loser._replace(allowed_ips=kept)
            self._owners[network] = peer.public_key
        self._peers[peer.public_key] = peer

    def close(self) -> None:
        pass


# By the kernel's name of a kind of interface: the program that makes it where the kernel does not.
PROGRAMS = {WG_GENL_NAME: "wireguard-go", AWG_GENL_NAME: "amneziawg-go"}


def open_backend(mode: str, link: Link) -> Backend:
    """The backend that WG_BACKEND names, set up. `auto` takes what is there:

    an existing interface, then the kernel, then a running userspace WireGuard, then wireguard-go
    (or amneziawg-go) if it is installed. Raises BackendError.
    """
    if mode == "memory":
        return MemoryBackend()
    program = shutil.which(PROGRAMS[WG_GENL_NAME if link.obfuscation is None else AWG_GENL_NAME])
    candidates: list[Callable[[], Backend]] = []
    if mode in ("auto", "netlink"):
        candidates.append(lambda: NetlinkBackend(link))
    if mode in ("auto", "uapi"):
        candidates.append(lambda: UapiBackend(link, program))
    failures: list[str] = []
    for candidate in candidates:
        backend = candidate()
        try:
            backend.setup()
        except BackendError as error:
            backend.close()
            failures.append(str(error))
        else:
            return backend
    raise BackendError("; ".join(failures))


# ==================================================================================================
# host network: what the host needs around the interfaces: forwarding, a table of nftables that is
# ours, rules in ufw where it is active. Idempotent; nothing that is not ours is ever changed.
# Never here: peers.
# ==================================================================================================

LINK_KINDS = {PLAIN_PREFIX: WG_GENL_NAME, AWG_PREFIX: AWG_GENL_NAME}  # by InterfaceSettings.prefix
TABLE = "inet wggw"
UFW_MARK = "wggw"  # the comment of our rules in ufw
TRANSLATED = tuple(  # RFC 1918, 6598 and 4193: what has no route back from the internet
    ipaddress.ip_network(text)
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")
)
HOST_TOOL_SECONDS = 60  # for nft and ufw


class Finding(NamedTuple):
    """One thing that was looked at; `todo` is empty when all is well."""

    subject: str
    found: str
    todo: str = ""
    failed: bool = False


def is_translated(subnet: IPv4or6Network) -> bool:
    """Whether a subnet needs NAT: global addresses must not be translated."""
    return any(
        subnet.version == other.version and subnet.subnet_of(other)  # type: ignore[arg-type]
        for other in TRANSLATED
    )


def _nft_set(items: Iterable[object]) -> str:
    return "{ " + ", ".join(map(str, items)) + " }"


def _strangers(allowed: Sequence[IPv4or6Network], port: int) -> Iterator[str]:
    """The rules that keep everyone but `allowed` from the API."""
    for version, protocol, name in ((4, "ipv4", "ip"), (6, "ipv6", "ip6")):
        mine = ipaddress.collapse_addresses(n for n in allowed if n.version == version)  # type: ignore[type-var]
        networks = list(mine)
        if any(network.prefixlen == 0 for network in networks):
            continue
        sources = f"{name} saddr != {_nft_set(networks)}" if networks else ""
        yield f'iifname != "lo" meta nfproto {protocol} {sources} tcp dport {port} drop'


def render_ruleset(config: Config, tunnels: Sequence[InterfaceSettings]) -> str:
    """The text for `nft -f -` that makes our table what it must be, whatever it was."""
    names = _nft_set(f'"{tunnel.name}"' for tunnel in tunnels)
    outside = _nft_set(['"lo"', *(f'"{tunnel.name}"' for tunnel in tunnels)])
    clamp = "tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu"
    subnets = [subnet for tunnel in tunnels for subnet in tunnel.subnets.values()]
    chains: dict[str, list[str]] = {
        "prerouting { type nat hook prerouting priority dstnat; policy accept;": [
            f"iifname != {outside} fib daddr type local "
            f"udp dport {_nft_set(dict.fromkeys(tunnel.ports[1:]))} redirect to :{tunnel.ports[0]}"
            for tunnel in tunnels
            if tunnel.ports[1:]
        ],
        "input { type filter hook input priority filter; policy accept;": [
            f"iifname {names} tcp dport {config.api_port} drop",
            *(
                _strangers(config.allowed_backends, config.api_port)
                if config.allowed_backends
                else ()
            ),
        ],
        "forward { type filter hook forward priority filter; policy accept;": [
            *([f"iifname {names} oifname {names} drop"] if config.wg_isolate else []),
            # Clients have no business with the host's link, such as a cloud's metadata service;
            # Amazon's and Google's have addresses of their own in IPv6.
            f"iifname {names} ip daddr 169.254.0.0/16 drop",
            f"iifname {names} ip6 daddr {{ fe80::/10, fd00:ec2::254, fd20:ce::254 }} drop",
            f"iifname {names} {clamp}",
            f"oifname {names} {clamp}",
            f"iifname {names} accept",
            f"oifname {names} ct state new drop",  # what comes from a tunnel was accepted above
        ],
        "postrouting { type nat hook postrouting priority srcnat; policy accept;": [
            f"{'ip' if subnet.version == 4 else 'ip6'} saddr {subnet} "
            f"oifname != {outside} masquerade"
            for subnet in subnets
            if is_translated(subnet)
        ],
    }
    lines = [f"table {TABLE}", f"delete table {TABLE}", f"table {TABLE} {{"]
    for head, rules in chains.items():
        lines += [f"  chain {head}", *(f"    {rule}" for rule in rules), "  }"]
    return "\n".join([*lines, "}", ""])


def run_tool(*command: str, given: str = "") -> str:
    """Standard output of a tool of the host. Raises BackendError with what it says."""
    try:
        done = subprocess.run(  # noqa: S603  # no shell; our own words and parsed settings
            command,
            input=given,
            capture_output=True,
            text=True,
            timeout=HOST_TOOL_SECONDS,
            check=False,
            env={"PATH": TOOL_PATH, "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendError(f"{command[0]}: {_reason(error)}") from None
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines() or ["it says nothing"]
        raise BackendError(f"{' '.join(command[:2])}: status {done.returncode}: {words[0]}")
    return done.stdout


def current_table() -> str:
    """Our table as nft lists it, empty when it is not there. Raises BackendError."""
    try:
        return run_tool("nft", "-s", "list", "table", *TABLE.split())
    except BackendError as error:
        if "No such file or directory" in str(error) and tool("nft"):
            return ""
        raise


def tool(name: str) -> str | None:
    """Where a program of the host is, None when it is not installed."""
    return shutil.which(name, path=TOOL_PATH)


# --- forwarding -----------------------------------------------------------------------------------

FORWARDING = {"ipv4": "net/ipv4/ip_forward", "ipv6": "net/ipv6/conf/all/forwarding"}


def forwarding_families(tunnels: Sequence[InterfaceSettings]) -> list[str]:
    return [f for f in FAMILIES if any(f in tunnel.subnets for tunnel in tunnels)]


def read_sysctl(name: str) -> str:
    """A value under /proc/sys, empty when the kernel has no such thing."""
    try:
        return Path("/proc/sys", name).read_text("ascii").strip()
    except OSError:
        return ""


def write_sysctl(name: str, value: str) -> None:
    try:
        Path("/proc/sys", name).write_text(value, "ascii")
    except OSError as error:
        raise BackendError(f"{name} cannot be set to {value}: {_reason(error)}") from None


def turn_on_forwarding(tunnels: Sequence[InterfaceSettings]) -> Iterator[str]:
    """Yields what it did. Raises BackendError."""
    for family in forwarding_families(tunnels):
        name = FORWARDING[family]
        if read_sysctl(name) == "1":
            continue
        if family == "ipv6":
            yield from _keep_router_advertisements([tunnel.name for tunnel in tunnels])
        write_sysctl(name, "1")
        yield f"{name} = 1"


def _keep_router_advertisements(tunnels: Sequence[str]) -> Iterator[str]:
    """A host that begins to forward stops hearing routers, and so loses its own default route,

    unless accept_ra is 2 (Documentation/networking/ip-sysctl.rst).
    """
    for directory in sorted(Path("/proc/sys/net/ipv6/conf").glob("*")):
        name = f"net/ipv6/conf/{directory.name}/accept_ra"
        if directory.name not in ("lo", "all", *tunnels) and read_sysctl(name) == "1":
            write_sysctl(name, "2")
            yield f"{name} = 2"


# --- ufw ------------------------------------------------------------------------------------------


def ufw_is_active() -> bool:
    return tool("ufw") is not None and "Status: active" in run_tool("ufw", "status")


def ufw_rules(config: Config, tunnels: Sequence[InterfaceSettings]) -> list[str]:
    """The rules that ufw needs to let through what our table lets through, in its own words."""
    port = config.api_port
    sources = [
        network.network_address if network.num_addresses == 1 else network
        for network in config.allowed_backends
    ]
    if any(network.prefixlen == 0 for network in config.allowed_backends):
        sources = []  # everybody is no network to ufw
    return [
        *(f"allow {tunnel.ports[0]}/udp" for tunnel in tunnels),
        *([f"allow {port}/tcp"] if not sources else []),
        *(f"allow from {source} to any port {port} proto tcp" for source in sources),
        *(f"route allow in on {tunnel.name}" for tunnel in tunnels),
    ]


def parse_ufw(shown: str) -> tuple[list[str], list[str]]:
    """`ufw show added` -> (our rules, everybody else's)."""
    lines = [line.removeprefix("ufw ") for line in shown.splitlines() if line.startswith("ufw ")]
    mark = f" comment '{UFW_MARK}'"
    ours = [line.removesuffix(mark) for line in lines if line.endswith(mark)]
    return ours, [line for line in lines if not line.endswith(mark)]


def align_ufw(wanted: Sequence[str]) -> Iterator[str]:
    """Make our rules in ufw be `wanted`; yields what it did. Raises BackendError."""
    ours, others = parse_ufw(run_tool("ufw", "show", "added"))
    for rule in wanted:
        if rule not in ours and rule not in others:  # whose rule it is stays as it is
            run_tool("ufw", *rule.split(), "comment", UFW_MARK)
            yield f"ufw: {rule}"
    for rule in ours:
        if rule not in wanted:
            before, _, words = rule.rpartition("allow ")
            run_tool("ufw", *f"{before}delete allow {words}".split())
            yield f"ufw: no longer {rule}"


# --- up and down ----------------------------------------------------------------------------------


def make_interface(kind: str, link: Link) -> str:
    """The kernel's interface with addresses and MTU; its key and port are the service's business.

    Returns what it did, empty for nothing. Raises BackendError.
    """
    route = Route()
    try:
        made = not route.index(link.name)
        if made:
            route.create(link.name, kind)
        elif kind == AWG_GENL_NAME:  # its MTU follows from parameters that the service keeps
            return ""
        was_up = not made and route.is_up(route.index(link.name), link.mtu)
        route.configure(link)
        return "" if was_up else f"{link.name}: {'made' if made else 'set up'}"
    except NetlinkError as error:
        if error.errno == errno.EOPNOTSUPP:
            return f"{link.name}: the kernel has no {kind}; `serve` starts a userspace one"
        raise BackendError(f"{link.name}: cannot be made: {error}") from None
    finally:
        route.close()


def remove_interface(kind: str, name: str) -> str:
    """Delete a link, emptied first: the kernel takes 17 ms for each peer of a deleted one."""
    route = Route()
    control = NetlinkSocket(NETLINK_GENERIC)
    try:
        if not route.index(name):
            return ""
        family = genl_family(control, kind)
        if family is not None:
            head = nl_attribute(WGDEVICE_A_IFNAME, name.encode("ascii") + b"\0")
            flags = nl_attribute(WGDEVICE_A_FLAGS, struct.pack("=I", WGDEVICE_F_REPLACE_PEERS))
            with contextlib.suppress(NetlinkError):  # a userspace one
                control.request(family.id, 0, genl(WG_CMD_SET_DEVICE, 1, head + flags))
        route.delete(name)
        return f"{name}: removed"
    except NetlinkError as error:
        raise BackendError(f"{name}: cannot be removed: {error}") from None
    finally:
        control.close()
        route.close()


def net_up(
    config: Config, tunnels: Sequence[InterfaceSettings], links: Sequence[Link]
) -> Iterator[str]:
    """Everything around the interfaces; yields what was changed. Raises BackendError.

    The rules come first: no packet is ever forwarded without them.
    """
    before = current_table()
    run_tool("nft", "-f", "-", given=render_ruleset(config, tunnels))
    if current_table() != before:
        yield f"nftables: table {TABLE}"
    if ufw_is_active():
        yield from align_ufw(ufw_rules(config, tunnels))
    yield from turn_on_forwarding(tunnels)
    if config.wg_backend in ("auto", "netlink"):
        for tunnel, link in zip(tunnels, links, strict=True):
            done = make_interface(LINK_KINDS[tunnel.prefix], link)
            if done:
                yield done


def net_down(links: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Take away what net_up() made, and with the interfaces every tunnel. Raises BackendError.

    `links` are kind and name of each interface.
    """
    if tool("nft") and current_table():
        run_tool("nft", "delete", "table", *TABLE.split())
        yield f"nftables: table {TABLE} removed"
    if ufw_is_active():
        yield from align_ufw([])
    for kind, name in links:
        done = remove_interface(kind, name)
        if done:
            yield done
    yield "forwarding stays on until the next boot: something else may rely on it"


def links_of_table(table: str) -> list[tuple[str, str]]:
    """Kind and name of the interfaces that our table lets through, for want of settings.

    What is no WireGuard by now is somebody else's. Raises BackendError.
    """
    rules = re.findall(r"^\s*iifname (.+) accept$", table, re.MULTILINE)
    names = sorted({name for rule in rules for name in re.findall(r'"([^"]+)"', rule)})
    route = Route()
    try:
        found = [(route.kind(route.index(name)), name) for name in names if route.index(name)]
    finally:
        route.close()
    return [(kind, name) for kind, name in found if kind in (*LINK_KINDS.values(), "tun")]


# --- what else is on the host ---------------------------------------------------------------------


def find_blocks(ruleset: str, hook: str, passes: Sequence[str]) -> list[str]:
    """Foreign chains at a hook that drop what nothing accepts: from `nft -j list ruleset`.

    A table with an accepting rule that mentions one of `passes` (an interface, a port) is taken
    to let us through. Raises ValueError when it is not nft's JSON.
    """
    items = json.loads(ruleset)["nftables"]
    chains = [item["chain"] for item in items if "chain" in item]
    rules = [item["rule"] for item in items if "rule" in item]
    found = []
    for chain in chains:
        table = (chain["family"], chain["table"])
        if chain.get("hook") != hook or " ".join(table) == TABLE:
            continue
        if chain["family"] not in ("ip", "ip6", "inet"):
            continue
        mine = [rule for rule in rules if (rule["family"], rule["table"]) == table]
        closed = chain.get("policy") == "drop" or any(
            rule["chain"] == chain["name"] and _drops_all(rule["expr"]) for rule in mine
        )
        if closed and not any(_lets_pass(rule["expr"], passes) for rule in mine):
            found.append(f"table {' '.join(table)}, chain {chain['name']}")
    return found


def _drops_all(expressions: Sequence[Mapping[str, Any]]) -> bool:
    """A rule without a condition that ends in drop or reject."""
    kinds = {kind for expression in expressions for kind in expression}
    return bool(kinds & {"drop", "reject"}) and kinds <= {"drop", "reject", "counter", "log"}


def _lets_pass(expressions: Sequence[Mapping[str, Any]], passes: Sequence[str]) -> bool:
    rights = [json.dumps(e["match"].get("right")) for e in expressions if "match" in e]
    accepts = any("accept" in e for e in expressions)
    return accepts and any(name in rights or f'"{name}"' in rights for name in passes)


def find_legacy_blocks(chain: str, passes: Sequence[str]) -> list[str]:
    """The same for iptables' old tables, which nft does not see."""
    found = []
    for name, program in (("ip_tables", "iptables-legacy"), ("ip6_tables", "ip6tables-legacy")):
        try:
            used = "filter" in Path(f"/proc/net/{name}_names").read_text("ascii").split()
        except OSError:
            continue
        if not used or not tool(program):
            continue
        lines = run_tool(program, "-t", "filter", "-S").splitlines()
        closed = {f"-P {chain} DROP", f"-A {chain} -j DROP", f"-A {chain} -j REJECT"}
        opened = any(
            line.endswith("-j ACCEPT") and any(f" {word} " in line for word in passes)
            for line in lines
        )
        if not opened and any(
            line in closed or line.startswith(f"-A {chain} -j REJECT ") for line in lines
        ):
            found.append(f"{program}, chain {chain}")
    return found


def look_at_network(config: Config, tunnels: Sequence[InterfaceSettings]) -> Iterator[Finding]:
    """A finding for each part of the host's network."""
    yield from (_look_at_interface(tunnel) for tunnel in tunnels)
    for family in forwarding_families(tunnels):
        name = FORWARDING[family].replace("/", ".")
        on = read_sysctl(FORWARDING[family]) == "1"
        todo = "" if on else f"run `wggw net up` (or sysctl -w {name}=1)"
        yield Finding("forwarding", f"{name} is {'on' if on else 'off'}", todo, not on)
    for look in (_look_at_table, _look_at_firewalls):
        try:
            yield from look(config, tunnels)
        except (BackendError, ValueError, KeyError) as error:
            text = str(error) or type(error).__name__
            yield Finding("firewall", f"cannot be read: {text}", "run as root, with nftables", True)


def _look_at_interface(tunnel: InterfaceSettings) -> Finding:
    route = Route()
    try:
        index = route.index(tunnel.name)
        if not index:
            return Finding(tunnel.name, "no such interface", "run `wggw net up`", True)
        mtu = tunnel.mtu if tunnel.prefix == PLAIN_PREFIX else None
        words = f"up, MTU {mtu}" if mtu else "up"
        if not route.is_up(index, mtu):
            return Finding(tunnel.name, f"not {words}", "run `wggw net up`", True)
        return Finding(tunnel.name, words)
    except BackendError as error:
        return Finding(tunnel.name, f"cannot be read: {error}", "see the kernel's log", True)
    finally:
        route.close()


def _look_at_table(config: Config, tunnels: Sequence[InterfaceSettings]) -> Iterator[Finding]:
    table = current_table()
    if not table:
        yield Finding("NAT", f"table {TABLE} is missing", "run `wggw net up`", True)
        return
    for tunnel in tunnels:
        for subnet in tunnel.subnets.values():
            if not is_translated(subnet):
                text = f"{subnet} is global and is not translated: it must be routed to this host"
                yield Finding("NAT", text)
            elif f"saddr {subnet} " in table:
                yield Finding("NAT", f"{subnet} is masqueraded")
            else:
                yield Finding("NAT", f"{subnet} is not masqueraded", "run `wggw net up`", True)


def _look_at_firewalls(config: Config, tunnels: Sequence[InterfaceSettings]) -> Iterator[Finding]:
    ruleset = run_tool("nft", "-j", "list", "ruleset")
    names = [tunnel.name for tunnel in tunnels]
    ports = [str(tunnel.ports[0]) for tunnel in tunnels]
    for what, hook, passes, todo in (
        (
            f"forwarding from {', '.join(names)}",
            "forward",
            names,
            f"let {', '.join(names)} through",
        ),
        (
            f"UDP port {', '.join(ports)}",
            "input",
            ports,
            f"accept UDP {', '.join(ports)} and TCP {config.api_port}",
        ),
    ):
        blocks = find_blocks(ruleset, hook, passes) + find_legacy_blocks(hook.upper(), passes)
        for block in blocks:
            yield Finding("firewall", f"{what}: dropped by {block}", f"{todo} there", True)
        if not blocks:
            yield Finding("firewall", f"{what}: no other rule on this host drops it")


# ==================================================================================================
# gateway: what may happen to peers, under one lock; the interface as a projection of the store
# Never here: JSON, SQL and HTTP.
# ==================================================================================================


_T = TypeVar("_T")
_Row = TypeVar("_Row", bound=Sequence[Any])


class Interface(NamedTuple):
    """An interface that peers live on."""

    settings: InterfaceSettings
    link: Link
    backend: Backend
    pools: Mapping[str, AddressPool]
    public_key: str
    obfuscation: ObfuscationState | None = None

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def subject(self) -> str:
        """What Gateway.failures calls it."""
        return f"interface {self.settings.name}"


class Outcome(NamedTuple):
    """What a request came to: the peer after it (or before it was deleted), and its traffic.

    `number` is the journal record that the answer waits for.
    """

    changed: bool
    peer: Peer
    traffic: Traffic
    number: int


class InterfaceTraffic(NamedTuple):
    """What an interface's peers sent and received, as of the last sample.

    Bytes since the gateway's start; bytes a second between the last two samples; `time` of the
    last one by the monotonic clock, 0.0 before it.
    """

    rx_bytes: int = 0
    tx_bytes: int = 0
    rx_rate: float = 0.0
    tx_rate: float = 0.0
    time: float = 0.0


HeldAddress = tuple[str, str, str]  # interface, family, address

# What an element of a desired state says as a row has it, and the families that a protocol names.
_SYNC_PLAIN = (
    "dns",
    "port",
    "persistent_keepalive",
    "expires_at",
    "quota_bytes",
    "request_id",
    "assigned_ip",
    "assigned_ipv6",
)
_PROTOCOLS: Mapping[str | None, tuple[str, ...]] = {
    None: (),
    "dual": FAMILIES,
    **{family: (family,) for family in FAMILIES},
}


# Of a batch: its name and decoded fields, or what is wrong with it.
BatchOperation = tuple[str, Mapping[str, Any]] | GatewayError


class Desired(NamedTuple):
    """An element of a desired state: where it stands, for errors, and its decoded fields."""

    place: str
    fields: Mapping[str, Any]


class DesiredResult(NamedTuple):
    """What a desired state changes, in peers."""

    created: int
    updated: int
    deleted: int
    unchanged: int


class Wish(NamedTuple):
    """What a desired state makes of a peer: before (None: it is new), after, where it stands.

    `missing`: families in which `after` is still to get an address.
    """

    before: Peer | None
    after: Peer
    missing: tuple[str, ...]
    place: str


class Plan(NamedTuple):
    """The steps of a desired state: what frees addresses comes before what takes them."""

    leaving: list[Step]
    coming: list[Step]
    result: DesiredResult


class SyncResult(NamedTuple):
    """What reconcile() did, in peers."""

    added: int
    updated: int
    removed: int
    unchanged: int


def make_link(
    settings: InterfaceSettings, private_key: bytes, parameters: Obfuscation | None = None
) -> Link:
    """How an interface must be. Raises ValueError when S4 leaves too little of the MTU."""
    mtu = settings.mtu - (parameters.s4 if parameters else 0)
    if mtu < 1280:
        raise ValueError(f"S4: WG_MTU {settings.mtu} less S4 is below IPv6's least MTU, 1280")
    subnets = settings.subnets.values()
    return Link(
        settings.name,
        tuple(f"{subnet.network_address + 1}/{subnet.prefixlen}" for subnet in subnets),
        mtu,
        settings.ports[0],
        private_key,
        parameters,
    )


def initial_obfuscation(given: str | None, store: Store, interface: str) -> ObfuscationState:
    """What an obfuscated interface speaks: what the state says, else AWG_PARAMS, else random.

    AWG_PARAMS does not cut off the peers of an interface: that is rotation.
    Raises ConfigError, DamagedError, DiskError.
    """
    wanted = read_parameters(given) if given else None
    try:
        kept = store.meta("obfuscation")
    except (ValueError, TypeError) as error:
        raise _damaged(store.path, 0, f"AmneziaWG's parameters are not valid: {error}") from None
    peers = sum(number for (name, _), number in store.counts.items() if name == interface)
    if kept is not None and (wanted is None or same_parameters(kept, wanted)):
        return cast(ObfuscationState, kept)
    cut = kept is not None and not (wanted and same_language(kept.parameters, wanted.parameters))
    if kept is not None and peers and cut:
        LOG.warning(
            "AWG_PARAMS differs from what %s and its %d peers speak, and is not used: "
            "`wggw awg rotate` changes that",
            interface,
            peers,
        )
        return cast(ObfuscationState, kept)
    chosen = wanted or generate_obfuscation(DEFAULT_GENERATION, DEFAULT_PRESET)
    chosen = chosen._replace(version=kept.version + cut if kept else 1)
    store.set_meta("obfuscation", encode_state(chosen))
    store.commit_meta("obfuscation", encode_state(chosen))
    store.flush()
    LOG.info("%s: new AmneziaWG parameters of generation %s", interface, chosen.generation)
    return chosen


def read_parameters(given: str) -> ObfuscationState:
    """AWG_PARAMS: JSON, or the path of a file with it. Raises ConfigError, showing no value."""
    try:
        is_json = given.lstrip().startswith(("{", "[", '"'))
        if not is_json:
            check_private("AWG_PARAMS", given)
        text = given if is_json else Path(given).read_text("utf-8")
        parsed = load_json(text)
        if not isinstance(parsed, dict):
            raise ValueError("it is not a JSON object")
        return parse_obfuscation(parsed)
    except OSError as error:
        raise ConfigError(f"AWG_PARAMS: {given[:200]!r} cannot be read: {_reason(error)}") from None
    except json.JSONDecodeError:
        raise ConfigError("AWG_PARAMS: its value (not shown) is not JSON") from None
    except ValueError as error:
        raise ConfigError(f"AWG_PARAMS: {error}") from None


def same_parameters(left: ObfuscationState, right: ObfuscationState) -> bool:
    return (left.generation, left.parameters) == (right.generation, right.parameters)


class Gateway:
    """Peers, their addresses and their interfaces.

    The lock guards store, pools and the interfaces' apply(); nobody waits for the disk while
    holding it. Errors that a caller should see are GatewayErrors.
    """

    def __init__(self, config: Config, store: Store, clock: Callable[[], float]) -> None:
        self.config = config
        self.store = store
        self.lock = threading.Lock()
        self.ready = False
        self.starting = "the gateway is starting"  # what readiness says until then
        self.interfaces: dict[str, Interface] = {}
        self.failures: dict[str, str] = {}  # what is wrong now: subject -> reason
        self._unset: set[str] = set()  # interfaces whose failure only setup() mends
        self._clock = clock
        self._projection = threading.Lock()  # one reader of an interface at a time
        self._setup = threading.Lock()  # one that sets interfaces up at a time
        self._touched: set[bytes] | None = None  # keys changed while an interface is being read
        self._newborn: dict[str, set[bytes]] = {}  # by interface: see _scrub
        self._parked: dict[str, dict[bytes, Parked]] = collections.defaultdict(dict)
        self._marks: dict[str, set[int]] = {}  # by interface, of counters that the store has
        self._counted: dict[str, tuple[int, int]] = {}  # bytes received and sent, by interface
        self._over_quota: set[str] = set()  # public keys to look at
        self._parking_psk = secrets.token_bytes(KEY_BYTES)  # no client has it: no handshake
        self.traffic: dict[str, InterfaceTraffic] = {}
        self._doubts: collections.Counter[str] = collections.Counter()  # see _looks_wrong
        self._pending: collections.deque[tuple[int, Sequence[Step]]] = collections.deque()
        # Of a desired state: addresses that its peers will let go of, that go to nobody else before
        # it ends; and those that it holds now: whether never used, None where a peer let go.
        self._pledged: Container[HeldAddress] = ()
        self._reserved: dict[HeldAddress, bool | None] = {}
        self._unfinished: set[int] = set()  # ids of peers that it made so far
        self._stopping = False

    # --- start and stop --------------------------------------------------------------------------

    def start(
        self,
        opened: Sequence[tuple[InterfaceSettings, Link, Backend]],
        obfuscation: ObfuscationState | None = None,
    ) -> None:
        """Rebuild the pools, bring the interfaces in line, be ready. Raises StartError."""
        for settings, link, backend in opened:
            state = None if link.obfuscation is None else obfuscation
            self._add_interface(settings, link, backend, state)
        for name in self.store.interfaces():
            if name not in self.interfaces:
                variables = " or ".join(f"{s.prefix}_INTERFACE {s.name!r}" for s, _, _ in opened)
                raise ConfigError(
                    f"{variables}: the database has peers of interface {name!r}: "
                    "peers never move by themselves"
                )
        self.expire()  # or their time would go on until the first tick
        try:
            for interface in self.interfaces.values():
                result = self._reconcile(interface)
                LOG.info("%s (%s): %s", interface.name, interface.backend.kind, result)
        except BackendError as error:
            raise StartError(str(error)) from None
        with self.lock:
            self.store.restart_suspended()
            self.store.sweep_online(self.online_since())
        self._find_over_quota()
        self._suspend_over_quota()
        for name in self.interfaces:
            self._rate(name)
        self.ready = True

    def _add_interface(
        self,
        settings: InterfaceSettings,
        link: Link,
        backend: Backend,
        obfuscation: ObfuscationState | None,
    ) -> None:
        public_key = encode_key(x25519_public(link.private_key))
        interface = Interface(settings, link, backend, {}, public_key, obfuscation)
        try:
            pools = self._make_pools(interface, self.store)
        except Conflict as error:
            prefix = settings.prefix
            raise ConfigError(
                f"{prefix}_IPV4_SUBNET, {prefix}_IPV6_SUBNET: {error.detail}"
            ) from None
        self.interfaces[settings.name] = interface._replace(pools=pools)

    def _make_pools(self, interface: Interface, store: Store) -> dict[str, AddressPool]:
        """The pools of an interface as a store has them. Raises Conflict."""
        subnets = interface.settings.subnets
        pools = {family: AddressPool(subnet) for family, subnet in subnets.items()}
        for family in FAMILIES:
            held = self._held(interface.name, store, family)
            try:
                if family in pools:
                    pools[family].restore(held, store.released(family))
                elif any(held):
                    raise ValueError
            except ValueError:  # the address itself is a VPN client's: it stays out of logs
                raise Conflict(
                    f"there is a peer whose {family} address is outside of {subnets.get(family)}, "
                    "excluded there, or given twice"
                ) from None
        return pools

    def _held(self, interface: str, store: Store, family: str) -> Iterator[str]:
        """A family's addresses that peers of an interface hold."""
        rows = self._chunks(lambda at: store.held_rows(interface, family, at, READ_CHUNK * 10))
        return (address for _, address in rows if address)

    def _chunks(self, read: Callable[[int], Sequence[_Row]]) -> Iterator[_Row]:
        """All rows of read(id of the last one); the lock is held for a chunk at a time."""
        after = 0
        while True:
            with self.lock:
                rows = read(after)
            yield from rows
            if not rows:
                return
            after = rows[-1][0]

    def close(self) -> None:
        """Let go of the interfaces, which stay as they are, and write what is left to disk."""
        self._stopping = True
        if _comes_free(self.lock):
            sample = threading.Thread(target=self._last_sample, daemon=True)
            sample.start()
            sample.join(LAST_SAMPLE_SECONDS)
        # A desired state, or a change on an interface that does not answer, may hold them. The
        # next start reads the journal, and takes back what is there of a desired state.
        if _comes_free(self.store.snapshot_lock) and _comes_free(self.lock):
            self.snapshot()
        else:
            LOG.warning("stopped within a change: no last snapshot")
        for interface in self.interfaces.values():
            interface.backend.close()

    def _last_sample(self) -> None:
        try:
            self.sample()
        except BackendError as error:
            LOG.error("the last sample is missing: %s", error)

    # --- requests --------------------------------------------------------------------------------

    def create(self, fields: Mapping[str, Any]) -> Outcome:
        """Make a peer, or find the one that has this key."""
        return self._do(self._create, fields)

    def set_status(self, public_key: str, status: str) -> Outcome:
        """Suspend or activate; nothing to do is as good as done."""
        outcome = self._do(self._set_status, {"public_key": public_key, "status": status})
        self._sweep()
        return outcome

    def delete(self, public_key: str) -> Outcome:
        outcome = self._do(self._delete, {"public_key": public_key})
        self._sweep()
        return outcome

    def update(self, public_key: str, fields: Mapping[str, Any]) -> Outcome:
        """Change what a PATCH may change; undoes a suspension that the new values answer."""
        outcome = self._do(self._update, {**fields, "public_key": public_key})
        if outcome.changed:
            self._sweep()
        return outcome

    def rotate(self, public_key: str, new_public_key: str) -> Outcome:
        """Give a peer a new key; all else stays."""
        new = decode_key(new_public_key)
        if any(new in parked for parked in self._parked.values()):
            try:  # a key that was left a moment ago: its last counters must be read before
                self.sample()
            except BackendError as error:
                LOG.error("%s", error)
                raise Unavailable("the interface is not usable") from None
        outcome = self._do(self._rotate, {"public_key": public_key, "new": new_public_key})
        self._sweep()
        return outcome

    def batch(self, operations: Sequence[BatchOperation]) -> list[Outcome | GatewayError]:
        """Each operation atomic, in order, and one wait for the disk for all of them.

        An error among `operations` is one that decoding found: it is passed on in its place.
        Creates that follow each other reach interface and journal together.
        """
        results: list[Outcome | GatewayError] = []
        for creates, run in itertools.groupby(operations, _is_create):
            results += (self._create_many if creates else self._one_by_one)([*run])
        numbers = [r.number for r in results if isinstance(r, Outcome)]
        with self.lock:  # a refusal may be so because of a change not yet on disk
            numbers.append(self._last_pending())
        lost: Unavailable | None = None
        try:
            self._settle(max(numbers))
        except Unavailable as error:
            lost = error
        self._sweep()
        if lost is None:
            return results

        def stands(operation: BatchOperation, result: Outcome | GatewayError) -> bool:
            if isinstance(result, Outcome):
                return not self.store.is_lost(result.number)
            return result is operation  # a rule's refusal may rest on what was undone

        pairs = zip(operations, results, strict=True)
        return [result if stands(given, result) else lost for given, result in pairs]

    def _create_many(self, creates: Sequence[BatchOperation]) -> list[Outcome | GatewayError]:
        """Creates of a batch, some in one change; by themselves where that is refused."""
        results: list[Outcome | GatewayError] = []
        for start in range(0, len(creates), MAX_MERGED):
            chunk = creates[start : start + MAX_MERGED]
            try:
                with self.lock:
                    results += self._create_together([op[1] for op in chunk if _is_create(op)])
            except GatewayError:  # a key that is there, an address that is not free, no room
                results += self._one_by_one(chunk)
        return results

    def _one_by_one(self, operations: Sequence[BatchOperation]) -> list[Outcome | GatewayError]:
        """Operations of a batch, each by itself."""
        rules: dict[str, Callable[[Mapping[str, Any]], Outcome]] = {
            "create": self._create,
            "delete": self._delete,
            "suspend": lambda fields: self._set_status({**fields, "status": "suspended"}),
            "activate": lambda fields: self._set_status({**fields, "status": "active"}),
        }
        results: list[Outcome | GatewayError] = []
        for operation in operations:
            if isinstance(operation, GatewayError):
                results.append(operation)
                continue
            name, fields = operation
            try:
                with self.lock:
                    results.append(rules[name](fields))
            except GatewayError as error:
                results.append(error)
        return results

    def _create_together(self, given: Sequence[Mapping[str, Any]]) -> list[Outcome]:
        """Make peers that are all new, or none. Under the lock. Raises GatewayError."""
        upcoming: dict[int, Iterator[str]] = {}  # by pool: what its next ones would be given

        def choose(fields: Mapping[str, Any], interface: Interface, family: str) -> str:
            pool = interface.pools[family]
            if fields.get(ADDRESS_FIELD[family]) is None:
                address = next(upcoming.setdefault(id(pool), pool.upcoming()), None)
                if address is not None:
                    return address
            return self._address_for(fields, interface, family)

        peers = [self._new_peer(fields, choose) for fields in given]
        numbered = enumerate(peers, self.store.new_id())
        steps = [Step(None, peer._replace(id=number)) for number, peer in numbered]
        number = self._change(steps)
        return [Outcome(True, cast(Peer, step.after), Traffic(), number) for step in steps]

    def _do(
        self, rule: Callable[[Mapping[str, Any]], Outcome], fields: Mapping[str, Any]
    ) -> Outcome:
        refusal = outcome = None
        with self.lock:
            try:
                outcome = rule(fields)
            except GatewayError as error:  # it may be so because of a change not yet on disk
                refusal = error
            number = outcome.number if outcome else self._last_pending()
        self._settle(number)
        if refusal is not None:
            raise refusal
        return cast(Outcome, outcome)

    def get(self, public_key: str) -> Outcome:
        return self._do(self._get, {"public_key": public_key})

    def page(self, after: int, limit: int, chosen: Filter) -> list[tuple[Peer, Traffic]]:
        with self.lock:
            rows = self.store.page(after, limit, chosen)
            number = self._last_pending()
        self._settle(number)
        return rows

    def usage(self, interface: str | None = None) -> dict[str, dict[str, Any]]:
        """Each family's pools, of one interface or all together: totals, every address held."""
        chosen = [i for i in self.interfaces.values() if interface in (None, i.name)]
        with self.lock:
            number = self._last_pending()
        usage = {
            family: {
                **pool_usage(i.pools.get(family) for i in chosen),
                "assigned_ips": [a for i in chosen for a in self._held(i.name, self.store, family)],
            }
            for family in FAMILIES
        }
        with self.lock:  # the former one, too: a disk fault may have undone it by now
            number = max(number, self._last_pending())
        self._settle(number)
        return usage

    def peer_count(self, status: str | None = None, interface: str | None = None) -> int:
        with self.lock:
            return sum(
                number
                for (name, state), number in self.store.counts.items()
                if status in (None, state) and interface in (None, name)
            )

    def online_since(self) -> int:
        """A handshake after this (Unix seconds) means online."""
        return int(self._clock()) - ONLINE_SECONDS

    def online_count(self) -> int:
        with self.lock:
            return self.store.online(self.online_since())

    def last_handshakes(self, limit: int) -> dict[str, int]:
        with self.lock:
            return self.store.last_handshakes(limit)

    def degraded(self) -> list[str]:
        """Why the gateway is not healthy; empty when it is."""
        reasons = [f"{subject}: {reason}" for subject, reason in dict(self.failures).items()]
        if self.store.failure:
            reasons.append(f"changes are refused: {self.store.failure}")
        return reasons

    # --- rules: under the lock, each leaves everything as it was when it raises ------------------

    def _create(self, fields: Mapping[str, Any]) -> Outcome:
        try:  # most are new: whether one is there already is the store's to find when it is put in
            peer = self._new_peer(fields)
            return Outcome(True, peer, Traffic(), self._change([Step(None, peer)]))
        except GatewayError:
            known = self.store.get(fields["public_key"])
            if known is None:
                raise
        self._check_usable(known.interface)
        self._check_finished(known)
        return Outcome(False, known, self.store.traffic(known.id), self._last_pending())

    def _get(self, fields: Mapping[str, Any]) -> Outcome:
        peer = self._found(fields["public_key"])
        return Outcome(False, peer, self.store.traffic(peer.id), self._last_pending())

    def _set_status(self, fields: Mapping[str, Any]) -> Outcome:
        peer = self._known(fields["public_key"])
        self._check_usable(peer.interface)
        if fields["status"] == "active" and peer.status != "active":
            self._check_may_be_active(peer)
        return self._replace(peer, peer._replace(status=fields["status"], status_reason=None))

    def _delete(self, fields: Mapping[str, Any]) -> Outcome:
        peer = self._known(fields["public_key"])
        return Outcome(True, peer, Traffic(), self._change([Step(peer, None)]))

    def _update(self, fields: Mapping[str, Any]) -> Outcome:
        peer = self._known(fields["public_key"])
        self._check_choices(fields, self.interfaces[peer.interface])
        families = fields.get("tunnel_traffic")
        assigned = [f for f in FAMILIES if getattr(peer, ADDRESS_FIELD[f])]
        if families is not None and not (families and set(families) <= set(assigned)):
            raise Invalid("tunnel_traffic", "must name families that the peer has addresses in")
        named = ("dns", "port", "persistent_keepalive", "expires_at", "quota_bytes")
        after = peer._replace(**{name: fields[name] for name in named if name in fields})
        if families:
            after = after._replace(tunnel_traffic=",".join(families))
        if "preshared_key" in fields:
            after = after._replace(preshared_key=_real_psk(fields["preshared_key"]))
        return self._replace(peer, self._judged(after))

    def _rotate(self, fields: Mapping[str, Any]) -> Outcome:
        peer = self._known(fields["public_key"])
        self._check_own_key(fields["new"], self.interfaces[peer.interface])
        if fields["new"] != peer.public_key and self.store.get(fields["new"]):
            raise Conflict("new_public_key: another peer has it")
        return self._replace(peer, peer._replace(public_key=fields["new"]))

    def _replace(self, before: Peer, after: Peer) -> Outcome:
        number = self._last_pending() if after == before else self._change([Step(before, after)])
        return Outcome(after != before, after, self.store.traffic(after.id), number)

    def _check_usable(self, interface: str) -> None:
        """No answer may speak of an interface that is known to be wrong."""
        if self.interfaces[interface].subject in self.failures:
            raise Unavailable(f"the interface {interface} is not usable")

    def _found(self, public_key: str) -> Peer:
        peer = self.store.get(public_key)
        if peer is None:
            raise NotFound("no peer has this public key")
        return peer

    def _known(self, public_key: str) -> Peer:
        """A peer that may be changed."""
        peer = self._found(public_key)
        self._check_finished(peer)
        return peer

    def _check_finished(self, peer: Peer) -> None:
        """No promise may be made about a peer that goes when a desired state is taken back."""
        if peer.id in self._unfinished:
            raise Unavailable(
                "the desired state that makes this peer is not done yet",
                headers=[("Retry-After", "1")],
            )

    def _over(self, peer: Peer) -> str | None:
        """Why the peer may not be active: "expired", "quota", or None."""
        if peer.expires_at is not None and peer.expires_at <= self._clock():
            return "expired"
        if peer.quota_bytes is not None:
            traffic = self.store.traffic(peer.id)
            if traffic.rx_bytes + traffic.tx_bytes > peer.quota_bytes:
                return "quota"
        return None

    def _judged(self, peer: Peer) -> Peer:
        """The peer as expiry and quota want it; a suspension by the backend stays."""
        if peer.status == "suspended" and peer.status_reason is None:
            return peer
        reason = self._over(peer)
        return peer._replace(
            status="active" if reason is None else "suspended", status_reason=reason
        )

    def _check_may_be_active(self, peer: Peer) -> None:
        reason = self._over(peer)
        if reason == "expired" and peer.expires_at is not None:
            raise Conflict(f"expires_at: the peer expired at {rfc3339(peer.expires_at)}")
        if reason == "quota":
            raise Conflict(f"quota_bytes: the peer has used up its {peer.quota_bytes} bytes")

    def _new_peer(
        self,
        fields: Mapping[str, Any],
        choose: Callable[[Mapping[str, Any], Interface, str], Any] | None = None,
    ) -> Peer:
        """Decide everything about a new peer; takes nothing yet. `choose`: see _address_for."""
        interface = self._interface_for(fields)
        self._check_usable(interface.name)
        self._check_own_key(fields["public_key"], interface)
        own_values = self._own_values(fields, interface)
        families = self._families_for(fields, interface)
        self._check_choices(fields, interface)
        choose = choose or self._address_for
        addresses = {f: choose(fields, interface, f) for f in families}
        return Peer(
            id=self.store.new_id(),
            public_key=fields["public_key"],
            interface=interface.name,
            status="active",
            status_reason=None,
            assigned_ip=addresses.get("ipv4"),
            assigned_ipv6=addresses.get("ipv6"),
            tunnel_traffic=",".join(fields.get("tunnel_traffic") or families),
            dns=fields.get("dns", next(iter(self.config.dns_servers))),
            port=fields.get("port", interface.settings.ports[0]),
            preshared_key=_real_psk(fields.get("preshared_key")),
            persistent_keepalive=fields.get("persistent_keepalive", 25),
            expires_at=fields.get("expires_at"),
            quota_bytes=fields.get("quota_bytes"),
            created_at=int(self._clock()),
            request_id=fields.get("request_id"),
            obfuscation=own_values,
        )

    @staticmethod
    def _check_own_key(public_key: str, interface: Interface) -> None:
        if public_key == interface.public_key:  # an interface drops it without a word
            raise Conflict("public_key: it is the gateway's own")

    def _check_choices(self, fields: Mapping[str, Any], interface: Interface) -> None:
        """Values that depend on the settings or the time. Raises Invalid."""
        ports = interface.settings.ports
        if fields.get("port", ports[0]) not in ports:
            raise Invalid("port", f"the gateway does not listen on it for {interface.name}")
        choices = self.config.dns_servers
        if "dns" in fields and fields["dns"] not in choices:
            raise Invalid("dns", f"must be one of {', '.join(choices)}")
        now, expires_at = self._clock(), fields.get("expires_at")
        if expires_at is not None and expires_at <= now:
            raise Invalid("expires_at", f"is in the past; the server's time is {rfc3339(now)}")

    def _interface_for(self, fields: Mapping[str, Any]) -> Interface:
        """The one of the kind that is asked for; the only one when nothing is said."""
        asked: ObfuscationRequest | None = fields.get("obfuscation")
        obfuscated = asked is not None and asked.enabled
        for interface in self.interfaces.values():
            if (interface.obfuscation is not None) == obfuscated:
                return interface
        if asked is None:
            return next(iter(self.interfaces.values()))
        kind = "obfuscated" if obfuscated else "plain"
        raise Unavailable(f"obfuscation: this gateway has no {kind} interface")

    @staticmethod
    def _own_values(fields: Mapping[str, Any], interface: Interface) -> str | None:
        """A client's own values for Peer.obfuscation. Raises Conflict where sides would differ."""
        state = interface.obfuscation
        if state is None:
            return None
        asked: ObfuscationRequest | None = fields.get("obfuscation")
        values = asked.values if asked else {}
        for name in AWG_SHARED:
            present = getattr(state.parameters, name)
            if name in values and values[name] != present:
                spelling, secret = AWG_PARAMETERS[name].spelling, isinstance(present, bytes)
                both = [str(show_awg_value(v)) for v in (values[name], present)]
                if secret:
                    both = ["another key", "its own"]
                raise Conflict(
                    f"obfuscation: {spelling} is {both[0]} in the request, but {both[1]} on the "
                    f"interface {interface.name}: both sides must have the same"
                )
        own = {name: values[name] for name in AWG_OWN if name in values}
        if not own:
            return "{}"
        for group, rest in ((("jmin", "jmax"), state.parameters), (_PACKETS, PLAIN)):
            if own.keys() & set(group):  # they belong together: never one of each side's
                own = {**{name: getattr(rest, name) for name in group}, **own}
        try:
            check_obfuscation(state.parameters._replace(**own))
        except ValueError as error:
            raise Invalid("obfuscation", str(error)) from None
        return encode_own_values(own)

    @staticmethod
    def _families_for(fields: Mapping[str, Any], interface: Interface) -> list[str]:
        protocol, traffic = fields.get("protocol"), fields.get("tunnel_traffic")
        named = {*(traffic or ()), *_PROTOCOLS[protocol]}
        if not named:
            named.add("ipv4")
        named.update(family for family in FAMILIES if ADDRESS_FIELD[family] in fields)
        return _had(named, fields, interface)

    @staticmethod
    def _address_for(fields: Mapping[str, Any], interface: Interface, family: str) -> str:
        pool = interface.pools[family]
        wanted: str | None = fields.get(ADDRESS_FIELD[family])
        if wanted is not None:
            if not pool.is_free(wanted):
                raise Conflict(f"{ADDRESS_FIELD[family]}: {wanted} is not free")
            return wanted
        address = pool.peek()
        if address is None:
            raise Unavailable(f"the {family} addresses of {interface.name} are exhausted")
        return address

    # --- change: interface, store, pools, and back -----------------------------------------------

    def _change(self, steps: Sequence[Step], part: bool = False) -> int:
        """Make the steps true on interface and in the store; returns the number to settle.

        Under the lock. `part`: of a desired state. Raises Unavailable or Conflict, with nothing
        changed.
        """
        number = self._carry_out(steps, part)
        self._forget_durable()
        self._pending.append((number, steps))
        return number

    def _forget_durable(self) -> None:
        """What is on disk need not be undone any more. Under the lock."""
        while self._pending and self._pending[0][0] <= self.store.durable:
            self._pending.popleft()

    def _carry_out(self, steps: Sequence[Step], part: bool = False, undoing: bool = False) -> int:
        """_change() of steps that need not be undone by a disk fault.

        `part`: of a desired state. `undoing`: whatever disk and interface say: repair will find
        the interface wrong, and a disk that fails gets a fresh snapshot.
        """
        if self.store.failure and not undoing:
            raise Unavailable("the disk refuses writes: no change is accepted until it works again")
        if self.failures and not undoing:
            for name in {peer.interface for step in steps for peer in step if peer}:
                self._check_usable(name)
        rows = self._rows(steps)
        try:
            self.store.apply(steps)
        except sqlite3.IntegrityError:
            raise Conflict("the key or an address is in use") from None
        parked: list[tuple[str, bytes]] = []
        for interface in self.interfaces.values():
            try:
                parked += self._project(interface, steps, rows)
            except BackendError as error:
                LOG.error("%s", error)
                if undoing:
                    self.failures[interface.subject] = str(error)
                    continue
                self._project_back(steps)
                self.store.revert(steps)
                raise Unavailable("the interface is not usable") from None
        number = self.store.commit(steps, part)
        for name, key in parked:
            self._parked[name][key] = self._parked[name][key]._replace(number=number)
        self._move_addresses(steps)
        return number

    def _project(
        self, interface: Interface, steps: Sequence[Step], rows: Mapping[int, TrafficRow] | None
    ) -> list[tuple[str, bytes]]:
        """Bring an interface from `before` to `after`; returns what was parked: (interface, key).

        What leaves an interface is parked first: without allowed IPs, and with a preshared key
        that no client has, no packet passes and no handshake succeeds, while its last counters
        can still be read. The next reading removes it: see _account(). `rows` has the traffic of
        peers as it was before the steps; without it nothing is parked.
        """
        name = interface.name
        parked: list[tuple[str, bytes]] = []
        changes: list[Change] = []
        for step in steps:
            for change in _interface_changes(step, name):
                if change.peer is None and step.before and rows is not None:
                    parked.append((name, change.public_key))
                    change = self._park(name, change.public_key, rows[step.before.id])
                elif (
                    change.peer
                    and self._parked[name]
                    and not self._unpark(name, change.public_key, step)
                ):
                    changes.append(Change(change.public_key, None))
                changes.append(change)
        if changes:
            if self._touched is not None:
                self._touched.update(change.public_key for change in changes)
            try:
                interface.backend.apply(changes)
            except BackendError:  # what cannot be put back now is taken away by the next reading
                for _, key in parked:
                    self._parked[name][key] = self._parked[name][key]._replace(number=0)
                raise
        return parked

    def _rows(self, steps: Sequence[Step]) -> dict[int, TrafficRow]:
        """What was counted of the peers that the steps change."""
        return {
            step.before.id: self.store.traffic_row(step.before.id) for step in steps if step.before
        }

    def _park(self, name: str, key: bytes, row: TrafficRow) -> Change:
        # Not to be removed before the change is on disk: until then it may have to be undone.
        self._parked[name][key] = Parked(row.id, row.rx_seen, row.tx_seen, MAX_INTEGER)
        return Change(key, WirePeer(key, self._parking_psk, ()))

    def _unpark(self, name: str, key: bytes, step: Step) -> bool:
        """Whether the interface may count on from what it has for this key: it is the same peer.

        Otherwise it must begin anew, so that nothing is counted for two peers, or twice.
        """
        parked = self._parked[name].pop(key, None)
        return parked is None or (
            step.before is not None
            and step.after is not None
            and parked.peer_id == step.after.id
            and step.before.public_key == step.after.public_key
        )

    def _project_back(self, steps: Sequence[Step], counted: bool = False) -> list[Parked]:
        """Put the interfaces back; where that fails too, the next check repairs it.

        Returns what has been counted of those that come back. `counted`: those that go were there
        for long enough to be counted, too.
        """
        inverse = [Step(step.after, step.before) for step in reversed(steps)]
        rows = self._rows(inverse) if counted else None
        back: list[Parked] = []
        for interface in self.interfaces.values():
            back += self._unpark_all(interface.name, steps)
            try:
                for name, key in self._project(interface, inverse, rows):
                    self._parked[name][key] = self._parked[name][key]._replace(number=0)
            except BackendError as error:
                self.failures[interface.subject] = str(error)
        return back

    def _unpark_all(self, name: str, steps: Sequence[Step]) -> Iterator[Parked]:
        for step in steps:
            for change in _interface_changes(step, name):
                if change.peer is None and step.before:
                    parked = self._parked[name].pop(change.public_key, Parked(0, 0, 0, 0))
                    yield parked._replace(peer_id=step.before.id)

    def _move_addresses(self, steps: Sequence[Step]) -> None:
        for before, after in steps:
            gone, come = _addresses(before), _addresses(after)
            if gone == come:
                continue
            for address in gone:
                if address in self._pledged:
                    self._reserved[address] = None
                else:
                    self._pool(address).release(address[2])
            for address in come:
                if address in self._reserved:
                    del self._reserved[address]
                else:
                    self._pool(address).claim(address[2])

    def _pool(self, address: HeldAddress) -> AddressPool:
        interface, family, _ = address
        return self.interfaces[interface].pools[family]

    def _last_pending(self) -> int:
        """What an answer must wait for that depends on the state now."""
        return self._pending[-1][0] if self._pending else 0

    def _settle(self, number: int) -> None:
        """Wait until the change is on disk; outside the lock. Raises Unavailable, undone."""
        try:
            self.store.wait(number)
        except DiskError as error:
            LOG.error("%s", error)
            with self.lock:
                self._undo_pending()
            self._sweep()
            raise Unavailable("the disk refused the change: nothing was changed") from None

    def _undo_pending(self) -> None:
        """After a disk fault: undo, newest first, every change that did not reach the disk.

        Under the lock. When the fault is mended there is nothing to undo: that was done first.
        """
        if not self.store.failure:
            return
        self.store.discard()
        durable = self.store.durable
        while self._pending and self._pending[-1][0] > durable:
            _, steps = self._pending.pop()
            counted = self._project_back(steps, counted=True)
            self.store.undo(steps)
            self.store.set_seen(counted)
            self._move_addresses([Step(s.after, s.before) for s in reversed(steps)])

    # --- AmneziaWG's parameters ------------------------------------------------------------------

    def obfuscated(self) -> Interface:
        """The obfuscated interface. Raises Unavailable when there is none."""
        for interface in self.interfaces.values():
            if interface.obfuscation is not None:
                return interface
        raise Unavailable("obfuscation: this gateway has no obfuscated interface")

    def change_obfuscation(self, wanted: ObfuscationState, confirmed: bool) -> int:
        """Change what the obfuscated interface speaks; returns how many peers that cuts off.

        Clients with the parameters from before then reach nothing. Raises Conflict when there are
        such and it is not confirmed. The lock is held until interface and disk have the change:
        nothing else may be under way when it has to be undone.
        """
        with self._setup, self.lock:
            interface = self.obfuscated()
            self._check_usable(interface.name)
            before = cast(ObfuscationState, interface.obfuscation)
            cut = 0
            if not same_language(before.parameters, wanted.parameters):
                cut = sum(n for (i, _), n in self.store.counts.items() if i == interface.name)
                wanted = wanted._replace(version=before.version + 1)
            else:
                wanted = wanted._replace(version=before.version)
            if cut and not confirmed:
                raise Conflict(
                    f"confirm: {cut} peers will have no connection until they have the new "
                    'parameters: repeat the request with "confirm": true'
                )
            try:
                self.store.flush()
                self._speak(interface, wanted)
                self.store.set_meta("obfuscation", encode_state(wanted))
                self.store.commit_meta("obfuscation", encode_state(wanted))
                self.store.flush()
            except ValueError as error:
                raise Invalid("parameters", str(error)) from None
            except (BackendError, DiskError) as error:
                LOG.error("%s: %s", interface.name, error)
                self._speak_again(interface, before)
                raise Unavailable("the parameters could not be changed") from None
        LOG.info("%s: parameters version %d, %d peers", interface.name, wanted.version, cut)
        return cut

    def _speak(self, interface: Interface, state: ObfuscationState) -> None:
        """Set the interface up for other parameters. Raises BackendError, ValueError."""
        private_key = interface.link.private_key
        link = make_link(interface.settings, private_key, state.parameters)
        interface.backend.setup(link)
        self.interfaces[interface.name] = interface._replace(link=link, obfuscation=state)

    def _speak_again(self, interface: Interface, state: ObfuscationState) -> None:
        """Back to what was before; when that fails, too, the next check repairs it."""
        self.store.set_meta("obfuscation", encode_state(state))
        self.interfaces[interface.name] = interface
        try:
            interface.backend.setup(interface.link)
        except BackendError as error:
            self._fail_unset(interface, str(error))

    # --- desired state: all peers at once, in parts ----------------------------------------------

    def sync(
        self, desired: dict[str, Desired], dry_run: bool, allow_mass_delete: bool
    ) -> DesiredResult:
        """Make the peers those of `desired` (which is consumed), all of it or nothing.

        It is done in parts, so that others get the lock in between. What they change meanwhile
        comes after it: those peers stay as they made them. What they read shows the parts so far.
        When a part fails, those before it are taken back; so does recovery when the end is missing
        in the journal. No snapshot is written meanwhile: it would hold a part. Raises GatewayError.
        """
        with collector_off(), self.store.snapshot_lock:
            try:
                plan = self._plan(desired)
                deleted, total = plan.result.deleted, self.peer_count()
                if deleted * 2 > total and not allow_mass_delete and not dry_run:
                    raise Conflict(
                        f"{deleted} of {total} peers would be deleted: "
                        "that needs allow_mass_delete=true"
                    )
                if not dry_run and (plan.leaving or plan.coming):
                    self._perform(plan)
            finally:
                with self.lock:
                    self._pledged = ()
                    left = [address for address, unused in self._reserved.items() if unused is None]
                    left += reversed(self._reserved)
                self._in_parts(left, self._give_back)
                self._unfinished.clear()
        if any(self._parked.values()):  # what is gone is gone from the interface, too
            with contextlib.suppress(BackendError):  # nothing passes; the next sample tries again
                self.sample()
        return plan.result

    def _plan(self, desired: dict[str, Desired]) -> Plan:
        """Compare with the peers that there are, and find an address for everyone."""
        leaving: list[Step] = []
        wishes: list[Wish] = []
        unchanged = deleted = updated = 0
        with self.lock:
            new_id = self.store.new_id()
        for known in self._all_peers():
            wanted = desired.pop(known.public_key, None)
            if wanted is None:
                if known.id < new_id:  # or it was made since the request came
                    leaving.append(Step(known, None))
                    deleted += 1
                continue
            with _placed(wanted.place):
                after, missing = self._wished(known, wanted.fields)
            if after == known and not missing:
                unchanged += 1
            else:
                wishes.append(Wish(known, after, missing, wanted.place))
                updated += 1
        created = len(desired)
        while desired:
            _, wanted = desired.popitem()
            with _placed(wanted.place):
                wishes.append(Wish(None, *self._wished_new(wanted.fields), wanted.place))
        wishes[updated:] = reversed(wishes[updated:])  # popitem() gave the last one first
        coming = self._find_addresses(wishes, leaving)
        return Plan(leaving, coming, DesiredResult(created, updated, deleted, unchanged))

    def _all_peers(self) -> Iterator[Peer]:
        return self._chunks(lambda after: self.store.peers_after(after, READ_CHUNK))

    def _wished(self, known: Peer, fields: Mapping[str, Any]) -> tuple[Peer, tuple[str, ...]]:
        """A known peer as an element wants it; what the element does not name stays."""
        interface = self.interfaces[known.interface]
        if fields.get("interface", known.interface) != known.interface:
            raise Conflict(f"interface: the peer is on {known.interface}, and peers never move")
        values = {name: value for name, value in fields.items() if name in _SYNC_PLAIN}
        if fields.get("tunnel_traffic"):
            values["tunnel_traffic"] = ",".join(fields["tunnel_traffic"])
        if "preshared_key" in fields:
            values["preshared_key"] = _real_psk(fields["preshared_key"])
        changed = {name: v for name, v in values.items() if v != getattr(known, name)}
        named = [*fields.get("tunnel_traffic", ()), *_PROTOCOLS[fields.get("protocol")]]
        if not changed and not named:  # most of them, most of the time
            return self._with_status(known, fields.get("status")), ()
        self._check_choices({n: changed[n] for n in ("dns", "port") if n in changed}, interface)
        named += [family for family in FAMILIES if ADDRESS_FIELD[family] in changed]
        _had(named, fields, interface)
        after = known._replace(**changed) if changed else known
        missing = tuple(
            family
            for family in FAMILIES
            if family in named and getattr(after, ADDRESS_FIELD[family]) is None
        )
        return self._with_status(after, fields.get("status")), missing

    def _wished_new(self, fields: Mapping[str, Any]) -> tuple[Peer, tuple[str, ...]]:
        """A new peer as an element wants it. Its time may be over: lists show such peers, too."""
        name = fields.get("interface")
        if name is not None and name not in self.interfaces:
            raise Invalid("interface", f"must be one of {', '.join(self.interfaces)}")
        timeless = {name: value for name, value in fields.items() if name != "expires_at"}
        missing: list[str] = []

        def choose(given: Mapping[str, Any], _: Interface, family: str) -> Any:
            if ADDRESS_FIELD[family] not in given:
                missing.append(family)
            return given.get(ADDRESS_FIELD[family])

        peer = self._new_peer(timeless, choose)
        if name not in (None, peer.interface):
            raise Conflict(f"interface: such a peer goes to {peer.interface}")
        peer = peer._replace(id=0, expires_at=fields.get("expires_at"))
        return self._with_status(peer, fields.get("status")), tuple(missing)

    def _with_status(self, peer: Peer, status: str | None) -> Peer:
        """The peer as an element, expiry and quota want it."""
        if status == "suspended":
            reason = peer.status_reason
            if reason is not None:  # it stays what it was suspended for, while that holds
                with self.lock:
                    reason = reason if self._over(peer) == reason else None
            return peer._replace(status="suspended", status_reason=reason)
        if status == "active" and peer.status != "active":
            peer = peer._replace(status="active", status_reason=None)
        if peer.expires_at is None and peer.quota_bytes is None and peer.status_reason is None:
            return peer
        with self.lock:
            return self._judged(peer)

    def _find_addresses(self, wishes: Sequence[Wish], leaving: list[Step]) -> list[Step]:
        """The steps that make the wishes true; addresses that are free are reserved for them.

        Adds to `leaving` the peers that must let go of an address which another one gets.
        """
        freed = dict.fromkeys(a for before, _ in leaving for a in _addresses(before))
        self._pledged = freed
        taken: set[HeldAddress] = set()
        for wish in wishes:
            held, wanted = _addresses(wish.before), _addresses(wish.after)
            freed.update(dict.fromkeys(address for address in held if address not in wanted))
            for address in wanted:
                if address not in held:
                    if address in taken:
                        with _placed(wish.place):
                            raise Invalid(ADDRESS_FIELD[address[1]], "another element has it, too")
                    taken.add(address)

        def reserve(chunk: Sequence[Wish]) -> None:
            for wish in chunk:
                with _placed(wish.place):
                    for address in _addresses(wish.after):
                        if address in taken and address not in freed:
                            self._reserve(address)

        self._in_parts(wishes, reserve)
        spare: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
        for name, family, text in freed:
            if (name, family, text) not in taken:
                spare[name, family].append(text)
        coming: list[Step] = []

        def assign(chunk: Sequence[Wish]) -> None:
            for wish in chunk:
                with _placed(wish.place):
                    coming.append(Step(wish.before, self._completed(wish, spare, taken)))

        self._in_parts(wishes, assign)
        return [self._let_go(step, taken, leaving) for step in coming]

    def _completed(
        self, wish: Wish, spare: Mapping[tuple[str, str], list[str]], taken: set[HeldAddress]
    ) -> Peer:
        """A wish's peer with an address in every family: a free one, else one that is let go of."""
        after = wish.after
        for family in wish.missing:
            text = self.interfaces[after.interface].pools[family].peek()
            if text is not None:
                self._reserve((after.interface, family, text))
            elif spare[after.interface, family]:
                text = spare[after.interface, family].pop()
                taken.add((after.interface, family, text))
            else:
                raise Unavailable(f"the {family} addresses of {after.interface} are exhausted")
            named: dict[str, Any] = {ADDRESS_FIELD[family]: text}
            after = after._replace(**named)
        return after

    def _reserve(self, address: HeldAddress) -> None:
        _, family, text = address
        try:
            self._reserved[address] = self._pool(address).claim(text)
        except ValueError:
            raise Conflict(f"{ADDRESS_FIELD[family]}: {text} is not free") from None

    def _give_back(self, addresses: Sequence[HeldAddress]) -> None:
        """Free what is still reserved of these: what no peer had is the next one again."""
        for address in addresses:
            if address in self._reserved:
                never_used = self._reserved.pop(address)
                if never_used is None:
                    self._pool(address).release(address[2])
                else:
                    self._pool(address).put_back(address[2], never_used)

    @staticmethod
    def _let_go(step: Step, taken: set[HeldAddress], leaving: list[Step]) -> Step:
        """Addresses that peers swap are let go of first: nobody may have one that is held."""
        before, after = step
        if before is None or after is None:
            return step
        lost = [a for a in _addresses(before) if a in taken and a not in _addresses(after)]
        if not lost:
            return step
        nothing: dict[str, Any] = {ADDRESS_FIELD[family]: None for _, family, _ in lost}
        without = before._replace(**nothing)
        leaving.append(Step(before, without))
        return Step(without, after)

    def _perform(self, plan: Plan) -> None:
        """Carry out a plan part by part, or take back what was done of it."""
        with self.lock:
            number = self._last_pending()
        self._settle(number)  # a disk fault undoes nothing from before
        done: list[list[Undo]] = []
        try:
            for steps in (plan.leaving, plan.coming):
                self._in_parts(steps, lambda part: done.append(self._do_part(part)))
            with self.lock:
                number = self.store.end_sync()
            self._settle(number)
            with self.lock:
                self._forget_durable()
        except BaseException:  # a defect of ours, or no memory: all the more
            self._take_back(done)
            raise

    def _in_parts(self, items: Sequence[_T], work: Callable[[Sequence[_T]], None]) -> None:
        """Work on a few at a time under the lock: as many as take HOLD_SECONDS."""
        start, size = 0, MIN_PART
        while start < len(items):
            with self.lock:
                began = time.perf_counter()
                work(items[start : start + size])
                spent = time.perf_counter() - began
            start += size
            size = max(
                MIN_PART, min(MAX_PART, 2 * size, int(size * HOLD_SECONDS / max(spent, 1e-6)))
            )
            time.sleep(BREATH_SECONDS)

    def _do_part(self, steps: Sequence[Step]) -> list[Undo]:
        """Carry out steps upon what their peers are by now. Under the lock."""
        if self._stopping:
            raise Unavailable("the gateway is stopping")
        chosen = [step for step in map(self._upon, steps) if step]
        made = itertools.count(self.store.new_id())
        for place, (before, after) in enumerate(chosen):
            if before is None and after:
                chosen[place] = Step(None, after._replace(id=next(made)))
        entries = self.store.undo_entries(chosen)
        if chosen:
            self._change(chosen, part=True)
            self._unfinished.update(after.id for before, after in chosen if after and not before)
        return entries

    def _upon(self, step: Step) -> Step | None:
        """A step, or what is left of it when others changed its peer meanwhile: their change stays.

        A peer that let go of addresses to get others gets them all the same: see _let_go().
        """
        before, after = step
        if before is None:
            return step if after and self.store.get(after.public_key) is None else None
        now = self.store.by_id(before.id)
        if now == before:
            return step
        if now is None or after is None:
            return None
        come: dict[str, Any] = {
            name: getattr(after, name)
            for name in ADDRESS_FIELD.values()
            if getattr(before, name) is None and getattr(now, name) is None
        }
        given = now._replace(**come)
        return Step(now, given) if given != now else None

    def _take_back(self, done: Sequence[Sequence[Undo]]) -> None:
        """Undo parts, the last one first, and say in the journal that it is over.

        A disk fault undoes what did not reach the disk, parts and others' changes in between them;
        that must come first, because it goes by what they found.
        """
        with self.lock:
            number = self._last_pending()
        with contextlib.suppress(Unavailable):
            self._settle(number)
        for entries in reversed(done):
            traffic: list[TrafficRow] = []
            with self.lock:
                steps: list[Step] = []
                for entry in reversed(entries):
                    back = self.store.taken_back(entry.step)
                    if back is not None:
                        steps.append(back)
                        if entry.traffic and back.before is None:
                            traffic.append(entry.traffic._replace(rx_seen=0, tx_seen=0))
                if steps:
                    self._carry_out(steps, part=True, undoing=True)
                    self.store.write_traffic(traffic)
            time.sleep(BREATH_SECONDS)
        with self.lock:
            number = self.store.end_sync()
        with contextlib.suppress(Unavailable):
            self._settle(number)

    # --- the interface as a projection -----------------------------------------------------------

    @contextlib.contextmanager
    def _watching(self) -> Iterator[set[bytes]]:
        """Collects the keys whose peers change from here on: a dump is stale for those."""
        with self._projection:
            with self.lock:
                touched = self._touched = set()
            try:
                yield touched
            finally:
                with self.lock:
                    self._touched = None

    def reconcile(self, name: str | None = None) -> SyncResult:
        """Bring one interface or all in line with the store; what is right is not touched.

        One that fails does not keep the others from it. Raises BackendError at the end.
        """
        chosen = [i for i in self.interfaces.values() if name in (None, i.name)]
        results = self._each(chosen, self._reconcile)
        return SyncResult(*(sum(column) for column in zip(*results, strict=True)))

    @staticmethod
    def _each(chosen: Iterable[Interface], work: Callable[[Interface], _T]) -> list[_T]:
        """The results for each interface. Raises BackendError after the last one."""
        results: list[_T] = []
        errors: list[str] = []
        for interface in chosen:
            try:
                results.append(work(interface))
            except BackendError as error:
                errors.append(str(error))
        if errors:
            raise BackendError("; ".join(errors))
        return results

    def _fail_unset(self, interface: Interface, reason: str) -> None:
        """Note what is wrong with the interface itself, not only with its peers."""
        self.failures[interface.subject] = reason
        self._unset.add(interface.name)

    def _reconcile(self, interface: Interface) -> SyncResult:
        """Bring the peers in line. Raises BackendError when that failed or is not enough."""
        failure = self.failures.get(interface.subject)
        result = self._bring_in_line(interface)
        with self.lock:  # a new failure may have come up meanwhile: that stays
            if failure is not None and self.failures.get(interface.subject) is failure:
                if interface.name in self._unset:
                    raise BackendError(failure)
                del self.failures[interface.subject]
        return result

    def _bring_in_line(self, interface: Interface) -> SyncResult:
        with self._watching() as touched:
            with self.lock:
                parked = set(self._parked[interface.name])
            states = interface.backend.read()
            self._marks.pop(interface.name, None)
            self._account(interface, states, touched, whole=True)
            actual = {s.peer.public_key: s.peer for s in states if s.peer.public_key not in parked}
            present = len(actual)
            rows = self._chunks(
                lambda after: self.store.wire_rows(interface.name, after, READ_CHUNK)
            )
            plan = list(diff((encode_wire(*row[1:]) for row in rows if row[1]), actual))
            plan.sort(key=lambda entry: entry[0] != "removed")  # an address may have moved
            self._restart_counters([c.public_key for what, c in plan if what == "added"], touched)
            done: collections.Counter[str] = collections.Counter()
            for start in range(0, len(plan), READ_CHUNK // 2):
                with self.lock:
                    chunk = [
                        entry
                        for entry in plan[start : start + READ_CHUNK // 2]
                        if entry[1].public_key not in touched
                    ]
                    interface.backend.apply([change for _, change in chunk])
                done.update(what for what, _ in chunk)
        return SyncResult(
            done["added"],
            done["updated"],
            done["removed"],
            present - done["updated"] - done["removed"],
        )

    def _restart_counters(self, keys: Sequence[bytes], touched: set[bytes]) -> None:
        """Before an interface gets these peers, from which on it counts them from 0.

        On disk first: a crash in between would leave what was counted before, and the new
        counters would be taken for more of the same.
        """
        for start in range(0, len(keys), READ_CHUNK // 2):
            with self.lock:
                chunk = [k for k in keys[start : start + READ_CHUNK // 2] if k not in touched]
                self.store.restart_counters(chunk)
        if keys:
            self.flush()

    def sample(self) -> None:
        """Read every interface's counters into the store. Raises BackendError."""
        try:
            self._each(self.interfaces.values(), self._sample)
        finally:
            self._suspend_over_quota()
            if self.store.durability == "commit":
                self.flush()

    def _sample(self, interface: Interface) -> None:
        with self._watching() as touched:
            states, present = self._read(interface, touched)
            with self.lock:
                wrong = self._looks_wrong(interface.name, present, bool(touched))
                self.store.sweep_online(self.online_since())
            self._rate(interface.name)
            if self.config.privacy_scrub:
                self._scrub(interface, states, touched)
        if wrong:
            self._reconcile(interface)

    def _looks_wrong(self, name: str, present: int, changing: bool) -> bool:
        """Whether an interface has another number of peers than it should. Under the lock.

        While peers were `changing` that says nothing by itself, unless it is so again and again.
        """
        expected = self.store.counts[name, "active"]
        if present == expected:
            if not changing:
                self._doubts[name] = 0
            return False
        self._doubts[name] += 1
        if changing and self._doubts[name] < MAX_DOUBTS:
            return False
        self._doubts[name] = 0
        LOG.warning("%s: %d peers, not %d", name, present, expected)
        return True

    def _scrub(
        self, interface: Interface, states: Sequence[PeerState], touched: set[bytes]
    ) -> None:
        """Make the interface forget where peers are that had no handshake for PRIVACY_SCRUB s.

        Only removing a peer does that; it is added again in the same message. One peer at a time:
        the kernel waits for a grace period in each removal, and requests wait for the lock. The
        counters start again, and have just been sampled. Raises BackendError.
        """
        limit = int(self._clock()) - self.config.privacy_scrub
        before, newborn = self._newborn.get(interface.name, set()), set[bytes]()
        scrubbed = 0
        for peer, last_handshake, *_, located in states:
            if not located or last_handshake > limit:
                continue
            if not last_handshake and peer.public_key not in before:
                newborn.add(peer.public_key)  # it may be in the middle of its first one
                continue
            with self.lock:
                stored = self.store.get(encode_key(peer.public_key))
                current = _projection(stored, interface.name)
                if current != peer or peer.public_key in touched:
                    continue
                try:
                    interface.backend.apply(
                        [Change(peer.public_key, None), Change(peer.public_key, peer)]
                    )
                except BackendError as error:  # it may be gone now: repair puts it back
                    self.failures[interface.subject] = str(error)
                    raise
                self.store.restart_counters([peer.public_key])
                scrubbed += 1
        self._newborn[interface.name] = newborn
        if scrubbed:
            LOG.debug("%s: forgot where %d peers are", interface.name, scrubbed)

    def _read(self, interface: Interface, touched: set[bytes]) -> tuple[Sequence[PeerState], int]:
        """Take one interface's counters, and parked keys off it.

        Returns its peers, without those that are as they were unless PRIVACY_SCRUB looks at them
        all; and how many there are, parked ones not counted.
        """
        with self.lock:
            parked = set(self._parked[interface.name])
            known = set() if self.config.privacy_scrub else self._marks.pop(interface.name, set())
        reading = interface.backend.sample(known)
        states = [state for _, state in reading.changed]
        self._account(interface, states, touched, whole=False)
        with self.lock:  # what was not accounted for is looked at again, and what is parked again
            left_out = touched | parked | self._parked[interface.name].keys()
            reading.same.update(
                mark for mark, s in reading.changed if s.peer.public_key not in left_out
            )
            self._marks[interface.name] = reading.same
        return states, reading.peers - sum(s.peer.public_key in parked for s in states)

    def _account(
        self, interface: Interface, states: Sequence[PeerState], touched: set[bytes], whole: bool
    ) -> None:
        """Add what was counted to the totals, and take parked keys off the interface.

        `touched` are keys that changed while it was read: what was read of them is stale.
        """
        parked = self._parked[interface.name]
        for start in range(0, len(states), READ_CHUNK):
            with self.lock:
                skipped = touched | parked.keys() if parked else touched
                chunk = states[start : start + READ_CHUNK]
                self._tally(
                    interface.name,
                    self.store.sample([s for s in chunk if s.peer.public_key not in skipped]),
                )
        if not parked:
            return
        counted = {s.peer.public_key: s for s in states if s.peer.public_key in parked}
        keys = list(counted if not whole else parked)
        for start in range(0, len(keys), PARKED_CHUNK):
            with self.lock:
                entries = [
                    (key, parked[key], counted.get(key))
                    for key in keys[start : start + PARKED_CHUNK]
                    if key in parked
                    and key not in touched
                    and parked[key].number <= self.store.durable
                ]
                # Removed first: a crash in between loses these bytes rather than counts them twice.
                interface.backend.apply([Change(key, None) for key, _, _ in entries])
                self._tally(interface.name, self.store.sample_parked(entries))
                for key, _, _ in entries:
                    del parked[key]

    def _tally(self, name: str, sampled: Sampled) -> None:
        rx, tx = self._counted.get(name, (0, 0))
        self._counted[name] = (rx + sampled.rx_bytes, tx + sampled.tx_bytes)
        self._over_quota.update(sampled.over_quota)

    def _rate(self, name: str) -> None:
        """Note what was counted between the last two samples of an interface."""
        last, now = self.traffic.get(name), time.monotonic()
        rx, tx = self._counted.get(name, (0, 0))
        seconds = now - last.time if last else 0.0
        if last is None or seconds <= 0:
            self.traffic[name] = InterfaceTraffic(rx, tx, 0.0, 0.0, now)
            return
        rates = ((rx - last.rx_bytes) / seconds, (tx - last.tx_bytes) / seconds)
        self.traffic[name] = InterfaceTraffic(rx, tx, *rates, now)

    def _sweep(self) -> None:
        """Take parked keys off interfaces at once where reading all counters costs little.

        Whoever waits for another one's reading finds that it has done his as well. On larger
        interfaces it is the next sample's work: a request's cost is bounded.
        """
        for name, interface in self.interfaces.items():
            size = self.store.counts[name, "active"] + len(self._parked[name])
            if not self._parked[name] or size > SWEEP_PEERS:
                continue
            try:
                with self._watching() as touched:
                    if self._parked[name]:
                        self._read(interface, touched)
            except BackendError as error:  # nothing passes; the next sample tries again
                LOG.error("%s", error)

    def supervise(self) -> None:
        """Put back an interface that is gone, and what a failed change left behind."""
        for interface in self.interfaces.values():
            try:
                if not interface.backend.alive():
                    LOG.warning("%s: the interface is gone or down: setting it up", interface.name)
                    with self.lock:  # from here on no change is tried
                        self._fail_unset(interface, "it is being set up")
                if interface.subject in self.failures:
                    with self._setup:
                        self._unset.add(interface.name)  # also when it fails halfway
                        interface.backend.setup(self.interfaces[interface.name].link)
                        self._unset.discard(interface.name)
                    LOG.info("%s: %s", interface.name, self._reconcile(interface))
            except BackendError as error:
                self.failures[interface.subject] = str(error)
                LOG.error("%s", error)

    def expire(self) -> None:
        """Suspend every peer whose time has come, and undo that when the clock was set back."""
        for find in (self.store.expired, self.store.not_expired):
            while True:
                with self.lock:
                    peers = find(int(self._clock()), READ_CHUNK)
                if not self._judge(peers):
                    break

    def _suspend_over_quota(self) -> None:
        """Look at those that a sample found; those that could not be suspended come again."""
        with self.lock:
            keys = list(self._over_quota)
            self._over_quota.clear()
        for start in range(0, len(keys), READ_CHUNK):
            chunk = keys[start : start + READ_CHUNK]
            self._judge(self._not_as_judged(chunk))
            left = self._not_as_judged(chunk)
            with self.lock:
                self._over_quota.update(peer.public_key for peer in left)

    def _not_as_judged(self, public_keys: Sequence[str]) -> list[Peer]:
        with self.lock:
            found = [self.store.get(key) for key in public_keys]
            return [peer for peer in found if peer and self._judged(peer) != peer]

    def _find_over_quota(self) -> None:
        """Look at every peer that has a quota: after rows came from elsewhere."""
        after = 0
        while True:
            with self.lock:
                peers = self.store.over_quota(after, READ_CHUNK)
                self._over_quota.update(peer.public_key for peer in peers)
            if not peers:
                return
            after = peers[-1].id

    def _judge(self, peers: Sequence[Peer]) -> int:
        """Suspend or activate those that did not change meanwhile; returns how many."""
        count = number = 0
        for peer in peers:
            with self.lock, contextlib.suppress(GatewayError):
                if self.store.get(peer.public_key) == peer:
                    after = self._judged(peer)
                    if after != peer:
                        number = self._change([Step(peer, after)])
                    count += 1
        with contextlib.suppress(Unavailable):  # undone, and tried again by the next tick
            self._settle(number)
        if count:
            self._sweep()
        return count

    # --- the disk --------------------------------------------------------------------------------

    def snapshot(self) -> None:
        """Write a snapshot if something changed; failures are kept until one succeeds."""
        try:
            if self.store.snapshot(self.lock, self._undo_pending):
                LOG.debug("snapshot written")
            self.failures.pop("snapshot", None)
        except (OSError, DiskError) as error:
            self.failures["snapshot"] = _reason(error)
            LOG.error("snapshot failed: %s", _reason(error))

    def export(self) -> bytes:
        """The whole state as a snapshot file, all of it on disk here; never within a sync()."""
        with self.store.snapshot_lock, self.lock:
            image = self.store.image()
            number = self._last_pending()
        self._settle(number)
        return self.store.seal(image)

    def import_(self, data: bytes) -> int:
        """Replace the whole state by a snapshot file's; returns the number of peers.

        All or nothing in the store; the interface is then brought in line.
        """
        try:
            other = self.store.read_image(data)
        except DamagedError as error:
            raise Malformed(f"the snapshot was refused: {error.found}") from None
        except ConfigError as error:
            raise Malformed(f"the snapshot was refused: {error}") from None
        pools = {
            name: self._make_pools(interface, other) for name, interface in self.interfaces.items()
        }
        for interface in self.interfaces.values():
            if other.get(interface.public_key):
                raise Conflict("the snapshot has this gateway's own key as a peer")
        imported = self._imported_obfuscation(other)
        for name in other.interfaces():
            if name not in self.interfaces:
                raise Conflict(f"the snapshot has peers of {name}, which is not here")
        with self._projection, self.store.snapshot_lock, self.lock:
            if self.store.failure:
                raise Unavailable("the disk refuses writes")
            try:
                self.store.adopt(other)
            except (OSError, DiskError) as error:
                LOG.error("import: %s", _reason(error))
                raise Unavailable("the disk refused the snapshot: nothing was changed") from None
            self._pending.clear()
            self._parked.clear()
            for name, interface in self.interfaces.items():
                self.interfaces[name] = interface._replace(pools=pools[name])
        self._take_over_obfuscation(imported)
        try:
            LOG.info("import: %s", self.reconcile())
            self._find_over_quota()
        except BackendError as error:
            for interface in self.interfaces.values():  # the next check finds out which it is
                self.failures[interface.subject] = str(error)
            raise Unavailable("imported, but the interface is not in line yet") from None
        return self.peer_count()

    def _imported_obfuscation(self, other: Store) -> ObfuscationState | None:
        """What the obfuscated interface will speak; a state without it gets ours. Conflict."""
        for interface in self.interfaces.values():
            if interface.obfuscation is not None:
                state = other.meta("obfuscation")
                if state is None:
                    other.set_meta("obfuscation", encode_state(interface.obfuscation))
                    return interface.obfuscation
                try:
                    make_link(interface.settings, b"", state.parameters)
                except ValueError as error:
                    raise Conflict(f"the snapshot's parameters do not fit here: {error}") from None
                return cast(ObfuscationState, state)
        return None

    def _take_over_obfuscation(self, state: ObfuscationState | None) -> None:
        if state is None:
            return
        with self._setup, self.lock:
            interface = self.obfuscated()
            try:
                self._speak(interface, state)
            except BackendError as error:
                self._fail_unset(interface, str(error))
                link = make_link(interface.settings, interface.link.private_key, state.parameters)
                self.interfaces[interface.name] = interface._replace(link=link, obfuscation=state)

    def heal(self) -> None:
        """After a disk fault keep trying to write a fresh snapshot; end a journal that is long."""
        if (
            self.store.failure
            or "snapshot" in self.failures
            or self.store.journal_bytes > JOURNAL_LIMIT
        ):
            self.snapshot()

    def flush(self) -> None:
        with contextlib.suppress(DiskError):  # seen by the next change, mended by heal()
            self.store.flush()


def _is_create(operation: BatchOperation) -> TypeGuard[tuple[str, Mapping[str, Any]]]:
    return not isinstance(operation, GatewayError) and operation[0] == "create"


def _comes_free(lock: threading.Lock) -> bool:
    """Whether a lock can be had within STOP_SECONDS."""
    free = lock.acquire(timeout=STOP_SECONDS)
    if free:
        lock.release()
    return free


class _placed:  # as a function is named, which it is used as
    """Errors say where in a body they are. Three for each element of a desired state."""

    __slots__ = ("_place",)

    def __init__(self, place: str) -> None:
        self._place = place

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, GatewayError):
            error.detail = f"{self._place}: {error.detail}"


def _had(named: Container[str], fields: Mapping[str, Any], interface: Interface) -> list[str]:
    """The families that are named. Raises Invalid, by the field, when the interface has not one."""
    protocol, traffic = fields.get("protocol"), fields.get("tunnel_traffic")
    families = [family for family in FAMILIES if family in named]
    for family in families:
        if family not in interface.pools:
            blame = "tunnel_traffic" if family in (traffic or ()) else ADDRESS_FIELD[family]
            if blame not in fields or family in _PROTOCOLS[protocol]:
                blame = "protocol"
            raise Invalid(blame, f"{interface.name} has no {family} addresses")
    return families


def _real_psk(preshared_key: str | None) -> str | None:
    return None if preshared_key == NO_KEY else preshared_key


def _interface_changes(step: Step, interface: str) -> Iterator[Change]:
    before = _projection(step.before, interface)
    after = _projection(step.after, interface)
    if before == after:
        return
    if before and (after is None or before.public_key != after.public_key):
        yield Change(before.public_key, None)
    if after:
        yield Change(after.public_key, after)


def _projection(peer: Peer | None, interface: str) -> WirePeer | None:
    if peer is None or peer.status != "active" or peer.interface != interface:
        return None
    return wire_peer(peer)


def _addresses(peer: Peer | None) -> list[HeldAddress]:
    held: list[HeldAddress] = []
    if peer and peer.assigned_ip:
        held.append((peer.interface, "ipv4", peer.assigned_ip))
    if peer and peer.assigned_ipv6:
        held.append((peer.interface, "ipv6", peer.assigned_ipv6))
    return held


def pool_usage(given: Iterable[AddressPool | None]) -> dict[str, Any]:
    """The pools of one family together; the gateway's address is that of the first."""
    pools = [pool for pool in given if pool is not None]
    total, used = sum(pool.total for pool in pools), sum(pool.used for pool in pools)
    return {
        "total": total,
        "used": used,
        "available": total - used,
        "gateway_ip": str(pools[0].gateway) if pools else None,
    }


# ==================================================================================================
# metrics: what the host and the process are doing, counters, Prometheus text
# Never here: decisions.
# ==================================================================================================


class HostMetrics:
    """The host's load, read from /proc. cpu_percent covers the time since the tick before."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._last = (0, 0)
        self.cpu_percent = 0.0
        self.tick()

    def tick(self) -> None:
        """Compare the CPU's counters with those of the last call."""
        values = [int(v) for v in Path("/proc/stat").read_text("ascii").split("\n")[0].split()[1:9]]
        idle, total = values[3] + values[4], sum(values)
        elapsed = total - self._last[1]
        if elapsed > 0:
            self.cpu_percent = round(100 * (1 - (idle - self._last[0]) / elapsed), 1)
        self._last = (idle, total)

    @staticmethod
    def memory() -> dict[str, Any]:
        """Bytes and percent, from /proc/meminfo."""
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        table = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        total, available = table["MemTotal"], table["MemAvailable"]
        used = total - available
        percent = round(100 * used / total, 1)
        return {"total": total, "available": available, "used": used, "percent": percent}

    def disk(self) -> dict[str, Any]:
        """Bytes and percent of the file system that holds the database."""
        total, used, free = shutil.disk_usage(self._directory)
        return {
            "total": total,
            "used": used,
            "free": free,
            "percent": round(100 * used / total, 1) if total else 0.0,
        }

    @staticmethod
    def memory_bytes() -> tuple[int, int]:
        """This process's virtual and resident memory."""
        pages = Path("/proc/self/statm").read_text("ascii").split()[:2]
        size = os.sysconf("SC_PAGE_SIZE")
        return int(pages[0]) * size, int(pages[1]) * size


class RequestMetrics:
    """Counts and durations of requests, by method, route template and status."""

    def __init__(self) -> None:
        self.certificate_expires = 0  # Unix seconds
        self._lock = threading.Lock()
        self._counts: collections.Counter[tuple[str, str, int]] = collections.Counter()
        self._durations: dict[str, Histogram] = collections.defaultdict(Histogram)
        self._callers: collections.Counter[Caller] = collections.Counter()
        self._refused: collections.Counter[str] = collections.Counter()

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        with self._lock:
            self._counts[method, route, status] += 1
            self._durations[route].observe(seconds)

    def signed(self, caller: Caller) -> None:
        """Count an authentic request."""
        with self._lock:
            self._callers[caller] += 1

    def refused(self, reason: str) -> None:
        """Count a failed authentication."""
        with self._lock:
            self._refused[reason] += 1

    def render(self) -> Iterator[str]:
        with self._lock:
            counts = sorted(self._counts.items())
            durations = sorted(self._durations.items())
            callers, refused = sorted(self._callers.items()), sorted(self._refused.items())
        yield from _family(
            ("wggw_http_requests_total", "counter", "Requests answered."),
            ((_labels(method=m, route=r, status=str(s)), count) for (m, r, s), count in counts),
        )
        name = "wggw_http_request_duration_seconds"
        yield from _metric_head(name, "histogram", "From the head's end to the answer's.")
        for route, histogram in durations:
            yield from histogram.render(name, f'route="{route}"')
        yield from _family(
            ("wggw_signed_requests_total", "counter", "Authentic requests by scheme and key id."),
            ((_labels(scheme=c.scheme, key_id=c.key_id), count) for c, count in callers),
        )
        yield from _family(
            ("wggw_auth_failures_total", "counter", "Failed authentications by reason."),
            ((_labels(reason=reason), count) for reason, count in refused),
        )
        name = "wggw_certificate_expiry_timestamp_seconds"
        yield from _family(
            (name, "gauge", "When the TLS certificate expires."), [("", self.certificate_expires)]
        )


def _metric_head(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP {name} {text}\n# TYPE {name} {kind}\n"


def _family(head: tuple[str, str, str], rows: Iterable[tuple[str, float]]) -> Iterator[str]:
    """A metric of (name, type, help) with a line for each (labels, value)."""
    yield from _metric_head(*head)
    for labels, value in rows:
        yield f"{head[0]}{labels} {value}\n"


def _labels(**labels: str) -> str:
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels.items()) + "}"


def render_copy(state: CopyState) -> Iterator[str]:
    """How far the remote copy is behind, as Prometheus text."""
    name = "wggw_remote_copy"
    for suffix, text, value in (
        ("lag_records", "Changes that it lacks.", state.lag_records),
        ("lag_seconds", "Age of the oldest of them.", state.lag_seconds),
        ("failing", "1 when the last upload failed.", int(state.failure is not None)),
    ):
        yield from _family((f"{name}_{suffix}", "gauge", text), [("", value)])


def render_gateway(gateway: Gateway) -> Iterator[str]:
    """The gateway's own figures as Prometheus text."""
    with gateway.lock:
        counts = sorted(gateway.store.counts.items())
        online = gateway.store.online(gateway.online_since())
    yield from _family(
        ("wggw_peers", "gauge", "Peers by interface and state."),
        ((_labels(interface=name, state=state), count) for (name, state), count in counts),
    )
    yield from _render_pools(gateway)
    traffic = sorted(gateway.traffic.items())
    for name, text, field_name in INTERFACE_COUNTERS:
        rows = [(_labels(interface=i), float(getattr(row, field_name))) for i, row in traffic]
        yield from _family((name, "counter", text), rows)
    store = gateway.store
    single: tuple[tuple[str, str, str, float], ...] = (
        ("wggw_peers_online", "gauge", "Peers with a handshake in 180 s.", online),
        ("wggw_degraded", "gauge", "1 when something is wrong.", int(bool(gateway.degraded()))),
        ("wggw_journal_records_total", "counter", "Number of the last record.", store.number),
        ("wggw_journal_bytes", "gauge", "Size of the journal.", store.journal_bytes),
        ("wggw_snapshot_timestamp_seconds", "gauge", "Last snapshot.", store.snapshot_time),
        ("wggw_snapshot_bytes", "gauge", "Size of the last snapshot.", store.snapshot_bytes),
    )
    for *head, value in single:
        yield from _family(cast(tuple[str, str, str], tuple(head)), [("", value)])
    name = "wggw_journal_sync_duration_seconds"
    yield from _metric_head(name, "histogram", "A write to the journal and its fsync.")
    yield from store.journal_syncs.render(name)


# What peers sent and received by interface, as of the last sample; of deleted peers, too.
INTERFACE_COUNTERS = (
    ("wggw_interface_receive_bytes_total", "Bytes received from peers.", "rx_bytes"),
    ("wggw_interface_transmit_bytes_total", "Bytes sent to peers.", "tx_bytes"),
)


def _render_pools(gateway: Gateway) -> Iterator[str]:
    pools = [
        (_labels(interface=interface.name, family=family), pool_usage([pool]))
        for interface in gateway.interfaces.values()
        for family, pool in interface.pools.items()
    ]
    for key, text in (("used", "Addresses held."), ("total", "Addresses that peers can have.")):
        rows = [(labels, float(usage[key])) for labels, usage in pools]
        yield from _family((f"wggw_pool_{key}_addresses", "gauge", text), rows)


PEER_METRICS = (
    ("wggw_peer_receive_bytes_total", "counter", "Bytes received from a peer.", "rx_bytes"),
    ("wggw_peer_transmit_bytes_total", "counter", "Bytes sent to a peer.", "tx_bytes"),
    ("wggw_peer_last_handshake_timestamp_seconds", "gauge", "0: never.", "last_handshake"),
)


def render_peers(gateway: Gateway) -> Iterator[str]:
    """Every peer's traffic, under the beginning of its key."""
    rows: list[tuple[str, Traffic]] = []
    after = 0
    while page := gateway.page(after, READ_CHUNK, Filter()):
        rows += [
            (_labels(interface=peer.interface, key=short_key(peer.public_key)), traffic)
            for peer, traffic in page
        ]
        after = page[-1][0].id
    for name, kind, text, field_name in PEER_METRICS:
        values = ((labels, getattr(traffic, field_name)) for labels, traffic in rows)
        yield from _family((name, kind, text), values)


def render_process(started: float) -> Iterator[str]:
    """The process's figures under the names that Prometheus clients have agreed on."""
    virtual, resident = HostMetrics.memory_bytes()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    single: tuple[tuple[str, str, str, float], ...] = (
        ("process_start_time_seconds", "gauge", "Unix time of the start.", started),
        ("process_cpu_seconds_total", "counter", "User and system.", time.process_time()),
        ("process_resident_memory_bytes", "gauge", "Memory in RAM.", resident),
        ("process_virtual_memory_bytes", "gauge", "Address space.", virtual),
        ("process_open_fds", "gauge", "Open files.", len(os.listdir("/proc/self/fd")) - 1),
        ("process_max_fds", "gauge", "Open files that are allowed.", limit),
        ("process_threads", "gauge", "Threads.", threading.active_count()),
    )
    for *head, value in single:
        yield from _family(cast(tuple[str, str, str], tuple(head)), [("", value)])
    labels = _labels(version=__version__, python_version=PYTHON_VERSION)
    yield from _family(("wggw_build_info", "gauge", "Versions."), [(labels, 1)])


# ==================================================================================================
# http: heads and bodies decoded strictly, the route table, handlers, answers
# Never here: SQL, netlink, rules and sockets.
# ==================================================================================================


class Head(NamedTuple):
    """A request's head. Header names are lower-case bytes; `length` is the body's, in bytes."""

    method: str
    path: str
    query: str
    target: str
    headers: Mapping[bytes, bytes]
    length: int
    keep_alive: bool
    expects_continue: bool

    def __repr__(self) -> str:  # the headers hold signatures and tokens
        return f"Head({self.method}, {self.path})"


class Request(NamedTuple):
    """An authentic request with its body read; `key` is the path's public key, if it has one.

    `query` is decoded by the route's table. `pieces` of a streamed body are read as they come.
    """

    route: ApiRoute
    query: Mapping[str, Any]
    body: bytes
    content_type: bytes
    key: str
    pieces: Iterable[bytes] = ()

    def __repr__(self) -> str:  # the body holds preshared keys
        return f"Request({len(self.body)} bytes)"


class Response(NamedTuple):
    status: int
    body: bytes
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()

    def __repr__(self) -> str:  # the body may hold preshared keys
        return f"Response({self.status}, {len(self.body)} bytes)"


_REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) ([!-~]{1,8192}) HTTP/(\d)\.(\d)")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")
_SINGLE_HEADERS = frozenset(
    (b"content-length", b"host", b"timestamp", b"content-type", b"authorization")
)
_ORIGIN = re.compile(r"https?://([^/?#@]+)(?=[/?]|$)", re.IGNORECASE)


def parse_head(data: bytes) -> Head:
    """A head up to its empty line, without it (RFC 9112). Raises GatewayError.

    Whatever two parsers could read in two ways is refused: it is how requests are smuggled.
    """
    lines = data.split(b"\r\n")
    match = _REQUEST_LINE.fullmatch(lines[0])
    if not match:
        raise Malformed("the request line is malformed")
    if match[3] != b"1" or match[4] not in (b"0", b"1"):
        raise VersionNotSupported("only HTTP/1.1 is spoken here")
    headers = _parse_headers(lines[1:])
    new = match[4] == b"1"
    if new and b"host" not in headers:
        raise Malformed("the Host header is missing")
    length = _body_length(headers)
    connection = headers.get(b"connection", b"").lower()
    keep_alive = b"close" not in connection if new else b"keep-alive" in connection
    target = match[2].decode("ascii")
    if not target.startswith("/"):
        origin = _ORIGIN.match(target)
        if origin:  # its authority counts, whatever Host says (RFC 9112 section 3.2.2)
            headers[b"host"] = origin[1].encode("ascii")
            target = target[origin.end() :]
            target = target if target.startswith("/") else "/" + target
    path, _, query = target.partition("?")
    return Head(
        match[1].decode("ascii"),
        path or "/",
        query,
        target,
        headers,
        length,
        keep_alive,
        new and headers.get(b"expect", b"").lower() == b"100-continue",
    )


def _parse_headers(lines: Sequence[bytes]) -> dict[bytes, bytes]:
    if len(lines) > MAX_HEADERS:
        raise HeadTooLarge(f"more than {MAX_HEADERS} headers")
    headers: dict[bytes, bytes] = {}
    for line in lines:
        match = _HEADER.fullmatch(line)
        if not match:
            raise Malformed("a header is malformed")
        name, value = match[1].lower(), match[2].rstrip(b" \t")
        if name in headers:
            if name in _SINGLE_HEADERS:
                raise Malformed(f"the {name.decode('ascii')} header is repeated")
            value = headers[name] + b", " + value
        headers[name] = value
    return headers


def _body_length(headers: Mapping[bytes, bytes]) -> int:
    length = headers.get(b"content-length")
    if b"transfer-encoding" in headers:
        if length is not None:
            raise Malformed("both Content-Length and Transfer-Encoding")
        raise LengthRequired("Content-Length is required: chunked bodies are not accepted")
    if length is None:
        return 0
    if not re.fullmatch(rb"[0-9]{1,15}", length):
        raise Malformed("Content-Length is malformed")
    return int(length)


def parse_query(query: str) -> dict[str, str]:
    """A query's parameters; the same one twice is refused. Raises Malformed."""
    try:
        pairs = urllib.parse.parse_qsl(
            query, keep_blank_values=True, errors="strict", max_num_fields=32
        )
    except ValueError:
        raise Malformed("the query is malformed") from None
    parameters = dict(pairs)
    if len(parameters) != len(pairs):
        raise Malformed("a query parameter is repeated")
    return parameters


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("duplicate")
    return table


# json.dumps() and loads() with options make one of these in each call.
_JSON_ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)
_JSON_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant)


def decode_json(body: bytes) -> dict[str, Any]:
    """A JSON object, strictly: UTF-8, no duplicate keys, NaN or depth. Raises Malformed."""
    try:
        text = body.decode("utf-8")
        check_depth(text)
        parsed = _JSON_DECODER.decode(text)
    except ValueError:
        raise Malformed("the body is not valid JSON in UTF-8 with unique keys") from None
    if not isinstance(parsed, dict):
        raise Malformed("the body is not a JSON object")
    return parsed


def decode_lines(pieces: Iterable[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A body of JSON objects, one a line: (its place, the object). Raises Malformed, TooLarge."""
    buffer = bytearray()
    number = 0
    for piece in itertools.chain(pieces, (b"\n",)):  # the last line may lack its end
        buffer += piece
        if b"\n" not in piece:
            if len(buffer) > MAX_BODY:
                raise TooLarge(f"line {number + 1}: more than {MAX_BODY} bytes")
            continue
        *lines, rest = bytes(buffer).split(b"\n")
        buffer = bytearray(rest)
        for line in lines:
            number += 1
            if line.strip():
                place = f"line {number}"
                with _placed(place):
                    value = decode_json(line)
                yield place, value


def decode_array(pieces: Iterable[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A body that is a JSON array of objects, decoded one by one: as decode_lines()."""
    body = bytearray()
    for piece in pieces:
        body += piece
        if len(body) > MAX_ARRAY:
            raise TooLarge(f"an array may have {MAX_ARRAY} bytes; application/x-ndjson more")
    try:
        text = body.decode("utf-8")
    except ValueError:
        raise Malformed("the body is not UTF-8") from None
    del body
    position = len(text) - len(text.lstrip(_JSON_SPACES))
    if text[position : position + 1] != "[":
        raise Malformed("the body is not a JSON array")
    number, separator = 0, _JSON_FIRST
    while True:
        found = separator.match(text, position)
        if found is None:
            raise Malformed(f"element {number + 1}: the array is malformed")
        position = found.end()
        if found[0].endswith("]"):
            break
        number += 1
        with _placed(f"element {number}"):
            if json_depth(text, position) > MAX_JSON_DEPTH:
                raise Malformed("nested too deep")
            try:
                value, end = _JSON_DECODER.raw_decode(text, position)
            except ValueError:
                raise Malformed("not valid JSON with unique keys") from None
            if not isinstance(value, dict):
                raise Malformed("not a JSON object")
        yield f"element {number}", value
        position, separator = end, _JSON_NEXT
    if text[position:].strip(_JSON_SPACES):
        raise Malformed("there is something behind the array")


_JSON_SPACES = " \t\r\n"
_JSON_FIRST = re.compile(r"\[[ \t\r\n]*\]?")
_JSON_NEXT = re.compile(r"[ \t\r\n]*(?:,[ \t\r\n]*|\])")


def encode_json(value: Any) -> bytes:
    return _JSON_ENCODER.encode(value).encode("utf-8")


def problem_details(error: GatewayError) -> dict[str, Any]:
    """RFC 9457."""
    return {
        "type": "about:blank",
        "title": HTTPStatus(error.status).phrase,
        "status": error.status,
        "detail": error.detail,
    }


def problem(error: GatewayError) -> Response:
    content = encode_json(problem_details(error))
    return Response(error.status, content, "application/problem+json", error.headers)


def configuration(
    peer: Peer, traffic: Traffic, interface: Interface, config: Config, online_since: int
) -> dict[str, Any]:
    """A peer as the API shows it."""
    families = peer.tunnel_traffic.split(",")
    return {
        "public_key": peer.public_key,
        "status": peer.status,
        "status_reason": peer.status_reason,
        "assigned_ip": peer.assigned_ip,
        "assigned_ipv6": peer.assigned_ipv6,
        "tunnel_traffic": families,
        "allowed_ips": [EVERYWHERE[family] for family in families],
        "dns": peer.dns,
        "dns_servers": list(config.dns_servers.get(peer.dns, ())),
        "port": peer.port,
        "interface": peer.interface,
        "server_public_key": interface.public_key,
        "endpoint": endpoint(config.wg_endpoint, peer.port),
        "mtu": interface.link.mtu,
        "persistent_keepalive": peer.persistent_keepalive,
        "expires_at": None if peer.expires_at is None else rfc3339(peer.expires_at),
        "quota_bytes": peer.quota_bytes,
        "created_at": rfc3339(peer.created_at),
        "request_id": peer.request_id,
        "obfuscation": shown_obfuscation(interface.obfuscation, peer.obfuscation),
        "online": traffic.last_handshake > online_since,
        "last_handshake": rfc3339(traffic.last_handshake) if traffic.last_handshake else None,
        "rx_bytes": traffic.rx_bytes,
        "tx_bytes": traffic.tx_bytes,
    }


# Of a configuration, what is the same for all peers that agree in _kind_of().
_SHARED = (
    "tunnel_traffic",
    "allowed_ips",
    "dns",
    "dns_servers",
    "port",
    "interface",
    "server_public_key",
    "endpoint",
    "mtu",
    "persistent_keepalive",
    "obfuscation",
)


def _kind_of(peer: Peer) -> tuple[Any, ...]:
    return (
        peer.interface,
        peer.tunnel_traffic,
        peer.dns,
        peer.port,
        peer.persistent_keepalive,
        peer.obfuscation,
    )


def encode_configurations(
    rows: Iterable[tuple[Peer, Traffic]],
    show: Callable[[Peer, Traffic], dict[str, Any]],
    online_since: int,
) -> str:
    """A JSON array of what `show`, configuration(), says of each row: in half the time.

    What peers have in common is encoded once; of the rest only request_id may need escapes.
    """
    kinds: dict[tuple[Any, ...], str] = {}
    texts: list[str] = []
    for peer, traffic in rows:
        kind = _kind_of(peer)
        if kind not in kinds:
            shown = show(peer, traffic)
            kinds[kind] = _JSON_ENCODER.encode({name: shown[name] for name in _SHARED})[1:]
        handshake = traffic.last_handshake
        online = "true" if handshake > online_since else "false"
        request_id = peer.request_id
        texts.append(
            f'{{"public_key":"{peer.public_key}","status":"{peer.status}",'
            f'"status_reason":{_quoted(peer.status_reason)},'
            f'"assigned_ip":{_quoted(peer.assigned_ip)},'
            f'"assigned_ipv6":{_quoted(peer.assigned_ipv6)},'
            f'"expires_at":{_quoted_time(peer.expires_at)},'
            f'"quota_bytes":{"null" if peer.quota_bytes is None else peer.quota_bytes},'
            f'"created_at":"{rfc3339(peer.created_at)}",'
            f'"request_id":{"null" if request_id is None else _JSON_ENCODER.encode(request_id)},'
            f'"online":{online},"last_handshake":{_quoted_time(handshake or None)},'
            f'"rx_bytes":{traffic.rx_bytes},"tx_bytes":{traffic.tx_bytes},{kinds[kind]}'
        )
    return f"[{','.join(texts)}]"


def _quoted(text: str | None) -> str:
    """JSON of a text without anything to escape."""
    return "null" if text is None else f'"{text}"'


def _quoted_time(seconds: int | None) -> str:
    return "null" if seconds is None else f'"{rfc3339(seconds)}"'


@functools.lru_cache(maxsize=1024)
def shown_obfuscation(state: ObfuscationState | None, own: str | None) -> dict[str, Any] | None:
    """All that a client of an obfuscated interface needs: what both sides share, its own values,

    and for those that it left open the interface's, as a suggestion. Read only: it is cached.
    """
    if state is None:
        return None
    parameters = state.parameters._replace(**decode_own_values(own or "{}"))
    return {"enabled": True, **show_state(state._replace(parameters=parameters))}


EVERYWHERE = {"ipv4": "0.0.0.0/0", "ipv6": "::/0"}


def endpoint(host: str | None, port: int) -> str | None:
    """host:port as WireGuard writes it, None without a host."""
    if host is None:
        return None
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def awg_quick(shown: Mapping[str, Any]) -> Iterator[str]:
    """AmneziaWG's lines of a configuration file, in its spelling."""
    for name, row in AWG_PARAMETERS.items():
        value = shown.get(name)
        if value is not None and value != "":
            text = str(value).lower() if isinstance(value, bool) else value
            yield f"{row.spelling} = {text}"


def wg_quick(shown: Mapping[str, Any], preshared_key: str | None) -> str:
    """The client's configuration file; the client fills in its own private key."""
    addresses = [
        f"{address}/{length}"
        for address, length in ((shown["assigned_ip"], 32), (shown["assigned_ipv6"], 128))
        if address
    ]
    lines = [
        "[Interface]",
        "PrivateKey = REPLACE_WITH_THE_CLIENT_PRIVATE_KEY",
        f"Address = {', '.join(addresses)}",
        *([f"DNS = {', '.join(shown['dns_servers'])}"] if shown["dns_servers"] else []),
        f"MTU = {shown['mtu']}",
        *awg_quick(shown.get("obfuscation") or {}),
        "",
        "[Peer]",
        f"PublicKey = {shown['server_public_key']}",
        *([f"PresharedKey = {preshared_key}"] if preshared_key else []),
        f"AllowedIPs = {', '.join(shown['allowed_ips'])}",
        f"Endpoint = {shown['endpoint'] or 'GATEWAY:' + str(shown['port'])}",
        f"PersistentKeepalive = {shown['persistent_keepalive']}",
    ]
    return "\n".join(lines) + "\n"


class Operation(NamedTuple):
    """A batch's operation: what is said when it is done, and its fields."""

    said: str
    fields: Mapping[str, Field]


KEY_FIELDS: dict[str, Field] = {"public_key": PUBLIC_KEY_FIELD}

OPERATIONS: dict[str, Operation] = {
    "create": Operation("created", CREATE_FIELDS),
    "delete": Operation("deleted", KEY_FIELDS),
    "suspend": Operation("suspended", KEY_FIELDS),
    "activate": Operation("updated", KEY_FIELDS),
}


def _field_operations(value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) > MAX_BATCH:
        raise ValueError
    return value


BATCH_FIELDS: dict[str, Field] = {
    "operations": Field(
        _field_operations,
        f"a list of at most {MAX_BATCH} operations",
        {
            "type": "array",
            "maxItems": MAX_BATCH,
            "items": {
                "oneOf": [
                    fields_schema({"op": choice_field((op,))._replace(required=True), **row.fields})
                    for op, row in OPERATIONS.items()
                ]
            },
        },
        'each has "op", "public_key" and, where "op" is "create", the fields of create',
        required=True,
    ),
}


def _decode_operation(given: Any) -> tuple[str, Mapping[str, Any]] | GatewayError:
    """One operation of a batch, or what is wrong with it."""
    try:
        if not isinstance(given, dict):
            raise Malformed("the operation is not a JSON object")
        name = given.get("op")
        if not isinstance(name, str) or name not in OPERATIONS:
            raise Invalid("op", f"must be one of {', '.join(OPERATIONS)}")
        if given.get("encrypted_payload") is not None:
            raise Invalid("encrypted_payload", "is not accepted in a batch")
        return name, parse_fields(given, OPERATIONS[name].fields)
    except GatewayError as error:
        return error


Content = Mapping[str, Schema]  # media type -> schema
NO_FIELDS: Mapping[str, Field] = {}


class ApiRoute(NamedTuple):
    """A row of the route table: it decides what is accepted, and describes it in /openapi.json.

    `bodies`: the field tables of which one must fit a JSON body; `media`: bodies that are not one
    JSON object; `answer`: the content of a 200; `errors`: statuses beyond those that the other
    columns entail (see _error_statuses); `guard`: who may call it, a row of GUARDS; `limit`: bytes
    of the body; `streamed`: the handler reads it in pieces.
    """

    method: str
    template: str
    handler: Callable[[App, Request], Response]
    summary: str
    answer: Content
    bodies: tuple[Mapping[str, Field], ...] = ()
    media: Content = {}
    query: Mapping[str, Field] = NO_FIELDS
    errors: tuple[int, ...] = ()
    guard: str = "signed"
    limit: int = MAX_BODY
    streamed: bool = False


class Endpoint(NamedTuple):
    """What a path leads to: the handlers by method."""

    pattern: re.Pattern[str]
    methods: dict[str, ApiRoute]


class Admitted(NamedTuple):
    """A request that may be read on: its head, its route, the key in its path."""

    head: Head
    route: ApiRoute
    key: str


def log_defect(error: BaseException) -> None:
    """A defect of ours: its place is logged, never the values it happened with."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    LOG.error(
        "internal error: %s at line %d", type(error).__name__, trace.tb_lineno if trace else 0
    )


_P = ParamSpec("_P")
_R = TypeVar("_R")


def answering_defects(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make a defect of ours an answer, too: a client never waits for one in vain."""

    @functools.wraps(function)
    def call(*arguments: _P.args, **named: _P.kwargs) -> _R:
        try:
            return function(*arguments, **named)
        except GatewayError:
            raise
        except Exception as error:  # the one boundary at which anything is caught
            log_defect(error)
            raise GatewayError("an internal error; the gateway's log names its place") from None

    return call


class App:
    """Answers requests: admit() from the head alone, then answer() with the body."""

    def __init__(
        self,
        config: Config,
        gateway: Gateway,
        clock: Callable[[], float],
        host: HostMetrics,
    ) -> None:
        self.config = config
        self.gateway = gateway
        self.metrics = RequestMetrics()
        self.copier: Copier | None = None
        self._clock = clock
        self._host = host
        self._started = clock()
        self._authenticator = Authenticator({}, config.max_timestamp_diff, clock)
        self._throttle = Throttle(config.max_auth_failures)
        self._endpoints: dict[str, Endpoint] = {}
        for route in ROUTES:
            pattern = re.compile(re.escape(route.template).replace(r"\{public_key\}", "([^/]+)"))
            row = self._endpoints.setdefault(route.template, Endpoint(pattern, {}))
            row.methods[route.method] = route
        self.reload(config)

    def keep_nonces(self, path: str) -> None:
        """See NonceGuard.keep. Raises StartError."""
        try:
            self._authenticator.nonces.keep(path, int(self._clock()))
        except OSError as error:
            raise StartError(f"DB_PATH: {path!r} cannot be written: {_reason(error)}") from None

    def reload(self, config: Config) -> None:
        """Take over keys and tokens from a new configuration. Raises ConfigError."""
        secret = config.gateway_public_key
        try:
            self._box = PayloadBox(secret) if secret else None
        except ImportError:
            raise ConfigError("GATEWAY_PUBLIC_KEY needs python3-cryptography") from None
        keys = {"default": config.gateway_api_key, **config.gateway_api_keys}
        self._authenticator.reload(keys, config.auth_schemes)
        self._metrics_token = config.metrics_token

    # --- from the head alone ---------------------------------------------------------------------

    @answering_defects
    def admit(self, head: Head, source: str) -> Admitted:
        """Signature first, then path and method, then length. Raises GatewayError."""
        path = head.path[:-1] if head.path.endswith("/") and len(head.path) > 1 else head.path
        if path.startswith("/api/") or path == "/api":
            self._authenticate(head, source)
        row, segment = self._find(path)
        route = row.methods.get("GET" if head.method == "HEAD" else head.method)
        if route is None:
            allowed = [*row.methods, *(["HEAD"] if "GET" in row.methods else [])]
            raise MethodNotAllowed(
                f"allowed here: {', '.join(allowed)}", headers=[("Allow", ", ".join(allowed))]
            )
        if route.guard == "metrics":
            self._check_metrics(head, source)
        if (route.bodies or route.media) and b"content-length" not in head.headers:
            raise LengthRequired("Content-Length is required: this request has a body")
        limit = route.limit if route.guard == "signed" else 0  # nobody unsigned is waited for
        if head.length > limit:
            raise TooLarge(f"the body has {head.length} bytes, {limit} are accepted")
        if route.guard != "open" and not self.gateway.ready:
            raise Unavailable("the gateway is starting", headers=[("Retry-After", "1")])
        key = key_from_path(segment) if segment else ""
        if key is None:
            raise NotFound("the path does not hold a public key")
        return Admitted(head, route, key)

    def _authenticate(self, head: Head, source: str) -> None:
        """The signature first: a right one is never refused for what its address did."""
        host = head.headers.get(b"host", b"").decode("latin-1")
        message = SignedMessage(head.method, host, head.target, head.headers, head.length)
        try:
            caller = self._authenticator.verify(message)
        except Unauthorized as error:
            self._count_failure(error, source)
            raise
        self.metrics.signed(caller)

    def _count_failure(self, error: Unauthorized, source: str) -> None:
        """Raises TooManyRequests when there were too many from there."""
        self.metrics.refused(error.reason)
        wait = self._throttle.fail(source) if error.reason == "signature" else 0
        if wait:
            raise TooManyRequests(
                "too many requests that were not authentic",
                headers=[("Retry-After", str(math.ceil(wait)))],
            ) from None

    def _find(self, path: str) -> tuple[Endpoint, str]:
        row = self._endpoints.get(path)
        if row is not None and "{" not in path:
            return row, ""
        for row in self._endpoints.values():
            match = row.pattern.fullmatch(path)
            if match and match.groups():
                return row, match[1]
        raise NotFound("there is nothing at this path")

    def _check_metrics(self, head: Head, source: str) -> None:
        if self._metrics_token is None:
            if not ipaddress.ip_address(source).is_loopback:
                raise Forbidden("without METRICS_TOKEN only loopback may read the metrics")
            return
        expected = b"Bearer " + self._metrics_token.encode("utf-8")
        if not hmac.compare_digest(expected, head.headers.get(b"authorization", b"")):
            error = Unauthorized(NOT_AUTHENTIC)
            self._count_failure(error, source)
            raise error

    # --- with the body ---------------------------------------------------------------------------

    def answer(self, admitted: Admitted, body: bytes | Iterator[bytes]) -> Response:
        """Run the handler; a GatewayError becomes a problem."""
        try:
            headers = admitted.head.headers
            signed = admitted.route.guard == "signed" and b"signature-input" in headers
            digest = headers.get(b"content-digest")  # of a body that was taken away, too
            whole, pieces = (body, iter(())) if isinstance(body, bytes) else (b"", body)
            if signed and (admitted.head.length or digest):
                if not admitted.route.streamed:
                    self._check_digest(digest_matches(digest or b"", whole))
                pieces = self._digested(digest or b"", pieces)
            query = parse_query(admitted.head.query) if admitted.head.query else {}
            request = Request(
                admitted.route,
                parse_fields(query, admitted.route.query),
                whole,
                headers.get(b"content-type", b""),
                admitted.key,
                pieces,
            )
            return self._run(admitted.route, request)
        except GatewayError as error:
            return problem(error)

    def _check_digest(self, matches: bool) -> None:
        if not matches:
            self.metrics.refused("digest")
            raise Unauthorized("the body does not have the signed Content-Digest", "digest")

    def _digested(self, header: bytes, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """The pieces; the end of a body that was not signed is an error."""
        digest = BodyDigest(header)
        for piece in pieces:
            digest.update(piece)
            yield piece
        self._check_digest(digest.matches())

    @answering_defects
    def _run(self, route: ApiRoute, request: Request) -> Response:
        return route.handler(self, request)

    def _json_body(self, request: Request) -> dict[str, Any]:
        kind = request.content_type.split(b";")[0].strip().lower()
        if kind not in (b"", b"application/json") and not kind.endswith(b"+json"):
            raise UnsupportedMediaType("the body must be application/json")
        return decode_json(request.body)

    def _fields(self, request: Request) -> dict[str, Any]:
        """The body, decoded by the route's table."""
        return parse_fields(self._json_body(request), request.route.bodies[0])

    def _shown(self, peer: Peer, traffic: Traffic) -> dict[str, Any]:
        interface = self.gateway.interfaces[peer.interface]
        return configuration(peer, traffic, interface, self.config, self.gateway.online_since())

    def create(self, request: Request) -> Response:
        body = self._json_body(request)
        if body.get("encrypted_payload") is None:
            return self._create(body)
        sealed = parse_fields(body, SEALED_FIELDS)["encrypted_payload"]
        if self._box is None:
            raise Malformed("encrypted_payload: payload encryption is not set up here")
        opened = self._box.open(sealed)
        try:
            response = self._create({**body, **decode_json(opened)})
        except GatewayError as error:
            response = problem(error)
        content = {"encrypted_response": self._box.seal(response.body)}
        return Response(response.status, encode_json(content), headers=response.headers)

    @answering_defects  # within create(), so that the answer to a sealed request is sealed
    def _create(self, body: Mapping[str, Any]) -> Response:
        fields = parse_fields(body, CREATE_FIELDS)
        return Response(200, encode_json(self._created(self.gateway.create(fields))))

    def _created(self, outcome: Outcome) -> dict[str, Any]:
        shown = self._shown(outcome.peer, outcome.traffic)
        shown["peer_status"] = shown["status"]
        shown["status"] = "created" if outcome.changed else "exists"
        if shown["assigned_ipv6"] is None:
            del shown["assigned_ipv6"]
        return shown

    def batch(self, request: Request) -> Response:
        operations = [_decode_operation(given) for given in self._fields(request)["operations"]]
        results = [
            self._batch_result(operation, result)
            for operation, result in zip(operations, self.gateway.batch(operations), strict=True)
        ]
        return Response(200, encode_json({"results": results}))

    def _batch_result(
        self,
        operation: tuple[str, Mapping[str, Any]] | GatewayError,
        result: Outcome | GatewayError,
    ) -> dict[str, Any]:
        """What the single request would have answered; errors are problems with their status."""
        if isinstance(result, GatewayError):
            return problem_details(result)
        if isinstance(operation, GatewayError):
            return problem_details(operation)
        if operation[0] == "create":
            return self._created(result)
        return {"status": OPERATIONS[operation[0]].said, "public_key": result.peer.public_key}

    def sync(self, request: Request) -> Response:
        kind = request.content_type.split(b";")[0].strip().lower()
        decoders = {b"application/x-ndjson": decode_lines, b"application/json": decode_array}
        if kind not in decoders:
            raise UnsupportedMediaType("the body must be application/x-ndjson or application/json")
        with collector_off():
            return self._sync(request, decoders[kind](request.pieces))

    def _sync(self, request: Request, elements: Iterator[tuple[str, dict[str, Any]]]) -> Response:
        desired: dict[str, Desired] = {}
        for place, element in elements:
            with _placed(place):
                if element.get("encrypted_payload") is not None:
                    raise Invalid("encrypted_payload", "is not accepted in a desired state")
                fields = parse_fields(element, SYNC_FIELDS)
                known = desired.setdefault(fields["public_key"], Desired(place, fields))
                if known.place != place:
                    raise Invalid("public_key", f"it is the one of {known.place}, too")
        dry_run = request.query.get("dry_run", False)
        result = self.gateway.sync(desired, dry_run, request.query.get("allow_mass_delete", False))
        content = {"status": "dry_run" if dry_run else "synced", **result._asdict()}
        return Response(200, encode_json(content))

    def update(self, request: Request) -> Response:
        outcome = self.gateway.update(request.key, self._fields(request))
        return Response(200, encode_json(self._shown(outcome.peer, outcome.traffic)))

    def rotate(self, request: Request) -> Response:
        outcome = self.gateway.rotate(request.key, self._fields(request)["new_public_key"])
        return Response(200, encode_json(self._shown(outcome.peer, outcome.traffic)))

    def list(self, request: Request) -> Response:
        query = request.query
        limit = query.get("limit", DEFAULT_PAGE)
        chosen = Filter(
            query.get("status"),
            self._named_interface(query),
            query.get("online"),
            self.gateway.online_since(),
        )
        rows = self.gateway.page(query.get("cursor", 0), limit + 1, chosen)
        shown = encode_configurations(rows[:limit], self._shown, chosen.online_since)
        cursor = _encode_cursor(rows[limit - 1][0].id) if len(rows) > limit else None
        text = f'{{"configurations":{shown},"next_cursor":{_quoted(cursor)}}}'
        return Response(200, text.encode("utf-8"))

    def get(self, request: Request) -> Response:
        outcome = self.gateway.get(request.key)
        shown = self._shown(outcome.peer, outcome.traffic)
        if request.query.get("format") == "wg-quick":
            text = wg_quick(shown, outcome.peer.preshared_key)
            return Response(200, text.encode("utf-8"), "text/plain; charset=utf-8")
        return Response(200, encode_json(shown))

    def set_status(self, request: Request) -> Response:
        status = self._fields(request)["status"]
        self.gateway.set_status(request.key, status)
        said = "updated" if status == "active" else "suspended"
        return Response(200, encode_json({"status": said}))

    def delete(self, request: Request) -> Response:
        self.gateway.delete(request.key)
        return Response(200, b'{"status":"deleted"}')

    def _named_interface(self, query: Mapping[str, Any]) -> str | None:
        name: str | None = query.get("interface")
        if name is not None and name not in self.gateway.interfaces:
            raise Invalid("interface", f"must be one of {', '.join(self.gateway.interfaces)}")
        return name

    def ip_usage(self, request: Request) -> Response:
        return Response(200, encode_json(self.gateway.usage(self._named_interface(request.query))))

    def obfuscation(self, request: Request) -> Response:
        return Response(200, encode_json(self._obfuscation()))

    def _obfuscation(self) -> dict[str, Any]:
        interface = self.gateway.obfuscated()
        state = cast(ObfuscationState, interface.obfuscation)
        return {
            "interface": interface.name,
            "total_peers": self.gateway.peer_count(None, interface.name),
            "generation": state.generation,
            "parameters_version": state.version,
            "parameters": show_parameters(state.parameters),
        }

    def rotate_obfuscation(self, request: Request) -> Response:
        fields = parse_fields(self._json_body(request), OBFUSCATION_FIELDS)
        wanted = fields.get("parameters")
        if wanted is None:
            try:
                wanted = generate_obfuscation(
                    fields.get("generation", DEFAULT_GENERATION),
                    fields.get("preset", DEFAULT_PRESET),
                )
            except ValueError as error:
                raise Invalid("preset", str(error).removeprefix("preset: ")) from None
        cut = self.gateway.change_obfuscation(wanted, fields.get("confirm", False))
        content = {"status": "rotated", "cut_off_peers": cut, **self._obfuscation()}
        return Response(200, encode_json(content))

    def export(self, request: Request) -> Response:
        return Response(200, self.gateway.export(), "application/octet-stream")

    def import_(self, request: Request) -> Response:
        content = {"status": "imported", "total_peers": self.gateway.import_(request.body)}
        return Response(200, encode_json(content))

    def sync_ips(self, request: Request) -> Response:
        name = self._named_interface(request.query)
        try:
            result = self.gateway.reconcile(name)
        except BackendError as error:
            LOG.error("%s", error)
            raise Unavailable("the interface is not usable") from None
        return Response(200, encode_json({"status": "synced", **result._asdict()}))

    def status(self, request: Request) -> Response:
        degraded = self.gateway.degraded()
        now, store = self._clock(), self.gateway.store
        content = {
            "status": "degraded" if degraded else "healthy",
            "wireguard_peers": self.gateway.online_count(),
            "total_peers": self.gateway.peer_count(),
            "memory_usage": self._host.memory()["percent"],
            "load_average": round(os.getloadavg()[0], 2),
            "timestamp": rfc3339(now),
            "reasons": degraded,
            "remote_copy": self.copier.state()._asdict() if self.copier else None,
            "version": __version__,
            "uptime_seconds": int(now - self._started),
            "python_version": PYTHON_VERSION,
            "certificate_expires_at": rfc3339(self.metrics.certificate_expires),
            "snapshot": {
                "at": rfc3339(store.snapshot_time) if store.snapshot_time else None,
                "bytes": store.snapshot_bytes,
            },
            "journal": {"records": store.number, "bytes": store.journal_bytes},
            "interfaces": [self._interface(i) for i in self.gateway.interfaces.values()],
        }
        return Response(200, encode_json(content))

    def _interface(self, interface: Interface) -> dict[str, Any]:
        traffic = self.gateway.traffic.get(interface.name, InterfaceTraffic())
        return {
            "name": interface.name,
            "backend": interface.backend.kind,
            "public_key": interface.public_key,
            "listen_port": interface.link.listen_port,
            "active_peers": self.gateway.peer_count("active", interface.name),
            "total_peers": self.gateway.peer_count(None, interface.name),
            "parameters_version": interface.obfuscation and interface.obfuscation.version,
            "pools": {family: pool_usage([pool]) for family, pool in interface.pools.items()},
            "rx_bytes": traffic.rx_bytes,
            "tx_bytes": traffic.tx_bytes,
            "rx_bytes_per_second": round(traffic.rx_rate),
            "tx_bytes_per_second": round(traffic.tx_rate),
            "sample_age_seconds": round(max(time.monotonic() - traffic.time, 0.0), 1),
        }

    def server_metrics(self, request: Request) -> Response:
        handshakes = self.gateway.last_handshakes(MAX_PAGE)
        interfaces = self.gateway.interfaces.values()
        content = {
            "system": {
                "cpu_percent": self._host.cpu_percent,
                "memory": self._host.memory(),
                "disk": self._host.disk(),
                "load_average": [round(load, 2) for load in os.getloadavg()],
            },
            "wireguard": {
                "active_peers": self.gateway.peer_count("active"),
                "online_peers": self.gateway.online_count(),
                "total_peers": self.gateway.peer_count(),
                "ip_usage": {f: pool_usage(i.pools.get(f) for i in interfaces) for f in FAMILIES},
                "last_handshakes": {key: rfc3339(when) for key, when in handshakes.items()},
            },
            "timestamp": rfc3339(self._clock()),
        }
        return Response(200, encode_json(content))

    def prometheus(self, request: Request) -> Response:
        parts = [*render_gateway(self.gateway), *self.metrics.render()]
        parts += render_process(self._started)
        if self.copier:
            parts += render_copy(self.copier.state())
        if self.config.per_peer_metrics:
            parts += render_peers(self.gateway)
        text = "".join(parts)
        return Response(200, text.encode("ascii"), "text/plain; version=0.0.4; charset=utf-8")

    def healthz(self, request: Request) -> Response:
        return Response(200, b'{"status":"alive"}')

    def readyz(self, request: Request) -> Response:
        if not self.gateway.ready:
            raise Unavailable(self.gateway.starting, headers=[("Retry-After", "1")])
        reasons = self.gateway.degraded()
        if reasons:
            raise Unavailable("degraded: " + "; ".join(reasons))
        return Response(200, b'{"status":"ready"}')

    def openapi(self, request: Request) -> Response:
        return Response(200, openapi_document())


def _encode_cursor(peer_id: int) -> str:
    return base64.urlsafe_b64encode(b"1:%d" % peer_id).decode("ascii").rstrip("=")


def _query_cursor(text: str) -> int:
    raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    match = re.fullmatch(rb"1:([0-9]{1,18})", raw)
    if not match:
        raise ValueError
    return int(match[1])


def _query_flag(text: str) -> bool:
    return {"true": True, "false": False}[choice_field(("true", "false")).parse(text)]


def _query_limit(text: str) -> int:
    return _integer(1, MAX_PAGE)(text)


INTERFACE_FIELD = Field(_field_text, "the name of an interface", TEXT_SCHEMA)

LIST_QUERY: dict[str, Field] = {
    "limit": Field(
        _query_limit,
        f"a number, 1 to {MAX_PAGE}",
        {"type": "integer", "minimum": 1, "maximum": MAX_PAGE, "default": DEFAULT_PAGE},
    ),
    "cursor": Field(_query_cursor, "the next_cursor of an earlier answer", {"type": "string"}),
    "status": choice_field(STATUSES),
    "online": Field(_query_flag, "true or false", {"type": "boolean"}),
    "interface": INTERFACE_FIELD,
}

# --- the route table, and the answers' schemas ----------------------------------------------------


def json_content(schema: Schema) -> Content:
    return {"application/json": schema}


def component(name: str) -> Schema:
    """A reference to a row of SCHEMAS."""
    return {"$ref": f"#/components/schemas/{name}"}


def answer_schema(**properties: Schema) -> Schema:
    """An object whose properties are always there; more may come in later versions."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def said_schema(*words: str, **more: Schema) -> Schema:
    return answer_schema(status={"type": "string", "enum": list(words)}, **more)


TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
PERCENT: Schema = {"type": "number", "minimum": 0, "maximum": 100}
NUMBER: Schema = {"type": "number", "minimum": 0}
BINARY: Schema = {"type": "string", "contentMediaType": "application/octet-stream"}
STATUS: Schema = {"type": "string", "enum": list(STATUSES)}
IPV4: Schema = {"type": "string", "format": "ipv4"}
IPV6: Schema = {"type": "string", "format": "ipv6"}


def about(schema: Schema, text: str) -> Schema:
    return {**schema, "description": text}


CONFIGURATION: dict[str, Schema] = {
    "public_key": KEY_SCHEMA,
    "status": STATUS,
    "status_reason": about(
        or_null({"type": "string", "enum": ["expired", "quota"]}),
        "why the gateway suspended it; null when it did not",
    ),
    "assigned_ip": or_null(IPV4),
    "assigned_ipv6": or_null(IPV6),
    "tunnel_traffic": about(FAMILIES_SCHEMA, "what the client sends through the tunnel"),
    "allowed_ips": about({"type": "array", "items": TEXT}, "the same, for the client's AllowedIPs"),
    "dns": about(TEXT, "a key of DNS_SERVERS"),
    "dns_servers": about({"type": "array", "items": TEXT}, "the addresses of that choice"),
    "port": about({"type": "integer", "minimum": 1, "maximum": 65535}, "UDP"),
    "interface": TEXT,
    "server_public_key": KEY_SCHEMA,
    "endpoint": about(or_null(TEXT), "WG_ENDPOINT with the port; null when that is not set"),
    "mtu": COUNT,
    "persistent_keepalive": about(COUNT, "seconds, for the client's configuration"),
    "expires_at": or_null(TIME_SCHEMA),
    "quota_bytes": about(or_null(COUNT), "of received and sent bytes together"),
    "created_at": TIME_SCHEMA,
    "request_id": or_null(TEXT),
    "obfuscation": or_null({"type": "object"}),
    "online": about({"type": "boolean"}, f"the last handshake is less than {ONLINE_SECONDS} s ago"),
    "last_handshake": or_null(TIME_SCHEMA),
    "rx_bytes": about(COUNT, "received from the client since the peer was created"),
    "tx_bytes": about(COUNT, "sent to the client"),
}


def created_schema() -> Schema:
    """A configuration as create answers it: without an IPv6 address that there is not."""
    shown: dict[str, Schema] = {
        **CONFIGURATION,
        "status": {"type": "string", "enum": ["created", "exists"]},
        "peer_status": STATUS,
    }
    required = [name for name in shown if name != "assigned_ipv6"]
    return {"type": "object", "properties": {**shown, "assigned_ipv6": IPV6}, "required": required}


SPOKEN: dict[str, Schema] = {
    "interface": TEXT,
    "total_peers": COUNT,
    "generation": {"type": "string", "enum": list(GENERATIONS)},
    "parameters_version": {"type": "integer", "minimum": 1},
    "parameters": {"type": "object"},
}

POOL: dict[str, Schema] = {
    "total": COUNT,
    "used": COUNT,
    "available": COUNT,
    "gateway_ip": or_null(TEXT),
}

SCHEMAS: dict[str, Schema] = {
    "Configuration": answer_schema(**CONFIGURATION),
    "Created": created_schema(),
    "EncryptedResponse": answer_schema(encrypted_response=TEXT),
    "Problem": answer_schema(type=TEXT, title=TEXT, status={"type": "integer"}, detail=TEXT),
    "Usage": answer_schema(**POOL, assigned_ips={"type": "array", "items": TEXT}),
    "Pool": answer_schema(**POOL),
    "Memory": answer_schema(total=COUNT, available=COUNT, used=COUNT, percent=PERCENT),
    "Disk": answer_schema(total=COUNT, free=COUNT, used=COUNT, percent=PERCENT),
    "RemoteCopy": answer_schema(
        number=COUNT, lag_records=COUNT, lag_seconds=NUMBER, failure=or_null(TEXT)
    ),
    "Interface": answer_schema(
        name=TEXT,
        backend=TEXT,
        public_key=KEY_SCHEMA,
        listen_port=COUNT,
        active_peers=COUNT,
        total_peers=COUNT,
        parameters_version=or_null(COUNT),
        pools={"type": "object", "additionalProperties": component("Pool")},
        rx_bytes=COUNT,
        tx_bytes=COUNT,
        rx_bytes_per_second=COUNT,
        tx_bytes_per_second=COUNT,
        sample_age_seconds=NUMBER,
    ),
    "BatchResult": {
        "anyOf": [
            component("Created"),
            said_schema("deleted", "suspended", "updated", public_key=KEY_SCHEMA),
            component("Problem"),
        ]
    },
}

SHOWN = json_content(component("Configuration"))
CONFIGURATIONS_PATH = "/api/v1/configurations"
PEER_PATH = CONFIGURATIONS_PATH + "/{public_key}"

ROUTES: tuple[ApiRoute, ...] = (
    ApiRoute(
        "POST",
        CONFIGURATIONS_PATH,
        App.create,
        "Create a peer. The same public key again answers `exists`, with the same addresses.",
        json_content({"anyOf": [component("Created"), component("EncryptedResponse")]}),
        (CREATE_FIELDS, SEALED_FIELDS),
        errors=(409,),
    ),
    ApiRoute(
        "GET",
        CONFIGURATIONS_PATH,
        App.list,
        "List the peers, a page at a time.",
        json_content(
            answer_schema(
                configurations={"type": "array", "items": component("Configuration")},
                next_cursor=or_null(TEXT),
            )
        ),
        query=LIST_QUERY,
    ),
    ApiRoute(
        "PUT",
        CONFIGURATIONS_PATH,
        App.sync,
        "Make the peers these and no others, all of it or nothing; "
        "what is read meanwhile may show a part of it.",
        json_content(
            said_schema("synced", "dry_run", **dict.fromkeys(DesiredResult._fields, COUNT))
        ),
        media={
            "application/x-ndjson": {"type": "string", "description": "an element a line"},
            **json_content({"type": "array", "items": fields_schema(SYNC_FIELDS)}),
        },
        query=dict.fromkeys(
            ("dry_run", "allow_mass_delete"),
            Field(_query_flag, "true or false", {"type": "boolean"}),
        ),
        errors=(409, 415, 422),
        limit=MAX_LINES,
        streamed=True,
    ),
    ApiRoute(
        "POST",
        CONFIGURATIONS_PATH + "/batch",
        App.batch,
        "Do operations in order, each of them whole or not at all; a result for each.",
        json_content(answer_schema(results={"type": "array", "items": component("BatchResult")})),
        (BATCH_FIELDS,),
        limit=MAX_BATCH * 1024,
    ),
    ApiRoute(
        "GET",
        PEER_PATH,
        App.get,
        "One peer with its live state, or its client's configuration as text.",
        {**SHOWN, "text/plain": TEXT},
        query={"format": choice_field(("json", "wg-quick"))},
    ),
    ApiRoute(
        "PATCH",
        PEER_PATH,
        App.update,
        "Change a peer; null takes away what may be missing.",
        SHOWN,
        (PATCH_FIELDS,),
        errors=(409,),
    ),
    ApiRoute(
        "POST",
        PEER_PATH + "/rotate",
        App.rotate,
        "Give a peer a new key; its addresses stay.",
        SHOWN,
        (ROTATE_FIELDS,),
        errors=(409,),
    ),
    ApiRoute(
        "DELETE",
        PEER_PATH,
        App.delete,
        "Delete a peer; its addresses become free.",
        json_content(said_schema("deleted")),
    ),
    ApiRoute(
        "PUT",
        PEER_PATH + "/status",
        App.set_status,
        "Suspend or activate a peer. Activating answers `updated`.",
        json_content(said_schema("suspended", "updated")),
        (STATUS_FIELDS,),
        errors=(409,),
    ),
    ApiRoute(
        "GET",
        "/api/v1/ip-usage",
        App.ip_usage,
        "Total, used and free addresses of all interfaces together, or of one.",
        json_content(answer_schema(**{family: component("Usage") for family in FAMILIES})),
        query={"interface": INTERFACE_FIELD},
    ),
    ApiRoute(
        "POST",
        "/api/v1/sync-ips",
        App.sync_ips,
        "Compare interfaces and store now, and repair.",
        json_content(said_schema("synced", **dict.fromkeys(SyncResult._fields, COUNT))),
        query={"interface": INTERFACE_FIELD},
    ),
    ApiRoute(
        "GET",
        "/api/v1/server/status",
        App.status,
        "Health, peers online, load.",
        json_content(
            said_schema(
                "healthy",
                "degraded",
                wireguard_peers=COUNT,
                total_peers=COUNT,
                memory_usage=PERCENT,
                load_average=NUMBER,
                timestamp=TIME_SCHEMA,
                reasons={"type": "array", "items": TEXT},
                remote_copy=or_null(component("RemoteCopy")),
                version=TEXT,
                uptime_seconds=COUNT,
                certificate_expires_at=TIME_SCHEMA,
                python_version=TEXT,
                snapshot=answer_schema(at=or_null(TIME_SCHEMA), bytes=COUNT),
                journal=answer_schema(records=COUNT, bytes=COUNT),
                interfaces={"type": "array", "items": component("Interface")},
            )
        ),
    ),
    ApiRoute(
        "GET",
        "/api/v1/server/metrics",
        App.server_metrics,
        "Figures of host and WireGuard.",
        json_content(
            answer_schema(
                system=answer_schema(
                    cpu_percent=PERCENT,
                    memory=component("Memory"),
                    disk=component("Disk"),
                    load_average={"type": "array", "items": NUMBER},
                ),
                wireguard=answer_schema(
                    active_peers=COUNT,
                    online_peers=COUNT,
                    total_peers=COUNT,
                    ip_usage=answer_schema(**{f: component("Pool") for f in FAMILIES}),
                    last_handshakes={"type": "object", "additionalProperties": TIME_SCHEMA},
                ),
                timestamp=TIME_SCHEMA,
            )
        ),
    ),
    ApiRoute(
        "GET",
        "/api/v1/obfuscation",
        App.obfuscation,
        "What the obfuscated interface speaks.",
        json_content(answer_schema(**SPOKEN)),
    ),
    ApiRoute(
        "POST",
        "/api/v1/obfuscation/rotate",
        App.rotate_obfuscation,
        "Change what the obfuscated interface speaks: its clients need new configurations.",
        json_content(said_schema("rotated", cut_off_peers=COUNT, **SPOKEN)),
        (OBFUSCATION_FIELDS,),
        errors=(409,),
    ),
    ApiRoute(
        "GET",
        "/api/v1/snapshot",
        App.export,
        "The whole state as one file, encrypted when SNAPSHOT_KEY is set.",
        {"application/octet-stream": BINARY},
    ),
    ApiRoute(
        "PUT",
        "/api/v1/snapshot",
        App.import_,
        "Replace the whole state by such a file.",
        json_content(said_schema("imported", total_peers=COUNT)),
        media={"application/octet-stream": BINARY},
        errors=(409,),
        limit=MAX_SNAPSHOT,
    ),
    ApiRoute(
        "GET", "/metrics", App.prometheus, "Prometheus text.", {"text/plain": TEXT}, guard="metrics"
    ),
    ApiRoute(
        "GET",
        "/healthz",
        App.healthz,
        "The process is alive.",
        json_content(said_schema("alive")),
        guard="open",
    ),
    ApiRoute(
        "GET",
        "/readyz",
        App.readyz,
        "Ready to serve, or 503 with the reason.",
        json_content(said_schema("ready")),
        errors=(503,),
        guard="open",
    ),
    ApiRoute(
        "GET",
        "/openapi.json",
        App.openapi,
        "This description.",
        json_content({"type": "object"}),
        guard="open",
    ),
)

# --- the API's description (OpenAPI 3.1), made of the tables above --------------------------------


class Guard(NamedTuple):
    """Who may call a route: security requirements, one of them enough, and the refusals."""

    security: Sequence[Mapping[str, Sequence[str]]]
    errors: tuple[int, ...]


GUARDS: dict[str, Guard] = {
    "signed": Guard(
        (
            {"legacySignature": (), "legacyTimestamp": ()},
            {"signatureInput": (), "messageSignature": ()},
        ),
        (401, 429, 503),
    ),
    "metrics": Guard(({"metricsToken": ()}, {}), (401, 403, 429, 503)),
    "open": Guard(({},), ()),
}


def _header_scheme(name: str, description: str) -> Schema:
    return {"type": "apiKey", "in": "header", "name": name, "description": description}


SECURITY_SCHEMES: dict[str, Schema] = {
    "legacySignature": _header_scheme(
        "signature",
        "Hexadecimal HMAC-SHA256, keyed with the text of GATEWAY_API_KEY, of "
        '"timestamp={timestamp}, body_length={bytes of the body}".',
    ),
    "legacyTimestamp": _header_scheme(
        "timestamp", "Unix seconds, within MAX_TIMESTAMP_DIFF of the gateway's clock."
    ),
    "signatureInput": _header_scheme(
        "Signature-Input",
        "RFC 9421. Covered: @method; @target-uri, or @path and, with a query, @query; with a body "
        "content-digest (RFC 9530, sha-256). Parameters: created, nonce and keyid, optionally "
        "expires and alg. A nonce is accepted once.",
    ),
    "messageSignature": _header_scheme("Signature", "RFC 9421, algorithm hmac-sha256."),
    "metricsToken": {
        "type": "http",
        "scheme": "bearer",
        "description": "METRICS_TOKEN. Where it is not set, only loopback may read the metrics.",
    },
}

# What a caller should know of a status beyond its name.
ERROR_TEXTS: dict[int, str] = {
    400: "Malformed: the request cannot be understood.",
    401: "Not authentic. With a right signature, `detail` gives the server's time.",
    403: "The source may not do this.",
    404: "There is no peer with this key, or nothing at this path.",
    408: "The request did not arrive in time.",
    409: "In conflict with the state: an address or a key is taken, a peer has expired.",
    411: "A body without Content-Length.",
    413: "The body is longer than what is accepted here.",
    415: "The body has another media type.",
    422: "A value is not accepted; `detail` begins with the field's name.",
    429: "Too many failures or too many signatures: see Retry-After.",
    431: "The head of the request is too large.",
    503: "Addresses are exhausted, interface or disk are not usable, or it is starting.",
}
ERROR_HEADERS: dict[int, dict[str, Schema]] = {
    status: {"Retry-After": {"schema": COUNT, "description": "seconds"}} for status in (429, 503)
}


def _error_statuses(route: ApiRoute) -> list[int]:
    """The errors that a route can answer: what its columns entail, and what its row adds."""
    statuses = {400, 408, 411, 413, 431, *GUARDS[route.guard].errors, *route.errors}
    statuses |= {404} if "{" in route.template else set()
    statuses |= {415} if route.bodies else set()
    statuses |= {422} if route.bodies or route.query else set()
    return sorted(statuses)


def _parameters(route: ApiRoute) -> Iterator[Schema]:
    if "{" in route.template:
        yield {"$ref": "#/components/parameters/public_key"}
    for name, row in route.query.items():
        text = row.description
        yield {"name": name, "in": "query", "description": text, "schema": row.schema}


def _request_body(route: ApiRoute) -> Schema:
    tables = [fields_schema(table) for table in route.bodies]
    json_body = json_content(tables[0] if len(tables) == 1 else {"anyOf": tables}) if tables else {}
    content = {kind: {"schema": schema} for kind, schema in {**json_body, **route.media}.items()}
    text = f"At most {route.limit} bytes."
    return {"required": True, "description": text, "content": content}


def _responses(route: ApiRoute) -> dict[str, Schema]:
    content = {kind: {"schema": schema} for kind, schema in route.answer.items()}
    responses: dict[str, Schema] = {"200": {"description": "Done.", "content": content}}
    sealed = "Sealed" if SEALED_FIELDS in route.bodies else ""
    for status in _error_statuses(route):
        responses[str(status)] = {"$ref": f"#/components/responses/{sealed}Error{status}"}
    return responses


def _error_response(status: int, sealed: bool) -> Schema:
    content = {"application/problem+json": {"schema": component("Problem")}}
    if sealed:
        content |= {"application/json": {"schema": component("EncryptedResponse")}}
    headers = {"headers": ERROR_HEADERS[status]} if status in ERROR_HEADERS else {}
    return {"description": ERROR_TEXTS[status], "content": content, **headers}


def describe_route(route: ApiRoute) -> Schema:
    """A row of the route table as an Operation Object."""
    parameters = list(_parameters(route))
    return {
        "operationId": route.handler.__name__.strip("_"),
        "summary": route.summary,
        "security": GUARDS[route.guard].security,
        **({"parameters": parameters} if parameters else {}),
        **({"requestBody": _request_body(route)} if route.bodies or route.media else {}),
        "responses": _responses(route),
    }


def describe_api() -> Schema:
    """ROUTES as an OpenAPI 3.1 document."""
    paths: dict[str, dict[str, Schema]] = {}
    for route in ROUTES:
        paths.setdefault(route.template, {})[route.method.lower()] = describe_route(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "wggw",
            "version": __version__,
            "summary": "A WireGuard gateway's API for the backend of a VPN provider.",
            "description": "JSON in UTF-8 over HTTPS. A trailing slash makes no difference, HEAD "
            "is GET without the body, unknown fields are ignored. Errors are RFC 9457 problems; a "
            "request that failed has changed nothing. A create request with `encrypted_payload` "
            "is answered by an `encrypted_response`, errors after decryption included.",
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "parameters": {
                "public_key": {
                    "name": "public_key",
                    "in": "path",
                    "required": True,
                    "description": "base64 with / as _ and + as -, or percent-encoded; the final "
                    "= may be missing",
                    "schema": {
                        "type": "string",
                        "pattern": "^[A-Za-z0-9+/_-]{42}[AEIMQUYcgkosw048]=?$",
                    },
                }
            },
            "responses": {
                f"{'Sealed' if sealed else ''}Error{status}": _error_response(status, sealed)
                for sealed in (False, True)
                for status in ERROR_TEXTS
            },
            "securitySchemes": SECURITY_SCHEMES,
        },
    }


@functools.cache
def openapi_document() -> bytes:
    """The description as JSON; it is the same for as long as the process runs."""
    return encode_json(describe_api())


def render_response(response: Response, keep_alive: bool, head_only: bool, date: str) -> bytes:
    """Head and body in one piece: one write, one packet."""
    phrase = http.client.responses[response.status]
    extra = "".join(f"{name}: {value}\r\n" for name, value in response.headers)
    connection = "" if keep_alive else "Connection: close\r\n"
    head = (
        f"HTTP/1.1 {response.status} {phrase}\r\nDate: {date}\r\n"
        f"Content-Type: {response.content_type}\r\nContent-Length: {len(response.body)}\r\n"
        f"Cache-Control: no-store\r\n{extra}{connection}\r\n"
    ).encode("ascii")
    return head if head_only else head + response.body


# ==================================================================================================
# server: connections with TLS, deadlines and a cap; timers, signals, start and stop
# Never here: routes.
# ==================================================================================================


class ConnectionClosed(Exception):
    """The other side is gone, or its time is up: nothing more can be said to it."""


class Connection(BaseHTTPRequestHandler):
    """One client's connection: TLS, then requests one after the other, each with deadlines.

    http.server's own reading of requests is not used: it has no deadlines, believes ambiguous
    heads, and costs more than all the rest.
    """

    server: Server
    busy = False  # between a request's head and the end of its answer
    trusted = False  # whether an authentic request came over it

    def setup(self) -> None:
        self._socket: ssl.SSLSocket = self.request  # a plain one until _handshake()
        self._source = self.server.source(self.client_address)
        self.group = address_group(self._source)
        self._buffer = bytearray()
        self._deadline = 0.0
        self._unread = False  # whether input was left behind that nobody will read

    def handle(self) -> None:
        try:
            if not self.server.enter(self):
                return
            self._handshake()
            while not self.server.closing and self._serve():
                pass
        except (ConnectionClosed, OSError):  # ssl.SSLError is one
            pass

    def finish(self) -> None:
        try:
            if self._unread:
                self._linger()
            with contextlib.suppress(OSError):
                self._socket.close()
        finally:
            self.server.leave(self)

    def cut(self) -> None:
        """End a connection from another thread: its read returns at once.

        The answer to an authentic request is not cut off; one that a stranger does not read is.
        """
        strange = self.busy and not self.trusted
        with contextlib.suppress(OSError):
            how = socket.SHUT_RDWR if strange else socket.SHUT_RD
            socket.socket.shutdown(self._socket, how)

    def _handshake(self) -> None:
        """In this thread and with a deadline: a silent client must not stall accept."""
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.settimeout(HANDSHAKE_DEADLINE)
        self._socket = self.server.tls.wrap_socket(
            self._socket, server_side=True, do_handshake_on_connect=False
        )
        self._socket.do_handshake()
        # From here on waiting is poll()'s business: a timeout of the socket's would cost a system
        # call whenever it is set, and a read in vain in front of every wait.
        self._socket.setblocking(False)
        self._readable = select.poll()
        self._readable.register(self._socket, select.POLLIN)

    def _serve(self) -> bool:
        """Read and answer one request; returns whether another one may follow."""
        keep_alive = head_only = False
        method, route = "-", "-"
        started = time.perf_counter()
        try:
            data = self._read_head()
            if data is None:
                return False
            self.busy = True
            started = time.perf_counter()
            head = parse_head(data)
            head_only = head.method == "HEAD"
            method = head.method
            self._unread = head.length > 0
            admitted = self.server.app.admit(head, self._source)
            route = admitted.route.template
            self.trusted = self.trusted or admitted.route.guard in ("signed", "metrics")
            body: bytes | Iterator[bytes]
            if admitted.route.streamed:
                body = self._read_pieces(head)
            else:
                body = self._read_body(head)
                self._unread = False
            response = self.server.app.answer(admitted, body)
            keep_alive = head.keep_alive and not self._unread
        except GatewayError as error:
            response = problem(error)
            # What was not understood or not read would turn into the next request.
            keep_alive = method != "-" and not self._unread and head.keep_alive
            self._unread = not keep_alive
        keep_alive = keep_alive and not self.server.closing
        self.server.touch(self)  # before: who has the answer may count on it
        self._send(render_response(response, keep_alive, head_only, self.server.date()))
        self.busy = False
        self.server.report(method, route, response.status, time.perf_counter() - started)
        return keep_alive

    def _read_head(self) -> bytes | None:
        """The bytes up to the empty line, None when the connection ends between two requests."""
        buffer = self._buffer
        self._deadline = time.monotonic() + IDLE_DEADLINE
        waiting = True  # for a head to begin: empty lines do not
        while True:
            while buffer.startswith(b"\r\n"):  # RFC 9112 section 2.2
                del buffer[:2]
            if waiting and buffer:
                waiting = False
                self._deadline = time.monotonic() + HEAD_DEADLINE
            end = buffer.find(b"\r\n\r\n")
            if end > MAX_HEAD or (end < 0 and len(buffer) > MAX_HEAD):
                raise HeadTooLarge(f"the head has more than {MAX_HEAD} bytes")
            if end >= 0:
                data = bytes(buffer[:end])
                del buffer[: end + 4]
                return data
            try:
                self._receive()
            except TimeoutError:
                if waiting:
                    return None
                raise Timeout("the head did not arrive in time") from None
            except ConnectionClosed:
                return None

    def _ask_for_body(self, head: Head) -> None:
        """RFC 9110 section 10.1.1: unless it is there already."""
        if head.expects_continue and len(self._buffer) < head.length:
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _read_pieces(self, head: Head) -> Iterator[bytes]:
        """The body as it comes. Raises GatewayError when it does not come to its end."""
        self._ask_for_body(head)
        self._deadline = time.monotonic() + BODY_DEADLINE + head.length / BODY_RATE
        left = head.length
        while left:
            if not self._buffer:
                try:
                    self._receive()
                except TimeoutError:
                    raise Timeout("the body did not arrive in time") from None
                except (ConnectionClosed, OSError):
                    raise Malformed("the body ended early") from None
            piece = bytes(self._buffer[:left])
            del self._buffer[:left]
            left -= len(piece)
            yield piece
        self._unread = False

    def _read_body(self, head: Head) -> bytes:
        buffer = self._buffer
        if len(buffer) < head.length:
            self._ask_for_body(head)
            self._deadline = time.monotonic() + BODY_DEADLINE
            try:
                while len(buffer) < head.length:
                    self._receive()
            except TimeoutError:
                raise Timeout("the body did not arrive in time") from None
        body = bytes(buffer[: head.length])
        del buffer[: head.length]
        return body

    def _receive(self) -> None:
        """Add what has arrived to the buffer; waits up to the deadline. Raises TimeoutError."""
        while True:
            remaining = self._deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            if self._socket.pending() or self._readable.poll(remaining * 1000 + 1):
                with contextlib.suppress(ssl.SSLWantReadError):  # a part of a record
                    data = self._socket.recv(RECEIVE_BYTES)
                    break
        if not data:
            raise ConnectionClosed
        self._buffer += data

    def _send(self, data: bytes) -> None:
        """Write all of it; each piece within the deadline. Raises TimeoutError, OSError."""
        view = memoryview(data)
        while view:
            view = view[self._send_piece(view[:SEND_BYTES]) :]

    def _send_piece(self, piece: memoryview) -> int:
        deadline = time.monotonic() + WRITE_DEADLINE
        while True:
            try:
                return self._socket.send(piece)
            except ssl.SSLWantWriteError:  # OpenSSL wants the same piece again
                writable = select.poll()
                writable.register(self._socket, select.POLLOUT)
                remaining = deadline - time.monotonic()
                if remaining <= 0 or not writable.poll(remaining * 1000 + 1):
                    raise TimeoutError from None

    def _linger(self) -> None:
        """Close for writing and throw away what still comes, so that the answer is not reset."""
        deadline = time.monotonic() + LINGER_SECONDS
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            while (remaining := deadline - time.monotonic()) > 0:
                self._socket.settimeout(remaining)
                if not self._socket.recv(65536):
                    return


class AccessLog(threading.Thread):
    """The log's lines of answered requests, written some at a time by a thread of its own.

    A LogRecord costs more than all of a request's JSON, and a write in each request lets go of
    Python's lock that others wait for. A KILL loses the lines of the last LOG_DELAY.
    """

    def __init__(self) -> None:
        super().__init__(name="access log", daemon=True)
        self._lines: collections.deque[str] = collections.deque(maxlen=MAX_LOG_LINES)
        self._waiting = threading.Event()
        self._write_lock = threading.Lock()

    def add(self, text: str) -> None:
        self._lines.append(f"{rfc3339(time.time())} INFO {text}\n")
        if not self._waiting.is_set():
            self._waiting.set()

    def run(self) -> None:
        while self._waiting.wait():
            time.sleep(LOG_DELAY)
            self.flush()

    def flush(self) -> None:
        """Write what waits; a log that cannot be written stops nobody."""
        self._waiting.clear()
        with self._write_lock:
            text = "".join([self._lines.popleft() for _ in range(len(self._lines))])
            with contextlib.suppress(OSError, ValueError):  # ValueError: it was closed
                sys.stderr.write(text)
                sys.stderr.flush()


class Newcomer:
    """A connection whose thread has not begun yet: it is in line like one that does nothing."""

    busy = trusted = False

    def __init__(self, request: socket.socket, group: str) -> None:
        self._request, self.group = request, group

    def cut(self) -> None:
        with contextlib.suppress(OSError):
            self._request.shutdown(socket.SHUT_RDWR)


class Server(ThreadingHTTPServer):
    """Accepts connections, a thread each; when there are too many one goes: see _idlest()."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 512

    def __init__(self, config: Config, app: App, tls: ssl.SSLContext) -> None:
        address = ipaddress.ip_address(config.api_host)
        self.address_family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        self.app = app
        self.tls = tls
        self.closing = False
        self.allowed = config.allowed_backends
        self._limit = min(config.max_connections, raise_file_limit(config.max_connections))
        self._address_limit = config.max_connections_per_address
        self._lock = threading.Lock()
        # Least recently active first. By the accepted socket: it is there before the thread is.
        self._connections: dict[socket.socket, Connection | Newcomer] = {}
        self._open = 0
        self._open_from: collections.Counter[str] = collections.Counter()  # by address group
        self._date = (0, "")
        self.access_log = AccessLog()
        try:
            super().__init__((config.api_host, config.api_port), Connection)
        except OSError as error:
            raise StartError(
                f"API_HOST, API_PORT: cannot listen on {config.api_host} port "
                f"{config.api_port}: {_reason(error)}"
            ) from None
        self.access_log.start()

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # A restart must not wait for old connections to time out; HTTPServer would ask DNS.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def get_request(self) -> Any:
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.05)  # or accept would be tried again at once, and for ever
            raise

    @staticmethod
    def source(client_address: Any) -> str:
        """The client's address as text; IPv4 also where it came in over an IPv6 socket."""
        address = ipaddress.ip_address(client_address[0].partition("%")[0])
        mapped = getattr(address, "ipv4_mapped", None)
        return str(mapped or address)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Cut off strangers before TLS."""
        if not self.allowed:
            return True
        address = ipaddress.ip_address(self.source(client_address))
        return address.is_loopback or any(
            address.version == network.version and address in network for network in self.allowed
        )

    def process_request(self, request: Any, client_address: Any) -> None:
        group = address_group(self.source(client_address))
        with self._lock:
            self._open += 1
            self._open_from[group] += 1
            greedy = self._open_from[group] > self._address_limit
            crowded = greedy or self._open > self._limit
            idle = self._idlest(group if greedy else None) if crowded else None
            gone = self._connections.pop(idle) if idle else None
            self._connections[request] = Newcomer(request, group)
        if gone is not None:
            gone.cut()
        try:
            if crowded and gone is None:
                raise RuntimeError("too many connections, and none of them idle")
            super().process_request(request, client_address)
        except RuntimeError as error:  # also: no thread can be started
            LOG.warning("a connection was refused: %s", error)
            with self._lock:
                self._connections.pop(request, None)
                self._closed(group)
            self.shutdown_request(request)

    def _idlest(self, group: str | None) -> socket.socket | None:
        """The least recently active connection (of an address), one without a signature first.

        Only an authentic request in work protects its connection.
        """
        found = None
        for request, connection in self._connections.items():
            if group in (None, connection.group):
                if not connection.trusted:
                    return request
                if not connection.busy:
                    found = found or request
        return found

    def _closed(self, group: str) -> None:
        self._open -= 1
        self._open_from[group] -= 1
        if not self._open_from[group]:
            del self._open_from[group]

    def handle_error(self, request: Any, client_address: Any) -> None:
        log_defect(sys.exc_info()[1] or RuntimeError())

    def enter(self, connection: Connection) -> bool:
        """Take the newcomer's place; False when another one has it already."""
        with self._lock:
            waiting = connection.request in self._connections
            if waiting:
                self._connections[connection.request] = connection
        return waiting

    def touch(self, connection: Connection) -> None:
        """Move a connection to the end of the line of idle ones."""
        with self._lock:
            if self._connections.pop(connection.request, None):
                self._connections[connection.request] = connection

    def leave(self, connection: Connection) -> None:
        with self._lock:
            self._connections.pop(connection.request, None)
            self._closed(connection.group)

    def date(self) -> str:
        now = int(time.time())
        if self._date[0] != now:
            self._date = (now, email.utils.formatdate(now, usegmt=True))
        return self._date[1]

    def report(self, method: str, route: str, status: int, seconds: float) -> None:
        known = method if method in ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD") else "other"
        self.app.metrics.observe(known, route, status, seconds)
        level = logging.DEBUG if route == "/healthz" else logging.INFO  # asked every few seconds
        if LOG.isEnabledFor(level):
            self.access_log.add(f"{known} {route} {status} {seconds * 1000:.1f} ms")

    def drain(self) -> None:
        """Stop accepting, let requests in flight finish, end what is idle."""
        self.closing = True
        self.shutdown()
        self.server_close()
        started = time.monotonic()
        while time.monotonic() < started + DRAIN_SECONDS:
            with self._lock:
                connections = list(self._connections.values())
            if not connections:
                return
            for connection in connections:
                # A request may have arrived that its thread did not come to read yet.
                if not connection.busy and time.monotonic() > started + DRAIN_GRACE:
                    connection.cut()
            time.sleep(0.01)


def hide_memory() -> None:
    """No core dump, no debugger of the same user: keys are in this memory (prctl(2)).

    A limit on core files alone would not stop a dump that the kernel pipes into a program.
    """
    import ctypes

    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0):
        LOG.warning("core dumps cannot be switched off: %s", os.strerror(ctypes.get_errno()))


def raise_file_limit(connections: int) -> int:
    """Ask for enough open files; returns how many connections there is room for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * connections + RESERVED_FILES  # a lingering connection beside each new one
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return connections if soft == resource.RLIM_INFINITY else max(8, soft - RESERVED_FILES)


class Timer(threading.Thread):
    """Runs jobs, each at its interval in seconds, one after the other, until stop()."""

    def __init__(self, name: str, jobs: Sequence[tuple[float, Callable[[], None]]]) -> None:
        super().__init__(name=name, daemon=True)
        self._jobs = jobs
        self._stop_event = threading.Event()

    def run(self) -> None:
        due = [time.monotonic() + interval for interval, _ in self._jobs]
        while not self._stop_event.wait(max(0.0, min(due) - time.monotonic())):
            for i, (interval, job) in enumerate(self._jobs):
                if due[i] <= time.monotonic():
                    due[i] = time.monotonic() + interval
                    try:
                        job()
                    except (BackendError, DiskError, OSError) as error:
                        LOG.error("%s: %s", self.name, error)
                    except Exception as error:  # a defect must not end all jobs for good
                        log_defect(error)

    def stop(self) -> None:
        """No further job begins."""
        self._stop_event.set()


def stop_timers(timers: Sequence[Timer]) -> None:
    """Jobs that hang are left behind."""
    for timer in timers:
        timer.stop()
    deadline = time.monotonic() + STOP_SECONDS
    for timer in timers:
        timer.join(max(0.0, deadline - time.monotonic()))


def in_child(job: Callable[[], None]) -> None:
    """Run a job in a child process. Raises ImportError or OSError as the job does.

    What it imports goes with the child: the cryptography package, needed once to make a
    certificate, would otherwise hold 15 MB for as long as the gateway lives.
    """
    if threading.active_count() > 1:  # another thread may hold a lock that no child ever gets
        job()
        return
    child = os.fork()
    if child == 0:
        code = 1
        try:
            job()
            code = 0
        except ImportError:
            code = NO_MODULE
        except OSError as error:
            code = error.errno or errno.EIO
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == NO_MODULE:
        raise ImportError
    if code:
        raise OSError(code, os.strerror(code) if code > 0 else "ended by a signal")


def make_tls(config: Config) -> tuple[ssl.SSLContext, int]:
    """The server's TLS context and when its certificate expires (Unix seconds).

    Makes a self-signed pair when there is none. Raises ConfigError.
    """
    cert, key = config.tls_cert, config.tls_key
    if not os.path.exists(cert) and not os.path.exists(key):
        names = ["localhost", "127.0.0.1", "::1", socket.gethostname()]
        names.append((config.wg_endpoint or "").strip("[]"))
        try:
            usable = [name for name in names if re.fullmatch(r"[A-Za-z0-9.:-]{1,253}", name)]
            in_child(lambda: make_certificate(cert, key, usable))
        except ImportError:
            raise ConfigError(
                f"TLS_CERT {cert!r} does not exist, and making one needs python3-cryptography"
            ) from None
        except OSError as error:
            raise ConfigError(f"TLS_CERT {cert!r} cannot be made: {_reason(error)}") from None
        LOG.info("made a self-signed certificate: %s", cert)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
    try:
        check_private("TLS_KEY", key)
        context.load_cert_chain(cert, key, password="")  # never ask on a terminal
        certificate = read_certificate(cert)
        expires = certificate_expiry(certificate)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"TLS_CERT {cert!r}, TLS_KEY {key!r}: not usable PEM files: {_reason(error)}"
        ) from None
    if config.tls_client_ca:
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(config.tls_client_ca)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"TLS_CLIENT_CA {config.tls_client_ca!r}: not a usable PEM file: {_reason(error)}"
            ) from None
    LOG.info("certificate SHA-256 fingerprint %s", hashlib.sha256(certificate).hexdigest())
    if expires < time.time() + EXPIRY_WARNING:
        LOG.warning("the certificate expires at %s", rfc3339(expires))
    return context, expires


def set_up_logging(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    formatter = logging.Formatter(
        "%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%SZ"
    )
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    LOG.addHandler(handler)
    LOG.setLevel(level.upper())
    logging.logThreads = logging.logProcesses = False


def open_store(config: Config) -> Store:
    vault = Vault(config.snapshot_key) if config.snapshot_key else None
    if vault and importlib.util.find_spec("cryptography") is None:
        raise ConfigError("SNAPSHOT_KEY needs python3-cryptography")
    return Store(config.db_path, config.durability, Disk(), vault)


def load_whole(config: Config) -> tuple[Store, JournalFile | None]:
    """Read the files, again while a gateway that runs replaces them one after the other."""
    for _ in range(CHECK_TRIES):
        store = open_store(config)
        before = store.generation()
        try:
            return store, store.load()
        except DamagedError:
            if store.generation() == before:
                raise
    raise StartError(f"{config.db_path}: the files changed too often to be read together")


def lock_database(path: str) -> None:
    """Keep a second gateway off the same files, for as long as the process lives. StartError."""
    try:
        handle = os.open(path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StartError(f"DB_PATH {path!r} is in use by another gateway") from None
    except OSError as error:
        raise StartError(f"DB_PATH {path!r} cannot be written: {_reason(error)}") from None


class Manager:
    """systemd, when it started this process (sd_notify(3)): hears how the service is.

    `watchdog` is the time in seconds within which it wants to hear WATCHDOG=1, None for never.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._path = environ.get("NOTIFY_SOCKET", "")
        period = environ.get("WATCHDOG_USEC", "")
        mine = environ.get("WATCHDOG_PID") in (None, str(os.getpid()))
        self.watchdog = (
            int(period) / 1e6 if mine and re.fullmatch("[1-9][0-9]{0,17}", period) else None
        )

    def tell(self, *assignments: str) -> None:
        """Send READY=1 and the like; nothing happens when nobody listens."""
        if not self._path:
            return
        text = "\n".join(" ".join(line.split()) for line in assignments)
        name = "\0" + self._path[1:] if self._path.startswith("@") else self._path
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.settimeout(MANAGER_SECONDS)
            out.sendto(text.encode("utf-8", "replace"), name)


def loopback_of(host: str) -> tuple[str, str]:
    """(where a service on `host` is asked from this machine, the source address to ask from)."""
    home = "::1" if ":" in host else "127.0.0.1"
    return (home if ipaddress.ip_address(host).is_unspecified else host), home


def check_answers(server: Server, gateway: Gateway) -> None:
    """Ask the service for its health over TLS, as a backend would; take and give its lock.

    Raises OSError when it does not answer within PROBE_SECONDS.
    """
    host, home = loopback_of(str(server.server_address[0]))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # it is this very process
    address = (host, server.server_address[1])
    with socket.create_connection(address, PROBE_SECONDS, (home, 0)) as plain:
        try:
            with context.wrap_socket(plain) as connection:
                connection.sendall(
                    b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
                )
                answer = connection.recv(64)
        except ssl.SSLError as error:  # TLS_CLIENT_CA: it wants a certificate, and has said so
            answer = b"HTTP/1.1 200" if error.reason == "TLSV13_ALERT_CERTIFICATE_REQUIRED" else b""
    if not answer.startswith(b"HTTP/1.1 200"):
        raise OSError("the service does not answer its own health check")
    if not gateway.lock.acquire(timeout=PROBE_SECONDS):
        raise OSError("the service's lock is held for too long")
    gateway.lock.release()


class Service:
    """The whole of it: builds the parts, runs until SIGTERM, reloads on SIGHUP."""

    def __init__(self, load: Callable[[], Config]) -> None:
        self._load = load
        self._config = load()
        self._manager = Manager(os.environ)
        # The kernel may give a signal to any thread: only a byte in a socket surely wakes this one.
        self._signals, self._wake = socket.socketpair()
        self._wake.setblocking(False)

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT; returns the exit code. Raises StartError."""
        config = self._config
        set_up_logging(config.log_level)
        hide_memory()
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        threading.stack_size(512 * 1024)  # bytes; a thread per connection
        sys.setswitchinterval(SWITCH_INTERVAL)
        gc.set_threshold(COLLECT_AFTER, 10, 10)
        store = open_store(config)
        gateway = Gateway(config, store, time.time)
        host = HostMetrics(os.path.dirname(config.db_path) or ".")
        app = App(config, gateway, time.time, host)
        tls, app.metrics.certificate_expires = make_tls(config)
        server = Server(config, app, tls)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        lock_database(config.db_path)
        app.keep_nonces(config.db_path + ".nonces")
        with collector_off():
            if not self._recover(config, gateway, app):
                return 0
            self._bring_up(config, gateway)
        timers = self._start_timers(config, gateway, host)
        if app.copier:
            timers.append(Timer("remote copy", [(COPY_INTERVAL, app.copier.tick)]))
            timers[-1].start()
        if self._manager.watchdog:
            job = (self._manager.watchdog / 4, lambda: self._watch(server, gateway))
            timers.append(Timer("watchdog", [job]))
            timers[-1].start()
        bytes(LARGEST_BLOCK)  # see warm_up()
        gc.freeze()  # what is there now stays: the collector need not look at it
        LOG.info("ready on %s port %d", config.api_host, config.api_port)
        self._manager.tell("READY=1", self._state(gateway))
        self._wait(server, app)
        self._manager.tell("STOPPING=1", "STATUS=stopping")
        server.drain()
        server.access_log.flush()
        stop_timers(timers)
        gateway.close()
        if app.copier:
            app.copier.finish(STOP_SECONDS)
        store.close()
        LOG.info("stopped")
        return 0

    def _bring_up(self, config: Config, gateway: Gateway) -> None:
        """The interfaces, in line with what was recovered."""
        rows = interface_settings(config)
        keys = [decode_key(gateway.store.private_keys[row.name]) for row in rows]
        obfuscation = self._obfuscation(config, gateway.store)
        links = [self._link(*pair, obfuscation) for pair in zip(rows, keys, strict=True)]
        backends = [self._open(config, link) for link in links]
        gateway.start(list(zip(rows, links, backends, strict=True)), obfuscation)

    def _recover(self, config: Config, gateway: Gateway, app: App) -> bool:
        """What the store holds, from here or from the copy; False when SIGTERM came first."""
        store = gateway.store
        current = store.load()
        remote = open_object_store(config, time.time)
        if remote:
            app.copier = Copier(remote, store, time.time, gateway.snapshot)
            if not self._boot_from(app.copier, gateway, config.snapshot_required):
                return False
        for row in interface_settings(config):  # before the first snapshot, which holds the keys
            self._load_key(row, store)
        store.begin(current)
        if app.copier:
            app.copier.begin()
        return True

    def _boot_from(self, copier: Copier, gateway: Gateway, required: bool) -> bool:
        """Wait until the copy was looked at; False when SIGTERM came first.

        Raises whatever ended the look: without it, nothing is known of the copy.
        """
        errors: list[BaseException] = []

        def boot() -> None:
            try:
                self._ask_copy(copier, gateway, required)
            except BaseException as error:
                errors.append(error)
            finally:
                self._wake.send(b"\0")

        threading.Thread(target=boot, daemon=True).start()
        while (number := self._signals.recv(1)[0]) == signal.SIGHUP:
            LOG.info("nothing is reloaded while the gateway starts")
        for error in errors:
            raise error
        return number == 0

    def _ask_copy(self, copier: Copier, gateway: Gateway, required: bool) -> None:
        """Ask until the copy has been read, or it may be missing and does not answer."""
        pause = 1.0
        while True:
            try:
                copier.boot()
                return
            except CopyError as error:
                gateway.starting = f"waiting for the remote copy: {error}"
                self._manager.tell(f"STATUS={gateway.starting}", "EXTEND_TIMEOUT_USEC=300000000")
                if not required and not isinstance(error, CopyDamaged):
                    LOG.warning("remote copy: %s; SNAPSHOT_REQUIRED=false: starting without", error)
                    return
                LOG.error("remote copy: %s; next try in %.0f s", error, pause)
            time.sleep(pause)
            pause = min(2 * pause, COPY_MAX_PAUSE / 2)

    @staticmethod
    def _load_key(settings: InterfaceSettings, store: Store) -> None:
        """Tell the store the interface's key, for encrypted snapshots. Raises ConfigError."""
        kept = store.private_keys.get(settings.name)
        known = sum(n for (name, _), n in store.counts.items() if name == settings.name)
        if known and not kept and not os.path.exists(settings.private_key_file):
            LOG.warning(
                "%s: there are %d peers, but the private key that their configurations belong to "
                "is gone: put it into %s, or none of them will connect",
                settings.name,
                known,
                settings.private_key_file,
            )
        store.private_keys[settings.name] = encode_key(load_private_key(settings, kept))

    @staticmethod
    def _obfuscation(config: Config, store: Store) -> ObfuscationState | None:
        if config.awg_interface is None:
            return None
        try:
            return initial_obfuscation(config.awg_params, store, config.awg_interface)
        except DiskError as error:
            raise StartError(str(error)) from None

    @staticmethod
    def _link(row: InterfaceSettings, key: bytes, obfuscation: ObfuscationState | None) -> Link:
        spoken = obfuscation.parameters if obfuscation and row.prefix == AWG_PREFIX else None
        try:
            return make_link(row, key, spoken)
        except ValueError as error:
            raise ConfigError(f"AWG_PARAMS: {error}") from None

    @staticmethod
    def _open(config: Config, link: Link) -> Backend:
        if config.wg_backend == "memory":
            LOG.warning("WG_BACKEND=memory: there is NO interface, no packet will ever pass")
        try:
            return open_backend(config.wg_backend, link)
        except BackendError as error:
            raise StartError(f"WG_BACKEND {config.wg_backend}: {error}") from None

    @staticmethod
    def _start_timers(config: Config, gateway: Gateway, host: HostMetrics) -> list[Timer]:
        projection = [
            (SUPERVISE_SECONDS, gateway.supervise),
            (config.sample_interval, gateway.sample),
            (SUPERVISE_SECONDS, host.tick),
        ]
        disk = [(config.snapshot_interval, gateway.snapshot), (SUPERVISE_SECONDS, gateway.heal)]
        if config.durability == "interval":
            disk.append((DURABILITY_INTERVAL, gateway.flush))
        # Expiry has a thread of its own: reading 60,000 counters may take longer than a second.
        expiry = [(SUPERVISE_SECONDS / 2, gateway.expire)]
        timers = [Timer("interface", projection), Timer("disk", disk), Timer("expiry", expiry)]
        for timer in timers:
            timer.start()
        return timers

    def _state(self, gateway: Gateway) -> str:
        """What `systemctl status` shows of a service that is up."""
        interfaces = ", ".join(f"{i.name} ({i.backend.kind})" for i in gateway.interfaces.values())
        wrong = "; ".join(gateway.degraded())
        return f"STATUS={f'degraded: {wrong}' if wrong else 'serving'}: {interfaces}"

    def _watch(self, server: Server, gateway: Gateway) -> None:
        """Tell systemd that all is well only when it is. Raises OSError."""
        check_answers(server, gateway)
        self._manager.tell("WATCHDOG=1", self._state(gateway))

    def _wait(self, server: Server, app: App) -> None:
        while (number := self._signals.recv(1)[0]) == signal.SIGHUP:
            self._manager.tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
            try:
                config = self._load()
                tls, expires = make_tls(config)
                app.reload(config)
            except StartError as error:
                LOG.error("reload refused, the old settings stay: %s", error)
                self._manager.tell("READY=1", f"STATUS=reload refused: {error}")
                continue
            server.tls, server.allowed = tls, config.allowed_backends
            app.metrics.certificate_expires = expires
            LOG.info("reloaded keys, allowlist and certificate")
            self._manager.tell("READY=1", "STATUS=serving: reloaded")
        LOG.info("%s: stopping", signal.Signals(number).name)


# ==================================================================================================
# doctor: what can be wrong with a gateway on this host, one finding for each thing looked at
# Never here: repairs. It changes nothing.
# ==================================================================================================


def look_at_all(config: Config, ask: Callable[[], tuple[int, bytes]]) -> Iterator[Finding]:
    """Everything that `wggw doctor` looks at; `ask` is a signed request for server/status."""
    tunnels = interface_settings(config)
    if config.wg_backend == "memory":
        yield Finding("WG_BACKEND", "memory: no interface, no packet passes", "set it to auto")
    else:
        yield from look_at_network(config, tunnels)
        yield from (_look_at_kind(tunnel) for tunnel in tunnels)
        yield from (_look_at_port(tunnel) for tunnel in tunnels)
    yield look_at_certificate(config, time.time())
    yield _look_at_clock()
    yield _look_at_database(config)
    yield from look_at_answer(ask)


def _look_at_kind(tunnel: InterfaceSettings) -> Finding:
    """Who does the tunnel's work: the kernel or a program."""
    kind = LINK_KINDS[tunnel.prefix]
    netlink = NetlinkSocket(NETLINK_GENERIC)
    try:
        if genl_family(netlink, kind) is not None:
            return Finding("kernel module", f"{kind} is there")
    except BackendError as error:
        return Finding("kernel module", f"{kind}: {error}", "see the kernel's log", True)
    finally:
        netlink.close()
    program = PROGRAMS[kind]
    if tool(program):
        return Finding("kernel module", f"{kind} is missing; {program} does its work")
    return Finding("kernel module", f"{kind} is missing", f"load it, or install {program}", True)


def _look_at_port(tunnel: InterfaceSettings) -> Finding:
    """Whether something listens on the UDP port: a second socket cannot be bound to it."""
    port = tunnel.ports[0]
    for family, every in ((socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")):  # noqa: S104
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.bind((every, port))
            break
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return Finding("UDP port", f"{port} is in use, as it should be")
            if error.errno != errno.EAFNOSUPPORT:  # a kernel without IPv6
                return Finding("UDP port", f"{port}: {_reason(error)}")
    return Finding("UDP port", f"nothing listens on {port}", "start the gateway", True)


def look_at_certificate(config: Config, now: float) -> Finding:
    """The certificate and how long it is good for."""
    path = config.tls_cert
    try:
        expires = certificate_expiry(read_certificate(path))
    except (OSError, ValueError) as error:
        todo = "start the gateway, which makes one, or give TLS_CERT and TLS_KEY"
        return Finding("certificate", f"{path}: {_reason(error)}", todo, True)
    text = f"{path} is good until {rfc3339(expires)}"
    if expires < now:
        return Finding("certificate", f"{path} expired at {rfc3339(expires)}", "renew it", True)
    return Finding("certificate", text, "renew it" if expires < now + EXPIRY_WARNING else "")


def _look_at_clock() -> Finding:
    """What the kernel says of its clock: adjtimex(2) through timedatectl, where there is one."""
    try:
        shown = run_tool("timedatectl", "show", "-P", "NTPSynchronized").strip()
    except BackendError:
        return Finding("clock", f"{rfc3339(time.time())}; nothing here says whether it is right")
    todo = "" if shown == "yes" else "run an NTP client: signatures hold the time"
    text = f"{rfc3339(time.time())}, {'synchronised' if shown == 'yes' else 'not synchronised'}"
    return Finding("clock", text, todo)


def _look_at_database(config: Config) -> Finding:
    """Snapshot and journal, read as `wggw check` reads them."""
    try:
        store, _ = load_whole(config)
    except StartError as error:
        return Finding("database", str(error), "wggw check --repair", True)
    except OSError as error:
        return Finding("database", f"{config.db_path}: {_reason(error)}", "run as root", True)
    if not store.snapshot_time:
        return Finding("database", f"{config.db_path}: there is none", "start the gateway", True)
    return Finding(
        "database",
        f"{config.db_path}: good, {sum(store.counts.values())} peers, record {store.number}",
    )


def look_at_answer(ask: Callable[[], tuple[int, bytes]]) -> Iterator[Finding]:
    """Whether the gateway answers a signed request, and what it says of itself."""
    try:
        status, body = ask()
        answer = json.loads(body)
        reasons = "; ".join(answer["reasons"]) if status == 200 else answer["detail"]
        copy = answer.get("remote_copy")
        lag = (copy["lag_records"], copy["lag_seconds"], copy["failure"]) if copy else None
    except (StartError, ValueError, KeyError, TypeError) as error:
        yield Finding("API", str(error), "start the gateway: systemctl status wggw", True)
        return
    if reasons:
        yield Finding("API", f"status {status}: {reasons}", "see the gateway's log", True)
    else:
        yield Finding("API", f"answers: {answer['status']}, {answer['total_peers']} peers")
    if lag is None:
        return
    records, seconds, failure = lag
    text = f"{records} records and {seconds} s behind"
    if failure:
        todo = "see that the store of SNAPSHOT_URL is reachable and accepts its credentials"
        yield Finding("remote copy", f"{text}: {failure}", todo, True)
    else:
        yield Finding("remote copy", text)


# ==================================================================================================
# command line: a table of subcommands
# Never here: logic.
# ==================================================================================================

INSTALLED_SETTINGS = "/etc/wggw/wggw.env"  # as install.sh writes it


class ApiClient:
    """Signed calls to a gateway whose certificate has a known fingerprint."""

    def __init__(self, url: str, key_id: str, secret: str, fingerprint: str, scheme: str) -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            if parts.scheme != "https" or not parts.hostname:
                raise ValueError
            self._host, self._port = parts.hostname, parts.port or 443
        except ValueError:
            raise StartError(f"{url!r} is not an https URL") from None
        self._key_id, self._secret, self._scheme = key_id, secret, scheme
        self._fingerprint = fingerprint.replace(":", "").lower()

    def call(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """(status, body) of one request. Raises StartError when no answer can be trusted.

        Within the second of its start a gateway accepts no RFC 9421 signature, says when it will,
        and is asked once more then.
        """
        status, content, wait = self._call(method, path, body)
        if status == HTTPStatus.UNAUTHORIZED and wait:
            time.sleep(min(wait, MAX_CLIENT_WAIT))
            status, content, _ = self._call(method, path, body)
        return status, content

    def _call(self, method: str, path: str, body: bytes) -> tuple[int, bytes, int]:
        """(status, body, seconds of Retry-After or 0)."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # the fingerprint says more than a name
        connection = http.client.HTTPSConnection(
            self._host, self._port, timeout=60, context=context
        )
        try:
            connection.connect()
            certificate = cast(ssl.SSLSocket, connection.sock).getpeercert(True) or b""
            if hashlib.sha256(certificate).hexdigest() != self._fingerprint:
                raise StartError(f"{self._host}: the certificate has another fingerprint")
            connection.request(method, path, body or None, self._headers(method, path, body))
            response = connection.getresponse()
            wait = response.headers.get("Retry-After", "")
            return response.status, response.read(), int(wait) if wait.isdecimal() else 0
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise StartError(f"{self._host} port {self._port}: {_reason(error)}") from None
        finally:
            connection.close()

    def _headers(self, method: str, path: str, body: bytes) -> dict[str, str]:
        now = int(time.time())
        headers = {"Content-Type": "application/json"} if body else {}
        if self._scheme == "legacy":
            signature = sign_legacy(self._secret, now, len(body))
            return {**headers, "signature": signature, "timestamp": str(now)}
        digest = base64.b64encode(hashlib.sha256(body).digest()).decode("ascii")
        headers["Content-Digest"] = f"sha-256=:{digest}:"
        named = {k.lower().encode("ascii"): v.encode("ascii") for k, v in headers.items()}
        host = f"[{self._host}]" if ":" in self._host else self._host
        authority = host if self._port == 443 else f"{host}:{self._port}"
        message = SignedMessage(method, authority, path, named, len(body))
        nonce = secrets.token_hex(16)
        given, mac = sign_rfc9421(self._key_id, self._secret, message, now, nonce)
        return {**headers, "Signature-Input": given, "Signature": mac}


def config_of(arguments: argparse.Namespace, signs: bool = True) -> Config:
    """The settings of a command's host. Raises ConfigError.

    `signs`: it needs GATEWAY_API_KEY, unless it is given another key.
    """
    named = [getattr(arguments, name, None) for name in ("key_file", "url", "fingerprint")]
    path = arguments.env_file
    if not path and not all(named):
        path = installed_settings(os.environ)
    return load_config(os.environ, path, signs and not named[0])


def installed_settings(environ: Mapping[str, str]) -> str | None:
    """The file of the gateway that is installed here, unless something here is about another one.

    A file that is there but cannot be read is named all the same: load_config says why.
    """
    own = {setting.name for setting in SETTINGS if not setting.name.startswith("AWS_")}
    if own & environ.keys() or os.path.exists(".env"):
        return None
    try:
        os.stat(INSTALLED_SETTINGS)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        pass
    return INSTALLED_SETTINGS


def client_of(config: Config, arguments: argparse.Namespace) -> ApiClient:
    """A client of this host's gateway, or of the one that the arguments name."""
    address = ipaddress.ip_address(config.api_host)
    host = config.api_host
    if address.is_unspecified:
        host = "127.0.0.1" if address.version == 4 else "::1"
    if ":" in host:
        host = f"[{host}]"
    url = arguments.url or f"https://{host}:{config.api_port}"
    secret = config.gateway_api_key
    try:
        if arguments.key_file:
            check_private("--key-file", arguments.key_file)
            secret = Path(arguments.key_file).read_text("utf-8").strip()
        fingerprint = arguments.fingerprint or certificate_fingerprint(config.tls_cert)
    except (OSError, ValueError) as error:
        raise StartError(f"--key-file or TLS_CERT: {_reason(error)}") from None
    scheme = arguments.scheme or config.auth_schemes[0]
    return ApiClient(url, arguments.key_id, secret, fingerprint, scheme)


def read_data(given: str | None) -> bytes:
    """--data: a text, @FILE, or @- for standard input."""
    if given is None:
        return b""
    if not given.startswith("@"):
        return given.encode("utf-8")
    try:
        return sys.stdin.buffer.read() if given == "@-" else Path(given[1:]).read_bytes()
    except OSError as error:
        raise StartError(f"--data {given}: {_reason(error)}") from None


def command_serve(arguments: argparse.Namespace) -> int:
    return Service(lambda: load_config(os.environ, arguments.env_file)).run()


def command_call(arguments: argparse.Namespace) -> int:
    client = client_of(config_of(arguments), arguments)
    data = read_data(arguments.data)
    with Progress(f"{arguments.method} {arguments.path}"):
        status, body = client.call(arguments.method, arguments.path, data)
    sys.stdout.buffer.write(body + (b"" if body.endswith(b"\n") else b"\n"))
    if status >= 400:
        print(f"wggw: status {status}", file=sys.stderr)
    return int(status >= 400)


class Progress:
    """Says on a terminal that something goes on, from its first second to its end."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._shown = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._shown:
            sys.stderr.write("\r" + " " * (len(self._text) + 12) + "\r")
            sys.stderr.flush()

    def _run(self) -> None:
        started = time.monotonic()
        while not self._ended.wait(1.0):
            self._shown = True
            sys.stderr.write(f"\r{self._text}: {time.monotonic() - started:.0f} s")
            sys.stderr.flush()


class Screen(NamedTuple):
    """What a terminal can show. width 0: no terminal, lines are never cut."""

    width: int
    height: int
    colour: bool

    @classmethod
    def of(cls, file: Any, environ: Mapping[str, str]) -> Screen:
        if not file.isatty():
            return cls(0, 0, False)
        size = shutil.get_terminal_size()
        plain = environ.get("NO_COLOR") or environ.get("TERM") == "dumb"
        return cls(size.columns, size.lines, not plain)

    def holds(self, lines: Sequence[str]) -> bool:
        return not self.width or max(map(len, lines), default=0) <= self.width

    def fit(self, line: str) -> str:
        """What there is room for; where that is not all, the last character says so."""
        line = line.rstrip()
        return line if self.holds([line]) else line[: self.width - 1] + "…"

    def wrap(self, line: str, indent: int) -> list[str]:
        """Text on as many lines as it takes, all but the first one indented."""
        if self.holds([line]):
            return [line]
        return textwrap.wrap(line, self.width, subsequent_indent=" " * indent)

    def paint(self, line: str, colour: str) -> str:
        """A whole line, cut first: escape sequences take no room."""
        line = self.fit(line)
        return f"\x1b[{COLOURS[colour]}m{line}\x1b[0m" if self.colour else line


COLOURS = {"good": "32", "bad": "1;31", "head": "1", "quiet": "2"}
UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB")


def show_bytes(count: float) -> str:
    """Bytes in powers of 1000, with three digits or more."""
    for unit in UNITS:
        if count < 999.5 or unit == UNITS[-1]:
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"


def show_age(seconds: float, units: int = 2) -> str:
    """The largest units of a span."""
    left = max(int(seconds), 0)
    parts: list[str] = []
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if left >= size or (unit == "s" and not parts):
            parts.append(f"{left // size} {unit}")
            left %= size
    return " ".join(parts[:units])


def show_table(head: Sequence[str], rows: Iterable[Sequence[str]], right: str) -> list[str]:
    """Columns as wide as they must be; those whose place in `right` is ">" end at the right."""
    table = [tuple(head), *(tuple(row) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    return [
        "  ".join(
            cell.rjust(width) if side == ">" else cell.ljust(width)
            for cell, width, side in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in table
    ]


def show_bar(share: float, width: int = 20) -> str:
    return "[" + "#" * round(share * width) + "." * (width - round(share * width)) + "]"


def status_lines(status: Mapping[str, Any], screen: Screen) -> list[str]:
    """The state of a gateway on one screen."""
    now = parse_rfc3339(status["timestamp"])
    interfaces = status["interfaces"]
    rates = [sum(i[f"{way}_bytes_per_second"] for i in interfaces) for way in ("rx", "tx")]
    snapshot, journal = status["snapshot"], status["journal"]
    taken = snapshot["at"]
    age = f"{show_age(now - parse_rfc3339(taken))} ago" if taken else "none yet"
    left = parse_rfc3339(status["certificate_expires_at"]) - now
    good = status["status"] == "healthy"
    title = (
        f"{status['status']}: wggw {status['version']}, Python {status['python_version']}, "
        f"up {show_age(status['uptime_seconds'])}"
    )
    facts = [
        f"peers        {status['wireguard_peers']} online, {status['total_peers']} in all",
        f"traffic      {show_bytes(rates[0])}/s in, {show_bytes(rates[1])}/s out",
        f"snapshot     {age}, {show_bytes(snapshot['bytes'])}",
        f"journal      {show_bytes(journal['bytes'])}, record {journal['records']}",
        f"remote copy  {show_copy(status.get('remote_copy'))}",
        f"certificate  expires {status['certificate_expires_at'][:10]}, "
        + (f"in {show_age(left)}" if left > 0 else "it has EXPIRED"),
        f"host         memory {status['memory_usage']} %, load {status['load_average']}",
    ]
    return [
        *(screen.paint(line, "good" if good else "bad") for line in screen.wrap(title, 2)),
        *(
            screen.paint(line, "bad")
            for reason in status["reasons"]
            for line in screen.wrap(f"  {reason}", 4)
        ),
        "",
        *(line for fact in facts for line in screen.wrap(fact, 13)),
        "",
        *interface_lines(interfaces, screen),
        "",
        *pool_lines(interfaces, screen),
    ]


def show_copy(copy: Any) -> str:
    """How far the remote copy is behind, as the status has it: null without one."""
    if not isinstance(copy, dict):
        return "none"
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in copy.items())


def interface_lines(interfaces: Sequence[Mapping[str, Any]], screen: Screen) -> list[str]:
    lines = show_table(
        ("INTERFACE", "BACKEND", "PORT", "ACTIVE", "TOTAL", "IN", "OUT", "RECEIVED", "SENT"),
        (
            (
                i["name"],
                i["backend"],
                str(i["listen_port"]),
                str(i["active_peers"]),
                str(i["total_peers"]),
                show_bytes(i["rx_bytes_per_second"]) + "/s",
                show_bytes(i["tx_bytes_per_second"]) + "/s",
                show_bytes(i["rx_bytes"]),
                show_bytes(i["tx_bytes"]),
            )
            for i in interfaces
        ),
        "<<>>>>>>>",
    )
    if not screen.holds(lines):
        lines = show_table(
            ("NAME", "BACKEND", "PORT", "ACTIVE/ALL", "IN/s", "OUT/s", "IN", "OUT"),
            (
                (
                    i["name"],
                    i["backend"],
                    str(i["listen_port"]),
                    f"{i['active_peers']}/{i['total_peers']}",
                    show_bytes(i["rx_bytes_per_second"]),
                    show_bytes(i["tx_bytes_per_second"]),
                    show_bytes(i["rx_bytes"]),
                    show_bytes(i["tx_bytes"]),
                )
                for i in interfaces
            ),
            "<<>>>>>>",
        )
    return [screen.paint(lines[0], "head"), *map(screen.fit, lines[1:])]


def pool_lines(interfaces: Sequence[Mapping[str, Any]], screen: Screen) -> list[str]:
    """Addresses in use, with a bar where there is room."""
    pools = [(i["name"], family, pool) for i in interfaces for family, pool in i["pools"].items()]
    rows = [
        (
            name,
            family,
            str(pool["used"]),
            f"{pool['total']:.3g}" if pool["total"] > 10**12 else str(pool["total"]),
            show_bar(pool["used"] / pool["total"]),
            f"{100 * pool['used'] / pool['total']:.0f} %",
        )
        for name, family, pool in pools
    ]
    head = ("POOL", "FAMILY", "USED", "OF", "", "")
    lines = show_table(head, rows, "<<>><>")
    if not screen.holds(lines):
        lines = show_table(head[:5], ((*row[:4], row[5]) for row in rows), "<<>>>")
    return [screen.paint(lines[0], "head"), *map(screen.fit, lines[1:])]


def command_status(arguments: argparse.Namespace) -> int:
    """One screen; exit code 1 when the gateway is degraded."""
    client = client_of(config_of(arguments), arguments)
    status = answer_of(client, "GET", "/api/v1/server/status")
    if arguments.json:
        print(json.dumps(status, indent=2))
    else:
        print("\n".join(status_lines(status, Screen.of(sys.stdout, os.environ))))
    return int(status["status"] != "healthy")


def all_peers(client: ApiClient, query: str) -> list[dict[str, Any]]:
    """Every peer, page by page."""
    peers: list[dict[str, Any]] = []
    cursor = ""
    with Progress("reading peers"):
        while True:
            page = answer_of(
                client, "GET", f"/api/v1/configurations?limit={MAX_PAGE}{query}{cursor}"
            )
            peers += page["configurations"]
            if page["next_cursor"] is None:
                return peers
            cursor = f"&cursor={page['next_cursor']}"


PEER_ORDERS: dict[str, tuple[Callable[[Mapping[str, Any]], Any], bool]] = {
    "created": (lambda peer: peer["created_at"], False),
    "key": (lambda peer: peer["public_key"], False),
    "rx": (lambda peer: peer["rx_bytes"], True),
    "tx": (lambda peer: peer["tx_bytes"], True),
    "traffic": (lambda peer: peer["rx_bytes"] + peer["tx_bytes"], True),
    "handshake": (lambda peer: peer["last_handshake"] or "", True),
}


PEER_SIDES = "<<<>>><<"
PEER_HEAD = ("KEY", "STATE", "ADDRESS", "HANDSHAKE", "RECEIVED", "SENT", "EXPIRES", "INTERFACE")
NARROW_HEAD = ("KEY", "STATE", "ADDRESS", "SEEN", "IN", "OUT", "EXPIRES", "IF")


def peer_lines(peers: Sequence[Mapping[str, Any]], now: float, screen: Screen) -> list[str]:
    """A table of peers, in the widest form that there is room for."""
    for head, row in ((PEER_HEAD, _full_row), (PEER_HEAD, _short_row), (NARROW_HEAD, _narrow_row)):
        rows = [row(peer, now) for peer in peers]
        lines = show_table(head, rows, PEER_SIDES)
        if screen.holds(lines):
            break
    else:  # two lines each: address and interface below the rest
        above = [(key, state, *rest) for key, state, _, *rest, _ in (head, *rows)]
        below = [f"  {row[2]}  {row[7]}" for row in (head, *rows)]
        both = zip(show_table(above[0], above[1:], "<<>>><"), below, strict=True)
        lines = [line for pair in both for line in pair]
    return [screen.paint(lines[0], "head"), *map(screen.fit, lines[1:])]


def _full_row(peer: Mapping[str, Any], now: float) -> tuple[str, ...]:
    return (
        peer["public_key"],
        "online" if peer["online"] else peer["status_reason"] or peer["status"],
        peer["assigned_ip"] or peer["assigned_ipv6"] or "",
        show_handshake(peer["last_handshake"], now),
        show_bytes(peer["rx_bytes"]),
        show_bytes(peer["tx_bytes"]),
        (peer["expires_at"] or "")[:16].replace("T", " "),
        peer["interface"],
    )


def _short_row(peer: Mapping[str, Any], now: float) -> tuple[str, ...]:
    key, *middle, expires, interface = _full_row(peer, now)
    return (short_key(key) + "…", *middle, expires[:10], interface)


def _narrow_row(peer: Mapping[str, Any], now: float) -> tuple[str, ...]:
    *start, handshake, received, sent, expires, interface = _short_row(peer, now)
    if peer["last_handshake"]:
        handshake = show_age(now - parse_rfc3339(peer["last_handshake"]), units=1)
    return (*start, handshake, received, sent, expires, interface)


def show_handshake(when: str | None, now: float) -> str:
    return "never" if when is None else f"{show_age(now - parse_rfc3339(when))} ago"


def command_peers(arguments: argparse.Namespace) -> int:
    client = client_of(config_of(arguments), arguments)
    peers = all_peers(client, "&online=true" if arguments.online else "")
    key, descending = PEER_ORDERS[arguments.sort]
    peers.sort(key=key, reverse=descending)
    if arguments.json:
        print(json.dumps(peers, indent=2))
    else:
        screen = Screen.of(sys.stdout, os.environ)
        print("\n".join(peer_lines(peers, time.time(), screen)))
    return 0


SPARKS = "▁▂▃▄▅▆▇█"
PLAIN_SPARKS = "_.-:=+*#"


def sparkline(values: Sequence[float], width: int, marks: str = SPARKS) -> str:
    """The last `width` values as a line of bars; the highest one is as high as it gets."""
    shown = list(values)[-width:]
    top = max([*shown, 1.0])
    return "".join(marks[min(int(v / top * len(marks)), len(marks) - 1)] for v in shown)


class Top:
    """What `wggw top` remembers from one look to the next."""

    def __init__(self) -> None:
        self.rates: dict[str, collections.deque[float]] = {
            way: collections.deque(maxlen=512) for way in ("rx", "tx")
        }
        self._seen: dict[str, tuple[int, int]] = {}
        self._peer_rates: dict[str, tuple[float, float]] = {}
        self._sampled = -math.inf  # monotonic seconds of the last sample that was seen

    def look(
        self, status: Mapping[str, Any], peers: Sequence[Mapping[str, Any]], now: float
    ) -> None:
        """Take in what the gateway says; there is something new only after a sample."""
        interfaces = status["interfaces"]
        sampled = now - min(i["sample_age_seconds"] for i in interfaces)
        elapsed = sampled - self._sampled
        if elapsed < 0.5:
            return
        self._sampled = sampled
        for way, history in self.rates.items():
            history.append(sum(i[f"{way}_bytes_per_second"] for i in interfaces))
        self._peer_rates = {
            peer["public_key"]: (
                (peer["rx_bytes"] - self._seen[peer["public_key"]][0]) / elapsed,
                (peer["tx_bytes"] - self._seen[peer["public_key"]][1]) / elapsed,
            )
            for peer in peers
            if peer["public_key"] in self._seen
        }
        self._seen = {p["public_key"]: (p["rx_bytes"], p["tx_bytes"]) for p in peers}

    def lines(
        self, status: Mapping[str, Any], peers: Sequence[Mapping[str, Any]], screen: Screen
    ) -> list[str]:
        marks = SPARKS if "utf" in (sys.stdout.encoding or "").lower() else PLAIN_SPARKS
        head = (
            f"{status['status']}: {status['wireguard_peers']} online of {status['total_peers']}, "
            f"load {status['load_average']}, memory {status['memory_usage']} %   {DISMISSAL}"
        )
        lines = [screen.paint(head, "good" if status["status"] == "healthy" else "bad")]
        for way, word in (("rx", "in"), ("tx", "out")):
            history = self.rates[way]
            now = show_bytes(history[-1] if history else 0) + "/s"
            lines.append(f"{word:>3} {now:>10} {sparkline(history, screen.width - 16, marks)}")
        ranked = sorted(
            peers, key=lambda peer: -sum(self._peer_rates.get(peer["public_key"], (0, 0)))
        )
        table = show_table(
            ("KEY", "IN", "OUT", "RECEIVED", "SENT", "ADDRESS"),
            (self._row(peer) for peer in ranked[: max(screen.height - 6, 0)]),
            "<>>>><",
        )
        lines += ["", screen.paint(table[0], "head"), *map(screen.fit, table[1:])]
        if len(peers) == MAX_PAGE:
            lines.append(screen.paint(f"of the first {MAX_PAGE} peers online", "quiet"))
        return lines[: screen.height]

    def _row(self, peer: Mapping[str, Any]) -> tuple[str, ...]:
        rx, tx = self._peer_rates.get(peer["public_key"], (0.0, 0.0))
        return (
            peer["public_key"][:12] + "…",
            show_bytes(rx) + "/s",
            show_bytes(tx) + "/s",
            show_bytes(peer["rx_bytes"]),
            show_bytes(peer["tx_bytes"]),
            peer["assigned_ip"] or peer["assigned_ipv6"] or "",
        )


DISMISSAL = "q quits"


@contextlib.contextmanager
def whole_terminal() -> Iterator[None]:
    """The alternate screen and single key presses; the terminal is put back whatever happens."""
    handle = sys.stdin.fileno()
    before = termios.tcgetattr(handle)
    try:
        tty.setcbreak(handle)
        sys.stdout.write("\x1b[?1049h\x1b[?25l")
        yield
    finally:
        termios.tcsetattr(handle, termios.TCSADRAIN, before)
        sys.stdout.write("\x1b[?25h\x1b[?1049l")
        sys.stdout.flush()


def command_top(arguments: argparse.Namespace) -> int:
    """Refresh until q; Ctrl-C does as well."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError("top needs a terminal: `wggw status --json` is for programs")
    client = client_of(config_of(arguments), arguments)
    top = Top()
    with whole_terminal(), contextlib.suppress(KeyboardInterrupt):
        while True:
            status = answer_of(client, "GET", "/api/v1/server/status")
            query = f"/api/v1/configurations?online=true&limit={MAX_PAGE}"
            peers = answer_of(client, "GET", query)["configurations"]
            top.look(status, peers, time.monotonic())
            lines = top.lines(status, peers, Screen.of(sys.stdout, os.environ))
            sys.stdout.write("\x1b[H" + "".join(line + "\x1b[K\r\n" for line in lines[:-1]))
            sys.stdout.write(lines[-1] + "\x1b[K\x1b[J")
            sys.stdout.flush()
            if key_pressed(arguments.interval) in ("q", "Q"):
                return 0
    return 0


def key_pressed(seconds: float) -> str:
    """The next key within this time, or nothing."""
    ready = select.select([sys.stdin], [], [], seconds)[0]
    return os.read(sys.stdin.fileno(), 1).decode("ascii", "replace") if ready else ""


def command_snapshot(arguments: argparse.Namespace) -> int:
    client = client_of(config_of(arguments), arguments)
    exporting = arguments.action == "export"
    data = b"" if exporting else read_data("@" + arguments.file)
    with Progress(f"snapshot {arguments.action}"):
        status, body = client.call("GET" if exporting else "PUT", "/api/v1/snapshot", data)
    try:
        if status == 200 and exporting:
            Disk().replace(arguments.file, [body])
            print(f"exported {len(body)} bytes to {arguments.file}")
        elif status == 200:
            print(f"imported: {json.loads(body)['total_peers']} peers")
        else:
            raise StartError(f"status {status}: {json.loads(body)['detail']}")
    except OSError as error:
        raise StartError(f"{arguments.file}: {_reason(error)}") from None
    except (ValueError, KeyError, TypeError):
        raise StartError(f"status {status}, with an answer that is not a gateway's") from None
    return 0


def command_awg_generate(arguments: argparse.Namespace) -> int:
    """Print new parameters: for AWG_PARAMS, or for `awg rotate --params`."""
    print(json.dumps(generated_parameters(arguments), indent=2))
    return 0


def generated_parameters(arguments: argparse.Namespace) -> dict[str, Any]:
    try:
        state = generate_obfuscation(arguments.generation, arguments.preset)
    except ValueError as error:
        raise StartError(str(error)) from None
    shown = show_state(state)
    del shown["parameters_version"]  # the gateway counts them
    return shown


def command_awg_show(arguments: argparse.Namespace) -> int:
    client = client_of(config_of(arguments), arguments)
    print(json.dumps(answer_of(client, "GET", "/api/v1/obfuscation"), indent=2))
    return 0


def command_awg_rotate(arguments: argparse.Namespace) -> int:
    """Without --yes say what would happen, and change nothing that cuts clients off."""
    client = client_of(config_of(arguments), arguments)
    try:
        wanted = (
            decode_json(read_data(arguments.params))
            if arguments.params
            else generated_parameters(arguments)
        )
    except GatewayError as error:
        raise StartError(f"--params: {error.detail}") from None
    body = encode_json({"parameters": wanted, "confirm": arguments.yes})
    try:
        answer = answer_of(client, "POST", "/api/v1/obfuscation/rotate", body)
    except StartError as error:
        if '"confirm"' not in str(error):
            raise
        raise StartError(f"{error} (here: --yes)") from None
    print(
        f"{answer['interface']}: parameters version {answer['parameters_version']}, generation "
        f"{answer['generation']}; {answer['cut_off_peers']} peers need new configurations"
    )
    return 0


def answer_of(client: ApiClient, method: str, path: str, body: bytes = b"") -> dict[str, Any]:
    """A call's JSON. Raises StartError with the gateway's words when it is refused."""
    status, content = client.call(method, path, body)
    try:
        answer = cast(dict[str, Any], json.loads(content))
        if status != HTTPStatus.OK:
            raise StartError(f"status {status}: {answer['detail']}")
    except (ValueError, KeyError, TypeError):
        raise StartError(f"status {status}, with an answer that is not a gateway's") from None
    return answer


def command_net(arguments: argparse.Namespace) -> int:
    """What the host needs around the interfaces: up, down, or how it is."""
    try:
        if arguments.action == "down":
            return tell_steps(net_down(links_to_remove(arguments)))
        # `up` changes a host: without settings it is none of a gateway's.
        config = config_of(arguments, signs=arguments.action == "up")
        tunnels = interface_settings(config)
        if arguments.action == "show":
            return report(look_at_network(config, tunnels))
        links = [make_link(tunnel, b"") for tunnel in tunnels]
        return tell_steps(net_up(config, tunnels, links))
    except BackendError as error:
        raise StartError(str(error)) from None


def tell_steps(steps: Iterable[str]) -> int:
    for step in steps:
        print(f"wggw: {step}", flush=True)
    return 0


def links_to_remove(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """Kind and name of this gateway's interfaces. Raises BackendError.

    Settings that are broken or gone must not keep anybody from taking the rest away.
    """
    try:
        tunnels = interface_settings(config_of(arguments))
        return [(LINK_KINDS[tunnel.prefix], tunnel.name) for tunnel in tunnels]
    except ConfigError as error:
        links = links_of_table(current_table() if tool("nft") else "")
        names = ", ".join(name for _, name in links)
        words = f"taking the interfaces of table {TABLE} instead: {names}"
        none = "which interface is the gateway's cannot be told: see `ip link show`"
        print(f"wggw: {error}; {words if links else none}", file=sys.stderr)
        return links


def command_doctor(arguments: argparse.Namespace) -> int:
    """Look at everything; exit code 1 when something is wrong."""
    config = config_of(arguments)

    def ask() -> tuple[int, bytes]:
        return client_of(config, arguments).call("GET", "/api/v1/server/status")

    return report(look_at_all(config, ask))


def report(findings: Iterable[Finding]) -> int:
    """A line each; 1 when something is wrong."""
    failed = False
    for finding in findings:
        failed |= finding.failed
        word = "WRONG" if finding.failed else "note" if finding.todo else "ok"
        print(f"{word:5}  {finding.subject}: {finding.found}", flush=True)
        if finding.todo:
            print(f"       -> {finding.todo}", flush=True)
    return int(failed)


def command_check(arguments: argparse.Namespace) -> int:
    """Verify snapshot and journals without writing; with --repair save what can be saved."""
    config = config_of(arguments, signs=False)
    store = open_store(config)
    if arguments.repair:
        return repair(store)
    with Progress(f"checking {config.db_path}"):
        store, current = load_whole(config)
    if not store.snapshot_time:
        raise StartError(f"{config.db_path}: there is no database: the first start makes it")
    print(f"{config.db_path}: good, {sum(store.counts.values())} peers, record {store.number}")
    if current and current.torn:
        print(f"{config.db_path}.journal: {current.torn} bytes of a torn record will be dropped")
    return 0


def repair(store: Store) -> int:
    for line in store.salvage():
        print(line)
    target = store.path + ".repaired"
    try:
        store.write_copy(target)
        _give_to_owner(target, store.path)
    except OSError as error:
        raise StartError(f"{target}: {_reason(error)}") from None
    ends = ("", ".previous", ".journal", ".journal.previous")
    old = shlex.join(name for end in ends if os.path.exists(name := store.path + end))
    print(f"saved {sum(store.counts.values())} peers, record {store.number}, in {target}")
    print("nothing else was changed. To use it, move the old files away and it into their place:")
    print(f"  mkdir damaged && mv {old} damaged/ && mv {shlex.join([target, store.path])}")
    return 0


def _give_to_owner(target: str, path: str) -> None:
    """What root made here belongs to whom the gateway's files belong. Raises OSError."""
    if os.geteuid() == 0:
        model = os.stat(path if os.path.exists(path) else os.path.dirname(path) or ".")
        os.chown(target, model.st_uid, model.st_gid)


def refresh_seconds(text: str) -> float:
    return _seconds(0.1, 3600)(text)


EXIT_CODES = """\
exit codes:
  0  done, and all is well
  1  it failed, or the gateway says no, or `status` finds it degraded
  2  a wrong setting or argument
  3  snapshot or journal is damaged
"""

EXAMPLES = {
    "serve": "example:\n  wggw serve --env-file /etc/wggw/wggw.env",
    "check": "examples:\n  wggw check\n  wggw check --repair",
    "call": """\
examples:
  wggw call GET /api/v1/server/status
  wggw call POST /api/v1/configurations --data '{"public_key": "…"}'
  wggw call POST /api/v1/configurations/batch --data @operations.json
""",
    "snapshot": "examples:\n  wggw snapshot export state.db\n  wggw snapshot import state.db",
    "status": """\
Exit code 1 when the gateway is degraded or does not answer.

examples:
  wggw status
  wggw status --json | jq '.interfaces[].rx_bytes_per_second'
""",
    "peers": "examples:\n  wggw peers --online --sort traffic\n"
    "  wggw peers --json | jq '.[] | select(.status_reason == \"quota\") | .public_key'",
    "top": "example:\n  wggw top --interval 5",
    "net": "examples:\n  wggw net show\n  wggw net up",
    "doctor": "Run it as root.\n\nexample:\n  wggw doctor",
    "generate": "example:\n  wggw awg generate --preset strong >awg.json",
    "show": "example:\n  wggw awg show",
    "rotate": """\
Without --yes nothing is changed that cuts a client off.

examples:
  wggw awg rotate --params @awg.json
  wggw awg rotate --preset strong --yes
""",
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wggw",
        description="A WireGuard gateway. Where it is not installed, wggw is python3 wggw.py.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"wggw {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[..., int], text: str, group: Any = commands
    ) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = group.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=EXAMPLES.get(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        default = "./.env" if run is command_serve else f"./.env, or else {INSTALLED_SETTINGS}"
        added.add_argument("--env-file", metavar="PATH", help=f"settings; default {default}")
        added.set_defaults(run=run)
        return added

    command("serve", command_serve, "run the gateway")
    net = command("net", command_net, "the host's network around the interfaces")
    net.add_argument(
        "action", choices=("up", "down", "show"), help="make it, take it away, or say how it is"
    )
    check = command("check", command_check, "verify snapshot and journal; exit 3 when damaged")
    check.add_argument(
        "--repair", action="store_true", help="save what can be saved, in a new file"
    )
    call = command("call", command_call, "send one signed request")
    call.add_argument("method", help="GET, POST, PUT, PATCH or DELETE")
    call.add_argument("path", help="with its query, such as /api/v1/configurations?limit=10")
    call.add_argument("--data", help="the body: a text, @FILE, or @- for standard input")
    snapshot = command("snapshot", command_snapshot, "export or import the whole state")
    snapshot.add_argument(
        "action", choices=("export", "import"), help="the gateway's state out, or in: replaced"
    )
    snapshot.add_argument("file", help="its name; export replaces it, mode 0600")
    awg = commands.add_parser(
        "awg", help="AmneziaWG's parameters", description="AmneziaWG's parameters."
    )
    actions = awg.add_subparsers(required=True, metavar="ACTION")
    generate = command(
        "generate", command_awg_generate, "print new random parameters as JSON", actions
    )
    show = command(
        "show", command_awg_show, "print the parameters in use, and how many peers", actions
    )
    change = command(
        "rotate", command_awg_rotate, "change the parameters; cuts clients off", actions
    )
    change.add_argument("--params", help="JSON, @FILE, or @- for standard input; default: random")
    change.add_argument("--yes", action="store_true", help="confirm that clients are cut off")
    for maker in (generate, change):
        maker.add_argument(
            "--generation",
            choices=GENERATIONS,
            default=DEFAULT_GENERATION,
            help=f"the newest that all clients know; default {DEFAULT_GENERATION}",
        )
        maker.add_argument(
            "--preset",
            choices=tuple(PRESETS),
            default=DEFAULT_PRESET,
            help=f"how much is spent on hiding; default: {DEFAULT_PRESET}",
        )
    status = command("status", command_status, "show on one screen how the gateway is")
    peers = command("peers", command_peers, "list the peers with their live state")
    peers.add_argument("--online", action="store_true", help="only those that are online")
    peers.add_argument(
        "--sort",
        choices=tuple(PEER_ORDERS),
        default="created",
        help="traffic and times: the largest first; default created, the oldest first",
    )
    for shown in (status, peers):
        shown.add_argument("--json", action="store_true", help="for programs")
    top = command("top", command_top, "watch traffic and the busiest peers; q quits")
    top.add_argument("--interval", type=refresh_seconds, default=2.0, help="seconds; default 2")
    doctor = command("doctor", command_doctor, "look for what is wrong; exit 1 when something is")
    for client in (call, snapshot, show, change, status, peers, top, doctor):
        client.add_argument("--url", help="default: this host's gateway")
        client.add_argument("--key-file", help="holds the API key; default: GATEWAY_API_KEY")
        client.add_argument(
            "--key-id", default="default", help="whose key it is, for rfc9421; default: default"
        )
        client.add_argument("--fingerprint", help="SHA-256 of the certificate; default: TLS_CERT's")
        client.add_argument(
            "--scheme", choices=("legacy", "rfc9421"), help="default: the first of AUTH_SCHEMES"
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the process's exit code."""
    arguments = make_parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):  # not every terminal can show an ellipsis
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        code = cast(int, arguments.run(arguments))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `wggw peers | head` has seen enough; the exit flushes once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except StartError as error:
        print(f"wggw: {error}", file=sys.stderr)
        Manager(os.environ).tell(f"STATUS={error}")
        return error.code


if __name__ == "__main__":
    sys.exit(main())
