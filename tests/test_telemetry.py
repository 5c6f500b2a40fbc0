"""The rows of seconds and bytes: they add up, and follow the journal."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from zo_offload.telemetry import Reading, Telemetry, computing, listening, read_rows

BEGIN = {"plan": {"host": 7}}


class Counters:
    """What a run's counters stand at."""

    def __init__(self) -> None:
        self.bus = 0.0

    def __call__(self) -> Reading:
        self.bus += 1.0
        return Reading({"bus": self.bus}, {"bus": 2 * self.bus}, {"bus": 100 * int(self.bus)})


def telemetry(path: Path, steps: int = 0) -> Telemetry:
    return Telemetry(path, steps, BEGIN, Counters(), lambda: {"noise": 0.5})


def rows(path: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_rows(path)[0] if row["kind"] == kind]


def test_a_row_sums_up_steps(tmp_path):
    path = tmp_path / "telemetry.jsonl"
    it = telemetry(path)
    it.add_step(4.0)
    it.skip()  # what an evaluation does between is no step's
    it.add_step(3.0)
    assert rows(path, "steps") == []  # no interval is over
    it.add_step(5.0)
    it.add_step(1.0)
    it.close()
    first, second = rows(path, "steps")
    assert first == {
        "kind": "steps", "first": 0, "steps": 3, "seconds": {"step": 12.0, "bus": 3.0},
        "busy": {"bus": 6.0}, "bytes": {"bus": 300}, "noise": 0.5,
    }  # fmt: skip
    assert (second["first"], second["steps"], second["seconds"]["step"]) == (3, 1, 1.0)
    assert rows(path, "begin") == [{"kind": "begin", "step": 0, **BEGIN}]


def test_rows_behind_the_journal_are_dropped(tmp_path):
    path = tmp_path / "telemetry.jsonl"
    first = telemetry(path)
    for _ in range(4):
        first.add_step(5.0)
    first.warn("too hot")
    first.close()
    again = telemetry(path, steps=3)
    again.add_step(11.0)
    again.close()
    found = [(row["first"], row["steps"]) for row in rows(path, "steps")]
    assert found == [(0, 2), (3, 1)]
    assert [row["step"] for row in rows(path, "begin")] == [0, 3]
    assert [row["text"] for row in rows(path, "warning")] == ["too hot"]


def test_a_line_that_a_kill_cut_off_is_overwritten(tmp_path):
    path = tmp_path / "telemetry.jsonl"
    it = telemetry(path)
    it.add_step(11.0)
    it.close()
    path.write_bytes(path.read_bytes() + b'{"kind": "steps", "fir')
    telemetry(path, steps=1).close()
    lines = path.read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["begin", "steps", "begin"]


@pytest.mark.parametrize(
    "line",
    [
        "x", "[]", "7", '{"kind": "steps", "first": 0, "steps": 1}', "[" * 100_000,
        '{"kind": "steps", "first": -1, "steps": 1, "seconds": {}}',
        '{"kind": "steps", "first": true, "steps": 1, "seconds": {}}',
        '{"kind": "warning", "step": 0, "text": 5}', '{"kind": "begin"}', '{"kind": {}}',
    ],
)  # fmt: skip
def test_lines_that_are_not_ours_are_counted(tmp_path, line: str):
    path = tmp_path / "telemetry.jsonl"
    path.write_text(f'{line}\n{{"kind":"warning","step":1,"text":"w"}}\n')
    found, damaged = read_rows(path)
    assert ([row["kind"] for row in found], damaged) == (["warning"], 1)


def test_warnings_go_to_the_file_also_those_before_it(tmp_path):
    path, logger = tmp_path / "telemetry.jsonl", logging.getLogger("zo_offload.anything")
    with listening() as tell:
        logger.warning("early %d", 1)
        it = telemetry(path)
        tell(it)
        it.add_step(1.0)
        logger.warning("late\nand long")
        logger.info("nothing")
        tell(None)
        it.close()
    logger.warning("after all")
    found = [(row["step"], row["text"]) for row in rows(path, "warning")]
    assert found == [(0, "early 1"), (1, "late and long")]


def test_computing_is_the_rest():
    assert computing({"step": 5.0, "bus": 1.0, "waiting": 1.5, "busy": 9.0}) == 2.5
