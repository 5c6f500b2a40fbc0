"""How many transfers are under way, and how large each one is: DeepSpeed's ``aio``."""

from dataclasses import dataclass

PAGE = 4096  # what direct I/O asks of addresses, offsets and lengths
MOST_THREADS = 64


BLOCK_BYTES = 4 << 20  # a thread of this process handles each: smaller ones take its processors


@dataclass(frozen=True)
class Aio:
    """The block's keys, with DeepSpeed's defaults but for the size of a transfer (its own: 1 MiB).

    Attributes:
        block_size: Bytes of one transfer; also of a stripe, where files are made on several paths.
        queue_depth: Transfers that are under way at once,
        intra_op_parallelism: times this.

    Example:
        >>> Aio(queue_depth=4, intra_op_parallelism=2).num_threads
        8
    """

    block_size: int = BLOCK_BYTES
    queue_depth: int = 8
    intra_op_parallelism: int = 1

    @property
    def num_threads(self) -> int:
        """Of the pool: each has one transfer under way."""
        return min(self.queue_depth * self.intra_op_parallelism, MOST_THREADS)
