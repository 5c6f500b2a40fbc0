"""A training run in a directory: what ``zo-offload train`` and ``launcher/train.py`` do.

::

    DIR/run.json         what was asked for; the same command continues the run
    DIR/.lock            held while a run works
    DIR/journal/         one record a step (docs/format.md)
    DIR/metrics.csv      one row a step, with the evaluations
    DIR/telemetry.jsonl  seconds by part, bytes by link, memory, warnings (docs/report.md)
    DIR/curve.png        loss and accuracy
    DIR/model/           the trained model, a plain Hugging Face directory
    DIR/summary.json     written last: the run is finished

Batches are a function of (seed, step) and the journal holds every step, so a run that was stopped
at any instant continues as if it had not been. Until there is a journal nothing is held, and
another command may take the directory over.
"""

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zo_offload import alike, files, launched, telemetry
from zo_offload.config import BLOCK, load_json, parse_config
from zo_offload.errors import ConfigError, RolledBackError
from zo_offload.journal import Journal
from zo_offload.metrics import Metrics, draw_curve, equal_share, num_skipped
from zo_offload.plan import shortage
from zo_offload.replica import Replica
from zo_offload.reporter import Reporter
from zo_offload.run_defaults import default_config
from zo_offload.run_directory import as_json, claimed, holds, journal_path, what_is_asked
from zo_offload.run_evaluation import evaluate_on_ranks
from zo_offload.run_task import Task, TaskOptions, recorded
from zo_offload.stopping import Stopping
from zo_offload.tasks import Evaluation, batch_at
from zo_offload.trainable.choose import check_files

logger = logging.getLogger(__name__)

NUM_EVALUATIONS = 10
LEAST_EVAL_EVERY = 10
MOST_STEPS = 2**32 - 1  # a step is one word of the noise counter
FINISHED = b"finished"


@dataclass(frozen=True)
class RunOptions(TaskOptions):
    """What to train, and where to."""

    steps: int = 0
    output: str = ""
    eval_every: int | None = None
    first_order: str | None = None
    lr: float | None = None


@dataclass(frozen=True)
class Summary:
    """What a finished run found. Bytes are of weights; accuracies, of the task's `metric`.

    Attributes:
        equal_share: Of all probes tried, those whose lanes had equal losses: they move nothing.
        skipped_steps: Recorded and not applied, as their losses were not finite or far too high.
        rollbacks: How often the run went back to a better step.
        first_order: What backprop trained, where it did: then bytes on the device are of
            weights, gradients and moments together.
    """

    journal: str | None
    steps: int
    accuracy_before: float
    accuracy_after: float
    loss_before: float | None
    loss_after: float | None
    model_parameters: int
    model_bytes: int
    peak_device_bytes: int
    host_bytes: int
    rank_bytes_per_step: int | None
    noise_over_signal: float | None
    metric: str = "accuracy"
    eps_warning: str | None = None
    equal_share: float | None = None
    skipped_steps: int = 0
    rollbacks: int = 0
    first_order: str | None = None


def train(options: RunOptions, reporter: Reporter) -> Summary | None:
    """Train, evaluate and export; continues what the output directory holds. Every rank calls it.

    Returns:
        What was found, on the first rank; None on the others.

    Raises:
        ZOError: With one line for the user; whatever was saved stays as it is.
        Stopped: The user has asked for it; the same command continues.
    """
    replica = connected()
    with reporter.phase("reading the data", quiet=True):
        config, task, asked = replica.all_or_none(lambda: asked_for(options))
        alike.refuse_other_options(replica, asked)
    directory = Path(options.output)
    with ExitStack() as stack:

        def claim() -> bytes:
            if holds(directory, asked) and (directory / "summary.json").exists():
                return FINISHED
            stack.enter_context(claimed(directory, asked))
            return b""

        if replica.share(claim) == FINISHED:
            return read_summary(directory / "summary.json") if replica.is_first else None
        journal = journal_path(config, directory)
        stopping = stack.enter_context(Stopping(reporter, alone=replica.world_size == 1))
        listen = stack.enter_context(telemetry.listening())
        stack.enter_context(shortage.explained(options.model, config, task.longest))
        while True:
            engine = start_engine(replica, task, config, reporter, options.steps, directory)
            try:
                return _run(engine, task, options, journal, reporter, stopping, listen)
            except RolledBackError as error:
                logger.warning("%s", error.text)
            finally:
                engine.destroy()


def evaluate_model(options: TaskOptions, reporter: Reporter) -> Evaluation:
    """Accuracy and mean loss of a model on a data set; its weights stream as in training."""
    replica = connected()
    with reporter.phase("reading the data", quiet=True):
        config, task = replica.all_or_none(lambda: _task(options))
    engine = start_engine(replica, task, config, reporter)
    try:
        return evaluate_on_ranks(engine, task, reporter)
    finally:
        engine.destroy()


def connected() -> Replica:
    """This rank among those that were launched; one alone need not be connected to find a typo."""
    if launched.num_ranks() == 1:
        return Replica()
    from zo_offload import process_group

    process_group.init_distributed()
    return process_group.replica()


def asked_for(options: RunOptions) -> tuple[dict[str, Any], Task, dict[str, Any]]:
    """Config, task, and what makes this run this run: all that needs no weights."""
    if not 1 <= options.steps <= MOST_STEPS:
        raise ConfigError(f"--steps: expected 1 to {MOST_STEPS:,}, found {options.steps}")
    if options.lr is not None:
        raise ConfigError("--lr: goes with --first-order; else the JSON's optimizer.params.lr says")
    config, task = _task(options, training=True)
    return config, task, what_is_asked(recorded(options, task.order), config, task.digests)


def _task(options: TaskOptions, training: bool = False) -> tuple[dict[str, Any], Task]:
    config = load_json(options.config) if options.config else default_config(options.model)
    parsed = parse_config(config)
    if not training:
        config = _as_written(config, options.model)
        parsed = parse_config(config)
    check_files(parsed)
    return config, Task(options, training)


def _run(
    engine: Any,
    task: Task,
    options: RunOptions,
    journal: Path,
    reporter: Reporter,
    stopping: Stopping,
    listen: Callable[[telemetry.Telemetry | None], None],
) -> Summary | None:
    replica, directory = engine.stepper.replica, Path(options.output)
    metrics: Metrics | None = None
    try:
        if replica.is_first:
            records = Journal.read(journal).records if journal.exists() else ()
            metrics = Metrics(directory / "metrics.csv", records, task.metric, options.objective)
        lost = metrics is not None and bool(metrics.rows) and metrics.evaluation(0) is None
        if _on_every_rank(replica, lost):  # the file was lost, the base is at hand
            found = evaluate_on_ranks(engine, task, reporter)
            if metrics is not None:
                metrics.mend_evaluation(0, found)
        with reporter.phase(f"opening {journal}"):
            engine.continue_journal(journal)
        if engine.global_steps > options.steps:
            raise ConfigError(
                f"--steps: {journal} holds {engine.global_steps} already, found {options.steps}"
                "; give at least that many, or another --output"
            )
        first = engine.global_steps
        if metrics is not None:
            metrics.telemetry = _telemetry(engine, directory)
            listen(metrics.telemetry)
        take_steps(engine, task, options, metrics, reporter, stopping)
    finally:
        listen(None)
        if metrics is not None:
            metrics.close()
    if metrics is None:
        replica.wait_for_all()
        return None
    with reporter.phase(f"exporting to {directory / 'model'}"):
        export_model(engine, task, directory / "model")
    with reporter.phase("drawing the curve", quiet=True):
        draw_curve(metrics, directory / "curve.png")
    summary = _summarize(engine, metrics, journal, options.steps - first)
    files.write_file(directory / "summary.json", as_json(asdict(summary)))
    replica.wait_for_all()
    return summary


def _telemetry(engine: Any, directory: Path) -> telemetry.Telemetry:
    """Of an engine that has taken its journal's steps over."""
    stepper = engine.stepper

    def more() -> dict[str, Any]:
        found = engine.loss_noise
        noise = finite(found.noise) if found is not None and not found.is_stepwise else None
        return {"held": telemetry.held(stepper), "noise": noise}

    return telemetry.Telemetry(
        directory / telemetry.NAME,
        engine.global_steps,
        telemetry.beginning(stepper),
        lambda: telemetry.reading(stepper),
        more,
    )


def _on_every_rank(replica: Replica, answer: bool) -> bool:
    """The first rank's answer."""
    return bool(replica.share(lambda: bytes([answer]))[0])


def _check_settings(config: Mapping[str, Any]) -> tuple[int, int]:
    """DeepSpeed's part of the JSON, which takes seconds to import; sizes of batch, micro-batch."""
    from zo_offload.deepspeed_json import read_settings

    read = read_settings(config).deepspeed
    return read.train_batch_size, read.train_micro_batch_size_per_gpu


def _warn_of_size(size: int, at_once: int, num_examples: int) -> None:
    if 0 < num_examples < size:
        logger.warning(
            "train_batch_size: %s examples a step, and --train holds %s: each comes several times "
            "a step, %s in one forward (train_micro_batch_size_per_gpu)",
            f"{size:,}", f"{num_examples:,}", f"{at_once:,}",
        )  # fmt: skip


def start_engine(
    replica: Replica,
    task: Task,
    config: Mapping[str, Any],
    reporter: Reporter,
    steps: int | None = None,
    directory: Path | None = None,
) -> Any:
    """An engine for a task, without a journal; every rank calls it."""
    from torch.optim.lr_scheduler import LambdaLR

    config = _without_journal(config)
    with reporter.phase("reading the config"):
        sizes = replica.all_or_none(lambda: _check_settings(config))
    replica.all_or_none(lambda: task.encode(reporter))
    _warn_of_size(*sizes, len(task.train))

    def linear_decay(optimizer: Any) -> LambdaLR:
        return LambdaLR(optimizer, lambda step: max(0.0, 1.0 - step / steps) if steps else 1.0)

    with reporter.phase(f"loading {task.model_name}"):
        from zo_offload.engine import initialize

        spill = [*(parse_config(config).offload_param.nvme_path or ()), *filter(None, [directory])]
        engine, _, _, _ = initialize(
            model=replica.all_or_none(lambda: task.load_model(spill)),
            config=config,
            objective=task.way.objective,
            lr_scheduler=None if config.get("scheduler") else linear_decay,
        )
    return engine


def take_steps(
    engine: Any,
    task: Task,
    options: RunOptions,
    metrics: Metrics | None,
    reporter: Reporter,
    stopping: Stopping,
) -> None:
    """All that are left, with the evaluations between them."""
    steps, replica = options.steps, engine.stepper.replica
    every = options.eval_every or max(LEAST_EVAL_EVERY, steps // NUM_EVALUATIONS)
    reporter.on_start(engine.global_steps, steps)
    for step in range(engine.global_steps, steps + 1):
        stopping.steps = step
        if step % every == 0 or step == steps:
            missing = metrics is not None and metrics.evaluation(step) is None
            if _on_every_rank(replica, missing):
                found = evaluate_on_ranks(engine, task, reporter)
                if metrics is not None:
                    metrics.add_evaluation(found)
            if metrics is not None:
                held = metrics.evaluation(step)
                assert held is not None
                reporter.on_evaluation(step, *held, metric=metrics.metric)
        if step < steps:
            with stopping.step(replica, step):
                began = time.perf_counter()
                engine.train_batch(micro_batches(engine, task, step))
                if metrics is not None:
                    metrics.add_step(engine.stepper.journal.last, time.perf_counter() - began)
                reporter.on_step(step, engine.last_result.loss)


def micro_batches(engine: Any, task: Task, step: int) -> Iterator[Any]:
    """This rank's of a step: g, g + G, ... of all, for group g of G.

    Examples of like length go together, so that little is padding; a step's mean is of them all.
    """
    division, size = engine.stepper.division, engine.train_micro_batch_size_per_gpu()
    examples, seed = task.train, engine.stepper.config.seed
    chosen = batch_at(seed, step, engine.train_batch_size(), len(examples), task.classes)
    if size < len(chosen):
        chosen.sort(key=lambda index: getattr(examples[index], "num_tokens", 0))
    starts = range(0, len(chosen), size)
    for first in starts[division.data_rank :: division.num_data_ranks]:
        yield task.way.collate([examples[index] for index in chosen[first : first + size]])


def _summarize(engine: Any, metrics: Metrics, journal: Path, taken: int) -> Summary:
    weights, steps = engine.stepper.weights, engine.global_steps
    before, after = metrics.evaluation(0), metrics.evaluation(steps)
    assert before is not None
    assert after is not None
    noise, records = engine.loss_noise, engine.stepper.journal.records
    return Summary(
        journal=str(journal),
        steps=steps,
        accuracy_before=before[0],
        accuracy_after=after[0],
        loss_before=finite(before[1]),
        loss_after=finite(after[1]),
        model_parameters=weights.map.num_parameters,
        model_bytes=weights.map.forward_bytes,
        peak_device_bytes=weights.arena.peak_bytes,
        host_bytes=weights.host_bytes,
        rank_bytes_per_step=engine.stepper.replica.step_bytes // taken if taken else None,
        noise_over_signal=finite(noise.ratio) if noise and not noise.is_stepwise else None,
        metric=metrics.metric,
        eps_warning=_eps_warning(engine),
        equal_share=equal_share(records),
        skipped_steps=num_skipped(records),
        rollbacks=records.stream,
    )


def _eps_warning(engine: Any) -> str | None:
    """What was wrong with eps, also where another process took the steps that showed it."""
    watch = engine.eps_watch
    if watch.finding is None:
        watch = engine.stepper.new_watch()
        for record in engine.stepper.journal.records:
            grads = [probe.projected_grad for probe in record.probes]
            watch.observe(record.step, record.losses, grads)
    return watch.finding.text if watch.finding else None


def finite(value: float) -> float | None:
    """JSON has no other numbers."""
    return value if math.isfinite(value) else None


def read_summary(path: Path) -> Summary:
    """Of a finished run."""
    try:
        return Summary(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{path}: damaged ({error}); remove this file, and the same command writes it again"
        ) from None


def _without_journal(config: Mapping[str, Any]) -> dict[str, Any]:
    """For an engine that opens its journal later, or never; how often it keeps weights stays."""
    block = config.get("zeroth_order")
    if not isinstance(block, Mapping) or not isinstance(block.get("journal"), Mapping):
        return dict(config)
    journal = {key: value for key, value in block["journal"].items() if key != "path"}
    return {**config, "zeroth_order": {**block, "journal": journal}}


def _as_written(config: Mapping[str, Any], model: str) -> dict[str, Any]:
    """A run's JSON, to evaluate what it has written: that has its adapter, or values, already."""
    from zo_offload.trainable.decoded import is_marked
    from zo_offload.trainable.peft import base_of

    done = {"trainable"} if base_of(model) is not None else set()
    done |= {"trainable", "wire"} if is_marked(model) else set()
    if not done:
        return dict(config)
    block = config.get(BLOCK) or {}
    return {**config, BLOCK: {k: v for k, v in block.items() if k not in done}}


def export_model(engine: Any, task: Task, directory: Path) -> None:
    """Write the model aside, then give it its name."""
    from safetensors import SafetensorError

    aside = directory.with_name(directory.name + files.ASIDE)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        engine.save_pretrained(aside)
        task.processor.save_pretrained(str(aside))
        files.sync_tree(aside)
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(aside, directory)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"cannot export to {directory}: {error}"
            "; make room there, or let this user write, and start the same command again"
        ) from error
