#!/bin/sh
# Open MPI without DeepSpeed's launcher: RANKS ranks, on this host or on those of HOSTFILE.
#
#   RANKS=4 launcher/mpirun.sh --model DIR --train FILE --dev FILE ... --output DIR
#
# Without --bind-to none a rank has one core.
set -eu
here=$(dirname "$0")
exec mpirun -np "${RANKS:-2}" ${HOSTFILE:+--hostfile "$HOSTFILE"} --bind-to none \
  -x OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" python "$here/train.py" "$@"
