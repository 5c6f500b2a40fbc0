"""Logits in fp32 from a head of any dtype, with the weight converted part by part."""

import pytest
import torch
import torch.nn.functional as F
from temporaries import MostFp32

from zo_offload import exact_head
from zo_offload.exact_head import exact_linear


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 48, generator=generator).to(dtype)
    weight = torch.randn(1001, 48, generator=generator).to(dtype)
    return x, weight, torch.randn(1001, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 100, 1000, 1001, 5000])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_the_product_in_float64(monkeypatch, dtype, rows: int, with_bias: bool):
    x, weight, bias = inputs(dtype)
    monkeypatch.setitem(exact_head.CHUNK_BYTES, "cpu", rows * 4 * 48)
    with torch.inference_mode():
        found = exact_linear(input=x, weight=weight, bias=bias if with_bias else None)
    expected = x.double() @ weight.double().t() + (bias.double() if with_bias else 0)
    assert found.dtype == torch.float32
    assert found.shape == (2, 5, 1001)
    assert torch.allclose(found.double(), expected, rtol=0, atol=2e-5)


def test_one_part_of_the_weight_is_there_at_once(monkeypatch: pytest.MonkeyPatch):
    x, weight, _ = inputs(torch.bfloat16)
    monkeypatch.setitem(exact_head.CHUNK_BYTES, "cpu", 100 * 4 * 48)
    with torch.inference_mode(), MostFp32() as seen:
        out = exact_linear(x, weight)
    assert out.numel() < seen.most <= out.numel() + x.numel() + 100 * 48


def test_autocast_does_not_round_it():
    x, weight, bias = inputs(torch.float32)
    with torch.inference_mode():
        expected = F.linear(x, weight, bias)
        with torch.autocast("cpu", torch.bfloat16):
            assert F.linear(x, weight, bias).dtype == torch.bfloat16
            assert torch.equal(exact_linear(x, weight, bias), expected)


def test_gradients_flow_where_they_are_wanted():
    x, weight, bias = inputs(torch.bfloat16)
    x.requires_grad_()
    exact_linear(x, weight, bias).sum().backward()
    assert x.grad is not None


def test_the_same_bits_each_time():
    x, weight, bias = inputs(torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(exact_linear(x, weight, bias), exact_linear(x, weight, bias))
