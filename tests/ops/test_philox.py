"""Philox4x32-10 against published vectors, and far out where counters grow long."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ops.spans import seeds
from zo_offload import ops
from zo_offload.ops import Draw, Segment, Span, reference, torch_ops

# Random123 1.14, tests/kat_vectors: counter, key, words.
KNOWN_ANSWERS = {
    "zeros": ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
}


def hexadecimal(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def torch_words(counter: list[int], seed: int) -> torch.Tensor:
    block, parameter, step, last = counter
    draw = Draw(seed, step, last & 0xFFFF, 1.0)
    return torch_ops._philox(torch.tensor([block]), parameter, draw, last >> 16)


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_reference_gives_the_published_words(name: str):
    counter, key, words = map(hexadecimal, KNOWN_ANSWERS[name])
    found = reference.philox4x32(np.array([counter], np.uint32), key[0] | key[1] << 32)
    assert found[0].tolist() == words


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_torch_gives_the_published_words(name: str):
    counter, key, words = map(hexadecimal, KNOWN_ANSWERS[name])
    found = torch_words(counter, key[0] | key[1] << 32)
    assert (found[0].long() & 0xFFFFFFFF).tolist() == words


@given(counter=st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=4), seed=seeds)
def test_torch_equals_reference_on_any_counter(counter: list[int], seed: int):
    expected = reference.philox4x32(np.array([counter], np.uint32), seed)
    np.testing.assert_array_equal(torch_words(counter, seed).numpy().view(np.uint32), expected)


def test_counter_is_block_parameter_step_probe_and_stream():
    (block, parameter, step, last), key, words = map(hexadecimal, KNOWN_ANSWERS["pi"])
    seed, probe, stream = key[0] | key[1] << 32, last & 0xFFFF, last >> 16
    found = reference.words(seed, step, probe, stream, parameter, block, 1)
    assert found[0].tolist() == words


def test_elements_take_the_bits_of_the_design():
    """Element e is bit e % 32 of word e // 32; a gaussian one, the low 12 bits of lane e."""
    span, draw = Span(torch.float32, (Segment("w", 0, (128,), 0),), 0, 0), Draw(0, 0, 0, 1.0)
    words = hexadecimal(KNOWN_ANSWERS["zeros"][2])
    signs = [-1.0 if words[e // 32] >> e % 32 & 1 else 1.0 for e in range(128)]
    assert ops.noise(span, "rademacher", draw).tolist() == signs
    cells = [words[e // 2] >> 16 * (e % 2) & 0xFFF for e in range(8)]
    expected = reference.gaussian_cells().astype(np.float32)[cells]
    assert ops.noise(span, "gaussian", draw)[:8].tolist() == expected.tolist()


def test_halves_and_words_are_taken_low_first():
    words = np.array([[0x22221111, 0x44443333, 0x66665555, 0x88887777]], np.uint32)
    expected = [0x1111 * lane for lane in range(1, 9)]
    assert reference.halves(words).tolist() == expected
    found = torch_ops._halves(torch.from_numpy(words.view(np.int32)), -1)
    assert (found.int() & 0xFFFF).tolist() == expected
