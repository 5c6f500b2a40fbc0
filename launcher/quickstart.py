"""``make quickstart``: fine-tune a streamed model through the real ``deepspeed`` launcher.

Without options, a small OPT is pretrained here and now on sentences that the project writes itself,
and then learns to tell good reviews from bad. With ``--model`` and ``--task``, the same on the real
thing: ``make quickstart MODEL=facebook/opt-125m TASK=sst2``, or a local Hugging Face directory and
a TSV or JSONL file (``DEV=`` names a held-out one; else every fifth example is held out).
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from zo_offload.cli import fails_in_one_line
from zo_offload.errors import ConfigError
from zo_offload.tasks import split_file
from zo_offload.tasks.named import fetch_task

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs"
DEFAULT_STEPS = 600
console = Console(highlight=False)


@dataclass(frozen=True)
class Job:
    """What the launcher is to start."""

    model: str
    train: Path
    dev: Path
    template: str
    labels: str


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", help="Hugging Face directory or model id (default: made here).")
@click.option("--task", help="A name (sst2), or a TSV or JSONL file.")
@click.option("--dev", type=Path, help="Held-out examples, when --task is a file.")
@click.option("--template", help='Prompt, e.g. "{sentence} It was".')
@click.option("--labels", help='Label words, e.g. " terrible, great".')
@click.option("--steps", type=click.IntRange(min=1), default=DEFAULT_STEPS, show_default=True)
@click.option("--config", type=Path, default=ROOT / "configs" / "quickstart.json")
@click.option("--output", type=Path, help="Where the run goes (default: under runs/).")
@fails_in_one_line
def main(
    model: str | None,
    task: str | None,
    dev: Path | None,
    template: str | None,
    labels: str | None,
    steps: int,
    config: Path,
    output: Path | None,
) -> None:
    """Fine-tune a model through the deepspeed launcher, its blocks streamed from host memory."""
    if (model is None) != (task is None):
        raise ConfigError("--model and --task (MODEL=, TASK=) go together: give both, or neither")
    job = embedded_job() if model is None or task is None else chosen_job(model, task, dev)
    name = "quickstart" if model is None else f"{Path(model).name}-{Path(task or '').stem}"
    command = [
        str(Path(sys.executable).with_name("deepspeed")),
        "--num_accelerators=1",
        str(ROOT / "launcher" / "train.py"),
        f"--model={job.model}",
        f"--train={job.train}",
        f"--dev={job.dev}",
        f"--template={template or job.template}",
        f"--labels={labels or job.labels}",
        f"--steps={steps}",
        f"--config={config}",
        f"--output={output or RUNS / name}",
    ]
    sys.exit(subprocess.run(command, check=False).returncode)


def embedded_job() -> Job:
    """The model and task that the project makes itself."""
    from zo_offload import embedded
    from zo_offload.embedded.pretrain import make_embedded

    folder = RUNS / "embedded"
    loss_column = TextColumn("loss {task.fields[loss]}")
    columns = (TextColumn("pretraining a small OPT"), BarColumn(), loss_column)
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        shown = bar.add_task("", total=None, loss="-")
        make_embedded(
            folder,
            progress=lambda step, steps, loss: bar.update(
                shown, completed=step, total=steps, loss=f"{loss:.3f}"
            ),
        )
    return Job(
        model=str(folder / "model"),
        train=folder / "train.tsv",
        dev=folder / "dev.tsv",
        template=embedded.TEMPLATE,
        labels=embedded.LABELS,
    )


def chosen_job(model: str, task: str, dev: Path | None) -> Job:
    """The model and task that the user names."""
    path = Path(task)
    if not path.exists():
        folder = RUNS / "tasks" / task
        console.print(f"fetching task {task}")
        named = fetch_task(task, folder)
        return Job(model, folder / "train.tsv", folder / "dev.tsv", named.template, named.labels)
    train, held_out = (path, dev) if dev is not None else split(path)
    return Job(model, train, held_out, "{sentence} It was", " terrible, great")


def split(path: Path) -> tuple[Path, Path]:
    """A copy of a data file without every fifth example, and one of those."""
    parts = zip(("train", "dev"), split_file(path), strict=True)
    folder = RUNS / "tasks" / path.stem
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, lines in parts:
        written.append(folder / f"{name}{path.suffix}")
        written[-1].write_bytes("".join(f"{line}\n" for line in lines).encode())
    return written[0], written[1]


if __name__ == "__main__":
    main()
