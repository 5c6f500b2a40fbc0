"""Which tensors a torch function writes to, and whether it reads what is in them.

Told from the function and its arguments before it runs. Torch marks what changes a tensor by name
(a trailing underscore), by ``out`` and ``inplace``, and in the schema of an operator; version
counters would miss what is written through ``.data``.
"""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
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
_PLAIN = {
    torch.Tensor, torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format,
    type(None), bool, int, float, str, slice, type(...),
}  # fmt: skip
_WRITES = frozenset({"out", "inplace"})  # arguments that ask for it
_pure: dict[Callable, bool] = {}  # what was found of functions


def is_harmless(
    func: Callable, args: Sequence[Any], kwargs: Mapping[str, Any], own: Container[int] = ()
) -> bool:
    """Whether ``func(*args, **kwargs)`` surely writes to no argument, and reads no parameter.

    Quick, as every call of a torch function in a lane is asked about: where it is not sure, it says
    no, and :func:`reads_values` and :func:`written_by` look closer.

    Args:
        func: The function.
        args: Its arguments.
        kwargs: Its arguments by name.
        own: ``id`` of parameters that it may read.

    Example:
        >>> x, weight = torch.zeros(2), torch.nn.Parameter(torch.zeros(2))
        >>> is_harmless(torch.add, (x, 1), {}), is_harmless(torch.add, (x, 1), {"out": x})
        (True, False)
        >>> [is_harmless(torch.add, (x, weight), {}, own) for own in ((), {id(weight)})]
        [False, True]
    """
    if not _is_pure(func) or not _are_plain(args, own):
        return False
    return not kwargs or (_WRITES.isdisjoint(kwargs) and _are_plain(kwargs.values(), own))


def _are_plain(values: Iterable[Any], own: Container[int]) -> bool:
    """Whether all are tensors and constants, or lists of them."""
    for value in values:
        kind = type(value)
        if kind in _PLAIN or id(value) in own:
            continue
        if kind not in (list, tuple) or not all(type(item) in _PLAIN for item in value):
            return False
    return True


def _is_pure(func: Callable) -> bool:
    """Whether it changes no argument, unless one of ``_WRITES`` asks for it."""
    known = _pure.get(func)
    if known is None:
        writes = _changes_by_name(func) or func in _EMBEDDINGS or isinstance(func, _TORCH_OPS)
        known = _pure[func] = not writes
    return known


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
    if kwargs and kwargs.get("out") is not None:
        return [kwargs["out"]]
    if kwargs.get("inplace") is True or _changes_by_name(func):
        return [args[0]] if args else list(kwargs.values())
    if _is_pure(func):
        return ()
    if func in _EMBEDDINGS:
        positional = args[_MAX_NORM] if len(args) > _MAX_NORM else None
        if kwargs.get("max_norm", positional) is not None:
            return [*args[:2], kwargs.get("weight")]
    if isinstance(func, _TORCH_OPS):
        return _mutable_in_schema(func, args, kwargs)
    return ()


def _changes_by_name(func: Callable) -> bool:
    """Its first argument."""
    name = getattr(func, "__name__", "")
    if name == "__set__":
        return getattr(getattr(func, "__self__", None), "__name__", "") in VALUES
    if name.startswith("__"):
        return name in OPERATORS
    return name.endswith("_") and name != "requires_grad_"


def _mutable_in_schema(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Any]:
    """Of an operator in ``torch.ops``, a custom one too."""
    overload = getattr(func, "default", func)
    arguments = overload._schema.arguments if hasattr(overload, "_schema") else ()
    return [
        args[position] if position < len(args) else kwargs.get(argument.name)
        for position, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
