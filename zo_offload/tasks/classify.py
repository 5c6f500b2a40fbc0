"""How images go through an image classifier: read when they are needed, and judged by their class.

The model's own image processor makes its input (size, mean and standard deviation as it was
pretrained with). The loss is the cross-entropy over its classes.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from zo_offload.objective import Objective
from zo_offload.tasks.aims import aims_of_options
from zo_offload.tasks.encode import Batch
from zo_offload.tasks.judge import Verdict
from zo_offload.tasks.pictures import Picture, decoded
from zo_offload.tasks.way import Way


def image_way(processor: Any) -> Way:
    """Through an image classifier.

    Args:
        processor: The model's image processor.
    """
    collated = partial(collate_pictures, processor=processor)
    return Way(
        encode=checked,
        collate=collated,
        objective=Objective(loss=class_loss, forward=image_forward),
        judge=partial(judge_classes, collate=collated),
        metrics=("accuracy",),
        num_rows=len,
        aims=aims_of_options(image_forward, collated, class_misses),
    )


def checked(pictures: Sequence[Picture]) -> list[Picture]:
    """The same, each of which can be read.

    Raises:
        TaskError: One cannot; it is named before there is anything to lose.
    """
    for one in pictures:
        decoded(one)
    return list(pictures)


def collate_pictures(pictures: Sequence[Picture], processor: Any) -> Batch:
    """One micro-batch.

    Returns:
        pixel_values: fp32 [E, 3, height, width], as the processor makes them
        targets: int64 [E]
    """
    images = [decoded(one) for one in pictures]
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    return {"pixel_values": pixels, "targets": torch.tensor([one.right[0] for one in pictures])}


def image_forward(model: nn.Module, batch: Batch) -> Any:
    """The model's output, its input in its own dtype."""
    inner: Any = getattr(model, "get_base_model", lambda: model)()
    return model(pixel_values=batch["pixel_values"].to(inner.dtype))


def class_loss(model: nn.Module | None, batch: Batch, outputs: Any) -> torch.Tensor:
    """Cross-entropy, fp32 [examples]: the engine's `objective`."""
    logits = outputs.logits.float()
    return functional.cross_entropy(logits, batch["targets"].to(logits.device), reduction="none")


def class_misses(model: nn.Module | None, batch: Batch, outputs: Any) -> torch.Tensor:
    """1 where the class of the highest logit is wrong, else 0: fp32 [examples]."""
    found = outputs.logits.argmax(dim=-1)
    return (found != batch["targets"].to(found.device)).float()


def judge_classes(stepper: Any, pictures: Sequence[Picture], collate: Any) -> list[Verdict]:
    """The class of the highest logit."""
    batch = collate(pictures)
    outputs = stepper.forward(batch)
    losses = class_loss(None, batch, outputs).double().tolist()
    found = outputs.logits.argmax(dim=-1).tolist()
    return [Verdict(loss, 1.0, which) for loss, which in zip(losses, found, strict=True)]
