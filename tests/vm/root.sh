#!/bin/bash
# Copyright (c) the wggw authors. Proprietary, all rights reserved: see LICENSE.
# Makes the guest's disk: Debian or Ubuntu with systemd and what the tests use, as an ext4 image.
#
#   root.sh [SUITE]           make it unless it is there (about 2 minutes); print its path
#   root.sh --path [SUITE]    only print the path, whether it is there or not
#
# SUITE is bookworm (the default), trixie, or noble (Ubuntu 24.04). A change of the package list or of
# the guest's job changes the path. The cache is ${WGGW_VM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/wggw-vm}.
# Needs root, and Debian. The archive and its options are those of this machine's apt, for Ubuntu the
# archive that debootstrap knows; none stays in the image.
set -euo pipefail

here=$(dirname "$(realpath "$0")")
only_path=
[[ ${1:-} == --path ]] && { only_path=yes; shift; }
suite=${1:-bookworm}
packages=(
  systemd systemd-sysv dbus procps ca-certificates
  iproute2 iputils-ping wireguard-tools wireguard-go nftables iptables conntrack tcpdump
  ufw firewalld
  openssl curl netcat-openbsd iperf3 sqlite3
  python3 python3-cryptography python3-pytest python3-pytest-timeout python3-hypothesis
)
masked=(
  systemd-modules-load.service systemd-udevd.service systemd-udev-trigger.service
  getty@tty1.service apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer
  e2scrub_all.timer fstrim.timer
)
read -r -d '' job <<'JOB' || true
#!/bin/bash
# Mounts the host's directory, runs its job, reports the status, switches the machine off.
directory=$(sed -n 's/.*job=\([^ ]*\).*/\1/p' /proc/cmdline)
mkdir -p /host && mount -t hostfs none /host -o "$directory"
cd /root
bash /host/job >/dev/tty0 2>&1 </dev/null
echo "job-exit $?" >/dev/tty0
sync
systemctl poweroff -f -f
JOB

cache=${WGGW_VM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/wggw-vm}
key=$({ echo "${packages[@]}" "${masked[@]}" "$job"; cat "$here/job.service"; } | sha256sum | cut -c1-12)
image=$cache/$suite-$key.img
[[ -n $only_path || -s $image ]] && { echo "$image"; exit 0; }

[[ $EUID == 0 ]] || { echo "root.sh: needs root" >&2; exit 1; }
dpkg -s debootstrap e2fsprogs >/dev/null 2>&1 || apt-get -o DPkg::Lock::Timeout=600 install -qy debootstrap e2fsprogs >&2
options=(--variant=minbase)
if [[ $suite == noble ]]; then
  script=/usr/share/debootstrap/scripts/gutsy  # what the scripts of all later suites are links to
  mirror=$(sed -n '/old-releases/!s/.*default_mirror //p' "$script" | head -1)
  keys=pool/main/u/ubuntu-keyring/ubuntu-keyring_2023.11.28.1_all.deb
  keys_sum=36de43b15853ccae0028e9a767613770c704833f82586f28eb262f0311adb8a8
else
  script=/usr/share/debootstrap/scripts/$suite
  # shellcheck disable=SC2016  # apt's own format
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -v security | head -1)
fi
[[ -n $mirror ]] || { echo "root.sh: no archive is known here" >&2; exit 1; }

work=$(mktemp -d)
root=$work/root

finish() {
  local status=$?
  umount "$root/proc" 2>/dev/null || true
  [[ $status == 0 ]] || tail -n 20 "$work/log" >&2
  rm -rf "$work"
}
trap finish EXIT

in_root() {
  chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root DEBIAN_FRONTEND=noninteractive "$@"
}

install_system() {
  if [[ $suite == noble ]]; then
    /usr/lib/apt/apt-helper download-file "$mirror/$keys" "$work/keys.deb" "SHA256:$keys_sum"
    dpkg-deb -x "$work/keys.deb" "$work/keys"
    options+=("--keyring=$work/keys/usr/share/keyrings/ubuntu-archive-keyring.gpg")
    options+=("--components=main,universe")
  fi
  debootstrap "${options[@]}" "$suite" "$root" "$mirror" "$script"
  mount --bind /proc "$root/proc"
  apt-config dump | grep -E '^Acquire::(http|https|Check-)' >"$root/etc/apt/apt.conf.d/99build" || true
  printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"  # nothing starts in the chroot
  chmod 755 "$root/usr/sbin/policy-rc.d"
  cp -L /etc/resolv.conf /etc/hosts "$root/etc/"
  in_root apt-get update -q
  in_root apt-get install -qy --no-install-recommends "${packages[@]}"
  in_root systemctl disable firewalld  # only where a test starts it
  umount "$root/proc"
}

clean() {
  rm -rf "$root"/etc/apt/{sources.list,apt.conf.d/99build} "$root/usr/sbin/policy-rc.d" \
    "$root"/var/{cache/apt/archives,lib/apt/lists,log}/* "$root"/usr/share/{doc,man,locale}/* \
    "$root/debootstrap" "$root"/etc/{resolv.conf,hosts}
}

configure() {
  local units=$root/etc/systemd/system unit
  install -m 644 "$here/job.service" "$units/job.service"
  install -m 755 /dev/stdin "$root/usr/local/sbin/job" <<<"$job"
  mkdir -p "$units/multi-user.target.wants"
  ln -s ../job.service "$units/multi-user.target.wants/job.service"
  for unit in "${masked[@]}"; do ln -sf /dev/null "$units/$unit"; done
  echo gateway >"$root/etc/hostname"
  echo '127.0.0.1 localhost gateway' >"$root/etc/hosts"
  : >"$root/etc/fstab"
  : >"$root/etc/machine-id"
}

install_system >"$work/log" 2>&1
clean
configure
mkdir -p "$cache"
truncate -s 2G "$image.$$"
mke2fs -q -t ext4 -d "$root" "$image.$$"
mv "$image.$$" "$image"  # whole or not there at all
echo "$image"
