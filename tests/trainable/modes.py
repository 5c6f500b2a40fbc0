"""What moves, one row a way to say it: a new one is tested by adding a row."""

import atexit
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from models.table import ROWS
from parity import plain
from torch import nn

from trainable.low_rank_loop import LowRankLoop
from zo_offload.config import ZOConfig
from zo_offload.mask import Chosen, Mask, Origin, write_mask
from zo_offload.step import Stepper

LR = 1e-2
MODEL = "llama"
BLOCK = "model.layers.{}."


class Own(nn.Module):
    """A block with a matrix of its own, which finer units leave outside."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(8, 8))
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner(x) @ self.own)


class Owners(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(Own() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.float().square().mean()


def anything(name: str, step: int) -> bool:
    return True


def frozen_but(name: str, *parts: str) -> bool:
    return any(part in name for part in parts)


@dataclass(frozen=True)
class Mode:
    """A way to say what moves.

    Attributes:
        trainable: The block of the JSON.
        moves: Whether a parameter of the trained model moves at a step.
        some: A parameter that moves at step 0.
        loop: Makes what takes steps as plainly as can be; see ``parity.plain``.
        block: Keys beside it that it needs.
    """

    trainable: dict[str, Any]
    moves: Callable[[str, int], bool]
    some: str
    loop: Callable[[], Callable[..., list[float]]] = lambda: plain.train_step
    block: dict[str, Any] = field(default_factory=dict)


def by_turns(name: str, step: int) -> bool:
    """Blocks 0 and 1, then what lies outside, two steps each."""
    places = [i for i in range(2) if name.startswith(BLOCK.format(i))]
    return (places[0] if places else 2) == step // 2 % 3


def lora(**more: Any) -> dict[str, Any]:
    return {"mode": "peft", "peft_config": {"peft_type": "LORA", "r": 4, **more}}


def prompt(kind: str, **more: Any) -> dict[str, Any]:
    return {"mode": "peft", "peft_config": {"peft_type": kind, "num_virtual_tokens": 3, **more}}


def model() -> nn.Module:
    return ROWS[MODEL].build()


def written_mask(every: int = 37, model: Callable[[], nn.Module] = model) -> Path:
    """One weight of so many, of all matrices of the blocks but the value projections."""
    chosen = {}
    for name, parameter in model().named_parameters():
        if parameter.ndim > 1 and "layers" in name and "v_proj" not in name:
            indices = torch.arange(len(name) % every, parameter.numel(), every)
            chosen[name] = Chosen(indices, torch.ones(len(indices)))
    folder = mkdtemp()
    atexit.register(shutil.rmtree, folder)
    path = Path(folder) / "mask.safetensors"
    write_mask(path, Mask(Origin("random", "matrix", 1 / every, 0), chosen))
    return path


def sparse(**more: Any) -> dict[str, Any]:
    return {"mode": "sparse", "mask": str(written_mask()), **more}


def low_rank(**more: Any) -> Mode:
    trainable = {"mode": "low_rank", **more}
    return Mode(trainable, anything, "model.layers.0.mlp.up_proj.weight", LowRankLoop)


MODES = {
    "full": Mode({}, anything, "model.embed_tokens.weight"),
    "parameters": Mode(
        {"parameters": ["*.self_attn.?_proj.weight", "lm_head*"]},
        lambda name, step: frozen_but(name, "self_attn", "lm_head"),
        "lm_head.weight",
    ),
    "layers": Mode(
        {"layers": [-1]},
        lambda name, step: name.startswith(BLOCK.format(1)),
        "model.layers.1.mlp.up_proj.weight",
    ),
    "parameters-of-layers": Mode(
        {"parameters": ["*.mlp.*", "*embed*"], "layers": ["0-0"]},
        lambda name, step: name.startswith(BLOCK.format(0)) and "mlp" in name,
        "model.layers.0.mlp.up_proj.weight",
    ),
    "rotate": Mode(
        {"rotate": {"blocks": 1, "interval": 2}}, by_turns, "model.layers.0.mlp.up_proj.weight"
    ),
    "rotate-of-parameters": Mode(
        {"rotate": {"interval": 1}, "parameters": ["*_proj.weight"]},
        lambda name, step: "_proj" in name and name.startswith(BLOCK.format(step % 2)),
        "model.layers.0.mlp.up_proj.weight",
    ),
    "lora": Mode(
        lora(),
        lambda name, step: "lora_" in name,
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight",
    ),
    "dora-of-one-layer": Mode(
        lora(use_dora=True, layers_to_transform=[0], target_modules=["q_proj", "down_proj"]),
        lambda name, step: "lora_" in name,
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight",
    ),
    "ia3": Mode(
        {"mode": "peft", "peft_config": {"peft_type": "IA3"}},
        lambda name, step: "ia3_" in name,
        "base_model.model.model.layers.0.self_attn.k_proj.ia3_l.default",
    ),
    "prefix": Mode(
        prompt("PREFIX_TUNING"),
        lambda name, step: name.startswith("prompt_encoder"),
        "prompt_encoder.default.embedding.weight",
    ),
    "prompt": Mode(
        prompt("PROMPT_TUNING"),
        lambda name, step: name.startswith("prompt_encoder"),
        "prompt_encoder.default.embedding.weight",
    ),
    "sparse": Mode(
        sparse(),
        lambda name, step: name.endswith(".sparse"),
        "model.layers.0.mlp.up_proj.weight.sparse",
    ),
    "sparse-beside-vectors": Mode(
        sparse(parameters=["*norm*"]),
        lambda name, step: name.endswith(".sparse") or "norm" in name,
        "model.layers.0.mlp.up_proj.weight.sparse",
    ),
    "low-rank": low_rank(interval=4),
    "low-rank-momentum": low_rank(rank=3, interval=2, momentum=0.75),
    "low-rank-of-parameters": Mode(
        {"mode": "low_rank", "interval": 1, "parameters": ["*.self_attn.*", "*norm*"]},
        lambda name, step: frozen_but(name, "self_attn", "norm"),
        "model.layers.0.self_attn.q_proj.weight",
        LowRankLoop,
    ),
    "scales": Mode(
        {"mode": "scales"},
        lambda name, step: name.endswith(".scales"),
        "model.layers.0.mlp.up_proj.weight.scales",
        block={"wire": "int4", "clip": 3.0},
    ),
    "scales-of-some": Mode(
        {"mode": "scales", "parameters": ["*.mlp.*"], "layers": [-1]},
        lambda name, step: name.endswith(".scales"),
        "model.layers.1.mlp.up_proj.weight.scales",
        block={"wire": "int8:64"},
    ),
}
PEFT = [name for name, mode in MODES.items() if mode.trainable.get("mode") == "peft"]
BATCH = ROWS[MODEL].batch(6)


def config_of(name: str, **more: Any) -> ZOConfig:
    mode = MODES[name]
    block = {"eps": 1e-2, "trainable": mode.trainable, **mode.block, **more}
    return ZOConfig.model_validate(block)


def stepper_of(name: str, dtype: torch.dtype | None = None, **more: Any) -> Stepper:
    """A fresh model in a mode; ``more`` are keys of the block."""
    return Stepper(model(), config_of(name, **more), dtype=dtype)


def masters(stepper: Stepper) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in stepper.weights.masters()}


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]
