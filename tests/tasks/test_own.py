"""A task in a file of one's own: what it may say, and how each fault is said."""

import json
from pathlib import Path

import pytest

from zo_offload.errors import TaskError
from zo_offload.tasks import Source, chosen_task, draw, read_task

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples" / "task"
LABELS = {"template": "{text} It was", "labels": [" bad", " good"], "splits": {"train": "t.tsv"}}
CHOICES = {"template": "{stem}", "choices": "options", "splits": {"train": "t.jsonl"}}
ANSWER = {"template": "{q}\nA:", "answer": "a", "splits": {"train": "t.jsonl"}}


def written(folder: Path, task: dict, data: str = "") -> Path:
    (folder / task["splits"]["train"]).write_text(data)
    path = folder / "own.json"
    path.write_text(json.dumps(task))
    return path


def posed(folder: Path, task: dict, data: str):
    spec = read_task(written(folder, task, data))
    return [spec.pose(item) for item in Source(spec).items("train")]


def test_label_words(tmp_path: Path):
    (one, two) = posed(tmp_path, LABELS, "text\tlabel\nA joy.\tgood\nA pity.\t0\n")
    assert (one.prompt, one.options, one.right) == ("A joy. It was", (" bad", " good"), (1,))
    assert (two.right, two.where, two.fixed) == ((0,), f"{tmp_path / 't.tsv'}:3", True)


def test_words_that_are_numbers_are_no_indices(tmp_path: Path):
    stars = LABELS | {"labels": [" 1", " 2", " 3"], "label": "stars"}
    (one,) = posed(tmp_path, stars, "text\tstars\nA joy.\t2\n")
    assert one.right == (1,)
    with pytest.raises(TaskError, match=r"t.tsv:2: stars: the label is '0'; expected one of '1',"):
        posed(tmp_path, stars, "text\tstars\nA joy.\t0\n")


def test_choices_in_a_list(tmp_path: Path):
    rows = [
        {"stem": "Two and two are", "options": ["4", "5", "22"], "label": 0},
        {"stem": "Six is more than", "options": ["9", "5"], "label": "5"},
    ]
    one, two = posed(tmp_path, CHOICES, "".join(json.dumps(row) + "\n" for row in rows))
    assert (one.options, one.right) == ((" 4", " 5", " 22"), (0,))
    assert (two.options, two.right, two.fixed) == ((" 9", " 5"), (1,), False)


def test_choices_in_fields(tmp_path: Path):
    task = CHOICES | {"choices": ["one", "two"], "option": " {choice}, {stem}", "label": "which"}
    task |= {"train_on": "answer", "splits": {"train": "t.tsv"}}
    (found,) = posed(tmp_path, task, "stem\tone\ttwo\twhich\nOh\tyes\tno\t1\n")
    assert (found.options, found.right) == ((" yes, Oh", " no, Oh"), (1,))
    assert read_task(tmp_path / "own.json").manner.train_on == "answer"


def test_answers(tmp_path: Path):
    rows = '{"q": "Who?", "a": "Ann"}\n{"q": "Where?", "a": ["here", "Rome"]}\n'
    one, two = posed(tmp_path, ANSWER | {"stop": "|", "option": " {choice}|"}, rows)
    assert (one.prompt, one.options, one.references) == ("Who?\nA:", (" Ann|",), ("Ann",))
    assert (two.options, two.references) == ((" here|",), ("here", "Rome"))
    manner = read_task(tmp_path / "own.json").manner
    assert (manner.generates, manner.train_on, manner.stop) == (True, "answer", "|")
    assert manner.metrics == ("exact_match", "f1")


def test_toml_says_the_same(tmp_path: Path):
    path = tmp_path / "own.toml"
    path.write_text('template = "{q}\\nA:"\nanswer = "a"\nsplits.train = "t.jsonl"\n')
    (tmp_path / "t.jsonl").write_text('{"q": "Who?", "a": "Ann"}\n')
    spec = read_task(path)
    assert spec.pose(Source(spec).items("train")[0]).prompt == "Who?\nA:"
    assert spec.name == "own"


def test_the_documented_example():
    spec = chosen_task(str(EXAMPLES / "colours.toml"))
    assert spec.manner.max_new_tokens == 8
    train, dev, test = (draw(Source(spec), split, spec.counts, 0) for split in (
        "train", "dev", "test"))  # fmt: skip
    assert (len(train), len(dev), len(test)) == (8, 4, 6)
    assert not {item.where for item in train} & {item.where for item in dev}
    assert spec.pose(test[0]).prompt.startswith("Question: What colour is ")
    page = (EXAMPLES.parent.parent / "tasks.md").read_text()
    assert (EXAMPLES / "colours.toml").read_text() in page


FAULTS = {
    "a misspelt key": (
        LABELS | {"templatee": "x"}, "templatee: unknown key; .*did you mean 'template'"),
    "a misspelt split": (
        LABELS | {"splits": {"train": "t.tsv", "tset": "x"}},
        r"splits\.tset: unknown key; expected some of 'train', 'dev', 'test'; did you mean 'test'"),
    "nothing asked": (
        {"template": "{a}", "splits": {"train": "t"}},
        ": none of them; expected one of 'labels', 'choices', 'answer'"),
    "two things asked": (LABELS | {"answer": "a"}, "'labels', 'answer' together; expected one of"),
    "no template": (
        {k: v for k, v in LABELS.items() if k != "template"}, "no key 'template'"),
    "a template of no field": (LABELS | {"template": "x"}, "names no field"),
    "a field not declared": (
        LABELS | {"fields": ["txt"]},
        "template: the template names 'text', which is not in fields; .*did you mean 'txt'"),
    "one label word": (LABELS | {"labels": [" x"]}, "labels: 1 items; expected 2 to"),
    "label words alike": (LABELS | {"labels": [" x", "x"]}, "labels: two label words are the same"),
    "label words in a string": (LABELS | {"labels": "a, b"}, "labels: JSON string; expected an ar"),
    "no splits": ({k: v for k, v in LABELS.items() if k != "splits"} | {}, "no key 'splits'"),
    "a metric of answers": (
        LABELS | {"metric": "exact_match"}, "metric: found 'exact_match'; expected 'accuracy', "),
    "a misspelt metric": (
        ANSWER | {"metric": ["f1", "exact_mach"]}, r"metric\[1\]: .*did you mean 'exact_match'"),
    "an answer trained by options": (
        ANSWER | {"train_on": "options"}, "train_on: found 'options'; expected one of 'answer'"),
    "an answer with a label": (ANSWER | {"label": "x"}, "label: beside answer; remove it"),
    "an option without its choice": (
        CHOICES | {"option": " {stem}"}, r"option: does not hold \{choice\}"),
    "no new tokens": (ANSWER | {"max_new_tokens": 0}, "max_new_tokens: found 0; expected 1 "),
    "too many examples": (
        ANSWER | {"examples": {"dev": 10**10}}, r"examples\.dev: found 10000000000; expected 1"),
    "no stop": (ANSWER | {"stop": ""}, "stop: an empty text"),
}  # fmt: skip


@pytest.mark.parametrize(("task", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_are_named(tmp_path: Path, task: dict, message: str):
    path = tmp_path / "own.json"
    path.write_text(json.dumps(task))
    with pytest.raises(TaskError, match=message):
        read_task(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "template = \nx = 1\n", r"a\.toml: malformed TOML: Invalid value \(at line 1"),
        ("a.json", "[]", r"a\.json: JSON array; expected an object"),
        ("a.json", '{"template": "{a}", "template": "{b}"}', "the key 'template' stands 2 times"),
        ("a.json", '{"template"', r"a\.json: malformed JSON at column 12"),
        ("none.toml", None, r"none\.toml: no such file"),
        ("copaa", None, "--task: 'copaa' is neither a file nor a task .*did you mean 'copa'"),
    ],
)
def test_files_that_are_no_task(tmp_path: Path, name: str, text: str | None, message: str):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(TaskError, match=message):
        chosen_task(name if name == "copaa" else str(tmp_path / name))
