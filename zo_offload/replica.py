"""This rank's view of the other ranks: what is exchanged is scalars, added in one global order."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from zo_offload.errors import DivergedError


@dataclass(frozen=True)
class LaneLoss:
    """The loss of one lane.

    Attributes:
        probe: Which direction of the step.
        sign: +1 or -1.
        micro_batch: Global number of the micro-batch in the step.
        total: Sum of losses, float64.
        weight: What it is a sum over (1 for a mean).
    """

    probe: int
    sign: int
    micro_batch: int
    total: float
    weight: float


class Replica:
    """One rank alone; exchange with others would gather every lane's ``(total, weight)`` first."""

    rank = 0
    world_size = 1
    bytes_sent = 0

    def mean_losses(self, lanes: Sequence[LaneLoss], step: int) -> dict[tuple[int, int], float]:
        """Weighted mean loss of each (probe, sign), added in the order of global micro-batches.

        Raises:
            DivergedError: A loss is not finite; names step, probe, sign and micro-batch.
        """
        totals: dict[tuple[int, int], tuple[float, float]] = {}
        for lane in sorted(lanes, key=lambda lane: lane.micro_batch):
            if not math.isfinite(lane.total):
                raise DivergedError(
                    f"step {step}: the loss is {lane.total} (probe {lane.probe}, "
                    f"{'+-'[lane.sign < 0]}eps, micro-batch {lane.micro_batch}); the step was not "
                    "taken. Lower the learning rate or eps, or look at this micro-batch's data"
                )
            total, weight = totals.get((lane.probe, lane.sign), (0.0, 0.0))
            totals[lane.probe, lane.sign] = total + lane.total, weight + lane.weight
        for probe, sign in totals:
            if totals[probe, sign][1] == 0:
                raise DivergedError(
                    f"step {step}: the weights of all micro-batches add up to 0, so there is no "
                    "mean loss; the step was not taken. Look at what the objective counts"
                )
        return {key: total / weight for key, (total, weight) in totals.items()}
