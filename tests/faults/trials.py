"""A trial: a job that is disturbed, and given again until it ends; was anything lost?"""

import itertools
import json
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from cli.common import Task
from distributed.launch import environment, free_port
from forked import Forked

from faults.jobs import Job
from faults.mishaps import FAULTS, KILLS
from faults.programs import CALLS, ORDER, PHASES, POWER, Disturbance

SECONDS = 240  # a process that has not ended then hangs
KILLED = -9


@dataclass
class Trial:
    """What came of a disturbance.

    Attributes:
        name: What was done.
        place: The folder it was done in.
        faults: In words, whatever should not have been; empty where nothing was lost.
        happened: How many disturbances came about.
    """

    name: str
    place: Path
    faults: list[str] = field(default_factory=list)
    happened: int = 0


@dataclass(frozen=True)
class Ended:
    """A process that is over."""

    code: int | None
    stdout: str
    stderr: str


@dataclass
class Bench:
    """Runs one job in folders of its own, and knows how it ends undisturbed."""

    name: str
    job: Job
    task: Task
    folder: Path

    def __post_init__(self) -> None:
        self._counts: dict[tuple[str, str], int] = {}
        self._asking = threading.RLock()  # whatever is counted is counted once

    @cached_property
    def expected(self) -> Any:
        """The results of a run that is left alone."""
        place = self.fresh("alone")
        ended = self.run(place)
        assert all(each.code == 0 for each in ended), ended
        return self.job.results(place, ended[0].stdout)

    def fresh(self, name: str) -> Path:
        place = self.folder / name
        place.mkdir(parents=True)
        return place

    def run(
        self, place: Path, disturbance: Disturbance | None = None, rank: int = 0
    ) -> list[Ended]:
        """The job's processes to their ends, one of them disturbed."""
        given = self.job.arguments(self.task, place)
        port = str(free_port())
        processes = []
        for each in range(self.job.ranks):
            ranks = {
                "RANK": str(each), "LOCAL_RANK": str(each), "WORLD_SIZE": str(self.job.ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
            log = place.with_name(f"{place.name}.{each}")
            processes.append(
                Forked(
                    self.job.program, *given, disturbance if each == rank else None,
                    out=log.with_suffix(f".{each}.out"), errors=log.with_suffix(f".{each}.err"),
                    variables=environment(**(ranks if self.job.ranks > 1 else {})),
                )
            )  # fmt: skip
        ended = []
        for each, process in enumerate(processes):
            code = process.wait(SECONDS)
            if code is None:
                process.kill()
            log = place.with_name(f"{place.name}.{each}")
            texts = (log.with_suffix(f".{each}{end}") for end in (".out", ".err"))
            ended.append(Ended(code, *(path.read_text(errors="replace") for path in texts)))
        return ended

    def count(self, kind: str, mishap: str = "before") -> int:
        """How many points of a kind an undisturbed run of the first rank has."""
        key = (kind, "" if mishap in KILLS else mishap)
        with self._asking:
            if key in self._counts:
                return self._counts[key]
            place = self.fresh(f"counted {kind} {mishap}")
            report = place.with_name(place.name + ".count")
            asked = Disturbance(kind, (str(place),), 0, mishap, report=str(report))
            ended = self.run(place, asked)
            assert all(each.code == 0 for each in ended), ended
            self._counts[key] = int(report.read_text())
            return self._counts[key]

    def killed(self, seed: int) -> Trial:
        """One to three kills, each in the process that goes on after the one before."""
        chance = random.Random(f"{self.name} {seed}")
        place = self.fresh(f"kill {seed}")
        trial = Trial(f"{self.name}, kill {seed}", place)
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            kind = chance.choice((CALLS, CALLS, PHASES))
            mishap = chance.choice(("before", "within", "after")) if kind == CALLS else "before"
            at = chance.randint(1, self.count(kind))
            rank = chance.randrange(self.job.ranks) if kind == PHASES else 0  # which writes
            asked = Disturbance(kind, (str(place),), at, mishap, chance.randrange(1 << 30))
            trial.name += f"; {kind} {mishap} {at}"
            ended = self.run(place, asked, rank)
            trial.happened += ended[rank].code == KILLED
            for number, each in enumerate(ended):
                if number != rank:
                    self._look_at(each, trial)
                elif each.code not in (0, KILLED):
                    trial.faults.append(f"ended with {each.code}, not killed: {each.stderr}")
        self._finish(place, trial)
        return trial

    def faulted(self, kind: str, mishap: str, seed: int) -> Trial:
        """A fault of the disk; a run that ends says why in one line, or died of it."""
        chance = random.Random(f"{self.name} {kind} {mishap} {seed}")
        place = self.fresh(f"{kind} {mishap} {seed}")
        trial = Trial(f"{self.name}, {kind} {mishap} {seed}", place)
        most = self.count(kind, mishap)
        if most:
            at = chance.randint(1, most) if kind != ORDER else 0  # all of them
            report, seed = place.with_name(place.name + ".report"), chance.randrange(1 << 30)
            asked = Disturbance(kind, (str(place),), at, mishap, seed, str(report))
            trial.name += f" at {at}"
            for each in self.run(place, asked):
                self._look_at(each, trial)
                trial.happened = int(report.exists() or each.code == KILLED)
            self._finish(place, trial)
        return trial

    def _finish(self, place: Path, trial: Trial) -> None:
        ended = self.run(place)
        for each in ended:
            was_done = self.job.done and self.job.done in each.stderr
            if each.code != 0 and not was_done:
                trial.faults.append(f"the same command ended with {each.code}: {each.stderr}")
        if not trial.faults:
            with self._asking:
                expected = self.expected
            found = self.job.results(place, ended[0].stdout)
            if found != expected:
                trial.faults.append(f"other results: {_differing(found, expected)}")

    def _look_at(self, ended: Ended, trial: Trial) -> None:
        """An end by itself is a good one, or one line."""
        lines = ended.stderr.splitlines()
        told = [line for line in lines if line.startswith("Error: ")]
        others = [line for line in lines if not line.startswith(("Error: ", "Warning: "))]
        if ended.code is None:
            trial.faults.append("it hung")
        elif "Traceback" in ended.stderr:
            trial.faults.append(f"a traceback: {ended.stderr}")
        elif ended.code == 1 and (others or len(told) > 1):
            trial.faults.append(f"more than one line: {ended.stderr}")
        elif ended.code not in (0, 1, KILLED):
            trial.faults.append(f"ended with {ended.code}: {ended.stderr}")


def kill_trials(benches: Sequence[Bench], seed: int) -> Iterator[Callable[[], Trial]]:
    """Without end, each job in turn."""
    for number in itertools.count(seed):
        yield from (partial(bench.killed, number) for bench in benches)


def fault_trials(benches: Sequence[Bench], seed: int) -> Iterator[Callable[[], Trial]]:
    """Without end, each kind with each job in turn; a power cut every third time."""
    rows = [*((CALLS, name) for name in FAULTS), (ORDER, "before")]
    alone = [bench for bench in benches if bench.job.ranks == 1]
    for number in itertools.count(seed):
        for place, (kind, mishap) in enumerate(rows):
            bench = alone[(place + number) % len(alone)]
            yield partial(bench.faulted, kind, mishap, number)
            if place % 2:
                yield partial(bench.faulted, POWER, "before", number * len(rows) + place)


def _differing(found: Any, expected: Any) -> str:
    if hasattr(found, "_asdict"):
        found, expected = found._asdict(), expected._asdict()
    if isinstance(found, dict):
        names = [n for n in {**found, **expected} if found.get(n) != expected.get(n)]
        return json.dumps(
            {n: [repr(found.get(n))[:400], repr(expected.get(n))[:400]] for n in names}
        )
    return repr(found)[:400]
