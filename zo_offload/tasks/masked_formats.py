"""From rows to examples for masked LMs, where their texts are put otherwise than for causal ones.

A premise is asked as a question, in place of its full stop, and the hypothesis goes on after a
comma, as in the published templates (`run_experiment.sh` of LM-BFF). Deviation: there the premise's
last character goes whatever it is, here it stays where it is a letter or a digit.

Reference: Gao et al. 2021, arXiv 2012.15723, table 1.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from zo_offload.tasks import formats
from zo_offload.tasks.node import Node
from zo_offload.tasks.spec import Item

Items = Iterator[Item]
NLI = ("entailment", "neutral", "contradiction")
NO_CONSENSUS = ("-", "-1")  # of annotators, in SNLI and MNLI: no example
STARS = ("very negative", "negative", "neutral", "positive", "very positive")
TREC = ("DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM")  # as LM-BFF numbers them,
TREC_BY_HUB = ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM")  # and as the hub does


def _asked(items: Callable[[Node], Items]) -> Callable[[Node], Items]:
    """Of pairs: the premise without its full stop, the hypothesis with a small first letter."""

    def asked(row: Node) -> Items:
        for item in items(row):
            premise = item.fields["premise"].strip()
            hypothesis = item.fields["hypothesis"].strip()
            texts = {
                "premise": premise if premise[-1].isalnum() else premise[:-1],
                "hypothesis": hypothesis[0].lower() + hypothesis[1:],
            }
            yield replace(item, fields=texts)

    return asked


def _nli(row: Node) -> Items:
    label = row.first_of("gold_label", "label")
    if str(label.value).strip() in NO_CONSENSUS:
        return
    texts = {
        "premise": row.first_of("premise", "sentence1").text(),
        "hypothesis": row.first_of("hypothesis", "sentence2").text(),
    }
    yield Item(texts, row.where, (label.index_of(NLI),))


nli = _asked(_nli)
"""GLUE's TSV and the original JSONL (`gold_label`), or exported rows, of SNLI and of MNLI."""

rte = _asked(formats.rte)
"""GLUE's TSV, SuperGLUE's JSONL, or exported rows."""


def sst5(row: Node) -> Items:
    """LM-BFF's CSV, or exported rows: five classes, from very negative on."""
    label = row["label"].index_of(STARS)
    yield Item({"sentence": row["text"].text().strip()}, row.where, (label,))


def trec(row: Node) -> Items:
    """LM-BFF's CSV, or exported rows, whose coarse labels are numbered otherwise."""
    if "coarse_label" in row:
        label = TREC.index(TREC_BY_HUB[row["coarse_label"].index_of(TREC_BY_HUB)])
    else:
        label = row["label"].index_of(TREC)
    yield Item({"sentence": row["text"].text().strip()}, row.where, (label,))
