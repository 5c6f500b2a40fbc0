"""Image classifiers from the command line: folders of images, draws, training, what is refused."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli.common import assert_one_line, invoke
from PIL import Image
from torch.nn import functional
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from zo_offload.errors import TaskError
from zo_offload.tasks import Counts, draw
from zo_offload.tasks.pictures import Picture, PictureFolder, decoded, in_the_models_order

COLOURS = {"blue": (40, 60, 200), "red": (200, 60, 40)}
STEPS = 50


def write_images(folder: Path, count: int, seed: int, names: tuple[str, ...] = ("blue", "red")):
    """Noise around a colour, of no particular size."""
    random = np.random.RandomState(seed)
    for name in names:
        (folder / name).mkdir(parents=True)
        for at in range(count):
            shape = (*random.randint(12, 24, 2), 3)
            noise = random.randint(-80, 80, shape) + np.array(COLOURS[name])
            image = Image.fromarray(noise.clip(0, 255).astype(np.uint8))
            image.save(folder / name / f"{at}.png")


def write_model(folder: Path, **more: Any) -> Path:
    shape = {
        "image_size": 16, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "intermediate_size": 64, "initializer_range": 0.05,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ViTForImageClassification(ViTConfig(**shape | more)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(str(folder))
    return folder


@dataclass(frozen=True)
class Made:
    folder: Path

    def command(self, name: str, *more: Any, model: Path | None = None) -> list[str]:
        found = model or self.folder / "model"
        options = [f"--model={found}", f"--config={self.folder / 'cpu.json'}", *map(str, more)]
        return [name, f"--data={self.folder / 'images'}", *options]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("pictures")
    write_model(folder / "model", num_labels=2)
    write_images(folder / "images" / "train", 25, 0)
    write_images(folder / "images" / "test", 20, 1)
    config = {
        "train_batch_size": 20,
        "zeroth_order": {"eps": 1e-3, "probes": 4, "offload_param": {"device": "cpu"}},
        "optimizer": {"type": "ZO", "params": {"lr": 3e-3}},
    }
    (folder / "cpu.json").write_text(json.dumps(config))
    return Made(folder)


@pytest.fixture(scope="module")
def trained(made: Made) -> Path:
    directory = made.folder / "run"
    done = invoke(made.command("train", f"--steps={STEPS}", f"--output={directory}"))
    assert done.exit_code == 0, done.output
    return directory


def values(output: str) -> dict[str, float]:
    pairs = re.findall(r"^(\w+(?: before| after)?): ([\d.]+)$", output, re.MULTILINE)
    return {name: float(value) for name, value in pairs}


@torch.no_grad()
def plain(directory: Path, images: Path, names: list[str]) -> tuple[float, float]:
    """Accuracy and loss by transformers alone."""
    model: Any = AutoModelForImageClassification.from_pretrained(directory).eval()
    processor: Any = AutoImageProcessor.from_pretrained(directory)
    found = [(path, at) for at, name in enumerate(names) for path in (images / name).iterdir()]
    labels = torch.tensor([at for _, at in found])
    opened = [Image.open(path).convert("RGB") for path, _ in found]
    logits = model(**processor(opened, return_tensors="pt")).logits
    right = (logits.argmax(dim=1) == labels).float().mean()
    return right.item(), functional.cross_entropy(logits, labels).item()


def test_it_learns(made: Made, trained: Path):
    """The test images, which it has not seen; to the numbers that transformers finds."""
    found = []
    for model in (made.folder / "model", trained / "model"):
        done = invoke(made.command("eval", model=model))
        assert done.exit_code == 0, done.output
        found.append(values(done.stdout))
        expected = plain(model, made.folder / "images" / "test", ["blue", "red"])
        assert (found[-1]["accuracy"], found[-1]["loss"]) == pytest.approx(expected, abs=1e-4)
        assert found[-1]["examples"] == 40
    assert found[0]["accuracy"] <= 0.7 < 0.95 <= found[1]["accuracy"]
    assert found[1]["loss"] < 0.7 * found[0]["loss"]
    exported = json.loads((trained / "model" / "config.json").read_text())
    assert exported["id2label"] == {"0": "blue", "1": "red"}
    asked = json.loads((trained / "run.json").read_text())
    assert {"data", "data_seed", "examples of train (sha256)"} <= set(asked)


def test_other_images_are_another_run(made: Made, tmp_path: Path):
    write_images(tmp_path / "train", 3, 0)
    model = f"--model={made.folder / 'model'}"
    command = ["train", model, f"--data={tmp_path}", "--steps=1", f"--output={tmp_path / 'run'}"]
    assert invoke(command).exit_code == 0
    (tmp_path / "train" / "red" / "1.png").write_bytes(
        (made.folder / "images" / "train" / "red" / "9.png").read_bytes()
    )
    assert_one_line(invoke(command), r"holds another run: examples of (train|dev) \(sha256\) was")


def test_splits_are_folders_or_parts(made: Made, tmp_path: Path):
    folder = PictureFolder(str(made.folder / "images"))
    assert folder.words == ("blue", "red")
    train, dev, test = (draw(folder, split, Counts(), 0) for split in ("train", "dev", "test"))
    assert (len(train), len(dev), len(test)) == (40, 10, 40)  # a fifth is held out
    assert not {one.path for one in train} & {one.path for one in dev}
    assert {one.path.parts[-3] for one in test} == {"test"}
    few = [draw(folder, split, Counts(per_class=4), 0) for split in ("train", "dev")]
    assert [[one.right[0] for one in each].count(0) for each in few] == [4, 4]
    assert [len(each) for each in few] == [8, 8]

    write_images(tmp_path / "flat", 5, 0)
    flat = PictureFolder(str(tmp_path / "flat"))
    assert len(draw(flat, "test", Counts(), 0)) == 10
    assert len(draw(flat, "train", Counts(), 0)) + len(draw(flat, "dev", Counts(), 0)) == 10

    write_images(tmp_path / "val" / "train", 3, 0)
    write_images(tmp_path / "val" / "val", 2, 1, ("red",))
    apart = PictureFolder(str(tmp_path / "val"))
    assert len(draw(apart, "train", Counts(), 0)) == 6
    assert [one.right for one in draw(apart, "dev", Counts(), 0)] == [(1,), (1,)]
    with pytest.raises(TaskError, match="the task has no test split; evaluate --split dev"):
        draw(apart, "test", Counts(), 0)


def test_classes_are_found_by_the_models_names(made: Made, tmp_path: Path):
    names = {0: "red", 1: "green", 2: "blue"}
    labels = {name: at for at, name in names.items()}
    model = write_model(tmp_path / "model", id2label=names, label2id=labels)
    done = invoke(made.command("eval", model=model))
    assert done.exit_code == 0, done.output
    kept = tmp_path / "in order"
    for name in ("red", "green", "blue"):
        (kept / name).mkdir(parents=True)
    for name in ("red", "blue"):
        for path in (made.folder / "images" / "test" / name).iterdir():
            (kept / name / path.name).write_bytes(path.read_bytes())
    accuracy, loss = plain(model, kept, ["red", "green", "blue"])
    found = values(done.stdout)
    assert (found["accuracy"], found["loss"]) == pytest.approx((accuracy, loss), abs=1e-4)


def test_images_of_other_modes_are_three_colours(tmp_path: Path):
    for mode, suffix in (("L", "png"), ("RGBA", "png"), ("P", "gif"), ("CMYK", "jpg")):
        path = tmp_path / f"{mode}.{suffix}"
        Image.new(mode, (5, 4)).save(path)
        assert decoded(Picture(path, (0,))).mode == "RGB"


REFUSED = {
    "a task": (["--task=sst2"], "--task: for text, and --model is an image classifier"),
    "truncation": (["--truncate"], "--truncate: for text, and --model is an image classifier"),
    "no folder": (["--data=/nowhere"], "/nowhere: no such directory; check --data: a folder of"),
    "text from an image classifier": (
        ["--kind=masked", "--task=sst2"], "no (data|file)|could not be loaded|a directory"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_options_are_refused(made: Made, options: list[str], message: str):
    assert_one_line(invoke([*made.command("eval"), *options]), message)


def test_no_data_is_refused(made: Made):
    told = "--data: missing; give a folder of images, a sub-folder for each class"
    assert_one_line(invoke(["eval", f"--model={made.folder / 'model'}"]), told)


def spoilt(folder: Path, name: str, data: bytes | None) -> Path:
    write_images(folder / "test", 2, 0)
    path = folder / "test" / name
    path.mkdir() if data is None else path.write_bytes(data)
    return path


PNG = b"\x89PNG\r\n\x1a\n"
FAULTS = {
    "no image inside": ("red/x.png", b"hello", "no image to be read: cannot identify image file"),
    "a torn image": ("red/x.png", PNG + b"\0\0\0\rIHDR", "no image to be read: "),
    "an empty file": ("red/x.jpg", b"", "no image to be read: cannot identify image file"),
    "another kind of file": ("red/x.txt", b"hello", "no image by its name; expected files that en"),
    "a file beside the classes": ("x.png", PNG, "a file beside the classes; expected folders of"),
    "a folder in a class": ("red/x", None, "no image by its name; expected files"),
}


@pytest.mark.parametrize(("name", "data", "message"), FAULTS.values(), ids=FAULTS)
def test_what_is_no_image_is_named(
    made: Made, tmp_path: Path, name: str, data: bytes | None, message: str
):
    path = spoilt(tmp_path, name, data)
    command = ["eval", f"--model={made.folder / 'model'}", f"--data={tmp_path}"]
    assert_one_line(invoke(command), re.escape(f"{path}: ") + message)


def test_a_truncated_image_is_named_before_training(made: Made, tmp_path: Path):
    write_images(tmp_path / "train", 5, 0)
    path = tmp_path / "train" / "red" / "3.png"
    path.write_bytes(path.read_bytes()[:-40])
    command = ["train", f"--model={made.folder / 'model'}", f"--data={tmp_path}", "--steps=1"]
    done = invoke([*command, f"--output={tmp_path / 'run'}"])
    assert_one_line(done, re.escape(f"{path}: no image to be read: "))
    assert not (tmp_path / "run" / "journal").exists()


def test_splits_without_an_image(tmp_path: Path):
    (tmp_path / "train" / "red").mkdir(parents=True)
    folder = PictureFolder(str(tmp_path))
    with pytest.raises(TaskError, match="train: no image; expected a folder of images for each"):
        folder.items("train")
    with pytest.raises(TaskError, match=rf"{tmp_path}: no folder 'test'; make it, with a folder"):
        folder.items("test")


def test_an_image_that_has_gone_is_named(tmp_path: Path):
    picture = Picture(tmp_path / "x.png", (0,))
    with pytest.raises(TaskError, match=r"x\.png: cannot be read: No such file or directory; che"):
        print(picture.digest)


def test_hidden_files_are_passed_over(tmp_path: Path):
    spoilt(tmp_path, "red/.DS_Store", b"x")
    spoilt(tmp_path / "more", ".hidden", b"x")
    assert len(PictureFolder(str(tmp_path)).items("test")) == 4
    assert len(PictureFolder(str(tmp_path / "more")).items("test")) == 4


def test_classes_that_the_model_does_not_have(made: Made, tmp_path: Path):
    one = [Picture(Path("x.png"), (1,))]
    assert in_the_models_order(one, ("a", "b"), ["b", "c", "a"], "d")[0].right == (0,)
    assert in_the_models_order(one, ("a", "b"), ["LABEL_0", "LABEL_1"], "d") == one
    with pytest.raises(TaskError, match=r"^d: the class 'dgo' is none of .*; did you mean 'dog'\?"):
        in_the_models_order(one, ("cat", "dgo"), ["cat", "dog"], "d")
    model = write_model(tmp_path / "model", num_labels=3)
    told = r"images: 2 classes \('blue', 'red'\), and the model has 3; give a model with as many"
    assert_one_line(invoke(made.command("eval", model=model)), told)
    model = write_model(tmp_path / "grey", num_labels=2, num_channels=1)
    told = r"grey: takes images of 1 channels; expected 3 \(RGB\)"
    assert_one_line(invoke(made.command("eval", model=model)), told)


def test_a_model_without_an_image_processor(made: Made, tmp_path: Path):
    model = write_model(tmp_path / "model", num_labels=2)
    (model / "preprocessor_config.json").unlink()
    told = "model: the image processor could not be loaded: "
    assert_one_line(invoke(made.command("eval", model=model)), told)


def test_a_converted_classifier_is_one(made: Made, tmp_path: Path):
    base = tmp_path / "base"
    done = invoke(["convert", f"--model={made.folder / 'model'}", f"--output={base}"])
    assert done.exit_code == 0, done.output
    found = [values(invoke(made.command("eval", model=each)).stdout) for each in (
        made.folder / "model", base)]  # fmt: skip
    assert found[0] == found[1] != {}
