"""Fine-tune with ZeRO-Offload: deepspeed before.py MODEL_DIR OUTPUT_DIR."""

import sys

import deepspeed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.argv = [argument for argument in sys.argv if not argument.startswith("--local_rank")]
TEXTS = ["The plot was great.", "A dull film.", "It was fun.", "Far too long."] * 8


def collate(texts):
    """A padded batch; the padding is no label."""
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
engine, _, loader, _ = deepspeed.initialize(
    model=model,
    model_parameters=model.parameters(),
    training_data=TEXTS,
    collate_fn=collate,
    config="ds.json",
)
for epoch in range(2):
    for batch in loader:
        batch = {name: value.to(engine.device) for name, value in batch.items()}
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
    print(f"epoch {epoch}: loss {loss.item():.4f}")
engine.save_checkpoint(sys.argv[2])
