"""What may take seconds shows on a terminal, and says nothing where programs read."""

import os
import pty
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import RawIOBase
from pathlib import Path

import pytest
from rich.console import Console

from cli.common import Task, invoke
from zo_offload import bars
from zo_offload.doctor import rates
from zo_offload.report import charts, watch
from zo_offload.reporter import Item, Reporter


class Noting(Reporter):
    """Knows what it was told of."""

    def __init__(self) -> None:
        self.names: list[str] = []

    @contextmanager
    def phase(self, name: str, quiet: bool = False) -> Generator[None, None, None]:
        self.names.append(name)
        yield

    def counted(self, name: str, items: Iterable[Item], count: int) -> Iterator[Item]:
        self.names.append(name)
        for number, item in enumerate(items, start=1):
            assert number <= count
            yield item


@pytest.fixture
def noting(monkeypatch: pytest.MonkeyPatch) -> Noting:
    noting = Noting()
    monkeypatch.setattr(bars, "reporter", lambda: noting)
    return noting


COMMANDS = {
    "plan": (["plan", "--model", "opt-125m"], ["starting", "planning opt-125m"]),
    "doctor": (
        ["doctor", "--json", "--path", "."],
        ["starting", "looking at the machine", "measuring memory", "measuring disks"],
    ),
    "report": (["report", "RUN", "--output", "p.html"],
               ["starting", "reading runs", "drawing charts"]),
    "check": (["config", "check", "DS"], ["checking DS"]),
    "new": (["config", "new", "--model", "opt-125m", "--device-gb", "8", "--host-gb", "8",
             "--output", "new.json"], ["planning opt-125m"]),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_bars_are_for_terminals(
    name: str, finished, task: Task, noting: Noting, tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    every = charts.charts
    monkeypatch.setattr(charts, "charts", lambda runs: every(runs)[:1])
    monkeypatch.setattr(rates, "COPIED_BYTES", 1 << 20)
    monkeypatch.setattr(rates, "MANY", 1 << 16)
    monkeypatch.setattr(rates, "FILE_BYTES", 1 << 20)
    monkeypatch.setattr(rates, "PART_BYTES", 1 << 20)
    monkeypatch.setattr(rates, "TRIES", 1)
    places = {"RUN": str(finished.directory), "DS": str(task.folder / "ds.json")}
    given, names = COMMANDS[name]
    arguments = [places.get(each, each) for each in given]
    in_a_pipe = invoke(arguments)
    assert in_a_pipe.exit_code == 0, in_a_pipe.output
    assert noting.names == []
    assert not any(in_a_pipe.stdout.startswith(each) for each in ("starting", "planning", "look"))
    (tmp_path / "new.json").unlink(missing_ok=True)
    with (tmp_path / "terminal").open("w") as file:
        monkeypatch.setattr(bars, "console", Console(file=file, force_terminal=True))
        assert invoke(arguments).exit_code == 0
    assert noting.names == [each.replace("DS", places["DS"]) for each in names]


def test_a_run_tells_of_its_data_and_its_curve(task: Task, noting: Noting, tmp_path: Path):
    done = invoke(task.arguments(tmp_path / "run", steps=1))
    assert done.exit_code == 0, done.output
    assert noting.names[:2] == ["starting", "reading the data"]
    assert noting.names[-1] == "drawing the curve"


def test_quiet_phases_are_no_lines_of_a_log(capsys):
    with bars.Bar() as bar, bar.phase("loud"), bar.phase("quiet", quiet=True):
        pass
    assert capsys.readouterr().out == "loud\n"


def all_of(terminal: RawIOBase) -> str:
    """What was drawn, until the other end is closed."""
    drawn = b""
    with suppress(OSError):
        while part := terminal.read(1 << 12):
            drawn += part
    return drawn.decode()


@pytest.mark.parametrize("width", [40, 80])
def test_watch_leaves_the_terminal_as_it_was(
    finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
):
    """On a screen of its own until Ctrl-C; then what was seen last stays on the other."""
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) > 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", sleep)
    monkeypatch.setattr(watch, "read_state", lambda directory: "under way")
    run = watch.read_run(finished.directory)
    run.state = "under way"
    monkeypatch.setattr(watch, "read_run", lambda directory: run)
    ours, terminal = pty.openpty()
    with ThreadPoolExecutor(1) as pool, os.fdopen(ours, "rb", 0) as read:
        drawing = pool.submit(all_of, read)
        with os.fdopen(terminal, "w") as file:
            console = Console(file=file, width=width, height=24, highlight=False, markup=False)
            assert console.is_terminal
            watch.watch(finished.directory, console, once=False, interval=0.0)
        drawn = drawing.result()
    assert len(looks) == 3
    seen, left = drawn.split("\x1b[?1049l")
    assert "\x1b[?1049h" in seen
    assert drawn.rindex("\x1b[?25h") > drawn.rindex("\x1b[?25l")  # the cursor is back
    assert "under way" in left
    assert "\x1b[?1049h" not in left


@pytest.mark.parametrize("width", [40, 80])
def test_the_curve_of_losses_fits(finished, width: int):
    file = (console := Console(width=width, record=True, file=open(os.devnull, "w"))).file  # noqa: SIM115
    with file:
        run = watch.read_run(finished.directory)
        run.steps = list(run.steps) * 20
        console.print(watch.snapshot(run, console.width))
    (line,) = [each for each in console.export_text().splitlines() if each.startswith("loss")]
    assert sum(char in watch.BARS for char in line) == (16 if width == 40 else 40)
