"""An accumulation window: what ``backward`` has booked since the last step.

Every ``backward`` is one micro-batch. As in DeepSpeed, its loss counts divided by
``gradient_accumulation_steps``, unless the caller has divided already; several forwards behind one
``backward`` add up. Losses stay sums with weights until the step, so that micro-batches may weigh
differently and any number of ranks adds in one order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from zo_offload.replica import LaneLoss

Lane = tuple[int, int]  # probe, sign


@dataclass
class Window:
    """One step's books.

    Attributes:
        num_probes: Directions of the step.
        num_micro_batches: ``gradient_accumulation_steps``.
        lanes: Loss of every lane, times the factor that the caller's arithmetic gave it.
        logit_grads: What came through logits, one projected gradient a probe.
        caller_loss: The losses that the caller passed to ``backward``, averaged.
    """

    num_probes: int
    num_micro_batches: int
    lanes: list[LaneLoss] = field(default_factory=list)
    logit_grads: list[float] = field(default_factory=list)
    caller_loss: float = 0.0
    _num_backwards: int = 0
    _caller_averages: bool = True

    def __post_init__(self) -> None:
        self.logit_grads = [0.0] * self.num_probes

    @property
    def is_open(self) -> bool:
        """Something has been booked."""
        return bool(self._num_backwards or self.lanes)

    def begin_backward(self, scale_wrt_gas: bool) -> None:
        """What is booked now belongs to a new micro-batch."""
        self._caller_averages = not scale_wrt_gas

    def end_backward(self, loss: float) -> None:
        """Everything behind one ``backward`` has been booked."""
        self.caller_loss += self._share * loss
        self._num_backwards += 1

    def book_losses(
        self, lanes: Sequence[Lane], sums: Sequence[tuple[float, float]], factor: float
    ) -> None:
        """Lane losses as ``(total, weight)``, of which the caller's loss takes ``factor``."""
        for (probe, sign), (total, weight) in zip(lanes, sums, strict=True):
            if self._caller_averages:
                total, weight = (total / weight if weight else 0.0), 1.0
            self._add(LaneLoss(probe, sign, self._num_backwards, factor * total, weight))

    def book_logits(self, probe: int, slope: float) -> None:
        """A projected gradient that reached the lanes through their logits."""
        self.logit_grads[probe] += self._share * slope

    def book_whole(self, lanes: Sequence[LaneLoss]) -> None:
        """All micro-batches at once."""
        self.lanes += lanes
        self._num_backwards, self._caller_averages = self.num_micro_batches, False

    @property
    def scale(self) -> float:
        """From the mean over what was booked to what the step descends on; 1 for a full window."""
        if self._caller_averages:
            return float(max(self._num_backwards, 1))
        return self._num_backwards / self.num_micro_batches

    @property
    def _share(self) -> float:
        return 1.0 if self._caller_averages else 1.0 / self.num_micro_batches

    def _add(self, new: LaneLoss) -> None:
        """Add to what an earlier forward of the same ``backward`` booked for this lane, if any."""
        place = (new.probe, new.sign, new.micro_batch)
        for i, lane in enumerate(self.lanes):
            if (lane.probe, lane.sign, lane.micro_batch) == place and lane.weight and new.weight:
                total = lane.total + new.total * (lane.weight / new.weight)
                self.lanes[i] = replace(lane, total=total)
                return
        self.lanes.append(new)
