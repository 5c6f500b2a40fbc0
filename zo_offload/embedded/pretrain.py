"""Makes the quick start's model: a small OPT, pretrained by backprop on the grammar's text.

A real tokenizer (byte-level BPE), a real architecture and a Hugging Face directory, so that all
that comes after treats it as any other model. About 1.7 million tokens pass, each text once: 77,000
texts of 22 tokens, one a row, as the task's prompts are, in the order of the corpus (easy to hard);
rows of like length share a batch, so that little padding is computed.

Tuning then starts at chance (0.50: nearly always "great") and reaches 0.97 in 200 to 400 steps of
16 sentences at eps 1e-3 and rate 1e-4, or in 700 at 5e-5; signs, plain torch.

Rates and sizes were chosen by trying. The slow part is to find out that "good" and "bad" differ at
all: at a peak rate of 2e-3 that took half of the run. OPT's own initial scale, 0.02, is for widths
of thousands.
"""

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from zo_offload.embedded import grammar, lexicon
from zo_offload.errors import ConfigError

VOCABULARY = 1024
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0 to 3, as OPT's
PAD, END = 1, 2
WIDTH, LAYERS, HEADS = 64, 3, 4
MAX_POSITIONS = 128
INITIAL_STD = 0.08
STEPS, BATCH, WINDOW = 2400, 32, 16  # WINDOW: batches among which rows are sorted by length
PEAK_LR, WARMUP, WEIGHT_DECAY = 3e-3, 0.1, 0.01
LEAST_TEXTS = 2048  # for the tokenizer, where a short run would see fewer
TRAIN_SENTENCES, DEV_SENTENCES = 4000, 1000
RECIPE = "recipe.json"

Progress = Callable[[int, int, float], object]


def build_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE of VOCABULARY tokens; every text starts with "</s>", as OPT's do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=MAX_POSITIONS,
    )


def build_model(seed: int, layers: int = LAYERS) -> Any:
    """An untrained `OPTForCausalLM`, fp32, on the CPU; the global generator is left as it was."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        ffn_dim=4 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        max_position_embeddings=MAX_POSITIONS,
        init_std=INITIAL_STD,
        dropout=0.0,
        pad_token_id=PAD,
        bos_token_id=END,
        eos_token_id=END,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return OPTForCausalLM(config).eval()


def _batches(rows: list[list[int]], seed: int) -> Iterator[torch.Tensor]:
    """Batches [B, T] of like length, window by window in the order of `rows`, padded right."""
    rng = random.Random(seed)
    for first in range(0, len(rows), WINDOW * BATCH):
        window = sorted(rows[first : first + WINDOW * BATCH], key=len)
        starts = range(0, len(window), BATCH)
        for start in rng.sample(starts, len(starts)):
            batch = [torch.tensor(row) for row in window[start : start + BATCH]]
            yield torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=PAD)


def _lr_factor(step: int, steps: int) -> float:
    warm = max(1, round(WARMUP * steps))
    return min((step + 1) / warm, (steps - step) / max(1, steps - warm))


def pretrain(
    model: Any, rows: list[list[int]], seed: int = 0, progress: Progress | None = None
) -> None:
    """Trains `model` in place, one pass over token rows, with AdamW and a rate that falls to zero.

    The model stays in eval mode: it has no dropout, and OPT in training mode draws from the global
    generator in every layer.

    Args:
        model: a causal LM on the CPU, fp32.
        rows: token ids, one list a text, in the order in which they are read.
        seed: orders the batches of a window.
        progress: called as progress(step, steps, loss) after every batch.
    """
    steps = -(-len(rows) // BATCH)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, steps))
    for step, tokens in enumerate(_batches(rows, seed)):  # tokens: [B, T]
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits  # [B, T - 1, V]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=PAD)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if progress is not None:
            progress(step + 1, steps, loss.item())


def make_embedded(
    directory: str | Path,
    seed: int = 0,
    progress: Progress | None = None,
    steps: int = STEPS,
    layers: int = LAYERS,
) -> None:
    """Makes `directory/model/` (Hugging Face), `directory/train.tsv` and `directory/dev.tsv`.

    What an earlier call made by the same recipe is kept as it is. The directory appears whole or
    not at all; what an interrupted call left beside it is swept away by the next.

    Args:
        directory: where; its parents are made.
        seed: of weights, text and task; same seed and thread count, same files.
        progress: called as progress(step, steps, loss) after every batch of pretraining.
        steps: batches of pretraining; 0 leaves the model untrained.
        layers: transformer blocks.

    Raises:
        ConfigError: `directory` holds something that this function did not make.
    """
    directory = Path(directory)
    recipe = _recipe(seed, steps, layers)
    marker = directory / RECIPE
    if marker.is_file():
        if marker.read_text(encoding="utf-8") == recipe:
            return
    elif directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(
            f"{directory} exists and has no {RECIPE}, so it is not a quick-start model; "
            "name another directory, or move that one away"
        )
    aside = directory.with_name(directory.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "model").mkdir(parents=True)
    _write_model(aside / "model", seed, progress, steps, layers)
    _write_task(aside / "train.tsv", grammar.sentences(seed, TRAIN_SENTENCES, "train"))
    _write_task(aside / "dev.tsv", grammar.sentences(seed, DEV_SENTENCES, "dev"))
    (aside / RECIPE).write_text(recipe, encoding="utf-8")
    shutil.rmtree(directory, ignore_errors=True)
    aside.rename(directory)


def _recipe(seed: int, steps: int, layers: int) -> str:
    """What decides the result, with a digest of the code that makes it."""
    sources = [Path(file) for file in (lexicon.__file__, grammar.__file__, __file__)]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    return json.dumps({"seed": seed, "steps": steps, "layers": layers, "source": digest}) + "\n"


def _write_model(
    directory: Path, seed: int, progress: Progress | None, steps: int, layers: int
) -> None:
    texts = grammar.corpus(seed, max(steps * BATCH, LEAST_TEXTS))
    tokenizer = build_tokenizer(texts[::8])
    texts = texts[: steps * BATCH]
    rows = [[*row, END] for row in tokenizer(texts)["input_ids"]] if texts else []
    model = build_model(seed, layers)
    pretrain(model, rows, seed, progress)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _write_task(path: Path, pairs: list[tuple[str, int]]) -> None:
    lines = ["sentence\tlabel", *(f"{sentence}\t{label}" for sentence, label in pairs)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
