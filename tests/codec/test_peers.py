"""Where a format is torchao's or bitsandbytes', so are the numbers."""

import pytest
import torch

from codec.peers import DECODED, GROUP, digest, values_for
from zo_offload.codec import codec_of


@pytest.mark.parametrize("name", DECODED)
def test_values_are_those_of_the_peer(name: str):
    values, _ = values_for(name)
    codec, count = codec_of(f"{name}:{GROUP}"), values.numel()
    packed = torch.empty(codec.capacity(count, torch.float32), dtype=torch.uint8)
    codec.encode(values.reshape(-1), packed)
    assert digest(codec.decode(packed, count, torch.float32)) == DECODED[name]
