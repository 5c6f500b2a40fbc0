"""The bytes of lossless12: its header, where its sections begin, and what is refused.

What they mean is in ``zo_offload/codec/lossless.py``.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from zo_offload.errors import CodecError
from zo_offload.ops.layout import HEADER_BYTES, padded

U8 = npt.NDArray[np.uint8]
MAGIC, VERSION, RAW, PACKED, ESCAPE = b"ZL12", 1, 0, 1, 15
TILE = 1024  # elements that share an entry of the table of escapes
HEADER = np.dtype(
    [
        ("magic", "S4"),
        ("version", "u1"),
        ("mode", "u1"),
        ("top", "u1"),  # the exponent that code 0 means
        ("zero", "u1"),
        ("elements", "<u8"),
        ("escapes", "<u8"),
        ("bytes", "<u8"),
        ("padding", "V32"),
    ]
)
assert HEADER.itemsize == HEADER_BYTES


@dataclass(frozen=True, slots=True)
class Sections:
    """Where the parts of a packed (not raw) lossless12 span begin.

    Attributes:
        tiles: Of 1,024 elements; the last may be shorter.
        planes: First byte of signs and mantissas.
        codes: First byte of exponent codes.
        escapes: First byte of escaped exponents.
        end: Bytes in all, a multiple of 64.
    """

    tiles: int
    planes: int
    codes: int
    escapes: int
    end: int


def sections(elements: int, num_escapes: int) -> Sections:
    """Lay a packed lossless12 span out.

    Example:
        >>> sections(2048, 3)
        Sections(tiles=2, planes=128, codes=2176, escapes=3200, end=3264)
    """
    tiles = -(-elements // TILE)
    planes = HEADER_BYTES + padded(4 * (tiles + 1))
    codes = planes + elements
    escapes = codes + elements // 2
    return Sections(tiles, planes, codes, escapes, padded(escapes + num_escapes))


def header_bytes(mode: int, top: int, elements: int, num_escapes: int, num_bytes: int) -> U8:
    """The first 64 bytes."""
    fields = (MAGIC, VERSION, mode, top, 0, elements, num_escapes, num_bytes, b"")
    return np.array([fields], HEADER).view(np.uint8)


@dataclass(frozen=True, slots=True)
class Header:
    """What the first 64 bytes say."""

    mode: int
    top: int
    escapes: int
    bytes: int


def read_header(packed: U8, elements: int, num_bytes: int | None = None) -> Header:
    """Read and check a header.

    Args:
        packed: At least its 64 bytes.
        elements: That the span has.
        num_bytes: Of the whole, where ``packed`` is only its beginning.

    Raises:
        CodecError: It is not that of a packed span of so many elements and bytes.
    """
    num_bytes = len(packed) if num_bytes is None else num_bytes
    if num_bytes < HEADER_BYTES:
        raise CodecError(wrong(f"{num_bytes} bytes, expected {HEADER_BYTES} at least"))
    head = packed[:HEADER_BYTES].view(HEADER)[0]
    mode, top, escapes, length = (int(head[k]) for k in ("mode", "top", "escapes", "bytes"))
    if head["magic"] != MAGIC or head["version"] != VERSION or mode not in (RAW, PACKED):
        raise CodecError(wrong("its header is not one"))
    if head["elements"] != elements:
        raise CodecError(wrong(f"its header says {head['elements']} elements, not {elements}"))
    if escapes > elements or (mode == PACKED and top < ESCAPE - 1) or (mode == RAW and escapes):
        raise CodecError(wrong(f"its header says {escapes} escapes below exponent {top}"))
    due = sections(elements, escapes).end if mode == PACKED else HEADER_BYTES + 2 * elements
    if length != due or length > num_bytes:
        raise CodecError(wrong(f"{num_bytes} bytes, its header says {length}, expected {due}"))
    return Header(mode, top, escapes, length)


def wrong(what: str) -> str:
    """The message of a :class:`CodecError`."""
    return f"lossless12: damaged: {what}; encode the weights again"
