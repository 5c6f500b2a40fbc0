"""Every codec in plain NumPy: what the kernels must reproduce exactly, byte for byte."""

import numpy as np
import numpy.typing as npt

from zo_offload.codec import groups, lossless, plain
from zo_offload.codec.groups import U8
from zo_offload.ops.layout import Layout
from zo_offload.ops.reference import F32

Wire = npt.NDArray[np.uint16] | npt.NDArray[np.float16] | F32


def encode(layout: Layout, wire: Wire) -> U8:
    """Pack a span.

    Args:
        layout: The codec's.
        wire: ``[elements]``, a multiple of 128: float32, float16, or bfloat16 as bits in uint16.

    Returns:
        The bytes, a multiple of 64.
    """
    if layout.kind == "identity":
        return wire.view(np.uint8).copy()
    if layout.kind == "lossless12":
        assert wire.dtype == np.uint16
        return lossless.encode(wire.view(np.uint16))
    values = plain.widen(wire)
    if layout.group:
        return groups.encode(layout, values)
    narrow = plain.encode_bf16 if layout.kind == "bf16" else plain.encode_fp16
    return narrow(values).view(np.uint8)


def decode(layout: Layout, packed: U8, elements: int, kind: npt.DTypeLike) -> F32:
    """What packed bytes mean.

    Args:
        layout: The codec's.
        packed: As many as :func:`encode` gave.
        elements: Of the span.
        kind: dtype of the wire that was packed, as there.

    Returns:
        ``[elements]`` fp32.

    Example:
        >>> from zo_offload.ops import layout_of
        >>> packed = encode(layout_of("int4"), np.linspace(-7, 7, 128, dtype=np.float32))
        >>> decode(layout_of("int4"), packed, 128, np.float32)[[0, 64, 127]].tolist()
        [-7.0, 0.0, 7.0]
    """
    if layout.kind == "lossless12":
        return plain.widen(lossless.decode(packed, elements))
    if layout.group:
        return groups.decode(layout, packed, elements)
    kinds = {"identity": kind, "bf16": np.uint16, "fp16": np.float16}
    return plain.widen(packed.view(kinds[layout.kind])[:elements])
