"""Checkpoints: a run that goes on from a tag, however it got there, ends in the same bits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.common import batch, config, net, same, weights
from zo_offload.errors import CheckpointError, ConfigError, JournalError
from zo_offload.journal import Journal
from zo_offload.resume import _check_mask
from zo_offload.snapshot import _check_tensors

SCHEDULE = {
    "type": "WarmupDecayLR",
    "params": {"total_num_steps": 12, "warmup_max_lr": 2e-3, "warmup_num_steps": 3},
}


def settings(**journal: Any) -> dict[str, Any]:
    json_ = config(gas=2, probes=2, scheduler=SCHEDULE, zeroth_order={"journal": journal})
    json_["optimizer"]["params"]["weight_decay"] = 0.5  # gathers, and is owed between two steps
    return json_


def train(engine: Any, stop: int) -> Any:
    """Steps up to ``stop``, on batches that depend on the step alone."""
    while (step := engine.global_steps) < stop:
        engine.train_batch(iter([batch(2 * step), batch(2 * step + 1)]))
    return engine


def outcome(engine: Any) -> tuple[dict[str, torch.Tensor], Any, float]:
    return weights(engine), engine.last_result, engine.get_lr()[0]


def assert_same_outcome(engine: Any, expected: tuple) -> None:
    found = outcome(engine)
    assert same(found[0], expected[0])
    assert found[1:] == expected[1:]


@pytest.mark.parametrize("kind", ["weights", "scalars"])
def test_a_new_engine_goes_on_to_the_same_bits(make_engine, tmp_path, kind: str):
    expected = outcome(train(make_engine(ds=settings()), 8))
    ds = settings(checkpoint=kind)
    train(make_engine(ds=ds), 5).save_checkpoint(tmp_path, client_state={"epoch": 3})
    engine = make_engine(ds=ds)
    directory, client_state = engine.load_checkpoint(tmp_path)
    assert (directory, client_state) == (str(tmp_path / "global_step5"), {"epoch": 3})
    assert (engine.global_steps, engine.global_samples, engine.micro_steps) == (5, 40, 10)
    assert_same_outcome(train(engine, 8), expected)


def test_scalars_are_a_few_kilobytes(make_engine, tmp_path):
    train(make_engine(ds=settings(checkpoint="scalars")), 5).save_checkpoint(tmp_path, "t")
    assert {path.name for path in (tmp_path / "t").iterdir()} == {"checkpoint.json", "run.journal"}
    assert sum(path.stat().st_size for path in (tmp_path / "t").iterdir()) < 4000


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_an_engine_that_is_ahead_goes_back(make_engine, tmp_path, kind: str):
    ds = settings()
    ds["zeroth_order"]["update"] = {"type": kind}
    engine = train(make_engine(ds=ds), 3)
    engine.save_checkpoint(tmp_path)
    expected = outcome(train(engine, 6))
    train(engine, 8)
    engine.load_checkpoint(tmp_path)
    assert engine.global_steps == 3
    assert_same_outcome(train(engine, 6), expected)


def test_scalars_cannot_take_weights_back(make_engine, tmp_path):
    engine = train(make_engine(ds=settings(checkpoint="scalars")), 3)
    engine.save_checkpoint(tmp_path)
    train(engine, 5)
    before, expected = weights(engine), None
    with pytest.raises(
        CheckpointError, match=r"3 steps share 3 with this run, whose weights carry"
    ):
        engine.load_checkpoint(tmp_path)
    assert engine.global_steps == 5
    assert same(weights(engine), before)
    del expected


def test_a_checkpoint_of_another_line_of_history(make_engine, tmp_path):
    """Two runs that part after two steps: each can take the other's place."""
    one, two = make_engine(ds=settings()), make_engine(ds=settings())
    train(one, 2)
    train(two, 2)
    one.train_batch(iter([batch(100), batch(101)]))
    train(one, 5).save_checkpoint(tmp_path)
    expected = outcome(train(one, 7))
    train(two, 6).load_checkpoint(tmp_path)
    assert two.stepper.journal.branch == 1
    assert_same_outcome(train(two, 7), expected)


def test_the_latest_tag_is_found_and_others_by_name(make_engine, tmp_path):
    engine = make_engine(ds=settings())
    train(engine, 1).save_checkpoint(tmp_path, "first")
    train(engine, 2).save_checkpoint(tmp_path, "second")
    train(engine, 3).save_checkpoint(tmp_path, "aside", save_latest=False)
    assert (tmp_path / "latest").read_text() == "second"
    for tag, step in ((None, 2), ("first", 1), ("aside", 3)):
        engine.load_checkpoint(tmp_path, tag)
        assert engine.global_steps == step


def test_a_tag_is_replaced_whole(make_engine, tmp_path):
    engine = make_engine(ds=settings())
    train(engine, 1).save_checkpoint(tmp_path, "t")
    train(engine, 2).save_checkpoint(tmp_path, "t")
    assert {path.name for path in tmp_path.iterdir()} == {"t", "latest"}
    train(engine, 4).load_checkpoint(tmp_path)
    assert engine.global_steps == 2


def test_a_tag_that_was_being_replaced_is_still_there(make_engine, tmp_path):
    engine = make_engine(ds=settings())
    train(engine, 1).save_checkpoint(tmp_path, "t")
    (tmp_path / "t").rename(tmp_path / "t.old")  # where a crash between two renames leaves it
    train(engine, 2).load_checkpoint(tmp_path, "t")
    assert engine.global_steps == 1


@pytest.mark.parametrize("tag", ["t.old", "t.new", "latest"])
def test_a_tag_that_saving_another_would_take_away_is_refused(make_engine, tmp_path, tag: str):
    engine = make_engine(ds=settings())
    train(engine, 1).save_checkpoint(tmp_path, "t")
    with pytest.raises(CheckpointError, match=f"tag '{tag}': 'latest' and names that end in"):
        engine.save_checkpoint(tmp_path, tag)
    assert (tmp_path / "latest").read_text() == "t"


def test_where_nothing_was_saved_nothing_is_loaded(make_engine, tmp_path, caplog):
    assert make_engine(ds=settings()).load_checkpoint(tmp_path) == (None, None)
    assert "nothing was loaded" in caplog.text


def break_weights(tag: Path) -> None:
    path = next((tag / "weights").glob("unit-00002*"))
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def lose_weights(tag: Path) -> None:
    next((tag / "weights").glob("unit-00001*")).unlink()


def break_journal(tag: Path) -> None:
    path = tag / "run.journal"
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    path.write_bytes(data)


def escape(tag: Path) -> None:
    path = tag / "weights" / "weights.json"
    held = json.loads(path.read_text())
    held["files"][0][0] = "../../elsewhere.safetensors"
    path.write_text(json.dumps(held))


def manifest(**change: Any) -> Callable[[Path], None]:
    def spoil(tag: Path) -> None:
        path = tag / "weights" / "weights.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))

    return spoil


def age(tag: Path) -> None:
    path = tag / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 0}))


DAMAGE = {
    "another format of weights": (manifest(format=0), "format 0, but this zo_offload reads for"),
    "too few files": (manifest(files=[]), "0 files, but the model has 4 units that are trained"),
    "more steps than were taken": (
        manifest(step=3),
        "carries 4 of 3 steps; restore it from a copy",
    ),
    "another history": (manifest(lineage="0" * 64), "of another history than the 4 steps of the"),
    "no manifest": (
        lambda tag: (tag / "weights" / "weights.json").unlink(),
        "cannot be read: File",
    ),
    "another format": (age, "format 0, but this zo_offload reads format 1; load it with the ver"),
    "a flipped bit in the weights": (break_weights, "damaged"),
    "a missing file": (lose_weights, "cannot be read: No such file"),
    "a flipped bit in the journal": (break_journal, "damaged|lineage|another history"),
    "a name that escapes": (escape, "no plain file name"),
    "half a JSON": (lambda tag: (tag / "checkpoint.json").write_text("{"), "or damaged"),
    "no JSON": (lambda tag: (tag / "checkpoint.json").unlink(), "or damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_changes_nothing(make_engine, tmp_path, name: str):
    damage, words = DAMAGE[name]
    engine = train(make_engine(ds=settings()), 4)
    engine.save_checkpoint(tmp_path, "t")
    damage(tmp_path / "t")
    expected = weights(train(engine, 5))
    with pytest.raises((CheckpointError, JournalError), match=words):
        engine.load_checkpoint(tmp_path, "t")
    assert engine.global_steps == 5
    assert same(weights(engine), expected)


def test_what_the_system_refuses_is_named(make_engine, tmp_path):
    engine = make_engine()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/t: cannot save: File exists; make room"):
        engine.save_checkpoint(tmp_path / "file", "t")
    (tmp_path / "latest").mkdir()
    with pytest.raises(CheckpointError, match=r"latest: cannot be read: .*; name the tag: load_ch"):
        engine.load_checkpoint(tmp_path)


@pytest.mark.parametrize("tag", ["../t", "a/b", "", ".."])
def test_a_tag_is_a_plain_name(make_engine, tmp_path, tag: str):
    engine = make_engine()
    with pytest.raises(CheckpointError, match="expected a plain name"):
        engine.save_checkpoint(tmp_path, tag)
    with pytest.raises(CheckpointError, match="expected a plain name"):
        engine.load_checkpoint(tmp_path, tag)


def test_another_runs_checkpoint_is_refused(make_engine, tmp_path):
    train(make_engine(ds=settings()), 1).save_checkpoint(tmp_path)
    other = make_engine(net(seed=1), ds=settings())
    with pytest.raises(JournalError, match=r"another run: header.base_sha256: journal has"):
        other.load_checkpoint(tmp_path)


def test_a_missing_tag_is_named(make_engine, tmp_path):
    with pytest.raises(CheckpointError, match=r"nine: no such checkpoint"):
        make_engine().load_checkpoint(tmp_path, "nine")


def test_what_is_no_json_is_refused_and_the_old_tag_stays(make_engine, tmp_path):
    engine = train(make_engine(ds=settings()), 1)
    engine.save_checkpoint(tmp_path, "t", client_state={"a": 1})
    with pytest.raises(CheckpointError, match="a checkpoint holds JSON only"):
        engine.save_checkpoint(tmp_path, "t", client_state={"a": torch.ones(1)})
    assert engine.load_checkpoint(tmp_path)[1] == {"a": 1}


def test_weights_alone_begin_a_run(make_engine, tmp_path):
    trained = train(make_engine(ds=settings()), 4)
    trained.save_checkpoint(tmp_path)
    engine = make_engine(net(seed=1), ds=settings())
    engine.load_checkpoint(tmp_path, load_module_only=True)
    assert engine.global_steps == 0
    assert same(weights(engine), weights(trained))
    expected = outcome(train(engine, 2))
    fresh = net()
    fresh.load_state_dict(weights(trained))
    assert_same_outcome(train(make_engine(fresh, ds=settings()), 2), expected)
    with pytest.raises(CheckpointError, match="this one has taken 2 steps"):
        engine.load_checkpoint(tmp_path, load_module_only=True)


def test_scalars_alone_begin_no_run(make_engine, tmp_path):
    trained = train(make_engine(ds=settings(checkpoint="scalars")), 2)
    trained.save_checkpoint(tmp_path)
    engine = make_engine(net(seed=1), ds=settings())
    before = weights(engine)
    words = (
        "^the checkpoint's 2 steps are scalars only, .*; load it without load_module_only, or save "
        'it with "checkpoint": "weights"$'
    )
    with pytest.raises(CheckpointError, match=words):
        engine.load_checkpoint(tmp_path, load_module_only=True)
    assert same(weights(engine), before)


def test_weights_of_another_model_begin_no_run(make_engine, tmp_path):
    """Also where the first of them would fit."""
    other = net(seed=1)
    other.blocks[2] = torch.nn.Linear(8, 8, bias=False)
    train(make_engine(other, ds=settings()), 1).save_checkpoint(tmp_path, "t")
    engine = make_engine(ds=settings())
    before = weights(engine)
    words = (
        r"t/weights/unit-00004-of-00004\.safetensors: blocks\.2\.bias is missing, the model has "
        r"\(8,\); it is of another model$"
    )
    with pytest.raises(CheckpointError, match=words):
        engine.load_checkpoint(tmp_path, load_module_only=True)
    assert same(weights(engine), before)


def test_schedule_and_rate_stay_where_asked(make_engine, tmp_path):
    train(make_engine(ds=settings()), 4).save_checkpoint(tmp_path)
    engine = make_engine(ds=settings())
    before = engine.get_lr(), engine.lr_scheduler.state_dict()
    engine.load_checkpoint(tmp_path, load_optimizer_states=False, load_lr_scheduler_states=False)
    assert (engine.get_lr(), engine.lr_scheduler.state_dict()) == before


# -- beside a journal's file --


def test_the_file_begins_a_branch_and_a_restart_goes_on_from_it(make_engine, tmp_path):
    expected = outcome(train(make_engine(ds=settings()), 8))
    ds = settings(path=str(tmp_path / "run.journal"))
    engine = train(make_engine(ds=ds), 4)
    engine.save_checkpoint(tmp_path / "tags")
    train(engine, 6).load_checkpoint(tmp_path / "tags")
    train(engine, 5)
    engine.destroy()
    records = Journal.read(tmp_path / "run.journal").records
    assert (len(records), records.branch, [r.branch for r in records]) == (5, 1, [0, 0, 0, 0, 1])
    assert_same_outcome(train(make_engine(ds=ds), 8), expected)


def snapshots(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run.journal.snapshots").iterdir())


def test_snapshots_are_kept_and_save_the_replay(make_engine, tmp_path):
    expected = outcome(train(make_engine(ds=settings()), 9))
    ds = settings(path=str(tmp_path / "run.journal"), snapshot_interval=2, keep_snapshots=2)
    engine = train(make_engine(ds=ds), 7)
    engine.destroy()
    assert snapshots(tmp_path) == ["step-000000004", "step-000000006"]
    again = make_engine(ds=ds)
    held = again.stepper.weights
    assert {held.carried(unit) for unit in held.map.everything} == {6}
    assert_same_outcome(train(again, 9), expected)


def test_a_damaged_snapshot_is_passed_over(make_engine, tmp_path, caplog):
    expected = outcome(train(make_engine(ds=settings()), 9))
    ds = settings(path=str(tmp_path / "run.journal"), snapshot_interval=2)
    train(make_engine(ds=ds), 7).destroy()
    newest = tmp_path / "run.journal.snapshots" / "step-000000006"
    next(newest.glob("unit-00001*")).write_bytes(b"short")
    again = make_engine(ds=ds)
    assert "damaged" in caplog.text
    held = again.stepper.weights
    assert {held.carried(unit) for unit in held.map.everything} == {4}
    assert_same_outcome(train(again, 9), expected)


def test_a_snapshot_under_another_name_is_passed_over(make_engine, tmp_path, caplog):
    expected = outcome(train(make_engine(ds=settings()), 9))
    ds = settings(path=str(tmp_path / "run.journal"), snapshot_interval=2)
    train(make_engine(ds=ds), 7).destroy()
    kept = tmp_path / "run.journal.snapshots"
    (kept / "step-000000006").rename(kept / "step-000000007")
    again = make_engine(ds=ds)
    assert f"{kept}/step-000000007: holds the weights of step 6; remove it: an old" in caplog.text
    held = again.stepper.weights
    assert {held.carried(unit) for unit in held.map.everything} == {4}
    assert_same_outcome(train(again, 9), expected)


def test_snapshots_of_an_abandoned_branch_are_not_taken(make_engine, tmp_path):
    ds = settings(path=str(tmp_path / "run.journal"), snapshot_interval=3)
    engine = train(make_engine(ds=ds), 2)
    engine.save_checkpoint(tmp_path / "tags")
    train(engine, 4).load_checkpoint(tmp_path / "tags")
    engine.train_batch(iter([batch(100), batch(101)]))  # another third step
    (tmp_path / "run.journal.snapshots" / "step-000000003").rename(tmp_path / "other")
    engine.destroy()
    assert snapshots(tmp_path) == []
    (tmp_path / "other").rename(tmp_path / "run.journal.snapshots" / "step-000000003")
    assert make_engine(ds=ds).global_steps == 3


def test_a_snapshot_that_cannot_be_kept_is_named(make_engine, tmp_path, monkeypatch):
    engine = make_engine(ds=settings(path=str(tmp_path / "run.journal"), snapshot_interval=1))
    (tmp_path / "run.journal.snapshots").write_text("")  # where its directory belongs
    words = "run.journal.snapshots: cannot keep a snapshot: .*; make room there, or let this user"
    with pytest.raises(CheckpointError, match=words):
        train(engine, 1)


def test_a_checkpoint_of_another_mask_or_dtype(make_engine, tmp_path):
    with pytest.raises(CheckpointError, match=r"weights: its weights were chosen by another mask"):
        _check_mask(Path("weights"), {"trainable": {"mask": "a"}}, {"trainable": {"mask": "b"}})
    held = make_engine(ds=settings()).stepper.weights
    unit = held.map.units[0]
    tensors = {s.name: torch.zeros(s.shape).half() for span, s in unit.segments if span.trainable}
    with pytest.raises(CheckpointError, match=r"x: .* is torch.float16, expected torch.float32"):
        _check_tensors(Path("x"), unit, tensors)


def test_zero_keeps_no_snapshots(make_engine, tmp_path):
    ds = settings(path=str(tmp_path / "run.journal"), snapshot_interval=0)
    train(make_engine(ds=ds), 2)
    assert not (tmp_path / "run.journal.snapshots").exists()


# -- plain models --


def test_the_16_bit_model_is_a_safetensors_file(make_engine, tmp_path):
    engine = make_engine(ds=config(bf16={"enabled": True}))
    data = batch()
    engine.train_batch(iter([data | {"x": data["x"].bfloat16()}]))
    engine.save_16bit_model(tmp_path, "pytorch_model.bin")
    held = load_file(tmp_path / "pytorch_model.safetensors")
    expected = engine.module.state_dict()
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[name], expected[name]) for name in held)
    assert {value.dtype for value in held.values()} == {torch.bfloat16}


def test_a_16_bit_model_that_cannot_be_written(make_engine, tmp_path):
    engine = make_engine()
    (tmp_path / "file").write_text("mine")
    words = (
        r"file/model\.safetensors: cannot write the model: .*(File exists|Not a directory).*; make "
        "room there, or let this user write$"
    )
    with pytest.raises(CheckpointError, match=words):
        engine.save_16bit_model(tmp_path / "file", "model.safetensors")
    assert (tmp_path / "file").read_text() == "mine"


def test_custom_loading_is_refused(make_engine, tmp_path):
    with pytest.raises(ConfigError, match="custom_load_fn"):
        make_engine().load_checkpoint(tmp_path, custom_load_fn=print)


# -- beside a frozen base --


def frozen(seed: int = 0) -> Any:
    """Blocks that rest packed, but for a bias of the first one."""
    model = net(seed)
    model.blocks.requires_grad_(False)
    model.blocks[0].bias.requires_grad_(True)
    return model


def packed(**journal: Any) -> dict[str, Any]:
    return settings(**journal) | {
        "zeroth_order": {**settings(**journal)["zeroth_order"], "wire": "nf4"}
    }


def test_what_is_frozen_is_in_no_checkpoint(make_engine, tmp_path):
    engine = train(make_engine(frozen(), packed()), 3)
    engine.save_checkpoint(tmp_path, "t")
    files = sorted((tmp_path / "t" / "weights").glob("*.safetensors"))
    assert [set(load_file(file)) for file in files] == [
        {"inputs.weight", "inputs.bias"}, {"blocks.0.bias"},
    ]  # fmt: skip
    expected = outcome(train(engine, 6))
    engine.load_checkpoint(tmp_path, "t")
    assert_same_outcome(train(engine, 6), expected)
    again = make_engine(frozen(), packed())
    again.load_checkpoint(tmp_path, "t")
    assert_same_outcome(train(again, 6), expected)


def test_snapshots_of_what_is_trained_save_the_replay(make_engine, tmp_path):
    expected = outcome(train(make_engine(frozen(), packed()), 7))
    ds = packed(path=str(tmp_path / "run.journal"), snapshot_interval=2)
    train(make_engine(frozen(), ds), 5).destroy()
    again = make_engine(frozen(), ds)
    held = again.stepper.weights
    assert [held.carried(unit) for unit in held.map.everything] == [4, 4, 0, 0]
    assert_same_outcome(train(again, 7), expected)


def test_weights_alone_begin_a_run_on_the_same_frozen_base(make_engine, tmp_path):
    trained = train(make_engine(frozen(), packed()), 4)
    trained.save_checkpoint(tmp_path)
    engine = make_engine(frozen(), packed())
    engine.load_checkpoint(tmp_path, load_module_only=True)
    assert same(weights(engine), weights(trained))
    for model, ds in ((frozen(seed=1), packed()), (frozen(), settings())):
        other = make_engine(model, ds)
        before = weights(other)
        with pytest.raises(CheckpointError, match=r"frozen weights of sha256 .*use the same base"):
            other.load_checkpoint(tmp_path, load_module_only=True)
        assert same(weights(other), before)
