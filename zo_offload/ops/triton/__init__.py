"""The kernels in Triton, for tensors on a CUDA (or ROCm) device; the bits of the reference.

Triton is imported, and functions are compiled, when a launch needs them.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from zo_offload.errors import KernelError
from zo_offload.ops import reference, torch_codecs, torch_ops
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
            raise KernelError("triton kernels: triton is not installed: pip install triton")
        from zo_offload.ops.triton import kernels

        self._work: Any = kernels.work
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
        if span.layout.kind == "lossless12":  # its damage is looked for on the host
            torch_ops.perturb(span, wire, out, direction, draw, first, count, ahead)
            return
        count = span.elements - first if count is None else count
        self._launch(span, wire, None, direction, (), ahead, Point(out, draw), first, count)

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
        self._launch(span, wire, rest, direction, steps, ahead, fused, 0, span.elements)
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
        """See :func:`zo_offload.ops.perturb_rows`; a few rows are not worth a kernel."""
        return torch_ops.perturb_rows(span, segment, wire, rows, direction, draw)

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
    ) -> None:
        """See :func:`zo_offload.ops.unpack`."""
        torch_codecs.unpack(layout, packed, elements, dtype, out, first)

    def _launch(
        self,
        span: Span,
        wire: torch.Tensor,
        rest: torch.Tensor | None,
        direction: str,
        steps: Sequence[StepUpdate],
        ahead: Sequence[StepUpdate],
        point: Point | None,
        first: int,
        count: int,
    ) -> None:
        device, table = wire.device, _groups(span)
        every = [*steps, *ahead]
        moved = [[d for d in step.draws if d.coefficient != 0.0] for step in every]
        draws = [draw for of_step in moved for draw in of_step]
        starts = np.cumsum([0, *map(len, moved)]).astype(np.int32)
        if point is not None:
            draws.append(point.draw)
        fields = [_fields(draw.seed, draw.step, draw.probe) for draw in draws]
        roundings = [_fields(step.seed, step.step, 0) for step in steps]
        scales = np.unique([segment.scale for segment in span.segments])
        factors = np.array([draw.coefficient for draw in draws])[:, None] * scales
        values = torch.from_numpy(np.ascontiguousarray(factors)).to(device)
        if direction == "gaussian":
            cells = torch.tensor(reference.gaussian_cells(), device=device)
            values = values.unsqueeze(-1) * cells
        half = span.dtype == torch.bfloat16
        source = _source(span, wire) if point is not None and not steps else _plain(span, wire)
        groups = count // ALIGNMENT
        per_program = GROUPS[direction]
        out = wire if point is None else point.out
        self._work[(-(-groups // per_program),)](
            source.elements,
            rest if rest is not None and rest.numel() else wire,
            out.view(torch.int16) if half else out,
            torch.from_numpy(table).to(device),
            table.shape[1],
            first // ALIGNMENT,
            groups,
            _uint32(fields, device),
            values.float(),
            values[0].numel() if draws else 0,
            torch.tensor([step.decay for step in every] or [1.0], dtype=torch.float64).to(device),
            torch.from_numpy(starts).to(device),
            _uint32(roundings, device),
            len(steps),
            len(every),
            len(draws) - 1,
            source.scales,
            source.nf4,
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
    """

    elements: torch.Tensor
    format: int
    scales: torch.Tensor
    nf4: torch.Tensor


def _plain(span: Span, wire: torch.Tensor) -> _Source:
    elements = wire.view(torch.int16) if span.dtype == torch.bfloat16 else wire
    return _Source(elements, FORMATS[span.format], elements, elements)


def _source(span: Span, wire: torch.Tensor) -> _Source:
    layout = span.layout
    if layout.kind == "identity":
        return _plain(span, wire)
    layout.refuse_short(wire, span.elements, span.dtype)
    if layout.kind in ("bf16", "fp16"):
        halves = wire[: span.packed_bytes]
        elements = halves.view(torch.int16 if layout.kind == "bf16" else torch.float16)
        format_ = FORMATS["planes" if layout.kind == "bf16" else "fp16"]
        return _Source(elements, format_, elements, elements)
    scales = wire[layout.scales_at(span.elements) : span.packed_bytes].view(torch.int16)
    return _Source(wire, -1, scales, _nf4(wire.device))


@lru_cache(maxsize=8)
def _nf4(device: torch.device) -> torch.Tensor:
    return torch.tensor(NF4, dtype=torch.float32, device=device)


def _fields(seed: int, step: int, probe: int) -> tuple[int, int, int, int]:
    return seed & 0xFFFFFFFF, seed >> 32, step & 0xFFFFFFFF, probe


def _uint32(rows: list[tuple[int, int, int, int]], device: torch.device) -> torch.Tensor:
    array = np.array(rows or [(0, 0, 0, 0)], np.uint32)
    return torch.from_numpy(array.view(np.int32)).to(device).view(torch.uint32)


def _groups(span: Span) -> np.ndarray:
    """Of every 128 elements: parameter, number of the block inside it, number of its scale."""
    table = span.table
    scales = np.unique(table["scale"])
    lengths = ((table["stop"] - table["start"]) // ALIGNMENT).astype(np.int64)
    ends = np.cumsum(lengths)
    block = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    parameter = np.repeat(table["parameter"], lengths)
    scale = np.repeat(np.searchsorted(scales, table["scale"]), lengths)
    columns = [column.astype(np.uint32) for column in (parameter, block, scale)]
    return np.stack(columns).view(np.int32)
