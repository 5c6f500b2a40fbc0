"""Views: of weights in results, copied before another lane overwrites them; and of nothing."""

from collections.abc import Callable, Collection, MutableMapping
from copy import copy
from dataclasses import fields, is_dataclass
from operator import is_not
from typing import Any

import torch


def address_of(tensor: torch.Tensor) -> int | None:
    """Where a tensor's storage begins; None where it has none (empty, sparse, under vmap)."""
    try:
        with torch._C.DisableTorchFunctionSubclass():  # a lazy tensor's is not to be made for this
            return tensor.untyped_storage().data_ptr() or None
    except (NotImplementedError, RuntimeError):
        return None


def owned(result: Any, addresses: Collection[int | None]) -> Any:
    """A function's result, copied where it is a view of memory that another lane will overwrite.

    Args:
        result: A tensor, or tensors in tuples, lists, mappings and dataclasses, however deep;
            anything else is returned as it is. A container that holds a view is copied, too, and
            keeps its type.
        addresses: Where the storages of such memory begin.

    Example:
        >>> weight = torch.zeros(2, 3)
        >>> held = {"row": weight[0], "sums": [weight.sum(0)]}
        >>> found = owned(held, {address_of(weight)})
        >>> found["row"] is held["row"], found["sums"] is held["sums"]
        (False, True)
    """
    return replaced(result, lambda t: t.clone() if address_of(t) in addresses else t)


def replaced(result: Any, other: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A result with every tensor replaced by ``other(tensor)``, however deep it lies.

    A container in which something is replaced is copied, and keeps its type.
    """
    if isinstance(result, torch.Tensor):
        return other(result)
    if isinstance(result, (list, tuple)):
        items = [replaced(item, other) for item in result]
        if not any(map(is_not, items, result)):
            return result
        return type(result)(*items) if hasattr(result, "_fields") else type(result)(items)
    if isinstance(result, MutableMapping):
        changed = _changed(dict(result), other)
        if changed:
            result = copy(result)
            for key, value in changed.items():  # a ModelOutput refuses update()
                result[key] = value
    elif is_dataclass(result) and not isinstance(result, type):
        names = [field.name for field in fields(result) if hasattr(result, field.name)]
        changed = _changed({name: getattr(result, name) for name in names}, other)
        if changed:
            result = copy(result)
            for name, value in changed.items():
                object.__setattr__(result, name, value)  # it may be frozen
    return result


def _changed(held: dict[Any, Any], other: Callable[[torch.Tensor], torch.Tensor]) -> dict[Any, Any]:
    values = {key: replaced(value, other) for key, value in held.items()}
    return {key: value for key, value in values.items() if value is not held[key]}


def nothing(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of NaN that takes no memory."""
    return torch.full((), float("nan"), dtype=dtype, device=device).expand(shape)
