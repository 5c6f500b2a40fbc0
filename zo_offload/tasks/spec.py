"""What a task is: how an example is worded, what is right, how it is trained and measured."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from zo_offload.kinds import Kind
from zo_offload.tasks.node import Node
from zo_offload.tasks.rendered import Rendered, around_mask
from zo_offload.tasks.scores import OF_OPTIONS
from zo_offload.tasks.template import Template
from zo_offload.tasks.wording import refuse

MOST_OPTIONS = 1000  # of an example, each of which is a row
TrainOn = Literal["options", "answer"]


@dataclass(frozen=True)
class Item:
    """One example of a data set, whatever its file's format.

    Attributes:
        fields: What a template may name.
        where: `file:line`.
        right: Indices of the right label words, or of the right choices.
        choices: Of this example alone, where options are not label words.
        answers: Accepted answers, where they are generated; the first is learnt from.
    """

    fields: Mapping[str, str]
    where: str
    right: tuple[int, ...] = (0,)
    choices: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Counts:
    """How many examples are drawn; None for all. Train and dev are parts of one split.

    Attributes:
        per_class: Of every class so many to train on and as many held out, in place of `train` and
            `dev`.
    """

    train: int | None = None
    dev: int | None = None
    test: int | None = None
    per_class: int | None = None

    def but(self, **given: int | None) -> "Counts":
        """With those that are given."""
        return replace(self, **{key: value for key, value in given.items() if value is not None})


@dataclass(frozen=True)
class Hub:
    """Where `datasets` finds it."""

    path: str
    name: str | None = None
    revision: str | None = None
    test: str = "validation"  # the hub's test splits mostly hide their labels


@dataclass(frozen=True)
class Manner:
    """How a task is trained and measured: what decides how its examples go through a model.

    Attributes:
        train_on: `options`: cross-entropy over the options' scores; `answer`: language-model loss
            on the right option's tokens alone.
        generates: Whether the answer is generated, greedily.
        metrics: Names in `METRICS`; the first is the task's score.
        stop: What ends a generated answer.
        max_new_tokens: Of a generated answer.
    """

    train_on: TrainOn = "options"
    generates: bool = False
    metrics: tuple[str, ...] = OF_OPTIONS[:1]
    stop: str = "\n"
    max_new_tokens: int = 50


@dataclass(frozen=True)
class TaskSpec:
    """A task.

    Attributes:
        name: In messages.
        template: The prompt.
        items: From a row of a file to its examples.
        words: Label words as they follow the prompt; empty where each example has its own options.
        option: How a choice, or an answer, follows the prompt: `{choice}` is in it.
        manner: How it is trained and measured.
        files: Of each split, names to look for, the first that is there being taken.
        folders: In which they may lie in the directory that is given.
        folder: Where files lie when no directory is given.
        hub: Where `datasets` finds it, if it does.
        counts: Drawn by seed.
        separator: Between demonstrations.
        columns: Of CSV files, which have no header then.
        test_seed: Of which test examples are drawn, whatever the seed of the others.
    """

    name: str
    template: Template
    items: Callable[[Node], Iterator[Item]]
    words: tuple[str, ...] = ()
    option: Template = field(default_factory=lambda: Template(" {choice}"))
    manner: Manner = field(default_factory=Manner)
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    folders: tuple[str, ...] = ()
    folder: Path | None = None
    hub: Hub | None = None
    counts: Counts = field(default_factory=Counts)
    separator: str = "\n\n"
    columns: tuple[str, ...] = ()
    test_seed: int | None = None

    @property
    def kind(self) -> Kind:
        """Of the models that its prompt is for."""
        return "masked" if self.template.asks_mask else "causal"

    def pose(self, item: Item) -> Rendered:
        """The example as text. No blank ends a prompt: tokenizers put it before the next word."""
        if self.template.asks_mask:
            before, after = self.template.fill_around(item.fields, item.where)
            return around_mask(before, after, self.words, item.right, item.where)
        prompt = self.template.fill(item.fields, item.where).strip(" ")
        if self.words:
            return Rendered(prompt, self.words, item.right, item.where)
        texts = item.answers[:1] if self.manner.generates else item.choices
        if len(texts) > MOST_OPTIONS:
            refuse(item.where, f"{len(texts):,} options", f"expected at most {MOST_OPTIONS:,}")
        options = tuple(
            self.option.fill({**item.fields, "choice": text}, item.where).rstrip(" ")
            for text in texts
        )
        return Rendered(prompt, options, item.right, item.where, item.answers, fixed=False)
