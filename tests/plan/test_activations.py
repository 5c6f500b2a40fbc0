"""The planned activations hold those of a real forward, and are not far above them."""

import weakref
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.loss.loss_utils import ForCausalLMLoss

from plan.smaller import SMALLER, config_like
from zo_offload.config import ZOConfig
from zo_offload.plan.budget import place
from zo_offload.plan.request import Budgets, Request
from zo_offload.plan.search import Layouts
from zo_offload.step import Stepper

TOKENS = 64


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that operations have made and somebody still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if is_tensor(t)}
        for tensor in filter(is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            key, count = storage._cdata, storage.nbytes()
            if key not in given and key not in self._seen:
                self.held += count
                self._seen[key] = weakref.finalize(storage, self._let_go, key, count)
        self.peak = max(self.peak, self.held)
        return result

    def _let_go(self, key: int, count: int) -> None:
        self.held -= count
        del self._seen[key]


class Stops(TorchFunctionMode):
    """Notes what is held where the forward first reads an expert, and a lane may have to wait."""

    def __init__(self, live: Live, first: torch.nn.Parameter) -> None:
        super().__init__()
        self.live, self.first, self.peak = live, first, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__ and args[0] is self.first:
            self.peak = max(self.peak, self.live.held)
        return func(*args, **(kwargs or {}))


def is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


@pytest.mark.parametrize("name", SMALLER)
def test_a_block_holds_what_is_planned(name: str):
    config = config_like(name)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    decoder = getattr(model.model, "decoder", model.model)
    peaks = []

    def watched(block: Any) -> None:
        forward = block.forward

        def run(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            with Live() as live:
                result = forward(hidden, *args, **kwargs)
            peaks.append(live.peak + hidden.nbytes)
            return result

        block.forward = run

    watched(decoder.layers[1])
    with torch.no_grad():
        model(torch.randint(4, 500, (1, TOKENS)), use_cache=False)
    dims = Layouts(config, torch.float32).at(Request()).dims
    planned = dims.inner * TOKENS * 4
    assert 0.8 * planned <= peaks[0] <= planned


def test_a_lane_before_an_expert_holds_what_is_planned():
    """All tokens choose the same experts, so that each takes as much as it can."""
    config = config_like("qwen3-235b-a22b")
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")
    block, peaks = model.model.layers[1], []
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.zero_()
    forward = block.forward

    def run(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with Live() as live, Stops(live, block.mlp.experts.gate_up_proj) as stops:
            result = forward(hidden, *args, **kwargs)
        peaks.append(stops.peak + hidden.nbytes)
        return result

    block.forward = run
    with torch.no_grad():
        model(torch.randint(4, 500, (1, TOKENS)), use_cache=False)
    planned = Layouts(config, torch.float32).at(Request(unit="linear")).dims.boundary * TOKENS * 4
    assert 0.8 * planned <= peaks[0] <= planned


@pytest.mark.parametrize("head_chunk", [None, 64, 200])
def test_a_head_holds_what_is_planned(head_chunk: int | None):
    """Between the last block and the loss; on a CPU, whose converted parts are smaller."""
    config, request = config_like("qwen3-8b"), Request(length=TOKENS, head_chunk=head_chunk)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    held = []

    def loss(logits: Any, labels: Any, **_: Any) -> torch.Tensor:
        with Live() as live:
            found = ForCausalLMLoss(logits, labels, config.vocab_size)
        made = 0 if head_chunk else logits.nbytes  # before
        held.append(live.peak + made + TOKENS * config.hidden_size * 2)
        return found

    model.loss_function = loss
    tokens = torch.randint(4, 500, (1, TOKENS))
    chunked = ZOConfig(head_chunk=head_chunk)
    with closing(Stepper(model, chunked, dtype=torch.bfloat16)) as stepper:
        stepper.evaluate({"input_ids": tokens, "labels": tokens})
    layout = Layouts(config, torch.bfloat16).at(Request())
    planned = place(layout, replace(request, lowest="device"), Budgets()).device["logits"]
    assert held[0] <= planned
    if head_chunk:
        assert 0.8 * planned <= held[0]
