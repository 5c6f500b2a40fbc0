"""How each method of the comparison learns: one generator a method, which yields after every step.

It begins where an earlier process was ended, as far as that left something in ``Run.kept``.

A method is given the same rows, the same batches' size and the same number of forwards. Forwards
count model calls on one batch of 16; a step of backpropagation counts as three (a backward pass
costs about two forwards).
"""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import mezo
import torch
from accuracy_data import Data, model
from safetensors import safe_open
from safetensors.torch import save_file

from zo_offload.config import parse_config
from zo_offload.journal import Journal
from zo_offload.objective import Objective
from zo_offload.step import Stepper
from zo_offload.tasks import Batch, batch_at, collate, option_forward, option_loss

BATCH = 16
KEPT_EVERY = 200  # steps
Forward = Callable[[Batch], Any]


class Reached(NamedTuple):
    """How far a method is: steps that were taken, and what evaluates."""

    step: int
    forward: Forward


Learner = Generator[Reached, None, None]


@dataclass(frozen=True)
class Run:
    """What to learn.

    Attributes:
        folder: With model and task.
        data: Of the task.
        seed: Of directions and of the order of the rows.
        steps: To take.
        lr: To begin with.
        kept: A directory for what a later process goes on from.
    """

    folder: Path
    data: Data
    seed: int
    steps: int
    lr: float
    kept: Path | None = None


@dataclass(frozen=True)
class Method:
    """A way to learn.

    Attributes:
        lrs: The grid that is searched, on one seed.
        forwards: A step's.
        learn: `(method, run)` to a learner, which first yields where it begins.
        block: Keys of ``zeroth_order``.
        stratified: Whether batches hold both classes in proportion.
        note: What it is.
        micro_batch: Examples of a model call.
    """

    lrs: tuple[float, ...]
    forwards: int
    learn: Callable[["Method", Run], Learner]
    block: Mapping[str, Any] = field(default_factory=dict)
    stratified: bool = True
    note: str = ""
    micro_batch: int = BATCH

    def batches(self, run: Run, step: int) -> list[Batch]:
        """Micro-batches of a step; examples of like length go together."""
        data = run.data
        classes = data.classes if self.stratified else None
        chosen = batch_at(run.seed, step, BATCH, len(data.train), classes)
        if self.micro_batch < BATCH:
            chosen.sort(key=lambda index: data.train[index].num_tokens)
        parts = [chosen[i : i + self.micro_batch] for i in range(0, BATCH, self.micro_batch)]
        return [collate([data.train[index] for index in part]) for part in parts]

    def tokens(self, run: Run, step: int) -> int:
        """That a step's forwards see, without padding."""
        seen = sum(int(batch["attention_mask"].sum()) for batch in self.batches(run, step))
        return self.forwards * seen


def streamed(method: Method, run: Run) -> Learner:
    """This package's step, with a linearly falling rate."""
    config = parse_config({"zeroth_order": {"seed": run.seed, **method.block}})
    objective = Objective(option_loss, option_forward)
    with Stepper(model(run.folder), config, dtype=torch.float32, objective=objective) as stepper:
        if run.kept is not None:
            stepper.follow(Journal.open(run.kept / "run.journal", stepper.bit_header()))
        yield Reached(stepper.step, stepper.forward)
        for step in range(stepper.step, run.steps):
            stepper.train_step(method.batches(run, step), run.lr * (1 - step / run.steps))
            yield Reached(stepper.step, stepper.forward)


def published(method: Method, run: Run) -> Learner:
    """MeZO: constant rate, gaussian directions drawn from a seed a step, weights moved in place."""
    net = model(run.folder)
    begun = 0 if run.kept is None else restored(net, run.kept)
    parameters = list(net.parameters())

    def forward(batch: Batch) -> Any:
        return option_forward(net, batch)

    with torch.inference_mode():
        yield Reached(begun, forward)
        for step in range(begun, run.steps):
            (batch,) = method.batches(run, step)

            def loss(batch: Batch = batch) -> float:
                return float(option_loss(net, batch, forward(batch)).mean())

            seed = run.seed * 1_000_003 + step
            kept = run.kept is not None  # the same bits; as published, for its seconds
            mezo.step(parameters, loss, seed=seed, eps=1e-3, lr=run.lr, kept=kept)
            if run.kept is not None and (step + 1) % KEPT_EVERY == 0:
                keep(net, run.kept, step + 1)
            yield Reached(step + 1, forward)


def keep(net: torch.nn.Module, folder: Path, step: int) -> None:
    """Its weights after so many steps; whole, or those before them."""
    weights = {name: value.detach() for name, value in net.named_parameters()}
    save_file(weights, folder / "weights.new", {"step": str(step)})
    (folder / "weights.new").replace(folder / "weights.safetensors")


def restored(net: torch.nn.Module, folder: Path) -> int:
    """The steps behind the weights that it now has."""
    path = folder / "weights.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file, torch.no_grad():
        for name, value in net.named_parameters():
            value.copy_(file.get_tensor(name))
        return int(file.metadata()["step"])


def backpropagated(method: Method, run: Run) -> Learner:
    """First order: AdamW with a linearly falling rate, of everything or of an adapter.

    Nothing is kept of it: it is short.
    """
    torch.manual_seed(run.seed)
    net = model(run.folder)
    if method.block:
        from peft import LoraConfig, get_peft_model

        net = get_peft_model(net, LoraConfig(**method.block)).eval()
    moved = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(moved, lr=run.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / run.steps)

    def forward(batch: Batch) -> Any:
        return option_forward(net, batch)

    yield Reached(0, forward)
    for step in range(run.steps):
        (batch,) = method.batches(run, step)
        option_loss(net, batch, forward(batch)).mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield Reached(step + 1, forward)


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
