"""Fine-tune in a loop of accelerate: accelerate launch accelerate_loop.py MODEL_DIR OUTPUT_DIR."""

import sys

from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DummyOptim
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
)

import zo_offload

if len(sys.argv) != 3:
    sys.exit(__doc__)
zo_offload.install()  # before the Accelerator is made
config = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 2,
    "zero_optimization": {"stage": 0},
    "optimizer": {"type": "ZO", "params": {"lr": "auto"}},
    "zeroth_order": {"eps": 1e-3, "offload_param": {"device": "cpu"}},
}
accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
data = [tokenizer(text) for text in ["The plot was great.", "A dull film."] * 16]
collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
loader = DataLoader(data, batch_size=4, shuffle=True, collate_fn=collate)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
optimizer = DummyOptim(model.parameters(), lr=1e-5)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for batch in loader:
    with accelerator.accumulate(model):
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    if accelerator.sync_gradients:
        accelerator.print(f"step {model.global_steps}: loss {loss.item():.4f}")
model.save_pretrained(sys.argv[2])
model.destroy()
