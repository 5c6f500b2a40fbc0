"""``zo-offload train --find-lr``: from options to what was found, in the run's directory."""

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from zo_offload import alike, files, run
from zo_offload.config_update import momentum_of
from zo_offload.errors import ConfigError
from zo_offload.find_lr.report import Found, write
from zo_offload.find_lr.slopes import Slopes, by_curvature, by_loss
from zo_offload.find_lr.sweep import search
from zo_offload.find_lr.trials import MOST_STEPS, Trials, held_out_batches, tried_config
from zo_offload.reporter import Reporter
from zo_offload.run_directory import FOUND
from zo_offload.step import Stepper

logger = logging.getLogger(__name__)

SHARE_OF_RUN = 50  # a try takes a run's steps over this,
LEAST_STEPS, ENOUGH_STEPS = 20, 100  # at least, at most
MOST_HELD_OUT = 256  # examples


@dataclass(frozen=True)
class FindOptions:
    """The run, and how long a try is (default: by the run's steps)."""

    run: run.RunOptions
    trial_steps: int | None = None

    @property
    def steps(self) -> int:
        """Of a try."""
        steps = self.run.steps
        wanted = self.trial_steps or max(LEAST_STEPS, min(steps // SHARE_OF_RUN, ENOUGH_STEPS))
        return min(wanted, steps)


def find(options: FindOptions, reporter: Reporter) -> Found | None:
    """Try learning rates on the run's task. Every rank calls it; the model stays as it is.

    Returns:
        What was found, on the first rank; None on the others.

    Raises:
        ZOError: With one line for the user.
    """
    replica = run.connected()
    with reporter.phase("reading the data", quiet=True):
        config, task, asked = replica.all_or_none(lambda: _asked(options))
        alike.refuse_other_options(replica, asked)
    directory = Path(options.run.output)
    with ExitStack() as stack:

        def claim() -> bytes:
            stack.enter_context(_claimed(directory))
            return b""

        replica.share(claim)
        tried = tried_config(config, options.steps)
        engine = run.start_engine(replica, task, tried, reporter, options.run.steps)
        try:
            found = _tried(engine, task, options, reporter)
        finally:
            engine.destroy()
        if replica.is_first:
            write(found, directory)
        replica.wait_for_all()
        return found if replica.is_first else None


def _asked(options: FindOptions) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    if options.run.first_order is not None:
        raise ConfigError(
            f"--first-order {options.run.first_order}: --find-lr tries rates of zeroth-order steps "
            "only; leave one of the two out"
        )
    if options.steps > MOST_STEPS:
        raise ConfigError(
            f"--trial-steps: at most {MOST_STEPS:,}, found {options.steps:,}; lower it"
        )
    return run.asked_for(options.run)


@contextmanager
def _claimed(directory: Path) -> Iterator[None]:
    """An empty directory, or one with what was found earlier; one process at a time."""
    ours = {*FOUND, *(name + files.ASIDE for name in FOUND), files.LOCK}
    try:
        files.make_directory(directory)
        others = sorted({path.name for path in directory.iterdir()} - ours)
        if others:
            raise ConfigError(
                f"--output: {directory} holds {others[0]} and more; --find-lr writes into a "
                "directory that is empty, or holds what it found; give another"
            )
        with files.locked(directory):
            try:
                yield
            finally:
                (directory / files.LOCK).unlink()
    except BlockingIOError:
        raise ConfigError(
            f"--output: another process is at work in {directory}; wait for it, or choose another"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"--output: cannot write {directory}: {error.strerror}; give another"
        ) from error


def _tried(engine: Any, task: Any, options: FindOptions, reporter: Reporter) -> Found:
    stepper: Stepper = engine.stepper
    group = engine.optimizer.param_groups[0]
    rows = 2 * engine.train_micro_batch_size_per_gpu()
    trials = Trials(
        stepper,
        lambda step: list(run.micro_batches(engine, task, step)),
        held_out_batches(task.dev[:MOST_HELD_OUT], task.way, rows),
        options.steps,
        float(group.get("weight_decay", 0.0)),
    )
    with reporter.phase("measuring slopes"):
        before = trials.loss()
        found, length = trials.slopes()
    _refuse_dead(trials)
    guess = _guess(found, stepper, length) or float(group["lr"])
    attempt = partial(_attempt, trials, reporter, options.steps)
    verdict = search(attempt, guess, before, lambda: trials.moved)
    for_run = (len(task.dev[:MOST_HELD_OUT]), options.run.steps, options.steps)
    told = trials.watch.finding.text if trials.watch.finding else None
    whole = options.run.steps * trials.forwards_of_step
    trials.begin(0)  # nothing of the tries stays
    return Found(verdict, found, guess, *for_run, trials.forwards, whole, told)


def _attempt(trials: Trials, reporter: Reporter, steps: int, lr: float, number: int) -> float:
    with reporter.phase(f"lr {lr:g}, round {number + 1}: {steps} steps"):
        return trials.attempt(lr, number)


def _refuse_dead(trials: Trials) -> None:
    watch = trials.watch
    if watch.finding is None:
        return
    if watch.finding.kind == "dead":
        raise ConfigError(f"zeroth_order.eps: no learning rate can help: {watch.finding.text}")
    logger.warning("%s", watch.finding.text)


def _guess(found: Slopes, stepper: Stepper, length: float) -> float | None:
    """Where to begin: the smaller guess of the two, in units of what the run does with slopes."""
    config = stepper.config
    guesses = [rate for rate in (by_curvature(found, config.probes), by_loss(found)) if rate]
    if not guesses:
        return None
    guess = min(guesses) / length
    momentum = momentum_of(config.update, config.trainable.mode)
    if momentum is None:
        return guess
    if momentum.adam is not None:
        return guess * length * math.sqrt(found.squared.value)
    return guess * (1.0 - momentum.beta)
