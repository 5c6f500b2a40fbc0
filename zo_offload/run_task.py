"""A run's examples and tokenizer: what can be refused before weights are read."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from zo_offload.errors import ModelError
from zo_offload.kinds import Kind
from zo_offload.reporter import Reporter
from zo_offload.run_data import TaskOptions, read_asked, recorded
from zo_offload.tasks import Encoded, Rendered, Way, causal_way, masked_way
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
        tokenizer, way, train, dev: After `encode`.
    """

    tokenizer: Any
    way: Way

    def __init__(self, options: TaskOptions, training: bool = False) -> None:
        self._options = options
        self._asked = read_asked(options, training)
        self.model_name = options.model
        self.digests = self._asked.digests
        self.metric = self._asked.manner.metrics[0]
        self.train: list[Encoded] = []
        self.dev: list[Encoded] = []

    def encode(self, reporter: Reporter) -> None:
        """Read the tokenizer, and turn examples into tokens that fit the model's context."""
        from zo_offload.integrations.hf import limits, load_tokenizer

        with reporter.phase(f"reading the tokenizer of {self.model_name}"):
            limit, rows = limits(self.model_name, self._asked.kind)
            self.tokenizer = load_tokenizer(self.model_name)
            self.way = WAYS[self._asked.kind](self._asked.manner, self.tokenizer)
        learnt = self._asked.train
        count = len(learnt) + len(self._asked.dev)
        with reporter.phase(f"encoding {count:,} examples"):
            posed = (learnt, self._demonstrated(limit))
            self.train, self.dev = (
                self.way.encode(part, limit, self._options.truncate) for part in posed
            )
        self._check_vocabulary(rows, posed)

    def load_model(self, spill: Sequence[str | Path]) -> Any:
        """The model that the task's way leads through."""
        from zo_offload.integrations.hf import load_model

        return load_model(self.model_name, spill, self._asked.kind)

    def _demonstrated(self, limit: int | None) -> list[Rendered]:
        """What is measured, after its demonstrations."""
        asked = self._asked
        if not asked.shots:
            return asked.dev
        room = asked.manner.max_new_tokens if asked.manner.generates else 0

        def measure(posed: Sequence[Rendered]) -> list[int]:
            return [one.num_positions(room) for one in self.way.encode(posed, None, False)]

        def count(texts: list[str]) -> list[int]:
            return [len(ids) for ids in self.tokenizer(texts, verbose=False)["input_ids"]]

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
