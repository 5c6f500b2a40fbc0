"""What moved in a run, found again: its journal's header holds the digest of the names.

With a ``direction_scale`` the header names each parameter that moves. Else the digest is compared
with those of what a JSON can choose by kind and by neighbouring layers; patterns cannot be guessed,
and are taken from the run's JSON, where it is given.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from glob import escape
from itertools import combinations
from typing import Any

from torch import nn

from zo_offload.config_trainable import TrainableConfig
from zo_offload.errors import ConfigError, JournalError
from zo_offload.trainable.detect import is_peft_model
from zo_offload.trainable.kinds import KINDS, by_kind
from zo_offload.trainable.peft import written_keys
from zo_offload.units import block_map, in_units

ALL = {"mode": "full"}


def digest_of(names: Iterable[str]) -> str:
    """As headers have it.

    Example:
        >>> digest_of(["b", "a"]) == digest_of(["a", "b"])
        False
    """
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def candidates(
    model: nn.Module, header: Mapping[str, Any], given: TrainableConfig | None
) -> Iterator[dict[str, Any]]:
    """What the JSON's ``trainable`` may have said: one has the header's digests.

    Args:
        model: The base, as it was loaded.
        header: A journal's.
        given: What the run's JSON says, where there is one.

    Raises:
        JournalError: Nothing that can be found without the run's JSON has the header's digest.
    """
    said = header.get("trainable", ALL)
    mode = said.get("mode")
    if given is not None:
        yield given.model_dump(exclude_none=True)
    elif mode == "full":
        named = {"mode": mode, **_named(model, header, said.get("moves"))}
        if "rotate" not in said:
            yield named
            return
        for blocks in range(1, len(block_map(model).paths) + 1):
            yield {**named, "rotate": {"blocks": blocks, "interval": said["rotate"]["interval"]}}
    elif mode == "low_rank":
        factors = {key: said[key] for key in ("rank", "interval", "momentum")}
        yield {"mode": mode, **factors, **_named(model, header, said.get("moves"))}
    elif mode == "scales":
        yield {"mode": mode, **_of_matrices(model, header, said["matrices"])}
    elif mode == "peft":
        yield {"mode": mode, **({} if is_peft_model(model) else {"peft_config": _adapter(said)})}
    elif mode == "sparse":
        raise JournalError(
            "header.trainable: the weights were chosen by a mask, of which the journal holds the "
            "digest; name the run's JSON: --config FILE"
        )
    else:
        raise JournalError(
            f"header.trainable.mode: {mode!r} is none that this zo_offload knows; use the version "
            "that wrote it"
        )


def _named(model: nn.Module, header: Mapping[str, Any], digest: str | None) -> dict[str, Any]:
    """The names whose digest it is, as patterns; nothing where all move."""
    if digest is None:
        return {}
    choices = _choices(model, header["scales"])
    found = next((names for names in choices if digest_of(names) == digest), None)
    return _as_patterns(model, found)


def _of_matrices(model: nn.Module, header: Mapping[str, Any], digest: str) -> dict[str, Any]:
    """The same of matrices in units, whose digest is of the model's order."""
    inside = in_units(model)
    matrices = [name for name, p in model.named_parameters() if p.ndim > 1 and name in inside]
    scales = {name.removesuffix(".scales") for name in header["scales"]}
    for names in _choices(model, scales):
        if digest_of(name for name in matrices if name in names) == digest:
            return _as_patterns(model, [name for name in matrices if name in names])
    return _as_patterns(model, None)


def _as_patterns(model: nn.Module, names: Iterable[str] | None) -> dict[str, Any]:
    if names is None:
        raise JournalError(
            "header.trainable: the journal holds the digest of what moved, and no kinds and layers "
            f"of {type(model).__name__} have it; name the run's JSON: --config FILE"
        )
    return {"parameters": [escape(name) for name in names]}


def _choices(model: nn.Module, scaled: Iterable[str]) -> Iterator[list[str]]:
    """Sorted names, the likeliest first: with a scale of their own, all, of kinds, of layers."""
    everything = sorted(name for name, _ in model.named_parameters())
    yield sorted(scaled)
    kinds = list(_by_kinds(model, everything))
    yield from kinds
    blocks = block_map(model)
    for first in range(len(blocks.paths)):
        for last in range(first, len(blocks.paths)):
            for names in kinds:
                yield [name for name in names if first <= blocks.block_of[name] <= last]


def _by_kinds(model: nn.Module, everything: list[str]) -> Iterator[list[str]]:
    yield everything
    for count in range(1, len(KINDS) + 1):
        for kinds in combinations(KINDS, count):
            try:
                yield sorted(by_kind(model, kinds))
            except ConfigError:
                continue  # the model has none of them


def _adapter(said: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the one adapter that a run began with anew."""
    adapters = said["adapters"]
    if list(adapters) != ["default"]:
        raise JournalError(
            f"header.trainable.adapters: {', '.join(adapters)}; one that is called default can be "
            "made again: give the directory of the adapters as --base"
        )
    return written_keys(adapters["default"])
