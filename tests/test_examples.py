"""The scripts in docs/examples run as they stand."""

import difflib
import shutil
from pathlib import Path

from forked import Forked
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from zo_offload.embedded.pretrain import make_embedded

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"
DEEPSPEED = EXAMPLES / "deepspeed"


def run(script: Path, *arguments: Path | str, cwd: Path) -> list[str]:
    """What it prints."""
    log = cwd / "log"
    done = Forked("forked:script", str(script), *map(str, arguments), out=log, cwd=cwd)
    assert done.wait() == 0, done.stdout
    return done.stdout.splitlines()


def test_plain_loop(tmp_path: Path):
    make_embedded(tmp_path / "embedded", steps=0, layers=2)
    model, out = tmp_path / "embedded" / "model", tmp_path / "out"
    said = run(EXAMPLES / "plain_loop.py", model, out, cwd=tmp_path)
    steps = [line for line in said if line.startswith("step ")]
    assert len(steps) == 20
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert before.keys() == after.keys()
    assert any(not before[name].equal(after[name]) for name in before)


def test_vision(tmp_path: Path):
    """The model is a random one, and it learns."""
    lines = run(EXAMPLES / "vision.py", tmp_path / "out", cwd=tmp_path)
    found = [line.split()[-1] for line in lines if "accuracy" in line]
    assert len(found) == 7
    assert float(found[0]) <= 0.6
    assert float(found[-1]) >= 0.9
    made = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert type(made).__name__ == "ViTForImageClassification"


def changed_lines(suffix: str) -> list[str]:
    before, after = ((DEEPSPEED / f"{n}.{suffix}").read_text() for n in ("before", "after"))
    names = f"before.{suffix}", f"after.{suffix}"
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), *names, lineterm="", n=0)
    return list(lines)


def test_a_zero_offload_script_becomes_ours_with_few_changed_lines():
    shown = changed_lines("py") + changed_lines("json")
    page = (EXAMPLES.parent / "deepspeed.md").read_text()
    assert "```diff\n" + "\n".join(shown) + "\n```" in page
    marks = [line[0] for line in shown if not line.startswith(("+++", "---", "@@"))]
    assert max(marks.count("+"), marks.count("-")) <= 12


def test_the_changed_script_runs(tmp_path: Path):
    make_embedded(tmp_path / "embedded", steps=0, layers=2)
    shutil.copy(DEEPSPEED / "after.json", tmp_path / "ds.json")
    said = run(DEEPSPEED / "after.py", tmp_path / "embedded" / "model", "out", cwd=tmp_path)
    assert [line[:8] for line in said if "loss" in line] == [
        "epoch 0:",
        "epoch 1:",
    ]
    assert (tmp_path / "out" / "latest").read_text() == "global_step8"
