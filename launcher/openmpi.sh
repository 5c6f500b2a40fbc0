#!/bin/sh
# Several hosts, by Open MPI over ssh: start it once, on a host that can ssh to all of HOSTFILE.
#
#   INTERFACE=eth0 launcher/openmpi.sh --model DIR --train FILE ... --output DIR
#
# INTERFACE joins the hosts. Without --bind-to none Open MPI gives a rank one core.
set -eu
here=$(dirname "$0")
interface=${INTERFACE:-eth0}
exec deepspeed --hostfile "${HOSTFILE:-$here/hostfile}" --launcher openmpi --launcher_args \
  "--bind-to none --mca btl_tcp_if_include $interface --mca oob_tcp_if_include $interface" \
  "$here/train.py" "$@"
