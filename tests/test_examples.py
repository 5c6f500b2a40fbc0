"""The scripts in docs/examples run as they stand."""

import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM

from zo_offload.embedded.pretrain import make_embedded

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"


def test_plain_loop(tmp_path: Path):
    make_embedded(tmp_path / "embedded", steps=0, layers=2)
    model, out = tmp_path / "embedded" / "model", tmp_path / "out"
    script = [sys.executable, str(EXAMPLES / "plain_loop.py"), str(model), str(out)]
    run = subprocess.run(script, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    steps = [line for line in run.stdout.splitlines() if line.startswith("step ")]
    assert len(steps) == 20
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert before.keys() == after.keys()
    assert any(not before[name].equal(after[name]) for name in before)
