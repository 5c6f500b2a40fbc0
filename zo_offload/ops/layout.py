"""How a codec lays a span's elements out in bytes: names, numbers and sizes, no values.

A packed span is a run of bytes whose sections begin on multiples of 64 and are padded with zeros.
What the bytes mean is in ``docs/codecs.md``.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from zo_offload.errors import CodecError, ConfigError
from zo_offload.wording import hint

# The numbers by which compiled kernels know these; they are in csrc/kernels.h as well.
CODECS = {
    "identity": 0,
    "bf16": 1,
    "fp16": 2,
    "lossless12": 3,
    "fp8_e4m3": 4,
    "int8": 5,
    "int4": 6,
    "nf4": 7,
}
FORWARDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CODE_BITS = {"fp8_e4m3": 8, "int8": 8, "int4": 4, "nf4": 4}  # of those with group scales
GROUPS = (64, 128)
BLOCK = 128  # elements; four-bit codes lie as 64 low halves, then 64 high halves
HEADER_BYTES = 64  # of lossless12
LARGEST = {"fp8_e4m3": 448.0, "int8": 127.0, "int4": 7.0, "nf4": 1.0}  # a code's value
# QLoRA's appendix E, as fp32 holds it: of each code.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Bits of bfloat16: the largest scale whose products with codes are finite, and a broken group's.
LARGEST_SCALE = {"fp8_e4m3": 0x7B12, "int8": 0x7C01, "int4": 0x7E12, "nf4": 0x7F7F}
NAN_SCALE = 0x7FC0


@dataclass(frozen=True, slots=True)
class Layout:
    """A codec with its parameter.

    Attributes:
        kind: A key of ``CODECS``.
        group: Elements that share a scale, 64 or 128; 0 where nothing has a scale.
    """

    kind: str
    group: int = 0

    @property
    def name(self) -> str:
        """As :func:`layout_of` reads it."""
        return f"{self.kind}:{self.group}" if self.group == 64 else self.kind

    def capacity(self, elements: int, dtype: torch.dtype) -> int:
        """The most bytes that a packed span can take, a multiple of 64.

        Args:
            elements: Of the span, a multiple of 128.
            dtype: What the forward computes in.

        Example:
            >>> layout_of("int4").capacity(1 << 20, torch.bfloat16) / (1 << 20)
            0.515625
        """
        assert elements % BLOCK == 0, elements
        if self.kind == "identity":
            return elements * dtype.itemsize
        if self.kind == "lossless12":
            return HEADER_BYTES + 2 * elements
        if self.group:
            return self.scales_at(elements) + padded(elements // self.group * 2)
        return 2 * elements

    def scales_at(self, elements: int) -> int:
        """Where the group scales begin: after the codes."""
        return elements * CODE_BITS[self.kind] // 8

    def refuse_short(self, packed: torch.Tensor, elements: int, dtype: torch.dtype) -> None:
        """Check the length of what is to be decoded; lossless12 states its own in its header.

        Raises:
            CodecError: Too few bytes.
        """
        least = HEADER_BYTES if self.kind == "lossless12" else self.capacity(elements, dtype)
        if packed.nbytes < least:
            raise CodecError(
                f"{self.name}: {packed.nbytes} bytes for {elements} elements, expected {least}; "
                "encode the weights again"
            )


@lru_cache(maxsize=64)
def layout_of(name: str) -> Layout:
    """Read a codec's name: ``int8``, or with its group ``int8:64``.

    Raises:
        ConfigError: No such codec or group.

    Example:
        >>> layout_of("nf4:64")
        Layout(kind='nf4', group=64)
        >>> layout_of("int8").name
        'int8'
    """
    kind, colon, group = name.partition(":")
    if kind not in CODECS:
        raise ConfigError(f"codec: unknown name {kind!r}; {hint(kind, CODECS)}")
    if kind not in CODE_BITS:
        if colon:
            raise ConfigError(f"codec: {kind} has no groups; write {kind!r} instead of {name!r}")
        return Layout(kind)
    if colon and group not in map(str, GROUPS):
        raise ConfigError(
            f"codec: {name!r}: a group is 64 or 128 elements, not {group!r}; write one of the two"
        )
    return Layout(kind, int(group) if colon else 128)


def padded(count: int) -> int:
    """Bytes up to the next multiple of 64."""
    return -(-count // 64) * 64
