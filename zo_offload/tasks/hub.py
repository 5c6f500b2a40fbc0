"""Data sets from the hub, by the `datasets` library, which is imported when it is needed."""

from collections.abc import Iterator
from typing import Any

from zo_offload.errors import TaskError
from zo_offload.tasks.node import Node
from zo_offload.tasks.spec import Hub


def fetch_rows(task: str, hub: Hub, split: str) -> Iterator[Node]:
    """Every row of a split, fetched or from the library's cache. No code of a data set is run.

    Raises:
        TaskError: `datasets` is not installed, or the data set cannot be fetched.
    """
    name = hub.test if split == "test" else split
    for number, row in enumerate(_load(task, hub, name)):
        yield Node(row, f"{hub.path} {name}[{number}]")


def _load(task: str, hub: Hub, split: str) -> Any:
    try:
        from datasets import load_dataset

        return load_dataset(hub.path, hub.name, split=split, revision=hub.revision)
    except ImportError as error:
        raise TaskError(
            f"--task {task}: fetching it needs `pip install datasets`; or pass its files by --data"
        ) from error
    except Exception as error:  # the hub's client raises whatever its layers raise
        reason = " ".join(str(error).split())[:200]
        raise TaskError(
            f"--task {task}: split {split!r} of {hub.path} could not be fetched (no network?): "
            f"{type(error).__name__}: {reason}; pass its files by --data"
        ) from error
