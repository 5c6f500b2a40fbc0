"""How much float32 some code makes on its way."""

from collections.abc import Callable, Mapping
from typing import Any
from weakref import ref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MostFp32(TorchDispatchMode):
    """Notes the most elements of new fp32 tensors that are there at once while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._made: list[ref[torch.Tensor]] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = {_address(each) for each in tree_leaves((args, kwargs)) if _is_tensor(each)}
        out = func(*args, **(kwargs or {}))
        if _is_tensor(out) and out.dtype == torch.float32 and _address(out) not in given:
            self._made.append(ref(out))
            there = [tensor for each in self._made if (tensor := each()) is not None]
            self.most = max(self.most, sum(tensor.numel() for tensor in there))
        return out


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
