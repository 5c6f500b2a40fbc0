"""``kill -9`` in a loop of writes: no unit is lost, none is older than what had landed."""

import json
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
ROUNDS = 12


def test_kills_and_a_limit_on_file_sizes(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "offload.kills", str(tmp_path), str(ROUNDS)],
        cwd=TESTS,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["rounds"]) == ROUNDS
    for each in found["rounds"]:
        for index, step in each["landed"].items():
            assert each["held"][index] >= step, each
    assert "cannot write" in found["limited"]
    assert found["limited"].endswith("raise the limit on a file's size (ulimit -f)")
