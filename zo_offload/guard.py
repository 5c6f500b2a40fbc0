"""What is done about losses that go wrong: warn, skip the step, stop, or roll back.

A roll back lets the journal end at the newest good step (the second one step before it, the third
three, and so on) and begins a branch, whose steps go along other directions at a smaller learning
rate. Weights cannot be taken back by arithmetic to the same
bits, so that the engine ends there: a new one replays, as after a crash.
"""

import logging
from typing import NoReturn

from zo_offload.config_guard import ROLLBACK, SKIP, STOP, WARN, GuardConfig
from zo_offload.errors import DivergedError, RolledBackError
from zo_offload.journal import Journal
from zo_offload.loss_watch import Finding, LossWatch

logger = logging.getLogger(__name__)

UNCHANGED = "nothing was changed"


class Guard:
    """Acts on a run's losses as its config says; every rank has one, and all act alike.

    Args:
        config: What to do, and how often.
        journal: The run's.
        persists: Whether another engine can go on with it.

    Attributes:
        ended: Why no further step can be taken, if so.
    """

    def __init__(self, config: GuardConfig, journal: Journal, persists: bool) -> None:
        self.ended: str | None = None
        self._config = config
        self._journal = journal
        self._persists = persists
        self._watch = LossWatch(config, journal.records)
        self._told: set[str] = set()

    @property
    def lr_share(self) -> float:
        """Of the learning rate, that the next step takes."""
        return self._config.rollback_lr**self._journal.records.stream

    def refuse_ended(self) -> None:
        """Weights that are ahead of the journal are not looked at.

        Raises:
            RolledBackError: They are.
        """
        if self.ended is not None:
            raise RolledBackError(self.ended)

    def on_nonfinite(self, text: str) -> None:
        """A loss or slope of the step that is next is not finite.

        Raises:
            DivergedError: Unless the step, or its probe, is to be skipped.
            RolledBackError: The journal has gone back.
        """
        if self._config.nonfinite != SKIP:
            finding = Finding("nonfinite", text, self._watch.good())
            self._act(finding, self._config.nonfinite, self._journal.next_step, UNCHANGED)

    def before_step(self, loss: float) -> bool:
        """Look at the loss of the step that is next; whether it is to be skipped.

        Raises:
            DivergedError: It is not to be taken.
            RolledBackError: The journal has gone back.
        """
        step, policy = self._journal.next_step, self._config.explosion
        if self._config.divergence == STOP:  # a run that was stopped and is started again
            self._act(self._watch.divergence(), STOP, step, UNCHANGED)
        return self._act(self._watch.explosion(loss), policy, step, UNCHANGED)

    def after_step(self) -> None:
        """Look at the run, after a step was recorded.

        Raises:
            DivergedError: No further step is to be taken.
            RolledBackError: The journal has gone back.
        """
        finding, step = self._watch.divergence(), self._journal.next_step - 1
        self._act(finding, self._config.divergence, step, "the step was taken")

    def _act(self, finding: Finding | None, policy: str, step: int, then: str) -> bool:
        if finding is None:
            return False
        text = f"step {step}: {finding.text}"
        if policy == STOP:
            raise DivergedError(
                f"{text}; {then}; lower the learning rate, or let guard.{finding.kind} do otherwise"
            )
        if policy == ROLLBACK:
            self._roll_back(text, finding.good, then)
        if policy == SKIP and self._watch.skipped_in_a_row >= self._config.window:
            raise DivergedError(
                f"{text}, and {self._config.window} steps in a row were skipped; {then}; lower the "
                f"learning rate, or let guard.{finding.kind} do otherwise"
            )
        if policy == SKIP:
            logger.warning("%s; the step is skipped", text)
        elif policy == WARN and finding.kind not in self._told:
            self._told.add(finding.kind)
            logger.warning("%s (guard.%s says what to do then)", text, finding.kind)
        return policy == SKIP

    def _roll_back(self, text: str, good: int | None, then: str) -> NoReturn:
        config, number = self._config, self._journal.records.stream + 1
        # What led to the trouble may lie before it: each time a longer way back.
        good = None if good is None else max(0, good - 2 ** (number - 1) + 1)
        if good is None:
            raise DivergedError(f"{text}; there is no better step to roll back to; {then}")
        if number > config.most_rollbacks:
            raise DivergedError(
                f"{text}, after {number - 1} roll backs (guard.most_rollbacks); {then}; lower the "
                "learning rate"
            )
        if not self._persists:
            raise DivergedError(
                f"{text}; {then}; to roll back, the run must be in a file: write journal.path"
            )
        self._journal.rewind(good, rolled_back=True)
        share = self.lr_share
        self.ended = (
            f"{text}; rolled back to step {good}, roll back {number} of at most "
            f"{config.most_rollbacks}: from there other directions, and {share:g} of the learning "
            "rate"
        )
        raise RolledBackError(self.ended)
