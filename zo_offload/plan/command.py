"""``zo-offload plan``: from options to a plan, written down."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

from zo_offload.errors import ConfigError, StoreError
from zo_offload.ops import layout_of
from zo_offload.plan.advice import nearest, quicker
from zo_offload.plan.rates import Rates
from zo_offload.plan.report import as_json, as_table, refusal
from zo_offload.plan.request import DEFAULT_LENGTH, GIB, Budgets, Request, read_json, with_options
from zo_offload.plan.search import Layouts, plan
from zo_offload.plan.shapes import MOST, config_of


@dataclass(frozen=True)
class PlanOptions:
    """The command's options; None where one is not given.

    Attributes:
        model: A ready shape, directory or model id.
        config: A DeepSpeed JSON.
        memory: GiB by tier.
        rates: By the names of ``Rates``.
        request: By the names of ``Request``; they go before the JSON's.
        json: One line for programs.
    """

    model: str
    config: str | None
    memory: dict[str, float | None]
    rates: dict[str, float | None]
    request: dict[str, Any]
    json: bool


@dataclass(frozen=True)
class Written:
    """What a command has to say.

    Attributes:
        text: For stdout.
        refusal: What does not fit, or None.
    """

    text: str
    refusal: StoreError | None


def run(options: PlanOptions) -> Written:
    """Plan a run.

    Raises:
        ConfigError, ModelError: Options, JSON or model that cannot be used.
    """
    request, budgets, dtype = Request(), Budgets(), None
    if options.config is not None:
        request, budgets, dtype = read_json(options.config)
    for key in ("batch_size", "length", "probes", "lag"):
        if (options.request.get(key) or 0) > MOST:
            raise ConfigError(
                f"--{key.replace('_', '-')} {options.request[key]}: expected at most {MOST}"
                "; give no more"
            )
    request = with_options(request, {**options.request, "wire": _wire(options.request)})
    for tier, size in options.memory.items():
        if size is not None:
            budgets = replace(budgets, **{tier: in_bytes(tier, size)})
    rates = Rates(**{key: _rate(key, x) for key, x in options.rates.items() if x is not None})
    config, own = config_of(options.model)
    layouts = Layouts(config, dtype or own)
    if options.request.get("length") is None and layouts.most_length:
        request = replace(request, length=min(DEFAULT_LENGTH, layouts.most_length))
    planned = plan(layouts, request, budgets, rates)
    advice = quicker(layouts, request, planned, rates) if planned.fits else []
    write = as_json if options.json else as_table
    error = None
    if not planned.fits:
        fitting = nearest(layouts, request, budgets, rates)
        error = StoreError(refusal(options.model, planned, fitting))
    text = write(options.model, planned, rates, advice)
    return Written(text if options.json or error is None else "", error)


def in_bytes(tier: str, gib: float) -> int:
    """A size as an option says it.

    Raises:
        ConfigError: It is no number of bytes.
    """
    if not gib * GIB < 2**63:  # nor is nan
        raise ConfigError(
            f"--{tier}-gb {gib}: expected a size in GiB; leave it out where any amount is there"
        )
    return int(gib * GIB)


def _rate(key: str, value: float) -> float:
    if not isfinite(value):
        raise ConfigError(
            f"--{key.replace('_', '-')} {value}: expected a number; give what a machine does"
        )
    return value


def _wire(said: Mapping[str, Any]) -> str | None:
    """The codec that is asked for, as a JSON may name it."""
    if said.get("wire") is None:
        return None
    try:
        return layout_of(said["wire"]).name
    except ConfigError as error:
        raise ConfigError(str(error).replace("codec", "--wire", 1)) from error
