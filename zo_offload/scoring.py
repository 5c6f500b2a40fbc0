"""``zo-offload sensitivity``: score a model's weights on a corpus of text, and write a mask."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from zo_offload.config import load_json
from zo_offload.deepspeed_json import read_settings
from zo_offload.errors import ConfigError, ModelError, TaskError
from zo_offload.integrations.hf import limits, load_causal_lm, load_tokenizer
from zo_offload.mask import Chosen, Mask, Origin, Selection, largest, write_mask
from zo_offload.process_group import accelerator
from zo_offload.reporter import Reporter
from zo_offload.sensitivity import squared_gradients
from zo_offload.step import Stepper
from zo_offload.units import Unit

ANY = {"train_batch_size": 1, "zeroth_order": {}}
Scores = Callable[[str, torch.Tensor], None]


@dataclass(frozen=True)
class ScoringOptions:
    """What to score, and how.

    Attributes:
        model: Hugging Face directory or model id.
        output: The mask's file.
        corpus: Text in UTF-8; needed for gradients.
        config: DeepSpeed JSON: precision, and where weights rest meanwhile.
        method: ``gradient``, ``magnitude`` or ``random``.
        scope: ``global`` or ``matrix``; see :class:`Origin`.
        share: Of the weights in the units' matrices, 0 to 1.
        sequences: Pieces of text, each of which gives one gradient.
        length: Of a piece, in tokens.
        seed: Of random scores.
    """

    model: str
    output: str
    corpus: str | None = None
    config: str | None = None
    method: str = "gradient"
    scope: str = "global"
    share: float = 1e-3
    sequences: int = 16
    length: int = 512
    seed: int = 0


@dataclass(frozen=True)
class Scored:
    """What was written.

    Attributes:
        mask: All of it.
        seconds: That it took.
    """

    mask: Mask
    seconds: float


def score(options: ScoringOptions, reporter: Reporter | None = None) -> Scored:
    """Score every matrix of the model's units, and write a mask of the largest scores.

    Raises:
        ConfigError: An option or the JSON is wrong.
        TaskError: The corpus is missing, or too short.
        ModelError: The model cannot be loaded or scored.
    """
    began, reporter = time.monotonic(), reporter or Reporter()
    settings = read_settings(load_json(options.config) if options.config else ANY)
    batches = list(_pieces(options)) if options.method == "gradient" else []
    with reporter.phase(f"loading {options.model}"):
        model = load_causal_lm(options.model)
    device = accelerator().current_device_name()
    with Stepper(model, settings.zeroth_order, device, settings.dtype) as stepper:
        chosen = _Choice(stepper, options, reporter)
        with reporter.phase(f"scoring by {options.method}"):
            chosen.score(batches)
        mask = chosen.mask()
    write_mask(Path(options.output), mask)
    return Scored(mask, time.monotonic() - began)


class _Choice:
    """Takes scores as they come, and keeps the largest."""

    def __init__(self, stepper: Stepper, options: ScoringOptions, reporter: Reporter) -> None:
        self._stepper = stepper
        self._options = options
        if stepper.weights.map.divided:
            raise ModelError(
                'experts are divided: keep them together to score them: "unit": "sublayer"'
            )
        self._matrices = {
            segment.name: segment.numel
            for unit in stepper.weights.map.units
            for _, segment in unit.segments
            if len(segment.shape) > 1
        }
        self._candidates = sum(self._matrices.values())
        self._selection = Selection(self._share_of(self._candidates))
        self._each: dict[str, Chosen] = {}

    def score(self, batches: list[dict[str, torch.Tensor]]) -> None:
        """All units."""
        if self._options.method == "gradient":
            squared_gradients(self._stepper, batches, self._keep)
            return
        for unit in self._stepper.weights.map.units:
            masters = self._stepper.weights.held(unit)
            if self._options.method == "random":
                masters = {name: self._random(name, each) for name, each in masters.items()}
            self._keep(unit, {name: each.abs() for name, each in masters.items()})

    def mask(self) -> Mask:
        """Of what was scored."""
        options = self._options
        origin = Origin(options.method, options.scope, options.share, self._candidates)
        chosen = self._selection.chosen() if options.scope == "global" else self._each
        return Mask(origin, chosen)

    def _keep(self, unit: Unit, scores: dict[str, torch.Tensor]) -> None:
        for name, each in scores.items():
            if name not in self._matrices:
                continue
            if self._options.scope == "global":
                self._selection.add(name, each)
                continue
            flat = each.reshape(-1).float().cpu()
            indices = largest(flat, self._share_of(len(flat)))
            self._each[name] = Chosen(indices, flat[indices])

    def _random(self, name: str, values: torch.Tensor) -> torch.Tensor:
        number = list(self._matrices).index(name) if name in self._matrices else 0
        generator = torch.Generator().manual_seed(self._options.seed * 1_000_003 + number)
        return torch.rand(values.shape, generator=generator)

    def _share_of(self, count: int) -> int:
        return max(1, round(self._options.share * count))


def _pieces(options: ScoringOptions) -> Iterator[dict[str, torch.Tensor]]:
    """Token ids ``[1, length]`` with themselves as labels, spread evenly over the corpus."""
    if options.corpus is None:
        raise ConfigError("--corpus: gradients are those on a text; name a file, or --method")
    longest, _ = limits(options.model)
    if longest is not None and options.length > longest:
        raise ConfigError(f"--length: {options.length} tokens, but the model takes {longest}")
    try:
        text = Path(options.corpus).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"--corpus: cannot read {options.corpus}: {error}") from error
    ids = load_tokenizer(options.model)(text, verbose=False)["input_ids"]
    found = len(ids) // options.length
    if found < options.sequences:
        raise TaskError(
            f"--corpus: {options.corpus} has {len(ids):,} tokens, enough for {found} pieces of "
            f"{options.length}, not {options.sequences}; lower --length or --sequences"
        )
    for number in range(options.sequences):
        first = number * found // options.sequences * options.length
        piece = torch.tensor([ids[first : first + options.length]])
        yield {"input_ids": piece, "labels": piece}
