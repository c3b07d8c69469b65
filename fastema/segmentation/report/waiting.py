"""How long a loop waited for its data: the time spent in the iterator, apart from the time spent in the loop's body."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Waiting(Generic[T]):
    """Iterates over something and adds up how long every `next()` kept the caller.

    Attributes:
        seconds: waited so far, over all passes. The start of workers counts: nobody trains meanwhile.

    Example:
        >>> batches = Waiting([1, 2, 3])
        >>> sum(batches), batches.seconds < 1
        (6, True)
    """

    def __init__(self, items: Iterable[T]) -> None:
        self.seconds = 0.0
        self._items = items

    def __iter__(self) -> Iterator[T]:
        started = time.perf_counter()
        iterator = iter(self._items)
        while True:
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - started
            yield item
            started = time.perf_counter()
