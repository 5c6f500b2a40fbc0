"""The files of one run's units: made or taken over when the run is known, by its journal.

A store on disk belongs to a run, and a run is known by the header of its journal. Until the first
write nothing is on the disk. A run that keeps its journal in memory leaves nothing behind: nobody
could say later which steps its weights carry.
"""

import logging
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch

from zo_offload.errors import StoreError
from zo_offload.files import LOCK
from zo_offload.offload.aio import Aio
from zo_offload.offload.base_files import BaseFiles
from zo_offload.offload.folders import create_store, held, is_store
from zo_offload.offload.manifest import CLEAN, MANIFEST, SLOTS, manifest_run
from zo_offload.offload.nvme import UnitStore
from zo_offload.offload.slot import NO_RUN, Identity, StoredUnit

NAMELESS = "00" * 8  # what the number of a run without a journal begins with
FORMAT = "identity"  # units rest as the masters lie, whatever crosses the bus
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Disk:
    """Where units rest that rest on a disk.

    Attributes:
        folders: One a disk; bytes are striped over them.
        aio: How they are asked.
        before_write: Called with the number of steps that is about to be written: the records that
            explain them must survive a power cut first.
        branch_of: The journal's branch that a step of that number belongs to.
    """

    folders: tuple[Path, ...]
    aio: Aio
    before_write: Callable[[int], None]
    branch_of: Callable[[int], int]


class RunFiles:
    """Reads and writes units by index.

    Args:
        disk: Where.
        units: Those that rest there.
        base: Holds what the run has not written, if a converted model is its base.
    """

    def __init__(
        self, disk: Disk, units: Sequence[StoredUnit], base: BaseFiles | None = None
    ) -> None:
        self._disk = disk
        self._base = base
        self._units = list(units)
        self._store: UnitStore | None = None
        self._carries: dict[int, int] = {}
        self._nameless = True
        for folder in disk.folders:
            _refuse_what_is_no_folder(folder)

    def adopt(self, identity: Identity, steps: int, most: Callable[[int], int]) -> dict[int, int]:
        """Belong to a run from now on, and take what an earlier process of it left.

        Args:
            identity: Of the run.
            steps: That its journal holds; with none, what is on the disk is of no use.
            most: From a unit's index to the steps that it may carry at most.

        Returns:
            The steps that each unit carries which was found.

        Raises:
            StoreError: Another run's weights are there.
        """
        self.close()
        self._carries.clear()
        self._nameless = False
        folders = self._disk.folders
        if is_store(folders) and not steps and manifest_run(folders[0] / MANIFEST) == identity.run:
            with held(folders):  # a run that is at work keeps what it has
                _remove(folders)
        self._open(identity)
        assert self._store is not None
        for unit in self._units:
            found = self._store.version(unit.index)
            if found is None or found.step > most(unit.index):
                continue
            if found.branch == self._disk.branch_of(found.step):
                self._carries[unit.index] = found.step
        return dict(self._carries)

    def holds(self, unit: int) -> bool:
        """Whether the unit has been written or adopted, or is in the base's files."""
        return unit in self._carries or self._base is not None

    def carries(self, unit: int) -> int:
        """Steps that the unit carries on the disk, or will when it has been written."""
        return self._carries[unit] if self._base is None else self._carries.get(unit, 0)

    def read(self, unit: int, wire: torch.Tensor, rest: torch.Tensor | None) -> "Future[int]":
        """See :meth:`UnitStore.read`."""
        if self._base is not None and unit not in self._carries:
            return self._base.read(unit, wire, rest)
        assert self._store is not None
        return self._store.read(unit, wire, rest)

    def write(self, unit: int, wire: torch.Tensor, rest: torch.Tensor, step: int) -> "Future[None]":
        """See :meth:`UnitStore.write`."""
        if self._store is None:
            self._open(Identity(NAMELESS + secrets.token_hex(8), "00" * 32, FORMAT))
        assert self._store is not None
        self._disk.before_write(step)
        done = self._store.write(unit, wire, rest, step, self._disk.branch_of(step))
        self._carries[unit] = step
        return done

    def close(self) -> None:
        """Sync and close; what nobody could use later is removed."""
        store, self._store = self._store, None
        if store is not None:
            store.close()
            if self._nameless:
                _remove(self._disk.folders)

    @property
    def bytes_read(self) -> int:
        """Since the files were opened, the base's among them."""
        base = self._base.bytes_read if self._base is not None else 0
        return base + (self._store.bytes_read if self._store is not None else 0)

    @property
    def bytes_written(self) -> int:
        """Since the store was opened."""
        return self._store.bytes_written if self._store is not None else 0

    @property
    def held_bytes(self) -> int:
        """Size of the store's files."""
        return self._store.held_bytes if self._store is not None else 0

    @property
    def life_bytes(self) -> int:
        """Written since the files were made: what the disks have worn."""
        return self._store.life_bytes if self._store is not None else 0

    def _open(self, identity: Identity) -> None:
        folders = self._disk.folders
        _refuse_a_base(folders)
        if is_store(folders) and manifest_run(folders[0] / MANIFEST).startswith(NAMELESS):
            with held(folders):  # its run is over, or this refuses
                logger.warning("%s: weights of a run that was killed, which kept no journal, are "
                               "removed", folders[0])  # fmt: skip
                _remove(folders)
        if not is_store(folders):
            create_store(folders, identity, self._units, self._disk.aio)
        self._store = UnitStore(folders, identity, self._units, self._disk.aio)


def _refuse_what_is_no_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise StoreError(
            f"{folder}: expected a directory, found a file; is offload_param.nvme_path right?"
        )


def _refuse_a_base(folders: Sequence[Path]) -> None:
    """A run writes none, and removes none."""
    for folder in folders:
        if is_store([folder]) and manifest_run(folder / MANIFEST) == NO_RUN:
            raise StoreError(
                f"{folder}: the units of a converted model lie there, which other runs read; give "
                "this run its own offload_param.nvme_path"
            )


def _remove(folders: Sequence[Path]) -> None:
    """Take a store's own files away; of a folder that holds nothing else, the folder, too."""
    for folder in folders:  # the first one's manifest makes it a store
        for name in (MANIFEST, CLEAN, SLOTS, LOCK):
            (folder / name).unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()
