"""``zo-offload config check`` and ``new`` as a user runs them."""

import json
from pathlib import Path
from typing import Any

import pytest
from cli.common import assert_one_line, invoke, make_task

from zo_offload.config_check import mistakes
from zo_offload.config_new import NewOptions, made
from zo_offload.errors import StoreError
from zo_offload.plan.shortage import Machine

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def test_all_mistakes_at_once(tmp_path: Path):
    path = tmp_path / "ds.json"
    config = {
        "train_batch_size": 0,
        "amp": True,
        "bf16": {"enable": True},
        "zero_optimization": {"stage": 2, "stag": 1},
        "optimizer": {"type": "ZO", "params": {"rl": 1}},
        "zeroth_order": {"probs": 1, "eps": 0, "offload_param": {"devcie": "cpu"}},
    }
    path.write_text(json.dumps(config))
    result = invoke(["config", "check", str(path)])
    assert (result.exit_code, result.stdout) == (1, "")
    lines = result.stderr.splitlines()
    assert sorted(line.removeprefix("Error: ").partition(":")[0] for line in lines) == [
        "amp", "bf16.enable", "optimizer.params.rl", "train_batch_size", "zero_optimization.stag",
        "zero_optimization.stage", "zeroth_order.eps", "zeroth_order.offload_param.devcie",
        "zeroth_order.probs",
    ]  # fmt: skip
    assert "Error: zeroth_order.probs: unknown key; did you mean 'probes'?" in lines


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, 'no "zeroth_order" block in the JSON; add "zeroth_order": {}'),
        ({"zeroth_order": {}}, "DeepSpeed refuses the config: "),  # no batch size
        ({"zeroth_order": {"estimator": "one_sided"}}, "zeroth_order.probes: "),
        (
            {
                "train_batch_size": 1,
                "zeroth_order": {"trainable": {"mode": "sparse", "mask": "/none"}},
            },
            "zeroth_order.trainable.mask: /none",
        ),
    ],
)
def test_what_only_a_sound_json_shows(config: dict[str, Any], said: str):
    (found,) = mistakes(config)
    assert found.startswith(said)


@pytest.mark.parametrize("name", ["quickstart", "trainer"])
def test_a_config_is_ok(name: str):
    given = ["--trainer"] if name == "trainer" else []
    result = invoke(["config", "check", str(CONFIGS / f"{name}.json"), *given])
    assert (result.exit_code, result.stderr) == (0, "")
    first, *defaults = result.stdout.splitlines()
    assert first.endswith(".json: ok")
    assert any(line.startswith("  update: sgd, lr ") for line in defaults)


def test_auto_is_refused_without_the_trainer():
    result = invoke(["config", "check", str(CONFIGS / "trainer.json")])
    assert result.exit_code == 1
    assert 'train_batch_size: "auto" is filled in by the Trainer' in result.stderr


def test_a_json_that_trains(tmp_path: Path):
    """With room on the device for little more than a block of logits: units rest on the host."""
    task, output = make_task(tmp_path), tmp_path / "new.json"
    given = ["config", "new", "--model", str(task.folder / "model"), "--output", str(output)]
    memory = ["--device-gb", "0.0626", "--host-gb", "1"]
    result = invoke([*given, *memory])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == f"{output}: written"
    written = output.read_text()
    assert json.loads(written)["zeroth_order"]["offload_param"] == {"device": "cpu"}
    check = invoke(["config", "check", str(output), "--model", str(task.folder / "model"), *memory])
    assert check.exit_code == 0, check.output
    assert "fits" in check.stdout
    again = invoke([*given, *memory])
    assert again.exit_code == 1
    assert "exists already; name a new file" in again.stderr
    assert output.read_text() == written
    trained = invoke(task.arguments(tmp_path / "out", config=output, steps=2))
    assert trained.exit_code == 0, trained.output


def test_a_model_that_does_not_fit_is_one_line(tmp_path: Path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_batch_size": 1, "zeroth_order": {"unit": "block"}}))
    given = ["--model", "opt-1.3b", "--device-gb", "0.5"]
    done = invoke(["config", "check", str(path), *given])
    words = (
        r"opt-1\.3b does not fit by units of a block: device needs .* bytes\), .* more than there "
        r"are \(.*\); it would fit with "
    )
    assert_one_line(done, words)
    assert done.stdout == ""


def test_a_file_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    output = tmp_path / "file" / "new.json"
    done = invoke(["config", "new", "--model", "opt-125m", "--output", str(output)])
    assert_one_line(done, f"Error: {output}: cannot write it: Not a directory")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_disk_takes_what_memory_does_not():
    options = NewOptions("opt-1.3b", 2.0, 2.0, "/mnt/nvme", 64, "unused")
    config, said = made(options, Machine(None, 2**30))
    assert mistakes(config) == []
    assert config["zeroth_order"]["offload_param"] == {"device": "nvme", "nvme_path": "/mnt/nvme"}
    assert any("units on nvme" in line for line in said)


def test_a_batch_in_one_piece_is_left_to_the_ranks():
    """Who divide it: of a micro-batch as large as the batch only one could have any."""
    config, _ = made(NewOptions("opt-125m", None, 16.0, None, 64, "unused"), Machine(None, 2**34))
    assert "train_micro_batch_size_per_gpu" not in config


def test_what_fits_no_way_is_refused():
    options = NewOptions("opt-1.3b", 0.1, 0.1, None, 64, "unused")
    with pytest.raises(StoreError, match=r"opt-1\.3b does not fit"):
        made(options, Machine(None, 2**30))
