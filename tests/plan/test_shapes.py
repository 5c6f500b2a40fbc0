"""Ready shapes have the sizes that their authors published, and cost nothing to build."""

import pytest
import torch
from transformers import OPTConfig

from zo_offload.errors import ModelError
from zo_offload.granularity import GRANULARITIES
from zo_offload.plan.request import Request
from zo_offload.plan.search import Layouts
from zo_offload.plan.shapes import READY, build, config_of

PUBLISHED = {  # parameters in 10^9: model cards and reports
    "opt-125m": 0.1252, "opt-350m": 0.3312, "opt-1.3b": 1.3158, "opt-2.7b": 2.6516,
    "opt-6.7b": 6.6585, "opt-13b": 12.853, "opt-30b": 29.975, "opt-66b": 65.7, "opt-175b": 174.6,
    "llama-2-7b": 6.74, "llama-2-13b": 13.02, "llama-2-70b": 68.98,
    "llama-3-8b": 8.03, "llama-3-70b": 70.55, "llama-3-405b": 405.8,
    "qwen3-8b": 8.19, "qwen3-32b": 32.8, "qwen3-235b-a22b": 235.1,
}  # fmt: skip


@pytest.mark.parametrize("name", READY)
def test_parameters_are_the_published_ones(name: str):
    config, dtype = config_of(name.upper())
    layouts = Layouts(config, dtype)
    for granularity in GRANULARITIES:
        layout = layouts.at(Request(unit=granularity))
        assert layout.num_parameters == pytest.approx(PUBLISHED[name] * 1e9, rel=0.01)
        assert len(set(layout.names)) == len(layout.names)


def test_every_ready_shape_is_checked():
    assert PUBLISHED.keys() == READY.keys()


def test_active_parameters_of_experts_are_the_published_22b():
    config, dtype = config_of("qwen3-235b-a22b")
    dims = Layouts(config, dtype).at(Request()).dims
    assert dims.active == pytest.approx(22e9, rel=0.03)


def test_experts_are_divided():
    config, dtype = config_of("qwen3-235b-a22b")
    layouts = Layouts(config, dtype)
    linear = layouts.at(Request(unit="linear"))
    assert linear.names.count("model.layers.0.mlp.experts[127:128]") == 1
    assert int(linear.sizes("identity").wire.max()) == 2 * 4096 * 8192  # a query projection


def test_nothing_is_allocated():
    model = build(OPTConfig(num_hidden_layers=2))
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_near_name_is_refused_with_the_name_that_was_meant():
    with pytest.raises(ModelError, match=r"opt-175: no such shape.*did you mean opt-175b\?"):
        config_of("opt-175")


def test_a_directory_has_its_own_dtype(tmp_path):
    OPTConfig(num_hidden_layers=1, dtype="float16").save_pretrained(tmp_path)
    assert config_of(str(tmp_path))[1] == torch.float16


def test_what_is_no_language_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ModelError, match="ViTConfig: no language model"):
        build(config_of(str(tmp_path))[0])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"no configuration to be read.*one of opt-125m"):
        config_of(str(tmp_path))
