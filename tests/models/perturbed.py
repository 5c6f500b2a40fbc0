"""Separate plain copies of a model, perturbed as a lane sees it."""

import copy
from contextlib import closing, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from models.table import cast
from zo_offload.config import OffloadConfig, ZOConfig
from zo_offload.objective import call_with, model_loss
from zo_offload.ops import Draw, reference
from zo_offload.step import Stepper


def perturbed(model: nn.Module, draw: Draw, dtype: torch.dtype) -> nn.Module:
    """A copy of an fp32 model in a dtype, its weights moved along a rademacher draw."""
    moved = cast(copy.deepcopy(model), dtype)
    for index, (name, parameter) in enumerate(moved.named_parameters()):
        exact = dtype == torch.float16 and kept_in_fp32(model, name)
        weight = rounded(model.get_parameter(name).data, torch.float32 if exact else dtype)
        parameter.data = moved_along(weight, index, draw) if parameter.requires_grad else weight
    return moved


def kept_in_fp32(model: nn.Module, name: str) -> bool:
    return bool(set(getattr(model, "_keep_in_fp32_modules", None) or ()) & set(name.split(".")))


def moved_along(
    weight: torch.Tensor, index: int, draw: Draw, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """``round(weight + coefficient * z)`` in a dtype (the weight's); bf16 vectors are dithered."""
    dtype = dtype or weight.dtype
    number = (draw.seed, draw.step, draw.probe)
    count = weight.numel()
    term = reference.rademacher(*number, index, 0, count, draw.coefficient)
    value = weight.float() + torch.from_numpy(term).view(weight.shape)
    if dtype != torch.bfloat16 or weight.ndim > 1:
        return rounded(value, dtype)
    blocks = -(-count // reference.HALVES_PER_BLOCK)
    words = reference.words(*number, reference.STREAM_DITHER, index, 0, blocks)
    return as_bf16(reference.dither_bf16(value.numpy(), reference.halves(words)[:count]))


def rounded(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An fp32 tensor in a dtype: torch rounds ties to even, the wire's bfloat16 away from zero."""
    if dtype != torch.bfloat16:
        return value.to(dtype)
    return as_bf16(reference.round_bf16(value.numpy())).view(value.shape)


def as_bf16(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def assert_equals_plain_forwards(
    model: nn.Module,
    batches: list[Any],
    dtype: torch.dtype = torch.float32,
    poison: bool = True,
    **settings: Any,
) -> None:
    """Streamed lanes on a copy of the model give the losses of plain perturbed copies."""
    config = ZOConfig(eps=1e-2, offload_param=OffloadConfig(device="cpu"), **settings)
    with closing(Stepper(copy.deepcopy(model), config, dtype=dtype)) as stepper:
        stepper.weights.poison = poison
        draws = [draw for _, _, draw in stepper.draws()]
        rows = stepper.measure(batches, stepper.draws())
        losses = [total for lane in zip(*rows, strict=True) for total, _ in lane]
    moved = [perturbed(model, draw, dtype) for draw in draws]
    assert losses == [plain_loss(plain, batch) for plain in moved for batch in batches]


@torch.inference_mode()
def plain_loss(model: nn.Module, batch: Any) -> float:
    """The loss of a plain forward; in half precision with the head and the loss in fp32."""
    half = any(map(_is_half, model.parameters()))
    with ExactLosses(model) if half else nullcontext():
        loss = model_loss(model, batch, call_with(model, batch))
    assert loss is not None
    return float(loss)


class ExactLosses(TorchFunctionMode):
    """The one thing that a lane computes otherwise in half precision: head and loss in fp32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        head = getattr(model, "get_output_embeddings", lambda: None)()
        self.head = getattr(head, "weight", None)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.cross_entropy or (func is F.linear and args[1] is self.head):
            args = tuple(a.float() if _is_half(a) else a for a in args)
        return func(*args, **(kwargs or {}))


def _is_half(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)
