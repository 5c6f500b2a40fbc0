"""All of it: ``make faults``. The last line is JSON, and the exit status is 1 if anything was lost.

.venv/bin/python -m faults [--kill-points 200] [--faults 60] ...   (in tests/)
"""

import conftest  # noqa: F401, I001 the environment of every test, before torch is imported

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cli.common import make_task

from faults import fuzz, soak
from faults.jobs import JOBS
from faults.trials import Bench, Trial, fault_trials, kill_trials


def main(given: argparse.Namespace) -> int:
    lost: list[str] = []
    counts: dict[str, Any] = {}
    parts: dict[str, Callable[[], int]] = {
        "kill_points": lambda: _trials(kill_trials, given.kill_points, given, lost),
        "faults": lambda: _trials(fault_trials, given.faults, given, lost),
        "fuzz_inputs": lambda: _fuzzed(given.fuzz_inputs, given.seed, lost),
        "soak_steps": lambda: _soaked(given.soak_steps, lost),
    }
    for name, part in parts.items():
        began = time.monotonic()
        counts[name] = part()
        print(f"{name}: {counts[name]:,} in {time.monotonic() - began:.0f} s", flush=True)
    too_few = [name for name in parts if counts[name] < getattr(given, name)]
    if too_few:
        print(f"fewer than were asked for: {', '.join(too_few)}")
    print(json.dumps({**counts, "lost": len(lost)}))
    return 1 if lost or too_few else 0


def _trials(
    trials: Callable[[list[Bench], int], Iterable[Callable[[], Trial]]],
    count: int,
    given: argparse.Namespace,
    lost: list[str],
) -> int:
    """Run trials until so many disturbances came about; gives their number."""
    happened = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.workers) as pool:
        task = make_task(Path(folder) / "task")
        benches = [
            Bench(name, job, task, Path(folder) / str(number))
            for number, (name, job) in enumerate(JOBS.items())
        ]
        waiting = iter(trials(benches, given.seed))
        for _ in range(count):  # of which many come to something
            if happened >= count:
                break
            some = [next(waiting) for _ in range(given.workers * 4)]
            for trial in pool.map(lambda run: run(), some):
                happened += trial.happened
                _report(trial.name, trial.faults, lost)
                shutil.rmtree(trial.place, ignore_errors=True)
    return happened


def _fuzzed(count: int, seed: int, lost: list[str]) -> int:
    done = 0
    for name, faults, inputs in fuzz.run(count, seed):
        done += inputs
        _report(f"fuzz {name}", faults, lost)
    return done


def _soaked(steps: int, lost: list[str]) -> int:
    done = 0
    for tier in soak.TIERS:
        found = soak.in_a_child(tier, steps // len(soak.TIERS))
        done += found.steps
        _report(f"soak {tier}: {found}", found.faults, lost)
    return done


def _report(name: str, faults: list[str], lost: list[str]) -> None:
    if faults:
        lost.append(name)
    print(f"{'LOST' if faults else 'kept'}: {name}", *faults, sep="\n    ", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kill-points", type=int, default=200)
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--fuzz-inputs", type=int, default=20_000)
    parser.add_argument("--soak-steps", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main(arguments()))
