"""What a task can be trained on beside its loss: its score itself, which has no gradient.

An aim is what is short of the full score, an example each, so that a micro-batch's mean counts as
that of the losses does: one less accuracy over options, one less the exact match or the F1 of what
is generated. A class's F1 is not among them: it is of all examples at once, and the mean over
micro-batches would be another number.

Scores of a batch move in jumps. A pair of lanes that comes out alike moves nothing, so that a step
has more to say the more examples, and the wider eps.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from zo_offload.errors import ConfigError
from zo_offload.objective import Objective
from zo_offload.tasks.encode import Batch
from zo_offload.tasks.generate import Decoding, Reward
from zo_offload.tasks.objective import hits
from zo_offload.tasks.scores import REWARDS
from zo_offload.tasks.spec import Manner

LOSS = "loss"
OF_CHOICES, OF_ANSWERS = ("accuracy",), ("f1", "exact_match")
OBJECTIVES = (LOSS, *OF_CHOICES, *OF_ANSWERS)


@dataclass(frozen=True)
class Aim:
    """What is minimised, and the micro-batches that it takes.

    Attributes:
        objective: For the engine.
        collate: From examples.
    """

    objective: Objective
    collate: Callable[[Sequence[Any]], dict[str, Any]]


def check_objective(name: str, manner: Manner) -> None:
    """Refuse what says nothing of such a task.

    Args:
        name: Of `OBJECTIVES`.
        manner: The task's.

    Raises:
        ConfigError: It is of the other kind of tasks, or no mean over examples.
    """
    known = (LOSS, *(OF_ANSWERS if manner.generates else OF_CHOICES))
    if name in known:
        return
    fault = "is of options, and this task generates its answers"
    if not manner.generates:
        fault = "is of answers in words, and this task chooses among options"
    if not manner.generates and name == "f1":
        fault = "of options is of all examples at once, not a mean over the examples of a batch"
    raise ConfigError(f"--objective: {name} {fault}; expected {' or '.join(known)}")


def misses(model: nn.Module | None, batch: Batch, outputs: Any) -> torch.Tensor:
    """1 where the option of the highest score is wrong, else 0: fp32 [examples]."""
    return 1 - hits(batch, outputs)


def aims_of_options(
    forward: Callable[[nn.Module, Any], Any],
    collate: Callable[[Sequence[Any]], Batch],
    loss: Callable[[nn.Module | None, Any, Any], torch.Tensor] = misses,
) -> Mapping[str, Aim]:
    """By name, of a task that chooses.

    Args:
        forward: To the outputs that `loss` judges.
        collate: To micro-batches with all options.
        loss: 1 for each example that is wrong.
    """
    objective = Objective(loss=loss, forward=forward, smooth=False, name="accuracy")
    return {"accuracy": Aim(objective, collate)}


def aims_of_answers(decoding: Decoding) -> Mapping[str, Aim]:
    """By name, of a task whose answers are generated."""
    return {
        name: Aim(reward_objective(decoding, REWARDS[name], name), decoding.collate)
        for name in OF_ANSWERS
    }


def reward_objective(decoding: Decoding, reward: Reward, name: str = "") -> Objective:
    """One less the mean reward of what is generated, on batches of `decoding.collate`.

    Args:
        decoding: Of the model's tokenizer.
        reward: From a text and its references to a number, 1 at best.
        name: See :class:`zo_offload.objective.Objective`.
    """
    loss = partial(_shortfall, decoding=decoding, reward=reward)
    return Objective(loss=loss, forward=decoding.generate, smooth=False, name=name)


def _shortfall(
    model: nn.Module, batch: dict[str, Any], ids: torch.Tensor, decoding: Decoding, reward: Reward
) -> torch.Tensor:
    return 1 - decoding.rewards(batch, ids, reward)
