"""A disk that is full for one file, as the system has it for every user."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def at_most(num_bytes: int) -> Iterator[None]:
    """No file grows beyond it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
