"""What a step of each mode moves, writes and costs, beside one bare forward of the doubled batch.

Random Llama weights. Bytes are counted where they move: by the pipeline to the device, by the store
to the disk, both while every block rests on NVMe; at rest, in host memory, while blocks rest there.
They are of the blocks, over the blocks' parameters; matrices of a base are bfloat16. Times
are of blocks that rest on the device (``--device none``) or in host memory, one step of a mode
after the other; the forward is of both signs' rows at once, without gradients.

    python benchmarks/modes.py [--layers 6] [--width 768] [--rows 16] [--length 64] [--rounds 5]
                               [--device none|cpu] [--modes NAME ...] [--folder DIR]

The last line is JSON: by mode ``moved``, ``at_rest``, ``written`` (bytes a parameter) and
``step_vs_forward``.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from timing import Times, alternating

from zo_offload import Stepper
from zo_offload.config import parse_config
from zo_offload.mask import Chosen, Mask, Origin, write_mask
from zo_offload.trainable.selection import matrices_of

STEPS = 4  # whose bytes are counted, after as many
SHARE = 0.001
LEAST_LAYERS = 3  # the pipeline holds two
INTERVAL, MANY = 50, 10**6
MASK = "MASK"  # stands for the file

LORA = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj", "v_proj"]}
MODES: dict[str, dict[str, Any]] = {
    "full": {},
    "full, nf4 wire": {"wire": "nf4"},
    "rotate": {"trainable": {"rotate": {"blocks": 1, "interval": 1}}},
    "peft": {"trainable": {"mode": "peft", "peft_config": LORA}},
    "peft on nf4": {"wire": "nf4", "trainable": {"mode": "peft", "peft_config": LORA}},
    "sparse on nf4": {"wire": "nf4", "trainable": {"mode": "sparse", "mask": MASK}},
    "sparse on int4": {"wire": "int4", "trainable": {"mode": "sparse", "mask": MASK}},
    "scales on int4": {"wire": "int4", "trainable": {"mode": "scales"}},
    "low_rank": {"trainable": {"mode": "low_rank", "interval": INTERVAL}},
    "peft, joined": {"joined_rows": MANY, "trainable": {"mode": "peft", "peft_config": LORA}},
    "low_rank, joined": {
        "joined_rows": MANY,
        "trainable": {"mode": "low_rank", "interval": INTERVAL},
    },
}


def make_model(options: argparse.Namespace) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=options.layers, hidden_size=options.width, vocab_size=options.vocabulary,
        intermediate_size=options.width * 8 // 3 // 128 * 128,
        num_attention_heads=max(1, options.width // 64), pad_token_id=0,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    return model.to(torch.bfloat16).eval()


def write_chosen(model: Any, path: Path) -> None:
    """Weights at random, a thousandth."""
    generator, chosen = torch.Generator().manual_seed(0), {}
    matrices = matrices_of(model, None)
    for name, parameter in matrices.items():
        count = max(1, round(SHARE * parameter.numel()))
        places = torch.randint(parameter.numel(), (count,), generator=generator).unique()
        chosen[name] = Chosen(places, torch.ones(len(places)))
    count = sum(p.numel() for p in matrices.values())
    write_mask(path, Mask(Origin("random", "matrix", SHARE, count), chosen))


class Bench:
    """Makes runs of a mode."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self._folder = folder
        self._mask = folder / "mask.safetensors"
        write_chosen(make_model(options), self._mask)
        tokens = torch.randint(5, options.vocabulary, (options.rows, options.length))
        self.batch = {"input_ids": tokens, "labels": tokens}

    def stepper(self, block: Mapping[str, Any], device: str) -> Stepper:
        offload: dict[str, Any] = {"device": device}
        if device == "nvme":
            offload["nvme_path"] = tempfile.mkdtemp(dir=self._folder)
        text = json.dumps({"eps": 1e-3, **block, "offload_param": offload})
        found = json.loads(text.replace(json.dumps(MASK), json.dumps(str(self._mask))))
        return Stepper(make_model(self.options), parse_config({"zeroth_order": found}))

    def step(self, stepper: Stepper) -> None:
        stepper.train_step([self.batch], lr=1e-7)

    def bytes_of(self, block: Mapping[str, Any]) -> dict[str, float]:
        """A parameter of the blocks."""
        with closing(self.stepper(block, "cpu")) as stepper:
            units, count = stepper.weights.map.units, _count(stepper)
            at_rest = sum(unit.wire_bytes + unit.rest_bytes for unit in units) / count
        with closing(self.stepper(block, "nvme")) as stepper:
            weights, count = stepper.weights, _count(stepper)
            assert weights.files is not None
            assert weights.pipeline is not None
            for _ in range(STEPS):
                self.step(stepper)
            moved, written = weights.pipeline.bytes_moved, weights.files.bytes_written
            for _ in range(STEPS):
                self.step(stepper)
            return {
                "moved": (weights.pipeline.bytes_moved - moved) / STEPS / count,
                "at_rest": at_rest,
                "written": (weights.files.bytes_written - written) / STEPS / count,
            }

    def times_of(self, modes: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Times], Times]:
        """Of steps, and of a forward of the doubled batch."""
        plain = make_model(self.options)
        doubled = {key: value.repeat(2, 1) for key, value in self.batch.items()}

        def forward() -> None:
            with torch.inference_mode():
                float(plain(**doubled, use_cache=False).loss)

        steppers = {name: self.stepper(block, self.options.device) for name, block in modes.items()}
        contestants: dict[str, Callable[[], object]] = {"forward": forward}
        contestants |= {
            name: lambda stepper=stepper: self.step(stepper) for name, stepper in steppers.items()
        }
        times = alternating(contestants, self.options.rounds)
        for stepper in steppers.values():
            stepper.close()
        return times, times.pop("forward")


def _count(stepper: Stepper) -> int:
    return sum(unit.num_parameters for unit in stepper.weights.map.units)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (
        ("layers", 6), ("width", 768), ("rows", 16), ("length", 64), ("rounds", 5),
        ("vocabulary", 4096),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="none", choices=["none", "cpu"])
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--folder", type=Path, help="on the disk that blocks are to rest on")
    options = parser.parse_args()
    if options.layers < LEAST_LAYERS:
        parser.error(
            f"--layers {options.layers}: at least {LEAST_LAYERS}; fewer blocks all stay in the "
            "pipeline's slots, and nothing would move"
        )
    modes = {name: MODES[name] for name in options.modes}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        bench = Bench(options, Path(folder))
        found: dict[str, dict[str, float]] = {}
        for name, block in modes.items():
            found[name] = bench.bytes_of(block)
        times, forward = bench.times_of(modes)
    shape = f"{2 * options.rows} x {options.length}"
    print(f"a step, beside a forward of {shape} ({forward.median:.3f} s); bytes a parameter")
    print(f"{'':32} {'moved':>7}  {'at rest':>7}  {'written':>7}   time")
    for name, each in found.items():
        each["step_vs_forward"] = times[name].over(forward)
        print(
            f"{name:32} {each['moved']:7.3f}  {each['at_rest']:7.3f}  {each['written']:7.3f}   "
            f"{each['step_vs_forward']:.2f}"
        )
    print(json.dumps({k: {n: round(v, 4) for n, v in each.items()} for k, each in found.items()}))


if __name__ == "__main__":
    main()
