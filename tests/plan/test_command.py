"""``zo-offload plan`` as a user runs it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from plan.smaller import config_like
from zo_offload import cli
from zo_offload.config_check import without_auto
from zo_offload.mask import FORMAT
from zo_offload.plan.request import GIB

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def plan(*arguments: Any) -> Result:
    result = CliRunner().invoke(cli.main, ["plan", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def planned(*arguments: Any) -> dict[str, Any]:
    result = plan(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    (line,) = result.stdout.splitlines()
    found = json.loads(line)
    assert found["fits"] is True
    return found


def test_175b_fits_8_gib_with_every_parameter_trained():
    found = planned("--model", "OPT-175B", "--device-gb", 8)
    assert 7 * GIB < found["device_bytes"] <= 8 * GIB
    assert found["request"]["trainable"] == "full"
    assert found["host_bytes"] == pytest.approx(4 * 174.6e9, rel=0.01)
    assert found["nvme_bytes"] == 0
    assert sum(found["units"].values()) == {"sublayer": 288, "linear": 576}[found["unit"]]
    assert found["bound_by"] in ("compute", "bus", "host")


def test_175b_fits_18_gib_by_the_file_that_users_copy():
    found = planned(
        "--model", "opt-175b", "--device-gb", 18, "--config", CONFIGS / "opt-175b-18gb.json"
    )
    assert found["device_bytes"] <= 18 * GIB
    assert (found["unit"], found["units"]) == ("block", {"device": 0, "host": 96, "nvme": 0})
    assert (found["lanes"], found["step"]["visits"]) == (32, 4)
    assert found["notes"] == [
        "not in these numbers: the accelerator's context, some 0.5 GiB on CUDA"
    ]


@pytest.mark.parametrize(
    ("trainable", "wire", "device_gb"),
    [("sparse", "nf4", 6), ("peft", "nf4", 6), ("scales", "int4", 12)],
)
def test_175b_fits_little_and_128_gib_of_host_memory_on_a_frozen_base(
    trainable: str, wire: str, device_gb: int
):
    found = planned(
        "--model", "opt-175b", "--device-gb", device_gb, "--host-gb", 128,
        "--wire", wire, "--trainable", trainable,
    )  # fmt: skip
    assert found["device_bytes"] <= device_gb * GIB
    assert found["host_bytes"] <= 128 * GIB
    assert found["nvme_bytes"] == 0


@pytest.mark.parametrize("length", [128, 512])
def test_llama_2_7b_fits_8_gib_in_total_on_a_frozen_base(length: int):
    for device in 8, 2:  # all of it on the device, and most of it on the host
        found = planned(
            "--model", "llama-2-7b", "--device-gb", device, "--host-gb", 8, "--wire", "nf4",
            "--trainable", "sparse", "--length", length,
        )  # fmt: skip
        assert found["device_bytes"] + found["host_bytes"] <= 5 * GIB
        assert bool(found["host_bytes"]) == (device == 2)


def test_what_host_memory_does_not_hold_rests_on_disk():
    found = planned("--model", "opt-175b", "--device-gb", 8, "--host-gb", 64)
    assert found["host_bytes"] <= 64 * GIB < found["nvme_bytes"]
    assert found["bound_by"] == "disk"
    assert all(found["units"][tier] for tier in ("host", "nvme"))
    assert any(note.startswith("units rest in several tiers") for note in found["notes"])


def test_a_table_for_readers(tmp_path: Path):
    config_like("llama-3-8b").save_pretrained(tmp_path)
    result = plan("--model", tmp_path, "--device-gb", 1)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{tmp_path}: ")
    assert "micro-batches of 1 x 64 tokens" in lines[3]  # the context of this model
    for beginning in ("device  ", "host    ", "nvme    ", "step    ", "in the JSON: ", "note: "):
        assert any(line.startswith(beginning) for line in lines), beginning
    assert any("MiB (" in line and "bytes)" in line for line in lines)
    block = json.loads(next(x for x in lines if "JSON" in x).split('"zeroth_order": ', 1)[1])
    assert block["offload_param"]["device"] == "none"


def test_what_does_not_fit_is_refused_with_numbers_and_what_would():
    result = plan("--model", "opt-6.7b", "--device-gb", 2.5, "--unit", "block")
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: opt-6.7b does not fit by units of a block: device needs ")
    assert "it would fit with --unit left open: device 2." in line


def test_a_refusal_as_json():
    result = plan("--model", "opt-6.7b", "--device-gb", 1, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["fits"] is False
    assert found["device_bytes"] - found["short_bytes"]["device"] == GIB
    assert result.stderr.startswith("Error: opt-6.7b does not fit")


def test_a_json_bounds_the_tiers_and_the_budgets(tmp_path: Path):
    path = tmp_path / "ds.json"

    def configured(**block: Any) -> Result:
        path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 2, "zeroth_order": block}))
        return plan("--model", "opt-125m", "--config", path, "--json")

    found = json.loads(configured(offload_param={"device": "cpu"}, probes=2).stdout)
    assert (found["units"], found["lanes"]) == ({"device": 0, "host": 12, "nvme": 0}, 4)
    assert found["request"]["batch_size"] == 2
    refused = configured(offload_param={"device": "none"}, device_budget="100MiB")
    assert refused.exit_code == 1
    assert "it would fit with weights in host memory" in refused.stderr
    assert "unknown key" in configured(probs=2).stderr
    assert "a plan divides blocks itself" in configured(unit=["OPTDecoderLayer"]).stderr


@pytest.mark.parametrize(("wire", "bytes_each"), [("int4:64", 0.53125), ("nf4:128", 0.515625)])
def test_a_wire_may_name_its_group(wire: str, bytes_each: float):
    found = planned("--model", "opt-13b", "--trainable", "sparse", "--unit", "linear",
                    "--wire", wire)  # fmt: skip
    assert found["unit_bytes"] == pytest.approx(bytes_each * 5120 * 20480, rel=0.001)


@pytest.mark.parametrize("wire", ["nf5", "int8:65", "bf16:64", ""])
def test_a_wire_that_is_none_is_one_line(wire: str):
    result = plan("--model", "opt-125m", "--wire", wire)
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.match(r"Error: --wire: .*; .*\n\Z", result.stderr)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_every_file_that_users_copy_is_planned(tmp_path: Path, path: Path):
    config = json.loads(path.read_text())
    if path.stem == "trainer":
        config = without_auto(config)
    (tmp_path / "ds.json").write_text(json.dumps(config))
    found = planned("--model", "opt-1.3b", "--config", tmp_path / "ds.json", "--length", 256)
    said = config["zeroth_order"].get("trainable", {})
    assert found["zeroth_order"]["trainable"].items() >= said.items()


def test_what_moves_is_said_in_the_block():
    found = planned("--model", "opt-125m", "--trainable", "peft", "--wire", "nf4")
    said = found["zeroth_order"]["trainable"]
    assert said["peft_config"] == {"peft_type": "LORA", "r": 8, "target_modules": "all-linear"}
    assert not any("does not take" in note for note in found["notes"])


def test_rates_bound_the_step():
    found = planned("--model", "opt-125m", "--tflops", 0.001)
    assert found["bound_by"] == "compute"
    assert found["step_seconds"] == pytest.approx(1.05 * found["step"]["flops"] / 1e9, rel=0.01)


@pytest.mark.parametrize(("kind", "said"), [("sgd", 0), ("momentum", 1)])
def test_what_a_window_costs_is_said(tmp_path: Path, kind: str, said: int):
    path = tmp_path / "ds.json"
    block = {"update": {"type": kind}}
    path.write_text(json.dumps({"train_batch_size": 1, "zeroth_order": block}))
    notes = planned("--model", "opt-125m", "--device-gb", 8, "--config", path)["notes"]
    assert sum("draws each weight's noise 44 times, some 3.5 ns" in note for note in notes) == said


@pytest.mark.parametrize(
    "option",
    [
        ("--device-gb", "nan"), ("--device-gb", "inf"), ("--host-gb", "1e300"),
        ("--nvme-gb", "inf"), ("--pcie-gbps", "nan"), ("--tflops", "inf"),
        ("--batch-size", 10**30), ("--length", 10**30), ("--probes", 10**30), ("--lag", 10**30),
    ],
)  # fmt: skip
def test_a_number_that_is_none_is_one_line(option: tuple[str, Any]):
    result = plan("--model", "opt-125m", *option)
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"Error: {option[0]} ")
    assert "expected" in line


@pytest.mark.parametrize(
    "values",
    [
        {"num_attention_heads": 0}, {"hidden_size": "64"}, {"hidden_size": None},
        {"hidden_size": 10**12}, {"vocab_size": 0}, {"vocab_size": -5}, {"num_hidden_layers": 0},
        {"hidden_size": 10**9, "ffn_dim": 10**12}, {"activation_function": "nosuch"},
        {"dtype": "float33"}, {"dtype": "int8"}, {"dtype": "float64"},
        {"max_position_embeddings": "x"},
    ],
    ids=str,
)  # fmt: skip
def test_a_configuration_that_cannot_be_is_one_line(tmp_path: Path, values: dict[str, Any]):
    config = {**config_like("opt-175b").to_dict(), **values}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = plan("--model", tmp_path)
    assert (result.exit_code, result.stdout) == (1, ""), result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")


@pytest.mark.parametrize(
    "changed",
    [{"candidates": "x"}, {"candidates": None}, {"candidates": -1}, {"candidates": 0.5},
     {"candidates": 10**30}, {"share": "0.1"}, {"share": 7}, {"method": 3}],
    ids=str,
)  # fmt: skip
def test_a_mask_that_says_what_cannot_be_is_one_line(tmp_path: Path, changed: dict[str, Any]):
    name = "model.decoder.layers.0.fc1.weight"
    tensors = {f"{name}.indices": torch.arange(9), f"{name}.scores": torch.ones(9)}
    origin = {"method": "random", "scope": "global", "share": 0.1, "candidates": 1000, **changed}
    path = tmp_path / "mask.safetensors"
    save_file(tensors, path, {FORMAT: json.dumps(origin)})
    trainable = {"mode": "sparse", "mask": str(path)}
    ds = {"train_batch_size": 1, "zeroth_order": {"wire": "nf4", "trainable": trainable}}
    (tmp_path / "ds.json").write_text(json.dumps(ds))
    result = plan("--model", "opt-125m", "--config", tmp_path / "ds.json")
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert f"{path}: no mask of this zo_offload: its metadata" in line


def test_what_is_printed_is_taken_where_updates_on_the_device_would_be_quickest():
    """With units on a disk training updates them in host memory, however slow that is."""
    found = planned("--model", "llama-3-8b", "--device-gb", 8, "--host-gb", 16, "--host-gbps", 5)
    assert found["units"]["nvme"] > 0
    assert not any("training does not take this" in note for note in found["notes"])
