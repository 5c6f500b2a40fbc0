r"""The tasks known by name, as MeZO trains and measures causal models on them.

Prompts and label words are MeZO's, most of them from PromptSource; so are the numbers of examples
(1,000 to train on, 500 of the same split to choose by, 1,000 of the validation split to test on)
and what is minimised: cross-entropy over the options of the classification sets, and the
language-model loss of the right answer's tokens for COPA, ReCoRD, SQuAD and DROP.

Reference:
    Malladi et al. 2023, arXiv 2305.17333, appendix E.2, table 14. Deviation: WSC, whose 554
    training examples the published script leaves 54 of, holds 100 out as CB and COPA do.
"""

from zo_offload.kinds import Kind
from zo_offload.tasks import formats
from zo_offload.tasks.drop import drop
from zo_offload.tasks.masked_suite import MASKED_TASKS
from zo_offload.tasks.node import BOOLEANS
from zo_offload.tasks.spec import Counts, Hub, Manner, TaskSpec
from zo_offload.tasks.template import Template

COUNTS, SMALL = Counts(1000, 500, 1000), Counts(1000, 100, 1000)
GENERATED = Manner("answer", generates=True, metrics=("f1", "exact_match"))
EXPORTED = {"train": ("train.jsonl",), "test": ("validation.jsonl",)}  # by `datasets`
GLUE = {"train": ("train.tsv", "train.jsonl"), "test": ("dev.tsv", "validation.jsonl", "dev.jsonl")}
SUPERGLUE = {
    "train": ("train.jsonl", "train.tsv"),
    "test": ("val.jsonl", "validation.jsonl", "dev.jsonl", "dev.tsv"),
}
SQUAD = {
    "train": ("train-v1.1.json", *EXPORTED["train"]),
    "test": ("dev-v1.1.json", *EXPORTED["test"]),
}
DROP = {
    "train": ("drop_dataset_train.json", *EXPORTED["train"]),
    "test": ("drop_dataset_dev.json", *EXPORTED["test"]),
}


def _superglue(name: str) -> Hub:
    """Its own repository holds a script, which `datasets` no longer runs; this branch, the data."""
    return Hub("aps/super_glue", name, "refs/convert/parquet")


TASKS = (
    TaskSpec(
        name="SST-2",
        template=Template("{sentence} It was"),
        words=(" terrible", " great"),
        items=formats.sst2,
        files=GLUE,
        folders=("SST-2",),
        hub=Hub("stanfordnlp/sst2"),
        counts=COUNTS,
    ),
    TaskSpec(
        name="RTE",
        template=Template('{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n'),
        words=("Yes", "No"),
        items=formats.rte,
        files=SUPERGLUE,
        folders=("RTE",),
        hub=_superglue("rte"),
        counts=COUNTS,
    ),
    TaskSpec(
        name="CB",
        template=Template(
            'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n'
        ),
        words=("Yes", "No", "Maybe"),
        items=formats.classes(
            ("premise", "hypothesis"), ("entailment", "contradiction", "neutral")
        ),
        manner=Manner(metrics=("accuracy", "macro_f1")),
        files=SUPERGLUE,
        folders=("CB",),
        hub=_superglue("cb"),
        counts=SMALL,
    ),
    TaskSpec(
        name="BoolQ",
        template=Template("{passage} {question}\n"),
        words=("Yes", "No"),
        items=formats.boolq,
        files=SUPERGLUE,
        folders=("BoolQ",),
        hub=Hub("google/boolq"),
        counts=COUNTS,
    ),
    TaskSpec(
        name="WSC",
        template=Template(
            '{text}\nIn the previous sentence, does the pronoun "{pronoun}" refer to {noun}? '
            "Yes or No?\n"
        ),
        words=("No", "Yes"),
        items=formats.wsc,
        files=SUPERGLUE,
        folders=("WSC",),
        hub=_superglue("wsc.fixed"),
        counts=SMALL,
    ),
    TaskSpec(
        name="WIC",
        template=Template(
            'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n'
            "{sentence1}\n{sentence2}\n"
        ),
        words=("No", "Yes"),
        items=formats.classes(("word", "sentence1", "sentence2"), BOOLEANS),
        files=SUPERGLUE,
        folders=("WiC",),
        hub=_superglue("wic"),
        counts=COUNTS,
    ),
    TaskSpec(
        name="MultiRC",
        template=Template(
            '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". '
            "Is that correct? Yes or No?\n"
        ),
        words=("No", "Yes"),
        items=formats.multirc,
        manner=Manner(metrics=("accuracy", "positive_f1")),
        files=SUPERGLUE,
        folders=("MultiRC",),
        hub=_superglue("multirc"),
        counts=COUNTS,
    ),
    TaskSpec(
        name="COPA",
        template=Template("{premise} {conjunction}"),
        items=formats.copa,
        manner=Manner("answer"),
        files=SUPERGLUE,
        folders=("COPA",),
        hub=_superglue("copa"),
        counts=SMALL,
    ),
    TaskSpec(
        name="ReCoRD",
        template=Template("{passage}\n-"),
        items=formats.record,
        manner=Manner("answer"),
        files=SUPERGLUE,
        folders=("ReCoRD",),
        hub=_superglue("record"),
        counts=COUNTS,
    ),
    TaskSpec(
        name="SQuAD",
        template=Template("Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:"),
        option=Template(" {choice}\n"),
        items=formats.squad,
        manner=GENERATED,
        files=SQUAD,
        folders=("squad",),
        hub=Hub("rajpurkar/squad"),
        counts=COUNTS,
    ),
    TaskSpec(
        name="DROP",
        template=Template("Passage: {context}\nQuestion: {question}\nAnswer:"),
        option=Template(" {choice}\n"),
        items=drop,
        manner=GENERATED,
        files=DROP,
        folders=("drop_dataset", "drop"),
        hub=Hub("ucinlp/drop"),
        counts=COUNTS,
    ),
)
SUITES: dict[Kind, tuple[TaskSpec, ...]] = {
    "causal": TASKS,
    "masked": MASKED_TASKS,
    "image": (),  # folders of images are a task by themselves
}


def known_task(name: str, kind: Kind = "causal") -> TaskSpec | None:
    """The task of that name for such models, whatever its capitals and hyphens.

    >>> known_task("sst2").name
    'SST-2'
    """
    return next((task for task in SUITES[kind] if _key(task.name) == _key(name)), None)


def _key(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
