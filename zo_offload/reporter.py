"""What a run says of itself while it works; light to import, so that it can speak at once."""

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


class Reporter:
    """Is told what happens, and shows nothing; the command line's shows it.

    Attributes:
        trained: Whether training began.
    """

    trained = False

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Nothing was begun."""

    @contextmanager
    def phase(self, name: str, quiet: bool = False) -> Generator[None, None, None]:
        """Something that may take seconds; ``quiet`` where a log need not name it."""
        yield

    def say(self, line: str) -> None:
        """Something that the user did was heard."""

    def counted(self, name: str, items: Iterable[Item], count: int) -> Iterator[Item]:
        """The items, as they are asked for."""
        yield from items

    def on_start(self, first_step: int, steps: int) -> None:
        """Training begins, or continues where it stopped."""
        self.trained = True

    def on_evaluation(
        self, step: int, accuracy: float, loss: float, metric: str = "accuracy"
    ) -> None:
        """The dev set was evaluated after ``step`` steps."""

    def on_step(self, step: int, loss: float) -> None:
        """A step was taken."""
