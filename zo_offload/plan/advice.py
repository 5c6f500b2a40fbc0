"""What would help: of a plan that fits, what makes it quicker; of one that does not, what fits."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from zo_offload.errors import ConfigError, ModelError
from zo_offload.plan.formats import wire_bytes
from zo_offload.plan.rates import Rates
from zo_offload.plan.request import FROZEN, GIB, TRAINABLES, Budgets, Request
from zo_offload.plan.search import Layouts, Planned, plan

LEAST_GAIN = 1.02
ANY = 2**62  # bytes
TRIED_LAG = 8
TRIED_ROWS = (16384, 4096)  # of a chunked head


@dataclass(frozen=True)
class Advice:
    """One change and its gain.

    Attributes:
        change: In words.
        gain: Times quicker a forward and token.
    """

    change: str
    gain: float


def quicker(layouts: Layouts, request: Request, planned: Planned, rates: Rates) -> list[Advice]:
    """Changes that pay, the best first."""
    found = []
    for change, other, budgets in _variations(request, planned.budgets, layouts):
        try:
            tried = plan(layouts, other, budgets, rates)
        except (ConfigError, ModelError):  # what training refuses is no advice
            continue
        gain = planned.seconds_per_forward_token / tried.seconds_per_forward_token
        if tried.fits and gain >= LEAST_GAIN:
            found.append(Advice(change, gain))
    return sorted(found, key=lambda each: -each.gain)


def _variations(
    request: Request, budgets: Budgets, layouts: Layouts
) -> Iterator[tuple[str, Request, Budgets]]:
    if request.wire in ("identity", "bf16") and layouts.dtype == torch.bfloat16:
        yield "wire lossless12 (exact)", replace(request, wire="lossless12"), budgets
    if request.wire not in ("nf4", "int4"):
        yield "wire nf4 (moves where the loss is evaluated)", replace(request, wire="nf4"), budgets
    if request.lag < TRIED_LAG:
        yield f"update.lag {TRIED_LAG}", replace(request, lag=TRIED_LAG), budgets
    for rows in _smaller_chunks(request, layouts)[:1]:
        yield f"head_chunk {rows}", replace(request, head_chunk=rows), budgets
    size = 2 * request.batch_size
    yield f"batch size {size}", replace(request, batch_size=size), budgets
    probes = 2 * request.probes
    yield f"probes {probes} (more forwards a visit)", replace(request, probes=probes), budgets
    if request.trainable == "full":
        yield "trainable sparse on a frozen base", replace(request, trainable="sparse"), budgets
    if budgets.in_host_memory is not None:
        filled = None if budgets.host_weights is None else ANY
        yield "more host memory", request, replace(budgets, host=None, host_weights=filled)
    if budgets.device is not None:
        twice = 2 * budgets.device
        words = f"a device of {twice / GIB:g} GiB"
        yield words, request, replace(budgets, device=twice)


@dataclass(frozen=True)
class Change:
    """A way to ask for less.

    Attributes:
        words: As a user would say it.
        values: Attributes of the request.
    """

    words: str
    values: tuple[tuple[str, object], ...]


def nearest(
    layouts: Layouts, request: Request, budgets: Budgets, rates: Rates
) -> tuple[str, Planned] | None:
    """The gentlest changes after which a request fits, and its plan.

    One change where one is enough. Else everything is changed as far as it goes, and what is not
    needed is taken back, the harshest first.
    """

    def tried(chosen: Sequence[Change | None]) -> Planned | None:
        values = {key: value for change in chosen if change for key, value in change.values}
        try:
            found = plan(layouts, replace(request, **values), budgets, rates)
        except (ConfigError, ModelError):  # training refuses it
            return None
        return found if found.fits else None

    groups = list(_changes(layouts, request))
    furthest = [group[-1] for group in groups]
    starts = [[change] for group in groups for change in group]
    starts += [_with_mode(furthest, mode) for mode in FROZEN]
    for start in starts:
        if tried(start) is not None:
            chosen = start if len(start) == 1 else _relaxed(start, groups, lambda c: bool(tried(c)))
            found = tried(chosen)
            assert found is not None
            return ", ".join(change.words for change in chosen if change), found
    return None


def _with_mode(chosen: Sequence[Change], mode: str) -> list[Change | None]:
    return [_trainable(mode) if change.values[0][0] == "trainable" else change for change in chosen]


def _relaxed(
    chosen: Sequence[Change | None],
    groups: Sequence[list[Change]],
    fits: Callable[[Sequence[Change | None]], bool],
) -> list[Change | None]:
    """Each change as gentle as it may be, none where that will do."""
    kept = list(chosen)
    for i in reversed(range(len(kept))):
        for gentler in [None, *groups[i]]:
            if fits([*kept[:i], gentler, *kept[i + 1 :]]):
                kept[i] = gentler
                break
    return kept


def _trainable(mode: str) -> Change:
    return Change(f"--trainable {mode}", (("trainable", mode),))


def _changes(layouts: Layouts, request: Request) -> Iterator[list[Change]]:
    """Groups of which one member is taken, the gentlest first."""
    for key, words in (
        ("unit", "--unit left open"),
        ("where", "update.where left open"),
        ("live_lanes", "live_lanes left open"),
    ):
        if getattr(request, key) is not None:
            yield [Change(words, ((key, None),))]
    if request.lowest == "device" or request.only:
        yield [
            Change("weights in host memory", (("lowest", "host"), ("only", False))),
            Change("weights in host memory and on disk", (("lowest", "nvme"), ("only", False))),
        ]
    elif request.lowest == "host":
        yield [Change("weights on disk too", (("lowest", "nvme"),))]
    chunks = _smaller_chunks(request, layouts)
    if chunks:
        yield [Change(f"head_chunk {rows}", (("head_chunk", rows),)) for rows in chunks]
    if request.batch_size > 1:
        yield [
            Change(f"--batch-size {size}", (("batch_size", size),))
            for size in _halves(request.batch_size, 1)
        ]
    smaller = _smaller_wires(request.wire, layouts.dtype)
    if smaller:
        yield [Change(f"--wire {wire}", (("wire", wire),)) for wire in smaller]
    if request.trainable == TRAINABLES[0]:
        yield [_trainable(mode) for mode in FROZEN]
    if request.length > 128:
        yield [
            Change(f"--length {length}", (("length", length),))
            for length in _halves(request.length, 128)
        ]


def _smaller_chunks(request: Request, layouts: Layouts) -> list[int]:
    """Rows of the head at a time that save something."""
    now = request.head_chunk or layouts.vocabulary
    return [rows for rows in TRIED_ROWS if layouts.has_head and rows < now]


def _smaller_wires(wire: str, dtype: torch.dtype) -> list[str]:
    known = ["lossless12", "int8", "nf4"] if dtype == torch.bfloat16 else ["int8", "nf4"]
    return [each for each in known if wire_bytes(each, dtype) < wire_bytes(wire, dtype)]


def _halves(count: int, least: int) -> list[int]:
    found = []
    while count // 2 >= least:
        count //= 2
        found.append(count)
    return found
