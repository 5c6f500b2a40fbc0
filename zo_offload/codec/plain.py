"""Wires without scales: the forward's dtype as it is, bfloat16, fp16; in plain NumPy.

``bf16`` rounds to nearest with ties away from zero, by integers, as masters are; ``fp16`` to
nearest with ties to even. Every NaN becomes one (0x7fc0, 0x7e00).
"""

import math

import numpy as np
import numpy.typing as npt

from zo_offload.ops.reference import F32, canonical, round_bf16

U16 = npt.NDArray[np.uint16]


def widen(raw: npt.NDArray[np.generic]) -> F32:
    """Wire elements in fp32: ``float32``, ``float16``, or bfloat16 as its bits in ``uint16``.

    The NaN of fp32 and bfloat16 keep their bits; those of fp16 become one.
    """
    if raw.dtype == np.uint16:
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if raw.dtype == np.float16:
        with np.errstate(invalid="ignore"):  # signalling NaN
            return canonical(raw.astype(np.float32))
    return raw.astype(np.float32)


def encode_bf16(values: F32) -> U16:
    """The bits of the nearest bfloat16."""
    return round_bf16(values)


def encode_fp16(values: F32) -> U16:
    """The bits of the nearest fp16; what is beyond its 65,504 becomes infinite."""
    with np.errstate(over="ignore"):
        bits = values.astype(np.float16).view(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7E00), bits)


def error_bound(kind: str, absmax: float) -> float:
    """The most that a value of magnitude up to ``absmax`` can move.

    Example:
        >>> error_bound("bf16", 1.0) == 2**-8 + 2.0**-134, error_bound("fp16", 1e5)
        (True, inf)
    """
    if kind in ("identity", "lossless12"):
        return 0.0
    if kind == "bf16":
        return math.inf if absmax >= (2 - 2**-8) * 2.0**127 else absmax * 2**-8 + 2.0**-134
    return math.inf if absmax >= 65520 else absmax * 2**-11 + 2.0**-25
