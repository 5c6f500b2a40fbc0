"""SIGTERM and Ctrl-C: the step is finished, the command succeeds, and the same one goes on."""

import signal
from pathlib import Path

import pytest
from distributed.launch import forked, wait

from cli.common import STEPS, At, Child, Task, invoke, results
from cli.conftest import Finished
from zo_offload.journal import Journal

ASKED = "stopping after this step; once more: at once"
STEP = ("zo_offload.journal", "Journal.append", 3)


def goes_on(task: Task, finished: Finished, directory: Path) -> list[str]:
    done = invoke(task.arguments(directory))
    assert done.exit_code == 0, done.output
    assert results(directory, done.stdout) == finished.results
    return done.stdout.splitlines()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_step_under_way_is_finished(task, finished, tmp_path, number, when: str):
    command = task.arguments(tmp_path / "run")
    child = Child(command, tmp_path / "log", At(*STEP, when, number))
    assert child.wait() == 0, child.stderr
    assert child.stderr == ""
    lines = child.stdout.splitlines()
    assert ASKED in lines
    run = tmp_path / "run"
    said = f"stopped after 3 of {STEPS} steps; the same command continues the run"
    assert lines[-1] == f"{run}: {said}"
    assert len(Journal.read(run / "journal" / "run.journal").records) == 3
    assert "continuing after 3 steps" in goes_on(task, finished, run)


@pytest.mark.parametrize(
    ("at", "steps"),
    [
        (At("zo_offload.integrations.hf", "load_model", 1, "after", signal.SIGTERM), None),
        (At("transformers", "OPTForCausalLM.__init__", 1, "before", signal.SIGINT), None),
        (At("zo_offload.run", "evaluate_on_ranks", 2, "before", signal.SIGTERM), 2),
        (At("zo_offload.run", "export_model", 1, "before", signal.SIGINT), STEPS),
    ],
    ids=str,
)
def test_outside_of_steps_it_ends_at_once(task, finished, tmp_path, at: At, steps: int | None):
    child = Child(task.arguments(tmp_path / "run"), tmp_path / "log", at)
    assert child.wait() == 0, child.stderr
    last = child.stdout.splitlines()[-1]
    after = f" after {steps} of {STEPS} steps" if steps is not None else ""
    assert last == f"{tmp_path / 'run'}: stopped{after}; the same command continues the run"
    goes_on(task, finished, tmp_path / "run")


def test_asked_twice_it_does_not_finish_the_step(task, finished, tmp_path):
    at = At(*STEP, "before", signal.SIGTERM)
    child = Child(task.arguments(tmp_path / "run"), tmp_path / "log", at, repeat=2)
    assert child.wait() == 130
    assert child.stderr == "Error: interrupted; the same command continues the run\n"
    assert len(Journal.read(tmp_path / "run" / "journal" / "run.journal").records) == 2
    goes_on(task, finished, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_that_is_asked_ends_all_after_the_same_step(task, tmp_path, rank: int):
    at = At("zo_offload.replica.replica", "Replica.mean", 3, "before", signal.SIGTERM)
    command = task.arguments(tmp_path / "run", eval_every=STEPS)
    told = forked("cli.common:run_one_rank", 2, command, rank, at, out=tmp_path / "log")
    for number, (code, text) in enumerate(wait(told)):
        assert code == 0, text
        assert ("stopped after" in text) == (number == 0)
    steps = len(Journal.read(tmp_path / "run" / "journal" / "run.journal").records)
    assert 0 < steps < STEPS
    said = wait(forked("cli.common:run_in_child", 2, command, out=tmp_path / "again"))
    assert all(code == 0 for code, _ in said), said
    assert f"continuing after {steps} steps" in said[0][1]
