"""``zo-offload plan``: from options to a plan, written down."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from zo_offload.errors import ConfigError, StoreError
from zo_offload.ops import layout_of
from zo_offload.plan.advice import nearest, quicker
from zo_offload.plan.rates import Rates
from zo_offload.plan.report import as_json, as_table, refusal
from zo_offload.plan.request import DEFAULT_LENGTH, GIB, Budgets, Request, read_json, with_options
from zo_offload.plan.search import Layouts, plan
from zo_offload.plan.shapes import config_of


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
    request = with_options(request, {**options.request, "wire": _wire(options.request)})
    for tier, size in options.memory.items():
        if size is not None:
            budgets = replace(budgets, **{tier: int(size * GIB)})
    rates = Rates(**{key: value for key, value in options.rates.items() if value is not None})
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


def _wire(said: Mapping[str, Any]) -> str | None:
    """The codec that is asked for, as a JSON may name it."""
    if said.get("wire") is None:
        return None
    try:
        return layout_of(said["wire"]).name
    except ConfigError as error:
        raise ConfigError(str(error).replace("codec", "--wire", 1)) from error
