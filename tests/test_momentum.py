"""Momentum and Adam as scalars: against the definitions, and what a config says of them."""

import logging
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zo_offload.config import parse_config
from zo_offload.config_update import UpdateConfig, moments_beside, momentum_of
from zo_offload.deepspeed_json import read_settings
from zo_offload.errors import ConfigError, JournalError
from zo_offload.momentum import (
    MOST_WINDOW,
    Adam,
    Moments,
    Momentum,
    after,
    from_header,
    least_window,
    rate,
)


@given(beta=st.floats(0, 0.995), tail=st.floats(1e-3, 0.5))
def test_the_least_window_leaves_out_less_than_the_tail(beta: float, tail: float):
    window = least_window(beta, tail)
    assert beta**window < tail * (1 + 1e-9)
    assert window == 1 or beta ** (window - 1) > tail * (1 - 1e-9)


@given(grads=st.lists(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=2), min_size=1))
def test_adams_rate_is_the_papers(grads: list[list[float]]):
    """Algorithm 1's ``lr m^ / (sqrt(v^) + eps)``, less the sum of slopes."""
    adam = Momentum(0.7, 5, Adam(0.9, 1e-3))
    moments, square = Moments(), 0.0
    for step, of_step in enumerate(grads, start=1):
        moments = after(adam, moments, of_step)
        square = 0.9 * square + 0.1 * sum(g * g for g in of_step) / 4
        root = math.sqrt(square / (1 - 0.9**step))
        expected = 0.3 * (1 - 0.7) / (1 - 0.7**step) / (root + 1e-3)
        assert math.isclose(rate(adam, moments, 0.3), expected, rel_tol=1e-9)


@pytest.mark.parametrize("kept", [Momentum(0.9, 44), Momentum(0.5, 7, Adam(0.99, 1e-6))])
def test_a_header_says_all_of_it(kept: Momentum):
    assert from_header(kept.header()) == kept


@pytest.mark.parametrize("said", ["adagrad", {"type": "lion", "window": 1}, {"type": "adam"}, 3])
def test_a_header_of_another_update_is_refused(said: Any):
    with pytest.raises(JournalError, match=r"header.update: .* is no update"):
        from_header(said)


def test_defaults_are_torchs():
    assert parse_config({"zeroth_order": {}}).update.type == "sgd"
    assert momentum_of(UpdateConfig(type="momentum"), "full") == Momentum(0.9, 44)
    assert momentum_of(UpdateConfig(type="adam"), "full") == Momentum(0.9, 44, Adam(0.999, 1e-8))
    assert momentum_of(UpdateConfig(), "full") is None
    chosen = UpdateConfig(type="momentum", momentum=0.99, window=MOST_WINDOW)
    assert momentum_of(chosen, "full") == Momentum(0.99, MOST_WINDOW)


MOMENTUM = {"type": "momentum"}


@pytest.mark.parametrize(
    ("update", "words"),
    [
        ({"momentum": 0.9}, 'update.momentum: is of "type": "momentum", found "sgd"'),
        ({"window": 9}, 'update.window: is of "type": "momentum" or "adam", found "sgd"'),
        ({**MOMENTUM, "beta1": 0.9}, 'update.beta1: is of "type": "adam", found "momentum"'),
        ({**MOMENTUM, "momentum": 1}, "update.momentum: expected less than 1.0, found 1"),
        ({**MOMENTUM, "momentum": -0.1}, "update.momentum: expected at least 0"),
        ({**MOMENTUM, "window": 0}, "update.window: expected at least 1, found 0"),
        ({"type": "adam", "adam_eps": 0}, "update.adam_eps: expected more than 0"),
        ({"type": "adam", "betas": [0.9, 0.99]}, "update.betas: unknown key; did you mean 'beta"),
        (
            {**MOMENTUM, "momentum": 0.99},
            r"update.momentum: 0.99 needs a window of 459 steps to leave out less than 1% of all "
            r"weight, and at most 256 are taken: .* \(0.08 ns .*, 37 ns a weight and step\); write "
            r"a smaller one, or update.window \(256 leaves out 7.6%\)",
        ),
        ({"type": "adam", "beta1": 0.99}, "update.beta1: 0.99 needs a window of 459 steps"),
        ({"type": "adam", "window": 257}, "update.window: at most 256 steps, found 257: each step"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(update: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words) as caught:
        parse_config({"zeroth_order": {"update": update}})
    assert str(caught.value).isprintable()


def test_low_rank_has_its_own():
    block = {"trainable": {"mode": "low_rank"}, "update": {"type": "adam"}}
    words = 'update.type: "mode": "low_rank" has a momentum of its own, trainable.momentum; write'
    with pytest.raises(ConfigError, match=words):
        parse_config({"zeroth_order": block})


def settings(optimizer: dict[str, Any], **update: Any) -> UpdateConfig:
    block = {"update": update}
    config = {"train_batch_size": 1, "optimizer": optimizer, "zeroth_order": block}
    return read_settings(config).zeroth_order.update


def test_an_optimizers_params_are_taken_and_told(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING)
    sgd = {"type": "SGD", "params": {"lr": 0.5, "momentum": 0.75}}
    adam = {"type": "AdamW", "params": {"betas": [0.8, 0.99], "eps": 1e-6}}
    assert settings(sgd, type="momentum") == UpdateConfig(type="momentum", momentum=0.75)
    told = "optimizer.type SGD: only its lr (0.5), weight_decay (0) and momentum (0.75) are used"
    assert told in caplog.text
    expected = UpdateConfig(type="adam", beta1=0.8, beta2=0.99, adam_eps=1e-6)
    assert settings(adam, type="adam") == settings(adam, type="adam", beta1=0.8) == expected
    assert (
        "weight_decay (0), beta1 (0.8), beta2 (0.99) and adam_eps (1e-06) are used" in caplog.text
    )
    assert settings(sgd) == settings(adam) == UpdateConfig()  # the type stands in our block alone
    assert settings({"type": "Adam", "params": {"betas": "auto"}}, type="adam").beta1 is None


@pytest.mark.parametrize(
    ("params", "update", "words"),
    [
        ({"betas": 0.9}, {"type": "adam"}, "params.betas: expected two numbers, found 0.9"),
        ({"betas": [0.9, 1.5]}, {"type": "adam"}, "params.betas: expected .* below 1, found 1.5"),
        ({"eps": 0}, {"type": "adam"}, "params.eps: expected a number above 0, found 0"),
        ({"momentum": "0.9"}, MOMENTUM, "params.momentum: expected .* below 1, found '0.9'"),
        (
            {"momentum": 0.8},
            {**MOMENTUM, "momentum": 0.9},
            "optimizer.params.momentum says 0.8, and zeroth_order.update.momentum 0.9; keep one",
        ),
        ({"momentum": 0.99}, MOMENTUM, "update.momentum: 0.99 needs a window of 459 steps"),
    ],
    ids=str,
)
def test_faulty_params_are_named(params: dict[str, Any], update: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        settings({"type": "Any", "params": params}, **update)


def test_our_own_optimizer_has_no_momentum():
    with pytest.raises(ConfigError, match=r"optimizer.params.momentum: unknown key"):
        settings({"type": "ZO", "params": {"momentum": 0.9}}, **MOMENTUM)
    assert moments_beside({"momentum": 0.9}, UpdateConfig()) == {}
