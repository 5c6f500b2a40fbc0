"""Do ranks that took the same steps have the same weights? A digest of one unit a step says so.

Every rank applies the same updates to the same base, so bits differ only where memory, a disk or a
program has failed. After each step one unit's masters are digested, in turn; every ``interval``
steps the sums of the digests are compared, a few bytes. Where they differ, each unit concerned is
looked at as it is now: what most copies have is right, and of two copies the one in which a replay
from the base or a snapshot ends. The wrong ones are named, and put right, or the run is stopped.

Ranks that share a unit's memory have one copy of it, which the first of them digests. So what each
rank did to it is compared as well: the records of its steps, in which a learning rate of its own
shows.
"""

import json
import logging
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from zo_offload.errors import ReplicaError
from zo_offload.journal import Record
from zo_offload.offload.residency import DEVICE
from zo_offload.offload.staged import FirstValues
from zo_offload.replica import Replica
from zo_offload.resting import digest_of
from zo_offload.units import Unit
from zo_offload.weights import Weights

logger = logging.getLogger(__name__)

# of units on the host, on the device; CRC of the steps; whether the first one counts
SUMS = struct.Struct("<QQI?")
DID = ("step", "lr", "decay", "owed", "eps", "flags", "branch", "directions")  # as weights see it
# Writes values of a unit to its zeroed wire and rest, and the steps that they carry.
Beginning = tuple[FirstValues, int]


@dataclass(frozen=True)
class Entry:
    """A digest that was taken.

    Attributes:
        step: After which.
        unit: Index of the unit.
        carries: Steps in its masters.
        digest: Of their bytes; None where another rank digests the same memory.
    """

    step: int
    unit: int
    carries: int
    digest: int | None


@dataclass
class Agreement:
    """Compares the weights of ranks.

    Args:
        weights: This rank's.
        replica: The others.
        interval: Steps between two comparisons; 0 for none.
        repair: Whether wrong weights are put right; else the run stops.

    Attributes:
        beginnings: What a unit can be replayed from, the latest first.
    """

    weights: Weights
    replica: Replica
    interval: int
    repair: bool
    beginnings: Callable[[Unit], Iterator[Beginning]] = lambda unit: iter(())
    _entries: list[Entry] = field(default_factory=list)
    _did: list[Sequence[float]] = field(default_factory=list)  # of each step what DID names

    def after_step(self, record: Record) -> None:
        """Digest the unit whose turn it is; on every ``interval``-th step compare.

        Args:
            record: Of the step that was taken.

        Raises:
            ReplicaError: Ranks differ, and are to be stopped, or nobody can say who is right.
        """
        if not self.interval or self.replica.world_size == 1:
            return
        step, units = record.step, self.weights.map.everything
        unit = units[step % len(units)]
        self._did.append(_did(record))
        self._entries.append(Entry(step, unit.index, *self._fingerprint(unit)))
        if (step + 1) % self.interval:
            return
        entries, self._entries = self._entries, []
        did, self._did = self._did, []
        if self._differ(entries, zlib.crc32(json.dumps(did).encode())):
            self._refuse_other_steps(did)
            for suspect, since in self._suspects(entries):
                self._resolve(suspect, since)

    def _fingerprint(self, unit: Unit) -> tuple[int, int | None]:
        if not self.weights.digests(unit):
            return self.weights.carried(unit), None
        return self.weights.fingerprint(unit)

    def _differ(self, entries: Sequence[Entry], steps: int) -> bool:
        """Whether steps do, or sums: of units on the host, which ranks may share, and the device's.

        Args:
            entries: Of this rank.
            steps: CRC of what it did.
        """
        sums, counts = [0, 0], True
        for entry in entries:
            on_device = self.weights.tiers[entry.unit] == DEVICE
            sums[on_device] = (sums[on_device] + (entry.digest or 0)) % 2**64
            counts &= entry.digest is not None
        packed = SUMS.pack(*sums, steps, counts)
        found = [SUMS.unpack(each) for each in self.replica.gather(packed)]

        def compare() -> bytes:
            voted = {shared for shared, _, _, counts in found if counts}
            return bytes([len(voted) > 1 or len({(own, did) for _, own, did, _ in found}) > 1])

        return bool(self.replica.share(compare)[0])

    def _refuse_other_steps(self, did: Sequence[Sequence[float]]) -> None:
        """Where ranks did not do the same, no copy of the weights is what it should be."""
        for steps in zip(*self._everyone(did), strict=True):
            for rank, theirs in enumerate(steps):
                for name, value, first in zip(DID, theirs, steps[0], strict=True):
                    if value != first:
                        raise ReplicaError(
                            f"step {steps[0][0]}: rank {rank} has {name} {value}, rank 0 has "
                            f"{first}; set it alike on every rank, and start the same command "
                            "again: it replays the journal"
                        )

    def _suspects(self, entries: Sequence[Entry]) -> list[tuple[Unit, int]]:
        """Units of which digests differ, and the step after which that was seen first."""
        mine = [(e.step, e.unit, e.carries, e.digest) for e in entries]
        units = {unit.index: unit for unit in self.weights.map.everything}
        found: dict[int, int] = {}
        for row in zip(*self._everyone(mine), strict=True):  # of one step, by rank
            step, unit = row[0][:2]
            if len({tuple(each) for each in row if each[3] is not None}) > 1:
                found.setdefault(unit, step)
        return [(units[unit], step) for unit, step in found.items()]

    def _resolve(self, unit: Unit, since: int) -> None:
        """Find out who is right, and act."""
        self.weights.forget_fetched()
        digests = [digest for _, digest in self._everyone(self._fingerprint(unit))]
        right = self._right(unit, digests)
        wrong = [r for r, digest in enumerate(digests) if digest not in (None, right)]
        name = f"unit {unit.name or '(what is in no unit)'}"
        if right is None:
            raise ReplicaError(
                f"{name}: ranks {', '.join(map(str, wrong))} differ since step {since} at the "
                "latest, and nothing says which is right (no majority, and no base directory or "
                "snapshot to replay from); start the same command again: it replays the journal"
            )
        those = f"rank{'s' * (len(wrong) > 1)} {', '.join(map(str, wrong))}"
        what = f"{name} of {those} differs from the other ranks' since step {since} at the latest"
        if not self.repair:
            raise ReplicaError(
                f'{what}; "on_mismatch" is "stop". Look at the memory and disks of {those}, and '
                "start the same command again: it replays the journal"
            )
        if wrong:
            self._put_right(unit, digests.index(right), wrong, right)
            logger.warning("%s; it has been put right. Look at the memory of %s", what, those)

    def _right(self, unit: Unit, digests: Sequence[int | None]) -> int | None:
        votes = Counter(digest for digest in digests if digest is not None)
        first, count = votes.most_common(1)[0]
        if 2 * count > votes.total():
            return first
        ends = self._everyone(self._replay(unit, lambda digest: digest in votes))
        return next((end for end in ends if end is not None), None)

    def _replay(self, unit: Unit, is_it: Callable[[int], bool], keep: bool = False) -> int | None:
        """The digest in which a replay of a unit ends, if it is one of those that are looked for.

        Args:
            unit: Which.
            is_it: Whether a digest is looked for.
            keep: Whether the unit's masters become what was replayed.
        """
        for fill, carries in self.beginnings(unit):
            wire, rest = self.weights.replayed(unit, fill, carries)
            digest = digest_of(unit, wire, rest)
            if is_it(digest):
                if keep:
                    self.weights.overwrite(unit, wire, rest)
                return digest
        return None

    def _put_right(self, unit: Unit, source: int, wrong: Sequence[int], right: int) -> None:
        """By replay where a wrong rank can, else by a copy of a rank's that is right."""
        rank = self.replica.rank
        lacks = rank in wrong and self._replay(unit, lambda digest: digest == right, True) is None
        targets = [r for r, still in enumerate(self._everyone(lacks)) if still]
        if targets:
            data = self.replica.hand_over(source, targets, lambda: self.weights.bytes_of(unit))
            if rank in targets:
                self.weights.overwrite(unit, *self.weights.parts_of(unit, data))
        self.weights.meet()  # those who share the memory go on when it is right

    def _everyone(self, value: object) -> list[Any]:
        """What every rank passes, a JSON value, on every rank."""
        said = [json.loads(data) for data in self.replica.gather(json.dumps(value).encode())]
        return json.loads(self.replica.share(lambda: json.dumps(said).encode()))


def _did(record: Record) -> Sequence[float]:
    directions = zlib.crc32(repr(record.probes).encode())
    numbers = (record.lr, record.decay, record.owed, record.eps)
    return record.step, *numbers, int(record.flags), record.branch, directions
