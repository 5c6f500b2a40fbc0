"""How each method of the comparison learns: one generator a method, which yields after every step.

A method is given the same rows, the same batches' size and the same number of forwards. Forwards
count model calls on one batch of 16; a step of backpropagation counts as three (a backward pass
costs about two forwards).
"""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mezo
import torch
from accuracy_data import Data, model

from zo_offload.config import parse_config
from zo_offload.objective import Objective
from zo_offload.step import Stepper
from zo_offload.tasks import Batch, batch_at, collate, option_forward, option_loss

BATCH = 16
Forward = Callable[[Batch], Any]
Learner = Generator[Forward, None, None]  # yields what evaluates, after each step


@dataclass(frozen=True)
class Method:
    """A way to learn.

    Attributes:
        lrs: The grid that is searched, on one seed.
        forwards: A step's.
        learn: `(method, folder, data, seed, steps, lr)` to a learner.
        block: Keys of ``zeroth_order``.
        stratified: Whether batches hold both classes in proportion.
        note: What it is.
        micro_batch: Examples of a model call.
    """

    lrs: tuple[float, ...]
    forwards: int
    learn: Callable[["Method", Path, Data, int, int, float], Learner]
    block: Mapping[str, Any] = field(default_factory=dict)
    stratified: bool = True
    note: str = ""
    micro_batch: int = BATCH

    def batches(self, data: Data, seed: int, step: int) -> list[Batch]:
        """Micro-batches of a step; examples of like length go together."""
        classes = data.classes if self.stratified else None
        chosen = batch_at(seed, step, BATCH, len(data.train), classes)
        if self.micro_batch < BATCH:
            chosen.sort(key=lambda index: data.train[index].num_tokens)
        parts = [chosen[i : i + self.micro_batch] for i in range(0, BATCH, self.micro_batch)]
        return [collate([data.train[index] for index in part]) for part in parts]


def streamed(method: Method, folder: Path, data: Data, seed: int, steps: int, lr: float) -> Learner:
    """This package's step, with a linearly falling rate."""
    config = parse_config({"zeroth_order": {"seed": seed, **method.block}})
    objective = Objective(option_loss, option_forward)
    with Stepper(model(folder), config, dtype=torch.float32, objective=objective) as stepper:
        for step in range(steps):
            stepper.train_step(method.batches(data, seed, step), lr * (1 - step / steps))
            yield stepper.forward


def published(
    method: Method, folder: Path, data: Data, seed: int, steps: int, lr: float
) -> Learner:
    """MeZO: constant rate, gaussian directions drawn from a seed a step, weights moved in place."""
    net = model(folder)
    parameters = list(net.parameters())

    def forward(batch: Batch) -> Any:
        return option_forward(net, batch)

    with torch.inference_mode():
        for step in range(steps):
            (batch,) = method.batches(data, seed, step)

            def loss(batch: Batch = batch) -> float:
                return float(option_loss(net, batch, forward(batch)).mean())

            mezo.step(parameters, loss, seed=seed * 1_000_003 + step, eps=1e-3, lr=lr, kept=True)
            yield forward


def backpropagated(
    method: Method, folder: Path, data: Data, seed: int, steps: int, lr: float
) -> Learner:
    """First order: AdamW with a linearly falling rate, of everything or of an adapter."""
    torch.manual_seed(seed)
    net = model(folder)
    if method.block:
        from peft import LoraConfig, get_peft_model

        net = get_peft_model(net, LoraConfig(**method.block)).eval()
    moved = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(moved, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for step in range(steps):
        (batch,) = method.batches(data, seed, step)
        option_loss(net, batch, option_forward(net, batch)).mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield lambda batch: option_forward(net, batch)


def kinds(*names: str) -> dict[str, Any]:
    return {"trainable": {"kinds": list(names)}}


def lora(**more: Any) -> dict[str, Any]:
    return {"r": 8, "lora_alpha": 16, **more}


RELATIVE = {"eps": 0.1, "direction_scale": "relative"}
OUT = {**RELATIVE, "probes": 4, **kinds("o_proj", "down_proj")}
METHODS = {
    "mezo": Method((2e-5, 4e-5, 8e-5), 2, published, stratified=False, note="as published"),
    "all": Method((2e-5, 6e-5, 2e-4), 2, streamed, {"eps": 1e-3}),
    "all rms": Method((3e-5, 1e-4, 3e-4), 2, streamed, {"eps": 1e-3, "direction_scale": "rms"}),
    "vector": Method((3.0, 10.0, 30.0), 8, streamed, {**OUT, **kinds("vector")}),
    "lora": Method(
        (1e-3, 3e-3, 1e-2), 8, streamed,
        {"eps": 1e-2, "probes": 4, "trainable": {"mode": "peft", "peft_config": {
            "peft_type": "LORA", **lora()}}},
    ),
    "projections": Method((6.0, 12.0, 24.0), 8, streamed, OUT),
    "projections by length": Method((6.0, 12.0, 24.0), 8, streamed, OUT, micro_batch=4),
    "projections shuffled": Method((3.0, 6.0, 12.0), 8, streamed, OUT, stratified=False),
    "projections 1 probe": Method((3.0, 6.0, 12.0), 2, streamed, {**OUT, "probes": 1}),
    "projections natural": Method((15.0, 30.0, 60.0), 8, streamed, {**OUT, "natural": 0.1}),
    "projections one-sided": Method(
        (12.0, 24.0, 48.0), 8, streamed,
        {**OUT, "probes": 8, "estimator": "one_sided", "eps": 0.05},
    ),
    "first order": Method((3e-5, 1e-4, 3e-4), 3, backpropagated, note="AdamW"),
    "first order lora": Method((3e-4, 1e-3, 3e-3), 3, backpropagated, lora(), note="AdamW"),
}  # fmt: skip
