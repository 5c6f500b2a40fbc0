"""``guard`` of the ``zeroth_order`` block: what is done about losses that go wrong."""

from typing import Annotated, Literal

from pydantic import Field

from zo_offload.config_fields import Positive, Strict

WARN, SKIP, STOP, ROLLBACK = "warn", "skip", "stop", "rollback"


class GuardConfig(Strict):
    """What is wrong with a run's losses, and what then; see ``guard.py``."""

    nonfinite: Literal["stop", "skip", "rollback"] = STOP
    explosion: Literal["warn", "skip", "stop", "rollback"] = WARN
    divergence: Literal["warn", "stop", "rollback"] = WARN
    dead_eps: Literal["warn", "stop"] = WARN
    window: Annotated[int, Field(ge=20, le=10_000)] = 50
    explosion_spreads: Positive = 10.0
    divergence_spreads: Positive = 3.0
    most_rollbacks: Annotated[int, Field(ge=1, le=1000)] = 5
    rollback_lr: Annotated[float, Field(gt=0, le=1)] = 0.5
