"""Replayed weights are the run's own, to the bit and the byte, however it trained."""

from pathlib import Path

import pytest

from replay.ways import STEPS, WAYS, content, tensors, train
from zo_offload.replay import pieces


@pytest.mark.parametrize("name", WAYS)
def test_a_replay_is_what_the_run_exports(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    way = WAYS[name]
    run = train(way, tmp_path)
    monkeypatch.setattr(pieces, "PIECE", 512)  # of a few thousand elements there are several
    config = str(run.config) if way.told else None
    for step, exported in run.exports.items():
        out = run.replayed(tmp_path / f"out-{step}", to=step, config=config)
        assert content(out) == content(exported), step
    base = tensors(run.base)
    assert any(
        key not in base or not value.equal(base[key]) for key, value in tensors(out).items()
    )
    out = run.exports[STEPS]
    assert run.replayed(out, verify=True, config=config) == out
