"""The benchmarks run and end in the line that is recorded; what they measure is not judged here."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from distributed import two_nodes
from forked import Forked

from zo_offload.embedded.pretrain import make_embedded

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
LAST_LINES = {
    "stream.py --layers 4 --width 64 --device-mb 13.52 --host-mb 14 --rounds 1 --tokens 1 8": {
        "step_vs_bound",
        "peak_device_bytes",
        "peak_host_bytes",
        "model_bytes",
    },
    "disk.py --mib 16 --unit-mib 4 --rounds 1": {"read_vs_plain", "write_vs_plain"},
    "noise.py --millions 16 --rounds 1": {
        "rademacher_vs_mezo",
        "gaussian_vs_mezo",
        "planes_vs_mezo",
        "rademacher_vs_copy",
    },
    "step.py --layers 2 --width 64 --vocabulary 1000 --rounds 1": {
        "step_vs_mezo",
        "step_vs_forwards",
        "step_vs_exact_forwards",
        "offload_vs_memory",
        "lagging_vs_memory",
    },
}


@pytest.mark.parametrize("command", LAST_LINES)
def test_a_benchmark_ends_in_ratios(command: str):
    script, *options = command.split()
    ratios = json.loads(run(script, *options).splitlines()[-1])
    assert set(ratios) == LAST_LINES[command]
    assert all(ratio > 0 for ratio in ratios.values())


def test_modes_say_what_they_move_and_cost():
    options = "--layers 3 --width 64 --rows 2 --length 8 --rounds 1 --vocabulary 200"
    done = run("modes.py", *options.split(), "--modes", "full", "sparse on nf4")
    found = json.loads(done.splitlines()[-1])
    assert found["full"].keys() == {"moved", "at_rest", "written", "step_vs_forward"}
    assert found["sparse on nf4"]["written"] == 0
    assert 0 < found["sparse on nf4"]["moved"] < found["full"]["moved"]


def test_steps_with_and_without_joined_products_are_compared():
    options = "--widths 64 --tokens 1 4 --lanes 2 --dtypes float32 --layers 2 --seconds 0.1"
    done = run("joined.py", *options.split())
    found = json.loads(done.splitlines()[-1])
    assert found.keys() == {"cells", "stop_microseconds"}
    assert found["cells"].keys() == {"64 float32 2 1", "64 float32 2 4"}
    assert all(ratio > 0 for ratio in found["cells"].values())


def test_a_sparse_run_takes_memory_as_planned():
    options = "--layers 2 --width 128 --inner 256 --device cpu --tokens 8"
    found = run("sparse.py", *options.split())
    numbers = json.loads(found.splitlines()[-1])
    assert 0 < numbers["weights_bytes"] < numbers["planned_bytes"]
    assert numbers["peak_bytes"] > 0


SMALL = "--small 2 64 200 --large 2 64 200 --medium 2 64 200 --tokens 1 8 --ranks 2"


@pytest.mark.slow
@pytest.mark.thorough
def test_ranks_are_counted_and_timed():
    """Two of them."""
    options = f"{SMALL} --parts exchange --rounds 1 --counted 100"
    found = json.loads(run("scaling.py", *options.split()).splitlines()[-1])
    assert found["bytes_per_lane_step"] <= 5 + 35 / 400  # the sums', and the compared weights'
    assert found["exchange_share_of_step"] > 0


@pytest.mark.slow
@pytest.mark.thorough
def test_ranks_are_weighed():
    """Two of them, in host memory and on NVMe."""
    found = json.loads(run("scaling.py", *f"{SMALL} --parts memory".split()).splitlines()[-1])
    assert 3 < found["large_model_bytes_per_lane"]["2"] <= 5  # by how many bits the sums have
    assert all(found[f"node_weight_memory_ratio_2_ranks{where}"] > 0 for where in ("", "_nvme"))


@pytest.mark.slow
@pytest.mark.thorough
def test_ranks_are_modelled_from_five_that_only_exchange():
    """On two nodes where there can be any."""
    options = f"{SMALL} --star 2 5 --far 5 --delays 1 --rounds 1 --counted 100"
    found = json.loads(run("scaling.py", *options.split()).splitlines()[-1])
    assert two_nodes.why_not() is not None or found["two_nodes_over_one"] > 0
    assert found["exchange_share_of_step"] > 0


def test_accuracies_are_kept_and_not_measured_twice(tmp_path: Path):
    make_embedded(tmp_path / "subj", steps=0, layers=2)
    (tmp_path / "subj" / "model").rename(tmp_path / "opt-mini")
    options = ["--steps", "1", "--seeds", "1", "--rows", "16", "--workers", "1"]
    options += ["--acceptance", str(tmp_path), "--out", str(tmp_path / "out.jsonl")]
    first = run("mode_accuracy.py", *options, "--modes", "full")
    again = run("mode_accuracy.py", *options, "--modes", "full")
    assert "full, seed 0" in first
    assert "full, seed 0" not in again
    assert json.loads(first.splitlines()[-1]) == json.loads(again.splitlines()[-1])


def run(script: str, *options: str) -> str:
    """What a benchmark prints."""
    with TemporaryDirectory() as folder:
        out, errors = Path(folder) / "out", Path(folder) / "errors"
        done = Forked("forked:script", str(FOLDER / script), *options, out=out, errors=errors)
        assert done.wait() == 0, errors.read_text()
        return done.stdout
