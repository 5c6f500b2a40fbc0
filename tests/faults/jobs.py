"""Commands to disturb, and what they must come to: a table, one row a kind.

A job is given again, word for word, until it ends; its results must be those of a run that nobody
disturbed. Each takes about a second in a process forked from a warm one.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.common import Task, results, tree

from zo_offload.fresh import UNFINISHED


@dataclass(frozen=True)
class Job:
    """What is run in a folder of its own.

    Attributes:
        program: As ``module:function``.
        arguments: From the task and the folder to what it is given.
        results: From the folder and what was printed to what must be equal.
        ranks: How many processes.
        done: Words of the refusal by which it says that it was done before.
    """

    program: str
    arguments: Callable[[Task, Path], list[Any]]
    results: Callable[[Path, str], Any]
    ranks: int = 1
    done: str = ""


def trained(**config: Any) -> Callable[[Task, Path], list[Any]]:
    """``zo-offload train`` with a JSON of its own."""

    def arguments(task: Task, folder: Path) -> list[Any]:
        block = dict(config)
        if block.get("offload_param", {}).get("device") == "nvme":
            block["offload_param"] = {"device": "nvme", "nvme_path": str(folder / "disk")}
        path = folder / "ds.json"
        optimizer = {"type": "ZO", "params": {"lr": 1e-2}}
        text = json.dumps({"train_batch_size": 4, "optimizer": optimizer, "zeroth_order": block})
        path.write_text(text)
        return [task.arguments(folder / "run", config=path)]

    return arguments


def train_results(folder: Path, stdout: str) -> Any:
    found = results(folder / "run", stdout)
    assert not list((folder / "run").glob("*.new"))
    return found._replace(weights=hashlib.sha256(found.weights).digest())


def converted(task: Task, folder: Path) -> list[Any]:
    return [["convert", "--model", str(task.folder / "model"), "--output", str(folder / "base")]]


def convert_results(folder: Path, stdout: str) -> Any:
    found = tree(folder / "base")
    found.pop(UNFINISHED, None)  # a kill may leave the mark that says it was whose
    return found


def checkpointed(task: Task, folder: Path) -> list[Any]:
    return [str(folder)]


def checkpoint_results(folder: Path, stdout: str) -> Any:
    return json.loads(stdout.splitlines()[-1])


NVME = {"device": "nvme"}
CLI = "faults.programs:command"
JOBS = {
    "host": Job(CLI, trained(offload_param={"device": "cpu"}), train_results),
    "device": Job(CLI, trained(offload_param={"device": "none"}), train_results),
    "nvme": Job(CLI, trained(offload_param=NVME), train_results),
    "nvme, lag, snapshots": Job(
        CLI,
        trained(offload_param=NVME, update={"lag": 3}, journal={"snapshot_interval": 2}),
        train_results,
    ),
    "momentum, snapshots": Job(
        CLI,
        trained(
            offload_param={"device": "cpu"},
            update={"type": "momentum"},
            journal={"snapshot_interval": 1},
        ),
        train_results,
    ),
    "checkpoints": Job("faults.programs:checkpointed", checkpointed, checkpoint_results),
    "convert": Job(
        CLI, converted, convert_results, done="base: there is something already; choose another"
    ),
    "two ranks, host": Job(CLI, trained(offload_param={"device": "cpu"}), train_results, ranks=2),
    "two ranks, nvme": Job(CLI, trained(offload_param=NVME), train_results, ranks=2),
}
