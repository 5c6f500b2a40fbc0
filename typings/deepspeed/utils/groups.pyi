from typing import Any

mpu: Any

def __getattr__(name: str) -> Any: ...
