"""What an engine's forward returns: the model's own output, of which ``backward`` can be asked."""

from functools import partial
from typing import Any

import torch

from zo_offload import midpoint
from zo_offload.errors import ModelError
from zo_offload.estimator import slopes
from zo_offload.lazy_logits import LazyLogits
from zo_offload.objective import loss_sum
from zo_offload.ops import Draw
from zo_offload.step import Stepper
from zo_offload.window import Window

Draws = list[tuple[int, int, Draw]]  # probe, sign, direction


class ReturnsMidpoints:
    """The part of the engine that ties lanes' results to the accumulation window."""

    stepper: Stepper
    _window: Window

    def _midpoint_output(self, results: list[tuple[Any, Any]], draws: Draws) -> Any:
        outputs: Any = results[0][1]
        by_field = midpoint.fields_of([output for _, output in results])
        # With head_chunk, the logits of a forward that gives a loss are never made.
        by_field = {
            name: values
            for name, values in by_field.items()
            if not any(isinstance(value, LazyLogits) for value in values)
        }
        for name, values in by_field.items():
            tied = midpoint.tie(midpoint.mean(values), partial(self._book_field, values, draws))
            outputs = midpoint.with_field(outputs, name, tied)
        if results[0][0] is None:
            if not by_field:
                raise ModelError(
                    "the model returned neither loss nor logits, nor another tensor in floating "
                    f"point (found {type(outputs).__name__})"
                    "; use train_batch() with an objective that reads what it returns"
                )
            return outputs
        sums = [loss_sum(loss) for loss, _ in results]
        values = [total / weight if weight else 0.0 for total, weight in sums]
        mean = torch.tensor(sum(values) / len(values), device=self.stepper.device)
        tied = midpoint.tie(mean, partial(self._book_losses, sums, draws))
        kind = type(outputs).__name__
        if midpoint.field_of(outputs, "loss") is None and isinstance(outputs, tuple | list):
            raise ModelError(
                "the objective gives a loss, and the model's output is a "
                f"{kind} without a place for one; use train_batch"
            )
        return midpoint.with_field(outputs, "loss", tied)

    def _book_losses(
        self, sums: list[tuple[float, float]], draws: Draws, grad: torch.Tensor
    ) -> None:
        self._refuse_stale(draws)
        self._window.book_losses(sums, float(grad.double()))

    def _book_field(self, values: list[torch.Tensor], draws: Draws, grad: torch.Tensor) -> None:
        self._refuse_stale(draws)
        config = self.stepper.config
        if config.fitness != "raw":
            raise ModelError(
                f'"fitness": "{config.fitness}" shapes the losses of lanes, and this loss was '
                'computed outside of them, from the logits; pass an objective, or write "raw"'
            )
        # Against another lane, elementwise: what both share would only cost digits of the sum.
        others = values[1::2] if len(config.signs) == 2 else values[:1] * len(values)
        mine = values[:: len(config.signs)]
        differences = [a.double() - b.double() for a, b in zip(mine, others, strict=True)]
        along = [float((grad.double() * difference).sum()) for difference in differences]
        for probe, slope in enumerate(slopes(along, config.eps, config.estimator)):
            self._window.book_slope(probe, slope)

    def _refuse_stale(self, draws: Draws) -> None:
        measured = draws[0][2].step
        if measured != self.stepper.step:
            raise ModelError(
                f"backward: this loss was measured for step {measured}, and step "
                f"{self.stepper.step} is next, along other directions; call forward again"
            )
