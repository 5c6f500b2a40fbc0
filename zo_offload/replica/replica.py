"""The exchange of a step: every rank's sums to rank 0, the means of all back to every rank.

Sums are added in the order of global micro-batches, whichever rank they come from (group g of G
holds micro-batches g, g + G, ...), so that one rank with four micro-batches, two with two, four
with one, and ranks that run a part of the lanes each compute the same bits.

On the wire a rank sends ``Booked.pack``: 6 bytes, 4 a value (8 where fp32 would round it), as many
again where weights differ from 1. Rank 0 answers with 8 bytes a column, or with a failure that all
ranks then raise alike.
"""

import math
import struct
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, cast

import numpy as np

from zo_offload.errors import DivergedError, ReplicaError, ZOError
from zo_offload.replica.booked import HEADER, STEP_BITS, Booked, Preamble
from zo_offload.replica.link import Alone, Link
from zo_offload.replica.told import (
    FAILURE,
    LENGTH,
    as_failure,
    as_told,
    raise_as_told,
    raise_failure,
)

MOST_BYTES = 1 << 34  # of one message outside the steps: a journal, evaluated losses
Result = TypeVar("Result")
DONE, FAILED = b"\0", b"\1"


@dataclass
class Replica:
    """One rank among others.

    Args:
        link: To the others (default: there are none).

    Attributes:
        step_bytes: What this rank has sent and received for means so far; on rank 0, in the middle
            of the star, that is all there was.

    Example:
        >>> Replica().mean(Booked.of(["loss"], [[(6.0, 3.0)], [(2.0, 1.0)]]), step=0)
        [2.0]
    """

    link: Link = field(default_factory=Alone)
    step_bytes: int = field(default=0, init=False)

    @property
    def rank(self) -> int:
        """Of this process."""
        return self.link.rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.link.world_size

    @property
    def bytes_sent(self) -> int:
        """By this rank so far."""
        return self.link.bytes_sent

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what the run leaves."""
        return self.rank == 0

    def mean(
        self,
        booked: Booked,
        step: int,
        what: str = "step",
        names: Sequence[str] = (),
        alike: int = 1,
    ) -> list[float]:
        """Weighted mean of each column over all micro-batches of all ranks, the same on every rank.

        Args:
            booked: This rank's.
            step: Which; ranks at different steps are refused.
            what: Has this number, for messages.
            names: Of all columns in order, where neighbouring ranks hold equal parts of them.
            alike: Neighbouring ranks that hold the same, which counts once.

        Raises:
            DivergedError: A sum is not finite, or all weights are 0; every rank raises it.
            ReplicaError: Ranks do not fit together, or one has left.
        """
        names = names or booked.columns
        count = len(names)
        self.step_bytes += 8 * count * (1 if self.rank else len(self._others))
        if self.rank:
            packed = booked.pack(step)
            self.step_bytes += len(packed)
            self.link.send(0, packed)
            first = self.link.receive(0, 8)
            if first == FAILURE:
                raise_failure(self._receive_from_first)
            rest = self.link.receive(0, 8 * (count - 1))
            return list(struct.unpack(f"<{count}d", first + rest))
        try:
            everyone = [booked, *(self._receive_booked(r, booked, step) for r in self._others)]
            means = mean_of(everyone[::alike], f"{what} {step}", names)
        except ZOError as error:
            self._send_failure(error)
            raise
        for rank in self._others:
            self.link.send(rank, struct.pack(f"<{len(means)}d", *means))
        return means

    def gather(self, data: bytes) -> list[bytes]:
        """Every rank's bytes by rank, on rank 0; elsewhere nothing."""
        if self.rank:
            self._send_sized(0, data)
            return []
        return [data, *(self._receive_sized(rank) for rank in self._others)]

    def share(self, make: Callable[[], bytes]) -> bytes:
        """What rank 0 makes, on every rank; what it raises, too.

        Raises:
            ZOError: As ``make`` raised it on rank 0.
        """
        if self.rank:
            answer = self._receive_sized(0)
            if answer[:1] == FAILED:
                raise_as_told(answer[1:])
            return answer[1:]
        try:
            made = make()
        except ZOError as error:
            self._send_to_all(FAILED + as_told(error))
            raise
        self._send_to_all(DONE + made)
        return made

    def all_or_none(self, work: Callable[[], Result]) -> Result:
        """What each rank's ``work`` gives, once it has succeeded on every rank.

        Raises:
            ZOError: The first rank's that failed, on every rank.
        """
        failure, result = b"", None
        try:
            result = work()
        except ZOError as error:
            if self.world_size == 1:
                raise
            failure = as_told(error)
        failures = self.gather(failure)
        first = self.share(lambda: next(filter(None, failures), b""))
        if first:
            raise_as_told(first)
        return cast(Result, result)

    def hand_over(self, source: int, targets: Collection[int], make: Callable[[], bytes]) -> bytes:
        """What one rank makes, on some others; all ranks call this together."""
        data = make() if self.rank == source else b""
        if self.rank == source != 0:
            self._send_sized(0, data)
        if self.rank == 0 != source:
            data = self._receive_sized(source)
        if self.rank == 0:
            for target in targets:
                if target not in (0, source):
                    self._send_sized(target, data)
        elif self.rank in targets and self.rank != source:
            data = self._receive_sized(0)
        return data

    def wait_for_all(self) -> None:
        """Return when every rank has come here."""
        self.gather(b"")
        self.share(bytes)

    def refuse_differences(self, what: str, value: str, mend: str) -> None:
        """Compare a text of every rank with rank 0's.

        Raises:
            ReplicaError: On every rank, naming those that differ.
        """
        found = [each.decode() for each in self.gather(value.encode())]

        def compare() -> bytes:
            differing = [rank for rank, text in enumerate(found) if text != found[0]]
            if differing:
                ranks = f"rank{'s' * (len(differing) > 1)} {', '.join(map(str, differing))}"
                raise ReplicaError(
                    f"{what} of {ranks} differ from rank 0's ({_short(found[differing[0]])}, "
                    f"rank 0 has {_short(found[0])}); {mend}"
                )
            return b""

        self.share(compare)

    def close(self) -> None:
        """Leave the others."""
        self.link.close()

    @property
    def _others(self) -> range:
        return range(1, self.world_size)

    def _receive_booked(self, rank: int, ours: Booked, step: int) -> Booked:
        preamble = Preamble.read(self.link.receive(rank, HEADER.size))
        theirs, expected = (preamble.step, *preamble.shape), (step & STEP_BITS, *ours.totals.shape)
        if theirs != expected:
            names = "(step, micro-batches, values)"
            raise ReplicaError(
                f"rank {rank} brought {names} {theirs} where rank 0 has {expected}; every rank "
                "must run the same steps with the same number of micro-batches"
            )
        body = self.link.receive(rank, preamble.body_bytes)
        self.step_bytes += HEADER.size + len(body)
        return ours.unpack_like(preamble, body)

    def _send_failure(self, error: ZOError) -> None:
        for rank in self._others:
            try:
                self.link.send(rank, as_failure(error))
            except ReplicaError:
                continue  # it has left; the others must still be told

    def _send_to_all(self, data: bytes) -> None:
        for rank in self._others:
            self._send_sized(rank, data)

    def _receive_from_first(self, size: int) -> bytes:
        return self.link.receive(0, size)

    def _send_sized(self, rank: int, data: bytes) -> None:
        self.link.send(rank, LENGTH.pack(len(data)) + data)

    def _receive_sized(self, rank: int) -> bytes:
        first = self.link.receive(rank, LENGTH.size)
        if first == FAILURE:
            raise_failure(self._receive_from_first)
        (size,) = LENGTH.unpack(first)
        if size > MOST_BYTES:
            raise ReplicaError(f"rank {rank} announced {size:,} bytes, at most {MOST_BYTES:,} fit")
        return self.link.receive(rank, size)


def mean_of(everyone: Sequence[Booked], what: str, names: Sequence[str] = ()) -> list[float]:
    """Weighted means of each column, added in the order of global micro-batches.

    Args:
        everyone: By rank, of one shape ``[M, C]``. As many neighbours as hold all columns together
            are a group; row i of group g of G is micro-batch i G + g.
        what: Is being averaged, for messages.
        names: Of all columns (default: those that every rank holds).

    Raises:
        DivergedError: A sum is not finite, or a column's weights add up to 0.
    """
    names = names or everyone[0].columns
    totals = np.stack([booked.totals for booked in everyone], axis=1)  # [M, W, C]
    weights = np.stack([booked.weights for booked in everyone], axis=1)
    totals, weights = (table.reshape(-1, len(names)) for table in (totals, weights))
    for micro_batch, row in enumerate(totals):
        for column, total in zip(names, row, strict=True):
            if not math.isfinite(total):
                raise DivergedError(
                    f"{what}: the loss is {total} ({column}, micro-batch {micro_batch}); nothing "
                    "was changed. Lower the learning rate or eps, or look at its data"
                )
    total, weight = totals[0].copy(), weights[0].copy()
    for row, its_weight in zip(totals[1:], weights[1:], strict=True):
        total += row  # elementwise: one order for every column
        weight += its_weight
    if not weight.all():
        raise DivergedError(
            f"{what}: the weights of all micro-batches add up to 0, so there is no mean loss; "
            "nothing was changed. Look at what the objective counts"
        )
    return (total / weight).tolist()


def _short(text: str, limit: int = 64) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."
