"""Models by name, with the hyperparameters that their authors published; or any other, by its path.

A model is built on torch's meta device: modules and shapes, no values and no memory.

Reference: Zhang et al. (2022), arXiv 2205.01068, table 1 (OPT); Touvron et al. (2023), arXiv
2307.09288, table 1 and section 2.2 (Llama 2); Llama Team (2024), arXiv 2407.21783, table 3
(Llama 3); Qwen Team (2025), arXiv 2505.09388, tables 1 and 2 (Qwen3).
"""

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zo_offload.errors import ModelError
from zo_offload.integrations.hub import check_reached
from zo_offload.integrations.model_kind import kind_of_config
from zo_offload.kinds import LOADED_BY
from zo_offload.units import FORWARD_DTYPES
from zo_offload.wording import one_line

MOST = 10**9  # of anything that a model counts
# What modules raise where a configuration holds what cannot be.
BAD_VALUES = (
    OSError, ValueError, ImportError, TypeError, KeyError, AttributeError, ArithmeticError,
    RuntimeError, AssertionError, IndexError,
)  # fmt: skip


def _opt(width: int, layers: int, heads: int, **others: Any) -> tuple[str, dict[str, Any]]:
    return "OPTConfig", {
        "vocab_size": 50272, "max_position_embeddings": 2048, "hidden_size": width,
        "ffn_dim": 4 * width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "word_embed_proj_dim": width, **others,
    }  # fmt: skip


def _llama2(width: int, inner: int, layers: int, heads: int, groups: int) -> tuple[str, Any]:
    return "LlamaConfig", {
        "vocab_size": 32000, "max_position_embeddings": 4096, "hidden_size": width,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": groups,
    }  # fmt: skip


def _llama3(width: int, inner: int, layers: int, heads: int) -> tuple[str, dict[str, Any]]:
    return "LlamaConfig", {
        "vocab_size": 128256, "max_position_embeddings": 8192, "hidden_size": width,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": 8,
    }  # fmt: skip


def _qwen3(width: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "vocab_size": 151936, "max_position_embeddings": 40960, "hidden_size": width,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
    }  # fmt: skip


READY: dict[str, tuple[str, dict[str, Any]]] = {
    "opt-125m": _opt(768, 12, 12),
    "opt-350m": _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
    "opt-66b": _opt(9216, 64, 72),
    "opt-175b": _opt(12288, 96, 96),
    "llama-2-7b": _llama2(4096, 11008, 32, 32, 32),
    "llama-2-13b": _llama2(5120, 13824, 40, 40, 40),
    "llama-2-70b": _llama2(8192, 28672, 80, 64, 8),
    "llama-3-8b": _llama3(4096, 14336, 32, 32),
    "llama-3-70b": _llama3(8192, 28672, 80, 64),
    "llama-3-405b": _llama3(16384, 53248, 126, 128),
    "qwen3-8b": ("Qwen3Config", _qwen3(4096, 12288, 36, 32)),
    "qwen3-32b": ("Qwen3Config", _qwen3(5120, 25600, 64, 64)),
    "qwen3-235b-a22b": (
        "Qwen3MoeConfig",
        {
            **_qwen3(4096, 12288, 94, 64), "num_key_value_heads": 4, "num_experts": 128,
            "num_experts_per_tok": 8, "moe_intermediate_size": 1536,
        },
    ),
}  # fmt: skip
"""By name: a configuration class of transformers, and what it is called with."""


def config_of(name: str) -> tuple[Any, torch.dtype]:
    """A model's configuration, and the dtype of its forward where nothing else is said.

    Args:
        name: A key of ``READY`` in any case (those run in bfloat16), else a directory or model id.

    Raises:
        ModelError: It cannot be read.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    ready = READY.get(name.lower())
    if ready is not None:
        return getattr(transformers, ready[0])(**ready[1]), torch.bfloat16
    near = get_close_matches(name.lower(), READY, n=1, cutoff=0.75)
    if near and "/" not in name and not Path(name).is_dir():
        raise ModelError(f"{name}: no such shape or directory; did you mean {near[0]}?")
    check_reached(name)
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (*BAD_VALUES, StrictDataclassError) as error:
        raise ModelError(
            f"{name}: no configuration to be read ({one_line(str(error))[:160]}); give a "
            f"directory, a model id, or one of {', '.join(READY)}"
        ) from error
    dtype = getattr(config, "dtype", None) or torch.float32
    if dtype not in FORWARD_DTYPES:
        raise ModelError(
            f"{name}: config.json says dtype {dtype}; a forward may compute in float32, bfloat16 "
            "or float16: write one of them there"
        )
    _check_sizes(name, config)
    return config, dtype


def _check_sizes(name: str, config: Any) -> None:
    """Whether what counts is a count; of a model without one it is for others to say."""
    text = config.get_text_config()
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        value = getattr(text, key, 1)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MOST:
            raise ModelError(
                f"{name}: config.json says {key} {value!r}, expected a whole number from 1 to "
                f"{MOST}; correct it there"
            )


def build(config: Any) -> nn.Module:
    """The language model of a configuration, on the meta device.

    Raises:
        ModelError: There is none.
    """
    import transformers

    kind = "masked" if kind_of_config(config.to_dict()) == "masked" else "causal"
    try:
        with torch.device("meta"):
            return getattr(transformers, LOADED_BY[kind]).from_config(config, dtype=torch.float32)
    except BAD_VALUES as error:
        raise ModelError(
            f"{type(config).__name__}: no language model ({one_line(str(error))[:160]})"
            "; give a causal LM"
        ) from error
