"""The JSON files that users copy: every one is accepted whole."""

import json
from pathlib import Path

import pytest

from zo_offload.deepspeed_json import read_settings

FILES = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_config_is_accepted(path: Path):
    config = json.loads(path.read_text())
    for key, value in {
        "train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2
    }.items():  # fmt: skip
        if config.get(key) == "auto":  # the Trainer fills it in
            config[key] = value
    settings = read_settings(config)
    assert settings.zeroth_order.enabled


def test_the_page_names_every_config():
    page = (FILES[0].parents[1] / "docs" / "config.md").read_text()
    assert [path.name for path in FILES if path.name not in page] == []
