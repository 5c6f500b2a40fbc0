"""What is said of a pickle that torch refuses. Its own words advise to run the code in it."""

import re

import torch

UnpicklingError: type[Exception] = torch.serialization.pickle.UnpicklingError  # pyright: ignore[reportPrivateImportUsage]
SAFE = "take its weights as safetensors (save_pretrained writes them), or fetch its files again"


def unread(error: Exception) -> str:
    """What is wrong with a `.bin` file.

    Example:
        >>> unread(ValueError("Trying to load unsupported GLOBAL posix.system whose ..."))
        'a .bin file of weights asks to run posix.system, and no code of a checkpoint is run'
    """
    asked = re.search(r"\bGLOBAL (\S+)", str(error))
    if asked is None:
        return "a .bin file of weights cannot be read: it is damaged, or holds more than tensors"
    return f"a .bin file of weights asks to run {asked[1]}, and no code of a checkpoint is run"
