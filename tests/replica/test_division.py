"""Ranks that cannot be divided as the JSON says."""

import pytest

from zo_offload.errors import ConfigError
from zo_offload.replica.division import Division


def test_ranks_that_do_not_come_out_even():
    words = r"^zeroth_order.replica.probe_parallel: 2 ranks share .*, and 3 ranks do not come out"
    with pytest.raises(ConfigError, match=words):
        Division(rank=0, world_size=3, probe_parallel=2)
