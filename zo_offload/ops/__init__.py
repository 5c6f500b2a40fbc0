"""Kernels: noise, perturbation, update; one contract (``reference``), several implementations."""

from zo_offload.ops.crc import crc32c
from zo_offload.ops.draws import Draw, Point, StepUpdate
from zo_offload.ops.kernels import (
    digest,
    encode,
    pack,
    perturb,
    perturb_rows,
    refuse_damage,
    store_master,
    unpack,
    update,
)
from zo_offload.ops.layout import Layout, layout_of
from zo_offload.ops.span import ALIGNMENT, Segment, Span
from zo_offload.ops.torch_codecs import group_scales
from zo_offload.ops.torch_ops import load_master, noise

__all__ = [
    "ALIGNMENT",
    "Draw",
    "Layout",
    "Point",
    "Segment",
    "Span",
    "StepUpdate",
    "crc32c",
    "digest",
    "encode",
    "group_scales",
    "layout_of",
    "load_master",
    "noise",
    "pack",
    "perturb",
    "perturb_rows",
    "refuse_damage",
    "store_master",
    "unpack",
    "update",
]
