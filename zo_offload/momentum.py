"""Momentum and Adam without a buffer: a few scalars on the directions of a window of steps.

The step of a direction z is ``g z``, so a momentum buffer is a sum over directions that a counter
can make again: ``M_t = sum over s <= t of beta^(t - s) g_s z_s``. What is older than a window of W
steps has the share ``beta^W`` of all weight, and is left out. Then a step needs the scalars of W
records, and draws the noise of each weight W times; nothing as large as the model is kept.

Adam divides by the root of a second moment, element by element. Here every element of it is the
same: for signs ``(g z)^2 = g^2``, whatever the weight. So Adam is momentum at a rate that the
run's slopes decide. Of gaussian directions and of several probes the mean over the weights is
taken, ``sum of g_k^2 / K^2``.

Steps that were skipped are none: they neither count nor fade what was before them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from zo_offload.errors import JournalError
from zo_offload.in_order import total

TAIL = 0.01
"""Share of all weight that a window may leave out where none is written."""

MOST_WINDOW = 256  # steps whose noise every step draws again


@dataclass(frozen=True, slots=True)
class Adam:
    """What Adam adds to momentum.

    Attributes:
        beta2: Of the second moment.
        eps: Added to its root.

    Reference:
        Kingma and Ba (2015), arXiv 1412.6980, algorithm 1.
    """

    beta2: float
    eps: float


@dataclass(frozen=True, slots=True)
class Momentum:
    """How steps of a window make an update.

    Attributes:
        beta: What remains of a step's weight a step later.
        window: Steps that count, this one included.
        adam: Then weights sum to 1 (``1 - beta``, bias-corrected) and the rate follows the second
            moment; else they are those of torch's SGD without dampening: the newest step has 1.
    """

    beta: float
    window: int
    adam: Adam | None = None

    @property
    def powers(self) -> Sequence[float]:
        """``beta^j`` for the step j steps ago, of the window.

        Example:
            >>> Momentum(0.5, window=3).powers
            (1.0, 0.5, 0.25)
        """
        return _powers(self.beta, self.window)

    def header(self) -> dict[str, Any]:
        """What the journal's header says of it.

        Example:
            >>> Momentum(0.5, window=3).header()
            {'type': 'momentum', 'momentum': 0.5, 'window': 3}
        """
        if self.adam is None:
            return {"type": "momentum", "momentum": self.beta, "window": self.window}
        more = {"beta2": self.adam.beta2, "adam_eps": self.adam.eps}
        return {"type": "adam", "beta1": self.beta, **more, "window": self.window}


def from_header(said: Any) -> Momentum | None:
    """The update that a journal's header names; None for plain descent.

    Raises:
        JournalError: It is none of those known here.

    Example:
        >>> from_header(Momentum(0.5, 3).header())
        Momentum(beta=0.5, window=3, adam=None)
    """
    if said in (None, "sgd"):
        return None
    try:
        kind, window = said["type"], int(said["window"])
        if kind == "momentum":
            return Momentum(float(said["momentum"]), window)
        if kind == "adam":
            adam = Adam(float(said["beta2"]), float(said["adam_eps"]))
            return Momentum(float(said["beta1"]), window, adam)
    except (KeyError, TypeError, ValueError):
        pass
    raise JournalError(
        f"header.update: {said!r} is no update that this zo_offload knows"
        "; use the version that wrote it"
    )


def least_window(beta: float, tail: float = TAIL) -> int:
    """The smallest W with ``beta^W < tail``.

    Example:
        >>> [least_window(beta) for beta in (0.0, 0.5, 0.9, 0.99)]
        [1, 7, 44, 459]
    """
    window, power = 1, beta
    while power >= tail:
        window, power = window + 1, power * beta
    return window


class Moments(NamedTuple):
    """What Adam knows of the steps so far.

    Attributes:
        first: ``beta1^n`` after n steps.
        second: ``beta2^n``.
        square: Moving average of the mean square of a step's elements.
    """

    first: float = 1.0
    second: float = 1.0
    square: float = 0.0


def after(momentum: Momentum, moments: Moments, grads: Sequence[float]) -> Moments:
    """The moments after one more step.

    Args:
        momentum: Whose.
        moments: Before it.
        grads: Projected gradients of the step, one a probe.

    Example:
        >>> after(Momentum(0.5, 4, Adam(0.75, 1e-8)), Moments(), [2.0])
        Moments(first=0.5, second=0.75, square=1.0)
    """
    if momentum.adam is None:
        return moments
    beta2 = momentum.adam.beta2
    square = total((g / len(grads)) * (g / len(grads)) for g in grads)
    return Moments(
        moments.first * momentum.beta,
        moments.second * beta2,
        moments.square * beta2 + (1.0 - beta2) * square,
    )


def rate(momentum: Momentum, moments: Moments, lr: float) -> float:
    """What multiplies ``sum over j of beta^j g_(t - j) z_(t - j)`` at a step.

    Args:
        momentum: Whose.
        moments: After the step.
        lr: Learning rate of the step: as in torch, that of its application counts for all of the
            sum.

    Example:
        >>> rate(Momentum(0.5, 4), Moments(), lr=0.25)
        0.25
        >>> adam = Momentum(0.5, 4, Adam(0.75, 1e-8))
        >>> round(rate(adam, after(adam, Moments(), [2.0]), lr=0.25), 6)  # lr * g / |g|
        0.125
    """
    if momentum.adam is None:
        return lr
    root = math.sqrt(moments.square) / math.sqrt(1.0 - moments.second)
    weight = (1.0 - momentum.beta) / (1.0 - moments.first)
    return lr * weight / (root + momentum.adam.eps)


def coefficient(weight: float, projected_grad: float, num_probes: int) -> float:
    """On a direction: its step's rate times power, its slope, and the share of its probe.

    With no momentum these are the bits of plain descent.

    Example:
        >>> coefficient(0.5, projected_grad=4.0, num_probes=2)
        1.0
    """
    return weight * projected_grad / num_probes


@lru_cache(maxsize=32)
def _powers(beta: float, window: int) -> tuple[float, ...]:
    """Products, one by one: a library's power may differ from another's in the last bit."""
    found = [1.0]
    for _ in range(window - 1):
        found.append(found[-1] * beta)
    return tuple(found)
