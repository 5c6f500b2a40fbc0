"""Weights as others read them: one safetensors file, each parameter in the forward's dtype."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from zo_offload import files
from zo_offload.errors import CheckpointError
from zo_offload.weights import Weights


def write_model(path: Path, weights: Weights, frozen: bool = True) -> None:
    """Write every parameter under its first name; a tied one once.

    Of a matrix with an overlay the whole is written, with the overlay's values in it.

    Args:
        path: Of the file; its directory is made.
        weights: To write, at the current step.
        frozen: Also what does not move.

    Raises:
        CheckpointError: The system refuses; what stood at ``path`` stays.
    """
    laid_over = weights.map.overlays
    values_of = {overlay.name for overlay in laid_over.values()}
    values = {
        name: weights.value(name)
        for name, ((_, span, _), *_) in weights.map.places.items()
        if (frozen or span.trainable or name in laid_over) and name not in values_of
    }
    try:
        files.make_directory(path.parent, 0o777)
        with files.new_file(path) as aside:
            save_file(values, aside, {"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: cannot write the model: {error}; make room there, or let this user write"
        ) from error
