"""CRC-32C (Castagnoli): tells what a disk gave back from what it was given.

C++ serves where it was built; NumPy otherwise, with the same values, twenty times as slow. Bits of
a byte string are coefficients of a polynomial modulo 2, and its CRC is a remainder, hence linear:
a row of words is folded onto the next one by tables that multiply by the power of x between them,
and what is left of the last row is folded in halves.

Reference: RFC 3720, 12.1 and B.4.
"""

from functools import lru_cache

import numpy as np
import torch

from zo_offload.ops import kernels
from zo_offload.ops.native import Native

POLYNOMIAL = 0x82F63B78  # x^0 is bit 31
ONE = 0x80000000
WORD_BYTES = 8
ROWS = {0: 1 << 9, 1 << 20: 1 << 13}  # words folded at a time, from so many bytes on


def crc32c(data: torch.Tensor, initial: int = 0, num_threads: int | None = None) -> int:
    """The CRC-32C of a tensor's bytes.

    Args:
        data: Contiguous, in host memory.
        initial: CRC of the bytes before, to go on from.
        num_threads: At most (default: torch's).

    Example:
        >>> digits = torch.tensor(list(b"123456789"), dtype=torch.uint8)
        >>> hex(crc32c(digits))
        '0xe3069283'
        >>> crc32c(digits[4:], crc32c(digits[:4])) == crc32c(digits)
        True
    """
    serving = kernels.serving_for(data)
    if isinstance(serving, Native):
        return serving.crc32c(data, initial, num_threads)
    return crc32c_numpy(data.flatten().view(torch.uint8).numpy(), initial)


def combined(first: int, second: int, second_bytes: int) -> int:
    """The CRC of two byte strings in a row, from the CRC of each.

    Example:
        >>> digits = torch.tensor(list(b"123456789"), dtype=torch.uint8)
        >>> combined(crc32c(digits[:4]), crc32c(digits[4:]), 5) == crc32c(digits)
        True
    """
    return _times(_power(8 * second_bytes), first) ^ second


def crc32c_numpy(data: np.ndarray, initial: int = 0) -> int:
    """:func:`crc32c` in NumPy; ``data`` is uint8 ``[n]``."""
    state = initial ^ 0xFFFFFFFF
    if len(data) < 4 * WORD_BYTES:
        return _by_bytes(state, data.tobytes()) ^ 0xFFFFFFFF
    width = next(width for least, width in reversed(ROWS.items()) if len(data) >= least)
    row_bytes = width * WORD_BYTES
    head_bytes = len(data) % row_bytes
    if head_bytes < 4 and len(data) >= row_bytes:
        head_bytes += row_bytes  # the state goes onto its first four bytes
    # zeros before change nothing
    head = np.zeros(-(-head_bytes // row_bytes) * row_bytes, np.uint8)
    start = len(head) - head_bytes
    head[start:] = data[:head_bytes]
    head[start : start + 4] ^= np.frombuffer(state.to_bytes(4, "little"), np.uint8)
    folded = np.zeros(width, np.uint64)
    for part in (head, data[head_bytes:]):
        for at in range(0, len(part), row_bytes):
            row = np.frombuffer(part[at : at + row_bytes], "<u8")
            folded = _shifted(folded, width) ^ row
    while len(folded) > 1:
        half = len(folded) // 2
        folded = _shifted(folded[:half], half) ^ folded[half:]
    return _by_bytes(0, int(folded[0]).to_bytes(WORD_BYTES, "little")) ^ 0xFFFFFFFF


def _shifted(words: np.ndarray, distance: int) -> np.ndarray:
    """Words of 64 coefficients, times x^(64 distance), as remainders at their word's end."""
    wide = 16 if distance in ROWS.values() else 8
    lanes = words.view(f"<u{wide // 8}").reshape(len(words), 64 // wide)
    tables = _tables(distance, wide)
    total = tables[0].take(lanes[:, 0])
    for lane in range(1, len(tables)):
        total ^= tables[lane].take(lanes[:, lane])
    return total


@lru_cache(maxsize=64)
def _tables(distance: int, wide: int) -> np.ndarray:
    """``[64 / wide, 2^wide]``: what each lane of a word becomes ``distance`` words later."""
    tables = np.zeros((64 // wide, 1 << wide), np.uint64)
    for lane, table in enumerate(tables):
        for bit in range(wide):
            # bit b of a word is x^(63 - b); a remainder of 32 bits fills the word's first half
            power = _power(64 * distance + 63 - (lane * wide + bit) - 32)
            table[1 << bit : 2 << bit] = table[: 1 << bit] ^ np.uint64(power)
    return tables


@lru_cache(maxsize=4096)
def _power(exponent: int) -> int:
    """x^exponent modulo the polynomial."""
    result, square = ONE, ONE >> 1
    while exponent:
        if exponent & 1:
            result = _times(result, square)
        square = _times(square, square)
        exponent >>= 1
    return result


def _times(a: int, b: int) -> int:
    product = 0
    while a:
        if a & ONE:
            product ^= b
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ (POLYNOMIAL if b & 1 else 0)
    return product


@lru_cache(maxsize=1)
def _byte_table() -> list[int]:
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = crc >> 1 ^ (POLYNOMIAL if crc & 1 else 0)
        table.append(crc)
    return table


def _by_bytes(state: int, data: bytes) -> int:
    table = _byte_table()
    for value in data:
        state = state >> 8 ^ table[(state ^ value) & 255]
    return state
