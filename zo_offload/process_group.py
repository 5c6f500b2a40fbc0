"""The process group of a run: the launcher's ranks, or this process alone, and the link among them.

``deepspeed``, ``torchrun`` and ``mpirun`` each tell a process its rank in their own way; DeepSpeed
reads them all, and ``srun`` is read here. What ranks exchange in a step does not go through the
group but over a link of our own (``replica``): under MPI, messages; elsewhere, connections with
rank 0.
"""

import atexit
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import deepspeed
import torch.distributed as dist
from torch.distributed import (
    HashStore,  # pyright: ignore[reportPrivateImportUsage]
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
)

from zo_offload import launched
from zo_offload.errors import ReplicaError
from zo_offload.interface import choose_interface
from zo_offload.replica import Alone, Link, Replica

INVITED = "invitation"  # key in the store
_replica: Replica | None = None


def init_distributed(port: int = 29500, required: bool | None = None) -> None:
    """Start the process group of the launcher's ranks, or of this process alone.

    It ends with the process: gloo aborts where it is left behind.
    """
    if deepspeed.comm.is_initialized():
        return
    atexit.register(_leave)
    if launched.by_srun():
        os.environ.update({**launched.slurm_variables(port), **_rendezvous()})
    if not dist.is_initialized() and not launched.by_launcher():
        os.environ.setdefault("LOCAL_RANK", "0")
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    if launched.by_mpi():
        _check_mpi()
    if launched.num_ranks() > 1:
        choose_interface(os.environ.get("MASTER_ADDR", socket.gethostname()))
    with _told_where(port):
        if not dist.is_initialized() and launched.has_stale_store():
            _join_afresh()
        with no_native_ops():
            deepspeed.init_distributed(
                dist_backend=accelerator().communication_backend_name(),
                distributed_port=port,
                dist_init_required=required,
                verbose=False,
            )


@contextmanager
def _told_where(port: int) -> Iterator[None]:
    """Errors of the process group in one line: who wanted to meet whom, and where."""
    try:
        yield
    except dist.DistError as error:
        place = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', port)}"
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ReplicaError(
            f"rank {launched.rank()} of {launched.num_ranks()} could not meet the others at "
            f"{place}: {said[0].rstrip('.')}; see that every rank was started and reaches it, and "
            "that the port is free there (MASTER_PORT chooses another)"
        ) from error


def _join_afresh() -> None:
    """``torchrun``'s store outlives a restart; under keys of our own nobody meets who is gone."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, num_ranks = launched.rank(), launched.num_ranks()
    store = TCPStore(address, port, num_ranks, is_master=False)
    store = PrefixStore(f"restart-{launched.num_restarts()}", store)
    backend = accelerator().communication_backend_name()
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks)


def _rendezvous() -> dict[str, str]:
    """Where the user wants ranks to meet."""
    names = ("MASTER_ADDR", "MASTER_PORT")
    return {name: os.environ[name] for name in names if name in os.environ}


def _check_mpi() -> None:
    """With two MPIs on a host, mpi4py may load the one that did not start the ranks."""
    from mpi4py import MPI

    started, seen = launched.num_ranks(), MPI.COMM_WORLD.Get_size()
    if seen != started:
        raise ReplicaError(
            f"the MPI launcher started {started} ranks, and mpi4py, which has loaded "
            f"{MPI.Get_library_version().split(',')[0].strip()}, sees {seen}; name the launcher's "
            "own library: MPI4PY_LIBMPI=libmpi.so.40 for Open MPI, libmpi.so.12 for MPICH"
        )


def replica() -> Replica:
    """This rank among the others; connected once a process, by all ranks together.

    Raises:
        ReplicaError: A rank does not come, or cannot be reached.
    """
    global _replica
    if _replica is None:
        _replica = Replica(_link())
    return _replica


def _link() -> Link:
    world_size = dist.get_world_size()
    if world_size == 1:
        return Alone()
    if launched.by_mpi():
        from mpi4py import MPI

        from zo_offload.replica.mpi import MPILink

        _abort_with_this_rank()
        return MPILink(MPI.COMM_WORLD)
    from zo_offload.replica.sockets import connect

    address = os.environ.get("MASTER_ADDR")
    if not address:
        raise ReplicaError(
            "MASTER_ADDR is not set: the host where rank 0 can be reached. Launchers set it; "
            "where a program has started its own process group, it has to"
        )
    return connect(dist.get_rank(), world_size, address, _share)


def accelerator() -> Any:
    """DeepSpeed's name for where forwards run."""
    return deepspeed.get_accelerator()


def _share(data: bytes) -> bytes:
    """Rank 0's bytes on every rank, by the store over which the group has met.

    Not by the group: NCCL would take memory of the device for its communicator, which nothing else
    here needs.
    """
    store = PrefixStore("zo_offload", dist.distributed_c10d._get_default_store())
    if dist.get_rank():
        return bytes.fromhex(store.get(INVITED).decode())
    store.set(INVITED, data.hex())
    return data


def abort() -> None:
    """End all ranks of an MPI run at once, this one too."""
    from mpi4py import MPI

    MPI.COMM_WORLD.Abort(1)


def _leave() -> None:
    global _replica
    if _replica is not None:
        _replica.close()
        _replica = None
    if dist.is_initialized():
        dist.destroy_process_group()


def _abort_with_this_rank() -> None:
    """Under MPI a rank that ends by an exception would wait at its exit for the others."""
    inner = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        inner(kind, error, trace)
        sys.stderr.flush()
        abort()

    sys.excepthook = hook


@contextmanager
def no_native_ops() -> Iterator[None]:
    """On a CPU DeepSpeed would compile a shared-memory op at start; scalars do not need it.

    Asking it which ops could be compiled runs a compiler as well, so it is not asked.
    """
    known = deepspeed.ops.__dict__
    before = known.get("__compatible_ops__")
    known["__compatible_ops__"] = {"deepspeed_shm_comm": False}
    try:
        yield
    finally:
        del known["__compatible_ops__"]
        if before is not None:
            known["__compatible_ops__"] = before
