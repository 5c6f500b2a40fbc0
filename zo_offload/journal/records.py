"""A journal's records in memory: kept as the file's own bytes, unpacked when looked at.

A million one-probe steps are 120 MB and load in seconds; looking up a few steps, which each weight
unit does at each visit, costs microseconds. NOTE: one thread appends; others may read meanwhile,
so nothing here holds a view of the bytes across calls (a viewed bytearray cannot grow).
"""

import hashlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import BinaryIO, NamedTuple, overload

from zo_offload.errors import JournalError
from zo_offload.journal import record
from zo_offload.journal.record import Flags, Record

CHUNK_BYTES = 16 << 20
MAX_TAIL_BYTES = 64 << 20  # a torn tail is what one crash leaves: some records, or zeros
MAX_FALSE_MARKERS = 1000  # by chance there is one in 4 GiB: more are meant to waste our time


class Term(NamedTuple):
    """One direction to add to a weight: ``weight -= coefficient * z(step, probe)``."""

    step: int
    probe: int
    coefficient: float


class Records(Sequence[Record]):
    """Steps 0, 1, 2, ... of a run: an index is a step, a slice is a list.

    What a rewind has left behind stays among the bytes, and is not counted.

    Attributes:
        branch: Which line of the run's history the next step belongs to.
    """

    def __init__(self, branch: int = 0) -> None:
        self.branch = branch
        self._data = bytearray()
        self._starts = array("Q")  # byte offset of each step's record in data
        self._hashing = Lock()
        self._hashed, self._hasher = 0, hashlib.sha256()  # of the first steps
        self._next_stream: int | None = None  # after a roll back, until a step is recorded

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [record.unpack_record(self._data, start) for start in self._starts[index]]
        return record.unpack_record(self._data, self._starts[index])

    def coefficients(self, start: int, stop: int) -> list[Term]:
        """The terms of steps ``start`` to ``stop``, in the order of adding.

        By plain descent they are what brings a unit from one to the other. With momentum older
        directions go on moving it: see ``update`` in ``docs/format.md``.

        Skipped steps move nothing and have no terms. Decay is not among them: see ``decay`` of
        ``records[start:stop]``.

        Raises:
            IndexError: steps that the journal does not hold; a slice would drop them silently.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"steps {start} to {stop} of a journal that holds 0 to {len(self)}")
        terms = []
        for step, at in zip(range(start, stop), self._starts[start:stop], strict=True):
            flags, _ = record.MOVES.unpack_from(self._data, at)
            if not flags & Flags.SKIPPED:
                probes = record.unpack_probes(self._data, at)
                terms += [Term(step, number, coefficient) for number, _, coefficient in probes]
        return terms

    def lineage(self, stop: int | None = None) -> str:
        """SHA-256 of the records of the first ``stop`` steps (default: all): equal, equal bits."""
        stop = len(self) if stop is None else stop
        with self._hashing:
            if stop < self._hashed:
                self._hashed, self._hasher = 0, hashlib.sha256()
            for start in self._starts[self._hashed : stop]:
                self._hasher.update(record.packed_at(self._data, start))
            self._hashed = stop
            return self._hasher.hexdigest()

    def shared_steps(self, other: "Records") -> int:
        """How many first steps are the same in another run's records, whatever their branch."""
        pairs = zip(self._starts, other._starts, strict=False)
        for step, (ours, theirs) in enumerate(pairs):
            if record.moves_at(self._data, ours) != record.moves_at(other._data, theirs):
                return step
        return min(len(self), len(other))

    @property
    def stream(self) -> int:
        """Which directions the next step goes along; after each roll back others.

        Probe k of K is number ``stream * K + k`` in the noise counter.
        """
        if self._next_stream is not None:
            return self._next_stream
        if not self:
            return 0
        probes = self[-1].probes
        return probes[0].number // len(probes) if probes else 0

    @property
    def num_bytes(self) -> int:
        """Length of all records in the file."""
        return len(self._data)

    @property
    def content(self) -> bytes:
        """All records as they stand in the file."""
        return bytes(self._data)

    def add(self, packed: bytes) -> None:
        """Takes the packed record of step ``len(self)``; the journal has written it."""
        start = len(self._data)
        self._data += packed  # before the index, so that a reading thread never looks past the end
        self._next_stream = None
        self._starts.append(start)

    def rewind(self, packed: bytes, branch: int, step: int) -> None:
        """Takes a packed rewind: steps from ``step`` on are no more, and ``branch`` begins."""
        flags, _ = record.MOVES.unpack_from(packed)
        self._next_stream = self.stream + 1 if flags & Flags.ROLLED_BACK else None
        self._data += packed
        with self._hashing:
            del self._starts[step:]
            if step < self._hashed:
                self._hashed, self._hasher = 0, hashlib.sha256()
        self.branch = branch


class Scan(NamedTuple):
    """Where a file's records start, what makes one its own, and how much is on the disk."""

    path: Path
    offset: int
    header_crc: int
    branch: int
    synced: int = 0

    def read(self, reader: BinaryIO) -> tuple[Records, int]:
        """Returns the records and the number of bytes of a torn tail after them.

        Raises:
            JournalError: a bad record that valid ones follow, of those that a power cut cannot
                take; or one out of sequence.
        """
        records, pending, end = Records(self.branch), bytearray(), 0
        while chunk := reader.read(CHUNK_BYTES):
            pending += chunk
            at = 0
            while length := record.valid_record_bytes(pending, at, self.header_crc):
                self._take(records, bytes(pending[at : at + length]))
                at += length
            del pending[:at]
            end += at
            if len(pending) > MAX_TAIL_BYTES:
                raise self._damage(len(records), end, f"over {MAX_TAIL_BYTES} bytes lie behind it")
        self._check_tail(pending, end, len(records))
        return records, len(pending)

    def _take(self, records: Records, packed: bytes) -> None:
        """Add a valid record where it belongs."""
        found = kind, branch, step = record.PLACE.unpack(packed[: record.PLACE.size])
        if kind == record.REWIND and branch == records.branch + 1 and step <= len(records):
            records.rewind(packed, branch, step)
        elif found == (expected := (record.STEP, records.branch, len(records))):
            records.add(packed)
        else:
            names = "(kind, branch, step)"
            raise self._damage(
                len(records), records.num_bytes, f"{names} is {found} where {expected} belongs"
            )

    def _check_tail(self, tail: bytearray, end: int, step: int) -> None:
        """A torn tail has nothing valid after its start; what does is damage inside.

        Of what was not synced a power cut may leave any part, the later without the earlier.
        """
        if self.offset + end >= self.synced:
            return
        candidate, num_false = tail.find(record.MARKER, 1), 0
        while candidate >= 0 and num_false < MAX_FALSE_MARKERS:
            if record.valid_record_bytes(tail, candidate, self.header_crc):
                later = record.PLACE.unpack_from(tail, candidate)[2]
                where = self.offset + end + candidate
                raise self._damage(step, end, f"step {later} at byte {where} is intact behind it")
            candidate, num_false = tail.find(record.MARKER, candidate + 1), num_false + 1
        if candidate >= 0:
            raise self._damage(step, end, f"over {MAX_FALSE_MARKERS} false records lie behind it")

    def _damage(self, step: int, at: int, what: str) -> JournalError:
        offset = self.offset + at
        return JournalError(
            f"{self.path}: the record of step {step} at byte {offset} is damaged: {what}; restore "
            f"the file from a copy, or cut a copy to {offset} bytes to go on from step {step}"
        )
