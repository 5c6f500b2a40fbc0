"""A stock Trainer on the engine, as a user would write it; what came of it, as JSON.

python train.py '{"output": DIR, "steps": 20, "resume": true, ...}'
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from engine.common import opt, tokens
from transformers import Trainer, TrainerCallback, TrainingArguments

import zo_offload


class Sentences(torch.utils.data.Dataset):
    """Rows of tokens; row i is a function of i."""

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value[0] for name, value in tokens(self.first + index, size=1).items()}


class Die(TrainerCallback):
    """SIGKILL after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main(job: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    zo_offload.install()
    deepspeed = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": 0},
        "optimizer": {"type": "ZO", "params": {"lr": "auto"}},
        "zeroth_order": {"eps": 1e-3, "offload_param": {"device": "cpu"}},
        **job.get("deepspeed", {}),
    }
    arguments = TrainingArguments(
        output_dir=job["output"],
        max_steps=job["steps"],
        per_device_train_batch_size=job.get("micro_batch", 2),
        gradient_accumulation_steps=job.get("accumulation", 2),
        learning_rate=1e-3,
        eval_strategy="steps",
        eval_steps=5,
        save_steps=5,
        save_total_limit=2,
        logging_steps=5,
        load_best_model_at_end=job.get("best", False),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        deepspeed=deepspeed,
    )
    trainer = Trainer(
        model=opt(),
        args=arguments,
        train_dataset=Sentences(0, 37),
        eval_dataset=Sentences(100, 8),
        callbacks=[Die(job["die"])] if "die" in job else [],
    )
    result = trainer.train(resume_from_checkpoint=job.get("resume", False))
    engine: Any = trainer.model_wrapped
    report = {
        "weights": digest(engine),
        "steps": engine.global_steps,
        "loss": result.training_loss,
        "log": [
            {key: entry[key] for key in ("step", "loss", "eval_loss", "grad_norm", "learning_rate")
             if key in entry}
            for entry in trainer.state.log_history
        ],
        "logged": sorted({key for entry in trainer.state.log_history for key in entry}),
        "checkpoints": sorted(path.name for path in Path(job["output"]).glob("checkpoint-*")),
    }  # fmt: skip
    (Path(job["output"]) / f"rank-{engine.global_rank}.json").write_text(json.dumps(report))
    engine.destroy()
    zo_offload.uninstall()


def digest(engine: Any) -> str:
    total = hashlib.sha256()
    for name, value in engine.stepper.weights.masters():
        total.update(name.encode() + value.contiguous().numpy().tobytes())
    return total.hexdigest()


if __name__ == "__main__":
    main(json.loads(sys.argv[-1]))
