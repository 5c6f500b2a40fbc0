"""Kernels: noise, perturbation, update; one contract (``reference``), several implementations."""

from zo_offload.ops.span import ALIGNMENT, Segment, Span
from zo_offload.ops.torch_ops import (
    Draw,
    StepUpdate,
    encode,
    load_master,
    noise,
    perturb,
    perturb_rows,
    store_master,
    update,
)

__all__ = [
    "ALIGNMENT",
    "Draw",
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
