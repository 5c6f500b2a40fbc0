"""DeepSpeed's ``aio`` block: how many transfers are under way, and how large each one is."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from zo_offload.errors import ConfigError
from zo_offload.wording import refuse_unknown

PAGE = 4096  # what direct I/O asks of addresses, offsets and lengths
MOST_BLOCK_BYTES = 1 << 30  # Linux moves no more than 2 GiB in a call
MOST_THREADS = 64


@dataclass(frozen=True)
class Aio:
    """The block's keys, with DeepSpeed's defaults.

    Attributes:
        block_size: Bytes of one transfer; also of a stripe, where files are made on several paths.
        queue_depth: Transfers that are under way at once,
        intra_op_parallelism: times this.
        single_submit: Accepted, without effect: each thread submits one transfer at a time.
        overlap_events: Accepted, without effect: submitting and completing always overlap.
        use_gds: Accepted, without effect.

    Example:
        >>> Aio.of({"queue_depth": 4, "intra_op_parallelism": 2}).num_threads
        8
    """

    block_size: int = 1 << 20
    queue_depth: int = 8
    intra_op_parallelism: int = 1
    single_submit: bool = False
    overlap_events: bool = True
    use_gds: bool = False

    @classmethod
    def of(cls, block: Mapping[str, Any]) -> "Aio":
        """The block of a JSON file.

        Raises:
            ConfigError: A key is not known, or a value is of another type or out of range.
        """
        known = {field.name: field for field in fields(cls)}
        refuse_unknown("aio", block, list(known))
        for key, value in block.items():
            wanted = type(known[key].default)
            if type(value) is not wanted:
                raise ConfigError(f"aio.{key}: expected {wanted.__name__}: {value!r}")
        found = cls(**block)
        found._check()
        return found

    @property
    def num_threads(self) -> int:
        """Of the pool: each has one transfer under way."""
        return min(self.queue_depth * self.intra_op_parallelism, MOST_THREADS)

    def _check(self) -> None:
        if self.block_size % PAGE or not PAGE <= self.block_size <= MOST_BLOCK_BYTES:
            raise ConfigError(
                f"aio.block_size: expected a multiple of {PAGE} up to {MOST_BLOCK_BYTES}: "
                f"{self.block_size}"
            )
        for key in ("queue_depth", "intra_op_parallelism"):
            if getattr(self, key) < 1:
                raise ConfigError(f"aio.{key}: expected at least 1: {getattr(self, key)}")
