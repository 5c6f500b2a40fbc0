"""What a replay refuses, compares, and goes on from."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from limits import at_most
from safetensors.torch import load_file, save_file

from replay.ways import STEPS, WAYS, Run, Way, content, tensors, train
from zo_offload.convert import convert
from zo_offload.errors import CheckpointError, ConfigError, JournalError, ModelError
from zo_offload.journal import Journal
from zo_offload.replay import command, shards
from zo_offload.replay.command import replay
from zo_offload.reporter import Reporter


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Tests only read it."""
    return train(WAYS["full"], tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def by_pattern(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(WAYS["parameters"], tmp_path_factory.mktemp("by-pattern"), steps=1)


def with_header(run: Run, path: Path, **changes: Any) -> Run:
    """The same run, were its journal's header another; ``...`` takes a key out."""
    fields = {**Journal.read(run.journal).header.fields, **changes}
    Journal.create(path, {k: v for k, v in fields.items() if v is not ...}).close()
    return replace(run, journal=path)


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def flipped(directory: Path, name: str, element: int) -> None:
    """Flip the lowest bit of a weight."""
    path = directory / "model.safetensors"
    held = load_file(path)
    held[name].view(-1).view(torch.int32)[element] ^= 1
    save_file(held, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"counter": "another"}, "header.counter: found 'another', this zo_offload counts by"),
        ({"dropout": 1}, "header.dropout: unknown to this zo_offload, and may decide bits"),
        ({"seed": ...}, "header.seed is missing; it is no journal of a training run"),
        ({"base_sha256": "0" * 64}, "of a run that began with 000000000000...; give that base"),
        ({"forward": ["torch.float64"]}, "computed in torch.float64, as no precision of"),
        ({"lag": 2, "streamed": "0" * 64}, "cannot be laid out as the run did"),
        ({"update": {"type": "lion"}}, "header.update: .* is no update that this"),
        ({"trainable": {"mode": "dreams"}}, "header.trainable.mode: 'dreams' is none"),
        (
            {"trainable": {"mode": "peft", "adapters": {"one": {}, "two": {}}}},
            "^header.trainable.adapters: one, two; one that is called default can be made again: g",
        ),
        ({"trainable": {"mode": "full", "moves": "0"}}, "no kinds and layers of Llama.* have it"),
        ({"trainable": {"mode": "sparse", "mask": "0"}}, "chosen by a mask, of which .*--config"),
        (
            {"trainable": {"mode": "full", "rotate": {"interval": 1, "groups": 9}}},
            "not what the run trained: header.trainable",
        ),
    ],
)
def test_a_header_that_cannot_be_honoured_is_refused(
    run: Run, tmp_path: Path, changes: dict[str, Any], words: str
):
    with pytest.raises(JournalError, match=words):
        replay(with_header(run, tmp_path / "other.journal", **changes).options(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["other.journal"]


def test_a_journal_of_other_kernels_is_refused(run: Run, tmp_path: Path):
    fields = Journal.read(run.journal).header.fields
    Journal.create(tmp_path / "run.journal", fields, contract=2).close()
    with pytest.raises(JournalError, match="written under kernel contract 2"):
        replay(replace(run, journal=tmp_path / "run.journal").options(tmp_path / "out"))


def test_more_steps_than_there_are_is_refused(run: Run, tmp_path: Path):
    with pytest.raises(JournalError, match=f"--to 99, but it holds {STEPS} steps"):
        replay(run.options(tmp_path / "out", to=99))


def test_another_base_is_refused(run: Run, tmp_path: Path):
    base = copied(run.base, tmp_path / "base")
    flipped(base, "model.layers.1.mlp.up_proj.weight", 5)
    with pytest.raises(JournalError, match=f"{base}: its weights have sha256 .* give that base"):
        replay(replace(run, base=base).options(tmp_path / "out"))
    with pytest.raises(ModelError, match="no such directory"):
        replay(replace(run, base=tmp_path / "none").options(tmp_path / "out"))


def test_no_steps_give_the_base(run: Run, tmp_path: Path):
    out = run.replayed(tmp_path / "out", to=0)
    assert content(out)["model.safetensors"] == content(run.base)["model.safetensors"]


def test_a_pattern_needs_the_json_that_says_it(by_pattern: Run, tmp_path: Path):
    with pytest.raises(JournalError, match=r"digest of what moved, .* name the run's JSON"):
        replay(by_pattern.options(tmp_path / "out"))
    other = tmp_path / "other.json"
    config = json.loads(by_pattern.config.read_text())
    config["zeroth_order"]["trainable"]["parameters"] = ["*.down_proj.*"]
    other.write_text(json.dumps(config))
    with pytest.raises(JournalError, match=r"not what the run trained: header.trainable.moves"):
        replay(by_pattern.options(tmp_path / "out", config=str(other)))


def test_an_adapter_that_went_on_is_a_base(tmp_path: Path):
    way = WAYS["lora"]
    first = train(way, tmp_path / "first", steps=1)
    second = train(way, tmp_path / "second", steps=2, base=first.exports[1])
    out = second.replayed(tmp_path / "out")
    assert tensors(out).keys() == tensors(first.exports[1]).keys()
    assert content(out) == content(second.exports[2])


@pytest.mark.parametrize("element", [0, 2047])
def test_verify_names_the_first_tensor_that_differs(run: Run, tmp_path: Path, element: int):
    there = copied(run.exports[STEPS], tmp_path / "there")
    flipped(there, "model.layers.0.mlp.up_proj.weight", element)
    flipped(there, "model.layers.1.mlp.up_proj.weight", 1)
    before = content(there)
    words = rf"layers.0.mlp.up_proj.weight differs .* first in element {element:,}: "
    with pytest.raises(CheckpointError, match=words):
        replay(run.options(there, verify=True))
    assert content(there) == before


def test_verify_knows_another_step(run: Run):
    with pytest.raises(CheckpointError, match="differs from the replay"):
        replay(run.options(run.exports[STEPS], to=STEPS - 1, verify=True))


def with_tensors(run: Run, there: Path, **changes: Any) -> Path:
    """A copy of the last export with other tensors, as a user may have it; ``...`` for none."""
    copied(run.exports[STEPS], there)
    path = there / "model.safetensors"
    held = load_file(path) | changes
    save_file({name: value for name, value in held.items() if value is not ...}, path)
    return there


def test_verify_knows_another_precision(run: Run, tmp_path: Path):
    held = load_file(run.exports[STEPS] / "model.safetensors")
    halves = {name: value.half() for name, value in held.items()}
    there = with_tensors(run, tmp_path / "there", **halves)
    config = json.loads((there / "config.json").read_text())
    (there / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    before = content(there)
    words = (
        rf"^{there}: model\.\S+ is \[.*\] of torch\.float16, the replay gives \[.*\] of "
        r"torch\.float32; it is no export of this run$"
    )
    with pytest.raises(CheckpointError, match=words):
        replay(run.options(there, verify=True))
    assert content(there) == before


def test_verify_compares_what_is_there(run: Run, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"--verify: .* there is no directory"):
        replay(run.options(tmp_path / "none", verify=True))


class Stopped(Exception):
    """By a test."""


class StopsAfter(Reporter):
    """Ends a replay when so many units are done."""

    def __init__(self, count: int) -> None:
        self._count = count

    def counted(self, name: str, items: Any, count: int) -> Any:
        for number, item in enumerate(items):
            if number == self._count:
                raise Stopped
            yield item


def test_what_is_finished_is_kept(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        replay(run.options(out), StopsAfter(2))
    made: list[int] = []
    write = shards.Shards.write
    monkeypatch.setattr(
        shards.Shards, "write", lambda *args: (made.append(args[1].index), write(*args))
    )
    done = replay(run.options(out))
    assert (done.kept, made) == (2, [1])  # of the ambient unit and two blocks
    assert content(out) == content(run.exports[STEPS])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert replay(run.options(out)).was_there


@pytest.mark.parametrize("finished", [False, True])
def test_another_replay_into_the_same_place_is_refused(run: Run, tmp_path: Path, finished: bool):
    out = tmp_path / "out"
    if finished:
        replay(run.options(out))
    else:
        with pytest.raises(Stopped):
            replay(run.options(out), StopsAfter(1))
    with pytest.raises(ConfigError, match=f"another replay: its step is {STEPS}, here it is 1;"):
        replay(run.options(out, to=1))
    other = with_header(run, tmp_path / "other.journal", seed=1)
    with pytest.raises(ConfigError, match=r"another replay: its journal is \w{12}\.\.\., here"):
        replay(other.options(out))


@pytest.mark.parametrize("name", ["out", "out.replaying"])
def test_what_is_no_replay_stays(run: Run, tmp_path: Path, name: str):
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="something"):
        replay(run.options(tmp_path / "out"))
    assert (tmp_path / name / "mine").read_text() == "mine"


def test_a_damaged_record_is_named(run: Run, tmp_path: Path):
    work = tmp_path / "out.replaying"
    work.mkdir()
    (work / "replay.json").write_text("{")
    words = rf"^{work}/replay\.json: cannot be read \(Expecting .*\); remove {work}$"
    with pytest.raises(ConfigError, match=words):
        replay(run.options(tmp_path / "out"))
    assert (work / "replay.json").read_text() == "{"


def test_an_output_below_a_file(run: Run, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "out"
    words = rf"^--out: cannot make {out}\.replaying: Not a directory; choose another$"
    with pytest.raises(ConfigError, match=words):
        replay(run.options(out))
    assert (tmp_path / "file").read_text() == "mine"


def test_two_at_work_in_one_place_are_refused(run: Run, tmp_path: Path):
    record = command.record_of(Journal.read(run.journal))
    with shards.held(tmp_path / "out", record), pytest.raises(ConfigError, match="at work in"):
        replay(run.options(tmp_path / "out"))


def test_a_full_disk_is_one_line(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "_write", full)
    with pytest.raises(CheckpointError, match=r"unit-00001-of-00003.* cannot write it: No space"):
        replay(run.options(tmp_path / "out"))


def test_a_disk_that_is_full_at_the_end_costs_no_work(run: Run, tmp_path: Path):
    """Units are written, and the model, which is larger than each of them, is not."""
    out = tmp_path / "out"
    with at_most(40_000):
        words = rf"^--out: cannot write {out}: .*File too large.*; make room or choose another$"
        with pytest.raises(CheckpointError, match=words):
            replay(run.options(out))
    assert [path.name for path in tmp_path.iterdir()] == ["out.replaying"]
    assert replay(run.options(out)).kept == 3
    assert content(out) == content(run.exports[STEPS])


def test_experts_that_lie_in_groups_are_refused(tmp_path: Path):
    grouped = train(Way(model="mixtral"), tmp_path / "run", steps=1)
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"train_batch_size": 1, "zeroth_order": {"unit": "linear"}}))
    base = convert(str(grouped.base), tmp_path / "base", config).directory
    words = (
        rf"^{base}: model\.layers\.0\.\S*experts\S* lies there in groups of experts, which cannot "
        "be replayed; give the model that was converted$"
    )
    with pytest.raises(ModelError, match=words):
        replay(replace(grouped, base=base).options(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "ds.json", "run"]
