"""Units on disk: ours against plain system calls, on the same disk, in turns.

Ours writes and reads units through the store: a pool of threads around the page cache, every byte
counted and checked by a CRC-32C. Plain is one thread with ``os.pwritev`` and ``os.preadv`` around
the cache (as ``dd oflag=direct`` does), and the same through the cache, which is empty before a
read. Every write ends in a sync. The fastest that the disk was seen to do is what to compare with.

    python benchmarks/disk.py --directory /mnt/nvme [--mib 256] [--unit-mib 32] [--rounds 7]

The last line is JSON: speed ratios to the plain direct call, larger is better.
"""

import argparse
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from timing import alternating

from zo_offload.offload.aio import Aio
from zo_offload.offload.disk import aligned, allocate
from zo_offload.offload.folders import SPARES, create_store
from zo_offload.offload.nvme import UnitStore
from zo_offload.offload.slot import Identity, StoredUnit
from zo_offload.ops import kernels

BLOCK_BYTES = 1 << 20
IDENTITY = Identity("11" * 16, "22" * 32, "bf16")


class Ours:
    """Half of a unit is its wire, half its rest, as with fp32 masters."""

    def __init__(self, folder: Path, parts: list[tuple[torch.Tensor, torch.Tensor]], aio: Aio):
        units = [
            StoredUnit(i, f"unit {i}", wire.numel(), rest.numel(), "33" * 32)
            for i, (wire, rest) in enumerate(parts)
        ]
        create_store([folder], IDENTITY, units, aio)
        self.store, self.parts = UnitStore([folder], IDENTITY, units, aio), parts

    def write(self) -> None:
        futures = [self.store.write(i, *each, step=0) for i, each in enumerate(self.parts)]
        for future in futures:
            future.result()
        self.store.sync()

    def read(self) -> None:
        futures = [self.store.read(i, *each) for i, each in enumerate(self.parts)]
        for future in futures:
            future.result()


class Plain:
    """One thread, one call after the other, over as much of the disk as ours with its spares."""

    def __init__(self, path: Path, room: torch.Tensor, spare_bytes: int, is_direct: bool):
        self.views = [part.numpy().data for part in room.split(BLOCK_BYTES)]
        self.num_blocks, self.start = len(self.views) + spare_bytes // BLOCK_BYTES, 0
        allocate([path], self.num_blocks * BLOCK_BYTES)
        self.fd = os.open(path, os.O_RDWR | (os.O_DIRECT if is_direct else 0))

    def offset(self, block: int) -> int:
        return (self.start + block) % self.num_blocks * BLOCK_BYTES

    def write(self) -> None:
        self.start += len(self.views)
        for i, view in enumerate(self.views):
            assert os.pwritev(self.fd, [view], self.offset(i)) == len(view)
        os.fdatasync(self.fd)
        self.forget()

    def read(self) -> None:
        for i, view in enumerate(self.views):
            assert os.preadv(self.fd, [view], self.offset(i)) == len(view)
        self.forget()

    def forget(self) -> None:
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    room = aligned(options.mib << 20)
    room.copy_(torch.randint(0, 256, room.shape, dtype=torch.uint8))
    parts = [unit.chunk(2) for unit in room.split(options.unit_mib << 20)]
    aio = Aio(block_size=options.block_kib << 10, queue_depth=options.queue_depth)
    ours = Ours(folder / "ours", parts, aio)  # pyright: ignore[reportArgumentType]
    spare_bytes = SPARES * options.unit_mib << 20
    direct = Plain(folder / "direct", room, spare_bytes, is_direct=True)
    buffered = Plain(folder / "buffered", room, spare_bytes, is_direct=False)
    contestants: dict[str, Callable[[], object]] = {}
    for act in ("write", "read"):
        for name, each in {"ours": ours, "plain direct": direct, "buffered": buffered}.items():
            contestants[f"{act}, {name}"] = getattr(each, act)
    times = alternating(contestants, options.rounds, warm_up=2)  # all of the room was written once
    for name, each in times.items():
        speed = room.numel() / each.median / 1e6
        print(f"{name:20} {speed:8.0f} MB/s, spread {each.spread:.0%}")
    ours.store.close()
    return {
        f"{act}_vs_plain": round(times[f"{act}, plain direct"].over(times[f"{act}, ours"]), 3)
        for act in ("read", "write")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, help="on the disk to measure")
    parser.add_argument("--mib", type=int, default=256, help="bytes of all units, in 2^20")
    parser.add_argument("--unit-mib", type=int, default=32, help="bytes of one, in 2^20")
    parser.add_argument("--queue-depth", type=int, default=Aio().queue_depth)
    parser.add_argument("--block-kib", type=int, default=Aio().block_size >> 10)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="zo-offload-", dir=options.directory))
    print(
        f"{options.mib} MiB in units of {options.unit_mib} MiB, queue depth {options.queue_depth}, "
        f"transfers of {options.block_kib} KiB, {os.cpu_count()} cores, Linux "
        f"{platform.release()}, kernels: {kernels.name()}"
    )
    try:
        ratios = measure(folder, options)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
