"""Fine-tune on completions with TRL: python sft.py MODEL_DIR OUTPUT_DIR."""

import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import zo_offload

if len(sys.argv) != 3:
    sys.exit(__doc__)
zo_offload.install()  # before SFTConfig is made
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
pairs = [("The plot was great. It was", " great"), ("A dull film. It was", " terrible")] * 16
data = Dataset.from_list([{"prompt": prompt, "completion": end} for prompt, end in pairs])
arguments = SFTConfig(
    output_dir=sys.argv[2],
    max_steps=8,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    learning_rate=1e-5,
    lr_scheduler_type="constant",
    logging_steps=4,
    save_strategy="no",
    report_to="none",
    max_length=64,
    bf16=False,  # SFTConfig's default; with it, eps must be seen in bf16
    gradient_checkpointing=False,  # SFTConfig's default, without effect here
    deepspeed={
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": 0},
        "optimizer": {"type": "ZO", "params": {"lr": "auto", "weight_decay": "auto"}},
        "zeroth_order": {"eps": 1e-3, "offload_param": {"device": "cpu"}},
    },
)
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(sys.argv[1]),
    args=arguments,
    train_dataset=data,
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model()
