"""What a run of `accuracy.py` leaves for a process that goes on from it: its seconds and its curve.

A method keeps its steps itself, and each in its own way: all of them, or those up to some step. So
seconds are written after every step, a line each, and a later process reads those of the step that
it begins at. Steps that it takes again count once.
"""

import json
import shutil
from pathlib import Path

Point = list[float]


class Kept:
    """A directory for one run.

    Args:
        folder: Is made; may hold what an earlier process left.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._curve, self._seconds = folder / "curve.json", folder / "seconds"
        folder.mkdir(parents=True, exist_ok=True)

    def seconds(self, step: int) -> float:
        """Of the steps up to this one."""
        lines = self._seconds.read_text().split("\n")[:-1] if self._seconds.exists() else []
        taken = dict(map(_taken, lines))
        before = [each for each in taken if each <= step]
        return taken[max(before)] if before else self._read()[0]

    def took(self, step: int, seconds: float) -> None:
        """Write down the seconds of all steps up to this one."""
        with self._seconds.open("a") as file:
            file.write(f"{step} {seconds:.6f}\n")

    def curve(self) -> list[Point]:
        """Its points, those after the kept step among them."""
        return self._read()[1]

    def keep(self, seconds: float, curve: list[Point]) -> None:
        """Write the curve, whole or not at all."""
        aside = self.folder / "curve.new"
        aside.write_text(json.dumps([seconds, curve]))
        aside.replace(self._curve)

    def forget(self) -> None:
        """Remove it all: the run has ended."""
        shutil.rmtree(self.folder)

    def _read(self) -> tuple[float, list[Point]]:
        """Seconds of the last point, and all points."""
        return json.loads(self._curve.read_text()) if self._curve.exists() else (0.0, [])


def _taken(line: str) -> tuple[int, float]:
    step, seconds = line.split()
    return int(step), float(seconds)
