"""Files that are whole or not there, also after a power cut; directories that one run holds."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = ".lock"
ASIDE = ".new"
BEFORE = ".old"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the file's name to errors of an open file, which come without one."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to write, which takes its place when it is whole; with an error it is removed."""
    aside = path.with_name(path.name + ASIDE)
    try:
        yield aside
        sync(aside)
        os.replace(aside, path)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise
    sync(path.parent)


def write_file(path: Path, content: bytes) -> None:
    """Write aside, sync, rename."""
    with naming(path), new_file(path) as aside, aside.open("wb") as file:
        file.write(content)


def make_directory(path: Path, mode: int = 0o700, above: int = 0o777) -> None:
    """Make it where it is missing, and what is missing above it; their names outlast a power cut.

    Args:
        path: The directory.
        mode: Who may use it, less the user's ``umask``.
        above: Who may use those above it that are made.
    """
    if path.is_dir():
        return
    if not path.parent.exists():
        make_directory(path.parent, above, above)
    path.mkdir(mode=mode, exist_ok=True)
    sync(path.parent)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill, which takes its place when it is whole; what stood there goes.

    At every instant the old or the new one is there, whole, at ``path`` or beside it:
    :func:`whole_directory` finds it.
    """
    aside, before = (path.with_name(path.name + suffix) for suffix in (ASIDE, BEFORE))
    make_directory(path.parent, 0o777)
    if path.exists():
        shutil.rmtree(before, ignore_errors=True)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(mode=0o700)
    try:
        yield aside
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync_tree(aside)
    if path.exists():
        os.rename(path, before)
    os.rename(aside, path)
    sync(path.parent)
    shutil.rmtree(before, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Remove a directory so that a crash half way leaves none that looks whole."""
    dead = path.with_name(path.name + BEFORE + ASIDE)
    shutil.rmtree(dead, ignore_errors=True)
    os.rename(path, dead)
    shutil.rmtree(dead, ignore_errors=True)


def whole_directory(path: Path) -> Path | None:
    """Where a directory made by :func:`new_directory` is; None where there is none."""
    before = path.with_name(path.name + BEFORE)
    return next((place for place in (path, before) if place.is_dir()), None)


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
def locked(directory: Path, name: str = LOCK) -> Iterator[None]:
    """Hold a directory alone; the lock goes with the process, also by ``kill -9``.

    Raises:
        BlockingIOError: Another process holds it.
    """
    with (directory / name).open("ab") as file:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
