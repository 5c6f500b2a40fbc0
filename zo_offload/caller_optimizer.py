"""An optimizer that the caller brings: it carries learning rate and decay, and moves nothing."""

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from zo_offload.errors import ConfigError

logger = logging.getLogger(__name__)


def check_kind(optimizer: Any) -> None:
    """Before a model is touched.

    Raises:
        ConfigError: It is neither an optimizer nor something that makes one.
    """
    if not (optimizer is None or isinstance(optimizer, torch.optim.Optimizer | Callable)):
        raise ConfigError(
            "optimizer: expected a torch.optim.Optimizer or a function from parameters to one, "
            f"found {optimizer!r}; the JSON's optimizer needs no argument"
        )


def made_by(optimizer: Any, parameters: Any) -> torch.optim.Optimizer:
    """The optimizer itself, or what the caller's function makes of the parameters.

    Raises:
        ConfigError: It makes something else.
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    made = optimizer(parameters)
    if not isinstance(made, torch.optim.Optimizer):
        raise ConfigError(
            f"optimizer: the function returned {type(made).__name__}, not a torch.optim.Optimizer"
            "; return one, made of the parameters it is given"
        )
    return made


def check_covers(what: str, given: Iterable[Any] | None, model: nn.Module) -> None:
    """What moves is said by the model alone; anything that says otherwise is refused.

    Args:
        what: Is checked, for messages.
        given: Parameters, or groups of them as optimizers have; None for no opinion.
        model: Whose ``requires_grad`` counts.

    Raises:
        ConfigError: A trainable parameter is missing, or one is not the model's.
    """
    if given is None:
        return
    ids = {id(p) for each in given for p in (each["params"] if isinstance(each, dict) else [each])}
    names = {id(p): name for name, p in model.named_parameters()}
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    missing = [name for key, name in names.items() if name in trainable and key not in ids]
    if missing:
        raise ConfigError(
            f"{what}: {missing[0]} is trainable but not among its parameters "
            f"({len(missing)} such); call requires_grad_(False) on what should not move"
        )
    if not ids <= names.keys():
        raise ConfigError(
            f"{what}: {len(ids - names.keys())} of its parameters are not the model's; "
            "make it of model.parameters()"
        )


def tell(optimizer: torch.optim.Optimizer) -> None:
    """Say what is taken from a caller's optimizer: defaults such as AdamW's decay surprise."""
    group = optimizer.param_groups[0]
    logger.warning(
        "optimizer %s: only its lr (%g) and weight_decay (%g) are used; the update is zeroth-order",
        type(optimizer).__name__, group["lr"], group.get("weight_decay", 0.0),
    )  # fmt: skip


def check_alike(optimizer: torch.optim.Optimizer) -> None:
    """One step moves all weights alike.

    Raises:
        ConfigError: Groups differ in learning rate or decay.
    """
    for key in ("lr", "weight_decay"):
        found = {float(group.get(key, 0.0)) for group in optimizer.param_groups}
        if len(found) > 1:
            raise ConfigError(
                f"optimizer: its groups differ in {key} ({sorted(found)}), but one step moves "
                "all weights alike; give every group the same, or leave it to the JSON: "
                '"optimizer": {"type": "ZO", "params": {"lr": ..., "weight_decay": ...}}'
            )


def check_fused(learning_rate: float | None) -> None:
    """Before a loss is booked.

    Args:
        learning_rate: That ``backward`` was given; a Trainer does where LOMO is to update weights
            while gradients are computed.

    Raises:
        ConfigError: There is one.
    """
    if learning_rate is not None:
        raise ConfigError(
            f'backward: was given a learning rate ({learning_rate:g}), as optim="lomo" and '
            '"adalomo" of TrainingArguments do, which update weights by backpropagation'
            '; leave optim out: "optimizer" in the JSON says how weights move'
        )


def check_metric(scheduler: Any, given: Mapping[str, Any]) -> None:
    """Before a step is taken.

    Args:
        scheduler: Of learning rates, or None.
        given: What its ``step`` will be called with.

    Raises:
        ConfigError: It asks for a metric, as ReduceLROnPlateau does, and there is none.
    """
    if scheduler is None or "metrics" in given:
        return
    metrics = inspect.signature(scheduler.step).parameters.get("metrics")
    if metrics is not None and metrics.default is inspect.Parameter.empty:
        raise ConfigError(
            f"scheduler: {type(scheduler).__name__} asks for a metric at every step, and a Trainer "
            "gives none; take another lr_scheduler_type, or in a loop of your own call "
            'engine.step(lr_kwargs={"metrics": ...})'
        )
