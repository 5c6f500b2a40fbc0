"""The rows of a run: in step with the journal, whatever became of the file."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from zo_offload.journal import Probe, Record
from zo_offload.metrics import Metrics, draw_curve
from zo_offload.tasks import Evaluation

HEAD = "step,loss,lr,projected_grad,seconds,accuracy,dev_loss\n"


def record(step: int) -> Record:
    return Record(step, (Probe(0, -2.0, 1e-3),), (1.0, 3.0), eps=1e-3, lr=1e-3)


def written(path: Path) -> str:
    return path.read_bytes().decode()


def test_rows_as_they_come(tmp_path):
    path = tmp_path / "metrics.csv"
    metrics = Metrics(path, [])
    assert written(path) == HEAD
    metrics.add_evaluation(Evaluation(1 / 3, 0.7, 3))
    assert written(path) == HEAD + "0,,,,,0.333333333333,0.700000\n"
    metrics.add_step(record(0), 0.5)
    assert written(path) == HEAD + "0,2.000000,0.001,-2,0.5000,0.333333333333,0.700000\n"
    metrics.add_step(record(1), 0.25)
    metrics.add_evaluation(Evaluation(1.0, 0.1, 3))
    metrics.close()
    assert written(path).splitlines()[2:] == ["1,2.000000,0.001,-2,0.2500,,", "2,,,,,1,0.100000"]
    assert metrics.evaluations() == [(0, pytest.approx(1 / 3), 0.7), (2, 1.0, 0.1)]


def test_a_file_continues(tmp_path):
    path = tmp_path / "metrics.csv"
    first = Metrics(path, [])
    first.add_evaluation(Evaluation(0.5, 0.7, 2))
    for step in range(3):
        first.add_step(record(step), 0.5)
    first.close()
    whole = written(path)
    again = Metrics(path, [record(step) for step in range(3)])
    assert written(path) == whole
    assert again.evaluation(0) == (0.5, 0.7)
    assert again.evaluation(3) is None
    shorter = Metrics(path, [record(0)])
    assert written(path) == "".join(whole.splitlines(keepends=True)[:2])
    longer = Metrics(path, [record(0), record(1)])
    assert written(path).splitlines()[-1] == "1,2.000000,0.001,-2,,,"
    for metrics in (again, shorter, longer):
        metrics.close()


def test_an_evaluation_on_the_disk_is_not_written_over(tmp_path):
    """A power cut may leave some sectors of a write and not the others."""
    path = tmp_path / "metrics.csv"
    metrics = Metrics(path, [])
    metrics.add_step(record(0), 0.5)
    metrics.add_evaluation(Evaluation(0.5, 0.7, 2))
    synced = written(path)
    with path.open("rb") as as_synced:
        metrics.add_step(record(1), 0.5)
        assert as_synced.read().decode() == synced
    metrics.close()
    assert metrics.evaluations() == [(1, 0.5, 0.7)]


def test_an_evaluation_that_no_step_follows_is_kept(tmp_path):
    path = tmp_path / "metrics.csv"
    first = Metrics(path, [record(0)])
    first.add_evaluation(Evaluation(0.5, 0.7, 2))
    first.close()
    whole = written(path)
    again = Metrics(path, [record(0)])
    assert again.evaluation(1) == (0.5, 0.7)
    assert written(path) == whole
    again.close()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "\n",
        "other,columns\n1,2\n",
        HEAD[:-1],
        HEAD + "0,9,9,9,9,0.1",
        HEAD + "0,9,9\n",
        HEAD + "zero,9,9,9,9,9,9\n",
        HEAD + "0,x,9,9,9,9,9\n",
        HEAD + "7,9,9,9,9,9,9\n",
        HEAD + "0,9,9,9,9,9,9,9\n",
        "\x00" * 500,
        HEAD + '"' * 7 + "9" * 200_000 + "\n",
    ],
)
def test_what_is_not_ours_is_dropped(tmp_path, content: str):
    path = tmp_path / "metrics.csv"
    path.write_text(content)
    metrics = Metrics(path, [record(0)])
    metrics.close()
    assert written(path) == HEAD + "0,2.000000,0.001,-2,,,\n"


def test_the_journal_is_right_where_they_differ(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(HEAD + "0,9,9,9,1.5,0.25,9\n")
    Metrics(path, [record(0)]).close()
    assert written(path) == HEAD + "0,2.000000,0.001,-2,1.5,0.25,9\n"


def test_a_lost_evaluation_is_mended(tmp_path):
    path = tmp_path / "metrics.csv"
    metrics = Metrics(path, [record(0), record(1)])
    metrics.mend_evaluation(0, Evaluation(0.5, 0.7, 2))
    metrics.add_step(record(2), 0.5)
    metrics.close()
    assert written(path).splitlines()[1:] == [
        "0,2.000000,0.001,-2,,0.5,0.700000",
        "1,2.000000,0.001,-2,,,",
        "2,2.000000,0.001,-2,0.5000,,",
    ]


def test_several_probes(tmp_path):
    path = tmp_path / "metrics.csv"
    two = Record(0, (Probe(0, -3.0, 0.0), Probe(1, 4.0, 0.0)), (1.0,) * 4, eps=1e-3, lr=1e-3)
    Metrics(path, [two]).close()
    assert written(path) == HEAD + "0,1.000000,0.001,5,,,\n"


CURVES = {
    "one step": ([1.0], [(0, 0.5, 0.7), (1, 0.5, 0.7)]),
    "outliers": ([1.0] * 200 + [1e9], [(0, 0.5, 0.7)]),
    "nothing but zeros": ([0.0, 0.0], [(0, 1.0, 0.0)]),
    "not numbers": ([1.0, 2.0], [(0, 0.5, math.nan), (2, 0.5, math.inf)]),
    "nothing": ([], []),
}


@pytest.mark.parametrize("name", CURVES)
def test_curves_that_are_hard_to_draw(tmp_path, name: str):
    losses, evaluations = CURVES[name]
    rows = [{"step": str(i), "loss": str(loss)} for i, loss in enumerate(losses)]
    metrics: Any = SimpleNamespace(
        metric="accuracy", objective="loss", rows=rows, evaluations=lambda: evaluations
    )
    draw_curve(metrics, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000
