#!/bin/bash
# Copyright (c) the wggw authors. Proprietary, all rights reserved: see LICENSE.
# Installs what wggw needs on Debian or Ubuntu and runs it in the foreground. `./install.sh --help`.
set -euo pipefail

TREE=$(dirname "$(realpath "$0")")
readonly TREE
readonly ETC=/etc/wggw STATE=/var/lib/wggw
readonly ENV_FILE=$ETC/wggw.env
readonly READY_SECONDS=60

# Packages by what shows that they are there already.
readonly -A PACKAGE_OF=(
  ["command -v python3"]=python3
  ["python3 -c 'import cryptography'"]=python3-cryptography
  ["command -v wg"]=wireguard-tools
  ["command -v ip"]=iproute2
  ["command -v curl"]=curl
  ["command -v openssl"]=openssl
)

foreground='' dry_run='' yes=''
declare -A SETTING=()  # variable of the settings file -> value given by an option

usage() {
  cat <<END
Usage: sudo ./install.sh --foreground [OPTION]...

Installs what the gateway needs with apt (nothing is fetched when all of it is there), makes
$ENV_FILE unless it exists, runs the gateway until Ctrl-C and shows how to create a peer.

  --foreground           run the gateway in this terminal (the only way in this version)
  --endpoint HOST        public name or address of this gateway, for the clients (WG_ENDPOINT)
  --port N               UDP port of WireGuard (WG_DEFAULT_PORT; default 51820)
  --api-port N           TCP port of the API (API_PORT; default 8000)
  --interface NAME       WireGuard interface (WG_INTERFACE; default wg0)
  --ipv4-subnet CIDR     the tunnel's IPv4 subnet (WG_IPV4_SUBNET; default 10.0.1.0/24)
  --ipv6-subnet CIDR     the tunnel's IPv6 subnet (WG_IPV6_SUBNET; default fd42:4242:1::/64)
  --dry-run              show what would be done, change nothing
  --yes                  ask nothing
  --help                 this text

The gateway's settings are those of $ENV_FILE alone. A file that
exists is never changed: an option that contradicts it is refused.
Exit code: the gateway's; 1 when the installation fails; 2 for a wrong option.
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
      --foreground) foreground=1 ;;
      --dry-run) dry_run=1 ;;
      --yes) yes=1 ;;
      --help | -h) usage && exit 0 ;;
      --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" && continue ;;
      --endpoint) take WG_ENDPOINT "$@" && shift ;;
      --port) take WG_DEFAULT_PORT "$@" && shift ;;
      --api-port) take API_PORT "$@" && shift ;;
      --interface) take WG_INTERFACE "$@" && shift ;;
      --ipv4-subnet) take WG_IPV4_SUBNET "$@" && shift ;;
      --ipv6-subnet) take WG_IPV6_SUBNET "$@" && shift ;;
      *) die 2 "unknown option $1 (see --help)" ;;
    esac
    shift
  done
}

take() {  # take VARIABLE OPTION VALUE...: keeps a value that cannot break the settings file
  (($# >= 3)) || die 2 "$2 needs a value"
  [[ $3 =~ ^[][A-Za-z0-9.:/_=+-]*$ ]] || die 2 "$2: '$3' has characters that cannot be right"
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
  [[ $EUID == 0 || $dry_run ]] || die 1 "must run as root: sudo ./install.sh --foreground"
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
  if command -v python3 >/dev/null; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      die 1 "$(python3 --version) is too old: Python 3.11 or later is needed"
  fi
}

# A kernel with WireGuard is best; wireguard-go does the same as a process.
install_wireguard() {
  local answer
  [[ -e /sys/module/wireguard ]] && return
  if [[ $dry_run ]]; then
    say "would ask the kernel for a WireGuard interface; if it has none, wireguard-go is used"
    return
  fi
  if answer=$(ip link add wggw-probe type wireguard 2>&1); then
    ip link delete wggw-probe
    return
  fi
  [[ $answer != *"not permitted"* ]] ||
    die 1 "network interfaces cannot be made here: CAP_NET_ADMIN is missing (docker: --cap-add NET_ADMIN)"
  say "the kernel has no WireGuard: wireguard-go is used"
  [[ -c /dev/net/tun ]] ||
    die 1 "wireguard-go needs /dev/net/tun, which is not there (modprobe tun; docker: --device /dev/net/tun)"
  command -v wireguard-go >/dev/null || apt_install wireguard-go
}

# --- settings -------------------------------------------------------------------------------------

# Runs Python code with the tree's wggw module and a clean environment: $1 is the code.
with_wggw() {
  env -i PATH="$PATH" PYTHONPATH="$TREE" python3 -B -P -c "$@"
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
  run install -d -m 700 "$ETC" "$STATE"
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
  say "+ python3 $TREE/wggw.py serve --env-file $ENV_FILE"
  [[ $dry_run ]] && return
  read_settings
  cd "$STATE"
  (announce &)
  # The gateway takes this process's place: signals and the exit code are its own.
  exec env -i PATH="$PATH" python3 "$TREE/wggw.py" serve --env-file "$ENV_FILE"
}

main() {
  parse_options "$@"
  [[ $foreground ]] ||
    die 2 "installing a service is not part of this version: use --foreground (see --help)"
  check_machine
  install_packages
  install_wireguard
  make_settings
  serve
}

main "$@"
