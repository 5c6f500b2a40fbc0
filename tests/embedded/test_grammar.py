"""The grammar's promises: distinct, balanced, repeatable, and no sentence in two splits."""

import re
import subprocess
import sys

import pytest

from zo_offload.embedded import LABELS, TEMPLATE
from zo_offload.embedded.grammar import LABEL_WORDS, SPLITS, corpus, sentences, split_of
from zo_offload.embedded.lexicon import DOMAINS, PLAIN, POLAR, RULES


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("count", [0, 1, 7, 500])
def test_sentences_are_distinct_balanced_and_of_their_split(split: str, count: int) -> None:
    pairs = sentences(3, count, split)
    assert len({sentence for sentence, _ in pairs}) == count
    assert sum(label for _, label in pairs) == count // 2
    assert {split_of(sentence) for sentence, _ in pairs} <= {split}


def test_tens_of_thousands_of_sentences() -> None:
    assert len(sentences(0, 20_000, "pretrain")) == 20_000


def test_a_sentence_has_one_label() -> None:
    first, second = dict(sentences(0, 2000)), dict(sentences(1, 2000))
    both = first.keys() & second.keys()
    assert both
    assert all(first[sentence] == second[sentence] for sentence in both)


def test_the_seed_decides() -> None:
    assert sentences(5, 50) == sentences(5, 50)
    assert sentences(5, 50) != sentences(6, 50)
    assert corpus(5, 50) == corpus(5, 50)
    assert corpus(5, 50) != corpus(6, 50)


def test_pretraining_text_holds_no_sentence_of_the_task() -> None:
    read = {line for text in corpus(0, 5000) for line in re.split(r"(?<=\.) ", text)}
    for split in ("train", "dev"):
        assert [sentence for sentence, _ in sentences(0, 1000, split) if sentence in read] == []
    assert any(sentence in read for sentence, _ in sentences(0, 1000, "pretrain"))


def test_only_verdicts_say_the_label_words() -> None:
    lists = [
        *RULES.values(),
        *PLAIN.values(),
        *(words for pair in POLAR.values() for words in pair),
    ]
    lists += [words for domain in DOMAINS for words in domain.values()]
    said = " ".join(word for words in lists for word in words).split()
    assert not {word.strip() for word in LABEL_WORDS} & set(said)
    text = " ".join(corpus(0, 5000))
    for word in LABEL_WORDS:
        assert text.count(word) == text.count(TEMPLATE.format(sentence="").strip() + word + ".") > 0


def test_sentences_look_like_english() -> None:
    for sentence, _ in sentences(0, 2000):
        assert sentence[0].isupper()
        assert sentence.endswith(".")
        assert not set(sentence) & set("<>\t\n_/")
        assert "  " not in sentence


def test_the_text_starts_without_negation_and_ends_with_contrast() -> None:
    text = corpus(0, 8000)
    started = " ".join(text[:1000]).replace("could not stand", "")  # a word of its own
    assert " not " not in started
    assert sum(", but " in line for line in text[-1000:]) > 100


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'test': write one of pretrain, train, dev"):
        sentences(0, 1, "test")


def test_labels_are_written_for_a_command_line() -> None:
    assert LABELS.split(",") == LABEL_WORDS == [" terrible", " great"]


def test_importing_it_does_not_import_transformers() -> None:
    code = "import sys; sys.modules['transformers'] = None; import zo_offload.embedded.pretrain"
    subprocess.run([sys.executable, "-c", code], check=True)
