"""A run's units in files on a disk, so that at every instant a whole version of each is there.

A unit is written to a spare slot. Its old slot is used again only after an ``fdatasync`` that
follows the write of its successor. What is in a slot is believed only if the checks in its header
are right, so that header and content may be written in any order, and torn ones are passed over.
Which of a unit's slots is right is decided by the run's journal (:meth:`NvmeFiles.adopt`): each
carries the digest of the run's records up to its step.
"""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Lock

import torch

from zo_offload import files
from zo_offload.errors import StoreError
from zo_offload.offload.direct import PAGE, DirectFile, Transfers, aligned, padded
from zo_offload.offload.slots import Resident, SlotHeader, read_header
from zo_offload.ops.crc32c import check_of, page_crcs

FILE = "units.zo"
CLEAN = "clean"
SPARE_SLOTS = 4
NO_LINEAGE = bytes(32)
logger = logging.getLogger(__name__)


class NvmeFiles:
    """Slots for units, in directories that this run holds alone.

    Args:
        directories: One a disk; made where they are missing. Bytes are striped over them.
        units: Those that rest here.
        transfers: How the disks are asked.
        before_write: Called before anything that carries a step is written: what explains that step
            must survive a power cut first.
        lineage: From a number of steps to 32 bytes that name the run and its records up to there.

    Attributes:
        bytes_read: Since the files were opened.
        bytes_written: Since then; what a disk's wear is made of.

    Raises:
        StoreError: Another run holds a directory, or the disk is too small.
    """

    def __init__(
        self,
        directories: Sequence[Path],
        units: Sequence[Resident],
        transfers: Transfers,
        before_write: Callable[[int], None],
        lineage: Callable[[int], bytes],
    ) -> None:
        self._units = {unit.index: unit for unit in units}
        self._slot_bytes = max(unit.slot_bytes for unit in units)
        self._num_slots = len(units) + SPARE_SLOTS
        self._before_write, self._lineage = before_write, lineage
        self._changing = Lock()
        self._slot: dict[int, int] = {}  # of a unit
        self._headers: dict[int, SlotHeader] = {}  # of a slot that is trusted, or was found
        self._free = list(range(self._num_slots))
        self._left: list[int] = []  # slots with a successor that no sync has followed yet
        self._sequence = self._written = 0
        self._open = ExitStack()
        try:
            self._file = self._open_files(directories, transfers)
            self._found = self._scan()
            self._marker = directories[0] / CLEAN
            self._sound = self._take_marker()
            self._file.allocate(self._num_slots * self._slot_bytes)
        except BaseException:
            self._open.close()
            raise
        self._readers = ThreadPoolExecutor(4, thread_name_prefix="zo-disk-read")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="zo-disk-write")

    @property
    def bytes_read(self) -> int:
        """See the class."""
        return self._file.bytes_read

    @property
    def bytes_written(self) -> int:
        """See the class."""
        return self._file.bytes_written

    @property
    def written_ever(self) -> int:
        """Bytes that the files have taken since they were made."""
        return self._written

    @property
    def disk_bytes(self) -> int:
        """Of all slots."""
        return self._num_slots * self._slot_bytes

    def holds(self, unit: int) -> bool:
        """Whether the unit has been written, or adopted."""
        return unit in self._slot

    def adopt(self, most: Callable[[int], int]) -> dict[int, int]:
        """Take what an earlier process left: each unit's newest whole slot on this run's line.

        Args:
            most: From a unit's index to the number of steps that it may carry at most.

        Returns:
            The steps that each adopted unit carries.
        """
        carries: dict[int, int] = {}
        for slot, header in sorted(self._found.items(), key=lambda item: -item[1].sequence):
            unit = header.unit
            if unit in carries or header.step > most(unit) or not self._is_ours(slot, header):
                continue
            carries[unit] = header.step
            self._slot[unit], self._headers[slot] = slot, header
            self._free.remove(slot)
        self._found = {}
        return carries

    def read(self, unit: int, wire: torch.Tensor, rest: torch.Tensor | None) -> "Future[int]":
        """Fill page-aligned buffers of whole pages; the future holds the steps that they carry.

        Args:
            unit: Its index.
            wire: uint8, of the unit's padded wire bytes.
            rest: The same for what stays with the master; None where it is not wanted.
        """
        slot = self._slot[unit]
        return self._readers.submit(self._read, slot, self._headers[slot], wire, rest)

    def write(self, unit: int, wire: torch.Tensor, rest: torch.Tensor, step: int) -> "Future[None]":
        """Keep page-aligned buffers, which must stay as they are until the future is done."""
        return self._writer.submit(self._write, self._units[unit], wire, rest, step)

    def forget(self) -> None:
        """Nothing that was written counts any more."""
        self._writer.submit(self._forget).result()

    def close(self) -> None:
        """Sync, and leave a note that nothing needs to be checked at the next start."""
        self._readers.shutdown()
        self._writer.shutdown()
        try:
            self._file.sync()
            sound = sorted(self._slot.values())
            files.write_file(self._marker, " ".join(map(str, [self._sequence, *sound])).encode())
        finally:
            self._open.close()

    # -- opening --

    def _open_files(self, directories: Sequence[Path], transfers: Transfers) -> DirectFile:
        for directory in directories:
            try:
                directory.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._open.enter_context(files.locked(directory))
            except BlockingIOError:
                raise StoreError(
                    f"{directory}: another run keeps its weights here; wait for its end, or name "
                    "another directory in offload_param.nvme_path"
                ) from None
            except OSError as error:
                raise StoreError(
                    f"{directory}: cannot keep weights here: {error.strerror or error}; "
                    "is offload_param.nvme_path right?"
                ) from error
        found = DirectFile([each / FILE for each in directories], transfers)
        self._open.callback(found.close)
        return found

    def _scan(self) -> dict[int, SlotHeader]:
        """The headers that earlier processes left, by slot."""
        found: dict[int, SlotHeader] = {}
        page = aligned(PAGE)
        there = min(self._num_slots, self._file.size() // self._slot_bytes)
        for slot in range(there):
            self._file.read(slot * self._slot_bytes, page).result()
            header = read_header(page)
            unit = self._units.get(header.unit) if header is not None else None
            if header is not None and unit is not None and header.is_of(unit):
                found[slot] = header
        self._sequence = max((header.sequence for header in found.values()), default=0)
        self._written = max((header.written for header in found.values()), default=0)
        return found

    def _take_marker(self) -> set[int]:
        """Slots that need not be checked; from here on the files are open."""
        try:
            lines = self._marker.read_text().split()
            self._marker.unlink()
            files.sync(self._marker.parent)
        except FileNotFoundError:
            return set()
        except (OSError, ValueError) as error:
            raise StoreError(f"{self._marker}: cannot be read: {error}; remove it") from error
        if lines[:1] != [str(self._sequence)] or not all(line.isdecimal() for line in lines):
            return set()
        return set(map(int, lines[1:]))

    def _is_ours(self, slot: int, header: SlotHeader) -> bool:
        if header.lineage != self._lineage(header.step):
            return False
        if slot in self._sound:
            return True
        unit = self._units[header.unit]
        wire, rest = aligned(unit.wire_bytes), aligned(unit.rest_bytes)
        try:
            self._read(slot, header, wire, rest)
        except StoreError as error:
            logger.warning("%s; an older version, or replay, takes its place", error)
            return False
        return True

    # -- on threads --

    def _read(
        self, slot: int, header: SlotHeader, wire: torch.Tensor, rest: torch.Tensor | None
    ) -> int:
        unit = self._units[header.unit]
        first = slot * self._slot_bytes + PAGE
        parts = [("wire", first, wire, header.wire_check)]
        if rest is not None:
            parts.append(("rest", first + padded(unit.wire_bytes), rest, header.rest_check))
        arrivals = [self._file.read(offset, buffer) for _, offset, buffer, _ in parts]
        for (part, _, buffer, expected), arrival in zip(parts, arrivals, strict=True):
            arrival.result()
            found = check_of(page_crcs(buffer))
            if found != expected:
                raise StoreError(
                    f"{self._file.paths[0]}: slot {slot}, {part} of {unit.name}: CRC32C "
                    f"{found:08x}, expected {expected:08x}; the disk has damaged it: the same "
                    "command, with this directory removed, rebuilds it by replay"
                )
        return header.step

    def _write(self, unit: Resident, wire: torch.Tensor, rest: torch.Tensor, step: int) -> None:
        self._before_write(step)
        if not self._free:
            self._recycle()
        slot = self._free.pop()
        self._sequence += 1
        self._written += unit.slot_bytes
        header = SlotHeader(
            unit.index, unit.shapes, self._lineage(step), self._sequence, step, self._written,
            unit.wire_bytes, unit.rest_bytes, check_of(page_crcs(wire)), check_of(page_crcs(rest)),
        )  # fmt: skip
        page = aligned(PAGE)
        header.pack(page)
        first = slot * self._slot_bytes
        parts = [(first, page), (first + PAGE, wire), (first + PAGE + padded(wire.nbytes), rest)]
        try:
            for departure in [self._file.write(*part) for part in parts if part[1].nbytes]:
                departure.result()
        except BaseException:
            self._free.append(slot)
            raise
        with self._changing:
            before = self._slot.get(unit.index)
            self._slot[unit.index], self._headers[slot] = slot, header
        if before is not None:
            self._left.append(before)

    def _recycle(self) -> None:
        """Slots that were left are free once what was written after them is safe."""
        self._file.sync()
        self._free += self._left
        self._left.clear()
        assert self._free, "units never hold more slots than there are"

    def _forget(self) -> None:
        self._free = list(range(self._num_slots))
        self._left.clear()
        self._slot.clear()
        self._headers.clear()
        self._found = {}


def directory_bytes(units: Sequence[Resident]) -> int:
    """What the files of these units take."""
    return (len(units) + SPARE_SLOTS) * max(unit.slot_bytes for unit in units) if units else 0


def remove(directories: Sequence[Path]) -> None:
    """Take the files away."""
    for directory in directories:
        for name in (FILE, CLEAN):
            (directory / name).unlink(missing_ok=True)
    for directory in directories:
        if not any(os.scandir(directory)):
            directory.rmdir()
