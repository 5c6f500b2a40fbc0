"""Answers in words: decoded greedily up to the stop text, streamed or not, and rewarded."""

from contextlib import closing
from copy import deepcopy

import pytest
import torch

from zo_offload.config import OffloadConfig, ZOConfig
from zo_offload.errors import TaskError
from zo_offload.objective import Objective
from zo_offload.step import Stepper
from zo_offload.tasks import (
    Decoding,
    Manner,
    Rendered,
    causal_way,
    encode_rendered,
    option_forward,
    sum_up,
    token_f1_of,
)

MOST = 6
POSED = [
    Rendered("it was", (" great\n",), (0,), "qa.jsonl:1", ("great", "a joy"), fixed=False),
    Rendered("a film that nobody", (" should see\n",), (0,), "qa.jsonl:2", ("x",), fixed=False),
    Rendered("the", (" film\n",), (0,), "qa.jsonl:3", ("film",), fixed=False),
]


@pytest.fixture
def decoding(tokenizer) -> Decoding:
    return Decoding(tokenizer, MOST)


@pytest.fixture
def encoded(tokenizer):
    return encode_rendered(POSED, tokenizer, 64, max_new_tokens=MOST)


def test_every_token_that_holds_the_stop_text_ends_an_answer(decoding, tokenizer):
    texts = [tokenizer.decode([token]) for token in decoding.ends]
    assert decoding.ends[0] == tokenizer.eos_token_id
    assert texts[1:]
    assert all("\n" in text for text in texts[1:])


def test_a_batch_is_of_whole_prompts_padded_on_the_left(decoding, encoded, tokenizer):
    batch = decoding.collate(encoded)
    for ids, mask, posed in zip(batch["input_ids"], batch["attention_mask"], POSED, strict=True):
        assert tokenizer.decode(ids[mask.bool()]) == f"<s>{posed.prompt}"
        assert mask.tolist() == sorted(mask.tolist())
    assert batch["references"] == [posed.references for posed in POSED]


def test_texts_end_at_the_stop_text(decoding, tokenizer):
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (
        " great\n it was", "\n", " a joy")]  # fmt: skip
    longest = max(map(len, ids))
    padded = torch.tensor([row + [decoding.ends[0]] * (longest - len(row)) for row in ids])
    assert decoding.texts(padded) == ["great", "", "a joy"]
    batch = {"references": [("Great!", "x"), ("y",), ("a great joy",)]}
    assert decoding.rewards(batch, padded).tolist() == [1.0, 0.0, 0.0]
    found = decoding.rewards(batch, padded, token_f1_of).tolist()
    assert found == pytest.approx([1.0, 0.0, 2 / 3])


@torch.no_grad()
def test_streamed_answers_are_those_of_each_prompt_alone(model, decoding, encoded):
    alone = [decoding.texts(decoding.generate(model, decoding.collate([e])))[0] for e in encoded]
    way = causal_way(Manner("answer", True, ("exact_match", "f1"), "\n", MOST), decoding.tokenizer)
    config = ZOConfig(offload_param=OffloadConfig(device="cpu"))
    with closing(Stepper(deepcopy(model), config, objective=way.objective)) as stepper:
        stepper.weights.poison = True
        verdicts = way.judge(stepper, encoded)
    assert [verdict.prediction for verdict in verdicts] == alone
    batch = way.collate(encoded)
    total, weight = way.objective.loss(model, batch, option_forward(model, batch))
    assert sum(verdict.loss for verdict in verdicts) == pytest.approx(total.item(), rel=1e-5)
    assert sum(verdict.weight for verdict in verdicts) == weight
    found = sum_up(verdicts, encoded, way.metrics)
    assert (found.metric, set(found.others), found.num_examples) == ("exact_match", {"f1"}, 3)


def test_an_objective_can_call_the_reward(model, decoding, encoded):
    """Lanes generate, each at its own length, and a reward comes out."""

    def loss(model, batch, ids):
        return 1 - decoding.rewards(batch, ids, token_f1_of)

    objective = Objective(loss=loss, forward=decoding.generate)
    with closing(Stepper(deepcopy(model), ZOConfig(eps=0.3), objective=objective)) as stepper:
        result = stepper.train_step([decoding.collate(encoded)], lr=1e-3)
    assert 0 <= result.loss <= 1


def test_room_for_the_answer_is_kept(tokenizer):
    long = [Rendered("the film " * 10, (" great\n",), (0,), "qa.jsonl:1", ("great",), fixed=False)]
    (whole,) = encode_rendered(long, tokenizer, None, max_new_tokens=MOST)
    needed = len(whole.prompt) + MOST
    with pytest.raises(TaskError, match=f"{needed} tokens with the {MOST} to generate, and the mo"):
        encode_rendered(long, tokenizer, needed - 1, max_new_tokens=MOST)
    cut = encode_rendered(long, tokenizer, needed - 4, truncate=True, max_new_tokens=MOST)[0]
    assert cut.prompt == (whole.prompt[0], *whole.prompt[5:])
    assert cut.context == (whole.context[0], *whole.context[5:])


class Wordless:
    """A tokenizer that cannot write the stop text."""

    eos_token_id = 1

    def __len__(self) -> int:
        return 3

    def batch_decode(self, rows: list[list[int]]) -> list[str]:
        return ["a"] * len(rows)


def test_a_tokenizer_without_the_stop_text_still_ends():
    assert Decoding(Wordless()).ends == (1,)  # pyright: ignore[reportArgumentType]
