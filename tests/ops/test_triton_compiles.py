"""The Triton kernels compile for CUDA, in every format, without a device: the interpreter that the
other tests use takes code that the compiler refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROWS = (
    "fp32,identity,0",
    "fp16,identity,0",
    "planes,identity,1",
    "bf16_sr,identity,0",
    "planes,nf4,0",
    "bf16_sr,lossless12,0",
    "bf16_sr,lossless12,-1",  # decoded, and no more
    "fp32,lossless12,-1",
)


@pytest.fixture(scope="module", autouse=True)
def implementation() -> None:
    """The test is about these kernels."""


def test_every_format_compiles_and_fuses_nothing(tmp_path: Path):
    script = Path(__file__).with_name("compile_triton.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment.update(TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=str(script.parent.parent.parent))
    command = [sys.executable, str(script), *ROWS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == [f"{row} False False" for row in ROWS]
