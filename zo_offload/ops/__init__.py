"""Kernels: noise, perturbation, update; one contract (``reference``), several implementations."""

from zo_offload.ops.draws import Draw, Point, StepUpdate
from zo_offload.ops.kernels import encode, perturb, perturb_rows, store_master, update
from zo_offload.ops.span import ALIGNMENT, Segment, Span
from zo_offload.ops.torch_ops import load_master, noise

__all__ = [
    "ALIGNMENT",
    "Draw",
    "Point",
    "Segment",
    "Span",
    "StepUpdate",
    "encode",
    "load_master",
    "noise",
    "perturb",
    "perturb_rows",
    "store_master",
    "update",
]
