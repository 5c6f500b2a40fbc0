"""The folders of a store: made whole, held by one run, found to be what they should be."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from zo_offload.errors import StoreError
from zo_offload.files import locked, make_directory
from zo_offload.offload.aio import Aio
from zo_offload.offload.disk import allocate, errors_of
from zo_offload.offload.manifest import (
    MANIFEST,
    SLOTS,
    Geometry,
    geometry_for,
    manifest_run,
    write_manifests,
)
from zo_offload.offload.slot import AGAIN, Identity, StoredUnit

SPARES = 4  # writes that may be under way, or wait for a sync, beside a whole version of every unit


def is_store(folders: Sequence[Path]) -> bool:
    """Whether a store was made there, to its end."""
    return (folders[0] / MANIFEST).exists()


def create_store(
    folders: Sequence[Path],
    identity: Identity,
    units: Sequence[StoredUnit],
    aio: Aio | None = None,
    spares: int = SPARES,
) -> None:
    """Make the files of a store that holds nothing yet, with all their room on the disk.

    Args:
        folders: One for each path; made where they are missing, readable by this user only.
        identity: Whose weights it will hold.
        units: What they are.
        aio: Its ``block_size`` is the size of the stripes.
        spares: Slots beside one for each unit; 0 for a base, whose units are written once.

    Raises:
        StoreError: There is one, or not enough space.
    """
    for folder in folders:
        with errors_of(folder, "make it"):
            make_directory(folder)
    with held(folders):
        for folder in folders:
            _clear(folder, identity, is_first=folder == folders[0])
        geometry = geometry_for(len(folders), units, spares, (aio or Aio()).block_size)
        allocate([folder / SLOTS for folder in folders], geometry.file_bytes)
        write_manifests(folders, geometry, identity, units)


@contextmanager
def held(folders: Sequence[Path]) -> Iterator[None]:
    """Hold all folders alone.

    Raises:
        StoreError: Another run has one of them.
    """
    with ExitStack() as stack:
        for folder in folders:
            with errors_of(folder, "hold it"):
                try:
                    stack.enter_context(locked(folder))
                except BlockingIOError as error:
                    raise StoreError(
                        f"{folder}: another run has these files; end that run, or give this one "
                        "its own offload_param.nvme_path"
                    ) from error
        yield


def check_files(folders: Sequence[Path], geometry: Geometry, identity: Identity) -> None:
    """Refuse files that were cut short.

    Raises:
        StoreError: Says how long one is, and should be.
    """
    for folder in folders:
        path = folder / SLOTS
        with errors_of(path, "look at it"):
            found = path.stat().st_size
        if found < geometry.file_bytes:
            raise StoreError(
                f"{path}: {found:,} bytes, but {geometry.file_bytes:,} were made; it was cut "
                f"short: restore it, or {identity.mend}"
            )


def _clear(folder: Path, identity: Identity, is_first: bool) -> None:
    """Remove what a crash half way through making the same store left."""
    manifest = folder / MANIFEST
    if manifest.exists() and (is_first or manifest_run(manifest) != identity.run):
        raise StoreError(f"{folder}: a store is there already; open it, or {AGAIN}")
    with errors_of(folder, "clear it"):
        for path in (manifest, folder / SLOTS):
            path.unlink(missing_ok=True)
