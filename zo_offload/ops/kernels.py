"""The kernels as everything else calls them: what each does, and which implementation serves.

The implementations give the same bits (``reference``): C++ for tensors in host memory where it was
built, plain torch for all others. ``ZO_OFFLOAD_KERNELS`` names one instead: ``torch``, ``scalar``,
``avx2``, ``avx512`` or ``neon``.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from zo_offload.errors import KernelError
from zo_offload.ops import torch_ops
from zo_offload.ops.draws import Draw, Point, StepUpdate
from zo_offload.ops.native import ISAS, Native
from zo_offload.ops.span import Segment, Span

VARIABLE = "ZO_OFFLOAD_KERNELS"
TORCH = "torch"
logger = logging.getLogger(__name__)
_native: Native | None = None
_chosen = False


def perturb(
    span: Span,
    wire: torch.Tensor,
    out: torch.Tensor,
    direction: str,
    draw: Draw,
    first: int = 0,
    count: int | None = None,
) -> None:
    """Write ``round(decode(wire) + coefficient * z)`` for a stretch of a span.

    Args:
        span: What the buffers hold.
        wire: The span's wire elements, ``[elements]`` in the forward's dtype.
        out: ``[count]`` in the forward's dtype.
        direction: ``rademacher`` or ``gaussian``.
        draw: Direction and signed coefficient.
        first: First element of the stretch, a multiple of 128.
        count: Its length (default: to the end), a multiple of 128.
    """
    serving = native_for(wire, out) or torch_ops
    serving.perturb(span, wire, out, direction, draw, first, count)


def update(
    span: Span,
    wire: torch.Tensor,
    rest: torch.Tensor,
    direction: str,
    steps: Sequence[StepUpdate],
    points: Sequence[Point] = (),
) -> None:
    """Bring a trainable span's master through ``steps``, in place, each rounded once.

    Args:
        span: What the buffers hold.
        wire: The span's wire elements (for bfloat16 and fp32, part of the master itself).
        rest: What stays home beside them.
        direction: ``rademacher`` or ``gaussian``.
        steps: In order. A draw whose coefficient is zero is not added.
        points: Perturbed copies to write afterwards, in the same pass where that saves one.
    """
    if steps or points:
        serving = native_for(wire, rest, *(point.out for point in points)) or torch_ops
        serving.update(span, wire, rest, direction, steps, points)


def perturb_rows(
    span: Span, segment: Segment, wire: torch.Tensor, rows: torch.Tensor, direction: str, draw: Draw
) -> torch.Tensor:
    """Some rows of a perturbed two-dimensional parameter, without perturbing the others.

    Args:
        span: Holds the parameter.
        segment: The parameter, ``[height, width]``.
        wire: The span's wire elements.
        rows: ``[n]`` row numbers, repetition allowed.
        direction: ``rademacher`` or ``gaussian``.
        draw: Direction and signed coefficient.

    Returns:
        ``[n, width]``, the bits that :func:`perturb` gives those rows.
    """
    serving = native_for(wire, rows) or torch_ops
    return serving.perturb_rows(span, segment, wire, rows, direction, draw)


def native_for(*tensors: torch.Tensor) -> Native | None:
    """The native kernels, where these tensors are for them to work on."""
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return None
    native = _choose()
    return native if native is not None and native.serves(*tensors) else None


def name() -> str:
    """Of what serves tensors in host memory: an instruction set, or ``torch``."""
    native = _choose()
    return native.name if native is not None else TORCH


@contextmanager
def using(wanted: str) -> Iterator[None]:
    """Meanwhile, let one implementation serve tensors in host memory.

    Args:
        wanted: ``torch``, or an instruction set.

    Raises:
        KernelError: It is not to be had here.
    """
    global _native, _chosen
    before = _native, _chosen
    _native, _chosen = _named(wanted), True
    try:
        yield
    finally:
        _native, _chosen = before


def _choose() -> Native | None:
    global _native, _chosen
    if not _chosen:
        wanted = os.environ.get(VARIABLE)
        _native, _chosen = _named(wanted) if wanted else _best(), True
    return _native


def _named(wanted: str) -> Native | None:
    if wanted != TORCH and wanted not in ISAS:
        raise KernelError(f"{VARIABLE}: expected one of {', '.join([TORCH, *ISAS])}: {wanted!r}")
    return None if wanted == TORCH else Native(wanted)


def _best() -> Native | None:
    try:
        return Native()
    except KernelError as error:
        logger.warning(
            "%s; torch serves instead, with the same bits, and perturbing and updating on the CPU "
            "take many times as long. Install a C++ compiler (Debian: apt install g++) and "
            "zo_offload again",
            error,
        )
        return None
