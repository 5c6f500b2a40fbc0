"""The models are as small as those of ``models``."""

from models.conftest import one_thread

__all__ = ["one_thread"]
