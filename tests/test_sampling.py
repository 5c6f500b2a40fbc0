"""Which cases of a test with many parameters are run first."""

from collections import Counter
from itertools import combinations, product

import pytest
from sampling import spread

pytest_plugins = ["pytester"]

CASES = [dict(zip("abc", values, strict=True)) for values in product(range(4), range(3), range(2))]


@pytest.mark.parametrize("count", [0, 1, 4, 12, 24, 30])
def test_as_many_as_asked_for(count: int):
    assert len(spread(CASES, count)) == min(count, len(CASES))


def test_every_value_is_met_by_as_few_cases_as_can_meet_it():
    chosen = [CASES[index] for index in spread(CASES, 4)]
    met = {item for case in chosen for item in case.items()}
    assert met == {item for case in CASES for item in case.items()}


def test_every_pair_of_values_is_met_by_few_more_than_can_meet_it():
    chosen = [CASES[index] for index in spread(CASES, 14)]  # twelve would be the least
    pairs = {pair for case in chosen for pair in combinations(sorted(case.items()), 2)}
    assert pairs == {pair for case in CASES for pair in combinations(sorted(case.items()), 2)}


def test_no_value_is_met_much_more_often_than_another():
    cases = [{"model": model, "dtype": dtype} for model in range(21) for dtype in range(3)]
    chosen = [cases[index] for index in spread(cases, 24)]
    assert sorted(Counter(case["dtype"] for case in chosen).values()) == [8, 8, 8]
    assert max(Counter(case["model"] for case in chosen).values()) == 2


def test_the_rest_is_thorough(pytester: pytest.Pytester):
    pytester.makeini("[pytest]\nmarkers =\n    sampled: some\n    thorough: the others\n")
    pytester.makeconftest(
        "import pytest\n"
        "import sampling\n"
        "@pytest.hookimpl(tryfirst=True)\n"
        "def pytest_collection_modifyitems(items):\n"
        "    sampling.mark(items)\n"
    )
    pytester.makepyfile(
        "import pytest\n"
        "@pytest.mark.sampled(2)\n"
        "@pytest.mark.parametrize('a', [0, 1])\n"
        "@pytest.mark.parametrize('b', [0, 1])\n"
        "def test_some(a, b): assert a == b\n"
        "def test_all(): pass\n"
    )
    plain = ["-p", "no:randomly", "-p", "no:cacheprovider"]
    pytester.runpytest_inprocess(*plain, "-m", "not thorough").assert_outcomes(
        passed=3, deselected=2
    )
    pytester.runpytest_inprocess(*plain, "-m", "thorough").assert_outcomes(failed=2, deselected=3)
