"""What a unit can be replayed from ends in the bits that the engine has."""

from pathlib import Path
from typing import Any

import pytest

from engine.common import config, opt, tokens
from zo_offload.resting import digest_of

STEPS = 5


def train(engine: Any) -> None:
    for step in range(STEPS):
        engine.train_batch(iter([tokens(step)]))


def digests(engine: Any) -> list[list[bool]]:
    """Of every unit, whether what is replayed from each beginning is what there is."""
    weights, found = engine.stepper.weights, []
    for unit in weights.map.everything:
        _, digest = weights.fingerprint(unit)
        ends = [
            digest_of(unit, *weights.replayed(unit, first, carries)) == digest
            for first, carries in engine.stepper.agreement.beginnings(unit)
        ]
        found.append(ends)
    return found


@pytest.mark.parametrize("lag", [0, 3])
def test_snapshots_and_the_directory_of_a_model(make_engine: Any, tmp_path: Path, lag: int):
    opt().save_pretrained(tmp_path / "model")
    journal = {"path": str(tmp_path / "run.journal"), "snapshot_interval": 2}
    block = {"journal": journal, "update": {"lag": lag}, "offload_param": {"device": "cpu"}}
    given = make_engine(str(tmp_path / "model"), ds=config(zeroth_order=block))
    train(given)
    assert digests(given) == [[True, True, True]] * 3  # steps 4 and 2, the directory


def test_a_module_alone_has_none_and_another_directory_shows(make_engine: Any, tmp_path: Path):
    alone = make_engine(opt())
    train(alone)
    assert digests(alone) == [[]] * 3
    opt(seed=1).save_pretrained(tmp_path / "model")
    alone.stepper.model.name_or_path = str(tmp_path / "model")
    assert digests(alone) == [[False]] * 3
