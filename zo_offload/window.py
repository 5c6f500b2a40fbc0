"""An accumulation window: what ``backward`` has booked since the last step.

Every ``backward`` is one micro-batch. As in DeepSpeed, its loss counts divided by
``gradient_accumulation_steps``, unless the caller has divided already; several forwards behind one
``backward`` add up. Losses stay sums with weights until the step, so that micro-batches may weigh
differently and any number of ranks adds in one order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from zo_offload.errors import ModelError
from zo_offload.natural import pairs
from zo_offload.replica import Booked, Division

Lane = tuple[int, int]  # probe, sign
Sum = tuple[float, float]  # total, weight


@dataclass
class MicroBatch:
    """What one ``backward`` booked.

    Attributes:
        lanes: Loss of each lane as (total, weight), times the factor of the caller's arithmetic.
        slopes: What came through logits: a projected gradient by probe.
        caller_loss: The loss that the caller passed to ``backward``.
        products: Of examples' differences, as ``natural.mean_products`` gives them.
    """

    lanes: dict[Lane, Sum] = field(default_factory=dict)
    slopes: dict[int, float] = field(default_factory=dict)
    caller_loss: float = 0.0
    products: Sequence[float] = ()


@dataclass(frozen=True)
class Means:
    """A window's means over all micro-batches of all ranks.

    Attributes:
        lanes: Loss by (probe, sign); empty where the loss was computed outside the lanes.
        slopes: By probe; empty where nothing came through logits.
        caller_loss: What the caller passed to ``backward``.
        products: Of examples' differences; empty where they are not compared.
    """

    lanes: dict[Lane, float]
    slopes: dict[int, float] = field(default_factory=dict)
    caller_loss: float = 0.0
    products: Sequence[float] = ()


@dataclass
class Window:
    """One step's books.

    Attributes:
        lanes: Every (probe, sign) of the step, in order.
        num_micro_batches: ``gradient_accumulation_steps``.
        division: Which of the lanes are this rank's.
        micro_batches: What was booked, a backward each.
    """

    lanes: Sequence[Lane]
    num_micro_batches: int
    division: Division = field(default_factory=Division)
    micro_batches: list[MicroBatch] = field(default_factory=list)
    _open: MicroBatch = field(default_factory=MicroBatch)
    _caller_averages: bool = True

    @property
    def is_open(self) -> bool:
        """Something has been booked."""
        return bool(self.micro_batches)

    def begin_backward(self, scale_wrt_gas: bool) -> None:
        """What is booked now belongs to a new micro-batch.

        Raises:
            ModelError: An earlier one of the step was to be scaled otherwise.
        """
        if self.is_open and self._caller_averages is scale_wrt_gas:
            raise ModelError(
                f"backward: scale_wrt_gas is {scale_wrt_gas}, and was {not scale_wrt_gas} for an "
                "earlier micro-batch of this step; give all of them the same"
            )
        self._caller_averages = not scale_wrt_gas
        self._open = MicroBatch()

    def end_backward(self, loss: float) -> None:
        """Everything behind one ``backward`` has been booked.

        Raises:
            ModelError: Nothing was.
        """
        if not self._open.lanes and not self._open.slopes:
            raise ModelError(
                "backward: this loss does not depend on the engine's forward, so it says nothing "
                "of the weights; compute it from out.loss or out.logits"
            )
        self._open.caller_loss = loss
        self.micro_batches.append(self._open)

    def book_losses(self, sums: Sequence[Sum], factor: float) -> None:
        """Lane losses in order as ``(total, weight)``, of which the caller's takes ``factor``."""
        for lane, (total, weight) in zip(self.lanes, sums, strict=True):
            if self._caller_averages:
                total, weight = (total / weight if weight else 0.0), 1.0
            total *= factor
            if lane in self._open.lanes:  # of an earlier forward behind the same backward
                before, its_weight = self._open.lanes[lane]
                total = before + total * (its_weight / weight) if weight else before
                weight = its_weight
            self._open.lanes[lane] = total, weight

    def book_slope(self, probe: int, slope: float) -> None:
        """A projected gradient that reached the lanes through their logits."""
        self._open.slopes[probe] = self._open.slopes.get(probe, 0.0) + slope

    def book_whole(self, micro_batches: Sequence[MicroBatch]) -> None:
        """All micro-batches at once: of each, what this rank's lanes found."""
        self.micro_batches = list(micro_batches)
        self._caller_averages = False

    def booked(self) -> Booked:
        """Everything that was booked, as ranks exchange it."""
        lanes, probes = self._columns()
        lanes = self.division.mine(lanes)
        rows = [self._row(each, lanes, probes) for each in self.micro_batches]
        return Booked.of([*_names(tuple(lanes), probes), *self._product_names], rows)

    @property
    def names(self) -> list[str]:
        """Of all columns, those of other ranks' lanes too."""
        return [*_names(*self._columns()), *self._product_names]

    def means(self, values: Sequence[float]) -> Means:
        """What the means of :meth:`booked`'s columns are."""
        lanes, probes = self._columns()
        if self._scale != 1.0:
            values = [self._scale * value for value in values]
        rest = iter(values)
        return Means(
            {lane: next(rest) for lane in lanes},
            {probe: next(rest) for probe in probes},
            0.0 if lanes else next(rest),
            tuple(rest),
        )

    @property
    def _scale(self) -> float:
        """From the mean over what was booked to what the step descends on; 1 for a full window."""
        count = len(self.micro_batches)
        return float(count) if self._caller_averages else count / self.num_micro_batches

    def _columns(self) -> tuple[tuple[Lane, ...], tuple[int, ...]]:
        lanes = self.lanes if any(each.lanes for each in self.micro_batches) else ()
        probes = {probe for each in self.micro_batches for probe in each.slopes}
        return tuple(lanes), tuple(sorted(probes))

    @property
    def _product_names(self) -> list[str]:
        if not any(each.products for each in self.micro_batches):
            return []
        probes = 1 + max(probe for probe, _ in self.lanes)
        return [f"product of probes {k} and {other}" for k, other in pairs(probes)]

    def _row(self, each: MicroBatch, lanes: Sequence[Lane], probes: Sequence[int]) -> list[Sum]:
        row = [each.lanes.get(lane, (0.0, 1.0)) for lane in lanes]
        if not all(other.lanes for other in self.micro_batches):  # some came through logits alone
            row = [(total / weight if weight else 0.0, 1.0) for total, weight in row]
        row += [(each.slopes.get(probe, 0.0), 1.0) for probe in probes]
        row += [] if lanes else [(each.caller_loss, 1.0)]
        return [*row, *((product, 1.0) for product in each.products)]


@lru_cache  # every step's are the same
def _names(lanes: tuple[Lane, ...], probes: tuple[int, ...]) -> list[str]:
    names = [f"probe {probe}, {'+-'[sign < 0]}eps" for probe, sign in lanes]
    names += [f"probe {probe}, slope of the logits" for probe in probes]
    return names if lanes else [*names, "the caller's loss"]
