"""Real ranks that die, join, or fall out with the others: named, and the end is the same."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from engine.common import opt

from distributed.launch import run, start, wait
from distributed.test_ranks import CONFIG, job

pytestmark = pytest.mark.slow

Killed = tuple[Path, dict[str, Any], dict[str, Any]]  # its folder, its config, a run left alone


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """Four ranks end as one of them is killed."""
    folder = tmp_path_factory.mktemp("killed")
    config: dict[str, Any] = CONFIG | {"train_batch_size": 40}
    (alone,) = run("none", 1, job(folder / "alone", config=config))
    ended = wait(start(4, resumable(folder / "run", config) | {"die": [3, 3]}))
    assert [code for code, _ in ended] == [1, 1, 1, -9]
    return folder / "run", config, alone


@pytest.mark.parametrize("ranks", [4, 5])
def test_as_many_ranks_go_on_or_one_joins(killed: Killed, tmp_path: Path, ranks: int):
    """They replay the journal, and nobody is sent weights."""
    before, config, alone = killed
    shutil.copytree(before, tmp_path / "run")
    weights = sum(parameter.numel() for parameter in opt().parameters()) * 4
    reports = run("none", ranks, resumable(tmp_path / "run", config))
    for report in reports:
        assert report["taken_up"] in (3, 4)  # the others may have taken one more
        assert report["weights"] == alone["weights"]
        assert report["losses"] == alone["losses"]
    for report in reports[1:]:  # rank 0 has the rendezvous, which others ask until all are there
        assert 0 < report["received_before"] < weights / 4


def resumable(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A job whose journal lies in a folder, and no snapshot."""
    kept = {"path": str(folder / "run.journal"), "snapshot_interval": 0}
    block = config["zeroth_order"] | {"journal": kept}
    return job(folder, config=config | {"zeroth_order": block})


@pytest.mark.parametrize("victim", [0, 1])
def test_a_disk_that_ranks_share_survives_a_kill(tmp_path: Path, victim: int):
    """One rank asks the disk for both; either is killed, and the same command goes on."""
    disk = {"device": "nvme", "nvme_path": str(tmp_path / "units")}
    (alone,) = run("none", 1, job(tmp_path / "alone", steps=6))
    kept = {"path": str(tmp_path / "run.journal"), "snapshot_interval": 0}
    config = CONFIG | {"zeroth_order": {"offload_param": disk, "journal": kept}}
    given = job(tmp_path, config=config, steps=6)
    ended = wait(start(2, given | {"die": [victim, 4]}))
    assert ended[victim][0] == -9
    assert ended[1 - victim][0] == 1
    assert f"lost rank {victim}" in ended[1 - victim][1]
    for report in run("none", 2, given):
        assert report["weights"] == alone["weights"]
        assert report["losses"] == alone["losses"]


def test_a_flipped_bit_is_named_and_put_right(tmp_path: Path):
    """Within one rotation of two units and what is in none; weights rest where forwards run."""
    asked = {"check_interval": 3}
    block = {"offload_param": {"device": "none"}, "replica": asked}
    config = CONFIG | {"bf16": {"enabled": True}, "zeroth_order": block}
    (alone,) = run("none", 1, job(tmp_path / "alone", config=config, steps=8))
    given = job(tmp_path, config=config, steps=8, flip=[2, 3])
    ended = wait(start(4, given))
    for code, text in ended:
        assert code == 0, text
        assert "unit model.decoder.layers.1 of rank 2 differs from the other ranks'" in text
        assert "it has been put right" in text
    for rank in range(4):
        report = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert report["weights"] == alone["weights"]
        assert report["losses"] == alone["losses"]


@pytest.mark.parametrize(("ranks", "victim"), [(2, 1), (4, 0), (4, 3)])
def test_a_killed_rank_is_named_by_all_others(tmp_path: Path, ranks: int, victim: int):
    ended = wait(start(ranks, job(tmp_path, die=[victim, 2])))
    assert ended.pop(victim)[0] == -9
    for code, text in ended:
        assert code == 1
        assert f" lost rank {victim} (" in text.splitlines()[-1]
