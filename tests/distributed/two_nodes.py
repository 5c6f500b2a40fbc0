"""Two nodes on one host, each with its own network, host name, processes and sshd.

::

    with two_nodes(folder) as (first, second):
        subprocess.run(first.command(["ssh", "zo2", "hostname"]))

Each node is a set of namespaces: ``zo1`` (10.77.0.1) and ``zo2`` (10.77.0.2), joined by a cable,
``eth0`` at both ends. They share the host's disks; ``/etc/hosts``, ``/etc/ssh``, ``/run`` and
``/dev/shm`` are their own, and the host's are not touched. A throw-away key opens either from the
other. All of it lives as long as two processes that read a pipe of ours: they end with the block,
or with this process, and the kernel then removes every process and device that was theirs.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

NAMES = ("zo1", "zo2")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
NAMESPACES = ("--net", "--uts", "--ipc", "--mount", "--pid")
TOOLS = ("unshare", "nsenter", "ip", "ssh", "ssh-keygen", "/usr/sbin/sshd")
DELAYED_CABLE = Path(__file__).with_name("delayed_cable.py")

NODE = """
set -e
hostname "$1"
mount --bind "$3/hosts-$1" /etc/hosts
mount --bind "$3/ssh" /etc/ssh
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm
mkdir /run/sshd
ip link set lo up
echo made
read -r _
ip address add "$2/24" dev eth0
ip link set eth0 up
/usr/sbin/sshd -E "$3/$1.log"
echo ready
read -r _
"""
SSHD_CONFIG = """
HostKey /etc/ssh/key
AuthorizedKeysFile /etc/ssh/key.pub
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
"""
SSH_CONFIG = """
IdentityFile /etc/ssh/key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""


@dataclass(frozen=True)
class Node:
    """One of the two."""

    name: str
    address: str
    pid: int  # of its first process, as the host numbers it

    def command(self, arguments: Sequence[str]) -> list[str]:
        """A command that runs on this node, in the directory that it is given in."""
        enter = ["nsenter", f"--target={self.pid}", *NAMESPACES, f"--wd={Path.cwd()}"]
        return [*enter, "--", *arguments]


def why_not() -> str | None:
    """What is missing for nodes on this host; None where nothing is."""
    if os.geteuid():
        return "two nodes need root: for namespaces, and an sshd"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"{', '.join(missing)} missing (apt-get install openssh-server iproute2 util-linux)"
    tried = subprocess.run(
        ["unshare", *NAMESPACES, "--fork", "mount", "-t", "tmpfs", "tmpfs", "/run"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return f"namespaces are not permitted: {tried.stderr.strip()}" if tried.returncode else None


@contextmanager
def two_nodes(folder: Path, delay_ms: float = 0.0) -> Iterator[tuple[Node, Node]]:
    """Make both nodes, and remove them.

    Args:
        folder: For keys, settings and sshd's logs; outside /run.
        delay_ms: How long every packet is under way, in either direction.
    """
    _write_files(folder)
    with ExitStack() as stack:
        holders = [stack.enter_context(_holder(i, folder)) for i in range(2)]
        nodes = [
            Node(NAMES[i], ADDRESSES[i], psutil.Process(holder.pid).children()[0].pid)
            for i, holder in enumerate(holders)
        ]
        stack.enter_context(_cable(nodes, delay_ms))
        for holder in holders:
            _say(holder, "the cable is there")
        for holder in holders:
            _hear(holder, "ready")
        yield nodes[0], nodes[1]


def _write_files(folder: Path) -> None:
    ssh = folder / "ssh"
    ssh.mkdir(parents=True)
    for own in NAMES:  # as Debian's installer writes it: a host's own name is loopback to itself
        both = zip(NAMES, ADDRESSES, strict=True)
        lines = [f"{'127.0.1.1' if name == own else address} {name}\n" for name, address in both]
        (folder / f"hosts-{own}").write_text("127.0.0.1 localhost\n" + "".join(lines))
    (ssh / "sshd_config").write_text(SSHD_CONFIG)
    (ssh / "ssh_config").write_text(SSH_CONFIG)
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / "key")], check=True
    )


@contextmanager
def _holder(index: int, folder: Path) -> Iterator[subprocess.Popen]:
    """The process that a node lives as long as."""
    script = ["sh", "-c", NODE, "node", NAMES[index], ADDRESSES[index], str(folder)]
    unshare = ["unshare", *NAMESPACES, "--mount-proc", "--fork", "--kill-child"]
    with _piped([*unshare, *script]) as process:
        _hear(process, "made")
        yield process


@contextmanager
def _cable(nodes: Sequence[Node], delay_ms: float) -> Iterator[None]:
    pids = [str(node.pid) for node in nodes]
    if delay_ms:
        with _piped([sys.executable, str(DELAYED_CABLE), str(delay_ms), *pids]) as process:
            _hear(process, "ready")
            yield
    else:
        ends = ["name", "eth0", "netns", pids[0], "type", "veth", "peer", "name", "eth0", "netns"]
        subprocess.run(["ip", "link", "add", *ends, pids[1]], check=True)
        yield


@contextmanager
def _piped(command: list[str]) -> Iterator[subprocess.Popen]:
    """A process that ends when its standard input does."""
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _say(process: subprocess.Popen, line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def _hear(process: subprocess.Popen, expected: str) -> None:
    assert process.stdout is not None
    heard = process.stdout.readline()
    if heard.strip() != expected:
        raise RuntimeError(f"a node could not be made: {heard}{process.stdout.read()}")
