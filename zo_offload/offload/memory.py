"""Host memory that an accelerator copies from: page-locked where the system allows it."""

import ctypes
import logging
from collections.abc import Iterable
from typing import Any

import torch

logger = logging.getLogger(__name__)
_refused: set[str] = set()


def host_buffer(num_bytes: int, pin_memory: bool) -> torch.Tensor:
    """Zeroed uint8 ``[num_bytes]``; pageable, with one warning, where page-locking is refused.

    Raises:
        RuntimeError: There is no such memory at all.

    Example:
        >>> host_buffer(3, pin_memory=False)
        tensor([0, 0, 0], dtype=torch.uint8)
    """
    if pin_memory:
        try:
            return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            _warn_once(str(error).splitlines()[0])
    return torch.zeros(num_bytes, dtype=torch.uint8)


def page_lock(buffers: Iterable[torch.Tensor]) -> None:
    """Page-lock memory that others have allocated, for a CUDA device.

    Where the system refuses it stays pageable, with one warning.
    """
    runtime: Any = torch.cuda.cudart()
    for buffer in buffers:
        if buffer.nbytes and (
            code := runtime.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)
        ):
            _warn_once(f"cudaHostRegister: {code}")
            return


def page_unlock(buffers: Iterable[torch.Tensor]) -> None:
    """Undo :func:`page_lock`; what was not locked stays as it is."""
    runtime: Any = torch.cuda.cudart()
    for buffer in buffers:
        if buffer.nbytes:
            runtime.cudaHostUnregister(buffer.data_ptr())


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
