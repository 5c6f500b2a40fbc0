"""Host memory that an accelerator copies from: page-locked where the system allows it.

What stays is mapped and then registered with CUDA. torch's own page-locked memory takes up to twice
as much, since it comes in powers of two, and is never given back to the system.
"""

import ctypes
import logging
import mmap
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch

logger = logging.getLogger(__name__)
_refused: set[str] = set()


class _Locked(mmap.mmap):
    """Memory of this process that is unlocked before the system has it back."""

    address = process = 0  # where it is locked, and by whom: a forked child has it pageable

    def __del__(self) -> None:
        if self.process == os.getpid() and not sys.is_finalizing():
            runtime: Any = torch.cuda.cudart()
            runtime.cudaHostUnregister(self.address)


def host_buffer(num_bytes: int, pin_memory: bool) -> torch.Tensor:
    """Zeroed uint8 ``[num_bytes]``; pageable, with one warning, where page-locking is refused.

    It begins on a page where it is to be page-locked. No copy may be on its way when it is let go.

    Raises:
        RuntimeError: There is no such memory at all.

    Example:
        >>> host_buffer(3, pin_memory=False)
        tensor([0, 0, 0], dtype=torch.uint8)
    """
    if not pin_memory or not num_bytes:
        return torch.zeros(num_bytes, dtype=torch.uint8)
    try:
        room = _Locked(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # torch says what is missing
        return torch.zeros(num_bytes, dtype=torch.uint8)
    with suppress(OSError):  # a kernel without huge pages serves small ones
        room.madvise(mmap.MADV_HUGEPAGE)
    buffer = torch.frombuffer(room, dtype=torch.uint8)
    if _lock(buffer):
        room.address, room.process = buffer.data_ptr(), os.getpid()
    return buffer


def passing_buffer(num_bytes: int) -> torch.Tensor:
    """uint8 ``[num_bytes]``, page-locked, that may be let go while a copy reads it.

    Nobody else has it before that copy is over, which torch watches. What it holds is arbitrary;
    where page-locking is refused it is pageable, with one warning.
    """
    try:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        _warn_once(str(error).splitlines()[0])
        return torch.empty(num_bytes, dtype=torch.uint8)


def page_lock(buffers: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Page-lock memory that others have allocated, for a CUDA device.

    Where the system refuses it stays pageable, with one warning.

    Returns:
        What is page-locked now, for :func:`page_unlock`, before it is unmapped: CUDA would go on to
        copy from the pages that were there.
    """
    locked = []
    for buffer in buffers:
        if not buffer.nbytes:
            continue
        if not _lock(buffer):
            break
        locked.append(buffer)
    return locked


def page_unlock(buffers: Iterable[torch.Tensor]) -> None:
    """Undo :func:`page_lock`; no copy may be on its way."""
    runtime: Any = torch.cuda.cudart()
    for buffer in buffers:
        runtime.cudaHostUnregister(buffer.data_ptr())


def _lock(buffer: torch.Tensor) -> bool:
    """Whether CUDA has page-locked it."""
    runtime: Any = torch.cuda.cudart()
    # What it returns is an enumeration's, and true whatever it says.
    code = int(runtime.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))
    if code:
        _warn_once(f"cudaHostRegister: {code}")
        with suppress(RuntimeError):  # the next launch is blamed for it
            torch.ones(1, device="cuda").neg_()
    return not code


def give_back_freed() -> None:
    """Give the system what the allocator keeps of memory that was freed: a model's, say.

    glibc keeps up to hundreds of megabytes a process.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _warn_once(reason: str) -> None:
    if reason in _refused:
        return
    _refused.add(reason)
    logger.warning(
        "host memory cannot be page-locked (%s); pageable memory takes its place, and copies to "
        "the device are slower: raise the limit (ulimit -l unlimited), or write "
        '"pin_memory": false',
        reason,
    )
