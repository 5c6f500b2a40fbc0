"""The documentation as a site: every page is in it, every link leads somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make site` does, where any warning fails."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    variables = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    return folder


def test_every_page_is_there(site: Path):
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    built = {path.stem for path in site.glob("*.html")}
    assert pages | {"index", "contributing", "changelog"} <= built


def test_files_that_pages_name_are_shown(site: Path):
    shown = (site / "files" / "docs" / "examples" / "plain_loop.py.html").read_text()
    assert "Stepper" in shown


def test_the_surface_is_documented(site: Path):
    found = (site / "api.html").read_text()
    for name in ("initialize", "ZOEngine", "Stepper", "Objective", "install"):
        assert re.search(rf'id="zo_offload\.[a-z_.]+\.{name}"', found), name


def test_nothing_is_fetched_from_elsewhere(site: Path):
    for path in site.rglob("*.html"):
        text = path.read_text()
        fetched = re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(https?:[^"]+)"', text)
        assert not fetched, path
