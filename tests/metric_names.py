"""The names of metrics that docs/report.md has, by the heading of their table."""

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "report.md"
SECTION = "## Every name that is logged"
MANY = re.compile(r"^(begin\.units|begin\.purposes|steps\.busy)\..*")
AS_TOLD = {"begin.units": "TIER", "begin.purposes": "PART", "steps.busy": "PART"}


def documented(heading: str) -> set[str]:
    """Under a heading such as "`metrics.csv`"."""
    section = PAGE.read_text().split(SECTION)[1]
    text = section.split(f"\n### {heading}\n")[1].split("\n### ")[0]
    cells = re.findall(r"^\| (`[^|]+`) \|", text, re.MULTILINE)
    return {name for cell in cells for name in re.findall("`([^`]+)`", cell)}


def flat(row: dict, prefix: str = "") -> set[str]:
    """Dotted names of an object's values; what depends on the run under the name of its kind."""
    found: set[str] = set()
    for key, value in row.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, dict) else {name}
    return {MANY.sub(lambda m: f"{m[1]}.{AS_TOLD[m[1]]}", name) for name in found}
