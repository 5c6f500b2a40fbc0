"""The loss and the prediction: cross-entropy over the scores of an example's options.

An option's score is the mean log-probability of its tokens. Where all options of a micro-batch are
one token, the softmax's normalizer is the same for all of them and cancels, so that the loss is a
cross-entropy over a few logits of the last position. Only positions that predict an option's token
are computed: with padding on the left they are the last ones.
"""

import inspect
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
        [examples, options], fp32, on the logits' device.
    """
    logits = outputs.logits[:, -_num_scored_positions(batch) :].float()  # [R, K, V]
    option_ids = batch["option_ids"].to(logits.device)
    if option_ids.dim() == 2:
        scores = logits[:, -1].gather(1, option_ids)  # [E, O]
    else:
        means = _mean_log_probabilities(logits, option_ids.flatten(0, 1))  # [R]
        scores = means.view(option_ids.shape[:2])
    return functional.log_softmax(scores, dim=-1)


def option_loss(model: nn.Module | None, batch: Batch, outputs: Any) -> torch.Tensor:
    """Cross-entropy of the right option, fp32 [examples]: the engine's `objective`."""
    scores = option_scores(batch, outputs)
    return -scores.gather(1, batch["targets"].to(scores.device)[:, None]).squeeze(1)


def predict(batch: Batch, outputs: Any) -> torch.Tensor:
    """The index of the option with the highest score, int64 [examples]."""
    return option_scores(batch, outputs).argmax(dim=-1)


def _num_scored_positions(batch: Batch) -> int:
    option_ids = batch["option_ids"]
    return 1 if option_ids.dim() == 2 else option_ids.shape[2]


def _mean_log_probabilities(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Of tokens [R, K] under logits [R, K, V], over those that are there: [R]."""
    there = token_ids >= 0  # NO_TOKEN is negative
    picked = logits.gather(2, token_ids.clamp(min=0)[..., None]).squeeze(2) - logits.logsumexp(
        dim=2
    )
    return picked.where(there, 0.0).sum(dim=1) / there.sum(dim=1)
