"""Which kind of model a checkpoint is, as its configuration says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zo_offload.integrations.hub import check_reached
from zo_offload.kinds import Kind, kind_of_architecture
from zo_offload.trainable.peft import base_of


def kind_of(name: str | Path) -> Kind:
    """By the architecture that the configuration names, else by the type of model.

    A checkpoint that names none (DeBERTa's) is taken for what its type is mostly pretrained as. One
    that cannot be read is a causal LM here: whoever loads it says what is wrong.

    Args:
        name: Directory or id; of an adapter of ``peft``, its base counts.

    Raises:
        ModelError: It is no directory, not in the cache, and the hub is not reached.
    """
    from transformers import PreTrainedConfig

    model = base_of(name) or name
    check_reached(model)
    try:
        config, _ = PreTrainedConfig.get_config_dict(str(model))
    except (OSError, ValueError):
        return "causal"
    return kind_of_config(config) if isinstance(config, Mapping) else "causal"


def kind_of_config(config: Mapping[str, Any]) -> Kind:
    """The same of a configuration's values."""
    for each in config.get("architectures") or ():
        kind = kind_of_architecture(str(each))
        if kind is not None:
            return kind
    return _kind_of_type(str(config.get("model_type")), bool(config.get("is_decoder")))


def _kind_of_type(model_type: str, is_decoder: bool) -> Kind:
    from transformers.models.auto import modeling_auto

    known: Any = modeling_auto
    if model_type in known.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return "image"
    writes = model_type in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    fills = known.MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(model_type, "").endswith("ForMaskedLM")
    return "masked" if fills and not (writes and is_decoder) else "causal"
