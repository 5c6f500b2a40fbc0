"""The loss is MeZO's whatever the padding, the path and the architecture."""

import inspect
from contextlib import closing
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from zo_offload.config import ZOConfig
from zo_offload.objective import Objective
from zo_offload.step import Stepper
from zo_offload.tasks import (
    Example,
    Prompt,
    collate,
    encode,
    model_inputs,
    option_forward,
    option_loss,
    predict,
)
from zo_offload.tasks.encode import _collate_option_rows, _collate_shared_rows
from zo_offload.tasks.objective import option_scores

assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
ONE_TOKEN, SEVERAL_TOKENS = " terrible, great", " terrible, great joy, bad"


@pytest.fixture
def encoded(request, tokenizer, sentences):
    labels = getattr(request, "param", ONE_TOKEN)
    examples = [Example({"a": text}, line % 2, line) for line, text in enumerate(sentences)]
    return encode(examples, Prompt("{a} it was", labels), tokenizer, 64)


def _loss(model, batch):
    with torch.no_grad():
        return option_loss(model, batch, option_forward(model, batch))


@pytest.mark.parametrize("encoded", [ONE_TOKEN, SEVERAL_TOKENS], indirect=True)
def test_padding_changes_nothing(model, encoded):
    assert len({one.num_tokens for one in encoded}) > 3
    together = _loss(model, collate(encoded))
    alone = torch.cat([_loss(model, collate([one])) for one in encoded])
    assert_close(together, alone)


def test_both_paths_give_the_same_loss(model, encoded):
    shared, per_option = _collate_shared_rows(encoded), _collate_option_rows(encoded)
    assert len(per_option["input_ids"]) == 2 * len(shared["input_ids"])
    assert_close(_loss(model, shared), _loss(model, per_option))


@pytest.mark.parametrize("encoded", [ONE_TOKEN, SEVERAL_TOKENS], indirect=True)
def test_the_loss_is_its_definition(model, encoded):
    """One plain forward for each full text, the log-probabilities picked token by token."""

    def score(context, option):
        logits = model(input_ids=torch.tensor([context + option])).logits[0].double()
        log_probabilities = logits.log_softmax(-1)
        places = range(len(context) - 1, len(context) + len(option) - 1)
        picked = [log_probabilities[at, token] for at, token in zip(places, option, strict=True)]
        return torch.stack(picked).mean()

    with torch.no_grad():
        scores = [
            torch.stack([score(one.context, option) for option in one.options]) for one in encoded
        ]
        targets = torch.tensor([one.target for one in encoded])
        expected = functional.cross_entropy(torch.stack(scores), targets, reduction="none")
        batch = collate(encoded)
        outputs = option_forward(model, batch)
    assert_close(option_loss(model, batch, outputs), expected.float())
    assert predict(batch, outputs).tolist() == torch.stack(scores).argmax(-1).tolist()


@pytest.mark.parametrize("encoded", [ONE_TOKEN, SEVERAL_TOKENS], indirect=True)
def test_only_scored_positions_are_computed(model, encoded):
    batch = collate(encoded)
    inputs = model_inputs(model, batch)
    scored = max(len(option) for one in encoded for option in one.options)
    assert model(**inputs).logits.shape[1] == scored == inputs.pop("logits_to_keep")
    full = model(**inputs)
    assert full.logits.shape[1] == batch["input_ids"].shape[1]
    assert_close(option_loss(model, batch, full), _loss(model, batch))


def test_a_model_gets_only_what_it_takes(model, encoded):
    class Old(nn.Module):
        def forward(self, input_ids, attention_mask=None): ...

    class Wrapped(nn.Module):
        def forward(self, *args, **kwargs): ...

        def get_base_model(self):
            return model

    batch = collate(encoded)
    assert set(model_inputs(Old(), batch)) == {"input_ids", "attention_mask"}
    assert set(model_inputs(Wrapped(), batch)) == set(model_inputs(model, batch))
    taken = set(inspect.signature(model.forward).parameters)
    assert not {"option_ids", "targets"} & taken


def test_scores_are_fp32_and_normalized_over_options(encoded):
    batch = collate(encoded)
    logits = torch.randn(len(encoded), 1, 300, generator=torch.Generator().manual_seed(0))
    scores = option_scores(batch, SimpleNamespace(logits=logits.bfloat16()))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.exp().sum(-1), torch.ones(len(encoded)))


@pytest.mark.parametrize("encoded", [ONE_TOKEN, SEVERAL_TOKENS], indirect=True)
def test_a_head_in_chunks_is_never_whole(model, encoded, caplog):
    batch = collate(encoded)
    objective = Objective(loss=option_loss, forward=option_forward)
    found = []
    for chunk in (None, 77):
        config = ZOConfig(head_chunk=chunk)
        with closing(Stepper(deepcopy(model), config, objective=objective)) as stepper:
            found.append([*stepper.train_step([batch], 0.0).lane_losses, *stepper.evaluate(batch)])
            assert stepper.weights.arena.peak_bytes <= stepper.plan.device_bytes
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert [record for record in caplog.records if "head_chunk" in record.getMessage()] == []


def test_the_loss_can_be_differentiated(model, encoded):
    batch = collate(encoded)
    loss = option_loss(model, batch, option_forward(model, batch)).mean()
    (gradient,) = torch.autograd.grad(loss, model.get_input_embeddings().weight)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0
