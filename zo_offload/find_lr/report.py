"""What was found, written down: a table, a picture, and a JSON object."""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zo_offload import files
from zo_offload.find_lr.slopes import Mean, Slopes
from zo_offload.find_lr.sweep import Rate, Verdict, excess, for_run
from zo_offload.run_directory import FOUND, as_json

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Found:
    """What tries came to.

    Attributes:
        verdict: Of the tries.
        slopes: What losses said before them.
        guess: Where the grid began.
        held_out: Examples that a try was judged by.
        steps: Of the run.
        tried_steps: Of a try.
        forwards: That all of it took, of a micro-batch or batch, on all ranks.
        run_forwards: That the run's steps take.
        eps_warning: What was wrong with eps.
    """

    verdict: Verdict
    slopes: Slopes
    guess: float
    held_out: int
    steps: int
    tried_steps: int
    forwards: int
    run_forwards: int
    eps_warning: str | None = None

    @property
    def lr(self) -> float | None:
        """To train with; None where no try lowered the loss."""
        best = self.verdict.best
        return None if best is None else self.for_run(best.lr)

    def for_run(self, lr: float) -> float:
        """A try's rate, as a run's."""
        return for_run(lr, self.tried_steps, self.steps)

    @property
    def is_sure(self) -> bool:
        """Whether the best rate can be told from its neighbours."""
        return self.lr is not None and len(self.verdict.tied) == 1


def write(found: Found, directory: Path) -> None:
    """``find_lr.json`` and ``find_lr.png``."""
    named, picture = (directory / name for name in FOUND)
    aside = picture.with_name(picture.name + files.ASIDE)
    draw(found, aside)
    aside.replace(picture)
    files.write_file(named, as_json(as_dict(found)))


def as_dict(found: Found) -> dict[str, Any]:
    """What programs read; ``lr`` first."""
    slopes = found.slopes
    return {
        "lr": found.lr,
        "grid": [_row(found, rate) for rate in found.verdict.rates],
        "sure": found.is_sure,
        "loss_before": _finite(found.verdict.before),
        "steps": found.steps,
        "trial_steps": found.tried_steps,
        "held_out": found.held_out,
        "forwards": found.forwards,
        "run_forwards": found.run_forwards,
        "guess": found.guess,
        "slopes": {
            name: {"mean": _finite(mean.value), "error": _finite(mean.error)}
            for name, mean in _named(slopes)
        },
        "eps_warning": found.eps_warning,
    }


def _row(found: Found, rate: Rate) -> dict[str, Any]:
    best = found.verdict.best
    over, error = (math.nan, math.nan) if best is None else excess(rate, best)
    return {
        "lr": found.for_run(rate.lr),
        "trial_lr": rate.lr,
        "losses": [_finite(loss) for loss in rate.losses],
        "over_best": _finite(over),
        "error": _finite(error),
    }


def _named(slopes: Slopes) -> list[tuple[str, Mean]]:
    named = ("agreed", slopes.agreed), ("squared", slopes.squared), ("curvature", slopes.curvature)
    return list(named)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def table(found: Found) -> "Table":
    """A row a rate."""
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD)
    for name in (
        "lr",
        f"tried for {found.tried_steps} steps at",
        "held-out loss",
        "above the best",
    ):
        shown.add_column(name, justify="right")
    shown.add_column("")
    for rate in found.verdict.rates:
        loss = "diverged" if rate.diverged else f"{statistics.fmean(rate.losses):.4f}"
        shown.add_row(
            f"{found.for_run(rate.lr):g}",
            f"{rate.lr:g}",
            loss,
            _above(found, rate),
            _note(found, rate),
        )
    return shown


def _above(found: Found, rate: Rate) -> str:
    best = found.verdict.best
    if best is None or rate.diverged or rate is best:
        return ""
    over, error = excess(rate, best)
    return f"{over:.4f}" + (f" +- {error:.4f}" if math.isfinite(error) else "")


def _note(found: Found, rate: Rate) -> str:
    if rate is found.verdict.best:
        return f"best of {len(rate.losses)} rounds"
    return "within noise" if rate in found.verdict.tied else ""


def lines(found: Found) -> list[str]:
    """What it means, for the user."""
    slopes, verdict = found.slopes, found.verdict
    told = [
        f"slopes: {slopes.agreed.value:.3g} +- {slopes.agreed.error:.2g} of "
        f"{slopes.squared.value:.3g} agreed between batches, curvature "
        f"{slopes.curvature.value:.3g} +- {slopes.curvature.error:.2g}; the grid began at "
        f"{found.guess:.2g}",
        f"cost: {found.forwards:,} forwards, {found.forwards / found.run_forwards:.0%} of those of "
        f"the run's {found.steps:,} steps",
    ]
    if verdict.is_flat:
        told.append(_flat(found))
        return told
    if verdict.best is None:
        told.append(
            f"no rate lowered the held-out loss ({verdict.before:.4f}) in {found.tried_steps} "
            "steps: none is proposed; try more (--trial-steps)"
        )
        return told
    if not found.is_sure:
        named = ", ".join(f"{found.for_run(rate.lr):g}" for rate in verdict.tied)
        told.append(f"{named} cannot be told apart: their differences are within noise")
    told.append(
        f"lr {found.lr:g} for {found.steps:,} steps: the best try's {verdict.best.lr:g}, times the "
        f"root of {found.tried_steps} / {found.steps}"
    )
    return told


def _flat(found: Found) -> str:
    verdict, rates = found.verdict, [found.for_run(rate.lr) for rate in found.verdict.rates]
    tried = f"at {rates[0]:g}" if len(rates) == 1 else f"at {len(rates)} rates up to {rates[-1]:g}"
    return (
        f"the objective does not change: held out it is {verdict.before:.4f} before and after "
        f"{found.tried_steps} steps {tried}: none is proposed; take another --objective (the loss "
        "changes with every step), a template at which it changes, larger batches or a larger eps"
    )


def draw(found: Found, path: Path) -> None:
    """Held-out loss against learning rate, as a PNG."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    verdict = found.verdict
    fit = [rate for rate in verdict.rates if not rate.diverged]
    rates = [found.for_run(rate.lr) for rate in fit]
    axes.set_xscale("log")
    axes.axhline(verdict.before, color="0.7", linestyle=":", label="before")
    axes.plot(rates, [statistics.fmean(rate.losses) for rate in fit], "-", color="tab:blue")
    for number in range(max((len(rate.losses) for rate in fit), default=0)):
        often = [rate for rate in fit if len(rate.losses) > number]
        at, losses = [found.for_run(r.lr) for r in often], [r.losses[number] for r in often]
        axes.plot(at, losses, "o", markersize=4, label=f"round {number + 1}")
    for rate in verdict.rates:
        if rate.diverged:
            axes.axvline(found.for_run(rate.lr), color="tab:red", linewidth=0.8, linestyle="--")
    if found.lr is not None:
        axes.axvline(found.lr, color="tab:orange", label=f"proposed: {found.lr:g}")
    axes.set_xlabel(f"learning rate of a run of {found.steps:,} steps (diverged: red)")
    axes.set_ylabel(f"held-out loss after {found.tried_steps} steps")
    figure.legend(loc="outside upper center", ncols=6, frameon=False)
    figure.savefig(path, dpi=120, format="png")
