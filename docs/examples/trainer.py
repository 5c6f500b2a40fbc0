"""Fine-tune with the Trainer of transformers: python trainer.py MODEL_DIR OUTPUT_DIR."""

import sys

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import zo_offload

if len(sys.argv) != 3:
    sys.exit(__doc__)
zo_offload.install()  # before TrainingArguments are made
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
data = [tokenizer(text) for text in ["The plot was great.", "A dull film."] * 16]
arguments = TrainingArguments(
    output_dir=sys.argv[2],
    max_steps=8,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    learning_rate=1e-5,
    lr_scheduler_type="constant",
    eval_strategy="steps",
    eval_steps=4,
    logging_steps=4,
    save_strategy="no",
    report_to="none",
    deepspeed={
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": 0},
        "optimizer": {"type": "ZO", "params": {"lr": "auto", "weight_decay": "auto"}},
        "zeroth_order": {"eps": 1e-3, "offload_param": {"device": "cpu"}},
    },
)
trainer = Trainer(
    model=AutoModelForCausalLM.from_pretrained(sys.argv[1]),
    args=arguments,
    train_dataset=data,
    eval_dataset=data[:2],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()
trainer.save_model()
tokenizer.save_pretrained(sys.argv[2])
