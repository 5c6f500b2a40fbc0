"""Who started this process, from what launchers leave in the environment."""

from types import SimpleNamespace

import pytest

from zo_offload import launched

BATCH = {"SLURM_JOB_ID": "1007", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}  # also in a batch script
TASK = BATCH | {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "zo[1-2]",
}
DEEPSPEED = {"RANK": "1", "WORLD_SIZE": "2"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
PMI2 = {"PMI_RANK": "3", "PMI_SIZE": "4"}
HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "8"}


@pytest.mark.parametrize(
    ("variables", "rank", "num_ranks", "how"),
    [
        ({}, 0, 1, ""),
        (DEEPSPEED, 1, 2, "launcher"),
        (OPEN_MPI, 1, 2, "launcher mpi"),
        (HYDRA, 2, 8, "launcher mpi"),
        (HYDRA | DEEPSPEED | {"LOCAL_SIZE": "1"}, 1, 2, "launcher"),  # --launcher mpich
        (HYDRA | DEEPSPEED, 1, 2, "launcher mpi"),  # mpirun, once DeepSpeed has asked MPI
        (OPEN_MPI | DEEPSPEED | {"TORCHELASTIC_RUN_ID": "x"}, 1, 2, "launcher"),  # a node each
        (BATCH, 0, 1, ""),
        (TASK, 3, 4, "launcher srun"),
        (TASK | PMI2, 3, 4, "launcher srun"),  # srun --mpi=pmi2
        (TASK | PMI2 | DEEPSPEED, 1, 2, "launcher"),
        # launchers that srun gave a place to, or that use it to reach their nodes
        (TASK | DEEPSPEED, 1, 2, "launcher"),
        (TASK | OPEN_MPI, 1, 2, "launcher mpi"),
        (TASK | HYDRA, 2, 8, "launcher mpi"),
    ],
)
def test_who_started_this_process(
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    rank: int,
    num_ranks: int,
    how: str,
):
    monkeypatch.setattr(launched, "os", SimpleNamespace(environ=variables))
    assert (launched.rank(), launched.num_ranks()) == (rank, num_ranks)
    assert launched.by_launcher() == ("launcher" in how)
    assert launched.by_mpi() == ("mpi" in how)
    assert launched.by_srun() == ("srun" in how)


def test_what_deepspeed_reads_of_a_slurm_task(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launched, "os", SimpleNamespace(environ=TASK))
    assert launched.slurm_variables(29500) == {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "zo1",
        "MASTER_PORT": "29507",
    }


def test_a_gpu_that_a_slurm_task_has_for_itself_is_its_first(monkeypatch: pytest.MonkeyPatch):
    variables = TASK | {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setattr(launched, "os", SimpleNamespace(environ=variables))
    assert launched.slurm_variables(29500)["LOCAL_RANK"] == "0"
    variables["CUDA_VISIBLE_DEVICES"] = "0,1"
    assert launched.slurm_variables(29500)["LOCAL_RANK"] == "1"


def test_steps_of_a_slurm_job_meet_at_ports_of_their_own(monkeypatch: pytest.MonkeyPatch):
    ports = set()
    for step in range(9):
        variables = TASK | {"SLURM_STEP_ID": str(step)}
        monkeypatch.setattr(launched, "os", SimpleNamespace(environ=variables))
        ports.add(launched.slurm_variables(29500)["MASTER_PORT"])
    assert len(ports) == 9
