"""What the environment says of a launch; light to import, so that a rank knows itself at once.

``deepspeed`` and ``torchrun`` set the first name of each pair, Open MPI and MPICH the others.
Slurm's ``srun`` has names of its own, for each step of a job.
"""

import os
import re

RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
STEP_SIZE = "SLURM_STEP_NUM_TASKS"  # not in a batch script or salloc's shell, which are no ranks
TORCHRUN = "TORCHELASTIC_RUN_ID"
ONE_DEVICE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
NUM_SLURM_PORTS, SLURM_STEP_PORTS = 1000, 101


def rank() -> int:
    """This process's number; 0 when it was started by itself."""
    return int(os.environ["SLURM_PROCID"]) if by_srun() else _first(RANKS, 0)


def num_ranks() -> int:
    """How many were started together."""
    return int(os.environ[STEP_SIZE]) if by_srun() else _first(SIZES, 1)


def by_launcher() -> bool:
    """Whether a launcher started this process, be it alone."""
    return by_srun() or any(name in os.environ for name in RANKS)


def by_mpi() -> bool:
    """Whether ranks find each other through MPI: ``mpirun`` or its like has started them.

    Not where others set MPICH's names. DeepSpeed's launcher does for MPICH, and says itself where
    ranks meet (its ``LOCAL_SIZE``). Slurm with ``--mpi=pmi2`` does, in a step of as many tasks;
    where MPICH's own launcher uses srun it has one task a node, so the sizes differ, or nothing.
    Nor where MPI has started ``torchrun``, one a node, whose ranks it knows nothing of.
    """
    names = os.environ.keys()
    if TORCHRUN in names:
        return False
    slurms = STEP_SIZE in names and os.environ.get("PMI_SIZE") == os.environ[STEP_SIZE]
    mpichs = "PMI_RANK" in names and "LOCAL_SIZE" not in names and not slurms
    return mpichs or "OMPI_COMM_WORLD_RANK" in names


def by_srun() -> bool:
    """Whether it was Slurm itself, and not another launcher that it gave a place to."""
    return STEP_SIZE in os.environ and "RANK" not in os.environ and not by_mpi()


def num_restarts() -> int:
    """How often ``torchrun`` has started this host's ranks again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def has_stale_store() -> bool:
    """Whether ranks would meet over a store in which ranks before a restart have left theirs.

    On several hosts torchrun's count of restarts is a host's own, so nothing here can tell old from
    new; there ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` makes torchrun use a new store each time.
    """
    one_host = os.environ.get("GROUP_WORLD_SIZE") == "1"
    return one_host and num_restarts() > 0 and os.environ[AGENT_STORE] == "True"


def slurm_variables(port: int) -> dict[str, str]:
    """What ``srun`` says, by the names that DeepSpeed reads.

    With a GPU a task (``--gpus-per-task=1``) each task sees its own alone, which is number 0 to it.

    Args:
        port: Of the rendezvous; jobs with other numbers, and steps of a job, take others above it.
    """
    said = os.environ
    sees_one = any(name in said and said[name].isdecimal() for name in ONE_DEVICE)
    number = int(said["SLURM_JOB_ID"]) + SLURM_STEP_PORTS * int(said.get("SLURM_STEP_ID", "0"))
    return {
        "RANK": said["SLURM_PROCID"],
        "LOCAL_RANK": "0" if sees_one else said["SLURM_LOCALID"],
        "WORLD_SIZE": said[STEP_SIZE],
        "MASTER_ADDR": first_host(said["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(port + number % NUM_SLURM_PORTS),
    }


def first_host(nodes: str) -> str:
    """Of a list of nodes as Slurm writes it; the first task runs there.

    Example:
        >>> (
        ...     first_host("node[007-009,012],fat1"),
        ...     first_host("fat1,node3"),
        ...     first_host("a[0-1]b[2,4]"),
        ... )
        ('node007', 'fat1', 'a0b2')
    """
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodes).partition(",")[0]


def _first(names: tuple[str, ...], default: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name)), default)
