"""Every task by name: its rendering, files, training and metrics are pinned."""

import json
import re
from dataclasses import astuple, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.suite_rows import DATA, ROWS, Row
from zo_offload.errors import TaskError
from zo_offload.tasks.node import Node
from zo_offload.tasks.rows import read_rows
from zo_offload.tasks.source import Source
from zo_offload.tasks.spec import TaskSpec
from zo_offload.tasks.suite import TASKS, known_task

every_task = pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])


def spec_of(row: Row) -> TaskSpec:
    spec = known_task(row.name)
    assert spec is not None
    return spec


def first(spec: TaskSpec, path: Path):
    return spec.pose(next(item for node in read_rows(path) for item in spec.items(node)))


def test_every_task_has_a_row():
    assert [row.name for row in ROWS] == [task.name for task in TASKS]


@every_task
def test_the_rendering(row: Row):
    found = first(spec_of(row), DATA / row.file)
    assert found.prompt == row.prompt
    assert found.options == row.options
    assert found.right == row.right
    assert found.references == row.references


@every_task
def test_other_formats_say_the_same(row: Row):
    found = first(spec_of(row), DATA / row.file)
    for other in row.same:
        assert replace(first(spec_of(row), DATA / other), where=found.where) == found


@every_task
def test_how_it_is_trained_and_measured(row: Row):
    spec = spec_of(row)
    assert (spec.manner.train_on, spec.manner.metrics) == (row.train_on, row.metrics)
    assert astuple(spec.counts) == (*row.counts, None)  # not by class
    assert spec.manner.generates == bool(row.references)
    assert spec.hub is not None


def test_exported_rows_of_record():
    spec = known_task("record")
    assert spec is not None
    one, other = (first(spec, DATA / "ReCoRD" / name) for name in ("train.jsonl", "exported.jsonl"))
    assert replace(one, where="") == replace(other, where="")


SPANS = {  # noun and its index, pronoun and its index; what they are mended to
    "as they are": (("Tom's Mother", 6), ("he", 4), ("Tom's Mother", "he")),
    "a capital": (("the cup", 0), ("It", 9), ("The cup", "it")),
    "no capital": (("The shelf.", 4), ("it.", 9), ("the shelf", "it")),
    "a line end": (("Tom's\nMother", 6), ("it", 9), ("Tom's Mother", "it")),
    "words between": (("cup and shelf", 1), ("it", 9), ("cup and shelf", "it")),
}


@pytest.mark.parametrize(("noun", "pronoun", "mended"), SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("nested", [True, False])
def test_spans_of_wsc_are_mended_where_they_are_not_in_the_text(noun, pronoun, mended, nested):
    spans = {"span1_text": noun[0], "span1_index": noun[1]}
    spans |= {"span2_text": pronoun[0], "span2_index": pronoun[1]}
    row = {"text": "The cup fell off the shelf Tom's Mother and it broke.", "label": 0}
    row |= {"target": spans} if nested else spans
    spec = known_task("WSC")
    assert spec is not None
    (item,) = spec.items(Node(row, "a.jsonl:1"))
    assert (item.fields["noun"], item.fields["pronoun"]) == mended


def test_a_span_without_an_index_keeps_its_case():
    row = {"text": "The cup fell.", "span1_text": "the cup.", "span2_text": "cup.", "label": 0}
    spec = known_task("WSC")
    assert spec is not None
    (item,) = spec.items(Node(row, "a.jsonl:1"))
    assert (item.fields["noun"], item.fields["pronoun"]) == ("the cup.", "cup")


def test_passages_with_several_questions_are_several_examples():
    def count(name: str, file: str) -> int:
        spec = known_task(name)
        assert spec is not None
        return sum(1 for row in read_rows(DATA / file) for _ in spec.items(row))

    assert count("multirc", "MultiRC/train.jsonl") == 3
    assert count("record", "ReCoRD/val.jsonl") == 2
    assert count("squad", "squad/train-v1.1.json") == 2
    assert count("drop", "drop_dataset/drop_dataset_train.json") == 2


def test_a_demonstration_is_the_prompt_with_its_right_option():
    spec = known_task("copa")
    assert spec is not None
    solved = first(spec, DATA / "COPA/train.jsonl").solved
    assert solved == "My body cast a shadow over the grass because the sun was rising."
    spec = known_task("squad")
    assert spec is not None
    assert first(spec, DATA / "squad/train-v1.1.json").solved.endswith("\nAnswer: 1802")


GOOD = {row.name: next(read_rows(DATA / row.file)).value for row in ROWS}


def _deep(name: str, *path, value=None) -> dict:
    """A task's own row with one value in it replaced; ... drops the key."""
    row = json.loads(json.dumps(GOOD[name]))
    place = row
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return row


FAULTS = {
    "a label unknown": (
        "RTE", _deep("RTE", "label", value="entailmnt"),
        r":1: label: the label is 'entailmnt'; expected one of 'entailment', 'not_entailment' or "
        r"an index from 0 to 1; did you mean 'entailment'\?",
    ),
    "a label hidden": (
        "RTE", _deep("RTE", "label", value=-1), r":1: label: the label is hidden \(-1\); .*use val",
    ),
    "a label null": ("CB", _deep("CB", "label"), r":1: label: the label is JSON null; "),
    "a bool as a class": (
        "CB", _deep("CB", "label", value=True), r":1: label: the label is JSON true or false; ",
    ),
    "no field": (
        "CB", _deep("CB", "hypothesis", value=...),
        r":1: no key 'hypothesis'; expected it among 'premise', 'label', 'idx'",
    ),
    "a misspelt field": (
        "CB", _deep("CB", "hypothesis", value=...) | {"hypothesis_": "x"},
        r":1: no key 'hypothesis'; .*did you mean 'hypothesis_'\?",
    ),
    "a field empty": ("WSC", _deep("WSC", "text", value=" "), r":1: text: an empty text; "),
    "a field null": (
        "BoolQ", _deep("BoolQ", "passage"), r":1: passage: JSON null; expected a string",
    ),
    "a field too long": (
        "BoolQ", _deep("BoolQ", "passage", value="x" * 1_000_001),
        r":1: passage: 1,000,001 characters; expected at most 1,000,000",
    ),
    "an index outside": (
        "WSC",
        _deep("WSC", "target", value={"span1_text": "A.", "span1_index": 99, "span2_text": "it"}),
        r":1: target\.span1_index: found 99; expected 0 to 9",
    ),
    "half a surrogate": (
        "WIC", _deep("WIC", "word", value="a\ud83d"), r":1: word: holds half of a surrogate pair",
    ),
    "a nested field": (
        "MultiRC", _deep("MultiRC", "passage", "questions", 0, "answers", 1, "text", value=7),
        r":1: passage\.questions\[0\]\.answers\[1\]\.text: JSON number; expected a string",
    ),
    "no questions": (
        "MultiRC", _deep("MultiRC", "passage", "questions", value=[]),
        r":1: passage\.questions: 0 items; expected 1 to 100,000",
    ),
    "a passage that is text": (
        "MultiRC", _deep("MultiRC", "passage", value="x"),
        r":1: passage: JSON string; expected an object with 'text'",
    ),
    "a span outside": (
        "ReCoRD", _deep("ReCoRD", "passage", "entities", 1, "end", value=9_999),
        r":1: passage\.entities\[1\]\.end: found 9999; expected 6 to \d+",
    ),
    "no placeholder": (
        "ReCoRD", _deep("ReCoRD", "qas", 0, "query", value="Who?"),
        r":1: qas\[0\]\.query: no @placeholder; expected it where the entity is missing",
    ),
    "an answer that is no entity": (
        "ReCoRD",
        _deep("ReCoRD", "qas", 0, "answers", value=[{"text": "Lima"}]),
        r":1: qas\[0\]: no answer among the 5 entities; expected one of them",
    ),
    "no answer": (
        "SQuAD", _deep("SQuAD", "data", 0, "paragraphs", 0, "qas", 0, "answers", value=[]),
        r": data\[0\]\.paragraphs\[0\]\.qas\[0\]\.answers: 0 items; expected 1 to",
    ),
    "no question with an answer": (
        "DROP",
        {"h": {"passage": "x", "qa_pairs": [{"question": "y", "answer": {"number": ""}}]}},
        r": no example; expected some of DROP",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "row", "message"), FAULTS.values(), ids=FAULTS)
def test_malformed_examples_are_named(tmp_path: Path, name: str, row: dict, message: str):
    path = tmp_path / ("data.json" if name in ("SQuAD", "DROP") else "data.jsonl")
    path.write_text(json.dumps(row) + "\n")
    spec = known_task(name)
    assert spec is not None
    with pytest.raises(TaskError, match="^" + re.escape(str(path)) + message):
        [spec.pose(item) for item in Source(spec, str(path)).items("train")]


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
ANYTHING = st.recursive(LEAVES, lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=4)


def paths(value, path=()):
    yield path
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(each, (*path, key))


@given(data=st.data(), row=st.sampled_from(ROWS), anything=ANYTHING)
def test_anything_in_any_place_is_an_example_or_named(data, row: Row, anything):
    path = data.draw(st.sampled_from(list(paths(GOOD[row.name]))))
    spoilt = _deep(row.name, *path, value=anything) if path else anything
    spec = spec_of(row)
    try:
        posed = [spec.pose(item) for item in spec.items(Node(spoilt, "data.jsonl:1"))]
    except TaskError as error:
        told = str(error)
    else:
        assert all(one.options[right] for one in posed for right in one.right)
        told = "data.jsonl:1: right; as it is"
    assert re.fullmatch(r"data\.jsonl:1: .+; .+", told)
    assert told.isprintable()


def test_an_example_has_a_bounded_number_of_options():
    spec = known_task("record")
    assert spec is not None
    entities = [f"e{number}" for number in range(1001)]
    row = {"passage": "x", "query": "@placeholder", "entities": entities, "answers": ["e1"]}
    with pytest.raises(TaskError, match=r"^a\.jsonl:1: 1,001 options; expected at most 1,000"):
        [spec.pose(item) for item in spec.items(Node(row, "a.jsonl:1"))]


def test_a_torn_document_is_named_by_line(tmp_path: Path):
    path = tmp_path / "data.json"
    path.write_text('{\n "data": [\n')
    with pytest.raises(TaskError, match=r"data\.json:2: malformed JSON at column 11"):
        next(read_rows(path))
    path.write_text('{"data": [')
    with pytest.raises(TaskError, match=r"data\.json: malformed JSON at column 11"):
        next(read_rows(path))
