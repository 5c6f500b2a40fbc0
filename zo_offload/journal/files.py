"""The few things a journal asks of the file system: whole creation, a lock, whole writes.

The lock is ``flock`` and belongs to the open file: it goes when the last process holding the file
closes it or dies, also by ``kill -9``. Files are close-on-exec, and :class:`Journal` closes them in
forked children, so that no data worker outlives its run with the lock in hand.
"""

import errno
import fcntl
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zo_offload.errors import JournalError
from zo_offload.files import make_directory, sync


@contextmanager
def errors_of(path: Path, doing: str) -> Iterator[None]:
    """Turns what the system refuses into a JournalError that names the file and the act."""
    try:
        yield
    except OSError as error:
        raise JournalError(
            f"{path}: cannot {doing}: {error.strerror or error}"
            "; look at its disk and its permissions, then open the journal again"
        ) from error


def open_regular(path: Path, flags: int) -> io.FileIO:
    """Opens what must be a regular file; a pipe or device is refused without waiting on it."""
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    file = io.FileIO(fd, "rb" if flags & os.O_ACCMODE == os.O_RDONLY else "r+b")
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        file.close()
        raise JournalError(f"{path}: not a regular file; name a file for zeroth_order.journal.path")
    return file


def open_locked(path: Path, flags: int = 0) -> io.FileIO:
    """Opens for reading and writing, alone.

    Raises:
        JournalError: another run has it.
    """
    file = open_regular(path, os.O_RDWR | flags)
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if isinstance(error, BlockingIOError):
            raise JournalError(
                f"{path}: another run has this journal; end that run, or give this one its own path"
            ) from error
        raise
    return file


def create_locked(path: Path, content: bytes) -> io.FileIO:
    """Creates the file with its first content, all or nothing, and keeps it locked.

    Written aside, synced, renamed. The lock is taken on the file aside and moves with it, so of two
    runs that create at once one is refused, and neither overwrites the other.

    Raises:
        JournalError: the file exists, or another run is creating it.
    """
    make_directory(path.parent, above=0o700)
    aside = path.with_name(path.name + ".new")
    file = open_locked(aside, os.O_CREAT | os.O_NOFOLLOW)
    try:
        if os.path.lexists(path):  # asked under the lock: nobody else can rename now
            raise JournalError(f"{path}: exists already; open it, or give another path")
        os.fchmod(file.fileno(), 0o600)
        os.ftruncate(file.fileno(), 0)  # what a crash left aside; unlinking it would race
        write_whole(file, content, 0)
        os.fsync(file.fileno())
        os.rename(aside, path)
        sync(path.parent)
    except BaseException:
        file.close()
        raise
    return file


def write_whole(file: io.FileIO, content: bytes, offset: int) -> None:
    """One write call; less than everything written is an error."""
    written = os.pwrite(file.fileno(), content, offset)
    if written != len(content):
        raise OSError(errno.EIO, f"wrote {written} of {len(content)} bytes (disk full?)")
