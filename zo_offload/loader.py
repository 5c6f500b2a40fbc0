"""The engine's loader: whole global micro-batches, dealt so that the world size changes nothing.

The examples are one endless stream, a permutation an epoch, cut into micro-batches; rank r of W
takes micro-batches r, r + W, ... So a step sees the same micro-batches on one rank as on four, a
micro-batch is padded by itself alone, no example is left out, and where a run stands is one number:
the examples consumed. One pass through the loader is as many whole steps as the data set fills.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from zo_offload.errors import ConfigError
from zo_offload.tasks.sampler import batch_at

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Share:
    """Which micro-batches are a rank's.

    Attributes:
        micro_batch_size: Examples in one.
        num_micro_batches: A rank's in one step (``gradient_accumulation_steps``).
        rank: This one, of those that take micro-batches of their own.
        world_size: How many there are of these.
        seed: Of the order of examples.
    """

    micro_batch_size: int
    num_micro_batches: int = 1
    rank: int = 0
    world_size: int = 1
    seed: int = 0

    @property
    def examples_per_step(self) -> int:
        """Of all ranks."""
        return self.micro_batch_size * self.num_micro_batches * self.world_size


class Loader:
    """Yields this rank's micro-batches of one pass, from where the run stands.

    Args:
        dataset: With ``__len__`` and ``__getitem__``, or an iterable one, whose order is its own.
        share: Which micro-batches are this rank's.
        collate: From a list of examples to a batch (default: torch's).
        num_workers: Processes that fetch examples.
        pin_memory: Page-lock batches, for copies to an accelerator.

    Attributes:
        consumed: Examples that all ranks have taken so far; set it to continue a run.

    Example:
        >>> loader = Loader([10, 11, 12, 13], Share(micro_batch_size=2))
        >>> sorted(x for batch in loader for x in batch.tolist()), len(loader), loader.consumed
        ([10, 11, 12, 13], 2, 4)
    """

    def __init__(
        self,
        dataset: Any,
        share: Share,
        collate: Callable[[list[Any]], Any] | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.dataset = dataset
        self.share = share
        self.consumed = 0
        self._pass_began = 0  # of an iterable data set
        self._options: dict[str, Any] = {
            "collate_fn": collate,
            "num_workers": num_workers,
            "pin_memory": pin_memory,
        }
        self._iterable = isinstance(dataset, IterableDataset)
        if self._iterable:
            return
        if len(dataset) == 0:
            raise ConfigError("training_data: the data set is empty; give one with examples")
        if len(dataset) < share.examples_per_step:
            logger.warning(
                "training_data: one step takes %s examples, the data set holds %s: each comes "
                "several times a step", f"{share.examples_per_step:,}", f"{len(dataset):,}",
            )  # fmt: skip

    def __len__(self) -> int:
        """Micro-batches of this rank in one pass: at least one whole step."""
        steps = max(1, len(self.dataset) // self.share.examples_per_step)
        return steps * self.share.num_micro_batches

    def __iter__(self) -> Iterator[Any]:
        source = self._stream() if self._iterable else self._indexed()
        taken_by_all = self.share.micro_batch_size * self.share.world_size
        for batch in source:
            self.consumed += taken_by_all
            yield batch

    def _indexed(self) -> DataLoader:
        share = self.share
        first = self.consumed // share.micro_batch_size  # of the next round, on rank 0
        numbers = [first + i * share.world_size + share.rank for i in range(len(self))]
        count = len(self.dataset)
        chosen = (batch_at(share.seed, n, share.micro_batch_size, count) for n in numbers)
        return DataLoader(self.dataset, batch_sampler=_Once(chosen), **self._options)

    def _stream(self) -> Iterator[Any]:
        """One pass through an iterable data set, from where the run stands in it."""
        while True:
            skipped, seen = self.consumed - self._pass_began, 0
            for step in self._whole_steps():
                if seen >= skipped:
                    yield from step
                seen += self.share.examples_per_step
            if not seen:
                raise ConfigError(
                    "training_data: the data set holds fewer than the "
                    f"{self.share.examples_per_step} examples of one step"
                    "; give more, or lower train_batch_size"
                )
            self._pass_began += seen
            if seen > skipped:
                return

    def _whole_steps(self) -> Iterator[list[Any]]:
        """This rank's micro-batches, a step at a time: every rank must take equally many."""
        share, options = self.share, self._options
        batches = DataLoader(
            self.dataset, batch_size=share.micro_batch_size, drop_last=True, **options
        )
        mine: list[Any] = []
        for number, batch in enumerate(batches, start=1):
            if (number - 1) % share.world_size == share.rank:
                mine.append(batch)
            if number % (share.num_micro_batches * share.world_size) == 0:
                yield mine
                mine = []


class _Once:
    """Lists of indices, as a batch sampler."""

    def __init__(self, chosen: Iterator[list[int]]) -> None:
        self._chosen = chosen

    def __iter__(self) -> Iterator[list[int]]:
        return self._chosen
