"""The number of updates of an average, whose tensor may be on a GPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor


class Counter:
    """Caches the value of a counter tensor; reads it again only if others wrote to it."""

    def __init__(self) -> None:
        self._tensor: Callable[[], Tensor | None] = lambda: None  # a weak reference to what was read
        self._mark = (0, 0)
        self._value: Any = None

    def read(self, tensor: Tensor) -> Any:
        """Return the value; on a GPU this waits only if it was written to since the last call."""
        if tensor.device.type == "cpu" or tensor.is_inference():  # no wait; inference tensors have no version
            return tensor.item()
        return self.remembered(tensor)

    def remembered(self, tensor: Tensor) -> Any:
        """Return the value as last read, unless the tensor is another one or was written to."""
        mark = (tensor.data_ptr(), tensor._version)
        if self._tensor() is not tensor or mark != self._mark:
            self._tensor, self._mark, self._value = weakref.ref(tensor), mark, tensor.item()
        return self._value

    def increase(self, tensor: Tensor) -> None:
        """Add one to the tensor, which was just read."""
        tensor.add_(1)
        if self._tensor() is tensor:
            self._mark, self._value = (tensor.data_ptr(), tensor._version), self._value + 1
