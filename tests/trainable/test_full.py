"""Parameters by name, layer and turn: what is left alone costs nothing, what is wrong is named."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from models.table import ROWS, Plain, vectors
from torch import nn
from transformers import AutoModelForCausalLM

from trainable.modes import BATCH, LR, MODES, differing, masters, model, stepper_of
from zo_offload import ops
from zo_offload.config import ZOConfig, parse_config
from zo_offload.errors import ConfigError
from zo_offload.offload.staged import Staged
from zo_offload.step import Stepper
from zo_offload.trainable.full import Full
from zo_offload.weights import Weights


def test_what_does_not_move_is_written_once_for_both_signs(monkeypatch: pytest.MonkeyPatch):
    perturbed, looked = [], []
    perturb, look = ops.perturb, Weights._look

    def spy(span: Any, *args: Any, **kwargs: Any) -> None:
        perturbed.append(span.segments[0].name)
        perturb(span, *args, **kwargs)

    def spy_look(self: Weights, span: Any, *args: Any, **kwargs: Any) -> None:
        looked.append(span.segments[0].name)
        look(self, span, *args, **kwargs)

    monkeypatch.setattr(ops, "perturb", spy)
    monkeypatch.setattr(Weights, "_look", spy_look)
    with closing(stepper_of("rotate", probes=2, offload_param={"device": "cpu"})) as stepper:
        for step in range(6):
            perturbed.clear()
            looked.clear()
            stepper.train_step([BATCH], LR)
            assert all(MODES["rotate"].moves(name, step) for name in perturbed), step
            still = [unit for unit in stepper.weights.map.units if unit.name.endswith("layers.1")]
            expected = [span.segments[0].name for unit in still for span in unit.spans]
            found = [name for name in looked if "layers.1." in name]
            assert found == ([] if MODES["rotate"].moves(expected[0], step) else expected), step


@pytest.mark.parametrize("device", ["none", "cpu"])
def test_what_does_not_move_beside_what_does_is_written_once_a_visit(
    device: str, monkeypatch: pytest.MonkeyPatch
):
    """Of a unit in which one matrix moves: six points, and the rest of it decoded once."""
    looked, look = [], Weights._look

    def spy_look(self: Weights, span: Any, *args: Any, **kwargs: Any) -> None:
        looked.append(span)
        look(self, span, *args, **kwargs)

    monkeypatch.setattr(Weights, "_look", spy_look)
    block = {
        "probes": 3,
        "wire": "int8",
        "offload_param": {"device": device},
        "trainable": {"kinds": ["down_proj"]},
    }
    with closing(Stepper(model(), ZOConfig.model_validate(block))) as stepper:
        spans = [span for unit in stepper.weights.map.units for span in unit.spans]
        still = [span for span in spans if not span.trainable]
        assert 0 < len(still) < len(spans)
        for _ in range(2):
            looked.clear()
            stepper.train_step([BATCH, BATCH], LR)
            assert looked == still


def test_what_does_not_move_is_not_written_back(tmp_path: Path):
    """In six steps: two units each, or two units twice and what lies outside them twice."""

    def written(**trainable: Any) -> int:
        offload = {"device": "nvme", "nvme_path": str(tmp_path / "units")}
        block = {"offload_param": offload, "trainable": trainable}
        with closing(Stepper(model(), ZOConfig.model_validate(block))) as stepper:
            for _ in range(6):
                stepper.train_step([BATCH], LR)
            stepper.evaluate(BATCH)
            assert stepper.weights.files is not None
            assert isinstance(stepper.weights.at.staged, Staged)
            stepper.weights.at.staged.drain()  # what is under way is counted when it has landed
            return stepper.weights.files.bytes_written

    every = written()
    assert every > 0
    assert written(rotate={"interval": 1}) * 12 == every * 4


def test_decay_is_of_all_weights_at_any_turn():
    """As the journal applies it: the factor of a step, whoever's turn the step is."""
    with closing(stepper_of("rotate")) as stepper:
        before = masters(stepper)
        stepper.train_step([BATCH], LR, weight_decay=0.5)
        factor = stepper.journal.records[0].decay
        assert factor < 1.0
        after = masters(stepper)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(after[name], (before[name].double() * factor).float())


def test_it_exports_a_plain_model(tmp_path: Path):
    with closing(stepper_of("layers")) as stepper:
        for _ in range(2):
            stepper.train_step([BATCH], LR)
        stepper.trainable.save(stepper.model, stepper.weights, tmp_path / "model")
        expected = masters(stepper)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert differing(expected, {k: p.data for k, p in loaded.named_parameters()}) == []


def test_flags_are_given_back():
    plain = model()
    plain.get_parameter("lm_head.weight").requires_grad_(False)
    before = {name: p.requires_grad for name, p in plain.named_parameters()}
    config = ZOConfig.model_validate({"trainable": {"layers": [0]}})
    with closing(Stepper(plain, config)):
        assert sum(p.requires_grad for p in plain.parameters()) == 9
    assert {name: p.requires_grad for name, p in plain.named_parameters()} == before
    config = ZOConfig.model_validate({"trainable": {"layers": [0]}, "device_budget": 1})
    with pytest.raises(Exception, match="device_budget"):
        Stepper(plain, config)
    assert {name: p.requires_grad for name, p in plain.named_parameters()} == before


def chosen(net: nn.Module, **trainable: Any) -> set[str]:
    full = Full(ZOConfig.model_validate({"trainable": trainable}))
    return {name for name, p in full.prepare(net).named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("layers", "expected"),
    [([0], {0}), (["-1"], {2}), (["0-1"], {0, 1}), (["1--1"], {1, 2}), ([0, "2-2"], {0, 2})],
)
def test_layers(layers: list, expected: set[int]):
    assert {name.split(".")[1] for name in chosen(Plain(3), layers=layers)} == set(
        map(str, expected)
    )


def test_a_tied_parameter_is_known_by_each_of_its_names():
    assert chosen(ROWS["opt"].build(), parameters=["lm_head.weight"]) == {
        "model.decoder.embed_tokens.weight"
    }


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        ({"parameters": ["*.liner.*"]}, r"'\*.liner.\*' matches none of 16 .* nearest is blocks"),
        ({"layers": [3]}, "no layer 3: the model has 3, from 0 to 2; the nearest is 2"),
        ({"layers": ["1-7"]}, "no layer 7"),
        ({"layers": ["-1-0"]}, "'-1-0' is empty: 0 lies before 2"),
        ({"layers": [0], "parameters": ["leave.*"]}, "choose none of the model's 16 trainable"),
    ],
)
def test_what_fits_no_model_is_refused(trainable: dict, message: str):
    net = Plain(3)
    with pytest.raises(ConfigError, match=message):
        Stepper(net, ZOConfig.model_validate({"trainable": trainable}))
    assert all(parameter.requires_grad for parameter in net.parameters())
    with closing(Stepper(net)) as stepper:  # nothing was taken
        stepper.train_step([vectors(2)], LR)


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        ({"rotate": {"block": 1}}, "trainable.rotate.block: unknown key; did you mean 'blocks'"),
        ({"rotate": {"interval": 0}}, "trainable.rotate.interval: expected at least 1, found 0"),
        ({"rotate": 3}, "trainable.rotate: expected an object, found 3"),
        ({"layers": ["x"]}, "trainable.layers: expected a list of layer numbers"),
        ({"layers": [True]}, "trainable.layers: expected a list of layer numbers"),
        ({"parameters": "*"}, "trainable.parameters: expected a list of patterns"),
        ({"parameters": ["auto"]}, 'trainable.parameters: "auto" belongs to the Trainer'),
        ({"pattern": []}, "trainable.pattern: unknown key; did you mean 'parameters'"),
        ({"mode": "peft", "layers": [0]}, 'trainable.layers: is of "mode": "full"'),
        ({"peft_config": {}}, 'trainable.peft_config: is of "mode": "peft", found "full"'),
        ({"mode": "peft", "peft_config": {}, "adapter": "x"}, "keep one of the two"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(trainable: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        parse_config({"zeroth_order": {"trainable": trainable}})
