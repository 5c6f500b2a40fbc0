"""How long a step takes: the slowest of what happens at once, and 5 % for what does not overlap.

    seconds = 1.05 * max(compute, bus, disk, host kernel)

* compute: FLOPs over the device's rate, and 20 us a lane and unit for the handing-over. A forward
  is 2 FLOPs a parameter and token, and 2 L^2 times the heads' width for causal attention.
* bus: wire bytes of units that do not rest on the device, once a visit; where the device updates,
  whole masters as well, up and down at once, every ``lag`` steps.
* disk: wire bytes of units on disk once a visit, masters read and written every ``lag`` steps.
* host kernel: masters in host memory or on disk, read and written every ``lag`` steps.

A visit serves ``live_lanes`` forwards. Not counted: the device's own memory traffic while it
perturbs (a pass over the scratch for each probe and sign), which a GPU does at a terabyte a second.
"""

from dataclasses import dataclass

from zo_offload.plan.budget import Tiers
from zo_offload.plan.layout import Layout
from zo_offload.plan.request import Request

OVERHEAD = 1.05
HANDOFF_SECONDS = 20e-6


@dataclass(frozen=True)
class Rates:
    """What the machine does in a second.

    The defaults are assumed: a PCIe 4 card, four disks, and the update kernel on two cores.

    Attributes:
        pcie_gbps: Of the bus in one direction, in 10^9 bytes.
        nvme_gbps: Of the disks, reads and writes together.
        host_gbps: Of the host's update kernel, bytes of masters read and written.
        tflops: Of the device in matrix products, in 10^12.
    """

    pcie_gbps: float = 25.0
    nvme_gbps: float = 10.0
    host_gbps: float = 35.0
    tflops: float = 100.0


@dataclass(frozen=True)
class Step:
    """What a step moves and computes.

    Attributes:
        visits: Times that the weights pass the device.
        flops: Of all forwards.
        bus_up: Bytes to the device.
        bus_down: Bytes from it.
        disk_read: Bytes.
        disk_written: Bytes.
        host_kernel: Bytes of masters that the host reads and writes.
        seconds: By what takes them.
    """

    visits: int
    flops: float
    bus_up: float
    bus_down: float
    disk_read: float
    disk_written: float
    host_kernel: float
    seconds: dict[str, float]

    @property
    def step_seconds(self) -> float:
        """Of a whole step."""
        return OVERHEAD * max(self.seconds.values())

    @property
    def bound_by(self) -> str:
        """``compute``, ``bus``, ``disk`` or ``host``."""
        return max(self.seconds, key=self.seconds.__getitem__)


def step_of(layout: Layout, request: Request, tiers: Tiers, rates: Rates) -> Step:
    """Traffic and time of a step; masters are spread over the steps between their moves."""
    on_device, in_memory, _ = tiers.residents
    sizes, below = tiers.sizes, on_device + in_memory
    visits = -(-request.lanes // min(request.live_lanes or request.lanes, request.lanes))
    every = max(1, request.lag, layout.interval)
    device_updates = request.where == "device"
    travels = float(sizes.travels(device_updates)[on_device:].sum())
    moving = sizes.moving[1:]
    moved = float(moving[on_device:].sum()) / every
    written = (sizes.wire + sizes.rest) * (moving > 0)  # whole units
    on_disk = float(written[below:].sum()) / every
    rest = float((sizes.rest[on_device:]).sum()) / every
    up = visits * travels + (rest if device_updates else 0.0)
    down = moved if device_updates else 0.0
    read = visits * float(sizes.wire[below:].sum()) + float(sizes.rest[below:].sum()) / every
    kernel = 0.0 if device_updates else 2 * moved
    if on_device < len(layout.names):
        kernel += 2.0 * float(sizes.moving[0])
    flops = flops_of(layout, request)
    handoffs = HANDOFF_SECONDS * request.lanes * len(layout.names)
    seconds = {
        "compute": flops / (rates.tflops * 1e12) + handoffs,
        "bus": max(up, down) / (rates.pcie_gbps * 1e9),
        "disk": (read + on_disk) / (rates.nvme_gbps * 1e9),
        "host": kernel / (rates.host_gbps * 1e9),
    }
    return Step(visits, flops, up, down, read, on_disk, kernel, seconds)


def flops_of(layout: Layout, request: Request) -> float:
    """Of a step's forwards."""
    dims = layout.dims
    attention = 2.0 * request.batch_size * request.length**2 * dims.attention
    return request.lanes * (2.0 * dims.active * request.tokens + attention)
