"""The installed command in processes of its own: in a pipe, on a terminal, under the launcher."""

import os
import pty
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.common import REPOSITORY, accuracies, results
from zo_offload import bars

BIN = Path(sys.executable).parent
BEGINNING = [
    "starting", "reading the config", "reading the tokenizer of ", "encoding 37 examples",
    "loading ", "opening ", "step 0: dev accuracy ",
]  # fmt: skip


def test_train_in_a_pipe(task, finished, tmp_path):
    command = [str(BIN / "zo-offload"), *task.arguments(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert results(tmp_path / "run", done.stdout) == finished.results
    lines = done.stdout.splitlines()
    for line, beginning in zip(lines, BEGINNING, strict=False):
        assert line.startswith(beginning)
    at = lines.index(f"exporting to {tmp_path / 'run' / 'model'}")
    assert lines[at + 1].startswith("accuracy before: ")
    assert lines[at + 2].startswith("accuracy after: ")
    assert all(line.startswith("  ") for line in lines[at + 3 :])
    assert "\x1b" not in done.stdout


@pytest.fixture
def heeds_interrupts() -> Iterator[None]:
    """As in a terminal; a job in a shell's background is started with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_interrupts")
def test_an_interrupt_from_the_keyboard(task, tmp_path):
    command = [str(BIN / "zo-offload"), *task.arguments(tmp_path / "run", steps=100_000)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 4:"):
                process.send_signal(signal.SIGINT)
                break
        rest, stderr = process.communicate()
    said = r"stopped after \d+ of 100000 steps; the same command continues the run$"
    assert re.search(said, rest.strip())
    assert stderr == ""
    assert process.returncode == 0


def on_a_terminal(command: list[str]) -> tuple[int, str]:
    """Exit status, and what was drawn, without colours and movements."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm-256color", COLUMNS="120", LINES="40")
        os.execv(command[0], command)
    drawn = b""
    while True:
        try:
            drawn += os.read(terminal, 65536)
        except OSError:  # the other end has gone
            break
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.decode(errors="replace"))
    return os.waitstatus_to_exitcode(status), text.replace("\r", "\n")


def test_train_on_a_terminal(task, finished, tmp_path):
    command = [str(BIN / "zo-offload"), *task.arguments(tmp_path / "run")]
    status, drawn = on_a_terminal(command)
    assert status == 0, drawn
    assert results(tmp_path / "run", drawn) == finished.results
    for words in ("starting", "loading", "training", "evaluating"):  # the slow ones
        assert re.search(rf"[⠀-⣿ ] {words}", drawn), words
    assert re.search(r"training +[━╸╺ ]+ 6/6  loss \d\.\d{4}", drawn)
    assert "ETA" in drawn
    assert "WARNING" not in drawn


@pytest.mark.slow
@pytest.mark.thorough
def test_the_deepspeed_launcher_gives_the_same_bits(task, finished, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [str(BIN / "deepspeed"), "--num_accelerators", "1", "--master_port", str(port)]
    script = str(REPOSITORY / "launcher" / "train.py")
    arguments = task.arguments(tmp_path / "run")[1:]
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(
        [*launcher, script, *arguments], capture_output=True, text=True, check=False,
        env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "run", done.stdout) == finished.results
    assert accuracies(done.stdout) == finished.results.accuracies
    assert re.search(r"sent between ranks +0 bytes a step", done.stdout)  # there is one


def test_the_launchers_script_fails_in_one_line(task, tmp_path):
    script = str(REPOSITORY / "launcher" / "train.py")
    arguments = task.arguments(tmp_path / "run", train="/nowhere.tsv")[1:]
    done = subprocess.run(
        [sys.executable, script, "--local_rank=0", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "Error: /nowhere.tsv: no such file; check the path\n"


def test_help_comes_at_once():
    """Nothing that takes seconds is imported for it."""
    program = """
import sys
from zo_offload.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
print(*sorted({"torch", "deepspeed", "transformers", "numpy"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == ""


def test_long_work_off_a_terminal_says_so_now_and_then(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
    with bars.Bar() as bar:
        for _ in bar.counted("evaluating", range(50), 50):
            now[0] += 1.0
        bar.on_start(0, 100)
        for step in range(100):
            now[0] += 1.0
            bar.on_step(step, 1.0)
    assert capsys.readouterr().out.splitlines() == [
        "evaluating: 3/50",
        "evaluating: 34/50",
        "step 15/100  loss 1.0000  1.00 steps/s  ETA 1:25",
        "step 46/100  loss 1.0000  1.00 steps/s  ETA 0:54",
        "step 77/100  loss 1.0000  1.00 steps/s  ETA 0:23",
    ]
