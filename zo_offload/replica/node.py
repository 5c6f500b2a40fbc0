"""Which ranks run on one machine, and so can share its memory."""

import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from zo_offload.replica.replica import Replica

BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Node:
    """The ranks of one machine, as one of them sees it.

    Attributes:
        ranks: In order; the first leads.
        index: This rank's place among them.

    Example:
        >>> node = Node((4, 5, 6, 7), 1)
        >>> node.size, node.leads, node.divided(5), node.divided(6)
        (4, False, True, False)
    """

    ranks: tuple[int, ...]
    index: int

    @property
    def size(self) -> int:
        """How many ranks run here."""
        return len(self.ranks)

    @property
    def leads(self) -> bool:
        """Whether this rank does what is done once on the machine."""
        return self.index == 0

    def divided(self, number: int) -> bool:
        """Whether this rank takes a numbered piece of work that is done once."""
        return number % self.size == self.index


def node_of(replica: Replica) -> Node:
    """Find the ranks that run beside this one; all ranks call this together.

    They are on one machine if they have its name, its boot, its processes and its user in common:
    containers with process numbers of their own cannot open each other's memory.
    """
    found = [data.decode() for data in replica.gather(_machine().encode())]
    machines = json.loads(replica.share(lambda: json.dumps(found).encode()))
    here = tuple(r for r, machine in enumerate(machines) if machine == machines[replica.rank])
    return Node(here, here.index(replica.rank))


def leader_says(replica: Replica, node: Node) -> Callable[[str], str]:
    """Gives every rank the text that the leader of its machine passes; called by all together."""

    def say(text: str) -> str:
        said = [data.decode() for data in replica.gather(text.encode())]
        everyone = json.loads(replica.share(lambda: json.dumps(said).encode()))
        return everyone[node.ranks[0]]

    return say


def _machine() -> str:
    boot = BOOT.read_text().strip() if BOOT.exists() else ""
    processes = os.readlink("/proc/self/ns/pid") if Path("/proc/self/ns/pid").is_symlink() else ""
    return f"{socket.gethostname()} {boot} {processes} {os.getuid()}"
