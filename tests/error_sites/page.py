"""Writes docs/errors.md from the code: every error, where it comes from, what to do.

    python tests/error_sites/page.py

The house rule makes it possible: a message says what is wrong, and after its first semicolon the
mend; or it says what was expected.
"""

import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

if __name__ == "__main__":  # else pytest finds them
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from error_sites.collect import BY_CLICK, Site, error_classes, sites
from error_sites.source import Source

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "errors.md"
COMMAND = "python tests/error_sites/page.py"
EXPECTED = re.compile(r"\bexpected (?P<what>.*?)(?:[,:] (?:found|got)\b.*)?$")
INTRODUCTION = f"""\
# Errors

Every message that a mistake, a full disk or a lost rank can bring, with its mend. Search for
words of yours that are no names or numbers of your own. `{{path}}` stands for such a value; `[...]`
is not in every message; of `(a | b)` there is one. On the command line a message is one line after
`Error:`, and the exit status is 1 (2 where `zo-offload` was called wrongly, and says itself how it
is called; 130 after Ctrl-C). In Python they are classes of `zo_offload.errors`, below `ZOError`.

Made from the code by `{COMMAND}`.
"""
ELSEWHERE = {
    "ValueError": "What another message quotes, which names the key, or file and line, before it.",
    BY_CLICK: "On the command line only.",
}
WITHOUT = {  # a mend of their own
    "interrupted": "it was asked for",
    "zeroth_order.eps: no learning rate can help: {text}": "the text has one",
    "zeroth_order.trainable.{key}: {error}": "what it quotes has one",
    "{path}: {message}, found {input}": "its message says what was expected",
}


def page(source: Source) -> str:
    """The page's text."""
    classes = error_classes(source)
    order = [*classes, *ELSEWHERE]
    said = [site for site in sites(source) if has_words(site.template)]
    parts = [INTRODUCTION]
    for kind, of_kind in _grouped(said, lambda site: site.kind, order):
        title = "Quoted in other messages" if kind == "ValueError" else kind
        about = classes.get(kind) or ELSEWHERE[kind]
        parts.append(f"## {title}\n\n{about}\n")
        for path, of_path in _grouped(of_kind, lambda site: site.path, list(source.modules)):
            parts.append(f"### {path}: {_lower(source.modules[path].idea)}\n")
            messages = dict.fromkeys(text for site in of_path for text in choices(site.template))
            parts.append("\n".join(map(_entry, messages)) + "\n")
    return "\n".join(parts)


def choices(template: str) -> list[str]:
    """The messages that a template stands for: several where it ends in a choice of sentences.

    Example:
        >>> choices("{key}: (of another model; use that | (a | b) is too long)")
        ['{key}: of another model; use that', '{key}: (a | b) is too long']
    """
    start = next((at for at, c in enumerate(template) if c == "(" and _closes(template, at)), None)
    if start is None:
        return [template]
    bars = [at for at in range(start + 1, len(template) - 1) if _is_bar(template, start, at)]
    edges = [start, *bars, len(template) - 1]
    said = [template[a + 1 : b].strip() for a, b in itertools.pairwise(edges)]
    if not bars or min(len(text.split()) for text in said) < 3:
        return [template]
    return [template[:start] + text for text in said]


def has_words(template: str) -> bool:
    """Whether it is more than what another function said."""
    return re.search(r"\w", re.sub(r"\{[^{}]*\}", "", template)) is not None


def split(template: str) -> tuple[str, str]:
    """What is wrong, and the mend; empty where it has none.

    Example:
        >>> split("--steps: expected 1 to 9, found {steps}")
        ('--steps: expected 1 to 9, found {steps}', 'give 1 to 9')
        >>> split("{path}: damaged; restore it, or choose another")
        ('{path}: damaged', 'restore it, or choose another')
    """
    for at in (match.start() for match in re.finditer("; ", template)):
        wrong, mend = template[:at], template[at + 2 :]
        if wrong.endswith("[") and mend.endswith("]"):  # not in every message
            return wrong[:-1], mend[:-1]
        if _depth(wrong) == 0:
            return wrong, mend
    expected = EXPECTED.search(template)
    if expected and re.search(r"\w", expected["what"]):
        return template, "give " + expected["what"]
    return template, ""


def _entry(template: str) -> str:
    wrong, mend = split(template)
    return f"- {_code(wrong)}" + (f"  \n  {_prose(mend)}" if mend else "")


def _code(text: str) -> str:
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _prose(text: str) -> str:
    """Markdown that shows the text as it is."""
    shown = re.sub(r"[\\*\[\]<>|]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)
    return f"{shown[:1].upper()}{shown[1:]}" + ("" if shown.endswith(("?", ".")) else ".")


def _lower(text: str) -> str:
    return (text[:1].lower() + text[1:]).removesuffix(".").replace("``", "`")


def _depth(text: str) -> int:
    """Brackets that are open at its end."""
    return sum(text.count(each) for each in "({[") - sum(text.count(each) for each in ")}]")


def _closes(text: str, start: int) -> bool:
    """Whether the bracket that opens at ``start`` closes at the end, and not before."""
    ends = (at + 1 for at in range(start, len(text)) if not _depth(text[start : at + 1]))
    return next(ends, 0) == len(text)


def _is_bar(text: str, start: int, at: int) -> bool:
    return text[at] == "|" and _depth(text[start:at]) == 1


def _grouped(
    found: Iterable[Site], key: Callable[[Site], str], order: Sequence[str]
) -> Iterator[tuple[str, list[Site]]]:
    ranked = sorted(found, key=lambda site: order.index(key(site)))
    return ((name, list(group)) for name, group in itertools.groupby(ranked, key))


if __name__ == "__main__":
    PAGE.write_text(page(Source()), encoding="utf-8")
