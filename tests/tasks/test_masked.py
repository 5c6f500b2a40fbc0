"""A masked LM is asked for a label word: tokens, what is cut, losses, lanes, every architecture."""

from contextlib import closing
from copy import deepcopy
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tasks.masked_models import SHAPES, make_masked_lm, make_masked_tokenizer
from tasks.masked_rows import DATA, MASKED_ROWS
from zo_offload.config import ZOConfig
from zo_offload.errors import ModelError, TaskError
from zo_offload.objective import Objective
from zo_offload.step import Stepper
from zo_offload.tasks import Manner, Rendered, Source, Way, known_task, masked_way, option_loss
from zo_offload.tasks.masked import MaskLogits, mask_forward

assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
FEELINGS = (" terrible", " great")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_masked_tokenizer()


@pytest.fixture(scope="module")
def way(tokenizer: PreTrainedTokenizerFast) -> Way:
    return masked_way(Manner(), tokenizer)


@pytest.fixture(scope="module", params=SHAPES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_masked_lm(request.param)


def pose(before: str, after: str = ".", right: int = 0, words: tuple = FEELINGS) -> Rendered:
    return Rendered(before, words, (right,), f"dev.tsv:{len(before)}", rest=after)


POSED = [
    pose("the film was warm It was", right=1),
    pose("a dull and long plot , long and dull It was"),
    pose("", ": the film was wise .", right=1),
    pose("it?", ", the man in the red coat is waiting."),
]


@pytest.mark.parametrize("row", MASKED_ROWS, ids=[row.name for row in MASKED_ROWS])
def test_a_row_is_the_text_with_the_mask_in_it(tokenizer, way, row):
    spec: Any = known_task(row.name, "masked")
    posed = spec.pose(Source(spec, str(DATA)).items("test")[0])
    (one,) = way.encode([posed], 512, truncate=False)
    text = f"{row.prompt} <mask>{row.rest}"  # the mask takes the blank before it, as RoBERTa's does
    assert list(one.context) == tokenizer(text)["input_ids"]
    assert one.context[one.mask_at] == tokenizer.mask_token_id
    assert [tokenizer.decode(word) for word in one.options] == list(row.words)
    assert (one.target, {len(word) for word in one.options}) == (row.right, {1})


WORD_FAULTS = {
    "several tokens": (
        (" great", " waitingly"),
        r"label word ' waitingly': \d tokens \('.+\); choose a word that is"),
    "no space": (
        ("great", " terrible"),
        r"label word 'great': \d tokens \(.+\); write it with a space in front: ' great'"),
    "alike": ((" great", " great"), "label word ' great': the same token as ' great'; change one"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "message"), WORD_FAULTS.values(), ids=WORD_FAULTS)
def test_label_words_are_one_token_each(way, words: tuple[str, ...], message: str):
    with pytest.raises(TaskError, match="^" + message):
        way.encode([pose("it was", words=words)], None, truncate=False)


def test_a_word_that_the_tokenizer_does_not_know(tokenizer):
    from cli.common import WORDS
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: at for at, word in enumerate(["[UNK]", "[MASK]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", mask_token="[MASK]", pad_token="[UNK]"
    )
    way = masked_way(Manner(), fast)
    with pytest.raises(TaskError, match="label word ' great': no token of this tokenizer's"):
        way.encode([pose("a film", words=(" dull", " great"))], None, truncate=False)
    (one,) = way.encode([pose("a film", words=(" dull", " warm"))], None, truncate=False)
    assert fast.decode(one.context) == "a film [MASK] [UNK]"  # its own mask, and no frame
    fast.mask_token = None
    with pytest.raises(TaskError, match="the tokenizer: no mask token, which a masked LM needs"):
        masked_way(Manner(), fast)


def test_a_text_with_a_mask_of_its_own_is_named(way):
    with pytest.raises(TaskError, match=r"^dev\.tsv:9: the text holds '<mask>', .*; remove it th"):
        way.encode([pose("it <mask>"), *POSED], None, truncate=False)


def test_a_text_that_is_too_long_is_refused(way):
    limit = way.encode(POSED, None, truncate=False)[1].num_tokens
    assert way.encode(POSED, limit, truncate=False)[1].num_tokens == limit
    message = rf"^dev.tsv:43: {limit} tokens, and the model takes {limit - 1}; .*--truncate"
    with pytest.raises(TaskError, match=message):
        way.encode(POSED, limit - 1, truncate=False)


@pytest.mark.parametrize("one", POSED, ids=str)
def test_what_is_cut_is_far_from_the_mask(way, tokenizer, one: Rendered):
    """Down to the mask between the tokenizer's own tokens and one of the text."""
    (whole,) = way.encode([one], None, truncate=False)
    for limit in range(4, whole.num_tokens + 1):
        (cut,) = way.encode([one], limit, truncate=True)
        assert cut.num_tokens == min(limit, whole.num_tokens)
        assert (cut.context[0], cut.context[-1]) == (whole.context[0], whole.context[-1])
        assert cut.context[cut.mask_at] == tokenizer.mask_token_id
        before, after = cut.context[1 : cut.mask_at], cut.context[cut.mask_at + 1 : -1]
        assert before == whole.context[whole.mask_at - len(before) : whole.mask_at]
        assert after == whole.context[whole.mask_at + 1 : whole.mask_at + 1 + len(after)]
        lost = whole.mask_at - 1 - len(before), whole.num_tokens - whole.mask_at - 2 - len(after)
        longest = 0 if whole.mask_at - 1 > whole.num_tokens - whole.mask_at - 2 else 1
        assert lost[longest] >= lost[1 - longest]
        assert min(lost) == 0 or abs(len(before) - len(after)) <= 1
    with pytest.raises(TaskError, match="too few for any text"):
        way.encode([one], 3, truncate=True)


def alone(model: PreTrainedModel, one: Any) -> torch.Tensor:
    """Log-probabilities over the words, from all the logits of one row without padding."""
    logits = model(input_ids=torch.tensor([one.context])).logits[0, one.mask_at].float()
    return torch.stack([logits[word] for (word,) in one.options]).log_softmax(0)


@torch.no_grad()
def test_the_loss_is_its_definition(model, way):
    encoded = way.encode(POSED, None, truncate=False)
    assert len({one.num_tokens for one in encoded}) >= 3
    batch = way.collate(encoded)
    outputs = way.objective.forward(model, batch)
    losses = way.objective.loss(model, batch, outputs)
    scores = torch.stack([alone(model, one) for one in encoded])
    targets = torch.tensor([one.target for one in encoded])
    assert_close(losses, functional.nll_loss(scores, targets, reduction="none"))
    assert losses.std() > 0.01
    with closing(Stepper(deepcopy(model), ZOConfig(), objective=way.objective)) as stepper:
        verdicts = way.judge(stepper, encoded)
    assert [verdict.prediction for verdict in verdicts] == scores.argmax(1).tolist()
    assert_close(torch.tensor([verdict.loss for verdict in verdicts]), losses)


@torch.no_grad()
def test_the_head_sees_the_masks_alone_and_is_left_as_it_was(model, way):
    seen = []
    head = model.get_output_embeddings()
    watch = head.register_forward_hook(lambda *told: seen.append(tuple(told[2].shape)))
    batch = way.collate(way.encode(POSED, None, truncate=False))
    assert mask_forward(model, batch).logits.shape == (4, 1, model.config.vocab_size)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    whole = model(**inputs).logits
    watch.remove()
    assert seen == [(4, 1, 400), tuple(whole.shape)]
    assert whole.shape[1] == batch["input_ids"].shape[1]
    assert not head._forward_pre_hooks


@torch.no_grad()
def test_a_head_that_is_not_to_be_found_gives_the_same(model, way, monkeypatch):
    batch = way.collate(way.encode(POSED, None, truncate=False))
    expected = mask_forward(model, batch).logits
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    assert_close(mask_forward(model, batch).logits, expected)


def lane_losses(model, way, batches, **config) -> list[float]:
    with closing(
        Stepper(deepcopy(model), ZOConfig(eps=1e-3, **config), objective=way.objective)
    ) as stepper:
        found = []
        for _ in range(2):
            found += stepper.train_step(batches, lr=1e-2).lane_losses
        return [*found, *stepper.evaluate(batches[0])]


def test_lanes_of_other_widths_do_not_meet_at_the_head(model, way):
    """Both signs of two micro-batches stand in the same head; offloaded, to the same bits."""
    encoded = way.encode(POSED, None, truncate=False)
    batches = [way.collate(encoded[:2]), way.collate(encoded[2:])]
    expected = lane_losses(model, way, batches)
    assert lane_losses(model, way, batches, offload_param={"device": "cpu"}) == expected
    one_by_one = lane_losses(model, way, batches, live_lanes=1)
    assert one_by_one == expected
    whole = SimpleNamespace(objective=Objective(loss=option_loss, forward=all_logits))
    plain = lane_losses(model, whole, batches)
    assert plain == pytest.approx(expected, rel=1e-4)
    in_chunks = lane_losses(model, way, batches, head_chunk=77)
    assert in_chunks == pytest.approx(expected, rel=1e-4)


def all_logits(model, batch):
    """Of every position, of which the masks' are taken then."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs).logits
    return MaskLogits(logits[torch.arange(len(logits)), batch["mask_at"]][:, None])


def test_the_answer_alone_may_be_learnt(model, tokenizer):
    """`train_on = "answer"`: over the whole vocabulary."""
    way = masked_way(Manner("answer"), tokenizer)
    encoded = way.encode(POSED, None, truncate=False)
    batch = way.collate(encoded)
    with torch.no_grad():
        total, weight = way.objective.loss(model, batch, way.objective.forward(model, batch))
        picked = []
        for one in encoded:
            logits = model(input_ids=torch.tensor([one.context])).logits[0, one.mask_at]
            picked.append(-logits.log_softmax(0)[one.options[one.target][0]])
    assert weight == 4
    assert_close(total, torch.stack(picked).sum())


def test_an_adapter_beside_it(model, way):
    """It begins at the base's loss, and moves; the mask is found through the wrapper."""
    batch = way.collate(way.encode(POSED, None, truncate=False))
    lora = {"mode": "peft", "peft_config": {"peft_type": "LORA", "r": 2}}
    lora["peft_config"]["target_modules"] = "all-linear"
    found = []
    for trainable in ({}, lora):
        config = ZOConfig.model_validate({"trainable": trainable})
        with closing(Stepper(deepcopy(model), config, objective=way.objective)) as stepper:
            found.append(stepper.evaluate(batch)[0])
            for _ in range(5):
                stepper.train_step([batch], lr=0.05)
            found.append(stepper.evaluate(batch)[0])
    before, _, same, after = found
    assert same == pytest.approx(before, rel=1e-5)
    assert after != same


def test_logits_of_other_positions_are_refused(way, model):
    class Prompted(torch.nn.Module):
        """Puts tokens of its own before the text, as prompt tuning does."""

        def forward(self, input_ids, attention_mask):
            more = [torch.cat([each[:, :3], each], 1) for each in (input_ids, attention_mask)]
            return model(input_ids=more[0], attention_mask=more[1])

        def get_output_embeddings(self):
            return model.get_output_embeddings()

    batch = way.collate(way.encode(POSED, None, truncate=False))
    width = batch["input_ids"].shape[1]
    told = f"Prompted: logits of {width + 3} positions for rows of {width} tokens, so that no mask"
    with pytest.raises(ModelError, match=told):
        mask_forward(Prompted(), batch)
