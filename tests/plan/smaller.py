"""The ready shapes, small enough to be built: the same blocks, narrow, two layers."""

from typing import Any

import transformers

from zo_offload.plan.shapes import READY

SMALLER = {
    "opt-175b": {"hidden_size": 96, "word_embed_proj_dim": 96, "ffn_dim": 384, "vocab_size": 512},
    "llama-2-7b": {"hidden_size": 96, "intermediate_size": 256, "vocab_size": 512},
    "llama-3-8b": {"hidden_size": 64, "intermediate_size": 224, "vocab_size": 640},
    "qwen3-8b": {"hidden_size": 64, "intermediate_size": 192, "vocab_size": 512, "head_dim": 16},
    "qwen3-235b-a22b": {
        "hidden_size": 64, "moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 4,
        "head_dim": 32, "vocab_size": 512,
    },
}  # fmt: skip


def config_like(name: str, **others: Any) -> Any:
    """Two layers of the shape, narrow."""
    kind, values = READY[name]
    few = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    if "num_key_value_heads" in values:
        few["num_key_value_heads"] = 2
    return getattr(transformers, kind)(**values | few | SMALLER[name] | others)
