#!/bin/sh
# Several hosts without ssh: start it on each of them, with the host's line in HOSTFILE, from 0.
#
#   NODE_RANK=1 MASTER_ADDR=node1 launcher/no_ssh.sh --model DIR --train FILE ... --output DIR
#
# MASTER_ADDR is the first host, as all of them can reach it.
set -eu
here=$(dirname "$0")
exec deepspeed --hostfile "${HOSTFILE:-$here/hostfile}" --no_ssh --node_rank "${NODE_RANK:?}" \
  --master_addr "${MASTER_ADDR:?}" --master_port "${MASTER_PORT:-29500}" \
  "$here/train.py" "$@"
