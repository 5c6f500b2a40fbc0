"""Where weights rest and how they travel: what a run decides before anything is allocated."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from zo_offload.offload.run_files import Disk
from zo_offload.offload.shared import Shared


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
        shared: Host memory that ranks of this machine share; else a unit there is this one's.
    """

    device: torch.device
    tiers: Mapping[int, str]
    num_slots: int = 2
    pin_memory: bool = False
    device_budget: int | None = None
    updates_on_device: bool | None = False
    disk: Disk | None = None
    shared: Shared | None = None
