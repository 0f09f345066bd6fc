"""Host memory that training has freed, given back to the system."""

import ctypes
import time
from collections.abc import Callable
from functools import cache

__all__ = ["Trimmer"]

SECONDS = 60.0  # between two trims


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's `malloc_trim`; None where the C library is another."""
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return None


class Trimmer:
    """Has glibc return freed memory once a minute at most.

    By itself, glibc returns only the end of its heap, and small objects that stay, such as the loss of each step,
    come to lie there. The heap of `dmsresnet` on CIFAR-10 grew by 1.3 GB an epoch, to 12.6 GB; 10.4 GB of them were
    free.
    """

    def __init__(self):
        self.last = time.monotonic()

    def trim(self) -> None:
        now, call = time.monotonic(), _malloc_trim()
        if call is not None and now - self.last >= SECONDS:
            self.last = now
            call(0)
