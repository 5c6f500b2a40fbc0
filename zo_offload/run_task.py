"""Data, prompt and tokenizer of a run: what can be refused before weights are read."""

from dataclasses import dataclass
from typing import Any

from zo_offload.errors import ModelError
from zo_offload.reporter import Reporter
from zo_offload.tasks import Encoded, Example, Prompt, encode, read_examples


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


class Task:
    """Data, prompt and tokenizer of a run: what can be refused before weights are read."""

    def __init__(self, options: TaskOptions, train: list[Example] | None = None) -> None:
        self._options = options
        self._prompt = Prompt(options.template, options.labels)
        self._examples = (train or [], read_examples(options.dev)[: options.dev_limit])
        self.model_name = options.model
        self.tokenizer: Any = None
        self.train: list[Encoded] = []
        self.dev: list[Encoded] = []

    def encode(self, reporter: Reporter) -> None:
        """Read the tokenizer, and turn examples into tokens that fit the model's context."""
        from zo_offload.integrations.hf import limits, load_tokenizer

        with reporter.phase(f"reading the tokenizer of {self.model_name}"):
            limit, rows = limits(self.model_name)
            self.tokenizer = load_tokenizer(self.model_name)
        with reporter.phase(f"encoding {sum(map(len, self._examples)):,} examples"):
            self.train, self.dev = (
                encode(part, self._prompt, self.tokenizer, limit, truncate=self._options.truncate)
                for part in self._examples
            )
        self._check_vocabulary(rows)

    def _check_vocabulary(self, rows: int | None) -> None:
        """Tokens are looked up in the embedding; a row that is not there ends in a crash."""
        tokens = [
            (max((*one.context, *(t for option in one.options for t in option))), example.where)
            for part, examples in zip((self.train, self.dev), self._examples, strict=True)
            for one, example in zip(part, examples, strict=True)
        ]
        largest, where = max(tokens, default=(0, ""))
        if rows is not None and largest >= rows:
            raise ModelError(
                f"{self.model_name}: token {largest} of {where} has no row in the embedding, which "
                f"has {rows}; tokenizer and model do not belong together"
            )
