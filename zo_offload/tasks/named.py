"""Public data sets by name: fetched with `datasets`, written as the TSV that a run reads."""

from dataclasses import dataclass
from pathlib import Path

from zo_offload.errors import TaskError


@dataclass(frozen=True)
class NamedTask:
    """Where a data set is, and how it is asked."""

    dataset: str
    fields: tuple[str, ...]
    train_split: str
    dev_split: str
    template: str
    labels: str


NAMED_TASKS = {
    "sst2": NamedTask(
        dataset="stanfordnlp/sst2",
        fields=("sentence",),
        train_split="train",
        dev_split="validation",
        template="{sentence} It was",
        labels=" terrible, great",
    ),
}


def fetch_task(name: str, directory: Path) -> NamedTask:
    """Write `directory/train.tsv` and `directory/dev.tsv` unless they are there.

    Raises:
        TaskError: The name is unknown, or the data set cannot be fetched.
    """
    if name not in NAMED_TASKS:
        known = ", ".join(NAMED_TASKS)
        raise TaskError(f"{name}: neither a file nor a task known by name ({known})")
    task = NAMED_TASKS[name]
    for split, file in ((task.train_split, "train.tsv"), (task.dev_split, "dev.tsv")):
        if not (directory / file).exists():
            _write_tsv(directory / file, task, _load(name, task, split))
    return task


def _load(name: str, task: NamedTask, split: str) -> list[dict]:
    try:
        from datasets import load_dataset

        return list(load_dataset(task.dataset, split=split))  # pyright: ignore[reportReturnType]
    except ImportError as error:
        raise TaskError(f"task {name}: fetching it needs `pip install datasets`") from error
    except Exception as error:  # the hub's client raises whatever its layers raise
        reason = " ".join(str(error).split())[:200]
        raise TaskError(
            f"task {name}: split {split!r} of {task.dataset} could not be fetched "
            f"(no network?): {type(error).__name__}: {reason}"
        ) from error


def _write_tsv(path: Path, task: NamedTask, rows: list[dict]) -> None:
    lines = ["\t".join([*task.fields, "label"])]
    lines += ["\t".join([*(_flat(row[f]) for f in task.fields), str(row["label"])]) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".new")
    aside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    aside.replace(path)


def _flat(text: str) -> str:
    """White space folded: a TSV field holds neither tabs nor line ends."""
    return " ".join(text.split())
