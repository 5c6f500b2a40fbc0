"""What the disturbed processes run, and how a disturbance gets into them."""

import hashlib
import itertools
import json
import random
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from distributed.worker import digest
from engine.common import batch, config, net

import zo_offload
from faults.calls import CHANGES, Calls
from faults.mishaps import FAULTS, KILLS, Reordered, die
from faults.power import Disk
from zo_offload import cli
from zo_offload.errors import ZOError
from zo_offload.loss_noise import LossNoise

PACKAGE = str(Path(zo_offload.__file__).parent)
STEPS = 4
CALLS, PHASES, POWER, ORDER = "calls", "phases", "power", "order"


@dataclass(frozen=True)
class Disturbance:
    """What is to happen in a process.

    Attributes:
        kind: ``calls``: at a call on files; ``phases``: where a function of the package begins;
            ``power``: a power cut at a call; ``order``: transfers pass each other.
        roots: Folders whose files are watched.
        at: The number of the call, or of the function's beginning; 0 only counts.
        mishap: A row of ``KILLS`` or ``FAULTS``.
        seed: Of chance.
        report: A file for how many there were; made when the mishap comes, where there is one.
    """

    kind: str
    roots: tuple[str, ...]
    at: int = 0
    mishap: str = "before"
    seed: int = 0
    report: str = ""


def command(arguments: list[str], disturbance: Disturbance | None = None) -> None:
    """The command line."""
    with disturbed(disturbance):
        cli.main(arguments, prog_name="zo-offload")


def checkpointed(folder: str, disturbance: Disturbance | None = None) -> None:
    """A tag at every step; whatever tags there are when it begins lead on to the same end."""
    with disturbed(disturbance):
        try:
            found = _checkpointed(Path(folder))
        except ZOError as error:
            sys.exit(f"Error: {error}")
        print(json.dumps(found))


def _checkpointed(folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    tags = folder / "tags"
    kept = {"path": str(folder / "run.journal"), "snapshot_interval": 2}
    if (tags / "latest").exists():
        (tag,) = {(tags / "latest").read_text().strip()}
        _digest_from(tags, tag)
    engine = _engine(zeroth_order={"journal": kept})
    while True:
        engine.save_checkpoint(tags)
        if engine.global_steps == STEPS:
            break
        _step(engine)
    found = {path.name: _digest_from(tags, path.name) for path in sorted(tags.glob("*step?"))}
    ended = digest(engine)
    engine.destroy()
    journal = hashlib.sha256((folder / "run.journal").read_bytes()).hexdigest()
    return {"weights": ended, "tags": found, "journal": journal}


def _engine(**more: Any) -> Any:
    engine, *_ = zo_offload.initialize(model=net(), config=config(**more))
    engine.loss_noise = LossNoise(0.0, 1.0)  # its measurement takes seven steps' time
    return engine


def _step(engine: Any) -> None:
    engine.train_batch(iter([batch(engine.global_steps)]))


def _digest_from(tags: Path, tag: str) -> str:
    """Of the weights at the end of a run that goes on from a tag."""
    engine = _engine()
    engine.load_checkpoint(tags, tag)
    while engine.global_steps < STEPS:
        _step(engine)
    found = digest(engine)
    engine.destroy()
    return found


@contextmanager
def disturbed(disturbance: Disturbance | None) -> Iterator[None]:
    """Let it happen, meanwhile."""
    if disturbance is None:
        yield
        return
    with ExitStack() as stack:
        counted = stack.enter_context(_HOW[disturbance.kind](disturbance))
        try:
            yield
        finally:
            if disturbance.report and not disturbance.at:
                Path(disturbance.report).write_text(str(counted()))


@contextmanager
def _at_a_call(disturbance: Disturbance) -> Iterator[Any]:
    happen, names = _mishap(disturbance.mishap)
    chance = random.Random(disturbance.seed)

    def happens(call: Any) -> Any:
        if call.number != disturbance.at:
            return call.as_asked()
        if disturbance.report:
            Path(disturbance.report).touch()
        return happen(call, chance)

    calls = Calls(disturbance.roots, happens, names)
    with calls.watching():
        yield calls.counts.total


def _mishap(name: str) -> tuple[Any, tuple[str, ...]]:
    return (KILLS[name], CHANGES) if name in KILLS else FAULTS[name]


@contextmanager
def _at_a_phase(disturbance: Disturbance) -> Iterator[Any]:
    numbers = itertools.count(1)
    reached = [0]

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            reached[0] = next(numbers)
            if reached[0] == disturbance.at:
                die()

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        yield lambda: reached[0]
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]  # typeshed has no None


@contextmanager
def _at_a_power_cut(disturbance: Disturbance) -> Iterator[Any]:
    disk = Disk(disturbance.roots, disturbance.at, random.Random(disturbance.seed))
    with disk.calls.watching():
        yield disk.calls.counts.total


@contextmanager
def _out_of_order(disturbance: Disturbance) -> Iterator[Any]:
    chance, held = random.Random(disturbance.seed), Reordered()
    calls = Calls(disturbance.roots, lambda call: held(call, chance), ("pwritev", "preadv"))
    with calls.watching():
        yield calls.counts.total


_HOW = {
    CALLS: _at_a_call,
    PHASES: _at_a_phase,
    POWER: _at_a_power_cut,
    ORDER: _out_of_order,
}
