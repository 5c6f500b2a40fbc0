"""How many bytes of weights each tier will hold, decided before anything is allocated."""

from collections.abc import Collection
from dataclasses import dataclass

from zo_offload.errors import StoreError
from zo_offload.ops import Segment, Span
from zo_offload.units import ModelMap

SMALL_BYTES = 1 << 16
"""Ambient tensors up to this size keep a perturbed copy a draw; larger ones have one, or none."""


@dataclass(frozen=True)
class Plan:
    """Bytes of weights, by purpose.

    Attributes:
        slots: Units in flight on the device.
        scratch: The perturbed copy of the unit at hand.
        ambient: Unperturbed ambient parameters on the device.
        ambient_copies: Perturbed ones.
        resident: Units that rest on the device, with their masters and the ambient's, and room for
            a copy of one where masters lag.
        host_bytes: Everything that rests in host memory.
    """

    slots: int
    scratch: int
    ambient: int
    ambient_copies: int
    resident: int
    host_bytes: int

    @property
    def device_bytes(self) -> int:
        """The peak on the device."""
        return self.slots + self.scratch + self.ambient + self.ambient_copies + self.resident

    def check(self, device_budget: int | None, host_budget: int | None) -> None:
        """Refuse what cannot fit.

        Raises:
            StoreError: With the plan's numbers and the budget's.
        """
        for name, needed, budget in (
            ("device_budget", self.device_bytes, device_budget),
            ("host_budget", self.host_bytes, host_budget),
        ):
            if budget is not None and needed > budget:
                raise StoreError(
                    f"zeroth_order.{name}: the weights need {needed:,} bytes, the budget is "
                    f"{budget:,} (slots {self.slots:,}, scratch {self.scratch:,}, ambient "
                    f"{self.ambient:,} and its copies {self.ambient_copies:,}, resident "
                    f"{self.resident:,}, host {self.host_bytes:,}); {self._mend(name)}"
                )

    def _mend(self, name: str) -> str:
        if name == "device_budget" and self.resident:
            return 'rest them on the host: "offload_param": {"device": "cpu"}'
        return "raise the budget"


def make_plan(
    model_map: ModelMap,
    on_host: bool,
    num_slots: int,
    num_draws: int,
    gathered: Collection[str],
    spare: bool = False,
    whole_slots: bool = False,
) -> Plan:
    """Add up what a run will hold.

    Args:
        model_map: The model's units.
        on_host: Whether units rest in host memory.
        num_slots: Units in flight on the device, when they do.
        num_draws: Directions and signs of a step.
        gathered: Names of ambient tables whose rows are perturbed as gathered.
        whole_slots: Whether slots hold whole masters.
        spare: Whether who looks at a unit is given a copy, because its masters may be behind.
    """
    largest = max(unit.wire_bytes for unit in model_map.units)
    largest_rest = max(unit.rest_bytes for unit in model_map.units) if whole_slots else 0
    everything = sum(unit.wire_bytes + unit.rest_bytes for unit in model_map.everything)
    copies = sum(
        copy_bytes(span, segment) * (num_draws if is_small(span, segment) else 1)
        for span, segment in model_map.ambient.segments
        if span.trainable and segment.name not in gathered
    )
    ambient = model_map.ambient.wire_bytes
    spare_rest = max(unit.rest_bytes for unit in model_map.everything) if spare else 0
    spare_wire = max(unit.wire_bytes for unit in model_map.everything) if spare else 0
    return Plan(
        slots=min(num_slots, len(model_map.units)) * (largest + largest_rest) if on_host else 0,
        scratch=largest,
        ambient=ambient,
        ambient_copies=copies,
        resident=0 if on_host else everything - ambient + spare_rest,
        host_bytes=everything + spare_wire + spare_rest if on_host else 0,
    )


def is_small(span: Span, segment: Segment) -> bool:
    """Whether an ambient tensor keeps a copy a draw."""
    return copy_bytes(span, segment) <= SMALL_BYTES


def copy_bytes(span: Span, segment: Segment) -> int:
    """Bytes of one perturbed copy."""
    return segment.padded * span.dtype.itemsize
