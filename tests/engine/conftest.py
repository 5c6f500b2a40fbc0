"""Engines that are always ended."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import zo_offload
from engine.common import config, net
from zo_offload.loss_noise import LossNoise


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Any]]:
    """``initialize`` on a net, a model, or what is given; returns the engine."""
    engines = []

    def make(
        model: Any = None, ds: dict | None = None, measure_noise: bool = False, **options: Any
    ) -> Any:
        model = net() if model is None else model
        engine, *_ = zo_offload.initialize(model=model, config=ds or config(), **options)
        if not measure_noise:  # which takes as long as seven steps
            engine.loss_noise = LossNoise(noise=0.0, signal=1.0)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.destroy()
