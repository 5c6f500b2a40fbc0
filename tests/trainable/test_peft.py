"""Adapters: their own files, given or made, by the JSON or the caller; the base stays as it is."""

import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models.table import ROWS
from safetensors.torch import load_file, save_file
from torch import nn

from trainable.modes import BATCH, LR, MODES, PEFT, differing, lora, masters, model, stepper_of
from zo_offload.config import ZOConfig
from zo_offload.errors import ConfigError, ModelError, StoreError
from zo_offload.step import Stepper
from zo_offload.trainable.peft import ADAPTER, base_of

KINDS = {
    **{name: MODES[name].trainable["peft_config"] for name in PEFT},
    "all-linear": {"peft_type": "LORA", "r": 2, "target_modules": "all-linear", "bias": "all"},
    "head": {"peft_type": "LORA", "r": 2, "modules_to_save": ["lm_head"]},
    "p-tuning": {"peft_type": "P_TUNING", "num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "vera": {"peft_type": "VERA", "r": 4},
    "hra": {"peft_type": "HRA", "r": 2, "target_modules": ["q_proj"]},
    "lokr": {"peft_type": "LOKR", "r": 2, "target_modules": ["q_proj"]},
    "adaption-prompt": {"peft_type": "ADAPTION_PROMPT", "adapter_len": 2, "adapter_layers": 1},
}


def made_of(base: nn.Module, kind: str = "lora") -> Any:
    settings = {"task_type": "CAUSAL_LM", **KINDS[kind]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peft.get_peft_model(base, peft.get_peft_config(settings))


def saved(stepper: Stepper, folder: Path) -> Path:
    stepper.trainable.save(stepper.model, stepper.weights, folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "unit"),
    [(kind, None) for kind in KINDS] + [(kind, "linear") for kind in ("lora", "hra", "prefix")],
)
def test_files_load_to_equal_outputs(kind: str, unit: Any, tmp_path: Path):
    block = {"mode": "peft", "peft_config": KINDS[kind]}
    settings = {"trainable": block, "unit": unit, "offload_param": {"device": "cpu"}}
    with closing(Stepper(model(), ZOConfig.model_validate(settings))) as stepper:
        units = [each.name for each in stepper.weights.map.units]
        assert len(units) == (2 if unit is None else 14)
        assert all(each.is_frozen for each in stepper.weights.map.units)
        for _ in range(2):
            stepper.train_step([BATCH], LR)
        expected = stepper.evaluate(BATCH)[0]
        folder = saved(stepper, tmp_path)
    files = {path.name for path in folder.iterdir()} - {"README.md"}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    loaded = peft.PeftModel.from_pretrained(model(), folder).eval()
    with torch.no_grad():
        assert float(loaded(**BATCH).loss) == expected


def test_its_base_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    given: Any = model()
    given.config.save_pretrained("base")
    given.name_or_path = "base"
    with closing(Stepper(made_of(given))) as stepper:
        assert base_of(saved(stepper, tmp_path / "out")) == str(tmp_path / "base")


def test_a_given_adapter_goes_on_from_its_files(tmp_path: Path):
    """By the caller, or by the JSON: the same bits, and other ones than at the beginning."""
    with closing(Stepper(made_of(model()))) as stepper:
        assert stepper.trainable.mode == "peft"
        stepper.train_step([BATCH], LR)
        first = masters(stepper)
        saved(stepper, tmp_path)
    ends = []
    adapter = {"mode": "peft", "adapter": str(tmp_path)}
    given = peft.PeftModel.from_pretrained(model(), tmp_path, is_trainable=True)
    for base, block in ((given, {}), (model(), adapter)):
        with closing(Stepper(base, ZOConfig.model_validate({"trainable": block}))) as stepper:
            assert differing(first, masters(stepper)) == []
            stepper.train_step([BATCH], LR)
            ends.append(masters(stepper))
    assert differing(*ends) == []
    assert all("lora_" in name for name in differing(first, ends[0]))


def test_first_values_are_of_the_seed_alone():
    def begun(seed: int, other: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(other)
        with closing(stepper_of("lora", seed=seed)) as stepper:
            found = torch.initial_seed()
            assert found == other  # the caller's generator is as it was
            return masters(stepper)

    assert differing(begun(1, 10), begun(1, 11)) == []
    assert all("lora_A" in name for name in differing(begun(1, 10), begun(2, 10)))


@pytest.mark.parametrize("kind", ["prompt", "prefix", "p-tuning"])
def test_prompts_go_on_from_their_file(kind: str, tmp_path: Path):
    """As the vectors that were saved, whatever made them."""
    block = {"mode": "peft", "peft_config": KINDS[kind]}
    with closing(Stepper(model(), ZOConfig.model_validate({"trainable": block}))) as stepper:
        stepper.train_step([BATCH], LR)
        expected = stepper.evaluate(BATCH)
        saved(stepper, tmp_path)
    block = {"mode": "peft", "adapter": str(tmp_path)}
    with closing(Stepper(model(), ZOConfig.model_validate({"trainable": block}))) as stepper:
        assert stepper.evaluate(BATCH) == expected
        before = masters(stepper)
        stepper.train_step([BATCH], LR)
        name = "prompt_encoder.default.embedding.weight"
        assert differing(before, masters(stepper)) == [name]
        moved = stepper.evaluate(BATCH)
        assert moved != expected
        saved(stepper, tmp_path / "again")
    loaded = peft.PeftModel.from_pretrained(model(), tmp_path / "again").eval()
    with torch.no_grad():
        assert float(loaded(**BATCH).loss) == moved[0]


def test_a_base_in_bfloat16_has_adapters_with_fp32_masters():
    with closing(stepper_of("lora", torch.bfloat16)) as stepper:
        spans = [span for unit in stepper.weights.map.everything for span in unit.spans]
        assert all(
            span.rest_bytes == (2 * span.elements if span.trainable else 0) for span in spans
        )
        before = masters(stepper)
        stepper.train_step([BATCH], 1e-5)
        assert differing(before, masters(stepper)) != []


def test_after_a_run_the_adapter_holds_its_values():
    base = model()
    with closing(Stepper(base, ZOConfig.model_validate({"trainable": lora()}))) as stepper:
        stepper.train_step([BATCH], LR)
        expected, adapted = stepper.evaluate(BATCH)[0], stepper.model
    with torch.no_grad():
        assert float(adapted(**BATCH).loss) == expected
        assert float(base(**BATCH).loss) == expected  # peft puts its layers into the model given
    assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        ({}, '"peft_config": {"peft_type": "LORA"'),
        ({"peft_config": {"r": 4}}, "peft_config.peft_type: valid keys: .* found null"),
        ({"peft_config": {"peft_type": "LORRA"}}, "did you mean 'LORA'"),
        (
            {"peft_config": {"peft_type": "LORA", "ranks": 4}},
            "peft_config.ranks: unknown key of LO",
        ),
        ({"peft_config": {"peft_type": "LORA", "r": 0}}, "peft_config: .* `r` should be"),
        (
            {"peft_config": {"peft_type": "LORA", "layers_pattern": "layers"}},
            "^zeroth_order.trainable.peft_config: When .layers_pattern. .*; write the keys as peft",
        ),
        (
            {"peft_config": {"peft_type": "LORA", "target_modules": ["qproj"]}},
            "peft_config: .*qproj.* not found",
        ),
        (
            {"peft_config": {"peft_type": "LORA", "init_lora_weights": "pissa"}},
            "'pissa' writes into the base's weights",
        ),
        ({"adapter": "/nowhere"}, "adapter: no adapter_config.json in /nowhere"),
    ],
)
def test_what_is_wrong_is_refused(trainable: dict, message: str):
    base = model()
    block = ZOConfig.model_validate({"trainable": {"mode": "peft", **trainable}})
    with pytest.raises(ConfigError, match=message):
        Stepper(base, block)
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_an_adapter_of_another_model_is_refused(tmp_path: Path):
    made_of(model()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: torch.ones(3, 3) for name in load_file(path)}, path)
    block = ZOConfig.model_validate({"trainable": {"mode": "peft", "adapter": str(tmp_path)}})
    with pytest.raises(ConfigError, match=rf"adapter: {tmp_path}: .*; give an adapter of this mod"):
        Stepper(model(), block)


def test_no_code_of_an_adapters_pickle_is_run(tmp_path: Path):
    made_of(model()).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({"a": Path("here")}, tmp_path / "adapter_model.bin")  # noqa: TID251 others may
    block = ZOConfig.model_validate({"trainable": {"mode": "peft", "adapter": str(tmp_path)}})
    with pytest.raises(ConfigError, match=r"asks to run pathlib\.PosixPath, and no code") as raised:
        Stepper(model(), block)
    assert "weights_only" not in str(raised.value)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"needs the peft library \(.*\); pip install peft"):
        Stepper(model(), ZOConfig.model_validate({"trainable": lora()}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"base_model_name_or_path": null}', "names no model; write its directory there"),
        ("{", "cannot be read: Expecting .*; save the adapter again"),
    ],
)
def test_an_adapter_that_names_no_base(tmp_path: Path, text: str, message: str):
    (tmp_path / ADAPTER).write_text(text)
    with pytest.raises(ModelError, match=rf"{ADAPTER}: .*{message}"):
        base_of(tmp_path)


def test_a_model_is_as_it_was_where_no_run_came_of_it():
    base = model()
    names = [name for name, _ in base.named_parameters()]
    for _ in range(2):
        block = ZOConfig.model_validate({"trainable": lora(), "device_budget": 1})
        with pytest.raises(StoreError, match="device_budget"):
            Stepper(base, block)
        assert [name for name, p in base.named_parameters() if p.requires_grad] == names
    with closing(Stepper(base)):
        with pytest.raises(ModelError, match="in the store of another"):
            Stepper(base, ZOConfig.model_validate({"trainable": lora()}))
        assert [name for name, _ in base.named_parameters()] == names


def test_adapters_that_would_not_move_are_refused():
    merged = made_of(model())
    merged.merge_adapter()
    with pytest.raises(ModelError, match="q_proj: adapter 'default' is merged"):
        Stepper(merged)
    frozen = made_of(model()).requires_grad_(False)
    with pytest.raises(ModelError, match="is_trainable=True"):
        Stepper(frozen)
    with pytest.raises(ModelError, match="every parameter moves, the base's too"):
        Stepper(made_of(model()).requires_grad_(True))
    with pytest.raises(ConfigError, match="layers: the model is a PeftModel"):
        Stepper(made_of(model()), ZOConfig.model_validate({"trainable": {"layers": [0]}}))
    with pytest.raises(ConfigError, match='master: "bf16_sr" would save next to nothing'):
        stepper_of("lora", torch.bfloat16, master="bf16_sr")


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "mixtral", "gpt-neox"])
def test_units_of_other_architectures_are_found(name: str):
    base = ROWS[name].build()
    targets = ["q_proj", "c_attn", "query_key_value"]
    block = lora(target_modules=targets, fan_in_fan_out=name == "gpt2")
    with closing(Stepper(base, ZOConfig.model_validate({"trainable": block}))) as stepper:
        units = tuple(each.name for each in stepper.weights.map.units)
        assert units == tuple(f"base_model.model.{path}" for path in ROWS[name].units)
        stepper.train_step([ROWS[name].batch(6)], LR)
