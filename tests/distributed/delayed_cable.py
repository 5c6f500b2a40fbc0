"""A cable between the networks of two processes on which every packet takes its time.

python delayed_cable.py MILLISECONDS PID PID

For hosts whose kernel has no netem. Two TAP devices, ``eth0`` in either network; what one sends,
the other receives after the delay. Says ``ready``, and ends when its standard input does.
"""

import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque

TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
LONGEST_FRAME = 65536


def plug_in(pid: str) -> int:
    """A new ``eth0`` in the network of a process; returns the file that stands for it."""
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    request = struct.pack("16sH", b"", IFF_TAP | IFF_NO_PI).ljust(40, b"\0")
    name = fcntl.ioctl(end, TUNSETIFF, request)[:16].rstrip(b"\0").decode()
    subprocess.run(["ip", "link", "set", name, "netns", pid, "name", "eth0"], check=True)
    return end


def carry(ends: tuple[int, int], seconds: float) -> None:
    """Forward frames until standard input ends."""
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    under_way: deque[tuple[float, int, bytes]] = deque()  # one delay for all: due in this order
    told = sys.stdin.fileno()
    while True:
        left = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        readable, _, _ = select.select([*ends, told], [], [], left)
        if told in readable:
            return
        for end in readable:
            frame = os.read(end, LONGEST_FRAME)
            under_way.append((time.monotonic() + seconds, other[end], frame))
        while under_way and under_way[0][0] <= time.monotonic():
            _, end, frame = under_way.popleft()
            os.write(end, frame)


def main(milliseconds: str, *pids: str) -> None:
    first, second = (plug_in(pid) for pid in pids)
    print("ready", flush=True)
    carry((first, second), float(milliseconds) / 1000)


if __name__ == "__main__":
    main(*sys.argv[1:])
