"""Which answers of DROP's own files count, and which of its questions are left out."""

import json
from pathlib import Path
from typing import Any

import pytest

from zo_offload.errors import TaskError
from zo_offload.tasks.source import Source
from zo_offload.tasks.suite import known_task

DATE = {"day": "3", "month": "May", "year": "1640"}


def answer(number: str = "", date: dict[str, str] | None = None, *spans: str) -> dict[str, Any]:
    """As every annotator's in the published files."""
    empty = {"day": "", "month": "", "year": ""}
    return {"number": number, "date": date or empty, "spans": [*spans]}


def references(path: Path, *questions: dict[str, Any]) -> list[tuple[str, ...]]:
    """Of the questions that are left."""
    pairs = [{"question": "Who?", "query_id": "q", **each} for each in questions]
    path.write_text(json.dumps({"nfl_1": {"passage": "Ana won.", "qa_pairs": pairs}}))
    spec = known_task("DROP")
    assert spec is not None
    return [item.answers for item in Source(spec, str(path)).items("train")]


def test_the_training_split_has_one_answer(tmp_path: Path):
    found = references(
        tmp_path / "train.json",
        {"answer": answer("5")},
        {"answer": answer("", DATE)},
        {"answer": answer("", {**DATE, "day": ""})},
        {"answer": answer("", None, "Ana", "Tom")},
        {"answer": answer("7"), "validated_answers": []},
    )
    assert found == [("5",), ("3 May 1640",), ("May 1640",), ("Ana", "Tom"), ("7",)]


def test_the_validation_split_has_those_that_were_validated(tmp_path: Path):
    validated = [answer("4"), answer(), answer("", None, "four"), answer("4")]
    question = {"answer": answer("5"), "validated_answers": validated}
    assert references(tmp_path / "dev.json", question) == [("4", "four")]


UNPARSED = {
    "no kind": [answer()],
    "an empty span": [answer("", None, "")],
    "a number and a date": [answer("3", DATE)],
    "a number and spans": [answer("3", None, "three")],
    "a date and spans": [answer("", DATE, "in May")],
    "two kinds of one annotator": [answer("3"), answer("", DATE, "in May")],
    "no annotator": [],
}


@pytest.mark.parametrize("given", UNPARSED.values(), ids=UNPARSED)
def test_a_question_whose_answer_does_not_parse_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, given: list[dict[str, Any]]
):
    path, whole = tmp_path / "dev.json", {"answer": answer("9"), "validated_answers": [answer("2")]}
    spoilt = {"answer": answer("9"), "validated_answers": given}
    assert references(path, spoilt, whole, spoilt) == [("2",)]
    assert references(path, spoilt, whole, spoilt) == [("2",)]  # read again, for another split
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        "DROP: 2 questions are left out, as published, whose answer is not one number, one date or "
        f"spans alone: the first is {path}: nfl_1.qa_pairs[0]"
    )


def test_of_the_training_split_too(tmp_path: Path):
    found = references(
        tmp_path / "train.json", {"answer": answer()}, {"answer": answer("3", DATE)},
        {"answer": answer("1")},
    )  # fmt: skip
    assert found == [("1",)]


def test_a_question_that_nobody_could_have_validated_is_named(tmp_path: Path):
    path = tmp_path / "dev.json"
    whole = {"answer": answer("9"), "validated_answers": [answer("2")]}
    with pytest.raises(TaskError, match=r": nfl_1\.qa_pairs\[1\]: no key 'validated_answers'; "):
        references(path, whole, {"answer": answer("9")})
