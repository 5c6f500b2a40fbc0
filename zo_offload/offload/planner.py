"""How many bytes of weights each tier will hold, decided before anything is allocated."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from zo_offload.errors import StoreError
from zo_offload.factors import factor_bytes
from zo_offload.offload.aio import Aio
from zo_offload.offload.folders import SPARES
from zo_offload.offload.manifest import Geometry
from zo_offload.offload.packing import NUM_BUFFERS
from zo_offload.offload.residency import DEVICE, HOST, NVME, most_that_fit
from zo_offload.offload.slot import slot_bytes
from zo_offload.offload.staged import num_staged, staged_bytes
from zo_offload.offload.streamer import slot_size
from zo_offload.ops import ALIGNMENT, Segment, Span
from zo_offload.overlays import kept_bytes
from zo_offload.units import AMBIENT, ModelMap, Unit

SMALL_BYTES = 1 << 16
"""Ambient tensors up to this size keep a perturbed copy a draw; larger ones have one, or none."""


@dataclass(frozen=True)
class Plan:
    """Bytes of weights, by purpose.

    Attributes:
        slots: Units in flight on the device.
        scratch: The perturbed copy of the unit at hand, and where it is packed on the device.
        ambient: Unperturbed ambient parameters on the device.
        ambient_copies: Perturbed ones.
        resident: Units that rest on the device, with their masters and the ambient's, and room for
            a copy of one where masters lag.
        host_bytes: Everything that rests in host memory, or passes through it.
        nvme_bytes: Of the files on the disk.
        overlays: What overlays keep on the device, beside their values.
        factors: Small factors of low-rank directions.
        unit_copies: Perturbed copies of units' matrices, where a product does not serve.
    """

    slots: int
    scratch: int
    ambient: int
    ambient_copies: int
    resident: int
    host_bytes: int
    nvme_bytes: int = 0
    overlays: int = 0
    factors: int = 0
    unit_copies: int = 0

    @property
    def device_bytes(self) -> int:
        """The peak on the device."""
        ambient = self.ambient + self.ambient_copies + self.overlays
        return self.slots + self.scratch + ambient + self.resident + self.factors + self.unit_copies

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


@dataclass(frozen=True)
class Needs:
    """What a run asks for, beside where units rest.

    Attributes:
        model_map: The model's units.
        num_slots: Units in flight on the device, of those that rest elsewhere.
        num_draws: Directions and signs of a step.
        gathered: Names of ambient tables that are never copied whole.
        lags: Whether masters may be behind, so that who looks at a unit is given a copy of it.
        whole_slots: Whether slots hold whole masters.
        host_moves: Whether what rests on the host may be moved there.
        head: Name of the head, where it is perturbed ``head_chunk`` rows at a time.
        head_chunk: Rows.
        copied: Names of matrices in units of which perturbed copies are made.
        num_paths: Disks that units are striped over.
        stripe_bytes: Of each stripe.
    """

    model_map: ModelMap
    num_slots: int
    num_draws: int
    gathered: Collection[str]
    lags: bool = False
    whole_slots: bool = False
    host_moves: bool = True
    head: str | None = None
    head_chunk: int | None = None
    copied: Collection[str] = ()
    num_paths: int = 1
    stripe_bytes: int = Aio.block_size

    def plan(self, tiers: Mapping[int, str]) -> Plan:
        """Add up what a run will hold with units in these tiers, by index."""
        units, ambient = self.model_map.units, self.model_map.ambient
        streamed = [unit for unit in units if tiers[unit.index] != DEVICE]
        on_device, on_host, on_disk = (
            [unit for unit in self.model_map.everything if tiers[unit.index] == tier]
            for tier in (DEVICE, HOST, NVME)
        )
        slot = max((slot_size(unit, self.whole_slots) for unit in streamed), default=0)
        slot += _largest(streamed, _rest) if self.whole_slots else 0
        ambient_at_home = tiers[AMBIENT] == DEVICE
        return Plan(
            slots=min(self.num_slots, len(streamed)) * slot,
            scratch=_largest(units, _plain) + self._packed_here(tiers),
            ambient=ambient.wire_bytes,
            ambient_copies=self._copies(),
            resident=sum(map(_whole, on_device))
            - (ambient.wire_bytes if ambient_at_home else 0)
            + (_largest(on_device, _rest) if self._lag_there(on_device) else 0),
            host_bytes=sum(map(_whole, on_host))
            + (
                _largest(on_host, _wire) + _largest(on_host, _rest)
                if self.host_moves and self._lag_there(on_host)
                else 0
            )
            + self._packing(streamed)
            + num_staged(self.num_slots) * staged_bytes(on_disk),
            nvme_bytes=self._disk_bytes(on_disk),
            overlays=kept_bytes(self.model_map),
            factors=factor_bytes(self.model_map, self.num_draws),
            unit_copies=sum(size for _, size in self._unit_copies()),
        )

    def least(self, tier: str) -> Plan:
        """What a run holds with all units in one tier."""
        return self.plan({unit.index: tier for unit in self.model_map.everything})

    def divide(
        self, tier: str, device_budget: int | None, host_budget: int | None
    ) -> dict[int, str]:
        """Where every unit rests: in ``tier``, and nearer as many as the budgets take."""
        tiers = {unit.index: tier for unit in self.model_map.everything}
        if tier == NVME:
            tiers[AMBIENT] = HOST
        if tier != DEVICE and device_budget is not None:
            tiers = self._moved(tiers, DEVICE, lambda plan: plan.device_bytes <= device_budget)
        if tier == NVME and host_budget is not None:
            tiers = self._moved(tiers, HOST, lambda plan: plan.host_bytes <= host_budget)
        return tiers

    def _moved(
        self, tiers: dict[int, str], nearer: str, fits: Callable[[Plan], bool]
    ) -> dict[int, str]:
        """With as many units of the farthest tier in a nearer one as fit."""
        farthest = [unit.index for unit in self.model_map.units if tiers[unit.index] != DEVICE]

        def with_these(chosen: set[int]) -> dict[int, str]:
            return {**tiers, **dict.fromkeys(chosen, nearer)}

        return with_these(
            most_that_fit(farthest, lambda chosen: fits(self.plan(with_these(chosen))))
        )

    def _packed_here(self, tiers: Mapping[int, str]) -> int:
        """Where the device packs what it has updated."""
        units = [unit for unit in self.model_map.units if unit.packs_on_its_way]
        at_hand = self.whole_slots or any(tiers[unit.index] == DEVICE for unit in units)
        return _largest(units, _packed) if at_hand else 0

    def _unit_copies(self) -> set[tuple[int, int]]:
        return {
            unit_copy(span, segment)
            for unit in self.model_map.units
            for span, segment in unit.segments
            if segment.name in self.copied and self.model_map.is_low_rank(span)
        }

    def _disk_bytes(self, units: Collection[Unit]) -> int:
        slots = (slot_bytes(unit.wire_bytes, unit.rest_bytes) for unit in units)
        return disk_bytes(len(units), max(slots, default=0), self.num_paths, self.stripe_bytes)

    def _packing(self, streamed: Collection[Unit]) -> int:
        """Where units are packed on their way."""
        packs = self.host_moves and any(unit.packs_on_its_way for unit in streamed)
        return NUM_BUFFERS * _largest(streamed, _packed) if packs else 0

    def _copies(self) -> int:
        laid_over = {overlay.name for overlay in self.model_map.overlays.values()}
        trained = [
            (span, segment)
            for span, segment in self.model_map.ambient.segments
            if span.trainable and segment.name not in laid_over
        ]
        return sum(
            copy_bytes(span, segment) * (self.num_draws if is_small(span, segment) else 1)
            for span, segment in trained
            if segment.name not in self.gathered
        ) + sum(
            rows_bytes(span, segment, self.head_chunk)
            for span, segment in trained
            if self.head_chunk is not None and segment.name == self.head
        )

    def _lag_there(self, units: Iterable[Unit]) -> bool:
        """Whether copies of some of these are asked for; ambient parameters never lag."""
        return self.lags and any(unit.index != AMBIENT and not unit.is_frozen for unit in units)


def disk_bytes(
    num_units: int, largest: int, num_paths: int = 1, stripe_bytes: int = Aio.block_size
) -> int:
    """Of the files of a run: slots that any unit fits in, for every unit and the spare ones.

    Args:
        num_units: That rest there.
        largest: Bytes of the largest one's slot.
        num_paths: Files that they are striped over.
        stripe_bytes: Of each stripe.

    Example:
        >>> disk_bytes(2, 16 << 20) >> 20, disk_bytes(0, 0)
        (96, 0)
    """
    if not num_units:
        return 0
    return Geometry(num_paths, stripe_bytes, largest, num_units + SPARES).total_bytes


def _wire(unit: Unit) -> int:
    return unit.wire_bytes


def _plain(unit: Unit) -> int:
    return unit.plain_bytes


def _rest(unit: Unit) -> int:
    return unit.rest_bytes


def _packed(unit: Unit) -> int:
    return unit.packed_bytes


def _whole(unit: Unit) -> int:
    return unit.wire_bytes + unit.rest_bytes


def _largest(units: Collection[Unit], size: Callable[[Unit], int]) -> int:
    return max(map(size, units), default=0)


def is_small(span: Span, segment: Segment) -> bool:
    """Whether an ambient tensor keeps a copy a draw."""
    return copy_bytes(span, segment) <= SMALL_BYTES


def copy_bytes(span: Span, segment: Segment) -> int:
    """Bytes of one perturbed copy."""
    return segment.padded * span.dtype.itemsize


def unit_copy(span: Span, segment: Segment) -> tuple[int, int]:
    """Where a matrix lies in the scratch, and bytes of a copy: units of one shape share it."""
    return span.plain_offset + segment.start * span.dtype.itemsize, copy_bytes(span, segment)


def rows_bytes(span: Span, segment: Segment, rows: int) -> int:
    """Bytes of a perturbed copy of any so many neighbouring rows of a matrix."""
    height, width = segment.shape
    count = min(rows, height) * width
    apart = 0 if count % ALIGNMENT == 0 else ALIGNMENT  # they may begin inside a block of noise
    most = -(-count // ALIGNMENT) * ALIGNMENT + apart
    return min(most, segment.padded) * span.dtype.itemsize
