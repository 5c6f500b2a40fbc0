"""``zo-offload config check``: what is wrong with a file, or what it says."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from zo_offload.config import load_json
from zo_offload.config_check import collected, mistakes, summary, without_auto
from zo_offload.deepspeed_json import read_settings
from zo_offload.errors import ConfigError, StoreError
from zo_offload.plan.advice import nearest
from zo_offload.plan.command import in_bytes
from zo_offload.plan.rates import Rates
from zo_offload.plan.report import exact, refusal
from zo_offload.plan.request import DEFAULT_LENGTH, request_of
from zo_offload.plan.search import Layouts, Planned, plan
from zo_offload.plan.shapes import config_of

READING = logging.getLogger("zo_offload")


def checked(
    path: str, trainer: bool, model: str | None, memory: Mapping[str, float | None]
) -> tuple[list[str], list[str]]:
    """What a file says, and the mistakes in it; one of the two is empty.

    Args:
        path: Of the JSON.
        trainer: Whether each "auto" will be filled in.
        model: To be planned for; None: not.
        memory: GiB by tier, beside the JSON's own budgets.

    Raises:
        ConfigError: The file cannot be read.
    """
    config = load_json(path)
    if trainer:
        config = without_auto(config)
    found = mistakes(config)
    if found:
        return [], found
    said = [f"{path}: ok", *(f"  {line}" for line in summary(_read_again(config)))]
    if model is None:
        return said, []
    try:
        request, budgets, dtype = request_of(config)
    except ConfigError as error:  # training takes it: a plan cannot count it
        return [*said, f"  not planned: {error}"], []
    shape, own = config_of(model)
    layouts = Layouts(shape, dtype or own)
    length = min(DEFAULT_LENGTH, layouts.most_length or DEFAULT_LENGTH)
    request = replace(request, length=length)
    sizes = {tier: in_bytes(tier, size) for tier, size in memory.items() if size is not None}
    budgets = replace(budgets, **sizes)
    planned: list[Planned] = []

    def fit() -> None:
        planned.append(plan(layouts, request, budgets, Rates()))

    refused = collected([fit])
    if refused:
        return [], refused
    if not planned[0].fits:
        raise StoreError(refusal(model, planned[0], nearest(layouts, request, budgets, Rates())))
    tiers = planned[0].tiers
    return [
        *said,
        f"  plan: {model} fits, device {exact(tiers.device_bytes)}, "
        f"host {exact(tiers.host_bytes)}, nvme {exact(tiers.nvme_bytes)}",
    ], []


def _read_again(config: Mapping[str, Any]) -> Any:
    """The settings; what reading warns of has been said."""
    before = READING.level
    READING.setLevel(logging.ERROR)
    try:
        return read_settings(config)
    finally:
        READING.setLevel(before)
