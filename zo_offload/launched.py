"""What the environment says of a launch; light to import, so that a rank knows itself at once.

``deepspeed`` and ``torchrun`` set the first name of each pair, Open MPI and MPICH the others.
"""

import os

RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def rank() -> int:
    """This process's number; 0 when it was started by itself."""
    return _first(RANKS, 0)


def num_ranks() -> int:
    """How many were started together."""
    return _first(SIZES, 1)


def by_launcher() -> bool:
    """Whether a launcher started this process, be it alone."""
    return any(name in os.environ for name in (*RANKS, "SLURM_NTASKS"))


def by_mpi() -> bool:
    """Whether it was ``mpirun`` or its like."""
    return any(name in os.environ for name in RANKS[1:])


def _first(names: tuple[str, ...], default: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name)), default)
