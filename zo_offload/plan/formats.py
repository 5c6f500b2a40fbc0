"""Bytes of a parameter on the wire, by the codec's own layout; vectors are never packed."""

import torch

from zo_offload.codec import codec_of

ELEMENTS = 1 << 20  # so many that padding does not count
LOSSLESS = "lossless12"
SHRUNK = 1.51  # bytes of an element that it shrinks, as weights of language models do


def wire_bytes(wire: str, dtype: torch.dtype) -> float:
    """Of a matrix element that travels.

    Example:
        >>> wire_bytes("identity", torch.bfloat16), wire_bytes("nf4", torch.bfloat16)
        (2, 0.515625)
        >>> wire_bytes("nf4:64", torch.bfloat16), wire_bytes("fp16", torch.float32)
        (0.53125, 2.0)
    """
    codec = codec_of(wire)
    if not codec.shrinks(dtype):
        return dtype.itemsize
    if codec.layout.kind == LOSSLESS:
        return SHRUNK
    return codec.capacity(ELEMENTS, dtype) / ELEMENTS
