"""``trainable`` of the ``zeroth_order`` block: the modes, and which keys are of which."""

from typing import Annotated, Any, Literal

from pydantic import Field

from zo_offload.config_fields import BLOCK, Kinds, Layers, Patterns, Strict
from zo_offload.errors import ConfigError
from zo_offload.ops.layout import Layout, layout_of


class RotateConfig(Strict):
    """Groups of blocks that take turns."""

    blocks: Annotated[int, Field(ge=1)] = 1
    """Blocks of a group."""
    interval: Annotated[int, Field(ge=1)] = 50
    """Steps of a turn."""


class TrainableConfig(Strict):
    """What moves."""

    mode: Literal["full", "peft", "sparse", "low_rank", "scales"] = "full"
    """What [moves](trainable.md): `"full"`, every parameter with `requires_grad`, or those
    chosen below; `"peft"`, an adapter beside a frozen base; `"sparse"`, the weights that a mask
    names, over a frozen base; `"low_rank"`, matrices along products of two small factors;
    `"scales"`, the group scales of a frozen base of integers. A `PeftModel` is trained so
    without a word in the JSON."""
    parameters: Patterns | None = None
    """Of `"full"`, `"low_rank"`, `"scales"`, and in `"sparse"` what moves whole: patterns on
    parameter names, `["*.self_attn.*"]`."""
    kinds: Kinds | None = None
    """Of the first three: [kinds](trainable.md#kinds) of parameters, `["o_proj", "down_proj"]`,
    `["vector"]`."""
    layers: Layers | None = None
    """Of the first three: numbers and ranges of blocks, `[0, "20-31", -1]`; with `parameters`
    and `kinds`, what is of all."""
    rotate: RotateConfig | None = None
    """Of `"full"`: `{"blocks": 1, "interval": 50}`: groups of so many blocks take turns of so
    many steps; `null`: all move at every step."""
    peft_config: dict[str, Any] | None = None
    """Of `"peft"`: an adapter to make: `{"peft_type": "LORA", "r": 8, ...}`, the keys of the
    `peft` library."""
    adapter: str | None = None
    """Of `"peft"`: a directory of adapter files to go on from."""
    mask: str | None = None
    """Of `"sparse"`: a file that [`zo-offload
    sensitivity`](training.md#which-weights-matter-zo-offload-sensitivity) has written."""
    rank: Annotated[int, Field(ge=1, le=64)] | None = None
    """Of `"low_rank"`: columns of the small factors; `null`: 2."""
    interval: Annotated[int, Field(ge=1)] | None = None
    """Likewise: steps that the right factor is held, and between merges; `null`: 50."""
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Likewise: momentum in the small factor; `null`: 0."""


_MODES_OF_KEYS = {
    "parameters": ("full", "low_rank", "scales", "sparse"),
    "kinds": ("full", "low_rank", "scales"),
    "layers": ("full", "low_rank", "scales"),
    "rotate": ("full",),
    "peft_config": ("peft",),
    "adapter": ("peft",),
    "mask": ("sparse",),
    "rank": ("low_rank",),
    "interval": ("low_rank",),
    "momentum": ("low_rank",),
}
INTEGERS = ("int4", "int8")


def integer_layout(wire: str | None) -> Layout:
    """How a base lies whose group scales are to move.

    Raises:
        ConfigError: It is not one of integers.
    """
    layout = layout_of(wire or "identity")
    if layout.kind not in INTEGERS:
        found = "null" if wire is None else f'"{wire}"'
        raise ConfigError(
            f'{BLOCK}.wire: mode "scales" moves the group scales of a base of integers; write '
            f'"int4" or "int8" (a scale for 128 weights), "int4:64" or "int8:64", found {found}'
        )
    return layout


def check_trainable(trainable: TrainableConfig, wire: str | None, lag: int, master: str) -> None:
    """What the keys of ``trainable`` say together, and with those beside it.

    Raises:
        ConfigError: They cannot.
    """
    for key, modes in _MODES_OF_KEYS.items():
        if trainable.mode not in modes and getattr(trainable, key) is not None:
            of = " or ".join(f'"{mode}"' for mode in modes)
            raise ConfigError(
                f'{BLOCK}.trainable.{key}: is of "mode": {of}, found "{trainable.mode}"'
                "; leave it out, or write that mode"
            )
    check_low_rank(trainable, lag, master)
    if trainable.mode == "scales":
        integer_layout(wire)
    if trainable.mode == "sparse" and trainable.mask is None:
        raise ConfigError(
            f'{BLOCK}.trainable.mask: mode "sparse" needs a mask, as "zo-offload sensitivity" '
            "writes it; found null"
        )
    if trainable.peft_config is not None and trainable.adapter is not None:
        raise ConfigError(
            f"{BLOCK}.trainable: peft_config makes an adapter, and adapter goes on from one; keep "
            "one of the two"
        )


def check_low_rank(trainable: TrainableConfig, lag: int, master: str) -> None:
    """What stands beside ``"mode": "low_rank"``.

    Raises:
        ConfigError: It cannot.
    """
    if trainable.mode != "low_rank":
        return
    if lag:
        raise ConfigError(
            f'{BLOCK}.update.lag: "mode": "low_rank" touches masters every trainable.interval '
            f"steps, and has no other lag; write 0, found {lag}"
        )
    if master != "fp32":
        raise ConfigError(
            f'{BLOCK}.master: "mode": "low_rank" merges steps into masters in fp32; write "fp32", '
            f'found "{master}"'
        )
