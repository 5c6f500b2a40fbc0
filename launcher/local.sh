#!/bin/sh
# One host: RANKS ranks, each on cores of its own (with numactl installed).
#
#   RANKS=4 launcher/local.sh --model DIR --train FILE --dev FILE ... --output DIR
set -eu
here=$(dirname "$0")
exec deepspeed --num_accelerators "${RANKS:-2}" --bind_cores_to_rank "$here/train.py" "$@"
