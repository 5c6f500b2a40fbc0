"""Every call by which a process touches its files, numbered, so that something can happen at one.

The package asks the system through ``os``, ``open`` and safetensors: what stands between two
numbers is every state of the disk that a kill can leave, but for part of a write. Only paths below
``roots`` count.
"""

import builtins
import io
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from safetensors import serialize_file

WRITES = ("write", "pwrite", "pwritev")
SYNCS = ("fsync", "fdatasync")
NAMING = ("rename", "replace", "unlink", "rmdir", "mkdir")
OPEN, OPEN_TO_READ, SAVE = "open", "open to read", "save_file"
CHANGES = (*WRITES, *SYNCS, *NAMING, "ftruncate", "posix_fallocate", OPEN, SAVE)
READS = ("preadv", OPEN_TO_READ)
IN_OS = (*WRITES, *SYNCS, *NAMING, "ftruncate", "posix_fallocate", "preadv", "open")


class Call(NamedTuple):
    """One call.

    Attributes:
        number: From 1, in the order of their beginnings.
        name: Of the function.
        path: Of the file.
        given: Its arguments.
        honest: Makes the call, with other arguments where there are any.
    """

    number: int
    name: str
    path: str
    given: tuple[Any, ...]
    honest: Callable[..., Any]

    def as_asked(self) -> Any:
        return self.honest(*self.given)


class Calls:
    """Numbers calls while it is entered.

    Args:
        roots: Folders whose files are watched.
        happens: Is given each call, and makes it or does something else.
        names: Which functions count.
    """

    def __init__(
        self,
        roots: Sequence[str | Path],
        happens: Callable[[Call], Any] = Call.as_asked,
        names: Sequence[str] = CHANGES,
    ) -> None:
        self._roots = tuple(str(Path(root).resolve()) for root in roots)
        self._happens = happens
        self._names = names
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()

    @contextmanager
    def watching(self) -> Iterator[None]:
        opened = self._watched("open", io.open)
        saved = self._watched(SAVE, serialize_file, place=1)
        with ExitStack() as stack:
            for name in IN_OS:
                call = self._watched(name, getattr(os, name))
                stack.enter_context(mock.patch.object(os, name, call))
            stack.enter_context(mock.patch.object(io, "open", opened))
            stack.enter_context(mock.patch.object(builtins, "open", opened))
            stack.enter_context(mock.patch("safetensors.torch.serialize_file", saved))
            yield

    def _watched(self, name: str, honest: Callable[..., Any], place: int = 0) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            what = name
            if name == "open" and _only_reads(given, named):
                what = OPEN_TO_READ
            path = _path(given[place] if len(given) > place else None, named.get("dir_fd"))
            if what not in self._names or not path.startswith(self._roots):
                return honest(*given, **named)
            with self._lock:
                self.counts[what] += 1
                number = self.counts.total()
            return self._happens(Call(number, what, path, given, partial(honest, **named)))

        return call


def _only_reads(given: tuple[Any, ...], named: dict[str, Any]) -> bool:
    how = given[1] if len(given) > 1 else named.get("mode", "r")
    if isinstance(how, int):
        return how & os.O_ACCMODE == os.O_RDONLY and not how & os.O_CREAT
    return not set(how) & set("wax+")


def _path(what: Any, folder: int | None) -> str:
    """Of the file that a call is about; empty where it is about none."""
    try:
        if isinstance(what, int):
            return os.readlink(f"/proc/self/fd/{what}")
        name = os.fsdecode(what)
        if folder is not None:
            return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)
        return os.path.abspath(name)
    except (OSError, TypeError):
        return ""
