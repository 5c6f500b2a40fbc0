"""The stock Trainer: train, evaluate, save, rotate, resume, on one rank and two."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from distributed.launch import SECONDS, command, environment, forked, wait
from metric_names import documented

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("train.py")
STEPS = 12


def train(
    folder: Path, launcher: str = "none", ranks: int = 1, dies: bool = False, **job: Any
) -> list[dict[str, Any]]:
    """What every rank reported of a run in ``folder``."""
    job = {"output": str(folder), "steps": STEPS, **job}
    if launcher == "none":
        ended = wait(forked("integrations.train:main", ranks, job, out=folder / "logs"))
    else:
        done = subprocess.run(
            command(launcher, ranks, [str(PROGRAM), json.dumps(job)]), env=environment(),
            timeout=SECONDS, capture_output=True, text=True, check=False,
        )  # fmt: skip
        ended = [(done.returncode, done.stdout + done.stderr)]
    assert all((code != 0) is dies for code, _ in ended), ended
    if dies:
        return []
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (report,) = train(tmp_path_factory.mktemp("undisturbed"))
    return report


def test_it_trains_evaluates_saves_and_rotates(undisturbed: dict[str, Any]):
    assert undisturbed["steps"] == STEPS
    assert undisturbed["checkpoints"] == ["checkpoint-10", f"checkpoint-{STEPS}"]
    evaluated = [entry["step"] for entry in undisturbed["log"] if "eval_loss" in entry]
    assert evaluated == [5, 10, STEPS]
    logged = [entry for entry in undisturbed["log"] if "grad_norm" in entry]
    assert [entry["step"] for entry in logged] == [5, 10]
    assert all(entry["grad_norm"] > 0 for entry in logged)


def test_what_it_logs_is_what_the_page_says(undisturbed: dict[str, Any]):
    assert set(undisturbed["logged"]) == documented("The Trainer's log")


@pytest.mark.parametrize("last_step", [5, 8])
def test_after_a_kill_it_resumes_to_the_same_bits(
    undisturbed: dict[str, Any], tmp_path: Path, last_step: int
):
    """At step 5 the tag is about to be written; at 8 it is three steps behind."""
    train(tmp_path, dies=True, die=7 if last_step == 5 else 8)
    (report,) = train(tmp_path, resume=True)
    assert report["weights"] == undisturbed["weights"]
    assert report["log"][-2:-1] == undisturbed["log"][-2:-1]


def test_the_best_model_is_put_back(tmp_path: Path):
    """Which moves a live engine back to an earlier tag."""
    (report,) = train(tmp_path, best=True)
    scores = {e["step"]: e["eval_loss"] for e in report["log"] if "eval_loss" in e}
    assert report["steps"] == min(scores, key=scores.__getitem__) != STEPS


@pytest.fixture(scope="module")
def two_undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return train(tmp_path_factory.mktemp("two"), ranks=2, micro_batch=1)


@pytest.mark.parametrize(
    "launcher",
    [
        "none",
        pytest.param("deepspeed", marks=pytest.mark.thorough),
        pytest.param("torchrun", marks=pytest.mark.thorough),
        pytest.param("mpirun", marks=pytest.mark.thorough),
    ],
)
def test_two_ranks_resume_to_the_same_bits(
    two_undisturbed: list[dict[str, Any]], tmp_path: Path, launcher: str
):
    train(tmp_path, ranks=2, dies=True, micro_batch=1, die=7)
    reports = train(tmp_path, launcher, 2, micro_batch=1, resume=True)
    assert {report["weights"] for report in reports + two_undisturbed} == {reports[0]["weights"]}
    assert [report["steps"] for report in reports] == [STEPS, STEPS]
