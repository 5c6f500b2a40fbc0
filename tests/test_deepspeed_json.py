"""What DeepSpeed's part of the JSON means, and what is told before DeepSpeed refuses it."""

import pytest

from zo_offload import deepspeed_json
from zo_offload.errors import ConfigError


@pytest.mark.parametrize(
    ("size", "micro", "mend"),
    [
        (16, 16, "write train_micro_batch_size_per_gpu 8, or train_batch_size 32"),
        (12, 4, "write train_micro_batch_size_per_gpu 2, or train_batch_size 16"),
        (7, 4, "write train_batch_size 8"),
    ],
)
def test_a_batch_that_two_ranks_cannot_share(
    monkeypatch: pytest.MonkeyPatch, size: int, micro: int, mend: str
):
    monkeypatch.setattr(deepspeed_json.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(deepspeed_json.dist, "get_world_size", lambda: 2)
    config = {
        "train_batch_size": size,
        "train_micro_batch_size_per_gpu": micro,
        "zeroth_order": {},
    }
    with pytest.raises(ConfigError) as caught:
        deepspeed_json.read_settings(config)
    said = str(caught.value)
    assert f"{size} examples are no whole number of micro-batches of {micro} on 2" in said
    assert said.endswith(f"; {mend}")
