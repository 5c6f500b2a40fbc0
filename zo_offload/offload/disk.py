"""What a file system is asked for: files around its cache, and room before anything is written.

Every refusal becomes a :class:`StoreError` of one line that ends in its mend.
"""

import errno
import fcntl
import logging
import mmap
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from zo_offload.errors import StoreError
from zo_offload.offload.aio import PAGE
from zo_offload.offload.memory import host_buffer

HUGE_PAGE = 2 << 20

logger = logging.getLogger(__name__)

MENDS = {
    errno.ENOSPC: "free some space there, or name a larger disk in offload_param.nvme_path",
    errno.EDQUOT: "raise the quota, or name another disk in offload_param.nvme_path",
    errno.EFBIG: "raise the limit on a file's size (ulimit -f)",
    errno.EIO: "the disk fails: copy what it still gives, and replace it",
    errno.EROFS: "mount it for writing, or name another disk in offload_param.nvme_path",
    errno.EACCES: "let this user read and write there",
    errno.ENOENT: "was it moved, or its disk not mounted?",
}
NO_ALLOCATION = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


@contextmanager
def errors_of(path: Path, doing: str) -> Iterator[None]:
    """Turns what the system refuses into a StoreError that names the file, the act and the mend."""
    try:
        yield
    except OSError as error:
        raise StoreError(refusal(path, doing, error)) from error


def refusal(path: Path, doing: str, error: OSError) -> str:
    """The line for an error of the system.

    Example:
        >>> refusal(Path("/a"), "write", OSError(errno.EIO, "Input/output error"))
        '/a: cannot write: Input/output error; the disk fails: copy what it still gives, and ...'
    """
    mend = MENDS.get(error.errno or 0)
    return f"{path}: cannot {doing}: {error.strerror or error}" + (f"; {mend}" if mend else "")


def aligned(num_bytes: int, pin_memory: bool = False) -> torch.Tensor:
    """Zeroed memory that direct I/O can use in place.

    Args:
        num_bytes: Any number.
        pin_memory: Page-locked, for an accelerator's copies.

    Returns:
        uint8 ``[num_bytes]``, at an address that is a multiple of 4,096. From 2 MiB on in huge
        pages, where the system has them: a disk is told of every page of a transfer.

    Raises:
        StoreError: There is no memory for it.

    Example:
        >>> aligned(10_000).data_ptr() % 4096
        0
    """
    alignment = HUGE_PAGE if num_bytes >= HUGE_PAGE and not pin_memory else PAGE
    try:
        if alignment == HUGE_PAGE:
            room = _huge(num_bytes + alignment)
        else:
            room = host_buffer(num_bytes + alignment, pin_memory)
    except (RuntimeError, OSError) as error:
        raise StoreError(
            f"host memory: no {num_bytes:,} bytes for a buffer: {error}"
            "; free some on this machine, or raise this process's limits (ulimit -a)"
        ) from error
    start = -room.data_ptr() % alignment
    return room[start : start + num_bytes]


def padded(num_bytes: int) -> int:
    """Up to a whole number of pages."""
    return -(-num_bytes // PAGE) * PAGE


def allocate(paths: Sequence[Path], num_bytes: int) -> None:
    """Create files of ``num_bytes`` each, with their room on the disk; all of them or none.

    Raises:
        StoreError: One exists, or there is not enough space; says how much is needed and free.
    """
    _check_space([path.parent for path in paths], num_bytes)
    made: list[Path] = []
    try:
        for path in paths:
            with errors_of(path, f"create a file of {num_bytes:,} bytes"):
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                made.append(path)
                try:
                    _reserve(fd, num_bytes)
                    os.fsync(fd)
                finally:
                    os.close(fd)
    except StoreError:
        for path in made:
            path.unlink()
        raise


def open_direct(path: Path, writable: bool) -> tuple[int, bool]:
    """Open a file around the page cache; where its file system cannot, through it, with a warning.

    Returns:
        The file's descriptor, and whether the cache is bypassed.

    Raises:
        StoreError: It is missing, not permitted, or not a regular file.
    """
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK
    with errors_of(path, "open it"):
        fd = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise StoreError(f"{path}: not a regular file; remove it, or name another directory")
    if _turned_direct(fd):
        return fd, True
    logger.warning(
        "%s: this file system has no direct I/O; its page cache takes host memory beside the "
        "buffers, and copies everything once more",
        path,
    )
    return fd, False


def _huge(num_bytes: int) -> torch.Tensor:
    memory = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them serves small ones
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _turned_direct(fd: int) -> bool:
    """Ask for direct I/O, and try: some file systems only refuse the first transfer."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        os.preadv(fd, [aligned(PAGE).numpy().data], 0)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        with suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_SETFL, flags)
        return False
    return True


def _check_space(folders: Sequence[Path], num_bytes: int) -> None:
    needed: dict[int, tuple[Path, int]] = {}  # by file system
    for folder in folders:
        with errors_of(folder, "look at it"):
            device = folder.stat().st_dev
        first, already = needed.get(device, (folder, 0))
        needed[device] = first, already + num_bytes
    for folder, wanted in needed.values():
        with errors_of(folder, "ask for its free space"):
            found = os.statvfs(folder)
        free = found.f_bavail * found.f_frsize
        if wanted > free:
            raise StoreError(
                f"{folder}: {wanted:,} bytes are needed, {free:,} are free; {MENDS[errno.ENOSPC]}"
            )


def _reserve(fd: int, num_bytes: int) -> None:
    try:
        os.posix_fallocate(fd, 0, num_bytes)
    except OSError as error:
        if error.errno not in NO_ALLOCATION:
            raise
        os.ftruncate(fd, num_bytes)
