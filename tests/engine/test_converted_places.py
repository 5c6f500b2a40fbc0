"""Where a model is converted to: what stands there or beside stays; no run takes a base away."""

import os
from contextlib import closing
from pathlib import Path

import pytest
import torch
from models.table import ROWS

from engine.common import LR
from engine.test_converted import saved, stepper_of, written
from zo_offload.convert import convert
from zo_offload.errors import ConfigError, ModelError, StoreError
from zo_offload.files import locked
from zo_offload.fresh import UNFINISHED
from zo_offload.integrations.hf import load_causal_lm
from zo_offload.journal import Journal
from zo_offload.step import Stepper


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("output", "stripe", "words"),
    [
        ("base", "base/stripe", "base/stripe lies in .*base; name directories beside each other"),
        ("disk/base", "disk", "disk/base lies in .*disk; name"),
        ("link", "target", "the same directory twice"),
    ],
)
def test_directories_in_each_other_are_refused(
    tmp_path: Path, output: str, stripe: str, words: str
):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    plain = saved(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=words):
        convert(str(plain), tmp_path / output, None, [tmp_path / stripe])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_directory_whose_place_cannot_be_taken_is_refused(tmp_path: Path, monkeypatch):
    plain, here = saved(tmp_path), tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(ConfigError, match="the working directory; name one to be made"):
        convert(str(plain), ".")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "disk")
    with pytest.raises(ConfigError, match=r"disk: a disk's own directory, .* name one in it"):
        convert(str(plain), tmp_path / "disk")


def test_neighbours_stay(tmp_path: Path):
    for suffix in (".old", ".new"):
        (tmp_path / f"base{suffix}").mkdir()
        (tmp_path / f"base{suffix}" / "file").write_text("mine")
    convert(str(saved(tmp_path)), tmp_path / "base")
    assert (tmp_path / "base.old" / "file").read_text() == "mine"
    assert (tmp_path / "base.new" / "file").read_text() == "mine"
    assert not list((tmp_path / "base").glob(UNFINISHED))


def test_a_link_leads_to_the_disk_that_is_written(tmp_path: Path):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    convert(str(saved(tmp_path)), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target" / "base.json").is_file()


def test_two_at_once(tmp_path: Path, monkeypatch):
    plain, aside = saved(tmp_path), tmp_path / f"base{UNFINISHED}"
    aside.mkdir()
    (aside / "theirs").write_text("theirs")
    with pytest.raises(ConfigError, match="holds something else; move it away"):
        convert(str(plain), tmp_path / "base")
    with (
        locked(aside, UNFINISHED),
        pytest.raises(ConfigError, match="base: another process is making it; wait for that"),
    ):
        convert(str(plain), tmp_path / "base")
    assert (aside / "theirs").read_text() == "theirs"
    convert(str(plain), tmp_path / "base")  # that process is gone
    assert not aside.exists()
    assert not (tmp_path / "base" / "theirs").exists()


def test_what_another_makes_meanwhile_stays(tmp_path: Path, monkeypatch):
    def slow(model: object, name: object) -> bool:
        (tmp_path / "base").mkdir()
        (tmp_path / "base" / "file").write_text("mine")
        return False

    monkeypatch.setattr("zo_offload.convert.save_tokenizer", slow)
    with pytest.raises(ConfigError, match="base: something was made there meanwhile, and stays"):
        convert(str(saved(tmp_path)), tmp_path / "base")
    assert [path.name for path in (tmp_path / "base").iterdir()] == ["file"]
    assert not list(tmp_path.glob(f"*{UNFINISHED}"))


def begun(stepper: Stepper, journal: Journal) -> None:
    stepper.follow(journal)
    for _ in range(2):  # what a step has moved is written at the next one's visit
        stepper.train_step([ROWS["opt"].inputs(7)], LR)


@pytest.mark.parametrize("folders", [["converted/units"], ["disk1"], ["free", "disk1"]])
@pytest.mark.parametrize("named", [False, True])
def test_a_base_is_no_folder_for_a_run(tmp_path: Path, folders: list[str], named: bool):
    done = written(tmp_path, saved(tmp_path))
    before = content(tmp_path)
    nvme = {"device": "nvme", "nvme_path": [str(tmp_path / name) for name in folders]}
    path = tmp_path / "run.journal"
    with closing(stepper_of(done.directory, offload_param=nvme)) as stepper:
        header = stepper.bit_header()
        with pytest.raises(StoreError, match="the units of a converted model lie there, which"):
            begun(stepper, Journal.open(path, header) if named else Journal.memory(header))
    path.unlink(missing_ok=True)
    assert content(tmp_path) == before


@pytest.mark.parametrize("how", ["flipped", "short", "of another"])
def test_the_mend_of_a_base_is_to_convert_again(tmp_path: Path, how: str):
    directory = written(tmp_path, saved(tmp_path)).directory
    if how == "of another":
        (tmp_path / "other").mkdir()
        model = load_causal_lm(saved(tmp_path))
        with torch.no_grad():
            next(model.parameters()).mul_(2)
        model.save_pretrained(tmp_path / "other" / "plain")
        written(tmp_path / "other", tmp_path / "other" / "plain")
        (tmp_path / "disk1").rename(tmp_path / "before")
        (tmp_path / "other" / "disk1").rename(tmp_path / "disk1")
    elif how == "flipped":
        path = tmp_path / "disk1" / "store.json"
        path.write_text(path.read_text().replace('"path": 1', '"path": 7'))
    else:
        path = tmp_path / "disk1" / "units.bin"
        path.write_bytes(path.read_bytes()[:4096])
    with pytest.raises(StoreError, match=r"disk1/.*; .*convert the model again$"):
        stepper_of(directory)


def test_a_missing_record_is_named(tmp_path: Path):
    directory = written(tmp_path, saved(tmp_path)).directory
    (directory / "base.json").unlink()
    with pytest.raises(StoreError, match=r"base.json: missing from a converted model; convert"):
        load_causal_lm(directory)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(tmp_path: Path, value: float):
    model = load_causal_lm(saved(tmp_path))
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.weight[0, 0] = value
    model.save_pretrained(tmp_path / "broken")
    done = written(tmp_path, tmp_path / "broken")
    for directory in (tmp_path / "broken", done.directory):
        stepper_of(directory, direction_scale="none").close()
        with pytest.raises(ModelError, match=r"layers.0.fc1.weight: not all of its .* are finite"):
            stepper_of(directory)


def test_files_of_a_run_stay_where_they_were_named(tmp_path: Path, monkeypatch):
    done = written(tmp_path, saved(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    stepper = stepper_of(done.directory, offload_param={"device": "nvme", "nvme_path": "run"})
    monkeypatch.chdir(tmp_path / "elsewhere")
    with stepper:
        stepper.follow(Journal.open(tmp_path / "run.journal", stepper.bit_header()))
        monkeypatch.chdir(tmp_path)
    assert (tmp_path / "run" / "units.bin").is_file()
    assert not list((tmp_path / "elsewhere").iterdir())
