#!/usr/bin/env python3
# Copyright (c) the wggw authors. Proprietary, all rights reserved: see LICENSE.
"""wggw: a WireGuard gateway in one file.

A VPN provider's backend tells the gateway over HTTPS which peers may connect. The gateway assigns
addresses, configures the WireGuard interface, reports usage, and restores all this after a restart.

A request's path (server.Loop means: class Loop in the section server)
    A thread for each new connection does the TLS handshake and hands it to server.Loop, the one
    thread that owns rows and connections. The loop reads a head; http.Admission verifies its
    signature and finds the route; the body is decoded once, into frozen values. The rows answer a
    read at once. A change of a peer waits while another change of that peer is on its way. Then
    gateway.Rules decides it, and it becomes a ledger.Flight. The ledger.Lander, another thread,
    lands all waiting flights together: it writes their records to the journal with one fsync, sends
    each interface one message, and has the loop change the rows and answer. Then it begins the next
    landing.

A start's path
    The thread of server.Service listens (nothing but /healthz and /openapi.json is served yet),
    locks the files and the interfaces' names, loads the snapshot and replays the journal, claims
    the remote copy, sets the interfaces up, starts the lander, and makes the interfaces equal to
    the rows. It owns the rows until the lander starts, and the loop from then on. A record on disk
    counts even if a crash came before interface or rows had it: the start completes that unanswered
    change.

Who owns what
    loop      rows, address pools, connections: nobody else touches them, so they have no lock. It
              lends a connection to a worker that reads a long body.
    lander    the interfaces and the journal's file. A worker may write the journal, too, while it
              holds Lander.turn.
    workers   threads of timers and of long requests: they read interfaces, decode desired states
              (the whole list of peers that a backend wants) and write snapshots. They have the loop
              call functions on the rows, each for a few milliseconds, by Loop.run().
    log       its thread writes the lines that all others queue, so that no reader delays them.

Sections, each using only those above it (search for "# name:")
    constants, errors, config, values, crypto, addresses, journal and snapshot files, store, object
    store, remote copy, backends, host network, ledger, gateway, metrics, http, server, doctor,
    moving in, command line

Laws
    1. The rows are the truth; an interface is a projection of them. Everything that the gateway
       sets is compared: peers with allowed IPs, preshared keys and service classes, and the
       interface's key, port, addresses and AmneziaWG parameters.
    2. An answer is given only when disk (with DURABILITY=commit) and interface have the change:
       record, then interface, then rows. The record of a refused change is removed or declared
       void, the interface is made equal to the rows again, and no row ever changes back.
    3. An address becomes free only after the interface has dropped the peer. Addresses that were
       never used are assigned first, then the one that was released longest ago.
    4. Live changes and replay run through the same Store.apply_in_slices(). An acknowledged change
       is never lost (with DURABILITY=commit), and a refused one never reappears. One without an
       answer may be either.
    5. The cost of a request about one peer does not depend on the number of peers.
    6. No request starts a process; no outside input ever reaches a shell.
    7. The gateway changes and removes only what it made: interfaces with its mark as their alias,
       the nftables tables `inet wggw` and `inet wggw_classes` with its mark as their comment, ufw
       rules with the comment "wggw". An operator can give it an interface by `wggw adopt`. It
       also turns forwarding on, and sets accept_ra for that, and never turns it off.

The files on disk
    DB_PATH            the snapshot: an ordinary SQLite database, replaced atomically. Table `meta`
                       holds `number`, the last journal record that the snapshot contains,
                       `journaled`, whether a journal belongs to it, and `lineage`, a random id from
                       the first start. Every schema that a version wrote is read: see
                       SCHEMA_VERSION and upgraded().
    DB_PATH.journal    the changes since the snapshot, as lines of text:
                         wggw-journal 2 AFTER COLUMNS CRC
                         FIRST DURABLE CRC JSON
                       AFTER: the number before the first record. COLUMNS: those of a peer's row.
                       Each line is one landing: FIRST is the number of its first record, DURABLE
                       the last record that was known to be on disk when the line was written. CRC:
                       CRC-32 (hex) of the rest of the line. JSON: a list of records, see
                       store.Record. A journal of version 1 is read once, into a snapshot.
    DB_PATH.previous, DB_PATH.journal.previous
                       the previous snapshot and journal, which only `wggw check --repair` reads.
    DB_PATH.nonces     the signatures that were used, for the next start: see NonceGuard. A line
                       "wggw-nonces 1 running CEILING", or after an orderly stop
                       "wggw-nonces 1 stopped FORGOTTEN" and lines of CREATED NONCE (a hash).
    DB_PATH.writers    names of the writers of the remote copy whose entries these files contain.
    DB_PATH.sock       the Unix socket for commands on this host.
    DB_PATH.lock       is locked as long as a gateway uses these files. An abstract socket locks
                       each interface in the same way: see lock_interface().
    DB_PATH.superseded a snapshot of the state that a start did not use: these files' or the remote
                       copy's.
    With SNAPSHOT_KEY set (AES-256-GCM, a key for each file by HKDF from a random salt):
                       the journal's first line has SALT and KEY-CHECK (hex) before its CRC, and a
                       line's JSON is base64 of a random nonce and what is sealed; the snapshot is a
                       line "wggw-snapshot 1 SALT KEY-CHECK CRC" and sealed chunks of 64 KiB,
                       numbered, the last one marked.
    At SNAPSHOT_URL    claim-N, N-WRITER-PLACE, N-WRITER-manifest-0 and -1, N-WRITER-rival: see
                       section remote copy.
                       Each is "wggw-copy 2 SHA256 ABOUT", a newline and the payload. ABOUT is
                       JSON; SHA256 covers everything after it. The payload is a snapshot, or a line
                       of traffic totals and a journal, in the formats above. It is compressed
                       (zlib), and encrypted if SNAPSHOT_KEY is set.
    The snapshot's checksum is its SQLite application id (see snapshot_parts).
"""

from __future__ import annotations

import os
import sys

# A script is compiled at each start, and Python keeps its syntax tree (20 MB) as long as it runs; a
# module comes from its cached bytecode. So what runs for long starts again as a module: same
# process, same arguments. Where the bytecode is not kept beside the program, it is kept in the
# state directory, if nobody else can write there: whoever can decides what is run.
if __name__ == "__main__" and sys.argv[1:2] == ["serve"] and __file__.endswith("wggw.py"):
    from importlib.util import cache_from_source

    as_module = "import sys; sys.path[:0] = [sys.argv.pop(1)]; import wggw; sys.exit(wggw.main())"
    flags = [*sys.orig_argv[1 : -len(sys.argv)], "-P", "-c", as_module]
    directory = os.path.dirname(os.path.realpath(__file__))
    kept = os.path.exists(cache_from_source(os.path.join(directory, "wggw.py")))
    if not kept and (sys.dont_write_bytecode or not os.access(directory, os.W_OK)):
        state = os.path.dirname(os.path.realpath(os.environ.get("DB_PATH") or "wireguard.db"))
        if os.path.isdir(state):
            found = os.stat(state)
            if found.st_uid == os.geteuid() and not found.st_mode & 0o022:
                os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
                flags = ["-X", f"pycache_prefix={state}/.pycache"] + [f for f in flags if f != "-B"]
    command = [sys.orig_argv[0], *flags, directory, *sys.argv[1:]]
    os.execv(sys.executable, command)  # noqa: S606 (no shell is what we want)

import argparse
import atexit
import base64
import binascii
import bisect
import collections
import contextlib
import difflib
import email.utils
import enum
import errno
import fcntl
import fnmatch
import functools
import gc
import glob
import hashlib
import heapq
import hmac
import http.client
import importlib.util
import io
import ipaddress
import itertools
import json
import logging
import math
import queue
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
import string
import struct
import subprocess
import termios
import textwrap
import threading
import time
import tty
import unicodedata
import urllib.parse
import zlib
from collections.abc import (
    Callable,
    Collection,
    Container,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timedelta, timezone
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Generic, NamedTuple, NewType, NoReturn, Protocol, TypeVar, cast

__version__ = "1.0.0"
PYTHON_VERSION = ".".join(map(str, sys.version_info[:3]))

# ==================================================================================================
# constants: limits with their unit and reason; kernel numbers under the kernel's names
# Never here: reads of the environment.
# ==================================================================================================

BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)  # seconds

KEY_BYTES = 32  # curve25519 keys and preshared keys
ONLINE_SECONDS = 180  # a peer with a younger handshake is online (WireGuard's REJECT_AFTER_TIME)

MAX_HEAD = 16 * 1024  # bytes of request line and headers
MAX_HEADERS = 64
MAX_BODY = 64 * 1024  # bytes of an ordinary request's body
MAX_JSON_DEPTH = 32
MAX_TEXT = 256  # characters of free text such as request_id
MAX_PAGE = 1000  # peers in one answer to a list
DEFAULT_PAGE = 100
MAX_BATCH = 1000  # operations in one request
MAX_GONE = 100_000  # deletions that the store remembers for clients that follow changes
MAX_GAPS = 64  # gaps in the sequence that the store remembers
MAX_USAGE = 10_000  # peers in one answer to usage
CHANGES_PATIENCE = 60  # seconds: how long a request for changes may wait for one
MAX_CLASSES = 64  # service classes: each costs every packet a lookup in a set
MAX_LINES = 64 * 2**20  # bytes of a desired state in JSON lines, which are read one by one
MAX_ARRAY = 16 * 2**20  # bytes of a desired state that is a JSON array
MAX_SNAPSHOT = 256 * 2**20  # bytes of an imported snapshot: 60,000 peers need about 20 MB
MAX_INTEGER = 2**63 - 1  # SQLite's INTEGER
MAX_TOTAL = MAX_INTEGER // 4  # bytes of a peer's traffic: the sum of two still fits
MAX_TIME = 253402300799  # Unix seconds: the year 10000 has no RFC 3339 form
SAFE_DATAGRAM = 1280  # bytes of a packet that every path lets through: IPv6's minimum MTU
MAX_DATAGRAM = 65507  # bytes of a UDP payload over IPv4
SAFE_DECOY_TEXT = 3000  # characters of I1-I5: the kernel describes an interface in 4096 bytes
MAX_DECOY_TEXT = 65000  # characters of one of I1-I5: amneziawg-go reads lines of 64 KiB
SAFE_JUNK_PACKETS = 127  # before a handshake: amneziawg-go sends at most 128 at once
MAX_NONCES = 2**18  # 2,000 signed requests a second for two minutes, about 40 MB
MAX_THROTTLED = 4096  # addresses whose authentication failures are counted
MAX_SIGNATURES = 8  # signatures of one message
MAX_FIELD_PARTS = 256  # parts of a structured field: a signature over a full head needs 80

LISTEN_QUEUE = 512  # connections that the kernel holds until they are accepted
RESERVED_FILES = 128  # open files that connections may not use
HANDSHAKE_DEADLINE = 10.0  # seconds for the TLS handshake
HEAD_DEADLINE = 10.0  # seconds from the first byte of a request to the end of its head
BODY_DEADLINE = 30.0  # seconds for a request's body
LANDING_DEADLINE = 40.0  # seconds that a change may take before its connection is closed
WRITE_DEADLINE = 30.0  # seconds in which a client must read SEND_BYTES of an answer
IDLE_DEADLINE = 75.0  # seconds between two requests of a connection
SWEEP_SECONDS = 1.0  # between two looks at the deadlines of all connections
REQUESTS_A_ROUND = 4  # requests of one connection before the loop turns to the others
TLS_RECORD = 16 * 1024  # bytes of data in one record, at most (RFC 8446 section 5.1)
SEND_BYTES = TLS_RECORD
RECEIVE_BYTES = 4 * 1024  # taken from a socket at once: as KeyUpdates they cost the loop 3 ms
MAX_WITHOUT_DATA = TLS_RECORD + 1024  # bytes received without data: only KeyUpdates are so many
LINGER_SECONDS = 1.0  # unread input is drained for so long: otherwise a reset could drop the answer
MANAGER_SECONDS = 1.0  # seconds in which systemd must accept a message
END_SECONDS = 4.3  # seconds for an orderly stop: it must end within 5
DRAIN_SECONDS = 2.0  # of these, seconds for requests in flight,
DRAIN_GRACE = 0.2  # seconds for requests that arrived before SIGTERM and are not read yet,
STOP_SECONDS = 0.5  # seconds for each of the timers' jobs, the ledger and the remote copy,
LAST_SAMPLE_SECONDS = 1.0  # seconds for the last reading of the counters
UNSURE_SAMPLES = 6  # after so many in a row that changes in flight obscured, one reads all peers
SAMPLE_RETRY = 10.0  # seconds until a sample that failed is repeated, if SAMPLE_INTERVAL is longer
UNKNOWN_CLOCK_ERROR = 16.0  # seconds: adjtimex(2) reports no greater error
CERTIFICATE_SECONDS = 3650 * 86400  # how long a certificate that the gateway makes is valid
RENEWAL_SECONDS = 365 * 86400  # a start or reload renews it when so many seconds are left
EXPIRY_WARNING = 14 * 86400  # the gateway warns when a certificate has so many seconds left
NONCE_RESERVE = 2  # seconds: how far above an early signature the ceiling is set
NONCE_SECONDS = 5.0  # between two checks whether the ceiling on disk must be raised
CLIENT_TIMEOUT = 60.0  # seconds that a command waits for a silent gateway
MAX_CLIENT_WAIT = 5  # seconds that `wggw call` waits when the gateway answers Retry-After

APPLY_SLICE = 250  # rows that the loop applies or shows in one round: 1 to 4 ms
SLICE_SECONDS = 0.004  # how long one slice of long work may occupy the loop
PAGE_SCAN = 4000  # peers that one page of a list examines: 0.7 ms
# A pool assigns its first FRESH_SPAN addresses before any that was released. From then on released
# ones come first: a /64 under churn would otherwise remember every address that it ever assigned.
FRESH_SPAN = 2**18
JOURNAL_LIMIT = 16 * 2**20  # bytes (five samples of 60,000 peers): a larger journal is folded early
LARGEST_BLOCK = 32 * 2**20 - 8192  # bytes: the largest block that glibc can keep (mallopt(3))
READ_CHUNK = 500  # rows that a worker takes from the loop at a time: about 5 ms
BREATH_SECONDS = 0.0002  # between two slices: without it other threads do not get the GIL
BODY_RATE = 250_000  # bytes a second: a slower streamed body is cut off
BACKEND_TIMEOUT = 10.0  # seconds for one exchange with an interface
CHECK_TRIES = 20  # how often a command reads files that a running gateway replaces meanwhile
HUNG_TIMEOUTS = 3  # after so many in a row the gateway restarts its userspace WireGuard
DAEMON_START_SECONDS = 5.0  # how long a userspace WireGuard may take to open its socket
SUPERVISE_SECONDS = 1.0  # between two checks of the interface and of what has expired
DURABILITY_INTERVAL = 1.0  # seconds: a crash with DURABILITY=interval loses at most so much
DUMP_TRIES = 50  # how often a kernel's dump is repeated that a change has interrupted
PR_SET_DUMPABLE = 4  # include/uapi/linux/prctl.h
TUN = "/dev/net/tun"
CAP_NET_ADMIN = 12  # include/uapi/linux/capability.h
UAPI_DIRECTORY, AWG_UAPI_DIRECTORY = "/var/run/wireguard", "/var/run/amneziawg"
TOOL_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # of nft and ufw

# include/uapi/linux/netlink.h
NETLINK_ROUTE, NETLINK_GENERIC = 0, 16
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR, NLM_F_DUMP = 0x1, 0x4, 0x10, 0x300
NLM_F_EXCL, NLM_F_CREATE = 0x200, 0x400
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_CAPPED, NLM_F_ACK_TLVS, NLMSGERR_ATTR_MSG = 0x100, 0x200, 1
NLA_F_NESTED, NLA_TYPE_MASK = 0x8000, 0x3FFF
# include/uapi/linux/genetlink.h
GENL_ID_CTRL, CTRL_CMD_GETFAMILY, CTRL_ATTR_FAMILY_ID, CTRL_ATTR_FAMILY_NAME = 16, 3, 1, 2
CTRL_ATTR_VERSION = 3
# include/uapi/linux/rtnetlink.h, if_link.h, if_addr.h
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_GETROUTE, RTN_UNICAST, RTN_LOCAL, RTA_DST, RTA_OIF = 26, 1, 2, 1, 4
IFLA_IFNAME, IFLA_MTU, IFLA_LINKINFO, IFLA_INFO_KIND, IFLA_IFALIAS = 3, 4, 18, 1, 20
MAX_ALIAS = 255  # bytes: IFALIASZ - 1
IFA_ADDRESS, IFA_LOCAL = 1, 2
IFF_UP = 1
# include/uapi/linux/wireguard.h
WG_GENL_NAME = "wireguard"
WG_CMD_GET_DEVICE, WG_CMD_SET_DEVICE = 0, 1
WGDEVICE_A_IFINDEX, WGDEVICE_A_IFNAME, WGDEVICE_A_PRIVATE_KEY = 1, 2, 3
WGDEVICE_A_FLAGS, WGDEVICE_A_LISTEN_PORT, WGDEVICE_A_PEERS = 5, 6, 8
WGPEER_A_PUBLIC_KEY, WGPEER_A_PRESHARED_KEY, WGPEER_A_FLAGS, WGPEER_A_ENDPOINT = 1, 2, 3, 4
WGPEER_A_LAST_HANDSHAKE_TIME, WGPEER_A_RX_BYTES, WGPEER_A_TX_BYTES, WGPEER_A_ALLOWEDIPS = 6, 7, 8, 9
WGDEVICE_F_REPLACE_PEERS = 1
WGPEER_F_REMOVE_ME, WGPEER_F_REPLACE_ALLOWEDIPS = 1, 2
WGALLOWEDIP_A_FAMILY, WGALLOWEDIP_A_IPADDR, WGALLOWEDIP_A_CIDR_MASK = 1, 2, 3
# AmneziaWG's module uses WireGuard's numbers; AWG_PARAMETERS has its own.
AWG_GENL_NAME = "amneziawg"
# include/uapi/linux/netfilter/nfnetlink.h, nf_tables.h, nf_tables_compat.h
NETLINK_NETFILTER, NFNL_SUBSYS_NFTABLES, NFPROTO_INET = 12, 10, 1
NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END = 16, 17
NFT_MSG_NEWSETELEM, NFT_MSG_GETSETELEM, NFT_MSG_DELSETELEM = 12, 13, 14
NFT_MSG_GETTABLE, NFT_MSG_GETCHAIN, NFT_MSG_GETRULE = 1, 4, 7
NFT_MSG_GETSET, NFT_MSG_GETOBJ = 10, 19
NFTA_TABLE_HANDLE, NFTA_CHAIN_HANDLE, NFTA_RULE_HANDLE, NFTA_RULE_POSITION = 4, 2, 3, 6
NFTA_SET_ELEM_LIST_TABLE, NFTA_SET_ELEM_LIST_SET, NFTA_SET_ELEM_LIST_ELEMENTS = 1, 2, 3
NFTA_LIST_ELEM, NFTA_SET_ELEM_KEY, NFTA_DATA_VALUE = 1, 1, 1
NFTA_OBJ_TABLE, NFTA_OBJ_NAME, NFTA_OBJ_TYPE, NFTA_OBJ_DATA = 1, 2, 3, 4
NFT_OBJECT_COUNTER, NFTA_COUNTER_BYTES = 1, 1
NETLINK_BATCH = 48 * 1024  # bytes of peers in one message: attribute lengths are 16 bits

SWITCH_INTERVAL = 0.0005  # seconds: with Python's 0.005, a request's every step waits for a sample
COLLECT_AFTER = 20_000  # objects: with Python's 700, half of a dump's decoding is collection
LOG_DELAY = 0.1  # seconds for which the log gathers the lines of requests
MAX_LOG_LINES = 100_000  # lines that wait for a slow reader of the log
LOG_END_SECONDS = 0.15  # seconds for the last lines: an orderly stop must end in time
MAX_LOG_NOTE = 40_000  # characters after a request's line: the operations of a whole batch
MAX_REPAIRS_LOGGED = 100  # peers that the log names after a repair; of more it gives the number

COPY_TICK = 1.0  # seconds between two checks whether there is something to copy
COPY_SEGMENTS = 32  # segments after a snapshot before the next snapshot: bounds what a boot reads
COPY_BACKLOG = 16 * 2**20  # bytes: with more records to copy, a snapshot is copied instead
COPY_CONNECTIONS = 8  # parallel connections for reading objects
COPY_TIMEOUT = 10.0  # seconds for which the object store may be silent
COPY_DEADLINE = 30.0  # seconds for one object, plus its bytes divided by COPY_SLOWEST
COPY_SLOWEST = 200_000  # bytes a second
COPY_MAX_PAUSE = 10.0  # seconds between two tries of a boot, on average
COPY_WRITERS = 32  # former writers whose entries the local files are known to contain
COPY_SWEEP_SECONDS = 86400.0  # after which a writer removes what a replaced epoch holds
COPY_FIRST_SWEEP = 3600.0  # seconds from the start to the first removal, at most
COPY_GARBAGE = 10_000  # names of objects to remain for another try to delete them
MAX_MANIFEST = 2**18  # bytes of a claim or a manifest

LOG = logging.getLogger("wggw")

# ==================================================================================================
# errors: what a caller is told (GatewayError and its kinds), what an interface, a disk or a start
# reports
# Never here: logging, except of a defect.
# ==================================================================================================


class GatewayError(Exception):
    """A request is refused: an HTTP `status` and a `detail` that is safe to tell the caller."""

    status = 500
    key_id = "-"  # for the log: of the key that has signed the request, if its check raised this

    def __init_subclass__(cls, status: int | None = None) -> None:
        cls.status = cls.status if status is None else status

    def __init__(self, detail: str, *, headers: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(detail)
        self.detail = detail
        self.headers = tuple(headers)


# fmt: off
class Malformed(GatewayError, status=400): ...
class Forbidden(GatewayError, status=403): ...
class NotFound(GatewayError, status=404): ...
class MethodNotAllowed(GatewayError, status=405): ...
class Timeout(GatewayError, status=408): ...
class Conflict(GatewayError, status=409): ...
class Gone(GatewayError, status=410): ...
class LengthRequired(GatewayError, status=411): ...
class TooLarge(GatewayError, status=413): ...
class UnsupportedMediaType(GatewayError, status=415): ...
class TooManyRequests(GatewayError, status=429): ...
class HeadTooLarge(GatewayError, status=431): ...
class Unavailable(GatewayError, status=503): ...
class VersionNotSupported(GatewayError, status=505): ...
# fmt: on


class Unauthorized(GatewayError, status=401):
    """The signature is not accepted; `reason` is the label in the metrics."""

    def __init__(self, detail: str, reason: str = "signature") -> None:
        super().__init__(detail)
        self.reason = reason


class Invalid(GatewayError, status=422):
    """A field's value is wrong; the detail begins with the field's name."""

    def __init__(self, name: str, accepted: str) -> None:
        super().__init__(f"{name}: {accepted}")


class OutcomeUnknown(GatewayError):
    """A failing disk may or may not have kept a change. No HTTP status says that, so the gateway
    closes the connection without an answer, as if it had crashed."""


class BackendError(Exception):
    """The interface did not do what was asked; the text names the interface and the reason."""


class NoAnswer(BackendError):
    """The interface did not answer in time. Asking again would take as long."""


class ForeignError(BackendError):
    """An interface with this name exists and is not this gateway's, so it is not touched."""


class ParametersRefused(BackendError):
    """The interface exists, but does not support the parameters; another kind of it might."""


class CodecError(BackendError):
    """Bytes from a kernel or a userspace WireGuard that do not follow their format."""


class StartError(Exception):
    """The gateway cannot start; `code` is the process's exit code."""

    code = 1


class ConfigError(StartError):
    """A setting is wrong: the text names it, its value unless secret, and what is accepted."""

    code = 2


class DamagedError(StartError):
    """Snapshot or journal is damaged. The text says what to do, too, when that refuses a start.

    `found` is the fault alone, for the caller who sent the file; `fault` also names the file.
    """

    code = 3

    def __init__(self, name: str, found: str, todo: str) -> None:
        self.found, self.fault = found, f"{name}: {found}"
        super().__init__(self.fault + todo)


class NewerError(StartError):
    """A newer version of this program wrote the database: it is not damaged."""

    code = 3


DEFECT = "an internal error: the gateway's log names its place in the code"


def log_defect(error: BaseException) -> None:
    """Log where a defect of this program happened, never the values that led to it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    line = trace.tb_lineno if trace else 0
    LOG.error("internal error: %s at line %d", type(error).__name__, line)


def refusal_of(error: Exception) -> GatewayError:
    """What the caller is told of an error. Any but a GatewayError is a defect, which is logged."""
    if isinstance(error, GatewayError):
        return error
    log_defect(error)
    return GatewayError(DEFECT)


class DiskError(Exception):
    """The disk refused a write; nothing that waited for it may be acknowledged."""


# ==================================================================================================
# config: the settings, with every default in one table; every bad value is refused by name
# Never here: files other than .env.
# ==================================================================================================

NO_DNS = "none"  # the DNS choice that always exists: a client's file without a DNS line
DEFAULT_KEY_FILE = "/etc/wireguard/privatekey"
PLAIN_PREFIX, AWG_PREFIX = "WG", "AWG"  # begin the settings of the two kinds of interface
IPv4or6Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Parser = Callable[[str], Any]  # raises ValueError
Kind = tuple[Parser, str]  # what settings may share: a parser, and what it accepts


class Setting(NamedTuple):
    """A row of the settings table. `default` is None for "not set"; `accepts` ends an error."""

    name: str
    default: str | None
    parse: Parser
    accepts: str
    secret: bool
    required: bool


def _matching(pattern: str) -> Callable[[str], str]:
    def parse(raw: str) -> str:
        if not re.fullmatch(pattern, raw):
            raise ValueError
        return raw

    return parse


_text = _matching(r"(?s).+")
_header_value = _matching(r"[!-~]{1,4096}")
_secret = _matching(r"[^\ud800-\udfff]{16,}")  # a lone surrogate cannot be encoded


def _one_of(*words: str) -> Kind:
    return _matching("|".join(words)), f"{', '.join(words[:-1])} or {words[-1]}"


# Matches JSON up to its next bracket outside of strings. It always matches. Possessive quantifiers
# keep no state per character. Python 3.11.2 has a defect (gh-106052): a possessive group that fails
# halfway keeps what it consumed. Only an unterminated string fails so here, and it ends the input.
_JSON_PLAIN = re.compile(rb'[^"\[\]{}]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"[^"\[\]{}]*+)*+', re.DOTALL)


def json_extent(
    data: bytes | bytearray, start: int = 0, limit: int = sys.maxsize
) -> tuple[int, int | None]:
    """How deep the JSON value at `start` is nested, and its end: None if that is not found.

    Reading stops at the end of the value, at `limit`, and at nesting beyond MAX_JSON_DEPTH.
    """
    depth = deepest = 0
    position = start
    while True:
        plain = _JSON_PLAIN.match(data, position, limit)
        position = plain.end() if plain else position
        bracket = data[position : position + 1] if position < limit else b""
        position += 1
        if bracket in (b"[", b"{"):
            depth += 1
            deepest = max(deepest, depth)
            if depth > MAX_JSON_DEPTH:
                return deepest, None
        elif bracket in (b"]", b"}"):
            depth -= 1
            if depth <= 0:
                return deepest, position
        else:
            return deepest, None


def check_depth(data: bytes) -> None:
    """Raises ValueError for nesting that could exhaust a thread's stack, which would end Python."""
    brackets = data.count(b"[") + data.count(b"{")
    if brackets > MAX_JSON_DEPTH and json_extent(data)[0] > MAX_JSON_DEPTH:
        raise ValueError("nested too deep")


def load_json(text: str) -> Any:
    """json.loads() for text from outside. Raises ValueError."""
    check_depth(text.encode("utf-8", "surrogatepass"))
    return json.loads(text)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key is given twice")
    "".join(table).encode("utf-8")  # refuses lone surrogates: answers and log may repeat a name
    return table


# json.loads() with options would make one at each call.
_JSON_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant)


def load_object(text: str) -> dict[str, Any]:
    """The JSON object in a text from outside, without duplicate keys or NaN. Raises ValueError."""
    check_depth(text.encode("utf-8", "surrogatepass"))
    parsed = _JSON_DECODER.decode(text)
    if not isinstance(parsed, dict):
        raise ValueError("it is not a JSON object")
    return parsed


def _keys(raw: str) -> dict[str, str]:
    parsed = load_object(raw or "{}")
    if "default" in parsed:
        raise ValueError
    for key_id, secret in parsed.items():
        _matching("[A-Za-z0-9._-]{1,64}")(key_id)
        _secret(secret)
    return parsed


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(raw: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", raw) or not low <= int(raw) <= high:
            raise ValueError
        return int(raw)

    return parse


def _number(unit: str, low: int, high: int) -> Kind:
    return _integer(low, high), f"{unit}, {low} to {high}"


def _seconds(low: float, high: int) -> Kind:
    def parse(raw: str) -> float:
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,6})?", raw) or not low <= float(raw) <= high:
            raise ValueError
        return float(raw)

    return parse, f"seconds, {low} to {high}"


def _scrub_seconds(raw: str) -> int:
    """0, or at least ONLINE_SECONDS: a younger session still carries packets."""
    return 0 if raw == "0" else _integer(ONLINE_SECONDS, 365 * 86400)(raw)


def _boolean(raw: str) -> bool:
    return _matching("true|false")(raw) == "true"


def _schemes(raw: str) -> tuple[str, ...]:
    words = tuple(word.strip() for word in raw.split(","))
    if any(word not in ("legacy", "rfc9421") for word in words):
        raise ValueError
    return words


def _without_scope(given: Any) -> str:
    """The text of an address or network. A scope id (%eth0), which may be any text, is refused."""
    if not isinstance(given, str) or "%" in given:
        raise ValueError
    return given


def _address(raw: str) -> str:
    return str(ipaddress.ip_address(_without_scope(raw)))


def _network(given: Any) -> IPv4or6Network:
    return ipaddress.ip_network(_without_scope(given))


def _networks(raw: str) -> tuple[IPv4or6Network, ...]:
    networks = tuple(_network(part.strip()) for part in raw.split(",") if part.strip())
    if raw and not networks:  # a lone comma: none would mean that everybody is allowed
        raise ValueError
    return networks


# No peer can have one of these: unspecified, loopback, multicast, IPv6 addresses that contain an
# IPv4 one in their last 32 bits (their text has two forms), and link-local IPv6, which the kernel
# never forwards.
_UNUSABLE = [
    *map(ipaddress.ip_network, ("0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/4")),
    *map(ipaddress.ip_network, ("::/96", "::ffff:0:0/96", "fe80::/10", "ff00::/8")),
]


def _subnet(version: int, longest: int) -> Kind:
    def parse(raw: str) -> IPv4or6Network | None:
        if not raw:
            return None
        network = _network(raw)
        if network.version != version or not 1 <= network.prefixlen <= longest:
            raise ValueError
        if any(network.overlaps(cast(Any, other)) for other in _UNUSABLE):
            raise ValueError
        return network

    accepts = f"a unicast IPv{version} subnet without host bits, /1 to /{longest}, or nothing"
    return parse, accepts


def _ports(raw: str) -> tuple[int, ...]:
    port = _integer(1, 65535)
    return tuple(port(part.strip()) for part in raw.split(",") if part.strip())


def _interface_name(raw: str) -> str | None:
    if raw in ("all", "default"):  # names in /proc/sys/net/ipv4/conf: no kernel makes such a link
        raise ValueError
    return _matching(r"[A-Za-z0-9_=+-][A-Za-z0-9_=+.-]{0,14}|")(raw) or None


class PublicEndpoint(NamedTuple):
    """Where clients find the gateway: an address or name, and the public port if it differs."""

    host: str = ""
    port: int | None = None


_LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")


def _domain(raw: str) -> str:
    """A DNS name. No name ends in a label of digits, so that one is a mistyped address."""
    labels = raw.removesuffix(".").split(".")
    if len(raw) > 254 or labels[-1].isdigit() or not all(map(_LABEL.fullmatch, labels)):
        raise ValueError
    return raw


def _endpoint(raw: str) -> PublicEndpoint:
    """host, host:port, an IPv6 address, or [address]:port."""
    six = "[0-9A-Fa-f:.]+"
    match = re.fullmatch(rf"(?:\[({six})\]|([^:]{{1,254}}))(?::([0-9]{{1,5}}))?|({six})", raw)
    if match is None:
        raise ValueError
    bracketed, host, port, bare = match.groups()
    host = _dns_server(host)[1] if host else str(ipaddress.IPv6Address(bracketed or bare))
    if host in ("0.0.0.0", "::"):  # noqa: S104  no client can send a packet there
        raise ValueError
    return PublicEndpoint(host, _integer(1, 65535)(port) if port else None)


def _names(raw: str) -> tuple[str, ...]:
    names = tuple(name.strip("[]") for name in re.split("[, ]+", raw) if name)
    if not all(map(is_host_name, names)):
        raise ValueError
    return names


def is_host_name(text: str) -> bool:
    """Whether a certificate can name it: an address or a host name."""
    try:
        return bool(_address(text))
    except ValueError:
        return re.fullmatch(r"[A-Za-z0-9*](?:[A-Za-z0-9-]|\.(?!\.)){0,252}", text) is not None


_AUTHORITY = r"(?:[A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
_URL_PATH = r"(?:/[A-Za-z0-9._~-]+)*/?"  # characters that need no percent-encoding
_BUCKET = r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"
# Plain http only on loopback: nothing authenticates its answers.
_LOOPBACK_URL = r"http://(?:localhost|127\.[0-9.]+|\[::1\])(?::[0-9]{1,5})?"


def _url(pattern: str) -> Callable[[str], str]:
    def parse(raw: str) -> str:
        _matching(pattern)(raw)
        if urllib.parse.urlsplit(raw).port == 0:  # one that is too large raises ValueError
            raise ValueError
        return raw

    return parse


def _dns_servers(raw: str) -> dict[str, tuple[str, ...]]:
    parsed = load_object(raw)
    if not parsed or parsed.keys() & {"", NO_DNS}:
        raise ValueError
    choices: dict[str, tuple[str, ...]] = {}
    for choice, value in parsed.items():
        given = value.split(",") if isinstance(value, str) else value
        if not isinstance(given, list):
            raise ValueError
        servers = sorted((_dns_server(text.strip()) for text in given), key=lambda each: each[0])
        if not servers or servers[0][0]:
            raise ValueError
        choices[choice] = tuple(text for _, text in servers)
    return {**choices, NO_DNS: ()}


def _dns_server(text: str) -> tuple[bool, str]:
    """(False, address of a server), or (True, search domain)."""
    try:
        return False, _address(text)
    except ValueError:
        return True, _domain(text)


class ServiceClass(NamedTuple):
    """The limits of a peer in this class: bytes a second to it and from it, and destinations.

    None means no limit.
    """

    down: int | None
    up: int | None
    destinations: tuple[IPv4or6Network, ...] | None


_BIT_RATE = re.compile(r"([0-9]{1,9})(?:\.([0-9]{1,3}))?(|k|m|g)bit")
_LEAST_RATE = 1000  # bytes a second: less stalls the TLS handshakes of clients


def parse_bit_rate(given: Any) -> int:
    """Bytes a second of a text such as "100mbit"; suffixes are tc's, in powers of 1000."""
    match = _BIT_RATE.fullmatch(given.lower()) if isinstance(given, str) else None
    if match is None:
        raise ValueError
    whole, part, suffix = match.groups()
    thousandths = int(whole + (part or "").ljust(3, "0"))
    rate = thousandths * {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}[suffix] // 8000
    if not _LEAST_RATE <= rate < 2**40:
        raise ValueError
    return rate


def _service_classes(raw: str) -> dict[str, ServiceClass]:
    """Unknown members are refused: a misspelt limit would not be in force."""
    parsed = load_object(raw or "{}")
    if len(parsed) > MAX_CLASSES:
        raise ValueError
    classes: dict[str, ServiceClass] = {}
    for name, given in parsed.items():
        _matching("[A-Za-z][A-Za-z0-9_-]{0,31}")(name)
        if not isinstance(given, dict) or given.keys() - {"down", "up", "destinations"}:
            raise ValueError
        networks = given.get("destinations")
        if networks is not None and not (isinstance(networks, list) and networks):
            raise ValueError
        classes[name] = ServiceClass(
            parse_bit_rate(given["down"]) if given.get("down") is not None else None,
            parse_bit_rate(given["up"]) if given.get("up") is not None else None,
            None if networks is None else tuple(map(_network, networks)),
        )
    return classes


_SECRET: Kind = (_secret, "a text of 16 characters or more")
_BOOLEAN: Kind = (_boolean, "true or false")
_PATH: Kind = (_text, "a path")
_PEM: Kind = (_text, "the path of a PEM file")
_PORT = _number("a port", 1, 65535)
_PORTS: Kind = (_ports, "comma-separated ports")
_NETWORKS: Kind = (_networks, "comma-separated CIDRs without host bits")
_IPV4_SUBNET, _IPV6_SUBNET = _subnet(4, 30), _subnet(6, 126)
_REGION: Kind = (_matching(r"[a-z0-9-]{1,64}"), "a region such as eu-central-1")
_AWS_ENDPOINT: Kind = (
    _url(rf"(?:https://{_AUTHORITY}|{_LOOPBACK_URL}){_URL_PATH}"),
    "https://host[:port], or http:// on loopback",
)


def _setting(
    default: str | None, parse: Parser, accepts: str, secret: bool = False, required: bool = False
) -> Any:
    return field(repr=not secret, metadata={"row": (default, parse, accepts, secret, required)})


@dataclass(frozen=True)
class Config:
    """The parsed settings, and the table of settings: each field is a setting in lower case."""

    # fmt: off
    gateway_api_key: str = _setting(None, *_SECRET, secret=True, required=True)
    gateway_api_keys: Mapping[str, str] = _setting(
        "", _keys,
        'JSON with unique names, {"key-id": "secret", ...}: ids of A-Z a-z 0-9 . _ - '
        '(not "default"), secrets of 16 characters or more', secret=True)
    gateway_public_key: str | None = _setting(None, *_SECRET, secret=True)
    max_timestamp_diff: int = _setting("60", *_number("seconds", 1, 3600))
    auth_schemes: tuple[str, ...] = _setting("legacy,rfc9421", _schemes, "legacy, rfc9421 or both")
    allowed_backends: tuple[IPv4or6Network, ...] = _setting("", *_NETWORKS)
    # Open by default: signatures and ALLOWED_BACKENDS protect the API.
    api_host: str = _setting("0.0.0.0", _address, "an IP address")  # noqa: S104
    api_port: int = _setting("8000", *_PORT)
    tls_cert: str = _setting("cert.pem", *_PEM)
    tls_key: str = _setting("key.pem", *_PEM)
    tls_names: tuple[str, ...] = _setting("", _names, "comma-separated host names and addresses")
    tls_client_ca: str | None = _setting(None, *_PEM)
    wg_interface: str | None = _setting(
        "wg0", _interface_name, "an interface name, at most 15 characters, or nothing")
    wg_ipv4_subnet: ipaddress.IPv4Network | None = _setting("10.0.1.0/24", *_IPV4_SUBNET)
    wg_ipv6_subnet: ipaddress.IPv6Network | None = _setting("fd42:4242:1::/64", *_IPV6_SUBNET)
    wg_default_port: int = _setting("51820", *_PORT)
    wg_extra_ports: tuple[int, ...] = _setting("", *_PORTS)
    wg_endpoint: PublicEndpoint | None = _setting(
        None, _endpoint, "a host name or address, with :port where the public one differs")
    wg_private_key_file: str = _setting(DEFAULT_KEY_FILE, *_PATH)
    wg_backend: str = _setting("auto", *_one_of("auto", "netlink", "uapi", "memory"))
    limit_ssh: int | None = _setting(None, _integer(1, 65535), "a TCP port, 1 to 65535, or nothing")
    wg_isolate: bool = _setting("true", *_BOOLEAN)
    wg_mtu: int = _setting("1420", *_number("bytes", 1280, 65535))
    awg_interface: str | None = _setting(
        None, _interface_name, "an interface name, at most 15 characters")
    awg_ipv4_subnet: ipaddress.IPv4Network | None = _setting(None, *_IPV4_SUBNET)
    awg_ipv6_subnet: ipaddress.IPv6Network | None = _setting(None, *_IPV6_SUBNET)
    awg_port: int = _setting("51821", *_PORT)
    awg_extra_ports: tuple[int, ...] = _setting("", *_PORTS)
    awg_private_key_file: str | None = _setting(None, *_PATH)
    awg_params: str | None = _setting(
        None, _text, "AmneziaWG's parameters as JSON, or a file's path", secret=True)
    dns_servers: Mapping[str, tuple[str, ...]] = _setting(
        '{"d1":"1.1.1.1","d2":"8.8.8.8","d3":"9.9.9.9"}', _dns_servers,
        'JSON with unique names, {"choice": "address[,address or search domain]", ...}; "none" '
        "always exists")
    service_classes: Mapping[str, ServiceClass] = _setting(
        "", _service_classes,
        'JSON with unique names, {"name": {"down": "100mbit", "up": "20mbit", '
        '"destinations": ["10.0.0.0/8"]}, ...}: each member may be left out; rates of 8kbit or '
        "more in bit, kbit, mbit or gbit")
    move_peers: bool = _setting("false", *_BOOLEAN)
    db_path: str = _setting("./wireguard.db", *_PATH)
    durability: str = _setting("commit", *_one_of("commit", "interval", "none"))
    snapshot_interval: float = _setting("300", *_seconds(0.1, 86400))
    snapshot_key: str | None = _setting(None, *_SECRET, secret=True)
    snapshot_url: str | None = _setting(
        None, _url(rf"https://{_AUTHORITY}{_URL_PATH}|s3://{_BUCKET}{_URL_PATH}"),
        "https://host[:port]/path or s3://bucket[/prefix], of A-Z a-z 0-9 . _ ~ -")
    snapshot_token: str | None = _setting(
        None, _header_value, "a bearer token without spaces", secret=True)
    snapshot_required: bool = _setting("true", *_BOOLEAN)
    snapshot_copy_interval: float = _setting("10", *_seconds(0.1, 3600))
    snapshot_fence: bool = _setting("false", *_BOOLEAN)
    snapshot_lineage: str = _setting(
        "", _matching("[0-9a-f]{32}|"), "32 hexadecimal digits, or nothing")
    aws_access_key_id: str | None = _setting(None, _header_value, "an access key")
    aws_secret_access_key: str | None = _setting(None, _header_value, "a secret key", secret=True)
    aws_session_token: str | None = _setting(None, _header_value, "a session token", secret=True)
    aws_region: str | None = _setting(None, *_REGION)
    aws_default_region: str | None = _setting(None, *_REGION)
    aws_endpoint_url: str | None = _setting(None, *_AWS_ENDPOINT)
    aws_endpoint_url_s3: str | None = _setting(None, *_AWS_ENDPOINT)
    sample_interval: float = _setting("10", *_seconds(0.1, 3600))
    log_level: str = _setting("info", *_one_of("debug", "info", "warning", "error"))
    metrics_token: str | None = _setting(None, *_SECRET, secret=True)
    metrics_allowed: tuple[IPv4or6Network, ...] = _setting("", *_NETWORKS)
    max_connections: int = _setting("1024", *_number("connections", 8, 65536))
    max_connections_per_address: int = _setting("256", *_number("connections", 1, 65536))
    max_auth_failures: int = _setting("100", *_number("failures a minute", 1, 10**6))
    privacy_scrub: int = _setting("0", _scrub_seconds, "seconds, 180 to 31536000, or 0 for never")
    per_peer_metrics: bool = _setting("false", *_BOOLEAN)
    # fmt: on
    env_file: str | None = None  # the file that was read; None if there was none


SETTINGS = tuple(
    Setting(row.name.upper(), *row.metadata["row"]) for row in fields(Config) if row.metadata
)


def check_private(name: str, path: str, forbidden: int = 0o027) -> None:
    """Refuse a file with secrets whose mode has a bit of `forbidden`. Raises ConfigError, OSError.

    By default a group may read it, as Debian's group ssl-cert reads its keys. Only regular files
    are checked, no pipes.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISREG(mode) and mode & forbidden:
        raise ConfigError(
            f"{name}: {path!r} holds secrets, and others can read or change it "
            f"(mode {mode & 0o777:04o}): chmod 600 {shlex.quote(path)}"
        )


# A value without quotes, or one with quotes, or none. A space precedes the # of a comment.
_ENV_LINE = re.compile(
    r"""(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=
    (?:\s*([^"'\#\s].*?)(?:\s\#.*)?
    |(?:\s*"([^"]*)"|\s*'([^']*)')?(?:\s+\#.*)?)""",
    re.VERBOSE,
)


def read_env_file(text: str, name: str) -> dict[str, str]:
    """Parse a .env file: KEY=VALUE lines, `export`, #-comments, single or double quotes.

    Raises ConfigError with the file's name and the line's number, never its content.
    """
    values: dict[str, str] = {}
    for number, line in enumerate(map(str.strip, text.removeprefix("\ufeff").splitlines()), 1):
        if not line or line.startswith("#"):
            continue
        match = _ENV_LINE.fullmatch(line)
        if match is None:
            raise ConfigError(f"{name} line {number}: expected KEY=VALUE")
        key, plain, *quoted = match.groups("")
        values[key] = plain.rstrip() or "".join(quoted)
    return values


def load_config(
    environ: Mapping[str, str], env_file: str | None = None, key_needed: bool = True
) -> Config:
    """Read the settings: environment over file over defaults. Raises ConfigError.

    Commands that sign with another key, or do not sign, give `key_needed` as False: a required
    setting that is not set is then "".
    """
    path = Path(env_file or ".env")
    values: dict[str, str] = {}
    has_file = env_file or path.exists()
    if has_file:
        try:
            values = read_env_file(path.read_text("utf-8"), str(path))
            _check_names(values, str(path))
            if any(values.get(setting.name) for setting in SETTINGS if setting.secret):
                check_private("--env-file", str(path), 0o022)
                if path.stat().st_mode & 0o004:  # common, and no reason to refuse the start
                    LOG.warning("every user can read the secrets in %s: run chmod 600 on it", path)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--env-file {path}: cannot be read: {_reason(error)}") from None
    for name in environ:
        if near := _misspelt(name):
            LOG.warning("%s in the environment is ignored: did you mean %s?", name, near)
    values.update(environ)
    parsed = {s.name.lower(): _parse_setting(s, values, key_needed) for s in SETTINGS}
    config = Config(**parsed, env_file=str(path) if has_file else None)
    _check_together(config)
    idle = [s.name for s in SETTINGS if s.name.startswith(f"{AWG_PREFIX}_") and values.get(s.name)]
    if idle and not config.awg_interface:
        LOG.warning("%s: without effect, because AWG_INTERFACE is not set", ", ".join(idle))
    return config


def _check_names(values: Iterable[str], path: str) -> None:
    """Raises ConfigError for misspelt settings. It names no values: they may be secret."""
    misspelt = [(name, near) for name in values if (near := _misspelt(name))]
    if misspelt:
        text = "; ".join(f"{name} is unknown: did you mean {near}?" for name, near in misspelt)
        raise ConfigError(f"{path}: {text}")
    names = {setting.name for setting in SETTINGS}
    for name in values:
        if name not in names:
            LOG.warning("%s: %s is not a setting of wggw, and is ignored", path, name)


def _misspelt(name: str) -> str:
    """The setting that was almost certainly meant by a name that is none; otherwise ""."""
    names = [setting.name for setting in SETTINGS]
    if name in names:
        return ""
    meant = name.startswith(("WG_", "AWG_", "SNAPSHOT_", "GATEWAY_"))
    likeness = 0.0 if meant else 0.85  # the share of letters in common: one of ten is wrong
    near = difflib.get_close_matches(name.upper()[:MAX_TEXT], names, 1, likeness)
    return near[0] if near else ""


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
    """Rules that concern more than one setting."""
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
            "AWS_SECRET_ACCESS_KEY: set both"
        )
    if config.metrics_allowed and not config.metrics_token:
        raise ConfigError("METRICS_ALLOWED needs METRICS_TOKEN: set both or neither")
    for cert, key in ((config.tls_cert, config.tls_key), (config.tls_key, config.tls_cert)):
        if os.path.exists(cert) and not os.path.exists(key):
            raise ConfigError(
                f"TLS_CERT, TLS_KEY: {cert!r} exists but {key!r} does not: provide both files, or "
                "remove both, and the gateway makes a pair"
            )
    paths = {os.path.realpath(path) for path in (config.tls_cert, config.tls_key)}
    if len(paths) == 1 and not os.path.exists(config.tls_key):
        raise ConfigError(
            f"TLS_CERT, TLS_KEY: both are {config.tls_cert!r}, which does not exist: name two "
            "files, and the gateway makes a pair, or put a certificate and its key there"
        )


def api_sources(config: Config) -> tuple[IPv4or6Network, ...]:
    """The networks that may connect to the API's port, besides loopback. Empty: every network."""
    return (*config.allowed_backends, *config.metrics_allowed) if config.allowed_backends else ()


def _check_apart(first: InterfaceSettings, second: InterfaceSettings) -> None:
    """Two interfaces must not share a name, a port, an address or a key. Raises ConfigError."""
    if first.name == second.name:
        raise ConfigError(
            f"{second.prefix}_INTERFACE: {second.name!r} is also {first.prefix}_INTERFACE: "
            "choose another name"
        )
    common = sorted(set(first.ports) & set(second.ports))
    if common:
        raise ConfigError(
            f"{second.prefix}_PORT, {second.prefix}_EXTRA_PORTS: {common[0]} is also a port of "
            f"{first.name}: choose another port"
        )
    public = first.public.port if first.public else None
    if public in second.ports:
        raise ConfigError(
            f"WG_ENDPOINT: clients of {first.name} and of {second.name} would both get port "
            f"{public}: choose another port for one of them"
        )
    for family, subnet in second.subnets.items():
        other = first.subnets.get(family)
        if other is not None and subnet.overlaps(cast(Any, other)):
            raise ConfigError(
                f"{second.prefix}_{family.upper()}_SUBNET: {subnet} overlaps "
                f"{other} of {first.name}: choose another subnet"
            )
    if os.path.realpath(first.private_key_file) == os.path.realpath(second.private_key_file):
        raise ConfigError(
            f"{second.prefix}_PRIVATE_KEY_FILE: {second.private_key_file!r} is also the key of "
            f"{first.name}: choose another file"
        )


MARK = "wggw"  # the first word in the alias of every interface that a gateway made


class InterfaceSettings(NamedTuple):
    """The settings of one interface; their names begin with `prefix`.

    `ports` are the ports that peers may use, the listen port first. `mark`: see interface_mark().
    `kept` are addresses of the gateway in former subnets: see settings_with_kept().
    """

    prefix: str
    name: str
    subnets: Mapping[str, IPv4or6Network]
    ports: tuple[int, ...]
    mtu: int
    private_key_file: str
    mark: str = MARK
    public: PublicEndpoint | None = None
    kept: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The kernel's name of this kind of interface."""
        return WG_GENL_NAME if self.prefix == PLAIN_PREFIX else AWG_GENL_NAME

    @property
    def gateways(self) -> tuple[str, ...]:
        """The gateway's own addresses in the subnets."""
        return tuple(str(subnet.network_address + 1) for subnet in self.subnets.values())

    def endpoint(self, port: int) -> str | None:
        """host:port for clients that use this port, None without WG_ENDPOINT."""
        if self.public is None:
            return None
        host, public_port = self.public
        if public_port and port == self.ports[0]:
            port = public_port
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def interface_mark(path: str) -> str:
    """The alias of this gateway's interfaces: the only thing by which it recognises them.

    It contains the path of the settings file, which differs between the gateways of one host, and
    which commands know even if the file is broken or missing. Without a settings file it contains
    the path of the database.
    """
    path = os.path.abspath(path)
    mark = f"{MARK} {path}"
    if path.isprintable() and len(os.fsencode(mark)) <= MAX_ALIAS:
        return mark
    return f"{MARK} {hashlib.sha256(os.fsencode(path)).hexdigest()}"


def interface_settings(config: Config) -> tuple[InterfaceSettings, ...]:
    """The configured interfaces: WireGuard's, AmneziaWG's, or both."""
    directory, file_name = os.path.split(config.wg_private_key_file)
    beside = os.path.join(directory, f"awg-{file_name}")
    mark = interface_mark(config.env_file or config.db_path)
    public = config.wg_endpoint
    rows: list[InterfaceSettings] = []
    for prefix, port, key_file in (
        (PLAIN_PREFIX, config.wg_default_port, config.wg_private_key_file),
        (AWG_PREFIX, config.awg_port, config.awg_private_key_file or beside),
    ):
        name, extra_ports, *subnets = (
            getattr(config, f"{prefix.lower()}_{setting}")
            for setting in ("interface", "extra_ports", "ipv4_subnet", "ipv6_subnet")
        )
        if name is None:
            continue
        given = {f: subnet for f, subnet in zip(FAMILIES, subnets, strict=True) if subnet}
        ports = (port, *extra_ports)
        row = InterfaceSettings(prefix, name, given, ports, config.wg_mtu, key_file, mark, public)
        rows.append(row)
        # A port in WG_ENDPOINT belongs to the first interface: two interfaces cannot share a port.
        public = public and public._replace(port=None)
    return tuple(rows)


def _reason(error: BaseException) -> str:
    """An error in the system's words, without the paths or values that it may contain."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return type(error).__name__


# ==================================================================================================
# values: frozen values and their strict parsers; no repr shows a secret. No input or output here.
#
# Bytes from outside are decoded once, by the parsers of this section, into values that nothing
# changes afterwards; all other sections trust these values.
# ==================================================================================================

FAMILIES = ("ipv4", "ipv6")
STATUSES = ("active", "suspended")
REASONS = ("expired", "quota")  # why the gateway suspends a peer
PERIODS = ("day", "week", "month")  # a quota starts again at the start of each, in UTC
ADDRESS_FIELD = {"ipv4": "assigned_ip", "ipv6": "assigned_ipv6"}


class Peer(NamedTuple):
    """A peer as the backend wants it: a row of the store, in the order of its columns.

    Addresses are canonical text; times are Unix seconds; tunnel_traffic is "ipv4", "ipv6" or
    "ipv4,ipv6"; obfuscation is the client's own AmneziaWG values as JSON text. Where dns or port is
    None, the setting's default applies, also after it has changed. `id` orders the list and never
    changes. quota_base is the peer's total traffic in bytes when its quota was last reset.
    """

    id: int
    public_key: str
    interface: str
    status: str
    status_reason: str | None
    assigned_ip: str | None
    assigned_ipv6: str | None
    tunnel_traffic: str
    dns: str | None
    port: int | None
    preshared_key: str | None
    persistent_keepalive: int
    expires_at: int | None
    quota_bytes: int | None
    created_at: int
    request_id: str | None
    obfuscation: str | None
    label: str | None = None
    service_class: str | None = None
    quota_period: str | None = None
    quota_base: int = 0

    def __repr__(self) -> str:
        return f"Peer({short_key(self.public_key)}, {self.interface}, {self.status})"


class WirePeer(NamedTuple):
    """A peer as an interface holds it: raw keys, and allowed IPs as packed address + prefix byte.

    preshared_key is empty when the peer has none. allowed_ips are sorted, so that == compares two
    peers. service_class is the class that nftables enforces for the peer's addresses, "" for none.
    """

    public_key: bytes
    preshared_key: bytes
    allowed_ips: tuple[bytes, ...]
    service_class: str = ""

    def __repr__(self) -> str:
        return f"WirePeer({short_key(encode_key(self.public_key))})"


class PeerState(NamedTuple):
    """A peer as an interface reports it; last_handshake is in Unix seconds, 0 for never.

    `located` says whether the interface knows an endpoint, the client's address on the internet.
    The gateway never reads the address itself.
    """

    peer: WirePeer
    last_handshake: int
    rx_bytes: int
    tx_bytes: int
    located: bool = False


class Change(NamedTuple):
    """A change of an interface: it sets `peer`, or removes `public_key` when `peer` is None."""

    public_key: bytes
    peer: WirePeer | None


def short_key(public_key: str) -> str:
    """The beginning of a public key: enough to find the peer that a log line is about."""
    return public_key[:8]


def show_peers(count: int) -> str:
    """`1 peer`, `2 peers`."""
    return f"{count} peer{'s' * (count != 1)}"


def encode_key(raw: bytes) -> str:
    return binascii.b2a_base64(raw, newline=False).decode("ascii")


# The last of the 43 digits carries four bits of the key; its other two bits are zero.
_KEY = re.compile(r"[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=")
NO_KEY = "A" * 43 + "="  # 32 zero bytes, which WireGuard takes for "no key"


def decode_key(text: str) -> bytes:
    """44 characters of canonical base64 -> 32 bytes. Raises ValueError."""
    if not _KEY.fullmatch(text):
        raise ValueError("not a key")
    return binascii.a2b_base64(text)


def key_from_path(segment: str) -> str | None:
    """The key in a path in any form (percent-encoding, _ and -, no final =), or None."""
    if len(segment) > 3 * len(NO_KEY):  # longer than a key with each character percent-encoded
        return None
    text = urllib.parse.unquote(segment).replace("_", "/").replace("-", "+").removesuffix("=") + "="
    return text if _KEY.fullmatch(text) else None


def pack_network(address: str) -> bytes:
    """An address's text as an allowed IP of one host: packed address + prefix length byte."""
    if ":" in address:
        return socket.inet_pton(socket.AF_INET6, address) + b"\x80"
    return socket.inet_pton(socket.AF_INET, address) + b"\x20"


def wire_peer(peer: Peer) -> WirePeer:
    """The peer as an interface must hold it while it is active."""
    return encode_wire(
        peer.public_key,
        peer.preshared_key,
        peer.service_class,
        peer.assigned_ip,
        peer.assigned_ipv6,
    )


def encode_wire(
    public_key: str, preshared_key: str | None, service_class: str | None, *addresses: str | None
) -> WirePeer:
    return WirePeer(
        binascii.a2b_base64(public_key),
        binascii.a2b_base64(preshared_key) if preshared_key else b"",
        tuple(sorted([pack_network(address) for address in addresses if address])),
        service_class or "",
    )


_ROW_RANGES = {
    "id": (1, MAX_INTEGER // 2),
    "port": (1, 65535),
    "persistent_keepalive": (0, 65535),
    "created_at": (0, MAX_TIME),
    "expires_at": (0, MAX_TIME),
    "quota_bytes": (0, MAX_INTEGER),
    "quota_base": (0, 2 * MAX_TOTAL),
}
_ROW_WORDS = {
    "status": STATUSES,
    "quota_period": PERIODS,
    "tunnel_traffic": (*FAMILIES, ",".join(FAMILIES)),
}
_NEVER_NULL = {
    *("id", "public_key", "interface", "status", "tunnel_traffic"),
    *("persistent_keepalive", "created_at", "quota_base"),
}


def verify_peer(peer: Peer) -> None:
    """Check a row from an imported or copied file as strictly as a request's fields.

    Raises ValueError, TypeError.
    """
    for name, value in zip(Peer._fields, peer, strict=True):
        if value is None and name not in _NEVER_NULL:
            continue
        if name in _ROW_RANGES:
            low, high = _ROW_RANGES[name]
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"{name} is out of range")
        elif type(value) is not str:
            raise ValueError(f"{name} is not a text")
        elif name in _ROW_WORDS and value not in _ROW_WORDS[name]:
            raise ValueError(f"{name} is unknown")
    decode_key(peer.public_key)
    if peer.preshared_key is not None:
        decode_key(peer.preshared_key)
    for address, version in ((peer.assigned_ip, 4), (peer.assigned_ipv6, 6)):
        if address is not None and verify_address(address) != version:
            raise ValueError("an address is not of its family")
    if peer.obfuscation is not None:
        decode_own_values(peer.obfuscation)


def verify_address(text: str) -> int:
    """The version, 4 or 6, of an address. Raises ValueError unless its text is canonical."""
    address = ipaddress.ip_address(text)
    if "%" in text or str(address) != text:  # a % introduces a zone
        raise ValueError("an address is not in its canonical form")
    return address.version


@functools.lru_cache(maxsize=1024)
def rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(int(seconds), timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_rfc3339(text: str) -> int:
    """RFC 3339 section 5.6 -> Unix seconds; a fraction is dropped. Raises ValueError."""
    form = r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)"
    if not re.fullmatch(form, text, re.ASCII):
        raise ValueError("not RFC 3339")
    seconds = int(datetime.fromisoformat(text.upper()).replace(microsecond=0).timestamp())
    if not 0 <= seconds <= MAX_TIME:
        raise ValueError("out of range")
    return seconds


def period_starts(now: float) -> dict[str, int]:
    """When the current day, week (from Monday) and month began in UTC, in Unix seconds."""
    today = datetime.fromtimestamp(now, timezone.utc)
    today = today.replace(hour=0, minute=0, second=0, microsecond=0)
    starts = (today, today - timedelta(days=today.weekday()), today.replace(day=1))
    return {period: int(day.timestamp()) for period, day in zip(PERIODS, starts, strict=True)}


# --- AmneziaWG: what an obfuscated interface and its clients agree on (docs/AMNEZIAVPN.md) --------

GENERATIONS = ("1.0", "1.5", "2.0", "3.0", "3.1")
DEFAULT_PRESET = "default"
MAX_LOSS = 1e-4  # of data packets; given parameters that lose more get a warning
MAX_GENERATED_LOSS = 1e-7


class Span(NamedTuple):
    """A range of numbers, ends included; written "a-b", or "a" when it is one number."""

    low: int
    high: int

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


class Obfuscation(NamedTuple):
    """An AmneziaWG interface's parameters, under their UAPI names.

    The defaults are a new interface's values: such an interface speaks plain WireGuard.
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

    @property
    def headers(self) -> tuple[Span, ...]:
        return self.h1, self.h2, self.h3, self.h4

    @property
    def packets(self) -> tuple[str, ...]:
        return self.i1, self.i2, self.i3, self.i4, self.i5

    def __repr__(self) -> str:  # the header protection key is a secret
        return f"Obfuscation(jc={self.jc}, s1={self.s1}, s2={self.s2})"


class ObfuscationState(NamedTuple):
    """An interface's generation and parameters; `version` counts changes that cut clients off."""

    version: int
    generation: str
    parameters: Obfuscation


class ObfuscationRequest(NamedTuple):
    """The `obfuscation` of a create: whether it is wanted, and values under their UAPI names."""

    enabled: bool
    values: Mapping[str, Any]


def _awg_number(value: Any, high: int) -> int:
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,10}", value):
        value = int(value)
    if type(value) is not int or not 0 <= value <= high:
        raise ValueError
    return value


def parse_span(value: Any, high: int = 2**32 - 1) -> Span:
    low, dash, top = value.partition("-") if isinstance(value, str) else (value, "", "")
    span = Span(_awg_number(low, high), _awg_number(top if dash else low, high))
    if span.low > span.high:
        raise ValueError
    return span


class PacketTag(NamedTuple):
    """A tag of I1 to I5; `since` is the first generation of amneziawg-go that knows it.

    check_generation() and AWG_WARNINGS name the tags that later generations dropped.
    """

    argument: str  # "0xHEX", "N" or none
    unit: int  # bytes that it adds to the packet: for each of N, or in all
    since: str


PACKET_TAGS: dict[str, PacketTag] = {
    "b": PacketTag("0xHEX", 1, "1.5"),
    "r": PacketTag("N", 1, "1.5"),  # random bytes
    "t": PacketTag("", 4, "1.5"),  # the time
    "c": PacketTag("", 4, "1.5"),  # a counter; kernel modules of all generations know it
    "wt": PacketTag("N", 0, "1.5"),  # a pause of N milliseconds
    "rd": PacketTag("N", 1, "2.0"),  # random digits
    "rc": PacketTag("N", 1, "2.0"),  # random letters
    "d": PacketTag("", 0, "3.0"),  # a payload, which I1 to I5 do not have
    "ds": PacketTag("", 0, "3.0"),
    "dz": PacketTag("N", 1, "3.0"),  # its size
}
KERNEL_TAGS = frozenset({"b", "c", "t", "r", "rc", "rd"})  # jp_parse_tags() of junk.c
_PACKET_TAG = re.compile(r" *<([a-z]{1,2})(?: ([0-9a-zA-Z]+))?>")
_TAG_NAME = re.compile("<([a-z]+)")


def packet_size(text: str) -> int:
    """Bytes of the packet that a sequence of tags describes. Raises ValueError."""
    size = position = 0
    while position < len(text):
        tag = _PACKET_TAG.match(text, position)
        if tag is None or tag[1] not in PACKET_TAGS:
            raise ValueError("not a sequence of tags")
        size += _tag_size(PACKET_TAGS[tag[1]], tag[2] or "")
        position = tag.end()
    return size


def _tag_size(row: PacketTag, argument: str) -> int:
    if row.argument == "0xHEX" and re.match("0x[0-9a-fA-F]", argument):
        return len(bytes.fromhex(argument[2:]))
    if row.argument == "N" and len(argument) <= 5 and argument.isdecimal():
        return int(argument) * row.unit
    if row.argument or argument:
        raise ValueError("a tag's argument")
    return row.unit


def _awg_packet(value: Any, _: int) -> str:
    if not isinstance(value, str) or len(value) > MAX_DECOY_TEXT:
        raise ValueError
    text = value.strip(" ")
    if text and not 1 <= packet_size(text) <= MAX_DATAGRAM:
        raise ValueError
    return text


def _awg_key(value: Any, _: int) -> bytes:
    if value == "":
        return b""
    raw = decode_key(value)
    if not any(raw):
        raise ValueError
    return raw


# `awg showconf` writes on and off, and `awg setconf` takes them in any case; JSON has true, 1, too.
_FLAGS = {"on": True, "off": False, "true": True, "false": False, "1": True, "0": False}
_TAG_TEXT = ", ".join(f"<{name} {row.argument}".rstrip() + ">" for name, row in PACKET_TAGS.items())
# For each kind a parser, which takes a value and the highest number, and what the parser accepts.
AWG_KINDS: dict[str, tuple[Callable[[Any, int], Any], str]] = {
    "size": (_awg_number, "a number, 0 to {}"),
    "header": (parse_span, 'a number of 32 bits or a range "a-b" of them'),
    "packet": (_awg_packet, f"a sequence of {_TAG_TEXT} for 1 to {MAX_DATAGRAM} bytes, or empty"),
    "key": (_awg_key, "44 characters of base64, not zero"),
    "range": (parse_span, 'a number, 0 to {}, or a range "a-b" of them'),
    "flag": (lambda value, _: _FLAGS[str(value).lower()], "on or off"),
}


class AwgParameter(NamedTuple):
    """A row of the parameters' table. `shared`: both sides must have the same value.

    `kind` selects the parser and the interface's encoding, `attribute` is netlink's number, `high`
    the highest number.
    """

    spelling: str
    attribute: int
    kind: str
    since: str
    shared: bool = False
    high: int = 65535


# Bytes of the packets that S1 to S4 pad: handshake, response, cookie reply, and the shortest data
# packet, a keepalive.
PADDED_SIZES = {"s1": 148, "s2": 92, "s3": 64, "s4": 32}

# The programs and UDP set these limits. AWG_WARNINGS names what is unwise within them.
AWG_PARAMETERS: dict[str, AwgParameter] = {
    "jc": AwgParameter("Jc", 9, "size", "1.0"),
    "jmin": AwgParameter("Jmin", 10, "size", "1.0", high=MAX_DATAGRAM),
    "jmax": AwgParameter("Jmax", 11, "size", "1.0", high=MAX_DATAGRAM),
    "s1": AwgParameter("S1", 12, "size", "1.0", True, MAX_DATAGRAM - PADDED_SIZES["s1"]),
    "s2": AwgParameter("S2", 13, "size", "1.0", True, MAX_DATAGRAM - PADDED_SIZES["s2"]),
    "s3": AwgParameter("S3", 19, "size", "2.0", True, MAX_DATAGRAM - PADDED_SIZES["s3"]),
    "s4": AwgParameter("S4", 20, "size", "2.0", True, MAX_DATAGRAM - PADDED_SIZES["s4"]),
    **{
        f"h{n}": AwgParameter(f"H{n}", 13 + n, "header", "1.0", True, 2**32 - 1)
        for n in range(1, 5)
    },
    **{f"i{n}": AwgParameter(f"I{n}", 20 + n, "packet", "1.5") for n in range(1, 6)},
    "header_protection_key": AwgParameter("HeaderProtectionKey", 26, "key", "3.0", True),
    "content_padding_addition": AwgParameter("ContentPaddingAddition", 27, "range", "3.0"),
    "rekey_after_time": AwgParameter("RekeyAfterTime", 28, "range", "3.0"),
    "rekey_timeout": AwgParameter("RekeyTimeout", 29, "range", "3.0"),
    "reject_after_time": AwgParameter("RejectAfterTime", 30, "range", "3.0"),
    "keepalive_timeout": AwgParameter("KeepaliveTimeout", 31, "range", "3.0"),
    "max_handshake_attempts": AwgParameter("MaxHandshakeAttempts", 32, "range", "3.0"),
    # A receiver without RandomTrailers drops every handshake packet of another size.
    "random_trailers": AwgParameter("RandomTrailers", 33, "flag", "3.1", True),
    "disable_cookies": AwgParameter("DisableCookies", 34, "flag", "3.1"),
}

PLAIN = Obfuscation()
AWG_SHARED = tuple(name for name, row in AWG_PARAMETERS.items() if row.shared)
AWG_OWN = tuple(name for name, row in AWG_PARAMETERS.items() if not row.shared)
_AWG_NAMES = {key: name for name, row in AWG_PARAMETERS.items() for key in (name, row.spelling)}
_HEADERS = ("h1", "h2", "h3", "h4")
_JUNK = ("jc", "jmin", "jmax")
_PACKETS = ("i1", "i2", "i3", "i4", "i5")


def data_loss(given: Obfuscation) -> tuple[float, int]:
    """The loss of data packets that a set of parameters causes in each direction.

    That is the probability that a receiver takes a data packet for another kind and drops it, and
    the size on the wire of the packets that this hits most, in bytes; 0 is every long packet.

    A receiver takes a packet for a handshake, a response or a cookie reply when the packet has the
    padded size of that kind (with random trailers: at least that size), and the four bytes after
    the kind's padding are in its range of headers (DeterminePacketTypeAndPadding() of
    amneziawg-go).
    """
    chances: dict[int, float] = collections.defaultdict(float)
    for padding, size in _sizes_of_data(given):
        chances[size] += _chance(given, padding)
    size, chance = max(chances.items(), key=lambda item: item[1], default=(0, 0.0))
    return min(chance, 1.0), size


def _sizes_of_data(given: Obfuscation) -> Iterator[tuple[str, int]]:
    """The paddings S1 to S3 that give a packet a data packet's size, with that size.

    Clients pad the content of data packets to a multiple of 16 bytes, or to the MTU, which is 1280
    or more. With random trailers the size is 0, because every long packet may be such a packet.

    A padding that equals S4 does no harm: both kinds then have their header at the same place,
    where a receiver tells them apart.
    """
    any_size = given.content_padding_addition != PLAIN.content_padding_addition
    for padding in ("s1", "s2", "s3"):
        size = PADDED_SIZES[padding] + getattr(given, padding)
        content = size - given.s4 - PADDED_SIZES["s4"]
        if getattr(given, padding) == given.s4:
            continue
        if given.random_trailers:
            yield padding, 0
        elif content >= 0 and (any_size or content % 16 == 0 or content >= SAFE_DATAGRAM):
            yield padding, size


def _chance(given: Obfuscation, padding: str) -> float:
    """The probability that a data packet has a header of another kind after that kind's padding.

    A data packet begins with its header, the receiver's index of four random bytes, and a counter
    of eight bytes whose upper five are zero, all of them little-endian. All other bytes are random;
    header protection makes every byte random.
    """
    offset = getattr(given, padding) - given.s4  # from the end of the data packet's padding
    header: Span = getattr(given, f"h{padding[1]}")
    known: dict[int, int] = {}
    if not given.header_protection_key:
        known = dict.fromkeys(range(11, 16), 0)
        for index in (3, 2, 1, 0):
            low, high = given.h4.low >> 8 * index, given.h4.high >> 8 * index
            if low != high:
                break
            known[index] = low & 255
    pattern = [known.get(offset + index) for index in (3, 2, 1, 0)]
    hits = _count_up_to(header.high, pattern) - _count_up_to(header.low - 1, pattern)
    return float(hits / 256 ** pattern.count(None))


def _count_up_to(limit: int, pattern: Sequence[int | None]) -> int:
    """How many 32-bit numbers up to a limit have these bytes, upper bytes first; None is any."""
    if limit < 0:
        return 0
    count = 0
    for index, byte in enumerate(pattern):
        digit = limit >> (24 - 8 * index) & 255
        below = digit if byte is None else int(byte < digit)
        count += below * int(256 ** pattern[index + 1 :].count(None))
        if byte is not None and byte != digit:
            return count
    return count + 1


def outlives(sender: Obfuscation, receiver: Obfuscation) -> bool:
    """Whether a sender still uses a session whose packets the receiver already drops.

    Without these parameters a sender renews a session after 120 seconds, and both sides end it
    after 180 (keychainExpireTime() of amneziawg-go). A client notices the loss after 15 seconds.
    """
    renewed = min(sender.rekey_after_time.high or 120, sender.reject_after_time.high or 180)
    return renewed > (receiver.reject_after_time.high or 180)


class AwgRule(NamedTuple):
    """A rule between parameters; `text` is the error or the warning about a set that breaks it."""

    text: str
    holds: Callable[[Obfuscation], bool]
    until: str = GENERATIONS[-1]  # the last generation with a program that needs the rule


# fmt: off
AWG_RULES: tuple[AwgRule, ...] = (
    AwgRule("Jmin, Jmax: Jmin must not be above Jmax", lambda p: p.jmin <= p.jmax),
    AwgRule(
        "H1, H2, H3, H4: each must be 5 or more (or all of them WireGuard's own 1, 2, 3, 4)",
        lambda p: p.headers == PLAIN.headers or min(p.headers).low >= 5),
    AwgRule(
        "H1, H2, H3, H4: must not overlap",
        lambda p: all(a.high < b.low for a, b in itertools.pairwise(sorted(p.headers)))),
    AwgRule(
        "HeaderProtectionKey, S1, S2, S3, S4: with a key each of the four must be 12 or more",
        lambda p: not p.header_protection_key or min(p.s1, p.s2, p.s3, p.s4) >= 12),
)

# No program of generation 1.5 accepts what breaks these rules, and not every program of 2.0 does.
AWG_RULES_1_5: tuple[AwgRule, ...] = (
    AwgRule(
        "I1, I2, I3, I4, I5: a gap between them is refused by amneziawg-go up to 0.2.15",
        lambda p: all(left or not right for left, right in itertools.pairwise(p.packets)), "2.0"),
    AwgRule(
        "I1, I2, I3, I4, I5: <t> or <c> twice in one of them is refused by amneziawg-go up to "
        "0.2.15",
        lambda p: all(text.count(tag) <= 1 for text in p.packets for tag in ("<t>", "<c>")), "2.0"),
    AwgRule(
        "I1, I2, I3, I4, I5: <r N>, <rd N> and <rc N> with an N above 1000 are refused by "
        "amneziawg-go up to 0.2.15",
        lambda p: all(
            int(n) <= 1000 for n in re.findall("<r[cd]? ([0-9]+)>", "".join(p.packets))), "2.0"),
)

# No kernel module accepts what breaks these rules.
AWG_KERNEL_RULES: tuple[AwgRule, ...] = (
    AwgRule(
        f"I1, I2, I3, I4, I5: with more than {SAFE_DECOY_TEXT} characters together no kernel "
        "module takes them",
        lambda p: sum(map(len, p.packets)) <= SAFE_DECOY_TEXT),
    AwgRule(
        "I1, I2, I3, I4, I5: no kernel module knows other tags than b, c, t, r, rc, rd",
        lambda p: KERNEL_TAGS.issuperset(_TAG_NAME.findall("".join(p.packets)))),
)

AWG_COUNTER = AwgRule(
    "I1, I2, I3, I4, I5: <c> is known to kernel modules, and of amneziawg-go only to 0.2.15",
    lambda p: "<c>" not in "".join(p.packets))

# Programs accept what breaks these rules, but it is unwise.
AWG_WARNINGS: tuple[AwgRule, ...] = (
    AwgRule(
        f"Jc: with more than {SAFE_JUNK_PACKETS} junk packets and I packets together, amneziawg-go "
        "crashes when it begins a handshake",
        lambda p: p.jc + sum(map(bool, p.packets)) <= SAFE_JUNK_PACKETS),
    AwgRule(
        f"Jmax: junk packets of more than {SAFE_DATAGRAM} bytes do not fit through every path",
        lambda p: p.jmax <= SAFE_DATAGRAM),
    AwgRule(
        "S1, S2, S3, S4: S1 + 148, S2 + 92, S3 + 64 and S4 + 32 should be different sizes: "
        "amneziawg-go up to 0.2.15 refuses others",
        lambda p: len({n + getattr(p, name) for name, n in PADDED_SIZES.items()}) == 4, "2.0"),
    AwgRule(
        "S1, S2, S3: data packets can have the size of a padded handshake packet: amneziawg-go "
        "0.2.15 drops those",
        lambda p: not any(_sizes_of_data(p)), "2.0"),
    AwgRule(
        f"S1, S2, S3: padded handshake packets of more than {SAFE_DATAGRAM} bytes (148, 92 and 64 "
        "without padding) do not fit through every path",
        lambda p: max(p.s1 + 148, p.s2 + 92, p.s3 + 64) <= SAFE_DATAGRAM),
    AwgRule(
        f"I1, I2, I3, I4, I5: packets of more than {SAFE_DATAGRAM} bytes do not fit through every "
        "path",
        lambda p: max(map(packet_size, p.packets)) <= SAFE_DATAGRAM),
    AwgRule(
        "RekeyTimeout, RejectAfterTime: a client that begins no new handshake for RekeyTimeout "
        "loses all packets after RejectAfterTime (180 seconds if it is not set)",
        lambda p: p.rekey_timeout.high < (p.reject_after_time.high or 180)),
    *AWG_RULES_1_5,
    *AWG_KERNEL_RULES,
    AWG_COUNTER,
)
# fmt: on


# This one concerns the interface alone.
AWG_SHORT_SESSIONS = AwgRule(
    "RejectAfterTime: below 120 seconds, clients that do not have it lose packets",
    lambda p: not outlives(PLAIN, p),
)


def broken_rules(given: Obfuscation, rules: Iterable[AwgRule]) -> list[str]:
    return [rule.text for rule in rules if not rule.holds(given)]


def obfuscation_warnings(state: ObfuscationState) -> list[str]:
    """A sentence for each thing that is unwise in a valid set of parameters."""
    given = state.parameters
    found = loss_warnings(given)
    try:
        check_generation(given, state.generation)
    except ValueError as error:  # see parse_obfuscation()
        found.append(str(error))
    rules = [row for row in AWG_WARNINGS if row.until >= state.generation]
    found += broken_rules(given, [*rules, AWG_SHORT_SESSIONS])
    return list(dict.fromkeys(found))


def loss_warnings(given: Obfuscation) -> list[str]:
    """A sentence with the figure when a set of parameters loses too many data packets."""
    probability, size = data_loss(given)
    if probability <= MAX_LOSS:
        return []
    which = f"data packets of {size} bytes" if size else "data packets"
    return [
        f"H1, H2, H3: {100 * probability:.2g} % of all {which} are taken for handshake packets and "
        "lost: single values, not ranges, lose none"
    ]


def check_obfuscation(given: Obfuscation) -> None:
    """Raise ValueError with the rule that a set of parameters breaks, and the parameters' names."""
    for text in broken_rules(given, AWG_RULES):
        raise ValueError(text)


def awg_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """Parse the parameters among a JSON object's members, in either spelling.

    Raises ValueError with a parameter's spelling and what it accepts.
    """
    values: dict[str, Any] = {}
    for key, value in given.items():
        name = _AWG_NAMES.get(key)
        if name is None or value is None:
            continue
        row = AWG_PARAMETERS[name]
        parse, accepts = AWG_KINDS[row.kind]
        if name in values:
            raise ValueError(f"{row.spelling}: is given twice")
        try:
            values[name] = parse(value, row.high)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(f"{row.spelling}: must be {accepts.format(row.high)}") from None
    return values


def parse_obfuscation(given: Mapping[str, Any], stored: bool = False) -> ObfuscationState:
    """Parse a whole set of parameters. Raises ValueError, also for unknown names.

    Without "generation", the first generation that has all of them. `stored`: the generation may be
    too old, because earlier versions generated packets for 1.5 that its programs refuse, and an
    interface still speaks them.
    """
    for key in given:
        if key not in _AWG_NAMES and key not in ("generation", "parameters_version"):
            raise ValueError(f"{str(key)[:40]}: is not a parameter of AmneziaWG")
    parameters = Obfuscation(**awg_values(given))
    check_obfuscation(parameters)
    generation = given.get("generation") or generation_of(parameters)
    if generation not in GENERATIONS:
        raise ValueError(f"generation: must be one of {', '.join(GENERATIONS)}")
    version = given.get("parameters_version", 1)
    if type(version) is not int or not 1 <= version <= MAX_INTEGER // 2:
        raise ValueError("parameters_version: must be a number, 1 or more")
    if not stored:
        check_generation(parameters, generation)
    return ObfuscationState(version, generation, parameters)


_AWG_LINES = {row.spelling.lower(): name for name, row in AWG_PARAMETERS.items()}
_OTHER_LINES = (  # the other keys of [Interface] in files of wg(8) and wg-quick(8)
    "privatekey", "listenport", "fwmark", "address", "dns", "mtu", "table", "saveconfig",
    "preup", "postup", "predown", "postdown",
)  # fmt: skip


def parse_awg_file(text: str) -> dict[str, Any]:
    """The parameters in a JSON object, or in a file as `awg showconf` writes it.

    Only the file's [Interface] counts. As in awg, the case of names and spaces in values do not
    matter, except for the spaces in I1 to I5. Raises ValueError, whose text shows no value.
    """
    if re.match(r'\s*(?:[{"]|\[(?!(?:interface|peer)\]))', text, re.IGNORECASE):
        return load_object(text)
    found: dict[str, Any] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        key, separator, value = (part.strip() for part in line.partition("="))
        if line.startswith("["):
            section = line.lower()
        elif not line or section == "[peer]" or key.lower() in _OTHER_LINES:
            continue
        elif section != "[interface]" or not separator:
            raise ValueError(f"line {number} is neither JSON nor a line of [Interface]")
        elif key.lower() not in _AWG_LINES:
            raise ValueError(f"line {number}: {key[:40]}: is not a parameter of AmneziaWG")
        else:
            name = _AWG_LINES[key.lower()]
            found[name] = value if name in _PACKETS else "".join(value.split())
    if "[interface]" not in text.lower():
        raise ValueError("it is neither JSON nor a file with [Interface]")
    return found


class Use(NamedTuple):
    """What of a parameter is set, as the subject of an error's text, and which generation has it.

    `since` is the first one.
    """

    parameter: str
    what: str
    since: str


def uses(given: Obfuscation) -> Iterator[Use]:
    """A row for each parameter that differs from a new interface's value."""
    for name, row in AWG_PARAMETERS.items():
        value = getattr(given, name)
        if value == getattr(PLAIN, name):
            continue
        since, what = row.since, "it"
        if row.kind == "header" and value.low != value.high:
            since, what = "2.0", "a range"
        if row.kind == "packet":
            since = max([since, *(PACKET_TAGS[tag].since for tag in _TAG_NAME.findall(value))])
        if row.kind == "packet" and since > row.since:
            tags = [f"<{tag}>" for tag, known in PACKET_TAGS.items() if known.since == since]
            what = f"each of {', '.join(tags)}"
        yield Use(name, f"{row.spelling}: {what}", since)


def newest_use(given: Obfuscation) -> str:
    """The first generation that knows every parameter that is set."""
    return max((use.since for use in uses(given)), default="1.0")


def generation_of(given: Obfuscation) -> str:
    """The first generation that knows every parameter that is set, and accepts the packets."""
    newest = newest_use(given)
    return "2.0" if newest == "1.5" and broken_rules(given, AWG_RULES_1_5) else newest


def check_generation(given: Obfuscation, generation: str) -> None:
    """Raise ValueError when clients of a generation do not know a parameter or refuse its value."""
    for name, what, since in uses(given):
        if since > generation:
            raise ValueError(f"{what} came with generation {since}, not {generation}")
        if name in _PACKETS and generation > "1.5" and "<wt " in getattr(given, name):
            raise ValueError(
                f"{AWG_PARAMETERS[name].spelling}: <wt> is known to generation 1.5 only, not "
                f"{generation}"
            )
    for text in broken_rules(given, AWG_RULES_1_5) if generation == "1.5" else ():
        raise ValueError(text)


def show_awg_value(value: Any) -> Any:
    """A parameter as JSON: a number, a text like "a-b", base64 or a boolean."""
    if isinstance(value, Span):
        return value.low if value.low == value.high else str(value)
    return encode_key(value) if isinstance(value, bytes) else value


def show_parameters(given: Obfuscation) -> dict[str, Any]:
    """The parameters that are set, and those that every generation has, as JSON."""
    return {
        name: show_awg_value(value)
        for name, value, default in zip(Obfuscation._fields, given, PLAIN, strict=True)
        if value != default or name in (*_JUNK, "s1", "s2", *_HEADERS)
    }


def show_state(state: ObfuscationState) -> dict[str, Any]:
    """A JSON object that parse_obfuscation() accepts."""
    return {
        "generation": state.generation,
        "parameters_version": state.version,
        **show_parameters(state.parameters),
    }


def encode_own_values(values: Mapping[str, Any]) -> str:
    """A client's own values as the text that Peer.obfuscation holds."""
    return json.dumps({name: show_awg_value(value) for name, value in values.items()})


def decode_own_values(text: str) -> dict[str, Any]:
    """Reverse encode_own_values(). Raises ValueError, TypeError."""
    given = load_object(text)
    if not given.keys() <= set(AWG_PARAMETERS):
        raise ValueError("obfuscation")
    # Earlier versions stored RandomTrailers, too: the interface's value counts now.
    return awg_values({name: value for name, value in given.items() if name in AWG_OWN})


def known_values(values: dict[str, Any], generation: str) -> dict[str, Any]:
    """A client's own values without those that a rotation to this generation made unknown."""
    with contextlib.suppress(ValueError):
        check_generation(PLAIN._replace(**values), generation)
        return values  # the usual case
    known = {
        name: value
        for name, value in values.items()
        if name not in _PACKETS and AWG_PARAMETERS[name].since <= generation
    }
    packets = {name: values[name] for name in _PACKETS if name in values}
    with contextlib.suppress(ValueError):  # all of them, or the interface's
        check_generation(PLAIN._replace(**packets), generation)
        known |= packets
    return known


def encode_state(state: ObfuscationState) -> str:
    return json.dumps(show_state(state))


def decode_state(text: str) -> ObfuscationState:
    """Reverse encode_state(). Raises ValueError."""
    return parse_obfuscation(load_object(text), stored=True)


def same_language(left: Obfuscation, right: Obfuscation) -> bool:
    """Whether a client with one set of parameters can talk to an interface with the other."""
    return not unlike(left, right, AWG_SHARED)


def unlike(left: Obfuscation, right: Obfuscation, names: Sequence[str]) -> list[str]:
    """The parameters among `names` that differ, in AmneziaWG's spelling."""
    return [AWG_PARAMETERS[n].spelling for n in names if getattr(left, n) != getattr(right, n)]


class AwgPreset(NamedTuple):
    """The ranges that random parameters come from; `packets` are templates for I1, I2, ..."""

    text: str
    since: str
    junk_count: Span
    junk_low: Span
    junk_high: Span
    padding: Span  # of S1 to S3
    transport: Span  # of S4: bytes that every data packet carries
    packets: tuple[str, ...]


# A DNS query (RFC 1035 section 4.1) for the A record of ten random letters under .com
_DNS_QUERY = "<r 2><b 0x010000010000000000000a><rc 10><b 0x03636f6d0000010001>"
PRESETS: dict[str, AwgPreset] = {
    "default": AwgPreset(
        "hides the first bytes and the sizes of handshakes; from 1.5 a random packet comes first",
        "1.0", Span(3, 5), Span(40, 40), Span(70, 70), Span(15, 150), Span(12, 20), ("<r {size}>",),
    ),
    "light": AwgPreset(
        "as default, with the fewest bytes: for mobile clients and small MTUs",
        "1.0", Span(2, 3), Span(24, 32), Span(48, 64), Span(15, 40), Span(12, 12), (),
    ),
    "strong": AwgPreset(
        "as default, and hides the handshake among many packets as large as data",
        "1.0", Span(6, 9), Span(50, 120), Span(400, 900), Span(60, 300), Span(20, 36),
        ("<r {size}>", "<rd {size}>", "<b 0x{hex}><r {size}>"),
    ),
    "dns": AwgPreset(
        "as default, with a first packet that looks like a DNS query",
        "1.5", Span(3, 5), Span(40, 40), Span(70, 70), Span(15, 150), Span(12, 20), (_DNS_QUERY,),
    ),
}  # fmt: skip


def generate_obfuscation(generation: str | None, preset: str) -> ObfuscationState:
    """Draw parameters of a generation that lose no data packets. Raises ValueError.

    None is the oldest generation that has the preset: most clients can speak it.
    """
    drawn = PRESETS[preset]
    generation = generation or drawn.since
    if generation < drawn.since:
        raise ValueError(f"preset: {preset} needs I1, which came with generation {drawn.since}")
    while True:
        parameters = Obfuscation(**_draw_values(drawn, generation))
        loses = data_loss(parameters)[0] >= MAX_GENERATED_LOSS
        # amneziawg-go 0.2.15 drops data packets that have the size of a handshake packet.
        if not loses and (generation >= "3.0" or not any(_sizes_of_data(parameters))):
            return ObfuscationState(1, generation, parameters)


_draw = secrets.SystemRandom().randint  # a number from the first to the last, both included


def _draw_values(drawn: AwgPreset, generation: str) -> dict[str, Any]:
    values: dict[str, Any] = {
        "jc": _draw(*drawn.junk_count),
        "jmin": _draw(*drawn.junk_low),
        "jmax": _draw(*drawn.junk_high),
        **_draw_paddings(drawn, generation),
        **_draw_headers(generation),
    }
    if generation >= "1.5":
        texts = (_draw_packet(template, generation) for template in drawn.packets)
        values |= {f"i{n}": text for n, text in enumerate(texts, 1)}
    if generation >= "3.0":
        values["header_protection_key"] = secrets.token_bytes(KEY_BYTES)
        values["content_padding_addition"] = Span(_draw(1, 16), _draw(32, 96))
        values["rekey_after_time"] = Span(_draw(90, 105), _draw(110, 120))
    if generation >= "3.1":
        values["random_trailers"] = True
    return values


def _draw_paddings(drawn: AwgPreset, generation: str) -> dict[str, int]:
    """Draw S1 to S4 so that all padded and unpadded packets have different sizes."""
    names = ("s1", "s2", "s3", "s4") if generation >= "2.0" else ("s1", "s2")
    while True:
        values = {n: _draw(*(drawn.transport if n == "s4" else drawn.padding)) for n in names}
        padded = {PADDED_SIZES[name] + value for name, value in values.items()}
        if len(padded) == len(names) and not padded & set(PADDED_SIZES.values()):
            return values


def _draw_headers(generation: str) -> dict[str, Span]:
    """Draw four headers in random order, one from each quarter of the positive 31-bit numbers.

    Only 2.0 gets ranges. Earlier programs do not know ranges. Later ones hide headers by header
    protection, and their content of any size would make ranges lose data packets.
    """
    spans: list[Span] = []
    for quarter in range(4):
        width = _draw(2**16, 2**24 + 2**16 - 1) if generation == "2.0" else 0
        low = _draw(max(quarter * 2**29, 5), (quarter + 1) * 2**29 - 1 - width)
        spans.append(Span(low, low + width))
    secrets.SystemRandom().shuffle(spans)
    return dict(zip(_HEADERS, spans, strict=True))


def _draw_packet(template: str, generation: str) -> str:
    text = template.format(size=_draw(24, 160), hex=secrets.token_hex(_draw(4, 12)))
    return text if generation >= "2.0" else re.sub(r"<(r[cd]) ([0-9]+)>", _draw_tag, text)


def _draw_tag(tag: re.Match[str]) -> str:
    """Random letters or digits as bytes, for programs that do not know <rc> and <rd>."""
    letters = string.ascii_lowercase if tag[1] == "rc" else string.digits
    drawn = "".join(secrets.choice(letters) for _ in range(int(tag[2])))
    return f"<b 0x{drawn.encode('ascii').hex()}>"


# --- fields of a request: a parser takes a JSON value (or a query's text) and raises ValueError ---

Schema = Mapping[str, Any]  # JSON Schema 2020-12


def _field_text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise ValueError
    value.encode("utf-8")  # raises UnicodeEncodeError, a ValueError, for a lone surrogate
    return value


def _field_long_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _field_key(value: Any) -> str:
    text = _field_text(value)
    decode_key(text)
    return text


def _field_public_key(value: Any) -> str:
    text = _field_key(value)
    if text == NO_KEY:  # no client can have it, and interfaces drop it without an error
        raise ValueError
    return text


def _field_families(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or any(entry not in FAMILIES for entry in value):
        raise ValueError
    return tuple(family for family in FAMILIES if family in value)


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


def unknown_obfuscation(value: Any) -> list[str]:
    """The members of an `obfuscation` that are neither for a request nor shown in an answer."""
    known = ("enabled", "generation", "parameters_version", "warnings")
    names = value if isinstance(value, dict) else ()
    return [f"obfuscation.{n}" for n in names if n not in _AWG_NAMES and n not in known]


def _field_known_obfuscation(value: Any) -> ObfuscationRequest:
    for name in unknown_obfuscation(value):
        raise Invalid(name[:64], "is not known here")
    return _field_obfuscation(value)


def _field_parameters(value: Any) -> ObfuscationState:
    if not isinstance(value, dict):
        raise ValueError
    try:
        return parse_obfuscation(value)
    except ValueError as error:
        raise Invalid("parameters", str(error)) from None


class Field(NamedTuple):
    """A field of a body or a query: its parser and its schema, for the API's description.

    `accepts` completes the error "must be ..."; `note` tells the API's reader what the field is
    for. In a field that is not required, null means the same as leaving it out, unless `null` is
    set: then the parser gets it.
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
        if type(value) is not int or not low <= value <= high:
            raise ValueError
        return value

    size = {"format": "int64"} if high >= 2**31 else {}
    return Field(parse, accepts, {"type": "integer", **size, "minimum": low, "maximum": high}, note)


def choice_field(words: Sequence[str], accepts: str = "", note: str = "") -> Field:
    def parse(value: Any) -> str:
        if not isinstance(value, str) or value not in words:
            raise ValueError
        return value

    return Field(parse, accepts or f"one of {', '.join(words)}", one_of(words), note)


def address_field(family: int, accepts: str, schema: Schema) -> Field:
    def parse(value: Any) -> str:  # as AddressPool writes it; ipaddress takes five times as long
        try:
            return socket.inet_ntop(family, socket.inet_pton(family, _field_text(value)))
        except OSError:
            raise ValueError from None

    return Field(parse, accepts, schema, "the address that the peer should get")


def nullable(row: Field) -> Field:
    """The field with null as another value, which is decoded to None."""
    return row._replace(
        parse=lambda value: None if value is None else row.parse(value),
        accepts=f"{row.accepts}, or null",
        schema=or_null(row.schema),
        null=True,
    )


AUTO = "auto"  # the next free address


def address_or_auto(row: Field) -> Field:
    """The field of an address that the caller may also leave to the gateway to choose."""
    return Field(
        lambda value: AUTO if value == AUTO else row.parse(value),
        f'{row.accepts}, or "{AUTO}"',
        {"type": "string"},
        "for a peer that has none in this family",
        null=True,
    )


def one_of(words: Iterable[str]) -> Schema:
    return {"type": "string", "enum": list(words)}


def or_null(schema: Schema) -> Schema:
    """The schema of a value that may also be null."""
    enum = {"enum": [*schema["enum"], None]} if "enum" in schema else {}
    return {**schema, **enum, "type": [schema["type"], "null"]}


FLAG: Schema = {"type": "boolean"}
FREE_OBJECT: Schema = {"type": "object", "additionalProperties": True}
KEY_SCHEMA: Schema = {"type": "string", "pattern": f"^{_KEY.pattern}$"}
TIME_SCHEMA: Schema = {"type": "string", "format": "date-time"}
FAMILIES_SCHEMA: Schema = {"type": "array", "items": one_of(FAMILIES)}
TEXT_SCHEMA: Schema = {"type": "string", "maxLength": MAX_TEXT}
IPV4: Schema = {"type": "string", "format": "ipv4"}
IPV6: Schema = {"type": "string", "format": "ipv6"}

# fmt: off
PUBLIC_KEY_FIELD = Field(
    _field_public_key, "44 characters of base64, a 32-byte public key", KEY_SCHEMA, required=True)
KEPT_TEXT_FIELD = Field(
    _field_text, f"a text of at most {MAX_TEXT} characters", TEXT_SCHEMA,
    "kept, shown and searched for")
INTERFACE_FIELD = Field(_field_text, "the name of an interface", TEXT_SCHEMA)

CREATE_FIELDS: dict[str, Field] = {
    "public_key": PUBLIC_KEY_FIELD,
    "request_id": KEPT_TEXT_FIELD,
    "label": KEPT_TEXT_FIELD,
    "service_class": Field(
        _field_text, "a name of SERVICE_CLASSES", TEXT_SCHEMA,
        "the peer's speed and destinations; without one they have no limits"),
    "protocol": choice_field(
        (*FAMILIES, "dual"), 'null, "ipv4", "ipv6" or "dual"',
        "the peer gets addresses of these families and those of tunnel_traffic; default IPv4"),
    "tunnel_traffic": Field(
        _field_families, 'a list of "ipv4", "ipv6"', FAMILIES_SCHEMA,
        "what the client sends through the tunnel; default: the families of its addresses"),
    "port": integer_field(
        1, 65535, "a port that the gateway listens on", "UDP; default: WG_DEFAULT_PORT"),
    "dns": Field(_field_text, "a key of DNS_SERVERS", TEXT_SCHEMA, "default: the first one"),
    "preshared_key": Field(
        _field_key, "44 characters of base64, 32 bytes", KEY_SCHEMA,
        "shown in ?format=wg-quick only"),
    "persistent_keepalive": integer_field(
        0, 65535, "seconds, 0 to 65535", "for the client's configuration; default: 25"),
    "expires_at": Field(
        _field_time, "an RFC 3339 time with a zone", TIME_SCHEMA, "when the peer is suspended"),
    "quota_bytes": integer_field(
        0, MAX_INTEGER, "a number of bytes, 0 or more",
        "received and sent together; a peer that has used more is suspended"),
    "quota_period": choice_field(PERIODS, note=
        "the quota starts again with each, in UTC (weeks on Mondays); without one it is for the "
        "peer's lifetime"),
    "assigned_ip": address_field(socket.AF_INET, "an IPv4 address", IPV4),
    "assigned_ipv6": address_field(socket.AF_INET6, "an IPv6 address", IPV6),
    "obfuscation": Field(
        _field_obfuscation, 'an object with "enabled": true or false, and AmneziaWG\'s parameters',
        FREE_OBJECT, "whether the peer is on the AmneziaWG interface, and the client's own values"),
}

SEALED_FIELDS: dict[str, Field] = {
    "encrypted_payload": Field(
        _field_long_text, "base64 text", {"type": "string"},
        "the other fields, encrypted; they override fields in clear", required=True),
}

# The body of a create. With encrypted_payload, the public key may be in there.
CREATE_BODY: dict[str, Field] = {
    **CREATE_FIELDS,
    "public_key": PUBLIC_KEY_FIELD._replace(
        note="required without encrypted_payload", required=False, null=True),
    "encrypted_payload": SEALED_FIELDS["encrypted_payload"]._replace(required=False),
}

# The fields that null clears. They have no default.
CLEARABLE_FIELDS = {
    name: nullable(CREATE_FIELDS[name])
    for name in ("expires_at", "quota_bytes", "quota_period", "preshared_key", "label",
                 "request_id", "service_class")
}

# What a PATCH may change. null clears CLEARABLE_FIELDS, gives tunnel_traffic its default again
# (generated Java clients cannot leave a list out, and send null), and is refused elsewhere.
PATCH_FIELDS: dict[str, Field] = {
    **{n: CREATE_FIELDS[n]._replace(null=True) for n in ("dns", "port", "persistent_keepalive")},
    "tunnel_traffic": nullable(CREATE_FIELDS["tunnel_traffic"]),
    **CLEARABLE_FIELDS,
    **{n: address_or_auto(CREATE_FIELDS[n]) for n in ADDRESS_FIELD.values()},
    "protocol": CREATE_FIELDS["protocol"]._replace(
        note="assigns an address in each family in which the peer has none; the peer keeps others"),
}

ROTATE_FIELDS: dict[str, Field] = {"new_public_key": PUBLIC_KEY_FIELD}

OBFUSCATION_FIELDS: dict[str, Field] = {
    "parameters": Field(
        _field_parameters, "an object with all of AmneziaWG's parameters", FREE_OBJECT,
        "default: random ones"),
    "generation": choice_field(
        GENERATIONS, note="of random parameters; default: the oldest. It must know `parameters`"),
    "preset": choice_field(
        tuple(PRESETS), note=f"of random parameters; default: {DEFAULT_PRESET}"),
    "confirm": Field(_field_flag, "true or false", FLAG, "true accepts that peers are cut off"),
}

STATUS_FIELDS: dict[str, Field] = {
    "status": choice_field(STATUSES, '"active" or "suspended"')._replace(required=True),
}

# An element of a desired state: the fields that a create takes, and the status and interface that
# a list shows. A field that is left out keeps its value.
SYNC_FIELDS: dict[str, Field] = {
    **CREATE_FIELDS,
    **CLEARABLE_FIELDS,
    "obfuscation": CREATE_FIELDS["obfuscation"]._replace(parse=_field_known_obfuscation),
    "status": choice_field(STATUSES),
    "interface": INTERFACE_FIELD,
}
# fmt: on


def parse_fields(
    given: Mapping[str, Any], table: Mapping[str, Field], ignored: Container[str] = ()
) -> dict[str, Any]:
    """Decode the fields of a table.

    Raises Invalid, also for a name that is neither in the table nor in `ignored`.
    """
    parsed: dict[str, Any] = {}
    for name, value in given.items():
        row = table.get(name)
        if row is None:
            if name not in ignored:
                known = ", ".join(table) or "none"
                raise Invalid(name[:64], f"is not known here; known are {known}")
            continue
        if value is None and not row.null:
            continue
        try:
            parsed[name] = row.parse(value)
        except (ValueError, TypeError):
            raise Invalid(name, f"must be {row.accepts}") from None
    for name, row in table.items():
        if row.required and name not in parsed:
            raise Invalid(name, f"is required: {row.accepts}")
    return parsed


def parse_create(given: Mapping[str, Any]) -> dict[str, Any]:
    """Decode a create. Raises Invalid.

    Existing backends send fields that wggw does not know. A create accepts them, and "ignored"
    lists their names.
    """
    ignored = given.keys() - CREATE_FIELDS.keys() - SEALED_FIELDS.keys()
    if "obfuscation" in given:
        ignored.update(unknown_obfuscation(given["obfuscation"]))
    return {**parse_fields(given, CREATE_FIELDS, given), "ignored": sorted(ignored)}


def component(name: str) -> Schema:
    """A reference to a named schema of the API's description."""
    return {"$ref": f"#/components/schemas/{name}"}


def list_of(name: str) -> Schema:
    return {"type": "array", "items": component(name)}


def fields_schema(table: Mapping[str, Field]) -> Schema:
    """The schema of an object that parse_fields() accepts with this table."""
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
    """The parts of a request that signatures can cover. `target` is path and query as sent."""

    method: str
    authority: str
    target: str
    headers: Mapping[bytes, bytes]
    length: int

    def __repr__(self) -> str:  # signatures are among the headers
        return f"SignedMessage({self.method})"


# A right signature: its key id, when it was made, and all of it, unless it is a legacy one.
Signed = tuple[str, int, "MessageSignature | None"]


class Authenticator:
    """Verifies signatures of both schemes. `clock` gives Unix seconds.

    A signature of RFC 9421 is accepted once, even across restarts: see NonceGuard.
    """

    def __init__(
        self,
        keys: Mapping[str, str],
        window: int,
        clock: Callable[[], float],
        schemes: Sequence[str] = ("legacy", "rfc9421"),
    ) -> None:
        self._window = window
        self._clock = clock
        self._no_key = hmac.new(secrets.token_bytes(KEY_BYTES), digestmod="sha256")
        self.nonces = NonceGuard(window)
        self.reload(keys, schemes)

    def reload(self, keys: Mapping[str, str], schemes: Sequence[str]) -> None:
        """Take over new keys. The window stays, because nonces are remembered for that long."""
        self._keys = {
            key_id: hmac.new(secret.encode("utf-8"), digestmod="sha256")
            for key_id, secret in keys.items()
        }
        self._schemes = schemes

    def verify(self, message: SignedMessage) -> Caller:
        """Check a request's head by the scheme it uses: first the signature, then its time.

        Raises GatewayError, with the caller's key id if the signature is right; EarlySignature.
        """
        scheme = "rfc9421" if b"signature-input" in message.headers else "legacy"
        find = self._find_rfc9421 if scheme == "rfc9421" else self._find_legacy
        found = find(message) if scheme in self._schemes else None
        if found is None:
            raise Unauthorized(NOT_AUTHENTIC)
        key_id, created, given = found
        try:
            self._check_fresh(created, given)
        except GatewayError as error:
            error.key_id = key_id
            raise
        return Caller(key_id, scheme)

    def _find_legacy(self, message: SignedMessage) -> Signed | None:
        """Whose key signed timestamp and length."""
        timestamp = message.headers.get(b"timestamp", b"")
        given = message.headers.get(b"signature", b"").lower()
        signed = legacy_message(timestamp, message.length)
        found = None
        for key_id, key in self._keys.items():  # always all keys: the time reveals nothing
            if hmac.compare_digest(_mac(key, signed).hex().encode("ascii"), given):
                found = key_id
        if found is None:
            return None
        is_time = timestamp.isdigit() and len(timestamp) <= 12
        return found, int(timestamp) if is_time else NO_TIME, None

    def _find_rfc9421(self, message: SignedMessage) -> Signed | None:
        """RFC 9421 section 3.2; one right signature of several is enough."""
        for given in parse_signatures(message.headers):
            if not _covers_enough(message, given):
                continue
            try:
                base = signature_base(message, given)
            except KeyError:
                continue
            # An unknown key id costs a MAC as well: the time does not reveal which ids exist.
            expected = _mac(self._keys.get(given.key_id, self._no_key), base)
            if hmac.compare_digest(expected, given.signature) and given.key_id in self._keys:
                return given.key_id, given.created, given
        return None

    def _check_fresh(self, created: int, given: MessageSignature | None) -> None:
        now = self._clock()
        if abs(now - created) > self._window:
            raise Unauthorized(
                f"the timestamp (whole Unix seconds) is outside the window of {self._window} s; "
                f"the server's time is {int(now)} ({rfc3339(now)})",
                "time",
            )
        if given is None:
            return
        if given.expires is not None and given.expires < int(now):
            raise Unauthorized(
                f"the signature has expired; the server's time is {int(now)}", "time"
            )
        if not self.nonces.first_use(given.key_id, given.nonce, created, now):
            raise Unauthorized("the nonce was used before", "replay")


NOT_AUTHENTIC = "the request is not authentic"
NO_TIME = -(10**15)  # in place of a timestamp that is no whole number: outside of any window


def _mac(key: hmac.HMAC, message: bytes) -> bytes:
    """HMAC by a copy of a keyed object: takes half the time of hmac.digest(), and keeps the GIL."""
    mac = key.copy()
    mac.update(message)
    return mac.digest()


class NonceGuard:
    """Accepts each signature once, across restarts, crashes and changes of the clock.

    `_live` holds the used nonces until their `created` has left the window. `_forgotten` is the
    highest `created` among those that are no longer held. A signature with a later `created` has
    been used if and only if it is in `_live`. Nothing is known of others: while the clock moves
    forward they are outside the window, and when it is set back they get 503.

    An orderly stop writes `_forgotten` and `_live` to a file, which the next start reads. Until the
    next orderly stop the file says "running" and names a ceiling. A signature is accepted only if
    its `created` is not above the clock, or not above the ceiling on disk. An early one, from a
    client whose clock is ahead, waits until a worker has raised the ceiling above it (one write
    serves all within NONCE_RESERVE seconds). A start that finds "running" follows a crash. It knows
    that no signature created after both the ceiling and this start has been used. All others get
    503 until the clock has passed them: usually within a second, or as long as the clock of the
    most advanced client was ahead. Every NONCE_SECONDS the ceiling is also raised to the highest
    accepted `created`, in case the clock is set back during a crash. Only signatures from the last
    NONCE_SECONDS before such a crash could be accepted twice.

    A missing file (DB_PATH was in memory and the machine restarted, or the state is another node's)
    is treated like a crash in which early signatures up to the whole window were accepted. The
    time of the start is computed back from the present clock, so that correcting the clock after
    the start neither lets a used signature in nor makes a new one wait.
    """

    def __init__(self, window: int, steady: Callable[[], float] = time.monotonic) -> None:
        self._window = window
        self._steady = steady
        self._lock = threading.Lock()
        self._live: set[bytes] = set()
        self._by_created: dict[int, list[bytes]] = {}
        self._forgotten = 0
        self._swept = 0
        self._crash: float | None = None  # when the start after a crash began, on the steady clock
        self._early = 0  # seconds by which signatures of a run before may be ahead of the start
        self._closed = False
        self._file_lock = threading.Lock()  # always taken before _lock
        self._path = ""
        self._ceiling = 0  # as it is on disk

    def keep(self, path: str, first: bool = False, elsewhere: bool = False) -> None:
        """Load the file, and keep it up to date from now on. Raises OSError.

        `first`: there was no run before this one. `elsewhere`: until now another node may have
        accepted signatures that the file does not know.
        """
        with self._file_lock, self._lock:
            self._path, self._closed = path, False
            if elsewhere:  # the next start must not trust it either
                self._remove_file()
            try:
                self._load(Path(path).read_text("ascii", "replace"))
            except FileNotFoundError:
                if not first:  # the next start doubts as well, unless this run stops in order
                    self._crash, self._early = self._steady(), self._window
                    return
            try:
                self._write_ceiling(self._highest())
            except OSError:  # a full disk must not prevent the start
                if self._crash is None:  # the file says "stopped", which is wrong after a crash
                    self._remove_file()

    def close(self, now: float) -> None:
        """Accept nothing more, and write the used nonces if there is a file. Raises OSError."""
        with self._file_lock, self._lock:
            self._closed = True
            if self._path:
                head = b"%b stopped %d\n" % (NONCES_MAGIC, self._unknown(now))
                lines = (
                    b"".join(b"%d %b\n" % (created, entry.hex().encode("ascii")) for entry in row)
                    for created, row in self._by_created.items()
                )
                Disk().replace(self._path, itertools.chain([head], lines))

    def save(self) -> None:
        """Raise the ceiling on disk to the highest accepted `created`. Raises OSError."""
        with self._lock:
            highest = self._highest()
        self.raise_ceiling(highest)

    def raise_ceiling(self, wanted: int) -> None:
        """Accept signatures created up to `wanted` early. Raises OSError. For workers."""
        with self._file_lock:
            if self._path and wanted > self._ceiling and not self._closed:
                self._write_ceiling(wanted)

    def first_use(self, key_id: str, nonce: str, created: int, now: float) -> bool:
        """Whether a signature is used for the first time. It counts as used from then on.

        Raises Unavailable when that is unknown, TooManyRequests when there is no room, and
        EarlySignature when the caller must raise the ceiling and ask again.
        """
        entry = hashlib.blake2b(f"{key_id} {nonce}".encode(), digest_size=16).digest()
        with self._lock:
            if self._closed:
                headers = [("Retry-After", "1")]
                raise Unavailable("the gateway is starting or stopping", headers=headers)
            if int(now) != self._swept:
                self._sweep(int(now))
            if entry in self._live:
                return False
            unknown = self._unknown(now)
            if created <= unknown:
                raise Unavailable(
                    "the gateway crashed or its clock was set back, so that this signature may "
                    "have been used before: sign again later",
                    headers=[("Retry-After", str(unknown + 1 - created))],
                )
            if len(self._live) >= MAX_NONCES:
                raise TooManyRequests(
                    "too many signatures at once: try again", headers=[("Retry-After", "1")]
                )
            if created > now and created > self._ceiling and self._path:
                raise EarlySignature(created + NONCE_RESERVE)
            self._add(entry, created)
        return True

    def _add(self, entry: bytes, created: int) -> None:
        self._live.add(entry)
        self._by_created.setdefault(created, []).append(entry)

    def _highest(self) -> int:
        return max([self._forgotten, *self._by_created])

    def _sweep(self, now: int) -> None:
        self._swept = now
        for created in [one for one in self._by_created if one + self._window < now]:
            self._live.difference_update(self._by_created.pop(created))
            self._forgotten = max(self._forgotten, created)

    def _unknown(self, now: float) -> int:
        """The last second whose signatures may have been used without a trace."""
        if self._crash is None:
            return self._forgotten
        age = self._steady() - self._crash
        unknown = max(self._forgotten, math.floor(now - age) + self._early)
        if age > self._window + self._early:  # older signatures are outside the window by now
            self._crash, self._forgotten = None, unknown
        return unknown

    def _load(self, text: str) -> None:
        found = re.match(r"wggw-nonces 1 (running|stopped) ([0-9]{1,12})\n", text)
        self._forgotten = int(found[2]) if found else 0
        ahead = 0 if found else self._window  # the oldest format adds the window to each time
        if not found or found[1] == "running":
            self._crash, self._early = self._steady(), 0
        for second, entry in re.findall(r"(?m)^([0-9]{1,12}) ([0-9a-f]{32})$", text):
            self._add(bytes.fromhex(entry), int(second) - ahead)

    def _write_ceiling(self, ceiling: int) -> None:
        Disk().replace(self._path, [b"%b running %d\n" % (NONCES_MAGIC, ceiling)])
        self._ceiling = ceiling

    def _remove_file(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            Disk().unlink(self._path)
            Disk().sync_directory(self._path)


NONCES_MAGIC = b"wggw-nonces 1"


class EarlySignature(Exception):
    """A signature is ahead of the clock: the ceiling on disk must be raised to `wanted` first."""

    def __init__(self, wanted: int) -> None:
        super().__init__()
        self.wanted = wanted


class Throttle:
    """Limits failed authentications to `limit` a minute from an address.

    It remembers MAX_THROTTLED addresses. An IPv6 address counts as its /64, which is what one
    customer has. Authentic requests are never looked up here. Only the loop uses it.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._clock = clock
        # address -> (failures not forgotten yet, at what time); least recent first
        self._failures = collections.OrderedDict[str, tuple[float, float]]()

    def fail(self, source: str) -> float:
        """Count a failure; returns the seconds to wait when there are too many, or 0."""
        address, now = address_group(source), self._clock()
        failures, since = self._failures.pop(address, (0.0, now))
        failures = max(0.0, failures - (now - since) * self._limit / 60) + 1
        over = failures - self._limit
        self._failures[address] = (min(failures, float(self._limit)), now)
        if len(self._failures) > MAX_THROTTLED:
            self._failures.popitem(last=False)
        return over * 60 / self._limit if over > 0 else 0.0


def address_group(source: str) -> str:
    """The unit of limits per address: an IPv4 address, or the /64 of an IPv6 address."""
    if ":" not in source:
        return source
    return str(ipaddress.IPv6Network((source, 64), strict=False).network_address)


class MessageSignature(NamedTuple):
    """One signature of a message: covered components, its parameters, the MAC.

    `created` is NO_TIME when it is given with a fraction.
    """

    components: tuple[str, ...]
    parameters: str  # as in the signature base: ("@method" ...);created=...
    created: int
    expires: int | None
    nonce: str
    key_id: str
    signature: bytes

    def __repr__(self) -> str:  # the rest could be replayed elsewhere
        return f"MessageSignature({self.key_id})"


def parse_signatures(headers: Mapping[bytes, bytes]) -> Iterator[MessageSignature]:
    """The signatures of a message that have all required parts; others are skipped."""
    try:
        inputs = parse_dictionary(headers[b"signature-input"].decode("ascii"))
        macs = parse_dictionary(headers.get(b"signature", b"").decode("ascii"))
    except ValueError:
        return
    if len(inputs) > MAX_SIGNATURES:
        return
    for label, (components, parameters) in inputs.items():
        mac = _bytes_of(macs.get(label, ("", {}))[0])
        if isinstance(components, str) or mac is None:
            continue
        # Component parameters are refused: the components that must be covered need none, and each
        # "@query-param" would parse the query again.
        names = tuple(_string_of(item) for item, given in components if not given)
        created, expires = parameters.get("created", ""), parameters.get("expires")
        nonce, key_id = _string_of(parameters.get("nonce")), _string_of(parameters.get("keyid"))
        if (
            len(components) == len(names) == len(set(names))
            and re.fullmatch(r"-?[0-9.]+", created)
            and (expires is None or re.fullmatch(r"-?[0-9]+", expires))
            and nonce
            and parameters.get("alg", '"hmac-sha256"') == '"hmac-sha256"'
        ):
            text = serialize_inner_list([item for item, _ in components], parameters)
            second = NO_TIME if "." in created else int(created)
            ends = None if expires is None else int(expires)
            yield MessageSignature(names, text, second, ends, nonce, key_id, mac)


def _covers_enough(message: SignedMessage, given: MessageSignature) -> bool:
    """Method, target and, where there is one, the body's digest."""
    covered = set(given.components)
    whole = "@target-uri" in covered
    parts = "@path" in covered and ("?" not in message.target or "@query" in covered)
    body = message.length == 0 or "content-digest" in covered
    return "@method" in covered and (whole or parts) and body


def signature_base(message: SignedMessage, given: MessageSignature) -> bytes:
    """The signature base of RFC 9421 section 2.5. Raises KeyError: see _component().

    It is built before the signature is verified. Each component is covered at most once, so the
    base is no longer than the head and a few copies of the target.
    """
    lines = [b'"%b": %b\n' % (n.encode("ascii"), _component(message, n)) for n in given.components]
    lines.append(b'"@signature-params": ' + given.parameters.encode("ascii"))
    return b"".join(lines)


def _component(message: SignedMessage, name: str) -> bytes:
    """The value of a component (RFC 9421 sections 2.1 and 2.2).

    Raises KeyError when it is unknown or missing, as one in capitals always is.
    """
    if name.startswith("@"):
        return DERIVED[name](message).encode("latin-1", "replace")
    return message.headers[name.encode("ascii")]


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


def digested(header: bytes, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Pass on a body's pieces. Raises Unauthorized behind the last one unless they have the digest.

    Content-Digest (RFC 9530) must have a known digest, and every known one must be the body's.
    """
    try:
        given = parse_dictionary(header.decode("ascii"))
    except ValueError:
        given = {}
    known = {name: DIGESTS[name]() for name in DIGESTS if name in given}
    for piece in pieces:
        for digest in known.values():
            digest.update(piece)
        yield piece
    if not known or any(_bytes_of(given[n][0]) != digest.digest() for n, digest in known.items()):
        raise Unauthorized("the body does not have the signed Content-Digest", "digest")


DIGESTS = {"sha-256": hashlib.sha256, "sha-512": hashlib.sha512}


def sign_rfc9421(
    key_id: str, secret: str, message: SignedMessage, created: int, nonce: str
) -> tuple[str, str]:
    """The values of Signature-Input and Signature for a request."""
    names = ("@method", "@target-uri", *["content-digest"] * bool(message.length))
    strings = {"nonce": nonce, "keyid": key_id, "alg": "hmac-sha256"}
    quoted = {name: json.dumps(text) for name, text in strings.items()}  # JSON has the same quotes
    text = serialize_inner_list(map(json.dumps, names), {"created": str(created), **quoted})
    given = MessageSignature(names, text, created, None, nonce, key_id, b"")
    mac = hmac.digest(secret.encode("utf-8"), signature_base(message, given), "sha256")
    return f"sig1={text}", f"sig1=:{base64.b64encode(mac).decode('ascii')}:"


# --- structured fields (RFC 8941), the part that signatures and digests need ----------------------
#
# An item is kept as the text that serializes it (RFC 8941 section 4.1), because signatures cover
# that. _string_of() and _bytes_of() tell its value.

Parameters = dict[str, str]  # items
InnerList = list[tuple[str, Parameters]]

# The quantifiers are possessive: a mismatch costs neither backtracking nor memory.
_SF_KEY = re.compile(r"[a-z*][a-z0-9_.*-]*+")
_SF_PARAMETER = re.compile(r"; *+([a-z*][a-z0-9_.*-]*+)(=?)")
_SF_ITEM = re.compile(
    r'"[ !#-\[\]-~]*+(?:\\["\\][ !#-\[\]-~]*+)*+"'  # a string
    r"|:[A-Za-z0-9+/]*+={0,2}:"  # bytes
    r"|\?[01]"
    r"|-?(?:[0-9]{1,15}+(?![0-9.])|[0-9]{1,12}+\.[0-9]{1,3}+(?![0-9.]))"
    r"|[A-Za-z*][!#$%&'*+.^_`|~0-9A-Za-z:/-]*+"  # a token
)


class _Scanner:
    """Reads a structured field from left to right. Raises ValueError at a syntax error."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self._parts = 0

    def match(self, pattern: re.Pattern[str]) -> re.Match[str]:
        """The next key, value or parameter."""
        self._parts += 1
        if self._parts > MAX_FIELD_PARTS:  # a part costs much more than its few bytes
            raise ValueError("structured field: too many parts")
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
        self.position += found
        return found

    def item(self) -> str:
        text = self.match(_SF_ITEM)[0]
        if text[0] == ":":
            binascii.a2b_base64(text[1:-1], strict_mode=True)
        elif text[0] in "-0123456789":
            text = str(float(text) if "." in text else int(text))
        return text

    def parameters(self) -> Parameters:
        parameters: Parameters = {}
        while self.text.startswith(";", self.position):
            found = self.match(_SF_PARAMETER)
            key = found[1]
            if key in parameters:  # RFC 8941 takes the last one; refuse what is ambiguous
                raise ValueError("structured field: a parameter is repeated")
            parameters[key] = self.item() if found[2] else "?1"
        return parameters

    def inner_list(self) -> InnerList:
        items: InnerList = []
        while True:
            self.skip(" ")
            if self.take(")"):
                return items
            if items and self.text[self.position - 1] != " ":
                raise ValueError("structured field: items without a space between them")
            items.append((self.item(), self.parameters()))


def parse_dictionary(text: str) -> dict[str, tuple[str | InnerList, Parameters]]:
    """RFC 8941 section 4.2.2; a repeated key is refused. Raises ValueError."""
    scanner = _Scanner(text.strip(" "))
    members: dict[str, tuple[str | InnerList, Parameters]] = {}
    more = bool(scanner.text)
    while more:
        key = scanner.match(_SF_KEY)[0]
        if key in members:
            raise ValueError("structured field: a key is repeated")
        value: str | InnerList = "?1"
        if scanner.take("="):
            value = scanner.inner_list() if scanner.take("(") else scanner.item()
        members[key] = (value, scanner.parameters())
        scanner.skip(" \t")
        more = scanner.take(",")
        scanner.skip(" \t")
    if scanner.position < len(scanner.text):
        raise ValueError("structured field: a comma is missing")
    return members


def serialize_inner_list(items: Iterable[str], parameters: Parameters) -> str:
    """RFC 8941 section 4.1.1.1, for items without parameters of their own."""
    ends = (f";{k}" if value == "?1" else f";{k}={value}" for k, value in parameters.items())
    return f"({' '.join(items)}){''.join(ends)}"


def _string_of(item: str | None) -> str:
    """The text of a string, "" of anything else."""
    if item is None or item[0] != '"':
        return ""
    return item[1:-1] if "\\" not in item else re.sub(r"\\(.)", r"\1", item[1:-1])


def _bytes_of(item: str | InnerList) -> bytes | None:
    if isinstance(item, str) and item.startswith(":"):
        return binascii.a2b_base64(item[1:-1])
    return None


def legacy_message(timestamp: bytes, body_length: int) -> bytes:
    return b"timestamp=%b, body_length=%d" % (timestamp, body_length)


def sign_legacy(secret: str, timestamp: int, body_length: int) -> str:
    message = legacy_message(b"%d" % timestamp, body_length)
    return hmac.digest(secret.encode("utf-8"), message, "sha256").hex()


def derive_key(secret: str, info: bytes, salt: bytes | None = None, length: int = 32) -> bytes:
    """HKDF with SHA-256 (RFC 5869)."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    hkdf = HKDF(algorithm=hashes.SHA256(), length=length, salt=salt, info=info)
    return hkdf.derive(secret.encode("utf-8"))


class PayloadBox:
    """Seals and opens encrypted payloads: base64(iv[12] || AES-256-GCM ciphertext || tag[16])."""

    def __init__(self, shared_secret: str) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._aead = AESGCM(derive_key(shared_secret, b"handshake data"))

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
            raise Malformed(
                "encrypted_payload does not decrypt: encrypt it with this gateway's "
                "GATEWAY_PUBLIC_KEY, as iv, ciphertext and tag in base64"
            ) from None


Vault = NewType("Vault", str)  # the secret of encryption at rest, from which each Seal is derived
SEAL_BYTES = 16  # that Seal.seal() adds: the tag of AES-GCM


class Seal:
    """A file's own AES-256 key. `header` (salt and key check, hex) stands in the file's first line.

    Nonces are unique by construction: each is a number that the file uses once, and each file
    has a random salt and so a key of its own.
    """

    def __init__(self, vault: Vault, purpose: bytes, salt: bytes | None = None) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        salt = salt or secrets.token_bytes(16)
        check = derive_key(vault, b"wggw check", salt, 8)
        self.header = f"{salt.hex()} {check.hex()}".encode("ascii")
        self._aead = AESGCM(derive_key(vault, b"wggw " + purpose, salt))

    @classmethod
    def read(cls, vault: Vault | None, purpose: bytes, header: bytes, name: str) -> Seal:
        """The key of an existing file. Raises ConfigError when SNAPSHOT_KEY is not its key."""
        if vault is None:
            raise ConfigError(
                f"SNAPSHOT_KEY is not set, but {name} is encrypted: set the key that encrypted it"
            )
        seal = cls(vault, purpose, bytes.fromhex(header.split(b" ")[0].decode("ascii")))
        if seal.header != header:
            raise ConfigError(
                f"SNAPSHOT_KEY: its value (not shown) is not the key of {name}: set the key that "
                "encrypted it"
            )
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
    """The public key of a private key (RFC 7748 section 5). Not constant-time.

    It is used once at the start. With a given certificate the gateway runs without the cryptography
    package.
    """
    prime = 2**255 - 19
    scalar = int.from_bytes(private, "little") & ((1 << 255) - 8) | (1 << 254)
    x2, z2, x3, z3 = 1, 0, 9, 1
    for bit in f"{scalar:b}":
        if bit == "1":
            x2, z2, x3, z3 = x3, z3, x2, z2
        a, b = x2 + z2, x2 - z2
        aa, bb = a * a, b * b
        da, cb = (x3 - z3) * a, (x3 + z3) * b
        x3, z3 = (da + cb) ** 2 % prime, 9 * (da - cb) ** 2 % prime
        x2, z2 = aa * bb % prime, (aa - bb) * (aa + 121665 * (aa - bb)) % prime
        if bit == "1":
            x2, z2, x3, z3 = x3, z3, x2, z2
    return (x2 * pow(z2, prime - 2, prime) % prime).to_bytes(32, "little")


def clamp(private: bytes) -> bytes:
    """RFC 7748 section 5. An interface reports every key in this form."""
    return bytes([private[0] & 248, *private[1:31], private[31] & 127 | 64])


def make_private_key() -> bytes:
    return clamp(secrets.token_bytes(KEY_BYTES))


def load_private_key(settings: InterfaceSettings, kept: str | None = None) -> bytes:
    """Read the interface's private key, or make the file (0600). Raises ConfigError.

    A new file gets the key that a snapshot has `kept`, or else a random one.
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
            Disk().replace(path, [encode_key(key).encode("ascii"), b"\n"])
        except OSError as error:
            raise ConfigError(f"{variable}: {path!r} cannot be made: {_reason(error)}") from None
        LOG.info("%s: %s", path, "the snapshot's private key" if kept else "a new private key")
        return key
    except OSError as error:
        raise ConfigError(f"{variable}: {path!r} cannot be read: {_reason(error)}") from None
    except ValueError:
        raise ConfigError(
            f"{variable}: {path!r} does not hold a private key as `wg genkey` prints it: restore "
            "the file, or, for a new gateway, remove it, and the gateway makes one"
        ) from None


CERTIFICATE_NAME = "wggw"  # the issuer of self-made certificates, by which they are recognised


def make_certificate(cert_path: str, key_path: str, names: Sequence[str]) -> None:
    """Write a self-signed P-256 pair, valid for ten years, for `names` (hosts or addresses).

    Raises ImportError, OSError, ValueError.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    certificate = _sign_certificate(key, names)
    try:
        Disk().replace(key_path, [key.private_bytes(pem, form, serialization.NoEncryption())])
        Disk().replace(cert_path, [certificate])
    except OSError:  # the next start would refuse half a pair
        for path in (key_path, cert_path):
            Path(path).unlink(missing_ok=True)
        raise


def renew_certificate(cert_path: str, key_path: str, names: Sequence[str]) -> None:
    """Replace the certificate of make_certificate() by a new one for the same key.

    The key's first certificate signs it and stays in the file behind it, so that it is accepted by
    clients that pinned the key, and by clients that trust a copy of the former file. A first
    certificate that expires soon is dropped. Raises ImportError, OSError, ValueError.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    if os.path.samefile(cert_path, key_path):
        raise ValueError("TLS_KEY is the same file, and would lose its key")
    pem, der = serialization.Encoding.PEM, serialization.Encoding.DER
    key: Any = serialization.load_pem_private_key(Path(key_path).read_bytes(), None)
    # The last of the file; Debian 12's cryptography cannot load several at once.
    _, header, text = Path(cert_path).read_bytes().rpartition(ssl.PEM_HEADER.encode("ascii"))
    root = x509.load_pem_x509_certificate(header + text)
    kind = (der, serialization.PublicFormat.SubjectPublicKeyInfo)
    if root.public_key().public_bytes(*kind) != key.public_key().public_bytes(*kind):
        raise ValueError("TLS_CERT was signed with another key than TLS_KEY")
    expires = certificate_expiry(root.public_bytes(der))
    if expires > time.time() + RENEWAL_SECONDS:
        parts = [_sign_certificate(key, names, expires), root.public_bytes(pem)]
    else:
        parts = [_sign_certificate(key, names)]
    Disk().replace(cert_path, parts)


def _sign_certificate(key: Any, names: Sequence[str], expires: int | None = None) -> bytes:
    """A certificate in PEM: the key's first one, or with `expires` (Unix seconds) a renewed one."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    def named(text: str) -> Any:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    def alternative(name: str) -> Any:
        try:
            return x509.IPAddress(ipaddress.ip_address(name))
        except ValueError:
            return x509.DNSName(name)

    subject = f"{CERTIFICATE_NAME} renewed" if expires else CERTIFICATE_NAME
    public, now = key.public_key(), int(time.time())
    ends = expires or now + CERTIFICATE_SECONDS
    signs = [True, *[False] * 4, True, *[False] * 3]  # digital_signature and key_cert_sign
    certificate = (
        x509.CertificateBuilder()
        .subject_name(named(subject))
        .issuer_name(named(CERTIFICATE_NAME))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.fromtimestamp(now - 86400, timezone.utc))
        .not_valid_after(datetime.fromtimestamp(ends, timezone.utc))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(*signs), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), False)
        .add_extension(x509.SubjectAlternativeName([*map(alternative, names)]), False)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


def own_certificate_names(path: str) -> set[str] | None:
    """The names, lower case, of a certificate that a gateway made; None if it was made elsewhere.

    The standard library only decodes certificates that may sign others, which ours may. Raises
    OSError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(path)
    name = ((("commonName", CERTIFICATE_NAME),),)
    found: list[dict[str, Any]] = [dict(c) for c in context.get_ca_certs() if c["issuer"] == name]
    if not found:
        return None
    newest = min(found, key=lambda each: each["subject"] == name)  # not the one that signed it
    return {
        str(ipaddress.ip_address(text)) if kind == "IP Address" else text.lower()
        for kind, text in newest.get("subjectAltName", ())
    }


def read_certificate(path: str) -> bytes:
    """The first certificate of a PEM file, in DER. Raises OSError, ValueError."""
    _, header, text = Path(path).read_text("latin-1").partition(ssl.PEM_HEADER)
    body, footer, _ = text.partition(ssl.PEM_FOOTER)
    if not footer:
        raise ValueError("no certificate in the file")
    return ssl.PEM_cert_to_DER_cert(header + body + footer)


def certificate_times(certificate: bytes) -> tuple[int, int]:
    """notBefore and notAfter of a certificate in DER (RFC 5280 section 4.1), Unix seconds.

    The standard library decodes them only from a verified peer's certificate. Raises ValueError.
    """

    def seconds(value: DerValue) -> int:
        text = value.value.decode("ascii")
        if value.tag == 0x17:  # UTCTime: two digits of a year from 1950 to 2049
            text = ("20" if text < "5" else "19") + text
        at = datetime.strptime(text, "%Y%m%d%H%M%SZ")
        return int(at.replace(tzinfo=timezone.utc).timestamp())

    begins, ends = _der_values(_certificate_fields(certificate)[3].value)
    return seconds(begins), seconds(ends)


def certificate_expiry(certificate: bytes) -> int:
    return certificate_times(certificate)[1]


def key_pin(certificate: bytes) -> str:
    """The pin of a certificate's key as curl takes it: "sha256//" and base64. Raises ValueError.

    It is the hash of SubjectPublicKeyInfo in DER (RFC 7469 section 2.4).
    """
    digest = hashlib.sha256(_certificate_fields(certificate)[5].encoding).digest()
    return "sha256//" + base64.b64encode(digest).decode("ascii")


class DerValue(NamedTuple):
    tag: int
    value: bytes
    encoding: bytes  # tag, length and value


def _certificate_fields(certificate: bytes) -> list[DerValue]:
    """Serial number, algorithm, issuer, validity, subject, key and more. Raises ValueError."""
    [signed] = itertools.islice(_der_values(certificate), 1)
    [fields] = itertools.islice(_der_values(signed.value), 1)
    values = [v for v in _der_values(fields.value) if v.tag != 0xA0]  # [0]: the version
    if len(values) < 6:
        raise ValueError("not a certificate")
    return values


def _der_values(data: bytes) -> Iterator[DerValue]:
    """The values in DER, one after the other. Raises ValueError."""
    end = 0
    while end < len(data):
        start, value = end, end + 2
        if len(data) < value:
            raise ValueError("DER: a value without a length")
        length = data[start + 1]
        if length == 0x80:
            raise ValueError("DER: a length is missing")
        if length > 0x80:
            value += length & 0x7F
            length = int.from_bytes(data[start + 2 : value], "big")
        end = value + length
        if end > len(data):
            raise ValueError("DER: a value ends behind its container")
        yield DerValue(data[start], data[value:end], data[start:end])


# ==================================================================================================
# addresses: which address the next peer gets, at a cost that hardly grows with their number
#
# A pool is an index over the store's rows. The gateway rebuilds it at every start.
# Never here: SQL and locks.
# ==================================================================================================


class AddressPool:
    """The addresses of one subnet. The gateway has the first host address, peers have the others.

    Each address is in one of three states: fresh (never used), held, or released. No peer gets the
    network address, the gateway's address, an excluded address (such as those of `kept`, which are
    the gateway's former addresses) or, in IPv4, the broadcast address. An offset is an address's
    distance from the network address. Memory grows with the addresses that are held out of order
    and with the released ones, of which there are at most FRESH_SPAN.
    """

    def __init__(self, network: IPv4or6Network, kept: Sequence[str] = ()) -> None:
        self.network = network
        self.gateway = network.network_address + 1
        self._family = socket.AF_INET if network.version == 4 else socket.AF_INET6
        self._base = int(network.network_address)
        self._last = network.num_addresses - (2 if network.version == 4 else 1)
        self._fresh = 2  # the lowest fresh offset
        self._ahead: set[int] = set()  # used offsets above _fresh
        self._released: dict[int, int] = {}  # offset -> turn
        # A heap of (turn, offset). The first is valid; others may be stale: claimed since.
        self._queue: list[tuple[int, int]] = []
        self._turn = 0  # of the latest release
        self.used = 0  # peers hold so many addresses, or changes in flight do
        self.in_flight = 0  # changes in flight hold so many of the used ones
        self._excluded = 0  # how many addresses
        self.exclude(kept)

    @property
    def total(self) -> int:
        """How many addresses peers can have."""
        return self._last - 1 - self._excluded

    def exclude(self, addresses: Iterable[str]) -> None:
        """Keep those of these addresses that are free here from peers, until the next start."""
        for address in addresses:
            if (":" in address) == (self.network.version == 6) and self.is_free(address):
                self.claim(address)
                self.used -= 1
                self._excluded += 1

    def restore(self, held: Sequence[str], released: Iterable[str]) -> None:
        """Load a store's held addresses and its released ones (oldest first) into a new pool.

        Raises ValueError when no peer may hold one of them here, or two peers hold it.
        """
        base, fresh = self._base, self._fresh  # below `fresh` all are excluded
        offsets = {number - base for number in self._numbers(held)}
        if len(offsets) < len(held) or not offsets.isdisjoint(self._ahead):
            raise ValueError("an address is held twice, or excluded")
        if offsets and not fresh <= min(offsets) <= max(offsets) <= self._last:
            raise ValueError("an address is outside of the subnet, or excluded")
        self._ahead |= offsets
        self._skip_used()
        self.used += len(offsets)
        for address in released:  # some are outside the subnet after its setting changed
            if self.is_free(address):
                self.claim(address)
                self.release(address)
        self._ahead = set(self._ahead)  # a set keeps the memory of its largest size

    def peek(self) -> str | None:
        """The address that the next peer gets; None when all are held."""
        offset = self._fresh
        if self._queue and offset > min(self._last, FRESH_SPAN):
            offset = self._queue[0][1]
        if offset > self._last:
            return None
        packed = (self._base + offset).to_bytes(self.network.max_prefixlen // 8, "big")
        return socket.inet_ntop(self._family, packed)

    def has(self, address: str) -> bool:
        """Whether a peer could hold this address, if it were free."""
        return self._offset(address) is not None

    def outside(self, addresses: Sequence[str]) -> int:
        """How many of these addresses no peer could hold, if they were free."""
        first, last = self._base + 2, self._base + self._last
        return sum(not first <= number <= last for number in self._numbers(addresses))

    def is_free(self, address: str) -> bool:
        """Whether a peer may be given this address: in the subnet, not excluded, not held."""
        offset = self._offset(address)
        return offset is not None and self._is_free(offset)

    def claim(self, address: str) -> int:
        """Hold a free address. Returns its turn among the released ones, 0 for a fresh one.

        Raises ValueError when the address is not free.
        """
        offset = self._offset(address)
        if offset is None or not self._is_free(offset):
            raise ValueError(address)
        turn = self._released.pop(offset, 0)
        if turn:
            if len(self._queue) > 2 * len(self._released) + READ_CHUNK:  # most are stale
                self._queue = sorted(zip(self._released.values(), self._released, strict=True))
            while self._queue and self._released.get(self._queue[0][1]) != self._queue[0][0]:
                heapq.heappop(self._queue)
        else:
            self._ahead.add(offset)
            self._skip_used()
        self.used += 1
        return turn

    def put_back(self, address: str, turn: int) -> None:
        """Undo a claim() that returned `turn`: the address is fresh or released as before."""
        offset = self._offset(address)
        if offset is None or self._is_free(offset):
            raise ValueError(address)
        if turn:
            self._released[offset] = turn
            heapq.heappush(self._queue, (turn, offset))
        elif offset > self._fresh:
            self._ahead.remove(offset)
        else:
            self._ahead.update(range(offset + 1, self._fresh))
            self._fresh = offset
        self.used -= 1

    def release(self, address: str) -> None:
        """Release a held address: peers get the earlier released ones first."""
        self._turn += 1
        self.put_back(address, self._turn)

    def _is_free(self, offset: int) -> bool:
        return offset in self._released or (offset >= self._fresh and offset not in self._ahead)

    def _skip_used(self) -> None:
        while self._fresh in self._ahead:
            self._ahead.remove(self._fresh)
            self._fresh += 1

    def _numbers(self, addresses: Iterable[str]) -> list[int]:
        """The addresses as numbers. One loop, because a start converts all of a pool's."""
        family, packed = self._family, socket.inet_pton
        return [int.from_bytes(packed(family, address), "big") for address in addresses]

    def _offset(self, address: str) -> int | None:
        offset = int.from_bytes(socket.inet_pton(self._family, address), "big") - self._base
        return offset if 2 <= offset <= self._last else None


# ==================================================================================================
# journal and snapshot files: lines, fsync, atomic replacement, sealed forms
#
# The journal holds the changes since the snapshot. A record's number is its place in the history of
# the state. Numbers only grow, and a number is never used twice, even if its write failed. The
# snapshot names the last record that it contains. A start loads the snapshot and replays every
# journal line above that number, except records that a later one declares void.
#
# A crash may tear a write. A line with a wrong checksum is therefore dropped as torn, unless a good
# line behind it says that the torn one was on disk. Then acknowledged changes are damaged, and the
# start is refused (exit 3).
#
# After a failed write or fsync nothing is added to the file. The line of that write is removed, and
# changes are refused until there is a fresh snapshot with a new journal, which a timer's worker
# tries to write each second. That snapshot's number is at least the failed line's, so a line that
# could not be removed never counts afterwards. fsync is never retried: the kernel may have dropped
# the pages.
#
# The holder of Lander.turn writes the journal, and the holder of Files.writing the snapshot.
# Never here: what a record means.
# ==================================================================================================

JOURNAL_MAGIC = b"wggw-journal 2"
FIRST_JOURNAL_MAGIC = b"wggw-journal 1"  # of version 0.1: a record a line, rows as JSON objects


class Disk:
    """The calls that make a change durable, in one place so that tests can make them fail."""

    def write(self, handle: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(handle, view) :]

    def fsync(self, handle: int) -> None:
        os.fsync(handle)

    def truncate(self, handle: int, size: int) -> None:
        os.ftruncate(handle, size)

    def rename(self, old: str, new: str) -> None:
        os.rename(old, new)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def link(self, old: str, new: str) -> None:
        """Give a file a second name; copy it where the file system has no hard links."""
        try:
            os.link(old, new)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            self.replace(new, [Path(old).read_bytes()])

    def link_over(self, path: str, name: str) -> None:
        """Make `name` a second name of `path`. If `name` existed, it exists at every moment."""
        temporary = name + ".tmp"
        with contextlib.suppress(FileNotFoundError):
            self.unlink(temporary)
        self.link(path, temporary)
        self.rename(temporary, name)

    def sync_directory(self, path: str) -> None:
        handle = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            self.fsync(handle)
        finally:
            os.close(handle)

    def replace(self, path: str, parts: Iterable[bytes | memoryview], old: str = "") -> None:
        """Replace `path` by the joined parts. A crash leaves either the old file or the new one.

        `old`: the name that the old file gets.
        """
        temporary = path + ".tmp"
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            with open(handle, "wb", 0):
                for part in parts:
                    self.write(handle, part)
                self.fsync(handle)
            if old:  # not earlier: until the rename both names are one file
                self.link_over(path, old)
            self.rename(temporary, path)
        except Exception:  # on a full disk, the journal needs the temporary file's space
            with contextlib.suppress(OSError):
                self.unlink(temporary)
            raise
        self.sync_directory(path)


class Written(NamedTuple):
    """A record as it was written: its number and its JSON text.

    `totals`: the record has traffic totals and nothing else.
    """

    number: int
    content: bytes
    totals: bool = False

    def __repr__(self) -> str:  # the content holds preshared keys
        return f"Written({self.number})"


class Landing(NamedTuple):
    """A journal line that was read: the number of its first record, and its decoded records."""

    first: int
    records: list[Any]

    @property
    def last(self) -> int:
        return self.first + len(self.records) - 1

    def __repr__(self) -> str:
        return f"Landing({self.first}, {len(self.records)})"


class JournalFile(NamedTuple):
    """A journal that was read. `size` counts its good bytes, `torn` the dropped ones.

    The first record has the number after + 1. `columns` names a peer's columns; in a journal of
    version 1, whose rows have names, it is (). `sealed` holds salt and key check of an encrypted
    file, b"" of others.
    """

    after: int
    columns: tuple[str, ...]
    landings: list[Landing]
    size: int
    torn: int
    sealed: bytes

    @property
    def last(self) -> int:
        """The number of the last record; in an empty journal, the number before the first."""
        return self.landings[-1].last if self.landings else self.after


def journal_header(after: int, seal: Seal | None = None) -> bytes:
    text = b"%b %d %b" % (JOURNAL_MAGIC, after, ",".join(Peer._fields).encode("ascii"))
    if seal:
        text += b" " + seal.header
    return b"%b %08x\n" % (text, zlib.crc32(text))


def journal_line(first: int, durable: int, content: bytes) -> bytes:
    """`durable` is the number of the last record that is known to be on disk."""
    head = b"%d %d" % (first, durable)
    return b"%b %08x %b\n" % (head, zlib.crc32(content, zlib.crc32(head)), content)


def encode_landing(first: int, durable: int, contents: Sequence[bytes], seal: Seal | None) -> bytes:
    """The journal line of records that are written together."""
    content = b"[" + b",".join(contents) + b"]"
    if seal:
        # The nonce is random because the line after a torn one has the same number.
        nonce = secrets.randbits(96)
        sealed = nonce.to_bytes(12, "big") + seal.seal(nonce, b"%d" % first, content)
        content = binascii.b2a_base64(sealed, newline=False)
    return journal_line(first, durable, content)


_JOURNAL_HEADER = re.compile(
    rb"wggw-journal ([12]) ([0-9]{1,19})(?: ([a-z_0-9]{2,64},[a-z_0-9,]{1,4096}))?"
    rb"(?: ([0-9a-f]{32} [0-9a-f]{16}))? ([0-9a-f]{8})\n"
)
_JOURNAL_LINE = re.compile(rb"(([0-9]{1,19}) ([0-9]{1,19})) ([0-9a-f]{8}) ")
JournalLine = tuple[int, int, bytes]  # first record, last record known to be on disk, content
_RECORD_DECODER = json.JSONDecoder(parse_constant=int)  # NaN and Infinity: a ValueError
_RECORD_ENCODER = json.JSONEncoder(separators=(",", ":"))


def _parse_header(line: bytes) -> JournalFile | None:
    """The file without its landings; None if the line is bad."""
    match = _JOURNAL_HEADER.fullmatch(line)
    if match is None or zlib.crc32(line[:-10]) != int(match[5], 16):
        return None
    columns = tuple(match[3].decode("ascii").split(",")) if match[3] else ()
    if (match[1] == b"2") != bool(columns):
        return None
    return JournalFile(int(match[2]), columns, [], len(line), 0, match[4] or b"")


def _journal_lines(data: bytes, start: int) -> Iterator[tuple[int, int, JournalLine | None]]:
    """Where each line from `start` on begins and ends, and what it says; None if it is bad."""
    while start < len(data):
        newline = data.find(b"\n", start)
        end, line = len(data) if newline < 0 else newline + 1, None
        if found := _JOURNAL_LINE.match(data, start, max(newline, 0)):
            content = data[found.end() : newline]
            if zlib.crc32(content, zlib.crc32(found[1])) == int(found[4], 16):
                line = int(found[2]), int(found[3]), content
        yield start, end, line
        start = end


def parse_journal(
    data: bytes, name: str, vault: Vault | None = None, salvage: bool = False
) -> JournalFile:
    """Read a journal's bytes. Raises DamagedError for anything but a torn tail, ConfigError.

    With `salvage` it skips damaged lines instead.
    """
    header = data[: data.find(b"\n") + 1]
    head = _parse_header(header)
    if head is None and not salvage:  # Disk.replace() made it, so this is no torn write
        raise _damaged(name, 0, "the header is damaged")
    if head is None:  # a guess: it was the newest version's
        head = JournalFile(0, Peer._fields, [], len(header), 0, b"")
    seal = Seal.read(vault, b"journal", head.sealed, name) if head.sealed else None
    landings: list[Landing] = []
    last, size = head.after, head.size
    for start, end, line in _journal_lines(data, size):
        if not salvage and (line is None or line[0] != last + 1):
            _check_torn(data, name, start, last, counts_bytes=not head.columns)
            break
        if line is None:
            continue
        first, _, content = line
        try:
            landings.append(_decode_landing(first, content, head, seal))
        except ValueError as error:
            if not salvage:
                raise _damaged(name, start, f"record {first}: {error}") from None
        else:
            last, size = landings[-1].last, end
    return head._replace(landings=landings, size=size, torn=len(data) - size)


def _check_torn(data: bytes, name: str, start: int, last: int, counts_bytes: bool) -> None:
    """Accept the bad line at `start`, behind record `last`, as torn. Raises DamagedError.

    The line is damaged, not torn, when a good line behind it says that its record was on disk, or
    when the number of a good line shows that other lines are lost. The journal never writes a line
    behind one whose write failed. Version 1 counted bytes on disk, not records.
    """
    known, lowest = (start, 0) if counts_bytes else (last, last + 2)
    for _, _, line in _journal_lines(data, start):
        if line and (line[1] > known or line[0] < lowest):
            raise _damaged(name, start, f"a bad record before the good {line[0]}")


def _decode_landing(first: int, content: bytes, head: JournalFile, seal: Seal | None) -> Landing:
    """Raises ValueError."""
    is_first_version = not head.columns
    if seal:
        sealed = binascii.a2b_base64(content, strict_mode=True)
        if is_first_version:
            content = seal.open(first, FIRST_JOURNAL_MAGIC, sealed)
        else:
            content = seal.open(int.from_bytes(sealed[:12], "big"), b"%d" % first, sealed[12:])
    check_depth(content)
    value = _RECORD_DECODER.decode(str(content, "ascii"))
    records = [value] if is_first_version else value
    if not isinstance(records, list) or not records:
        raise ValueError("it holds no records")
    return Landing(first, records)


def read_journal(
    path: str, vault: Vault | None = None, salvage: bool = False
) -> JournalFile | None:
    """Read a journal's file, None when it does not exist. Raises DamagedError, StartError."""
    try:
        return parse_journal(Path(path).read_bytes(), path, vault, salvage)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(name: str, error: OSError) -> StartError:
    """What a file is that cannot be read: damaged, unless this user may not read it."""
    if isinstance(error, PermissionError):
        return StartError(
            f"cannot read {name}: {_reason(error)}: run this as root or as the gateway's user"
        )
    return _damaged(name, 0, f"cannot be read: {_reason(error)}")


def _damaged(name: str, offset: int, found: str) -> DamagedError:
    return DamagedError(
        name,
        f"at byte {offset}: {found}",
        ". The gateway does not start, so that no acknowledged change is lost unnoticed, and it "
        "has changed nothing. `wggw check` inspects the files; `wggw check --repair` saves what it "
        "can read into new ones",
    )


class Histogram:
    """A histogram of durations in seconds. One thread at a time calls observe()."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BUCKETS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect.bisect_left(BUCKETS, seconds)] += 1
        self._sum += seconds

    def render(self, name: str, labels: str = "") -> Iterator[str]:
        """Lines of a Prometheus histogram; `labels` are a="b" pairs with commas between them."""
        sums, total = list(itertools.accumulate(self._counts)), self._sum
        for edge, within in zip((*BUCKETS, "+Inf"), sums, strict=True):
            yield f'{name}_bucket{{{labels}{"," if labels else ""}le="{edge}"}} {within}\n'
        closed = f"{{{labels}}}" if labels else ""
        yield f"{name}_sum{closed} {total:.6f}\n{name}_count{closed} {sums[-1]}\n"


class Journal:
    """The open journal file.

    `durable` is the last record that is known to be on disk. `failure` is None, or says why the
    journal refuses every write until Files.renew() has begun a new file.
    """

    def __init__(self, path: str, disk: Disk, vault: Vault | None = None) -> None:
        self.path = path
        self.previous = path + ".previous"  # only `wggw check --repair` reads it
        self.size = 0  # bytes that are known to be good
        self.durable = 0
        self.failure: str | None = None
        self.syncs = Histogram()  # a write and its fsync
        self._disk = disk
        self._vault = vault
        self._seal: Seal | None = None
        self._handle = -1
        self._last = 0  # the last record in the file

    def resume(self, file: JournalFile) -> None:
        """Continue the file that was read behind its good lines. Raises OSError."""
        if file.sealed:
            self._seal = Seal.read(self._vault, b"journal", file.sealed, self.path)
        self._open(file.size, file.last)
        if file.torn:
            self._disk.truncate(self._handle, file.size)
        self._disk.fsync(self._handle)

    def start(self, after: int) -> None:
        """Replace the file by an empty one for numbers above `after`. Raises OSError."""
        self._seal = Seal(self._vault, b"journal") if self._vault else None
        header = journal_header(after, self._seal)
        self._disk.replace(self.path, [header])
        self._open(len(header), after)

    def _open(self, size: int, number: int) -> None:
        handle = os.open(self.path, os.O_RDWR | os.O_APPEND)
        self.close()
        self._handle = handle
        self.size = size
        self._last = self.durable = number

    def write(self, first: int, contents: Sequence[bytes], sync: bool) -> None:
        """Write records as one line. With `sync` they are on disk when this returns.

        After a DiskError no record counts, and the journal refuses every further write. withdraw()
        then tells whether the line is certainly gone.
        """
        if self.failure:
            raise DiskError(self.failure)
        try:
            line = encode_landing(first, self.durable, contents, self._seal)
            started = time.perf_counter()
            self._check_place()
            self._disk.write(self._handle, line)
            if sync:
                self._disk.fsync(self._handle)
        except (OSError, MemoryError) as error:
            self._fail(error)
        self.syncs.observe(time.perf_counter() - started)
        self.size += len(line)
        self._last = first + len(contents) - 1
        if sync:
            self.durable = self._last

    def flush(self) -> None:
        """Sync the lines that were written without `sync`. Raises DiskError."""
        if self.durable < self._last and not self.failure:
            try:
                self._disk.fsync(self._handle)
            except OSError as error:
                self._fail(error)
            self.durable = self._last

    def _check_place(self) -> None:
        """Raises OSError when somebody has moved or removed the file: a start would not find it."""
        if not os.path.samestat(os.stat(self.path), os.fstat(self._handle)):
            raise FileNotFoundError(errno.ENOENT, "another file is in its place")

    def look(self) -> None:
        """Notice early, without a change, that the file is gone. Raises DiskError."""
        if not self.failure and self._handle >= 0:
            try:
                self._check_place()
            except OSError as error:
                self._fail(error)

    def _fail(self, error: BaseException) -> NoReturn:
        self.failure = f"{self.path}: {_reason(error)}"
        raise DiskError(self.failure) from None

    def withdraw(self) -> bool:
        """Remove the bad line after a failed write. False: it may still be there.

        The fsync is for the file's length. When it fails as well, the line may be on disk and
        reappear after a power failure.
        """
        try:
            self._disk.truncate(self._handle, self.size)
            self._disk.fsync(self._handle)
        except OSError:
            return False
        return True

    def cut(self, number: int) -> None:
        """Drop the lines up to record `number`, which a snapshot contains.

        The old file is kept as `previous`. Raises DiskError.
        """
        if self.failure:
            raise DiskError(self.failure)
        try:
            data = os.pread(self._handle, self.size, 0)
            start = len(data)
            while start > 0:  # backwards: few lines came while the snapshot was written
                before = data.rfind(b"\n", 0, start - 1) + 1
                line = _JOURNAL_LINE.match(data, before)
                if line is None or int(line[2]) <= number:
                    break
                start = before
            header = journal_header(number, self._seal)
            self._disk.replace(self.path, [header, data[start:]], self.previous)
            self._open(len(header) + len(data) - start, max(self._last, number))
        except OSError as error:
            self._fail(error)

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


SNAPSHOT_MAGIC = b"wggw-snapshot 1 "
SNAPSHOT_CHUNK = 64 * 1024  # bytes of plaintext in each sealed chunk
SQLITE_MAGIC = b"SQLite format 3\0"
APPLICATION_ID = slice(68, 72)  # of the SQLite header (sqlite.org/fileformat.html section 1.3)


def snapshot_parts(image: bytes, vault: Vault | None) -> Iterator[bytes | memoryview]:
    """The parts of a snapshot file: a database image with its checksum, sealed if given a vault.

    The checksum (CRC-32 of the file with these four bytes zero) is SQLite's application id, so that
    the file stays an ordinary database. No part is a copy of the whole image: copying it would stop
    all threads for 10 ms at 60,000 peers.
    """
    view = memoryview(image)
    first = b"".join((view[:68], _image_checksum(image), view[72:SNAPSHOT_CHUNK]))
    if vault is None:
        yield first
        yield view[SNAPSHOT_CHUNK:]
        return
    seal = Seal(vault, b"snapshot")
    head = SNAPSHOT_MAGIC + seal.header
    yield b"%b %08x\n" % (head, zlib.crc32(head))
    for index, start in enumerate(range(0, len(view), SNAPSHOT_CHUNK)):
        chunk = bytes(view[start : start + SNAPSHOT_CHUNK]) if start else first
        last = start + SNAPSHOT_CHUNK >= len(view)
        yield seal.seal(index, b"last" if last else b"more", chunk)


def _image_checksum(image: bytes) -> bytes:
    view = memoryview(image)
    crc = zlib.crc32(view[72:], zlib.crc32(bytes(4), zlib.crc32(view[:68])))
    return (crc or 1).to_bytes(4, "big")


def decode_snapshot(data: bytes, vault: Vault | None, name: str) -> bytes:
    """The database image of a snapshot file. Raises DamagedError, ConfigError.

    An application id of 0 means that there is no checksum, because another program wrote it.
    """
    if data.startswith(SNAPSHOT_MAGIC):
        data = _open_snapshot(data, vault, name)
    elif vault is not None:
        LOG.warning("%s is not encrypted; the next snapshot is, with SNAPSHOT_KEY", name)
    if not data.startswith(SQLITE_MAGIC) or len(data) < 512:
        raise _damaged(name, 0, "this is not a snapshot")
    given = data[APPLICATION_ID]
    if given not in (bytes(4), _image_checksum(data)):
        raise _damaged(
            name,
            68,
            "the checksum does not match (after a deliberate edit with another program, "
            "PRAGMA application_id = 0 tells wggw to accept it)",
        )
    return data


def _open_snapshot(data: bytes, vault: Vault | None, name: str) -> bytes:
    head = re.match(rb"(wggw-snapshot 1 ([0-9a-f]{32} [0-9a-f]{16})) ([0-9a-f]{8})\n", data)
    if head is None or zlib.crc32(head[1]) != int(head[3], 16):
        raise _damaged(name, 0, "the header is damaged")
    seal = Seal.read(vault, b"snapshot", head[2], name)
    parts: list[bytes] = []
    size = SNAPSHOT_CHUNK + SEAL_BYTES
    for index, start in enumerate(range(head.end(), len(data), size)):
        place = b"last" if start + size >= len(data) else b"more"
        try:
            parts.append(seal.open(index, place, data[start : start + size]))
        except ValueError:
            raise _damaged(name, start, f"chunk {index} does not decrypt") from None
    return b"".join(parts)


# ==================================================================================================
# store: the rows. Schema, records, the one way to apply them, replay, the snapshot's image
#
# The rows say what is on disk and on the interfaces. They live in a SQLite database in memory.
# Every change of a peer is a Record, and only apply_in_slices() puts records into rows: for
# requests that landed, and for the replay of a journal from the disk or from the remote copy. Only
# the owner of the rows calls it.
#
# SQLite makes the JSON of a page, a feed or a single peer with CONFIGURATION_SQL. What does not
# come from the rows, such as the gateway's key, comes as a View, which Configurations keeps in
# temporary tables.
# Never here: interfaces and HTTP.
# ==================================================================================================

# The newest schema and its number, which a database holds as `PRAGMA user_version`. Every change of
# SCHEMA takes the next number. upgraded() copies the rows of a database with a lower number into a
# new one, so that no schema needs its own migration. Number 1 stands for eight schemas, number 2
# for two: they lack columns and the table gone, and some have triggers and the column peers.online.
SCHEMA_VERSION = 3
SCHEMA = """
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
        dns TEXT,
        port INTEGER,
        preshared_key TEXT,
        persistent_keepalive INTEGER NOT NULL,
        expires_at INTEGER,
        quota_bytes INTEGER,
        created_at INTEGER NOT NULL,
        request_id TEXT,
        obfuscation TEXT,
        label TEXT,
        service_class TEXT,
        quota_period TEXT,
        quota_base INTEGER NOT NULL DEFAULT 0,
        sequence INTEGER NOT NULL DEFAULT 0,
        changed_at INTEGER NOT NULL DEFAULT 0
    );
    CREATE INDEX peers_sequence ON peers (sequence);
    CREATE INDEX peers_kind ON peers (interface, status);
    CREATE INDEX peers_label ON peers (label) WHERE label IS NOT NULL;
    CREATE INDEX peers_request ON peers (request_id) WHERE request_id IS NOT NULL;
    CREATE INDEX peers_class ON peers (service_class) WHERE service_class IS NOT NULL;
    CREATE INDEX peers_expiry ON peers (expires_at)
        WHERE expires_at IS NOT NULL AND status = 'active';
    CREATE INDEX peers_expired ON peers (expires_at) WHERE status_reason = 'expired';
    CREATE INDEX peers_reason ON peers (status_reason) WHERE status_reason IS NOT NULL;
    CREATE INDEX peers_quota ON peers (id) WHERE quota_bytes IS NOT NULL;
    CREATE INDEX peers_period ON peers (id) WHERE quota_period IS NOT NULL;
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
        last_handshake INTEGER NOT NULL,
        sequence INTEGER NOT NULL DEFAULT 0
    );
    CREATE INDEX traffic_handshake ON traffic (last_handshake) WHERE last_handshake > 0;
    CREATE INDEX traffic_sequence ON traffic (sequence);
    CREATE TABLE gone (
        sequence INTEGER PRIMARY KEY,
        public_key TEXT NOT NULL UNIQUE,
        at INTEGER NOT NULL
    );
"""
# Tables and columns that only older schemas have, and what SQLite's ANALYZE makes. upgraded() drops
# these, and refuses all others that it does not know.
RETIRED = frozenset({"sqlite_sequence", "peers.online", "sqlite_stat1", "sqlite_stat4"})
# Tables that every schema had. A newer table starts empty where it is missing.
FIRST_TABLES = frozenset({"meta", "peers", "released", "traffic"})

_COLUMNS = ", ".join(Peer._fields)
_SELECT = f"SELECT {_COLUMNS} FROM peers"  # noqa: S608  names of this file
_INSERT = (
    f"INSERT INTO peers ({_COLUMNS}, sequence, changed_at) VALUES (?, ?{', ?' * len(Peer._fields)})"  # noqa: S608  names of this file
)
_TRAFFIC = "SELECT id, rx_bytes, tx_bytes, rx_seen, tx_seen, last_handshake FROM traffic"
_PUT_TRAFFIC = """
    REPLACE INTO traffic (id, rx_bytes, tx_bytes, rx_seen, tx_seen, last_handshake, sequence)
    SELECT * FROM (VALUES (?, ?, ?, ?, ?, ?, ?)) WHERE column1 IN (SELECT id FROM peers)
"""
_TRAFFIC_OF_PEER = """p.id, coalesce(t.rx_bytes, 0), coalesce(t.tx_bytes, 0),
    coalesce(t.rx_seen, 0), coalesce(t.tx_seen, 0), coalesce(t.last_handshake, 0)"""
# The columns after the key: the other arguments of encode_wire(), then the row of `traffic`.
_WIRE_AND_TRAFFIC = f"""p.preshared_key, p.service_class, p.assigned_ip, p.assigned_ipv6,
    {_TRAFFIC_OF_PEER}"""
_COUNTED = f"""
    SELECT p.public_key, {_WIRE_AND_TRAFFIC}
    FROM peers p LEFT JOIN traffic t ON t.id = p.id
    WHERE +p.interface = ? AND +p.status = 'active' AND p.public_key IN
"""  # noqa: S608  the plus signs: without them SQLite reads all active peers, not these few
# Left alone, SQLite takes the index of all suspended peers, and reads them once a tick.
_EXPIRED = " UNION ALL ".join(
    f"SELECT expires_at, id FROM peers INDEXED BY {index} WHERE {misfit} AND {behind}"  # noqa: S608  names of this file
    for index, misfit in (
        ("peers_expiry", "status = 'active' AND expires_at <= :now"),
        ("peers_expired", "status_reason = 'expired' AND expires_at > :now"),
    )
    for behind in ("expires_at = :at AND id > :id", "expires_at > :at")
)

_TIME = "strftime('%Y-%m-%dT%H:%M:%SZ', {}, 'unixepoch')"  # as rfc3339() writes it
# A handshake that is further ahead than this is from before the clock was set back.
_RECENT = f"t.last_handshake > {{0}} AND t.last_handshake < {{0}} + {2 * ONLINE_SECONDS}"
_ONLINE = f"(p.status = 'active' AND coalesce({_RECENT.format(':online_since')}, 0))"
_OF_FAMILIES = (
    "json(CASE p.tunnel_traffic WHEN 'ipv4' THEN '[{0}]' WHEN 'ipv6' THEN '[{1}]' "
    "ELSE '[{0},{1}]' END)"
)
# The members of a configuration, in their order, each as SQL with the tables of _SHOWN_FROM.
# json() marks a text that is JSON already. Python would need four times as long for a page.
# fmt: off
CONFIGURATION_SQL: Mapping[str, str] = {
    "public_key": "p.public_key",
    "status": "p.status",
    "status_reason": "p.status_reason",
    "assigned_ip": "p.assigned_ip",
    "assigned_ipv6": "p.assigned_ipv6",
    "tunnel_traffic": _OF_FAMILIES.format('"ipv4"', '"ipv6"'),
    "allowed_ips": _OF_FAMILIES.format('"0.0.0.0/0"', '"::/0"'),
    "dns": "coalesce(p.dns, i.dns)",
    "dns_servers": "json(coalesce(c.servers, '[]'))",
    "port": "coalesce(p.port, i.port)",
    "interface": "p.interface",
    "server_public_key": "i.public_key",
    "endpoint": "e.endpoint",
    "mtu": "i.mtu",
    "persistent_keepalive": "p.persistent_keepalive",
    "expires_at": _TIME.format("p.expires_at"),
    "quota_bytes": "p.quota_bytes",
    "quota_period": "p.quota_period",
    "quota_used": "max(0, coalesce(t.rx_bytes + t.tx_bytes, 0) - p.quota_base)",
    "created_at": _TIME.format("p.created_at"),
    "request_id": "p.request_id",
    "label": "p.label",
    "service_class": "p.service_class",
    "obfuscation":
        "json(CASE WHEN i.state IS NOT NULL THEN shown_obfuscation(i.state, p.obfuscation) END)",
    "online": f"json(iif({_ONLINE}, 'true', 'false'))",
    "last_handshake": _TIME.format("nullif(t.last_handshake, 0)"),
    "rx_bytes": "coalesce(t.rx_bytes, 0)",
    "tx_bytes": "coalesce(t.tx_bytes, 0)",
    "sequence": "p.sequence",
}
# fmt: on
_SHOWN_FROM = """
    FROM peers p LEFT JOIN traffic t ON t.id = p.id
    LEFT JOIN view_interfaces i ON i.name = p.interface
    LEFT JOIN view_endpoints e ON e.interface = p.interface AND e.port = coalesce(p.port, i.port)
    LEFT JOIN view_choices c ON c.name = coalesce(p.dns, i.dns)
"""
# No other process can open the database, and no disk has it.
_UNLOCKED = "PRAGMA locking_mode = EXCLUSIVE; PRAGMA synchronous = OFF;"
# What the view adds to the rows. Only the connection has these tables; no snapshot does.
_VIEW_SCHEMA = """
    PRAGMA temp_store = MEMORY;
    CREATE TEMP TABLE view_interfaces (
        name TEXT PRIMARY KEY,
        public_key TEXT,
        mtu INTEGER,
        state TEXT,  -- of its obfuscation
        port INTEGER,  -- of peers that have none of their own
        dns TEXT  -- as port
    ) WITHOUT ROWID;
    CREATE TEMP TABLE view_endpoints (
        interface TEXT, port INTEGER, endpoint TEXT, PRIMARY KEY (interface, port)
    ) WITHOUT ROWID;
    CREATE TEMP TABLE view_choices (name TEXT PRIMARY KEY, servers TEXT) WITHOUT ROWID;
"""


@functools.lru_cache(maxsize=256)
def _configuration_sql(names: Iterable[str]) -> str:
    """A configuration with these members, as an expression whose value is JSON."""
    members = ", ".join(f"'{name}', {CONFIGURATION_SQL[name]}" for name in names)
    return f"json_object({members})"


ALL_MEMBERS = tuple(CONFIGURATION_SQL)
_SHOWN = _configuration_sql(ALL_MEMBERS)
_CHANGES = f"""
    SELECT p.sequence, json_object('sequence', p.sequence, 'time', {_TIME.format("p.changed_at")},
        'deleted', json('false'), 'public_key', p.public_key, 'configuration', {_SHOWN})
    {_SHOWN_FROM} WHERE p.sequence > :after AND p.sequence <= :until
    UNION ALL SELECT sequence, json_object('sequence', sequence, 'time', {_TIME.format("at")},
        'deleted', json('true'), 'public_key', public_key, 'configuration', NULL)
    FROM gone WHERE sequence > :after AND sequence <= :until AND :after > 0
    ORDER BY 1 LIMIT :limit
"""  # noqa: S608  names of this file; `:after > 0`: a new client knows no deleted key
_USAGE = f"""
    SELECT t.sequence, json_object('public_key', p.public_key, 'rx_bytes', t.rx_bytes,
        'tx_bytes', t.tx_bytes, 'last_handshake', {_TIME.format("nullif(t.last_handshake, 0)")})
    FROM traffic t JOIN peers p ON p.id = t.id
    WHERE t.sequence > :after AND t.sequence <= :until ORDER BY t.sequence LIMIT :limit
"""  # noqa: S608  names of this file


@functools.lru_cache(maxsize=1024)
def shown_obfuscation(state: str, own: str | None) -> str:
    """What a client of an obfuscated interface must know, as JSON. SQL calls it.

    `state` is what encode_state() made of the interface's state, `own` the client's own values.
    For values that the client did not choose, the interface's are a suggestion. A client with a
    ContentPaddingAddition of its own sends packets of other sizes, and one with times of its own
    may keep a session for too long: `warnings` says when packets get lost. It also has what of
    AWG_WARNINGS the client's own values bring about.
    """
    decoded = decode_state(state)
    values = known_values(decode_own_values(own or "{}"), decoded.generation)
    parameters = decoded.parameters._replace(**values)
    warnings = loss_warnings(parameters) if "content_padding_addition" in values else []
    rules = [row for row in AWG_WARNINGS if values and row.until >= decoded.generation]
    present = broken_rules(decoded.parameters, rules)
    warnings += [text for text in broken_rules(parameters, rules) if text not in present]
    if (
        0
        < values.get("reject_after_time", PLAIN.reject_after_time).high
        < (parameters.rekey_after_time.high or 120)
    ):
        warnings.append(
            "RejectAfterTime: below RekeyAfterTime (120 seconds if it is not set), the client ends "
            "sessions before it renews them, and loses packets that reach it after a pause"
        )
    if outlives(parameters, decoded.parameters):
        warnings.append(
            "RekeyAfterTime, RejectAfterTime: the client keeps sessions for longer than the "
            "interface's RejectAfterTime, and loses packets"
        )
    shown = {
        "enabled": True,
        **show_state(decoded._replace(parameters=parameters)),
        **({"warnings": warnings} if warnings else {}),
    }
    return json.dumps(shown)


# The name in Store.private_keys of the API's certificate and key. No interface can have it.
CERTIFICATE_ROW = "/tls"


def decode_public_keys(text: str) -> dict[str, str]:
    """By interface: the key that the configurations of its peers name. Raises ValueError."""
    parsed = load_object(text)
    if not all(decode_key(key) for key in parsed.values()):
        raise ValueError("public_keys")
    return parsed


def decode_gateways(text: str) -> dict[str, tuple[str, ...]]:
    """By interface: the gateway's addresses that clients may use. Raises one of _BAD_RECORD."""
    given = load_json(text)
    for address in itertools.chain.from_iterable(given.values()):
        verify_address(address)
    return {name: tuple(addresses) for name, addresses in given.items()}


class Gaps(NamedTuple):
    """The gaps in the sequences, and the `floor`, below which no gap is remembered.

    Changes with sequences between the two ends of a gap may be lost, because of a crash or a
    restored older state. A client that has seen one of them must list all peers again.
    """

    gaps: tuple[tuple[int, int], ...] = ()
    floor: int = 0

    @classmethod
    def parse(cls, text: str) -> Gaps:
        """Raises ValueError, TypeError, KeyError."""
        given = load_json(text)
        gaps = tuple((int(begin), int(end)) for begin, end in given["gaps"])
        if any(not 0 <= begin < end <= MAX_INTEGER // 2 for begin, end in gaps):
            raise ValueError("a gap of sequences is out of range")
        return cls(gaps, int(given["floor"]))

    def skipped(self, begin: int, now: float) -> Gaps:
        """These gaps and one more, which ends above every sequence that a client may have seen.

        The state may be from a backup, so the gap ends an hour ahead of the clock in microseconds,
        and ahead of all changes that a crash can lose.
        """
        gap = (begin, max(begin + 10**9, int((now + 3600) * 1_000_000)))
        gaps = (*self.gaps, gap)
        floor = max([self.floor, *(end for _, end in gaps[:-MAX_GAPS])])
        return Gaps(gaps[-MAX_GAPS:], floor)

    def encode(self) -> str:
        return json.dumps({"gaps": self.gaps, "floor": self.floor}, separators=(",", ":"))


# Rows of `meta` that a record may set, with their parsers.
META_PARSERS: Mapping[str, Callable[[str], Any]] = {
    "obfuscation": decode_state,
    "public_keys": decode_public_keys,
    "feed": Gaps.parse,
    "periods": lambda text: {period: int(load_json(text)[period]) for period in PERIODS},
    "gateways": decode_gateways,
}


class TrafficRow(NamedTuple):
    """A row of the table `traffic`: totals, and the interface's counters at the last sample."""

    id: int
    rx_bytes: int = 0
    tx_bytes: int = 0
    rx_seen: int = 0
    tx_seen: int = 0
    last_handshake: int = 0  # Unix seconds, 0 for never

    @property
    def total(self) -> int:
        return self.rx_bytes + self.tx_bytes

    def counted(self, rx: int, tx: int, handshake: int) -> TrafficRow:
        """The row after a sample with these counters."""
        # They restart at 0 when the interface or the peer is made anew. If one fell, both did.
        again = rx < self.rx_seen or tx < self.tx_seen
        rx_before, tx_before = (0, 0) if again else (self.rx_seen, self.tx_seen)
        return TrafficRow(
            self.id,
            min(self.rx_bytes + rx - rx_before, MAX_TOTAL),
            min(self.tx_bytes + tx - tx_before, MAX_TOTAL),
            rx,
            tx,
            handshake or self.last_handshake,
        )


Seen = tuple[int, int, int]  # a peer's id, and its counters of the interface at the last sample


class Record(NamedTuple):
    """One change of the rows, as the journal holds it.

    `restart` holds (id, received, sent): with this record the peer's counters on the interface
    restart at 0, and until then, after a crash, the interface may still show these numbers.
    """

    put: Sequence[Peer] = ()  # new or changed peers as they are afterwards
    delete: Sequence[int] = ()  # ids
    traffic: Sequence[TrafficRow] = ()  # totals: applying them twice changes nothing
    restart: Sequence[tuple[int, int, int]] = ()
    settings: Mapping[str, str] = {}  # rows of `meta`
    released: Sequence[str] | None = None  # replaces the list of released addresses
    void: Sequence[int] = ()  # numbers of records that the interface refused
    at: int = 0  # the time of writing in Unix seconds; 0 in older journals

    def is_empty(self) -> bool:
        return not any(self[:-1]) and self.released is None

    def written(self, number: int) -> Written:
        """The record as a line of the journal holds it."""
        totals = bool(self.traffic) and self._replace(traffic=()).is_empty()
        return Written(number, encode_record(self), totals)

    def __repr__(self) -> str:  # rows hold preshared keys
        return f"Record({len(self.put)} put, {len(self.delete)} deleted)"


# A record's parts by their names in the journal.
_RECORD_PARTS = ("put", "del", "traffic", "restart", "set", "released", "void", "at")


def encode_record(record: Record) -> bytes:
    """A record as JSON. Empty parts are left out; a row is a list of values without names."""
    parts = (
        f'"{name}":{_encode_part(part)}'
        for name, part in zip(_RECORD_PARTS, record, strict=True)
        if part or (name == "released" and part is not None)
    )
    return f"{{{','.join(parts)}}}".encode("ascii")


def _encode_part(part: Any) -> str:
    """Encode long lists in pieces: a single call of the encoder would stall all threads."""
    if isinstance(part, (dict, int)) or len(part) <= READ_CHUNK:
        return _RECORD_ENCODER.encode(part)
    starts = range(0, len(part), READ_CHUNK)
    pieces = (_RECORD_ENCODER.encode(part[at : at + READ_CHUNK])[1:-1] for at in starts)
    return f"[{','.join(pieces)}]"


def decode_record(parts: Any, columns: tuple[str, ...]) -> Record:
    """The inverse of encode_record(). Raises one of _BAD_RECORD, also for unknown parts."""
    unknown = parts.keys() - set(_RECORD_PARTS)
    if unknown:
        raise ValueError(f"it has parts that this version does not know: {sorted(unknown)}")
    settings = parts.get("set", {})
    for name, value in settings.items():
        META_PARSERS[name](value)
    released, at = parts.get("released"), int(parts.get("at", 0))
    if not 0 <= at <= MAX_TIME:
        raise ValueError("its time is out of range")
    return Record(
        _decode_rows(parts.get("put", ()), columns),
        [int(number) for number in parts.get("del", ())],
        [TrafficRow._make(map(int, row)) for row in parts.get("traffic", ())],
        [(int(i), int(rx), int(tx)) for i, rx, tx in parts.get("restart", ())],
        settings,
        None if released is None else [str(address) for address in released],
        [int(number) for number in parts.get("void", ())],
        at,
    )


def decode_landings(
    landings: Iterable[Landing], columns: tuple[str, ...], name: str, salvage: bool = False
) -> Iterator[tuple[int, Record]]:
    """Every record with its number. Raises DamagedError; with `salvage` it skips bad records."""
    for landing in landings:
        for number, parts in enumerate(landing.records, landing.first):
            try:
                given = parts if columns else upgrade_record(parts)
                yield number, decode_record(given, columns or Peer._fields)
            except _BAD_RECORD as error:
                if not salvage:
                    raise _misfitting(name, number, error) from None


def _misfitting(name: str, number: int, error: Exception) -> DamagedError:
    return _damaged(name, 0, f"record {number} does not apply: {error}")


def _decode_rows(rows: Iterable[Any], columns: tuple[str, ...]) -> list[Peer]:
    if columns == Peer._fields:
        return [Peer._make(row) for row in rows]
    unknown = set(columns) - set(Peer._fields)
    if unknown:
        raise ValueError(f"it has columns that this version does not know: {sorted(unknown)}")
    return [Peer(**_NO_VALUES | dict(zip(columns, row, strict=True))) for row in rows]


_NO_VALUES: dict[str, Any] = {**dict.fromkeys(Peer._fields), **Peer._field_defaults}
_BAD_RECORD = (sqlite3.Error, ValueError, TypeError, KeyError, AttributeError, OverflowError)


class Filter(NamedTuple):
    """Which peers a list shows."""

    status: str | None = None
    interface: str | None = None
    online: bool | None = None
    status_reason: str | None = None
    label: str | None = None
    request_id: str | None = None


class Served(NamedTuple):
    """What an interface is to its clients."""

    settings: InterfaceSettings
    public_key: str
    mtu: int
    obfuscation: ObfuscationState | None


class View(NamedTuple):
    """What configurations show besides the rows."""

    online_since: int  # a peer with a handshake after this time (Unix seconds) is online
    choices: Mapping[str, Sequence[str]]  # DNS servers; the first choice is the default
    interfaces: tuple[Served, ...]


_without_collector = 0  # how many threads need it off
_collector_lock = threading.Lock()  # around that number and the switch


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    """Switch the cyclic garbage collector off while 60,000 peers exist as objects.

    They form no cycles, and scanning them takes 0.2 s in whatever thread triggers it.
    """
    global _without_collector
    with _collector_lock:
        _without_collector += 1
        gc.disable()
    try:
        yield
    finally:
        with _collector_lock:
            _without_collector -= 1
            if not _without_collector:
                gc.enable()


def open_memory() -> sqlite3.Connection:
    """An empty database in one block of memory, which serialize() copies at once.

    An ordinary `:memory:` database is copied page by page: that takes 6 to 50 ms at 60,000 peers
    instead of 2 to 10 ms.
    """
    db = sqlite3.connect(
        "file:wggw?vfs=memdb", uri=True, check_same_thread=False, isolation_level=None
    )
    db.executescript(_UNLOCKED + _VIEW_SCHEMA)
    db.create_function("shown_obfuscation", 2, shown_obfuscation, deterministic=True)
    return db


def warm_up(size: int) -> None:
    """Fault in the memory that this thread's next block of `size` bytes will get.

    Page faults take four fifths of the time of copying an image, and stall all threads. During a
    read into the block the other threads run. glibc then keeps the block for the copy, as it keeps
    freed blocks up to the size of the largest one freed so far (mallopt(3), M_MMAP_THRESHOLD);
    Service.run() frees one of LARGEST_BLOCK.
    """
    block = bytearray(size)
    with contextlib.suppress(OSError), open("/dev/zero", "rb", buffering=0) as zeros:
        zeros.readinto(block)


def empty_database() -> sqlite3.Connection:
    """The tables of the newest schema, without a row."""
    db = open_memory()
    db.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
    return db


class Newer(ValueError):
    """The database is that of a newer version."""


def upgraded(db: sqlite3.Connection) -> sqlite3.Connection:
    """The database in the newest schema: itself, or a new one with the same rows.

    Another program may have changed the newest schema, too: its indexes, views and triggers are
    left out. A column that the old schema lacks gets its default. Raises ValueError for an unknown
    schema number, table or column, sqlite3.Error when rows do not fit.
    """
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version < 1:
        raise ValueError(f"schema version {version} is not known")
    if version > SCHEMA_VERSION:
        raise Newer(
            f"schema version {version} is a newer wggw's, this one knows up to {SCHEMA_VERSION}"
        )
    new = empty_database()
    if version == SCHEMA_VERSION and _schema(db) == _schema(new):
        new.close()
        return db
    try:
        new.execute("BEGIN")
        old_tables, new_tables = _tables(db), _tables(new)
        if unknown := old_tables.keys() - new_tables.keys() - RETIRED:
            raise ValueError(f"its table {min(unknown)!r} is not known")
        if missing := FIRST_TABLES - old_tables.keys():
            raise ValueError(f"its table {min(missing)!r} is missing")
        for table, columns in new_tables.items():
            given = [c for c in old_tables.get(table, ()) if f"{table}.{c}" not in RETIRED]
            if unknown := set(given) - set(columns):
                raise ValueError(f"its column {table}.{min(unknown)} is not known")
            if given:
                names, marks = ", ".join(given), ", ".join("?" * len(given))
                rows = db.execute(f"SELECT {names} FROM {table}")  # noqa: S608  names of this file
                new.executemany(f"INSERT INTO {table} ({names}) VALUES ({marks})", rows)  # noqa: S608  as above
        for table in ("peers", "traffic"):  # an older schema has no sequences
            new.execute(f"UPDATE {table} SET sequence = id WHERE sequence = 0")  # noqa: S608
        new.execute("COMMIT")
    except BaseException:
        new.close()
        raise
    return new


def _schema(db: sqlite3.Connection) -> list[tuple[str, ...]]:
    return db.execute("SELECT type, name, sql FROM sqlite_master ORDER BY type, name").fetchall()


def _tables(db: sqlite3.Connection) -> dict[str, list[str]]:
    """The names of the tables, in the order of their creation, each with its columns' names."""
    tables = db.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND sql LIKE 'CREATE TABLE %' "
        "ORDER BY rowid"
    ).fetchall()  # no virtual tables: reading one would run its code
    return {
        table: [row[0] for row in db.execute("SELECT name FROM pragma_table_info(?)", (table,))]
        for (table,) in tables
    }


class Ancestor(ValueError):
    """The database is that of the program before wggw."""


def is_ancestor(db: sqlite3.Connection) -> bool:
    """Whether this is the database of the program before wggw, which has the same default path."""
    # An ordinary table alone: reading another kind, or a generated column, would run its code.
    query = "SELECT sql FROM sqlite_master WHERE type = 'table' AND name = 'wg_configs'"
    row = db.execute(query).fetchone()
    if row is None or not str(row[0]).upper().startswith("CREATE TABLE "):
        return False
    query = "SELECT 1 FROM pragma_table_xinfo('wg_configs') WHERE hidden"
    return db.execute(query).fetchone() is None


def open_image(image: bytes) -> sqlite3.Connection:
    """The rows of any version's snapshot, in the newest schema. Raises sqlite3.Error and others."""
    db = open_memory()
    try:
        db.deserialize(image)
        db.executescript(_UNLOCKED)
        if is_ancestor(db):
            raise Ancestor("it is the database of the gateway before wggw")
        if image[APPLICATION_ID] == bytes(4):  # another program wrote it
            found = db.execute("PRAGMA integrity_check(1)").fetchone()[0]
            if found != "ok":
                raise ValueError(found)
        newest = upgraded(db)
    except BaseException:
        db.close()
        raise
    if newest is not db:
        db.close()
    return newest


class Counts:
    """How many peers there are. Every change of the rows keeps these numbers up to date."""

    def __init__(self, db: sqlite3.Connection) -> None:
        kinds = db.execute("SELECT interface, status, count(*) FROM peers GROUP BY 1, 2")
        self.peers = collections.Counter({(name, status): n for name, status, n in kinds})
        kinds = db.execute(  # of peers that the gateway suspended
            "SELECT interface, status_reason, count(*) FROM peers "
            "WHERE status_reason IS NOT NULL GROUP BY 1, 2"
        )
        self.reasons = collections.Counter({(name, reason): n for name, reason, n in kinds})
        classes = db.execute(
            "SELECT service_class, count(*), sum(CASE WHEN status = 'active' THEN "
            "(assigned_ip IS NOT NULL) + (assigned_ipv6 IS NOT NULL) ELSE 0 END) "
            "FROM peers WHERE service_class IS NOT NULL GROUP BY 1"
        ).fetchall()
        self.classes = collections.Counter({name: n for name, n, _ in classes})
        # How many addresses the active peers of a class have.
        self.class_addresses = collections.Counter({name: n for name, _, n in classes})
        # Above every id that peers had.
        self.next_id: int = db.execute("SELECT coalesce(max(id), 0) + 1 FROM peers").fetchone()[0]

    def total(self) -> int:
        return self.peers.total()

    def on(self, interface: str) -> int:
        return sum(n for (name, _), n in self.peers.items() if name == interface)

    def add(self, peer: Peer, sign: int) -> None:
        """Count a peer that came (1) or went (-1)."""
        self.peers[peer.interface, peer.status] += sign
        if peer.status_reason is not None:
            self.reasons[peer.interface, peer.status_reason] += sign
        if peer.service_class is not None:
            self.classes[peer.service_class] += sign
            if peer.status == "active":
                self.class_addresses[peer.service_class] += sign * len(_addresses_of(peer))


class Released:
    """The addresses that peers gave up and nobody has taken since. `any`: there may be some."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self.any = bool(db.execute("SELECT 1 FROM released").fetchone())

    def addresses(self, family: str | None = None) -> list[str]:
        """Oldest first."""
        rows = self._db.execute("SELECT address FROM released ORDER BY sequence")
        addresses = [row[0] for row in rows]
        return [a for a in addresses if family is None or (":" in a) == (family == "ipv6")]

    def add(self, addresses: Sequence[str]) -> None:
        rows = [(address,) for address in addresses]
        self._db.executemany("INSERT OR REPLACE INTO released (address) VALUES (?)", rows)
        self.any = self.any or bool(rows)

    def take(self, peers: Sequence[Peer]) -> None:
        """These peers have their addresses now."""
        rows = [(address,) for peer in peers for address in _addresses_of(peer)]
        self._db.executemany("DELETE FROM released WHERE address = ?", rows)

    def clear(self) -> None:
        self._db.execute("DELETE FROM released")
        self.any = False


class Configurations:
    """Peers as the API shows them, in JSON that SQLite writes."""

    def __init__(self, db: sqlite3.Connection, counts: Counts) -> None:
        self._db = db
        self._counts = counts
        self._viewed: tuple[Any, ...] = ()  # what the tables of _VIEW_SCHEMA hold

    def prepare(self, view: View) -> dict[str, Any]:
        """Write the view into its tables if it has changed. Returns the parameter of _ONLINE."""
        if view[1:] != self._viewed:
            default = next(iter(view.choices))
            choices = [(name, json.dumps(servers)) for name, servers in view.choices.items()]
            interfaces, endpoints = [], []
            for of, key, mtu, state in view.interfaces:
                encoded = state and encode_state(state)
                interfaces.append((of.name, key, mtu, encoded, of.ports[0], default))
                endpoints += [(of.name, port, of.endpoint(port)) for port in of.ports]
            for table in ("view_choices", "view_interfaces", "view_endpoints"):
                self._db.execute(f"DELETE FROM {table}")  # noqa: S608  names of this file
            self._db.executemany("INSERT INTO view_choices VALUES (?, ?)", choices)
            query = "INSERT INTO view_interfaces VALUES (?, ?, ?, ?, ?, ?)"
            self._db.executemany(query, interfaces)
            self._db.executemany("INSERT INTO view_endpoints VALUES (?, ?, ?)", endpoints)
            self._viewed = view[1:]
        return {"online_since": view.online_since}

    def show(self, public_key: str, view: View, names: tuple[str, ...] = ALL_MEMBERS) -> str | None:
        """A peer's configuration as JSON, with all members or those named."""
        values = {**self.prepare(view), "public_key": public_key}
        query = f"SELECT {_configuration_sql(names)} {_SHOWN_FROM} WHERE p.public_key = :public_key"
        row: tuple[str] | None = self._db.execute(query, values).fetchone()
        return row[0] if row else None

    def page(
        self,
        after: int,
        limit: int,
        chosen: Filter,
        view: View,
        names: tuple[str, ...] = ALL_MEMBERS,
    ) -> tuple[list[tuple[int, str]], int | None]:
        """Up to `limit` peers with an id above `after`, in order of creation: (id, JSON) of each.

        It also returns the `after` of the next page, None for the last one. No index knows which
        peers are online. With this filter a page reads at most PAGE_SCAN peers and may therefore be
        shorter than `limit`.
        """
        values = {**self.prepare(view), **chosen._asdict(), "after": after, "limit": limit + 1}
        exact = [n for n in ("label", "request_id", "status_reason") if values[n] is not None]
        conditions = ["p.id > :after", *(f"p.{name} = :{name}" for name in exact)]
        last = MAX_INTEGER
        if chosen.online is not None:
            query = "SELECT max(id) FROM (SELECT id FROM peers WHERE id > ? ORDER BY id LIMIT ?)"
            row = self._db.execute(query, (after, PAGE_SCAN)).fetchone()
            last = values["last"] = row[0] or MAX_INTEGER
            conditions += ["p.id <= :last", _ONLINE if chosen.online else f"NOT {_ONLINE}"]
        kinds: list[dict[str, Any]] = [{}]
        if chosen.status is not None or chosen.interface is not None:
            # The index lists each kind by id: read `limit` of each, then keep the first ones.
            kinds = [
                {"interface": name, "status": status}
                for name, status in self._counts.peers
                if chosen.interface in (None, name) and chosen.status in (None, status)
            ]
            conditions += ["p.interface = :interface", "p.status = :status"]
        query = (
            f"SELECT p.id, {_configuration_sql(names)} {_SHOWN_FROM} "
            f"WHERE {' AND '.join(conditions)} ORDER BY p.id LIMIT :limit"
        )
        rows: list[tuple[int, str]] = []
        for kind in kinds:
            rows += self._db.execute(query, values | kind)
        rows.sort()
        if len(rows) > limit:
            return rows[:limit], rows[limit - 1][0]
        return rows, last if last < self._counts.next_id - 1 else None


class Feeds:
    """What the followers of changes and usage read.

    Every changed row and every deleted key gets the next sequence, and replay assigns the same
    ones. Rows of a landing that is only partly applied have sequences above `sequence`, and no feed
    shows them.
    """

    def __init__(
        self, db: sqlite3.Connection, meta: Mapping[str, str], configurations: Configurations
    ) -> None:
        self._db = db
        self._configurations = configurations
        self._gaps = Gaps.parse(meta["feed"]) if "feed" in meta else Gaps()
        self.forgotten = int(meta.get("forgotten", 0))  # the last that `gone` lost to MAX_GONE
        self.diverged: int | None = None  # clients may have seen other changes after this one
        self._gone: int = db.execute("SELECT count(*) FROM gone").fetchone()[0]
        self.sequence = int(meta.get("sequence", 0))  # the last one that was assigned
        self.last_change = 0  # the last one of a peer or of a deleted key
        self._find_last()

    def _find_last(self) -> None:
        """Raise `sequence` and `last_change` to what the rows have."""
        for table in ("peers", "gone", "traffic"):
            query = f"SELECT coalesce(max(sequence), 0) FROM {table}"  # noqa: S608  names of this file
            last = self._db.execute(query).fetchone()[0]
            self.sequence = max(self.sequence, last)
            if table != "traffic":
                self.last_change = max(self.last_change, last)

    # --- for clients -----------------------------------------------------------------------------

    def check(self, after: int) -> None:
        """Raises Gone when some change behind this sequence is no longer remembered.

        A client that began at 0 and has not reached the end continues with a negative sequence: no
        deletion that was forgotten before concerns it. Of one that begins now some may be
        forgotten, if more than MAX_GONE peers are deleted before it reaches the end.
        """
        lost = any(begin < abs(after) < end for begin, end in self._gaps.gaps)
        forgotten = 0 < after < max(self.forgotten, self._gaps.floor)
        if lost or forgotten or abs(after) > self.sequence:
            raise Gone("after: later changes are no longer remembered: begin again with 0")

    @staticmethod
    def next_after(after: int, last: int, until: int, full: bool) -> int:
        """The `after` of the request behind an answer that ends with `last`; never within a gap.

        An answer that is not `full` has all that there is up to `until`.
        """
        if not full:
            return until
        return -last if after <= 0 else last

    def changes(
        self, after: int, limit: int, view: View, until: int = MAX_INTEGER
    ) -> list[tuple[int, str]]:
        """Changes behind a sequence, as (sequence, JSON): each key once, at its latest change."""
        values = {"after": abs(after), "limit": limit, "until": min(until, self.sequence)}
        return self._db.execute(_CHANGES, values | self._configurations.prepare(view)).fetchall()

    def usage(self, after: int, limit: int, until: int = MAX_INTEGER) -> list[tuple[int, str]]:
        """(sequence, JSON) of the totals of peers whose totals changed, ordered by sequence."""
        values = {"after": abs(after), "until": min(until, self.sequence), "limit": limit}
        return self._db.execute(_USAGE, values).fetchall()

    # --- what changes them -----------------------------------------------------------------------

    def with_gap(self, now: float) -> str:
        """The row `feed` of `meta` for rows that may lack changes which clients have seen."""
        begin = self.sequence if self.diverged is None else self.diverged
        return self._gaps.skipped(begin, now).encode()

    def set_gaps(self, text: str) -> None:
        """Set the gaps. Rows within the newest one, which a copy's boot can have, move behind it:
        no client gets a sequence within a gap any more.
        """
        self._gaps = Gaps.parse(text)
        begin, end = self._gaps.gaps[-1]
        self.sequence = max(self.sequence, end)
        for table in ("peers", "gone", "traffic"):
            self._db.execute(
                f"UPDATE {table} SET sequence = sequence + ? WHERE sequence > ? AND sequence < ?",  # noqa: S608  names of this file
                (end - begin, begin, end),
            )
        self._find_last()

    def note_gone(self, keys: Sequence[tuple[int, str]], at: int) -> None:
        """Remember the (sequence, key) of deleted keys, unless another peer has them now."""
        self.note_back(key for _, key in keys)
        self._gone += self._db.executemany(
            "INSERT INTO gone (sequence, public_key, at) SELECT ?, ?, ? "
            "WHERE NOT EXISTS (SELECT 1 FROM peers WHERE public_key = ?)",
            [(sequence, key, at, key) for sequence, key in keys],
        ).rowcount
        excess = self._gone - MAX_GONE
        if excess > 0:
            query = "SELECT sequence FROM gone ORDER BY sequence LIMIT 1 OFFSET ?"
            self.forgotten = self._db.execute(query, (excess - 1,)).fetchone()[0]
            self._db.execute("DELETE FROM gone WHERE sequence <= ?", (self.forgotten,))
            self._gone = MAX_GONE

    def note_back(self, keys: Iterable[str]) -> None:
        """Peers have these keys, so that they are not gone, or no longer."""
        if self._gone:
            rows = [(key,) for key in keys]
            query = "DELETE FROM gone WHERE public_key = ?"
            self._gone -= self._db.executemany(query, rows).rowcount


class Queries:
    """What is asked of many rows, and changes none.

    Methods with `after` and `limit` read the next `limit` peers with an id above `after`, and tell
    of each its id and what is asked for. Where this is only for some peers, the others have None: a
    query for the wanted ones alone would read the whole table when they are few.
    """

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    # --- lists and figures -----------------------------------------------------------------------

    def totals_after(self, after: int, limit: int) -> list[tuple[int, str, str, TrafficRow]]:
        """(id, interface, key, totals)."""
        rows = self._scan(f"p.interface, p.public_key, {_TRAFFIC_OF_PEER}", "", (after, limit))
        return [(*row[:3], TrafficRow._make(row[3:])) for row in rows]

    def online(self, since: int) -> int:
        """How many active peers had a handshake after `since` (Unix seconds)."""
        row = self._db.execute(  # the literal comparison lets SQLite use the partial index
            "SELECT count(*) FROM traffic t JOIN peers p ON p.id = t.id "  # noqa: S608  names of this file
            f"WHERE t.last_handshake > 0 AND {_RECENT.format(':since')} AND p.status = 'active'",
            {"since": since},
        )
        return int(row.fetchone()[0])

    def last_handshakes(self, limit: int) -> dict[str, int]:
        """The `limit` newest handshakes: public key -> Unix seconds."""
        rows = self._db.execute(
            "SELECT p.public_key, t.last_handshake FROM traffic t JOIN peers p ON p.id = t.id "
            "WHERE t.last_handshake > 0 ORDER BY t.last_handshake DESC LIMIT ?",
            (limit,),
        )
        return dict(rows.fetchall())

    # --- what interfaces should have -------------------------------------------------------------

    def wire_rows(self, interface: str, after: int, limit: int) -> list[Sequence[Any]]:
        """(id, the columns of counted()); the key is None if not active on this interface."""
        key = "CASE WHEN p.interface = ? AND p.status = 'active' THEN p.public_key END"
        return self._scan(f"{key}, {_WIRE_AND_TRAFFIC}", "", (interface, after, limit))

    def held(self, interface: str, family: str) -> list[str]:
        """All addresses of an interface's peers, by one text: three times as fast as by rows."""
        column = ADDRESS_FIELD[family]
        query = f"SELECT group_concat({column}, ' ') FROM peers WHERE +interface = ?"  # noqa: S608  names of this file
        text: str | None = self._db.execute(query, (interface,)).fetchone()[0]
        return text.split() if text else []

    def held_rows(
        self, interface: str, family: str, after: int, limit: int
    ) -> list[tuple[int, str | None]]:
        """(id, address); None for peers of other interfaces."""
        address = f"CASE WHEN p.interface = ? THEN p.{ADDRESS_FIELD[family]} END"
        return self._scan(address, "", (interface, after, limit))

    def _scan(self, columns: str, condition: str, values: Sequence[Any]) -> list[Any]:
        """The id and these columns; `values` end with after and limit."""
        return self._db.execute(
            f"SELECT p.id, {columns} FROM peers p LEFT JOIN traffic t ON t.id = p.id "  # noqa: S608  names of this file
            f"WHERE {condition} p.id > ? ORDER BY p.id LIMIT ?",
            values,
        ).fetchall()

    def counted(self, interface: str, keys: Sequence[str]) -> dict[str, Sequence[Any]]:
        """By key of active peers: preshared key, addresses, and their row of `traffic`."""
        query = f"{_COUNTED} ({', '.join('?' * len(keys))})"
        return {row[0]: row for row in self._db.execute(query, (interface, *keys))}

    def chosen(self) -> list[tuple[str, bool, int | None, str | None, int]]:
        """(interface, whether it is a plain one, port, DNS choice, how many peers have these)."""
        columns = "interface, obfuscation IS NULL, port, dns"
        return self._db.execute(
            f"SELECT {columns}, count(*) FROM peers GROUP BY {columns}"  # noqa: S608  names of this file
        ).fetchall()

    # --- limits ----------------------------------------------------------------------------------

    def expired(
        self, now: int, after: tuple[int, int], limit: int
    ) -> list[tuple[tuple[int, int], int]]:
        """(place, id) of peers whose status does not fit their expires_at.

        These are active peers that have expired, and, after the clock was set back, peers that the
        gateway suspended too early. A place is (expires_at, id); `after` is the last one read.
        """
        values = {"now": now, "at": after[0], "id": after[1], "limit": limit}
        rows = self._db.execute(f"{_EXPIRED} ORDER BY 1, 2 LIMIT :limit", values)
        return [(row, row[1]) for row in rows]

    def quotas(self, after: int, limit: int) -> list[tuple[int, bool]]:
        """(id, whether its quota requires another status) of peers with a quota."""
        over = "coalesce(t.rx_bytes + t.tx_bytes, 0) - p.quota_base > p.quota_bytes"
        due = f"CASE WHEN {over} THEN p.status = 'active' ELSE p.status_reason IS 'quota' END"
        return self._scan(due, "p.quota_bytes IS NOT NULL AND", (after, limit))

    def periodic(self, periods: Sequence[str], after: int, limit: int) -> list[tuple[int, bool]]:
        """(id, whether its quota was used and has one of these periods) of peers with a period."""
        used = "coalesce(t.rx_bytes + t.tx_bytes, 0) <> p.quota_base"
        due = f"p.quota_period IN ({', '.join('?' * len(periods))}) AND {used}"
        return self._scan(due, "p.quota_period IS NOT NULL AND", (*periods, after, limit))


class _Change:
    """A record on its way into the rows. The steps that free keys and addresses come first."""

    def __init__(self, record: Record, store: Store, db: sqlite3.Connection) -> None:
        self._record = record
        self._db, self._by_id = db, store.by_id
        self._counts, self._released, self._feeds = store.counts, store.released, store.feeds
        first = store.feeds.sequence + 1
        self._sequences = {peer.id: n for n, peer in enumerate(record.put, first)}
        self._last = store.feeds.sequence + len(record.put)  # the last assigned sequence
        self._before: dict[int, Peer] = {}  # the former rows of changed peers, by id
        self._given_up: dict[str, int] = {}  # keys and addresses that changed peers had
        self._givers: set[int] = set()  # the peers whose former keys or addresses others get
        self._freed: list[str] = []  # addresses that peers had
        self._gone: list[str] = []  # keys that peers had

    def steps(self) -> Iterator[tuple[Sequence[Any], Callable[[Any], None]]]:
        """The steps in turn: what each works on, and the function that does a slice of it."""
        record, put = self._record, self._record.put
        yield record.delete, self._delete
        yield put, self._find_former
        yield self._freed, self._released.add
        if self._released.any:
            yield put, self._released.take
        if self._given_up and len(put) > APPLY_SLICE:
            yield put, self._find_givers
            self._put([peer for peer in put if peer.id in self._givers])  # all of them leave first
            put = [peer for peer in put if peer.id not in self._givers]
        yield put, self._put
        yield self._gone, self._note_gone
        yield record.traffic, self._put_totals
        yield record.restart, self._restart
        if record.released is not None:
            self._released.clear()
            yield record.released, self._released.add
        if record.put or record.delete:
            self._feeds.last_change = self._last
        self._feeds.sequence = self._last
        for name, text in record.settings.items():
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, text))
            if name == "feed":
                self._feeds.set_gaps(text)

    def _delete(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            row = self._by_id(number)
            if row is None:
                raise sqlite3.IntegrityError(f"there is no peer with id {number}")
            self._freed += _addresses_of(row)
            self._gone.append(row.public_key)
            self._take_out(row)
            self._db.execute("DELETE FROM traffic WHERE id = ?", (number,))

    def _take_out(self, row: Peer) -> None:
        self._db.execute("DELETE FROM peers WHERE id = ?", (row.id,))
        self._counts.add(row, -1)

    def _find_former(self, peers: Sequence[Peer]) -> None:
        for peer in peers:
            if peer.id < self._counts.next_id and (row := self._by_id(peer.id)) is not None:
                self._before[peer.id] = row
                kept = _addresses_of(peer)
                addresses = [address for address in _addresses_of(row) if address not in kept]
                keys = [row.public_key] if row.public_key != peer.public_key else []
                self._freed += addresses
                self._gone += keys
                self._given_up.update(dict.fromkeys(keys + addresses, peer.id))

    def _find_givers(self, peers: Sequence[Peer]) -> None:
        for peer in peers:
            for value in (peer.public_key, *_addresses_of(peer)):
                if value in self._given_up:
                    self._givers.add(self._given_up[value])

    def _put(self, peers: Sequence[Peer]) -> None:
        for peer in peers:
            if peer.id in self._before:
                self._take_out(self._before[peer.id])
        at, sequences = self._record.at, self._sequences
        self._db.executemany(_INSERT, [(*peer, sequences[peer.id], at) for peer in peers])
        self._feeds.note_back(peer.public_key for peer in peers)
        for peer in peers:
            self._counts.add(peer, 1)
            row = self._before.get(peer.id)
            if row is None:
                self._counts.next_id = max(self._counts.next_id, peer.id + 1)
            elif row.public_key != peer.public_key or row.status != peer.status:
                self._restart([(peer.id,)])  # it leaves or joins the interface

    def _restart(self, rows: Sequence[Sequence[int]]) -> None:
        """The peers' counters on the interface restart at 0. Ids are the first columns."""
        ids = [(row[0],) for row in rows]
        self._db.executemany("UPDATE traffic SET rx_seen = 0, tx_seen = 0 WHERE id = ?", ids)

    def _note_gone(self, keys: Sequence[str]) -> None:
        self._feeds.note_gone(list(enumerate(keys, self._last + 1)), self._record.at)
        self._last += len(keys)

    def _put_totals(self, rows: Sequence[TrafficRow]) -> None:
        numbered = [(*row, n) for n, row in enumerate(rows, self._last + 1)]
        self._db.executemany(_PUT_TRAFFIC, numbered)
        self._last += len(rows)


def _addresses_of(peer: Peer) -> list[str]:
    return [address for address in (peer.assigned_ip, peer.assigned_ipv6) if address]


class Store:
    """The rows, and the one way in which they change."""

    def __init__(self, image: bytes | None = None) -> None:
        """Without an image the rows are empty. Raises sqlite3.Error, ValueError, TypeError."""
        self._db = open_image(image) if image is not None else empty_database()
        rows = dict(self._db.execute("SELECT name, value FROM meta"))
        self.loaded = image is not None  # the rows come from a snapshot
        # The last record that the rows contain; it never decreases.
        self.number = int(rows["number"]) if self.loaded else 0
        self.lineage = rows.get("lineage", "")  # a random id; the first start chooses it
        self.journaled = rows.get("journaled") == "1"  # a journal belongs to the snapshot
        prefix = "private_key "  # before an interface's name; only encrypted snapshots hold keys
        self.private_keys = {
            name.removeprefix(prefix): key for name, key in rows.items() if name.startswith(prefix)
        }
        self.counts = Counts(self._db)
        self.released = Released(self._db)
        self.configurations = Configurations(self._db, self.counts)
        self.feeds = Feeds(self._db, rows, self.configurations)
        self.queries = Queries(self._db)
        self.changed = False  # since the last snapshot
        self.restarted: dict[int, tuple[int, int]] = {}  # see replay()

    def take(self, other: Store) -> None:
        """Become another store, which must not be used afterwards."""
        self._db.close()
        self.__dict__.update(other.__dict__)
        self.changed = True

    # --- whole states ----------------------------------------------------------------------------

    def image(self, number: int, with_keys: bool, journaled: bool) -> bytes:
        """The database as bytes, named after record `number`.

        `with_keys`: it will be encrypted. `journaled`: a journal belongs to it.
        """
        rows = {
            "number": str(number),
            "journaled": str(int(journaled)),
            "sequence": str(self.feeds.sequence),
            "forgotten": str(self.feeds.forgotten),
            "lineage": self.lineage,
        }
        if with_keys:
            rows |= {f"private_key {name}": key for name, key in self.private_keys.items()}
        self._db.execute("DELETE FROM meta WHERE name LIKE 'private_key %'")
        self._db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", rows.items())
        return self._db.serialize()

    def image_size(self) -> int:
        query = "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"
        size: int = self._db.execute(query).fetchone()[0]
        return size

    def verify(self) -> None:
        """Check all rows of a database that came from outside. Raises ValueError, sqlite3.Error."""
        if not 0 <= self.number < MAX_INTEGER // 2:
            raise ValueError("its record number is out of range")
        for address in self.released.addresses():
            verify_address(address)
        limits = (MAX_TOTAL, MAX_TOTAL, MAX_INTEGER, MAX_INTEGER, MAX_TIME)
        bad = " OR ".join(
            f"typeof({name}) <> 'integer' OR {name} NOT BETWEEN 0 AND {limit}"
            for name, limit in zip(TrafficRow._fields[1:], limits, strict=True)
        )
        if self._db.execute(f"SELECT 1 FROM traffic WHERE {bad}").fetchone():  # noqa: S608  names of this file
            raise ValueError("traffic is out of range")
        if self._db.execute("SELECT 1 FROM peers WHERE id < 1").fetchone():
            raise ValueError("an id is out of range")
        for name in META_PARSERS:
            self.meta(name)
        for row in self._db.execute(_SELECT):
            verify_peer(Peer._make(row))

    # --- how rows change -------------------------------------------------------------------------

    def apply_in_slices(self, record: Record) -> Iterator[None]:
        """Change the rows as a record says, in slices of APPLY_SLICE rows.

        Between two slices no peer is missing. Raises sqlite3.Error halfway when it does not fit.
        """
        rows = 0
        for items, step in _Change(record, self, self._db).steps():
            for start in range(0, len(items), APPLY_SLICE):  # a generator would cost 2 µs a change
                part = items[start : start + APPLY_SLICE]
                step(part)
                rows += len(part)
                if rows >= APPLY_SLICE:
                    yield
                    rows = 0
        self.changed = True

    def apply(self, record: Record) -> None:
        """All slices of apply_in_slices() at once."""
        for _ in self.apply_in_slices(record):
            pass

    def replay(
        self, file: JournalFile, name: str, skipped: Callable[[str], None] | None = None
    ) -> None:
        """Apply a journal's records above `number`. Raises DamagedError.

        With `skipped`, it applies what it can instead, and passes each finding to this function. If
        a crash came before the interface had the last landing, the counters that this landing
        restarts still go on: `restarted` keeps their last known values.
        """
        landings = [landing for landing in file.landings if landing.last > self.number]
        if file.after > self.number and not skipped:
            raise _damaged(
                name, 0, f"it follows record {file.after}, but the state ends at {self.number}"
            )
        records = list(decode_landings(landings, file.columns, name, skipped is not None))
        # First of all: what an interface refused never counts, whatever follows it.
        void = {number for _, record in records for number in record.void}
        if not skipped:  # a record that fails ends the start, so SQLite need not roll it back
            self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("BEGIN")
        for number, record in records:
            if number > self.number and number not in void:
                if skipped:
                    if number > self.number + 1:
                        skipped(f"no record between {self.number} and {number}")
                    # A record that is lost made the other peers.
                    known = [peer_id for peer_id in record.delete if self.by_id(peer_id)]
                    record = record._replace(delete=known)
                try:
                    self.apply(record)
                except _BAD_RECORD as error:
                    if not skipped:
                        raise _misfitting(name, number, error) from None
                    skipped(f"record {number} does not apply")
            self.number = max(self.number, number)
        self._db.execute("COMMIT")
        self._db.execute("PRAGMA journal_mode = MEMORY")
        last = landings[-1].first if landings else MAX_INTEGER
        self.restarted = {
            i: (rx, tx) for number, r in records if number >= last for i, rx, tx in r.restart
        }
        self.changed = self.changed or bool(records)

    def remember(self, name: str, value: str) -> None:
        """Set a row of META_PARSERS without a record. A crash may lose it."""
        self._db.execute("INSERT OR REPLACE INTO meta (name, value) VALUES (?, ?)", (name, value))
        self.changed = True

    # --- what all read ---------------------------------------------------------------------------

    def get(self, public_key: str) -> Peer | None:
        row = self._db.execute(f"{_SELECT} WHERE public_key = ?", (public_key,)).fetchone()
        return Peer._make(row) if row else None

    def by_id(self, peer_id: int) -> Peer | None:
        row = self._db.execute(f"{_SELECT} WHERE id = ?", (peer_id,)).fetchone()
        return Peer._make(row) if row else None

    def peers_after(self, after: int, limit: int) -> list[Peer]:
        rows = self._db.execute(f"{_SELECT} WHERE id > ? ORDER BY id LIMIT ?", (after, limit))
        return [Peer._make(row) for row in rows]

    def traffic(self, peer_id: int) -> TrafficRow:
        row = self._db.execute(f"{_TRAFFIC} WHERE id = ?", (peer_id,)).fetchone()
        return TrafficRow._make(row) if row else TrafficRow(peer_id)

    def meta(self, name: str) -> Any:
        """The parsed value of a row of META_PARSERS, None without one. Raises ValueError."""
        row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return META_PARSERS[name](row[0]) if row else None

    def public_keys(self) -> dict[str, str]:
        """By interface: the key that the configurations of its peers name."""
        return self.meta("public_keys") or {}


# --- journals of version 1 ------------------------------------------------------------------------
#
# Version 1 wrote one record a line, and rows as JSON objects. The first half of its journal may be
# in another file, `previous`. It wrote a desired state as records marked "part", followed by one
# marked "end". Parts without an end were never acknowledged.


def upgrade_record(given: Mapping[str, Any]) -> dict[str, Any]:
    """A record of version 1 in the present format. Raises one of _BAD_RECORD."""
    unknown = given.keys() - {"put", "del", "traffic", "set", "sync"}
    if unknown:
        raise ValueError(f"it has parts that this version does not know: {sorted(unknown)}")
    rows = [list((_NO_VALUES | row).values()) for row in given["put"]]
    kept = {name: given[name] for name in ("del", "traffic", "set") if name in given}
    return {"put": rows, **kept}


def replay_version_1(
    store: Store, file: JournalFile | None, path: str, vault: Vault | None
) -> None:
    """Apply the journal at `path`, which may be missing. Raises DamagedError.

    It undoes the parts of an unfinished desired state. Later changes by others stay.
    """
    after, landings = (file.after, file.landings) if file else (store.number, [])
    if file is None or after > store.number:
        older = read_journal(path + ".previous", vault)
        if older is not None and not older.columns:
            # Records that a disk fault left behind the next file's start do not count.
            within = [old for old in older.landings if file is None or old.last <= after]
            after, landings = older.after, within + landings
    landings = [landing for landing in landings if landing.last > store.number]
    parts = open_parts(landings)
    start = next((n for n, landing in enumerate(landings) if landing.first in parts), None)
    store.replay(JournalFile(after, (), landings[:start], 0, 0, b""), path)
    undo: list[tuple[Peer | None, Peer | None, TrafficRow]] = []
    for landing in landings[start:] if start is not None else ():
        for _, record in decode_landings([landing], (), path):
            if landing.first in parts:
                changed = dict.fromkeys(record.delete) | {peer.id: peer for peer in record.put}
                undo += [(store.by_id(i), p, store.traffic(i)) for i, p in changed.items()]
        store.replay(JournalFile(after, (), [landing], 0, 0, b""), path)
    try:
        for before, put, traffic in reversed(undo):
            _undo(store, before, put, traffic)
    except sqlite3.Error as error:
        found = f"its unfinished desired state cannot be undone: {error}"
        raise _damaged(path, 0, found) from None


def _undo(store: Store, before: Peer | None, put: Peer | None, traffic: TrafficRow) -> None:
    """Undo a change of a peer from `before` to `put`, when it had this traffic."""
    now = store.by_id(traffic.id)
    if before is None:
        store.apply(Record(delete=[now.id] if now else []))
    elif put is None and now is None and store.get(before.public_key) is None:
        store.apply(Record([before], traffic=[traffic._replace(rx_seen=0, tx_seen=0)]))
    elif put is not None and now is not None:
        fields = zip(Peer._fields, now, put, strict=True)
        later: dict[str, Any] = {name: value for name, value, left in fields if value != left}
        store.apply(Record([before._replace(**later)]))


def open_parts(landings: Iterable[Landing]) -> set[int]:
    """The numbers of the parts without an end."""
    parts: set[int] = set()
    for landing in landings:
        [given] = landing.records
        sync = given.get("sync", ()) if isinstance(given, dict) else ()
        if sync == ["part"]:
            parts.add(landing.first)
        elif sync:
            parts.clear()
    return parts


# --- the files of a state -------------------------------------------------------------------------


def load_snapshot(path: str, vault: Vault | None) -> Store:
    """Read a snapshot's file. Raises DamagedError, NewerError, ConfigError, StartError."""
    try:
        return Store(decode_snapshot(Path(path).read_bytes(), vault, path))
    except OSError as error:
        raise _unreadable(path, error) from None
    except Ancestor:
        raise ConfigError(
            f"DB_PATH {path!r} is the database of the gateway before wggw, which wggw does not "
            "change. Name another file, start, and then take its peers over with "
            f"`wggw import {shlex.quote(path)}`"
        ) from None
    except Newer as error:
        raise NewerError(f"{path}: {error}: install the newer one again") from None
    except (sqlite3.Error, ValueError, TypeError, KeyError) as error:
        raise _damaged(path, 0, f"not a good snapshot: {error}") from None


class Files:
    """Snapshot and journal of a store on disk, written under `writing` and under Lander.turn."""

    def __init__(self, path: str, durability: str, disk: Disk, vault: Vault | None = None) -> None:
        self.path = os.path.realpath(path)
        self.durability = durability
        self.journaled = durability != "none"
        self.journal = Journal(self.path + ".journal", disk, vault)
        self.snapshot_time = 0.0  # Unix seconds of the last snapshot
        self.snapshot_number = 0
        self.snapshot_bytes = 0
        self.has_snapshot = False
        self.torn = 0  # bytes of a torn line that load() found
        self.vault = vault
        self.writing = threading.Lock()  # held while a thread replaces or reads the snapshot
        self._disk = disk
        self._found: JournalFile | None = None  # what load() read, for begin()
        self._lineage = ""  # of the snapshot

    # --- start -----------------------------------------------------------------------------------

    def load(self) -> Store:
        """Read snapshot and journal without writing. Raises DamagedError, ConfigError, StartError.

        A new installation has neither. A state that has only one of them is damaged.
        """
        journal, store = self.journal, Store()
        file = read_journal(journal.path, self.vault)
        if os.path.exists(self.path):
            store = load_snapshot(self.path, self.vault)
            self._lineage = store.lineage
            self._note_snapshot(store.number, os.stat(self.path).st_mtime)
            if file is None and store.journaled:
                raise DamagedError(
                    journal.path,
                    "the journal is missing, although the snapshot has one",
                    ": restore it, or let `wggw check --repair` continue without it",
                )
        elif (file and (file.landings or file.after)) or os.path.exists(self.path + ".previous"):
            raise DamagedError(
                self.path,
                "the snapshot is missing, but a journal or an older snapshot exists, so this is no "
                "new installation",
                ": restore the snapshot, or let `wggw check --repair` make one, or move the other "
                "files away to begin empty",
            )
        try:
            if file is not None and file.columns:
                store.replay(file, journal.path)
            else:
                replay_version_1(store, file, journal.path, self.vault)
        except sqlite3.Error as error:  # another program wrote it, with other tables
            raise _damaged(self.path, 0, f"not a good snapshot: {error}") from None
        self._found, self.torn = file, file.torn if file else 0
        return store

    def begin(self, store: Store) -> None:
        """Continue the journal that load() read, or begin a new one beside a fresh snapshot.

        The gateway starts even when the disk is full or fails. It then refuses changes until it
        could write a snapshot. Raises StartError when it can never write the files.
        """
        file = self._found
        store.lineage = store.lineage or secrets.token_hex(16)
        if self.torn:
            LOG.warning(
                "%s: a crash cut off the last line (%d bytes), which is dropped; no request in it "
                "had been answered",
                self.journal.path,
                self.torn,
            )
        try:
            if (
                file is not None
                and self.journaled
                and self.has_snapshot
                and file.columns == Peer._fields
                and file.last == store.number
                and self._lineage == store.lineage
                and bool(file.sealed) == bool(self.vault)
            ):
                self.journal.resume(file)
            else:
                self.renew(store.number, self.image(store, store.number))
                store.changed = False
            self._drop_clear_files()
        except OSError as error:
            if not self.has_snapshot or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                text = f"DB_PATH {self.path!r} cannot be written: {_reason(error)}"
                raise StartError(text) from None
            self.journal.failure = f"{self.path}: {_reason(error)}"
            LOG.error(
                "%s: the gateway refuses changes until it can write a snapshot: make space on the "
                "disk or repair it",
                self.journal.failure,
            )

    def _drop_clear_files(self) -> None:
        """With SNAPSHOT_KEY, remove the unencrypted files that an earlier run left behind."""
        names = [self.path + ".previous", self.journal.previous]
        names += [name + ".tmp" for name in (*names, self.path, self.journal.path)]
        for name in names if self.vault else ():
            with contextlib.suppress(FileNotFoundError):
                with open(name, "rb") as file:
                    line = file.readline(1024)
                head = _parse_header(line)
                if not line.startswith(SNAPSHOT_MAGIC) and not (head and head.sealed):
                    self._disk.unlink(name)

    # --- while running ---------------------------------------------------------------------------

    def image(self, store: Store, number: int, alone: bool = False) -> bytes:
        """See Store.image(); with `alone` the journal of these files does not belong to it."""
        return store.image(number, self.vault is not None, self.journaled and not alone)

    def write_snapshot(self, number: int, image: bytes) -> None:
        """Replace the snapshot, and keep the old one as DB_PATH.previous. Raises OSError."""
        old = self.path + ".previous" if os.path.exists(self.path) else ""
        self._disk.replace(self.path, snapshot_parts(image, self.vault), old)
        self._note_snapshot(number, time.time())

    def _note_snapshot(self, number: int, written: float) -> None:
        self.snapshot_number, self.snapshot_time = number, written
        self.snapshot_bytes = os.stat(self.path).st_size
        self.has_snapshot = True

    def read_snapshot(self) -> tuple[float, int, bytes]:
        """The snapshot on disk: when it was written, its number, its image.

        Raises OSError, and DamagedError.
        """
        with self.writing:
            written, number = self.snapshot_time, self.snapshot_number
            data = Path(self.path).read_bytes()
        return written, number, decode_snapshot(data, self.vault, self.path)

    def renew(self, number: int, image: bytes) -> None:
        """Write a snapshot of the rows as of record `number`, and an empty journal. Raises OSError.

        A snapshot never lacks the journal that it claims to have: without a journal, one is made
        first. If somebody removed the journal, the new one does not fit the old snapshot, which
        lacks the removed changes.
        """
        if self.journaled and not os.path.exists(self.journal.path):
            self.journal.start(number if self.has_snapshot else 0)
        self.write_snapshot(number, image)
        if self.journaled:
            self.journal.start(number)
        else:
            for path in (self.journal.previous, self.journal.path):
                with contextlib.suppress(FileNotFoundError):
                    self._disk.unlink(path)
        self.journal.failure = None

    def write_copy(self, store: Store, path: str) -> None:
        """Write a state as a separate snapshot file. Raises OSError."""
        image = self.image(store, store.number, alone=True)
        self._disk.replace(path, snapshot_parts(image, self.vault))

    # --- the writers of the remote copy whose entries these files contain ------------------------
    #
    # The file holds words: NAME or NAME:NUMBER. After the NUMBER the files have other records than
    # the writer's entries, because they lost some and went on without the copy.

    def read_writers(self) -> dict[str, int]:
        """By name: the last record of its entries that the files may contain."""
        try:
            words = Path(self.path + ".writers").read_text("ascii").split()
            parts = [word.partition(":") for word in words]
            return {name: int(number or MAX_INTEGER) for name, _, number in parts}
        except (OSError, ValueError):
            return {}

    def keep_writers(self, writers: Mapping[str, int]) -> None:
        """Keep the newest of these. Raises OSError."""
        words = [n if last == MAX_INTEGER else f"{n}:{last}" for n, last in writers.items()]
        content = " ".join(words[-COPY_WRITERS:]).encode("ascii") + b"\n"
        self._disk.replace(self.path + ".writers", [content])


# ==================================================================================================
# object store: GET, PUT and DELETE below an https URL or in an S3 bucket
#
# The store keeps connections open. Every request has a deadline and may be repeated, because a
# second PUT of the same bytes changes nothing. Several threads may use it.
# Never here: what the objects mean.
# ==================================================================================================


class CopyError(Exception):
    """The object store did not do what it was asked to; the text is safe to show."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status  # with which it refused, 0 without one


class ObjectStore:
    """Objects below one URL. Raises CopyError.

    `authorize(method, path, content)` returns the headers. `checks` says whether the store compares
    what arrives with a signed checksum.
    """

    def __init__(
        self, url: str, authorize: Callable[[str, str, bytes], dict[str, str]], checks: bool
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        self._connect: Callable[..., http.client.HTTPConnection] = http.client.HTTPConnection
        if parts.scheme == "https":
            tls = ssl.create_default_context()
            self._connect = functools.partial(http.client.HTTPSConnection, context=tls)
        # Without a port, http.client would look for one at the end of an IPv6 address.
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._host = parts.hostname
        self._path = parts.path.rstrip("/") + "/"
        self._authorize = authorize
        self.checks = checks
        self.requests = self.bytes_sent = self.bytes_received = 0
        self._idle: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()

    def get(self, name: str, limit: int) -> bytes | None:
        """Return an object of at most `limit` bytes, None when the store has none of this name."""
        status, content = self._exchange("GET", name, limit=limit)
        # In front of S3, a proxy's error would not have the code.
        missing = ("NoSuchKey",) if self.checks else ("", "NoSuchKey")
        if status == HTTPStatus.NOT_FOUND and self._error_code(content) in missing:
            return None
        self._expect("GET", name, status, content, HTTPStatus.OK)
        return content

    def get_all(self, names: Sequence[str], limit: int) -> list[bytes | None]:
        """get() for several objects at once."""
        found: dict[str, bytes | None] = {}
        errors: list[Exception] = []
        wanted = iter(names)  # the threads share it

        def work() -> None:
            try:
                for name in wanted:
                    found[name] = self.get(name, limit)
            except Exception as error:
                errors.append(error)

        workers = [threading.Thread(target=work, daemon=True) for _ in names[:COPY_CONNECTIONS]]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if errors:
            raise errors[0]
        return [found[name] for name in names]

    def put(self, name: str, content: bytes, create: bool = False) -> bool:
        """Put an object; return True once the store has it.

        With `create`, an object that is already there stays as it is, and put() returns False. A
        store without conditional PUTs overwrites it, or refuses this with status 501.
        """
        condition = {"If-None-Match": "*"} if create else {}
        status, answer = self._exchange("PUT", name, content, condition)
        if create and status == HTTPStatus.PRECONDITION_FAILED:
            return False
        self._expect("PUT", name, status, answer, 200, 201, 204)
        return True

    def delete(self, name: str) -> None:
        status, answer = self._exchange("DELETE", name)
        self._expect("DELETE", name, status, answer, 200, 204, 404)

    def _expect(self, method: str, name: str, status: int, answer: bytes, *good: int) -> None:
        if status not in good:
            text = f"{method} {name}: status {status} {self._error_code(answer)}"
            raise CopyError(text.rstrip(), status)

    @staticmethod
    def _error_code(answer: bytes) -> str:
        """S3's name of an error, "" where the store gives none."""
        match = re.search(rb"<Code>([A-Za-z0-9]{1,64})</Code>", answer)
        return match[1].decode("ascii") if match else ""

    def _exchange(
        self,
        method: str,
        name: str,
        content: bytes = b"",
        more: Mapping[str, str] = {},
        limit: int = MAX_HEAD,
    ) -> tuple[int, bytes]:
        """Send one request, on a kept connection if there is one; return status and body."""
        with self._lock:
            kept = self._idle.pop() if self._idle else None
        headers = {**self._authorize(method, self._path + name, content), **more}
        request = (method, self._path + name, content or None, headers)
        try:
            if kept is not None:
                with contextlib.suppress(OSError, http.client.BadStatusLine):
                    return self._ask(kept, request, limit)
                # The store has closed it, or a firewall has forgotten it and all the others.
                with self._lock:
                    idle, self._idle = self._idle, []
                for connection in idle:
                    connection.close()
            connection = self._connect(self._host, self._port, timeout=COPY_TIMEOUT)
            connection.connect()
            return self._ask(connection, request, limit)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise CopyError(f"{method} {name}: {_reason(error)}") from None

    def _ask(
        self,
        connection: http.client.HTTPConnection,
        request: tuple[str, str, bytes | None, dict[str, str]],
        limit: int,
    ) -> tuple[int, bytes]:
        connected, sent = connection.sock, len(request[2] or b"")
        seconds = COPY_DEADLINE + max(limit, sent) / COPY_SLOWEST
        watchdog = threading.Timer(seconds, _cut, (connected,))
        watchdog.daemon = True
        watchdog.start()
        try:
            connection.request(*request)
            response = connection.getresponse()
            good = response.status == HTTPStatus.OK
            endless = response.length is None and not response.chunked
            body = response.read(limit if good else MAX_HEAD)
            if good and request[0] == "GET" and (response.length or endless):
                # The object is cut off or too large, or nobody can tell.
                raise http.client.IncompleteRead(body)
            if not response.isclosed():
                connection.close()
        except BaseException:
            connection.close()
            raise
        finally:
            watchdog.cancel()
        with self._lock:
            self.requests += 1
            self.bytes_sent += sent
            self.bytes_received += len(body)
            if connection.sock is not None:
                self._idle.append(connection)
        return response.status, body


def _cut(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):  # somebody may have closed the connection
        connected.shutdown(socket.SHUT_RDWR)


def sign_v4(
    keys: tuple[str, str], region: str, method: str, path: str, headers: Mapping[str, str]
) -> str:
    """The Authorization header of AWS Signature Version 4 for service s3 and an empty query.

    `keys` are the access key and the secret key, `path` is percent-encoded. The signature covers
    all of `headers`, whose names are in lower case and include `host`, `x-amz-date` and
    `x-amz-content-sha256`. (AWS General Reference, "Create a signed AWS API request".)
    """
    access_key, secret_key = keys
    names = ";".join(sorted(headers))
    lines = [method, path, "", *(f"{name}:{headers[name]}" for name in sorted(headers))]
    canonical = "\n".join([*lines, "", names, headers["x-amz-content-sha256"]])
    stamp = headers["x-amz-date"]
    scope = f"{stamp[:8]}/{region}/s3/aws4_request"
    digest = hashlib.sha256(canonical.encode("utf-8")).hexdigest()
    key = b"AWS4" + secret_key.encode("utf-8")
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode("utf-8"), "sha256")
    text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{digest}"
    mac = hmac.digest(key, text.encode("utf-8"), "sha256").hex()
    credential = f"{access_key}/{scope}"
    return f"AWS4-HMAC-SHA256 Credential={credential},SignedHeaders={names},Signature={mac}"


def open_object_store(config: Config, clock: Callable[[], float]) -> ObjectStore | None:
    """The object store at SNAPSHOT_URL, None when that is not set."""
    if config.snapshot_url is None:
        return None
    parts = urllib.parse.urlsplit(config.snapshot_url)
    if parts.scheme == "https":
        fixed = {"host": parts.netloc}
        if config.snapshot_token:
            fixed["Authorization"] = f"Bearer {config.snapshot_token}"
        return ObjectStore(config.snapshot_url, lambda *_: fixed, checks=False)
    region = config.aws_region or config.aws_default_region or "us-east-1"
    endpoint = config.aws_endpoint_url_s3 or config.aws_endpoint_url
    bucket = parts.netloc
    if endpoint:
        url = f"{endpoint.rstrip('/')}/{bucket}"
    elif "." in bucket:  # S3's wildcard certificate covers no further dots
        url = f"https://s3.{region}.amazonaws.com/{bucket}"
    else:
        url = f"https://{bucket}.s3.{region}.amazonaws.com"
    keys = config.aws_access_key_id or "", config.aws_secret_access_key or ""

    def authorize(method: str, path: str, content: bytes) -> dict[str, str]:
        headers = {
            "host": urllib.parse.urlsplit(url).netloc,
            "x-amz-content-sha256": hashlib.sha256(content).hexdigest(),
            "x-amz-date": time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(clock())),
        }
        if config.aws_session_token:
            headers["x-amz-security-token"] = config.aws_session_token
        return {**headers, "Authorization": sign_v4(keys, region, method, path, headers)}

    return ObjectStore(url + parts.path, authorize, checks=True)


# ==================================================================================================
# remote copy: the state in an object store, for nodes without a disk of their own
#
# Every start of a gateway that writes claims an epoch: it puts the object claim-N, where N is one
# more than the newest claim's number. The claim names the writer (a random name), the lineage of
# the state, and the epoch before it. A writer's other objects have names that begin with N-WRITER:
# entries, numbered and each put once, and two manifests in turn, which name the position of the
# newest snapshot. An entry is a snapshot, a segment (the records behind the entry before it), or a
# fence.
#
# A new writer ends the epoch before its own. It continues that epoch's state if the lineages match.
# If that epoch has no entries, the writer goes back to the newest one that has some; the epochs
# before it need no look, because its writer has ended them.
#
# A new writer looks at the newest epoch, decides whether it can go on from there, claims the next
# epoch, and then reads the previous epoch's entries once more, up to the first missing one. A start
# that is refused has only looked, so it disturbs nobody, unless the reason came up after the look.
# An entry that the old writer adds after the second reading would be lost, so the old writer must
# learn that it was replaced:
#   * If the store has conditional PUTs (S3's If-None-Match), the new writer puts a fence at the
#     missing position. The old writer puts its entries conditionally, too. So only one of them
#     gets the position, and a writer that does not get it knows that it was replaced.
#   * If not, a writer checks after each of its entries that its claim is still there and that no
#     higher claim is, and only then counts the entry as copied. The new writer claims before it
#     reads, and the old one puts before it checks, so that at least one of them sees the other. If
#     two writers claim one epoch at the same moment, the later PUT wins. The writer whose claim was
#     overwritten stops, and leaves a note for the other one (the object N-WRITER-rival).
# A writer repeats an upload whose answer was lost with the same bytes, so it does not matter how
# often and when they arrive. Only the deletion of replaced epochs' objects depends on clocks.
#
# A replaced writer learns it at its next upload. It copies no more, and goes on serving; with
# SNAPSHOT_FENCE it refuses changes. What it had not copied is only in its own files.
#
# Epochs implements this protocol; Copier decides what to put and when. A start's thread boots
# Copier, then a timer's thread runs it, and no request waits for it.
# Never here: what a record means.
# ==================================================================================================


class CopyDamaged(CopyError):
    """An object is not what a gateway put there. Trying again helps only if the store was wrong."""


class CopyCut(CopyDamaged):
    """An object is only the beginning of what was put there, so no writer counts it as stored."""


class CopyTaken(CopyError):
    """Another gateway claimed a higher epoch; `holder` is its node's name where that is known."""

    def __init__(self, holder: str) -> None:
        super().__init__(
            f"{holder} has taken it over, so this gateway's changes are copied no more. Stop this "
            "gateway, or restart it to continue from that copy"
        )
        self.holder = holder


def pack(about: Mapping[str, Any], payload: bytes, vault: Vault | None) -> bytes:
    """An object of the copy: "wggw-copy 2 SHA256 ABOUT", a newline, the compressed payload.

    ABOUT is JSON, with the `size` of what is behind the newline. A vault seals the payload, so that
    it opens only together with the same ABOUT. Raises CopyError when unpack() would refuse it.
    """
    seal = Seal(vault, b"copy") if vault else None
    body = zlib.compress(payload, 3)
    given = {**about, "size": len(body) + (SEAL_BYTES if seal else 0)}
    if seal:
        given["seal"] = seal.header.decode("ascii")
    head = json.dumps(given, separators=(",", ":")).encode("ascii")
    if seal:
        body = seal.seal(0, head, body)
    content = b"%b\n%b" % (head, body)
    if max(len(payload), len(content) + 77) > MAX_SNAPSHOT:
        raise CopyError(f"it would have more than {MAX_SNAPSHOT} bytes, which no boot reads")
    return b"wggw-copy 2 %b %b" % (hashlib.sha256(content).hexdigest().encode("ascii"), content)


def unpack(name: str, data: bytes | None, vault: Vault | None) -> tuple[dict[str, Any], bytes]:
    """Reverse pack(). Raises CopyDamaged, and ConfigError when SNAPSHOT_KEY does not fit."""
    data = data or b""
    digest = hashlib.sha256(data[77:]).hexdigest().encode("ascii")
    if data[:77] != b"wggw-copy 2 %b " % digest:
        kind = CopyCut if _is_cut(data) else CopyDamaged
        raise kind(f"{name} is not what was put there")
    head, _, body = data[77:].partition(b"\n")
    try:
        about = load_json(head.decode("ascii"))
        if not isinstance(about, dict):
            raise ValueError("its first line is not a JSON object")
        if "seal" in about:
            seal = Seal.read(vault, b"copy", about["seal"].encode("ascii"), "the copy")
            body = seal.open(0, head, body)
        elif vault:
            raise ConfigError(
                "SNAPSHOT_KEY is set, but the copy at SNAPSHOT_URL is not encrypted, so anybody "
                "may have made it: use another URL, or start once without SNAPSHOT_KEY"
            )
        inflater = zlib.decompressobj()
        payload = inflater.decompress(body, MAX_SNAPSHOT)
        if not inflater.eof or inflater.unused_data:
            raise ValueError("it is cut off or too large")
    except (ValueError, TypeError, KeyError, AttributeError, zlib.error) as error:
        raise CopyDamaged(f"{name} is damaged: {error}") from None
    about.pop("size", None)
    return about, payload


def _is_cut(data: bytes) -> bool:
    """Whether an object ends too early. One of an earlier version does not tell its size."""
    head, newline, body = data[77:].partition(b"\n")
    try:
        return not newline or len(body) < load_json(head.decode("ascii")).get("size", MAX_INTEGER)
    except (ValueError, TypeError, AttributeError):
        return False


class Claim(NamedTuple):
    """Who holds an epoch. `previous` is the prefix of the epoch before it, "" for none."""

    epoch: int
    writer: str
    lineage: str
    node: str
    time: int  # Unix seconds, for people and for sweep()
    previous: str

    @property
    def prefix(self) -> str:
        return f"{self.epoch:08d}-{self.writer}"


class CopyContested(CopyError):
    """Another gateway starts at the same time. Trying again helps."""


class Manifest(NamedTuple):
    """Where an epoch's newest snapshot is."""

    position: int
    number: int
    fenced: bool = False  # whether the epoch's writer relies on fences
    swept: int = 0  # what replaced epochs up to this one held is deleted


class Entry(NamedTuple):
    """A "snapshot", "segment" or "fence" of a writer; the state up to record `number`."""

    kind: str
    number: int
    payload: bytes = b""
    name: str = ""  # of the object

    def __repr__(self) -> str:  # an unsealed payload holds preshared keys
        return f"Entry({self.kind}, {self.number})"


def _claim_name(epoch: int) -> str:
    return f"claim-{epoch:08d}"


def _entry_names(prefix: str, start: int, count: int) -> list[str]:
    return [f"{prefix}-{position:08d}" for position in range(start, start + count)]


def _manifest_names(prefix: str) -> list[str]:
    return [f"{prefix}-manifest-{i}" for i in (0, 1)]


def _claim_in(name: str, data: bytes | None, vault: Vault | None) -> Claim:
    """The claim in an object, which is a claim, a fence or a note. Raises CopyDamaged."""
    about, _ = unpack(name, data, vault)
    with contextlib.suppress(TypeError, KeyError):
        claim = Claim(**about["claim"])
        texts = (claim.writer, claim.lineage, claim.node)
        if (
            all(isinstance(text, str) for text in texts)
            and all(isinstance(number, int) for number in (claim.epoch, claim.time))
            and 0 <= claim.time <= MAX_TIME
            and re.fullmatch("([0-9]{8}-.+)?", claim.previous)
            and int(claim.previous[:8] or 0) < claim.epoch
            and (not name.startswith("claim-") or name == _claim_name(claim.epoch))
        ):
            return claim
    raise CopyDamaged(f"{name} does not contain a claim")


_NOT_STORED = "a read returns other bytes than were put there"


class Epochs:
    """The protocol: claims, entries, fences. One thread at a time uses it."""

    def __init__(
        self, objects: ObjectStore, vault: Vault | None, node: str, clock: Callable[[], float]
    ) -> None:
        self.writer = secrets.token_hex(8)  # this start's name
        self.claim: Claim | None = None
        self.fences = False  # whether the store has conditional PUTs
        self.pending: Entry | None = None  # sent, but the store has not confirmed it
        self.objects = objects
        self._vault = vault
        self._node = node
        self._clock = clock
        self._content = b""  # the bytes of the claim or of the pending entry
        self._position = 1  # of the next entry
        self._snapshots: list[tuple[int, int]] = []  # positions and numbers, the newest last
        self._announced = 0  # how many of them the manifests have named
        self._garbage: collections.deque[str] = collections.deque(maxlen=COPY_GARBAGE)
        self._swept = 0  # the objects of epochs up to this one are deleted
        self._has_rival = False  # another writer claimed this epoch, too

    def find(self) -> tuple[int, Claim | None]:
        """The number of the newest epoch, 0 for none, and the newest claim that can be read."""
        # Nobody ever deletes a claim, so a few rounds of parallel requests find the last one.
        low, high, probes = 0, 1 << 20, [1 << power for power in range(20)]
        while probes:
            found = self.objects.get_all([_claim_name(n) for n in probes], MAX_MANIFEST)
            count = next((i for i, data in enumerate(found) if data is None), len(found))
            low = probes[count - 1] if count else low
            high = probes[count] if count < len(probes) else high
            step = max(1, (high - low) // 16)
            probes = list(range(low + step, high, step))
        for epoch in range(low, 0, -1):
            try:
                return low, self.read_claim(epoch)
            except CopyCut:  # nobody held an epoch whose claim's upload was torn
                if self.objects.checks or epoch == 1:
                    raise
        return 0, None

    def read_claim(self, epoch: int) -> Claim:
        """Raises CopyError."""
        name = _claim_name(epoch)
        return _claim_in(name, self.objects.get(name, MAX_MANIFEST), self._vault)

    def propose(self, top: int, newest: Claim | None, lineage: str) -> Claim:
        """The claim that take() would put: for the epoch above `top`. The store stays as it is.

        If our own claim was put, and the answer was lost, it stays: it may still arrive.
        """
        previous, now = newest.prefix if newest else "", int(self._clock())
        claim = Claim(top + 1, self.writer, lineage, self._node, now, previous)
        if self.claim is not None and self.claim in (newest, claim._replace(time=self.claim.time)):
            return self.claim
        return claim

    def take(self, claim: Claim) -> None:
        """Put a proposed claim. The caller then reads the epoch before it to the end.

        After a CopyError, find() may show that another gateway was faster.
        """
        if claim != self.claim:
            self.claim, self._content = claim, pack({"claim": claim._asdict()}, b"", self._vault)
        name = _claim_name(claim.epoch)
        # A store without conditional PUTs would let us overwrite another gateway's claim.
        if self.objects.get(name, MAX_MANIFEST) is None:
            self._create(name, self._content)
        there = self.objects.get(name, MAX_MANIFEST)
        if there != self._content:
            with contextlib.suppress(CopyDamaged):
                unpack(name, there, self._vault)
                self.claim = None
                raise CopyContested("another gateway starts at the same time")
            self.objects.put(name, self._content)
            raise CopyError(f"PUT {name}: {_NOT_STORED}")
        self.fences = self.objects.checks and not self._create(name, self._content)

    def _create(self, name: str, content: bytes) -> bool:
        """Put an object unless it is there. A store without conditional PUTs overwrites it."""
        try:
            return self.objects.put(name, content, True)
        except CopyError as error:
            if error.status != HTTPStatus.NOT_IMPLEMENTED:
                raise
            return self.objects.put(name, content)

    # --- reading ---------------------------------------------------------------------------------

    def read(
        self, prefix: str, lineage: str, have: int = -1, close: bool = False
    ) -> tuple[str, list[Entry]]:
        """The snapshot and segments of the epoch `prefix`, or of the newest epoch before it.

        Returns the epoch's prefix and the entries; ("", []) when no epoch has any, or when they
        have another lineage. The snapshot has no payload if its number is not above `have`. With
        `close`, which needs a claim, the epoch's writer adds nothing any more; without it, the
        writer does not notice the reading.
        """
        while prefix:
            head = claim, manifest = self._head(prefix)
            is_ours = claim.lineage == lineage
            entries = self._entries(prefix, manifest, is_ours, have, close)
            if head != self._head(prefix):
                continue  # its writer is at work, and may have deleted the entry that was missing
            if manifest is not None:
                self._note(claim, manifest, lineage, close)
            if not is_ours and (entries or manifest):
                return "", []
            if entries:
                return prefix, entries
            if manifest is not None:
                names = " and ".join(_manifest_names(prefix))
                raise CopyDamaged(f"{names} do not lead to a snapshot")
            prefix = claim.previous  # it has no snapshot
        return "", []

    def _note(self, claim: Claim, manifest: Manifest, lineage: str, close: bool) -> None:
        """Note how far sweeps have come, and warn of a writer that will not learn its end."""
        if claim.lineage == lineage:
            self._swept = max(self._swept, manifest.swept)
        if close and manifest.fenced and not self.fences:
            LOG.warning(
                "remote copy: %s relied on conditional PUTs, which this store does not have. Stop "
                "that gateway if it still runs: it does not learn that it was replaced",
                claim.node,
            )

    def _head(self, prefix: str) -> tuple[Claim, Manifest | None]:
        """The claim of an epoch, and its manifest that names the newest snapshot, if any.

        A manifest may be a torn upload. If none can be read, the snapshot must be at position 1,
        where the first one is until its writer deletes it. Raises CopyError.
        """
        own, names = _claim_name(int(prefix[:8])), _manifest_names(prefix)
        claim, *batch = self.objects.get_all([own, *names], MAX_MANIFEST)
        found: list[Manifest] = []
        for name, data in zip(names, batch, strict=True):
            with contextlib.suppress(CopyDamaged):
                about, _ = unpack(name, data, self._vault)
                given = Manifest(*(about.get(field, 0) for field in Manifest._fields))
                if all(isinstance(value, int) for value in given) and given.position > 0:
                    found.append(given)
        missing = None if batch == [None, None] else Manifest(1, MAX_INTEGER)
        return _claim_in(own, claim, self._vault), max(found, default=missing)

    def _entries(
        self,
        prefix: str,
        manifest: Manifest | None,
        wanted: bool,
        have: int = -1,
        close: bool = False,
    ) -> list[Entry]:
        """An epoch's newest snapshot and the segments behind it; see read().

        Entries that are not `wanted` may be damaged, and have no payload. Without the snapshot that
        the manifest names, nobody knows where the writer puts its next entry: there is no fence.
        """
        position, number, *_ = manifest or Manifest(1, -1)
        found: list[Entry] = []
        if wanted and manifest and number <= have:
            found.append(Entry("snapshot", number))
            position += 1
        while True:
            names = _entry_names(prefix, position, COPY_CONNECTIONS)
            batch = self.objects.get_all(names, MAX_SNAPSHOT)
            for name, data in zip(names, batch, strict=True):
                if data is None:
                    missing = manifest is not None and not found
                    if missing or not (close and self.fences) or self._close(name):
                        return found
                    break  # its writer has put this entry in the meantime
                try:
                    entry = self._decode(name, data)
                except CopyDamaged as error:
                    entry = Entry("damaged", 0, name=name)
                    if wanted:
                        behind = _entry_names(prefix, position + 1, COPY_SEGMENTS + 2)
                        is_torn = isinstance(error, CopyCut) and not self.objects.checks
                        if not is_torn or any(self.objects.get_all(behind, MAX_SNAPSHOT)):
                            raise
                        return found  # its writer did not count it as copied
                if entry.kind == "fence":
                    return found
                entry = entry if wanted else entry._replace(payload=b"")
                found = [entry] if entry.kind == "snapshot" else [*found, entry]
                position += 1

    def _decode(self, name: str, data: bytes) -> Entry:
        about, payload = unpack(name, data, self._vault)
        try:
            if about["kind"] == "fence":
                return Entry("fence", 0)
            if about["at"] == name:
                return Entry(about["kind"], int(about["number"]), payload, name)
        except (KeyError, TypeError, ValueError, OverflowError):
            pass
        raise CopyDamaged(f"{name} is not what was put there")

    def _close(self, name: str) -> bool:
        """Put a fence at the end. False: an entry is there now."""
        fence = {"kind": "fence", "claim": cast(Claim, self.claim)._asdict()}
        return self.objects.put(name, pack(fence, b"", self._vault), True)

    # --- writing ---------------------------------------------------------------------------------

    def append(self, entry: Entry) -> Entry:
        """Put the next entry; see flush()."""
        about = {"kind": entry.kind, "number": entry.number, "at": self._next_name()}
        self._content = pack(about, entry.payload, self._vault)
        self.pending = entry._replace(payload=b"")
        return self.flush()

    def _next_name(self) -> str:
        return _entry_names(cast(Claim, self.claim).prefix, self._position, 1)[0]

    def flush(self) -> Entry:
        """Put the pending entry; return it once the store has it and nobody has replaced us.

        Raises CopyTaken if another gateway has, and CopyError if the caller must try again.
        """
        entry, name = cast(Entry, self.pending), self._next_name()
        if not self.objects.put(name, self._content, self.fences):
            there = self.objects.get(name, MAX_SNAPSHOT)
            if there != self._content:
                raise self._taken_by(name, there)
        elif not self.fences:
            self._look(cast(Claim, self.claim), name)
        if entry.kind == "snapshot":
            self._snapshots.append((self._position, entry.number))
        self._position += 1
        self.pending, self._content = None, b""
        return entry

    def _look(self, claim: Claim, name: str) -> None:
        """Without conditional PUTs: check that the entry is there and our claim is the newest."""
        own, next_one = map(_claim_name, (claim.epoch, claim.epoch + 1))
        note = f"{claim.prefix}-rival"
        limit = max(MAX_MANIFEST, len(self._content))
        there, ours, higher, rival = self.objects.get_all([name, own, next_one, note], limit)
        if higher is not None and (found := self._claimed_above(claim)):
            raise self._taken_by(*found)
        with contextlib.suppress(CopyDamaged):
            holder = _claim_in(own, ours, self._vault)
            if holder.writer != claim.writer:  # both claimed it at the same moment: leave a note
                content = pack({"claim": claim._asdict()}, b"", self._vault)
                self.objects.put(f"{holder.prefix}-rival", content)
                raise self._taken_by(own, ours)
        if rival is not None and not self._has_rival:
            self._has_rival = True
            text = "remote copy: %s began at the same moment and stops copying; this one goes on"
            LOG.warning(text, self._taken_by(note, rival).holder)
        if there != self._content:
            raise CopyError(f"PUT {name}: {_NOT_STORED}")

    def check_newest(self) -> None:
        """Raises CopyError if a higher epoch was claimed: its writer may delete what we read."""
        if self._claimed_above(cast(Claim, self.claim)):
            raise CopyContested("another gateway has started since this start began")

    def _claimed_above(self, claim: Claim) -> tuple[str, bytes] | None:
        """Name and content of a claim for a higher epoch.

        One that was cut off does not count: its writer repeats it, and only then reads our entries.
        """
        for epoch in itertools.count(claim.epoch + 1):
            name = _claim_name(epoch)
            data = self.objects.get(name, MAX_MANIFEST)
            if data is None:
                return None
            try:
                unpack(name, data, self._vault)
            except CopyCut:
                continue
            except CopyDamaged:
                pass
            return name, data
        return None

    def _taken_by(self, name: str, data: bytes | None) -> CopyTaken:
        with contextlib.suppress(CopyDamaged):
            claim = _claim_in(name, data, self._vault)
            return CopyTaken(f"{claim.node} (epoch {claim.epoch})")
        return CopyTaken("another gateway")

    def announce(self) -> None:
        """Name the newest snapshot in a manifest; delete entries older than the snapshot before."""
        count = len(self._snapshots)
        if self._announced == count:
            return
        prefix = cast(Claim, self.claim).prefix
        position, number = self._snapshots[-1]
        about = Manifest(position, number, self.fences, self._swept)._asdict()
        self.objects.put(_manifest_names(prefix)[count % 2], pack(about, b"", self._vault))
        self._announced = count
        old: list[str] = []
        if count > 2:
            start, end = self._snapshots[-3][0], self._snapshots[-2][0]
            old = _entry_names(prefix, start, end - start)
        self._delete(old)

    def _delete(self, names: Iterable[str]) -> None:
        """Delete these objects, and those of earlier calls that the store did not delete."""
        self._garbage.extend(names)
        try:
            while self._garbage:
                self.objects.delete(self._garbage[0])
                self._garbage.popleft()
        except CopyError as error:
            if error.status in (403, 405, 501):  # the store never deletes, so no other try helps
                self._garbage = collections.deque(maxlen=0)
                LOG.info("remote copy: old objects stay in the store, delete them there: %s", error)

    def sweep(self) -> bool:
        """Delete what the next older epoch holds, if it was replaced a day ago. False: it was not.

        It needs a snapshot of ours, whose manifest names the last such epoch. Claims stay, and
        fences: a writer that was replaced may not have tried an upload since.
        """
        ours, epoch = cast(Claim, self.claim), self._swept + 1
        if not self._announced or epoch >= ours.epoch:
            return False
        with contextlib.suppress(CopyDamaged):
            after = ours if epoch + 1 == ours.epoch else self.read_claim(epoch + 1)
            now = self._clock()
            # A claim from the future: its node's clock was ahead. Our own claim came after it.
            if now - (after.time if after.time <= now else ours.time) < COPY_SWEEP_SECONDS:
                return False
            claim, manifest = self._head(self.read_claim(epoch).prefix)
            if claim.lineage == ours.lineage:
                self._sweep_epoch(claim.prefix, manifest)
        self._swept = epoch
        return True

    def _sweep_epoch(self, prefix: str, manifest: Manifest | None) -> None:
        found = self._entries(prefix, manifest, wanted=False)
        if manifest or found:
            begin = manifest.position if manifest else 1
            end = int(found[-1].name[-8:]) + 1 if found else begin
            # Its writer may have ended before it deleted what was older. The last ones go first, so
            # that what a crash leaves is found again.
            start = max(1, begin - 3 * (COPY_SEGMENTS + 2))
            old = _entry_names(prefix, start, end - start)[::-1]
            self._delete([*old, *_manifest_names(prefix), f"{prefix}-rival"])


# --- what a gateway puts there, and when ----------------------------------------------------------


class Backlog:
    """Records that are on disk and not in the copy yet: those above number `begin`.

    Only a snapshot brings earlier changes into the copy. `begin` rises above a gap in the numbers,
    and when the records exceed the limit. A record of traffic totals alone counts without its
    content.
    """

    def __init__(self, limit: int, number: int = 0, now: float = 0.0) -> None:
        self.begin = self._last = number
        self._begun: float | None = now  # monotonic: since then it lacks changes up to `begin`
        self._limit, self._bytes = limit, 0
        self._records: list[tuple[float, Written]] = []  # each with the time when it came
        self._lock = threading.Lock()

    def add(self, records: Sequence[Written], now: float) -> None:
        with self._lock:
            for record in records:
                if record.number != self._last + 1:
                    self._drop(record.number - 1, now)
                kept = record._replace(content=b"{}") if record.totals else record
                self._records.append((now, kept))
                self._last, self._bytes = record.number, self._bytes + len(kept.content)
            if self._bytes > self._limit:
                self._drop(self._last, now)

    def _drop(self, number: int, now: float) -> None:
        if self._begun is None:
            self._begun = self._records[0][0] if self._records else now
        self.begin = self._last = number
        self._records, self._bytes = [], 0

    def above(self, number: int) -> list[Written]:
        """Forget the records up to `number`, which the copy has now; return the others."""
        with self._lock:
            if number >= self.begin:
                self._begun = None
            self._records = [row for row in self._records if row[1].number > number]
            self._bytes = sum(len(record.content) for _, record in self._records)
            return [record for _, record in self._records]

    def lacking_since(self, number: int) -> float | None:
        """When the first change came that a copy up to `number` lacks; None if it lacks none."""
        with self._lock:
            if number < self.begin:
                return self._begun
            rows = (row for row in self._records if row[1].number > number)
            return next((at for at, record in rows if not record.totals), None)


def encode_segment(after: int, records: Sequence[Written], totals: Sequence[TrafficRow]) -> bytes:
    """A line with the columns of `totals`, then a journal file.

    Columns of similar numbers compress best. So an id is the step from the id before it, and a
    total is the interface's counter and the difference to that, which rarely changes while the
    interface lives. This costs about 11 bytes a peer instead of 25 for plain rows.
    """
    ids = [0, *(row.id for row in totals)]
    latest = max((row.last_handshake for row in totals), default=0)
    rows = [
        (
            row.id - before,
            row.rx_seen,
            row.tx_seen,
            row.rx_bytes - row.rx_seen,
            row.tx_bytes - row.tx_seen,
            latest - row.last_handshake,
        )
        for before, row in zip(ids, totals, strict=False)
    ]
    line = json.dumps([[latest], *zip(*rows, strict=True)], separators=(",", ":")).encode("ascii")
    journal = journal_header(after)
    if records:
        journal += encode_landing(after + 1, after, [record.content for record in records], None)
    return line + b"\n" + journal


def decode_segment(payload: bytes) -> tuple[bytes, list[TrafficRow]]:
    """The journal and the totals. Raises ValueError or TypeError."""
    line, _, journal = payload.partition(b"\n")
    [[latest], *columns] = load_json(line.decode("ascii"))
    number, rows = 0, []
    for step, rx, tx, rx_more, tx_more, age in zip(*columns, strict=True):
        number += int(step)
        totals = (int(rx + rx_more), int(tx + tx_more))
        rows.append(TrafficRow(number, *totals, int(rx), int(tx), int(latest - age)))
    return journal, rows


def open_state(
    data: bytes,
    segments: Sequence[Entry] = (),
    vault: Vault | None = None,
    name: str = "the snapshot",
) -> Store:
    """The verified state of a snapshot file that came from outside, and of segments behind it.

    `vault` may be the file's key. Raises DamagedError, which names what is damaged, or ConfigError.
    """
    place = name
    try:
        store = Store(decode_snapshot(data, vault, name))
        store.feeds.diverged = store.feeds.sequence  # the segments have totals in another order
        for segment in segments:
            place = segment.name
            journal, totals = decode_segment(segment.payload)
            file = parse_journal(journal, place)
            if file.torn or file.last != segment.number:
                raise _damaged(place, file.size, f"it does not end with record {segment.number}")
            store.replay(file, place)
            store.apply(Record(traffic=totals))
        place = name
        store.verify()
    except (sqlite3.Error, ValueError, TypeError, KeyError, OverflowError) as error:
        raise _damaged(place, 0, str(error)) from None
    store.restarted.clear()
    return store


def read_state(entries: Sequence[Entry]) -> Store:
    """The state that a snapshot and its segments make. Raises CopyDamaged."""
    try:
        snapshot, *segments = entries
        return open_state(snapshot.payload, segments, name=snapshot.name)
    except DamagedError as error:
        raise CopyDamaged(error.fault) from None
    except ValueError as error:
        raise CopyDamaged(str(error)) from None


def totals_since(files: Files, since: int) -> tuple[float, int, list[TrafficRow]]:
    """When the snapshot was written (Unix seconds), its number, and the totals of its peers with a
    handshake since `since`. Raises OSError, and DamagedError.
    """
    written, number, image = files.read_snapshot()
    query = f"{_TRAFFIC} WHERE last_handshake >= ? ORDER BY id"
    with contextlib.closing(open_image(image)) as db:
        return written, number, [TrafficRow(*row) for row in db.execute(query, (since,))]


def _outline(prefix: str, entries: Iterable[Entry]) -> tuple[str, list[tuple[str, int]]]:
    """What tells two readings apart, of which the later one may have left out the payload."""
    return prefix, [(entry.kind, entry.number) for entry in entries]


NO_LINEAGE = "none"  # of a state that began while the copy did not answer


def choose_lineage(here: str, there: str, config: Config) -> str:
    """The lineage that the gateway continues: that of the files and of the copy.

    `here` is "" without files, `there` without a copy. If the two differ, SNAPSHOT_LINEAGE must
    name one of them, else this raises ConfigError. If it names the files', the copy begins anew.
    """
    wanted, url = config.snapshot_lineage, config.snapshot_url
    known = {here, there} - {""}
    if wanted in known:
        return wanted
    found = f"the lineage of the files is {here or 'none'}, of the copy at {url} {there or 'none'}"
    if wanted and known:
        raise ConfigError(f"SNAPSHOT_LINEAGE: {wanted!r} is neither: {found}. Set one of these")
    if len(known) > 1:
        raise ConfigError(
            f"SNAPSHOT_URL: the copy is another gateway's: {found}. Give each gateway a URL of its "
            f"own, or set SNAPSHOT_LINEAGE={there} to boot from that copy, or set "
            f"SNAPSHOT_LINEAGE={here} to replace it by a copy of these files"
        )
    return next(iter(known), wanted) or secrets.token_hex(16)


class CopyState(NamedTuple):
    """How far the copy is: its last record, what it lacks, and the last failure or None."""

    epoch: int
    holder: str
    number: int
    lag_records: int
    lag_seconds: float
    requests: int
    bytes_sent: int
    bytes_received: int
    failure: str | None


class Copier:
    """Keeps the copy close behind the store. A timer calls tick() once a second."""

    def __init__(
        self,
        epochs: Epochs,
        store: Store,
        files: Files,
        snapshot: Callable[[], None],
        config: Config,
    ) -> None:
        self.epochs = epochs
        self._store = store
        self._files = files
        self._snapshot = snapshot  # writes a local one if something changed
        self._config = config
        self.on_taken: Callable[[str], None] = LOG.error
        self._taken: CopyTaken | None = None
        self._backlog = Backlog(COPY_BACKLOG, now=time.monotonic())
        self._contained = {epochs.writer: MAX_INTEGER}  # see Files.keep_writers()
        self._attached = False  # whether boot() is done: we have an epoch
        self.found_nothing = False  # no gateway ever wrote a copy
        self._number = -1  # the last record in this epoch; -1: its first snapshot is due
        self._segments = 0  # since the newest snapshot
        self._snapshot_time = 0.0  # of the local snapshot whose totals the copy has
        self._next_totals = 0.0  # monotonic; a long journal makes local snapshots more frequent
        self._random = secrets.SystemRandom()
        self._next_sweep = time.monotonic() + self._random.uniform(0, COPY_FIRST_SWEEP)
        self._next_try = 0.0  # monotonic
        self._failure: str | None = None
        self._turn = threading.Lock()

    def state(self) -> CopyState:
        claim, remote = self.epochs.claim, self.epochs.objects
        number, records = max(0, self._number), 0
        seconds: float = 0
        since = self._backlog.lacking_since(self._number)
        if since is not None:
            records = max(0, self._store.number - number)
            seconds = round(time.monotonic() - since, 3)
        epoch, holder = (claim.epoch, claim.node) if claim else (0, "")
        holder = self._taken.holder if self._taken else holder
        traffic = remote.requests, remote.bytes_sent, remote.bytes_received
        return CopyState(epoch, holder, number, records, seconds, *traffic, self._failure)

    # --- at the start ----------------------------------------------------------------------------

    def boot(self, check: Callable[[Store], None] | None) -> None:
        """Claim an epoch, and fill the store from the copy if that is newer than the files.

        The order is: look, check, claim, read on. `check` gets the state that would be served, and
        may refuse it while the gateway that holds the copy still goes on. What that gateway
        uploads between look and claim is read after the claim, and then checked, too. Without
        `check` the copy did not answer at the start, so the rows are in use already.

        The newest epoch wins over files that do not contain it. Raises CopyError, ConfigError,
        OSError, and what `check` raises.
        """
        late = check is None
        own = self._files.read_writers()
        top, newest = self.epochs.find()
        mine = newest is not None and newest.writer in {*own, self.epochs.writer}
        if late and newest and not mine:
            raise CopyError(
                "this gateway started without the copy, which is there now, and does not overwrite "
                "it. Restart the gateway to boot from the copy"
            )
        here, there = self._store.lineage, newest.lineage if newest else ""
        if here == NO_LINEAGE or (mine and not here):
            here = there  # no local snapshot holds the lineage yet
        elif there and not here and self._store.number and there != self._config.snapshot_lineage:
            raise ConfigError(
                "SNAPSHOT_URL: the copy is not of the files here, which an older version wrote, "
                f"without a lineage. Set SNAPSHOT_LINEAGE={there} to boot from that copy, or start "
                "once without SNAPSHOT_URL, which gives the files a lineage to set instead"
            )
        lineage = choose_lineage(here, there, self._config)
        claim = self.epochs.propose(top, newest, lineage)
        choose = functools.partial(self._choose, own, lineage, check)
        looked = self.epochs.read(claim.previous, lineage, self._store.number)
        state = choose(*looked)
        if not late:
            self._files.keep_writers({**own, self.epochs.writer: MAX_INTEGER})
        self.epochs.take(claim)
        last = self.epochs.read(claim.previous, lineage, state.number, close=True)
        self.epochs.check_newest()
        if _outline(*last) != _outline(*looked):
            state = choose(*last)
        if state is self._store:
            LOG.info("remote copy: epoch %d begins, from the files here", claim.epoch)
        else:
            LOG.info("remote copy: epoch %d begins, with record %d", claim.epoch, state.number)
            if self._store.number:
                LOG.warning(
                    "remote copy: another gateway has continued it, or it has more than the files: "
                    "this gateway boots from it and keeps the files' state, up to record %d, in "
                    "%s.superseded",
                    self._store.number,
                    self._files.path,
                )
            state.number = max(state.number, self._store.number + 1)  # numbers never go back
            self._store.take(state)
        self._store.lineage = lineage
        if writer := last[0].partition("-")[2]:
            self._contained[writer] = MAX_INTEGER
        self.found_nothing = not top
        if late:
            self._files.keep_writers(self._contained)
        self._attached = True

    def _choose(
        self,
        own: Mapping[str, int],
        lineage: str,
        check: Callable[[Store], None] | None,
        prefix: str,
        entries: Sequence[Entry],
    ) -> Store:
        """The store if the local files have all that was read, else the copy's state; checked."""
        here = min(own.get(prefix.partition("-")[2], -1), self._store.number)
        if not entries or entries[-1].number <= here:
            if check:
                check(self._store)
            return self._store
        if check is None:
            raise CopyError(
                f"the copy's record {entries[-1].number} is not in the files here. Restart the "
                "gateway to boot from the copy"
            )
        if not entries[0].payload:
            _, entries = self.epochs.read(prefix, lineage)
        copy = read_state(entries)
        copy.lineage = lineage
        check(copy)
        if self._store.number:
            self._files.write_copy(self._store, self._files.path + ".superseded")
        return copy

    def go_without(self) -> None:
        """Start without the copy, which does not answer. Raises OSError.

        If the files have lost records that the copy has, new records get the same numbers.
        """
        self._store.lineage = self._store.lineage or NO_LINEAGE
        own, last = self._files.read_writers(), self._store.number
        contained = {name: min(number, last) for name, number in own.items()}
        if contained != own:
            self._files.keep_writers(contained)

    def begin(self) -> Callable[[Sequence[Written]], None]:
        """Begin to follow the store, which is recovered, on disk, and has not changed yet.

        Returns the function that gets all new records. Raises OSError.
        """
        if self._attached:
            self._files.keep_writers(self._contained)
        self._backlog = Backlog(COPY_BACKLOG, self._store.number, time.monotonic())
        pause = self._random.uniform(0, self._config.snapshot_copy_interval)
        self._next_try = time.monotonic() + pause
        return lambda records: self._backlog.add(records, time.monotonic())

    # --- while running ---------------------------------------------------------------------------

    def tick(self) -> None:
        """Copy what is new on the local disk, when the next upload is due."""
        if time.monotonic() >= self._next_try:
            self._try(snapshots=True)

    def finish(self, seconds: float) -> bool:
        """At a stop, try to copy the last records, but no snapshot. Whether the copy has all."""
        last = threading.Thread(target=self._try, args=(False,), daemon=True)
        last.start()
        last.join(seconds)
        return not last.is_alive() and not self.state().lag_records

    def _try(self, snapshots: bool) -> None:
        if self._taken is not None or not self._turn.acquire(blocking=not snapshots):
            return
        pause = self._config.snapshot_copy_interval
        try:
            self._step(snapshots)
        except CopyTaken as error:
            self._taken, self._failure = error, str(error)
            self.on_taken(str(error))
        except (CopyError, StartError, OSError) as error:
            text = _reason(error) if isinstance(error, OSError) else str(error)
            if isinstance(error, DamagedError):
                text = error.fault
            if text != self._failure:
                LOG.error("remote copy: %s", text)
            self._failure = text
            pause *= self._random.uniform(0.5, 1.5)  # many gateways must not retry in one second
        else:
            if self._failure:
                LOG.info("remote copy: it works again")
            self._failure = None
        finally:
            self._next_try = time.monotonic() + pause
            self._turn.release()

    def _step(self, snapshots: bool) -> None:
        """Do one upload, if the copy lacks something."""
        if not self._attached:
            self.boot(check=None)
        if self.epochs.pending:
            self._done(self.epochs.flush())
        self.epochs.announce()
        records = self._backlog.above(self._number)
        is_newer = self._snapshot_time != self._files.snapshot_time
        fresh = is_newer and time.monotonic() >= self._next_totals
        due = fresh or self._backlog.lacking_since(self._number) is not None
        is_full = due and snapshots and self._segments >= COPY_SEGMENTS
        if self._number < self._backlog.begin or is_full:
            if snapshots:
                self._put_snapshot()
        elif due:
            self._put_segment(records, fresh and snapshots)
        # One epoch at a time: uploads must not wait for long.
        if snapshots and time.monotonic() >= self._next_sweep and not self.epochs.sweep():
            self._next_sweep = time.monotonic() + COPY_SWEEP_SECONDS

    def _put_segment(self, records: Sequence[Written], fresh: bool) -> None:
        """Put the records, and with `fresh` the traffic totals of the local snapshot."""
        after, written = self._number, self._snapshot_time
        totals: list[TrafficRow] = []
        if fresh:
            since = int(self._snapshot_time) - 2 * ONLINE_SECONDS
            written, number, totals = totals_since(self._files, since)
            self._next_totals = time.monotonic() + self._config.snapshot_interval
            if any(r.number > number and b'"traffic":' in r.content for r in records):
                written, totals = self._snapshot_time, []  # a record has later ones
        if records or totals:
            payload = encode_segment(after, records, totals)
            self._done(self.epochs.append(Entry("segment", after + len(records), payload)))
        self._snapshot_time = written

    def _put_snapshot(self) -> None:
        self._snapshot()
        written, number, image = self._files.read_snapshot()
        # Else the rows lag behind the records, or the disk refused it: wait for the next tick.
        if number >= max(self._number, self._backlog.begin):
            self._done(self.epochs.append(Entry("snapshot", number, image)))
            self._snapshot_time = written
            self._next_totals = time.monotonic() + self._config.snapshot_interval
            self.epochs.announce()

    def _done(self, entry: Entry) -> None:
        self._number = entry.number
        self._segments = 0 if entry.kind == "snapshot" else self._segments + 1


# ==================================================================================================
# backends: the interface. Pure netlink and UAPI codecs, their sockets, and one small class for
# each kind of interface: setup, alive, read, apply, close
# Never here: policy. The gateway decides which peers there should be.
# ==================================================================================================


class Device(NamedTuple):
    """An interface's own settings. private_key is empty when there is none."""

    private_key: bytes
    listen_port: int
    obfuscation: Obfuscation = PLAIN

    def __repr__(self) -> str:
        return f"Device(listen_port={self.listen_port})"


class Link(NamedTuple):
    """The wanted setup of an interface. Addresses are written like "10.0.1.1/24".

    `mark` is the alias by which the gateway recognises its interface; `kind` is the kernel's word.
    """

    name: str
    addresses: tuple[str, ...]
    mtu: int
    listen_port: int
    private_key: bytes
    obfuscation: Obfuscation = PLAIN
    mark: str = MARK
    kind: str = WG_GENL_NAME

    @property
    def device(self) -> Device:
        return Device(self.private_key, self.listen_port, self.obfuscation)

    def __repr__(self) -> str:
        return f"Link({self.name})"


class FoundLink(NamedTuple):
    """An existing link. `kind` is the kernel's word, empty for a hardware device."""

    ifindex: int
    name: str
    kind: str
    alias: str
    mtu: int = 0
    is_up: bool = False


class Reading(NamedTuple):
    """The state of an interface when it was read.

    A fingerprint is a hash of everything that the interface reports of a peer, counters included.
    `same` holds the fingerprints that were known before; `changed` holds the other peers, decoded.
    `device` is None where there is nothing to compare.
    """

    device: Device | None
    peers: int  # on the interface
    changed: list[tuple[int, PeerState]]
    same: set[int]
    unreadable: int = 0  # peers that could not be decoded

    def device_differs(self, link: Link) -> bool:
        """Whether key, port or parameters differ from the wanted ones."""
        return self.device not in (None, link.device)


class Backend(Protocol):
    """One interface. After open_backend(), only the lander calls setup() and apply().

    Workers call alive() and read(), with one reading at a time.
    """

    kind: str

    def setup(self, link: Link | None = None, make: bool = True) -> None:
        """Create and configure what is missing; leave the rest alone. Raises BackendError.

        An interface of this name that the gateway did not make is left alone: ForeignError. `link`
        replaces the wanted setup; name and kind must be the same. Without `make` the interface must
        be there: to make it can mean to start a program, and no request waits for that.
        """

    def alive(self) -> bool:
        """Whether the interface is still as setup() left it."""

    def read(self, known: Container[int]) -> Reading:
        """Read the interface and its peers: O(peers). Raises BackendError.

        Peers with `known` fingerprints are not decoded. Peers that change during the reading may be
        missing.
        """

    def apply(self, changes: Sequence[Change]) -> None:
        """Do all changes in order. Raises BackendError; some changes may then have been done."""

    def close(self) -> None:
        """Close the connection to the interface, which stays as it is."""


# --- netlink codec: bytes <-> values (Documentation/userspace-api/netlink/intro.rst) --------------


class GenericFamily(NamedTuple):
    """A generic netlink family; AmneziaWG's encoding depends on `version` (CTRL_ATTR_VERSION)."""

    id: int
    version: int
    obfuscated: bool


WIREGUARD_FAMILY = GenericFamily(0, 1, False)
_NO_KEY = bytes(KEY_BYTES)


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
    """struct nlmsghdr and payload; the kernel fills in the port id 0."""
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
    """struct nlmsgerr -> (errno or 0, the kernel's text if it sent one).

    The text follows the request's header, which the kernel echoes without its payload (CAPPED).
    """
    if len(payload) < 4:
        raise CodecError("netlink: an error message without an error number")
    number = -struct.unpack_from("=i", payload)[0]
    if not 0 <= number < 4096:
        raise CodecError(f"netlink: error number {-number}")
    has_text = number and flags & NLM_F_ACK_TLVS and flags & NLM_F_CAPPED
    for kind, value in parse_nl_attributes(payload[20:]) if has_text else ():
        if kind == NLMSGERR_ATTR_MSG:
            return number, value.rstrip(b"\0").decode("ascii", "replace")
    return number, ""


def genl(command: int, version: int, payload: bytes) -> bytes:
    return struct.pack("=BBH", command, version, 0) + payload


def nfgenmsg(family: int, resource: int = 0) -> bytes:
    """struct nfgenmsg (include/uapi/linux/netfilter/nfnetlink.h)."""
    return struct.pack("=BB", family, 0) + struct.pack(">H", resource)


# Attributes of fixed sizes, each with its header (length, type) and padding.
_FLAGGED_KEY = struct.Struct("=HH32sHHI")
_PSK = struct.Struct("=HH32s")
_ALLOWED_IP_HEADS = {  # all that precedes the address, by the length of a packed network
    1 + size: struct.pack(
        "=HHHHHxxHH",
        *(24 + size, NLA_F_NESTED),
        *(6, WGALLOWEDIP_A_FAMILY, family),
        *(4 + size, WGALLOWEDIP_A_IPADDR),
    )
    for family, size in ((socket.AF_INET, 4), (socket.AF_INET6, 16))
}
_MASK_HEAD = struct.pack("=HH", 5, WGALLOWEDIP_A_CIDR_MASK)


def encode_wg_peer(change: Change) -> bytes:
    """The attributes of one peer in WG_CMD_SET_DEVICE (include/uapi/linux/wireguard.h).

    Endpoint and keepalive are never set: they are the client's.
    """
    key, peer = change
    flag = WGPEER_F_REPLACE_ALLOWEDIPS if peer else WGPEER_F_REMOVE_ME
    head = _FLAGGED_KEY.pack(36, WGPEER_A_PUBLIC_KEY, key, 8, WGPEER_A_FLAGS, flag)
    if peer is None:
        return head
    psk = _PSK.pack(36, WGPEER_A_PRESHARED_KEY, peer.preshared_key or _NO_KEY)
    networks = b"".join(map(_encode_allowed_ip, peer.allowed_ips))
    return head + psk + nl_attribute(NLA_F_NESTED | WGPEER_A_ALLOWEDIPS, networks)


def _encode_allowed_ip(network: bytes) -> bytes:
    head = _ALLOWED_IP_HEADS[len(network)]
    return head + network[:-1] + _MASK_HEAD + network[-1:] + bytes(3)


AWG_BY_ATTRIBUTE = {row.attribute: name for name, row in AWG_PARAMETERS.items()}


def encode_awg_attributes(wanted: Obfuscation, actual: Obfuscation, version: int) -> bytes:
    """The attributes of the parameters that differ: older modules refuse those they do not know."""
    return b"".join(
        nl_attribute(row.attribute, _encode_awg_value(row, getattr(wanted, name), version))
        for name, row in AWG_PARAMETERS.items()
        if getattr(wanted, name) != getattr(actual, name)
    )


def _encode_awg_value(row: AwgParameter, value: Any, version: int) -> bytes:
    """AmneziaWG's uapi/wireguard.h; a range has its upper end in the upper half of the number."""
    if row.kind == "packet" or (row.kind == "header" and version == 2):
        return str(value).encode("ascii") + b"\0"
    if row.kind == "key":
        return bytes(value or _NO_KEY)
    size = _awg_size(row.kind, version)
    if row.kind == "header" and version == 1:
        value = value.low  # a range is one of kernel_refusals()
    elif isinstance(value, Span):
        value = value.high << 4 * size | value.low
    return int(value).to_bytes(size, sys.byteorder)


def _awg_size(kind: str, version: int) -> int:
    """How many bytes a number has."""
    return {"flag": 1, "size": 2, "range": 4, "header": 4 if version == 1 else 8}[kind]


def decode_awg_attribute(name: str, value: bytes, version: int) -> Any:
    """One parameter in WG_CMD_GET_DEVICE's answer, which may break our rules. Raises CodecError."""
    row = AWG_PARAMETERS[name]
    if row.kind == "key":
        return value if any(_exactly(value, KEY_BYTES, row.spelling)) else b""
    if row.kind == "packet" or (row.kind == "header" and version == 2):
        try:
            text = value.rstrip(b"\0").decode("ascii")
            return text if row.kind == "packet" else parse_span(text)
        except ValueError:
            raise CodecError(f"amneziawg: a bad value of {row.spelling}") from None
    size = _awg_size(row.kind, version)
    number = int.from_bytes(_exactly(value, size, row.spelling), sys.byteorder)
    if row.kind == "size":
        return number
    if row.kind == "flag":
        return number != 0
    if row.kind == "header" and version == 1:
        return Span(number, number)
    low, high = number & ((1 << 4 * size) - 1), number >> 4 * size
    return Span(low, max(low, high))


class AwgRelease(NamedTuple):
    """What brought a generation: the family version and release of the module, and amneziawg-go."""

    family: int
    module: str
    program: str


AWG_RELEASES: dict[str, AwgRelease] = {
    "1.0": AwgRelease(1, "v1.0.20240207", "0.2.0"),
    "1.5": AwgRelease(2, "v1.0.20251004", "0.2.13"),
    "2.0": AwgRelease(2, "v1.0.20251004", "0.2.15"),
    "3.0": AwgRelease(3, "v3.0.20260730", "v3.0.0"),
    # Up to v3.0.20260805 no module has it. The gateway tries it, and explains a refusal.
    "3.1": AwgRelease(3, "later than v3.0.20260805", "v3.1.20260812"),
}


def kernel_refusals(wanted: Obfuscation, version: int) -> list[str]:
    """The parameters that a module of a family version cannot speak, each with what can."""
    late = [_came_with(use) for use in uses(wanted) if AWG_RELEASES[use.since].family > version]
    return late + broken_rules(wanted, AWG_KERNEL_RULES)


def _came_with(use: Use) -> str:
    release = AWG_RELEASES[use.since]
    return (
        f"{use.what} came with generation {use.since}: kernel module {release.module}, "
        f"amneziawg-go {release.program}"
    )


def newest_parameters(wanted: Obfuscation) -> list[str]:
    """The parameters that decide a set's generation, each with the releases that brought it.

    An interface that refuses the set may not know them.
    """
    generation = newest_use(wanted)
    found = [_came_with(use) for use in uses(wanted) if use.since == generation > "1.0"]
    return found + (broken_rules(wanted, AWG_RULES_1_5) if generation < "3.0" else [])


def needs_new_link(wanted: Obfuscation, actual: Obfuscation) -> bool:
    """Whether a kernel's link must lose its header protection key, which only a new link does.

    Module v3.0 takes the zero key for a key.
    """
    return bool(actual.header_protection_key) and not wanted.header_protection_key


class Dialect:
    """Translates the parameters that an interface reports into those that were set.

    Some programs report other values than were set. amneziawg-go up to 0.2.15 keeps packets that
    were emptied, and makes a Jmax that equals Jmin one larger; up to 0.2.13 it speaks WireGuard's
    own headers and still reports the earlier ones. Clients connect all the same, and setting the
    values again would change nothing. So the values that an interface reports right after a set
    stand for the values that were set, and no other values do.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._meant: dict[str, tuple[Any, Any]] = {}  # the values reported and set, where unequal
        self.spoken: Obfuscation | None = None  # what was set last

    def understand(self, device: Device) -> Device:
        """The device with the parameters that were set in place of those that it reports."""
        reported = device.obfuscation
        meant = {n: was_set for n, (r, was_set) in self._meant.items() if r == getattr(reported, n)}
        return device._replace(obfuscation=reported._replace(**meant))

    def learn(self, wanted: Obfuscation, reported: Obfuscation) -> None:
        """Compare the report after a set. Raises BackendError if clients would be cut off."""
        plain = wanted.headers == PLAIN.headers
        needed = [n for n in AWG_SHARED if not (plain and n in _HEADERS)]
        if missing := unlike(wanted, reported, needed):
            raise BackendError(
                f"{self._name}: did not take {', '.join(missing)}, so that clients cannot connect: "
                "choose other parameters, or update the kernel module or amneziawg-go"
            )
        pairs = zip(Obfuscation._fields, reported, wanted, strict=True)
        meant = {name: (r, was_set) for name, r, was_set in pairs if r != was_set}
        if meant and meant != self._meant:
            LOG.warning(
                "%s: it reports other values of %s than were set; the program cannot do better, "
                "and no client is affected",
                self._name,
                ", ".join(AWG_PARAMETERS[name].spelling for name in meant),
            )
        self._meant, self.spoken = meant, wanted


def _device_head(name: str) -> bytes:
    return nl_attribute(WGDEVICE_A_IFNAME, name.encode("ascii") + b"\0")


def encode_wg_batches(name: str, changes: Iterable[Change]) -> Iterator[bytes]:
    """WG_CMD_SET_DEVICE payloads for all changes, cut by bytes."""
    head = _device_head(name)
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


def read_wg_device(
    payloads: Iterable[bytes],
    family: GenericFamily = WIREGUARD_FAMILY,
    known: Container[int] = (),
) -> Reading:
    """Decode WG_CMD_GET_DEVICE's answer: genl payloads. Raises CodecError.

    Several messages may hold one peer: the later ones continue its allowed IPs.
    """
    private_key, port = b"", 0
    parameters: dict[str, Any] = {}
    blocks: list[list[bytes]] = []
    last = b""  # the last block's public key
    for payload in payloads:
        for kind, value in parse_nl_attributes(payload[4:]):
            if kind == WGDEVICE_A_PEERS:
                for _, block in parse_nl_attributes(value):
                    # WireGuard's module sends the key first, AmneziaWG's after the flags.
                    parts = parse_nl_attributes(block)
                    key = next((part for n, part in parts if n == WGPEER_A_PUBLIC_KEY), b"")
                    if blocks and key == last:
                        blocks[-1].append(block)
                    else:
                        blocks.append([block])
                    last = key
            elif kind == WGDEVICE_A_PRIVATE_KEY:
                private_key = _exactly(value, KEY_BYTES, "private key")
            elif kind == WGDEVICE_A_LISTEN_PORT:
                port = struct.unpack("=H", _exactly(value, 2, "listen port"))[0]
            elif family.obfuscated and kind in AWG_BY_ATTRIBUTE:
                name = AWG_BY_ATTRIBUTE[kind]
                parameters[name] = decode_awg_attribute(name, value, family.version)
    if not any(private_key):
        private_key = b""
    device = Device(private_key, port, Obfuscation(**parameters))
    return read_peers(device, (b"".join(parts) for parts in blocks), decode_wg_peer, known)


_T = TypeVar("_T")


def read_peers(
    device: Device | None,
    blocks: Iterable[_T],
    decode: Callable[[_T], PeerState],
    known: Container[int],
) -> Reading:
    """Decode peers, each given as a block. A bad block does not affect the others."""
    changed: list[tuple[int, PeerState]] = []
    same: set[int] = set()
    peers = unreadable = 0
    for block in blocks:
        peers += 1
        fingerprint = hash(block)
        if fingerprint in known:
            same.add(fingerprint)
            continue
        try:
            changed.append((fingerprint, decode(block)))
        except CodecError:
            unreadable += 1
    return Reading(device, peers, changed, same, unreadable)


def decode_wg_peer(data: bytes) -> PeerState:
    """A peer in WG_CMD_GET_DEVICE's answer. Raises CodecError."""
    key = psk = b""
    handshake = rx = tx = 0
    located = False
    allowed: list[bytes] = []
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
            allowed += [_decode_allowed_ip(entry) for _, entry in parse_nl_attributes(value)]
        elif kind == WGPEER_A_ENDPOINT:
            located = True
    if not key:
        raise CodecError("wireguard: a peer without a public key")
    peer = WirePeer(key, b"" if psk == _NO_KEY else psk, tuple(sorted(allowed)))
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
        super().__init__(message)
        self.errno = number


class NetlinkSocket:
    """Sends requests and receives answers over one netlink socket. Several threads may use it.

    The texts of its errors begin with `prefix`.
    """

    def __init__(self, protocol: int, prefix: str = "") -> None:
        self._prefix = prefix
        try:
            self._socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol
            )
        except OSError as error:
            raise BackendError(f"{prefix}{_reason(error)}") from None
        self._socket.settimeout(BACKEND_TIMEOUT)
        self._socket.bind((0, 0))
        for option in (10, 11):  # SOL_NETLINK: NETLINK_CAP_ACK, NETLINK_EXT_ACK
            self._socket.setsockopt(270, option, 1)
        self._sequence = itertools.count(1)
        self._lock = threading.Lock()

    def request(
        self, kind: int, flags: int, payload: bytes, whole: bool = True, most: int | None = None
    ) -> list[bytes]:
        """Send one request and return the payloads of its answer. Raises NetlinkError.

        With `whole`, a dump that a change interrupted raises EINTR. After a request that reads at
        `most` so many payloads, the socket must be closed.
        """
        return self._exchange([(kind, flags | NLM_F_ACK, payload)], whole, most)

    def change_nftables(self, message: int, flags: int, payload: bytes) -> None:
        """Send a change, which nfnetlink demands in a batch. Raises NetlinkError.

        Only the change asks for an acknowledgement: the first answer is an error or that.
        """
        edge = nfgenmsg(0, NFNL_SUBSYS_NFTABLES)
        self._exchange(
            [
                (NFNL_MSG_BATCH_BEGIN, 0, edge),
                (NFNL_SUBSYS_NFTABLES << 8 | message, flags | NLM_F_ACK, payload),
                (NFNL_MSG_BATCH_END, 0, edge),
            ]
        )

    def _exchange(
        self,
        messages: Sequence[tuple[int, int, bytes]],
        whole: bool = True,
        most: int | None = None,
    ) -> list[bytes]:
        """Send messages (type, flags, payload) under one sequence number; return the answer."""
        with self._lock:
            sequence = next(self._sequence) & 0xFFFFFFFF
            data = b"".join(
                nl_message(NetlinkMessage(kind, flags | NLM_F_REQUEST, sequence, payload))
                for kind, flags, payload in messages
            )
            try:
                self._socket.send(data)
                return list(itertools.islice(self._answer(sequence, whole), most))
            except TimeoutError:
                words = f"netlink: no answer within {BACKEND_TIMEOUT:.0f} s"
                raise NoAnswer(self._prefix + words) from None
            except OSError as error:
                raise self._error(error.errno or errno.EIO, "") from None

    def _error(self, number: int, words: str) -> NetlinkError:
        return NetlinkError(number, self._prefix + (words or os.strerror(number)))

    def _answer(self, sequence: int, whole: bool) -> Iterator[bytes]:
        interrupted = False
        while True:
            for message in parse_nl_messages(self._socket.recv(1 << 17)):
                if message.sequence != sequence:
                    continue  # the late answer to a request that timed out
                interrupted |= bool(message.flags & NLM_F_DUMP_INTR)
                if message.type not in (NLMSG_ERROR, NLMSG_DONE):
                    yield message.payload
                    continue
                number, words = parse_nl_error(message.payload or bytes(4), message.flags)
                if number:
                    raise self._error(number, words)
                if interrupted and whole:
                    raise self._error(errno.EINTR, "the dump was interrupted by a change")
                return

    def dump(self, kind: int, payload: bytes, whole: bool) -> list[bytes]:
        """Request a dump; repeat it, if it must be `whole`, when a change interrupts it."""
        for _ in range(DUMP_TRIES):
            try:
                return self.request(kind, NLM_F_DUMP, payload, whole)
            except NetlinkError as error:
                if error.errno != errno.EINTR:
                    raise
        text = f"{self._prefix}netlink: the dump was interrupted {DUMP_TRIES} times"
        raise BackendError(text)

    def close(self) -> None:
        self._socket.close()


def genl_family(netlink: NetlinkSocket, name: str) -> GenericFamily | None:
    """The generic netlink family of this name, None when the kernel does not have it."""
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


def decode_link(payload: bytes) -> FoundLink:
    """struct ifinfomsg and its attributes, as RTM_GETLINK answers. Raises CodecError."""
    if len(payload) < 16:
        raise CodecError("netlink: a short link message")
    index, flags = struct.unpack_from("=iI", payload, 4)
    found = dict(parse_nl_attributes(payload[16:]))
    info = dict(parse_nl_attributes(found.get(IFLA_LINKINFO, b"")))
    texts = (found.get(IFLA_IFNAME), info.get(IFLA_INFO_KIND), found.get(IFLA_IFALIAS))
    name, kind, alias = (
        (text or b"").rstrip(b"\0").decode("utf-8", "surrogateescape") for text in texts
    )
    mtu = int.from_bytes(found.get(IFLA_MTU, b""), sys.byteorder)
    return FoundLink(index, name, kind, alias, mtu, bool(flags & IFF_UP))


class HostRoute(NamedTuple):
    """A network, and the index of the link that leads there; 0 if several links do."""

    network: IPv4or6Network
    ifindex: int


def decode_routes(payloads: Iterable[bytes]) -> list[HostRoute]:
    """The unicast and local routes in RTM_GETROUTE's answer (struct rtmsg). Raises CodecError."""
    found = []
    for payload in payloads:
        if len(payload) < 12:
            raise CodecError("netlink: a short route message")
        family, length = payload[:2]
        known = family in (socket.AF_INET, socket.AF_INET6)
        if not known or payload[7] not in (RTN_UNICAST, RTN_LOCAL):
            continue
        attributes = dict(parse_nl_attributes(payload[12:]))
        packed = attributes.get(RTA_DST, bytes(4 if family == socket.AF_INET else 16))
        index = attributes.get(RTA_OIF, bytes(4))
        try:
            network = ipaddress.ip_network((packed, length))
            found.append(HostRoute(network, struct.unpack("=I", index)[0]))
        except (ValueError, struct.error):
            raise CodecError("netlink: a route without a valid network and link") from None
    return found


IPv4or6Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface


def takes_ipv6(interface: str) -> bool:
    """Whether the host lets an interface have IPv6 addresses; "default" decides for a new one."""
    for name in (interface, "default"):
        with contextlib.suppress(OSError):
            return Path("/proc/sys/net/ipv6/conf", name, "disable_ipv6").read_text() != "1\n"
    return False


def ifinfomsg(index: int = 0, flags: int = 0) -> bytes:
    """struct ifinfomsg, which sets and clears nothing but `flags`."""
    return struct.pack("=BxHiII", 0, 0, index, flags, flags)


class Route:
    """rtnetlink: links, addresses and routes."""

    def __init__(self) -> None:
        self._netlink = NetlinkSocket(NETLINK_ROUTE)

    @staticmethod
    def index(name: str) -> int:
        """The index of the interface with this name, 0 if there is none."""
        try:
            return socket.if_nametoindex(name)
        except OSError:
            return 0

    def create(self, link: Link) -> None:
        """Make the kernel's interface. Raises NetlinkError."""
        name = nl_attribute(IFLA_IFNAME, link.name.encode("ascii") + b"\0")
        info = nl_attribute(IFLA_INFO_KIND, link.kind.encode("ascii"))
        attributes = name + nl_attribute(NLA_F_NESTED | IFLA_LINKINFO, info)
        self._netlink.request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, ifinfomsg() + attributes)

    def find(self, name: str) -> FoundLink | None:
        """The link of this name, None when there is none. Raises BackendError."""
        if (index := self.index(name)) == 0:
            return None
        try:
            payloads = self._netlink.request(RTM_GETLINK, 0, ifinfomsg(index))
        except NetlinkError as error:
            if error.errno == errno.ENODEV:
                return None
            raise
        return decode_link(payloads[0])

    def get(self, name: str) -> FoundLink:
        """The link of this name. Raises BackendError, also when there is none."""
        found = self.find(name)
        if found is None:
            raise BackendError(f"{name}: the interface is gone")
        return found

    def links(self) -> list[FoundLink]:
        """Every link of this network namespace. Raises BackendError."""
        return [*map(decode_link, self._netlink.dump(RTM_GETLINK, bytes(16), whole=True))]

    def mark(self, name: str, alias: str) -> None:
        """Give a link this alias, unless it has it already. Raises BackendError."""
        found = self.get(name)
        if found.alias != alias:
            attribute = nl_attribute(IFLA_IFALIAS, os.fsencode(alias))
            self._netlink.request(RTM_NEWLINK, 0, ifinfomsg(found.ifindex) + attribute)

    def is_right(self, link: Link, index: int) -> bool:
        """Whether the link with configure()'s index is there, up, and has its addresses.

        Raises BackendError.
        """
        found = self.find(link.name)
        return (
            found is not None
            and (found.ifindex, found.mtu, found.is_up) == (index, link.mtu, True)
            and self.addresses(index).keys() == set(self.wanted(link))
        )

    @staticmethod
    def wanted(link: Link) -> list[IPv4or6Interface]:
        """The addresses that a link must have, without IPv6 where the host does not allow it."""
        addresses = map(ipaddress.ip_interface, link.addresses)
        return [each for each in addresses if each.version == 4 or takes_ipv6(link.name)]

    def addresses(self, index: int | None) -> dict[IPv4or6Interface, bytes]:
        """A link's addresses with their prefix lengths, without the kernel's link-local ones; for
        each the packed address of its other end (ip-address(8), "peer"), or itself.

        None: those of all links. Raises BackendError.
        """
        found = {}
        for payload in self._netlink.dump(RTM_GETADDR, bytes(8), whole=True):
            if len(payload) < 8:
                raise CodecError("netlink: a short address message")
            _, length, _, _, where = struct.unpack_from("=BBBBI", payload)
            attributes = dict(parse_nl_attributes(payload[8:]))
            end = attributes.get(IFA_ADDRESS, bytes(4))  # the kernel leaves 0.0.0.0 out
            packed = attributes.get(IFA_LOCAL) or end
            if index in (None, where) and len(packed) in (4, 16):
                found[ipaddress.ip_interface((packed, length))] = end
        return {a: end for a, end in found.items() if a.version == 4 or not a.is_link_local}

    def routes(self) -> list[HostRoute]:
        """Every route by which packets leave this host or reach it. Raises BackendError."""
        return decode_routes(self._netlink.dump(RTM_GETROUTE, bytes(12), whole=True))

    def _change_address(self, add: bool, index: int, address: IPv4or6Interface, end: bytes) -> None:
        """Add an address to a link, without duplicate address detection, or take it away.

        `end`: see addresses(). A change that is done already is no error: secondary addresses go
        with their primary.
        """
        kind, flags = (RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL) if add else (RTM_DELADDR, 0)
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        nodad = 0 if address.version == 4 else 0x02  # IFA_F_NODAD
        header = struct.pack("=BBBBI", family, address.network.prefixlen, nodad, 0, index)
        attributes = nl_attribute(IFA_LOCAL, address.ip.packed) + nl_attribute(IFA_ADDRESS, end)
        try:
            self._netlink.request(kind, flags, header + attributes)
        except NetlinkError as error:
            if error.errno not in (errno.EEXIST, errno.EADDRNOTAVAIL):
                raise

    def delete(self, index: int) -> None:
        """Remove an existing link. Raises NetlinkError."""
        self._netlink.request(RTM_DELLINK, 0, ifinfomsg(index))

    def configure(self, link: Link) -> int:
        """Set a link's MTU and addresses, and bring it up; returns its index. Raises BackendError.

        New IPv4 addresses come before the old ones go, so that no packet is lost while a subnet
        changes. In IPv6 the old ones go first, because an address cannot have two prefix lengths.
        """
        step = "find it"
        try:
            found = self.get(link.name)
            index = found.ifindex
            # The MTU first: a small one drops IPv6 addresses.
            if (found.mtu, found.is_up) != (link.mtu, True):
                step = f"set MTU {link.mtu} and bring it up"
                attribute = nl_attribute(IFLA_MTU, struct.pack("=I", link.mtu))
                self._netlink.request(RTM_NEWLINK, 0, ifinfomsg(index, IFF_UP) + attribute)
            step = "read its addresses"
            present, wanted = self.addresses(index), self.wanted(link)
            old = present.keys() - set(wanted)
            for add, address in (
                *((False, each) for each in old if each.version == 6),
                *((True, each) for each in wanted if each not in present),
                *((False, each) for each in old if each.version == 4),
                # Again: the kernel takes secondary addresses away with their primary.
                *((True, each) for each in wanted if old and each.version == 4),
            ):
                step = f"{'add' if add else 'take away'} {address}"
                end = address.ip.packed if add else present[address]
                self._change_address(add, index, address, end)
        except BackendError as error:
            raise BackendError(f"{link.name}: cannot {step}: {error}") from None
        return index

    def close(self) -> None:
        self._netlink.close()


def _refusal(error: str, reasons: Sequence[str]) -> ParametersRefused:
    """An interface's refusal, with the parameters that may be the reason."""
    return ParametersRefused("; ".join([f"{error}: the parameters are refused", *reasons]))


def _no_module(name: str, kind: str) -> BackendError:
    text = f"{name}: the kernel has no {PRODUCTS[kind]}: load its module (modprobe {kind})"
    return BackendError(text)


class NetlinkBackend:
    """Kernel WireGuard or AmneziaWG over generic netlink."""

    kind = "netlink"

    def __init__(self, link: Link) -> None:
        self._link = link
        self._connect = functools.partial(NetlinkSocket, NETLINK_GENERIC, f"{link.name}: ")
        self._control = self._connect()
        self._reader = self._connect()
        self._route = Route()
        self._dialect = Dialect(link.name)
        self._family = WIREGUARD_FAMILY
        self._index = 0

    def setup(self, link: Link | None = None, make: bool = True) -> None:
        wanted = link or self._link
        # The kernel loads the module when it is asked for the family.
        family = genl_family(self._control, wanted.kind)
        if family is None:
            raise _no_module(wanted.name, wanted.kind)
        self._family = family
        if refused := kernel_refusals(wanted.obfuscation, family.version):
            raise ParametersRefused(
                f"{wanted.name}: the kernel's AmneziaWG (family version {family.version}) cannot "
                f"speak the parameters: {'; '.join(refused)}"
            )
        hold_link(self._route, wanted, self._index, make)
        self._link = wanted
        device = self._dialect.understand(self._device())
        if needs_new_link(wanted.obfuscation, device.obfuscation):
            self._replace_link()
        else:
            self._configure(device)

    def _configure(self, device: Device) -> None:
        """Set everything that differs from the wanted setup."""
        wanted = self._link.obfuscation
        attributes = b""
        if device.private_key != self._link.private_key:
            attributes += nl_attribute(WGDEVICE_A_PRIVATE_KEY, self._link.private_key)
        if device.listen_port != self._link.listen_port:
            port = struct.pack("=H", self._link.listen_port)
            attributes += nl_attribute(WGDEVICE_A_LISTEN_PORT, port)
        if attributes:
            self._set(_device_head(self._link.name) + attributes)
        if wanted != device.obfuscation:
            self._speak(wanted, device.obfuscation)
        self._index = self._route.configure(self._link)

    def _replace_link(self) -> None:
        """Replace the link by a new one with the same peers, and configure it.

        Counters restart at 0, and clients do a new handshake.
        """
        name = self._link.name
        peers = [state.peer for _, state in self.read(()).changed]
        changes = [Change(peer.public_key, peer) for peer in peers]
        began = time.monotonic()
        try:
            if (found := self._route.find(name)) is not None:
                remove_interface(found)
            hold_link(self._route, self._link, 0, make=True)
            self._index = self._route.index(name)
            self._configure(self._device())
        except BackendError:
            # The peers come back even if the kernel refuses the parameters, or if the old link was
            # emptied and could not be deleted. The caller gets the first failure.
            with contextlib.suppress(BackendError):
                self.apply(changes)
            raise
        self.apply(changes)
        LOG.warning(
            "%s: made anew with its %s, because only a new link has no HeaderProtectionKey: "
            "the peers were offline for %.0f ms, and their clients do a new handshake",
            name,
            show_peers(len(peers)),
            (time.monotonic() - began) * 1000,
        )

    def _speak(self, wanted: Obfuscation, actual: Obfuscation) -> None:
        """Set AmneziaWG's parameters, and check that the interface has them."""
        try:
            attributes = encode_awg_attributes(wanted, actual, self._family.version)
            self._set(_device_head(self._link.name) + attributes)
        except NetlinkError as error:
            raise _refusal(str(error), newest_parameters(wanted)) from None
        self._dialect.learn(wanted, self._device().obfuscation)

    def alive(self) -> bool:
        return self._route.is_right(self._link, self._index)

    def read(self, known: Container[int]) -> Reading:
        payloads = self._reader.dump(self._family.id, self._question(), whole=not known)
        reading = read_wg_device(payloads, self._family, known)
        return reading._replace(device=self._dialect.understand(cast(Device, reading.device)))

    def apply(self, changes: Sequence[Change]) -> None:
        hold_link(self._route, self._link, self._index)
        for payload in encode_wg_batches(self._link.name, changes):
            self._set(payload)

    def close(self) -> None:
        for part in (self._control, self._reader, self._route):
            part.close()

    def _set(self, payload: bytes) -> None:
        command = genl(WG_CMD_SET_DEVICE, self._family.version, payload)
        self._control.request(self._family.id, 0, command)

    def _question(self) -> bytes:
        return genl(WG_CMD_GET_DEVICE, self._family.version, _device_head(self._link.name))

    def _device(self) -> Device:
        """The interface without its peers: read the first message only, then close the socket."""
        with contextlib.closing(self._connect()) as netlink:
            first = netlink.request(self._family.id, NLM_F_DUMP, self._question(), most=1)
        return cast(Device, read_wg_device(first, self._family).device)


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


def read_uapi_device(parts: Iterable[bytes], known: Container[int] = ()) -> Reading:
    """Decode the answer to `get=1`, with its `errno=0`. Raises CodecError, BackendError."""
    head, blocks = split_uapi_device(parts)
    return read_peers(decode_uapi_head(head), blocks, decode_uapi_peer, known)


def split_uapi_device(parts: Iterable[bytes]) -> tuple[bytes, list[bytes]]:
    """The interface's lines, and for each peer the text after "public_key=".

    It reads part by part, because each copy of the whole answer would stop all threads for 10 ms at
    60,000 peers. Raises CodecError, BackendError.
    """
    mark = b"\npublic_key="
    most = len(mark) - 1  # bytes of a cut mark that one part can hold
    blocks: list[bytes] = []
    pieces = [b"\n"]  # of an unfinished block, joined once when its end is found
    tail = pieces[0]
    for part in parts:
        pieces.append(part)
        if mark in part or mark in tail + part[:most]:
            *whole, rest = b"".join(pieces).split(mark)
            blocks += whole
            pieces = [rest]
        tail = (tail + part[-most:])[-most:]
    body, errno_is, status = b"".join(pieces).rpartition(b"errno=")
    check_uapi_status(errno_is + status if body.endswith(b"\n") else b"")
    head, *blocks = [*blocks, body]
    return head[1:], blocks


def uapi_device(parts: Iterable[bytes]) -> Device:
    """The interface of an answer to `get=1`, without its peers. Raises CodecError, BackendError."""
    head, _ = split_uapi_device(parts)
    return decode_uapi_head(head)


def decode_uapi_head(text: bytes) -> Device:
    """The interface's own lines. Raises CodecError."""
    private_key, port = b"", 0
    parameters: dict[str, Any] = {}
    for line in text.decode("ascii", "replace").splitlines():
        name, separator, value = line.partition("=")
        try:
            if not separator or name == "errno":
                raise ValueError
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
    """A parameter of AmneziaWG, which may break our rules. Raises ValueError."""
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
    """The lines that turn `actual` into `wanted`: none if they are equal, else all parameters.

    amneziawg-go up to 0.2.15 resets every parameter that a set does not hold, and refuses
    parameters of later generations. So the lines leave out parameters of later generations that
    nothing changes. They also leave out junk and packets that neither side has, because 0.2.16 to
    0.2.19 refuse a Jc of 0, and 0.2.16 makes an empty packet of an empty I1.
    """
    if wanted == actual:
        return ""
    generation = generation_of(wanted)
    return "".join(
        f"{name}={_encode_uapi_parameter(value)}\n"
        for name, value, present, default in zip(
            Obfuscation._fields, wanted, actual, PLAIN, strict=True
        )
        if not value == present == default
        or (AWG_PARAMETERS[name].since <= generation and name not in (*_JUNK, *_PACKETS))
    )


def _encode_uapi_parameter(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return (value or bytes(KEY_BYTES)).hex() if isinstance(value, bytes) else str(value)


class UapiError(BackendError):
    """The program's answer was an errno."""


def check_uapi_status(line: bytes) -> None:
    """Raise UapiError if the last line of an answer has an errno, CodecError without that line."""
    match = re.fullmatch(rb"errno=(-?[0-9]{1,6})\n", line)
    if match is None:
        raise CodecError("UAPI: the answer has no errno")
    if number := int(match[1]):
        raise UapiError(f"UAPI: {os.strerror(abs(number) % 4096)}")


def _uapi_key(value: str) -> bytes:
    raw = bytes.fromhex(value)
    if len(raw) != KEY_BYTES or len(value) != 2 * KEY_BYTES:
        raise ValueError
    return raw


def _uapi_integer(value: str) -> int:
    if len(value) > 19 or not value.isdecimal() or (number := int(value)) > MAX_INTEGER:
        raise ValueError
    return number


def decode_uapi_peer(block: bytes) -> PeerState:
    """A peer's lines, after "public_key=". Raises CodecError."""
    psk = b""
    seconds = nanoseconds = rx = tx = 0
    networks: list[bytes] = []
    located = False
    first, *lines = block.decode("ascii", "replace").splitlines() or [""]
    name = "public_key"
    try:
        key = _uapi_key(first)
        for line in lines:
            name, separator, value = line.partition("=")
            if name == "allowed_ip":
                networks.append(_uapi_network(value))
            elif name == "rx_bytes":
                rx = _uapi_integer(value)
            elif name == "tx_bytes":
                tx = _uapi_integer(value)
            elif name == "last_handshake_time_sec":
                seconds = _uapi_integer(value)
            elif name == "last_handshake_time_nsec":
                nanoseconds = _uapi_integer(value)
            elif name == "preshared_key":
                psk = _uapi_key(value)
            elif not separator or name == "errno":
                raise ValueError
            elif name == "endpoint":
                located = True
    except (ValueError, OSError):
        raise CodecError(f"UAPI: a bad value of {name[:40]}") from None
    return PeerState(
        WirePeer(key, psk if psk != _NO_KEY else b"", tuple(sorted(networks))),
        _in_range(seconds or int(nanoseconds != 0), MAX_TIME),
        rx,
        tx,
        located,
    )


def _uapi_network(value: str) -> bytes:
    """ "10.0.0.1/32" as packed address and prefix byte. Raises ValueError, OSError."""
    address, _, prefix = value.partition("/")
    packed = socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
    length = _uapi_integer(prefix)
    host_bits = 8 * len(packed) - length
    if host_bits and (host_bits < 0 or int.from_bytes(packed, "big") & ((1 << host_bits) - 1)):
        raise ValueError
    return packed + bytes((length,))


class UapiConnection:
    """A connection to a userspace WireGuard's socket. It reconnects when the program restarts."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self.timeouts = 0  # in a row

    def exchange(self, request: bytes) -> list[bytes]:
        """Send one operation; return the parts of its answer, without the empty line.

        Raises BackendError.
        """
        with self._lock:
            try:
                try:
                    answer = self._exchange(request)
                except (BrokenPipeError, ConnectionResetError, EOFError):
                    self.close()  # the program has restarted; operations are idempotent
                    answer = self._exchange(request)
                self.timeouts = 0
                return answer
            except (TimeoutError, BlockingIOError):
                self.close()
                self.timeouts += 1
                text = f"{self._path}: no answer within {BACKEND_TIMEOUT:.0f} s"
                raise NoAnswer(text) from None
            except (OSError, EOFError) as error:
                self.close()
                raise BackendError(f"{self._path}: {_reason(error)}") from None

    def _exchange(self, request: bytes) -> list[bytes]:
        if self._socket is None:
            self._socket = connect_uapi(self._path)
        deadline = time.monotonic() + BACKEND_TIMEOUT
        self._socket.sendall(request)
        parts: list[bytes] = []
        tail = b""
        while not tail.endswith(b"\n\n"):
            part = self._socket.recv(1 << 18)
            if not part:
                raise EOFError
            if time.monotonic() > deadline:
                raise TimeoutError
            parts.append(part)
            tail = (tail + part)[-2:]
        parts[-1] = parts[-1][:-1]
        return parts

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def connect_uapi(path: str) -> socket.socket:
    """A connection whose calls raise BlockingIOError after BACKEND_TIMEOUT."""
    limit = struct.pack("@ll", *divmod(int(BACKEND_TIMEOUT * 1e6), 1_000_000))  # struct timeval
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # Set once, because settimeout() polls before each call.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        connection.connect(path)
    except OSError:
        connection.close()
        raise
    return connection


def uapi_listener(path: str) -> int | None:
    """The id of the process that opened this socket, None if nothing listens there.

    A program that went into the background has another id. See SO_PEERCRED in unix(7).
    """
    try:
        with contextlib.closing(connect_uapi(path)) as connection:
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    except OSError:
        return None
    return int(struct.unpack("=3i", credentials)[0])


def uapi_answers(path: str) -> bool:
    return uapi_listener(path) is not None


def uapi_port(path: str) -> int:
    """The UDP port of the interface behind this socket, 0 if nothing answers."""
    with contextlib.closing(UapiConnection(path)) as connection, contextlib.suppress(BackendError):
        return uapi_device(connection.exchange(b"get=1\n\n")).listen_port
    return 0


class UapiBackend:
    """A userspace WireGuard over its socket. setup() starts `program` if none listens there.

    The program runs in its own session and outlives the gateway, so that its tunnels stay up.
    """

    kind = "uapi"

    def __init__(self, link: Link, program: str | None) -> None:
        self._link = link
        self._program = program
        self._path = uapi_path(link.kind, link.name)
        self._control = UapiConnection(self._path)
        self._reader = UapiConnection(self._path)
        self._route = Route()
        self._dialect = Dialect(link.name)
        self._process: subprocess.Popen[bytes] | None = None
        self._index = 0
        # The program's answer to the first setup(), for the first read() after it. Only
        # open_backend() calls setup() without a link, and only then the answer is kept.
        self._said: list[bytes] | None = None

    def setup(self, link: Link | None = None, make: bool = True) -> None:
        wanted, self._said = link or self._link, None
        hold_link(self._route, wanted, self._index, make, self._make)
        if not uapi_answers(self._path):
            if not make:
                text = "its program is gone, and the gateway starts it again"
                raise BackendError(f"{wanted.name}: {text}")
            self._start()
        said = self._control.exchange(b"get=1\n\n")
        self._said = said if link is None else None
        self._link = wanted
        device = self._dialect.understand(uapi_device(said))
        lines = ""
        if device.private_key != wanted.private_key:
            lines += f"private_key={wanted.private_key.hex()}\n"
        if device.listen_port != wanted.listen_port:
            lines += f"listen_port={wanted.listen_port}\n"
        if lines:
            self._set(lines.encode("ascii"))
        if wanted.obfuscation != device.obfuscation:
            self._speak(wanted.obfuscation, device.obfuscation)
        self._index = self._route.configure(wanted)

    def _make(self, link: Link) -> None:
        if uapi_answers(self._path):
            where = "was renamed (rename it back), or is in another namespace"
            raise _foreign(link, f"a program answers on {self._path} whose interface {where}")
        self._start()

    def _speak(self, wanted: Obfuscation, actual: Obfuscation) -> None:
        """Set AmneziaWG's parameters, and check that the interface has them."""
        stuck = {
            n: getattr(actual, n) for n in _JUNK if getattr(actual, n) > getattr(wanted, n) == 0
        }
        try:
            self._set(encode_uapi_parameters(wanted, actual).encode("ascii"))
        except UapiError as error:
            if not stuck or wanted != self._dialect.spoken:
                reasons = broken_rules(wanted, [AWG_COUNTER])
                reasons += [
                    f"{AWG_PARAMETERS[name].spelling}: amneziawg-go 0.2.16 to 0.2.19, of "
                    "generation 2.0, cannot set it to 0 again"
                    for name in stuck
                ]
                reasons += newest_parameters(wanted)
                raise _refusal(f"{self._link.name}: {error}", reasons) from None
            # Somebody else changed these: junk packets cut no client off, so they may stay.
            kept = wanted._replace(**stuck)
            self._set(encode_uapi_parameters(kept, actual).encode("ascii"))
        device = uapi_device(self._control.exchange(b"get=1\n\n"))
        self._dialect.learn(wanted, device.obfuscation)

    def _start(self) -> None:
        name = self._link.name
        if self._program is None:
            raise BackendError(
                f"{name}: no userspace WireGuard listens on {self._path}: install "
                f"{PROGRAMS[self._link.kind]}"
            )
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
                raise BackendError(
                    f"{name}: {self._program} ended with status {status}: run `{self._program} -f "
                    f"{name}` to see why"
                )
            if time.monotonic() > deadline:
                self._process.kill()
                self._process.wait()
                raise BackendError(
                    f"{name}: {self._program} did not open {self._path} within "
                    f"{DAEMON_START_SECONDS:.0f} s, and the gateway ended it"
                )
            time.sleep(0.01)

    def alive(self) -> bool:
        """As Backend.alive(). Kills a program that hangs if this process has started it."""
        if self._process is not None and self._process.poll() is not None:
            self._process = None
            return False
        timeouts = max(self._control.timeouts, self._reader.timeouts)
        if self._process is not None and timeouts >= HUNG_TIMEOUTS:
            LOG.error(
                "%s: %s does not answer and was killed; it is started again, and all clients of "
                "the interface do a new handshake",
                self._link.name,
                self._program,
            )
            self._process.kill()
            self._process.wait()
            self._process, self._control.timeouts, self._reader.timeouts = None, 0, 0
            return False
        return self._route.is_right(self._link, self._index) and uapi_answers(self._path)

    def read(self, known: Container[int]) -> Reading:
        said, self._said = self._said, None
        reading = read_uapi_device(said or self._reader.exchange(b"get=1\n\n"), known)
        return reading._replace(device=self._dialect.understand(cast(Device, reading.device)))

    def apply(self, changes: Sequence[Change]) -> None:
        hold_link(self._route, self._link, self._index)
        for start in range(0, len(changes), READ_CHUNK):
            self._set(encode_uapi_changes(changes[start : start + READ_CHUNK]))

    def _set(self, lines: bytes) -> None:
        self._said = None
        check_uapi_status(b"".join(self._control.exchange(b"set=1\n" + lines + b"\n")))

    def close(self) -> None:
        for part in (self._control, self._reader, self._route):
            part.close()


# --- ownership of interfaces ----------------------------------------------------------------------
# The only code that decides which interfaces belong to this gateway. Everything that makes, changes
# or removes one uses it: the backends' setup(), `net up`, `net down` and, by those, install.sh.
# An interface is ours when it carries our mark, which it gets right after its creation. Neither its
# name nor its key proves anything: other WireGuard setups use the same default key file.

PRODUCTS = {WG_GENL_NAME: "WireGuard", AWG_GENL_NAME: "AmneziaWG"}  # by the kernel's kind
UAPI_DIRECTORIES = {WG_GENL_NAME: UAPI_DIRECTORY, AWG_GENL_NAME: AWG_UAPI_DIRECTORY}
USERSPACE_KIND = "tun"  # of the interface of every userspace WireGuard, and of much else
# Tells whether an older version of this gateway, which set no mark, made an interface.
Recognise = Callable[[Reading], bool]


def recognise_none(reading: Reading) -> bool:
    return False


def hold_link(
    route: Route,
    link: Link,
    index: int,
    make: bool = False,
    create: Callable[[Link], None] | None = None,
) -> None:
    """See to it that our interface is there: the one with this index, which is never reused, or
    with `make` one that is found to be ours or created (by default the kernel's), and marked.
    Raises ForeignError, BackendError."""
    if index and route.index(link.name) == index:
        return
    if not make:
        raise BackendError(f"{link.name}: the interface is gone, and the gateway sets it up again")
    try:
        if find_own_link(route, link) is None:
            (create or route.create)(link)
        route.mark(link.name, link.mark)
    except NetlinkError as error:
        raise NetlinkError(error.errno, f"{link.name}: cannot be made: {error}") from None


def remove_interface(found: FoundLink) -> str:
    """Delete a link. It is emptied first: deleting it with peers takes the kernel 17 ms a peer.

    A userspace WireGuard ends when its interface is deleted.
    """
    with (
        contextlib.closing(Route()) as route,
        contextlib.closing(NetlinkSocket(NETLINK_GENERIC)) as control,
    ):
        try:
            family = genl_family(control, found.kind) if found.kind in PRODUCTS else None
            if family is not None:
                head = nl_attribute(WGDEVICE_A_IFINDEX, struct.pack("=I", found.ifindex))
                flags = nl_attribute(WGDEVICE_A_FLAGS, struct.pack("=I", WGDEVICE_F_REPLACE_PEERS))
                command = genl(WG_CMD_SET_DEVICE, family.version, head + flags)
                control.request(family.id, 0, command)
            route.delete(found.ifindex)
        except NetlinkError as error:
            raise BackendError(f"{found.name}: cannot be removed: {error}") from None
    return f"{found.name}: removed"


def claim_links(links: Sequence[Link], recognise: Recognise) -> None:
    """Mark those of our interfaces that exist, before anything is changed.

    Raises ForeignError, having touched none, when one of them is not ours.
    """
    with contextlib.closing(Route()) as route:
        found = [find_own_link(route, link, recognise) for link in links]
        for link, present in zip(links, found, strict=True):
            if present is not None and present.alias != link.mark:
                route.mark(link.name, link.mark)
                LOG.warning("%s: is this gateway's, and gets its mark: %r", link.name, link.mark)


def find_own_link(
    route: Route, link: Link, recognise: Recognise = recognise_none
) -> FoundLink | None:
    """The interface with the link's name, None when there is none. Nothing is changed.

    It is ours if it carries our mark. Without any mark it is ours if it has neither key nor peers,
    or if it is recognised. Raises ForeignError for every other one, BackendError.
    """
    found = route.find(link.name)
    if found is None:
        return None
    product = PRODUCTS[link.kind]
    if found.kind not in (link.kind, USERSPACE_KIND):
        what = f"a {found.kind} interface" if found.kind else "a network device"
        what = f"{PRODUCTS[found.kind]}'s" if found.kind in PRODUCTS else what
        raise _foreign(link, f"it is {what}, not {product}'s")
    if found.alias == link.mark:
        return found
    path = uapi_path(link.kind, link.name)
    if found.kind == USERSPACE_KIND and not uapi_answers(path):
        words = f"it is a tun device, and no userspace {product} answers on {path}"
        raise _foreign(link, words)
    try:
        reading = read_link(link.kind, found)
    except BackendError as error:
        raise _foreign(link, f"what it holds cannot be read ({error})") from None
    marked = is_marked(found.alias)
    device = cast(Device, reading.device)
    untouched = not (device.private_key or reading.peers or found.alias)
    if not marked and (untouched or recognise(reading)):
        return found
    key = "no key"
    if device.private_key:
        key = f"public key {short_key(encode_key(x25519_public(device.private_key)))}"
    peers = show_peers(reading.peers)
    mark = f", and the mark {found.alias!r}" if marked else ""
    words = f"it is {product}'s, with {peers}, {key}, listen port {device.listen_port}{mark}"
    ways = (
        f", or take it over with its peers (wggw adopt --interface {link.name}: nobody's tunnel is "
        f"interrupted), or remove it yourself (ip link delete {link.name}), or, if it is this "
        f"gateway's own, give it the mark: ip link set dev {link.name} alias "
        f"{shlex.quote(link.mark)} (peers that the database does not have are then removed)"
    )
    raise _foreign(link, words, ways)


def _foreign(link: Link, found: str, ways: str = "") -> ForeignError:
    variable = "WG_INTERFACE" if link.kind == WG_GENL_NAME else "AWG_INTERFACE"
    return ForeignError(
        f"{variable} {link.name!r}: an interface of this name is there that this gateway did not "
        f"make, and it is left as it is: {found}. Choose another name in {variable}{ways}"
    )


def is_marked(alias: str) -> bool:
    """Whether a gateway has made the interface, this one or another."""
    return alias == MARK or alias.startswith(f"{MARK} ")


def uapi_path(kind: str, name: str) -> str:
    return f"{UAPI_DIRECTORIES[kind]}/{name}.sock"


def read_link(kind: str, found: FoundLink) -> Reading:
    """Read an interface that no backend has open: O(peers). Raises BackendError."""
    if found.kind == USERSPACE_KIND:
        with contextlib.closing(UapiConnection(uapi_path(kind, found.name))) as connection:
            return read_uapi_device(connection.exchange(b"get=1\n\n"))
    with contextlib.closing(NetlinkSocket(NETLINK_GENERIC)) as netlink:
        family = genl_family(netlink, found.kind)
        if family is None:
            raise _no_module(found.name, kind)
        head = nl_attribute(WGDEVICE_A_IFINDEX, struct.pack("=I", found.ifindex))
        command = genl(WG_CMD_GET_DEVICE, family.version, head)
        return read_wg_device(netlink.dump(family.id, command, whole=True), family)


def links_to_remove(
    mark: str, names: Container[str], recognise: Recognise
) -> tuple[list[FoundLink], list[FoundLink]]:
    """This gateway's interfaces, and others that look similar. Raises BackendError.

    The interfaces of the first list carry the mark, whatever the settings say now, or they have one
    of `names` and are recognised. Those of the second list have one of `names` or another gateway's
    mark; they must not be removed.
    """
    with contextlib.closing(Route()) as route:
        links = route.links()
    ours, others = [], []
    for found in links:
        if found.kind not in (*PRODUCTS, USERSPACE_KIND):
            continue
        if found.alias == mark or (
            found.name in names and not is_marked(found.alias) and _recognised(found, recognise)
        ):
            ours.append(found)
        elif found.name in names or is_marked(found.alias):
            others.append(found)
    return ours, others


def kinds_of(found: FoundLink) -> list[str]:
    """The kinds of interface that a link is: more than one if two programs answer for it."""
    if found.kind != USERSPACE_KIND:
        return [kind for kind in PRODUCTS if kind == found.kind]
    return [kind for kind in PRODUCTS if uapi_answers(uapi_path(kind, found.name))]


def _recognised(found: FoundLink, recognise: Recognise) -> bool:
    """Whether `recognise` knows the interface. One that cannot be read is not ours."""
    for kind in kinds_of(found):
        with contextlib.suppress(BackendError, StartError, OSError):
            if recognise(read_link(kind, found)):
                return True
    return False


class MemoryBackend:
    """An interface in memory, for writing API clients. It passes no packets."""

    kind = "memory"

    def __init__(self) -> None:
        self._peers: dict[bytes, WirePeer] = {}

    def setup(self, link: Link | None = None, make: bool = True) -> None:
        pass

    def alive(self) -> bool:
        return True

    def read(self, known: Container[int]) -> Reading:
        states = [PeerState(peer, 0, 0, 0) for peer in tuple(self._peers.values())]
        return read_peers(None, states, lambda state: state, known)

    def apply(self, changes: Sequence[Change]) -> None:
        for public_key, peer in changes:
            self._peers.pop(public_key, None)
            if peer is not None:
                self._peers[public_key] = peer

    def close(self) -> None:
        pass


# For each kind of interface the program that provides it where the kernel does not.
PROGRAMS = {WG_GENL_NAME: "wireguard-go", AWG_GENL_NAME: "amneziawg-go"}


def open_backend(mode: str, link: Link) -> Backend:
    """The backend that WG_BACKEND names, set up. Raises BackendError.

    `auto` takes the first that is available: an existing interface, the kernel, a running userspace
    WireGuard, wireguard-go (or amneziawg-go) if it is installed.
    """
    if mode == "memory":
        return MemoryBackend()
    failures: list[str] = []
    for kind in ("netlink", "uapi") if mode == "auto" else (mode,):
        backend: NetlinkBackend | UapiBackend
        if kind == "netlink":
            backend = NetlinkBackend(link)
        else:
            backend = UapiBackend(link, shutil.which(PROGRAMS[link.kind]))
        try:
            backend.setup()
            return backend
        except BackendError as error:
            backend.close()
            if isinstance(error, ParametersRefused) and mode == "auto" and kind == "netlink":
                offer = "with WG_BACKEND=uapi, the gateway uses amneziawg-go instead of the kernel"
                raise ParametersRefused(f"{error}; {offer}") from None
            if isinstance(error, ForeignError | ParametersRefused):
                raise
            failures.append(str(error))
    raise BackendError("; ".join(failures))


# ==================================================================================================
# host network: what the host needs around the interfaces: forwarding, our own nftables tables, and
# rules in ufw if ufw is active. Every step is idempotent; nothing of anybody else's is changed,
# except that forwarding stays on, with accept_ra = 2 where it was 1.
#
# ClassTable has the rules of the service classes. ClassedBackend wraps an interface's backend and
# puts the addresses of its peers into the sets of their classes.
#
# Host reads what is there. FIT and NETWORK, at the end, are the tables of checks that use it.
# Never here: policy.
# ==================================================================================================

TABLE = "inet wggw"
CLASS_TABLE = "inet wggw_classes"
UFW_MARK = "wggw"  # the comment on our rules in ufw
TRANSLATED: tuple[IPv4or6Network, ...] = tuple(  # RFC 1918, 6598, 4193: not routed on the internet
    ipaddress.ip_network(text)
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")
)
HOST_TOOL_SECONDS = 60  # seconds that nft and ufw may take


class Finding(NamedTuple):
    """The result of one check. `todo` is empty if all is well.

    `refuses` is the error with which the gateway refuses to start, None if it starts nevertheless.
    After a StartError systemd tries again: the fault may vanish without a change of settings.
    """

    subject: str
    found: str
    todo: str = ""
    failed: bool = False
    refuses: type[StartError] | None = None

    def __str__(self) -> str:
        return f"{self.subject}: {self.found}: {self.todo}"


def is_translated(subnet: IPv4or6Network) -> bool:
    """Whether a subnet needs NAT. Global addresses must not be translated."""
    return any(
        subnet.version == other.version and subnet.subnet_of(other)  # type: ignore[arg-type]
        for other in TRANSLATED
    )


# nft's words by IP version: for an address of that version, and for its protocol and type.
NFT_FAMILIES = {4: ("ip", "ipv4"), 6: ("ip6", "ipv6")}
# What counts as one caller of LIMIT_SSH: in IPv6 a /64, because one customer has at least that.
LIMITED = {4: "ip saddr", 6: "ip6 saddr & ffff:ffff:ffff:ffff::"}


def _nft_set(items: Iterable[object]) -> str:
    return "{ " + ", ".join(map(str, items)) + " }"


def _all_but(networks: Iterable[IPv4or6Network], side: str, version: int) -> str | None:
    """nft's match of the addresses of one IP version outside of `networks`; None if all are inside.

    nft refuses a set with overlaps.
    """
    mine = [network for network in networks if network.version == version]
    if any(network.prefixlen == 0 for network in mine):
        return None
    collapsed = ipaddress.collapse_addresses(mine)  # type: ignore[type-var]
    return f"{NFT_FAMILIES[version][0]} {side} != {_nft_set(collapsed)}" if mine else ""


def _input_rules(config: Config) -> Iterator[str]:
    """Who may connect to the API, and how often to the port of LIMIT_SSH.

    Each caller has a token bucket of six connections in its set's element. It is practically never
    refilled (once a day), but the element expires after thirty seconds.
    """
    sources = api_sources(config)
    for version, (_, protocol) in NFT_FAMILIES.items():
        others = f'iifname != "lo" meta nfproto {protocol}'
        if config.limit_ssh:
            yield (
                f"{others} tcp dport {config.limit_ssh} ct state new add @callers{version} "
                f"{{ {LIMITED[version]} limit rate over 1/day burst 6 packets }} drop"
            )
        outside = _all_but(sources, "saddr", version) if sources else None
        if outside is not None:
            yield f"{others} {outside} tcp dport {config.api_port} drop"


def render_ruleset(
    config: Config, tunnels: Sequence[InterfaceSettings], uplinks: Sequence[str] = ()
) -> str:
    """The text for `nft -f -` that replaces our table, or makes it."""
    names = _nft_set(f'"{tunnel.name}"' for tunnel in tunnels)
    outside = _nft_set(['"lo"', *(f'"{tunnel.name}"' for tunnel in tunnels)])
    # Only packets from outside are redirected: a resolver for the host's other networks keeps 53.
    from_outside = _nft_set(f'"{name}"' for name in uplinks) if uplinks else f"!= {outside}"
    clamp = "tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu"
    chains: dict[str, list[str]] = {
        "prerouting { type nat hook prerouting priority dstnat; policy accept;": [
            f"iifname {from_outside} fib daddr type local "
            f"udp dport {_nft_set(dict.fromkeys(tunnel.ports[1:]))} redirect to :{tunnel.ports[0]}"
            for tunnel in tunnels
            if tunnel.ports[1:]
        ],
        "input { type filter hook input priority filter; policy accept;": [
            f"iifname {names} tcp dport {config.api_port} drop",
            *_input_rules(config),
        ],
        "forward { type filter hook forward priority filter; policy accept;": [
            *([f"iifname {names} oifname {names} drop"] if config.wg_isolate else []),
            # Clients must not reach link-local services such as a cloud's metadata service. In IPv6
            # Amazon's and Google's metadata services are not link-local, but unique local.
            f"iifname {names} ip daddr 169.254.0.0/16 drop",
            f"iifname {names} ip6 daddr {{ fe80::/10, fd00:ec2::254, fd20:ce::254 }} drop",
            f"iifname {names} {clamp}",
            f"oifname {names} {clamp}",
            f"iifname {names} accept",
            f"oifname {names} ct state new drop",  # packets from tunnels were accepted above
        ],
        "postrouting { type nat hook postrouting priority srcnat; policy accept;": [
            f"{NFT_FAMILIES[subnet.version][0]} saddr {subnet} oifname != {outside} masquerade"
            for tunnel in tunnels
            for subnet in tunnel.subnets.values()
            if is_translated(subnet)
        ],
    }
    limited = "flags dynamic,timeout; size 65536; timeout 30s;"
    callers = [
        f"set callers{version} {{ type {protocol}_addr; {limited} }}"
        for version, (_, protocol) in NFT_FAMILIES.items()
        if config.limit_ssh
    ]
    remove = f"table {TABLE}\ndelete table {TABLE}\n"
    return remove + _render_table(TABLE, tunnels[0].mark, callers, chains)


def _render_table(
    name: str, mark: str, objects: Sequence[str], chains: Mapping[str, Sequence[str]]
) -> str:
    lines = [f"table {name} {{", f"  {table_comment(mark)};", *(f"  {each}" for each in objects)]
    for head, rules in chains.items():
        lines += [f"  chain {head}", *(f"    {rule}" for rule in rules), "  }"]
    return "\n".join([*lines, "}", ""])


def count_rules(text: str) -> int:
    return text.count("\n    ")  # see _render_table()


def run_tool(*command: str, given: str = "") -> str:
    """Run a program of the host and return its output. Raises BackendError with its message."""
    try:
        done = subprocess.run(  # noqa: S603  # no shell; arguments are constants and parsed settings
            command,
            input=given,
            capture_output=True,
            encoding="utf-8",
            errors="replace",  # others may have written comments into what it shows
            timeout=HOST_TOOL_SECONDS,
            check=False,
            env={"PATH": TOOL_PATH, "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendError(f"{command[0]}: {_reason(error)}") from None
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise BackendError(f"{' '.join(command[:2])}: status {done.returncode}: {words[0]}")
    return done.stdout


def table_comment(mark: str) -> str:
    """The words in nft that put a gateway's mark on its table, or a hash of a mark that cannot be
    there: nft allows 128 bytes, and no quotation marks."""
    if '"' in mark or len(os.fsencode(mark)) > 128:
        mark = f"{MARK} {hashlib.sha256(os.fsencode(mark)).hexdigest()}"
    return f'comment "{mark}"'


def replace_table(name: str, text: str, mark: str) -> bool:
    """Give nft the text that makes our table; returns whether it changed. Raises BackendError,
    also if the table is another gateway's."""
    tables = {table: current_table(table) for table in (TABLE, CLASS_TABLE)}
    for table, rules in tables.items():
        if other := other_gateway(rules, mark):
            raise BackendError(
                f"table {table} belongs to the gateway of interfaces with the mark {other!r}: run "
                "this gateway in another network namespace, or `wggw net down` for the other one"
            )
    run_tool("nft", "-f", "-", given=text)
    return current_table(name) != tables[name]


def current_table(name: str = TABLE) -> str:
    """Our table as nft prints it, without its sets' elements; empty if there is none.

    Raises BackendError.
    """
    try:
        return run_tool("nft", "-s", "-t", "list", "table", *name.split())
    except BackendError as error:
        if "No such file or directory" in str(error) and tool("nft"):
            return ""
        raise


def tool(name: str) -> str | None:
    """The path of a program of the host, None if it is not installed."""
    return shutil.which(name, path=TOOL_PATH)


# --- service classes -----------------------------------------------------------------------------
#
# nftables enforces what a customer bought. Our second table has, for each class and family, a set
# of the tunnel addresses in the class, and rules that look up a packet's tunnel address in it: one
# lookup per class, however many peers there are. A rule that limits a rate keeps a token bucket for
# each address in another set, which the kernel fills and empties.
#
# `net up` or the start of the service makes the rules with `nft -f` and leaves existing members in
# their sets. Afterwards the service changes only the members, over nfnetlink: one element per peer
# and family. A verdict map would need one lookup for all classes, but whenever an element is added,
# the kernel checks the whole map for loops (3.4 ms at 60,000 elements).


# A byte bucket of nftables holds at least one second of its rate. The rate is 95.4 % of the
# class's, so that no ten seconds carry more than 105 %. A TCP flow gets 91 % or more as payload.
CLASS_SHARE = 954  # thousandths
CLASS_BATCH = 32 * 1024  # bytes of elements in one message
CLASS_RETRY = 10.0  # seconds between two tries to make rules while no active peer has a class
_CLASS_TABLE_NAME = CLASS_TABLE.split()[1].encode("ascii") + b"\0"
CLASS_COUNTERS = ("down", "up", "refused")  # refused: packets to other destinations


class Member(NamedTuple):
    """An element of a class's set: the class and a packed tunnel address."""

    name: str
    address: bytes

    def __repr__(self) -> str:  # hides the client's address
        return f"Member({self.name})"


def render_classes(
    classes: Mapping[str, ServiceClass], tunnels: Sequence[InterfaceSettings]
) -> str:
    """The text for `nft -f -` that replaces the rules and keeps the members of the classes, or
    removes the table if there are no classes.

    The token buckets are emptied: an existing one would keep its former rate.
    """
    table = CLASS_TABLE
    if not classes:
        return f"add table {table}\ndelete table {table}\n"
    names = _nft_set(f'"{tunnel.name}"' for tunnel in tunnels)
    objects: list[str] = []
    rules: list[str] = []
    emptied: list[str] = []
    for name, limits in classes.items():
        objects += [f"counter {name}.{what} {{ }}" for what in CLASS_COUNTERS]
        for version, (word, protocol) in NFT_FAMILIES.items():
            members, kind = f"{name}.{version}", f"type {protocol}_addr; size 131072;"
            objects.append(f"set {members} {{ {kind} }}")
            outside = _all_but(limits.destinations or (), "daddr", version)
            if limits.destinations is not None and outside is not None:
                sent = f"iifname {names} {word} saddr @{members}"
                rules.append(f"{sent} {outside} counter name {name}.refused drop")
            for side, way, address, rate in (
                ("up", "iifname", f"{word} saddr", limits.up),
                ("down", "oifname", f"{word} daddr", limits.down),
            ):
                if rate is not None:
                    bucket, per_second = f"{name}.{side}.{version}", rate * CLASS_SHARE // 1000
                    objects.append(f"set {bucket} {{ {kind} flags dynamic,timeout; timeout 1m; }}")
                    emptied.append(f"flush set {table} {bucket}\n")
                    rules.append(
                        f"{way} {names} {address} @{members} update @{bucket} {{ {address} limit "
                        f"rate over {per_second} bytes/second }} counter name {name}.{side} drop"
                    )
    mark = tunnels[0].mark
    flush = f"add table {table} {{ {table_comment(mark)}; }}\nflush table {table}\n"
    chains = {"forward { type filter hook forward priority filter - 5; policy accept;": rules}
    return "".join([flush, _render_table(table, mark, objects, chains), *emptied])


def encode_members(members: Iterable[Member]) -> Iterator[bytes]:
    """Payloads of NFT_MSG_NEWSETELEM and NFT_MSG_DELSETELEM, of CLASS_BATCH bytes at most."""
    sets: dict[str, list[bytes]] = {}
    for name, address in members:
        value = nl_attribute(NFTA_DATA_VALUE, address)
        key = nl_attribute(NLA_F_NESTED | NFTA_SET_ELEM_KEY, value)
        element = nl_attribute(NLA_F_NESTED | NFTA_LIST_ELEM, key)
        sets.setdefault(f"{name}.{4 if len(address) == 4 else 6}", []).append(element)
    for name, elements in sets.items():
        step = CLASS_BATCH // len(elements[0])
        for at in range(0, len(elements), step):
            listed = b"".join(elements[at : at + step])
            yield _set_head(name) + nl_attribute(NLA_F_NESTED | NFTA_SET_ELEM_LIST_ELEMENTS, listed)


def _set_head(name: str) -> bytes:
    return (
        nfgenmsg(NFPROTO_INET)
        + nl_attribute(NFTA_SET_ELEM_LIST_TABLE, _CLASS_TABLE_NAME)
        + nl_attribute(NFTA_SET_ELEM_LIST_SET, name.encode("ascii") + b"\0")
    )


def decode_members(payloads: Iterable[bytes], name: str) -> Iterator[Member]:
    """The members of a class in NFT_MSG_GETSETELEM's answer for one set. Raises CodecError."""
    for payload in payloads:
        listed = dict(parse_nl_attributes(payload[4:])).get(NFTA_SET_ELEM_LIST_ELEMENTS, b"")
        for _, element in parse_nl_attributes(listed):
            key = dict(parse_nl_attributes(element)).get(NFTA_SET_ELEM_KEY, b"")
            address = dict(parse_nl_attributes(key)).get(NFTA_DATA_VALUE, b"")
            if len(address) not in (4, 16):
                raise CodecError(f"nftables: a member of {name} of {len(address)} bytes")
            yield Member(name, address)


def decode_counters(payloads: Iterable[bytes]) -> Iterator[tuple[str, int]]:
    """(name, bytes) of each named counter in NFT_MSG_GETOBJ's answer. Raises CodecError."""
    for payload in payloads:
        found = dict(parse_nl_attributes(payload[4:]))
        name = found.get(NFTA_OBJ_NAME, b"").rstrip(b"\0").decode("ascii", "replace")
        data = dict(parse_nl_attributes(found.get(NFTA_OBJ_DATA, b"")))
        value = _exactly(data.get(NFTA_COUNTER_BYTES, b""), 8, "counter")
        yield name, int.from_bytes(value, "big")


class ClassTable:
    """The table of the service classes in this network namespace. Any thread may call it.

    `failure` says why the classes are not in force; it is "" if they are. `dropped` has the dropped
    bytes by counter, and `addresses` the number of members of each class at the last reading. The
    lock is held while rules are made.
    """

    def __init__(
        self, classes: Mapping[str, ServiceClass], tunnels: Sequence[InterfaceSettings]
    ) -> None:
        self._tunnels = tunnels
        self._classes = classes
        self._text = render_classes(classes, tunnels)
        self.failure = ""
        self._making = threading.RLock()
        self._next_try = 0.0  # when retry() tries again (monotonic)
        self._shape: list[Any] = []  # see _read_shape(); empty: nobody has looked at these rules
        self.dropped: Mapping[str, int] = {}
        self.addresses: collections.Counter[str] = collections.Counter()

    def change(self, classes: Mapping[str, ServiceClass]) -> None:
        """Put other classes in force. Raises BackendError; then the former ones stay in force."""
        text = render_classes(classes, self._tunnels)
        with self._making:
            replace_table(CLASS_TABLE, text, self._tunnels[0].mark)
            self._classes, self._text, self.failure, self._shape = classes, text, "", []

    def set_up(self) -> None:
        """Make the rules unless they exist, or remove those of former classes if there are none
        now; otherwise `failure` says why that was impossible."""
        with self._making:
            before = self.failure
            try:
                if not self.alive():
                    self.change(self._classes)
                self.failure = ""
            except BackendError as error:
                self.failure = str(error)
            self._next_try = time.monotonic() + CLASS_RETRY
            if self.failure and self.failure != before:
                LOG.error("%s", self.fault)
            elif before and not self.failure:
                LOG.info("service classes are in force")

    @property
    def fault(self) -> str:
        """What `failure` means for peers; "" if nothing failed."""
        words = "service classes are not in force, peers with a class are refused"
        if not self._classes:
            words = "the rules of former service classes stay in force"
        return f"{words}: {self.failure}" if self.failure else ""

    def retry(self) -> None:
        """Try to make rules that failed, now and then."""
        if self.failure and time.monotonic() >= self._next_try:
            self.set_up()

    def alive(self) -> bool:
        """Whether exactly the rules of the classes exist, as they were at the first look at them;
        it also reads what they dropped.

        Raises BackendError.
        """
        table = nl_attribute(NFTA_OBJ_TABLE, _CLASS_TABLE_NAME)  # and NFTA_RULE_TABLE
        try:
            rules = self._dump(NFT_MSG_GETRULE, nfgenmsg(NFPROTO_INET) + table)
            counter = nl_attribute(NFTA_OBJ_TYPE, struct.pack(">I", NFT_OBJECT_COUNTER))
            counters = self._dump(NFT_MSG_GETOBJ, nfgenmsg(NFPROTO_INET) + table + counter)
            shape = self._read_shape(rules) if self._classes else []
        except BackendError as error:
            if not self._classes:
                return True  # a kernel without nftables has no rules
            if isinstance(error, NetlinkError) and error.errno == errno.ENOENT:
                return False
            raise
        self.dropped = dict(decode_counters(counters))
        counters_needed = len(CLASS_COUNTERS) * len(self._classes)
        enough_counters = len(self.dropped) >= counters_needed if self._classes else not counters
        if len(rules) != count_rules(self._text) or not enough_counters:
            return False
        self._shape = self._shape or shape
        return shape == self._shape

    def _read_shape(self, rules: Sequence[bytes]) -> list[Any]:
        """What somebody could alter in our table without changing the number of rules: the rules,
        the table itself, its chains and the number of its sets. Handles are left out, because
        `net up` changes them."""
        table = nl_attribute(NFTA_OBJ_TABLE, _CLASS_TABLE_NAME)  # and NFTA_SET_TABLE
        shape: list[Any] = [len(self._dump(NFT_MSG_GETSET, nfgenmsg(NFPROTO_INET) + table))]
        for payload in rules:
            attributes = list(parse_nl_attributes(payload[4:]))  # before: the last change's number
            handles = (NFTA_RULE_HANDLE, NFTA_RULE_POSITION)
            shape.append([a for a in attributes if a[0] not in handles])
        messages = ((NFT_MSG_GETTABLE, NFTA_TABLE_HANDLE), (NFT_MSG_GETCHAIN, NFTA_CHAIN_HANDLE))
        for kind, handle in messages:
            for payload in self._dump(kind, nfgenmsg(NFPROTO_INET)):
                attributes = list(parse_nl_attributes(payload[4:]))
                if (NFTA_OBJ_TABLE, _CLASS_TABLE_NAME) in attributes:  # the table's name
                    shape.append([a for a in attributes if a[0] != handle])
        return shape

    def add(self, members: Collection[Member]) -> None:
        """Existing members stay. Raises BackendError; some may have been added then."""
        if members and self.failure:
            raise BackendError(f"service classes are not in force: {self.failure}")
        for payload in encode_members(members):
            self._netlink.change_nftables(NFT_MSG_NEWSETELEM, NLM_F_CREATE, payload)

    def remove(self, members: Sequence[Member]) -> None:
        """Missing members are ignored. Raises BackendError; some may have been removed then."""
        for payload in encode_members(members):
            try:
                self._netlink.change_nftables(NFT_MSG_DELSETELEM, 0, payload)
            except NetlinkError as error:
                if error.errno != errno.ENOENT:
                    raise
                if len(members) > 1:  # one is missing, so the kernel has removed none
                    for member in members:
                        self.remove([member])
                    return

    def read(self) -> set[Member]:
        """All members: O(members). Raises BackendError."""
        found: set[Member] = set()
        for name in () if self.failure else self._classes:
            for version in NFT_FAMILIES:
                try:
                    answer = self._dump(NFT_MSG_GETSETELEM, _set_head(f"{name}.{version}"))
                except NetlinkError as error:
                    if error.errno != errno.ENOENT:
                        raise
                    continue  # the table is gone, which alive() reports
                found.update(decode_members(answer, name))
        self.addresses = collections.Counter(member.name for member in found)
        return found

    @functools.cached_property
    def _netlink(self) -> NetlinkSocket:
        return NetlinkSocket(NETLINK_NETFILTER, "nftables: ")

    def _dump(self, message: int, payload: bytes) -> list[bytes]:
        return self._netlink.dump(NFNL_SUBSYS_NFTABLES << 8 | message, payload, whole=True)

    def close(self) -> None:
        if "_netlink" in vars(self):
            self._netlink.close()


class ClassedBackend:
    """An interface, together with the classes of its peers in nftables.

    A class belongs to a peer like its allowed IPs: apply() sets it, read() returns it, reconcile()
    repairs what somebody else changed. A limit is in force before its peer is on the interface, and
    ends after the peer has left it. While the table failed, peers with a class leave the interface.

    `_held` has, by public key, the members of the interface's peers, and `_strays` what else may be
    in the sets. The lock is held during a change, and while the sets are read.
    """

    def __init__(self, inner: Backend, table: ClassTable, subnets: Sequence[IPv4or6Network]):
        self.kind = inner.kind
        self._inner = inner
        self._table = table
        self._ranges = [(s.network_address.packed, s.broadcast_address.packed) for s in subnets]
        self._lock = threading.Lock()
        self._held: dict[bytes, set[Member]] = {}
        self._strays: set[Member] = set()
        self._changes = 0  # how many apply() has made or given up

    def setup(self, link: Link | None = None, make: bool = True) -> None:
        self._inner.setup(link, make)
        self._table.set_up()

    def alive(self) -> bool:
        self._table.retry()  # apply() finds failed rules only when a peer has a class
        return self._inner.alive() and (bool(self._table.failure) or self._table.alive())

    def apply(self, changes: Sequence[Change]) -> None:
        after = {key: members_of(peer) for key, peer in changes}
        wanted = set().union(*after.values())
        with self._lock:
            self._changes += 1
            before = set().union(*(self._held.get(key, set()) for key in after))
            new = wanted if self._table.failure else wanted - before
            try:
                self._table.add(new)
                self._inner.apply(changes)
            except BackendError:
                with contextlib.suppress(BackendError):
                    self._remove(new)
                if self._table.failure:  # nothing limits peers with a class: apply the others
                    kept = [Change(key, None if after[key] else peer) for key, peer in changes]
                    self._inner.apply(kept)
                    for key in after:
                        self._held.pop(key, None)
                raise
            for key, members in after.items():
                self._held.pop(key, None)
                if members:
                    self._held[key] = members
            self._strays -= wanted
            self._remove((before | self._strays) - wanted)

    def _remove(self, gone: set[Member]) -> None:
        """Remove members that no peer has; those that cannot be removed are strays."""
        self._strays |= gone
        self._table.remove(list(gone))
        self._strays -= gone

    def read(self, known: Container[int]) -> Reading:
        with self._lock:
            number = self._changes
            there = {member for member in self._table.read() if self._is_ours(member.address)}
            expected = set().union(*self._held.values())
        if not there and not expected:
            return self._inner.read(known)
        reading = self._inner.read(known if there == expected else ())
        classes = {member.address: member.name for member in there}
        changed = [
            (mark, state._replace(peer=_with_class(state.peer, classes)))
            for mark, state in reading.changed
        ]
        with self._lock:
            if there != expected and number == self._changes:  # trust the sets: others changed them
                pairs = ((s.peer.public_key, members_of(s.peer) & there) for _, s in changed)
                self._held = {key: members for key, members in pairs if members}
                self._strays = there.difference(*self._held.values())
        return reading._replace(changed=changed)

    def _is_ours(self, address: bytes) -> bool:
        """Whether an address is in the interface's subnets; each class has one set for all."""
        return any(
            len(address) == len(first) and first <= address <= last for first, last in self._ranges
        )

    def close(self) -> None:
        self._inner.close()


def members_of(peer: WirePeer | None) -> set[Member]:
    if peer is None or not peer.service_class:
        return set()
    return {Member(peer.service_class, network[:-1]) for network in peer.allowed_ips}


def _with_class(peer: WirePeer, classes: Mapping[bytes, str]) -> WirePeer:
    """The peer with the class of its addresses; "?" if these are in different classes."""
    found = {classes.get(network[:-1], "") for network in peer.allowed_ips}
    name = "?" if len(found) > 1 else next(iter(found), "")
    return peer._replace(service_class=name)


# --- forwarding -----------------------------------------------------------------------------------

FORWARDING = {"ipv4": "net/ipv4/ip_forward", "ipv6": "net/ipv6/conf/all/forwarding"}


def read_sysctl(name: str) -> str | None:
    """A value under /proc/sys, None if the kernel does not have it."""
    try:
        return Path("/proc/sys", name).read_text("ascii").strip()
    except OSError:
        return None


def write_sysctl(name: str, value: str) -> None:
    try:
        Path("/proc/sys", name).write_text(value, "ascii")
    except OSError as error:
        way = f": start the container with --sysctl {name.replace('/', '.')}={value}"
        text = f"{name} cannot be set to {value}: {_reason(error)}"
        raise BackendError(text + way * (error.errno == errno.EROFS)) from None


def read_forwarding(tunnels: Sequence[InterfaceSettings]) -> Iterator[tuple[str, bool]]:
    """The settings of the tunnels' families that the kernel supports, and whether each is on."""
    for family in FAMILIES:
        value = read_sysctl(FORWARDING[family])
        if value is not None and any(family in tunnel.subnets for tunnel in tunnels):
            yield FORWARDING[family], value == "1"


def turn_on_forwarding(tunnels: Sequence[InterfaceSettings]) -> Iterator[str]:
    """Yields each change that it made. Raises BackendError.

    A host that forwards ignores router advertisements, and loses its own default route, where
    accept_ra is 1 (Documentation/networking/ip-sysctl.rst): there it becomes 2.
    """
    for forwarding, is_on in read_forwarding(tunnels):
        if is_on:
            continue
        if forwarding == FORWARDING["ipv6"]:
            ours = {"lo", "all", *(tunnel.name for tunnel in tunnels)}
            for interface in sorted({*os.listdir("/proc/sys/net/ipv6/conf")} - ours):
                name = f"net/ipv6/conf/{interface}/accept_ra"
                if read_sysctl(name) == "1":
                    write_sysctl(name, "2")
                    yield f"{name} = 2"
        write_sysctl(forwarding, "1")
        yield f"{forwarding} = 1"


# --- ufw ------------------------------------------------------------------------------------------


def ufw_rules(config: Config, tunnels: Sequence[InterfaceSettings]) -> list[str]:
    """The rules, in ufw's words, with which ufw lets through what our table lets through."""
    port, sources = config.api_port, api_sources(config)
    if any(network.prefixlen == 0 for network in sources):
        sources = ()  # ufw has no word for a network of all addresses
    api = [
        f"allow from {network.network_address if network.num_addresses == 1 else network} "
        f"to any port {port} proto tcp"
        for network in sources
    ]
    return [
        *(f"allow {tunnel.ports[0]}/udp" for tunnel in tunnels),
        *(api or [f"allow {port}/tcp"]),
        *(f"route allow in on {tunnel.name}" for tunnel in tunnels),
    ]


# What ufw replaces when a new rule is the same as an old one in all else.
UFW_REPLACED = re.compile(r"\b(?:allow|deny|reject|limit)\b|\blog(?:-all)?\b| comment '.*'$")


def compare_ufw(shown: str, wanted: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """The rules that `ufw show added` lacks, those of ours in it that are not wanted, and those of
    somebody else in the place of a wanted one that do not let everything through.

    A wanted rule whose place somebody else's has is not lacking: adding it would replace theirs.
    """

    def place(rule: str) -> list[str]:
        return UFW_REPLACED.sub("", rule).split()

    mark = f" comment '{UFW_MARK}'"
    lines = [line.removeprefix("ufw ") for line in shown.splitlines() if line.startswith("ufw ")]
    ours = [line.removesuffix(mark) for line in lines if line.endswith(mark)]
    places = [place(rule) for rule in wanted if rule not in ours]
    theirs = [line for line in lines if not line.endswith(mark) and place(line) in places]
    taken = [place(line) for line in theirs]
    missing = [rule for rule in wanted if rule not in ours and place(rule) not in taken]
    against = [line for line in theirs if not re.match(r"(?:route )?allow ", line)]
    return missing, [rule for rule in ours if rule not in wanted], against


def align_ufw(shown: str, wanted: Sequence[str]) -> Iterator[str]:
    """Add the rules that are missing, and then remove those of ours that are not wanted.

    A rule that somebody else has made stays theirs. Yields each change, and what stays. Raises
    BackendError.
    """
    missing, surplus, against = compare_ufw(shown, wanted)
    for rule in missing:
        try:
            run_tool("ufw", *rule.split(), "comment", UFW_MARK)
            yield f"ufw: {rule}"
        except BackendError as error:
            if "IPv6 support not enabled" not in str(error):
                raise
            todo = "set IPV6=yes in /etc/default/ufw, run `ufw reload` and `wggw net up`"
            yield f"ufw: {rule}: not added, because ufw drops all IPv6: {todo}"
    for rule in surplus:
        before, _, words = rule.rpartition("allow ")
        run_tool("ufw", *f"{before}delete allow {words}".split())
        yield f"ufw: {rule}: removed"
    for rule in against:
        yield f"ufw: {rule}: stays, because somebody else made it; it is against the gateway"


# --- facts ----------------------------------------------------------------------------------------


class Host:
    """The settings, the stored peers, and what is on this host: all that a check goes by.

    A fact is read from the kernel when it is first needed, and kept. Reading raises BackendError.
    """

    def __init__(self, config: Config, store: Store) -> None:
        self.config, self.store = config, store
        self.tunnels = interface_settings(config)
        self.mark = self.tunnels[0].mark
        self.is_real = config.wg_backend != "memory"

    @functools.cached_property
    def links(self) -> list[FoundLink]:
        with contextlib.closing(Route()) as route:
            return route.links()

    @functools.cached_property
    def routes(self) -> list[HostRoute]:
        with contextlib.closing(Route()) as route:
            return route.routes()

    @functools.cached_property
    def is_served(self) -> bool:
        """Whether a gateway runs for these interfaces, in any process."""
        return is_served(self.tunnels[0].name)

    @functools.cached_property
    def ufw(self) -> str | None:
        """What `ufw show added` prints, None unless ufw is active."""
        is_active = tool("ufw") and "Status: active" in run_tool("ufw", "status")
        return run_tool("ufw", "show", "added") if is_active else None

    @property
    def start(self) -> str:
        """The advice to start the gateway, or to start it again if it runs."""
        word = "restart" if self.is_served else "start"
        return f"{word} the gateway: systemctl {word} wggw"

    def networks(self) -> list[tuple[IPv4or6Network, str]]:
        """Networks of the host, and the interface of each, without default routes.

        A route for half of all addresses is a default route, too: VPN clients set such a pair.
        """
        names = {link.ifindex: link.name for link in self.links}
        ours = {link.ifindex for link in self.links if link.alias == self.mark}
        return [
            (route.network, names.get(route.ifindex, "a route"))
            for route in self.routes
            if route.ifindex not in ours and route.network.prefixlen > 1
        ]

    def uplinks(self) -> list[FoundLink]:
        """The links of the host's default routes, where packets from outside arrive.

        The list is empty if the host has no default route (yet), or one through several links,
        which it does not name.
        """
        leading = {route.ifindex for route in self.routes if route.network.prefixlen == 0}
        return [
            link
            for link in self.links
            if link.ifindex in leading
            and 0 not in leading
            and link.alias != self.mark
            and re.fullmatch(r"[A-Za-z0-9_.:@-]+", link.name)
        ]


def lock_name(interface: str) -> str:
    """The abstract socket that the gateway of an interface holds."""
    return f"wggw interface {interface}"


def is_served(interface: str) -> bool:
    """Whether a gateway runs with this as its first interface: see lock_interface()."""
    names = Path("/proc/thread-self/net/unix").read_text("utf-8", "replace").splitlines()
    return any(line.endswith(f"@{lock_name(interface)}") for line in names)


class HeldPort(NamedTuple):
    """A socket with a port: the address to which it is bound, and its inode."""

    address: ipaddress.IPv4Address | ipaddress.IPv6Address
    inode: str

    def holder(self) -> tuple[int, str]:
        """The id of the process that has it, and a description; id 0 if no process is visible."""
        for path in glob.iglob("/proc/[0-9]*/fd/*"):
            with contextlib.suppress(OSError):
                if os.readlink(path) == f"socket:[{self.inode}]":
                    pid = path.split("/")[2]
                    name = Path(f"/proc/{pid}/comm").read_text("utf-8", "replace").strip()
                    return int(pid), f"{name} (process {pid})"
        return 0, "something that is not a visible process, such as a kernel interface"


def held_ports(protocol: str, port: int) -> list[HeldPort]:
    """Sockets in this network namespace that use a UDP port, or listen on a TCP port."""
    found = []
    for name in (protocol, f"{protocol}6"):
        try:
            lines = Path(f"/proc/thread-self/net/{name}").read_text("ascii").splitlines()[1:]
        except OSError:  # a kernel without IPv6
            continue
        for words in map(str.split, lines):
            host, _, number = words[1].partition(":")
            if int(number, 16) == port and (protocol == "udp" or words[3] == "0A"):
                parts = (int(host[at : at + 8], 16) for at in range(0, len(host), 8))
                packed = b"".join(struct.pack("=I", part) for part in parts)
                found.append(HeldPort(ipaddress.ip_address(packed), words[9]))
    return found


class ForeignChain(NamedTuple):
    """Another program's chain that our packets pass. Its rules are not interpreted.

    `shown_by` is the command that prints it. Of chains for NAT, only the policy counts: filter
    rules do not belong there.
    """

    name: str
    drops: bool  # its policy is to drop
    rules: Sequence[str]
    shown_by: str

    @property
    def is_ufw(self) -> bool:
        """Whether all of its rules lead to chains of ufw, which _look_at_ufw() checks."""
        leads = (re.search(r"(?:^| )(?:jump|-j) ufw[\w-]*$", rule) for rule in self.rules)
        return bool(self.rules) and all(leads)


def foreign_chains(ruleset: str, hook: str) -> Iterator[ForeignChain]:
    """Other programs' chains at a hook, from `nft -s -t list ruleset`: in JSON, nft 1.0.6 garbles
    tables that are dormant, which see no packet."""
    for text in re.split(r"^(?=table )", ruleset, flags=re.MULTILINE):
        head, *chains = re.split(r"^\tchain ", text, flags=re.MULTILINE)
        found = re.match(r"table ((?:ip|ip6|inet) \S+)", head)
        if not found or found[1] in (TABLE, CLASS_TABLE):
            continue
        if re.search(r"^\tflags .*\bdormant\b", head, re.MULTILINE):
            continue
        for chain in chains:
            name, *lines = chain.partition("\n\t}")[0].split("\n\t\t")
            name = name.partition(" ")[0]
            for at, line in enumerate(lines):
                if kind := re.match(rf"type (\S+) hook {hook} ", line):
                    yield ForeignChain(
                        f"table {found[1]}, chain {name}",
                        "policy drop;" in line,
                        lines[at + 1 :] if kind[1] != "nat" else (),
                        f"nft list chain {found[1]} {name}",
                    )


LEGACY = (  # the old tables of iptables: the file with their names, and the program that shows them
    ("/proc/net/ip_tables_names", "iptables-legacy"),
    ("/proc/net/ip6_tables_names", "ip6tables-legacy"),
)
LEGACY_TABLES = {
    "PREROUTING": ("raw", "mangle"),
    "INPUT": ("mangle", "filter", "security"),
    "FORWARD": ("mangle", "filter", "security"),
    "POSTROUTING": ("mangle",),
}


def legacy_chains(chain: str) -> Iterator[ForeignChain]:
    """The same for the old tables of iptables, which nft does not show. Raises BackendError.

    A chain may have rules if the program that shows them is not installed.
    """
    for path, program in LEGACY:
        try:
            used = Path(path).read_text("ascii").split()
        except OSError:
            continue
        for table in (name for name in LEGACY_TABLES[chain] if name in used):
            name = f"{program}, table {table}, chain {chain}"
            shown_by = f"{program} -t {table} -S {chain}"
            if tool(program):
                lines = run_tool(*shown_by.split()).splitlines()
                rules = [line for line in lines if line.startswith("-A ")]
                yield ForeignChain(name, f"-P {chain} DROP" in lines, rules, shown_by)
            else:
                name = f"table {table}, chain {chain} of {program}, which is not installed"
                shown_by = f"apt-get install iptables; {shown_by}"
                yield ForeignChain(name, False, ["unknown"], shown_by)


# --- up and down ----------------------------------------------------------------------------------


def make_interface(link: Link) -> Iterator[str]:
    """Make the kernel's interface, or set it up; the service sets its key and port.

    Yields each change. Raises BackendError.
    """
    with contextlib.closing(Route()) as route:
        before = route.find(link.name)
        if before is not None and link.kind == AWG_GENL_NAME:
            return  # its MTU depends on parameters that only the service knows
        try:
            hold_link(route, link, 0, make=True)
        except NetlinkError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            yield f"{link.name}: the kernel has no {link.kind}; `serve` starts a userspace one"
            return
        if before is None:
            yield f"{link.name}: made"
        found = route.get(link.name)
        old = route.addresses(found.ifindex).keys()
        new = route.addresses(route.configure(link)).keys()
        if (found.mtu, found.is_up) != (link.mtu, True):
            yield f"{link.name}: MTU {link.mtu}, up"
        yield from (f"{link.name}: {each}" for each in sorted(map(str, new - old)))
        yield from (f"{link.name}: {each}: removed" for each in sorted(map(str, old - new)))


def net_up(host: Host, links: Sequence[Link]) -> Iterator[str]:
    """Set up everything around the interfaces; yields each change. Raises BackendError.

    The rules come first: no packet is ever forwarded without them. The caller has claimed the
    interfaces that exist already.
    """
    config, tunnels = host.config, host.tunnels
    for name, text in (
        (TABLE, render_ruleset(config, tunnels, [link.name for link in host.uplinks()])),
        (CLASS_TABLE, render_classes(config.service_classes, tunnels)),
    ):
        if replace_table(name, text, host.mark):
            yield f"nftables: table {name}"
    if host.ufw is not None:
        yield from align_ufw(host.ufw, ufw_rules(config, tunnels))
    yield from turn_on_forwarding(tunnels)
    if config.wg_backend in ("auto", "netlink"):
        for link in links:
            yield from make_interface(link)


def net_down(
    mark: str, names: Container[str], recognise: Recognise, keep_interfaces: bool
) -> Iterator[str]:
    """Remove what net_up() made; with the interfaces every tunnel ends. Raises BackendError.

    `names` and `recognise`: see links_to_remove(). The rules are removed last, so that an interface
    that cannot be removed still has them.
    """
    ours, others = ([], []) if keep_interfaces else links_to_remove(mark, names, recognise)
    for found in ours:
        yield remove_interface(found)
        if is_served(found.name):
            todo = "stop it, such as with `systemctl stop wggw`, and run this again"
            yield f"note: a gateway runs and makes {found.name} again: {todo}"
    for found in others:
        yield (
            f"{found.name} stays: it does not carry this gateway's mark, {mark!r}"
            + (f", but {found.alias!r}" if found.alias else "")
        )
    for name in (TABLE, CLASS_TABLE) if tool("nft") else ():
        table = current_table(name)
        if other := other_gateway(table, mark):
            yield f"nftables: table {name} stays: it belongs to the gateway with the mark {other!r}"
            return
        if table:
            run_tool("nft", "delete", "table", *name.split())
            yield f"nftables: table {name} removed"
    if tool("ufw"):  # an inactive one keeps its rules until it is active again
        yield from align_ufw(run_tool("ufw", "show", "added"), [])
    yield "forwarding stays on until the next boot: something else may need it"


def other_gateway(table: str, mark: str) -> str:
    """The mark of another gateway if it made the table, else "". Raises BackendError.

    A table of an older version has no mark; it is another gateway's if it names its interfaces.
    """
    if found := re.search(r'^\t(comment "(.*)")$', table, re.MULTILINE):
        return "" if found[1] == table_comment(mark) else found[2]
    names = names_of_table(table)
    _, others = links_to_remove(mark, (), recognise_none) if names else ([], [])
    return next((found.alias for found in others if found.name in names), "")


def names_of_table(table: str) -> set[str]:
    """The interfaces that our table lets through: those of the last net_up()."""
    rules = re.findall(r"^[ \t]*+iifname (.+) accept$", table, re.MULTILINE)
    return {name for rule in rules for name in re.findall(r'"([^"]+)"', rule)}


# --- checks ---------------------------------------------------------------------------------------
#
# A check takes a Host, changes nothing, and yields findings: the lines of `doctor`, which runs all
# checks. `serve`, `net up` and install.sh run those of FIT, and refuse what does not fit: such a
# finding names the setting, both values and what to do. `net show` runs those of NETWORK.


def _look_at_interfaces(host: Host) -> Iterator[Finding]:
    links = {link.name: link for link in host.links}
    for tunnel in host.tunnels:
        mtu = tunnel.mtu if tunnel.prefix == PLAIN_PREFIX else None
        found, todo = links.get(tunnel.name), host.start
        if found is None:
            text = "no such interface"
        elif found.alias != tunnel.mark:
            text = "this interface does not carry the gateway's mark"
            todo = "run `wggw net up`, which says more"
        elif not found.is_up or mtu not in (None, found.mtu):
            text = f"it is down, or its MTU is not {mtu}" if mtu else "it is down"
        elif not held_ports("udp", tunnel.ports[0]):
            text = f"it does not listen on UDP {tunnel.ports[0]}"
        else:
            yield Finding(tunnel.name, f"up, MTU {mtu}" if mtu else "up")
            continue
        yield Finding(tunnel.name, text, todo, True)


def _look_at_forwarding(host: Host) -> Iterator[Finding]:
    for path, is_on in read_forwarding(host.tunnels):
        name = path.replace("/", ".")
        todo = "" if is_on else f"run `wggw net up` (or sysctl -w {name}=1)"
        yield Finding("forwarding", f"{name} is {'on' if is_on else 'off'}", todo, not is_on)


def _look_at_table(host: Host) -> Iterator[Finding]:
    table, todo = current_table(), "run `wggw net up`"
    if not table:
        yield Finding("NAT", f"table {TABLE} is missing", todo, True)
        return
    for subnet in (subnet for tunnel in host.tunnels for subnet in tunnel.subnets.values()):
        if not is_translated(subnet):
            text = f"{subnet} is global and is not translated: it must be routed to this host"
            yield Finding("NAT", text)
        elif f"saddr {subnet} " in table:
            yield Finding("NAT", f"{subnet} is masqueraded")
        else:
            yield Finding("NAT", f"{subnet} is not masqueraded", todo, True)
    found = len(re.findall(r"^\t\t(?:iifname|oifname|ip|ip6) ", table, re.MULTILINE))
    wanted = count_rules(render_ruleset(host.config, host.tunnels))
    text = f"table {TABLE} has {found} rules"
    if found == wanted:
        yield Finding("packet filter", text)
    else:
        yield Finding("packet filter", f"{text}, and the settings ask for {wanted}", todo, True)


def _look_at_classes(host: Host) -> Iterator[Finding]:
    classes = host.config.service_classes
    with contextlib.closing(ClassTable(classes, host.tunnels)) as table:
        if not table.alive():
            text = "the rules are missing"
            if not classes:
                text = f"there are none, but table {CLASS_TABLE} has the rules of former ones"
            todo = "run `wggw net up`, or restart the gateway"
            yield Finding("service classes", text, todo, True)
        elif classes:
            table.read()
            counts = ", ".join(f"{name} {table.addresses[name]}" for name in classes)
            yield Finding("service classes", f"in force; addresses by class: {counts}")


def _look_at_ufw(host: Host) -> Iterator[Finding]:
    if host.ufw is None:
        return
    missing, _, against = compare_ufw(host.ufw, ufw_rules(host.config, host.tunnels))
    for rule in against:
        todo = "remove it with `ufw delete`, and run `wggw net up`"
        yield Finding("ufw", f"a rule of somebody else is against the gateway: {rule}", todo, True)
    if missing:
        text = f"these rules are missing: {'; '.join(missing)}"
        yield Finding("ufw", text, "run `wggw net up`", True)
    elif not against:
        yield Finding("ufw", "active, and has the gateway's rules")


def _look_at_firewalls(host: Host) -> Iterator[Finding]:
    """What other programs' chains certainly drop, and what they might. See ForeignChain."""
    try:
        with_ufw = host.ufw is not None
    except BackendError:  # which _look_at_ufw() has told
        with_ufw = False
    ruleset = run_tool("nft", "-s", "-t", "list", "ruleset")
    names = ", ".join(tunnel.name for tunnel in host.tunnels)
    ports = ", ".join(str(tunnel.ports[0]) for tunnel in host.tunnels)
    port = host.config.api_port
    api = f"curl -k https://ADDRESS:{port}/healthz"
    through, to_host = ("prerouting", "forward", "postrouting"), ("prerouting", "input")
    for what, hooks, trial in (
        (f"packets from {names}", through, "let a client ping 1.1.1.1"),
        (f"UDP {ports}, TCP {port}", to_host, f"connect a client; on a backend, {api}"),
    ):
        chains = [
            chain
            for hook in hooks
            for chain in (*foreign_chains(ruleset, hook), *legacy_chains(hook.upper()))
            if (chain.drops or chain.rules) and not (chain.is_ufw and with_ufw)
        ]
        for chain in chains:
            if not chain.rules:
                todo = "accept them there: its policy is drop and it has no rules"
                yield Finding("firewall", f"{what}: dropped by {chain.name}", todo, True)
        if doubts := [chain for chain in chains if chain.rules]:
            shown = "; ".join(f"{c.name}{' (policy drop)' if c.drops else ''}" for c in doubts)
            todo = f"try it: {trial}. To see the rules: {'; '.join(c.shown_by for c in doubts)}"
            yield Finding("firewall", f"{what}: may be dropped by {shown}", todo)
        if not chains:
            besides = " but ufw's" if with_ufw else ""
            yield Finding("firewall", f"{what}: no other filter rule on this host{besides}")


def _look_at_rights(host: Host) -> Iterator[Finding]:
    """Whether the kernel or a program can make the interfaces, with the rights of this process."""
    status = Path("/proc/thread-self/status").read_text("ascii")
    held = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    if held and not int(held[1], 16) >> CAP_NET_ADMIN & 1:
        todo = "run it as root, or give the container --cap-add NET_ADMIN"
        yield Finding("CAP_NET_ADMIN", "this process does not have it", todo, True, StartError)
    for tunnel in host.tunnels:
        yield from _look_at_kind(host.config.wg_backend, tunnel)


def _look_at_kind(mode: str, tunnel: InterfaceSettings) -> Iterator[Finding]:
    kind = tunnel.kind
    program, subject = PROGRAMS[kind], f"WG_BACKEND {mode}"
    lacking = f"the kernel has no {kind}"
    if mode != "uapi":
        with contextlib.closing(NetlinkSocket(NETLINK_GENERIC)) as netlink:
            if genl_family(netlink, kind) is not None:
                yield Finding("kernel module", f"{kind} is available")
                return
    path = shutil.which(program) or tool(program)
    runs_now = uapi_answers(uapi_path(kind, tunnel.name))
    if mode == "netlink":
        todo = f"load the module, or set WG_BACKEND=auto to use {program}"
        yield Finding(subject, lacking, todo, True, StartError)
    elif path is None and not runs_now:
        todo = f"load the module, or install {program}"
        found = f"{lacking}, and {program} is missing"
        yield Finding(subject, found, todo, True, StartError)
    elif not runs_now and (fault := _tun_fault()):
        found = f"{lacking}, and {program} needs {TUN}: {fault}"
        todo = f"load the module tun, start the container with --device {TUN}, or chmod 666 {TUN}"
        yield Finding(subject, found, todo, True, StartError)
    else:
        yield Finding("kernel module", f"{kind} is missing; {program} does its work")


def _tun_fault() -> str:
    try:
        os.close(os.open(TUN, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return "it does not exist"
    except OSError as error:
        mode = stat.S_IMODE(os.stat(TUN).st_mode)
        return f"this user (id {os.geteuid()}) cannot open it: {_reason(error)}, mode {mode:04o}"
    return ""


def _look_at_subnets(host: Host) -> Iterator[Finding]:
    """Whether a tunnel's subnet would divert packets from networks that the host reaches now."""
    taken = host.networks()
    for tunnel in host.tunnels:
        for family, subnet in tunnel.subnets.items():
            for network, place in taken:
                if network.overlaps(cast(Any, subnet)) and place != tunnel.name:
                    name = f"{tunnel.prefix}_{family.upper()}_SUBNET"
                    found = f"overlaps {network} of {place}"
                    todo = f"choose another subnet in {name}, such as {free_subnet(subnet, taken)}"
                    yield Finding(f"{name} {subnet}", found, todo, True, ConfigError)
                    break


def free_subnet(
    wanted: IPv4or6Network, taken: Sequence[tuple[IPv4or6Network, str]]
) -> IPv4or6Network:
    """The wanted subnet, or else a private one that overlaps no network in `taken`.

    It has the wanted size, and at most that of a /16 or /64. Where all is taken, the wanted one.
    """
    length = max(wanted.prefixlen, 16 if wanted.version == 4 else 64)
    others: Iterator[Iterator[IPv4or6Network]] = (
        itertools.islice(cast(Any, block).subnets(new_prefix=length), first, 70_000, step)
        for first, step in ((257, 256), (0, 1))  # first such as 10.1.1.0/24, which few have
        for block in (*TRANSLATED, ipaddress.ip_network("fd42:4242::/32"))
        if block.version == wanted.version and 8 <= block.prefixlen <= length
    )
    for found in itertools.chain([wanted], *others):
        if not any(network.overlaps(cast(Any, found)) for network, _ in taken):
            return found
    return wanted


def _look_at_ports(host: Host) -> Iterator[Finding]:
    """Whether the interfaces and the API have their ports, or can get them."""
    names = {link.name for link in host.links}
    wanted = {tunnel.name for tunnel in host.tunnels}
    ours = [link.name for link in host.links if link.alias == host.mark and link.name not in wanted]
    for tunnel in host.tunnels:
        port = tunnel.ports[0]
        setting = "WG_DEFAULT_PORT" if tunnel.prefix == PLAIN_PREFIX else "AWG_PORT"
        for held in held_ports("udp", port)[:1]:
            pid, who = held.holder()
            # A port without a visible process is the kernel's, or that of another user's program.
            path = uapi_path(tunnel.kind, tunnel.name)
            if tunnel.name in names and (
                # uapi_port() comes last, because the program lists all its peers to answer it.
                not pid or pid == uapi_listener(path) or uapi_port(path) == port
            ):
                found = f"{who if pid else 'the kernel'} has it, for {tunnel.name}"
                yield Finding(f"{setting} {port}", found)
            else:
                todo = f"stop that program, or change {setting}"
                found = f"UDP port {port} is held by {who}"
                if tunnel.name not in names and ours:
                    found += f", and {ours[0]} has this gateway's mark"
                    back = f"ip link set {ours[0]} down && ip link set {ours[0]} name {tunnel.name}"
                    todo = f"if {ours[0]} was {tunnel.name}, rename it back: {back}"
                    todo += f"; if the setting has changed: ip link delete {ours[0]}"
                yield Finding(f"{setting} {port}", found, todo, True, StartError)
    if host.is_served:
        return  # the API has its port
    config = host.config
    family = socket.AF_INET6 if ":" in config.api_host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((config.api_host, config.api_port))
            probe.listen()
    except OSError as error:
        yield describe_api_fault(config, error)


def describe_api_fault(config: Config, error: OSError) -> Finding:
    """Why the API cannot listen on its port."""
    host, port = config.api_host, config.api_port
    found, todo = f"cannot listen on {host} port {port}: {_reason(error)}", "change API_HOST"
    if error.errno == errno.EADDRINUSE:
        holders = [held.holder()[1] for held in held_ports("tcp", port)[:1]]
        found, todo = f"{found}: {', '.join(holders)}", "stop that program, or change API_PORT"
    elif error.errno == errno.EACCES:
        todo = "change API_PORT to 1024 or more, or give the process CAP_NET_BIND_SERVICE"
    return Finding(f"API_HOST {host}, API_PORT {port}", found, todo, True, StartError)


def _look_at_extra_ports(host: Host) -> Iterator[Finding]:
    """Which programs listen on an extra port, from which the packet filter redirects packets."""
    uplinks = host.uplinks()
    with contextlib.closing(Route()) as route:
        local = {a.ip for link in uplinks for a in route.addresses(link.ifindex)}
    where = ", ".join(link.name for link in uplinks) or "every interface"
    for tunnel in host.tunnels:
        for port in tunnel.ports[1:]:
            for held in held_ports("udp", port):
                address = held.address
                if address.is_loopback or (local and address not in local and int(address)):
                    continue
                found = f"{held.holder()[1]} listens on {address} port {port}, but packets to it"
                yield Finding(
                    f"{tunnel.prefix}_EXTRA_PORTS {port}",
                    f"{found} that arrive on {where} go to {tunnel.name}",
                    "let it listen on other addresses, or remove the port from the setting",
                )


def _look_at_ipv6(host: Host) -> Iterator[Finding]:
    """Whether the host has IPv6. Without it the gateway starts nevertheless, for IPv4 clients."""
    for tunnel in host.tunnels:
        if fault := ipv6_fault(tunnel):
            subject = f"{tunnel.prefix}_IPV6_SUBNET {tunnel.subnets['ipv6']}"
            yield Finding(subject, *fault, failed=True)


def ipv6_fault(tunnel: InterfaceSettings) -> tuple[str, str] | None:
    """Why a tunnel's peers have no IPv6 on this host, and what to do; None if they have it."""
    if "ipv6" not in tunnel.subnets or takes_ipv6(tunnel.name):
        return None
    todo = "remove ipv6.disable=1 from the kernel's command line"
    if os.path.exists("/proc/sys/net/ipv6"):
        todo = "sysctl -w net.ipv6.conf.all.disable_ipv6=0 net.ipv6.conf.default.disable_ipv6=0"
    other = f"set {tunnel.prefix}_IPV6_SUBNET= if no peer has an IPv6 address"
    return (
        f"IPv6 is switched off on this host, so {tunnel.name} has only IPv4",
        f"{todo}, or {other}",
    )


def look_at_stored(host: Host) -> Iterator[Finding]:
    """What stored peers have and the settings no longer offer, unless MOVE_PEERS changes it."""
    config, store = host.config, host.store
    homes: dict[str, InterfaceSettings] = {}
    interfaces, ports, choices = (collections.Counter[Any]() for _ in range(3))
    for name, plain, port, dns, peers in store.queries.chosen():
        interfaces[name, plain] += peers
        ports[name, port] += peers
        choices[dns] += peers
    for (name, plain), peers in interfaces.items():
        home = home_of(name, plain, config, host.tunnels)
        if home is None:
            settings = " or ".join(f"{row.prefix}_INTERFACE {row.name!r}" for row in host.tunnels)
            yield _gone(settings, f"the interface {name!r}", peers, "not there")
        else:
            homes[name] = home
    for (name, port), peers in ports.items():
        if name in homes and not config.move_peers and port not in (None, *homes[name].ports):
            there = ", ".join(map(str, homes[name].ports))
            setting = f"{homes[name].prefix}_EXTRA_PORTS"
            yield _gone(setting, f"the port {port} of {name}", peers, f"none of {there}")
    for dns, peers in choices.items():
        if not config.move_peers and dns is not None and dns not in config.dns_servers:
            there = ", ".join(config.dns_servers)
            yield _gone("DNS_SERVERS", f"the choice {dns!r}", peers, f"none of {there}")
    yield from look_at_stored_classes(config.service_classes, store)
    for name, home in homes.items():
        for family in FAMILIES:
            subnet = home.subnets.get(family)
            held = store.queries.held(name, family)
            if outside := AddressPool(subnet).outside(held) if subnet else len(held):
                setting = f"{home.prefix}_{family.upper()}_SUBNET"
                words = f"{setting} {subnet or repr('')}", f"the {family} address on {name}"
                yield _gone(*words, outside, "outside of it", moves=False)


def look_at_stored_classes(classes: Collection[str], store: Store) -> Iterator[Finding]:
    for name, peers in store.counts.classes.items():
        if peers and name not in classes:
            words = f"none of {', '.join(classes)}" if classes else "not there"
            yield _gone("SERVICE_CLASSES", f"the class {name!r}", peers, words, moves=False)


def _gone(setting: str, what: str, peers: int, how: str, moves: bool = True) -> Finding:
    todo = "restore the setting, or change or delete these peers first"
    if moves:
        todo += ", or start with MOVE_PEERS=true to move them to the present settings"
    found = f"{what} is used by {show_peers(peers)}, but is {how}"
    return Finding(setting, found, todo, True, ConfigError)


def home_of(
    name: str, plain: bool, config: Config, tunnels: Sequence[InterfaceSettings]
) -> InterfaceSettings | None:
    """The interface of peers that are stored with this interface's name, None if it is gone."""
    for tunnel in tunnels:
        if tunnel.name == name:
            return tunnel
    kind = PLAIN_PREFIX if plain else AWG_PREFIX
    return next((t for t in tunnels if config.move_peers and t.prefix == kind), None)


def moved(peer: Peer, config: Config, tunnels: Sequence[InterfaceSettings]) -> Peer:
    """A peer after MOVE_PEERS: choices that the settings no longer offer become the defaults."""
    home = home_of(peer.interface, peer.obfuscation is None, config, tunnels)
    if home is None:
        return peer
    return peer._replace(
        interface=home.name,
        port=peer.port if peer.port in home.ports else None,
        dns=peer.dns if peer.dns in config.dns_servers else None,
    )


Check = Callable[[Host], Iterator[Finding]]
FIT: tuple[Check, ...] = (
    _look_at_rights,
    _look_at_subnets,
    _look_at_ports,
    _look_at_extra_ports,
    _look_at_ipv6,
    look_at_stored,
)
NETWORK: tuple[Check, ...] = (
    _look_at_interfaces,
    _look_at_forwarding,
    _look_at_table,
    _look_at_classes,
    _look_at_ufw,
    _look_at_firewalls,
)


def look_at_fit(host: Host) -> Iterator[Finding]:
    """All checks of FIT; in memory only the stored peers matter. Raises BackendError."""
    for check in FIT if host.is_real else (look_at_stored,):
        yield from check(host)


def look_at(checks: Iterable[Check], host: Host) -> Iterator[Finding]:
    """All findings of the checks. That a check cannot read the host is a finding, too."""
    for check in checks:
        try:
            yield from check(host)
        except BackendError as error:
            todo = "run as root, with nftables; see the kernel's log"
            yield Finding("host", f"cannot be read: {error}", todo, True)


def refuse_misfits(findings: Iterable[Finding]) -> None:
    """Raises all findings that refuse as one StartError; a ConfigError if a setting must change."""
    faults = [finding for finding in findings if finding.refuses]
    if faults:
        error = ConfigError if any(f.refuses is ConfigError for f in faults) else StartError
        raise error("; ".join(map(str, faults)))


# ==================================================================================================
# ledger: the one way in which anything changes: flights, the tunnels (interfaces) that they change,
# the table of what is in flight, and the lander
#
# A Flight is a change that was decided: its record, the changes of the interfaces, the keys that it
# concerns, the addresses that it takes and frees. A desired state is one flight. Its landing:
#
#   1. The lander takes all waiting flights, numbers their records, writes them as one line and
#      syncs it. If that fails, neither interface nor rows have the change: the flights are refused
#      (503), and so are all changes until a fresh snapshot has been written. Only the repair of an
#      interface goes on, as it needs no disk.
#   2. Each interface gets one message. If that fails, the lander tries each flight alone, refuses
#      those that fail, and writes and syncs a record that declares their records void. A timer's
#      worker then makes the interface equal to the rows.
#   3. The owner of the rows (the loop) applies the records, returns addresses to their pools, and
#      answers the requests that waited. Only then does the lander begin the next landing.
#
# So no row ever changes back, the rows hold only what is on disk and on the interface, and a reader
# waits for neither. A change of a key in flight is decided after that landing. A flight also waits
# while its userspace interface is being read, and all decisions wait for an import. A flight is
# refused only when its record cannot reappear: step 1 removed the line, or step 2 declared it void.
# If neither succeeded, nobody knows what a restart will find: the connection ends without an answer
# (OutcomeUnknown), and changes are refused until there is a fresh snapshot. A defect during a
# landing has the same effect, except that only a restart ends it.
#
# Threads: rows, pools and the Ledger, the table of what is in flight, belong to the owner; other
# threads reach them by `run(function)`. After the start only the Lander's thread changes
# interfaces. It takes `turn` at the beginning of a landing, and the owner releases it at the end. A
# worker holds it while it changes the journal or the service classes.
# Never here: rules, and sockets of clients.
# ==================================================================================================

HeldAddress = tuple[str, str, str]  # interface, family, address


class Run(Protocol):
    """run(function) calls it as the owner of the rows. It must end within a few milliseconds."""

    def __call__(self, function: Callable[[], _T], /) -> _T: ...


Begin = Callable[[Iterator[None]], None]  # has the owner advance a generator to its end


class Step(NamedTuple):
    """A peer before a change (None: it is new) and after it (None: it is deleted)."""

    before: Peer | None
    after: Peer | None


class Later(Generic[_T]):
    """A value that will come, and the functions to call with it. Owner."""

    def __init__(self) -> None:
        self.done = False
        self._value: _T | None = None
        self._waiting: list[Callable[[_T], None]] = []

    def give(self, value: _T) -> None:
        for _ in self.give_in_slices(value):
            pass

    def give_in_slices(self, value: _T) -> Iterator[None]:
        self.done, self._value = True, value
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            try:
                call(value)
            except Exception as error:  # a defect in one call must not stop the others
                log_defect(error)
            yield

    def then(self, call: Callable[[_T], None]) -> None:
        """Call `call` with the value: now, or when it has come."""
        if self.done:
            call(cast(_T, self._value))
        else:
            self._waiting.append(call)


def when_all(laters: list[Later[Any]], call: Callable[[], None]) -> None:
    """Call `call` when all values have come. Consumes `laters`. Owner."""
    if laters:
        laters.pop().then(lambda _: when_all(laters, call))
    else:
        call()


def wait_for(run: Run, later: Later[_T]) -> _T:
    """Wait for the value. For workers."""
    answer: queue.SimpleQueue[_T] = queue.SimpleQueue()
    run(lambda: later.then(answer.put))
    return answer.get()


def _counted_by(peer: Peer) -> tuple[str, str, str]:
    """While these values stay the same, a peer and its counters stay on its interface."""
    return peer.public_key, peer.interface, peer.status


class Flight(Later["GatewayError | None"]):
    """A change that has not landed yet. Its value is `error`: why it was refused, or None."""

    def __init__(self, record: Record | None = None) -> None:
        super().__init__()
        self.record = record or Record()
        # By interface; an interface to set up is among them, too.
        self.changes: collections.defaultdict[str, list[Change]] = collections.defaultdict(list)
        self.links: dict[str, Link | None] = {}  # interfaces to set up; None: as they are now
        self.steps: list[Step] = []
        self.keys: list[str] = []
        # What claim() returned; None: an address that another peer of this flight gives up.
        self.claimed: dict[HeldAddress, int | None] = {}
        self.freed: dict[HeldAddress, None] = {}
        self._spares: dict[tuple[str, str], list[HeldAddress]] = {}
        self.on_landed: list[Callable[[], None]] = []  # called when the rows have the change
        self.error: GatewayError | None = None
        self.needs_disk = True  # False: it lands without the disk; the next snapshot contains it
        self.suspects: dict[str, str] = {}  # the interfaces that refused it, with the reason
        self.submitted = False
        self.number = 0

    def set_up(self, interface: str, link: Link | None) -> None:
        self.links[interface] = link
        self.changes.setdefault(interface, [])

    def complete(self) -> None:
        """Take the rows and the changes of the interfaces from the steps.

        Removals come first: another peer may get the address of a removed one.
        """
        put: list[Peer] = []
        delete: list[int] = []
        come: list[tuple[str, Change]] = []
        for before, after in self.steps:
            was = wire_peer(before) if before and before.status == "active" else None
            now = wire_peer(after) if after and after.status == "active" else None
            if before and was and not (after and _counted_by(before) == _counted_by(after)):
                self.changes[before.interface].append(Change(was.public_key, None))
            if after and now and was != now:
                come.append((after.interface, Change(now.public_key, now)))
            if after:
                put.append(after)
            elif before:
                delete.append(before.id)
        for name, change in come:
            self.changes[name].append(change)
        self.record = self.record._replace(put=put, delete=delete)

    def spare(self, interface: str, family: str) -> str | None:
        """The first address that it frees there and that none of its peers has taken again."""
        if not self._spares:
            for address in reversed(self.freed):
                self._spares.setdefault(address[:2], []).append(address)
        spares = self._spares.get((interface, family), [])
        while spares and spares[-1] not in self.freed:
            spares.pop()
        return spares[-1][2] if spares else None


def _gained(before: Peer | None, after: Peer | None) -> list[HeldAddress]:
    """The addresses that `after` has and `before` has not."""
    gained: list[HeldAddress] = []
    for family, name in ADDRESS_FIELD.items():
        address = getattr(after, name, None)
        if after and address and address != getattr(before, name, None):
            gained.append((after.interface, family, address))
    return gained


class Busy(Exception):
    """A request depends on a flight. It is decided when that has landed."""

    def __init__(self, flight: Flight) -> None:
        self.flight = flight


class Tunnel:
    """An interface for peers, and the gateway's knowledge of it.

    Only the lander changes the interface, by project(), and workers read it. What they find
    (`known`, `unsure`, `newborn`, `is_silent`, `must_set_up`, rates) is theirs; everything else
    here belongs to the owner of the rows. `failure` is None, or says why the interface may differ
    from the rows. `clients_key` is the public key that the configurations of its peers name.
    """

    def __init__(
        self,
        settings: InterfaceSettings,
        link: Link,
        backend: Backend,
        obfuscation: ObfuscationState | None,
    ) -> None:
        self.settings = settings
        self.name = settings.name
        self.link = link
        self.backend = backend
        self.obfuscation = obfuscation
        self.public_key = self.clients_key = encode_key(x25519_public(link.private_key))
        self.pools: dict[str, AddressPool] = {}
        self.failure: str | None = None
        self.failures = 0  # how often it failed
        self.must_set_up = False  # the interface itself failed, not only its peers
        self.known: set[int] = set()  # fingerprints of peers that a sample found to be right
        self.unsure = 0  # how many samples in a row could not tell whether peers are missing
        self.newborn: set[bytes] = set()  # see Comparison.scrub()
        self.rx_bytes = self.tx_bytes = 0  # of its peers since the gateway's start
        self.sampled = (0.0, 0, 0)  # the last sample: monotonic time (0.0: none), these numbers
        self.rx_rate = self.tx_rate = 0.0  # bytes a second, between the last two samples
        self.reading = threading.Lock()  # one reader at a time
        self.is_read = False  # landings on it wait: see Lander
        self.is_silent = False  # it did not answer the last reading, so a landing need not ask

    def project(self, flights: Sequence[Flight]) -> BackendError | None:
        """Set the interface up as flights demand, then do their changes. Returns what failed."""
        links: list[Link | None] = []
        changes: list[Change] = []
        for flight in flights:
            changes += flight.changes[self.name]
            if self.name in flight.links:
                links.append(flight.links[self.name])
        if self.is_silent and not links:
            return NoAnswer(f"{self.name}: the interface does not answer")
        try:
            if links:
                wanted = next(filter(None, reversed(links)), None)
                self.backend.setup(wanted or self.link, make=wanted is None)
            if changes:
                self.backend.apply(changes)
        except BackendError as error:
            return error
        return None

    def fail(self, reason: str) -> None:
        """Note that the interface may differ from the rows: it must be reconciled."""
        self.failure = reason
        self.failures += 1

    def suspect(self, reason: str) -> None:
        """Note that the interface failed. Repeated failures for one reason are logged once."""
        if self.failure != reason:
            LOG.error("%s", reason)
        self.fail(reason)

    def make_pools(self, store: Store) -> dict[str, AddressPool]:
        """The pools with the addresses of a store. Raises Conflict."""
        pools = {
            family: AddressPool(subnet, self.settings.kept)
            for family, subnet in self.settings.subnets.items()
        }
        for family in FAMILIES:
            held = store.queries.held(self.name, family)
            try:
                if family in pools:
                    pools[family].restore(held, store.released.addresses(family))
                elif held:
                    raise ValueError
            except ValueError:  # the address is a VPN client's, which is never logged
                subnet = self.settings.subnets.get(family)
                raise Conflict(
                    f"there is a peer whose {family} address is outside of {subnet}, "
                    "excluded there, or given twice"
                ) from None
        return pools

    def with_defaults(self, peer: Peer, config: Config) -> Peer:
        """The peer with the DNS choice and the port that it follows by default."""
        dns = next(iter(config.dns_servers)) if peer.dns is None else peer.dns
        return peer._replace(dns=dns, port=peer.port or self.settings.ports[0])

    def note_link(self, link: Link, state: ObfuscationState | None) -> None:
        """Note the key and the parameters that the interface has now."""
        if link.private_key != self.link.private_key:
            self.public_key = encode_key(x25519_public(link.private_key))
        self.link, self.obfuscation = link, state

    def note_clients_key(self, store: Store, kept: str | None) -> None:
        """Note the public key that the rows name now. `kept`: its private key, if not the own."""
        self.clients_key = store.public_keys().get(self.name, self.public_key)
        is_own = self.clients_key == self.public_key
        key = encode_key(self.link.private_key) if is_own else kept
        store.private_keys.pop(self.name, None)
        if key:
            store.private_keys[self.name] = key

    def count(self, rx: int, tx: int) -> None:
        self.rx_bytes += rx
        self.tx_bytes += tx

    def rate(self) -> None:
        """Compute the rates between the last two samples."""
        (then, received, sent), now = self.sampled, time.monotonic()
        if then and now > then:
            self.rx_rate = (self.rx_bytes - received) / (now - then)
            self.tx_rate = (self.tx_bytes - sent) / (now - then)
        self.sampled = (now, self.rx_bytes, self.tx_bytes)


class Ledger:
    """The table of what is in flight. Owner; land() is for workers.

    `in_flight` holds flights by public key. `airborne` holds every opened flight that has not
    landed: the latest submitted one is behind all that were submitted earlier. While there is an
    `exclusive` flight, nothing else is decided. The lander takes what is in `waiting`.
    """

    def __init__(self, run: Run, files: Files, tunnels: Mapping[str, Tunnel]) -> None:
        self.run, self.files, self.tunnels = run, files, tunnels
        self.in_flight: dict[str, Flight] = {}
        self.airborne: dict[Flight, None] = {}
        self.exclusive: Flight | None = None
        self.waiting: queue.SimpleQueue[list[Flight]] = queue.SimpleQueue()
        self.watchers: dict[int, set[str]] = {}  # see watch()
        self.broken: str | None = None  # an internal error: the rows cannot be trusted any more
        self.uncertain = False  # the journal may hold changes that the rows do not have
        self.replaced: str | None = None  # the gateway that has taken over the remote copy
        self.fence = False  # refuse changes when there is one
        self.stopping = False
        self.gathers = False  # dispatch() is called once for all flights of a round
        self._gathered: list[Flight] = []

    @property
    def failure(self) -> str | None:
        """Why changes are refused, or None."""
        return self.broken or self.files.journal.failure

    def check(self, key: str = "") -> None:
        """Raises Busy when this key, or an exclusive flight, is in flight."""
        flight = self.exclusive or self.in_flight.get(key)
        if flight is not None:
            raise Busy(flight)

    def check_addresses(
        self, before: Peer | None, after: Peer, mine: Flight | None = None
    ) -> list[HeldAddress]:
        """The addresses that a peer gets. `mine`, or any new flight, can claim them.

        Raises Busy when another flight may free one, otherwise Conflict, or Invalid when `mine` has
        claimed one already.
        """
        gained = _gained(before, after)
        for address in gained:
            if self._pool(address).is_free(address[2]) or (mine and address in mine.freed):
                continue
            name = ADDRESS_FIELD[address[1]]
            if mine and address in mine.claimed:
                raise Invalid(name, "another element has the same: name each address once")
            for flight in self.airborne:
                if address in flight.claimed or (flight.submitted and address in flight.freed):
                    self.check_disk()
                    raise Busy(flight)
            raise Conflict(f"{name}: {self._why_taken(address)}: name another, or omit the field")
        return gained

    def _why_taken(self, address: HeldAddress) -> str:
        """Why no peer can get an address. The log has the text, and never a client's address."""
        pool, given = self._pool(address), ipaddress.ip_address(address[2])
        setting = f"{self.tunnels[address[0]].settings.prefix}_{address[1].upper()}_SUBNET"
        if given not in pool.network:
            return f"the address is outside of {setting} {pool.network}"
        if given == pool.gateway:
            return f"the address is the gateway's own in {setting} {pool.network}"
        if not pool.has(address[2]):
            return f"the address is the network's own or for broadcast in {setting} {pool.network}"
        return "the address is not free"

    def find_address(self, interface: str, family: str, mine: Flight | None = None) -> str:
        """The next free address of a pool, or one that `mine` frees.

        Raises Busy when another flight may free one, otherwise Unavailable.
        """
        found = self.tunnels[interface].pools[family].peek()
        if found is None and mine is not None:
            found = mine.spare(interface, family)
        if found is not None:
            return found
        # The last one: when it has landed, all addresses that others of its landing free are free.
        # But a bulk change that is not submitted yet may take long.
        for submitted in (True, False):
            for flight in reversed(self.airborne):
                if flight.submitted is submitted and flight is not mine:
                    held = itertools.chain(flight.freed, flight.claimed)
                    if any(address[:2] == (interface, family) for address in held):
                        self.check_disk()
                        raise Busy(flight)
        raise Unavailable(
            f"the {family} addresses of {interface} are exhausted: delete peers, or set a larger "
            "subnet"
        )

    def check_disk(self) -> None:
        if self.failure:
            raise Unavailable("the disk refuses writes: repeat the change when it works again")
        if self.fence and self.replaced:
            raise Unavailable(f"SNAPSHOT_FENCE: {self.replaced}")
        if self.stopping:
            raise Unavailable("the gateway is stopping", headers=[("Retry-After", "5")])

    def open(self, flight: Flight) -> None:
        """Let other flights wait for this one. submit() or release() must follow."""
        self.airborne[flight] = None

    def mark(self, flight: Flight, key: str) -> None:
        """Make every request about this key wait for the flight."""
        self.in_flight[key] = flight
        flight.keys.append(key)
        for touched in self.watchers.values():
            touched.add(key)

    def claim(self, flight: Flight, address: HeldAddress) -> None:
        """Take an address for the flight: see check_addresses()."""
        if address in flight.freed:
            del flight.freed[address]
            flight.claimed[address] = None
        else:
            pool = self._pool(address)
            flight.claimed[address] = pool.claim(address[2])
            pool.in_flight += 1

    def add(self, flight: Flight, step: Step) -> None:
        """Add a step about keys that are not in flight: mark them, claim and free addresses."""
        for key in {peer.public_key for peer in step if peer}:
            self.mark(flight, key)
        for address in _gained(step.before, step.after):
            self.claim(flight, address)
        flight.freed.update(dict.fromkeys(_gained(step.after, step.before)))
        flight.steps.append(step)

    def _pool(self, address: HeldAddress) -> AddressPool:
        return self.tunnels[address[0]].pools[address[1]]

    def submit(self, flight: Flight) -> None:
        self.airborne.pop(flight, None)
        self.airborne[flight] = None  # the last one now
        flight.submitted = True
        self._gathered.append(flight)
        if not self.gathers:
            self.dispatch()

    def dispatch(self) -> None:
        """Pass the submitted flights to the lander."""
        if self._gathered:
            self.waiting.put(self._gathered)
            self._gathered = []

    def release(self, flight: Flight, refused: bool) -> Iterator[None]:
        """Release what a flight holds, and call the functions that wait for it. In slices."""
        for name, reason in flight.suspects.items():  # before its keys are decided again
            self.tunnels[name].suspect(reason)
        for number, (address, turn) in enumerate(reversed(flight.claimed.items()), 1):
            if turn is not None:
                pool = self._pool(address)
                pool.in_flight -= 1
                if refused:
                    pool.put_back(address[2], turn)
            if number % APPLY_SLICE == 0:
                yield
        for number, address in enumerate(() if refused else flight.freed, 1):
            self._pool(address).release(address[2])
            if number % APPLY_SLICE == 0:
                yield
        for number, key in enumerate(flight.keys, 1):
            self.in_flight.pop(key, None)
            if number % APPLY_SLICE == 0:
                yield
        if self.exclusive is flight:
            self.exclusive = None
        self.airborne.pop(flight, None)
        for name, reason in flight.suspects.items():
            # Once more: a reconcile() that skipped its keys has cleared it.
            self.tunnels[name].suspect(reason)
        yield from flight.give_in_slices(flight.error)

    @contextlib.contextmanager
    def watch(self) -> Iterator[set[str]]:
        """Collect the keys that are in flight now or at any moment until the end. For workers."""
        touched = set[str]()

        def begin() -> None:
            touched.update(self.in_flight)
            self.watchers[id(touched)] = touched

        self.run(begin)
        try:
            yield touched
        finally:
            self.run(lambda: self.watchers.pop(id(touched)))

    def land(self, flight: Flight) -> None:
        """Submit a flight and wait until it has landed. Raises its error. For workers."""
        self.run(lambda: self.submit(flight))
        error = wait_for(self.run, flight)
        if error:
            raise error


class Lander:
    """The thread that lands flights, and what workers do with the files while they hold `turn`.

    A userspace WireGuard answers no message while it is being read, so flights for such an
    interface wait for the end of the reading, and the others land.
    """

    def __init__(
        self, ledger: Ledger, store: Store, clock: Callable[[], float], begin: Begin
    ) -> None:
        self._begin = begin
        self.applying = False  # a landing is only partly in the rows
        self.turn = threading.Lock()  # held while changing journal, interfaces, service classes
        self.snapshot_failure: str | None = None
        self.on_written: Callable[[Sequence[Written]], None] | None = None  # for the remote copy
        self.on_changed: Callable[[], None] = lambda: None  # called when rows have changed; owner
        self._ledger, self._store, self._clock = ledger, store, clock
        self._run, self._files, self._tunnels = ledger.run, ledger.files, ledger.tunnels
        self._number = store.number  # of the last record that was numbered
        self._thread = threading.Thread(target=self._take_flights, name="lander", daemon=True)

    def start(self) -> None:
        self._number = self._store.number
        self._thread.start()

    def stop(self, seconds: float) -> bool:
        """Refuse new changes and land the waiting ones. Whether all of them landed in time."""
        self._ledger.stopping = True
        self._ledger.waiting.put([])
        self._thread.join(seconds)
        return not self._thread.is_alive()

    # --- landings --------------------------------------------------------------------------------

    def _take_flights(self) -> None:
        ledger = self._ledger
        held: list[Flight] = []
        while held or not ledger.stopping or not ledger.waiting.empty():
            flights = held + ledger.waiting.get()
            with self.turn:  # the landing before has ended, and may have begun a reading
                pass
            while not ledger.waiting.empty():
                flights += ledger.waiting.get()
            read = {name for name, tunnel in self._tunnels.items() if tunnel.is_read}
            if read and not ledger.stopping:  # a stop waits for no reading
                held = [flight for flight in flights if not read.isdisjoint(flight.changes)]
                flights = [flight for flight in flights if read.isdisjoint(flight.changes)]
            else:
                held = []
            if not flights:
                continue
            landing = self._land(flights)
            try:
                next(landing)
                self._begin(landing)  # nobody waits for it here
            except Exception as error:
                landing.close()
                self._run(functools.partial(self._break, error, flights))
        with self.turn:  # the last landing has ended
            pass

    def _break(self, error: Exception, flights: Sequence[Flight]) -> None:
        """After a defect in a landing nobody knows what is on disk: change nothing any more.

        Refuse the flights, unless the disk may have them. Owner.
        """
        log_defect(error)
        self._ledger.broken = "an internal error: restart the gateway"
        self.applying = False
        self._ledger.uncertain = True
        for flight in flights:
            if not flight.done:
                flight.error = Unavailable(
                    "an internal error: see the gateway's log, and restart it"
                )
                if flight.number:
                    flight.error = OutcomeUnknown("its record may be in the journal")
                flight.claimed.clear()
                for _ in self._ledger.release(flight, refused=True):
                    pass

    def _land(self, flights: Sequence[Flight]) -> Generator[None, None, None]:
        """A landing: the lander's part up to the first yield, then the owner's, in slices."""
        with self.turn:
            written = self._write(flights)
            for name, tunnel in self._tunnels.items():
                concerned = [f for f in flights if f.error is None and name in f.changes]
                if concerned:
                    self._project(tunnel, concerned)
            if written:
                if refused := [f for f in flights if f.error and f.number]:
                    self._void(refused, written)
                if self.on_written:
                    self.on_written(written)
            yield
            try:
                yield from self._hand_back(flights)
            except Exception as error:
                self._break(error, flights)

    def _write(self, flights: Sequence[Flight]) -> list[Written]:
        """Number the records and write them to disk, or refuse the flights that need the disk.

        Returns what is on disk: all records or none.
        """
        broken = self._ledger.failure is not None  # then _append() writes nothing
        written: list[Written] = []
        now = int(self._clock())
        for flight in flights:
            if not flight.record.is_empty():
                self._number += 1
                flight.number = self._number
                flight.record = flight.record._replace(at=now)
                written.append(flight.record.written(self._number))
        try:
            if written:
                self._append(written)
        except DiskError as error:
            LOG.error("%s", error)
            refusal: GatewayError = Unavailable("the disk refused the change: repeat it later")
            if not broken and not self._files.journal.withdraw():
                refusal = OutcomeUnknown("the line may still be in the journal")
                self._ledger.uncertain = True
            for flight in flights:
                if flight.number and flight.needs_disk:
                    flight.error = refusal
            return []
        return written

    def _append(self, written: Sequence[Written]) -> None:
        if self._ledger.broken:
            raise DiskError(self._ledger.broken)
        if self._files.journaled:
            contents = [record.content for record in written]
            sync = self._files.durability == "commit"
            self._files.journal.write(written[0].number, contents, sync)

    @staticmethod
    def _project(tunnel: Tunnel, flights: Sequence[Flight]) -> None:
        """Apply flights to an interface: in one message, or else each alone; refuse what fails.

        After a missing answer nothing else is tried, because each try may take as long.
        """
        failure = tunnel.project(flights)
        if failure is None:
            return
        for flight in flights:
            if len(flights) > 1 and not isinstance(failure, NoAnswer):
                failure = tunnel.project([flight])
            if failure is not None:
                flight.error = Unavailable("the interface is not usable: server/status says why")
                if isinstance(failure, ParametersRefused):
                    flight.error = Invalid("parameters", str(failure))
                flight.suspects = dict.fromkeys(flight.changes, str(failure))

    def _void(self, refused: Sequence[Flight], written: list[Written]) -> None:
        """Declare the records void that are on disk and that an interface refused."""
        self._number += 1
        void = Record(void=[flight.number for flight in refused]).written(self._number)
        written.append(void)
        try:
            self._append([void])
        except DiskError as error:
            LOG.error("%s", error)
            self._ledger.uncertain = True
            for flight in refused:
                flight.error = OutcomeUnknown("its record is in the journal and not void")

    def _hand_back(self, flights: Sequence[Flight]) -> Iterator[None]:
        """Change rows and pools, and answer the requests that waited. Owner, in slices."""
        self.applying = True
        for flight in flights:
            if flight.error is None:
                if flight.number:
                    yield from self._store.apply_in_slices(flight.record)
                    self._store.number = flight.number
                for call in flight.on_landed:
                    call()
            yield from self._ledger.release(flight, refused=flight.error is not None)
        if self._number > self._store.number:  # a record that was refused, and its void
            self._store.number, self._store.changed = self._number, True
        self.applying = False
        self.on_changed()

    # --- the files, by workers -------------------------------------------------------------------

    def between_landings(self, function: Callable[[], _T]) -> _T:
        """Have the owner call it at a moment when no landing is only partly in the rows."""
        while True:
            result = self._run(lambda: None if self.applying else (function(),))
            if result:
                return result[0]
            time.sleep(BREATH_SECONDS)

    def snapshot(self) -> None:
        """Write a snapshot if something changed.

        The status shows a failure until one succeeds; the log names each reason once.
        """
        with self._files.writing:
            try:
                failed = self._ledger.failure is not None
                if failed or self._store.changed:
                    (self._renew if failed else self._write_snapshot)()
                    LOG.debug("snapshot written")
                self.snapshot_failure = None
            except (OSError, DiskError, MemoryError) as error:
                if self.snapshot_failure != (reason := _reason(error)):
                    LOG.error("cannot write a snapshot, trying again: %s", reason)
                self.snapshot_failure = reason

    def _write_snapshot(self) -> None:
        store, files = self._store, self._files

        def make() -> tuple[int, bytes]:
            store.changed = False
            return store.number, files.image(store, store.number)

        warm_up(self._run(store.image_size))
        try:
            number, image = self.between_landings(make)
            files.write_snapshot(number, image)
            if files.journaled:
                with self.turn:
                    files.journal.cut(number)
        except BaseException:
            store.changed = True
            raise

    def _renew(self) -> None:
        """After a disk fault: write a fresh snapshot and journal, then accept changes again.

        No record has a higher number than the snapshot, so that no refused record reappears.
        """
        with self.turn:
            number = self._number

            def make() -> bytes:
                self._store.number = number
                return self._files.image(self._store, number)

            if self._ledger.broken:
                raise DiskError(self._ledger.broken)
            self._files.renew(number, self._run(make))
            self._ledger.uncertain = False
            self._store.changed = False

    def heal(self) -> None:
        """Write a snapshot after a disk fault, or when the journal is gone or has become long."""
        if self._files.journaled and self.turn.acquire(blocking=False):
            try:
                with contextlib.suppress(DiskError):
                    self._files.journal.look()
            finally:
                self.turn.release()
        too_long = self._files.journal.size > JOURNAL_LIMIT
        if self._ledger.failure or self.snapshot_failure or too_long:
            self.snapshot()

    def flush(self) -> None:
        """Sync the changes that DURABILITY=interval has not synced yet."""
        if self._files.journaled:
            # After a DiskError the next change is refused, and heal() repairs.
            with self.turn, contextlib.suppress(DiskError):
                self._files.journal.flush()


def advance(work: Iterator[Any]) -> bool:
    """Advance a generator for SLICE_SECONDS. Whether it has ended."""
    until = time.perf_counter() + SLICE_SECONDS
    return all(time.perf_counter() <= until for _ in work)


def run_in_slices(run: Run, work: Iterator[Any]) -> None:
    """Have the owner advance a generator to its end, a slice at a time. For workers."""
    while not run(functools.partial(advance, work)):
        time.sleep(BREATH_SECONDS)


# ==================================================================================================
# gateway: rules, desired states and imports, interfaces as projections of the rows, limits, and the
# facade that http uses
#
# A rule returns the peer that the fields ask for, or raises a refusal; it changes nothing. The
# difference becomes a flight of the ledger. Rules run as the owner of the rows. Workers do the long
# work: the reading of an interface, a desired state, an import, a snapshot.
# Never here: SQL and HTTP.
# ==================================================================================================

_Row = TypeVar("_Row", bound=Sequence[Any])


class Outcome(NamedTuple):
    """The result of a request: the peer after it (before it, if deleted)."""

    changed: bool
    peer: Peer


# An operation of a batch: its name and decoded fields, or the error that decoding found.
BatchOperation = tuple[str, Mapping[str, Any]] | GatewayError
Reply = Callable[[Outcome | GatewayError], None]


class Desired(NamedTuple):
    """An element of a desired state: its place in the body, for errors, and its fields."""

    place: str
    fields: Mapping[str, Any]


class DesiredResult(NamedTuple):
    """How many peers a desired state changes."""

    created: int
    updated: int
    deleted: int
    unchanged: int


class SyncResult(NamedTuple):
    """How many peers a comparison of an interface with the rows changed."""

    added: int
    updated: int
    removed: int
    unchanged: int

    def __str__(self) -> str:
        return "peers: " + ", ".join(f"{number} {name}" for name, number in self._asdict().items())


def make_link(
    settings: InterfaceSettings, private_key: bytes, parameters: Obfuscation = PLAIN
) -> Link:
    """The wanted setup of an interface. Raises ValueError when S4 makes the MTU too small."""
    mtu = settings.mtu - parameters.s4
    if mtu < 1280:
        raise ValueError(
            f"S4: WG_MTU {settings.mtu} minus S4 is below 1280, the least that IPv6 needs"
        )
    subnets = settings.subnets.values()
    addresses = [f"{subnet.network_address + 1}/{subnet.prefixlen}" for subnet in subnets]
    addresses += [f"{address}/{128 if ':' in address else 32}" for address in settings.kept]
    name, port, mark = settings.name, settings.ports[0], settings.mark
    return Link(name, tuple(addresses), mtu, port, private_key, parameters, mark, settings.kind)


def read_parameters(given: str) -> ObfuscationState:
    """AWG_PARAMS: JSON, or the path of a file of parse_awg_file().

    Raises ConfigError, showing no value.
    """
    try:
        is_json = given.lstrip().startswith(("{", "[", '"'))
        if not is_json:
            check_private("AWG_PARAMS", given)
        text = given if is_json else Path(given).read_text("utf-8")
        return parse_obfuscation(parse_awg_file(text))
    except OSError as error:
        raise ConfigError(f"AWG_PARAMS: {given[:200]!r} cannot be read: {_reason(error)}") from None
    except json.JSONDecodeError:
        raise ConfigError("AWG_PARAMS: its value (not shown) is not JSON") from None
    except ValueError as error:
        raise ConfigError(f"AWG_PARAMS: {error}") from None


def initial_obfuscation(
    given: str | None, store: Store, interface: str
) -> tuple[ObfuscationState, bool]:
    """An obfuscated interface's parameters: from the state, from AWG_PARAMS, or random ones.

    The state comes first, because a restart must not undo a rotation. The second result says
    whether the state still lacks the parameters. Raises ConfigError, DamagedError.
    """
    wanted = read_parameters(given) if given else None
    try:
        kept = cast(ObfuscationState | None, store.meta("obfuscation"))
    except (ValueError, TypeError) as error:
        raise _damaged("the state", 0, f"AmneziaWG's parameters are not valid: {error}") from None
    chosen = kept or (wanted and wanted._replace(version=1))
    chosen = chosen or generate_obfuscation(None, DEFAULT_PRESET)
    for warning in obfuscation_warnings(chosen):
        LOG.warning("%s: %s", interface, warning)
    if kept is None:
        LOG.info("%s: new AmneziaWG parameters of generation %s", interface, chosen.generation)
    elif wanted is not None and kept != wanted._replace(version=kept.version):
        names = unlike(kept.parameters, wanted.parameters, Obfuscation._fields)
        LOG.warning(
            "AWG_PARAMS differs from the parameters of %s (%s) and has no effect: to change them, "
            "use `wggw awg rotate`",
            interface,
            ", ".join(names or ["generation"]),
        )
    return chosen, kept is None


class _placed:  # in lower case because it is used like a function
    """Adds to errors the place in the body. A generator would cost a desired state a tenth more."""

    __slots__ = ("_place",)

    def __init__(self, place: str) -> None:
        self._place = place

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, GatewayError):
            error.detail = f"{self._place}: {error.detail}"


NO_PEER = "no peer has this public key"


def pool_usage(given: Iterable[AddressPool | None]) -> dict[str, Any]:
    """The pools of one family added up, with the gateway's address in the first one."""
    pools = [pool for pool in given if pool is not None]
    total, used = sum(p.total for p in pools), sum(p.used - p.in_flight for p in pools)
    return {
        "total": total,
        "used": used,
        "available": total - used,
        "gateway_ip": str(pools[0].gateway) if pools else None,
    }


class Core:
    """The state that the parts of the gateway share."""

    def __init__(
        self, config: Config, store: Store, files: Files, clock: Callable[[], float], run: Run
    ) -> None:
        self.config, self.store, self.files = config, store, files
        self.clock, self.run = clock, run
        self.tunnels: dict[str, Tunnel] = {}
        self.classes = config.service_classes  # SIGHUP may change them
        self.class_table: ClassTable | None = None
        self.ledger = Ledger(run, files, self.tunnels)
        self.rules = Rules(self)


def set_link(
    flight: Flight, tunnel: Tunnel, private_key: bytes, state: ObfuscationState | None
) -> None:
    """Have a flight give an interface this key and these parameters. Raises ValueError."""
    link = make_link(tunnel.settings, private_key, state.parameters if state else PLAIN)
    flight.set_up(tunnel.name, link)
    flight.on_landed.append(lambda: tunnel.note_link(link, state))
    if state is not None:
        settings = {**flight.record.settings, "obfuscation": encode_state(state)}
        flight.record = flight.record._replace(settings=settings)


def online_since(now: float) -> int:
    """A peer with a handshake after this time (Unix seconds) is online."""
    return max(int(now) - ONLINE_SECONDS, 0)  # 0 is no handshake, also while the clock is at 1970


# --- rules ----------------------------------------------------------------------------------------

# Fields that a peer's row holds unchanged.
_PLAIN = (
    "dns",
    "port",
    "persistent_keepalive",
    "expires_at",
    "quota_bytes",
    "quota_period",
    "request_id",
    "label",
    "service_class",
    *ADDRESS_FIELD.values(),
)
# The families that a protocol names.
_PROTOCOLS: Mapping[str | None, tuple[str, ...]] = {
    None: (),
    "dual": FAMILIES,
    **{family: (family,) for family in FAMILIES},
}


class Rules:
    """Decide requests by rows and fields alone. Owner.

    A rule gets the peer that has the request's key, which is not in flight, and returns the peer
    after the request (None: deleted), or the same one if nothing changes. It raises Busy when it
    would refuse because of a flight, and GatewayError when it refuses.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._next_id = 1

    # --- one for each request --------------------------------------------------------------------

    def create(self, known: Peer | None, fields: Mapping[str, Any]) -> Peer:
        """Make a peer unless there is one."""
        if known is not None:
            return known
        peer, missing = self.new_peer(fields)
        self._core.ledger.check_addresses(None, peer)
        return self.assign(peer, missing)

    def set_status(self, peer: Peer, fields: Mapping[str, Any]) -> Peer:
        """Suspend or activate a peer; it may have that status already."""
        activates = fields["status"] == "active" and peer.status != "active"
        reason = self._over(peer) if activates else None
        if reason == "expired":
            raise Conflict(
                f"expires_at: the peer expired at {rfc3339(peer.expires_at or 0)}: set a later "
                "time or null"
            )
        if reason == "quota":
            raise Conflict(
                f"quota_bytes: the peer has used up its {peer.quota_bytes} bytes: reset its quota, "
                "or set a larger one or null"
            )
        return peer._replace(status=fields["status"], status_reason=None)

    def delete(self, peer: Peer, fields: Mapping[str, Any]) -> None:
        """Leave no peer."""

    def update(self, peer: Peer, fields: Mapping[str, Any]) -> Peer:
        """Change what a PATCH may change. New limits may end a suspension by the gateway."""
        self._check_choices(fields, self._core.tunnels[peer.interface])
        after = self._with_families(peer, fields)
        if fields.get("tunnel_traffic", ()) is None:
            fields = {**fields, "tunnel_traffic": _assigned(after)}
        families = fields.get("tunnel_traffic")
        if families is not None and not (families and set(families) <= set(_assigned(after))):
            raise Invalid("tunnel_traffic", "must name families that the peer has addresses in")
        after = _widened(peer, after)
        values = {n: v for n, v in _as_columns(fields).items() if n not in ADDRESS_FIELD.values()}
        return self.enforce_limits(after._replace(**values))

    def _with_families(self, peer: Peer, fields: Mapping[str, Any]) -> Peer:
        """The peer with an address in each family that `fields` name and it has none in."""
        tunnel = self._core.tunnels[peer.interface]
        asked = {name: fields[name] for name in ADDRESS_FIELD.values() if name in fields}
        given = {name: address for name, address in asked.items() if address != AUTO}
        for name, address in given.items():
            if getattr(peer, name) not in (None, address):
                raise Conflict(
                    f"{name}: the peer has another address, which never changes: omit the field, "
                    "or delete the peer and create it again"
                )
        named = [family for family in FAMILIES if ADDRESS_FIELD[family] in asked]
        named += _PROTOCOLS[fields.get("protocol")]
        families = _checked_families(named, fields, tunnel)
        after = peer._replace(**given)
        self._core.ledger.check_addresses(peer, after)
        return self.assign(after, _lacking(after, families))

    def reset_quota(self, peer: Peer, fields: Mapping[str, Any]) -> Peer:
        """Set the used quota to 0, which may end a suspension."""
        return self.enforce_limits(self.begin_quota(peer))

    def rotate(self, peer: Peer, fields: Mapping[str, Any]) -> Peer:
        """Give a peer a new key and keep everything else."""
        new = fields["new_public_key"]
        self._core.ledger.check(new)
        self._check_own_key(new, self._core.tunnels[peer.interface])
        if new != peer.public_key and self._core.store.get(new):
            raise Conflict("new_public_key: another peer has it: make a new key pair")
        return peer._replace(public_key=new)

    # --- parts of rules --------------------------------------------------------------------------

    def _new_id(self) -> int:
        """The id of the next new peer. Ids only grow while the process lives."""
        chosen = max(self._next_id, self._core.store.counts.next_id)
        self._next_id = chosen + 1
        return chosen

    def assign(self, peer: Peer, missing: Iterable[str], mine: Flight | None = None) -> Peer:
        """The peer with an address in each missing family: see Ledger.find_address()."""
        find = self._core.ledger.find_address
        found: dict[str, Any] = {ADDRESS_FIELD[f]: find(peer.interface, f, mine) for f in missing}
        return peer._replace(**found) if found else peer

    def check_usable(self, interface: str) -> None:
        """Raises Unavailable while the interface is known to differ from the rows."""
        if self._core.tunnels[interface].failure is not None:
            raise Unavailable(f"the interface {interface} is not usable: server/status says why")

    def _over(self, peer: Peer) -> str | None:
        """Why the peer may not be active: "expired", "quota", or None."""
        if peer.expires_at is not None and peer.expires_at <= self._core.clock():
            return "expired"
        if peer.quota_bytes is not None:
            used = self._core.store.traffic(peer.id).total - peer.quota_base
            if used > peer.quota_bytes:
                return "quota"
        return None

    def begin_quota(self, peer: Peer) -> Peer:
        """The peer with nothing of its quota used."""
        return peer._replace(quota_base=self._core.store.traffic(peer.id).total)

    def enforce_limits(self, peer: Peer) -> Peer:
        """The peer with the status that expiry and quota demand.

        A peer that a request suspended stays suspended.
        """
        if peer.status == "suspended" and peer.status_reason is None:
            return peer
        reason = self._over(peer)
        return peer._replace(
            status="active" if reason is None else "suspended", status_reason=reason
        )

    def new_peer(self, fields: Mapping[str, Any]) -> tuple[Peer, list[str]]:
        """A new peer, and the families in which it still needs an address."""
        tunnel = self._tunnel_for(fields)
        self.check_usable(tunnel.name)
        self._check_own_key(fields["public_key"], tunnel)
        own_values = self._own_values(fields, tunnel)
        named = {*fields.get("tunnel_traffic", ()), *_PROTOCOLS[fields.get("protocol")]} or {"ipv4"}
        named |= {family for family in FAMILIES if ADDRESS_FIELD[family] in fields}
        families = _checked_families(named, fields, tunnel)
        self._check_choices(fields, tunnel)
        values: dict[str, Any] = {
            "id": self._new_id(),
            "public_key": fields["public_key"],
            "interface": tunnel.name,
            "status": "active",
            "tunnel_traffic": ",".join(families),
            "persistent_keepalive": 25,
            "created_at": int(self._core.clock()),
            "obfuscation": own_values,
        }
        peer = Peer(**{**_NO_VALUES, **values, **_as_columns(fields)})
        return peer, _lacking(peer, families)

    @staticmethod
    def _check_own_key(public_key: str, tunnel: Tunnel) -> None:
        if public_key == tunnel.public_key:  # WireGuard ignores such a peer without an error
            raise Conflict("public_key: this is the gateway's own key: give the client's")

    def _check_choices(self, fields: Mapping[str, Any], tunnel: Tunnel) -> None:
        """Check values that depend on the settings or the time. Raises Invalid."""
        ports = tunnel.settings.ports
        if fields.get("port", ports[0]) not in ports:
            raise Invalid("port", f"must be one of {', '.join(map(str, ports))} for {tunnel.name}")
        choices = self._core.config.dns_servers
        if "dns" in fields and fields["dns"] not in choices:
            raise Invalid("dns", f"must be one of {', '.join(choices)}")
        classes, table = self._core.classes, self._core.class_table
        if (name := fields.get("service_class")) is not None:
            if not classes:
                raise Invalid("service_class", "there are no classes: SERVICE_CLASSES defines them")
            if name not in classes:
                raise Invalid("service_class", f"must be one of {', '.join(classes)}")
            if table is not None and table.failure:
                raise Unavailable(f"service_class: it cannot be enforced: {table.failure}")
        now, expires_at = self._core.clock(), fields.get("expires_at")
        if expires_at is not None and expires_at <= now:
            raise Invalid("expires_at", f"is in the past; the server's time is {rfc3339(now)}")

    def _tunnel_for(self, fields: Mapping[str, Any]) -> Tunnel:
        """The tunnel of the requested kind; without a request, the plain one or the only one."""
        asked: ObfuscationRequest | None = fields.get("obfuscation")
        obfuscated = asked is not None and asked.enabled
        for tunnel in self._core.tunnels.values():
            if (tunnel.obfuscation is not None) == obfuscated:
                return tunnel
        if asked is None:
            return next(iter(self._core.tunnels.values()))
        kind, setting = ("obfuscated", "AWG") if obfuscated else ("plain", "WG")
        raise Invalid(
            "obfuscation", f"this gateway has no {kind} interface: {setting}_INTERFACE adds one"
        )

    @staticmethod
    def _own_values(fields: Mapping[str, Any], tunnel: Tunnel) -> str | None:
        """A client's own values for Peer.obfuscation. Raises Conflict if shared values differ."""
        state = tunnel.obfuscation
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
                    f"interface {tunnel.name}: both sides must have the same"
                )
        own = {name: values[name] for name in AWG_OWN if name in values}
        if not own:
            return "{}"
        for group, rest in ((("jmin", "jmax"), state.parameters), (_PACKETS, PLAIN)):
            if own.keys() & set(group):  # a group comes from one side only
                own = {**{name: getattr(rest, name) for name in group}, **own}
        try:
            check_obfuscation(state.parameters._replace(**own))
            check_generation(PLAIN._replace(**own), state.generation)
        except ValueError as error:
            raise Invalid("obfuscation", str(error)) from None
        return encode_own_values(own)

    # --- elements of a desired state -------------------------------------------------------------

    def wished(self, known: Peer, fields: Mapping[str, Any]) -> tuple[Peer, Sequence[str]]:
        """A known peer as an element wants it, and the families in which it lacks an address.

        Fields that the element does not name keep their values.
        """
        tunnel = self._core.tunnels[known.interface]
        if fields.get("interface", known.interface) != known.interface:
            raise Conflict(
                f"interface: the peer is on {known.interface}, and peers never move: omit the "
                "field, or delete the peer first"
            )
        asked: ObfuscationRequest | None = fields.get("obfuscation")
        if asked is not None and asked.enabled != (tunnel.obfuscation is not None):
            kind = "a plain" if asked.enabled else "an obfuscated"
            raise Conflict(
                f"obfuscation: the peer is on {known.interface}, {kind} interface, and peers never "
                "move: omit the field, or delete the peer first"
            )
        values, chosen = _as_columns(fields), known
        if "dns" in values or "port" in values:
            chosen = tunnel.with_defaults(known, self._core.config)
        changed = {name: v for name, v in values.items() if v != getattr(chosen, name)}
        named = [*fields.get("tunnel_traffic", ()), *_PROTOCOLS[fields.get("protocol")]]
        if not changed and not _lacking(known, named):
            return self._with_status(known, fields.get("status")), ()  # the usual case
        named_in_settings = ("dns", "port", "service_class")
        self._check_choices({n: changed[n] for n in named_in_settings if n in changed}, tunnel)
        named += [family for family in FAMILIES if ADDRESS_FIELD[family] in changed]
        named = _checked_families(named, fields, tunnel)
        after = known._replace(**changed) if changed else known
        missing = _lacking(after, named)
        if not fields.get("tunnel_traffic"):
            after = _widened(known, after, missing)
        return self._with_status(after, fields.get("status")), missing

    def wished_new(self, fields: Mapping[str, Any]) -> tuple[Peer, Sequence[str]]:
        """A new peer from an element. Unlike a create, the element may have expired already."""
        name = fields.get("interface")
        if name is not None and name not in self._core.tunnels:
            raise Invalid("interface", f"must be one of {', '.join(self._core.tunnels)}")
        timeless = {name: value for name, value in fields.items() if name != "expires_at"}
        peer, missing = self.new_peer(timeless)
        if name not in (None, peer.interface):
            raise Conflict(
                f"interface: a peer with this obfuscation must be on {peer.interface}: name that "
                "one, or change obfuscation"
            )
        peer = peer._replace(expires_at=fields.get("expires_at"))
        return self._with_status(peer, fields.get("status")), missing

    def _with_status(self, peer: Peer, status: str | None) -> Peer:
        """The peer with the status that the element, expiry and quota demand."""
        if status == "suspended":
            reason = peer.status_reason
            if reason is not None and self._over(peer) != reason:
                reason = None  # the reason stays only while it holds
            return peer._replace(status="suspended", status_reason=reason)
        if status == "active" and peer.status != "active":
            peer = peer._replace(status="active", status_reason=None)
        if peer.expires_at is None and peer.quota_bytes is None and peer.status_reason is None:
            return peer
        return self.enforce_limits(peer)


def _assigned(peer: Peer) -> list[str]:
    return [family for family in FAMILIES if getattr(peer, ADDRESS_FIELD[family])]


def _lacking(peer: Peer, families: Iterable[str]) -> list[str]:
    return [family for family in families if getattr(peer, ADDRESS_FIELD[family]) is None]


def _widened(before: Peer, after: Peer, missing: Sequence[str] = ()) -> Peer:
    """The peer with its new families, `missing` ones too, in the tunnel if all former ones were."""
    if before.tunnel_traffic != ",".join(_assigned(before)):
        return after
    families = [family for family in FAMILIES if family in (*_assigned(after), *missing)]
    return after._replace(tunnel_traffic=",".join(families))


def _as_columns(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a peer's row that fields set."""
    values = {name: value for name, value in fields.items() if name in _PLAIN}
    if fields.get("tunnel_traffic"):
        values["tunnel_traffic"] = ",".join(fields["tunnel_traffic"])
    if "preshared_key" in fields:
        key = fields["preshared_key"]
        values["preshared_key"] = None if key == NO_KEY else key
    return values


def differing(peer: Peer, fields: Mapping[str, Any]) -> list[str]:
    """The fields of a create that differ from the existing peer."""
    found = [name for name, value in _as_columns(fields).items() if value != getattr(peer, name)]
    if _lacking(peer, _PROTOCOLS[fields.get("protocol")]):
        found.append("protocol")
    asked: ObfuscationRequest | None = fields.get("obfuscation")
    own = decode_own_values(peer.obfuscation or "{}")
    if asked is not None and (
        asked.enabled != (peer.obfuscation is not None)
        or any(asked.values[name] != own.get(name) for name in AWG_OWN if name in asked.values)
    ):
        found.append("obfuscation")
    return sorted(found)


def _checked_families(
    named: Container[str], fields: Mapping[str, Any], tunnel: Tunnel
) -> list[str]:
    """The named families. Raises Invalid, which names the field, when the interface lacks one."""
    protocol, traffic = fields.get("protocol"), fields.get("tunnel_traffic")
    families = [family for family in FAMILIES if family in named]
    for family in families:
        if family not in tunnel.settings.subnets:
            blame = "tunnel_traffic" if family in (traffic or ()) else ADDRESS_FIELD[family]
            if blame not in fields or family in _PROTOCOLS[protocol]:
                blame = "protocol"
            raise Invalid(
                blame,
                f"{tunnel.name} has no {family} addresses: "
                f"{tunnel.settings.prefix}_{family.upper()}_SUBNET gives it some",
            )
    return families


# --- bulk changes ---------------------------------------------------------------------------------


class Bulk:
    """A flight that a worker assembles in slices. Without land() it is abandoned.

    Only requests about keys that it has marked wait for it.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self.flight = Flight()

    def __enter__(self) -> Bulk:
        self._core.run(lambda: self._core.ledger.open(self.flight))
        return self

    def __exit__(self, *_: object) -> None:
        if not self.flight.done:
            run_in_slices(self._core.run, self._core.ledger.release(self.flight, refused=True))

    def each(self, items: Sequence[_T], work: Callable[[_T], None]) -> None:
        """Do some work for each item, in slices. Items that raise Busy wait for that flight."""
        busy_items: list[tuple[_T, Flight]] = []

        def steps() -> Iterator[None]:
            for item in items:
                try:
                    work(item)
                except Busy as busy:
                    if busy.flight is not self.flight:
                        busy_items.append((item, busy.flight))
                yield

        while items:
            run_in_slices(self._core.run, steps())
            for _, flight in busy_items:
                wait_for(self._core.run, flight)
            items = [item for item, _ in busy_items]
            busy_items.clear()

    def land(self) -> None:
        """Land the steps and everything else that the flight has. Raises GatewayError."""
        self.flight.complete()
        if self.flight.changes or not self.flight.record.is_empty():
            self._core.ledger.land(self.flight)


def free(*lists: Any) -> None:
    """Empty lists one object at a time: to free 60,000 at once would stall all threads."""
    for items in lists:
        while items:
            items.pop()


def chunks(
    run: Run,
    read: Callable[..., Sequence[_Row]],
    *arguments: Any,
    after: Any = 0,
    limit: int = READ_CHUNK,
) -> Iterator[_Row]:
    """All rows of read(*arguments, first column of the last row, limit), in turns. For workers."""
    while True:
        rows = run(functools.partial(read, *arguments, after, limit))
        yield from rows
        if not rows:
            return
        after = rows[-1][0]


class Wish(NamedTuple):
    """A peer before a desired state (None: it is new) and after it, and the element's place.

    `missing` holds the families in which `after` still needs an address.
    """

    before: Peer | None
    after: Peer
    missing: Sequence[str]
    place: str


class DesiredState:
    """Makes the peers those of a list, as one flight: all of it or nothing.

    It first compares without marking anything. Then it marks the keys of the peers that differ, and
    decides each again: last writer wins, so the desired state overrides changes that were made
    meanwhile, a rotated key included. Its new peers can take addresses that the same flight frees.
    """

    def __init__(self, core: Core, desired: dict[str, Desired]) -> None:
        self._core = core
        self._bulk = Bulk(core)
        self._desired = desired
        self._keys = frozenset(desired)
        self._leaving: list[int] = []  # ids
        self._differing: list[tuple[int, str, Desired]] = []  # id (0: a new peer), key
        self._wishes: list[Wish] = []
        self._touched: set[str] = set()  # keys in flight since the comparison began
        self._unchanged = self._deleted = 0

    def perform(self, dry_run: bool, allow_mass_delete: bool) -> DesiredResult:
        """Raises GatewayError, with nothing changed."""
        with self._core.ledger.watch() as self._touched, self._bulk as bulk:
            self._compare()
            bulk.each(self._leaving, self._leave)
            bulk.each(self._differing, self._wish)
            total = self._core.run(self._core.store.counts.total)
            if self._deleted * 2 > total and not allow_mass_delete and not dry_run:
                raise Conflict(
                    f"this would delete {self._deleted} of {show_peers(total)}: "
                    "if you want that, repeat it with allow_mass_delete=true"
                )
            bulk.each(self._wishes, self._take_named)
            bulk.each(self._wishes, self._take_any)
            if not dry_run:
                bulk.land()
        created = sum(wish.before is None for wish in self._wishes)
        updated = len(self._wishes) - created
        flight = bulk.flight
        free(self._differing, self._wishes, flight.steps, flight.record.put)
        free(*flight.changes.values())
        return DesiredResult(created, updated, self._deleted, self._unchanged)

    def _compare(self) -> None:
        """Find the peers that differ. Peers that are made after the comparison began stay."""
        newest = self._core.run(lambda: self._core.store.counts.next_id)
        for _ in chunks(self._core.run, self._compare_some, newest, limit=APPLY_SLICE):
            pass
        self._differing += [(0, key, wanted) for key, wanted in self._desired.items()]
        self._desired.clear()

    def _compare_some(self, newest: int, after: int, limit: int) -> Sequence[Peer]:
        peers = self._core.store.peers_after(after, limit)
        for known in peers:
            wanted = self._desired.pop(known.public_key, None)
            if wanted is None:
                if known.id < newest:
                    self._leaving.append(known.id)
                continue
            with _placed(wanted.place):
                after_it, missing = self._core.rules.wished(known, wanted.fields)
            if after_it == known and not missing:
                self._unchanged += 1
            else:
                self._differing.append((known.id, known.public_key, wanted))
        return peers

    def _leave(self, number: int) -> None:
        """Delete a peer that is not in the list, whatever its key is now."""
        peer = self._core.store.by_id(number)
        if peer is None or peer.public_key in self._keys:
            return
        self._core.ledger.check(peer.public_key)
        self._core.rules.check_usable(peer.interface)
        self._core.ledger.add(self._bulk.flight, Step(peer, None))
        self._deleted += 1

    def _wish(self, item: tuple[int, str, Desired]) -> None:
        number, key, wanted = item
        self._core.ledger.check(key)
        is_new = not number and key not in self._touched  # and then no row has this key
        known = None if is_new else self._core.store.get(key)
        if number and (known is None or known.id != number):
            self._leave(number)
        with _placed(wanted.place):
            if known is None:
                after, missing = self._core.rules.wished_new(wanted.fields)
            else:
                after, missing = self._core.rules.wished(known, wanted.fields)
                if after == known and not missing:
                    self._unchanged += 1
                    return
                self._core.rules.check_usable(known.interface)
        self._core.ledger.mark(self._bulk.flight, key)
        self._wishes.append(Wish(known, after, missing, wanted.place))
        self._bulk.flight.freed.update(dict.fromkeys(_gained(after, known)))

    def _take_named(self, wish: Wish) -> None:
        """Take the addresses that an element names."""
        ledger, flight = self._core.ledger, self._bulk.flight
        with _placed(wish.place):
            named = ledger.check_addresses(wish.before, wish.after, flight)
        for address in named:
            ledger.claim(flight, address)

    def _take_any(self, wish: Wish) -> None:
        """Take an address in each missing family: a free one, or one that the flight frees."""
        flight = self._bulk.flight
        with _placed(wish.place):
            after = self._core.rules.assign(wish.after, wish.missing, flight)
        for address in _gained(wish.after, after):
            self._core.ledger.claim(flight, address)
        flight.steps.append(Step(wish.before, after))


class Import:
    """Replaces the whole state by another one, as one flight.

    The flight has the peers that differ and all traffic totals; nothing else is decided before it
    has landed. An interface gets the key that the other state's peers know if `replace_key` is
    true. It keeps its own if `replace_key` is false; None refuses keys that differ, and another
    gateway's state in place of peers.
    """

    def __init__(self, core: Core, other: Store, replace_key: bool | None) -> None:
        """Raises Conflict, when the other state does not fit here."""
        self._core = core
        self._other = other
        self._check()
        self._pools = {name: tunnel.make_pools(other) for name, tunnel in core.tunnels.items()}
        self._known_keys = self._find_known_keys()
        self._keys: dict[str, bytes] = {}  # the private keys that interfaces get
        differing = [n for n, k in self._known_keys.items() if k != core.tunnels[n].public_key]
        for name in differing:
            self._choose_key(core.tunnels[name], self._known_keys[name], replace_key)
        if replace_key is None:
            self._check_lineage()
        self.cut = self._count_cut({name for name in differing if name not in self._keys})

    def _check(self) -> None:
        core = self._core
        config = replace(core.config, service_classes=core.classes, move_peers=False)
        for found in look_at_stored(Host(config, self._other)):
            raise Conflict(f"the snapshot does not fit: {found.subject}: {found.found}")
        for tunnel in core.tunnels.values():
            if self._other.get(tunnel.public_key):
                raise Conflict(
                    f"the snapshot has the key of {tunnel.name} itself as a peer: delete that peer "
                    "on the gateway that the snapshot is of, and export again"
                )

    def _find_known_keys(self) -> dict[str, str]:
        """By interface: the public key that the other state's peers know, if the state has it."""
        other, names = self._other, self._core.tunnels
        sealed = {n: key for n, key in other.private_keys.items() if n in names}
        known = {n: encode_key(x25519_public(decode_key(key))) for n, key in sealed.items()}
        known |= other.public_keys()
        return {n: key for n, key in known.items() if n in names and other.counts.on(n)}

    def _choose_key(self, tunnel: Tunnel, public: str, replace_key: bool | None) -> None:
        name = tunnel.name
        mine = self._core.run(lambda: self._core.store.counts.on(name))
        theirs = self._other.counts.on(name)
        if replace_key is None:
            raise Conflict(
                f"replace_key: the configurations of the snapshot's {show_peers(theirs)} on "
                f"{name} name the public key {public}, and this node's is {tunnel.public_key}: "
                f"replace_key=true gives {name} the snapshot's key (and cuts off the "
                f"{show_peers(mine)} here), replace_key=false keeps this node's (and cuts off "
                f"the snapshot's {theirs} until they have new configurations)"
            )
        if replace_key:
            key = clamp(decode_key(self._other.private_keys.get(name, NO_KEY)))
            if encode_key(x25519_public(key)) != public:
                raise Conflict(
                    f"replace_key: the snapshot does not hold the private key of {name}: put "
                    f"it into {tunnel.settings.private_key_file} and restart, then import"
                )
            self._keys[name] = key

    def _check_lineage(self) -> None:
        """Refuse another gateway's state while there are peers here. Raises Conflict."""
        mine = self._core.run(self._core.store.counts.total)
        here, there = self._core.store.lineage, self._other.lineage
        if mine and here != there and not {here, there} & {"", NO_LINEAGE}:
            raise Conflict(
                f"replace_key: the snapshot is another gateway's: its lineage is {there}, and this "
                f"one's is {here}. It would replace the {show_peers(mine)} here by its "
                f"{self._other.counts.total()}: check the file, or, if you want that, give "
                "replace_key=false, with which the interfaces keep their keys, or replace_key=true"
            )

    def _count_cut(self, kept: set[str]) -> int:
        """How many peers need new configurations, or are here and not in the other state.

        `kept` are the interfaces that keep a key which the other state's peers do not know.
        """
        core, other = self._core, self._other
        state: ObfuscationState | None = other.meta("obfuscation")
        changed = set(self._keys)
        for name, tunnel in core.tunnels.items():
            mine = tunnel.obfuscation
            if mine and state and not same_language(mine.parameters, state.parameters):
                changed.add(name)

        def place(peer: Peer) -> tuple[str | None, ...]:
            return peer.interface, peer.assigned_ip, peer.assigned_ipv6, peer.preshared_key

        cut = sum(other.counts.on(name) for name in kept)
        for peer in chunks(core.run, core.store.peers_after):
            same = other.get(peer.public_key)
            if same is None or same.interface not in kept:  # otherwise it is counted above
                cut += same is None or peer.interface in changed or place(peer) != place(same)
        return cut

    def perform(self) -> None:
        """Raises GatewayError, with nothing changed: the key files are as before, too."""
        tunnels = self._core.tunnels
        before = {name: tunnels[name].link.private_key for name in self._keys}
        try:
            # The files come first: after a crash before the record, the old state still has the
            # old key, and the start says what to do.
            for name, key in self._keys.items():
                self._write_key(tunnels[name].settings, key)
            self._land()
        except BaseException:
            for name, key in before.items():
                with contextlib.suppress(Conflict):
                    self._write_key(tunnels[name].settings, key)
            raise

    @staticmethod
    def _write_key(settings: InterfaceSettings, key: bytes) -> None:
        try:
            if load_private_key(settings) != key:
                content = encode_key(key).encode("ascii")
                Disk().replace(settings.private_key_file, [content, b"\n"])
        except (OSError, ConfigError) as error:
            reason = str(error) if isinstance(error, ConfigError) else _reason(error)
            raise Conflict(
                f"replace_key: the key of {settings.name} cannot be put into "
                f"{settings.private_key_file}: {reason}: move that file to the directory of "
                "DB_PATH, where the gateway may write, name it in "
                f"{settings.prefix}_PRIVATE_KEY_FILE, and restart"
            ) from None

    def _land(self) -> None:
        core, other = self._core, self._other
        with contextlib.ExitStack() as stack:
            for tunnel in core.tunnels.values():  # a reading must not span the import
                stack.enter_context(tunnel.reading)
            bulk = stack.enter_context(Bulk(core))
            # A state without public keys gets this gateway's.
            own = {name: tunnel.public_key for name, tunnel in core.tunnels.items()}
            settings = {"public_keys": json.dumps({**own, **self._known_keys})}
            if (periods := other.meta("periods")) is not None:
                settings["periods"] = json.dumps(periods)
            flight = bulk.flight
            flight.record = Record(settings=settings, released=other.released.addresses())
            self._set_links(flight)

            def begin() -> list[Flight]:
                """Decide nothing else from now on. Returns the flights that must land first."""
                core.ledger.exclusive = flight
                return [earlier for earlier in core.ledger.airborne if earlier is not flight]

            for earlier in core.run(begin):
                core.run(core.ledger.check_disk)  # or an earlier flight may wait for the disk
                wait_for(core.run, earlier)
            core.run(core.ledger.check_disk)
            flight.record = flight.record._replace(traffic=self._compare(bulk))
            flight.on_landed.append(self._note)
            bulk.land()

    def _set_links(self, flight: Flight) -> None:
        """A state without AmneziaWG's parameters keeps this gateway's. Raises Conflict."""
        for name, tunnel in self._core.tunnels.items():
            mine, state = tunnel.obfuscation, None
            if mine is not None:
                state = cast(ObfuscationState, self._other.meta("obfuscation") or mine)
                # Where there are clients, no two sets may have the same version.
                if self._core.run(functools.partial(self._core.store.counts.on, name)):
                    is_same = same_language(mine.parameters, state.parameters)
                    version = max(mine.version + (not is_same), state.version)
                    state = state._replace(version=version)
            if state is not None or name in self._keys:
                key = self._keys.get(name, tunnel.link.private_key)
                try:
                    set_link(flight, tunnel, key, state)
                except ValueError as error:
                    raise Conflict(f"the snapshot's parameters do not fit here: {error}") from None

    def _compare(self, bulk: Bulk) -> list[TrafficRow]:
        """Add the steps that make the peers those of the other state. Returns the new totals."""
        store, other = self._core.store, self._other
        theirs = {peer.id: peer for peer in other.peers_after(0, MAX_INTEGER)}
        mine = chunks(self._core.run, store.peers_after)
        pairs = [Step(peer, theirs.pop(peer.id, None)) for peer in mine]
        pairs += [Step(None, wanted) for wanted in theirs.values()]
        traffic: list[TrafficRow] = []

        def compare(step: Step) -> None:
            before, wanted = step
            if before != wanted:
                bulk.flight.steps.append(step)
            if wanted is None:
                return
            seen = TrafficRow(wanted.id)
            if before and _counted_by(before) == _counted_by(wanted):  # its counters go on
                seen = store.traffic(wanted.id)
            row = other.traffic(wanted.id)
            traffic.append(row._replace(rx_seen=seen.rx_seen, tx_seen=seen.tx_seen))

        bulk.each(pairs, compare)
        return traffic

    def _note(self) -> None:
        for name, tunnel in self._core.tunnels.items():
            tunnel.pools = self._pools[name]
            tunnel.known = set()  # the totals have changed
            tunnel.note_clients_key(self._core.store, self._other.private_keys.get(name))


# --- the interfaces and limits --------------------------------------------------------------------


Counted = tuple[str, TrafficRow, TrafficRow]  # a key, its row of `traffic` before and after


def note_seen(seen: dict[str, Seen], row: Sequence[Any]) -> None:
    """Note a peer's counters, given its row of Queries.counted(), if there are any."""
    key, number, rx, tx = row[0], row[5], row[8], row[9]
    if rx or tx:
        seen[key] = number, rx, tx


class Comparison:
    """An interface as it was read, and what differs from the rows. For workers.

    `touched` collects the keys that were in flight when the reading began, or later: for those the
    reading is stale.
    """

    def __init__(self, core: Core, tunnel: Tunnel, reading: Reading, touched: set[str]) -> None:
        self._core, self._tunnel, self._touched = core, tunnel, touched
        self.reading = reading
        self._others: set[str] = set()  # keys that account() finds not to be as in the rows
        self.is_unsure = False  # difference() found none, but touched peers may hide missing ones

    def repair(self) -> SyncResult:
        """Make the interface equal to the rows, then add its counters to the totals.

        One scan of the rows finds the differences and the new totals, in half the time that
        account() takes for the totals alone. Raises BackendError.
        """
        core, name, reading = self._core, self._tunnel.name, self.reading
        states = {state.peer.public_key: state for _, state in reading.changed}
        present = len(states)
        plan: list[tuple[str, Change]] = []
        seen: dict[str, Seen] = {}
        totals: list[Counted] = []
        for row in chunks(core.run, core.store.queries.wire_rows, name):
            if row[1] is None:  # it is not active, or not here
                continue
            peer = encode_wire(*row[1:6])
            state = states.pop(peer.public_key, None)
            if state is None:
                note_seen(seen, row[1:])
                plan.append(("added", Change(peer.public_key, peer)))
            else:
                self._count(totals, state, row[1:])
                if state.peer != peer:
                    plan.append(("updated", Change(peer.public_key, peer)))
        # Removals come first: an address may have moved from a removed peer to another one.
        plan[:0] = [("removed", Change(key, None)) for key in states]
        with Bulk(core) as bulk:
            bulk.flight.needs_disk = False
            if self._tunnel.must_set_up or reading.device_differs(self._tunnel.link):
                bulk.flight.set_up(name, None)
            # Peers that cannot be read may be among those that seem to be missing.
            done = self._change(bulk, plan, seen, anew=bool(reading.unreadable))
            _land(self._tunnel, bulk.land)
            if present and len(plan) <= MAX_REPAIRS_LOGGED:  # filling an empty one is no repair
                for key, what in done.items():
                    LOG.info("%s: repair: %s %s", name, short_key(key), what)
        flights: list[Flight] = []
        for start in range(0, len(totals), READ_CHUNK):
            some = totals[start : start + READ_CHUNK]
            flights += core.run(functools.partial(self._submit, some))
        self._wait(flights)
        added, updated, removed = map(list(done.values()).count, ("added", "updated", "removed"))
        return SyncResult(added, updated, removed, present - updated - removed)

    def _change(
        self,
        bulk: Bulk,
        plan: Sequence[tuple[str, Change]],
        seen: Mapping[str, Seen],
        anew: bool,
    ) -> dict[str, str]:
        """Put changes into a flight, except those of touched peers. Returns what was done, by key.

        Counters of added peers, which are in `seen`, restart at 0. With `anew` these peers are
        removed first, because the interface may have them.
        """
        flight = bulk.flight
        done: dict[str, str] = {}
        restart: list[tuple[int, int, int]] = []

        def change(entry: tuple[str, Change]) -> None:
            what, wanted = entry
            key = encode_key(wanted.public_key)
            if key in self._touched:
                return
            self._core.ledger.mark(flight, key)
            self._touched.discard(key)
            done[key] = what
            changes = flight.changes[self._tunnel.name]
            if row := seen.get(key):
                restart.append(row if anew else (row[0], 0, 0))
            if what == "added" and anew:
                changes.append(Change(wanted.public_key, None))
            changes.append(wanted)

        bulk.each(plan, change)
        flight.record = Record(restart=restart)
        return done

    def difference(self) -> str:
        """How the interface differs after account(), as far as the reading tells; "" if equal."""
        reading, touched = self.reading, self._touched
        if reading.device_differs(self._tunnel.link):
            return "its key, port or parameters are not ours"
        if others := len(self._others - touched):
            return f"somebody changed {show_peers(others)}"
        if len(touched) > READ_CHUNK:
            self.is_unsure = True
            return ""
        store, name = self._core.store, self._tunnel.name

        def expect() -> tuple[set[bytes], int]:
            """The touched peers' keys, and how many other peers there should be."""
            there = store.queries.counted(name, list(touched))
            return set(map(decode_key, touched)), store.counts.peers[name, "active"] - len(there)

        stale, expected = self._core.run(expect)
        found = reading.peers - sum(s.peer.public_key in stale for _, s in reading.changed)
        # Touched peers may still be among the known ones, which makes the number too high.
        most = expected + min(len(stale), reading.peers - len(reading.changed))
        if not expected <= found <= most:
            return f"it has {show_peers(found)} instead of {expected}"
        self.is_unsure = expected < most
        return ""

    def account(self) -> set[int] | None:
        """Add the counters to the totals.

        Returns the fingerprints of the peers that are as in the rows. If something could not be
        added it returns None: the next sample must read all peers again.
        """
        core, flights, changed = self._core, list[Flight](), self.reading.changed
        known, query = self.reading.same, core.store.queries.counted
        for start in range(0, len(changed), READ_CHUNK):
            some = changed[start : start + READ_CHUNK]
            states = {encode_key(state.peer.public_key): (mark, state) for mark, state in some}
            rows = core.run(functools.partial(query, self._tunnel.name, list(states)))
            counted: list[Counted] = []
            right: dict[str, int] = {}
            for key, (mark, state) in states.items():
                if row := rows.get(key):
                    self._count(counted, state, row)
                    if encode_wire(*row[:5]) == state.peer:
                        right[key] = mark
            flights += core.run(functools.partial(self._submit, counted))
            right = {key: mark for key, mark in right.items() if key not in self._touched}
            known.update(right.values())
            self._others |= states.keys() - right.keys()
        return known if self._wait(flights) else None

    def _wait(self, flights: list[Flight]) -> bool:
        """Wait for these flights. Whether all have landed."""
        all_landed = True
        while flights:  # one by one: see free()
            all_landed = wait_for(self._core.run, flights.pop()) is None and all_landed
        return all_landed

    def _count(self, counted: list[Counted], state: PeerState, row: Sequence[Any]) -> None:
        """Note a peer's new totals, given its row of Queries.counted(), if they have changed."""
        shown = before = TrafficRow._make(row[5:])
        seen = self._core.store.restarted.get(before.id)
        if seen and state.rx_bytes >= seen[0] and state.tx_bytes >= seen[1]:
            before = before._replace(rx_seen=seen[0], tx_seen=seen[1])
        after = before.counted(state.rx_bytes, state.tx_bytes, state.last_handshake)
        if after != shown:
            counted.append((row[0], before, after))

    def _submit(self, counted: Sequence[Counted]) -> list[Flight]:
        """Land the totals that changed, except those of touched peers. Owner."""
        changed = [(old, new) for key, old, new in counted if key not in self._touched]
        if not changed:
            return []
        flight, ledger, tunnel = Flight(), self._core.ledger, self._tunnel
        flight.record = Record(traffic=[new for _, new in changed])
        received = sum(new.rx_bytes - old.rx_bytes for old, new in changed)
        sent = sum(new.tx_bytes - old.tx_bytes for old, new in changed)
        flight.on_landed.append(lambda: tunnel.count(received, sent))
        if ledger.failure:
            flight.give(Unavailable("nothing can be counted now"))  # the next sample counts it
        else:
            ledger.submit(flight)
        return [flight]

    def scrub(self) -> None:
        """Make the interface forget the endpoints of peers without a handshake for PRIVACY_SCRUB s.

        Only removing a peer does that; the same message adds it again. Its counters restart after
        those that account() has just added, and difference() has found none. Raises BackendError.
        """
        tunnel = self._tunnel
        limit = int(self._core.clock()) - self._core.config.privacy_scrub
        before, tunnel.newborn = tunnel.newborn, set()
        plan: list[tuple[str, Change]] = []
        for _, (peer, last_handshake, *_, located) in self.reading.changed:
            if not located or last_handshake > limit:
                continue
            if not last_handshake and peer.public_key not in before:
                tunnel.newborn.add(peer.public_key)  # it may be in its first handshake
                continue
            plan.append(("added", Change(peer.public_key, peer)))
        if plan:
            seen: dict[str, Seen] = {}
            query = self._core.store.queries.counted
            for start in range(0, len(plan), READ_CHUNK):
                some = plan[start : start + READ_CHUNK]
                keys = [encode_key(change.public_key) for _, change in some]
                for row in self._core.run(functools.partial(query, tunnel.name, keys)).values():
                    note_seen(seen, row)
            with Bulk(self._core) as bulk:
                done = self._change(bulk, plan, seen, anew=True)
                _land(tunnel, bulk.land)
            LOG.debug("%s: forgot the endpoints of %s", tunnel.name, show_peers(len(done)))


class Projection:
    """Keeps the interfaces equal to the rows, and counts their traffic. For workers."""

    def __init__(self, core: Core, limits: Limits) -> None:
        self._core = core
        self._limits = limits
        self.failure: str | None = None  # why the last sample is not complete
        self._next_try = 0.0  # when supervise() repeats it (monotonic)

    @contextlib.contextmanager
    def _compared(self, tunnel: Tunnel, everything: bool) -> Iterator[Comparison]:
        """Read an interface: `everything`, or without the peers that a sample found to be right.

        Raises BackendError.
        """
        with tunnel.reading, self._core.ledger.watch() as touched:
            known, tunnel.known = tunnel.known, set()
            reading = self._read(tunnel, () if everything else known)
            compared = Comparison(self._core, tunnel, reading, touched)
            yield compared
            free(reading.changed)

    def _read(self, tunnel: Tunnel, known: Container[int]) -> Reading:
        """Read an interface. Landings on it wait if it would make them wait: see Lander."""
        if tunnel.backend.kind != "uapi":
            return tunnel.backend.read(known)
        ledger, flight = self._core.ledger, Flight()
        # The reading begins between two landings.
        flight.on_landed.append(functools.partial(setattr, tunnel, "is_read", True))
        _land(tunnel, lambda: ledger.land(flight))
        try:
            reading = tunnel.backend.read(known)
            tunnel.is_silent = False
            return reading
        except NoAnswer:
            tunnel.is_silent = True
            raise
        finally:
            tunnel.is_read = False
            ledger.waiting.put([])  # the lander looks again

    def reconcile(self, name: str | None = None) -> SyncResult:
        """Make one interface or all equal to the rows, changing only what differs.

        A failing interface does not stop the others. Raises BackendError at the end.
        """
        chosen = [t for t in self._core.tunnels.values() if name in (None, t.name)]
        results = _each(chosen, self._reconcile)
        return SyncResult(*(sum(column) for column in zip(*results, strict=True)))

    @collector_off()
    def _reconcile(self, tunnel: Tunnel) -> SyncResult:
        """Compare everything that the gateway sets, and repair it. Raises BackendError."""
        failures = tunnel.failures
        with self._compared(tunnel, everything=True) as compared:
            result = compared.repair()

        def cleared() -> None:  # unless the interface failed again meanwhile
            if tunnel.failures == failures:
                tunnel.failure = None

        self._core.run(cleared)
        return result

    def sample(self) -> None:
        """Add every interface's counters to the rows, and check peers that changed.

        Raises BackendError.
        """
        try:
            _each(self._core.tunnels.values(), self._sample)
            self.failure = None
        except BackendError as error:
            self.failure, self._next_try = str(error), time.monotonic() + SAMPLE_RETRY
            raise
        finally:
            self._limits.enforce_quotas()

    @collector_off()
    def _sample(self, tunnel: Tunnel) -> None:
        scrubbing = bool(self._core.config.privacy_scrub)
        everything = scrubbing or tunnel.unsure >= UNSURE_SAMPLES
        with self._compared(tunnel, everything) as compared:
            known = compared.account()
            tunnel.known = known or set()
            wrong = compared.difference()
            tunnel.unsure = 0 if everything else (tunnel.unsure + 1) * compared.is_unsure
            if scrubbing and known is not None and not wrong:
                compared.scrub()
        tunnel.rate()
        if wrong and tunnel.failure is None:
            LOG.warning("%s: %s: it is being repaired", tunnel.name, wrong)
            self._core.run(functools.partial(tunnel.fail, wrong))
            tunnel.must_set_up = False
            LOG.info("%s: %s", tunnel.name, self._reconcile(tunnel))
        if unreadable := compared.reading.unreadable:
            raise BackendError(f"{tunnel.name}: {show_peers(unreadable)} cannot be read")

    def supervise(self) -> None:
        """Recreate an interface that is gone, and repair one that failed; repeat a failed sample.

        Addresses that the host has got since the start are kept from peers. Raises BackendError.
        """
        if self._core.config.wg_backend != "memory":
            # What fails here makes alive() fail, too.
            with contextlib.suppress(BackendError, OSError), contextlib.closing(Route()) as route:
                own = [str(address.ip) for address in route.addresses(None)]

                def exclude() -> None:
                    for tunnel in self._core.tunnels.values():
                        for pool in tunnel.pools.values():
                            pool.exclude(own)

                self._core.run(exclude)
        for tunnel in self._core.tunnels.values():
            try:
                self._supervise(tunnel)
            except BackendError as error:
                self._core.run(functools.partial(tunnel.suspect, str(error)))
        if self.failure is not None and time.monotonic() >= self._next_try:
            self.sample()

    def _supervise(self, tunnel: Tunnel) -> None:
        if not tunnel.backend.alive():
            tunnel.must_set_up = True
            if tunnel.failure is None:
                LOG.warning("%s: the interface is gone or down: setting it up", tunnel.name)
                self._core.run(functools.partial(tunnel.fail, "it is being set up"))
        elif tunnel.failure is not None:
            with tunnel.reading:
                self._read(tunnel, ())  # if it hangs, this waits and not the lander
        if tunnel.failure is not None:
            flight = Flight()
            flight.set_up(tunnel.name, None)
            _land(tunnel, lambda: self._core.ledger.land(flight))
            tunnel.must_set_up = False
            LOG.info("%s: %s", tunnel.name, self._reconcile(tunnel))


def _land(tunnel: Tunnel, land: Callable[[], None]) -> None:
    """Land a flight for which no caller waits. Raises BackendError."""
    try:
        land()
    except GatewayError as error:
        raise BackendError(tunnel.failure or error.detail) from None


def _each(chosen: Iterable[Tunnel], work: Callable[[Tunnel], _T]) -> list[_T]:
    """The result of each tunnel's work. Raises BackendError after the last one."""
    results: list[_T] = []
    errors: list[str] = []
    for tunnel in chosen:
        try:
            results.append(work(tunnel))
        except BackendError as error:
            errors.append(str(error))
    if errors:
        raise BackendError("; ".join(errors))
    return results


LIMIT_WORDS = {
    "expired": "has expired and is suspended",
    "quota": "has used up its quota and is suspended",
    None: "is active again",
}


class Limits:
    """Expiry and quotas. For workers."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def expire(self) -> None:
        """Suspend expired peers. If the clock was set back, activate those suspended too early."""
        core, now = self._core, self._core.clock()
        rows = chunks(core.run, core.store.queries.expired, int(now), after=(0, 0))
        due = [number for _, number in rows]
        if core.run(lambda: core.store.meta("periods")) != (starts := period_starts(now)):
            self._begin_periods(starts)
        self._enforce(due)

    def enforce_quotas(self) -> None:
        """Suspend peers that have used up their quota, and activate those that have quota again."""
        rows = chunks(self._core.run, self._core.store.queries.quotas)
        self._enforce([number for number, is_due in rows if is_due])

    def _begin_periods(self, now: Mapping[str, int]) -> None:
        """Reset quotas when their day, week or month has ended, also while the gateway was down.

        The state holds the starts of the periods whose quotas are reset. They are written last, so
        that the reset is repeated after a crash. It needs no usable interface. An import waits for
        it, or comes first: then the next tick begins the periods of the imported state.
        """
        core = self._core
        steps: list[Step] = []
        with contextlib.suppress(GatewayError, Busy), Bulk(core) as bulk:
            core.run(core.ledger.check)
            known = core.run(lambda: core.store.meta("periods"))
            begun = [period for period in PERIODS if known and known[period] != now[period]]
            rows = chunks(core.run, core.store.queries.periodic, begun)
            due = [number for number, is_due in rows if is_due]
            for start in range(0, len(due), APPLY_SLICE):
                steps += self._change(due[start : start + APPLY_SLICE], core.rules.begin_quota)
            if len(steps) == len(due):  # else some are busy, and the next tick continues
                bulk.flight.record = Record(settings={"periods": json.dumps(now)})
                bulk.land()
        if steps:
            names = " and ".join(begun)
            LOG.info("a new %s: reset the quota of %s", names, show_peers(len(steps)))
            self.enforce_quotas()

    def _enforce(self, due: Sequence[int]) -> None:
        """Apply the limits to peers, as one flight."""
        core = self._core

        def limited(peer: Peer) -> Peer:
            is_usable = core.tunnels[peer.interface].failure is None
            return core.rules.enforce_limits(peer) if is_usable else peer

        with contextlib.suppress(GatewayError):
            for _, after in self._change(due, limited):
                if after is not None:
                    key, why = short_key(after.public_key), LIMIT_WORDS[after.status_reason]
                    LOG.info("%s: %s %s", after.interface, key, why)

    def _change(self, ids: Sequence[int], rule: Callable[[Peer], Peer]) -> Sequence[Step]:
        """Make peers what a rule says, as one flight. The next tick tries busy peers again.

        Raises GatewayError.
        """
        core = self._core
        if not ids:
            return ()

        def change(number: int) -> None:
            peer = core.store.by_id(number)
            with contextlib.suppress(Busy):
                if peer is not None:
                    core.ledger.check(peer.public_key)
                    after = rule(peer)
                    if after != peer:
                        core.ledger.add(bulk.flight, Step(peer, after))

        core.run(core.ledger.check_disk)
        with Bulk(core) as bulk:
            bulk.each(ids, change)
            bulk.land()
        return bulk.flight.steps


# --- the facade -----------------------------------------------------------------------------------


class ClassFigures(NamedTuple):
    """A service class and its number of peers.

    `expected_addresses` counts those that the kernel's sets should hold, `addresses` those that the
    last sample found there. `dropped_bytes` are by reason.
    """

    name: str
    peers: int
    expected_addresses: int
    addresses: int
    dropped_bytes: Mapping[str, int]


class Figures(NamedTuple):
    """The gateway's figures for metrics and status, all taken at one moment."""

    counts: Mapping[tuple[str, str], int]  # by interface and status
    reasons: Mapping[tuple[str, str], int]  # of those suspended by the gateway, by interface
    online: int
    number: int  # of the last record
    journal_bytes: int
    snapshot_time: float
    snapshot_bytes: int
    pools: Mapping[tuple[str, str], dict[str, Any]]  # by interface and family
    degraded: Sequence[str]
    classes: Sequence[ClassFigures]

    def peers(self, status: str | None = None, interface: str | None = None) -> int:
        return sum(
            number
            for (name, state), number in self.counts.items()
            if status in (None, state) and interface in (None, name)
        )

    def states(self, interface: str) -> Iterator[tuple[str, str, int]]:
        """(status, reason, number) of an interface's peers."""
        yield "active", "", self.peers("active", interface)
        reasons = {reason: self.reasons.get((interface, reason), 0) for reason in REASONS}
        asked = self.peers("suspended", interface) - sum(reasons.values())
        for reason, number in {"asked": asked, **reasons}.items():
            yield "suspended", reason, number


class Batch(Generic[_T]):
    """Does the operations of one request: each is atomic, and those on one key keep their order.

    An error that decoding put among the operations becomes the result in its place. `show` gets
    each result while the rows are as the operation left them; `reply` gets what it returned. `work`
    advances a generator to its end, in slices. Owner.
    """

    def __init__(
        self,
        gateway: Gateway,
        operations: Sequence[BatchOperation],
        show: Callable[[BatchOperation, Outcome | GatewayError], _T],
        reply: Callable[[list[_T]], None],
        work: Callable[[Generator[None, None, None]], None],
    ) -> None:
        self._gateway, self._operations = gateway, operations
        self._show, self._reply, self._work = show, reply, work
        self._results: list[Any] = [None] * len(operations)
        self._left = len(operations)
        self._latest: dict[str, Later[None]] = {}  # by key: when its operation has been answered
        # The operations that wait for no earlier one; the first of them is being decided.
        self._ready = collections.deque[Callable[[], None]]()

    def steps(self) -> Generator[None, None, None]:
        """Begin all operations, in slices. They end later, when they have landed."""
        for place, operation in enumerate(self._operations):
            done = Later[None]()
            answer = functools.partial(self._finish, place, done)
            if isinstance(operation, GatewayError):
                answer(operation)
            else:
                rule, more = BATCH_RULES[operation[0]]
                fields = {**operation[1], **more}
                keys = {fields["public_key"], fields.get("new_public_key", fields["public_key"])}
                earlier = [self._latest[key] for key in keys if key in self._latest]
                self._latest.update(dict.fromkeys(keys, done))
                decision = functools.partial(self._gateway.change, rule, fields, answer)
                when_all(earlier, functools.partial(self._add, decision))
            yield
        if not self._operations:
            self._reply(self._results)

    def _add(self, operation: Callable[[], None]) -> None:
        self._ready.append(operation)
        if len(self._ready) == 1:  # otherwise _decide() is at work, so that no operation nests
            self._work(self._decide())

    def _decide(self) -> Generator[None, None, None]:
        while self._ready:
            self._ready[0]()
            self._ready.popleft()
            yield

    def _finish(self, place: int, done: Later[None], result: Outcome | GatewayError) -> None:
        self._results[place] = self._show(self._operations[place], result)
        self._left -= 1
        if not self._left:
            self._reply(self._results)
        done.give(None)


class Gateway(Core):
    """Peers, their addresses and their interfaces. Errors for the caller are GatewayErrors.

    `run` calls a function as the owner of the rows. Methods "for workers" may take long.
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        files: Files,
        clock: Callable[[], float],
        run: Run,
        *,
        begin: Begin | None = None,
    ) -> None:
        super().__init__(config, store, files, clock, run)
        self.ready = False
        self.starting = "the gateway is starting"  # readiness answers this until then
        self.limits = Limits(self)
        self.projection = Projection(self, self.limits)
        self.lander = Lander(
            self.ledger, store, clock, begin or functools.partial(run_in_slices, run)
        )
        self._bulk = threading.Lock()  # one of the changes of many peers or of settings at a time

    # --- start and stop --------------------------------------------------------------------------

    def start(
        self,
        opened: Sequence[tuple[InterfaceSettings, Link, Backend]],
        obfuscation: ObfuscationState | None = None,
        is_new: bool = False,
        class_table: ClassTable | None = None,
        may_lack: bool = False,
    ) -> None:
        """Rebuild the pools, make the interfaces equal to the rows, be ready. Raises StartError.

        `is_new`: the state lacks `obfuscation`. Without `class_table` the gateway enforces no
        class. `may_lack`: the state may lack changes that clients have seen.
        """
        self.class_table = class_table
        self.lander.start()
        if self.config.move_peers:
            self._move_peers([settings for settings, _, _ in opened])
        for settings, link, backend in opened:
            state = obfuscation if link.kind == AWG_GENL_NAME else None
            tunnel = Tunnel(settings, link, backend, state)
            try:
                tunnel.pools = tunnel.make_pools(self.store)
            except Conflict as error:
                names = f"{settings.prefix}_IPV4_SUBNET, {settings.prefix}_IPV6_SUBNET"
                raise ConfigError(f"{names}: {error.detail}") from None
            tunnel.clients_key = self.store.public_keys().get(tunnel.name, tunnel.public_key)
            self.tunnels[tunnel.name] = tunnel
        news: dict[str, str] = {}
        if is_new and obfuscation is not None:
            news["obfuscation"] = encode_state(obfuscation)
        if may_lack:
            news["feed"] = self.store.feeds.with_gap(self.clock())
        if news:
            flight = Flight(Record(settings=news))
            flight.needs_disk = False  # a full disk refuses changes until a snapshot has these
            self.ledger.land(flight)
        self.limits.expire()  # or expired peers could connect until the first tick
        for tunnel in self.tunnels.values():
            try:
                result = self.projection.reconcile(tunnel.name)
            except BackendError as error:
                if class_table is None or not class_table.failure:
                    raise StartError(str(error)) from None
                continue  # only peers with a class are missing: supervise() tries again
            level = logging.INFO if self.store.counts.total() else logging.WARNING
            level = level if result.removed else logging.INFO
            LOG.log(level, "%s (%s): %s", tunnel.name, tunnel.backend.kind, result)
            tunnel.rate()
        self.store.restarted.clear()
        self.limits.enforce_quotas()
        self.ready = True

    def _move_peers(self, tunnels: Sequence[InterfaceSettings]) -> None:
        """MOVE_PEERS: peers whose choice is gone follow the settings. Raises StartError."""
        peers = self.store.peers_after(0, MAX_INTEGER)
        pairs = [(peer, moved(peer, self.config, tunnels)) for peer in peers]
        if changed := [after for before, after in pairs if after != before]:
            try:
                self.ledger.land(Flight(Record(changed)))
            except GatewayError as error:
                raise StartError(f"MOVE_PEERS: {error.detail}") from None
            count = show_peers(len(changed))
            LOG.warning(
                "MOVE_PEERS: moved %s to the present settings; now remove MOVE_PEERS", count
            )

    def change_classes(self, classes: Mapping[str, ServiceClass]) -> None:
        """Enforce other classes. For workers. Raises ConfigError, with nothing changed."""
        if classes == self.classes:
            return

        def check() -> None:
            refuse_misfits(look_at_stored_classes(classes, self.store))

        def begin() -> list[Flight]:
            """From now on no peer gets a class that goes. Returns the flights that may have."""
            check()
            self.classes = {name: of for name, of in before.items() if name in classes}
            return list(self.ledger.airborne)

        with self._bulk:
            before = self.classes
            try:
                for earlier in self.run(begin):
                    wait_for(self.run, earlier)
                with self.lander.turn:  # no landing puts an address into a class meanwhile
                    self.run(check)
                    if self.class_table is not None:
                        self.class_table.change(classes)
                    self.classes = classes
            except BackendError as error:
                raise ConfigError(f"SERVICE_CLASSES: {error}") from None
            finally:
                if self.classes is not classes:
                    self.classes = before

    def close(self) -> None:
        """Land the waiting changes, and write the last snapshot. For workers."""

        def count() -> None:
            try:
                self.projection.sample()
            except BackendError as error:
                LOG.error("the traffic since the sample before is not counted: %s", error)

        sample = threading.Thread(target=count, daemon=True)
        sample.start()
        sample.join(LAST_SAMPLE_SECONDS)
        if self.lander.stop(STOP_SECONDS):
            self.lander.snapshot()
        else:
            LOG.warning(
                "stopped during a change; its caller gets no answer: disk or interface was too slow"
            )

    # --- requests --------------------------------------------------------------------------------

    def change(self, name: str, fields: Mapping[str, Any], reply: Reply) -> None:
        """Land what the rule of this name decides. `reply` gets the result. Owner."""
        rule = getattr(self.rules, name)
        flight = Flight()
        try:
            if self.ledger.uncertain:  # the rows may lack a change, so no rule can rely on them
                self.ledger.check_disk()
            self.ledger.check(fields["public_key"])
            before = self.store.get(fields["public_key"])
            if before is None and name != "create":
                raise NotFound(NO_PEER)
            after: Peer | None = rule(before, fields)
            peer: Any = after or before  # one of them is a Peer
            self.rules.check_usable(peer.interface)
            if before != after:
                self.ledger.check_disk()
                self.ledger.add(flight, Step(before, after))
                flight.complete()
                self.ledger.submit(flight)
        except Busy as busy:
            busy.flight.then(lambda _: self.change(name, fields, reply))
            return
        except GatewayError as error:
            reply(error)
            return
        except Exception as error:  # a defect: nothing may wait for a flight that never lands
            log_defect(error)
            for _ in self.ledger.release(flight, refused=True):
                pass
            reply(GatewayError(DEFECT))
            return
        if flight.steps:
            flight.then(lambda error: reply(error or Outcome(True, peer)))
        else:
            reply(Outcome(False, peer))

    def usage(self, interface: str | None = None) -> dict[str, dict[str, Any]]:
        """The pools of each family, of one interface or all: totals and all held addresses.

        For workers.
        """
        chosen = [t for t in self.tunnels.values() if interface in (None, t.name)]
        return {
            family: {
                **pool_usage(t.pools.get(family) for t in chosen),
                "assigned_ips": [a for t in chosen for a in self._held(t.name, family)],
            }
            for family in FAMILIES
        }

    def _held(self, interface: str, family: str) -> Iterator[str]:
        query, limit = self.store.queries.held_rows, READ_CHUNK * 10
        rows = chunks(self.run, query, interface, family, limit=limit)
        return (address for _, address in rows if address)

    def view(self) -> View:
        """What configurations show besides the rows. Owner."""
        tunnels = self.tunnels.values()
        served = [Served(t.settings, t.public_key, t.link.mtu, t.obfuscation) for t in tunnels]
        return View(online_since(self.clock()), self.config.dns_servers, tuple(served))

    def figures(self) -> Figures:
        """Owner."""
        return Figures(
            dict(self.store.counts.peers),
            dict(self.store.counts.reasons),
            self.store.queries.online(online_since(self.clock())),
            self.store.number,
            self.files.journal.size,
            self.files.snapshot_time,
            self.files.snapshot_bytes,
            {
                (tunnel.name, family): pool_usage([pool])
                for tunnel in self.tunnels.values()
                for family, pool in tunnel.pools.items()
            },
            [*self.degraded(), *self._warnings()],
            [self._class_figures(name) for name in self.classes],
        )

    def _class_figures(self, name: str) -> ClassFigures:
        table = self.class_table
        dropped = table.dropped if table else {}
        return ClassFigures(
            name,
            self.store.counts.classes[name],
            self.store.counts.class_addresses[name],
            table.addresses[name] if table else 0,
            {why: dropped.get(f"{name}.{why}", 0) for why in CLASS_COUNTERS},
        )

    def degraded(self) -> list[str]:
        """The reasons why the gateway is neither ready nor healthy; empty when it is both."""
        reasons = {f"interface {tunnel.name}": tunnel.failure for tunnel in self.tunnels.values()}
        reasons |= {
            "counters": self.projection.failure,
            "snapshot": self.lander.snapshot_failure,
            "changes are refused": self.ledger.failure,
            "remote copy": self.ledger.replaced,
        }
        return [f"{subject}: {reason}" for subject, reason in reasons.items() if reason is not None]

    def _warnings(self) -> Iterator[str]:
        """The reasons why the gateway is ready but not healthy.

        The host lacks IPv6, the rules of service classes could not be made, or the configurations
        of an interface's peers name another key.
        """
        if self.class_table is not None and self.class_table.failure:
            yield self.class_table.fault
        for tunnel in self.tunnels.values():
            if tunnel.backend.kind != "memory" and (fault := ipv6_fault(tunnel.settings)):
                yield f"interface {tunnel.name}: {fault[0]}"
            peers = self.store.counts.on(tunnel.name)
            if tunnel.clients_key != tunnel.public_key and peers:
                yield (
                    f"interface {tunnel.name}: its public key is {tunnel.public_key}, but the "
                    f"configurations of its {show_peers(peers)} name {tunnel.clients_key}, so that "
                    "they cannot connect: put the private key of that one into "
                    f"{tunnel.settings.private_key_file} and restart (with SNAPSHOT_KEY, the state "
                    "has it: move the file away), or give the clients new configurations and then "
                    "POST /api/v1/sync-ips?accept_key=true"
                )

    def accept_keys(self) -> None:
        """Make the peers' configurations name the interfaces' own keys. For workers."""
        tunnels, store = self.tunnels.values(), self.store
        with self._bulk:  # an import may be changing these keys
            keys = {**self.run(store.public_keys), **{t.name: t.public_key for t in tunnels}}
            flight = Flight(Record(settings={"public_keys": json.dumps(keys)}))
            for tunnel in tunnels:
                flight.on_landed.append(functools.partial(tunnel.note_clients_key, store, None))
            self.ledger.land(flight)

    # --- AmneziaWG's parameters ------------------------------------------------------------------

    def obfuscated(self) -> Tunnel:
        """The obfuscated interface. Raises NotFound when there is none."""
        for tunnel in self.tunnels.values():
            if tunnel.obfuscation is not None:
                return tunnel
        raise NotFound(
            "obfuscation: this gateway has no obfuscated interface: AWG_INTERFACE adds one"
        )

    def change_obfuscation(self, wanted: ObfuscationState, confirmed: bool) -> int:
        """Change the obfuscated interface's parameters. Returns how many peers that cuts off.

        Clients with the old parameters cannot connect afterwards. Raises Conflict when that would
        happen and is not confirmed. For workers.
        """
        with self._bulk:
            flight, cut = self.run(lambda: self._plan_parameters(wanted, confirmed))
            self.ledger.land(flight)
        LOG.info("new AmneziaWG parameters; peers that need new configurations: %d", cut)
        for warning in obfuscation_warnings(wanted):
            LOG.warning("%s", warning)
        return cut

    def _plan_parameters(self, wanted: ObfuscationState, confirmed: bool) -> tuple[Flight, int]:
        tunnel = self.obfuscated()
        self.rules.check_usable(tunnel.name)
        self.ledger.check_disk()
        before = cast(ObfuscationState, tunnel.obfuscation)
        is_same = same_language(before.parameters, wanted.parameters)
        cut = 0 if is_same else self.store.counts.on(tunnel.name)
        if cut and not confirmed:
            raise Conflict(
                f"confirm: {show_peers(cut)} will have no connection until the clients have the "
                'new parameters: if you want that, repeat the request with "confirm": true'
            )
        flight = Flight()
        state = wanted._replace(version=before.version + (not is_same))
        try:
            set_link(flight, tunnel, tunnel.link.private_key, state)
        except ValueError as error:
            raise Invalid("parameters", str(error)) from None
        return flight, cut

    # --- all peers at once -----------------------------------------------------------------------

    def sync(
        self, desired: dict[str, Desired], dry_run: bool, allow_mass_delete: bool
    ) -> DesiredResult:
        """Make the peers those of `desired`, which is consumed: all of it or nothing. For workers.

        Raises GatewayError.
        """
        with self._bulk, collector_off():
            self.run(self.ledger.check_disk)
            return DesiredState(self, desired).perform(dry_run, allow_mass_delete)

    def export(self) -> bytes:
        """The whole state as a snapshot file. Everything in it is on disk here. For workers."""
        image = self.lander.between_landings(
            lambda: self.files.image(self.store, self.store.number, alone=True)
        )
        return b"".join(snapshot_parts(image, self.files.vault))

    def import_(
        self, data: bytes, replace_key: bool | None = None, dry_run: bool = False
    ) -> tuple[int, int]:
        """Replace the whole state by a snapshot file's. For workers.

        Returns how many peers the state has, and how many peers lose their connection: see
        Import._count_cut(). For `replace_key` see Import. Raises GatewayError.
        """
        try:
            other = open_state(data, vault=self.files.vault)
        except (DamagedError, ConfigError) as error:
            reason = error.found if isinstance(error, DamagedError) else error
            raise Malformed(f"the snapshot was refused: {reason}") from None
        with self._bulk, collector_off():
            work = Import(self, other, replace_key)
            total = other.counts.total()
            if not dry_run:
                work.perform()
                LOG.info("imported %s; cut off: %s", show_peers(total), show_peers(work.cut))
                self.limits.expire()
                self.limits.enforce_quotas()
        return total, work.cut


# Operations of a batch: the rule, and the fields that it gets in addition to the operation's.
BATCH_RULES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "create": ("create", {}),
    "delete": ("delete", {}),
    "suspend": ("set_status", {"status": "suspended"}),
    "activate": ("set_status", {"status": "active"}),
    "update": ("update", {}),
    "rotate": ("rotate", {}),
    "reset-quota": ("reset_quota", {}),
}


# ==================================================================================================
# metrics: what the host and the process are doing, counters, Prometheus text
#
# The loop counts each request in RequestMetrics. A worker renders the text of /metrics, and asks
# the loop for figures of the rows.
# Never here: decisions.
# ==================================================================================================


class HostMetrics:
    """The host's load, from /proc. cpu_percent covers the time between the last two ticks."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._last = (0, 0)
        self.cpu_percent = 0.0
        self.tick()

    def tick(self) -> None:
        """Compare the CPU's counters with the values at the last call."""
        line = Path("/proc/stat").read_text("ascii").partition("\n")[0]
        values = [int(value) for value in line.split()[1:9]]
        idle, total = values[3] + values[4], sum(values)
        elapsed = total - self._last[1]
        if elapsed > 0:  # the time spent waiting for I/O may decrease: see proc_stat(5)
            passed = min(max(idle - self._last[0], 0), elapsed)
            self.cpu_percent = round(100 * (1 - passed / elapsed), 1)
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
        usage = shutil.disk_usage(self._directory)
        percent = round(100 * usage.used / usage.total, 1) if usage.total else 0.0
        return {**usage._asdict(), "percent": percent}


class RequestMetrics:
    """Counts and durations of requests, by method, route template and status.

    The loop counts; only refused() may be called by workers, too.
    """

    def __init__(self) -> None:
        self.certificate_expires = 0  # Unix seconds
        self._counts: collections.Counter[tuple[str, str, int]] = collections.Counter()
        self._durations: dict[str, Histogram] = collections.defaultdict(Histogram)
        self._callers: collections.Counter[Caller] = collections.Counter()
        self._refused: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()  # around _refused

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        self._counts[method, route, status] += 1
        self._durations[route].observe(seconds)

    def signed(self, caller: Caller) -> None:
        self._callers[caller] += 1

    def refused(self, reason: str) -> None:
        with self._lock:
            self._refused[reason] += 1

    def render(self) -> Iterator[str]:
        """Prometheus text. For workers: sorted() copies the items of one moment."""
        counts, durations = sorted(self._counts.items()), sorted(self._durations.items())
        callers, refused = sorted(self._callers.items()), sorted(self._refused.items())
        yield from _metrics(
            ("wggw_http_requests_total", "counter", "Requests answered.",
                [(_labels(method=m, route=r, status=str(s)), n) for (m, r, s), n in counts]),
            ("wggw_http_request_duration_seconds", "histogram",
                "From the head's end to the answer's.",
                [(_labels(route=route), histogram) for route, histogram in durations]),
            ("wggw_signed_requests_total", "counter", "Authentic requests by scheme and key id.",
                [(_labels(scheme=c.scheme, key_id=c.key_id), n) for c, n in callers]),
            ("wggw_auth_failures_total", "counter", "Failed authentications by reason.",
                [(_labels(reason=reason), n) for reason, n in refused]),
            ("wggw_certificate_expiry_timestamp_seconds", "gauge",
                "When the TLS certificate expires.", self.certificate_expires),
        )  # fmt: skip


Value = int | float | Histogram


def _metrics(*table: tuple[str, str, str, Value | Iterable[tuple[str, Value]]]) -> Iterator[str]:
    """Prometheus text of rows (name, type, help, given): a value, or a list of (labels, value)."""
    for name, kind, text, given in table:
        yield f"# HELP {name} {text}\n# TYPE {name} {kind}\n"
        for labels, value in [("", given)] if isinstance(given, Value) else given:
            if isinstance(value, Histogram):
                yield from value.render(name, labels)
            else:
                yield f"{name}{{{labels}}} {value}\n" if labels else f"{name} {value}\n"


def _labels(**labels: str) -> str:
    return ",".join(f'{name}="{value}"' for name, value in labels.items())


def render_gateway(gateway: Gateway) -> Iterator[str]:
    """Prometheus text with the gateway's own figures.

    An interface's traffic includes the traffic of deleted peers. For workers.
    """
    figures = gateway.run(gateway.figures)
    tunnels = [(_labels(interface=name), gateway.tunnels[name]) for name in sorted(gateway.tunnels)]
    pools = [(_labels(interface=i, family=f), use) for (i, f), use in figures.pools.items()]
    yield from _metrics(
        ("wggw_peers", "gauge", "Peers by interface, state, and why they are suspended.",
            [(f"{labels},{_labels(state=state, reason=reason)}", number)
             for labels, t in tunnels for state, reason, number in figures.states(t.name)]),
        ("wggw_pool_used_addresses", "gauge", "Assigned addresses.",
            [(labels, use["used"]) for labels, use in pools]),
        ("wggw_pool_total_addresses", "gauge", "Addresses that peers can have.",
            [(labels, use["total"]) for labels, use in pools]),
        ("wggw_interface_receive_bytes_total", "counter", "Bytes received from peers.",
            [(labels, t.rx_bytes) for labels, t in tunnels]),
        ("wggw_interface_transmit_bytes_total", "counter", "Bytes sent to peers.",
            [(labels, t.tx_bytes) for labels, t in tunnels]),
        ("wggw_interface_failures_total", "counter", "Times it was unusable or changed by others.",
            [(labels, t.failures) for labels, t in tunnels]),
        ("wggw_peers_online", "gauge", "Peers with a handshake in 180 s.", figures.online),
        ("wggw_degraded", "gauge", "1 when something is wrong.", int(bool(figures.degraded))),
        ("wggw_journal_records_total", "counter", "Number of the last record.", figures.number),
        ("wggw_journal_bytes", "gauge", "Size of the journal.", figures.journal_bytes),
        ("wggw_snapshot_timestamp_seconds", "gauge", "Last snapshot.", figures.snapshot_time),
        ("wggw_snapshot_bytes", "gauge", "Size of the last snapshot.", figures.snapshot_bytes),
        ("wggw_journal_sync_duration_seconds", "histogram", "A write to the journal and its fsync.",
            gateway.files.journal.syncs),
    )  # fmt: skip
    classes = [(_labels(service_class=row.name), row) for row in figures.classes]
    if classes:
        yield from _metrics(
            ("wggw_class_peers", "gauge", "Peers by service class.",
                [(labels, row.peers) for labels, row in classes]),
            ("wggw_class_addresses", "gauge", "Their addresses in the kernel, by class.",
                [(labels, row.addresses) for labels, row in classes]),
            ("wggw_class_expected_addresses", "gauge", "What it should have, by class.",
                [(labels, row.expected_addresses) for labels, row in classes]),
            ("wggw_class_dropped_bytes_total", "counter",
                "Bytes dropped for a service class: above its rates, or for their destination.",
                [(f"{labels},{_labels(reason=reason)}", number)
                 for labels, row in classes for reason, number in row.dropped_bytes.items()]),
        )  # fmt: skip


def render_copy(state: CopyState, replaced: bool = False) -> Iterator[str]:
    """Prometheus text that says how far the remote copy is behind."""
    for suffix, kind, text, value in (
        ("lag_records", "gauge", "Changes that the copy lacks.", state.lag_records),
        ("lag_seconds", "gauge", "Age of the oldest change that it lacks.", state.lag_seconds),
        ("failing", "gauge", "1 when the last upload failed.", int(state.failure is not None)),
        ("replaced", "gauge", "1 when another gateway has taken it over.", int(replaced)),
        ("epoch", "gauge", "The epoch that this gateway claimed.", state.epoch),
        ("requests_total", "counter", "Requests to the object store.", state.requests),
        ("sent_bytes_total", "counter", "Bytes sent to the store.", state.bytes_sent),
        ("received_bytes_total", "counter", "Bytes read from the store.", state.bytes_received),
    ):
        yield from _metrics((f"wggw_remote_copy_{suffix}", kind, text, value))


def render_peers(gateway: Gateway) -> Iterator[str]:
    """Prometheus text with every peer's traffic. The label has only the start of the key."""
    rows = [
        (_labels(interface=interface, key=short_key(key)), traffic)
        for _, interface, key, traffic in chunks(gateway.run, gateway.store.queries.totals_after)
    ]
    return _metrics(
        ("wggw_peer_receive_bytes_total", "counter", "Bytes received from a peer.",
            ((labels, traffic.rx_bytes) for labels, traffic in rows)),
        ("wggw_peer_transmit_bytes_total", "counter", "Bytes sent to a peer.",
            ((labels, traffic.tx_bytes) for labels, traffic in rows)),
        ("wggw_peer_last_handshake_timestamp_seconds", "gauge", "0: never.",
            ((labels, traffic.last_handshake) for labels, traffic in rows)),
    )  # fmt: skip


def render_process(started: float) -> Iterator[str]:
    """Prometheus text with the process's figures, under the usual names of Prometheus clients."""
    pages = Path("/proc/self/statm").read_text("ascii").split()[:2]
    virtual, resident = (int(number) * os.sysconf("SC_PAGE_SIZE") for number in pages)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    versions = _labels(version=__version__, python_version=PYTHON_VERSION)
    return _metrics(
        ("process_start_time_seconds", "gauge", "Unix time of the start.", started),
        ("process_cpu_seconds_total", "counter", "User and system.", time.process_time()),
        ("process_resident_memory_bytes", "gauge", "Memory in RAM.", resident),
        ("process_virtual_memory_bytes", "gauge", "Address space.", virtual),
        ("process_open_fds", "gauge", "Open files.", len(os.listdir("/proc/self/fd")) - 1),
        ("process_max_fds", "gauge", "Open files that are allowed.", limit),
        ("process_threads", "gauge", "Threads.", threading.active_count()),
        ("wggw_build_info", "gauge", "Versions.", [(versions, 1)]),
    )


# ==================================================================================================
# http: heads and bodies decoded strictly, the route table, handlers, answers
# No SQL, netlink, rules or sockets here.
#
# Admission decides from the head alone (signature, route, length) whether to read the body. Then
# the route's handler decodes it with a table of fields, asks the gateway, and shows the outcome.
# One table, ROUTES, says what is accepted and describes it (OpenAPI). Most handlers run in the
# loop; the route's `place` names those that a worker's thread runs.
#
# Every path below /api needs a signature. /metrics needs METRICS_TOKEN or, if there is none, a
# caller on loopback without a proxy. /healthz, /readyz and /openapi.json are open. Root and the
# gateway's own user may do everything over the Unix socket, without a signature.
# ==================================================================================================


@dataclass
class LogEntry:
    """What the log says about a request; the gateway fills it in while it works on the request."""

    request_id: str
    method: str = "-"
    route: str = "-"
    peer: str = ""  # the short key of the peer that the request is about
    key_id: str = "-"  # of the key that signed it

    def line(self, status: int, seconds: float, note: str) -> str:
        shown = note[:MAX_LOG_NOTE]
        if not shown.isprintable():
            shown = "".join(c if c.isprintable() else "?" for c in shown)
        return (
            f"{self.method} {self.route} {status} {seconds * 1000:.1f} ms "
            f"{f'peer={self.peer} ' if self.peer else ''}key={self.key_id} id={self.request_id}"
            f"{': ' if shown else ''}{shown}"
        )


class Head(NamedTuple):
    """A request's head. Header names are lower-case bytes; `length` is the body's size in bytes."""

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


class Request:
    """A request that Admission lets in, with the public key in its path, "" without one.

    App.answer() adds the query, decoded with the route's table, and the body; to a "reader" as
    `pieces`, which arrive while it reads them.
    """

    def __init__(self, head: Head, route: ApiRoute, key: str, entry: LogEntry) -> None:
        self.head, self.route, self.key, self.entry = head, route, key, entry
        self.query: Mapping[str, Any] = {}
        self.body = b""
        self.pieces: Iterable[bytes] = ()

    @property
    def media_type(self) -> bytes:
        """In lower case, without parameters."""
        return self.head.headers.get(b"content-type", b"").split(b";")[0].strip().lower()


class Response(NamedTuple):
    """An answer; the log shows `note` behind the request's line."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()
    note: str = ""

    def __repr__(self) -> str:  # the body may hold preshared keys
        return f"Response({self.status}, {len(self.body)} bytes)"


NO_ANSWER = Response(0, b"")  # the connection is closed without an answer

_REQUEST_LINE = re.compile(
    rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}+) ([!-~]++) HTTP/(\d)\.(\d)(?=\r\n|\Z)"
)
# All headers at once. It never goes back, so its time is linear.
_HEADER_LINES = re.compile(rb"(?:\r\n[!#$%&'*+.^_`|~0-9A-Za-z-]++:[^\x00-\x08\x0a-\x1f\x7f]*+)*+")
_SINGLE_HEADERS = frozenset(
    (b"content-length", b"host", b"timestamp", b"content-type", b"authorization")
)
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_ORIGIN = re.compile(r"https?://([^/?#@]++)(?=[/?]|$)", re.IGNORECASE)


def parse_head(data: bytes) -> Head:
    """Decode a head (RFC 9112), given without the empty line that ends it. Raises GatewayError.

    Whatever two parsers could read in two ways is refused, since it allows request smuggling.
    """
    match = _REQUEST_LINE.match(data)
    if not match:
        raise Malformed("the request line is malformed")
    if match[3] != b"1" or match[4] not in (b"0", b"1"):
        raise VersionNotSupported("the gateway speaks HTTP/1.1 and HTTP/1.0 only")
    headers = _parse_headers(data, match.end())
    new = match[4] == b"1"
    if new and b"host" not in headers:
        raise Malformed("the Host header is missing")
    if b"transfer-encoding" in headers:
        if b"content-length" in headers:
            raise Malformed("Transfer-Encoding is not accepted: send Content-Length alone")
        raise LengthRequired("chunked bodies are not accepted: send Content-Length")
    length = headers.get(b"content-length", b"0")
    if not length.isdigit() or len(length) > 15:
        raise Malformed("Content-Length is malformed")
    connection = headers.get(b"connection", b"").lower()
    keep_alive = new and b"close" not in connection  # for HTTP/1.0 the answer would have to say it
    target = match[2].decode("ascii")
    if not target.startswith("/"):
        origin = _ORIGIN.match(target)
        if origin:  # its authority replaces the Host header (RFC 9112 section 3.2.2)
            headers[b"host"] = origin[1].encode("ascii")
            target = target[origin.end() :]
            target = target if target.startswith("/") else "/" + target
    path, _, query = target.partition("?")
    method, expects = match[1].decode("ascii"), headers.get(b"expect", b"").lower()
    waits = new and expects == b"100-continue"
    return Head(method, path or "/", query, target, headers, int(length), keep_alive, waits)


def _parse_headers(data: bytes, start: int) -> dict[bytes, bytes]:
    """The headers of a head, of which the first line ends at `start`."""
    if data.count(b"\r\n") > MAX_HEADERS:
        raise HeadTooLarge(f"more than {MAX_HEADERS} headers")
    if not _HEADER_LINES.fullmatch(data, start):
        raise Malformed("a header is malformed")
    headers: dict[bytes, bytes] = {}
    for line in data.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        name, value = name.lower(), value.strip(b" \t")
        if name not in headers:
            headers[name] = value
        elif name in _SINGLE_HEADERS:
            raise Malformed(f"the {name.decode('ascii')} header is repeated")
        else:
            headers[name] += b", " + value
    return headers


def parse_query(query: str) -> dict[str, str]:
    """A query's parameters. Raises Malformed, also for a parameter that is given twice."""
    try:
        pairs = urllib.parse.parse_qsl(
            query, keep_blank_values=True, errors="strict", max_num_fields=32
        )
    except ValueError:
        raise Malformed("the query is malformed") from None
    parameters = dict(pairs)
    if len(parameters) != len(pairs):
        raise Malformed("the query has a parameter twice")
    return parameters


# json.dumps() with options would make one of these at each call.
_JSON_ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)


def decode_json(body: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8, without duplicate keys, NaN or deep nesting. Raises Malformed."""
    try:
        check_depth(body)
        parsed = _JSON_DECODER.decode(body.decode("utf-8"))
    except ValueError:
        raise Malformed("the body is not valid JSON in UTF-8 with unique keys") from None
    if not isinstance(parsed, dict):
        raise Malformed("the body is not a JSON object")
    return parsed


def decode_lines(pieces: Iterable[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON objects of a body that has one on each line: pairs ("line 1", object).

    Raises Malformed, TooLarge.
    """
    buffer = bytearray()
    number = 0
    for piece in itertools.chain(pieces, (b"\n",)):  # the last line may have no newline
        buffer += piece
        if b"\n" not in piece:
            if len(buffer) > MAX_BODY:
                raise TooLarge(f"line {number + 1}: it has more than {MAX_BODY} bytes")
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
    """The objects of a body that is a JSON array, decoded one by one: pairs ("element 1", object).

    Raises Malformed, TooLarge.
    """
    body = bytearray()
    for piece in pieces:
        body += piece
        if len(body) > MAX_ARRAY:
            raise TooLarge(f"the array has more than {MAX_ARRAY} bytes: send application/x-ndjson")
    found = _JSON_FIRST.match(body)
    if found is None:
        raise Malformed("the body is not a JSON array")
    number, position = 0, found.end()
    while not body.endswith(b"]", 0, position):
        number += 1
        place = f"element {number}"
        with _placed(place):
            if not body.startswith(b"{", position):
                raise Malformed("it is not a JSON object")
            depth, end = json_extent(body, position, position + MAX_BODY)
            if depth > MAX_JSON_DEPTH:
                raise Malformed(f"it is nested deeper than {MAX_JSON_DEPTH} levels")
            if end is None and len(body) > position + MAX_BODY:
                raise TooLarge(f"it has more than {MAX_BODY} bytes")
            if end is None:
                raise Malformed("it is not valid JSON with unique keys")
            value = decode_json(bytes(body[position:end]))
        yield place, value
        found = _JSON_NEXT.match(body, end)
        if found is None:
            raise Malformed(f"element {number + 1}: the array is malformed")
        position = found.end()
    if _JSON_SPACES.fullmatch(body, position) is None:
        raise Malformed("the body goes on behind the end of the array")


# These match what precedes the first element, or the next one: all of it, or the array's end.
_JSON_FIRST = re.compile(rb"[ \t\r\n]*+\[[ \t\r\n]*+\]?")
_JSON_NEXT = re.compile(rb"[ \t\r\n]*+(?:,[ \t\r\n]*+|\])")
_JSON_SPACES = re.compile(rb"[ \t\r\n]*+")


def encode_json(value: Any) -> bytes:
    return _JSON_ENCODER.encode(value).encode("utf-8")


def problem_details(error: GatewayError) -> dict[str, Any]:
    """The members of an error's body (RFC 9457)."""
    return {
        "type": "about:blank",
        "title": HTTPStatus(error.status).phrase,
        "status": error.status,
        "detail": error.detail,
    }


def problem(error: Exception) -> Response:
    """The answer to an error; one to a defect, too, so that no client waits on."""
    told = refusal_of(error)
    if isinstance(told, OutcomeUnknown):
        return NO_ANSWER
    content = encode_json(problem_details(told))
    return Response(told.status, content, "application/problem+json", told.headers, told.detail)


TEXT: Schema = {"type": "string"}
TEXTS: Schema = {"type": "array", "items": TEXT}
COUNT: Schema = {"type": "integer", "format": "int64", "minimum": 0}
PERCENT: Schema = {"type": "number", "format": "double", "minimum": 0, "maximum": 100}
NUMBER: Schema = {"type": "number", "format": "double", "minimum": 0}
BINARY: Schema = {"type": "string", "format": "binary"}
STATUS = one_of(STATUSES)
HTTP_STATUS: Schema = {"type": "integer", "minimum": 400, "maximum": 599}


def about(schema: Schema, text: str) -> Schema:
    return {**schema, "description": text}


# fmt: off
# The members of a configuration. Their values: see CONFIGURATION_SQL.
CONFIGURATION: dict[str, Schema] = {
    "public_key": KEY_SCHEMA,
    "status": STATUS,
    "status_reason": about(
        or_null(one_of(REASONS)), "why the gateway suspended it; null when it did not"),
    "assigned_ip": or_null(IPV4),
    "assigned_ipv6": or_null(IPV6),
    "tunnel_traffic": about(FAMILIES_SCHEMA, "what the client sends through the tunnel"),
    "allowed_ips": about(TEXTS, "the same as networks, for the client's AllowedIPs"),
    "dns": about(TEXT, "a key of DNS_SERVERS"),
    "dns_servers": about(TEXTS, "the addresses and search domains of that choice"),
    "port": about({"type": "integer", "minimum": 1, "maximum": 65535}, "UDP"),
    "interface": TEXT,
    "server_public_key": KEY_SCHEMA,
    "endpoint": about(or_null(TEXT), "WG_ENDPOINT with the port; null when that is not set"),
    "mtu": COUNT,
    "persistent_keepalive": about(COUNT, "seconds, for the client's configuration"),
    "expires_at": or_null(TIME_SCHEMA),
    "quota_bytes": about(or_null(COUNT), "received and sent bytes together"),
    "quota_period": about(
        or_null(one_of(PERIODS)), "the quota starts again with each; null: never"),
    "quota_used": about(
        COUNT, "bytes since the period began or reset-quota was called; also without a quota"),
    "created_at": TIME_SCHEMA,
    "request_id": or_null(TEXT),
    "label": or_null(TEXT),
    "service_class": about(or_null(TEXT), "a name of SERVICE_CLASSES; null: no limits"),
    "obfuscation": or_null(FREE_OBJECT),
    "online": about(FLAG, f"the last handshake is less than {ONLINE_SECONDS} s ago"),
    "last_handshake": or_null(TIME_SCHEMA),
    "rx_bytes": about(COUNT, "received from the client since the peer was created"),
    "tx_bytes": about(COUNT, "sent to the client"),
    "sequence": about(COUNT, "of its latest change: see /api/v1/changes"),
}
# fmt: on


def awg_quick(shown: Mapping[str, Any]) -> Iterator[str]:
    """The lines that AmneziaWG adds to [Interface] of a configuration file."""
    for name, row in AWG_PARAMETERS.items():
        value = shown.get(name)
        if value is None or value == "" or (name in _JUNK and value == 0):
            continue  # it means 0, too, and amneziawg-go 0.2.16 to 0.2.19 refuses "Jc = 0"
        if isinstance(value, bool):
            value = "on" if value else "off"
        yield f"{row.spelling} = {value}"


KEY_PLACEHOLDER = "REPLACE_WITH_THE_CLIENT_PRIVATE_KEY"


def wg_quick(shown: Mapping[str, Any], preshared_key: str | None) -> str:
    """The client's configuration file. The client must put its private key into it."""
    addresses = [
        f"{address}/{length}"
        for address, length in ((shown["assigned_ip"], 32), (shown["assigned_ipv6"], 128))
        if address
    ]
    lines = [
        "[Interface]",
        f"PrivateKey = {KEY_PLACEHOLDER}",
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
    """An operation of a batch: the status when it is done, and its fields."""

    said: str
    fields: Mapping[str, Field]


KEY_FIELDS: dict[str, Field] = {"public_key": PUBLIC_KEY_FIELD}

OPERATIONS: dict[str, Operation] = {
    "create": Operation("created", CREATE_FIELDS),
    "delete": Operation("deleted", KEY_FIELDS),
    "suspend": Operation("suspended", KEY_FIELDS),
    "activate": Operation("updated", KEY_FIELDS),
    "update": Operation("updated", {**KEY_FIELDS, **PATCH_FIELDS}),
    "rotate": Operation("rotated", {**KEY_FIELDS, **ROTATE_FIELDS}),
    "reset-quota": Operation("reset", KEY_FIELDS),
}


def _field_operations(value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) > MAX_BATCH:
        raise ValueError
    return value


BATCH_OPERATION: dict[str, Field] = {
    "op": choice_field(tuple(OPERATIONS))._replace(required=True),
    **{name: row for operation in OPERATIONS.values() for name, row in operation.fields.items()},
    "new_public_key": PUBLIC_KEY_FIELD._replace(required=False),
}

BATCH_FIELDS: dict[str, Field] = {
    "operations": Field(
        _field_operations,
        f"a list of at most {MAX_BATCH} operations",
        {**list_of("BatchOperation"), "maxItems": MAX_BATCH},
        'each has "op", "public_key" and the fields of that operation',
        required=True,
    ),
}


def _decode_operation(given: Any) -> tuple[str, Mapping[str, Any]] | GatewayError:
    """An operation's name and fields, or the error that is its result."""
    try:
        if not isinstance(given, dict):
            raise Malformed("the operation is not a JSON object")
        name = given.get("op")
        if not isinstance(name, str) or name not in OPERATIONS:
            raise Invalid("op", f"must be one of {', '.join(OPERATIONS)}")
        if given.get("encrypted_payload") is not None:
            raise Invalid("encrypted_payload", "is not accepted in a batch")
        rest = {field: value for field, value in given.items() if field != "op"}
        if name == "create":
            return name, parse_create(rest)
        return name, parse_fields(rest, OPERATIONS[name].fields)
    except GatewayError as error:
        return error


Content = Mapping[str, Schema]  # media type -> schema


class ApiRoute(NamedTuple):
    """A row of the route table: it says what a route accepts, and describes it in /openapi.json.

    tag           a row of TAGS; App.handlers has the object that the handler belongs to
    handler       returns the answer, now or later, or the JSON of a 200
    fields        the fields of a JSON body
    media         schemas of other bodies, by media type
    answer        the schema of a 200 that is JSON
    answer_media  schemas of other 200s, by media type
    errors        statuses beyond those that the other columns entail: see _error_statuses()
    guard         who may call the route: a row of GUARDS
    limit         the most bytes that the body may have
    place         where the handler runs: "loop"; "worker", a thread that starts once the body is
                  there; or "reader", a thread that also reads the body, piece by piece
    patience      seconds that the answer may wait for a change
    """

    method: str
    template: str
    tag: str
    handler: Callable[[Any, Request], Response | dict[str, Any] | Later[Response]]
    description: str
    answer: Schema = {}
    fields: Mapping[str, Field] = {}
    media: Content = {}
    answer_media: Content = {}
    query: Mapping[str, Field] = {}
    errors: tuple[int, ...] = ()
    guard: str = "signed"
    limit: int = MAX_BODY
    place: str = "loop"
    patience: int = 0


def allows(networks: Sequence[IPv4or6Network], source: str) -> bool:
    """Whether an address is in one of the networks or on loopback. No networks allow every one."""
    if not networks:
        return True
    address = ipaddress.ip_address(source)
    return address.is_loopback or any(address in network for network in networks)


THIS_HOST = "this host"  # the source of requests that come over the Unix socket

# A proxy adds one of these headers: the source is then the proxy, not the caller.
PROXY_HEADER = re.compile(rb"forwarded|x-forwarded-.*|x-real-ip|via")


class Admission:
    """Decides from a request's head alone whether the gateway reads its body."""

    def __init__(self, gateway: Gateway, metrics: RequestMetrics) -> None:
        config = gateway.config
        self._gateway = gateway
        self._metrics = metrics
        self._authenticator = Authenticator({}, config.max_timestamp_diff, gateway.clock)
        self.nonces = self._authenticator.nonces
        self._throttle = Throttle(config.max_auth_failures)
        self._routes: dict[str, dict[str, ApiRoute]] = {}  # by template and method
        for route in ROUTES:
            self._routes.setdefault(route.template, {})[route.method] = route
        self.reload(config)

    def keep_nonces(self, path: str, first: bool, elsewhere: bool) -> None:
        """Keep used nonces at `path`: see NonceGuard.keep(). Raises StartError."""
        try:
            self.nonces.keep(path, first, elsewhere)
        except OSError as error:
            raise StartError(f"DB_PATH: {path!r} cannot be written: {_reason(error)}") from None

    def reload(self, config: Config) -> None:
        """Use the keys and tokens of a new configuration."""
        keys = {"default": config.gateway_api_key, **config.gateway_api_keys}
        self._authenticator.reload(keys, config.auth_schemes)
        self._metrics_token = config.metrics_token
        # With METRICS_ALLOWED, addresses that are no backend may connect, but only for the metrics.
        self._backends = config.allowed_backends if config.metrics_allowed else ()

    def admit(self, head: Head, source: str, entry: LogEntry) -> Request:
        """Check signature, path and method, then length, in this order. Raises GatewayError.

        `source` is the caller's address, or THIS_HOST when the kernel has said who the caller is.
        """
        template = path = head.path.removesuffix("/") or "/"
        segment = ""
        if path.startswith(CONFIGURATIONS_PATH + "/") and path not in self._routes:
            segment, slash, rest = path.removeprefix(CONFIGURATIONS_PATH + "/").partition("/")
            template = PEER_PATH + slash + rest
        key = key_from_path(segment) if segment else ""
        routes = self._routes.get(template) if segment or "{" not in template else None
        if routes:  # the log's line names them even if the request is refused
            entry.route, entry.peer = template, short_key(key or "")
        local = source == THIS_HOST
        outside = not local and self._backends and not allows(self._backends, source)
        if outside and path != "/metrics":
            raise Forbidden(
                "METRICS_ALLOWED lets this address read /metrics, and nothing else: a backend's "
                "address must be in ALLOWED_BACKENDS"
            )
        if local:
            entry.key_id = "(this host)"
        elif path.startswith("/api/") or path == "/api":
            self._authenticate(head, source, entry)
        if not routes:
            raise NotFound("there is nothing at this path: /openapi.json has all paths")
        route = routes.get("GET" if head.method == "HEAD" else head.method)
        if route is None:
            allowed = ", ".join([*routes, *(["HEAD"] if "GET" in routes else [])])
            raise MethodNotAllowed(f"this path allows {allowed} only", headers=[("Allow", allowed)])
        if route.guard == "metrics" and not local:
            self._check_metrics(head, source)
        if (route.fields or route.media) and b"content-length" not in head.headers:
            raise LengthRequired("Content-Length is required: this request has a body")
        limit = route.limit if route.guard == "signed" else 0  # unsigned requests have no body
        if head.length > limit:
            raise TooLarge(f"the body has {head.length} bytes; this path accepts at most {limit}")
        if route.guard != "open" and not self._gateway.ready:
            raise Unavailable(self._gateway.starting, headers=[("Retry-After", "1")])
        if key is None:
            raise NotFound("the path has no valid public key: write / as _ and + as -")
        return Request(head, route, key, entry)

    def _authenticate(self, head: Head, source: str, entry: LogEntry) -> None:
        """Verify the signature; failures from the same address do not count against a right one."""
        host = head.headers.get(b"host", b"").decode("latin-1")
        message = SignedMessage(head.method, host, head.target, head.headers, head.length)
        try:
            caller = self._authenticator.verify(message)
        except GatewayError as error:
            entry.key_id = error.key_id
            if isinstance(error, Unauthorized):
                self._count_failure(error, source)
            raise
        entry.key_id = caller.key_id
        self._metrics.signed(caller)

    def _count_failure(self, error: Unauthorized, source: str) -> None:
        """Raises TooManyRequests after too many failures from one source."""
        self._metrics.refused(error.reason)
        wait = self._throttle.fail(source) if error.reason == "signature" else 0
        if wait:
            raise TooManyRequests(
                "too many requests from this address were not authentic: check its key or token",
                headers=[("Retry-After", str(math.ceil(wait)))],
            ) from None

    def _check_metrics(self, head: Head, source: str) -> None:
        if self._metrics_token is None:
            if not ipaddress.ip_address(source).is_loopback:
                raise Forbidden("only loopback may read the metrics without METRICS_TOKEN: set it")
            if any(map(PROXY_HEADER.fullmatch, head.headers)):
                raise Forbidden("a proxy may read the metrics with METRICS_TOKEN only: set it")
            return
        expected = b"bearer " + self._metrics_token.encode("utf-8")
        given = head.headers.get(b"authorization", b"")
        # The scheme's case does not matter (RFC 9110 section 11.1).
        if not hmac.compare_digest(expected, given[:7].lower() + given[7:]):
            error = Unauthorized(NOT_AUTHENTIC)
            self._count_failure(error, source)
            raise error


def json_body(request: Request) -> dict[str, Any]:
    kind = request.media_type
    if kind not in (b"", b"application/json") and not kind.endswith(b"+json"):
        raise UnsupportedMediaType("the body must be application/json")
    return decode_json(request.body)


def body_fields(request: Request) -> dict[str, Any]:
    """The body, decoded with the route's table. A route without fields needs no body."""
    table = request.route.fields
    return parse_fields(json_body(request), table) if table or request.body else {}


def named_interface(gateway: Gateway, query: Mapping[str, Any]) -> str | None:
    name: str | None = query.get("interface")
    if name is not None and name not in gateway.tunnels:
        raise Invalid("interface", f"must be one of {', '.join(gateway.tunnels)}")
    return name


# The members of a configuration in the answer to a change, which has a `status` of its own.
_DONE = tuple(name for name in ALL_MEMBERS if name != "status")
_DONE_IPV4 = tuple(name for name in _DONE if name != "assigned_ipv6")


def payload_box(config: Config) -> PayloadBox | None:
    """What opens and seals payloads, None if nothing does. Raises ConfigError."""
    secret = config.gateway_public_key
    try:
        return PayloadBox(secret) if secret else None
    except ImportError:
        raise ConfigError("GATEWAY_PUBLIC_KEY needs python3-cryptography") from None


class PeerHandlers:
    """Handlers of routes about peers; `box` opens and seals payloads.

    `work` advances a generator in the loop, a slice a round; `call_at` calls a function in the loop
    at a time of time.monotonic().
    """

    def __init__(
        self,
        gateway: Gateway,
        work: Callable[[Iterator[Any]], None],
        call_at: Callable[[float, Callable[[], None]], None],
    ) -> None:
        self.box = payload_box(gateway.config)
        self._gateway = gateway
        self._work = work
        self._call_at = call_at
        self._stopping = False
        # The requests that wait for changes, with `after` and `limit` of each. By number, so that
        # the heap of `call_at` does not keep their answers until the end of their time.
        self._waiting: dict[int, tuple[Later[Response], int, int]] = {}
        self._numbers = itertools.count()
        self._told = 0  # the last change that those requests were woken for
        gateway.lander.on_changed = self._wake_waiting

    def create_peer(self, request: Request) -> Later[Response]:
        body = json_body(request)
        if body.get("encrypted_payload") is None:
            return self._create(body, request.entry)
        sealed = parse_fields(body, SEALED_FIELDS, body)["encrypted_payload"]
        box = self.box  # SIGHUP may replace it at any moment
        if box is None:
            raise Malformed("encrypted_payload: is not accepted: GATEWAY_PUBLIC_KEY is not set")
        opened = box.open(sealed)
        later: Later[Response] = Later()

        def seal(response: Response) -> None:
            if response is not NO_ANSWER:
                content = encode_json({"encrypted_response": box.seal(response.body)})
                response = Response(response.status, content, headers=response.headers)
            later.give(response)

        try:
            fields = {**body, **decode_json(opened)}
            self._create(fields, request.entry).then(seal)
        except Exception as error:
            seal(problem(error))
        return later

    def _create(self, body: Mapping[str, Any], entry: LogEntry) -> Later[Response]:
        fields = parse_create(body)
        entry.peer = short_key(fields["public_key"])
        return self._change("create", fields, lambda outcome: self._created(outcome, fields))

    def _created(self, outcome: Outcome, fields: Mapping[str, Any]) -> str:
        """What a create answers. A peer without an IPv6 address has no assigned_ipv6 in it."""
        peer, differs = outcome.peer, []
        if not outcome.changed:
            tunnel = self._gateway.tunnels[peer.interface]
            differs = differing(tunnel.with_defaults(peer, self._gateway.config), fields)
        said = "created" if outcome.changed else "exists"
        names = _DONE if peer.assigned_ipv6 else _DONE_IPV4
        return self._show_done(said, peer, names, differs=differs, ignored=fields["ignored"])

    def _show_done(
        self, said: str, peer: Peer, names: tuple[str, ...] = _DONE, **lists: list[str]
    ) -> str:
        """These members as JSON, with what was done as `status`, and with lists that have items."""
        shown = self._show(peer.public_key, names)
        text = f'{shown[:-1]},"status":"{said}","peer_status":"{peer.status}"'
        for name, items in lists.items():
            if items:
                text += f',"{name}":{_JSON_ENCODER.encode(items)}'
        return text + "}"

    def run_batch(self, request: Request) -> Later[Response]:
        operations = [_decode_operation(given) for given in body_fields(request)["operations"]]
        later: Later[Response] = Later()

        def reply(results: list[dict[str, Any] | None]) -> None:
            if None in results:
                later.give(NO_ANSWER)
                return
            note = ", ".join(
                f"{operation[0]} {short_key(operation[1]['public_key'])} {result['status']}"
                for operation, result in zip(operations, results, strict=True)
                if result and not isinstance(operation, GatewayError)
            )
            later.give(Response(200, encode_json({"results": results}), note=note))

        work = functools.partial(self._work_on, later)
        work(Batch(self._gateway, operations, self._batch_result, reply, work).steps())
        return later

    def _batch_result(
        self, operation: BatchOperation, result: Outcome | GatewayError
    ) -> dict[str, Any] | None:
        """What the operation would have been answered on its own; None: its outcome is unknown."""
        if isinstance(result, OutcomeUnknown):
            return None
        try:
            if isinstance(result, GatewayError):
                raise result
            name, fields = cast(tuple[str, Mapping[str, Any]], operation)
            said, peer = OPERATIONS[name].said, result.peer
            if name in ("delete", "suspend", "activate"):
                return {"status": said, "public_key": peer.public_key}
            is_create = name == "create"
            text = self._created(result, fields) if is_create else self._show_done(said, peer)
            return cast(dict[str, Any], json.loads(text))
        except Exception as error:
            return problem_details(refusal_of(error))

    @collector_off()
    def sync_peers(self, request: Request) -> Response:
        decoders = {b"application/x-ndjson": decode_lines, b"application/json": decode_array}
        decode = decoders.get(request.media_type)
        if decode is None:
            raise UnsupportedMediaType("the body must be application/x-ndjson or application/json")
        desired: dict[str, Desired] = {}
        for place, element in decode(request.pieces):
            with _placed(place):
                if element.get("encrypted_payload") is not None:
                    raise Invalid("encrypted_payload", "is not accepted in a desired state")
                fields = parse_fields(element, SYNC_FIELDS, CONFIGURATION)
                known = desired.setdefault(fields["public_key"], Desired(place, fields))
                if known.place != place:
                    raise Invalid("public_key", f"{known.place} has the same key")
        dry_run = request.query.get("dry_run", False)
        result = self._gateway.sync(desired, dry_run, request.query.get("allow_mass_delete", False))
        content = {"status": "dry_run" if dry_run else "synced", **result._asdict()}
        return Response(200, encode_json(content), note=str(content))

    def update_peer(self, request: Request) -> Later[Response]:
        return self._change_peer("update", request)

    def rotate_peer(self, request: Request) -> Later[Response]:
        return self._change_peer("rotate", request)

    def reset_quota(self, request: Request) -> Later[Response]:
        return self._change_peer("reset_quota", request)

    def _change_peer(self, rule: str, request: Request) -> Later[Response]:
        """Let a rule change the peer in the path, and show the peer."""
        fields = {**body_fields(request), "public_key": request.key}
        return self._change(rule, fields, lambda outcome: self._show(outcome.peer.public_key))

    def get_peer(self, request: Request) -> Response:
        text = self._show(request.key)
        if request.query.get("format") == "wg-quick":
            peer = cast(Peer, self._gateway.store.get(request.key))
            file = wg_quick(json.loads(text), peer.preshared_key)
            return Response(200, file.encode("utf-8"), "text/plain; charset=utf-8")
        return Response(200, text.encode("utf-8"))

    def set_peer_status(self, request: Request) -> Later[Response]:
        status = body_fields(request)["status"]
        said = "updated" if status == "active" else "suspended"
        fields = {"public_key": request.key, "status": status}
        return self._change("set_status", fields, lambda _: f'{{"status":"{said}"}}')

    def delete_peer(self, request: Request) -> Later[Response]:
        fields = {"public_key": request.key}
        return self._change("delete", fields, lambda _: '{"status":"deleted"}')

    def list_peers(self, request: Request) -> Later[Response]:
        later: Later[Response] = Later()
        self._work_on(later, self._list(request.query))
        return later

    def _list(self, query: Mapping[str, Any]) -> Generator[None, None, Response]:
        chosen = Filter(*map(query.get, Filter._fields))
        chosen = chosen._replace(interface=named_interface(self._gateway, query))
        limit, names = query.get("limit", DEFAULT_PAGE), query.get("fields", ALL_MEMBERS)
        texts: list[str] = []
        after: int | None = query.get("cursor", 0)
        while after is not None:
            wanted = min(limit - len(texts), APPLY_SLICE)
            store, view = self._gateway.store, self._gateway.view()
            rows, after = store.configurations.page(after, wanted, chosen, view, names)
            texts += (text for _, text in rows)
            if len(rows) < wanted or len(texts) == limit:
                break
            yield
        cursor = "null" if after is None else f'"{_encode_cursor(after)}"'
        text = f'{{"configurations":[{",".join(texts)}],"next_cursor":{cursor}}}'
        return Response(200, text.encode("utf-8"))

    def list_changes(self, request: Request) -> Later[Response]:
        query, feeds = request.query, self._gateway.store.feeds
        after, limit = query.get("after", 0), query.get("limit", MAX_PAGE)
        feeds.check(after)
        later: Later[Response] = Later()
        wait = 0 if self._stopping else query.get("wait", 0)
        if not wait or feeds.changes(after, 1, self._gateway.view()):
            self._work_on(later, self._changes(after, limit))
            return later
        if not self._waiting:
            self._told = feeds.last_change  # new traffic totals alone must not wake it
        number = next(self._numbers)
        self._waiting[number] = later, after, limit
        self._call_at(time.monotonic() + wait, functools.partial(self._answer_waiting, number))
        return later

    def list_usage(self, request: Request) -> Later[Response]:
        feeds = self._gateway.store.feeds
        after, limit = request.query.get("after", 0), request.query.get("limit", MAX_USAGE)
        feeds.check(after)
        later: Later[Response] = Later()
        self._work_on(later, self._feed("usage", after, limit, feeds.usage))
        return later

    def _changes(self, after: int, limit: int) -> Generator[None, None, Response]:
        def read(position: int, wanted: int, until: int) -> list[tuple[int, str]]:
            return self._gateway.store.feeds.changes(position, wanted, self._gateway.view(), until)

        return self._feed("changes", after, limit, read)

    def _feed(
        self,
        name: str,
        after: int,
        limit: int,
        read: Callable[[int, int, int], list[tuple[int, str]]],
    ) -> Generator[None, None, Response]:
        """Answer with what is behind the sequence `after` now: read() returns (sequence, JSON).

        What changes while this collects gets a sequence behind `until`, so no key comes twice.
        """
        until = self._gateway.store.feeds.sequence
        rows: list[tuple[int, str]] = []
        while True:
            wanted = min(limit - len(rows), APPLY_SLICE)
            found = read(rows[-1][0] if rows else after, wanted, until)
            rows += found
            if len(found) < wanted or len(rows) == limit:
                break
            yield
        last, full = rows[-1][0] if rows else 0, len(rows) == limit
        following = self._gateway.store.feeds.next_after(after, last, until, full)
        text = f'{{"{name}":[{",".join(text for _, text in rows)}],"next":{following}}}'
        return Response(200, text.encode("utf-8"))

    def stop_waiting(self) -> None:
        """Answer all requests that wait for changes: the gateway stops. Owner."""
        self._stopping = True
        self._work(self._answer_all_waiting())

    def _wake_waiting(self) -> None:
        """Answer the requests that wait for changes, if there are any. Owner."""
        if self._waiting and self._gateway.store.feeds.last_change > self._told:
            self._told = self._gateway.store.feeds.last_change
            self._work(self._answer_all_waiting())

    def _answer_all_waiting(self) -> Iterator[None]:
        for number in list(self._waiting):
            self._answer_waiting(number)
            yield

    def _answer_waiting(self, number: int) -> None:
        if number in self._waiting:
            later, after, limit = self._waiting.pop(number)
            self._work_on(later, self._changes(after, limit))

    # --- what handlers share ---------------------------------------------------------------------

    def _show(self, public_key: str, names: tuple[str, ...] = ALL_MEMBERS) -> str:
        """A peer's configuration as JSON, with all members or those named."""
        text = self._gateway.store.configurations.show(public_key, self._gateway.view(), names)
        if text is None:
            raise NotFound(NO_PEER)
        return text

    def _change(
        self, name: str, fields: Mapping[str, Any], show: Callable[[Outcome], str]
    ) -> Later[Response]:
        """Let a rule decide; the answer comes when its decision has landed."""
        later: Later[Response] = Later()

        def reply(outcome: Outcome | GatewayError) -> None:
            try:
                if isinstance(outcome, GatewayError):
                    raise outcome
                response = Response(200, show(outcome).encode("utf-8"))
            except Exception as error:
                response = problem(error)
            later.give(response)

        self._gateway.change(name, fields, reply)
        return later

    def _work_on(
        self, later: Later[Response], steps: Generator[None, None, Response | None]
    ) -> None:
        """Work in slices, and answer with what they return, unless it is None."""

        def work() -> Iterator[None]:
            try:
                response = yield from steps
            except Exception as error:
                response = problem(error)
            if response is not None:
                later.give(response)

        self._work(work())


class GatewayHandlers:
    """Handlers of routes about the gateway itself, and of those that need no signature."""

    def __init__(
        self,
        gateway: Gateway,
        host: HostMetrics,
        metrics: RequestMetrics,
        copy_state: Callable[[], CopyState | None],
    ) -> None:
        self._gateway, self._clock = gateway, gateway.clock
        self._host, self._metrics = host, metrics
        self._copy_state = copy_state
        self._started = self._clock()

    def get_ip_usage(self, request: Request) -> dict[str, Any]:
        return self._gateway.usage(named_interface(self._gateway, request.query))

    def get_obfuscation(self, request: Request) -> dict[str, Any]:
        tunnel = self._gateway.obfuscated()
        state = cast(ObfuscationState, tunnel.obfuscation)
        return {
            "interface": tunnel.name,
            "total_peers": self._gateway.run(self._gateway.figures).peers(None, tunnel.name),
            "generation": state.generation,
            "parameters_version": state.version,
            "parameters": show_parameters(state.parameters),
            "warnings": obfuscation_warnings(state),
        }

    def rotate_obfuscation(self, request: Request) -> dict[str, Any]:
        fields = body_fields(request)
        wanted = fields.get("parameters")
        if wanted is None:
            try:
                preset = fields.get("preset", DEFAULT_PRESET)
                wanted = generate_obfuscation(fields.get("generation"), preset)
            except ValueError as error:
                raise Invalid("preset", str(error).removeprefix("preset: ")) from None
        elif fields.get("generation"):  # the clients know no later one
            given = {**show_parameters(wanted.parameters), "generation": fields["generation"]}
            wanted = _field_parameters(given)
        cut = self._gateway.change_obfuscation(wanted, fields.get("confirm", False))
        return {"status": "rotated", "cut_off_peers": cut, **self.get_obfuscation(request)}

    def export_snapshot(self, request: Request) -> Response:
        return Response(200, self._gateway.export(), "application/octet-stream")

    def import_snapshot(self, request: Request) -> dict[str, Any]:
        dry_run = request.query.get("dry_run", False)
        data = b"".join(request.pieces)
        total, cut = self._gateway.import_(data, request.query.get("replace_key"), dry_run)
        status = "dry_run" if dry_run else "imported"
        return {"status": status, "total_peers": total, "cut_off_peers": cut}

    def sync_ips(self, request: Request) -> dict[str, Any]:
        body_fields(request)  # there are none: any field is refused
        name = named_interface(self._gateway, request.query)
        if request.query.get("accept_key"):
            self._gateway.accept_keys()
        try:
            result = self._gateway.projection.reconcile(name)
        except BackendError as error:
            LOG.error("%s", error)
            raise Unavailable("the interface is not usable: server/status says why") from None
        return {"status": "synced", **result._asdict()}

    def get_status(self, request: Request) -> dict[str, Any]:
        now, figures = self._clock(), self._gateway.run(self._gateway.figures)
        copy = self._copy_state()
        taken = figures.snapshot_time
        return {
            "status": "degraded" if figures.degraded else "healthy",
            "wireguard_peers": figures.online,
            "total_peers": figures.peers(),
            "memory_usage": self._host.memory()["percent"],
            "load_average": round(os.getloadavg()[0], 2),
            "timestamp": rfc3339(now),
            "reasons": figures.degraded,
            "remote_copy": copy and copy._asdict(),
            "version": __version__,
            "uptime_seconds": int(now - self._started),
            "python_version": PYTHON_VERSION,
            "certificate_expires_at": rfc3339(self._metrics.certificate_expires),
            "snapshot": {"at": rfc3339(taken) if taken else None, "bytes": figures.snapshot_bytes},
            "journal": {"records": figures.number, "bytes": figures.journal_bytes},
            "interfaces": [self._interface(t, figures) for t in self._gateway.tunnels.values()],
            "service_classes": [row._asdict() for row in figures.classes],
        }

    @staticmethod
    def _interface(tunnel: Tunnel, figures: Figures) -> dict[str, Any]:
        name = tunnel.name
        return {
            "name": name,
            "backend": tunnel.backend.kind,
            "public_key": tunnel.public_key,
            "listen_port": tunnel.link.listen_port,
            "subnets": {f: str(subnet) for f, subnet in tunnel.settings.subnets.items()},
            "active_peers": figures.peers("active", name),
            "total_peers": figures.peers(None, name),
            "parameters_version": tunnel.obfuscation and tunnel.obfuscation.version,
            "pools": {f: usage for (of, f), usage in figures.pools.items() if of == name},
            "rx_bytes": tunnel.rx_bytes,
            "tx_bytes": tunnel.tx_bytes,
            "rx_bytes_per_second": round(tunnel.rx_rate),
            "tx_bytes_per_second": round(tunnel.tx_rate),
            "sample_age_seconds": round(max(time.monotonic() - tunnel.sampled[0], 0.0), 1),
        }

    def get_server_metrics(self, request: Request) -> dict[str, Any]:
        figures = self._gateway.run(self._gateway.figures)
        queries = self._gateway.store.queries
        handshakes = self._gateway.run(lambda: queries.last_handshakes(MAX_PAGE))
        tunnels = self._gateway.tunnels.values()
        return {
            "system": {
                "cpu_percent": self._host.cpu_percent,
                "memory": self._host.memory(),
                "disk": self._host.disk(),
                "load_average": [round(load, 2) for load in os.getloadavg()],
            },
            "wireguard": {
                "active_peers": figures.peers("active"),
                "online_peers": figures.online,
                "total_peers": figures.peers(),
                "ip_usage": {f: pool_usage(t.pools.get(f) for t in tunnels) for f in FAMILIES},
                "last_handshakes": {key: rfc3339(when) for key, when in handshakes.items()},
            },
            "timestamp": rfc3339(self._clock()),
        }

    def get_metrics(self, request: Request) -> Response:
        parts = [*render_gateway(self._gateway), *self._metrics.render()]
        parts += render_process(self._started)
        copy = self._copy_state()
        if copy is not None:
            parts += render_copy(copy, bool(self._gateway.ledger.replaced))
        if self._gateway.config.per_peer_metrics:
            parts += render_peers(self._gateway)
        text = "".join(parts)
        return Response(200, text.encode("ascii"), "text/plain; version=0.0.4; charset=utf-8")

    def get_health(self, request: Request) -> dict[str, Any]:
        return {"status": "alive"}

    def get_readiness(self, request: Request) -> dict[str, Any]:
        if not self._gateway.ready:
            raise Unavailable(self._gateway.starting, headers=[("Retry-After", "1")])
        reasons = self._gateway.degraded()
        if reasons:
            raise Unavailable("degraded: " + "; ".join(reasons))
        return {"status": "ready"}

    def get_openapi(self, request: Request) -> Response:
        return Response(200, openapi_document())


class App:
    """Answers requests: `admission` sees the head alone, then answer() or answer_later() the body.

    See PeerHandlers for `work` and `call_at`.
    """

    def __init__(
        self,
        gateway: Gateway,
        host: HostMetrics,
        work: Callable[[Iterator[Any]], None],
        call_at: Callable[[float, Callable[[], None]], None] = lambda when, function: None,
    ) -> None:
        self.gateway = gateway
        self.metrics = RequestMetrics()
        self.copier: Copier | None = None
        self.admission = Admission(gateway, self.metrics)
        self.peers = PeerHandlers(gateway, work, call_at)
        others = GatewayHandlers(gateway, host, self.metrics, self._copy_state)
        self.handlers = {"peers": self.peers, "gateway": others, "monitoring": others}

    def reload(self, config: Config, box: PayloadBox | None) -> None:
        """Use the keys and tokens of a new configuration, and the box that payload_box() made."""
        self.peers.box = box
        self.admission.reload(config)

    def _copy_state(self) -> CopyState | None:
        return self.copier.state() if self.copier else None

    def answer_later(
        self, request: Request, body: bytes, reply: Callable[[Response], None]
    ) -> None:
        """Run a handler in the loop; it calls `reply` with the answer, now or later."""
        response = self.answer(request, body)
        if isinstance(response, Later):
            response.then(reply)
        else:
            reply(response)

    def answer(self, request: Request, body: bytes | Iterator[bytes]) -> Response | Later[Response]:
        """Run a handler. One that runs in a worker's thread returns a Response."""
        try:
            head, route = request.head, request.route
            digest = head.headers.get(b"content-digest")  # an attacker may have cut the body away
            pieces = iter((body,)) if isinstance(body, bytes) else body
            signed = route.guard == "signed" and b"signature-input" in head.headers
            if signed and (head.length or digest):
                pieces = digested(digest or b"", pieces)
            if route.place == "reader":
                request.pieces = pieces
            else:
                request.body = b"".join(pieces)
            if head.query:
                query = parse_query(head.query)
                for name in query.keys() - route.query.keys():
                    raise Malformed(f"{name[:64]}: is no query parameter of this path")
                request.query = parse_fields(query, route.query)
            answer = route.handler(self.handlers[route.tag], request)
            return Response(200, encode_json(answer)) if isinstance(answer, dict) else answer
        except Exception as error:
            if isinstance(error, Unauthorized):  # the rest of the signature was right
                self.metrics.refused(error.reason)
            return problem(error)


def _encode_cursor(peer_id: int) -> str:
    return base64.urlsafe_b64encode(b"1:%d" % peer_id).decode("ascii").rstrip("=")


def _query_cursor(text: str) -> int:
    raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    match = re.fullmatch(rb"1:([0-9]{1,18})", raw)
    if not match:
        raise ValueError
    return int(match[1])


def _query_flag(text: str) -> bool:
    if text not in ("true", "1", "false", "0"):  # PHP clients send digits
        raise ValueError
    return text in ("true", "1")


def _query_names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if not set(names) <= CONFIGURATION.keys():
        raise ValueError
    return names


def _query_after(text: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,19}", text) or abs(int(text)) > MAX_INTEGER:
        raise ValueError
    return int(text)


def _query_number(low: int, high: int, default: int, unit: str, note: str = "") -> Field:
    schema = {"type": "integer", "minimum": low, "maximum": high, "default": default}
    return Field(*_number(unit, low, high), schema, note)


AFTER_FIELD = Field(
    _query_after,
    "the `next` of an earlier answer, or 0",
    {"type": "integer", "format": "int64", "default": 0},
)
FLAG_FIELD = Field(_query_flag, "true or false", FLAG)
CHANGES_QUERY: dict[str, Field] = {
    "after": AFTER_FIELD,
    "limit": _query_number(1, MAX_PAGE, MAX_PAGE, "a number"),
    "wait": _query_number(
        0, CHANGES_PATIENCE, 0, "seconds", "how long to wait for a change when there is none"
    ),
}
USAGE_QUERY: dict[str, Field] = {
    "after": AFTER_FIELD,
    "limit": _query_number(1, MAX_USAGE, MAX_USAGE, "a number"),
}

LIST_QUERY: dict[str, Field] = {
    "limit": _query_number(1, MAX_PAGE, DEFAULT_PAGE, "a number"),
    "cursor": Field(_query_cursor, "the next_cursor of an earlier answer", {"type": "string"}),
    "status": choice_field(STATUSES),
    "online": FLAG_FIELD,
    "interface": INTERFACE_FIELD,
    "status_reason": choice_field(REASONS),
    "label": CREATE_FIELDS["label"]._replace(note="exactly this one"),
    "request_id": CREATE_FIELDS["request_id"]._replace(note="exactly this one"),
    "fields": Field(
        _query_names,
        "names of a configuration's members, separated by commas",
        TEXT_SCHEMA,
        "shows only these members",
    ),
}

# --- the route table, and the answers' schemas ----------------------------------------------------


def partial_schema(**properties: Schema) -> Schema:
    """An object whose properties may be missing; later versions may add some.

    The schema says so, because openapi-generator's Go clients refuse properties that it does not
    describe.
    """
    return {**FREE_OBJECT, "properties": properties}


def answer_schema(**properties: Schema) -> Schema:
    """An object whose properties are always there; later versions may add some."""
    return {**partial_schema(**properties), "required": list(properties)}


def said_schema(*words: str, **more: Schema) -> Schema:
    return answer_schema(status=one_of(words), **more)


def counts(*names: str) -> dict[str, Schema]:
    return dict.fromkeys(names, COUNT)


SPOKEN: dict[str, Schema] = {
    "interface": TEXT,
    "total_peers": COUNT,
    "generation": one_of(GENERATIONS),
    "parameters_version": COUNT,
    "parameters": FREE_OBJECT,
    "warnings": TEXTS,
}

POOL: dict[str, Schema] = {
    **dict.fromkeys(("total", "used", "available"), NUMBER),  # int64 is too small for IPv6
    "gateway_ip": or_null(TEXT),
}

# What a create answers. A peer without an IPv6 address has no assigned_ipv6 in it.
CREATED: dict[str, Schema] = {
    **CONFIGURATION,
    "status": one_of(("created", "exists")),
    "assigned_ipv6": IPV6,
    "peer_status": STATUS,
    "differs": about(TEXTS, "of a peer that exists: fields whose stored values differ"),
    "ignored": about(TEXTS, "fields of the request that the gateway does not know"),
}

REMOTE_COPY = answer_schema(
    **counts("epoch", "number", "lag_records", "requests", "bytes_sent", "bytes_received"),
    holder=TEXT,
    lag_seconds=NUMBER,
    failure=or_null(TEXT),
)

SCHEMAS: dict[str, Schema] = {
    "PeerConfiguration": answer_schema(**CONFIGURATION),
    "ListedPeer": partial_schema(**CONFIGURATION),
    "DesiredPeer": fields_schema(SYNC_FIELDS),
    "BatchOperation": fields_schema(BATCH_OPERATION),
    "BatchResult": partial_schema(
        **{
            **CREATED,
            **dict.fromkeys(("type", "title", "detail"), TEXT),
            "status": {"description": "a word, or the number of a problem"},
        }
    ),
    "EncryptedResponse": answer_schema(encrypted_response=TEXT),
    "Problem": answer_schema(type=TEXT, title=TEXT, status=HTTP_STATUS, detail=TEXT),
    "AddressUsage": answer_schema(**POOL, assigned_ips=TEXTS),
    "AddressPool": answer_schema(**POOL),
    "HostMemory": answer_schema(**counts("total", "available", "used"), percent=PERCENT),
    "HostDisk": answer_schema(**counts("total", "free", "used"), percent=PERCENT),
    "GatewayInterface": answer_schema(
        name=TEXT,
        backend=TEXT,
        public_key=KEY_SCHEMA,
        **counts("listen_port", "active_peers", "total_peers", "rx_bytes", "tx_bytes"),
        **counts("rx_bytes_per_second", "tx_bytes_per_second"),
        parameters_version=or_null(COUNT),
        subnets={"type": "object", "additionalProperties": TEXT},
        pools={"type": "object", "additionalProperties": component("AddressPool")},
        sample_age_seconds=NUMBER,
    ),
    "ServiceClass": answer_schema(
        name=TEXT,
        peers=COUNT,
        expected_addresses=about(COUNT, "of its active peers"),
        addresses=about(COUNT, "in the kernel's sets, as of the last sample"),
        dropped_bytes={"type": "object", "additionalProperties": COUNT},
    ),
    "PeerChange": answer_schema(
        sequence=COUNT,
        time=TIME_SCHEMA,
        deleted=FLAG,
        public_key=KEY_SCHEMA,
        configuration=or_null(answer_schema(**CONFIGURATION)),
    ),
    "PeerUsage": answer_schema(
        public_key=KEY_SCHEMA, **counts("rx_bytes", "tx_bytes"), last_handshake=or_null(TIME_SCHEMA)
    ),
}

SHOWN = component("PeerConfiguration")
NEXT = about(
    {"type": "integer", "format": "int64"},
    "the `after` of the next request; negative until the listing that began with 0 is complete",
)
STATUS_PATH = "/api/v1/server/status"
CONFIGURATIONS_PATH = "/api/v1/configurations"
PEER_PATH = CONFIGURATIONS_PATH + "/{public_key}"

# fmt: off
ROUTES: tuple[ApiRoute, ...] = (
    ApiRoute(
        "POST", CONFIGURATIONS_PATH, "peers", PeerHandlers.create_peer,
        "Create a peer. The same public key again answers `exists`, with the same addresses.",
        partial_schema(**CREATED, encrypted_response=TEXT), CREATE_BODY, errors=(409,)),
    ApiRoute(
        "GET", CONFIGURATIONS_PATH, "peers", PeerHandlers.list_peers,
        "List the peers, a page at a time.",
        answer_schema(configurations=list_of("ListedPeer"), next_cursor=or_null(TEXT)),
        query=LIST_QUERY),
    ApiRoute(
        "GET", "/api/v1/changes", "peers", PeerHandlers.list_changes,
        "List peers in the order of their latest changes, or wait for a change.",
        answer_schema(changes=list_of("PeerChange"), next=NEXT),
        query=CHANGES_QUERY, errors=(410,), patience=CHANGES_PATIENCE),
    ApiRoute(
        "GET", "/api/v1/usage", "peers", PeerHandlers.list_usage,
        "List the traffic totals of the peers whose totals changed.",
        answer_schema(usage=list_of("PeerUsage"), next=NEXT),
        query=USAGE_QUERY, errors=(410,)),
    ApiRoute(
        "PUT", CONFIGURATIONS_PATH, "peers", PeerHandlers.sync_peers,
        "Replace all peers by these, completely or not at all. A read during the change may show a "
        "part of it.",
        said_schema("synced", "dry_run", **counts(*DesiredResult._fields)),
        media={
            "application/json": list_of("DesiredPeer"),
            "application/x-ndjson": about(BINARY, "a DesiredPeer a line")},
        query=dict.fromkeys(
            ("dry_run", "allow_mass_delete"), FLAG_FIELD),
        errors=(409, 415, 422), limit=MAX_LINES, place="reader"),
    ApiRoute(
        "POST", CONFIGURATIONS_PATH + "/batch", "peers", PeerHandlers.run_batch,
        "Do operations in order, each completely or not at all; the answer has a result for each.",
        answer_schema(results=list_of("BatchResult")), BATCH_FIELDS, limit=MAX_BATCH * 1024),
    ApiRoute(
        "GET", PEER_PATH, "peers", PeerHandlers.get_peer,
        "Show one peer with its live state, or its client's configuration as text.",
        SHOWN, answer_media={"text/plain": TEXT},
        query={"format": choice_field(("json", "wg-quick"))}),
    ApiRoute(
        "PATCH", PEER_PATH, "peers", PeerHandlers.update_peer,
        "Change a peer; null clears a field.",
        SHOWN, PATCH_FIELDS, errors=(409,)),
    ApiRoute(
        "POST", PEER_PATH + "/rotate", "peers", PeerHandlers.rotate_peer,
        "Give a peer a new key; its addresses stay.",
        SHOWN, ROTATE_FIELDS, errors=(409,)),
    ApiRoute(
        "POST", PEER_PATH + "/reset-quota", "peers", PeerHandlers.reset_quota,
        "Set a peer's used quota to 0; a suspension by quota ends.",
        SHOWN),
    ApiRoute(
        "DELETE", PEER_PATH, "peers", PeerHandlers.delete_peer,
        "Delete a peer; its addresses become free.",
        said_schema("deleted")),
    ApiRoute(
        "PUT", PEER_PATH + "/status", "peers", PeerHandlers.set_peer_status,
        "Suspend or activate a peer. Activating answers `updated`.",
        said_schema("suspended", "updated"), STATUS_FIELDS, errors=(409,)),
    ApiRoute(
        "GET", "/api/v1/ip-usage", "gateway", GatewayHandlers.get_ip_usage,
        "Count total, used and free addresses of all interfaces together, or of one.",
        answer_schema(**dict.fromkeys(FAMILIES, component("AddressUsage"))),
        query={"interface": INTERFACE_FIELD}, place="worker"),
    ApiRoute(
        "POST", "/api/v1/sync-ips", "gateway", GatewayHandlers.sync_ips,
        "Compare the interfaces with the store now, and repair them.",
        said_schema("synced", **counts(*SyncResult._fields)),
        query={"interface": INTERFACE_FIELD, "accept_key": FLAG_FIELD}, place="worker"),
    ApiRoute(
        "GET", STATUS_PATH, "gateway", GatewayHandlers.get_status,
        "Show health, peers online, load.",
        said_schema(
            "healthy", "degraded",
            **counts("wireguard_peers", "total_peers", "uptime_seconds"),
            memory_usage=PERCENT, load_average=NUMBER,
            timestamp=TIME_SCHEMA, certificate_expires_at=TIME_SCHEMA,
            reasons=TEXTS, version=TEXT, python_version=TEXT,
            remote_copy=or_null(REMOTE_COPY),
            snapshot=answer_schema(at=or_null(TIME_SCHEMA), bytes=COUNT),
            journal=answer_schema(**counts("records", "bytes")),
            interfaces=list_of("GatewayInterface"),
            service_classes=list_of("ServiceClass"))),
    ApiRoute(
        "GET", "/api/v1/server/metrics", "gateway", GatewayHandlers.get_server_metrics,
        "Show figures of host and WireGuard.",
        answer_schema(
            system=answer_schema(
                cpu_percent=PERCENT, memory=component("HostMemory"), disk=component("HostDisk"),
                load_average={"type": "array", "items": NUMBER}),
            wireguard=answer_schema(
                **counts("active_peers", "online_peers", "total_peers"),
                ip_usage=answer_schema(**dict.fromkeys(FAMILIES, component("AddressPool"))),
                last_handshakes={"type": "object", "additionalProperties": TIME_SCHEMA}),
            timestamp=TIME_SCHEMA),
        place="worker"),  # it asks the file system, which may hang
    ApiRoute(
        "GET", "/api/v1/obfuscation", "gateway", GatewayHandlers.get_obfuscation,
        "Show the parameters of the AmneziaWG interface.",
        answer_schema(**SPOKEN), errors=(404,)),
    ApiRoute(
        "POST", "/api/v1/obfuscation/rotate", "gateway", GatewayHandlers.rotate_obfuscation,
        "Change AmneziaWG's parameters. Its clients then need new configurations.",
        said_schema("rotated", cut_off_peers=COUNT, **SPOKEN), OBFUSCATION_FIELDS,
        errors=(404, 409), place="worker"),
    ApiRoute(
        "GET", "/api/v1/snapshot", "gateway", GatewayHandlers.export_snapshot,
        "Export the whole state as one file, encrypted when SNAPSHOT_KEY is set.",
        answer_media={"application/octet-stream": BINARY}, place="worker"),
    ApiRoute(
        "PUT", "/api/v1/snapshot", "gateway", GatewayHandlers.import_snapshot,
        "Replace the whole state by an exported file.",
         said_schema("imported", "dry_run", total_peers=COUNT, cut_off_peers=COUNT),
         query={
            "dry_run": FLAG_FIELD,
            "replace_key": FLAG_FIELD._replace(
                note="required for a snapshot of other keys, or of another gateway"
            ),
        },
        media={"application/octet-stream": BINARY},
        errors=(409,), limit=MAX_SNAPSHOT, place="reader"),
    ApiRoute(
        "GET", "/metrics", "monitoring", GatewayHandlers.get_metrics,
        "Show figures as Prometheus text.",
        answer_media={"text/plain": TEXT}, guard="metrics", place="worker"),
    ApiRoute(
        "GET", "/healthz", "monitoring", GatewayHandlers.get_health,
        "Say that the process is alive.",
        said_schema("alive"), guard="open"),
    ApiRoute(
        "GET", "/readyz", "monitoring", GatewayHandlers.get_readiness,
        "Say that the gateway is ready, or answer 503 with the reason.",
        said_schema("ready"), errors=(503,), guard="open"),
    ApiRoute(
        "GET", "/openapi.json", "monitoring", GatewayHandlers.get_openapi,
        "Show this description.",
        FREE_OBJECT, guard="open", place="worker"),
)
# fmt: on

# --- the API's description (OpenAPI 3.1), made from the tables above ------------------------------


# Who may call a route: security requirements, of which one is enough, and the refusals' statuses.
GUARDS: dict[str, tuple[Sequence[Mapping[str, Sequence[str]]], Sequence[int]]] = {
    "signed": (
        (
            {"legacySignature": (), "legacyTimestamp": ()},
            {"signatureInput": (), "messageSignature": ()},
        ),
        (401, 429, 503),
    ),
    "metrics": (({"metricsToken": ()}, {}), (401, 429, 503)),
    "open": (({},), ()),
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
        "description": "METRICS_TOKEN. Where it is not set, only loopback may read the metrics, "
        "and not through a proxy.",
    },
}

# What each status means here.
ERROR_TEXTS: dict[int, str] = {
    400: "Malformed: the request cannot be understood.",
    401: "Not authentic. When only the time is wrong, `detail` has the server's time.",
    403: "The caller's address may not do this.",
    404: "There is no peer with this key, or nothing at this path.",
    408: "The request did not arrive in time.",
    409: "In conflict with the state: an address or a key is taken, or the peer has expired.",
    410: "The gateway no longer knows what changed since `after`: begin again with 0.",
    411: "The request has a body without Content-Length.",
    413: "The body is longer than this path accepts.",
    415: "This path does not accept the body's media type.",
    422: "A value is not accepted; `detail` begins with the field's name.",
    429: "Too many failures or too many signatures: see Retry-After.",
    431: "The head of the request is too large.",
    503: "No address is free, interface or disk is not usable, or the gateway is starting.",
}
ANSWER_HEADERS: Schema = {"X-Request-Id": {"$ref": "#/components/headers/X-Request-Id"}}


def _error_statuses(route: ApiRoute) -> list[int]:
    """The errors that a route can answer: those that its columns entail, and its `errors`."""
    statuses = {400, 403, 408, 411, 413, 431, *GUARDS[route.guard][1], *route.errors}
    statuses |= {404} if "{" in route.template else set()
    statuses |= {415} if route.fields or route.method == "POST" else set()
    statuses |= {422} if route.fields or route.query or route.method == "POST" else set()
    return sorted(statuses)


def _content(name: str, content: Content, schemas: dict[str, Schema]) -> Schema:
    """A Content Object without empty schemas. Objects and lists are put into `schemas` as `name`.

    Generated clients name their classes after it.
    """
    shown = {}
    for media, schema in content.items():
        if schema.keys() & {"properties", "items"}:
            schemas[name], schema = schema, component(name)
        if schema:
            shown[media] = {"schema": schema}
    return shown


def _error_response(status: int, sealed: bool) -> Schema:
    content = {"application/problem+json": {"schema": component("Problem")}}
    if sealed:
        content |= {"application/json": {"schema": component("EncryptedResponse")}}
    headers = dict(ANSWER_HEADERS)
    if status in (429, 503):
        headers["Retry-After"] = {"schema": COUNT, "description": "seconds"}
    return {"description": ERROR_TEXTS[status], "headers": headers, "content": content}


# Generated clients have a class for each.
TAGS = {
    "peers": "Peers: what clients need to connect, what changed, what they used.",
    "gateway": "The gateway: its addresses, interfaces, state and snapshots.",
    "monitoring": "Monitoring: what needs no signature.",
}


def describe_route(route: ApiRoute, schemas: dict[str, Schema]) -> Schema:
    """A route as an Operation Object. Its schemas are put into `schemas`."""
    name = route.handler.__name__
    type_name = name.title().replace("_", "")
    answer = {"application/json": route.answer, **route.answer_media}
    content = _content(type_name + "Answer", answer, schemas)
    responses: dict[str, Schema] = {
        "200": {"description": "Done.", "headers": ANSWER_HEADERS, "content": content}
    }
    sealed = route.fields is CREATE_BODY
    for status in _error_statuses(route):
        shared = {"$ref": f"#/components/responses/Error{status}"}
        responses[str(status)] = _error_response(status, True) if sealed else shared
    parameters: list[Schema] = [
        {"name": field, "in": "query", "description": row.description, "schema": row.schema}
        for field, row in route.query.items()
    ]
    if "{" in route.template:
        parameters.insert(0, {"$ref": "#/components/parameters/public_key"})
    operation = {
        "operationId": name,
        "tags": [route.tag],
        "summary": re.split("[.;]", route.description)[0],
        "description": route.description,
        "security": GUARDS[route.guard][0],
        "parameters": parameters,
        "responses": responses,
    }
    fields = fields_schema(route.fields) if route.fields else {}
    content = _content(type_name + "Body", {"application/json": fields, **route.media}, schemas)
    if content:
        text = f"At most {route.limit} bytes."
        operation["requestBody"] = {"required": True, "description": text, "content": content}
    return operation


def describe_api() -> Schema:
    """ROUTES as an OpenAPI 3.1 document."""
    paths: dict[str, dict[str, Schema]] = {}
    schemas = dict(SCHEMAS)
    for route in ROUTES:
        row = paths.setdefault(route.template, {})
        row[route.method.lower()] = describe_route(route, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "wggw",
            "version": __version__,
            "summary": "A WireGuard gateway's API for the backend of a VPN provider.",
            "description": "JSON in UTF-8 over HTTPS. A trailing slash makes no difference, HEAD "
            "is GET without the body. A field or query parameter that a route does not know is "
            "refused; only a create ignores such fields, and lists them in `ignored`. Errors are "
            "RFC 9457 problems; a request that failed has changed nothing. A create request with "
            "`encrypted_payload` is answered by an `encrypted_response`, errors after decryption "
            "included.",
            "contact": {"name": "the wggw authors"},
            "license": {"name": "Proprietary", "identifier": "LicenseRef-Proprietary"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": schemas,
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
            "headers": {
                "X-Request-Id": {
                    "description": "The caller's own X-Request-Id, if it has this form, or a new "
                    "one. The gateway's log has the same.",
                    "required": True,
                    "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"},
                }
            },
            "responses": {f"Error{n}": _error_response(n, False) for n in ERROR_TEXTS},
            "securitySchemes": SECURITY_SCHEMES,
        },
    }


@functools.cache
def openapi_document() -> bytes:
    """The description as JSON, made once."""
    return encode_json(describe_api())


def render_response(
    response: Response, keep_alive: bool, head_only: bool, date: str, request_id: str
) -> bytes:
    """Head and body in one piece, so that a short answer is one write and one packet."""
    text = (
        f"HTTP/1.1 {response.status} {http.client.responses[response.status]}\r\nDate: {date}\r\n"
        f"Content-Type: {response.content_type}\r\nContent-Length: {len(response.body)}\r\n"
        f"Cache-Control: no-store\r\nX-Request-Id: {request_id}\r\n"
    )
    for name, value in response.headers:
        text += f"{name}: {value}\r\n"
    head = (text + ("\r\n" if keep_alive else "Connection: close\r\n\r\n")).encode("ascii")
    return head if head_only else head + response.body


# ==================================================================================================
# server: the loop, which owns the rows and all connections; handshakes, limits, timers, signals
#
# In each round the loop waits for sockets, calls the functions that other threads have posted,
# reads requests, answers or decides them, sends answers, and passes the flights of this round to
# the lander. Nothing in it may block or take longer than a few milliseconds: long work runs in
# slices, or in its own thread, which asks for slices by Loop.run().
#
# Commands on this host connect to a Unix socket, where the loop accepts them if the kernel names
# root or our user as the caller. A thread of class Server accepts all others, from allowed
# addresses only. The loop closes an idle connection if there are too many, and a thread of its own
# does the TLS handshake within a deadline and hands the connection to the loop. A worker borrows it
# to read a long body, and returns it with the answer. While a request waits for its answer, the
# loop reads no more than a buffer of what the client sends. A client that does not read its answers
# gets no further ones. One that sends many requests or TLS records without waiting has a few
# requests answered and a few KiB read, then others have a turn.
#
# Once a second the loop looks for connections whose deadline has passed. So a deadline costs a
# request one assignment, and any number of idle connections wakes nobody; each deadline is up to
# SWEEP_SECONDS late.
# Never here: routes.
# ==================================================================================================


class Loop:
    """One thread for sockets, posted functions, work in slices and deadlines.

    It calls `after_round` at the end of each round. `now` is when the round began (monotonic).
    """

    def __init__(self) -> None:
        self.after_round: Callable[[], None] = lambda: None
        self.now = time.monotonic()
        self._poll = select.epoll()
        self._handlers: dict[int, Connection | Listener] = {}
        self._inbox: collections.deque[Callable[[], None]] = collections.deque()
        self._work: collections.deque[Iterator[Any]] = collections.deque()
        # Connections with buffered requests: each has one turn a round, however often it asks.
        self._again: collections.OrderedDict[Connection, None] = collections.OrderedDict()
        self._calls: list[tuple[float, int, Callable[[], None]]] = []  # a heap, by time
        self._order = itertools.count()
        self._next_sweep = 0.0
        self._asleep = False
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # Edge-triggered: each write wakes the loop, which then need not read the counter.
        self._poll.register(self._bell, select.EPOLLIN | select.EPOLLET)
        self._thread = threading.Thread(target=self._rounds, name="loop", daemon=True)
        self._stopping = False

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        def end() -> None:
            self._stopping = True

        self.post(end)
        self._thread.join(STOP_SECONDS)

    # --- for other threads -----------------------------------------------------------------------

    def post(self, function: Callable[[], None]) -> None:
        """Call a function in the next round."""
        self._inbox.append(function)
        if self._asleep:
            os.eventfd_write(self._bell, 1)

    def run(self, function: Callable[[], _T], /) -> _T:
        """Call a function in the loop. Returns its result, or raises its exception."""
        if threading.current_thread() is self._thread:
            return function()
        answer: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def call() -> None:
            try:
                answer.put((function(), None))
            except BaseException as error:
                answer.put((None, error))

        self.post(call)
        result, error = answer.get()
        if error is not None:
            raise error
        return cast(_T, result)

    def begin(self, steps: Iterator[Any]) -> None:
        """Have the loop do work(). Does not wait for it."""
        self.post(lambda: self.work(steps))

    # --- for the loop ----------------------------------------------------------------------------

    def work(self, steps: Iterator[Any]) -> None:
        """Advance a generator to its end, one slice in each round."""
        if not advance(steps):
            self._work.append(steps)

    def add(self, handler: Connection | Listener) -> None:
        self._handlers[handler.handle] = handler
        self._poll.register(handler.handle, select.EPOLLIN)

    def want(self, handler: Connection | Listener, events: int) -> None:
        self._poll.modify(handler.handle, events)

    def remove(self, handler: Connection | Listener) -> None:
        if self._handlers.pop(handler.handle, None) is not None:
            self._poll.unregister(handler.handle)

    def once_more(self, connection: Connection) -> None:
        """Call advance() in the next round, after other connections."""
        self._again[connection] = None

    def has_turn(self, connection: Connection) -> bool:
        """Whether once_more() was called, and advance() not yet."""
        return connection in self._again

    def call_at(self, when: float, function: Callable[[], None]) -> None:
        """Call a function at the time `when` (monotonic seconds)."""
        heapq.heappush(self._calls, (when, next(self._order), function))

    def _rounds(self) -> None:
        while not self._stopping:
            try:
                self._round()
            except Exception as error:  # a defect in one round must not end the gateway
                log_defect(error)

    def _round(self) -> None:
        self._asleep = True  # from here on post() must wake the loop
        busy = self._inbox or self._work or self._again
        events = self._poll.poll(0 if busy else self._patience())
        self._asleep = False
        self.now = time.monotonic()
        for _ in range(len(self._inbox)):
            self._inbox.popleft()()
        for _ in range(len(self._again)):
            self._again.popitem(last=False)[0].advance()
        for handle, mask in events:
            if handler := self._handlers.get(handle):
                handler.ready(mask)
        for _ in range(len(self._work)):
            self.work(self._work.popleft())
        while self._calls and self._calls[0][0] <= self.now:
            heapq.heappop(self._calls)[2]()
        if self.now >= self._next_sweep:
            self._next_sweep = self.now + SWEEP_SECONDS
            for handler in [h for h in self._handlers.values() if h.deadline <= self.now]:
                handler.expire()
        self.after_round()

    def _patience(self) -> float:
        """The seconds until the next sweep or call."""
        wake = min(self._next_sweep, self._calls[0][0]) if self._calls else self._next_sweep
        return max(0.0, wake - time.monotonic())


class Phase(enum.Enum):
    """What a connection waits for."""

    HEAD = "the next request"
    BODY = "the rest of a body"
    ANSWER = "its answer: a landing, a worker, or a thread that reads a long body"
    SENDING = "room to send"
    LINGERING = "the end of unread input, so that a reset does not discard the last answer"
    CLOSED = "nothing"


class Channel:
    """A connected socket with TLS or without, which does not block after the handshake.

    TLS works in memory, so that receive() takes RECEIVE_BYTES from the socket and no more.
    SSLSocket.recv() goes on while it finds records without data, such as KeyUpdate: a client that
    sends these without end would stop the loop. An error of TLS is an OSError, too.
    """

    def __init__(self, connected: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        self.socket = connected
        self._received, self._encrypted = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls: ssl.SSLObject | None = None
        if tls is not None:
            self._tls = tls.wrap_bio(self._received, self._encrypted, server_side=True)
        self.finished = False  # the client has said that it sends no more; it may read on
        self._unsent = b""
        self._without_data = 0  # bytes received since the last data

    def do_handshake(self, seconds: float) -> None:
        """Do the TLS handshake within a deadline. In a thread. Raises OSError."""
        tls, deadline = cast(ssl.SSLObject, self._tls), time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.socket.settimeout(left)
            try:
                tls.do_handshake()
                return
            except ssl.SSLWantReadError:
                pass
            finally:  # its messages, or the alert about an error
                self.socket.sendall(self._encrypted.read())
            data = self.socket.recv(RECEIVE_BYTES)
            if not data:
                raise ConnectionAbortedError
            self._received.write(data)
        raise TimeoutError

    def receive(self) -> bytes:
        """What has come, or b"" at its end. Raises OSError; BlockingIOError: nothing has come."""
        if self._tls is None:
            data = self.socket.recv(RECEIVE_BYTES)
            self.finished = not data
            return data
        if not self._received.pending:  # else it came together with the end of the handshake
            data = self.socket.recv(RECEIVE_BYTES)
            if not data:
                return b""
            self._received.write(data)
        self._without_data += self._received.pending
        pieces: list[bytes] = []
        try:
            while self._received.pending:  # at 0 TLS holds at most a part of a record
                piece = self._tls.read(TLS_RECORD)
                if not piece:  # close_notify: the next call returns b""
                    self.finished = True
                    with contextlib.suppress(OSError):  # the client may have reset the connection
                        self.socket.shutdown(socket.SHUT_RD)
                    return b"".join(pieces)
                pieces.append(piece)
                self._without_data = 0
        except ssl.SSLWantReadError:
            pass
        finally:  # an alert, or the answer to a KeyUpdate
            if not self._unsent and self._encrypted.pending:
                self._unsent = self._encrypted.read()
                with contextlib.suppress(OSError):
                    self.flush()
        if max(self._without_data, self._encrypted.pending) > MAX_WITHOUT_DATA:
            raise ConnectionAbortedError
        if not pieces:
            raise BlockingIOError
        return b"".join(pieces)

    def send(self, data: bytes | memoryview) -> int:
        """Send what was taken before, then take more, which flush() sends. Returns how much.

        Raises OSError; BlockingIOError: the socket is full, and no more was taken.
        """
        self.flush()
        taken = len(data)
        if self._tls is not None:
            taken = self._tls.write(data)  # one record
            data = self._encrypted.read()  # with what receive() could not send before it
        self._unsent = bytes(data)  # unlike a slice of the answer, it does not keep all of it
        return taken

    def flush(self) -> None:
        """Send what was taken. Raises OSError; BlockingIOError: the socket is full."""
        while self._unsent:
            self._unsent = self._unsent[self.socket.send(self._unsent) :]

    def finish(self) -> None:
        """Say that nothing more will be sent, if the socket is not full (RFC 9112 section 9.8)."""
        with contextlib.suppress(OSError):
            if self._tls is not None:
                with contextlib.suppress(ssl.SSLError):  # the client has not said it, too
                    self._tls.unwrap()
                self._unsent += self._encrypted.read()
            self.flush()
            self.socket.shutdown(socket.SHUT_WR)


class Connection:
    """One client's connection after its handshake: one request after the other, with deadlines.

    Only the loop calls it, except that the thread that reads a long body calls read_pieces().
    """

    def __init__(self, server: Server, channel: Channel, source: str) -> None:
        self.handle = channel.socket.fileno()
        self.deadline = math.inf  # of time.monotonic()
        self.group = address_group(source)
        self.trusted = False  # whether it has carried an authentic request
        self.phase = Phase.HEAD
        self._server = server
        self._loop = server.loop
        self._channel, self._socket = channel, channel.socket
        self._source = source
        self._buffer = bytearray()
        self._scanned = 0  # bytes of the buffer without the end of a head
        self._out = memoryview(b"")
        self._unread = False  # there is input that will never be read
        self._events = select.EPOLLIN
        # The following belong to the present request.
        self._admitted: Request | None = None
        self._entry = LogEntry("-")
        self._answered: Response = NO_ANSWER
        self._head_only = self._keep_alive = False
        self._started = 0.0

    @property
    def busy(self) -> bool:
        """Whether a request is being read or answered."""
        return self.phase not in (Phase.HEAD, Phase.LINGERING)

    # --- events ----------------------------------------------------------------------------------

    def begin(self) -> None:
        """The loop takes the connection over."""
        self._loop.add(self)
        self._wait_for_head()
        self.ready(select.EPOLLIN)  # TLS may have received data with the end of the handshake

    def ready(self, mask: int) -> None:
        """The socket can be read or written."""
        if self.phase is Phase.ANSWER and mask & select.EPOLLHUP:
            self.close()  # nobody is there any more
        elif self.phase is Phase.SENDING:
            self._flush()
        elif self.phase is Phase.LINGERING:
            self._linger_on()
        elif self.phase is Phase.HEAD and len(self._buffer) > MAX_HEAD:
            pass  # once_more() was called, and more is read when less is left
        elif self._receive():
            self.advance()

    def advance(self) -> None:
        """Process a few requests from the buffer; then other connections get their turn."""
        for _ in range(REQUESTS_A_ROUND):
            if self.phase is Phase.HEAD:
                more = self._take_head()
            else:
                more = self.phase is Phase.BODY and self._take_body()
            if not more:
                return
        if self._buffer and self.phase in (Phase.HEAD, Phase.BODY):
            self._loop.once_more(self)

    def expire(self) -> None:
        """Its deadline has passed."""
        self.deadline = math.inf
        if self.phase is Phase.HEAD and self._buffer:
            self._begin_request()
            self._refuse(Timeout("the head did not arrive in time"))
        elif self.phase is Phase.BODY:
            self._refuse(Timeout("the body did not arrive in time"))
        else:
            self.close()

    def close(self) -> None:
        if self.phase is Phase.CLOSED:
            return
        self.phase = Phase.CLOSED
        self._loop.remove(self)
        self._channel.finish()
        with contextlib.suppress(OSError):
            self._socket.close()
        self._server.leave(self)

    def _wait(self, phase: Phase, seconds: float) -> None:
        self.phase, self.deadline = phase, self._loop.now + seconds

    def _want(self, events: int) -> None:
        if events != self._events:
            self._events = events
            self._loop.want(self, events)

    # --- reading ---------------------------------------------------------------------------------

    def _receive(self) -> bool:
        """Add received data to the buffer. Whether there was any."""
        try:
            data = self._channel.receive()
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._ended()
            return False
        self._buffer += data
        if self.phase is Phase.ANSWER and len(self._buffer) > MAX_HEAD + MAX_BODY:
            self._want(0)  # the client sends requests faster than they are answered
        return True

    def _ended(self) -> None:
        """The other side has finished sending. It may still wait for answers."""
        if self.phase is Phase.BODY:
            self._refuse(Malformed("the body ended early"))
        elif self.phase is Phase.ANSWER and self._channel.finished and not self._is_patient():
            self._want(0)  # the end is found again after the answer
        elif self.phase is not Phase.HEAD or not self._loop.has_turn(self):
            self.close()

    def _is_patient(self) -> bool:
        """Whether its answer may wait for a change: then a client that is gone frees its place."""
        return bool(self._admitted and self._admitted.query.get("wait"))

    def _wait_for_head(self) -> None:
        self._wait(Phase.HEAD, IDLE_DEADLINE)
        self._scanned = 0

    def _take_head(self) -> bool:
        """Begin the next request if its head is complete. Whether there may be more to do."""
        buffer = self._buffer
        if not self._scanned:
            while buffer.startswith(b"\r\n"):  # RFC 9112 section 2.2
                del buffer[:2]
            if not buffer or buffer == b"\r":
                return False
        end = buffer.find(b"\r\n\r\n", max(0, self._scanned - 3))
        if end > MAX_HEAD or (end < 0 and len(buffer) > MAX_HEAD):
            self._begin_request()
            self._refuse(HeadTooLarge(f"the head has more than {MAX_HEAD} bytes"))
            return False
        if end < 0:
            if not self._scanned:
                self._wait(Phase.HEAD, HEAD_DEADLINE)
            self._scanned = len(buffer)
            return False
        data = bytes(buffer[:end])
        del buffer[: end + 4]
        self._begin_request()
        self._try(data)
        return True

    def _try(self, data: bytes) -> None:
        """Verify a head and go on to its body, or refuse it."""
        if self.phase is Phase.CLOSED:  # while a worker raised the ceiling
            return
        try:
            self._admit(data)
        except GatewayError as error:
            self._refuse(error)
        except EarlySignature as early:
            self._wait(Phase.ANSWER, LANDING_DEADLINE)
            wanted = early.wanted

            def raise_ceiling() -> Callable[[], None]:
                try:
                    self._server.app.admission.nonces.raise_ceiling(wanted)
                except OSError as error:
                    raise Unavailable(f"the nonce cannot be kept: {_reason(error)}") from None
                return lambda: self._try(data)

            self._start_worker(raise_ceiling)

    def _begin_request(self) -> None:
        self._entry = LogEntry(self._server.new_request_id())
        self._head_only = self._keep_alive = False
        self._started = time.perf_counter()

    def _admit(self, data: bytes) -> None:
        """Verify a head and go on to its body. Raises GatewayError."""
        head = parse_head(data)
        self._entry.method, self._head_only = head.method, head.method == "HEAD"
        given = head.headers.get(b"x-request-id")
        if given and _REQUEST_ID.fullmatch(given):
            self._entry.request_id = given.decode("ascii")
        self._keep_alive = head.keep_alive
        self._unread = head.length > 0
        try:
            admitted = self._server.app.admission.admit(head, self._source, self._entry)
        except EarlySignature:
            raise
        except Exception as error:
            raise refusal_of(error) from None
        self._admitted = admitted
        route = admitted.route
        self.trusted = self.trusted or route.guard in ("signed", "metrics")
        if route.place != "reader" and self._take_body():
            return
        if head.expects_continue and len(self._buffer) < head.length:
            try:
                self._channel.send(b"HTTP/1.1 100 Continue\r\n\r\n")  # RFC 9110 section 10.1.1
                self._channel.flush()
            except OSError:  # also when the socket is full: then the client reads no answers
                self.close()
                return
        if route.place == "reader":
            self._hand_over(admitted)
        else:
            self._want(select.EPOLLIN)  # _receive() may have turned it off in the phase before
            self._wait(Phase.BODY, BODY_DEADLINE)

    def _take_body(self) -> bool:
        """Answer the request if its body is complete. Whether it was."""
        admitted = cast(Request, self._admitted)
        length = admitted.head.length
        if len(self._buffer) < length:
            return False
        body = bytes(self._buffer[:length])
        del self._buffer[:length]
        self._unread = False
        self._wait(Phase.ANSWER, LANDING_DEADLINE + admitted.route.patience)
        if admitted.route.place == "worker":
            self._answer_in_worker(admitted, body)
        else:
            self._server.app.answer_later(admitted, body, self._reply)
        return True

    # --- a thread's turn -------------------------------------------------------------------------

    def _hand_over(self, admitted: Request) -> None:
        """Let a thread read the body and make the answer."""
        self._loop.remove(self)
        self.phase, self.deadline = Phase.ANSWER, math.inf
        self._answer_in_worker(admitted, self.read_pieces(admitted.head))

    def _answer_in_worker(self, admitted: Request, body: bytes | Iterator[bytes]) -> None:
        def answer() -> Callable[[], None]:
            response = cast(Response, self._server.app.answer(admitted, body))
            return functools.partial(self._reply, response)

        self._start_worker(answer)

    def _start_worker(self, work: Callable[[], Callable[[], None]]) -> None:
        """Call `work` in a thread of its own, and then what it returns in the loop."""

        def call() -> None:
            try:
                then = work()
            except Exception as error:
                then = functools.partial(self._refuse, error)
            self._loop.post(lambda: self._take_back(then))

        try:
            threading.Thread(target=call, name="worker", daemon=True).start()
        except RuntimeError as error:  # the system allows no further thread
            LOG.warning("a request was refused, because no thread can be started: %s", error)
            again = [("Retry-After", "1")]
            refusal = Unavailable("too many requests at once: try again", headers=again)
            self._take_back(functools.partial(self._refuse, refusal))

    def _take_back(self, then: Callable[[], None]) -> None:
        handed_over = self._admitted is not None and self._admitted.route.place == "reader"
        if handed_over and self.phase is not Phase.CLOSED:
            self._loop.add(self)
            self._events = select.EPOLLIN
        then()

    def read_pieces(self, head: Head) -> Iterator[bytes]:
        """The body in pieces. Raises GatewayError when it ends early or takes too long."""
        deadline = time.monotonic() + BODY_DEADLINE + head.length / BODY_RATE
        readable = select.poll()
        readable.register(self._socket, select.POLLIN)
        left = head.length
        while left:
            if not self._buffer:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise Timeout("the body did not arrive in time")
                readable.poll(remaining * 1000 + 1)
                try:
                    data = self._channel.receive()
                except BlockingIOError:
                    continue
                except OSError:
                    data = b""
                if not data:
                    raise Malformed("the body ended early")
                self._buffer += data
            piece = bytes(self._buffer[:left])
            del self._buffer[:left]
            left -= len(piece)
            yield piece
        self._unread = False

    # --- answering -------------------------------------------------------------------------------

    def _refuse(self, error: Exception) -> None:
        """Answer with an error. Unread input must not be mistaken for the next request."""
        self._keep_alive = self._keep_alive and not self._unread
        self._unread = not self._keep_alive
        self._reply(problem(error))

    def _reply(self, response: Response) -> None:
        if self.phase is Phase.CLOSED:
            return
        if response is NO_ANSWER:
            self.close()
            return
        self._keep_alive = self._keep_alive and not self._unread and not self._server.closing
        self._answered = response
        date, number = self._server.date(), self._entry.request_id
        data = render_response(response, self._keep_alive, self._head_only, date, number)
        self._out = memoryview(data)
        self._flush()

    def _flush(self) -> None:
        """Send as much as the socket takes. Each piece has its own deadline."""
        try:
            while self._out:
                self._out = self._out[self._channel.send(self._out[:SEND_BYTES]) :]
            self._channel.flush()
        except BlockingIOError:
            self._want(select.EPOLLOUT)
            self._wait(Phase.SENDING, WRITE_DEADLINE)
            return
        except OSError:
            self.close()
            return
        seconds = time.perf_counter() - self._started
        self._server.report(self, self._entry, self._answered, seconds)
        # An idle connection keeps neither the request nor its answer, which may be large.
        self._admitted, self._answered, self._out = None, NO_ANSWER, memoryview(b"")
        if not self._keep_alive:
            self._end()
            return
        self._want(select.EPOLLIN)
        self._wait_for_head()
        if self._buffer:
            self._loop.once_more(self)

    def _end(self) -> None:
        """Close the connection. If input is unread, discard it for a while first."""
        if not self._unread:
            self.close()
            return
        self._want(select.EPOLLIN)
        self._wait(Phase.LINGERING, LINGER_SECONDS)
        self._channel.finish()

    def _linger_on(self) -> None:
        try:
            if self._socket.recv(65536):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self.close()


class Listener:
    """A listening socket: passes each new connection and its address to `accepted`, in the loop."""

    def __init__(
        self, loop: Loop, listening: socket.socket, accepted: Callable[[socket.socket, Any], None]
    ) -> None:
        listening.setblocking(False)
        listening.listen(LISTEN_QUEUE)
        self.handle, self.deadline = listening.fileno(), math.inf
        self._loop, self._socket, self._accepted = loop, listening, accepted
        loop.post(lambda: loop.add(self))

    def ready(self, _mask: int) -> None:
        try:
            accepted, address = self._socket.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._loop.want(self, 0)  # or the loop would be told again at once: a busy loop
                self.deadline = self._loop.now
            return
        self._accepted(accepted, address)

    def expire(self) -> None:
        """Accept again after a pause: meanwhile files may have been closed."""
        self.deadline = math.inf
        self._loop.want(self, select.EPOLLIN)

    def close(self) -> None:
        self._loop.run(lambda: self._loop.remove(self))
        self._socket.close()


def bind_path(path: str) -> socket.socket:
    """A Unix socket for commands on this host. Raises OSError.

    The caller holds the database's lock, so that an existing one can only be left over.
    """
    remove_file(path)
    listening = socket.socket(socket.AF_UNIX)
    with short_path(path) as name:
        listening.bind(name)
        os.chmod(name, 0o600)  # in time: nobody can connect before listen()
    atexit.register(remove_file, path)  # also when the start is refused later
    return listening


def remove_file(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def local_socket_path(db_path: str) -> str:
    """The Unix socket on which the gateway of this database accepts commands."""
    return os.path.realpath(db_path) + ".sock"


@contextlib.contextmanager
def short_path(path: str) -> Iterator[str]:
    """Another name of the file, short enough for a socket's address (108 bytes)."""
    directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{os.path.basename(path)}"
    finally:
        os.close(directory)


class PendingConnection:
    """A connection during its TLS handshake. It counts as an idle one."""

    busy = trusted = False

    def __init__(self, accepted: socket.socket, source: str) -> None:
        self.socket, self.source, self.group = accepted, source, address_group(source)

    def close(self) -> None:
        """End the handshake, whose thread then closes the socket."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)


METHODS = frozenset(("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD"))  # which log and metrics name
ASKED_OFTEN = ("/healthz", "/metrics")  # by monitoring: a 200 is logged only at debug


class Server(ThreadingHTTPServer):
    """Accepts connections, has each handshake done by a thread, and knows all connections.

    The thread of serve_forever() accepts, and passes each connection to the loop. Only the loop
    uses the table of connections. When there are too many, one is closed: see _idlest().
    """

    request_queue_size = LISTEN_QUEUE
    tls: ssl.SSLContext

    def __init__(self, config: Config, app: App, loop: Loop, log: LogWriter) -> None:
        """Listen; connections wait for begin(). Raises StartError."""
        self.app, self.loop, self._log = app, loop, log
        self.closing = False
        self.allowed = api_sources(config)
        self._limit = min(config.max_connections, raise_file_limit(config.max_connections))
        self._address_limit = config.max_connections_per_address
        # Least recently active first.
        self._connections: collections.OrderedDict[Connection | PendingConnection, None]
        self._connections = collections.OrderedDict()
        self._open_from: collections.Counter[str] = collections.Counter()  # by address group
        self._date = (0, "")
        self._id_prefix, self._id_numbers = secrets.token_hex(4), itertools.count(1)
        self._local: Listener | None = None
        is_ipv4 = ipaddress.ip_address(config.api_host).version == 4
        self.address_family = socket.AF_INET if is_ipv4 else socket.AF_INET6
        try:
            super().__init__((config.api_host, config.api_port), BaseHTTPRequestHandler)
        except OSError as error:
            raise StartError(str(describe_api_fault(config, error))) from None

    def begin(self, tls: ssl.SSLContext) -> None:
        self.tls = tls
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

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
                time.sleep(0.05)  # or accept would fail again at once, in a busy loop
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Refuse addresses that are not allowed, before TLS."""
        return allows(self.allowed, source_of(client_address))

    def process_request(self, request: Any, client_address: Any) -> None:
        self.loop.post(lambda: self._accept(request, client_address))

    def handle_error(self, request: Any, client_address: Any) -> None:
        log_defect(sys.exc_info()[1] or RuntimeError())

    def listen_locally(self, db_path: str) -> None:
        """Accept commands on this host. The caller holds the database's lock."""
        path = local_socket_path(db_path)
        try:
            self._local = Listener(self.loop, bind_path(path), self._accept_local)
        except OSError as error:  # some file systems cannot hold sockets; the API works without
            LOG.warning(
                "%s cannot be made: %s; commands on this host will not reach the gateway, but the "
                "API works: put DB_PATH on a file system that can hold sockets",
                path,
                _reason(error),
            )

    # --- new connections -------------------------------------------------------------------------

    def _accept_local(self, accepted: socket.socket, _address: Any) -> None:
        """Root and this process's user need no certificate, allowed address or signature.

        The kernel says which user has connected (SO_PEERCRED in unix(7)).
        """
        credentials = accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        _pid, uid, _gid = struct.unpack("iII", credentials)
        if uid in (0, os.geteuid()):
            self._begin(Channel(accepted), THIS_HOST)
        else:
            accepted.close()

    def _accept(self, accepted: socket.socket, address: Any) -> None:
        """Begin a handshake if there is room."""
        pending = PendingConnection(accepted, source_of(address))
        greedy = self._open_from[pending.group] >= self._address_limit
        try:
            if greedy or len(self._connections) >= self._limit:
                self._make_room(pending.group if greedy else None)
            self._enter(pending)
            # Not in the loop: no client may delay the others.
            threading.Thread(target=self._handshake, args=(pending,), daemon=True).start()
        except RuntimeError as error:  # also raised when no thread can be started
            LOG.warning("a connection was refused: %s", error)
            self.leave(pending)
            accepted.close()

    def _make_room(self, group: str | None) -> None:
        """Close the idlest connection, of one address group or of all. Raises RuntimeError."""
        idlest = self._idlest(group)
        if idlest is None:
            raise RuntimeError(
                "too many connections, all of them busy with authentic requests: raise "
                + ("MAX_CONNECTIONS_PER_ADDRESS" if group else "MAX_CONNECTIONS")
            )
        self.leave(idlest)
        idlest.close()

    def _idlest(self, group: str | None) -> Connection | PendingConnection | None:
        """The least recently active connection; untrusted first.

        Only an authentic request that is being answered protects its connection.
        """
        found = None
        for connection in self._connections:
            if group in (None, connection.group):
                if not connection.trusted:
                    return connection
                if not connection.busy:
                    found = found or connection
        return found

    def _handshake(self, pending: PendingConnection) -> None:
        """Do the TLS handshake within a deadline. In a thread."""
        try:
            pending.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            channel = Channel(pending.socket, self.tls)
            channel.do_handshake(HANDSHAKE_DEADLINE)
        except Exception as error:
            if not isinstance(error, OSError):  # ssl.SSLError is one
                log_defect(error)
            pending.socket.close()
            self.loop.post(lambda: self.leave(pending))
        else:
            self.loop.post(lambda: self._replace(pending, channel))

    def _replace(self, pending: PendingConnection, channel: Channel) -> None:
        """Replace a handshake by its connection, unless another one has got its place."""
        if pending in self._connections:
            self.leave(pending)
            self._begin(channel, pending.source)
        else:
            pending.socket.close()

    def _begin(self, channel: Channel, source: str) -> None:
        channel.socket.setblocking(False)
        connection = Connection(self, channel, source)
        self._enter(connection)
        connection.begin()

    # --- the table of connections ----------------------------------------------------------------

    def _enter(self, connection: Connection | PendingConnection) -> None:
        self._connections[connection] = None
        self._open_from[connection.group] += 1

    def leave(self, connection: Connection | PendingConnection) -> None:
        """Remove a connection from the table, if it is there."""
        if connection in self._connections:
            del self._connections[connection]
            self._open_from[connection.group] -= 1
            if not self._open_from[connection.group]:
                del self._open_from[connection.group]

    def drain(self) -> None:
        """Stop accepting, let running requests finish, close idle connections."""
        self.closing = True
        self.shutdown()
        self.server_close()
        if self._local:
            self._local.close()
        self.loop.post(self.app.peers.stop_waiting)
        started = time.monotonic()
        while time.monotonic() < started + DRAIN_SECONDS and self._connections:
            # The loop may not have read a request yet that has already arrived.
            if time.monotonic() > started + DRAIN_GRACE:
                self.loop.run(self._close_idle)
            time.sleep(0.01)

    def _close_idle(self) -> None:
        for connection in list(self._connections):
            if not connection.busy:
                connection.close()

    # --- what each request needs -----------------------------------------------------------------

    def date(self) -> str:
        now = int(time.time())
        if self._date[0] != now:
            self._date = (now, email.utils.formatdate(now, usegmt=True))
        return self._date[1]

    def new_request_id(self) -> str:
        return f"{self._id_prefix}-{next(self._id_numbers)}"

    def report(
        self, connection: Connection, entry: LogEntry, response: Response, seconds: float
    ) -> None:
        """Count and log an answer. Its connection is now the most recently active one."""
        self._connections.move_to_end(connection)
        if entry.method not in METHODS:
            entry.method = "other"
        self.app.metrics.observe(entry.method, entry.route, response.status, seconds)
        often = entry.route in ASKED_OFTEN and response.status < 400
        level = logging.DEBUG if often else logging.INFO
        if LOG.isEnabledFor(level):
            self._log.add(entry.line(response.status, seconds, response.note))


def source_of(address: Any) -> str:
    """A client's address as text; for IPv4 clients of an IPv6 socket, the IPv4 address."""
    parsed = ipaddress.ip_address(address[0].partition("%")[0])
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)


# --- the process ----------------------------------------------------------------------------------


def hide_memory() -> None:
    """Forbid core dumps and debuggers of the same user: keys are in this memory (prctl(2)).

    A limit on core files alone does not stop a dump that the kernel pipes into a program.
    """
    import ctypes

    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0):
        reason = os.strerror(ctypes.get_errno())
        LOG.warning("core dumps cannot be disabled, and would contain keys: %s", reason)


def return_memory() -> None:
    """Return freed memory to the kernel: glibc keeps all below the heap's end (malloc_trim(3))."""
    import ctypes

    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def raise_file_limit(connections: int) -> int:
    """Raise the limit of open files. Returns how many connections there is room for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # Linux always has a finite one
    wanted = min(2 * connections + RESERVED_FILES, hard)  # each may linger beside a new one
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(8, soft - RESERVED_FILES, wanted - RESERVED_FILES)


Jobs = Sequence[tuple[float, Callable[[], None]]]  # each with its interval in seconds


def repeat(name: str, jobs: Jobs, stopping: threading.Event) -> None:
    """Do jobs one at a time, each at its interval, until `stopping` is set. In its own thread."""
    due = [time.monotonic() + interval for interval, _ in jobs]
    while not stopping.wait(max(0.0, min(due) - time.monotonic())):
        for i, (interval, job) in enumerate(jobs):
            if due[i] <= time.monotonic():
                due[i] = time.monotonic() + interval
                try:
                    job()
                except (BackendError, DiskError, OSError) as error:
                    LOG.error("%s: %s", name, error)
                except Exception as error:  # a defect must not end the thread
                    log_defect(error)


# --- the certificate ----------------------------------------------------------------------------


def host_addresses() -> Iterator[str]:
    """This host's source addresses towards the internet. connect() sends no packet here."""
    for family, far in ((socket.AF_INET, "1.1.1.1"), (socket.AF_INET6, "2606:4700:4700::1111")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((far, 9))
            yield probe.getsockname()[0]


def required_names(config: Config) -> list[str]:
    """The names and addresses, lower case, that backends use according to the settings."""
    listens = [] if ipaddress.ip_address(config.api_host).is_unspecified else [config.api_host]
    endpoint = [config.wg_endpoint.host] if config.wg_endpoint else []
    names = [name.lower() for name in (*config.tls_names, *endpoint, *listens)]
    return [str(ipaddress.ip_address(n)) if ":" in n else n for n in names if is_host_name(n)]


def certificate_names(config: Config) -> list[str]:
    """The names and addresses of a new certificate."""
    here = ["localhost", "127.0.0.1", "::1", socket.gethostname().lower(), *host_addresses()]
    return list(dict.fromkeys([*required_names(config), *filter(is_host_name, here)]))


def fit_certificate(config: Config) -> None:
    """Renew a self-made certificate that lacks a name of the settings, or expires soon.

    Its key stays. A new address of the host alone does not renew it, because a renewal changes the
    fingerprint, which backends may have pinned.
    """
    cert = config.tls_cert
    if not os.path.exists(cert):
        return
    try:
        names = own_certificate_names(cert)
        if names is None:
            return
        lacking = sorted(set(required_names(config)) - names)
        expires = certificate_expiry(read_certificate(cert))
        if not lacking and expires > time.time() + RENEWAL_SECONDS:
            return
        owner = os.stat(cert)
        renew_certificate(cert, config.tls_key, certificate_names(config))
        if os.geteuid() == 0:
            os.chown(cert, owner.st_uid, owner.st_gid)
    except (ImportError, OSError, ValueError) as error:
        text = (
            "%s cannot be renewed, and backends may refuse it: %s; `wggw doctor` says what it lacks"
        )
        LOG.warning(text, cert, error if isinstance(error, ValueError) else _reason(error))
    else:
        LOG.warning(
            "%s was renewed (%s): backends that pin its SHA-256 fingerprint need the new one; its "
            "key and the certificate that signs it are the same",
            cert,
            f"for {', '.join(lacking)}" if lacking else "it expired soon",
        )


def make_tls(config: Config, make_pair: bool = True) -> tuple[ssl.SSLContext, int]:
    """The server's TLS context, and when its certificate expires (Unix seconds).

    With `make_pair`, a self-signed pair is made if there is none. Raises ConfigError.
    """
    cert, key, client_ca = config.tls_cert, config.tls_key, config.tls_client_ca
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
    what = f"TLS_CLIENT_CA {client_ca!r}: not a usable PEM file"
    try:
        if client_ca:  # first: a refusal makes and renews no certificate
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(client_ca)
        fit_certificate(config)
        if make_pair and not os.path.exists(cert) and not os.path.exists(key):
            what = f"TLS_CERT {cert!r} cannot be made"
            make_certificate(cert, key, certificate_names(config))
            LOG.info("made a self-signed certificate: %s", cert)
        what = f"TLS_CERT {cert!r}, TLS_KEY {key!r}: not usable PEM files"
        check_private("TLS_KEY", key)
        context.load_cert_chain(cert, key, password="")  # never ask on a terminal
        certificate = read_certificate(cert)
        begins, expires = certificate_times(certificate)
    except ImportError:
        raise ConfigError(
            f"TLS_CERT {cert!r} does not exist: install python3-cryptography, with which the "
            "gateway makes one, or put a certificate and its key there"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{what}: {_reason(error)}") from None
    fingerprint = hashlib.sha256(certificate).hexdigest()
    LOG.info("certificate SHA-256 fingerprint %s, key pin %s", fingerprint, key_pin(certificate))
    if begins > time.time():
        text = "the certificate is not valid before %s, and backends refuse it: see `wggw doctor`"
        LOG.warning(text, rfc3339(begins))
    if expires < time.time() + EXPIRY_WARNING:
        text = "the certificate expires at %s, and backends will then refuse it: renew it"
        LOG.warning(text, rfc3339(expires))
    return context, expires


def keep_certificate(config: Config, store: Store, lacked: bool) -> bool:
    """With SNAPSHOT_KEY the snapshots hold the certificate, next to the interfaces' keys.

    A node that `lacked` one gets the one from the snapshot in place of the temporary one that was
    made while waiting for the copy, so that backends see the fingerprint that they pinned. Returns
    whether it got one.
    """
    paths, kept = (config.tls_cert, config.tls_key), store.private_keys.get(CERTIFICATE_ROW)
    taken = False
    try:
        if lacked and kept:
            for path, text in zip(paths, json.loads(kept), strict=True):
                Disk().replace(path, [text.encode("latin-1")])
            taken = True
            fit_certificate(config)
        if config.snapshot_key:
            texts = [Path(path).read_text("latin-1") for path in paths]
            store.private_keys[CERTIFICATE_ROW] = json.dumps(texts)
    except (OSError, ValueError) as error:
        LOG.warning(
            "the snapshot and TLS_CERT do not have the same certificate: %s; make TLS_CERT and "
            "TLS_KEY readable and writable for the gateway",
            _reason(error),
        )
    return taken


# --- the log, files and locks ---------------------------------------------------------------------


class LogWriter(logging.Handler):
    """Writes the log to stderr. Lines are queued, and a separate thread writes them.

    So a reader that hangs, such as journald, delays nobody. Lines of requests come through add()
    and are collected for LOG_DELAY: a LogRecord costs more than all of a request's JSON, and a
    write in each request would release Python's lock to other threads. SIGKILL loses queued lines.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lines: collections.deque[str] = collections.deque(maxlen=MAX_LOG_LINES)
        self._waiting, self._urgent = threading.Event(), threading.Event()
        self._writing, self._lost = False, 0
        self._handle = sys.stderr.fileno()
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def add(self, text: str, level: str = "INFO") -> None:
        self._lost += len(self._lines) == MAX_LOG_LINES
        self._lines.append(f"{rfc3339(int(time.time()))} {level} {text}\n")
        if not self._waiting.is_set():
            self._waiting.set()

    def emit(self, record: logging.LogRecord) -> None:
        self.add(record.getMessage().replace("\n", " "), record.levelname)
        self._urgent.set()

    def drain(self, seconds: float) -> None:
        """Wait until all lines are written, for at most `seconds`."""
        self._urgent.set()
        deadline = time.monotonic() + seconds
        while (self._lines or self._writing) and time.monotonic() < deadline:
            time.sleep(0.002)

    def _run(self) -> None:
        while self._waiting.wait():
            self._urgent.wait(LOG_DELAY)
            self._waiting.clear()
            self._urgent.clear()
            self._write()

    def _write(self) -> None:
        """Write the queued lines. A log that cannot be written stops nothing."""
        self._writing = True
        lost, self._lost = self._lost, 0
        text = "".join(self._lines.popleft() for _ in range(len(self._lines)))
        if lost:
            reason = "lines were lost: the log's reader is too slow"
            text = f"{rfc3339(int(time.time()))} WARNING {lost} {reason}\n{text}"
        data = memoryview(text.encode("utf-8", "replace"))
        with contextlib.suppress(OSError):
            while data:  # not by sys.stderr: its lock would be held while nobody reads
                try:
                    data = data[os.write(self._handle, data) :]
                except BlockingIOError:
                    select.select((), (self._handle,), ())
        self._writing = False


def open_files(config: Config) -> Files:
    vault = Vault(config.snapshot_key) if config.snapshot_key else None
    if vault and importlib.util.find_spec("cryptography") is None:
        raise ConfigError("SNAPSHOT_KEY needs python3-cryptography")
    return Files(config.db_path, config.durability, Disk(), vault)


def _file_identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def load_whole(config: Config) -> tuple[Store, Files]:
    """Read the files; try again if a running gateway replaced them meanwhile."""
    for _ in range(CHECK_TRIES):
        files = open_files(config)
        paths = files.path, files.journal.path
        before = [_file_identity(path) for path in paths]
        try:
            return files.load(), files
        except DamagedError:
            if before == [_file_identity(path) for path in paths]:
                raise
    raise StartError(f"{config.db_path}: the gateway kept replacing its files: try again")


def settings_with_kept(config: Config, store: Store) -> tuple[InterfaceSettings, ...]:
    """The settings of interfaces, with the addresses that the gateway had in smaller subnets.

    Clients may use them as DNS server or for monitoring. MOVE_PEERS gives them up.
    """
    known = {} if config.move_peers else store.meta("gateways") or {}

    def fits(tunnel: InterfaceSettings, address: str) -> bool:
        return address not in tunnel.gateways and any(
            ipaddress.ip_address(address) in subnet and AddressPool(subnet).has(address)
            for subnet in tunnel.subnets.values()
        )

    return tuple(
        tunnel._replace(kept=tuple(a for a in known.get(tunnel.name, ()) if fits(tunnel, a)))
        for tunnel in interface_settings(config)
    )


def claim_interfaces(config: Config, store: Store) -> None:
    """Mark existing interfaces of ours, and refuse settings that do not fit this host or the rows.

    Raises ConfigError, having changed nothing else; StartError.
    """
    try:
        if config.wg_backend != "memory":
            rows = interface_settings(config)
            links = [make_link(row, b"") for row in rows]
            recognise = recognise_by(rows, lambda: store)
            claim_links(links, recognise)  # first: the checks go by the marks
        refuse_misfits(look_at_fit(Host(config, store)))
    except ForeignError as error:
        raise ConfigError(str(error)) from None
    except BackendError as error:
        raise StartError(str(error)) from None


def recognise_by(tunnels: Sequence[InterfaceSettings], load: Callable[[], Store]) -> Recognise:
    """A function that recognises an interface of an older version, which set no mark.

    Such an interface has our private key, and only peers that are in the database. `load` reads the
    store from the files; it is called only when there is an interface to recognise. The returned
    function raises StartError.
    """

    def recognise(reading: Reading) -> bool:
        store = load()
        device = reading.device
        if device is None or device.private_key not in [*_own_keys(tunnels, store)]:
            return False
        if not store.loaded or reading.unreadable:
            return False  # without a state the key alone proves nothing
        keys = (encode_key(state.peer.public_key) for _, state in reading.changed)
        return all(store.get(key) for key in keys)

    return recognise


def _own_keys(tunnels: Sequence[InterfaceSettings], store: Store) -> Iterator[bytes]:
    """The existing private keys of the interfaces. It makes none. Raises ConfigError."""
    for tunnel in tunnels:
        kept = store.private_keys.get(tunnel.name)
        if os.path.exists(tunnel.private_key_file):
            yield load_private_key(tunnel)
        elif kept:
            yield clamp(decode_key(kept))


def lock_interface(name: str) -> socket.socket:
    """Keep other gateways off an interface as long as the socket exists. Raises StartError.

    The name of an abstract socket belongs to the network namespace, as the interface's name does,
    and the kernel frees it when the process ends (unix(7)).
    """
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        lock.bind(f"\0{lock_name(name)}")
    except OSError:
        lock.close()
        raise StartError(
            f"the interface {name!r} is in use by another gateway: stop that one, or use another "
            "interface"
        ) from None
    return lock


def lock_database(path: str) -> None:
    """Keep other gateways off the files as long as the process lives. Raises StartError.

    Symbolic links are resolved, so that every name of the database leads to the same lock.
    """
    name = os.path.realpath(path) + ".lock"
    try:
        handle = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StartError(
            f"DB_PATH {path!r} is in use by another gateway: stop that one, or use another file"
        ) from None
    except OSError as error:
        raise StartError(f"DB_PATH: {name!r} cannot be written: {_reason(error)}") from None


class Manager:
    """Reports the service's state to systemd if that started it (sd_notify(3)).

    `watchdog` is the period in seconds within which systemd expects WATCHDOG=1; None: no watchdog.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._path = environ.get("NOTIFY_SOCKET", "")
        period = environ.get("WATCHDOG_USEC", "")
        mine = environ.get("WATCHDOG_PID") in (None, str(os.getpid()))
        self.watchdog = (
            int(period) / 1e6 if mine and re.fullmatch("[1-9][0-9]{0,17}", period) else None
        )

    def tell(self, *assignments: str, seconds: float = MANAGER_SECONDS) -> None:
        """Send assignments such as READY=1, if there is a listener.

        It takes at most `seconds`; with 0, what cannot be sent at once is dropped.
        """
        if not self._path:
            return
        text = "\n".join(" ".join(line.split()) for line in assignments)
        name = "\0" + self._path[1:] if self._path.startswith("@") else self._path
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.settimeout(seconds)
            out.sendto(text.encode("utf-8", "replace"), name)


def plan_links(
    config: Config, store: Store, rows: Sequence[InterfaceSettings], keys: Sequence[bytes]
) -> tuple[list[Link], tuple[ObfuscationState | None, bool]]:
    """The interfaces as settings, rows and private keys want them.

    Also returns AmneziaWG's parameters, if there is an interface for them, and whether these are
    new. Raises ConfigError.
    """
    chosen: tuple[ObfuscationState | None, bool] = None, False
    if config.awg_interface is not None:
        chosen = initial_obfuscation(config.awg_params, store, config.awg_interface)
    parameters = chosen[0].parameters if chosen[0] else PLAIN
    try:
        links = [
            make_link(row, key, parameters if row.prefix == AWG_PREFIX else PLAIN)
            for row, key in zip(rows, keys, strict=True)
        ]
    except ValueError as error:
        raise ConfigError(f"AWG_PARAMS: {error}") from None
    return links, chosen


class Start:
    """Brings a gateway's state back: the rows from the files or the remote copy, and interfaces
    that are equal to the rows.

    Service calls the public methods in their order. Until the lander starts, its thread owns the
    rows. Raises StartError.
    """

    def __init__(self, config: Config, app: App, manager: Manager) -> None:
        self._config, self._app, self._manager = config, app, manager
        self._gateway, self._store = app.gateway, app.gateway.store
        rows = interface_settings(config)
        self._had_key = [row for row in rows if os.path.exists(row.private_key_file)]
        self._is_first = False  # neither the files nor the copy had a state
        self._may_lack = False  # the state is the copy's, so it may lack what clients have seen
        self._wanted: list[tuple[InterfaceSettings, Link]] = []  # these two are set by _check()
        self._obfuscation: tuple[ObfuscationState | None, bool] = None, False

    def read(self, wait_for: Callable[[Callable[[], None]], bool]) -> bool:
        """Fill the rows from the files or the remote copy.

        `wait_for` runs the reading of the copy. Its result is the result: False when SIGTERM came
        first.
        """
        config, gateway, store = self._config, self._gateway, self._store
        files = gateway.files
        store.take(files.load())
        self._is_first = not files.has_snapshot
        remote = open_object_store(config, time.time)
        if remote is None:
            self._check(store)
            return True
        epochs = Epochs(remote, files.vault, socket.gethostname(), time.time)
        copier = Copier(epochs, store, files, gateway.lander.snapshot, config)
        copier.on_taken = self._taken
        self._app.copier = copier
        with self._disk_needed():
            is_read = wait_for(lambda: self._read_copy(copier))
        self._is_first = self._is_first and copier.found_nothing
        return is_read

    def begin(self) -> None:
        """Write the first snapshot, and continue the remote copy."""
        config, gateway, app = self._config, self._gateway, self._app
        app.admission.keep_nonces(config.db_path + ".nonces", self._is_first, self._may_lack)
        self._keep_gateways()
        gateway.files.begin(self._store)
        if app.copier:
            with self._disk_needed():
                gateway.lander.on_written = app.copier.begin()

    def open_interfaces(self) -> None:
        """Open the interfaces and make them equal to the rows."""
        config = self._config
        table = None
        opened: list[tuple[InterfaceSettings, Link, Backend]] = []
        if config.wg_backend == "memory":
            LOG.warning(
                "WG_BACKEND=memory: there is no interface, so no peer can send or receive packets"
            )
        else:
            table = ClassTable(config.service_classes, [row for row, _ in self._wanted])
        for row, link in self._wanted:
            try:
                backend = open_backend(config.wg_backend, link)
            except ForeignError as error:
                raise ConfigError(str(error)) from None
            except BackendError as error:
                raise StartError(f"WG_BACKEND {config.wg_backend}: {error}") from None
            if table:
                backend = ClassedBackend(backend, table, list(row.subnets.values()))
            opened.append((row, link, backend))
        if table:
            table.set_up()
        may_lack = self._may_lack or config.durability != "commit"
        self._gateway.start(opened, *self._obfuscation, table, may_lack)

    # --- the remote copy -------------------------------------------------------------------------

    @contextlib.contextmanager
    def _disk_needed(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            path = self._gateway.files.path
            raise StartError(f"DB_PATH {path!r} cannot be written: {_reason(error)}") from None

    def _read_copy(self, copier: Copier) -> None:
        """Retry until the copy has been read; give up early if it is not required."""
        gateway, pause = self._gateway, 1.0
        while True:
            try:
                copier.boot(self._check)
                return
            except CopyError as error:
                gateway.starting = f"waiting for the remote copy: {error}"
                self._manager.tell(f"STATUS={gateway.starting}", "EXTEND_TIMEOUT_USEC=300000000")
                is_there = isinstance(error, CopyDamaged | CopyContested)
                if not self._config.snapshot_required and not is_there:
                    LOG.warning("remote copy: %s; SNAPSHOT_REQUIRED=false: starting without", error)
                    copier.go_without()
                    self._check(self._store)
                    return
                LOG.error("remote copy: %s; next try in about %.0f s", error, pause)
            # Many gateways may be waiting, and must not come back in the same second.
            time.sleep(pause * secrets.SystemRandom().uniform(0.5, 1.5))
            pause = min(2 * pause, COPY_MAX_PAUSE)

    def _taken(self, text: str) -> None:
        """Another gateway has taken the copy over."""
        LOG.error("remote copy: %s", text)
        ledger = self._gateway.ledger
        ledger.fence, ledger.replaced = self._config.snapshot_fence, text

    # --- keys and addresses ----------------------------------------------------------------------

    def _check(self, state: Store) -> None:
        """Refuse settings, keys and host if the state cannot be served with them.

        What was read for this is kept for begin() and open_interfaces(). `state` is the store of
        the local files, or that of the copy.
        """
        config = self._config
        self._may_lack = state is not self._store
        claim_interfaces(config, state)  # before anything is made or changed
        keys = self._load_keys(state)
        rows = settings_with_kept(config, state)
        links, self._obfuscation = plan_links(config, state, rows, keys)
        self._wanted = list(zip(rows, links, strict=True))

    def _load_keys(self, store: Store) -> list[bytes]:
        """The private keys, once compared with what peers know. Raises ConfigError."""
        rows = interface_settings(self._config)
        keys = [self._load_key(row, store) for row in rows]
        own = {r.name: encode_key(x25519_public(key)) for r, key in zip(rows, keys, strict=True)}
        known = self._keep_public_keys(store, own)
        is_foreign = self._may_lack and self._config.snapshot_lineage != store.lineage
        for row, key in zip(rows, keys, strict=True):
            name, file = row.name, row.private_key_file
            if known[name] == own[name]:
                store.private_keys[name] = encode_key(key)  # otherwise keep a sealed key
            elif is_foreign and row in self._had_key:
                raise ConfigError(
                    f"{row.prefix}_PRIVATE_KEY_FILE: the public key of {file!r} is {own[name]}, "
                    "but the configurations of the copy's "
                    f"{show_peers(store.counts.on(name))} name {known[name]}: put that key there "
                    "(a sealed copy contains it: just move the file away), or, to cut these peers "
                    f"off, set SNAPSHOT_LINEAGE={store.lineage}"
                )
        return keys

    @staticmethod
    def _keep_public_keys(store: Store, own: Mapping[str, str]) -> dict[str, str]:
        """The keys that peers know by interface; remember ours where there is none, or no peer."""
        known = store.public_keys()
        for name, key in store.private_keys.items():  # older encrypted states have only these
            if name in own and name not in known:
                known[name] = encode_key(x25519_public(decode_key(key)))
        known |= {n: key for n, key in own.items() if n not in known or not store.counts.on(n)}
        if known != store.public_keys():
            store.remember("public_keys", json.dumps(known))
        return known

    def _load_key(self, settings: InterfaceSettings, store: Store) -> bytes:
        """A private key: from its file, or the rows, or a new one. Raises ConfigError."""
        config, kept = self._config, store.private_keys.get(settings.name)
        # The default file's directory needs root, and the memory backend does not.
        if config.wg_backend == "memory" and config.wg_private_key_file == DEFAULT_KEY_FILE:
            LOG.info("%s: the private key is temporary, because WG_BACKEND=memory", settings.name)
            key = decode_key(kept) if kept else make_private_key()
            own = encode_key(x25519_public(key))
            store.remember("public_keys", json.dumps({**store.public_keys(), settings.name: own}))
            return key
        known = store.counts.on(settings.name)
        if known and not kept and not os.path.exists(settings.private_key_file):
            LOG.warning(
                "%s: its private key is missing, without which its %s cannot connect: put the key "
                "into %s and restart",
                settings.name,
                show_peers(known),
                settings.private_key_file,
            )
        return load_private_key(settings, kept)

    def _keep_gateways(self) -> None:
        """Remember the gateway's addresses in the rows; the next snapshot contains them."""
        gateways = {row.name: (*row.gateways, *row.kept) for row, _ in self._wanted}
        for row, _ in self._wanted:
            if row.kept:
                text = "%s also keeps %s, which clients may use; MOVE_PEERS=true removes it"
                LOG.info(text, row.name, ", ".join(row.kept))
        if gateways != self._store.meta("gateways"):
            self._store.remember("gateways", json.dumps(gateways))


class Service:
    """The whole service: builds the parts, runs until SIGTERM, reloads on SIGHUP."""

    def __init__(self, load: Callable[[], Config]) -> None:
        self._load = load
        self._manager = Manager(os.environ)
        self._next_word = 0.0  # monotonic seconds of the next WATCHDOG=1
        self._stopping = threading.Event()  # ends the timers' threads
        self._locks: list[socket.socket] = []  # see lock_interface()
        # The kernel may deliver a signal to any thread; a byte in a socket wakes this one.
        self._signals, self._wake = socket.socketpair()
        self._wake.setblocking(False)

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Raises StartError."""
        config, log = self._load(), LogWriter()
        LOG.addHandler(log)
        LOG.setLevel(config.log_level.upper())
        try:
            self._prepare_process()
            self._build(config, log)
            if self._start(config):
                timers = self._start_timers(config)
                self._loop.after_round = self._end_round
                self._gateway.ledger.gathers = True
                return_memory()  # a start needs a third more memory than it keeps
                bytes(LARGEST_BLOCK)  # see warm_up()
                gc.freeze()  # present objects stay: the collector need not scan them
                LOG.info("ready on %s port %d", config.api_host, config.api_port)
                self._manager.tell("READY=1", self._state())
                self._wait()
                self._stop(timers)
        finally:
            log.drain(LOG_END_SECONDS)

    def _prepare_process(self) -> None:
        logging.logThreads = logging.logProcesses = False  # they cost time, and no line has them
        hide_memory()
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        threading.stack_size(512 * 1024)  # bytes; a thread per handshake
        sys.setswitchinterval(SWITCH_INTERVAL)
        gc.set_threshold(COLLECT_AFTER, 10, 10)

    def _build(self, config: Config, log: LogWriter) -> None:
        """Make the parts. From now on the gateway answers that it starts, and nothing else."""
        self._loop = loop = Loop()
        self._gateway = Gateway(
            config, Store(), open_files(config), time.time, loop.run, begin=loop.begin
        )
        self._host = HostMetrics(os.path.dirname(config.db_path) or ".")
        self._app = app = App(self._gateway, self._host, loop.work, loop.call_at)
        app.admission.nonces.close(time.time())  # until the nonces of the last run are loaded
        if config.awg_interface and config.awg_params:
            read_parameters(config.awg_params)  # a refusal makes no certificate
        self._server = Server(config, app, loop, log)  # nor does a port that is held
        self._lacked_certificate = not os.path.exists(config.tls_cert)
        tls, app.metrics.certificate_expires = make_tls(config)
        self._server.begin(tls)
        loop.start()

    def _start(self, config: Config) -> bool:
        """Lock files and interfaces, and bring the state back. False when SIGTERM came first."""
        lock_database(config.db_path)
        self._server.listen_locally(config.db_path)
        if config.wg_backend != "memory":
            self._locks = [lock_interface(row.name) for row in interface_settings(config)]
        with collector_off():
            start = Start(config, self._app, self._manager)
            if not start.read(self._wait_for):
                return False
            if keep_certificate(config, self._gateway.store, self._lacked_certificate):
                renewed = make_tls(config, make_pair=False)
                self._server.tls, self._app.metrics.certificate_expires = renewed
            start.begin()
            start.open_interfaces()
            return True

    def _wait_for(self, work: Callable[[], None]) -> bool:
        """Do some work in a thread. False when SIGTERM came first. Raises what the work raises."""
        errors: list[BaseException] = []

        def run() -> None:
            try:
                work()
            except BaseException as error:
                errors.append(error)
            finally:
                self._wake.send(b"\0")

        threading.Thread(target=run, daemon=True).start()
        while (number := self._signals.recv(1)[0]) == signal.SIGHUP:
            LOG.info("SIGHUP is ignored while the gateway starts")
        for error in errors:
            raise error
        return number == 0

    def _stop(self, timers: Sequence[threading.Thread]) -> None:
        """Stop within END_SECONDS. What could not be written by then is named in the log."""
        self._manager.tell("STOPPING=1", "STATUS=stopping")
        ends = time.monotonic() + END_SECONDS
        self._server.drain()
        self._stopping.set()
        deadline = time.monotonic() + STOP_SECONDS
        for timer in timers:
            timer.join(max(0.0, deadline - time.monotonic()))  # a job that hangs is abandoned
        app = self._app
        left = ["used signatures", "the last snapshot", *["the remote copy"] * bool(app.copier)]
        last = threading.Thread(target=self._write_the_rest, args=(app, left), daemon=True)
        last.start()
        last.join(max(0.0, ends - time.monotonic()))
        if left:
            LOG.warning("stopped, but these were not written in time: %s", ", ".join(left))
        for tunnel in self._gateway.tunnels.values():
            tunnel.backend.close()
        self._loop.stop()
        LOG.info("stopped")

    def _write_the_rest(self, app: App, left: list[str]) -> None:
        """Write the last files of an orderly stop, and remove each from `left` once written."""
        try:
            app.admission.nonces.close(time.time())
        except OSError as error:
            LOG.warning(
                "used signatures cannot be written: %s; the next start will answer backends 503 "
                "for a short time",
                _reason(error),
            )
        left.pop(0)
        app.gateway.close()
        left.pop(0)
        if app.copier and app.copier.finish(STOP_SECONDS):
            left.pop(0)

    def _start_timers(self, config: Config) -> list[threading.Thread]:
        gateway, app = self._app.gateway, self._app
        projection = [
            (SUPERVISE_SECONDS, gateway.projection.supervise),
            (config.sample_interval, gateway.projection.sample),
            (SUPERVISE_SECONDS, self._host.tick),
        ]
        disk = [
            (config.snapshot_interval, gateway.lander.snapshot),
            (SUPERVISE_SECONDS, gateway.lander.heal),
        ]
        if config.durability == "interval":
            disk.append((DURABILITY_INTERVAL, gateway.lander.flush))
        timers: dict[str, Jobs] = {
            "interface": projection,
            "disk": disk,
            # Expiry has its own thread: reading 60,000 counters may take longer than a second.
            "expiry": [(SUPERVISE_SECONDS / 2, gateway.limits.expire)],
            "nonces": [(NONCE_SECONDS, app.admission.nonces.save)],
        }
        if app.copier:
            period = min(COPY_TICK, config.snapshot_copy_interval)
            timers["remote copy"] = [(period, app.copier.tick)]
        threads = [
            threading.Thread(target=repeat, args=(*row, self._stopping), name=row[0], daemon=True)
            for row in timers.items()
        ]
        for thread in threads:
            thread.start()
        return threads

    def _state(self) -> str:
        """The line that `systemctl status` shows of a running service."""
        tunnels, wrong = self._gateway.tunnels.values(), "; ".join(self._gateway.degraded())
        interfaces = ", ".join(f"{t.name} ({t.backend.kind})" for t in tunnels)
        return f"STATUS={f'degraded: {wrong}' if wrong else 'serving'}: {interfaces}"

    def _end_round(self) -> None:
        """The loop's work after each round: pass flights to the lander, and send WATCHDOG=1.

        A loop that hangs sends none, and systemd restarts the service.
        """
        self._gateway.ledger.dispatch()
        period = self._manager.watchdog
        if period and time.monotonic() >= self._next_word:
            self._next_word = time.monotonic() + period / 4
            self._manager.tell("WATCHDOG=1", self._state(), seconds=0)

    def _wait(self) -> None:
        """Serve until a signal ends it; SIGHUP reloads what a running gateway can change."""
        while (number := self._signals.recv(1)[0]) == signal.SIGHUP:
            self._manager.tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
            try:
                config = self._load()
                # A running gateway makes no new pair: its clients know the old one.
                tls, expires = make_tls(config, make_pair=False)
                box = payload_box(config)
                self._gateway.change_classes(config.service_classes)  # the last that may refuse
            except StartError as error:
                LOG.error("reload refused, the old settings and certificate stay: %s", error)
                self._manager.tell("READY=1", f"STATUS=reload refused: {error}")
                continue
            self._app.reload(config, box)
            self._server.tls, self._server.allowed = tls, api_sources(config)
            self._app.metrics.certificate_expires = expires
            LOG.info("reloaded keys, allowlist, certificate and service classes")
            self._manager.tell("READY=1", "STATUS=serving: reloaded")
        LOG.info("%s: stopping", signal.Signals(number).name)


# ==================================================================================================
# doctor: what can be wrong with a gateway on this host, one finding for each check, besides what
# the section host network checks already. report() prints what is wrong first; among such findings
# a cause comes before what follows from it, so the first line is the one to act on.
# Never here: repairs. The doctor changes nothing.
# ==================================================================================================


def look_at_all(config: Config, ask: Callable[[], tuple[int, bytes]]) -> Iterator[Finding]:
    """Run all checks of `wggw doctor`. `ask` requests server/status from the gateway."""
    host = Host(config, Store())
    if host.is_real:  # first: without it nothing below can be good
        yield from look_at((look_at_programs,), host)
    else:
        yield Finding("WG_BACKEND", "memory: no interface, no packet passes", "set it to auto")
    found, host.store = _look_at_database(host)
    yield found
    yield from look_at((look_at_fit, look_at_secrets), host)
    yield look_at_certificate(config, time.time())
    yield from look_at_answer(ask, host.start)
    yield from look_at(NETWORK if host.is_real else (), host)
    yield from look_at_openness(config)
    yield look_at_clock()


def look_at_programs(host: Host) -> Iterator[Finding]:
    """Whether the userspace WireGuard runs, where the kernel has none."""
    for kind in dict.fromkeys(tunnel.kind for tunnel in host.tunnels):
        with contextlib.closing(NetlinkSocket(NETLINK_GENERIC)) as netlink:
            if genl_family(netlink, kind) is not None and host.config.wg_backend != "uapi":
                continue
        program = PROGRAMS[kind]
        try:
            if path := shutil.which(program) or tool(program):
                run_tool(path, "--version")
        except BackendError as error:
            todo = f"install it again: apt-get install --reinstall {program}"
            yield Finding(program, f"it does not run: {error}", todo, True)


def look_at_certificate(config: Config, now: float) -> Finding:
    """Check when the certificate expires, and whether a self-made one has the needed names."""
    path = config.tls_cert
    try:
        begins, expires = certificate_times(read_certificate(path))
        own = own_certificate_names(path)
        with contextlib.suppress(PermissionError):  # another user's
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(path, config.tls_key, "")
    except ssl.SSLError as error:
        text = f"{path} and TLS_KEY {config.tls_key} are no usable pair: {_reason(error)}"
        todo = "restore both, or remove both for a new pair, then systemctl restart wggw"
        return Finding("certificate", text, todo, True)
    except (OSError, ValueError) as error:
        text = _reason(error) if isinstance(error, OSError) and error.errno else "not a certificate"
        todo = "restore it and TLS_KEY, or remove both for a new pair, then systemctl restart wggw"
        return Finding("certificate", f"{path}: {text}", todo, True)
    todo = "systemctl reload wggw renews it, with the same key"
    if own is None:
        todo = "renew it where it comes from, then systemctl reload wggw"
    if begins > now:
        text = f"{path} is not valid before {rfc3339(begins)}"
        todo = "set the clock if it is behind; else "
        todo += "remove it and TLS_KEY for a new pair" if own is not None else "replace it"
        return Finding("certificate", text, f"{todo}, then systemctl restart wggw", True)
    if expires < now:
        return Finding("certificate", f"{path} expired at {rfc3339(expires)}", todo, True)
    text = f"{path} is good until {rfc3339(expires)}"
    if expires < now + EXPIRY_WARNING:
        return Finding("certificate", text, todo)
    names = required_names(config)
    lacking = [] if own is None else sorted({*(names or host_addresses())} - own)
    if not lacking:
        return Finding("certificate", text)
    if not names:
        todo = f"set TLS_NAMES={','.join(lacking)}, then systemctl reload wggw"
    return Finding("certificate", f"{text}, but not for {', '.join(lacking)}", todo)


def look_at_secrets(host: Host) -> Iterator[Finding]:
    """Check who can read the private keys, and that those which clients know are there."""
    config, store, tunnels = host.config, host.store, host.tunnels if host.is_real else ()
    files = [(f"{t.prefix}_PRIVATE_KEY_FILE", t.private_key_file, 0o077) for t in tunnels]
    for name, path, forbidden in (*files, ("TLS_KEY", config.tls_key, 0o027)):
        try:
            check_private(name, path, forbidden)
        except ConfigError as error:
            found, _, todo = str(error).removeprefix(f"{name}: ").rpartition(": ")
            yield Finding(name, found, todo, True)
        except OSError:
            continue  # a missing pair is made, and so is a key that no client knows
    yield from () if host.is_served else _look_at_owners(config, [path for _, path, _ in files])
    for tunnel in tunnels:
        path, name = tunnel.private_key_file, tunnel.name
        if os.path.exists(path) or not store.counts.on(name) or store.private_keys.get(name):
            continue
        program = "wg" if tunnel.prefix == PLAIN_PREFIX else "awg"
        owner = shlex.quote(os.path.dirname(config.db_path) or ".")
        yield Finding(
            f"{tunnel.prefix}_PRIVATE_KEY_FILE",
            f"{path} does not exist: a restart would make another key, which no client knows",
            f"while {name} is up: (umask 077; {program} show {name} private-key >"
            f"{shlex.quote(path)}) && chown --reference={owner} {shlex.quote(path)}",
            True,
        )


def _look_at_owners(config: Config, keys: Sequence[str]) -> Iterator[Finding]:
    """Which files the gateway's user, who owns the database's directory, cannot read."""
    directory = os.path.dirname(config.db_path) or "."
    for path in filter(None, (config.env_file, *keys, config.tls_key)):
        try:
            user, found = os.stat(directory).st_uid, os.stat(path)
        except OSError:
            continue
        # A group that may read it can be one of that user's.
        if user not in (0, found.st_uid) and not found.st_mode & 0o044:
            text = f"the gateway's user, who owns {directory}, cannot read it"
            todo = f"chown --reference={shlex.join([directory, path])}"
            yield Finding(path, text, todo, True)


def clock_error() -> float:
    """The kernel's estimate of the clock's maximum error, in seconds. Raises OSError.

    adjtimex(2) returns it as `maxerror`, the fourth word of struct timex, in microseconds. It grows
    up to 16 s unless an NTP client resets it. STA_UNSYNC is less reliable: some NTP clients set it
    to keep the kernel from writing the hardware clock.
    """
    import ctypes

    timex = (ctypes.c_long * 64)()  # the first word, modes, is 0: the call changes nothing
    if ctypes.CDLL(None, use_errno=True).adjtimex(timex) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return timex[3] / 1e6


def look_at_clock(error_of_clock: Callable[[], float] = clock_error) -> Finding:
    """Check that the clock is synchronised, because each signature contains the time."""
    now = rfc3339(time.time())
    try:
        error = error_of_clock()
    except OSError as failure:
        text = f"{now}; the kernel does not say whether it is right: {_reason(failure)}"
        return Finding("clock", text)
    if error >= UNKNOWN_CLOCK_ERROR:
        todo = "run an NTP client: with a wrong clock, the gateway refuses every signature"
        return Finding("clock", f"{now}, not synchronised", todo)
    return Finding("clock", f"{now}, synchronised to {error * 1000:.0f} ms")


def look_at_openness(config: Config) -> Iterator[Finding]:
    """Note settings that work, but leave the API open or clients without an endpoint."""
    legacy = "legacy" in config.auth_schemes
    if not config.allowed_backends and not ipaddress.ip_address(config.api_host).is_loopback:
        more = ", and legacy signatures do not cover method, path and body" if legacy else ""
        yield Finding(
            "ALLOWED_BACKENDS",
            f"not set: the API's port is open to every address{more}",
            "set it to the networks of your backends, then systemctl reload wggw",
        )
    if not config.wg_endpoint:
        todo = "set it to the public name or address of this gateway, then systemctl restart wggw"
        yield Finding("WG_ENDPOINT", "not set: clients' configurations lack the endpoint", todo)


def _look_at_database(host: Host) -> tuple[Finding, Store]:
    """Read snapshot and journal as `wggw check` does. The store is empty if that is impossible."""

    def wrong(found: str, todo: str) -> tuple[Finding, Store]:
        return Finding("database", found, todo, True), Store()

    def is_usable(name: str) -> bool:
        found = os.stat(name)
        return found.st_uid == os.stat(directory).st_uid and found.st_mode & 0o600 == 0o600

    path = host.config.db_path
    directory = os.path.dirname(path) or "."
    there = [name for name in (path, f"{path}.journal") if os.path.exists(name)]
    others = [name for name in (f"{path}.lock", f"{path}.nonces") if os.path.exists(name)]
    if closed := [name for name in there if not os.access(name, os.R_OK)]:
        return wrong(f"this user cannot read {', '.join(closed)}", "run this as root")
    strange = [name for name in (*there, *others) if not is_usable(name)]
    if strange and not host.is_served:
        words = shlex.join(strange)
        todo = f"chown --reference={shlex.quote(directory)} {words} && chmod 600 {words}"
        who = f"the gateway's user, who owns {directory}"
        return wrong(f"{who}, cannot use {', '.join(strange)}", todo)
    with contextlib.suppress(OSError):
        if not host.is_served and os.statvfs(directory).f_flag & os.ST_RDONLY:
            found = f"{directory} is on a file system that is mounted read-only"
            return wrong(found, "see the kernel's log for the cause, and mount it writable")
    try:
        store, files = load_whole(host.config)
    except DamagedError as error:
        todo = "run `wggw check --repair` and do what it prints"
        if host.is_served:
            moved = f"mkdir damaged && mv {shlex.join(there)} damaged/"
            todo = f"the running gateway has the whole state, and writes these files anew: {moved}"
        return wrong(error.fault, todo)
    except NewerError as error:
        return wrong(str(error), "it can be read by no older one")
    except StartError as error:
        return wrong(str(error), "change the setting that it names")
    except OSError as error:
        return wrong(f"{path}: {_reason(error)}", "run this as root")
    if not files.has_snapshot:
        if host.is_served and host.config.snapshot_url:  # while the gateway waits for the copy
            todo = "the remote copy or the running gateway makes it again"
            return Finding("database", f"{path} does not exist", todo), Store()
        for name, peers in _orphans(host).items():
            found = f"{path} does not exist, and a start removes the {show_peers(peers)} of {name}"
            adopt = f"ip link set dev {name} alias '' && wggw adopt --interface {name} --yes"
            adopt += f" --env-file {shlex.quote(host.config.env_file or '.env')}"
            todo = f"put the files back, or, without labels and limits, take them over: {adopt}"
            return wrong(found, todo)
        return wrong(f"{path} does not exist", host.start)
    text = f"{path}: good, {show_peers(store.counts.total())}, record {store.number}"
    return Finding("database", text), store


def _orphans(host: Host) -> dict[str, int]:
    """How many peers this gateway's interfaces have, while there is no database and no gateway."""
    found: dict[str, int] = {}
    if not host.is_real or host.is_served:
        return found
    marked = {link.name: link for link in host.links if link.alias == host.mark}
    for tunnel in host.tunnels:
        with contextlib.suppress(KeyError, BackendError):
            found[tunnel.name] = read_link(tunnel.kind, marked[tunnel.name]).peers
    return {name: peers for name, peers in found.items() if peers}


DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def look_at_answer(ask: Callable[[], tuple[int, bytes]], start: str) -> Iterator[Finding]:
    """Ask the gateway for its status. What it says of itself has the subject "status"."""
    log = "see the gateway's log: journalctl -u wggw"
    try:
        status, body = ask()
        answer = json.loads(body)
        is_ok = status == HTTPStatus.OK
        reasons = answer["reasons"] if is_ok else [answer["detail"]]
        told = f"{answer['status']}, {show_peers(answer['total_peers'])}" if is_ok else ""
        rest = "; ".join(reason for reason in reasons if "remote copy" not in reason)
        lag, copy = "", answer.get("remote_copy") or {}
        if copy:
            lag = f"{copy['lag_records']} records and {copy['lag_seconds']} s behind"
            lag += f", epoch {copy.get('epoch')} of {copy.get('holder')}"
    except StartError as error:
        is_mine = str(error).endswith("run this with sudo")  # a new start would change nothing
        yield Finding("API", str(error), "" if is_mine else start, True)
        return
    except (ValueError, KeyError, TypeError):
        yield Finding("API", "its answer is not a gateway's", log, True)
        return
    if is_ok and not rest:
        yield Finding("API", f"answers: {told}")
    elif is_ok:
        todo = log
        if re.search("|".join(map(os.strerror, DISK_FAULTS)), rest):
            todo = "make space on the disk of DB_PATH, or make it writable: no restart is needed"
        yield Finding("status", f"{answer['status']}: {rest}", todo, True)
    elif rest:
        yield Finding("API", f"status {status}: {rest}", log, True)
    if failure := copy.get("failure") or next((r for r in reasons if "remote copy" in r), ""):
        todo = log
        if re.search(r"\b(GET|PUT|DELETE) ", failure):
            todo = "see that the store of SNAPSHOT_URL is reachable and accepts its credentials"
        elif "taken it over" in failure:
            todo = "stop this gateway, or systemctl restart wggw to continue from the other's copy"
        yield Finding("remote copy", ": ".join(filter(None, (lag, failure))), todo, True)
    elif copy:
        yield Finding("remote copy", lag)


# ==================================================================================================
# moving in: reads the peers of other programs, and takes over their interfaces
#
# Each reader takes the bytes of one kind of file and returns its peers as fields of the API, each
# with its place in the file. Readers drop nothing in silence: a peer that the gateway cannot serve
# (it has a routed subnet, or no address) carries the reason, and notes name other lines that are
# not used. The API verifies the fields, not the readers. Nothing of a file is executed; a SQLite
# file is read in memory. All of this runs in the command's own process.
# Never here: requests, and deciding what to do with the peers.
# ==================================================================================================


@contextlib.contextmanager
def naming(action: str) -> Iterator[None]:
    """Say which action an error prevented. Raises StartError."""
    try:
        yield
    except (UnicodeEncodeError, http.client.InvalidURL):  # _run_command() knows why
        raise
    except (OSError, UnicodeError, http.client.HTTPException) as error:
        raise StartError(f"{action}: {_reason(error)}") from None
    except (ValueError, BackendError, CopyError) as error:
        raise StartError(f"{action}: {error}") from None


Json = Mapping[str, Any]  # a JSON object


class FoundPeer(NamedTuple):
    """A peer of another program, and the reason why the gateway cannot serve it ("" if it can)."""

    place: str
    fields: dict[str, Any]
    reason: str = ""

    def __repr__(self) -> str:  # fields hold preshared keys
        return f"FoundPeer({self.place})"


class FoundState(NamedTuple):
    """The peers of a file or an interface; `notes` name what else it holds and nobody uses."""

    kind: str
    peers: list[FoundPeer]
    notes: Sequence[str] = ()


def read_foreign(data: bytes) -> FoundState:
    """Read a file that another program wrote. Raises ValueError, which shows no value."""
    if data.startswith(SQLITE_MAGIC):
        return read_ancestor(data)
    text = data.decode("utf-8-sig")
    if not text.strip():
        raise ValueError("it is empty")
    if re.match(r"\s*(\{|\[\s*[\]{])", text):  # [Interface] and [Peer] are not JSON lists
        return read_json_peers(text)
    return read_wg_file(text)


# --- wg-quick files, and the output of `wg showconf` and `awg showconf` ---------------------------

_NAME_LINE = re.compile(r"(?:friendly_name|name)\s*[=:]\s*(.*)", re.IGNORECASE)
# Lines without a note: the gateway has its own, or has no use for them.
_SERVER_LINES = frozenset({"address", "listenport", "privatekey", "mtu", "fwmark", "saveconfig"})
_PEER_LINES = frozenset({"publickey", "presharedkey", "allowedips"})
_UNUSED_PEER_LINES = frozenset({"endpoint", "persistentkeepalive", "advancedsecurity"})
_KNOWN_LINES = frozenset((*_OTHER_LINES, *_AWG_LINES, *_PEER_LINES, *_UNUSED_PEER_LINES))


def read_wg_file(text: str) -> FoundState:
    """Read a wg-quick file. Names of lines may have any case. Raises ValueError.

    A peer's label is the comment above it, or above one of its lines. A comment "name = ..." wins
    over others, and may also be directly below them.
    """
    blocks: dict[str, dict[str, list[str]]] = {}  # the lines of each peer by its place
    labels: dict[str, _Label] = {}
    better = functools.partial(max, key=lambda label: label.rank)  # the first one of equal rank
    notes: list[str] = []
    parameters: dict[str, str] = {}
    section = place = ""
    above, is_apart = _Label(), False  # the comment above this line; whether a line before is empty
    for number, line in enumerate(text.split("\n"), 1):
        content, _, comment = (part.strip() for part in line.partition("#"))
        label = _label_in(comment)
        key, separator, value = (part.strip() for part in content.partition("="))
        if content.startswith("["):
            section, place = content.lower(), f"line {number}"
            if section not in ("[interface]", "[peer]"):
                raise ValueError(f"line {number}: neither [Interface] nor [Peer]")
            if section == "[peer]":
                blocks[place], labels[place] = {}, better(label, above)
            above, is_apart = _Label(), False
        elif not content:
            is_apart = is_apart or not line.strip()
            if section == "[peer]" and label.rank == 2 > labels[place].rank and not is_apart:
                labels[place] = label
            else:
                above = better(label, above)
        elif not section or not separator:
            raise ValueError(f"line {number}: not a line of a WireGuard configuration file")
        else:
            if section == "[peer]":
                blocks[place].setdefault(key.lower(), []).append(value)
                labels[place] = better(labels[place], above)
            elif key.lower() in _AWG_LINES:
                parameters[_AWG_LINES[key.lower()]] = value
            elif key.lower() not in _SERVER_LINES:
                notes.append(f"line {number}: the gateway does not use {key[:40]}")
            above, is_apart = _Label(), False
    if not section:
        raise ValueError("it has neither [Interface] nor [Peer]")
    peers = [_peer_of_lines(place, lines, labels[place].text) for place, lines in blocks.items()]
    if parameters:
        parsed = Obfuscation(**awg_values(parameters))
        shared = {name: show_awg_value(getattr(parsed, name)) for name in AWG_SHARED}
        for peer in peers:  # a gateway with other parameters refuses the peer
            peer.fields["obfuscation"] = {"enabled": True, **shared}
        notes.append(
            "an import does not change the gateway's AmneziaWG parameters: to use those of this "
            "file, set AWG_PARAMS to its path before the gateway's first start, or run "
            "`wggw awg rotate --params @FILE`"
        )
    return FoundState("WireGuard configuration file", peers, notes)


class _Label(NamedTuple):
    text: str = ""
    rank: int = 0  # 1 of a comment, 2 of a line like "name = ..."


def _label_in(comment: str) -> _Label:
    """The peer's name in a comment, without the marks that some programs add.

    A line that was commented out is no name: it may hold a client's private key.
    """
    text = comment.strip("# \t")
    line_name, is_line, _ = text.partition("=")
    is_known = is_line and line_name.strip().lower() in _KNOWN_LINES
    is_section = text.lower().startswith(("[interface]", "[peer]"))
    if is_known or is_section or _KEY.search(text):
        return _Label()
    match = _NAME_LINE.fullmatch(text)
    word, _, rest = text.partition(" ")
    if match:
        text = match[1].strip()
    elif word.lower() in ("begin", "begin_peer"):
        text = rest.strip()
    elif word.lower() in ("end", "end_peer"):
        text = ""
    return _Label(text, (2 if match else 1) if text else 0)


def _peer_of_lines(place: str, lines: Mapping[str, Sequence[str]], name: str) -> FoundPeer:
    fields: dict[str, Any] = {"label": name[:MAX_TEXT]} if name else {}
    unknown = lines.keys() - _PEER_LINES - _UNUSED_PEER_LINES
    if unknown:
        return FoundPeer(place, fields, f"{min(unknown)[:40]} is not a known line of [Peer]")
    keys = lines.get("publickey", ())
    if len(keys) != 1:
        count = "several public keys" if keys else "no public key"
        return FoundPeer(place, fields, f"it has {count}")
    fields["public_key"] = keys[0]
    if any(lines.get("presharedkey", ())):
        fields["preshared_key"] = lines["presharedkey"][-1]
    return _with_addresses(place, fields, ",".join(lines.get("allowedips", ())).split(","))


def _with_addresses(place: str, fields: dict[str, Any], networks: Iterable[str]) -> FoundPeer:
    """The peer with one address of each family, or with the reason why it cannot be served."""
    given = [text for text in map(str.strip, networks) if text]
    for text in given:
        try:
            network = ipaddress.ip_network(text, strict=False)
        except ValueError:
            return FoundPeer(place, fields, f"{text[:60]} is not an IP address or network")
        name = ADDRESS_FIELD[f"ipv{network.version}"]
        if network.prefixlen != network.max_prefixlen:
            return FoundPeer(place, fields, f"{network} is routed to it: a peer has addresses only")
        if name in fields:
            reason = f"it has several IPv{network.version} addresses: the gateway serves one"
            return FoundPeer(place, fields, reason)
        fields[name] = str(network.network_address)
    return FoundPeer(place, fields, "" if given else "it has no address")


def outside(fields: Json, subnets: Collection[IPv4or6Network]) -> str:
    """The reason that an address of the peer is in none of the subnets, or ""."""
    for name in ADDRESS_FIELD.values():
        with contextlib.suppress(ValueError):  # the gateway refuses what is no address
            address = ipaddress.ip_address(fields.get(name, ""))
            if not any(address in subnet for subnet in subnets):
                return f"its address is {address}, outside of {', '.join(map(str, subnets))}"
    return ""


# --- JSON -----------------------------------------------------------------------------------------


def read_json_peers(text: str) -> FoundState:
    """Read wg-easy's state (up to version 14), a list of peers, or lines of one peer each."""
    try:
        parsed = load_json(text)
    except ValueError as error:
        return _peers_of_json("JSON lines", _json_lines(text, error), _api_peer)
    if isinstance(parsed, dict):
        clients = parsed.get("clients")
        if isinstance(clients, dict):
            named = ((f"client {number}", peer) for number, peer in enumerate(clients.values(), 1))
            return _peers_of_json("wg-easy's state", named, _wg_easy_peer)
        parsed = parsed.get("configurations", [parsed])
    if not isinstance(parsed, list):
        raise ValueError("it is neither a list of peers nor wg-easy's state")
    numbered = ((f"peer {number}", peer) for number, peer in enumerate(parsed, 1))
    return _peers_of_json("JSON list", numbered, _api_peer)


def _json_lines(text: str, error: ValueError) -> Iterator[tuple[str, Any]]:
    """Place and value of each line. Raises `error`, which tells where the fault in one long
    document is, if the first line is no JSON."""
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    for number, line in lines:
        try:
            yield f"line {number}", load_json(line)
        except json.JSONDecodeError as wrong:
            if number == lines[0][0]:
                raise error from None
            raise ValueError(f"line {number} column {wrong.colno}: {wrong.msg}") from None


def _peers_of_json(
    kind: str, given: Iterable[tuple[str, Any]], convert: Callable[[str, dict[str, Any]], FoundPeer]
) -> FoundState:
    peers: list[FoundPeer] = []
    for place, peer in given:
        if not isinstance(peer, dict):
            raise ValueError(f"{place} is not a JSON object")
        peers.append(convert(place, peer))
    return FoundState(kind, peers)


def _api_peer(place: str, given: dict[str, Any]) -> FoundPeer:
    """A peer in the API's fields, without those that only its answers have."""
    answered_only = CONFIGURATION.keys() - SYNC_FIELDS.keys()
    fields = {n: v for n, v in given.items() if n not in answered_only and v is not None}
    is_text = isinstance(fields.get("public_key", ""), str)
    return FoundPeer(place, fields, "" if is_text else "its public_key is not a text")


_WG_EASY = {
    "publicKey": "public_key",
    "preSharedKey": "preshared_key",
    "name": "label",
    "expiredAt": "expires_at",
}


def _wg_easy_peer(place: str, given: dict[str, Any]) -> FoundPeer:
    texts = {name: value for name, value in given.items() if isinstance(value, str) and value}
    fields: dict[str, Any] = {_WG_EASY[n]: v for n, v in texts.items() if n in _WG_EASY}
    if "label" in fields:
        fields["label"] = fields["label"][:MAX_TEXT]
    fields["status"] = "suspended" if given.get("enabled") is False else "active"
    if "public_key" not in fields:
        return FoundPeer(place, fields, "it has no public key")
    return _with_addresses(place, fields, (texts.get(n, "") for n in ("address", "address6")))


# --- the gateway before this one ------------------------------------------------------------------

_ANCESTOR_COLUMNS = {  # with the field of the API
    "public_key": "public_key",
    "status": "status",
    "assigned_port": "port",
    "dns_choice": "dns",
    "tunnel_traffic": "tunnel_traffic",
    "assigned_ip": "assigned_ip",
    "assigned_ipv6": "assigned_ipv6",
}


def read_ancestor(data: bytes) -> FoundState:
    """Read the SQLite file of the gateway before this one, which has the same default path."""
    if data[18:20] == b"\2\2":  # https://www.sqlite.org/fileformat.html, 1.3
        raise ValueError(
            "it is in WAL mode, and its newest rows may be in another file. Stop the program that "
            "uses it, and end that mode: python3 -c 'import sqlite3, sys; "
            'sqlite3.connect(sys.argv[1]).execute("PRAGMA journal_mode=DELETE")\' FILE'
        )
    db = sqlite3.connect(":memory:")
    try:
        db.deserialize(data)
        if not is_ancestor(db):
            raise ValueError("it is a SQLite file, but not the previous gateway's")
        columns = ", ".join(_ANCESTOR_COLUMNS)
        rows = db.execute(f"SELECT {columns} FROM wg_configs ORDER BY created_at, rowid")  # noqa: S608
        peers = [_ancestor_peer(f"row {number}", row) for number, row in enumerate(rows, 1)]
    except sqlite3.Error as error:
        raise ValueError(f"it is a damaged SQLite file: {error}") from None
    finally:
        db.close()
    return FoundState("the previous gateway's database", peers)


def _ancestor_peer(place: str, row: Sequence[Any]) -> FoundPeer:
    """The peer of a row. A column may hold a value of any type, whatever its table says."""
    fields: dict[str, Any] = {}
    for (column, name), value in zip(_ANCESTOR_COLUMNS.items(), row, strict=True):
        if value is None or value == "":
            continue
        if not isinstance(value, int if name == "port" else str):
            return FoundPeer(place, fields, f"its {column} has a value of another type")
        try:
            fields[name] = load_json(str(value)) if name == "tunnel_traffic" else value
        except ValueError:
            return FoundPeer(place, fields, f"its {column} is not JSON")
    addresses = [fields.pop(name) for name in ADDRESS_FIELD.values() if name in fields]
    return _with_addresses(place, fields, addresses)


# --- a live interface -----------------------------------------------------------------------------
#
# Another source of peers, which also determines settings. The only change to the interface is the
# mark, which comes last: until then the interface still belongs to its previous manager, and after
# a crash the same command continues where it stopped.

INSTALLED_SETTINGS = "/etc/wggw/wggw.env"  # as install.sh writes it, with these files
INSTALLED_FILES = {
    "DB_PATH": "/var/lib/wggw/wireguard.db",
    "WG_PRIVATE_KEY_FILE": "/etc/wggw/privatekey",
    "TLS_CERT": "/etc/wggw/cert.pem",
    "TLS_KEY": "/etc/wggw/key.pem",
}
OTHERS_FILES = {WG_GENL_NAME: "/etc/wireguard", AWG_GENL_NAME: "/etc/amnezia/amneziawg"}
NETWORKD_DIRECTORIES = ("/etc/systemd/network", "/run/systemd/network", "/usr/lib/systemd/network")
_PORT_SETTINGS = {PLAIN_PREFIX: "WG_DEFAULT_PORT", AWG_PREFIX: "AWG_PORT"}


class LiveInterface(NamedTuple):
    """A WireGuard or AmneziaWG interface of this host, whoever made it."""

    kind: str
    found: FoundLink
    addresses: list[ipaddress.IPv4Interface | ipaddress.IPv6Interface]
    device: Device
    peers: list[WirePeer]

    @property
    def name(self) -> str:
        return self.found.name

    @property
    def prefix(self) -> str:
        """The first word in the names of the settings for this kind of interface."""
        return PLAIN_PREFIX if self.kind == WG_GENL_NAME else AWG_PREFIX

    def __repr__(self) -> str:  # it holds keys
        return f"LiveInterface({self.name})"


def read_live(name: str) -> LiveInterface:
    """Read an interface. Raises StartError."""
    with naming(f"cannot read {name} (adopt needs root)"):
        with contextlib.closing(Route()) as route:
            found = route.find(name)
            if found is None:
                raise StartError(
                    f"this host has no interface {name!r}: name one of `ip link` with --interface"
                )
            kinds = kinds_of(found)
            if not kinds:
                raise StartError(
                    f"{name} is neither a WireGuard nor an AmneziaWG interface: name another one "
                    "with --interface"
                )
            addresses = [a for a in route.addresses(found.ifindex) if not a.ip.is_link_local]
        kind = kinds[-1]  # if two programs answer, AmneziaWG's
        reading = read_link(kind, found)
    device = cast(Device, reading.device)
    if not device.private_key:
        raise StartError(f"cannot take over {name}: it has no private key, so set one first")
    if unreadable := reading.unreadable:
        raise StartError(f"cannot take over {name}: {unreadable} of its peers cannot be read")
    peers = sorted(state.peer for _, state in reading.changed)
    return LiveInterface(kind, found, sorted(addresses, key=str), device, peers)


def peers_of_live(live: LiveInterface) -> FoundState:
    """The interface's peers, with the labels from the wg-quick file of the same name, if any."""
    peers: list[FoundPeer] = []
    labels: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        for named in read_wg_file(Path(wg_quick_file(live)).read_text("utf-8")).peers:
            labels[named.fields.get("public_key", "")] = named.fields.get("label", "")
    for number, peer in enumerate(live.peers, 1):
        key = encode_key(peer.public_key)
        fields: dict[str, Any] = {"public_key": key, "status": "active"}
        if labels.get(key):
            fields["label"] = labels[key]
        if peer.preshared_key:
            fields["preshared_key"] = encode_key(peer.preshared_key)
        if live.kind == AWG_GENL_NAME:
            fields["obfuscation"] = True
        networks = [str(ipaddress.ip_network((n[:-1], n[-1]))) for n in peer.allowed_ips]
        peers.append(_with_addresses(f"peer {number}", fields, networks))
    return FoundState(f"{PRODUCTS[live.kind]} interface", peers)


def settings_of_live(live: LiveInterface) -> tuple[dict[str, str], dict[str, str]]:
    """Two sets of settings that describe the interface: the first must be so, the second are
    defaults. Raises ValueError for parameters that are not valid."""
    prefix, parameters = live.prefix, live.device.obfuscation
    must = {f"{prefix}_INTERFACE": live.name, _PORT_SETTINGS[prefix]: str(live.device.listen_port)}
    may = {"WG_MTU": str(max(live.found.mtu, 1280) + parameters.s4)}
    for family, longest in (("ipv4", 30), ("ipv6", 126)):
        here = [a for a in live.addresses if f"ipv{a.version}" == family]
        subnets = [a.network for a in here if a.network.prefixlen <= longest]
        first = [n for n in subnets if any(a.ip == n.network_address + 1 for a in here)]
        chosen = next(iter(first + subnets), None)
        if chosen is not None or not here:
            may[f"{prefix}_{family.upper()}_SUBNET"] = str(chosen or "")
    if prefix == AWG_PREFIX:
        may["AWG_PARAMS"] = encode_state(parse_obfuscation(show_parameters(parameters)))
        may["WG_INTERFACE"] = ""
    return must, may


def wg_quick_file(live: LiveInterface) -> str:
    return f"{OTHERS_FILES[live.kind]}/{live.name}.conf"


def other_managers(live: LiveInterface) -> Iterator[str]:
    """Who else manages the interface, and a command that ends this and keeps the link up."""
    file = wg_quick_file(live)
    if os.path.exists(file):
        unit = f"{'wg' if live.kind == WG_GENL_NAME else 'awg'}-quick@{live.name}"
        yield (
            f"{unit} manages {live.name}, too. Do not stop it: that deletes the link. This ends it "
            f"and keeps the link up: systemctl disable {unit}; mv {file} {file}.adopted"
        )
    is_netplan, steps = False, list[str]()
    for path, words in _networkd_files(live.name):
        if path.name.startswith("10-netplan-"):
            is_netplan = True
        elif live.name in words:
            steps.append(f"mv {shlex.quote(str(path))} {shlex.quote(str(path))}.adopted")
        else:  # it is for others, too: the first file that fits is used
            own = f"{NETWORKD_DIRECTORIES[0]}/00-{live.name}.network"
            steps.append(f"printf '[Match]\\nName={live.name}\\n[Link]\\nUnmanaged=yes\\n' >{own}")
    if is_netplan:
        yield (
            f"netplan manages {live.name}, too. This ends it and keeps the link up: remove "
            f"{live.name} from the files in /etc/netplan, then netplan generate; systemctl restart "
            "systemd-networkd. Do not run netplan apply: that deletes the link"
        )
    if steps:
        yield (
            f"systemd-networkd manages {live.name}, too. This ends it and keeps the link up: "
            f"{'; '.join(dict.fromkeys(steps))}; systemctl restart systemd-networkd"
        )


def _networkd_files(name: str) -> Iterator[tuple[Path, list[str]]]:
    """Files of systemd-networkd for this interface, with their patterns (systemd.network(5))."""
    for directory in NETWORKD_DIRECTORIES:
        for path in sorted(Path(directory).glob("*.net*")):
            try:
                pairs = [line.partition("=") for line in path.read_text("utf-8").splitlines()]
            except (OSError, ValueError):
                continue
            patterns = [
                w for key, _, value in pairs if key.strip() == "Name" for w in value.split()
            ]
            fits = any(fnmatch.fnmatchcase(name, pattern.lstrip("!")) for pattern in patterns)
            is_for_it = patterns and fits != patterns[0].startswith("!")
            if is_for_it and path.suffix in (".netdev", ".network"):
                yield path, patterns


class Adoption:
    """Takes over a live interface: checks whether settings, key, database and peers fit, and then
    writes them and marks the interface.

    `settings` are the lines that perform() adds to the settings file.
    """

    def __init__(self, live: LiveInterface, path: str, environ: Mapping[str, str]) -> None:
        """Check the settings, and change nothing. Raises StartError when they do not fit."""
        self.live, self._path = live, path
        self._is_new = not os.path.exists(path)
        with naming(f"cannot take over {live.name} with {path}"):
            text = "" if self._is_new else Path(path).read_text("utf-8")
            must, may = settings_of_live(live)
        given = {**read_env_file(text, path), **environ}
        wanted = {**must, **may}
        if self._is_new:
            wanted["GATEWAY_API_KEY"] = secrets.token_hex(32)
            wanted |= INSTALLED_FILES if path == INSTALLED_SETTINGS else {}
        self.settings = {name: value for name, value in wanted.items() if name not in given}
        self._refuse(
            f"{name} is {given[name]!r}, but {value!r} of {live.name}: change the setting"
            for name, value in must.items()
            if given.get(name, value) != value
        )
        self._explicit = {*given, *self.settings}  # all other settings have their defaults
        self._config = self._load(environ)
        key_file = f"{live.prefix}_PRIVATE_KEY_FILE"
        if self._holds_another_key() and key_file not in given:
            directory = os.path.dirname(self._row.private_key_file)
            self.settings[key_file] = os.path.join(directory, f"{live.name}.key")
            self._config = self._load(environ)
        self._store, _ = load_whole(self._config)
        self._refuse([*self._wrong_settings(), *self._wrong_parameters()])
        link = make_link(self._row, live.device.private_key)
        try:
            self._pools = Tunnel(self._row, link, MemoryBackend(), None).make_pools(self._store)
        except Conflict as error:
            raise ConfigError(error.detail) from None

    @staticmethod
    def _refuse(faults: Iterable[str]) -> None:
        if text := "; ".join(faults):
            raise ConfigError(f"nothing was changed: {text}")

    def _load(self, environ: Mapping[str, str]) -> Config:
        """The settings together with those that will be added. Raises ConfigError."""
        file = os.devnull if self._is_new else self._path
        config = load_config({**self.settings, **environ}, file, key_needed=False)
        will_exist = not self._is_new or self.settings
        return replace(config, env_file=self._path if will_exist else None)

    @property
    def _row(self) -> InterfaceSettings:
        rows = interface_settings(self._config)
        return next(row for row in rows if row.prefix == self.live.prefix)

    def _holds_another_key(self) -> bool:
        file = self._row.private_key_file
        return os.path.exists(file) and load_private_key(self._row) != self.live.device.private_key

    def _wrong_settings(self) -> Iterator[str]:
        name, row = self.live.name, self._row
        if self._holds_another_key():
            yield (
                f"{row.private_key_file!r} holds another key than {name}: set "
                f"{row.prefix}_PRIVATE_KEY_FILE to a file that does not exist yet"
            )
        for family in FAMILIES:
            here = [a for a in self.live.addresses if f"ipv{a.version}" == family]
            if not here:
                continue
            subnet, variable = row.subnets.get(family), f"{row.prefix}_{family.upper()}_SUBNET"
            if subnet is None or variable not in self._explicit:
                yield f"{name} has {here[0]}: set {variable} to the subnet of its peers"
            elif all(a.ip != subnet.network_address + 1 for a in here):
                first = f"{subnet.network_address + 1}/{subnet.prefixlen}"
                yield (
                    f"{name} has {here[0]}, but a gateway uses the first address of its subnet "
                    f"({variable}): `ip address add {first} dev {name}` gives it both"
                )

    def _wrong_parameters(self) -> Iterator[str]:
        """Differences between the interface's AmneziaWG parameters and settings or database."""
        if self._row.prefix != AWG_PREFIX:
            return
        name = cast(str, self._config.awg_interface)
        ours = initial_obfuscation(self._config.awg_params, self._store, name)[0].parameters
        if other := unlike(ours, self.live.device.obfuscation, Obfuscation._fields):
            where = "the database" if self._store.meta("obfuscation") else "AWG_PARAMS"
            yield f"{where} has another {', '.join(other)} than {self.live.name}"
        try:
            make_link(self._row, self.live.device.private_key, ours)
        except ValueError as error:
            yield str(error)

    def misfit(self, fields: Json) -> str:
        """The reason why settings or database do not allow the peer, "" if they do."""
        known = self._store.get(fields["public_key"])
        if known is not None and known.interface != self.live.name:
            return f"the database has it on {known.interface}"
        if known is not None and known.status == "suspended":
            return "it is suspended in the database"
        if reason := outside(fields, [pool.network for pool in self._pools.values()]):
            return reason
        for family, pool in self._pools.items():
            address = fields.get(ADDRESS_FIELD[family])
            is_its_own = known and getattr(known, ADDRESS_FIELD[family]) == address
            if address and not is_its_own and not pool.is_free(address):
                return (
                    f"{address} is the gateway's, another peer's in the database, or the subnet's "
                    "network or broadcast address"
                )
        return ""

    def perform(self, peers: Sequence[Json]) -> DesiredResult:
        """Take the interface over with these peers. Raises StartError; after one, or after a crash,
        the same call continues where it stopped."""
        config, key_file = self._config, self._row.private_key_file
        database = Path(config.db_path)
        if read_live(self.live.name) != self.live:
            raise StartError(
                f"somebody changed {self.live.name} meanwhile, so nothing was done: run the "
                "command again"
            )
        action = (
            f"cannot take over {self.live.name} (correct the reason and run the command again: it "
            "continues where it stopped)"
        )
        with naming(action), contextlib.ExitStack() as locks:
            for path in (self._path, config.db_path, key_file):
                os.makedirs(os.path.dirname(path) or ".", 0o700, exist_ok=True)
            lock_database(config.db_path)
            for row in interface_settings(config):
                locks.enter_context(contextlib.closing(lock_interface(row.name)))
            if not os.path.exists(key_file):
                key = encode_key(self.live.device.private_key)
                Disk().replace(key_file, [key.encode("ascii"), b"\n"])
                give_to_owner(key_file, str(database.parent))
            result = self._fill_database(peers)
            for file in database.parent.glob(glob.escape(database.name) + "*"):
                give_to_owner(str(file), str(database.parent))
            self._write_settings()
            with contextlib.closing(Route()) as route:
                route.mark(self.live.name, self._row.mark)
        return result

    def _fill_database(self, peers: Sequence[Json]) -> DesiredResult:
        """Give the peers as a desired state to a gateway without real interfaces, which verifies
        them as always. Raises StartError."""
        config = self._config
        files, store, loop = open_files(config), Store(), Loop()
        store.take(files.load())
        rows = interface_settings(config)
        keys = [load_private_key(row, store.private_keys.get(row.name)) for row in rows]
        links, obfuscation = plan_links(config, store, rows, keys)
        store.private_keys[self.live.name] = encode_key(self.live.device.private_key)
        if not files.has_snapshot:  # otherwise `serve` takes its first start for one after a crash
            nonces = NonceGuard(config.max_timestamp_diff)
            nonces.keep(f"{config.db_path}.nonces", first=True)
            nonces.close(time.time())
        files.begin(store)
        gateway = Gateway(config, store, files, time.time, loop.run, begin=loop.begin)
        opened = [(row, link, MemoryBackend()) for row, link in zip(rows, links, strict=True)]
        loop.start()
        gateway.start(opened, *obfuscation)
        try:
            existing = [peer.public_key for peer in store.peers_after(0, MAX_INTEGER)]
            desired = {key: Desired(key, {"public_key": key}) for key in existing}
            for fields in peers:
                key = fields["public_key"]
                desired[key] = Desired(short_key(key), parse_fields(fields, SYNC_FIELDS))
            return gateway.sync(desired, dry_run=False, allow_mass_delete=False)
        except GatewayError as error:
            raise StartError(f"no peer was taken over: {error.detail}") from None
        finally:
            gateway.close()
            files.journal.close()
            loop.stop()

    def _write_settings(self) -> None:
        """Add the missing settings; the file keeps its owner and mode. Raises OSError."""
        if not self.settings:
            return
        text = "" if self._is_new else Path(self._path).read_text("utf-8")
        text += "\n" * (text[-1:] not in ("", "\n"))
        text += f"# wggw took over {self.live.name} with these settings.\n"
        for name, value in self.settings.items():
            quote = "" if re.fullmatch(r"[A-Za-z0-9./:_,+=-]*", value) else "'"
            text += f"{name}={quote}{value}{quote}\n"
        path = os.path.realpath(self._path)
        before = None if self._is_new else os.stat(path)
        Disk().replace(path, [text.encode("utf-8")])
        if before is not None:
            os.chown(path, before.st_uid, before.st_gid)
            os.chmod(path, stat.S_IMODE(before.st_mode))


def give_to_owner(target: str, path: str) -> None:
    """Give a file that root made to the owner of `path` or of its directory. Raises OSError."""
    if os.geteuid() == 0:
        model = os.stat(path if os.path.exists(path) else os.path.dirname(path) or ".")
        os.chown(target, model.st_uid, model.st_gid)


# ==================================================================================================
# command line: what operators type, and what they read
#
# COMMANDS, at the end, is the table of commands: name, function, help, examples, arguments. Most
# commands ask the gateway over its Unix socket, or with --url over HTTPS, and print the answer:
# whole lines in a pipe, and on a terminal what fits its width. The others read the files, or change
# the host, without a gateway. A command raises StartError or BackendError for what went wrong;
# _run_command() prints it and returns its exit code. Tables on the screen are data, too: columns,
# the most important first, with a function for the cells of each.
# Never here: rules, which the API and the sections above have.
# ==================================================================================================


def show_label(label: str | None) -> str:
    """A label without characters that control a terminal."""
    return "".join(c if c.isprintable() else "?" for c in label or "")


def complain(text: str) -> None:
    """Write a line to standard error, if it takes one; nothing in it controls a terminal."""
    with contextlib.suppress(OSError):
        print(show_label(text), file=sys.stderr)


class ApiClient:
    """Sends requests to this host's gateway, over its Unix socket: the kernel says who calls."""

    def __init__(self, db_path: str) -> None:
        self._place = local_socket_path(db_path)

    def call(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Return (status, body) of one request. Raises StartError without a reliable answer.

        If the gateway cannot answer yet (it starts, or after a crash it does not know whether an
        RFC 9421 signature was used) and says to retry within seconds, this retries once.
        """
        for is_last in (False, True):
            connection = self._connect()
            with naming(f"no answer from {self._place}"), contextlib.closing(connection):
                connection.request(method, path, body or None, self._headers(method, path, body))
                response = connection.getresponse()
                content = response.read()
                wait = response.headers.get("Retry-After", "")
                seconds = int(wait) if wait.isdecimal() else 0
            is_busy = response.status == HTTPStatus.SERVICE_UNAVAILABLE
            if is_last or not is_busy or not 0 < seconds <= MAX_CLIENT_WAIT:
                break
            time.sleep(seconds)
        return response.status, content

    def _connect(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(CLIENT_TIMEOUT)
        with naming(f"cannot connect to {self._place}"):
            try:
                with short_path(self._place) as name:
                    connection.sock.connect(name)
            except (FileNotFoundError, ConnectionRefusedError):
                raise StartError(
                    f"no gateway runs here: nothing listens on {self._place}. `systemctl status "
                    "wggw` shows why, `systemctl start wggw` starts it; --env-file names another "
                    "gateway's settings"
                ) from None
            except PermissionError:
                raise StartError(
                    f"only root and the gateway's user may connect to {self._place}: run this with "
                    "sudo"
                ) from None
        return connection

    def _headers(self, method: str, path: str, body: bytes) -> dict[str, str]:
        return {"Content-Type": content_type(method, path, body)} if body else {}


class RemoteClient(ApiClient):
    """Sends signed requests to a gateway elsewhere, known by its certificate's fingerprint."""

    def __init__(self, url: str, key_id: str, secret: str, fingerprint: str, scheme: str) -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            if parts.scheme != "https" or not parts.hostname:
                raise ValueError
            self._host, self._port = parts.hostname, parts.port or 443
        except ValueError:
            raise StartError(f"--url {url!r} is not an https URL: https://HOST:PORT") from None
        self._place = f"{self._host} port {self._port}"
        self._key_id, self._secret, self._scheme = key_id, secret, scheme
        self._fingerprint = fingerprint.replace(":", "").lower()

    def _connect(self) -> http.client.HTTPConnection:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # the fingerprint proves more than a name
        connection = http.client.HTTPSConnection(
            self._host, self._port, timeout=CLIENT_TIMEOUT, context=context
        )
        with naming(f"cannot connect to {self._place}"):
            connection.connect()
        certificate = cast(ssl.SSLSocket, connection.sock).getpeercert(True) or b""
        if hashlib.sha256(certificate).hexdigest() != self._fingerprint:
            connection.close()
            raise StartError(
                f"the certificate of {self._place} has another fingerprint: compare --fingerprint "
                "with the one in the gateway's log, which is written at each start"
            )
        return connection

    def _headers(self, method: str, path: str, body: bytes) -> dict[str, str]:
        now = int(time.time())
        headers = super()._headers(method, path, body)
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


NO_GATEWAY = "and the answer is not a gateway's: check what listens there"


def content_of(client: ApiClient, method: str, path: str, body: bytes = b"") -> bytes:
    """What answers a request. Raises StartError with the gateway's refusal."""
    status, content = client.call(method, path, body)
    if status != HTTPStatus.OK:
        try:
            detail = json.loads(content)["detail"]
        except (ValueError, KeyError, TypeError):
            raise StartError(f"status {status}, {NO_GATEWAY}") from None
        raise StartError(f"the gateway refused this with status {status}: {detail}")
    return content


def answer_of(client: ApiClient, method: str, path: str, body: bytes = b"") -> dict[str, Any]:
    """The JSON that answers a request. Raises StartError with the gateway's refusal."""
    content = content_of(client, method, path, body)  # its ValueErrors are not the answer's
    try:
        return cast(dict[str, Any], json.loads(content))
    except ValueError:
        raise StartError(f"status 200, {NO_GATEWAY}") from None


def content_type(method: str, path: str, body: bytes) -> str:
    """The type of a body. Only a desired state may be JSON lines: then it begins with an object."""
    desired_state = method == "PUT" and path.partition("?")[0].rstrip("/") == CONFIGURATIONS_PATH
    return "application/" + ("x-ndjson" if desired_state and body.lstrip()[:1] == b"{" else "json")


def config_of(arguments: argparse.Namespace, key_needed: bool = False) -> Config:
    """The settings of this host's gateway. Raises ConfigError."""
    return load_config(os.environ, arguments.env_file, key_needed)


def installed_settings() -> str | None:
    """The installed gateway's settings file, unless environment or directory have settings.

    If the file exists but cannot be read, load_config says why.
    """
    own = {setting.name for setting in SETTINGS if not setting.name.startswith("AWS_")}
    if own & os.environ.keys() or os.path.exists(".env"):
        return None
    try:
        os.stat(INSTALLED_SETTINGS)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        pass
    return INSTALLED_SETTINGS


def client_of(arguments: argparse.Namespace) -> ApiClient:
    """A client of this host's gateway, or of the one at --url. Raises StartError."""
    if not arguments.url:
        for name in ("key_file", "fingerprint", "key_id", "scheme"):
            if getattr(arguments, name):
                raise ConfigError(f"--{name.replace('_', '-')} needs --url: add it, or omit both")
        return ApiClient(config_of(arguments).db_path)
    if not arguments.key_file or not arguments.fingerprint:
        raise ConfigError("--url needs --key-file and --fingerprint")
    with naming("cannot read the file of --key-file"):
        check_private("--key-file", arguments.key_file)
        secret = Path(arguments.key_file).read_text("utf-8").strip()
    key_id, scheme = arguments.key_id or "default", arguments.scheme or "legacy"
    return RemoteClient(arguments.url, key_id, secret, arguments.fingerprint, scheme)


def read_data(given: str | None) -> bytes:
    """The value of an option: a text, @FILE, or @- for standard input. Raises StartError."""
    if given is None:
        return b""
    if not given.startswith("@"):
        return given.encode("utf-8")
    with naming(f"cannot read {given[1:]}"):
        return sys.stdin.buffer.read() if given == "@-" else Path(given[1:]).read_bytes()


def command_serve(arguments: argparse.Namespace) -> None:
    Service(lambda: load_config(os.environ, arguments.env_file)).run()


def command_call(arguments: argparse.Namespace) -> int:
    client = client_of(arguments)
    data = read_data(arguments.data)
    with progress(f"{arguments.method} {arguments.path}"):
        status, body = client.call(arguments.method, arguments.path, data)
    sys.stdout.buffer.write(body + (b"" if body.endswith(b"\n") else b"\n"))
    if status >= 400:
        complain(f"wggw: status {status}")
    return int(status >= 400)


@contextlib.contextmanager
def progress(text: str) -> Iterator[None]:
    """Show on a terminal what runs and for how long, once it takes more than a second."""
    ended = threading.Event()

    def show() -> None:
        started, shown = time.monotonic(), ""
        while not ended.wait(1.0):
            shown = f"{text}: {time.monotonic() - started:.0f} s"
            print(f"\r{shown}", end="", file=sys.stderr, flush=True)
        if shown:
            print(f"\r{' ' * len(shown)}\r", end="", file=sys.stderr, flush=True)

    thread = threading.Thread(target=show, daemon=True)
    if sys.stderr.isatty():
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if thread.is_alive():
            thread.join()


class Screen(NamedTuple):
    """What the output can show. Without a terminal width is 0, and lines are never cut."""

    width: int
    height: int
    colour: bool

    @classmethod
    def of_output(cls) -> Screen:
        if not sys.stdout.isatty():
            return cls(0, 0, False)
        size = shutil.get_terminal_size()
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        return cls(size.columns, size.lines, not plain)

    def paint(self, line: str, colour: str = "") -> str:
        """A whole line, cut at the screen's width first: escape sequences have no width."""
        line = shorten(line.rstrip(), self.width) if self.width else line.rstrip()
        return f"\x1b[{COLOURS[colour]}m{line}\x1b[0m" if self.colour and colour else line

    def wrap(self, line: str, indent: int, colour: str = "") -> list[str]:
        """A text on as many lines as it needs; all except the first one are indented."""
        lines = [line]
        if self.width:
            lines = textwrap.wrap(line, self.width, subsequent_indent=" " * indent)
        return [self._replace(width=0).paint(each, colour) for each in lines]


def cells_of(text: str) -> int:
    """How many columns of a terminal a text takes: many characters of Asia take two."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(each) in "WF" for each in text)
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))


def shorten(text: str, width: int) -> str:
    """A text of at most `width` columns; the last one shows that something was cut."""
    if cells_of(text) <= width:
        return text
    text = text[: width - 1]
    while cells_of(text) >= max(width, 1):
        text = text[:-1]
    return text + "…"


COLOURS = {"good": "32", "bad": "1;31", "head": "1", "quiet": "2"}
UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
YEAR = 365 * 86400


def show_bytes(count: float) -> str:
    """Bytes in a unit that leaves three significant digits, such as "1.23 MB"."""
    for unit in UNITS:
        if count < 999.5 or unit == UNITS[-1]:
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"


def show_age(seconds: float) -> str:
    """A span of time in its two largest units, such as "1 d 2 h", from two years on in years."""
    left = max(int(seconds), 0)
    if left >= 2 * YEAR:
        return f"{left // YEAR} years"
    parts: list[str] = []
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if left >= size or (unit == "s" and not parts):
            parts.append(f"{left // size} {unit}")
            left %= size
    return " ".join(parts[:2])


Column = tuple[str, str, Callable[[Any], str]]  # its head, "<" or ">" (right-aligned), its cells


def show_table(columns: Sequence[Column], rows: Sequence[Any], screen: Screen) -> list[str]:
    """The lines of a table.

    If the screen is too narrow, columns are dropped from the right: the most important is first.
    """
    shown = [[head, *map(cell, rows)] for head, _, cell in columns]
    widths = [max(map(cells_of, cells)) for cells in shown]
    while screen.width and len(widths) > 1 and sum(widths) + 2 * len(widths) - 2 > screen.width:
        widths.pop()
    sides = [side for _, side, _ in columns]
    lines = [
        "  ".join(
            f"{cell:{side}{width - cells_of(cell) + len(cell)}}"
            for cell, width, side in zip(cells, widths, sides, strict=False)
        )
        for cells in zip(*shown, strict=True)
    ]
    return [screen.paint(lines[0], "head"), *map(screen.paint, lines[1:])]


def print_answer(
    arguments: argparse.Namespace, answer: Any, lines: Callable[[Any, Screen], Sequence[str]]
) -> None:
    """Print what the API said: for people, or with --json as it is."""
    if arguments.json:
        print(json.dumps(answer, indent=2))
    else:
        print(*lines(answer, Screen.of_output()), sep="\n")


def rate_of(status: Json, interfaces: Sequence[Json], way: str) -> float | None:
    """Bytes per second of interfaces ("rx" or "tx"); None before the first sample of one."""
    if any(i["sample_age_seconds"] > status["uptime_seconds"] for i in interfaces):
        return None
    return cast(float, sum(i[f"{way}_bytes_per_second"] for i in interfaces))


def show_rate(rate: float | None) -> str:
    return "–" if rate is None else f"{show_bytes(rate)}/s"


def show_bar(share: float, width: int = 20) -> str:
    return "[" + "#" * round(share * width) + "." * (width - round(share * width)) + "]"


# fmt: off
INTERFACE_COLUMNS: tuple[Column, ...] = (  # of pairs: the status, and an interface in it
    ("INTERFACE", "<", lambda row: row[1]["name"]),
    ("BACKEND", "<", lambda row: row[1]["backend"]),
    ("PORT", ">", lambda row: str(row[1]["listen_port"])),
    ("ACTIVE/ALL", ">", lambda row: f"{row[1]['active_peers']}/{row[1]['total_peers']}"),
    ("IN/s", ">", lambda row: show_rate(rate_of(row[0], row[1:], "rx")).removesuffix("/s")),
    ("OUT/s", ">", lambda row: show_rate(rate_of(row[0], row[1:], "tx")).removesuffix("/s")),
    ("RECEIVED", ">", lambda row: show_bytes(row[1]["rx_bytes"])),
    ("SENT", ">", lambda row: show_bytes(row[1]["tx_bytes"])),
)
POOL_COLUMNS: tuple[Column, ...] = (  # of an interface's name, a family, and its addresses
    ("POOL", "<", lambda row: row[0]),
    ("FAMILY", "<", lambda row: row[1]),
    ("USED", ">", lambda row: str(row[2]["used"])),
    ("OF", ">", lambda row: "unlimited" if row[2]["total"] > 10**12 else str(row[2]["total"])),
    ("", ">", lambda row: f"{100 * row[2]['used'] / row[2]['total']:.0f} %"),
    ("", "<", lambda row: show_bar(row[2]["used"] / row[2]["total"])),
)
CLASS_COLUMNS: tuple[Column, ...] = (
    ("CLASS", "<", lambda row: row["name"]),
    ("PEERS", ">", lambda row: str(row["peers"])),
    ("ADDRESSES", ">", lambda row: f"{row['addresses']} of {row['expected_addresses']}"),
    ("OVER ITS RATE", ">",
     lambda row: show_bytes(row["dropped_bytes"]["down"] + row["dropped_bytes"]["up"])),
    ("FORBIDDEN", ">", lambda row: show_bytes(row["dropped_bytes"]["refused"])),
)
# fmt: on


def status_lines(status: Json, screen: Screen) -> list[str]:
    """The state of a gateway, on one screen."""
    now = parse_rfc3339(status["timestamp"])
    interfaces, snapshot, journal = status["interfaces"], status["snapshot"], status["journal"]
    received, sent = (show_rate(rate_of(status, interfaces, way)) for way in ("rx", "tx"))
    left = parse_rfc3339(status["certificate_expires_at"]) - now
    colour, reasons = "good", status["reasons"]
    if status["status"] != "healthy":
        advice = "what to do: run `wggw doctor` as root on the gateway's host"
        colour, reasons = "bad", [*reasons, advice]
    title = (
        f"{status['status']}: wggw {status['version']}, Python {status['python_version']}, "
        f"up {show_age(status['uptime_seconds'])}"
    )
    facts = [
        f"peers        {status['wireguard_peers']} online, {status['total_peers']} in all",
        f"traffic      {received} in, {sent} out",
        f"snapshot     {show_time_since(snapshot['at'], now, 'none yet')}, "
        + show_bytes(snapshot["bytes"]),
        f"journal      {show_bytes(journal['bytes'])}, record {journal['records']}",
        f"remote copy  {show_copy(status.get('remote_copy'))}",
        f"certificate  expires {status['certificate_expires_at'][:10]}, "
        + (f"in {show_age(left)}" if left > 0 else "it has EXPIRED"),
        f"host         memory {status['memory_usage']} %, load {status['load_average']}",
    ]
    pools = [(i["name"], *item) for i in interfaces for item in i["pools"].items()]
    classes = status.get("service_classes")
    return [
        *screen.wrap(title, 2, colour),
        *(line for reason in reasons for line in screen.wrap(f"  {reason}", 4, "bad")),
        "",
        *(line for fact in facts for line in screen.wrap(fact, 13)),
        "",
        *show_table(INTERFACE_COLUMNS, [(status, i) for i in interfaces], screen),
        "",
        *show_table(POOL_COLUMNS, pools, screen),
        *(["", *show_table(CLASS_COLUMNS, classes, screen)] if classes else ()),
    ]


def show_time_since(moment: str | None, now: float, never: str) -> str:
    return f"{show_age(now - parse_rfc3339(moment))} ago" if moment else never


def show_copy(copy: Any) -> str:
    """The remote copy's state in the gateway's status, which is null without one."""
    if not isinstance(copy, dict):
        return "none: SNAPSHOT_URL is not set"
    behind = "up to date"
    if copy["lag_records"]:
        behind = f"{copy['lag_records']} changes and {show_age(copy['lag_seconds'])} behind"
    failure = f": {copy['failure']}" if copy["failure"] else ""
    return f"epoch {copy['epoch']}, {behind}{failure}"


def command_status(arguments: argparse.Namespace) -> int:
    status = answer_of(client_of(arguments), "GET", STATUS_PATH)
    print_answer(arguments, status, status_lines)
    return int(status["status"] != "healthy")


def list_peers(client: ApiClient, query: str, enough: int = sys.maxsize) -> list[dict[str, Any]]:
    """Read the peers that a query selects, page by page, until there are `enough`."""
    peers: list[dict[str, Any]] = []
    path = f"{CONFIGURATIONS_PATH}?limit={MAX_PAGE}{query}"
    cursor: str | None = ""
    with progress("reading peers"):
        while cursor is not None and len(peers) < enough:
            page = answer_of(client, "GET", path + (f"&cursor={cursor}" if cursor else ""))
            peers += page["configurations"]
            cursor = page["next_cursor"]
    return peers


PEER_ORDERS: dict[str, tuple[Callable[[Json], Any], bool]] = {
    "created": (lambda peer: peer["created_at"], False),
    "key": (lambda peer: peer["public_key"], False),
    "rx": (lambda peer: peer["rx_bytes"], True),
    "tx": (lambda peer: peer["tx_bytes"], True),
    "traffic": (lambda peer: peer["rx_bytes"] + peer["tx_bytes"], True),
    "handshake": (lambda peer: peer["last_handshake"] or "", True),
}


def show_quota(peer: Json) -> str:
    """How much of its quota a peer has used, such as "12% of 5 GB/day"."""
    quota, period = peer["quota_bytes"], peer["quota_period"]
    if quota is None:
        return ""
    share = 100 * peer["quota_used"] // quota if quota else 100
    return f"{share}% of {show_bytes(quota)}{f'/{period}' if period else ''}"


# fmt: off
PEER_COLUMNS: tuple[Column, ...] = (
    ("KEY", "<", lambda peer: peer["public_key"]),
    ("LABEL", "<", lambda peer: show_label(peer["label"])),
    ("STATE", "<",
     lambda peer: "online" if peer["online"] else peer["status_reason"] or peer["status"]),
    ("QUOTA", ">", show_quota),
    ("IPV4", ">", lambda peer: peer["assigned_ip"] or ""),
    ("IPV6", ">", lambda peer: peer["assigned_ipv6"] or ""),
    ("HANDSHAKE", ">", lambda peer: show_time_since(peer["last_handshake"], time.time(), "never")),
    ("RECEIVED", ">", lambda peer: show_bytes(peer["rx_bytes"])),
    ("SENT", ">", lambda peer: show_bytes(peer["tx_bytes"])),
    ("EXPIRES", "<", lambda peer: (peer["expires_at"] or "")[:16].replace("T", " ")),
    ("INTERFACE", "<", lambda peer: peer["interface"]),
)
# fmt: on
SHORT_CELLS: dict[str, Callable[[Any], str]] = {  # where the long ones would lose a column
    "KEY": lambda peer: short_key(peer["public_key"]) + "…",
    "LABEL": lambda peer: shorten(show_label(peer["label"]), 16),
    "EXPIRES": lambda peer: (peer["expires_at"] or "")[:10],
}


def peer_lines(peers: Sequence[Json], screen: Screen) -> list[str]:
    columns = PEER_COLUMNS
    whole = show_table(columns, peers, Screen(0, 0, False))
    if screen.width and max(map(cells_of, whole)) > screen.width:
        columns = tuple((head, side, SHORT_CELLS.get(head, cell)) for head, side, cell in columns)
    return show_table(columns, peers, screen)


SEARCHED = ("public_key", "label", "request_id", "assigned_ip", "assigned_ipv6")


def command_peers(arguments: argparse.Namespace) -> None:
    client = client_of(arguments)
    key, descending = PEER_ORDERS[arguments.sort]
    # Only in the order of the API can the list end before all are read.
    in_order = arguments.sort == "created" and not arguments.search
    enough = arguments.limit if in_order else sys.maxsize
    peers = list_peers(client, "&online=true" if arguments.online else "", enough)
    text = arguments.search.casefold()
    peers = [p for p in peers if any(text in (p[name] or "").casefold() for name in SEARCHED)]
    peers.sort(key=key, reverse=descending)
    del peers[arguments.limit :]
    print_answer(arguments, peers, peer_lines)


def find_peer(client: ApiClient, name: str) -> dict[str, Any]:
    """The peer with this public key or, if the name is not a key, this label. Raises StartError."""
    key = key_from_path(name)
    if key is not None:
        return answer_of(client, "GET", peer_path(key))
    query = urllib.parse.urlencode({"label": name, "limit": 2})
    found = answer_of(client, "GET", f"{CONFIGURATIONS_PATH}?{query}")["configurations"]
    if not found:
        raise StartError(f"no peer has this label or public key: {name!r}; `wggw peers` lists all")
    if len(found) > 1:
        raise StartError(f"several peers have the label {name!r}: give the public key instead")
    return cast(dict[str, Any], found[0])


def peer_path(public_key: str) -> str:
    return PEER_PATH.replace("{public_key}", public_key.replace("/", "_").replace("+", "-"))


def command_peer_add(arguments: argparse.Namespace) -> None:
    client = client_of(arguments)
    fields = dict(map(parse_member, arguments.set))
    label = urllib.parse.urlencode({"label": arguments.name})
    if answer_of(client, "GET", f"{CONFIGURATIONS_PATH}?{label}")["configurations"]:
        raise StartError(f"a peer with the label {arguments.name!r} exists already: choose another")
    if not {"protocol", "tunnel_traffic"} & fields.keys():
        interfaces = answer_of(client, "GET", STATUS_PATH)["interfaces"]
        obfuscated = bool(fields.get("obfuscation"))
        likely = [i for i in interfaces if (i["parameters_version"] is not None) == obfuscated]
        fields["tunnel_traffic"] = list((likely or interfaces)[0]["pools"])
    fields["label"] = arguments.name
    print_new_file(client, fields)


def command_peer_rotate(arguments: argparse.Namespace) -> None:
    client = client_of(arguments)
    print_new_file(client, former_key=find_peer(client, arguments.name)["public_key"])


def parse_member(text: str) -> tuple[str, Any]:
    """NAME=VALUE, a field of the API's create; VALUE is JSON, or else a text. Raises StartError."""
    name, equals, value = text.partition("=")
    if not equals or name not in CREATE_FIELDS.keys() - {"public_key", "label"}:
        raise StartError(
            f"--set {text[:64]}: must be NAME=VALUE, where NAME is a field of create in API.md, "
            "except label and public_key"
        )
    try:
        return name, load_json(value)
    except ValueError:
        return name, value


def print_new_file(client: ApiClient, fields: Json | None = None, former_key: str = "") -> None:
    """Make a key, create its peer with the fields, or give it to the peer that has the former key,
    and write the client's file to standard output. Raises StartError."""
    private = make_private_key()
    public = encode_key(x25519_public(private))
    if fields is None:
        path, body = f"{peer_path(former_key)}/rotate", {"new_public_key": public}
    else:
        path, body = CONFIGURATIONS_PATH, {**fields, "public_key": public}
    answer_of(client, "POST", path, encode_json(body))
    try:
        content = content_of(client, "GET", peer_path(public) + "?format=wg-quick")
        text = content.decode("utf-8")
        if KEY_PLACEHOLDER not in text:
            raise StartError("the gateway did not send the client's file")
        if "\nEndpoint = GATEWAY:" in text:
            complain(
                "wggw: write the gateway's address in the place of GATEWAY in the client's file; "
                "with WG_ENDPOINT set, the gateway does this"
            )
        data = text.replace(KEY_PLACEHOLDER, encode_key(private)).encode("utf-8")
        with naming("cannot write the client's file"):
            while data:  # print() would keep what a full disk refuses, and retry at the exit
                data = data[os.write(sys.stdout.fileno(), data) :]
    except StartError as error:
        lost = f"{error}. Without it nobody has the key"
        if fields is None:
            raise StartError(f"{lost}: run `wggw peer rotate {public}`") from None
        try:
            answer_of(client, "DELETE", peer_path(public))
        except StartError:
            raise StartError(f"{lost}: run `wggw peer delete {public}`") from None
        raise StartError(f"{lost}, so the peer is deleted") from None


def command_peer_show(arguments: argparse.Namespace) -> None:
    print_answer(arguments, find_peer(client_of(arguments), arguments.name), field_lines)


def field_lines(peer: Json, screen: Screen) -> list[str]:
    """All fields of a peer that have a value."""
    lines: list[str] = []
    for name, value in peer.items():
        if value not in (None, [], False):
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            lines += screen.wrap(f"{name:21}{show_label(text)}", 21)
    return lines


# Of each action: the request's method, path and body, and the peer's state when it is done.
PEER_ACTIONS: Mapping[str, tuple[str, str, bytes, str]] = {
    "suspend": ("PUT", "/status", b'{"status":"suspended"}', "suspended"),
    "activate": ("PUT", "/status", b'{"status":"active"}', "active"),
    "reset-quota": ("POST", "/reset-quota", b"", "its used quota is 0"),
    "delete": ("DELETE", "", b"", "deleted"),
}


def command_peer_change(arguments: argparse.Namespace) -> None:
    client = client_of(arguments)
    peer = find_peer(client, arguments.name)
    method, end, body, result = PEER_ACTIONS[arguments.action]
    answer_of(client, method, peer_path(peer["public_key"]) + end, body)
    print(f"{show_label(peer['label']) or peer['public_key']}: {result}")


SPARKS = "▁▂▃▄▅▆▇█"
PLAIN_SPARKS = "_.-:=+*#"


def sparkline(values: Sequence[float], width: int, marks: str = SPARKS) -> str:
    """The last `width` values as a line of bars; the highest value has the highest bar."""
    shown = list(values)[-width:]
    top = max([*shown, 1.0])
    return "".join(marks[min(int(v / top * len(marks)), len(marks) - 1)] for v in shown)


class Top:
    """What `wggw top` remembers between two samples, and its screen."""

    def __init__(self) -> None:
        self.rates: dict[str, collections.deque[float]] = {
            way: collections.deque(maxlen=512) for way in ("rx", "tx")
        }
        self._seen: dict[str, tuple[int, int]] = {}
        self._peer_rates: dict[str, tuple[float, float]] = {}
        self._sampled = -math.inf  # monotonic seconds of the last sample that was seen

    def look(self, status: Json, peers: Sequence[Json], now: float) -> None:
        """Compute rates from an answer, if the gateway took a sample since the last one."""
        interfaces = status["interfaces"]
        sampled = now - min(i["sample_age_seconds"] for i in interfaces)
        elapsed = sampled - self._sampled
        if elapsed < 0.5:
            return
        self._sampled = sampled
        for way, history in self.rates.items():
            rate = rate_of(status, interfaces, way)
            if rate is not None:
                history.append(rate)
        seen = {peer["public_key"]: (peer["rx_bytes"], peer["tx_bytes"]) for peer in peers}
        self._peer_rates = {
            key: ((rx - before[0]) / elapsed, (tx - before[1]) / elapsed)
            for key, (rx, tx) in seen.items()
            if (before := self._seen.get(key))
        }
        self._seen = seen

    def lines(
        self, status: Json, peers: Sequence[Json], screen: Screen, trouble: str = ""
    ) -> list[str]:
        """The screen; `trouble` says why its figures are old."""
        marks = SPARKS if "utf" in (sys.stdout.encoding or "").lower() else PLAIN_SPARKS
        head = (
            f"{status['status']}: {status['wireguard_peers']} online of {status['total_peers']}, "
            f"load {status['load_average']}, memory {status['memory_usage']} %   {DISMISSAL}"
        )
        lines = [screen.paint(head, "good" if status["status"] == "healthy" else "bad")]
        for way, word in (("rx", "in"), ("tx", "out")):
            history = self.rates[way]
            now = show_rate(history[-1] if history else None)
            bars = sparkline(history, max(screen.width - 16, 1), marks)
            lines.append(screen.paint(f"{word:>3} {now:>10} {bars}"))
        rows = [(peer, *self._peer_rates.get(peer["public_key"], (None, None))) for peer in peers]
        rows.sort(key=lambda row: -sum(rate or 0 for rate in row[1:]))
        table = show_table(top_columns(screen), rows[: max(screen.height - 6, 0)], screen)
        lines += [screen.paint(trouble, "bad"), *table]
        if len(peers) == MAX_PAGE:
            lines.append(screen.paint(f"only the first {MAX_PAGE} online peers", "quiet"))
        return lines[: screen.height]


def top_columns(screen: Screen) -> tuple[Column, ...]:
    """Of a peer, its rate in, and its rate out."""
    return (
        ("KEY", "<", lambda row: row[0]["public_key"][:12] + "…"),
        ("IN", ">", lambda row: show_rate(row[1])),
        ("OUT", ">", lambda row: show_rate(row[2])),
        ("RECEIVED", ">", lambda row: show_bytes(row[0]["rx_bytes"])),
        ("ADDRESS", "<", lambda row: row[0]["assigned_ip"] or row[0]["assigned_ipv6"] or ""),
        ("SENT", ">", lambda row: show_bytes(row[0]["tx_bytes"])),
        ("LABEL", "<", lambda row: shorten(show_label(row[0]["label"]), screen.width // 5)),
        ("IPV6 ADDRESS", "<", lambda row: row[0]["assigned_ipv6"] or ""),
    )


DISMISSAL = "q quits"
TOP_SECONDS = 0.2  # until a new answer is on the screen
TOP_PATIENCE = 10.0  # seconds without an answer, then the screen says so


@contextlib.contextmanager
def whole_terminal() -> Iterator[None]:
    """Switch to the alternate screen and single key presses, and back whatever happens."""
    handle = sys.stdin.fileno()
    before = termios.tcgetattr(handle)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        tty.setcbreak(handle)
        sys.stdout.write("\x1b[?1049h\x1b[?25l")
        yield
    finally:
        termios.tcsetattr(handle, termios.TCSADRAIN, before)
        sys.stdout.write("\x1b[?25h\x1b[?1049l")
        sys.stdout.flush()


def command_top(arguments: argparse.Namespace) -> None:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError("`wggw top` needs a terminal; for programs use `wggw status --json`")
    client = client_of(arguments)
    looks: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()

    def watch() -> None:  # in a thread of its own: q works while a request hangs
        query = f"/api/v1/configurations?online=true&limit={MAX_PAGE}"
        while True:
            try:
                status = answer_of(client, "GET", STATUS_PATH)
                looks.put((status, answer_of(client, "GET", query)["configurations"]))
            except StartError as error:
                looks.put((None, str(error)))
            time.sleep(arguments.interval)

    top, shown, asked = Top(), None, time.monotonic()
    threading.Thread(target=watch, daemon=True).start()
    with whole_terminal(), contextlib.suppress(KeyboardInterrupt):
        while key_pressed(min(arguments.interval, TOP_SECONDS)) not in ("q", "Q"):
            now = time.monotonic()
            trouble = f"no answer for {now - asked:.0f} s" if now - asked > TOP_PATIENCE else ""
            while not looks.empty():
                status, peers = looks.get()
                trouble, asked = "" if status else peers, now
                if status:
                    top.look(status, peers, now)
                    shown = status, peers
            if not shown and trouble:
                draw([DISMISSAL, *Screen.of_output().wrap(trouble, 2)])
            elif shown and (asked == now or trouble):
                draw(top.lines(*shown, Screen.of_output(), trouble))


def draw(lines: Sequence[str]) -> None:
    """Fill the terminal with these lines."""
    sys.stdout.write("\x1b[H" + "".join(line + "\x1b[K\r\n" for line in lines[:-1]))
    sys.stdout.write(lines[-1] + "\x1b[K\x1b[J")
    sys.stdout.flush()


def key_pressed(seconds: float) -> str:
    """The key that is pressed within this time, or ""."""
    ready = select.select([sys.stdin], [], [], seconds)[0]
    return os.read(sys.stdin.fileno(), 1).decode("ascii", "replace") if ready else ""


def command_snapshot(arguments: argparse.Namespace) -> None:
    client = client_of(arguments)
    path, file = "/api/v1/snapshot", arguments.file
    if arguments.action == "export":
        # stat() follows a link only where the kernel lets this user (protected_symlinks).
        with naming(f"cannot write {file}"), contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(os.stat(file).st_mode):
                text = "it is not a file, and export would replace it"
                raise StartError(f"cannot write {file}: {text}")
        with progress("snapshot export"):
            content = content_of(client, "GET", path)
        if arguments.decrypt:
            content = decode_snapshot(content, open_files(config_of(arguments)).vault, "the export")
        with naming(f"cannot write {file}"):
            Disk().replace(os.path.realpath(file), [content])  # a link such as /dev/stdout stays
        print(f"exported {len(content)} bytes to {file}")
        return
    data = read_data("@" + file)
    given = {"dry_run": arguments.dry_run or None, "replace_key": arguments.replace_key}
    query = "&".join(f"{n}={json.dumps(value)}" for n, value in given.items() if value is not None)
    with progress("snapshot import"):
        answer = answer_of(client, "PUT", f"{path}{'?' * bool(query)}{query}", data)
    done = "would import" if arguments.dry_run else "imported"
    print(f"{done}: {show_peers(answer['total_peers'])}")
    if count := answer["cut_off_peers"]:
        print(
            f"cut off: {show_peers(count)}, until the clients get new files, because the state "
            "lacks them, or has other keys, addresses or parameters than their files"
        )


def command_import(arguments: argparse.Namespace) -> int:
    if arguments.merge and arguments.replace:
        raise ConfigError("--merge keeps the gateway's peers and --replace deletes them: give one")
    client = client_of(arguments)
    name = "standard input" if arguments.file == "-" else arguments.file
    try:
        state = read_foreign(read_data("@" + arguments.file))
    except (ValueError, RecursionError) as error:
        raise StartError(f"cannot import {name}: {error}") from None
    existing = {peer["public_key"] for peer in list_peers(client, "&fields=public_key")}
    interfaces = answer_of(client, "GET", STATUS_PATH)["interfaces"]
    # Earlier versions do not tell their subnets, and then refuse such peers one by one.
    texts = [text for interface in interfaces for text in interface.get("subnets", {}).values()]
    subnets = [ipaddress.ip_network(text) for text in texts]

    def misfit(fields: Json) -> str:
        is_new = str(fields.get("public_key")) not in existing
        return outside(fields, subnets) if is_new and subnets else ""

    fitting = fitting_peers(name, state, misfit, arguments.skip)
    if existing and not (arguments.merge or arguments.replace):
        raise StartError(
            f"the gateway has {show_peers(len(existing))}: --merge keeps them and adds the file's, "
            "--replace keeps only those that the file names"
            + ("" if arguments.dry_run else "; --dry-run shows what happens")
        )
    if not arguments.replace and arguments.dry_run:
        return would_add(client, fitting, existing)
    if not arguments.replace:
        return add_peers(client, fitting)
    named = {str(peer.fields.get("public_key")) for peer in state.peers}
    if lost := len(existing & named - {fields.get("public_key") for fields in fitting}):
        print(f"{show_peers(lost)} of the gateway, left out here, will be deleted")
    answer = put_state(client, fitting, arguments.dry_run)
    counts = ", ".join(f"{answer[name]} {name}" for name in DesiredResult._fields)
    print(f"would be: {counts}" if arguments.dry_run else f"done: {counts}")
    return 0


def fitting_peers(
    name: str, state: FoundState, misfit: Callable[[Json], str], skip: bool
) -> list[dict[str, Any]]:
    """The fields of the peers that the gateway can serve: misfit() returns no reason. Prints the
    others with their reasons, and raises StartError for them, unless `skip`."""
    for note in state.notes:
        complain(f"{name}: {note}")
    fitting: list[dict[str, Any]] = []
    for peer in state.peers:
        if reason := peer.reason or misfit(peer.fields):
            complain(f"{name}: {peer.place} ({key_of(peer.fields)}): {reason}")
        else:
            fitting.append(peer.fields)
    unfit = len(state.peers) - len(fitting)
    if unfit and not skip:
        raise StartError(
            f"{unfit} of {show_peers(len(state.peers))} did not fit, and nothing was changed: "
            "correct them, or leave them out with --skip"
        )
    print(f"{name}: {state.kind}, {show_peers(len(fitting))} to import, {unfit} left out")
    return fitting


def key_of(fields: Json) -> str:
    """A peer's name in messages."""
    key = fields.get("public_key")
    return short_key(key) if key and isinstance(key, str) else "without a key"


def command_adopt(arguments: argparse.Namespace) -> None:
    path = arguments.env_file or ".env"
    live = read_live(arguments.interface)
    if is_marked(live.found.alias):
        raise StartError(
            f"{live.name} is a gateway's already, with the mark {live.found.alias!r}: there is "
            "nothing to take over"
        )
    adoption = Adoption(live, path, os.environ)
    fitting = fitting_peers(live.name, peers_of_live(live), adoption.misfit, arguments.skip)
    if left := len(live.peers) - len(fitting):
        print(
            f"left out: {show_peers(left)}. When the gateway starts, it removes them from "
            f"{live.name}, and they lose their connection"
        )
    secret = {setting.name for setting in SETTINGS if setting.secret}
    for name, value in adoption.settings.items():
        print(f"{path} gets {name}={'(not shown)' if name in secret else value}")
    for manager in other_managers(live):
        print(manager)
    if arguments.dry_run:
        print(f"would take over {live.name} with {show_peers(len(fitting))}")
        return
    if not arguments.yes:
        print(f"Take over {live.name} with {show_peers(len(fitting))}? [y/N] ", end="", flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise StartError("nothing was changed: answer y, or give --yes")
    with progress(f"adopt {live.name}"):
        result = adoption.perform(fitting)
    print(f"done: {result.created} created, {result.updated} updated, {result.unchanged} unchanged")


def put_state(client: ApiClient, peers: Iterable[Json], dry_run: bool) -> dict[str, Any]:
    """Make these the gateway's only peers, all of them or nothing."""
    lines = b"".join(encode_json(fields) + b"\n" for fields in peers)
    query = "dry_run=true" if dry_run else "allow_mass_delete=true"
    with progress("import"):
        return answer_of(client, "PUT", f"{CONFIGURATIONS_PATH}/?{query}", lines or b"[]")


def would_add(client: ApiClient, fitting: Sequence[Json], existing: Collection[str]) -> int:
    """Print what add_peers() would do; exit code 1 when the gateway would refuse a peer."""
    new: dict[str, dict[str, Any]] = {}
    known = refused = 0
    for peer in fitting:
        given = {name: value for name, value in peer.items() if name in SYNC_FIELDS}
        try:
            fields = parse_fields(given, SYNC_FIELDS)
            key = fields["public_key"]
            if key in existing or key in new:
                known += 1
            elif (fields.get("expires_at") or math.inf) <= time.time():
                raise Invalid("expires_at", "is in the past")
            else:
                new[key] = given
        except GatewayError as error:
            refused += 1
            complain(f"{key_of(peer)} would be refused: {error.detail}")
    kept = [{"public_key": key} for key in existing]
    while new:  # which may not fit the gateway's settings or its other peers
        try:
            put_state(client, [*new.values(), *kept], dry_run=True)
            break
        except StartError as error:
            place = re.search(r"line ([0-9]+): (.*)", str(error))
            if place is None or int(place[1]) > len(new):  # e.g. an existing peer is gone by now
                raise
            refused += 1
            key = [*new][int(place[1]) - 1]
            complain(f"{key_of(new.pop(key))} would be refused: {place[2]}")
    words = f"; would be refused: {refused}" if refused else ""
    print(f"would create {show_peers(len(new))}; already there, not changed: {known}{words}")
    return int(refused > 0)


def add_peers(client: ApiClient, fitting: Sequence[Json]) -> int:
    """Create the peers that do not exist; exit code 1 when the gateway refused one."""
    counts = dict.fromkeys(("created", "existed", "refused"), 0)
    for start in range(0, len(fitting), MAX_BATCH // 2):
        # Half a batch: the limit of its body is then 2 KiB for each peer.
        chunk = fitting[start : start + MAX_BATCH // 2]
        with progress(f"import: {start} of {show_peers(len(fitting))}"):
            creates = [{name: v for name, v in peer.items() if name != "status"} for peer in chunk]
            results = run_on_peers(client, "create", creates)
            suspended = [
                {"public_key": peer["public_key"]}
                for peer, result in zip(chunk, results, strict=True)
                if result["status"] == "created" and peer.get("status") == "suspended"
            ]
            results += run_on_peers(client, "suspend", suspended)
        for peer, result in zip([*chunk, *suspended], results, strict=True):
            status, differs = result["status"], [*result.get("differs", ())]
            if isinstance(status, int):
                counts["refused"] += 1
                complain(f"{key_of(peer)} is refused: {result['detail']}")
            elif status != "suspended":
                counts["created" if status == "created" else "existed"] += 1
            if status == "exists" and peer.get("status") not in (None, result["peer_status"]):
                differs.append("status")
            if names := ", ".join(differs):
                complain(f"{key_of(peer)} exists with another {names}, and stays as it is")
    print("done: " + ", ".join(f"{count} {word}" for word, count in counts.items()))
    return int(counts["refused"] > 0)


def run_on_peers(client: ApiClient, name: str, peers: Sequence[Json]) -> list[Any]:
    """The results of one operation on each of the peers, in their order."""
    if not peers:
        return []
    body = encode_json({"operations": [{"op": name, **fields} for fields in peers]})
    answer = answer_of(client, "POST", f"{CONFIGURATIONS_PATH}/batch", body)
    return cast(list[Any], answer["results"])


def random_parameters(arguments: argparse.Namespace) -> dict[str, Any]:
    """New parameters of --generation and --preset. Raises StartError."""
    try:
        shown = show_state(generate_obfuscation(arguments.generation, arguments.preset))
    except ValueError as error:
        raise StartError(str(error)) from None
    del shown["parameters_version"]  # the gateway counts them
    return shown


def command_awg_generate(arguments: argparse.Namespace) -> None:
    print(json.dumps(random_parameters(arguments), indent=2))


def command_awg_show(arguments: argparse.Namespace) -> None:
    answer = answer_of(client_of(arguments), "GET", "/api/v1/obfuscation")
    print(json.dumps(answer, indent=2))


def command_awg_rotate(arguments: argparse.Namespace) -> None:
    client = client_of(arguments)
    if arguments.params:
        with naming("--params"):
            try:
                wanted = parse_awg_file(read_data(arguments.params).decode("utf-8"))
            except json.JSONDecodeError:
                raise ValueError("the value (not shown) is neither JSON nor @FILE") from None
    else:
        wanted = random_parameters(arguments)
    body = encode_json({"parameters": wanted, "confirm": arguments.yes})
    try:
        answer = answer_of(client, "POST", "/api/v1/obfuscation/rotate", body)
    except StartError as error:
        hint = " (for this command: --yes)" if '"confirm"' in str(error) else ""
        raise StartError(f"{error}{hint}") from None
    print(
        f"{answer['interface']}: parameters version {answer['parameters_version']}, generation "
        f"{answer['generation']}; peers that need new configurations: {answer['cut_off_peers']}"
    )
    for warning in answer["warnings"]:
        complain(f"warning: {warning}")


def command_net(arguments: argparse.Namespace) -> int:
    if arguments.action == "show":
        return report(look_at(NETWORK, Host(config_of(arguments), Store())))
    lost: OSError | None = None
    for step in take_down(arguments) if arguments.action == "down" else bring_up(arguments):
        try:
            print(f"wggw: {step}", flush=True)
        except OSError as error:  # nothing is left half done because nobody reads
            lost = error
    if lost is not None:
        raise lost
    return 0


def bring_up(arguments: argparse.Namespace) -> Iterator[str]:
    """Make what the host needs around the interfaces. Raises BackendError."""
    config = config_of(arguments, key_needed=True)  # settings that only a gateway's host has
    host = Host(config, load_whole(config)[0])
    claim_interfaces(config, host.store)
    links = [make_link(row, b"") for row in settings_with_kept(config, host.store)]
    fit_certificate(config)  # here, because the service must not write to its directory
    yield from net_up(host, links)
    yield from (f"note: {found}" for found in _look_at_extra_ports(host))


def take_down(arguments: argparse.Namespace) -> Iterator[str]:
    """Remove what net_up() made. Raises BackendError.

    Settings may be wrong or gone: what carries the gateway's mark can be removed without them.
    """
    mark = interface_mark(arguments.env_file or ".env")
    names: set[str] = set()
    recognise: Recognise = recognise_none
    with contextlib.suppress(BackendError):  # without nft there are no names: the mark suffices
        names = names_of_table(current_table())
    try:
        config = config_of(arguments)
        tunnels = interface_settings(config)
        mark = tunnels[0].mark
        names.update(tunnel.name for tunnel in tunnels)
        recognise = recognise_by(tunnels, lambda: load_whole(config)[0])
    except ConfigError as error:
        complain(f"wggw: {error}; only interfaces with the mark {mark!r} are removed")
    return net_down(mark, names, recognise, arguments.keep_interfaces)


def command_doctor(arguments: argparse.Namespace) -> int:
    config = config_of(arguments)
    ask = functools.partial(ApiClient(config.db_path).call, "GET", STATUS_PATH)
    return report(look_at_all(config, ask))


def report(findings: Iterable[Finding]) -> int:
    """Print the findings, the worst first, and what to do; exit code 1 if something is wrong."""

    def rank(found: Finding) -> tuple[bool, ...]:  # what the status names, others may explain
        return not found.failed, not found.todo, found.subject == "status"

    failed = False
    for finding in sorted(findings, key=rank):
        failed |= finding.failed
        word = "WRONG" if finding.failed else "note" if finding.todo else "ok"
        print(f"{word:5}  {finding.subject}: {finding.found}", flush=True)
        if finding.todo:
            print(f"       -> {finding.todo}", flush=True)
    return int(failed)


def command_check(arguments: argparse.Namespace) -> None:
    config = config_of(arguments)
    if arguments.repair:
        repair(open_files(config))
        return
    with progress(f"checking {config.db_path}"):
        store, files = load_whole(config)
    if not files.has_snapshot:
        raise StartError(
            f"{config.db_path}: there is no database. The gateway's first start creates it; "
            "--env-file names another gateway's settings"
        )
    print(f"{config.db_path}: good, {show_peers(store.counts.total())}, record {store.number}")
    if files.torn:
        print(
            f"{config.db_path}.journal: {files.torn} bytes of a torn record at its end, which the "
            "gateway never acknowledged: the next start drops them"
        )


def command_copy(arguments: argparse.Namespace) -> None:
    config = config_of(arguments)
    remote = open_object_store(config, time.time)
    if remote is None:
        raise StartError("there is no remote copy: SNAPSHOT_URL is not set")
    files = open_files(config)
    epochs = Epochs(remote, files.vault, socket.gethostname(), time.time)
    try:
        top, newest = epochs.find()
        if arguments.action == "claim":
            claim_copy(config, files, epochs, top, newest)
            return
        if newest is None:
            raise CopyError("no gateway has written a copy there yet")
        if arguments.action == "verify":
            prefix, entries = epochs.read(newest.prefix, newest.lineage)
            if not entries:
                raise CopyError(f"epoch {top} has no state yet: try again in a minute")
            store = read_state(entries)
            peers = show_peers(store.counts.total())
            print(f"good: epoch {int(prefix[:8])}, record {store.number}, {peers}")
            print(f"read: {remote.requests} requests, {remote.bytes_received} bytes")
            return
        claims = [epochs.read_claim(n) for n in range(newest.epoch, max(0, newest.epoch - 10), -1)]
    except CopyError as error:
        raise StartError(f"{config.snapshot_url}: {error}") from None
    print(f"lineage {newest.lineage}")
    for claim in claims:
        print(f"epoch {claim.epoch}  {rfc3339(claim.time)}  {claim.node}  {claim.writer}")


def claim_copy(
    config: Config, files: Files, epochs: Epochs, top: int, newest: Claim | None
) -> None:
    """Write the files here as the newest epoch, with which the next boot of any gateway begins."""
    lock_database(config.db_path)
    store = files.load()
    if not files.has_snapshot or not store.lineage:
        raise StartError(
            f"{config.db_path}: there is no database of a gateway that has run, so the copy stays "
            "as it is"
        )
    there = newest.lineage if newest else ""
    if choose_lineage(store.lineage, there, config) != store.lineage:
        raise StartError(
            "SNAPSHOT_LINEAGE names the copy's lineage, and the files here have another: set it to "
            f"{store.lineage} to replace the copy"
        )
    files.keep_writers({**files.read_writers(), epochs.writer: MAX_INTEGER})
    claim = epochs.propose(top, newest, store.lineage)
    epochs.take(claim)
    epochs.read(claim.previous, claim.lineage, close=True)
    image = b"".join(snapshot_parts(files.image(store, store.number), None))
    epochs.append(Entry("snapshot", store.number, image))
    epochs.announce()
    print(f"epoch {claim.epoch} holds record {store.number}: the next boot begins with it")


def salvage(files: Files) -> Store:
    """Read everything readable, and print a line for each file and finding.

    Raises StartError if this user may not read a file: what is saved then would lack it.
    """
    store = Store()
    for path in (files.path, files.path + ".previous"):
        try:
            store = load_snapshot(path, files.vault)
        except DamagedError as error:
            print(f"not used: {error.fault}")
        else:
            print(f"used: {path}, record {store.number}")
            break
    for path in (files.journal.previous, files.journal.path):
        try:
            file = read_journal(path, files.vault, salvage=True)
        except DamagedError as error:
            print(f"not used: {error.fault}")
            continue
        if file is not None:
            before = store.number
            store.replay(file, path, functools.partial(print, f"{path}:"))
            print(f"used: {path}: up to record {store.number} (from {before})")
    return store


def repair(files: Files) -> None:
    """Write what is readable of damaged files to a new file, and say how to use it."""
    ends = ("", ".previous", ".journal", ".journal.previous")
    found = [name for end in ends if os.path.exists(name := files.path + end)]
    if not found:
        files.load()  # which says so if this user may not look there
        raise StartError(f"{files.path}: there is no database, and nothing to repair")
    store = salvage(files)
    target = files.path + ".repaired"
    with naming(f"cannot write {target}"):
        files.write_copy(store, target)
        give_to_owner(target, files.path)
    old = shlex.join(found)
    print(f"saved {show_peers(store.counts.total())}, record {store.number}, in {target}")
    print("No other file was changed. To use it, stop the gateway and move it to the old place:")
    print(f"  mkdir damaged && mv {old} damaged/ && mv {shlex.join([target, files.path])}")


Argument = tuple[tuple[str, ...], dict[str, Any]]


def argument(*names: str, **options: Any) -> Argument:
    """What argparse's add_argument() takes, as a value for the table."""
    return names, options


def flag(name: str, text: str) -> Argument:
    return argument(name, action="store_true", help=text)


def number(parse: Callable[[str], float], accepted: str) -> Callable[[str], float]:
    """A number for argparse, which shows what is accepted when `parse` raises ValueError."""

    def convert(text: str) -> float:
        try:
            return parse(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {accepted}") from None

    return convert


class Command(NamedTuple):
    """A row of the table: "peer add" is the action `add` of `peer`. `run` returns the exit code, or
    None for 0. The examples are lines that follow "wggw" and the words; one may be empty."""

    words: str
    run: Callable[[argparse.Namespace], int | None]
    text: str
    examples: str
    arguments: tuple[Argument, ...] = ()


# fmt: off
_REMOTE = (
    argument("--url", help="ask the gateway at this https URL instead of this host's"),
    argument("--key-file", help="a file with the API key, mode 0600"),
    argument("--fingerprint", help="the SHA-256 of its certificate, as its log shows it"),
    argument("--key-id", help="the key id, for --scheme rfc9421; default: 'default'"),
    argument("--scheme", choices=("legacy", "rfc9421"),
             help="how requests are signed; default: legacy"),
)
_JSON = flag("--json", "print the API's JSON, for programs")
_DRY_RUN = flag("--dry-run", "change nothing, and print what would be done")
_SKIP = flag("--skip", "leave out the peers that do not fit")
_PEER = (argument("name", help="the peer's label or public key"), *_REMOTE)
_RANDOM = (
    argument("--generation", choices=GENERATIONS,
             help="of AmneziaWG: the newest that all clients support; default: the oldest that "
             "has the preset"),
    argument("--preset", choices=tuple(PRESETS), default=DEFAULT_PRESET,
             help="; ".join(f"{name}: {row.text}" for name, row in PRESETS.items())),
)
GROUPS = {"awg": "make, show or change AmneziaWG's parameters", "peer": "show or change one peer"}
COMMANDS = (
    Command("serve", command_serve, "run the gateway", "--env-file /etc/wggw/wggw.env"),
    Command("net", command_net,
            "set up, remove or show interfaces, forwarding, NAT and packet filter; run it as root",
            "show\nup", (
        argument("action", choices=("up", "down", "show"),
                 help="up: make interfaces, forwarding, NAT and packet filter; down: remove them; "
                 "show: print them, and other firewalls that may drop packets"),
        flag("--keep-interfaces", "down: keep the interfaces, and with them all tunnels"))),
    Command("check", command_check,
            "verify snapshot and journal, and change nothing; exit code 3 when they are damaged",
            "\n--repair", (
        flag("--repair", "write what is readable to a new file, and print how to use it"),)),
    Command("copy", command_copy, "show, verify or replace the remote copy at SNAPSHOT_URL",
            "show\nverify", (
        argument("action", choices=("show", "verify", "claim"),
                 help="show: list the last starts of gateways that wrote to it (epochs); verify: "
                 "read it as a boot would, and write nothing; claim: with the gateway stopped, "
                 "make this host's files its newest state"),)),
    Command("call", command_call, "send one request to the API, and print the answer",
            "GET /api/v1/server/status\n"
            "POST /api/v1/configurations --data '{\"public_key\": \"…\"}'\n"
            "POST /api/v1/configurations/batch --data @operations.json", (
        argument("method", help="GET, POST, PUT, PATCH or DELETE"),
        argument("path", help="path and query, such as /api/v1/configurations?limit=10"),
        argument("--data", help="the body: a text, @FILE, or @- for standard input"), *_REMOTE)),
    Command("snapshot", command_snapshot,
            "export the gateway's whole state to a file, or import it from one",
            "export state.db\nimport state.db", (
        argument("action", choices=("export", "import"),
                 help="export: write the file, mode 0600; import: replace all peers of the gateway "
                 "by those of the file"),
        argument("file", help="the file; export replaces an existing one"),
        flag("--decrypt", "export: write the file unencrypted, even if SNAPSHOT_KEY is set"),
        flag("--dry-run", "import: change nothing, and print what would be done"),
        argument("--replace-key", dest="replace_key", action="store_const", const=True,
                 help="import: give the interface the key that the file's peers know; this or "
                 "--keep-key also accepts another gateway's file, which deletes the peers here"),
        argument("--keep-key", dest="replace_key", action="store_const", const=False,
                 help="import: keep the interface's key, which cuts off peers that know another"),
        *_REMOTE)),
    Command("import", command_import, "create the peers of another program's file",
            "/etc/wireguard/wg0.conf --dry-run\nwg-easy.json --merge --skip", (
        argument("file", help="- for standard input, or a file: of wg-quick, `wg showconf`, "
                 "`awg showconf`, wg-easy up to 14, the gateway before wggw, or a JSON list"),
        flag("--merge", "keep the gateway's peers, and add those of the file"),
        flag("--replace", "update the gateway's peers, and delete those that the file lacks"),
        _DRY_RUN, _SKIP, *_REMOTE)),
    Command("adopt", command_adopt,
            "take over a live interface with its peers; run it as root, with the gateway stopped",
            "--dry-run\n--interface wg1 --yes", (
        argument("--interface", default="wg0", help="the interface; default: wg0"),
        flag("--yes", "do not ask for a confirmation"), _DRY_RUN,
        flag("--skip", "leave out the peers that do not fit, which cuts them off"))),
    Command("awg generate", command_awg_generate,
            "print new random parameters, for AWG_PARAMS or for `wggw awg rotate --params`",
            "--preset strong >awg.json", _RANDOM),
    Command("awg show", command_awg_show,
            "print the gateway's parameters, and how many peers use them", "", _REMOTE),
    Command("awg rotate", command_awg_rotate,
            "change the gateway's parameters; if that cuts clients off, it needs --yes",
            "--params @awg.json\n--preset strong --yes", (
        argument("--params",
                 help="the parameters: JSON, @FILE, or @- for standard input; default: random"),
        flag("--yes", "accept that clients are cut off until they have new configurations"),
        *_RANDOM, *_REMOTE)),
    Command("status", command_status,
            "show the gateway's state on one screen; exit code 1 when it is degraded",
            "\n--json | jq '.interfaces[].rx_bytes_per_second'",
            (_JSON, *_REMOTE)),
    Command("peers", command_peers, "list the peers with their live state",
            "--online --sort traffic --limit 20\nalice\n"
            "--json | jq '.[] | select(.status_reason == \"quota\") | .public_key'", (
        argument("search", nargs="?", default="",
                 help="only peers with this text in key, label, request id or address"),
        argument("--limit", type=number(_integer(1, 10**9), "a number from 1 on"), default=10**9,
                 help="list at most this many"),
        flag("--online", "only peers that are online"),
        argument("--sort", choices=tuple(PEER_ORDERS), default="created",
                 help="created (default): oldest first; key: in alphabetical order; others: "
                 "largest or latest first"),
        _JSON, *_REMOTE)),
    Command("peer add", command_peer_add,
            "make a key, create its peer, and print the client's file",
            "laptop >laptop.conf\nphone --set quota_bytes=50000000000 | qrencode -t ansiutf8", (
        argument("name", help="the peer's label"),
        argument("--set", action="append", default=[], metavar="NAME=VALUE",
                 help="a field of the API's create, such as quota_bytes=5000000000; repeat for "
                 "more"),
        *_REMOTE)),
    Command("peer show", command_peer_show, "show all that the gateway knows of the peer",
            "laptop", (_JSON, *_PEER)),
    Command("peer suspend", command_peer_change,
            "keep the peer and its addresses, but end its connection", "laptop", _PEER),
    Command("peer activate", command_peer_change, "let a suspended peer connect again",
            "laptop", _PEER),
    Command("peer reset-quota", command_peer_change, "set the peer's used quota to 0",
            "laptop", _PEER),
    Command("peer rotate", command_peer_rotate,
            "give the peer a new key, and print its client's new file",
            "laptop >laptop.conf", _PEER),
    Command("peer delete", command_peer_change, "delete the peer, and free its addresses",
            "laptop", _PEER),
    Command("top", command_top, "watch traffic and the busiest peers; q quits",
            "--interval 5", (
        argument("--interval", default=2.0, help="seconds between two requests; default: 2",
                 type=number(_seconds(0.1, 3600)[0], "a number of seconds from 0.1 to 3600")),
        *_REMOTE)),
    Command("doctor", command_doctor,
            "examine host, files and gateway, and say what to do; run it as root", ""),
)
# fmt: on
EXIT_CODES = """\
exit codes:
  0    the command did its work, and nothing is wrong
  1    it failed, the gateway refused, or something is wrong
  2    a setting or an argument is wrong
  3    the snapshot or the journal is damaged
  130  Ctrl-C interrupted it
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wggw",
        description="Run and operate a WireGuard and AmneziaWG gateway.\n"
        "If it is not installed, type `python3 wggw.py` instead of `wggw`.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"wggw {__version__}")
    groups = {"": parser.add_subparsers(required=True, metavar="COMMAND")}
    for row in COMMANDS:
        group, _, name = row.words.rpartition(" ")
        if group not in groups:
            text = GROUPS[group]
            grouped = groups[""].add_parser(group, help=text, description=_sentence(text))
            groups[group] = grouped.add_subparsers(required=True, metavar="ACTION")
        examples = [f"  wggw {row.words} {line}".rstrip() for line in row.examples.split("\n")]
        command = groups[group].add_parser(
            name,
            help=row.text,
            description=_sentence(row.text),
            epilog="\n".join(["examples:", *examples]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=row.run)
        if group:
            command.set_defaults(action=name)
        remote = command.add_argument_group("a gateway on another host")
        for names, options in row.arguments:
            (remote if (names, options) in _REMOTE else command).add_argument(*names, **options)
        text = "the settings file; default: ./.env"
        if row.run is not command_serve:
            text += f"; if it and the environment have no settings, {INSTALLED_SETTINGS}"
        command.add_argument("--env-file", metavar="PATH", help=text)
    return parser


def _sentence(text: str) -> str:
    return textwrap.fill(f"{text[0].upper()}{text[1:]}.", 80)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the process's exit code."""
    # Otherwise the next file that is opened takes the place of a closed stream. Writing to a closed
    # standard output fails, as it does on a full disk.
    for name, mode, flags in (
        ("stdin", "r", os.O_RDONLY),
        ("stdout", "w", os.O_RDONLY),
        ("stderr", "w", os.O_WRONLY),
    ):
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, flags)
            setattr(sys, name, open(handle, mode, encoding="utf-8"))  # noqa: SIM115  to the end
    try:
        try:
            arguments = make_parser().parse_args(argv)
            return _run_command(arguments)
        finally:  # after --help, too
            sys.stdout.flush()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except OSError as error:  # such as a full disk, or `wggw peers | head`
        if not isinstance(error, BrokenPipeError):
            complain(f"wggw: {error.filename or 'output'}: {_reason(error)}")
        return 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # Python flushes once more at the exit, which must not change the code
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run_command(arguments: argparse.Namespace) -> int:
    for stream in (sys.stdout, sys.stderr):  # some terminals cannot show an ellipsis
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        if arguments.run is not command_serve:
            arguments.env_file = arguments.env_file or installed_settings()
        return arguments.run(arguments) or 0
    # Bytes of an argument or \ud800 in a file; a blank in a URL or path.
    except (UnicodeEncodeError, http.client.InvalidURL):
        failure = StartError(
            "an argument or a file has characters that cannot be sent: texts must be UTF-8, and a "
            "URL or path ASCII with %-escapes"
        )
    except StartError as error:
        failure = error
    except BackendError as error:
        failure = StartError(str(error))
    complain(f"wggw: {failure}")
    Manager(os.environ).tell(f"STATUS={failure}")
    return failure.code


if __name__ == "__main__":
    sys.exit(main())
