"""The figures of a GPU benchmark: a line of JSON each, in a file, from the moment they are known.

So a run that is cut off has lost nothing, and each of its processes finds what others have found.

Kinds of lines: ``machine``, ``rates``, ``row`` (a contestant with a batch), ``whole`` (one whole
step), ``left out`` and ``failed`` (a name and why).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Results:
    """Of one run.

    Args:
        path: The file, which is added to.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, kind: str, **values: Any) -> None:
        """Write a line; say it, too, where it is short."""
        with self._path.open("a") as file:
            file.write(json.dumps({"kind": kind, **values}) + "\n")
        if "why" in values:
            print(f"{kind}: {values['name']}: {values['why']}", flush=True)

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The lines of a kind, in order."""
        if not self._path.exists():
            return []
        lines = [json.loads(line) for line in self._path.read_text().splitlines() if line]
        return [
            {k: v for k, v in line.items() if k != "kind"} for line in lines if line["kind"] == kind
        ]

    def last(self, kind: str) -> dict[str, Any]:
        """The last one; empty where there is none."""
        return next(iter(reversed(self.of(kind))), {})

    def seconds(self, like: Mapping[str, Any], contestant: str) -> float | None:
        """A step of another contestant, with the shape and batch of a row."""
        found = [row["seconds"] for row in self.of("row") if same(row, like, contestant)]
        return found[-1] if found else None


def same(row: Mapping[str, Any], like: Mapping[str, Any], contestant: str) -> bool:
    """Whether a row is of that contestant, with the shape and batch of the other."""
    keys = ("shape", "batch")
    return row["contestant"] == contestant and all(row[key] == like[key] for key in keys)
