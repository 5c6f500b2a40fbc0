"""The planned activations hold those of a real forward, and are not far above them."""

import weakref
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plan.smaller import SMALLER, config_like
from zo_offload.plan.search import Layouts
from zo_offload.plan.shapes import READY

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


def is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def a_config(name: str) -> Any:
    if name in SMALLER:
        return config_like(name)
    kind, values = READY[name]
    few = {
        "hidden_size": 64, "moe_intermediate_size": 24, "num_experts": 8, "num_hidden_layers": 2,
        "num_experts_per_tok": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 32, "vocab_size": 512,
    }  # fmt: skip
    return getattr(transformers, kind)(**values | few)


@pytest.mark.parametrize("name", ["opt-175b", "llama-3-8b", "qwen3-8b", "qwen3-235b-a22b"])
def test_a_block_holds_what_is_planned(name: str):
    config = a_config(name)
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
    dims = Layouts(config, torch.float32).at("block", "fp32").dims
    planned = dims.inner * TOKENS * 4
    assert 0.8 * planned <= peaks[0] <= planned
