"""Bytes of a parameter on the wire, and of what stays with its master.

Vectors are never packed. What is trained is packed each time that it travels, and rests as the
forward reads it, beside the lower part of its master.
"""

import torch

GROUP = 128  # elements that share a scale of two bytes

PACKED = {
    "bf16": 2.0,
    "lossless12": 1.51,
    "fp8_e4m3": 1 + 2 / GROUP,
    "int8": 1 + 2 / GROUP,
    "int4": 0.5 + 2 / GROUP,
    "nf4": 0.5 + 2 / GROUP,
}
"""Bytes a parameter; ``identity`` has the forward's."""

WIRES = ("identity", *PACKED)
MASTERS = {"fp32": 4, "bf16+8": 3, "bf16_sr": 2}
"""Bytes a parameter."""


def wire_bytes(wire: str, dtype: torch.dtype) -> float:
    """Of a matrix element that travels.

    Example:
        >>> wire_bytes("identity", torch.bfloat16), wire_bytes("nf4", torch.bfloat16)
        (2, 0.515625)
    """
    return PACKED.get(wire, dtype.itemsize)


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
