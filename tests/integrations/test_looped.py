"""A loop of accelerate: two ranks end in the bits of one that takes all of their micro-batches."""

import json
from pathlib import Path
from typing import Any

import pytest
from distributed.launch import forked, wait

pytestmark = pytest.mark.slow


def loop(folder: Path, ranks: int, accumulation: int) -> list[dict[str, Any]]:
    ended = wait(forked("integrations.looped:main", ranks, str(folder), accumulation, out=folder))
    assert all(code == 0 for code, _ in ended), "\n".join(text for _, text in ended)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


def test_two_ranks_take_the_steps_of_one(tmp_path: Path):
    (alone,) = loop(tmp_path / "one", ranks=1, accumulation=4)
    both = loop(tmp_path / "two", ranks=2, accumulation=2)
    assert [each["ranks"] for each in both] == [2, 2]
    assert len(alone["grads"]) == 2
    for each in both:
        assert each["grads"] == alone["grads"]
        assert each["weights"] == alone["weights"]
        assert each["gathered"] == [0.0, 1.0]  # accelerate's own exchange goes beside ours
