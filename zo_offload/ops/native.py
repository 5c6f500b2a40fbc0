"""The kernels in C++ (``csrc``), for tensors in host memory; the bits of the reference, faster.

The library is built where an installation finds a compiler. It is plain C at its border: loaded
with ctypes, which releases the GIL around each call. Its threads are those of torch's own OpenMP
runtime, so that no two pools fight for the cores.
"""

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zo_offload.errors import CodecError, KernelError
from zo_offload.ops import reference
from zo_offload.ops.draws import DIRECTIONS, Draw, Point, StepUpdate
from zo_offload.ops.layout import CODECS, FORWARDS, Layout
from zo_offload.ops.span import FORMATS, REST_DTYPES, Segment, Span

VERSION = 4
LIBRARY = Path(__file__).with_name("_kernels.so")
ISAS = {"scalar": 0, "neon": 1, "avx2": 2, "avx512": 3}  # of zo_isa
STATUS = {1: "a job that is not sound", 2: "no such instruction set here", 3: "out of memory"}
BAD_BYTES = 4
# How a wire that no master stands behind is written: as one that is its own, or leaves it out.
WITHOUT_MASTER = {torch.float32: "fp32", torch.bfloat16: "bf16_sr", torch.float16: "fp16"}
MOST_CACHED = 4 << 20  # bytes; a copy larger than this goes around the caches


class _Draw(ctypes.Structure):
    _fields_ = [
        ("seed", ctypes.c_uint64),
        ("coefficient", ctypes.c_double),
        ("step", ctypes.c_uint32),
        ("probe", ctypes.c_uint32),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        ("seed", ctypes.c_uint64),
        ("decay", ctypes.c_double),
        ("draws", ctypes.c_void_p),
        ("num_draws", ctypes.c_uint32),
        ("step", ctypes.c_uint32),
    ]


class _Point(ctypes.Structure):
    _fields_ = [("out", ctypes.c_void_p), ("draw", _Draw)]


class _Job(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("format", "direction", "dither", "num_threads")),
        *(
            (name, ctypes.c_uint32)
            for name in ("num_segments", "num_steps", "num_ahead", "num_points")
        ),
        *((name, ctypes.c_uint64) for name in ("first", "count", "streaming")),
        *((name, ctypes.c_void_p) for name in ("wire", "rest", "segments", "steps", "ahead")),
        *((name, ctypes.c_void_p) for name in ("points", "cells")),
        *((name, ctypes.c_uint32) for name in ("codec", "group")),
        ("wire_bytes", ctypes.c_uint64),
    ]


class _Rows(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("format", "direction", "num_threads", "parameter")),
        *((name, ctypes.c_uint64) for name in ("width", "num_rows", "offset")),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("wire", "rows", "out")),
        ("draw", _Draw),
        ("cells", ctypes.c_void_p),
    ]


class _Pack(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("codec", "group", "format", "out_format")),
        *((name, ctypes.c_uint32) for name in ("num_threads", "reserved")),
        *((name, ctypes.c_uint64) for name in ("elements", "first", "count", "packed_bytes")),
        *((name, ctypes.c_void_p) for name in ("wire", "packed", "out", "scales")),
    ]


class _Values(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("format", "num_threads")),
        ("count", ctypes.c_uint64),
        *((name, ctypes.c_void_p) for name in ("values", "wire", "rest")),
    ]


class Native:
    """The kernels at one instruction set.

    Args:
        isa: ``avx512``, ``avx2``, ``neon`` or ``scalar`` (default: the best of this machine).

    Raises:
        KernelError: The library was not built, is another version's, or the machine lacks the set.
    """

    def __init__(self, isa: str | None = None) -> None:
        self._library = library()
        best = self._library.zo_best_isa()
        self._isa = best if isa is None else ISAS[isa]
        if not self._library.zo_has_isa(self._isa):
            raise KernelError(
                f"native kernels: this build or machine has no {isa}; ask for another, or for none"
            )
        self.name = next(name for name, number in ISAS.items() if number == self._isa)

    def serves(self, *tensors: torch.Tensor) -> bool:
        """Whether these can be worked on: contiguous, and in host memory."""
        return all(t.device.type == "cpu" and t.is_contiguous() for t in tensors)

    def run(
        self,
        span: Span,
        wire: torch.Tensor,
        rest: torch.Tensor | None,
        direction: str,
        steps: Sequence[StepUpdate] = (),
        ahead: Sequence[StepUpdate] = (),
        points: Sequence[Point] = (),
        first: int = 0,
        count: int | None = None,
    ) -> None:
        """One pass over elements ``first`` to ``first + count``: update, then perturbed copies.

        Args:
            span: What the buffers hold.
            wire: ``[elements]`` in the forward's dtype, or the bytes of a packed span.
            rest: What stays home beside them; None where there are no ``steps``.
            direction: ``rademacher`` or ``gaussian``.
            steps: Taken by the masters.
            ahead: Taken in fp32 by what the forward sees, which the masters do not follow yet.
            points: Perturbed copies, of ``count`` elements each.
            first: A multiple of 128.
            count: A multiple of 128 (default: to the end).
        """
        count = span.elements - first if count is None else count
        packed = span.codec != "identity" and not steps
        assert packed or wire.numel() == span.elements
        assert rest is None or rest.numel() in (0, span.elements)
        assert all(point.out.numel() == count for point in points)
        made: list[Any] = []  # what the job points to
        table = span.table
        out_bytes = sum(point.out.nbytes for point in points)
        job = _Job(
            FORMATS[span.format],
            DIRECTIONS[direction],
            span.dither,
            torch.get_num_threads(),
            len(table),
            len(steps),
            len(ahead),
            len(points),
            first,
            count,
            out_bytes > MOST_CACHED,
            wire.data_ptr(),
            rest.data_ptr() if rest is not None else None,
            table.ctypes.data,
            _steps(steps, made),
            _steps(ahead, made),
            _points(points, made),
            _cells().ctypes.data,
            CODECS[span.layout.kind] if packed else 0,
            span.layout.group if packed else 0,
            wire.nbytes if packed else 0,
        )
        _check(self._library.zo_run(ctypes.byref(job), self._isa))

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
        self.run(span, wire, None, direction, (), ahead, [Point(out, draw)], first, count)

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
        self.run(span, wire, rest, direction, steps, ahead, points)

    def perturb_rows(
        self,
        span: Span,
        segment: Segment,
        wire: torch.Tensor,
        rows: torch.Tensor,
        direction: str,
        draw: Draw,
    ) -> torch.Tensor:
        """See :func:`zo_offload.ops.perturb_rows`."""
        height, width = segment.shape
        rows = rows.to(torch.int64).contiguous()
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < height:
            raise IndexError(f"{segment.name}: a row outside its {height}")
        out = torch.empty(len(rows), width, dtype=span.dtype)
        job = _Rows(
            FORMATS[span.format],
            DIRECTIONS[direction],
            torch.get_num_threads(),
            segment.parameter_index,
            width,
            len(rows),
            segment.offset,
            segment.scale,
            wire.data_ptr() + segment.start * wire.itemsize,
            rows.data_ptr(),
            out.data_ptr(),
            _draw(draw),
            _cells().ctypes.data,
        )
        _check(self._library.zo_run_rows(ctypes.byref(job), self._isa))
        return out

    def pack(self, layout: Layout, wire: torch.Tensor, packed: torch.Tensor) -> int:
        """See :func:`zo_offload.ops.pack`."""
        job = _packing(layout, packed, wire.numel(), wire.dtype)
        job.wire = wire.data_ptr()
        used = ctypes.c_uint64()
        _check(self._library.zo_encode(ctypes.byref(job), self._isa, ctypes.byref(used)))
        return used.value

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
        """See :func:`zo_offload.ops.unpack`."""
        job = _packing(layout, packed, elements, dtype)
        job.scales = scales.data_ptr() if scales is not None else None
        job.out, job.out_format = out.data_ptr(), FORWARDS[out.dtype]
        job.first, job.count = first, out.numel()
        _check(self._library.zo_decode(ctypes.byref(job), self._isa))

    def store_master(
        self, span: Span, master: torch.Tensor, wire: torch.Tensor, rest: torch.Tensor
    ) -> None:
        """See :func:`zo_offload.ops.store_master`."""
        assert REST_DTYPES[span.format] in (None, rest.dtype)
        self._encode(span.format, master, wire, rest if REST_DTYPES[span.format] else None)

    def encode(self, dtype: torch.dtype, values: torch.Tensor, wire: torch.Tensor) -> None:
        """See :func:`zo_offload.ops.encode`."""
        self._encode(WITHOUT_MASTER[dtype], values, wire, None)

    def _encode(
        self, kind: str, values: torch.Tensor, wire: torch.Tensor, rest: torch.Tensor | None
    ) -> None:
        assert values.dtype == torch.float32
        assert values.numel() == wire.numel()
        assert rest is None or rest.numel() == wire.numel()
        job = _Values(
            FORMATS[kind],
            torch.get_num_threads(),
            values.numel(),
            values.data_ptr(),
            wire.data_ptr(),
            rest.data_ptr() if rest is not None else None,
        )
        _check(self._library.zo_lay_out(ctypes.byref(job), self._isa))

    def copy(self, out: torch.Tensor, source: torch.Tensor) -> None:
        """Copy around the caches: what the machine's memory can do, for measurements.

        Args:
            out: As many bytes as ``source``.
            source: Contiguous, as ``out``.
        """
        assert out.nbytes == source.nbytes
        status = self._library.zo_copy(
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_void_p(source.data_ptr()),
            ctypes.c_uint64(source.nbytes),
            torch.get_num_threads(),
            self._isa,
        )
        _check(status)

    def digest(self, words: torch.Tensor, first: int = 0) -> int:
        """See :func:`zo_offload.ops.reference.digest`."""
        found = ctypes.c_uint64()
        status = self._library.zo_digest(
            ctypes.c_void_p(words.data_ptr()),
            ctypes.c_uint64(words.nbytes // 4),
            ctypes.c_uint64(first),
            torch.get_num_threads(),
            self._isa,
            ctypes.byref(found),
        )
        _check(status)
        return found.value

    def crc32c(self, data: torch.Tensor, initial: int = 0, num_threads: int | None = None) -> int:
        """See :func:`zo_offload.ops.crc32c`."""
        found = ctypes.c_uint32()
        status = self._library.zo_crc32c(
            ctypes.c_void_p(data.data_ptr()),
            ctypes.c_uint64(data.nbytes),
            ctypes.c_uint32(initial),
            torch.get_num_threads() if num_threads is None else num_threads,
            self._isa,
            ctypes.byref(found),
        )
        _check(status)
        return found.value


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        KernelError: It was not built, cannot be loaded, or belongs to another version.
    """
    if not LIBRARY.is_file():
        raise KernelError(
            f"native kernels: {LIBRARY.name} was not built"
            "; install zo_offload again where there is a C++ compiler"
        )
    try:
        found = ctypes.CDLL(str(LIBRARY))
        version = found.zo_version()
    except (OSError, AttributeError) as error:
        raise KernelError(
            f"native kernels: {LIBRARY} cannot be loaded: {error}"
            "; install zo_offload again on this machine"
        ) from error
    if version != VERSION:
        raise KernelError(
            f"native kernels: {LIBRARY} is of version {version}, expected {VERSION}; reinstall"
        )
    parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)  # torch's, by now
    found.zo_use_openmp.argtypes = [ctypes.c_void_p]
    found.zo_use_openmp(ctypes.cast(parallel, ctypes.c_void_p) if parallel else None)
    return found


def available() -> list[str]:
    """The instruction sets that were built and that this machine has.

    Raises:
        KernelError: The library was not built.
    """
    return [name for name, number in ISAS.items() if library().zo_has_isa(number)]


def _check(status: int) -> None:
    if status == BAD_BYTES:
        raise CodecError("packed weights: too few bytes, or damaged; encode the weights again")
    if status:
        raise KernelError(
            f"native kernels: {STATUS.get(status, status)}"
            "; set ZO_OFFLOAD_KERNELS=torch, and report it"
        )


def _packing(layout: Layout, packed: torch.Tensor, elements: int, dtype: torch.dtype) -> _Pack:
    return _Pack(
        codec=CODECS[layout.kind],
        group=layout.group,
        format=FORWARDS[dtype],
        num_threads=torch.get_num_threads(),
        elements=elements,
        packed_bytes=packed.nbytes,
        packed=packed.data_ptr(),
    )


def _draw(draw: Draw) -> _Draw:
    return _Draw(draw.seed, draw.coefficient, draw.step & 0xFFFFFFFF, draw.probe)


def _steps(steps: Sequence[StepUpdate], made: list[Any]) -> int | None:
    if not steps:
        return None
    array = (_Step * len(steps))()
    for each, step in zip(array, steps, strict=True):
        draws = (_Draw * len(step.draws))(*map(_draw, step.draws))
        each.seed, each.step = step.seed, step.step & 0xFFFFFFFF
        each.decay, each.num_draws = step.decay, len(step.draws)
        each.draws = ctypes.addressof(draws)
        made.append(draws)
    made.append(array)
    return ctypes.addressof(array)


def _points(points: Sequence[Point], made: list[Any]) -> int | None:
    if not points:
        return None
    array = (_Point * len(points))(*[_Point(p.out.data_ptr(), _draw(p.draw)) for p in points])
    made.append(array)
    return ctypes.addressof(array)


@lru_cache(maxsize=1)
def _cells() -> np.ndarray:
    return np.ascontiguousarray(reference.gaussian_cells(), np.float64)
