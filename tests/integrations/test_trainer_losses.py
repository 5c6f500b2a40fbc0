"""Whatever a Trainer does to the loss, the projected gradient is its gradient along z.

The gradient is that of the same Trainer without the engine, in the same step on the same batches.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.launch import forked, wait
from parity.plain import noise
from torch.nn import functional

from integrations import stock
from zo_offload.config import ZOConfig

EPS = 5e-4  # between rounding and curvature in fp32


def focal(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """A loss that no model has, of the logits."""
    losses = functional.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
    )
    return ((1 - (-losses).exp()) ** 2 * losses).sum() / num_items_in_batch


def by_example(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """A mean over what counts in this micro-batch, which the Trainer takes as it is."""
    return focal(outputs, labels, (labels[:, 1:] != stock.MASKED).sum()) / 3


CASES: dict[str, dict[str, Any]] = {
    "the model's own": {},
    "smoothed labels": {"label_smoothing_factor": 0.3},
    "a function of logits": {"parts": {"compute_loss_func": focal}},
    "one that averages by itself": {"parts": {"compute_loss_func": by_example}},
    "smoothed, not averaged over ranks": {
        "label_smoothing_factor": 0.3,
        "average_tokens_across_devices": False,
    },
    "a short last window": {
        "parts": {"train_dataset": stock.sentences(5)},
        "num_train_epochs": 1,
        "max_steps": -1,
        "learning_rate": 0.0,
    },
}


def gradient_along(
    trainer: Any, z: dict[str, torch.Tensor], micro_batches: list[dict[str, torch.Tensor]]
) -> float:
    """Of what a Trainer without an engine makes of the micro-batches of a step."""
    model: Any = trainer.model
    batches, count = trainer.get_batch_samples(iter(micro_batches), len(micro_batches), "cpu")
    trainer.current_gradient_accumulation_steps = len(batches)
    for each in batches:
        trainer.training_step(model, each, count)
    slopes = [(p.grad.double() * z[name]).sum() for name, p in model.named_parameters()]
    return float(torch.stack(slopes).sum())


@pytest.mark.parametrize("name", CASES)
def test_it_follows_what_the_trainer_does_to_the_loss(
    trained, no_deepspeed, tmp_path: Path, name: str
):
    """Three micro-batches of sentences of unequal length, so that each has its own count."""
    case = {"gradient_accumulation_steps": 3, "max_steps": 1, **CASES[name]}
    case |= {"per_device_train_batch_size": 1}
    engine = trained(stock.ds({"eps": EPS}), **case).model_wrapped
    record = engine.stepper.journal.records[-1]
    no_deepspeed()
    plain: Any = stock.trainer(tmp_path / "plain", None, **case)
    batches = [stock.padded([row]) for row in plain.train_dataset]
    z = noise(plain.model, ZOConfig(), (record.step, 0), 1.0, {})
    along = gradient_along(plain, z, batches[3 * record.step : 3 * record.step + 3])
    assert record.probes[0].projected_grad == pytest.approx(along, rel=5e-3, abs=2e-3)


def test_two_ranks_average_over_the_tokens_of_both(trained, tmp_path: Path):
    """As one rank does that has both micro-batches."""
    given = {"per_device_train_batch_size": 1, "max_steps": 1}
    job = {"output": str(tmp_path), "arguments": {**given, "gradient_accumulation_steps": 1}}
    ended = wait(forked("integrations.stock:main", 2, job, out=tmp_path / "logs"))
    assert all(code == 0 for code, _ in ended), ended
    two = [json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in range(2)]
    assert two[0] == two[1]
    one = trained(gradient_accumulation_steps=2, **given).model_wrapped
    (record,) = one.stepper.journal.records
    assert two[0] == [pytest.approx(record.probes[0].projected_grad, rel=1e-3, abs=1e-3)]
