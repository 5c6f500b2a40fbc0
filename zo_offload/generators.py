"""Random generators for lanes: each has its own states, which are swapped in with the baton.

Both signs of a direction must draw the same numbers (a difference would be noise), different
micro-batches different ones, and a resumed run the same as the first: so a lane starts from a seed
that is a function of the run's seed, the step and the micro-batch.

NumPy's and Python's generators take a hundred microseconds to swap, as long as many a block. They
are only watched: a forward that draws from them is told of once.
"""

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

logger = logging.getLogger(__name__)

States = list[torch.Tensor]


def lane_seed(seed: int, step: int, micro_batch: int) -> int:
    """Where the generators of a lane start; NumPy promises these words for good.

    Example:
        >>> lane_seed(0, 1, 2) == lane_seed(0, 1, 2) != lane_seed(0, 2, 1)
        True
    """
    words = np.random.SeedSequence((seed, step, micro_batch)).generate_state(1, np.uint64)
    return int(words[0])


class Generators:
    """The default generators that code on a device draws from."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._warned = False

    def states(self) -> States:
        """Where they stand."""
        states = [torch.get_rng_state()]
        if self._device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self._device))
        return states

    def set(self, states: States) -> None:
        """Go to where they stood."""
        torch.set_rng_state(states[0])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(states[1], self._device)

    def seeded(self, seed: int) -> States:
        """Where a seed puts them; they stand there afterwards."""
        torch.default_generator.manual_seed(seed)
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                torch.cuda.manual_seed(seed)
        return self.states()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Put the caller's states back afterwards."""
        before, others = self.states(), _other_positions()
        try:
            yield
        finally:
            self.set(before)
            if not self._warned and _other_positions() != others:
                self._warned = True
                logger.warning(
                    "random numbers of NumPy or Python were drawn during a forward: if it was the "
                    "model or the objective, both signs saw different ones, which is noise; draw "
                    "with torch"
                )


def _other_positions() -> tuple[int, int]:
    """What moves with nearly every draw from NumPy's and Python's global generators."""
    _, _, position, *_ = np.random.get_state()  # noqa: NPY002
    return int(position), random.getstate()[1][-1]
