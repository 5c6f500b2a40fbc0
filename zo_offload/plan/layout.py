"""A model's units as arrays of numbers: what the plan computes with.

Whole parameters are padded to 128 elements as in training. Matrices are kept apart from the rest,
because a wire format packs matrices alone. Units are those of training (``units.py``).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from zo_offload.ambient import chunked_head, surely_gathered
from zo_offload.blocks import repeated_blocks
from zo_offload.offload.planner import copy_bytes, is_small, rows_bytes
from zo_offload.ops import Segment, Span
from zo_offload.units import ModelMap, Unit, map_model

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Dims:
    """Widths that activations and FLOPs follow from, in elements.

    Attributes:
        hidden: Of the stream between blocks.
        vocabulary: Of the head.
        attention: Heads times their width, over all blocks.
        boundary: Most that a lane holds a token while it stands before a unit inside a block.
        inner: Most that a block holds a token while it runs.
        active: Parameters that a token is multiplied with, experts at their share.
    """

    hidden: int
    vocabulary: int
    attention: int
    boundary: int
    inner: int
    active: int


@dataclass(frozen=True)
class Layout:
    """A model at one granularity. Arrays have an entry a unit.

    Attributes:
        granularity: See ``granularity.py``.
        dtype: What the forward computes in.
        names: Of the units.
        matrices: Elements that a wire format packs, padded.
        others_wire: Bytes of all other parameters.
        others_rest: Bytes that stay with their masters.
        edges: Rows plus columns of the matrices.
        numel: Parameters, unpadded.
        ambient_wire: Bytes of ambient parameters, which lie on the device.
        ambient_rest: Bytes that stay with their masters.
        ambient_numel: Ambient parameters.
        small_copies: Bytes of ambient tensors that keep a copy a probe and sign.
        large_copies: Bytes of those that keep one.
        head: The head among them, if it is there; it may be perturbed some rows at a time.
        dims: Of the model.
    """

    granularity: str
    dtype: torch.dtype
    names: tuple[str, ...]
    matrices: Counts
    others_wire: Counts
    others_rest: Counts
    edges: Counts
    numel: Counts
    ambient_wire: int
    ambient_rest: int
    ambient_numel: int
    small_copies: int
    large_copies: int
    head: tuple[Span, Segment] | None
    dims: Dims

    def copies_bytes(self, num_draws: int, head_chunk: int | None) -> int:
        """Bytes of perturbed copies of ambient parameters.

        Args:
            num_draws: Probes times signs.
            head_chunk: Rows of the head at a time (None: all).
        """
        whole = self.small_copies * num_draws + self.large_copies
        if head_chunk is None or self.head is None:
            return whole
        copy = copy_bytes(*self.head) * (num_draws if is_small(*self.head) else 1)
        return whole - copy + rows_bytes(*self.head, head_chunk)

    @property
    def num_parameters(self) -> int:
        """Of the model."""
        return int(self.numel.sum()) + self.ambient_numel


def lay_out(
    model: nn.Module, config: Any, granularity: str, dtype: torch.dtype, master: str = "fp32"
) -> Layout:
    """Divide a model on the meta device.

    Args:
        model: A causal language model of transformers.
        config: Its configuration.
        granularity: ``block``, ``sublayer`` or ``linear``.
        dtype: What the forward computes in.
        master: What updates accumulate in, as in the JSON.
    """
    model_map = map_model(model, granularity, None, dtype, master)
    rows = [_numbers(unit, dtype) for unit in model_map.units]
    matrices, wire, rest, edges, numel = np.array(rows, dtype=np.int64).T
    ambient = model_map.ambient
    gathered = surely_gathered(model, ambient.segments)
    head = chunked_head(model, ambient.segments)
    copied = [
        (span, segment)
        for span, segment in ambient.segments
        if span.trainable and segment.name not in gathered
    ]
    return Layout(
        granularity=granularity,
        dtype=dtype,
        names=tuple(unit.name for unit in model_map.units),
        matrices=matrices,
        others_wire=wire,
        others_rest=rest,
        edges=edges,
        numel=numel,
        ambient_wire=ambient.wire_bytes,
        ambient_rest=ambient.rest_bytes,
        ambient_numel=ambient.num_parameters,
        small_copies=sum(copy_bytes(*pair) for pair in copied if is_small(*pair)),
        large_copies=sum(copy_bytes(*pair) for pair in copied if not is_small(*pair)),
        head=next((pair for pair in copied if pair[1].name == head), None),
        dims=dims_of(model_map, config, model, dtype),
    )


def _holds_experts(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and min(shape) > 1  # a convolution of depth has a 1


def _numbers(unit: Unit, dtype: torch.dtype) -> tuple[int, ...]:
    """Matrices, wire and rest bytes of the others, edges, parameters."""
    matrices = others_wire = others_rest = edges = numel = 0
    for span, segment in unit.segments:
        numel += segment.numel
        if len(segment.shape) > 1 and span.dtype == dtype:
            matrices += segment.padded
            edges += segment.numel // segment.shape[-1] + segment.numel // segment.shape[-2]
        else:
            others_wire += segment.padded * span.dtype.itemsize
            others_rest += segment.padded * span.rest_bytes // span.elements
    return matrices, others_wire, others_rest, edges, numel


def dims_of(model_map: ModelMap, config: Any, model: Any, dtype: torch.dtype) -> Dims:
    """Widths, from the configuration and the matrices of the largest block.

    A block holds its input, the stream and the normed stream; beside them every product of the MLP
    (gate, up and theirs), or twice those of attention (as they are and rotated), or what its chosen
    experts take and give. Attention is computed in parts: no product of lengths is held.

    A lane that stands before a group of experts holds the block's input, the stream, what experts
    take and what they have given, what the next one takes and the one before it made and gave (at
    most all tokens), scores, and which experts are chosen.
    """
    text = config.get_text_config()
    hidden = int(text.hidden_size)
    shapes = [tuple(p.shape) for p in _a_block(model).parameters() if p.ndim in (2, 3)]
    flat = [_across(shape, hidden) for shape in shapes if len(shape) == 2] or [hidden]
    widest = max(flat)
    others = sum(width for width in flat if width < widest)
    chosen = int(getattr(text, "num_experts_per_tok", None) or 1)
    experts = [_across(shape[1:], hidden) for shape in shapes if len(shape) == 3]
    boundary = 2 * hidden + max(widest, others)
    if model_map.divided:
        count = max(shape[0] for shape in shapes if len(shape) == 3)
        table = chosen * (count + 1) * (torch.int64.itemsize // dtype.itemsize)  # one hot
        boundary = max(boundary, 6 * hidden + max(experts) + count + table + 5 * chosen)
    routed = chosen * (4 * hidden + sum(experts)) if experts else 0
    inner = 3 * hidden + max(flat.count(widest) * widest, 2 * others, routed)
    heads = int(getattr(text, "num_attention_heads", 0) or 0)
    head_dim = getattr(text, "head_dim", None) or hidden // max(heads, 1)
    return Dims(
        hidden=hidden,
        vocabulary=int(text.vocab_size),
        attention=heads * head_dim * int(text.num_hidden_layers),
        boundary=boundary,
        inner=inner,
        active=_active(model_map, chosen, model),
    )


def _across(shape: tuple[int, ...], hidden: int) -> int:
    """The side of a matrix that is not the stream's."""
    return next((size for size in shape if size != hidden), hidden)


def _a_block(model: nn.Module) -> nn.Module:
    blocks = [block for _, block in repeated_blocks(model)]
    return max(blocks, key=lambda block: sum(p.numel() for p in block.parameters()))


def _active(model_map: ModelMap, chosen: int, model: Any) -> int:
    """Parameters of a token's matrix products; a table that is only gathered has none."""
    total = 0
    for unit in model_map.units:
        for _, segment in unit.segments:
            shape = tuple(model_map.parameters[segment.name].shape)
            experts = shape[0] if _holds_experts(shape) else 1
            total += segment.numel * min(chosen, experts) // experts
    head = getattr(model.get_output_embeddings(), "weight", None)
    return total + (0 if head is None else head.numel())
