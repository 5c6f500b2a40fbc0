"""Choosing parameters by name and by layer, and dealing layers out to groups that take turns."""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from zo_offload.config_trainable import TrainableConfig
from zo_offload.errors import ConfigError
from zo_offload.trainable.kinds import by_kind
from zo_offload.trainable.moving import Rotation
from zo_offload.units import AMBIENT, BlockMap, block_map

PATH = "zeroth_order.trainable"
RANGE = re.compile(r"(-?\d+)(?:-(-?\d+))?")


def selected(model: nn.Module, said: TrainableConfig, unit: str | Sequence[str] | None) -> set[str]:
    """First names of the parameters that are of all that the JSON says: names, kinds, layers.

    Args:
        model: Whose.
        said: ``zeroth_order.trainable``.
        unit: As in the JSON.

    Raises:
        ConfigError: A part of it chooses nothing.
    """
    found = {name for name, _ in model.named_parameters()}
    if said.parameters is not None:
        found &= by_name(model, said.parameters)
    if said.kinds is not None:
        found &= by_kind(model, said.kinds)
    if said.layers is not None:
        found &= by_layer(block_map(model, unit), said.layers)
    return found


def by_name(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """First names of the parameters that a pattern matches, by any of their names.

    Args:
        model: Whose parameters.
        patterns: As in a shell: ``*.self_attn.*``.

    Raises:
        ConfigError: A pattern matches nothing.

    Example:
        >>> sorted(by_name(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), ["1.*"]))
        ['1.bias', '1.weight']
    """
    named = list(model.named_parameters(remove_duplicate=False))
    first = {id(parameter): name for name, parameter in reversed(named)}
    found: set[str] = set()
    for pattern in patterns:
        matched = {first[id(p)] for name, p in named if fnmatchcase(name, pattern)}
        if not matched:
            near = get_close_matches(pattern, [name for name, _ in named], n=1, cutoff=0.0)
            raise ConfigError(
                f"{PATH}.parameters: {pattern!r} matches none of {len(named)} parameters; the "
                f"nearest is {', '.join(near) or 'none'}"
            )
        found |= matched
    return found


def by_layer(blocks: BlockMap, layers: Sequence[int | str]) -> set[str]:
    """Names of the parameters inside these blocks; what two blocks share is in neither.

    Args:
        blocks: Of the model.
        layers: Numbers from 0, or from the end where negative; ranges such as ``20-31``, which
            hold both ends.

    Raises:
        ConfigError: There is no such block.
    """
    count = len(blocks.paths)
    chosen = {number for layer in layers for number in _numbers(layer, count)}
    return {name for name, block in blocks.block_of.items() if block in chosen}


def _numbers(layer: int | str, count: int) -> range:
    match = RANGE.fullmatch(str(layer))
    assert match is not None, layer  # the config has been parsed
    first, last = int(match[1]), int(match[2] or match[1])
    for number in (first, last):
        if not -count <= number < count:
            nearest = max(-count, min(number, count - 1))
            raise ConfigError(
                f"{PATH}.layers: there is no layer {number}: the model has {count}, from 0 to "
                f"{count - 1}; the nearest is {nearest}"
            )
    first, last = first % count, last % count
    if last < first:
        raise ConfigError(
            f"{PATH}.layers: {layer!r} is empty: {last} lies before {first}"
            "; write the smaller one first"
        )
    return range(first, last + 1)


def matrices_of(model: nn.Module, unit: str | Sequence[str] | None) -> dict[str, nn.Parameter]:
    """Of the blocks, by first name: what masks choose from.

    Args:
        model: Whose.
        unit: As in the JSON.
    """
    block_of = block_map(model, unit).block_of
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and parameter.is_floating_point() and block_of[name] != AMBIENT
    }


def turns(model: nn.Module, blocks: BlockMap, blocks_at_once: int, interval: int) -> Rotation:
    """Groups of so many neighbouring blocks, in order; what lies in no block is the last group."""
    moves = {name for name, p in model.named_parameters() if p.requires_grad}
    movable = sorted({blocks.block_of[name] for name in moves} - {AMBIENT})
    group = {block: i // blocks_at_once for i, block in enumerate(movable)}
    last = len(set(group.values()))
    group_of: Mapping[str, int] = {name: group.get(blocks.block_of[name], last) for name in moves}
    return Rotation(group_of, max(group_of.values(), default=0) + 1, interval)
