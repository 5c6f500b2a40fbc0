import logging
from typing import Any

from . import groups as groups

logger: logging.Logger

def __getattr__(name: str) -> Any: ...
