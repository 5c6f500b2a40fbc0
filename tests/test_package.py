"""Importing the package is quick and drags nothing heavy along."""

import subprocess
import sys

NUM_TRIES = 5
LIMIT_SECONDS = 0.3

# CPU time, not wall time: a busy machine delays an import, it does not make it heavier.
TIMED_IMPORT = """
import time
import torch
start = time.process_time()
import zo_offload
print(time.process_time() - start)
"""

LOADED = """
import sys
import zo_offload
print(*sorted({"deepspeed", "transformers"} & set(sys.modules)))
"""


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_quick():
    best = min(float(run(TIMED_IMPORT)) for _ in range(NUM_TRIES))
    assert best < LIMIT_SECONDS, f"importing zo_offload after torch takes {best:.2f} s of CPU time"


def test_import_loads_neither_deepspeed_nor_transformers():
    assert run(LOADED) == ""
