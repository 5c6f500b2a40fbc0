"""``zo-offload convert``, and runs on what it made."""

import signal
from pathlib import Path

import pytest

from cli.common import At, Child, Task, assert_one_line, invoke, results, tree, write_config
from cli.conftest import Finished
from zo_offload.wording import as_bytes

POINTS = [
    At("zo_offload.convert", "create_store", 1),
    At("zo_offload.offload.nvme", "UnitStore.write", 1),
    At("zo_offload.convert", "write_converted", 1, "before"),
    At("zo_offload.convert", "write_converted", 1),
    At("os", "rename", 1, "before"),
]


def command(task: Task, output: Path) -> list[str]:
    model, config = task.folder / "model", task.folder / "ds.json"
    return ["convert", "--model", str(model), "--output", str(output), "--config", str(config)]


@pytest.mark.parametrize("nvme", [False, True])
def test_a_run_on_it_is_the_run_on_the_model(
    task: Task, finished: Finished, tmp_path: Path, nvme: bool
):
    done = invoke([*command(task, tmp_path / "base"), "--stripe", str(tmp_path / "disk")])
    assert done.exit_code == 0, done.output
    files = sum(path.stat().st_size for path in tmp_path.rglob("units.bin"))
    assert f"{tmp_path}/base: 2 units, {as_bytes(files)}, in " in done.stdout
    assert "for runs that compute in float32, with master fp32, unit block" in done.stdout
    before = tree(tmp_path / "base")
    config = write_config(tmp_path / "ds.json", nvme=tmp_path / "run-files" if nvme else None)
    run = invoke(task.arguments(tmp_path / "run", model=tmp_path / "base", config=config))
    assert run.exit_code == 0, run.output
    assert results(tmp_path / "run", run.stdout) == finished.results
    assert tree(tmp_path / "base") == before
    found = invoke(task.arguments("", "eval", model=tmp_path / "base"))
    assert f"\naccuracy: {finished.results.accuracies[0]}\n" in found.stdout


@pytest.mark.parametrize("at", POINTS, ids=str)
def test_a_kill_leaves_nothing_that_looks_converted(task: Task, tmp_path: Path, at: At):
    output = tmp_path / "base"
    child = Child(command(task, output), tmp_path / "log", at)
    assert child.wait() == -signal.SIGKILL, child.stderr
    assert not output.exists()
    done = invoke(command(task, output))
    assert done.exit_code == 0, done.output
    assert [path.name for path in tmp_path.glob("base*")] == ["base"]
    found = invoke(task.arguments("", "eval", model=output))
    assert found.exit_code == 0, found.output


def test_an_output_that_is_there_is_one_line(task: Task, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    assert_one_line(invoke(command(task, tmp_path)), "there is something already; choose another")
    assert (tmp_path / "file").read_text() == "mine"


def test_no_tokenizer_is_said(task: Task, tmp_path: Path):
    for path in (task.folder / "model").iterdir():
        if not path.name.startswith("tokenizer"):
            (tmp_path / "model").mkdir(exist_ok=True)
            (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    options = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "base")]
    done = invoke(["convert", *options])
    assert done.exit_code == 0, done.output
    assert "no tokenizer was found beside the model: copy its files there" in done.stdout


def test_a_damaged_tokenizer_is_not_left_out(task: Task, tmp_path: Path):
    (tmp_path / "model").mkdir()
    for path in (task.folder / "model").iterdir():
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    options = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "base")]
    assert_one_line(invoke(["convert", *options]), "the tokenizer could not be loaded")
    assert not (tmp_path / "base").exists()
