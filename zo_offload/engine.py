"""The DeepSpeed engine: backward and optimizer replaced by the zeroth-order step.

The only file that knows DeepSpeed. The base class keeps what its users expect (loader, schedulers,
monitors, timers, counters); this subclass keeps it away from the weights, which live in a store.
"""

import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed.comm import comm
from deepspeed.runtime.constants import ROUTE_TRAIN
from deepspeed.runtime.dataloader import RepeatingLoader
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import groups
from torch import nn

from zo_offload import caller_optimizer
from zo_offload.beginnings import beginnings
from zo_offload.config import load_json
from zo_offload.deepspeed_json import ScheduledScalars, Settings, read_settings, unstarted_scheduler
from zo_offload.engine_files import SavesAndLoads
from zo_offload.engine_outputs import ReturnsMidpoints
from zo_offload.eps_watch import MOST_NOISE
from zo_offload.errors import ConfigError, DivergedError, ModelError
from zo_offload.integrations.hf import load_model
from zo_offload.loader import Loader, Share
from zo_offload.loss_noise import LossNoise
from zo_offload.objective import Inputs, Objective, model_loss
from zo_offload.process_group import accelerator, init_distributed, replica
from zo_offload.replica import Booked
from zo_offload.step import Stepper, StepResult
from zo_offload.trainable.choose import check_files
from zo_offload.window import Window

logger = logging.getLogger(__name__)

EXCHANGE = "zeroth_order_scalars"  # as the comms logger names it


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
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    mesh_param: Any = None,
    config_params: str | Mapping[str, Any] | None = None,
    objective: Objective | Callable[..., Any] | None = None,
) -> "tuple[ZOEngine, torch.optim.Optimizer, Any, Any]":
    """Make an engine that trains with forward passes only; called as ``deepspeed.initialize`` is.

    Args:
        args: May carry ``deepspeed_config``.
        model: A module, or a local directory or id of a causal or masked LM or image classifier.
        optimizer: Carries learning rate and weight decay only (default: from the JSON).
        model_parameters: Must hold all that is trainable: what moves, the model says.
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
        ModelError: The model cannot be loaded, or not be trained so.
        StoreError: Its weights fit nowhere that the JSON allows.

    Example:
        >>> data = [torch.full((4,), float(n)) for n in (1, 2)]
        >>> engine, _, loader, _ = initialize(
        ...     model=nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))),
        ...     config={
        ...         "train_batch_size": 2,
        ...         "optimizer": {"type": "ZO", "params": {"lr": 1e-2}},
        ...         "zeroth_order": {"unit": ["Linear"]},
        ...     },
        ...     training_data=data,
        ... )
        >>> for batch in loader:
        ...     loss = engine.backward(engine(batch).square().mean())
        ...     engine.step()
        >>> engine.global_steps
        1
        >>> engine.destroy()
    """
    if mpu is not None or mesh_param is not None:
        raise ConfigError(
            "mpu and mesh_param: no model-parallel layout is supported; ranks hold the whole model"
        )
    config = config if config is not None else config_params
    config = config if config is not None else getattr(args, "deepspeed_config", None)
    if config is None:
        raise ConfigError("no config; pass config=PATH_OR_DICT with a zeroth_order block")
    config = dict(config) if isinstance(config, Mapping) else load_json(config)
    if model is None:
        raise ConfigError("no model; pass a module, a directory, or a model id")
    caller_optimizer.check_kind(optimizer)
    init_distributed(distributed_port, dist_init_required)
    settings = read_settings(config)
    check_files(settings.zeroth_order)
    spill = settings.zeroth_order.offload_param.nvme_path or ()
    module = model if isinstance(model, nn.Module) else load_model(model, spill)
    caller_optimizer.check_covers("model_parameters", model_parameters, module)
    engine = ZOEngine(
        model=module,
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


class ZOEngine(SavesAndLoads, ReturnsMidpoints, DeepSpeedEngine):
    """``forward``, ``backward`` and ``step`` of DeepSpeed, with forwards only.

    Attributes:
        stepper: Everything below DeepSpeed.
        last_result: What the latest step found and did.
        loss_noise: Rounding noise of the losses against the signal of a step, measured on the first
            batch; None of an objective that is not smooth.
        eps_watch: Sees whether losses differ enough from one another; its ``finding`` says what is
            wrong with eps.

    Example:
        >>> engine, *_ = initialize(
        ...     model=nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))),
        ...     config={
        ...         "train_batch_size": 4,
        ...         "train_micro_batch_size_per_gpu": 2,
        ...         "optimizer": {"type": "ZO", "params": {"lr": 1e-2}},
        ...         "zeroth_order": {"unit": ["Linear"]},
        ...     },
        ...     objective=lambda model, batch, outputs: outputs.square().mean(),
        ... )
        >>> batches = [torch.ones(2, 4), -torch.ones(2, 4)]
        >>> before = engine.eval_batch(iter(batches))
        >>> for _ in range(50):
        ...     loss = engine.train_batch(iter(batches))
        >>> bool(engine.eval_batch(iter(batches)) < before)
        True
        >>> len(engine.last_result.lane_losses), engine.global_samples
        (2, 200)
        >>> engine.eval()(torch.ones(2, 4)).shape
        torch.Size([2, 4])
        >>> engine.destroy()
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
        collate_fn: Callable[[list[Any]], Any] | None = None,
        objective: Objective | Callable[..., Any] | None = None,
    ) -> None:
        device = torch.device(accelerator().current_device_name())
        config = settings.zeroth_order
        if not isinstance(objective, Objective):
            objective = Objective(loss=objective or model_loss)
        stepper = Stepper(model, config, device, settings.dtype, objective, replica=replica())
        self.stepper, model = stepper, stepper.model
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
                    mpu=settings.data_ranks,
                    config_class=settings.deepspeed,
                    dont_change_device=True,
                )
            groups.mpu = None  # it is this engine's alone
            self._remove_hooks()
            self.last_result = None
            self.loss_noise: LossNoise | None = None
            self.eps_watch = stepper.new_watch()
            self._window = self._new_window()
            self._repeating_loader: Iterator[Any] | None = None
            self._snapshots = None
            stepper.agreement.beginnings = lambda unit: beginnings(stepper, self._snapshots, unit)
            model.eval()
            self._agree()
            if config.journal.path is not None:
                self.continue_journal(config.journal.path)
        except BaseException:
            groups.mpu = None
            self._remove_hooks()
            stepper.close()
            raise

    def _remove_hooks(self) -> None:
        """DeepSpeed's hooks time one call; ours are many at once: _timed, _profile."""
        for name in ("module_forward_pre_hook", "module_forward_post_hook"):
            hook: Any = self.__dict__.pop(name, None)
            if hook is not None:
                hook.remove()

    def deepspeed_io(
        self,
        dataset: Any,
        batch_size: int | None = None,
        route: str = ROUTE_TRAIN,
        pin_memory: bool = True,
        data_sampler: Any = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_local_io_workers: int | None = None,
    ) -> Any:
        """A loader of a data set; for training, one that deals whole global micro-batches.

        Args:
            dataset: Indexed or iterable.
            batch_size: Of a micro-batch (default: the JSON's).
            route: ``train``, ``eval`` or ``predict``; the latter two are DeepSpeed's own.
            pin_memory: Page-lock batches where there is an accelerator.
            data_sampler: A sampler of your own: then DeepSpeed's loader.
            collate_fn: From a list of examples to a batch.
            num_local_io_workers: Processes that fetch examples.
        """
        if route != ROUTE_TRAIN or data_sampler is not None:
            return super().deepspeed_io(
                dataset, batch_size, route, pin_memory, data_sampler, collate_fn,
                num_local_io_workers,
            )  # fmt: skip
        share = Share(
            batch_size or self.train_micro_batch_size_per_gpu(),
            self.gradient_accumulation_steps(),
            self.stepper.division.data_rank,
            self.stepper.division.num_data_ranks,
            self.stepper.config.seed,
        )
        return Loader(
            dataset,
            share,
            collate_fn or self.collate_fn,
            num_local_io_workers or 0,
            pin_memory and torch.device(self.stepper.device).type == "cuda",
        )

    # -- the surface --

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output at the midpoint of this step's lanes, with a node for ``backward``.

        In evaluation mode or without gradients: of one unperturbed lane on the current weights.

        Args:
            *args: As the model takes them, tensors on ``device``.
            **kwargs: Likewise.

        Returns:
            The model's own output type; its ``loss`` is a scalar on ``device``, the mean of the
            lanes' losses in fp32, and its ``logits`` are their mean.

        Raises:
            ModelError: The config needs what one forward cannot know; call :meth:`train_batch`.
            TaskError: The objective gave no loss.
        """
        batch = Inputs(args, kwargs) if args and kwargs else kwargs or args
        try:
            if not self.training or not torch.is_grad_enabled():
                return self.stepper.forward(batch)
            return self._train_forward(batch)
        finally:
            self._tell_mode()  # lanes leave it in evaluation mode

    def backward(
        self,
        loss: torch.Tensor,
        retain_graph: bool = False,
        scale_wrt_gas: bool = True,
        learning_rate: float | None = None,
    ) -> torch.Tensor:
        """Book the gradients of a loss made of ``forward``'s output, as the caller scaled it.

        Args:
            loss: Scalar computed from ``forward``'s output.
            retain_graph: As in torch.
            scale_wrt_gas: False when the caller has divided by ``gradient_accumulation_steps``.
            learning_rate: Refused; a Trainer gives one to optimizers that are a backward pass.

        Returns:
            The loss without its graph, over ``gradient_accumulation_steps`` if that scales it.

        Raises:
            ConfigError: A learning rate is given.
            ModelError: The loss has no graph, or was measured for an earlier step.
        """
        caller_optimizer.check_fused(learning_rate)
        if loss.grad_fn is None:
            raise ModelError(
                "backward: this loss has no graph; it must come from the engine's forward in "
                "training mode, outside no_grad"
            )
        self._window.begin_backward(scale_wrt_gas)
        with self._timed("backward"):
            torch.autograd.backward(loss, retain_graph=retain_graph)
        loss = loss.detach()
        self._window.end_backward(float(loss))
        return loss / self.gradient_accumulation_steps() if scale_wrt_gas else loss

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """Off the accumulation boundary: nothing. On it: exchange, record, update.

        Raises:
            DivergedError: Losses go wrong. The step is not taken, the window is dropped, and
                training can go on with the next batch; or, as the message says, it was taken, being
                the newest of many.
            RolledBackError: The journal has gone back, and this engine takes no further step.
        """
        before = self.global_steps
        try:
            super().step(lr_kwargs)
        except BaseException:
            self._drop_window()
            raise
        if self.global_steps > before:
            self._look_back()

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> torch.Tensor:
        """One whole step: ``gradient_accumulation_steps`` micro-batches in one visit.

        Args:
            data_iter: Yields micro-batches (default: the engine's loader, repeated).

        Returns:
            Mean loss over the lanes of all ranks, an fp32 scalar on the CPU.

        Raises:
            ConfigError: There is no ``data_iter``, and ``initialize`` was given no data.
            ModelError: ``backward`` was called since the last step.
            DivergedError, RolledBackError: As :meth:`step`.
        """
        if self._window.is_open:
            raise ModelError(
                "train_batch: backward was called since the last step; finish that step first"
            )
        batches = self._pull(data_iter)
        self._measure_noise(batches[0])
        self._profile(batches[0])
        self.tput_timer.start()
        with self._timed("forward"):
            measured = self.stepper.measure_mine(batches)
        with self._timed("backward"):
            self._window.book_whole(measured)
        self.micro_steps += len(batches) - 1
        self.step()
        assert self.last_result is not None
        return torch.tensor(self.last_result.loss)

    def eval_batch(self, data_iter: Iterator[Any]) -> torch.Tensor:
        """Mean loss of ``gradient_accumulation_steps`` micro-batches a rank, on current weights.

        Args:
            data_iter: Yields micro-batches.

        Returns:
            The mean over all ranks, an fp32 scalar on the CPU.
        """
        rows = [[self.stepper.evaluate(batch)] for batch in self._pull(data_iter)]
        booked, steps = Booked.of(["unperturbed"], rows), self.global_steps
        alike = self.stepper.division.probe_parallel
        (loss,) = self.stepper.replica.mean(booked, steps, "evaluation after step", alike=alike)
        return torch.tensor(loss)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """``model.generate`` on the current weights.

        Args:
            *args: As the model's ``generate`` takes them, tensors on ``device``.
            **kwargs: Likewise.

        Returns:
            What it returns.
        """
        model: Any = self.module
        return self.stepper.run_model(lambda: model.generate(*args, **kwargs))

    def train(self, mode: bool = True) -> "ZOEngine":  # pyright: ignore[reportIncompatibleMethodOverride]
        """Choose what ``forward`` does. The model's layers always stay in evaluation mode.

        Its own attribute ``training`` says what was chosen, but for the length of a forward.
        """
        self.training = mode
        self._tell_mode()
        return self

    def eval(self) -> "ZOEngine":  # pyright: ignore[reportIncompatibleMethodOverride]
        """``train(False)``."""
        return self.train(False)

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
        """Stay where the JSON has put things; anything else is refused.

        Args:
            *args: A device of the engine's own kind.
            **kwargs: Likewise.

        Raises:
            ModelError: It would cast or move the weights.
        """
        for wanted in (*args, *kwargs.values()):
            here = isinstance(wanted, str | torch.device) and (
                torch.device(wanted).type == self.stepper.weights.arena.device.type
            )
            if not here and not isinstance(wanted, bool):  # non_blocking
                self._apply(None)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        raise ModelError(
            "the engine's weights live in a store and cannot be cast or moved; "
            'write "bf16" or "fp16" and "offload_param" into the JSON'
        )

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a compiled whole model hides the blocks at which lanes stop.

        Raises:
            ModelError: Always; compile blocks before the engine is made.
        """
        raise ModelError(
            "compile: a compiled whole model hides its blocks; compile them before the engine is "
            "made: `for block in blocks: block.compile()`"
        )

    # -- what the base class calls --

    def _broadcast_model(self) -> None:
        """Nothing is broadcast: ranks start from the same checkpoint."""

    def _configure_optimizer(self, client_optimizer: Any, model_parameters: Any) -> None:
        optimizer = caller_optimizer.made_by(client_optimizer, model_parameters)
        self.optimizer = self.basic_optimizer = optimizer
        if not isinstance(optimizer, ScheduledScalars):
            caller_optimizer.check_covers("optimizer", optimizer.param_groups, self.module)
            caller_optimizer.tell(optimizer)
        caller_optimizer.check_alike(optimizer)

    def _take_model_step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """On the accumulation boundary: reduce, record, update; then what DeepSpeed counts."""
        group = self.optimizer.param_groups[0]
        lr, decay = float(group["lr"]), float(group.get("weight_decay", 0.0))
        if not math.isfinite(lr) or not math.isfinite(decay):
            raise ConfigError(
                f"the optimizer's lr is {lr}, its weight_decay {decay}: not finite"
                "; give finite numbers (optimizer.params in the JSON, or what set them since)"
            )
        caller_optimizer.check_metric(self.lr_scheduler, lr_kwargs or {})
        if not self._window.is_open:
            raise ModelError("step: nothing was booked since the last one; call backward first")
        samples = self.global_samples + self.train_batch_size()
        with self._logged_exchange():
            means = self.stepper.means(self._window)
        self.last_result = self.stepper.descend(means, lr, decay, samples)
        self._losses_are_measured = bool(means.lanes) and not means.slopes  # else made of slopes
        self._window = self._new_window()
        self.optimizer.step()  # moves nothing; schedulers want to see it before their own
        self._step_applied = True
        self._global_grad_norm = self.get_global_grad_norm()
        if self.lr_scheduler is not None:
            self.lr_scheduler.step(**(lr_kwargs or {}))
        self.losses = None
        self.global_steps += 1
        self.global_samples = samples
        self._keep_snapshot()
        if self.global_rank == 0:
            self._tell(self.last_result)

    # -- inside --

    def _train_forward(self, batch: Any) -> Any:
        """In one visit, of all lanes; see :meth:`forward`."""
        self._refuse_part()
        self._profile(batch)
        self.tput_timer.start()
        with self._timed("forward"):
            draws = self.stepper.draws()
            results = self.stepper.run_lanes([batch], draws, first=len(self._window.micro_batches))
        if results[0][0] is not None:
            self._measure_noise(batch)
        return self._midpoint_output(results, draws)

    def _tell_mode(self) -> None:
        """Callers ask the model itself whether it trains (TRL does); its layers never do."""
        self.module.training = self.training

    def _refuse_part(self) -> None:
        """Whether this rank runs all lanes, so that it knows their midpoint, and it is enough."""
        parallel = self.stepper.division.probe_parallel
        if parallel > 1:
            raise ModelError(
                "forward: what it returns is the midpoint of all lanes, and with "
                f"zeroth_order.replica.probe_parallel {parallel} a rank runs some of them only; "
                "call train_batch(), or write 1"
            )
        if self.stepper.config.natural is not None:
            raise ModelError(
                "forward: what backward() books is a batch's loss, and zeroth_order.natural "
                f"{self.stepper.config.natural:g} compares single examples; call train_batch(), or "
                "leave the key out"
            )

    def _profile(self, batch: Any) -> None:
        """In the step that the JSON names: profile one forward; ``step`` prints what was found.

        One unperturbed forward, by itself: a step is two a probe and micro-batch, side by side.
        """
        due = self.flops_profiler_enabled() and self.global_rank == 0
        if not due or self.global_steps != self.flops_profiler_profile_step():
            return
        if not self.flops_profiler.started:
            self.flops_profiler.start_profile(ignore_list=None)
            try:
                self.stepper.forward(batch)
            finally:  # it has put its own functions in place of torch's
                self.flops_profiler.stop_profile()

    @contextmanager
    def _logged_exchange(self) -> Generator[None, None, None]:
        """Show DeepSpeed's comms logger what goes over our own link."""
        replica, began = self.stepper.replica, time.perf_counter()
        before = replica.step_bytes
        yield
        if comm.comms_logger.enabled and replica.world_size > 1:
            milliseconds = (time.perf_counter() - began) * 1e3
            sent = replica.step_bytes - before
            comm.comms_logger.append("all_gather", EXCHANGE, milliseconds, sent)

    def _tell(self, result: StepResult) -> None:
        if self.steps_per_print() and self.global_steps % self.steps_per_print() == 0:
            self._report_progress(self.global_steps)
        if self.monitor.enabled:
            norm = self.get_global_grad_norm()
            self.monitor.write_events(
                [
                    ("Train/Samples/train_loss", result.loss, self.global_samples),
                    ("Train/Samples/grad_norm", norm, self.global_samples),
                ]
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

    def _measure_noise(self, batch: Any) -> None:
        """Once, on the first finite losses: say how well a step can be told from rounding.

        What moves in jumps by nature is no smooth function plus rounding.
        """
        if self.loss_noise is not None or not self.stepper.objective.smooth:
            return
        found = self.stepper.measure_noise(batch)
        if not math.isfinite(found.noise):
            return  # the step itself says what is wrong
        self.loss_noise = found
        logger.info("noise over signal of L+ - L-: %.3g (signal %.3g)", found.ratio, found.signal)
        if found.is_stepwise:
            return  # what it takes for rounding are the objective's own steps
        if found.ratio > MOST_NOISE:
            logger.warning(
                "rounding drowns the signal: noise over signal of L+ - L- is %.2g at eps %g; "
                "raise eps, or compute in fp16 or fp32",
                found.ratio,
                self.stepper.config.eps,
            )
        else:
            self.eps_watch.noise = found.noise

    def _look_back(self) -> None:
        """At the run, when a step was taken and everything has counted it."""
        assert self.last_result is not None
        if self._losses_are_measured:
            self._watch_eps(self.last_result)
        self.stepper.guard.after_step()

    def _watch_eps(self, result: StepResult) -> None:
        """Once: say that eps is too small to be seen in the losses, or stop where nothing moves."""
        watch = self.eps_watch
        if result.skipped or watch.finding is not None:
            return
        found = watch.observe(result.step, result.lane_losses, result.measured_grads)
        if found is None:
            return
        if found.kind == "dead" and self.stepper.config.guard.dead_eps == "stop":
            raise DivergedError(f"step {found.step}: {found.text}; the step was taken")
        logger.warning("step %d: %s", found.step, found.text)

    def _pull(self, data_iter: Iterator[Any] | None) -> list[Any]:
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
    def _timed(self, phase: str) -> Generator[None, None, None]:
        names = getattr(self.engine_timers, f"{phase}_timers")
        self._start_timers(names)
        try:
            yield
        finally:
            self._stop_timers(names)


def _scalars(settings: Settings, parameters: Any) -> ScheduledScalars:
    return ScheduledScalars(settings.lr, settings.weight_decay)
