"""Accuracy and mean loss over every example, once each, whatever the batches."""

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from zo_offload.tasks import (
    Example,
    Prompt,
    encode,
    evaluate,
    evaluation_batches,
    option_forward,
    option_loss,
    read_examples,
)


@pytest.fixture
def encoded(tokenizer, sentences):
    examples = [Example({"a": text}, line % 2, line) for line, text in enumerate(sentences)]
    return encode(examples, Prompt("{a} it was", " terrible, great"), tokenizer, 64)


def test_batches_are_sorted_by_length_and_hold_every_example(encoded):
    batches = list(evaluation_batches(encoded, batch_size=2))
    lengths = torch.cat([batch["attention_mask"].sum(dim=1) for batch in batches]).tolist()
    assert lengths == sorted(one.num_tokens for one in encoded)
    assert [len(batch["targets"]) for batch in batches] == [2, 2, 1]


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_the_batch_size_does_not_matter(model, encoded, batch_size):
    losses = []

    def forward(batch):
        assert not torch.is_grad_enabled()
        outputs = option_forward(model, batch)
        losses.extend(option_loss(model, batch, outputs).tolist())
        return outputs

    result = evaluate(forward, evaluation_batches(encoded, batch_size))
    hits = [loss < torch.tensor(2.0).log() for loss in losses]  # of two options
    assert result.num_examples == len(encoded)
    assert result.loss == pytest.approx(sum(losses) / len(losses), abs=1e-12)
    assert result.accuracy == pytest.approx(sum(hits) / len(hits))


def test_acceptance_zero_shot(acceptance):
    """The reference point in the acceptance folder's README."""
    tokenizer = AutoTokenizer.from_pretrained(acceptance / "opt-mini")
    model = AutoModelForCausalLM.from_pretrained(acceptance / "opt-mini").eval()
    examples = read_examples(acceptance / "subj" / "dev.tsv")[:1_000]
    prompt = Prompt("{sentence} This is a", " review, story")
    encoded = encode(examples, prompt, tokenizer, model.config.max_position_embeddings)
    batches = evaluation_batches(encoded, batch_size=50)
    result = evaluate(partial(option_forward, model), batches)
    assert result.accuracy == pytest.approx(0.496, abs=0.01)
