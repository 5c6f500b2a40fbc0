"""``train --find-lr``: what it finds and leaves, and what it leaves as it was."""

import json
from pathlib import Path

import pytest

from cli.common import STEPS, assert_one_line, invoke, results, tree
from zo_offload.files import locked
from zo_offload.find_lr.sweep import ROUNDS, for_run

TRIAL_STEPS = 4


@pytest.fixture(scope="module")
def found(task, tmp_path_factory):
    """A directory, and what was printed."""
    model = tree(task.folder)
    directory = tmp_path_factory.mktemp("found") / "run"
    done = invoke([*task.arguments(directory), "--find-lr", "--trial-steps", str(TRIAL_STEPS)])
    assert done.exit_code == 0, done.output
    assert tree(task.folder) == model  # it is where it was
    return directory, done.stdout


def test_the_directory_holds_what_was_found_and_nothing_else(found):
    directory, _ = found
    assert set(tree(directory)) == {"find_lr.json", "find_lr.png"}
    assert (directory / "find_lr.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_last_line_is_the_object_in_the_file(found):
    directory, stdout = found
    told = json.loads(stdout.splitlines()[-1])
    assert told == json.loads((directory / "find_lr.json").read_text())
    rates = [row["lr"] for row in told["grid"]]
    assert rates == sorted(rates)
    for row in told["grid"]:
        assert row["lr"] == for_run(row["trial_lr"], TRIAL_STEPS, STEPS)
    if told["lr"] is not None:
        assert told["lr"] in [r["lr"] for r in told["grid"] if len(r["losses"]) == ROUNDS]


def test_the_cost_is_counted(found):
    told = json.loads(found[1].splitlines()[-1])
    assert told["run_forwards"] == STEPS * 2  # batches of one micro-batch
    tries = sum(len(row["losses"]) for row in told["grid"])
    held_out = 3 + tries * 3  # 17 examples, 8 at once
    slopes = 12 * 2 * 3
    assert told["forwards"] <= slopes + held_out + tries * TRIAL_STEPS * 2
    assert told["forwards"] > slopes + held_out


def test_a_table_has_a_row_a_rate(found):
    _, stdout = found
    told = json.loads(stdout.splitlines()[-1])
    rows = [line.split() for line in stdout.splitlines() if line.strip()]
    for row in told["grid"]:
        assert [f"{row['lr']:g}", f"{row['trial_lr']:g}"] in [line[:2] for line in rows]
    assert any(line.startswith("cost: ") and "of the run's" in line for line in stdout.splitlines())


def test_the_run_afterwards_has_the_bits_of_one_without(task, finished, found, tmp_path):
    directory, _ = found
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    done = invoke(task.arguments(tmp_path))
    assert done.exit_code == 0, done.output
    assert results(tmp_path, done.stdout) == finished.results


def test_a_run_is_not_mixed_with_what_is_found(task, finished):
    before = tree(finished.directory)
    done = invoke([*task.arguments(finished.directory), "--find-lr"])
    assert_one_line(
        done, "--output: .* holds curve.png and more; --find-lr writes into a directory"
    )
    assert tree(finished.directory) == before


def test_a_directory_that_another_process_works_in_is_left_alone(task, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    with locked(output):
        done = invoke([*task.arguments(output), "--find-lr"])
        words = f"--output: another process is at work in {output}; wait for it, or choose another"
        assert_one_line(done, words)
        assert [*tree(output)] == [".lock"]


def test_a_directory_below_a_file(task, tmp_path):
    (tmp_path / "file").write_text("mine")
    output = tmp_path / "file" / "out"
    done = invoke([*task.arguments(output), "--find-lr"])
    assert_one_line(done, f"--output: cannot write {output}: Not a directory; give another")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("flags", "steps", "words"),
    [
        (["--trial-steps", "3"], STEPS, "--trial-steps: goes with --find-lr"),
        (["--find-lr", "--trial-steps", "1025"], 2000, "--trial-steps: at most 1,024, found 1,025"),
        (["--find-lr"], 0, "--steps: expected 1 to"),
        (
            ["--find-lr", "--first-order", "full"],
            STEPS,
            "--first-order full: --find-lr tries rates of zeroth-order steps only; leave one",
        ),
    ],
)
def test_what_cannot_be_asked(task, tmp_path, flags, steps, words):
    assert_one_line(invoke([*task.arguments(tmp_path, steps=steps), *flags]), words)
    assert not [*tmp_path.iterdir()]


def with_eps(task, tmp_path: Path, eps: float) -> Path:
    config = json.loads((task.folder / "ds.json").read_text())
    config["zeroth_order"]["eps"] = eps
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    return path


def test_no_rate_is_tried_with_a_dead_eps(task, tmp_path):
    config, output = with_eps(task, tmp_path, 1e-12), tmp_path / "out"
    done = invoke([*task.arguments(output, config=config), "--find-lr"])
    assert_one_line(done, "zeroth_order.eps: no learning rate can help: eps 1e-12 is dead: .*raise")
    assert not [*output.iterdir()]


def test_an_objective_that_does_not_change_ends_the_search_at_once(task, tmp_path):
    config, output = with_eps(task, tmp_path, 1e-12), tmp_path / "out"
    flags = ["--find-lr", "--trial-steps", "3", "--objective", "accuracy"]
    done = invoke([*task.arguments(output, config=config), *flags])
    assert done.exit_code == 0, done.output
    told = json.loads((output / "find_lr.json").read_text())
    assert told["lr"] is None
    assert [row["losses"] for row in told["grid"]] == [[told["loss_before"]]]
    words = "the objective does not change: held out it is "
    (line,) = (line for line in done.stdout.splitlines() if line.startswith(words))
    assert "before and after 3 steps at " in line
    assert "take another --objective (the loss " in line
    assert "--trial-steps" not in done.stdout


def test_a_run_with_a_dead_eps_says_so_once_and_in_its_summary(task, tmp_path):
    config, output = with_eps(task, tmp_path, 1e-12), tmp_path / "out"
    arguments = task.arguments(output, config=config, steps=45, eval_every=45)
    done = invoke(arguments)
    assert done.exit_code == 0, done.output
    assert done.stderr.count("is dead") == 1
    assert "Warning: step 19: eps 1e-12 is dead: for 20 steps" in done.stderr
    summary = json.loads((output / "summary.json").read_text())
    assert summary["eps_warning"].startswith("eps 1e-12 is dead")
    assert f"  eps                    {summary['eps_warning']}" in done.stdout.splitlines()
    (output / "summary.json").unlink()  # as if another process had taken all steps
    again = invoke(arguments)
    assert again.exit_code == 0, again.output
    told = json.loads((output / "summary.json").read_text())
    assert told["eps_warning"] == summary["eps_warning"]


def test_a_run_whose_eps_is_right_says_nothing_of_it(finished):
    assert json.loads((finished.directory / "summary.json").read_text())["eps_warning"] is None
    assert "  eps  " not in finished.stdout
