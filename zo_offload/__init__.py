"""Fine-tune language models far larger than the accelerator, with forward passes only.

Names are resolved on first use, so that importing the package is quick, imports neither DeepSpeed
nor transformers, and starts nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zo_offload.config import ZOConfig
    from zo_offload.engine import ZOEngine, initialize
    from zo_offload.integrations.trainer import install, uninstall
    from zo_offload.step import Stepper

__version__ = "0.1.0"
__all__ = [
    "Stepper",
    "ZOConfig",
    "ZOEngine",
    "__version__",
    "initialize",
    "install",
    "uninstall",
]

_HOMES = {
    "Stepper": "zo_offload.step",
    "ZOConfig": "zo_offload.config",
    "ZOEngine": "zo_offload.engine",
    "initialize": "zo_offload.engine",
    "install": "zo_offload.integrations.trainer",
    "uninstall": "zo_offload.integrations.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'zo_offload' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
