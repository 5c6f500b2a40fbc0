#!/bin/sh
# Several hosts, by MPICH over ssh: start it once, where mpirun is MPICH's.
#
#   HOSTFILE=hosts launcher/mpich.sh --model DIR --train FILE ... --output DIR
#
# Every host of HOSTFILE has as many slots.
set -eu
here=$(dirname "$0")
exec deepspeed --hostfile "${HOSTFILE:-$here/hostfile}" --launcher mpich "$here/train.py" "$@"
