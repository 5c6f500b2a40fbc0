"""Random generators for lanes: each has its own, which are swapped in with the baton.

Both signs of a direction must draw the same numbers (a difference would be noise), different
micro-batches different ones, and a resumed run the same as the first: so a lane starts from a seed
that is a function of the run's seed, the step and the micro-batch.

That holds for torch, NumPy and Python alike. NumPy's generator is swapped as an object, which costs
nothing; Python's state must be copied, at ten microseconds a handoff.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

WORD = 1 << 32
_numpy: Any = np.random  # whose stubs lack the functions that swap generators


class States(NamedTuple):
    """Where a lane's generators stand."""

    torch: list[torch.Tensor]
    numpy: Any
    python: tuple


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
        self._spare: list[Any] = []  # of NumPy's kind: one takes 0.1 ms to make

    def states(self) -> States:
        """Where they stand. NumPy's moves on with what is drawn."""
        states = [torch.get_rng_state()]
        if self._device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self._device))
        return States(states, _numpy.get_bit_generator(), random.getstate())

    def set(self, states: States) -> None:
        """Go to where they stood."""
        torch.set_rng_state(states.torch[0])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(states.torch[1], self._device)
        _numpy.set_bit_generator(states.numpy)
        random.setstate(states.python)

    def seeded(self, seeds: list[int]) -> list[States]:
        """Where each seed puts them; afterwards they stand at the last."""
        while len(self._spare) < len(seeds):
            self._spare.append(np.random.MT19937())
        return [self._seed(*pair) for pair in zip(seeds, self._spare, strict=False)]

    def _seed(self, seed: int, bit_generator: Any) -> States:
        torch.default_generator.manual_seed(seed)
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                torch.cuda.manual_seed(seed)
        _numpy.set_bit_generator(bit_generator)
        np.random.seed([seed % WORD, seed // WORD])  # noqa: NPY002
        random.seed(seed)
        return self.states()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Put the caller's states back afterwards."""
        before, numpy = self.states(), np.random.get_state(legacy=False)  # noqa: NPY002
        try:
            yield
        finally:
            self.set(before)
            np.random.set_state(numpy)  # noqa: NPY002 (with a normal number that was drawn ahead)
