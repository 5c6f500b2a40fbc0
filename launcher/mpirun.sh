#!/bin/sh
# Open MPI without DeepSpeed's launcher: RANKS ranks, on this host or on those of HOSTFILE.
#
#   RANKS=4 launcher/mpirun.sh --model DIR --train FILE --dev FILE ... --output DIR
#
# Other hosts have this one's python at the same path; INTERFACE joins them. Without --bind-to none
# a rank has one core.
set -eu
here=$(dirname "$0")
interface=${INTERFACE:-eth0}
exec mpirun -np "${RANKS:-2}" ${HOSTFILE:+--hostfile "$HOSTFILE" \
  --mca btl_tcp_if_include "$interface" --mca oob_tcp_if_include "$interface"} --bind-to none \
  -x OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" -x PATH ${MPI4PY_LIBMPI:+-x MPI4PY_LIBMPI} \
  "$(command -v python)" "$here/train.py" "$@"
