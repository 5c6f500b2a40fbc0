"""The updates of a run so far, read from its records when they are due."""

from collections.abc import Sequence
from typing import overload

from zo_offload import update
from zo_offload.journal import Flags, Record, Records
from zo_offload.ops import Draw, StepUpdate


class History(Sequence[StepUpdate]):
    """Step by step what moves every trainable weight: an index is a step.

    Nothing is kept twice: a slice unpacks the records that it covers.

    Args:
        records: A journal's, which grow behind this view.
        seed: Key of all directions.
    """

    def __init__(self, records: Records, seed: int) -> None:
        self._records = records
        self._seed = seed

    def __len__(self) -> int:
        return len(self._records)

    def coefficients(self, projected_grads: Sequence[float], lr: float) -> list[float]:
        """What the next step's record says of its own directions, one a probe."""
        return update.sgd(projected_grads, lr)

    @overload
    def __getitem__(self, index: int) -> StepUpdate: ...
    @overload
    def __getitem__(self, index: slice) -> list[StepUpdate]: ...
    def __getitem__(self, index: int | slice) -> StepUpdate | list[StepUpdate]:
        if isinstance(index, slice):
            return [self._update(record) for record in self._records[index]]
        return self._update(self._records[index])

    def _update(self, record: Record) -> StepUpdate:
        skipped = bool(record.flags & Flags.SKIPPED)
        probes = () if skipped else record.probes
        return StepUpdate(
            record.decay,
            tuple(Draw(self._seed, record.step, p.number, p.coefficient) for p in probes),
            self._seed,
            record.step,
            0.0 if skipped else record.lr,
            tuple(p.projected_grad / len(probes) for p in probes),
        )
