#!/usr/bin/env bash
# The native kernels on this machine and on an emulated aarch64: equal bits?
#
#   apt install g++-aarch64-linux-gnu qemu-user-static
#   tests/csrc/machines.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
source=zo_offload/ops/csrc
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
flags="-std=c++17 -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Wextra -Wno-uninitialized -Wno-maybe-uninitialized"

# built COMPILER NAME ISA[:FLAGS] ...
built() {
  local compiler=$1 name=$2 with=() objects=()
  shift 2
  for isa in SCALAR "$@"; do
    local own=${isa#*:}
    [ "$own" != "$isa" ] || own=
    $compiler $flags $own -c $source/kernels.cpp -o "$folder/$name-${isa%%:*}.o" "-DZO_BUILD_${isa%%:*}"
    objects+=("$folder/$name-${isa%%:*}.o")
    [ "$isa" = SCALAR ] || with+=("-DZO_WITH_${isa%%:*}")
  done
  $compiler $flags "${with[@]}" $source/dispatch.cpp tests/csrc/isas.cpp "${objects[@]}" -static -pthread -o "$folder/$name"
}

avx512="-mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
case $(uname -m) in
  x86_64) built g++ here "AVX2:-mavx2" "AVX512:$avx512" ;;
  aarch64) built g++ here NEON ;;
  *) built g++ here ;;
esac
here=$("$folder/here")
built aarch64-linux-gnu-g++ aarch64 NEON
there=$(qemu-aarch64-static "$folder/aarch64")
echo "here $here, aarch64 $there"
[ "$here" = "$there" ]
