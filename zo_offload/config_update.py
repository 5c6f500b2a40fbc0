"""``update`` of the ``zeroth_order`` block: the types, and which keys are of which."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from zo_offload.config_fields import BLOCK, Positive, Strict
from zo_offload.errors import ConfigError
from zo_offload.momentum import MOST_WINDOW, TAIL, Adam, Momentum, least_window

MOST_LAG = 1024  # steps that every visit adds on the way; far beyond what pays
DRAW_NS = 0.08  # a weight and direction of signs, on one core with AVX-512: docs/results.md
Share = Annotated[float, Field(ge=0, lt=1)]


class UpdateConfig(Strict):
    """How projected gradients become coefficients on directions."""

    type: Literal["sgd", "momentum", "adam"] = "sgd"
    """`"sgd"`, `"momentum"` or `"adam"`: [how](training.md#momentum-and-adam). The latter two
    draw the directions of a window of steps again at every step, and hold nothing of the
    model's size."""
    momentum: Share | None = None
    """Of `"momentum"`; `null`: `optimizer.params.momentum` where the optimizer's type is
    another than `"ZO"`, else 0.9."""
    beta1: Share | None = None
    """Of `"adam"`; `null`: the first of `optimizer.params.betas` likewise, else 0.9."""
    beta2: Share | None = None
    """Of `"adam"`; `null`: the second of `optimizer.params.betas` likewise, else 0.999."""
    adam_eps: Positive | None = None
    """Of `"adam"`; `null`: `optimizer.params.eps` likewise, else 1e-8."""
    window: Annotated[int, Field(ge=1)] | None = None
    """Of both: steps that count, this one included, 256 at most; `null`: the fewest that leave
    out less than 1 % of all weight (44 at 0.9)."""
    where: Literal["host", "device"] | None = None
    """Where masters that rest in host memory are updated: `"host"` (nothing returns over the
    bus) or `"device"` (whole masters travel up when an update is due, and back; for a host
    whose processor is slower than the bus). `null`: on an accelerator both are tried during the
    first eight steps (each `lag` steps long) and the faster is kept, with room for whole
    masters in the slots; on a CPU `"host"`. The bits are the same."""
    lag: Annotated[int, Field(ge=0, le=MOST_LAG)] = 0
    """Steps L that a block's masters may be behind. They then move once in L steps only, what
    is missing is added in fp32 on the way to the forward, and the next step's first blocks are
    fetched before this one's losses are known. Reading (evaluation, saving, export) is always
    of the current step. In bfloat16 and fp16 another lag is another run: it decides where the
    forward's rounding happens. [More](choosing.md#probes) where a disk bounds a step."""


_TYPES_OF_KEYS = {
    "momentum": ("momentum",),
    "beta1": ("adam",),
    "beta2": ("adam",),
    "adam_eps": ("adam",),
    "window": ("momentum", "adam"),
}
BETA, BETA2, EPS = 0.9, 0.999, 1e-8  # where the JSON says nothing; torch's


def momentum_of(update: UpdateConfig, mode: str) -> Momentum | None:
    """The momentum that the keys ask for, defaults filled in; None for plain descent.

    Args:
        update: The keys.
        mode: What moves.

    Raises:
        ConfigError: A key is of another type, or the window is longer than is taken.

    Example:
        >>> momentum_of(UpdateConfig(type="momentum"), "full")
        Momentum(beta=0.9, window=44, adam=None)
    """
    for key, types in _TYPES_OF_KEYS.items():
        if update.type not in types and getattr(update, key) is not None:
            of = " or ".join(f'"{each}"' for each in types)
            raise ConfigError(
                f'{BLOCK}.update.{key}: is of "type": {of}, found "{update.type}"'
                "; leave it out, or write that type"
            )
    if update.type == "sgd":
        return None
    if mode == "low_rank":
        raise ConfigError(
            f'{BLOCK}.update.type: "mode": "low_rank" has a momentum of its own, '
            f'trainable.momentum; write "sgd", found "{update.type}"'
        )
    adam, key = None, "momentum"
    if update.type == "adam":
        adam, key = Adam(_or(update.beta2, BETA2), _or(update.adam_eps, EPS)), "beta1"
    beta = _or(getattr(update, key), BETA)
    return Momentum(beta, _window(update, key, beta), adam)


def moments_beside(params: Mapping[str, Any], update: UpdateConfig) -> dict[str, float]:
    """What ``optimizer.params`` says of the momentum that our block asks for.

    Args:
        params: ``momentum`` of SGD; ``betas`` and ``eps`` of Adam. Null and "auto" say nothing.
        update: Of our block; whichever of its keys is written, too, must be equal.

    Returns:
        By our keys; nothing for plain descent.

    Raises:
        ConfigError: A value is no such number, or both places say different things.

    Example:
        >>> moments_beside({"betas": [0.8, 0.99], "eps": 1e-6}, UpdateConfig(type="adam"))
        {'beta1': 0.8, 'beta2': 0.99, 'adam_eps': 1e-06}
    """
    said = _said(params, update.type)
    taken = {key: value for key, (_, value) in said.items() if value not in (None, "auto")}
    try:
        read = UpdateConfig(type=update.type, **taken)
    except ValidationError as error:
        theirs, value = said[str(error.errors()[0]["loc"][0])]
        expected = "a number above 0" if theirs == "eps" else "a number at least 0, below 1"
        raise ConfigError(
            f"optimizer.params.{theirs}: expected {expected}, found {value!r}"
        ) from None
    for key in taken:
        if getattr(update, key) not in (None, getattr(read, key)):
            theirs, value = said[key]
            raise ConfigError(
                f"optimizer.params.{theirs} says {value!r}, and {BLOCK}.update.{key} "
                f"{getattr(update, key)!r}; keep one"
            )
    return {key: float(getattr(read, key)) for key in taken}


def _said(params: Mapping[str, Any], kind: str) -> dict[str, tuple[str, Any]]:
    """By our keys: where another optimizer's params say it, and what."""
    if kind == "sgd":
        return {}
    if kind == "momentum":
        return {"momentum": ("momentum", params.get("momentum"))}
    betas = params.get("betas")
    if betas in (None, "auto"):
        betas = [None, None]
    if not isinstance(betas, list | tuple) or len(betas) != 2:
        raise ConfigError(f"optimizer.params.betas: expected two numbers, found {betas!r}")
    beta1, beta2 = betas
    eps = params.get("eps")
    return {"beta1": ("betas", beta1), "beta2": ("betas", beta2), "adam_eps": ("eps", eps)}


def _window(update: UpdateConfig, key: str, beta: float) -> int:
    window = update.window
    if window is not None and window <= MOST_WINDOW:
        return window
    least = least_window(beta) if window is None else window
    if least <= MOST_WINDOW:
        return least
    costs = (
        f"each step draws every weight's noise so many times ({DRAW_NS} ns each on a core for "
        f"signs, {DRAW_NS * least:.0f} ns a weight and step)"
    )
    if window is not None:
        raise ConfigError(
            f"{BLOCK}.update.window: at most {MOST_WINDOW} steps, found {window}: {costs}"
            "; write no more, or leave it out"
        )
    raise ConfigError(
        f"{BLOCK}.update.{key}: {beta:g} needs a window of {least} steps to leave out less than "
        f"{TAIL:.0%} of all weight, and at most {MOST_WINDOW} are taken: {costs}; write a smaller "
        f"one, or update.window ({MOST_WINDOW} leaves out {beta**MOST_WINDOW:.1%})"
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
