"""lossless12: exact whatever it is given, and never longer than raw; damage is found."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from codec.wires import expected_bytes, packed, raw, wire_of
from zo_offload.codec import codec_of, reference
from zo_offload.errors import CodecError
from zo_offload.ops import Draw, kernels
from zo_offload.ops.lossless12 import HEADER, HEADER_BYTES, PACKED, RAW, sections

CODEC = codec_of("lossless12")
BF16 = torch.bfloat16


def of_exponents(exponents: np.ndarray, seed: int = 0) -> torch.Tensor:
    rest = np.random.default_rng(seed).integers(0, 1 << 16, len(exponents)).astype(np.uint16)
    bits = rest & np.uint16(0x807F) | exponents.astype(np.uint16) << np.uint16(7)
    return torch.from_numpy(bits.view(np.int16)).view(BF16)


def mode(out: torch.Tensor) -> int:
    return int(out[:HEADER_BYTES].numpy().view(HEADER)["mode"][0])


def assert_exact(wire: torch.Tensor, expected_mode: int | None = None) -> None:
    out, used = packed(CODEC, wire)
    np.testing.assert_array_equal(out[:used].numpy(), expected_bytes("lossless12", wire))
    assert expected_mode is None or mode(out) == expected_mode
    found = CODEC.decode(out[:used], len(wire), BF16)
    np.testing.assert_array_equal(raw(found) >> 16, raw(wire))


_runs = st.lists(st.tuples(st.integers(0, 255), st.integers(1, 1500)), min_size=1, max_size=12)


@settings(max_examples=25)
@given(runs=_runs)
@example(runs=[(0, 1024), (255, 1)])
@example(runs=[(14, 1024), (255, 1023), (0, 1)])
def test_runs_of_any_exponents(runs):
    exponents = np.concatenate([np.full(count, value) for value, count in runs])
    short = -len(exponents) % 128
    assert_exact(of_exponents(np.concatenate([exponents, np.full(short, runs[-1][0])])))


@pytest.mark.parametrize("base", [0, 1, 100, 241])
def test_all_fifteen_codes_and_no_escape(base: int):
    assert_exact(of_exponents(base + np.arange(2048) % 15), PACKED)


@pytest.mark.parametrize("at", [[0], [2047], [1023, 1024], range(1024, 1152), range(0, 2048, 8)])
def test_escapes_anywhere(at):
    for escape in (0, 99, 115, 255):
        exponents = 100 + np.arange(2176) % 15
        exponents[list(at)] = escape
        assert_exact(of_exponents(exponents), PACKED)


def test_what_would_not_shrink_stays_raw():
    random = np.random.default_rng(0)
    assert_exact(of_exponents(random.integers(0, 256, 4096)), RAW)
    assert_exact(of_exponents(np.full(128, 120)), RAW)  # shorter than a table
    assert_exact(of_exponents(np.where(np.arange(4096) % 2, 0, 255)), RAW)


def test_a_stretch_may_begin_inside_a_tile():
    exponents = 100 + np.arange(4096) % 15
    exponents[::7] = 3
    wire = of_exponents(exponents)
    out, _ = packed(CODEC, wire)
    for first in range(0, 4096, 128):
        found = CODEC.decode(out, len(wire), BF16, first, min(640, 4096 - first))
        np.testing.assert_array_equal(raw(found) >> 16, raw(wire)[first : first + len(found)])


# -- damage --

WIRE = of_exponents(np.where(np.arange(4224) % 50, 100 + np.arange(4224) % 15, 200))
PLACE = sections(len(WIRE), int((np.arange(4224) % 50 == 0).sum()))


def sound() -> torch.Tensor:
    out, used = packed(CODEC, WIRE)
    assert used == PLACE.end
    return out[:used].clone()


def refused(damaged: torch.Tensor, elements: int = len(WIRE)) -> None:
    for take in (CODEC.decode, CODEC.look):
        with pytest.raises(CodecError, match="encode the weights again"):
            take(damaged, elements, BF16)
    with pytest.raises(CodecError, match=r"^lossless12: damaged: .*; encode the weights again$"):
        reference.decode(CODEC.layout, damaged.numpy(), elements, np.uint16)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("magic", b"ZL13"),
        ("version", 2),
        ("mode", 2),
        ("mode", RAW),
        ("top", 13),
        ("elements", len(WIRE) - 128),
        ("elements", 2**63),
        ("escapes", 0),
        ("escapes", 2**64 - 1),
        ("escapes", len(WIRE)),
        ("bytes", 64),
        ("bytes", 2**64 - 64),
    ],
)
def test_a_wrong_header_is_refused(field: str, value):
    out = sound()
    out[:HEADER_BYTES].numpy().view(HEADER)[field] = value
    refused(out)


@pytest.mark.parametrize("length", [0, 63, 64, 128, PLACE.escapes, PLACE.end - 64])
def test_too_few_bytes_are_refused(length: int):
    refused(sound()[:length])


@pytest.mark.parametrize("elements", [128, len(WIRE) - 128, len(WIRE) + 128])
def test_another_number_of_elements_is_refused(elements: int):
    refused(sound(), elements)


@pytest.mark.parametrize("entry", range(PLACE.tiles + 1))
def test_a_wrong_table_is_refused(entry: int):
    out = sound()
    table = out[HEADER_BYTES : HEADER_BYTES + 4 * (PLACE.tiles + 1)].numpy().view(np.uint32)
    right = int(table[entry])
    for value in {0, 1, right + 1, 2**31, 2**32 - 1} - {right}:
        table[entry] = value
        refused(out)


def test_the_whole_table_moved_is_refused():
    out = sound()
    table = out[HEADER_BYTES : HEADER_BYTES + 4 * (PLACE.tiles + 1)].numpy().view(np.uint32)
    table += 1000
    refused(out)


def test_an_escape_too_many_is_refused():
    out = sound()
    out[PLACE.codes + 3] = 0xFF
    refused(out)


def outcome(buffer: torch.Tensor, length: int) -> np.ndarray | None:
    try:
        return raw(CODEC.decode(buffer[:length], len(WIRE), BF16))
    except CodecError:
        return None


@settings(max_examples=40)
@given(
    flips=st.lists(st.tuples(st.integers(0, PLACE.end - 1), st.integers(1, 255)), max_size=4),
    near=st.integers(0, HEADER_BYTES + 4 * PLACE.tiles + 3),
    change=st.integers(1, 255),
)
def test_any_damage_is_refused_or_decodes_from_the_bytes_alone(flips, near: int, change: int):
    out = torch.cat([sound(), torch.zeros(1 << 16, dtype=torch.uint8)])
    for at, by in [*flips, (near, change)]:
        out[at] ^= by
    found = outcome(out, PLACE.end)
    out[PLACE.end :] = 0xFF  # what lies behind them
    again = outcome(out, PLACE.end)
    with kernels.using("torch"):
        torchs = outcome(out, PLACE.end)
    for other in (again, torchs):
        assert (found is None) == (other is None)
        if found is not None and other is not None:
            np.testing.assert_array_equal(found, other)


def test_perturbing_damaged_bytes_is_refused():
    from ops.spans import span_of

    span = span_of([(len(WIRE),)], dtype=BF16, codec="lossless12")
    copy = torch.empty(len(WIRE), dtype=BF16)
    for damaged in (sound()[:100], sound()):
        damaged[-1 if len(damaged) < 200 else HEADER_BYTES + 4] ^= 1
        with pytest.raises(CodecError, match="encode the weights again"):
            kernels.perturb(span, damaged, copy, "rademacher", Draw(1, 2, 0, 1e-3))


def test_normal_weights_take_a_byte_and_a_half():
    wire = wire_of("normal", BF16, 1 << 17, 0)
    out, used = packed(CODEC, wire)
    assert mode(out) == PACKED
    assert used / len(wire) <= 1.51
