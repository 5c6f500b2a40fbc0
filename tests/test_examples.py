"""The scripts in docs/examples run as they stand."""

import difflib
import re
import shutil
from pathlib import Path

import pytest
from cli.common import invoke
from distributed.launch import environment, forked, wait
from forked import Forked
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from zo_offload.embedded.pretrain import make_embedded
from zo_offload.mask import read_mask

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"
DEEPSPEED = EXAMPLES / "deepspeed"


def run(script: Path, *arguments: Path | str, cwd: Path) -> list[str]:
    """What it prints."""
    log = cwd / "log"
    given = [str(script), *map(str, arguments)]
    done = Forked("forked:script", *given, out=log, variables=environment(), cwd=cwd)
    assert done.wait() == 0, done.stdout
    return done.stdout.splitlines()


def losses(lines: list[str]) -> list[float]:
    return [float(line.split()[-1]) for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded one, untrained."""
    folder = tmp_path_factory.mktemp("embedded")
    make_embedded(folder, steps=0, layers=2)
    return folder / "model"


def tuned(script: str, model: Path, tmp_path: Path) -> list[str]:
    """What a script prints that tunes a model, which is another one then."""
    out = tmp_path / "out"
    said = run(EXAMPLES / script, model, out, cwd=tmp_path)
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert before.keys() == after.keys()
    assert any(not before[name].equal(after[name]) for name in before)
    return said


def shown(script: str, page: str) -> bool:
    """Whether a page shows a script as it stands, without its first line and its imports."""
    text = (EXAMPLES / script).read_text()
    body = text[text.index("zo_offload.install()") :]
    return body in (EXAMPLES.parent / page).read_text()


def test_plain_loop(model: Path, tmp_path: Path):
    said = tuned("plain_loop.py", model, tmp_path)
    found = losses(said)
    assert len(found) == 20
    assert found[-1] < found[0] - 0.1


def test_the_trainer(model: Path, tmp_path: Path):
    said = tuned("trainer.py", model, tmp_path)
    assert len([line for line in said if "'grad_norm'" in line]) == 2
    assert len([line for line in said if "'eval_loss'" in line]) == 2
    assert shown("trainer.py", "trainer.md")


def test_a_loop_of_accelerate(model: Path, tmp_path: Path):
    said = tuned("accelerate_loop.py", model, tmp_path)
    assert [line[:7] for line in said if "loss" in line] == [f"step {i}:" for i in range(1, 5)]
    assert shown("accelerate_loop.py", "trainer.md")


def test_sft(model: Path, tmp_path: Path):
    pytest.importorskip("trl", reason="trl is missing (pip install --no-deps trl)")
    said = tuned("sft.py", model, tmp_path)
    assert len([line for line in said if "'mean_token_accuracy'" in line]) == 2
    assert shown("sft.py", "trl.md")


def test_an_adapter_is_in_plain_peft_what_it_was_in_the_engine(model: Path, tmp_path: Path):
    said = run(EXAMPLES / "lora.py", model, tmp_path / "out", cwd=tmp_path)
    before, after, plain = losses(said)
    assert after < before
    assert plain == pytest.approx(after, abs=2e-4)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_single_weights_over_four_bits(model: Path, tmp_path: Path):
    mask, out = tmp_path / "mask.safetensors", tmp_path / "out"
    given = ["--model", str(model), "--output", str(mask), "--method", "magnitude"]
    done = invoke(["sensitivity", *given, "--share", "0.05"])
    assert done.exit_code == 0, done.output
    found = losses(run(EXAMPLES / "sparse.py", model, mask, out, cwd=tmp_path))
    assert len(found) == 4
    assert found[-1] < found[0]
    chosen = read_mask(mask).chosen
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(out).state_dict()
    for name, value in before.items():
        if name not in chosen and "layers" not in name:
            assert value.equal(after[name]), name
    assert any(not before[name].equal(after[name]) for name in chosen)


def test_two_nodes_end_in_the_bits_of_one(model: Path, tmp_path: Path):
    """Two ranks that know each other from the environment, as the launcher tells them."""
    script, found = EXAMPLES / "two_nodes" / "train.py", {}
    for ranks in (1, 2):
        given = str(script), str(model), str(tmp_path / f"out-{ranks}")
        ended = wait(forked("forked:script", ranks, *given, out=tmp_path / str(ranks)))
        assert [status for status, _ in ended] == [0] * ranks, ended
        found[ranks] = losses("".join(text for _, text in ended).splitlines())
    assert len(found[1]) == 4
    assert found[2] == found[1]
    one, two = (tmp_path / f"out-{ranks}" / "model.safetensors" for ranks in (1, 2))
    assert one.read_bytes() == two.read_bytes()


def test_every_example_is_on_the_page():
    page = (EXAMPLES.parent / "examples.md").read_text()
    scripts = {str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*.py")}
    shown = set(re.findall(r'^--8<-- "docs/examples/(.*\.py)"$', page, re.MULTILINE))
    assert scripts - shown == {"deepspeed/before.py", "deepspeed/after.py"}  # deepspeed.md


def test_vision(tmp_path: Path):
    """The model is a random one, and it learns."""
    lines = run(EXAMPLES / "vision.py", tmp_path / "out", cwd=tmp_path)
    found = [line.split()[-1] for line in lines if "accuracy" in line]
    assert len(found) == 7
    assert float(found[0]) <= 0.6
    assert float(found[-1]) >= 0.9
    made = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert type(made).__name__ == "ViTForImageClassification"


def changed_lines(suffix: str) -> list[str]:
    before, after = ((DEEPSPEED / f"{n}.{suffix}").read_text() for n in ("before", "after"))
    names = f"before.{suffix}", f"after.{suffix}"
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), *names, lineterm="", n=0)
    return list(lines)


def test_a_zero_offload_script_becomes_ours_with_few_changed_lines():
    shown = changed_lines("py") + changed_lines("json")
    page = (EXAMPLES.parent / "deepspeed.md").read_text()
    assert "```diff\n" + "\n".join(shown) + "\n```" in page
    marks = [line[0] for line in shown if not line.startswith(("+++", "---", "@@"))]
    assert max(marks.count("+"), marks.count("-")) <= 12


def test_the_changed_script_runs(model: Path, tmp_path: Path):
    shutil.copy(DEEPSPEED / "after.json", tmp_path / "ds.json")
    said = run(DEEPSPEED / "after.py", model, "out", cwd=tmp_path)
    assert [line[:8] for line in said if "loss" in line] == [
        "epoch 0:",
        "epoch 1:",
    ]
    assert (tmp_path / "out" / "latest").read_text() == "global_step8"
