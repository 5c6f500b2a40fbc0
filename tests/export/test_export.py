"""What was trained, loaded by the libraries that it was exported for, computes what the run did."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from cli.common import tree
from limits import at_most
from models.table import ROWS
from peft import PeftModel
from replay.ways import BF16, WAYS, Way
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from zo_offload import checkpoint
from zo_offload.config import parse_config
from zo_offload.convert import convert
from zo_offload.errors import CheckpointError, ConfigError, ModelError, ZOError
from zo_offload.export import delta as deltas
from zo_offload.export.command import ADAPTER, CARD, ExportOptions, export
from zo_offload.integrations.hf import load_model
from zo_offload.journal import Journal
from zo_offload.replay.command import ReplayOptions, replay
from zo_offload.step import Stepper

SMALL = "8KiB"  # of a file, so that there are several


@dataclass(frozen=True)
class Tag:
    """A checkpoint, and what its run computed there.

    Attributes:
        way: How it trained.
        base: What it began with.
        directory: Of the tag.
        config: The run's JSON.
        logits: Of the run, for :func:`asked`.
    """

    way: Way
    base: Path
    directory: Path
    config: Path
    logits: torch.Tensor

    def export(self, output: Path, **changes: Any) -> Path:
        options = ExportOptions(str(self.directory), str(output), base=str(self.base))
        return export(replace(options, **changes)).directory

    def asked(self) -> dict[str, torch.Tensor]:
        return {"input_ids": ROWS[self.way.model].batch(6)["input_ids"]}

    def logits_of(self, model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(**self.asked()).logits


def train(way: Way, folder: Path) -> Tag:
    """Three steps and a tag."""
    config, base = folder / "ds.json", folder / "base"
    row = ROWS[way.model]
    cast("Any", row.build(way.base)).save_pretrained(str(base))
    config.write_text(json.dumps(way.config))
    with Stepper(load_model(base), parse_config(way.config), dtype=way.forward) as stepper:
        stepper.follow(Journal.memory(stepper.bit_header()))
        for _ in range(3):
            stepper.train_step([row.batch(6)], way.lr, way.decay)
        checkpoint.save(folder / "tags" / "one", stepper.journal, {}, None)
        tag = Tag(way, base, folder / "tags" / "one", config, torch.empty(0))
        return replace(tag, logits=stepper.forward(tag.asked()).logits.clone())


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Tag:
    """Tests only read it."""
    return train(WAYS["bf16"], tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Tag:
    return train(WAYS["lora"], tmp_path_factory.mktemp("adapter"))


@pytest.mark.parametrize("name", ["bf16", "tied", "sparse", "bf16-of-fp32"])
def test_transformers_computes_what_the_run_did(name: str, tmp_path: Path):
    tag = train(WAYS[name], tmp_path)
    out = tag.export(tmp_path / "hf", config=str(tag.config), max_shard_size=SMALL)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(out)
    found = tag.logits_of(model)
    # A run's head gives fp32; of bf16 weights a plain one rounds to half a step of bf16.
    rtol, atol = (2**-8, 1e-5) if found.dtype == BF16 else (0.0, 0.0)
    torch.testing.assert_close(found.float(), tag.logits, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("name", "forms"),
    [
        ("tied", {"dense"}),
        ("kinds", {"dense", "equal"}),
        ("sparse", {"dense", "equal"}),
        ("bf16-of-fp32", {"dense", "sparse"}),
        ("experts", {"dense"}),
    ],
)
def test_a_delta_on_its_base_is_the_model_to_the_byte(
    name: str, forms: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(deltas, "AT_ONCE", 100)  # of a few thousand elements there are several
    tag = train(replace(WAYS[name], lr=1e-4), tmp_path)
    told = {"config": str(tag.config), "max_shard_size": SMALL}
    whole = tag.export(tmp_path / "hf", **told)
    delta = tag.export(tmp_path / "delta", format="delta", **told)
    found = deltas.read_delta(delta)
    assert {entry.form for entry in found.tensors.values()} == forms
    assert len(list(delta.glob("delta-*.safetensors"))) > 1
    back = export(ExportOptions(str(delta), str(tmp_path / "back"), max_shard_size=SMALL))
    ours, theirs = (tree(each) for each in (back.directory, whole))
    del ours[CARD], theirs[CARD]
    assert ours == theirs


def test_the_lines_of_the_page_put_a_delta_on_its_base(full: Tag, tmp_path: Path):
    """As they stand there."""
    page = Path(__file__).parents[2] / "docs" / "export.md"
    code = page.read_text().partition("```python\n")[2].partition("```")[0]
    whole = full.export(tmp_path / "hf")
    delta = full.export(tmp_path / "delta", format="delta")
    names: dict[str, Any] = {"BASE": str(full.base), "DELTA": str(delta)}
    exec(code, names)
    trained = AutoModelForCausalLM.from_pretrained(whole).state_dict()
    assert all(
        torch.equal(value, trained[name]) for name, value in names["model"].state_dict().items()
    )


def test_peft_computes_what_the_run_did(adapter: Tag, tmp_path: Path):
    out = adapter.export(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(adapter.base)
    model = PeftModel.from_pretrained(base, str(out))
    assert torch.equal(adapter.logits_of(model), adapter.logits)
    assert "library_name: peft" in (out / CARD).read_text()


def test_an_adapter_is_merged_on_request(adapter: Tag, tmp_path: Path):
    out = adapter.export(tmp_path / "hf", format="hf")
    model = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(adapter.logits_of(model), adapter.logits)
    base = AutoModelForCausalLM.from_pretrained(adapter.base)
    assert not torch.allclose(adapter.logits_of(base), adapter.logits)
    assert "| adapter | `merged into the base` |" in (out / CARD).read_text()


@pytest.mark.parametrize("kind", ["hf", "delta"])
def test_weights_are_rounded_on_request(full: Tag, tmp_path: Path, kind: str):
    out = full.export(tmp_path / "out", dtype="float16", format=kind)
    if kind == "delta":
        out = export(ExportOptions(str(out), str(tmp_path / "back"))).directory
    whole = load_file(full.export(tmp_path / "hf") / "model.safetensors")
    found = load_file(out / "model.safetensors")
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name].half()) for name in whole)


def test_an_adapter_is_rounded_on_request(adapter: Tag, tmp_path: Path):
    found = load_file(adapter.export(tmp_path / "out", dtype="bfloat16") / ADAPTER)
    assert {tensor.dtype for tensor in found.values()} == {BF16}


def test_a_directory_of_tags_means_the_latest(full: Tag, tmp_path: Path):
    out = full.export(tmp_path / "out", source=str(full.directory.parent))
    assert tree(out) == tree(full.export(tmp_path / "again"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "adapter"}, "--format adapter: .* trained the model itself; write hf or delta"),
        ({"base": None}, "a checkpoint does not name the model .*--base DIR_OR_ID"),
        ({"source": "no/such"}, "no/such: holds no run .*; give the --output of zo-offload train"),
        ({"max_shard_size": "5 apples"}, "--max-shard-size: .* found '5 apples'; write one"),
        ({"max_shard_size": "0GB"}, "--max-shard-size: .* found '0GB'"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    full: Tag, tmp_path: Path, changes: dict[str, Any], words: str
):
    with pytest.raises(ConfigError, match=words):
        full.export(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_a_delta_of_an_adapter_is_refused(adapter: Tag, tmp_path: Path):
    with pytest.raises(ConfigError, match="trained an adapter, which is what to add to its base"):
        adapter.export(tmp_path / "out", format="delta")


def test_an_adapter_that_cannot_be_merged_is_refused(tmp_path: Path):
    prompt = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 2}
    way = Way({"trainable": {"mode": "peft", "peft_config": prompt}})
    tag = train(way, tmp_path)
    with pytest.raises(ConfigError, match=r"--format hf: .* cannot be merged into its base"):
        tag.export(tmp_path / "out", format="hf")


@pytest.fixture
def delta(full: Tag, tmp_path: Path) -> Path:
    return full.export(tmp_path / "delta", format="delta")


def apply(delta: Path, **changes: Any) -> None:
    options = ExportOptions(str(delta), str(delta.with_name("back")))
    export(replace(options, **changes))


@pytest.mark.parametrize(
    "changes", [{"dtype": "float16"}, {"format": "adapter"}, {"config": "ds.json"}]
)
def test_of_a_delta_nothing_else_is_made(delta: Path, changes: dict[str, str]):
    with pytest.raises(ConfigError, match="leave --format, --dtype and --config out"):
        apply(delta, **changes)


def test_another_base_is_refused(delta: Path, tmp_path: Path):
    other = tmp_path / "other"
    model = cast("Any", ROWS["llama"].build(BF16))
    model.lm_head.weight.data[0, 0] += 1
    model.save_pretrained(str(other))
    with pytest.raises(ModelError, match=r"made of a base whose weights have sha256 .*--base"):
        apply(delta, base=str(other))
    cast("Any", ROWS["gpt2"].build()).save_pretrained(str(other))
    with pytest.raises(ModelError, match=r"is missing, the trained model has .*--base"):
        apply(delta, base=str(other))


def turned(path: Path) -> None:
    """One bit of a weight."""
    held = load_file(path)
    first = min(held)
    held[first].view(-1)[0] ^= 1
    save_file(held, path)


def rewritten(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: turned(d / "delta-00001.safetensors"), "gives weights of sha256"),
        (lambda d: (d / "delta-00001.safetensors").unlink(), "cannot be read: "),
        (lambda d: (d / "delta-00001.safetensors").write_bytes(b"8"), "cannot be read: "),
        (lambda d: rewritten(d / "delta.json", format=2), "format 2, but .* reads format 1"),
        (lambda d: rewritten(d / "delta.json", tensors=None), "cannot be read .Attr.*export it"),
        (
            lambda d: rewritten(
                d / "delta.json",
                tensors={"a": {"dtype": "x", "shape": [1], "form": "equal", "file": "../b"}},
            ),
            "no entry of a tensor",
        ),
        (lambda d: (d / "delta.json").write_text("{"), "cannot be read .JSONDecodeError"),
        (lambda d: (d / "config.json").unlink(), "config.json: cannot be read .*; export it again"),
    ],
)
def test_a_damaged_delta_is_refused(delta: Path, damage: Any, words: str):
    damage(delta)
    with pytest.raises(CheckpointError, match=words):
        apply(delta)
    assert not delta.with_name("back").exists()


def test_a_delta_needs_no_card(delta: Path):
    (delta / CARD).unlink()
    apply(delta)
    assert not (delta.with_name("back") / CARD).exists()
    assert (delta.with_name("back") / "model.safetensors").is_file()


def test_a_delta_is_to_a_plain_model(full: Tag, delta: Path, tmp_path: Path):
    """Said before anything is rebuilt."""
    base = convert(str(full.base), tmp_path / "base", full.config).directory
    words = rf"^{base}: a converted model's weights are laid out for runs, .*; give that: --base$"
    with pytest.raises(ConfigError, match=words):
        full.export(tmp_path / "out", base=str(base), format="delta")
    with pytest.raises(ConfigError, match=words):
        apply(delta, base=str(base))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta"]


def test_an_output_below_a_file(full: Tag, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "out"
    words = rf"^--output: cannot write {out}: .*Not a directory.*; make room or choose another$"
    with pytest.raises(CheckpointError, match=words):
        full.export(out)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_disk_without_room_for_a_delta_costs_no_work(full: Tag, tmp_path: Path):
    """What was rebuilt is kept for the same command."""
    out = tmp_path / "out"
    journal, rebuilt = full.directory / checkpoint.JOURNAL, tmp_path / "out.replayed"
    replay(ReplayOptions(str(full.base), str(journal), str(rebuilt)))
    words = rf"^{out}\S+: cannot write the delta: .*File too large.*; make room there$"
    with at_most(4096), pytest.raises(CheckpointError, match=words):
        full.export(out, format="delta")
    assert [path.name for path in tmp_path.iterdir()] == ["out.replayed"]
    assert deltas.read_delta(full.export(out, format="delta")).base == str(full.base)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_there_stays(full: Tag, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(ZOError, match="there is something already"):
        full.export(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
