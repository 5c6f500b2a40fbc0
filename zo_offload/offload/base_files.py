"""Base weights on disk: the files of a store, written once, which any number of runs read.

They are a store without spare slots (``nvme.py``), of no run, closed cleanly. Nothing is locked and
nothing written, so that they may lie on a medium that cannot be written at all.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import torch

from zo_offload.errors import StoreError
from zo_offload.offload.aio import Aio
from zo_offload.offload.direct import DirectFile
from zo_offload.offload.folders import check_files
from zo_offload.offload.manifest import SLOTS, read_clean, read_manifests
from zo_offload.offload.recovery import read_version, recover
from zo_offload.offload.slot import (
    CONVERT_AGAIN,
    NO_RUN,
    Identity,
    StoredUnit,
    check_sizes,
)


class BaseFiles:
    """The base weights, written once (by a :class:`UnitStore` without spares), never changed.

    Args:
        folders: One for each path.
        base: SHA-256 of the base weights, in hexadecimal.
        codec: Name of the wire's format.
        units: What it holds.
        aio: Size and number of transfers.

    Raises:
        StoreError: It is missing, unfinished, damaged, or of something else.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        base: str,
        codec: str,
        units: Sequence[StoredUnit],
        aio: Aio | None = None,
    ) -> None:
        identity = base_identity(base, codec)
        self._units = {unit.index: unit for unit in units}
        self._geometry = read_manifests(folders, identity, units)
        check_files(folders, self._geometry, identity)
        clean = read_clean(folders[0])
        if clean is None:
            raise StoreError(f"{folders[0]}: a base that was not finished; {CONVERT_AGAIN}")
        paths = [folder / SLOTS for folder in folders]
        self._file = DirectFile(paths, aio, stripe_bytes=self._geometry.stripe_bytes)
        try:
            self._found = recover(self._file, self._geometry, identity, units, clean)
            if len(self._found.headers) < len(units) or self._found.verified:
                raise StoreError(
                    f"{folders[0]}: a base with {len(self._found.headers)} of {len(units)} units; "
                    f"{CONVERT_AGAIN}"
                )
        except BaseException:
            self._file.close()
            raise

    @property
    def bytes_read(self) -> int:
        """Since it was opened."""
        return self._file.bytes_read

    def read(
        self, index: int, wire_out: torch.Tensor, rest_out: torch.Tensor | None = None
    ) -> "Future[int]":
        """As :meth:`UnitStore.read`; the step is 0."""
        check_sizes(self._units[index], wire_out, rest_out)
        offset = self._found.slots[index] * self._geometry.slot_bytes
        return read_version(
            self._file,
            offset,
            self._units[index],
            self._found.headers[index],
            (wire_out, rest_out),
            lambda is_right: None,
            CONVERT_AGAIN,
        )

    def close(self) -> None:
        """Wait for what is under way, and close the files."""
        self._file.close()


def base_identity(base: str, codec: str) -> Identity:
    """Of base weights, which are of no run."""
    return Identity(NO_RUN, base, codec)
