"""Journals that went back, went on along other directions, or passed over a step."""

from pathlib import Path

import pytest

from replay.ways import WAYS, content, train
from zo_offload.config import parse_config
from zo_offload.integrations.hf import load_model
from zo_offload.journal import Flags, Journal, Probe, Record
from zo_offload.step import Stepper

KEPT, LATER = 2, 3


def go_back(path: Path) -> None:
    """Roll back, take steps along other directions, and pass one over."""
    with Journal.open(path, Journal.read(path).header.fields) as journal:
        last = journal.records[KEPT]
        journal.rewind(KEPT, rolled_back=True)
        for step in range(KEPT, KEPT + LATER):
            probes = tuple(
                Probe(probe.number + len(last.probes), probe.projected_grad, probe.coefficient)
                for probe in last.probes
            )
            flags = Flags.SKIPPED if step == KEPT + 1 else Flags.NONE
            journal.append(
                Record(
                    step, probes, last.losses, eps=last.eps, lr=last.lr, decay=last.decay,
                    owed=last.owed, flags=flags, branch=journal.branch,
                )
            )  # fmt: skip
        assert journal.records.stream == 1


@pytest.mark.parametrize("name", ["full", "lag", "momentum-lag", "adam", "low_rank", "lora"])
def test_a_replay_takes_the_branch_that_counts(name: str, tmp_path: Path):
    way = WAYS[name]
    run = train(way, tmp_path)
    before = content(run.replayed(tmp_path / "before"))
    go_back(run.journal)
    with Stepper(load_model(run.base), parse_config(way.config), dtype=way.forward) as stepper:
        stepper.follow(Journal.open(run.journal, stepper.bit_header()))
        stepper.trainable.save(stepper.model, stepper.weights, tmp_path / "export")
    out = content(run.replayed(tmp_path / "out"))
    for file, data in content(tmp_path / "export").items():
        assert out[file] == data, file
    assert out != before
