"""AmneziaWG's parameters on their way to an interface and back: netlink's three versions, UAPI.

The golden bytes are put together by hand from the module's header, not by wggw.py.
"""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import wggw
from wggw import (
    PLAIN,
    CodecError,
    GenericFamily,
    Obfuscation,
    Span,
    decode_awg_attribute,
    decode_genl_family,
    decode_uapi_device,
    decode_wg_device,
    encode_awg_attributes,
    encode_uapi_parameters,
)

KEY = bytes(range(1, 33))
FULL = Obfuscation(
    jc=4, jmin=40, jmax=70, s1=30, s2=50, s3=20, s4=16,
    h1=Span(0x11223344, 0x11223399), h2=Span(300, 400), h3=Span(500, 500), h4=Span(600, 2**32 - 1),
    i1="<b 0xc0ff>", i2="<r 10><t>", i3="", i4="", i5="<rc 7>",
    header_protection_key=KEY,
    content_padding_addition=Span(10, 100), rekey_after_time=Span(90, 120),
    rekey_timeout=Span(5, 5), reject_after_time=Span(170, 180), keepalive_timeout=Span(8, 12),
    max_handshake_attempts=Span(14, 20), random_trailers=True, disable_cookies=True,
)  # fmt: skip
OLD = Obfuscation(
    jc=4, jmin=40, jmax=70, s1=30, s2=50,
    h1=Span(10, 10), h2=Span(20, 20), h3=Span(30, 30), h4=Span(2**32 - 1, 2**32 - 1),
)  # fmt: skip


def hexed(text: str) -> bytes:
    return bytes.fromhex("".join(line.partition("#")[0] for line in text.splitlines()))


# length and type, payload, padding: little-endian as on the machines that wggw runs on
GOLDEN_SIZES = """
    0600 0900 0400 0000    # JC u16
    0600 0a00 2800 0000    # JMIN
    0600 0b00 4600 0000    # JMAX
    0600 0c00 1e00 0000    # S1
    0600 0d00 3200 0000    # S2
"""
GOLDEN_1 = hexed(
    GOLDEN_SIZES
    + """
    0800 0e00 0a000000     # H1 u32
    0800 0f00 14000000     # H2
    0800 1000 1e000000     # H3
    0800 1100 ffffffff     # H4
"""
)
GOLDEN_2 = hexed(
    GOLDEN_SIZES
    + """
    0600 1300 1400 0000    # S3
    0600 1400 1000 0000    # S4
    1800 0e00 3238373435343032302d32383734353431303500    # H1 "287454020-287454105"
    0c00 0f00 3330302d34303000                            # H2 "300-400"
    0800 1000 35303000                                    # H3 "500"
    1300 1100 3630302d3432393439363732393500 00           # H4 "600-4294967295"
    0f00 1500 3c6220307863306666 3e00 00                  # I1 "<b 0xc0ff>"
    0e00 1600 3c7220 31303e3c743e00 0000                  # I2 "<r 10><t>"
    0b00 1900 3c726320373e00 00                           # I5 "<rc 7>"
"""
)
GOLDEN_3 = hexed(
    GOLDEN_SIZES
    + """
    0600 1300 1400 0000
    0600 1400 1000 0000
    0c00 0e00 44332211 99332211    # H1 u64: the lower end in the lower half
    0c00 0f00 2c010000 90010000    # H2
    0c00 1000 f4010000 f4010000    # H3
    0c00 1100 58020000 ffffffff    # H4
    0f00 1500 3c6220307863306666 3e00 00
    0e00 1600 3c722031303e3c743e00 0000
    0b00 1900 3c726320373e00 00
    2400 1a00 0102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f20
    0800 1b00 0a00 6400            # CONTENT_PADDING_ADDITION 10-100
    0800 1c00 5a00 7800            # REKEY_AFTER_TIME 90-120
    0800 1d00 0500 0500            # REKEY_TIMEOUT 5
    0800 1e00 aa00 b400            # REJECT_AFTER_TIME 170-180
    0800 1f00 0800 0c00            # KEEPALIVE_TIMEOUT 8-12
    0800 2000 0e00 1400            # MAX_HANDSHAKE_ATTEMPTS 14-20
    0500 2100 01 000000            # RANDOM_TRAILERS u8
    0500 2200 01 000000            # DISABLE_COOKIES
"""
)
MIDDLE = FULL._replace(**{n: getattr(PLAIN, n) for n in Obfuscation._fields[16:]})
GOLDEN = [(1, OLD, GOLDEN_1), (2, MIDDLE, GOLDEN_2), (3, FULL, GOLDEN_3)]


@pytest.mark.parametrize(("version", "parameters", "data"), GOLDEN)
def test_netlink_sends_the_golden_bytes_of_each_version(
    version: int, parameters: Obfuscation, data: bytes
) -> None:
    assert encode_awg_attributes(parameters, PLAIN, version) == data


@pytest.mark.parametrize(("version", "parameters", "data"), GOLDEN)
def test_netlink_reads_the_golden_bytes_of_each_version(
    version: int, parameters: Obfuscation, data: bytes
) -> None:
    # an answer of the kernel: genl header, a port, a list of peers with a keepalive of version 3
    peer = hexed("2400 0100") + KEY + hexed("0800 0500 1900 1900")
    nested = struct.pack("=HH", 4 + len(peer), 0x8000) + peer
    peers = struct.pack("=HH", 4 + len(nested), 0x8008) + nested
    payload = bytes(4) + hexed("0600 0600 6cca 0000") + data + peers
    device, states = decode_wg_device([payload], GenericFamily(30, version, True))
    assert device == wggw.Device(b"", 51820, parameters)
    assert [state.peer.public_key for state in states] == [KEY]


def test_only_what_differs_is_sent() -> None:
    changed = FULL._replace(jc=5, i1="", header_protection_key=b"")
    expected = hexed("0600 0900 0500 0000  0500 1500 00 000000  2400 1a00") + bytes(32)
    assert encode_awg_attributes(changed, FULL, 3) == expected
    assert encode_awg_attributes(FULL, FULL, 3) == b""
    assert encode_uapi_parameters(FULL, FULL) == ""
    assert encode_uapi_parameters(changed, FULL) == (
        f"jc=5\ni1=\nheader_protection_key={'00' * 32}\n"
    )


def test_a_module_too_old_for_a_range_is_named() -> None:
    with pytest.raises(wggw.BackendError, match="H1: the kernel's AmneziaWG is too old"):
        encode_awg_attributes(FULL, PLAIN, 1)


def test_the_plain_family_reads_no_parameters() -> None:
    device, _ = decode_wg_device([bytes(4) + GOLDEN_3])
    assert device.obfuscation == PLAIN


def test_the_familys_version_decides() -> None:
    name = hexed("0e00 0200 616d6e657a696177670000 00")
    head, family_id, version = bytes(4), hexed("0600 0100 1d00 0000"), hexed("0800 0300 03000000")
    answer = head + name + family_id + version
    assert decode_genl_family([answer], "amneziawg") == GenericFamily(29, 3, True)
    assert decode_genl_family([answer], "wireguard") == GenericFamily(29, 3, False)
    for incomplete in (head + name + family_id, head + name + version, b""):
        with pytest.raises(CodecError):
            decode_genl_family([incomplete], "amneziawg")


@pytest.mark.parametrize("version", [1, 2, 3])
@given(name=st.sampled_from([*wggw.AWG_PARAMETERS]), data=st.binary(max_size=40))
def test_any_bytes_are_a_value_or_a_named_error(version: int, name: str, data: bytes) -> None:
    try:
        value = decode_awg_attribute(name, data, version)
    except CodecError as error:
        assert wggw.AWG_PARAMETERS[name].spelling in str(error)
    else:
        assert type(value) is type(getattr(PLAIN, name))


# --- UAPI -----------------------------------------------------------------------------------------

# What amneziawg-go prints: what is zero or empty is left out, keepalives may be ranges.
PRINTED = f"""private_key={"07" * 32}
listen_port=51821
fwmark=5
jc=4
jmin=40
jmax=70
s1=30
s2=50
s3=20
s4=16
h1=287454020-287454105
h2=300-400
h3=500
h4=600-4294967295
i1=<b 0xc0ff>
i2=<r 10><t>
i5=<rc 7>
header_protection_key={KEY.hex()}
content_padding_addition=10-100
rekey_after_time=90-120
rekey_timeout=5
reject_after_time=170-180
keepalive_timeout=8-12
max_handshake_attempts=14-20
random_trailers=true
disable_cookies=true
public_key={KEY.hex()}
preshared_key={"00" * 32}
protocol_version=1
endpoint=[2001:db8::1]:51820
last_handshake_time_sec=5
last_handshake_time_nsec=6
tx_bytes=7
rx_bytes=8
persistent_keepalive_interval=20-30
allowed_ip=10.0.2.2/32
errno=0
"""


def test_uapi_reads_all_that_amneziawg_go_prints() -> None:
    device, (state,) = decode_uapi_device([PRINTED.encode()])
    assert device == wggw.Device(b"\x07" * 32, 51821, FULL)
    assert (state.last_handshake, state.tx_bytes, state.rx_bytes) == (5, 7, 8)


def test_uapi_writes_what_it_reads() -> None:
    lines = encode_uapi_parameters(FULL, PLAIN)
    printed = PRINTED[PRINTED.index("jc=") : PRINTED.index("public_key=")]
    assert lines == printed
    assert decode_uapi_device([f"{lines}errno=0\n".encode()])[0].obfuscation == FULL


@pytest.mark.parametrize(
    "line",
    ["jc=x", "s1=-1", "h1=", "h1=5-4", "h1=4294967296", "random_trailers=maybe",
     "header_protection_key=00", "rekey_timeout=1-2-3"],
)  # fmt: skip
def test_a_bad_line_is_a_named_error(line: str) -> None:
    with pytest.raises(CodecError, match=line.split("=", maxsplit=1)[0]):
        decode_uapi_device([f"{line}\nerrno=0\n".encode()])


@pytest.mark.parametrize("generation", wggw.GENERATIONS)
def test_generated_parameters_survive_both_codecs(generation: str) -> None:
    for _ in range(20):
        wanted = wggw.generate_obfuscation(generation, "strong").parameters
        lines = encode_uapi_parameters(wanted, PLAIN)
        assert decode_uapi_device([f"{lines}errno=0\n".encode()])[0].obfuscation == wanted
        attributes = encode_awg_attributes(wanted, PLAIN, 3)
        family = GenericFamily(1, 3, True)
        assert decode_wg_device([bytes(4) + attributes], family)[0].obfuscation == wanted


# --- a rotation that fails ------------------------------------------------------------------------


class SpeakingBackend(wggw.MemoryBackend):
    """Remembers how it was set up; the next `failing` times fail."""

    def __init__(self) -> None:
        super().__init__()
        self.spoken: list[Any] = []
        self.failing = 0

    def setup(self, link: wggw.Link | None = None) -> None:
        if self.failing:
            self.failing -= 1
            raise wggw.BackendError("broken on purpose")
        if link is not None:
            self.spoken.append(link.obfuscation)


class FailingDisk(wggw.Disk):
    failing = False

    def fsync(self, handle: int) -> None:
        if self.failing:
            raise OSError(5, "broken on purpose")
        super().fsync(handle)


def a_gateway(path: Any, backend: SpeakingBackend, disk: wggw.Disk) -> wggw.Gateway:
    settings = {
        "GATEWAY_API_KEY": "k" * 32,
        "DB_PATH": str(path / "db"),
        "WG_INTERFACE": "",
        "AWG_INTERFACE": "awg0",
        "AWG_IPV4_SUBNET": "10.0.2.0/24",
    }
    config = wggw.load_config(settings, "/dev/null")
    store = wggw.Store(config.db_path, "commit", disk)
    store.recover()
    gateway = wggw.Gateway(config, store, lambda: 1_800_000_000.0)
    state = wggw.initial_obfuscation(None, store, "awg0")
    (row,) = wggw.interface_settings(config)
    link = wggw.make_link(row, bytes(range(32)), state.parameters)
    gateway.start([(row, link, backend)], state)
    return gateway


def spoken(gateway: wggw.Gateway) -> Any:
    return gateway.obfuscated().obfuscation


@pytest.mark.parametrize("fault", ["interface", "disk"])
def test_a_rotation_that_fails_leaves_interface_and_state_as_they_were(
    tmp_path: Any, fault: str
) -> None:
    backend, disk = SpeakingBackend(), FailingDisk()
    gateway = a_gateway(tmp_path, backend, disk)
    before = spoken(gateway)
    wanted = wggw.generate_obfuscation("1.0", "light")
    backend.failing = 1 if fault == "interface" else 0
    disk.failing = fault == "disk"
    with pytest.raises(wggw.Unavailable):
        gateway.change_obfuscation(wanted, confirmed=True)
    disk.failing = False
    assert spoken(gateway) == before
    assert gateway.store.meta("obfuscation") == before
    assert backend.spoken[-1] == before.parameters
    gateway.heal()
    assert gateway.degraded() == []
    assert gateway.change_obfuscation(wanted, confirmed=True) == 0
    assert backend.spoken[-1] == wanted.parameters
    gateway.store.close()
    again = a_gateway(tmp_path, SpeakingBackend(), wggw.Disk())
    assert spoken(again).parameters == wanted.parameters
    again.store.close()


def test_an_import_whose_parameters_the_interface_refuses_is_mended_by_its_setup(
    tmp_path: Any,
) -> None:
    for name in ("source", "target"):
        (tmp_path / name).mkdir()
    source = a_gateway(tmp_path / "source", SpeakingBackend(), wggw.Disk())
    image = source.export()
    backend = SpeakingBackend()
    gateway = a_gateway(tmp_path / "target", backend, wggw.Disk())
    backend.failing = 1
    with pytest.raises(wggw.Unavailable, match="imported, but the interface is not in line"):
        gateway.import_(image)
    with pytest.raises(wggw.BackendError):
        gateway.reconcile()
    assert gateway.degraded() and spoken(gateway) == spoken(source)
    gateway.supervise()
    assert gateway.degraded() == []
    assert backend.spoken[-1] == spoken(source).parameters
    for one in (source, gateway):
        one.store.close()


def test_peers_in_line_do_not_hide_a_rotation_whose_undoing_failed(tmp_path: Any) -> None:
    backend = SpeakingBackend()
    gateway = a_gateway(tmp_path, backend, wggw.Disk())
    before = spoken(gateway)
    backend.failing = 2
    with pytest.raises(wggw.Unavailable):
        gateway.change_obfuscation(wggw.generate_obfuscation("1.0", "light"), confirmed=True)
    with pytest.raises(wggw.BackendError):
        gateway.reconcile()
    assert gateway.degraded()
    gateway.supervise()
    assert gateway.degraded() == [] and backend.spoken[-1] == before.parameters
    gateway.store.close()
