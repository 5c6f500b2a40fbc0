"""Codecs: how weights are packed where they cross the bus or rest; ``docs/codecs.md``."""

from zo_offload.codec.codec import NAMES, Codec, codec_of

__all__ = ["NAMES", "Codec", "codec_of"]
