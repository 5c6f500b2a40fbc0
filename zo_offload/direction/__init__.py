"""Directions: the distributions of z, and the scale of z for each tensor.

``z = direction(seed, step, probe, parameter index)[element]`` is a pure function
(``ops.reference``), so any slice can be made anywhere at any time, and two bytes of scalars stand
for a whole update.
"""

import math
from collections.abc import Mapping

import torch

from zo_offload.errors import ModelError
from zo_offload.in_order import total as added

NAMES = ("rademacher", "gaussian")
PART = 1 << 24  # elements that are summed at once
RMS_FLOOR = 1 / 16
"""Least scale of a tensor, as a share of the model's RMS: a bias of zeros must still move."""


def rms_scales(parameters: Mapping[str, torch.Tensor], relative: bool = False) -> dict[str, float]:
    """A scale for each tensor proportional to the RMS of its values.

    A large tensor is then perturbed in proportion to its size, whatever its own. Scales are
    relative to the RMS over all given tensors, so that the length of z, and with it the meaning of
    ``eps`` and ``lr``, stays what it is without scales. They are rounded to eight significant bits,
    so that the order of summation cannot change them.

    Args:
        parameters: Trainable values by name, any floating dtype.
        relative: Leave them as they are instead, so that ``eps`` is a share of the weights' size:
            0.1 perturbs each tensor by a tenth of its own, in models large and small.

    Returns:
        Factor on z by name.

    Raises:
        ModelError: A value is not finite.

    Example:
        >>> rms_scales({"a": torch.full((4,), 3.0), "b": torch.full((4,), 4.0)})
        {'a': 0.84765625, 'b': 1.1328125}
        >>> rms_scales({"a": torch.full((4,), 3.0), "b": torch.full((4,), 4.0)}, relative=True)
        {'a': 3.0, 'b': 4.0}
    """
    squares = {name: (square(v), v.numel()) for name, v in parameters.items()}
    return scales_from(squares, relative)


def scales_from(
    squares: Mapping[str, tuple[float, int]], relative: bool = False
) -> dict[str, float]:
    """The same from each tensor's sum of squares (:func:`square`) and number of elements."""
    squares = {name: pair for name, pair in squares.items() if pair[1]}
    if not squares:
        return {}
    for name, (total, count) in squares.items():
        if not math.isfinite(total):
            raise ModelError(
                f"{name}: not all of its {count:,} weights are finite numbers (their squares sum "
                f'to {total}); is the checkpoint whole? "direction_scale": "none" needs no sums'
            )
    sums, counts = zip(*squares.values(), strict=True)
    overall = math.sqrt(added(sums) / sum(counts)) or 1.0
    unit = overall if relative else 1.0
    return {
        name: _eight_bits(unit * max(math.sqrt(total / count) / overall, RMS_FLOOR))
        for name, (total, count) in squares.items()
    }


def square(values: torch.Tensor) -> float:
    """Sum of squares in float64, a part at a time: a table of a large model takes gigabytes."""
    parts = values.detach().reshape(-1).split(PART)
    return added(float(part.double().square().sum()) for part in parts)


def _eight_bits(value: float) -> float:
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 256) / 256, exponent)
