"""Memory that the ranks of one machine map together, and the locks that order them.

It has no name in any file system (memfd): nothing is left when the last rank is gone, however it
went, and the size of ``/dev/shm`` does not limit it. Who moves or reads a piece takes a lock on its
number; the kernel gives locks back when a rank dies. A piece that a rank died over is never read.
"""

import fcntl
import mmap
import os
import struct
import time
from collections.abc import Callable
from weakref import WeakSet

import numpy as np
import torch

from zo_offload.errors import ReplicaError, StoreError

PAGE = mmap.PAGESIZE
FLOCK = struct.Struct("hhqqi4x")  # type, whence, start, length, process (0)
SHORTEST_NAP, LONGEST_NAP = 50e-6, 2e-3


class Region:
    """A stretch of memory; made by all ranks of a machine together.

    Args:
        num_bytes: Its size, the same on every rank.
        ranks: Those of the machine, in order.
        index: This one's place among them.
        leader_says: Gives every rank the text that the first of them passes.

    Raises:
        StoreError: There is no such memory, or a rank may not open the first one's.
    """

    def __init__(
        self, num_bytes: int, ranks: tuple[int, ...], index: int, leader_says: Callable[[str], str]
    ) -> None:
        self.ranks, self.index = ranks, index
        self._file = self._locks = -1
        self._table = -(-8 * len(ranks) // PAGE) * PAGE  # of arrivals, before what was asked for
        self._bytes = self._table + -(-num_bytes // PAGE) * PAGE
        self._file = self._open(leader_says)
        # Opened anew: a mapping that a forked child inherits would keep the locks of its parent.
        self._locks = os.open(f"/proc/self/fd/{self._file}", os.O_RDWR | os.O_CLOEXEC)
        self._map = mmap.mmap(self._file, self._bytes)
        self._own: mmap.mmap | None = None
        self._arrivals = np.frombuffer(self._map, np.int64, len(ranks))
        self._take(fcntl.F_WRLCK, self._alive(index), 1, wait=True)
        _regions.add(self)

    def memory(self, first: int, num_bytes: int) -> torch.Tensor:
        """uint8 ``[num_bytes]``, the same memory on every rank."""
        return self._view(self._map, first, num_bytes)

    def private(self, first: int, num_bytes: int) -> torch.Tensor:
        """The same content, of which a page becomes this rank's own when it writes there."""
        if self._own is None:
            self._own = mmap.mmap(self._file, self._bytes, flags=mmap.MAP_PRIVATE)
        return self._view(self._own, first, num_bytes)

    def array(self, first: int, count: int) -> np.ndarray:
        """int64 ``[count]``, the same memory on every rank."""
        return np.frombuffer(self._map, np.int64, count, self._table + first)

    # -- locks --

    def try_to_change(self, piece: int) -> bool:
        """Take a piece for this rank alone, unless another one has it."""
        return self._take(fcntl.F_WRLCK, piece, 1, wait=False)

    def change(self, piece: int, count: int = 1) -> None:
        """Take pieces for this rank alone, when the others have left them."""
        self._take(fcntl.F_WRLCK, piece, count, wait=True)

    def read(self, piece: int, count: int = 1) -> None:
        """Take pieces so that nobody changes them."""
        self._take(fcntl.F_RDLCK, piece, count, wait=True)

    def leave(self, piece: int, count: int = 1) -> None:
        """Give pieces back."""
        self._take(fcntl.F_UNLCK, piece, count, wait=False)

    # -- meeting --

    def meet(self) -> None:
        """Return when every rank of the machine has come here.

        Raises:
            ReplicaError: One of them has died.
        """
        turn = self._arrivals[self.index] = self._arrivals[self.index] + 1
        nap = SHORTEST_NAP
        while (late := np.flatnonzero(self._arrivals < turn)).size:
            self._refuse_dead(int(late[0]))
            time.sleep(nap)
            nap = min(2 * nap, LONGEST_NAP)

    def close(self) -> None:
        """Leave the others. Memory that somebody still looks at stays."""
        files, self._file, self._locks = (self._file, self._locks), -1, -1
        for file in files:
            if file >= 0:
                os.close(file)

    def __del__(self) -> None:
        self.close()  # of ranks that failed to begin together; its memory goes with the last file

    def _refuse_dead(self, index: int) -> None:
        if not self.try_to_change(self._alive(index)):
            return  # it lives
        self.leave(self._alive(index))
        raise ReplicaError(
            f"rank {self.ranks[self.index]} lost rank {self.ranks[index]}, which shares its "
            "machine's weights; look at its output, and start the same command again"
        )

    def _alive(self, index: int) -> int:
        """The lock that a rank holds as long as it lives: beyond those of all pieces."""
        return (1 << 40) + index

    def _take(self, kind: int, first: int, count: int, wait: bool) -> bool:
        command = fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK
        try:
            fcntl.fcntl(self._locks, command, FLOCK.pack(kind, os.SEEK_SET, first, count, 0))
        except BlockingIOError:
            return False
        return True

    def _open(self, leader_says: Callable[[str], str]) -> int:
        if self.index == 0:
            file = -1
            try:
                file = os.memfd_create("zo_offload")
                os.fchmod(file, 0o600)
                os.ftruncate(file, self._bytes)
            except OSError as error:
                if file >= 0:
                    os.close(file)
                leader_says("")  # which the others cannot open
                raise StoreError(
                    f"host memory: no {self._bytes - self._table:,} bytes that ranks of a machine "
                    f"share ({error.strerror}); look at this process's limits (ulimit -a)"
                ) from error
            leader_says(f"/proc/{os.getpid()}/fd/{file}")
            return file
        path = leader_says("")
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise StoreError(
                f"rank {self.ranks[self.index]} may not open the memory of rank {self.ranks[0]} on "
                f"the same machine ({path}: {error.strerror}); let ranks run as one user, without "
                "limits on /proc"
            ) from error

    def _view(self, mapped: mmap.mmap, first: int, num_bytes: int) -> torch.Tensor:
        start = self._table + first
        if not num_bytes:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(mapped, dtype=torch.uint8, count=num_bytes, offset=start)


_regions: "WeakSet[Region]" = WeakSet()


def _close_in_child() -> None:
    """A forked data worker must not keep the locks of a rank that died."""
    for region in list(_regions):
        region.close()


os.register_at_fork(after_in_child=_close_in_child)
