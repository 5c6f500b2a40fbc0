"""Demonstrations: solved examples of the training split before the question, as many as fit.

Those that are drawn are the same for every question. Where not all fit, the first ones are left
out, whole; MeZO cuts them in the middle, and draws others for each question unless a seed is given.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from zo_offload.tasks.rendered import Rendered

Measure = Callable[[Sequence[Rendered]], list[int]]


def with_demonstrations(
    posed: Sequence[Rendered],
    solved: Sequence[str],
    separator: str,
    max_length: int | None,
    *,
    measure: Measure,
    count: Callable[[list[str]], list[int]],
) -> tuple[list[Rendered], list[int]]:
    """The questions after their demonstrations, and how many each one has.

    Args:
        posed: The questions.
        solved: Demonstrations; the last ones are the last to be left out.
        separator: After each of them.
        max_length: Positions that the model has; None for no limit.
        measure: Positions that each question needs, options and what is generated included.
        count: The tokens of each text.
    """
    counts = [len(solved)] * len(posed)
    found = [_after(one, solved, separator) for one in posed]
    if max_length is None or not solved:
        return found, counts
    sizes = count([text + separator for text in solved])
    for at, size in enumerate(measure(posed)):  # an estimate: tokens may merge over a boundary
        while counts[at] and size + sum(sizes[-counts[at] :]) > max_length + counts[at]:
            counts[at] -= 1
    waiting = list(range(len(posed)))
    while waiting:
        for at in waiting:
            found[at] = _after(posed[at], solved[len(solved) - counts[at] :], separator)
        needed = measure([found[at] for at in waiting])
        over = [at for at, n in zip(waiting, needed, strict=True) if n > max_length and counts[at]]
        for at in over:
            counts[at] -= 1
        waiting = over
    return found, counts


def told(counts: Sequence[int], asked: int) -> str | None:
    """What to say of demonstrations that did not fit."""
    short = [count for count in counts if count < asked]
    if not short:
        return None
    return (
        f"--shots: {asked} demonstrations fit before {len(counts) - len(short):,} of "
        f"{len(counts):,} examples; the others have as many as fit, {min(short)} at the least"
    )


def _after(posed: Rendered, solved: Sequence[str], separator: str) -> Rendered:
    return replace(posed, prompt="".join(text + separator for text in solved) + posed.prompt)
