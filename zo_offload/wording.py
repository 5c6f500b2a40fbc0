"""Phrases of errors, and numbers in words, that are the same wherever they are needed."""

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


def as_bytes(count: float) -> str:
    """Bytes with a binary unit.

    Example:
        >>> as_bytes(1536), as_bytes(3 * 2**30)
        ('1.5 KiB', '3.0 GiB')
    """
    if count < 1024:
        return f"{count:.0f} B"
    value, units = float(count), iter(["KiB", "MiB", "GiB", "TiB"])
    unit = next(units)
    value /= 1024
    while value >= 1024:
        value, unit = value / 1024, next(units)
    return f"{value:.1f} {unit}"


def as_traffic(count: float) -> str:
    """Bytes with a decimal unit, as rates of links and disks have.

    Example:
        >>> as_traffic(0), as_traffic(1_250_000), as_traffic(3.2e12)
        ('0.0 kB', '1.2 MB', '3200.0 GB')
    """
    unit, size = ("GB", 1e9) if count >= 1e9 else ("MB", 1e6) if count >= 1e6 else ("kB", 1e3)
    return f"{count / size:.1f} {unit}"


def as_loss(value: float | None) -> str:
    """Four digits.

    Example:
        >>> as_loss(0.5), as_loss(None)
        ('0.5000', 'not finite')
    """
    return "not finite" if value is None else f"{value:.4f}"


def as_speed(steps_per_second: float) -> str:
    """Steps a second, or seconds a step, whichever is above one.

    Example:
        >>> as_speed(4.0), as_speed(0.05)
        ('4.00 steps/s', '20.0 s/step')
    """
    if steps_per_second >= 1:
        return f"{steps_per_second:.2f} steps/s"
    return f"{1 / steps_per_second:.1f} s/step"


def as_time(seconds: int) -> str:
    """Hours, minutes, seconds.

    Example:
        >>> as_time(3725), as_time(42)
        ('1:02:05', '0:42')
    """
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
