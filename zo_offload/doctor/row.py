"""One thing that was looked at."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """What was found, for a reader and for a program.

    Attributes:
        section: Groups rows.
        name: Of this one within its section.
        value: For JSON.
        shown: For a table; the value itself where it is empty.
        mend: What to do about it; empty where nothing is wrong.
        prevents: Whether no run can begin so.
    """

    section: str
    name: str
    value: Any
    shown: str = ""
    mend: str = ""
    prevents: bool = False

    @property
    def text(self) -> str:
        """For a table."""
        return self.shown or str(self.value)
