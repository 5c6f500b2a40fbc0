"""The stand-in for ``deepspeed.initialize``, and Trainers whose engines are always ended."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

import zo_offload
from zo_offload.loss_noise import LossNoise


@pytest.fixture(scope="module")
def stand_in() -> Iterator[None]:
    """Installed, and all that transformers and accelerate remember in a process forgotten after."""
    before = dict(os.environ)
    zo_offload.install()
    yield
    zo_offload.uninstall()
    for name in os.environ.keys() - before.keys() - {"LOCAL_RANK"}:  # the process group stays
        del os.environ[name]
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def no_deepspeed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """The next Trainer is to be a plain one, whatever an earlier one has left."""

    def forget() -> None:
        monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
        AcceleratorState._reset_state(reset_partial_state=True)

    return forget


@pytest.fixture
def trained(
    stand_in: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Any]]:
    """Makes a Trainer, as ``stock.trainer`` does, and lets it train."""
    from integrations import stock

    made = []
    # Rounding is not measured, which takes as long as seven steps.
    quiet = LossNoise(noise=0.0, signal=1.0)
    monkeypatch.setattr("zo_offload.step.Stepper.measure_noise", lambda self, batch: quiet)

    def run(deepspeed: dict[str, Any] | None = None, **more: Any) -> Any:
        made.append(stock.trainer(tmp_path / f"out{len(made)}", deepspeed or stock.ds(), **more))
        made[-1].train()
        return made[-1]

    yield run
    for trainer in made:
        end(trainer)


def end(trainer: Any) -> None:
    """Its engine, if it came to one."""
    if hasattr(trainer.model_wrapped, "stepper"):
        trainer.model_wrapped.destroy()
