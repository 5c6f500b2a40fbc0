"""Lazy logits are what eager ones would be, whatever is done to them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from zo_offload.errors import ModelError
from zo_offload.lazy_logits import LazyLogits, made
from zo_offload.lazy_rules import lazy_linear

BATCH, TOKENS, WIDTH, VOCABULARY = 2, 6, 8, 20


def sixteenths(values: torch.Tensor) -> torch.Tensor:
    """Such values that fp32 sums of their products are exact in whatever order they are added.

    A logit that is rounded to bfloat16 afterwards is then the same of a block and of the whole.
    """
    return (16 * values).round() / 16


class Plain:
    """A head that counts what it is asked for."""

    num_columns, chunk = VOCABULARY, 7

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = sixteenths(torch.randn(VOCABULARY, WIDTH, generator=generator))
        self.wholes: list[str | None] = []

    def block(self, hidden: torch.Tensor, first: int, last: int) -> torch.Tensor:
        return F.linear(hidden, self.weight[first:last])

    def pairs(self, hidden: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return (hidden * self.weight[columns]).sum(1)

    def whole(self, hidden: torch.Tensor, reader: str | None) -> torch.Tensor:
        self.wholes.append(reader)
        return F.linear(hidden, self.weight)


def both() -> tuple[Plain, Any, torch.Tensor]:
    """A head, lazy logits, and the same eagerly."""
    head, hidden = Plain(), sixteenths(torch.randn(BATCH, TOKENS, WIDTH))
    return head, lazy_linear(head, hidden), F.linear(hidden, head.weight)


BIAS = torch.linspace(-1, 1, VOCABULARY)
LABELS = torch.arange(BATCH * TOKENS).view(BATCH, TOKENS) % VOCABULARY
SHIFTED = LABELS[:, 1:].flatten()


def flat(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1, VOCABULARY)


def cast(x: torch.Tensor) -> torch.Tensor:
    return x.to(device="cpu", dtype=torch.bfloat16).to(torch.float32).to(x)


def item_of_all(x: torch.Tensor) -> torch.Tensor:
    return x[torch.tensor([[True, False] * 3] * 2)]


DEFERRED: dict[str, Callable[[Any], torch.Tensor]] = {
    "flat": flat,
    "float": lambda x: flat(x.float()),
    "cast": lambda x: flat(cast(x)),
    "shift": lambda x: x[..., :-1, :].contiguous().view(-1, x.size(-1)),
    "reshape": lambda x: torch.reshape(x[:, 1:].detach().clone(), (-1, x.shape[2])),
    "shape in a tuple": lambda x: x.reshape((BATCH * TOKENS, -1)),
    "a position": lambda x: x[:, -1],
    "a position of all": lambda x: x[:, -1, :],
    "one vector": lambda x: x[0, 3],
    "a list of positions": lambda x: x[:, torch.tensor([0, 3, 3])].reshape(-1, VOCABULARY),
    "a mask": item_of_all,
    "a new dimension": lambda x: x[:, None, 2][:, 0],
    "scaled": lambda x: flat(2 * x / 3.0),
    "capped": lambda x: flat(torch.tanh(x / 2.0) * 2),
    "bias": lambda x: flat(x + BIAS[None]),
}


def labels_for(logits: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(logits)) % VOCABULARY if logits.dim() > 1 else torch.tensor(3)


REDUCED: dict[str, Callable[[Any], torch.Tensor]] = {
    "cross_entropy": lambda x: F.cross_entropy(x, labels_for(x)),
    "each": lambda x: F.cross_entropy(input=x, target=labels_for(x), reduction="none"),
    "smoothed": lambda x: torch.nn.CrossEntropyLoss(label_smoothing=0.1)(x, labels_for(x)),
    "logsumexp": lambda x: x.logsumexp(dim=-1),
    "logsumexp, dimension kept": lambda x: torch.logsumexp(x, x.dim() - 1, keepdim=True),
    "gather": lambda x: x.gather(-1, labels_for(x)[..., None].expand(*x.shape[:-1], 3)),
}


@pytest.mark.parametrize("change", DEFERRED)
@pytest.mark.parametrize("reduction", REDUCED)
def test_what_models_do_makes_nothing_whole(change: str, reduction: str):
    head, lazy, eager = both()
    changed, expected = DEFERRED[change](lazy), DEFERRED[change](eager)
    assert isinstance(changed, LazyLogits)
    assert (changed.shape, changed.dtype) == (expected.shape, expected.dtype)
    found = REDUCED[reduction](changed)
    assert head.wholes == []
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, REDUCED[reduction](expected), rtol=1e-5, atol=1e-5)
    assert changed.value().equal(expected)
    assert head.wholes == [None]


ANYTHING: dict[str, Callable[[Any], Any]] = {
    "argmax": lambda x: x.argmax(-1),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "softmax of a flat view": lambda x: flat(x).softmax(-1),
    "some columns": lambda x: x[..., :5],
    "one column": lambda x: x[..., -1],
    "a column in front": lambda x: x[..., None],
    "an index of lists": lambda x: x[[0, 1]],
    "columns merged": lambda x: x.view(BATCH, -1),
    "columns split": lambda x: x.reshape(-1, 4, VOCABULARY // 4),
    "transposed": lambda x: F.cross_entropy(x.transpose(1, 2), LABELS),
    "classes of the second dimension": lambda x: F.cross_entropy(
        x, torch.zeros(BATCH, VOCABULARY, dtype=torch.int64)
    ),
    "probabilities": lambda x: F.cross_entropy(flat(x), torch.full((12, 20), 0.05)),
    "weights": lambda x: F.cross_entropy(flat(x), LABELS.flatten(), weight=BIAS + 2),
    "bfloat16 log-sum-exp": lambda x: x.bfloat16().logsumexp(-1),
    "over positions": lambda x: x.logsumexp(1),
    "gathered positions": lambda x: x.gather(1, LABELS[..., None] % TOKENS),
    "fewer rows gathered": lambda x: x.gather(2, LABELS[:1, :, None]),
    "integers": lambda x: x.to(torch.int32),
    "a tensor added": lambda x: x + torch.ones(BATCH, TOKENS, 1),
    "a scale that is a tensor": lambda x: x * torch.tensor(2.0),
    "divided by": lambda x: 1.0 / x,
    "itself": lambda x: x * x + x,
    "in a list": lambda x: torch.cat([x, x[:, :1]], 1),
    "as NumPy": lambda x: torch.from_numpy(x.numpy()),
    "sum": lambda x: x.sum(),
    "iterated": lambda x: next(iter(x)),
    "chunks": lambda x: x.chunk(2)[1],
    "operator": lambda x: torch.ops.aten.add.Tensor(x, 1),
    "below torch function": lambda x: beneath(x),
}


def beneath(x: torch.Tensor) -> torch.Tensor:
    with torch._C.DisableTorchFunction():
        return x.exp()


@pytest.mark.parametrize("name", ANYTHING)
def test_anything_else_gives_the_same_bits(name: str):
    head, lazy, eager = both()
    found, expected = made(ANYTHING[name](lazy)), ANYTHING[name](eager)
    assert found.equal(expected)
    assert found.dtype == expected.dtype
    assert len(head.wholes) == 1


def test_metadata_makes_nothing_whole():
    head, lazy, eager = both()
    assert (lazy.shape, lazy.size(-1), lazy.dim(), lazy.ndim) == (eager.shape, VOCABULARY, 3, 3)
    assert (lazy.dtype, lazy.device, len(lazy)) == (eager.dtype, eager.device, BATCH)
    assert (lazy.numel(), lazy.is_floating_point()) == (eager.numel(), True)
    assert (lazy.requires_grad, repr(lazy)) == (False, "LazyLogits((2, 6, 20), torch.float32)")
    assert head.wholes == []


def add_in_place(x: Any) -> None:
    x += 1.0


def set_item(x: Any) -> None:
    x[:, 0, :4] = 5.0


def set_through_a_view(x: Any) -> None:
    x[:, -1].masked_fill_(torch.arange(VOCABULARY) % 2 == 0, -9.0)


def set_through_a_flat_view(x: Any) -> None:
    torch.neg(flat(x), out=flat(x))


@pytest.mark.parametrize(
    "write", [add_in_place, set_item, set_through_a_view, set_through_a_flat_view]
)
def test_what_is_written_is_seen_where_it_would_be(write: Callable[[Any], None]):
    """By views that were taken before, not by copies."""
    _, lazy, eager = both()
    views = [
        (x, x[:, -1], flat(x), x.float(), x * 2, x.clone(), x[torch.tensor([1, 0])])
        for x in (lazy, eager)
    ]
    for x in (lazy, eager):
        write(x)
    loss, expected = (F.cross_entropy(flat(x), LABELS.flatten()) for x in (lazy, eager))
    assert loss.equal(expected)
    for found, expected in zip(*views, strict=True):
        assert made(found).equal(expected)


def test_a_wrong_target_is_refused_as_by_torch():
    _, lazy, _ = both()
    with pytest.raises(IndexError, match="target 20 is out of bounds"):
        F.cross_entropy(flat(lazy), LABELS.flatten() + 9)
    with pytest.raises(ValueError, match="batch_size"):
        F.cross_entropy(flat(lazy), SHIFTED)


def test_after_the_lane_nothing_can_be_made():
    head, lazy, _ = both()
    lazy.family.closed = True
    for read in (lambda: lazy.sum(), lambda: F.cross_entropy(flat(lazy), LABELS.flatten())):
        with pytest.raises(ModelError, match=r"were not made: with zeroth_order.head_chunk"):
            read()
    with pytest.raises(ModelError, match="were not made"):
        lazy.gather(2, LABELS[..., None])
    assert head.wholes == []
