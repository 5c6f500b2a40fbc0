"""What the machine does in a second, in the words of ``zo-offload plan``: 10^9 bytes.

Each is the best of a few tries on memory that no cache holds: a ceiling, which a plan adds to.
"""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zo_offload.offload.aio import Aio
from zo_offload.offload.direct import DirectFile, Piece
from zo_offload.offload.disk import aligned, allocate
from zo_offload.ops import Draw, Segment, Span, StepUpdate, kernels, update
from zo_offload.ops.native import Native

TRIES, TRY_SECONDS = 4, 1.0  # at most, each
COPIED_BYTES = 128 << 20
FEW, MANY = 1 << 20, 32 << 20  # weights: of a first try, and of those that count
QUICK_SECONDS = 0.02  # of the first try, where many are worth it
MASTER_BYTES = 8  # a weight in bfloat16: master read and written
FILE_BYTES = 256 << 20
PART_BYTES = 32 << 20
SIDE = 4096  # of a square product


@dataclass(frozen=True)
class Disk:
    """What a directory, or several in stripes, gave.

    Attributes:
        direct: Whether around the page cache.
        read_gbps: 10^9 bytes a second.
        write_gbps: Likewise, made durable.
        both_gbps: Likewise, of as many bytes read as written: ``--nvme-gbps`` of a plan.
    """

    direct: bool
    read_gbps: float
    write_gbps: float
    both_gbps: float


def copying() -> float:
    """10^9 bytes of host memory, read and written, a second."""
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8)
    out = torch.zeros_like(source)
    serving = kernels.serving_for(source, out)
    if isinstance(serving, Native):
        return 2 * COPIED_BYTES / least(lambda: serving.copy(out, source)) / 1e9
    return 2 * COPIED_BYTES / least(lambda: out.copy_(source)) / 1e9


def updating() -> float:
    """10^9 bytes of masters, read and written, a second: ``--host-gbps`` of a plan.

    Fewer weights where the first try says that many would take long, as without native kernels.
    """
    count, seconds = FEW, least(_update(FEW))
    if seconds < QUICK_SECONDS:
        count, seconds = MANY, least(_update(MANY))
    return MASTER_BYTES * count / seconds / 1e9


def over_the_bus() -> float:  # untested: needs CUDA
    """10^9 bytes a second to the device, from page-locked memory: ``--pcie-gbps`` of a plan."""
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
    out = torch.zeros_like(source, device="cuda")
    return COPIED_BYTES / least(lambda: _done(out.copy_(source, non_blocking=True))) / 1e9


def multiplying() -> float:  # untested: needs CUDA
    """10^12 FLOPs a second of the device, in bfloat16: ``--tflops`` of a plan."""
    a, b = (torch.ones(SIDE, SIDE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * SIDE**3 / least(lambda: _done(a @ b)) / 1e12


def disk(folders: Sequence[Path], seconds: float) -> Disk:
    """Write files of a run's kind there and read them, for so long at most in either direction.

    They have no names any more when the first byte is written: nothing is left, whatever happens.

    Args:
        folders: Of several the bytes are striped over all.
        seconds: For writing, and for reading.

    Raises:
        StoreError: A folder is missing, full, or not this user's.
    """
    paths = [folder / f".zo-offload-doctor-{os.getpid()}" for folder in folders]
    allocate(paths, -(-FILE_BYTES // len(paths) // PART_BYTES) * PART_BYTES)
    with ExitStack() as stack:
        for path in paths:
            stack.callback(path.unlink, missing_ok=True)
        file = DirectFile(paths, Aio(), writable=True)
        stack.callback(file.close)
        for path in paths:
            path.unlink()
        data = aligned(PART_BYTES)
        data.random_(0, 256, generator=torch.Generator())  # a disk may pack zeros
        count, writing = _parts(file.write, data, FILE_BYTES // PART_BYTES, seconds, file.sync)
        _, reading = _parts(file.read, data, count, seconds)
        read = file.bytes_read / 1e9 / reading  # may have ended sooner than the writing
        write = file.bytes_written / 1e9 / writing
        return Disk(file.is_direct, read, write, 2 / (1 / read + 1 / write))


def least(work: Callable[[], object]) -> float:
    """Seconds of the quickest of a few tries."""
    found = []
    while len(found) < TRIES and sum(found) < TRY_SECONDS:
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)


def _update(count: int) -> Callable[[], None]:
    """An update along one direction, as plain descent takes it."""
    span = Span(torch.bfloat16, (Segment("w", 0, (count // 1024, 1024), 0),), 0, 0)
    wire = torch.zeros(span.elements, dtype=torch.bfloat16)
    rest = span.rest(torch.zeros(span.rest_bytes, dtype=torch.uint8))
    moved = StepUpdate(1.0, (Draw(0, 0, 0, 1e-7),))
    return lambda: update(span, wire, rest, "rademacher", [moved])


def _parts(
    act: Callable[..., Any],
    data: torch.Tensor,
    most: int,
    seconds: float,
    settle: Callable[[], None] = lambda: None,
) -> tuple[int, float]:
    """How many parts went one way in time, at least one, and the seconds they took."""
    began, count = time.perf_counter(), 0
    while count == 0 or (count < most and time.perf_counter() - began < seconds):
        act([Piece(count * PART_BYTES, data)]).result()
        count += 1
    settle()
    return count, time.perf_counter() - began


def _done(_: torch.Tensor) -> None:  # untested: needs CUDA
    torch.cuda.synchronize()
