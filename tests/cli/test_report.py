"""The page on a run and the view in a terminal: right numbers, damage told, nothing believed."""

import csv
import html.parser
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cli.common import STEPS, assert_one_line, invoke
from zo_offload.files import locked
from zo_offload.journal import Journal
from zo_offload.report import charts, measured, tables
from zo_offload.report.found import ENDED, UNDER_WAY, read_run, read_state
from zo_offload.report.page import page
from zo_offload.report.watch import snapshot, sparkline

CHARTS = ("loss", "accuracy", "projected-grad", "noise", "lr", "seconds", "parts", "memory")
HOSTILE = "<script>alert(1)</script>&\"'$\\alpha$"


class Page(html.parser.HTMLParser):
    """What a page says: cells of tables by id and row, text, and the names of elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, dict[str, list[str]]] = {}
        self.names: set[str] = set()
        self.ids: list[str] = []
        self.text = ""
        self._rows: dict[str, list[str]] = {}
        self._cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        name = dict(attrs).get("id")
        if name is not None:
            self.ids.append(name)
        if tag == "table":
            self._rows = self.tables[str(name)] = {}
        elif tag == "tr":
            self._cells = []
        elif tag in ("td", "th"):
            self._cells.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "tr":
            self._rows[self._cells[0]] = self._cells[1:]

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cells:
            self._cells[-1] += data


@pytest.fixture
def copy(finished, tmp_path: Path) -> Path:
    """Of the finished run, to damage."""
    return shutil.copytree(finished.directory, tmp_path / "copy")


def shown(*directories: Path) -> Page:
    """The page without pictures, which take long to draw."""
    return Page(page([read_run(each) for each in directories], []))


def test_a_page_of_a_finished_run(finished, tmp_path):
    output = tmp_path / "page.html"
    done = invoke(["report", str(finished.directory), "--output", str(output)])
    assert done.exit_code == 0, done.output
    text = output.read_text()
    found = Page(text)
    with (finished.directory / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    first, last = (f"{float(row['accuracy']):.4f}" for row in (rows[0], rows[-1]))
    results = found.tables["results"]
    assert results["state"] == ["finished"]
    assert results["steps"] == [f"{STEPS} of {STEPS}"]
    assert results["dev accuracy"] == [f"{first} → {last}"]
    parts = found.tables["seconds-by-part"]
    seconds = {part: float(parts[part][0].split()[0]) for part in measured.SHOWN_PARTS}
    assert sum(seconds.values()) == pytest.approx(float(parts["together"][0]), rel=0.01)
    assert found.tables["settings"]["steps"] == [str(STEPS)]
    assert found.tables["settings"]["config.train_batch_size"] == ["4"]
    names = {path.name for path in tmp_path.iterdir()} - {"page.html"}
    assert names == {f"page-{name}.png" for name in CHARTS}
    assert all((tmp_path / n).read_bytes().startswith(b"\x89PNG") for n in names)
    assert len(found.ids) == len(set(found.ids))
    assert not {"script", "link", "iframe", "img"} & found.names
    assert not re.search(r"(?:src|href)=\"(?!#)|url\((?!#)|@import", text)


def test_bytes_and_memory_are_those_of_the_run(finished):
    run = read_run(finished.directory)
    summary = json.loads((finished.directory / "summary.json").read_text())
    assert measured.steps_measured(run) == STEPS
    assert measured.held(run)["device"] == summary["peak_device_bytes"]
    assert measured.held(run)["host"] == measured.planned(run)["host"] == summary["host_bytes"]
    assert set(measured.bytes_by_link(run)) == {"bus", "disk read", "disk written", "network"}
    assert measured.bytes_by_link(run)["bus"] > 0
    took = sum(run.seconds.values())
    assert sum(measured.seconds_by_part(run).values()) * STEPS == pytest.approx(took, abs=1e-3)
    noise = measured.noise(run)
    assert noise is not None
    assert noise > 0


def test_several_runs_side_by_side(finished, copy):
    asked = json.loads((copy / "run.json").read_text())
    asked["config"]["optimizer"]["params"]["lr"] = 0.5
    (copy / "run.json").write_text(json.dumps(asked))
    found = shown(finished.directory, copy)
    rates = {"config.optimizer.params.lr": ["0.01", "0.5"]}
    assert found.tables["differing"] == {"run": ["A", "B"], **rates}
    assert found.tables["results"]["steps"] == [f"{STEPS} of {STEPS}"] * 2
    assert "run copy" not in found.text
    assert " copy " in found.text


def test_what_a_directory_says_is_text(copy):
    asked = json.loads((copy / "run.json").read_text())
    asked[HOSTILE] = {"model": HOSTILE}
    (copy / "run.json").write_text(json.dumps(asked))
    head, _, rows = (copy / "metrics.csv").read_text().partition("\n")
    metric = HOSTILE.replace('"', "")
    (copy / "metrics.csv").write_text(head.replace("accuracy", metric) + "\n" + rows)
    row = {"kind": "warning", "step": 0, "text": HOSTILE}
    begin = {"kind": "begin", "step": 0, "device": HOSTILE, "ranks": [HOSTILE], "plan": HOSTILE}
    lines = f"{json.dumps(row)}\n{json.dumps(begin)}\n"
    (copy / "telemetry.jsonl").write_text(lines)
    (copy / "summary.json").write_text(json.dumps({"eps_warning": HOSTILE, "steps": HOSTILE}))
    found = shown(copy)
    assert "script" not in found.names
    assert found.tables["settings"][f"{HOSTILE}.model"] == [HOSTILE]
    assert f"dev {metric}" in found.tables["results"]
    assert found.tables["results"]["device"] == [HOSTILE]
    assert f"step 0: {HOSTILE}" in found.text


def test_a_chart_says_what_a_directory_says_as_text(copy):
    run = read_run(copy)
    run.metric = HOSTILE
    chart = charts.Chart("accuracy", "Accuracy", "", charts._draw_accuracy, -1)
    svg, _ = charts.drawn(chart, [run])
    assert "<script" not in svg
    assert "&lt;script&gt;" in svg


def test_a_directory_that_moves_a_cursor_does_not(copy):
    lines = json.dumps({"kind": "warning", "step": 0, "text": "red \x1b[31m"})
    (copy / "telemetry.jsonl").write_text(lines + "\n")
    done = invoke(["watch", str(copy), "--once"])
    assert "red ?[31m" in done.output
    assert "\x1b" not in done.output


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def fill(content: bytes) -> Any:
    return lambda path: path.write_bytes(content)


HEAD = b"step,loss,lr,projected_grad,seconds,accuracy,dev_loss\n"
DAMAGE: dict[str, list[tuple[Any, str]]] = {
    "run.json": [
        (Path.unlink, "not there"),
        (cut, "cannot be read"),
        (fill(b"[]"), "no JSON object"),
        (fill(b"[" * 100_000), "cannot be read"),
    ],
    "summary.json": [(cut, "cannot be read")],
    "metrics.csv": [
        (Path.unlink, "not there"),
        (fill(b"step,loss\n1,2\n"), "its first line"),
        (fill(HEAD + b"x,1\n"), "1 rows"),
    ],
    "telemetry.jsonl": [
        (Path.unlink, "not there"),
        (fill(b"{}\n\xff\xfe\n"), "2 lines are damaged"),
    ],
    "journal/run.journal": [
        (Path.unlink, "cannot read"),
        (spoil, "is damaged"),
        (cut, "bytes of an unfinished record"),
    ],
}
CASES = [(name, i) for name, cases in DAMAGE.items() for i in range(len(cases))]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_damage_is_told_and_the_rest_is_shown(copy, name: str, case: int):
    damage, told = DAMAGE[name][case]
    damage(copy / name)
    run = read_run(copy)
    (line,) = run.missing
    assert line.startswith(name.partition("/")[0])
    assert told in line
    found = shown(copy)
    assert line in found.text
    assert found.tables["results"]["steps"][0].startswith(("5", "6"))
    assert snapshot(run).renderables


def test_losses_of_a_lost_journal_are_those_of_the_metrics(finished, copy):
    (copy / "journal" / "run.journal").unlink()
    lost, whole = read_run(copy), read_run(finished.directory)
    found = [[s.loss for s in run.steps] for run in (lost, whole)]
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_a_run_under_way_and_one_that_was_killed(copy):
    (copy / "summary.json").unlink()
    assert read_state(copy) == ENDED
    with locked(copy):
        assert read_state(copy) == UNDER_WAY
        done = invoke(["watch", str(copy)])  # no terminal: one look
    assert re.search(r"state +under way", done.output)
    assert re.search(rf"step +{STEPS} of {STEPS} \(100 %\)", done.output)
    done = invoke(["watch", str(copy), "--once"])
    assert "no process works on it" in done.output


def test_watch_shows_numbers_of_the_run(finished):
    done = invoke(["watch", str(finished.directory), "--once"])
    assert done.exit_code == 0, done.output
    journal = Journal.read(finished.directory / "journal" / "run.journal")
    last = journal.last
    assert last is not None
    assert re.search(r"state +finished", done.output)
    assert re.search(rf"lr +{last.lr:.4g}\b", done.output)
    assert re.search(r"loss +\d+\.\d{4}  [▁▂▃▄▅▆▇█]{6}\s", done.output)
    assert re.search(r"speed +[\d.]+ (steps/s|s/step)", done.output)
    assert f"after {STEPS}" in done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "nowhere"], "nowhere: no directory; give"),
        (["watch", "nowhere"], "nowhere: no directory; give"),
        (["report", "."], "holds no run; give"),
        (["report", *["."] * 27], "27 runs, and a page shows at most 26; give fewer"),
        (["report", "RUN", "--output", "page.txt"], r"is to be a page; give a name that ends in"),
        (["report", "RUN", "--output", "no/page.html"], "no is no directory; make it"),
    ],
)
def test_mistakes_are_one_line(finished, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    given = [str(finished.directory) if each == "RUN" else each for each in arguments]
    assert_one_line(invoke(given), words)


def test_a_page_that_cannot_be_written(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(charts, "drawn", lambda chart, runs: ("", b""))  # pictures take long
    page = tmp_path / "page.html"
    page.mkdir()
    done = invoke(["report", str(finished.directory), "--output", str(page)])
    words = rf"--output: cannot write {page}: Is a directory; give a place that this user may write"
    assert_one_line(done, words)
    assert not [*page.iterdir()]
    assert not [*tmp_path.glob("*.new")]


def test_equal_warnings_are_told_once(copy):
    lines = [{"kind": "warning", "step": s, "text": f"step {s}: too hot"} for s in (3, 4)]
    (copy / "telemetry.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    assert tables.warnings(read_run(copy)) == [("step 3", "too hot", 2)]


def test_bars_of_numbers_that_are_none():
    assert sparkline([float("nan"), float("inf")]) == ""
