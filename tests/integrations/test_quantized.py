"""Checkpoints whose weights are codes already are refused by name, before a weight is read."""

import json
from pathlib import Path
from typing import Any

import pytest
from models.table import ROWS

from zo_offload.errors import ModelError
from zo_offload.integrations.hf import load_causal_lm

METHODS: list[tuple[dict[str, Any], str, str]] = [
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq", "int4"),
    ({"quant_method": "gptq", "bits": 8}, "gptq", "int8"),
    ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "awq", "int4"),
    (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "bitsandbytes",
        "nf4",
    ),
    ({"load_in_8bit": True}, "bitsandbytes", "int8"),
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8", "fp8_e4m3"),
    ({"quant_method": "compressed-tensors"}, "compressed-tensors", "int4"),
    ({"quant_method": "hqq", "quant_config": {}}, "hqq", "int4"),
    ({"some": "thing"}, "unknown method", "int4"),
]


@pytest.mark.parametrize(("options", "method", "wire"), METHODS)
def test_it_is_refused_by_name(tmp_path: Path, options: dict[str, Any], method: str, wire: str):
    model: Any = ROWS["llama"].make()
    content = {**json.loads(model.config.to_json_string()), "quantization_config": options}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    words = rf"quantized already \({method}\).*load the original weights, .*\"wire\": \"{wire}\""
    with pytest.raises(ModelError, match=words) as caught:
        load_causal_lm(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_older_key_is_known(tmp_path: Path):
    model: Any = ROWS["llama"].make()
    content = json.loads(model.config.to_json_string())
    content["compression_config"] = {"quant_method": "compressed-tensors"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"quantized already \(compressed-tensors\)"):
        load_causal_lm(tmp_path)
