"""Choosing parameters by what they do, whatever a model calls them."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from zo_offload.config_fields import BLOCK
from zo_offload.errors import ConfigError

_PATH = f"{BLOCK}.trainable"

# As transformers names the matrices that add to what flows from block to block.
_OUTPUT_PROJECTIONS = (
    "*attn.out_proj.weight",  # OPT, BART, Whisper, CLIP, GPT-J, torch's own transformer
    "*.attention.out_proj.weight",  # GPT-Neo
    "*.o_proj.weight",  # Llama, Qwen, Mistral, Gemma, Phi-3, ViT, Swin
    "*.attention.dense.weight",  # GPT-NeoX, ALBERT
    "*.self_attention.dense.weight",  # Bloom, Falcon
    "*.self_attn.dense.weight",  # Phi
    "*.attn.c_proj.weight",  # GPT-2, StarCoder
    "*.attention.output.dense.weight",  # BERT, RoBERTa, DeBERTa
    "*.SelfAttention.o.weight",  # T5
    "*.EncDecAttention.o.weight",
    "*.attention.out_lin.weight",  # DistilBERT
)
_DOWN_PROJECTIONS = (
    "*.fc2.weight",  # OPT, Phi, BART, Whisper, CLIP, ViT, Swin
    "*.down_proj.weight",  # Llama, Qwen, Mistral, Gemma, Phi-3, OLMo
    "*.experts.down_proj",  # Mixtral, Qwen3-MoE: all experts of a block
    "*.dense_4h_to_h.weight",  # GPT-NeoX, Bloom, Falcon
    "*.mlp.c_proj.weight",  # GPT-2, StarCoder
    "*.mlp.fc_out.weight",  # GPT-J, CodeGen
    "*.output.dense.weight",  # BERT, RoBERTa, DeBERTa
    "*.DenseReluDense.wo.weight",  # T5
    "*.ffn_output.weight",  # ALBERT
    "*.ffn.lin2.weight",  # DistilBERT
    "*.linear2.weight",  # torch's own transformer
    "*.w2.weight",  # experts one by one
    "*.mixer.out_proj.weight",  # Mamba: of its one wide layer
)
_OF_ATTENTION = ("*.attention.output.dense.weight",)


def _is_down_projection(name: str, parameter: nn.Parameter) -> bool:
    known = any(fnmatchcase(name, pattern) for pattern in _DOWN_PROJECTIONS)
    return known and not any(fnmatchcase(name, pattern) for pattern in _OF_ATTENTION)


def _is_output_projection(name: str, parameter: nn.Parameter) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _OUTPUT_PROJECTIONS)


def _is_vector(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 1


KINDS: Mapping[str, Callable[[str, nn.Parameter], bool]] = {
    "down_proj": _is_down_projection,
    "o_proj": _is_output_projection,
    "vector": _is_vector,
}
_TOLD = {
    "down_proj": "a down projection",
    "o_proj": "an output projection of attention",
    "vector": "a vector",
}


def by_kind(model: nn.Module, kinds: Sequence[str]) -> set[str]:
    """First names of the parameters of these kinds.

    Args:
        model: Whose parameters.
        kinds: Of `KINDS`, by the names that transformers gives them: ``down_proj``, the matrices
            that lead from a block's widest layer back to the model's width; ``o_proj``, those that
            lead from attention's heads back to it; ``vector``, all of one dimension: weights of
            norms, and biases. A model need not have each.

    Raises:
        ConfigError: It has none of any.

    Example:
        >>> net = nn.ModuleDict({"fc1": nn.Linear(2, 8), "fc2": nn.Linear(8, 2)})
        >>> sorted(by_kind(nn.Sequential(net), ["down_proj", "vector"]))
        ['0.fc1.bias', '0.fc2.bias', '0.fc2.weight']
    """
    named = list(model.named_parameters())
    found = {name for name, p in named if any(KINDS[kind](name, p) for kind in kinds)}
    if not found:
        told = " or ".join(_TOLD[kind] for kind in kinds)
        raise ConfigError(
            f"{_PATH}.kinds: none of {len(named)} parameters is known as {told}; choose by name "
            f"({_PATH}.parameters in the JSON)"
        )
    return found
