"""Bytes of a parameter on the wire, and of what stays with its master.

Vectors are never packed. A wire format that loses bits cannot give the master back, so that one
lies beside it whole; the others hold its upper part.
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


def room_bytes(wire: str, dtype: torch.dtype) -> float:
    """Of a matrix element of a frozen base, which rests packed, on the way too.

    How far lossless12 shrinks is not known before the weights are read: it has room for the worst.

    Example:
        >>> room_bytes("lossless12", torch.bfloat16), room_bytes("nf4", torch.bfloat16)
        (2, 0.515625)
    """
    return dtype.itemsize if wire == "lossless12" else wire_bytes(wire, dtype)


def keeps_all(wire: str, dtype: torch.dtype) -> bool:
    """Whether the forward's weights can be had back from the wire.

    Example:
        >>> keeps_all("lossless12", torch.bfloat16), keeps_all("nf4", torch.bfloat16)
        (True, False)
    """
    return wire == "identity" or (dtype == torch.bfloat16 and wire in ("bf16", "lossless12"))


def rest_bytes(wire: str, dtype: torch.dtype, master: str) -> float:
    """Of a matrix element that stays home, where it is trained.

    Example:
        >>> (
        ...     rest_bytes("identity", torch.bfloat16, "fp32"),
        ...     rest_bytes("nf4", torch.bfloat16, "fp32"),
        ... )
        (2, 4)
    """
    whole = MASTERS[master] if dtype == torch.bfloat16 else MASTERS["fp32"]
    if not keeps_all(wire, dtype):
        return whole
    if dtype == torch.float16:
        return whole  # rounded from an fp32 master
    return whole - dtype.itemsize
