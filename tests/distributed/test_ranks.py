"""Real ranks under real launchers: the same bits, a few bytes, and nobody left waiting."""

import json
from pathlib import Path
from typing import Any

import pytest
from cli.common import make_task, results

from distributed.launch import forked, run, start, wait

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


def with_parallel(config: dict[str, Any], probe_parallel: int = 1, **block: Any) -> dict[str, Any]:
    replica = {"probe_parallel": probe_parallel}
    return config | {"zeroth_order": config["zeroth_order"] | {"replica": replica, **block}}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """One rank, four micro-batches, and runs resumed after each step; of each model."""
    return {model: one_rank(tmp_path_factory.mktemp("alone"), model) for model in ("net", "opt")}


def one_rank(folder: Path, model: str) -> dict[str, Any]:
    (report,) = run("none", 1, job(folder, model=model, save=str(folder / "tags")))
    assert report["resumed"] == [report["weights"]] * (STEPS - 1)
    assert report["step_bytes"] == 0
    assert report["link"] == "Alone"
    return report


def model_for(launcher: str) -> str:
    """The one that starts fastest."""
    return "opt" if launcher == "none" else "net"


@pytest.mark.parametrize(
    ("launcher", "ranks", "calls", "link"),
    [
        ("deepspeed", 2, "train_batch", "SocketLink"),
        pytest.param("deepspeed", 4, "train_batch", "SocketLink", marks=pytest.mark.thorough),
        ("none", 4, "forward", "SocketLink"),
        pytest.param("torchrun", 2, "forward", "SocketLink", marks=pytest.mark.thorough),
        ("mpirun", 2, "train_batch", "MPILink"),
    ],
)
def test_ranks_end_in_the_bits_of_one(
    alone: dict[str, Any], tmp_path: Path, launcher: str, ranks: int, calls: str, link: str
):
    model = model_for(launcher)
    saved = {"save": str(tmp_path / "tags")} if launcher != "deepspeed" else {}
    reports = run(launcher, ranks, job(tmp_path, model=model, calls=calls, **saved))
    for report in reports:
        assert report["weights"] == alone[model]["weights"]
        assert report["losses"] == alone[model]["losses"]
        assert report["resumed"] == (alone[model]["resumed"] if saved else [])
        assert report["link"] == link
    assert len({report["evaluated"] for report in reports}) == 1


@pytest.mark.parametrize(
    ("launcher", "ranks"),
    [
        ("none", 2),
        ("none", 4),
        pytest.param("deepspeed", 2, marks=pytest.mark.thorough),
        pytest.param("mpirun", 2, marks=pytest.mark.thorough),
    ],
)
def test_signs_apart_end_in_the_bits_of_one_rank(
    alone: dict[str, Any], tmp_path: Path, launcher: str, ranks: int
):
    """Two ranks share each micro-batch, a sign each; four are two such pairs."""
    model = model_for(launcher)
    config = with_parallel(CONFIG, probe_parallel=2)
    reports = run(launcher, ranks, job(tmp_path, model=model, config=config))
    for report in reports:
        assert report["weights"] == alone[model]["weights"]
        assert report["losses"] == alone[model]["losses"]
    if ranks == 2:  # both have evaluated the same batches
        assert {report["evaluated"] for report in reports} == {alone[model]["evaluated"]}


def test_ranks_that_do_not_come_out_even_are_refused(tmp_path: Path):
    config = with_parallel(CONFIG, probes=3, probe_parallel=3)
    for code, text in wait(start(2, job(tmp_path, config=config))):
        assert code == 1
        assert "ConfigError: zeroth_order.replica.probe_parallel: 3 ranks share the lanes" in text


def test_a_midpoint_of_some_lanes_is_refused(tmp_path: Path):
    config = with_parallel(CONFIG, probe_parallel=2)
    for code, text in wait(start(2, job(tmp_path, config=config, calls="forward"))):
        assert code == 1
        assert "ModelError: forward: what it returns is the midpoint of all lanes, and" in text


@pytest.mark.thorough
def test_the_command_with_signs_apart_ends_as_on_one_rank(tmp_path: Path):
    task = make_task(tmp_path / "task")
    ended = []
    for ranks in (1, 2):
        ds = json.loads((task.folder / "ds.json").read_text())
        path = tmp_path / f"ds-{ranks}.json"
        path.write_text(json.dumps(with_parallel(ds, probe_parallel=ranks)))
        output = tmp_path / f"run-{ranks}"
        arguments = task.arguments(output, config=path)
        started = forked("cli.common:run_in_child", ranks, arguments, out=tmp_path / f"log-{ranks}")
        said = wait(started)
        assert all(code == 0 for code, _ in said), said
        ended.append(results(output, said[0][1]))
    assert ended[0] == ended[1]


@pytest.mark.parametrize(("ranks", "parallel"), [(2, 1), (4, 1), (2, 2), (4, 2)])
def test_bytes_a_lane_on_the_sockets(tmp_path: Path, ranks: int, parallel: int):
    """Counted by the kernel, on all TCP sockets of all ranks; one micro-batch a rank or pair."""
    logger = {"enabled": True, "prof_all": False, "verbose": False}
    config = CONFIG | {"train_batch_size": 2 * ranks // parallel, "comms_logger": logger}
    config = with_parallel(config, probe_parallel=parallel)
    reports = run("none", ranks, job(tmp_path, config=config, steps=20))
    sent = sum(sum(report["socket_bytes"]) for report in reports)
    lanes = 20 * 2 * ranks // parallel
    assert sent == reports[0]["step_bytes"]
    assert 0 < sent / lanes <= 13
    comms = reports[0]["comms"]["zeroth_order_scalars"]
    assert sum(int(size) * count for size, count in comms.items()) == reports[0]["step_bytes"]


def test_other_base_weights_are_named(tmp_path: Path):
    ended = wait(start(2, job(tmp_path, odd_rank=1)))
    for code, text in ended:
        assert code == 1
        assert "ReplicaError: the base weights of rank 1 differ from rank 0's" in text


def test_a_json_of_a_rank_s_own_is_refused_and_the_key_is_named(tmp_path: Path):
    params = CONFIG["scheduler"]["params"] | {"warmup_max_lr": 1.5e-3}
    other = CONFIG | {"scheduler": CONFIG["scheduler"] | {"params": params}}
    for code, text in wait(start(2, job(tmp_path, model="net", odd_config=[1, other]))):
        assert code == 1
        assert (
            "ReplicaError: the settings of rank 1 differ from rank 0's "
            "(scheduler.params.warmup_max_lr: 0.0015, rank 0 has 0.002); start every rank with"
        ) in text
