"""The JSON of a run whose command names none: what learnt most from a forward, measured.

The matrices that add to what flows between blocks learn most (docs/choosing.md). Where what moves
is settled already, all of it moves: a converted model in proportion to its size; an adapter not so,
because half of a LoRA begins at zero.
"""

from typing import Any

from zo_offload.converted import is_converted
from zo_offload.trainable.peft import base_of

PROJECTIONS: dict[str, Any] = {
    "train_batch_size": 16,
    "optimizer": {"type": "ZO", "params": {"lr": 2.0}},
    "zeroth_order": {
        "eps": 0.1,
        "probes": 4,
        "direction_scale": "relative",
        "trainable": {"kinds": ["o_proj", "down_proj"]},
        "offload_param": {"device": "cpu"},
    },
}
EVERYTHING: dict[str, Any] = {
    "train_batch_size": 16,
    "optimizer": {"type": "ZO", "params": {"lr": 7.5e-5}},
    "zeroth_order": {
        "eps": 1e-3,
        "direction_scale": "rms",
        "offload_param": {"device": "cpu"},
    },
}
ADAPTER: dict[str, Any] = {
    "train_batch_size": 16,
    "optimizer": {"type": "ZO", "params": {"lr": 1e-2}},
    "zeroth_order": {"eps": 1e-3, "probes": 4, "offload_param": {"device": "cpu"}},
}


def default_config(model: str) -> dict[str, Any]:
    """For a run on this model.

    Args:
        model: Directory or id.
    """
    if is_converted(model):
        return EVERYTHING
    return PROJECTIONS if base_of(model) is None else ADAPTER
