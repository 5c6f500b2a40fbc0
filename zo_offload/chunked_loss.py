"""Losses over a vocabulary of which only a block of columns exists at a time.

The normalizer is kept as a running maximum m and s = sum exp(x - m), rescaled as m grows, so that
no exponent overflows. Blocks are fp32; s, and what a loss adds up, is float64, a number a token:
what separates L(W + eps z) from L(W - eps z) is small.

Reference: Milakov and Gimelshein (2018), arXiv 1805.02867, algorithm 3; here a block at a time.
"""

from collections.abc import Iterable

import torch

Blocks = Iterable[tuple[int, torch.Tensor]]
"""The first column of each and the block, fp32 ``[tokens, columns]``, which may be overwritten."""


def logsumexp(blocks: Blocks) -> torch.Tensor:
    """``log(sum(exp(row)))`` of every row, fp32 ``[tokens]``.

    Example:
        >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
        >>> halves = [(0, logits[:, :2].clone()), (2, logits[:, 2:].clone())]
        >>> logsumexp(halves).equal(logits.logsumexp(1))
        True
    """
    normalizer = _Normalizer()
    for _, block in blocks:
        normalizer.add(block)
    return normalizer.value().float()


def cross_entropy(
    blocks: Blocks,
    num_classes: int,
    target: torch.Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """``F.cross_entropy`` of logits that come in blocks, fp32.

    Args:
        blocks: Of the logits, all columns once.
        num_classes: Columns of all of them.
        target: int64 ``[tokens]``, column numbers or ``ignore_index``.
        ignore_index: Tokens with this target do not count.
        reduction: ``mean``, ``sum`` or ``none``.
        label_smoothing: Share of the loss that is spread over all columns.

    Raises:
        IndexError: A target is no column (on an accelerator: an assertion there, as in torch).
    """
    counts = target != ignore_index
    _refuse_outside(target, counts, num_classes)
    normalizer, picked, total = _Normalizer(), 0.0, 0.0
    for first, block in blocks:
        here = (target >= first) & (target < first + block.shape[1])
        column = (target - first).clamp(0, block.shape[1] - 1)
        chosen = block.gather(1, column[:, None]).squeeze(1)
        picked = picked + chosen.double().where(here, 0.0)
        if label_smoothing:
            total = total + block.sum(1, dtype=torch.float64)
        normalizer.add(block)
    losses = normalizer.value() - picked
    if label_smoothing:
        smooth = normalizer.value() - total / num_classes
        losses = (1.0 - label_smoothing) * losses + label_smoothing * smooth
    losses = losses.where(counts, 0.0)
    if reduction == "none":
        return losses.float()
    whole = losses.sum()
    return (whole if reduction == "sum" else whole / counts.sum()).float()


class _Normalizer:
    """Logarithms of sums of exponentials, a block at a time."""

    def __init__(self) -> None:
        self._top: torch.Tensor | None = None
        self._sum: torch.Tensor | None = None

    def add(self, block: torch.Tensor) -> None:
        """Overwrites the block."""
        top = block.amax(1)
        if self._top is not None:
            top = torch.maximum(top, self._top)
        shift = top.where(top != -torch.inf, 0.0)  # a row of -inf alone: exp(-inf - 0) = 0
        added = block.sub_(shift[:, None]).exp_().sum(1).double()
        if self._top is not None:
            assert self._sum is not None
            added += self._sum * (self._top - shift).double().exp()
        self._top, self._sum = top, added

    def value(self) -> torch.Tensor:
        """float64 ``[tokens]``."""
        assert self._top is not None
        assert self._sum is not None
        return self._top.double().where(self._top != -torch.inf, 0.0) + self._sum.log()


def _refuse_outside(target: torch.Tensor, counts: torch.Tensor, num_classes: int) -> None:
    outside = counts & ((target < 0) | (target >= num_classes))
    if target.device.type != "cpu":
        torch.ops.aten._assert_async.msg(~outside.any(), "cross_entropy: a target is out of bounds")
    elif bool(outside.any()):
        raise IndexError(
            f"cross_entropy: target {int(target[outside][0])} is out of bounds, "
            f"there are {num_classes} classes"
        )
