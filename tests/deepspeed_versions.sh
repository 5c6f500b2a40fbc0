#!/usr/bin/env bash
# The engine's tests on the oldest and the newest DeepSpeed that setup.py admits.
#
#   tests/deepspeed_versions.sh [VERSION ...]
#
# Each version goes into a folder of its own, in front of the one in .venv; all else is shared.
set -euo pipefail
cd "$(dirname "$0")/.."
versions=("$@")
[ ${#versions[@]} -gt 0 ] || versions=(0.16.9 0.19.8)
for version in "${versions[@]}"; do
  folder="$PWD/build/deepspeed-$version"
  if [ ! -d "$folder" ]; then
    echo "deepspeed $version: installing"
    DS_BUILD_OPS=0 .venv/bin/python -m pip install -qq --no-deps --no-build-isolation --use-pep517 \
      --target "$folder.part" "deepspeed==$version"
    mv "$folder.part" "$folder"
  fi
  found=$(PYTHONPATH="$folder" .venv/bin/python -c 'import deepspeed; print(deepspeed.__version__)' 2>/dev/null | tail -1)
  [ "$found" = "$version" ] || { echo "deepspeed $found is imported, not $version" >&2; exit 1; }
  echo "deepspeed $version: testing"
  # An older DeepSpeed warns of what a newer torch deprecates; that is not ours to mend.
  PYTHONPATH="$folder" .venv/bin/pytest -q -W default tests/engine tests/integrations/test_install.py tests/distributed
done
