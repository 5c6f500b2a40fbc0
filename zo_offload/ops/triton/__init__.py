"""The kernels in Triton, for tensors on a CUDA (or ROCm) device; the bits of the reference.

Triton is imported, and functions are compiled, when a launch needs them.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from zo_offload.errors import CodecError, KernelError
from zo_offload.ops import lossless12, torch_codecs, torch_ops
from zo_offload.ops.draws import DIRECTIONS, Draw, Point, StepUpdate
from zo_offload.ops.layout import CODECS, NF4, Layout
from zo_offload.ops.span import ALIGNMENT, FORMATS, Segment, Span

GROUPS = {"rademacher": 8, "gaussian": 4}  # of 128 elements, a program
NUM_WARPS = 4


class TritonKernels:
    """Launches the kernels.

    Raises:
        KernelError: Triton is not installed.
    """

    name = "triton"

    def __init__(self) -> None:
        if find_spec("triton") is None:
            raise KernelError("triton kernels: triton is not installed; pip install triton")
        from zo_offload.ops.triton import kernels

        self._work: Any = kernels.work
        self._work_rows: Any = kernels.work_rows
        self._unpack_lossless: Any = kernels.unpack_lossless
        self._interprets = os.environ.get("TRITON_INTERPRET") == "1"

    def serves(self, *tensors: torch.Tensor) -> bool:
        """Whether these can be worked on: contiguous, on a device, or anywhere if interpreted."""
        devices = {tensor.device.type for tensor in tensors}
        return all(t.is_contiguous() for t in tensors) and (self._interprets or devices == {"cuda"})

    def perturb(
        self,
        span: Span,
        wire: torch.Tensor,
        out: torch.Tensor,
        direction: str,
        draw: Draw,
        first: int = 0,
        count: int | None = None,
        ahead: Sequence[StepUpdate] = (),
    ) -> None:
        """See :func:`zo_offload.ops.perturb`."""
        count = span.elements - first if count is None else count
        source, point = _source(span, wire, first, count), Point(out, draw)
        self._launch(span, source, None, direction, (), ahead, point, first, count)

    def update(
        self,
        span: Span,
        wire: torch.Tensor,
        rest: torch.Tensor,
        direction: str,
        steps: Sequence[StepUpdate],
        points: Sequence[Point] = (),
        ahead: Sequence[StepUpdate] = (),
    ) -> None:
        """See :func:`zo_offload.ops.update`."""
        fused = points[0] if points else None
        source = _plain(span, wire)
        self._launch(span, source, rest, direction, steps, ahead, fused, 0, span.elements)
        for point in points[1:]:
            self.perturb(span, wire, point.out, direction, point.draw, ahead=ahead)

    def perturb_rows(
        self,
        span: Span,
        segment: Segment,
        wire: torch.Tensor,
        rows: torch.Tensor,
        direction: str,
        draw: Draw,
    ) -> torch.Tensor:
        """See :func:`zo_offload.ops.perturb_rows`; torch gathers, and checks the numbers."""
        width = segment.shape[1]
        table = wire[segment.start : segment.start + segment.numel].view(segment.shape)
        out = table.index_select(0, rows)
        slack = ALIGNMENT - 1 if width % ALIGNMENT else 0
        groups = -(-(width + slack) // ALIGNMENT)  # that a row may touch
        per_program = min(GROUPS[direction], 1 << (groups - 1).bit_length())
        half = span.dtype == torch.bfloat16
        if not len(rows):
            return out
        with torch.cuda.device_of(out):
            self._work_rows[(len(rows), -(-groups // per_program))](
                out.view(torch.int16) if half else out,
                rows.to(torch.int64).contiguous(),
                width,
                segment.offset,
                segment.parameter_index,
                _uint32([_fields(draw.seed, draw.step, draw.probe)], wire.device),
                _values([draw], [segment.scale], direction, wire.device),
                GROUPS=per_program,
                FORMAT=FORMATS[span.format],
                DIRECTION=DIRECTIONS[direction],
                num_warps=NUM_WARPS,
                enable_fp_fusion=False,
            )
        return out

    def store_master(
        self, span: Span, master: torch.Tensor, wire: torch.Tensor, rest: torch.Tensor
    ) -> None:
        """See :func:`zo_offload.ops.store_master`: done once a run, so torch serves."""
        torch_ops.store_master(span, master, wire, rest)

    def encode(self, dtype: torch.dtype, values: torch.Tensor, wire: torch.Tensor) -> None:
        """See :func:`zo_offload.ops.encode`: done once a run, so torch serves."""
        torch_ops.encode(dtype, values, wire)

    def pack(self, layout: Layout, wire: torch.Tensor, packed: torch.Tensor) -> int:
        """See :func:`zo_offload.ops.pack`."""
        return torch_codecs.pack(layout, wire, packed)

    def unpack(
        self,
        layout: Layout,
        packed: torch.Tensor,
        elements: int,
        dtype: torch.dtype,
        out: torch.Tensor,
        first: int = 0,
        scales: torch.Tensor | None = None,
    ) -> None:
        """See :func:`zo_offload.ops.unpack`; group codes are unpacked once a run, by torch."""
        if layout.kind != "lossless12":
            torch_codecs.unpack(layout, packed, elements, dtype, out, first, scales)
            return
        source, groups = _lossless(packed, elements, first), out.numel() // ALIGNMENT
        half = out.dtype == torch.bfloat16
        per_program = GROUPS["rademacher"]
        with torch.cuda.device_of(out):
            self._unpack_lossless[(-(-groups // per_program),)](
                source.elements,
                *source.lossless,
                _damage(out.device),
                out.view(torch.int16) if half else out,
                groups,
                GROUPS=per_program,
                FORMAT=FORMATS["bf16_sr" if half else "fp32"],
                num_warps=NUM_WARPS,
                enable_fp_fusion=False,
            )

    def _launch(
        self,
        span: Span,
        source: "_Source",
        rest: torch.Tensor | None,
        direction: str,
        steps: Sequence[StepUpdate],
        ahead: Sequence[StepUpdate],
        point: Point | None,
        first: int,
        count: int,
    ) -> None:
        """Work on ``count`` elements of the span, which ``source`` holds from element ``first``."""
        device, groups = source.elements.device, count // ALIGNMENT
        scales = sorted({segment.scale for segment in span.segments})
        every = [*steps, *ahead]
        moved = [[d for d in step.draws if d.coefficient != 0.0] for step in every]
        draws = [draw for of_step in moved for draw in of_step]
        starts = [0, *accumulate(map(len, moved))]
        if point is not None:
            draws.append(point.draw)
        fields = [_fields(draw.seed, draw.step, draw.probe) for draw in draws]
        roundings = [_fields(step.seed, step.step, 0) for step in steps]
        values = _values(draws, scales, direction, device)
        half = span.dtype == torch.bfloat16
        per_program = GROUPS[direction]
        out = source.elements if point is None else point.out
        with torch.cuda.device_of(out):  # of this thread; else it would be launched on another
            self._work[(-(-groups // per_program),)](
                source.elements,
                rest if rest is not None and rest.numel() else source.elements,
                out.view(torch.int16) if half else out,
                _groups(span, first, groups, scales, device),
                groups,
                _uint32(fields, device),
                values,
                values[0].numel() if draws else 0,
                torch_ops.sent([step.decay for step in every] or [1.0], torch.float64, device),
                torch_ops.sent(starts, torch.int32, device),
                _uint32(roundings, device),
                len(steps),
                len(every),
                len(draws) - 1,
                source.scales,
                source.nf4,
                *source.lossless,
                _damage(device),
                GROUPS=per_program,
                FORMAT=FORMATS[span.format],
                WIRE=source.format,
                CODEC=CODECS[span.layout.kind],
                PER_SCALE=span.layout.group or ALIGNMENT,
                DIRECTION=DIRECTIONS[direction],
                UPDATES=bool(steps),
                PERTURBS=point is not None,
                DITHERS=span.dither,
                num_warps=NUM_WARPS,
                enable_fp_fusion=False,
            )


@dataclass(frozen=True, slots=True)
class _Source:
    """How the kernel reads a wire.

    Attributes:
        elements: Elements of a format, or codes.
        format: Of ``FORMATS``; -1 where codes have scales.
        scales: Bits of bfloat16.
        nf4: The sixteen values.
        lossless: Of lossless12: all bytes in words, the span's elements, the group that is
            begun with, how many bytes.
    """

    elements: torch.Tensor
    format: int
    scales: torch.Tensor
    nf4: torch.Tensor
    lossless: tuple[torch.Tensor, int, int, int]


def _plain(span: Span, wire: torch.Tensor) -> _Source:
    elements = wire.view(torch.int16) if span.dtype == torch.bfloat16 else wire
    return _elements(elements, FORMATS[span.format])


def _elements(elements: torch.Tensor, format_: int) -> _Source:
    return _Source(elements, format_, elements, elements, (elements, 0, 0, 0))


def _source(span: Span, wire: torch.Tensor, first: int, count: int) -> _Source:
    """``count`` elements of a wire, packed or not, from ``first`` on."""
    layout = span.layout
    if layout.kind == "identity":
        return _plain(span, wire[first : first + count])
    if layout.kind == "lossless12":
        return _lossless(wire, span.elements, first)
    layout.refuse_short(wire, span.elements, span.dtype)
    if layout.kind in ("bf16", "fp16"):
        halves = wire[: span.packed_bytes]
        elements = halves.view(torch.int16 if layout.kind == "bf16" else torch.float16)[first:]
        format_ = FORMATS["planes" if layout.kind == "bf16" else "fp16"]
        return _elements(elements, format_)
    scales = wire[layout.scales_at(span.elements) : span.packed_bytes].view(torch.int16)
    codes = wire[layout.scales_at(first) :]
    return _Source(codes, -1, scales[first // layout.group :], _nf4(wire.device), (codes, 0, 0, 0))


def _lossless(packed: torch.Tensor, elements: int, first: int) -> _Source:
    """The bytes as they are: their header is read on the device, for which the host need not wait.

    Raises:
        CodecError: They are too few for so many elements.
    """
    least = lossless12.sections(elements, 0).escapes
    if packed.numel() < least:
        raise CodecError(
            lossless12.wrong(f"{packed.numel()} bytes for {elements} elements, expected {least}")
        )
    words = packed[: packed.numel() // 4 * 4].view(torch.int32)
    whole = (words, elements, first // ALIGNMENT, packed.numel())
    return _Source(packed, -1, packed, packed, whole)


_damages: dict[torch.device, torch.Tensor] = {}


def _damage(device: torch.device) -> torch.Tensor:
    """int32 ``[1]`` that kernels set where bytes are damaged."""
    damage = _damages.get(device)
    if damage is None:  # of two threads that make one, both go on with the first
        damage = _damages.setdefault(device, torch.zeros(1, dtype=torch.int32, device=device))
    return damage


def refuse_damage(device: torch.device) -> None:
    """See :func:`zo_offload.ops.refuse_damage`."""
    damage = _damages.get(device)
    if damage is not None and damage.item():
        damage.zero_()
        raise CodecError(lossless12.wrong("its sections do not match each other"))


@lru_cache(maxsize=8)
def _nf4(device: torch.device) -> torch.Tensor:
    return torch.tensor(NF4, dtype=torch.float32, device=device)


def _fields(seed: int, step: int, probe: int) -> tuple[int, int, int, int]:
    return seed & 0xFFFFFFFF, seed >> 32, step & 0xFFFFFFFF, probe


def _uint32(rows: list[tuple[int, int, int, int]], device: torch.device) -> torch.Tensor:
    array = np.array(rows or [(0, 0, 0, 0)], np.uint32)
    return _sent(array.view(np.int32), device).view(torch.uint32)


def _values(
    draws: Sequence[Draw], scales: Sequence[float], direction: str, device: torch.device
) -> torch.Tensor:
    """What terms are made of: products with each draw and scale, float64 rounded to fp32."""
    values = _sent(np.array([d.coefficient for d in draws])[:, None] * np.array(scales), device)
    if direction == "gaussian":
        values = values.unsqueeze(-1) * torch_ops.cells(device)
    return values.float()


def _groups(
    span: Span, first: int, count: int, scales: list[float], device: torch.device
) -> torch.Tensor:
    """Of every 128 elements from ``first``: parameter, block inside it, number of its scale.

    Made on the device of a column a parameter: the host does not wait until what was launched
    before is over, as it would with a copy of them all.
    """
    columns, done = [], 0
    for segment, start, stop in span.overlapping(first, first + count * ALIGNMENT):
        groups = (stop - start) // ALIGNMENT
        columns.append(
            (
                segment.parameter_index,
                (start // ALIGNMENT - done) & 0xFFFFFFFF,
                scales.index(segment.scale),
                groups,
            )
        )
        done += groups
    short = _sent(np.array(columns, np.uint32).T.copy().view(np.int32), device)
    table = short[:3].repeat_interleave(short[3], 1, output_size=count)
    table[1] += torch.arange(count, dtype=torch.int32, device=device)
    return table


def _sent(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A few numbers on a device: pageable memory is read before the call that copies returns."""
    return torch.from_numpy(array).to(device, non_blocking=True)
