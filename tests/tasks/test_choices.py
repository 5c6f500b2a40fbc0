"""Examples with options of their own, in any number: scores, losses, padding, what is cut."""

from contextlib import closing
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from zo_offload.config import ZOConfig
from zo_offload.errors import TaskError
from zo_offload.objective import Objective
from zo_offload.step import Stepper
from zo_offload.tasks import (
    Encoded,
    Rendered,
    answer_loss,
    answer_losses,
    collate,
    encode_rendered,
    evaluation_groups,
    hits,
    option_forward,
    option_loss,
    option_scores,
    predict,
)
from zo_offload.tasks.way import collate_answers

assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


def pose(prompt: str, *options: str, right: tuple[int, ...] = (0,)) -> Rendered:
    return Rendered(prompt, options, right, f"dev.jsonl:{len(prompt)}", fixed=False)


SEVERAL = (
    pose("the film is", " a great joy", " a pity", right=(1,)),
    pose("it was", " terrible", " great", " neither warm nor wise , it was a film", right=(2, 0)),
    pose("a film that nobody should", " see", " see and a terrible pity", right=(0,)),
    pose("it", " was a", " is a", " was great", " was neither", right=(3,)),
)
SINGLE = (
    pose("the film was", " great", " terrible", right=(1,)),
    pose("the film , it was", " great", " terrible", " film", right=(2, 0)),
)
POSED = {"several tokens": SEVERAL, "one token": SINGLE}


@pytest.fixture(params=POSED)
def encoded(request, tokenizer) -> list[Encoded]:
    found = encode_rendered(POSED[request.param], tokenizer, 64)
    lengths = {len(option) for one in found for option in one.options}
    assert (lengths == {1}) == (request.param == "one token")
    return found


def log_probabilities(model, context, option) -> torch.Tensor:
    """By one plain forward of the full text, token by token."""
    logits = model(input_ids=torch.tensor([context + option])).logits[0].double()
    picked = logits.log_softmax(-1)[len(context) - 1 : -1].gather(1, torch.tensor(option)[:, None])
    return picked.squeeze(1)


@torch.no_grad()
def test_scores_and_losses_are_their_definitions(model, encoded):
    batch = collate(encoded)
    outputs = option_forward(model, batch)
    scores, losses = option_scores(batch, outputs), option_loss(model, batch, outputs)
    sums, counts = answer_losses(batch, outputs)
    for at, one in enumerate(encoded):
        each = [log_probabilities(model, one.context, option) for option in one.options]
        expected = torch.stack([tokens.mean() for tokens in each]).log_softmax(0).float()
        assert_close(scores[at, : len(each)], expected)
        assert scores[at, len(each) :].tolist() == [-torch.inf] * (scores.shape[1] - len(each))
        assert_close(losses[at], -expected[one.target])
        assert_close(sums[at], -each[one.target].sum().float())
        assert counts[at] == len(each[one.target])
        found = int(expected.argmax())
        assert predict(batch, outputs)[at] == found
        assert hits(batch, outputs)[at] == float(found in one.right)


@torch.no_grad()
def test_a_batch_says_what_each_example_says_alone(model, encoded):
    batch = collate(encoded)
    outputs = option_forward(model, batch)
    for at, one in enumerate(encoded):
        alone = collate([one])
        scores = option_scores(alone, option_forward(model, alone))[0]
        assert_close(option_scores(batch, outputs)[at, : len(scores)], scores)


def test_no_row_for_an_option_that_is_not_there(tokenizer):
    encoded = encode_rendered(SEVERAL, tokenizer, 64)
    batch = collate(encoded)
    assert len(batch["input_ids"]) == sum(len(one.options) for one in encoded) == 11
    assert batch["option_ids"].shape[:2] == (4, 4)
    assert batch["right"].tolist() == [[0, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]]
    assert batch["targets"].tolist() == [1, 2, 0, 3]


def test_every_right_option_counts():
    batch = collate([Encoded((5,), ((1,), (2,), (3,)), 2, (2, 0)), Encoded((5,), ((1,), (2,)), 0)])
    logits = torch.zeros(2, 1, 9)
    for best, expected in ((1, [1.0, 1.0]), (2, [0.0, 0.0]), (3, [1.0, 1.0])):
        outputs = SimpleNamespace(logits=logits.clone())
        outputs.logits[:, :, best] = 5.0
        assert hits(batch, outputs).tolist() == expected


@torch.no_grad()
def test_an_answer_is_trained_on_alone(model, encoded):
    """One row an example, no other option, and the mean over all tokens of the micro-batch."""
    batch = collate_answers(encoded)
    assert len(batch["input_ids"]) == len(encoded)
    total, weight = answer_loss(model, batch, option_forward(model, batch))
    tokens = [log_probabilities(model, one.context, one.options[one.target]) for one in encoded]
    assert weight == sum(map(len, tokens))
    assert_close(total, -torch.cat(tokens).sum().float())
    every = collate(encoded)
    sums, counts = answer_losses(every, option_forward(model, every))
    assert_close(sums.sum(), total)
    assert counts.sum() == weight


@pytest.mark.parametrize("collated", [collate, collate_answers])
def test_lanes_take_them(model, encoded, collated):
    loss = option_loss if collated is collate else answer_loss
    objective = Objective(loss=loss, forward=option_forward)
    with closing(Stepper(deepcopy(model), ZOConfig(eps=1e-3), objective=objective)) as stepper:
        batches = [collated(encoded[:1]), collated(encoded[1:])]
        result = stepper.train_step(batches, lr=0.0)
        total, weight = map(sum, zip(*map(stepper.evaluate, batches), strict=True))
    assert result.loss == pytest.approx(total / weight, rel=1e-3)


def test_the_answers_tokens_begin_where_tokens_merge(make_tokenizer):
    """`was` + ` great` merge otherwise than `wa` + `s great`: the context is what is common."""
    tokenizer = make_tokenizer("<s> $A")
    (one,) = encode_rendered([pose("it wa", "s great", "s terrible pity")], tokenizer, None)
    whole = tokenizer("it was great")["input_ids"]
    assert [*one.context, *one.options[0]] == whole
    assert len(one.context) < len(tokenizer("it wa")["input_ids"])


def test_the_longest_option_decides_what_is_cut(tokenizer):
    posed = [pose("the film " * 12 + "is", " great", " a great joy and a terrible pity")]
    (whole,) = encode_rendered(posed, tokenizer, None)
    limit = whole.num_tokens - 3
    with pytest.raises(TaskError, match=f"{whole.num_tokens} tokens, and the model has {limit} "):
        encode_rendered(posed, tokenizer, limit)
    (cut,) = encode_rendered(posed, tokenizer, limit, truncate=True)
    assert cut.num_tokens == limit
    assert cut.context == (whole.context[0], *whole.context[4:])
    assert cut.options == whole.options


def test_two_choices_may_be_the_same_tokens_but_none_may_be_empty(tokenizer):
    encode_rendered([pose("it was", " great", " great")], tokenizer, None)
    with pytest.raises(TaskError, match=r"^dev.jsonl:6: option '' adds no token; "):
        encode_rendered([pose("it was", " great", "")], tokenizer, None)


def test_groups_are_of_like_length_and_bounded_rows():
    def of(length: int, *options: int) -> Encoded:
        return Encoded((5,) * length, tuple((1,) * size for size in options), 0)

    encoded = [of(9, 1, 1), of(2, 2, 2, 2), of(4, 1), of(3, 2, 2), of(30, *[2] * 7), of(1, 1)]
    # The first takes a row alone, and two beside an option of two tokens.
    assert evaluation_groups(encoded, 4) == [[5, 1], [2, 3], [0], [4]]
    assert evaluation_groups(encoded, 1) == [[5], [1], [2], [3], [0], [4]]
