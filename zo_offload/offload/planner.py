"""How many bytes of weights each tier will hold, decided before anything is allocated."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from zo_offload.errors import StoreError
from zo_offload.factors import factor_bytes
from zo_offload.offload.aio import Aio
from zo_offload.offload.disk import padded
from zo_offload.offload.folders import SPARES
from zo_offload.offload.manifest import Geometry
from zo_offload.offload.packing import NUM_BUFFERS
from zo_offload.offload.residency import DEVICE, HOST, NVME, most_that_fit
from zo_offload.offload.slot import slot_bytes
from zo_offload.offload.staged import num_staged
from zo_offload.ops import ALIGNMENT, Segment, Span
from zo_offload.overlays import kept_bytes
from zo_offload.units import AMBIENT, ModelMap, Unit

Counts = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
TIERS = (DEVICE, HOST, NVME)
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
        host_ambient: Ambient parameters that rest in host memory, with their masters.
        host_units: Units that rest there, with theirs.
        spare: Room for a copy of one of both, where masters lag.
        packing: Where units are packed on their way.
        staging: Where units from the disk pass through host memory.
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
    host_ambient: int
    host_units: int
    spare: int
    packing: int
    staging: int
    nvme_bytes: int = 0
    overlays: int = 0
    factors: int = 0
    unit_copies: int = 0

    @property
    def device_bytes(self) -> int:
        """The peak on the device."""
        ambient = self.ambient + self.ambient_copies + self.overlays
        return self.slots + self.scratch + ambient + self.resident + self.factors + self.unit_copies

    @property
    def host_bytes(self) -> int:
        """Everything that rests in host memory, or passes through it."""
        return self.host_ambient + self.host_units + self.spare + self.packing + self.staging

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
class UnitBytes:
    """Bytes of the ambient pseudo-unit and of every unit behind it: arrays, an entry each.

    Attributes:
        wire: As they rest.
        rest: That stay with the masters.
        packed: The most that cross the bus where the wire is packed.
        plain: That the forward reads.
        moves: Whether something in it is trained.
        packs: Whether some of it is packed each time that it travels.
    """

    wire: Counts
    rest: Counts
    packed: Counts
    plain: Counts
    moves: Flags
    packs: Flags

    @classmethod
    def of(cls, units: Sequence[Unit]) -> "UnitBytes":
        """Of these, the ambient one first."""
        rows = [(u.wire_bytes, u.rest_bytes, u.packed_bytes, u.plain_bytes) for u in units]
        wire, rest, packed, plain = np.array(rows, dtype=np.int64).T
        return cls(
            wire,
            rest,
            packed,
            plain,
            np.array([not unit.is_frozen for unit in units]),
            np.array([unit.packs_on_its_way for unit in units]),
        )

    @cached_property
    def slots(self) -> Counts:
        """On disk."""
        parts = list(zip(self.wire.tolist(), self.rest.tolist(), strict=True))
        known = {pair: slot_bytes(*pair) for pair in set(parts)}
        return np.array([known[pair] for pair in parts], dtype=np.int64)


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
        given: Sizes of units, where they are others than the map's.
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
    given: UnitBytes | None = None

    @cached_property
    def sizes(self) -> UnitBytes:
        """Of units as they are mapped, or as they were given."""
        return self.given or UnitBytes.of(self.model_map.everything)

    def plan(self, tiers: Mapping[int, str]) -> Plan:
        """Add up what a run will hold with units in these tiers, by index."""
        return self.count(
            np.array([TIERS.index(tiers[unit.index]) for unit in self.model_map.everything])
        )

    def count(self, tiers: Counts) -> Plan:
        """The same, with tiers by their place in ``TIERS``: of the ambient ones, then of units."""
        sizes, units = self.sizes, np.arange(len(tiers)) > 0
        on_device, on_host, on_disk = (tiers == place for place in range(len(TIERS)))
        streamed = ~on_device & units
        whole = sizes.wire + sizes.rest
        lagging = sizes.moves & units if self.lags else np.zeros_like(units)
        there = on_host if self.host_moves and (lagging & on_host).any() else on_host & False
        largest_on_disk = (_largest(sizes.wire, on_disk), _largest(sizes.rest, on_disk))
        return Plan(
            slots=min(self.num_slots, int(streamed.sum())) * self._slot(streamed),
            scratch=_largest(sizes.plain, units) + self._packed_here(on_device),
            ambient=int(sizes.wire[0]),
            ambient_copies=self._copies,
            resident=int(whole[on_device].sum())
            - (int(sizes.wire[0]) if on_device[0] else 0)
            + (_largest(sizes.rest, on_device) if (lagging & on_device).any() else 0),
            host_ambient=int(whole[0]) if on_host[0] else 0,
            host_units=int(whole[on_host & units].sum()),
            spare=_largest(sizes.wire, there) + _largest(sizes.rest, there),
            packing=self._packing(streamed),
            staging=num_staged(self.num_slots) * sum(map(padded, largest_on_disk)),
            nvme_bytes=disk_bytes(
                int(on_disk.sum()),
                _largest(sizes.slots, on_disk),
                self.num_paths,
                self.stripe_bytes,
            ),
            overlays=self._scalars[0],
            factors=self._scalars[1],
            unit_copies=self._scalars[2],
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

    def _slot(self, streamed: Flags) -> int:
        """Bytes of a slot; of frozen units and of those that are never packed both are alike."""
        sizes = self.sizes
        if not self.whole_slots:
            return _largest(sizes.packed, streamed)
        most = np.maximum(sizes.packed, sizes.wire)
        return _largest(most, streamed) + _largest(sizes.rest, streamed)

    def _packed_here(self, on_device: Flags) -> int:
        """Where the device packs what it has updated."""
        packs = self.sizes.packs
        at_hand = self.whole_slots or bool((packs & on_device).any())
        return _largest(self.sizes.packed, packs) if at_hand else 0

    def _packing(self, streamed: Flags) -> int:
        """Where units are packed on their way."""
        packs = self.host_moves and bool((self.sizes.packs & streamed).any())
        return NUM_BUFFERS * _largest(self.sizes.packed, streamed) if packs else 0

    @cached_property
    def _scalars(self) -> tuple[int, int, int]:
        """What does not depend on where units rest: overlays, factors, copies of matrices."""
        copies = sum(size for _, size in self._unit_copies())
        return kept_bytes(self.model_map), factor_bytes(self.model_map, self.num_draws), copies

    def _unit_copies(self) -> set[tuple[int, int]]:
        return {
            unit_copy(span, segment)
            for unit in self.model_map.units
            for span, segment in unit.segments
            if segment.name in self.copied and self.model_map.is_low_rank(span)
        }

    @cached_property
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
            if not self._is_gathered(segment.name)
        ) + sum(
            rows_bytes(span, segment, self.head_chunk)
            for span, segment in trained
            if self.head_chunk is not None and segment.name == self.head
        )

    def _is_gathered(self, name: str) -> bool:
        """Whether it is never copied whole; a head in chunks is not."""
        in_chunks = self.head_chunk is not None and name == self.head and name not in self.copied
        return in_chunks or name in self.gathered


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


def _largest(sizes: Counts, among: Flags) -> int:
    return int(sizes.max(initial=0, where=among))


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
