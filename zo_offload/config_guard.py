"""``guard`` of the ``zeroth_order`` block: what is done about losses that go wrong."""

from typing import Annotated, Literal

from pydantic import Field

from zo_offload.config_fields import Positive, Strict

WARN, SKIP, STOP, ROLLBACK = "warn", "skip", "stop", "rollback"


class GuardConfig(Strict):
    """What is wrong with a run's losses, and what then; see ``guard.py``."""

    nonfinite: Literal["stop", "skip", "rollback"] = STOP
    """[Losses that go wrong](training.md#losses-that-go-wrong): one that is infinite or not a
    number: `"stop"` ends with nothing changed; `"skip"` leaves its probe out, or the step where
    too few remain, and records it; `"rollback"` goes back to a better step."""
    explosion: Literal["warn", "skip", "stop", "rollback"] = WARN
    """A step's loss far above those before it: `"warn"`, `"skip"` the step, `"stop"` or
    `"rollback"`."""
    divergence: Literal["warn", "stop", "rollback"] = WARN
    """Losses that rise and stay: `"warn"`, `"stop"` or `"rollback"`."""
    dead_eps: Literal["warn", "stop"] = WARN
    """20 steps in which nothing moved: `"warn"` or `"stop"`."""
    window: Annotated[int, Field(ge=20, le=10_000)] = 50
    """Steps that losses are compared with."""
    explosion_spreads: Positive = 10.0
    """What is far, in standard deviations of a step's loss."""
    divergence_spreads: Positive = 3.0
    """Likewise, of losses that rise and stay."""
    most_rollbacks: Annotated[int, Field(ge=1, le=1000)] = 5
    """How often a run goes back, at most; then it stops."""
    rollback_lr: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Factor on the learning rate at each roll back."""
