"""A small run that every test here can write: its header and its records."""

from collections.abc import Callable
from pathlib import Path

import pytest

from zo_offload.journal import Journal, Probe, Record

HEADER = {"seed": 7, "direction": "rademacher", "direction_scale": {"head": 0.02, "norm": 1.0}}


def record(step: int, num_probes: int = 1, branch: int = 0) -> Record:
    probes = tuple(Probe(i, 0.5 + step + i, 1e-6 * (step + i + 1)) for i in range(num_probes))
    losses = tuple(0.7 - 0.01 * i for i in range(2 * num_probes))
    return Record(
        step, probes, losses, eps=1e-3, lr=1e-6, loader_position=16 * (step + 1), branch=branch
    )


@pytest.fixture
def header() -> dict:
    return dict(HEADER)


@pytest.fixture
def make_record() -> Callable[..., Record]:
    return record


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.journal"


@pytest.fixture
def small(path: Path, header: dict) -> Path:
    """A closed journal of three steps with 1, 2 and 0 probes."""
    with Journal.create(path, header) as journal:
        for step, num_probes in enumerate((1, 2, 0)):
            journal.append(record(step, num_probes))
    return path
