"""How far a decoded value may be from what was encoded: of the reference, whose bits all have."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.wires import TABLE, expected_values, wires
from zo_offload.codec import codec_of

ROWS = pytest.mark.parametrize(("name", "dtype"), TABLE, ids=lambda x: str(x).split(".")[-1])


@pytest.fixture(scope="module", autouse=True)
def implementation() -> None:
    """None is asked."""


@pytest.mark.parametrize("name", ["identity", "lossless12"])
def test_what_is_exact_says_so(name: str):
    assert codec_of(name).error_bound(3.0) == 0.0


@ROWS
@settings(max_examples=10)
@given(data=st.data())
def test_error_is_bounded(name: str, dtype: torch.dtype, data):
    wire, codec = data.draw(wires(dtype)), codec_of(name)
    group = codec.layout.group or 1
    before = wire.double().view(-1, group).numpy()
    after = torch.from_numpy(expected_values(name, wire)).double().view(-1, group).numpy()
    for values, decoded in zip(before, after, strict=True):
        if not np.isfinite(values).all():
            assert codec.layout.group == 0 or np.isnan(decoded).all()
            continue
        bound = codec.error_bound(float(np.abs(values).max()))
        assert bound == np.inf or np.abs(decoded - values).max() <= bound
