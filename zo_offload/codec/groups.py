"""Integers, 8-bit floats and NF4 with a scale a group: the reference, in plain NumPy.

``scale = up(absmax / qmax)``, rounded up to bfloat16, so that no code overflows; ``code = nearest(
x / scale)``; decoding is one fp32 product. A group that is all zero has scale 0 and decodes to
zeros; one that holds a NaN or an infinity has scale NaN and decodes to NaN throughout, so that
broken weights are seen and never turned into numbers.

For integers and 8-bit floats the product is exact (7 and 8 bits of mantissa), so even a compiler
that fuses it with an addition changes nothing; NF4's must stand alone.

Reference: Dettmers, Pagnoni, Holtzman, Zettlemoyer (2023), "QLoRA: efficient finetuning of
quantized LLMs", arXiv:2305.14314, section 3 and appendix E (NF4). Here scales are bfloat16, not
quantized again. Micikevicius et al. (2022), "FP8 formats for deep learning", arXiv:2209.05433
(E4M3).
"""

import numpy as np
import numpy.typing as npt

from zo_offload.ops.layout import (
    BLOCK,
    CODE_BITS,
    LARGEST,
    LARGEST_SCALE,
    NAN_SCALE,
    NF4,
    Layout,
    padded,
)
from zo_offload.ops.reference import F32, canonical

U8 = npt.NDArray[np.uint8]
NF4_VALUES = np.array(NF4, np.float32)
NF4_MIDPOINTS = ((NF4_VALUES[1:].astype(np.float64) + NF4_VALUES[:-1]) / 2).astype(np.float32)
# Half of the widest step between neighbouring codes, in units of the scale.
HALF_STEP = {"fp8_e4m3": 16.0, "int8": 0.5, "int4": 0.5, "nf4": 0.1519036}


def encode(layout: Layout, values: F32) -> U8:
    """Pack fp32 values.

    Args:
        layout: ``fp8_e4m3``, ``int8``, ``int4`` or ``nf4``.
        values: ``[elements]`` fp32, a multiple of 128.

    Returns:
        Codes, then the scales, padded to 64 bytes.
    """
    groups = values.reshape(-1, layout.group)
    scale_bits = scales_of(layout.kind, groups)
    scale = (scale_bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    usual = (scale > 0).reshape(-1, 1)  # neither NaN nor zero
    with np.errstate(invalid="ignore"):
        ratio = np.where(usual, groups, 0) / np.where(usual[:, 0], scale, 1).reshape(-1, 1)
    largest = LARGEST[layout.kind]
    ratio = np.clip(ratio.astype(np.float32), -largest, largest)  # a huge group's scale stops short
    codes = TO_CODE[layout.kind](ratio.reshape(-1))
    if CODE_BITS[layout.kind] == 4:
        codes = pack_nibbles(codes)
    scale_bytes = np.zeros(padded(2 * len(scale_bits)), np.uint8)
    scale_bytes[: 2 * len(scale_bits)] = scale_bits.view(np.uint8)
    return np.concatenate([codes, scale_bytes])


def decode(layout: Layout, packed: U8, elements: int, scale: F32 | None = None) -> F32:
    """Unpack ``[elements]`` fp32 values.

    Args:
        layout: Their codec's.
        packed: What :func:`encode` gave.
        elements: A multiple of 128.
        scale: Of every group, in place of those that are packed.
    """
    start = layout.scales_at(elements)
    if scale is None:
        scale = group_scales(layout, packed, elements)
    codes = packed[:start]
    if CODE_BITS[layout.kind] == 4:
        codes = unpack_nibbles(codes)
    with np.errstate(all="ignore"):
        return canonical(FROM_CODE[layout.kind](codes) * np.repeat(scale, layout.group))


def group_scales(layout: Layout, packed: U8, elements: int) -> F32:
    """Of every group, as they are packed."""
    start, count = layout.scales_at(elements), elements // layout.group
    scale_bits = packed[start : start + 2 * count].view(np.uint16)
    return (scale_bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def scales_of(kind: str, groups: F32) -> npt.NDArray[np.uint16]:
    """The bfloat16 bits of each group's scale.

    Args:
        kind: Of the codec.
        groups: ``[groups, group]`` fp32.
    """
    with np.errstate(invalid="ignore"):
        absmax = np.abs(groups).max(axis=1)
    broken = ~np.isfinite(groups).all(axis=1)
    quotient = np.where(broken, np.float32(0), absmax) / np.float32(LARGEST[kind])
    up = (quotient.astype(np.float32).view(np.uint32) + np.uint32(0xFFFF)) >> np.uint32(16)
    up = np.where(absmax > 0, np.maximum(up, 1), 0)  # a quotient may underflow
    up = np.minimum(up, LARGEST_SCALE[kind]).astype(np.uint16)
    return np.where(broken, np.uint16(NAN_SCALE), up)


def pack_nibbles(codes: U8) -> U8:
    """Two codes a byte: of every 128, the first 64 are low halves, the last 64 high halves."""
    pairs = codes.reshape(-1, 2, BLOCK // 2) & np.uint8(15)
    return (pairs[:, 0] | pairs[:, 1] << np.uint8(4)).reshape(-1)


def unpack_nibbles(packed: U8) -> U8:
    """Inverse of :func:`pack_nibbles`.

    Example:
        >>> codes = np.arange(256, dtype=np.uint8) % 16
        >>> bool((unpack_nibbles(pack_nibbles(codes)) == codes).all())
        True
    """
    block = packed.reshape(-1, BLOCK // 2)
    return np.stack([block & np.uint8(15), block >> np.uint8(4)], axis=1).reshape(-1)


def _to_integer(ratio: F32) -> U8:
    return np.rint(ratio).astype(np.int8).view(np.uint8)  # ties to even


def _from_int8(codes: U8) -> F32:
    return codes.view(np.int8).astype(np.float32)


def _from_int4(codes: U8) -> F32:
    return ((codes ^ np.uint8(8)).astype(np.int8) - np.int8(8)).astype(np.float32)


def _to_nf4(ratio: F32) -> U8:
    """Nearest; a tie takes the lower."""
    return np.searchsorted(NF4_MIDPOINTS, ratio, side="left").astype(np.uint8)


def _from_nf4(codes: U8) -> F32:
    return NF4_VALUES[codes]


def _to_fp8(ratio: F32) -> U8:
    """Nearest E4M3, ties to even: the values are in order of their codes, so search them."""
    magnitudes = _from_fp8(np.arange(127, dtype=np.uint8))  # 0 to 448
    midpoints = (magnitudes[1:] + magnitudes[:-1]) / 2  # exact
    size = np.abs(ratio)
    code = np.searchsorted(midpoints, size, side="left")
    tie = midpoints[np.minimum(code, 125)] == size
    code = np.where(tie & (code % 2 == 1), code + 1, code)
    return (code | np.signbit(ratio) << 7).astype(np.uint8)


def _from_fp8(codes: U8) -> F32:
    exponent, mantissa = (codes >> 3 & 15).astype(np.int32), (codes & 7).astype(np.float32)
    size = np.where(
        exponent == 0, np.ldexp(mantissa, -9), np.ldexp(1 + mantissa / np.float32(8), exponent - 7)
    )
    size = np.where(codes & 127 == 127, np.nan, size)
    return np.where(codes & 128, -size, size).astype(np.float32)


TO_CODE = {"fp8_e4m3": _to_fp8, "int8": _to_integer, "int4": _to_integer, "nf4": _to_nf4}
FROM_CODE = {"fp8_e4m3": _from_fp8, "int8": _from_int8, "int4": _from_int4, "nf4": _from_nf4}


def error_bound(kind: str, absmax: float) -> float:
    """The most that a value of a group can move, from the group's largest magnitude.

    ``(half step + 2^-15) * scale``; the scale is at most ``absmax / qmax`` rounded up to bfloat16,
    the 2^-15 stands for the roundings of fp32. Where it would make products overflow (magnitudes
    beyond 3.3e38) it stops short, and what is beyond its codes is added.

    Example:
        >>> error_bound("int8", 127.0)
        0.5039...
    """
    scale = absmax / LARGEST[kind] * (1 + 2**-7) + 2.0**-133
    most = np.array([LARGEST_SCALE[kind] << 16], np.uint32).view(np.float32)[0]
    beyond = max(0.0, absmax - LARGEST[kind] * float(most))
    return scale * (HALF_STEP[kind] + 2.0**-15) + beyond
