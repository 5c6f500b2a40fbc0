"""OPT models of random weights that take no memory where they are made.

A matrix is a view of one line of normal values, its rows each a step further along it, so that a
model of 175 G parameters takes megabytes; whoever takes a matrix over, or copies it, has all its
elements. Neighbouring values differ as in any random matrix, so that products, codecs and buses
have as much to do.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from zo_offload.plan.shapes import config_of

STD = 0.02
CUT_LAYERS = 4
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """What a model looks like.

    Attributes:
        name: As options and tables have it.
        model: Key of ``zo_offload.plan.shapes.READY``.
        layers: Instead of the model's; its blocks are whole.
        others: Instead of what else its configuration says.
        batches: (rows, tokens of each) that it is measured with.
    """

    name: str
    model: str
    layers: int | None = None
    others: tuple[tuple[str, int], ...] = ()
    batches: tuple[tuple[int, int], ...] = ((1, 2048), (16, 64))

    def config(self) -> Any:
        """For transformers."""
        config, _ = config_of(self.model)
        changed = {**dict(self.others), "num_hidden_layers": self.layers}
        for name, value in changed.items():
            if value is not None:
                setattr(config, name, value)
        config.dtype = DTYPE
        return config

    @cached_property
    def num_parameters(self) -> int:
        """Of all of it, what is tied once."""
        return sum(parameter.numel() for parameter in _on_meta(self.config()).parameters())

    @property
    def title(self) -> str:
        """For tables."""
        if self.others:
            return self.name
        whole = config_of(self.model)[0].num_hidden_layers
        cut = self.layers is not None and self.layers < whole
        return f"{self.model}, {self.layers} of {whole} blocks" if cut else self.model


_TINY = (("hidden_size", 64), ("word_embed_proj_dim", 64), ("ffn_dim", 256), ("vocab_size", 512),
         ("num_attention_heads", 4), ("max_position_embeddings", 64))  # fmt: skip
TINY = Shape("tiny", "opt-125m", 4, _TINY, ((1, 16), (2, 8)))
WHOLE = Shape("175b", "opt-175b", batches=((1, 2048),))
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("13b", "opt-13b"),
        replace(WHOLE, name="175b-cut", layers=CUT_LAYERS, batches=((1, 2048), (16, 64))),
        Shape("6.7b", "opt-6.7b"),
        Shape("30b", "opt-30b"),
        Shape("1.3b", "opt-1.3b"),
    )
}
"""In the order in which they are worth measuring."""


def random_model(shape: Shape, device: torch.device, whole: bool = False) -> Any:
    """A causal LM of the shape, in bfloat16, the same at every call.

    Args:
        shape: Which.
        device: Where its values lie.
        whole: Whether matrices have memory of their own.
    """
    model = _on_meta(shape.config())
    generator = torch.Generator().manual_seed(0)
    made: dict[int, nn.Parameter] = {}  # what is tied stays tied
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                value = _values(name, parameter, generator).to(device)
                value = _spread(value, parameter.shape)
                made[id(parameter)] = nn.Parameter(value.contiguous() if whole else value)
            module._parameters[name] = made[id(parameter)]
    return model.eval()


def batch_of(shape: Shape, rows: int, length: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Random tokens, to be predicted."""
    generator = torch.Generator().manual_seed(1)
    highest = shape.config().vocab_size
    tokens = torch.randint(5, highest, (rows, length), generator=generator).to(device)
    return {"input_ids": tokens, "labels": tokens}


def _on_meta(config: Any) -> Any:
    from transformers import OPTForCausalLM

    with torch.device("meta"):
        return OPTForCausalLM(config)


def _values(name: str, parameter: nn.Parameter, generator: torch.Generator) -> torch.Tensor:
    """A line of them; about 1 where it is a norm's weight, else about 0."""
    count = sum(parameter.shape) - (parameter.ndim - 1)
    values = STD * torch.randn(count, generator=generator)
    return (values + (parameter.ndim == 1 and name == "weight")).to(DTYPE)


def _spread(line: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Element i of a vector is ``line[i]``, element (i, j) of a matrix ``line[i + j]``."""
    return line.as_strided(tuple(shape), (1,) * len(shape))
