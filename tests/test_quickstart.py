"""The quick start's own few functions: what it makes of the files that a user names."""

import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from click import ClickException
from click.testing import CliRunner

from zo_offload.cli import main
from zo_offload.errors import TaskError
from zo_offload.tasks import read_examples, split_file

PROGRAM = Path(__file__).resolve().parents[1] / "launcher" / "quickstart.py"


@pytest.fixture
def quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "quickstart", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RUNS", tmp_path / "runs")
    return module


ODD = ["plain", "a line\u2028separator", "a form\x0cfeed", "a next\x85line", "tail", "more"]


def test_every_fifth_example_is_held_out_and_none_is_damaged(quickstart, tmp_path):
    rows = [json.dumps({"sentence": text, "label": i % 2}) for i, text in enumerate(ODD * 2)]
    for name, lines in (
        ("data.jsonl", rows),
        ("data.tsv", ["sentence\tlabel", *(f"{text}\t{i % 2}" for i, text in enumerate(ODD * 2))]),
    ):
        path = tmp_path / name
        path.write_bytes("\n".join(lines).encode())
        train, dev = map(read_examples, quickstart.split(path))
        assert [example.fields["sentence"] for example in dev] == (ODD * 2)[::5]
        assert len(train) + len(dev) == len(ODD * 2)


def test_a_tsv_whose_header_begins_with_a_brace_keeps_it(tmp_path):
    path = tmp_path / "data.tsv"
    path.write_text("{text}\tlabel\na\t0\nb\t1\n")
    assert split_file(path) == (["{text}\tlabel", "b\t1"], ["{text}\tlabel", "a\t0"])


def test_one_example_cannot_be_divided(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"sentence": "a", "label": 0}\n')
    with pytest.raises(TaskError, match="only one example; expected at least 2"):
        split_file(path)


@pytest.mark.parametrize(
    ("by_make", "given", "meant"),
    [
        (True, "review, story", " review, story"),  # make has dropped the first blank
        (True, "review,story", "review,story"),
        (True, '["a", " b"]', '["a", " b"]'),
        (False, "review, story", "review, story"),  # refused later, by name
        (True, None, None),
    ],
)
def test_a_blank_that_make_drops_is_put_back(
    quickstart, monkeypatch: pytest.MonkeyPatch, by_make: bool, given: str, meant: str
):
    monkeypatch.delenv("MAKELEVEL", raising=False)
    if by_make:
        monkeypatch.setenv("MAKELEVEL", "1")
    assert quickstart._whole(given) == meant


def test_every_other_command_has_a_folder_of_its_own(quickstart):
    given = {"steps": 150, "dev_limit": None, "template": "{sentence}"}
    assert quickstart.run_name(None, None, given) == "quickstart"
    names = {
        quickstart.run_name("dir/model", "data.tsv", given | more)
        for more in ({}, {"steps": 10}, {"template": "x{sentence}"}, {"dev_limit": 5})
    }
    assert len(names) == 4
    assert all(name.startswith("model-data-") for name in names)


def test_a_task_by_name_is_left_to_the_command(quickstart, tmp_path):
    for job in (
        quickstart.chosen_job("model", "SST-2", None, None),
        quickstart.chosen_job("model", "SST-2", None, "glue/"),
        quickstart.chosen_job("model", str(tmp_path / "own.toml"), None, None),
    ):
        assert (job.train, job.dev, job.template, job.labels) == (None,) * 4
        assert job.task
        assert job.task in quickstart.shown(job)


def test_model_and_task_go_together(quickstart):
    done = CliRunner().invoke(quickstart.main, ["--model", "somewhere"])
    assert done.exit_code == 1
    assert "go together: the model made here knows" in done.stderr


def test_the_job_is_launched_and_its_end_is_ours(quickstart, tmp_path, monkeypatch, capfd):
    launcher = tmp_path / "python"
    launcher.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\nexit 3\n")
    launcher.chmod(0o755)
    monkeypatch.setattr(quickstart.sys, "executable", str(launcher))
    with pytest.raises(SystemExit, match="3"):
        quickstart.launch(["train.py", "--labels= a, b"])
    assert capfd.readouterr().out.splitlines() == [
        str(PROGRAM.with_name("deepspeed_quietly.py")), "--num_accelerators=1", "train.py",
        "--labels= a, b",
    ]  # fmt: skip
    launcher.write_text("#!/bin/sh\nkill -9 $$\n")
    with pytest.raises(ClickException, match="launcher was ended by SIGKILL; the same command"):
        quickstart.launch([])
    launcher.write_text("#!/bin/sh\nexit 247\n")
    with pytest.raises(ClickException, match="run was ended by SIGKILL; the same command"):
        quickstart.launch([])
    launcher.write_text("#!/bin/sh\n")
    quickstart.launch([])


@pytest.mark.parametrize(
    ("job", "given"),
    [
        (
            {
                "train": Path("a.tsv"),
                "dev": Path("b c.tsv"),
                "template": "{x} It",
                "labels": " a, b",
            },
            ["--dev=b c.tsv", "--template={x} It", "--labels= a, b"],
        ),
        ({"task": "SST-2"}, ["--task=SST-2"]),
        ({"task": "own.toml", "data": "folder"}, ["--task=own.toml", "--data=folder"]),
    ],
)
def test_what_is_next_can_be_typed(quickstart, tmp_path, monkeypatch, job, given):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart.sys, "executable", str(tmp_path / "venv" / "python"))
    said = quickstart.next_steps(quickstart.Job("m", **job), tmp_path / "runs" / "q")
    _, page, again, _ = (shlex.split(line, comments=True) for line in said.splitlines())
    assert page == ["venv/zo-offload", "report", "runs/q"]
    assert again == ["venv/zo-offload", "eval", "--model=runs/q/model", *given]
    options = {name for option in main.commands["eval"].params for name in option.opts}
    assert {part.partition("=")[0] for part in again[2:]} <= options


def test_the_launcher_says_nothing_of_its_own(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("print('a rank')\nraise SystemExit(5)\n")
    command = [sys.executable, str(PROGRAM.with_name("deepspeed_quietly.py")), str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (5, "a rank\n", "")
