"""``state_dict()`` of a model whose parameters hold no values: served, and never loaded into."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from zo_offload.errors import StoreError


def serve_state_dict(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    value: Callable[[str], torch.Tensor],
) -> Iterator[Any]:
    """Put hooks on the model's modules; gives their handles.

    Args:
        model: The parameters' owner.
        parameters: Those to serve, by first name.
        value: From a name to the values that belong there now.
    """
    first_name = {id(parameter): name for name, parameter in parameters.items()}

    def serve(module: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
        served = vars(state_dict).setdefault("_served", {})  # tied parameters share storage
        for name, parameter in module._parameters.items():
            first = first_name.get(id(parameter))
            if first is not None and prefix + name in state_dict:
                if first not in served:
                    served[first] = value(first)
                state_dict[prefix + name] = served[first]

    def forget(module: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
        vars(state_dict).pop("_served", None)

    def refuse(module: nn.Module, *_: object) -> None:
        raise StoreError(
            f"load_state_dict on {type(module).__name__}: its weights live in a store; "
            "load them before the engine is made, or use engine.load_checkpoint"
        )

    for module in model.modules():
        if any(id(parameter) in first_name for parameter in module._parameters.values()):
            yield module.register_state_dict_post_hook(serve)
    yield model.register_state_dict_post_hook(forget)
    yield model.register_load_state_dict_pre_hook(refuse)
