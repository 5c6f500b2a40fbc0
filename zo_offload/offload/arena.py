"""Every byte of weight memory on the device, taken in one place so that it can be counted."""

from dataclasses import dataclass, field

import torch

from zo_offload.errors import StoreError


@dataclass
class Arena:
    """Hands out weight memory on one device.

    Attributes:
        device: Where the memory lies.
        budget: Most bytes that may be held at once, or None.
        held: Bytes held now, by purpose (``slots``, ``scratch``, ``ambient``, ``resident``).
        peak_bytes: Most bytes ever held at once.

    Example:
        >>> arena = Arena(torch.device("cpu"))
        >>> arena.take("slots", 1024).shape, arena.held, arena.peak_bytes
        (torch.Size([1024]), {'slots': 1024}, 1024)
    """

    device: torch.device
    budget: int | None = None
    held: dict[str, int] = field(default_factory=dict)
    peak_bytes: int = 0

    @property
    def held_bytes(self) -> int:
        """Bytes held now."""
        return sum(self.held.values())

    def take(self, purpose: str, num_bytes: int) -> torch.Tensor:
        """A zeroed uint8 buffer ``[num_bytes]`` that stays at one address.

        Raises:
            StoreError: The budget would be exceeded.
        """
        if self.budget is not None and self.held_bytes + num_bytes > self.budget:
            raise StoreError(
                f"device_budget: {purpose} needs {num_bytes:,} bytes beside "
                f"{self.held_bytes:,} held, but the budget is {self.budget:,}; raise it, or move "
                "weights off the device (offload_param)"
            )
        buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)
        self.held[purpose] = self.held.get(purpose, 0) + num_bytes
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        return buffer
