#!/bin/sh
# In an allocation of Slurm, through DeepSpeed's launcher, which starts srun.
#
#   salloc --nodes 2 launcher/slurm.sh --model DIR --train FILE ... --output DIR
#
# RANKS are those of a node. (launcher/slurm.sbatch needs no hostfile, and is requeued.)
set -eu
here=$(dirname "$0")
hosts=$(mktemp)
trap 'rm -f "$hosts"' EXIT
scontrol show hostnames | sed "s/\$/ slots=${RANKS:-1}/" >"$hosts"
first=$(scontrol show hostnames | head -n 1)
deepspeed --hostfile "$hosts" --no_ssh_check --master_addr "$first" \
  --force_multi --launcher slurm "$here/train.py" "$@"
