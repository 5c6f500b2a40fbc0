"""Runs the examples in the package's docstrings.

pytest's own ``--doctest-modules`` imports every module while it collects, DeepSpeed with them.
Here a module is imported only if it has an example, and only when its test runs.
"""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "zo_offload"


def modules_with_examples() -> list[str]:
    found = [path for path in PACKAGE.rglob("*.py") if ">>> " in path.read_text(encoding="utf-8")]
    names = [path.relative_to(PACKAGE.parent).with_suffix("").parts for path in found]
    return sorted(".".join(parts).removesuffix(".__init__") for parts in names)


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_hold(name: str):
    num_failed, _ = doctest.testmod(import_module(name), optionflags=doctest.ELLIPSIS)
    assert num_failed == 0, "the failures are in the captured output"
