"""The exchange of a step: every rank's sums to rank 0, those of all back to every rank.

Sums are added in the order of global micro-batches, whichever rank they come from (group g of G
holds micro-batches g, g + G, ...), so that one rank with four micro-batches, two with two, four
with one, and ranks that run a part of the lanes each compute the same bits.

On the wire a rank sends ``Booked.pack``: 2 bytes, 4 a value (8 where fp32 would round it), as many
again where weights differ from 1; and 4 for the shape when it is another than before. Rank 0
answers with ``Sums.pack``, from which every rank computes the same means: mostly 2 bytes and 4 a
column, at most 1 and 8, more where there are weights. Or with a failure, which all raise alike.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import TypeVar, cast

from zo_offload.errors import ReplicaError, ZOError
from zo_offload.replica.booked import HEADER, SHAPE, STEP_BITS, Booked, Header, Shape
from zo_offload.replica.link import Alone, Link
from zo_offload.replica.sums import Sums, sums_of
from zo_offload.replica.told import (
    FAILURE,
    LENGTH,
    as_failure,
    as_told,
    no_answer,
    raise_as_told,
    raise_failure,
)

STEP = "step"
MOST_BYTES = 1 << 34  # of one message outside the steps: a journal, evaluated losses
UNASKED_BYTES = 1 << 15  # kernels hold as much for one who does not read
READY = b"\1"
Result = TypeVar("Result")
DONE, FAILED = b"\0", b"\1"


@dataclass
class Replica:
    """One rank among others.

    Args:
        link: To the others (default: there are none).

    Attributes:
        stop_asked: Set it, at any instant, for all ranks to end after a step.
        is_stopping: Whether they do, after the step whose means were found last; alike on all.
        step_bytes: What this rank has sent and received for means so far; on rank 0, in the middle
            of the star, that is all there was.

    Example:
        >>> Replica().mean(Booked.of(["loss"], [[(6.0, 3.0)], [(2.0, 1.0)]]), step=0)
        [2.0]
    """

    link: Link = field(default_factory=Alone)
    stop_asked: bool = field(default=False, init=False)
    is_stopping: bool = field(default=False, init=False)
    step_bytes: int = field(default=0, init=False)
    _shapes: dict[int, Shape] = field(default_factory=dict, init=False)  # by rank: sent or received

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
        what: str = STEP,
        names: Sequence[str] = (),
        alike: int = 1,
        finite: bool = True,
    ) -> list[float]:
        """Weighted mean of each column over all micro-batches of all ranks, the same on every rank.

        Args:
            booked: This rank's.
            step: Which; ranks at different steps are refused.
            what: Has this number, for messages.
            names: Of all columns in order, where neighbouring ranks hold equal parts of them.
            alike: Neighbouring ranks that hold the same, which counts once.
            finite: Whether a loss that is not fails the step; else its column's mean is not.

        Raises:
            DivergedError: A sum is not finite, or all weights are 0; every rank raises it.
            ReplicaError: Ranks do not fit together, or one has left.
        """
        names = names or booked.columns
        groups = self.world_size // alike * len(booked.columns) // len(names)
        count = groups * booked.shape[0]  # micro-batches of all ranks
        is_step = what == STEP
        if self.rank:
            packed = booked.pack(step, self._shapes.get(0), is_step and self.stop_asked)
            self._send_counted(0, packed)
            self._shapes[0] = booked.shape
            sums = Sums.receive(partial(self._receive_counted, 0), len(names), count)
            self.is_stopping |= sums.stops
            return sums.means
        try:
            everyone = [booked, *(self._receive_booked(r, booked, step) for r in self._others)]
            sums = sums_of(everyone[::alike], f"{what} {step}", names, finite)
        except ZOError as error:
            self._send_failure(error)
            raise
        if is_step and self.stop_asked:
            sums, self.is_stopping = replace(sums, stops=True), True
        if self.world_size > 1:
            answer = sums.pack(count)
            for rank in self._others:
                self._send_counted(rank, answer)
        return sums.means

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

    def refuse_differences(self, what: str, values: Mapping[str, str], mend: str) -> None:
        """Compare texts of every rank, by name, with rank 0's.

        Raises:
            ReplicaError: On every rank, naming those that differ, and the first text in which.
        """
        found = [json.loads(each) for each in self.gather(json.dumps(values).encode())]

        def compare() -> bytes:
            ours = found[0]
            for name in dict.fromkeys(chain(*found)):  # in order
                differing = [r for r, each in enumerate(found) if each.get(name) != ours.get(name)]
                if differing:
                    ranks = f"rank{'s' * (len(differing) > 1)} {', '.join(map(str, differing))}"
                    theirs = _short(found[differing[0]].get(name))
                    raise ReplicaError(
                        f"{what} of {ranks} differ from rank 0's ({name}: {theirs}, rank 0 has "
                        f"{_short(ours.get(name))}); {mend}"
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
        header = Header.read(self._receive_counted(rank, HEADER.size))
        self.stop_asked |= header.stops
        if header.shaped:
            self._shapes[rank] = SHAPE.unpack(self._receive_counted(rank, SHAPE.size))
        theirs = (header.step, *self._shapes.get(rank, (0, 0)))
        expected = (step & STEP_BITS, *ours.shape)
        if theirs != expected:
            names = "(step, micro-batches, values)"
            raise ReplicaError(
                f"rank {rank} brought {names} {theirs} where rank 0 has {expected}; every rank "
                "must run the same steps with the same number of micro-batches"
            )
        body = self._receive_counted(rank, header.values(ours.shape).size)
        return ours.unpack_like(header, body)

    def _send_counted(self, rank: int, data: bytes) -> None:
        self.link.send(rank, data)
        self.step_bytes += len(data)

    def _receive_counted(self, rank: int, size: int) -> bytes:
        data = self.link.receive(rank, size)
        self.step_bytes += size
        return data

    def _send_failure(self, error: ZOError) -> None:
        for rank in self._others:
            try:
                self.link.send(rank, as_failure(error))
            except ReplicaError:
                continue  # it has left; the others must still be told

    def _send_to_all(self, data: bytes) -> None:
        for rank in self._others:
            self._send_sized(rank, data)

    def _send_sized(self, rank: int, data: bytes) -> None:
        """What is large only when the other is there for it.

        A kernel gives up on one who is busy and takes nothing, as on one who has gone.
        """
        length = LENGTH.pack(len(data))
        if len(data) <= UNASKED_BYTES:
            self.link.send(rank, length + data)
            return
        self.link.send(rank, length)
        ready = self.link.receive(rank, len(READY))
        if ready == FAILURE[:1]:
            raise_failure(partial(self.link.receive, rank), ready)
        if ready != READY:
            raise no_answer(ready, rank)
        self.link.send(rank, data)

    def _receive_sized(self, rank: int) -> bytes:
        first = self.link.receive(rank, LENGTH.size)
        if first == FAILURE:
            raise_failure(partial(self.link.receive, rank))
        (size,) = LENGTH.unpack(first)
        if size > MOST_BYTES:
            raise ReplicaError(
                f"rank {rank} announced {size:,} bytes, at most {MOST_BYTES:,} fit"
                "; exchange less at a time"
            )
        if size > UNASKED_BYTES:
            self.link.send(rank, READY)
        return self.link.receive(rank, size)


def _short(text: str | None, limit: int = 64) -> str:
    if text is None:
        return "nothing"
    return text if len(text) <= limit else f"{text[:limit]}..."
