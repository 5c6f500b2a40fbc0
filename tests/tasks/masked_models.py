"""Masked LMs and a tokenizer like RoBERTa's, made on the spot."""

from typing import Any

import torch
import transformers
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedModel, PreTrainedTokenizerFast

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
WORDS = (
    "terrible bad okay good great Yes Maybe No Description Entity Expression Human Location Number"
)
TEXTS = (
    "the film was warm and wise It was great .",
    "the plot was dull and long It was terrible .",
    "a man in a red coat waits ? Yes , the man is waiting .",
    ": What does it mean ? Who built it ? Where is it ?",
    f" {WORDS}",
)
SHAPE = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
POSITIONS = 64  # of tokens
SHAPES: dict[str, dict[str, Any]] = {
    "Roberta": {"max_position_embeddings": POSITIONS + 2, "type_vocab_size": 1},
    "Bert": {"max_position_embeddings": POSITIONS},
    "DebertaV2": {
        "max_position_embeddings": POSITIONS,
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "type_vocab_size": 0,
    },
}


def make_masked_lm(name: str, **more: Any) -> PreTrainedModel:
    """Random, in evaluation mode, the same at every call."""
    kind = getattr(transformers, f"{name}ForMaskedLM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(kind.config_class(**SHAPE | SHAPES[name] | more)).eval()


def make_masked_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes in pairs, `<s> text </s>`, and a mask that takes the blank before it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"],
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), add_prefix_space=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", cls_token="<s>",
        sep_token="</s>", unk_token="<unk>", pad_token="<pad>",
        mask_token=AddedToken("<mask>", lstrip=True),
    )  # fmt: skip
