"""Codes and scales: published tables, ties, groups that are zero, tiny, huge or broken."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

from codec.wires import packed, raw, wire_of
from zo_offload.codec import NAMES, codec_of, groups
from zo_offload.errors import CodecError, ConfigError
from zo_offload.ops.layout import LARGEST, NF4

GROUPED = tuple(LARGEST)


def decoded(name: str, values: torch.Tensor) -> torch.Tensor:
    out, used = packed(codec_of(name), values)
    return codec_of(name).decode(out[:used], len(values), values.dtype)


def test_nf4_is_made_as_published():
    """QLoRA's quantiles: eight below zero, seven above, and zero; scaled to the outermost."""
    normal, offset = NormalDist(), 0.9677083  # of the authors' published code
    above = [normal.inv_cdf(offset + i * (0.5 - offset) / 8) for i in range(8)]
    below = [normal.inv_cdf(offset + i * (0.5 - offset) / 7) for i in range(7)]
    made = sorted([x / above[0] for x in above] + [0.0] + [-x / above[0] for x in below])
    np.testing.assert_allclose(np.array(NF4), made, atol=2e-6)


def test_nf4_takes_the_nearest():
    ratio = np.linspace(-1, 1, 4096, dtype=np.float32)
    ratio[0], ratio[-1] = -1, 1
    found = decoded("nf4", torch.from_numpy(np.concatenate([ratio, [1.0] * 128]).astype("f")))
    distance = np.abs(ratio[:, None].astype(np.float64) - np.array(NF4))
    nearest = np.sort(distance, axis=1)[:, 0]
    scale = np.repeat(np.abs(ratio).reshape(-1, 128).max(1), 128)
    np.testing.assert_array_less(
        np.abs(found.numpy()[:4096] - ratio)[scale == 1], nearest[scale == 1] + 1e-6
    )


def test_fp8_codes_are_torchs():
    codes = np.arange(256, dtype=np.uint8)
    theirs = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(groups.FROM_CODE["fp8_e4m3"](codes), theirs)
    ratio = np.random.default_rng(0).uniform(-448, 448, 4000).astype(np.float32)
    middles = (theirs[1:127] + theirs[:126]) / 2
    every = np.concatenate([ratio, ratio * np.float32(1e-4), middles, -middles, theirs[:127]])
    to_torch = torch.from_numpy(every).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(groups.TO_CODE["fp8_e4m3"](every.astype(np.float32)), to_torch)


@pytest.mark.parametrize(("name", "qmax"), [("int8", 127), ("int4", 7)])
def test_integers_hold_their_steps_and_round_ties_to_even(name: str, qmax: int):
    values = torch.zeros(128)
    values[:6] = torch.tensor([qmax, -qmax, 0.5, 1.5, -2.5, 3.0])
    assert decoded(name, values)[:6].tolist() == [qmax, -qmax, 0, 2, -2, 3]


@pytest.mark.parametrize("name", GROUPED)
def test_no_magnitude_overflows(name: str):
    for absmax in (1e-45, 1e-44, 9.2e-41, 1.2e-38, 1.0, 3.3e38, 3.4028234663852886e38):
        values = torch.zeros(256)
        values[:128] = torch.linspace(-1, 1, 128) * absmax
        found = decoded(name, values)
        assert bool(found.isfinite().all())
        assert float((found.double() - values).abs().max()) <= codec_of(name).error_bound(absmax)
        assert bool(found[:128].any()) == (absmax > 1e-43)  # the least scale is 9e-41
        assert not raw(found)[128:].any()  # the next group is zero


@pytest.mark.parametrize("name", [*GROUPED, *(f"{name}:64" for name in GROUPED)])
def test_a_broken_group_is_nan_throughout_and_alone(name: str):
    group = codec_of(name).layout.group
    values = wire_of("normal", torch.float32, 384, 0)
    sound = decoded(name, values)
    for broken in (math.nan, math.inf, -math.inf):
        values[130] = broken
        found = decoded(name, values)
        assert set(raw(found[128 : 128 + group]).view(np.uint32).tolist()) == {0x7FC00000}
        np.testing.assert_array_equal(raw(found[:128]), raw(sound[:128]))
        np.testing.assert_array_equal(raw(found[128 + group :]), raw(sound[128 + group :]))


@pytest.mark.parametrize("name", GROUPED)
def test_any_bytes_mean_something(name: str):
    codec, elements = codec_of(name), 4096
    room = codec.capacity(elements, torch.float32)
    hostile = np.random.default_rng(0).integers(0, 256, room).astype(np.uint8)
    found = codec.decode(torch.from_numpy(hostile), elements, torch.float32)
    expected = groups.decode(codec.layout, hostile, elements)
    np.testing.assert_array_equal(raw(found), expected.view(np.int32))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "lossless12"])
def test_too_few_bytes_are_refused(name: str):
    codec = codec_of(name)
    out, used = packed(codec, torch.zeros(1280))
    with pytest.raises(CodecError, match="encode the weights again"):
        codec.decode(out[: used - 1], 1280, torch.float32)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int9", "unknown name 'int9'; did you mean 'int8'"),
        ("x", "valid keys: identity, bf16, fp16, lossless12"),
        ("int8:32", "a group is 64 or 128 elements, not '32'"),
        ("nf4:", "a group is 64 or 128 elements, not ''"),
        ("bf16:64", "bf16 has no groups; write 'bf16'"),
    ],
)
def test_a_name_that_is_none_is_refused(name: str, message: str):
    with pytest.raises(ConfigError, match=message):
        codec_of(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_lossless12_is_for_bfloat16(dtype: torch.dtype):
    codec = codec_of("lossless12")
    with pytest.raises(ConfigError, match=r"lossless12 packs bfloat16, not torch\.float"):
        codec.check(dtype)
    with pytest.raises(ConfigError, match="enable bf16"):
        codec.encode(torch.zeros(128, dtype=dtype), torch.empty(1024, dtype=torch.uint8))


def test_what_shrinks():
    found = {n: [codec_of(n).shrinks(d) for d in (torch.float32, torch.bfloat16)] for n in NAMES}
    assert found.pop("identity") == [False, False]
    assert found.pop("bf16") == found.pop("fp16") == [True, False]
    assert found.pop("lossless12") == [False, True]
    assert all(row == [True, True] for row in found.values())
