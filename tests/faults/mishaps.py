"""What happens at a call: a table of kinds, each a function of the call and of chance.

A mishap makes the call, makes part of it, refuses it, or kills this process.
"""

import errno
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from faults.calls import OPEN, OPEN_TO_READ, SAVE, SYNCS, WRITES, Call

SECTOR = 512
Mishap = Callable[[Call, random.Random], Any]


def die() -> NoReturn:
    """Now: no handler, no flush, no thread goes on."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("killed, and alive")


def kill_before(call: Call, chance: random.Random) -> NoReturn:
    die()


def kill_after(call: Call, chance: random.Random) -> NoReturn:
    try:
        call.as_asked()
    finally:  # a call that is refused, as one for a file that is not there, is over too
        die()


def kill_within(call: Call, chance: random.Random) -> NoReturn:
    """Of a write, some bytes are there; of anything else, nothing."""
    if call.name in WRITES:
        part_of(call, chance.random())
    elif call.name == SAVE:
        call.as_asked()
        os.truncate(call.path, int(chance.random() * os.path.getsize(call.path)))
    die()


def part_of(call: Call, share: float) -> int:
    """Make part of a write or read; gives the number of bytes."""
    fd, data, *offset = call.given
    if call.name in ("pwritev", "preadv"):
        whole = sum(len(view) for view in data)
        return call.honest(fd, _first(data, int(share * whole)), *offset)
    return call.honest(fd, bytes(data)[: int(share * len(data))], *offset)


def _first(views: list[memoryview], count: int) -> list[memoryview]:
    """Whole sectors, as direct I/O needs them."""
    count, kept = count // 4096 * 4096, []
    for view in views:
        kept.append(view[:count])
        count -= len(kept[-1])
    return kept


def short_write(call: Call, chance: random.Random) -> Any:
    return part_of(call, chance.random())


def torn_write(call: Call, chance: random.Random) -> NoReturn:
    """Some sectors of a write are new and the others old, in any order; then death."""
    path = Path(call.path)
    before = path.read_bytes()
    call.as_asked()
    after = path.read_bytes()
    path.write_bytes(mixed(before, after, chance))
    die()


def mixed(old: bytes, new: bytes, chance: random.Random) -> bytes:
    """Of each sector the old or the new; of a length between."""
    length = max(len(old), len(new))
    sectors = bytearray()
    for at in range(0, length, SECTOR):
        sectors += (old if chance.random() < 0.5 else new)[at : at + SECTOR].ljust(
            min(SECTOR, length - at), b"\0"
        )
    return bytes(sectors[: chance.randint(min(len(old), len(new)), length)])


def refused(number: int) -> Mishap:
    def refuse(call: Call, chance: random.Random) -> NoReturn:
        raise OSError(number, os.strerror(number), call.path if call.name == OPEN else None)

    return refuse


def damaged_read(call: Call, chance: random.Random) -> int:
    """A bit of what is read is another."""
    moved = call.as_asked()
    view = call.given[1][0]
    view[chance.randrange(len(view))] ^= 1 << chance.randrange(8)
    return moved


class Reordered:
    """Holds a transfer back until another one has passed it, or it is alone."""

    SECONDS = 0.05  # at most: another one may never come

    def __init__(self) -> None:
        self._passed = threading.Event()

    def __call__(self, call: Call, chance: random.Random) -> Any:
        if chance.random() < 0.5:
            self._passed.clear()
            self._passed.wait(self.SECONDS)
        done = call.as_asked()
        self._passed.set()
        return done


KILLS: dict[str, Mishap] = {
    "before": kill_before,
    "within": kill_within,
    "after": kill_after,
}

TRANSFERS = (*WRITES, "preadv")
FAULTS: dict[str, tuple[Mishap, tuple[str, ...]]] = {
    "EIO at a write": (refused(errno.EIO), WRITES),
    "EIO at a read": (refused(errno.EIO), ("preadv", OPEN_TO_READ)),
    "EIO at a sync": (refused(errno.EIO), SYNCS),
    "EIO at a rename": (refused(errno.EIO), ("rename", "replace")),
    "ENOSPC at a write": (refused(errno.ENOSPC), (*WRITES, "posix_fallocate", "mkdir")),
    "ENOSPC at a file": (refused(errno.ENOSPC), (OPEN, "mkdir")),
    "ENOSPC at a save": (refused(errno.ENOSPC), (SAVE,)),
    "EDQUOT at a sync": (refused(errno.EDQUOT), SYNCS),
    "EROFS": (refused(errno.EROFS), (OPEN, "rename", "replace", "unlink", "mkdir")),
    "EMFILE": (refused(errno.EMFILE), (OPEN, OPEN_TO_READ)),
    "a short write": (short_write, WRITES),
    "a short read": (short_write, ("preadv",)),
    "a damaged read": (damaged_read, ("preadv",)),
    "a torn write": (torn_write, WRITES),
}
