"""Kinds of parameters are found in every architecture, by what they do."""

import re

import pytest
from models.table import ROWS
from torch import nn

from trainable.modes import masters
from zo_offload.config import ZOConfig, parse_config
from zo_offload.errors import ConfigError
from zo_offload.step import Stepper
from zo_offload.trainable.kinds import by_kind

WITHOUT = {"plain", "mixtral", "qwen3-moe", "mamba", "swin"}  # shapes that the rule below is not of


def widths(name: str, parameter: nn.Parameter) -> tuple[int, int]:
    """Into a matrix and out of it; GPT-2's lie the other way round."""
    into, out = parameter.shape[1], parameter.shape[0]
    return (out, into) if "transformer.h." in name else (into, out)


@pytest.mark.parametrize("row", ROWS.keys() - WITHOUT)
def test_down_projections_are_those_that_narrow(row: str):
    """Models of the table are wider inside than outside, and nothing else of a block narrows."""
    net = ROWS[row].build()
    of_blocks = {n: p for n, p in net.named_parameters() if re.search(r"\.\d+\.", n)}
    narrowing = {
        name
        for name, p in of_blocks.items()
        if p.ndim == 2 and widths(name, p)[0] > widths(name, p)[1]
        and not re.search(r"relative|[kv]_proj", name)
    }  # fmt: skip
    found = by_kind(net, ["down_proj"])
    assert found == narrowing
    assert all(any(name.startswith(unit) for name in found) for unit in ROWS[row].units)


@pytest.mark.parametrize("row", ROWS.keys() - {"plain", "mamba"})
def test_output_projections_are_one_in_every_attention(row: str):
    """As many as there are value projections, or joint ones of queries, keys and values."""
    net = ROWS[row].build()
    values = r"(v_proj|c_attn|query_key_value|\.value|\.v|in_proj|value_proj)\.weight$"
    expected = [name for name, _ in net.named_parameters() if re.search(values, name)]
    found = by_kind(net, ["o_proj"])
    assert len(found) == len(expected) > 0
    assert not found & by_kind(net, ["down_proj"])
    narrow = {name: p.shape for name, p in net.named_parameters() if name in found}
    assert len(set(narrow.values())) <= (2 if row in ("clip", "swin") else 1)


@pytest.mark.parametrize(
    ("row", "ending"),
    [
        ("mixtral", "mlp.experts.down_proj"),
        ("qwen3-moe", "mlp.experts.down_proj"),
        ("mamba", "mixer.out_proj.weight"),
        ("swin", "mlp.fc2.weight"),
    ],
)
def test_down_projections_of_others(row: str, ending: str):
    net = ROWS[row].build()
    found = by_kind(net, ["down_proj"])
    assert found
    assert found <= by_kind(net, ["o_proj", "down_proj"])  # Mamba has no attention
    assert all(name.endswith(ending) for name in found)


def test_kinds_choose_together_with_names_and_layers():
    net = ROWS["opt"].build()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    said = {"kinds": ["down_proj", "vector"], "parameters": ["*.fc2.*"], "layers": [1]}
    with Stepper(net, ZOConfig.model_validate({"trainable": said})) as stepper:
        stepper.train_step([ROWS["opt"].inputs(5)], 1e-2)
        after = masters(stepper)
    moved = {name for name, value in after.items() if not value.equal(before[name])}
    assert moved == {f"model.decoder.layers.1.fc2.{part}" for part in ("weight", "bias")}


def test_what_is_of_no_kind_is_refused():
    with pytest.raises(ConfigError, match="none of 2 parameters is known as a down projection"):
        by_kind(nn.Sequential(nn.Linear(2, 2)), ["down_proj"])
    with pytest.raises(ConfigError, match="kinds: expected a list of some of 'down_proj', 'o_"):
        parse_config({"zeroth_order": {"trainable": {"kinds": ["up_proj"]}}})
    with pytest.raises(ConfigError, match=r'trainable.kinds: is of "mode": "full"'):
        parse_config({"zeroth_order": {"trainable": {"mode": "peft", "kinds": ["vector"]}}})
