"""The kernels as everything else calls them: what each does, and which implementation serves.

The implementations give the same bits (``reference``): C++ for tensors in host memory where it was
built, Triton for those on a CUDA device where it works, plain torch for all others.
``ZO_OFFLOAD_KERNELS`` names one instead, which then serves wherever it can: ``torch``, ``scalar``,
``avx2``, ``avx512``, ``neon``, or ``triton``.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

from zo_offload.errors import KernelError
from zo_offload.ops import torch_codecs, torch_ops, triton
from zo_offload.ops.draws import Draw, Point, StepUpdate
from zo_offload.ops.layout import Layout
from zo_offload.ops.native import ISAS, Native
from zo_offload.ops.span import ALIGNMENT, Segment, Span
from zo_offload.ops.triton import TritonKernels

VARIABLE = "ZO_OFFLOAD_KERNELS"
TORCH, TRITON = "torch", "triton"
logger = logging.getLogger(__name__)
Serving = Native | TritonKernels
_serving: Serving | None = None
_chosen = _named_one = False


def perturb(
    span: Span,
    wire: torch.Tensor,
    out: torch.Tensor,
    direction: str,
    draw: Draw,
    first: int = 0,
    count: int | None = None,
    ahead: Sequence[StepUpdate] = (),
) -> None:
    """Write ``round(decode(wire) - ahead + coefficient * z)`` for a stretch of a span.

    Args:
        span: What the buffers hold.
        wire: The span's wire elements, ``[elements]`` in the forward's dtype; with a codec other
            than ``identity``, the bytes that it packed them into.
        out: ``[count]`` in the forward's dtype.
        direction: ``rademacher`` or ``gaussian``.
        draw: Direction and signed coefficient.
        first: First element of the stretch, a multiple of 128.
        count: Its length (default: to the end), a multiple of 128.
        ahead: Steps that the wire does not carry yet, taken in fp32 on the way.

    Raises:
        CodecError: The packed bytes are too few, or damaged; of those on a device that is told by
            :func:`refuse_damage`.
    """
    serving = serving_for(wire, out) or torch_ops
    serving.perturb(span, wire, out, direction, draw, first, count, ahead)


def update(
    span: Span,
    wire: torch.Tensor,
    rest: torch.Tensor,
    direction: str,
    steps: Sequence[StepUpdate],
    points: Sequence[Point] = (),
    ahead: Sequence[StepUpdate] = (),
) -> None:
    """Bring a trainable span's master through ``steps``, in place, each rounded once.

    Args:
        span: What the buffers hold.
        wire: The span's wire elements (for bfloat16 and fp32, part of the master itself).
        rest: What stays home beside them.
        direction: ``rademacher`` or ``gaussian``.
        steps: In order. A draw whose coefficient is zero is not added. Of a non-negative span
            what is below zero after a step becomes zero before the next.
        points: Perturbed copies to write afterwards, in the same pass where that saves one.
        ahead: Steps that the copies take in fp32 and the masters do not.
    """
    assert span.codec == "identity" or not points, "copies of a packed span are made from its bytes"
    if span.non_negative:
        for step in steps:
            (serving_for(wire, rest) or torch_ops).update(span, wire, rest, direction, [step])
            torch_ops.lift(wire)
        steps = ()
    if steps or points:
        serving = serving_for(wire, rest, *(point.out for point in points)) or torch_ops
        serving.update(span, wire, rest, direction, steps, points, ahead)


def perturb_rows(
    span: Span, segment: Segment, wire: torch.Tensor, rows: torch.Tensor, direction: str, draw: Draw
) -> torch.Tensor:
    """Some rows of a perturbed two-dimensional parameter, without perturbing the others.

    Args:
        span: Holds the parameter.
        segment: The parameter, or a part of it, ``[height, width]``.
        wire: The span's wire elements.
        rows: ``[n]`` row numbers, repetition allowed.
        direction: ``rademacher`` or ``gaussian``.
        draw: Direction and signed coefficient.

    Returns:
        ``[n, width]``, the bits that :func:`perturb` gives those rows.
    """
    assert span.codec == "identity", "rows are read from wire elements"
    serving = serving_for(wire, rows) or torch_ops
    return serving.perturb_rows(span, segment, wire, rows, direction, draw)


def pack(layout: Layout, wire: torch.Tensor, packed: torch.Tensor) -> int:
    """Encode wire elements: a pure function of them.

    Args:
        layout: The codec's.
        wire: ``[elements]``, a multiple of 128, in the forward's dtype.
        packed: uint8, at least the layout's capacity; it begins on a multiple of 4.

    Returns:
        Bytes used, a multiple of 64; those after them are left as they are.
    """
    assert packed.nbytes >= layout.capacity(wire.numel(), wire.dtype)
    serving = serving_for(wire, packed) or torch_codecs
    return serving.pack(layout, wire, packed)


def unpack(
    layout: Layout,
    packed: torch.Tensor,
    elements: int,
    dtype: torch.dtype,
    out: torch.Tensor,
    first: int = 0,
    scales: torch.Tensor | None = None,
) -> None:
    """Decode a stretch of a packed span.

    Args:
        layout: The codec's.
        packed: What :func:`pack` wrote, or more.
        elements: Of the whole span.
        dtype: What the forward computes in.
        out: ``[count]``, a multiple of 128: fp32 takes what the bytes mean; a narrower dtype the
            same, rounded as perturbed copies are.
        first: Element of the span that it begins at, a multiple of 128.
        scales: ``[count / group]`` fp32, of the stretch's groups, in place of those that are
            packed; only where the layout has groups. With equal scales the bits are equal.

    Raises:
        CodecError: The bytes are too few, or damaged; of those on a device that is told by
            :func:`refuse_damage`.
    """
    assert first % ALIGNMENT == out.numel() % ALIGNMENT == 0 <= first <= elements - out.numel()
    given = [scales] if scales is not None else []
    assert all(s.dtype == torch.float32 and s.numel() * layout.group == out.numel() for s in given)
    serving = serving_for(packed, out, *given) or torch_codecs
    serving.unpack(layout, packed, elements, dtype, out, first, scales)


def refuse_damage(device: torch.device) -> None:
    """Wait for the kernels on a device that have decoded lossless12, if any have.

    Whether bytes are sound is found where they are decoded; asked after each, the device would run
    dry each time.

    Raises:
        CodecError: Bytes were damaged since this was last asked. What was made of them is of no
            use.
    """
    triton.refuse_damage(device)


def store_master(span: Span, master: torch.Tensor, wire: torch.Tensor, rest: torch.Tensor) -> None:
    """Inverse of :func:`load_master`: encode the wire from the master, keep the rest home.

    A master of fewer bits than the value takes the nearest that it can hold, ties away from zero.
    Every NaN becomes 0x7fc00000.

    Args:
        span: What the buffers hold.
        master: ``[n]`` fp32, of any part of the span; left as it is.
        wire: ``[n]`` in the forward's dtype.
        rest: ``[n]``, or whatever there is where the wire holds it all.
    """
    serving = serving_for(master, wire, rest) or torch_ops
    serving.store_master(span, master, wire, rest)


def encode(dtype: torch.dtype, values: torch.Tensor, wire: torch.Tensor) -> None:
    """Write fp32 values that no master stands behind as the wire has them, rounded as masters are.

    Args:
        dtype: What the forward computes in.
        values: ``[n]`` fp32; left as they are.
        wire: ``[n]`` in ``dtype``.

    Example:
        >>> wire = torch.empty(2, dtype=torch.bfloat16)
        >>> encode(torch.bfloat16, torch.tensor([1.0, 1.0 + 2**-8]), wire)  # the second is a tie
        >>> wire.tolist()
        [1.0, 1.0078125]
    """
    serving = serving_for(values, wire) or torch_ops
    serving.encode(dtype, values, wire)


def digest(data: torch.Tensor, first: int = 0) -> int:
    """A number that tells bytes from others; those of parts add up, modulo 2^64.

    Args:
        data: Contiguous, beginning on a multiple of four bytes, on any device. Zeros fill it up to
            whole words of four bytes.
        first: Words that come before it.

    Example:
        >>> data = torch.arange(8, dtype=torch.uint8)
        >>> digest(data) == (digest(data[:4]) + digest(data[4:], 1)) % 2**64
        True
    """
    data = data.view(torch.uint8)
    whole = data.numel() // 4
    words, tail = data[: 4 * whole].view(torch.int32), data[4 * whole :]
    serving = serving_for(words)
    kernel = serving.digest if isinstance(serving, Native) else torch_ops.digest
    total = kernel(words, first)
    if tail.numel():
        word = int.from_bytes(bytes(tail.tolist()), "little")
        total += torch_ops.digest(torch.tensor([word]), first + whole)
    return total % 2**64


def serving_for(*tensors: torch.Tensor) -> Serving | None:
    """The kernels that these tensors are for; None where torch serves."""
    away = [tensor.device for tensor in tensors if tensor.device.type != "cpu"]
    if away and not _named_one and VARIABLE not in os.environ:
        serving = triton_on(away[0]) if away[0].type == "cuda" else None
    else:
        serving = _choose()
    return serving if serving is not None and serving.serves(*tensors) else None


@lru_cache(maxsize=8)
def triton_on(device: torch.device) -> TritonKernels | None:
    """Triton's kernels for a device; None, with a warning, where they do not work there.

    They are compiled when they are first launched, by tools that may be missing or too old: so one
    is tried, and its bits are compared.
    """
    try:
        serving = TritonKernels()
        found = _tried(serving, device)
        reason = None if torch.equal(found, _tried(torch_ops, device)) else "their bits are wrong"
    except Exception as error:  # whatever a compiler or a driver says
        serving, reason = None, (str(error).splitlines() or [type(error).__name__])[0]
    if reason is None:
        return serving
    logger.warning(
        "triton kernels do not work on %s (%s); torch serves instead, with the same bits, and "
        "perturbing and updating there take many times as long. Install triton as it came with "
        "this torch, and a C compiler; %s=torch takes torch without this warning",
        device,
        reason,
        VARIABLE,
    )
    return None


def _tried(serving: Any, device: torch.device) -> torch.Tensor:
    span = Span(torch.bfloat16, (Segment("w", 0, (256,), 0),), 0, 0)
    wire = torch.linspace(-1.0, 1.0, 256, device=device).bfloat16()
    serving.perturb(span, wire, wire, "rademacher", Draw(1, 2, 3, 0.1))
    return wire


def name() -> str:
    """Of what serves tensors in host memory, where it can: an instruction set, or ``torch``."""
    serving = _choose()
    return serving.name if serving is not None else TORCH


@contextmanager
def using(wanted: str) -> Iterator[None]:
    """Meanwhile, let one implementation serve wherever it can.

    Args:
        wanted: ``torch``, ``triton``, or an instruction set.

    Raises:
        KernelError: It is not to be had here.
    """
    global _serving, _chosen, _named_one
    before = _serving, _chosen, _named_one
    _serving, _chosen, _named_one = _named(wanted), True, True
    try:
        yield
    finally:
        _serving, _chosen, _named_one = before


def _choose() -> Serving | None:
    global _serving, _chosen
    if not _chosen:
        wanted = os.environ.get(VARIABLE)
        _serving, _chosen = _named(wanted) if wanted else _best(), True
    return _serving


def _named(wanted: str) -> Serving | None:
    known = [TORCH, TRITON, *ISAS]
    if wanted not in known:
        raise KernelError(f"{VARIABLE}: expected one of {', '.join(known)}: {wanted!r}")
    if wanted == TRITON:
        return TritonKernels()
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
