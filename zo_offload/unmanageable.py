"""Models whose weights could not be kept in a store without changing what they compute.

Each is refused by name before anything is touched. The reasons are the two things that this package
does to parameters: their memory is taken away between visits, and they move by recorded updates
alone. So nobody else may hold that memory, and nobody else may write to it.
"""

from collections.abc import Iterator, Sequence
from weakref import WeakSet

import torch
from torch import nn

from zo_offload.errors import ModelError
from zo_offload.views import address_of

taken: "WeakSet[nn.Module]" = WeakSet()
"""Modules with parameters whose values are in a store."""


def refuse_taken(model: nn.Module) -> None:
    """Look for what is another's, before anything is done to a model.

    Raises:
        ModelError: A part of it is.
    """
    for name, module in model.named_modules():
        if module in taken:  # also where one model holds a part of another
            raise ModelError(
                f"the weights of {name or 'this ' + type(model).__name__} are in the store of "
                "another Stepper or engine; close() or destroy() that one first, which gives them "
                "back"
            )


def refuse_unmanageable(model: nn.Module, moves: bool = True) -> None:
    """Look at every module and parameter.

    Args:
        model: Which.
        moves: Whether some of its parameters have to.

    Raises:
        ModelError: With the name of the first that cannot be managed, why, and the mend.
    """
    named = dict(model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(
                f"{name or 'the model'} is a ScriptModule, whose parameters cannot be substituted; "
                "pass the plain module"
            )
        if getattr(module, "max_norm", None) is not None and hasattr(module, "weight"):
            raise ModelError(
                f"{name or 'the model'} has max_norm={module.max_norm}: its forward writes to its "
                "weight; set max_norm to None"
            )
    for name, parameter in named.items():
        if parameter.is_complex() and parameter.requires_grad:
            raise ModelError(
                f"parameter {name} is {parameter.dtype}; complex parameters cannot be trained: "
                "requires_grad_(False), or hold real and imaginary part in two parameters"
            )
    if moves and not any(
        p.requires_grad and p.is_floating_point() and p.numel() for p in named.values()
    ):
        raise ModelError(
            f"{type(model).__name__} has no trainable parameter; requires_grad_(True) for what "
            "should move"
        )
    _refuse_shared_memory(model, named)


def refuse_empty(model: nn.Module) -> None:
    """Look for values.

    Raises:
        ModelError: A parameter has none.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ModelError(f"parameter {name} has no values (meta device); load the model first")


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile runs a module's forward."""
    compiled = getattr(module, "_compiled_call_impl", None) is not None
    return compiled or type(module).__name__ == "OptimizedModule"


def refuse_compiled(model: nn.Module, paths: Sequence[str]) -> None:
    """Look for torch.compile around the units, whose paths these are.

    Raises:
        ModelError: The blocks at which lanes stop are hidden.
    """
    for name, module in model.named_modules():
        holds_blocks = not name or any(path.startswith(f"{name}.") for path in paths)
        if holds_blocks and is_compiled(module):
            raise ModelError(
                f"{name or 'the whole model'} is wrapped in torch.compile, which hides the blocks "
                "inside; pass the plain model and compile the blocks instead: "
                "`for block in blocks: block.compile()`"
            )


def _refuse_shared_memory(model: nn.Module, named: dict[str, nn.Parameter]) -> None:
    """Two parameters in one piece of memory, or a buffer or plain attribute that views one."""
    owners: dict[tuple[torch.device, int], list[str]] = {}
    for name, tensor in [*named.items(), *other_tensors(model, named)]:
        address = None if tensor.is_meta else address_of(tensor)
        if address is None or not tensor.numel():
            continue
        there = owners.setdefault((tensor.device, address), [])
        for first in there:
            if _overlap(named[first], tensor):
                raise ModelError(
                    f"{name} lies in the memory of parameter {first} without being the same "
                    "object, and would keep the initial values; tie parameters by assigning the "
                    "same nn.Parameter, and compute views in the forward"
                )
        if name in named:
            there.append(name)


def other_tensors(
    model: nn.Module, named: dict[str, nn.Parameter]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers, plain tensor attributes, and what lies in plain containers, by path."""
    parameters = {id(parameter) for parameter in named.values()}
    for path, module in model.named_modules():
        for name, value in {**module._buffers, **vars(module)}.items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            items = value.values() if isinstance(value, dict) else value
            for item in items if isinstance(value, (dict, list, tuple)) else [value]:
                if isinstance(item, torch.Tensor) and id(item) not in parameters:
                    yield f"{path}.{name}".lstrip("."), item


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one storage share an element."""
    (a_first, a_last), (b_first, b_last) = _extent(a), _extent(b)
    return a_first < b_last and b_first < a_last


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte of a tensor in its storage, and the one behind its last."""
    size = tensor.element_size()
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    first = int(tensor.storage_offset())
    return first * size, (first + int(reach) + 1) * size
