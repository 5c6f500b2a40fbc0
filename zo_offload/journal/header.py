"""The header: everything that changes bits, once, at the start of the file (``docs/format.md``)."""

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from zo_offload.errors import JournalError

MAGIC = b"\x89ZOJ\r\n\x1a\n"  # as PNG's: a transfer that mends line ends or strips a bit is seen
FORMAT_VERSION = 2
HEADER = struct.Struct("<8sIIQI")  # magic, format, contract, JSON bytes, branch; then the CRC
CRC = struct.Struct("<I")
SYNCED = struct.Struct("<QI")  # bytes of the file that a power cut cannot take; CRC of that
SYNCED_OFFSET = HEADER.size + CRC.size
HEADER_BYTES = SYNCED_OFFSET + SYNCED.size
MAX_JSON_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Header:
    """Everything that changes bits, as the journal stores it; ``fields`` is opaque JSON here."""

    fields: Mapping[str, Any]
    contract: int = 1
    branch: int = 0

    @property
    def crc(self) -> int:
        """What the CRC of every record starts from."""
        return CRC.unpack_from(self.pack(), HEADER.size)[0]

    def pack(self, synced: int | None = None) -> bytes:
        """The bytes at the start of the file, of which ``synced`` are on the disk, or these."""
        text = canonical(as_stored(self.fields))
        if len(text) > MAX_JSON_BYTES:
            raise JournalError(f"a header of {len(text)} bytes; at most {MAX_JSON_BYTES} fit")
        start = HEADER.pack(MAGIC, FORMAT_VERSION, self.contract, len(text), self.branch)
        crc = zlib.crc32(text, zlib.crc32(start))
        end = HEADER_BYTES + len(text) if synced is None else synced
        return start + CRC.pack(crc) + pack_synced(end, crc) + text


def pack_synced(num_bytes: int, header_crc: int) -> bytes:
    """What the header says of how much is on the disk; alone in it, it is written again."""
    return SYNCED.pack(num_bytes, zlib.crc32(num_bytes.to_bytes(8, "little"), header_crc))


def canonical(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, ASCII, floats that read back exactly.

    >>> canonical({"seed": 1, "eps": 0.001})
    b'{"eps":0.001,"seed":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def as_stored(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping as a journal gives it back: tuples are lists, keys are strings."""
    return json.loads(canonical(fields))


class Found(NamedTuple):
    """A header that was read.

    Attributes:
        header: What it says.
        crc: From which record CRCs start.
        num_bytes: Its length.
        synced: How much of the file was on the disk, at least; where that cannot be read, all.
    """

    header: Header
    crc: int
    num_bytes: int
    synced: int


def read_header(reader: BinaryIO, path: Path, file_bytes: int) -> Found:
    """Read it from the start of a file of so many bytes.

    Raises:
        JournalError: not a journal, another format, damaged, or not canonical JSON.
    """
    start = reader.read(HEADER_BYTES)
    if len(start) < HEADER_BYTES or not start.startswith(MAGIC):
        raise JournalError(
            f"{path}: not a journal: it does not start with a whole header"
            "; give the path of a journal, or restore it from a copy"
        )
    _, version, contract, json_bytes, branch = HEADER.unpack_from(start)
    (crc,) = CRC.unpack_from(start, HEADER.size)
    if version != FORMAT_VERSION:
        raise JournalError(
            f"{path}: journal format {version}, but this zo_offload reads format {FORMAT_VERSION}"
            "; use the version that wrote it"
        )
    if json_bytes > min(MAX_JSON_BYTES, file_bytes - HEADER_BYTES):
        raise JournalError(
            f"{path}: header of {json_bytes} bytes does not fit: the file has {file_bytes}, "
            f"the format allows {MAX_JSON_BYTES}"
            "; restore the file from a copy"
        )
    text = reader.read(json_bytes)
    if zlib.crc32(text, zlib.crc32(start[: HEADER.size])) != crc:
        raise JournalError(f"{path}: the header is damaged (CRC); restore the file from a copy")
    synced, _ = SYNCED.unpack_from(start, SYNCED_OFFSET)
    if pack_synced(synced, crc) != start[SYNCED_OFFSET:]:  # its writer may be at it
        synced = file_bytes
    header = Header(_parse(text, path), contract, branch)
    return Found(header, crc, HEADER_BYTES + json_bytes, synced)


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(text)
        if isinstance(fields, dict) and canonical(fields) == text:  # no NaN, no key twice
            return fields
    except (ValueError, RecursionError) as error:
        raise JournalError(
            f"{path}: the header is not JSON: {error}; restore the file from a copy"
        ) from error
    raise JournalError(
        f"{path}: the header is not a canonical JSON object; restore the file from a copy"
    )


def differences(journal: Any, run: Any, where: str = "header") -> Iterator[str]:
    """Names each key whose canonical JSON differs, with both values.

    >>> list(differences({"a": {"b": 1}}, {"a": {"b": 2}}, "header"))
    ['header.a.b: journal has 1, this run has 2']
    """
    if isinstance(journal, dict) and isinstance(run, dict):
        for key in sorted(journal.keys() | run.keys()):
            below = f"{where}.{_short(_shown(key)[1:-1])}"
            yield from differences(journal.get(key, _ABSENT), run.get(key, _ABSENT), below)
    elif (ours := _shown(journal)) != (theirs := _shown(run)):
        yield f"{where}: journal has {_short(ours)}, this run has {_short(theirs)}"


_ABSENT = object()


def _shown(value: Any) -> str:
    return "nothing" if value is _ABSENT else canonical(value).decode()


def _short(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"
