"""Low-rank runs that go on from another's weights, and what cannot be told from a JSON alone."""

from contextlib import closing
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models.table import ROWS

from trainable.modes import BATCH, LR, MODEL, model
from zo_offload import resume
from zo_offload.config import ZOConfig
from zo_offload.errors import CheckpointError, ConfigError
from zo_offload.journal import Journal
from zo_offload.low_rank_reads import corrected
from zo_offload.snapshot import write_snapshot
from zo_offload.step import Stepper


def run(interval: int, losses_on: list[Any], net: Any = None) -> Stepper:
    trainable = {"mode": "low_rank", "interval": interval}
    config = ZOConfig.model_validate({"eps": 1e-2, "trainable": trainable})
    stepper = Stepper(model() if net is None else net, config)
    stepper.follow(Journal.memory(stepper.bit_header()))
    for batch in losses_on:
        stepper.train_step([batch], LR)
    return stepper


def snapshot_of(stepper: Stepper, folder: Path) -> Path:
    folder.mkdir()
    write_snapshot(folder, stepper.weights, stepper.step, stepper.journal.records.lineage())
    return folder


def test_a_branch_of_as_many_steps_is_not_taken_for_the_one_before(tmp_path: Path):
    other = ROWS[MODEL].batch(9)
    with closing(run(10, [BATCH] * 5)) as a, closing(run(10, [BATCH] * 3 + [other] * 2)) as b:
        a.measure([BATCH], a.draws())  # what the factors hold after five steps has been looked up
        expected = b.measure([BATCH], b.draws())
        resume.rewind(a, b.journal, snapshot_of(b, tmp_path / "weights"))
        assert a.measure([BATCH], a.draws()) == expected


def test_weights_of_another_interval_are_no_beginning(tmp_path: Path):
    with closing(run(3, [BATCH] * 3)) as source, closing(run(2, [])) as stepper:
        weights = snapshot_of(source, tmp_path / "weights")
        with pytest.raises(CheckpointError, match="need the trainable of its run"):
            resume.begin_with(stepper, source.journal, weights)


def test_what_ambient_factors_hold_is_not_left_behind(tmp_path: Path):
    """Their file carries every step, though its matrices are only on the grid."""
    said: dict[str, Any] = {"parameters": ["*embed_tokens*", "lm_head*"]}
    trainables = {"mode": "low_rank", "interval": 5, **said}, {"mode": "full", **said}
    configs = [ZOConfig.model_validate({"eps": 1e-2, "trainable": each}) for each in trainables]
    source, stepper = (Stepper(model(), config) for config in configs)
    with closing(source), closing(stepper):
        for each in (source, stepper):
            each.follow(Journal.memory(each.bit_header()))
        source.train_step([BATCH], LR)
        weights = snapshot_of(source, tmp_path / "weights")
        with pytest.raises(CheckpointError, match="need the trainable of its run"):
            resume.begin_with(stepper, source.journal, weights)


def test_a_peft_model_is_refused_beside_another_mode():
    net = peft.get_peft_model(model(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match='mode: "low_rank" is for a plain model'):
        run(3, [], net)


@pytest.mark.parametrize("gathered", [0.0, 1e-2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_perturbation_is_not_lost_beside_what_has_gathered(gathered: float, dtype: torch.dtype):
    """The difference of both signs, against float64: nothing of it is lost on average."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x, right, u = normal(256, 96).to(dtype), normal(96, 2), normal(384, 2).sign()
    base, total = (x.float() @ (0.1 * normal(384, 96)).t()).to(dtype), gathered * normal(384, 2)
    lefts = [total + 1e-3 * u, total - 1e-3 * u]
    plus, minus = (corrected(base.clone(), x, (left, right)).double() for left in lefts)
    expected = (x.double() @ right.double()) @ (2e-3 * u.double()).t()
    slope = ((plus - minus) * expected).sum() / expected.square().sum()
    assert float(slope) == pytest.approx(1.0, abs=5e-3)
