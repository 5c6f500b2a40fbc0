"""``generate()`` on the current weights, and inside lanes that end at different lengths."""

import copy
from contextlib import closing
from typing import Any

import pytest
import torch
from torch import nn

from models.perturbed import perturbed
from models.table import ROWS, tokens
from zo_offload.config import OffloadConfig, ZOConfig
from zo_offload.errors import ModelError
from zo_offload.generators import lane_seed
from zo_offload.objective import Objective
from zo_offload.ops import Draw
from zo_offload.step import Stepper

# Many end tokens, so that random models end early, each at its own length.
ENDS = list(range(4, 24))
MODES = {
    "greedy": ({}, ["opt", "llama", "mixtral", "mamba", "t5"]),
    "beam": ({"num_beams": 3}, ["opt", "bart"]),
    "sampling": ({"do_sample": True, "top_k": 0}, ["gpt2", "t5"]),
}
STATIC = {"cache_implementation": "static"}
CONFIG = ZOConfig(seed=3, eps=0.2, offload_param=OffloadConfig(device="cpu"))

in_all_modes = pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param(name, mode, id=f"{name}-{label}")
        for label, (mode, names) in MODES.items()
        for name in names
    ],
)


def generate(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    return model.generate(**batch, eos_token_id=ENDS, pad_token_id=1)


GENERATED = Objective(forward=generate, loss=lambda model, batch, outputs: outputs.float().mean())


@in_all_modes
def test_on_current_weights(name: str, mode: dict[str, Any]):
    model = ROWS[name].build()
    batch = {"input_ids": tokens(5), "max_new_tokens": 8, **mode}
    with closing(Stepper(copy.deepcopy(model), CONFIG)) as stepper:
        stepper.weights.poison = True
        torch.manual_seed(11)
        found = stepper.run_model(lambda: generate(stepper.model, batch))
    torch.manual_seed(11)
    assert torch.equal(found, generate(model, batch))


@in_all_modes
def test_in_lanes(name: str, mode: dict[str, Any]):
    model = ROWS[name].build()
    batches = [
        {"input_ids": tokens(length)[:1], "max_new_tokens": most, **mode}
        for length, most in ((5, 8), (9, 3))
    ]
    with closing(Stepper(copy.deepcopy(model), CONFIG, objective=GENERATED)) as stepper:
        stepper.weights.poison = True
        draws = stepper.draws()
        results = [outputs for _, outputs in stepper.run_lanes(batches, draws)]
    expected = [
        alone(model, draw, batch, i) for _, _, draw in draws for i, batch in enumerate(batches)
    ]
    assert [result.tolist() for result in results] == [other.tolist() for other in expected]
    assert len({result.shape[1] for result in results}) > 1


def test_static_cache_on_current_weights():
    test_on_current_weights("llama", STATIC)


def test_static_cache_in_lanes_is_refused():
    """Its capacity stays on the model, so lanes of other lengths would find it there."""
    batch = {"input_ids": tokens(5), "max_new_tokens": 3, **STATIC}
    with (
        closing(Stepper(ROWS["llama"].build(), CONFIG, objective=GENERATED)) as stepper,
        pytest.raises(
            ModelError, match="leaves state in '_previous_max_cache_length' of the model"
        ),
    ):
        stepper.train_step([batch], lr=1e-3)
    assert stepper.step == 0


def alone(
    model: nn.Module, draw: Draw, batch: dict[str, Any], micro_batch: int = 0
) -> torch.Tensor:
    """What a separate perturbed copy generates, from the generator state of every lane."""
    torch.manual_seed(lane_seed(draw.seed, draw.step, micro_batch))
    return generate(perturbed(model, draw, torch.float32), batch)
