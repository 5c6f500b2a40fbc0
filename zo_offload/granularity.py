"""How far repeated blocks are divided into units: not at all, by sublayer, or by linear layer.

A block of 175 billion parameters is 3.6 GB in bfloat16, and a device holds two in flight and one
perturbed. Smaller units need less. Noise belongs to a parameter, not to its unit, so that a
division changes no bit of any direction.

What lies in a block outside the finer units (norms, vectors, parameters of the block itself) is
ambient then: it stays on the device.
"""

from collections.abc import Iterator, Sequence

from torch import nn

Block = tuple[str, nn.Module]

GRANULARITIES = ("block", "sublayer", "linear")
"""From coarse to fine."""


def divide(blocks: Sequence[Block], granularity: str) -> list[Block]:
    """The modules that move together, with their paths, in order.

    Args:
        blocks: Repeated blocks, none inside another.
        granularity: ``block``: each as it is. ``sublayer``: the children of a block that hold a
            matrix. ``linear``: the innermost modules that hold one. A block without any stays
            whole; a module that two blocks share is given once.

    Example:
        >>> block = nn.Sequential(nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)))
        >>> [name for name, _ in divide([("0", block)], "sublayer")]
        ['0.1']
        >>> [name for name, _ in divide([("0", block)], "linear")]
        ['0.1.0', '0.1.1']
    """
    if granularity == "block":
        return list(blocks)
    inside = {"sublayer": sublayers, "linear": linears}[granularity]
    found: dict[int, Block] = {}
    for block in blocks:
        for path, module in list(inside(*block)) or [block]:
            found.setdefault(id(module), (path, module))
    return list(found.values())


def sublayers(path: str, block: nn.Module) -> Iterator[Block]:
    """Children that hold a matrix; of a container, such as a list of experts, its items."""
    for name, child in block.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):  # has no forward to stop at
            yield from sublayers(f"{path}.{name}", child)
        elif any(parameter.ndim > 1 for parameter in child.parameters()):
            yield f"{path}.{name}", child


def linears(path: str, block: nn.Module) -> Iterator[Block]:
    """Modules with a matrix of their own and no module with parameters inside."""
    for name, module in block.named_modules():
        own = list(module.parameters(recurse=False))
        if any(parameter.ndim > 1 for parameter in own) and len(own) == _count(module):
            yield (f"{path}.{name}" if name else path), module


def _count(module: nn.Module) -> int:
    return sum(1 for _ in module.parameters())
