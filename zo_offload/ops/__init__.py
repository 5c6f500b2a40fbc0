"""Kernels: noise, perturbation, update; one contract (``reference``), several implementations."""

from zo_offload.ops.crc import crc32c
from zo_offload.ops.draws import Draw, Point, StepUpdate
from zo_offload.ops.kernels import perturb, perturb_rows, update
from zo_offload.ops.span import ALIGNMENT, Segment, Span
from zo_offload.ops.torch_ops import encode, load_master, noise, store_master

__all__ = [
    "ALIGNMENT",
    "Draw",
    "Point",
    "Segment",
    "Span",
    "StepUpdate",
    "crc32c",
    "encode",
    "load_master",
    "noise",
    "perturb",
    "perturb_rows",
    "store_master",
    "update",
]
