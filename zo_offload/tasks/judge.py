"""What a model says to examples, and what that is worth: the same numbers for any batches."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from zo_offload.objective import move_to
from zo_offload.tasks.encode import Batch, Encoded, collate
from zo_offload.tasks.evaluate import Evaluation
from zo_offload.tasks.generate import Decoding
from zo_offload.tasks.objective import answer_losses, option_forward, option_loss, predict
from zo_offload.tasks.scores import METRICS, OF_TEXTS


@dataclass(frozen=True)
class Verdict:
    """Of one example: a loss that weighs so much, and the option, or the text, that was chosen."""

    loss: float
    weight: float
    prediction: int | str


def judge_options(
    stepper: Any,
    examples: Sequence[Encoded],
    train_on: str,
    collate: Callable[[Sequence[Encoded]], Batch] = collate,
) -> list[Verdict]:
    """The option of the highest score, and the loss that training minimises.

    Args:
        stepper: Whose `forward` takes collated batches, as a `Stepper`'s with `option_forward`.
        examples: A batch.
        train_on: As of a `TaskSpec`.
        collate: To what the stepper's `forward` takes.
    """
    batch = collate(examples)
    outputs = stepper.forward(batch)
    losses, weights = _losses(batch, outputs, train_on)
    return list(map(Verdict, losses, weights, predict(batch, outputs).tolist()))


def judge_answers(stepper: Any, examples: Sequence[Encoded], decoding: Decoding) -> list[Verdict]:
    """What is decoded greedily, and the language-model loss of the answer to learn from."""
    batch = collate(examples)
    losses, weights = _losses(batch, stepper.forward(batch, option_forward), "answer")
    asked = move_to(decoding.collate(examples), stepper.device)
    ids = stepper.run_model(lambda: decoding.generate(stepper.model, asked))
    return list(map(Verdict, losses, weights, decoding.texts(ids)))


def sum_up(
    verdicts: Sequence[Verdict], examples: Sequence[Any], metrics: Sequence[str]
) -> Evaluation:
    """Metrics and weighted mean loss, float64.

    Args:
        verdicts: One for each example, in order.
        examples: At least one.
        metrics: Names; the first is the score.
    """
    found = [verdict.prediction for verdict in verdicts]
    right = [one.references if metrics[0] in OF_TEXTS else one.right for one in examples]
    values = {name: METRICS[name](found, right) for name in metrics}
    weight = math.fsum(verdict.weight for verdict in verdicts)
    loss = math.fsum(verdict.loss for verdict in verdicts) / weight
    first, *rest = metrics
    others = {name: values[name] for name in rest}
    return Evaluation(values[first], loss, len(verdicts), first, others)


def _losses(batch: Batch, outputs: Any, train_on: str) -> tuple[list[float], list[float]]:
    if train_on == "answer":
        sums, counts = answer_losses(batch, outputs)
        return sums.double().tolist(), counts.double().tolist()
    losses = option_loss(None, batch, outputs).double().tolist()
    return losses, [1.0] * len(losses)
