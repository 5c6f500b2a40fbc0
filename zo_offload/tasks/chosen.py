"""The task that `--task` names: one of the suite, or a file."""

from pathlib import Path

from zo_offload.kinds import CALLED, Kind
from zo_offload.tasks.own import read_task
from zo_offload.tasks.spec import TaskSpec
from zo_offload.tasks.suite import SUITES, known_task
from zo_offload.tasks.wording import listed, nearest, printable, quote, refuse


def chosen_task(name: str, kind: Kind = "causal") -> TaskSpec:
    """The task by that name, or the one that the file declares.

    Args:
        name: Of either.
        kind: Of the model that is asked.

    Raises:
        TaskError: It is neither, the file is no task, or it has no prompt for such a model.
    """
    path = Path(name)
    if is_task_file(name):
        spec = read_task(path)
        check_mask(f"{printable(name)}: template", spec.template.asks_mask, kind)
        return spec
    spec = known_task(name, kind)
    if spec is None:
        names = [task.name for task in SUITES[kind]]
        if any(known_task(name, other) for other in SUITES):
            fault = f"{quote(name)} has no prompt for a {CALLED[kind]}, which --model is"
            refuse("--task", fault, f"expected one of {listed(names)}; or say its --kind")
        close = nearest(name.lower(), [each.lower() for each in names])
        mend = f"expected one of {listed(names)}, or a .toml or .json file{close}"
        refuse("--task", f"{quote(name)} is neither a file nor a task known by name", mend)
    return spec


def check_mask(where: str, asks_mask: bool, kind: Kind) -> None:
    """Refuse a template that is not for such a model.

    Raises:
        TaskError: It has a mask that nobody fills in, or none where one is to be filled in.
    """
    if asks_mask and kind != "masked":
        fault = f"{{mask}} is for masked LMs, and --model is a {CALLED[kind]}"
        refuse(where, fault, "remove it, or say the model's --kind")
    if kind == "masked" and not asks_mask:
        fault = "no {mask}, and --model is a masked LM"
        refuse(where, fault, "write {mask} where the label word goes, or say the model's --kind")


def is_task_file(name: str) -> bool:
    """Whether it names a file that declares a task, there or not."""
    return Path(name).suffix.lower() in (".toml", ".json")
