"""Tune the weights that a mask names, over a base of four bits: python sparse.py MODEL MASK OUT.

MASK is a file of: zo-offload sensitivity --model MODEL --corpus TEXT --output MASK
"""

import sys

import torch
from transformers import AutoTokenizer

import zo_offload

if len(sys.argv) != 4:
    sys.exit(__doc__)
model, mask, output = sys.argv[1:]
TEXTS = ["The plot was great.", "A dull film.", "It was fun.", "Far too long."] * 8
CONFIG = {
    "train_batch_size": 8,
    # Few weights take the noise, so that lr is ten times and more that of full tuning.
    "optimizer": {"type": "ZO", "params": {"lr": 1e-3}},
    "zeroth_order": {
        "eps": 1e-3,
        "probes": 4,
        "wire": "nf4",
        "trainable": {"mode": "sparse", "mask": mask},
        "offload_param": {"device": "cpu"},
    },
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
    total = 0.0
    for batch in loader:
        batch = {name: value.to(engine.device) for name, value in batch.items()}
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        total += loss.item()
    print(f"epoch {epoch}: loss {total / len(loader):.4f}")
engine.save_pretrained(output)  # matrices as nf4 has them, the chosen weights exact
tokenizer.save_pretrained(output)
engine.destroy()
