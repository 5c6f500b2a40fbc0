"""Whole runs on the device: a CPU's replay of the journal ends in the same bits."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from trainable.modes import BATCH, LR, MODES, config_of, differing, masters, model

from gpu.common import IMPLEMENTATIONS, served_by
from zo_offload.journal import Journal
from zo_offload.ops import kernels
from zo_offload.step import Stepper, StepResult

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # Triton, interpreted
]
STEPS = 5
MOMENTUM = {"type": "momentum", "momentum": 0.5, "window": 3}
LAG = {"update": {"lag": 2}}
THERE = {"where": "device"}
# Mode, tier, dtype of forwards, and what else the block says.
RUNS: list[tuple[str, str, torch.dtype, dict[str, Any]]] = [
    ("full", "none", torch.bfloat16, {}),
    ("full", "none", torch.float16, {"direction": "gaussian", "probes": 2}),
    ("full", "cpu", torch.float32, {"update": {**THERE, "lag": 0}}),
    ("full", "cpu", torch.bfloat16, {"update": {**THERE, "lag": 2}, "wire": "lossless12"}),
    ("full", "cpu", torch.bfloat16, {**LAG, "wire": "int8", "master": "bf16+8"}),
    ("full", "cpu", torch.bfloat16, {"update": MOMENTUM, "master": "bf16_sr"}),
    ("full", "nvme", torch.bfloat16, {"update": {**MOMENTUM, "lag": 2}}),
    ("full", "nvme", torch.float16, {"wire": "nf4", "unit": "sublayer"}),
    ("rotate", "cpu", torch.bfloat16, LAG),
    ("lora", "none", torch.bfloat16, {}),
    ("lora", "cpu", torch.bfloat16, {**LAG, "wire": "nf4"}),
    ("sparse", "none", torch.bfloat16, {"wire": "int4"}),
    ("sparse-beside-vectors", "nvme", torch.bfloat16, {**LAG, "wire": "nf4"}),
    ("low-rank", "none", torch.bfloat16, {}),
    ("low-rank-momentum", "cpu", torch.bfloat16, {"update": THERE}),
    ("low-rank", "nvme", torch.float32, {}),
    ("scales", "cpu", torch.bfloat16, {}),
]
IDS = [f"{mode}-{tier}-{i}" for i, (mode, tier, _, _) in enumerate(RUNS)]

TWICE = (1, 3, 6, 10, 11, 13)


def run(
    where: torch.device, path: Path, steps: int, index: int, replayed: bool = False
) -> tuple[list[StepResult], dict[str, torch.Tensor]]:
    """Results of the steps taken, and all masters."""
    mode, tier, dtype, block = RUNS[index]
    folder = {"nvme_path": str(path.with_suffix(".units"))} if tier == "nvme" else {}
    offload = {"device": "none"} if replayed else {"device": tier, **folder}
    config, results = config_of(mode, offload_param=offload, **block), []
    with closing(Stepper(model(), config, where, dtype)) as stepper:
        stepper.follow(Journal.open(path, stepper.bit_header()))
        while stepper.step < steps:
            results.append(stepper.train_step([BATCH], LR, weight_decay=1e-2))
            if stepper.step % 2:
                stepper.evaluate(BATCH)
        return results, masters(stepper)


@pytest.mark.parametrize(
    ("index", "implementation"),
    [(i, kernels.TRITON) for i in range(len(RUNS))] + [(i, kernels.TORCH) for i in TWICE],
)
def test_a_cpus_replay_ends_in_the_bits_of_the_run(
    device: torch.device, implementation: str, index: int, tmp_path: Path
):
    """The journal's header holds the base's digest: it is opened by both, or refused."""
    if device.type == "cpu" and implementation == kernels.TRITON:
        pytest.skip("interpreted, Triton's kernels serve one thread, slowly: no CUDA device")
    path = tmp_path / "run.journal"
    with served_by(implementation, device):
        results, there = run(device, path, STEPS, index)
    assert len({result.lane_losses for result in results}) == STEPS
    nothing, here = run(torch.device("cpu"), path, STEPS, index, replayed=True)
    assert nothing == []
    assert differing(there, here) == []


@pytest.mark.parametrize(
    "index", [1, 3, 6, 10, 11, 13], ids=[IDS[i] for i in (1, 3, 6, 10, 11, 13)]
)
def test_two_runs_find_the_same(device: torch.device, index: int, tmp_path: Path):
    one, other = (run(device, tmp_path / f"{i}.journal", STEPS, index) for i in range(2))
    assert one[0] == other[0]
    assert differing(one[1], other[1]) == []


def test_both_kinds_of_kernels_find_the_same(device: torch.device, tmp_path: Path):
    found = []
    for implementation in IMPLEMENTATIONS:
        with served_by(implementation, device):
            found.append(run(device, tmp_path / f"{implementation}.journal", 2, 0))
    assert found[0][0] == found[1][0]
    assert differing(found[0][1], found[1][1]) == []


def test_a_run_begun_on_the_device_goes_on_on_a_cpu_and_back(device: torch.device, tmp_path: Path):
    """Each takes up what the other has recorded."""
    path, cpu = tmp_path / "run.journal", torch.device("cpu")
    run(device, path, 2, 4)
    run(cpu, path, 4, 4)
    results, there = run(device, path, 6, 4)
    assert [result.step for result in results] == [4, 5]
    _, here = run(cpu, path, 6, 4, replayed=True)
    assert differing(there, here) == []


def test_what_is_trained_is_told_in_every_mode_there_is():
    """A new mode belongs to these runs, or to a kind that is among them."""
    said = {MODES[mode].trainable.get("mode", "full") for mode, *_ in RUNS}
    assert said == {each.trainable.get("mode", "full") for each in MODES.values()}
