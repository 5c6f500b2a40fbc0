"""The pipeline on simulated streams: whatever comes late, each unit is seen at its step."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch

from offload.streams import Machine, simulated
from zo_offload.offload.arena import Arena
from zo_offload.offload.packing import NUM_BUFFERS
from zo_offload.offload.streamer import Sent, Slot, Streamer
from zo_offload.ops import Segment, Span
from zo_offload.units import Unit

NUM_UNITS, STEPS = 4, 8
SEEDS = range(12)


def unit(index: int) -> Unit:
    """Of bfloat16 and the other half of its masters."""
    span = Span(torch.bfloat16, (Segment("w", index, (128,), 0),), 0, 0)
    return Unit(index, f"unit {index}", (span,), span.wire_bytes, span.rest_bytes)


UNITS = [unit(index) for index in range(NUM_UNITS)]


def byte(index: int, step: int) -> int:
    """What every byte of a unit is after so many steps; no two alike."""
    return 1 + index + NUM_UNITS * step


class LateArena(Arena):
    """Zeroes what it gives when the device comes to it."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(torch.device("cuda"))
        self._machine = machine

    def take(self, purpose: str, num_bytes: int) -> torch.Tensor:
        buffer = torch.full((num_bytes,), 255, dtype=torch.uint8)
        self._machine.default.launch(buffer.zero_)
        return buffer


class Rest:
    """Where units rest, and what is wrong with what was seen."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.carried = dict.fromkeys(range(NUM_UNITS), 0)
        self.memory = {u.index: self._masters(u) for u in UNITS}
        self.wrong: list[tuple[str, int, int, int]] = []
        self._rooms = [torch.zeros(UNITS[0].wire_bytes).to(torch.uint8) for _ in range(NUM_BUFFERS)]
        self._until: list[Any] = [None] * NUM_BUFFERS
        self._turn = 0

    def _masters(self, of: Unit) -> tuple[torch.Tensor, torch.Tensor]:
        first = byte(of.index, 0)
        wire, rest = of.wire_bytes, of.rest_bytes
        return torch.full((wire,), first).byte(), torch.full((rest,), first).byte()

    # -- who moves masters: the host --

    def moved(self, of: Unit, step: int) -> Sent:
        """In place, and sent from there."""
        wire, _ = self.memory[of.index]
        wire.fill_(byte(of.index, step))
        self.carried[of.index] = step
        return Sent([(0, wire)], None, step, lambda after: None)

    def packed(self, of: Unit, step: int) -> Sent:
        """Sent from a room that others have in turn."""
        number = self._turn = (self._turn + 1) % NUM_BUFFERS
        if self._until[number] is not None:
            self._until[number].synchronize()
        room = self._rooms[number].fill_(byte(of.index, step))

        def release(after: Any) -> None:
            self._until[number] = after

        return Sent([(0, room)], None, step, release)

    # -- or the device --

    def as_it_rests(self, of: Unit, step: int) -> Sent:
        wire, rest = self.memory[of.index]
        return Sent([(0, wire)], rest, self.carried[of.index], lambda after: None)

    def taken_back(self, of: Unit, step: int) -> Sent:
        self.carried[of.index] = step
        wire, rest = self.memory[of.index]
        return Sent([(0, wire)], rest, step, lambda after: None)

    def bring(self, of: Unit, slot: Slot, step: int) -> None:
        """Launched: the steps that a slot lacks, added to both halves."""
        more = NUM_UNITS * (step - slot.carries)
        for part in (slot.wire, slot.rest):
            self.machine.current.launch(lambda part=part: part.add_(more))
        slot.carries = step

    def look(self, of: Unit, slot: Slot, step: int, whole: bool) -> None:
        """Launched: compare what is there with what should be."""
        right = byte(of.index, step)
        parts = (slot.wire, slot.rest) if whole else (slot.wire,)

        def compare() -> None:
            for part in parts:
                if not bool((part == right).all()):
                    self.wrong.append((of.name, step, right, int(part[0])))

        self.machine.current.launch(compare)


@contextmanager
def pipeline(rest: Rest, kind: str, num_slots: int) -> Iterator[Streamer]:
    prepare = {"host": rest.moved, "packed": rest.packed, "device": rest.as_it_rests}[kind]
    arena = LateArena(rest.machine)
    streamer = Streamer(UNITS, prepare, arena, num_slots, with_rest=kind == "device")
    try:
        yield streamer
    finally:
        streamer.close()


WAYS = {
    "whole": lambda step: UNITS,
    "early": lambda step: UNITS[: 4 - 2 * (step % 2)],  # where lanes end
    "any order": lambda step: random.Random(step).sample(UNITS, NUM_UNITS),
}


def visit(streamer: Streamer, rest: Rest, kind: str, step: int, way: Sequence[Unit]) -> None:
    """Units in order, each looked at along two draws."""
    machine, on_device = rest.machine, kind == "device"
    streamer.begin(step)
    for of in way:
        for _ in range(2):
            slot = streamer.acquire(of, step)
            if on_device and slot.carries < step:
                rest.bring(of, slot, step)
                streamer.give_back(of, lambda of=of: rest.taken_back(of, step))
            rest.look(of, slot, step, on_device)
            machine.by_chance()
    streamer.finish()
    machine.default.record_event().synchronize()  # the losses are read


@pytest.mark.parametrize("num_slots", [1, 2, 3])
@pytest.mark.parametrize("kind", ["host", "packed", "device"])
@pytest.mark.parametrize("way", WAYS)
def test_each_unit_is_seen_at_its_step(kind: str, num_slots: int, way: str):
    for seed in SEEDS:
        with simulated(seed) as machine:
            rest = Rest(machine)
            with pipeline(rest, kind, num_slots) as streamer:
                for step in range(1, STEPS):
                    visit(streamer, rest, kind, step, WAYS[way](step))
                streamer.wait()
                assert rest.wrong == [], seed
                for of in UNITS:
                    right = byte(of.index, rest.carried[of.index])
                    for part in rest.memory[of.index][: 2 if kind == "device" else 1]:
                        assert set(part.tolist()) == {right}, (seed, of.name)


def test_nothing_is_under_way_when_a_pipeline_is_closed():
    """Units of the visit that never came were fetched ahead."""
    for seed in SEEDS:
        with simulated(seed) as machine:
            rest = Rest(machine)
            with pipeline(rest, "host", 3) as streamer:
                streamer.begin(1, following=1)
                streamer.acquire(UNITS[0], 1)
                streamer.finish()
            up = cast("Any", streamer._up)
            assert not up._queue
