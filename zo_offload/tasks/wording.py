"""How a fault in data is said: where, what, the mend, on one line, with quotes that stay short."""

import difflib
import itertools
from collections.abc import Iterable
from typing import NoReturn

from zo_offload.errors import TaskError

LONGEST_QUOTE = 60
LONGEST_LIST = 12


def refuse(where: str, fault: str, mend: str, cause: Exception | None = None) -> NoReturn:
    """Raises the one kind of error of this package: `where: fault; mend`."""
    raise TaskError(f"{where}: {fault}; {mend}") from cause


def printable(text: str) -> str:
    """`text` as it stands when it prints on one line, else as a Python literal."""
    return text if text.isprintable() else ascii(text)


def quote(text: str) -> str:
    r"""`text` as a Python literal on one line, cut to about 60 characters.

    >>> print(quote("two\nlines"))
    'two\nlines'
    """
    shown = repr(text[: LONGEST_QUOTE + 1])
    return shown if len(shown) <= LONGEST_QUOTE else shown[:LONGEST_QUOTE] + "..."


def listed(names: Iterable[str]) -> str:
    """The names one after another, quoted, the first dozen of them.

    >>> listed(["sentence", "label"])
    "'sentence', 'label'"
    """
    names = iter(names)
    shown = [quote(name) for name in itertools.islice(names, LONGEST_LIST)]
    return ", ".join([*shown, *("..." for _ in itertools.islice(names, 1))])


def nearest(name: str, names: Iterable[str]) -> str:
    """A clause that proposes the valid name closest to `name`, or nothing.

    >>> nearest("sentense", ["sentence", "label"])
    "; did you mean 'sentence'?"
    """
    close = difflib.get_close_matches(name[:LONGEST_QUOTE], names, n=1)
    return f"; did you mean {quote(close[0])}?" if close else ""


def text_fault(text: str) -> str | None:
    r"""What keeps a string out of a tokenizer, or None.

    >>> text_fault("half\ud83d")
    'half of a surrogate pair'
    """
    if "\0" in text:
        return "a NUL character"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "half of a surrogate pair"
    return None
