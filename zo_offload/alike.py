"""What must be alike on every rank; compared before the first step.

Ranks apply the same updates by themselves, so a rank with another learning rate would go another
way in silence, and where ranks of a machine share the weights each would leave its part of them
other than the rest. Where units rest, and where files are, is a machine's own.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from zo_offload import __version__
from zo_offload.config import ZOConfig
from zo_offload.replica import Replica

VERSION = {"version of zo_offload": __version__}
LOCAL = {  # of our block: what fits a machine, and names of files, of which the header has digests
    *("offload_param", "device_budget", "host_budget", "unit", "live_lanes", "head_chunk"),
    *("joined_rows", "aio", "journal.path", "trainable.mask", "trainable.adapter"),
    "replica.timeout_seconds",
}
LOCAL_OPTIONS = {"model", "train", "dev", "data", "task", "config"}  # names of files; digests say


def of_block(config: ZOConfig) -> dict[str, str]:
    """The package that takes steps, and what our block says of them, by key."""
    return VERSION | flat(config.model_dump(mode="json"), "zeroth_order", LOCAL)


def refuse_other_options(replica: Replica, asked: Mapping[str, Any]) -> None:
    """Compare what every rank's command is asked, but for names of files, and the package.

    Raises:
        ReplicaError: On every rank, naming those that differ from rank 0, and in what.
    """
    options = VERSION | flat(asked, "", LOCAL_OPTIONS)
    mend = "give the same command, JSON and data on every rank"
    replica.refuse_differences("the options", options, mend)


def flat(value: Mapping[str, Any], where: str, without: set[str] | None = None) -> dict[str, str]:
    """Every leaf as JSON, by its path.

    Args:
        value: JSON.
        where: Put before each path.
        without: Paths, below ``where``, that are left out.

    Example:
        >>> flat({"a": {"b": 1, "c": None}, "d": [2.5]}, "x", {"a.c"})
        {'x.a.b': '1', 'x.d': '[2.5]'}
    """
    leaves = _leaves(value, "", without or set())
    return {
        f"{where}.{path}" if where else path: json.dumps(leaf, sort_keys=True)
        for path, leaf in leaves
    }


def _leaves(value: Any, path: str, without: set[str]) -> Iterator[tuple[str, Any]]:
    if path in without:
        return
    if not isinstance(value, Mapping):
        yield path, value
        return
    for key, inner in value.items():
        yield from _leaves(inner, f"{path}.{key}" if path else key, without)
