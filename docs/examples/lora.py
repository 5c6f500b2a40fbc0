"""Tune a LoRA adapter, and load it in plain peft: python lora.py MODEL_DIR OUTPUT_DIR."""

import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import zo_offload

TEXTS = ["The plot was great.", "A dull film.", "It was fun.", "Far too long."] * 8
CONFIG = {
    "train_batch_size": 8,
    "optimizer": {"type": "ZO", "params": {"lr": 1e-2}},
    # B of LoRA begins at zero: a wide eps, and several probes, so that the first steps say enough.
    "zeroth_order": {"eps": 1e-2, "probes": 4, "offload_param": {"device": "cpu"}},
}


def collate(texts: list[str]) -> dict[str, torch.Tensor]:
    """A padded batch; the padding is no label."""
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return dict(batch)


def loss_of(model) -> float:
    """Of all texts; an engine is called as its model is."""
    batch = {name: value.to(model.device) for name, value in collate(TEXTS).items()}
    with torch.no_grad():
        return model(**batch).loss.item()


if len(sys.argv) != 3:
    sys.exit(__doc__)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
engine, _, loader, _ = zo_offload.initialize(
    model=get_peft_model(base, adapter), config=CONFIG, training_data=TEXTS, collate_fn=collate
)
print(f"loss before: {loss_of(engine):.4f}")
for _ in range(5):  # passes over the texts
    for batch in loader:
        batch = {name: value.to(engine.device) for name, value in batch.items()}
        engine.backward(engine(**batch).loss)
        engine.step()
print(f"loss after: {loss_of(engine):.4f}")
engine.save_pretrained(sys.argv[2])  # adapter_config.json, adapter_model.safetensors
engine.destroy()

plain = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(f"loss in plain peft: {loss_of(PeftModel.from_pretrained(plain, sys.argv[2])):.4f}")
