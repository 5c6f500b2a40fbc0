"""What examples are drawn from, whatever they are: a task's files, or a folder of images."""

from collections.abc import Sequence
from typing import Protocol, TypeVar


class Classified(Protocol):
    """An example whose class is `right[0]`."""

    @property
    def right(self) -> tuple[int, ...]:
        """Indices of what is right."""
        ...


C_co = TypeVar("C_co", bound=Classified, covariant=True)


class Splits(Protocol[C_co]):
    """Where examples are drawn from; see `Source`."""

    @property
    def name(self) -> str:
        """In messages."""
        ...

    @property
    def words(self) -> tuple[str, ...]:
        """Of its classes, where it has any."""
        ...

    @property
    def test_seed(self) -> int | None:
        """Of which test examples are drawn, where it is not that of the others."""
        ...

    @property
    def is_one_file(self) -> bool:
        """Whether every split is all there is."""
        ...

    def has(self, split: str) -> bool:
        """Whether the split is apart from `train`."""
        ...

    def items(self, split: str) -> Sequence[C_co]:
        """Every example of a split."""
        ...
