"""Every file of ``launcher/`` starts ranks that end in the bits of one, also when they are killed.

On one host, and on two.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from cli.common import REPOSITORY, Task, make_task

from distributed import slurm, two_nodes
from distributed.launch import SECONDS, command, environment, forked, wait
from distributed.two_nodes import Node
from zo_offload.journal import Journal

pytestmark = pytest.mark.slow

LAUNCHERS = REPOSITORY / "launcher"
STEPS, EVAL_EVERY = 100, 50
MOST_SECONDS_TO_STOP = 60
OPEN_MPI = {  # tests may be root's; where there is another MPI too, mpi4py has to be told
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "MPI4PY_LIBMPI": "libmpi.so.40",
}
Left = dict[str, bytes]
Nodes = tuple[Node, Node]


def needs(*tools: str) -> pytest.MarkDecorator:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} missing")


def left_in(output: Path) -> Left:
    """What a run wrote that must not depend on how it was started."""
    names = ("model/model.safetensors", "journal/run.journal")
    return {name: (output / name).read_bytes() for name in names}


@dataclass
class Run:
    """One run, which several commands may start, each as a user would."""

    output: Path
    options: list[str]
    started: list[subprocess.Popen] = field(default_factory=list)

    def start(
        self, launcher: str | list[str], on: Node | None = None, /, **variables: str
    ) -> subprocess.Popen:
        """A file of ``launcher/``, or another command that takes the options of train.py."""
        given = [str(LAUNCHERS / launcher)] if isinstance(launcher, str) else launcher
        arguments = [*given, *self.options]
        process = subprocess.Popen(
            on.command(arguments) if on else arguments, env=with_programs(**variables),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.started.append(process)
        return process

    def wait(self) -> str:
        """Until all that was started has ended, and well; its output."""
        texts = [process.communicate(timeout=SECONDS)[0] for process in self.started]
        text = "\n".join(texts)
        assert all(process.returncode == 0 for process in self.started), text
        return text

    def wait_for_a_step(self, process: subprocess.Popen | None = None) -> None:
        wait_until(self._holds_a_step, process)

    def _holds_a_step(self) -> bool:
        journal = self.output / "journal" / "run.journal"
        return journal.exists() and len(Journal.read(journal).records) > 0


def with_programs(**variables: str) -> dict[str, str]:
    """The environment, with this interpreter's programs in front."""
    path = variables.pop("PATH", os.environ["PATH"])
    return environment(PATH=f"{Path(sys.executable).parent}{os.pathsep}{path}", **variables)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen | None = None) -> None:
    """Until it holds; fails where that takes too long, or a process ends before it does."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        if process is not None and process.poll() is not None:
            pytest.fail(f"status {process.returncode}:\n{process.communicate()[0]}")
        time.sleep(0.05)


def rank_below(ancestor: int, local_rank: int = 0) -> psutil.Process:
    """A rank that a launcher, or anything on a node, has started."""

    def is_it(process: psutil.Process) -> bool:
        with suppress(psutil.NoSuchProcess):  # ended, perhaps not yet waited for
            return process.environ().get("LOCAL_RANK") == str(local_rank)
        return False

    (found,) = filter(is_it, psutil.Process(ancestor).children(recursive=True))
    return found


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    task = make_task(tmp_path_factory.mktemp("task"))
    path = task.folder / "ds.json"
    config = json.loads(path.read_text()) | {"train_micro_batch_size_per_gpu": 2}
    path.write_text(json.dumps(config))
    return task


def run_of(task: Task, output: Path) -> Run:
    return Run(output, task.arguments(output, steps=STEPS, eval_every=EVAL_EVERY)[1:])


@pytest.fixture(scope="module")
def alone(task: Task) -> Left:
    """Of one rank, with both micro-batches of a step."""
    run = run_of(task, task.folder / "alone")
    given = ["train", *run.options]
    ended = wait(forked("cli.common:run_in_child", 1, given, out=task.folder / "log"))
    assert ended[0][0] == 0, ended
    return left_in(run.output)


@pytest.fixture
def run(task: Task, alone: Left, tmp_path: Path) -> Iterator[Run]:
    """A new one, which has to end in the bits of one rank."""
    run = run_of(task, tmp_path / "run")
    yield run
    for process in run.started:
        if process.poll() is None:  # the test has failed
            for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                each.kill()
            process.communicate()
    assert left_in(run.output) == alone


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    """In the current directory lies what launchers read of them."""
    if reason := two_nodes.why_not():
        pytest.skip(reason)
    monkeypatch.chdir(tmp_path)
    Path(".deepspeed_env").write_text("OMP_NUM_THREADS=1\n")
    Path("hostfile").write_text("".join(f"{name} slots=1\n" for name in two_nodes.NAMES))
    monkeypatch.setenv("HOSTFILE", str(tmp_path / "hostfile"))
    with two_nodes.two_nodes(tmp_path / "nodes") as both:
        yield both


@pytest.fixture
def cluster(tmp_path: Path, nodes: Nodes) -> dict[str, str]:
    """What Slurm's commands need to find the two nodes."""
    if reason := slurm.why_not():
        pytest.skip(reason)
    return slurm.slurm(nodes, tmp_path / "slurm")


@needs("shellcheck")
def test_the_shell_finds_nothing_wrong():
    files = sorted(map(str, [*LAUNCHERS.glob("*.sh"), LAUNCHERS / "slurm.sbatch"]))
    done = subprocess.run(["shellcheck", *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@needs("numactl")
@pytest.mark.thorough
def test_one_host_with_cores_bound(run: Run):
    run.start("local.sh", OMP_NUM_THREADS="7")  # of which the launcher makes a rank's share
    run.wait()


@needs("mpirun")
@pytest.mark.thorough
def test_one_host_under_mpirun(run: Run):
    run.start("mpirun.sh", **OPEN_MPI)
    assert "\x1b" not in run.wait()  # no bars, though Open MPI gives ranks a terminal


@needs("mpirun")
@pytest.mark.thorough
def test_two_hosts_by_open_mpi(run: Run, nodes: Nodes):
    run.start("openmpi.sh", nodes[0], **OPEN_MPI)
    run.wait()


@needs("mpirun")
@pytest.mark.thorough
def test_two_hosts_under_mpirun(run: Run, nodes: Nodes):
    run.start("mpirun.sh", nodes[0], **OPEN_MPI)
    run.wait()


@needs("mpirun.mpich")
@pytest.mark.thorough
def test_two_hosts_by_mpich_where_a_rank_is_killed(run: Run, nodes: Nodes, tmp_path: Path):
    """DeepSpeed ends with 0 all the same, so what is printed has to say it."""
    (tmp_path / "mpirun").write_text('#!/bin/sh\nexec mpirun.mpich "$@"\n')
    (tmp_path / "mpirun").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    process = run.start("mpich.sh", nodes[0], PATH=path)
    run.wait_for_a_step(process)
    rank_below(nodes[1].pid).kill()
    assert "Error: rank 0 lost rank 1 (" in process.communicate(timeout=MOST_SECONDS_TO_STOP)[0]
    run.start("mpich.sh", nodes[0], PATH=path)
    run.wait()


@pytest.mark.thorough
@needs("pdsh")
def test_two_hosts_by_pdsh_where_a_rank_is_killed(run: Run, nodes: Nodes):
    """The host without it says which was lost, the command fails, and the same one goes on."""
    process = run.start("pdsh.sh", nodes[0])
    run.wait_for_a_step(process)
    rank_below(nodes[1].pid).kill()
    text, _ = process.communicate(timeout=MOST_SECONDS_TO_STOP)
    assert process.returncode != 0
    assert "zo1: Error: rank 0 lost rank 1 (" in text
    run.started.clear()
    run.start("pdsh.sh", nodes[0])
    run.wait()


@pytest.mark.thorough
def test_two_hosts_without_ssh(run: Run, nodes: Nodes):
    for rank, node in enumerate(nodes):
        run.start("no_ssh.sh", node, NODE_RANK=str(rank), MASTER_ADDR=nodes[0].name)
    run.wait()


@pytest.mark.thorough
def test_torchrun_restarts_a_killed_rank(run: Run):
    process = run.start(command("torchrun", 2, ["--max_restarts=1", str(LAUNCHERS / "train.py")]))
    run.wait_for_a_step(process)
    rank_below(process.pid, local_rank=1).kill()
    run.wait()


@pytest.mark.thorough
def test_torchrun_restarts_the_ranks_of_two_hosts(run: Run, nodes: Nodes):
    given = {"NODES": "2", "RANKS": "1", "RENDEZVOUS": f"{nodes[0].name}:29400", "RESTARTS": "1"}
    processes = [run.start("torchrun.sh", node, **given) for node in nodes]
    run.wait_for_a_step(processes[0])
    rank_below(processes[1].pid).kill()
    run.wait()


@pytest.mark.thorough
def test_an_allocation_of_slurm(run: Run, nodes: Nodes, cluster: dict[str, str]):
    """With MPI's variables too, which ranks that Slurm started have no use for."""
    allocated = ["salloc", "--nodes=2", str(LAUNCHERS / "slurm.sh")]
    run.start(allocated, nodes[0], SLURM_MPI_TYPE="pmi2", **cluster)
    run.wait()


@pytest.mark.thorough
def test_a_requeued_job_goes_on(
    run: Run, nodes: Nodes, cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    """The signal that Slurm sends before a job's time is up, as soon as a step is on the disk."""
    monkeypatch.chdir(REPOSITORY)
    log = run.output.with_name("job.log")
    run.start(["sbatch", f"--output={log}", str(LAUNCHERS / "slurm.sbatch")], nodes[0], **cluster)
    run.wait()
    run.wait_for_a_step()
    signal = nodes[0].command(["scancel", "--batch", "--signal=USR1", "1"])
    subprocess.run(signal, env=with_programs(**cluster), check=True)
    wait_until(lambda: (run.output / "summary.json").exists())
    assert "continuing after" in log.read_text()
