"""A run of two ranks, killed at random instants until it is finished, ends as if it had not been.

.venv/bin/python tests/distributed/kills.py [KILLS] [SEED] [LAG]  (some minutes on two cores)

Every kill is a SIGKILL, in turn to the whole process group and to one rank alone; then the same
command is given again. A run that finishes is compared with one that was left alone, and the next
one begins, until there were KILLS kills. With a LAG, masters stay as many steps behind, and
snapshots are written while they do.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli.common import Results, Task, make_task, results, write_config

from distributed.launch import command, environment

PROGRAM = Path(__file__).resolve().parents[2] / "launcher" / "train.py"
STEPS, RANKS = 200, 2


def start(task: Task, output: Path) -> subprocess.Popen:
    arguments = task.arguments(output, steps=STEPS, eval_every=25)[1:]
    return subprocess.Popen(
        command("torchrun", RANKS, [str(PROGRAM), *arguments]),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def children(pid: int) -> list[int]:
    """Processes that a launcher started."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def kill(process: subprocess.Popen, alone: bool) -> None:
    ranks = children(process.pid)
    if alone and ranks:
        os.kill(random.choice(ranks), signal.SIGKILL)
        process.communicate(timeout=120)  # the others end by themselves
        return
    for pid in [process.pid, *ranks]:  # torchrun's ranks are in sessions of their own
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=120)


def undisturbed(task: Task, output: Path) -> tuple[Results, float]:
    began = time.monotonic()
    text, _ = start(task, output).communicate()
    return results(output, text), time.monotonic() - began


def main(kills: int, seed: int, lag: int) -> int:
    random.seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        task = make_task(Path(folder) / "task")
        if lag:
            write_config(task.folder / "ds.json", lag, snapshot_interval=3 * lag + 1)
        expected, seconds = undisturbed(task, Path(folder) / "whole")
        done = runs = 0
        while done < kills:
            output = Path(folder) / f"run-{runs}"
            process = start(task, output)
            while done < kills:
                try:
                    text, _ = process.communicate(timeout=random.uniform(0.2, 1.0) * seconds)
                    break
                except subprocess.TimeoutExpired:
                    kill(process, alone=done % 2 == 1)
                    done += 1
                    process = start(task, output)
            else:
                text, _ = process.communicate()
            assert process.returncode == 0, text
            runs += 1
            assert results(output, text) == expected, f"{output} ended in other bits"
            print(f"{done} kills, {runs} runs finished, all to the same bits", flush=True)
    return 0


if __name__ == "__main__":
    given = [int(argument) for argument in sys.argv[1:]]
    sys.exit(main(*(given + [30, 0, 0][len(given) :])))
