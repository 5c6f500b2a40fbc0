"""The DeepSpeed engine: backward and optimizer replaced by the zeroth-order step.

The only file that knows DeepSpeed. The base class keeps what its users expect (loader, schedulers,
monitors, timers, counters); this subclass keeps it away from the weights, which live in a store.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.dataloader import RepeatingLoader
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from zo_offload import midpoint
from zo_offload.config import load_json
from zo_offload.deepspeed_json import ScheduledScalars, Settings, read_settings, unstarted_scheduler
from zo_offload.errors import ConfigError, ModelError
from zo_offload.integrations.hf import load_causal_lm
from zo_offload.journal import Journal
from zo_offload.loss_noise import LossNoise
from zo_offload.objective import Inputs, Objective, loss_sum, model_loss
from zo_offload.process_group import accelerator, init_distributed
from zo_offload.step import Stepper, StepResult
from zo_offload.window import Window

logger = logging.getLogger(__name__)

MOST_NOISE = 0.5


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
    """Make an engine that trains with forward passes only; called as ``deepspeed.initialize`` is.

    Args:
        args: May carry ``deepspeed_config``.
        model: A module, or a local directory or id that transformers can load as a causal LM.
        optimizer: Carries learning rate and weight decay only (default: from the JSON).
        model_parameters: Accepted for compatibility; what moves is ``zeroth_order.trainable``.
        training_data: A dataset; makes the loader that is returned.
        lr_scheduler: A scheduler, or a callable from optimizer to one (default: from the JSON).
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
            "mpu and mesh_param: no model-parallel layout is supported; ranks hold the whole model"
        )
    config = config if config is not None else config_params
    config = config if config is not None else getattr(args, "deepspeed_config", None)
    if config is None:
        raise ConfigError("no config: pass config=PATH_OR_DICT with a zeroth_order block")
    config = dict(config) if isinstance(config, Mapping) else load_json(config)
    if model is None:
        raise ConfigError("no model: pass a module, a directory, or a model id")
    init_distributed(distributed_port, dist_init_required)
    settings = read_settings(config)
    engine = ZOEngine(
        model=model if isinstance(model, nn.Module) else load_causal_lm(model),
        settings=settings,
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
        settings: Settings,
        raw_config: Mapping[str, Any],
        args: Any = None,
        optimizer: Any = None,
        training_data: Any = None,
        lr_scheduler: Any = None,
        collate_fn: Callable | None = None,
        objective: Objective | Callable | None = None,
    ) -> None:
        device = torch.device(accelerator().current_device_name())
        config = settings.zeroth_order
        if not isinstance(objective, Objective):
            objective = Objective(loss=objective or model_loss)
        stepper = Stepper(model, config, device, settings.dtype, objective)
        try:
            with stepper.weights.kept(model), unstarted_scheduler():
                super().__init__(
                    args=args,
                    model=model,
                    optimizer=optimizer or partial(_scalars, settings),
                    training_data=training_data,
                    lr_scheduler=lr_scheduler,
                    collate_fn=collate_fn,
                    config=raw_config,
                    config_class=settings.deepspeed,
                    dont_change_device=True,
                )
            hooks: Any = (self.module_forward_pre_hook, self.module_forward_post_hook)
            for hook in hooks:
                hook.remove()  # they time one call, and ours are many at once: see _timed
            self.stepper = stepper
            self.last_result: StepResult | None = None
            self.loss_noise: LossNoise | None = None
            self._window = self._new_window()
            self._repeating_loader: Iterator | None = None
            model.eval()
            if config.journal.path is not None:
                self.continue_journal(config.journal.path)
        except BaseException:
            stepper.close()
            raise

    # -- the surface --

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output at the midpoint of this step's lanes, with a node for ``backward``.

        In evaluation mode or without gradients: of one unperturbed lane on the current weights.
        """
        batch = Inputs(args, kwargs) if args and kwargs else kwargs or args
        if not self.training or not torch.is_grad_enabled():
            return self.stepper.forward(batch)
        self.tput_timer.start()
        with self._timed("forward"):
            draws = self.stepper.draws()
            results = self.stepper.run_lanes([batch], draws)
        if results[0][0] is not None:
            self._measure_noise(batch)
        return self._midpoint_output(results, draws)

    def backward(
        self, loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True
    ) -> torch.Tensor:
        """Book the gradients of a loss made of ``forward``'s output, as the caller scaled it.

        Args:
            loss: Scalar computed from ``forward``'s output.
            retain_graph: As in torch.
            scale_wrt_gas: False when the caller has divided by ``gradient_accumulation_steps``.
        """
        if loss.grad_fn is None:
            raise ModelError(
                "backward: this loss has no graph; it must come from the engine's forward in "
                "training mode, outside no_grad"
            )
        self._window.begin_backward(scale_wrt_gas)
        with self._timed("backward"):
            loss.backward(retain_graph=retain_graph)
        loss = loss.detach()
        self._window.end_backward(float(loss))
        return loss / self.gradient_accumulation_steps() if scale_wrt_gas else loss

    def step(self, lr_kwargs: dict | None = None) -> None:
        """Off the accumulation boundary: nothing. On it: exchange, record, update.

        Raises:
            DivergedError: A loss is not finite. The step is not taken, the window is dropped, and
                training can go on with the next batch.
        """
        try:
            super().step(lr_kwargs)
        except BaseException:
            self._drop_window()
            raise

    def train_batch(self, data_iter: Iterator | None = None) -> torch.Tensor:
        """One whole step: ``gradient_accumulation_steps`` micro-batches in one visit.

        Args:
            data_iter: Yields micro-batches (default: the engine's loader, repeated).

        Returns:
            Mean loss over the lanes, a scalar on the CPU.
        """
        if self._window.is_open:
            raise ModelError(
                "train_batch: backward was called since the last step; finish that step first"
            )
        batches = self._pull(data_iter)
        self._measure_noise(batches[0])
        self.tput_timer.start()
        with self._timed("forward"):
            self._window.book_whole(self.stepper.measure(batches, self.stepper.draws()))
        self.micro_steps += len(batches) - 1
        self.step()
        assert self.last_result is not None
        return torch.tensor(self.last_result.loss)

    def eval_batch(self, data_iter: Iterator) -> torch.Tensor:
        """Mean loss of ``gradient_accumulation_steps`` micro-batches on the current weights."""
        totals = [self.stepper.evaluate(batch) for batch in self._pull(data_iter)]
        total, weight = (sum(column) for column in zip(*totals, strict=True))
        if not weight:
            raise ModelError("eval_batch: the objective's weights add up to 0")
        return torch.tensor(total / weight)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """``model.generate`` on the current weights."""
        model: Any = self.module
        return self.stepper.run_model(lambda: model.generate(*args, **kwargs))

    def train(self, mode: bool = True) -> "ZOEngine":  # pyright: ignore[reportIncompatibleMethodOverride]
        """Choose what ``forward`` does. The model itself always stays in evaluation mode."""
        self.training = mode
        return self

    def eval(self) -> "ZOEngine":  # pyright: ignore[reportIncompatibleMethodOverride]
        """``train(False)``."""
        return self.train(False)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a plain Hugging Face directory of the current weights, in the forward's dtype."""
        model: Any = self.module
        if not hasattr(model, "save_pretrained"):
            raise ModelError(
                f"{type(model).__name__} has no save_pretrained; "
                "write engine.module.state_dict() with safetensors.torch.save_file"
            )
        model.save_pretrained(str(directory), state_dict=model.state_dict())

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

    # -- what would go around the store --

    def to(self, *args: Any, **kwargs: Any) -> "ZOEngine":
        """Stay where the JSON has put things; anything else is refused."""
        for wanted in (*args, *kwargs.values()):
            here = isinstance(wanted, str | torch.device) and (
                torch.device(wanted).type == self.stepper.weights.arena.device.type
            )
            if not here and not isinstance(wanted, bool):  # non_blocking
                self._apply(lambda tensor: tensor)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        raise ModelError(
            "the engine's weights live in a store and cannot be cast or moved; "
            'write "bf16" or "fp16" and "offload_param" into the JSON'
        )

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a compiled whole model hides the blocks at which lanes stop."""
        raise ModelError(
            "compile: a compiled whole model hides its blocks; compile them before the engine is "
            "made: `for block in blocks: block.compile()`"
        )

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: DeepSpeed's is a pickle that could not be loaded into a store."""
        raise ConfigError(
            "save_checkpoint: base weights and journal are the checkpoint; set "
            "zeroth_order.journal.path, or write the weights with save_pretrained"
        )

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, as :meth:`save_checkpoint`."""
        raise ConfigError(
            "load_checkpoint: an engine on the base weights takes its steps from "
            "zeroth_order.journal.path, or from continue_journal(path)"
        )

    def save_16bit_model(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: it writes a pickle."""
        raise ConfigError("save_16bit_model: writes a pickle; use save_pretrained(directory)")

    # -- what the base class calls --

    def _broadcast_model(self) -> None:
        """Nothing is broadcast: ranks start from the same checkpoint."""

    def _configure_optimizer(self, client_optimizer: Any, model_parameters: Any) -> None:
        self.optimizer = (
            client_optimizer
            if isinstance(client_optimizer, torch.optim.Optimizer)
            else client_optimizer(model_parameters)
        )
        self.basic_optimizer = self.optimizer
        for key in ("lr", "weight_decay"):
            found = {float(group.get(key, 0.0)) for group in self.optimizer.param_groups}
            if len(found) > 1:
                raise ConfigError(
                    f"optimizer: its groups differ in {key} ({sorted(found)}), but one step moves "
                    "all weights alike; give every group the same"
                )

    def _take_model_step(self, lr_kwargs: dict | None = None) -> None:
        """On the accumulation boundary: reduce, record, update; then what DeepSpeed counts."""
        group = self.optimizer.param_groups[0]
        lr, decay = float(group["lr"]), float(group.get("weight_decay", 0.0))
        if not math.isfinite(lr) or not math.isfinite(decay):
            raise ConfigError(f"the optimizer's lr is {lr}, its weight_decay {decay}: not finite")
        if not self._window.is_open:
            raise ModelError("step: nothing was booked since the last one; call backward first")
        samples = self.global_samples + self.train_batch_size()
        means = self.stepper.means(self._window)
        self.last_result = self.stepper.descend(means, lr, decay, samples)
        self._window = self._new_window()
        self.optimizer.step()  # moves nothing; schedulers want to see it before their own
        self._step_applied = True
        self._global_grad_norm = self.get_global_grad_norm()
        if self.lr_scheduler is not None:
            self.lr_scheduler.step(**(lr_kwargs or {}))
        self.losses = None
        self.global_steps += 1
        self.global_samples += self.train_batch_size()
        if self.global_rank == 0:
            self._tell(self.last_result)

    # -- inside --

    def continue_journal(self, path: str | Path) -> None:
        """Take over the steps that a journal holds, and append to it; counters and schedule follow.

        Args:
            path: A journal of the same base weights and settings, or a new one. No step may have
                been taken.

        Raises:
            JournalError: It belongs to another run, or another run has it open.
        """
        if self.stepper.step:
            raise ConfigError(
                f"{path}: a journal is taken up before the first step, and {self.stepper.step} "
                "were taken; make a new engine"
            )
        journal = Journal.open(path, self.stepper.bit_header())
        self.stepper.follow(journal)
        self.global_steps = self.stepper.step
        self.global_samples = self.global_steps * self.train_batch_size()
        self.micro_steps = self.global_steps * self.gradient_accumulation_steps()
        if self.lr_scheduler is not None:
            for _ in range(self.global_steps):
                self.optimizer.step()
                self.lr_scheduler.step()

    def _tell(self, result: StepResult) -> None:
        if self.steps_per_print() and self.global_steps % self.steps_per_print() == 0:
            self._report_progress(self.global_steps)
        if self.monitor.enabled:
            self.monitor.write_events(
                [("Train/Samples/train_loss", result.loss, self.global_samples)]
            )

    def _new_window(self) -> Window:
        return self.stepper.new_window(self.gradient_accumulation_steps())

    def _drop_window(self) -> None:
        """After a step that failed: the next micro-batch begins a window."""
        self._window = self._new_window()
        self.micro_steps -= self.micro_steps % self.gradient_accumulation_steps()
        self._running_engine_step = False
        for name in self.engine_timers.step_timers:
            if self.timers(name).started_:
                self.timers(name).stop()

    def _midpoint_output(self, results: list[tuple[Any, Any]], draws: list) -> Any:
        outputs = results[0][1]
        found = [_logits(output) for _, output in results]
        logits = [value for value in found if value is not None]
        if logits and not (isinstance(outputs, torch.Tensor) and results[0][0] is not None):
            tied = midpoint.tie(midpoint.mean(logits), partial(self._book_logits, logits, draws))
            outputs = midpoint.with_field(outputs, "logits", tied)
        if results[0][0] is None:
            if not logits:
                raise ModelError(
                    f"the model returned neither loss nor logits (found {type(outputs).__name__})"
                )
            return outputs
        sums = [loss_sum(loss) for loss, _ in results]
        values = [total / weight if weight else 0.0 for total, weight in sums]
        mean = torch.tensor(sum(values) / len(values), device=self.stepper.device)
        tied = midpoint.tie(mean, partial(self._book_losses, sums, draws))
        return midpoint.with_field(outputs, "loss", tied)

    def _book_losses(
        self, sums: list[tuple[float, float]], draws: list, grad: torch.Tensor
    ) -> None:
        self._refuse_stale(draws)
        self._window.book_losses(sums, float(grad.double()))

    def _book_logits(self, values: list[torch.Tensor], draws: list, grad: torch.Tensor) -> None:
        self._refuse_stale(draws)
        for probe in range(self.stepper.config.probes):
            difference = values[2 * probe].double() - values[2 * probe + 1].double()
            slope = float((grad.double() * difference).sum()) / (2.0 * self.stepper.config.eps)
            self._window.book_slope(probe, slope)

    def _refuse_stale(self, draws: list) -> None:
        measured = draws[0][2].step
        if measured != self.stepper.step:
            raise ModelError(
                f"backward: this loss was measured for step {measured}, and step "
                f"{self.stepper.step} is next, along other directions; call forward again"
            )

    def _measure_noise(self, batch: Any) -> None:
        """Once, on the first finite losses: say how well a step can be told from rounding."""
        if self.loss_noise is not None:
            return
        found = self.stepper.measure_noise(batch)
        if not math.isfinite(found.noise):
            return  # the step itself says what is wrong
        self.loss_noise = found
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
        try:
            yield
        finally:
            self._stop_timers(names)


def _scalars(settings: Settings, parameters: Any) -> ScheduledScalars:
    return ScheduledScalars(settings.lr, settings.weight_decay)


def _logits(output: Any) -> torch.Tensor | None:
    if isinstance(output, tuple) and output:
        output = output[0]
    return output if isinstance(output, torch.Tensor) else midpoint.field_of(output, "logits")
