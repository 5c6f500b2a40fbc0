"""A small net, a small OPT, batches and configs for both."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import OPTForCausalLM

LR = 1e-3


@dataclass
class Output:
    """Like a Hugging Face output: a loss where there were labels."""

    logits: torch.Tensor
    loss: torch.Tensor | None = None


class Net(nn.Module):
    """Three smooth blocks; small enough that autograd and differences agree to four digits."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.inputs = nn.Linear(width, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Output:
        x = self.inputs(x)
        for block in self.blocks:
            x = x + torch.tanh(block(self.dropout(x)))
        return Output(x, None if labels is None else functional.cross_entropy(x, labels))


def net(seed: int = 0) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net()


def batch(number: int = 0, size: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {
        "x": torch.randn(size, 8, generator=generator),
        "labels": torch.randint(8, (size,), generator=generator),
    }


def opt(seed: int = 0) -> "OPTForCausalLM":
    from transformers import OPTConfig, OPTForCausalLM  # two seconds that a rank of the net saves

    config = OPTConfig(
        vocab_size=64,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        init_std=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return OPTForCausalLM(config).eval()


def tokens(number: int = 0, size: int = 4) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 64, (size, 10), generator=torch.Generator().manual_seed(number))
    return {"input_ids": ids, "labels": ids}


def config(gas: int = 1, probes: int = 1, **more: Any) -> dict[str, Any]:
    """A JSON; ``zeroth_order`` and other blocks are merged into it."""
    block = {"probes": probes, **more.pop("zeroth_order", {})}
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": gas,
        "optimizer": {"type": "ZO", "params": {"lr": LR}},
        "zeroth_order": block,
        **more,
    }


def weights(engine: Any) -> dict[str, torch.Tensor]:
    """The exact masters, copied."""
    return {name: value.clone() for name, value in engine.stepper.weights.masters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
