"""Importing the package is quick and drags nothing heavy along."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NUM_TRIES = 5
LIMIT_SECONDS = 0.3

# CPU time, not wall time: a busy machine delays an import, it does not make it heavier.
TIMED_IMPORT = """
import time
import torch
start = time.process_time()
import zo_offload
print(time.process_time() - start)
"""

LOADED = """
import sys
import zipfile
from pathlib import Path

import pytest
import zo_offload
print(*sorted({"deepspeed", "transformers"} & set(sys.modules)))
"""


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_quick():
    tries = []
    while len(tries) < NUM_TRIES and min(tries, default=LIMIT_SECONDS) >= LIMIT_SECONDS:
        tries.append(float(run(TIMED_IMPORT)))
    assert min(tries) < LIMIT_SECONDS, f"after torch zo_offload takes {tries} s of CPU time"


def test_import_loads_neither_deepspeed_nor_transformers():
    assert run(LOADED) == ""


def wheel_of(tmp_path: Path, compiler: dict[str, str]) -> list[str]:
    """Names of the files in a wheel that is built from this checkout's sources."""
    source = tmp_path / "source"
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        source.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "zo_offload", source / "zo_offload", ignore=shutil.ignore_patterns("*.so", "__py*")
    )
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "-w", str(tmp_path), str(source)],
        env={**os.environ, **compiler},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_a_wheel_without_a_compiler_has_everything_but_the_kernels(tmp_path: Path):
    names = wheel_of(tmp_path, {"CC": "/bin/false", "CXX": "/bin/false"})
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "zo_offload").rglob("*.py")}
    assert modules <= set(names), modules - set(names)
    assert "zo_offload/py.typed" in names  # our types are a caller's checker's, too
    assert not [name for name in names if name.endswith(".so")]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_a_wheel_with_a_compiler_has_the_kernels(tmp_path: Path):
    quick = tmp_path / "g++"
    quick.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')  # a third of the time
    quick.chmod(0o755)
    names = wheel_of(tmp_path, {"CXX": str(quick)})
    assert [name for name in names if name.endswith(".so")] == ["zo_offload/ops/_kernels.so"]


def test_a_script_beside_a_clone_finds_the_package(tmp_path: Path):
    """Whose folder has the package's name, and is none."""
    (tmp_path / "zo_offload").mkdir()
    (tmp_path / "script.py").write_text(
        "from importlib.util import find_spec\nprint(find_spec('zo_offload').origin)\n"
    )
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "script.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()).name == "__init__.py"
