#!/bin/sh
# One host or several, restarted when a rank dies: start it on each host alike.
#
#   RANKS=4 launcher/torchrun.sh --model DIR --train FILE ... --output DIR
#   NODES=2 RENDEZVOUS=node1:29400 RANKS=4 launcher/torchrun.sh ...
#
# RANKS are those of a host. After a restart the run goes on from its journal; with several hosts
# --output is on a disk that all of them share, as any of them may then have the first rank.
set -eu
# else torchrun keeps the addresses of ranks from before a restart
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
here=$(dirname "$0")
exec torchrun --nnodes "${NODES:-1}" --nproc_per_node "${RANKS:-2}" \
  --rdzv_backend c10d --rdzv_endpoint "${RENDEZVOUS:-localhost:0}" --rdzv_id "${RUN_ID:-zo}" \
  --max_restarts "${RESTARTS:-3}" "$here/train.py" "$@"
