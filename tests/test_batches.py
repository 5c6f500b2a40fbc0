"""Batches and outputs of many types keep their types."""

from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from zo_offload.midpoint import with_field
from zo_offload.objective import Inputs, call_with, model_loss, move_to


class Pair(NamedTuple):
    logits: Any
    loss: Any


class Bare:
    def __init__(self, **held: Any) -> None:
        vars(self).update(held)


class Add(nn.Module):
    def forward(self, x: int, y: int) -> int:
        return x + y


@pytest.mark.parametrize(
    "batch", [(1, 2), [1, 2], {"x": 1, "y": 2}, Inputs((1,), {"y": 2})], ids=type
)
def test_a_batch_is_passed_as_it_is_meant(batch: Any):
    assert call_with(Add(), batch) == 3


@pytest.mark.parametrize(
    "batch",
    [
        Pair(torch.ones(1), 2),
        [torch.ones(1), "text"],
        OrderedDict(x=torch.ones(1), deep=(torch.ones(2),)),
        Inputs((torch.ones(1),), {"y": None}),
    ],
    ids=type,
)
def test_moving_keeps_types(batch: Any):
    moved = move_to(batch, torch.device("meta"))
    assert type(moved) is type(batch)
    values = list(moved.values()) if isinstance(moved, dict) else list(moved)
    first = values[0][0] if isinstance(values[0], tuple) else values[0]
    assert first.device.type == "meta"
    assert len(values) == len(batch)


def test_a_replaced_field_leaves_the_rest():
    for outputs in (Pair(1, 2), Bare(logits=1, loss=2), {"logits": 1, "loss": 2}):
        changed = with_field(outputs, "loss", torch.ones(()))
        assert type(changed) is type(outputs)
        held = changed if isinstance(changed, dict) else {
            name: getattr(changed, name) for name in ("logits", "loss")
        }  # fmt: skip
        assert (held["logits"], float(held["loss"])) == (1, 1.0)
        assert model_loss(Add(), None, outputs) is None  # untouched, and no tensor


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_loss_is_found_wherever_it_stands(kind: type):
    logits, loss = torch.ones(2, 3), torch.tensor(0.5)
    for outputs in (kind([logits, loss]), kind([loss, logits])):
        assert model_loss(Add(), None, outputs) is loss
        changed = with_field(outputs, "loss", torch.tensor(2.0))
        assert type(changed) is kind
        assert [float(value.sum()) for value in changed] == [
            2.0 if value is loss else 6.0 for value in outputs
        ]
