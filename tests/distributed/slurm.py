"""A Slurm cluster of the two nodes of ``two_nodes``: a controller on the first, slurmd on both.

::

    with two_nodes(folder / "nodes") as nodes:
        environment = slurm(nodes, folder / "slurm")
        subprocess.run(nodes[0].command(["srun", "-N", "2", "hostname"]), env=environment)

Without cgroups and accounting. All of it ends with the nodes.
"""

import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from distributed.two_nodes import Node

TOOLS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol")
START_SECONDS = 60
CONFIG = """
ClusterName=zo
SlurmctldHost={first.name}({first.address})
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
KillWait=2
NodeName={first.name},{second.name} CPUs={cores}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
MUNGE = """
mkdir /run/munge
munged --force --key-file {folder}/key --socket /run/munge/munge.socket.2 \
  --pid-file /run/munged.pid --seed-file /run/munge.seed --log-file {folder}/munged-{node.name}.log
"""


def why_not() -> str | None:
    """What is missing; None where nothing is."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"{', '.join(missing)} missing (apt-get install slurm-wlm)" if missing else None


def slurm(nodes: Sequence[Node], folder: Path) -> dict[str, str]:
    """Start it, and wait until both nodes take jobs; what Slurm's commands need to find it."""
    first, second = nodes
    (folder / "state").mkdir(parents=True)
    text = CONFIG.format(first=first, second=second, folder=folder, cores=os.cpu_count())
    (folder / "slurm.conf").write_text(text)
    (folder / "key").write_bytes(secrets.token_bytes(64))
    (folder / "key").chmod(0o600)
    environment = {"SLURM_CONF": str(folder / "slurm.conf")}
    for node in nodes:
        _on(node, ["sh", "-ec", MUNGE.format(folder=folder, node=node)], environment)
    _on(first, ["slurmctld"], environment)
    for node in nodes:
        _on(node, ["slurmd", "-N", node.name], environment)
    deadline = time.monotonic() + START_SECONDS
    while (found := _on(first, ["sinfo", "-h", "-o", "%D %t"], environment)) != "2 idle\n":
        if time.monotonic() > deadline:
            raise RuntimeError(f"Slurm's nodes are not idle after {START_SECONDS} s: {found}")
        time.sleep(0.1)
    return environment


def _on(node: Node, arguments: Sequence[str], environment: dict[str, str]) -> str:
    done = subprocess.run(
        node.command(arguments), env=os.environ | environment, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{arguments[0]} on {node.name}: {done.stdout}")
    return done.stdout
