"""Every task for masked LMs: its rendering, files, which examples are drawn, what is refused."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.masked_rows import DATA, MASKED_ROWS, MaskedRow
from zo_offload.errors import TaskError
from zo_offload.tasks import MASKED_TASKS, Counts, Source, chosen_task, draw, known_task, read_task
from zo_offload.tasks.node import Node
from zo_offload.tasks.rows import read_rows
from zo_offload.tasks.spec import Item, TaskSpec

every_task = pytest.mark.parametrize("row", MASKED_ROWS, ids=[row.name for row in MASKED_ROWS])


def spec_of(name: str) -> TaskSpec:
    spec = known_task(name, "masked")
    assert spec is not None
    return spec


def first(name: str, file: str):
    spec = spec_of(name)
    rows = read_rows(DATA / file, spec.columns)
    return spec.pose(next(item for node in rows for item in spec.items(node)))


def test_every_task_has_a_row():
    assert [row.name for row in MASKED_ROWS] == [task.name for task in MASKED_TASKS]


@every_task
def test_the_rendering(row: MaskedRow):
    found = first(row.name, row.file)
    assert (found.prompt, found.rest) == (row.prompt, row.rest)
    assert (found.options, found.right) == (row.words, (row.right,))


@every_task
def test_other_formats_say_the_same(row: MaskedRow):
    found = first(row.name, row.file)
    for other in row.same:
        assert replace(first(row.name, other), where=found.where) == found


@every_task
def test_how_it_is_drawn_and_measured(row: MaskedRow):
    spec = spec_of(row.name)
    assert (spec.manner.train_on, spec.manner.metrics) == ("options", ("accuracy",))
    assert (spec.counts.per_class, spec.counts.test, spec.test_seed) == (16, 1000, 42)
    assert spec.hub is not None
    assert spec.kind == "masked"
    test = Source(spec, str(DATA)).items("test")
    assert test[0].where.startswith(str(DATA / Path(row.file).parent))
    train = draw(Source(spec, str(DATA)), "train", Counts(per_class=1), 0)
    assert sorted(item.right[0] for item in train) == list(range(len(spec.words)))


def numbered(folder: Path, labels: list[int], name: str) -> None:
    rows = "".join(f"{label},text {at}\n" for at, label in enumerate(labels))
    (folder / name).write_text(rows)


def numbers(items: list[Item]) -> list[int]:
    return [int(item.fields["sentence"].split()[1]) for item in items]


@pytest.mark.parametrize("seed", [13, 100])
def test_examples_are_those_that_are_published(tmp_path: Path, seed: int):
    """The lines shuffled in place, as LM-BFF's script does it; of each label the first K."""
    labels = [at * 7 % 5 for at in range(60)]
    numbered(tmp_path, labels, "train.csv")
    numbered(tmp_path, [at % 5 for at in range(30)], "test.csv")
    lines, tested = list(enumerate(labels)), list(range(30))
    np.random.RandomState(seed).shuffle(lines)
    np.random.RandomState(42).shuffle(tested)
    of_class = {label: [at for at, each in lines if each == label] for label in set(labels)}
    source, counts = Source(spec_of("sst5"), str(tmp_path)), Counts(test=9, per_class=4)
    train, dev, test = (numbers(draw(source, each, counts, seed)) for each in (
        "train", "dev", "test"))  # fmt: skip
    assert sorted(train) == sorted(at for each in of_class.values() for at in each[:4])
    assert sorted(dev) == sorted(at for each in of_class.values() for at in each[4:8])
    assert test == tested[:9]  # whatever the seed


def test_a_small_class_gives_what_it_has(tmp_path: Path):
    numbered(tmp_path, [0] * 9 + [1] * 3, "train.csv")
    source = Source(spec_of("sst5"), str(tmp_path))
    drawn = [draw(source, split, Counts(per_class=4), 0) for split in ("train", "dev")]
    assert [Counter(item.right[0] for item in each) for each in drawn] == [{0: 4, 1: 3}, {0: 4}]
    with pytest.raises(TaskError, match=r"^SST-5: 12 training examples, none left to hold out"):
        draw(source, "train", Counts(per_class=9), 0)


def test_only_classes_can_be_drawn_from():
    spec = known_task("copa")
    assert spec is not None
    with pytest.raises(TaskError, match=r"COPA: its examples have no classes .*drop --per-class"):
        draw(Source(spec, str(DATA.parent)), "train", Counts(per_class=4), 0)


def test_examples_without_a_consensus_are_none():
    spec = spec_of("snli")
    for file in ("SNLI/validation.jsonl", "snli_1.0/snli_1.0_dev.jsonl"):
        assert len([item for row in read_rows(DATA / file) for item in spec.items(row)]) == 1


FAULTS = {
    "a label unknown": ("SNLI", {"premise": "a", "hypothesis": "b", "label": "entailmnt"},
                        r":1: label: the label is 'entailmnt'; .*did you mean 'entailment'\?"),
    "no premise": ("MNLI", {"hypothesis": "b", "label": 0}, r":1: no key 'premise'; expected it"),
    "an empty text": ("RTE", {"premise": " ", "hypothesis": "b", "label": 0},
                      r":1: premise: an empty text; "),
    "a star too many": ("SST-5", {"text": "a", "label": 5}, r":1: label: the label is '5'; .*to 4"),
    "a null": ("SST-2", {"sentence": None, "label": 1}, r":1: sentence: JSON null; expected a str"),
    "a kind of question unknown": ("TREC", {"text": "a", "coarse_label": "DSC"},
                                   r":1: coarse_label: the label is 'DSC'; .*mean 'DESC'"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "row", "message"), FAULTS.values(), ids=FAULTS)
def test_malformed_examples_are_named(tmp_path: Path, name: str, row: dict, message: str):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(TaskError, match="^" + re.escape(str(path)) + message):
        Source(spec_of(name), str(path)).items("test")


CSV_FAULTS = {
    "columns": ("0,a\n1,b,c\n", r":2: 3 columns; expected 2: 'label', 'text', separated by commas"),
    "a blank line": ("0,a\n\n1,b\n", ":2: a blank line; expected 2"),
    "a quote left open": ('0,a\n1,"b\n', ":2: malformed CSV: unexpected end of data; expected com"),
    "text after a quote": ('0,"a"b\n', ":1: malformed CSV: ',' expected after '\"'; "),
    "a label": ("0,a\n1,\"b\nc\"\n9,d\n", ":4: label: the label is '9'; "),
    "no text": ("0,\n", ":1: text: an empty text"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "message"), CSV_FAULTS.values(), ids=CSV_FAULTS)
def test_csv_faults(tmp_path: Path, data: str, message: str):
    path = tmp_path / "test.csv"
    path.write_text(data)
    with pytest.raises(TaskError, match="^" + re.escape(str(path)) + message):
        Source(spec_of("sst5"), str(tmp_path)).items("test")


def test_a_csv_of_ones_own_has_a_header(tmp_path: Path):
    task = {"template": "{text} It was {mask}.", "labels": [" bad", " good"]}
    task |= {"splits": {"train": "t.csv"}, "examples": {"per_class": 3}}
    (tmp_path / "own.json").write_text(json.dumps(task))
    (tmp_path / "t.csv").write_text('label,text\ngood,"A joy, a\ntreat"\n0,A pity\n')
    spec = read_task(tmp_path / "own.json")
    one, two = (spec.pose(item) for item in Source(spec).items("train"))
    assert (one.prompt, one.rest, one.right) == ("A joy, a\ntreat It was", ".", (1,))
    assert two.where == f"{tmp_path / 't.csv'}:4"
    assert spec.counts.per_class == 3


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
ANYTHING = LEAVES | st.lists(LEAVES, max_size=2) | st.dictionaries(st.text(), LEAVES, max_size=2)
KEYS = ("text", "sentence", "premise", "hypothesis", "label", "gold_label", "coarse_label")


@given(row=st.sampled_from(MASKED_ROWS), data=st.dictionaries(st.sampled_from(KEYS), ANYTHING))
def test_anything_is_an_example_or_named(row: MaskedRow, data: dict):
    spec = spec_of(row.name)
    try:
        posed = [spec.pose(item) for item in spec.items(Node(data, "data.jsonl:1"))]
    except TaskError as error:
        told = str(error)
    else:
        assert all(one.rest is not None and one.options[one.right[0]] for one in posed)
        told = "data.jsonl:1: right; as it is"
    assert re.fullmatch(r"data\.jsonl:1: .+; .+", told)


OWN: dict[str, Any] = {
    "template": "{text} It was {mask}.", "labels": [" a", " b"], "splits": {"train": "t.tsv"},
}  # fmt: skip
OWN_FAULTS = {
    "two masks": ({"template": "{text} {mask} {mask}"}, "2 masks; expected {mask} once"),
    "nothing but a mask": ({"template": "It was {mask}."}, "names no field"),
    "choices": (
        {"choices": "c", "labels": ...},
        "choices: beside {mask} in the template; exp",
    ),
    "none of a class": ({"examples": {"per_class": 0}}, "examples.per_class: found 0; expected 1"),
}


@pytest.mark.parametrize(("change", "message"), OWN_FAULTS.values(), ids=OWN_FAULTS)
def test_faults_of_ones_own_task(tmp_path: Path, change: dict, message: str):
    task = {key: value for key, value in (OWN | change).items() if value is not ...}
    (tmp_path / "own.json").write_text(json.dumps(task))
    with pytest.raises(TaskError, match=re.escape(message)):
        read_task(tmp_path / "own.json")


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("COPA", "masked", "--task: 'COPA' has no prompt for a masked LM, which --model is; "),
        ("trec", "causal", "--task: 'trec' has no prompt for a causal LM, which --model is; "),
        ("sst", "masked", "'sst' is neither a file nor .*'SST-5'.*; did you mean 'sst-"),
    ],
)
def test_a_task_that_is_not_for_such_models(name: str, kind: Any, message: str):
    with pytest.raises(TaskError, match=message):
        chosen_task(name, kind)


def test_a_template_that_is_not_for_such_models(tmp_path: Path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps(OWN))
    assert chosen_task(str(path), "masked").kind == "masked"
    with pytest.raises(TaskError, match=r"own\.json: template: {mask} is for masked LMs, and --m"):
        chosen_task(str(path), "causal")
    path.write_text(json.dumps(OWN | {"template": "{text} It was"}))
    with pytest.raises(TaskError, match=r"own\.json: template: no {mask}, and --model is a masked"):
        chosen_task(str(path), "masked")


def test_the_documented_task(tmp_path: Path):
    page = (Path(__file__).resolve().parents[2] / "docs" / "tasks.md").read_text()
    (block,) = [
        part for part in re.findall(r"```toml\n(.*?)```", page, re.DOTALL) if "{mask}" in part
    ]
    (tmp_path / "own.toml").write_text(block)
    (tmp_path / "train.tsv").write_text("review\tlabel\nA joy.\tgreat\n")
    spec = chosen_task(str(tmp_path / "own.toml"), "masked")
    (one,) = (spec.pose(item) for item in Source(spec).items("train"))
    assert (one.prompt, one.rest, one.right) == ("A joy. All in all, it was", ".", (2,))
    assert spec.counts.per_class == 16


def test_the_documented_prompts():
    """The table has every task's, with the mask in its place."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "tasks.md").read_text()
    (table,) = re.findall(r"\| name \| prompt \| label words.*?\n\n", page, re.DOTALL)
    for task in MASKED_TASKS:
        (row,) = [line for line in table.splitlines() if task.name in line]
        assert task.template.text.replace("{mask}", "`[MASK]`") in row
        assert ", ".join(word.strip() for word in task.words) in row
