#!/bin/bash
# Copyright (c) the wggw authors. Proprietary, all rights reserved: see LICENSE.
# Installs wggw on Debian or Ubuntu, as a service of systemd or in the foreground; upgrades and
# removes it. `./install.sh --help`.
set -euo pipefail
umask 022  # whatever the caller's: what the service reads is installed here, too

TREE=$(dirname "$(realpath "$0")")
readonly TREE
readonly ETC=/etc/wggw STATE=/var/lib/wggw
readonly ENV_FILE=$ETC/wggw.env
readonly LIB=/usr/local/lib/wggw LAUNCHER=/usr/local/sbin/wggw
readonly UNIT=/etc/systemd/system/wggw.service
readonly DROP_INS=$UNIT.d
readonly READY_SECONDS=60
readonly PYTHON=/usr/bin/python3  # the distribution's, whatever PATH has

# Packages by what shows that they are there already.
declare -A PACKAGE_OF=(
  ["command -v $PYTHON"]=python3
  ["$PYTHON -c 'import cryptography'"]=python3-cryptography
  ["command -v wg"]=wireguard-tools
  ["command -v ip"]=iproute2
  ["command -v curl"]=curl
  ["command -v openssl"]=openssl
)

mode=install dry_run='' yes='' json='' purge='' upgrade='' userspace='' first='' scratch=''
declare -A SETTING=()  # variable of the settings file -> value given by an option
undo=()  # what takes back the steps done so far, the last one last

usage() {
  cat <<END
Usage: sudo ./install.sh [OPTION]...

Installs what the gateway needs with apt (nothing is fetched when all of it is there), makes
$ENV_FILE unless it exists, and starts the service wggw. It shows each step, takes
back a first installation in which one fails, and asks the gateway for its status at the end.
Running it again brings program and unit up to date and changes nothing else.

  --foreground           no service: run the gateway in this terminal, without systemd
  --upgrade              like running it again, but only where wggw is installed
  --uninstall            remove the service, its rules, user and program; settings and data stay
  --purge                with --uninstall: settings, keys and data, too
  --json                 the result as JSON on standard output, all else on standard error
  --backend CIDR         may reach the API (ALLOWED_BACKENDS); may be given several times
  --endpoint HOST        public name or address of this gateway, for the clients (WG_ENDPOINT)
  --port N               UDP port of WireGuard (WG_DEFAULT_PORT; default 51820)
  --api-port N           TCP port of the API (API_PORT; default 8000)
  --extra-ports N,...    more UDP ports that lead to it (WG_EXTRA_PORTS)
  --awg                  an AmneziaWG interface awg0 beside it (AWG_INTERFACE)
  --interface NAME       WireGuard interface (WG_INTERFACE; default wg0)
  --ipv4-subnet CIDR     the tunnel's IPv4 subnet (WG_IPV4_SUBNET; default 10.0.1.0/24)
  --ipv6-subnet CIDR     the tunnel's IPv6 subnet (WG_IPV6_SUBNET; default fd42:4242:1::/64)
  --dry-run              show what would be done, change nothing
  --yes                  ask nothing
  --help                 this text

The gateway's settings are those of $ENV_FILE alone. A file that
exists is never changed: an option that contradicts it is refused.
Exit code: 1 when the installation fails; 2 for a wrong option; the gateway's with --foreground.
END
}

say() { printf '%s\n' "install.sh: $*"; }

die() {  # die CODE MESSAGE
  printf '%s\n' "install.sh: $2" >&2
  exit "$1"
}

run() {  # shows a command, then does it unless --dry-run was given
  say "+ $*"
  [[ $dry_run ]] || "$@"
}

parse_options() {
  while (($#)); do
    case $1 in
      --foreground) mode=foreground ;;
      --upgrade) upgrade=1 ;;
      --uninstall) mode=uninstall ;;
      --purge) purge=1 ;;
      --json) json=1 ;;
      --dry-run) dry_run=1 ;;
      --yes) yes=1 ;;
      --help | -h) usage && exit 0 ;;
      --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" && continue ;;
      --endpoint) take WG_ENDPOINT "$@" && shift ;;
      --backend) take_more ALLOWED_BACKENDS "$@" && shift ;;
      --extra-ports) take WG_EXTRA_PORTS "$@" && shift ;;
      --awg)
        SETTING[AWG_INTERFACE]=awg0
        SETTING[AWG_IPV4_SUBNET]=10.0.2.0/24
        SETTING[AWG_IPV6_SUBNET]=fd42:4242:2::/64
        ;;
      --port) take WG_DEFAULT_PORT "$@" && shift ;;
      --api-port) take API_PORT "$@" && shift ;;
      --interface) take WG_INTERFACE "$@" && shift ;;
      --ipv4-subnet) take WG_IPV4_SUBNET "$@" && shift ;;
      --ipv6-subnet) take WG_IPV6_SUBNET "$@" && shift ;;
      *) die 2 "unknown option $1 (see --help)" ;;
    esac
    shift
  done
  [[ ! $purge || $mode == uninstall ]] || die 2 "--purge goes with --uninstall"
  [[ ! $json || $mode == install ]] || die 2 "--json is for installing the service"
}

take_more() {  # like take, behind what was given before
  local before=${SETTING[$1]:-}
  take "$@"
  SETTING[$1]=${before:+$before,}$3
}

take() {  # take VARIABLE OPTION VALUE...: keeps a value that cannot break the settings file
  (($# >= 3)) || die 2 "$2 needs a value"
  [[ $3 =~ ^[][A-Za-z0-9.:/_=+,-]*$ ]] || die 2 "$2: '$3' has characters that cannot be right"
  SETTING[$1]=$3
}

# --- what the machine must be ---------------------------------------------------------------------

check_machine() {
  local id='' like=''
  if [[ -r /etc/os-release ]]; then
    # shellcheck disable=SC1091  # the distribution's own file
    read -r id like < <(. /etc/os-release && printf '%s %s\n' "${ID:-}" "${ID_LIKE:-}")
  fi
  [[ " $id $like " == *" debian "* || " $id $like " == *" ubuntu "* ]] ||
    die 1 "this is '${id:-unknown}': only Debian (12 or later) and Ubuntu (24.04 or later) are supported"
  [[ $EUID == 0 || $dry_run ]] || die 1 "must run as root: sudo ./install.sh"
  [[ $mode != install || -d /run/systemd/system || $dry_run ]] ||
    die 1 "systemd does not run here: use --foreground"
  [[ ! $upgrade || -e $UNIT ]] || die 1 "wggw is not installed here: leave --upgrade out"
}

# --- packages -------------------------------------------------------------------------------------

missing_packages() {
  local probe
  for probe in "${!PACKAGE_OF[@]}"; do
    eval "$probe" >/dev/null 2>&1 || printf '%s\n' "${PACKAGE_OF[$probe]}"
  done | sort
}

apt_install() {
  confirm "install $*"
  run apt-get update -q
  run env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$@"
}

confirm() {  # asks only where somebody can answer
  local answer
  [[ $yes || $dry_run || ! -t 0 ]] && return
  read -r -p "install.sh: about to $*. Go on? [Y/n] " answer
  [[ ${answer:-y} == [Yy]* ]] || die 1 "nothing was changed"
}

install_packages() {
  local -a missing
  mapfile -t missing < <(missing_packages)
  if ((${#missing[@]})); then
    apt_install "${missing[@]}"
  fi
  if [[ -x $PYTHON ]]; then
    $PYTHON -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      die 1 "$PYTHON is $($PYTHON --version), which is too old: Python 3.11 or later is needed"
  fi
}

# A kernel with WireGuard is best; wireguard-go does the same as a process.
install_wireguard() {
  if [[ $dry_run ]]; then
    say "would ask the kernel for a WireGuard interface; if it has none, wireguard-go is used"
    return
  fi
  ! kernel_has wireguard || return 0
  use_program wireguard-go WireGuard
  command -v wireguard-go >/dev/null || apt_install wireguard-go
}

# Nothing that the distributions have makes an AmneziaWG interface.
find_amneziawg() {
  wants_awg || return 0
  if [[ $dry_run ]]; then
    say "would ask the kernel for an AmneziaWG interface; if it has none, amneziawg-go is used"
    return
  fi
  ! kernel_has amneziawg || return 0
  use_program amneziawg-go AmneziaWG
  command -v amneziawg-go >/dev/null || die 1 "\
an AmneziaWG interface needs Amnezia's kernel module or amneziawg-go, and neither is here. Install
  the module: https://github.com/amnezia-vpn/amneziawg-linux-kernel-module (package amneziawg of ppa:amnezia/ppa)
  or the program: https://github.com/amnezia-vpn/amneziawg-go, built with Go, to /usr/local/bin/amneziawg-go"
}

wants_awg() {
  local name=${SETTING[AWG_INTERFACE]:-None}
  [[ ! -r $ENV_FILE ]] || name=$(setting AWG_INTERFACE 2>/dev/null) || name=None  # checked later on
  [[ $name != None ]]
}

kernel_has() {  # kernel_has KIND: whether it makes interfaces of this kind; it loads their module
  local answer
  [[ -e /sys/module/$1 ]] && return
  if answer=$(ip link add wggw-probe type "$1" 2>&1); then
    ip link delete wggw-probe
    return
  fi
  [[ $answer != *"not permitted"* ]] ||
    die 1 "network interfaces cannot be made here: CAP_NET_ADMIN is missing (docker: --cap-add NET_ADMIN)"
  return 1
}

use_program() {  # use_program NAME OF_WHAT
  say "the kernel has no $2: $1 is used"
  userspace=1
  [[ -c /dev/net/tun ]] ||
    die 1 "$1 needs /dev/net/tun, which is not there (modprobe tun; docker: --device /dev/net/tun)"
}

# --- settings -------------------------------------------------------------------------------------

# Runs Python code with the tree's wggw module and a clean environment: $1 is the code.
with_wggw() {
  env -i PATH="$PATH" PYTHONPATH="$TREE" PYTHONPYCACHEPREFIX="$scratch" $PYTHON -P -c "$@"
}

make_settings() {
  if [[ -e $ENV_FILE ]]; then
    say "$ENV_FILE exists and stays as it is"
    refuse_contradictions
    return
  fi
  local interface=${SETTING[WG_INTERFACE]:-wg0}
  ! ip link show dev "$interface" >/dev/null 2>&1 ||
    die 1 "interface $interface exists already, and the gateway would remove its peers: choose another with --interface NAME, or remove it (ip link delete $interface)"
  first=1
  [[ -e $ETC ]] || undo+=("rm -rf $ETC")
  [[ -e $STATE ]] || undo+=("rm -rf $STATE")
  run install -d -m 700 "$ETC" "$STATE"
  undo+=("rm -f $ENV_FILE")
  say "+ write $ENV_FILE (0600, with a random GATEWAY_API_KEY)"
  [[ $dry_run ]] || write_settings
}

write_settings() (
  umask 077
  trap 'rm -f "$ENV_FILE.new"' EXIT
  {
    echo "# Settings of wggw: README.md explains every one. They are read when the gateway starts."
    printf 'GATEWAY_API_KEY=%s\n' "$(openssl rand -hex 32)"
    echo "DB_PATH=$STATE/wireguard.db"
    echo "WG_PRIVATE_KEY_FILE=$ETC/privatekey"
    echo "TLS_CERT=$ETC/cert.pem"
    echo "TLS_KEY=$ETC/key.pem"
    [[ ${SETTING[WG_ENDPOINT]:-} ]] || echo "# WG_ENDPOINT=vpn.example.org"
    local name
    for name in "${!SETTING[@]}"; do
      echo "$name=${SETTING[$name]}"
    done | sort
  } >"$ENV_FILE.new"
  check_settings "$ENV_FILE.new"
  mv "$ENV_FILE.new" "$ENV_FILE"
)

check_settings() {  # a bad value ends in one line that names the variable, and exit code 2
  with_wggw '
import sys, wggw
try:
    wggw.load_config({}, sys.argv[1])
except wggw.ConfigError as error:
    sys.exit(print(f"install.sh: {error}", file=sys.stderr) or 2)' "$1"
}

refuse_contradictions() {
  local name value
  for name in "${!SETTING[@]}"; do
    value=$(with_wggw '
import sys, wggw
given = wggw.read_env_file(open(sys.argv[1]).read(), sys.argv[1])
defaults = {setting.name: setting.default for setting in wggw.SETTINGS}
print(given.get(sys.argv[2], defaults[sys.argv[2]]) or "")' "$ENV_FILE" "$name")
    [[ $value == "${SETTING[$name]}" ]] ||
      die 2 "$ENV_FILE has $name=$value and is never changed by install.sh: change it there to '${SETTING[$name]}', or leave the option out"
  done
}

# --- the gateway ----------------------------------------------------------------------------------

# Sets the variables that announce() shows, from the settings as the gateway understands them.
read_settings() {
  local values
  check_settings "$ENV_FILE"
  values=$(with_wggw '
import sys, wggw
config = wggw.load_config({}, sys.argv[1])
host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.api_host, config.api_host)
host = f"[{host}]" if ":" in host else host
both = config.wg_ipv4_subnet and config.wg_ipv6_subnet
print(f"https://{host}:{config.api_port}")
print("dual" if both else "ipv4" if config.wg_ipv4_subnet else "ipv6")
print(config.wg_interface)
print(config.wg_default_port)
print(config.wg_endpoint or "")
print(config.wg_private_key_file)
print(config.tls_cert)' "$ENV_FILE")
  { read -r url && read -r protocol && read -r interface && read -r port &&
    read -r endpoint && read -r private_key && read -r certificate; } <<<"$values"
}

# Waits until the gateway, process $$, is ready, and tells how to use it.
announce() {
  # The question is for loopback and holds no secret: the certificate need not be checked.
  until curl --silent --insecure --fail --max-time 2 --output /dev/null "$url/readyz"; do
    kill -0 $$ 2>/dev/null || return 0
    ((SECONDS < READY_SECONDS)) || die 1 "not ready after $READY_SECONDS s: the log above says why"
    sleep 0.2
  done
  local check="--cacert $certificate"
  # An operator's own certificate names the public host, not loopback.
  # shellcheck disable=SC2086  # two words
  curl --silent $check --output /dev/null "$url/healthz" || check=--insecure
  cat <<END

The gateway is ready. Ctrl-C stops it; tunnels stay up until: ip link delete $interface

  API             $url${endpoint:+ (its host from outside: $endpoint)}
  API key         GATEWAY_API_KEY in $ENV_FILE
  certificate     $certificate, SHA-256 fingerprint
                  $(openssl x509 -in "$certificate" -outform DER | openssl dgst -sha256 -r | cut -d' ' -f1)
  WireGuard       $interface, UDP port $port${endpoint:+, endpoint $endpoint}
  its public key  $(wg pubkey <"$private_key")

To create a peer, paste this into another terminal. Its private key goes to ./client.key.

END
  print_first_peer "$check"
}

print_first_peer() {  # print_first_peer CURL_OPTION_THAT_CHECKS_THE_CERTIFICATE
  echo "${SUDO_USER:+sudo }bash <<'END'"
  cat <<'END'
sign() {  # prints the two headers that sign a request with the body $1
  python3 - "$1" <<'PY'
import hashlib, hmac, re, sys, time
settings = open("/etc/wggw/wggw.env").read()
key = re.search(r"""(?m)^GATEWAY_API_KEY=["']?([^"'\n]+)""", settings)[1].encode()
now, size = int(time.time()), len(sys.argv[1].encode())
mac = hmac.new(key, b"timestamp=%d, body_length=%d" % (now, size), hashlib.sha256)
print(f"timestamp: {now}\nsignature: {mac.hexdigest()}")
PY
}
umask 077
public_key=$(wg genkey | tee client.key | wg pubkey)
END
  cat <<END
body='{"public_key": "'\$public_key'", "protocol": "$protocol"}'
curl $1 -H @<(sign "\$body") -H 'Content-Type: application/json' -d "\$body" \\
  -sS -w '\\n' $url/api/v1/configurations/
END
  echo END
}

serve() {
  local url protocol interface port endpoint private_key certificate
  say "+ $PYTHON $TREE/wggw.py serve --env-file $ENV_FILE"
  [[ $dry_run ]] && return
  read_settings
  cd "$STATE"
  rm -rf "$scratch"
  # In one write, so that no line of the gateway's log comes between the lines of the command.
  (text=$(announce) && printf '%s\n' "$text" &)
  # The gateway takes this process's place: signals and the exit code are its own.
  exec env -i PATH="$PATH" $PYTHON "$TREE/wggw.py" serve --env-file "$ENV_FILE"
}

# --- the service ----------------------------------------------------------------------------------

make_user() {
  ! getent passwd wggw >/dev/null || return 0
  undo+=("userdel wggw")
  run useradd --system --user-group --no-create-home --home-dir "$STATE" -s /usr/sbin/nologin wggw
}

# Keys and certificate, unless they are there; the service may read them and not change them.
make_secrets() {
  say "+ make WireGuard key and certificate unless they are there; give them to the user wggw"
  [[ $dry_run ]] && return
  local files path
  files=$(with_wggw '
import sys, wggw
config = wggw.load_config({}, sys.argv[1])
for settings in wggw.interface_settings(config):
    wggw.load_private_key(settings)
    print(settings.private_key_file)
wggw.make_tls(config)
print(config.tls_cert, config.tls_key, sep="\n")' "$ENV_FILE")
  chown root:wggw "$ETC"
  chmod 750 "$ETC"
  chown wggw:wggw "$ENV_FILE"
  chown -R wggw:wggw "$STATE"
  while read -r path; do
    if [[ $path == "$ETC"/* ]]; then chown wggw:wggw "$path"; fi
  done <<<"$files"
}

changed='' existed='' replaced=()

# place MODE SOURCE TARGET: copies a file unless it is there; what it replaces comes back if a
# later step fails. A former file that is there already says that a run was killed: what that one
# placed may not run yet.
place() {
  if [[ -e $3 && ! -e $3.before ]] && cmp -s "$2" "$3"; then return; fi
  changed=1
  if [[ -e $3 || -e $3.before ]]; then
    keep_former "$3"
    [[ -e $3.before ]] || run ln "$3" "$3.before"
  else
    undo+=("rm -f $3")
  fi
  run install -D -m "$1" "$2" "$3"
}

keep_former() {  # keep_former FILE: FILE.before comes back if a later step fails, and goes if none does
  replaced+=("$1.before")
  undo+=("mv -f $1.before $1")
}

place_text() {  # place_text MODE TARGET TEXT
  local file
  file=$(mktemp)
  printf '%s\n' "$3" >"$file"
  place "$1" "$file" "$2"
  rm -f "$file"
}

drop_in() {  # drop_in NAME NEEDED TEXT: a part of the unit, there as long as NEEDED is not empty
  local file=$DROP_INS/$1.conf
  if [[ $2 ]]; then
    place_text 644 "$file" "$3"
  elif [[ -e $file || -e $file.before ]]; then
    changed=1
    keep_former "$file"
    [[ ! -e $file ]] || run mv "$file" "$file.before"
  fi
}

# Python compiles what it imports once, and a script at each start; what it compiled of a script stays
# in memory, too. Whoever starts it as root after an upgrade of Python writes the new cache.
read -r -d '' LAUNCHER_TEXT <<END || true
#!$PYTHON -I
import os
import sys

sys.path.insert(0, "$LIB")
mask = os.umask(0o022)  # what root compiles here is for everybody
from wggw import main

os.umask(mask)
sys.exit(main())
END
readonly LAUNCHER_TEXT

install_files() {
  [[ ! -e $UNIT ]] || existed=1
  [[ -e $LIB ]] || undo+=("rm -rf $LIB")
  undo+=("rm -rf $LIB/__pycache__")
  place 755 "$TREE/wggw.py" "$LIB/wggw.py"
  place_text 755 "$LAUNCHER" "$LAUNCHER_TEXT"
  if [[ $changed ]]; then
    run rm -rf "$LIB/__pycache__"
    run env -i "$LAUNCHER" --version
  fi
  undo+=("systemctl daemon-reload")
  place 644 "$TREE/wggw.service" "$UNIT"
  [[ -e $DROP_INS ]] || undo+=("rm -rf $DROP_INS")
  [[ $dry_run && ! -r $ENV_FILE ]] || install_drop_ins
}

install_drop_ins() {
  local low='' port
  port=$(setting API_PORT)
  ((port >= 1024)) || low=1
  drop_in 50-port "$low" "# API_PORT is below 1024.
[Service]
CapabilityBoundingSet=CAP_NET_BIND_SERVICE
AmbientCapabilities=CAP_NET_BIND_SERVICE"
  drop_in 50-userspace "$userspace" "# The kernel lacks WireGuard or AmneziaWG: the service starts a program instead, which outlives it and
# so keeps the tunnels up, and whose socket is its own.
[Service]
KillMode=process
PrivateDevices=no
DeviceAllow=/dev/net/tun rw
RuntimeDirectory=wggw wireguard amneziawg
RuntimeDirectoryPreserve=yes"
}

setting() {  # the value of a setting as the gateway understands it
  with_wggw 'import sys, wggw
print(getattr(wggw.load_config({}, sys.argv[1]), sys.argv[2].lower()))' "$ENV_FILE" "$1"
}

start_service() {
  # Without a reload: a run that was killed may have placed a file that was not there before.
  if [[ ! $changed ]] && systemctl is-active -q wggw 2>/dev/null &&
    [[ $(systemctl show -P NeedDaemonReload wggw) != yes ]]; then
    say "program and unit are up to date, and the service runs"
    return
  fi
  if [[ $existed ]]; then
    undo=("systemctl restart --no-block wggw" "${undo[@]}")  # once all of the former version is back
    # Up to systemd 255 a restart by hand does not begin NRestarts anew, which verify looks at.
    run systemctl reset-failed wggw 2>/dev/null || true
  else
    undo+=("take_down" "systemctl disable -q --now wggw")
  fi
  run systemctl daemon-reload
  run systemctl enable -q wggw
  run systemctl restart --no-block wggw
}

take_down() {
  wggw_command net down || nft delete table inet wggw
}

verify() {
  say "+ wait until the service is ready, and ask it for its status"
  [[ $dry_run ]] && return
  local state answer text reason='' started=$SECONDS
  until state=$(systemctl is-active wggw); [[ $state == active ]]; do
    text=$(systemctl show -P StatusText wggw)
    reason=${text:-$reason}
    # Restarted again and again: it is not going to be ready.
    if [[ $state == failed || $(systemctl show -P NRestarts wggw) -ge 3 ]] ||
      ((SECONDS - started > READY_SECONDS)); then
      die 1 "the service does not come up ($state): ${reason:-journalctl -u wggw says why}"
    fi
    sleep 0.2
  done
  answer=$(wggw_command call GET /api/v1/server/status) || die 1 "it does not answer: $answer"
  [[ $answer == *'"status":"healthy"'* ]] || die 1 "it is not healthy: $answer"
  wggw_command net show || say "the lines marked WRONG above need a hand"
}

wggw_command() {
  local -a program=("$LAUNCHER")
  [[ -x $LAUNCHER ]] || program=("$PYTHON" -I "$TREE/wggw.py")
  env -i PATH="$PATH" "${program[@]}" "$@" --env-file "$ENV_FILE"
}

tell() {  # what a backend needs; the API key only when it has just been made
  with_wggw '
import json, sys, wggw
env_file, first, as_json, host = sys.argv[1:]
config = wggw.load_config({}, env_file)
host = config.wg_endpoint or host or "127.0.0.1"
host = f"[{host}]" if ":" in host.strip("[]") and not host.startswith("[") else host
interfaces = [
    {
        "name": each.name,
        "public_key": wggw.encode_key(wggw.x25519_public(wggw.load_private_key(each))),
        "endpoint": wggw.endpoint(config.wg_endpoint, each.ports[0]),
        "ports": list(each.ports),
    }
    for each in wggw.interface_settings(config)
]
result = {
    "api_url": f"https://{host}:{config.api_port}",
    "api_key": config.gateway_api_key if first else None,
    "certificate_sha256": wggw.certificate_fingerprint(config.tls_cert),
    "interfaces": interfaces,
    "settings": env_file,
}
if as_json:
    print(json.dumps(result, indent=2))
    sys.exit()
key = result["api_key"] or f"GATEWAY_API_KEY in {env_file}"
print("\nThe gateway is ready (systemctl status wggw). Its backend needs:\n")
print("  API                ", result["api_url"])
print("  API key            ", key)
print("  certificate SHA-256", result["certificate_sha256"])
for each in interfaces:
    print("  WireGuard          ", each["name"], "public key", each["public_key"])
    ports = ", ".join(map(str, each["ports"]))
    print("                     ", f"UDP port {ports}, endpoint", each["endpoint"] or "not set")
' "$ENV_FILE" "$first" "$json" "$(hostname -I 2>/dev/null | cut -d' ' -f1)" >&3
}

# On any end that is not success: takes back what this run did, last step first.
take_back() {
  local status=$? step
  trap - EXIT
  trap '' HUP INT PIPE TERM
  set +e  # whatever fails from here on, such as a line to a terminal that is gone
  rm -rf "$scratch"
  if ((status)) && ((${#undo[@]})) && [[ ! $dry_run ]]; then
    say "failed: taking back what was done"
    while ((${#undo[@]})); do
      step=${undo[-1]}
      unset 'undo[-1]'
      say "+ $step"
      $step
    done
  fi
  exit "$status"
}

install_service() {
  make_user
  make_settings
  check_settings_file
  make_secrets
  install_files
  start_service
  verify
  undo=()
  ((!${#replaced[@]})) || run rm -f "${replaced[@]}"
  [[ $dry_run ]] || tell
}

check_settings_file() { [[ $dry_run && ! -r $ENV_FILE ]] || check_settings "$ENV_FILE"; }

remove_user() {
  for _ in {1..20}; do  # a userspace WireGuard ends a moment after its interface
    ! userdel wggw 2>/dev/null || return 0
    sleep 0.1
  done
  userdel wggw
}

uninstall() {
  local -a kept
  confirm "remove wggw${purge:+ with its settings, keys and data}"
  if [[ -e $UNIT ]]; then
    run systemctl disable -q --now wggw
  fi
  # Settings that are broken or gone do not matter: `net down` then goes by what is there.
  if [[ -e $UNIT || -e $LIB || -e $ENV_FILE ]]; then
    run take_down || say "interface, nftables table inet wggw or ufw's rules may be left: see above"
  fi
  run rm -rf "$UNIT" "$UNIT.before" "$DROP_INS" "$LIB" "$LAUNCHER" "$LAUNCHER.before"
  [[ ! -d /run/systemd/system ]] || run systemctl daemon-reload
  if getent passwd wggw >/dev/null; then
    run remove_user
  fi
  if [[ $purge ]]; then
    run rm -rf "$ETC" "$STATE"
  elif [[ -e $ETC || -e $STATE ]]; then
    mapfile -t kept < <(find "$ETC" "$STATE" -maxdepth 0 2>/dev/null)
    run chown -R root:root "${kept[@]}"
    say "settings and data stay in ${kept[*]} (--purge removes them)"
  fi
  say "removed"
}

main() {
  parse_options "$@"
  scratch=$(mktemp -d)  # what Python compiles of the tree
  trap take_back EXIT
  # Without these the status that take_back sees after a signal may be 0.
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 141' PIPE
  trap 'exit 143' TERM
  exec 3>&1
  [[ ! $json ]] || exec >&2
  check_machine
  if [[ $mode == uninstall ]]; then
    uninstall
    return
  fi
  [[ $mode == foreground ]] || PACKAGE_OF["command -v nft"]=nftables
  install_packages
  install_wireguard
  find_amneziawg
  if [[ $mode == foreground ]]; then
    make_settings
    serve
  else
    install_service
  fi
}

main "$@"
