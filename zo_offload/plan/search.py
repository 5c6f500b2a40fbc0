"""Decides what a request leaves open: the quickest of everything that fits.

What is open is a short list of choices, all of which are tried; so more memory can only add to what
fits, and never makes a plan slower.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from zo_offload.ambient import head_of
from zo_offload.config_trainable import TrainableConfig, check_trainable
from zo_offload.errors import ConfigError, ModelError
from zo_offload.granularity import GRANULARITIES
from zo_offload.placing import Placing
from zo_offload.plan.budget import Tiers, place
from zo_offload.plan.layout import Dims, Layout, dims_of, lay_out
from zo_offload.plan.prepared import block_for, key_of, prepared
from zo_offload.plan.rates import Rates, Step, step_of
from zo_offload.plan.request import Budgets, Request
from zo_offload.plan.shapes import build
from zo_offload.trainable.moving import Moving

MOST_LANES = 64  # alive at once
CPU = torch.device("cpu")


class Layouts:
    """A model's layouts, each made when it is first asked for.

    Args:
        config: Of the model, as ``shapes.config_of`` gives it.
        dtype: What the forward computes in.
    """

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._config = config
        self._model = build(config)
        self._prepared: dict[tuple, tuple[nn.Module, Moving]] = {}
        self._made: dict[tuple, Layout | ConfigError | ModelError] = {}
        self.vocabulary = int(config.get_text_config().vocab_size)
        self.has_head = head_of(self._model) is not None
        self.most_length = getattr(config.get_text_config(), "max_position_embeddings", None)

    def at(self, request: Request) -> Layout:
        """The layout at a request's granularity (left open: of blocks), as its mode moves it.

        Raises:
            ConfigError, ModelError: Training would refuse it.
        """
        request = replace(request, unit=request.unit or "block")
        key = (request.unit, request.master, *key_of(request))
        if key not in self._made:
            try:
                self._made[key] = self._lay_out(request)
            except (ConfigError, ModelError) as error:
                self._made[key] = error
        found = self._made[key]
        if not isinstance(found, Layout):
            raise found
        return found

    def _lay_out(self, request: Request) -> Layout:
        key = key_of(request)
        if key not in self._prepared:
            self._prepared[key] = prepared(self._config, request, self.dtype)
        model, moving = self._prepared[key]
        placing = Placing(model, block_for(request), CPU, self.dtype, {}, moving)
        count = sum(parameter.numel() for parameter in self._model.parameters())
        return lay_out(placing, count, self._dims)

    def _dims(self, divided: bool) -> Dims:
        return dims_of(self._config, self._model, self.dtype, divided)


@dataclass(frozen=True)
class Planned:
    """A request with nothing left open, and what comes of it.

    Attributes:
        request: As it was decided.
        budgets: That it was held against.
        layout: The model's units.
        tiers: Where they rest.
        step: What a step does.
    """

    request: Request
    budgets: Budgets
    layout: Layout
    tiers: Tiers
    step: Step

    @property
    def fits(self) -> bool:
        """Whether no tier lacks anything."""
        return not self.tiers.short

    @property
    def seconds_per_forward_token(self) -> float:
        """What batches, probes and lags are compared by."""
        return self.step.step_seconds / (self.request.lanes * self.request.tokens)


def plan(layouts: Layouts, request: Request, budgets: Budgets, rates: Rates) -> Planned:
    """The quickest plan that fits; if none does, the one that lacks least.

    Raises:
        ConfigError: A combination that training refuses.
    """
    _check(layouts, request)
    best: tuple[tuple, Planned] | None = None
    refused: ConfigError | ModelError | None = None
    for choice in choices(request):
        try:
            layout = layouts.at(choice)
        except (ConfigError, ModelError) as error:  # there may be other units
            refused = refused or error
            continue
        tiers = place(layout, choice, budgets)
        on_disk = tiers.residents[-1] > 0
        if on_disk and choice.where == "device" and request.where is None:
            continue  # training refuses it
        step = step_of(layout, choice, tiers, rates)
        found = Planned(choice, budgets, layout, tiers, step)
        rank = (sum(tiers.short.values()), step.step_seconds)
        if best is None or rank < best[0]:  # of equals the first: the coarsest
            best = rank, found
    if best is None:
        assert refused is not None
        raise refused
    return best[1]


def choices(request: Request) -> Iterator[Request]:
    """Every way to close what is open, the plainest first."""
    units = GRANULARITIES if request.unit is None else (request.unit,)
    places = ("host", "device") if request.where is None else (request.where,)
    for unit in units:
        for where in places:
            for live in _lives(request):
                yield replace(request, unit=unit, where=where, live_lanes=live)


def _lives(request: Request) -> list[int]:
    """How many lanes may be alive: all, a half, a quarter..., one draw's sign at a time."""
    most = min(request.lanes, request.live_lanes or MOST_LANES)
    if request.live_lanes is not None or request.joined_rows is not None:  # then all must be
        return [most]
    counts = [most]
    while counts[-1] > 1:
        counts.append(counts[-1] // 2)
    return counts


def _check(layouts: Layouts, request: Request) -> None:
    moves = TrainableConfig.model_validate_json(json.dumps(request.moves))
    check_trainable(moves, request.wire, request.lag, request.master)
    if request.master != "fp32" and layouts.dtype != torch.bfloat16:
        raise ConfigError(
            f'zeroth_order.master: "{request.master}" is for forwards in bfloat16; write "bf16": '
            '{"enabled": true}, or "master": "fp32"'
        )
    if request.wire == "lossless12" and layouts.dtype != torch.bfloat16:
        raise ConfigError('zeroth_order.wire: "lossless12" packs bfloat16 alone; enable bf16')
    if request.head_chunk is not None and not layouts.has_head:
        raise ConfigError(
            f"zeroth_order.head_chunk: {request.head_chunk} rows of the head at a time, and the "
            'model names no output embedding; write "head_chunk": null'
        )
    if layouts.most_length is not None and request.length > layouts.most_length:
        raise ConfigError(
            f"--length {request.length}: the model's context is {layouts.most_length} tokens"
            "; give no more"
        )
