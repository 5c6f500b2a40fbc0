"""``make quickstart``: fine-tune a streamed model through the real ``deepspeed`` launcher.

Without options, a small OPT is pretrained here and now on sentences that the project writes itself,
and then learns to tell good reviews from bad. With ``--model`` and ``--task``, the same on the real
thing: ``make quickstart MODEL=facebook/opt-125m TASK=sst2``, or a local Hugging Face directory and
a TSV or JSONL file (``DEV=`` names a held-out one; else every fifth example is held out).
"""

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from zo_offload.cli import Interrupted, fails_in_one_line
from zo_offload.errors import ConfigError
from zo_offload.quiet import quiet
from zo_offload.tasks import split_file

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs"
DEFAULT_STEPS = 150
LAUNCHERS_ENDED_BY = 256  # less the signal that has ended a rank: the launcher's exit status
console = Console(highlight=False)


@dataclass(frozen=True)
class Job:
    """What the launcher is to start: a task by name, or files and a prompt."""

    model: str
    train: Path | None = None
    dev: Path | None = None
    template: str | None = None
    labels: str | None = None
    task: str | None = None
    data: str | None = None


STEPS = click.IntRange(min=1)
STEPS.name = "whole number"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", help="Hugging Face directory or model id (default: made here).")
@click.option("--task", help="A name (SST-2), a .toml that declares one, or a TSV or JSONL file.")
@click.option("--data", help="A directory with the task's files, when --task is a name.")
@click.option("--dev", type=Path, help="Held-out examples, when --task is a file.")
@click.option("--template", help='Prompt, e.g. "{sentence} It was".')
@click.option("--labels", help='Label words, e.g. " terrible, great".')
@click.option("--steps", type=STEPS, default=DEFAULT_STEPS, show_default=True)
@click.option(
    "--dev-limit", type=click.IntRange(min=1), help="Use only the first examples held out."
)
@click.option("--config", type=Path, default=ROOT / "configs" / "quickstart.json")
@click.option("--output", type=Path, help="Where the run goes (default: under runs/).")
@fails_in_one_line
def main(
    model: str | None,
    task: str | None,
    data: str | None,
    dev: Path | None,
    template: str | None,
    labels: str | None,
    output: Path | None,
    **options: Any,
) -> None:
    """Fine-tune a model through the deepspeed launcher, its blocks streamed from host memory."""
    if (model is None) != (task is None):
        raise ConfigError(
            "--model and --task (MODEL=, TASK=) go together: the model made here knows the "
            "sentences made here, and no others"
        )
    job = embedded_job() if model is None or task is None else chosen_job(model, task, dev, data)
    job = replace(job, template=template or job.template, labels=_whole(labels) or job.labels)
    say(shown(job))
    # None is left out, so that folders are named as they were.
    given = {name: value for name, value in asdict(job).items() if value is not None} | options
    given["output"] = output or RUNS / run_name(model, task, given)
    flags = [
        f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None
    ]
    say("starting one rank through the deepspeed launcher")
    launch([str(ROOT / "launcher" / "train.py"), *flags])
    if (given["output"] / "summary.json").exists():  # it was not stopped on the way
        say(next_steps(job, given["output"]))


def say(text: str) -> None:
    """Whole lines, however wide the terminal is."""
    console.print(text, markup=False, soft_wrap=True)


def shown(job: Job) -> str:
    """What is about to be trained on."""
    if job.task is not None:
        return f"model {job.model}, task {job.task} of {job.data or 'the hub'} (DATA=)"
    return (
        f"model {job.model}, training on {job.train}, held out {job.dev}\n"
        f"prompt {json.dumps(job.template)} (TEMPLATE=), label words {json.dumps(job.labels)} "
        "(LABELS=)"
    )


def next_steps(job: Job, output: Path) -> str:
    """What there is to do with a finished run."""
    program = near(Path(sys.executable).with_name("zo-offload"))
    names = ("task", "data") if job.task is not None else ("dev", "template", "labels")
    values = {name: value for name in names if (value := getattr(job, name)) is not None}
    given = [
        f"--{name}={near(value) if isinstance(value, Path) else value}"
        for name, value in values.items()
    ]
    model = f"--model={near(output / 'model')}"
    return "\n".join(
        [
            "next:",
            f"  {shlex.join([program, 'report', near(output)])}  # a page of curves",
            f"  {shlex.join([program, 'eval', model, *given])}  # what it has learnt",
            "  make quickstart MODEL=... TASK=...  # a model and a task of yours: see README.md",
        ]
    )


def near(path: Path) -> str:
    """As it is called from here."""
    path, here = path.absolute(), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _whole(labels: str | None) -> str | None:
    """Label words as they were given: make drops the blank that a variable begins with."""
    words = (labels or "").split(",")
    dropped = "MAKELEVEL" in os.environ and len(words) > 1 and not words[0].startswith((" ", "["))
    if labels and dropped and all(word.startswith(" ") for word in words[1:]):
        return f" {labels}"
    return labels


def run_name(model: str | None, task: str | None, given: Mapping[str, Any]) -> str:
    """A folder of its own for every other command, so that none trips over another's run."""
    if model is None and given["steps"] == DEFAULT_STEPS and given["dev_limit"] is None:
        return "quickstart"
    name = "quickstart" if model is None else f"{Path(model).name}-{Path(task or '').stem}"
    asked = json.dumps({key: str(value) for key, value in given.items()}, sort_keys=True)
    return f"{name}-{hashlib.sha256(asked.encode()).hexdigest()[:8]}"


def launch(program: list[str]) -> None:
    """Run a program under the deepspeed launcher; where it fails, end as it ends."""
    deepspeed = str(ROOT / "launcher" / "deepspeed_quietly.py")
    # In a session of its own: the launcher would meet Ctrl-C with a traceback.
    with subprocess.Popen(
        [sys.executable, deepspeed, "--num_accelerators=1", *program], start_new_session=True
    ) as it:
        try:
            code = it.wait()
        except KeyboardInterrupt:
            interrupt_ranks(it.pid)
            it.wait()
            raise Interrupted("interrupted; the same command continues the run") from None
    for who, number in (("launcher", -code), ("run", LAUNCHERS_ENDED_BY - code)):
        if number in list(signal.Signals):
            reason = f"the {who} was ended by {signal.Signals(number).name}"
            raise click.ClickException(f"{reason}; the same command continues the run")
    if code:
        sys.exit(code)


def interrupt_ranks(launcher: int) -> None:
    """Ctrl-C for the programs under a launcher, after which it ends by itself."""
    for process in psutil.Process(launcher).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if not process.children():
                process.send_signal(signal.SIGINT)


def embedded_job() -> Job:
    """The model and task that the project makes itself."""
    folder = RUNS / "embedded"
    if not folder.exists():
        say("making a model and a task, once: a small OPT learns to read, in minutes")
    quiet()
    from zo_offload import embedded
    from zo_offload.embedded.pretrain import make_embedded

    loss_column = TextColumn("loss {task.fields[loss]}")
    columns = (TextColumn("pretraining a small OPT"), BarColumn(), loss_column)
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        shown = bar.add_task("", total=None, loss="-", visible=False)
        make_embedded(
            folder,
            progress=lambda step, steps, loss: bar.update(
                shown, completed=step, total=steps, loss=f"{loss:.3f}", visible=True
            ),
        )
    return Job(
        model=str(folder / "model"),
        train=folder / "train.tsv",
        dev=folder / "dev.tsv",
        template=embedded.TEMPLATE,
        labels=embedded.LABELS,
    )


def chosen_job(model: str, task: str, dev: Path | None, data: str | None) -> Job:
    """The model and task that the user names."""
    path = Path(task)
    if data is not None or path.suffix == ".toml" or not path.exists():
        return Job(model, dev=dev, task=task, data=data)
    train, held_out = (path, dev) if dev is not None else split(path)
    return Job(model, train, held_out, "{sentence} It was", " terrible, great")


def split(path: Path) -> tuple[Path, Path]:
    """A copy of a data file without every fifth example, and one of those."""
    parts = zip(("train", "dev"), split_file(path), strict=True)
    origin = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    folder = RUNS / "tasks" / f"{path.stem}-{origin}"
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, lines in parts:
        written.append(folder / f"{name}{path.suffix}")
        written[-1].write_bytes("".join(f"{line}\n" for line in lines).encode())
    return written[0], written[1]


if __name__ == "__main__":
    main()
