"""A small Llama, sentences of unequal length, and Trainers on the engine and without it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import zo_offload

LENGTHS = (12, 3, 7, 5, 11, 4, 9, 6)
MASKED = -100


def llama_config(**more: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        initializer_range=0.3, bos_token_id=0, eos_token_id=1, pad_token_id=2, **more,
    )  # fmt: skip


def llama(make: Callable[[Any], Any] = LlamaForCausalLM, **more: Any) -> Any:
    """The same weights at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(llama_config(**more)).eval()


def sentences(count: int = 24, classes: int = 0) -> list[dict[str, Any]]:
    """Of 3 to 12 tokens; the labels are the tokens, or one of ``classes``."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(count):
        length = (LENGTHS[i % len(LENGTHS)],)
        ids = torch.randint(3, 48, length, generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": int(ids[0] % classes) if classes else ids})
    return rows


def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch as long as its longest row."""
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(name: str, value: int) -> torch.Tensor:
        return torch.tensor([[*row[name], *[value] * (longest - len(row[name]))] for row in rows])

    labels = filled("labels", MASKED)
    return {
        "input_ids": filled("input_ids", 2),
        "attention_mask": (labels != MASKED).long(),
        "labels": labels,
    }


def ds(block: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A JSON as configs/trainer.json, without offloading."""
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": 0},
        "optimizer": {"type": "ZO", "params": {"lr": "auto", "weight_decay": "auto"}},
        "zeroth_order": block or {},
        **more,
    }


def arguments(output: Path, deepspeed: dict[str, Any] | None, **more: Any) -> TrainingArguments:
    """Two steps of two micro-batches of two sentences in their order; logged, nothing saved."""
    return TrainingArguments(
        **{
            "output_dir": str(output),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "train_sampling_strategy": "sequential",
            "disable_tqdm": True,
            "use_cpu": True,
            "deepspeed": deepspeed,
            **more,
        }
    )


def trainer(
    output: Path, deepspeed: dict[str, Any] | None = None, parts: dict | None = None, **more: Any
) -> Trainer:
    """``parts`` go to the Trainer, the rest to its arguments."""
    given = {
        "model": llama(),
        "train_dataset": sentences(),
        "eval_dataset": sentences(6),
        "data_collator": padded,
        **(parts or {}),
    }
    return Trainer(args=arguments(output, deepspeed, **more), **given)


def main(job: dict[str, Any]) -> None:
    """Of a rank: the projected gradients of a run go to a file of ``output``."""
    torch.set_num_threads(1)
    zo_offload.install()
    made: Any = trainer(Path(job["output"]), ds(), **job["arguments"])
    made.train()
    engine = made.model_wrapped
    found = [record.probes[0].projected_grad for record in engine.stepper.journal.records]
    Path(job["output"], f"found-{engine.global_rank}.json").write_text(json.dumps(found))
    engine.destroy()
