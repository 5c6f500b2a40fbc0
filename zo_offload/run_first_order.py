"""``zo-offload train --first-order full|lora``: AdamW by backprop, the ceiling to compare with.

Task, data, batches in their order, evaluations and files are those of a zeroth-order run, and its
loop takes the steps. The trainer is plain torch (and ``peft``), without DeepSpeed: weights in fp32,
gradients and both moments lie in memory, on one device. It keeps nothing to continue from: a run
that was stopped begins anew.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zo_offload import files, launched
from zo_offload.config import BLOCK, ZOConfig, load_json, parse_config
from zo_offload.converted import converted_of
from zo_offload.errors import ConfigError, DivergedError, ModelError
from zo_offload.journal import Journal, Record
from zo_offload.metrics import Metrics, draw_curve
from zo_offload.objective import Objective, move_to
from zo_offload.prepare import without_cache
from zo_offload.replica import Division, Replica
from zo_offload.reporter import Reporter
from zo_offload.run import (
    MOST_STEPS,
    RunOptions,
    Summary,
    export_model,
    finite,
    read_summary,
    take_steps,
)
from zo_offload.run_directory import as_json, claimed, holds, what_is_asked
from zo_offload.run_task import Task, recorded
from zo_offload.step import StepResult
from zo_offload.stopping import Stopping
from zo_offload.trainable.choose import check_files, trainable_for
from zo_offload.trainable.detect import is_peft_model

CONFIG: dict[str, Any] = {"train_batch_size": 16, BLOCK: {}}
COUNTS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
OF_ADAM = ("lr", "betas", "eps", "weight_decay")
LORA = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
MODES = {"full": "full", "lora": "peft"}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What the JSON and the options say.

    Attributes:
        batch: Examples of a step.
        micro_batch: Of a forward.
        adam: Of ``torch.optim.AdamW``.
        clip: Of the gradient's norm; 0 for none.
        bf16: Whether forwards compute in it; weights stay in fp32.
        seed: Of the order of examples, of dropout, and of an adapter's first values.
        steps: Over which the rate falls to 0.
    """

    batch: int
    micro_batch: int
    adam: Mapping[str, Any]
    clip: float
    bf16: bool
    seed: int
    steps: int


def train(options: RunOptions, reporter: Reporter) -> Summary:
    """Train by backprop, evaluate and export.

    Raises:
        ZOError: With one line for the user.
    """
    config = load_json(options.config) if options.config else CONFIG
    parsed = parse_config(config)
    _refuse(options, config, parsed)
    check_files(parsed)
    settings = _settings(options, config, parsed)
    with reporter.phase("reading the data", quiet=True):
        task = Task(options, training=True)
    asked = what_is_asked(recorded(options, task.order), config, task.digests)
    directory = Path(options.output)
    written = directory / "summary.json"
    if holds(directory, asked) and written.exists():
        return read_summary(written)
    with ExitStack() as stack:
        stack.enter_context(claimed(directory, asked))
        _begin_anew(directory / "metrics.csv")
        stack.enter_context(torch.random.fork_rng())
        torch.manual_seed(settings.seed)
        engine = _start(task, settings, _adapted(options, parsed), reporter)
        metrics = Metrics(directory / "metrics.csv", (), task.metric)
        stack.callback(metrics.close)
        stopping = Stopping(reporter, alone=True)  # not entered: there is nothing to go on from
        take_steps(engine, task, options, metrics, reporter, stopping)
        with reporter.phase(f"exporting to {directory / 'model'}"):
            export_model(engine, task, directory / "model")
        with reporter.phase("drawing the curve", quiet=True):
            draw_curve(metrics, directory / "curve.png")
        summary = _summarize(engine, metrics, str(options.first_order))
        files.write_file(written, as_json(asdict(summary)))
    return summary


def _begin_anew(metrics: Path) -> None:
    """Drop what a run left that was stopped, and say so."""
    if metrics.exists():
        logger.warning(
            "--first-order: the run in %s was stopped and kept nothing to continue from; it begins "
            "anew", metrics.parent,
        )  # fmt: skip
        metrics.unlink()


def _refuse(options: RunOptions, config: Mapping[str, Any], parsed: ZOConfig) -> None:
    """What plain backprop in memory on one rank cannot do."""
    if not 1 <= options.steps <= MOST_STEPS:
        raise ConfigError(f"--steps: expected 1 to {MOST_STEPS:,}, found {options.steps}")
    ranks = launched.num_ranks()
    if ranks > 1:
        raise ConfigError(f"--first-order: trains on one rank, found {ranks}; start one")
    if options.objective != "loss":
        raise ConfigError(
            f"--objective: {options.objective} has no gradient, which --first-order needs; leave "
            "it out"
        )
    mode, device = MODES[str(options.first_order)], parsed.offload_param.device
    if device != "none":
        raise ConfigError(
            f'{BLOCK}.offload_param.device: "{device}", and --first-order holds weights, gradients '
            'and moments in memory; write "none"'
        )
    if parsed.wire not in (None, "identity"):
        raise ConfigError(
            f'{BLOCK}.wire: "{parsed.wire}", and --first-order trains weights as they are; write '
            '"identity", or leave it out'
        )
    trainable = parsed.trainable
    if trainable.mode not in ("full", mode) or trainable.rotate is not None:
        found = "rotate" if trainable.rotate is not None else f'"mode": "{trainable.mode}"'
        raise ConfigError(
            f"{BLOCK}.trainable: {found} is not for --first-order {options.first_order}; leave it "
            "out"
        )
    if config.get("scheduler"):
        raise ConfigError("scheduler: the rate of --first-order falls linearly to 0; remove it")
    if (config.get("fp16") or {}).get("enabled"):
        raise ConfigError('fp16: --first-order scales no loss; write "bf16", or neither')


def _settings(options: RunOptions, config: Mapping[str, Any], parsed: ZOConfig) -> Settings:
    batch, micro_batch = batch_sizes(config)
    optimizer = config.get("optimizer") or {}
    given = {k: v for k, v in (optimizer.get("params") or {}).items() if k in OF_ADAM}
    if options.lr is None and (optimizer.get("type", "ZO") == "ZO" or "lr" not in given):
        raise ConfigError(
            '--lr: missing: the rate of an optimizer of type "ZO" is none for AdamW; give one '
            '(1e-4, say), or a JSON with "optimizer": {"type": "AdamW", "params": {"lr": ...}}'
        )
    if optimizer.get("type", "ZO") == "ZO":
        given = {k: v for k, v in given.items() if k == "weight_decay"}
    adam = {"weight_decay": 0.0, **given} | ({} if options.lr is None else {"lr": options.lr})
    clip = float(config.get("gradient_clipping") or 0.0)
    bf16 = bool((config.get("bf16") or {}).get("enabled"))
    return Settings(batch, micro_batch, adam, clip, bf16, parsed.seed, options.steps)


def batch_sizes(config: Mapping[str, Any]) -> tuple[int, int]:
    """Examples of a step and of a forward, by DeepSpeed's keys, on one rank.

    Raises:
        ConfigError: They are missing, no counts, or do not go together.

    Example:
        >>> batch_sizes({"train_batch_size": 16, "gradient_accumulation_steps": 2})
        (16, 8)
    """
    for name in COUNTS:
        value = config.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name}: expected a whole number from 1, found {value!r}")
    batch, micro_batch, parts = (config.get(name) for name in COUNTS)
    if batch is None:
        if micro_batch is None:
            raise ConfigError(f"{COUNTS[0]}: missing; give it, or {COUNTS[1]}")
        batch = micro_batch * (parts or 1)
    micro_batch = micro_batch or batch // (parts or 1)
    if micro_batch * (parts or batch // micro_batch) != batch:
        raise ConfigError(
            f"{COUNTS[0]}: {batch} is not {COUNTS[1]} ({micro_batch}) times {COUNTS[2]} "
            f"({parts or batch // micro_batch}) on one rank"
            "; write numbers that multiply so, or leave one out"
        )
    return batch, micro_batch


def _adapted(options: RunOptions, parsed: ZOConfig) -> ZOConfig:
    """The block with an adapter in it, where one is asked for and the JSON has none."""
    trainable = parsed.trainable
    if options.first_order != "lora" or trainable.peft_config or trainable.adapter:
        return parsed
    chosen = trainable.model_copy(update={"mode": "peft", "peft_config": dict(LORA)})
    return parsed.model_copy(update={"trainable": chosen})


def _start(task: Task, settings: Settings, parsed: ZOConfig, reporter: Reporter) -> "Backprop":
    task.encode(reporter)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with reporter.phase(f"loading {task.model_name}"):
        model = task.load_model(())
        if converted_of(model) is not None:
            raise ModelError(
                f"{task.model_name}: a converted model's weights stay on its disk, and "
                "--first-order holds them in memory; give the model that was converted"
            )
        if is_peft_model(model) and parsed.trainable.mode == "full":
            raise ModelError(f"{task.model_name}: is an adapter; train it by --first-order lora")
        if is_peft_model(model):  # which says itself what moves
            parsed = parsed.model_copy(update={"trainable": type(parsed.trainable)()})
        model = trainable_for(model, parsed).prepare(model)
        for tensor in [*model.parameters(), *model.buffers()]:  # views of files until now
            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
            tensor.data = tensor.data.to(device, dtype, copy=True)
    return Backprop(model, task.way.objective, settings, device)


class Backprop:
    """AdamW on a model, with what a run's loop asks of an engine and of its stepper.

    Args:
        model: In fp32, on the device; what has ``requires_grad`` is trained.
        objective: That can be differentiated.
        settings: Of the run.
        device: Where the model is.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, settings: Settings, device: torch.device
    ) -> None:
        self.model, self.objective, self.device = model, objective, device
        self.config, self._settings = settings, settings
        self.stepper = self  # a loop asks both
        self.replica, self.division = Replica(), Division()
        self.journal = Journal.memory({})
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self.trained, **settings.adam)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: max(0.0, 1.0 - step / settings.steps)
        )
        self.last_result: StepResult | None = None

    @property
    def global_steps(self) -> int:
        """Taken so far."""
        return len(self.journal.records)

    def train_batch_size(self) -> int:
        """Examples of a step."""
        return self._settings.batch

    def train_micro_batch_size_per_gpu(self) -> int:
        """Examples of a forward."""
        return self._settings.micro_batch

    def train_batch(self, batches: Iterator[Any]) -> None:
        """One step, on the weighted mean loss of some micro-batches.

        Raises:
            DivergedError: The loss is not finite; the step is not taken.
        """
        self.model.train()
        total = weight = 0.0
        with without_cache(self.model):
            for batch in batches:
                loss = self._loss(move_to(batch, self.device))
                summed, counted = loss if isinstance(loss, tuple) else (loss.mean(), 1.0)
                summed.backward()
                total, weight = total + float(summed.detach()), weight + float(counted)
        step, lr = self.global_steps, self._schedule.get_last_lr()[0]
        if not math.isfinite(total):
            raise DivergedError(
                f"step {step}: the loss is {total}; lower --lr, or look at its data"
            )
        for parameter in self.trained:
            if parameter.grad is not None:
                parameter.grad /= weight
        if self._settings.clip:
            nn.utils.clip_grad_norm_(self.trained, self._settings.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._schedule.step()
        loss = total / weight
        self.journal.append(Record(step, (), (loss,), eps=0.0, lr=float(lr)))
        self.last_result = StepResult(step, loss, (), (), (loss,), float(lr))

    def forward(self, batch: Any, by: Any = None) -> Any:
        """The model's output on the current weights."""
        call = by or self.objective.forward
        return self.run_model(partial(call, self.model, move_to(batch, self.device)))

    def run_model(self, run: Any) -> Any:
        """The result of code that calls the model, which drops nothing out meanwhile."""
        self.model.eval()
        with self._autocast():
            return run()

    def save_pretrained(self, directory: Path) -> None:
        """Plain Hugging Face files, or an adapter's."""
        saves: Any = self.model
        saves.save_pretrained(str(directory))

    def _loss(self, batch: Any) -> Any:
        with self._autocast():
            outputs = self.objective.forward(self.model, batch)
            return self.objective.loss(self.model, batch, outputs)

    def _autocast(self) -> AbstractContextManager[Any]:
        bf16 = self._settings.bf16
        return torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext()


def _summarize(engine: Backprop, metrics: Metrics, first_order: str) -> Summary:
    before, after = metrics.evaluation(0), metrics.evaluation(engine.global_steps)
    assert before is not None
    assert after is not None
    weights = sum(p.nbytes for p in engine.model.parameters())
    trained = sum(p.nbytes for p in engine.trained)
    return Summary(
        journal=None,
        steps=engine.global_steps,
        accuracy_before=before[0],
        accuracy_after=after[0],
        loss_before=finite(before[1]),
        loss_after=finite(after[1]),
        model_parameters=sum(p.numel() for p in engine.model.parameters()),
        model_bytes=weights,
        peak_device_bytes=weights + 3 * trained,  # gradients, and the two moments
        host_bytes=0,
        rank_bytes_per_step=None,
        noise_over_signal=None,
        metric=metrics.metric,
        first_order=first_order,
    )
