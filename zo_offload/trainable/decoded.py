"""A mark beside an exported model whose matrices were decoded, and values written into them.

Packed once more they would be other matrices: groups take new scales from what was written. So who
evaluates such a model leaves it as it is, whatever the JSON of its run says of the wire.
"""

import json
from pathlib import Path

from zo_offload.errors import ConfigError

MARK = "zo_offload.json"


def mark(directory: Path, mode: str) -> None:
    """Say so of the model in a directory.

    Args:
        directory: That holds the model.
        mode: By which it was trained.
    """
    (directory / MARK).write_text(json.dumps({"decoded_after": mode}) + "\n")


def is_marked(directory: str | Path) -> bool:
    """Whether the model in a directory is such a one.

    Raises:
        ConfigError: The mark cannot be read.

    Example:
        >>> is_marked("no/such/directory")
        False
    """
    path = Path(directory) / MARK
    try:
        if not path.is_file():
            return False
        return isinstance(json.loads(path.read_text(encoding="utf-8"))["decoded_after"], str)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: damaged ({error}); export the model again, or remove the file and leave "
            "zeroth_order.wire out"
        ) from error
