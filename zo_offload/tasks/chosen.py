"""The task that `--task` names: one of the suite, or a file."""

from pathlib import Path

from zo_offload.tasks.own import read_task
from zo_offload.tasks.spec import TaskSpec
from zo_offload.tasks.suite import TASKS, known_task
from zo_offload.tasks.wording import listed, nearest, quote, refuse


def chosen_task(name: str) -> TaskSpec:
    """The task by that name, or the one that the file declares.

    Raises:
        TaskError: It is neither, or the file is no task.
    """
    path = Path(name)
    if is_task_file(name):
        return read_task(path)
    spec = known_task(name)
    if spec is None:
        names = [task.name for task in TASKS]
        close = nearest(name.lower(), [each.lower() for each in names])
        mend = f"expected one of {listed(names)}, or a .toml or .json file{close}"
        refuse("--task", f"{quote(name)} is neither a file nor a task known by name", mend)
    return spec


def is_task_file(name: str) -> bool:
    """Whether it names a file that declares a task, there or not."""
    return Path(name).suffix.lower() in (".toml", ".json")
