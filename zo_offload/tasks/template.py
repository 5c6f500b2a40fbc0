"""Text with fields in it.

A template is text with `{field}` in it; `{{` and `}}` are braces. Nothing else of str.format is let
in: attributes, indices, conversions and format specifications would let a template read whatever
hangs on an object, so it is parsed once into literals and names, and joined, never formatted.

`{mask}` is no field: where it stands, a masked LM is asked for a label word.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from string import Formatter

from zo_offload.tasks.wording import listed, nearest, printable, quote, refuse, text_fault

MASK = "mask"  # the name of what a masked LM fills in
Pieces = tuple[tuple[str, str | None], ...]  # (literal, the name of the field after it)


@dataclass(frozen=True)
class Template:
    """A checked template.

    >>> Template("{question} It is {{0}}").fill({"question": "Which?"}, "dev.tsv:2")
    'Which? It is {0}'

    Args:
        text: With at least one `{field}`.

    Raises:
        TaskError: It cannot be parsed, or names no field.
    """

    text: str
    pieces: Pieces = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pieces", _parse(self.text))

    @property
    def names(self) -> tuple[str, ...]:
        """Of its fields."""
        return tuple(name for _, name in self.pieces if name is not None)

    @property
    def asks_mask(self) -> bool:
        """Whether it is for masked LMs."""
        return MASK in self.names

    def fill(self, fields: Mapping[str, str], where: str) -> str:
        """The text for one example, which stands at `where`."""
        return _filled(self.pieces, fields, where)

    def fill_around(self, fields: Mapping[str, str], where: str) -> tuple[str, str]:
        """Of a template for masked LMs: what stands before the mask, and what after it.

        >>> Template("{text} It was{mask}.").fill_around({"text": "A joy."}, "dev.tsv:2")
        ('A joy. It was', '.')
        """
        at = self.names.index(MASK)
        literal, _ = self.pieces[at]
        before = _filled((*self.pieces[:at], (literal, None)), fields, where)
        return before, _filled(self.pieces[at + 1 :], fields, where)


def _filled(pieces: Pieces, fields: Mapping[str, str], where: str) -> str:
    return "".join(literal + _value(fields, name, where) for literal, name in pieces)


def _value(fields: Mapping[str, str], name: str | None, where: str) -> str:
    if name is None:
        return ""
    if name not in fields:
        known = f"the example has {listed(fields)}{nearest(name, fields)}"
        refuse(where, f"no field {quote(name)} for the template", known)
    return fields[name]


def _parse(template: str) -> Pieces:
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
    names = [name for _, name, _, _ in parts if name is not None]
    if names.count(MASK) > 1:
        refuse(where, f"{names.count(MASK)} masks", "expected {mask} once: one word is asked for")
    if not set(names) - {MASK}:
        refuse(where, "names no field, so that every prompt is the same", "write {field} in it")
    return tuple((literal, name) for literal, name, _, _ in parts)
