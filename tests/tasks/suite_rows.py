"""What each task makes of the first example of its test file, and which other files hold it too."""

from pathlib import Path
from typing import NamedTuple

DATA = Path(__file__).parent / "data"


class Row(NamedTuple):
    """A task, as its fixtures pin it."""

    name: str
    file: str
    prompt: str
    options: tuple[str, ...]
    right: tuple[int, ...]
    same: tuple[str, ...] = ()  # files whose first example is the same
    references: tuple[str, ...] = ()
    train_on: str = "options"
    metrics: tuple[str, ...] = ("accuracy",)
    counts: tuple[int, int, int] = (1000, 500, 1000)


NO_YES = ("No", "Yes")
QA = {"train_on": "answer", "metrics": ("f1", "exact_match"), "right": (0,)}
ROWS = (
    Row(
        "SST-2", "SST-2/dev.tsv", "nobody laughed It was", (" terrible", " great"), (0,),
        same=("SST-2/exported.jsonl",),
    ),
    Row(
        "RTE", "RTE/val.jsonl",
        'Ana bought bread and milk.\nDoes this mean that "Ana sold milk." is true? Yes or No?\n',
        ("Yes", "No"), (1,), same=("RTE/glue.tsv", "RTE/exported.jsonl"),
    ),
    Row(
        "CB", "CB/val.jsonl",
        'Suppose He says the shop is closed. It is open. Can we infer that "the shop is closed"? '
        "Yes, No, or Maybe?\n",
        ("Yes", "No", "Maybe"), (1,),
        metrics=("accuracy", "macro_f1"), counts=(1000, 100, 1000),
    ),
    Row(
        "BoolQ", "BoolQ/val.jsonl", "Bees (insects) rest at night. Do bees sleep?\n",
        ("Yes", "No"), (0,), same=("BoolQ/original.jsonl",),
    ),
    Row(
        "WSC", "WSC/val.jsonl",
        "The cup fell off the shelf because it was narrow.\nIn the previous sentence, does the "
        'pronoun "it" refer to The cup? Yes or No?\n',
        NO_YES, (0,), same=("WSC/exported.jsonl",), counts=(1000, 100, 1000),
    ),
    Row(
        "WIC", "WiC/val.jsonl",
        'Does the word "run" have the same meaning in these two sentences? Yes, No?\n'
        "Run to the shop.\nShe runs to school.\n",
        NO_YES, (1,),
    ),
    Row(
        "MultiRC", "MultiRC/val.jsonl",
        'Tom sings on Mondays.\nQuestion: Who sings?\nI found this answer "Tom". Is that correct? '
        "Yes or No?\n",
        NO_YES, (1,), same=("MultiRC/exported.jsonl",), metrics=("accuracy", "positive_f1"),
    ),
    Row(
        "COPA", "COPA/val.jsonl", "The boy dropped the glass so",
        (" it broke.", " I drank from it."), (0,),
        train_on="answer", counts=(1000, 100, 1000),
    ),
    Row(
        "ReCoRD", "ReCoRD/val.jsonl",
        "Oslo (Reuters) - Nils Berg won the race in Oslo.\n- Berg is 20\n"
        "- His coach is Ida Moe\n-",
        tuple(
            f" {entity} thanked Moe after the race"
            for entity in ("Berg", "Ida Moe", "Nils Berg", "Oslo", "Reuters")
        ),
        (0, 2), train_on="answer",
    ),
    Row(
        "SQuAD", "squad/dev-v1.1.json",
        "Title: Lake_Orn\nContext: Lake Orn is 40 metres deep.\nQuestion: How deep is Lake Orn?\n"
        "Answer:",
        (" 40 metres\n",), same=("squad/exported.jsonl",), references=("40 metres", "40"), **QA,
    ),
    Row(
        "DROP", "drop_dataset/drop_dataset_dev.json",
        "Passage: The war began on 3 May 1640 and ended in 1641.\nQuestion: When did the war "
        "begin?\nAnswer:",
        (" 3 May 1640\n",), same=("drop_dataset/exported.jsonl",),
        references=("3 May 1640", "May 1640"), **QA,
    ),
)  # fmt: skip
