"""A task that runs in a second, and three ways to run a command: here, in a child, in a shell."""

import importlib
import json
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from click.testing import CliRunner, Result
from forked import Forked
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

# Imported once in the server that children are forked from.
import zo_offload.deepspeed_json
import zo_offload.engine
import zo_offload.run  # noqa: F401
from zo_offload import cli
from zo_offload.journal import Journal

REPOSITORY = Path(__file__).resolve().parents[2]
TEMPLATE, LABELS = "{sentence} It was", " terrible, great"
WORDS = ("a", "the", "film", "plot", "of", "warm", "dull", "wise", "and", "long", "It", "was")
STEPS, EVAL_EVERY = 6, 2
CONTEXT = 24


@dataclass(frozen=True)
class Task:
    """Where a model and its data lie."""

    folder: Path

    def arguments(self, output: Path | str, command: str = "train", **changes: Any) -> list[str]:
        """A whole command line; ``None`` leaves an option out."""
        options: dict[str, Any] = {
            "model": self.folder / "model",
            "dev": self.folder / "dev.tsv",
            "template": TEMPLATE,
            "labels": LABELS,
            "config": self.folder / "ds.json",
        }
        if command == "train":
            options |= {
                "train": self.folder / "train.tsv",
                "steps": STEPS,
                "eval-every": EVAL_EVERY,
                "output": output,
            }
        options |= {name.replace("_", "-"): value for name, value in changes.items()}
        given = {name: value for name, value in options.items() if value is not None}
        return [command, *(part for name in given for part in (f"--{name}", str(given[name])))]


def make_task(folder: Path) -> Task:
    """A random OPT, its tokenizer, two files of sentences and a JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    make_model(folder / "model")
    write_tsv(folder / "train.tsv", 20)
    write_tsv(folder / "dev.tsv", 17)
    write_config(folder / "ds.json")
    return Task(folder)


def write_config(
    path: Path, lag: int = 0, snapshot_interval: int = 1000, nvme: Path | None = None
) -> Path:
    on_disk = {"device": "nvme", "nvme_path": str(nvme)}
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "ZO", "params": {"lr": 1e-2}},
        "zeroth_order": {
            "offload_param": on_disk if nvme else {"device": "cpu"},
            "update": {"lag": lag},
            "journal": {"snapshot_interval": snapshot_interval},
        },
    }
    path.write_text(json.dumps(config))
    return path


def make_model(folder: Path, dtype: torch.dtype = torch.float32) -> None:
    vocabulary = ["<s>", "</s>", "<unk>", "terrible", "great", *WORDS]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(str(folder))
    config = OPTConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        init_std=0.3,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model: Any = OPTForCausalLM(config)
        model.to(dtype).save_pretrained(str(folder))


def write_tsv(path: Path, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    lines = ["sentence\tlabel"]
    for _ in range(count):
        length = int(torch.randint(3, 8, (), generator=generator))
        chosen = torch.randint(len(WORDS), (length,), generator=generator).tolist()
        label = int(torch.randint(2, (), generator=generator))
        lines.append(f"{' '.join(WORDS[i] for i in chosen)}\t{label}")
    path.write_text("\n".join(lines) + "\n")


def invoke(arguments: Sequence[str]) -> Result:
    """The command in this process."""
    return CliRunner().invoke(cli.main, list(arguments))


def assert_one_line(result: Result, words: str) -> None:
    """Failed as a user should see it."""
    import re

    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert re.search(words, line), line
    assert "Traceback" not in result.output


def accuracies(stdout: str) -> tuple[str, str]:
    """What stands on the two lines that scripts read."""
    lines = stdout.splitlines()
    (before,) = [line for line in lines if line.startswith("accuracy before: ")]
    (after,) = [line for line in lines if line.startswith("accuracy after: ")]
    return before.removeprefix("accuracy before: "), after.removeprefix("accuracy after: ")


class Results(NamedTuple):
    """What must not depend on interruptions."""

    weights: bytes
    metrics: list[str]
    journal: bytes
    accuracies: tuple[str, str]


def results(directory: Path, stdout: str) -> Results:
    rows = [line.split(",") for line in (directory / "metrics.csv").read_text().splitlines()]
    seconds = rows[0].index("seconds")
    return Results(
        (directory / "model" / "model.safetensors").read_bytes(),
        [",".join(row[:seconds] + row[seconds + 1 :]) for row in rows],
        Journal.read(directory / "journal" / "run.journal").content,  # however much was synced
        accuracies(stdout),
    )


def tree(directory: Path) -> dict[str, bytes | None]:
    """Every file's content."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


class At(NamedTuple):
    """A signal to itself, around one call of a function."""

    module: str
    function: str
    call: int
    when: str = "after"
    signal: int = signal.SIGKILL

    def __str__(self) -> str:
        return f"{self.when} {self.function} {self.call}"


class Child(Forked):
    """A command in a forked process.

    Args:
        arguments: Of the command line.
        log: Its stdout; stderr goes beside it.
        at: Where it sends itself a signal.
        user: Whose rights it takes on.
        repeat: How many signals it sends then.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        at: At | None = None,
        user: int | None = None,
        repeat: int = 1,
    ) -> None:
        self._errors = log.with_suffix(".err")
        given = (list(arguments), at, user, repeat)
        super().__init__("cli.common:run_in_child", *given, out=log, errors=self._errors)

    def wait_until_stopped(self) -> None:
        """Until it has sent itself SIGSTOP. It is no child of ours but of the server."""
        status = Path(f"/proc/{self.pid}/stat")
        while status.read_text().rpartition(")")[2].split()[0] != "T":
            assert self.wait(0.02) is None, self.stderr

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    @property
    def stderr(self) -> str:
        return self._errors.read_text()


def run_one_rank(arguments: list[str], rank: int, at: At) -> None:
    """Of several, of which one sends itself a signal."""
    run_in_child(arguments, at if int(os.environ["RANK"]) == rank else None)


def run_in_child(
    arguments: list[str], at: At | None = None, user: int | None = None, repeat: int = 1
) -> None:
    if user is not None:
        os.setgid(user)
        os.setuid(user)
    if at is not None:
        _arm(at, repeat)
    cli.main(arguments, prog_name="zo-offload")


def _arm(at: At, repeat: int) -> None:
    module: Any = importlib.import_module(at.module)
    *path, name = at.function.split(".")
    for part in path:
        module = getattr(module, part)
    original, calls = getattr(module, name), 0

    def armed(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at.call and at.when == "before":
            for _ in range(repeat):
                os.kill(os.getpid(), at.signal)
        result = original(*args, **kwargs)
        if calls == at.call and at.when == "after":
            os.kill(os.getpid(), at.signal)
        return result

    setattr(module, name, armed)
