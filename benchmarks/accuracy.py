"""What each method learns: loss and accuracy against forwards, tokens and seconds.

A small pretrained OPT learns the Cornell subjectivity set, by MeZO as published, by this package's
methods, and by backpropagation, each with the learning rate that a grid of equal size found best
on one seed and on rows held out for that; 5,000 other rows are measured, with further seeds.

    python benchmarks/accuracy.py [--methods NAME ...] [--forwards 2000] [--seeds 5] [--search]
                                  [--acceptance DIR] [--out FILE] [--picture FILE] [--workers 2]
                                  [--points 10]

``--search`` runs the grids; what they found stands in ``--out``, and runs take the best rate from
there. Every run is written there as it ends, with its curve (a point is forwards, loss, accuracy,
tokens, seconds), and is not done again; one that was ended in the middle goes on from what it has
left in ``FILE.kept``. Tokens are those of batches, without padding, times forwards. Seconds are of
steps alone, and comparable only where nothing else ran: ``--seconds`` measures steps of all methods
in turn, MeZO's with its four draws. A run that diverges counts in medians, as of infinite loss; no
difference to the baseline is made of it. The last line is JSON, medians over seeds, null where the
median run diverged:
``{"methods": {NAME: {"accuracy": ..., "loss": ..., "forwards": ..., "seconds": ...}}}``.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accuracy_data import Data, data
from accuracy_kept import Kept
from accuracy_methods import METHODS, Forward, Reached, Run
from accuracy_report import draw, finite, has_diverged, loss_of, paired, show

from zo_offload.errors import DivergedError
from zo_offload.tasks import Evaluation, evaluate, evaluation_batches

DEFAULT_FOLDER = Path(__file__).resolve().parent.parent.parent / "shared" / "acceptance"
SEARCH_SEED, TIMED_STEPS = 1000, 12
POINTS = 10  # of a curve


@dataclass(frozen=True)
class Job:
    """A run.

    Attributes:
        method: Its name.
        seed: Of directions and of the order of the rows.
        forwards: To spend.
        lr: To begin with.
        search: Judged on the rows that choose.
    """

    method: str
    seed: int
    forwards: int
    lr: float
    search: bool


def run(job: Job, folder: Path, kept: Path, points: int = POINTS) -> dict[str, Any]:
    """Learn and judge; in a process of its own."""
    torch.set_num_threads(1)
    method, rows = METHODS[job.method], data(folder)
    steps = max(1, job.forwards // method.forwards)
    judged = rows.held_out if job.search else rows.measured
    due = {math.ceil(steps * point / points) for point in range(1, points + 1)}
    left = Kept(kept / f"{job.method}, seed {job.seed}, {job.forwards}, {job.lr:g}, {job.search}")
    asked = Run(folder, rows, job.seed, steps, job.lr, left.folder)
    curve, seconds, tokens, counted = left.curve(), 0.0, 0, 0
    with closing(method.learn(method, asked)) as learner:
        for (step, forward), seconds in timed(learner, left):
            tokens += sum(method.tokens(asked, each) for each in range(counted, step))
            counted, spent = step, step * method.forwards
            curve = [point for point in curve if point[0] < spent]  # what is not kept is done again
            if step in due:
                found = judge(forward, judged)
                if not math.isfinite(found.loss):
                    break
                curve.append([spent, found.loss, found.accuracy, tokens, round(seconds, 3)])
                left.keep(seconds, curve)
    left.forget()
    last = curve[-1] if len(curve) == len(due) else [steps * method.forwards, math.inf, 0.0]
    return {
        **asdict(job), "loss": last[1], "accuracy": last[2], "spent": last[0],
        "seconds": round(seconds, 1), "curve": curve,
    }  # fmt: skip


def timed(learner: Iterator[Reached], left: Kept) -> Iterator[tuple[Reached, float]]:
    """As far as it goes, with the seconds of all steps; where it begins is none."""
    reached = next(learner)
    seconds = left.seconds(reached.step)
    while True:
        yield reached, seconds
        began = time.perf_counter()
        try:
            reached = next(learner)
        except (StopIteration, DivergedError):
            return
        seconds += time.perf_counter() - began
        left.took(reached.step, seconds)


def judge(forward: Forward, rows: Any) -> Evaluation:
    """Loss and accuracy."""
    with torch.no_grad():
        return evaluate(forward, evaluation_batches(rows, 64))


def jobs_of(options: argparse.Namespace, done: list[dict[str, Any]]) -> list[Job]:
    """In an order in which a part is of use, too: a seed of every method first."""
    if options.search:
        return [
            Job(name, SEARCH_SEED, options.forwards, lr, True)
            for name in options.methods
            for lr in METHODS[name].lrs
        ]
    best = {name: best_lr(name, options, done) for name in options.methods}
    return [
        Job(name, seed, options.forwards, best[name], False)
        for seed in range(options.seeds)
        for name in options.methods
    ]


def best_lr(name: str, options: argparse.Namespace, done: list[dict[str, Any]]) -> float:
    """Of the grid, by the loss that the search found at this many forwards."""
    if options.lr is not None:
        return options.lr
    found = [
        each for each in done
        if each["search"] and each["method"] == name and each["forwards"] == options.forwards
        and each["lr"] in METHODS[name].lrs
    ]  # fmt: skip
    if len(found) < len(METHODS[name].lrs):
        raise SystemExit(
            f"{options.out}: {len(found)} of {len(METHODS[name].lrs)} learning rates of {name!r} "
            f"were tried with {options.forwards} forwards; run --search first, or give --lr"
        )
    if all(map(has_diverged, found)):
        raise SystemExit(
            f"{options.out}: {name!r} diverged at all of its grid; give it lower rates"
        )
    return min(found, key=loss_of)["lr"]


def notes(options: argparse.Namespace, found: list[dict[str, Any]]) -> dict[tuple[str, float], str]:
    """Of methods and learning rates: which the grid found best, and whether that is at its edge."""
    if options.lr is not None and not options.search:
        return {}
    said = {}
    for name in options.methods:
        same = [each for each in found if each["method"] == name and not has_diverged(each)]
        if same:
            lr = min(same, key=loss_of)["lr"]
            at_edge = lr in (min(METHODS[name].lrs), max(METHODS[name].lrs))
            words = ["best"] * options.search + ["edge of its grid"] * at_edge
            said[name, lr] = ", ".join(words)
    return said


def results(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Of all jobs; those that are at hand are not done again."""
    held = _read(options.out)
    wanted = jobs_of(options, held)
    keys = list(asdict(wanted[0]))
    done = {Job(**{key: each[key] for key in keys}): each for each in held}
    missing = [job for job in wanted if job not in done]
    kept = options.out.with_name(f"{options.out.name}.kept")
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        given = options.acceptance, kept, options.points
        under_way = [pool.submit(run, job, *given) for job in missing]
        for future in as_completed(under_way):
            found = future.result()
            with options.out.open("a") as file:
                file.write(json.dumps(found) + "\n")
            done[Job(**{key: found[key] for key in keys})] = found
            print(
                f"{found['method']}, seed {found['seed']}, lr {found['lr']:g}: loss "
                f"{found['loss']:.4f}, accuracy {found['accuracy']:.4f}, "
                f"{found['spent']:,} forwards in {found['seconds']:.0f} s",
                flush=True,
            )
    return [done[job] for job in wanted]


def seconds_a_step(options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step of each method, taken in turn on one thread."""
    from timing import alternating

    torch.set_num_threads(1)
    rows: Data = data(options.acceptance)
    learners = {}
    for name in options.methods:
        method = METHODS[name]
        timed = Run(options.acceptance, rows, 0, TIMED_STEPS + 3, method.lrs[0])
        learners[name] = method.learn(method, timed)
        next(learners[name])  # where it begins
    steps = {name: partial(next, learner) for name, learner in learners.items()}
    found = alternating(steps, TIMED_STEPS, warm_up=2)
    return {name: times.median for name, times in found.items()}


def _read(path: Path) -> list[dict[str, Any]]:
    """Results; a last line that was cut off is taken away."""
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    path.write_text(whole + "\n" if whole else "")
    return [json.loads(line) for line in whole.splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    folder = Path(os.environ.get("ZO_ACCEPTANCE", DEFAULT_FOLDER))
    parser.add_argument("--acceptance", type=Path, default=folder)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--forwards", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--lr", type=float, help="instead of the best of the grid")
    parser.add_argument("--points", type=int, default=POINTS, help="of each curve")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("accuracy.jsonl"))
    parser.add_argument("--picture", type=Path, default=Path("accuracy.png"))
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--seconds", action="store_true", help="of a step, in turn; nothing else")
    options = parser.parse_args()
    if not (options.acceptance / "opt-mini").is_dir():
        parser.error(f"{options.acceptance}: no opt-mini there; name the folder: --acceptance DIR")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if options.seconds:
        print(json.dumps({"seconds_a_step": seconds_a_step(options)}))
        return
    found = results(options)
    show(found, options.search, notes(options, found))
    if not options.search:
        paired(found)
        draw(found, options.picture)
    print(json.dumps({"methods": {name: _medians(found, name) for name in options.methods}}))


def _medians(found: list[dict[str, Any]], name: str) -> dict[str, float | None]:
    same = [each for each in found if each["method"] == name]
    return {
        "accuracy": median(each["accuracy"] for each in same),
        "loss": finite(median(map(loss_of, same))),
        "forwards": median(each["spent"] for each in same),
        "seconds": median(each["seconds"] for each in same),
    }


if __name__ == "__main__":
    main()
