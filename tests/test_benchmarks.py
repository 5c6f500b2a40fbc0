"""The benchmarks run and end in the line that is recorded; what they measure is not judged here."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import dedent
from typing import Any

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


def on_a_cpu(out: Path, *options: str) -> dict[str, Any]:
    """What the GPU's benchmark ends in."""
    given = ["--device", "cpu", "--shapes", "tiny", "--rounds", "1", "--minutes", "3"]
    done = run("gpu.py", *given, "--out", str(out), *options)
    return json.loads(done.splitlines()[-1])


def test_steps_are_held_against_their_bounds_without_a_gpu(tmp_path: Path):
    (tmp_path / "zo2").mkdir()
    (tmp_path / "zo2" / "__init__.py").touch()
    out, zo2 = tmp_path / "gpu.jsonl", str(tmp_path)
    found = on_a_cpu(out, "--zo2", zo2, "--parts", "core")
    assert found["failed"] == []
    missing = "ModuleNotFoundError: No module named 'zo2.config'"
    assert [each["why"] for each in found["left_out"]] == [f"--zo2 {zo2}: {missing}"] * 2
    rows = {(row["contestant"], *row["batch"]): row for row in found["rows"]}
    ours = {row["contestant"]: row for row in found["rows"] if "bounds" in row}
    assert len(ours) == 5
    assert rows.keys() == {
        (name, *batch)
        for name in ("two bare forwards", "MeZO as published", "ours, in memory", *ours)
        for batch in ((1, 16), (2, 8))
    }
    assert all(row["seconds"] > 0 and row["bare_fraction"] > 0 for row in found["rows"])
    for name, row in ours.items():
        assert row.get("agrees") == (True if "identity" in name else None), name
        assert row["bus_bytes"] > 0
        assert row["bounds"]["in memory"] > 0
    assert ours["ours, nf4, lag 4"]["bus_bytes"] < 0.6 * ours["ours, identity, lag 4"]["bus_bytes"]
    # What only a GPU has is not made up.
    assert all(row["device_peak_bytes"] is None for row in found["rows"])
    assert all(row["bus_gbps"] is row["over_bound"] is None for row in ours.values())
    assert found["rates"]["bus_up_gbps"] is None
    assert found["aims"] == []
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_a_whole_step_is_taken_without_a_gpu(tmp_path: Path):
    found = on_a_cpu(tmp_path / "gpu.jsonl", "--whole-175b")
    assert found["left_out"] == found["failed"] == found["rows"] == []
    whole = found["whole"]
    assert whole["blocks"] == 4
    assert whole["bus_bytes"] < 0.6 * whole["parameters"]
    assert whole["under_18_gb"] is None


ZO2 = {  # stands for the package, with its names
    "config/mezo_sgd.py": """
        from dataclasses import dataclass

        @dataclass
        class MeZOSGDConfig:
            lr: float
            weight_decay: float
            eps: float
            working_device: str
        """,
    "model/huggingface/opt/mezo_sgd/zo2.py": """
        import transformers

        class OPTForCausalLM(transformers.OPTForCausalLM):
            def zo_init(self, config):
                assert config.eps == 1e-3

            def zo_train(self):
                self.ready = True

            def forward(self, **batch):
                assert self.ready and batch["labels"] is batch["input_ids"]
                return super().forward(**batch).loss.item()
        """,
}


@pytest.mark.slow
@pytest.mark.thorough
def test_parts_and_another_package_run_in_processes_of_their_own(tmp_path: Path):
    for name, text in ZO2.items():
        path = tmp_path / "zo2" / name
        path.parent.mkdir(parents=True)
        path.write_text(dedent(text))
        (path.parent / "__init__.py").touch()
    (tmp_path / "zo2" / "__init__.py").touch()
    options = ["--apart", "--parts", "core", "more", "--zo2", str(tmp_path)]
    found = on_a_cpu(tmp_path / "gpu.jsonl", *options)
    assert found["left_out"] == found["failed"] == []
    rows = [row for row in found["rows"] if row["contestant"] == "ZO2"]
    assert [row["batch"] for row in rows] == [[1, 16], [2, 8]]
    assert all(row["over_bare"] > 0 for row in rows)
    ours = {row["contestant"]: row for row in found["rows"] if "bounds" in row}
    assert len(ours) == 12
    assert ours["ours, lossless12, lag 0"]["agrees"]


def test_parts_for_which_there_is_no_time_are_named(tmp_path: Path):
    found = on_a_cpu(tmp_path / "gpu.jsonl", "--minutes", "0")
    assert [each["name"] for each in found["left_out"]] == [
        "machine", "core tiny", "more tiny", "compiled tiny",
    ]  # fmt: skip


def run(script: str, *options: str) -> str:
    """What a benchmark prints."""
    with TemporaryDirectory() as folder:
        out, errors = Path(folder) / "out", Path(folder) / "errors"
        done = Forked("forked:script", str(FOLDER / script), *options, out=out, errors=errors)
        assert done.wait() == 0, errors.read_text()
        return done.stdout
