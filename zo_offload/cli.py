"""The command line: ``zo-offload train``, ``eval``, ``plan``, ``convert``, ...

Light to import: what takes seconds (torch, DeepSpeed, transformers) is imported by a command, after
it has said that it is starting.
"""

import errno
import functools
import json
import logging
import math
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from zo_offload import launched
from zo_offload.cli_options import (
    CHECK_OPTIONS,
    CONVERT_OPTIONS,
    DOCTOR_OPTIONS,
    EVAL_OPTIONS,
    EXPORT_OPTIONS,
    NEW_OPTIONS,
    PLAN_MEMORY,
    PLAN_OPTIONS,
    PLAN_RATES,
    REPLAY_OPTIONS,
    REPORT_OPTIONS,
    SENSITIVITY_OPTIONS,
    TASK_OPTIONS,
    TRAIN_OPTIONS,
    WATCH_OPTIONS,
    takes,
)
from zo_offload.errors import ConfigError, ZOError
from zo_offload.reporter import Item, Reporter
from zo_offload.stopping import Stopped
from zo_offload.wording import (
    as_bytes,
    as_loss,
    as_speed,
    as_time,
    is_out_of_memory,
    one_line,
)

if TYPE_CHECKING:
    from zo_offload.run import Summary

Result = TypeVar("Result")

# Read when torch loads its thread pools. Every lane has one, and idle pools that spin would take
# the cores from the lane that runs, and from whatever else the machine does.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

console = Console(
    highlight=False,
    markup=False,
    soft_wrap=True,
    # Open MPI gives ranks a terminal of their own, wherever its output goes.
    force_terminal=False if launched.by_mpi() else None,
)

HEARTBEAT_SECONDS = 30.0  # off a terminal, where there is no bar
FIRST_BEAT_SECONDS = 2.0  # into an evaluation
RECENT_STEPS = 50  # that a speed is the mean of
NOISE_OF_LIBRARIES = (
    "Setting accelerator to CPU",  # there is none, and the summary says where the weights were
    "Attempting to get learning rate",  # DeepSpeed's schedulers, of themselves
)


class Interrupted(click.ClickException):
    """Ctrl-C."""

    exit_code = 130  # 128 + SIGINT, as shells have it


def fails_in_one_line(command: Callable[..., Result]) -> Callable[..., Result]:
    """An error that a user can cause is one line on stderr and exit status 1, not a traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Result:
        try:
            return command(*args, **kwargs)
        except ZOError as error:
            if error.is_told and launched.rank():
                raise SystemExit(1) from error  # the first rank has said it
            _end(str(error), error, everywhere=error.is_told)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            _end(f"out of memory: {str(error).split('Exception raised from')[0]}", error)
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output has gone
                raise
            _end(str(error), error)
        except KeyboardInterrupt:
            raise Interrupted("interrupted") from None

    return wrapped


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="zo_offload")
def main() -> None:
    """Fine-tune language models far larger than the accelerator, with forward passes only."""


@main.command()
@takes(*TASK_OPTIONS, *TRAIN_OPTIONS)
@fails_in_one_line
def train(local_rank: int | None, find_lr: bool, trial_steps: int | None, **options: Any) -> None:
    """Fine-tune a model on a task, and export it."""
    if find_lr:
        _find_lr(trial_steps, options)
        return
    if trial_steps is not None:
        raise ConfigError(
            "--trial-steps: goes with --find-lr, which is not given; give both, or neither"
        )
    try:
        with reporter() as bar:
            with bar.phase("starting"):
                quiet()
                from zo_offload import run, run_first_order
            chosen = run.RunOptions(**options)
            by = run_first_order if chosen.first_order else run
            summary = by.train(chosen, bar)
    except KeyboardInterrupt:
        again = "begins it anew" if options["first_order"] else "continues the run"
        raise Interrupted(f"interrupted; the same command {again}") from None
    except Stopped as stopped:
        _say_stopped(stopped, options["output"], options["steps"])
        return
    if summary is None:  # the first rank speaks
        return
    if not bar.trained:
        console.print(f"{chosen.output}: this run is finished ({summary.steps} steps)")
    print(f"{summary.metric} before: {summary.accuracy_before:.4f}")
    print(f"{summary.metric} after: {summary.accuracy_after:.4f}")
    for line in summary_lines(summary, chosen.output):
        print(line)


def _say_stopped(stopped: Stopped, output: str, steps: int) -> None:
    if launched.rank():
        return
    done = f" after {stopped.steps} of {steps} steps" if stopped.steps is not None else ""
    print(f"{output}: stopped{done}; the same command continues the run")


def _find_lr(trial_steps: int | None, options: dict[str, Any]) -> None:
    with reporter() as bar:
        with bar.phase("starting"):
            quiet()
            from zo_offload import run
            from zo_offload.find_lr import command, report
        found = command.find(command.FindOptions(run.RunOptions(**options), trial_steps), bar)
    if found is None:  # the first rank speaks
        return
    console.print(report.table(found))
    for line in report.lines(found):
        print(line)
    print(json.dumps(report.as_dict(found)))


@main.command(name="eval")
@takes(*TASK_OPTIONS, *EVAL_OPTIONS)
@fails_in_one_line
def evaluate(local_rank: int | None, **options: Any) -> None:
    """Evaluate a model on a task, zero-shot or after demonstrations."""
    with reporter() as bar:
        with bar.phase("starting"):
            quiet()
            from zo_offload import run
        found = run.evaluate_model(run.TaskOptions(**options), bar)
    if launched.rank():
        return
    for name, value in {found.metric: found.accuracy, **found.others}.items():
        print(f"{name}: {value:.4f}")
    print(f"loss: {found.loss:.4f}")
    print(f"examples: {found.num_examples}")


@main.command(name="plan")
@takes(*PLAN_OPTIONS)
@fails_in_one_line
def plan_run(model: str, config: str | None, json: bool, **options: Any) -> None:
    """Say what a run needs and how long a step takes, from the model's shapes alone."""
    with shown() as bar:
        with bar.phase("starting"):
            quiet()
            from zo_offload.plan import command
        with bar.phase(f"planning {model}"):
            written = _planned(command, model, config, json, options)
    if written.text:
        print(written.text)
    if written.refusal is not None:
        raise written.refusal


def _planned(
    command: Any, model: str, config: str | None, as_json: bool, options: dict[str, Any]
) -> Any:
    memory = {name.removesuffix("_gb"): options.pop(name) for name in PLAN_MEMORY}
    rates = {name: options.pop(name) for name in PLAN_RATES}
    return command.run(command.PlanOptions(model, config, memory, rates, options, as_json))


@main.command()
@takes(*DOCTOR_OPTIONS)
@fails_in_one_line
def doctor(path: tuple[str, ...], json: bool) -> None:
    """Say what this machine has and does in a second, and what to mend."""
    with shown() as bar:
        with bar.phase("starting"):
            quiet_deepspeed()
            from zo_offload.doctor import command
        rows = command.examine([Path(each) for each in path], bar)
    print(command.as_json(rows) if json else command.as_table(rows))
    if any(row.prevents for row in rows):
        raise SystemExit(1)


@main.group(name="config")
def config_commands() -> None:
    """Describe, check and begin a JSON."""


@config_commands.command(name="schema")
@fails_in_one_line
def schema() -> None:
    """Print the JSON Schema (draft 2020-12) of a whole DeepSpeed JSON, for editors."""
    quiet_deepspeed()
    from zo_offload.config_schema import json_schema

    print(json.dumps(json_schema(), indent=2))


@config_commands.command(name="check")
@takes(*CHECK_OPTIONS)
@fails_in_one_line
def check_config(file: str, trainer: bool, model: str | None, **options: Any) -> None:
    """Say all that is wrong with a JSON, or the defaults that matter."""
    memory = {name.removesuffix("_gb"): size for name, size in options.items()}
    with shown() as bar, bar.phase(f"checking {file}"):
        quiet() if model is not None else quiet_deepspeed()
        from zo_offload.config_command import checked

        said, mistakes = checked(file, trainer, model, memory)
    for mistake in mistakes:
        click.echo(f"Error: {one_line(mistake)}", err=True)
    if mistakes:
        raise SystemExit(1)
    print("\n".join(said))


@config_commands.command(name="new")
@takes(*NEW_OPTIONS)
@fails_in_one_line
def new_config(**options: Any) -> None:
    """Write a JSON to begin with, and say what was decided and why."""
    with shown() as bar, bar.phase(f"planning {options['model']}"):
        quiet()
        from zo_offload.config_new import NewOptions, begin

        lines = begin(NewOptions(**options))
    for line in lines:
        print(line)


@main.command(name="convert")
@takes(*CONVERT_OPTIONS)
@fails_in_one_line
def convert_model(model: str, output: str, config: str | None, stripe: tuple[str, ...]) -> None:
    """Lay a model out on disk once, so that runs open it in seconds."""
    with reporter() as bar:
        with bar.phase("starting"):
            quiet()
            from zo_offload.convert import convert
        done = convert(model, output, config, stripe, bar)
    forward, master = ", ".join(done.settings["forward"]), done.settings["master"]
    print(f"{done.directory}: {done.num_units} units, {as_bytes(done.disk_bytes)}, in "
          f"{done.seconds:.1f} s")  # fmt: skip
    print(f"  for runs that compute in {forward}, with master {master}, "
          f"unit {done.settings['unit']}")  # fmt: skip
    if not done.has_tokenizer:
        print("  no tokenizer was found beside the model: copy its files there")


@main.command()
@takes(*SENSITIVITY_OPTIONS)
@fails_in_one_line
def sensitivity(**options: Any) -> None:
    """Score weights by their squared gradients on a text, and write a mask of the largest."""
    with reporter() as bar:
        with bar.phase("starting"):
            quiet()
            from zo_offload.scoring import ScoringOptions, score
        chosen = ScoringOptions(**options)
        done = score(chosen, bar)
    mask = done.mask
    found = f"{mask.num_chosen:,} of {mask.origin.candidates:,} weights"
    where = f"in {len(mask.chosen)} matrices, by {mask.origin.method}"
    print(f"{chosen.output}: {found} {where}, in {done.seconds:.1f} s")


@main.command(name="replay")
@takes(*REPLAY_OPTIONS)
@fails_in_one_line
def replay_journal(**options: Any) -> None:
    """Rebuild the weights after a step from a run's base and journal."""
    try:
        with reporter() as bar:
            with bar.phase("starting"):
                quiet()
                from zo_offload.replay.command import ReplayOptions, replay
            done = replay(ReplayOptions(**options), bar)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; the same command continues it") from None
    took = f"step {done.step}, in {done.seconds:.1f} s"
    if done.was_there:
        print(f"{done.directory}: holds the weights of step {done.step} already")
    elif done.compared is not None:
        print(f"{done.directory}: {done.compared} tensors are equal to the replay's, {took}")
    else:
        print(f"{done.directory}: {done.parameters:,} parameters, {took}")


@main.command(name="report")
@takes(*REPORT_OPTIONS)
@fails_in_one_line
def write_report(run_dir: tuple[str, ...], output: str | None) -> None:
    """Write a page on a run, or on several side by side, with pictures beside it."""
    with shown() as bar:
        with bar.phase("starting"):
            from zo_offload.report.command import report
        done = report(run_dir, output, bar)
    for run in done.runs:
        for line in run.missing:
            print(f"{run.directory}: {line}")
    runs = f"{len(done.runs)} run{'s' if len(done.runs) > 1 else ''}"
    print(f"{done.page}: {runs}, {len(done.pictures)} pictures beside it")


@main.command(name="watch")
@takes(*WATCH_OPTIONS)
@fails_in_one_line
def watch_run(run_dir: str, once: bool, interval: float) -> None:
    """Show a run in the terminal, while another process works on it."""
    from zo_offload.report.watch import watch

    # As wide as the terminal: what does not fit is folded, unlike the lines of a log.
    watch(Path(run_dir), Console(highlight=False, markup=False), once, interval)


@main.command(name="export")
@click.argument("source", metavar="RUN_OR_CHECKPOINT")
@takes(*EXPORT_OPTIONS)
@fails_in_one_line
def export_trained(**options: Any) -> None:
    """Write what a run trained as a Hugging Face model, an adapter, or a delta to its base.

    RUN_OR_CHECKPOINT is the --output of train, finished or stopped; a tag that save_checkpoint
    made; or a delta, which becomes a model again.
    """
    try:
        with reporter() as bar:
            with bar.phase("starting"):
                quiet()
                from zo_offload.export.command import ExportOptions, export
            done = export(ExportOptions(**options), bar)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; the same command does it again") from None
    files = f"{done.num_files} file{'s' if done.num_files > 1 else ''}"
    print(f"{done.directory}: {done.format}, {files} of weights, "
          f"{as_bytes(done.num_bytes)}, in {done.seconds:.1f} s")  # fmt: skip


def shown() -> Reporter:
    """Bars on a terminal and nothing elsewhere: of commands whose output is read by programs."""
    return reporter() if console.is_terminal else Reporter()


def reporter() -> Reporter:
    """Of this process: among ranks only the first one shows what happens."""
    return Reporter() if launched.rank() else Bar()


class Bar(Reporter):
    """Progress bars on a terminal; elsewhere a line for each phase, evaluation and half minute."""

    def __init__(self) -> None:
        self.trained = False
        self._live = console.is_terminal
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            disable=not self._live,
            transient=True,
        )
        self._loss: float | None = None
        self._ends: deque[float] = deque(maxlen=RECENT_STEPS + 1)
        self._beat = time.monotonic()

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._progress.stop()

    @contextmanager
    def phase(self, name: str, quiet: bool = False) -> Generator[None, None, None]:
        """A spinner, or a line."""
        if not self._live and not quiet:
            console.print(name)
        task = self._progress.add_task(name, total=None, detail="")
        try:
            yield
        finally:
            self._progress.remove_task(task)

    def say(self, line: str) -> None:
        """A line above the bars."""
        console.print(line)

    def counted(self, name: str, items: Iterable[Item], count: int) -> Iterator[Item]:
        """A bar that fills up with the items."""
        task = self._progress.add_task(name, total=count, detail=f"0/{count}")
        self._beat = time.monotonic() - HEARTBEAT_SECONDS + FIRST_BEAT_SECONDS
        try:
            for number, item in enumerate(items):
                self._progress.update(task, completed=number, detail=f"{number}/{count}")
                self._say_now_and_then(f"{name}: {number}/{count}")
                yield item
        finally:
            self._progress.remove_task(task)

    def on_start(self, first_step: int, steps: int) -> None:
        """A bar of steps."""
        self.trained = True
        self._steps = steps
        if first_step:
            console.print(f"continuing after {first_step} steps")
        self._task = self._progress.add_task(
            "training", total=steps, completed=first_step, detail=f"{first_step}/{steps}"
        )

    def on_evaluation(
        self, step: int, accuracy: float, loss: float, metric: str = "accuracy"
    ) -> None:
        """A line above the bar."""
        console.print(f"step {step}: dev {metric} {accuracy:.4f}, dev loss {loss:.4f}")
        self._ends.clear()  # an evaluation's time is not a step's
        self._beat = time.monotonic()

    def on_step(self, step: int, loss: float) -> None:
        """Loss (smoothed), speed and what remains."""
        if math.isfinite(loss):  # a step that was skipped has none
            self._loss = loss if self._loss is None else 0.95 * self._loss + 0.05 * loss
        self._ends.append(time.monotonic())
        detail = f"{step + 1}/{self._steps}  loss {as_loss(self._loss)}"
        seconds = self._ends[-1] - self._ends[0]
        if seconds > 0:
            speed = (len(self._ends) - 1) / seconds
            remaining = round((self._steps - step - 1) / speed)
            detail += f"  {as_speed(speed)}  ETA {as_time(remaining)}"
        self._progress.update(self._task, completed=step + 1, detail=detail)
        self._say_now_and_then(f"step {detail}")

    def _say_now_and_then(self, line: str) -> None:
        if not self._live and time.monotonic() - self._beat > HEARTBEAT_SECONDS:
            console.print(line)
            self._beat = time.monotonic()


def summary_lines(summary: "Summary", directory: str) -> list[str]:
    """What a run found, and where its files lie."""
    noise, sent = summary.noise_over_signal, summary.rank_bytes_per_step
    equal = summary.equal_share
    rows = {
        summary.metric: f"{summary.accuracy_before:.4f} -> {summary.accuracy_after:.4f}",
        "dev loss": f"{as_loss(summary.loss_before)} -> {as_loss(summary.loss_after)}"
        + verdict(summary.loss_before, summary.loss_after),
        "model": f"{summary.model_parameters:,} parameters, {as_bytes(summary.model_bytes)}",
        "weights on the device": f"{as_bytes(summary.peak_device_bytes)} at the peak",
        "weights on the host": as_bytes(summary.host_bytes),
        "sent between ranks": "not measured" if sent is None else f"{sent} bytes a step",
        "noise over signal": "not measured" if noise is None else f"{noise:.2g}",
        "equal losses": "not counted" if equal is None else f"{100 * equal:.3g} % of the probes",
        "journal": summary.journal,
    }
    if summary.first_order:
        head = {name: rows[name] for name in (summary.metric, "dev loss", "model")}
        held = f"{as_bytes(summary.peak_device_bytes)} with gradients and moments"
        rows = head | {"weights in memory": held}
    rows |= {
        "model directory": f"{directory.rstrip('/')}/model",
        "metrics": f"{directory.rstrip('/')}/metrics.csv",
        "curve": f"{directory.rstrip('/')}/curve.png",
    }
    if summary.skipped_steps:
        rows["skipped steps"] = f"{summary.skipped_steps}: their losses were not finite or too high"
    if summary.rollbacks:
        rows["roll backs"] = f"{summary.rollbacks}: a smaller learning rate is worth a try"
    if summary.eps_warning is not None:
        rows["eps"] = summary.eps_warning
    return [f"  {name:<23}{value}" for name, value in rows.items()]


def verdict(before: float | None, after: float | None) -> str:
    """What is said of a loss on the dev set that training did not lower.

    Example:
        >>> verdict(0.8328, 0.83279), verdict(0.83, 1.07), verdict(0.83, 0.71)
        (': unchanged; try a larger rate', ': worse; try a smaller rate', '')
    """
    if before is None or after is None:
        return ""
    if abs(after - before) < 1e-4 * abs(before):
        return ": unchanged; try a larger rate"
    return ": worse; try a smaller rate" if not after < before else ""


class _OneLineWarnings(logging.Handler):
    """Our own warnings, in the style of our errors."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"Warning: {one_line(record.getMessage())}", err=True)


def _of_rank(text: str) -> str:
    return f"rank {launched.rank()}: {text}" if launched.rank() else text


def _end(text: str, error: BaseException, everywhere: bool = False) -> NoReturn:
    """Say in one line what is wrong, and end; ``everywhere`` when every rank does."""
    told = _of_rank(one_line(text))
    if launched.by_mpi() and not everywhere:
        # A rank that ends alone would wait at its exit for the others, and they for it.
        from zo_offload import process_group

        click.echo(f"Error: {told}", err=True)
        process_group.abort()
    raise click.ClickException(told) from error


def _is_ours_to_show(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(NOISE_OF_LIBRARIES)


def quiet() -> None:
    """Leave the terminal to us: libraries report warnings only, and draw no bars of their own."""
    quiet_deepspeed()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft's
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def quiet_deepspeed() -> None:
    """The same of DeepSpeed alone, before it is imported; and our own warnings a line each."""
    os.environ.setdefault("DS_LOG_LEVEL", "warning")  # for when its logger is made,
    deepspeed = logging.getLogger("DeepSpeed")  # and for when it has been
    deepspeed.setLevel(logging.WARNING)
    deepspeed.addFilter(_is_ours_to_show)
    ours = logging.getLogger("zo_offload")
    if not any(isinstance(handler, _OneLineWarnings) for handler in ours.handlers):
        # The first rank's are every rank's.
        level = logging.ERROR if launched.rank() else logging.WARNING
        ours.addHandler(_OneLineWarnings(level))


if __name__ == "__main__":
    main()
