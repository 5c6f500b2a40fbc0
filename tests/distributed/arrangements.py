"""All arrangements of four micro-batches end in equal bits: launchers, ranks, hosts, lanes apart.

.venv/bin/python tests/distributed/arrangements.py [STEPS]     (50; minutes on two cores)
.venv/bin/python tests/distributed/arrangements.py resumed     (12, each resumed after every step)

Prints a row each; exits with 1 where one ends in other bits. The suite runs a part of it.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from distributed import two_nodes
from distributed.launch import SECONDS, WORKER, environment, reports_of, run
from distributed.test_ranks import CONFIG, with_parallel

TWO_NODES = "two nodes"
# How ranks are started, how many there are, and how many of them share each micro-batch.
ARRANGEMENTS = (
    ("none", 1, 1),
    ("deepspeed", 1, 1),
    ("deepspeed", 2, 1),
    ("deepspeed", 4, 1),
    ("deepspeed", 2, 2),
    ("deepspeed", 4, 2),
    ("mpirun", 2, 1),
    ("mpirun", 4, 2),
    ("torchrun", 2, 1),
    (TWO_NODES, 2, 1),
    (TWO_NODES, 2, 2),
)
CALLS = ("train_batch", "forward")


def on_two_nodes(folder: Path, job: dict[str, Any]) -> list[dict[str, Any]]:
    """One rank on each of two hosts, started from the first by DeepSpeed over pdsh."""
    hosts = folder / "hostfile"
    hosts.write_text("".join(f"{name} slots=1\n" for name in two_nodes.NAMES))
    (folder / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\n")
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    given = [launcher, "--hostfile", str(hosts), str(WORKER), json.dumps(job)]
    with two_nodes.two_nodes(folder / "nodes") as (first, _):
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            first.command(given), env=environment(PATH=path), cwd=folder, timeout=SECONDS,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return reports_of(job, 2)


def digests(launcher: str, ranks: int, parallel: int, steps: int, **more: Any) -> set[str]:
    """Of the weights at the end, on every rank, and of every run that was resumed."""
    with tempfile.TemporaryDirectory() as folder:
        config = with_parallel(CONFIG, probe_parallel=parallel)
        job = {"config": config, "steps": steps, "out": folder, **more}
        if "save" in job:
            job["save"] = f"{folder}/tags"
        if launcher == TWO_NODES:
            reports = on_two_nodes(Path(folder), job)
        else:
            reports = run(launcher, ranks, job)
    return {digest for each in reports for digest in [each["weights"], *each["resumed"]]}


def rows(resumed: bool) -> Iterator[tuple[str, int, int, str]]:
    """Launcher, ranks, ranks that share a micro-batch, calls."""
    for launcher, ranks, parallel in ARRANGEMENTS:
        if launcher == TWO_NODES and (reason := two_nodes.why_not() or resumed):
            print(f"(left out: {TWO_NODES}: {'not resumed' if resumed else reason})")
            continue
        for calls in CALLS if resumed and parallel == 1 else CALLS[:1]:
            yield launcher, ranks, parallel, calls


def main(asked: str) -> int:
    resumed = asked == "resumed"
    steps, more = (12, {"save": ""}) if resumed else (int(asked), {})
    print(f"{steps} steps")
    print("| started by | ranks | share a micro-batch | calls | SHA-256 of the masters |")
    print("|---|---|---|---|---|")
    ends = set()
    for launcher, ranks, parallel, calls in rows(resumed):
        found = digests(launcher, ranks, parallel, steps, calls=calls, **more)
        shown = ", ".join(digest[:16] for digest in sorted(found))
        print(f"| {launcher} | {ranks} | {parallel} | `{calls}` | `{shown}` |", flush=True)
        ends |= found
    print("all equal" if len(ends) == 1 else f"{len(ends)} different ends")
    return int(len(ends) != 1)


if __name__ == "__main__":
    sys.exit(main(*(sys.argv[1:] or ["50"])))
