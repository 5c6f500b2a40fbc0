r"""What predictions are worth: accuracy, F1 and exact match, as the data sets publish them.

Answers in words are compared as SQuAD does: lower case, without punctuation, without the articles
a, an, the, white space folded. An example counts its best reference.

References:
    Rajpurkar et al. 2016, arXiv 1606.05250, section 6.1 (exact match, token F1).
    Wang et al. 2019, arXiv 1905.00537, section 3.2 (macro F1 of CB, F1 of MultiRC's answers).
    Malladi et al. 2023, arXiv 2305.17333, appendix E (which of them is reported): DROP's answers of
    several spans count as alternatives there, and here.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_ANSWER = {"CANNOTANSWER", "no answer"}
PUNCTUATION = str.maketrans("", "", string.punctuation)


def answer_tokens(text: str) -> list[str]:
    """The words that count.

    >>> answer_tokens("The  Eiffel-Tower, in a park.")
    ['eiffeltower', 'in', 'park']
    """
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def exact_match_of(prediction: str, references: Sequence[str]) -> float:
    """1.0 where the prediction is one of the references, normalized, else 0.0."""
    found = answer_tokens(prediction)
    return float(any(found == answer_tokens(reference) for reference in references))


def token_f1_of(prediction: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of words, of the best reference.

    >>> token_f1_of("the red house", ["a red barn", "houses"])
    0.5
    """
    if references[0] in NO_ANSWER:
        return exact_match_of(prediction, references[:1])
    found = answer_tokens(prediction)
    return max(_overlap(found, answer_tokens(reference)) for reference in references)


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The share of predictions that are one of their references."""
    return _mean(map(exact_match_of, predictions, references))


def token_f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The mean F1 of predictions against their references."""
    return _mean(map(token_f1_of, predictions, references))


def accuracy(predictions: Sequence[int], right: Sequence[Sequence[int]]) -> float:
    """The share of predictions that are right; an example may have several right options."""
    return _mean(float(found in good) for found, good in zip(predictions, right, strict=True))


def macro_f1(predictions: Sequence[int], right: Sequence[Sequence[int]]) -> float:
    """The mean, over classes that occur or are predicted, of each one's F1.

    >>> macro_f1([0, 1, 1, 2], [(0,), (0,), (1,), (1,)])
    0.38888888888888884
    """
    classes = sorted({*predictions, *(good[0] for good in right)})
    return _mean(_class_f1(predictions, right, each) for each in classes)


def positive_f1(predictions: Sequence[int], right: Sequence[Sequence[int]]) -> float:
    """F1 of class 1 (yes)."""
    return _class_f1(predictions, right, 1)


METRICS: dict[str, Callable[[Sequence[Any], Sequence[Sequence[Any]]], float]] = {
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "positive_f1": positive_f1,
    "f1": token_f1,
    "exact_match": exact_match,
}
OF_OPTIONS, OF_TEXTS = ("accuracy", "macro_f1", "positive_f1"), ("f1", "exact_match")
REWARDS = {"f1": token_f1_of, "exact_match": exact_match_of}


def _overlap(found: Sequence[str], wanted: Sequence[str]) -> float:
    same = (Counter(found) & Counter(wanted)).total()
    if not same:
        return 0.0
    precision, recall = same / len(found), same / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _class_f1(predictions: Sequence[int], right: Sequence[Sequence[int]], which: int) -> float:
    both = zip(predictions, right, strict=True)
    pairs = [(found == which, good[0] == which) for found, good in both]
    hits = sum(found and good for found, good in pairs)
    total = sum(found + good for found, good in pairs)
    return 2 * hits / total if total else 0.0


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)
