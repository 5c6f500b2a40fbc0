"""The bit contract, in plain NumPy: what every kernel must reproduce exactly.

Written to be read, not to be fast. Three rules make identical bits possible on any device:

* noise is a pure function of a counter (Philox4x32-10), so no state is carried between elements;
* no multiply stands next to an add, so no compiler can fuse them: ``c * z`` is looked up in a table
  of float64 products rounded to fp32 (for signs, plus or minus c), and kernels only add;
* bfloat16 rounding is integer arithmetic, because hardware converts may flush denormals.

Counter layout, four 32-bit words: ``(block, parameter index, step, probe | stream << 16)``; the key
is the 64-bit seed, low word first. No counter is used twice in a run: block and parameter index
name the element, step and probe the direction, stream the purpose (0 noise, 1 dither of perturbed
copies, 2 rounding of masters, 3 the right factor of low-rank directions).

Reference: Salmon, Moraes, Dror, Shaw (2011), "Parallel random numbers: as easy as 1, 2, 3", SC11.
"""

from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
STREAM_NOISE = 0
STREAM_DITHER = 1
STREAM_ROUNDING = 2
STREAM_BASIS = 3

SIGNS_PER_BLOCK = 128  # one bit an element
HALVES_PER_BLOCK = 8  # sixteen bits an element
BYTES_PER_BLOCK = 16
CANONICAL_NAN = np.uint32(0x7FC00000)

U32 = npt.NDArray[np.uint32]
F32 = npt.NDArray[np.float32]


def philox4x32(counter: U32, seed: int) -> U32:
    """Ten rounds of Philox4x32.

    Args:
        counter: ``[n, 4]`` uint32.
        seed: 64-bit key, low word first.

    Returns:
        ``[n, 4]`` uint32.

    Example:
        >>> words = philox4x32(np.zeros((1, 4), np.uint32), 0)
        >>> [hex(int(w)) for w in words[0]]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = (counter[:, i].astype(np.uint64) for i in range(4))
    low = np.uint64(0xFFFFFFFF)
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(PHILOX_ROUNDS):
        p0 = c0 * np.uint64(PHILOX_MULTIPLIERS[0])
        p1 = c2 * np.uint64(PHILOX_MULTIPLIERS[1])
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & low,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & low,
        )
        k0 = (k0 + PHILOX_WEYL[0]) & 0xFFFFFFFF
        k1 = (k1 + PHILOX_WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def words(
    seed: int, step: int, probe: int, stream: int, parameter: int, first_block: int, num_blocks: int
) -> U32:
    """Random words ``[num_blocks, 4]`` of consecutive blocks of one parameter."""
    counter = np.empty((num_blocks, 4), np.uint32)
    counter[:, 0] = np.arange(first_block, first_block + num_blocks, dtype=np.uint64)
    counter[:, 1] = parameter
    counter[:, 2] = step
    counter[:, 3] = probe | stream << 16
    return philox4x32(counter, seed)


def halves(block_words: U32) -> U32:
    """Sixteen-bit lanes: element e is lane ``e % 8`` of block ``e // 8``, low half first."""
    pairs = np.stack([block_words & np.uint32(0xFFFF), block_words >> np.uint32(16)], axis=2)
    return pairs.reshape(-1)


def eighths(block_words: U32) -> U32:
    """Bytes: element e is byte ``e % 16`` of block ``e // 16``, low byte first."""
    shifts = np.arange(0, 32, 8, dtype=np.uint32)
    return ((block_words.reshape(-1, 1) >> shifts) & np.uint32(0xFF)).reshape(-1)


@lru_cache(maxsize=1)
def gaussian_cells() -> npt.NDArray[np.float64]:
    """The 4,096 values a gaussian element can take: cell means of the standard normal.

    Cell i holds the quantiles i/4096 to (i+1)/4096; its mean is 4096 (phi(a) - phi(b)). The means
    are scaled to unit variance, made symmetric, and put on a grid of 2^-20, which absorbs the
    last-digit differences of mathematical libraries: one table everywhere. Kurtosis 2.997.

    Example:
        >>> cells = gaussian_cells()
        >>> float(cells[0] + cells[-1]), round(float((cells**2).mean()), 5)
        (0.0, 1.0)
    """
    normal, count = NormalDist(), 4096
    edges = [normal.inv_cdf(i / count) for i in range(count // 2 + 1, count)]
    density = np.array([normal.pdf(0.0), *(normal.pdf(edge) for edge in edges), 0.0])
    upper = count * (density[:-1] - density[1:])
    upper /= np.sqrt((upper**2).mean())
    upper = np.round(upper * 2**20) / 2**20
    cells = np.concatenate([-upper[::-1], upper])
    cells.setflags(write=False)
    return cells


def rademacher(
    seed: int,
    step: int,
    probe: int,
    parameter: int,
    start: int,
    count: int,
    coefficient: float = 1.0,
) -> F32:
    """``coefficient * z``, z = +-1: bit ``e % 32`` of word ``e // 32 % 4`` of block ``e // 128``.

    A set bit means -1. The coefficient is float64, rounded once to fp32.
    """
    first = start // SIGNS_PER_BLOCK
    last = -(-(start + count) // SIGNS_PER_BLOCK)
    block_words = words(seed, step, probe, STREAM_NOISE, parameter, first, last - first)
    bits = (block_words.reshape(-1, 1) >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
    bits = bits.reshape(-1)[start - first * SIGNS_PER_BLOCK :][:count]
    return np.where(bits == 1, -np.float32(coefficient), np.float32(coefficient))


def gaussian(
    seed: int,
    step: int,
    probe: int,
    parameter: int,
    start: int,
    count: int,
    coefficient: float = 1.0,
) -> F32:
    """``coefficient * z``, z normal: the low 12 bits of a sixteen-bit lane choose a cell."""
    first = start // HALVES_PER_BLOCK
    last = -(-(start + count) // HALVES_PER_BLOCK)
    block_words = words(seed, step, probe, STREAM_NOISE, parameter, first, last - first)
    cell = (halves(block_words) & np.uint32(0xFFF))[start - first * HALVES_PER_BLOCK :][:count]
    return (np.float64(coefficient) * gaussian_cells()).astype(np.float32)[cell]


DIRECTIONS = {"rademacher": rademacher, "gaussian": gaussian}


def round_bf16(value: F32) -> npt.NDArray[np.uint16]:
    """Nearest bfloat16, ties away from zero, as bits; NaN becomes 0x7fc0."""
    bits = canonical(value).view(np.uint32)
    return ((bits + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16)


def dither_bf16(value: F32, random16: U32) -> npt.NDArray[np.uint16]:
    """Stochastic rounding to bfloat16: ``(bits + r) >> 16`` with r uniform on 0..65535.

    Infinities and NaN are kept.
    """
    bits = canonical(value).view(np.uint32)
    finite = (bits & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
    return ((bits + np.where(finite, random16, 0).astype(np.uint32)) >> np.uint32(16)).astype(
        np.uint16
    )


def canonical(value: F32) -> F32:
    """Every NaN as 0x7fc00000, everything else as it is."""
    value = np.ascontiguousarray(value, np.float32)
    return np.where(np.isnan(value), CANONICAL_NAN.view(np.float32), value)


def split_planes(master: F32) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int16]]:
    """An fp32 master as (hi, lo): hi is the nearest bfloat16 (ties away), lo the low sixteen bits.

    Truncating instead would bias every weight; ties to even could not be inverted.
    """
    bits = canonical(master).view(np.uint32)
    hi = ((bits + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16)
    return hi, (bits & np.uint32(0xFFFF)).astype(np.uint16).view(np.int16)


def join_planes(hi: npt.NDArray[np.uint16], lo: npt.NDArray[np.int16]) -> F32:
    """Inverse of :func:`split_planes`: ``(hi << 16) + sign_extend(lo)`` modulo 2^32.

    Example:
        >>> w = np.array([1.0, -3.14159, 1e-42, np.inf], np.float32)
        >>> bool((join_planes(*split_planes(w)) == w).all())
        True
    """
    wide = (hi.astype(np.int64) << 16) + lo.astype(np.int64)
    return (wide & 0xFFFFFFFF).astype(np.uint32).view(np.float32)


def round_master(value: F32, random: U32, bits: int) -> F32:
    """Stochastic rounding to the top ``bits`` of fp32: 16 for ``bf16_sr``, 24 for ``bf16+8``.

    Args:
        value: fp32 ``[n]``.
        random: ``[n]``, uniform on as many bits as are dropped: sixteen-bit lanes
            (:func:`halves`), or bytes (:func:`eighths`), of the step's rounding stream.
        bits: How many are kept.

    Infinities and NaN are kept.
    """
    raw = canonical(value).view(np.uint32)
    finite = (raw & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
    kept = np.uint32(0xFFFFFFFF << (32 - bits) & 0xFFFFFFFF)
    return ((raw + np.where(finite, random, 0).astype(np.uint32)) & kept).view(np.float32)


def nearest_master(value: F32, bits: int) -> F32:
    """Nearest value that a master of the top ``bits`` of fp32 can hold, ties away from zero."""
    raw = canonical(value).view(np.uint32)
    kept = np.uint32(0xFFFFFFFF << (32 - bits) & 0xFFFFFFFF)
    return ((raw + np.uint32(1 << (31 - bits))) & kept).view(np.float32)


def encode(value: F32, layout: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    """fp32 values as a master's format lays them out: what travels, and what rests (or None).

    The nearest that the format can hold, NaN canonical. bfloat16 is given as its bits. A wire that
    no master stands behind is that of ``fp32``, ``bf16_sr`` or ``fp16``.

    Args:
        value: ``[n]``, any bits.
        layout: ``fp32``, ``planes``, ``fp16``, ``bf16+8`` or ``bf16_sr``.

    Example:
        >>> wire, rest = encode(np.array([1.0 + 2**-8], np.float32), "planes")  # a tie
        >>> hex(int(wire[0])), int(rest[0])
        ('0x3f81', -32768)
    """
    value = canonical(value)
    if layout == "fp32":
        return value, None
    if layout == "fp16":
        with np.errstate(over="ignore"):
            return value.astype(np.float16), value
    if layout == "planes":
        return split_planes(value)
    if layout == "bf16_sr":
        return round_bf16(value), None
    kept = nearest_master(value, 24)
    return round_bf16(kept), (kept.view(np.uint32) >> np.uint32(8)).astype(np.uint8).view(np.int8)


def update_master(master: F32, terms: list[F32], decay: float = 1.0) -> F32:
    """One step: ``decay`` in float64 rounded once, then ``master - (t0 + t1 + ...)``, fp32 sums.

    Terms are added in (step, probe) order. No terms and decay 1 leave every bit as it was. A master
    of fewer bits is rounded afterwards (:func:`round_master`).
    """
    if decay != 1.0:
        master = canonical((master.astype(np.float64) * decay).astype(np.float32))
    if not terms:
        return master
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return canonical(master - total)


def digest(data: U32, first: int = 0) -> int:
    """Sum modulo 2^64 over 32-bit words ``w_i`` of ``mix(w_i + 2^32 i)``, i from ``first``.

    The digests of parts add up to that of the whole, in any order. The mix is SplitMix64's
    finalizer (Steele, Lea, Flood 2014): it finds accidents, not forgeries.

    Example:
        >>> words = np.arange(10, dtype=np.uint32)
        >>> digest(words) == (digest(words[:3]) + digest(words[3:], 3)) % 2**64
        True
    """
    place = np.arange(first, first + len(data), dtype=np.uint64)
    x = data.astype(np.uint64) + (place << np.uint64(32)) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return int((x ^ x >> np.uint64(31)).sum(dtype=np.uint64))
