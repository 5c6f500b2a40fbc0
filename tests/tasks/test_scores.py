"""Metrics against numbers that were computed by hand."""

import pytest

from zo_offload.tasks.scores import METRICS, exact_match_of, token_f1_of

CLASSES = [0, 0, 1, 1, 2], [(0,), (1,), (1,), (1,), (0,)]
TEXTS = ["The Eiffel-Tower!", "in May 1640", "seven", ""]
REFERENCES = [["eiffeltower"], ["May 1640", "1641"], ["5"], ["nothing"]]
ROWS = {
    # right: the first, third and fourth of five
    "accuracy": (*CLASSES, 3 / 5),
    # class 0: P 1/2, R 1/2; class 1: P 1, R 2/3, F1 4/5; class 2 is predicted and never right
    "macro_f1": (*CLASSES, (1 / 2 + 4 / 5 + 0) / 3),
    "positive_f1": (*CLASSES, 4 / 5),
    # 1; P 2/3, R 1, F1 4/5; 0; 0
    "f1": (TEXTS, REFERENCES, (1 + 4 / 5) / 4),
    "exact_match": (TEXTS, REFERENCES, 1 / 4),
}


def test_every_metric_has_a_row():
    assert ROWS.keys() == METRICS.keys()


@pytest.mark.parametrize("name", ROWS)
def test_against_hand_computed_numbers(name: str):
    predictions, right, expected = ROWS[name]
    assert METRICS[name](predictions, right) == pytest.approx(expected, abs=1e-15)


def test_any_of_several_right_options_counts():
    assert METRICS["accuracy"]([2, 1], [(0, 2), (0, 2)]) == 0.5


@pytest.mark.parametrize(
    ("prediction", "references", "f1", "exact"),
    [
        ("a red red house", ["red house house"], 2 / 3, 0.0),  # words count as often as they stand
        ("the answer", ["an answer."], 1.0, 1.0),
        ("no answer", ["no answer", "x"], 1.0, 1.0),
        ("x", ["no answer", "x"], 0.0, 1.0),  # nothing is asked for
        ("the", ["a"], 0.0, 1.0),  # nothing is left of either
        ("Café, 1,000", ["café 1000"], 1.0, 1.0),
    ],
)
def test_answers_as_squad_compares_them(prediction, references, f1, exact):
    assert token_f1_of(prediction, references) == pytest.approx(f1)
    assert exact_match_of(prediction, references) == exact
