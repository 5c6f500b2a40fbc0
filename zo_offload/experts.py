"""Experts that lie side by side in the parameters of one module, and move in groups.

Mixtures keep the experts of a block as parameters ``[experts, ...]`` of a single module. Where
units are linear layers, the module is divided along that first axis: a unit holds some consecutive
experts, of every parameter of the module the same ones, because they are read together. So the
experts of a block need not be on the device at once.

A group is about as large as the largest other linear layer, which decides the size of a slot
anyway. It begins where a block of the noise of each parameter begins, so that a group's noise, and
its packed bytes, are those of the whole parameter. The plan and training share this rule.

Lanes stop at a group when the forward reads one of its experts (``expert_reads.py``), so the
forward must read them one by one.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from zo_offload.errors import ModelError
from zo_offload.ops import ALIGNMENT

ONE_BY_ONE = "eager"  # what transformers calls a forward that indexes its experts


def holds_experts(module: nn.Module) -> bool:
    """Whether all parameters of a module are of ``num_experts`` experts, some of them matrices.

    Example:
        >>> import torch
        >>> module = nn.Module()
        >>> module.num_experts, module.up = 4, nn.Parameter(torch.zeros(4, 8, 2))
        >>> holds_experts(module), holds_experts(nn.Conv1d(4, 8, 3))
        (True, False)
    """
    own, count = list(module.parameters(recurse=False)), getattr(module, "num_experts", None)
    return (
        isinstance(count, int)
        and count > 1
        and any(parameter.ndim > 2 for parameter in own)
        and all(parameter.ndim > 1 and len(parameter) == count for parameter in own)
        and len(own) == sum(1 for _ in module.parameters())
    )


def groups_of(module: nn.Module, most: int) -> list[range]:
    """The experts of each group, in order; a single group where they are not to be divided.

    Args:
        module: Holds experts.
        most: Parameters of a group, unless it is a single expert.

    Example:
        >>> import torch
        >>> module = nn.Module()
        >>> module.num_experts, module.up = 6, nn.Parameter(torch.zeros(6, 8, 16))
        >>> groups_of(module, 512)
        [range(0, 3), range(3, 6)]
        >>> module.up = nn.Parameter(torch.zeros(6, 8, 8))  # two make up a block of noise
        >>> groups_of(module, 1)
        [range(0, 2), range(2, 4), range(4, 6)]
    """
    own = list(module.parameters(recurse=False))
    count = len(own[0])
    sizes = [parameter.numel() // count for parameter in own]
    step = math.lcm(*(ALIGNMENT // math.gcd(ALIGNMENT, size) for size in sizes))
    fit = max(most // sum(sizes) // step, 1) * step
    even = -(-count // -(-count // fit))  # as many in each of as few groups
    number = -(-even // step) * step
    return [range(first, min(first + number, count)) for first in range(0, count, number)]


def refuse_compiled_experts(path: str, module: nn.Module) -> None:
    """Lanes cannot stop inside compiled code.

    Raises:
        ModelError: The module is compiled.
    """
    if getattr(module, "_compiled_call_impl", None) is not None:
        raise ModelError(
            f"{path} is compiled, and its experts move in groups, at which lanes cannot stop in "
            'compiled code; leave it as it is, or keep its experts together: "unit": "sublayer"'
        )


@contextmanager
def read_one_by_one(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Meanwhile, let the forward of modules of transformers index their experts."""
    configs: dict[int, Any] = {}
    for module in modules:
        config = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation"):
            configs[id(config)] = config
    chosen = [(config, config._experts_implementation) for config in configs.values()]
    for config in configs.values():
        config._experts_implementation = {"": ONE_BY_ONE}  # this one's alone, not its parts'
    try:
        yield
    finally:
        for config, before in chosen:
            config._experts_implementation = {"": before}
