"""``zo-offload sensitivity``: score a model's weights on a corpus of text, and write a mask."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from zo_offload.config import load_json
from zo_offload.converted import converted_of
from zo_offload.deepspeed_json import Settings, read_settings
from zo_offload.errors import ConfigError, ModelError, TaskError
from zo_offload.integrations.hf import limits, load_causal_lm, load_tokenizer
from zo_offload.mask import Chosen, Mask, Origin, Selection, largest, write_mask
from zo_offload.process_group import accelerator
from zo_offload.reporter import Reporter
from zo_offload.sensitivity import squared_gradients
from zo_offload.step import Stepper
from zo_offload.trainable.frozen import Frozen
from zo_offload.trainable.selection import matrices_of

ANY = {"train_batch_size": 1, "zeroth_order": {}}
Batches = list[dict[str, torch.Tensor]]


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
    with reporter.phase("reading the text", quiet=True):
        batches = list(_pieces(options)) if options.method == "gradient" else []
    with reporter.phase(f"loading {options.model}"):
        model = load_causal_lm(options.model)
    chosen = _Choice(matrices_of(model, settings.zeroth_order.unit), options)
    with reporter.phase(f"scoring by {options.method}"):
        if batches:
            _by_gradient(model, settings, batches, chosen)
        elif options.method == "magnitude":
            _by_magnitude(options.model, model, chosen)
        else:
            _by_chance(options.seed, chosen)
        mask = chosen.mask()
    write_mask(Path(options.output), mask)
    return Scored(mask, time.monotonic() - began)


def _by_gradient(model: nn.Module, settings: Settings, batches: Batches, chosen: "_Choice") -> None:
    """Over a base that rests as training's does, without masters."""
    mode = None if converted_of(model) is not None else Frozen()  # one is laid out with them
    device = accelerator().current_device_name()
    with Stepper(model, settings.zeroth_order, device, settings.dtype, mode=mode) as stepper:
        squared_gradients(stepper, batches, lambda unit, found: chosen.keep(found))


def _by_magnitude(name: str, model: nn.Module, chosen: "_Choice") -> None:
    """Of the weights as the model has them, one matrix after another."""
    if converted_of(model) is not None:
        raise ModelError(
            f"--method magnitude: {name} is a converted model, whose weights are on its disk; give "
            "the model that was converted, or score by gradient"
        )
    for name, parameter in chosen.matrices.items():
        chosen.keep({name: parameter.detach().float().abs()})


def _by_chance(seed: int, chosen: "_Choice") -> None:
    for number, (name, parameter) in enumerate(chosen.matrices.items()):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        chosen.keep({name: torch.rand(parameter.shape, generator=generator)})


class _Choice:
    """Takes scores as they come, and keeps the largest.

    Args:
        matrices: That may be chosen from, by name.
        options: How many, and from what.
    """

    def __init__(self, matrices: Mapping[str, nn.Parameter], options: ScoringOptions) -> None:
        self.matrices = matrices
        self._options = options
        self._candidates = sum(parameter.numel() for parameter in matrices.values())
        self._selection = Selection(self._share_of(self._candidates))
        self._each: dict[str, Chosen] = {}

    def keep(self, scores: dict[str, torch.Tensor]) -> None:
        """Consider scores, by the name of their matrix; those of anything else are passed over."""
        for name, each in scores.items():
            if name not in self.matrices:
                continue
            if self._options.scope == "global":
                self._selection.add(name, each)
                continue
            flat = each.reshape(-1).float().cpu()
            if flat.isnan().any():
                raise ModelError(f"{name}: scores are not numbers; are the weights or the loss?")
            indices = largest(flat, self._share_of(len(flat)))
            self._each[name] = Chosen(indices, flat[indices])

    def mask(self) -> Mask:
        """Of what was scored."""
        options = self._options
        origin = Origin(options.method, options.scope, options.share, self._candidates)
        chosen = self._selection.chosen() if options.scope == "global" else self._each
        return Mask(origin, chosen)

    def _share_of(self, count: int) -> int:
        return max(1, round(self._options.share * count))


def _pieces(options: ScoringOptions) -> Iterator[dict[str, torch.Tensor]]:
    """Token ids ``[1, length]`` with themselves as labels, spread evenly over the corpus."""
    if options.corpus is None:
        raise ConfigError("--corpus: gradients are those on a text; name a file, or --method")
    longest, _ = limits(options.model)
    if longest is not None and options.length > longest:
        raise ConfigError(
            f"--length: {options.length} tokens, but the model takes {longest}; lower it"
        )
    try:
        text = Path(options.corpus).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(
            f"--corpus: cannot read {options.corpus}: {error}; give a file of plain UTF-8 text"
        ) from error
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
