"""What a run is asked: examples as text, by a task's name or by a prompt and files."""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from zo_offload.errors import ConfigError
from zo_offload.kinds import Kind
from zo_offload.run_asked import Asked, Order, TaskOptions, chosen_counts, flag, warn_of_few
from zo_offload.run_pictures import asked_of_pictures
from zo_offload.tasks import (
    Counts,
    Manner,
    Prompt,
    Rendered,
    Source,
    TaskSpec,
    chosen_task,
    draw,
    drawn,
    read_examples,
)
from zo_offload.tasks.aims import LOSS
from zo_offload.tasks.chosen import check_mask, is_task_file

BY_PROMPT = ("dev", "template", "labels")
BY_TASK = ("data", "num_train", "num_dev", "num_test", "per_class", "max_new_tokens")


def read_asked(options: TaskOptions, training: bool) -> Asked:
    """All that options name, read and checked.

    Args:
        options: Of the command.
        training: Else only what is measured is read, and demonstrations.

    Raises:
        ConfigError: Options are missing, or do not go together.
        TaskError: A task, file, prompt or example is wrong.
    """
    from zo_offload.integrations.model_kind import kind_of

    kind = options.kind or kind_of(options.model)
    if kind == "image":
        return asked_of_pictures(options, training)
    if options.shots and kind != "causal":
        raise ConfigError(
            "--shots: demonstrations are for causal LMs, which --model is not; leave it out"
        )
    if options.task is None:
        return _by_prompt(options, training, kind)
    return _by_task(options, training, kind)


def recorded(options: TaskOptions, order: Order) -> dict[str, Any]:
    """What of the options makes a run this run.

    What a task brought with it is left out where there is none, and so are an objective that is the
    task's loss and an order that is as examples come, so that runs from before there were these
    can be continued.

    Args:
        options: Of the command.
        order: That it comes to.
    """
    told = asdict(options)
    for name in ("shots", "split", "order"):  # of no use in training, or what it comes to counts
        del told[name]
    if order != "shuffled":
        told["order"] = order
    for name in ("kind", "per_class", "first_order", "lr"):
        if told.get(name, "") is None:
            del told[name]
    if told["objective"] == LOSS:
        del told["objective"]
    if options.task is None and options.data is None:
        told = {k: v for k, v in told.items() if k not in ("task", "data_seed", *BY_TASK)}
    return told


def _by_prompt(options: TaskOptions, training: bool, kind: Kind) -> Asked:
    for name in BY_TASK:
        if getattr(options, name) is not None:
            other = ", or an image classifier, which --model is not" if name == "data" else ""
            raise ConfigError(
                f"{flag(name)}: goes with --task, which is not given{other}; give both, or neither"
            )
    if options.split is not None:
        raise ConfigError("--split: goes with --task; --dev names what is measured")
    needed = (*BY_PROMPT, "train") if training else BY_PROMPT
    missing = [flag(name) for name in needed if getattr(options, name) is None]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)}: missing; give {', '.join(map(flag, needed))}, or --task"
        )
    if options.shots and options.train is None:
        raise ConfigError(
            "--shots: demonstrations are drawn from --train, which is not given"
            "; give it, or leave --shots out"
        )
    prompt = Prompt(str(options.template), str(options.labels))
    check_mask("--template", prompt.asks_mask, kind)
    train, dev = str(options.train), str(options.dev)
    learnt = [prompt.pose(each) for each in read_examples(train)] if training else []
    measured = [prompt.pose(each) for each in read_examples(dev)[: options.dev_limit]]
    shots = []
    if options.shots:
        pool = [prompt.pose(each) for each in read_examples(train)]
        shots = _demonstrations(drawn(pool, options.shots, options.data_seed), options)
    files = {"train": train, "dev": dev} if training else {}
    digests = {f"content of {name} (sha256)": _sha256(path) for name, path in files.items()}
    return Asked(learnt, measured, shots=shots, digests=digests, kind=kind)


def _by_task(options: TaskOptions, training: bool, kind: Kind) -> Asked:
    assert options.task is not None
    for name in (*BY_PROMPT, "train"):
        if getattr(options, name) is not None:
            raise ConfigError(f"{flag(name)}: not beside --task, which has its own; see --data")
    spec = chosen_task(options.task, kind)
    counts = chosen_counts(spec.counts, options)
    source = Source(spec, options.data)
    measured = "dev" if training else options.split or _measured(source)
    if options.shots and (source.is_one_file or measured == "train"):
        raise ConfigError(
            "--shots: demonstrations would be drawn from the examples that are measured; "
            "name a directory with a training split by --data"
        )

    def posed(split: str) -> list[Rendered]:
        return [spec.pose(item) for item in draw(source, split, counts, options.data_seed)]

    train = posed("train") if training else []
    dev = posed(measured)[: options.dev_limit]
    if training:
        warn_of_few(spec.words, counts.per_class, train)
    shots = _shots_of(source, counts, measured, options) if options.shots else []
    digests = {}
    if training:
        digests |= {"examples of train (sha256)": _digest(train)}
        digests |= {"examples of dev (sha256)": _digest(dev)}
    if training and is_task_file(options.task):
        digests |= {"content of task (sha256)": _sha256(options.task)}
    return Asked(train, dev, _manner(spec, options), shots, spec.separator, digests, kind)


def _shots_of(source: Source, counts: Counts, measured: str, options: TaskOptions) -> list[str]:
    """From the training split, but for what is measured of it."""
    shots, seed = options.shots, options.data_seed
    if measured == "dev":
        items = draw(source, "train", counts.but(train=shots), seed)[:shots]
    else:
        items = drawn(source.items("train"), shots, seed)
    return _demonstrations([source.spec.pose(item) for item in items], options)


def _demonstrations(pool: list[Rendered], options: TaskOptions) -> list[str]:
    if len(pool) < options.shots:
        raise ConfigError(
            f"--shots: {len(pool):,} examples to draw from, found {options.shots}; lower it"
        )
    return [each.solved for each in pool]


def _manner(spec: TaskSpec, options: TaskOptions) -> Manner:
    if options.max_new_tokens is None:
        return spec.manner
    if not spec.manner.generates:
        raise ConfigError(f"--max-new-tokens: {spec.name} generates nothing; leave it out")
    return replace(spec.manner, max_new_tokens=options.max_new_tokens)


def _measured(source: Source) -> str:
    """The split to measure when none is named: the test split, where there is one."""
    return "test" if "test" in source.spec.files or source.is_one_file else "dev"


def _digest(posed: list[Rendered]) -> str:
    """Of all that is learnt or measured; not of where it stood."""
    texts: list[list[Any]] = [
        [one.prompt, one.options, one.right, one.references, *([one.rest] if one.rest else [])]
        for one in posed
    ]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
