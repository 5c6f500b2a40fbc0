"""Accuracy and mean loss of a model on a data set, in batches of examples of like length."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from zo_offload.tasks.encode import Batch, Encoded, collate, num_rows
from zo_offload.tasks.objective import hits, option_loss


@dataclass(frozen=True)
class Evaluation:
    """What a model does on a data set.

    Attributes:
        accuracy: The task's score, which is an accuracy unless `metric` says another.
        loss: Weighted mean, float64.
        num_examples: That were judged.
        metric: The score's name.
        others: Further metrics by name.
    """

    accuracy: float
    loss: float
    num_examples: int
    metric: str = "accuracy"
    others: Mapping[str, float] = field(default_factory=dict)


def evaluation_groups(
    encoded: Sequence[Any],
    batch_size: int,
    num_rows: Callable[[Sequence[Any]], int] = num_rows,
) -> list[list[int]]:
    """Which examples are judged together: of like length, and of `batch_size` rows at most.

    An example that takes more rows by itself (one for each of its options) is a group of its own.

    Args:
        encoded: What a way's `encode` returned; what has no tokens is all alike.
        batch_size: Most rows.
        num_rows: Of a batch, as of a way.
    """
    lengths = [getattr(one, "num_tokens", 0) for one in encoded]
    by_length = sorted(range(len(encoded)), key=lengths.__getitem__)  # stable
    groups: list[list[int]] = []
    for at in by_length:
        if not groups or num_rows([encoded[i] for i in (*groups[-1], at)]) > batch_size:
            groups.append([])
        groups[-1].append(at)
    return groups


def evaluation_batches(encoded: Sequence[Encoded], batch_size: int) -> Iterator[Batch]:
    """Every example once, in groups of like length so that little is padding."""
    for group in evaluation_groups(encoded, batch_size):
        yield collate([encoded[at] for at in group])


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
            scores.append(torch.stack([losses.double(), hits(batch, outputs).double()], dim=1))
    return [each.cpu() for each in scores]  # one wait for the device, at the end


def summarize(scores: Sequence[torch.Tensor]) -> Evaluation:
    """Means over all examples, in the order of the batches."""
    losses, found = torch.cat(list(scores)).unbind(dim=1)
    return Evaluation(found.mean().item(), losses.mean().item(), len(losses))
