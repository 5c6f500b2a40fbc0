"""The process group of a run: the launcher's ranks, or this process alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from zo_offload.errors import ConfigError


def init_distributed(port: int, required: bool | None = None) -> None:
    """Start the process group of the launcher's ranks, or of this process alone."""
    if not deepspeed.comm.is_initialized():
        alone = not {"RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS"} & set(os.environ)
        if alone and not torch.distributed.is_initialized():
            os.environ.setdefault("LOCAL_RANK", "0")
            torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        backend = accelerator().communication_backend_name()
        with _no_native_ops():
            deepspeed.init_distributed(
                dist_backend=backend, distributed_port=port, dist_init_required=required
            )
    num_ranks = deepspeed.comm.get_world_size()
    if num_ranks > 1:
        raise ConfigError(
            f"{num_ranks} ranks were started, but this version trains on one; "
            "start one process (deepspeed --num_accelerators 1)"
        )


@contextmanager
def _no_native_ops() -> Iterator[None]:
    """On a CPU DeepSpeed would compile a shared-memory op at start; scalars do not need it.

    Asking it which ops could be compiled runs a compiler as well, so it is not asked.
    """
    known = deepspeed.ops.__dict__
    before = known.get("__compatible_ops__")
    known["__compatible_ops__"] = {}
    try:
        yield
    finally:
        del known["__compatible_ops__"]
        if before is not None:
            known["__compatible_ops__"] = before


def accelerator() -> Any:
    """DeepSpeed's name for where forwards run."""
    return deepspeed.get_accelerator()
