"""A mode in which nothing moves."""

from contextlib import closing
from pathlib import Path

import pytest

from trainable.modes import model
from zo_offload.errors import ModelError
from zo_offload.step import Stepper
from zo_offload.trainable.frozen import Frozen


def test_there_is_nothing_to_save(tmp_path: Path):
    words = "^nothing moves, so that there is nothing to save; save the model it was made of$"
    with (
        closing(Stepper(model(), mode=Frozen())) as stepper,
        pytest.raises(ModelError, match=words),
    ):
        stepper.trainable.save(stepper.model, stepper.weights, tmp_path / "out")
    assert not (tmp_path / "out").exists()
