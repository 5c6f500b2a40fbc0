"""Every command that a page shows is run, on models and data that take a second each.

The commands of a block run in its order in one folder, which holds what the page leaves to the
reader: a model, data, a JSON. Names are replaced by those, numbers of steps and of examples that
are held out by a few; all else is run as it stands.
"""

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.common import STEPS, invoke, write_tsv
from cli.common import make_task as make_words
from transformers import AutoModelForCausalLM, OPTConfig

from tasks.masked_models import make_masked_lm, make_masked_tokenizer
from tasks.suite_rows import DATA
from tasks.test_pictures import write_images, write_model

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
ELSEWHERE = {  # what tests of their own run
    "make": "CI runs them",
    "python": "tests/test_examples.py",
    "deepspeed": "tests/distributed",
    "mpirun": "tests/distributed",
    "torchrun": "tests/distributed",
    "sbatch": "tests/distributed",
}
OF_A_CHECKPOINT = "checkpoints/"  # tests/cli/test_cli_export.py
OWN = '--train train.tsv --dev dev.tsv --template "{sentence} It was" --labels " terrible, great"'
NAMES = (  # what a page says, and what the folder has
    (r"~/superglue", "superglue"),
    (r"lm-bff/original", "superglue/masked"),
    (r"FacebookAI/roberta-large", "roberta"),
    (r"(?<=--base )opt-1.3b", "words"),
    (r"/mnt/", ""),
    (r"/nvme/", "nvme/"),
    (r"(?<=export delta) --output model", " --output again"),
    (r"(?<=export out) --output model", " --output exported"),
    (r"docs/examples/", f"{ROOT}/docs/examples/"),
    (r"configs/", f"{ROOT}/configs/"),
)
FEWER = (
    (r"--(steps|to) [\d,]+", rf"--\1 {STEPS}"),
    (r"--per-class \d+", "--per-class 1"),
    (r"--shots \d+", "--shots 1"),
)


def blocks() -> dict[str, list[str]]:
    """Commands that stand together, each on one line, by page and place."""
    found = {}
    for page in PAGES:
        for number, block in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")), start=1):
            lines = block.replace("\\\n", " ").splitlines()
            commands = [line[2:] for line in lines if line.startswith("$ ")]
            found |= {f"{page.stem}-{number}": commands} if commands else {}
    return found


def prepared(line: str) -> list[str]:
    """What is run."""
    for pattern, replacement in (*NAMES, *FEWER):
        line = re.sub(pattern, replacement, line)
    images = "images" in line
    line = line.replace("DIR_OR_ID", "classifier" if images else "model")
    if " ... " in f"{line} ":
        given = "" if "--task" in line else OWN
        given += "" if "--model" in line else " --model words"
        given += "" if "--steps" in line else f" --steps {STEPS}"
        given += "" if "--output" in line else " --output further"
        line = re.sub(r" \.\.\.(?= |$)", f" {given}", line)
    words = shlex.split(line, comments=True)
    if "--task" in words and "--data" not in words and ".toml" not in line:
        words += ["--data", "superglue"]
    if "train" in words and "--task" in words and "--per-class" not in words:
        words += ["--num-dev", "1"]
    if "train.tsv" in words or "dev.tsv" in words or "nvme/base" in words:
        words = ["words" if word == "model" else word for word in words]
    return words


@pytest.fixture(scope="module")
def furnished(make_tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    make_words(folder / "task")
    shutil.move(folder / "task" / "model", folder / "words")
    write_tsv(folder / "train.tsv", 20)
    write_tsv(folder / "dev.tsv", 17)
    tokenizer = make_tokenizer("<s> $A")
    tokenizer.pad_token = tokenizer.eos_token
    shape = OPTConfig(
        vocab_size=300, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=1024, pad_token_id=1, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(shape)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    make_masked_lm("Roberta").save_pretrained(folder / "roberta")
    make_masked_tokenizer().save_pretrained(folder / "roberta")
    write_model(folder / "classifier", num_labels=2)
    write_images(folder / "images" / "train", 12, 0)
    write_images(folder / "images" / "test", 8, 1)
    shutil.copytree(DATA, folder / "superglue")
    for disk in ("nvme0", "nvme1"):
        (folder / disk).mkdir()
    (folder / "text.txt").write_text("the film was warm and wise\n" * 900)
    block = {"eps": 1e-3, "offload_param": {"device": "cpu"}}
    config = {"train_batch_size": 4, "zeroth_order": block}
    (folder / "ds.json").write_text(json.dumps(config))
    return folder


BLOCKS = blocks()


@pytest.mark.parametrize("name", BLOCKS)
def test_the_commands_of_a_block(furnished: Path, name: str, tmp_path: Path, monkeypatch):
    folder = tmp_path / "page"
    shutil.copytree(furnished, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    if name.partition("-")[0] in ("replay", "report", "export"):  # of a run that is there
        done = invoke(shlex.split(f"train --model words {OWN} --steps {STEPS} --output out"))
        assert done.exit_code == 0, done.output
        for other in ("a", "b", "c"):
            shutil.copytree("out", f"runs/{other}")
    for line in BLOCKS[name]:
        words = prepared(line)
        if words[0] in ELSEWHERE or OF_A_CHECKPOINT in line:
            continue
        assert words[0] == "zo-offload", line
        done = invoke(words[1:])
        assert done.exit_code == 0, (line, words, done.output, done.stderr)


def test_commands_are_found():
    assert len(BLOCKS) > 10
    assert any("\\" not in line and "--labels" in line for line in BLOCKS["training-1"])
