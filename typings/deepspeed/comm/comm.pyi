from typing import Any

class CommsLogger:
    enabled: bool
    comms_dict: dict[str, dict[int, list[Any]]]
    def append(self, raw_name: str, record_name: str, latency: float, msg_size: int) -> None: ...

comms_logger: CommsLogger

def __getattr__(name: str) -> Any: ...
