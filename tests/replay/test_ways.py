"""Replayed weights are the run's own, to the bit and the byte, however it trained."""

from pathlib import Path

import pytest

from replay.ways import BEFORE, STEPS, WAYS, content, tensors, train
from zo_offload.replay import pieces


@pytest.mark.sampled(16)
@pytest.mark.parametrize("name", WAYS)
def test_a_replay_is_what_the_run_exports(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    way = WAYS[name]
    run = train(way, tmp_path)
    monkeypatch.setattr(pieces, "PIECE", 512)  # of a few thousand elements there are several
    config = str(run.config) if way.told else None
    before, exported = (run.exports[step] for step in (BEFORE, STEPS))
    assert run.replayed(before, to=BEFORE, verify=True, config=config) == before
    out = run.replayed(tmp_path / "out", config=config)
    assert content(out) == content(exported)
    base = tensors(run.base)
    assert any(key not in base or not value.equal(base[key]) for key, value in tensors(out).items())
