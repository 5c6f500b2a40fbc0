"""forward, backward and step, against train_batch and against torch's autograd."""

import math
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from parity.plain import noise
from torch.nn import functional

from engine.common import LR, Net, Output, batch, config, net, same, weights
from zo_offload.config import ZOConfig
from zo_offload.errors import DivergedError, ModelError
from zo_offload.objective import Objective

EPS = 1e-2  # wide enough for four digits in fp32; the bias is O(eps^2)


def slope(loss, seed: int = 0, step: int = 0) -> float:
    """<gradient, z> by autograd, along the engine's first direction of a step."""
    model = net().eval()
    z = noise(model, ZOConfig(seed=seed), (step, 0), 1.0, {})
    loss(model).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return sum(float((grad * z[name]).sum()) for name, grad in grads.items())


def logits_only(model, data, outputs) -> None:
    return None


@pytest.mark.parametrize("probes", [1, 2])
@pytest.mark.parametrize("gas", [1, 2, 3])
def test_micro_batches_and_whole_batches_give_equal_bits(make_engine, gas: int, probes: int):
    single, whole = make_engine(ds=config(gas, probes)), make_engine(ds=config(gas, probes))
    for step in range(3):
        batches = [batch(gas * step + i) for i in range(gas)]
        for one in batches:
            single.backward(single(**one).loss)
            single.step()
        whole.train_batch(iter(batches))
        assert single.last_result == whole.last_result
    assert same(weights(single), weights(whole))
    assert single.global_steps == whole.global_steps == 3
    assert single.micro_steps == whole.micro_steps == 3 * gas
    assert single.global_samples == whole.global_samples == 3 * 4 * gas


class Noisy(Net):
    """Draws in every forward, in evaluation mode too."""

    def forward(self, x, labels=None):
        return super().forward(x + torch.rand(()) * np.random.rand(), labels)  # noqa: NPY002


def test_micro_batches_and_whole_batches_draw_the_same_random_numbers(make_engine):
    model = Noisy()
    single, whole = (make_engine(deepcopy(model), config(gas=3)) for _ in range(2))
    batches = [batch(i) for i in range(3)]
    for one in batches:
        single.backward(single(**one).loss)
        single.step()
    whole.train_batch(iter(batches))
    assert single.last_result == whole.last_result


def of_each(model, data, outputs):
    return functional.cross_entropy(outputs.logits, data["labels"], reduction="none")


def test_examples_are_compared_in_train_batch_and_forward_is_refused(make_engine):
    plain = make_engine(ds=config(2, 2), objective=of_each)
    natural = make_engine(
        ds=config(2, 2, zeroth_order={"natural": 0.1}), objective=of_each, measure_noise=True
    )
    batches = [batch(0), batch(1)]
    losses = [engine.train_batch(iter(batches)) for engine in (plain, natural)]
    assert losses[0] == losses[1]
    length = natural.get_global_grad_norm()
    assert 0.0 < length < 0.9 * plain.get_global_grad_norm()
    with pytest.raises(ModelError, match=r"forward: .* zeroth_order.natural 0.1 .*train_batch"):
        natural(**batch())
    with torch.no_grad():
        assert natural(**batch()).loss > 0


def test_off_the_boundary_nothing_moves(make_engine):
    engine = make_engine(ds=config(gas=2))
    before = weights(engine)
    engine.backward(engine(**batch()).loss)
    engine.step()
    assert engine.global_steps == 0
    assert same(weights(engine), before)


def test_a_loss_that_the_caller_averages(make_engine):
    """accelerate divides by itself and steps once a window."""
    ours, theirs = make_engine(ds=config(gas=3)), make_engine(ds=config(gas=3))
    for i in range(3):
        ours.backward(ours(**batch(i)).loss)
        ours.step()
        theirs.set_gradient_accumulation_boundary(i == 2)
        theirs.backward(theirs(**batch(i)).loss / 3, scale_wrt_gas=False)
    theirs.step()
    assert theirs.global_steps == 1
    assert theirs.last_result.projected_grads == pytest.approx(
        ours.last_result.projected_grads, rel=1e-6
    )
    assert theirs.last_result.loss == pytest.approx(ours.last_result.loss, rel=1e-6)


def test_a_short_last_window_is_not_stretched(make_engine):
    """The Trainer divides by what the window holds, not by the JSON's number."""
    short, one = make_engine(ds=config(gas=4)), make_engine(ds=config(gas=1))
    short.set_gradient_accumulation_boundary(True)
    short.backward(short(**batch()).loss, scale_wrt_gas=False)
    short.step()
    one.backward(one(**batch()).loss)
    one.step()
    assert short.last_result == one.last_result


def test_deepspeed_divides_by_the_json_even_where_the_window_is_short(make_engine):
    short, one = make_engine(ds=config(gas=4)), make_engine(ds=config(gas=1))
    short.set_gradient_accumulation_boundary(True)
    for engine in (short, one):
        engine.backward(engine(**batch()).loss)
        engine.step()
    assert short.last_result.projected_grads[0] == one.last_result.projected_grads[0] / 4


SCALINGS = {
    "itself": lambda out, labels: out.loss,
    "twice": lambda out, labels: 2 * out.loss,
    "squared": lambda out, labels: out.loss**2,
    "of the logits": lambda out, labels: functional.cross_entropy(out.logits, labels),
    "smoothed labels": lambda out, labels: functional.cross_entropy(
        out.logits, labels, label_smoothing=0.1
    ),
    "masked logits": lambda out, labels: (out.logits[:2].float() ** 2).mean(),
    "both": lambda out, labels: 0.9 * out.loss + 0.1 * out.logits.logsumexp(-1).mean(),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_what_the_caller_does_to_the_loss_follows_autograd(make_engine, name: str):
    data, outer = batch(), SCALINGS[name]
    engine = make_engine(ds=config(zeroth_order={"eps": EPS}))
    engine.backward(outer(engine(**data), data["labels"]))
    engine.step()
    expected = slope(lambda model: outer(model(**data), data["labels"]))
    assert engine.last_result.projected_grads[0] == pytest.approx(expected, rel=2e-3, abs=2e-3)


class Scored(Net):
    """Returns no logits but what was made of them, as a head that is fused with the loss does."""

    def forward(self, x, labels=None) -> Any:
        scores = functional.log_softmax(super().forward(x).logits, -1)
        return {"scores": scores, "best": scores.argmax(-1), "spread": scores.std(-1)}


@pytest.mark.parametrize("name", ["scores", "spread"])
def test_a_loss_of_whatever_the_model_returns_follows_autograd(make_engine, name: str):
    data, model = batch(), Scored()
    model.load_state_dict(net().state_dict())

    def outer(out):
        assert not out["best"].is_floating_point()
        return (out[name] ** 2).mean()

    engine = make_engine(deepcopy(model), config(zeroth_order={"eps": EPS / 10}))
    engine.backward(outer(engine(x=data["x"])))
    engine.step()
    z = noise(model, ZOConfig(), (0, 0), 1.0, {})
    outer(model.eval()(data["x"])).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    along = sum(float((grad * z[n]).sum()) for n, grad in grads.items())
    assert engine.last_result.projected_grads[0] == pytest.approx(along, rel=2e-3, abs=2e-3)


def test_losses_and_logits_in_one_window(make_engine):
    """One micro-batch through the model's loss, one through a loss of its logits: half each."""

    def through_logits(engine, data):
        return functional.cross_entropy(engine(x=data["x"]).logits, data["labels"])

    engine = make_engine(ds=config(gas=2, zeroth_order={"eps": EPS}))
    one, two = batch(0), batch(1)
    engine.backward(engine(**one).loss)
    engine.step()
    engine.backward(through_logits(engine, two))
    engine.step()
    expected = slope(lambda model: (model(**one).loss + model(**two).loss) / 2)
    assert engine.last_result.projected_grads[0] == pytest.approx(expected, rel=2e-3, abs=2e-3)


def test_one_window_is_scaled_in_one_way(make_engine):
    engine = make_engine(ds=config(gas=2))
    engine.backward(engine(**batch(0)).loss)
    engine.step()
    loss = engine(**batch(1)).loss
    with pytest.raises(ModelError, match="scale_wrt_gas is False, and was True"):
        engine.backward(loss / 2, scale_wrt_gas=False)
    engine.backward(loss)
    engine.step()
    assert engine.global_steps == 1


def test_a_refused_backward_leaves_nothing_behind(make_engine):
    engine, plain = make_engine(), make_engine()
    stale = engine(**batch(0)).loss
    for each in (engine, plain):
        each.backward(each(**batch(0)).loss)
        each.step()
    fresh = engine(**batch(1)).loss
    with pytest.raises(ModelError, match="measured for step 0, and step 1 is next"):
        engine.backward(fresh + stale)
    for each in (engine, plain):
        each.backward(each(**batch(1)).loss)
        each.step()
    assert engine.last_result == plain.last_result


def test_a_loss_of_something_else_is_refused(make_engine):
    engine = make_engine()
    engine(**batch())
    other = torch.ones((), requires_grad=True) * 2
    with pytest.raises(ModelError, match="does not depend on the engine's forward"):
        engine.backward(other)


def test_two_forwards_behind_one_backward_add_up(make_engine):
    engine = make_engine(ds=config(zeroth_order={"eps": EPS}))
    one, two = batch(0), batch(1, size=3)
    engine.backward(engine(**one).loss + 0.5 * engine(**two).loss)
    engine.step()
    expected = slope(lambda model: model(**one).loss + 0.5 * model(**two).loss)
    assert engine.last_result.projected_grads[0] == pytest.approx(expected, rel=2e-3, abs=2e-3)


def test_two_backwards_in_one_micro_batch_add_up(make_engine):
    engine = make_engine(ds=config(zeroth_order={"eps": EPS}))
    one, two = batch(0), batch(1)
    engine.backward(engine(**one).loss)
    engine.backward(engine(**two).loss)
    engine.step()
    expected = slope(lambda model: model(**one).loss + model(**two).loss)
    assert engine.last_result.projected_grads[0] == pytest.approx(expected, rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("gas", [1, 2])
def test_a_model_without_a_loss(make_engine, gas: int):
    engine = make_engine(ds=config(gas, zeroth_order={"eps": EPS}))
    batches = [batch(i) for i in range(gas)]
    losses = []
    for data in batches:
        out = engine(data["x"])
        assert out.loss is None
        loss = functional.cross_entropy(out.logits, data["labels"])
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    expected = slope(
        lambda model: sum(model(**data).loss for data in batches) / torch.tensor(float(gas))
    )
    assert engine.last_result.projected_grads[0] == pytest.approx(expected, rel=2e-3, abs=2e-3)
    assert engine.last_result.loss == pytest.approx(sum(losses) / gas, rel=1e-6)
    assert engine.last_result.lane_losses[0] > engine.last_result.lane_losses[1] or expected < 0


def test_a_forward_without_backward_counts_for_nothing(make_engine):
    plain, curious = make_engine(), make_engine()
    curious(**batch(7))
    for engine in (plain, curious):
        engine.backward(engine(**batch()).loss)
        engine.step()
    assert plain.last_result == curious.last_result


def per_example(model, data, outputs: Output) -> torch.Tensor:
    return functional.cross_entropy(outputs.logits, data["labels"], reduction="none")


def sum_and_weight(model, data, outputs: Output) -> tuple[torch.Tensor, int]:
    return per_example(model, data, outputs).sum(), len(data["labels"])


def error_rate(model, data, outputs: Output) -> float:
    return float((outputs.logits.argmax(-1) != data["labels"]).double().mean())


@pytest.mark.parametrize("objective", [per_example, sum_and_weight])
def test_objectives_that_mean_the_models_own_loss(make_engine, objective):
    own, given = make_engine(), make_engine(objective=objective)
    for engine in (own, given):
        engine.backward(engine(**batch()).loss)
        engine.step()
    assert given.last_result.projected_grads == pytest.approx(
        own.last_result.projected_grads, rel=1e-3
    )
    assert given.eval_batch(iter([batch()])) == pytest.approx(
        float(own.eval_batch(iter([batch()]))), rel=1e-6
    )


def test_micro_batches_weigh_what_the_objective_says(make_engine):
    sizes = (4, 1)
    single = make_engine(ds=config(gas=2), objective=sum_and_weight)
    whole = make_engine(ds=config(gas=2), objective=sum_and_weight)
    batches = [batch(i, size) for i, size in enumerate(sizes)]
    for data in batches:
        single.backward(single(**data).loss)
        single.step()
    whole.train_batch(iter(batches))
    assert single.last_result == whole.last_result
    joined = {key: torch.cat([data[key] for data in batches]) for key in batches[0]}
    one = make_engine(objective=per_example)
    one.train_batch(iter([joined]))
    assert whole.last_result.loss == pytest.approx(one.last_result.loss, rel=1e-6)


def test_an_objective_need_not_be_differentiable(make_engine):
    engine = make_engine(ds=config(zeroth_order={"eps": 0.3}), objective=error_rate)
    engine.train_batch(iter([batch(size=64)]))
    plus, minus = engine.last_result.lane_losses
    assert {plus, minus} <= {i / 64 for i in range(65)}
    assert plus != minus
    assert engine.last_result.projected_grads[0] == (plus - minus) / 0.6


def test_an_objective_with_its_own_forward(make_engine):
    def forward(model, data):
        return model(data["x"])

    engine = make_engine(objective=Objective(loss=per_example, forward=forward))
    out = engine(**batch())
    assert isinstance(out, Output)
    assert out.loss is not None
    engine.backward(out.loss)
    engine.step()
    other = make_engine(objective=Objective(loss=per_example, forward=forward))
    other.train_batch(iter([batch()]))
    assert engine.last_result == other.last_result


def test_a_window_in_which_nothing_counts(make_engine):
    engine = make_engine(objective=lambda model, data, outputs: (0.0, 0))
    before = weights(engine)
    with pytest.raises(DivergedError, match="add up to 0"):
        engine.train_batch(iter([batch()]))
    engine.backward(engine(**batch()).loss)
    with pytest.raises(DivergedError, match="add up to 0"):
        engine.step()
    assert same(weights(engine), before)


def poisoned() -> dict[str, torch.Tensor]:
    return {**batch(), "x": torch.full((4, 8), math.nan)}


@pytest.mark.parametrize("ds", [{}, {"wall_clock_breakdown": True}], ids=["plain", "timed"])
@pytest.mark.parametrize("gas", [1, 2])
def test_a_loss_that_is_not_finite_is_not_learnt_from(make_engine, tmp_path, gas: int, ds: dict):
    path = tmp_path / "run.journal"
    block = {"journal": {"path": str(path)}}
    engine = make_engine(ds=config(gas, zeroth_order=block, **ds))
    clean = make_engine(ds=config(gas))
    before, written = weights(engine), path.read_bytes()
    with pytest.raises(DivergedError, match=r"step 0: the loss is nan \(probe 0, \+eps"):
        engine.train_batch(iter([batch()] * (gas - 1) + [poisoned()]))
    for data in [batch()] * (gas - 1) + [poisoned()]:
        engine.backward(engine(**data).loss)
        if data["x"].isnan().any():
            with pytest.raises(DivergedError, match=f"micro-batch {gas - 1}"):
                engine.step()
        else:
            engine.step()
    assert same(weights(engine), before)
    assert path.read_bytes() == written
    assert engine.global_steps == 0
    for data in [batch(i) for i in range(gas)]:
        engine.backward(engine(**data).loss)
        engine.step()
    clean.train_batch(iter([batch(i) for i in range(gas)]))
    assert engine.last_result == clean.last_result
    assert same(weights(engine), weights(clean))


def test_infinite_logit_gradients_are_not_learnt_from(make_engine):
    engine = make_engine()
    before = weights(engine)
    engine.backward(engine(poisoned()["x"]).logits.sum())
    with pytest.raises(DivergedError, match="nothing was changed"):
        engine.step()
    assert same(weights(engine), before)


@pytest.mark.parametrize("skip", [False, True])
def test_a_slope_that_is_no_number_is_not_taken_for_none(make_engine, skip: bool):
    """The loss is finite, the logits behind it are not: 0 times infinity."""
    block = {"guard": {"nonfinite": "skip" if skip else "stop"}}
    engine = make_engine(ds=config(zeroth_order=block))
    before = weights(engine)
    logits = engine(poisoned()["x"]).logits
    engine.backward(torch.where(torch.isfinite(logits), logits, 0.0).sum())
    if skip:
        engine.step()
        assert engine.last_result.skipped
        assert engine.global_steps == 1
    else:
        with pytest.raises(DivergedError, match="nothing was changed"):
            engine.step()
    assert same(weights(engine), before)


@pytest.mark.parametrize("name", ["itself", "of the logits", "both"])
def test_one_sided_slopes_follow_the_losses(make_engine, name: str):
    """Of each probe against the mean of the others, whichever way the loss is reached."""
    data, outer = batch(), SCALINGS[name]
    eps = EPS / 4  # curvature, which one side sees, is less
    block = {"eps": eps, "estimator": "one_sided", "probes": 4}
    engine = make_engine(ds=config(zeroth_order=block))
    engine.backward(outer(engine(**data), data["labels"]))
    engine.step()
    two_sided = make_engine(ds=config(zeroth_order={"eps": eps, "probes": 4}))
    two_sided.backward(outer(two_sided(**data), data["labels"]))
    two_sided.step()
    slopes = two_sided.last_result.projected_grads
    expected = [4 / 3 * (g - sum(slopes) / 4) for g in slopes]
    found = engine.last_result.projected_grads
    assert found == pytest.approx(expected, abs=2e-2 * max(map(abs, expected)))


def test_a_forward_that_fails_leaves_the_window_as_it_was(make_engine):
    engine, other = make_engine(ds=config(gas=2)), make_engine(ds=config(gas=2))
    engine.backward(engine(**batch(0)).loss)
    engine.step()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        engine(x=torch.ones(2, 3))
    engine.backward(engine(**batch(1)).loss)
    engine.step()
    other.train_batch(iter([batch(0), batch(1)]))
    assert engine.last_result == other.last_result


def test_a_forward_that_fails_does_not_break_the_timers(make_engine):
    engine = make_engine(ds=config(wall_clock_breakdown=True))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            engine(x=torch.ones(2, 3))
    engine.train_batch(iter([batch()]))
    assert engine.global_steps == 1


def test_a_loss_from_before_the_last_step_is_refused(make_engine):
    engine = make_engine()
    old = engine(**batch()).loss
    engine.train_batch(iter([batch()]))
    with pytest.raises(ModelError, match="measured for step 0, and step 1 is next"):
        engine.backward(old)


def test_losses_without_a_graph_are_refused(make_engine):
    engine = make_engine()
    with pytest.raises(ModelError, match="no graph"):
        engine.backward(torch.tensor(1.0))
    with torch.no_grad():
        out = engine(**batch())
    with pytest.raises(ModelError, match="no graph"):
        engine.backward(out.loss)


def test_a_step_without_a_backward_is_refused(make_engine):
    engine = make_engine()
    with pytest.raises(ModelError, match="call backward first"):
        engine.step()
    engine(**batch())
    with pytest.raises(ModelError, match="call backward first"):
        engine.step()
    assert engine.global_steps == 0


def test_train_batch_inside_an_open_window_is_refused(make_engine):
    engine = make_engine(ds=config(gas=2))
    engine.backward(engine(**batch()).loss)
    engine.step()
    with pytest.raises(ModelError, match="finish that step first"):
        engine.train_batch(iter([batch(), batch()]))


def test_neither_loss_nor_logits(make_engine):
    class Mute(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(2))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return {"number": x.argmax(-1)}

    with pytest.raises(ModelError, match="neither loss nor logits"):
        make_engine(Mute())(torch.ones(1, 2))


def test_a_half_precision_loss_is_refused(make_engine):
    def half(model, data, outputs):
        return per_example(model, data, outputs).mean().bfloat16()

    engine = make_engine(objective=half)
    with pytest.raises(ModelError, match="the loss is bfloat16, whose steps here are"):
        engine.train_batch(iter([batch()]))
    with pytest.raises(ModelError, match="float32"):
        engine(**batch())
    assert engine.global_steps == 0


def test_a_rate_that_is_not_a_number_is_refused(make_engine):
    engine = make_engine()
    before = weights(engine)
    engine.optimizer.param_groups[0]["lr"] = math.nan
    with pytest.raises(ValueError, match="lr is nan"):
        engine.train_batch(iter([batch()]))
    assert same(weights(engine), before)
    engine.optimizer.param_groups[0]["lr"] = LR
    engine.train_batch(iter([batch()]))
    assert engine.global_steps == 1


def test_global_grad_norm(make_engine):
    engine = make_engine(ds=config(probes=2))
    assert engine.get_global_grad_norm() is None
    engine.train_batch(iter([batch()]))
    assert engine.get_global_grad_norm() == pytest.approx(
        math.hypot(*engine.last_result.projected_grads)
    )
