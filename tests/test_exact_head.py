"""Logits in fp32 from a head of any dtype, with the weight converted part by part."""

import pytest
import torch
import torch.nn.functional as F
from temporaries import MostFp32
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

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


class Products(TorchDispatchMode):
    """Notes the operators by which matrices are multiplied, and what is converted."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in ("aten::mm", "aten::mm.dtype", "aten::mm.out", "aten::_to_copy"):
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tensor_cores_multiply_half_precision_as_it_is(dtype: torch.dtype):
    """Of tensors without values: no device is needed to see what would be run on it."""
    with FakeTensorMode(), torch.no_grad(), Products() as products:
        x = torch.empty(2, 5, 48, dtype=dtype, device="cuda")
        weight, bias = x.new_empty(1001, 48), x.new_empty(1001, dtype=torch.float32)
        out = exact_linear(x, weight, bias)
    assert (out.dtype, out.shape, out.device.type) == (torch.float32, (2, 5, 1001), "cuda")
    assert products.seen == ["aten::mm.dtype"]


def test_tensor_cores_are_not_asked_for_products_of_two_dtypes():
    with FakeTensorMode(), torch.no_grad(), Products() as products:
        x = torch.empty(2, 5, 48, device="cuda")
        out = exact_linear(x, x.new_empty(1001, 48, dtype=torch.bfloat16))
    assert (out.dtype, out.shape) == (torch.float32, (2, 5, 1001))
    assert "aten::mm.dtype" not in products.seen


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
