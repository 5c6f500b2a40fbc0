"""The JSON of a run whose command names none: what learnt most from a forward, measured.

The matrices that add to what flows between blocks learn most (docs/choosing.md). Where what moves
is settled already, by an adapter or by the layout of a converted model, all of it moves, in
proportion to its size.
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


def default_config(model: str) -> dict[str, Any]:
    """For a run on this model.

    Args:
        model: Directory or id.
    """
    settled = is_converted(model) or base_of(model) is not None
    return EVERYTHING if settled else PROJECTIONS
