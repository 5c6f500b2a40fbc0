"""What to say when memory runs out: what the plan counts, what there is, and what would fit."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zo_offload.errors import StoreError, ZOError
from zo_offload.plan.advice import nearest
from zo_offload.plan.rates import Rates
from zo_offload.plan.report import exact, refusal
from zo_offload.plan.request import Budgets, request_of
from zo_offload.plan.search import Layouts, Planned, plan
from zo_offload.plan.shapes import config_of
from zo_offload.wording import is_out_of_memory, one_line


@dataclass(frozen=True)
class Machine:
    """Bytes of memory.

    Attributes:
        device: Of the accelerator; None where forwards run in host memory.
        host: Of this machine, or what this process's group may have of it.
    """

    device: int | None
    host: int


@contextmanager
def explained(model: str, config: Mapping[str, Any], longest: Callable[[], int]) -> Iterator[None]:
    """Around what may run out of memory.

    Args:
        model: Directory or id.
        config: The JSON.
        longest: Tokens of the longest example, as far as is known by then.

    Raises:
        StoreError: It did; the message has the numbers.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        said = one_line(str(error).split("Exception raised from")[0]).rstrip(".")
        raise StoreError(
            f"out of memory{': ' * bool(said)}{said}; {explanation(model, config, longest())}"
        ) from error


def explanation(
    model: str, config: Mapping[str, Any], length: int, machine: Machine | None = None
) -> str:
    """What a run's plan counts beside what the machine has, and the nearest one that fits."""
    machine = machine or this_machine()
    try:
        return _compared(model, config, length, machine)
    except (ZOError, OSError, ValueError) as error:
        return f"a plan cannot count this run ({error}); take a smaller batch"


def _compared(model: str, config: Mapping[str, Any], length: int, machine: Machine) -> str:
    request, budgets, dtype = request_of(config)
    shape, own = config_of(model)
    layouts = Layouts(shape, dtype or own)
    request = replace(request, length=length)
    planned = plan(layouts, request, budgets, Rates())
    there = _within(budgets, planned, machine)
    planned = plan(layouts, request, there, Rates())
    if not planned.fits:
        return refusal(model, planned, nearest(layouts, request, there, Rates()))
    tiers = planned.tiers
    had = f"{exact(machine.host)} of host memory"
    had = f"a device of {exact(machine.device)} and {had}" if machine.device is not None else had
    return (
        f"the plan counts device {exact(tiers.device_bytes)}, host {exact(tiers.host_bytes)}, for "
        f"{request.batch_size} x {length} tokens a forward, and there is {had}: something else "
        "holds the rest; end it, or lower train_micro_batch_size_per_gpu"
    )


def _within(budgets: Budgets, planned: Planned, machine: Machine) -> Budgets:
    """What may be held; where forwards run in host memory both have to go into it."""
    device = machine.device
    if device is None:
        device = max(machine.host - planned.tiers.host_bytes, 0)
    return replace(budgets, device=device, host=machine.host)


def this_machine() -> Machine:
    """What this process may have."""
    import torch

    device = None
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return Machine(device, min(_installed(), *_of_the_group()))


def _installed() -> int:
    """Bytes of memory that the system knows."""
    words = Path("/proc/meminfo").read_text().split()
    return int(words[words.index("MemTotal:") + 1]) * 1024


def _of_the_group() -> Iterator[int]:
    """Limits of the control groups that this process is in."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        root = Path("/sys/fs/cgroup", "memory" if "memory" in controllers.split(",") else "")
        group = root / name.lstrip("/")
        for folder in (group, *group.parents):
            for limit in (folder / "memory.max", folder / "memory.limit_in_bytes"):
                if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
                    yield int(text)
            if folder == root:
                break
