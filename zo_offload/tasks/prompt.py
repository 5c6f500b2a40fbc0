"""Turns the fields of an example into a prompt, and its label into one of the label words.

A template is text with `{field}` in it; `{{` and `}}` are braces. Nothing else of str.format is let
in: attributes, indices, conversions and format specifications would let a template read whatever
hangs on an object, so it is parsed once into literals and names, and joined, never formatted.

Label words come as one string. `" terrible, great"` is split at its commas, and a word **keeps one
leading space where its part is written with a space in front**: the words are `" terrible"` and
`" great"`, which most tokenizers see as one token each after `It was`. Words with commas or other
spaces are written as a JSON list: `[" yes, it is", " no"]`, taken as it stands.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from string import Formatter
from typing import Any

from zo_offload.tasks.reader import Example
from zo_offload.tasks.wording import listed, nearest, printable, quote, refuse, text_fault

JSON_LABELS = '[" no", " yes"]'
Pieces = tuple[tuple[str, str | None], ...]  # (literal, the name of the field after it)


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
    pieces: Pieces = field(init=False, repr=False)
    words: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pieces", _parse_template(self.template))
        object.__setattr__(self, "words", _parse_labels(self.labels))

    def render(self, example: Example) -> str:
        """The prompt's text for one example; a label word follows it directly."""
        return "".join(literal + self._value(example, name) for literal, name in self.pieces)

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

    def _value(self, example: Example, name: str | None) -> str:
        if name is None:
            return ""
        if name not in example.fields:
            known = f"the example has {listed(example.fields)}{nearest(name, example.fields)}"
            refuse(example.where, f"no field {quote(name)} for the template", known)
        return example.fields[name]


def _parse_template(template: str) -> Pieces:
    where = f"template {quote(template)}"
    if fault := text_fault(template):
        refuse(where, f"holds {fault}", "remove it")
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        mend = "expected {field}; write {{ and }} for braces that belong to the text"
        refuse(where, printable(str(error)), mend, error)
    for _, name, spec, conversion in parts:
        if name is not None and (not name or spec or conversion or set(name) & set(".[]{}")):
            refuse(where, f"more or less than a name at {quote('{' + name)}", "expected {field}")
    if all(name is None for _, name, _, _ in parts):
        refuse(where, "names no field, so that every prompt is the same", "write {field} in it")
    return tuple((literal, name) for literal, name, _, _ in parts)


def _parse_labels(labels: str) -> tuple[str, ...]:
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
