"""What DeepSpeed is told of ranks that share a micro-batch: they count as one in its arithmetic."""

from functools import cached_property
from typing import Any

import torch.distributed as dist

from zo_offload.replica import Division


class DataRanks:
    """DeepSpeed's ``mpu`` of a run with ``probe_parallel``: sizes of batches count its groups.

    The model is not divided: every rank holds all of it, so the model-parallel size is 1.

    Args:
        probe_parallel: Ranks that share the lanes of a micro-batch.

    Raises:
        ConfigError: The launcher's ranks do not come out even.
    """

    def __init__(self, probe_parallel: int) -> None:
        self._division = Division(dist.get_rank(), dist.get_world_size(), probe_parallel)

    def get_data_parallel_world_size(self) -> int:
        """Number of groups."""
        return self._division.num_data_ranks

    def get_data_parallel_rank(self) -> int:
        """Of this rank's group."""
        return self._division.data_rank

    def get_data_parallel_group(self) -> Any:
        """Ranks that run the same lanes, of different micro-batches."""
        return self._groups[self._division.rank % self._division.probe_parallel]

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Of :meth:`get_data_parallel_group`."""
        return list(self._ranks(self._division.rank % self._division.probe_parallel))

    def get_model_parallel_world_size(self) -> int:
        """1."""
        return 1

    def get_model_parallel_rank(self) -> int:
        """0."""
        return 0

    def get_model_parallel_group(self) -> None:
        """None: nothing is to be exchanged within one rank."""

    @cached_property
    def _groups(self) -> list[Any]:
        """By part of the lanes; made by all ranks together."""
        return [dist.new_group(self._ranks(i)) for i in range(self._division.probe_parallel)]

    def _ranks(self, part: int) -> range:
        return range(part, self._division.world_size, self._division.probe_parallel)
