"""Each rank takes texts of its own, and they exchange a few bytes a step.

deepspeed --hostfile hostfile train.py MODEL_DIR OUTPUT_DIR
"""

import os
import sys

import torch
from transformers import AutoTokenizer

import zo_offload

sys.argv = [argument for argument in sys.argv if not argument.startswith("--local_rank")]
if len(sys.argv) != 3:
    sys.exit(__doc__)
model, output = sys.argv[1:]
is_first = os.environ.get("RANK", "0") == "0"
TEXTS = ["The plot was great.", "A dull film.", "It was fun.", "Far too long."] * 8
CONFIG = {
    "train_batch_size": 8,  # of all ranks together: two micro-batches, wherever they run
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "ZO", "params": {"lr": 1e-3}},
    "zeroth_order": {"eps": 1e-3, "offload_param": {"device": "cpu"}},
}


def collate(texts: list[str]) -> dict[str, torch.Tensor]:
    """A padded batch; the padding is no label."""
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return dict(batch)


tokenizer = AutoTokenizer.from_pretrained(model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
engine, _, loader, _ = zo_offload.initialize(
    model=model, config=CONFIG, training_data=TEXTS, collate_fn=collate
)
for epoch in range(4):
    for _ in range(len(TEXTS) // engine.train_batch_size()):
        loss = engine.train_batch()  # of the engine's own loader; the mean over all ranks
    if is_first:
        print(f"epoch {epoch}: loss {loss.item():.4f}")
engine.save_pretrained(output)  # the first rank writes
if is_first:
    tokenizer.save_pretrained(output)
engine.destroy()
