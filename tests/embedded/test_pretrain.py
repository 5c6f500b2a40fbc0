"""The model that is made on the spot: it loads as any other, and appears whole or not at all."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from zo_offload.embedded import grammar
from zo_offload.embedded.pretrain import (
    BATCH,
    DEV_SENTENCES,
    END,
    TRAIN_SENTENCES,
    VOCABULARY,
    build_model,
    make_embedded,
    pretrain,
)
from zo_offload.errors import ConfigError


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("embedded") / "a" / "b"
    make_embedded(directory, steps=2, layers=1)
    return directory


def test_it_loads_with_the_auto_classes(made: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    model = AutoModelForCausalLM.from_pretrained(made / "model")
    assert type(model).__name__ == "OPTForCausalLM"
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2, 2)
    assert (model.config.pad_token_id, model.config.bos_token_id) == (1, 2)
    assert len(tokenizer) <= VOCABULARY == model.config.vocab_size
    ids = tokenizer("The soup was good.")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "The soup was good."
    assert model(torch.tensor([ids])).logits.isfinite().all()


def test_label_words_are_single_tokens(made: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    for word in grammar.LABEL_WORDS:
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1


def test_the_task_is_written_as_tsv(made: Path) -> None:
    seen: set[str] = set()
    for name, count in (("train", TRAIN_SENTENCES), ("dev", DEV_SENTENCES)):
        header, *rows = (made / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
        assert header == "sentence\tlabel"
        assert len(rows) == count
        pairs = [row.split("\t") for row in rows]
        assert sum(label == "1" for _, label in pairs) == sum(label == "0" for _, label in pairs)
        sentences = {sentence for sentence, _ in pairs}
        assert len(sentences) == count
        assert not sentences & seen
        seen |= sentences


def test_same_seed_same_files(made: Path, tmp_path: Path) -> None:
    make_embedded(tmp_path / "again", steps=2, layers=1)
    assert contents(tmp_path / "again") == contents(made)


def test_what_is_complete_is_kept(made: Path) -> None:
    before = (made / "model" / "model.safetensors").stat()
    make_embedded(made, steps=2, layers=1, progress=lambda *_: pytest.fail("trained again"))
    after = (made / "model" / "model.safetensors").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def interrupt(step: int, steps: int, loss: float) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_run_leaves_nothing_in_place(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make_embedded(tmp_path / "embedded", steps=2, layers=1, progress=interrupt)
    assert not (tmp_path / "embedded").exists()
    make_embedded(tmp_path / "embedded", steps=0, layers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["embedded"]


def test_another_seed_replaces_the_old_one_once_it_is_complete(tmp_path: Path) -> None:
    directory = tmp_path / "embedded"
    make_embedded(directory, steps=0, layers=1)
    before = contents(directory)
    with pytest.raises(KeyboardInterrupt):
        make_embedded(directory, seed=1, steps=1, layers=1, progress=interrupt)
    assert contents(directory) == before
    make_embedded(directory, seed=1, steps=0, layers=1)
    after = contents(directory)
    for name in ("train.tsv", "dev.tsv", "model/model.safetensors", "model/tokenizer.json"):
        assert after[name] != before[name]


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"has no recipe\.json, so it is not a quick-start model"):
        make_embedded(tmp_path, steps=0, layers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_training_lowers_the_loss_and_touches_no_global_generator() -> None:
    losses: list[float] = []
    before = torch.get_rng_state()
    model = build_model(0, layers=1)
    pretrain(
        model, [[END, 5, 6, END]] * 10 * BATCH, progress=lambda _, __, loss: losses.append(loss)
    )
    assert len(losses) == 10
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(torch.get_rng_state(), before)
