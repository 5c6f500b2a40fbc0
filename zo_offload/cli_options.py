"""What each command of ``zo-offload`` may be given."""

import functools
from collections.abc import Callable
from typing import Any

import click

Command = Callable[..., Any]

POSITIVE = click.FloatRange(min=0, min_open=True)
COUNT = click.IntRange(min=1)

# fmt: off
TRAIN = click.option("--train", metavar="FILE",
                     help="Training examples: TSV with a header, or JSONL.")
TASK_OPTIONS = (
    click.option("--model", required=True, metavar="DIR_OR_ID",
                 help="Hugging Face directory or model id."),
    click.option("--task", metavar="NAME_OR_FILE",
                 help="SST-2, RTE, CB, BoolQ, WSC, WIC, MultiRC, COPA, ReCoRD, SQuAD, DROP (causal "
                      "LMs), SST-2, SST-5, SNLI, MNLI, RTE, TREC (masked LMs), or a .toml or .json "
                      "file that declares one; else --template, --labels, --dev."),
    click.option("--kind", type=click.Choice(["causal", "masked", "image"]),
                 help="What the model is (default: as its config.json says)."),
    click.option("--data", metavar="DIR_OR_FILE",
                 help="The task's files (default: beside its file, or fetched by datasets); for an "
                      "image classifier, a folder of images by class."),
    click.option("--num-train", type=COUNT,
                 help="Training examples, drawn by seed (default: the task's; mostly 1,000)."),
    click.option("--num-dev", type=COUNT,
                 help="Held out of the training split (default: the task's; mostly 500)."),
    click.option("--num-test", type=COUNT,
                 help="Of the test split (default: the task's; mostly 1,000)."),
    click.option("--per-class", type=COUNT, metavar="K",
                 help="Of every class, K training examples and K held out (masked LMs: 16)."),
    click.option("--data-seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True,
                 help="Of which examples are drawn."),
    click.option("--max-new-tokens", type=COUNT,
                 help="Of a generated answer (default: the task's; mostly 50)."),
    click.option("--dev", metavar="FILE",
                 help="Held-out examples: TSV with a header, or JSONL."),
    click.option("--template",
                 help='Prompt with fields, e.g. "{sentence} It was".'),
    click.option("--labels",
                 help='Label words in the order of their indices, e.g. " terrible, great".'),
    click.option("--config", metavar="FILE",
                 help="DeepSpeed JSON with a zeroth_order block."),
    click.option("--dev-limit", type=click.IntRange(min=1),
                 help="Use only the first examples held out."),
    click.option("--truncate", is_flag=True,
                 help="Cut texts that are longer than the model's context."),
    click.option("--local_rank", "--local-rank", type=int, hidden=True,
                 help="Set by launchers."),
)
TRAIN_OPTIONS = (
    TRAIN,
    click.option("--steps", required=True, type=int,
                 help="Steps to train."),
    click.option("--output", required=True, metavar="DIR",
                 help="Where the run goes; the same command continues it."),
    click.option("--order", type=click.Choice(["stratified", "shuffled"]),
                 help="Of examples: batches that hold every class in proportion (default, where "
                      "there are classes), or as they come."),
    click.option("--objective", type=click.Choice(["loss", "accuracy", "f1", "exact_match"]),
                 default="loss", show_default=True,
                 help="What is trained on: accuracy, of label words, choices and classes; f1 and "
                      "exact_match, of generated answers."),
    click.option("--first-order", type=click.Choice(["full", "lora"]),
                 help="A baseline: train by backprop instead, with AdamW in memory, all weights or "
                      "a LoRA adapter."),
    click.option("--lr", type=POSITIVE, help="Of --first-order; else the JSON's."),
    click.option("--eval-every", type=click.IntRange(min=1),
                 help="Steps between evaluations (default: a tenth of --steps, at least 10)."),
    click.option("--find-lr", is_flag=True,
                 help="Do not train: try learning rates for --steps, and propose one."),
    click.option("--trial-steps", type=COUNT,
                 help="With --find-lr: of a try (default: a fiftieth of --steps, 20 to 100)."),
)
EVAL_OPTIONS = (
    TRAIN,
    click.option("--shots", type=click.IntRange(min=0), default=0, show_default=True,
                 help="Solved training examples before each question, as many as fit."),
    click.option("--split", type=click.Choice(["train", "dev", "test"]),
                 help="Of --task, what to measure (default: test, where there is one)."),
)
CONVERT_OPTIONS = (
    click.option("--model", required=True, metavar="DIR_OR_ID",
                 help="Hugging Face directory or model id."),
    click.option("--output", required=True, metavar="DIR",
                 help="A directory to make; use it as --model, any number of times."),
    click.option("--config", metavar="FILE",
                 help="DeepSpeed JSON of the runs: precision, unit and master decide the layout."),
    click.option("--stripe", multiple=True, metavar="DIR",
                 help="A further directory, on another disk; may be given several times."),
)
SENSITIVITY_OPTIONS = (
    click.option("--model", required=True, metavar="DIR_OR_ID",
                 help="Hugging Face directory or model id."),
    click.option("--output", required=True, metavar="FILE", help="The mask, a safetensors file."),
    click.option("--corpus", metavar="FILE", help="Text in UTF-8, for gradients."),
    click.option("--config", metavar="FILE",
                 help="DeepSpeed JSON: precision, and where weights rest meanwhile."),
    click.option("--method", type=click.Choice(["gradient", "magnitude", "random"]),
                 default="gradient", show_default=True, help="What scores a weight."),
    click.option("--scope", type=click.Choice(["global", "matrix"]), default="global",
                 show_default=True, help="The largest of all matrices together, or of each."),
    click.option("--share", type=click.FloatRange(0, 1, min_open=True), default=1e-3,
                 show_default=True, help="Of the weights in the blocks' matrices."),
    click.option("--sequences", type=COUNT, default=16, show_default=True,
                 help="Pieces of text; each gives one gradient."),
    click.option("--length", type=COUNT, default=512, show_default=True,
                 help="Tokens of a piece."),
    click.option("--seed", type=int, default=0, show_default=True, help="Of random scores."),
)
REPLAY_OPTIONS = (
    click.option("--base", required=True, metavar="DIR_OR_ID",
                 help="What the run began with: a directory or model id."),
    click.option("--journal", required=True, metavar="FILE",
                 help="The run's journal, DIR/journal/run.journal of zo-offload train."),
    click.option("--to", type=click.IntRange(min=0), metavar="STEP",
                 help="Steps to take (default: all that the journal holds)."),
    click.option("--out", required=True, metavar="DIR",
                 help="A directory to make; the same command continues it."),
    click.option("--verify", is_flag=True,
                 help="Write nothing: compare --out, bit by bit, with what the replay gives."),
    click.option("--threads", type=COUNT, metavar="N",
                 help="Of the kernels (default: a core each)."),
    click.option("--config", metavar="FILE",
                 help="The run's DeepSpeed JSON; only where the journal holds no more than a "
                      "digest of what moved: patterns, masks."),
)
REPORT_OPTIONS = (
    click.argument("run_dir", nargs=-1, required=True),
    click.option("--output", metavar="FILE.html",
                 help="The page (default: report.html in the run's directory; of several runs, "
                      "here)."),
)
WATCH_OPTIONS = (
    click.argument("run_dir"),
    click.option("--once", is_flag=True, help="Show it once, as where there is no terminal."),
    click.option("--interval", type=click.FloatRange(min=0.1), default=1.0, show_default=True,
                 help="Seconds between two looks."),
)
CHECK_OPTIONS = (
    click.argument("file"),
    click.option("--trainer", is_flag=True,
                 help='For the Trainer of transformers, which fills in each "auto".'),
    click.option("--model", metavar="NAME",
                 help="Plan it too: a shape by name, directory or model id."),
    click.option("--device-gb", type=POSITIVE, help="With --model: device memory, in GiB."),
    click.option("--host-gb", type=POSITIVE, help="With --model: host memory, in GiB."),
)
NEW_OPTIONS = (
    click.option("--model", required=True, metavar="NAME",
                 help="A shape by name (opt-175b, llama-3-70b, ...), directory or model id."),
    click.option("--device-gb", type=POSITIVE,
                 help="Device memory, in GiB (default: this machine's)."),
    click.option("--host-gb", type=POSITIVE, help="Host memory, in GiB (default: this machine's)."),
    click.option("--nvme-path", metavar="DIR", help="Where weights may rest on a disk."),
    click.option("--task-length", type=COUNT,
                 help="Tokens of the longest example (512, or the model's context)."),
    click.option("--output", required=True, metavar="FILE", help="The JSON, a new file."),
)
DOCTOR_OPTIONS = (
    click.option("--path", multiple=True, metavar="DIR",
                 help="A directory whose disk is to be measured; may be given several times."),
    click.option("--json", is_flag=True, help="One line of JSON."),
)
EXPORT_OPTIONS = (
    click.option("--output", required=True, metavar="DIR",
                 help="A directory to make; after a kill the same command goes on."),
    click.option("--format", type=click.Choice(["hf", "adapter", "delta"]),
                 help="A Hugging Face model, an adapter of peft, or the difference to the base, "
                      "exact to the bit (default: adapter, where one was trained; else hf)."),
    click.option("--base", metavar="DIR_OR_ID",
                 help="What the run began with (default: as the run says; a checkpoint does not)."),
    click.option("--config", metavar="FILE",
                 help="Of a checkpoint: the run's DeepSpeed JSON, where replay asks for it."),
    click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
                 help="To round to (default: what forwards computed in)."),
    click.option("--max-shard-size", default="5GB", show_default=True, metavar="SIZE",
                 help="Of a file of weights."),
)
PLAN_MEMORY = ("device_gb", "host_gb", "nvme_gb")
PLAN_RATES = ("pcie_gbps", "nvme_gbps", "host_gbps", "tflops")
PLAN_OPTIONS = (
    click.option("--model", required=True, metavar="NAME",
                 help="A shape by name (opt-175b, llama-3-70b, ...), directory or model id."),
    click.option("--config", metavar="FILE",
                 help="DeepSpeed JSON with a zeroth_order block; options go before it."),
    click.option("--device-gb", type=POSITIVE, help="Device memory, in GiB."),
    click.option("--host-gb", type=POSITIVE, help="Host memory, in GiB."),
    click.option("--nvme-gb", type=POSITIVE, help="Disk, in GiB (default: any)."),
    click.option("--pcie-gbps", type=POSITIVE, help="Of the bus, 10^9 bytes a second (25)."),
    click.option("--nvme-gbps", type=POSITIVE, help="Of the disks (10)."),
    click.option("--host-gbps", type=POSITIVE, help="Of the host's updates (35)."),
    click.option("--tflops", type=POSITIVE, help="Of the device, 10^12 a second (100)."),
    click.option("--unit", type=click.Choice(["block", "sublayer", "linear"]),
                 help="What moves together (default: the plan's choice)."),
    click.option("--wire", metavar="CODEC",
                 help="What crosses the bus: nf4, int8:64, ... as in the JSON."),
    click.option("--share", type=click.FloatRange(0, 1, min_open=True),
                 help="Of the weights, that a mask chooses (0.001)."),
    click.option("--trainable",
                 type=click.Choice(["full", "low_rank", "sparse", "peft", "scales"]),
                 help="What moves; the last three freeze the base."),
    click.option("--probes", type=COUNT, help="Directions a step."),
    click.option("--lag", type=click.IntRange(min=0), help="Steps that masters may be behind."),
    click.option("--batch-size", type=COUNT, help="Examples of a micro-batch (1)."),
    click.option("--length", type=COUNT, help="Tokens of an example (2048, or the context)."),
    click.option("--json", is_flag=True, help="One line of JSON."),
)
# fmt: on


def takes(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """A command with these options."""
    return lambda command: functools.reduce(lambda f, option: option(f), reversed(options), command)
