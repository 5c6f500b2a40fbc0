"""Files read and written around the page cache, by a pool of threads, one future a request.

A request is cut into transfers of ``aio.block_size``. Each is one ``preadv`` or ``pwritev``, which
release the interpreter's lock; its byte count is checked, and its CRC-32C computed while the bytes
are in the cache. With several files, stripes of equal size take turns (RAID-0).

A request that fails settles when none of its transfers is under way any more: its memory is the
caller's again.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from zo_offload.errors import StoreError
from zo_offload.offload.aio import PAGE, Aio
from zo_offload.offload.disk import aligned, errors_of, open_direct, padded, refusal
from zo_offload.ops import crc32c
from zo_offload.ops.crc import combined

T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """Memory, and where in the file it belongs.

    Attributes:
        offset: A multiple of 4,096.
        data: uint8 ``[n]``, contiguous, in host memory. Copied on the way unless its address is a
            multiple of 4,096. In the file zeros follow, to a multiple of 4,096.
    """

    offset: int
    data: torch.Tensor


class DirectFile:
    """One stretch of bytes, in one file or in stripes over several.

    Args:
        paths: The files; they exist.
        aio: Size and number of transfers.
        writable: Open them for writing too.
        stripe_bytes: Of the stripes (default: ``aio.block_size``); a multiple of 4,096.

    Attributes:
        bytes_read: Whole pages, since the file was opened.
        bytes_written: Likewise.

    Raises:
        StoreError: One of them cannot be opened.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        aio: Aio | None = None,
        writable: bool = False,
        stripe_bytes: int | None = None,
    ) -> None:
        self._aio = aio or Aio()
        self._paths = list(paths)
        self._stripe_bytes = stripe_bytes or self._aio.block_size
        self._lock = threading.Lock()
        self.bytes_read = self.bytes_written = 0
        self._files: list[tuple[int, bool]] = []  # descriptor, whether it is direct
        try:
            for path in self._paths:
                self._files.append(open_direct(path, writable))
        except BaseException:
            self._close_files()
            raise
        self._pool = ThreadPoolExecutor(self._aio.num_threads, "zo-offload-disk")

    def read(
        self,
        pieces: Sequence[Piece],
        finish: Callable[[list[int]], T] = list,
        release: Callable[[], None] | None = None,
    ) -> "Future[T]":
        """Fill memory from the file.

        Args:
            pieces: What goes where.
            finish: Given the CRC-32C of each piece, makes the future's result, in the pool.
            release: Called at the end in any case, before the future settles.

        Returns:
            A future that cannot be cancelled; its StoreError names path, offset and sizes.
        """
        return self._submit(pieces, False, finish, release)

    def write(
        self,
        pieces: Sequence[Piece],
        finish: Callable[[list[int]], T] = list,
        release: Callable[[], None] | None = None,
    ) -> "Future[T]":
        """Write memory to the file; durable after :meth:`sync` only. As :meth:`read`."""
        return self._submit(pieces, True, finish, release)

    def read_now(self, piece: Piece) -> int:
        """Read in the calling thread; gives the piece's CRC-32C."""
        return _joined([self._transfer(each, False) for each in self._cut(piece)])

    def write_now(self, piece: Piece) -> int:
        """Write in the calling thread; gives the piece's CRC-32C."""
        return _joined([self._transfer(each, True) for each in self._cut(piece)])

    def sync(self) -> None:
        """Make everything that was written before the call survive a power cut."""
        jobs = [self._pool.submit(self._sync, i) for i in range(len(self._files))]
        for job in jobs:
            job.exception()  # all are done before one is reported
        for job in jobs:
            job.result()

    @property
    def is_direct(self) -> bool:
        """Whether the page cache is bypassed, in all of its files."""
        return all(is_direct for _, is_direct in self._files)

    def where(self, offset: int) -> tuple[Path, int]:
        """The file that holds an offset, and the offset there."""
        place, at = self._located(offset)
        return self._paths[place], at

    def close(self) -> None:
        """Wait for what is under way, and close the files."""
        self._pool.shutdown()
        self._close_files()

    def _submit(
        self,
        pieces: Sequence[Piece],
        is_write: bool,
        finish: Callable[[list[int]], T],
        release: Callable[[], None] | None,
    ) -> "Future[T]":
        chunks = [self._cut(piece) for piece in pieces]
        request = _Request(chunks, lambda chunk: self._transfer(chunk, is_write), finish, release)
        for place in range(max(1, request.num_chunks)):
            self._pool.submit(request.run, place)
        return request.future

    def _cut(self, piece: Piece) -> list[Piece]:
        assert piece.offset % PAGE == 0
        assert piece.data.dtype == torch.uint8
        assert piece.data.is_contiguous()
        chunks, start = [], 0
        while start < piece.data.numel():
            offset = piece.offset + start
            left = self._stripe_bytes - offset % self._stripe_bytes
            data = piece.data[start : start + min(left, self._aio.block_size)]
            chunks.append(Piece(offset, data))
            start += data.numel()
        return chunks

    def _located(self, offset: int) -> tuple[int, int]:
        number, within = divmod(offset, self._stripe_bytes)
        turn, place = divmod(number, len(self._paths))
        return place, turn * self._stripe_bytes + within

    def _transfer(self, chunk: Piece, is_write: bool) -> tuple[int, int]:
        """Move one chunk; gives its CRC and length."""
        data, num_bytes = chunk.data, chunk.data.numel()
        in_place = num_bytes // PAGE * PAGE if data.data_ptr() % PAGE == 0 else 0
        rest = data[in_place:]  # goes through memory of our own
        beside = aligned(padded(rest.numel())) if rest.numel() else rest
        if is_write:
            beside[: rest.numel()] = rest
        views = [part.numpy().data for part in (data[:in_place], beside) if part.numel()]
        self._move(views, chunk.offset, is_write)
        if not is_write and rest.numel():
            rest.copy_(beside[: rest.numel()])
        return crc32c(data, num_threads=1), num_bytes

    def _move(self, views: list[memoryview], offset: int, is_write: bool) -> None:
        place, at = self._located(offset)
        path, (fd, is_direct) = self._paths[place], self._files[place]
        call: Any = os.pwritev if is_write else os.preadv
        wanted = sum(len(view) for view in views)
        done = 0
        while done < wanted:
            try:
                moved = call(fd, _after(views, done), at + done)
            except OSError as error:
                doing = f"{_verb(is_write)} {wanted:,} bytes at offset {at:,} ({done:,} done)"
                raise StoreError(refusal(path, doing, error)) from error
            if moved < PAGE:
                raise StoreError(_short(path, at, wanted, done + moved, is_write))
            done += moved // PAGE * PAGE  # the next transfer starts at a page again
        if not is_direct and not is_write:
            os.posix_fadvise(fd, at, wanted, os.POSIX_FADV_DONTNEED)
        with self._lock:
            self.bytes_written += wanted * is_write
            self.bytes_read += wanted * (not is_write)

    def _sync(self, place: int) -> None:
        fd, is_direct = self._files[place]
        with errors_of(self._paths[place], "sync it"):
            os.fdatasync(fd)
        if not is_direct:  # what was written could not leave the cache before
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def _close_files(self) -> None:
        for fd, _ in self._files:
            os.close(fd)
        self._files.clear()


class _Request(Generic[T]):
    """Chunks that any thread may run; the last one settles the future."""

    def __init__(
        self,
        pieces: list[list[Piece]],
        transfer: Callable[[Piece], tuple[int, int]],
        finish: Callable[[list[int]], T],
        release: Callable[[], None] | None,
    ) -> None:
        self._chunks = [chunk for piece in pieces for chunk in piece]
        self._counts = [len(piece) for piece in pieces]
        self._found = [(0, 0)] * len(self._chunks)
        self._transfer, self._finish, self._release = transfer, finish, release
        self._lock = threading.Lock()
        self._left = max(1, len(self._chunks))
        self._error: BaseException | None = None
        self.future: Future[T] = Future()
        self.future.set_running_or_notify_cancel()

    @property
    def num_chunks(self) -> int:
        return len(self._chunks)

    def run(self, place: int) -> None:
        """Transfer one chunk, unless another failed already."""
        try:
            if self._chunks and self._error is None:
                self._found[place] = self._transfer(self._chunks[place])
        except BaseException as error:
            self._error = error
        with self._lock:
            self._left -= 1
            is_last = not self._left
        if is_last:
            self._settle()

    def _settle(self) -> None:
        result: Any = None
        try:
            if self._error is None:
                result = self._finish(self._crcs())
        except BaseException as error:
            self._error = error
        if self._release:
            self._release()
        if self._error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(self._error)

    def _crcs(self) -> list[int]:
        crcs, start = [], 0
        for count in self._counts:
            crcs.append(_joined(self._found[start : start + count]))
            start += count
        return crcs


def _joined(parts: Sequence[tuple[int, int]]) -> int:
    crc = 0
    for part, num_bytes in parts:
        crc = combined(crc, part, num_bytes)
    return crc


def _after(views: list[memoryview], done: int) -> list[memoryview]:
    """What is left of the views when ``done`` bytes have moved."""
    left = []
    for view in views:
        skipped = min(done, len(view))
        done -= skipped
        if skipped < len(view):
            left.append(view[skipped:])
    return left


def _verb(is_write: bool) -> str:
    return "write" if is_write else "read"


def _short(path: Path, offset: int, wanted: int, got: int, is_write: bool) -> str:
    if is_write:
        return (
            f"{path}: wrote {got:,} of {wanted:,} bytes at offset {offset:,}; is the disk full, "
            "or a limit on a file's size in the way?"
        )
    return (
        f"{path}: read {got:,} of {wanted:,} bytes at offset {offset:,}: the file has "
        f"{path.stat().st_size:,}; it was cut short: restore it, or remove its folder and start "
        "again"
    )
