"""The output embedding's product in fp32, whatever the model computes in.

Logits rounded to bfloat16 carry four times the noise of the rest of a forward. CUDA's tensor cores
add the products of half-precision numbers in fp32 anyway, and may leave the sums as they are.
Elsewhere the weight is converted, a part of the vocabulary at a time: all of it in fp32 would be
gigabytes beside a large model, and on a CPU a part that stays in the cache is faster than a pass
over memory.
"""

import torch
import torch.nn.functional as F

CHUNK_BYTES = {"cpu": 4 << 20}
OTHER_CHUNK_BYTES = 64 << 20


def exact_linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``input @ weight.T + bias`` in fp32, also under autocast; named as ``F.linear`` is.

    Args:
        input: ``[..., width]``.
        weight: ``[vocabulary, width]``.
        bias: ``[vocabulary]``, or None.

    Returns:
        fp32 ``[..., vocabulary]``.

    Example:
        >>> x, weight = torch.ones(2, 3, 4).bfloat16(), torch.full((5, 4), 0.1).bfloat16()
        >>> exact_linear(x, weight).dtype, tuple(exact_linear(x, weight).shape)
        (torch.float32, (2, 3, 5))
    """
    with torch.autocast(input.device.type, enabled=False):
        if _sums_are_fp32(input, weight):
            out = torch.mm(input.reshape(-1, weight.shape[1]), weight.t(), out_dtype=torch.float32)
            return _with_bias(out, bias, input)
        x, bias = input.float(), None if bias is None else bias.float()
        count, width = weight.shape
        most = CHUNK_BYTES.get(x.device.type, OTHER_CHUNK_BYTES)
        rows = max(1, most // (4 * width))
        if weight.dtype == torch.float32 or rows >= count or torch.is_grad_enabled():
            return F.linear(x, weight.float(), bias)
        flat = x.reshape(-1, width)
        out = flat.new_empty(len(flat), count)
        for first in range(0, count, rows):
            part = weight[first : first + rows].float()
            torch.mm(flat, part.t(), out=out[:, first : first + len(part)])
            del part  # or two are there at once
        return _with_bias(out, bias, input)


def _sums_are_fp32(input: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether ``torch.mm`` gives an fp32 product of these as they are (it has no gradient)."""
    half = input.dtype == weight.dtype and weight.dtype in (torch.bfloat16, torch.float16)
    return half and input.device.type == "cuda" and not torch.is_grad_enabled()


def _with_bias(out: torch.Tensor, bias: torch.Tensor | None, input: torch.Tensor) -> torch.Tensor:
    if bias is not None:
        out += bias
    return out.view(*input.shape[:-1], out.shape[1])
