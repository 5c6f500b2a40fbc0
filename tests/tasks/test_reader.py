"""Every file is either read as written or refused in one line that names its place."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zo_offload.errors import TaskError
from zo_offload.tasks import read_examples
from zo_offload.tasks.reader import split_file

PLAIN = st.text(st.characters(codec="utf-8", exclude_characters="\t\n\r\0"), max_size=20)
NAMES = st.text(st.characters(categories=["L"]), min_size=1, max_size=8).filter("label".__ne__)


@pytest.fixture
def write(tmp_path: Path):
    def write(data: str | bytes, name: str = "data.tsv") -> Path:
        path = tmp_path / name
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    return write


def test_tsv_is_plain_and_knows_its_lines(write):
    path = write("sentence\tlabel\nhe said \"no\tterrible\n'\tgreat\n")
    first, second = read_examples(path)
    assert first.fields == {"sentence": 'he said "no'}
    assert (first.label, second.label) == ("terrible", "great")
    assert second.where == f"{path}:3"


def test_jsonl_takes_labels_of_both_kinds(write):
    rows = [{"a": "x\ty", "label": 1}, {"a": "Übung", "b": "", "label": "great"}]
    examples = read_examples(write("\n".join(map(json.dumps, rows)), "data.jsonl"))
    assert [example.label for example in examples] == [1, "great"]
    assert [example.fields for example in examples] == [{"a": "x\ty"}, {"a": "Übung", "b": ""}]


@pytest.mark.parametrize("name", ["data", "data.txt", "data.JSON"])
def test_format_is_told_by_content_or_extension(write, name):
    (example,) = read_examples(write('{"a": "x", "label": 0}', name))
    assert example.fields == {"a": "x"}


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbfa\tlabel\nx\t0\n",
        b"a\tlabel\r\nx\t0\r\n",
        b"a\tlabel\nx\t0\n\n \r\n\n",
        b"a\tlabel\nx\t0",
    ],
    ids=["byte order mark", "CRLF", "blank end", "no last newline"],
)
def test_what_editors_do_to_files_is_tolerated(write, data):
    (example,) = read_examples(write(data))
    assert (example.fields, example.label) == ({"a": "x"}, "0")


def test_only_a_newline_ends_a_line(write):
    text = "one\x0ctwo\u2028three\x85four"
    (example,) = read_examples(write(f"a\tlabel\n{text}\t0\n"))
    assert example.fields["a"] == text


def test_a_huge_line_is_read(write):
    (example,) = read_examples(write("a\tlabel\n" + "x" * 5_000_000 + "\t0\n"))
    assert len(example.fields["a"]) == 5_000_000


TSV_FAULTS = {
    "empty": (b"", r"data: the file is empty"),
    "blank": (b"\n \n\n", r"data: the file is empty"),
    "header only": (b"a\tlabel\n", r"data:1: only a header line"),
    "columns": (b"a\tlabel\nx\t0\ny\tz\t1\n", r"data:3: 3 columns; expected 2: 'a', 'label'"),
    "blank line": (b"a\tlabel\n\nx\t0\n", r"data:2: a blank line; expected 2"),
    "no label": (b"a\tLabel\nx\t0\n", r"data:1: no column 'label' among 'a', 'Label'"),
    "commas": (b"a,label\nx,0\n", r"data:1: no column 'label'.*separate columns by tabs"),
    "duplicate": (b"a\ta\tlabel\nx\ty\t0\n", r"data:1: the header names 'a' 2 times"),
    "UTF-8": (b"a\tlabel\nx\t0\n\xff\t1\n", r"data:3: invalid UTF-8 byte 0xff; .*iconv"),
    "NUL": (b"a\tlabel\nx\0\t0\n", r"data:2: a NUL byte"),
    "UTF-16": ("a\tlabel\n".encode("utf-16"), r"data:1: invalid UTF-8 byte 0xff"),
}
JSONL_FAULTS = {
    "malformed": ('{"a": "x", "label": 0}\n{"a": ', r"data:2: malformed JSON at column 7: .+"),
    "no object": ('{"a": "x", "label": 0}\n["x", 0]', r"data:2: JSON array; expected one JSON obj"),
    "no label": ('{"a": "x"}', r"data:1: no key 'label' among 'a'"),
    "number": ('{"a": 5, "label": 0}', r"data:1: 'a' is JSON number; expected a string"),
    "nested": ('{"a": {"b": "c"}, "label": 0}', r"data:1: 'a' is JSON object; expected a string"),
    "null label": ('{"a": "x", "label": null}', r"data:1: 'label' is JSON null; expected"),
    "true label": ('{"a": "x", "label": true}', r"data:1: 'label' is JSON true or false"),
    "float label": ('{"a": "x", "label": 1.0}', r"data:1: 'label' is JSON number"),
    "key twice": ('{"a": "x", "a": "y", "label": 0}', r"data:1: .*key 'a' stands 2 times"),
    "surrogate": (r'{"a": "\ud83d", "label": 0}', r"data:1: 'a' holds half of a surrogate pair"),
    "NUL": (r'{"a": "\u0000", "label": 0}', r"data:1: 'a' holds a NUL character"),
    "brackets": ('{"a": ' + "[" * 100_000, r"data:1: unusable JSON"),
    "digits": ('{"label": ' + "1" * 5_000 + "}", r"data:1: unusable JSON"),
}


@pytest.mark.parametrize(("data", "message"), TSV_FAULTS.values(), ids=TSV_FAULTS)
def test_tsv_faults(write, data, message):
    with pytest.raises(TaskError, match=message):
        read_examples(write(data, "data"))


@pytest.mark.parametrize(("data", "message"), JSONL_FAULTS.values(), ids=JSONL_FAULTS)
def test_jsonl_faults(write, data, message):
    with pytest.raises(TaskError, match=message):
        read_examples(write(data, "data"))


def test_what_is_no_file(tmp_path):
    with pytest.raises(TaskError, match=r"absent.tsv: no such file"):
        read_examples(tmp_path / "absent.tsv")
    with pytest.raises(TaskError, match=r": a directory; expected a file"):
        read_examples(tmp_path)
    with pytest.raises(TaskError, match="cannot be read"):
        read_examples("nul\0.tsv")


def test_a_file_that_no_memory_holds(tmp_path: Path):
    path = tmp_path / "data.tsv"
    with path.open("wb") as file:
        file.truncate(2**31 + 1)  # takes no space
    with pytest.raises(TaskError, match=r"data\.tsv: 2,147,483,649 bytes, above 2,147,483,648"):
        read_examples(path)


def test_one_example_cannot_be_divided(write):
    with pytest.raises(TaskError, match=r"data.tsv: only one example; expected at least 2"):
        split_file(write("a\tlabel\nx\t0\n"))


def test_no_permission(write, monkeypatch):
    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    path = write("a\tlabel\nx\t0\n")
    monkeypatch.setattr(Path, "read_bytes", denied)  # root may read anything
    with pytest.raises(TaskError, match=r"data.tsv: not readable by this user"):
        read_examples(path)


def _read_or_refuse(path: Path) -> None:
    try:
        assert read_examples(path)
        return
    except TaskError as error:
        message = str(error)
    assert message.startswith(str(path))
    assert message.isprintable()
    assert len(message) < len(str(path)) + 1_200


@given(
    data=st.binary() | st.text().map(lambda text: ("a\tlabel\n" + text).encode("utf-8", "replace")),
    name=st.sampled_from(["any", "any.tsv", "any.jsonl"]),
)
def test_any_bytes_are_read_or_refused(tmp_path_factory, data, name):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(data)
    _read_or_refuse(path)


@given(
    row=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
        lambda inner: st.lists(inner) | st.dictionaries(st.just("label") | st.text(), inner),
    )
)
def test_any_json_is_read_or_refused(tmp_path_factory, row):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text(json.dumps(row))
    _read_or_refuse(path)


@given(
    names=st.lists(NAMES, unique=True, max_size=3),
    rows=st.lists(st.tuples(PLAIN, PLAIN, PLAIN, st.integers(0, 9)), min_size=1, max_size=5),
)
def test_tsv_gives_back_what_was_written(tmp_path_factory, names, rows):
    rows = [(*row[: len(names)], str(row[3])) for row in rows]
    path = tmp_path_factory.getbasetemp() / "round.tsv"
    path.write_bytes("\n".join("\t".join(row) for row in [(*names, "label"), *rows]).encode())
    examples = read_examples(path)
    assert [(*example.fields.values(), example.label) for example in examples] == rows
    assert [example.line for example in examples] == list(range(2, len(rows) + 2))
