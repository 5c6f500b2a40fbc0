"""Phrases of error messages that are the same wherever they are needed."""

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from zo_offload.errors import ConfigError


def hint(key: object, known: Collection[str]) -> str:
    """What a user may have meant by an unknown key.

    Example:
        >>> hint("probs", ["probes", "eps"])
        "did you mean 'probes'?"
        >>> hint("x", ["probes", "eps"])
        'valid keys: probes, eps'
    """
    near = get_close_matches(str(key), known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(known)}"


def refuse_unknown(path: str, found: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse the first key of an object that is not known.

    Raises:
        ConfigError: With the nearest valid key.
    """
    for key in found:
        if key not in known:
            raise ConfigError(f"{path}.{key}: unknown key; {hint(key, known)}")


def one_line(text: object) -> str:
    """White space folded.

    Example:
        >>> one_line("two   words")
        'two words'
    """
    return " ".join(str(text).split())


def is_out_of_memory(error: BaseException) -> bool:
    """Torch has a class for it on accelerators only; on a CPU it says so in words.

    Example:
        >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
        True
    """
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)
