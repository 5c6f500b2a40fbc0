"""A model on the meta device, prepared by the mode that a run would prepare it with.

So that what moves, what stays on the device and what is refused are not told twice. Values that a
mode would take from the weights have a size there, and no content.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zo_offload.config import ZOConfig, parse_config
from zo_offload.errors import ConfigError
from zo_offload.ops import Segment, layout_of
from zo_offload.plan.request import Request
from zo_offload.plan.shapes import build
from zo_offload.trainable.choose import trainable_for
from zo_offload.trainable.moving import Moving
from zo_offload.trainable.overlay import Overlay
from zo_offload.trainable.selection import PATH, matrices_of
from zo_offload.trainable.sparse import Scattered, Sparse
from zo_offload.trainable.trainable import Trainable
from zo_offload.wording import one_line

PACKS = "int8"  # matrices of any dtype; what another codec takes is known of as many elements


@dataclass(frozen=True)
class Share(Overlay):
    """So many weights of a matrix, as a mask will choose, evenly over it."""

    count: int
    numel: int

    @property
    def name(self) -> str:
        """See :class:`Overlay`."""
        return f"{self.matrix}.sparse"

    def patch(self, segment: Segment) -> Scattered:
        """See :class:`Overlay`."""
        first, last = (
            end * self.count // self.numel
            for end in (segment.offset, segment.offset + segment.numel)
        )
        places = torch.empty(last - first, dtype=torch.int32, device="meta")
        return Scattered(range(first, last), places)


class Shared(Sparse):
    """A mask that is yet to be made.

    Args:
        config: The ``zeroth_order`` block.
        share: Of every matrix that it will choose.
    """

    def __init__(self, config: ZOConfig, share: float) -> None:
        super().__init__(config)
        self._share = share

    def _overlays(self, model: nn.Module, path: Path) -> Iterator[Overlay]:
        for name, parameter in matrices_of(model, self._config.unit).items():
            count = int(parameter.numel() * self._share)
            if count:
                values = nn.Parameter(torch.empty(count, device="meta"))
                yield Share(name, values, count, parameter.numel())


def block_for(request: Request) -> ZOConfig:
    """The ``zeroth_order`` block of what decides how units lie.

    Raises:
        ConfigError: Training would refuse it.
    """
    groups = request.trainable == "scales"  # which are what moves
    return parse_config(
        {
            "zeroth_order": {
                "unit": request.unit,
                "wire": request.wire if groups else PACKS,
                "master": request.master,
                "trainable": request.moves,
                "offload_param": {"device": "cpu"},
            }
        }
    )


def key_of(request: Request) -> tuple[Any, ...]:
    """Requests of one key have one prepared model."""
    moves = repr(sorted(request.moves.items()))
    if request.trainable == "sparse" and not request.has_mask:
        return moves, request.share
    if request.trainable == "scales":  # of what is in units
        return moves, request.unit, layout_of(request.wire).group
    return (moves,)


def prepared(config: Any, request: Request, dtype: torch.dtype) -> tuple[nn.Module, Moving]:
    """A model and how it moves.

    Args:
        config: Of the model.
        request: Says what moves.
        dtype: What the forward computes in.

    Raises:
        ConfigError: What is asked for does not fit the model.
    """
    model, block = build(config), block_for(request)
    mode = trainable_for(model, block, dtype)
    if request.trainable == "sparse" and not request.has_mask:
        mode = Shared(block, request.share)
    if request.trainable == "peft":
        return _adapted(model, mode), mode.moving
    return mode.prepare(model), mode.moving


def _adapted(model: nn.Module, mode: Trainable) -> nn.Module:
    """With the new parameters of an adapter; peft warns of what a model of its own would lack."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        try:
            return mode.prepare(model)
        except RuntimeError as error:  # also what is not implemented on the meta device
            raise ConfigError(
                f"{PATH}.peft_config: a plan cannot make this adapter without values "
                f"({one_line(str(error))[:160]}); plan a LORA of its size"
            ) from error
