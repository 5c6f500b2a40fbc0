"""Digests: torch and C++ give the numbers of the reference."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zo_offload import ops
from zo_offload.ops import reference, torch_ops


@given(data=st.binary(max_size=400), first=st.integers(0, 2**40))
def test_torch_digests_as_the_reference(data: bytes, first: int):
    words = np.frombuffer(data[: len(data) // 4 * 4], np.uint32)
    found = torch_ops.digest(torch.from_numpy(words.copy()).view(torch.int32), first)
    assert found == reference.digest(words, first)


def test_a_bit_anywhere_changes_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch_ops, "CHUNK_ELEMENTS", 100)
    data = torch.arange(4000).to(torch.uint8)
    before = ops.digest(data)
    assert before == reference.digest(data.numpy().view(np.uint32))
    assert before == (ops.digest(data[:44]) + ops.digest(data[44:], 11)) % 2**64
    for place in (0, 1999, 3999):
        data[place] ^= 16
        assert ops.digest(data) != before
        data[place] ^= 16


def test_what_fills_no_word_is_filled_up_with_zeros():
    data = torch.arange(1, 12).to(torch.uint8)
    filled = torch.cat([data, torch.zeros(1, dtype=torch.uint8)])
    assert ops.digest(data) == ops.digest(filled)
    assert ops.digest(data[:2], 9) == reference.digest(np.array([0x0201], np.uint32), 9)
    assert ops.digest(data[:0]) == 0
