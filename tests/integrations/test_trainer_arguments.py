"""TrainingArguments that act, that act on nothing, that are refused; accelerate alone."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DummyOptim
from engine.common import same, weights
from peft import LoraConfig, get_peft_model

import zo_offload
from integrations import stock
from zo_offload.errors import ConfigError, ModelError

WITHOUT_EFFECT: dict[str, Any] = {
    "optim": "sgd",
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "adam_epsilon": 0.1,
    "max_grad_norm": 1e-6,
    "activation_checkpointing": True,
    "torch_empty_cache_steps": 1,
    "neftune_noise_alpha": 5.0,
    "ddp_find_unused_parameters": True,
}


def steps(trainer: Any) -> list[Any]:
    return list(trainer.model_wrapped.stepper.journal.records)


def test_what_has_nothing_to_act_on_changes_no_bit(trained):
    plain, other = trained(), trained(**WITHOUT_EFFECT)
    assert steps(plain) == steps(other)
    assert same(weights(plain.model_wrapped), weights(other.model_wrapped))


@pytest.mark.parametrize(
    ("given", "rates"),
    [
        ({"lr_scheduler_type": "constant"}, [0.5, 0.5, 0.5, 0.5]),
        ({"lr_scheduler_type": "linear"}, [0.5, 0.375, 0.25, 0.125]),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}, [0.0, 0.25, 0.5, 0.5]),
    ],
)
def test_the_schedule_is_that_of_the_arguments(trained, given: dict[str, Any], rates: list[float]):
    trainer = trained(max_steps=4, learning_rate=0.5, weight_decay=0.25, **given)
    assert [record.lr for record in steps(trainer)] == pytest.approx(rates)
    assert trainer.model_wrapped.optimizer.param_groups[0]["weight_decay"] == 0.25


def test_the_schedule_of_the_json_is_taken_with_auto(trained):
    params = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}
    scheduler = {"type": "WarmupLR", "params": {**params, "warmup_type": "linear"}}
    trainer = trained(stock.ds(scheduler=scheduler), max_steps=3, learning_rate=0.5, warmup_steps=2)
    rates = [0.0, 0.0, 0.25]  # DeepSpeed's own first step is one before its schedule
    assert [record.lr for record in steps(trainer)] == pytest.approx(rates)


@pytest.mark.parametrize(
    ("argument", "dtype", "more"),
    [
        ("bf16", torch.bfloat16, {}),
        ("fp16", torch.float16, {"fp16": {"enabled": "auto"}}),
    ],
)
def test_half_precision_is_what_forwards_compute_in(
    trained, argument: str, dtype: torch.dtype, more: dict[str, Any]
):
    """With "auto" in the JSON, and with nothing."""
    trainer = trained(stock.ds(**more), max_steps=1, **{argument: True})
    seen = []
    head = trainer.model.lm_head.register_forward_hook(lambda _, given, out: seen.append(given[0]))
    with torch.no_grad():
        trainer.model_wrapped(input_ids=torch.tensor([[3, 4]]))
    head.remove()
    assert [hidden.dtype for hidden in seen] == [dtype]


def test_an_adapter_moves_and_is_saved(trained, tmp_path):
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(stock.llama(), lora)
    trainer = trained(parts={"model": model}, save_strategy="steps", save_steps=2)
    assert any(name.endswith("lora_B.default.weight") for name in weights(trainer.model_wrapped))
    (saved,) = tmp_path.glob("out0/checkpoint-*")
    names = {path.name for path in saved.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= names
    assert "model.safetensors" not in names


def without_optimizer() -> dict[str, Any]:
    config = stock.ds()
    del config["optimizer"]
    return config


def test_an_optimizer_of_the_trainer_gives_its_rate(trained):
    trainer = trained(without_optimizer(), optim="sgd", learning_rate=0.5, max_steps=2)
    assert [record.lr for record in steps(trainer)] == [0.5, 0.25]


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "torch_compile": ({"torch_compile": True}, ModelError, "compile: .*block.compile"),
    "plateau": (
        {
            "lr_scheduler_type": "reduce_lr_on_plateau",
            "eval_strategy": "steps",
            "eval_steps": 1,
        },
        ConfigError,
        "ReduceLROnPlateau asks for a metric .*lr_scheduler_type",
    ),
    "lomo": ({"optim": "lomo"}, ConfigError, 'given a learning rate .*"lomo".*; leave optim out'),
    "adalomo": ({"optim": "adalomo"}, ConfigError, "; leave optim out"),
    "decay of some": (
        {"deepspeed": without_optimizer(), "weight_decay": 0.1},
        ConfigError,
        'differ in weight_decay .*"type": "ZO"',
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(trained, name: str):
    given, kind, said = REFUSED[name]
    with pytest.raises(kind, match=said):
        trained(**given)


def test_a_plain_loop_of_accelerate(stand_in, no_deepspeed):
    """Takes the steps that a loop over the engine takes."""
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": 0},
        "optimizer": {"type": "ZO", "params": {"lr": 0.01}},
        "zeroth_order": {},
    }
    rows = stock.sentences(8)
    loader = torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=stock.padded)  # pyright: ignore[reportArgumentType]
    no_deepspeed()
    plugin = DeepSpeedPlugin(hf_ds_config=dict(config))
    accelerator = Accelerator(deepspeed_plugin=plugin)
    given = stock.llama()
    model, optimizer, batches = accelerator.prepare(given, DummyOptim(given.parameters()), loader)
    norms = []
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                norms.append(accelerator.clip_grad_norm_(model.parameters(), 1.0))
            optimizer.step()
            optimizer.zero_grad()
    plain, *_ = zo_offload.initialize(
        model=stock.llama(), config={**config, "train_micro_batch_size_per_gpu": 2}
    )
    for batch in loader:
        plain.backward(plain(**batch).loss)
        plain.step()
    records = list(plain.stepper.journal.records)
    assert list(model.stepper.journal.records) == records
    assert norms == [abs(record.probes[0].projected_grad) for record in records]
    assert len(records) == 2
    plain.destroy()
    model.destroy()
