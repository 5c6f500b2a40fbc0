"""The machine that a GPU benchmark runs on: what it is, what it does in a second, what is held.

Rates are ceilings, measured in the same run as the steps that are held against them. What only a
CUDA device has is None on any other.
"""

import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from zo_offload.doctor import rates
from zo_offload.ops import kernels, layout_of, pack

COPIED_BYTES = 1 << 30
TRIES = 7
PACKED_ELEMENTS = 32 << 20
INTERVAL = 0.05  # seconds between two looks at the memory
PACKAGES = ("torch", "triton", "transformers", "deepspeed", "peft", "zo_offload")
KINDS = {"anonymous": "RssAnon", "files": "RssFile", "shared": "RssShmem"}


def machine(device: torch.device) -> dict[str, Any]:
    """Names, sizes and versions."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "device_bytes": room(device)[1],
        "driver": _driver() if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "host_bytes": psutil.virtual_memory().total,
        "kernels": kernels.name(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def room(device: torch.device) -> tuple[int | None, int | None]:
    """Free and total bytes of the device."""
    if device.type != "cuda":
        return None, None
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)


def measured(device: torch.device, codecs: list[str], small: bool) -> dict[str, Any]:
    """What the machine does in a second: 10^9 bytes, 10^9 weights, 10^12 FLOPs.

    Args:
        device: Where forwards run.
        codecs: By which weights are packed on the host.
        small: Only to see that it works: the figures mean nothing.
    """
    cuda = device.type == "cuda"
    count = COPIED_BYTES >> (8 if small else 0)
    up, down, both = bus(device, count) if cuda else (None, None, None)
    elements = PACKED_ELEMENTS >> (8 if small else 0)
    return {
        "bus_up_gbps": up,
        "bus_down_gbps": down,
        "bus_both_gbps": both,
        "host_update_gbps": None if small else rates.updating(),
        "host_copy_gbps": None if small else rates.copying(),
        "pack_gweights": {codec: packing(codec, elements) for codec in codecs},
        "tflops": rates.multiplying() if cuda else None,
    }


def bus(device: torch.device, count: int) -> tuple[float, float, float]:
    """10^9 bytes a second from and to page-locked memory; up, down, and both ways at once in all.

    Medians of plain copies of one piece.
    """
    near, there = (torch.ones(count, dtype=torch.uint8, device=device) for _ in range(2))
    home, away = (torch.ones(count, dtype=torch.uint8, pin_memory=True) for _ in range(2))
    other = torch.cuda.Stream(device)

    def up() -> None:
        near.copy_(home, non_blocking=True)

    def down() -> None:
        away.copy_(there, non_blocking=True)

    def both() -> None:
        up()
        with torch.cuda.stream(other):
            down()

    def rate(work: Callable[[], None], moved: int) -> float:
        return moved / median(_seconds(device, work) for _ in range(TRIES)) / 1e9

    return rate(up, count), rate(down, count), rate(both, 2 * count)


def packing(codec: str, elements: int) -> float:
    """10^9 weights in bfloat16 that the host packs in a second."""
    layout = layout_of(codec)
    wire = (0.02 * torch.randn(elements, generator=torch.Generator())).to(torch.bfloat16)
    packed = torch.zeros(layout.capacity(elements, wire.dtype), dtype=torch.uint8)
    return elements / rates.least(lambda: pack(layout, wire, packed)) / 1e9


def synchronize(device: torch.device) -> None:
    """Until the device has done all that it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Held:
    """Most bytes of host memory that were seen.

    Attributes:
        resident: Of this process, by kind, at their largest.
        whole: All kinds together.
        system: Of all processes and the system, beyond what was held at first; memory that is
            page-locked for a device is in it, and may be in no process's count.
    """

    resident: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    whole: int = 0
    system: int = 0

    def look(self, available: int) -> None:
        """Once; ``available`` is what the system had at first."""
        found = _resident()
        self.resident = {kind: max(found[kind], most) for kind, most in self.resident.items()}
        self.whole = max(self.whole, sum(found.values()))
        self.system = max(self.system, available - psutil.virtual_memory().available)

    def as_json(self) -> dict[str, int]:
        """With pinned memory, where torch counts it."""
        return {**self.resident, "process": self.whole, "system": self.system, **_pinned()}


@contextmanager
def watched() -> Iterator[Held]:
    """Note the most memory that is held meanwhile."""
    held, ended = Held(), threading.Event()
    available = psutil.virtual_memory().available

    def look() -> None:
        held.look(available)
        while not ended.wait(INTERVAL):
            held.look(available)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield held
    finally:
        ended.set()
        thread.join()


def _seconds(device: torch.device, work: Callable[[], None]) -> float:
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _resident() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    return {kind: 1024 * int(found.get(name, 0)) for kind, name in KINDS.items()}


def _pinned() -> dict[str, int]:
    if not torch.cuda.is_available():
        return {}
    counted: Any = getattr(torch.cuda, "host_memory_stats", dict)()
    found = counted.get("allocated_bytes.peak")
    return {} if found is None else {"pinned_by_torch": int(found)}


def _driver() -> str | None:
    path = Path("/proc/driver/nvidia/version")
    return path.read_text().split("\n")[0] if path.is_file() else None


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
