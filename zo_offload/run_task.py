"""A run's examples, and what makes a model's input of them: refused before weights are read."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from zo_offload.errors import ConfigError, ModelError
from zo_offload.kinds import Kind
from zo_offload.reporter import Reporter
from zo_offload.run_asked import Order, TaskOptions
from zo_offload.run_data import read_asked, recorded
from zo_offload.tasks import Rendered, Way, causal_way, masked_way
from zo_offload.tasks.aims import check_objective
from zo_offload.tasks.classify import image_way
from zo_offload.tasks.pictures import are_made_up, in_the_models_order
from zo_offload.tasks.shots import told, with_demonstrations

__all__ = ["Task", "TaskOptions", "recorded"]

logger = logging.getLogger(__name__)
WAYS: dict[Kind, Callable[..., Way]] = {"causal": causal_way, "masked": masked_way}


class Task:
    """A run's examples, and their way through its model.

    Args:
        options: Of the command.
        training: Whether there is something to learn from.

    Attributes:
        model_name: Directory or id.
        digests: Of what was read.
        order: Of what is learnt.
        processor: After `encode`: the tokenizer, or of images what resizes them.
        way, train, dev: After `encode`.
        classes: Of what is learnt, where batches are to hold each in proportion.
    """

    processor: Any
    way: Way

    def __init__(self, options: TaskOptions, training: bool = False) -> None:
        self._options = options
        self._asked = read_asked(options, training)
        check_objective(options.objective, self._asked.manner)
        self.model_name = options.model
        self.digests = self._asked.digests
        self.order: Order = self._order()
        self.metric = self._asked.manner.metrics[0]
        self.train: list[Any] = []
        self.dev: list[Any] = []
        self.classes: tuple[int, ...] | None = None

    def encode(self, reporter: Reporter) -> None:
        """Turn text into tokens that fit the model's context, or look at every image."""
        (self._look if self._asked.kind == "image" else self._tokenize)(reporter)
        if self.order == "stratified":
            self.classes = tuple(one.right[0] for one in self.train)
        self.way = self.way.minimising(self._options.objective)

    def longest(self) -> int:
        """Tokens of the longest example; 1 where it has none, or before they are encoded."""
        return max((getattr(one, "num_tokens", 1) for one in (*self.train, *self.dev)), default=1)

    def load_model(self, spill: Sequence[str | Path]) -> Any:
        """The model that the task's way leads through."""
        from zo_offload.integrations.hf import load_model

        model = load_model(self.model_name, spill, self._asked.kind)
        words = self._asked.words
        if words and are_made_up([*model.config.id2label.values()]):
            model.config.id2label = dict(enumerate(words))
            model.config.label2id = {word: index for index, word in enumerate(words)}
        return model

    def _order(self) -> Order:
        """Of what is learnt: by class, where all examples are of the same few."""
        classes, wanted = self._asked.manner.train_on == "options", self._options.order
        if wanted == "stratified" and not classes:
            raise ConfigError(
                "--order stratified: for examples of a few classes, and this task's answers are "
                "each example's own; leave it out"
            )
        return wanted or ("stratified" if classes else "shuffled")

    def _look(self, reporter: Reporter) -> None:
        from zo_offload.integrations.hf import class_names, load_image_processor

        asked, data = self._asked, str(self._options.data)
        with reporter.phase(f"reading the image processor of {self.model_name}"):
            names = class_names(self.model_name)
            self.processor = load_image_processor(self.model_name)
            self.way = image_way(self.processor)
        with reporter.phase(f"looking at {len(asked.train) + len(asked.dev):,} images"):
            self.train, self.dev = (
                self.way.encode(in_the_models_order(part, asked.words, names, data))
                for part in (asked.train, asked.dev)
            )

    def _tokenize(self, reporter: Reporter) -> None:
        from zo_offload.integrations.hf import limits, load_tokenizer

        with reporter.phase(f"reading the tokenizer of {self.model_name}"):
            limit, rows = limits(self.model_name, self._asked.kind)
            self.processor = load_tokenizer(self.model_name)
            self.way = WAYS[self._asked.kind](self._asked.manner, self.processor)
        learnt = self._asked.train
        count = len(learnt) + len(self._asked.dev)
        with reporter.phase(f"encoding {count:,} examples"):
            posed = (learnt, self._demonstrated(limit))
            self.train, self.dev = (
                self.way.encode(part, limit, self._options.truncate) for part in posed
            )
        self._check_vocabulary(rows, posed)

    def _demonstrated(self, limit: int | None) -> list[Rendered]:
        """What is measured, after its demonstrations."""
        asked = self._asked
        if not asked.shots:
            return asked.dev
        room = asked.manner.max_new_tokens if asked.manner.generates else 0

        def measure(posed: Sequence[Rendered]) -> list[int]:
            return [one.num_positions(room) for one in self.way.encode(posed, None, False)]

        def count(texts: list[str]) -> list[int]:
            return [len(ids) for ids in self.processor(texts, verbose=False)["input_ids"]]

        found, counts = with_demonstrations(
            asked.dev, asked.shots, asked.separator, limit, measure=measure, count=count
        )
        if line := told(counts, len(asked.shots)):
            logger.warning("%s", line)
        return found

    def _check_vocabulary(
        self, rows: int | None, posed: tuple[Sequence[Rendered], Sequence[Rendered]]
    ) -> None:
        """Tokens are looked up in the embedding; a row that is not there ends in a crash."""
        tokens = [
            (
                max((*one.context, *one.prompt, *(t for option in one.options for t in option))),
                example.where,
            )
            for part, examples in zip((self.train, self.dev), posed, strict=True)
            for one, example in zip(part, examples, strict=True)
        ]
        largest, where = max(tokens, default=(0, ""))
        if rows is not None and largest >= rows:
            raise ModelError(
                f"{self.model_name}: token {largest} of {where} has no row in the embedding, which "
                f"has {rows}; tokenizer and model do not belong together"
            )
