"""The module of a converted model: everything but the values of its units, which stay on disk."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from zo_offload.converted import (
    AMBIENT_FILE,
    BUFFERS_FILE,
    RECORD,
    Converted,
    mark_converted,
)
from zo_offload.errors import ModelError
from zo_offload.kinds import LOADED_BY, Kind
from zo_offload.offload.slot import CONVERT_AGAIN as AGAIN
from zo_offload.unmanageable import other_tensors
from zo_offload.views import nothing


def skeleton(converted: Converted, config: Any, kind: Kind) -> Any:
    """A model whose ambient parameters and buffers have values; what units hold reads as NaN.

    Args:
        converted: Where the values are.
        config: The model's transformers configuration.
        kind: What it was converted as.

    Raises:
        ModelError: The configuration makes another model than was converted.
        StoreError: A file is missing or damaged.
    """
    import transformers

    auto_class = getattr(transformers, LOADED_BY[kind])
    with torch.device("meta"):
        model: Any = auto_class.from_config(config, trust_remote_code=False)
    model.eval()
    _put_parameters(model, converted)
    _put_buffers(model, converted)
    left = [name for name, tensor in all_tensors(model) if tensor.is_meta]
    if left:
        raise ModelError(
            f"{converted.directory}: {left[0]} of {type(model).__name__} is a tensor that no "
            "parameter or buffer holds, and has no value here; use the model itself"
        )
    if (converted.directory / "generation_config.json").is_file():
        found = transformers.GenerationConfig.from_pretrained(converted.directory)
        model.generation_config = found
    mark_converted(model, converted)
    return model


def all_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, buffers and plain attributes, by name."""
    named = dict(model.named_parameters())
    yield from named.items()
    yield from other_tensors(model, named)


def shapes_of(model: nn.Module) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of each parameter, as a record has them."""
    return {
        name: (list(parameter.shape), str(parameter.dtype).removeprefix("torch."))
        for name, parameter in model.named_parameters()
    }


def _put_parameters(model: nn.Module, converted: Converted) -> None:
    """In place of those on the meta device; what was tied stays tied."""
    expected, ambient = converted.record.parameters, converted.tensors(AMBIENT_FILE)
    made: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        shape, dtype = expected.get(name, ([], "of no such name"))
        if name not in expected or shape != list(parameter.shape):
            raise ModelError(
                f"{converted.directory}: config.json makes {name} {list(parameter.shape)}, "
                f"{RECORD} has {shape} {dtype}; was it changed, or transformers? {AGAIN}"
            )
        value = ambient.get(name)
        if value is None:
            value = nothing(tuple(shape), _dtype(converted, name, dtype), torch.device("cpu"))
        made[id(parameter)] = nn.Parameter(value, requires_grad=value.is_floating_point())
    if len(made) < len(expected):
        raise ModelError(
            f"{converted.directory}: config.json makes a model of {len(made)} parameters, "
            f"{len(expected)} were converted; was it changed, or transformers? {AGAIN}"
        )
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = made[id(parameter)]


def _put_buffers(model: nn.Module, converted: Converted) -> None:
    for name, value in converted.tensors(BUFFERS_FILE).items():
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = value


def _dtype(converted: Converted, parameter: str, name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        path = converted.directory / RECORD
        raise ModelError(f"{path}: {parameter} is of {name!r}, which is no dtype; {AGAIN}")
    return found
