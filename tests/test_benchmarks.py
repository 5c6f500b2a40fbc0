"""The benchmarks run and end in the line that is recorded; what they measure is not judged here."""

import json
from pathlib import Path
from runpy import run_path
from tempfile import TemporaryDirectory
from textwrap import dedent
from typing import Any

import pytest
from distributed import two_nodes
from forked import Forked
from safetensors.torch import save_file

from zo_offload.embedded.pretrain import make_embedded
from zo_offload.integrations.hf import load_causal_lm

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


LR, FORWARDS = 1e-5, 16
METHODS = {"mezo": 2, "projections": 8}  # and forwards of a step


@pytest.fixture(scope="module")
def acceptance(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `accuracy.py`, with an untrained model."""
    folder = tmp_path_factory.mktemp("acceptance")
    make_embedded(folder / "subj", steps=0, layers=2)
    (folder / "subj" / "model").rename(folder / "opt-mini")
    return folder


def compared(acceptance: Path, out: Path, *options: str) -> str:
    """What `accuracy.py` prints of tiny runs."""
    given = ["--forwards", str(FORWARDS), "--points", "2", "--workers", "1"]
    given += ["--acceptance", str(acceptance), "--out", str(out)]
    return run("accuracy.py", *given, "--picture", str(out.with_suffix(".png")), *options)


def stored(method: str, seed: int, lr: float = LR, loss: float = 0.6, **more: Any) -> str:
    """A row, with a curve of before tokens and seconds were in it."""
    name = {"method": method, "seed": seed, "forwards": FORWARDS, "lr": lr, "search": False}
    curve = [[8, 0.7, 0.4], [FORWARDS, loss, 0.5]] if loss < 1 else [[8, 0.7, 0.4]]
    found = {"loss": loss, "accuracy": 0.5, "spent": FORWARDS, "seconds": 1.0, "curve": curve}
    return json.dumps({**name, **found, **more}) + "\n"


def test_a_diverged_run_is_reported_and_left_out_of_differences(acceptance: Path, tmp_path: Path):
    out = tmp_path / "out.jsonl"
    rows = [stored(name, seed) for name in METHODS for seed in (1, 2)]
    out.write_text("".join([stored("projections", 0, loss=float("inf")), *rows]))
    printed = compared(acceptance, out, "--methods", *METHODS, "--seeds", "3", "--lr", str(LR))
    shown = [" ".join(line.split()) for line in printed.splitlines()]
    assert any("│ projections │ 3 (1 diverged) │" in line for line in shown), printed
    assert any("│ projections │ 2 (seed 0 left out: diverged) │" in line for line in shown), printed
    found = json.loads(printed.splitlines()[-1])["methods"]
    assert found.keys() == METHODS.keys()
    for name in METHODS:
        assert found[name].keys() == {"accuracy", "loss", "forwards", "seconds"}
    assert found["projections"]["loss"] == 0.6
    (new,) = (json.loads(line) for line in out.read_text().splitlines()[5:])
    assert (new["method"], new["seed"]) == ("mezo", 0)
    assert [len(point) for point in new["curve"]] == [5, 5]
    (_, _, _, half, _), (_, _, _, tokens, seconds) = new["curve"]
    assert 0 < half < tokens
    assert 0 < seconds == pytest.approx(new["seconds"], abs=0.06)
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_a_run_diverges_at_a_rate_that_is_far_too_high(acceptance: Path, tmp_path: Path):
    options = ["--methods", *METHODS, "--seeds", "1", "--lr", "1e30"]
    found = json.loads(compared(acceptance, tmp_path / "out", *options).splitlines()[-1])
    for name in METHODS:
        assert found["methods"][name]["loss"] is None
        assert found["methods"][name]["accuracy"] == 0.0


def test_the_best_rate_at_the_edge_of_a_grid_is_called_so(acceptance: Path, tmp_path: Path):
    out = tmp_path / "out.jsonl"
    searched = [
        stored("mezo", 1000, lr, loss, search=True)
        for lr, loss in ((2e-5, 0.7), (4e-5, float("nan")), (8e-5, 0.6))
    ]
    out.write_text("".join([*searched, stored("mezo", 0, 8e-5)]))
    options = ["--methods", "mezo", "--seeds", "1"]
    assert "8e-05 (edge of its grid)" in compared(acceptance, out, *options)
    assert "8e-05 (best, edge of its grid)" in compared(acceptance, out, *options, "--search")


def test_seconds_of_a_run_that_goes_on_add_up(acceptance: Path, tmp_path: Path):
    kept = tmp_path / "out.jsonl.kept" / f"mezo, seed 0, {FORWARDS}, {LR:g}, False"
    kept.mkdir(parents=True)
    weights = dict(load_causal_lm(acceptance / "opt-mini").float().named_parameters())
    save_file({name: value.detach() for name, value in weights.items()},
              kept / "weights.safetensors", {"step": "5"})  # fmt: skip
    (kept / "curve.json").write_text(json.dumps([40.0, [[8, 0.7, 0.4]]]))
    (kept / "seconds").write_text("4 40.0\n5 50.0\n6 60.0\n7 7")  # cut off
    options = ["--methods", "mezo", "--seeds", "1", "--lr", str(LR)]
    compared(acceptance, tmp_path / "out.jsonl", *options)
    found = json.loads((tmp_path / "out.jsonl").read_text())
    assert 50.0 < found["seconds"] < 60.0
    assert [point[0] for point in found["curve"]] == [8, FORWARDS]
    assert found["curve"][1][3] > 0
    assert not kept.exists()


def test_a_line_goes_through_what_half_of_the_runs_reached():
    points = run_path(str(FOLDER / "accuracy_report.py"))["points"]
    diverged = {"curve": [[2, 0.9, 0.5, 20, 1.0]]}
    whole = {"curve": [[2, 0.7, 0.6, 30, 2.0], [4, 0.5, 0.7, 60, 4.0]]}
    old = {"curve": [[2, 0.8, 0.5], [4, 0.6, 0.6]]}
    assert points([diverged, whole], 0, 1) == [(2, [0.9, 0.7]), (4, [0.5])]
    assert points([diverged, whole, old], 0, 1) == [(2, [0.9, 0.7, 0.8]), (4, [0.5, 0.6])]
    assert points([diverged, whole], 3, 2) == [(25, [0.5, 0.6]), (60, [0.7])]
    assert points([diverged, old, old], 4, 1) == points([old], 3, 1) == []


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
