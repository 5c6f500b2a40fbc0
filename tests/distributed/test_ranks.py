"""Real ranks under real launchers: the same bits, a few bytes, and nobody left waiting."""

from pathlib import Path
from typing import Any

import pytest

from distributed.launch import run, start, wait

pytestmark = pytest.mark.slow

CONFIG = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "ZO", "params": {"lr": 1e-3, "weight_decay": 0.1}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"total_num_steps": 9, "warmup_max_lr": 2e-3, "warmup_num_steps": 3},
    },
    "zeroth_order": {"offload_param": {"device": "cpu"}},
}
STEPS = 5


def job(out: Path, **more: Any) -> dict[str, Any]:
    return {"config": CONFIG, "steps": STEPS, "out": str(out), **more}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One rank, four micro-batches, and runs resumed after each step."""
    folder = tmp_path_factory.mktemp("alone")
    (report,) = run("none", 1, job(folder, save=str(folder / "tags")))
    assert report["resumed"] == [report["weights"]] * (STEPS - 1)
    assert report["step_bytes"] == 0
    return report


@pytest.mark.parametrize(
    ("launcher", "ranks", "calls", "link"),
    [
        ("deepspeed", 2, "train_batch", "SocketLink"),
        ("none", 4, "forward", "SocketLink"),
        ("torchrun", 2, "forward", "SocketLink"),
        ("mpirun", 2, "train_batch", "MPILink"),
    ],
)
def test_ranks_end_in_the_bits_of_one(
    alone: dict[str, Any], tmp_path: Path, launcher: str, ranks: int, calls: str, link: str
):
    reports = run(launcher, ranks, job(tmp_path, calls=calls, save=str(tmp_path / "tags")))
    for report in reports:
        assert report["weights"] == alone["weights"]
        assert report["losses"] == alone["losses"]
        assert report["resumed"] == alone["resumed"]
        assert report["link"] == link
    assert len({report["evaluated"] for report in reports}) == 1


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_a_lane_on_the_sockets(tmp_path: Path, ranks: int):
    """Counted by the kernel, on all TCP sockets of all ranks; one micro-batch a rank."""
    logger = {"enabled": True, "prof_all": False, "verbose": False}
    config = CONFIG | {"train_batch_size": 2 * ranks, "comms_logger": logger}
    reports = run("none", ranks, job(tmp_path, config=config, steps=20))
    sent = sum(sum(report["socket_bytes"]) for report in reports)
    lanes = 20 * 2 * ranks
    assert sent == reports[0]["step_bytes"]
    assert 0 < sent / lanes <= 16
    per_step = reports[0]["step_bytes"] // 20
    assert reports[0]["comms"] == {"zeroth_order_scalars": [str(per_step)]} or (
        reports[0]["comms"]["zeroth_order_scalars"] == [per_step]
    )


def test_other_base_weights_are_named(tmp_path: Path):
    ended = wait(start(2, job(tmp_path, odd_rank=1)))
    for code, text in ended:
        assert code == 1
        assert "ReplicaError: the base weights of rank 1 differ from rank 0's" in text


@pytest.mark.parametrize(("victim", "survivor"), [(1, 0), (0, 1)])
def test_a_killed_rank_is_named_by_the_others(tmp_path: Path, victim: int, survivor: int):
    ended = wait(start(2, job(tmp_path, die=[victim, 2])))
    assert ended[victim][0] == -9
    code, text = ended[survivor]
    assert code == 1
    assert f"ReplicaError: rank {survivor} lost rank {victim}" in text
