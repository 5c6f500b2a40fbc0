"""Where weights rest and how they travel: what a run decides before anything is allocated."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from zo_offload.errors import StoreError, ZOError
from zo_offload.offload.run_files import Disk
from zo_offload.offload.shared import Shared

DONE, FAILED = "+", "-"


@dataclass(frozen=True)
class Together:
    """What a rank knows of the others on its machine.

    Attributes:
        leads: Whether it does what is done once on the machine.
        leader_says: Gives every rank the text that the leader of its machine passes; all ranks of
            the run call it together.
        shared: The units that they share; None where this rank is alone there.
    """

    leads: bool
    leader_says: Callable[[str], str]
    shared: Shared | None

    def once(self, work: Callable[[], str]) -> str:
        """What the leader's work gives, on every rank of its machine; all ranks call this.

        Raises:
            ZOError: As the leader's did; a StoreError on the others.
        """
        said, failure = "", None
        try:
            said = DONE + work() if self.leads else ""
        except ZOError as error:
            said, failure = FAILED + str(error), error
        answer = self.leader_says(said)
        if failure is not None:
            raise failure
        if answer.startswith(FAILED):
            raise StoreError(answer.removeprefix(FAILED))
        return answer.removeprefix(DONE)


@dataclass(frozen=True)
class Placement:
    """Where weights rest and how they travel.

    Attributes:
        device: Where forwards run.
        tiers: Where each unit rests, by index: ``device``, ``host`` or ``nvme``.
        num_slots: Units in flight on the device when they rest elsewhere.
        pin_memory: Page-lock host memory (only where an accelerator copies from it).
        device_budget: Most bytes of weights on the device, or None.
        updates_on_device: Whether masters that rest on the host travel to be updated there; None
            to keep what turns out to be faster.
        disk: Needed where a unit rests on one.
        together: The ranks of this machine, where the run has several.
    """

    device: torch.device
    tiers: Mapping[int, str]
    num_slots: int = 2
    pin_memory: bool = False
    device_budget: int | None = None
    updates_on_device: bool | None = False
    disk: Disk | None = None
    together: Together | None = None

    @property
    def shared(self) -> Shared | None:
        """Units that ranks of this machine share."""
        return self.together.shared if self.together is not None else None
