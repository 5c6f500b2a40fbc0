"""Every test of codecs runs once with each implementation that is at hand, unless it says not."""

from collections.abc import Iterator

import pytest
from ops.conftest import IMPLEMENTATIONS

from zo_offload.ops import kernels


@pytest.fixture(scope="module", params=IMPLEMENTATIONS, autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.using(request.param):
        yield request.param
