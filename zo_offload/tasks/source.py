"""Which examples of a task are trained on, chosen by and tested on.

As MeZO draws them: a permutation by seed of the training split, of which the first ones are trained
on and the last ones held out; and one of the validation split, to test on. By class, as LM-BFF and
MeZO draw them for masked LMs: of that permutation the first K of each class are trained on and the
next K held out. NumPy's `RandomState` never changes, so a seed draws the examples that their
scripts draw.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from zo_offload.tasks.hub import fetch_rows
from zo_offload.tasks.rows import read_rows
from zo_offload.tasks.spec import Counts, Item, TaskSpec
from zo_offload.tasks.splits import Classified, Splits
from zo_offload.tasks.wording import listed, printable, refuse

SPLITS = ("train", "dev", "test")
T = TypeVar("T")
C = TypeVar("C", bound=Classified)
HELD_OUT = 5  # every fifth, where nothing says how many


@dataclass(frozen=True)
class Source:
    """A task's data.

    Attributes:
        spec: The task.
        data: A directory with its files, or one file that is every split; None for where the task
            says, or the hub.
    """

    spec: TaskSpec
    data: str | None = None

    def has(self, split: str) -> bool:
        """Whether the split has a file of its own. Others are parts of `train`."""
        return split in self.spec.files and not self.is_one_file

    @property
    def name(self) -> str:
        """In messages."""
        return self.spec.name

    @property
    def words(self) -> tuple[str, ...]:
        """Of its classes, where it has any."""
        return self.spec.words

    @property
    def test_seed(self) -> int | None:
        """Of which test examples are drawn, where it is not that of the others."""
        return self.spec.test_seed

    @property
    def is_one_file(self) -> bool:
        """Whether every split is that file."""
        return self.data is not None and Path(self.data).is_file()

    def items(self, split: str) -> list[Item]:
        """Every example of a split that has a file.

        Raises:
            TaskError: It cannot be found or read, or holds what is no example.
        """
        if self._base is None and self.spec.hub is not None:
            rows, place = fetch_rows(self.spec.name, self.spec.hub, split), self.spec.hub.path
        else:
            path = self._find(split)
            rows, place = read_rows(path, self.spec.columns), printable(str(path))
        found = [item for row in rows for item in self.spec.items(row)]
        if not found:
            refuse(place, "no example", f"expected some of {self.spec.name}")
        return found

    @property
    def _base(self) -> Path | None:
        return Path(self.data) if self.data is not None else self.spec.folder

    def _find(self, split: str) -> Path:
        base = self._base
        if base is None or self.is_one_file:
            if base is None:
                refuse(self.spec.name, "no data", "pass its files by --data")
            return base
        shown, names = printable(str(base)), self.spec.files[split]
        if not base.is_dir():
            refuse(shown, "no such file or directory", "check --data")
        for folder in (base, *(base / name for name in self.spec.folders)):
            for name in names:
                if (folder / name).is_file():
                    return folder / name
        beside = f" or in {listed(self.spec.folders)} there" if self.spec.folders else ""
        what = "train and dev" if split == "train" else split
        return refuse(
            shown, f"no file of {self.spec.name} to take {what} from", f"expected {listed(names)}"
            f"{beside}; or name the file itself"
        )  # fmt: skip


def draw(source: Splits[C], split: str, counts: Counts, seed: int) -> list[C]:
    """The examples of `train`, `dev` or `test`, drawn by seed.

    Raises:
        TaskError: There are none, or too few to hold any out.
    """
    test_seed = seed if source.test_seed is None else source.test_seed
    if source.is_one_file and split == "test":
        return drawn(source.items("train"), counts.test, test_seed)
    if split != "train" and source.has(split):
        its_seed = test_seed if split == "test" else seed
        return drawn(source.items(split), getattr(counts, split), its_seed)
    if split == "test":
        refuse(source.name, "the task has no test split", "evaluate --split dev")
    pool = source.items("train")
    if counts.per_class is not None:
        return _of_each_class(source, pool, counts.per_class, seed)[split == "dev"]
    if source.has("dev"):
        return drawn(pool, counts.train, seed)
    held = max(1, len(pool) // HELD_OUT) if counts.dev is None else counts.dev
    if held >= len(pool):
        refuse(
            source.name,
            f"{len(pool):,} training examples, of which {held:,} are to be held out",
            "lower --num-dev",
        )
    both = drawn(pool, None if counts.train is None else counts.train + held, seed)
    return both[-held:] if split == "dev" else both[:-held]


def _of_each_class(
    source: Splits[C], pool: Sequence[C], count: int, seed: int
) -> tuple[list[C], list[C]]:
    """So many of each class to train on, and so many to hold out; fewer where there are fewer."""
    if not source.words:
        refuse(source.name, "its examples have no classes to draw from", "drop --per-class")
    train: list[C] = []
    dev: list[C] = []
    seen: Counter[int] = Counter()
    for item in drawn(pool, None, seed):
        (which, *_) = item.right
        if seen[which] < 2 * count:
            (train if seen[which] < count else dev).append(item)
        seen[which] += 1
    if not dev and not source.has("dev"):
        fault = f"{len(pool):,} training examples, none left to hold out after {count:,} of a class"
        refuse(source.name, fault, "lower --per-class")
    return train, dev


def drawn(items: Sequence[T], count: int | None, seed: int) -> list[T]:
    """The first of a permutation by seed."""
    order = np.random.RandomState(seed).permutation(len(items))
    return [items[int(at)] for at in order[:count]]
