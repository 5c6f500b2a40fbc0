"""The time of a step's exchange by the number of ranks and the delay of the network.

    round trip + rank 0's work for so many ranks

Rank 0 reads from and answers one rank after the other, so that the last answer leaves when all that
work is done; a rank's message and the answer to it are one packet each. Both terms are measured by
themselves, and the sum is held against exchanges over a cable with a delay.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np
from programs import Program

REPEATED, FEWER, MANY = 21, 7, 2000
SHOWN_RANKS = (2, 10, 100, 1_000, 10_000)
SHOWN_DELAYS_MS = (0.0, 0.1, 1.0, 10.0, 100.0)
FRAME_BYTES = 24  # preamble, checksum and gap of an Ethernet frame, which counters leave out
GIGABIT = 125e6
TARGET = 0.01


@dataclass
class Exchange:
    """What was measured.

    Attributes:
        loops: By number of ranks: seconds of rank 0 when all others have sent already, by what
            takes them.
        around: By number of ranks: seconds of an exchange back to back, on this host.
        connecting: By number of ranks: seconds until all had connected.
        trips: By delay in ms: seconds of one byte to another network and back.
        delayed: By (delay in ms, ranks): seconds of an exchange with all others over there.
        bytes_a_rank: On the cable, the larger of both directions.
        packets_a_rank: In both directions together.
    """

    loops: dict[int, dict[str, float]] = field(default_factory=dict)
    around: dict[int, float] = field(default_factory=dict)
    connecting: dict[int, float] = field(default_factory=dict)
    trips: dict[float, float] = field(default_factory=dict)
    delayed: dict[tuple[float, int], float] = field(default_factory=dict)
    bytes_a_rank: float = 0.0
    packets_a_rank: float = 0.0

    def measure_loops(self, both: Sequence[Program], sizes: Sequence[int], host: str) -> None:
        """Rank 0's own work, without waiting for anybody."""
        near, far = both
        for ranks in sizes:
            self.connecting[ranks] = _connect(near, far, ranks, host)
            rows = []
            for step in range(REPEATED if ranks <= MANY else FEWER):
                far.ask("send", step=step)
                rows.append(near.ask("mean", step=step))
                far.ask("receive")
            self.loops[ranks] = {key: median(row[key] for row in rows) for key in rows[0]}
            self.around[ranks] = _around(near, far, max(7, MANY // ranks))

    def measure_delay(
        self, both: Sequence[Program], delay_ms: float, sizes: Sequence[int], host: str
    ) -> None:
        """Exchanges with ranks on the other side of a cable, and a byte there and back."""
        near, far = both
        count = max(5, min(300, int(1000 / (2 * delay_ms + 1))))
        for ranks in sizes:
            _connect(near, far, ranks, host)
            far.tell("echo", count=count)
            self.trips[delay_ms] = near.ask("round_trip", count=count)
            far.hear()
            before = near.ask("traffic")
            self.delayed[delay_ms, ranks] = _around(near, far, count)
            after = near.ask("traffic")
            moved = {key: (after[key] - before[key]) / (count + 1) / (ranks - 1) for key in after}
            packets = max(moved["packets in"], moved["packets out"])
            self.bytes_a_rank = max(moved["received"], moved["sent"]) + FRAME_BYTES * packets
            self.packets_a_rank = moved["packets in"] + moved["packets out"]

    def fitted(self) -> tuple[float, float]:
        """Rank 0's seconds: fixed, and for one rank; equal relative errors count alike."""
        ranks = np.array(list(self.loops), float)
        seconds = np.array([each["processor"] for each in self.loops.values()])
        slope, fixed = np.polyfit(ranks - 1, seconds, 1, w=1 / seconds)
        return max(0.0, float(fixed)), float(slope)

    def work(self, ranks: int) -> float:
        """Rank 0's seconds: on a line between numbers that were measured, beyond as fitted."""
        sizes = list(self.loops)
        if ranks > sizes[-1]:
            return self.loops[sizes[-1]]["processor"] + (ranks - sizes[-1]) * self.fitted()[1]
        return float(np.interp(ranks, sizes, [each["processor"] for each in self.loops.values()]))

    def show_loops(self) -> None:
        print("rank 0's work, all others having sent, and what of it is what (medians); an "
              "exchange back to back, all on this host")  # fmt: skip
        print("| ranks | processor, ms | us a rank | receiving | reading | adding | sending | "
              "clock, ms | back to back, ms | connecting, s |")  # fmt: skip
        print("|---|---|---|---|---|---|---|---|---|---|")
        for ranks, parts in self.loops.items():
            total, processor = parts["total"], parts["processor"]
            shares = " | ".join(
                f"{parts[key] / total:.0%}" for key in ("receiving", "reading", "adding", "sending")
            )
            print(
                f"| {ranks:,} | {1e3 * processor:.3g} | {1e6 * processor / (ranks - 1):.1f} | "
                f"{shares} | {1e3 * total:.3g} | {1e3 * self.around[ranks]:.3g} | "
                f"{self.connecting[ranks]:.2f} |"
            )
        fixed, slope = self.fitted()
        print(f"fitted: {1e6 * fixed:.0f} us + {1e6 * slope:.1f} us a rank")

    def show_delays(self) -> None:
        print("two networks, rank 0 on one and all others on the other; ms")
        sizes = sorted({ranks for _, ranks in self.delayed})
        heads = " | ".join(f"{ranks} ranks | model | ratio" for ranks in sizes)
        print(f"| delay one way, ms | a byte there and back, ms | {heads} |")
        print("|---" * (2 + 3 * len(sizes)) + "|")
        for delay, trip in self.trips.items():
            cells = []
            for ranks in sizes:
                took = self.delayed[delay, ranks]
                model = trip + self.work(ranks)
                cells.append(f"{1e3 * took:.3g} | {1e3 * model:.3g} | {took / model:.2f}")
            print(f"| {delay:g} | {1e3 * trip:.3g} | {' | '.join(cells)} |")
        print(f"on the cable: {self.bytes_a_rank:.0f} bytes a rank in the fuller direction, "
              f"{self.packets_a_rank:.1f} packets a rank in both")  # fmt: skip


def show_extrapolation(exchange: Exchange, step_ms: float) -> dict[str, object]:
    """The table of ranks by delays; which run keeps the exchange within its share of a step."""
    _, slope = exchange.fitted()
    print(f"exchange in ms, share of a step of {step_ms:.0f} ms, and what is most of it; up to "
          f"{max(exchange.loops):,} ranks rank 0's work is measured")  # fmt: skip
    print("| ranks | " + " | ".join(f"{d:g} ms one way" for d in SHOWN_DELAYS_MS) + " |")
    print("|---" * (1 + len(SHOWN_DELAYS_MS)) + "|")
    for ranks in SHOWN_RANKS:
        cells = []
        for delay in SHOWN_DELAYS_MS:
            trip = 2e-3 * delay
            took = trip + exchange.work(ranks)
            wire = (ranks - 1) * exchange.bytes_a_rank / GIGABIT
            parts = {"way": trip, "rank 0": took - trip, "cable": wire}
            bound = max(parts, key=lambda key: parts[key])
            cells.append(f"{1e3 * took:.3g}, {1e3 * took / step_ms:.1%}, {bound}")
        print(f"| {ranks:,} | {' | '.join(cells)} |")
    wire = exchange.bytes_a_rank / GIGABIT
    print(f"a cable of 1 Gbit/s takes {1e6 * wire:.2f} us a rank, rank 0 {1e6 * slope:.1f} us")
    return {
        "rank_0_microseconds_a_rank": round(1e6 * slope, 2),
        "most_ranks_within_a_hundredth": most_ranks(exchange, TARGET * step_ms / 1e3),
    }


def most_ranks(exchange: Exchange, seconds: float) -> int:
    """For how many rank 0's work takes no longer."""
    return max((n for n in range(2, SHOWN_RANKS[-1]) if exchange.work(n) <= seconds), default=1)


def _connect(near: Program, far: Program, ranks: int, host: str) -> float:
    invitation = near.ask("listen", world_size=ranks, host=host)
    far.tell("join", world_size=ranks, host=host, invitation=invitation)
    seconds = near.ask("accepted")
    far.hear()
    return seconds


def _around(near: Program, far: Program, count: int) -> float:
    far.tell("loop", count=count)
    seconds = near.ask("loop", count=count)
    far.hear()
    return seconds
