"""Logits of half-precision heads, whose sums tensor cores keep in fp32."""

import pytest
import torch

from zo_offload.exact_head import exact_linear

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [48, 1024])
def test_logits_are_those_in_float64(device: torch.device, dtype: torch.dtype, width: int):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, width, generator=generator).to(dtype)
    weight = torch.randn(1001, width, generator=generator).to(dtype)
    bias = torch.randn(1001, generator=generator)
    expected = x.double() @ weight.double().t() + bias.double()
    with torch.inference_mode():
        found = exact_linear(x.to(device), weight.to(device), bias.to(device))
    assert (found.dtype, found.device.type) == (torch.float32, device.type)
    # fp32 sums of so many products; one rounding to half precision would be a thousand times that.
    assert torch.allclose(found.double().cpu(), expected, rtol=0, atol=2e-6 * width)
