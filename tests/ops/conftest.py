"""Every test of kernels runs once with each implementation that is at hand."""

from collections.abc import Iterator

import pytest

from zo_offload.errors import KernelError
from zo_offload.ops import kernels, native


def _implementations() -> list[str]:
    try:
        return [kernels.TORCH, *native.available()]
    except KernelError:  # not built: test_native.py says so
        return [kernels.TORCH]


IMPLEMENTATIONS = _implementations()


@pytest.fixture(scope="module", params=IMPLEMENTATIONS, autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.using(request.param):
        yield request.param
