"""Signatures, sealed payloads, keys and certificates.

What is computed here is checked against the vectors in wire-vectors.json and against programs that
are not ours: openssl and wg.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wggw import (
    NOT_AUTHENTIC,
    Authenticator,
    ConfigError,
    InterfaceSettings,
    Malformed,
    PayloadBox,
    SignedMessage,
    Unauthorized,
    decode_key,
    encode_key,
    load_private_key,
    make_certificate,
    make_private_key,
    read_certificate,
    sign_legacy,
    x25519_public,
)

VECTORS = json.loads((Path(__file__).parent / "wire-vectors.json").read_text("utf-8"))
HMAC_CASES: list[dict[str, Any]] = VECTORS["hmac"]["cases"]
KEY: str = VECTORS["hmac"]["GATEWAY_API_KEY"]
PAYLOAD: dict[str, Any] = VECTORS["payload"]
SHARED: str = PAYLOAD["GATEWAY_PUBLIC_KEY"]
NOW = 1765200000.0
WINDOW = 60

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl program")


def authenticator(keys: dict[str, str] | None = None, now: float = NOW) -> Authenticator:
    return Authenticator(keys or {"default": KEY}, WINDOW, lambda: now)


def message_of(signature: bytes, timestamp: bytes, length: int = 0) -> SignedMessage:
    headers = {b"signature": signature, b"timestamp": timestamp}
    return SignedMessage("GET", "", "/", headers, length)


def refusal(signature: bytes, timestamp: bytes, length: int = 0, now: float = NOW) -> str:
    with pytest.raises(Unauthorized) as caught:
        authenticator(now=now).verify(message_of(signature, timestamp, length))
    assert caught.value.status == 401
    return caught.value.detail


def openssl(*arguments: str, given: bytes = b"") -> bytes:
    done = subprocess.run(["openssl", *arguments], input=given, capture_output=True, check=True)
    return done.stdout


# --- the legacy signature -------------------------------------------------------------------------


@pytest.mark.parametrize("case", HMAC_CASES, ids=lambda c: c["timestamp"])
def test_vector_signature_is_made_and_accepted(case: dict[str, Any]) -> None:
    length = len(case["body"].encode("utf-8"))
    assert length == case["body_length"]
    assert sign_legacy(KEY, int(case["timestamp"]), length) == case["signature"]
    given = message_of(case["signature"].encode(), case["timestamp"].encode(), length)
    caller = authenticator(now=float(case["timestamp"])).verify(given)
    assert caller == ("default", "legacy")


@needs_openssl
@pytest.mark.parametrize("key", [KEY, "schlüssel mit é und 🔑, lang genug"], ids=["hex", "utf-8"])
@pytest.mark.parametrize("length", [0, 1, 83, 10**9])
def test_signature_is_what_openssl_computes(key: str, length: int) -> None:
    message = f"timestamp=1765200000, body_length={length}".encode()
    option = f"hexkey:{key.encode().hex()}"
    printed = openssl("dgst", "-sha256", "-mac", "HMAC", "-macopt", option, given=message)
    assert printed.split()[-1].decode() == sign_legacy(key, 1765200000, length)


def test_signature_in_capitals_is_the_same() -> None:
    signature = sign_legacy(KEY, int(NOW), 0).upper().encode()
    assert authenticator().verify(message_of(signature, b"%d" % NOW)).scheme == "legacy"


ODD_BYTES = [b"", b"\xff" * 64, "ü".encode() * 32, b"\0", b"0" * 64, b"0" * 100_000, b"0x12", b"-1"]


@pytest.mark.parametrize("signature", ODD_BYTES, ids=lambda b: repr(b)[:20])
@pytest.mark.parametrize(
    "timestamp", [b"1765200000", b"", b"\xff\xfe", "١٢٣".encode(), b"9" * 5000]
)
def test_odd_bytes_are_unauthorized_with_the_same_words(signature: bytes, timestamp: bytes) -> None:
    assert refusal(signature, timestamp) == refusal(b"0" * 64, b"1765200000")


@settings(max_examples=200)
@given(signature=st.binary(max_size=80), timestamp=st.binary(max_size=30))
def test_any_bytes_are_unauthorized_never_a_crash(signature: bytes, timestamp: bytes) -> None:
    assert "time" not in refusal(signature, timestamp)


@pytest.mark.parametrize("place", range(64))
def test_one_changed_digit_is_unauthorized(place: int) -> None:
    signature = sign_legacy(KEY, int(NOW), 0)
    other = "0" if signature[place] != "0" else "1"
    refusal((signature[:place] + other + signature[place + 1 :]).encode(), b"%d" % NOW)


@pytest.mark.parametrize(
    "text",
    [
        b"1765200000000",
        b"1765200000.0",
        b"1765200000.123",
        b"1765200000 ",
        b"+1765200000",
        b"1_765200000",
        b"",
        b"\xff\xfe",
        b"9" * 5000,
    ],
)
def test_signed_timestamp_in_another_form_learns_the_time(text: bytes) -> None:
    """A caller with the key is told as if its clock were off. A stranger is told nothing."""
    message = b"timestamp=%b, body_length=0" % text
    signature = hmac.new(KEY.encode(), message, hashlib.sha256).hexdigest().encode()
    detail = refusal(signature, text)
    assert f"the server's time is {int(NOW)}" in detail
    assert "whole Unix seconds" in detail
    assert refusal(b"0" * 64, text) == NOT_AUTHENTIC


@pytest.mark.parametrize("offset", [-WINDOW, -1, 0, 1, WINDOW])
def test_edges_of_the_window_are_inside(offset: int) -> None:
    at = int(NOW) + offset
    signature = sign_legacy(KEY, at, 7).encode()
    assert authenticator().verify(message_of(signature, b"%d" % at, 7)).key_id == "default"


@pytest.mark.parametrize("offset", [-WINDOW - 1, WINDOW + 1, -(10**9), 10**9])
def test_outside_the_window_the_signer_learns_the_time(offset: int) -> None:
    at = int(NOW) + offset
    detail = refusal(sign_legacy(KEY, at, 0).encode(), b"%d" % at)
    assert str(int(NOW)) in detail
    assert "2025-12-08T13:20:00Z" in detail


def test_outside_the_window_a_stranger_learns_nothing() -> None:
    inside = refusal(b"0" * 64, b"1765200000")
    outside = refusal(b"0" * 64, b"1")
    assert inside == outside


def test_signature_covers_the_body_length() -> None:
    refusal(sign_legacy(KEY, int(NOW), 10).encode(), b"%d" % NOW, length=11)


def test_each_of_several_keys_is_accepted_under_its_own_id() -> None:
    keys = {"default": KEY, "next": "n" * 32, "früher": "ü" * 16}
    verify = authenticator(keys).verify
    for key_id, secret in keys.items():
        signature = sign_legacy(secret, int(NOW), 3).encode()
        assert verify(message_of(signature, b"%d" % NOW, 3)).key_id == key_id


def test_key_that_is_not_configured_is_unauthorized() -> None:
    refusal(sign_legacy("another key, long enough", int(NOW), 0).encode(), b"%d" % NOW)


# --- sealed payloads ------------------------------------------------------------------------------


def independent_key(shared: str) -> bytes:
    """The payload key as openssl derives it."""
    options = ("digest:SHA256", f"hexkey:{shared.encode().hex()}", "info:handshake data")
    arguments = [part for option in options for part in ("-kdfopt", option)]
    return openssl("kdf", "-binary", "-keylen", "32", *arguments, "HKDF")


@needs_openssl
def test_openssl_derives_the_vectors_key() -> None:
    assert independent_key(SHARED).hex() == PAYLOAD["derived_key_hex"]


@pytest.mark.parametrize("case", PAYLOAD["cases"], ids=lambda c: c["iv_hex"])
def test_vector_payload_opens(case: dict[str, Any]) -> None:
    sealed = case.get("encrypted_payload") or case["encrypted_response"]
    assert PayloadBox(SHARED).open(sealed).decode() == case["plaintext"]


@needs_openssl
@pytest.mark.parametrize("shared", [SHARED, "geteiltes Geheimnis: ü"], ids=["base64", "utf-8"])
def test_sealed_payload_opens_with_the_independently_derived_key(shared: str) -> None:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    sealed = base64.b64decode(PayloadBox(shared).seal(b'{"a": 1}'), validate=True)
    aead = AESGCM(independent_key(shared))
    assert aead.decrypt(sealed[:12], sealed[12:], None) == b'{"a": 1}'


@needs_openssl
@pytest.mark.parametrize("plaintext", [b"{}", b'{"status":"created"}' * 20])
def test_openssl_reads_what_was_sealed(plaintext: bytes) -> None:
    """GCM's ciphertext is CTR's that begins at block 2 (NIST SP 800-38D section 7.1)."""
    sealed = base64.b64decode(PayloadBox("a shared secret of both").seal(plaintext))
    key = independent_key("a shared secret of both").hex()
    block = (sealed[:12] + (2).to_bytes(4, "big")).hex()
    read = openssl("enc", "-d", "-aes-256-ctr", "-K", key, "-iv", block, given=sealed[12:-16])
    assert read == plaintext


@pytest.mark.parametrize("case", PAYLOAD["cases"], ids=lambda c: c["iv_hex"])
def test_sealing_with_the_vectors_iv_gives_the_vectors_text(
    case: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wggw.secrets.token_bytes", lambda n: bytes.fromhex(case["iv_hex"]))
    sealed = case.get("encrypted_payload") or case["encrypted_response"]
    assert PayloadBox(SHARED).seal(case["plaintext"].encode()) == sealed


def test_every_seal_has_a_fresh_iv() -> None:
    box = PayloadBox(SHARED)
    ivs = {base64.b64decode(box.seal(b"same"))[:12] for _ in range(100)}
    assert len(ivs) == 100


def malformed(text: str) -> str:
    with pytest.raises(Malformed) as caught:
        PayloadBox(SHARED).open(text)
    return caught.value.detail


SEALED: str = PAYLOAD["cases"][0]["encrypted_payload"]


def test_every_flipped_byte_is_malformed_in_the_same_words() -> None:
    raw = base64.b64decode(SEALED)
    words = set()
    for place in range(len(raw)):
        garbled = raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]
        words.add(malformed(base64.b64encode(garbled).decode()))
    assert words == {
        "encrypted_payload does not decrypt: encrypt it with this gateway's GATEWAY_PUBLIC_KEY, as "
        "iv, ciphertext and tag in base64"
    }


def test_every_truncation_is_malformed() -> None:
    raw = base64.b64decode(SEALED)
    for length in range(len(raw)):
        malformed(base64.b64encode(raw[:length]).decode())


@pytest.mark.parametrize(
    "text",
    ["", "=", "ü", "\udcff", "====", SEALED + "\n", " " + SEALED, SEALED[:-1], SEALED + "AAAA"],
)
def test_text_that_is_no_strict_base64_is_malformed(text: str) -> None:
    malformed(text)


@given(text=st.text(st.characters(codec=None), max_size=60))
def test_any_text_is_malformed_never_a_crash(text: str) -> None:
    malformed(text)


# --- keys -----------------------------------------------------------------------------------------

# private, public: RFC 7748 section 6.1 (Alice, Bob) and section 5.2 (first iteration: u = 9)
RFC7748 = [
    (
        "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a",
        "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a",
    ),
    (
        "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb",
        "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f",
    ),
    (
        "0900000000000000000000000000000000000000000000000000000000000000",
        "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079",
    ),
]


@pytest.mark.parametrize(("private", "public"), RFC7748)
def test_public_key_of_rfc7748(private: str, public: str) -> None:
    assert x25519_public(bytes.fromhex(private)).hex() == public


@settings(max_examples=50, deadline=None)
@given(private=st.binary(min_size=32, max_size=32))
def test_public_key_is_the_cryptography_packages(private: bytes) -> None:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    public = X25519PrivateKey.from_private_bytes(private).public_key()
    assert x25519_public(private) == public.public_bytes(Encoding.Raw, PublicFormat.Raw)


@pytest.mark.skipif(shutil.which("wg") is None, reason="no wg program")
def test_made_key_is_one_that_wg_accepts_and_agrees_on() -> None:
    private = make_private_key()
    text = encode_key(private).encode()
    printed = subprocess.run(["wg", "pubkey"], input=text, capture_output=True, check=True).stdout
    assert decode_key(printed.decode().strip()) == x25519_public(private)


def test_made_keys_are_clamped_and_differ() -> None:
    keys = [make_private_key() for _ in range(100)]
    assert len(set(keys)) == 100
    assert all(k[0] & 7 == 0 and k[31] & 0xC0 == 0x40 for k in keys)


def key_file(path: Path) -> InterfaceSettings:
    return InterfaceSettings("WG", "wg0", {}, (51820,), 1420, str(path))


def test_absent_private_key_is_made_and_then_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "directory" / "privatekey"
    made = load_private_key(key_file(path))
    assert path.stat().st_mode & 0o777 == 0o600
    assert decode_key(path.read_text().strip()) == made == load_private_key(key_file(path))


@pytest.mark.parametrize(
    "content",
    [b"", b"secret-of-mine", b"\xff" * 44, b"A" * 44, b"A" * 42 + b"==", b"A" * 43 + b"=A"],
)
def test_file_without_a_key_is_refused_without_showing_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "privatekey"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=r"^WG_PRIVATE_KEY_FILE") as caught:
        load_private_key(key_file(path))
    assert not content or content.decode("latin-1") not in str(caught.value)
    assert path.read_bytes() == content


def test_private_key_path_that_cannot_be_used_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "key"):
        if path == tmp_path:
            path.chmod(0o700)
        with pytest.raises(ConfigError, match=r"^WG_PRIVATE_KEY_FILE"):
            load_private_key(key_file(path))


# --- files ----------------------------------------------------------------------------------------


# --- certificates ---------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make_certificate(str(cert), str(key), ["127.0.0.1", "::1", "vpn.example.org"])
    return cert, key


@needs_openssl
def test_certificate_is_valid_for_its_names_to_openssl(pair: tuple[Path, Path]) -> None:
    cert = str(pair[0])
    openssl("verify", "-CAfile", cert, "-verify_ip", "127.0.0.1", cert)
    openssl("verify", "-CAfile", cert, "-verify_ip", "::1", cert)
    openssl("verify", "-CAfile", cert, "-verify_hostname", "vpn.example.org", cert)
    with pytest.raises(subprocess.CalledProcessError):
        openssl("verify", "-CAfile", cert, "-verify_hostname", "other.example", cert)


def test_fingerprint_is_the_first_certificates_with_text_around(pair: tuple[Path, Path]) -> None:
    text = pair[0].read_text()
    bundle = pair[0].with_name("bundle.pem")
    bundle.write_text(f"Überschrift\n{text}\nmore words\n{text.replace('M', 'N')}")
    assert read_certificate(str(bundle)) == read_certificate(str(pair[0]))


def test_file_without_a_certificate_has_no_fingerprint(pair: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="no certificate"):
        read_certificate(str(pair[1]))
