"""Where a task's examples come from, and which of them are drawn."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tasks.suite_rows import DATA
from zo_offload.errors import TaskError
from zo_offload.tasks import Counts, Source, draw, known_task
from zo_offload.tasks.spec import TaskSpec


def task(name: str) -> TaskSpec:
    spec = known_task(name)
    assert spec is not None
    return spec


def numbered(folder: Path, count: int, name: str = "train.tsv") -> Source:
    rows = "".join(f"text {number}\t{number % 2}\n" for number in range(count))
    (folder / name).write_text(f"sentence\tlabel\n{rows}")
    return Source(task("sst2"), str(folder))


def numbers(source: Source, split: str, counts: Counts, seed: int = 0) -> list[int]:
    return [int(item.fields["sentence"].split()[1]) for item in draw(source, split, counts, seed)]


def test_examples_are_those_that_mezo_draws(tmp_path: Path):
    """The first of a permutation are trained on, the last of them held out."""
    source = numbered(tmp_path, 50)
    numbered(tmp_path, 20, "dev.tsv")
    counts = Counts(train=10, dev=5, test=7)
    for seed in (0, 3):
        order = np.random.RandomState(seed).permutation(50).tolist()
        assert numbers(source, "train", counts, seed) == order[:10]
        assert numbers(source, "dev", counts, seed) == order[10:15]
        order = np.random.RandomState(seed).permutation(20).tolist()
        assert numbers(source, "test", counts, seed) == order[:7]


def test_a_small_set_holds_out_what_it_is_asked_to(tmp_path: Path):
    source = numbered(tmp_path, 12)
    order = np.random.RandomState(0).permutation(12).tolist()
    assert numbers(source, "train", Counts(1000, 4)) == order[:8]
    assert numbers(source, "dev", Counts(1000, 4)) == order[8:]
    assert len(numbers(source, "dev", Counts())) == 2  # a fifth
    with pytest.raises(TaskError, match="12 training examples, of which 12 are to be held out; lo"):
        draw(source, "train", Counts(1000, 12), 0)


def test_a_file_is_every_split(tmp_path: Path):
    numbered(tmp_path, 10)
    source = Source(task("sst2"), str(tmp_path / "train.tsv"))
    assert sorted(numbers(source, "test", Counts())) == list(range(10))
    both = numbers(source, "train", Counts(8, 2)) + numbers(source, "dev", Counts(8, 2))
    assert sorted(both) == list(range(10))


@pytest.mark.parametrize("name", ["SST-2", "RTE", "WIC", "SQuAD", "DROP", "ReCoRD"])
def test_files_are_found_in_the_folder_of_their_archive(name: str):
    folder = DATA / task(name).folders[0]
    for given in (DATA, folder):
        found = Source(task(name), str(given)).items("test")
        assert found
        assert found[0].where.startswith(str(folder))


def test_what_is_not_there_is_named(tmp_path: Path):
    looked = (
        r"expected 'val\.jsonl', 'validation\.jsonl', 'dev\.jsonl', 'dev\.tsv' or in 'RTE' there"
    )
    with pytest.raises(TaskError, match="no file of RTE to take test from; " + looked):
        Source(task("rte"), str(tmp_path)).items("test")
    with pytest.raises(TaskError, match="no such file or directory; check --data"):
        Source(task("rte"), str(tmp_path / "none")).items("test")
    (tmp_path / "val.jsonl").write_text("")
    with pytest.raises(TaskError, match=r"val\.jsonl: the file is empty"):
        Source(task("rte"), str(tmp_path)).items("test")
    with pytest.raises(TaskError, match=r"RTE: no data; pass its files by --data"):
        Source(replace(task("rte"), hub=None)).items("test")


def test_a_file_without_one_example_is_named(tmp_path: Path):
    path = tmp_path / "val.jsonl"
    path.write_text('{"premise": "a", "hypothesis": "b", "label": 0}\n')
    source = Source(replace(task("rte"), items=lambda row: ()), str(tmp_path))
    with pytest.raises(TaskError, match=rf"{path}: no example; expected some of RTE"):
        source.items("test")


def test_rows_from_the_hub(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def load_dataset(path, name, **options):
        asked.append((path, name, options))
        return [{"premise": "a", "hypothesis": "b", "idx": 0, "label": label} for label in (1, 7)]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    place = r"aps/super_glue validation\[1\]: label: the label is '7'"
    with pytest.raises(TaskError, match=place):
        draw(Source(task("rte")), "test", Counts(), 0)
    split = {"split": "validation", "revision": "refs/convert/parquet"}
    assert asked == [("aps/super_glue", "rte", split)]


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch):
    def load_dataset(*args, **options):
        raise OSError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    message = r"--task SQuAD: split 'train' of rajpurkar/squad could not be fetched \(no netw"
    with pytest.raises(TaskError, match=message + ".*: OSError: no route to host; pass its files"):
        Source(task("squad")).items("train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TaskError, match="needs `pip install datasets`; or pass its files"):
        Source(task("squad")).items("train")
