"""Weights that loading makes anew rest in files, hold the same bits, and leave nothing."""

import errno
import os
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from models.table import ROWS
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from zo_offload.config import ZOConfig
from zo_offload.errors import ModelError, StoreError
from zo_offload.integrations import spill
from zo_offload.integrations.hf import load_causal_lm
from zo_offload.integrations.spill import MAPS, is_in_file, spilled
from zo_offload.step import Stepper

GIB = 2**30


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "LEAST_BYTES", 1)  # parameters of the small models count, too


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    folder = tmp_path / "room"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def saved(folder: Path, name: str) -> Path:
    """As it was published: each expert's matrices for themselves."""
    model: Any = ROWS[name].build(torch.bfloat16)
    model.save_pretrained(folder / "model", max_shard_size="20KB")
    return folder / "model"


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """The checkpoint in one file, changed."""
    values: dict[str, torch.Tensor] = {}
    for path in folder.glob("model*.safetensors"):
        values |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(values)
    save_file(values, folder / "model.safetensors", {"format": "pt"})
    return folder


def cast(folder: Path) -> Path:
    def change(values: dict[str, torch.Tensor]) -> None:
        values.update({k: v.float() + 1e-5 for k, v in values.items()})

    return rewritten(folder, change)


def pickled(folder: Path, zipped: bool = True) -> Path:
    rewritten(folder, lambda values: None)
    path = folder / "model.safetensors"
    values = load_file(path)
    path.unlink()
    name = folder / "pytorch_model.bin"
    torch.save(values, name, _use_new_zipfile_serialization=zipped)  # noqa: TID251 others did
    return folder


def spilled_in(folder: Path) -> int:
    """Files there that have no name any more and are mapped."""
    lines = MAPS.read_text().splitlines()
    return sum(str(folder) in line and "(deleted)" in line for line in lines)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mixtral", None),
        ("qwen3-moe", None),
        ("mixtral", cast),
        ("qwen3", cast),  # its embedding is its head
        ("mixtral", pickled),
        ("opt", lambda folder: pickled(folder, zipped=False)),  # of old: read into memory
    ],
    ids=["mixtral", "qwen3-moe", "mixtral-cast", "tied-cast", "mixtral-bin", "old-bin"],
)
def test_bits_are_those_of_the_plain_loader(
    tmp_path: Path, room: Path, name: str, change: Callable[[Path], Path] | None
):
    folder = saved(tmp_path, name)
    if change is not None:
        change(folder)
    plain = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto")
    assert not all(map(is_in_file, plain.parameters()))
    model = load_causal_lm(folder)
    assert all(map(is_in_file, model.parameters()))
    assert spilled_in(room) > 0
    assert list(room.iterdir()) == []
    expected, found = plain.state_dict(), model.state_dict()
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings
    assert torch.equal(*(m(**ROWS[name].inputs(7)).logits for m in (plain, model)))


def test_what_is_mapped_already_is_left(tmp_path: Path, room: Path):
    load_causal_lm(saved(tmp_path, "opt"))
    assert spilled_in(room) == 0


@pytest.mark.parametrize("device", ["none", "cpu"])
def test_room_is_given_back_as_stores_take_over(tmp_path: Path, room: Path, device: str):
    model = load_causal_lm(saved(tmp_path, "mixtral"))
    assert spilled_in(room) == 2 * len(model.model.layers)
    config = ZOConfig.model_validate({"offload_param": {"device": device}})
    with closing(Stepper(model, config, dtype=torch.bfloat16)):
        assert spilled_in(room) == 0


def test_nothing_is_left_behind(tmp_path: Path, room: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "no")
    for error in (None, KeyError("a")):
        try:
            with spilled([room]):
                assert os.environ["HF_DEACTIVATE_ASYNC_LOAD"] == "1"
                assert is_in_file(nn.Linear(3, 3).weight)
                if error is not None:
                    raise error
        except KeyError:
            pass
        assert os.environ["HF_DEACTIVATE_ASYNC_LOAD"] == "no"
        assert not is_in_file(nn.Linear(3, 3).weight)
    assert list(room.iterdir()) == []


def free(monkeypatch: pytest.MonkeyPatch, **folders: int) -> None:
    """Folders, by their names, have so many bytes free."""

    def room_of(folder: Path) -> tuple[int, str]:
        return folders[folder.name], f"has {folders[folder.name]:,} free"

    monkeypatch.setattr(spill, "_room", room_of)


@pytest.mark.parametrize(
    ("first", "room", "taken"),
    [
        (GIB, GIB, "first"),
        (50_000, GIB, "room"),  # the first has room for this weight, not for all
        (50_000, 50_000, "first"),
        (39_999, 50_000, "room"),
    ],
)
def test_the_first_folder_with_room_for_all_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, room: int, taken: str
):
    for name in ("first", "room"):
        (tmp_path / name).mkdir()
    free(monkeypatch, first=first, room=room)
    with spilled([tmp_path / "first" / "not" / "yet", tmp_path / "room"]):
        with torch.device("meta"):
            layers = [nn.Linear(100, 100, bias=False) for _ in range(2)]
        layers[0].weight = nn.Parameter(torch.ones(100, 100))
    assert spilled_in(tmp_path / taken) == spilled_in(tmp_path) == 1


def test_no_room_is_refused_with_the_numbers(
    tmp_path: Path, room: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = saved(tmp_path, "mixtral")
    free(monkeypatch, room=5, model=16_000)
    words = (
        r"^MixtralExperts.gate_up_proj: made anew as it is loaded, it has to rest on a disk until "
        r"a store takes it: 32,768 bytes are needed, 1\d\d,\d\d\d at most for all such weights, "
        rf"but {room} has 5 free, {folder} has 16,000 free; free some space, or set TMPDIR to a "
        "folder on a larger disk$"
    )
    with pytest.raises(StoreError, match=words):
        load_causal_lm(folder)


def test_memory_is_no_disk_and_what_is_not_ours_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    memory = Path("/dev/shm")
    if not os.path.ismount(memory):
        pytest.skip("no tmpfs at /dev/shm")
    assert spill._room(memory) == (-1, "is in memory itself")
    assert spill._room(tmp_path)[0] >= 0
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    assert spill._room(tmp_path) == (-1, "is not writable")


def test_a_disk_that_fills_meanwhile_says_so(
    tmp_path: Path, room: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = saved(tmp_path, "mixtral")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=rf"^{room}: cannot write 32,768 bytes: No space left"):
        load_causal_lm(folder)


@pytest.mark.parametrize("missing", ["experts.3.w1.weight", "w3.weight", "experts.2."])
def test_experts_that_are_missing_are_not_made_up(tmp_path: Path, room: Path, missing: str):
    def change(values: dict[str, torch.Tensor]) -> None:
        for key in [key for key in values if missing in key]:
            del values[key]

    folder = rewritten(saved(tmp_path, "mixtral"), change)
    with pytest.raises(ModelError, match=r"not belong together: .*down_proj is|conversion of"):
        load_causal_lm(folder)


def with_bin(tmp_path: Path, content: Any) -> Path:
    """A checkpoint whose weights are in a pickle."""
    folder = saved(tmp_path, "opt")
    for path in folder.glob("model*"):
        path.unlink()
    torch.save(content, folder / "pytorch_model.bin")  # noqa: TID251 others may
    return folder


def test_no_code_of_a_pickle_is_run(tmp_path: Path, room: Path):
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    folder = with_bin(tmp_path, {"a": Hostile()})
    with pytest.raises(ModelError) as raised:
        load_causal_lm(folder)
    assert not (tmp_path / "ran").exists()
    assert str(raised.value) == (
        f"{folder}: a .bin file of weights asks to run posix.system, and no code of a checkpoint "
        "is run; take its weights as safetensors (save_pretrained writes them), or fetch its files "
        "again"
    )


def test_a_bin_file_that_is_no_pickle_is_said_to_be_damaged(tmp_path: Path, room: Path):
    folder = with_bin(tmp_path, {})
    (folder / "pytorch_model.bin").write_bytes(b"x" * 100)
    with pytest.raises(ModelError) as raised:
        load_causal_lm(folder)
    assert str(raised.value) == (
        f"{folder}: a .bin file of weights cannot be read: it is damaged, or holds more than "
        "tensors; take its weights as safetensors (save_pretrained writes them), or fetch its "
        "files again"
    )


def test_code_of_a_library_in_a_pickle_is_named(tmp_path: Path, room: Path):
    folder = with_bin(tmp_path, {"a": Path("here")})
    with pytest.raises(ModelError, match=r"asks to run pathlib\.PosixPath, and no code") as raised:
        load_causal_lm(folder)
    assert "weights_only" not in str(raised.value)
