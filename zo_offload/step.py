"""One zeroth-order step, as a sequence that reads top to bottom: plan, run, reduce, record, update.

:class:`Stepper` trains a model without DeepSpeed; the engine is a coat around it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from zo_offload import direction, estimator, loss_noise, update
from zo_offload.ambient import gathered_parameters
from zo_offload.config import ZOConfig
from zo_offload.errors import DivergedError, ModelError, TaskError
from zo_offload.journal import Journal, Probe, Record
from zo_offload.lanes import Call, Lanes
from zo_offload.loss_noise import LossNoise
from zo_offload.offload.planner import make_plan
from zo_offload.ops import Draw, StepUpdate
from zo_offload.replica import LaneLoss, Replica
from zo_offload.units import map_model
from zo_offload.weights import Placement, Weights

SIGNS = (+1, -1)
DEFAULT_SLOTS = 2


class Inputs(NamedTuple):
    """A batch of positional and keyword arguments together."""

    args: tuple
    kwargs: dict[str, Any]


def call_with(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch: a mapping is keyword arguments, a tuple positional ones."""
    if isinstance(batch, Inputs):
        return model(*batch.args, **batch.kwargs)
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def model_loss(model: nn.Module, batch: Any, outputs: Any) -> torch.Tensor | None:
    """The model's own loss: ``.loss``, or the output when that is a scalar; else None."""
    loss = getattr(outputs, "loss", outputs)
    if isinstance(loss, Mapping):
        loss = loss.get("loss")
    if isinstance(loss, tuple) and loss:
        loss = loss[0]
    return loss if isinstance(loss, torch.Tensor) and loss.numel() == 1 else None


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    Attributes:
        loss: ``fn(model, batch, outputs)`` to a per-example tensor (its mean counts, with weight 1)
        or
            to ``(sum, weight)``. Need not be differentiable.
        forward: ``fn(model, batch)`` to outputs.
    """

    loss: Callable[[nn.Module, Any, Any], Any] = model_loss
    forward: Callable[[nn.Module, Any], Any] = call_with


@dataclass(frozen=True)
class StepResult:
    """What a step found and did.

    Attributes:
        step: Its number, from 0.
        loss: Mean over micro-batches, probes and signs.
        projected_grads: One a probe.
        lane_losses: In (probe, sign) order, each a mean over micro-batches.
        lr: Learning rate that was applied.
    """

    step: int
    loss: float
    projected_grads: tuple[float, ...]
    lane_losses: tuple[float, ...]
    lr: float


@dataclass
class Stepper:
    """Trains a model with forward passes only.

    Args:
        model: Any ``nn.Module`` with repeated blocks; its weights move into a store, it stays in
            evaluation mode.
        config: The ``zeroth_order`` block.
        device: Where forwards run.
        dtype: What forwards compute in (default: as the model is). Masters keep the values given.
        objective: What is minimised (default: the model's own loss).
        scales: Factor on z by parameter name, instead of ``direction_scale``'s.

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

    def __post_init__(self) -> None:
        self._device = torch.device(self.device)
        self.model.eval()
        if self.scales is None:
            self.scales = self._scales()
        cast_buffers(self.model, self.dtype, self._device)
        model_map = map_model(self.model, self.config.unit_classes, self.scales, self.dtype)
        placement = self._placement()
        num_draws = len(SIGNS) * self.config.probes
        self.plan = make_plan(
            model_map,
            placement.tier == "host",
            placement.num_slots,
            num_draws,
            gathered_parameters(self.model, model_map.ambient.segments),
        )
        self.plan.check(self.config.device_budget, self.config.host_budget)
        self.weights = Weights(self.model, model_map, placement, self.config.direction)
        self.lanes = Lanes(self.model, self.weights, num_draws)
        self.replica = Replica()
        self.journal: Journal | None = None
        self._owed_decay = 1.0

    @property
    def step(self) -> int:
        """Steps taken."""
        return len(self.weights.history)

    def train_step(
        self, batches: Sequence[Any], lr: float, weight_decay: float = 0.0
    ) -> StepResult:
        """Estimate along this step's directions on all micro-batches in one visit, and descend.

        Args:
            batches: Micro-batches; see :func:`call_with`.
            lr: Learning rate.
            weight_decay: Decoupled decay rate.

        Raises:
            DivergedError: A loss is not finite; the step is not taken.
        """
        losses = self.measure(batches, self.draws())
        means = self.replica.mean_losses(losses, self.step)
        return self.descend(means, lr, weight_decay)

    def draws(self) -> list[tuple[int, int, Draw]]:
        """This step's ``(probe, sign, draw)`` in lane order."""
        return [
            (probe, sign, Draw(self.config.seed, self.step, probe, sign * self.config.eps))
            for probe in range(self.config.probes)
            for sign in SIGNS
        ]

    def measure(
        self, batches: Sequence[Any], draws: Sequence[tuple[int, int, Draw]]
    ) -> list[LaneLoss]:
        """The loss of every draw on every micro-batch, in one visit."""
        results = self.run_lanes(batches, draws, keep_outputs=False)
        places = [(probe, sign, i) for probe, sign, _ in draws for i in range(len(batches))]
        return [
            LaneLoss(*place, *loss_sum(loss))
            for place, (loss, _) in zip(places, results, strict=True)
        ]

    def run_lanes(
        self,
        batches: Sequence[Any],
        draws: Sequence[tuple[int, int, Draw]],
        keep_outputs: bool = True,
    ) -> list[tuple[Any, Any]]:
        """``(loss, outputs)`` of every draw on every micro-batch, draws outermost, in one visit."""
        self.model.eval()  # whatever the caller did to it meanwhile
        moved = [move_to(batch, self._device) for batch in batches]
        calls = [
            Call(self._lane(batch, keep_outputs), draw) for _, _, draw in draws for batch in moved
        ]
        with without_cache(self.model):
            return self.lanes.run(calls, generator_seed=self.step)

    def descend(
        self, means: Mapping[tuple[int, int], float], lr: float, weight_decay: float = 0.0
    ) -> StepResult:
        """Turn mean losses by (probe, sign) into this step's update, recorded before applied."""
        plus = [means[probe, +1] for probe in range(self.config.probes)]
        minus = [means[probe, -1] for probe in range(self.config.probes)]
        grads = estimator.spsa(plus, minus, self.config.eps)
        return self.apply(
            grads,
            tuple(means[key] for key in sorted(means, key=lambda k: (k[0], -k[1]))),
            lr,
            weight_decay,
        )

    def apply(
        self, grads: Sequence[float], lane_losses: tuple[float, ...], lr: float, weight_decay: float
    ) -> StepResult:
        """Record a step with these projected gradients, then let it take effect."""
        step = self.step
        if not all(math.isfinite(g) for g in grads):
            raise DivergedError(
                f"step {step}: projected gradients {list(grads)}; the step was not taken"
            )
        coefficients = update.sgd(grads, lr)
        decay, owed = update.gather_decay(self._owed_decay, lr, weight_decay)
        probes = tuple(
            Probe(k, g, c) for k, (g, c) in enumerate(zip(grads, coefficients, strict=True))
        )
        record = Record(step, probes, lane_losses, eps=self.config.eps, lr=lr, decay=decay)
        if self.journal is not None:
            self.journal.append(record)
        self._owed_decay = owed
        self.weights.history.append(self._update_of(record))
        return StepResult(step, sum(lane_losses) / len(lane_losses), tuple(grads), lane_losses, lr)

    def bit_header(self) -> dict[str, Any]:
        """Everything that decides the bits of the weights, for the journal's header.

        Only before the first step: the digest is of the base weights.
        """
        assert self.step == 0
        config = self.config
        return {
            "base_sha256": self.weights.digest(),
            "seed": config.seed,
            "eps": config.eps,
            "probes": config.probes,
            "estimator": config.estimator,
            "direction": config.direction,
            "direction_scale": config.direction_scale,
            "scales": dict(sorted((self.scales or {}).items())),
            "update": config.update.type,
            "lag": config.update.lag,
            "master": config.master,
            "forward": sorted(
                {str(span.dtype) for u in self.weights.map.everything for span in u.spans}
            ),
            "counter": "block, parameter, step, probe | stream << 16",
        }

    def follow(self, journal: Journal, weight_decay: float = 0.0) -> None:
        """Continue a journal: take over the steps it holds, and append to it from now on.

        The model must hold the journal's base weights, and no step may have been taken.
        """
        assert self.step == 0
        for record in journal.records:
            self.weights.history.append(self._update_of(record))
            _, self._owed_decay = update.gather_decay(self._owed_decay, record.lr, weight_decay)
        self.journal = journal

    def measure_noise(self, batch: Any, directions: int = 2) -> LossNoise:
        """Rounding noise of the losses on a batch, against the signal of a step; takes no step."""
        points = loss_noise.positions(self.config.eps)
        draws = [
            (number, 1, Draw(self.config.seed, self.step, number, coefficient))
            for number in range(directions)
            for coefficient in points
        ]
        losses = [
            loss.total / loss.weight if loss.weight else math.nan
            for loss in self.measure([batch], draws)
        ]
        rows = [losses[i : i + len(points)] for i in range(0, len(losses), len(points))]
        return loss_noise.estimate(rows)

    def forward(self, batch: Any) -> Any:
        """The model's output on the current weights."""
        moved = move_to(batch, self._device)
        return self.run_model(lambda: self.objective.forward(self.model, moved))

    def evaluate(self, batch: Any) -> tuple[float, float]:
        """``(sum, weight)`` of a batch's loss on the current weights."""
        moved = move_to(batch, self._device)

        def run() -> tuple[float, float]:
            outputs = self.objective.forward(self.model, moved)
            return loss_sum(self.objective.loss(self.model, moved, outputs))

        return self.run_model(run)

    def run_model(self, run: Callable[[], Any]) -> Any:
        """The result of code that calls the model (``generate``, say), on the current weights."""
        return self.lanes.run_one(run)

    def close(self) -> None:
        """End threads and remove hooks; the weights stay readable through ``state_dict()``."""
        self.lanes.close()
        self.weights.close()
        if self.journal is not None:
            self.journal.close()

    def __enter__(self) -> "Stepper":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _lane(self, batch: Any, keep_outputs: bool) -> Callable[[], tuple[Any, Any]]:
        def run() -> tuple[Any, Any]:
            outputs = self.objective.forward(self.model, batch)
            return self.objective.loss(
                self.model, batch, outputs
            ), outputs if keep_outputs else None

        return run

    def _update_of(self, record: Record) -> StepUpdate:
        draws = (
            Draw(self.config.seed, record.step, probe.number, probe.coefficient)
            for probe in record.probes
        )
        return StepUpdate(record.decay, tuple(draws))

    def _scales(self) -> Mapping[str, float]:
        if self.config.direction_scale == "none":
            return {}
        return direction.rms_scales(
            {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        )

    def _placement(self) -> Placement:
        offload = self.config.offload_param
        return Placement(
            device=self._device,
            tier="host" if offload.device == "cpu" else "device",
            num_slots=offload.buffer_count or DEFAULT_SLOTS,
            pin_memory=offload.pin_memory,
            device_budget=self.config.device_budget,
        )


def loss_sum(loss: Any) -> tuple[float, float]:
    """``(sum, weight)`` of what an objective returned, as float64.

    Raises:
        TaskError: There is none.
        ModelError: The loss was computed in half precision, whose steps would drown the signal.
    """
    if loss is None:
        raise TaskError(
            "the model returned no scalar loss: put labels into the batch, or pass "
            "objective=fn(model, batch, outputs)"
        )
    total, weight = loss if isinstance(loss, tuple) else (loss, 1.0)
    if isinstance(total, torch.Tensor):
        if total.dtype in (torch.bfloat16, torch.float16):
            step = torch.finfo(total.dtype).eps * max(abs(float(total.float().mean())), 1e-3)
            raise ModelError(
                f"the loss is {str(total.dtype).removeprefix('torch.')}, whose steps here are "
                f"{step:.1g}, far above the loss difference of a step; compute it in float32 "
                "(logits.float()) in the model or the objective"
            )
        total = total.double()
        total = float(total.mean() if not isinstance(loss, tuple) else total.sum())
    return float(total), float(weight)


def move_to(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device; containers keep their types."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: move_to(value, device) for key, value in batch.items()}
    if isinstance(batch, Inputs):
        return Inputs(move_to(batch.args, device), move_to(batch.kwargs, device))
    if type(batch) in (list, tuple):
        return type(batch)(move_to(value, device) for value in batch)
    return batch


def cast_buffers(model: nn.Module, dtype: torch.dtype | None, device: torch.device) -> None:
    """Move buffers to the device; those that a checkpoint holds take the forward's dtype."""
    saved = set(model.state_dict(keep_vars=True))
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            casts = (
                dtype is not None
                and buffer.is_floating_point()
                and f"{path}.{name}".lstrip(".") in saved
            )
            module._buffers[name] = buffer.to(device=device, dtype=dtype if casts else None)


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Switch key-value caches off, which a training lane would fill and never read."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    switched = [c for c in configs.values() if getattr(c, "use_cache", False)]
    for config in switched:
        config.use_cache = False
    try:
        yield
    finally:
        for config in switched:
            config.use_cache = True
