#!/bin/bash
# Copyright (c) the wggw authors. Proprietary, all rights reserved: see LICENSE.
# Installs wggw on Debian or Ubuntu, as a systemd service or in the foreground; upgrades and removes
# it. See `./install.sh --help`.

# With `sh install.sh` the script starts itself again with bash; other shells run only these lines.
if [ -z "${BASH_VERSION:-}" ]; then
  [ ! -f "$0" ] || exec bash "$0" "$@"
  echo "install.sh: needs bash: cat install.sh | bash -s -- --help" >&2
  exit 1
fi
set -euo pipefail
umask 022  # the service must be able to read what is installed here
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin  # after `su` without - these are missing

# A script that bash reads from a pipe has no path: then the tree is the working directory.
TREE=$(dirname "$(realpath "${BASH_SOURCE[0]:-./install.sh}")")
readonly TREE
readonly ETC=/etc/wggw STATE=/var/lib/wggw
readonly ENV_FILE=$ETC/wggw.env
readonly LIB=/usr/local/lib/wggw LAUNCHER=/usr/local/sbin/wggw
readonly UNIT=/etc/systemd/system/wggw.service
readonly DROP_INS=$UNIT.d
readonly READY_SECONDS=60
readonly PLAIN='[][A-Za-z0-9.:/_=+,-]*'  # values that need no quotes in the settings file
readonly PYTHON=/usr/bin/python3  # always the distribution's, which has python3-cryptography
COMMAND="$PYTHON $(printf %q "$TREE/wggw.py")"  # as it can be typed
readonly COMMAND

# Packages by the command that succeeds if the package is installed.
declare -A PACKAGE_OF=(
  ["command -v $PYTHON"]=python3
  ["$PYTHON -c 'import cryptography'"]=python3-cryptography
  ["command -v wg"]=wireguard-tools
  ["command -v ip"]=iproute2
  ["command -v curl"]=curl
  ["command -v openssl"]=openssl
  ["command -v nft"]=nftables
)

mode=install dry_run='' yes='' json='' purge='' upgrade='' userspace='' awg='' first='' already_up='' key_file=''
declare -A SETTING=()  # variable of the settings file -> value given by an option
implied=()  # those that --awg gives, because no other option does
changed='' existed='' replaced=()
undo=()  # commands that undo the steps done so far; they run in reverse order

usage() {
  cat <<END
Usage: sudo ./install.sh [OPTION]...

Installs the packages that the gateway needs with apt (if some are missing), writes
$ENV_FILE unless it exists, and starts the service wggw. It shows each step and
asks the gateway for its status at the end. If a step fails, it undoes what this run did.
Running it again brings program and unit up to date and changes nothing else.

  --foreground           no service: run the gateway in this terminal, without systemd
  --upgrade              like running it again, but only if wggw is installed
  --uninstall            remove the service, its rules, user and program; settings and data stay
  --purge                with --uninstall: remove settings, keys and data, too
  --json                 print the result as JSON on standard output, all else on standard error
  --backend CIDR         allow this network to reach the API (ALLOWED_BACKENDS); repeat for more
  --endpoint HOST        public name or address of this gateway, for the clients (WG_ENDPOINT)
  --port N               UDP port of WireGuard (WG_DEFAULT_PORT; default 51820)
  --api-port N           TCP port of the API (API_PORT; default 8000)
  --extra-ports N,...    more UDP ports that are redirected to WireGuard's (WG_EXTRA_PORTS)
  --limit-ssh PORT       allow an address six new connections to this TCP port in thirty
                         seconds (LIMIT_SSH)
  --awg                  make an AmneziaWG interface awg0, too (AWG_INTERFACE)
  --interface NAME       WireGuard interface (WG_INTERFACE; default wg0)
  --ipv4-subnet CIDR     the tunnel's IPv4 subnet (WG_IPV4_SUBNET; default 10.0.1.0/24)
  --ipv6-subnet CIDR     the tunnel's IPv6 subnet (WG_IPV6_SUBNET; default fd42:4242:1::/64)
  --key-file FILE        read the API key (GATEWAY_API_KEY) from FILE; without this option the
                         first installation makes a key and prints it
  --set NAME=VALUE       any other setting that is not a secret; repeat for more
  --dry-run              show what would be done, change nothing
  --yes                  do not ask
  --help                 show this text

The gateway reads its settings only from $ENV_FILE. If this file exists,
install.sh changes only the settings for which an option is given.
Exit code: 1 if the installation fails; 2 for a wrong option; the gateway's with --foreground.
END
}

say() { printf '%s\n' "install.sh: $*"; }

die() {  # die CODE MESSAGE
  printf '%s\n' "install.sh: $2" >&2
  exit "$1"
}

run() {  # shows a command, then runs it unless --dry-run was given
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
      --key-file)
        [[ -r ${2:-} && ! -d $2 ]] || die 2 "--key-file: '${2:-}' is not a file that can be read"
        key_file=$2 && shift
        ;;
      --limit-ssh) take LIMIT_SSH "$@" && shift ;;
      --set)
        [[ ${2:-} =~ ^([A-Z0-9_]+)=([[:print:]]*)$ && ${2#*=} != *\'* ]] ||
          die 2 "--set needs NAME=VALUE, the name of a setting and a value without '"
        SETTING[${BASH_REMATCH[1]}]=${BASH_REMATCH[2]} && shift
        ;;
      --awg) awg=1 ;;
      --port) take WG_DEFAULT_PORT "$@" && shift ;;
      --api-port) take API_PORT "$@" && shift ;;
      --interface) take WG_INTERFACE "$@" && shift ;;
      --ipv4-subnet) take WG_IPV4_SUBNET "$@" && shift ;;
      --ipv6-subnet) take WG_IPV6_SUBNET "$@" && shift ;;
      *) die 2 "unknown option $1 (see --help)" ;;
    esac
    shift
  done
  if [[ $awg ]]; then
    imply AWG_INTERFACE awg0
    imply AWG_IPV4_SUBNET 10.0.2.0/24
    imply AWG_IPV6_SUBNET fd42:4242:2::/64
  fi
  [[ ! $purge || $mode == uninstall ]] || die 2 "--purge needs --uninstall"
  [[ ! $json || $mode == install ]] || die 2 "--json works only for installing the service: leave it out"
}

imply() {  # imply VARIABLE VALUE
  [[ ! -v SETTING[$1] ]] || return 0
  SETTING[$1]=$2
  implied+=("$1")
}

take_more() {  # like take, but appends to the values of earlier options
  local before=${SETTING[$1]:-}
  take "$@"
  SETTING[$1]=${before:+$before,}$3
}

take() {  # take VARIABLE OPTION VALUE...: keeps VALUE if it is safe in the settings file
  (($# >= 3)) || die 2 "$2 needs a value"
  [[ $3 =~ ^$PLAIN$ ]] || die 2 "$2: '$3' has characters that no value of this option has"
  SETTING[$1]=$3
}

# --- requirements of the machine ------------------------------------------------------------------

check_machine() {
  local id='' like=''
  if [[ -r /etc/os-release ]]; then
    # shellcheck disable=SC1091  # the distribution's own file
    read -r id like < <(. /etc/os-release && printf '%s %s\n' "${ID:-}" "${ID_LIKE:-}")
  fi
  [[ " $id $like " == *" debian "* || " $id $like " == *" ubuntu "* ]] ||
    die 1 "the distribution is '${id:-unknown}': only Debian (12 or later) and Ubuntu (24.04 or later) are supported"
  [[ $EUID == 0 || $dry_run ]] || die 1 "must run as root: sudo ./install.sh"
  [[ $mode != install || -d /run/systemd/system || $dry_run ]] ||
    die 1 "systemd does not run here: use --foreground"
  [[ ! $upgrade || -e $UNIT ]] || die 1 "wggw is not installed here: run it without --upgrade"
  [[ -r $TREE/wggw.py ]] || die 1 "wggw.py is not in $TREE: run install.sh in the directory of wggw.py"
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

confirm() {  # asks only if a person can answer
  local answer
  [[ $yes || $dry_run || ! -t 0 ]] && return
  read -r -p "install.sh: about to $*. Continue? [Y/n] " answer
  [[ ${answer:-y} == [Yy]* ]] || die 1 "stopped: it did not $*"
}

install_packages() {
  local -a missing
  mapfile -t missing < <(missing_packages)
  if ((${#missing[@]})); then
    apt_install "${missing[@]}"
  fi
  if [[ -x $PYTHON ]]; then
    $PYTHON -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      die 1 "$PYTHON is $($PYTHON --version), which is too old: install Python 3.11 or later"
  fi
}

# Without WireGuard in the kernel, the gateway uses wireguard-go.
install_wireguard() {
  if [[ $dry_run ]]; then
    say "would ask the kernel for a WireGuard interface, and use wireguard-go if it has none"
    return
  fi
  ! kernel_has wireguard || return 0
  use_program wireguard-go WireGuard
  command -v wireguard-go >/dev/null || apt_install wireguard-go
}

# The distributions have no package for AmneziaWG, so it must be installed already.
find_amneziawg() {
  wants_awg || return 0
  if [[ $dry_run ]]; then
    say "would ask the kernel for an AmneziaWG interface, and use amneziawg-go if it has none"
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
  local name=None
  if [[ -v SETTING[AWG_INTERFACE] ]]; then
    name=${SETTING[AWG_INTERFACE]:-None}
  elif [[ -r $ENV_FILE ]]; then
    name=$(setting AWG_INTERFACE 2>/dev/null) || name=None  # check_settings reports a bad file
  fi
  [[ $name != None ]]
}

kernel_has() {  # kernel_has KIND: whether the kernel makes such interfaces; it loads the module
  local answer
  [[ -e /sys/module/$1 ]] && return
  if answer=$(ip link add wggw-probe type "$1" 2>&1); then
    ip link delete wggw-probe
    return
  fi
  [[ $answer != *"not permitted"* ]] ||
    die 1 "this process may not make network interfaces: CAP_NET_ADMIN is missing (docker: --cap-add NET_ADMIN)"
  return 1
}

use_program() {  # use_program PROGRAM PRODUCT
  say "the kernel has no $2: the gateway will use $1"
  userspace=1
  [[ -c /dev/net/tun ]] ||
    die 1 "$1 needs /dev/net/tun, which is missing (modprobe tun; docker: --device /dev/net/tun)"
}

# --- settings -------------------------------------------------------------------------------------

# A dry run on a host without Python shows no more than it can know.
lacks_python() { [[ $dry_run && ! -x $PYTHON ]]; }

# Compiles the tree's program into an unlinked file with descriptor 4: it vanishes with this script,
# however that ends.
compile_program() {
  local file
  ! lacks_python || return 0
  file=$(mktemp)
  exec 4<>"$file"
  rm "$file"
  $PYTHON -c '
import marshal, sys
with open(sys.argv[1], "rb") as source:
    marshal.dump(compile(source.read(), sys.argv[1], "exec"), sys.stdout.buffer)' "$TREE/wggw.py" >&4
}

# with_wggw CODE ARGUMENT...: runs Python code with the tree's program as module wggw, a function
# `read`, and an empty environment. A StartError, such as that of a bad setting, ends the script with
# one line and the error's exit code.
with_wggw() {
  ! lacks_python || return 0
  local code="import marshal, sys, types
wggw = sys.modules['wggw'] = types.ModuleType('wggw')
with open('/proc/self/fd/4', 'rb') as program:
    exec(marshal.load(program), wggw.__dict__)
def read(path):
    try:
        with open(path, encoding='utf-8') as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise wggw.ConfigError(f'{path}: cannot be read: {error}') from None
try:
    exec(sys.argv.pop(1))
except wggw.StartError as error:
    sys.exit(print(f'install.sh: {error}', file=sys.stderr) or error.code)"
  env -i PATH="$PATH" $PYTHON -I -c "$code" "$@"
}

make_settings() {
  local directory
  for directory in "$ETC" "$STATE"; do
    [[ ! -e $directory ]] || continue
    undo+=("rm -rf $directory")
    run install -d -m 700 "$directory"
  done
  if [[ -e $ENV_FILE ]]; then
    change_settings
    return
  fi
  [[ $key_file ]] || first=1
  undo+=("rm -f $ENV_FILE")
  choose_subnets
  say "+ write $ENV_FILE (0600, with ${key_file:+the GATEWAY_API_KEY of }${key_file:-a random GATEWAY_API_KEY})"
  [[ $dry_run ]] || write_settings
}

# Replaces default subnets that overlap a network of the host, and leaves IPv6 out if the host has
# none. A subnet that an option names is never replaced: check_settings refuses it if it does not fit.
choose_subnets() {
  local name was value found chosen=''
  for name in "${!SETTING[@]}"; do chosen+="$name=${SETTING[$name]}"$'\n'; done
  found=$(with_wggw '
import dataclasses, sys, wggw
given = dict(line.split("=", 1) for line in sys.argv[2].splitlines())
try:
    config = wggw.load_config(given, "/dev/null", key_needed=False)
except wggw.StartError:  # check_settings reports it
    sys.exit()
host = wggw.Host(dataclasses.replace(config, env_file=sys.argv[1]), wggw.Store())
taken = host.networks()
for tunnel in host.tunnels:
    for family, subnet in tunnel.subnets.items():
        name = f"{tunnel.prefix}_{family.upper()}_SUBNET"
        if name in given and name not in sys.argv[3:]:
            continue
        free = wggw.free_subnet(subnet, taken)
        taken.append((free, tunnel.name))
        if family == "ipv6" and len(tunnel.subnets) > 1 and wggw.ipv6_fault(tunnel):
            print(name, subnet, "")
        elif free != subnet:
            print(name, subnet, free)' "$ENV_FILE" "$chosen" "${implied[@]}") || exit $?
  while read -r name was value; do
    [[ $name ]] || continue
    SETTING[$name]=$value
    if [[ $value ]]; then
      say "$was overlaps a network of this host: $name=$value is used instead"
    else
      say "IPv6 is switched off on this host: $name stays empty"
    fi
  done <<<"$found"
}

write_settings() (
  umask 077
  trap 'rm -f "$ENV_FILE.new"' EXIT
  if [[ $(host_address) == *:* ]]; then
    : "${SETTING[API_HOST]=::}"
  fi
  local name key
  if [[ $key_file ]]; then
    key=$(with_wggw 'print(read(sys.argv[1]).strip())' "$key_file")
  else
    key=$(openssl rand -hex 32)
  fi
  {
    echo "# Settings of wggw: docs/SETTINGS.md explains every one. They are read when the gateway starts."
    assignment GATEWAY_API_KEY "$key"
    echo "DB_PATH=$STATE/wireguard.db"
    echo "WG_PRIVATE_KEY_FILE=$ETC/privatekey"
    echo "TLS_CERT=$ETC/cert.pem"
    echo "TLS_KEY=$ETC/key.pem"
    [[ ${SETTING[WG_ENDPOINT]:-} ]] || echo "# WG_ENDPOINT=vpn.example.org"
    for name in "${!SETTING[@]}"; do
      assignment "$name" "${SETTING[$name]}"
    done | sort
  } >"$ENV_FILE.new"
  check_settings "$ENV_FILE.new"
  mv "$ENV_FILE.new" "$ENV_FILE"
)

host_address() {  # the address from which the host reaches others, IPv4 if it has one
  with_wggw 'print(next(wggw.host_addresses(), ""))'
}

# check_settings FILE: a bad value, or an interface that belongs to another program, ends the script
# with one line that names the setting, and exit code 2.
check_settings() {
  with_wggw '
import dataclasses
config = dataclasses.replace(wggw.load_config({}, sys.argv[1]), env_file=sys.argv[2])
wggw.claim_interfaces(config, wggw.load_whole(config)[0])' "$1" "$ENV_FILE"
}

# Refuses unknown names after --set, and secrets: every user can read arguments.
check_names() {
  ((${#SETTING[@]})) || return 0
  with_wggw '
settings = {setting.name: setting.secret for setting in wggw.SETTINGS}
for name in sys.argv[1:]:
    if settings.get(name, True):
        why = "this is a secret, and every user can read arguments: write it into the settings file"
        why = why if name in settings else "there is no such setting: see docs/SETTINGS.md"
        sys.exit(print(f"install.sh: --set {name}: {why}", file=sys.stderr) or 2)' "${!SETTING[@]}"
}

assignment() {  # assignment NAME VALUE: prints the line for the settings file
  local value=$2
  [[ $value =~ ^$PLAIN$ ]] || value="'$value'"
  printf '%s=%s\n' "$1" "$value"
}

# Writes the settings from options into the existing file, and changes nothing else in it. --awg
# changes nothing where an AmneziaWG interface is, and no subnet that the file has.
change_settings() {
  local -a lines=()
  local name told
  for name in "${!SETTING[@]}"; do
    lines+=("$(assignment "$name" "${SETTING[$name]}")")
  done
  rm -f "$ENV_FILE.new"  # left by a run that was killed
  told=$(umask 077 && with_wggw '
import re
path, key_file, dry_run, implied, *lines = sys.argv[1:]
text = before = read(path)
there = wggw.read_env_file(text, path)
defaults = {setting.name: setting.default or "" for setting in wggw.SETTINGS}
given = [(line, *wggw.read_env_file(line, "").popitem()) for line in lines]
if key_file:
    key = read(key_file).strip()
    given.append((f"GATEWAY_API_KEY={chr(39)}{key}{chr(39)}", "GATEWAY_API_KEY", key))
for line, name, value in given:
    if name in implied.split() and (there.get("AWG_INTERFACE") or name in there and name[-6:] == "SUBNET"):
        continue
    if value != (was := there.get(name, defaults[name])):
        text = re.sub(rf"(?m)^[ \t]*(?:export[ \t]+)?{name}[ \t]*=.*\n?", "", text)
        text = text.rstrip("\n") + f"\n{line}\n"
        shown = f"{name} of {key_file}" if name == "GATEWAY_API_KEY" else f"{line} (was: {was or None})"
        print(f"install.sh: change {path}: {shown}")
if text == before:
    print(f"install.sh: {path} exists and stays as it is")
elif not dry_run:
    open(f"{path}.new", "w", encoding="utf-8").write(text)' \
    "$ENV_FILE" "$key_file" "$dry_run" "${implied[*]}" "${lines[@]}")
  [[ ! $told ]] || printf '%s\n' "$told"
  [[ $told == *" stays as it is" ]] || changed=1
  if [[ -e $ENV_FILE.new ]]; then
    undo+=("rm -f $ENV_FILE.new")
    check_settings "$ENV_FILE.new"
    chown --reference="$ENV_FILE" "$ENV_FILE.new"
    chmod --reference="$ENV_FILE" "$ENV_FILE.new"
    [[ -e $ENV_FILE.before ]] || run ln "$ENV_FILE" "$ENV_FILE.before"
  fi
  if [[ -e $ENV_FILE.before && ! $dry_run ]]; then
    changed=1
    keep_former "$ENV_FILE"
    [[ ! -e $ENV_FILE.new ]] || run mv "$ENV_FILE.new" "$ENV_FILE"
  fi
}

# --- the gateway ----------------------------------------------------------------------------------

# Waits until the gateway, process $$, is ready, and prints how to use it.
announce() {
  local socket
  socket=$(with_wggw 'print(wggw.local_socket_path(wggw.load_config({}, sys.argv[1]).db_path))' "$ENV_FILE")
  until curl -s --fail --max-time 2 -o /dev/null --unix-socket "$socket" http://localhost/readyz; do
    kill -0 $$ 2>/dev/null || return 0
    ((SECONDS < READY_SECONDS)) || die 1 "the gateway is not ready after $READY_SECONDS s: the log above says why"
    sleep 0.2
  done
  first='' tell  # without the key: the log of a terminal or container may be kept
  cat <<END

Ctrl-C stops it. To remove the interfaces, NAT and packet filter as well, run:

  ${SUDO_USER:+sudo }$COMMAND net down --env-file $ENV_FILE

To create a peer, with its client's configuration in laptop.conf, run in another terminal:

  (umask 077; ${SUDO_USER:+sudo }$COMMAND peer add laptop --env-file $ENV_FILE >laptop.conf)
END
}

serve() {
  say "+ $COMMAND serve --env-file $ENV_FILE"
  if [[ $dry_run ]]; then
    say "+ $COMMAND net up --env-file $ENV_FILE"
    return
  fi
  check_settings "$ENV_FILE"
  cd "$STATE"
  # A container may lack rights for a part of this; the gateway itself reports what is missing.
  run env -i PATH="$PATH" $PYTHON -I "$TREE/wggw.py" net up --env-file "$ENV_FILE" || say "net up failed: clients may not reach the internet until what it names is mended"
  # One write prints all of the text, so that the gateway's log does not interleave with it.
  (text=$(announce) && printf '%s\n' "$text" &)
  ((!${#replaced[@]})) || rm -f "${replaced[@]}"
  # The gateway takes this process's place: signals and the exit code are its own.
  exec env -i PATH="$PATH" $PYTHON "$TREE/wggw.py" serve --env-file "$ENV_FILE" 4<&-
}

# --- the service ----------------------------------------------------------------------------------

user_is_ours() { [[ $(getent passwd wggw) == wggw:*:"$STATE":*/nologin ]]; }  # as make_user makes it

make_user() {
  ! user_is_ours || return 0
  ! getent passwd wggw >/dev/null ||
    die 1 "there is a user wggw that belongs to something else (its home is not $STATE, or it may log in): rename or remove it"
  undo+=("userdel wggw")
  run useradd --system --user-group --no-create-home --home-dir "$STATE" -s /usr/sbin/nologin wggw
}

# Makes missing keys and certificates. The service may read them but, as $ETC is root's, not replace them.
make_secrets() {
  say "+ make WireGuard key and certificate unless they exist; give them to the user wggw"
  [[ $dry_run ]] && return
  local files path
  files=$(with_wggw '
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

# place MODE TARGET COMMAND...: writes what COMMAND prints to TARGET, unless it is the same already. If
# a later step fails, the former file is restored from TARGET.before. If TARGET.before exists already,
# a run was killed, and the service may not run yet with what that run placed.
place() {
  local mode=$1 target=$2
  shift 2
  if [[ -e $target && ! -e $target.before ]] && cmp -s <("$@") "$target"; then return; fi
  changed=1
  if [[ -e $target || -e $target.before ]]; then
    keep_former "$target"
    [[ -e $target.before ]] || run ln "$target" "$target.before"
  else
    undo+=("rm -f $target")
  fi
  say "+ install -D -m $mode $target"
  [[ $dry_run ]] || install -D -m "$mode" <("$@") "$target"
}

keep_former() {  # keep_former FILE: restores FILE.before if a later step fails, else removes it at the end
  replaced+=("$1.before")
  undo+=("mv -f $1.before $1")
}

drop_in() {  # drop_in NAME NEEDED TEXT: places a part of the unit, or removes it if NEEDED is empty
  local file=$DROP_INS/$1.conf
  if [[ $2 ]]; then
    place 644 "$file" printf '%s\n' "$3"
  elif [[ -e $file || -e $file.before ]]; then
    changed=1
    keep_former "$file"
    [[ ! -e $file ]] || run mv "$file" "$file.before"
  fi
}

# Python caches the bytecode of modules, but compiles a script at each start, which costs time and
# memory. So the launcher imports the program. After an upgrade of Python, root's next start writes the
# new cache.
read -r -d '' LAUNCHER_TEXT <<END || true
#!$PYTHON -I
import os
import sys

sys.path.insert(0, "$LIB")
mask = os.umask(0o022)  # every user may read the bytecode that root writes
from wggw import main

os.umask(mask)
sys.exit(main())
END
readonly LAUNCHER_TEXT

install_files() {
  [[ ! -e $UNIT ]] || existed=1
  [[ -e $LIB ]] || undo+=("rm -rf $LIB")
  undo+=("rm -rf $LIB/__pycache__")
  place 755 "$LIB/wggw.py" cat "$TREE/wggw.py"
  place 755 "$LAUNCHER" printf '%s\n' "$LAUNCHER_TEXT"
  if [[ $changed ]]; then
    run rm -rf "$LIB/__pycache__"
    run env -i "$LAUNCHER" --version
  fi
  undo+=("systemctl daemon-reload")
  place 644 "$UNIT" cat "$TREE/wggw.service"
  [[ -e $DROP_INS ]] || undo+=("rm -rf $DROP_INS")
  [[ $dry_run && ! -r $ENV_FILE ]] || install_drop_ins
}

install_drop_ins() {
  local low='' port
  port=$(setting API_PORT)
  ((${port:-8000} >= 1024)) || low=1
  drop_in 50-port "$low" "# API_PORT is below 1024.
[Service]
CapabilityBoundingSet=CAP_NET_BIND_SERVICE
AmbientCapabilities=CAP_NET_BIND_SERVICE"
  drop_in 50-userspace "$userspace" "# The kernel lacks WireGuard or AmneziaWG: the service starts a program instead. The program outlives
# the service and so keeps the tunnels up.
[Service]
KillMode=process
PrivateDevices=no
DeviceAllow=/dev/net/tun rw
# The service's user makes its socket in a directory where other programs have theirs. With this as its
# RuntimeDirectory=, systemd would change the owner of them all, and a wireguard-go whose socket changes
# ends. So only that which a run in the foreground left to root changes hands, and starts anew.
ExecStartPre=+/bin/install -d -o root -g wggw -m 1775 /run/wireguard /run/amneziawg
ExecStartPre=+/bin/sh -c 'cd /sys/class/net; for link in \$\$(grep -slx \"wggw $ENV_FILE\" */ifalias); do \
  chown -hf --from=root wggw: /run/wireguard/\$\${link%%/*}.sock /run/amneziawg/\$\${link%%/*}.sock; done; true'
ReadWritePaths=-/run/wireguard -/run/amneziawg"
}

setting() {  # setting NAME: prints a setting as the gateway parses it
  with_wggw '
print(getattr(wggw.load_config({}, sys.argv[1]), sys.argv[2].lower()))' "$ENV_FILE" "$1"
}

start_service() {
  # systemd knows no unread change: a run that was killed may have placed a new file.
  if [[ ! $changed ]] && systemctl is-active -q wggw 2>/dev/null &&
    [[ $(systemctl show -P NeedDaemonReload wggw) != yes ]]; then
    say "program and unit are up to date, and the service runs"
    return
  fi
  if [[ $existed ]]; then
    undo=("systemctl restart --no-block wggw" "${undo[@]}")  # the last step: all former files are back
    # Up to systemd 255 a manual restart does not reset NRestarts, which verify reads.
    run systemctl reset-failed wggw 2>/dev/null || true
  else
    # Interfaces that existed before this run stay.
    undo+=("take_down${already_up:+ --keep-interfaces}" "systemctl disable -q --now wggw")
  fi
  run systemctl daemon-reload
  run systemctl enable -q wggw
  run systemctl restart --no-block wggw
}

# Recognises what wggw made by its marks. It uses this tree's program: former versions may need settings.
take_down() {
  env -i PATH="$PATH" $PYTHON -I "$TREE/wggw.py" net down --env-file "$ENV_FILE" "$@"
}

verify() {
  say "+ wait until the service is ready, and ask it for its status"
  [[ $dry_run ]] && return
  local state answer text reason='' started=$SECONDS
  until state=$(systemctl is-active wggw); [[ $state == active ]]; do
    text=$(systemctl show -P StatusText wggw)
    reason=${text:-$reason}
    # A service that systemd restarted several times will not become ready.
    if [[ $state == failed || $(systemctl show -P NRestarts wggw) -ge 3 ]] ||
      ((SECONDS - started > READY_SECONDS)); then
      die 1 "the service does not come up ($state): ${reason:-journalctl -u wggw says why}"
    fi
    sleep 0.2
  done
  answer=$(wggw_command call GET /api/v1/server/status) || die 1 "the service does not answer: $answer; journalctl -u wggw says more"
  [[ $answer == *'"status":"healthy"'* ]] || die 1 "the service is not healthy: $answer; wggw doctor says more"
  wggw_command net show || say "the lines marked WRONG above say what you have to do"
}

wggw_command() {
  local -a program=("$LAUNCHER")
  [[ -x $LAUNCHER ]] || program=("$PYTHON" -I "$TREE/wggw.py")
  env -i PATH="$PATH" "${program[@]}" "$@" --env-file "$ENV_FILE"
}

tell() {  # prints what a backend needs; the API key only if this run made it
  with_wggw '
import hashlib, ipaddress, json
env_file, first, as_json, host = sys.argv[1:]
config = wggw.load_config({}, env_file)
if not ipaddress.ip_address(config.api_host).is_unspecified:
    host = config.api_host
host = config.wg_endpoint.host if config.wg_endpoint else host or "127.0.0.1"
host = f"[{host}]" if ":" in host else host
interfaces = [
    {
        "name": each.name,
        "public_key": wggw.encode_key(wggw.x25519_public(wggw.load_private_key(each))),
        "endpoint": each.endpoint(each.ports[0]),
        "ports": list(each.ports),
    }
    for each in wggw.interface_settings(config)
]
certificate = wggw.read_certificate(config.tls_cert)
result = {
    "api_url": f"https://{host}:{config.api_port}",
    "api_key": config.gateway_api_key if first else None,
    "certificate_sha256": hashlib.sha256(certificate).hexdigest(),
    "certificate_key_pin": wggw.key_pin(certificate),
    "interfaces": interfaces,
    "settings": env_file,
}
if as_json:
    print(json.dumps(result, indent=2))
    sys.exit()
key = result["api_key"] or f"GATEWAY_API_KEY in {env_file}"
print("\nThe gateway is ready. Its backend needs:\n")
print("  API                ", result["api_url"])
print("  API key            ", key)
print("  certificate SHA-256", result["certificate_sha256"])
print("  its key (pin)      ", result["certificate_key_pin"])
for each in interfaces:
    print("  WireGuard          ", each["name"], "public key", each["public_key"])
    ports = ", ".join(map(str, each["ports"]))
    print("                     ", f"UDP port {ports}, endpoint", each["endpoint"] or "not set")
' "$ENV_FILE" "$first" "$json" "$(host_address)"
}

# If the script fails or is interrupted, undoes what this run did, last step first.
undo_steps() {
  local status=$? step
  trap - EXIT
  trap '' HUP INT PIPE TERM
  set +e  # nothing may stop the undoing, not even a line to a closed terminal
  if ((status)) && ((${#undo[@]})) && [[ ! $dry_run ]]; then
    say "failed: undoing what was done"
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
  [[ $dry_run ]] || look_for_interfaces
  make_secrets
  install_files
  start_service
  verify
  undo=()
  ((!${#replaced[@]})) || run rm -f "${replaced[@]}"
  [[ $dry_run ]] || tell >&3
}

look_for_interfaces() {
  already_up=$(with_wggw '
ours, _ = wggw.links_to_remove(wggw.interface_mark(sys.argv[1]), (), wggw.recognise_none)
print(*(found.name for found in ours))' "$ENV_FILE")
}

check_settings_file() { [[ $dry_run && ! -r $ENV_FILE ]] || check_settings "$ENV_FILE"; }

remove_user() {
  local process
  for _ in {1..20}; do  # a userspace WireGuard ends shortly after its interface
    ! userdel wggw 2>/dev/null || return 0
    sleep 0.1
  done
  # Every process of this user is the gateway's. A former version set no marks, so its program still runs.
  for process in /proc/[0-9]*; do
    [[ $(stat -c %U "$process" 2>/dev/null) != wggw ]] || run kill "${process#/proc/}" || true
  done
  sleep 0.5
  userdel wggw
}

# Prints what the settings place outside of $ETC and $STATE.
places_elsewhere() {
  with_wggw '
import glob, os
os.chdir(sys.argv[3] if os.path.isdir(sys.argv[3]) else "/")  # relative paths begin here
config = wggw.load_config({}, sys.argv[1], key_needed=False)
files = [config.db_path, *glob.glob(glob.escape(config.db_path) + ".*")]
files += [each.private_key_file for each in wggw.interface_settings(config)]
for path in map(os.path.realpath, [*files, config.tls_cert, config.tls_key]):
    if os.path.exists(path) and not any(path.startswith(f"{ours}/") for ours in sys.argv[2:]):
        print(path)
print(config.snapshot_url or "")' "$ENV_FILE" "$ETC" "$STATE"
}

uninstall() {
  local -a kept
  local elsewhere='' now=''
  confirm "remove wggw${purge:+ with its settings, keys and data}"
  if [[ $purge && -r $ENV_FILE ]]; then
    elsewhere=$(compile_program && places_elsewhere) || elsewhere="what the settings, which are wrong, name"
  fi
  if [[ -e $UNIT ]]; then
    [[ ! -d /run/systemd/system ]] || now=--now
    run systemctl disable -q ${now:+"$now"} wggw
  fi
  # This works whatever the settings are, and without them: it recognises marks.
  run take_down || say "interfaces, the nftables table inet wggw or rules in ufw may be left: see above"
  run rm -rf "$UNIT" "$UNIT.before" "$DROP_INS"/50-{port,userspace}.conf{,.before} "$LIB" "$LAUNCHER" "$LAUNCHER.before"
  if [[ -d $DROP_INS ]]; then
    run rmdir --ignore-fail-on-non-empty "$DROP_INS"
    [[ $dry_run || ! -d $DROP_INS ]] || say "$DROP_INS stays: it has drop-ins that install.sh did not make"
  fi
  [[ ! -d /run/systemd/system ]] || run systemctl daemon-reload
  if user_is_ours; then
    run remove_user
  elif getent passwd wggw >/dev/null; then
    say "the user wggw stays: install.sh did not make it"
  fi
  if [[ $purge ]]; then
    run rm -rf "$ETC" "$STATE"
    [[ ! $elsewhere ]] || say "outside of $ETC and $STATE these stay: ${elsewhere//$'\n'/ }"
  elif [[ -e $ETC || -e $STATE ]]; then
    mapfile -t kept < <(find "$ETC" "$STATE" -maxdepth 0 2>/dev/null)
    run chown -R root:root "${kept[@]}"
    say "settings and data stay in ${kept[*]} (--purge removes them)"
  fi
  [[ $dry_run ]] || say "removed"
}

main() {
  parse_options "$@"
  trap undo_steps EXIT
  # Without these traps, undo_steps might see status 0 after a signal.
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
  install_packages
  compile_program
  check_names
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
