"""The tasks known by name for masked LMs, as LM-BFF words them and MeZO trains RoBERTa on them.

Prompts and label words are LM-BFF's manual ones; 16 training examples of each class are trained on
and 16 held out (MeZO: 16, or 512), and 1,000 of the published development set (SST-5 and TREC: test
set) tested on, the same ones for every seed. Minimised is the cross-entropy over the label words.

References:
    Gao et al. 2021, arXiv 2012.15723, table 1.
    Malladi et al. 2023, arXiv 2305.17333, section 3.1.
"""

from zo_offload.tasks import formats, masked_formats
from zo_offload.tasks.spec import Counts, Hub, TaskSpec
from zo_offload.tasks.template import Template

COUNTS = Counts(1000, 500, 1000, per_class=16)
TEST_SEED = 42  # MeZO's, of which 1,000 are tested on
SENTIMENT = Template("{sentence} It was{mask}.")
INFERENCE = Template("{premise}?{mask}, {hypothesis}")
CSV = ("label", "text")  # the columns of LM-BFF's files, which have no header

MASKED_TASKS = (
    TaskSpec(
        name="SST-2",
        template=SENTIMENT,
        words=(" terrible", " great"),
        items=formats.sst2,
        files={
            "train": ("train.tsv", "train.jsonl"),
            "test": ("dev.tsv", "validation.jsonl", "dev.jsonl"),
        },
        folders=("SST-2",),
        hub=Hub("stanfordnlp/sst2"),
        counts=COUNTS,
        test_seed=TEST_SEED,
    ),
    TaskSpec(
        name="SST-5",
        template=SENTIMENT,
        words=(" terrible", " bad", " okay", " good", " great"),
        items=masked_formats.sst5,
        files={"train": ("train.csv", "train.jsonl"), "test": ("test.csv", "test.jsonl")},
        folders=("sst-5", "SST-5"),
        hub=Hub("SetFit/sst5", test="test"),
        counts=COUNTS,
        columns=CSV,
        test_seed=TEST_SEED,
    ),
    TaskSpec(
        name="SNLI",
        template=INFERENCE,
        words=(" Yes", " Maybe", " No"),
        items=masked_formats.nli,
        files={
            "train": ("train.tsv", "snli_1.0_train.jsonl", "train.jsonl"),
            "test": ("dev.tsv", "snli_1.0_dev.jsonl", "validation.jsonl"),
        },
        folders=("SNLI", "snli_1.0"),
        hub=Hub("stanfordnlp/snli"),
        counts=COUNTS,
        test_seed=TEST_SEED,
    ),
    TaskSpec(
        name="MNLI",
        template=INFERENCE,
        words=(" Yes", " Maybe", " No"),
        items=masked_formats.nli,
        files={
            "train": ("train.tsv", "multinli_1.0_train.jsonl", "train.jsonl"),
            "test": (
                "dev_matched.tsv", "multinli_1.0_dev_matched.jsonl", "validation_matched.jsonl",
            ),
        },
        folders=("MNLI", "multinli_1.0"),
        hub=Hub("nyu-mll/glue", "mnli", test="validation_matched"),
        counts=COUNTS,
        test_seed=TEST_SEED,
    ),
    TaskSpec(
        name="RTE",
        template=INFERENCE,
        words=(" Yes", " No"),
        items=masked_formats.rte,
        files={
            "train": ("train.tsv", "train.jsonl"),
            "test": ("dev.tsv", "validation.jsonl", "val.jsonl", "dev.jsonl"),
        },
        folders=("RTE",),
        hub=Hub("nyu-mll/glue", "rte"),
        counts=COUNTS,
        test_seed=TEST_SEED,
    ),
    TaskSpec(
        name="TREC",
        template=Template("{mask}: {sentence}"),
        words=(" Description", " Entity", " Expression", " Human", " Location", " Number"),
        items=masked_formats.trec,
        files={"train": ("train.csv", "train.jsonl"), "test": ("test.csv", "test.jsonl")},
        folders=("trec", "TREC"),
        hub=Hub("CogComp/trec", revision="refs/convert/parquet", test="test"),
        counts=COUNTS,
        columns=CSV,
        test_seed=TEST_SEED,
    ),
)  # fmt: skip
