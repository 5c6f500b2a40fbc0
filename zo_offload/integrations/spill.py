"""Weights that a loader makes anew rest in files until stores take them over.

transformers leaves a parameter where its checkpoint has it, as a view of a mapped file, unless it
converts it: experts merged into one tensor, tensors joined or turned, another dtype. What it made
then is memory of the process, and of a mixture of experts that is all of the model. Here such a
parameter is written to an unlinked file the moment it joins its module, and mapped again, so that
only the one under way takes memory. The file goes with the last view of it: parameter by parameter
as stores fill, and however the process ends.

Each file is synced before it is mapped: a disk that fails or is full says so then, and pages that
the system may drop at once do not crowd out those it may not.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from zo_offload.errors import StoreError
from zo_offload.offload.disk import errors_of

LEAST_BYTES = 64 << 10  # smaller ones stay: what they take together is little
SEQUENTIAL = "HF_DEACTIVATE_ASYNC_LOAD"  # else threads make more ahead of what is written
IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")
MAPS, MOUNTS = Path("/proc/self/maps"), Path("/proc/self/mountinfo")

logger = logging.getLogger(__name__)


@contextmanager
def spilled(folders: Sequence[Path]) -> Iterator[None]:
    """While a loader works: parameters that it does not map from a file, but makes, go to files.

    Args:
        folders: Where to, in order of preference; one that does not exist stands for the nearest
            directory above it that does.

    Raises:
        StoreError: There is no room on a disk, or it fails; from the loader, as it is.
    """
    hook = register_module_parameter_registration_hook(_Spill(folders))
    before = os.environ.get(SEQUENTIAL)
    os.environ[SEQUENTIAL] = "1"
    try:
        yield
    finally:
        hook.remove()
        if before is None:
            del os.environ[SEQUENTIAL]
        else:
            os.environ[SEQUENTIAL] = before


class _Spill:
    """Called with every parameter that joins a module."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self._to_come: dict[int, int] = {}  # bytes of parameters without values yet
        self._announced: set[Path] = set()

    def __call__(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is None:
            return
        if parameter.is_meta:
            self._to_come[id(parameter)] = parameter.nbytes
            return
        self._to_come.pop(id(module._parameters.get(name)), None)
        if _is_plain(parameter) and parameter.nbytes >= LEAST_BYTES and not is_in_file(parameter):
            folder = self._place(f"{type(module).__name__}.{name}", parameter.nbytes)
            parameter.data = in_file(parameter.data, folder)  # itself: what refers to it follows

    def _place(self, name: str, num_bytes: int) -> Path:
        """The first folder with room for all that may come; else for this parameter."""
        most = num_bytes + sum(self._to_come.values())
        found = [(each, *_room(each)) for each in dict.fromkeys(map(_existing, self._folders))]
        for wanted in (most, num_bytes):
            for folder, free, _ in found:
                if free >= wanted:
                    self._announce(folder, most)
                    return folder
        raise StoreError(
            f"{name}: made anew as it is loaded, it has to rest on a disk until a store takes it: "
            f"{num_bytes:,} bytes are needed, {most:,} at most for all such weights, but "
            f"{', '.join(f'{folder} {said}' for folder, _, said in found)}; free some space, or "
            "set TMPDIR to a folder on a larger disk"
        )

    def _announce(self, folder: Path, most: int) -> None:
        if folder not in self._announced:
            self._announced.add(folder)
            logger.info("%s: takes up to %s bytes while the model is loaded", folder, f"{most:,}")


def in_file(tensor: torch.Tensor, folder: Path) -> torch.Tensor:
    """The same values, contiguous, in an unlinked file that lives as long as they are used.

    Raises:
        StoreError: The disk is full, or fails.
    """
    content = tensor.detach().contiguous().flatten().view(torch.uint8)
    with errors_of(folder, f"write {len(content):,} bytes"), TemporaryFile(dir=folder) as file:
        file.write(content.numpy().data)
        file.flush()
        os.fsync(file.fileno())
        path = f"/proc/self/fd/{file.fileno()}"  # it has no other name
        mapped = torch.from_file(path, shared=False, size=len(content), dtype=torch.uint8)
    return mapped.view(tensor.dtype).view(tensor.shape)


def is_in_file(tensor: torch.Tensor) -> bool:
    """Whether the values are mapped from a file.

    Example:
        >>> is_in_file(torch.zeros(3))
        False
    """
    address = tensor.data_ptr()
    with errors_of(MAPS, "read it"), MAPS.open() as maps:
        for line in maps:  # start-end permissions offset device inode [path]
            start, _, end = line[: line.index(" ")].partition("-")
            if int(start, 16) <= address < int(end, 16):
                return line.split(maxsplit=5)[4] != "0"
    return False


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and type(tensor.data) is torch.Tensor


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    return next(each for each in (folder, *folder.parents) if os.path.isdir(each))


def _room(folder: Path) -> tuple[int, str]:
    """Bytes that may be written there, and what to say of them."""
    if not os.access(folder, os.W_OK | os.X_OK):
        return -1, "is not writable"
    if _is_in_memory(folder):
        return -1, "is in memory itself"
    with errors_of(folder, "ask for its free space"):
        found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    return free, f"has {free:,} free"


def _is_in_memory(folder: Path) -> bool:
    with errors_of(folder, "look at it"):
        device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with errors_of(MOUNTS, "read it"):
        lines = MOUNTS.read_text().splitlines()
    mounts = [line.split(" - ") for line in lines]  # id parent device ... - type source options
    return any(
        fields.split()[2] == number and kind.split()[0] in IN_MEMORY for fields, kind in mounts
    )
