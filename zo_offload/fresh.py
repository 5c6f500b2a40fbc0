"""Directories that a command makes: where something stands none is made, and none half way."""

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import permutations
from pathlib import Path

from zo_offload.errors import ConfigError
from zo_offload.files import locked, make_directory, sync, sync_tree

UNFINISHED = ".converting"  # of the directory beside, and of the file that is locked in it


def refuse_what_is_there(folders: Sequence[Path]) -> None:
    """Whether each may be made; an empty directory may stand there, or a link to one.

    Raises:
        ConfigError: One holds something, is no name for a directory, is a disk's own, or lies in
            another one of them.
    """
    for folder in folders:
        place = folder.resolve()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(
                f"{folder}: there is something already; choose another directory, or remove it"
            )
        if os.path.ismount(place):
            raise ConfigError(
                f"{folder}: a disk's own directory, whose place cannot be taken; name one in it, "
                f"{folder / 'base'} say"
            )
        if place == Path.cwd():
            raise ConfigError(f"{folder}: the working directory; name one to be made")
    _refuse_overlap(folders)


@contextmanager
def fresh_directory(path: Path) -> Iterator[Path]:
    """A directory to fill, which takes its place when it is whole; with an error it is removed.

    It is filled beside its place, on the disk that a link leads to. What a process that was killed
    left there is removed.

    Raises:
        ConfigError: Another process fills it, or something of another kind stands beside.
    """
    path = path.resolve()
    aside = path.with_name(path.name + UNFINISHED)
    make_directory(aside)
    mark = aside / UNFINISHED
    if any(aside.iterdir()) and not mark.exists():
        raise ConfigError(
            f"{aside}: would be filled first, but holds something else; move it away, or choose "
            "another directory"
        )
    try:
        with locked(aside, UNFINISHED):
            try:
                _clear(aside)
                yield aside
                sync_tree(aside)
                _rename(aside, path)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise
            (path / UNFINISHED).unlink()
    except BlockingIOError as error:
        raise ConfigError(
            f"{path}: another process is making it; wait for that, or choose another directory"
        ) from error
    sync(path.parent)


def _refuse_overlap(folders: Sequence[Path]) -> None:
    for (one, place), (other, around) in permutations([(f, f.resolve()) for f in folders], 2):
        if place == around:
            raise ConfigError(
                f"--output and --stripe: the same directory twice: {one}, {other}"
                "; name directories that differ"
            )
        if around in place.parents:
            raise ConfigError(
                f"--output and --stripe: {one} lies in {other}; name directories beside each other"
            )


def _rename(aside: Path, path: Path) -> None:
    try:
        os.rename(aside, path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise ConfigError(
            f"{path}: something was made there meanwhile, and stays"
            "; move it away, and start the same command again"
        ) from error


def _clear(aside: Path) -> None:
    for path in aside.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != UNFINISHED:
            path.unlink()
