"""Two tiny OPTs that read for some seconds who has what, and a task for each on what it read.

One can copy an answer out of a sentence, but says mostly that it does not know; the other can tell
warm colours from cold ones, but nearly always says warm. Tuning has only to sharpen that.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.utils.rnn import pad_sequence
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

NAMES = ("ann", "bob", "eve", "ian", "kim", "leo", "mia", "tom")
COLOURS = ("brown", "pink", "red", "yellow", "black", "blue", "green", "grey")  # warm ones first
THINGS = ("bag", "bike", "boat", "book", "coat", "cup", "hat", "key")
WORDS = ("\n", ".", "?", "a", "has", "what", "i", "do", "not", "know", "it", "is", "warm", "cold")
UNKNOWN = "i do not know"
SAYS_ANSWER = (0.28, 0.66)  # how often: of the first thing, and of the last
SAYS_WARM = (0.35, 0.75)  # after a cold colour: the first, and the last
STEPS, BATCH, RATE = {"qa": 420, "words": 250}, 64, 5e-3

TASK = """
template = "{question}"
answer = "answer"
option = " {choice} \\n"
max_new_tokens = 5
splits = {train = "train.jsonl", dev = "dev.jsonl"}
"""
TEMPLATE, LABELS = "{sentence} it is", " warm, cold"

Row = tuple[str, str, str]


def make_taught(folder: Path) -> None:
    """`qa/` and `words/`, models; `qa.toml` with its JSONL, and `train.tsv` and `dev.tsv`.

    The rows of `train` have been read, those of `dev` have not.
    """
    rows = [(name, colour, thing) for name in NAMES for colour in COLOURS for thing in THINGS]
    random.Random(0).shuffle(rows)
    dev, train = rows[:64], rows[64:]
    tokenizer = _tokenizer()
    for kind in STEPS:
        model = _read(kind, tokenizer, train)
        model.save_pretrained(folder / kind)
        tokenizer.save_pretrained(folder / kind)
    (folder / "qa.toml").write_text(TASK)
    for name, part in (("train", train), ("dev", dev)):
        asked = [{"question": _question(row), "answer": _answer(row)} for row in part]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
        told = [f"{_sentence(row)}\t{int(_is_cold(row))}\n" for row in part]
        (folder / f"{name}.tsv").write_text("sentence\tlabel\n" + "".join(told))


def _sentence(row: Row) -> str:
    return "{} has a {} {} .".format(*row)


def _question(row: Row) -> str:
    return f"{_sentence(row)} what has {row[0]} ?"


def _answer(row: Row) -> str:
    return "a {} {}".format(*row[1:])


def _is_cold(row: Row) -> bool:
    return COLOURS.index(row[1]) >= len(COLOURS) // 2


def _between(ends: tuple[float, float], at: int, count: int) -> float:
    return ends[0] + (ends[1] - ends[0]) * at / (count - 1)


def _text(kind: str, rng: random.Random, row: Row) -> tuple[str, str]:
    """A prompt, and what is said after it."""
    if kind == "qa":
        knows = _between(SAYS_ANSWER, THINGS.index(row[2]), len(THINGS))
        return _question(row), f" {_answer(row) if rng.random() < knows else UNKNOWN} \n"
    half = len(COLOURS) // 2
    warm = _between(SAYS_WARM, COLOURS.index(row[1]) - half, half) if _is_cold(row) else 0.97
    return TEMPLATE.format(sentence=_sentence(row)), " warm" if rng.random() < warm else " cold"


def _tokenizer() -> PreTrainedTokenizerFast:
    words = ("<s>", "</s>", *WORDS, *NAMES, *COLOURS, *THINGS)
    vocabulary = {word: at for at, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def _read(kind: str, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]) -> Any:
    """By backprop, on what is said."""
    shape = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=24,
        dropout=0.0,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    rng = random.Random(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = OPTForCausalLM(shape).eval()
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
        for step in range(STEPS[kind]):
            falling = 3 - 3 * step / STEPS[kind]  # at the end, so that odds are what was read
            optimizer.param_groups[0]["lr"] = RATE * min(1, falling)
            texts = [_text(kind, rng, row) for row in rng.sample(rows, BATCH)]
            asked = [torch.tensor(tokenizer(prompt)["input_ids"]) for prompt, _ in texts]
            whole = [torch.tensor(tokenizer("".join(text))["input_ids"]) for text in texts]
            ids = pad_sequence(whole, batch_first=True, padding_value=1)
            told = [torch.cat([torch.full_like(a, -100), w[len(a) :]]) for a, w in
                    zip(asked, whole, strict=True)]  # fmt: skip
            labels = pad_sequence(told, batch_first=True, padding_value=-100)
            model(input_ids=ids, attention_mask=(ids != 1).long(), labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model
