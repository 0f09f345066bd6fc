"""Work that a background thread does a little ahead of its use."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["ahead"]

Item, Made = TypeVar("Item"), TypeVar("Made")

BATCHES = 4


def ahead(make: Callable[[Item], Made], items: Iterable[Item], most: int = BATCHES) -> Iterator[Made]:
    """What `make` gives for each item, in order, made by one thread that is at most so many items ahead.

    An error in `make` is raised when its turn comes. The thread ends with the iterator.
    """
    waiting: deque[Future] = deque()
    pool = ThreadPoolExecutor(1, "ahead")
    try:
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
