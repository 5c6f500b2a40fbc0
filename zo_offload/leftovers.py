"""What a forward leaves behind on the modules of a model, which another lane would read.

Lanes take turns at every unit, so a value that a forward writes to a module (a statistic, a cache,
the shape it saw last) is there when another lane comes by. Whether that lane reads it cannot be
seen from outside, so a forward may leave only what another one could not tell apart: nothing, or an
equal number or text. Containers are compared item by item, not deeper.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from zo_offload.errors import ModelError

_BOOKKEEPING = frozenset(vars(nn.Module()))  # parameters, buffers, submodules, hooks
_DUNDER = re.compile("__.+__")  # marks of tools, such as a profiler's counts; no model reads them
_CONSTANTS = (bool, int, float, complex, str, bytes, type(None))


class State(NamedTuple):
    """A buffer or attribute: itself, and what shows a change inside it."""

    value: Any
    inside: tuple


def state_of(model: nn.Module) -> dict[tuple[str, str], State]:
    """Buffers and attributes of every module, by module path and name."""
    return {
        (path, name): State(value, _inside(value))
        for path, module in model.named_modules()
        for name, value in _attributes(module)
    }


def refuse_changes(model: nn.Module, before: dict[tuple[str, str], State]) -> None:
    """Compare with an earlier :func:`state_of`.

    Raises:
        ModelError: A buffer or attribute was added, replaced, removed or changed in place.
    """
    after = state_of(model)
    for key in [*after, *(before.keys() - after.keys())]:
        if key not in after or key not in before or not _same(before[key], after[key]):
            path, name = key
            raise ModelError(
                f"a forward leaves state in {name!r} of {path or 'the model'} "
                f"({type(model.get_submodule(path)).__name__}), where another lane of the same "
                "visit would read it; pass it on as an argument or a result instead"
            )


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module._buffers.items()
    for name, value in vars(module).items():
        if name not in _BOOKKEEPING and not _DUNDER.fullmatch(name):
            yield name, value


def _inside(value: Any) -> tuple:
    if isinstance(value, torch.Tensor):
        return () if value.is_inference() else (value._version,)
    if isinstance(value, dict):
        return (*value.keys(), *value.values())
    return tuple(value) if isinstance(value, (list, set)) else ()


def _same(a: State, b: State) -> bool:
    return (
        _equal(a.value, b.value)
        and len(a.inside) == len(b.inside)
        and all(map(_equal, a.inside, b.inside))
    )


def _equal(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, _CONSTANTS) and a == b)
