"""Turns the fields of an example into a prompt, and its label into one of the label words.

Label words come as one string. `" terrible, great"` is split at its commas, and a word **keeps one
leading space where its part is written with a space in front**: the words are `" terrible"` and
`" great"`, which most tokenizers see as one token each after `It was`. Words with commas or other
spaces are written as a JSON list: `[" yes, it is", " no"]`, taken as it stands.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from zo_offload.tasks.reader import Example
from zo_offload.tasks.rendered import Rendered, around_mask
from zo_offload.tasks.template import Template
from zo_offload.tasks.wording import listed, nearest, quote, refuse, text_fault

JSON_LABELS = '[" no", " yes"]'


@dataclass(frozen=True)
class Prompt:
    """A checked template and its label words, in the order of their indices.

    >>> prompt = Prompt("{sentence} It was", " terrible, great")
    >>> prompt.words
    (' terrible', ' great')
    >>> example = Example({"sentence": "A joy."}, label="great", line=2)
    >>> prompt.render(example), prompt.label_index(example)
    ('A joy. It was', 1)

    Args:
        template: Text with at least one `{field}`.
        labels: Label words separated by commas, or a JSON list of strings; at least two.

    Raises:
        TaskError: Either cannot be parsed, or two words have the same name.
    """

    template: str
    labels: str
    _parsed: Template = field(init=False, repr=False)
    words: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_parsed", Template(self.template))
        object.__setattr__(self, "words", parse_labels(self.labels))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the template's fields."""
        return self._parsed.names

    @property
    def asks_mask(self) -> bool:
        """Whether it is for masked LMs."""
        return self._parsed.asks_mask

    def render(self, example: Example) -> str:
        """The prompt's text for one example; a label word follows it directly."""
        return self._parsed.fill(example.fields, example.where)

    def pose(self, example: Example) -> Rendered:
        """The example as text, its label words as options."""
        right = (self.label_index(example),)
        if self.asks_mask:
            before, after = self._parsed.fill_around(example.fields, example.where)
            return around_mask(before, after, self.words, right, example.where)
        return Rendered(self.render(example), self.words, right, example.where)

    def label_index(self, example: Example) -> int:
        """The position of the example's label among the words.

        A label is the name of a word (its text, with or without the spaces around it) or its index
        from 0. Where a word is itself a number (stars from 1 to 5), only names count: "1" must not
        mean two things.
        """
        names = [word.strip() for word in self.words]
        indices = [] if any(map(_is_number, names)) else [str(index) for index in range(len(names))]
        label = str(example.label).strip()
        for known in (names, indices):
            if label in known:
                return known.index(label)
        expected = f"expected one of {listed(names)}"
        if indices:
            expected += f" or an index from 0 to {indices[-1]}"
        mend = expected + nearest(label, names)
        return refuse(example.where, f"the label is {quote(str(example.label))}", mend)


def parse_labels(labels: str) -> tuple[str, ...]:
    """The label words that a string holds."""
    where = f"labels {quote(labels)}"
    is_list = labels.lstrip().startswith("[")
    words = _json_words(labels, where) if is_list else _comma_words(labels)
    names = [word.strip() for word in words]
    if len(words) < 2:
        refuse(where, f"{len(words)} label word", "expected at least 2, separated by commas")
    if "" in names:
        refuse(where, f"label word {names.index('')} is empty", "expected text between the commas")
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        refuse(where, f"{quote(name)} stands {count} times", "expected words that differ")
    if fault := text_fault("".join(words)):
        refuse(where, f"holds {fault}", "remove it")
    if not is_list and len({word.startswith(" ") for word in words}) > 1:
        shown = json.dumps([f" {name}" for name in names])
        fault = "some words have a leading space and others have none, which is another token"
        refuse(where, fault, f"expected all or none; or a list: {shown}")
    return words


def _comma_words(labels: str) -> tuple[str, ...]:
    return tuple(" " * part.startswith(" ") + part.strip() for part in labels.split(","))


def _json_words(labels: str, where: str) -> tuple[str, ...]:
    try:
        words: Any = json.loads(labels)
    except (ValueError, RecursionError) as error:
        refuse(where, "malformed JSON", f"expected a list such as {JSON_LABELS}", error)
    if not all(isinstance(word, str) for word in words):
        refuse(where, "an item is no string", f"expected a list such as {JSON_LABELS}")
    return tuple(words)


def _is_number(name: str) -> bool:
    return name.removeprefix("-").isdecimal()
