"""What a run logs is what docs/report.md says that it does."""

from dataclasses import fields
from pathlib import Path

from metric_names import PAGE, documented, flat

from zo_offload import telemetry
from zo_offload.metrics import COLUMNS
from zo_offload.offload.planner import Plan


def test_telemetry(finished, tmp_path: Path):
    rows, damaged = telemetry.read_rows(finished.directory / telemetry.NAME)
    assert not damaged
    warned = telemetry.Telemetry(tmp_path / "t.jsonl", 0, {}, lambda: telemetry.NOTHING)
    warned.warn("hot")
    warned.close()
    rows += telemetry.read_rows(tmp_path / "t.jsonl")[0]
    assert {row["kind"] for row in rows} == {telemetry.BEGIN, telemetry.STEPS, telemetry.WARNING}
    found: set[str] = set()
    for row in rows:
        kind = row.pop("kind")
        found |= flat(row, f"{kind}.")
    assert found == documented("`telemetry.jsonl`")


def test_the_parts_of_a_plan():
    (line,) = [row for row in PAGE.read_text().splitlines() if "`begin.purposes.PART`" in row]
    for field in fields(Plan):
        assert f"`{field.name}`" in line


def test_columns(finished):
    head = (finished.directory / "metrics.csv").read_text().splitlines()[0]
    assert tuple(head.split(",")) == COLUMNS
    assert set(COLUMNS) == documented("`metrics.csv`")
