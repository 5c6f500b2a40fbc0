r"""A task of one's own, written down in a small TOML or JSON file.

    template = "{passage}\nQuestion: {question}\nAnswer:"   # names fields of the data
    labels = [" no", " yes"]                  # classification by label words, or
    choices = "candidates"                    # a field with a list of options, or some fields, or
    answer = "answer"                         # a field with the answer(s), to be generated
    [splits]                                  # TSV or JSONL files, beside this one
    train = "train.jsonl"

A template with `{mask}` in it is for masked LMs, which fill a label word in there.

Nothing in it is run. Every key is checked, and an unknown one refused with the nearest.
"""

import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from zo_offload.tasks.lines import parse_json, read_lines
from zo_offload.tasks.node import Node
from zo_offload.tasks.scores import OF_OPTIONS, OF_TEXTS
from zo_offload.tasks.source import SPLITS
from zo_offload.tasks.spec import Counts, Item, Manner, TaskSpec
from zo_offload.tasks.template import MASK, Template
from zo_offload.tasks.wording import listed, nearest, printable, quote, refuse

KINDS = ("labels", "choices", "answer")
KEYS = (
    "name", "template", "fields", *KINDS, "label", "option", "metric", "train_on", "stop",
    "max_new_tokens", "separator", "splits", "examples",
)  # fmt: skip
MOST_NEW_TOKENS = 4096
MOST_EXAMPLES = 10**9


def read_task(path: Path) -> TaskSpec:
    """The task that a file declares.

    Raises:
        TaskError: The file cannot be read, or a key in it is unknown, missing or of another type.
    """
    root = _parse(path)
    _check_keys(root, KEYS)
    kind = _kind(root)
    template = Template(root["template"].text())
    if template.asks_mask and kind != "labels":
        root[kind].refuse(
            "beside {mask} in the template", "expected labels: words to fill in there"
        )
    words = _words(root["labels"]) if kind == "labels" else ()
    option = _option(root, kind)
    used = [name for name in template.names if name != MASK]
    names = _fields(root, [*used, *(set(option.names) - {"choice"})])
    return TaskSpec(
        name=root["name"].text() if "name" in root else path.stem,
        template=template,
        items=_items(root, kind, names, words),
        words=words,
        option=option,
        manner=Manner(
            train_on=_train_on(root),
            generates=kind == "answer",
            metrics=_metrics(root, kind),
            stop=_stop(root),
            max_new_tokens=_max_new_tokens(root),
        ),
        files=_files(root["splits"]),
        folder=path.parent,
        counts=_counts(root),
        separator=root["separator"].text(empty=True) if "separator" in root else "\n\n",
    )


def _parse(path: Path) -> Node:
    shown = printable(str(path))
    text = "\n".join(read_lines(path, shown))
    if path.suffix.lower() == ".json":
        value = parse_json(shown, text, "expected one JSON object", "expected one JSON object")
    else:
        try:
            value = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # of 5,000 digits, too
            refuse(shown, f"malformed TOML: {error}", "expected key = value lines", error)
    return Node(value, shown)


def _check_keys(node: Node, known: Sequence[str]) -> None:
    for key, value in node.pairs():
        if key not in known:
            value.refuse("unknown key", f"expected some of {listed(known)}{nearest(key, known)}")


def _kind(root: Node) -> str:
    given = [kind for kind in KINDS if kind in root]
    if len(given) != 1:
        found = f"{listed(given)} together" if given else "none of them"
        root.refuse(found, f"expected one of {listed(KINDS)}")
    if given[0] == "answer" and "label" in root:
        root["label"].refuse("beside answer", "remove it: the answer is what is right")
    return given[0]


def _words(labels: Node) -> tuple[str, ...]:
    words = tuple(each.text() for each in labels.items(least=2))
    names = [word.strip() for word in words]
    if len(set(names)) < len(names):
        labels.refuse("two label words are the same", "expected words that differ")
    return words


def _option(root: Node, kind: str) -> Template:
    """How an option follows the prompt: after a space, and a generated answer ends with a line."""
    if "option" not in root:
        return Template(" {choice}\n" if kind == "answer" else " {choice}")
    option = Template(root["option"].text())
    if "choice" not in option.names:
        root["option"].refuse("does not hold {choice}", "expected it where the option's text goes")
    return option


def _fields(root: Node, used: Sequence[str]) -> list[str]:
    """What templates name, all of it among `fields` where those are declared."""
    if "fields" in root:
        fields = [each.text() for each in root["fields"].items(least=1)]
        for name in used:
            if name not in fields:
                fault = f"the template names {quote(name)}, which is not in fields"
                root["template"].refuse(fault, f"expected {listed(fields)}{nearest(name, fields)}")
    return list(dict.fromkeys(used))


def _items(
    root: Node, kind: str, names: Sequence[str], words: Sequence[str]
) -> Callable[[Node], Iterator[Item]]:
    """From a row to its example, of which only what templates name is read."""
    label = root["label"].text() if "label" in root else "label"
    known = [word.strip() for word in words]
    answer = root["answer"].text() if kind == "answer" else ""
    choices = _choices(root["choices"]) if kind == "choices" else None

    def items(row: Node) -> Iterator[Item]:
        texts = {name: row[name].text() for name in names}
        if choices is not None:
            found = choices(row)
            yield Item(texts, row.where, (_choice(row[label], found),), found)
        elif answer:
            yield Item(texts, row.where, answers=_many(row[answer]))
        else:
            yield Item(texts, row.where, (row[label].index_of(known),))

    return items


def _choices(given: Node) -> Callable[[Node], tuple[str, ...]]:
    """Of a field with a list in it, or of some fields."""
    if not isinstance(given.value, list):
        name = given.text()
        return lambda row: tuple(each.text() for each in row[name].items(least=2))
    fields = [each.text() for each in given.items(least=2)]
    return lambda row: tuple(row[name].text() for name in fields)


def _choice(label: Node, choices: Sequence[str]) -> int:
    """A number is an index, a text a choice, or an index in a TSV."""
    if type(label.value) is int:
        return label.integer(0, len(choices) - 1)
    return label.index_of(choices)


def _many(node: Node) -> tuple[str, ...]:
    """One text, or some, any of which is right."""
    if isinstance(node.value, list):
        return tuple(each.text() for each in node.items(least=1))
    return (node.text(),)


def _metrics(root: Node, kind: str) -> tuple[str, ...]:
    known = OF_TEXTS if kind == "answer" else OF_OPTIONS
    if "metric" not in root:
        return ("exact_match", "f1") if kind == "answer" else ("accuracy",)
    given = root["metric"]
    for each in given.items(least=1) if isinstance(given.value, list) else [given]:
        if (name := each.text()) not in known:
            each.refuse(f"found {quote(name)}", f"expected {listed(known)}{nearest(name, known)}")
    return _many(given)


def _train_on(root: Node) -> Any:
    default = "answer" if "answer" in root else "options"
    known = ("answer",) if "answer" in root else ("options", "answer")
    if "train_on" not in root:
        return default
    if (value := root["train_on"].text()) not in known:
        mend = f"expected one of {listed(known)}{nearest(value, known)}"
        root["train_on"].refuse(f"found {quote(value)}", mend)
    return value


def _files(splits: Node) -> dict[str, tuple[str, ...]]:
    _check_keys(splits, SPLITS)
    return {"train": (splits["train"].text(),)} | {
        split: (splits[split].text(),) for split in SPLITS if split in splits
    }


def _counts(root: Node) -> Counts:
    if "examples" not in root:
        return Counts()
    _check_keys(root["examples"], (*SPLITS, "per_class"))
    return Counts(
        **{key: value.integer(1, MOST_EXAMPLES) for key, value in root["examples"].pairs()}
    )


def _stop(root: Node) -> str:
    if "stop" not in root:
        return "\n"
    if not (stop := root["stop"].text(empty=True)):
        root["stop"].refuse("an empty text", "expected what ends an answer")
    return stop


def _max_new_tokens(root: Node) -> int:
    return root["max_new_tokens"].integer(1, MOST_NEW_TOKENS) if "max_new_tokens" in root else 50
