"""Which tensors a torch function writes to, and whether it reads what is in them.

Told from the function and its arguments before it runs. Torch marks what changes a tensor by name
(a trailing underscore), by ``out`` and ``inplace``, and in the schema of an operator; version
counters would miss what is written through ``.data``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

OPERATORS = {
    "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__",
    "__ipow__", "__imatmul__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__",
    "__idiv__",
}  # fmt: skip
VALUES = {"data", "T", "mT", "H", "mH", "real", "imag"}  # attributes that are not metadata
# What may be asked of a tensor without reading its values.
_METADATA = {
    "size", "dim", "numel", "nelement", "ndimension", "element_size", "is_floating_point",
    "is_complex", "is_signed", "get_device", "__len__", "__hash__",
}  # fmt: skip
_EMBEDDINGS = (F.embedding, F.embedding_bag)
_MAX_NORM = 3  # its position among their arguments
_TORCH_OPS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)


def reads_values(func: Callable) -> bool:
    """Whether a torch function given a tensor looks at more than its shape, dtype and device.

    Example:
        >>> reads_values(torch.Tensor.shape.__get__), reads_values(torch.Tensor.data.__get__)
        (False, True)
    """
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") in VALUES
    return name not in _METADATA


def written_by(func: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Any]:
    """The arguments (tensors, or lists of them) that ``func(*args, **kwargs)`` changes in place.

    Example:
        >>> x = torch.zeros(2)
        >>> written_by(torch.clamp_, (x, 0.0), {}), written_by(torch.clamp, (x, 0.0), {})
        ([tensor([0., 0.])], ())
        >>> written_by(torch.add, (1, 2), {"out": x})
        [tensor([0., 0.])]
    """
    if kwargs.get("out") is not None:
        return [kwargs["out"]]
    if _changes_its_first(func, kwargs):
        return [args[0]] if args else list(kwargs.values())
    if func in _EMBEDDINGS:
        positional = args[_MAX_NORM] if len(args) > _MAX_NORM else None
        if kwargs.get("max_norm", positional) is not None:
            return [*args[:2], kwargs.get("weight")]
    if isinstance(func, _TORCH_OPS):
        return _mutable_in_schema(func, args, kwargs)
    return ()


def _changes_its_first(func: Callable, kwargs: Mapping[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    if name == "__set__":
        return getattr(getattr(func, "__self__", None), "__name__", "") in VALUES
    if name.startswith("__"):
        return name in OPERATORS
    return (name.endswith("_") and name != "requires_grad_") or kwargs.get("inplace") is True


def _mutable_in_schema(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Any]:
    """Of an operator in ``torch.ops``, a custom one too."""
    overload = getattr(func, "default", func)
    arguments = overload._schema.arguments if hasattr(overload, "_schema") else ()
    return [
        args[position] if position < len(args) else kwargs.get(argument.name)
        for position, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
