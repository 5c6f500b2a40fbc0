"""Hugging Face models in the engine: precision, generation, export."""

import json
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM

import zo_offload
from engine.common import Net, batch, config, net, opt, tokens
from zo_offload.errors import ModelError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def precision(name: str) -> dict:
    return {} if name == "fp32" else {name: {"enabled": True}}


def trained(make_engine, name: str, **more):
    engine = make_engine(opt(), ds=config(**precision(name), **more))
    for step in range(3):
        engine.train_batch(iter([tokens(step)]))
    return engine


@pytest.mark.parametrize("name", DTYPES)
def test_the_exported_model_is_the_trained_one(make_engine, tmp_path, name: str):
    engine = trained(make_engine, name, zeroth_order={"offload_param": {"device": "cpu"}})
    with torch.no_grad():
        expected = engine(**tokens(9))
    engine.save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").eval()
    assert {p.dtype for p in model.parameters()} == {DTYPES[name]}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == str(
        DTYPES[name]
    ).removeprefix("torch.")
    served = engine.module.state_dict()
    assert served.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, served[key]), key
    with torch.no_grad():
        found = model(**tokens(9))
    if name == "fp32":
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.loss, expected.loss)
    else:  # in lanes the head's logits are fp32, lest they drown the signal
        assert expected.logits.dtype == torch.float32
        step = 2 * torch.finfo(DTYPES[name]).eps
        torch.testing.assert_close(found.logits.float(), expected.logits, rtol=step, atol=1e-2)


@pytest.mark.parametrize("name", DTYPES)
def test_precision_of_the_json(make_engine, name: str):
    engine = trained(make_engine, name)
    assert {value.dtype for value in engine.module.state_dict().values()} == {DTYPES[name]}
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            out = engine(**tokens())
        assert out.loss.dtype == out.logits.dtype == torch.float32


def test_training_keeps_improving_in_bf16(make_engine):
    params = {"lr": 2e-3}
    ds = config(optimizer={"type": "ZO", "params": params}, **precision("bf16"))
    engine = make_engine(opt(), ds=ds)
    first = float(engine.train_batch(iter([tokens()])))
    losses = [float(engine.train_batch(iter([tokens()]))) for _ in range(60)]
    assert losses[-1] < first - 0.05


def test_a_model_from_its_directory(make_engine, tmp_path):
    opt().save_pretrained(tmp_path / "model")
    loaded = make_engine(str(tmp_path / "model"))
    given = make_engine(opt())
    for engine in (loaded, given):
        engine.train_batch(iter([tokens()]))
    assert loaded.last_result == given.last_result


def test_generate(make_engine):
    engine = trained(make_engine, "fp32", zeroth_order={"offload_param": {"device": "cpu"}})
    plain: Any = opt()
    plain.load_state_dict(engine.module.state_dict())
    ids = tokens()["input_ids"][:, :4]
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(engine.generate(ids, **options), plain.generate(ids, **options))


def test_generate_and_evaluation_do_not_disturb_training(make_engine):
    plain, curious = make_engine(opt()), make_engine(opt())
    for step in range(2):
        for engine in (plain, curious):
            if engine is curious:
                engine.generate(tokens()["input_ids"][:1, :3], max_new_tokens=2, do_sample=False)
                engine.eval_batch(iter([tokens()]))
            engine.train_batch(iter([tokens(step)]))
    assert plain.last_result == curious.last_result


def test_an_objective_on_a_model_whose_output_has_no_loss(make_engine):
    """An encoder's output class has no such field."""
    from transformers import OPTModel

    model = OPTModel(opt().config).eval()
    engine = make_engine(
        model,
        objective=lambda model, data, outputs: outputs.last_hidden_state.float().square().mean(),
    )
    out = engine(input_ids=tokens()["input_ids"])
    assert out.last_hidden_state.shape == (4, 10, 32)
    engine.backward(out["loss"])
    engine.step()
    assert engine.last_result.projected_grads[0] != 0


def test_a_head_in_chunks(make_engine):
    """The loss of ``forward`` can be stepped on; logits come where there is no loss."""

    def engine_of(chunk: int | None):
        return make_engine(opt(), ds=config(zeroth_order={"head_chunk": chunk}))

    grads = []
    for chunk in (None, 20):
        engine = engine_of(chunk)
        with torch.no_grad():
            seen = engine(**tokens()).logits
        logits = engine(input_ids=tokens()["input_ids"]).logits
        engine.backward(torch.nn.functional.cross_entropy(logits[:, 0], logits[:, 1].argmax(-1)))
        engine.step()
        grads.append((seen, logits.detach(), *engine.last_result.projected_grads))
        out = engine(**tokens(1))
        assert out.logits.shape == (4, 10, 64)
        if chunk is not None:
            with pytest.raises(ModelError, match="take the labels out of the batch"):
                out.logits.sum()
        engine.backward(out.loss)
        engine.step()
        grads[-1] += engine.last_result.projected_grads
    assert grads[0][0].equal(grads[1][0])
    assert grads[0][1].equal(grads[1][1])
    assert grads[0][2] == grads[1][2]
    assert grads[1][3] == pytest.approx(grads[0][3], abs=2e-3)


def test_frozen_parameters_stay(make_engine):
    model = opt()
    for parameter in model.model.decoder.embed_tokens.parameters():
        parameter.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = make_engine(model)
    engine.train_batch(iter([tokens()]))
    after = engine.module.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert not {name for name in moved if "embed_tokens" in name or "lm_head" in name}


def test_errors_are_public():
    assert issubclass(zo_offload.errors.ConfigError, zo_offload.errors.ZOError)


class LossLast(Net):
    """Returns ``(logits, loss)``, in a container of the caller's choice."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        out = super().forward(x, labels)
        return self.wrap(out.logits, out.loss)


class Both(NamedTuple):
    logits: torch.Tensor
    loss: torch.Tensor | None


@pytest.mark.parametrize(
    "wrap",
    [lambda *both: both, lambda *both: list(both), Both],
    ids=["tuple", "list", "namedtuple"],
)
def test_outputs_keep_their_type_and_places(make_engine, wrap: Any):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LossLast(wrap)
    engine, plain = make_engine(model), make_engine(net())
    outputs, expected = engine(**batch()), plain(**batch())
    assert type(outputs) is type(wrap(1, 2))
    assert torch.equal(outputs[0], expected.logits)
    assert torch.equal(outputs[1], expected.loss)
    for each, loss in ((engine, outputs[1]), (plain, expected.loss)):
        each.backward(loss)
        each.step()
    assert engine.last_result == plain.last_result
