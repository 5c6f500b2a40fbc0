"""Accuracy and mean loss of a model on a data set, in batches of examples of like length."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zo_offload.tasks.encode import Batch, Encoded, collate
from zo_offload.tasks.objective import option_loss, predict


@dataclass(frozen=True)
class Evaluation:
    """What a model does on a data set; `loss` is a float64 mean over examples."""

    accuracy: float
    loss: float
    num_examples: int


def evaluation_batches(encoded: Sequence[Encoded], batch_size: int) -> Iterator[Batch]:
    """Every example once, sorted by length so that little is padding."""
    by_length = sorted(
        encoded, key=lambda example: example.num_tokens
    )  # stable: equal data, equal batches
    for start in range(0, len(by_length), batch_size):
        yield collate(by_length[start : start + batch_size])


def evaluate(forward: Callable[[Batch], Any], batches: Iterable[Batch]) -> Evaluation:
    """Runs every batch without gradients and scores it.

    Args:
        forward: From a batch to the model's output, such as `partial(option_forward, model)`.
        batches: At least one, e.g. of `evaluation_batches`.
    """
    return summarize(score(forward, batches))


def score(forward: Callable[[Batch], Any], batches: Iterable[Batch]) -> list[torch.Tensor]:
    """Loss and hit (1 or 0) of every example, a tensor a batch: float64 `[examples, 2]`."""
    scores = []
    with torch.no_grad():
        for batch in batches:
            outputs = forward(batch)
            losses = option_loss(None, batch, outputs)
            hits = predict(batch, outputs) == batch["targets"].to(losses.device)
            scores.append(torch.stack([losses.double(), hits.double()], dim=1))
    return [each.cpu() for each in scores]  # one wait for the device, at the end


def summarize(scores: Sequence[torch.Tensor]) -> Evaluation:
    """Means over all examples, in the order of the batches."""
    losses, hits = torch.cat(list(scores)).unbind(dim=1)
    return Evaluation(hits.mean().item(), losses.mean().item(), len(losses))
