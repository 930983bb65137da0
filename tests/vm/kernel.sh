#!/bin/bash
# Copyright (c) the wggw authors. Proprietary, all rights reserved: see LICENSE.
# Builds a Linux kernel that runs as an ordinary process (user-mode Linux), with WireGuard,
# nftables and iptables built in. There are no modules.
#
#   kernel.sh           make it unless it is there (about 8 minutes on 2 cores, 11 MB); print its path
#   kernel.sh --path    only print the path, whether it is there or not
#
# A change of kernel.config or of the source changes the path. The cache is
# ${WGGW_VM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/wggw-vm}. Missing Debian packages are installed,
# which needs root; the rest does not.
set -euo pipefail

here=$(dirname "$(realpath "$0")")
source=linux-source-6.12
packages=("$source" gcc libc6-dev make flex bison bc libelf-dev xz-utils)

cache=${WGGW_VM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/wggw-vm}
# A guest's process is stopped with all its registers; Linux 6.12 has room for 2,696 bytes of those
# of its vector units, and a host with AMX has 11,008 ("ptrace set fp regs failed").
registers=12288

key=$({ echo "$source $registers"; cat "$here/kernel.config"; } | sha256sum | cut -c1-12)
kernel=$cache/linux-$key

if [[ ${1:-} != --path && ! -x $kernel ]]; then
  dpkg -s "${packages[@]}" >/dev/null 2>&1 || apt-get -o DPkg::Lock::Timeout=600 install -qy "${packages[@]}" >&2
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  tar -C "$work" -xf "/usr/src/$source.tar.xz"
  cd "$work/$source"
  sed -i "s/(HOST_FP_SIZE, 2696)/(HOST_FP_SIZE, $registers)/" arch/x86/um/user-offsets.c
  grep -q "HOST_FP_SIZE, $registers" arch/x86/um/user-offsets.c
  make -s ARCH=um tinyconfig >&2
  ./scripts/kconfig/merge_config.sh -m .config "$here/kernel.config" >"$work/log"
  make -s ARCH=um olddefconfig >&2
  # An option whose dependencies are off is dropped without a word: better now than in a test.
  for option in WIREGUARD NF_TABLES_INET NFT_MASQ VETH TUN HOSTFS EXT4_FS CGROUPS NET_NS; do
    grep -q "^CONFIG_$option=y" .config || { echo "kernel.sh: $option is off" >&2; exit 1; }
  done
  make -s ARCH=um -j"$(nproc)" >"$work/log" 2>&1 || { tail -n 20 "$work/log" >&2; exit 1; }
  mkdir -p "$cache"
  install -m 755 linux "$kernel.$$"
  mv "$kernel.$$" "$kernel"  # whole or not there at all
fi
echo "$kernel"
