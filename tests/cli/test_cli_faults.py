"""Whatever is wrong is one line on stderr, and what was saved stays as it is."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.common import Child, Task, assert_one_line, invoke, make_task, tree, write_tsv
from zo_offload.errors import ZOError

Changes = dict[str, Any]
NOBODY = 65534


@pytest.fixture
def own(task: Task, tmp_path: Path) -> Task:
    """A copy of the task, to be spoilt."""
    shutil.copytree(task.folder, tmp_path / "own")
    return Task(tmp_path / "own")


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Task], Changes]:
    def spoil(task: Task) -> Changes:
        path = task.folder / "model" / "model.safetensors"
        values = load_file(path)
        change(values)
        save_file(values, path, metadata={"format": "pt"})
        return {}

    return spoil


def model_file(name: str, content: bytes | Callable[[bytes], bytes] | None):
    def spoil(task: Task) -> Changes:
        path = task.folder / "model" / name
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content if isinstance(content, bytes) else content(path.read_bytes()))
        return {}

    return spoil


def model_config(**more: Any) -> Callable[[Task], Changes]:
    def change(content: bytes) -> bytes:
        return json.dumps({**json.loads(content), **more}).encode()

    return model_file("config.json", change)


def data(content: str | bytes, option: str = "train", name: str = "data.tsv"):
    def spoil(task: Task) -> Changes:
        path = task.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return {option: path}

    return spoil


def config(content: Any) -> Callable[[Task], Changes]:
    def spoil(task: Task) -> Changes:
        path = task.folder / "spoilt.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return {"config": path}

    return spoil


def given(**changes: Any) -> Callable[[Task], Changes]:
    return lambda task: {
        key: value.replace("FOLDER", str(task.folder)) if isinstance(value, str) else value
        for key, value in changes.items()
    }


def block(**more: Any) -> dict[str, Any]:
    return {"train_batch_size": 4, "zeroth_order": more}


def no_numbers(values: dict[str, torch.Tensor]) -> None:
    for name in values:
        values[name] = torch.full_like(values[name], torch.nan)


def no_tokenizer(task: Task) -> Changes:
    for path in (task.folder / "model").glob("tokenizer*"):
        path.unlink()
    return {}


def drop_rows(task: Task) -> Changes:
    """A smaller embedding, in weights and config alike, beside the same tokenizer."""
    model_config(vocab_size=8)(task)

    def cut(values: dict[str, torch.Tensor]) -> None:
        for name in list(values):
            if "embed_tokens" in name or "lm_head" in name:
                values[name] = values[name][:8].clone()

    return tensors(cut)(task)


MODELS = {
    "nowhere": (given(model="/nowhere/model"), "/nowhere/model: no such directory"),
    "nowhere, relative": (given(model="./no/such/model"), r"\./no/such/model: no such directory"),
    "an id without network": (
        given(model="nobody/no-such-model"),
        "nobody/no-such-model: no such local directory, and the configuration could not be fetched",
    ),
    "a file": (given(model="FOLDER/ds.json"), "must be a directory .* found a file"),
    "not a model": (given(model="FOLDER"), r"no config\.json in this directory"),
    "no tokenizer": (
        model_file("tokenizer.json", None),
        "the tokenizer could not be loaded: ValueError: Couldn't instantiate",
    ),
    "torn tokenizer": (
        model_file("tokenizer.json", lambda content: content[:100]),
        "the tokenizer could not be loaded",
    ),
    "no tokenizer at all": (
        no_tokenizer,
        r"/model: no tokenizer there; copy its files \(tokenizer\.json, \.\.\.\)",
    ),
    "a tokenizer that ends nothing": (
        model_file("tokenizer_config.json", lambda content: content.replace(b"eos_", b"other_")),
        "/model: the tokenizer has neither a padding nor an end token; set pad_token",
    ),
    "unknown type": (
        model_config(model_type="abacus"),
        "the configuration could not be loaded: ValueError: .*abacus",
    ),
    "no type": (
        model_file("config.json", b"{}"),
        "the configuration could not be loaded: .*Should have a `model_type`",
    ),
    "config is no JSON": (
        model_file("config.json", b"{"),
        "the configuration could not be loaded: .*is not a valid JSON file",
    ),
    "config is no object": (
        model_file("config.json", b"[]"),
        "the configuration could not be loaded: ",
    ),
    "odd values": (
        model_config(hidden_size="wide"),
        "the configuration could not be loaded: .*'hidden_size' expected int, got str",
    ),
    "odd shapes": (
        model_config(ffn_dim=96),
        r"fc1.bias is \[64\], config.json makes it \[96\]",
    ),
    "not causal": (
        model_file("config.json", b'{"model_type": "t5"}'),
        "the model could not be loaded: ValueError: Unrecognized configuration class .*T5Config",
    ),
    "torn header": (
        model_file("model.safetensors", lambda content: content[:100]),
        "the model could not be loaded: SafetensorError",
    ),
    "torn weights": (
        model_file("model.safetensors", lambda content: content[:-100]),
        "the model could not be loaded: SafetensorError",
    ),
    "empty weights": (
        model_file("model.safetensors", b""),
        "the model could not be loaded: SafetensorError: .*header too small",
    ),
    "no weights": (
        model_file("model.safetensors", None),
        "the model could not be loaded: OSError: Error no file named model.safetensors",
    ),
    "missing weights": (
        tensors(lambda values: values.pop("model.decoder.layers.0.fc1.weight")),
        r"lacks 1 weights of OPTForCausalLM \(model\.decoder\.layers\.0\.fc1\.weight",
    ),
    "weights of another shape": (
        tensors(lambda v: v.update({"model.decoder.layers.0.fc1.weight": torch.ones(2, 2)})),
        r"fc1.weight is \[2, 2\], config.json makes it \[64, 32\]",
    ),
    "more tokens than rows": (
        drop_rows,
        r"token \d+ of .* has no row in the embedding, which has 8; tokenizer and model",
    ),
}

DATA = {
    "no file": (given(train="/nowhere.tsv"), "/nowhere.tsv: no such file"),
    "no dev": (given(dev="/nowhere.tsv"), "/nowhere.tsv: no such file"),
    "a directory": (given(train="FOLDER"), ": a directory; expected a file"),
    "empty": (data(""), r"data\.tsv: the file is empty"),
    "header only": (data("sentence\tlabel\n"), r"data\.tsv:1: only a header line"),
    "no label": (data("sentence\twords\nx\ty\n"), "no column 'label'"),
    "a column too many": (data("sentence\tlabel\na\t1\nb\t1\t2\n"), r"data\.tsv:3: 3 columns"),
    "not UTF-8": (data(b"sentence\tlabel\n\xff\t1\n"), r"data\.tsv:2: invalid UTF-8"),
    "malformed JSONL": (data('{"sentence": "a"\n', name="d.jsonl"), r"d\.jsonl:1: malformed JSON"),
    "JSONL without label": (data('{"sentence": "a"}\n', name="d.jsonl"), "no key 'label'"),
    "unknown label": (data("sentence\tlabel\nfilm\t2\n"), r"data\.tsv:2: the label is '2'"),
    "unknown label in dev": (data("sentence\tlabel\nfilm\tbad\n", "dev"), "the label is 'bad'"),
    "too long": (
        data("sentence\tlabel\n" + "film " * 40 + "\t1\n"),
        "43 tokens, and the model has 24 positions",
    ),
    "unknown field": (given(template="{sentense} It was"), "did you mean 'sentence'"),
    "bad template": (
        given(template="{sentence It was"),
        r"template '{sentence It was': expected '}' .*; expected {field}",
    ),
    "one label": (
        given(labels=" great"),
        "labels ' great': 1 label word; expected at least 2, separated by commas",
    ),
    "labels alike": (given(labels=" odd, even"), "are the same tokens"),
}

CONFIGS = {
    "no steps": (given(steps=0), "--steps: expected 1 to .*, found 0"),
    "steps without end": (given(steps=10**21), "--steps: expected 1 to 4,294,967,295, found"),
    "negative steps": (given(steps=-3), "--steps: expected 1 to .*, found -3"),
    "no config": (given(config="/nowhere.json"), "/nowhere.json: cannot read the config: No such"),
    "malformed": (config('{"train_batch_size": 4,}'), r"spoilt\.json:1:\d+: malformed JSON"),
    "empty config": (config(""), r"spoilt\.json:1:1: malformed JSON"),
    "a list": (config([1]), "expected a JSON object, found list"),
    "a key twice": (config('{"a": 1, "a": 2}'), "'a' stands twice"),
    "unknown key": (config(block(epss=1)), "zeroth_order.epss: unknown key; did you mean 'eps'"),
    "wrong type": (config(block(eps="small")), "zeroth_order.eps: "),
    "off": (config(block(enabled=False)), "zeroth_order.enabled is false"),
    "no batch size": (config({"zeroth_order": {}}), "DeepSpeed refuses the config: .*batch"),
    "monitor key": (
        config({**block(), "csv_monitor": {"enabeld": True}}),
        "DeepSpeed refuses the config: csv_monitor.enabeld: ",
    ),
    "stage 3": (
        config({**block(), "zero_optimization": {"stage": 3}}),
        r"zero_optimization\.stage: .*found 3",
    ),
    "no room": (
        config(block(device_budget=1000)),
        r"zeroth_order\.device_budget: the weights need .* the budget is 1,000",
    ),
    "half a loss": (config({**block(), "scheduler": {"type": "Warm"}}), "scheduler.type: unknown"),
}

FAULTS = {
    f"{kind}: {name}": fault
    for kind, faults in (("model", MODELS), ("data", DATA), ("config", CONFIGS))
    for name, fault in faults.items()
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line_and_the_mended_command_works(own: Task, tmp_path: Path, name: str):
    spoil, words = FAULTS[name]
    good = tree(own.folder)
    changes = spoil(own)
    output = tmp_path / "run"
    assert_one_line(invoke(own.arguments(output, **changes)), words)
    assert not (output / "journal").exists()
    assert not (output / "model").exists()
    for path, content in good.items():
        if content is not None:
            (own.folder / path).write_bytes(content)
    if output.exists():  # begun, and given up: it must not stand in the way
        done = invoke(own.arguments(output, steps=1, eval_every=None))
        assert done.exit_code == 0, done.output


EVAL_FAULTS = [
    "model: nowhere", "model: unknown type", "model: torn header", "data: no dev",
    "config: malformed", "config: monitor key", "data: unknown label in dev",
]  # fmt: skip


@pytest.mark.parametrize("name", EVAL_FAULTS)
def test_a_fault_in_an_evaluation(own: Task, name: str):
    spoil, words = FAULTS[name]
    assert_one_line(invoke(own.arguments("", "eval", **spoil(own))), words)


def test_weights_that_are_no_numbers(own: Task, tmp_path: Path):
    tensors(no_numbers)(own)
    done = invoke(own.arguments(tmp_path / "run"))
    assert_one_line(done, "step 0: the loss is nan .*; nothing was changed")
    assert "drowns" not in done.stderr
    before = tree(tmp_path / "run")
    assert_one_line(invoke(own.arguments(tmp_path / "run")), "the loss is nan")
    after = tree(tmp_path / "run")
    assert len(str(after.pop("telemetry.jsonl"))) > len(str(before.pop("telemetry.jsonl")))
    assert after == before


@pytest.mark.parametrize("name", ["model: torn header", "data: unknown label", "config: malformed"])
def test_a_fault_beside_a_finished_run_leaves_it(own: Task, tmp_path: Path, name: str):
    output = tmp_path / "run"
    assert invoke(own.arguments(output, steps=1, eval_every=None)).exit_code == 0
    before = tree(output)
    changes = FAULTS[name][0](own)
    invoke(own.arguments(output, steps=1, eval_every=None, **changes))
    assert tree(output) == before


@pytest.mark.parametrize("where", ["a file", "below a file"])
def test_an_output_that_is_a_file(task: Task, tmp_path: Path, where: str):
    (tmp_path / "file").write_text("precious")
    output = tmp_path / "file" if where == "a file" else tmp_path / "file" / "run"
    assert_one_line(
        invoke(task.arguments(output)),
        "--output: cannot (use|write) .*/file(/run)?: Not a directory",
    )
    assert (tmp_path / "file").read_text() == "precious"


def test_a_foreign_directory_is_left_alone(task: Task, tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("precious")
    before = tree(tmp_path)
    assert_one_line(invoke(task.arguments(tmp_path)), "is not empty and holds no run")
    assert tree(tmp_path) == before


def test_a_directory_that_cannot_be_written(tmp_path: Path):
    """As a user without rights, whoever runs this test."""
    with tempfile.TemporaryDirectory() as shared:
        folder = Path(shared)
        folder.chmod(0o755)
        task = make_task(folder / "task")
        locked, log = folder / "locked", folder / "log"
        locked.mkdir(mode=0o555)
        user = NOBODY if os.geteuid() == 0 else None
        for output in (locked, locked / "run"):
            child = Child(task.arguments(output), log, user=user)
            assert child.wait() == 1
            (line,) = child.stderr.splitlines()
            words = "Permission denied; give a directory that this user may write"
            assert line == f"Error: --output: cannot write {output}: {words}"
        assert not list(locked.iterdir())


def test_a_finished_run_can_be_read_without_rights_to_write():
    with tempfile.TemporaryDirectory() as shared:
        folder = Path(shared)
        folder.chmod(0o755)
        task = make_task(folder / "task")
        command = task.arguments(folder / "run", steps=1, eval_every=None)
        assert invoke(command).exit_code == 0
        (folder / "run").chmod(0o755)  # its owner lets others look
        user = NOBODY if os.geteuid() == 0 else None
        child = Child(command, folder / "log", user=user)
        assert child.wait() == 0, child.stderr
        assert "this run is finished (1 steps)" in child.stdout


def test_a_mistake_before_the_first_step_does_not_claim_the_directory(task: Task, tmp_path: Path):
    spoilt = tmp_path / "data.tsv"
    spoilt.write_text("sentence\tlabel\nfilm\t7\n")
    assert_one_line(invoke(task.arguments(tmp_path / "run", train=spoilt)), "the label is '7'")
    write_tsv(spoilt, 5)
    done = invoke(task.arguments(tmp_path / "run", train=spoilt, steps=1, eval_every=None))
    assert done.exit_code == 0, done.output


def test_a_full_disk_is_one_line(task: Task, tmp_path: Path, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("zo_offload.metrics.write_whole", full)
        assert_one_line(
            invoke(task.arguments(tmp_path / "run")), r"No space left on device: .*/metrics\.csv"
        )
    with monkeypatch.context() as patch:
        patch.setattr("zo_offload.engine.ZOEngine.save_pretrained", full)
        done = invoke(task.arguments(tmp_path / "run"))
        assert_one_line(done, "cannot export to .*No space left on device")
    assert invoke(task.arguments(tmp_path / "run")).exit_code == 0


def test_unknown_options_and_commands():
    for arguments in (["train"], ["train", "--stepz", "3"], ["tran"], ["eval", "--steps", "3"]):
        done = invoke(arguments)
        assert done.exit_code == 2
        assert done.stderr.splitlines()[-1].startswith("Error: ")


MEMORY = {
    "on a CPU": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 byte."),
    "on an accelerator": torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"),
    "of Python": MemoryError(),
}


@pytest.mark.parametrize("name", MEMORY)
def test_memory_that_runs_out_is_one_line(
    own: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    def fail(*_: Any) -> None:
        raise MEMORY[name]

    monkeypatch.setattr("zo_offload.run.take_steps", fail)
    assert_one_line(
        invoke(own.arguments(tmp_path / "run")), r"^Error: out of memory.*; the plan counts"
    )


@pytest.mark.parametrize("error", [OSError("no such device"), ZOError("alone")])
def test_a_rank_of_mpi_that_ends_alone_ends_the_others(
    own: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    def fail(*_: Any) -> None:
        raise error

    aborted: list[None] = []
    monkeypatch.setattr("zo_offload.run.train", fail)
    monkeypatch.setattr("zo_offload.process_group.abort", lambda: aborted.append(None))
    monkeypatch.delenv("RANK", raising=False)  # of an engine in this process
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    assert f"Error: rank 1: {error}" in invoke(own.arguments(tmp_path / "run")).stderr
    assert aborted == [None]
