"""How long a rank waits for another that says nothing.

A process that ends, and a host that vanishes, are found out by the connection itself. What is left
is a rank that computes, writes something large, or hangs: the log says for whom this one waits, and
after ``timeout`` seconds the run ends.
"""

import logging
import time

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 7200.0  # of the link, until the JSON says otherwise
FIRST_NOTICE_SECONDS = 300.0


class SilentError(OSError):
    """The time is up."""


class Patience:
    """Of one wait.

    Args:
        who: Is waited for, in words.
        timeout: Seconds until it is lost.
        waited: Of them, how many have gone by.

    Example:
        >>> Patience("rank 3", timeout=0.0).ask()
        Traceback (most recent call last):
        zo_offload.replica.patience.SilentError: silent for 0 s
    """

    def __init__(self, who: str, timeout: float, waited: float = 0.0) -> None:
        self._who, self._timeout = who, timeout
        self._began = time.monotonic() - waited
        self._notice = FIRST_NOTICE_SECONDS

    def ask(self) -> None:
        """Called while nothing arrives: tells of the wait, at growing intervals.

        Raises:
            SilentError: It has taken ``timeout`` seconds.
        """
        waited = time.monotonic() - self._began
        if waited >= self._timeout:
            raise SilentError(f"silent for {self._timeout:.0f} s")
        if waited >= self._notice:
            logger.warning("waiting for %s since %.0f minutes", self._who, waited / 60)
            self._notice *= 2
