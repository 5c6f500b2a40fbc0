from collections.abc import Callable
from typing import Any

initialize: Callable[..., Any]

def __getattr__(name: str) -> Any: ...
