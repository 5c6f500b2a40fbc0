"""Small random models, one row each: a new model is tested by adding a row."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 96
WIDTH = 32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
EXPERTS = {"num_key_value_heads": 2, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Row:
    """A model that every test of this folder runs.

    Attributes:
        make: The model, in fp32, with whatever values.
        batch: Keyword arguments of a forward that returns a loss, for a sequence length (images: a
            number of images).
        units: Module paths of the expected units.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, Any]]
    units: tuple[str, ...]

    def inputs(self, length: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """The batch with its images, sounds and vectors in a dtype."""
        batch = self.batch(length)
        floating = {
            k: v.to(dtype) for k, v in batch.items() if k in ("pixel_values", "input_features", "x")
        }
        return {**batch, **floating}

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model in evaluation mode, with the same values at every call, none left at 0 or 1."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.make().eval()
            for parameter in model.parameters():
                parameter.data += 0.05 * torch.randn_like(parameter)
        return cast(model, dtype)


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Parameters and saved buffers in another dtype, as loading a checkpoint in it gives them."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            saved = name not in module._non_persistent_buffers_set
            if buffer is not None and saved and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)
    return model


def of(architecture: str, **settings: Any) -> Callable[[], nn.Module]:
    """A ``transformers`` model of these settings."""

    def make() -> nn.Module:
        model_class = getattr(transformers, architecture)
        return model_class(model_class.config_class(**settings))

    return make


def blocks(path: str, count: int = 2) -> tuple[str, ...]:
    return tuple(f"{path}.{i}" for i in range(count))


def tokens(length: int) -> torch.Tensor:
    """Token ids ``[2, length]`` above the special ones."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(4, VOCABULARY, (2, length), generator=generator)


def values(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def text(length: int) -> dict[str, torch.Tensor]:
    """Text with labels at every position; the second row is padded on the right."""
    input_ids = tokens(length)
    input_ids[1, -2:] = TEXT["pad_token_id"]
    attention_mask = (input_ids != TEXT["pad_token_id"]).long()
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def labelled_text(length: int) -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(length), "labels": torch.tensor([0, 1])}


def pairs(length: int) -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(length), "labels": tokens(length + 1)}


def speech(length: int) -> dict[str, torch.Tensor]:
    return {"input_features": values(2, 16, 32), "labels": tokens(length)}


def images(count: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": values(count, 3, 16, 16), "labels": torch.arange(count) % 2}


def captioned_images(length: int) -> dict[str, Any]:
    return {
        "input_ids": tokens(length),
        "pixel_values": values(2, 3, 16, 16),
        "return_loss": True,
    }


class Block(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


class Plain(nn.Module):
    """Classifies vectors; nothing in it knows of transformers."""

    def __init__(self, num_blocks: int = 3, width: int = WIDTH) -> None:
        super().__init__()
        self.enter = nn.Linear(8, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(num_blocks))
        self.leave = nn.Linear(width, 2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.leave(x).float(), labels)


def vectors(count: int) -> dict[str, torch.Tensor]:
    return {"x": values(count, 8), "labels": torch.arange(count) % 2}


ROWS = {
    "plain": Row(Plain, vectors, blocks("blocks", 3)),
    "opt": Row(
        of("OPTForCausalLM", **TEXT, ffn_dim=64, word_embed_proj_dim=WIDTH),
        text,
        blocks("model.decoder.layers"),
    ),
    "opt-post-norm": Row(
        of(
            "OPTForCausalLM", **TEXT, ffn_dim=64, word_embed_proj_dim=16, do_layer_norm_before=False
        ),
        text,
        blocks("model.decoder.layers"),
    ),
    "gpt2": Row(of("GPT2LMHeadModel", **TEXT), text, blocks("transformer.h")),
    "gpt-neox": Row(of("GPTNeoXForCausalLM", **TEXT), text, blocks("gpt_neox.layers")),
    "llama": Row(
        of("LlamaForCausalLM", **TEXT, num_key_value_heads=2), text, blocks("model.layers")
    ),
    "qwen3": Row(
        of("Qwen3ForCausalLM", **TEXT, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True),
        text,
        blocks("model.layers"),
    ),
    "mixtral": Row(
        of("MixtralForCausalLM", **TEXT, **EXPERTS, num_local_experts=4),
        text,
        blocks("model.layers"),
    ),
    "qwen3-moe": Row(
        of(
            "Qwen3MoeForCausalLM",
            **TEXT,
            **EXPERTS,
            num_experts=4,
            moe_intermediate_size=32,
            head_dim=8,
        ),
        text,
        blocks("model.layers"),
    ),
    "mamba": Row(
        of(
            "MambaForCausalLM",
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            state_size=4,
        ),
        text,
        blocks("backbone.layers"),
    ),
    "roberta": Row(of("RobertaForMaskedLM", **TEXT), text, blocks("roberta.encoder.layer")),
    "roberta-classifier": Row(
        of("RobertaForSequenceClassification", **TEXT),
        labelled_text,
        blocks("roberta.encoder.layer"),
    ),
    "deberta": Row(
        of(
            "DebertaForMaskedLM",
            **TEXT,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            type_vocab_size=0,
        ),
        text,
        blocks("deberta.encoder.layer"),
    ),
    "deberta-v2": Row(
        of(
            "DebertaV2ForMaskedLM",
            **TEXT,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            position_buckets=8,
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            type_vocab_size=0,
        ),
        text,
        blocks("deberta.encoder.layer"),
    ),
    "albert": Row(
        of("AlbertForMaskedLM", **TEXT | {"num_hidden_layers": 3}, embedding_size=16),
        text,
        ("albert.encoder.albert_layer_groups.0",),
    ),
    "t5": Row(
        of(
            "T5ForConditionalGeneration",
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=3,
        ),
        pairs,
        (*blocks("encoder.block"), *blocks("decoder.block")),
    ),
    "bart": Row(
        of(
            "BartForConditionalGeneration",
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=40,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=3,
            decoder_start_token_id=3,
            forced_eos_token_id=3,
        ),
        pairs,
        (*blocks("model.encoder.layers"), *blocks("model.decoder.layers")),
    ),
    "whisper": Row(
        of(
            "WhisperForConditionalGeneration",
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            num_mel_bins=16,
            max_source_positions=16,
            max_target_positions=40,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=3,
            decoder_start_token_id=3,
            suppress_tokens=[],
            begin_suppress_tokens=[],
        ),
        speech,
        (*blocks("model.encoder.layers"), *blocks("model.decoder.layers")),
    ),
    "vit": Row(
        of(
            "ViTForImageClassification",
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=16,
            patch_size=8,
        ),
        images,
        blocks("vit.layers"),
    ),
    "clip": Row(
        of(
            "CLIPModel",
            text_config={**TEXT, "projection_dim": 16},
            vision_config={
                "hidden_size": WIDTH,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 64,
                "image_size": 16,
                "patch_size": 8,
                "projection_dim": 16,
            },
            projection_dim=16,
        ),
        captioned_images,
        (*blocks("text_model.encoder.layers"), *blocks("vision_model.encoder.layers")),
    ),
    "swin": Row(
        of(
            "SwinForImageClassification",
            image_size=32,
            patch_size=4,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=2,
        ),
        lambda count: {"pixel_values": values(count, 3, 32, 32), "labels": torch.arange(count) % 2},
        (*blocks("swin.encoder.layers.0.blocks"), *blocks("swin.encoder.layers.1.blocks")),
    ),
}
