"""The benchmarks run and end in the line that is recorded; what they measure is not judged here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
LAST_LINES = {
    "stream.py --layers 4 --width 64 --device-mb 13.52 --host-mb 14 --rounds 1 --tokens 1 8": {
        "step_vs_bound",
        "peak_device_bytes",
        "peak_host_bytes",
        "model_bytes",
    },
    "disk.py --mib 16 --unit-mib 4 --rounds 1": {"read_vs_plain", "write_vs_plain"},
    "noise.py --millions 16 --rounds 1": {
        "rademacher_vs_mezo",
        "gaussian_vs_mezo",
        "planes_vs_mezo",
        "rademacher_vs_copy",
    },
    "step.py --layers 2 --vocabulary 1000 --rounds 1": {
        "step_vs_mezo",
        "step_vs_forwards",
        "step_vs_exact_forwards",
        "offload_vs_memory",
        "lagging_vs_memory",
    },
}


@pytest.mark.parametrize("command", LAST_LINES)
def test_a_benchmark_ends_in_ratios(command: str):
    script, *options = command.split()
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), *options], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ratios = json.loads(done.stdout.splitlines()[-1])
    assert set(ratios) == LAST_LINES[command]
    assert all(ratio > 0 for ratio in ratios.values())
