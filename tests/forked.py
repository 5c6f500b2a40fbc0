"""A program in a process forked from a server that has imported all it needs.

A new interpreter takes four seconds of a processor to import torch, transformers and DeepSpeed; a
fork takes none. All else is as it was started: environment, streams, uncaught exceptions, exit.
"""

import atexit
import importlib
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Mapping
from multiprocessing.connection import wait as ready
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import pytest
import torch

TESTS = str(Path(__file__).resolve().parent)
# What the server imports; nothing in them may start a thread, which no fork survives.
PRELOADED = (
    "cli.common", "distributed.worker", "faults.fuzz", "faults.programs", "faults.soak",
    "matplotlib.figure",
)  # fmt: skip
# A fork takes its environment from this process. An exit status can be read once, and starting a
# process asks for those of all the others: of two threads that ask together, one would be told 255.
ASKING = Lock()


class Forked:
    """A function of a module, called as a program is.

    Args:
        function: As ``module:name``.
        given: Its arguments, as they are.
        out: The file for its standard output.
        errors: The file for its standard error; the same one if left out.
        variables: Its whole environment; this process's if left out.
        cwd: The directory it starts in; this process's if left out.
    """

    def __init__(
        self,
        function: str,
        *given: Any,
        out: Path,
        errors: Path | None = None,
        variables: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self._out = out
        state = _State(
            str(out.absolute()),
            str((errors or out).absolute()),
            dict(os.environ if variables is None else variables),
            str(cwd or Path.cwd()),
        )
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        self._process = context.Process(target=_run, args=(function, given, state))
        with ASKING, pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", TESTS, prepend=os.pathsep)  # the server finds us there
            patch.setenv("OPENBLAS_NUM_THREADS", "1")  # NumPy would start its threads
            self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def stdout(self) -> str:
        return self._out.read_text()

    def wait(self, seconds: float | None = None) -> int | None:
        """Exit status (minus the signal), or None when it is still running after ``seconds``."""
        if not ready([self._process.sentinel], seconds):
            return None
        with ASKING:
            self._process.join()
            return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()
        self.wait()


def script(path: str, *arguments: str) -> None:
    """A file, as the interpreter runs it; for ``Forked``."""
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")


class _State(NamedTuple):
    """What a program is started with."""

    out: str
    errors: str
    variables: dict[str, str]
    cwd: str


def _run(function: str, given: tuple[Any, ...], state: _State) -> None:
    alone = len(os.listdir(f"/proc/{os.getppid()}/task")) == 1
    assert alone, "what the server has imported has started a thread"
    os.chdir(state.cwd)
    os.environ.clear()
    os.environ.update(state.variables)
    if threads := state.variables.get("OMP_NUM_THREADS"):  # OpenMP has read the server's
        torch.set_num_threads(int(threads))
    os.dup2(os.open(state.out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), 1)
    if state.errors == state.out:
        os.dup2(1, 2)
    else:
        os.dup2(os.open(state.errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    module, _, name = function.partition(":")
    try:
        getattr(importlib.import_module(module), name)(*given)
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()
