"""A training run in a directory: what ``zo-offload train`` and ``launcher/train.py`` do.

::

    DIR/run.json       what was asked for; the same command continues the run
    DIR/journal/       one record a step (docs/format.md)
    DIR/metrics.csv    one row a step, with the evaluations
    DIR/curve.png      loss and accuracy
    DIR/model/         the trained model, a plain Hugging Face directory
    DIR/summary.json   written last: the run is finished

Batches are a function of (seed, step) and the journal holds every step, so a run that was stopped at
any instant continues as if it had not been.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zo_offload.config import ZOConfig, load_json, parse_config
from zo_offload.errors import ConfigError
from zo_offload.metrics import Metrics, draw_curve
from zo_offload.tasks import (
    Encoded,
    Evaluation,
    Example,
    Prompt,
    batch_at,
    collate,
    encode,
    evaluate,
    evaluation_batches,
    option_forward,
    option_loss,
    read_examples,
)

DEFAULT_CONFIG: dict[str, Any] = {
    "train_batch_size": 16,
    "optimizer": {"type": "ZO", "params": {"lr": 1e-5}},
    "zeroth_order": {
        "eps": 1e-3,
        "direction_scale": "rms",
        "offload_param": {"device": "cpu"},
    },
}
NUM_EVALUATIONS = 10


@dataclass(frozen=True)
class TaskOptions:
    """A model and a classification task."""

    model: str
    dev: str
    template: str
    labels: str
    config: str | None = None
    truncate: bool = False
    dev_limit: int | None = None


@dataclass(frozen=True)
class RunOptions(TaskOptions):
    """What to train, and where to."""

    train: str = ""
    steps: int = 0
    output: str = ""
    eval_every: int | None = None


@dataclass(frozen=True)
class Summary:
    """What a finished run found. Bytes are of weights."""

    steps: int
    accuracy_before: float
    accuracy_after: float
    loss_before: float
    loss_after: float
    model_parameters: int
    model_bytes: int
    peak_device_bytes: int
    host_bytes: int
    rank_bytes_per_step: int
    noise_over_signal: float | None


class Reporter:
    """Is told what happens; the command line shows it."""

    def on_start(self, first_step: int, steps: int) -> None:
        """Training begins, or continues where it stopped."""

    def on_evaluation(self, step: int, accuracy: float, loss: float) -> None:
        """The dev set was evaluated after ``step`` steps."""

    def on_step(self, step: int, loss: float) -> None:
        """A step was taken."""


def train(options: RunOptions, reporter: Reporter) -> Summary:
    """Train, evaluate and export; continues what the output directory holds.

    Raises:
        ZOError: With one line for the user; whatever was saved stays as it is.
    """
    if options.steps < 1:
        raise ConfigError(f"--steps: expected at least 1, found {options.steps}")
    config = load_json(options.config) if options.config else DEFAULT_CONFIG
    parsed = parse_config(config)
    task = Task(options, read_examples(options.train))
    directory = Path(options.output)
    _claim(directory, options, config)
    if (directory / "summary.json").exists():
        return Summary(**json.loads((directory / "summary.json").read_text(encoding="utf-8")))
    task.encode()
    engine = _start_engine(task, _with_journal(config, parsed, directory), options.steps)
    try:
        metrics = Metrics(directory / "metrics.csv", engine.stepper.journal.records)
        try:
            _take_steps(engine, task, options, parsed.seed, metrics, reporter)
        finally:
            metrics.close()
        _export(engine, task, directory / "model")
        draw_curve(metrics, directory / "curve.png")
        summary = _summarize(engine, metrics)
        _write_json(directory / "summary.json", asdict(summary))
        return summary
    finally:
        engine.destroy()


def evaluate_model(options: TaskOptions) -> Evaluation:
    """Accuracy and mean loss of a model on a data set; its weights stream as in training."""
    config = load_json(options.config) if options.config else DEFAULT_CONFIG
    parse_config(config)
    task = Task(options)
    task.encode()
    engine = _start_engine(task, config)
    try:
        return _evaluate(engine, task.dev)
    finally:
        engine.destroy()


class Task:
    """Data, prompt and tokenizer of a run; everything that can be refused before weights are read."""

    def __init__(self, options: TaskOptions, train: list[Example] | None = None) -> None:
        self._options = options
        self._prompt = Prompt(options.template, options.labels)
        self._examples = (train or [], read_examples(options.dev)[: options.dev_limit])
        self.model_name = options.model
        self.tokenizer: Any = None
        self.train: list[Encoded] = []
        self.dev: list[Encoded] = []

    def encode(self) -> None:
        """Read the tokenizer, and turn examples into tokens that fit the model's context."""
        from zo_offload.integrations.hf import context_length, load_tokenizer

        self.tokenizer = load_tokenizer(self.model_name)
        limit = context_length(self.model_name)
        self.train, self.dev = (
            encode(part, self._prompt, self.tokenizer, limit, truncate=self._options.truncate)
            for part in self._examples
        )


def _start_engine(task: Task, config: Mapping[str, Any], steps: int | None = None) -> Any:
    from torch.optim.lr_scheduler import LambdaLR

    from zo_offload.engine import initialize
    from zo_offload.integrations.hf import load_causal_lm
    from zo_offload.step import Objective

    def linear_decay(optimizer: Any) -> LambdaLR:
        return LambdaLR(optimizer, lambda step: max(0.0, 1.0 - step / steps) if steps else 1.0)

    scheduler = None if "scheduler" in config else linear_decay
    objective = Objective(loss=option_loss, forward=option_forward)
    model = load_causal_lm(task.model_name)
    engine, _, _, _ = initialize(
        model=model, config=config, objective=objective, lr_scheduler=scheduler
    )
    return engine


def _take_steps(
    engine: Any, task: Task, options: RunOptions, seed: int, metrics: Metrics, reporter: Reporter
) -> None:
    steps = options.steps
    every = options.eval_every or max(1, steps // NUM_EVALUATIONS)
    reporter.on_start(engine.global_steps, steps)
    for step in range(engine.global_steps, steps + 1):
        if step % every == 0 or step == steps:
            if metrics.evaluation(step) is None:
                metrics.add_evaluation(_evaluate(engine, task.dev))
            found = metrics.evaluation(step)
            assert found is not None
            reporter.on_evaluation(step, *found)
        if step < steps:
            began = time.perf_counter()
            engine.train_batch(_micro_batches(engine, task.train, seed, step))
            metrics.add_step(engine.stepper.journal.last, time.perf_counter() - began)
            reporter.on_step(step, engine.last_result.loss)


def _micro_batches(engine: Any, examples: list[Encoded], seed: int, step: int) -> Iterator[Any]:
    chosen = batch_at(seed, step, engine.train_batch_size(), len(examples))
    size = engine.train_micro_batch_size_per_gpu()
    for first in range(0, len(chosen), size):
        yield collate([examples[index] for index in chosen[first : first + size]])


def _evaluate(engine: Any, examples: list[Encoded]) -> Evaluation:
    batch_size = 2 * engine.train_micro_batch_size_per_gpu()  # as many rows as a step's two lanes
    return evaluate(engine.stepper.forward, evaluation_batches(examples, batch_size))


def _summarize(engine: Any, metrics: Metrics) -> Summary:
    weights, steps = engine.stepper.weights, engine.global_steps
    before, after = metrics.evaluation(0), metrics.evaluation(steps)
    assert before is not None
    assert after is not None
    noise = engine.loss_noise
    return Summary(
        steps=steps,
        accuracy_before=before[0],
        accuracy_after=after[0],
        loss_before=before[1],
        loss_after=after[1],
        model_parameters=weights.map.num_parameters,
        model_bytes=weights.map.forward_bytes,
        peak_device_bytes=weights.arena.peak_bytes,
        host_bytes=weights.host_bytes,
        rank_bytes_per_step=engine.stepper.replica.bytes_sent // max(steps, 1),
        noise_over_signal=noise.ratio if noise else None,
    )


def _claim(directory: Path, options: RunOptions, config: Mapping[str, Any]) -> None:
    """Make the directory, or see that the run in it is this one."""
    asked = {**asdict(options), "config": config}
    del asked["output"]
    record = directory / "run.json"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not record.exists():
            if any(directory.iterdir()):
                raise ConfigError(
                    f"--output: {directory} is not empty and holds no run; choose another"
                )
            _write_json(record, asked)
            return
        held = json.loads(record.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--output: cannot write {directory}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{record}: damaged ({error}); remove the directory to start anew"
        ) from None
    asked = json.loads(json.dumps(asked))
    if not os.access(directory, os.W_OK):
        raise ConfigError(f"--output: cannot write {directory}: Permission denied")
    for key in asked:
        if held.get(key) != asked[key]:
            raise ConfigError(
                f"--output: {directory} holds another run: {key} was {json.dumps(held.get(key))}, "
                f"is now {json.dumps(asked[key])}; give the same command, or another --output"
            )


def _with_journal(config: Mapping[str, Any], parsed: ZOConfig, directory: Path) -> dict[str, Any]:
    path = parsed.journal.path or str(directory / "journal" / "run.journal")
    block = {**config.get("zeroth_order", {}), "journal": {"path": path}}
    return {**config, "zeroth_order": block}


def _export(engine: Any, task: Task, directory: Path) -> None:
    """Write the model aside, then give it its name."""
    aside = directory.with_name(directory.name + ".new")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        engine.save_pretrained(aside)
        task.tokenizer.save_pretrained(str(aside))
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(aside, directory)
    except OSError as error:
        raise ConfigError(f"cannot export to {directory}: {error.strerror or error}") from error


def _write_json(path: Path, value: Any) -> None:
    aside = path.with_name(path.name + ".new")
    aside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, path)
