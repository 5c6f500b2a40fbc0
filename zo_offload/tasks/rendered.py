"""An example as text: what the model reads, what may follow, and what is right.

Every task ends here, whatever its files look like, and every way through a model begins here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rendered:
    """One example as text.

    Attributes:
        prompt: What the model reads.
        options: What may follow the prompt, each as it stands there (with its leading space). Of a
            question whose answer is generated: the answer to learn from, alone.
        right: Indices of the right options; the first is the one to learn from.
        where: `file:line`.
        references: Accepted answers, where the answer is generated.
        fixed: Whether all examples have the same options (label words).
        rest: What follows the mask, where the prompt is what stands before one.
    """

    prompt: str
    options: tuple[str, ...]
    right: tuple[int, ...]
    where: str
    references: tuple[str, ...] = ()
    fixed: bool = True
    rest: str | None = None

    @property
    def solved(self) -> str:
        """The prompt and what should follow, as a demonstration."""
        return (self.prompt + self.options[self.right[0]]).strip()


def around_mask(
    before: str, after: str, words: tuple[str, ...], right: tuple[int, ...], where: str
) -> Rendered:
    """A text in which a masked LM fills in one of the words. Blanks go: the words have their own.

    >>> around_mask("A joy. It was ", ".", (" bad", " good"), (1,), "dev.tsv:2").prompt
    'A joy. It was'
    """
    return Rendered(before.strip(" "), words, right, where, rest=after.rstrip(" "))
