"""What each task for masked LMs makes of the first example of its test file."""

from pathlib import Path
from typing import NamedTuple

DATA = Path(__file__).parent / "data" / "masked"


class MaskedRow(NamedTuple):
    """A task, as its fixtures pin it: `prompt`, the mask, `rest`."""

    name: str
    file: str
    prompt: str
    rest: str
    words: tuple[str, ...]
    right: int
    same: tuple[str, ...] = ()  # files whose first example is the same


FEELINGS = (" terrible", " great")
YES_NO = (" Yes", " Maybe", " No")
MASKED_ROWS = (
    MaskedRow(
        "SST-2", "SST-2/dev.tsv", "nobody laughed It was", ".", FEELINGS, 0,
        ("SST-2/validation.jsonl",),
    ),
    MaskedRow(
        "SST-5", "sst-5/test.csv", "not good , not long . It was", ".",
        (" terrible", " bad", " okay", " good", " great"), 1, ("sst-5/test.jsonl",),
    ),
    MaskedRow(
        "SNLI", "SNLI/dev.tsv", "A man in a red coat waits for a bus?", ", the man is waiting.",
        YES_NO, 0, ("SNLI/validation.jsonl", "snli_1.0/snli_1.0_dev.jsonl"),
    ),
    MaskedRow(
        "MNLI", "MNLI/dev_matched.tsv", 'He said "no!?', ", i heard nothing of it.", YES_NO, 1,
        ("MNLI/validation_matched.jsonl", "multinli_1.0/multinli_1.0_dev_matched.jsonl"),
    ),
    MaskedRow(
        "RTE", "RTE/dev.tsv", "Ana bought bread and milk?", ", ana sold milk.", (" Yes", " No"), 1,
        ("RTE/val.jsonl",),
    ),
    MaskedRow(
        "TREC", "trec/test.csv", "", ": What does UN , the body , stand for ?",
        (" Description", " Entity", " Expression", " Human", " Location", " Number"), 2,
        ("trec/test.jsonl",),
    ),
)  # fmt: skip
