"""The DeepSpeed engine: backward and optimizer replaced by the zeroth-order step.

The only file that knows DeepSpeed. The base class keeps what its users expect (loader, schedulers,
monitors, timers, counters); this subclass keeps it away from the weights, which live in a store.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.dataloader import RepeatingLoader
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from zo_offload import estimator, midpoint
from zo_offload.config import ZOConfig, load_json, parse_config
from zo_offload.errors import ConfigError, ModelError
from zo_offload.journal import Journal
from zo_offload.loss_noise import LossNoise
from zo_offload.replica import LaneLoss
from zo_offload.step import SIGNS, Inputs, Objective, Stepper, StepResult, loss_sum, model_loss

logger = logging.getLogger(__name__)

MOST_NOISE = 0.5
DEFAULT_LR = 1e-6  # MeZO's for full-parameter tuning of OPT


def initialize(
    args: Any = None,
    model: nn.Module | str | Path | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    mesh_param: Any = None,
    config_params: str | Mapping[str, Any] | None = None,
    objective: Objective | Callable | None = None,
) -> "tuple[ZOEngine, torch.optim.Optimizer, Any, Any]":
    """Make an engine that trains with forward passes only; the signature of ``deepspeed.initialize``.

    Args:
        args: May carry ``deepspeed_config``.
        model: A module, or a local directory or id that transformers can load as a causal LM.
        optimizer: Carries learning rate and weight decay only (default: from the JSON).
        model_parameters: Accepted for compatibility; what moves is ``zeroth_order.trainable``.
        training_data: A dataset; makes the loader that is returned.
        lr_scheduler: A scheduler, or a callable from optimizer to scheduler (default: from the JSON).
        distributed_port: For the process group.
        mpu: Not supported.
        dist_init_required: As in DeepSpeed.
        collate_fn: For the loader.
        config: DeepSpeed JSON, as path or mapping, with the ``zeroth_order`` block.
        mesh_param: Not supported.
        config_params: Older name of ``config``.
        objective: ``fn(model, batch, outputs)``, see :class:`zo_offload.step.Objective`.

    Returns:
        ``(engine, optimizer, loader, scheduler)``.

    Raises:
        ConfigError: Before any model is touched.
    """
    if mpu is not None or mesh_param is not None:
        raise ConfigError(
            "mpu and mesh_param: a model-parallel layout is not supported; ranks hold the whole model"
        )
    config = config if config is not None else config_params
    config = config if config is not None else getattr(args, "deepspeed_config", None)
    if config is None:
        raise ConfigError("no config: pass config=PATH_OR_DICT with a zeroth_order block")
    config = dict(config) if isinstance(config, Mapping) else load_json(config)
    parsed = parse_config(config)
    if not parsed.enabled:
        raise ConfigError(
            "zeroth_order.enabled is false; call deepspeed.initialize, or set it to true"
        )
    if model is None:
        raise ConfigError("no model: pass a module, a directory, or a model id")
    init_distributed(distributed_port, dist_init_required)
    ds_config = deepspeed_config(config)
    engine = ZOEngine(
        model=model if isinstance(model, nn.Module) else load_model(model),
        config=parsed,
        ds_config=ds_config,
        raw_config=config,
        args=args,
        optimizer=optimizer,
        training_data=training_data,
        lr_scheduler=lr_scheduler,
        collate_fn=collate_fn,
        objective=objective,
    )
    return engine, engine.basic_optimizer, engine.training_dataloader, engine.lr_scheduler


class ZOEngine(DeepSpeedEngine):
    """``forward``, ``backward`` and ``step`` of DeepSpeed, with forwards only.

    Attributes:
        stepper: Everything below DeepSpeed.
        last_result: What the latest step found and did.
        loss_noise: Rounding noise of the losses against the signal of a step, measured on the first
            batch.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ZOConfig,
        ds_config: DeepSpeedConfig,
        raw_config: Mapping[str, Any],
        args: Any = None,
        optimizer: Any = None,
        training_data: Any = None,
        lr_scheduler: Any = None,
        collate_fn: Callable | None = None,
        objective: Objective | Callable | None = None,
    ) -> None:
        device = torch.device(deepspeed.get_accelerator().current_device_name())
        if not isinstance(objective, Objective):
            objective = Objective(loss=objective or model_loss)
        self.__dict__["_client_optimizer"] = optimizer
        self.__dict__["_weight_decay"] = _optimizer_params(raw_config).get("weight_decay", 0.0)
        self.__dict__["_default_lr"] = _optimizer_params(raw_config).get("lr", DEFAULT_LR)
        stepper = Stepper(model, config, device, forward_dtype(raw_config), objective)
        with stepper.weights.kept(model):
            super().__init__(
                args=args,
                model=model,
                optimizer=optimizer or self._make_optimizer,
                training_data=training_data,
                lr_scheduler=lr_scheduler,
                collate_fn=collate_fn,
                config=raw_config,
                config_class=ds_config,
                dont_change_device=True,
            )
        self.stepper = stepper
        self.last_result: StepResult | None = None
        self.loss_noise: LossNoise | None = None
        self._window: list[LaneLoss] = []
        self._logit_grads = [0.0] * config.probes
        self._caller_averages = False
        self._repeating_loader: Iterator | None = None
        self._modules["module"].eval()
        if config.journal.path is not None:
            self._continue_journal(config.journal.path)

    # -- the surface --

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output. Training: at the midpoint of this step's lanes, with a node for backward.

        In evaluation mode or without gradients: one unperturbed lane on the current weights.
        """
        batch = Inputs(args, kwargs) if args and kwargs else kwargs or args
        if not self.training or not torch.is_grad_enabled():
            return self.stepper.forward(batch)
        self._measure_noise(batch)
        self.tput_timer.start()
        with self._timed("forward"):
            draws = self.stepper.draws()
            results = self.stepper.run_lanes([batch], draws)
        return self._midpoint_output(results, draws)

    def backward(
        self, loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True
    ) -> torch.Tensor:
        """Book the projected gradients of a loss that ``forward`` returned, as scaled by the caller.

        Args:
            loss: Scalar computed from ``forward``'s output.
            retain_graph: As in torch.
            scale_wrt_gas: False when the caller has divided by ``gradient_accumulation_steps``.
        """
        if loss.grad_fn is None:
            raise ModelError(
                "backward: this loss has no graph; it must come from the engine's forward in training mode"
            )
        self._caller_averages = not scale_wrt_gas
        with self._timed("backward"):
            loss.backward(retain_graph=retain_graph)
        return (
            loss.detach() / self.gradient_accumulation_steps() if scale_wrt_gas else loss.detach()
        )

    def train_batch(self, data_iter: Iterator | None = None) -> torch.Tensor:
        """One whole step: ``gradient_accumulation_steps`` micro-batches in one visit.

        Args:
            data_iter: Yields micro-batches (default: the engine's loader, repeated).

        Returns:
            Mean loss over the lanes, a scalar on the CPU.
        """
        batches = self._pull(data_iter)
        self._measure_noise(batches[0])
        self.tput_timer.start()
        with self._timed("forward"):
            self._window += self.stepper.measure(batches, self.stepper.draws())
        self.micro_steps += len(batches) - 1
        self.step()
        assert self.last_result is not None
        return torch.tensor(self.last_result.loss)

    def eval_batch(self, data_iter: Iterator) -> torch.Tensor:
        """Mean loss of ``gradient_accumulation_steps`` micro-batches on the current weights."""
        totals = [
            loss_sum(self.stepper.objective.loss(self.module, batch, self.stepper.forward(batch)))
            for batch in self._pull(data_iter)
        ]
        return torch.tensor(sum(total for total, _ in totals) / sum(weight for _, weight in totals))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """``model.generate`` on the current weights."""
        return self.stepper.run_model(lambda: self.module.generate(*args, **kwargs))

    def train(self, mode: bool = True) -> "ZOEngine":
        """Choose what ``forward`` does. The model itself always stays in evaluation mode."""
        self.training = mode
        return self

    def eval(self) -> "ZOEngine":
        return self.train(False)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a plain Hugging Face directory of the current weights, in the forward's dtype."""
        if not hasattr(self.module, "save_pretrained"):
            raise ModelError(
                f"{type(self.module).__name__} has no save_pretrained; use torch.save(engine.module.state_dict())"
            )
        self.module.save_pretrained(str(directory), state_dict=self.module.state_dict())

    def get_global_grad_norm(self) -> float | None:
        """Length of the latest step's projected gradients."""
        if self.last_result is None:
            return None
        return sum(g * g for g in self.last_result.projected_grads) ** 0.5

    def destroy(self) -> None:
        """End the engine's threads and release DeepSpeed's resources."""
        stepper = self.__dict__.pop("stepper", None)
        if stepper is not None:
            stepper.close()
        super().destroy()

    # -- what the base class calls --

    def _broadcast_model(self) -> None:
        """Nothing is broadcast: ranks start from the same checkpoint."""

    def _configure_optimizer(self, client_optimizer: Any, model_parameters: Any) -> None:
        self.optimizer = (
            client_optimizer
            if isinstance(client_optimizer, torch.optim.Optimizer)
            else client_optimizer(None)
        )
        self.basic_optimizer = self.optimizer

    def _take_model_step(self, lr_kwargs: dict | None = None) -> None:
        """On the accumulation boundary: reduce, record, update; then what DeepSpeed counts."""
        group = self.optimizer.param_groups[0]
        means = self.stepper.replica.mean_losses(self._window, self.stepper.step)
        self._window = []
        plus, minus = (
            [means.get((k, sign), 0.0) for k in range(self.stepper.config.probes)] for sign in SIGNS
        )
        grads = estimator.spsa(plus, minus, self.stepper.config.eps)
        grads = [g + extra for g, extra in zip(grads, self._logit_grads, strict=True)]
        self._logit_grads = [0.0] * len(grads)
        lane_losses = tuple(value for pair in zip(plus, minus, strict=True) for value in pair)
        decay = group.get("weight_decay", 0.0)
        self.last_result = self.stepper.apply(grads, lane_losses, group["lr"], decay)
        self.optimizer.step()  # moves nothing; schedulers want to see it before their own
        self._step_applied = True
        self._global_grad_norm = self.get_global_grad_norm()
        if self.lr_scheduler is not None:
            self.lr_scheduler.step(**(lr_kwargs or {}))
        if (
            self.steps_per_print()
            and self.global_rank == 0
            and (self.global_steps + 1) % self.steps_per_print() == 0
        ):
            self._report_progress(self.global_steps + 1)
        self.losses = None
        self.global_steps += 1
        self.global_samples += self.train_batch_size()

    # -- inside --

    def _continue_journal(self, path: str) -> None:
        """Take over the steps that the journal holds; counters and schedule follow."""
        journal = Journal.open(path, self.stepper.bit_header())
        self.stepper.follow(journal, self.optimizer.param_groups[0].get("weight_decay", 0.0))
        self.global_steps = self.stepper.step
        self.global_samples = self.global_steps * self.train_batch_size()
        self.micro_steps = self.global_steps * self.gradient_accumulation_steps()
        if self.lr_scheduler is not None:
            for _ in range(self.global_steps):
                self.lr_scheduler.step()

    def _midpoint_output(self, results: list[tuple[Any, Any]], draws: list) -> Any:
        outputs = results[0][1]
        logits = [_logits(output) for _, output in results]
        if results[0][0] is None:
            values = [value for value in logits if value is not None]
            if len(values) < len(results):
                raise ModelError(
                    f"the model returned neither loss nor logits (found {type(outputs).__name__})"
                )
            tied = midpoint.tie(midpoint.mean(values), partial(self._book_logits, values))
            return midpoint.with_field(outputs, "logits", tied)
        sums = [loss_sum(loss) for loss, _ in results]
        mean = torch.tensor(
            sum(total / weight for total, weight in sums) / len(sums), device=self.stepper.device
        )
        micro_batch = self.micro_steps % self.gradient_accumulation_steps()
        tied = midpoint.tie(mean, partial(self._book_losses, sums, draws, micro_batch))
        if not isinstance(outputs, torch.Tensor) and logits[0] is not None:
            outputs = midpoint.with_field(
                outputs, "logits", midpoint.mean([x for x in logits if x is not None])
            )
        return midpoint.with_field(outputs, "loss", tied)

    def _book_losses(
        self, sums: list[tuple[float, float]], draws: list, micro_batch: int, grad: torch.Tensor
    ) -> None:
        factor = float(grad.double())
        for (probe, sign, _), (total, weight) in zip(draws, sums, strict=True):
            if self._caller_averages:  # the factors of a window already add up to a mean
                total, weight = total / weight, 1.0 / self.gradient_accumulation_steps()
            self._window.append(LaneLoss(probe, sign, micro_batch, factor * total, weight))

    def _book_logits(self, values: list[torch.Tensor], grad: torch.Tensor) -> None:
        share = 1.0 if self._caller_averages else 1.0 / self.gradient_accumulation_steps()
        for probe in range(self.stepper.config.probes):
            difference = values[2 * probe].double() - values[2 * probe + 1].double()
            slope = float((grad.double() * difference).sum()) / (2.0 * self.stepper.config.eps)
            self._logit_grads[probe] += share * slope

    def _measure_noise(self, batch: Any) -> None:
        """Once, before the first step of this process: say how well a step can be told from rounding."""
        if self.loss_noise is not None:
            return
        found = self.loss_noise = self.stepper.measure_noise(batch)
        logger.info("noise over signal of L+ - L-: %.3g (signal %.3g)", found.ratio, found.signal)
        if found.ratio > MOST_NOISE:
            logger.warning(
                "rounding drowns the signal: noise over signal of L+ - L- is %.2g at eps %g; "
                "raise eps, or compute in fp16 or fp32",
                found.ratio,
                self.stepper.config.eps,
            )

    def _pull(self, data_iter: Iterator | None) -> list[Any]:
        if data_iter is None:
            if self.training_dataloader is None:
                raise ConfigError(
                    "train_batch: no data; pass data_iter, or training_data to initialize"
                )
            if self._repeating_loader is None:
                self._repeating_loader = iter(RepeatingLoader(self.training_dataloader))
            data_iter = self._repeating_loader
        return [next(data_iter) for _ in range(self.gradient_accumulation_steps())]

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        names = getattr(self.engine_timers, f"{phase}_timers")
        self._start_timers(names)
        yield
        self._stop_timers(names)

    def _make_optimizer(self, parameters: Any) -> "ScheduledScalars":
        return ScheduledScalars(self._default_lr, self._weight_decay)


class ScheduledScalars(torch.optim.Optimizer):
    """Carries the learning rate and weight decay that schedulers write and the step reads."""

    def __init__(self, lr: float, weight_decay: float) -> None:
        placeholder = nn.Parameter(torch.zeros(()))
        # DeepSpeed's schedulers may cycle momentum; betas are there for them and have no effect.
        super().__init__(
            [placeholder], {"lr": lr, "weight_decay": weight_decay, "betas": (0.0, 0.0)}
        )

    def step(self, closure: Any = None) -> None:
        """Nothing: the weights have moved already."""

    def load_state_dict(self, state_dict: dict, load_optimizer_states: bool = True) -> None:
        super().load_state_dict(state_dict)


def deepspeed_config(config: Mapping[str, Any]) -> DeepSpeedConfig:
    """DeepSpeed's own reading of its keys.

    Raises:
        ConfigError: With DeepSpeed's words.
    """
    try:
        return DeepSpeedConfig(deepspeed_part(config))
    except (AssertionError, ValueError, TypeError, DeepSpeedConfigError) as error:
        raise ConfigError(
            f"DeepSpeed refuses the config: {' '.join(str(error).split())}"
        ) from error


def deepspeed_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON as DeepSpeed should see it: optimizer, precision and offloading are ours."""
    part = {key: value for key, value in config.items() if key not in ("optimizer", "bf16", "fp16")}
    part["zero_optimization"] = {"stage": 0}
    return part


def forward_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """What forwards compute in: the JSON's bf16 or fp16, else the model's own dtype."""
    for key, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if config.get(key, {}).get("enabled"):
            return dtype
    return None


def init_distributed(port: int, required: bool | None = None) -> None:
    """Start the process group of the launcher's ranks, or of this process alone."""
    if not deepspeed.comm.is_initialized():
        # On a CPU DeepSpeed would compile a shared-memory op at start; scalars do not need it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        alone = not {"RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS"} & set(os.environ)
        if alone and not torch.distributed.is_initialized():
            os.environ.setdefault("LOCAL_RANK", "0")
            torch.distributed.init_process_group(
                "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
            )
        backend = deepspeed.get_accelerator().communication_backend_name()
        deepspeed.init_distributed(
            dist_backend=backend, distributed_port=port, dist_init_required=required
        )
    if deepspeed.comm.get_world_size() > 1:
        raise ConfigError(
            f"{deepspeed.comm.get_world_size()} ranks were started, but this version trains on one; "
            "start one process (deepspeed --num_accelerators 1)"
        )


def load_model(name: str | Path) -> nn.Module:
    """A causal LM from a local directory or a model id, in the checkpoint's dtype.

    Raises:
        ModelError: It cannot be found, fetched, or is of an unknown type.
    """
    from zo_offload.integrations.hf import load_causal_lm

    return load_causal_lm(name)


def _optimizer_params(config: Mapping[str, Any]) -> Mapping[str, Any]:
    optimizer = config.get("optimizer", {})
    if not isinstance(optimizer, Mapping) or not isinstance(optimizer.get("params", {}), Mapping):
        raise ConfigError(
            f'optimizer: expected {{"type": "ZO", "params": {{"lr": ...}}}}, found {optimizer!r}'
        )
    params = {key: value for key, value in optimizer.get("params", {}).items() if value != "auto"}
    for key in ("lr", "weight_decay"):
        value = params.get(key, 0.0)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 <= value < float("inf")
        ):
            raise ConfigError(f"optimizer.params.{key}: expected a number >= 0, found {value!r}")
    return params


def _logits(output: Any) -> torch.Tensor | None:
    return output if isinstance(output, torch.Tensor) else midpoint.field_of(output, "logits")
