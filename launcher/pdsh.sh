#!/bin/sh
# Several hosts, by pdsh over ssh: start it once, on a host that can ssh to all of HOSTFILE.
#
#   HOSTFILE=hosts launcher/pdsh.sh --model DIR --train FILE --dev FILE ... --output DIR
#
# The hosts see this directory and the files at the same paths. Of the environment they get what
# starts with PYTHON, and the lines of ~/.deepspeed_env and ./.deepspeed_env (a sample:
# launcher/deepspeed_env).
set -eu
here=$(dirname "$0")
exec deepspeed --hostfile "${HOSTFILE:-$here/hostfile}" \
  --master_port "${MASTER_PORT:-29500}" \
  "$here/train.py" "$@"
