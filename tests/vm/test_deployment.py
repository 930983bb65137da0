"""install.sh, the service and the host's network in guests of Debian 12 and 13, Ubuntu 24.04."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import ROOT
from vm import Guest, NotBuilt, image, kernel, pytest_inside, run_inside

# The time is for a build of kernel and disk; each boot has a deadline of its own.
pytestmark = [pytest.mark.vm, pytest.mark.timeout(2400)]


@pytest.fixture
def boot(tmp_path: Path) -> Iterator[Callable[[str], Guest]]:
    guests: list[Guest] = []

    def made(suite: str) -> Guest:
        try:
            guests.append(Guest(tmp_path / "guest", kernel(), image(suite)))
        except NotBuilt as reason:
            pytest.skip(str(reason))
        return guests[-1]

    yield made
    for guest in guests:
        guest.power_cut()


@pytest.mark.parametrize(
    ("suite", "settings"),
    [("bookworm", {}), ("trixie", {}), ("noble", {}), ("bookworm", {"UFW": "1"})],
    ids=["bookworm", "trixie", "noble", "bookworm-ufw"],
)
def test_from_a_clean_machine_to_a_clean_machine(
    boot: Callable[[str], Guest], suite: str, settings: dict[str, str]
) -> None:
    run_inside(boot(suite), "vm/inside/check_install.py", 1200, **settings)


def test_by_hand_and_with_drop_ins(boot: Callable[[str], Guest]) -> None:
    run_inside(boot("trixie"), "vm/inside/check_ways.py", 900)


PEERS = 20
CREATE = f"""
set -eu
/tree/install.sh --yes >/dev/null
for number in $(seq {PEERS}); do
  key=$(wg genkey | wg pubkey)
  wggw call POST /api/v1/configurations \\
    --data '{{"public_key": "'$key'", "protocol": "dual"}}' >/dev/null
done
wg show wg0 allowed-ips | sort >/root/before
wg show wg0 public-key >>/root/before
wc -l </root/before
"""
# A boot is from the disk and nothing else: no command brings the service up.
COMPARE = """
set -eu
for try in $(seq 300); do systemctl is-active -q wggw && break; sleep 0.2; done
systemctl is-active wggw
{ wg show wg0 allowed-ips | sort; wg show wg0 public-key; } >/root/after
diff /root/before /root/after
nft list table inet wggw | grep -c masquerade
sysctl -n net.ipv4.ip_forward net.ipv6.conf.all.forwarding
"""
# As documented, but for the loop around it: the job is the gateway, and ends with it.
[(UP, SERVE)] = re.findall(
    r"^(.* && )while ! (.*wggw.py serve); do", (ROOT / "docs/RAM_BASED.md").read_text(), re.M
)
START = f"{UP}exec {SERVE}"
# A node that has Python, one file and its settings in the environment, and a partition with state.
IN_MEMORY = """
set -eu
systemctl stop wggw
wggw net down
test ! -e /sys/class/net/wg0
mkdir /run/partition /run/empty /run/node
cp /var/lib/wggw/wireguard.db* /etc/wggw/privatekey /run/partition/
cp /tree/wggw.py /run/node/
cd /run/node
serve() {
  export GATEWAY_API_KEY=0123456789abcdef0123456789abcdef DB_PATH=$1/wireguard.db
  export WG_PRIVATE_KEY_FILE=$1/privatekey
  { START; } >log 2>&1 &
  for try in $(seq 300); do
    curl -skf --max-time 5 https://127.0.0.1:8000/readyz >/dev/null && return
    sleep 0.2
  done
  cat log
  return 1
}
serve /run/partition
{ wg show wg0 allowed-ips | sort; wg show wg0 public-key; } | diff /root/before -
nft list table inet wggw | grep -c masquerade
kill %1
wait %1
python3 wggw.py net down  # the next one has another database, and so another mark
serve /run/empty
test -z "$(wg show wg0 peers)"
key=$(wg genkey | wg pubkey)
python3 wggw.py call POST /api/v1/configurations --data '{"public_key": "'$key'"}'
test "$(wg show wg0 peers)" = "$key"
kill %1
wait %1
python3 wggw.py net down
""".replace("START", START)


def test_reboot_and_node_in_memory_bring_every_peer_back(boot: Callable[[str], Guest]) -> None:
    guest = boot("bookworm")
    first = guest.run(CREATE, 600)
    assert (first.status, first.output.split()) == (0, [str(PEERS + 1)]), first.output
    remote = pytest_inside("vm/inside/check_memory.py")
    second = guest.run(COMPARE + IN_MEMORY + remote, 900)
    assert second.status == 0, second.output
    assert second.output.split()[:4] == ["active", "2", "1", "1"], second.output
    assert '"status":"created"' in second.output.replace(" ", ""), second.output
    assert "1 passed" in second.output, second.output
