"""Inside the guest: what check_install.py leaves out, from a clean machine to a clean machine.

The commands by hand of docs/DEPLOYMENT.md, and what install.sh adds to the unit where it must.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from check_install import (
    ENV,
    IS_CURRENT,
    TREE,
    compiled,
    documented,
    install,
    main_pid,
    remains,
    run,
    sh,
)
from harness import wait_for

CLEAN = remains()


def test_commands_by_hand_make_what_install_sh_makes(tmp_path: Path) -> None:
    stub = tmp_path / "apt-get"  # the packages are here, the network is not
    stub.write_text("#!/bin/sh\n")
    stub.chmod(0o755)
    script = f"PATH={tmp_path}:$PATH; cd {TREE}; {documented('By hand', 'apt-get')}"
    done = run("bash", "-euc", script, seconds=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "API: answers: healthy" in done.stdout
    assert compiled() == [IS_CURRENT]
    done = install()
    assert done.returncode == 0, done.stderr
    assert "program and unit are up to date, and the service runs" in done.stdout
    done = install("--uninstall", "--purge")
    assert done.returncode == 0, done.stderr
    assert remains() == CLEAN


def capabilities() -> int:
    process = Path(f"/proc/{main_pid()}/status").read_text()
    return int(re.search(r"^CapEff:\s+(\w+)$", process, re.MULTILINE)[1], 16)  # type: ignore[index]


def test_low_port_and_userspace_amneziawg_get_their_drop_ins() -> None:
    sh("ufw", "--force", "enable")  # it has the second interface to let through as well
    options = ("--awg", "--api-port", "443")
    refused = install(*options)
    assert refused.returncode == 1
    assert "needs Amnezia's kernel module or amneziawg-go, and neither is here" in refused.stderr
    assert remains() == CLEAN
    program = Path("/usr/local/bin/amneziawg-go")
    shutil.copy(TREE / "tests/real/amneziawg_stand_in.py", program)
    program.chmod(0o755)
    Path("/dev/net/tun").chmod(0o666)  # as udev does, which does not run here
    done = install(*options, "--json")
    assert done.returncode == 0, done.stderr
    names = [interface["name"] for interface in json.loads(done.stdout)["interfaces"]]
    assert names == ["wg0", "awg0"]
    assert capabilities() == 1 << 12 | 1 << 10  # CAP_NET_ADMIN, CAP_NET_BIND_SERVICE
    assert "ufw route allow in on awg0 comment 'wggw'" in sh("ufw", "show", "added")
    status = json.loads(sh("wggw", "status", "--json", "--env-file", str(ENV)))
    assert {i["name"]: i["backend"] for i in status["interfaces"]} == {
        "wg0": "netlink",
        "awg0": "uapi",
    }
    index = Path("/sys/class/net/awg0/ifindex").read_text()
    sh("systemctl", "restart", "wggw")  # the program outlives it, and so do its tunnels
    assert Path("/sys/class/net/awg0/ifindex").read_text() == index
    doctor = run("wggw", "doctor", "--env-file", str(ENV))
    assert "amneziawg is missing; amneziawg-go does its work" in doctor.stdout
    assert doctor.returncode == 0, doctor.stdout
    ENV.write_text(ENV.read_text().replace("API_PORT=443", "API_PORT=8443"))
    done = install()
    assert done.returncode == 0, done.stderr
    assert capabilities() == 1 << 12
    assert Path("/sys/class/net/awg0/ifindex").read_text() == index
    done = install("--uninstall", "--purge")
    assert done.returncode == 0, done.stderr
    assert remains() == CLEAN
    assert run("ip", "link", "show", "awg0").returncode == 1
    assert "wggw" not in sh("ufw", "show", "added")
    wait_for(lambda: run("pgrep", "-f", str(program)).returncode == 1, 60, "amneziawg-go's end")
