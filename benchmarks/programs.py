"""Programs that a benchmark starts, here or on a node, and asks to do things in turn.

A request is a line of JSON over a Unix socket, so it is counted on no TCP socket and its path is
seen from every network. A program that waits for one takes no processor time, so that groups of
programs can live side by side and be measured alternately.
"""

import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

START_SECONDS = 180.0


@dataclass
class Program:
    """One that was started."""

    process: subprocess.Popen
    lines: TextIO

    def tell(self, do: str, **values: Any) -> None:
        """Ask, without waiting for the answer."""
        self.lines.write(json.dumps({"do": do, **values}) + "\n")
        self.lines.flush()

    def hear(self) -> Any:
        """The answer."""
        line = self.lines.readline()
        if not line:
            raise SystemExit(f"{self.process.args} ended ({self.process.wait()})")
        return json.loads(line)

    def ask(self, do: str, **values: Any) -> Any:
        self.tell(do, **values)
        return self.hear()


def ask_all(programs: Sequence[Program], do: str, **values: Any) -> list[Any]:
    """The same of all at once."""
    for program in programs:
        program.tell(do, **values)
    return [program.hear() for program in programs]


def serve(path: str, requests: Mapping[str, Callable[..., Any]]) -> None:
    """Answer requests until nobody can ask any more."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        with connection.makefile("rw") as lines:
            for line in lines:
                request = json.loads(line)
                answer = requests[request.pop("do")](**request)
                lines.write(json.dumps(answer) + "\n")
                lines.flush()


@contextmanager
def started(
    commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]]
) -> Iterator[list[Program]]:
    """Start programs, each with the path of its socket as the last argument; end them after."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="asked-")))
        begun = []
        for number, (command, environment) in enumerate(zip(commands, environments, strict=True)):
            path = str(folder / str(number))
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(path)
            listener.listen()
            process = subprocess.Popen(
                [*command, path], env=dict(environment), stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )  # fmt: skip
            stack.callback(_end, process)
            begun.append((process, listener))
        yield [Program(p, stack.enter_context(_lines(p, listener))) for p, listener in begun]


def python(script: str, *arguments: str) -> list[str]:
    """The command of a script that lies beside this one."""
    return [sys.executable, str(Path(__file__).with_name(script)), *arguments]


def _lines(process: subprocess.Popen, listener: socket.socket) -> TextIO:
    deadline = time.monotonic() + START_SECONDS
    listener.settimeout(1.0)
    while process.poll() is None and time.monotonic() < deadline:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        connection.settimeout(None)
        with connection:
            return connection.makefile("rw")
    raise SystemExit(f"{process.args} did not begin (it ended with {process.poll()})")


def _end(process: subprocess.Popen) -> None:
    """It leaves by itself once its socket is closed; one that does not is killed."""
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
