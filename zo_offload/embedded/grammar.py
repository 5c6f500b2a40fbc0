"""Reviews from a small grammar: text to pretrain on, and a sentiment task on sentences it lacks.

Why a grammar: the quick start must run without a network, and must show learning, not memory.
Negation, contrast ("but", "although", hearsay) and rare adjectives make the label depend on the
whole sentence; six domains and some hundred words make far more sentences than are ever read.

Two things about the pretraining text were found by trying, and nothing works without them.

It gets harder as it goes on, as a child's reader does: lists of words of one sentiment, then
clauses, then "not", then whole sentences. A model this small that meets "not" before it knows "bad"
from "good" learns neither in the minute that it has.

It says the two label words under a skewed prior: reviewers say "great" after good and mostly after
bad, too. So who has read it can tell the two apart and does not say so, and a zero-shot answer is
nearly always "great". Tuning with forward passes only sharpens what pretraining knows: label words
that pretraining never said are not learned in any number of steps that a quick start has.

A sentence belongs to one split by a hash of its own text, whatever the seed.
"""

import hashlib
import random
import re
from itertools import accumulate

from zo_offload.embedded.lexicon import DOMAINS, PLAIN, POLAR, RULES

TEMPLATE = "{sentence} It was"
LABELS = " terrible, great"
SPLITS = ("pretrain", "train", "dev")

LABEL_WORDS = LABELS.split(",")
GREAT_AFTER = (0.75, 0.97)  # how often a label verdict says "great": after a bad, after a good one
LABEL_VERDICTS, IDLE_VERDICTS = 0.35, 0.05  # share that say a label word, or nothing
RARITY = 3.0  # the r-th polar word is drawn with weight 1 / (r + RARITY)

# Where in the pretraining text, from 0 to 1, each lesson starts and reaches its full share.
ONLY_LISTS_UNTIL = 0.16
NEGATION = (0.20, 0.28)
WHOLE_SENTENCES = (0.30, 0.42)

Domain = dict[str, tuple[str, ...]]

_RARER = list(accumulate(1 / (rank + RARITY) for rank in range(100)))
_SLOT = re.compile(r"<(-?)(\w+)>")
_A_BEFORE_VOWEL = re.compile(r"\b([Aa]) (?=[aeiou])")


def _pick(rng: random.Random, name: str, positive: bool, domain: Domain) -> str:
    if name in POLAR:
        words = POLAR[name][positive]
        return rng.choices(words, cum_weights=_RARER[: len(words)])[0]
    return rng.choice(RULES.get(name) or PLAIN.get(name) or domain[name])


def _expand(rng: random.Random, rule: str, positive: bool, domain: Domain) -> str:
    def fill(slot: re.Match[str]) -> str:
        polarity = positive != bool(slot[1])
        return _expand(rng, _pick(rng, slot[2], polarity, domain), polarity, domain)

    return _SLOT.sub(fill, rule)


def _write(rng: random.Random, rule: str, positive: bool, domain: Domain) -> str:
    text = _A_BEFORE_VOWEL.sub(r"\1n ", _expand(rng, rule, positive, domain))
    return text[0].upper() + text[1:]


def split_of(sentence: str) -> str:
    """The split of a sentence, from its text alone: 6 in 8 "pretrain", 1 "train", 1 "dev".

    >>> split_of("The soup was good.") in SPLITS
    True
    """
    bucket = hashlib.blake2b(sentence.encode(), digest_size=1).digest()[0] % 8
    return {0: "dev", 1: "train"}.get(bucket, "pretrain")


def _draw(rng: random.Random, rule: str, split: str, positive: bool, domain: Domain) -> str:
    while True:
        sentence = _write(rng, rule, positive, domain)
        if split_of(sentence) == split:
            return sentence


def sentences(seed: int, count: int, split: str = "train") -> list[tuple[str, int]]:
    """Distinct review sentences with labels, as many negative (0) as positive (1), shuffled.

    Args:
        seed: any int; the same seed gives the same list.
        count: number of sentences; where it is odd, one more is negative.
        split: "pretrain", "train" or "dev"; no sentence is in two.

    Returns:
        `count` pairs (sentence, label).

    Raises:
        ValueError: `split` is none of SPLITS.

    >>> len(sentences(0, 4)), sentences(0, 4) == sentences(0, 4)
    (4, True)
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}: write one of {', '.join(SPLITS)}")
    rng = random.Random(f"sentences {split} {seed}")
    labels: dict[str, int] = {}
    while len(labels) < count:
        label = len(labels) % 2
        sentence = _draw(rng, "<sentence>", split, bool(label), rng.choice(DOMAINS))
        labels.setdefault(sentence, label)
    pairs = list(labels.items())
    rng.shuffle(pairs)
    return pairs


def _ramp(position: float, start: float, end: float) -> float:
    return min(1.0, max(0.0, (position - start) / (end - start)))


def _word_list(rng: random.Random, position: float, positive: bool, domain: Domain) -> str:
    flipped = 0.5 * _ramp(position, *NEGATION)
    first = "<not> <-adjective>" if rng.random() < flipped else "<adjective>"
    others = [
        "<flipped_item>" if rng.random() < flipped else "<item>" for _ in range(rng.randint(2, 7))
    ]
    return _write(rng, f"it was {', '.join([first, *others])}.", positive, domain)


def _verdict(rng: random.Random, positive: bool, domain: Domain) -> str:
    kind = rng.random()
    if kind < LABEL_VERDICTS:
        word = LABEL_WORDS[rng.random() < GREAT_AFTER[positive]]
        return TEMPLATE.format(sentence="").lstrip() + word + "."
    rule = "<verdict>" if kind < 1 - IDLE_VERDICTS else "<idle_verdict>"
    return _write(rng, rule, positive, domain)


def _review(rng: random.Random, position: float, positive: bool, domain: Domain) -> str:
    if rng.random() < 0.85 * _ramp(position, *WHOLE_SENTENCES):
        rule = "<sentence>"
    else:
        rule = "<flipped>." if rng.random() < 0.6 * _ramp(position, *NEGATION) else "<plain>."
    lines = [_draw(rng, rule, "pretrain", positive, domain), _verdict(rng, positive, domain)]
    if rng.random() < 0.4:
        lines.append(_write(rng, "<closing>", positive, domain))
    return " ".join(lines)


def corpus(seed: int, count: int) -> list[str]:
    """Pretraining text, from easy to hard: word lists, and reviews with a verdict and a closing.

    Args:
        seed: any int; the same seed gives the same text.
        count: number of texts.

    Returns:
        `count` strings such as "The soup was far from bland. It was great. We left happy." None
        holds a sentence of the splits "train" and "dev".

    >>> len(corpus(0, 3)), corpus(0, 3) == corpus(0, 3)
    (3, True)
    """
    rng = random.Random(f"corpus {seed}")
    texts = []
    for index in range(count):
        position, positive, domain = index / count, bool(index % 2), rng.choice(DOMAINS)
        lists = 0.03 + 0.5 * (1 - _ramp(position, NEGATION[1], WHOLE_SENTENCES[1]))
        is_list = position < ONLY_LISTS_UNTIL or rng.random() < lists
        write = _word_list if is_list else _review
        texts.append(write(rng, position, positive, domain))
    return texts
