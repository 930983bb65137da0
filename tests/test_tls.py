"""TLS: which versions, which certificate, who gets that far, and life without `cryptography`."""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import errno
import hashlib
import itertools
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from ipaddress import ip_network
from pathlib import Path
from unittest import mock

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from harness import GatewayProcess, a_key, running, wait_for

import wggw


def shake_hands(
    port: int,
    version: ssl.TLSVersion | None = None,
    client_pair: tuple[Path, Path] | None = None,
    trust: Path | None = None,
) -> tuple[str | None, bytes]:
    """The version agreed on and the served certificate. Raises ssl.SSLError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = trust is not None
    if trust is None:
        context.verify_mode = ssl.CERT_NONE
    else:
        context.load_verify_locations(trust)
    if version is not None:
        context.set_ciphers("DEFAULT:@SECLEVEL=0")  # or this side would refuse old ones itself
        context.minimum_version = context.maximum_version = version
    if client_pair is not None:
        context.load_cert_chain(*client_pair)
    with (
        socket.create_connection(("127.0.0.1", port), timeout=30) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1") as tls,
    ):
        # With TLS 1.3 a client learns only here that its certificate was not accepted.
        tls.sendall(b"GET /healthz HTTP/1.1\r\nHost: gateway\r\n\r\n")
        assert tls.recv(65536).startswith(b"HTTP/1.1 200 ")
        certificate = tls.getpeercert(binary_form=True)
        assert certificate is not None
        return tls.version(), certificate


@pytest.mark.parametrize("version", ["TLSv1", "TLSv1_1"])
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_old_versions_are_refused_by_the_gateway(shared: GatewayProcess, version: str) -> None:
    with pytest.raises(ssl.SSLError) as caught:
        shake_hands(shared.port, ssl.TLSVersion[version])
    # The alert comes from the other side: this one would have spoken it.
    assert "ALERT_PROTOCOL_VERSION" in str(caught.value.reason)


@pytest.mark.parametrize(("version", "name"), [("TLSv1_2", "TLSv1.2"), ("TLSv1_3", "TLSv1.3")])
def test_current_versions_are_accepted(shared: GatewayProcess, version: str, name: str) -> None:
    assert shake_hands(shared.port, ssl.TLSVersion[version])[0] == name


class KeyUpdater:
    """A TLS 1.3 client that can change its keys as often as it likes; ssl has no call for it."""

    def __init__(self, raw: socket.socket) -> None:
        name = ctypes.util.find_library("ssl")
        if name is None:
            pytest.skip("needs libssl")
        self._library = library = ctypes.CDLL(name)
        for function in (library.TLS_client_method, library.SSL_CTX_new, library.SSL_new):
            function.restype = ctypes.c_void_p
        context = library.SSL_CTX_new(ctypes.c_void_p(library.TLS_client_method()))
        self._ssl = ctypes.c_void_p(library.SSL_new(ctypes.c_void_p(context)))
        library.SSL_set_fd(self._ssl, raw.fileno())
        assert library.SSL_connect(self._ssl) == 1

    def update_keys(self, answered: bool) -> bool:
        """Whether it could be sent; the other side sends a KeyUpdate of its own if `answered`."""
        updated = self._library.SSL_key_update(self._ssl, int(answered)) == 1
        return updated and self._library.SSL_do_handshake(self._ssl) == 1

    def ask(self, request: bytes) -> bytes:
        assert self._library.SSL_write(self._ssl, request, len(request)) == len(request)
        answer = ctypes.create_string_buffer(65536)
        length: int = self._library.SSL_read(self._ssl, answer, len(answer))
        return answer.raw[: max(0, length)]


@pytest.mark.parametrize("answered", [False, True])
def test_key_updates_pass_but_not_without_end(shared: GatewayProcess, answered: bool) -> None:
    """Whoever sends nothing else is cut off: one after the other, they would keep the loop busy."""
    request = b"GET /healthz HTTP/1.1\r\nHost: gateway\r\n\r\n"
    with socket.create_connection(("127.0.0.1", shared.port), timeout=30) as raw:
        raw.settimeout(None)  # the library blocks
        client = KeyUpdater(raw)
        for _ in range(5):
            assert all(client.update_keys(answered) for _ in range(100))
            assert client.ask(request).startswith(b"HTTP/1.1 200 ")
        sent = itertools.takewhile(lambda _: client.update_keys(answered), range(300_000))
        assert len(list(sent)) < 300_000


def test_a_renegotiation_is_refused_at_once(shared: GatewayProcess) -> None:
    command = ["openssl", "s_client", "-tls1_2", "-connect", f"127.0.0.1:{shared.port}"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as client:
        assert client.stdin is not None and client.stdout is not None
        assert any(b"Verify return code" in line for line in client.stdout)
        client.stdin.write(b"R\n")
        client.stdin.flush()
        assert client.wait(30) == 1  # well before IDLE_DEADLINE
        assert b"renegotiation" in client.stdout.read()


def channel_of(tls: ssl.SSLContext) -> tuple[wggw.Channel, socket.socket, ssl.SSLSocket]:
    """The gateway's end of a connection after the handshake, its socket, and the client's end."""
    ours, theirs = socket.socketpair()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    channel, clients = wggw.Channel(ours, tls), list[ssl.SSLSocket]()
    client = threading.Thread(target=lambda: clients.append(context.wrap_socket(theirs)))
    client.start()
    channel.do_handshake(30)
    client.join(30)
    ours.setblocking(False)
    return channel, ours, clients[0]


def test_a_request_before_the_end_counts_although_the_client_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*write_pair(tmp_path, "server"))
    channel, ours, client = channel_of(tls)
    client.sendall(b"a request")
    with contextlib.suppress(ssl.SSLWantReadError, TimeoutError):
        client.settimeout(0.0)
        client.unwrap()  # close_notify
    gone = mock.Mock(wraps=ours)
    gone.shutdown.side_effect = OSError(errno.ENOTCONN, "a reset has come")
    channel.socket = gone
    assert channel.receive() == b"a request"
    client.close()
    ours.close()


def test_a_handshake_that_sends_without_end_ends_at_its_deadline(tmp_path: Path) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*write_pair(tmp_path, "server"))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"\x16\x03\x01\x40\x00")  # a record that goes on
        with pytest.raises(TimeoutError):
            wggw.Channel(ours, tls).do_handshake(0.05)


def test_plain_http_is_no_way_in(shared: GatewayProcess) -> None:
    with socket.create_connection(("127.0.0.1", shared.port), timeout=30) as raw:
        raw.sendall(b"GET /healthz HTTP/1.1\r\nHost: gateway\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert b"HTTP/1.1 200" not in raw.recv(65536)


# --- certificates --------------------------------------------------------------------------------


def test_the_logged_fingerprint_is_the_served_certificates(shared: GatewayProcess) -> None:
    served = shake_hands(shared.port)[1]
    match = re.search(r"SHA-256 fingerprint ([0-9A-Fa-f:]+)", shared.text())
    assert match is not None
    assert match[1].replace(":", "").lower() == hashlib.sha256(served).hexdigest()


def test_the_self_made_pair_is_p256_private_and_can_be_trusted(shared: GatewayProcess) -> None:
    cert, key = shared.directory / "cert.pem", shared.directory / "key.pem"
    assert key.stat().st_mode & 0o777 == 0o600
    made = x509.load_pem_x509_certificate(cert.read_bytes())
    public = made.public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert isinstance(public.curve, ec.SECP256R1)
    assert shake_hands(shared.port, trust=cert)[1] == made.public_bytes(serialization.Encoding.DER)


def write_pair(
    directory: Path,
    name: str,
    issuer: tuple[Path, Path] | None = None,
    expires: datetime | None = None,
) -> tuple[Path, Path]:
    """A certificate and its key: a CA of its own, or issued by another pair."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    signer, issuer_name = key, subject
    if issuer is not None:
        loaded = serialization.load_pem_private_key(issuer[1].read_bytes(), None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        signer = loaded
        issuer_name = x509.load_pem_x509_certificate(issuer[0].read_bytes()).subject
    now = datetime.now(timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer_name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(expires or now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .sign(signer, hashes.SHA256())
    )
    paths = directory / f"{name}.crt", directory / f"{name}.key"
    pem = serialization.Encoding.PEM
    paths[0].write_bytes(certificate.public_bytes(pem))
    paths[1].write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    paths[1].chmod(0o600)
    return paths


def test_given_files_are_used_and_left_alone(tmp_path: Path) -> None:
    cert, key = write_pair(tmp_path, "given")
    before = cert.read_bytes(), key.read_bytes()
    with running(tmp_path, TLS_CERT=str(cert), TLS_KEY=str(key)) as gateway:
        served = shake_hands(gateway.port)[1]
        given = x509.load_pem_x509_certificate(cert.read_bytes())
        assert served == given.public_bytes(serialization.Encoding.DER)
        assert hashlib.sha256(served).hexdigest() in gateway.text()
    assert (cert.read_bytes(), key.read_bytes()) == before
    assert not (tmp_path / "cert.pem").exists()


@pytest.mark.parametrize("damage", ["no key", "no certificate", "not PEM", "another key"])
def test_files_that_do_not_fit_are_exit_2(tmp_path: Path, damage: str) -> None:
    cert, key = write_pair(tmp_path, "given")
    if damage == "no key":
        key.unlink()
    elif damage == "no certificate":
        cert.unlink()
    elif damage == "not PEM":
        cert.write_text("hello")
    else:
        key.write_bytes(write_pair(tmp_path, "other")[1].read_bytes())
    gateway = GatewayProcess(tmp_path, TLS_CERT=str(cert), TLS_KEY=str(key))
    try:
        assert gateway.spawn().wait(60) == 2
        assert "TLS_CERT" in gateway.text() and "PRIVATE" not in gateway.text()
    finally:
        gateway.close()


def test_a_pair_that_cannot_be_made_leaves_no_key(tmp_path: Path) -> None:
    """Otherwise the next start refuses half a pair, after the cause has been mended, too."""
    cert, key = tmp_path / "none" / "cert.pem", tmp_path / "key.pem"
    with pytest.raises(FileNotFoundError):
        wggw.make_certificate(str(cert), str(key), ["localhost"])
    assert not key.exists()
    cert.parent.mkdir()
    wggw.make_certificate(str(cert), str(key), ["localhost"])
    assert cert.exists() and key.exists()


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_a_pair_whose_sync_fails_leaves_no_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """Each file and then its directory is synced; in the directory the file is there already."""
    calls = itertools.count(1)

    def fsync(handle: int) -> None:
        if next(calls) == failing:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        wggw.make_certificate(str(tmp_path / "cert.pem"), str(tmp_path / "key.pem"), ["localhost"])
    assert not list(tmp_path.iterdir())


EXPIRIES = [
    datetime(2049, 12, 31, 23, 59, 59, tzinfo=timezone.utc),  # the last UTCTime
    datetime(2050, 1, 1, tzinfo=timezone.utc),  # the first GeneralizedTime
    datetime(9999, 12, 31, 23, 59, 59, tzinfo=timezone.utc),  # RFC 5280: no end
]


@pytest.mark.parametrize("expires", EXPIRIES, ids=str)
def test_expiry_is_read_from_the_certificate(tmp_path: Path, expires: datetime) -> None:
    cert, _ = write_pair(tmp_path, "given", expires=expires)
    assert wggw.certificate_expiry(wggw.read_certificate(str(cert))) == int(expires.timestamp())


def told_expiry(gateway: GatewayProcess) -> tuple[str, int]:
    client = gateway.client()
    status = client.send("GET", "/api/v1/server/status").json["certificate_expires_at"]
    metrics = client.raw("GET", "/metrics", b"", {}).body.decode()
    match = re.search(r"^wggw_certificate_expiry_timestamp_seconds (\d+)$", metrics, re.MULTILINE)
    assert match
    return status, int(match[1])


def test_expiry_is_in_status_metrics_and_log_and_follows_a_reload(tmp_path: Path) -> None:
    cert, key = write_pair(tmp_path, "given", expires=EXPIRIES[0])
    with running(tmp_path, TLS_CERT=str(cert), TLS_KEY=str(key)) as gateway:
        assert told_expiry(gateway) == ("2049-12-31T23:59:59Z", int(EXPIRIES[0].timestamp()))
        assert "the certificate expires" not in gateway.text()
        write_pair(tmp_path, "given")  # for a day
        assert gateway.process is not None
        gateway.process.send_signal(signal.SIGHUP)
        wait_for(lambda: "the certificate expires at" in gateway.text(), what="the warning")
        wait_for(lambda: "reloaded" in gateway.text(), what="the reload")
        assert told_expiry(gateway)[1] == wggw.certificate_expiry(wggw.read_certificate(str(cert)))


def test_ciphers_are_current_with_both_versions(shared: GatewayProcess) -> None:
    """What OpenSSL calls forward secret and authenticated; everything else is refused."""
    refused = ("AES128-SHA", "AES256-GCM-SHA384", "ECDHE-ECDSA-AES128-SHA", "NULL", "aNULL")
    for ciphers in refused:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(f"{ciphers}:@SECLEVEL=0")
        with (
            socket.create_connection(("127.0.0.1", shared.port), timeout=30) as raw,
            pytest.raises(ssl.SSLError, match="HANDSHAKE_FAILURE"),
        ):
            context.wrap_socket(raw)


def test_with_a_client_ca_only_its_certificates_get_in(tmp_path: Path) -> None:
    ca = write_pair(tmp_path, "ca")
    good, stranger = write_pair(tmp_path, "good", ca), write_pair(tmp_path, "stranger")
    settings = {"TLS_CLIENT_CA": str(ca[0])}
    gateway = GatewayProcess(tmp_path, None, **settings)
    try:
        gateway.spawn()
        wait_for(lambda: "ready on" in gateway.text(), what="readiness")
        for pair in (None, stranger):
            with pytest.raises((ssl.SSLError, ConnectionError, AssertionError)):
                shake_hands(gateway.port, client_pair=pair)
        assert shake_hands(gateway.port, client_pair=good)[0] == "TLSv1.3"
    finally:
        gateway.close()


# --- ALLOWED_BACKENDS ----------------------------------------------------------------------------

SOURCES = [
    (("192.0.2.1", 1), True),
    (("192.0.2.255", 1), True),
    (("192.0.3.1", 1), False),
    (("203.0.113.9", 1), False),
    (("127.0.0.1", 1), True),
    (("127.9.9.9", 1), True),
    (("::1", 1, 0, 0), True),
    (("2001:db8:0:1::5", 1, 0, 0), True),
    (("2001:db8:1::5", 1, 0, 0), False),
    (("::ffff:192.0.2.1", 1, 0, 0), True),
    (("::ffff:203.0.113.9", 1, 0, 0), False),
    (("::ffff:127.0.0.1", 1, 0, 0), True),
    (("fe80::1%eth0", 1, 0, 2), False),
]


@pytest.mark.parametrize(("source", "admitted"), SOURCES, ids=[s[0] for s, _ in SOURCES])
def test_other_sources_than_the_allowed_are_not_admitted(
    source: tuple[object, ...], admitted: bool
) -> None:
    server = object.__new__(wggw.Server)
    server.allowed = (ip_network("192.0.2.0/24"), ip_network("2001:db8::/48"))
    assert server.verify_request(None, source) is admitted
    server.allowed = ()
    assert server.verify_request(None, source) is True


def test_loopback_is_never_cut_off(tmp_path: Path) -> None:
    with running(tmp_path, ALLOWED_BACKENDS="192.0.2.0/24") as gateway:
        assert gateway.client().create(a_key(1)).status == 200


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=30)


OUTSIDE = ["192.0.2.2", "192.0.2.130", "192.0.2.140"]


@pytest.fixture
def namespaces(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Two network namespaces, 192.0.2.1 (the gateway's) and 192.0.2.2, joined by a cable.

    The client's has two more addresses, 192.0.2.130 and .140, outside of 192.0.2.0/25.
    """
    inside, outside = f"wggw-tls-a{os.getpid()}", f"wggw-tls-b{os.getpid()}"
    try:
        ip("netns", "add", inside)
        ip("netns", "add", outside)
        ip("-n", inside, "link", "add", "c0", "type", "veth", "peer", "c0", "netns", outside)
        for name, addresses in ((inside, ["192.0.2.1"]), (outside, OUTSIDE)):
            for address in addresses:
                ip("-n", name, "address", "add", f"{address}/24", "dev", "c0")
            for link in ("lo", "c0"):
                ip("-n", name, "link", "set", link, "up")
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"needs network namespaces: {error}")
    else:
        yield inside, outside
    finally:
        for name in (inside, outside):
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                ip("netns", "delete", name)


PROBE = """
import http.client, ssl, sys
for path in ("/openapi.json", "/metrics"):
    context = ssl._create_unverified_context()
    connection = http.client.HTTPSConnection(
        "192.0.2.1", int(sys.argv[2]), source_address=(sys.argv[1], 0), timeout=30, context=context
    )
    try:
        connection.request("GET", path, headers={"Authorization": "Bearer " + sys.argv[3]})
        print(connection.getresponse().status)
    except OSError:
        print("out")
"""
TOKEN = "the-token-of-the-metrics"


def test_a_source_that_is_not_allowed_is_cut_off_before_tls(
    tmp_path: Path, namespaces: tuple[str, str]
) -> None:
    """And one of METRICS_ALLOWED gets the metrics, and nothing else."""
    inside, outside = namespaces
    gateway = GatewayProcess(
        tmp_path,
        ["ip", "netns", "exec", inside],
        API_HOST="192.0.2.1",
        ALLOWED_BACKENDS="192.0.2.0/25,2001:db8::/32",
        METRICS_ALLOWED="192.0.2.140/32",
        METRICS_TOKEN=TOKEN,
    )
    try:
        gateway.spawn()
        wait_for(lambda: "ready on" in gateway.text(), what="readiness")
        expected = (["200", "200"], ["out", "out"], ["403", "200"])
        for source, told in zip(OUTSIDE, expected, strict=True):
            probe = ["ip", "netns", "exec", outside, sys.executable, "-c", PROBE, source]
            done = subprocess.run(
                [*probe, str(gateway.port), TOKEN],
                capture_output=True,
                text=True,
                timeout=100,
                check=False,
            )
            assert (done.stdout.split(), done.stderr) == (told, ""), source
    finally:
        gateway.close()


def test_packet_filters_let_in_whom_the_api_lets_in() -> None:
    given = {"ALLOWED_BACKENDS": "192.0.2.0/25", "METRICS_ALLOWED": "2001:db8::/64"}
    environ = {"GATEWAY_API_KEY": "k" * 16, "METRICS_TOKEN": TOKEN, **given}
    config = wggw.load_config(environ, os.devnull)
    tunnels = wggw.interface_settings(config)
    rules = wggw.render_ruleset(config, tunnels)
    assert "ip saddr != { 192.0.2.0/25 } tcp dport 8000 drop" in rules
    assert "ip6 saddr != { 2001:db8::/64 } tcp dport 8000 drop" in rules
    assert "allow from 2001:db8::/64 to any port 8000 proto tcp" in wggw.ufw_rules(config, tunnels)
    with pytest.raises(wggw.ConfigError, match="METRICS_ALLOWED needs METRICS_TOKEN"):
        wggw.load_config({**environ, "METRICS_TOKEN": ""}, os.devnull)


# --- without the cryptography package ------------------------------------------------------------


@pytest.fixture
def without(tmp_path: Path) -> str:
    """A PYTHONPATH on which `import cryptography` fails as if it were not installed."""
    directory = tmp_path / "without"
    directory.mkdir()
    (directory / "sitecustomize.py").write_text(
        "import sys\nsys.modules['cryptography'] = None\n"
        "import os\nopen(os.path.join(os.path.dirname(__file__), 'used'), 'w').close()\n"
    )
    return str(directory)


def test_with_a_given_certificate_the_server_needs_no_cryptography(
    tmp_path: Path, without: str
) -> None:
    cert, key = write_pair(tmp_path, "given")
    with running(tmp_path, PYTHONPATH=without, TLS_CERT=str(cert), TLS_KEY=str(key)) as gateway:
        assert (Path(without) / "used").exists()
        assert gateway.client().create(a_key(1), protocol="dual").status == 200
        assert gateway.stop() == 0
        gateway.start()
        assert gateway.client().get(a_key(1)).status == 200


@pytest.mark.parametrize(
    ("setting", "named"),
    [({}, "TLS_CERT"), ({"GATEWAY_PUBLIC_KEY": "a shared secret of two"}, "GATEWAY_PUBLIC_KEY")],
    ids=["no certificate", "payload encryption"],
)
def test_what_needs_cryptography_says_so_and_exits_2(
    tmp_path: Path, without: str, setting: dict[str, str], named: str
) -> None:
    if setting:
        cert, key = write_pair(tmp_path, "given")
        setting = {**setting, "TLS_CERT": str(cert), "TLS_KEY": str(key)}
    gateway = GatewayProcess(tmp_path, None, PYTHONPATH=without, **setting)
    try:
        assert gateway.spawn().wait(60) == 2
        last = gateway.text().splitlines()[-1]
        assert named in last and "cryptography" in last
    finally:
        gateway.close()


def test_a_reload_that_needs_cryptography_is_refused_as_a_whole(
    tmp_path: Path, without: str
) -> None:
    pair = dict(zip(("TLS_CERT", "TLS_KEY"), map(str, write_pair(tmp_path, "given")), strict=True))
    (tmp_path / ".env").touch(0o600)
    with running(tmp_path, PYTHONPATH=without, **pair) as gateway:
        assert gateway.process is not None
        classes = "SERVICE_CLASSES='{\"fast\":{}}'\n"
        (tmp_path / ".env").write_text(classes + "GATEWAY_PUBLIC_KEY='a shared secret of two'\n")
        gateway.process.send_signal(signal.SIGHUP)
        wait_for(lambda: "reload refused" in gateway.text(), what="the refusal")
        client = gateway.client()
        assert client.create(a_key(1), service_class="fast").status == 422
        (tmp_path / ".env").write_text(classes)
        renewed(gateway, 1)
        assert client.create(a_key(1), service_class="fast").status == 200


# --- the names of the self-made certificate ------------------------------------------------------


def curl(port: int, host: str, *arguments: str) -> str:
    """What curl says of a request to the gateway by that name; "" when all is well."""
    url = f"https://{f'[{host}]' if ':' in host else host}:{port}/healthz"
    command = ["curl", "-sS", "--fail", "-o", os.devnull, "--max-time", "60", "--noproxy", "*"]
    command += [] if host[0].isdigit() or ":" in host else ["--resolve", f"{host}:{port}:127.0.0.1"]
    done = subprocess.run([*command, *arguments, url], capture_output=True, text=True, check=False)
    return done.stderr


def renewed(gateway: GatewayProcess, count: int) -> None:
    """Reload with the settings of the file, and wait until that was done so many times."""
    assert gateway.process is not None
    gateway.process.send_signal(signal.SIGHUP)
    wait_for(lambda: gateway.text().count("reloaded keys") == count, what="the reload")


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_certificate_is_for_the_names_that_backends_use_and_keeps_its_key(tmp_path: Path) -> None:
    env = tmp_path / ".env"
    env.write_text("TLS_NAMES=api.example.org,127.0.0.3\n")
    with running(tmp_path, API_HOST="::") as gateway:
        cert, key = tmp_path / "cert.pem", (tmp_path / "key.pem").read_bytes()
        copy = tmp_path / "copy.pem"
        copy.write_bytes(cert.read_bytes())  # what a backend got
        trust = ("--cacert", str(copy))
        for host in ("localhost", "127.0.0.1", "::1", "127.0.0.3", "api.example.org"):
            assert curl(gateway.port, host, *trust) == "", host
        assert "SSL" in curl(gateway.port, "127.0.0.4", *trust)
        pin = re.search(r"key pin (sha256//\S+)", gateway.text())
        assert pin is not None
        pinned = ("--insecure", "--pinnedpubkey", pin[1])
        assert curl(gateway.port, "127.0.0.4", *pinned) == ""

        first = cert.read_bytes()
        renewed(gateway, 1)
        assert cert.read_bytes() == first  # nothing has changed
        for count, name in ((2, "vpn.example.org"), (3, "other.example.org")):
            env.write_text(f"TLS_NAMES=127.0.0.3\nWG_ENDPOINT={name}\n")
            renewed(gateway, count)
            assert f"was renewed (for {name})" in gateway.text()
            for host in (name, "127.0.0.3", "::1"):
                assert curl(gateway.port, host, *trust) == "", host
            assert "SSL" in curl(gateway.port, "api.example.org", *trust)
            assert curl(gateway.port, name, "--cacert", str(cert)) == ""
            assert curl(gateway.port, name, *pinned) == ""
        assert cert.read_bytes().count(b"BEGIN CERTIFICATE") == 2
        assert (tmp_path / "key.pem").read_bytes() == key
        assert cert.stat().st_mode & 0o777 == 0o600


def settings_for(cert: Path, key: Path, **more: str) -> wggw.Config:
    given = {"GATEWAY_API_KEY": "k" * 16, "TLS_CERT": str(cert), "TLS_KEY": str(key), **more}
    return wggw.load_config(given, os.devnull)


def is_renewed(config: wggw.Config) -> bool:
    before = Path(config.tls_cert).read_bytes()
    wggw.fit_certificate(config)
    return Path(config.tls_cert).read_bytes() != before


@pytest.mark.parametrize("days", [3000, 300, -1])
def test_certificate_near_its_end_is_renewed_under_the_same_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    with monkeypatch.context() as then:
        then.setattr(wggw, "CERTIFICATE_SECONDS", days * 86400)
        wggw.make_certificate(str(cert), str(key), ["localhost"])
    pin = wggw.key_pin(wggw.read_certificate(str(cert)))
    config = settings_for(cert, key)
    assert is_renewed(config) == (days < 365)
    assert wggw.own_certificate_names(str(cert))
    certificate = wggw.read_certificate(str(cert))
    assert wggw.certificate_expiry(certificate) > time.time() + 2000 * 86400
    assert wggw.key_pin(certificate) == pin
    assert not is_renewed(config)
    assert cert.read_bytes().count(b"BEGIN CERTIFICATE") == 1


def test_certificate_that_is_not_valid_yet_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not renewed: nobody knows whether the clock was ahead then or is behind now."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    config, now = settings_for(cert, key), time.time()
    with monkeypatch.context() as ahead:
        ahead.setattr(time, "time", lambda: now + 30 * 86400)
        wggw.make_certificate(str(cert), str(key), ["localhost"])
    found = wggw.look_at_certificate(config, time.time())
    assert found.failed and "is not valid before" in found.found
    assert "remove it and TLS_KEY" in found.todo
    caplog.clear()
    wggw.make_tls(config)
    assert "the certificate is not valid before" in caplog.text
    assert not is_renewed(config)


def test_renewal_needs_no_newer_library_than_debian_12_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cryptography 38 can load one certificate, and not several of a file."""
    monkeypatch.delattr(x509, "load_pem_x509_certificates")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    wggw.make_certificate(str(cert), str(key), ["localhost"])
    first = cert.read_bytes()
    for name in ("vpn.example.org", "other.example.org"):
        assert is_renewed(settings_for(cert, key, WG_ENDPOINT=name))
        assert cert.read_bytes().endswith(first)
    assert cert.read_bytes().count(b"BEGIN CERTIFICATE") == 2


def test_certificate_of_somebody_else_is_never_renewed(tmp_path: Path) -> None:
    ca = write_pair(tmp_path, "ca")
    ours = write_pair(tmp_path, "wggw")  # a CA that has the name by accident
    bundle = write_pair(tmp_path, "bundle", ours)
    bundle[0].write_bytes(bundle[0].read_bytes() + ours[0].read_bytes())
    for pair in (ca, write_pair(tmp_path, "given", ca), bundle):
        assert not is_renewed(settings_for(*pair, WG_ENDPOINT="vpn.example.org"))


def test_certificate_that_cannot_be_renewed_stays_in_use(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    wggw.make_certificate(str(cert), str(key), ["localhost"])
    key.write_text("not PEM")
    assert not is_renewed(settings_for(cert, key, WG_ENDPOINT="vpn.example.org"))
    assert "cannot be renewed" in caplog.text


def test_words_beside_a_certificate_are_in_any_language(tmp_path: Path) -> None:
    """openssl pkcs12 writes the name that the certificate had in a Windows store."""
    cert, key = write_pair(tmp_path, "given")
    for path in (cert, key):
        path.write_bytes("friendlyName: für Müller\n".encode() + path.read_bytes())
    key.chmod(0o600)
    before = cert.read_bytes(), key.read_bytes()
    config = settings_for(cert, key, SNAPSHOT_KEY="s" * 16)
    wggw.make_tls(config)
    store = mock.Mock(private_keys={})
    assert not wggw.keep_certificate(config, store, lacked=False)
    cert.unlink()
    key.unlink()
    assert wggw.keep_certificate(config, store, lacked=True)
    assert (cert.read_bytes(), key.read_bytes()) == before


def test_a_renewal_never_overwrites_a_key_in_the_certificates_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    both, key = tmp_path / "both.pem", tmp_path / "key.pem"
    wggw.make_certificate(str(both), str(key), ["localhost"])
    both.write_bytes(both.read_bytes() + key.read_bytes())
    assert not is_renewed(settings_for(both, both, WG_ENDPOINT="vpn.example.org"))
    assert "TLS_KEY is the same file" in caplog.text


def test_strict_verifiers_accept_first_and_renewed_certificates(tmp_path: Path) -> None:
    """Python 3.13 asks for what RFC 5280 does by default."""
    with running(tmp_path) as gateway:
        for name in ("localhost", "vpn.example.org"):
            if name != "localhost":
                (tmp_path / ".env").write_text(f"WG_ENDPOINT={name}\n")
                renewed(gateway, 1)
            context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
            context.verify_flags |= ssl.VERIFY_X509_STRICT
            with socket.create_connection(("127.0.0.1", gateway.port), timeout=60) as raw:
                context.wrap_socket(raw, server_hostname=name).close()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_key_pin_is_openssl_s(tmp_path: Path) -> None:
    """Of a short key and of one whose length takes two bytes."""
    for kind in (["ec", "-pkeyopt", "ec_paramgen_curve:P-256"], ["rsa:2048"]):
        openssl = ["openssl", "req", "-x509", "-nodes", "-subj", "/CN=x", "-newkey", *kind]
        files = ["-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "cert")]
        subprocess.run([*openssl, *files], check=True, capture_output=True)
        pipe = "openssl pkey -in key -pubout -outform DER | openssl dgst -sha256 -binary | base64"
        told = subprocess.run(pipe, shell=True, cwd=tmp_path, check=True, capture_output=True)
        pin = wggw.key_pin(wggw.read_certificate(str(tmp_path / "cert")))
        assert pin == f"sha256//{told.stdout.decode().strip()}"
