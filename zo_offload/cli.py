"""The command line: ``zo-offload train`` and ``zo-offload eval``."""

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from zo_offload import run
from zo_offload.errors import ZOError

console = Console(highlight=False)


def fails_in_one_line(command: Callable) -> Callable:
    """An error that a user can cause is one line on stderr and exit status 1, not a traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except ZOError as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            raise click.ClickException("interrupted; the same command continues the run") from None

    return wrapped


def task_options(command: Callable) -> Callable:
    """Options that name a model and a task."""
    options = [
        click.option("--model", required=True, metavar="DIR_OR_ID", help="Hugging Face directory or model id."),
        click.option("--dev", required=True, metavar="FILE", help="Held-out examples: TSV with a header, or JSONL."),
        click.option("--template", required=True, help='Prompt with fields, e.g. "{sentence} It was".'),
        click.option("--labels", required=True, help='Label words in the order of their indices, e.g. " terrible, great".'),
        click.option("--config", metavar="FILE", help="DeepSpeed JSON with a zeroth_order block."),
        click.option("--dev-limit", type=click.IntRange(min=1), help="Use only the first examples of --dev."),
        click.option("--truncate", is_flag=True, help="Cut texts that are longer than the model's context."),
        click.option("--local_rank", "--local-rank", type=int, hidden=True, help="Set by launchers."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="zo_offload")
def main() -> None:
    """Fine-tune language models far larger than the accelerator, with forward passes only."""


@main.command()
@task_options
@click.option(
    "--train", required=True, metavar="FILE", help="Training examples: TSV with a header, or JSONL."
)
@click.option("--steps", required=True, type=int, help="Steps to train.")
@click.option(
    "--output",
    required=True,
    metavar="DIR",
    help="Where the run goes; the same command continues it.",
)
@click.option(
    "--eval-every", type=click.IntRange(min=1), help="Steps between evaluations (default: a tenth)."
)
@fails_in_one_line
def train(local_rank: int | None, **options: Any) -> None:
    """Fine-tune a causal LM on a classification task, and export it."""
    _quiet()
    chosen = run.RunOptions(**options)
    with Bar() as bar:
        summary = run.train(chosen, bar)
    if bar.first_step is None:
        console.print(f"{chosen.output}: this run is finished ({summary.steps} steps)")
    print(f"accuracy before: {summary.accuracy_before:.4f}")
    print(f"accuracy after: {summary.accuracy_after:.4f}")
    console.print(summary_table(summary, chosen.output))


@main.command(name="eval")
@task_options
@fails_in_one_line
def evaluate(local_rank: int | None, **options: Any) -> None:
    """Evaluate a causal LM on a classification task."""
    _quiet()
    found = run.evaluate_model(run.TaskOptions(**options))
    print(f"accuracy: {found.accuracy:.4f}")
    print(f"loss: {found.loss:.4f}")
    print(f"examples: {found.num_examples}")


class Bar(run.Reporter):
    """A progress bar on a terminal; elsewhere a line an evaluation."""

    def __init__(self) -> None:
        self.first_step: int | None = None
        self._loss: float | None = None
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]} steps/s"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._progress.stop()

    def on_start(self, first_step: int, steps: int) -> None:
        self.first_step = first_step
        if first_step:
            console.print(f"continuing after {first_step} steps")
        self._progress.start()
        self._task = self._progress.add_task(
            "", total=steps, completed=first_step, loss="-", speed="-"
        )

    def on_evaluation(self, step: int, accuracy: float, loss: float) -> None:
        console.print(f"step {step}: dev accuracy {accuracy:.4f}, dev loss {loss:.4f}")

    def on_step(self, step: int, loss: float) -> None:
        self._loss = loss if self._loss is None else 0.95 * self._loss + 0.05 * loss
        speed = self._progress.tasks[self._task].speed
        shown = f"{speed:.2f}" if speed else "-"
        self._progress.update(self._task, completed=step + 1, loss=f"{self._loss:.4f}", speed=shown)


def summary_table(summary: run.Summary, directory: str) -> Table:
    """What a run found, and where its files lie."""
    table = Table(show_header=False, box=None, padding=(0, 2))
    noise = (
        "not measured" if summary.noise_over_signal is None else f"{summary.noise_over_signal:.3f}"
    )
    rows = {
        "accuracy": f"{summary.accuracy_before:.4f} -> {summary.accuracy_after:.4f}",
        "dev loss": f"{summary.loss_before:.4f} -> {summary.loss_after:.4f}",
        "model": f"{summary.model_parameters:,} parameters, {as_bytes(summary.model_bytes)}",
        "weights on the device": f"{as_bytes(summary.peak_device_bytes)} at the peak",
        "weights on the host": as_bytes(summary.host_bytes),
        "sent between ranks": f"{summary.rank_bytes_per_step} bytes a step",
        "noise over signal": noise,
        "model directory": f"{directory}/model",
        "journal": f"{directory}/journal",
        "metrics": f"{directory}/metrics.csv",
        "curve": f"{directory}/curve.png",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def as_bytes(count: int) -> str:
    """Bytes with a binary unit.

    Example:
        >>> as_bytes(1536), as_bytes(3 * 2**30)
        ('1.5 KiB', '3.0 GiB')
    """
    if count < 1024:
        return f"{count} B"
    value, units = float(count), iter(["KiB", "MiB", "GiB", "TiB"])
    unit = next(units)
    value /= 1024
    while value >= 1024:
        value, unit = value / 1024, next(units)
    return f"{value:.1f} {unit}"


def _quiet() -> None:
    """Leave the terminal to us: libraries report warnings only, and draw no bars of their own."""
    import os

    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if "transformers" not in sys.modules:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    main()
