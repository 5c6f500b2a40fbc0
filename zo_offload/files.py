"""Files that are whole or not there, also after a power cut; directories that one run holds."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"
ASIDE = ".new"


def write_file(path: Path, content: bytes) -> None:
    """Write aside, sync, rename."""
    aside = path.with_name(path.name + ASIDE)
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync(path.parent)


def sync_tree(directory: Path) -> None:
    """Make every file below a directory survive a power cut."""
    for path in [*directory.rglob("*"), directory]:
        sync(path)


def sync(path: Path) -> None:
    """Make a file, or the names in a directory, survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a directory alone; the lock goes with the process, also by ``kill -9``.

    Raises:
        BlockingIOError: Another process holds it.
    """
    with (directory / LOCK).open("ab") as file:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
