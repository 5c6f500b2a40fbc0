"""Of a test with many parameters `make test` runs some, `make thorough` the others.

Where every combination of settings has to give the same bits, a few that differ the most find
nearly all that all of them would; the others are for whoever has the time.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import pytest


def spread(cases: Sequence[Mapping[str, Any]], count: int) -> set[int]:
    """So many of the cases, each with the most values, and pairs of them, that none before it had.

    Of several such, the one whose values were had the fewest times.

    Example:
        >>> cases = [{"lag": lag, "wire": wire} for lag in (0, 1) for wire in "ab"]
        >>> [cases[index] for index in sorted(spread(cases, 2))]
        [{'lag': 0, 'wire': 'a'}, {'lag': 1, 'wire': 'b'}]
    """
    values = [{(name, repr(value)) for name, value in case.items()} for case in cases]
    pairs = [set(combinations(sorted(each), 2)) for each in values]
    left, chosen = list(range(len(cases))), set[int]()
    seen, seen_pairs = Counter[Any](), set[Any]()

    def worth(case: int) -> tuple[int, int, int]:
        had = [seen[value] for value in values[case]]
        return had.count(0), len(pairs[case] - seen_pairs), -sum(had)

    while left and len(chosen) < count:
        best = max(left, key=worth)
        left.remove(best)
        chosen.add(best)
        seen.update(values[best])
        seen_pairs |= pairs[best]
    return chosen


def mark(items: Sequence[pytest.Item]) -> None:
    """The rest of each test that is marked ``sampled(count)``, as ``thorough``."""
    found: defaultdict[str, list[pytest.Function]] = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("sampled"):
            found[item.nodeid.partition("[")[0]].append(item)
    for same in found.values():
        same.sort(key=lambda item: item.nodeid)  # whatever order they are to run in
        marker = same[0].get_closest_marker("sampled")
        assert marker is not None
        kept = spread([item.callspec.params for item in same], *marker.args)
        for index, item in enumerate(same):
            if index not in kept:
                item.add_marker(pytest.mark.thorough)
