"""TRL's SFTTrainer: its losses against autograd, its metrics, what it saves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from parity.plain import noise
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from integrations import conftest, stock
from integrations.test_trainer_losses import gradient_along
from zo_offload.config import ZOConfig

trl = pytest.importorskip("trl", reason="trl is missing (pip install --no-deps trl)")
pytestmark = pytest.mark.filterwarnings(
    # what SFTConfig switches on is about to have another name in transformers
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning"
)

EPS = 5e-4
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '</s>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
PAIRS = [{"prompt": f"two plus {i} is", "completion": f" {i + 2}."} for i in range(8)]
TEXTS = [{"text": f"two plus {i} is {i + 2}. " * (1 + i % 3)} for i in range(8)]
TALKS = [
    {
        "messages": [
            {"role": "user", "content": f"two plus {i}?"},
            {"role": "assistant", "content": f"{i + 2}."},
        ]
    }
    for i in range(8)
]
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "completions": (PAIRS, {}),
    "whole texts": (TEXTS, {}),
    "packed": (TEXTS, {"packing": True}),
    "what the assistant says": (TALKS, {"assistant_only_loss": True}),
    "dft": (PAIRS, {"loss_type": "dft"}),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte."""
    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bpe = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = TEMPLATE
    return made


def llama() -> Any:
    config = LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
        initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def sft(output: Path, deepspeed: dict[str, Any] | None, rows: list, **more: Any) -> Any:
    given = {
        "output_dir": str(output), "max_steps": 1, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True,
        "bf16": False, "max_length": 64, "train_sampling_strategy": "sequential",
        "deepspeed": deepspeed, **more,
    }  # fmt: skip
    data = Dataset.from_list(rows)
    return trl.SFTTrainer(
        llama(), trl.SFTConfig(**given), train_dataset=data, eval_dataset=data,
        processing_class=tokenizer(),
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("stand_in")
def test_it_follows_what_sft_does_to_the_loss(no_deepspeed, tmp_path: Path, name: str):
    rows, more = CASES[name]
    trainer = sft(tmp_path / "ours", stock.ds({"eps": EPS}), rows, **more)
    try:
        trainer.train()
        (record,) = trainer.model_wrapped.stepper.journal.records
        no_deepspeed()
        plain = sft(tmp_path / "plain", None, rows, gradient_checkpointing=False, **more)
        batches = [batch for batch, _ in zip(plain.get_train_dataloader(), range(2), strict=False)]
        along = gradient_along(plain, noise(plain.model, ZOConfig(), (0, 0), 1.0, {}), batches)
        assert record.probes[0].projected_grad == pytest.approx(along, rel=5e-3, abs=5e-3)
    finally:
        conftest.end(trainer)


@pytest.mark.usefixtures("stand_in")
def test_metrics_of_training_and_evaluation_are_told_apart(tmp_path: Path):
    trainer = sft(tmp_path, stock.ds(), PAIRS, eval_strategy="steps", eval_steps=1)
    try:
        trainer.train()
        training, evaluation, *_ = trainer.state.log_history
        assert {"loss", "grad_norm", "entropy", "mean_token_accuracy"} <= training.keys()
        assert training["num_tokens"] > 0
        assert {"eval_loss", "eval_entropy", "eval_mean_token_accuracy"} <= evaluation.keys()
        assert not training.keys() & {"eval_entropy", "eval_num_tokens"}
    finally:
        conftest.end(trainer)
