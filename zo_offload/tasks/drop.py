"""DROP: from its own files, or exported rows, to examples.

Which answers of its own files count, and which questions are left out, is as the `drop` of the
library `datasets` has it, through which MeZO reads them: of the training split the answer, of the
validation split those that validated it; and no question with an answer that is of two kinds at
once (a number, a date, spans), or with none at all. Nine of the training split are said to be such,
and one of the other, so that the examples that a seed draws are theirs.

Reference:
    Dua et al. 2019, arXiv 1903.00161.
"""

import logging
from collections.abc import Iterator
from functools import cache

from zo_offload.tasks.formats import asked_item
from zo_offload.tasks.node import Node
from zo_offload.tasks.spec import Item

logger = logging.getLogger(__name__)
VALIDATED = "validated_answers"  # in the validation split's file alone


def drop(row: Node) -> Iterator[Item]:
    """DROP's JSON, an object with a passage and its questions under each key, or flat rows."""
    if "answers_spans" in row:
        answers = tuple(each.text() for each in row["answers_spans"]["spans"].items(least=1))
        yield asked_item(row.where, None, row["passage"], row["question"], answers)
        return
    questions = [
        (passage["passage"], asked)
        for _, passage in row.pairs()
        for asked in passage["qa_pairs"].items()
    ]
    is_validated = any(VALIDATED in asked and asked[VALIDATED].items() for _, asked in questions)
    left_out: list[str] = []
    for passage, asked in questions:
        given = asked[VALIDATED].items() if is_validated else [asked["answer"]]
        answers = _answers(given)
        if answers:
            yield asked_item(asked.where, None, passage, asked["question"], answers)
        else:
            left_out.append(asked.where)
    if left_out:
        _say(len(left_out), left_out[0])


def _answers(given: list[Node]) -> tuple[str, ...]:
    """Of all annotators; none where one of theirs is of two kinds."""
    texts: list[str] = []
    for answer in given:
        kinds = [kind for kind in (_number(answer), _date(answer), _spans(answer)) if kind]
        if len(kinds) > 1:
            return ()
        texts += kinds[0] if kinds else []
    return tuple(dict.fromkeys(texts))


def _number(answer: Node) -> list[str]:
    return _filled([answer["number"]] if "number" in answer else [])


def _date(answer: Node) -> list[str]:
    """One text of its words."""
    if "date" not in answer:
        return []
    date = answer["date"]
    parts = _filled([date[name] for name in ("day", "month", "year") if name in date])
    return [" ".join(part.strip() for part in parts)] if parts else []


def _spans(answer: Node) -> list[str]:
    return _filled(answer["spans"].items() if "spans" in answer else [])


def _filled(nodes: list[Node]) -> list[str]:
    return [text for node in nodes if (text := node.text(empty=True)).strip()]


@cache  # splits are parts of one file, which is read for each
def _say(count: int, first: str) -> None:
    logger.warning(
        "DROP: %s left out, as published, whose answer is not one number, one date or spans alone: "
        "the first is %s",
        f"{count:,} questions are" if count > 1 else "a question is",
        first,
    )
