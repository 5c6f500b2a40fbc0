"""Direct reads and writes: around the page cache, in pieces, several at a time, each one checked.

Offsets, lengths and addresses are multiples of a page. Every piece's byte count is looked at; a
transfer that ends short goes on, or is an error. DeepSpeed's own asynchronous I/O looks at no byte
count, so that a full disk or a short file goes unnoticed there.
"""

import errno
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import NoReturn

import torch

from zo_offload.errors import StoreError

PAGE = 4096
MOST_THREADS = 64
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Transfers:
    """How a disk is asked; see DeepSpeed's ``aio``.

    Attributes:
        block_size: Bytes of a piece, and of a stripe.
        num_threads: Pieces in flight.
    """

    block_size: int = 1 << 20
    num_threads: int = 8


def padded(num_bytes: int) -> int:
    """Up to the next multiple of a page.

    Example:
        >>> padded(1), padded(4096)
        (4096, 4096)
    """
    return -(-num_bytes // PAGE) * PAGE


def aligned(num_bytes: int, pin_memory: bool = False) -> torch.Tensor:
    """A zeroed uint8 buffer of so many bytes, padded, that begins on a page."""
    room = torch.zeros(padded(num_bytes) + PAGE, dtype=torch.uint8, pin_memory=pin_memory)
    first = -room.data_ptr() % PAGE
    return room[first : first + padded(num_bytes)]


class DirectFile:
    """One run of bytes, striped over files in one or several directories.

    Stripe k of ``block_size`` bytes is stripe ``k // n`` of file ``k % n``.

    Args:
        paths: The files, one a directory.
        transfers: Sizes and threads.
        writable: Make them where they are missing, and write to them.

    Raises:
        StoreError: One cannot be opened.
    """

    def __init__(self, paths: Sequence[Path], transfers: Transfers, writable: bool = True) -> None:
        self.paths = tuple(paths)
        self._stripe = padded(transfers.block_size)
        self._fds: list[int] = []
        self._cached: list[bool] = []
        try:
            for path in paths:
                fd, cached = _open(path, writable)
                self._fds.append(fd)
                self._cached.append(cached)
        except BaseException:
            self.close()
            raise
        threads = min(transfers.num_threads, MOST_THREADS)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="zo-disk")
        self._counting = Lock()
        self.bytes_read = self.bytes_written = 0

    def allocate(self, num_bytes: int) -> None:
        """Make room for so many bytes in all.

        Raises:
            StoreError: The disk has less, or refuses.
        """
        share = -(-num_bytes // (self._stripe * len(self._fds))) * self._stripe
        for path, fd in zip(self.paths, self._fds, strict=True):
            with _errors_of(path, "make room in"):
                disk, held = os.fstatvfs(fd), os.fstat(fd)
                free = disk.f_bavail * disk.f_frsize + held.st_blocks * 512
                if free < share:
                    raise StoreError(
                        f"{path}: {share:,} bytes are needed for weights, and the disk has "
                        f"{free:,}; make room, or name another disk in offload_param.nvme_path"
                    )
                if held.st_size < share or held.st_blocks * 512 < share:
                    os.posix_fallocate(fd, 0, share)

    def size(self) -> int:
        """Bytes that are there."""
        return min(os.fstat(fd).st_size for fd in self._fds) * len(self._fds)

    def read(self, offset: int, buffer: torch.Tensor) -> "Future[None]":
        """Fill a buffer; both begin on a page and are whole pages."""
        return self._start(offset, buffer, self._read_piece)

    def write(self, offset: int, buffer: torch.Tensor) -> "Future[None]":
        """Write a buffer, which must stay as it is until the future is done."""
        return self._start(offset, buffer, self._write_piece)

    def sync(self) -> None:
        """Make what was written survive a power cut.

        Raises:
            StoreError: It may not.
        """
        for path, fd, cached in zip(self.paths, self._fds, self._cached, strict=True):
            with _errors_of(path, "sync"):
                os.fdatasync(fd)
                if cached:
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """End the threads and close the files."""
        pool = self.__dict__.get("_pool")
        if pool is not None:
            pool.shutdown()
        while self._fds:
            os.close(self._fds.pop())

    def _start(
        self, offset: int, buffer: torch.Tensor, move: Callable[[int, int, memoryview], None]
    ) -> "Future[None]":
        assert offset % PAGE == buffer.nbytes % PAGE == buffer.data_ptr() % PAGE == 0
        view, pieces, first = buffer.numpy().data, [], 0
        while first < buffer.nbytes:
            stripe, within = divmod(offset + first, self._stripe)
            last = min(first + self._stripe - within, buffer.nbytes)
            row, file = divmod(stripe, len(self._fds))
            pieces.append((file, row * self._stripe + within, view[first:last]))
            first = last
        return _all_of([self._pool.submit(move, *piece) for piece in pieces])

    def _read_piece(self, file: int, offset: int, view: memoryview) -> None:
        fd, path, done = self._fds[file], self.paths[file], 0
        with _errors_of(path, "read"):
            while done < len(view):
                count = os.preadv(fd, [view[done:]], offset + done)
                if not count:
                    raise StoreError(
                        f"{path}: ends at byte {offset + done:,}, where {len(view) - done:,} more "
                        "are expected; it was cut short: restore it, or remove the directory and "
                        "start again from the base or a snapshot"
                    )
                done += count
        if self._cached[file]:
            os.posix_fadvise(fd, offset, len(view), os.POSIX_FADV_DONTNEED)
        with self._counting:
            self.bytes_read += len(view)

    def _write_piece(self, file: int, offset: int, view: memoryview) -> None:
        fd, path, done = self._fds[file], self.paths[file], 0
        with _errors_of(path, "write"):
            while done < len(view):
                count = os.pwritev(fd, [view[done:]], offset + done)
                if not count:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                done += count
        with self._counting:
            self.bytes_written += len(view)


class _errors_of:  # noqa: N801  (reads as a function)
    """Turns the system's errors into one line with the file's name and the mend."""

    def __init__(self, path: Path, doing: str) -> None:
        self._path, self._doing = path, doing

    def __enter__(self) -> None:
        """Nothing is to be done."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            _refuse(self._path, self._doing, error)


def _refuse(path: Path, doing: str, error: OSError) -> NoReturn:
    mends = {
        errno.ENOSPC: "make room on the disk; nothing that was saved is lost",
        errno.EDQUOT: "raise the quota; nothing that was saved is lost",
        errno.EFBIG: "raise the limit on file sizes (ulimit -f); nothing that was saved is lost",
        errno.EIO: "the disk fails: check it, and continue on another",
        errno.ENOENT: "is offload_param.nvme_path right?",
        errno.EACCES: "check who owns it",
    }
    mend = mends.get(error.errno or 0)
    raise StoreError(
        f"{path}: cannot {doing} it: {error.strerror or error}" + (f"; {mend}" if mend else "")
    ) from error


def _open(path: Path, writable: bool) -> tuple[int, bool]:
    """A descriptor, and whether it goes through the page cache all the same."""
    flags = os.O_CLOEXEC | (os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY)
    with _errors_of(path, "open"):
        try:
            return os.open(path, flags | os.O_DIRECT, 0o600), False
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        logger.warning(
            "%s: this file system has no direct I/O; transfers go through the page cache, which "
            "takes memory and time: a directory on a local disk (ext4, xfs) is faster",
            path,
        )
        return os.open(path, flags, 0o600), True


def _all_of(parts: "Sequence[Future[None]]") -> "Future[None]":
    """Done when all are; fails as the first that failed, once nothing is in flight any more."""
    whole: Future[None] = Future()
    whole.set_running_or_notify_cancel()
    lock, left = Lock(), len(parts)

    def one_less(_: "Future[None]") -> None:
        nonlocal left
        with lock:
            left -= 1
            over = left == 0
        if over:
            error = next((e for part in parts if (e := part.exception()) is not None), None)
            whole.set_result(None) if error is None else whole.set_exception(error)

    if not parts:
        whole.set_result(None)
    for part in parts:
        part.add_done_callback(one_less)
    return whole
