"""A whole run of the stock Trainer: what callbacks, monitors, evaluation and files are told."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util import tensor_util
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from integrations import conftest, stock

SENTENCES, EPOCHS, STEPS = 12, 2, 6  # of two micro-batches of two sentences each
RATE = 0.01


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a number; it pads."""
    words = models.WordLevel({str(number): number for number in range(48)}, "3")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), pad_token="2", bos_token="0", eos_token="1"
    )


class Seen(TrainerCallback):
    """Everything that callbacks are told, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append({"step": state.global_step, **logs})


def _noted(name: str) -> Any:
    def note(self: Seen, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.calls.append((name, state.global_step))

    return note


for _name in ("step_begin", "pre_optimizer_step", "optimizer_step", "step_end", "evaluate", "save"):
    setattr(Seen, f"on_{_name}", _noted(_name))


def accuracy(predictions: Any) -> dict[str, float]:
    found = predictions.predictions.argmax(-1) == predictions.label_ids
    return {"accuracy": float(found.mean()), "count": len(found)}


def classifier() -> Any:
    return stock.llama(LlamaForSequenceClassification, num_labels=3)


@pytest.fixture(scope="module")
def run(stand_in: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The Trainer, its callback and its folder, after a run with all that this file asks about."""
    folder, seen = tmp_path_factory.mktemp("run"), Seen()
    parts = {
        "model": classifier(),
        "train_dataset": stock.sentences(SENTENCES, classes=3),
        "eval_dataset": stock.sentences(6, classes=3),
        "data_collator": DataCollatorWithPadding(tokenizer()),
        "compute_metrics": accuracy,
        "callbacks": [seen],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "events"))
        trainer = stock.trainer(
            folder, stock.ds(), parts, num_train_epochs=EPOCHS, max_steps=-1, learning_rate=RATE,
            train_sampling_strategy="group_by_length", eval_on_start=True, eval_strategy="epoch",
            save_strategy="epoch", metric_for_best_model="loss", load_best_model_at_end=True,
            report_to=["tensorboard"],
        )  # fmt: skip
        trainer.train()
    yield trainer, seen, folder
    conftest.end(trainer)


def test_callbacks_come_in_their_order(run):
    _, seen, _ = run
    step = ["step_begin", "pre_optimizer_step", "optimizer_step", "step_end"]
    names = [name for name, _ in seen.calls]
    epoch = [*step * (STEPS // EPOCHS), "evaluate", "save"]
    assert names == ["evaluate", *epoch * EPOCHS]
    assert [step for name, step in seen.calls if name == "save"] == [3, 6]


def test_what_is_logged_is_what_the_engine_did(run):
    """At the end the engine stands at the best tag; the other records are in the last one's."""
    trainer, seen, _ = run
    logs = [entry for entry in seen.logs if "grad_norm" in entry]
    assert [entry["step"] for entry in logs] == list(range(1, STEPS + 1))
    records = list(trainer.model_wrapped.stepper.journal.records)
    assert len(records) >= STEPS // EPOCHS
    for entry, record in zip(logs, records, strict=False):
        assert entry["grad_norm"] == abs(record.probes[0].projected_grad)
        assert entry["loss"] == pytest.approx(np.mean(record.losses), rel=1e-5)
        # DeepSpeed's engine has moved the schedule on by then: it is the next step's
        assert entry["learning_rate"] == pytest.approx(record.lr - RATE / STEPS)


def test_it_evaluates_at_the_start_and_after_epochs_with_metrics(run):
    _, seen, _ = run
    found = [entry for entry in seen.logs if "eval_accuracy" in entry]
    assert [entry["step"] for entry in found] == [0, 3, 6]
    assert {entry["eval_count"] for entry in found} == {6}
    assert len({entry["eval_loss"] for entry in found}) == 3


def test_the_best_is_put_back_and_predicts(run):
    trainer, seen, _ = run
    losses = {e["step"]: e["eval_loss"] for e in seen.logs if e.get("eval_loss") and e["step"]}
    best = min(losses, key=losses.__getitem__)
    assert trainer.model_wrapped.global_steps == best
    predicted = trainer.predict(trainer.eval_dataset)
    assert predicted.metrics["test_loss"] == pytest.approx(losses[best], rel=1e-5)
    assert predicted.predictions.shape == (6, 3)


def test_what_is_saved_is_a_plain_model_that_predicts_the_same(run, tmp_path: Path):
    trainer, _, _ = run
    trainer.save_model(str(tmp_path))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    batch = trainer.data_collator(trainer.eval_dataset)
    with torch.inference_mode():
        logits = model(**batch).logits
    predicted = trainer.predict(trainer.eval_dataset).predictions
    # by length the Trainer sorts what it predicts, too
    found, expected = (np.sort(each, axis=0) for each in (predicted, logits.numpy()))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_tensorboard_has_the_curves(run):
    _, seen, folder = run
    (path,) = (folder / "events").glob("events.*")
    curves: dict[str, dict[int, float]] = {}
    for event in EventFileLoader(str(path)).Load():
        for value in event.summary.value:
            if value.HasField("tensor") and value.tag.startswith(("train/", "eval/")):
                number = float(tensor_util.make_ndarray(value.tensor))
                curves.setdefault(value.tag, {})[event.step] = number
    for name in ("loss", "learning_rate", "grad_norm"):
        logged = {e["step"]: e[name] for e in seen.logs if name in e}
        assert curves[f"train/{name}"] == pytest.approx(logged, rel=1e-6)
    assert sorted(curves["eval/accuracy"]) == [0, 3, 6]


class Controls(TrainerCallback):
    """Evaluates and saves after step 1, ends after step 2."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_evaluate = control.should_save = state.global_step == 1
        control.should_training_stop = state.global_step == 2


def test_callbacks_are_obeyed_and_a_run_goes_on_from_what_they_saved(trained, tmp_path: Path):
    whole = trained(max_steps=4)
    stopped = trained(max_steps=4, parts={"callbacks": [Controls()]})
    assert stopped.model_wrapped.global_steps == stopped.state.global_step == 2
    assert [e["step"] for e in stopped.state.log_history if "eval_loss" in e] == [1]
    folder = Path(stopped.args.output_dir)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-1"]
    again: Any = stock.trainer(folder, stock.ds(), max_steps=4)
    try:
        again.train(resume_from_checkpoint=True)
        records = [t.model_wrapped.stepper.journal.records for t in (whole, again)]
        assert list(records[0]) == list(records[1])
    finally:
        conftest.end(again)


def test_only_the_model_is_saved_and_no_run_goes_on_from_it(trained):
    trainer = trained(max_steps=1, save_strategy="steps", save_steps=1, save_only_model=True)
    saved = Path(str(trainer.args.output_dir)) / "checkpoint-1"
    names = {path.name for path in saved.iterdir()}
    assert "model.safetensors" in names
    assert not any(path.is_dir() for path in saved.iterdir())
    again: Any = stock.trainer(saved.parent, stock.ds(), max_steps=2)
    try:
        with pytest.raises(ValueError, match="valid checkpoint"):
            again.train(resume_from_checkpoint=True)
    finally:
        conftest.end(again)
