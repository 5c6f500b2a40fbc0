"""One zeroth-order step, as a sequence that reads top to bottom: plan, run, reduce, record, update.

:class:`Stepper` trains a model without DeepSpeed; the engine is a coat around it.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zo_offload import direction, estimator, loss_noise, natural, update
from zo_offload.agreement import Agreement
from zo_offload.clock import EXCHANGE, JOURNAL
from zo_offload.config import ZOConfig
from zo_offload.config_update import momentum_of
from zo_offload.converted import converted_of, mark_converted
from zo_offload.eps_watch import EpsWatch
from zo_offload.generators import lane_seed
from zo_offload.guard import Guard
from zo_offload.journal import Flags, Journal, Probe, Record
from zo_offload.journal.header import as_stored, canonical
from zo_offload.lane import Call
from zo_offload.lanes import Lanes
from zo_offload.lazy_logits import made
from zo_offload.loss_noise import LossNoise
from zo_offload.objective import Objective, example_losses, loss_sum, move_to, shapes_of
from zo_offload.offload.planner import Plan
from zo_offload.offload.residency import NVME
from zo_offload.offload.run_files import Disk
from zo_offload.offload.slot import Identity
from zo_offload.ops import Draw
from zo_offload.placing import Placing
from zo_offload.prepare import cast_buffers, without_cache
from zo_offload.replica import Division, Replica
from zo_offload.sharing import shared_by_machine
from zo_offload.trainable.choose import trainable_for
from zo_offload.trainable.trainable import Trainable
from zo_offload.units import IDENTITY
from zo_offload.unmanageable import refuse_empty, refuse_taken, refuse_unmanageable
from zo_offload.weights import Weights
from zo_offload.window import Means, MicroBatch, Sum, Window
from zo_offload.windowed import history_of

MOST_LANES = 64


@dataclass(frozen=True)
class StepResult:
    """What a step found and did.

    Attributes:
        step: Its number, from 0.
        loss: Mean over micro-batches, probes and signs.
        projected_grads: One a probe, as they were applied.
        measured_grads: The same before they were clipped.
        skipped: Whether nothing was applied, as no loss that counts was finite.
        lane_losses: In (probe, sign) order, each a mean over micro-batches.
        lr: Learning rate that was applied.
    """

    step: int
    loss: float
    projected_grads: tuple[float, ...]
    measured_grads: tuple[float, ...]
    lane_losses: tuple[float, ...]
    lr: float
    skipped: bool = False


@dataclass
class Stepper:
    """Trains a model with forward passes only.

    Args:
        model: Any ``nn.Module`` with repeated blocks; its weights move into a store, it stays in
            evaluation mode. With ``"trainable": {"mode": "peft"}`` it is wrapped, and then the
            attribute is the ``PeftModel``.
        config: The ``zeroth_order`` block.
        device: Where forwards run.
        dtype: What forwards compute in (default: as the model is). Masters keep the values given.
        objective: What is minimised (default: the model's own loss).
        scales: Factor on z by parameter name, instead of ``direction_scale``'s.
        replica: The other ranks (default: there are none).
        mode: What moves (default: as the config and the model say).

    Attributes:
        journal: The record of every step taken; in memory, until :meth:`follow` gives it a file.
        trainable: What moves.
        division: Which lanes of which micro-batches this rank runs.
        agreement: Compares this rank's weights with the others'.
        guard: Acts on losses that go wrong.

    Example:
        >>> from torch import nn
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        ...
        ...     def forward(self, x):
        ...         for block in self.blocks:
        ...             x = block(x)
        ...         return x.square().mean()
        >>> stepper = Stepper(Net(), ZOConfig(eps=1e-3))
        >>> batch = torch.ones(2, 4)
        >>> results = [stepper.train_step([batch], lr=1e-2) for _ in range(200)]
        >>> results[-1].loss < 0.5 * results[0].loss
        True

        What a step does can be had in parts: its directions, their losses, the model as it is.

        >>> [(probe, sign, draw.step) for probe, sign, draw in stepper.draws()]
        [(0, 1, 200), (0, -1, 200)]
        >>> stepper.my_draws() == stepper.draws()  # no other rank takes a part of them
        True
        >>> ((plus, minus),) = stepper.measure([batch], stepper.draws())  # a (sum, weight) each
        >>> bool(abs(stepper.evaluate(batch)[0] - (plus[0] + minus[0]) / 2) < 1e-3)
        True
        >>> stepper.forward(batch).shape, stepper.step
        (torch.Size([]), 200)
        >>> stepper.plan.host_bytes  # nothing is offloaded
        0
        >>> stepper.close()

    Reference:
        Malladi et al. (2023), arXiv 2305.17333, algorithm 1. Deviation: weights are perturbed out
        of place, so rounding never drifts them.
    """

    model: nn.Module
    config: ZOConfig = field(default_factory=ZOConfig)
    device: torch.device | str = "cpu"
    dtype: torch.dtype | None = None
    objective: Objective = field(default_factory=Objective)
    scales: Mapping[str, float] | None = None
    replica: Replica = field(default_factory=Replica)
    mode: Trainable | None = None

    def __post_init__(self) -> None:
        self._device = torch.device(self.device)
        self._momentum = momentum_of(self.config.update, self.config.trainable.mode)
        self.replica.link.timeout = self.config.replica.timeout_seconds
        rank, world_size = self.replica.rank, self.replica.world_size
        self.division = Division(rank, world_size, self.config.replica.probe_parallel)
        refuse_taken(self.model)
        given = self.model
        self.trainable = self.mode or trainable_for(given, self.config, self.dtype)
        try:
            self.model = self.trainable.prepare(given)
            self._take_over()
        except BaseException:
            self.model = given
            self.trainable.abandon()
            raise

    def _take_over(self) -> None:
        refuse_unmanageable(self.model, self.trainable.moves_parameters)
        refuse_empty(self.model)
        self.model.eval()
        if self.scales is None:
            self.scales = self._scales()
        self._placing = Placing(
            self.model, self.config, self._device, self.dtype, self.scales, self.trainable.moving
        )
        model_map = self._placing.map()
        placement = self._placing.place(model_map, self._disk())
        placement = shared_by_machine(self.replica, self.model, model_map, placement)
        self._together = placement.together
        cast_buffers(self.model, self.dtype, self._device)
        direction, lag = self.config.direction, self.config.update.lag
        base = self._placing.base(model_map)
        self.weights = Weights(self.model, model_map, placement, direction, lag, base)
        self.weights.joins = self._momentum is not None
        try:
            most = self.config.live_lanes or MOST_LANES
            draws, chunk = self._placing.num_draws, self.config.head_chunk
            joined = self.config.joined_rows
            self.lanes = Lanes(self.model, self.weights, draws, most, chunk, joined)
        except BaseException:
            self.weights.close()
            raise
        options = self.config.replica
        repair = options.on_mismatch == "repair"
        self.agreement = Agreement(self.weights, self.replica, options.check_interval, repair)
        self.follow(Journal.memory({}))

    @property
    def plan(self) -> Plan:
        """The bytes that weights take, by purpose."""
        needs = self._placing.needs(self.weights.map, self.lanes.copies.names)
        return needs.plan(self.weights.tiers)

    @property
    def clip(self) -> float:
        """Limit on the magnitude of projected gradients."""
        return self.config.clip or self.trainable.clip

    @property
    def step(self) -> int:
        """Steps taken."""
        return self.journal.next_step

    def train_step(
        self, batches: Sequence[Any], lr: float, weight_decay: float = 0.0
    ) -> StepResult:
        """Estimate along this step's directions on all micro-batches in one visit, and descend.

        Args:
            batches: This rank's micro-batches; see :func:`call_with`.
            lr: Learning rate.
            weight_decay: Decoupled decay rate.

        Raises:
            DivergedError: Losses go wrong; the step is not taken, unless it is the newest of many
                that were too high, which the message says.
        """
        window = self.new_window(len(batches))
        window.book_whole(self.measure_mine(batches))
        result = self.descend(self.means(window), lr, weight_decay)
        self.guard.after_step()
        return result

    def draws(self) -> list[tuple[int, int, Draw]]:
        """This step's ``(probe, sign, draw)`` in lane order."""
        seed, eps, numbers = self.config.seed, self.config.eps, self._numbers()
        return [
            (probe, sign, Draw(seed, self.step, numbers[probe], sign * eps))
            for probe in range(self.config.probes)
            for sign in self.config.signs
        ]

    def _numbers(self) -> range:
        """Of this step's probes in the noise counter: others after each roll back."""
        first = self.journal.records.stream * self.config.probes
        return range(first, first + self.config.probes)

    def my_draws(self) -> Sequence[tuple[int, int, Draw]]:
        """Those of them whose lanes this rank runs."""
        return self.division.mine(self.draws())

    def measure(
        self, batches: Sequence[Any], draws: Sequence[tuple[int, int, Draw]]
    ) -> list[list[Sum]]:
        """``(total, weight)`` of every micro-batch's loss along every draw, in one visit.

        Returns:
            A row a micro-batch, in it a pair a draw.
        """
        return [[loss_sum(loss) for loss in row] for row in self._losses(batches, draws)]

    def measure_mine(self, batches: Sequence[Any]) -> list[MicroBatch]:
        """Whatever the step takes from this rank's lanes on its micro-batches, in one visit.

        Raises:
            TaskError: The config compares examples, and the objective returns no loss of each.
        """
        draws, found = self.my_draws(), list[MicroBatch]()
        lanes = [(probe, sign) for probe, sign, _ in draws]
        for row in self._losses(batches, draws):
            sums = dict(zip(lanes, map(loss_sum, row), strict=True))
            found.append(MicroBatch(sums, products=self._products(row)))
        return found

    def _losses(
        self, batches: Sequence[Any], draws: Sequence[tuple[int, int, Draw]]
    ) -> list[list[Any]]:
        """What the objective gave: a row a micro-batch, in it one a draw."""
        results = self.run_lanes(batches, draws, keep_outputs=False)
        losses = [loss for loss, _ in results]  # draws outermost
        return [losses[i :: len(batches)] for i in range(len(batches))]

    def _products(self, losses: Sequence[Any]) -> Sequence[float]:
        if self.config.natural is None:
            return ()
        return natural.mean_products(example_losses(losses), self.config.estimator)

    def new_window(self, num_micro_batches: int) -> Window:
        """Empty books for the step that is next."""
        lanes = [(probe, sign) for probe, sign, _ in self.draws()]
        return Window(lanes, num_micro_batches, self.division)

    def means(self, window: Window) -> Means:
        """What was booked, averaged over the micro-batches of all ranks; the same on every rank.

        Raises:
            DivergedError: A loss is not finite.
        """
        booked, names = window.booked(), window.names
        finite = self.config.guard.nonfinite == "stop"
        with self.weights.clock.stepping.part(EXCHANGE):
            means = self.replica.mean(booked, self.step, names=names, finite=finite)
        return window.means(means)

    def run_lanes(
        self,
        batches: Sequence[Any],
        draws: Sequence[tuple[int, int, Draw]],
        keep_outputs: bool = True,
        first: int = 0,
    ) -> list[tuple[Any, Any]]:
        """``(loss, outputs)`` of every draw on every micro-batch, draws outermost, in one visit.

        Args:
            batches: Micro-batches.
            draws: As :meth:`draws` gives them.
            keep_outputs: Else there is None instead of outputs.
            first: Micro-batches of the step that earlier visits took.
        """
        self.guard.refuse_ended()
        self.model.eval()  # whatever the caller did to it meanwhile
        moved = [move_to(batch, self._device) for batch in batches]
        calls = [
            Call(self._lane(batch, keep_outputs), draw, self._lane_seed(i), i)
            for _, _, draw in draws
            for i, batch in enumerate(moved, start=first)
        ]
        with without_cache(self.model):
            return self.lanes.run(calls, [shapes_of(batch) for batch in moved])

    def _lane_seed(self, micro_batch: int) -> int:
        """For this rank's micro-batch: of its number among those of all ranks."""
        number = micro_batch * self.division.num_data_ranks + self.division.data_rank
        return lane_seed(self.config.seed, self.step, number)

    def descend(
        self, means: Means, lr: float, weight_decay: float = 0.0, samples: int = 0
    ) -> StepResult:
        """Turn mean losses into this step's update: recorded first, then in effect.

        Args:
            means: Of the step's lanes, and what came through logits.
            lr: Learning rate; after roll backs a part of it.
            weight_decay: Decoupled decay rate.
            samples: Consumed by the run when the step ends, for the record.

        Raises:
            DivergedError: Losses go wrong, and ``guard`` says to stop. The step is not taken.
            RolledBackError: Likewise, and the journal has gone back.
            ReplicaError: The step was taken, and ranks' weights differ, or what they did.
        """
        step = self.step
        measured, lane_losses = self._projected_grads(means)
        measured, skipped = self._screened(measured, lane_losses)
        loss = estimator.mean_loss(lane_losses)
        if not skipped and self.guard.before_step(loss):
            measured, skipped = [0.0] * len(measured), True
        lr *= self.guard.lr_share
        grads = estimator.clipped(measured, self.clip)
        coefficients = [0.0] * len(grads)
        if not skipped:
            coefficients = self._history.coefficients(grads, lr)
        owed = self.journal.last.owed if self.journal.last else 1.0
        decay = 1.0
        if not skipped:
            decay, owed = update.gather_decay(owed, lr, weight_decay)
        record = Record(
            step,
            tuple(map(Probe, self._numbers(), grads, coefficients)),
            tuple(lane_losses),
            eps=self.config.eps,
            lr=lr,
            decay=decay,
            owed=owed,
            loader_position=samples,
            generator_position=step + 1,
            flags=Flags.SKIPPED if skipped else Flags.NONE,
            branch=self.journal.branch,
        )
        with self.weights.clock.stepping.part(JOURNAL):
            self.journal.append(record)
        with self.weights.clock.stepping.part(EXCHANGE):
            self.agreement.after_step(record)
        return StepResult(
            step,
            loss,
            tuple(grads),
            tuple(measured),
            tuple(lane_losses),
            lr,
            skipped,
        )

    def _screened(
        self, measured: Sequence[float], lane_losses: Sequence[float]
    ) -> tuple[list[float], bool]:
        """The same with 0 for probes that are left out, and whether too few remain for a step."""
        name = self.config.estimator
        usable = estimator.usable(lane_losses, name)
        fit = {probe for probe in usable if math.isfinite(measured[probe])}
        if len(fit) < len(measured):
            self.guard.on_nonfinite(f"projected gradients {list(measured)}")
        if len(fit) < estimator.LEAST_PROBES[name]:
            return [0.0] * len(measured), True
        return [g if probe in fit else 0.0 for probe, g in enumerate(measured)], False

    def _projected_grads(self, means: Means) -> tuple[list[float], list[float]]:
        """By probe, and the loss of every lane in (probe, sign) order."""
        probes = range(self.config.probes)
        slopes = [means.slopes.get(probe, 0.0) for probe in probes]
        if not means.lanes:  # the loss was computed outside: what it is along each direction
            eps = self.config.eps
            signs = self.config.signs
            losses = [means.caller_loss + sign * eps * slopes[k] for k in probes for sign in signs]
            return slopes, losses
        config, losses = self.config, list(means.lanes.values())  # in (probe, sign) order
        name = config.estimator
        grads = estimator.projected_grads(losses, config.eps, name, config.fitness)
        if config.natural is not None:
            usable = estimator.usable(losses, name)
            grads = natural.preconditioned(grads, means.products, config.natural, usable, name)
        return [g + slope for g, slope in zip(grads, slopes, strict=True)], losses

    def bit_header(self) -> dict[str, Any]:
        """Everything that decides the bits of the weights, for the journal's header.

        Given a step's scalars, that is: how a forward comes by its loss (``head_chunk``, devices)
        decides those scalars in their last bits, and the records hold them.
        Only before the first step: the digest is of the base weights.
        """
        assert self.step == 0
        config = self.config
        damping = {} if config.natural is None else {"natural": config.natural}
        objective = {"objective": self.objective.name} if self.objective.name else {}
        return {
            **objective,
            "base_sha256": self.weights.base_sha256 or self._digest(),
            "seed": config.seed,
            "eps": config.eps,
            "probes": config.probes,
            "estimator": config.estimator,
            "fitness": config.fitness,
            **damping,
            "clip": self.clip if math.isfinite(self.clip) else None,
            "direction": config.direction,
            "direction_scale": config.direction_scale,
            "scales": dict(sorted((self.scales or {}).items())),
            "update": self._momentum.header() if self._momentum else config.update.type,
            "lag": config.update.lag,
            "master": config.master,
            "wire": self._placing.wire,
            "streamed": self._streamed(),
            "forward": sorted(
                {str(span.dtype) for u in self.weights.map.everything for span in u.spans}
            ),
            "counter": "block, parameter, step, probe | stream << 16",
            **self.trainable.header(self.model),
        }

    def _digest(self) -> str:
        """Of the weights; once on a machine, whose ranks were found to have begun with the same."""
        together, digest = self._together, self.weights.digest
        return together.once(digest) if together is not None else digest()

    def _streamed(self) -> str | None:
        """Digest of which parameters are in units, where that decides bits."""
        if not self.config.update.lag and self._placing.wire == IDENTITY:
            return None
        names = {segment.name for unit in self.weights.map.units for _, segment in unit.segments}
        return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()

    def follow(self, journal: Journal, persists: bool | None = None) -> None:
        """Take over the steps that a journal holds, and append to it from now on.

        The model must hold the journal's base weights, and no step may have been taken. All ranks
        call this together.

        Args:
            journal: Whose.
            persists: Whether a later process may go on with it, and with what is left on disks
                (default: if it has a file).
        """
        self.journal = journal
        persists = journal.path is not None if persists is None else persists
        self.guard = Guard(self.config.guard, journal, persists)
        self.weights.forget_fetched()
        self._history = history_of(journal.records, self.config.seed, self._momentum)
        self.weights.history = self._history
        if persists:
            self.weights.adopt(self._identity())

    def new_watch(self) -> EpsWatch:
        """What looks at the losses of a run's steps."""
        spans = (span for unit in self.weights.map.everything for span in unit.spans)
        double = any(span.dtype == torch.float64 for span in spans)
        return EpsWatch(self.config.eps, len(self.config.signs), significand=53 if double else 24)

    def measure_noise(self, batch: Any, directions: int = 2) -> LossNoise:
        """Rounding noise of the losses on a batch, against the signal of a step; takes no step."""
        points = loss_noise.positions(self.config.eps)
        draws = [
            (number, 1, Draw(self.config.seed, self.step, number, coefficient))
            for number in range(directions)
            for coefficient in points
        ]
        (sums,) = self.measure_few([batch], draws)
        losses = [total / weight if weight else math.nan for total, weight in sums]
        rows = [losses[i : i + len(points)] for i in range(0, len(losses), len(points))]
        return loss_noise.estimate(rows)

    def measure_few(
        self, batches: Sequence[Any], draws: Sequence[tuple[int, int, Draw]]
    ) -> list[list[Sum]]:
        """As :meth:`measure`, in visits with no more forwards alive than in a step."""
        at_once = self._placing.num_draws
        parts = [
            self.measure(batches, draws[i : i + at_once]) for i in range(0, len(draws), at_once)
        ]
        return [[pair for row in rows for pair in row] for rows in zip(*parts, strict=True)]

    def forward(self, batch: Any, by: Callable[[nn.Module, Any], Any] | None = None) -> Any:
        """The model's output on the current weights.

        Args:
            batch: What the model is called with; moved to ``device``.
            by: A call ``fn(model, batch)`` that is not the objective's.

        Returns:
            What the call returns, without gradients.
        """
        moved = move_to(batch, self._device)
        run = partial(by or self.objective.forward, self.model, moved)
        return self._run_one(run, [shapes_of(moved)])

    def evaluate(self, batch: Any) -> tuple[float, float]:
        """``(sum, weight)`` of a batch's loss on the current weights, as float64.

        Args:
            batch: As in training.

        Raises:
            TaskError: The objective gave no loss.
        """
        moved = move_to(batch, self._device)

        def run() -> tuple[float, float]:
            outputs = self.objective.forward(self.model, moved)
            return loss_sum(self.objective.loss(self.model, moved, outputs))

        return self._run_one(run, [shapes_of(moved)])

    def run_model(self, run: Callable[[], Any]) -> Any:
        """The result of code that calls the model (``generate``, say), on the current weights.

        Args:
            run: Called once, without arguments, in a lane of its own.

        Returns:
            What ``run`` does.
        """
        return self._run_one(run)

    def _run_one(self, run: Callable[[], Any], shapes: Sequence[Any] = ()) -> Any:
        self.guard.refuse_ended()
        return self.lanes.run_one(run, shapes)

    def close(self) -> None:
        """End threads and remove hooks; the model has its weights back."""
        self.lanes.close()
        if self.step or self.weights.base_sha256 is None:
            mark_converted(self.model, None)  # its weights are other ones by now
        self.weights.close()
        self.trainable.undo()
        self.journal.close()

    def __enter__(self) -> "Stepper":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _lane(self, batch: Any, keep_outputs: bool) -> Callable[[], tuple[Any, Any]]:
        def run() -> tuple[Any, Any]:
            outputs = self.objective.forward(self.model, batch)
            loss = made(self.objective.loss(self.model, batch, outputs), "the objective's value")
            if loss is None and keep_outputs:  # the caller computes one from the logits
                outputs = made(outputs, "an output without a loss")
            return loss, outputs if keep_outputs else None

        return run

    def _scales(self) -> Mapping[str, float]:
        if self.config.direction_scale == "none":
            return {}
        relative = self.config.direction_scale == "relative"
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        trained |= {each.name: each.parameter for each in self.trainable.moving.overlays}
        converted = converted_of(self.model)
        if converted is not None:
            squares = converted.record.squares  # of what lies in units, the only place
            known = {
                n: (squares[n] if n in squares else direction.square(p), p.numel())
                for n, p in trained.items()
            }
            return direction.scales_from(known, relative)
        return direction.rms_scales(trained, relative)

    def _disk(self) -> Disk | None:
        paths = self.config.offload_param.nvme_path
        if self._placing.tier != NVME or paths is None:
            return None
        return Disk(
            tuple(Path(path).absolute() for path in paths),  # the working directory may change
            self._placing.aio,
            before_write=lambda step: self.journal.sync_to(step),
            branch_of=self._branch_of,
        )

    def _branch_of(self, step: int) -> int:
        """Of the journal's line of history, where it has taken so many steps."""
        records = self.journal.records
        return records[step - 1].branch if 0 < step <= len(records) else 0

    def _identity(self) -> Identity:
        """Of the run, for files that are its own."""
        fields = self.journal.header.fields
        run = hashlib.sha256(canonical(as_stored(fields))).hexdigest()[:32]
        return Identity(run, str(fields["base_sha256"]), "identity")
