"""The command line: ``zo-offload train``, ``eval``, ``plan``, ``convert``, ...

Light to import: what takes seconds (torch, DeepSpeed, transformers) is imported by a command, after
it has said that it is starting.
"""

import errno
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click
from rich.console import Console

from zo_offload import bars, launched
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
from zo_offload.quiet import quiet, quiet_deepspeed
from zo_offload.run_summary import summary_lines
from zo_offload.stopping import Stopped
from zo_offload.wording import as_bytes, is_out_of_memory, one_line

Result = TypeVar("Result")

# Read when torch loads its thread pools. Every lane has one, and idle pools that spin would take
# the cores from the lane that runs, and from whatever else the machine does.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


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
        with bars.reporter() as bar:
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
        bars.console.print(f"{chosen.output}: this run is finished ({summary.steps} steps)")
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
    with bars.reporter() as bar:
        with bar.phase("starting"):
            quiet()
            from zo_offload import run
            from zo_offload.find_lr import command, report
        found = command.find(command.FindOptions(run.RunOptions(**options), trial_steps), bar)
    if found is None:  # the first rank speaks
        return
    bars.console.print(report.table(found))
    for line in report.lines(found):
        print(line)
    print(json.dumps(report.as_dict(found)))


@main.command(name="eval")
@takes(*TASK_OPTIONS, *EVAL_OPTIONS)
@fails_in_one_line
def evaluate(local_rank: int | None, **options: Any) -> None:
    """Evaluate a model on a task, zero-shot or after demonstrations."""
    with bars.reporter() as bar:
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
    with bars.shown() as bar:
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
    with bars.shown() as bar:
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
    with bars.shown() as bar, bar.phase(f"checking {file}"):
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
    with bars.shown() as bar, bar.phase(f"planning {options['model']}"):
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
    with bars.reporter() as bar:
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
    with bars.reporter() as bar:
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
        with bars.reporter() as bar:
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
    with bars.shown() as bar:
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
        with bars.reporter() as bar:
            with bar.phase("starting"):
                quiet()
                from zo_offload.export.command import ExportOptions, export
            done = export(ExportOptions(**options), bar)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; the same command does it again") from None
    files = f"{done.num_files} file{'s' if done.num_files > 1 else ''}"
    print(f"{done.directory}: {done.format}, {files} of weights, "
          f"{as_bytes(done.num_bytes)}, in {done.seconds:.1f} s")  # fmt: skip


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


if __name__ == "__main__":
    main()
