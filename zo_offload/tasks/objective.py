"""Losses and the prediction: by the scores of an example's options, or of its answer alone.

An option's score is the mean log-probability of its tokens. Where all options of a micro-batch are
one token, the softmax's normalizer is the same for all of them and cancels, so that the loss is a
cross-entropy over a few logits of the last position. Only positions that predict an option's token
are computed: with padding on the left they are the last ones.

`answer_loss` is a language model's: the mean negative log-probability of the right answer's tokens,
over all of a micro-batch, as MeZO trains COPA, ReCoRD, SQuAD and DROP.
"""

import inspect
import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from zo_offload.tasks.encode import Batch

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


def model_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The keyword arguments that this model's forward takes from a collated batch.

    `position_ids` go to models that have the parameter (GPT-2 would count the padding otherwise),
    and `logits_to_keep`, where there is one, spares the head every position whose logits nobody
    reads.
    """
    # A peft wrapper's own forward takes *args, **kwargs; the model inside names what it accepts.
    inner = getattr(model, "get_base_model", lambda: model)()
    accepted = inspect.signature(inner.forward).parameters
    inputs: dict[str, Any] = {name: batch[name] for name in MODEL_INPUTS if name in accepted}
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = _num_scored_positions(batch)
    return inputs


def option_forward(model: nn.Module, batch: Batch) -> Any:
    """The model's output for a collated batch: the call that `option_loss` and `predict` expect."""
    return model(**model_inputs(model, batch))


def option_scores(batch: Batch, outputs: Any) -> torch.Tensor:
    """Log-probabilities of each example's options, normalized over the options.

    Args:
        batch: What `collate` returned, on any device.
        outputs: A model's output with `logits` [rows, at least the scored positions, vocabulary].

    Returns:
        [examples, options], fp32, on the logits' device; -inf for an option that is not there.
    """
    logits = _scored_logits(batch, outputs)  # [R, K, V]
    option_ids = batch["option_ids"].to(logits.device)
    if option_ids.dim() == 2:
        scores = logits[:, -1].gather(1, option_ids.clamp(min=0))  # [E, O]
        scores = scores.where(option_ids >= 0, -math.inf)
    else:
        sums, counts = _option_sums(logits, option_ids)
        scores = (sums / counts.clamp(min=1)).where(counts > 0, -math.inf)
    return functional.log_softmax(scores, dim=-1)


def option_loss(model: nn.Module | None, batch: Batch, outputs: Any) -> torch.Tensor:
    """Cross-entropy of the right option, fp32 [examples]: the engine's `objective`."""
    scores = option_scores(batch, outputs)
    return -scores.gather(1, batch["targets"].to(scores.device)[:, None]).squeeze(1)


def answer_losses(batch: Batch, outputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each example's target: the sum over its tokens of -log p, fp32 [examples]; their number.

    Args:
        batch: What `collate` returned, with any number of options.
        outputs: As for `option_scores`.
    """
    logits = _scored_logits(batch, outputs)
    option_ids = batch["option_ids"].to(logits.device)
    targets = batch["targets"].to(logits.device)[:, None]
    if option_ids.dim() == 2:  # one token each
        token_ids = option_ids.gather(1, targets)  # [E, 1]
        return -_log_probability_sums(logits, token_ids), torch.ones_like(targets[:, 0])
    sums, counts = _option_sums(logits, option_ids)
    return -sums.gather(1, targets).squeeze(1), counts.gather(1, targets).squeeze(1)


def answer_loss(
    model: nn.Module | None, batch: Batch, outputs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(sum, weight)` of -log p over all tokens of right answers: the engine's `objective`."""
    sums, counts = answer_losses(batch, outputs)
    return sums.sum(), counts.sum()


def predict(batch: Batch, outputs: Any) -> torch.Tensor:
    """The index of the option with the highest score, int64 [examples]."""
    return option_scores(batch, outputs).argmax(dim=-1)


def hits(batch: Batch, outputs: Any) -> torch.Tensor:
    """1 where the prediction is right, else 0: fp32 [examples]."""
    found = predict(batch, outputs)
    if "right" in batch:
        right = batch["right"].to(found.device)
        return right.gather(1, found[:, None]).squeeze(1).float()
    return (found == batch["targets"].to(found.device)).float()


def _num_scored_positions(batch: Batch) -> int:
    option_ids = batch["option_ids"]
    return 1 if option_ids.dim() == 2 else option_ids.shape[2]


def _scored_logits(batch: Batch, outputs: Any) -> torch.Tensor:
    return outputs.logits[:, -_num_scored_positions(batch) :].float()  # [R, K, V]


def _option_sums(
    logits: torch.Tensor, option_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and numbers of tokens [E, O]; logits have rows for options there are."""
    counts = (option_ids >= 0).sum(dim=2)  # NO_TOKEN is negative
    there = counts > 0
    if len(logits) == there.numel():  # every example has as many: no look at what there is
        return _log_probability_sums(logits, option_ids.flatten(0, 1)).view_as(counts), counts
    sums = _log_probability_sums(logits, option_ids[there])  # [R]
    spread = torch.zeros(there.shape, device=sums.device).masked_scatter(there, sums)
    return spread, counts


def _log_probability_sums(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Of tokens [R, K] under logits [R, K, V], over those that are there: [R]."""
    picked = logits.gather(2, token_ids.clamp(min=0)[..., None]).squeeze(2) - logits.logsumexp(
        dim=2
    )
    return picked.where(token_ids >= 0, 0.0).sum(dim=1)
