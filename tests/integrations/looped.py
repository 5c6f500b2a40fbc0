"""A loop of accelerate on some ranks; what each of them came to, as JSON."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin, DummyOptim

import zo_offload
from integrations import stock


def main(folder: str, accumulation: int) -> None:
    """The rows of ``stock``, two a micro-batch, ``accumulation`` of them on each rank a step."""
    torch.set_num_threads(1)
    zo_offload.install()
    PartialState(cpu=True)  # else accelerate would take each rank for the only one
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": 0},
        "optimizer": {"type": "ZO", "params": {"lr": 0.01}},
        "zeroth_order": {"offload_param": {"device": "cpu"}},
    }
    rows: Any = stock.sentences(16)
    loader = torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=stock.padded)
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    given = stock.llama()
    model, optimizer, batches = accelerator.prepare(given, DummyOptim(given.parameters()), loader)
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    mine = torch.tensor([float(accelerator.process_index)])
    gathered: Any = accelerator.gather(mine)
    found = {
        "rank": accelerator.process_index,
        "ranks": accelerator.num_processes,
        "grads": [record.probes[0].projected_grad for record in model.stepper.journal.records],
        "weights": model.stepper.weights.digest(),
        "gathered": gathered.tolist(),
    }
    Path(folder, f"rank-{found['rank']}.json").write_text(json.dumps(found))
    model.destroy()
