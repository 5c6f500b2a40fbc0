"""JSON that is not trusted: every step into it is checked, and a fault says where it stands.

`row["passage"]["questions"][2].text()` is a string, or an error such as
`train.jsonl:7: passage.questions[2]: JSON null; expected a string`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from zo_offload.tasks.lines import json_type
from zo_offload.tasks.wording import listed, nearest, printable, quote, refuse, text_fault

MOST_CHARACTERS = 1_000_000  # of a text
MOST_ITEMS = 100_000  # of an array
LONGEST_KEY = 60  # that is shown of one
BOOLEANS = ("false", "true")


@dataclass(frozen=True)
class Node:
    """A value in a data file.

    Attributes:
        value: What JSON (or a TSV's column) holds there.
        place: Of the row: `file:line`, or the file.
        path: From the row to here.
    """

    value: Any
    place: str
    path: str = ""

    @property
    def where(self) -> str:
        """For a message."""
        return f"{self.place}: {self.path}" if self.path else self.place

    def refuse(self, fault: str, mend: str) -> NoReturn:
        """Raises TaskError about this value."""
        refuse(self.where, fault, mend)

    def __contains__(self, key: str) -> bool:
        return isinstance(self.value, dict) and key in self.value

    def __getitem__(self, key: str) -> "Node":
        """The value of a key that must be there."""
        if not isinstance(self.value, dict):
            self.refuse(f"JSON {json_type(self.value)}", f"expected an object with {quote(key)}")
        if key not in self.value:
            mend = f"expected it among {listed(self.value)}{nearest(key, self.value)}"
            self.refuse(f"no key {quote(key)}", mend)
        shown = printable(key[:LONGEST_KEY])
        return Node(self.value[key], self.place, f"{self.path}.{shown}" if self.path else shown)

    def first_of(self, *keys: str) -> "Node":
        """The value of the first of the keys that is there; formats differ in names."""
        return self[next((key for key in keys if key in self), keys[0])]

    def items(self, least: int = 0) -> list["Node"]:
        """The values of an array."""
        if not isinstance(self.value, list):
            self.refuse(f"JSON {json_type(self.value)}", "expected an array")
        if not least <= len(self.value) <= MOST_ITEMS:
            self.refuse(f"{len(self.value):,} items", f"expected {least} to {MOST_ITEMS:,}")
        return [Node(v, self.place, f"{self.path}[{i}]") for i, v in enumerate(self.value)]

    def pairs(self) -> Iterator[tuple[str, "Node"]]:
        """Keys and values of an object."""
        if not isinstance(self.value, dict):
            self.refuse(f"JSON {json_type(self.value)}", "expected an object")
        return ((key, self[key]) for key in self.value)

    def text(self, empty: bool = False) -> str:
        """A string, not blank unless it may be."""
        if not isinstance(self.value, str):
            self.refuse(f"JSON {json_type(self.value)}", "expected a string")
        if len(self.value) > MOST_CHARACTERS:
            found = f"{len(self.value):,} characters"
            self.refuse(found, f"expected at most {MOST_CHARACTERS:,}")
        if fault := text_fault(self.value):
            self.refuse(f"holds {fault}", "expected plain text: remove it")
        if not empty and not self.value.strip():
            self.refuse("an empty text", "expected some: write it, or remove the example")
        return self.value

    def integer(self, least: int, most: int) -> int:
        """A whole number within bounds."""
        if type(self.value) is not int:
            self.refuse(f"JSON {json_type(self.value)}", "expected a whole number")
        if not least <= self.value <= most:
            self.refuse(f"found {self.value}", f"expected {least} to {most}")
        return self.value

    def index_of(self, names: Sequence[str]) -> int:
        """A label's index: it is one of the names, its index, or, where so named, a bool.

        Where a name is itself a number (stars from 1 to 5), only names count: 1 must not mean two
        things.
        """
        found = self.value
        if tuple(names) == BOOLEANS and type(found) is bool:
            return int(found)
        shown = str(found).strip()
        if type(found) in (int, str) and shown in names:
            return list(names).index(shown)
        by_index = not any(name.removeprefix("-").isdecimal() for name in names)
        if type(found) in (int, str) and by_index and shown in map(str, range(len(names))):
            return int(shown)
        if shown == "-1":
            self.refuse("the label is hidden (-1)", "a test split has none: use validation")
        expected = f"expected one of {listed(names)}"
        expected += f" or an index from 0 to {len(names) - 1}" * by_index
        is_label = isinstance(found, int | str) and type(found) is not bool
        found = quote(shown) if is_label else f"JSON {json_type(found)}"
        return self.refuse(f"the label is {found}", f"{expected}{nearest(shown, names)}")
