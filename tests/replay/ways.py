"""Ways to train, one row each: a new mode is tested by adding a row."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from models.table import ROWS
from safetensors.torch import load_file
from trainable.modes import written_mask

from zo_offload.config import parse_config
from zo_offload.integrations.hf import load_model
from zo_offload.journal import Journal
from zo_offload.replay.command import ReplayOptions, replay
from zo_offload.step import Stepper

STEPS, BEFORE = 4, 3
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Way:
    """How a run trains.

    Attributes:
        block: Of its JSON.
        model: Of ``models``.
        base: Dtype of the checkpoint.
        forward: What forwards compute in.
        decay: Weight decay.
        lr: Learning rate.
        told: Whether the replay is given the run's JSON.
    """

    block: dict[str, Any] = field(default_factory=dict)
    model: str = "llama"
    base: torch.dtype = torch.float32
    forward: torch.dtype | None = None
    decay: float = 0.0
    lr: float = 1e-2
    told: bool = False

    @property
    def config(self) -> dict[str, Any]:
        precision = {BF16: {"bf16": {"enabled": True}}, torch.float16: {"fp16": {"enabled": True}}}
        block = {"eps": 1e-3, **self.block}
        chosen = precision.get(self.forward, {}) if self.forward is not None else {}
        return {"train_batch_size": 1, "zeroth_order": block, **chosen}


def trainable(mode: str = "full", **said: Any) -> dict[str, Any]:
    return {"trainable": {"mode": mode, **said}}


MOMENTUM = {"type": "momentum", "momentum": 0.5, "window": 3}
LORA = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"]}
WAYS = {
    "full": Way(decay=0.1),
    "probes": Way({"probes": 3, "direction": "gaussian"}),
    "tied": Way(model="gpt2"),
    "experts": Way(model="mixtral"),
    "experts-in-groups": Way({"unit": "linear", "update": {"lag": 2}}, model="mixtral", told=True),
    "bf16": Way(base=BF16, decay=0.1),
    "bf16-of-fp32": Way(forward=BF16),
    "fp16": Way(forward=torch.float16),
    "bf16+8": Way({"master": "bf16+8"}, base=BF16),
    "bf16_sr": Way({"master": "bf16_sr"}, base=BF16),
    "scaled": Way({"direction_scale": "relative", "eps": 0.1}, lr=1.0),
    "lag": Way({"update": {"lag": 2}}, decay=0.1),
    "momentum": Way({"update": MOMENTUM}),
    "momentum-lag": Way({"update": {**MOMENTUM, "lag": 2}}, base=BF16),
    "adam": Way({"update": {"type": "adam", "window": 3}}, lr=1e-4),
    "wire": Way({"wire": "int8"}, base=BF16),
    "sublayer-lag": Way({"unit": "sublayer", "update": {"lag": 2}}),
    "kinds": Way(trainable(kinds=["down_proj", "o_proj"])),
    "kinds-of-layers": Way({**trainable(kinds=["vector"], layers=[1]), "wire": "int8"}),
    "parameters-scaled": Way(
        {**trainable(parameters=["*.up_proj.*"]), "direction_scale": "rms"}, lr=1e-3
    ),
    "parameters": Way(trainable(parameters=["*.up_proj.*"]), told=True),
    "rotate": Way(trainable(rotate={"interval": 1}), decay=0.1),
    "low_rank": Way(trainable("low_rank", interval=2, momentum=0.5), decay=0.1),
    "sparse": Way({**trainable("sparse", mask=str(written_mask())), "wire": "nf4"}, told=True),
    "scales": Way({**trainable("scales"), "wire": "int8"}, base=BF16),
    "scales-of-kinds": Way({**trainable("scales", kinds=["down_proj"]), "wire": "int4"}),
    "lora": Way(trainable("peft", peft_config=LORA)),
    "lora-bf16": Way(trainable("peft", peft_config=LORA), base=BF16),
}


@dataclass(frozen=True)
class Run:
    """What a run left.

    Attributes:
        base: The model's directory that it began with.
        journal: Its record.
        config: Its JSON.
        exports: By number of steps, what it exported then.
    """

    base: Path
    journal: Path
    config: Path
    exports: dict[int, Path]

    def options(self, out: Path, **more: Any) -> ReplayOptions:
        return ReplayOptions(str(self.base), str(self.journal), str(out), **more)

    def replayed(self, out: Path, **more: Any) -> Path:
        return replay(self.options(out, **more)).directory


def train(way: Way, folder: Path, steps: int = STEPS, base: Path | None = None) -> Run:
    """Save a base, train on it, and export before the last step and at the end."""
    folder.mkdir(exist_ok=True)
    config, journal = folder / "ds.json", folder / "run.journal"
    row = ROWS[way.model]
    if base is None:
        base, saved = folder / "base", cast("Any", row.build(way.base))
        saved.save_pretrained(str(base))
    config.write_text(json.dumps(way.config))
    run = Run(base, journal, config, {})
    parsed = parse_config(way.config)
    if base.name != "base":  # an adapter's directory says itself what moves
        parsed = parse_config({"zeroth_order": {"eps": 1e-3}})
    with Stepper(load_model(base), parsed, dtype=way.forward) as stepper:
        stepper.follow(Journal.open(journal, stepper.bit_header()))
        for step in range(1, steps + 1):
            stepper.train_step([row.batch(6)], way.lr, way.decay)
            if step in (min(BEFORE, steps), steps):
                run.exports[step] = folder / f"export-{step}"
                stepper.trainable.save(stepper.model, stepper.weights, run.exports[step])
    return run


def content(directory: Path) -> dict[str, Any]:
    """Every file's, but the record of a replay."""
    paths = sorted(path for path in directory.iterdir() if path.name != "replay.json")
    return {path.name: path.read_bytes() for path in paths}


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        found |= load_file(path)
    return found
