"""bfloat16 in twelve bits, exactly: the reference, in plain NumPy.

The eight exponent bits of trained weights hold under three bits of information; signs and
mantissas look random. So a span is two planes: a byte of sign and mantissa, and half a byte that
says which of the 15 most populated neighbouring exponents an element has. Code 15 is an escape:
the exponent itself stands in a third section. A table says where each tile's escapes begin, so
that any stretch decodes alone. Data that would not shrink is kept raw behind the same header.

Entropy coders get to 1.4 bytes at several times the cost: Zhang et al. (2025), "70 % size, 100 %
accuracy: lossless LLM compression via dynamic-length float", arXiv:2504.11651, section 2 (the
entropy of exponents).
"""

import numpy as np
import numpy.typing as npt

from zo_offload.codec.groups import U8, pack_nibbles, unpack_nibbles
from zo_offload.errors import CodecError
from zo_offload.ops.layout import HEADER_BYTES
from zo_offload.ops.lossless12 import (
    ESCAPE,
    PACKED,
    RAW,
    TILE,
    header_bytes,
    read_header,
    sections,
    wrong,
)

U16 = npt.NDArray[np.uint16]


def top_of(histogram: npt.NDArray[np.int64]) -> int:
    """The largest of the 15 neighbouring exponents that most elements have.

    Args:
        histogram: ``[256]``, elements of each exponent.

    Where several windows hold as many, that of the smallest exponents.

    Example:
        >>> counts = np.zeros(256, np.int64)
        >>> counts[100:121] = range(21)
        >>> top_of(counts)
        120
    """
    total = np.concatenate([[0], np.cumsum(histogram)])
    return int(np.argmax(total[15:] - total[:-15])) + ESCAPE - 1


def encode(wire: U16) -> U8:
    """Pack bfloat16 bits ``[elements]``."""
    exponent = (wire >> 7 & 255).astype(np.uint8)
    top = top_of(np.bincount(exponent, minlength=256))
    below = top - exponent.astype(np.int64)
    escaped = (below < 0) | (below >= ESCAPE)
    num_escapes = int(escaped.sum())
    place = sections(len(wire), num_escapes)
    raw_bytes = HEADER_BYTES + 2 * len(wire)
    if place.end >= raw_bytes or num_escapes >= 2**32:
        header = header_bytes(RAW, 0, len(wire), 0, raw_bytes)
        return np.concatenate([header, wire.view(np.uint8)])
    packed = np.zeros(place.end, np.uint8)
    packed[:HEADER_BYTES] = header_bytes(PACKED, top, len(wire), num_escapes, place.end)
    tiles = np.add.reduceat(escaped, np.arange(0, len(wire), TILE), dtype=np.int64)
    table = np.concatenate([[0], np.cumsum(tiles)]).astype(np.uint32)
    packed[HEADER_BYTES : HEADER_BYTES + table.nbytes] = table.view(np.uint8)
    packed[place.planes : place.codes] = (wire >> 8 & 128 | wire & 127).astype(np.uint8)
    codes = np.where(escaped, ESCAPE, below).astype(np.uint8)
    packed[place.codes : place.escapes] = pack_nibbles(codes)
    packed[place.escapes : place.escapes + num_escapes] = exponent[escaped]
    return packed


def decode(packed: U8, elements: int) -> U16:
    """Unpack bfloat16 bits ``[elements]``.

    Raises:
        CodecError: The bytes are no packed span of so many elements.
    """
    head = read_header(packed, elements)
    if head.mode == RAW:
        return packed[HEADER_BYTES : head.bytes].view(np.uint16)
    place = sections(elements, head.escapes)
    codes = unpack_nibbles(packed[place.codes : place.escapes])
    escaped = codes == ESCAPE
    table = packed[HEADER_BYTES : HEADER_BYTES + 4 * (place.tiles + 1)].view("<u4")
    tiles = np.add.reduceat(escaped, np.arange(0, elements, TILE), dtype=np.int64)
    if table[0] or table[-1] != head.escapes or (np.diff(table.astype(np.int64)) != tiles).any():
        raise CodecError(wrong("its escapes do not match their table"))
    exponent = (head.top - codes.astype(np.int64)).astype(np.uint16)
    exponent[escaped] = packed[place.escapes : place.escapes + head.escapes]
    plane = packed[place.planes : place.codes].astype(np.uint16)
    return ((plane & 128) << 8 | exponent << 7 | plane & 127).astype(np.uint16)
