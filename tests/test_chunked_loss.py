"""A loss whose logits come in blocks is that of all of them at once."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from zo_offload import chunked_loss

CLASSES = 50


def blocks_of(logits: torch.Tensor, columns: int) -> chunked_loss.Blocks:
    for first in range(0, logits.shape[1], columns):
        yield first, logits[:, first : first + columns].clone()


def case(spread: float = 5.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = spread * torch.randn(9, CLASSES, generator=generator)
    target = torch.randint(0, CLASSES, (9,), generator=generator)
    target[::3] = -100
    return logits, target


@given(
    columns=st.integers(1, 60),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    ignored=st.sampled_from([-100, 7, -1]),
    spread=st.sampled_from([0.0, 1.0, 100.0]),
)
@settings(max_examples=60)
def test_equals_torch(columns: int, reduction: str, smoothing: float, ignored: int, spread: float):
    logits, target = case(spread)
    target[target == -100] = ignored
    found = chunked_loss.cross_entropy(
        blocks_of(logits, columns), CLASSES, target, ignored, reduction, smoothing
    )
    expected = F.cross_entropy(
        logits.double(), target, ignore_index=ignored, reduction=reduction,
        label_smoothing=smoothing,
    )  # fmt: skip
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("columns", [1, 13, CLASSES])
def test_the_normalizer_is_exact_where_numbers_are_extreme(columns: int):
    logits, _ = case()
    logits[0], logits[1, 10:], logits[2] = 3e38, -torch.inf, -3e38
    logits[3], logits[4, 0] = -torch.inf, -torch.inf
    found = chunked_loss.logsumexp(blocks_of(logits, columns))
    torch.testing.assert_close(found, logits.double().logsumexp(1).float(), rtol=1e-6, atol=0)


def test_no_token_that_counts_is_no_number():
    logits, target = case()
    loss = chunked_loss.cross_entropy(blocks_of(logits, 20), CLASSES, target.fill_(-100))
    assert loss.isnan()


@pytest.mark.parametrize("wrong", [CLASSES, -1])
def test_a_target_that_is_no_class_is_refused(wrong: int):
    logits, target = case()
    target[1] = wrong
    with pytest.raises(IndexError, match=f"target {wrong} is out of bounds, there are 50 classes"):
        chunked_loss.cross_entropy(blocks_of(logits, 20), CLASSES, target)
