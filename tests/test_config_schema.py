"""The JSON Schema: what users copy is allowed, and what reading refuses is not."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from json_schema import mistakes

from zo_offload import cli
from zo_offload.config import parse_config
from zo_offload.config_schema import DIALECT, json_schema
from zo_offload.deepspeed_keys import check_keys
from zo_offload.errors import ConfigError

FILES = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.json"))


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json_schema()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_config_is_allowed(path: Path, schema: dict[str, Any]):
    assert mistakes(json.loads(path.read_text()), schema, schema) == []


GOOD = [
    {},
    {"eps": 1, "probes": None, "guard": None, "clip": "none"},
    {"device_budget": "1.5GiB", "host_budget": 2**40, "unit": "linear", "wire": "nf4:64"},
    {"unit": ["OPTDecoderLayer"], "offload_param": {"device": "nvme", "nvme_path": ["/a", "/b"]}},
    {"trainable": {"layers": [0, "20-31", -1], "kinds": ["vector"], "rotate": {"blocks": 2}}},
    {"trainable": {"mode": "peft", "peft_config": {"peft_type": "LORA", "r": 8}}},
    {"update": {"type": "adam", "beta1": 0, "lag": 1024}, "aio": {"block_size": "4KiB"}},
]


@pytest.mark.parametrize("block", GOOD, ids=repr)
def test_a_block_is_allowed_as_it_is_read(block: dict[str, Any], schema: dict[str, Any]):
    config = {"zeroth_order": block}
    parse_config(config)
    assert mistakes(config, schema, schema) == []


BAD_BLOCKS = [
    {"probs": 1},
    {"offload_param": {"devcie": "cpu"}},
    {"offload_param": {"device": "nvme", "nvme_path": ["/a", "/a"]}},
    {"eps": 0},
    {"eps": "1e-3"},
    {"probes": True},
    {"seed": 2**64},
    {"clip": 0},
    {"natural": 0},
    {"device_budget": "8 gigabytes"},
    {"device_budget": 0},
    {"unit": "layer"},
    {"unit": []},
    {"wire": "int8:32"},
    {"wire": "identity:64"},
    {"trainable": {"layers": ["a-b"]}},
    {"trainable": {"kinds": ["q_proj"]}},
    {"update": {"lag": 1025}},
    {"aio": {"block_size": 5000}},
    {"aio": {"use_gds": True}},
    {"guard": {"nonfinite": "warn"}},
    "auto",
]
BAD_BESIDE = [
    {"train_batch": 1},
    {"amp": {"enabled": True}},
    {"bf16": {"enable": True}},
    {"zero_optimization": {"cpu_offload": True}},
    {"zero_optimization": {"stag": 0}},
    {"zero_optimization": {"stage": 2}},
    {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
    {"zero_optimization": {"offload_param": {"device": "disk"}}},
    {"flops_profiler": {"enable": True}},
]


@pytest.mark.parametrize(
    "config",
    [{"zeroth_order": block} for block in BAD_BLOCKS]
    + [{"zeroth_order": {}, **keys} for keys in BAD_BESIDE]
    + [{}],
    ids=repr,
)
def test_what_reading_refuses_is_not_allowed(config: dict[str, Any], schema: dict[str, Any]):
    def read() -> None:
        check_keys(config)
        parse_config(config)

    with pytest.raises(ConfigError):
        read()
    assert mistakes(config, schema, schema)


@pytest.mark.parametrize(
    "optimizer", [{"type": "ZO", "params": {"betas": [0, 1]}}, {"params": {"lr": -1}}, {"kind": 1}]
)
def test_an_optimizer_that_is_refused(optimizer: dict[str, Any], schema: dict[str, Any]):
    assert mistakes({"zeroth_order": {}, "optimizer": optimizer}, schema, schema)


def test_others_optimizers_may_have_params_of_their_own(schema: dict[str, Any]):
    config = {
        "zeroth_order": {},
        "optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.99], "lr": 1e-3}},
        "zero_optimization": {"stage": 0, "offload_param": {"device": "cpu", "buffer_size": 1e8}},
        "amp": {"enabled": False},
        "gradient_clipping": 1.0,
    }
    assert mistakes(config, schema, schema) == []


def test_the_command_prints_it(schema: dict[str, Any]):
    done = CliRunner().invoke(cli.main, ["config", "schema"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == schema
    assert schema["$schema"] == DIALECT
