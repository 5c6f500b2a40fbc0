"""What ranks cost each other: bytes, time, memory, on one node, on two, and up to 10,000 ranks.

Random OPT weights in bfloat16 with fp32 masters, read from a directory; ranks are real processes
with one thread each, their weights in host memory. Parts:

* ``exchange``: a step's scalars among 1, 2, 4 ranks, bytes by the kernel's count on all TCP
  sockets, beside gloo's collectives of the same scalars in the same ranks (as they come, untuned).
  The floor is a round trip.
* ``memory``: a large model; bytes a lane must be the small one's, and the node's memory that of
  one rank, with blocks at rest in host memory and on NVMe. Memory is the kernel's proportional set
  size, before and after.
* ``weak``: the same work for every rank.
* ``star``: rank 0's part with up to 10,000 ranks that only exchange, by what takes it; then two
  networks with a delay on the cable between; from both the exchange of any run.
* ``nodes``: a step of two ranks on two nodes over that of two on one. With weights in host memory
  ranks of a node share the work on them, so that is compared with weights on the device as well.

    python benchmarks/scaling.py [--parts exchange memory weak star nodes] [--rounds 9]
                                 [--small 4 128 1024] [--large 18 2048 50272]
                                 [--medium 8 512 8192] [--tokens 4 64] [--ranks 1 2 4]
                                 [--star 2 4 16 64 256 1024 4096 10000] [--delays 0 0.1 1 10 100]

The last line is JSON. ``exchange_share_of_step`` is of a step of 100 ms, among as many ranks as
have a core each; the time is in a step, not back to back.
"""

import argparse
import json
import logging
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from programs import Program, ask_all, python, started
from scaling_model import Exchange, show_extrapolation
from stream import make_model
from timing import Times, alternating

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from distributed.launch import environment, free_port
from distributed.two_nodes import Node, two_nodes, why_not

HERE = "127.0.0.1"
A_TURN = 2  # steps of one contestant before the other's
STEP_MS = 100.0  # of which the exchange's share is told
HOWS = ("ours", "all_reduce", "all_gather")
PARTS = ("exchange", "memory", "weak", "star", "nodes")
SHAPES = {"small": (4, 128, 1024), "large": (18, 2048, 50_272), "medium": (8, 512, 8192)}
METAVAR = ("LAYERS", "WIDTH", "VOCABULARY")
HOST_MEMORY = {"offload_param": {"device": "cpu"}}
ON_DEVICE = {"offload_param": {"device": "none"}}
Found = dict[str, Any]


@contextmanager
def ranks(count: int, nodes: Sequence[Node] = ()) -> Iterator[list[Program]]:
    """Ranks of one run, here or one a node."""
    commands, port = [python("scaling_rank.py")] * count, str(free_port())
    if nodes:
        commands = [node.command(command) for node, command in zip(nodes, commands, strict=True)]
    variables = [
        environment(
            RANK=str(rank), LOCAL_RANK="0" if nodes else str(rank), WORLD_SIZE=str(count),
            MASTER_ADDR=nodes[0].address if nodes else HERE, MASTER_PORT=port,
            OMP_WAIT_POLICY="PASSIVE", HF_HUB_DISABLE_PROGRESS_BARS="1",
        )
        for rank in range(count)
    ]  # fmt: skip
    with started(commands, variables) as programs:
        yield programs


class Models:
    """Directories with random weights, made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, layers: int, width: int, vocabulary: int) -> str:
        path = self._folder / f"{layers}-{width}-{vocabulary}"
        if not path.exists():
            make_model(path, layers, width, vocabulary)
        return str(path)


class Bench:
    """The parts."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.models = Models(folder)

    def prepare(
        self, world: list[Program], shape: Sequence[int], block: Found, batch: Sequence[int]
    ) -> int:
        """Parameters of the model that all ranks now have, after two steps of it."""
        rows, length = batch
        model = self.models.path(*shape)
        said = ask_all(world, "prepare", model=model, block=block, rows=rows, length=length)
        ask_all(world, "steps", count=2)
        return said[0]["parameters"]

    # -- exchange --

    def exchange(self) -> Found:
        print("| ranks | share a micro-batch | bytes a step | bytes a lane | and comparing weights "
              "| in a step, us | gloo all_reduce in a step, us |")  # fmt: skip
        print("|---|---|---|---|---|---|---|")
        lanes: Found = {}
        shares: dict[int, float] = {}
        closed: list[tuple[int, Found]] = []
        for count in self.options.ranks:
            with ranks(count) as world:
                self.prepare(world, self.options.small, HOST_MEMORY, (1, 16))
                lanes[f"{count}"], seconds = self._row(world, 1)
                shares[count] = round(1e3 * seconds / STEP_MS, 5)
                closed.append((count, self._back_to_back(world)))
                if count % 2 == 0:
                    self.prepare(world, self.options.small, apart(2), (1, 16))
                    lanes[f"{count}, probe_parallel 2"], _ = self._row(world, 2)
        show_back_to_back(closed)
        whole = [value for name, value in lanes.items() if "," not in name]
        own_core = [count for count in shares if count <= len(os.sched_getaffinity(0))]
        return {
            "bytes_per_lane_step": max(whole),
            "bytes_per_lane": lanes,
            "exchange_share_of_step": shares[max(own_core)],
            "exchange_share_of_step_by_ranks": shares,
        }

    def _row(self, world: list[Program], parallel: int) -> tuple[float, float]:
        """Prints one; bytes a lane with all that belongs to steps, and seconds in a step."""
        sent, a_lane = bytes_of(ask_all(world, "steps", count=2))
        _, compared = bytes_of(ask_all(world, "steps", count=self.options.counted))
        times = ask_all(world, "apart", count=20 * self.options.rounds)
        ours, gloo = (slowest(times, name) for name in ("ours", "all_reduce"))
        print(
            f"| {len(world)} | {parallel} | {sent:.0f} | {a_lane:.2f} | {compared:.2f} | "
            f"{quartiles(ours)} | {quartiles(gloo)} |",
            flush=True,
        )
        return round(compared, 3), median(ours)

    def _back_to_back(self, world: list[Program]) -> Found:
        """Seconds and bytes of one of many exchanges, ours and gloo's alternating."""
        found: Found = {how: [] for how in HOWS}
        for number in range(self.options.rounds + 1):
            for how in HOWS:
                said = ask_all(world, "exchanges", how=how, count=200)
                if number:
                    found[how].append(
                        (max(each["seconds"] for each in said), sum(e["bytes"] for e in said))
                    )
        return found

    # -- memory --

    def memory(self) -> Found:
        rows: list[tuple[int, Found, Found]] = []
        on_disk: list[tuple[int, Found, Found]] = []
        lanes: Found = {}
        for count in self.options.ranks:
            with ranks(count) as world:
                rows.append((count, *self._grown(world, HOST_MEMORY)))
                lanes[f"{count}"] = bytes_of(ask_all(world, "steps", count=2))[1]
                if count % 2 == 0:
                    self.prepare(world, self.options.large, apart(2), (1, 16))
                    said = ask_all(world, "steps", count=2)
                    lanes[f"{count}, probe_parallel 2"] = bytes_of(said)[1]
            with tempfile.TemporaryDirectory(dir=self.folder) as units, ranks(count) as world:
                on_disk.append((count, *self._grown(world, disk(units))))
        print(f"bytes a lane of this model: {lanes}")
        name = f"node_weight_memory_ratio_{self.options.ranks[-1]}_ranks"
        ratio, before_trim = show_memory("host memory", rows)
        ratio_on_disk, _ = show_memory("NVMe", on_disk)
        return {
            name: ratio,
            f"{name}_before_malloc_trim": before_trim,
            f"{name}_nvme": ratio_on_disk,
            "large_model_bytes_per_lane": lanes,
        }

    def _grown(self, world: list[Program], block: Found) -> tuple[Found, Found]:
        """What the node's memory grew by, all ranks together: as it is, and trimmed.

        After four steps: until the third, ranks that do not ask the disk hold what they loaded.
        """
        before = total_of(ask_all(world, "memory", trimmed=True))
        count = self.prepare(world, self.options.large, block, (1, 16))
        ask_all(world, "steps", count=2)
        found = []
        for trimmed in (False, True):
            after = total_of(ask_all(world, "memory", trimmed=trimmed))
            found.append({key: after[key] - before[key] for key in after} | {"parameters": count})
        return found[0], found[1]

    # -- weak scaling --

    def weak(self) -> Found:
        counts = self.options.ranks
        said: dict[int, list[Found]] = {count: [] for count in counts}
        processors = {count: Processors() for count in counts}
        with ExitStack() as stack:
            worlds = {count: stack.enter_context(ranks(count)) for count in counts}
            for world in worlds.values():
                self.prepare(world, self.options.medium, HOST_MEMORY, self.options.tokens)

            contestants = {
                str(count): partial(turn, worlds[count], said[count], processors[count])
                for count in counts
            }
            times = alternating(contestants, self.options.rounds)
        return show_weak(times, said, processors)

    # -- star --

    def stars(self) -> Found:
        exchange = Exchange()
        here = environment()
        with started([python("scaling_star.py", s) for s in ("near", "far")], [here] * 2) as both:
            exchange.measure_loops(both, self.options.star, HERE)
        exchange.show_loops()
        if reason := why_not():
            print(f"no second network: {reason}")
        else:
            for delay in self.options.delays:
                self._delayed(exchange, delay)
            exchange.show_delays()
        return show_extrapolation(exchange, STEP_MS)

    def _delayed(self, exchange: Exchange, delay: float) -> None:
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        with two_nodes(folder, delay) as nodes:
            commands = [
                node.command(python("scaling_star.py", side))
                for node, side in zip(nodes, ("near", "far"), strict=True)
            ]
            with started(commands, [environment()] * 2) as both:
                exchange.measure_delay(both, delay, self.options.far, nodes[0].address)

    # -- nodes --

    def nodes(self) -> Found:
        if reason := why_not():
            print(f"no second node: {reason}")
            return {}
        with ExitStack() as stack:
            folder = Path(tempfile.mkdtemp(dir=self.folder))
            pair = stack.enter_context(two_nodes(folder))
            worlds = {
                "one": stack.enter_context(ranks(2)),
                "two": stack.enter_context(ranks(2, pair)),
            }
            print("| weights | one node, ms | spread | two nodes, ms | spread | ratio | "
                  "of processor time |")  # fmt: skip
            print("|---|---|---|---|---|---|---|")
            on_device = self._compared(worlds, "device", ON_DEVICE)
            in_memory = self._compared(worlds, "host memory", HOST_MEMORY)
        return {"two_nodes_over_one": in_memory, "two_nodes_over_one_on_device": on_device}

    def _compared(self, worlds: dict[str, list[Program]], name: str, block: Found) -> float:
        """Prints a row; two nodes' time over one's."""
        said: dict[str, list[Found]] = {key: [] for key in worlds}
        for world in worlds.values():
            self.prepare(world, self.options.medium, block, self.options.tokens)
        contestants = {
            key: partial(turn, world, said[key], Processors()) for key, world in worlds.items()
        }
        times = alternating(contestants, 3 * self.options.rounds)
        one, two = times["one"], times["two"]
        used = {key: median(each["processor"] for each in said[key]) for key in said}
        print(
            f"| {name} | {1e3 * one.median / A_TURN:.0f} | {one.spread:.0%} | "
            f"{1e3 * two.median / A_TURN:.0f} | {two.spread:.0%} | {two.over(one):.3f} | "
            f"{used['two'] / used['one']:.3f} |"
        )
        return round(two.over(one), 3)


def apart(parallel: int) -> Found:
    """Ranks share a micro-batch and run a part of its lanes each."""
    return HOST_MEMORY | {"replica": {"probe_parallel": parallel}}


def disk(folder: str) -> Found:
    """Blocks rest in a directory."""
    return {"offload_param": {"device": "nvme", "nvme_path": folder}}


def bytes_of(said: Sequence[Found]) -> tuple[float, float]:
    """Of all ranks' steps: a step, and a lane of it."""
    sent, lanes = (sum(each[key] for each in said) for key in ("bytes", "lanes"))
    return sent, sent / lanes


def slowest(said: Sequence[dict[str, list[float]]], name: str) -> list[float]:
    """Seconds, each of the rank that took longest."""
    return [max(each) for each in zip(*(one[name] for one in said), strict=True)]


def quartiles(seconds: Sequence[float]) -> str:
    """The median and the middle half, in microseconds."""
    ordered = sorted(seconds)
    quarter = len(ordered) // 4
    return (
        f"{1e6 * median(ordered):.0f} ({1e6 * ordered[quarter]:.0f} to "
        f"{1e6 * ordered[-1 - quarter]:.0f})"
    )


def show_back_to_back(closed: Sequence[tuple[int, Found]]) -> None:
    print("back to back, us and bytes of all ranks together; gloo of two float64, untuned")
    print("| ranks | ours | bytes | all_reduce | bytes | all_gather | bytes |")
    print("|---|---|---|---|---|---|---|")
    for count, found in closed:
        cells = [
            f"{quartiles([seconds for seconds, _ in found[how]])} | "
            f"{median(sent for _, sent in found[how]):.0f}"
            for how in HOWS
        ]
        print(f"| {count} | {' | '.join(cells)} |")


def total_of(said: Sequence[Found]) -> Counter[str]:
    """Of all ranks, by kind."""
    total: Counter[str] = Counter()
    for each in said:
        total.update(each)
    return total


def show_memory(where: str, rows: Sequence[tuple[int, Found, Found]]) -> tuple[float, float]:
    """A row a number of ranks; the ratios of the most ranks to one, trimmed and as it is."""
    print(f"{rows[0][1]['parameters'] / 1e9:.3f} G parameters, blocks at rest in {where}; "
          "growth in MB, all ranks together")  # fmt: skip
    print("| ranks | shared | private | views of the checkpoint | device's part | host's part | "
          "over one rank | host's part before malloc_trim | over one rank |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    first: tuple[float, ...] = ()
    ratios = (1.0, 1.0)
    for count, as_is, trimmed in rows:
        hosts = tuple(host_part(each) for each in (trimmed, as_is))
        first = first or hosts
        ratios = (hosts[0] / first[0], hosts[1] / first[1])
        kinds = [trimmed.get(key, 0) for key in ("shared", "private", "checkpoint", "device")]
        shown = " | ".join(f"{each / 1e6:,.1f}" for each in (*kinds, hosts[0]))
        print(f"| {count} | {shown} | {ratios[0]:.4f} | {hosts[1] / 1e6:,.1f} | {ratios[1]:.4f} |")
    return round(ratios[0], 4), round(ratios[1], 4)


def host_part(grown: Found) -> float:
    """All that a node's memory grew by, activations too, but for what would be on devices."""
    return sum(grown.get(kind, 0) for kind in ("shared", "private", "checkpoint")) - grown["device"]


class Processors:
    """Share of the processors' time that others took while something ran."""

    def __init__(self) -> None:
        self._wall = self._busy = 0.0
        self._cores = os.cpu_count() or 1

    @contextmanager
    def counted(self) -> Iterator[None]:
        wall, busy = time.perf_counter(), _busy_seconds()
        yield
        self._wall += time.perf_counter() - wall
        self._busy += _busy_seconds() - busy

    def shares(self, ours: float) -> tuple[float, float]:
        """Idle, and of others, if this much was ours."""
        whole = self._wall * self._cores
        return 1 - self._busy / whole, (self._busy - ours) / whole


def show_weak(
    times: Mapping[str, Times],
    said: Mapping[int, Sequence[Found]],
    processors: Mapping[int, Processors],
) -> Found:
    print("| ranks | step, ms | spread | over one rank | processor a rank, ms | over one rank "
          "| idle | other programs |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    used = {count: [each["processor"] for each in said[count]] for count in said}
    first = min(said)
    ratios = {str(count): round(times[str(count)].over(times[str(first)]), 3) for count in said}
    for count in said:
        each, processor = times[str(count)], median(used[count])
        idle, others = processors[count].shares(A_TURN * sum(used[count]))
        print(
            f"| {count} | {1e3 * each.median / A_TURN:.0f} | {each.spread:.0%} | "
            f"{ratios[str(count)]:.2f} | {1e3 * processor:.0f} | "
            f"{processor / median(used[first]):.2f} | {idle:.0%} | {others:.0%} |"
        )
    return {"weak_scaling_step_over_one_rank": ratios}


def turn(world: list[Program], said: list[Found], processors: Processors) -> None:
    """Some steps of one contestant; what its ranks say of them."""
    with processors.counted():
        said += ask_all(world, "steps", count=A_TURN)


def _busy_seconds() -> float:
    user, nice, system, _, _, *rest = Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
    return sum(map(int, (user, nice, system, *rest))) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--counted", type=int, default=200, help="steps whose bytes are counted")
    for name, shape in SHAPES.items():
        parser.add_argument(f"--{name}", type=int, nargs=3, default=shape, metavar=METAVAR)
    parser.add_argument("--tokens", type=int, nargs=2, default=(4, 64), metavar=("ROWS", "LENGTH"))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument(
        "--star", type=int, nargs="+", default=[2, 4, 16, 64, 256, 1024, 4096, 10_000]
    )
    parser.add_argument("--far", type=int, nargs="+", default=[2, 5, 17], help="with a delay")
    parser.add_argument("--delays", type=float, nargs="+", default=[0, 0.1, 1, 10, 100])
    parser.add_argument("--folder", type=Path, help="for models")
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    print(f"{platform.machine()}, kernel {platform.release()}, Python {platform.python_version()}, "
          f"torch {torch.__version__}, {len(os.sched_getaffinity(0))} cores")  # fmt: skip
    found: Found = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        bench = Bench(options, Path(folder))
        run = {"exchange": bench.exchange, "memory": bench.memory, "weak": bench.weak,
               "star": bench.stars, "nodes": bench.nodes}  # fmt: skip
        for part in options.parts:
            print(f"\n{part}")
            found |= run[part]()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
