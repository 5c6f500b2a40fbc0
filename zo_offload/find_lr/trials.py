"""Short runs on the run's own task, all from the same weights, which are never moved.

Masters that lag by more steps than a try takes stay where they are: the forward takes the steps on
the way (``masters.py``). So a try ends by forgetting its steps, whatever the tier and the size;
only what never lags, what lies outside all blocks, is kept in host memory and put back. Low-rank
directions have no such lag, but leave masters alone for an interval of theirs.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zo_offload import estimator
from zo_offload.config import BLOCK, parse_config
from zo_offload.config_update import MOST_LAG
from zo_offload.errors import DivergedError
from zo_offload.find_lr.slopes import Losses, Slopes, slopes_of
from zo_offload.journal import Journal
from zo_offload.ops import Draw
from zo_offload.replica import Booked
from zo_offload.step import Stepper
from zo_offload.tasks import evaluation_groups

MOST_STEPS = MOST_LAG
DIRECTIONS = 12  # that the guess is made of, on two batches each
SLOPES = 2**32 - 1  # round of those; tries have theirs
RECENT = 5  # steps whose mean loss says that a try diverges


def tried_config(config: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """A run's JSON, for tries of so many steps: masters stay where they are."""
    block = {**(config.get(BLOCK) or {})}
    parsed = parse_config(config)
    if parsed.trainable.mode == "low_rank":
        interval = max(parsed.trainable.interval or 0, steps)
        block["trainable"] = {**block["trainable"], "interval": interval}
    else:
        lag = max(parsed.update.lag, steps)
        block["update"] = {**(block.get("update") or {}), "lag": lag}
    block["replica"] = {**(block.get("replica") or {}), "check_interval": 0}
    return {**config, BLOCK: block}


def seed_of(seed: int, number: int) -> int:
    """Of a round: directions, batches and dropout are none of the run's."""
    digest = hashlib.sha256(f"find-lr {seed} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


@dataclass
class Trials:
    """Tries with one engine.

    Args:
        stepper: The engine's, of :func:`tried_config`, before its first step.
        batches: This rank's micro-batches of a step, by the stepper's seed and the step.
        held_out: Batches of held-out examples, in the order of all ranks.
        steps: Of a try.
        weight_decay: Of the run.

    Attributes:
        watch: Sees the losses of every step.
        forwards: Of a micro-batch or a batch held out, on all ranks together.
        taken: Steps.
        moved: Whether any of them moved a weight.
    """

    stepper: Stepper
    batches: Callable[[int], Sequence[Any]]
    held_out: Sequence[Any]
    steps: int
    weight_decay: float = 0.0
    forwards: int = 0
    taken: int = 0
    moved: bool = False

    def __post_init__(self) -> None:
        weights = self.stepper.weights
        self._seed = self.stepper.config.seed
        self._kept = [
            (unit, weights.held(unit)[0])
            for unit in weights.map.everything
            if weights.goal(unit, self.steps) > 0
        ]
        self.watch = self.stepper.new_watch()

    def begin(self, number: int) -> None:
        """Stand at the beginning again, for a round."""
        stepper, weights = self.stepper, self.stepper.weights
        stepper.config = stepper.config.model_copy(update={"seed": seed_of(self._seed, number)})
        stepper.follow(Journal.memory({}))
        with weights.replacing():
            for unit, masters in self._kept:
                if weights.is_mine(unit):
                    weights.restore(unit, masters, 0)

    def attempt(self, lr: float, number: int) -> float:
        """Held-out loss after a try whose rate falls linearly; infinite where it diverges."""
        self.begin(number)
        losses: list[float] = []
        for step in range(self.steps):
            rate = lr * (1.0 - step / self.steps)
            try:
                result = self.stepper.train_step(self.batches(step), rate, self.weight_decay)
            except DivergedError:
                return math.inf
            self.taken += 1
            self.forwards += self._per_step
            self.moved |= any(result.measured_grads) or self.weight_decay != 0.0
            if result.skipped:
                return math.inf
            self.watch.observe(step, result.lane_losses, result.measured_grads)
            losses.append(result.loss)
            if _diverges(losses):
                return math.inf
        loss = self.loss()
        return loss if math.isfinite(loss) else math.inf

    def loss(self) -> float:
        """Mean over all held-out examples on the current weights; the same on every rank."""
        replica, groups = self.stepper.replica, self.held_out
        mine = groups[replica.rank :: replica.world_size]
        with torch.no_grad():
            sums = [self.stepper.evaluate(batch) for batch in mine]
        self.forwards += len(groups)
        everyone = replica.gather(json.dumps(sums).encode())

        def mean() -> bytes:
            found: list[tuple[float, float]] = [(0.0, 0.0)] * len(groups)
            for rank, told in enumerate(everyone):
                found[rank :: replica.world_size] = json.loads(told)
            weight = math.fsum(weight for _, weight in found)
            total = math.fsum(total for total, _ in found)
            return json.dumps(total / weight if weight else math.nan).encode()

        return float(json.loads(replica.share(mean)))

    def slopes(self) -> tuple[Slopes, float]:
        """What losses say at the beginning; and the length of the run's shaped slope over a plain.

        Takes no step.
        """
        self.begin(SLOPES)
        eps, config = self.stepper.config.eps, self.stepper.config
        rows: list[tuple[Losses, Losses]] = []
        shaped: list[float] = []
        for k in range(DIRECTIONS):
            first, second = self._losses_along(k, 2 * k), self._losses_along(k, 2 * k + 1)
            rows.append((first, second))
            for at, (_, plus, minus) in enumerate((first, second)):
                self.watch.observe(2 * k + at, (plus, minus), ((plus - minus) / (2 * eps),))
                shaped += estimator.projected_grads([plus, minus], eps, "spsa", config.fitness)
        found = slopes_of(rows, eps)
        length = math.sqrt(sum(g * g for g in shaped) / len(shaped))
        plain = math.sqrt(found.squared.value)
        return found, length / plain if plain and length else 1.0

    @property
    def forwards_of_step(self) -> int:
        """Of all ranks, in one step of the run."""
        return self._per_step

    def _losses_along(self, direction: int, step: int) -> Losses:
        """At W, W + eps z and W - eps z, on the batch of a step of all ranks."""
        stepper = self.stepper
        batches, eps = self.batches(step), stepper.config.eps
        draws = [
            (direction, sign, Draw(stepper.config.seed, 0, direction, sign * eps))
            for sign in (0, 1, -1)
        ]
        rows = stepper.measure_few(batches, draws)
        alike = stepper.division.probe_parallel
        booked = Booked.of(["0", "+eps", "-eps"], rows)
        here, plus, minus = stepper.replica.mean(booked, step, "slope", alike=alike)
        self.forwards += len(draws) * self._micro_batches
        return here, plus, minus

    @property
    def _micro_batches(self) -> int:
        """Of a step, on all ranks."""
        return len(self.batches(0)) * self.stepper.division.num_data_ranks

    @property
    def _per_step(self) -> int:
        return self.stepper.config.num_lanes * self._micro_batches


def held_out_batches(examples: Sequence[Any], way: Any, rows: int) -> list[Any]:
    """Held-out examples as training sees them, few enough rows in each."""
    groups = evaluation_groups(examples, rows, way.num_rows)
    return [way.collate([examples[at] for at in group]) for group in groups]


def _diverges(losses: Sequence[float]) -> bool:
    """Whether the last losses are more than twice the first ones, and beyond their scatter."""
    if len(losses) < 2 * RECENT:
        return False
    first, last = losses[:RECENT], losses[-RECENT:]
    began, ended = math.fsum(first) / RECENT, math.fsum(last) / RECENT
    return ended - began > max(abs(began), max(first) - min(first))
