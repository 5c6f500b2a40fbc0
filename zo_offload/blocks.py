"""The repeated blocks of a model, found in its module tree alone: no architecture is named.

They are the outermost repeated items of ``nn.ModuleList`` s. "Repeated" means that an item has a
sibling of its own class which shares at least half of its parameter names and shapes. Transformer
layers qualify (T5's first block differs from the others by one table only); Swin's stages, whose
widths differ, do not, so the search goes on inside them.
"""

from collections.abc import Sequence

from torch import nn

from zo_offload.errors import ConfigError, ModelError

WRAPPED = ".base_layer"  # where peft puts a layer that it adapts


def repeated_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The outermost repeated items of the model's module lists, with their paths, in order."""
    found: dict[int, tuple[str, nn.Module]] = {}
    _search(model, "", found)
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no repeated blocks in a ModuleList; "
            'name the classes that should move together: "unit": ["MyBlock"]'
        )
    return list(found.values())


def _search(module: nn.Module, path: str, found: dict[int, tuple[str, nn.Module]]) -> None:
    for name, child in module.named_children():
        here = f"{path}.{name}" if path else name
        if isinstance(child, nn.ModuleList):
            _search_list(child, here, found)
        else:
            _search(child, here, found)


def _search_list(items: nn.ModuleList, path: str, found: dict[int, tuple[str, nn.Module]]) -> None:
    signatures = [_signature(item) for item in items]
    for position, item in enumerate(items):
        here = f"{path}.{position}"
        if any(
            _alike(signatures[position], other)
            for i, other in enumerate(signatures)
            if i != position
        ):
            found.setdefault(id(item), (here, item))
            continue
        inside: dict[int, tuple[str, nn.Module]] = {}
        _search(item, here, inside)
        if len(inside) > 1:
            found.update({key: value for key, value in inside.items() if key not in found})
        elif len(items) == 1 and signatures[0][1]:
            found.setdefault(id(item), (here, item))


def _signature(module: nn.Module) -> tuple[type, set[tuple[str, tuple[int, ...]]]]:
    """Class, parameter names and shapes; names as they were before ``peft`` wrapped a layer."""
    return type(module), {
        (name.replace(WRAPPED, ""), tuple(p.shape)) for name, p in module.named_parameters()
    }


def _alike(a: tuple[type, set], b: tuple[type, set]) -> bool:
    return a[0] is b[0] and bool(a[1]) and 2 * len(a[1] & b[1]) >= min(len(a[1]), len(b[1]))


def named_classes(model: nn.Module, classes: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """The outermost modules of these classes, with their paths, in order.

    Raises:
        ConfigError: A class name matches nothing.
    """
    blocks: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        inside_another = any(name.startswith(f"{path}.") for path, _ in blocks)
        if type(module).__name__ in classes and not inside_another:
            blocks.append((name, module))
    missing = sorted(set(classes) - {type(module).__name__ for _, module in blocks})
    if missing:
        present = sorted({type(module).__name__ for module in model.modules()})
        raise ConfigError(
            f"zeroth_order.unit: no module of class {missing[0]!r}; the model has "
            + ", ".join(present)
        )
    return blocks
