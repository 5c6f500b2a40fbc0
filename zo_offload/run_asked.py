"""What a command is asked, as options, and what these name, as examples."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from zo_offload.errors import ConfigError
from zo_offload.kinds import Kind
from zo_offload.tasks import Counts, Manner

logger = logging.getLogger(__name__)
Order = Literal["stratified", "shuffled"]


@dataclass(frozen=True)
class TaskOptions:
    """A model and what it is asked: a task by name or file, or a prompt with files."""

    model: str
    dev: str | None = None
    template: str | None = None
    labels: str | None = None
    config: str | None = None
    truncate: bool = False
    dev_limit: int | None = None
    train: str | None = None
    task: str | None = None
    data: str | None = None
    num_train: int | None = None
    num_dev: int | None = None
    num_test: int | None = None
    max_new_tokens: int | None = None
    data_seed: int = 0
    shots: int = 0
    split: str | None = None
    kind: Kind | None = None
    per_class: int | None = None
    order: Order | None = None
    objective: str = "loss"


@dataclass(frozen=True)
class Asked:
    """Examples as text, or as images, and how they are trained and measured.

    Attributes:
        train: To learn from.
        dev: To measure.
        manner: How.
        shots: Solved examples, to demonstrate with.
        separator: Between them.
        digests: Of what was read, by a name that says of what.
        kind: Of the model that is asked.
        words: Names of the classes of images.
    """

    train: list[Any]
    dev: list[Any]
    manner: Manner = field(default_factory=Manner)
    shots: list[str] = field(default_factory=list)
    separator: str = "\n\n"
    digests: Mapping[str, str] = field(default_factory=dict)
    kind: Kind = "causal"
    words: tuple[str, ...] = ()


def chosen_counts(counts: Counts, options: TaskOptions) -> Counts:
    """The task's, but for what is given; numbers of examples take the place of those by class."""
    train, dev, per_class = options.num_train, options.num_dev, options.per_class
    if (train or dev) and per_class:
        given = "--num-train" if train else "--num-dev"
        raise ConfigError(f"--per-class: not beside {given}; it says how many of every class")
    counts = counts.but(train=train, dev=dev, test=options.num_test, per_class=per_class)
    return replace(counts, per_class=None) if train or dev else counts


def warn_of_few(words: Sequence[str], count: int | None, train: Sequence[Any]) -> None:
    """Classes of which there are not as many as are asked for."""
    if count is None:
        return
    found = Counter(one.right[0] for one in train)
    few = [
        f"{found[index]:,} of {word.strip()!r}"
        for index, word in enumerate(words)
        if found[index] < count
    ]
    if few:
        logger.warning(
            "--per-class: %s training examples of each class are asked for, there are %s",
            f"{count:,}", ", ".join(few),
        )  # fmt: skip


def flag(name: str) -> str:
    """An option as it is written on the command line."""
    return f"--{name.replace('_', '-')}"
