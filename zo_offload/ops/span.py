"""Spans: the stretches of flat memory that kernels work on.

A span is a run of parameters of one kind (one forward dtype, all trainable or all frozen, all
dithered or none) inside a unit's flat buffers. Every parameter starts on a multiple of 128
elements, so that the noise blocks of neighbours never share an element and a span's noise is a
sequence of whole blocks. Of a parameter that several units divide among themselves a span holds a
part, which begins on a block of its noise.
"""

from bisect import bisect_right
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from zo_offload.ops.layout import Layout, layout_of

ALIGNMENT = 128  # elements; a multiple of every direction's block
TABLE = np.dtype(
    [("start", "<u8"), ("stop", "<u8"), ("scale", "<f8"), ("parameter", "<u4"), ("block", "<u4")]
)


@dataclass(frozen=True, slots=True)
class Segment:
    """One parameter inside a span, or a part of one.

    Attributes:
        name: Qualified name in the model.
        parameter_index: Position among all parameters of the model; names its noise.
        shape: As the model sees it.
        start: First element inside the span, a multiple of 128.
        scale: Factor on z for this tensor (1.0 unless ``direction_scale`` is set).
        offset: Elements of the parameter that lie before the part, a multiple of 128.
    """

    name: str
    parameter_index: int
    shape: tuple[int, ...]
    start: int
    scale: float = 1.0
    offset: int = 0

    @property
    def numel(self) -> int:
        """Elements of the parameter, or of the part."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def padded(self) -> int:
        """Elements up to the next multiple of 128."""
        return -(-self.numel // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Span:
    """A run of parameters of one kind.

    Attributes:
        dtype: What the forward computes in: float32, bfloat16 or float16.
        segments: In order of memory.
        wire_offset: First byte in the unit's wire buffer, where it rests.
        rest_offset: First byte in the unit's rest buffer (what stays with the master).
        trainable: Whether directions move it.
        dither: Whether perturbed copies are rounded stochastically (bfloat16 vectors).
        master: What updates accumulate in where the forward is bfloat16: ``fp32``, ``bf16+8`` or
            ``bf16_sr``. Otherwise it is fp32.
        codec: How its wire is packed for the bus. Beside a master the wire rests as elements; what
            is frozen rests packed.
        packed_offset: First byte in the unit's packed buffer (what crosses the bus).
        plain_offset: First byte in the scratch, where the forward reads its elements.
        non_negative: Whether a step leaves nothing below zero; an fp32 span's.
    """

    dtype: torch.dtype
    segments: tuple[Segment, ...]
    wire_offset: int
    rest_offset: int
    trainable: bool = True
    dither: bool = False
    master: str = "fp32"
    codec: str = "identity"
    packed_offset: int = 0
    plain_offset: int = 0
    non_negative: bool = False
    elements: int = field(init=False)

    def __post_init__(self) -> None:
        assert all(segment.offset % ALIGNMENT == 0 for segment in self.segments)
        assert not self.non_negative or self.format == "fp32"
        last = self.segments[-1]
        object.__setattr__(self, "elements", last.start + last.padded)

    @property
    def rests_packed(self) -> bool:
        """Whether it rests as its codec packs it: nothing accumulates in what is frozen."""
        return not self.trainable and self.codec != "identity"

    @property
    def wire_bytes(self) -> int:
        """Bytes of the span in the wire, where it rests."""
        return self.packed_bytes if self.rests_packed else self.plain_bytes

    @property
    def plain_bytes(self) -> int:
        """Bytes of its elements, as the forward reads them."""
        return self.elements * self.dtype.itemsize

    @property
    def layout(self) -> Layout:
        """Its codec's layout."""
        return layout_of(self.codec)

    @property
    def packed_bytes(self) -> int:
        """The most bytes that the span takes packed by its codec."""
        return self.layout.capacity(self.elements, self.dtype)

    @property
    def rest_bytes(self) -> int:
        """Bytes of the span that stay home."""
        dtype = REST_DTYPES[self.format]
        return self.elements * dtype.itemsize if self.trainable and dtype is not None else 0

    @property
    def format(self) -> str:
        """How a master lies in wire and rest: a key of ``REST_DTYPES``."""
        if self.dtype == torch.bfloat16:
            return "planes" if self.master == "fp32" else self.master
        return "fp16" if self.dtype == torch.float16 else "fp32"

    def overlapping(self, start: int, stop: int) -> list[tuple[Segment, int, int]]:
        """Segments that hold elements start..stop, each with the first and last in its parameter.

        Padding belongs to the segment before it.
        """
        found = []
        for i in range(bisect_right(self._starts, start) - 1, len(self.segments)):
            segment = self.segments[i]
            if segment.start >= stop:
                break
            end = self._starts[i + 1] if i + 1 < len(self.segments) else self.elements
            first, last = max(start, segment.start), min(stop, end)
            begin = segment.start - segment.offset
            found.append((segment, first - begin, last - begin))
        return found

    def alone(self, segment: Segment) -> "Span":
        """A span of one of its parameters, whose noise is the same."""
        return replace(self, segments=(replace(segment, start=0),))

    def piece(self, first: int, last: int) -> "Span":
        """A span of some of its elements, from one multiple of 128 to another.

        Their noise is the same. It says where a master lies, not where copies of it do.

        Args:
            first: Element that it begins with.
            last: Element behind it.
        """
        assert first % ALIGNMENT == last % ALIGNMENT == 0
        assert self.trainable
        segments = []
        for segment, begin, end in self.overlapping(first, last):
            start = segment.start - segment.offset + begin - first
            segments.append(replace(segment, shape=(end - begin,), start=start, offset=begin))
        rest = REST_DTYPES[self.format]
        return replace(
            self,
            segments=tuple(segments),
            wire_offset=self.wire_offset + first * self.dtype.itemsize,
            rest_offset=self.rest_offset + first * (rest.itemsize if rest is not None else 0),
        )

    @cached_property
    def table(self) -> npt.NDArray[np.void]:
        """The segments as kernels read them: the block is that of the first 128 elements."""
        stops = [*self._starts[1:], self.elements]
        rows = [
            (s.start, stop, s.scale, s.parameter_index, s.offset // ALIGNMENT)
            for s, stop in zip(self.segments, stops, strict=True)
        ]
        return np.array(rows, TABLE)

    @cached_property
    def _starts(self) -> list[int]:
        return [segment.start for segment in self.segments]

    def wire(self, buffer: torch.Tensor) -> torch.Tensor:
        """A view of a unit's wire buffer: elements, in the forward's dtype, or packed bytes."""
        part = buffer[self.wire_offset : self.wire_offset + self.wire_bytes]
        return part if self.rests_packed else part.view(self.dtype)

    def plain(self, buffer: torch.Tensor) -> torch.Tensor:
        """This span's elements, in the forward's dtype, as a view of the scratch."""
        return buffer[self.plain_offset : self.plain_offset + self.plain_bytes].view(self.dtype)

    def packed(self, buffer: torch.Tensor) -> torch.Tensor:
        """What its codec made of its elements, a view of a unit's packed buffer.

        Bytes, or where they are not packed the elements themselves.
        """
        part = buffer[self.packed_offset : self.packed_offset + self.packed_bytes]
        return part.view(self.dtype) if self.codec == "identity" else part

    def rest(self, buffer: torch.Tensor) -> torch.Tensor:
        """What stays home, a view of a unit's rest buffer; nothing where the wire holds it all."""
        dtype = REST_DTYPES[self.format] or torch.uint8
        return buffer[self.rest_offset : self.rest_offset + self.rest_bytes].view(dtype)


# What stays home, by how the master is kept. fp32 is its own master; fp16 is rounded from an fp32
# master; a bfloat16 travels as the upper plane of fp32 (planes), as that of the top 24 bits
# (bf16+8), or is the master itself (bf16_sr).
REST_DTYPES = {
    "fp32": None,
    "fp16": torch.float32,
    "planes": torch.int16,
    "bf16+8": torch.int8,
    "bf16_sr": None,
}
# The numbers by which compiled kernels know these; they are in csrc/kernels.h as well.
FORMATS = {"fp32": 0, "planes": 1, "fp16": 2, "bf16+8": 3, "bf16_sr": 4}
