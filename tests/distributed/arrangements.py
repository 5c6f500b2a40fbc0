"""All arrangements of four micro-batches, launchers and calls, each resumed after each step.

.venv/bin/python tests/distributed/arrangements.py        (some minutes on two cores)

Prints a row each; exits with 1 where one ends in other bits. The suite runs a part of it.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from distributed.launch import run
from distributed.test_ranks import CONFIG

STEPS = 12
ARRANGEMENTS = ((1, 4), (2, 2), (4, 1))  # ranks, micro-batches a rank


def main() -> int:
    digests = set()
    print("| ranks x micro-batches | launcher | calls | resumed after | SHA-256 of the masters |")
    print("|---|---|---|---|---|")
    for ranks, micro_batches in ARRANGEMENTS:
        for launcher in ("deepspeed", "mpirun"):
            for calls in ("forward", "train_batch"):
                with tempfile.TemporaryDirectory() as folder:
                    job = {"config": CONFIG, "steps": STEPS, "calls": calls, "out": folder}
                    reports = run(launcher, ranks, job | {"save": f"{folder}/tags"})
                found = {report["weights"] for report in reports}
                for report in reports:
                    assert len(report["resumed"]) == STEPS - 1
                    found |= set(report["resumed"])
                digests |= found
                shown = ", ".join(digest[:16] for digest in sorted(found))
                name = f"{ranks} x {micro_batches}"
                print(f"| {name} | {launcher} | `{calls}` | never, 1 to {STEPS - 1} | `{shown}` |")
                sys.stdout.flush()
    print("all equal" if len(digests) == 1 else f"{len(digests)} different ends")
    return int(len(digests) != 1)


if __name__ == "__main__":
    sys.exit(main())
