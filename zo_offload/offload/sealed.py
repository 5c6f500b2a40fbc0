"""JSON files that say when they are damaged: a format's number, the content, and its CRC-32C."""

import json
from pathlib import Path
from typing import Any

import torch

from zo_offload.errors import StoreError
from zo_offload.files import write_file
from zo_offload.offload.disk import errors_of
from zo_offload.ops import crc32c


def write_sealed(path: Path, version: int, content: dict[str, Any]) -> None:
    """Write it aside, sync, rename.

    Raises:
        StoreError: The system refuses.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "store.json"
        ...     write_sealed(path, 1, {"units": 3})
        ...     read_sealed(path, 1, "make it again")
        {'units': 3}
    """
    content = {"format": version, **content}
    sealed = {"content": content, "crc32c": _crc(content)}
    with errors_of(path, "write it"):
        write_file(path, (json.dumps(sealed, indent=1) + "\n").encode())


def read_sealed(path: Path, version: int, mend: str) -> dict[str, Any]:
    """What was written.

    Args:
        path: Of the file.
        version: The format that the caller reads.
        mend: What to do about another format or damage, for the message.

    Raises:
        StoreError: It is missing, damaged or of another format.
    """
    with errors_of(path, "read it"):
        text = path.read_bytes()
    try:
        sealed = json.loads(text)
        content, crc = sealed["content"], sealed["crc32c"]
    except (ValueError, KeyError, TypeError, RecursionError):
        content = crc = None
    if not isinstance(content, dict) or _crc(content) != crc:
        raise StoreError(f"{path}: damaged; {mend}")
    found = content.pop("format", None)
    if found != version:
        raise StoreError(
            f"{path}: format {found}, but this zo_offload reads format {version}; {mend}"
        )
    return content


def _crc(content: dict[str, Any]) -> int:
    text = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    return crc32c(torch.frombuffer(bytearray(text), dtype=torch.uint8))
