"""Fine-tune without DeepSpeed: python plain_loop.py MODEL_DIR OUTPUT_DIR."""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from zo_offload import Stepper, ZOConfig

if len(sys.argv) != 3:
    sys.exit(__doc__)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
batch = tokenizer(["The plot was great.", "A dull film."], return_tensors="pt", padding=True)
batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
config = ZOConfig(
    eps=0.1,
    probes=4,
    direction_scale="relative",
    trainable={"kinds": ["o_proj", "down_proj"]},
    offload_param={"device": "cpu"},
)
with Stepper(model, config) as stepper:
    for _ in range(20):
        result = stepper.train_step([batch], lr=0.5)
        print(f"step {result.step}: loss {result.loss:.4f}")
model.save_pretrained(sys.argv[2])
tokenizer.save_pretrained(sys.argv[2])
