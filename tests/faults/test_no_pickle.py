"""Nothing is unpickled, evaluated or trusted: neither in the source nor while a run goes on."""

import ast
import os
import pickle  # noqa: TID251 to see that nobody reads one
import re
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from cli.common import Task, invoke, make_task
from torch import distributed

import zo_offload

ROOT = Path(zo_offload.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py")) + sorted((ROOT.parent / "launcher").glob("*.py"))
MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "yaml",
}
CALLS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {
    ("torch", "load"), ("torch", "save"), ("np", "load"), ("numpy", "load"), ("yaml", "load"),
    ("pd", "read_pickle"),
}  # fmt: skip
OBJECTS = re.compile(
    r"(all_)?gather_object|(broadcast|scatter)_object_list|(send|recv)_object_list"
)


def faults_in(source: str) -> list[str]:
    """What a file holds that reads or runs what others wrote."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found += [node.func.id] if node.func.id in CALLS else []
        elif isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if (owner, node.attr) in ATTRIBUTES or OBJECTS.fullmatch(node.attr):
                found.append(f"{owner}.{node.attr}")
        elif isinstance(node, ast.keyword):
            is_true = not (isinstance(node.value, ast.Constant) and node.value.value is False)
            if node.arg in ("trust_remote_code", "allow_pickle") and is_true:
                found.append(f"{node.arg}=")
            if node.arg == "weights_only":
                found.append("weights_only=")
    return found


def test_no_source_has_any():
    assert len(SOURCES) > 100
    found = {path.name: faults_in(path.read_text()) for path in SOURCES}
    assert {name: faults for name, faults in found.items() if faults} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from joblib import load", "torch.load(path)", "yaml.load(x)", "eval(x)",
        "np.load(x, allow_pickle=True)", "f(trust_remote_code=given)", "exec(text)",
        "dist.broadcast_object_list(x)", "comm.all_gather_object(x)",
    ],
)  # fmt: skip
def test_one_would_be_found(line: str):
    assert faults_in(line)


class Unpickled(AssertionError):
    """Somebody reads a pickle."""


def trap(*_: Any, **__: Any) -> NoReturn:
    raise Unpickled


@pytest.fixture
def trapped(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, names in {
        pickle: ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"),
        torch: ("load", "save"),
        np: ("load",),
        distributed: (
            "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list",
        ),
    }.items():  # fmt: skip
        for name in names:
            monkeypatch.setattr(owner, name, trap)


def kinds_of_files(folder: Path) -> set[str]:
    return {path.suffix for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("trapped")
def test_a_run_that_is_continued_evaluated_and_saved_has_none(tmp_path: Path):
    task: Task = make_task(tmp_path / "task")
    command = task.arguments(tmp_path / "run", steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zo_offload.run.export_model", trap)
        assert isinstance(invoke(command).exception, Unpickled)
    done = invoke(command)
    assert done.exit_code == 0, done.output
    assert "continuing after 2 steps" in done.stdout
    given = task.arguments("", "eval", model=tmp_path / "run" / "model")
    assert invoke(given).exit_code == 0
    known = {"", ".json", ".csv", ".jsonl", ".png", ".journal", ".safetensors", ".jinja"}
    assert kinds_of_files(tmp_path / "run") <= known


def test_a_pickled_checkpoint_is_refused(tmp_path: Path):
    """A model in PyTorch's old format, which is code."""
    task = make_task(tmp_path / "task")
    weights = task.folder / "model" / "model.safetensors"
    weights.unlink()
    (task.folder / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "out")))
    done = invoke(task.arguments(tmp_path / "run", steps=1))
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: ")
    assert not (tmp_path / "out").exists()


class Bomb:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._path),)
