"""A small run for compute-sanitizer: every direction of the bus, both kinds of kernels."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from gpu.common import IMPLEMENTATIONS, assert_equal, net, offloaded, served_by, trained, vectors


def main(where: str) -> None:
    device, batch = torch.device(where), vectors(2, torch.bfloat16)
    # Interpreted, Triton's serve one thread at a time.
    for implementation in IMPLEMENTATIONS if device.type == "cuda" else ("torch",):
        with served_by(implementation, device):
            right = trained(net(3), device, batch, steps=2)
            for place in ("host", "device"):
                block = {**offloaded("cpu"), "update": {"where": place}}
                assert_equal(trained(net(3), device, batch, steps=2, **block), right)
    print("the same bits")


if __name__ == "__main__":
    main(sys.argv[1])
