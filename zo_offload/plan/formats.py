"""Bytes of a parameter on the wire, and of what stays with its master.

Vectors are never packed. What is trained is packed each time that it travels, and rests as the
forward reads it, beside the lower part of its master.
"""

import torch

from zo_offload.codec import codec_of

ELEMENTS = 1 << 20  # so many that padding does not count
LOSSLESS = 1.51  # bytes of an element that lossless12 shrinks, as weights of language models do
MASTERS = {"fp32": 4, "bf16+8": 3, "bf16_sr": 2}
"""Bytes a parameter."""


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
    if codec.layout.kind == "lossless12":
        return LOSSLESS
    return codec.capacity(ELEMENTS, dtype) / ELEMENTS


def packs(wire: str, dtype: torch.dtype) -> bool:
    """Whether a codec has anything to do.

    Example:
        >>> packs("bf16", torch.bfloat16), packs("bf16", torch.float32)
        (False, True)
    """
    return wire_bytes(wire, dtype) < dtype.itemsize


def room_bytes(wire: str, dtype: torch.dtype) -> float:
    """Of a matrix element, where memory is set aside before the weights are read.

    How far lossless12 shrinks is not known before the weights are read: it has room for the worst.

    Example:
        >>> room_bytes("lossless12", torch.bfloat16), room_bytes("nf4", torch.bfloat16)
        (2, 0.515625)
    """
    return dtype.itemsize if wire == "lossless12" else wire_bytes(wire, dtype)


def rest_bytes(dtype: torch.dtype, master: str) -> int:
    """Of a matrix element that stays home, where it is trained.

    Example:
        >>> rest_bytes(torch.bfloat16, "fp32"), rest_bytes(torch.float16, "fp32")
        (2, 4)
    """
    if dtype == torch.float16:
        return MASTERS["fp32"]  # of which the forward's are rounded
    whole = MASTERS[master] if dtype == torch.bfloat16 else MASTERS["fp32"]
    return whole - dtype.itemsize
