"""A converted model trains to the bits of the model itself, and nobody writes to it."""

import json
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models.table import ROWS
from trainable.modes import lora, written_mask
from transformers import OPTForCausalLM

from engine.common import LR
from zo_offload.config import ZOConfig
from zo_offload.convert import Conversion, convert
from zo_offload.converted import converted_of, measure, read_converted
from zo_offload.errors import ConfigError, ModelError, StoreError
from zo_offload.integrations.hf import load_causal_lm
from zo_offload.journal import Journal
from zo_offload.offload.folders import SPARES
from zo_offload.offload.sealed import read_sealed, write_sealed
from zo_offload.step import Stepper

CAUSAL = (
    "opt", "opt-post-norm", "gpt2", "gpt-neox", "llama", "qwen3", "mixtral", "qwen3-moe", "mamba",
)  # fmt: skip


def saved(folder: Path, name: str = "opt") -> Path:
    model: Any = ROWS[name].build(torch.bfloat16)
    model.save_pretrained(folder / "plain")
    return folder / "plain"


def written(folder: Path, plain: Path, **block: Any) -> Conversion:
    aio = {"block_size": 4096}  # the stripes of a small model
    config = {"train_batch_size": 1, "bf16": {"enabled": True}, "aio": aio, "zeroth_order": block}
    (folder / "ds.json").write_text(json.dumps(config))
    stripes = [folder / "disk1", folder / "disk2"]
    return convert(str(plain), folder / "converted", folder / "ds.json", stripes)


def stepper_of(model: Any, **block: Any) -> Stepper:
    config = ZOConfig.model_validate({"eps": 1e-2, "direction_scale": "rms", **block})
    return Stepper(load_causal_lm(model), config, dtype=torch.bfloat16)


def trained(stepper: Stepper, name: str, steps: int = 3) -> tuple[Any, list[Any]]:
    """Header, losses and masters."""
    with closing(stepper):
        header = stepper.bit_header()
        stepper.follow(Journal.memory(header))
        batch = ROWS[name].inputs(7)
        losses = [stepper.train_step([batch], LR).lane_losses for _ in range(steps)]
        return header, [losses, *map(torch.Tensor.tolist, dict(stepper.weights.masters()).values())]


@pytest.mark.parametrize("name", CAUSAL)
def test_it_trains_to_the_same_bits(tmp_path: Path, name: str):
    plain = saved(tmp_path, name)
    done = written(tmp_path, plain)
    cpu = {"offload_param": {"device": "cpu"}}
    expected = trained(stepper_of(plain, **cpu), name)
    assert trained(stepper_of(done.directory, **cpu), name) == expected


@pytest.mark.parametrize(
    "block",
    [
        {"unit": "linear"},
        {"unit": "sublayer", "master": "bf16+8"},
        {"unit": ["OPTAttention"], "master": "bf16_sr"},
        {"wire": "nf4", "update": {"lag": 2}},
    ],
)
@pytest.mark.parametrize("device", ["none", "cpu", "nvme"])
def test_every_tier_opens_it(tmp_path: Path, device: str, block: dict[str, Any]):
    plain = saved(tmp_path)
    done = written(tmp_path, plain, **block)
    offload = {"device": device, "nvme_path": str(tmp_path / "run") if device == "nvme" else None}
    block = {**block, "offload_param": offload}
    del block["unit" if "unit" in block and isinstance(block["unit"], str) else "offload_param"]
    block["offload_param"] = offload  # the unit need not be said again
    expected = trained(stepper_of(plain, **{"unit": done.settings["unit"], **block}), "opt")
    before = content_of(tmp_path)
    assert trained(stepper_of(done.directory, **block), "opt") == expected
    assert content_of(tmp_path) == before


def test_divided_experts_are_opened_by_group(tmp_path: Path):
    plain = saved(tmp_path, "mixtral")
    done = written(tmp_path, plain, unit="linear")
    assert done.num_units == 18  # a block: four projections, the gate and four experts
    for device in ("cpu", "nvme"):
        offload = {
            "device": device,
            "nvme_path": str(tmp_path / "run") if device == "nvme" else None,
        }
        block = {"offload_param": offload}
        expected = trained(stepper_of(plain, unit="linear", **block), "mixtral")
        assert trained(stepper_of(done.directory, **block), "mixtral") == expected


@pytest.fixture
def frozen_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is loaded has frozen blocks, for converting and for training alike."""

    real = load_causal_lm

    def load(*where: Any) -> Any:
        model = real(*where)
        model.model.decoder.layers.requires_grad_(False)
        return model

    monkeypatch.setattr("zo_offload.convert.load_model", load)
    monkeypatch.setitem(globals(), "load_causal_lm", load)


@pytest.mark.parametrize("wire", [None, "nf4", "lossless12"])
def test_a_frozen_base_is_opened_as_it_rests(tmp_path: Path, frozen_blocks: None, wire: str | None):
    plain = saved(tmp_path)
    done = written(tmp_path, plain, wire=wire)
    before = content_of(tmp_path)
    for device in ("none", "cpu", "nvme"):
        path = str(tmp_path / "run") if device == "nvme" else None
        block = {"wire": wire, "offload_param": {"device": device, "nvme_path": path}}
        expected = trained(stepper_of(plain, **block), "opt")
        assert trained(stepper_of(done.directory, **block), "opt") == expected
        assert content_of(tmp_path) == before
        assert not (tmp_path / "run").exists()


def test_another_frozen_base_is_refused(
    tmp_path: Path, frozen_blocks: None, monkeypatch: pytest.MonkeyPatch
):
    done = written(tmp_path, saved(tmp_path), wire="nf4")
    with pytest.raises(StoreError, match="packed by nf4, but this run has int4; use that"):
        stepper_of(done.directory, wire="int4")
    with pytest.raises(StoreError, match="packed by nf4, but this run has none; use that"):
        stepper_of(done.directory)
    (tmp_path / "same").mkdir()
    same = written(tmp_path / "same", tmp_path / "plain").directory  # nothing packs it
    layers = load_causal_lm(tmp_path / "plain").model.decoder.layers
    frozen = sum(parameter.numel() for parameter in layers.parameters())
    monkeypatch.undo()  # what was converted as a frozen base is to be trained
    words = f"frozen weights of {frozen:,}, but this run has 0; use that, or give the model that"
    with pytest.raises(StoreError, match=words):
        stepper_of(same)
    with pytest.raises(StoreError, match="packed by nf4, but this run has none; use that"):
        stepper_of(done.directory, wire="nf4")


def content_of(folder: Path) -> dict[Path, tuple[bytes, int]]:
    """Of the converted model, which is made unwritable."""
    files = [f for name in ("converted", "disk1", "disk2") for f in (folder / name).rglob("*")]
    for path in files:
        path.chmod(0o500 if path.is_dir() else 0o400)
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in files if p.is_file()}


def test_a_journal_goes_on_from_either(tmp_path: Path):
    plain = saved(tmp_path)
    done = written(tmp_path, plain)
    batch = ROWS["opt"].inputs(7)
    digests: list[str] = []
    for models in ([plain, done.directory], [done.directory, plain], [plain, plain]):
        path, digest = tmp_path / f"{len(digests)}.journal", ""
        for model in models:
            nvme = {"device": "nvme", "nvme_path": str(tmp_path / "run" / path.stem)}
            with closing(stepper_of(model, offload_param=nvme)) as stepper:
                stepper.follow(Journal.open(path, stepper.bit_header()))
                stepper.train_step([batch], LR)
                digest = stepper.weights.digest()
        digests.append(digest)
    assert len(set(digests)) == 1


def test_it_opens_without_reading_the_units(tmp_path: Path):
    done = written(tmp_path, saved(tmp_path))
    nvme = {"device": "nvme", "nvme_path": str(tmp_path / "run")}
    with closing(stepper_of(done.directory, offload_param=nvme)) as stepper:
        stepper.follow(Journal.open(tmp_path / "run.journal", stepper.bit_header()))
        files = stepper.weights.files
        assert files is not None
        headers = 2 * len(stepper.weights.map.units) + SPARES  # of the base and of the run
        assert files.bytes_read <= 4096 * headers
        assert files.bytes_written == 0


def test_a_model_that_took_no_step_may_be_used_again(tmp_path: Path):
    done = written(tmp_path, saved(tmp_path))
    model = load_causal_lm(done.directory)
    expected = trained(stepper_of(done.directory), "opt")
    config = ZOConfig.model_validate({"eps": 1e-2, "direction_scale": "rms"})
    Stepper(model, config, dtype=torch.bfloat16).close()
    assert trained(Stepper(model, config, dtype=torch.bfloat16), "opt") == expected
    assert converted_of(model) is None  # its weights are others now, and in memory
    first = next(model.model.decoder.layers[0].parameters())
    assert not first.isnan().any()


def test_generation_and_saving(tmp_path: Path):
    plain = saved(tmp_path)
    done = written(tmp_path, plain)
    ids = ROWS["opt"].inputs(5)["input_ids"]
    found = []
    for number, folder in enumerate((plain, done.directory)):
        with closing(stepper_of(folder)) as stepper:
            model: Any = stepper.model
            found.append(stepper.run_model(partial(model.generate, ids, max_new_tokens=4)))
            model.save_pretrained(tmp_path / str(number), state_dict=model.state_dict())
    assert torch.equal(*found)
    assert (tmp_path / "0" / "model.safetensors").read_bytes() == (
        tmp_path / "1" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"unit": "linear"}, "converted with unit block, but this run has linear; use that, or"),
        ({"master": "bf16+8"}, "converted with master fp32, but this run has bf16.8"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, block: dict[str, Any], words: str):
    done = written(tmp_path, saved(tmp_path))
    with pytest.raises(StoreError, match=words):
        stepper_of(done.directory, **block)


def test_another_precision_is_refused(tmp_path: Path):
    done = written(tmp_path, saved(tmp_path))
    with pytest.raises(StoreError, match="with forward bfloat16, but this run has float16; use"):
        Stepper(load_causal_lm(done.directory), ZOConfig(), dtype=torch.float16)


@pytest.mark.parametrize("name", ["ambient.safetensors", "buffers.safetensors", "base.json"])
@pytest.mark.parametrize("how", ["flipped", "short", "missing"])
def test_damage_is_found(tmp_path: Path, name: str, how: str):
    path = written(tmp_path, saved(tmp_path, "llama")).directory / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content if how == "flipped" else content[:-9])
    if how == "missing":
        path.unlink()
    with pytest.raises((StoreError, ModelError), match=f"damaged|{name}|converted/?: "):
        load_causal_lm(path.parent)


@pytest.mark.parametrize("stripe", ["converted/units", "disk1", "disk2"])
def test_damage_in_a_unit_is_found(tmp_path: Path, stripe: str):
    done = written(tmp_path, saved(tmp_path))
    path = tmp_path / stripe / "units.bin"
    content = bytearray(path.read_bytes())
    for at in range(5000, len(content), 4096):
        content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"CRC-32C.*convert the model again|a base with"):
        stepper_of(done.directory, offload_param={"device": "cpu"})


def test_a_hostile_record_is_refused(tmp_path: Path):
    directory = written(tmp_path, saved(tmp_path)).directory
    content = read_sealed(directory / "base.json", 2, "")
    write_sealed(directory / "base.json", 2, {**content, "squares": {"a": "b"}})
    with pytest.raises(StoreError, match=r"base.json: damaged at squares.a; convert"):
        read_converted(directory)
    changed = dict(content["parameters"])
    changed[next(iter(changed))] = [[3, 3], "float32"]
    write_sealed(directory / "base.json", 2, {**content, "parameters": changed})
    with pytest.raises(ModelError, match=r"config.json makes .* base.json has \[3, 3\] float32"):
        load_causal_lm(directory)


def test_a_hostile_dtype_is_refused(tmp_path: Path):
    path = written(tmp_path, saved(tmp_path)).directory / "base.json"
    content = read_sealed(path, 2, "")
    name = next(name for name in content["parameters"] if ".layers." in name)
    shape, _ = content["parameters"][name]
    changed = {**content["parameters"], name: [shape, "load"]}
    write_sealed(path, 2, {**content, "parameters": changed})
    words = rf"^{path}: {name} is of 'load', which is no dtype; convert the model again$"
    with pytest.raises(ModelError, match=words):
        load_causal_lm(path.parent)


def test_a_file_of_the_right_sum_that_holds_no_tensors_is_refused(tmp_path: Path):
    directory = written(tmp_path, saved(tmp_path)).directory
    path = directory / "ambient.safetensors"
    path.write_bytes(b"no tensors")
    content = read_sealed(directory / "base.json", 2, "")
    files = {**content["files"], path.name: measure(path)}
    write_sealed(directory / "base.json", 2, {**content, "files": files})
    words = rf"^{path}: cannot be read: .*; convert the model again$"
    with pytest.raises(StoreError, match=words):
        load_causal_lm(directory)


def test_a_configuration_of_fewer_blocks_is_refused(tmp_path: Path):
    directory = written(tmp_path, saved(tmp_path)).directory
    path = directory / "config.json"
    shape = json.loads(path.read_text())
    path.write_text(json.dumps({**shape, "num_hidden_layers": 1}))
    words = (
        rf"^{directory}: config.json makes a model of 20 parameters, 36 were converted; .*again$"
    )
    with pytest.raises(ModelError, match=words):
        load_causal_lm(directory)


def test_a_model_that_keeps_a_tensor_to_itself_is_refused(tmp_path: Path, monkeypatch):
    made = OPTForCausalLM.__init__

    def init(self: Any, config: Any) -> None:
        made(self, config)
        self.scale = torch.ones(1)

    plain = saved(tmp_path)
    monkeypatch.setattr(OPTForCausalLM, "__init__", init)
    words = r": scale of OPTForCausalLM is a tensor that no parameter or buffer holds, .*; use the"
    with pytest.raises(ModelError, match=words):
        written(tmp_path, plain)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ds.json", "plain"]


MOVED = {
    "full": ({"kinds": ["vector"]}, r"as a whole; to choose some of .*\(.*trainable\), give"),
    "low_rank": ({"mode": "low_rank"}, "to move by dense directions; give"),
    "sparse": ({"mode": "sparse"}, "to move; sparse needs a base that does not: give"),
    "scales": ({"mode": "scales"}, "to move; scales needs a base that does not: give"),
    "peft": (lora(), "to move; adapters need a base that does not: give"),
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tests only read it."""
    folder = tmp_path_factory.mktemp("converted")
    return written(folder, saved(folder)).directory


@pytest.mark.parametrize("mode", MOVED)
def test_it_moves_as_it_was_laid_out(converted: Path, mode: str):
    trainable, words = MOVED[mode]
    if mode == "sparse":
        trainable = {**trainable, "mask": str(written_mask(model=ROWS["opt"].build))}
    block = {"trainable": trainable, "wire": "int4" if mode == "scales" else None}
    words = f"^a converted model's blocks are laid out .*{words} the model that was converted$"
    with pytest.raises(ModelError, match=words):
        stepper_of(converted, **block)


def test_what_is_there_is_left_alone(tmp_path: Path):
    plain = saved(tmp_path)
    done = written(tmp_path, plain)
    with pytest.raises(ConfigError, match="converted: there is something already; choose another"):
        written(tmp_path, plain)
    with pytest.raises(ConfigError, match="is a converted model already"):
        convert(str(done.directory), tmp_path / "again")
    with pytest.raises(ConfigError, match="the same directory twice"):
        convert(str(plain), tmp_path / "twice", None, [tmp_path / "twice"])
    assert not (tmp_path / "again").exists()


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch):
    def full(*_: Any) -> None:
        raise StoreError("units.bin: 1 byte is free, 2 are needed")

    monkeypatch.setattr("zo_offload.offload.folders.allocate", full)
    plain = saved(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreError, match="1 byte is free"):
        convert(str(plain), tmp_path / "converted", None, [tmp_path / "disk1"])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_relative_path_outlives_a_change_of_directory(tmp_path: Path, monkeypatch):
    done = written(tmp_path, saved(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = load_causal_lm(done.directory.relative_to(tmp_path))
    monkeypatch.chdir("/")
    with closing(Stepper(model, ZOConfig(), dtype=torch.bfloat16)) as stepper:
        stepper.train_step([ROWS["opt"].inputs(7)], LR)
