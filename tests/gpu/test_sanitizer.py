"""A small run under compute-sanitizer: no access outside, and no race for shared memory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
PROGRAM = Path(__file__).with_name("program.py")
FOUND = 9  # the exit status that the tool is told to give


def tool() -> str | None:
    beside = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=beside)


def run(command: list[str], where: str, **given: str) -> subprocess.CompletedProcess[str]:
    """The program, on a device, behind a command, with variables in its environment."""
    whole = [*command, sys.executable, str(PROGRAM), where]
    environment = {**os.environ, **given}
    return subprocess.run(whole, env=environment, capture_output=True, text=True, check=False)


def test_the_program_itself(device: torch.device):
    done = run([], device.type)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("the same bits\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [["memcheck", "--report-api-errors", "no"], ["racecheck"]], ids=lambda each: each[0]
)
def test_nothing_is_found(cuda: torch.device, options: list[str]):
    """Every tensor is an allocation of its own, so that what is beyond it is nobody's."""
    program = tool()
    if program is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [program, "--error-exitcode", str(FOUND), "--tool", *options]
    done = run(command, cuda.type, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "the same bits" in done.stdout
