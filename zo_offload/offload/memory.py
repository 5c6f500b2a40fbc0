"""Host memory that an accelerator copies from: page-locked where the system allows it."""

import logging

import torch

logger = logging.getLogger(__name__)
_refused: set[str] = set()


def host_buffer(num_bytes: int, pin_memory: bool) -> torch.Tensor:
    """Zeroed uint8 ``[num_bytes]``; pageable, with one warning, where page-locking is refused.

    Raises:
        RuntimeError: There is no such memory at all.

    Example:
        >>> host_buffer(3, pin_memory=False)
        tensor([0, 0, 0], dtype=torch.uint8)
    """
    if pin_memory:
        try:
            return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            if reason not in _refused:
                _refused.add(reason)
                logger.warning(
                    "host memory cannot be page-locked (%s); pageable memory takes its place, and "
                    "copies to the device are slower: raise the limit (ulimit -l unlimited), or "
                    'write "pin_memory": false',
                    reason,
                )
    return torch.zeros(num_bytes, dtype=torch.uint8)
