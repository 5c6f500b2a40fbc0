"""The journal of a run: create, continue, append, rewind, sync, read."""

import io
import logging
import os
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Self
from weakref import WeakSet

from zo_offload.errors import JournalError
from zo_offload.journal import files
from zo_offload.journal.header import (
    SYNCED_OFFSET,
    Header,
    as_stored,
    differences,
    pack_synced,
    read_header,
)
from zo_offload.journal.record import Flags, Record, pack_record, pack_rewind
from zo_offload.journal.records import Records, Scan

SYNC_SECONDS = 1.0  # what a power cut may lose; it is computed again
MAX_DIFFERENCES = 3

logger = logging.getLogger(__name__)


class Journal:
    """A run's records, on disk and in memory; made by :meth:`open`, :meth:`create`, :meth:`read`.

    One thread appends. After a :class:`JournalError` from :meth:`append` the step must not be
    applied. It may be tried again, unless the error says to reopen: then the file decides.

    >>> import tempfile
    >>> from zo_offload.journal import Journal, Probe, Record
    >>> path = Path(tempfile.mkdtemp()) / "run.journal"
    >>> with Journal.open(path, {"seed": 0}) as journal:
    ...     journal.append(Record(0, (Probe(0, 2.5, 2.5e-6),), (0.7, 0.6), eps=1e-3, lr=1e-6))
    >>> Journal.read(path).records.coefficients(0, 1)
    [Term(step=0, probe=0, coefficient=2.5e-06)]
    """

    def __init__(
        self,
        path: Path | None,
        header: Header,
        scan: Scan,
        records: Records,
        file: io.FileIO | None,
    ) -> None:
        self.path = path
        self.header = header
        self.records = records
        self._scan = scan
        self._file = file  # None when opened for reading, or in memory
        self._broken = False
        self._synced_at = time.monotonic()
        self._synced_steps = 0
        if file is not None:
            _writers.add(self)

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], header: Mapping[str, Any], *, contract: int = 1
    ) -> Self:
        """Starts a journal, with its directory where needed, whole or not at all.

        Args:
            path: a file that must not exist.
            header: everything that changes bits; a JSON object, floats finite.
            contract: version of the kernels' bit contract.

        Raises:
            JournalError: the file exists, or cannot be written.
        """
        path, packed = Path(path).absolute(), Header(header, contract).pack()
        with files.errors_of(path, "create the journal"):
            file = files.create_locked(path, packed)
        return cls._load(path, file)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], header: Mapping[str, Any], *, contract: int = 1
    ) -> Self:
        """Continues the journal at ``path``, or starts it where there is none.

        A torn tail, which a crash leaves, is cut off with a warning.

        Raises:
            JournalError: another run has it, the header differs, there is damage inside.
        """
        path, wanted = Path(path).absolute(), Header(header, contract)
        if not os.path.lexists(path):
            return cls.create(path, header, contract=contract)
        with files.errors_of(path, "open the journal"):
            file = files.open_locked(path)
        return cls._load(path, file, wanted)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Reads what is there, for replay and reports: no lock, nothing is changed.

        A run may be writing meanwhile: an unfinished last record is left out.

        Raises:
            JournalError: no journal, or damage inside.
        """
        path = Path(path).absolute()
        with files.errors_of(path, "read the journal"):
            file = files.open_regular(path, os.O_RDONLY)
        journal = cls._load(path, file)
        file.close()
        return journal

    @classmethod
    def memory(cls, header: Mapping[str, Any], *, contract: int = 1) -> Self:
        """A journal without a file, for a run that keeps its record elsewhere or not at all.

        >>> Journal.memory({"seed": 0}).next_step
        0
        """
        fields = Header(header, contract)
        crc = fields.crc
        return cls(None, fields, Scan(Path(), 0, crc, fields.branch), Records(), None)

    @classmethod
    def of(cls, content: bytes, name: str) -> Self:
        """A journal in memory from the bytes of a file.

        Args:
            content: :attr:`content` of another one.
            name: where the bytes come from, for messages.

        Raises:
            JournalError: no journal, or damage inside.
        """
        journal = cls._load(Path(name), io.BytesIO(content), size=len(content))
        journal.path = None
        return journal

    @classmethod
    def _load(
        cls,
        path: Path,
        file: io.FileIO | io.BytesIO,
        wanted: Header | None = None,
        size: int | None = None,
    ) -> Self:
        try:
            with files.errors_of(path, "read the journal"):
                size = os.fstat(file.fileno()).st_size if size is None else size
                found = read_header(file, path, size)
                if wanted is not None:
                    _check_same(path, found.header, wanted)
                scan = Scan(path, found.num_bytes, found.crc, found.header.branch, found.synced)
                records, tail = scan.read(file)
            writer = file if isinstance(file, io.FileIO) and file.writable() else None
            journal = cls(path, found.header, scan, records, writer)
            if tail and writer is not None:
                journal._cut_tail(tail)
        except BaseException:
            file.close()
            raise
        return journal

    def append(self, record: Record) -> None:
        """Writes the record of step :attr:`next_step`, before its update is applied anywhere.

        Survives the death of this process at once, and a power cut after the next sync: that is
        now, when the last one is more than a second ago.

        Raises:
            JournalError: not the next step, not open for writing, or the system refuses.
        """
        if (place := (record.branch, record.step)) != (self.branch, self.next_step):
            raise JournalError(
                f"{self.path}: (branch, step) {place} cannot follow: "
                f"{(self.branch, self.next_step)} is next"
                "; append every step once, in order"
            )
        packed = pack_record(record, self._scan.header_crc)
        if self.path is None:
            self.records.add(packed)
            return
        self._write(packed, f"step {record.step}")
        if time.monotonic() - self._synced_at > SYNC_SECONDS:
            self.sync()
        self.records.add(packed)

    def rewind(self, step: int, rolled_back: bool = False) -> None:
        """Begins a branch: steps from ``step`` on are no more, though the file keeps them.

        Args:
            step: how many first steps stay.
            rolled_back: what follows is to go along other directions: see ``Records.stream``.

        Raises:
            JournalError: not so many steps, not open for writing, or the system refuses.
        """
        if step > self.next_step:
            raise JournalError(
                f"{self.path}: cannot rewind to step {step}: there are {self.next_step}"
                "; give a step it has"
            )
        branch = self.branch + 1
        flags = Flags.ROLLED_BACK if rolled_back else Flags.NONE
        packed = pack_rewind(branch, step, self._scan.header_crc, flags)
        if self.path is not None:
            self._write(packed, f"a rewind to step {step}")
            self.sync()
        self.records.rewind(packed, branch, step)

    def _write(self, packed: bytes, what: str) -> None:
        file, end = self._writable(), self._end
        assert self.path is not None
        try:
            # At an offset of ours: an interrupted append, tried again, overwrites itself.
            with files.errors_of(self.path, f"append {what}, {len(packed)} bytes at {end}"):
                files.write_whole(file, packed, end)
        except JournalError:
            self._broken = True  # until the file is known to end where memory does
            with files.errors_of(self.path, f"cut a partly written record, {what}, off at {end}"):
                os.ftruncate(file.fileno(), end)
            self._broken = False
            raise

    def sync(self) -> None:
        """Makes every record appended so far survive a power cut. Takes milliseconds.

        Raises:
            JournalError: it cannot be known what reached the disk, so nothing more is appended;
                opened again, the journal continues from what did.
        """
        if self.path is None:
            return
        file, steps, end = self._writable(), len(self.records), self._end
        try:
            with files.errors_of(self.path, "sync (what reached the disk is unknown: reopen)"):
                os.fsync(file.fileno())
                # The next sync brings this to the disk; until then the file says less, not more.
                files.write_whole(file, pack_synced(end, self._scan.header_crc), SYNCED_OFFSET)
        except JournalError:
            self._broken = True  # a second fsync would succeed and mean nothing
            raise
        self._synced_at, self._synced_steps = time.monotonic(), steps

    def sync_to(self, step: int) -> None:
        """As :meth:`sync`, unless the records of ``step`` steps survive a power cut already.

        May be called on any thread.
        """
        if step > self._synced_steps:
            self.sync()

    def leave(self) -> None:
        """Gives up the file, unsynced, to the process that this one was forked from."""
        if self._file is not None:
            self._file.close()

    def close(self) -> None:
        """Syncs and gives the lock back. Closing again does nothing."""
        if self._file is None or self._file.closed:
            return
        try:
            if not self._broken:
                self.sync()
        finally:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def last(self) -> Record | None:
        """The record of the newest step."""
        return self.records[-1] if self.records else None

    @property
    def next_step(self) -> int:
        """The only step that can be appended; also the number of steps recorded."""
        return len(self.records)

    @property
    def branch(self) -> int:
        """Which line of the run's history the next step belongs to."""
        return self.records.branch

    @property
    def content(self) -> bytes:
        """The whole journal as a file holds it."""
        records, start = self.records.content, len(self.header.pack())
        return self.header.pack(start + len(records)) + records

    @property
    def _end(self) -> int:
        return self._scan.offset + self.records.num_bytes

    def _writable(self) -> io.FileIO:
        if self._file is None or self._file.closed:
            raise JournalError(
                f"{self.path}: this journal is not open for writing; open it with Journal.open"
            )
        if self._broken:
            raise JournalError(f"{self.path}: an earlier write or sync failed; reopen the journal")
        return self._file

    def _cut_tail(self, tail: int) -> None:
        assert self.path is not None
        with files.errors_of(self.path, f"cut off a torn tail of {tail} bytes"):
            os.ftruncate(self._writable().fileno(), self._end)
        self.sync()
        logger.warning(
            "%s: cut off a torn tail of %d bytes at byte %d, left by a crash; step %d is next",
            self.path, tail, self._end, self.next_step,
        )  # fmt: skip


def _check_same(path: Path, journal: Header, run: Header) -> None:
    if journal.contract != run.contract:
        raise JournalError(
            f"{path}: written under kernel contract {journal.contract}, this zo_offload computes "
            f"contract {run.contract}: bits would differ; use the version that wrote it"
        )
    fields = as_stored(run.fields)
    if found := list(islice(differences(journal.fields, fields), MAX_DIFFERENCES)):
        raise JournalError(
            f"{path}: belongs to another run: {'; '.join(found)}; go back to the journal's values, "
            "or give this run its own path"
        )


_writers: "WeakSet[Journal]" = WeakSet()


def _close_in_child() -> None:
    """A forked data worker must not hold the lock when the run that it serves is gone."""
    for journal in list(_writers):
        journal.leave()


os.register_at_fork(after_in_child=_close_in_child)
