"""A codec: how a span's wire elements are packed for the bus, and what the bytes mean.

Encoding is a pure function of the elements: scales and codes are found anew each time, so nothing
but the weights decides a bit. The forward sees ``decode(encode(wire))`` wherever the weights rest.
"""

from dataclasses import dataclass

import torch

from zo_offload.codec import groups, plain
from zo_offload.errors import ConfigError
from zo_offload.ops import kernels
from zo_offload.ops.layout import CODECS, Layout, layout_of

NAMES = tuple(CODECS)


@dataclass(frozen=True, slots=True)
class Codec:
    """One way of packing; made by :func:`codec_of`.

    Attributes:
        layout: Kind and group.
    """

    layout: Layout

    @property
    def name(self) -> str:
        """As :func:`codec_of` reads it."""
        return self.layout.name

    def capacity(self, elements: int, dtype: torch.dtype) -> int:
        """The most bytes that ``elements`` (a multiple of 128) can take; a multiple of 64."""
        return self.layout.capacity(elements, dtype)

    def shrinks(self, dtype: torch.dtype) -> bool:
        """Whether weights of this dtype usually take fewer bytes packed."""
        if self.layout.kind == "lossless12":
            return dtype == torch.bfloat16
        elements = 1 << 20  # long enough for padding not to count
        return self.capacity(elements, dtype) < elements * dtype.itemsize

    def check(self, dtype: torch.dtype) -> None:
        """Refuse a forward that the codec cannot serve.

        Raises:
            ConfigError: ``lossless12``, and a forward that is not bfloat16.
        """
        if self.layout.kind == "lossless12" and dtype != torch.bfloat16:
            raise ConfigError(
                f"codec: lossless12 packs bfloat16, not {dtype}; enable bf16, or choose 'identity'"
            )

    def error_bound(self, absmax: float) -> float:
        """The most that decoding can differ from a value.

        Args:
            absmax: The largest magnitude in the value's group; without groups, its own. Finite.

        Returns:
            The bound; infinite where such a magnitude may overflow.
        """
        if self.layout.group:
            return groups.error_bound(self.layout.kind, absmax)
        return plain.error_bound(self.layout.kind, absmax)

    def encode(self, wire: torch.Tensor, out: torch.Tensor) -> int:
        """Pack a span.

        Args:
            wire: ``[elements]``, a multiple of 128, in the forward's dtype.
            out: uint8, :meth:`capacity` bytes or more, on the same device; it begins on a
                multiple of 4.

        Returns:
            Bytes used, a multiple of 64.

        Raises:
            ConfigError: See :meth:`check`.

        Example:
            >>> codec, wire = codec_of("int8"), torch.linspace(-1, 1, 128)
            >>> out = torch.empty(codec.capacity(128, wire.dtype), dtype=torch.uint8)
            >>> codec.encode(wire, out)
            192
            >>> values = codec.decode(out, 128, wire.dtype)
            >>> bool((values - wire).abs().max() <= codec.error_bound(1.0))
            True
        """
        self.check(wire.dtype)
        return kernels.pack(self.layout, wire, out)

    def decode(
        self,
        packed: torch.Tensor,
        elements: int,
        dtype: torch.dtype,
        first: int = 0,
        count: int | None = None,
    ) -> torch.Tensor:
        """What a stretch of a packed span means.

        Args:
            packed: uint8, what :meth:`encode` wrote, or more.
            elements: Of the whole span.
            dtype: What the forward computes in.
            first: Element that the stretch begins at, a multiple of 128.
            count: Its elements, a multiple of 128 (default: to the end).

        Returns:
            ``[count]`` fp32.

        Raises:
            CodecError: The bytes are too few, or damaged.
            ConfigError: See :meth:`check`.
        """
        return self._decoded(packed, elements, dtype, first, count, torch.float32)

    def look(
        self,
        packed: torch.Tensor,
        elements: int,
        dtype: torch.dtype,
        first: int = 0,
        count: int | None = None,
    ) -> torch.Tensor:
        """As :meth:`decode`, rounded to the forward's dtype: what an unperturbed forward sees."""
        return self._decoded(packed, elements, dtype, first, count, dtype)

    def _decoded(
        self,
        packed: torch.Tensor,
        elements: int,
        dtype: torch.dtype,
        first: int,
        count: int | None,
        result: torch.dtype,
    ) -> torch.Tensor:
        self.check(dtype)
        count = elements - first if count is None else count
        out = torch.empty(count, dtype=result, device=packed.device)
        kernels.unpack(self.layout, packed, elements, dtype, out, first)
        return out


def codec_of(name: str) -> Codec:
    """The codec of a name: one of ``NAMES``; those with scales may state a group, ``nf4:64``.

    Raises:
        ConfigError: No such name, with the nearest that there is; or no such group.

    Example:
        >>> codec_of("nf4").capacity(1 << 20, torch.bfloat16) / 2**20
        0.515625
        >>> codec_of("nf5")
        Traceback (most recent call last):
        zo_offload.errors.ConfigError: codec: unknown name 'nf5'; did you mean 'nf4'?
    """
    return Codec(layout_of(name))
