"""``zo-offload sensitivity``: the mask of the command is that of autograd's squared gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cli.common import WORDS, Task, assert_one_line, invoke, write_config
from zo_offload.mask import read_mask

LENGTH, SEQUENCES, SHARE = 8, 3, 0.02


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(WORDS), (60,), generator=generator).tolist()
    (tmp_path / "corpus.txt").write_text(" ".join(WORDS[i] for i in chosen))
    return tmp_path / "corpus.txt"


def command(task: Task, output: Path, **options: Any) -> list[str]:
    given: dict[str, Any] = {
        "model": task.folder / "model", "output": output, "share": SHARE,
        "sequences": SEQUENCES, "length": LENGTH, **options,
    }  # fmt: skip
    return ["sensitivity", *(part for k, v in given.items() for part in (f"--{k}", str(v)))]


def gradients(task: Task, corpus: Path) -> dict[str, torch.Tensor]:
    """Autograd's, of the matrices in blocks."""
    folder = str(task.folder / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)(corpus.read_text())["input_ids"]
    sums: dict[str, torch.Tensor] = {}
    for number in range(SEQUENCES):
        first = number * (len(ids) // LENGTH) // SEQUENCES * LENGTH
        piece = torch.tensor([ids[first : first + LENGTH]])
        model.zero_grad()
        model(input_ids=piece, labels=piece).loss.backward()
        for name, parameter in model.named_parameters():
            if ".layers." in name and parameter.ndim > 1:
                sums[name] = sums.get(name, 0) + parameter.grad.square()
    return sums


@pytest.mark.parametrize("nvme", [False, True])
def test_the_largest_squared_gradients(task: Task, tmp_path: Path, corpus: Path, nvme: bool):
    config = write_config(tmp_path / "ds.json", nvme=tmp_path / "disk" if nvme else None)
    done = invoke(command(task, tmp_path / "mask", corpus=corpus, config=config))
    assert done.exit_code == 0, done.output
    right = gradients(task, corpus)
    count = round(SHARE * sum(each.numel() for each in right.values()))
    assert f"{count} of 16,384 weights in " in done.stdout
    least = torch.cat([each.flatten() for each in right.values()]).topk(count).values[-1]
    mask = read_mask(tmp_path / "mask")
    assert mask.num_chosen == count
    for name, chosen in mask.chosen.items():
        scores = right[name].flatten()[chosen.indices]
        torch.testing.assert_close(chosen.scores, scores, rtol=1e-3, atol=0)
        assert bool((scores >= least * 0.999).all())


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_other_scores_need_no_text(task: Task, tmp_path: Path, method: str):
    masks = []
    for number in range(2):
        output = tmp_path / str(number)
        done = invoke(command(task, output, method=method, scope="matrix"))
        assert done.exit_code == 0, done.output
        masks.append(output.read_bytes())
    assert masks[0] == masks[1]
    mask = read_mask(tmp_path / "0")
    assert {len(each.indices) for each in mask.chosen.values()} == {
        round(SHARE * count) for count in (32 * 32, 32 * 64)
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "--corpus: gradients are those on a text"),
        ({"corpus": "missing.txt"}, "--corpus: cannot read missing.txt"),
        ({"length": 500}, "--length: 500 tokens, but the model takes 24"),
        ({"sequences": 99}, "has 61 tokens, enough for 7 pieces of 8, not 99; lower"),
    ],
)
def test_a_mistake_is_one_line(
    task: Task, tmp_path: Path, corpus: Path, options: dict[str, Any], words: str
):
    given = {"corpus": corpus, **options} if options else {}
    assert_one_line(invoke(command(task, tmp_path / "mask", **given)), words)
    assert not (tmp_path / "mask").exists()


def test_a_converted_model_has_no_magnitudes(task: Task, tmp_path: Path):
    base = tmp_path / "base"
    done = invoke(["convert", "--model", f"{task.folder / 'model'}", "--output", f"{base}"])
    assert done.exit_code == 0, done.output
    done = invoke(command(task, tmp_path / "mask", model=base, method="magnitude"))
    words = rf"--method magnitude: {base} is a converted model, .*; give the model that was conv"
    assert_one_line(done, words)
    assert not (tmp_path / "mask").exists()


@pytest.mark.parametrize("scope", ["global", "matrix"])
def test_weights_that_are_no_numbers(task: Task, tmp_path: Path, scope: str):
    model: Any = AutoModelForCausalLM.from_pretrained(str(task.folder / "model"))
    model.model.decoder.layers[0].fc1.weight.data[0, :3] = float("nan")
    model.save_pretrained(tmp_path / "model")
    options = {"model": tmp_path / "model", "method": "magnitude", "scope": scope}
    done = invoke(command(task, tmp_path / "mask", **options))
    assert_one_line(done, "fc1.weight: scores are not numbers")
    assert not (tmp_path / "mask").exists()
