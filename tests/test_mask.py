"""Masks: the largest scores, in files that are looked at before they are believed."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from zo_offload.errors import CheckpointError, ModelError
from zo_offload.mask import (
    FORMAT,
    Chosen,
    Mask,
    Origin,
    Selection,
    check_mask,
    largest,
    read_mask,
    write_mask,
)

ORIGIN = Origin("gradient", "global", 0.25, 12)
few = st.lists(st.integers(0, 5), min_size=1, max_size=8)


@given(scores=few, count=st.integers(0, 9))
def test_the_largest_and_of_equal_ones_the_first(scores: list[int], count: int):
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    assert largest(torch.tensor(scores).float(), count).tolist() == sorted(order[:count])


@given(matrices=st.lists(few, min_size=1, max_size=5), count=st.integers(1, 20))
def test_a_selection_is_that_of_all_together(matrices: list[list[int]], count: int):
    selection = Selection(count)
    for number, scores in enumerate(matrices):
        selection.add(str(number), torch.tensor(scores).float())
    everything = [(-s, n, i) for n, scores in enumerate(matrices) for i, s in enumerate(scores)]
    right: dict[str, list[int]] = {}
    for _, number, index in sorted(everything)[:count]:
        right.setdefault(str(number), []).append(index)
    found = selection.chosen()
    assert {name: each.indices.tolist() for name, each in found.items()} == {
        name: sorted(indices) for name, indices in right.items()
    }
    for name, each in found.items():
        assert each.scores.tolist() == [matrices[int(name)][i] for i in each.indices]


def test_scores_that_are_no_numbers():
    with pytest.raises(ModelError, match="w: scores are not numbers"):
        Selection(1).add("w", torch.tensor([1.0, float("nan")]))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    chosen = {
        "a": Chosen(torch.tensor([0, 3]), torch.tensor([2.0, 1.0])),
        "b.weight": Chosen(torch.tensor([5]), torch.tensor([4.0])),
    }
    write_mask(tmp_path / "mask.safetensors", Mask(ORIGIN, chosen))
    return tmp_path / "mask.safetensors"


def test_a_mask_comes_back(path: Path):
    mask = read_mask(path)
    assert mask.origin == ORIGIN
    assert {n: each.indices.tolist() for n, each in mask.chosen.items()} == {
        "a": [0, 3], "b.weight": [5],
    }  # fmt: skip
    check_mask(path, mask, {"a": (2, 2), "b.weight": (3, 2)})


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"a": (2, 2)}, "b.weight is no parameter of this model's units"),
        ({"a": (3, 1), "b.weight": (3, 2)}, "a has 3 weights, and weight 3 was chosen"),
    ],
)
def test_a_mask_of_another_model_is_refused(path: Path, shapes: dict, words: str):
    with pytest.raises(CheckpointError, match=words):
        check_mask(path, read_mask(path), shapes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"a.indices": torch.tensor([3, 0])}, "damaged: a has no rising indices"),
        ({"a.indices": torch.tensor([-1, 3])}, "damaged: a has no rising indices"),
        ({"a.indices": torch.tensor([0])}, "damaged: a has no rising indices"),
        ({"a.indices": torch.tensor([], dtype=torch.int64)}, "damaged: a has no rising"),
        ({"a.indices": torch.tensor([0.0, 3.0])}, "damaged: a has no rising indices"),
        ({"a.scores": torch.tensor([1, 2])}, "damaged: a has no rising indices"),
        ({"c.scores": torch.tensor([1.0])}, "no mask of this zo_offload: c.scores belongs to no"),
        ({"c.indices": torch.tensor([1])}, "no mask of this zo_offload: 'c.scores'"),
    ],
)
def test_a_spoilt_mask_is_refused(path: Path, change: dict[str, torch.Tensor], words: str):
    import safetensors

    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({**load_file(path), **change}, path, metadata)
    with pytest.raises(CheckpointError, match=words):
        read_mask(path)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        (None, "its metadata lack 'zo_offload mask 1'"),
        ({"format": "pt"}, "its metadata lack"),
        ({FORMAT: "{"}, "Expecting"),
        ({FORMAT: '{"a": 1}'}, "unexpected keyword"),
    ],
)
def test_what_is_no_mask_is_refused(tmp_path: Path, metadata: dict | None, words: str):
    save_file({"a": torch.ones(1)}, tmp_path / "x", metadata)
    with pytest.raises(CheckpointError, match=f"no mask of this zo_offload: .*{re.escape(words)}"):
        read_mask(tmp_path / "x")


def test_a_mask_that_cannot_be_written_is_named(tmp_path: Path, path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/x: cannot write the mask: .*; make room"):
        write_mask(tmp_path / "file" / "x", read_mask(path))


def test_cut_and_missing_files_are_refused(path: Path):
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="no mask of this zo_offload"):
        read_mask(path)
    path.unlink()
    with pytest.raises(CheckpointError, match="no mask of this zo_offload"):
        read_mask(path)
