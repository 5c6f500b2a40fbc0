"""How ranks share a step: which micro-batches a rank takes, and which lanes of them.

Neighbouring ranks form a group that sees the same micro-batches; of the step's lanes, in (probe,
sign) order, each of the group runs an equal part. With two ranks and one probe that is a sign each;
with a group a probe, a probe each.

Reference:
    Liu et al. (2025), "DistZO2", arXiv 2507.03211: perturbation parallelism, and its product with
    data parallelism. Deviation: any equal division of the lanes, and losses are exchanged with
    their weights, so that the step has the bits of one rank that does it all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from zo_offload.errors import ConfigError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Division:
    """A rank's place among the others.

    Attributes:
        rank: This one.
        world_size: How many there are.
        probe_parallel: Ranks that share the lanes of the same micro-batches.

    Example:
        >>> place = Division(rank=3, world_size=4, probe_parallel=2)
        >>> place.data_rank, place.num_data_ranks, place.mine(["+", "-"])
        (1, 2, ['-'])
    """

    rank: int = 0
    world_size: int = 1
    probe_parallel: int = 1

    def __post_init__(self) -> None:
        if self.world_size % self.probe_parallel:
            raise ConfigError(
                f"zeroth_order.replica.probe_parallel: {self.probe_parallel} ranks share the lanes "
                f"of a micro-batch, and {self.world_size} ranks do not come out even; start a "
                f"multiple of {self.probe_parallel} ranks"
            )

    @property
    def data_rank(self) -> int:
        """Number of this rank's group, which sees micro-batches of its own."""
        return self.rank // self.probe_parallel

    @property
    def num_data_ranks(self) -> int:
        """Number of groups."""
        return self.world_size // self.probe_parallel

    def mine(self, lanes: Sequence[Item]) -> Sequence[Item]:
        """This rank's part of all lanes."""
        size = len(lanes) // self.probe_parallel
        assert size * self.probe_parallel == len(lanes)
        first = self.rank % self.probe_parallel * size
        return lanes[first : first + size]
