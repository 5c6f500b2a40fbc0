"""The mode of a run: what the JSON says, unless the model is a ``PeftModel`` and says it itself."""

from collections.abc import Callable

from torch import nn

from zo_offload.config import ZOConfig
from zo_offload.errors import ConfigError
from zo_offload.trainable.detect import is_peft_model
from zo_offload.trainable.full import Full
from zo_offload.trainable.peft import Peft
from zo_offload.trainable.selection import PATH
from zo_offload.trainable.sparse import Sparse
from zo_offload.trainable.trainable import Trainable

MODES: dict[str, Callable[[ZOConfig], Trainable]] = {"full": Full, "peft": Peft, "sparse": Sparse}


def trainable_for(model: nn.Module, config: ZOConfig) -> Trainable:
    """Args: the model as the caller gives it, and the ``zeroth_order`` block.

    Raises:
        ConfigError: The JSON asks for another choice than the model's own.
    """
    wanted = config.trainable
    if not is_peft_model(model):
        return MODES[wanted.mode](config)
    said = [key for key in type(wanted).model_fields if key != "mode" and getattr(wanted, key)]
    if said:
        raise ConfigError(
            f"{PATH}.{said[0]}: the model is a PeftModel, which says itself what moves; leave "
            f"{said[0]} out, or pass the plain model"
        )
    return Peft(config)
