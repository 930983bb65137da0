"""The bootable image of docs/RAM_BASED.md: built as written there, it boots and serves."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from harness import API_KEY, ROOT, wait_for
from objects import TOKEN, make_certificate
from vm import TREE, Guest, NotBuilt, kernel

# The time is for a build of the kernel; what boots has a deadline of its own.
pytestmark = [pytest.mark.vm, pytest.mark.timeout(2400)]

TEXT = (ROOT / "docs/RAM_BASED.md").read_text().split("## A bootable image")[1]
SCRIPT, INIT = re.findall(r"^```sh\n(.*?)^```", TEXT, re.M | re.S)
SETTINGS = {
    "GATEWAY_API_KEY": API_KEY,
    "WG_ENDPOINT": "192.0.2.1",
    "SNAPSHOT_URL": "https://192.0.2.9:8443/copy",
    "SNAPSHOT_TOKEN": TOKEN,
    "SNAPSHOT_KEY": "what-the-copy-is-encrypted-with",
    "SNAPSHOT_COPY_INTERVAL": "1",
}
# Makes the wire and what is at its other end (inside/world.py), then goes on as the image does.
FIRST = """\
#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LIBMOUNT_FORCE_MOUNT2=always
mount -t proc proc /proc; mount -t sysfs sys /sys
mkdir -p /host /tree
mount -t hostfs none /host -o {host}
mount -t hostfs none /tree -o ro,{tree}
ip netns add world
ip link add eth0 type veth peer name far netns world
ip -n world addr add 192.0.2.9/24 dev far
ip -n world link set far up
PYTHONDONTWRITEBYTECODE=1 ip netns exec world python3 /tree/tests/vm/inside/world.py &
exec /init
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        kernel()
    except NotBuilt as reason:
        pytest.skip(str(reason))
    for tool in ("debootstrap", "cpio"):
        if not shutil.which(tool):
            pytest.skip(f"needs {tool}")
    place = tmp_path_factory.mktemp("image")
    shutil.copy(ROOT / "wggw.py", place)
    (place / "image.sh").write_text(SCRIPT)
    (place / "init").write_text(INIT)
    done = subprocess.run(
        ["sh", "image.sh"], cwd=place, check=False, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return place / "initrd"


def with_the_world(image: Path, directory: Path, host: Path) -> Path:
    """The image, and behind it what is not part of it: the kernel unpacks one after the other.

    The kernel wants a cpio archive at a multiple of 4 bytes, and skips the zeros before it.
    """
    more = directory / "more"
    (more / "usr/lib/ssl").mkdir(parents=True)
    shutil.copy(make_certificate(host, "192.0.2.9")[0], more / "usr/lib/ssl/cert.pem")
    (more / "first").write_text(FIRST.format(host=host, tree=TREE))
    (more / "first").chmod(0o755)
    archive = subprocess.run(
        "find . | cpio -o -H newc --quiet", shell=True, cwd=more, check=True, capture_output=True
    )
    joined = directory / "initrd"
    first = image.read_bytes()
    joined.write_bytes(first + bytes(-len(first) % 4) + archive.stdout)
    return joined


def boot(guest: Guest, initrd: Path, *words: str) -> Any:
    """From power-on until the copy has everything; returns what the node came up with."""
    started = time.monotonic()
    address = "wggw.address=192.0.2.1/24"
    guest.boot(f"initrd={initrd}", "rdinit=/first", address, *words)

    def line(start: str) -> str:
        def found() -> Any:
            match = re.search(f"^{start}(.*)\n", guest.output() + "\n", re.M)
            assert match or guest.running(), guest.output()[-3000:]
            return match

        return str(wait_for(found, 300, f"{start!r} in:\n{guest.output()[-3000:]}")[1])

    ready = line("ready ")
    print(f"measured: serving {time.monotonic() - started:.1f} s after power-on; guest: {ready}")
    state = json.loads(line("state "))
    line("copied")
    guest.power_cut()
    return state


def test_a_node_with_nothing_but_this_image_serves_and_comes_back(
    tmp_path: Path, image: Path
) -> None:
    print(f"measured: image {image.stat().st_size / 1e6:.0f} MB")
    guest = Guest(tmp_path / "guest", kernel(), memory="512M")
    with guest:
        settings = "".join(f"{name}={value}\n" for name, value in SETTINGS.items())
        (guest.host / "node-1").write_text(settings)
        initrd = with_the_world(image, tmp_path, guest.host)
        first = boot(guest, initrd, "wggw.settings=http://192.0.2.9:8080/node-1")
        assert first["peers"] == {}
        words = [f"wggw.{name}={value}" for name, value in SETTINGS.items()]
        second = boot(guest, initrd, *words)
        assert len(second["peers"]) == 20 and second["key"] == first["key"]
