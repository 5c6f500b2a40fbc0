"""Units on disk: the store that a run writes.

A whole version of every unit exists at every instant (``slots``); every byte that comes back is
compared with what was written (``slot``, ``ops.crc32c``); after any end the newest whole versions
are found (``recovery``). What is needed before them is the owner's: a journal that is synced before
a unit that carries its steps is written, and a snapshot or base for a unit that none is left of.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from zo_offload.errors import StoreError
from zo_offload.offload.aio import Aio
from zo_offload.offload.direct import DirectFile, Piece
from zo_offload.offload.disk import aligned
from zo_offload.offload.folders import check_files, held
from zo_offload.offload.manifest import (
    SLOTS,
    mark_clean,
    read_clean,
    read_manifests,
    unmark_clean,
)
from zo_offload.offload.recovery import read_version, recover, slot_pieces
from zo_offload.offload.slot import HEADER_BYTES, Identity, SlotHeader, StoredUnit, check_sizes
from zo_offload.offload.slots import SlotTable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Version:
    """What a store has of a unit.

    Attributes:
        step: That the weights carry.
        branch: Of the journal.
    """

    step: int
    branch: int


class UnitStore:
    """The units of one run.

    Args:
        folders: One for each path, as given to :func:`create_store`.
        identity: Whose weights they are.
        units: What they are.
        aio: Size and number of transfers.
        before_write: Called before anything is written: the owner syncs its journal.

    Attributes:
        missing: Indices of units of which no whole version is left; the owner restores them.
        torn: Versions that a crash cut off, or that were damaged since, in words.

    Raises:
        StoreError: Another run has the files, or they are missing, cut short, damaged or of
            another run, base, codec or model.

    Example:
        >>> import tempfile
        >>> from zo_offload.offload.folders import create_store
        >>> unit = StoredUnit(0, "block", 5000, 5000, "00" * 32)
        >>> identity = Identity("11" * 16, "22" * 32, "bf16")
        >>> wire, rest, found = (aligned(5000) for _ in range(3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     create_store([Path(folder)], identity, [unit])
        ...     with UnitStore([Path(folder)], identity, [unit]) as store:
        ...         store.write(0, wire.fill_(7), rest, step=3).result()
        ...         store.read(0, found).result(), bool((found == wire).all())
        (3, True)
    """

    def __init__(
        self,
        folders: Sequence[Path],
        identity: Identity,
        units: Sequence[StoredUnit],
        aio: Aio | None = None,
        before_write: Callable[[], None] | None = None,
    ) -> None:
        self._folder, self._identity = folders[0], identity
        self._units = {unit.index: unit for unit in units}
        self._before_write = before_write
        self._changed = threading.Condition()
        self._failure: str | None = None  # of a sync: nothing is written after it
        self._is_closed = False
        self._is_doubtful = False  # the next opening verifies everything
        with ExitStack() as stack:
            stack.enter_context(held(folders))
            self._geometry = read_manifests(folders, identity, units)
            check_files(folders, self._geometry, identity)
            paths = [folder / SLOTS for folder in folders]
            stripe_bytes = self._geometry.stripe_bytes
            self._file = DirectFile(paths, aio, writable=True, stripe_bytes=stripe_bytes)
            stack.callback(self._file.close)
            self._recover()
            self._open = stack.pop_all()

    def __enter__(self) -> "UnitStore":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def bytes_read(self) -> int:
        """Since the store was opened."""
        return self._file.bytes_read

    @property
    def bytes_written(self) -> int:
        """Since the store was opened."""
        return self._file.bytes_written

    @property
    def held_bytes(self) -> int:
        """Size of the files."""
        return self._geometry.total_bytes

    @property
    def life_bytes(self) -> int:
        """Written since the store was made: what its disks have worn."""
        return self._life_bytes

    def version(self, index: int) -> Version | None:
        """What there is of a unit, after a write of it that is under way."""
        with self._changed:
            self._changed.wait_for(lambda: index not in self._table.writing)
            header = self._headers.get(index)
        return None if header is None else Version(header.step, header.branch)

    def read(
        self, index: int, wire_out: torch.Tensor, rest_out: torch.Tensor | None = None
    ) -> "Future[int]":
        """Read a unit, after a write of it that is under way.

        Args:
            index: Of the unit.
            wire_out: Memory for what travels, uint8 ``[wire_bytes]``; in place where its address is
                a multiple of 4,096.
            rest_out: Memory for what stays, if it is wanted.

        Returns:
            A future of the step that the weights carry; a StoreError where the bytes are not
            those that were written.

        Raises:
            StoreError: There is no version of it.
        """
        unit = self._units[index]
        check_sizes(unit, wire_out, rest_out)
        with self._changed:
            self._changed.wait_for(lambda: index not in self._table.writing)
            header = self._headers.get(index)
            slot = self._table.current.get(index, -1)
            if header is not None:
                self._table.read_begins(slot)
        if header is None:
            raise StoreError(f"{self._folder}: no version of {unit} is whole; restore it first")

        def release(is_right: bool) -> None:
            if not is_right:
                self._doubt()
            with self._changed:
                self._table.read_ends(slot)
                self._changed.notify_all()

        offset = slot * self._geometry.slot_bytes
        return read_version(self._file, offset, unit, header, (wire_out, rest_out), release)

    def write(
        self, index: int, wire: torch.Tensor, rest: torch.Tensor, step: int, branch: int = 0
    ) -> "Future[None]":
        """Write a unit to a spare slot; when the future is done it is the unit's newest version.

        Waits where no slot is free: for writes under way, and for a sync. Not to be called from a
        future's callback.

        Args:
            index: Of the unit.
            wire: uint8 ``[wire_bytes]``, not changed until the future is done.
            rest: uint8 ``[rest_bytes]``, likewise.
            step: That the weights carry.
            branch: Of the journal.

        Raises:
            StoreError: A sync failed before.
        """
        unit = self._units[index]
        check_sizes(unit, wire, rest)
        if self._before_write:
            self._before_write()
        slot, sequence = self._take(index)
        offset = slot * self._geometry.slot_bytes
        written: list[SlotHeader] = []

        def finish(crcs: list[int]) -> None:
            header = self._header(unit, step, branch, sequence, crcs)
            self._file.write_now(Piece(offset, header.pack()))  # after what it vouches for
            written.append(header)

        pieces = slot_pieces(offset, unit, wire, rest)
        return self._file.write(pieces, finish, lambda: self._settled(index, written))

    def sync(self) -> None:
        """Make what was written survive a power cut; slots of older versions become free.

        Raises:
            StoreError: It could not; nothing more is written by this store.
        """
        self._refuse_after_failure()
        with self._changed:
            retired = self._table.retired  # their successors have landed: this sync is for those
        try:
            self._file.sync()
        except StoreError as error:
            self._failure = f"{error}; nothing is written after that: start again"
            raise
        with self._changed:
            self._table.synced(retired)
            self._changed.notify_all()

    def close(self) -> None:
        """Wait for what is under way, sync, and say that this end is a clean one.

        A second call does nothing.
        """
        if self._is_closed:
            return
        self._is_closed = True
        with self._open:
            with self._changed:
                self._changed.wait_for(lambda: self._table.is_idle)
            if self._failure is None and not self._is_marked:
                self.sync()
                if not self._is_doubtful:
                    mark_clean(self._folder, self._sequence, self._life_bytes)

    def _recover(self) -> None:
        clean = read_clean(self._folder)
        units = list(self._units.values())
        found = recover(self._file, self._geometry, self._identity, units, clean)
        self._headers, self._sequence = found.headers, found.sequence
        self._life_bytes = found.life_bytes
        self._is_marked = clean is not None
        if found.verified:
            self._unmark()
        self.torn = list(found.torn.values())
        self.missing = [i for i in self._units if i not in found.headers]
        for fault in self.torn:
            logger.warning("%s: not whole, left out: %s", self._folder, fault)
        for slot in found.torn:  # or the next clean end would make it trusted
            block = aligned(HEADER_BYTES)
            self._file.write_now(Piece(slot * self._geometry.slot_bytes, block))
        if found.verified:
            self._file.sync()  # what was read may not be durable, and all other slots are free now
        self._table = SlotTable(self._geometry.num_slots, found.slots)

    def _take(self, index: int) -> tuple[int, int]:
        """A slot for the unit's next version, and its number."""
        table = self._table
        while True:
            self._refuse_after_failure()
            with self._changed:
                self._changed.wait_for(
                    lambda: (
                        index not in table.writing
                        and (table.has_free or table.is_sync_due or table.is_idle)
                    )
                )
                self._unmark()
                slot = table.take(index)
                if slot is not None:
                    self._sequence += 1
                    return slot, self._sequence
                if not table.is_sync_due:
                    raise StoreError(
                        f"{self._folder}: {self._units[index]} is there already, and a store "
                        "without spare slots is written once"
                        "; make a new store for other weights"
                    )
            self.sync()

    def _header(
        self, unit: StoredUnit, step: int, branch: int, sequence: int, crcs: list[int]
    ) -> SlotHeader:
        with self._changed:
            self._life_bytes += unit.slot_bytes
            return SlotHeader(
                self._identity,
                unit.index,
                unit.shapes,
                branch,
                step,
                sequence,
                unit.wire_bytes,
                unit.rest_bytes,
                *crcs,
                life_bytes=self._life_bytes,
            )

    def _settled(self, index: int, written: list[SlotHeader]) -> None:
        with self._changed:
            if written:
                (self._headers[index],) = written
                self._table.landed(index)
            else:
                self._is_doubtful = True
                self._table.failed(index)
            self._changed.notify_all()

    def _doubt(self) -> None:
        with self._changed, suppress(StoreError):  # the caller has an error to tell already
            self._is_doubtful = True
            self._unmark()

    def _unmark(self) -> None:
        if self._is_marked:
            unmark_clean(self._folder)
            self._is_marked = False

    def _refuse_after_failure(self) -> None:
        if self._failure:
            raise StoreError(self._failure)
